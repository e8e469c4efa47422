"""One image file to an array, or one clear reason why not."""

import errno
import io
import os
from typing import BinaryIO

import numpy as np
import PIL
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from jaxtransfer.data import containers, tiff
from jaxtransfer.data.containers import ImageError

# Pillow's name -> what cuts the pixels out of such a file.
_READERS = {
  "PNG": containers.png,
  "JPEG": containers.jpeg,
  "TIFF": tiff.first_page,
  "BMP": containers.bmp,
  "WEBP": containers.webp,
}
FORMATS = tuple(_READERS)
MAX_PIXELS = 100_000_000
# A strip wider than this many squares is cropped before it is resized: its
# short side can be one pixel, and the rest would be gigabytes thrown away.
_MAX_SQUARES = 16

_TO_RGB = frozenset({"1", "L", "P", "RGB", "RGBX", "YCbCr"})
# EXIF's orientation -> what turns the image upright.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode(
  source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Decodes a PNG, JPEG, TIFF, BMP or WebP to 8-bit RGB.

  - Of several pages or frames the first is used.
  - 8-bit grey, bilevel and palette images become RGB; the orientation written
    in EXIF, XMP or TIFF is applied.
  - Nothing else that a file says of itself is read, so that damage there, or a
    profile of megabytes, costs no image.
  - Transparency is composited on white, the background of a slide; an image
    with nothing opaque in it is refused.
  - 16-bit colour keeps its high byte. 16-bit grey, 32-bit and float images are
    refused: which part of the range matters (a 12-bit X-ray, a fluorescence
    channel) is not in the file, and a guess would be silently wrong. So are
    images of two grey channels, and of five channels or more.
  - CMYK and LAB are refused: without their colour profile the colours are
    wrong.
  - Truncated and damaged pixels are refused, whatever of them is readable.

  Args:
    source: a path, or the bytes of the file.
    max_pixels: images with more are refused from their header, undecoded.

  Returns:
    (H, W, 3) uint8, contiguous.

  Raises:
    ImageError: the image cannot be used, and why.
  """
  # Pillow's own limit refuses at twice its number whatever ours is, and its
  # reader of uncompressed TIFFs mixes up planes of 16 bits, which libtiff's
  # does not. Set here, for whichever process and whoever set them before.
  Image.MAX_IMAGE_PIXELS = None
  # Pillow gives it no type: it is read off as one that is False for ever.
  # pyrefly: ignore[bad-assignment]
  TiffImagePlugin.READ_LIBTIFF = True
  try:
    is_bytes = isinstance(source, bytes)
    with io.BytesIO(source) if is_bytes else open(source, "rb") as file:
      pixels = _pixels(file, max_pixels)
    return np.asarray(_to_rgb(pixels))
  except (ImageError, MemoryError):
    raise
  except FileNotFoundError:
    raise ImageError("no such file") from None
  except IsADirectoryError:
    raise ImageError("a folder, not a file") from None
  except PermissionError:
    raise ImageError("permission denied") from None
  except UnidentifiedImageError:
    raise ImageError(
      "damaged image, or of a layout that Pillow"
      f" {PIL.__version__} does not know"
    ) from None
  # Pillow's readers raise whatever their parsing of hostile bytes runs into
  # (struct.error, SyntaxError, ZeroDivisionError, ...), not one error type.
  except Exception as e:
    if isinstance(e, OSError) and e.errno in errno.errorcode:
      raise ImageError(f"cannot be read: {e.strerror}") from None
    if str(e).startswith("Unsupported"):
      raise ImageError(str(e)) from None
    raise ImageError(f"damaged image: {e or type(e).__name__}") from None


def _pixels(file: BinaryIO, max_pixels: int) -> containers.Pixels:
  form = containers.form_of(file.read(512))
  file.seek(0)
  return _READERS[form](file, max_pixels)


def _to_rgb(pixels: containers.Pixels) -> Image.Image:
  with Image.open(io.BytesIO(pixels.data), formats=[pixels.form]) as image:
    if image.mode.startswith(("I", "F")):
      raise ImageError(
        f"16-bit or deeper grey (mode {image.mode}): {containers.RANGE_FIRST}"
      )
    has_alpha = image.has_transparency_data
    if image.mode not in _TO_RGB and not has_alpha:
      raise ImageError(f"{image.mode} colours: {containers.RGB_FIRST}")
    try:
      image.load()
    except OSError as e:
      if not pixels.codec:
        raise
      raise ImageError(
        f"damaged image, or {pixels.codec} compression, which the Pillow"
        f" installed here was built without: {e}"
      ) from None
    if turn := _TURNS.get(pixels.orientation):
      image = image.transpose(turn)
    if not has_alpha:
      return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":
      image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[1] == 0:
      raise ImageError("fully transparent")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def fit(image: np.ndarray, size: int) -> np.ndarray:
  """Scales the shorter side to `size` and crops the centre square.

  Bilinear with antialiasing. An image of that size already is returned as it
  is.

  Args:
    image: (H, W, 3) uint8.
    size: side of the result in pixels.

  Returns:
    (size, size, 3) uint8.

  Source: torchvision.transforms `Resize(size)` then `CenterCrop(size)` on a
    PIL image, equal to the bit; beyond 16:1 the long side is cropped first.
  """
  if image.shape[:2] == (size, size):
    return image
  height, width = image.shape[:2]
  limit = _MAX_SQUARES * min(height, width)
  if max(height, width) > limit:
    top = max(0, (height - limit) // 2)
    left = max(0, (width - limit) // 2)
    image = image[top : top + limit, left : left + limit]
    height, width = image.shape[:2]
  short = min(height, width)
  new_width, new_height = size * width // short, size * height // short
  resized = Image.fromarray(image).resize(
    (new_width, new_height), Image.Resampling.BILINEAR
  )
  left = round((new_width - size) / 2)
  top = round((new_height - size) / 2)
  return np.asarray(resized.crop((left, top, left + size, top + size)))


def resize_card(size: int) -> dict[str, str | int | bool]:
  """Returns what `fit` does, for whoever must do the same elsewhere.

  Args:
    size: side of the result in pixels.

  Returns:
    The words of torchvision's `Resize`, and what is kept of the result.
  """
  return {
    "shorter_side": size,
    "interpolation": "bilinear",
    "antialias": True,
    "crop": "centre",
  }
