"""Slides whose pixels are known as a function of where they are."""

import pathlib

import numpy as np
import tifffile

# Periods of the waves along x and y, in pixels of level 0.
_PERIODS = np.array([171.0, 133.0, 211.0])


def pattern(
  left: float, top: float, right: float, bottom: float, width: int, height: int
) -> np.ndarray:
  """Returns a rectangle of the drawn plane, (height, width, 3) float64.

  Each pixel is the mean over its own square, not a sample: red waves along x,
  green along y, blue along both, so that a shift shows in numbers.

  Args:
    left: of the rectangle, pixels of level 0.
    top: likewise.
    right: likewise.
    bottom: likewise.
    width: pixels of the result.
    height: likewise.
  """
  x = _waves(np.linspace(left, right, width + 1))
  y = _waves(np.linspace(top, bottom, height + 1))
  red = np.broadcast_to(x[0], (height, width))
  green = np.broadcast_to(y[1][:, None], (height, width))
  blue = x[2] * y[2][:, None]
  return 127.5 + 100 * np.stack([red, green, blue], -1)


def _waves(edges: np.ndarray) -> np.ndarray:
  """Returns (3, n), means of the waves between edges, by their integral."""
  rates = 2 * np.pi / _PERIODS[:, None]
  integral = np.sin(rates * edges) / rates
  return np.diff(integral, axis=1) / np.diff(edges)


def level(width: int, height: int, downsample: float = 1) -> np.ndarray:
  """Returns a level of a slide of that pattern, uint8."""
  right, bottom = width * downsample, height * downsample
  values = pattern(0, 0, right, bottom, width, height)
  return np.rint(values).astype(np.uint8)


def shift(shown: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Returns (2,), by how many pixels an image is shifted: down, right.

  Least squares over the image's own slopes: no search, and no grid.

  Args:
    shown: (H, W, 3).
    wanted: (H, W, 3) float64.
  """
  inside = slice(2, -2)
  slopes = np.stack(np.gradient(wanted, axis=(0, 1)))[:, inside, inside]
  missed = (shown - wanted)[inside, inside]
  slopes = slopes.reshape(2, -1)
  return -np.linalg.lstsq(slopes.T, missed.ravel(), rcond=None)[0]


def write_pyramid(
  path: pathlib.Path,
  levels: list[np.ndarray],
  mpp: float | None = 0.5,
  tile: int = 64,
  **options,
) -> pathlib.Path:
  """Writes a tiled TIFF that OpenSlide opens, its levels as pages.

  Args:
    path: the file.
    levels: (H, W, 3) uint8 each, the finest first.
    mpp: micrometres a pixel of the first; None = not said.
    tile: side of the tiles.
    **options: of tifffile.
  """
  options = {"compression": "deflate", **options}
  resolution = {}
  if mpp:
    resolution = {
      "resolution": (1e4 / mpp, 1e4 / mpp),
      "resolutionunit": "CENTIMETER",
    }
  with tifffile.TiffWriter(path) as file:
    for number, pixels in enumerate(levels):
      file.write(
        pixels,
        photometric="rgb",
        tile=(tile, tile),
        subfiletype=int(number > 0),
        metadata=None,
        **(resolution if number == 0 else {}),
        **options,
      )
  return path


def write_ome(
  path: pathlib.Path,
  levels: list[np.ndarray],
  mpp: float | None = 0.5,
  **options,
) -> pathlib.Path:
  """Writes an OME-TIFF with its levels as SubIFDs, where OME has them."""
  metadata = {"axes": "YXS"}
  if mpp:
    metadata |= {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
  options = {"tile": (64, 64), "compression": "deflate", **options}
  with tifffile.TiffWriter(path, ome=True) as file:
    file.write(
      levels[0],
      photometric="rgb",
      subifds=len(levels) - 1,
      metadata=metadata,
      **options,
    )
    for pixels in levels[1:]:
      file.write(pixels, photometric="rgb", subfiletype=1, **options)
  return path
