"""What the page of the `extract` job shows: its slides and its encoders."""

from collections.abc import Mapping
from typing import Any

from jaxtransfer.report import tables
from jaxtransfer.report.markup import Content, Html, Section, tag
from jaxtransfer.report.tables import Measurements

# Of all; the others are in slides.csv.
_LISTED = 200


def content(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  """Returns the tables of an `extract` run.

  Args:
    summary: `summary` of the job's `results.json`.
    measurements: its measurements.

  Returns:
    The page's middle.
  """
  what = str(summary.get("bags") or "slides")
  return Content(
    f"Features of {summary.get('data')}",
    [
      Section("What could not be used", [_broken(summary)]),
      Section("Encoders", [_encoders(summary, measurements)]),
      Section(what.capitalize(), [_slides(summary)]),
    ],
  )


def _encoders(
  summary: Mapping[str, Any], measurements: Measurements
) -> Html | None:
  encoders = summary.get("encoders") or []
  if not encoders:
    return None
  rows = [
    [
      one["folder"],
      one["network"],
      one["weights"],
      one["cut"],
      f"{one['channels']:,}",
      tables.memory(one["bytes"]),
      tag("code", str(one["weights_sha256"])[:12]),
    ]
    for one in encoders
  ]
  speed = next(
    (
      tables.finite(row.get("value"))
      for row in measurements.rows
      if row.get("metric") == "tiles_per_second"
    ),
    float("nan"),
  )
  size = summary.get("image_size")
  return tables.table(
    f"Each is a folder under features/, of {summary.get('features_dtype')} in"
    f" the layout of {summary.get('layout')}. Networks saw {size} x {size}"
    f" pixels, {tables.rate(speed)} tiles a second and process. The digest is"
    " of the weights' file, or of the numbers where there is none.",
    ["folder", "network", "weights", "cut", "channels", "size", "digest"],
    rows,
  )


def _broken(summary: Mapping[str, Any]) -> Html | None:
  broken = summary.get("broken") or []
  if not broken:
    return None
  rows = [
    [
      tables.shorten(str(one["name"])),
      tag("span", str(one["reason"]), class_="reason"),
    ]
    for one in broken[:_LISTED]
  ]
  return tables.table(
    f"They have no features{_more(len(broken), 'failures.csv')}.",
    ["", "why"],
    rows,
  )


def _slides(summary: Mapping[str, Any]) -> Html | None:
  slides = [s for s in summary.get("slides") or [] if not s["reason"]]
  if not slides:
    return None
  rows = [
    [
      tables.shorten(str(one["name"])),
      tables.shorten(str(one["label"])) or tables.ABSENT,
      f"{one['tiles']:,}",
      f"{one['dropped']:,}",
      _number(one["mpp"]),
      tables.seconds(tables.finite(one["seconds"])),
      tables.rate(_rate(one)),
    ]
    for one in slides[:_LISTED]
  ]
  return tables.table(
    "Dropped tiles could not be read, and failures.csv names them; seconds are"
    f" those of one process{_more(len(slides), 'slides.csv')}.",
    ["", "label", "tiles", "dropped", "µm/px", "seconds", "tiles/s"],
    rows,
  )


def _more(count: int, file: str) -> str:
  rest = count - _LISTED
  return f"; {rest:,} more are in {file}" if rest > 0 else ""


def _rate(slide: Mapping[str, Any]) -> float:
  seconds = tables.finite(slide["seconds"])
  return slide["tiles"] / seconds if seconds > 0 else float("nan")


def _number(value: Any) -> str:
  number = tables.finite(value)
  return tables.ABSENT if number != number else f"{number:.3g}"
