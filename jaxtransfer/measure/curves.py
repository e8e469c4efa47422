"""ROC and precision-recall curves on one grid, with bands from resamples.

Curves of different resamples have their corners in different places. Each is
read at the same x, so that they can be averaged over classes and their
percentiles taken ("vertical averaging").

Source: Fawcett 2006, "An introduction to ROC analysis", Pattern Recognition
  Letters 27:861-874, section 7; a curve of its own agrees with scikit-learn's
  `roc_curve` and `precision_recall_curve`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from jaxtransfer.measure import bootstrap

POINTS = 101
# A band takes a pass over the rows for every class and every resample.
_MOST_BANDED = 100


class Band(NamedTuple):
  """A curve and how far it might lie elsewhere with other patients.

  Attributes:
    x: (P,) float64, an even grid from 0 to 1.
    y: (P,) float64; NaN all over where the curve is undefined.
    low: (P,) float64, the 2.5th percentile of the resamples at each x; None
      without resamples.
    high: (P,) float64, the 97.5th percentile; None likewise.
  """

  x: np.ndarray
  y: np.ndarray
  low: np.ndarray | None
  high: np.ndarray | None


def roc(
  positive: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
  points: int = POINTS,
) -> Band:
  """Returns the share of positives found against that of false alarms.

  Between its corners, one for each distinct score, it is linear; where it
  climbs upright its upper end counts.

  Args:
    positive: (N,) bool.
    scores: (N,) float, higher is likelier positive; infinite is allowed.
    weights: (R, N), how often a row counts in each of R resamples, or None.
    points: of the grid, 2 or more.

  Returns:
    The true positive rate on a grid of false positive rates; undefined without
    a positive or without a negative.

  Raises:
    ValueError: shapes that do not fit, NaN scores, negative weights, a grid
      of one point.
  """
  table, weights = _checked(positive, scores, weights, points)
  return _band(_mean_curves(table, weights, points)[0], weights)


def precision_recall(
  positive: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
  points: int = POINTS,
) -> Band:
  """Returns the share of positives among those called so, against recall.

  A step: the precision of the highest threshold that reaches the recall, not
  interpolated, as average precision sums it. At recall zero, where nothing is
  called positive, stands the precision of the first step.

  Args:
    positive: (N,) bool.
    scores: (N,) float, higher is likelier positive; infinite is allowed.
    weights: (R, N), how often a row counts in each of R resamples, or None.
    points: of the grid, 2 or more.

  Returns:
    The precision on a grid of recalls; undefined without a positive.

  Raises:
    ValueError: as `roc`.
  """
  table, weights = _checked(positive, scores, weights, points)
  return _band(_mean_curves(table, weights, points)[1], weights)


def curves(
  targets: npt.ArrayLike,
  logits: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
  *,
  multilabel: bool = False,
  points: int = POINTS,
) -> dict[str, dict[str, list[float | None] | None]]:
  """Returns both curves of a network as results.json holds them.

  Two classes: those of class 1. More classes, or several labels: the mean over
  the classes of each one's curve against the rest, at each x. A class that is
  absent in a resample is left out of that resample's mean.

  Args:
    targets: (N, C) float, 1 where a row is of the class, 0 where not, NaN
      where that is not known.
    logits: (N, C) float. Exclusive classes are ranked by their softmax, for
      only probabilities compare between rows; labels by the logits themselves.
    weights: (R, N), how often a row counts in each of R resamples, or None.
      More than a hundred classes have no band.
    multilabel: whether the columns are labels that do not exclude each other.
    points: of the grid, 2 or more.

  Returns:
    "roc" and "precision_recall", each x, y, low and high in lists, None for
    what is undefined.

  Raises:
    ValueError: as `roc`.
  """
  targets = np.asarray(targets, np.float64)
  scores = np.asarray(logits, np.float64)
  if targets.ndim != 2 or targets.shape != scores.shape or not targets.size:
    raise ValueError(
      "targets and logits must be (N, C), N > 0, C > 0, got shapes"
      f" {targets.shape} and {scores.shape}"
    )
  if not multilabel:
    scores = special.softmax(scores, axis=1)
    if targets.shape[1] == 2:
      targets, scores = targets[:, 1:], scores[:, 1:]
  if targets.shape[1] > _MOST_BANDED:
    weights = None
  table, weights = _checked(targets, scores, weights, points)
  bands = (
    _band(values, weights) for values in _mean_curves(table, weights, points)
  )
  return {
    name: {key: _plain(values) for key, values in band._asdict().items()}
    for name, band in zip(("roc", "precision_recall"), bands, strict=True)
  }


def _plain(values: np.ndarray | None) -> list[float | None] | None:
  if values is None:
    return None
  return [float(v) if np.isfinite(v) else None for v in values]


class _Table(NamedTuple):
  """Targets, NaN where unknown, and scores, (N, C) both."""

  targets: np.ndarray
  scores: np.ndarray


def _checked(
  targets: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None,
  points: int,
) -> tuple[_Table, np.ndarray | None]:
  """Returns what was given as (N, C) tables, and the weights as an array."""
  targets = np.asarray(targets, np.float64)
  scores = np.asarray(scores)
  if not np.issubdtype(scores.dtype, np.floating):
    scores = scores.astype(np.float64)
  if targets.shape != scores.shape or not targets.size:
    raise ValueError(
      f"{targets.shape} targets for {scores.shape} scores; there must be as"
      " many, and one at least"
    )
  rows = len(targets)
  targets, scores = targets.reshape(rows, -1), scores.reshape(rows, -1)
  if not np.isin(targets[~np.isnan(targets)], (0, 1)).all():
    raise ValueError("targets must be 0, 1 or NaN")
  if np.isnan(scores).any():
    row = int(np.argwhere(np.isnan(scores))[0, 0])
    raise ValueError(f"the scores of row {row} hold NaN")
  if points < 2:
    raise ValueError(f"a grid needs 2 points or more, got {points}")
  if weights is None:
    return _Table(targets, scores), None
  weights = np.asarray(weights)
  if weights.ndim != 2 or weights.shape[1] != rows or not len(weights):
    raise ValueError(
      f"weights must be (R, {rows}), R > 0, got shape {weights.shape}"
    )
  if weights.dtype.kind not in "bu" and not (weights >= 0).all():
    raise ValueError("weights must not be negative or NaN")
  return _Table(targets, scores), weights


def _mean_curves(
  table: _Table, weights: np.ndarray | None, points: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both kinds of curves, averaged over the classes.

  Returns:
    Two (1 + R, P) arrays, ROC and precision-recall; the first row is that of
    the data, the others are those of the resamples.
  """
  # A division, not a step added up: k/100 is then the same number as any
  # fraction of rows that equals it, and a corner on the grid is met exactly.
  x = np.arange(points) / (points - 1)
  resamples = 0 if weights is None else len(weights)
  totals = np.zeros((2, 1 + resamples, points))
  counts = np.zeros((2, 1 + resamples, 1))
  kinds: tuple[Callable[..., np.ndarray | None], ...] = (_roc, _precision)
  for targets, scores in zip(table.targets.T, table.scores.T, strict=True):
    for r, (hits, alarms) in enumerate(_counted(targets, scores, weights)):
      for k, curve in enumerate(kinds):
        values = curve(x, hits, alarms)
        if values is not None:
          totals[k, r] += values
          counts[k, r] += 1
  means = np.divide(
    totals, counts, out=np.full_like(totals, np.nan), where=counts > 0
  )
  return means[0], means[1]


def _counted(
  targets: np.ndarray, scores: np.ndarray, weights: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the weight called positive at each threshold, highest first.

  One resample at a time: never more than one is held as float64.

  Yields:
    Of the data and then of each resample, (T + 1,) weights of true and of
    false positives; the first threshold lies above all scores.
  """
  known = np.flatnonzero(~np.isnan(targets))
  order = known[np.argsort(-scores[known], kind="stable")]
  ranked = scores[order]
  # Rows of equal score cross the threshold together.
  ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
  ends = ends[: len(ranked)]
  positive = targets[order]

  def counts(row: np.ndarray) -> np.ndarray:
    return np.append(0, np.cumsum(row, dtype=np.float64)[ends])

  yield counts(positive), counts(1 - positive)
  for row in () if weights is None else weights:
    row = row[order]
    yield counts(row * positive), counts(row * (1 - positive))


def _roc(
  x: np.ndarray, hits: np.ndarray, alarms: np.ndarray
) -> np.ndarray | None:
  if not (hits[-1] and alarms[-1]):
    return None
  return np.interp(x, alarms / alarms[-1], hits / hits[-1])


def _precision(
  x: np.ndarray, hits: np.ndarray, alarms: np.ndarray
) -> np.ndarray | None:
  if not hits[-1]:
    return None
  # At zero, the first step that finds anything.
  reached = np.maximum(x, np.nextafter(0, 1))
  at = np.searchsorted(hits / hits[-1], reached)
  return hits[at] / (hits[at] + alarms[at])


def _band(values: np.ndarray, weights: np.ndarray | None) -> Band:
  x = np.arange(values.shape[1]) / (values.shape[1] - 1)
  if weights is None:
    return Band(x, values[0], None, None)
  return Band(x, values[0], *bootstrap.interval(values[1:].T))
