"""Slides to tiles: where there is tissue, and which squares of it to look at.

Every slide is a unit, so that any number of processes share the work. Nothing
of a slide is decoded but a small picture of it, unless its tiles are saved or
looked at one by one.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from PIL import Image

from jaxtransfer import (
  configuration,
  errors,
  files,
  preview,
  progress,
  results,
  units,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import (
  feature_files,
  pipeline,
  segmentation,
  slide_sets,
  slides,
  tiling,
)
from jaxtransfer.data import names as naming
from jaxtransfer.report import gallery, page

COLUMNS = tuple(
  name for name in results.TiledSlide.__annotations__ if name != "failed"
)
# Longer sides of a slide's picture, in pixels: the file's and the page's.
_OVERLAY, _SHOWN = 2000, 360
_QUALITY = 90
# Slides whose problems are printed.
_TOLD = 20
# Seconds that a dry run tries slides for.
_TRIED = 20.0
# Of coordinates and of a picture, in bytes; what a JPEG takes of a pixel.
_COORDS, _PICTURE, _JPEG = 30_000, 600_000, 0.4


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config.

  Attributes:
    grid: how slides are cut.
    settings: how tissue is found.
    mask_mpp: in pixels of how many micrometres.
    default_mpp: of slides that do not say; None = they are refused.
    min_sharpness: of tiles; 0 = any.
    save_tiles: whether they are saved.
    readers: threads that read them.
  """

  grid: tiling.Grid
  settings: segmentation.Settings
  mask_mpp: float
  default_mpp: float | None
  min_sharpness: float
  save_tiles: bool
  readers: int


class Unit(NamedTuple):
  """A slide.

  Attributes:
    name: its own, which is its directory's too.
    row: which it is.
  """

  name: str
  row: int


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/tile.py makes it.
    workdir: a claimed directory; what is there already is not done again.

  Returns:
    The exit code: 0, or 1 where slides or tiles could not be read.

  Raises:
    UsageError: the config or the source cannot be used.
    RunError: no slide could be used.
    SystemExit: 143 after SIGTERM.
  """
  plan = make_plan(config)
  of_slides = slide_sets.open_slides(config.data)
  work = _Work(plan, of_slides, workdir.path)
  work.check_unchanged(forget=not workdir.dry)
  if workdir.dry:
    return _preview(config, work)
  if workdir.finished and not _begin_again(work, workdir):
    print(f"{workdir.path} is finished; see {workdir.path}/report.html")
    return workdir.report_failures()
  begun = results.Run(**workdir.begin(f"{pipeline.processors()} processors"))
  grid = plan.grid
  print(
    f"{len(of_slides):,} slide{'s' * (len(of_slides) != 1)}; tiles of"
    f" {grid.tile} px at {grid.mpp:g} um/px, {grid.tile * grid.mpp:g} um",
    flush=True,
  )
  for note in of_slides.notes:
    print(note, flush=True)
  work.settle()
  # Whoever comes first writes; the others wait.
  with files.lock(workdir.path / ".report.lock", wait=True):
    if workdir.finished:
      return workdir.report_failures()
    table = work.table()
    _write(workdir.path, table, work.failures())
    if all(row["failed"] for row in table):
      raise errors.RunError(
        f"none of {len(table):,} slides could be used; the first:"
        f" {table[0]['name']}: {table[0]['problem']}; all are in"
        f" {workdir.path / 'failures.csv'}"
      )
    left = _results(config, plan, of_slides, table, work.failures(), begun)
    _tell(table)
    page.write(
      workdir.path, left, _overlays(workdir.path, table, config.thumbnails)
    )
    return workdir.finish(left)


def _begin_again(work: "_Work", workdir: workdirs.Workdir) -> bool:
  """Whether a finished run has more to do: what is new, or has failed.

  What has failed is tried again, by whoever comes first.
  """
  path = workdir.path / "results.json"
  table = json.loads(path.read_text(encoding="utf-8"))["summary"]["table"]
  before = [row["name"] for row in table]
  states = {work.kept.state(unit) for unit in work.units}
  if before == work.slides.names and states <= {"done"}:
    return False
  with files.lock(workdir.path / ".again.lock", wait=True):
    if workdir.finished:
      for unit in work.units:
        (work.kept.directory(unit) / "failed.json").unlink(missing_ok=True)
      path.unlink()
  return True


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config)
  mpp = config.mpp
  errors.check_range("mag", config.mag, least=0, most=10 / slides.FINEST)
  if config.mag:
    mpp = 10 / config.mag
    if config.mpp not in (mpp, 0.5):
      raise errors.UsageError(
        f"config.mpp is {config.mpp:g} and config.mag {config.mag:g}, which is"
        f" {mpp:g} um/px; give one of them"
      )
  bounds = {"least": slides.FINEST, "most": slides.COARSEST}
  errors.check_range("mpp", mpp, **bounds)
  errors.check_range("tile", config.tile, least=8, most=8192)
  errors.check_range("overlap", config.overlap, least=0, below=config.tile)
  errors.check_range("min_tissue", config.min_tissue, least=0, most=1)
  errors.check_range("min_sharpness", config.min_sharpness, least=0)
  if config.default_mpp:
    errors.check_range("default_mpp", config.default_mpp, **bounds)
  tissue = config.tissue
  errors.check_range("tissue.mpp", tissue.mpp, least=0.1, most=100)
  errors.check_range("tissue.threshold", tissue.threshold, least=0, most=255)
  for key in ("median", "closing", "min_area", "max_hole"):
    errors.check_range(f"tissue.{key}", tissue[key], least=0, most=1000)
  return Plan(
    tiling.Grid(config.tile, mpp, config.overlap, config.min_tissue),
    segmentation.Settings(
      **{
        field.name: tissue[field.name]
        for field in dataclasses.fields(segmentation.Settings)
      }
    ),
    tissue.mpp,
    config.default_mpp or None,
    config.min_sharpness,
    config.save_tiles,
    config.data.workers or pipeline.processors(),
  )


class _Work:
  """What all units of a run share, and where they are kept."""

  def __init__(
    self, plan: Plan, of_slides: slide_sets.SlideSet, path: pathlib.Path
  ):
    self.plan = plan
    self.slides = of_slides
    self.path = path
    self.kept = units.Units(path / "units")
    self.identities = of_slides.identities()
    sizes = [_size(slide) for slide in of_slides.paths]
    order = sorted(range(len(sizes)), key=lambda row: -sizes[row])
    # The largest first, so that no process ends long after the others.
    self.units = [Unit(of_slides.names[row], row) for row in order]

  def check_unchanged(self, *, forget: bool) -> None:
    """Refuses slides that are others than those that were cut.

    Args:
      forget: whether those are opened again whose tiles are not there any more,
        or not whole.

    Raises:
      UsageError: naming them.
    """
    changed = []
    for unit in self.units:
      record = self.kept.read(unit, "done.json")
      if record is None:
        continue
      if record["identity"] != self.identities[unit.row]:
        changed.append(unit.name)
      elif forget and not self._is_whole(unit, record["row"]["tiles"]):
        (self.kept.directory(unit) / "done.json").unlink(missing_ok=True)
    if changed:
      raise errors.UsageError(
        f"{len(changed):,} slides, or their masks or mpp, have changed since"
        f" {self.path} was made: {naming.shown(sorted(changed))}; choose"
        f" another --workdir, or remove their folders in {self.kept.path}"
      )

  def _is_whole(self, unit: Unit, tiles: int) -> bool:
    try:
      return len(feature_files.read_coords(self.coords(unit)).coords) == tiles
    except feature_files.FeatureFileError:
      return False

  def settle(self) -> None:
    """Sees to it that all slides are cut, here or by another process."""
    states = [self.kept.state(unit) for unit in self.units]
    done = sum(state != "open" for state in states)
    with progress.Progress("tile", "slides", len(self.units), done) as bar:

      def work(unit: Unit, _: int | None) -> None:
        self._settle(unit)
        bar.update()

      self.kept.settle(self.units, work)

  def coords(self, unit: Unit) -> pathlib.Path:
    """Returns where a slide's tiles are written."""
    return self.path / "coords" / f"{unit.name}.h5"

  def _settle(self, unit: Unit) -> None:
    directory = self.kept.directory(unit)
    started = time.monotonic()
    try:
      row, failures = self.cut(unit)
    except (slides.SlideError, segmentation.MaskError) as e:
      files.write_json(directory / "failed.json", {"reason": str(e)})
      return
    row["seconds"] = round(time.monotonic() - started, 3)
    files.write_json(
      directory / "done.json",
      {
        "row": row,
        "failures": failures,
        "identity": self.identities[unit.row],
      },
    )

  def cut(self, unit: Unit) -> tuple[results.TiledSlide, list[tuple[str, str]]]:
    """Cuts one slide and writes all that is to be left of it.

    Returns:
      Its line in the table, and (name, reason) of tiles that cannot be read.

    Raises:
      SlideError: it cannot be used.
      MaskError: its mask cannot.
    """
    plan, row = self.plan, unit.row
    with self.slides.open(row, plan.default_mpp) as slide:
      tiled = self.tiled(slide, row)
    kept, failures = tiled, []
    if plan.save_tiles or plan.min_sharpness:
      kept, failures = self._looked_at(unit, slide, tiled)
    segmentation.write_geojson(
      self.path / "tissue" / f"{unit.name}.geojson", tiled.polygons()
    )
    drawn = tiling.overlay((slide.width, slide.height), kept, _OVERLAY)
    with files.atomic_path(
      self.path / "overlays" / f"{unit.name}.jpg"
    ) as temporary:
      Image.fromarray(drawn).save(temporary, "JPEG", quality=_QUALITY)
    feature_files.write_coords(
      self.coords(unit),
      feature_files.Coords(
        kept.coords,
        kept.extent,
        plan.grid.tile,
        plan.grid.mpp,
        slide.width,
        slide.height,
        {"name": files.visible(unit.name), "overlap": plan.grid.overlap},
      ),
    )
    return (
      results.TiledSlide(
        name=unit.name,
        path=os.fspath(slide.path),
        width=slide.width,
        height=slide.height,
        mpp=slide.mpp,
        levels=[round(level.downsample, 4) for level in slide.levels],
        tiles=len(kept.coords),
        tissue_mm2=round(kept.area, 4),
        seconds=None,
        problem="; ".join(kept.notes),
        failed=False,
      ),
      failures,
    )

  def tiled(self, slide: slides.Slide, row: int) -> tiling.Tiled:
    """Finds the tiles of an open slide."""
    plan, mask = self.plan, self.slides.masks[row]
    try:
      return tiling.cut(
        slide, plan.grid, plan.settings, plan.mask_mpp, mask, _OVERLAY
      )
    except segmentation.MaskError as e:
      raise segmentation.MaskError(f"mask {mask}: {e}") from None

  def _looked_at(
    self, unit: Unit, slide: slides.Slide, tiled: tiling.Tiled
  ) -> tuple[tiling.Tiled, list[tuple[str, str]]]:
    """Reads every tile: leaves out the blurred, and saves the others."""
    plan = self.plan
    folder = self.path / "tiles" / unit.name
    names = [f"{x}_{y}.jpg" for x, y in tiled.coords.tolist()]

    def look(pixels: np.ndarray, i: int) -> bool:
      if tiling.sharpness(pixels) < plan.min_sharpness:
        return False
      if plan.save_tiles:
        image = Image.fromarray(pixels)
        image.save(temporary / names[i], quality=_QUALITY, subsampling=0)
      return True

    whole = contextlib.nullcontext(folder)
    if plan.save_tiles:
      whole = files.atomic_directory(folder)
    with whole as temporary:
      found = tiling.each_tile(
        lambda: self.slides.open(unit.row, plan.default_mpp),
        tiled,
        plan.grid.tile,
        look,
        plan.readers,
      )
    failures = [
      (f"{unit.name}/{names[i]}", reason)
      for i, reason in enumerate(found)
      if isinstance(reason, str)
    ]
    if failures and len(failures) == len(found):
      raise slides.SlideError(
        f"none of its tiles can be read: {failures[0][1]}"
      )
    kept = np.array([reason is True for reason in found], bool)
    notes = list(tiled.notes)
    if failures:
      notes.append(
        f"{len(failures):,} tiles cannot be read, the first: {failures[0][1]}"
      )
    if blurred := sum(reason is False for reason in found):
      notes.append(f"{blurred:,} tiles are blurred and left out")
    return (
      dataclasses.replace(
        tiled,
        coords=tiled.coords[kept],
        tissue=tiled.tissue[kept],
        notes=notes,
      ),
      failures,
    )

  def table(self) -> list[results.TiledSlide]:
    """Returns a line for every slide, in the order of the source."""
    rows: dict[int, results.TiledSlide] = {}
    for unit in self.units:
      done = self.kept.read(unit, "done.json")
      rows[unit.row] = done["row"] if done else self._failed(unit)
    return [rows[row] for row in sorted(rows)]

  def _failed(self, unit: Unit) -> results.TiledSlide:
    record = self.kept.read(unit, "failed.json") or {}
    return results.TiledSlide(
      name=unit.name,
      path=os.fspath(self.slides.paths[unit.row]),
      width=None,
      height=None,
      mpp=None,
      levels=[],
      tiles=None,
      tissue_mm2=None,
      seconds=None,
      problem=str(record.get("reason")),
      failed=True,
    )

  def failures(self) -> list[tuple[str, str]]:
    """Returns (name, reason) of slides and tiles that cannot be read."""
    failures = []
    for unit in sorted(self.units, key=lambda unit: unit.row):
      done = self.kept.read(unit, "done.json")
      if done is None:
        failures.append((unit.name, self._failed(unit)["problem"]))
      else:
        failures += [tuple(failure) for failure in done["failures"]]
    return failures


def _size(path: pathlib.Path) -> int:
  """Returns the bytes of a slide's file, 0 where it is not there."""
  try:
    return path.stat().st_size
  except OSError:
    return 0


# --- what is left ------------------------------------------------------------


def _write(
  path: pathlib.Path,
  table: Sequence[results.TiledSlide],
  failures: Sequence[tuple[str, str]],
) -> None:
  """Writes slides.csv and, where there are any, failures.csv."""
  lines = []
  for row in table:
    words = {**row, "levels": " ".join(f"{of:g}" for of in row["levels"])}
    lines.append([words[column] for column in COLUMNS])
  files.write_csv(path / "slides.csv", COLUMNS, lines)
  if failures:
    pipeline.write_failures(path / "failures.csv", list(failures))


def _results(
  config: ml_collections.ConfigDict,
  plan: Plan,
  of_slides: slide_sets.SlideSet,
  table: list[results.TiledSlide],
  failures: Sequence[tuple[str, str]],
  begun: results.Run,
) -> results.Results:
  """Turns the table into the rows and the summary of results.json."""
  broken = [
    results.Broken(name=row["name"], reason=row["problem"])
    for row in table
    if row["failed"]
  ]
  grid = plan.grid
  notes = list(of_slides.notes)
  # What several slides share is told once; the table has it of each.
  empty = [row["name"] for row in table if row["tiles"] == 0]
  if empty:
    notes.append(
      f"No tile is on {len(empty):,} of {len(table):,} slides"
      f" ({naming.shown(empty)}); the table says why."
    )
  summary = results.Tile(
    sentence=_sentence(table, grid),
    data=config.data.source,
    tile=grid.tile,
    mpp=grid.mpp,
    table=table,
    notes=notes,
    failures=len(failures) - len(broken),
    broken=broken,
    seconds={"tiling": sum(row["seconds"] or 0.0 for row in table)},
    run=begun,
  )
  numbers = {
    "slides": len(table) - len(broken),
    "tiles": sum(row["tiles"] or 0 for row in table),
    "tissue_mm2": sum(row["tissue_mm2"] or 0 for row in table),
  }
  measurements = [
    results.row({"n": len(table)}, name, value)
    for name, value in numbers.items()
  ]
  return {"job": "tile", "summary": summary, "measurements": measurements}


def _tell(table: Sequence[results.TiledSlide]) -> None:
  """Prints what is to be known of single slides."""
  problems = [row for row in table if row["problem"]]
  for row in problems[:_TOLD]:
    left_out = "left out: " if row["failed"] else ""
    print(files.visible(f"{row['name']}: {left_out}{row['problem']}"))
  if len(problems) > _TOLD:
    print(f"and {len(problems) - _TOLD:,} more, of which slides.csv tells")


def _sentence(table: Sequence[results.TiledSlide], grid: tiling.Grid) -> str:
  used = [row for row in table if not row["failed"]]
  tiles = sum(row["tiles"] or 0 for row in used)
  area = sum(row["tissue_mm2"] or 0 for row in used)
  sentence = (
    f"{tiles:,} tiles of {grid.tile} px at {grid.mpp:g} um/px"
    f" ({grid.tile * grid.mpp:g} um) from {len(used):,} of {len(table):,}"
    f" slides, which hold {area:,.3g} mm2 of tissue."
  )
  if broken := len(table) - len(used):
    were = "slide was" if broken == 1 else "slides were"
    sentence += f" {broken:,} {were} left out."
  return sentence


def _overlays(
  path: pathlib.Path, table: Sequence[results.TiledSlide], most: int
) -> list[gallery.Gallery]:
  """Returns pictures of slides for the page, those with a problem first."""
  used = [row for row in table if not row["failed"]]
  used.sort(key=lambda row: not row["problem"])
  shown = []
  for row in used[:most]:
    with Image.open(path / "overlays" / f"{row['name']}.jpg") as image:
      image.draft("RGB", (_SHOWN, _SHOWN))
      pixels = np.asarray(image.convert("RGB"))
    shown.append(
      gallery.Thumbnail(
        pixels,
        f"{row['tiles']:,} tiles, {row['tissue_mm2']:.3g} mm2",
        row["name"],
        [row["problem"]] if row["problem"] else [],
      )
    )
  if not shown:
    return []
  caption = (
    "Green is the outline of the tissue, blue the tiles that are kept. In full"
    " size they are in overlays/; the outlines are in tissue/, which QuPath"
    " opens. Slides with a remark come first."
  )
  if len(used) > most:
    caption += f" {len(used) - most:,} more are not shown."
  return [gallery.Gallery("What was found", caption, shown, _SHOWN)]


def _preview(config: ml_collections.ConfigDict, work: _Work) -> int:
  """Says what the run would do, after trying some slides."""
  tried, seconds, tiles, broken = 0, 0.0, 0, []
  grid, plan = work.plan.grid, work.plan
  # One here, one there: largest slides take longest, and smallest shortest.
  order = sorted(range(len(work.units)), key=lambda i: (i * 7919) % 10_007)
  for i in order:
    unit, started = work.units[i], time.monotonic()
    try:
      with work.slides.open(unit.row, plan.default_mpp) as slide:
        tiled = work.tiled(slide, unit.row)
        tiles += len(tiled.coords)
        seconds += time.monotonic() - started
        if plan.save_tiles or plan.min_sharpness:
          seconds += _time_of_tiles(slide, tiled, grid.tile) / plan.readers
    except (slides.SlideError, segmentation.MaskError) as e:
      broken.append(f"{unit.name} cannot be used: {e}")
      seconds += time.monotonic() - started
    tried += 1
    if seconds > _TRIED:
      break
  share = len(work.units) / max(1, tried)
  size = _COORDS + _PICTURE
  if plan.save_tiles:
    size += tiles / max(1, tried) * grid.tile**2 * _JPEG
  counted = f"{tiles * share:,.0f} tiles" if tiles else "no tile"
  about = "about " * (share > 1)
  return preview.tell(
    config,
    work.path,
    [],
    [
      f"{len(work.units):,} slides, of which {tried:,} were tried: {about}"
      f"{counted} of {grid.tile} px at {grid.mpp:g} um/px"
    ],
    None,
    preview.Time(seconds * share, seconds * share),
    size * len(work.units),
    [*work.slides.notes, *broken],
  )


def _time_of_tiles(
  slide: slides.Slide, tiled: tiling.Tiled, size: int, few: int = 20
) -> float:
  """Returns how many seconds it takes one thread to read all tiles."""
  some = tiled.coords[:: max(1, len(tiled.coords) // few)].tolist()
  started = time.monotonic()
  for x, y in some:
    slide.region(x, y, tiled.extent, size)
  spent = time.monotonic() - started
  return spent * len(tiled.coords) / max(1, len(some))
