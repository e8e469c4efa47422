"""What a network, trained once or several times, is found to be worth.

Arrays in, numbers out: scores over repeated trainings, paired differences of
two networks, classes that a network does not find, operating points.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from jaxtransfer.measure import bootstrap, operating


class Difference(NamedTuple):
  """What one network scores above another.

  Attributes:
    value: the difference; NaN where one of them is undefined.
    low: the lower end of its paired interval; NaN where undefined.
    high: the upper end.
  """

  value: float
  low: float
  high: float

  @property
  def told_apart(self) -> bool:
    """Whether the interval leaves out zero."""
    return bool(self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True)
class Score:
  """A metric over repeated trainings, by other seeds or on other folds.

  Attributes:
    values: of each repeat.
    resampled: (R,) their mean in each resample. Repeats that test the same
      patients share the resamples, for what is drawn are the patients.
  """

  values: tuple[float, ...]
  resampled: np.ndarray

  @property
  def mean(self) -> float:
    """Over the repeats; NaN where one is undefined."""
    return float(np.mean(self.values))

  @property
  def deviation(self) -> float:
    """The standard deviation over the repeats; NaN for a single one."""
    if len(self.values) == 1:
      return np.nan
    return float(np.std(self.values, ddof=1))

  @property
  def interval(self) -> tuple[float, float]:
    """The 95 % interval of the mean; NaN where it is undefined."""
    low, high = bootstrap.interval(self.resampled)
    return float(low), float(high)

  def above(self, other: "Score") -> Difference:
    """Returns what this scores above another, paired.

    Args:
      other: of the same images, in the same resamples.
    """
    low, high = bootstrap.interval(self.resampled - other.resampled)
    return Difference(self.mean - other.mean, float(low), float(high))


def score(values: Sequence[float], resampled: Sequence[npt.ArrayLike]) -> Score:
  """Joins what a metric is in every repeat.

  Args:
    values: S numbers.
    resampled: S times (R,) numbers.
  """
  return Score(
    tuple(float(value) for value in values), np.mean(resampled, axis=0)
  )


class Missed(NamedTuple):
  """A class of which hardly an image is found.

  Attributes:
    label: the class.
    images: how many there are.
    found: how many are called so.
    instead: what most of them are called.
    taken: how many are.
  """

  label: int
  images: int
  found: int
  instead: int
  taken: int


def hardly_found(
  labels: npt.ArrayLike, predicted: npt.ArrayLike, classes: int
) -> list[Missed]:
  """Returns the classes that a network finds less than half as often as chance.

  Whoever guesses finds the C-th part of each of C classes. A network that has
  collapsed calls nearly all images one class; its AUROC may be high still, for
  it only ranks.

  Args:
    labels: (N,) int, the true classes.
    predicted: (N,) int, what the images are called.
    classes: C.

  Returns:
    One of each, the least found first; classes without images are left out.
  """
  labels, predicted = np.asarray(labels), np.asarray(predicted)
  missed = []
  for label in np.unique(labels).tolist():
    called = np.bincount(predicted[labels == label], minlength=classes)
    found, images = int(called[label]), int(called.sum())
    if found < images / (2 * classes):
      called[label] = 0
      instead = int(called.argmax())
      missed.append(Missed(label, images, found, instead, int(called[instead])))
  return sorted(missed, key=lambda m: m.found / m.images)


def chance(targets: npt.ArrayLike, *, many: bool) -> float:
  """Returns the balanced accuracy of whoever guesses.

  Args:
    targets: (N, C) 1, 0 or NaN where unknown.
    many: whether the columns are labels that do not exclude each other.
  """
  there = np.nansum(targets, axis=0) > 0
  return 0.5 if many else 1 / max(int(there.sum()), 1)


def probabilities(
  logits: npt.ArrayLike, *, many: bool, temperature: float = 1.0
) -> np.ndarray:
  """Returns (N, C) float64 probabilities.

  Args:
    logits: (N, C).
    many: whether the columns are labels that do not exclude each other.
    temperature: what the logits are divided by.
  """
  logits = np.asarray(logits, np.float64) / temperature
  return special.expit(logits) if many else special.softmax(logits, axis=1)


def operating_points(
  targets: Mapping[str, np.ndarray],
  logits: Mapping[str, np.ndarray],
  classes: Sequence[int],
  *,
  many: bool,
  temperature: float,
  sensitivities: Sequence[float],
  prevalence: float | None,
  weights: np.ndarray | None,
) -> dict[int, list[operating.Point]]:
  """Returns what a network does at thresholds chosen on validation.

  Args:
    targets: of "val" and "test", (N, C) 1, 0 or NaN where unknown.
    logits: likewise, (N, C).
    classes: each of them against all others; with several labels, against its
      absence.
    many: whether there may be several labels.
    temperature: of the probabilities that the thresholds are of.
    sensitivities: as `operating.points` takes them.
    prevalence: likewise.
    weights: (R, N) of the test split.

  Returns:
    class -> its points.
  """
  scores = {
    split: probabilities(of_split, many=many, temperature=temperature)
    for split, of_split in logits.items()
  }
  return {
    c: operating.points(
      (targets["val"][:, c], scores["val"][:, c]),
      (targets["test"][:, c], scores["test"][:, c]),
      sensitivities=sensitivities,
      prevalence=prevalence,
      weights=weights,
    )
    for c in classes
  }
