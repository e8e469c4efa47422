"""Small slides with coordinates, whose pixels say where they are."""

import pathlib

import numpy as np
import tifffile

from jaxtransfer.data import feature_files

SIDE = 320


def pixels(seed: int, side: int = SIDE) -> np.ndarray:
  """Returns (side, side, 3) uint8 that are nowhere alike."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (side // 16 + 1, side // 16 + 1, 3))
  fine = np.kron(coarse, np.ones((16, 16, 1)))[:side, :side]
  return (0.7 * fine + rng.uniform(0, 70, fine.shape)).astype(np.uint8)


def write_slide(path: pathlib.Path, image: np.ndarray, mpp: float = 0.5):
  """Writes a tiled TIFF, uncompressed, with its resolution."""
  path.parent.mkdir(parents=True, exist_ok=True)
  tifffile.imwrite(
    path,
    image,
    tile=(64, 64),
    photometric="rgb",
    resolution=(10_000 / mpp, 10_000 / mpp),
    resolutionunit="CENTIMETER",
  )


def write_coords(
  path: pathlib.Path,
  coords: np.ndarray,
  tile: int = 32,
  side: int = SIDE,
  mpp: float = 0.5,
  extent: float | None = None,
):
  """Writes coordinates as `tile` does."""
  extent = extent or tile
  feature_files.write_coords(
    path,
    feature_files.Coords(
      np.asarray(coords, np.int64).reshape(-1, 2),
      extent,
      tile,
      mpp * extent / tile,
      side,
      side,
      {"name": path.stem, "overlap": 0},
    ),
  )


def grid(count: int, seed: int = 0, tile: int = 32, side: int = SIDE):
  """Returns (count, 2) places of tiles, in no order."""
  x, y = np.meshgrid(
    np.arange(0, side - tile + 1, tile // 2),
    indexing="ij",
    *[np.arange(0, side - tile + 1, tile // 2)],
  )
  places = np.stack([x.ravel(), y.ravel()], 1)
  return np.random.default_rng(seed).permutation(places)[:count]


def write_all(root: pathlib.Path, counts: dict[str, int]):
  """Writes slides and coordinates; returns their folders."""
  for seed, (name, count) in enumerate(counts.items()):
    write_slide(root / "slides" / f"{name}.tiff", pixels(seed))
    write_coords(root / "coords" / f"{name}.h5", grid(count, seed))
  return root / "slides", root / "coords"
