"""One style for every figure, what figures share, and how they are saved.

Figures are made through matplotlib's objects: no pyplot, no window, no state
that outlives the call, and no setting of the user's own `matplotlibrc`.
"""

import contextlib
import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from jaxtransfer import files
from jaxtransfer.report.markup import Html
from jaxtransfer.report.tables import Series, quantity

# Okabe and Ito's palette: apart for every common colour vision, and apart in
# lightness where a printer has only black.
BLUE = "#0072B2"
PALE_BLUE = "#A6CBE3"
VERMILLION = "#D55E00"
GREEN = "#007A5A"
PURPLE = "#9A4F7D"
GREY = "#6E6E6E"
INK = "#222222"
# In this order, where several lines stand beside each other.
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, GREY)

_STYLE = {
  "axes.axisbelow": True,
  "axes.edgecolor": "#888888",
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.labelcolor": INK,
  "axes.labelsize": 9,
  "axes.linewidth": 0.8,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 9,
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "grid.color": "#E4E4E4",
  "grid.linewidth": 0.6,
  "legend.fontsize": 8.5,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
  "savefig.facecolor": "white",
  # Outlines, not text: a reader without the font sees the same figure.
  "svg.fonttype": "path",
  # Equal rows give equal bytes.
  "svg.hashsalt": "jaxtransfer",
  # A name may hold a dollar sign; it is never mathematics.
  "text.parse_math": False,
  "text.color": INK,
  "xtick.color": "#555555",
  "xtick.labelcolor": INK,
  "xtick.labelsize": 8,
  "ytick.color": "#888888",
  "ytick.labelcolor": INK,
  "ytick.labelsize": 8,
}
_LABEL_POINTS = 8
_LABEL_GAP = 1.35 * _LABEL_POINTS
_LEAST_WIDTH = 5.5  # inches; about a phone's width at one pixel a point


_QUANTITY = FuncFormatter(lambda value, _: quantity(value, trim=True))


def style() -> contextlib.AbstractContextManager[None]:
  """Returns the context in which every figure is drawn and saved."""
  return matplotlib.style.context(_STYLE, after_reset=True)


@dataclasses.dataclass(frozen=True)
class Mark:
  """A tap that is pointed out in every panel.

  Attributes:
    tap: its name.
    label: the word before the name, such as "cut".
    colour: its line's colour.
    line: its line's style.
  """

  tap: str
  label: str
  colour: str = VERMILLION
  line: str = "-"


def depth_panels(
  taps: Sequence[str],
  heights: Sequence[float],
  marks: Sequence[Mark] = (),
  columns: int = 1,
) -> tuple[Figure, list[Axes]]:
  """Returns a figure of panels that share the axis of depth.

  Tap `i` stands at x = i. As many names are written as fit, those of the marks
  and of whole stages first; every tap has its tick.

  Args:
    taps: N names, shallow to deep.
    heights: inches of each row of panels, top to bottom.
    marks: taps to point out by a vertical line; `name_marks` names them.
    columns: panels side by side.

  Returns:
    The figure and its axes, row by row.
  """
  width = _width(len(taps))
  points = (72 * width - 64 * columns) / columns
  rotation, below = _rotation(taps, points)
  marks = [mark for mark in marks if mark.tap in taps]
  figure = Figure(
    figsize=(width, sum(heights) + below / 72 + 0.19 * len(marks) + 0.45),
    layout=ConstrainedLayoutEngine(h_pad=4 / 72, w_pad=4 / 72),
  )
  axes = figure.subplots(
    len(heights),
    columns,
    sharex=True,
    sharey=columns > 1,
    squeeze=False,
    height_ratios=heights,
  )
  named = _named(taps, points, rotation, [mark.tap for mark in marks])
  for axis in axes.flat:
    axis.set_xlim(-0.6, len(taps) - 0.4)
    axis.tick_params(axis="x", which="minor", length=2)
    for mark in marks:
      axis.axvline(
        taps.index(mark.tap),
        color=mark.colour,
        linestyle=mark.line,
        linewidth=1.1,
        zorder=0.9,  # behind what was measured
      )
  for axis in axes[-1]:
    axis.set_xticks(range(len(taps)), minor=True)
    axis.set_xticks(named)
    axis.set_xticklabels(
      [taps[i] for i in named],
      rotation=rotation,
      rotation_mode="anchor" if rotation == 45 else None,
      ha="right" if rotation == 45 else "center",
    )
  return figure, list(axes.flat)


def _width(taps: int) -> float:
  return min(13.0, max(_LEAST_WIDTH, 0.9 + 0.2 * taps))


def _rotation(taps: Sequence[str], points: float) -> tuple[int, float]:
  """Returns the angle at which the names fit, and their height in points."""
  longest = max(map(_length, taps), default=0)
  space = points / max(1, len(taps))
  if longest + 7 < space:
    return 0, 2 * _LABEL_POINTS
  if space > 1.5 * _LABEL_GAP and longest < 80:
    return 45, 0.72 * longest + _LABEL_POINTS
  return 90, longest + _LABEL_POINTS


def _length(name: str) -> float:
  """Returns the points that a tap's name takes along its line."""
  font = FontProperties(size=_LABEL_POINTS)
  return text_to_path.get_text_width_height_descent(name, font, False)[0]


def _named(
  taps: Sequence[str], points: float, rotation: int, wanted: Sequence[str]
) -> list[int]:
  """Returns the taps whose names can stand beside each other."""
  space = points / max(1, len(taps))
  if rotation == 0:
    return list(range(len(taps)))

  def importance(i: int) -> int:
    if taps[i] in wanted:
      return 0
    if i in (0, len(taps) - 1):
      return 1
    return 2 if "." not in taps[i] else 3

  chosen: list[int] = []
  for i in sorted(range(len(taps)), key=importance):
    if all(abs(i - j) * space >= _LABEL_GAP for j in chosen):
      chosen.append(i)
  return sorted(chosen)


def name_marks(axis: Axes, taps: Sequence[str], marks: Sequence[Mark]) -> None:
  """Writes the marks' names above a panel, each on its own line.

  Args:
    axis: the topmost panel of `depth_panels`.
    taps: N names.
    marks: what to name; a tap that is not in `taps` is passed over.
  """
  marks = [mark for mark in marks if mark.tap in taps]
  for line, mark in enumerate(reversed(marks)):
    position = taps.index(mark.tap)
    left = position < (len(taps) - 1) / 2 or len(taps) == 1
    axis.annotate(
      f"{mark.label}: {mark.tap}",
      xy=(position, 1),
      xycoords=("data", "axes fraction"),
      xytext=(-2 if left else 2, 2 + 13 * line),
      textcoords="offset points",
      ha="left" if left else "right",
      va="bottom",
      color=mark.colour,
      fontsize=8.5,
      fontweight="bold",
    )


def draw_curve(
  axis: Axes,
  series: Series,
  *,
  label: str | None,
  colour: str,
  line: str = "-",
  marker: str = "o",
  members: Sequence[Series] = (),
  members_label: str | None = None,
) -> None:
  """Draws a score against depth with its interval.

  Args:
    axis: where.
    series: (N,) scores with intervals; NaN leaves a gap.
    label: its name in the legend.
    colour: its colour.
    line: its line style.
    marker: its marker.
    members: single runs behind it, drawn faintly.
    members_label: their name in the legend.
  """
  x = np.arange(len(series.value))
  for i, member in enumerate(members):
    axis.plot(
      x,
      member.value,
      color=colour,
      alpha=0.35,
      linewidth=0.7,
      # One tap has no line; it is seen as a dot.
      marker="." if len(x) == 1 else None,
      label=members_label if i == 0 else None,
    )
  axis.fill_between(
    x, series.low, series.high, color=colour, alpha=0.18, linewidth=0
  )
  known = np.isfinite(series.low) & np.isfinite(series.high)
  beside = np.pad(known, 1)
  alone = known & ~beside[:-2] & ~beside[2:]
  axis.vlines(x[alone], series.low[alone], series.high[alone], color=colour)
  axis.plot(
    x,
    series.value,
    color=colour,
    linestyle=line,
    marker=marker,
    markersize=4.5 if len(x) <= 30 else 2.5,
    label=label,
  )


def draw_bars(axis: Axes, series: Series) -> None:
  """Draws differences with intervals as bars from zero.

  A bar whose interval holds zero is pale; the others are full.

  Args:
    axis: where.
    series: (N,) differences with intervals; NaN leaves a gap.
  """
  x = np.arange(len(series.value))
  sure = (series.low > 0) | (series.high < 0)
  value = np.nan_to_num(series.value)
  axis.bar(
    x,
    value,
    width=_bar_width(len(x)),
    color=[BLUE if s else PALE_BLUE for s in sure],
    edgecolor=BLUE,
    linewidth=0.8 if len(x) <= 40 else 0.3,
  )
  known = np.isfinite(series.value + series.low + series.high)
  axis.vlines(
    x[known],
    series.low[known],
    series.high[known],
    color=INK,
    linewidth=1.0 if len(x) <= 40 else 0.7,
    zorder=3,
  )
  axis.axhline(0, color=INK, linewidth=0.8)


def _bar_width(taps: int) -> float:
  """Returns the width at which few bars do not become walls."""
  return min(0.7, 0.1 * (taps + 1))


def draw_cost(axis: Axes, values: np.ndarray, label: str) -> None:
  """Draws a cost along depth as plain bars.

  Args:
    axis: where.
    values: (N,) the cost of the network cut at each tap.
    label: its name.
  """
  axis.bar(
    np.arange(len(values)),
    np.nan_to_num(values),
    width=_bar_width(len(values)),
    color="#B5B5B5",
  )
  axis.set_ylabel(label)
  axis.yaxis.set_major_formatter(_QUANTITY)
  axis.yaxis.set_major_locator(MaxNLocator(3))
  axis.set_ylim(bottom=0)


def draw_differences(axis: Axes, series: Series, limit: float) -> None:
  """Draws differences with intervals as points.

  A point whose interval stays above the limit is full, the others are hollow.

  Args:
    axis: where.
    series: (N,) differences with intervals; NaN leaves a gap.
    limit: the least difference that is tolerated; NaN where there is none.
  """
  x = np.arange(len(series.value))
  colour = np.where(series.low >= limit, BLUE, "white")
  known = np.isfinite(series.value)
  bounded = known & np.isfinite(series.low + series.high)
  axis.vlines(
    x[bounded],
    series.low[bounded],
    series.high[bounded],
    color=BLUE,
    linewidth=1.8 if len(x) <= 40 else 0.9,
  )
  axis.scatter(
    x[known],
    series.value[known],
    s=24 if len(x) <= 40 else 9,
    c=colour[known],
    edgecolors=BLUE,
    linewidths=1,
    zorder=3,
  )
  axis.axhline(0, color=INK, linewidth=0.8)
  if math.isfinite(limit):
    axis.axhline(limit, color=INK, linewidth=1, linestyle=(0, (1, 2)))


def legend(figure: Figure, axis: Axes, columns: int = 3) -> None:
  """Writes one legend above all panels.

  Args:
    figure: the figure.
    axis: the panel whose labels are meant.
    columns: entries side by side.
  """
  handles, labels = axis.get_legend_handles_labels()
  if handles:
    figure.legend(
      handles[::-1],
      labels[::-1],
      loc="outside upper left",
      ncols=columns,
      columnspacing=1.4,
      handlelength=2.2,
    )


def score_limits(axis: Axes, metric: str | None) -> None:
  """Keeps a score's axis at or below one and shows where chance is.

  Args:
    axis: a panel whose curves are drawn.
    metric: the score's name; only AUROC has a chance level of its own.
  """
  low, high = axis.get_ylim()
  axis.set_ylim(low, max(low + 1e-3, min(high, 1 + 0.03 * (high - low))))
  if metric == "auroc" and low < 0.5 < high:
    axis.axhline(0.5, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axis.annotate(
      "chance",
      xy=(1, 0.5),
      xycoords=("axes fraction", "data"),
      xytext=(0, 2),
      textcoords="offset points",
      ha="right",
      fontsize=7.5,
      color=GREY,
    )


def pareto_front(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
  """Returns which points no other beats: none as cheap scores as high.

  Args:
    cost: (N,) smaller is better; NaN is never on the front.
    score: (N,) larger is better; NaN likewise.

  Returns:
    (N,) bool.
  """
  known = np.isfinite(cost) & np.isfinite(score)
  no_worse = (cost[None] <= cost[:, None]) & (score[None] >= score[:, None])
  better = (cost[None] < cost[:, None]) | (score[None] > score[:, None])
  return known & ~(no_worse & better & known[None]).any(axis=1)


def pareto_panels(
  names: Sequence[str],
  costs: Sequence[tuple[np.ndarray, str]],
  series: Series,
  marks: Sequence[Mark],
  label: str,
  *,
  kind: str = "tap",
  wanted: Sequence[int] | None = None,
  stacked: bool = False,
) -> Figure:
  """Returns score against cost, one panel for each cost, on one score scale.

  Args:
    names: N names of what is compared, such as taps.
    costs: what each of them costs, (N,), each with its name.
    series: (N,) the score with its interval.
    marks: which to point out.
    label: the score's name.
    kind: what one of them is called.
    wanted: which are named where there is room, the most important first,
      after those on the front; None: all, or whole stages alone where there
      are more than twelve taps.
    stacked: whether the panels stand above each other, with room for names.
  """
  marks = [mark for mark in marks if mark.tap in names]
  size = (6.8, 0.4 + 3.3 * len(costs)) if stacked else (_LEAST_WIDTH, 3.3)
  figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=6 / 72))
  shape = (len(costs), 1) if stacked else (1, len(costs))
  axes = list(figure.subplots(*shape, sharey=True, squeeze=False).flat)
  for axis, (cost, name) in zip(axes, costs, strict=True):
    _draw_pareto(axis, names, cost, series, marks, f"beaten by another {kind}")
    axis.set_xlabel(name)
  for axis in axes if stacked else axes[:1]:
    axis.set_ylabel(label)
  legend(figure, axes[0], columns=2)
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  for axis, (cost, _) in zip(axes, costs, strict=True):
    marked = [names.index(mark.tap) for mark in marks]
    front = np.flatnonzero(pareto_front(cost, series.value)).tolist()
    if wanted is not None:
      others = [*front, *wanted]
    elif len(names) <= 12:
      others = [*front, *range(len(names))]
    else:
      others = [i for i, name in enumerate(names) if "." not in name]
    _name_points(
      figure,
      axis,
      np.stack([cost, series.value], axis=1),
      names,
      list(dict.fromkeys([*marked, *others])),
      above={*marked, *front} if stacked else (),
    )
  return figure


def _draw_pareto(
  axis: Axes,
  names: Sequence[str],
  cost: np.ndarray,
  series: Series,
  marks: Sequence[Mark],
  beaten_label: str,
) -> None:
  known = np.isfinite(cost) & (cost > 0) & np.isfinite(series.value)
  cost = np.where(known, cost, np.nan)
  front = pareto_front(cost, series.value)
  order = np.flatnonzero(front)[np.argsort(cost[front])]
  axis.grid(True, axis="both")
  axis.xaxis.set_major_formatter(_QUANTITY)
  axis.xaxis.set_major_locator(MaxNLocator(5))
  if len(names) <= 30:
    bounded = known & np.isfinite(series.low) & np.isfinite(series.high)
    axis.vlines(
      cost[bounded],
      series.low[bounded],
      series.high[bounded],
      color="#C4C4C4",
      linewidth=1,
    )
  axis.plot(cost[order], series.value[order], color=BLUE, linewidth=1.1)
  size = 26 if len(names) <= 30 else 12
  shapes = {"marker": "o", "s": size, "linewidths": 1, "zorder": 3}
  beaten = known & ~front
  if beaten.any():
    axis.scatter(
      cost[beaten],
      series.value[beaten],
      facecolors="white",
      edgecolors=GREY,
      label=beaten_label,
      **shapes,
    )
  axis.scatter(
    cost[front], series.value[front], color=BLUE, label="on the front", **shapes
  )
  for mark in reversed(marks):
    i = names.index(mark.tap)
    if known[i]:
      axis.scatter(
        cost[i],
        series.value[i],
        s=3.4 * size,
        facecolors="none",
        edgecolors=mark.colour,
        label=f"{mark.label}: {mark.tap}",
        linewidths=1.8,
        zorder=4,
      )


def _name_points(
  figure: Figure,
  axis: Axes,
  points: np.ndarray,
  names: Sequence[str],
  order: Sequence[int],
  above: Collection[int] = (),
) -> None:
  """Writes names beside (N, 2) points wherever they touch nothing else.

  Those in `above` have theirs above them where that is possible.

  The figure's layout is settled before and left alone from then on, so that
  what does not overlap now does not later.
  """
  renderer = FigureCanvasAgg(figure).get_renderer()
  scale = figure.dpi / 72
  pixels = axis.transData.transform(points)
  taken = [
    Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale)
    for x, y in pixels
    if math.isfinite(x + y)
  ]
  inside = axis.get_window_extent(renderer)
  places = (
    ((7, -7), "left", "top"),
    ((7, 4), "left", "bottom"),
    ((-7, 4), "right", "bottom"),
    ((-7, -7), "right", "top"),
    ((0, -8), "center", "top"),
    ((0, 8), "center", "bottom"),
  )
  for i in order:
    if not np.isfinite(pixels[i]).all():
      continue
    for offset, horizontal, vertical in sorted(
      places, key=lambda place: i in above and place[2] != "bottom"
    ):
      text = axis.annotate(
        names[i],
        xy=points[i],
        xytext=offset,
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=7.5,
        bbox={"color": "white", "alpha": 0.75, "pad": 0.5, "linewidth": 0},
      )
      text.set_in_layout(False)
      box = text.get_window_extent(renderer).padded(2 * scale, 0)
      held = inside.x0 <= box.x0 and box.x1 <= inside.x1
      held &= inside.y0 <= box.y0 and box.y1 <= inside.y1
      if held and not any(box.overlaps(other) for other in taken):
        taken.append(box)
        break
      text.remove()


def save(figure: Figure, directory: pathlib.Path, name: str) -> Html:
  """Writes a figure as SVG and as PNG at 150 dpi, and returns it for a page.

  Args:
    figure: the drawing.
    directory: where `<name>.svg` and `<name>.png` appear.
    name: the file name; in the page it stands before every id, so that the
      figures of one page do not take each other's glyphs and clipping paths.

  Returns:
    The `<svg>` element, without size, so that the page scales it.
  """
  directory.mkdir(parents=True, exist_ok=True)
  svg = _render(figure, "svg", metadata={"Date": None, "Creator": None})
  # The layout is settled now: the PNG is the same picture, in half the time.
  figure.set_layout_engine("none")
  files.write_text(directory / f"{name}.svg", svg.decode())
  png = _render(figure, "png", dpi=150, metadata={"Software": None})
  with files.atomic_path(directory / f"{name}.png") as temporary:
    temporary.write_bytes(png)
  return _inline(svg.decode(), name)


def _render(figure: Figure, kind: str, **options: Any) -> bytes:
  with style(), io.BytesIO() as buffer:
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _inline(svg: str, name: str) -> Html:
  """Makes a file's SVG fit to stand in a page with others."""
  svg = svg[svg.index("<svg") :].strip()
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  # matplotlib's style element says `*`: in a page it would reach everything.
  svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
  svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
  svg = re.sub(r'\bid="', f'id="{name}-', svg)
  svg = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', svg)
  svg = svg.replace("url(#", f"url(#{name}-")
  opening = svg[: svg.index(">")]
  (sides,) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
  width, height = map(float, sides)
  # A figure wider than a phone scrolls rather than becoming unreadable.
  least = f"min-width:{0.82 * width:.0f}px;" if width > 500 else ""
  return Html(
    f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true" '
    f'style="{least}max-width:{1.75 * width:.0f}px"' + svg[svg.index(">") :]
  )
