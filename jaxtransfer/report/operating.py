"""Sensitivity and specificity at thresholds: their table."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer.report import tables
from jaxtransfer.report.markup import Html

# Thresholds that are told one by one.
_LISTED = 5
_QUANTITIES = {
  "sensitivity": "sensitivity",
  "specificity": "specificity",
  "ppv": "positive predictive value",
  "npv": "negative predictive value",
}


def table(
  summary: Mapping[str, Any],
  networks: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
  chosen: str = (
    "Thresholds were chosen on the validation split and kept in the resamples"
    " of the test split; what they reach there may be less."
  ),
) -> Html | None:
  """Returns what networks do at thresholds, a row for each.

  Args:
    summary: the job's summary, of it "classes", "multilabel", "prevalence",
      "interval" and "unit".
    networks: a name and the points of each; one alone needs no name.
    chosen: a sentence on where thresholds were chosen.

  Returns:
    The table, or None without a point.
  """
  networks = [(name, points) for name, points in networks if points]
  if not networks:
    return None
  every = [point for _, points in networks for point in points]
  quantities = [
    name
    for name in _QUANTITIES
    if any(name in (p.get("test") or {}) for p in every)
  ]
  lines = [
    [
      *([tables.shorten(name)] if len(networks) > 1 else []),
      tables.shorten(str(point.get("class"))),
      str(point.get("words") or tables.ABSENT),
      _thresholds([tables.finite(t) for t in point.get("thresholds") or ()]),
      *(_cell(point, name) for name in quantities),
    ]
    for name, points in networks
    for point in points
  ]
  header = [
    *(["network"] if len(networks) > 1 else []),
    "positive class",
    "threshold chosen for",
    "threshold",
    *(f"test {_QUANTITIES[name]}" for name in quantities),
  ]
  return tables.table(_words(summary, every, chosen), header, lines)


def _thresholds(values: Sequence[float]) -> str:
  """Returns the thresholds of all repeats, of many the least and the most."""
  if len(values) > _LISTED:
    return f"{tables.score(min(values))} to {tables.score(max(values))}"
  return ", ".join(map(tables.score, values)) or tables.ABSENT


def _cell(point: Mapping[str, Any], name: str) -> Html:
  score = (point.get("test") or {}).get(name) or {}
  numbers = (tables.finite(score.get(key)) for key in ("mean", "low", "high"))
  return tables.with_interval(*numbers)


def _words(
  summary: Mapping[str, Any],
  points: Sequence[Mapping[str, Any]],
  chosen: str,
) -> str:
  classes = list(dict.fromkeys(str(point.get("class")) for point in points))
  multilabel = summary.get("multilabel")
  known = [str(name) for name in summary.get("classes") or ()]
  unit = str(summary.get("unit") or "images")
  one = "An image" if unit == "images" else f"A {unit.removesuffix('s')}"
  rest = "its absence" if multilabel else "all other classes"
  if len(known) == 2 and not multilabel and len(classes) == 1:
    rest = ", ".join(tables.shorten(n) for n in known if n != classes[0])
  if len(classes) == 1:
    text = f"Positive is {tables.shorten(classes[0])}, negative {rest}."
    text += " config.positive names another class."
  else:
    text = f"Each class in turn is positive, {rest} negative."
  text += (
    f" {one} is called positive where the probability of the class, with the"
    f" temperature, is at or above the threshold. {chosen}"
  )
  if any(len(point.get("thresholds") or ()) > 1 for point in points):
    text += (
      f" Each of the {summary.get('repeats') or 'repeats'} has its own; scores"
      " are their mean."
    )
  if prevalence := summary.get("prevalence"):
    text += (
      f" Predictive values hold where {100 * prevalence:g} % are positive, as"
      " config.prevalence says."
    )
  else:
    text += (
      " What a call is worth depends on how many are positive:"
      " config.prevalence gives predictive values."
    )
  text += " Intervals in brackets."
  scores = [of for p in points for of in (p.get("test") or {}).values()]
  if any(of.get("low") == of.get("high") is not None for of in scores):
    text += (
      f" One without width is of {unit} that were all called alike, and all"
      " resamples of them too: it does not say that others would be."
    )
  return text
