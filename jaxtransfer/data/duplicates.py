"""The same image, or nearly the same one, in two splits."""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from PIL import Image

from jaxtransfer import files, progress
from jaxtransfer.data import names as naming
from jaxtransfer.data import pipeline
from jaxtransfer.data.images import ImageError
from jaxtransfer.data.sources import Examples
from jaxtransfer.errors import UsageError

# Bits of a side of a perceptual hash. Of 256 bits other images of the same
# stain differ in 60 or more, and a JPEG or a smaller copy in 10 or fewer.
_SIDE = 16
# Two hashes that differ in fewer bits than they have rows share a row, which
# finds them without comparing all with all.
MOST_BITS = _SIDE - 1
_CHUNK = 32  # images between two counts

# row -> row that is the same, of one split and another.
Twins = dict[tuple[str, str], dict[int, int]]


def check_installed(near: bool) -> None:
  """Checks that what is asked for can be done, before anything is opened.

  Args:
    near: `config.data.near_duplicates`.

  Raises:
    UsageError: the library that it needs is not installed.
  """
  if near and importlib.util.find_spec("imagehash") is None:
    raise UsageError(
      "config.data.near_duplicates needs the package imagehash; install it with"
      " pip install 'jaxtransfer[duplicates]', or leave the key out"
    )


def check(
  examples: Examples,
  places: Mapping[str, np.ndarray],
  near: bool,
  path: str | os.PathLike[str],
) -> list[str]:
  """Looks for images that are in two splits, once for a run.

  Args:
    examples: the source.
    places: split -> its rows; those it is worst to be in first.
    near: whether images that only look the same are looked for too.
    path: of duplicates.json, where all are listed and what was found is kept:
      for the same files nothing is read again.

  Returns:
    What was found, a line for each two splits.
  """
  path = pathlib.Path(path)
  # Of several processes one looks, and the others read what it found.
  with files.lock(path.with_name(f".{path.name}.lock"), wait=True):
    about = {"fingerprint": examples.fingerprint(), "near": near}
    stored = _stored(path)
    if all(stored.get(key) == value for key, value in about.items()):
      return stored["notes"]
    rows = np.concatenate(list(places.values()))
    digests = _map(
      examples.digest, rows, "looking for duplicates", examples.unit
    )
    kinds = [("same", "=", _twins(places, digests, {}))]
    if near:
      hashes = _map(
        functools.partial(_hash, examples),
        rows,
        "looking for images that look the same",
        examples.unit,
      )
      twins = _twins(places, hashes, _neighbours(set(hashes.values())))
      for key, same in kinds[0][2].items():
        twins[key] = {r: o for r, o in twins[key].items() if r not in same}
      kinds.append(("alike", "~", twins))
    notes, pairs = [], []
    for kind, sign, twins in kinds:
      for (place, other), of in twins.items():
        pairs += [
          {
            "kind": kind,
            "name": examples.names[row],
            "split": place,
            "other": examples.names[twin],
            "other_split": other,
          }
          for row, twin in of.items()
        ]
        if of:
          notes.append(_note(examples, place, other, of, sign))
    files.write_json(path, {**about, "notes": notes, "pairs": pairs})
  return notes


def _stored(path: pathlib.Path) -> dict[str, Any]:
  try:
    return {"notes": [], **json.loads(path.read_text(encoding="utf-8"))}
  except (OSError, ValueError, TypeError):
    return {}


def _note(
  examples: Examples,
  place: str,
  other: str,
  twins: Mapping[int, int],
  sign: str,
) -> str:
  count, names = len(twins), examples.names
  unit = examples.unit if count > 1 else examples.unit.removesuffix("s")
  are = "are" if count > 1 else "is"
  words = f"{are} also in {other}"
  if sign == "~":
    words = f"look{'s' * (count == 1)} like one of {other}"
  pairs = [f"{names[row]} {sign} {names[twin]}" for row, twin in twins.items()]
  return (
    f"{count:,} {unit} of {place} {words}: {naming.shown(pairs)}. That makes"
    " scores too good:"
    " leave one of each out, or give both the same group."
  )


def _map(
  compute: Callable[[int], str], rows: np.ndarray, what: str, unit: str
) -> dict[int, str]:
  """Returns row -> what is computed of it, of those that can be read."""

  def of_chunk(chunk: Sequence[int]) -> list[tuple[int, str]]:
    pairs = []
    for row in chunk:
      # What cannot be read is dropped, and listed, where it is used.
      try:
        pairs.append((row, compute(row)))
      except ImageError:
        continue
    return pairs

  values: dict[int, str] = {}
  starts = range(0, len(rows), _CHUNK)
  chunks = [rows[start : start + _CHUNK].tolist() for start in starts]
  with (
    futures.ThreadPoolExecutor(pipeline.processors()) as pool,
    progress.Progress(what, unit, len(rows)) as bar,
  ):
    for chunk, pairs in zip(chunks, pool.map(of_chunk, chunks), strict=True):
      values |= dict(pairs)
      bar.update(len(chunk))
  return values


def _hash(examples: Examples, row: int) -> str:
  """Returns a perceptual hash, 256 bits in hexadecimal digits."""
  # An extra: `check_installed` has looked for it.
  import imagehash

  return str(imagehash.phash(Image.fromarray(examples.read(row)), _SIDE))


def _twins(
  places: Mapping[str, np.ndarray],
  values: Mapping[int, str],
  neighbours: Mapping[str, Sequence[str]],
) -> Twins:
  """Finds the images of each split that are in another one.

  Args:
    places: split -> its rows.
    values: row -> what is equal for equal images.
    neighbours: value -> others that count as equal to it.

  Returns:
    (split, a later one) -> row of the one -> a row of the other.
  """
  first: dict[str, dict[str, int]] = {}
  for place, rows in places.items():
    for row in rows.tolist():
      if row in values:
        first.setdefault(values[row], {}).setdefault(place, row)
  twins: Twins = {pair: {} for pair in itertools.combinations(places, 2)}
  for place, other in twins:
    for row in places[place].tolist():
      if row not in values:
        continue
      value = values[row]
      for near in (value, *neighbours.get(value, ())):
        if other in first.get(near, {}):
          twins[place, other].setdefault(row, first[near][other])
  return twins


def _neighbours(hashes: set[str]) -> dict[str, list[str]]:
  """Returns hash -> others that differ in `MOST_BITS` or fewer.

  As many bits can touch all rows but one: two such hashes have a row in
  common, and only those are compared.
  """
  names = sorted(hashes)
  bits = np.array([list(bytes.fromhex(name)) for name in names], np.uint8)
  if not len(names):
    return {}
  rows, words = bits.view(np.uint16), bits.view(np.uint64)
  alike: dict[str, list[str]] = {}
  for row in rows.T:
    order = np.argsort(row, kind="stable")
    step = 1
    # Those of equal rows stand side by side: each is compared with the next,
    # then with the one after that, as far as they are equal.
    left = np.arange(len(order) - 1)
    while len(left := left[left + step < len(order)]):
      one, other = order[left], order[left + step]
      equal = row[one] == row[other]
      left, one, other = left[equal], one[equal], other[equal]
      apart = np.bitwise_count(words[one] ^ words[other]).sum(1)
      for a, b in zip(
        one[apart <= MOST_BITS].tolist(),
        other[apart <= MOST_BITS].tolist(),
        strict=True,
      ):
        alike.setdefault(names[a], []).append(names[b])
        alike.setdefault(names[b], []).append(names[a])
      step += 1
  return {name: list(dict.fromkeys(near)) for name, near in alike.items()}
