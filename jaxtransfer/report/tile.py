"""What the page of the `tile` job shows: a table of slides, and how many."""

from collections.abc import Mapping
from typing import Any

from jaxtransfer.report import tables
from jaxtransfer.report.markup import Content, Html, Section, join, tag
from jaxtransfer.report.tables import Measurements

_ROWS = 200


def content(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  """Returns the table of a `tile` run.

  Args:
    summary: `summary` of the job's `results.json`.
    measurements: its measurements; the table says the same of each slide.

  Returns:
    The page's middle.
  """
  del measurements
  return Content(
    "Slides and their tiles",
    [Section("Every slide", [slide_table(summary)])],
    "Where the tiles are",
  )


def slide_table(summary: Mapping[str, Any]) -> Html | None:
  """Returns the slides, those that were left out first.

  Args:
    summary: the job's summary.

  Returns:
    The table, or None where there is no slide.
  """
  items = list(summary.get("table") or [])
  items.sort(key=lambda item: (not item.get("failed"), not item.get("problem")))
  if not items:
    return None
  caption = (
    "Width and height are pixels of level 0, µm/px of one of these; tiles those"
    " that are kept. Slides that were left out come first, then those with a"
    " remark."
  )
  if len(items) > _ROWS:
    caption += f" The first {_ROWS:,} of {len(items):,}."
  return join(
    tables.table(
      caption,
      [
        "slide",
        "width",
        "height",
        "µm/px",
        "levels",
        "tiles",
        "tissue, mm²",
        "time",
        "remark",
      ],
      [_cells(item) for item in items[:_ROWS]],
    ),
    tag(
      "p",
      "All of them, with their paths: ",
      tag("a", "slides.csv", href="slides.csv"),
      ".",
    ),
  )


def _cells(item: Mapping[str, Any]) -> list[str]:
  name = tables.shorten(str(item.get("name")))
  role = tag("span", "left out", class_="role") if item.get("failed") else None
  levels = " ".join(f"{of:g}" for of in item.get("levels") or ())
  return [
    join(name, role),
    _count(item.get("width")),
    _count(item.get("height")),
    _number(item.get("mpp")),
    levels or tables.ABSENT,
    _count(item.get("tiles")),
    _number(item.get("tissue_mm2")),
    tables.seconds(tables.finite(item.get("seconds"))),
    tag("div", str(item.get("problem") or ""), class_="reason"),
  ]


def _count(value: int | None) -> str:
  return tables.ABSENT if value is None else f"{value:,}"


def _number(value: float | None) -> str:
  return tables.ABSENT if value is None else f"{value:.4g}"
