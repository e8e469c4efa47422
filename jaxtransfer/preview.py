"""What a run would do, take and leave, told before it begins: `--dry_run`.

A job comes as far as its checks; then a few real batches are read and a few
real steps or passes are made of them, and multiplied. Nothing is written.
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from jaxtransfer import configuration, features, files, parallel, progress
from jaxtransfer.data import pipeline
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.extraction import passes
from jaxtransfer.measure import probes
from jaxtransfer.networks.network import Network
from jaxtransfer.training import bags, images

# Batches that are measured; where one takes long, fewer.
_BATCHES, _SECONDS = 5, 20.0
_PROBED = 200  # rows of each split
# A forward pass against a step of training, which has a backward one too.
_FORWARD = 1 / 3


@dataclasses.dataclass(frozen=True)
class Time:
  """Seconds: at least and at most."""

  low: float
  high: float

  def __add__(self, other: "Time") -> "Time":
    return Time(self.low + other.low, self.high + other.high)

  def __str__(self) -> str:
    low, high = map(progress.duration, (self.low, self.high))
    return f"about {low}" if low == high else f"between {low} and {high}"


@dataclasses.dataclass(frozen=True)
class Speed:
  """What was measured of some batches.

  Attributes:
    batches: how many.
    reading: seconds a batch takes to be read.
    computing: seconds of a step or pass, once compiled.
    compiling: seconds of the first one beyond that.
  """

  batches: int
  reading: float
  computing: Time
  compiling: float

  def of(self, batches: float, least: float = 1.0, most: float = 1.0) -> Time:
    """Returns the time of many batches, without compiling.

    They are read while those before are computed, which on a CPU takes from
    both.

    Args:
      batches: how many.
      least: share of the computing measured that they need at least.
      most: and at most.
    """
    low = max(self.reading, least * self.computing.low)
    high = self.reading + most * self.computing.high
    return Time(batches * low, batches * high)


class Batches(Protocol):
  """Batches that are read one after the other."""

  def __len__(self) -> int:
    """Returns how many there are."""

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns the next one."""

  def close(self) -> None:
    """Ends whatever reads."""


def measure(
  batches: Batches, compute: Callable[[dict[str, np.ndarray]], Any]
) -> Speed:
  """Measures some batches, first read alone, then computed; closes them.

  Args:
    batches: of the run.
    compute: of a batch, returns arrays on the devices.
  """
  read, moments = [], [time.monotonic()]
  try:
    while len(read) < min(_BATCHES, len(batches)):
      read.append(next(batches))
      moments.append(time.monotonic())
      if moments[-1] - moments[0] > _SECONDS:
        break
  finally:
    batches.close()

  def once(batch: dict[str, np.ndarray]) -> float:
    started = time.monotonic()
    jax.block_until_ready(compute(batch))
    return time.monotonic() - started

  seconds: list[float] = []
  compiling: dict[str, float] = {}
  for batch in read:
    if sum(seconds) > _SECONDS:
      break
    # The first of its shape compiles.
    shapes = str(jax.tree.map(np.shape, batch))
    if shapes not in compiling:
      compiling[shapes] = once(batch)
    seconds.append(once(batch))
  least = min(seconds)
  # The first waits for the readers to start.
  start = min(1, len(read) - 1)
  return Speed(
    len(read),
    (moments[-1] - moments[start]) / (len(read) - start),
    # One that something else on the machine held up does not count.
    Time(least, sorted(seconds)[-2] if seconds[2:] else max(seconds)),
    max(0.0, max(compiling.values()) - least),
  )


def of_training(
  training: images.ImageTask | bags.BagTask,
  devices: parallel.Devices,
  validation: int,
) -> tuple[Speed, Time]:
  """Measures the first steps of a training.

  Args:
    training: it is not to be used any more.
    devices: where.
    validation: examples that each epoch is judged by.

  Returns:
    The speed of a step, and the time of all epochs.
  """
  config, steps = training.config, len(training.batches)
  step = training.step(1)
  state = [devices.replicate(training.first_state())]

  def compute(batch: dict[str, np.ndarray]) -> Any:
    state[0], metrics = step(state[0], training.put(batch))
    return metrics["loss"]

  speed = measure(training.batches, compute)
  judged = config.epochs * -(-validation // config.batch_size)
  return speed, speed.of(steps) + speed.of(judged, _FORWARD)


def of_extraction(
  images: features.Images,
  networks: Mapping[str, Network],
  taps: Sequence[str],
  devices: parallel.Devices,
) -> tuple[Speed, Time]:
  """Measures some passes of the first network, which the others are like.

  Returns:
    The speed of one network, and the time of all networks and images.
  """
  first = dict(list(networks.items())[:1])
  compute = features.place(images, first, taps, devices)
  size = devices.batch_size(images.batch_size)
  speed = measure(
    pipeline.Batches(
      images.examples,
      images.rows,
      image_size=images.image_size,
      batch_size=size,
      workers=images.workers,
    ),
    lambda batch: compute(devices.put(batch["image"])),
  )
  count = len(networks)
  return speed, speed.of(-(-len(images.rows) // size), count, count)


def of_encoding(extraction: passes.Extraction) -> tuple[Speed, Time]:
  """Measures some batches of the largest slide that is left.

  Returns:
    The speed of all networks, and the time of all slides.
  """
  speed = measure(extraction.sample(), extraction.compute())
  batches = sum(extraction.batches_of(of) for of in extraction.packets)
  return speed, speed.of(batches)


def of_probing(
  rows: Mapping[str, int],
  widths: Sequence[int],
  networks: int,
  *,
  kinds: Sequence[str],
  strengths: Sequence[float],
  metric: str,
  num_classes: int,
) -> Time:
  """Fits probes on a few random features, and multiplies.

  How long a fit takes to converge the features themselves would tell.

  Args:
    rows: of each split.
    widths: of the features of each tap.
    networks: how many.
    kinds: of probe.
    strengths: as `probes.fit_probe` takes them.
    metric: likewise.
    num_classes: likewise.
  """
  rng = np.random.default_rng(0)
  width = int(np.median(widths))
  few = {split: min(count, _PROBED) for split, count in rows.items()}
  x = {
    split: rng.normal(size=(1, count, width)).astype(np.float32)
    for split, count in few.items()
  }
  labels = {split: np.arange(n) % num_classes for split, n in few.items()}

  def fit() -> float:
    started = time.monotonic()
    for kind in kinds:
      probes.fit_probe(
        kind,
        x["train"],
        labels["train"],
        x["val"],
        labels["val"],
        x["test"],
        strengths,
        metric,
        num_classes,
      )
    return time.monotonic() - started

  first, once = fit(), fit()
  share = sum(rows.values()) / sum(few.values()) * sum(widths) / width
  seconds = once * share * networks
  # Every width compiles.
  compiling = max(0.0, first - once) * len(set(widths))
  return Time(seconds / 4, 2 * seconds + compiling)


def bytes_of_training(training: images.ImageTask | bags.BagTask) -> int:
  """Returns how large the checkpoints of a training become."""
  state = training.first_state()
  numbers = (state, state.params, state.kept, state.statistics)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(numbers))
  # One more is written before the oldest is removed.
  return size * (training.config.checkpoints + 1)


def tell(
  config: ml_collections.ConfigDict,
  path: pathlib.Path,
  divisions: Sequence[Dataset],
  work: Sequence[str],
  speed: Speed | None,
  seconds: Time,
  size: float,
  notes: Sequence[str] = (),
) -> int:
  """Prints what the run would do.

  Args:
    config: the whole config.
    path: of the workdir.
    divisions: the examples, divided once or, for folds, several times.
    work: what is done with them, a line each.
    speed: what was measured of batches; None where it was of something else.
    seconds: what it comes to.
    size: bytes that it leaves on the disk.
    notes: what the user should know besides those of the images.

  Returns:
    The exit code, 0.
  """
  lines = ["", "Config:"]
  lines += [
    f"  {key}={configuration.written(value)}"
    for key, value in configuration.flat(config).items()
  ]
  for number, data in enumerate(divisions):
    lines += ["", f"Fold {number}:" if len(divisions) > 1 else "Splits:"]
    lines += _splits(data)
  remarks = [note for data in divisions for note in data.notes] + list(notes)
  lines += ["", *dict.fromkeys(remarks)] if remarks else []
  free = shutil.disk_usage(files.nearest_existing(path)).free
  measured = "A part was done and timed; this is multiplied."
  if speed is not None:
    measured = (
      f"Of {speed.batches} batches each took"
      f" {speed.reading * 1e3:,.0f} ms to be read and up to"
      f" {speed.computing.high * 1e3:,.0f} ms to be computed; this is"
      " multiplied."
    )
  lines += [
    "",
    "Work:",
    *(f"  {line}" for line in work),
    "",
    f"Time: {seconds}. {measured}",
    f"Disk: about {_bytes(size)} in {path}; {_bytes(free)} are free there.",
  ]
  if (path / "config.json").exists():
    lines.append(
      "A run has begun there: what it has done is not done again, and time and"
      " disk are those of a whole one."
    )
  if size > free:
    lines.append("That is more than there is: make room, or take another disk.")
  lines += ["", "Nothing was written: this was a dry run."]
  print("\n".join(lines), flush=True)
  return 0


def _splits(data: Dataset) -> list[str]:
  """Returns a table of how many images of each class and group there are."""
  of_classes = {
    split: np.nansum(data.targets_of(rows), axis=0)
    for split, rows in data.rows.items()
  }
  table = [("", *data.rows)]
  for c, name in enumerate(data.names):
    table.append((name, *(f"{int(of[c]):,}" for of in of_classes.values())))
  counts = (f"{len(rows):,}" for rows in data.rows.values())
  table.append((data.examples.unit, *counts))
  if data.examples.groups is not None:
    groups = (
      len(set(data.groups_of(rows) or ())) for rows in data.rows.values()
    )
    table.append(("groups", *(f"{count:,}" for count in groups)))
  width = min(40, max(len(row[0]) for row in table))
  return [
    f"  {row[0]:<{width}}" + "".join(f"{cell:>9}" for cell in row[1:])
    for row in table
  ]


def _bytes(count: float) -> str:
  for size, unit in ((1e9, "GB"), (1e6, "MB")):
    if count >= size:
      return f"{count / size:,.1f} {unit}"
  return f"{count / 1e3:,.0f} kB"
