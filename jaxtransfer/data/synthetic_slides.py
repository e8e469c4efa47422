"""`synthetic:slides`: whole slides with planted lesions, drawn into a folder.

Patients of several sites have one to three slides each. Half of the patients
are positive: every slide of theirs holds a lesion, one or two regions that
together are under 3 % of the tissue. A site has a stainer and a scanner of its
own (colours, resolution, focus, noise, JPEG quality), and as many positive
patients as any other, so that colour says nothing. What is drawn is said in
`slide_drawing`.

  manifest.csv             path, slide, label, group, site, mpp
  slides/<slide>.tiff      pyramids of JPEG tiles, as OpenSlide opens them
  lesions/<slide>.geojson  the planted regions, for QuPath: level-0 pixels
  lesions.csv              the same, with areas and shares of the tissue
  recipe.json              what was asked for

Slides are drawn tile by tile, level by level, in memory that does not grow with
their size.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import urllib.parse
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer import files, progress
from jaxtransfer.data import drawing, slide_drawing
from jaxtransfer.errors import UsageError

LABELS = ("normal", "tumour")
# The size of a slide is in pixels of this.
NOMINAL_MPP = 0.5
# The scanners: micrometres per pixel and JPEG quality, the fourth at 40x. A
# fifth site has the first one's.
_SCANNERS = ((0.499, 90), (0.4537, 80), (0.3886, 85), (0.2498, 80))
_TILE = 512
# From level to level, and what sides are multiples of, so that levels fit.
_DOWN, _MULTIPLE = 4, 64
_LOWEST = 512
_MOST_SLIDES = 3  # of a patient
_THREADS = 4


class _Slide(NamedTuple):
  """A slide to be drawn."""

  name: str
  patient: int
  site: int
  positive: bool


@dataclasses.dataclass(frozen=True)
class _Recipe:
  """What is asked for; see `write_slides`."""

  slides: int
  patients: int
  sites: int
  size: int
  positive: float
  seed: int

  def described(self) -> dict[str, Any]:
    """Returns all that determines the files."""
    return {"drawing": slide_drawing.VERSION, **dataclasses.asdict(self)}

  def plan(self) -> list[_Slide]:
    """Returns the slides, in the order of patients."""
    rng = _generator(self.seed, "plan")
    site = np.arange(self.patients) % self.sites
    # Evenly within every site, whose patients follow each other here.
    order = np.lexsort([rng.random(self.patients), site])
    positive = np.zeros(self.patients, bool)
    positive[order] = _spread(self.positive, self.patients)
    # A second and a third slide, evenly over sites and labels.
    order = np.lexsort([rng.random(self.patients), positive, site])
    more = self.slides - self.patients
    third = max(more // 3, more - self.patients)
    count = np.ones(self.patients, int)
    for number in (more - third, third):
      several = order[count[order] == count.max()]
      count[several] += _spread(number / len(several), len(several))
    patient = np.repeat(np.arange(self.patients), count)
    return [
      _Slide(f"slide_{i:04d}", int(p), int(site[p]), bool(positive[p]))
      for i, p in enumerate(patient)
    ]


def _spread(share: float, count: int) -> np.ndarray:
  """Returns (count,) bool of which a share is true, evenly along it."""
  taken = np.floor(np.arange(count + 1) * share + 0.5)
  return np.diff(taken) > 0


def parse(source: str) -> dict[str, Any]:
  """Reads the options of a source.

  Args:
    source: `synthetic:slides`, and options after a `?`, as in
      `synthetic:slides?slides=60&patients=30&sites=3&size=4096&seed=0`.

  Returns:
    {option: value} for `write_slides`. Where only `slides` is given, patients
    have two each, and there are no more sites than patients.

  Raises:
    UsageError: there is no such option, or it is no number.
  """
  name = source.removeprefix("synthetic:")
  kind, _, query = name.partition("?")
  known = [field.name for field in dataclasses.fields(_Recipe)]
  if kind != "slides":
    raise UsageError(
      f"{source}: no such slides; the ones there are, are synthetic:slides"
    )
  options: dict[str, Any] = {}
  for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if key not in known:
      raise UsageError(
        f"{source}: no option {key!r}; there are {', '.join(known[:-1])} and"
        f" {known[-1]}"
      )
    number = float if key == "positive" else int
    try:
      if not value.replace(".", "", key == "positive").isdecimal():
        raise ValueError
      options[key] = number(value)
    except ValueError:
      raise UsageError(f"{source}: {key} is {value!r}, not a number") from None
  if "slides" in options:
    options.setdefault("patients", -(-options["slides"] // 2))
  if "patients" in options:
    options.setdefault("sites", max(1, min(3, options["patients"])))
  return options


def cached(source: str) -> pathlib.Path:
  """Draws the slides that a source names into the user's cache, once.

  Args:
    source: as for `parse`.

  Returns:
    The manifest.

  Raises:
    UsageError: the source cannot mean what it says, or the cache cannot be
      written.
  """
  options = parse(source)
  recipe = _checked(**options)
  text = json.dumps(recipe.described(), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return write_slides(files.cache_directory("slides", digest[:16]), **options)


def write_slides(
  directory: str | os.PathLike[str],
  *,
  slides: int = 60,
  patients: int = 30,
  sites: int = 3,
  size: int = 4096,
  positive: float = 0.5,
  seed: int = 0,
) -> pathlib.Path:
  """Draws slides, their manifest and their lesions, or what is missing of them.

  Every file appears whole or not at all, the manifest last; processes that are
  told the same at the same time do it once.

  Args:
    directory: where; it is made.
    slides: how many.
    patients: how many; one to three slides each.
    sites: how many.
    size: side of a slide in pixels of 0.5 um; a scanner with smaller ones has
      more of them.
    positive: share of the patients who are.
    seed: another seed is another hospital.

  Returns:
    The manifest's path.

  Raises:
    UsageError: a number out of range, other slides in the directory, or the
      writer of TIFF is not installed.
    OSError: a file cannot be written.
  """
  recipe = _checked(slides, patients, sites, size, positive, seed)
  directory = pathlib.Path(directory)
  manifest = directory / "manifest.csv"
  with files.lock(directory / ".lock", wait=True):
    _claim(directory, recipe)
    if not manifest.exists():
      plan = recipe.plan()
      lesions = _draw_all(directory, recipe, plan)
      header = ["slide", "lesion", "x", "y", "area_um2", "tissue_share"]
      files.write_csv(directory / "lesions.csv", header, lesions)
      files.write_csv(
        manifest,
        ["path", "slide", "label", "group", "site", "mpp"],
        [
          [
            f"slides/{slide.name}.tiff",
            slide.name,
            LABELS[slide.positive],
            f"patient_{slide.patient:04d}",
            f"site_{slide.site}",
            _scanner(slide.site)[0],
          ]
          for slide in plan
        ],
      )
  return manifest


def _checked(
  slides: int = 60,
  patients: int = 30,
  sites: int = 3,
  size: int = 4096,
  positive: float = 0.5,
  seed: int = 0,
) -> _Recipe:
  for key, value, low, high in (
    ("slides", slides, 1, 100_000),
    ("patients", patients, -(-slides // _MOST_SLIDES), slides),
    ("sites", sites, 1, patients),
    ("size", size, 512, 200_000),
    ("seed", seed, 0, 2**63 - 1),
  ):
    if not isinstance(value, int) or not low <= value <= high:
      why = " for one to three slides each" if key == "patients" else ""
      raise UsageError(
        f"synthetic:slides: {key} is {value!r}; it must be a whole number,"
        f" {low} to {high}{why}"
      )
  if not 0 <= positive <= 1:
    raise UsageError(
      f"synthetic:slides: positive is {positive!r}; it must be 0 to 1"
    )
  return _Recipe(slides, patients, sites, size, float(positive), seed)


def _claim(directory: pathlib.Path, recipe: _Recipe) -> None:
  path = directory / "recipe.json"
  new = recipe.described()
  if not path.exists():
    files.write_json(path, new)
  old = json.loads(path.read_text(encoding="utf-8"))
  differences = [
    f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
    for key in old.keys() | new.keys()
    if old.get(key) != new.get(key)
  ]
  if differences:
    raise UsageError(
      f"{directory} holds other slides ({'; '.join(sorted(differences))});"
      " choose another directory"
    )


def _draw_all(
  directory: pathlib.Path, recipe: _Recipe, plan: list[_Slide]
) -> list[list[Any]]:
  """Draws what is not there yet, and returns the rows of lesions.csv."""
  _tifffile()
  there = sum(_path(directory, slide).exists() for slide in plan)
  with (
    progress.Progress("drawing slides", "slides", len(plan), there) as bar,
    concurrent.futures.ThreadPoolExecutor(
      min(_THREADS, os.cpu_count() or 1)
    ) as pool,
  ):

    def draw(slide: _Slide) -> list[list[Any]]:
      path = _path(directory, slide)
      drawn = _drawn(recipe, slide)
      if not path.exists():
        outlines = directory / "lesions" / f"{slide.name}.geojson"
        files.write_json(outlines, _geojson(drawn))
        _write_tiff(path, drawn, _scanner(slide.site)[1])
        bar.update()
      return _lesions(slide, drawn)

    try:
      # In the order of the plan, whichever is drawn first.
      return [row for rows in pool.map(draw, plan) for row in rows]
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _path(directory: pathlib.Path, slide: _Slide) -> pathlib.Path:
  return directory / "slides" / f"{slide.name}.tiff"


def _generator(seed: int, *key: str | int) -> np.random.Generator:
  words = [k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key]
  sequence = np.random.SeedSequence([seed, *words])
  return np.random.Generator(np.random.PCG64(sequence))


def _scanner(site: int) -> tuple[float, int]:
  return _SCANNERS[site % len(_SCANNERS)]


def _drawn(recipe: _Recipe, slide: _Slide) -> slide_drawing.DrawnSlide:
  """Returns a slide with the look of its site, its patient and itself."""
  look = drawing.draw_look(_generator(recipe.seed, "site", slide.site))
  patient = _generator(recipe.seed, "patient", slide.patient)
  own = _generator(recipe.seed, "slide", slide.name)
  hematoxylin, eosin, size = np.exp(patient.normal(0, [0.10, 0.10, 0.05]))
  thick = np.exp(own.normal(0, 0.08))
  look = look._replace(
    hematoxylin=look.hematoxylin * hematoxylin * thick,
    eosin=look.eosin * eosin * thick,
    size=look.size * size,
  )
  mpp, _ = _scanner(slide.site)
  side = round(recipe.size * NOMINAL_MPP / mpp / _MULTIPLE) * _MULTIPLE
  number = int(own.integers(2**62))
  return slide_drawing.DrawnSlide(number, side, mpp, look, slide.positive)


def _lesions(slide: _Slide, drawn: slide_drawing.DrawnSlide) -> list[list[Any]]:
  rows = []
  for i, corners in enumerate(drawn.outlines()):
    area = _area(corners) * drawn.mpp**2
    x, y = corners.mean(0)
    share = area / drawn.tissue_area
    rows.append(
      [slide.name, i, f"{x:.1f}", f"{y:.1f}", f"{area:.1f}", f"{share:.5f}"]
    )
  return rows


def _area(corners: np.ndarray) -> float:
  """Returns the area of a polygon, (M, 2), by the shoelace formula."""
  x, y = corners.T
  return abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2


def _geojson(drawn: slide_drawing.DrawnSlide) -> dict[str, Any]:
  """Returns lesions as QuPath's annotations."""
  features = []
  for i, corners in enumerate(drawn.outlines()):
    ring = np.round(np.concatenate([corners, corners[:1]]), 2).tolist()
    features.append(
      {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
          "objectType": "annotation",
          "name": f"lesion {i}",
          "classification": {"name": "Tumor", "color": [200, 0, 0]},
        },
      }
    )
  return {"type": "FeatureCollection", "features": features}


# --- files -------------------------------------------------------------------


def _tifffile() -> Any:
  """Imports what writes TIFF, which not everybody has."""
  try:
    import imagecodecs  # noqa: F401  what tifffile needs for JPEG
    import tifffile
  except ImportError as e:
    raise UsageError(
      f"synthetic:slides needs {e.name}; pip install 'jaxtransfer[slides]'"
    ) from None
  return tifffile


def _write_tiff(
  path: pathlib.Path, drawn: slide_drawing.DrawnSlide, quality: int
) -> None:
  """Writes a slide as pages of tiles, from the largest to the smallest."""
  tifffile = _tifffile()
  side = drawn.side
  with files.atomic_path(path) as temporary:
    big = side**2 > 2**30
    count = -(-side // _TILE)
    tiles = (
      drawn.tile(column, row, _TILE)
      for row in range(count)
      for column in range(count)
    )
    with tifffile.TiffWriter(temporary, bigtiff=big) as writer:
      _write_level(writer, tiles, side, drawn.mpp, quality, 0)
    level = 0
    while side > _LOWEST and side % _DOWN == 0:
      side //= _DOWN
      level += 1
      with (
        tifffile.TiffFile(temporary) as written,
        tifffile.TiffWriter(temporary, append=True) as writer,
      ):
        tiles = _reduced(written.pages[level - 1])
        mpp = drawn.mpp * _DOWN**level
        _write_level(writer, tiles, side, mpp, quality, level)


def _write_level(
  writer: Any,
  tiles: Iterator[np.ndarray],
  side: int,
  mpp: float,
  quality: int,
  level: int,
) -> None:
  writer.write(
    tiles,
    shape=(side, side, 3),
    dtype=np.uint8,
    tile=(_TILE, _TILE),
    photometric="rgb",
    compression="jpeg",
    compressionargs={"level": quality},
    resolution=(1e4 / mpp, 1e4 / mpp),
    resolutionunit="CENTIMETER",
    subfiletype=1 if level else 0,
    description=None if level else "drawn by jaxtransfer, of no patient",
    software="jaxtransfer",
    metadata=None,
    maxworkers=1,
  )


def _reduced(page: Any) -> Iterator[np.ndarray]:
  """Yields the tiles of the next level, a quarter of a written page's side."""
  written = -(-page.imagewidth // _TILE)
  part = _TILE // _DOWN
  count = -(-written // _DOWN)
  for row in range(count):
    for column in range(count):
      tile = np.full((_TILE, _TILE, 3), 255, np.uint8)
      for i in range(min(_DOWN, written - row * _DOWN)):
        for j in range(min(_DOWN, written - column * _DOWN)):
          index = (row * _DOWN + i) * written + column * _DOWN + j
          above, left = i * part, j * part
          tile[above : above + part, left : left + part] = _means(
            _decoded(page, index)
          )
      yield tile


def _decoded(page: Any, index: int) -> np.ndarray:
  file = page.parent.filehandle
  file.seek(page.dataoffsets[index])
  data = file.read(page.databytecounts[index])
  tile = page.decode(data, index, jpegtables=page.jpegtables)[0][0]
  # At the ends only what is in the image comes back.
  missing = [(0, _TILE - length) for length in tile.shape[:2]]
  return np.pad(tile, [*missing, (0, 0)], mode="edge")


def _means(tile: np.ndarray) -> np.ndarray:
  """Returns the means of 4 x 4 pixels."""
  total = tile[0::4].astype(np.uint16)
  for i in range(1, 4):
    total += tile[i::4]
  return (
    (total[:, 0::4] + total[:, 1::4] + total[:, 2::4] + total[:, 3::4] + 8) >> 4
  ).astype(np.uint8)
