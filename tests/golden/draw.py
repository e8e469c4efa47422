"""Weights, images and digests that torch and jax make alike; NumPy alone.

Nothing large is stored: both sides draw the same weights from a seed and each
tensor's name, and a golden file keeps only a digest of what came out.
"""

import zlib
from collections.abc import Mapping

import numpy as np


def generator(seed: int, name: str) -> np.random.Generator:
  """Returns the random generator of one named array."""
  return np.random.default_rng([seed, zlib.crc32(name.encode())])


def tensors(
  shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, np.ndarray]:
  """Draws a network's weights, its BatchNorm statistics included.

  The statistics are far from the initial 0 and 1, so that a wrong epsilon, a
  swapped mean and variance or a forgotten one shows; the scales keep the
  activations of every depth near one.

  Args:
    shapes: torchvision tensor name -> shape in torch's layout.
    seed: decides all values, together with each name.

  Returns:
    {name: float32 array of that shape}.
  """
  values = {}
  for name, shape in shapes.items():
    random = generator(seed, name)
    if name.endswith("running_var"):
      value = random.uniform(0.5, 2.0, shape)
    elif name.endswith("running_mean"):
      value = random.normal(0, 0.3, shape)
    elif len(shape) == 4:
      value = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    elif len(shape) == 2:
      value = random.normal(0, 1 / np.sqrt(shape[1]), shape)
    elif name.endswith("weight"):
      value = random.uniform(0.5, 1.2, shape)
    else:
      value = random.normal(0, 0.1, shape)
    values[name] = value.astype(np.float32)
  return values


def images(batch: int, size: tuple[int, int], seed: int) -> np.ndarray:
  """Returns (batch, 3, height, width) float32 standard normal images."""
  random = np.random.default_rng(seed)
  return random.normal(0, 1, (batch, 3, *size)).astype(np.float32)


def tiles(count: int, size: int, seed: int) -> np.ndarray:
  """Returns (count, size, size, 3) uint8 of patches and noise."""
  random = np.random.default_rng([seed, 2])
  coarse = random.integers(0, 200, (count, size // 8, size // 8, 3))
  fine = np.kron(coarse, np.ones((1, 8, 8, 1), int))
  return (fine + random.integers(0, 56, fine.shape)).astype(np.uint8)


def labels(batch: int, classes: int, seed: int) -> np.ndarray:
  """Returns (batch,) int64 labels below `classes`."""
  return np.random.default_rng([seed, 1]).integers(0, classes, batch)


def digest_tap(name: str, tap_NCHW: np.ndarray) -> np.ndarray:
  """Returns a few numbers of a tap that any error in it would move.

  The corners, the edges' middles, the centre and eight more pixels of the
  first image, in two channels each, as wrong padding shows first at a border;
  then four random signed sums over all pooled channels, which every channel
  enters.

  Args:
    name: of the tap; decides which channels, pixels and signs.
    tap_NCHW: the tap, before pooling.

  Returns:
    (38,) float32.
  """
  random = generator(0, name)
  _, channels, height, width = tap_NCHW.shape
  rows, columns = (0, height // 2, height - 1), (0, width // 2, width - 1)
  border = [(r, c) for r in rows for c in columns]
  inside = random.integers(0, (height, width), (8, 2))
  pixels = np.array([*border, *inside])
  chosen = random.integers(0, channels, (2, len(pixels)))
  samples = tap_NCHW[0, chosen, pixels[:, 0], pixels[:, 1]].ravel()
  signs = random.choice([-1.0, 1.0], (4, channels)) / np.sqrt(channels)
  pooled = tap_NCHW.mean((2, 3), dtype=np.float64)[0]
  return np.concatenate([samples, signs @ pooled]).astype(np.float32)


def digest_tensor(name: str, tensor: np.ndarray) -> np.ndarray:
  """Returns eight entries of a weight and four random signed sums over all.

  Args:
    name: of the tensor; decides which entries and signs.
    tensor: any shape.

  Returns:
    (12,) float32.
  """
  random = generator(0, name)
  flat = tensor.ravel().astype(np.float64)
  signs = random.choice([-1.0, 1.0], (4, flat.size)) / np.sqrt(flat.size)
  entries = flat[random.integers(0, flat.size, 8)]
  return np.concatenate([entries, signs @ flat]).astype(np.float32)
