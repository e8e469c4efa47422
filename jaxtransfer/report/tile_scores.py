"""What the tiles of a slide scored: checked, ranked, as CSV, for QuPath."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import scipy.stats

from jaxtransfer import files

ATTENTION = "attention"

_BANDS = 10  # of percentiles, as classes in QuPath


@dataclasses.dataclass(frozen=True)
class View:
  """One slide, its tiles and what they scored.

  Attributes:
    name: the slide's.
    coords: (N, 2) int64, x and y of each tile's top left corner in pixels of
      level 0. Only what is a tile is here: no padding.
    extent: a tile's side in pixels of level 0.
    scores: (N,) of each kind, by its label; the first is shown first. Labels
      that begin with `ATTENTION` hold weights as the softmax gives them, whose
      sum over the N tiles is 1; "P(class)" holds probabilities; others hold
      numbers of any range.
    picture: (h, w, 3) uint8 of the whole slide, or None.
    scale: pixels of level 0 in a pixel of the picture.
    mpp: micrometres in a pixel of level 0, where it is known.
    title: what else the slide is called, if anything.
    facts: what is known of the slide in a word or a number each, such as its
      label, the prediction and its probability.
    most: tiles of the highest first score, each its index below N and its
      (h, w, 3) uint8; the highest first.
    least: those of the lowest, likewise; the lowest first.

  Raises:
    ValueError: sizes do not agree, a score is not finite, or weights of
      attention do not sum to 1 over the tiles: they are not these tiles', or
      a probability is none.
  """

  name: str
  coords: np.ndarray
  extent: float
  scores: Mapping[str, np.ndarray]
  picture: np.ndarray | None = None
  scale: float = 1.0
  mpp: float | None = None
  title: str = ""
  facts: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
  most: Sequence[tuple[int, np.ndarray]] = ()
  least: Sequence[tuple[int, np.ndarray]] = ()

  def __post_init__(self):
    count = len(self.coords)
    if np.shape(self.coords) != (count, 2):
      raise ValueError(f"{self.name}: coords are {np.shape(self.coords)}")
    if not self.scores or not self.extent > 0:
      raise ValueError(f"{self.name}: no scores, or no extent")
    for label, values in self.scores.items():
      if np.shape(values) != (count,) or not np.isfinite(values).all():
        raise ValueError(
          f"{self.name}: {label} is not one finite number for each of its"
          f" {count:,} tiles"
        )
      total = float(np.sum(values, dtype=np.float64))
      if kind(label) == "attention" and count and abs(total - 1) > 1e-3:
        raise ValueError(
          f"{self.name}: the weights of {label} sum to {total:.4g} over its"
          f" {count:,} tiles, not to 1"
        )
      if kind(label) == "probability" and not all(
        -1e-6 < f(values, initial=0.5) < 1 + 1e-6 for f in (np.min, np.max)
      ):
        raise ValueError(f"{self.name}: {label} is not from 0 to 1")

  @functools.cached_property
  def shown(self) -> dict[str, np.ndarray]:
    """(N,) float32 by label, as people see them: attention times N."""
    count = len(self.coords)
    return {
      label: (
        np.asarray(values, np.float64)
        * (count if kind(label) == "attention" else 1)
      ).astype(np.float32)
      for label, values in self.scores.items()
    }


def kind(label: str) -> str:
  """Returns what a score of this label is: attention, probability or number."""
  if label.startswith(ATTENTION):
    return "attention"
  return "probability" if label.startswith("P(") else "number"


def percentiles(values: np.ndarray) -> np.ndarray:
  """Returns ranks among all of them, equal ones sharing their mean rank.

  Args:
    values: (N,) finite.

  Returns:
    (N,) float64 in (0, 1].
  """
  return scipy.stats.rankdata(values) / max(1, len(values))


def extremes(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns which tiles are shown as the highest and which as the lowest.

  Args:
    values: (N,) finite.
    count: how many of each; fewer where there are not twice as many tiles, so
      that none is both. Of equal ones the first.

  Returns:
    Indices of the highest, the highest first, and of the lowest, the lowest
    first.
  """
  values = np.asarray(values)
  most = np.argsort(-values, kind="stable")[: min(count, -(-len(values) // 2))]
  order = np.argsort(values, kind="stable")
  return most, order[~np.isin(order, most)][:count]


def write_csv(path: str | os.PathLike[str], view: View) -> None:
  """Writes a slide's scores as CSV, a tile a row, atomically.

  Args:
    path: where.
    view: the slide. Attention is written as it is shown: times the number of
      tiles.
  """
  columns = list(view.shown)
  header = ["slide", "x", "y", "extent"]
  for label in columns:
    header += [label, f"{label}_percentile"]
  files.write_csv(path, files.visible(header), _rows(view))


def _rows(view: View) -> Iterator[list[Any]]:
  name, extent = files.visible(view.name), f"{view.extent:.10g}"
  numbers = _columns(view)
  for (x, y), row in zip(view.coords.tolist(), numbers.tolist(), strict=True):
    yield [name, x, y, extent, *(f"{value:.7g}" for value in row)]


def _columns(view: View) -> np.ndarray:
  """Returns (N, 2 S) float64: each score and its percentile."""
  columns = [
    column
    for values in view.shown.values()
    for column in (values, percentiles(values))
  ]
  return np.stack(columns, axis=1).astype(np.float64)


def write_geojson(path: str | os.PathLike[str], view: View) -> None:
  """Writes a slide's tiles with their scores for QuPath, atomically.

  Every tile is a tile object in pixels of level 0, with its scores and their
  percentiles (0 to 100) as measurements. Its class is the tenth of the first
  score's percentiles that it is in, in that tenth's colour, so that QuPath
  shows the heatmap as soon as the file is dropped on the slide.

  Args:
    path: where; usually `<slide>.geojson`.
    view: the slide. Attention is written as it is shown: times the number of
      tiles.

  Source: QuPath 0.4 and later, `qupath.lib.io.QuPathTypeAdapters`.
  """
  with (
    files.atomic_path(path) as temporary,
    open(temporary, "w", encoding="utf-8") as f,
  ):
    f.write('{"type":"FeatureCollection","features":[')
    for i, feature in enumerate(_features(view)):
      f.write(",\n" if i else "\n")
      f.write(json.dumps(feature, allow_nan=False, separators=(",", ":")))
    f.write("\n]}\n")


def _features(view: View) -> Iterator[dict[str, Any]]:
  names: list[str] = []
  for label in view.shown:
    label = files.visible(label)
    names += [label, f"{label} percentile"]
  numbers = _columns(view)
  bands = np.ceil(_BANDS * numbers[:, 1] - 1e-9).astype(int) - 1
  numbers[:, 1::2] *= 100
  colours = matplotlib.colormaps["viridis"](
    (np.arange(_BANDS) + 0.5) / _BANDS, bytes=True
  )
  # A colon would make it a class within a class.
  first = names[0].replace(":", " ")
  classes = [
    {
      "name": f"{first} {100 * b // _BANDS}-{100 * (b + 1) // _BANDS} %",
      "color": colours[b, :3].tolist(),
    }
    for b in range(_BANDS)
  ]
  for corner, row, band in zip(
    view.coords.tolist(), numbers.tolist(), bands, strict=True
  ):
    left, top = corner
    right, bottom = (round(c + float(view.extent), 3) for c in corner)
    ring = [
      [left, top],
      [right, top],
      [right, bottom],
      [left, bottom],
      [left, top],
    ]
    yield {
      "type": "Feature",
      "geometry": {"type": "Polygon", "coordinates": [ring]},
      "properties": {
        "objectType": "tile",
        "classification": classes[band],
        "measurements": dict(
          zip(names, (float(f"{v:.7g}") for v in row), strict=True)
        ),
      },
    }
