"""Files of pooled features, of many taps and networks from one pass.

The images are decoded once, and `inference.run` gives all taps of every network
in one forward pass. What is computed is kept in parts, each written whole,
under a digest of everything that determines it: a run that stops goes on after
its last part, and a run that has all parts reads no image.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import h5py
import jax
import numpy as np

from jaxtransfer import inference, parallel, progress
from jaxtransfer.data import hdf5, pipeline, sources
from jaxtransfer.networks import tensors
from jaxtransfer.networks.network import Network

# Rows of a file: a stop loses less than this, and a file stays small.
PART_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Images:
  """Which images, and how they come to a network.

  Attributes:
    examples: the source.
    rows: (N,) int64 rows of the source, in the order the features will have.
    image_size: side of the square the images are fitted to, pixels.
    mean: of each channel, on the scale 0 to 1.
    std: of each channel.
    batch_size: images in a step over all devices.
    workers: decoding processes; 0 for threads.
    max_failures: share of unreadable images that stops the pass.
  """

  examples: sources.Examples
  rows: np.ndarray
  image_size: int
  mean: Sequence[float]
  std: Sequence[float]
  batch_size: int
  workers: int
  max_failures: float

  def digest(self) -> str:
    """Returns a hash of what determines the numbers a network sees."""
    digest = hashlib.sha256(self.examples.fingerprint().encode())
    digest.update(np.ascontiguousarray(self.rows, dtype="<i8").tobytes())
    settings = [self.image_size, list(self.mean), list(self.std)]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()


class Features:
  """The features of one network: directories of parts, read by tap.

  Args:
    directory: where the parts are.
    parts: how many there are when all are written.
  """

  def __init__(self, directory: pathlib.Path, parts: int):
    self.directory = directory
    self._parts = parts

  def part(self, index: int) -> pathlib.Path:
    """Returns the name of a part's file."""
    return self.directory / f"part-{index:05d}-of-{self._parts:05d}.h5"

  def missing(self) -> set[int]:
    """Returns the parts not yet written; a damaged one is not written."""
    return {i for i in range(self._parts) if not self._intact(self.part(i))}

  def rows(self) -> np.ndarray:
    """Returns (N,) int64: the source's rows that could be read, in order."""
    return self._read("row")

  def tap(self, name: str) -> np.ndarray:
    """Returns (N, C) float32 for a tap, in the order of `rows`."""
    return self._read(f"taps/{name}")

  def failures(self, parts: Iterable[int] | None = None) -> pipeline.Failures:
    """Returns (name, reason) of every image that could not be read.

    Args:
      parts: which, all by default.
    """
    pairs = []
    for index in range(self._parts) if parts is None else parts:
      with h5py.File(self.part(index)) as f:
        stored = json.loads(f["failures"].asstr()[()])
        pairs += [tuple(pair) for pair in stored]
    return pairs

  def _read(self, dataset: str) -> np.ndarray:
    arrays = []
    for index in range(self._parts):
      with h5py.File(self.part(index)) as f:
        arrays.append(f[dataset][()])
    return np.concatenate(arrays)

  @staticmethod
  def _intact(path: pathlib.Path) -> bool:
    try:
      with h5py.File(path) as f:
        return "failures" in f
    except OSError:
      return False


def extract(
  images: Images,
  networks: Mapping[str, Network],
  taps: Sequence[str],
  devices: parallel.Devices,
  directory: pathlib.Path,
  log: Callable[..., None],
) -> dict[str, Features]:
  """Computes what is not on disk yet and returns it all.

  Args:
    images: which images.
    networks: label -> network; one pass serves them all.
    taps: layer names, the same for every network.
    devices: where the networks run.
    directory: the cache, `features/` of a workdir.
    log: takes the pass's progress as keywords, once for each part.

  Returns:
    {label: features}.

  Raises:
    RunError: more images are unreadable than `images.max_failures` allows.
  """
  count = len(images.rows)
  parts = -(-count // PART_ROWS)
  extracted = {
    label: Features(
      directory / f"{label}-{_digest(images, network, taps)[:12]}", parts
    )
    for label, network in networks.items()
  }
  missing = {label: features.missing() for label, features in extracted.items()}
  numbers = sorted(set().union(*missing.values()))
  # What earlier starts of the run could not read counts too.
  earlier = next(iter(extracted.values())).failures(
    sorted({*range(parts)} - {*numbers})
  )
  pipeline.too_many(earlier, count, images.max_failures)
  if not numbers:
    return extracted
  chunks = [images.rows[p * PART_ROWS : (p + 1) * PART_ROWS] for p in numbers]
  rows = np.concatenate(chunks)
  compute = place(images, networks, taps, devices)
  done, started = 0, time.monotonic()
  with (
    pipeline.Batches(
      images.examples,
      rows,
      image_size=images.image_size,
      batch_size=devices.batch_size(images.batch_size),
      workers=images.workers,
    ) as batches,
    progress.Progress(
      f"extracting, {len(networks)} networks",
      "images",
      count,
      count - len(rows),
    ) as bar,
  ):
    outputs = _flat(inference.run(compute, batches, devices), bar)
    for part, chunk, arrays in zip(
      numbers, chunks, _regroup(outputs, chunks), strict=True
    ):
      unreadable = [*earlier, *batches.failures]
      pipeline.too_many(unreadable, count, images.max_failures)
      reasons = dict(batches.failures)
      names = [images.examples.names[row] for row in chunk]
      failures = [(n, reasons[n]) for n in names if n in reasons]
      mask = arrays.pop("mask")
      for label, features in extracted.items():
        if part in missing[label]:
          values = {tap: arrays[label, tap][mask] for tap in taps}
          _write(features.part(part), chunk[mask], values, failures)
      done += len(chunk)
      seconds = round(time.monotonic() - started, 3)
      log(event="extract", images=done, of=len(rows), seconds=seconds)
  return extracted


def place(
  images: Images,
  networks: Mapping[str, Network],
  taps: Sequence[str],
  devices: parallel.Devices,
) -> Callable[[jax.Array], dict[str, dict[str, jax.Array]]]:
  """Returns what gives the pooled taps of networks on the same images.

  Args:
    images: of it how they are normalised.
    networks: label -> network.
    taps: layer names.
    devices: where.

  Returns:
    (N, S, S, 3) uint8 on the devices -> {label: {tap: (N, C)}}.
  """

  def pooled(network: Network, x_NHWC: jax.Array) -> dict[str, jax.Array]:
    return network.taps(x_NHWC, taps)

  return inference.place(networks, pooled, devices, images.mean, images.std)


def _flat(
  outputs: Iterator[inference.Outputs], bar: progress.Progress
) -> Iterator[dict[Any, np.ndarray]]:
  """Yields {"mask": (B,), (label, tap): (B, C)} of what is not padding."""
  for row, mask, values in outputs:
    real = row >= 0
    bar.update(int(real.sum()))
    arrays = {
      (label, tap): array
      for label, of_network in values.items()
      for tap, array in of_network.items()
    }
    yield {key: a[real] for key, a in {**arrays, "mask": mask}.items()}


def _regroup(
  outputs: Iterator[dict[Any, np.ndarray]], chunks: Sequence[np.ndarray]
) -> Iterator[dict[Any, np.ndarray]]:
  """Joins the arrays of batches into those of parts, whose ends differ."""
  held: list[dict[Any, np.ndarray]] = []
  for chunk in chunks:
    while sum(len(piece["mask"]) for piece in held) < len(chunk):
      held.append(next(outputs))
    joined = {key: np.concatenate([h[key] for h in held]) for key in held[0]}
    held = [{key: array[len(chunk) :] for key, array in joined.items()}]
    yield {key: array[: len(chunk)] for key, array in joined.items()}


def _write(
  path: pathlib.Path,
  rows: np.ndarray,
  values: Mapping[str, np.ndarray],
  failures: Sequence[tuple[str, str]],
) -> None:
  with hdf5.writing(path) as f:
    f["row"] = rows.astype(np.int64)
    for tap, array in values.items():
      f[f"taps/{tap}"] = array
    f["failures"] = json.dumps(failures)


def _digest(images: Images, network: Network, taps: Sequence[str]) -> str:
  """Returns a hash of everything that determines a network's features."""
  digest = hashlib.sha256(images.digest().encode())
  settings = [
    network.name,
    list(taps),
    str(network.dtype),
    jax.default_backend(),
    jax.__version__,
  ]
  digest.update(json.dumps(settings).encode())
  for name, value in tensors.dump(network).items():
    digest.update(name.encode())
    digest.update(value.data)
  return digest.hexdigest()
