"""Drawing hematoxylin and eosin: blobs, nuclei, edges and stains.

What `tissue` (tiles) and `slide_drawing` (whole slides) have in common. Places
and lengths are in micrometres, so that pixels change sharpness and never what
is drawn.

Sources: Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23 (2001) 291; Macenko
et al., ISBI 2009.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
_MACENKO = np.array([[0.563, 0.720, 0.406], [0.216, 0.801, 0.558]])


class Blobs(NamedTuple):
  """Ellipses with a wavy outline, n of them, in micrometres."""

  x: np.ndarray  # (n,) centre, to the right
  y: np.ndarray  # (n,) centre, downwards
  a: np.ndarray  # (n,) semi-axis along `angle`
  b: np.ndarray  # (n,) the other semi-axis
  angle: np.ndarray  # (n,) radians
  wave: np.ndarray  # (n, 3) complex; harmonics 2, 3 and 4 of the outline


class Look(NamedTuple):
  """What a patient's block, stainer and scanner do to every image."""

  hematoxylin: float  # strength of the stain
  eosin: float
  vectors: np.ndarray  # (2, 3) unit optical densities of H and E in R, G, B
  white: np.ndarray  # (3,) empty glass, in grey levels
  gamma: float
  blur: float  # sigma, micrometres
  noise: float  # sigma, grey levels
  size: float  # nuclear size


def draw_look(rng: np.random.Generator) -> Look:
  """Draws a look, without knowing any label."""
  mix = rng.random((2, 1))
  vectors = mix * _RUIFROK + (1 - mix) * _MACENKO
  vectors = np.maximum(vectors + rng.normal(0, 0.03, (2, 3)), 0.02)
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  return Look(
    hematoxylin=float(np.exp(rng.normal(0, 0.22))),
    eosin=float(np.exp(rng.normal(0, 0.22))),
    vectors=vectors.astype(np.float32),
    white=rng.uniform(234, 247) + rng.normal(0, 2.5, 3).astype(np.float32),
    gamma=float(np.exp(rng.normal(0, 0.1))),
    blur=float(rng.uniform(0.3, 0.9)),
    noise=float(rng.uniform(1.0, 4.0)),
    size=float(np.exp(rng.normal(0, 0.08))),
  )


def waves(
  rng: np.random.Generator, n: int, amount: float | np.ndarray
) -> np.ndarray:
  """Random outline harmonics of typical relative amplitude `amount`."""
  amplitude = np.abs(rng.normal(0, 1, (n, 3))) * [1.0, 0.8, 0.5]
  phase = rng.uniform(0, 2 * np.pi, (n, 3))
  amplitude = np.minimum(amplitude * np.reshape(amount, (-1, 1)), 0.18)
  return amplitude * np.exp(1j * phase)


def spread(points: np.ndarray, gap: np.ndarray, rounds: int) -> np.ndarray:
  """Pushes points (n, 2) apart until most are gap_i + gap_j from each other."""
  reach = gap[:, None] + gap[None, :]
  np.fill_diagonal(reach, 0)
  for _ in range(rounds):
    apart = points[:, None] - points[None, :]
    distance = np.sqrt((apart**2).sum(-1)) + 1e-3
    push = np.clip(reach - distance, 0, None) / distance * 0.45
    points = points + (apart * push[..., None]).sum(1)
  return points


def blobs(
  points: np.ndarray,
  radius: np.ndarray,
  ratio: np.ndarray,
  angle: np.ndarray,
  wave: np.ndarray,
) -> Blobs:
  """Blobs of area pi * radius^2 and axis ratio `ratio` (long / short)."""
  root = np.sqrt(ratio)
  return Blobs(
    points[:, 0], points[:, 1], radius * root, radius / root, angle, wave
  )


def joined(first: Blobs, second: Blobs) -> Blobs:
  """Returns the blobs of both."""
  return Blobs(
    *(np.concatenate(pair) for pair in zip(first, second, strict=True))
  )


def spline(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the knots of places on a line, and their cubic B-spline weights.

  Args:
    at: (n,) places, knots being 1 apart.

  Returns:
    (first knot of four (n,) int64, weights (4, n) float32).
  """
  first = np.floor(at).astype(np.int64)
  t = at - first
  weights = np.stack(
    [
      (1 - t) ** 3,
      3 * t**3 - 6 * t**2 + 4,
      -3 * t**3 + 3 * t**2 + 3 * t + 1,
      t**3,
    ]
  )
  return first, (weights / 6).astype(np.float32)


def outline(z: np.ndarray, wave: np.ndarray) -> np.ndarray:
  """Returns how far an outline is from the centre, the ellipse being 1.

  Args:
    z: (...) complex of length 1, the direction.
    wave: (..., 3) complex, as of `Blobs`.
  """
  square = z * z
  return 1 + np.real(
    square * (wave[..., 0] + z * wave[..., 1] + square * wave[..., 2])
  )


class Windows(NamedTuple):
  """The pixels around each of n blobs, P x P each."""

  pixel: np.ndarray  # (n, P, P) index into the tile; size^2 = outside it
  rho: np.ndarray  # (n, P, P) distance from the centre, 1 = the outline
  depth: np.ndarray  # (n, P, P) micrometres inside the outline, negative out
  u: np.ndarray  # (n, P, P) micrometres along the long axis
  v: np.ndarray  # (n, P, P) micrometres along the short one


def windows(blobs: Blobs, size: int, step: float) -> Windows:
  """Returns the pixels around blobs in a square image.

  Args:
    blobs: what is drawn, from the image's top left corner.
    size: side of the image in pixels.
    step: micrometres to a pixel.
  """
  a, b, x, y, angle = (
    np.asarray(value, np.float32)[:, None, None]
    for value in (blobs.a, blobs.b, blobs.x, blobs.y, blobs.angle)
  )
  wave = blobs.wave.astype(np.complex64)[:, None, None]
  reach = blobs.a.max() * (1 + 0.6 * np.abs(blobs.wave).sum(1).max()) + 1.0
  half = int(np.ceil(reach / step))
  offsets = np.arange(-half, half + 1)
  rows = np.floor(y / step).astype(np.int64) + offsets[:, None]
  cols = np.floor(x / step).astype(np.int64) + offsets
  inside = (rows >= 0) & (rows < size) & (cols >= 0) & (cols < size)
  pixel = np.where(inside, rows * size + cols, size * size)
  dx = ((cols + 0.5) * step - x).astype(np.float32)
  dy = ((rows + 0.5) * step - y).astype(np.float32)
  cos, sin = np.cos(angle), np.sin(angle)
  u, v = dx * cos + dy * sin, dy * cos - dx * sin
  z = u / a + 1j * (v / b)
  rho = np.abs(z) + np.float32(1e-6)
  wavy = outline(z / rho, wave)
  depth = (wavy - rho) * np.sqrt(a * b)
  return Windows(pixel, rho / wavy, depth, u, v)


def add_up(pixel: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
  """Adds window values up into a tile (size, size) float32."""
  total = np.bincount(pixel.ravel(), values.ravel(), minlength=size * size + 1)
  return total[:-1].reshape(size, size).astype(np.float32)


def edge(depth: np.ndarray, softness: float) -> np.ndarray:
  """0 outside, 1 inside, a smooth step of `softness` um between."""
  t = np.clip(depth / softness + 0.5, 0, 1)
  return t * t * (3 - 2 * t)


def cover(blobs: Blobs, size: int, step: float, softness: float) -> np.ndarray:
  """How much of every pixel lies in any of the blobs: (size, size), 0 to 1."""
  if not len(blobs.x):
    return np.zeros((size, size), np.float32)
  around = windows(blobs, size, step)
  open_ = 1 - edge(around.depth, softness)
  return 1 - np.exp(add_up(around.pixel, np.log(open_ + 1e-6), size))


class Nuclei(NamedTuple):
  """Nuclei, n of them, and how they take the stain."""

  blobs: Blobs
  darkness: np.ndarray  # (n,) hematoxylin of each nucleus, about 1
  clumping: np.ndarray  # (n,) contrast of its chromatin, 0 to 1
  nucleolus: np.ndarray  # (n,) strength of its nucleolus, 0 = none


def stain_nuclei(
  groups: Sequence[Nuclei], fine: np.ndarray, step: float, softness: float
) -> tuple[np.ndarray, np.ndarray]:
  """Draws nuclei into a square image.

  Args:
    groups: nuclei of about one size each: all of a group have windows that the
      largest of it fits.
    fine: (size, size) float32, the grain of chromatin.
    step: micrometres to a pixel.
    softness: width of an edge, micrometres.

  Returns:
    How much of every pixel is nucleus, and how much hematoxylin is there, two
    (size, size) float32.
  """
  size = len(fine)
  zero = np.zeros((), np.float32)
  closed, often, stain = zero, zero, zero
  for group in groups:
    around = windows(group.blobs, size, step)
    inside = edge(around.depth, softness)
    chromatin = np.append(fine.ravel(), np.float32(0))[around.pixel]
    darkness, clumping, nucleolus = (
      np.asarray(value, np.float32)[:, None, None] for value in group[1:]
    )
    # Heterochromatin gathers at the membrane; the more it clumps, the paler
    # the middle. The mean over a nucleus stays `darkness`.
    shade = 1 + clumping * (0.9 * around.rho**2 - 0.45 + 0.28 * chromatin)
    spot = (around.u - 0.6) ** 2 + (around.v + 0.4) ** 2
    shade = darkness * shade + nucleolus * np.exp(-spot / np.float32(1.1))
    shade = inside * np.maximum(shade, 0.15)
    shut = np.log1p(-np.minimum(inside, 0.999))
    closed = closed + add_up(around.pixel, shut, size)
    often = often + add_up(around.pixel, inside, size)
    stain = stain + add_up(around.pixel, shade, size)
  once = 1 - np.exp(closed)
  # A section is thinner than a nucleus: overlaps darken, but do not double.
  overlap = 1 + 0.3 * np.minimum(np.maximum(often - once, 0), 1.5)
  return once, stain / np.maximum(often, 1e-3) * once * overlap
