"""What a network says of the images of a split, and every metric of it."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special

from jaxtransfer.measure import classification, metrics
from jaxtransfer.measure.metrics import METRICS

# Beyond it, the numbers of single classes would drown the others.
_MOST_CLASSES = 100
Number = float | np.ndarray


class EmptyError(ValueError):
  """There is nothing to measure on."""


class NotFiniteError(ValueError):
  """A logit is no number: the training has diverged."""


@dataclasses.dataclass(frozen=True)
class Classes:
  """What is predicted.

  Attributes:
    names: of the C classes.
    multilabel: whether an image may have several of them.
    weights: (C,), what each counts in the loss.
  """

  names: Sequence[str]
  multilabel: bool
  weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outputs:
  """What a network says of the images of a split, and what is true.

  Attributes:
    classes: what is predicted.
    rows: (N,) int, which images they are.
    targets: (N, C) 1, 0 or NaN where unknown.
    logits: (N, C) float32.
    resamples: (R, N), how often an image counts in each of R resamples; None
      where no interval is wanted.

  Raises:
    EmptyError: there is no image, or none with a known label.
    NotFiniteError: a logit is no number.
  """

  classes: Classes
  rows: np.ndarray
  targets: np.ndarray
  logits: np.ndarray
  resamples: np.ndarray | None = None

  def __post_init__(self):
    if not len(self.rows):
      raise EmptyError("a split has no image that could be read")
    if not np.isfinite(self.logits).all():
      raise NotFiniteError("the network's outputs are not finite")
    if np.isnan(self.targets).all():
      raise EmptyError("a split has no known label that could be read")

  def select(self, chosen: np.ndarray) -> "Outputs":
    """Returns those of some images, without resamples.

    Args:
      chosen: (N,) bool.
    """
    rows, targets, logits = (
      of[chosen] for of in (self.rows, self.targets, self.logits)
    )
    return Outputs(self.classes, rows, targets, logits)

  def images(self, metric: str = "") -> int:
    """Returns how many images a metric is of.

    Args:
      metric: of all, or with ":<class>" of one, whose label may be unknown.
    """
    known = ~np.isnan(self.targets)
    name = metric.partition(":")[2]
    if name:
      return int(known[:, list(self.classes.names).index(name)].sum())
    return int(known.any(1).sum())

  def decisions(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a temperature and a reliability diagram are made from.

    Returns:
      (M,) int labels and (M, K) float64 logits: the images themselves, or,
      with several labels, every known label of every image as a decision of
      two.
    """
    logits = np.asarray(self.logits, np.float64)
    if not self.classes.multilabel:
      return self.targets.argmax(1), logits
    known = ~np.isnan(self.targets)
    chosen = logits[known]
    return self.targets[known].astype(int), np.stack([0 * chosen, chosen], 1)


def join(parts: Sequence[Outputs]) -> Outputs:
  """Returns what networks of the same classes say of images, one after another.

  Args:
    parts: of each; an image of several of them stands several times.
  """
  resamples = [of.resamples for of in parts if of.resamples is not None]
  rows, targets, logits = (
    np.concatenate([getattr(of, name) for of in parts])
    for name in ("rows", "targets", "logits")
  )
  return Outputs(
    parts[0].classes,
    rows,
    targets,
    logits,
    np.concatenate(resamples, 1) if len(resamples) == len(parts) else None,
  )


def by_group(outputs: Outputs, groups: Sequence[str]) -> Outputs:
  """Returns what a network says of groups of images, such as a patient's.

  A group's probabilities are the means of its images'. One whose images have
  several labels has none of its own, and is left out.

  Args:
    outputs: of one label an image; in a resample all images of a group are
      there equally often.
    groups: N names.

  Returns:
    Of every group, in the place of its first image, with that image's row.

  Raises:
    EmptyError: no group has a label.
  """
  _, first, number = np.unique(
    np.asarray(groups), return_index=True, return_inverse=True
  )
  count = np.bincount(number)[:, None]
  shares, truths = (
    np.stack([np.bincount(number, column) for column in of.T], 1) / count
    for of in (
      probabilities(outputs.logits, multilabel=False),
      np.asarray(outputs.targets, np.float64),
    )
  )
  kept = np.flatnonzero(truths.max(1) == 1)
  kept = kept[np.argsort(first[kept])]
  first = first[kept]
  resamples = outputs.resamples
  return Outputs(
    outputs.classes,
    outputs.rows[first],
    outputs.targets[first],
    # Their softmax is the mean itself.
    np.log(np.maximum(shares[kept], np.finfo(np.float64).tiny)),
    None if resamples is None else resamples[:, first],
  )


@dataclasses.dataclass(frozen=True)
class Scores:
  """The metrics of one split.

  Attributes:
    values: metric -> a number, or one for every resample; NaN where undefined.
      With several labels, the mean over the labels.
    classes: metric -> class -> likewise, of those told by class; empty for more
      than a hundred classes.
  """

  values: dict[str, Number]
  classes: dict[str, dict[str, Number]]

  def flat(self) -> dict[str, Number]:
    """Returns all of them, those of a class as "<metric>:<class>"."""
    return self.values | {
      f"{metric}:{name}": value
      for metric, values in self.classes.items()
      for name, value in values.items()
    }


def measure(outputs: Outputs, *, resampled: bool = False) -> Scores:
  """Measures a network on a split.

  Args:
    outputs: what it says.
    resampled: whether in each of the resamples; once otherwise.

  Returns:
    All of `METRICS`.
  """
  classes, weights = outputs.classes, outputs.resamples if resampled else None
  names, targets = classes.names, outputs.targets
  logits = np.asarray(outputs.logits, np.float64)
  every = probabilities(logits, multilabel=classes.multilabel)
  by_class = {
    name: about
    for name, about in METRICS.items()
    if about.by_class and len(names) <= _MOST_CLASSES
  }
  with warnings.catch_warnings():
    # Classes that a split lacks were said when it was made.
    warnings.simplefilter("ignore", classification.AbsentClassWarning)
    if classes.multilabel:
      of_labels = [
        _of_one_label(targets[:, c], every[:, c], weights)
        for c in range(len(names))
      ]
      values = {
        name: _mean([of_label[name] for of_label in of_labels])
        for name in of_labels[0]
      }
      of_classes = {
        metric: {name: of_labels[c][metric] for c, name in enumerate(names)}
        for metric in by_class
      }
    else:
      labels = targets.argmax(1)
      values = _of_classes(labels, every, weights)
      of_classes = {
        metric: {
          name: about.function(
            (labels == c).astype(int),
            np.stack([-every[:, c], every[:, c]], 1),
            weights,
          )
          for c, name in enumerate(names)
        }
        for metric, about in by_class.items()
      }
  for name, about in METRICS.items():
    if about.of == metrics.LOGITS:
      values[name] = about.function(
        targets,
        logits,
        weights,
        class_weights=classes.weights,
        multilabel=classes.multilabel,
      )
  values = {name: values[name] for name in METRICS}
  values = {k: v if np.ndim(v) else float(v) for k, v in values.items()}
  return Scores(values, of_classes)


def probabilities(
  logits: npt.ArrayLike, *, multilabel: bool, temperature: float = 1.0
) -> np.ndarray:
  """Returns (N, C) float64 probabilities.

  Args:
    logits: (N, C).
    multilabel: whether the columns are labels that do not exclude each other.
    temperature: what the logits are divided by.
  """
  logits = np.asarray(logits, np.float64) / temperature
  return (
    special.expit(logits) if multilabel else special.softmax(logits, axis=1)
  )


def _of_one_label(
  targets: np.ndarray, probability: np.ndarray, weights: np.ndarray | None
) -> dict[str, Number]:
  known = ~np.isnan(targets)
  draws = None if weights is None else weights[:, known]
  if not known.any():
    nothing = np.nan if weights is None else np.full(len(weights), np.nan)
    return dict.fromkeys(METRICS, nothing)
  yes = probability[known]
  return _of_classes(
    targets[known].astype(int), np.stack([1 - yes, yes], 1), draws
  )


def _of_classes(
  labels: np.ndarray, every: np.ndarray, weights: np.ndarray | None
) -> dict[str, Number]:
  return {
    name: about.function(labels, every, weights)
    for name, about in METRICS.items()
    if about.of != metrics.LOGITS
  }


def _mean(values: list[Number]) -> Number:
  """Returns the mean of what is known, over the first axis."""
  table = np.array(values, np.float64)
  known = ~np.isnan(table)
  with np.errstate(invalid="ignore"):
    return np.where(known, table, 0).sum(0) / known.sum(0)
