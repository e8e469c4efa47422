"""Logits and labels to the numbers that a run reports."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from scipy import special

from jaxtransfer import errors, files
from jaxtransfer.measure import (
  calibration,
  classification,
  evaluation,
  operating,
)
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


def images(
  loss: steps.Loss, names: list[str], labels: np.ndarray, metric: str = ""
) -> int:
  """Returns how many images a metric of `measure` is of.

  Args:
    loss: whose targets the labels are rows of.
    names: of the C classes.
    labels: (N,) int32.
    metric: of all, or with ":<class>" of one, whose label may be unknown.
  """
  known = ~np.isnan(loss.targets[labels])
  name = metric.partition(":")[2]
  return int((known[:, names.index(name)] if name else known.any(1)).sum())


def plain(score: evaluation.Score) -> dict[str, Any]:
  """Returns a score over repeats as results.json holds it."""
  low, high = score.interval
  return files.finite(
    {
      "mean": score.mean,
      "sd": score.deviation,
      "low": low,
      "high": high,
      "values": [files.finite(value) for value in score.values],
    }
  )


def operate(
  config: ml_collections.ConfigDict,
  loss: steps.Loss,
  names: list[str],
  positives: Sequence[int],
  outputs: Mapping[str, tuple[np.ndarray, np.ndarray]],
  temperature: float,
  weights: np.ndarray | None = None,
) -> dict[str, list[operating.Point]]:
  """Chooses thresholds on validation and measures them on the test split.

  Args:
    config: of it `sensitivities` and `prevalence`.
    loss: what training made small.
    names: of the C classes.
    positives: the classes that thresholds are for.
    outputs: of "val" and "test", (N,) labels and (N, C) logits.
    temperature: of the probabilities that the thresholds are of.
    weights: (R, N), how often a test image counts in each of R resamples.

  Returns:
    class -> its points.
  """
  points = evaluation.operating_points(
    {split: loss.targets[labels] for split, (labels, _) in outputs.items()},
    {split: logits for split, (_, logits) in outputs.items()},
    positives,
    many=loss.many,
    temperature=temperature,
    sensitivities=config.sensitivities,
    prevalence=config.prevalence or None,
    weights=weights,
  )
  return {names[c]: of_class for c, of_class in points.items()}


def join_points(
  repeats: Sequence[Mapping[str, Sequence[operating.Point]]],
  disjoint: bool = False,
) -> list[dict[str, Any]]:
  """Returns the points of repeated trainings as results.json holds them.

  Each repeat has thresholds of its own; what they do is averaged.

  Args:
    repeats: of each, as `operate` returns it, with resamples.
    disjoint: whether each repeat tests other images, as folds do.
  """
  joined = []
  for name in repeats[0]:
    for points in zip(*(of[name] for of in repeats), strict=True):
      images = np.array([point.images for point in points])
      joined.append(
        {
          "class": name,
          "rule": points[0].rule,
          "words": operating.rule_words(points[0].rule),
          "thresholds": [files.finite(p.threshold) for p in points],
          "val": {
            key: files.finite(
              float(np.mean([getattr(p.chosen_on, key) for p in points]))
            )
            for key in operating.Rates._fields
          },
          "test": {
            key: plain(
              evaluation.score(
                [p.values[key] for p in points],
                [p.resampled[key] for p in points],
              )
            )
            for key in points[0].values
          },
          "images": (images.sum(0) if disjoint else images[0]).tolist(),
        }
      )
  return joined


def missed(
  loss: steps.Loss, names: list[str], labels: np.ndarray, logits: np.ndarray
) -> list[dict[str, Any]]:
  """Returns the classes of which hardly an image is found.

  Args:
    loss: whose targets the labels are rows of.
    names: of the C classes.
    labels: (N,) int32; of several repeats, all of them.
    logits: (N, C).

  Returns:
    Of each "class", "images", "found", and of the wrong answer that is most
    frequent, "instead" and "taken". With several labels "class" is the label,
    and "instead" whether it was called there where it is not.
  """
  if not loss.many:
    found = evaluation.hardly_found(labels, logits.argmax(1), len(names))
    return [
      {**m._asdict(), "class": names[m.label], "instead": names[m.instead]}
      for m in found
    ]
  targets = loss.targets[labels]
  several = []
  for name, truth, logit in zip(names, targets.T, logits.T, strict=True):
    known = ~np.isnan(truth)
    several += [
      {**m._asdict(), "class": name, "instead": bool(m.instead)}
      for m in evaluation.hardly_found(
        truth[known].astype(int), (logit[known] > 0).astype(int), 2
      )
    ]
  return several


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
