"""Scores of a slide's tiles over its picture, on a page.

The page holds each slide's picture and, over it, its scores, which need no
script. `assets/heatmap.js` makes one viewer of them, from the numbers that
stand beside each picture.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from jaxtransfer import files
from jaxtransfer.report import gallery, tables, tile_scores
from jaxtransfer.report.markup import Html, join, tag
from jaxtransfer.report.tile_scores import View

# Of all slides of a page, as they stand in it.
MOST_BYTES = 16 * 2**20

_ASSETS = pathlib.Path(__file__).parent.parent / "assets"
_LONGEST = 1024  # pixels of a slide's picture
_QUALITY = 75
_TILE = 144  # pixels of a tile's picture
_RASTER = 768  # pixels of the scores that are drawn without a script
_LEVELS = 255  # colours: a byte has one more, for what is no tile
_COLOURS = {"sequential": "viridis", "diverging": "coolwarm"}
_OPACITY = 50  # percent

_WORDS = (
  "Every coloured square is a tile, in its place and of its size; where tiles"
  " overlap, the one whose centre is nearest is seen. What has no colour was"
  " no tile. A percentile is a tile's rank among the tiles of its own slide:"
  " 100 % is the highest, and equal scores share their mean rank."
)
_ATTENTION_WORDS = (
  " Attention is a tile's share of the slide's attention times the number of"
  " tiles: 1 is what each would have if all counted alike. It says where the"
  " network looked, not for which class."
)


def owners(
  corners: np.ndarray, side: float, shape: tuple[int, int]
) -> np.ndarray:
  """Returns which tile each pixel of a raster shows.

  A pixel shows a tile if its centre lies in it; of several, the one whose
  centre is nearest, and of equal ones the first. A tile in which no pixel's
  centre lies has the pixel that its own centre lies in.

  Args:
    corners: (N, 2) x and y of the tiles' top left corners, in pixels of the
      raster.
    side: a tile's side, likewise.
    shape: height and width of the raster.

  Returns:
    (height, width) int32: the index of a tile, or -1.
  """
  limit = np.array(shape[::-1])
  centres = corners + side / 2
  first = np.ceil(corners - 0.5).astype(np.int64)
  last = np.ceil(corners + side - 0.5).astype(np.int64)
  inner = np.floor(centres).astype(np.int64)
  empty = last <= first
  first = np.clip(np.where(empty, inner, first), 0, limit)
  last = np.clip(np.where(empty, inner + 1, last), 0, limit)
  sides = last - first
  areas = sides.prod(1)
  tile = np.repeat(np.arange(len(corners)), areas)
  within = np.arange(len(tile)) - np.repeat(areas.cumsum() - areas, areas)
  x = first[tile, 0] + within % sides[tile, 0]
  y = first[tile, 1] + within // sides[tile, 0]
  distance = (x + 0.5 - centres[tile, 0]) ** 2
  distance += (y + 0.5 - centres[tile, 1]) ** 2
  # What is written last stays.
  order = np.lexsort((-tile, -distance))
  owner = np.full(shape, -1, np.int32)
  owner[y[order], x[order]] = tile[order]
  return owner


def script() -> Html:
  """Returns the one script that a page with heatmaps may run."""
  return Html((_ASSETS / "heatmap.js").read_text(encoding="utf-8"))


def script_hash() -> str:
  """Returns the script's SHA-256 as a page's policy names it."""
  digest = hashlib.sha256(script().encode("utf-8")).digest()
  return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def style() -> Html:
  """Returns the style sheet of the heatmaps."""
  return Html((_ASSETS / "heatmap.css").read_text(encoding="utf-8"))


def blocks(views: Iterable[View], most_bytes: int = MOST_BYTES) -> list[Html]:
  """Returns slides with their scores as one part of a page.

  The page also needs `style` and `script`.

  Args:
    views: in order. They are taken one by one, and no more once the page is
      full, so that they need not be in memory together.
    most_bytes: what all of them may hold.
  """
  facts: list[tuple[str, Mapping[str, str | float]]] = []
  articles: list[Html] = []
  attention, full, left = False, False, most_bytes
  for view in views:
    article = _article(view, f"heatmap-{len(articles) + 1}")
    left -= len(article)
    if full := left < 0:
      break
    articles.append(article)
    facts.append((view.name, view.facts))
    attention |= any(
      tile_scores.kind(label) == "attention" for label in view.scores
    )
  if full:
    more = "Further slides would make the page too large and are left out."
    articles.append(tag("p", more, class_="caption"))
  if not articles:
    return []
  return [
    tag(
      "p", _WORDS + (_ATTENTION_WORDS if attention else ""), class_="caption"
    ),
    tag(
      "div",
      _list(facts) if len(facts) > 1 else None,
      *articles,
      _panel(),
      class_="heatmaps",
      data_colours=json.dumps(
        {name: _base64(_colours(name).tobytes()) for name in _COLOURS}
      ),
    ),
  ]


def _list(slides: Sequence[tuple[str, Mapping[str, str | float]]]) -> Html:
  columns = list(dict.fromkeys(key for _, facts in slides for key in facts))
  rows = [
    [
      tag("a", _name(name), href=f"#heatmap-{i}"),
      *(
        _fact(facts[key]) if key in facts else tables.ABSENT for key in columns
      ),
    ]
    for i, (name, facts) in enumerate(slides, 1)
  ]
  header = ["slide", *map(_name, columns)]
  caption = f"{len(rows):,} slides. Choose one to look at it."
  return tag("div", tables.table(caption, header, rows), class_="slide-list")


def _name(text: str) -> str:
  return tables.shorten(files.visible(text))


def _fact(value: str | float) -> str:
  return _name(value) if isinstance(value, str) else tables.score(value)


def _article(view: View, anchor: str) -> Html:
  label = next(iter(view.scores))
  known = [f"{_name(key)} {_fact(value)}" for key, value in view.facts.items()]
  count = len(view.coords)
  tiles = f"{count:,} {'tile' if count == 1 else 'tiles'}"
  title = [_name(view.title)] if view.title else []
  frame = _Frame.of(view)
  return tag(
    "article",
    tag("h3", _name(view.name)),
    tag("p", " · ".join([*title, *known, tiles]), class_="facts"),
    tag(
      "div",
      tag(
        "div",
        _layer(view, frame, label),
        class_="stage",
      ),
      tag("div", _key(label), class_="side"),
      class_="view",
    ),
    _tiles(view, f"Highest {_name(label)}", view.most, anchor),
    _tiles(view, f"Lowest {_name(label)}", view.least, anchor),
    class_="slide",
    id=anchor,
    data_view=json.dumps(_data(view, frame)),
  )


@dataclasses.dataclass(frozen=True)
class _Frame:
  """What is drawn, in pixels of level 0."""

  left: float
  top: float
  width: float
  height: float

  @classmethod
  def of(cls, view: View) -> "_Frame":
    """Returns the picture's, or without one what holds all tiles."""
    if view.picture is not None:
      height, width = view.picture.shape[:2]
      return cls(0, 0, width * view.scale, height * view.scale)
    if not len(view.coords):
      return cls(0, 0, 1, 1)
    (left, top), (right, bottom) = view.coords.min(0), view.coords.max(0)
    edge = view.extent  # a tile's width of nothing around them
    return cls(
      float(left - edge),
      float(top - edge),
      float(right - left + 3 * edge),
      float(bottom - top + 3 * edge),
    )


def _layer(view: View, frame: _Frame, label: str) -> Html:
  name = _name(view.name)
  over = f"Percentiles of {_name(label)} over the tiles of slide {name}"
  picture = None
  if view.picture is not None:
    picture = tag(
      "img",
      src=gallery.data_uri(view.picture, _LONGEST, _QUALITY),
      alt=f"Slide {name}",
      class_="tissue",
    )
  return tag(
    "div",
    picture,
    tag("img", src=_overlay(view, frame, label), alt=over, class_="scores"),
    _scale_bar(view, frame),
    class_="layer grey" if picture else "layer bare",
    style=f"--aspect: {frame.width / frame.height:.5g}",
  )


def _overlay(view: View, frame: _Frame, label: str) -> str:
  """Returns the percentiles as a PNG, clear where there is no tile."""
  ratio = min(
    _RASTER / max(frame.width, frame.height),
    # A tile of more pixels shows no more.
    16 / view.extent,
  )
  shape = (
    max(1, round(frame.height * ratio)),
    max(1, round(frame.width * ratio)),
  )
  corners = (view.coords - [frame.left, frame.top]) * ratio
  owner = owners(corners, _side(view) * ratio, shape)
  levels = _levels(tile_scores.percentiles(view.shown[label]))
  # An owner of -1 takes the last: no tile.
  image = Image.fromarray(np.append(levels + 1, 0).astype(np.uint8)[owner])
  image.putpalette(bytes(3) + _colours("sequential").tobytes())
  data = io.BytesIO()
  image.save(data, "PNG", transparency=0, optimize=True)
  return f"data:image/png;base64,{_base64(data.getvalue())}"


def _side(view: View) -> float:
  """Returns the side at which tiles that adjoin leave no pixel between them.

  Where it is no whole number, corners are rounded to one.
  """
  extent = float(view.extent)
  return extent if extent.is_integer() else extent + 1


def _levels(positions: np.ndarray) -> np.ndarray:
  """Returns which colour stands for a position from 0 to 1, as the script."""
  return np.floor((_LEVELS - 1) * positions + 0.5).astype(np.int64)


@functools.cache
def _colours(name: str) -> np.ndarray:
  """Returns (`_LEVELS`, 3) uint8."""
  table = matplotlib.colormaps[_COLOURS[name]].resampled(_LEVELS)
  return np.round(255 * table(np.arange(_LEVELS))[:, :3]).astype(np.uint8)


def _scale_bar(view: View, frame: _Frame) -> Html | None:
  if not view.mpp or not math.isfinite(view.mpp):
    return None
  whole = frame.width * view.mpp
  power = 10 ** math.floor(math.log10(whole / 4))
  length = max(f * power for f in (1, 2, 5) if f * power <= whole / 4)
  words = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
  width = f"width: {100 * length / whole:.3f}%"
  return tag("div", tag("span", words), class_="scale-bar", style=width)


def _key(label: str) -> Html:
  stops = _colours("sequential")[:: (_LEVELS - 1) // 10]
  ramp = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in stops)
  return tag(
    "div",
    tag("b", f"{_name(label)}, percentile in this slide"),
    tag(
      "div", class_="ramp", style=f"background: linear-gradient(90deg,{ramp})"
    ),
    tag("div", *(tag("span", f"{p} %") for p in (0, 50, 100)), class_="ticks"),
    class_="key",
  )


def _tiles(
  view: View,
  heading: str,
  tiles: Sequence[tuple[int, np.ndarray]],
  anchor: str,
) -> Html | None:
  if not tiles:
    return None
  values = next(iter(view.shown.values()))
  items = [
    tag(
      "li",
      tag(
        "a",
        tag(
          "img",
          src=gallery.data_uri(pixels, _TILE),
          alt=f"Tile at {x:,}, {y:,}",
        ),
        tag("b", number(float(values[i]))),
        tag("span", f"{x:,}, {y:,}", class_="minor"),
        href=f"#{anchor}",
        data_tile=int(i),
      ),
    )
    for i, pixels in tiles
    for x, y in [view.coords[i].tolist()]
  ]
  return join(tag("h4", heading), tag("ul", *items, class_="gallery tiles"))


def number(value: float) -> str:
  """Returns a score with three digits, without an exponent, as the script."""
  if 0 < abs(value) < 0.001:
    return "<0.001" if value > 0 else ">−0.001"
  rounded = float(f"{value:.3g}")
  text = f"{rounded:,.6f}".rstrip("0").rstrip(".")
  return text.replace("-", "−")


def _data(view: View, frame: _Frame) -> dict[str, Any]:
  return {
    **dataclasses.asdict(frame),
    "count": len(view.coords),
    "extent": float(view.extent),
    "side": _side(view),
    # Neighbours differ by the same steps, which take no space.
    "coords": _packed(np.diff(view.coords, axis=0, prepend=0).T, "<i4"),
    "scores": [
      {
        "label": _name(label),
        "kind": tile_scores.kind(label),
        "values": _packed(values, "<f4"),
      }
      for label, values in view.shown.items()
    ],
  }


def _packed(array: np.ndarray, dtype: str) -> str:
  return _base64(zlib.compress(np.ascontiguousarray(array, dtype).tobytes(), 9))


def _base64(data: bytes) -> str:
  return base64.b64encode(data).decode("ascii")


def _panel() -> Html:
  """Returns what the script shows beside a slide."""

  def slider(name: str, words: str, **limits: str | int) -> Html:
    return tag(
      "label",
      tag("span", words, " ", tag("output", class_=name)),
      tag("input", type="range", name=name, autocomplete="off", **limits),
      class_="slider",
    )

  scales = [
    tag(
      "label",
      tag("input", type="radio", name="scale", value=value, **checked),
      words,
    )
    for value, words, checked in (
      ("percentile", "percentile", {"checked": "checked"}),
      ("raw", "raw", {}),
    )
  ]
  panel = tag(
    "form",
    tag("label", "Score ", tag("select", name="score"), class_="score"),
    tag("fieldset", tag("legend", "Scale"), *scales),
    tag(
      "div",
      tag("b", class_="bar-title", id="heatmap-bar-title"),
      tag("canvas", class_="histogram", aria_hidden="true"),
      tag("canvas", class_="ramp", role="img"),
      tag("div", class_="ticks"),
      slider("threshold", "Hide below", min=0, max=1000, value=0),
      tag("p", class_="counted minor"),
      class_="bar",
    ),
    slider("opacity", "Opacity", min=0, max=100, step=5, value=_OPACITY),
    slider("zoom", "Zoom", min=1, max=8, step="0.5", value=1),
    tag(
      "label",
      tag("input", type="checkbox", name="grey", checked="checked"),
      "Tissue in grey",
    ),
    autocomplete="off",
    aria_label="How the scores are shown",
  )
  readout = tag(
    "div",
    tag("p", "Point at a tile, or move with the arrow keys.", class_="hint"),
    tag("div", class_="tile"),
    class_="readout",
  )
  keys = (
    "In the picture: arrow keys move from tile to tile, Home and End go to the"
    " highest and the lowest score, Page Up and Page Down one rank up and down,"
    " + and − zoom, Escape leaves the tile."
  )
  return tag(
    "template",
    tag("div", panel, readout, class_="panel"),
    tag("p", keys, class_="minor keys", id="heatmap-keys"),
    tag("p", class_="said", aria_live="polite"),
  )
