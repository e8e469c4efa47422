"""The sentence that a run ends with: what was found, in a reader's words.

It says no more than the measurements do. A comparison comes with its paired
interval, and where that holds zero, with the words that the images cannot show
a difference.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtransfer.report import tables
from jaxtransfer.report.tables import Measurements


class Value(NamedTuple):
  """A measured number and its interval; NaN for what was not measured."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return self._words(".3f")

  @property
  def signed(self) -> str:
    """With its sign, as a difference is read."""
    return self._words("+.3f")

  def _words(self, form: str) -> str:
    if math.isnan(self.value):
      return "undefined"
    text = f"{self.value:{form}}"
    if math.isnan(self.low + self.high):
      return text
    return f"{text} [{self.low:{form}}, {self.high:{form}}]"

  @property
  def undecided(self) -> bool:
    """Whether a difference may as well be none."""
    return not (self.low > 0 or self.high < 0)


def layers(summary: Mapping[str, Any], measurements: Measurements) -> str:
  """Says where to cut, against what, and what pretraining gave.

  What random weights do as well comes first; then the cut, or between which
  layers the images leave it open; then the best and the deepest layer.

  Args:
    summary: `summary` of a `layers` run, without its sentence.
    measurements: its measurements.

  Returns:
    A few short sentences.
  """
  taps, cut = summary["taps"], summary["cut"]
  name = summary["metric"]
  metric = tables.metric_name(name)

  def of(
    tap: str, kind: str = "", weights: str | None = summary["weights"]
  ) -> Value:
    series = measurements.series(
      [tap],
      f"{name}:{kind}" if kind else name,
      weights=weights,
      probe=summary["probe"],
      split="test",
    )
    return Value(*(float(part[0]) for part in series))

  def share(tap: str) -> str:
    params = measurements.cost([tap, taps[-1]], "params")
    return f"{tables.percent(*params)} of the parameters"

  said = []
  random, over = summary["random_best"], of(cut, "over_random")
  if not over.low > 0:
    if over.high < 0:
      first = "Random weights do better here"
    elif over.value <= summary["tolerance"]:
      first = "Random weights do as well here"
    else:
      first = "Pretraining is not shown to help here"
    said.append(
      f"{first}: random weights, read after {random}, score"
      f" {of(random, weights='random')} {metric}; the pretrained ones at the"
      f" cut {over.signed} more."
    )
  shallower = taps[: taps.index(cut)]
  against = {tap: of(tap, "against_cut") for tap in shallower}
  same = [tap for tap in shallower if against[tap].undecided]
  if same:
    first = same[0]
    said.append(
      f"These images leave open where to cut, between {first} and {cut}:"
      f" {first} scores {of(first).value:.3f} {metric} with {share(first)},"
      f" {cut} {of(cut)} with {share(cut)}, a difference of"
      f" {against[first].signed}. {cut} is the shallowest of which validation"
      f" rules out a loss above {summary['tolerance']:g}."
    )
  elif cut == taps[-1]:
    said.append(f"Keep all layers up to {cut}: {of(cut)} {metric}.")
  else:
    speed = measurements.cost([cut, taps[-1]], "images_per_second")
    said.append(
      f"Cut after {cut}: {of(cut)} {metric}, with {share(cut)} and"
      f" {speed[0] / speed[1]:.1f}x the speed of all layers up to {taps[-1]}."
    )
  better = [tap for tap in shallower if against[tap].low > 0]
  if better:
    tap = max(better, key=lambda t: against[t].value)
    said.append(
      f"On the test split {tap}, which is shallower, scores more:"
      f" {of(tap).value:.3f}, {against[tap].signed}."
    )
  others = {summary["best"]: "the best on validation"}
  others[taps[-1]] = "the deepest"
  said += [
    f"{tap}, {what}, scores {of(tap).value:.3f}:"
    f" {_difference(of(tap, 'against_cut'))}."
    for tap, what in others.items()
    if tap != cut
  ]
  if random != cut or over.low > 0:
    said.append(
      f"At {cut} pretrained weights give {of(cut, 'gain').signed} {metric} over"
      " random ones read at the same layer."
    )
  return " ".join(said)


def _difference(value: Value) -> str:
  """Says what a paired difference shows."""
  if value.undecided:
    return f"{value.signed}, no difference that these images can show"
  return f"{value.signed}, {'more' if value.low > 0 else 'less'} than the cut"
