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

from jaxtransfer.data import drawing, fields
from jaxtransfer.data.drawing import Blobs, Look, Nuclei

# Part of the recipe that names cached slides: whoever changes a pixel raises
# it, so that the older drawing is not taken for the new one.
VERSION = 1

# Pixels between the nodes at which slow fields are computed.
fields.NODE = 4
# Around a part, for the blur.
_PAD = fields.NODE
# How far outside a part the centre of a nucleus in it may lie, micrometres.
_MARGIN = 16.0
# Spacings of lattices, micrometres.
_GLANDS, _STROMA, _FOLLICLE, _LESION = 88.0, 10.5, 6.2, 9.4
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
    self._threads = fields.Threads(rng, self._temper.fibre)
    grain = look.noise * rng.standard_normal((3, 512, 512), dtype=np.float32)
    self._grain = np.tile(grain, (1, 2, 2)).astype(np.float32)
    self._tissue_fields = [
      (fields.Field(self._key + 1, 300.0), min(60.0, 0.03 * self._field)),
      (fields.Field(self._key + 2, 60.0), 14.0),
      (fields.Field(self._key + 3, 17.0), 4.0),
    ]
    self._holes = fields.Field(self._key + 4, 120.0)
    self._glandular = fields.Field(self._key + 5, 420.0)
    self._strands = fields.Field(self._key + 10, 24.0)
    self._slow = fields.Field(self._key + 6, 60.0)
    self._bends = fields.Field(self._key + 7, 110.0)
    self._warps = fields.Field(self._key + 8, 9.0)
    self._fine = fields.Field(self._key + 9, 1.7)
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
    room = np.minimum(fields.reach(pieces) + 0.02 * field, 0.49 * field)
    x, y = (np.clip(at, room, field - room) for at in pieces[:2])
    return pieces._replace(x=x, y=y)

  def _survey(self) -> tuple[float, np.ndarray]:
    """Returns the tissue's area, and (n, 3) x, y and depth of places in it."""
    nodes = (np.arange(256) + 0.5) / 256 * self._field
    grid = fields.Grid(nodes, nodes)
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
      x, y = fields.turned(
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
    left, top = x - x % fields.NODE, y - y % fields.NODE
    whole = -(-(size + fields.NODE) // fields.NODE) * fields.NODE
    right, below = x - left, y - top
    part = self._part(left, top, whole)
    return part[below : below + size, right : right + size]

  def tile(self, column: int, row: int, size: int) -> np.ndarray:
    """Draws a tile of level 0, whose side is a multiple of 4 pixels."""
    return self._part(column * size, row * size, size)

  def _part(self, left: int, top: int, size: int) -> np.ndarray:
    look = self._look
    stains = self._stains(left - _PAD, top - _PAD, size + 2 * _PAD)
    if stains is not None:
      stains = [_blur(stain, look.blur / self.mpp) for stain in stains]
    grain = self._grain_at(left, top, size)
    image = np.empty((size, size, 3), np.uint8)
    for channel in range(3):
      if stains is None:
        light = np.full((size, size), look.white[channel], np.float32)
      else:
        rates = -look.gamma * look.vectors[:, channel]
        light = stains[0] * np.float32(rates[0])
        light += stains[1] * np.float32(rates[1])
        np.exp(light, out=light)
        light *= np.float32(look.white[channel])
      light += grain[channel]
      # Half a level more, since what follows the point is cut off.
      light += np.float32(0.5)
      image[..., channel] = np.clip(light, 0, 255, out=light)
    return image

  def _grain_at(self, left: int, top: int, size: int) -> np.ndarray:
    rows, columns = top % 512, left % 512
    if size <= 512:
      return self._grain[:, rows : rows + size, columns : columns + size]
    steps = np.arange(size)
    rows, columns = (rows + steps) % 512, (columns + steps) % 512
    return self._grain[:, rows[:, None], columns]

  # --- fields ----------------------------------------------------------------

  def _tissue(self, grid: fields.Grid) -> np.ndarray:
    most = 3 * sum(amount for _, amount in self._tissue_fields)
    depth = fields.depth(self.regions.pieces, grid, beyond=2 * most)
    if depth.max() < -most:
      return depth
    for field, amount in self._tissue_fields:
      uneven = np.clip(field.over(grid.x, grid.y), -3, 3)
      depth += np.float32(amount) * uneven
    holes = np.float32(40) * (
      np.float32(1.9) - self._holes.over(grid.x, grid.y)
    )
    return np.minimum(depth, holes)

  def _nests(self, grid: fields.Grid) -> np.ndarray:
    """Returns the depth in nests of a lesion, which has stroma between them."""
    depth = fields.depth(self.regions.lesions, grid)
    if depth.max() < 0:
      return depth
    nests = np.float32(9) * (
      self._strands.over(grid.x, grid.y) + np.float32(0.9)
    )
    return np.minimum(depth, nests)

  def _glands(self, grid: fields.Grid) -> tuple[Blobs, np.ndarray, np.ndarray]:
    """Returns glands that may reach a grid, their walls and their cells."""
    reach = 60.0
    columns = fields.cells(grid.x[0] - reach, grid.x[-1] + reach, _GLANDS)
    rows = fields.cells(grid.y[0] - reach, grid.y[-1] + reach, _GLANDS)
    column, row = (a.ravel() for a in np.meshgrid(columns, rows))
    u = fields.uniforms(self._key + 20, column, row, 16)
    x = (column + 0.2 + 0.6 * u[0]) * _GLANDS
    y = (row + 0.2 + 0.6 * u[1]) * _GLANDS
    wanted = 1.1 + self._temper.glandular + self._glandular.at(x, y) > u[2]
    radius = 25 + 14 * u[3]
    points = np.stack([x, y], 1)
    glands = drawing.blobs(
      points, radius, 1 + 0.5 * u[4], np.pi * u[5], fields.waves(u[6:12], 0.055)
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
    margin = -(-math.ceil(_MARGIN / mpp) // fields.NODE)
    steps = np.arange(-margin, size // fields.NODE + margin + 1) * fields.NODE
    grid = fields.Grid((left + steps) * mpp, (top + steps) * mpp)
    tissue = self._tissue(grid)
    if tissue.max() < -2:
      return None
    x = (left + np.arange(size) + 0.5) * mpp
    y = (top + np.arange(size) + 0.5) * mpp
    softness = max(1.2, 1.2 * mpp)

    def pixels(nodes: np.ndarray) -> np.ndarray:
      return fields.between(nodes[margin:-margin, margin:-margin])

    glands, wall, cells = self._glands(grid)
    gland = fields.depth(glands, grid)
    lumen = fields.depth(glands, grid, wall)
    lesion = self._nests(grid)
    follicle = fields.depth(self.regions.follicles, grid)
    slow, fine = self._slow.over(x, y), self._fine.over(x, y)
    bend = self._bends.over(x, y)
    warp = 20 * bend + np.float32(0.9) * self._warps.over(x, y)

    fibres = self._threads.over(x, y, warp)
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
      fields.waves(u[:6], wave),
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
    self,
    glands: Blobs,
    cells: np.ndarray,
    grid: fields.Grid,
    tissue: np.ndarray,
  ) -> list[Nuclei]:
    """Nuclei stand in a ring, upright on the outline."""
    radius = _mean_radius(glands)
    count = np.round(2 * np.pi * (radius - 5.5) / 5.9).astype(int)
    if not len(count):
      return []
    number = np.arange(count.max())
    of, i = np.nonzero(number < count[:, None])
    u = fields.uniforms(
      self._key + 21, cells[of, 0] * 4096 + i, cells[of, 1], 16
    )
    turn = 2 * np.pi * (i + 0.6 * (u[10] - 0.5)) / count[of]
    z = np.exp(1j * turn)
    inset = 5.2 + 1.6 * (u[11] - 0.5) + 5.0 * (u[12] < 0.12)
    rho = drawing.outline(z, glands.wave[of]) - inset / radius[of]
    dx, dy = fields.turned(
      glands.a[of] * rho * z.real, glands.b[of] * rho * z.imag, glands.angle[of]
    )
    x, y = glands.x[of] + dx, glands.y[of] + dy
    kept = grid.holds(x, y) & (tissue[grid.nearest(x, y)] > 2)
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
    self, grid: fields.Grid, tissue: np.ndarray, other: np.ndarray
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
    self, grid: fields.Grid, tissue: np.ndarray, follicle: np.ndarray
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
    self, grid: fields.Grid, tissue: np.ndarray, lesion: np.ndarray
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
    self, grid: fields.Grid, spacing: float, key: int, share: float
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns places (n,), (n,) and uniform numbers (14, n) of some cells."""
    columns = fields.cells(grid.x[0], grid.x[-1], spacing)
    rows = fields.cells(grid.y[0], grid.y[-1], spacing)
    column, row = (a.ravel() for a in np.meshgrid(columns, rows))
    u = fields.uniforms(self._key + key, column, row, 17)
    kept = u[14] < share
    u, column, row = u[:, kept], column[kept], row[kept]
    x = (column + 0.15 + 0.7 * u[15]) * spacing
    y = (row + 0.15 + 0.7 * u[16]) * spacing
    return x, y, u


def _none() -> Blobs:
  zero = np.zeros(0)
  return Blobs(zero, zero, zero, zero, zero, np.zeros((0, 3), complex))


def _mean_radius(blobs: Blobs) -> np.ndarray:
  return np.sqrt(blobs.a * blobs.b)


def _moved(group: Nuclei, left: float, top: float) -> Nuclei:
  blobs = group.blobs
  return group._replace(blobs=blobs._replace(x=blobs.x - left, y=blobs.y - top))


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
