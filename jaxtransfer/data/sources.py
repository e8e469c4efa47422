"""Where images come from: manifests, folders, TFDS and the built-in tissue.

All become the same thing, `Examples`: names, labels, groups and a `read(row)`.
Opening one touches no image; a missing or broken one shows when it is read.
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from jaxtransfer.data import images, tissue
from jaxtransfer.errors import UsageError

COLUMNS = ("path", "label", "group", "split", "slide", "task")
SUFFIXES = frozenset(".png .jpg .jpeg .tif .tiff .bmp .webp".split())
# Paths that start elsewhere are seen in a few images as well as in all.
_LOOKED_AT = 100
# How folders and TFDS name the three splits; a manifest says train, val, test.
_SPLIT_NAMES = {
  "train": "train",
  "val": "val",
  "valid": "val",
  "validation": "val",
  "test": "test",
}


@dataclasses.dataclass(eq=False)
class Examples:
  """Labelled images, read one at a time.

  Attributes:
    classes: names of the classes, sorted.
    labels: (N,) int32, index into `classes`.
    names: path (relative to the source) or id of every row.
    groups: patient of every row, or None where no row names one. A row that
      names none among rows that do is a group of its own.
    slides: slide of every row ("" = unknown), or None.
    splits: "train", "val" or "test" of every row, or None: to be drawn.
    tasks: task of every row, or None.
    notes: what was ignored or assumed, a line each, for the user to read.
  """

  classes: list[str]
  labels: np.ndarray
  names: list[str]
  groups: list[str] | None = None
  slides: list[str] | None = None
  splits: list[str] | None = None
  tasks: list[str] | None = None
  notes: list[str] = dataclasses.field(default_factory=list)

  def __len__(self) -> int:
    return len(self.names)

  def read(self, row: int) -> np.ndarray:
    """Reads one image, (H, W, 3) uint8.

    Raises:
      ImageError: it cannot be used, and why.
    """
    raise NotImplementedError

  def fingerprint(self) -> str:
    """Returns a hash that changes when any of the images may have."""
    raise NotImplementedError


def open_source(config: ml_collections.ConfigDict) -> Examples:
  """Opens the images that `config.source` names.

  - `<file>.csv`: a manifest with the columns path and label and, optionally,
    group, split, slide and task. Paths are relative to the file.
  - a folder: `<class>/<image>` or `<split>/<class>/<image>`.
  - `tfds:<name>[/<config>][:<version>]`: a prepared TFDS data set.
  - `synthetic:tissue[/<task>][?<option>=<number>&...]`: tiles drawn by
    `data.tissue.open_tissue`, whose options these are; `size` is
    `image_size` unless given.

  Args:
    config: `config.data`: source, image_size, max_pixels, tfds_dir.

  Returns:
    The examples, in the order of the source.

  Raises:
    UsageError: the source is not there or cannot mean what it says; the line
      names the file and the row.
  """
  source = config.source
  if not source:
    raise UsageError(
      "config.data.source is empty; give a manifest.csv, a folder,"
      " tfds:<name> or synthetic:tissue"
    )
  scheme, _, rest = source.partition(":")
  if scheme == "synthetic":
    return _open_synthetic(rest, config.image_size)
  if scheme == "tfds":
    return _open_tfds(rest, config.tfds_dir or None, config.max_pixels)
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    return _open_folder(path, config.max_pixels)
  if not path.exists():
    raise UsageError(
      f"config.data.source: {source} does not exist; give a manifest.csv, a"
      " folder, tfds:<name> or synthetic:tissue"
    )
  return _open_manifest(path, config.max_pixels)


class _Files(Examples):
  """Images that are files below one directory."""

  def __init__(self, root: pathlib.Path, max_pixels: int, **fields: Any):
    super().__init__(**fields)
    self._root = os.path.abspath(root)
    self._max_pixels = max_pixels

  def read(self, row: int) -> np.ndarray:
    return images.decode(
      os.path.join(self._root, self.names[row]), max_pixels=self._max_pixels
    )

  def fingerprint(self) -> str:
    # A stat is a round trip on a network file system, and 300,000 in a row
    # are minutes; side by side they are seconds.
    chunks = [self.names[i : i + 1024] for i in range(0, len(self), 1024)]
    with futures.ThreadPoolExecutor(16) as pool:
      return _hash(self._max_pixels, pool.map(self._stats, chunks))

  def _stats(self, names: list[str]) -> list[tuple[str, int, int]]:
    found = []
    for name in names:
      try:
        stat = os.stat(os.path.join(self._root, name))
        found.append((name, stat.st_size, stat.st_mtime_ns))
      except OSError:
        found.append((name, -1, -1))
    return found


def _hash(max_pixels: int, items: Iterable[Any]) -> str:
  digest = hashlib.sha256(f"max_pixels={max_pixels}\n".encode())
  for item in items:
    digest.update(json.dumps(item).encode() + b"\n")
  return digest.hexdigest()


def _index(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
  classes = sorted(set(labels))
  number = {name: i for i, name in enumerate(classes)}
  return classes, np.array([number[label] for label in labels], np.int32)


# --- manifests ---------------------------------------------------------------


def _open_manifest(path: pathlib.Path, max_pixels: int) -> Examples:
  columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
  lines: list[int] = []
  notes = []
  rows = _csv_rows(path)
  _, header = next(rows, (0, []))
  header = [name.strip().lower() for name in header]
  for name in ("path", "label"):
    if name not in header:
      raise UsageError(
        f"{path}: no column {name!r}; a manifest is comma-separated and its"
        f" first line names the columns, here {', '.join(header) or 'none'}"
      )
  for name in COLUMNS:
    if header.count(name) > 1:
      raise UsageError(f"{path}: the column {name!r} is there twice")
  unused = [name for name in header if name not in COLUMNS]
  if unused:
    notes.append(f"{path}: columns not used: {', '.join(unused)}")
  positions = [(name, header.index(name)) for name in COLUMNS if name in header]
  for line, row in rows:
    if len(row) != len(header):
      raise UsageError(
        f"{path}, line {line}: {len(row)} cells, the header has {len(header)}"
        " (a comma in a path must be quoted)"
      )
    lines.append(line)
    for name, position in positions:
      columns[name].append(row[position].strip())
  if not lines:
    raise UsageError(f"{path}: no rows")
  for name in ("path", "label"):
    for line, value in zip(lines, columns[name], strict=True):
      if not value:
        raise UsageError(f"{path}, line {line}: empty {name}")
  # An unused optional column reads the same as none.
  optional = {
    name: values if any(values) else None
    for name, values in columns.items()
    if name not in ("path", "label")
  }
  _check_splits(path, lines, optional["split"])
  names = columns["path"]
  _check_duplicates(path, lines, names, optional["task"])
  groups = optional["group"]
  if groups is not None and not all(groups):
    notes.append(
      f"{path}: {groups.count('')} of {len(groups)} rows name no group; each"
      " is taken as a group of its own"
    )
    groups = [
      group or f"ungrouped:{name}"
      for group, name in zip(groups, names, strict=True)
    ]
  some = names[:_LOOKED_AT]
  if not any((path.parent / name).exists() for name in some):
    raise UsageError(
      f"{path}: none of the first {len(some)} images is there; paths start in"
      f" the manifest's folder: {path.parent / some[0]}"
    )
  classes, labels = _index(columns["label"])
  return _Files(
    path.parent,
    max_pixels,
    classes=classes,
    labels=labels,
    names=names,
    groups=groups,
    slides=optional["slide"],
    splits=optional["split"],
    tasks=optional["task"],
    notes=notes,
  )


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Yields (line, cells) of every line that is not blank."""
  try:
    # utf-8-sig: spreadsheets put a byte-order mark before the first column.
    with open(path, newline="", encoding="utf-8-sig") as f:
      reader = csv.reader(f, strict=True)
      for row in reader:
        if any(cell.strip() for cell in row):
          yield reader.line_num, row
  except UnicodeDecodeError as e:
    raise UsageError(f"{path}: not UTF-8 text ({e}); save it as UTF-8") from e
  except csv.Error as e:
    raise UsageError(f"{path}, line {reader.line_num}: {e}") from e
  except OSError as e:
    raise UsageError(f"{path}: {e.strerror}") from e


def _check_splits(
  path: pathlib.Path, lines: list[int], splits: list[str] | None
) -> None:
  for line, split in zip(lines, splits or [], strict=False):
    if split not in ("train", "val", "test"):
      raise UsageError(
        f"{path}, line {line}: split is {split!r}; it must be train, val or"
        " test, in every row or in none"
      )


def _check_duplicates(
  path: pathlib.Path,
  lines: list[int],
  names: list[str],
  tasks: list[str] | None,
) -> None:
  """One image may serve several tasks, but only once each."""
  seen: dict[tuple[str, str], int] = {}
  for row, name in enumerate(names):
    key = (os.path.normpath(name), tasks[row] if tasks else "")
    first = seen.setdefault(key, lines[row])
    if first != lines[row]:
      raise UsageError(
        f"{path}, line {lines[row]}: {name} is also in line {first};"
        " remove one of them"
      )


# --- folders -----------------------------------------------------------------


def _open_folder(root: pathlib.Path, max_pixels: int) -> Examples:
  notes = []
  if (root / "manifest.csv").is_file():
    notes.append(
      f"{root}: read as a folder; its manifest.csv (groups, splits) is not"
      " used, name it as config.data.source to use it"
    )
  top = _folders(root)
  by_split = bool(top) and all(name in _SPLIT_NAMES for name in top)
  names, labels, splits, ignored = [], [], [], 0
  for prefix in [f"{name}/" for name in top] if by_split else [""]:
    for label in _folders(root / prefix):
      with os.scandir(root / prefix / label) as entries:
        found = sorted(
          entry.name for entry in entries if not entry.name.startswith(".")
        )
      kept = [
        n for n in found if pathlib.PurePath(n).suffix.lower() in SUFFIXES
      ]
      if not kept and _folders(root / prefix / label):
        raise UsageError(
          f"{root / prefix / label}: folders where images should be; the"
          " layout is <class>/<image> or <split>/<class>/<image>; for any"
          " other write a manifest.csv"
        )
      ignored += len(found) - len(kept)
      names.extend(f"{prefix}{label}/{n}" for n in kept)
      labels.extend([label] * len(kept))
      if by_split:
        splits.extend([_SPLIT_NAMES[prefix[:-1]]] * len(kept))
  if not names:
    raise UsageError(
      f"{root}: no images; the layout is <class>/<image> or"
      f" <split>/<class>/<image>, with {', '.join(sorted(SUFFIXES))}"
    )
  if ignored:
    notes.append(f"{root}: {ignored} entries that are not images were ignored")
  classes, numbers = _index(labels)
  return _Files(
    root,
    max_pixels,
    classes=classes,
    labels=numbers,
    names=names,
    splits=splits or None,
    notes=notes,
  )


def _folders(path: pathlib.Path) -> list[str]:
  with os.scandir(path) as entries:
    return sorted(
      entry.name
      for entry in entries
      if entry.is_dir() and not entry.name.startswith(".")
    )


# --- TFDS --------------------------------------------------------------------


class _Tfds(Examples):
  """Records of a TFDS data set in a random-access format, encoded images."""

  def __init__(
    self,
    name: str,
    data_dir: str | None,
    image_key: str,
    parts: list[tuple[str, int]],
    files: list[tuple[str, int, int]],
    max_pixels: int,
    **fields: Any,
  ):
    super().__init__(**fields)
    self._name = name
    self._data_dir = data_dir
    self._image_key = image_key
    self._parts = parts  # (split, number of rows), in the order of rows
    self._files = files
    self._max_pixels = max_pixels
    self._sources: dict[str, Any] = {}

  def __getstate__(self) -> dict[str, Any]:
    # Open readers stay in the process that opened them.
    return {**self.__dict__, "_sources": {}}

  def _locate(self, row: int) -> tuple[str, int]:
    for split, count in self._parts:
      if row < count:
        return split, row
      row -= count
    raise IndexError(row)

  def read(self, row: int) -> np.ndarray:
    split, index = self._locate(row)
    if split not in self._sources:
      builder = _tfds_builder(self._name, self._data_dir)
      self._sources[split] = _undecoded(builder, split, self._image_key)
    try:
      encoded = self._sources[split][index][self._image_key]
    # The reader raises whatever its C++ side does on a damaged file.
    except Exception as e:
      raise images.ImageError(f"damaged record: {e}") from None
    return images.decode(encoded, max_pixels=self._max_pixels)

  def fingerprint(self) -> str:
    return _hash(self._max_pixels, self._files)


def _open_tfds(name: str, data_dir: str | None, max_pixels: int) -> Examples:
  import tensorflow_datasets as tfds

  builder = _tfds_builder(name, data_dir)
  features = builder.info.features
  image_key = _only_key(name, features, tfds.features.Image, "image")
  label_key = _only_key(name, features, tfds.features.ClassLabel, "label")
  ignored = [s for s in builder.info.splits if s not in _SPLIT_NAMES]
  used = [s for s in builder.info.splits if s in _SPLIT_NAMES]
  if not used:
    raise UsageError(
      f"tfds:{name}: its splits are {', '.join(ignored)}; train, validation or"
      " test is needed"
    )
  labels, names, splits, parts, files = [], [], [], [], []
  for split in used:
    source = _undecoded(builder, split, image_key)
    for start in range(0, len(source), 256):
      chunk = range(start, min(start + 256, len(source)))
      labels.extend(
        int(record[label_key]) for record in source.__getitems__(list(chunk))
      )
    names.extend(f"{split}/{i:06d}" for i in range(len(source)))
    splits.extend([_SPLIT_NAMES[split]] * len(source))
    parts.append((split, len(source)))
    for filename in builder.info.splits[split].filenames:
      stat = os.stat(os.path.join(builder.data_dir, filename))
      files.append((filename, stat.st_size, stat.st_mtime_ns))
  if min(labels, default=0) < 0:
    raise UsageError(f"tfds:{name}: {names[labels.index(-1)]} has no label")
  label_names = features[label_key].names
  classes, numbers = _index([label_names[label] for label in labels])
  return _Tfds(
    name,
    data_dir,
    image_key,
    parts,
    files,
    max_pixels,
    classes=classes,
    labels=numbers,
    names=names,
    splits=splits if len(set(splits)) > 1 else None,
    notes=[f"tfds:{name}: splits not used: {', '.join(ignored)}"]
    if ignored
    else [],
  )


def _tfds_builder(name: str, data_dir: str | None) -> Any:
  """Opens a prepared TFDS data set; says how to prepare one that is not."""
  import tensorflow_datasets as tfds

  prepare = (
    'pip install "jaxtransfer[tfds-prepare]" && tfds build'
    f" {name} --file_format=array_record"
  ) + (f" --data_dir={data_dir}" if data_dir else "")
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # it warns of what we report ourselves
  try:
    builder = tfds.builder(name, **({"data_dir": data_dir} if data_dir else {}))
    prepared = builder.is_prepared()
  except tfds.core.DatasetNotFoundError:
    raise UsageError(
      f"tfds:{name}: TFDS knows no such data set and none is prepared in"
      f" {data_dir or '~/tensorflow_datasets'}"
    ) from None
  except Exception as e:
    raise UsageError(f"tfds:{name}: {str(e).splitlines()[0]}") from e
  finally:
    logging.set_verbosity(verbosity)
  if not prepared:
    raise UsageError(
      f"tfds:{name} is not prepared in {builder.data_dir}; prepare it once:"
      f" {prepare}"
    )
  try:
    builder.as_data_source(split=next(iter(builder.info.splits)))
  except NotImplementedError:
    raise UsageError(
      f"tfds:{name} is prepared as {builder.info.file_format.value}, which"
      f" needs TensorFlow to read; prepare it again: {prepare} --overwrite"
    ) from None
  return builder


def _undecoded(builder: Any, split: str, image_key: str) -> Any:
  """A split's records with the image as the bytes of its file."""
  import tensorflow_datasets as tfds

  return builder.as_data_source(
    split=split, decoders={image_key: tfds.decode.SkipDecoding()}
  )


def _only_key(name: str, features: Any, kind: type, usual: str) -> str:
  """The key of the one feature of a kind, or the usual one of several."""
  keys = [k for k, feature in features.items() if isinstance(feature, kind)]
  if usual in keys:
    return usual
  if len(keys) != 1:
    raise UsageError(
      f"tfds:{name}: {len(keys)} features of type {kind.__name__} among"
      f" {', '.join(features)}; one is needed"
    )
  return keys[0]


# --- synthetic ---------------------------------------------------------------


def _open_synthetic(name: str, image_size: int) -> Examples:
  path, _, query = name.partition("?")
  kind, _, task = path.partition("/")
  if kind != "tissue":
    raise UsageError(f"synthetic:{name}: the one there is synthetic:tissue")
  options = {"size": image_size}
  for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if key not in ("patients", "tiles_per_patient", "size", "seed"):
      raise UsageError(
        f"synthetic:{name}: no option {key!r}; there are patients,"
        " tiles_per_patient, size and seed"
      )
    if not value.isdecimal():
      raise UsageError(f"synthetic:{name}: {key} is {value!r}, not a number")
    options[key] = int(value)
  return tissue.open_tissue(**({"task": task} if task else {}), **options)
