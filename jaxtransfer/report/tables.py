"""The measured rows: looked up, put into words, and written as tables."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer import files, results
from jaxtransfer.report.markup import Html, join, tag

ABSENT = "–"
_LONGEST_NAME = 80


class Series(NamedTuple):
  """One quantity along the taps; NaN where nothing was measured.

  Attributes:
    value: (N,) float64.
    low: (N,) float64, the interval's lower end.
    high: (N,) float64, the interval's upper end.
  """

  value: np.ndarray
  low: np.ndarray
  high: np.ndarray

  @property
  def measured(self) -> bool:
    """Whether there is any value at all."""
    return bool(np.isfinite(self.value).any())


class Measurements:
  """Rows of `results.json`, found by what they say."""

  def __init__(self, rows: Iterable[Mapping[str, Any]]):
    self.rows = list(rows)
    self._found = {
      tuple(row.get(key) for key in self._KEYS): row for row in self.rows
    }

  _KEYS = ("weights", "tap", "probe", "metric", "split", "seed")

  def series(
    self,
    taps: Sequence[str],
    metric: str | None,
    *,
    weights: str | None = None,
    probe: str | None = None,
    split: str | None = None,
    seed: int | None = None,
  ) -> Series:
    """Returns the rows that say exactly this, along the taps.

    Args:
      taps: N tap names, in the order wanted.
      metric: the row's metric.
      weights: the row's weights; None means that the row says null.
      probe: the row's probe, likewise.
      split: the row's split, likewise.
      seed: the row's seed, likewise.

    Returns:
      (N,) values with intervals, NaN where there is no such row or it says
      null.
    """
    rows = [
      self._found.get((weights, tap, probe, metric, split, seed), {})
      for tap in taps
    ]
    return Series(
      *(
        np.array([finite(row.get(key)) for row in rows], np.float64)
        for key in ("value", "low", "high")
      )
    )

  def cost(self, taps: Sequence[str], metric: str) -> np.ndarray:
    """Returns a cost along the taps, whichever weights its rows name.

    Args:
      taps: N tap names.
      metric: "params", "macs", "images_per_second", ...

    Returns:
      (N,) float64, NaN where it was not measured.
    """
    values = {
      row.get("tap"): row.get("value")
      for row in self.rows
      if row.get("metric") == metric and row.get("probe") is None
    }
    return np.array([finite(values.get(tap)) for tap in taps], np.float64)

  def values_of(
    self, key: str, *, measured: bool = False, **selection: Any
  ) -> list[Any]:
    """Returns what stands under `key` in some rows, in their order.

    Args:
      key: the column.
      measured: whether rows without a value are passed over.
      **selection: columns and what they must say.
    """
    return list(
      dict.fromkeys(
        row.get(key)
        for row in self.rows
        if row.get(key) is not None
        and all(row.get(k) == v for k, v in selection.items())
        and not (measured and math.isnan(finite(row.get("value"))))
      )
    )


def finite(value: Any) -> float:
  """Returns a number as a float, and NaN for null, infinity and the rest."""
  if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
    return math.nan
  return float(value) if math.isfinite(value) else math.nan


def shorten(name: str) -> str:
  """Returns a name that fits a line: a long one without its middle."""
  if len(name) <= _LONGEST_NAME:
    return name
  half = _LONGEST_NAME // 2
  return f"{name[:half]}…{name[-half:]}"


def write_results_csv(
  path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]
) -> None:
  """Writes the measurements as tidy CSV, atomically.

  Args:
    path: where; usually `<workdir>/results.csv`.
    rows: the measurements; a key that is missing or null is an empty field, and
      so is a number that is not finite.
  """
  files.write_csv(path, results.COLUMNS, map(_fields, rows))


def _fields(row: Mapping[str, Any]) -> list[Any]:
  return [
    "" if value is None or _not_finite(value) else value
    for value in (row.get(key) for key in results.COLUMNS)
  ]


def _not_finite(value: Any) -> bool:
  return isinstance(value, (float, np.floating)) and not math.isfinite(value)


def score(value: float | None, *, signed: bool = False) -> str:
  """Returns a score with three decimals and a true minus sign.

  Args:
    value: the score; None and NaN become a dash.
    signed: whether a positive number carries its plus.
  """
  if value is None or not math.isfinite(value):
    return ABSENT
  # A rounded zero has no sign: neither +0.000 nor -0.000 says anything.
  value = round(value, 3) or 0.0
  text = f"{value:+.3f}" if signed and value else f"{value:.3f}"
  return text.replace("-", "−")


def quantity(value: float, *, trim: bool = False) -> str:
  """Returns a count with three digits and k, M, G or T: 8.54 M.

  Args:
    value: the count; NaN becomes a dash.
    trim: whether 8.00 M is written 8 M.
  """
  if not math.isfinite(value):
    return ABSENT
  for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
    # A number that three digits would round up to the next prefix gets it.
    if abs(value) >= 0.9995 * 10**power:
      return f"{_three_digits(value / 10**power, trim)} {prefix}"
  return _three_digits(value, trim)


def memory(value: float) -> str:
  """Returns bytes as MiB or GiB.

  Args:
    value: bytes; NaN becomes a dash.
  """
  if not math.isfinite(value):
    return ABSENT
  if value >= 0.9995 * 2**30:
    return f"{_three_digits(value / 2**30)} GiB"
  return f"{_three_digits(value / 2**20)} MiB"


def seconds(value: float) -> str:
  """Returns a duration in seconds, minutes or hours.

  Args:
    value: seconds; NaN becomes a dash.
  """
  if not math.isfinite(value):
    return ABSENT
  if value < 99.5:
    return f"{_three_digits(value)} s"
  minutes = round(value / 60)
  if minutes < 100:
    return f"{minutes} min"
  return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float, full: float) -> str:
  """Returns a share in percent.

  Args:
    value: the part; NaN becomes a dash.
    full: the whole, likewise.
  """
  if not math.isfinite(value + full) or full <= 0:
    return ABSENT
  share = 100 * value / full
  return f"{share:.2g} %" if 0 < share < 1 else f"{share:.0f} %"


def rate(value: float) -> str:
  """Returns how many a second: whole ones where there are many.

  Args:
    value: 1/s; NaN becomes a dash.
  """
  return f"{value:,.0f}" if value >= 100 else quantity(value)


def _three_digits(value: float, trim: bool = False) -> str:
  if value == 0:
    return "0"
  decimals = 2 - math.floor(math.log10(abs(value)))
  rounded = round(value, decimals)
  # 9.999 has one decimal fewer once it is 10.0.
  decimals = 2 - math.floor(math.log10(abs(rounded)))
  text = f"{rounded:.{max(0, min(decimals, 6))}f}".replace("-", "−")
  return text.rstrip("0").rstrip(".") if trim and "." in text else text


def with_interval(
  value: float, low: float, high: float, *, signed: bool = False
) -> Html:
  """Returns a table cell's content: the score, its interval below it.

  Args:
    value: the score.
    low: the interval's lower end; NaN where there is no interval.
    high: the interval's upper end.
    signed: whether positive numbers carry their plus.
  """
  text = score(value, signed=signed)
  if not (math.isfinite(low) and math.isfinite(high)):
    return join(text)
  return with_note(
    text, f"[{score(low, signed=signed)}, {score(high, signed=signed)}]"
  )


def with_note(text: str, note: str) -> Html:
  """Returns a table cell's content: the text, a note below it."""
  if ABSENT in (text, note):
    return join(text)
  return join(text, " ", tag("span", note, class_="minor"))


def table(
  caption: str,
  header: Sequence[str],
  rows: Iterable[Sequence[str]],
  classes: Sequence[str | None] | None = None,
) -> Html:
  """Returns words and a table in a box that scrolls where it is too wide.

  Args:
    caption: what the table holds and how its columns are meant.
    header: the column names; the first column names the row.
    rows: the cells; `Html` is taken as it is, other strings are escaped.
    classes: a class for each row, or None.
  """
  rows = list(rows)
  classes = classes or [None] * len(rows)
  head = tag("tr", *(tag("th", name, scope="col") for name in header))
  body = [
    tag(
      "tr",
      tag("th", row[0], scope="row"),
      *(tag("td", cell) for cell in row[1:]),
      class_=kind,
    )
    for row, kind in zip(rows, classes, strict=True)
  ]
  # The caption stands outside: inside it would scroll away with the columns.
  return join(
    tag("p", caption, class_="caption"),
    tag(
      "div",
      tag("table", tag("thead", head), tag("tbody", *body)),
      class_="scroll",
      role="region",
      aria_label=caption,
      tabindex=0,
    ),
  )


def measurement_list(rows: Sequence[Mapping[str, Any]], most: int) -> Html:
  """Returns every measurement as a table, or only how many there are.

  Args:
    rows: the measurements.
    most: how many the page may hold; more are left to `results.csv`.
  """
  csv = tag("a", "results.csv", href="results.csv")
  if len(rows) > most:
    return tag(
      "p", f"All {len(rows):,} measurements, one per line, are in ", csv, "."
    )
  cells = [[_plain(value) for value in _fields(row)] for row in rows]
  return tag(
    "details",
    tag("summary", f"All {len(rows):,} measurements"),
    table("One row each, as in results.csv.", results.COLUMNS, cells),
  )


def _plain(value: Any) -> str:
  return f"{value:.6g}" if isinstance(value, float) else str(value)
