"""What a network, trained once or several times, is worth.

Logits and targets in, numbers out: every metric with its interval, scores over
repeated trainings, paired differences of two networks, classes that a network
does not find, confusions, operating points, calibration and curves.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from jaxtransfer.measure import (
  bootstrap,
  calibration,
  curves,
  metrics,
  operating,
  scoring,
)
from jaxtransfer.measure.scoring import Outputs

# A larger table of confusions is no longer one that somebody reads.
_MOST_CONFUSED = 50


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
    tuple(float(value) for value in values),
    np.mean(np.asarray(resampled), axis=0),
  )


class Missed(NamedTuple):
  """A class of which hardly an image is found.

  Attributes:
    label: the class.
    images: how many there are.
    found: how many are called so.
    instead: what most of them are called; with several labels, whether it is
      called there where it is not.
    taken: how many are.
    name: the class's, or the label's.
  """

  label: int
  images: int
  found: int
  instead: int | str | bool
  taken: int
  name: str = ""


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
    hits, images = int(called[label]), int(called.sum())
    if hits < images / (2 * classes):
      called[label] = 0
      instead = int(called.argmax())
      missed.append(Missed(label, images, hits, instead, int(called[instead])))
  return sorted(missed, key=lambda m: m.found / m.images)


def missed(outputs: Outputs) -> list[Missed]:
  """Returns the classes of which hardly an image is found, by name.

  Args:
    outputs: of a network, or of all repeats of one.
  """
  names, targets = outputs.classes.names, outputs.targets
  if not outputs.classes.multilabel:
    labels, called = targets.argmax(1), outputs.logits.argmax(1)
    return [
      m._replace(name=names[m.label], instead=names[int(m.instead)])
      for m in hardly_found(labels, called, len(names))
    ]
  several = []
  for name, truth, logit in zip(
    names, targets.T, outputs.logits.T, strict=True
  ):
    known = ~np.isnan(truth)
    several += [
      m._replace(name=name, instead=bool(m.instead))
      for m in hardly_found(
        truth[known].astype(int), (logit[known] > 0).astype(int), 2
      )
    ]
  return several


def chance(targets: npt.ArrayLike, *, multilabel: bool) -> float:
  """Returns the balanced accuracy of whoever guesses.

  Args:
    targets: (N, C) 1, 0 or NaN where unknown.
    multilabel: whether the columns are labels that do not exclude each other.
  """
  there = np.nansum(np.asarray(targets), axis=0) > 0
  return 0.5 if multilabel else 1 / max(int(there.sum()), 1)


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """For what thresholds are chosen.

  Attributes:
    positives: the classes, each of them against all others; with several
      labels, against its absence.
    sensitivities: to be reached on validation, a point each.
    prevalence: of the positive, for predictive values; None for none.
  """

  positives: Sequence[int] = ()
  sensitivities: Sequence[float] = ()
  prevalence: float | None = None


@dataclasses.dataclass(frozen=True)
class Operating:
  """What a network does at thresholds that were chosen by one rule.

  Each repeat has a threshold of its own; what they do is averaged.

  Attributes:
    name: of the positive class.
    rule: as `operating.Point` has it.
    thresholds: of each repeat.
    val: sensitivity and specificity where they were chosen.
    test: quantity -> its score.
    images: how many are positive and how many are not, in one repeat or, of
      folds, in all.
  """

  name: str
  rule: str
  thresholds: tuple[float, ...]
  val: dict[str, float]
  test: dict[str, Score]
  images: tuple[int, int]


def operate(
  val: Outputs, test: Outputs, thresholds: Thresholds, temperature: float
) -> dict[str, list[operating.Point]]:
  """Chooses thresholds on validation and measures them on the test split.

  Args:
    val: of the network.
    test: likewise, with resamples.
    thresholds: for what.
    temperature: of the probabilities that the thresholds are of.

  Returns:
    class -> its points.
  """
  scores = {
    split: scoring.probabilities(
      outputs.logits,
      multilabel=outputs.classes.multilabel,
      temperature=temperature,
    )
    for split, outputs in (("val", val), ("test", test))
  }
  return {
    test.classes.names[c]: operating.points(
      (val.targets[:, c], scores["val"][:, c]),
      (test.targets[:, c], scores["test"][:, c]),
      sensitivities=thresholds.sensitivities,
      prevalence=thresholds.prevalence,
      weights=test.resamples,
    )
    for c in thresholds.positives
  }


def join_points(
  repeats: Sequence[Mapping[str, Sequence[operating.Point]]],
  tests: int,
) -> list[Operating]:
  """Joins the points of repeated trainings.

  Args:
    repeats: of each, as `operate` returns it.
    tests: how often each image is tested: by all repeats, or, of folds, once.
  """
  joined = []
  for name in repeats[0]:
    for points in zip(*(of[name] for of in repeats), strict=True):
      images = np.array([point.images for point in points])
      joined.append(
        Operating(
          name,
          points[0].rule,
          tuple(point.threshold for point in points),
          {
            key: float(np.mean([getattr(p.chosen_on, key) for p in points]))
            for key in operating.Rates._fields
          },
          {
            key: score(
              [point.values[key] for point in points],
              [point.resampled[key] for point in points],
            )
            for key in points[0].values
          },
          tuple((images.sum(0) // tests).tolist()),
        )
      )
  return joined


class Reliability(NamedTuple):
  """What a reliability diagram shows, (bins,) each.

  Attributes:
    confidence: the mean in the bin; NaN where it is empty.
    accuracy: likewise.
    count: of decisions.
  """

  confidence: np.ndarray
  accuracy: np.ndarray
  count: np.ndarray


class Value(NamedTuple):
  """One metric of one split.

  Attributes:
    split: "val" or "test".
    metric: its name; with ":<class>" of one class, with ":calibrated" after the
      temperature.
    value: NaN where undefined.
    interval: its ends; None on a split without resamples.
    images: how many it is of.
  """

  split: str
  metric: str
  value: float
  interval: tuple[float, float] | None
  images: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What one network is worth, its temperature fitted on validation.

  Attributes:
    temperature: it.
    values: every metric of both splits.
    confusion: (C, C) test images by true and predicted class; None of several
      labels and of more classes than anybody reads.
    missed: the classes that it hardly finds on the test split.
    chance: the balanced accuracy of guessing there.
    points: at thresholds.
    reliability: "before" and "after" the temperature, on the test split.
    curves: as `curves.curves` returns them.
  """

  temperature: float
  values: list[Value]
  confusion: np.ndarray | None
  missed: list[Missed]
  chance: float
  points: list[Operating]
  reliability: dict[str, Reliability]
  curves: dict[str, dict[str, list[float | None] | None]]


def evaluate(val: Outputs, test: Outputs, thresholds: Thresholds) -> Evaluation:
  """Measures one trained network in all ways.

  Args:
    val: of validation, by which temperature and thresholds are chosen.
    test: of the test split, with resamples.
    thresholds: for what.
  """
  temperature = calibration.fit_temperature(*val.decisions())
  points = join_points([operate(val, test, thresholds, temperature)], 1)
  return _evaluation({"val": val, "test": test}, temperature, points)


class Chosen(NamedTuple):
  """A threshold that a finished run chose.

  Attributes:
    name: of the class that is positive.
    rule: as `operating.Point` has it.
    threshold: of the calibrated probability.
    rates: where it was chosen.
  """

  name: str
  rule: str
  threshold: float
  rates: operating.Rates


def validate(
  test: Outputs,
  temperature: float,
  chosen: Sequence[Chosen],
  prevalence: float | None = None,
) -> Evaluation:
  """Measures a finished network on other data: nothing is chosen any more.

  Args:
    test: what it says there, with resamples.
    temperature: that its run fitted.
    chosen: the thresholds of its run.
    prevalence: of the positive, for predictive values; None for none.
  """
  scores = scoring.probabilities(
    test.logits, multilabel=test.classes.multilabel, temperature=temperature
  )
  names = list(test.classes.names)
  points = []
  for of in chosen:
    c = names.index(of.name)
    point = operating.at(
      of.rule,
      of.threshold,
      of.rates,
      (test.targets[:, c], scores[:, c]),
      prevalence=prevalence,
      weights=test.resamples,
    )
    points += join_points([{of.name: [point]}], 1)
  return _evaluation({"test": test}, temperature, points)


def _evaluation(
  splits: Mapping[str, Outputs], temperature: float, points: list[Operating]
) -> Evaluation:
  """Measures what is left once temperature and thresholds are known."""
  test = splits["test"]
  multilabel = test.classes.multilabel
  confusion = None
  if not multilabel and len(test.classes.names) <= _MOST_CONFUSED:
    confusion = np.zeros((len(test.classes.names),) * 2, int)
    called = test.logits.argmax(1)
    np.add.at(confusion, (test.targets.argmax(1), called), 1)
  labels, logits = test.decisions()
  both = {"before": logits, "after": logits / temperature}
  return Evaluation(
    temperature=temperature,
    values=[
      value
      for divisor in (None, temperature)
      for split, outputs in splits.items()
      for value in _values(split, outputs, divisor)
    ],
    confusion=confusion,
    missed=missed(test),
    chance=chance(test.targets, multilabel=multilabel),
    points=points,
    reliability={
      name: Reliability(
        *calibration.reliability(labels, special.softmax(of, axis=1))
      )
      for name, of in both.items()
    },
    curves=curves.curves(
      test.targets, test.logits, test.resamples, multilabel=multilabel
    ),
  )


def _values(
  split: str, outputs: Outputs, temperature: float | None
) -> list[Value]:
  """Returns the metrics of a split, or those that a temperature changes."""
  suffix = ""
  if temperature is not None:
    suffix = ":calibrated"
    logits = outputs.logits / temperature
    outputs = dataclasses.replace(outputs, logits=logits)
  resampled = {}
  if outputs.resamples is not None:
    resampled = scoring.measure(outputs, resampled=True).flat()

  def ends(name: str) -> tuple[float, float] | None:
    if name not in resampled:
      return None
    low, high = bootstrap.interval(resampled[name])
    return float(low), float(high)

  return [
    Value(
      split,
      name + suffix,
      float(value),
      ends(name),
      outputs.images(name),
    )
    for name, value in scoring.measure(outputs).flat().items()
    if temperature is None
    or metrics.METRICS[name.partition(":")[0]].of != metrics.SCORES
  ]


class Images(NamedTuple):
  """How many images a score is of.

  Attributes:
    distinct: different ones over all repeats.
    of_repeats: of each repeat.
  """

  distinct: int
  of_repeats: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Tested:
  """What all repeats of a network are worth on a split.

  Attributes:
    scores: metric of scores -> over the repeats.
    points: at thresholds; none without thresholds.
    missed: the classes that are hardly found, of all repeats together.
    chance: the balanced accuracy of guessing.
    images: how many they are of.
  """

  scores: dict[str, Score]
  points: list[Operating]
  missed: list[Missed]
  chance: float
  images: Images


def over_repeats(
  repeats: Sequence[Outputs],
  val: Sequence[Outputs] = (),
  thresholds: Thresholds | None = None,
  *,
  tests: int,
) -> Tested:
  """Measures a network that was trained once or several times.

  Networks that are measured on the same rows are drawn in the same resamples,
  each fold in its own, so that their scores can be compared in pairs.

  Args:
    repeats: of each the split that is measured, with resamples.
    val: of each its validation, by which thresholds are chosen.
    thresholds: for what; None for no points.
    tests: how often each image is tested: by all repeats, or, of folds, once.
  """
  once = [scoring.measure(of).values for of in repeats]
  resampled = [scoring.measure(of, resampled=True).values for of in repeats]
  points = []
  if thresholds is not None:
    points = [
      operate(
        chosen_on,
        outputs,
        thresholds,
        calibration.fit_temperature(*chosen_on.decisions()),
      )
      for chosen_on, outputs in zip(val, repeats, strict=True)
    ]
  every = scoring.join(repeats)
  _, first = np.unique(every.rows, return_index=True)
  distinct = every.select(np.isin(np.arange(len(every.rows)), first))
  return Tested(
    scores={
      name: score(
        [float(of[name]) for of in once], [of[name] for of in resampled]
      )
      for name in metrics.OF_SCORES
    },
    points=join_points(points, tests) if points else [],
    missed=missed(every),
    chance=chance(every.targets, multilabel=every.classes.multilabel),
    images=Images(distinct.images(), [of.images() for of in repeats]),
  )


def read_by_all(
  rows: Sequence[tuple[int, np.ndarray]],
) -> dict[int, np.ndarray]:
  """Returns repeat -> the rows that each of its networks read.

  What is compared is compared on the same images, even where one of them could
  be read at one time and not at another.

  Args:
    rows: the number of a repeat and (N,) rows that a network of it read.
  """
  common: dict[int, np.ndarray] = {}
  for repeat, of_network in rows:
    before = common.get(repeat, of_network)
    common[repeat] = np.intersect1d(of_network, before)
  return common
