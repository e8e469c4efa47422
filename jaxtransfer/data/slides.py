"""Slides: regions of any resolution out of images too large to decode whole.

OpenSlide reads what scanners write (SVS, NDPI, MRXS, SCN, BIF, CZI, DICOM and
tiled TIFF), tifffile OME-TIFF and the TIFFs that OpenSlide refuses, Pillow
plain pictures. All become the same thing, a `Slide`.

Places are pixels of level 0, the finest, whose first has its top left corner at
(0, 0). A region is cut out of the coarsest level that is as fine as what is
asked for, with a margin, and resampled from its exact place there, fractions of
a pixel included: the square that is asked for is the square that is shown.
"""

import abc
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxtransfer.data import containers, images
from jaxtransfer.errors import UsageError

# Pictures that no scanner writes, but people export.
PICTURE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .webp".split())
SLIDE_SUFFIXES = PICTURE_SUFFIXES | frozenset(
  ".svs .ndpi .mrxs .scn .bif .czi .dcm .svslide .tif .tiff".split()
)
# Micrometres a pixel: an oil objective has 0.05, a slide's overview 16; what a
# printer is told, 72 to 600 dots an inch, is 42 and more.
FINEST, COARSEST = 0.02, 20.0
INSTALL = "pip install 'jaxtransfer[slides]'"

# A level is fine enough that is this much coarser than what is asked for:
# scanners state 0.2522 and people ask for 0.25.
_COARSER = 1.01
# Source pixels that are in memory at once.
_MOST_PIXELS = 1 << 23
# Places closer than this to a whole pixel are there.
_SAME = 1e-4


class SlideError(Exception):
  """A slide or region that cannot be used; its message is the reason."""

  def __init__(self, reason: str):
    super().__init__(" ".join(reason.split()))


@dataclasses.dataclass(frozen=True)
class Level:
  """One resolution of a slide.

  Attributes:
    width: pixels.
    height: pixels.
    downsample: pixels of level 0 that one of its own is wide and high.
    scales: the same along x and along y; they differ only where a level is
      stretched.
  """

  width: int
  height: int
  downsample: float
  scales: tuple[float, float]


class _Box(NamedTuple):
  """A rectangle in pixels of level 0."""

  left: float
  top: float
  right: float
  bottom: float


class _Span:
  """Along one axis of a level: a stretch of it, and the pixels that show it.

  Args:
    start: where it begins, in pixels of the level.
    end: where it ends.
    size: pixels that it is made.

  Attributes:
    first: the first pixel to be read.
    count: how many.
  """

  def __init__(self, start: float, end: float, size: int):
    self.start, self.end = _settled(start), _settled(end)
    # As far as the filter looks beyond; taken as they are, pixels need none.
    margin = math.ceil(max(1.0, (end - start) / size)) + 1
    if self.start.is_integer() and self.end - self.start == size:
      margin = 0
    self.first = math.floor(self.start) - margin
    self.count = math.ceil(self.end) + margin - self.first


class Slide(abc.ABC):
  """An open slide; for one thread, and each process its own.

  It can be pickled: the other process opens it anew.

  Args:
    path: the file.
    mpp: what is to hold, whatever the file says.
    max_pixels: of a picture or a strip that can only be decoded whole.

  Attributes:
    path: the file.
    name: the file's name without its suffix.
    width: of level 0, pixels.
    height: of level 0, pixels.
    mpp: micrometres a pixel of level 0; None where nobody says.
    why_no_mpp: why there is none, in words; "" where there is one.
    levels: the resolutions, the finest first.
    backend: who reads it, "openslide", "tifffile" or "pillow".
    properties: what the file says of itself.
  """

  backend = ""

  def __init__(self, path: pathlib.Path, mpp: float | None, max_pixels: int):
    self.path = path
    self.name = path.stem
    self._given = mpp
    self._max_pixels = max_pixels
    self.properties: dict[str, str] = {}
    self.levels: list[Level] = []
    self.mpp = mpp
    self.why_no_mpp = "" if mpp else "it states no resolution"

  def __repr__(self) -> str:
    return f"<{self.path}: {self.width} x {self.height}, {self.backend}>"

  def __reduce__(self) -> tuple[Any, ...]:
    return open_slide, (self.path, self._given, self._max_pixels)

  def __enter__(self) -> "Slide":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @property
  def width(self) -> int:
    """Pixels of level 0."""
    return self.levels[0].width

  @property
  def height(self) -> int:
    """Pixels of level 0."""
    return self.levels[0].height

  @abc.abstractmethod
  def close(self) -> None:
    """Lets go of the file."""

  @abc.abstractmethod
  def _read(
    self, level: int, left: int, top: int, width: int, height: int
  ) -> tuple[np.ndarray, float, float]:
    """Reads pixels of a level as they are, white outside.

    Returns:
      (height, width, 3) uint8, and the place of their top left corner in the
      level. It may begin less than a pixel before `left` and `top`, and is then
      as much longer and higher.

    Raises:
      SlideError: some of them cannot be read.
    """

  def region(self, x: int, y: int, extent: float, size: int) -> np.ndarray:
    """Reads a square and resamples it: bilinear, antialiased.

    What is shown is the square that is asked for, to less than half a pixel of
    the result: its place in the level that is read is not rounded. Where no
    level is as fine as the result, level 0 is enlarged.

    Args:
      x: of the top left corner, pixels of level 0.
      y: likewise.
      extent: side in pixels of level 0, any fraction.
      size: side of the result in pixels.

    Returns:
      (size, size, 3) uint8; what lies outside of the slide is white.

    Raises:
      SlideError: pixels there cannot be read.
    """
    if not (extent > 0 and size > 0):
      raise ValueError(f"a region of {extent} pixels, made {size}")
    box = _Box(x, y, x + extent, y + extent)
    return self._resampled(box, (size, size))

  def thumbnail(self, longest: int) -> np.ndarray:
    """Returns the whole slide, made small.

    Of a slide without small levels no more than a part is in memory at once.

    Args:
      longest: its longer side, pixels.

    Returns:
      (H, W, 3) uint8.

    Raises:
      SlideError: pixels cannot be read.
    """
    share = longest / max(self.width, self.height)
    width, height = (
      max(1, round(share * n)) for n in (self.width, self.height)
    )
    box = _Box(0, 0, self.width, self.height)
    return self._resampled(box, (width, height))

  def level_for(self, downsample: float) -> int:
    """Returns the coarsest level that is fine enough.

    Args:
      downsample: pixels of level 0 in one of the result; a level that is
        coarser by 1 % is fine enough.
    """
    fine = (level.downsample <= downsample * _COARSER for level in self.levels)
    return max((i for i, is_fine in enumerate(fine) if is_fine), default=0)

  def _resampled(self, box: "_Box", size: tuple[int, int]) -> np.ndarray:
    """Reads a rectangle of level 0 and makes it (width, height) pixels."""
    wanted = min(
      (box.right - box.left) / size[0], (box.bottom - box.top) / size[1]
    )
    number = self.level_for(wanted)
    across, down = self.levels[number].scales
    x = _Span(box.left / across, box.right / across, size[0])
    y = _Span(box.top / down, box.bottom / down, size[1])
    if x.count * y.count > _MOST_PIXELS and max(size) > 1:
      return self._halves(box, size)
    pixels, left, top = self._read(number, x.first, y.first, x.count, y.count)
    if (left, top, pixels.shape[:2]) == (x.start, y.start, size[::-1]):
      return pixels
    resized = Image.fromarray(pixels).resize(
      size,
      Image.Resampling.BILINEAR,
      box=(x.start - left, y.start - top, x.end - left, y.end - top),
    )
    return np.asarray(resized)

  def _halves(self, box: "_Box", size: tuple[int, int]) -> np.ndarray:
    """Reads a rectangle in two, cut between pixels of the result."""
    width, height = size
    if height < width:
      half = width // 2
      at = box.left + (box.right - box.left) * half / width
      left = self._resampled(box._replace(right=at), (half, height))
      right = self._resampled(box._replace(left=at), (width - half, height))
      return np.hstack([left, right])
    half = height // 2
    at = box.top + (box.bottom - box.top) * half / height
    top = self._resampled(box._replace(bottom=at), (width, half))
    bottom = self._resampled(box._replace(top=at), (width, height - half))
    return np.vstack([top, bottom])

  def _find_mpp(self, across: float | None, down: float | None) -> None:
    """Takes up what the file says of its resolution, where it can be."""
    if self._given:
      return
    stated = [value for value in (across, down) if value]
    if not stated:
      power = self.properties.get("openslide.objective-power") or (
        self.properties.get("aperio.AppMag")
      )
      if power:
        self.why_no_mpp += f", only an objective of {power}x"
      return
    mpp = sum(stated) / len(stated)
    if max(stated) > 1.02 * min(stated):
      self.why_no_mpp = (
        f"its pixels are {stated[0]:.4g} by {stated[1]:.4g} um and not square"
      )
    elif not FINEST <= mpp <= COARSEST:
      self.why_no_mpp = (
        f"it states {mpp:.4g} um/px ({25_400 / mpp:.0f} dots an inch), which is"
        f" no scanner's: those are from {FINEST:g} to {COARSEST:g}"
      )
    else:
      self.mpp, self.why_no_mpp = mpp, ""


def _settled(place: float) -> float:
  """Returns a place, or the whole pixel that it misses by rounding alone."""
  near = float(round(place))
  return near if abs(place - near) < _SAME else place


def levels_of(
  sizes: Sequence[tuple[int, int]], stated: Sequence[float] = ()
) -> list[Level]:
  """Returns levels with what their pixels measure.

  Scanners halve, or take every fourth, and leave out what is then less than a
  pixel: a level of 2221 pixels of 4443 has pixels of 2, and not of 2.0005,
  which would be a pixel amiss at its far end. So a ratio is a whole number
  where that explains both sides.

  Args:
    sizes: width and height of each level.
    stated: downsamples that a reader knows; where they are other than the
      ratios of the sizes, the maker wrote them down and they hold.
  """
  width, height = sizes[0]
  levels = []
  for number, size in enumerate(sizes):
    ratios = width / size[0], height / size[1]
    scale = sum(ratios) / 2
    whole = max(1, round(scale))
    if stated and not math.isclose(stated[number], scale, rel_tol=1e-9):
      ratios = stated[number], stated[number]
    elif all(
      abs(full - n * whole) < whole
      for full, n in zip((width, height), size, strict=True)
    ):
      ratios = float(whole), float(whole)
    levels.append(Level(*size, sum(ratios) / 2, ratios))
  return levels


def open_slide(
  path: str | os.PathLike[str],
  mpp: float | None = None,
  max_pixels: int = images.MAX_PIXELS,
) -> Slide:
  """Opens a slide.

  Args:
    path: the file; of DICOM any of a slide's files, of MRXS the .mrxs beside
      its folder.
    mpp: micrometres a pixel of level 0, whatever the file says.
    max_pixels: of a picture, or a strip of a TIFF, that can only be decoded
      whole.

  Raises:
    SlideError: it cannot be used, and why.
    UsageError: the readers of slides are not installed.
  """
  path = pathlib.Path(path)
  try:
    with open(path, "rb") as file:
      head = file.read(512)
  except FileNotFoundError:
    raise SlideError("no such file") from None
  except IsADirectoryError:
    raise SlideError("a folder, not a file") from None
  except OSError as e:
    raise SlideError(f"cannot be read: {e.strerror}") from None
  try:
    form = containers.form_of(head)
  except containers.ImageError:
    form = ""
  if form and form != "TIFF":
    return _Picture(path, mpp, max_pixels)
  # It imports `Slide`, which its slides are.
  from jaxtransfer.data import tiff_slides

  openslide = _openslide()
  what = "empty file" if not head else containers.what_else(head)
  reason = "OpenSlide does not know it" + f": {what}" * bool(what)
  try:
    vendor = openslide.OpenSlide.detect_format(path)
    # It takes of an OME-TIFF the first level alone, and 16 bits for colour.
    if vendor and (vendor != "generic-tiff" or not tiff_slides.is_own(path)):
      return _OpenSlide(path, mpp, max_pixels)
  except openslide.OpenSlideError as e:
    reason = f"OpenSlide refuses it: {_told(path, e)}"
  if form != "TIFF":
    raise SlideError(reason)
  return tiff_slides.TiffSlide(path, mpp, max_pixels)


def _openslide() -> Any:
  try:
    import openslide
  except ImportError as e:
    raise UsageError(f"slides need OpenSlide: {INSTALL} ({e})") from None
  return openslide


def _told(path: pathlib.Path, error: Exception) -> str:
  """Returns what OpenSlide says, without the path that is said anyway."""
  words = str(error).replace(f"Reading {path}: ", "").replace(f"{path}: ", "")
  return words.replace(f"{path}", path.name)


class _OpenSlide(Slide):
  """What OpenSlide reads."""

  backend = "openslide"

  def __init__(self, path: pathlib.Path, mpp: float | None, max_pixels: int):
    super().__init__(path, mpp, max_pixels)
    self._handle: Any = None
    slide = self._opened()
    self.properties = dict(slide.properties)
    self._downsamples = slide.level_downsamples
    self.levels = levels_of(slide.level_dimensions, self._downsamples)
    self._find_mpp(
      *(_number(self.properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    )

  def _opened(self) -> Any:
    if self._handle is None:
      self._handle = _openslide().OpenSlide(self.path)
    return self._handle

  def close(self) -> None:
    handle, self._handle = self._handle, None
    if handle is not None:
      handle.close()

  def _read(
    self, level: int, left: int, top: int, width: int, height: int
  ) -> tuple[np.ndarray, float, float]:
    # It takes a place at level 0, which it divides by its own downsample, and
    # interpolates from there; what lies before the slide it rounds off.
    scale = self._downsamples[level]
    inside = max(0, left), max(0, top)
    x, y = (math.floor(n * scale) for n in inside)
    at = _settled(x / scale), _settled(y / scale)
    # It begins a little before, and so must be that much larger.
    larger = at[0] != inside[0], at[1] != inside[1]
    size = left + width - inside[0], top + height - inside[1]
    if min(size) <= 0:
      return white(height, width), left, top
    size = size[0] + larger[0], size[1] + larger[1]
    try:
      read = self._opened().read_region((x, y), level, size)
    except _openslide().OpenSlideError as e:
      # After an error OpenSlide answers nothing else any more.
      self.close()
      raise SlideError(f"damaged there: {_told(self.path, e)}") from None
    if read.getextrema()[3] != (255, 255):
      behind = Image.new("RGBA", read.size, "white")
      read = Image.alpha_composite(behind, read)
    pixels = np.asarray(read.convert("RGB"))
    if (left, top) != inside:
      whole = white(height + larger[1], width + larger[0])
      paste(whole, pixels, inside[0] - left, inside[1] - top)
      pixels = whole
    # What begins before the slide begins at a whole pixel.
    begins = [
      float(start) if start < 0 else place
      for start, place in zip((left, top), at, strict=True)
    ]
    return pixels, begins[0], begins[1]


def _number(text: str | None) -> float | None:
  try:
    number = float(text or "")
  except ValueError:
    return None
  return number if 0 < number < math.inf else None


class _Picture(Slide):
  """A picture of any other format, which is decoded whole."""

  backend = "pillow"

  def __init__(self, path: pathlib.Path, mpp: float | None, max_pixels: int):
    super().__init__(path, mpp, max_pixels)
    try:
      self._pixels = images.decode(path, max_pixels=max_pixels)
    except images.ImageError as e:
      raise SlideError(str(e)) from None
    height, width, _ = self._pixels.shape
    self.levels = levels_of([(width, height)])

  def close(self) -> None:
    self._pixels = self._pixels[:0, :0]

  def _read(
    self, level: int, left: int, top: int, width: int, height: int
  ) -> tuple[np.ndarray, float, float]:
    del level
    pixels = white(height, width)
    paste(pixels, self._pixels, -left, -top)
    return pixels, left, top


def white(height: int, width: int) -> np.ndarray:
  """Returns (height, width, 3) uint8 of background."""
  return np.full((height, width, 3), 255, np.uint8)


def paste(onto: np.ndarray, part: np.ndarray, left: int, top: int) -> None:
  """Writes what of a part lies inside.

  Args:
    onto: (H, W, 3), changed in place.
    part: (h, w, 3).
    left: where its first column is to be, which may be outside.
    top: likewise of its first row.
  """
  height, width = onto.shape[:2]
  rows = slice(max(0, top), max(0, min(height, top + part.shape[0])))
  columns = slice(max(0, left), max(0, min(width, left + part.shape[1])))
  onto[rows, columns] = part[
    rows.start - top : max(rows.start, rows.stop) - top,
    columns.start - left : max(columns.start, columns.stop) - left,
  ]
