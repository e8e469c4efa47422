"""Pieces of slides and of images, as one reader reads them.

A reading process imports this module and what the source needs, not JAX.
"""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer.data import images, slides, sources

# Tiles that are read together: neighbours, of which a slide's file keeps more
# than one in a block.
PIECE = 16
# Two statements of one resolution differ by rounding alone.
SAME = 0.02
# Slides that a reader keeps open: the one that ends and the one that begins.
_OPEN = 2


class Read(NamedTuple):
  """What came of a piece.

  Attributes:
    pixels: (n, S, S, 3) uint8, black where a tile could not be read.
    reasons: why not, for each of n; "" where it could.
    broken: why nothing of the bag can be read; "" where it can.
  """

  pixels: np.ndarray
  reasons: list[str]
  broken: str = ""


@dataclasses.dataclass(frozen=True)
class Regions:
  """Tiles of one slide, as a reader is asked for them.

  Attributes:
    path: of the slide.
    mpp: micrometres per level-0 pixel that hold in place of the file's.
    coords: (n, 2) int64, top left corners, level-0 pixels.
    extent: side of a tile in level-0 pixels.
    width: of the slide that the coords are of; None = not said.
    height: likewise.
    level0_mpp: likewise.
  """

  path: str
  mpp: float | None
  coords: np.ndarray
  extent: float
  width: int | None
  height: int | None
  level0_mpp: float | None


class Reader:
  """Reads pieces; each thread and each process with handles of its own.

  Args:
    size: side in pixels that every tile comes out with.
    examples: of which a piece is rows; None where pieces are `Regions`.
  """

  def __init__(self, size: int, examples: sources.Examples | None = None):
    self.size = size
    self._examples = examples
    self._open = _Handles()

  def __reduce__(self) -> tuple[Any, ...]:
    return Reader, (self.size, self._examples)

  def __getitem__(self, piece: Regions | Sequence[int]) -> Read:
    if isinstance(piece, Regions):
      return self._regions(piece)
    pixels = self._black(len(piece))
    reasons = [self._image(pixels[i], row) for i, row in enumerate(piece)]
    return Read(pixels, reasons)

  def _black(self, count: int) -> np.ndarray:
    return np.zeros((count, self.size, self.size, 3), np.uint8)

  def _image(self, pixels: np.ndarray, row: int) -> str:
    assert self._examples is not None
    try:
      pixels[:] = images.fit(self._examples.read(row), self.size)
    except images.ImageError as e:
      return str(e)
    return ""

  def _regions(self, piece: Regions) -> Read:
    pixels = self._black(len(piece.coords))
    try:
      slide = self._open.slide(piece.path, piece.mpp)
      _check(slide, piece)
    except slides.SlideError as e:
      return Read(pixels, [""] * len(pixels), str(e))
    reasons = [""] * len(pixels)
    for i, (x, y) in enumerate(piece.coords.tolist()):
      try:
        pixels[i] = slide.region(x, y, piece.extent, self.size)
      except slides.SlideError as e:
        reasons[i] = str(e)
    return Read(pixels, reasons)


class _Handles(threading.local):
  """The slides that a thread has open, those that it used last."""

  def __init__(self):
    self._slides: dict[tuple[str, float | None], slides.Slide] = {}

  def slide(self, path: str, mpp: float | None) -> slides.Slide:
    """Returns a slide, opened unless it is.

    Raises:
      SlideError: it cannot be used.
    """
    key = path, mpp
    slide = self._slides.pop(key, None) or slides.open_slide(path, mpp)
    self._slides[key] = slide
    while len(self._slides) > _OPEN:
      self._slides.pop(next(iter(self._slides))).close()
    return slide


def _check(slide: slides.Slide, piece: Regions) -> None:
  """Refuses coordinates of another slide, or of another of its levels.

  Raises:
    SlideError: they are.
  """
  size = slide.width, slide.height
  said = piece.width, piece.height
  if None not in said and said != size:
    raise slides.SlideError(
      f"its coords are of a slide of {said[0]} x {said[1]} pixels, but it has"
      f" {size[0]} x {size[1]}: of another slide or level; tile it again"
    )
  if slide.mpp and piece.level0_mpp:
    ratio = piece.level0_mpp / slide.mpp
    if abs(ratio - 1) > SAME:
      raise slides.SlideError(
        f"its coords are of {piece.level0_mpp:.4g} um/px at level 0, but it has"
        f" {slide.mpp:.4g}; tile it again"
      )
  outside = (piece.coords >= size) | (piece.coords <= -piece.extent)
  if outside.any():
    x, y = piece.coords[outside.any(1)][0]
    raise slides.SlideError(
      f"a tile at ({x}, {y}) lies outside of its {size[0]} x {size[1]} pixels:"
      " coords of another slide, or of another level than 0"
    )


def pieces(tiles: np.ndarray) -> Iterator[np.ndarray]:
  """Yields tiles in the numbers in which one reader reads them.

  Args:
    tiles: (n,).
  """
  for start in range(0, len(tiles), PIECE):
    yield tiles[start : start + PIECE]
