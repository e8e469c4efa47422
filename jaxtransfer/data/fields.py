"""Random fields and shapes over a plane, the same from wherever one looks.

A number is a hash of a key and a cell of a lattice, a field a spline over such
numbers: any part of the plane can be had at any time. Lengths are micrometres.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxtransfer.data import drawing
from jaxtransfer.data.drawing import Blobs

# Pixels between the nodes at which slow fields are computed.
NODE = 4
# Of threads: their spacing and length in micrometres, how many of each there
# are until they come again, the entries from one to the next, and their unit.
_APART, _LONG, _COUNT, _FINE, _UNIT = 1.5, 11.0, (512, 128), 8, 1 / 24


def _mixed(value: np.ndarray) -> np.ndarray:
  """SplitMix64's finaliser: (...) uint64 -> uint64."""
  value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return value ^ (value >> np.uint64(31))


def uniforms(
  key: int, column: np.ndarray, row: np.ndarray, count: int
) -> np.ndarray:
  """Returns (count, ...) numbers in [0, 1) that depend on key and cell."""
  golden = np.uint64(0x9E3779B97F4A7C15)
  start = np.uint64(key % 2**64)
  cell = _mixed(column.astype(np.int64).astype(np.uint64) + start)
  cell = _mixed(cell + golden * row.astype(np.int64).astype(np.uint64))
  stream = np.arange(1, count + 1, dtype=np.uint64) * golden
  bits = _mixed(cell + stream.reshape(-1, *[1] * cell.ndim))
  return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _normals(uniforms: np.ndarray) -> np.ndarray:
  """Turns (3, ...) uniform numbers into (...) nearly normal ones."""
  return 2 * (uniforms.sum(0) - 1.5)


class Field:
  """A smooth field of about unit variance over the plane.

  Args:
    key: which.
    spacing: of its lattice, micrometres.
  """

  def __init__(self, key: int, spacing: float):
    self._key = key
    self._spacing = spacing

  def over(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns (len(y), len(x)) float32 on the grid of these places."""
    first_x, weights_x = drawing.spline(x / self._spacing)
    first_y, weights_y = drawing.spline(y / self._spacing)
    # Those that are needed, which are few also where a grid is coarse.
    columns = np.unique(first_x + np.arange(4)[:, None])
    rows = np.unique(first_y + np.arange(4)[:, None])
    knots = self._knots(columns, rows[:, None])
    at_x = np.searchsorted(columns, first_x)
    at_y = np.searchsorted(rows, first_y)
    # The few rows of knots first: whole lines are then copied.
    lines = weights_x[0] * knots[:, at_x]
    for k in range(1, 4):
      lines += weights_x[k] * knots[:, at_x + k]
    field = weights_y[0][:, None] * lines[at_y]
    for k in range(1, 4):
      field += weights_y[k][:, None] * lines[at_y + k]
    return field

  def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns (n,) float32 at n places."""
    first_x, weights_x = drawing.spline(x / self._spacing)
    first_y, weights_y = drawing.spline(y / self._spacing)
    steps = np.arange(4)[:, None]
    knots = self._knots(first_x + steps, (first_y + steps)[:, None])
    return (weights_y[:, None] * weights_x * knots).sum((0, 1))

  def _knots(self, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    column, row = np.broadcast_arrays(column, row)
    knots = _normals(uniforms(self._key, column, row, 3))
    # A cubic B-spline halves the deviation.
    return (2.1 * knots).astype(np.float32)


class Grid(NamedTuple):
  """Nodes of a part of a slide, in micrometres from the slide's corner."""

  x: np.ndarray  # (n,)
  y: np.ndarray  # (n,)

  def zeros(self) -> np.ndarray:
    """Returns (n, n) float32 as deep outside of everything as can be."""
    return np.full((len(self.y), len(self.x)), -1e3, np.float32)

  def holds(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns which places lie between the nodes."""
    inside = (x > self.x[0]) & (x < self.x[-1])
    return inside & (y > self.y[0]) & (y < self.y[-1])

  def nearest(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the nodes nearest to places, as indices of rows and columns."""
    step = self.x[1] - self.x[0]
    column = np.rint((x - self.x[0]) / step).astype(np.int64)
    row = np.rint((y - self.y[0]) / step).astype(np.int64)
    last = len(self.x) - 1
    return np.clip(row, 0, last), np.clip(column, 0, last)


def reach(blobs: Blobs) -> np.ndarray:
  """Returns (n,) how far from its centre each blob may reach."""
  return np.maximum(blobs.a, blobs.b) * (1 + np.abs(blobs.wave).sum(1))


def depth(
  blobs: Blobs,
  grid: Grid,
  less: np.ndarray | float = 0.0,
  beyond: float = 8.0,
) -> np.ndarray:
  """Returns how deep inside the nearest blob nodes are, negative outside.

  Args:
    blobs: n of them.
    grid: where.
    less: (n,) what is taken off the depth of each.
    beyond: how far outside it is to be right, micrometres.
  """
  deepest = grid.zeros()
  far = reach(blobs) + beyond
  taken = np.broadcast_to(less, far.shape)
  left, right = blobs.x - far, blobs.x + far
  top, bottom = blobs.y - far, blobs.y + far
  near = (right > grid.x[0]) & (left < grid.x[-1])
  near &= (bottom > grid.y[0]) & (top < grid.y[-1])
  for i in np.flatnonzero(near):
    columns = slice(*np.searchsorted(grid.x, [left[i], right[i]]))
    rows = slice(*np.searchsorted(grid.y, [top[i], bottom[i]]))
    dx = (grid.x[columns] - blobs.x[i]).astype(np.float32)
    dy = (grid.y[rows] - blobs.y[i]).astype(np.float32)[:, None]
    u, v = turned(dx, dy, np.float32(-blobs.angle[i]))
    a, b = np.float32(blobs.a[i]), np.float32(blobs.b[i])
    z = u / a + 1j * (v / b)
    rho = np.abs(z) + np.float32(1e-6)
    wavy = drawing.outline(z / rho, blobs.wave[i].astype(np.complex64))
    inside = (wavy - rho) * np.sqrt(a * b) - np.float32(taken[i])
    part = deepest[rows, columns]
    np.maximum(part, inside, out=part)
  return deepest


def waves(u: np.ndarray, amount: float) -> np.ndarray:
  """Turns (6, n) uniform numbers into (n, 3) harmonics of an outline."""
  amplitude = 2 * amount * u[:3] * np.array([[1.0], [0.8], [0.5]])
  return (amplitude * np.exp(2j * np.pi * u[3:])).T


def turned(
  along: np.ndarray, across: np.ndarray, angle: np.ndarray | np.floating
) -> tuple[np.ndarray, np.ndarray]:
  """Returns x and y of what lies along and across an axis at an angle."""
  cos, sin = np.cos(angle), np.sin(angle)
  return along * cos - across * sin, along * sin + across * cos


def cells(low: float, high: float, spacing: float) -> np.ndarray:
  """Returns the cells of a lattice that reach into a stretch."""
  return np.arange(math.floor(low / spacing), math.floor(high / spacing) + 1)


class Threads:
  """Wavy threads along an angle.

  A table of them wraps around, and is as fine as to be looked up without
  interpolation.

  Args:
    rng: what they are drawn from.
    angle: where they run, radians.
  """

  def __init__(self, rng: np.random.Generator, angle: float):
    self._angle = angle
    table = rng.standard_normal(_COUNT, dtype=np.float32)
    for _ in range(2):
      # Entries between two along the first axis, which is the second then.
      rise = np.roll(table, -1, 0) - table
      part = np.arange(_FINE, dtype=np.float32) / _FINE
      table = table[:, None] + part[:, None] * rise[:, None]
      table = table.reshape(-1, table.shape[-1]).T
    # Between two of them random numbers deviate less.
    whole = np.rint(1.4 * table / _UNIT)
    self._shape = table.shape
    self._table = np.clip(whole, -127, 127).astype(np.int8).ravel()

  def over(self, x: np.ndarray, y: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Returns (len(y), len(x)) float32 of about unit deviation.

    Args:
      x: of a grid, micrometres.
      y: likewise.
      warp: (len(y), len(x)) how far threads are moved across.
    """
    cos, sin = math.cos(self._angle), math.sin(self._angle)
    along = _plane(x * cos, y * sin, _LONG * _COUNT[1])
    along *= np.float32(_FINE / _LONG)
    across = _plane(-x * sin, y * cos, _APART * _COUNT[0])
    across += warp
    across *= np.float32(_FINE / _APART)
    rows, columns = self._shape
    place = across.astype(np.int32) & (rows - 1)
    place *= columns
    place += along.astype(np.int32) & (columns - 1)
    return self._table.take(place) * np.float32(_UNIT)


def _plane(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
  """Returns x + y on a grid, (len(y), len(x)) float32, modulo a period."""
  # Two more, so that nothing that is added brings it below zero.
  whole = (math.floor((x[0] + y[0]) / period) - 2) * period
  return (x - whole).astype(np.float32) + y.astype(np.float32)[:, None]


def between(nodes: np.ndarray) -> np.ndarray:
  """Returns the pixels between nodes, (n + 1, n + 1) -> (4 n, 4 n)."""
  at = (np.arange(NODE, dtype=np.float32) + np.float32(0.5)) / NODE
  count = len(nodes) - 1
  rise = np.diff(nodes, axis=0)
  lines = nodes[:-1, None] + at[:, None] * rise[:, None]
  lines = lines.reshape(count * NODE, count + 1)
  rise = np.diff(lines, axis=1)
  return (lines[:, :-1, None] + rise[..., None] * at).reshape(count * NODE, -1)
