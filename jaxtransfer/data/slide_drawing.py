"""A slide of drawn tissue, any part of it at any time.

A few pieces of tissue lie on glass: glands whose nuclei stand in a ring around
a lumen, stroma of wavy fibres between them, holes, follicles of small dark
lymphocytes. A slide may hold a planted lesion: a region, under 3 % of the
tissue, without glands, whose nuclei are larger, denser and darker. Nothing else
differs, and follicles, which are as blue, lie in slides of both kinds.

What is at a place is a function of the slide's seed and the place alone, in
micrometres: nuclei and glands stand on lattices whose cells are hashed, and
fields are splines over lattices of hashed numbers. So parts can be drawn in any
order, fit each other, and a slide need never be in memory.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxtransfer.data import drawing
from jaxtransfer.data.drawing import Blobs, Look, Nuclei

# Part of the recipe that names cached slides: whoever changes a pixel raises
# it, so that the older drawing is not taken for the new one.
VERSION = 1

# Pixels between the nodes at which slow fields are computed.
_NODE = 4
# Around a part, for the blur.
_PAD = _NODE
# How far outside a part the centre of a nucleus in it may lie, micrometres.
_MARGIN = 16.0
# Spacings of lattices, micrometres.
_GLANDS, _STROMA, _FOLLICLE, _LESION = 88.0, 10.5, 6.2, 9.4
# Of the table of threads: entries between two random numbers, and their unit.
_FINE, _THREAD = 8, 1 / 24
_CORNERS = 24  # of a lesion's polygon, for each of its six longest waves


class Regions(NamedTuple):
  """What is placed by hand on a slide, in micrometres from its corner."""

  pieces: Blobs
  follicles: Blobs
  lesions: Blobs


class Temper(NamedTuple):
  """What varies from slide to slide, whatever its label."""

  fibre: float  # radians: where the stroma runs
  loose: float  # how loose the stroma is
  cytoplasm: float  # eosin of the epithelium
  basophil: float  # hematoxylin of its cytoplasm
  glandular: float  # more or fewer glands
  clumping: float  # of chromatin


# --- numbers by place --------------------------------------------------------


def _mixed(value: np.ndarray) -> np.ndarray:
  """SplitMix64's finaliser: (...) uint64 -> uint64."""
  value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return value ^ (value >> np.uint64(31))


def _uniforms(
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


class _Field:
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
    columns = np.arange(first_x[0], first_x[-1] + 4)
    rows = np.arange(first_y[0], first_y[-1] + 4)[:, None]
    knots = self._knots(columns, rows)
    at_y, at_x = first_y - first_y[0], first_x - first_x[0]
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
    knots = _normals(_uniforms(self._key, column, row, 3))
    # A cubic B-spline halves the deviation.
    return (2.1 * knots).astype(np.float32)


class _Grid(NamedTuple):
  """Nodes of a part of a slide, in micrometres from the slide's corner."""

  x: np.ndarray  # (n,)
  y: np.ndarray  # (n,)

  def zeros(self) -> np.ndarray:
    """Returns (n, n) float32 as deep outside of everything as can be."""
    return np.full((len(self.y), len(self.x)), -1e3, np.float32)

  def nearest(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the nodes nearest to places, as indices of rows and columns."""
    step = self.x[1] - self.x[0]
    column = np.rint((x - self.x[0]) / step).astype(np.int64)
    row = np.rint((y - self.y[0]) / step).astype(np.int64)
    last = len(self.x) - 1
    return np.clip(row, 0, last), np.clip(column, 0, last)


def _reach(blobs: Blobs) -> np.ndarray:
  """Returns (n,) how far from its centre each blob may reach."""
  return np.maximum(blobs.a, blobs.b) * (1 + np.abs(blobs.wave).sum(1))


def _depth(
  blobs: Blobs,
  grid: _Grid,
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
  depth = grid.zeros()
  reach = _reach(blobs) + beyond
  taken = np.broadcast_to(less, reach.shape)
  near = (
    (blobs.x + reach > grid.x[0])
    & (blobs.x - reach < grid.x[-1])
    & (blobs.y + reach > grid.y[0])
    & (blobs.y - reach < grid.y[-1])
  )
  for i in np.flatnonzero(near):
    columns = slice(
      *np.searchsorted(grid.x, [blobs.x[i] - reach[i], blobs.x[i] + reach[i]])
    )
    rows = slice(
      *np.searchsorted(grid.y, [blobs.y[i] - reach[i], blobs.y[i] + reach[i]])
    )
    dx = (grid.x[columns] - blobs.x[i]).astype(np.float32)
    dy = (grid.y[rows] - blobs.y[i]).astype(np.float32)[:, None]
    cos, sin = (
      np.float32(np.cos(blobs.angle[i])),
      np.float32(np.sin(blobs.angle[i])),
    )
    a, b = np.float32(blobs.a[i]), np.float32(blobs.b[i])
    z = (dx * cos + dy * sin) / a + 1j * ((dy * cos - dx * sin) / b)
    rho = np.abs(z) + np.float32(1e-6)
    wavy = drawing.outline(z / rho, blobs.wave[i].astype(np.complex64))
    inside = (wavy - rho) * np.sqrt(a * b) - np.float32(taken[i])
    np.maximum(depth[rows, columns], inside, out=depth[rows, columns])
  return depth


def _waves(uniforms: np.ndarray, amount: float) -> np.ndarray:
  """Turns (6, ...) uniform numbers into (..., 3) harmonics of an outline."""
  amplitude = (
    amount
    * 2
    * uniforms[:3]
    * np.reshape([1.0, 0.8, 0.5], (3, *[1] * (uniforms.ndim - 1)))
  )
  return np.moveaxis(amplitude * np.exp(2j * np.pi * uniforms[3:]), 0, -1)


def _turned(
  along: np.ndarray, across: np.ndarray, angle: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  cos, sin = np.cos(angle), np.sin(angle)
  return along * cos - across * sin, along * sin + across * cos


# --- the slide ---------------------------------------------------------------


class DrawnSlide:
  """A square slide.

  Args:
    seed: of the slide; another seed is another slide.
    side: of level 0, pixels.
    mpp: micrometres per pixel of level 0.
    look: of its patient and site.
    lesion: whether there is one.

  Attributes:
    side: of level 0, pixels.
    mpp: micrometres per pixel.
    regions: pieces of tissue, follicles and lesions.
    tissue_area: square micrometres.
  """

  def __init__(
    self, seed: int, side: int, mpp: float, look: Look, lesion: bool
  ):
    self.side = side
    self.mpp = mpp
    self._look = look
    self._field = side * mpp
    rng = np.random.Generator(
      np.random.PCG64(np.random.SeedSequence([seed, 1]))
    )
    self._key = int(rng.integers(2**62))
    self._temper = Temper(
      fibre=rng.uniform(0, np.pi),
      loose=rng.uniform(0.18, 0.36),
      cytoplasm=rng.uniform(0.45, 0.62),
      basophil=rng.uniform(0.06, 0.16),
      glandular=rng.uniform(-0.3, 0.5),
      clumping=rng.uniform(0.3, 0.7),
    )
    self._threads = _threads(rng)
    grain = look.noise * rng.standard_normal((512, 512, 3), dtype=np.float32)
    self._grain = np.tile(grain, (2, 2, 1))
    self._tissue_fields = [
      (_Field(self._key + 1, 300.0), min(60.0, 0.03 * self._field)),
      (_Field(self._key + 2, 60.0), 14.0),
      (_Field(self._key + 3, 17.0), 4.0),
    ]
    self._holes = _Field(self._key + 4, 120.0)
    self._glandular = _Field(self._key + 5, 420.0)
    self._strands = _Field(self._key + 10, 24.0)
    self._slow = _Field(self._key + 6, 60.0)
    self._bends = _Field(self._key + 7, 110.0)
    self._warps = _Field(self._key + 8, 9.0)
    self._fine = _Field(self._key + 9, 1.7)
    self.regions = Regions(self._place_pieces(rng), *[_none()] * 2)
    self.tissue_area, inside = self._survey()
    follicles = self._place_follicles(rng, inside)
    self.regions = self.regions._replace(follicles=follicles)
    # Of its own, so that the rest is the same with and without.
    rng = np.random.Generator(
      np.random.PCG64(np.random.SeedSequence([seed, 2]))
    )
    if lesion:
      lesions = self._place_lesions(rng, inside)
      self.regions = self.regions._replace(lesions=lesions)

  def _place_pieces(self, rng: np.random.Generator) -> Blobs:
    count = int(rng.integers(2, 5))
    field = self._field
    radius = (
      field * np.sqrt(0.5 / (count * np.pi)) * rng.uniform(0.8, 1.15, count)
    )
    points = drawing.spread(
      rng.uniform(0.2, 0.8, (count, 2)) * field, radius * 1.1, 12
    )
    pieces = drawing.blobs(
      points,
      radius,
      rng.uniform(1.0, 1.7, count),
      rng.uniform(0, np.pi, count),
      drawing.waves(rng, count, 0.12),
    )
    # Glass all around them, where there is room.
    room = np.minimum(_reach(pieces) + 0.02 * field, 0.49 * field)
    x, y = (np.clip(at, room, field - room) for at in pieces[:2])
    return pieces._replace(x=x, y=y)

  def _survey(self) -> tuple[float, np.ndarray]:
    """Returns the tissue's area, and (n, 3) x, y and depth of places in it."""
    nodes = (np.arange(256) + 0.5) / 256 * self._field
    grid = _Grid(nodes, nodes)
    depth = self._tissue(grid)
    row, column = np.nonzero(depth > 0)
    places = np.stack([nodes[column], nodes[row], depth[row, column]], 1)
    return len(row) / depth.size * self._field**2, places

  def _place_follicles(
    self, rng: np.random.Generator, inside: np.ndarray
  ) -> Blobs:
    count = int(rng.poisson(self.tissue_area / 4e5))
    deep = inside[inside[:, 2] > 25]
    if not count or not len(deep):
      return _none()
    return drawing.blobs(
      deep[rng.integers(0, len(deep), count), :2],
      rng.uniform(40, 85, count),
      rng.uniform(1.0, 1.5, count),
      rng.uniform(0, np.pi, count),
      drawing.waves(rng, count, 0.08),
    )

  def _place_lesions(
    self, rng: np.random.Generator, inside: np.ndarray
  ) -> Blobs:
    count = int(rng.integers(1, 3))
    area = self.tissue_area * rng.uniform(0.014, 0.024)
    part = rng.dirichlet(np.full(count, 6.0))
    radius = np.sqrt(area * part / np.pi)
    points = []
    for size in radius:
      # Inside the tissue, or as far as it goes.
      deep = inside[inside[:, 2] > min(0.9 * size, inside[:, 2].max() * 0.8)]
      points.append(deep[rng.integers(0, len(deep)), :2])
    return drawing.blobs(
      np.stack(points),
      radius,
      rng.uniform(1.0, 1.6, count),
      rng.uniform(0, np.pi, count),
      drawing.waves(rng, count, 0.1),
    )

  def outlines(self) -> list[np.ndarray]:
    """Returns the outline of every lesion, (M, 2) float64 level-0 pixels."""
    blobs = self.regions.lesions
    turn = np.arange(6 * _CORNERS) / (6 * _CORNERS) * 2 * np.pi
    z = np.exp(1j * turn)
    found = []
    for i in range(len(blobs.x)):
      wavy = drawing.outline(z, blobs.wave[i])
      x, y = _turned(
        blobs.a[i] * wavy * z.real, blobs.b[i] * wavy * z.imag, blobs.angle[i]
      )
      corners = np.stack([blobs.x[i] + x, blobs.y[i] + y], 1)
      found.append(corners / self.mpp)
    return found

  def region(self, x: int, y: int, size: int) -> np.ndarray:
    """Draws a part of level 0.

    Args:
      x: left, pixels.
      y: top, pixels.
      size: side, pixels.

    Returns:
      (size, size, 3) uint8 RGB.
    """
    left, top = x - x % _NODE, y - y % _NODE
    whole = -(-(size + _NODE) // _NODE) * _NODE
    right, below = x - left, y - top
    part = self._part(left, top, whole)
    return part[below : below + size, right : right + size]

  def tile(self, column: int, row: int, size: int) -> np.ndarray:
    """Draws a tile of level 0, whose side is a multiple of 4 pixels."""
    return self._part(column * size, row * size, size)

  def _part(self, left: int, top: int, size: int) -> np.ndarray:
    stains = self._stains(left - _PAD, top - _PAD, size + 2 * _PAD)
    if stains is None:
      image = np.empty((size, size, 3), np.float32)
      image[:] = self._look.white
    else:
      image = self._light(*stains)
    # Half a level more, since what follows the point is cut off.
    image += np.float32(0.5)
    image += self._grain_at(left, top, size)
    np.clip(image, 0, 255, out=image)
    return image.astype(np.uint8)

  def _grain_at(self, left: int, top: int, size: int) -> np.ndarray:
    rows, columns = top % 512, left % 512
    if size <= 512:
      return self._grain[rows : rows + size, columns : columns + size]
    steps = np.arange(size)
    return self._grain[(rows + steps[:, None]) % 512, (columns + steps) % 512]

  def _light(self, hematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    """Returns (S, S, 3) float32 of two (S + 2 PAD)-sided stains."""
    look = self._look
    blurred = [
      _blur(stain, look.blur / self.mpp) for stain in (hematoxylin, eosin)
    ]
    image = np.empty((*blurred[0].shape, 3), np.float32)
    for channel in range(3):
      density = blurred[0] * np.float32(-look.gamma * look.vectors[0, channel])
      density += blurred[1] * np.float32(-look.gamma * look.vectors[1, channel])
      np.exp(density, out=density)
      np.multiply(
        density, np.float32(look.white[channel]), out=image[..., channel]
      )
    return image

  # --- fields ----------------------------------------------------------------

  def _tissue(self, grid: _Grid) -> np.ndarray:
    most = 3 * sum(amount for _, amount in self._tissue_fields)
    depth = _depth(self.regions.pieces, grid, beyond=2 * most)
    if depth.max() < -most:
      return depth
    for field, amount in self._tissue_fields:
      uneven = np.clip(field.over(grid.x, grid.y), -3, 3)
      depth += np.float32(amount) * uneven
    holes = np.float32(40) * (
      np.float32(1.9) - self._holes.over(grid.x, grid.y)
    )
    return np.minimum(depth, holes)

  def _nests(self, grid: _Grid) -> np.ndarray:
    """Returns the depth in nests of a lesion, which has stroma between them."""
    depth = _depth(self.regions.lesions, grid)
    if depth.max() < 0:
      return depth
    nests = np.float32(9) * (
      self._strands.over(grid.x, grid.y) + np.float32(0.9)
    )
    return np.minimum(depth, nests)

  def _glands(self, grid: _Grid) -> tuple[Blobs, np.ndarray, np.ndarray]:
    """Returns glands that may reach a grid, their walls and their cells."""
    reach = 60.0
    columns = _cells(grid.x[0] - reach, grid.x[-1] + reach, _GLANDS)
    rows = _cells(grid.y[0] - reach, grid.y[-1] + reach, _GLANDS)
    column, row = (a.ravel() for a in np.meshgrid(columns, rows))
    u = _uniforms(self._key + 20, column, row, 16)
    x = (column + 0.28 + 0.44 * u[0]) * _GLANDS
    y = (row + 0.28 + 0.44 * u[1]) * _GLANDS
    wanted = 1.1 + self._temper.glandular + self._glandular.at(x, y) > u[2]
    radius = 25 + 14 * u[3]
    points = np.stack([x, y], 1)
    glands = drawing.blobs(
      points, radius, 1 + 0.5 * u[4], np.pi * u[5], _waves(u[6:12], 0.055)
    )
    wall = 13 + 5 * u[12]
    kept = wanted & self._free(glands)
    return (
      Blobs(*(value[kept] for value in glands)),
      wall[kept],
      np.stack([column, row], 1)[kept],
    )

  def _free(self, glands: Blobs) -> np.ndarray:
    """Returns which of the glands no lesion and no follicle comes close to."""
    free = np.ones(len(glands.x), bool)
    for others in (self.regions.lesions, self.regions.follicles):
      apart = np.hypot(
        glands.x[:, None] - others.x, glands.y[:, None] - others.y
      )
      free &= (
        apart > _mean_radius(others) + 0.4 * _mean_radius(glands)[:, None]
      ).all(1)
    return free

  def _stains(
    self, left: int, top: int, size: int
  ) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns hematoxylin and eosin, (size, size) float32; None = all glass."""
    mpp, temper = self.mpp, self._temper
    margin = -(-math.ceil(_MARGIN / mpp) // _NODE)
    steps = np.arange(-margin, size // _NODE + margin + 1) * _NODE
    grid = _Grid((left + steps) * mpp, (top + steps) * mpp)
    tissue = self._tissue(grid)
    if tissue.max() < -2:
      return None
    x = (left + np.arange(size) + 0.5) * mpp
    y = (top + np.arange(size) + 0.5) * mpp
    softness = max(1.2, 1.2 * mpp)

    def pixels(nodes: np.ndarray) -> np.ndarray:
      return _between(nodes[margin:-margin, margin:-margin])

    glands, wall, cells = self._glands(grid)
    gland = _depth(glands, grid)
    lumen = _depth(glands, grid, wall)
    lesion = self._nests(grid)
    follicle = _depth(self.regions.follicles, grid)
    slow, fine = self._slow.over(x, y), self._fine.over(x, y)
    bend = self._bends.over(x, y)
    warp = 20 * bend + np.float32(0.9) * self._warps.over(x, y)

    fibres = self._fibres(x, y, warp)
    loose = np.float32(temper.loose)
    eosin = 0.62 * np.exp(loose * fibres - loose + np.float32(0.12) * slow)
    hematoxylin = np.full_like(eosin, 0.03)
    epithelium = drawing.edge(pixels(np.maximum(gland, lesion)), softness)
    cytoplasm = np.float32(temper.cytoplasm) * (
      1 + np.float32(0.10) * fine + np.float32(0.08) * slow
    )
    eosin += epithelium * (cytoplasm - eosin)
    basophil = np.float32(temper.basophil) * (1 + np.float32(0.3) * fine)
    hematoxylin += epithelium * (basophil - hematoxylin)
    if follicle.max() > -softness:
      inside = drawing.edge(pixels(follicle), 8.0)
      eosin += inside * (np.float32(0.3) - eosin)
      hematoxylin += inside * (np.float32(0.1) - hematoxylin)
    if lumen.max() > -softness:
      inside = 1 - drawing.edge(pixels(lumen), softness)
      eosin *= inside
      hematoxylin *= inside

    nuclei = [
      *self._gland_nuclei(glands, cells, grid, tissue),
      *self._stroma_nuclei(
        grid, tissue, np.maximum(np.maximum(gland, follicle), lesion)
      ),
      *self._follicle_nuclei(
        grid, tissue, np.minimum(follicle, -np.maximum(lesion, gland))
      ),
      *self._lesion_nuclei(grid, tissue, lesion),
    ]
    nuclei = [_moved(group, left * mpp, top * mpp) for group in nuclei]
    if nuclei:
      once, nuclear = drawing.stain_nuclei(nuclei, fine, mpp, softness)
      hematoxylin *= 1 - once
      hematoxylin += np.float32(1.15) * nuclear
      eosin *= 1 - np.float32(0.55) * once
    if tissue.min() < 4:
      inside = drawing.edge(pixels(tissue), 1.5 * softness)
      eosin *= inside
      hematoxylin *= inside
    look = self._look
    return look.hematoxylin * hematoxylin, look.eosin * eosin

  def _fibres(
    self, x: np.ndarray, y: np.ndarray, warp: np.ndarray
  ) -> np.ndarray:
    """Wavy fibres: (len(y), len(x)) of about unit deviation."""
    cos, sin = math.cos(self._temper.fibre), math.sin(self._temper.fibre)
    # Modulo the table's size, which single precision needs on a large slide.
    along = np.float32(_FINE / 11) * _plane(x * cos, y * sin, 11 * 128)
    across = _plane(-x * sin, y * cos, 1.5 * 512)
    across += warp
    across *= np.float32(_FINE / 1.5)
    rows, columns = self._threads.shape
    place = across.astype(np.int32) & (rows - 1)
    place *= columns
    place += along.astype(np.int32) & (columns - 1)
    return self._threads.ravel().take(place) * np.float32(_THREAD)

  # --- nuclei ----------------------------------------------------------------

  def _nuclei(
    self,
    u: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    ratio: np.ndarray,
    angle: np.ndarray,
    wave: float,
    darkness: float,
    nucleolus: float,
  ) -> list[Nuclei]:
    """Returns a group, or none; u: (10, n) uniform numbers."""
    if not len(x):
      return []
    blobs = drawing.blobs(
      np.stack([x, y], 1),
      radius * self._look.size,
      ratio,
      angle,
      _waves(u[:6], wave),
    )
    return [
      Nuclei(
        blobs,
        darkness * (0.78 + 0.44 * u[6]),
        np.clip(self._temper.clumping + 0.5 * (u[7] - 0.5), 0, 1),
        np.where(u[8] < nucleolus, 0.3 + 0.6 * u[9], 0.0),
      )
    ]

  def _gland_nuclei(
    self, glands: Blobs, cells: np.ndarray, grid: _Grid, tissue: np.ndarray
  ) -> list[Nuclei]:
    """Nuclei stand in a ring, upright on the outline."""
    radius = _mean_radius(glands)
    count = np.round(2 * np.pi * (radius - 5.5) / 5.9).astype(int)
    if not len(count):
      return []
    number = np.arange(count.max())
    of, i = np.nonzero(number < count[:, None])
    u = _uniforms(self._key + 21, cells[of, 0] * 4096 + i, cells[of, 1], 16)
    turn = 2 * np.pi * (i + 0.6 * (u[10] - 0.5)) / count[of]
    z = np.exp(1j * turn)
    inset = 5.2 + 1.6 * (u[11] - 0.5) + 5.0 * (u[12] < 0.12)
    rho = drawing.outline(z, glands.wave[of]) - inset / radius[of]
    dx, dy = _turned(
      glands.a[of] * rho * z.real, glands.b[of] * rho * z.imag, glands.angle[of]
    )
    x, y = glands.x[of] + dx, glands.y[of] + dy
    kept = _within(x, y, grid) & (tissue[grid.nearest(x, y)] > 2)
    u = u[:, kept]
    lean = np.arctan2(dy, dx)[kept] + 0.5 * (u[13] - 0.5)
    return self._nuclei(
      u,
      x[kept],
      y[kept],
      2.9 + 0.7 * u[14],
      1.25 + 0.55 * u[15],
      lean,
      0.04,
      1.0,
      0.15,
    )

  def _stroma_nuclei(
    self, grid: _Grid, tissue: np.ndarray, other: np.ndarray
  ) -> list[Nuclei]:
    """Spindle cells along the fibres, one in four a round lymphocyte."""
    x, y, u = self._scattered(grid, _STROMA, 22, 0.34)
    place = grid.nearest(x, y)
    kept = (tissue[place] > 3) & (other[place] < -2.5)
    x, y, u = x[kept], y[kept], u[:, kept]
    round_ = u[10] < 0.25
    ratio = np.where(round_, 1 + 0.15 * u[11], 1.9 + 1.5 * u[11])
    angle = self._temper.fibre + 0.9 * (u[12] - 0.5)
    # Where fibres bend, nuclei do.
    angle = angle + 0.35 * self._bends.at(x, y)
    return self._nuclei(
      u, x, y, 2.35 + 0.6 * u[13], ratio, angle, 0.03, 1.0, 0.0
    )

  def _follicle_nuclei(
    self, grid: _Grid, tissue: np.ndarray, follicle: np.ndarray
  ) -> list[Nuclei]:
    """Lymphocytes: small, round, dark and many."""
    if follicle.max() < 0:
      return []
    x, y, u = self._scattered(grid, _FOLLICLE, 23, 0.95)
    place = grid.nearest(x, y)
    kept = (tissue[place] > 3) & (follicle[place] > 2 * u[10])
    x, y, u = x[kept], y[kept], u[:, kept]
    return self._nuclei(
      u, x, y, 2.3 + 0.5 * u[11], 1 + 0.2 * u[12], np.pi * u[13], 0.02, 1.2, 0.0
    )

  def _lesion_nuclei(
    self, grid: _Grid, tissue: np.ndarray, lesion: np.ndarray
  ) -> list[Nuclei]:
    """Large, dark nuclei, close together."""
    if lesion.max() < 0:
      return []
    x, y, u = self._scattered(grid, _LESION, 24, 0.95)
    place = grid.nearest(x, y)
    kept = (tissue[place] > 4) & (lesion[place] > 1)
    x, y, u = x[kept], y[kept], u[:, kept]
    return self._nuclei(
      u, x, y, 3.7 + 2.0 * u[11], 1 + 0.6 * u[12], np.pi * u[13], 0.07, 1.1, 0.7
    )

  def _scattered(
    self, grid: _Grid, spacing: float, key: int, share: float
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns places (n,), (n,) and uniform numbers (14, n) of some cells."""
    columns = _cells(grid.x[0], grid.x[-1], spacing)
    rows = _cells(grid.y[0], grid.y[-1], spacing)
    column, row = (a.ravel() for a in np.meshgrid(columns, rows))
    u = _uniforms(self._key + key, column, row, 17)
    kept = u[14] < share
    u, column, row = u[:, kept], column[kept], row[kept]
    x = (column + 0.15 + 0.7 * u[15]) * spacing
    y = (row + 0.15 + 0.7 * u[16]) * spacing
    return x, y, u


def _threads(rng: np.random.Generator) -> np.ndarray:
  """Returns random threads along the rows of a table that wraps around.

  (512 * 8, 128 * 8) int8, in units of `_THREAD`: as fine as to be looked up
  without interpolation.
  """
  table = rng.standard_normal((512, 128), dtype=np.float32)
  for axis in range(2):
    after = np.roll(table, -1, axis)
    part = (np.arange(_FINE, dtype=np.float32) / _FINE).reshape(-1, 1)
    if axis == 0:
      table = table[:, None] + part * (after - table)[:, None]
      table = table.reshape(-1, 128)
    else:
      table = table[..., None] + part[:, 0] * (after - table)[..., None]
      table = table.reshape(len(table), -1)
  # Between two of them random numbers deviate less.
  return np.clip(np.rint(1.4 * table / _THREAD), -127, 127).astype(np.int8)


def _plane(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
  """Returns x + y on a grid, (len(y), len(x)) float32, modulo a period."""
  # Two more, so that nothing that is added brings it below zero.
  whole = (math.floor((x[0] + y[0]) / period) - 2) * period
  return (x - whole).astype(np.float32) + y.astype(np.float32)[:, None]


def _none() -> Blobs:
  zero = np.zeros(0)
  return Blobs(zero, zero, zero, zero, zero, np.zeros((0, 3), complex))


def _mean_radius(blobs: Blobs) -> np.ndarray:
  return np.sqrt(blobs.a * blobs.b)


def _cells(low: float, high: float, spacing: float) -> np.ndarray:
  return np.arange(math.floor(low / spacing), math.floor(high / spacing) + 1)


def _within(x: np.ndarray, y: np.ndarray, grid: _Grid) -> np.ndarray:
  return (x > grid.x[0]) & (x < grid.x[-1]) & (y > grid.y[0]) & (y < grid.y[-1])


def _moved(group: Nuclei, left: float, top: float) -> Nuclei:
  blobs = group.blobs
  return group._replace(blobs=blobs._replace(x=blobs.x - left, y=blobs.y - top))


def _between(nodes: np.ndarray) -> np.ndarray:
  """Returns the pixels between nodes, (n + 1, n + 1) -> (4 n, 4 n)."""
  at = (np.arange(_NODE, dtype=np.float32) + np.float32(0.5)) / _NODE
  count = len(nodes) - 1
  rise = np.diff(nodes, axis=0)
  lines = nodes[:-1, None] + at[:, None] * rise[:, None]
  lines = lines.reshape(count * _NODE, count + 1)
  rise = np.diff(lines, axis=1)
  return (lines[:, :-1, None] + rise[..., None] * at).reshape(count * _NODE, -1)


def _blur(stain: np.ndarray, sigma: float) -> np.ndarray:
  """Blurs (S + 2 PAD, S + 2 PAD) to (S, S)."""
  # Two passes of (w, 1 - 2 w, w), each of variance 2 w.
  weight = np.float32(min(sigma**2 / 4, 1 / 3))
  for _ in range(2):
    for axis in range(2):
      stain = stain if axis == 0 else stain.T
      inner = stain[1:-1] * (1 - 2 * weight)
      inner += weight * (stain[:-2] + stain[2:])
      stain = inner if axis == 0 else inner.T
  rest = _PAD - 2
  return stain[rest:-rest, rest:-rest]
