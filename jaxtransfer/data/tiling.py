"""A slide cut into a grid of tiles: where they are, and which are kept.

The grid begins at the slide's corner, whatever the tissue, so that two maskings
of a slide give the same tiles. A tile is `tile` pixels of `mpp` micrometres,
and lies wholly in the slide. Its corner is the nearest pixel of level 0 to its
place in the grid: each is rounded alone, so that errors do not add up, and what
is read later is what the rounded corner says (`slides.Slide.region`).
"""

import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from jaxtransfer.data import segmentation, slides

# A mask's pixels are this much smaller than a tile, at least.
_FINER = 8
# Beyond this a tile is larger than what there is to see.
_ENLARGED = 1.01
# Around the tiles, and around the tissue.
_TILES, _TISSUE = (0, 90, 160), (0, 158, 115)


@dataclasses.dataclass(frozen=True)
class Grid:
  """How a slide is cut.

  Attributes:
    tile: side of a tile in its own pixels.
    mpp: micrometres of one of them.
    overlap: of its pixels that it shares with its neighbour.
    min_tissue: least share of a tile that is tissue, 0 to 1; at 0 any will do.
  """

  tile: int
  mpp: float
  overlap: int = 0
  min_tissue: float = 0.25

  def extent(self, slide_mpp: float) -> float:
    """Returns the side of a tile in pixels of level 0.

    Args:
      slide_mpp: micrometres of one of these.
    """
    return self.tile * self.mpp / slide_mpp

  def corners(self, width: int, height: int, slide_mpp: float) -> np.ndarray:
    """Returns the top left corners of all tiles in a slide, row by row.

    Args:
      width: pixels of level 0.
      height: likewise.
      slide_mpp: micrometres of one.

    Returns:
      (N, 2) int64, x and y in pixels of level 0.
    """
    extent = self.extent(slide_mpp)
    step = extent * (self.tile - self.overlap) / self.tile
    x, y = (self._places(side, extent, step) for side in (width, height))
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)

  @staticmethod
  def _places(side: int, extent: float, step: float) -> np.ndarray:
    # A tile that would end outside by rounding alone is inside.
    count = int((side - extent) / step + 1e-6) + 1 if side >= extent else 0
    return np.rint(np.arange(count) * step).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Tiled:
  """A slide that was cut.

  Attributes:
    coords: (N, 2) int64, top left corners of the tiles kept, level-0 pixels.
    extent: side of a tile, likewise.
    tissue: (N,) float64, the share of each that is tissue.
    mask: (H, W) bool, where tissue is.
    picture: (h, w, 3) uint8, the slide made small, at least as large.
    scales: level-0 pixels in one of the mask's, along x and y.
    area: tissue, mm2.
    notes: what a user should know, a line each.
  """

  coords: np.ndarray
  extent: float
  tissue: np.ndarray
  mask: np.ndarray
  picture: np.ndarray
  scales: tuple[float, float]
  area: float
  notes: Sequence[str] = ()

  def polygons(self) -> list[segmentation.Polygon]:
    """Returns the outlines of the tissue, in pixels of level 0."""
    return segmentation.polygons_of(self.mask, self.scales)


def cut(
  slide: slides.Slide,
  grid: Grid,
  settings: segmentation.Settings,
  mask_mpp: float,
  mask: pathlib.Path | None = None,
  shown: int = 0,
) -> Tiled:
  """Finds a slide's tissue and the tiles that lie on it.

  Args:
    slide: it; its `mpp` is known.
    grid: the tiles.
    settings: how tissue is found by colour.
    mask_mpp: micrometres of a pixel in which it is looked for; finer where
      tiles are small.
    mask: what says where tissue is, an image or GeoJSON; None = colour.
    shown: pixels that the longer side of the picture has at least, where the
      slide has as many.

  Raises:
    SlideError: the slide cannot be read, or says no resolution.
    MaskError: the mask cannot be used.
  """
  if slide.mpp is None:
    raise slides.SlideError(
      f"{slide.why_no_mpp}; give config.default_mpp, or a manifest with a"
      " column mpp"
    )
  notes = []
  if (ratio := slide.mpp / grid.mpp) > _ENLARGED:
    notes.append(
      f"its finest pixels are {slide.mpp:.4g} um and {grid.mpp:.4g} are asked"
      f" for: tiles are enlarged {ratio:.2g} times"
    )
  fine = min(mask_mpp, grid.tile * grid.mpp / _FINER)
  sides = slide.width, slide.height
  longest = max(1, round(max(sides) * min(1.0, slide.mpp / fine)))
  picture = _picture(slide, longest, min(shown, max(sides)))
  share = longest / max(sides)
  width, height = (max(1, round(share * side)) for side in sides)
  scales = sides[0] / width, sides[1] / height
  if mask is None:
    small = Image.fromarray(picture).resize(
      (width, height), Image.Resampling.BILINEAR
    )
    found, about = segmentation.segment(
      np.asarray(small), slide.mpp * max(scales), settings
    )
    notes += about
  else:
    found = segmentation.read_mask(mask, sides, (width, height))
  if not found.any():
    notes.append("no tissue")
  extent = grid.extent(slide.mpp)
  coords = grid.corners(*sides, slide.mpp)
  tissue = shares(found, scales, coords, extent)
  # A share that misses by rounding alone is there.
  kept = (tissue > 0) & (tissue >= grid.min_tissue - 1e-9)
  if found.any() and not kept.any():
    notes.append(
      f"none of {len(coords):,} tiles of {grid.tile * grid.mpp:.4g} um has"
      f" {grid.min_tissue:.0%} tissue"
      if len(coords)
      else f"it is smaller than a tile of {grid.tile * grid.mpp:.4g} um"
    )
  area = float(found.mean()) * sides[0] * sides[1] * (slide.mpp / 1e3) ** 2
  return Tiled(
    coords[kept], extent, tissue[kept], found, picture, scales, area, notes
  )


def _picture(slide: slides.Slide, longest: int, shown: int) -> np.ndarray:
  """Returns a slide made small, and smaller where its fine pixels are damaged.

  A slide without small levels is decoded for it, and so is not twice.
  """
  if shown > longest:
    with contextlib.suppress(slides.SlideError):
      return slide.thumbnail(shown)
  return slide.thumbnail(longest)


def shares(
  mask: np.ndarray,
  scales: tuple[float, float],
  coords: np.ndarray,
  extent: float,
) -> np.ndarray:
  """Returns how much of each tile a mask covers, parts of pixels included.

  Args:
    mask: (H, W) bool.
    scales: level-0 pixels in one of its own, along x and y.
    coords: (N, 2) top left corners, level-0 pixels.
    extent: side of a tile, likewise.

  Returns:
    (N,) float64, 0 to 1; of a tile that ends outside of the mask a part is
    not covered.
  """
  height, width = mask.shape
  sums = np.zeros((height + 1, width + 1))
  sums[1:, 1:] = np.cumsum(np.cumsum(mask, 0, dtype=np.int64), 1)

  def until(corners: np.ndarray) -> np.ndarray:
    # Sums up to a fraction of a pixel are linear in it, along either side.
    x = np.clip(corners[:, 0] / scales[0], 0, width)
    y = np.clip(corners[:, 1] / scales[1], 0, height)
    left = np.minimum(x.astype(int), width - 1)
    top = np.minimum(y.astype(int), height - 1)
    x, y = x - left, y - top
    upper = sums[top, left] * (1 - x) + sums[top, left + 1] * x
    lower = sums[top + 1, left] * (1 - x) + sums[top + 1, left + 1] * x
    return upper * (1 - y) + lower * y

  right, down = np.array([extent, 0]), np.array([0, extent])
  covered = until(coords + right + down) - until(coords + right)
  covered += until(coords) - until(coords + down)
  return covered * scales[0] * scales[1] / extent**2


def each_tile(
  open_slide: Callable[[], slides.Slide],
  tiled: Tiled,
  size: int,
  look: Callable[[np.ndarray, int], bool],
  readers: int,
) -> list[bool | str]:
  """Reads all tiles of a slide, in threads that have a handle each.

  Args:
    open_slide: opens it.
    tiled: the tiles.
    size: of each, pixels.
    look: does something with a tile, (size, size, 3) uint8, and its number.
    readers: how many threads.

  Returns:
    What `look` returned for each, or why it cannot be read.
  """
  coords = tiled.coords.tolist()
  found: list[bool | str] = [""] * len(coords)
  stopped = threading.Event()

  def read(tiles: Sequence[int]) -> None:
    with open_slide() as slide:
      for i in tiles:
        if stopped.is_set():
          return
        x, y = coords[i]
        try:
          found[i] = look(slide.region(x, y, tiled.extent, size), i)
        except slides.SlideError as e:
          found[i] = str(e)

  # Neighbours are read by one, who has decoded what they share.
  parts = [p for p in np.array_split(np.arange(len(coords)), readers) if len(p)]
  with futures.ThreadPoolExecutor(readers) as pool:
    try:
      for done in [pool.submit(read, part.tolist()) for part in parts]:
        done.result()
    finally:
      stopped.set()
  return found


def sharpness(pixels: np.ndarray) -> float:
  """Returns the variance of an image's Laplacian: small where it is blurred.

  Args:
    pixels: (H, W, 3) uint8.

  Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy",
    ICPR 2000; the kernel is the four neighbours less four times the pixel.
  """
  grey = pixels @ np.array([0.299, 0.587, 0.114])
  return float(ndimage.laplace(grey, mode="nearest").var())


def overlay(slide: tuple[int, int], tiled: Tiled, longest: int) -> np.ndarray:
  """Draws the outline of the tissue and the tiles over a slide.

  Args:
    slide: width and height of level 0.
    tiled: what was found on it.
    longest: pixels of the longer side, at most.

  Returns:
    (H, W, 3) uint8.
  """
  image = Image.fromarray(tiled.picture)
  image.thumbnail((longest, longest))
  draw = ImageDraw.Draw(image)
  scales = np.array(image.size) / slide
  # Thick enough to be seen where the picture is made smaller again, and thin
  # beside the tiles.
  width = max(2, round(max(image.size) / 400))
  line = int(np.clip(tiled.extent * scales[0] / 30, 1, width))
  for start in tiled.coords * scales:
    end = np.maximum(start, start + tiled.extent * scales)
    corners = [*start.tolist(), *end.tolist()]
    draw.rectangle(corners, outline=_TILES, width=line)
  for polygon in tiled.polygons():
    for ring in (polygon.outer, *polygon.holes):
      corners = np.vstack([ring, ring[:1]]) * scales
      draw.line(corners.ravel().tolist(), _TISSUE, width, "curve")
  return np.asarray(image)
