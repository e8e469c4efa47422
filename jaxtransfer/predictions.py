"""What a run says of single test images: predictions.csv, and those shown."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtransfer import files
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.measure import scoring

# What stands before the name of a class, which may be any text.
_PROBABILITY = "probability:"


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What one network says of test images.

  Attributes:
    data: the images.
    rows: (N,) of the source.
    probabilities: (N, C) float64.
    tap: the layer that is read, or the last that is kept.
    seed: which repeat it is of; None where there is one.
    temperature: that the logits were divided by; None without one.
  """

  data: Dataset
  rows: np.ndarray
  probabilities: np.ndarray
  tap: str
  seed: int | None = None
  temperature: float | None = None


def of_logits(
  data: Dataset,
  rows: np.ndarray,
  logits: np.ndarray,
  temperature: float,
  tap: str,
  seed: int,
) -> Predictions:
  """Returns what a network says, its probabilities calibrated.

  Args:
    data: the images.
    rows: (N,) of the source.
    logits: (N, C) float32.
    temperature: that they are divided by.
    tap: the last layer kept.
    seed: which repeat it is of.
  """
  probabilities = scoring.probabilities(
    logits, multilabel=data.multilabel, temperature=temperature
  )
  return Predictions(data, rows, probabilities, tap, seed, temperature)


def write(
  path: str | os.PathLike[str], predictions: Sequence[Predictions]
) -> None:
  """Writes predictions.csv, atomically: a line for each image and network.

  Args:
    path: the file.
    predictions: of the same classes; folds and taps one after the other.
  """
  names = predictions[0].data.names
  header = ["name", "group", "label", "tap", "seed", "temperature"]
  header += [_PROBABILITY + name for name in names]
  files.write_csv(
    path, header, (line for of in predictions for line in _lines(of))
  )


def _lines(of: Predictions) -> Iterator[list[str | int | float | None]]:
  examples, rows = of.data.examples, of.rows.tolist()
  groups = of.data.groups_of(of.rows) or [""] * len(rows)
  for row, group, values in zip(
    rows, groups, of.probabilities.tolist(), strict=True
  ):
    label = examples.classes[examples.labels[row]]
    about = [examples.names[row], group, label]
    yield [*about, of.tap, of.seed, of.temperature, *values]
