"""Where a slide has tissue: found by colour, or given as a mask or GeoJSON.

Tissue is stained and the background is not, so that a threshold on saturation
divides them. What is found is smoothed, small pieces are left out and small
holes filled. As QuPath's GeoJSON it can be looked at, edited and given back.

Source: Otsu 1979, and the steps of CLAM's segmentation (median filter,
  threshold of saturation, closing, areas of pieces and holes), with lengths in
  micrometres in place of pixels of a level.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import contourpy
import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from jaxtransfer import files
from jaxtransfer.data import images

# Whatever Otsu says, of 255: below is the noise of a white background, as on a
# slide with nothing on it, above is stain, as on a slide with nothing else.
LEAST, MOST = 10, 40
# A darker pixel has no colour to speak of.
_BLACK = 50
# A slide with more of these than that is no stain on white.
_DARK = 0.5
# Ink takes more from red than from green; hematoxylin and eosin from green.
_INK = 12
_GEOJSON = (".geojson", ".json")
# What a mask gives of QuPath is what is in these, without those of a class
# whose name ends so: QuPath ignores them too.
_IGNORED = "*"


class MaskError(Exception):
  """A mask that cannot be used; its message is the reason, one line."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How tissue is found.

  Attributes:
    threshold: least saturation of tissue, 1 to 255; 0 = Otsu's.
    median: side of the median filter, um.
    closing: gaps narrower than twice this are closed, um.
    min_area: smaller pieces are left out, mm2.
    max_hole: smaller holes are filled, mm2.
    pen: whether what has the colours of ink is no tissue.
  """

  threshold: int = 0
  median: float = 24.0
  closing: float = 24.0
  min_area: float = 0.02
  max_hole: float = 0.01
  pen: bool = False


@dataclasses.dataclass(frozen=True)
class Polygon:
  """A region, in pixels of level 0.

  Attributes:
    outer: (N, 2) float64, x and y of its corners, not closed.
    holes: what of it is not meant, likewise.
  """

  outer: np.ndarray
  holes: Sequence[np.ndarray] = ()


# --- by colour ---------------------------------------------------------------


def saturation(pixels: np.ndarray) -> np.ndarray:
  """Returns the saturation of HSV, 0 where a pixel is nearly black.

  Args:
    pixels: (H, W, 3) uint8.

  Returns:
    (H, W) uint8.
  """
  brightest = pixels.max(-1)
  spread = brightest - pixels.min(-1)
  scaled = spread.astype(np.float32) * 255 / np.maximum(brightest, 1)
  return np.where(brightest < _BLACK, 0, np.rint(scaled)).astype(np.uint8)


def otsu(values: np.ndarray) -> int:
  """Returns the threshold that divides values best: those above it are more.

  Args:
    values: uint8, any shape.

  Source: Otsu, "A threshold selection method from gray-level histograms", 1979:
    the greatest variance between the two classes; of equal ones the lowest.
  """
  counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
  below = np.cumsum(counts)
  sums = np.cumsum(counts * np.arange(256))
  above = below[-1] - below
  with np.errstate(divide="ignore", invalid="ignore"):
    difference = sums / below - (sums[-1] - sums) / above
    between = np.nan_to_num(below * above * difference**2)
  return int(between.argmax())


def segment(
  pixels: np.ndarray, mpp: float, settings: Settings = Settings()
) -> tuple[np.ndarray, list[str]]:
  """Finds tissue by its colour.

  Args:
    pixels: (H, W, 3) uint8, a slide made small.
    mpp: micrometres of one of its pixels.
    settings: how.

  Returns:
    (H, W) bool, and what a user should know of it, a line each.
  """
  notes = []
  colours = saturation(pixels)
  dark = float((pixels.max(-1) < _BLACK).mean())
  if dark > _DARK:
    notes.append(
      f"{dark:.0%} of it is nearly black, as in fluorescence, where tissue is"
      " not found by colour: give a mask"
    )
  side = max(1, 2 * round(settings.median / mpp / 2 - 0.5) + 1)
  smooth = np.asarray(
    Image.fromarray(colours).filter(ImageFilter.MedianFilter(side))
  )
  least = settings.threshold or min(max(otsu(smooth), LEAST), MOST)
  mask = smooth > least
  if settings.pen:
    mask &= ~ink(pixels)
  radius = round(settings.closing / mpp)
  if radius:
    mask = _closed(mask, radius)
  # Square millimetres of one pixel.
  area = (mpp / 1e3) ** 2
  mask = without_small(mask, settings.min_area / area)
  holes = ~mask
  kept = without_small(holes, settings.max_hole / area)
  return mask | (holes & ~kept), notes


def ink(pixels: np.ndarray) -> np.ndarray:
  """Returns where a slide is marked by a blue, green or black pen.

  Hematoxylin and eosin take more from green than from red; such ink does the
  other way round, or takes all. Red ink has the colours of eosin and is not
  found.

  Args:
    pixels: (H, W, 3) uint8.

  Returns:
    (H, W) bool, with a margin of one pixel for the pen's soft edge.
  """
  red, green = pixels[..., 0].astype(np.int16), pixels[..., 1].astype(np.int16)
  found = (green - red >= _INK) | (pixels.max(-1) < _BLACK)
  # Single pixels are no pen's.
  found = ndimage.binary_opening(found, np.ones((2, 2), bool))
  return ndimage.binary_dilation(found, np.ones((3, 3), bool))


def _closed(mask: np.ndarray, radius: int) -> np.ndarray:
  """Closes gaps with a disk; the border is no background."""
  y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
  disk = x * x + y * y <= radius * radius
  padded = np.pad(mask, radius, mode="edge")
  closed = ndimage.binary_closing(padded, disk)
  inside = slice(radius, -radius)
  return closed[inside, inside] | mask


def without_small(mask: np.ndarray, least: float) -> np.ndarray:
  """Returns a mask without its pieces of fewer pixels.

  Args:
    mask: (H, W) bool.
    least: pixels that a piece has at least; those that meet at a side belong
      together.
  """
  pieces, count = ndimage.label(mask)
  sizes = np.bincount(pieces.ravel(), minlength=count + 1)
  kept = sizes >= least
  kept[0] = False
  return kept[pieces]


# --- polygons ----------------------------------------------------------------


def polygons_of(mask: np.ndarray, scales: tuple[float, float]) -> list[Polygon]:
  """Returns the outlines of a mask, the largest region first.

  They run between pixels, so that `rasterise` makes the same mask of them.

  Args:
    mask: (H, W) bool.
    scales: pixels of level 0 in one of the mask's, along x and y.
  """
  padded = np.pad(mask, 1).astype(np.float64)
  generator = contourpy.contour_generator(
    z=padded, fill_type=contourpy.FillType.OuterOffset
  )
  found = []
  for points, offsets in zip(*generator.filled(0.5, math.inf), strict=True):
    # From centres of pixels with a border to corners without.
    places = (points - 0.5) * scales
    rings = [
      _without_straight(places[start : end - 1])
      for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    found.append(Polygon(rings[0], tuple(rings[1:])))
  return sorted(found, key=lambda polygon: -_area(polygon.outer))


def _without_straight(ring: np.ndarray) -> np.ndarray:
  """Leaves out the points of a ring at which it does not turn."""
  before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
  cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
  return ring[np.abs(cross) > 1e-9 * np.abs(ring).max()]


def _area(ring: np.ndarray) -> float:
  """Returns the area in a ring, by the shoelace formula."""
  x, y = ring.T
  return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def rasterise(
  polygons: Sequence[Polygon],
  size: tuple[int, int],
  scales: tuple[float, float],
) -> np.ndarray:
  """Returns the mask of what lies in any of some regions.

  A pixel is in it if its centre is.

  Args:
    polygons: in pixels of level 0.
    size: width and height of the mask.
    scales: pixels of level 0 in one of the mask's, along x and y.

  Returns:
    (height, width) bool.
  """
  width, height = size
  mask = np.zeros((height, width), bool)
  for polygon in polygons:
    rings = [ring / scales for ring in (polygon.outer, *polygon.holes)]
    corners = np.concatenate(rings)
    low = np.clip(np.floor(corners.min(0)), 0, (width, height)).astype(int)
    high = np.clip(np.ceil(corners.max(0)), 0, (width, height)).astype(int)
    if (high > low).all():
      inside = slice(low[1], high[1]), slice(low[0], high[0])
      mask[inside] |= _filled([ring - low for ring in rings], *(high - low))
  return mask


def _filled(rings: Sequence[np.ndarray], width: int, height: int) -> np.ndarray:
  """Fills by the even-odd rule: a pixel right of an odd number of edges."""
  start = np.concatenate(rings)
  end = np.concatenate([np.roll(ring, -1, 0) for ring in rings])
  upward = start[:, 1] > end[:, 1]
  start[upward], end[upward] = end[upward], start[upward]
  # An edge meets the rows whose centres it passes, from its first to its last.
  first = np.clip(np.ceil(start[:, 1] - 0.5), 0, height).astype(int)
  last = np.clip(np.ceil(end[:, 1] - 0.5), 0, height).astype(int)
  counts = last - first
  edges = np.repeat(np.arange(len(start)), counts)
  nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
  rows = first[edges] + nth
  (x, y), (dx, dy) = start[edges].T, (end - start)[edges].T
  crossings = x + (rows + 0.5 - y) * dx / dy
  columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
  crossed = np.zeros((height, width + 1), np.int32)
  np.add.at(crossed, (rows, columns), 1)
  return np.cumsum(crossed, 1)[:, :width] % 2 == 1


# --- files -------------------------------------------------------------------


def write_geojson(
  path: str | os.PathLike[str], polygons: Sequence[Polygon]
) -> None:
  """Writes regions of tissue as QuPath opens them: drop the file on the slide.

  Args:
    path: the file, which appears whole or not at all.
    polygons: in pixels of level 0, each an annotation of the class Tissue.
  """
  features = [
    {
      "type": "Feature",
      "geometry": {
        "type": "Polygon",
        "coordinates": [
          np.vstack([ring, ring[:1]]).round(2).tolist()
          for ring in (polygon.outer, *polygon.holes)
        ],
      },
      "properties": {
        "objectType": "annotation",
        "classification": {"name": "Tissue", "color": [0, 158, 115]},
      },
    }
    for polygon in polygons
  ]
  collection = {"type": "FeatureCollection", "features": features}
  # Without blanks: a slide's outline has thousands of corners.
  text = json.dumps(collection, separators=(",", ":"), allow_nan=False)
  files.write_text(path, text + "\n")


def read_geojson(
  path: str | os.PathLike[str],
) -> tuple[list[Polygon], list[Polygon]]:
  """Reads regions that QuPath, or anybody, wrote.

  A FeatureCollection, a list of features, a feature or a geometry, of polygons
  with or without holes; points and lines are passed over. What QuPath
  classifies as `Ignore*`, or as anything else that ends in a star, is not
  tissue.

  Args:
    path: the file.

  Returns:
    What is meant, and what is to be taken out of it.

  Raises:
    MaskError: it is none, or has no region.
  """
  try:
    value = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    meant, ignored = [], []
    for geometry, name in _geometries(value, ""):
      regions = ignored if name.endswith(_IGNORED) else meant
      regions.extend(_polygons(geometry))
  except OSError as e:
    raise MaskError(f"cannot be read: {e.strerror}") from None
  except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
    raise MaskError(f"no GeoJSON of regions: {e}") from None
  if not meant:
    raise MaskError("no region in it: of polygons there is none")
  return meant, ignored


def _geometries(value: Any, name: str) -> Iterator[tuple[dict, str]]:
  """Yields the geometries of anything in GeoJSON, each with its class."""
  if isinstance(value, list):
    for inner in value:
      yield from _geometries(inner, name)
    return
  kind = value["type"]
  if kind == "FeatureCollection":
    yield from _geometries(value["features"], name)
  elif kind == "Feature":
    properties = value.get("properties") or {}
    of = properties.get("classification") or {}
    called = of.get("name") or " ".join(of.get("names") or ())
    if value.get("geometry"):
      yield from _geometries(value["geometry"], called)
  elif kind == "GeometryCollection":
    yield from _geometries(value["geometries"], name)
  else:
    yield value, name


def _polygons(geometry: dict) -> Iterator[Polygon]:
  several = {
    "Polygon": lambda: [geometry["coordinates"]],
    "MultiPolygon": lambda: geometry["coordinates"],
  }
  for rings in several.get(geometry["type"], list)():
    outer, *holes = (_ring(ring) for ring in rings)
    yield Polygon(outer, holes)


def _ring(points: Any) -> np.ndarray:
  ring = np.asarray(points, np.float64)[:, :2]
  if not np.isfinite(ring).all():
    raise ValueError("a corner that is no number")
  return ring[:-1] if len(ring) > 1 and (ring[0] == ring[-1]).all() else ring


def read_mask(
  path: pathlib.Path, slide: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
  """Reads where a slide has tissue.

  Args:
    path: GeoJSON in pixels of level 0, or an image of the whole slide, of any
      size, in which tissue is what is not black.
    slide: width and height of level 0.
    size: width and height of the result.

  Returns:
    (height, width) bool.

  Raises:
    MaskError: it cannot be used, and why.
  """
  scales = slide[0] / size[0], slide[1] / size[1]
  if path.suffix.lower() in _GEOJSON:
    meant, ignored = read_geojson(path)
    mask = rasterise(meant, size, scales)
    if not mask.any():
      raise MaskError(
        f"its regions lie outside of the slide, {slide[0]} x {slide[1]} pixels;"
        " they are to be in pixels of level 0"
      )
    return mask & ~rasterise(ignored, size, scales)
  try:
    pixels = images.decode(path)
  except images.ImageError as e:
    raise MaskError(str(e)) from None
  height, width = pixels.shape[:2]
  if abs(height * slide[0] / slide[1] - width) > max(2.0, 0.01 * width):
    raise MaskError(
      f"its {width} x {height} pixels are of another shape than the slide's"
      f" {slide[0]} x {slide[1]}"
    )
  image = Image.fromarray((pixels.max(-1) > 0).astype(np.uint8) * 255)
  shrunk = image.resize(size, Image.Resampling.BOX)
  return np.asarray(shrunk) >= 128
