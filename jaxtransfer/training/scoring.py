"""Logits and labels to the numbers that a run reports."""

import dataclasses
import warnings

import numpy as np
from scipy import special

from jaxtransfer import errors
from jaxtransfer.measure import calibration, classification
from jaxtransfer.training import steps

# Per class they are one-vs-rest; a class's accuracy would say little.
RANKING = ("auroc", "auprc")
METRICS = ("loss", *classification.METRICS, "ece", "brier")
# Beyond it, the numbers of single classes would drown the others.
_MOST_CLASSES = 100

Value = float | np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
  """The metrics of one split.

  Attributes:
    values: metric -> a number, or one for every resample. With several labels,
      the mean over the labels.
    classes: metric -> class -> likewise, of AUROC and AUPRC; empty for more
      than a hundred classes.
  """

  values: dict[str, Value]
  classes: dict[str, dict[str, Value]]


def measure(
  loss: steps.Loss,
  names: list[str],
  labels: np.ndarray,
  logits: np.ndarray,
  weights: np.ndarray | None = None,
) -> Scores:
  """Measures logits against labels.

  Args:
    loss: what training made small.
    names: of the C classes.
    labels: (N,) int32, rows of `loss.targets`.
    logits: (N, C) float32.
    weights: (R, N), how often an image counts in each of R resamples.

  Returns:
    `METRICS`, each a number or (R,) numbers; NaN where undefined.

  Raises:
    RunError: there is no image, none with a known label, or a logit is no
      number.
  """
  if not len(labels):
    raise errors.RunError("a split has no image that could be read")
  if not np.isfinite(logits).all():
    raise errors.DivergedError(
      "the network's outputs are not finite; lower"
      " config.optimiser.learning_rate, in another workdir"
    )
  plain = dataclasses.replace(loss, smoothing=0.0)
  sums = np.asarray(plain(logits, labels), np.float64)
  counts = np.asarray(plain.weight(labels), np.float64)
  if not counts.any():
    raise errors.RunError("a split has no known label that could be read")
  values: dict[str, Value] = {
    "loss": sums.sum() / counts.sum()
    if weights is None
    else weights @ sums / (weights @ counts)
  }
  targets = loss.targets[labels]
  logits = np.asarray(logits, np.float64)
  with warnings.catch_warnings():
    # Classes that a split lacks were said when it was made.
    warnings.simplefilter("ignore", classification.AbsentClassWarning)
    if loss.many:
      of_labels = [
        _of_one_label(targets[:, c], logits[:, c], weights)
        for c in range(len(names))
      ]
      for name in METRICS[1:]:
        values[name] = _mean([found[name] for found in of_labels])
      classes = {
        name: {n: f[name] for n, f in zip(names, of_labels, strict=True)}
        for name in RANKING
      }
    else:
      probabilities = special.softmax(logits, axis=1)
      values |= _of_classes(labels, probabilities, weights)
      classes = {
        name: {
          n: classification.METRICS[name](
            (labels == c).astype(int),
            np.stack([-probabilities[:, c], probabilities[:, c]], 1),
            weights,
          )
          for c, n in enumerate(names)
          if len(names) <= _MOST_CLASSES
        }
        for name in RANKING
      }
  if len(names) > _MOST_CLASSES:
    classes = {}
  values = {k: v if np.ndim(v) else float(v) for k, v in values.items()}
  return Scores(values, classes)


def decisions(
  loss: steps.Loss, labels: np.ndarray, logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what a temperature and a reliability diagram are made from.

  Args:
    loss: whose targets the labels are rows of.
    labels: (N,) int32.
    logits: (N, C).

  Returns:
    (M,) int labels and (M, K) float64 logits: the images themselves, or, with
    several labels, every known label of every image as a decision of two.
  """
  logits = np.asarray(logits, np.float64)
  if not loss.many:
    return labels, logits
  targets = loss.targets[labels]
  known = ~np.isnan(targets)
  chosen = logits[known]
  return targets[known].astype(int), np.stack([0 * chosen, chosen], 1)


def _of_one_label(
  targets: np.ndarray, logits: np.ndarray, weights: np.ndarray | None
) -> dict[str, Value]:
  known = ~np.isnan(targets)
  kept = None if weights is None else weights[:, known]
  if not known.any():
    nothing = np.nan if weights is None else np.full(len(weights), np.nan)
    return dict.fromkeys(METRICS[1:], nothing)
  yes = special.expit(logits[known])
  return _of_classes(
    targets[known].astype(int), np.stack([1 - yes, yes], 1), kept
  )


def _of_classes(
  labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None
) -> dict[str, Value]:
  found = {
    name: metric(labels, probabilities, weights)
    for name, metric in classification.METRICS.items()
  }
  found["ece"] = calibration.expected_calibration_error(
    labels, probabilities, weights
  )
  found["brier"] = calibration.brier_score(labels, probabilities, weights)
  return found


def _mean(values: list[Value]) -> Value:
  """Returns the mean of what is known, over the first axis."""
  table = np.array(values, np.float64)
  known = ~np.isnan(table)
  with np.errstate(invalid="ignore"):
    return np.where(known, table, 0).sum(0) / known.sum(0)
