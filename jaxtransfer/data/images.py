"""One image file to an array, or one clear reason why not."""

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
MAX_PIXELS = 100_000_000
# A strip wider than this many squares is cropped before it is resized: its
# short side can be one pixel, and the rest would be gigabytes thrown away.
_MAX_SQUARES = 16

# Pillow warns from 89 megapixels; ours is the limit that counts. Above 178 it
# refuses whatever ours is.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

_TO_RGB = frozenset({"1", "L", "P", "RGB", "RGBX", "YCbCr"})


class ImageError(Exception):
  """An image that cannot be used; its message is the reason, one line."""

  def __init__(self, reason: str):
    super().__init__(" ".join(reason.split()))


def decode(
  source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Decodes a PNG, JPEG, TIFF (first page) or BMP to 8-bit RGB.

  - 8-bit grey, bilevel and palette images become RGB; the orientation written
    in EXIF or TIFF is applied.
  - Transparency is composited on white, the background of a slide; an image
    with nothing opaque in it is refused.
  - 16-bit colour keeps its high byte. 16-bit grey, 32-bit and float images are
    refused: which part of the range matters (a 12-bit X-ray, a fluorescence
    channel) is not in the file, and a guess would be silently wrong.
  - CMYK and LAB are refused: without their colour profile the colours are
    wrong.
  - Truncated and damaged files are refused, whatever of them is readable.

  Args:
    source: a path, or the bytes of the file.
    max_pixels: images with more are refused from their header, undecoded.

  Returns:
    (H, W, 3) uint8, contiguous.

  Raises:
    ImageError: the image cannot be used, and why.
  """
  is_bytes = isinstance(source, bytes)
  try:
    with Image.open(
      io.BytesIO(source) if is_bytes else source, formats=FORMATS
    ) as image:
      width, height = image.size
      if width * height > max_pixels:
        raise ImageError(
          f"too large: {width} x {height} pixels, the limit"
          f" data.max_pixels is {max_pixels}"
        )
      return np.asarray(_to_rgb(image))
  except (ImageError, MemoryError):
    raise
  except UnidentifiedImageError:
    size = len(source) if is_bytes else os.path.getsize(source)
    raise ImageError(
      "not a PNG, JPEG, TIFF or BMP image" if size else "empty file"
    ) from None
  except FileNotFoundError:
    raise ImageError("no such file") from None
  except IsADirectoryError:
    raise ImageError("a folder, not a file") from None
  except PermissionError:
    raise ImageError("permission denied") from None
  except Image.DecompressionBombError as e:
    raise ImageError(f"too large: {e}") from None
  # Pillow's readers raise whatever their parsing of hostile bytes runs into
  # (struct.error, SyntaxError, ZeroDivisionError, ...), not one error type.
  except Exception as e:
    raise ImageError(f"damaged image: {e or type(e).__name__}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith(("I", "F")):
    raise ImageError(
      f"16-bit or deeper grey (mode {image.mode}): convert it to 8 bits with"
      " the range that matters"
    )
  has_alpha = image.has_transparency_data
  if image.mode not in _TO_RGB and not has_alpha:
    raise ImageError(f"{image.mode} colours: convert the image to RGB first")
  ImageOps.exif_transpose(image, in_place=True)
  if not has_alpha:
    return image.convert("RGB")
  image = image.convert("RGBA")
  if image.getextrema()[3][1] == 0:
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
