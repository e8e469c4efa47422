"""Small slides with coordinates, whose pixels are nowhere alike."""

import pathlib

import numpy as np

from jaxtransfer.data import feature_files
from tests.data import slide_files

SIDE, TILE, MPP = 320, 32, 0.5


def pixels(seed: int) -> np.ndarray:
  """Returns (SIDE, SIDE, 3) uint8: patches of colour, and noise."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (SIDE // 16, SIDE // 16, 3))
  fine = np.kron(coarse, np.ones((16, 16, 1)))
  return (0.7 * fine + rng.uniform(0, 70, fine.shape)).astype(np.uint8)


def places(count: int, seed: int) -> np.ndarray:
  """Returns (count, 2) tiles of a grid of half their side, in no order."""
  along = np.arange(0, SIDE - TILE + 1, TILE // 2)
  x, y = np.meshgrid(along, along)
  grid = np.stack([x.ravel(), y.ravel()], 1)
  return np.random.default_rng(seed).permutation(grid)[:count]


def coords(corners: np.ndarray, **changes) -> feature_files.Coords:
  """Returns coordinates on such a slide."""
  corners = np.asarray(corners, np.int64).reshape(-1, 2)
  fields = {
    "extent": float(TILE),
    "tile": TILE,
    "mpp": MPP,
    "width": SIDE,
    "height": SIDE,
  }
  return feature_files.Coords(corners, **{**fields, **changes})


def write(root: pathlib.Path, counts: dict[str, int]) -> pathlib.Path:
  """Writes slides with so many tiles, and their coordinates; returns root."""
  (root / "slides").mkdir(parents=True)
  for seed, (name, count) in enumerate(counts.items()):
    path = root / "slides" / f"{name}.tiff"
    slide_files.write_pyramid(path, [pixels(seed)], MPP)
    found = coords(places(count, seed))
    feature_files.write_coords(root / "coords" / f"{name}.h5", found)
  return root


def tile(seed: int, corner: np.ndarray) -> np.ndarray:
  """Returns (TILE, TILE, 3) uint8 of the slide of a seed."""
  x, y = corner
  return pixels(seed)[y : y + TILE, x : x + TILE]


def damage(path: pathlib.Path, number: int) -> None:
  """Spoils one of the blocks of 64 pixels that a slide is stored in."""
  import tifffile

  with tifffile.TiffFile(path) as file:
    offset = file.pages[0].dataoffsets[number]
    count = file.pages[0].databytecounts[number]
  data = bytearray(path.read_bytes())
  data[offset : offset + count] = b"\xff" * count
  path.write_bytes(data)
