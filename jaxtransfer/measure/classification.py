"""Classification metrics of labels and scores, for many resamples at once.

Metrics of scores have one signature, `metric(labels, scores, weights=None)`.
Without weights it is a number. With weights (B, N), how often each row occurs
in each of B resamples, it is B numbers, equal to what the metric gives on the
rows physically repeated, but sorted once instead of B times.
"""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy import special

# Bytes of the float64 tables that one block of resamples may fill.
_BLOCK_BYTES = 2**21


class AbsentClassWarning(UserWarning):
  """A class could not enter a macro mean: it has no rows, or all of them."""


def accuracy(
  labels: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
) -> float | np.ndarray:
  """Returns the share of rows whose highest score is their label's.

  Args:
    labels: (N,) int, 0 to C - 1.
    scores: (N, C) float, higher is likelier; of equal scores the first counts.
    weights: (B, N), non-negative multiplicities of the rows, or None.

  Returns:
    A float, or (B,) float64; NaN for a resample without rows.

  Raises:
    ValueError: shapes that do not fit, labels out of range, NaN scores,
      negative weights.
  """
  labels, scores, weights_NB, single = _checked(labels, scores, weights)
  hit = scores.argmax(1) == labels
  values = np.empty(weights_NB.shape[1])
  for block, table in _blocks(weights_NB):
    values[block] = _ratio(table[hit].sum(0), table.sum(0))
  return float(values[0]) if single else values


def balanced_accuracy(
  labels: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
) -> float | np.ndarray:
  """Returns the mean over the classes of the share of their rows found.

  A class without rows in a resample is left out of that resample's mean.

  Args:
    labels: (N,) int, 0 to C - 1.
    scores: (N, C) float, higher is likelier; of equal scores the first counts.
    weights: (B, N), non-negative multiplicities of the rows, or None.

  Returns:
    A float, or (B,) float64; NaN for a resample without rows.

  Raises:
    ValueError: as `accuracy`.
  """
  labels, scores, weights_NB, single = _checked(labels, scores, weights)
  _warn_of_absent(labels, scores.shape[1], "balanced accuracy", 3)
  order = np.argsort(labels, kind="stable")
  starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
  hit = (scores.argmax(1) == labels)[order, None]
  values = np.empty(weights_NB.shape[1])
  for block, table in _blocks(weights_NB, order):
    totals = np.add.reduceat(table, starts, axis=0)
    correct = np.add.reduceat(table * hit, starts, axis=0)
    values[block] = _mean(_ratio(correct, totals))
  return float(values[0]) if single else values


def auroc(
  labels: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
) -> float | np.ndarray:
  """Returns the area under the ROC curve, macro one-vs-rest.

  Two classes: the area of class 1 by its own score, `scores[:, 1]`, as
  scikit-learn has it; the macro mean is then of this one area. More classes:
  the unweighted mean over the classes of each one's area against the rest. A
  class that a resample lacks, or that is all of it, is left out of the mean of
  that resample. Pairs of equal scores count one half.

  Args:
    labels: (N,) int, 0 to C - 1.
    scores: (N, C) float, any scale; infinite is allowed, NaN is not.
    weights: (B, N), non-negative multiplicities of the rows, or None.

  Returns:
    A float, or (B,) float64; NaN where no class can be told from a rest.

  Raises:
    ValueError: as `accuracy`.

  Source: agrees with `sklearn.metrics.roc_auc_score`.
  """
  return _one_vs_rest(labels, scores, weights, "AUROC", _areas)


def auprc(
  labels: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
) -> float | np.ndarray:
  """Returns the average precision, macro one-vs-rest.

  The step-wise area under the precision-recall curve, not interpolated. Two
  classes: that of class 1 by `scores[:, 1]`. More: the unweighted mean over
  the classes; one without rows in a resample is left out of its mean.

  Args:
    labels: (N,) int, 0 to C - 1.
    scores: (N, C) float, any scale; infinite is allowed, NaN is not.
    weights: (B, N), non-negative multiplicities of the rows, or None.

  Returns:
    A float, or (B,) float64; NaN where no class has rows.

  Raises:
    ValueError: as `accuracy`.

  Source: agrees with `sklearn.metrics.average_precision_score`.
  """
  return _one_vs_rest(labels, scores, weights, "AUPRC", _precisions)


def cross_entropy(
  targets: npt.ArrayLike,
  logits: npt.ArrayLike,
  weights: npt.ArrayLike | None = None,
  *,
  class_weights: npt.ArrayLike,
  multilabel: bool,
) -> float | np.ndarray:
  """Returns the loss that training makes small, without label smoothing.

  Args:
    targets: (N, C) 1, 0 or NaN where unknown; of classes that exclude each
      other one is 1 in every row.
    logits: (N, C) float, finite.
    weights: (R, N), how often a row counts in each of R resamples, or None.
    class_weights: (C,). One label: of a row of that class. Several: of a
      positive against a negative.
    multilabel: whether a row may have several labels.

  Returns:
    The weighted mean over the rows, or over their known labels; (R,) of the
    resamples; NaN without any.

  Source: torch.nn.CrossEntropyLoss(weight) and
    torch.nn.BCEWithLogitsLoss(pos_weight).
  """
  # A row's loss is what float32 holds of it, as in training: of two epochs
  # that are sure of every row neither is better.
  logits, targets, class_weights = (
    np.asarray(of, np.float32) for of in (logits, targets, class_weights)
  )
  known = ~np.isnan(targets)
  targets = np.where(known, targets, 0)
  if multilabel:
    losses = -(
      class_weights * targets * special.log_expit(logits)
      + (1 - targets) * special.log_expit(-logits)
    )
    sums, counts = (known * losses).sum(1), known.sum(1)
  else:
    sums = -(class_weights * targets * special.log_softmax(logits, 1)).sum(1)
    counts = (class_weights * targets).sum(1)
  sums, counts = sums.astype(np.float64), counts.astype(np.float64)
  if weights is None:
    return float(_ratio(sums.sum(), counts.sum()))
  weights = np.asarray(weights)
  return _ratio(weights @ sums, weights @ counts)


def _one_vs_rest(
  labels: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None,
  name: str,
  area: Callable[..., np.ndarray],
) -> float | np.ndarray:
  """Averages `area(cumulative, ...)` over the classes of each resample."""
  labels, scores, weights_NB, single = _checked(labels, scores, weights)
  classes = scores.shape[1]
  if classes < 2:
    raise ValueError(f"{name} needs scores of two classes or more, got 1")
  _warn_of_absent(labels, classes, name, 4)
  total = np.zeros(weights_NB.shape[1])
  count = np.zeros(weights_NB.shape[1], int)
  for k in [1] if classes == 2 else np.unique(labels):
    # Class by class outside, block by block inside: one sort per class, and
    # never more than one class's order in memory.
    order = np.argsort(-scores[:, k], kind="stable")
    ranked = scores[order, k]
    last = np.append(ranked[1:] != ranked[:-1], True)
    ends = np.flatnonzero(last)
    # First row and end (exclusive) of the run of equal scores of each row.
    run = np.searchsorted(ends, np.arange(len(ranked)))
    stop = ends[run] + 1
    start = np.append(0, ends + 1)[run]
    positive = np.flatnonzero(labels[order] == k)
    for block, table in _blocks(weights_NB, order):
      values = area(
        table, positive, start[positive], stop[positive], len(ranked)
      )
      known = ~np.isnan(values)
      total[block] += np.where(known, values, 0)
      count[block] += known
  values = _ratio(total, count)
  return float(values[0]) if single else values


def _areas(
  table: np.ndarray,
  positive: np.ndarray,
  start: np.ndarray,
  stop: np.ndarray,
  rows: int,
) -> np.ndarray:
  """Returns (b,) areas under the ROC curve of one class.

  Args:
    table: (N, b) weights of the rows, highest score first.
    positive: (P,) rows of the class.
    start: (P,) first row that ties with each of them.
    stop: (P,) the row after the last that ties.
    rows: N.
  """
  own = table[positive]
  negative = table.copy()
  negative[positive] = 0
  # before[i] is the weight of the negatives among the first i rows.
  before = np.zeros((rows + 1, table.shape[1]))
  np.cumsum(negative, axis=0, out=before[1:])
  # A positive wins over every negative behind its ties, and half of its ties.
  wins = before[-1] - (before[start] + before[stop]) / 2
  return _ratio((own * wins).sum(0), own.sum(0) * before[-1])


def _precisions(
  table: np.ndarray,
  positive: np.ndarray,
  start: np.ndarray,
  stop: np.ndarray,
  rows: int,
) -> np.ndarray:
  """Returns (b,) average precisions of one class; arguments as `_areas`."""
  del start, rows
  own = table[positive]
  hits = np.cumsum(own, axis=0)
  # The positives up to the end of each one's ties, itself among them.
  hits = hits[np.searchsorted(positive, stop) - 1]
  seen = np.cumsum(table, axis=0)[stop - 1]
  return _ratio((own * _ratio(hits, seen, empty=0)).sum(0), own.sum(0))


def _checked(
  labels: npt.ArrayLike,
  scores: npt.ArrayLike,
  weights: npt.ArrayLike | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
  """Returns labels, scores, weights as (N, B), and whether B was not given."""
  labels, scores = np.asarray(labels), np.asarray(scores)
  if labels.ndim != 1 or not len(labels):
    raise ValueError(f"labels must be (N,), N > 0, got shape {labels.shape}")
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels must be integers, got {labels.dtype}")
  if scores.ndim != 2 or len(scores) != len(labels):
    raise ValueError(
      f"scores must be ({len(labels)}, C) as there are {len(labels)} labels,"
      f" got shape {scores.shape}"
    )
  if not np.issubdtype(scores.dtype, np.floating):
    scores = scores.astype(np.float64)
  if labels.min() < 0 or labels.max() >= scores.shape[1]:
    raise ValueError(
      f"labels must lie in 0 to {scores.shape[1] - 1}, got"
      f" {labels.min()} to {labels.max()}"
    )
  if np.isnan(scores).any():
    row = int(np.argwhere(np.isnan(scores))[0, 0])
    raise ValueError(f"the scores of row {row} hold NaN")
  if weights is None:
    return labels, scores, np.ones((len(labels), 1), np.uint8), True
  weights = np.asarray(weights)
  if weights.ndim != 2 or weights.shape[1] != len(labels):
    raise ValueError(
      f"weights must be (B, {len(labels)}), got shape {weights.shape}"
    )
  if weights.dtype.kind not in "buif":
    raise ValueError(f"weights must be numbers, got {weights.dtype}")
  if weights.dtype.kind in "if" and not (weights >= 0).all():
    raise ValueError("weights must not be negative or NaN")
  # Rows outermost: sorting and summing then run along contiguous resamples.
  return labels, scores, np.ascontiguousarray(weights.T), False


def _blocks(
  weights_NB: np.ndarray, order: np.ndarray | slice = slice(None)
) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields resamples, rows in `order`, in float64 tables of bounded size."""
  rows, resamples = weights_NB.shape
  step = max(1, _BLOCK_BYTES // (8 * rows))
  for start in range(0, resamples, step):
    block = slice(start, min(start + step, resamples))
    yield block, weights_NB[:, block][order].astype(np.float64)


def _ratio(
  above: np.ndarray | np.floating,
  below: np.ndarray | np.floating,
  empty: float = np.nan,
) -> np.ndarray:
  """Returns above / below, and `empty` where there is nothing below."""
  return np.divide(
    above,
    below,
    out=np.full(np.broadcast_shapes(above.shape, below.shape), empty, float),
    where=below > 0,
  )


def _mean(values: np.ndarray) -> np.ndarray:
  """Returns the mean over axis 0 without the NaN; NaN of none."""
  known = ~np.isnan(values)
  return _ratio(np.where(known, values, 0).sum(0), known.sum(0))


def _warn_of_absent(
  labels: np.ndarray, classes: int, name: str, level: int
) -> None:
  """Says which classes the macro mean of the whole data lacks.

  `level` counts the calls up to whoever asked for the metric.
  """
  present = np.unique(labels)
  if len(present) < classes:
    absent = np.setdiff1d(np.arange(classes), present)
    shown = ", ".join(map(str, absent[:5])) + ", ..." * (len(absent) > 5)
    warnings.warn(
      f"{len(absent)} of {classes} classes have no rows and are left out of"
      f" {name}: {shown}",
      AbsentClassWarning,
      stacklevel=level,
    )
