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
    max_pixels: of a picture that can only be decoded whole.
    coords: (n, 2) int64, top left corners, level-0 pixels.
    extent: side of a tile in level-0 pixels.
  """

  path: str
  max_pixels: int
  coords: np.ndarray
  extent: float


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
      slide = self._open.slide(piece.path, piece.max_pixels)
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
    self._slides: dict[str, slides.Slide] = {}

  def slide(self, path: str, max_pixels: int) -> slides.Slide:
    """Returns a slide, opened unless it is.

    Raises:
      SlideError: it cannot be used.
    """
    slide = self._slides.pop(path, None)
    slide = slide or slides.open_slide(path, max_pixels=max_pixels)
    self._slides[path] = slide
    while len(self._slides) > _OPEN:
      self._slides.pop(next(iter(self._slides))).close()
    return slide


def pieces(tiles: np.ndarray) -> Iterator[np.ndarray]:
  """Yields tiles in the numbers in which one reader reads them.

  Args:
    tiles: (n,).
  """
  for start in range(0, len(tiles), PIECE):
    yield tiles[start : start + PIECE]
