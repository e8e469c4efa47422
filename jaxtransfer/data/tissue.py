"""`synthetic:tissue`: hematoxylin-and-eosin-like tiles, drawn on demand.

A data set that needs no download and whose truth is known. A tile is a field
of 96 x 96 um. A scene is placed first (nuclei, glands, lumina, stroma, all in
micrometres, so that the tile's size in pixels changes its sharpness and never
its content), then turned into concentrations of the two stains, and those into
light by Beer and Lambert's law,

  I = white * exp(-(c_H * v_H + c_E * v_E)),

with stain vectors between those of Ruifrok and of Macenko. The scene follows
the label. Everything else (stain, white point, gamma, blur, noise, thickness)
follows the patient and the tile, drawn without knowing the label, and every
patient carries every class: colour is a nuisance, not a cue.

Tasks, three classes each:

  gland        how epithelium is arranged: `formed` (closed rings of nuclei
               around one lumen), `fused` (crowded sheets with several punched
               lumina) or `absent` (single cells and cords beside clefts). The
               number of nuclei, the epithelial area and the white area are
               drawn from one distribution for all three.
  density      how many nuclei: `sparse`, `moderate`, `crowded`. How large and
               how dark they are varies as much and independently.
  pleomorphism how unlike the nuclei are: `mild`, `moderate`, `marked`
               variation of size and shape. Their number and total area are
               drawn from one distribution for all three.

Sources: Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23 (2001) 291; Macenko
et al., ISBI 2009. docs/tissue.md holds the measured difficulty.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from jaxtransfer.data import drawing
from jaxtransfer.data.drawing import Blobs, Look
from jaxtransfer.data.sources import Examples
from jaxtransfer.errors import UsageError

# Part of the fingerprint: whoever changes a pixel raises it, so that features
# cached from the older drawing are not taken for the new one's.
VERSION = 1
FIELD = 96.0  # the side of a tile in micrometres


@dataclasses.dataclass
class Scene:
  """What lies in one field, before any stain."""

  gland: Blobs  # epithelial cytoplasm; the union is taken
  lumen: Blobs  # white space: lumina, clefts, vacuoles
  nuclei: Blobs
  darkness: np.ndarray  # (n,) hematoxylin of each nucleus, about 1
  clumping: np.ndarray  # (n,) contrast of its chromatin, 0 to 1
  nucleolus: np.ndarray  # (n,) strength of its nucleolus, 0 = none
  fibre: float  # radians: where the stroma runs


def _generator(*key: int) -> np.random.Generator:
  return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _patient(seed: int, patient: int) -> Look:
  return drawing.draw_look(_generator(seed, zlib.crc32(b"patient"), patient))


# --- placing ----------------------------------------------------------------


def _expel(points: np.ndarray, blobs: Blobs, margin: float) -> np.ndarray:
  """Moves points (n, 2) that lie in a blob to `margin` um beyond its edge."""
  for x, y, a, b, angle in zip(*blobs[:5], strict=True):
    cos, sin = np.cos(angle), np.sin(angle)
    dx, dy = points[:, 0] - x, points[:, 1] - y
    u = (dx * cos + dy * sin) / (a + margin)
    v = (dy * cos - dx * sin) / (b + margin)
    rho = np.hypot(u, v) + 1e-3
    scale = np.maximum(1 / rho, 1)
    points = np.stack([x + dx * scale, y + dy * scale], 1)
  return points


def _stromal_nuclei(
  rng: np.random.Generator, points: np.ndarray, fibre: float, size: float
) -> Blobs:
  """Spindle cells along the fibres, one in three a round lymphocyte."""
  n = len(points)
  round_ = rng.random(n) < 0.35
  ratio = np.where(round_, rng.uniform(1, 1.15, n), rng.uniform(1.8, 3.4, n))
  radius = np.where(round_, 2.9, 2.7) * size * np.exp(rng.normal(0, 0.1, n))
  angle = fibre + rng.normal(0, 0.3, n)
  return drawing.blobs(
    points, radius, ratio, angle, drawing.waves(rng, n, 0.03)
  )


def _appearance(
  rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Darkness, clumping and nucleolus of n nuclei, whatever the label."""
  base = np.exp(rng.normal(0, 0.12))
  darkness = base * np.exp(rng.normal(0, 0.15, n))
  clumping = np.clip(rng.uniform(0.2, 0.8) + rng.normal(0, 0.15, n), 0, 1)
  some = rng.random(n) < rng.uniform(0, 0.5)
  return darkness, clumping, np.where(some, rng.uniform(0.3, 0.9, n), 0.0)


def _gland_scene(rng: np.random.Generator, label: int, patient: Look) -> Scene:
  """Three arrangements of one budget of nuclei, epithelium and white space."""
  # The budget: drawn before the label is looked at.
  sites = int(rng.integers(2, 5))
  area = rng.uniform(0.28, 0.42) * FIELD**2 / sites
  radius = np.sqrt(area / np.pi) * rng.uniform(0.88, 1.12, sites)
  white = rng.uniform(0.12, 0.24)
  hole = radius * np.sqrt(white)
  size = patient.size * np.exp(rng.normal(0, 0.08))
  each = np.round(2 * np.pi * 0.76 * radius / rng.uniform(5.6, 7.0)).astype(int)
  n, stromal = int(each.sum()), int(rng.integers(14, 30))
  fibre = rng.uniform(0, np.pi)
  wave = rng.uniform(0.02, 0.07)
  centres = drawing.spread(
    rng.uniform(8, FIELD - 8, (sites, 2)), radius + 1.5, 8
  )
  centres = np.clip(centres, 6, FIELD - 6)
  lost = rng.uniform(0, 0.15)  # the part of every ring that is disordered

  if label == 0:  # formed
    ratio = rng.uniform(1.0, 1.35, sites)
    angle = rng.uniform(0, np.pi, sites)
    outline = drawing.waves(rng, sites, wave)
    gland = drawing.blobs(centres, radius, ratio, angle, outline)
    lumen = drawing.blobs(centres, hole, ratio, angle, 1.5 * outline)
    owner = np.repeat(np.arange(sites), each)
    turn = (
      np.concatenate([np.arange(k) / k + rng.random() for k in each])
      + rng.normal(0, 0.25, n) / each[owner]
    )
    turn = 2 * np.pi * turn
    depth = 0.77 + rng.normal(0, 0.035, n)
    depth = np.where(rng.random(n) < lost, rng.uniform(0.5, 0.9, n), depth)
    u = depth * gland.a[owner] * np.cos(turn)
    v = depth * gland.b[owner] * np.sin(turn)
    cos, sin = np.cos(angle[owner]), np.sin(angle[owner])
    points = centres[owner] + np.stack(
      [u * cos - v * sin, u * sin + v * cos], 1
    )
    # Columnar nuclei stand on the basement membrane.
    lean = angle[owner] + turn + rng.normal(0, 0.25, n)
  elif label == 1:  # fused
    middle = rng.uniform(0.12, 0.88, 2) * FIELD
    centres = middle + (centres - centres.mean(0)) * 0.3
    centres = drawing.spread(centres, radius * 0.72, 8)
    gland = drawing.blobs(
      centres,
      radius * 1.06,  # what the overlaps take
      rng.uniform(1.0, 1.5, sites),
      rng.uniform(0, np.pi, sites),
      drawing.waves(rng, sites, 0.1),
    )
    owner = np.repeat(np.arange(sites), 2)
    turn = rng.uniform(0, 2 * np.pi, sites).repeat(2)
    turn = turn + np.tile([0, np.pi], sites) + rng.normal(0, 0.4, 2 * sites)
    away = radius[owner] * rng.uniform(0.35, 0.6, 2 * sites)
    part = np.repeat(rng.uniform(0.3, 0.7, sites), 2)
    part[1::2] = 1 - part[1::2]
    lumen = drawing.blobs(
      centres[owner]
      + away[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1),
      hole[owner] * np.sqrt(1.1 * part),
      rng.uniform(1.0, 1.7, 2 * sites),
      rng.uniform(0, np.pi, 2 * sites),
      drawing.waves(rng, 2 * sites, wave),
    )
    owner = np.repeat(np.arange(sites), each)
    far = radius[owner] * 0.92 * np.sqrt(rng.random(n))
    turn = rng.uniform(0, 2 * np.pi, n)
    points = centres[owner] + far[:, None] * np.stack(
      [np.cos(turn), np.sin(turn)], 1
    )
    points = drawing.spread(points, np.full(n, 2.6 * size), 4)
    points = _expel(points, lumen, 3.0)
    lean = rng.uniform(0, np.pi, n)
  else:  # absent
    clefts = int(rng.integers(sites, 2 * sites + 1))
    part = rng.dirichlet(np.full(clefts, 4.0))
    lumen = drawing.blobs(
      rng.uniform(4, FIELD - 4, (clefts, 2)),
      np.sqrt(1.05 * (hole**2).sum() * part),
      rng.uniform(1.0, 2.6, clefts),
      fibre + rng.normal(0, 0.5, clefts),
      drawing.waves(rng, clefts, 0.06),
    )
    # Cords: short files of cells, each a step beside the one before.
    file = rng.integers(0, n // 4, n)
    start = rng.uniform(0, FIELD, (n, 2))[file]
    heading = (fibre + rng.normal(0, 0.7, n))[file]
    step = rng.normal(0, 9.0, n)
    points = start + step[:, None] * np.stack(
      [np.cos(heading), np.sin(heading)], 1
    )
    points = drawing.spread(points, np.full(n, 3.2 * size), 5)
    points = _expel(points, lumen, 4.0)
    lean = heading + rng.normal(0, 0.4, n)
    own = np.sqrt((radius**2 * (1 - white)).sum() / n)
    gland = drawing.blobs(
      points + rng.normal(0, 0.8, (n, 2)),
      own * rng.uniform(1.15, 1.5, n),
      rng.uniform(1.0, 1.6, n),
      lean,
      drawing.waves(rng, n, 0.06),
    )

  epithelial = drawing.blobs(
    points,
    3.6 * size * np.exp(rng.normal(0, 0.1, n)),
    rng.uniform(1.1, 1.6, n),
    lean,
    drawing.waves(rng, n, 0.04),
  )
  around = drawing.spread(
    rng.uniform(0, FIELD, (stromal, 2)), np.full(stromal, 4.0), 2
  )
  if label != 2:
    around = _expel(around, gland, 3.0)
  around = _expel(around, lumen, 3.0)
  nuclei = drawing.joined(
    epithelial, _stromal_nuclei(rng, around, fibre, patient.size)
  )
  return Scene(gland, lumen, nuclei, *_appearance(rng, n + stromal), fibre)


def _ground(
  rng: np.random.Generator,
) -> tuple[Blobs, Blobs, float]:
  """Epithelial islands, white gaps and a fibre direction, without a label."""
  fibre = rng.uniform(0, np.pi)
  islands, gaps = int(rng.integers(1, 4)), int(rng.integers(0, 4))
  gland = drawing.blobs(
    rng.uniform(0, FIELD, (islands, 2)),
    rng.uniform(16, 34, islands),
    rng.uniform(1.0, 2.0, islands),
    rng.uniform(0, np.pi, islands),
    drawing.waves(rng, islands, 0.1),
  )
  gap = drawing.blobs(
    rng.uniform(0, FIELD, (gaps, 2)),
    rng.uniform(3, 8, gaps),
    rng.uniform(1.0, 2.4, gaps),
    fibre + rng.normal(0, 0.6, gaps),
    drawing.waves(rng, gaps, 0.06),
  )
  return gland, gap, fibre


def _scattered(rng: np.random.Generator, n: int, gland: Blobs) -> np.ndarray:
  """Returns n points (n, 2), more of them in the epithelial islands."""
  island = rng.integers(0, len(gland.x), n)
  far = rng.normal(0, 0.6, (n, 2)) * gland.a[island][:, None]
  inside = np.stack([gland.x, gland.y], 1)[island] + far
  stays = (rng.random(n) < rng.uniform(0.2, 0.7))[:, None]
  stays = stays & ((inside > 0) & (inside < FIELD)).all(1, keepdims=True)
  return np.where(stays, inside, rng.uniform(0, FIELD, (n, 2)))


def _density_scene(
  rng: np.random.Generator, label: int, patient: Look
) -> Scene:
  """Few or many nuclei, of a size and darkness that say nothing about it."""
  gland, gap, fibre = _ground(rng)
  typical = (32.0, 46.0, 66.0)[label]
  n = int(round(typical * np.exp(rng.normal(0, 0.13))))
  # Area per nucleus spreads as widely as number does.
  size = patient.size * np.exp(rng.normal(0, 0.2)) * 3.3
  points = _scattered(rng, n, gland)
  points = drawing.spread(points, np.full(n, 0.85 * size), 3)
  points = _expel(points, gap, 3.0)
  spindle = rng.random(n) < rng.uniform(0.1, 0.5)
  ratio = np.where(spindle, rng.uniform(1.6, 2.8, n), rng.uniform(1, 1.5, n))
  angle = np.where(
    spindle, fibre + rng.normal(0, 0.3, n), rng.uniform(0, np.pi, n)
  )
  radius = size * np.exp(rng.normal(0, 0.14, n))
  nuclei = drawing.blobs(
    points, radius, ratio, angle, drawing.waves(rng, n, 0.04)
  )
  darkness, clumping, nucleolus = _appearance(rng, n)
  darkness = darkness * np.exp(rng.normal(0, 0.2))
  return Scene(gland, gap, nuclei, darkness, clumping, nucleolus, fibre)


def _pleomorphism_scene(
  rng: np.random.Generator, label: int, patient: Look
) -> Scene:
  """Nuclei alike or unlike, of one budget of number and total area."""
  gland, gap, fibre = _ground(rng)
  n = int(rng.integers(30, 56))
  size = patient.size * np.exp(rng.normal(0, 0.1)) * 3.7
  spread = (0.13, 0.22, 0.33)[label] * np.exp(rng.normal(0, 0.25))
  wave = (0.04, 0.065, 0.10)[label] * np.exp(rng.normal(0, 0.3))
  longest = (1.4, 1.6, 1.85)[label] * np.exp(rng.normal(0, 0.08))
  radius = np.exp(rng.normal(0, spread, n))
  radius = np.clip(radius, 0.45, 2.2)
  radius *= size * np.sqrt(n / (radius**2).sum())
  points = drawing.spread(_scattered(rng, n, gland), 1.05 * radius, 5)
  points = _expel(points, gap, 3.0)
  nuclei = drawing.blobs(
    points,
    radius,
    rng.uniform(1.0, longest, n),
    rng.uniform(0, np.pi, n),
    drawing.waves(rng, n, wave),
  )
  darkness, clumping, nucleolus = _appearance(rng, n)
  # Unlike nuclei also take the stain unlike one another.
  uneven = (0.08, 0.13, 0.18)[label]
  darkness = darkness * np.exp(rng.normal(-(uneven**2) / 2, uneven, n))
  return Scene(gland, gap, nuclei, darkness, clumping, nucleolus, fibre)


class Task(NamedTuple):
  """A question about a tile and the scene that answers it."""

  classes: tuple[str, ...]
  scene: Callable[[np.random.Generator, int, Look], Scene]


TASKS = {
  "gland": Task(("formed", "fused", "absent"), _gland_scene),
  "density": Task(("sparse", "moderate", "crowded"), _density_scene),
  "pleomorphism": Task(("mild", "moderate", "marked"), _pleomorphism_scene),
}


# --- drawing ----------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _spline(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
  """Where `size` pixels fall among `cells` knots, as `drawing.spline` says."""
  return drawing.spline((np.arange(size) + 0.5) / size * cells)


def _smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
  """A smooth random field (size, size) of about unit variance.

  `cells` knots a side, whatever the size: the field is a thing of the scene
  and not of the pixel grid. Sums of four terms, not a matrix product: a BLAS
  would make the last bit depend on its number of threads.
  """
  knots = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
  first, weights = _spline(size, cells)
  none = np.zeros((), np.float32)
  rows = sum((weights[k][:, None] * knots[first + k] for k in range(4)), none)
  field = sum((weights[k] * rows[:, first + k] for k in range(4)), none)
  return field * np.float32(2.1)  # a cubic B-spline halves the deviation


def _fibres(
  rng: np.random.Generator, size: int, angle: float, warp: np.ndarray
) -> np.ndarray:
  """Wavy fibres along `angle`: (size, size) of about unit deviation."""
  at = ((np.arange(size) + 0.5) / size * FIELD).astype(np.float32)
  cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
  along = at * cos + at[:, None] * sin
  across = at[:, None] * cos - at * sin + warp
  texture = rng.standard_normal((64, 64), dtype=np.float32)
  where = np.stack([across / np.float32(1.5), along / np.float32(16)])
  return ndimage.map_coordinates(
    texture, where, order=1, mode="grid-wrap", prefilter=False
  ) * np.float32(1.4)


def _concentrations(
  rng: np.random.Generator, scene: Scene, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Hematoxylin and eosin in every pixel: two (size, size) float32, >= 0."""
  step = FIELD / size
  softness = max(1.2, 1.2 * FIELD / size)
  slow = _smooth(rng, size, 4)
  fine = _smooth(rng, size, 56)
  warp = np.float32(rng.uniform(1, 4)) * slow + 0.8 * _smooth(rng, size, 14)
  fibres = _fibres(rng, size, scene.fibre, warp)
  # Collagen is dense or loose; loose stroma shows white between its fibres.
  loose = np.float32(rng.uniform(0.15, 0.45))
  stroma = 0.62 * np.exp(loose * fibres - loose + 0.12 * slow)
  cytoplasm = rng.uniform(0.42, 0.68) * (1 + 0.10 * fine + 0.08 * slow)
  basophil = rng.uniform(0.03, 0.20)

  epithelium = drawing.cover(scene.gland, size, step, softness)
  white = drawing.cover(scene.lumen, size, step, softness)
  secretion = np.float32(rng.uniform(0, 0.16) * (rng.random() < 0.5))
  eosin = stroma + epithelium * (cytoplasm - stroma)
  hematoxylin = 0.03 + epithelium * (basophil - 0.03) * (1 + 0.3 * fine)
  eosin = eosin + white * (secretion - eosin)
  hematoxylin = hematoxylin * (1 - white)

  # Red cells lie in small vessels: eosin without hematoxylin.
  cells = int(rng.integers(3, 9)) if rng.random() < 0.3 else 0
  if cells:
    vessel = rng.uniform(8, FIELD - 8, 2) + rng.normal(0, 5, (cells, 2))
    red = drawing.blobs(
      drawing.spread(vessel, np.full(cells, 2.6), 3),
      rng.uniform(2.2, 2.9, cells),
      rng.uniform(1, 1.3, cells),
      rng.uniform(0, np.pi, cells),
      np.zeros((cells, 3)),
    )
    red = drawing.cover(red, size, step, softness)
    eosin = eosin + red * (1.3 - eosin)
    hematoxylin = hematoxylin * (1 - red)

  nuclei = drawing.Nuclei(
    scene.nuclei, scene.darkness, scene.clumping, scene.nucleolus
  )
  once, nuclear = drawing.stain_nuclei([nuclei], fine, step, softness)
  hematoxylin = hematoxylin * (1 - once) + 1.15 * nuclear
  eosin = eosin * (1 - 0.55 * once)

  # Where the section ends there is glass.
  if rng.random() < 0.12:
    turn = rng.uniform(0, 2 * np.pi)
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * FIELD - FIELD / 2
    border = at * np.float32(np.cos(turn)) + at[:, None] * np.sin(turn)
    border = rng.uniform(26, 44) - border.astype(np.float32)
    tissue = drawing.edge(border + 3 * slow + warp * 0.3, softness * 1.5)
    eosin, hematoxylin = eosin * tissue, hematoxylin * tissue
  return (
    np.maximum(hematoxylin, 0).astype(np.float32),
    np.maximum(eosin, 0).astype(np.float32),
  )


def _scan(
  rng: np.random.Generator,
  hematoxylin: np.ndarray,
  eosin: np.ndarray,
  patient: Look,
  light: np.ndarray,
) -> np.ndarray:
  """Light through the stains, the lens and the sensor: (S, S, 3) uint8."""
  size = len(eosin)
  density = (
    hematoxylin[..., None] * patient.vectors[0]
    + eosin[..., None] * patient.vectors[1]
  )
  through = np.exp(-density)
  sigma = patient.blur * size / FIELD
  through = ndimage.gaussian_filter(
    through, (sigma, sigma, 0), mode="nearest", truncate=3.0
  )
  image = (
    patient.white * light[..., None] * through ** np.float32(patient.gamma)
  )
  image = image + patient.noise * rng.standard_normal(
    image.shape, dtype=np.float32
  )
  return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# --- the data set -----------------------------------------------------------


class Tissue(Examples):
  """Tiles of one task, drawn when they are read; made by `open_tissue`.

  Reading is random access: a tile depends on the seed, its patient and its
  number alone, so that more patients or more tiles leave the others as they
  are. Nothing is kept between reads; threads and processes may share it.

  Attributes:
    classes: names of the classes.
    labels: (N,) int32, row -> class.
    groups: N patient names.
    names: N tile names.
  """

  def __init__(
    self, task: str, patients: int, tiles_per_patient: int, size: int, seed: int
  ):
    self.task = task
    self.patients = patients
    self.tiles_per_patient = tiles_per_patient
    self.size = size
    self.seed = seed
    classes = list(TASKS[task].classes)
    patient, tile = np.divmod(
      np.arange(patients * tiles_per_patient), tiles_per_patient
    )
    # Every class in every patient, as evenly as the number of tiles allows,
    # and the patient shifts which class has the tile left over.
    labels = ((tile + patient) % len(classes)).astype(np.int32)
    groups = [f"patient_{p:04d}" for p in patient]
    names = [
      f"tissue/{task}/{group}/tile_{t:04d}"
      for group, t in zip(groups, tile, strict=True)
    ]
    super().__init__(classes, labels, names, groups)

  def __reduce__(self):
    return (
      Tissue,
      (self.task, self.patients, self.tiles_per_patient, self.size, self.seed),
    )

  def digest(self, row: int) -> str:
    """Returns the tile's name: each is drawn from numbers of its own."""
    return self.names[row]

  def fingerprint(self, rows: Sequence[int] | None = None) -> str:
    """Returns a hash of everything that determines the images."""
    recipe = [
      "synthetic:tissue",
      VERSION,
      self.task,
      self.patients,
      self.tiles_per_patient,
      self.size,
      self.seed,
    ]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

  def _scene(self, row: int) -> tuple[np.random.Generator, Scene, Look]:
    """Returns the row's own generator, its scene and its patient."""
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)} tiles")
    patient, tile = divmod(int(row), self.tiles_per_patient)
    look = _patient(self.seed, patient)
    rng = _generator(self.seed, zlib.crc32(self.task.encode()), patient, tile)
    # The tile's own share of the nuisance: drawn before the label is known.
    thick = np.exp(rng.normal(0, 0.10))
    look = look._replace(
      hematoxylin=float(look.hematoxylin * thick * np.exp(rng.normal(0, 0.08))),
      eosin=float(look.eosin * thick * np.exp(rng.normal(0, 0.08))),
      blur=float(look.blur * np.exp(rng.normal(0, 0.15))),
    )
    scene = TASKS[self.task].scene(rng, int(self.labels[row]), look)
    return rng, scene, look

  def concentrations(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tile's hematoxylin and eosin before patient and scanner.

    Args:
      row: 0 <= row < N.

    Returns:
      (c_H, c_E), each (size, size) float32, >= 0; 1 is about what a nucleus
      holds.

    Raises:
      IndexError: there is no such row.
    """
    rng, scene, _ = self._scene(row)
    return _concentrations(rng, scene, self.size)

  def read(self, row: int) -> np.ndarray:
    """Draws a tile.

    Args:
      row: 0 <= row < N.

    Returns:
      (size, size, 3) uint8 RGB.

    Raises:
      IndexError: there is no such row.
    """
    rng, scene, look = self._scene(row)
    hematoxylin, eosin = _concentrations(rng, scene, self.size)
    light = 1 + np.float32(0.012) * _smooth(rng, self.size, 1)
    return _scan(
      rng, hematoxylin * look.hematoxylin, eosin * look.eosin, look, light
    )

  def latents(self, row: int) -> dict[str, float]:
    """Returns what the generator knows about a tile's scene.

    The oracle of this data set: features that no image is needed for, so that
    a task can be shown to be solvable, and how far a reader of pixels is from
    solving it. No entry is the label.

    Args:
      row: 0 <= row < N.

    Returns:
      Name -> value, the same names for every row of a task.

    Raises:
      IndexError: there is no such row.
    """
    _, scene, _ = self._scene(row)
    return _latents(scene)

  def nuisance(self, row: int) -> dict[str, float]:
    """Returns what patient, section and scanner did to a tile.

    Args:
      row: 0 <= row < N.

    Returns:
      Name -> value; independent of the label by construction.

    Raises:
      IndexError: there is no such row.
    """
    _, _, look = self._scene(row)
    return {
      "hematoxylin": look.hematoxylin,
      "eosin": look.eosin,
      "white": float(look.white.mean()),
      "gamma": look.gamma,
      "blur": look.blur,
      "noise": look.noise,
      "size": look.size,
    }


def _latents(scene: Scene) -> dict[str, float]:
  nuclei, lumen = scene.nuclei, scene.lumen
  radius = np.sqrt(nuclei.a * nuclei.b)
  latents = {
    "nuclei": float(len(radius)),
    "nuclear_area": float(np.pi * (radius**2).sum()),
    "nuclear_radius": float(radius.mean()),
    "nuclear_radius_deviation": float(np.log(radius).std()),
    "nuclear_elongation": float((nuclei.a / nuclei.b).mean()),
    "nuclear_elongation_deviation": float(np.log(nuclei.a / nuclei.b).std()),
    "nuclear_irregularity": float(np.abs(nuclei.wave).mean()),
    "darkness": float(scene.darkness.mean()),
    "lumina": float(len(lumen.x)),
    "lumen_area": float(np.pi * (lumen.a * lumen.b).sum()),
  }
  # A ring: the nuclei near a lumen surround it, all at one distance.
  gap, deviation = [], []
  for x, y, a, b, angle in zip(*lumen[:5], strict=True):
    dx, dy = nuclei.x - x, nuclei.y - y
    turn = np.arctan2(dy, dx)
    u = np.cos(turn - angle) / a
    v = np.sin(turn - angle) / b
    distance = np.hypot(dx, dy) - 1 / np.hypot(u, v)
    near = distance < 9
    turns = np.sort(turn[near])
    if len(turns) < 2:
      gap.append(2 * np.pi)
      deviation.append(9.0)
      continue
    gap.append(np.diff(turns, append=turns[0] + 2 * np.pi).max())
    deviation.append(distance[near].std())
  latents["ring_gap"] = float(np.mean(gap)) if gap else 2 * np.pi
  latents["ring_deviation"] = float(np.mean(deviation)) if gap else 9.0
  return latents


def open_tissue(
  task: str = "gland",
  *,
  patients: int = 60,
  tiles_per_patient: int = 25,
  size: int = 96,
  seed: int = 0,
) -> Tissue:
  """Opens the built-in data set; nothing is drawn before it is read.

  Args:
    task: "gland", "density" or "pleomorphism".
    patients: how many patients.
    tiles_per_patient: tiles of each; at least one per class.
    size: height and width in pixels, 16 to 1024; the field stays
      96 um, so that this is sharpness.
    seed: another seed is another hospital: other patients, other tiles.

  Returns:
    The tiles, in the order of patients.

  Raises:
    UsageError: no such task, or a number out of range.
  """
  if task not in TASKS:
    raise UsageError(
      f"synthetic:tissue/{task}: no such task; it has {', '.join(TASKS)}"
    )
  classes = len(TASKS[task].classes)
  for key, value, low, high in (
    ("patients", patients, 1, 100_000),
    ("tiles_per_patient", tiles_per_patient, classes, 100_000),
    ("size", size, 16, 1024),
    ("seed", seed, 0, 2**63 - 1),
  ):
    if not isinstance(value, int) or not low <= value <= high:
      raise UsageError(
        f"synthetic:tissue: {key} is {value!r}; it must be a whole number, "
        f"{low} to {high}"
      )
  return Tissue(task, patients, tiles_per_patient, size, seed)
