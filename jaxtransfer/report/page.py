"""The page that a run leaves: one file that needs nothing beside it."""

import importlib
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtransfer import files
from jaxtransfer.report import figures, gallery, heatmap, tables
from jaxtransfer.report.markup import (
  Content,
  Html,
  Picture,
  join,
  tag,
)
from jaxtransfer.report.tables import Measurements

_INLINE_ROWS = 500
_HEADLINE = 200  # characters; more are no longer read in large letters
_LISTED = 20
_NARROW = 7  # inches; a narrower figure has its caption beside it

# Nothing may be fetched and nothing may run, whatever a class is called; beside
# heatmaps, their script and no other.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem;
  background: #fff; color: #222;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere;
}
.kind { margin: 0; color: #5c5c5c; font-size: .875rem; }
h1 { margin: .1rem 0 1rem; font-size: 1.15rem; font-weight: 600; }
.sentence {
  margin: 0 0 .75rem; font-size: clamp(1.35rem, 1rem + 1.8vw, 2.1rem);
  line-height: 1.25; font-weight: 650; letter-spacing: -.01em;
  text-wrap: pretty;
}
.sentence.long {
  max-width: 58rem; font-size: 1.2rem; line-height: 1.45; font-weight: 600;
  letter-spacing: 0;
}
.rule { margin: 0 0 1rem; max-width: 46rem; color: #444; }
.notes {
  margin: 1.25rem 0; padding: .6rem 1rem; background: #fff6e5;
  border-left: 4px solid #b86e00;
}
.notes ul { margin: 0; padding-left: 1.1rem; }
h2 {
  margin: 2.75rem 0 .75rem; padding-top: .75rem; font-size: 1.25rem;
  border-top: 1px solid #ddd; line-height: 1.3;
}
figure { margin: 0 0 2rem; }
figure svg {
  display: block; width: 100%; height: auto;
  stroke-linejoin: round; stroke-linecap: butt;
}
figcaption { max-width: 46rem; margin-top: .5rem; font-size: .9rem; }
figcaption b, .files { display: block; }
.minor { color: #5c5c5c; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid #0072b2; }
table {
  border-collapse: collapse; font-size: .8125rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; min-width: 100%;
}
h3 { margin: 1.5rem 0 .35rem; font-size: 1rem; break-after: avoid; }
.gallery {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr));
  gap: 1rem .75rem; margin: 0 0 2rem; padding: 0; list-style: none;
  font-size: .75rem; line-height: 1.35;
}
.gallery li { break-inside: avoid; min-width: 0; }
.gallery img {
  display: block; margin-bottom: .25rem; image-rendering: pixelated;
}
.gallery b, .gallery span { display: block; }
.wide { grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.wide img {
  max-width: 100%; height: auto; image-rendering: auto; outline: 1px solid #ddd;
}
.caption { max-width: 46rem; margin: 0 0 .6rem; font-size: .9rem; }
th, td {
  padding: .35rem .5rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e6e6e6; white-space: nowrap;
}
thead th {
  border-bottom: 1.5px solid #555; vertical-align: bottom; font-weight: 600;
  white-space: normal; overflow-wrap: normal;
}
tr > th:first-child { text-align: left; }
tbody th { font-weight: 500; }
td .minor { display: block; font-size: .92em; }
.words, .reason {
  display: block; max-width: 16rem; min-width: 11rem; white-space: normal;
  overflow-wrap: break-word; color: #5c5c5c; font-weight: 400;
}
.reason { max-width: none; min-width: 10rem; text-align: left; }
tr.chosen > * { background: #fdeee4; font-weight: 650; }
.role {
  margin-left: .4rem; padding: 0 .35rem; border-radius: .6rem;
  background: #444; color: #fff; font-size: .72rem; font-weight: 600;
}
dl {
  display: grid; grid-template-columns: minmax(7rem, max-content) 1fr;
  gap: .3rem 1.25rem; margin: 0;
}
dt { color: #5c5c5c; }
dd { margin: 0; min-width: 0; }
pre {
  margin: .5rem 0; padding: .75rem 1rem; background: #f4f4f4;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
a { color: #005a8d; }
summary { cursor: pointer; }
@media screen and (min-width: 64rem) {
  figure.narrow {
    display: grid; grid-template-columns: minmax(0, 42rem) minmax(0, 1fr);
    column-gap: 2rem; align-items: start;
  }
  .narrow figcaption { margin-top: 2rem; }
}
@media (max-width: 34rem) {
  body { padding: 1.25rem 1rem 3rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
}
@media print {
  @page { margin: 14mm; }
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  figure svg { min-width: 0 !important; }
  .narrow svg { max-width: 11.5cm !important; }
  figure { margin-bottom: .8rem; }
  h2 { margin-top: 1.2rem; font-size: 1.1rem; }
  figure, tr, .sentence, .caption, .notes { break-inside: avoid; }
  h2, .caption { break-after: avoid; }
  table { font-size: 6.5pt; }
  th, td { padding: .2rem .3rem; }
  .files { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def write(
  workdir: str | os.PathLike[str],
  results: Mapping[str, Any],
  galleries: Sequence[gallery.Gallery] = (),
  views: Iterable[heatmap.View] = (),
) -> pathlib.Path:
  """Writes a run's figures, its table of measurements and its page.

  `figures/<name>.svg` and `.png`, `results.csv` and `report.html` appear in
  `workdir`, each whole or not at all, the page last. Equal results give equal
  bytes.

  Args:
    workdir: the run's directory; it is made where there is none.
    results: what `results.json` holds: "job", "summary" and "measurements".
      Any value may be null, and so may be left out whatever was not measured.
    galleries: single images with their words, which are on the page alone.
    views: slides with what their tiles scored, likewise.

  Returns:
    The page's path.

  Raises:
    OSError: the directory cannot be written; older files are as they were.
  """
  workdir = pathlib.Path(workdir)
  results = files.visible(results)
  job = str(results.get("job"))
  measurements = Measurements(results.get("measurements") or ())
  summary = dict(results.get("summary") or {})
  summary["taps"] = summary.get("taps") or measurements.values_of("tap")
  content = _content_of(job)(summary, measurements)

  def block(item: Html | Picture) -> Html:
    if isinstance(item, Picture):
      return _figure(item, workdir / "figures")
    return item

  images = gallery.blocks(galleries)
  maps = heatmap.blocks(views)
  body = join(
    _header(job, content.title, summary),
    _notes(summary),
    *(
      _section(section.heading, *map(block, filter(None, section.blocks)))
      for section in content.sections
    ),
    _section("Where it looks", *maps) if maps else None,
    _section(content.images, *images) if images else None,
    _section(
      "Every measurement",
      tables.measurement_list(measurements.rows, _INLINE_ROWS),
    ),
    _section("What was run", _facts(summary)),
    _section("How to repeat it", *_repeat(summary)),
  )
  tables.write_results_csv(workdir / "results.csv", measurements.rows)
  path = workdir / "report.html"
  files.write_text(path, _document(content.title, body, bool(maps)))
  return path


def _content_of(
  job: str,
) -> Callable[[Mapping[str, Any], Measurements], Content]:
  """Returns what says what a job shows: `content` of the file of its name.

  A job without one still gets its sentence, its measurements and its settings.
  """
  name = f"{__package__}.{job}"
  if not job.isidentifier() or importlib.util.find_spec(name) is None:
    return _plain
  return getattr(importlib.import_module(name), "content", _plain)


def _plain(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  del summary, measurements
  return Content("Results", ())


def _document(title: str, body: Html, has_heatmaps: bool) -> Html:
  policy, style, script = _POLICY, Html(_STYLE), None
  if has_heatmaps:
    policy += f"; script-src {heatmap.script_hash()}"
    style = join(style, heatmap.style())
    script = tag("script", heatmap.script())
  head = tag(
    "head",
    tag("meta", charset="utf-8"),
    tag(
      "meta",
      name="viewport",
      content="width=device-width, initial-scale=1",
    ),
    tag("meta", http_equiv="Content-Security-Policy", content=policy),
    tag("title", tables.shorten(title)),
    tag("style", style),
  )
  page = tag("html", head, tag("body", tag("main", body), script), lang="en")
  return Html(f"<!DOCTYPE html>\n{page}\n")


def _header(job: str, title: str, summary: Mapping[str, Any]) -> Html:
  sentence = str(summary.get("sentence") or "")
  rule, interval = summary.get("rule"), summary.get("interval")
  return tag(
    "header",
    tag("p", f"jaxtransfer · {job}", class_="kind"),
    tag("h1", title),
    tag(
      "p",
      sentence.replace(" %", "\u00a0%"),
      class_="sentence long" if len(sentence) > _HEADLINE else "sentence",
    ),
    tag("p", f"In brackets: {interval}.", class_="rule") if interval else None,
    tag("p", f"How this was decided: {rule}", class_="rule") if rule else None,
  )


def _notes(summary: Mapping[str, Any]) -> Html | None:
  notes = [str(note) for note in summary.get("notes") or ()]
  items = [tag("li", note) for note in notes[:_LISTED]]
  if len(notes) > _LISTED:
    items.append(tag("li", f"… and {len(notes) - _LISTED:,} more."))
  if failures := summary.get("failures"):
    unit = str(summary.get("unit") or "images")
    images = (
      f"{unit.removesuffix('s')} was" if failures == 1 else f"{unit} were"
    )
    items.insert(
      0,
      tag(
        "li",
        f"{failures:,} {images} left out because they could not be read: ",
        tag("a", "failures.csv", href="failures.csv"),
        ".",
      ),
    )
  return tag("aside", tag("ul", *items), class_="notes") if items else None


def _section(heading: str, *blocks: Html) -> Html:
  return tag("section", tag("h2", heading), *blocks)


def _figure(picture: Picture, directory: pathlib.Path) -> Html:
  svg = figures.save(picture.figure, directory, picture.name)
  stem = f"figures/{picture.name}"
  return tag(
    "figure",
    tag(
      "div",
      svg,
      class_="scroll",
      role="img",
      aria_label=picture.title,
      tabindex=0,
    ),
    tag(
      "figcaption",
      tag("b", picture.title),
      picture.caption,
      " ",
      tag(
        "span",
        tag("a", "SVG", href=f"{stem}.svg"),
        " ",
        tag("a", "PNG", href=f"{stem}.png"),
        class_="files",
      ),
    ),
    class_="narrow" if picture.figure.get_figwidth() < _NARROW else None,
  )


def _facts(summary: Mapping[str, Any]) -> Html:
  """Returns the settings that every job has in common, those that are known."""
  run = summary.get("run") or {}
  facts = {
    "network": summary.get("network"),
    "weights": summary.get("weights"),
    "data": summary.get("data"),
    "classes": _names(summary.get("classes")),
    str(summary.get("unit") or "images"): _counts(summary.get("rows")),
    "groups": _counts(summary.get("groups")),
    "normalisation": _normalisation(summary.get("normalisation")),
    "image size": _pixels(summary.get("image_size")),
    "random networks": summary.get("seeds"),
    "repeats": summary.get("repeats"),
    "search": summary.get("halving"),
    "tolerance": summary.get("tolerance"),
    "intervals": summary.get("interval"),
    "devices": run.get("devices"),
    "started": run.get("started"),
    "time": _times(summary.get("seconds")),
    "versions": _pairs(run.get("versions")),
    "commit": run.get("commit"),
  }
  return tag(
    "dl",
    *(
      join(tag("dt", name), tag("dd", str(value)))
      for name, value in facts.items()
      if value is not None and value != ""
    ),
  )


def _names(names: Sequence[Any] | None) -> str | None:
  if not names:
    return None
  shown = ", ".join(tables.shorten(str(name)) for name in names[:_LISTED])
  rest = len(names) - _LISTED
  more = f", … and {rest:,} more" if rest > 0 else ""
  return f"{len(names):,}: {shown}{more}"


def _counts(counts: Mapping[str, Any] | None) -> str | None:
  if not counts:
    return None
  return ", ".join(
    f"{name} {count:,}" for name, count in counts.items() if count is not None
  )


def _pixels(size: Any) -> str | None:
  return None if size is None else f"{size} px"


def _normalisation(values: Mapping[str, Any] | None) -> str | None:
  if not values:
    return None
  return "; ".join(
    f"{name} " + ", ".join(f"{v:.4g}" for v in numbers)
    for name, numbers in values.items()
    if numbers
  )


def _times(times: Mapping[str, Any] | None) -> str | None:
  if not times:
    return None
  return ", ".join(
    f"{name} {tables.seconds(tables.finite(value))}"
    for name, value in times.items()
    if value is not None
  )


def _pairs(pairs: Mapping[str, Any] | None) -> str | None:
  if not pairs:
    return None
  return ", ".join(f"{name} {value}" for name, value in pairs.items())


def _repeat(summary: Mapping[str, Any]) -> list[Html]:
  command = (summary.get("run") or {}).get("command")
  return [
    *(
      [
        tag("p", "The same command, with another --workdir:"),
        tag("pre", str(command)),
      ]
      if command
      else []
    ),
    tag(
      "p",
      "Beside this page: ",
      tag("a", "config.json", href="config.json"),
      " holds every setting, ",
      tag("a", "results.json", href="results.json"),
      " what this page was made of, and ",
      tag("a", "results.csv", href="results.csv"),
      " every measurement, one per line.",
    ),
  ]
