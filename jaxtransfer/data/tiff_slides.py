"""TIFFs through tifffile, tile by tile: OME-TIFF and what OpenSlide refuses."""

import collections
import logging
import math
import pathlib
import xml.etree.ElementTree
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxtransfer.data import slides
from jaxtransfer.data.slides import SlideError
from jaxtransfer.errors import UsageError

# Decoded tiles that are kept for their neighbours, in bytes.
_KEPT = 1 << 26
_REDUCED = 1  # a bit of NewSubfileType
_MINISWHITE, _MINISBLACK, _RGB, _YCBCR = 0, 1, 2, 6
_SEPARATE = 2  # of PlanarConfiguration
_UNITS = {2: 25_400.0, 3: 10_000.0}  # ResolutionUnit -> micrometres
_OME_UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3}


def is_own(path: pathlib.Path) -> bool:
  """Returns whether a generic TIFF is better read, or refused, here.

  Raises:
    UsageError: tifffile is not installed.
  """
  tifffile = _tifffile()
  try:
    with tifffile.TiffFile(path) as file:
      first = file.pages.first
      return bool(first.is_ome) or first.dtype != np.uint8
  # tifffile raises whatever its parser runs into; who opens it will say.
  except Exception:  # noqa: BLE001
    return False


def _tifffile() -> Any:
  try:
    import imagecodecs  # noqa: F401, without it tifffile fails at JPEG
    import tifffile
  except ImportError as e:
    raise UsageError(f"slides need tifffile: {slides.INSTALL} ({e})") from None
  # It tells of oddities that cost no pixel, once for each.
  logging.getLogger("tifffile").setLevel(logging.CRITICAL)
  return tifffile


class TiffSlide(slides.Slide):
  """A TIFF of 8-bit RGB or grey, in tiles or strips."""

  backend = "tifffile"

  def __init__(self, path: pathlib.Path, mpp: float | None, max_pixels: int):
    super().__init__(path, mpp, max_pixels)
    # (level, tile) -> pixels, the least used first.
    self._kept: collections.OrderedDict[tuple[int, int], np.ndarray] = (
      collections.OrderedDict()
    )
    self._size = 0
    try:
      self._file = _tifffile().TiffFile(path)
    except UsageError:
      raise
    except Exception as e:
      raise SlideError(f"damaged TIFF: {_reason(e)}") from None
    try:
      self._pages = self._find_pages()
      first = self._pages[0]
      self.properties = {
        f"tiff.{tag.name}": str(tag.value)
        for tag in first.tags
        if isinstance(tag.value, str | int | float) or tag.count == 2
      }
      self._find_mpp(*_resolution(first))
    except SlideError:
      self.close()
      raise
    except Exception as e:
      self.close()
      raise SlideError(f"damaged TIFF: {_reason(e)}") from None
    self.levels = slides.levels_of(
      [(page.imagewidth, page.imagelength) for page in self._pages]
    )

  def close(self) -> None:
    """Lets go of the file and of what was decoded."""
    self._file.close()
    self._kept.clear()
    self._size = 0

  def _find_pages(self) -> list[Any]:
    """Returns the pages that are levels of the largest one."""
    pages = [page.aspage() for page in self._file.pages]
    main = [page for page in pages if not page.subfiletype & _REDUCED]
    first = max(main or pages, key=lambda page: page.imagewidth)
    _check(first, _channels(first))
    below = [page.aspage() for page in first.pages or ()]
    below += [page for page in pages if page.subfiletype & _REDUCED]
    levels = {(first.imagewidth, first.imagelength): first}
    for page in below:
      size = page.imagewidth, page.imagelength
      same = page.dtype == first.dtype and (
        page.samplesperpixel == first.samplesperpixel
      )
      # A label or an overview has another shape.
      across, down = first.imagewidth / size[0], first.imagelength / size[1]
      tolerance = max(1 / size[0], 1 / size[1])
      if same and abs(math.log(across / down)) <= 2 * tolerance:
        levels.setdefault(size, page)
    found = sorted(levels.values(), key=lambda page: -page.imagewidth)
    for page in found:
      tile = page.tilewidth * page.tilelength
      if not page.is_tiled:
        tile = page.imagewidth * min(page.rowsperstrip, page.imagelength)
      if tile > self._max_pixels:
        raise SlideError(
          f"its pixels lie in pieces of {tile:,}; the limit data.max_pixels is"
          f" {self._max_pixels:,}: save it as a tiled TIFF"
        )
    return found

  def _read(
    self, level: int, left: int, top: int, width: int, height: int
  ) -> tuple[np.ndarray, float, float]:
    page = self._pages[level]
    pixels = slides.white(height, width)
    for index, x, y in self._tiles(level, left, top, width, height):
      # Tiles at the edge are as large as the others, and black beyond it.
      tile = self._tile(level, index)[: page.imagelength - y]
      slides.paste(pixels, tile[:, : page.imagewidth - x], x - left, y - top)
    return pixels, left, top

  def _tiles(
    self, level: int, left: int, top: int, width: int, height: int
  ) -> Iterator[tuple[int, int, int]]:
    """Yields number and top left corner of the tiles that meet a rectangle."""
    page = self._pages[level]
    wide, high = _tile_size(page)
    across = -(-page.imagewidth // wide)
    right = min(left + width, page.imagewidth)
    bottom = min(top + height, page.imagelength)
    for row in range(max(0, top) // high, -(-bottom // high)):
      for column in range(max(0, left) // wide, -(-right // wide)):
        yield row * across + column, column * wide, row * high

  def _tile(self, level: int, index: int) -> np.ndarray:
    """Returns a tile, (h, w, 3) uint8, decoded or kept."""
    key = level, index
    if key in self._kept:
      self._kept.move_to_end(key)
      return self._kept[key]
    page = self._pages[level]
    wide, high = _tile_size(page)
    planes = 1
    count = -(-page.imagewidth // wide) * -(-page.imagelength // high)
    if page.planarconfig == _SEPARATE:
      planes = min(3, page.samplesperpixel)
    parts = []
    for plane in range(planes):
      part = self._decoded(page, index + count * plane)
      if part is None:
        # Never written, as background that a scanner passes over.
        return slides.white(high, wide)
      parts.append(part)
    tile = np.concatenate(parts, -1)[..., :3]
    if tile.shape[-1] < 3:
      tile = np.repeat(tile[..., :1], 3, -1)
      if page.photometric == _MINISWHITE:
        tile = 255 - tile
    self._kept[key] = tile
    self._size += tile.nbytes
    while self._size > _KEPT and len(self._kept) > 1:
      _, dropped = self._kept.popitem(last=False)
      self._size -= dropped.nbytes
    return tile

  def _decoded(self, page: Any, index: int) -> np.ndarray | None:
    """Returns one plane of a tile, (h, w, channels); None where it is empty."""
    try:
      offset, count = page.dataoffsets[index], page.databytecounts[index]
      if not count:
        return None
      handle = self._file.filehandle
      handle.seek(offset)
      data = handle.read(count)
      if len(data) < count:
        raise SlideError(
          f"truncated: tile {index} of {page.imagewidth} x {page.imagelength}"
          " pixels lies beyond the end of the file"
        )
      tile, *_ = page.decode(data, index, jpegtables=page.jpegtables)
    except SlideError:
      raise
    # The codecs raise whatever they run into.
    except Exception as e:
      raise SlideError(f"damaged: tile {index}: {_reason(e)}") from None
    return tile[0]


def _tile_size(page: Any) -> tuple[int, int]:
  """Returns width and height of a page's tiles or strips."""
  if page.is_tiled:
    return page.tilewidth, page.tilelength
  return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def _channels(page: Any) -> int:
  """Returns how many channels an OME-TIFF says that it has."""
  pixels = _ome_pixels(page)
  return 1 if pixels is None else int(pixels.get("SizeC") or 1)


def _check(page: Any, channels: int) -> None:
  """Refuses what has no one meaning in 8-bit RGB."""
  samples = page.samplesperpixel
  advice = "save it as 8-bit RGB"
  if page.dtype != np.uint8 or page.bitspersample != 8:
    bits = f"{page.bitspersample}-bit {page.dtype or 'samples'}"
    raise SlideError(f"a TIFF of {bits}; {advice}")
  if page.photometric in (_RGB, _YCBCR) and samples in (3, 4):
    return
  if page.photometric in (_MINISWHITE, _MINISBLACK) and samples == 1:
    if channels == 1:
      return
    raise SlideError(f"{channels} channels, each a page of its own; {advice}")
  colours = getattr(page.photometric, "name", page.photometric)
  raise SlideError(f"a TIFF of {samples} channels ({colours}); {advice}")


def _resolution(page: Any) -> tuple[float | None, float | None]:
  """Returns micrometres a pixel along x and y, where the file says."""
  pixels = _ome_pixels(page)
  if pixels is not None:
    sizes = []
    for axis in "XY":
      unit = _OME_UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
      size = float(pixels.get(f"PhysicalSize{axis}") or 0)
      sizes.append(size * unit if unit and size > 0 else None)
    return sizes[0], sizes[1]
  unit = _UNITS.get(int(page.resolutionunit or 1))
  values = page.resolution
  if unit is None or min(values) <= 0:
    return None, None
  return unit / values[0], unit / values[1]


def _ome_pixels(page: Any) -> Any | None:
  """Returns the first element `Pixels` of an OME-TIFF."""
  if not page.is_ome:
    return None
  root = xml.etree.ElementTree.fromstring(page.description)
  return next((e for e in root.iter() if e.tag.endswith("}Pixels")), None)


def _reason(error: Exception) -> str:
  return f"{error}".removeprefix("not a TIFF file: ") or type(error).__name__
