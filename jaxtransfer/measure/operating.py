"""Sensitivity and specificity at thresholds that another split chose.

A score ranks; somebody who acts on it needs a threshold, and what is found and
what is falsely called there. An image is called positive where its score is at
or above the threshold. The threshold is chosen on validation and measured on
test: chosen where it is measured, it would flatter the network.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Value = float | np.ndarray
YOUDEN = "youden"


class Rates(NamedTuple):
  """What happens at a threshold: numbers, or one for every resample.

  Attributes:
    sensitivity: the share of the positive images that is called positive; NaN
      without any.
    specificity: the share of the others that is not; NaN without any.
  """

  sensitivity: Value
  specificity: Value


class Predictive(NamedTuple):
  """What a call is worth where so many are positive.

  Attributes:
    positive: the share of what is called positive that is; NaN where nothing
      is called so.
    negative: the share of what is not called positive that is not; likewise.
  """

  positive: Value
  negative: Value


@dataclasses.dataclass(frozen=True)
class Point:
  """One threshold and what it does.

  Attributes:
    rule: how it was chosen: `YOUDEN`, or "sensitivity_0.9" and the like.
    threshold: of the scores; NaN where it could not be chosen.
    chosen_on: its rates on the split that chose it.
    values: quantity -> a number: "sensitivity", "specificity" and, where a
      prevalence is given, "ppv" and "npv".
    resampled: the same in every resample, (R,) each; empty without weights.
    images: known positive and known other images that were tested.
  """

  rule: str
  threshold: float
  chosen_on: Rates
  values: dict[str, float]
  resampled: dict[str, np.ndarray]
  images: tuple[int, int]


def youden(positive: npt.ArrayLike, scores: npt.ArrayLike) -> float:
  """Returns the threshold where sensitivity + specificity is largest.

  Of equally good ones the lowest, which finds most.

  Args:
    positive: (N,) bool.
    scores: (N,) float, higher is likelier positive; infinite is allowed.

  Returns:
    One of the scores; NaN without a positive or without another.

  Raises:
    ValueError: shapes that do not fit, or NaN scores.

  Source: Youden 1950, "Index for rating diagnostic tests", Cancer 3(1):32-35;
    agrees with scikit-learn's `roc_curve`.
  """
  thresholds, hits, alarms = _counted(positive, scores)
  if not len(thresholds) or not hits[-1] or not alarms[-1]:
    return np.nan
  # J times both counts, in whole numbers: equally good ones are equal.
  index = hits * alarms[-1] - alarms * hits[-1]
  return float(thresholds[np.flatnonzero(index == index.max())[-1]])


def reaching(
  positive: npt.ArrayLike, scores: npt.ArrayLike, sensitivity: float
) -> float:
  """Returns the highest threshold that finds a share of the positive.

  Args:
    positive: (N,) bool.
    scores: (N,) float, higher is likelier positive; infinite is allowed.
    sensitivity: the share, above 0 and up to 1.

  Returns:
    One of the scores; NaN without a positive.

  Raises:
    ValueError: as `youden`, or a share out of range.
  """
  if not 0 < sensitivity <= 1:
    raise ValueError(f"a sensitivity is above 0 and up to 1, got {sensitivity}")
  thresholds, hits, _ = _counted(positive, scores)
  if not len(thresholds) or not hits[-1]:
    return np.nan
  return float(thresholds[(hits / hits[-1] >= sensitivity).argmax()])


def rates(
  positive: npt.ArrayLike,
  scores: npt.ArrayLike,
  threshold: float,
  weights: npt.ArrayLike | None = None,
) -> Rates:
  """Returns sensitivity and specificity at a threshold.

  Args:
    positive: (N,) bool.
    scores: (N,) float; infinite is allowed.
    threshold: what is at or above it is called positive; NaN gives NaN.
    weights: (R, N), how often a row counts in each of R resamples, or None.

  Returns:
    Numbers, or (R,) float64 each.

  Raises:
    ValueError: shapes that do not fit, or NaN scores.
  """
  positive, scores = _checked(positive, scores)
  weights = None if weights is None else np.asarray(weights)
  if weights is not None and weights.shape != (len(weights), len(scores)):
    raise ValueError(
      f"weights must be (R, {len(scores)}), got shape {weights.shape}"
    )
  called = scores >= threshold
  counted = np.stack(
    [positive, positive & called, ~positive, ~positive & ~called], 1
  ).astype(np.float64)
  totals = counted.sum(0) if weights is None else (weights @ counted).T
  if np.isnan(threshold):
    totals = np.full_like(totals, np.nan)
  return Rates(_ratio(totals[1], totals[0]), _ratio(totals[3], totals[2]))


def predictive_values(of: Rates, prevalence: float) -> Predictive:
  """Returns what a call is worth where a share of all is positive.

  Args:
    of: sensitivity and specificity.
    prevalence: the share of the positive among those who are to be tested,
      which is seldom that of a data set; between 0 and 1.

  Raises:
    ValueError: a prevalence out of range.

  Source: Altman and Bland 1994, "Diagnostic tests 2: predictive values", BMJ
    309:102.
  """
  if not 0 < prevalence < 1:
    raise ValueError(f"a prevalence is between 0 and 1, got {prevalence}")
  sensitivity, specificity = map(np.asarray, of)
  hits = sensitivity * prevalence
  spared = specificity * (1 - prevalence)
  return Predictive(
    _ratio(hits, hits + (1 - specificity) * (1 - prevalence)),
    _ratio(spared, spared + (1 - sensitivity) * prevalence),
  )


def points(
  chosen_on: tuple[npt.ArrayLike, npt.ArrayLike],
  tested: tuple[npt.ArrayLike, npt.ArrayLike],
  *,
  sensitivities: Sequence[float] = (),
  prevalence: float | None = None,
  weights: npt.ArrayLike | None = None,
) -> list[Point]:
  """Chooses thresholds on one split and measures them on another.

  The thresholds stay as they are in the resamples: the intervals say how the
  rates vary with the patients tested, not with those who chose.

  Args:
    chosen_on: (M,) targets, 1, 0 or NaN where unknown, and (M,) scores, of the
      validation split.
    tested: (N,) and (N,) likewise, of the test split.
    sensitivities: to be reached on validation, a point each.
    prevalence: of the positive, for predictive values; None for none.
    weights: (R, N), how often a tested row counts in each of R resamples.

  Returns:
    The point of the largest Youden index, and one for each sensitivity.

  Raises:
    ValueError: as `rates`, `reaching` and `predictive_values`.
  """
  there, scores, _ = _known(*chosen_on)
  rules = {YOUDEN: youden(there, scores)}
  for least in sensitivities:
    rules[f"sensitivity_{least:g}"] = reaching(there, scores, least)
  return [
    at(
      rule,
      threshold,
      rates(there, scores, threshold),
      tested,
      prevalence=prevalence,
      weights=weights,
    )
    for rule, threshold in rules.items()
  ]


def at(
  rule: str,
  threshold: float,
  chosen_on: Rates,
  tested: tuple[npt.ArrayLike, npt.ArrayLike],
  *,
  prevalence: float | None = None,
  weights: npt.ArrayLike | None = None,
) -> Point:
  """Measures a threshold that was chosen elsewhere.

  Args:
    rule: how it was chosen.
    threshold: of the scores.
    chosen_on: its rates where it was chosen.
    tested: (N,) targets, 1, 0 or NaN where unknown, and (N,) scores.
    prevalence: as `points` has it.
    weights: likewise.

  Raises:
    ValueError: as `rates` and `predictive_values`.
  """
  positive, scores, known = _known(*tested)

  def quantities(of: Rates) -> dict[str, Value]:
    values = of._asdict()
    if prevalence is not None:
      worth = predictive_values(of, prevalence)
      values |= {"ppv": worth.positive, "npv": worth.negative}
    return values

  values = quantities(rates(positive, scores, threshold))
  resampled: dict[str, Value] = {}
  if weights is not None:
    counts = np.asarray(weights)[:, known]
    resampled = quantities(rates(positive, scores, threshold, counts))
  return Point(
    rule,
    threshold,
    chosen_on,
    {name: float(value) for name, value in values.items()},
    {name: np.asarray(value) for name, value in resampled.items()},
    (int(positive.sum()), int((~positive).sum())),
  )


def rule_words(rule: str) -> str:
  """Says in words how a threshold was chosen.

  Args:
    rule: as a `Point` has it.
  """
  if rule == YOUDEN:
    return "largest sensitivity + specificity on validation (Youden)"
  share = 100 * float(rule.removeprefix("sensitivity_"))
  return f"sensitivity of {share:g} % or more on validation"


def _checked(
  positive: npt.ArrayLike, scores: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  positive = np.asarray(positive, bool)
  scores = np.asarray(scores, np.float64)
  if positive.ndim != 1 or positive.shape != scores.shape:
    raise ValueError(
      f"positive and scores must be (N,) both, got shapes {positive.shape} and"
      f" {scores.shape}"
    )
  if np.isnan(scores).any():
    row = int(np.flatnonzero(np.isnan(scores))[0])
    raise ValueError(f"the score of row {row} is NaN")
  return positive, scores


def _known(
  targets: npt.ArrayLike, scores: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns positive and scores of the known rows, and which are known."""
  targets = np.asarray(targets, np.float64)
  known = ~np.isnan(targets)
  return targets[known] > 0.5, np.asarray(scores, np.float64)[known], known


def _counted(
  positive: npt.ArrayLike, scores: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the (T,) distinct scores, highest first, and what each calls.

  Returns:
    Thresholds, and the numbers of positive and of other rows at or above.
  """
  positive, scores = _checked(positive, scores)
  order = np.argsort(-scores, kind="stable")
  ranked = scores[order]
  # Rows of equal score cross the threshold together.
  ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
  ends = ends[: len(ranked)]
  hits = np.cumsum(positive[order])[ends]
  return ranked[ends], hits, ends + 1 - hits


def _ratio(above: npt.ArrayLike, below: npt.ArrayLike) -> Value:
  """Returns above / below, NaN where there is nothing below."""
  above, below = np.asarray(above), np.asarray(below)
  ratio = np.divide(
    above, below, out=np.full(above.shape, np.nan), where=below > 0
  )
  return ratio if ratio.ndim else float(ratio)
