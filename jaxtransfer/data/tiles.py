"""What becomes one feature file: tiles of a slide, or images of one bag.

Both are bags: named, counted when they are opened, and read in pieces by
readers that each have a handle of their own. Nothing of a bag but its name and
its size is in memory until it is its turn.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from jaxtransfer import files
from jaxtransfer.data import (
  feature_files,
  images,
  slide_sets,
  slides,
  sources,
)
from jaxtransfer.data import (
  names as naming,
)
from jaxtransfer.data.tile_reading import Reader, Regions
from jaxtransfer.errors import MissingSourceError, UsageError

BAGS = ("", "slide", "group", "folder")
# Side, in tiles, of the squares in which they are read: what a slide's file
# compresses as one is needed by neighbours, and a reader keeps what it has
# decoded for a while.
_SQUARE = 4
# Two statements of one resolution differ by rounding alone.
_SAME = 0.02
# Pixels of a tile where the tiles do not say.
_USUAL = 224
_PLACE = re.compile(r"(?:^|[^0-9])(\d+)_(\d+)\.[^.]+$")


@dataclasses.dataclass
class Places:
  """Where the tiles of an opened bag are, and how they are asked for.

  Attributes:
    order: (N,) int64, the tiles in the order in which they are read.
    coords: (N, 2) int64, level-0 pixels; None where nobody says.
    names: of N images; None for tiles.
    extent: side of a tile in level-0 pixels; None = not said.
    attributes: what is written beside the coordinates.
  """

  order: np.ndarray
  coords: np.ndarray | None
  names: list[str] | None
  extent: float | None
  attributes: dict[str, Any]

  def named(self, tile: int) -> tuple[str, str, str]:
    """Returns x, y and name of a tile, "" for what is not known."""
    x, y = ("", "") if self.coords is None else map(str, self.coords[tile])
    return x, y, "" if self.names is None else self.names[tile]


@dataclasses.dataclass(frozen=True, eq=False)
class Bag:
  """What becomes one feature file.

  Attributes:
    name: of the file, and of the unit.
    count: N, of tiles.
    label: of the slide; "" where it has none.
    group: its patient; "" where nobody says.
  """

  name: str
  count: int
  label: str
  group: str

  def open(self) -> Places:
    """Returns where its tiles are.

    Raises:
      SlideError: that cannot be read any more.
    """
    raise NotImplementedError

  def piece(self, places: Places, tiles: np.ndarray) -> Any:
    """Returns what a reader is asked for.

    Args:
      places: as `open` returned them.
      tiles: (n,) which.
    """
    raise NotImplementedError

  @functools.cached_property
  def digest(self) -> str:
    """A hash that changes when any of its tiles may look another."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class SlideBag(Bag):
  """A slide with coordinates.

  Attributes:
    path: of the slide.
    mpp: micrometres per level-0 pixel that hold in place of the file's.
    max_pixels: of a picture that can only be decoded whole.
    coords_path: where the tiles are.
    coords_sha256: of what that says.
  """

  path: pathlib.Path
  mpp: float | None
  max_pixels: int
  coords_path: pathlib.Path
  coords_sha256: str

  def open(self) -> Places:  # noqa: D102
    coords = _read_coords(self.coords_path)
    if _hash_coords(coords) != self.coords_sha256:
      raise slides.SlideError(
        f"{self.coords_path} was changed while the run was at work"
      )
    with slides.open_slide(self.path, self.mpp, self.max_pixels) as slide:
      coords = _completed(coords, slide)
    attributes = {**coords.attributes, **coords.described()}
    return Places(
      _in_squares(coords.coords, coords.extent),
      coords.coords,
      None,
      coords.extent,
      attributes,
    )

  def piece(self, places: Places, tiles: np.ndarray) -> Regions:  # noqa: D102
    assert places.coords is not None and places.extent is not None
    path, coords = str(self.path), places.coords[tiles]
    return Regions(path, self.max_pixels, coords, places.extent)

  @functools.cached_property
  def digest(self) -> str:  # noqa: D102
    said = self.coords_sha256 + slide_sets.identity(self.path, self.mpp)
    return hashlib.sha256(said.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBag(Bag):
  """Images of a source that belong together.

  Attributes:
    examples: the source.
    rows: (N,) int64 of it.
  """

  examples: sources.Examples
  rows: np.ndarray

  def open(self) -> Places:  # noqa: D102
    of_rows = [self.examples.names[row] for row in self.rows]
    found = [_PLACE.search(name) for name in of_rows]
    coords = [(int(m[1]), int(m[2])) for m in found if m]
    return Places(
      np.arange(self.count),
      np.array(coords, np.int64) if len(coords) == self.count else None,
      of_rows,
      None,
      {"name": self.name},
    )

  def piece(self, places: Places, tiles: np.ndarray) -> list[int]:  # noqa: D102
    del places
    return self.rows[tiles].tolist()

  @functools.cached_property
  def digest(self) -> str:  # noqa: D102
    digest = hashlib.sha256(
      self.examples.fingerprint(self.rows.tolist()).encode()
    )
    digest.update(np.ascontiguousarray(self.rows, "<i8").tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TileSet:
  """The bags of a run.

  Attributes:
    bags: as the source has them.
    reader: of their pieces.
    size: side of the tiles as a network sees them, pixels.
    what: a bag is called, in the plural.
    tile: side of the tiles on the slides, pixels; None = not known.
    mpp: micrometres per pixel of them; None = not known.
    absent: name -> why a slide has no bag: nobody tiled it.
    notes: what the user should know, a line each.
  """

  bags: list[Bag]
  reader: Reader
  size: int
  what: str
  tile: int | None
  mpp: float | None
  absent: Mapping[str, str]
  notes: Sequence[str]

  @property
  def count(self) -> int:
    """How many tiles there are."""
    return sum(bag.count for bag in self.bags)

  def resize(self) -> dict[str, Any]:
    """Returns what became of a tile's pixels, for whoever must do the same."""
    if self.what == "slides":
      return {
        "size": self.size,
        "interpolation": "bilinear",
        "antialias": True,
        "from": "the slide's nearest finer level",
      }
    return images.resize_card(self.size)


def open_tiles(
  config: ml_collections.ConfigDict, coords: str = "", bag: str = ""
) -> TileSet:
  """Opens what a run encodes; no image or slide is read.

  Args:
    config: `config.data`.
    coords: the folder of the coordinate files of slides: a workdir of `tile`,
      a TRIDENT or CLAM job, or its folder `patches`; "" for images.
    bag: what of images a bag is, one of `BAGS`.

  Raises:
    UsageError: the source cannot be opened, or its tiles are unlike.
  """
  if coords:
    if bag:
      raise UsageError(
        f"config.bag is {bag!r}, but with config.coords a slide is a bag; leave"
        " one of them out"
      )
    return _open_slides(config, coords)
  if config.source.startswith("synthetic:slides"):
    raise UsageError(
      f"config.data.source is {config.source}, but config.coords is empty: run"
      " the job tile on it, and name its workdir there"
    )
  return _open_images(config, bag)


# --- slides ------------------------------------------------------------------


def _open_slides(config: ml_collections.ConfigDict, folder: str) -> TileSet:
  # Not every job on slides has it.
  if config.get("task"):
    raise UsageError(
      f"config.data.task is {config.task!r}, which is of manifests of images;"
      " with config.coords leave it out"
    )
  of_slides = slide_sets.open_slides(config)
  found = _coords_files(folder)
  bags, absent, geometries = [], {}, {}
  for i, name in enumerate(of_slides.names):
    path = found.pop(name, None)
    if path is None:
      absent[name] = f"no coords: no {name}.h5 in {folder}"
      continue
    try:
      coords = _read_coords(path)
    except slides.SlideError as e:
      absent[name] = str(e)
      continue
    geometries[name] = coords.tile, coords.mpp
    bags.append(
      SlideBag(
        name,
        len(coords.coords),
        of_slides.labels[i],
        of_slides.groups[i],
        of_slides.paths[i],
        of_slides.mpp[i],
        of_slides.max_pixels,
        path,
        _hash_coords(coords),
      )
    )
  if not bags:
    first, why = next(iter(absent.items()))
    raise UsageError(
      f"config.coords: none of {len(absent):,} slides can be encoded; the"
      f" first: {first}: {why}"
    )
  # Where the readers are not installed, that is said before any work.
  with contextlib.suppress(slides.SlideError):
    slides.open_slide(bags[0].path).close()
  tile, mpp = _alike(geometries, folder)
  size = config.image_size or tile
  if not size:
    raise UsageError(
      f"{folder} does not say how many pixels a tile has: give"
      " --config.data.image_size, the side that tiles are resized to"
    )
  notes = list(of_slides.notes)
  if found:
    notes.append(
      f"coords of no slide in {config.source} are not used, {len(found):,}:"
      f" {naming.shown(list(found))}"
    )
  empty = [bag.name for bag in bags if not bag.count]
  if empty:
    notes.append(
      f"without a tile, and so with files without a row, {len(empty):,}:"
      f" {naming.shown(empty)}"
    )
  return TileSet(bags, Reader(size), size, "slides", tile, mpp, absent, notes)


def _coords_files(folder: str) -> dict[str, pathlib.Path]:
  """Returns the coordinate file of every slide.

  Raises:
    UsageError: there is none, or nobody can tell which are meant.
  """
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise MissingSourceError(f"config.coords: {folder} is no folder")
  places = [root, root / "coords", root / "patches", *root.glob("*/patches")]
  holding = [
    place for place in dict.fromkeys(places) if any(place.glob("*.h5"))
  ]
  if len(holding) != 1:
    told = ", ".join(map(str, holding)) or "nothing"
    raise UsageError(
      f"config.coords: {folder} must hold the coordinate files of one tiling,"
      f" <slide>.h5 or <slide>_patches.h5, itself or in coords/ or patches/;"
      f" found in {told}"
    )
  return {
    path.stem.removesuffix("_patches"): path
    for path in sorted(holding[0].glob("*.h5"))
  }


def _read_coords(path: pathlib.Path) -> feature_files.Coords:
  try:
    return feature_files.read_coords(path)
  except feature_files.FeatureFileError as e:
    raise slides.SlideError(str(e)) from None


def _completed(
  coords: feature_files.Coords, slide: slides.Slide
) -> feature_files.Coords:
  """Returns coordinates with what their file does not say of the slide.

  Raises:
    SlideError: they are of another slide, or of another of its levels.
  """
  size = slide.width, slide.height
  said = coords.width or size[0], coords.height or size[1]
  if said != size:
    raise slides.SlideError(
      f"its coords are of a slide of {said[0]} x {said[1]} pixels, but it has"
      f" {size[0]} x {size[1]}: of another slide or level; tile it again"
    )
  outside = (coords.coords >= size) | (coords.coords <= -coords.extent)
  if outside.any():
    x, y = coords.coords[outside.any(1)][0]
    raise slides.SlideError(
      f"a tile at ({x}, {y}) lies outside of its {size[0]} x {size[1]} pixels:"
      " coords of another slide, or of another level than 0"
    )
  mpp = coords.mpp
  if coords.level0_mpp is None:
    # TRIDENT's and CLAM's files do not say it exactly.
    if coords.tile and slide.mpp:
      mpp = slide.mpp * coords.extent / coords.tile
  elif slide.mpp and abs(coords.level0_mpp / slide.mpp - 1) > _SAME:
    raise slides.SlideError(
      f"its coords are of {coords.level0_mpp:.4g} um/px at level 0, but it has"
      f" {slide.mpp:.4g}; tile it again"
    )
  return dataclasses.replace(coords, mpp=mpp, width=size[0], height=size[1])


def _hash_coords(coords: feature_files.Coords) -> str:
  said = (coords.extent, coords.width, coords.height, coords.level0_mpp)
  digest = hashlib.sha256(repr(said).encode())
  digest.update(np.ascontiguousarray(coords.coords, "<i8").tobytes())
  return digest.hexdigest()


def _alike(
  geometries: Mapping[str, tuple[int | None, float | None]], folder: str
) -> tuple[int | None, float | None]:
  """Returns the pixels and the resolution of the tiles of all slides.

  Raises:
    UsageError: they differ: features of them would not compare.
  """
  first: dict[str, tuple[str, float]] = {}
  for name, of_slide in geometries.items():
    for what, value in zip(("px", "um/px"), of_slide, strict=True):
      if value is None:
        continue
      other, known = first.setdefault(what, (name, value))
      if abs(value / known - 1) > _SAME:
        raise UsageError(
          f"config.coords: {folder} holds tiles of {known:g} {what}"
          f" ({other}) and of {value:g} ({name}); their features would not"
          " compare: tile all slides in the same way"
        )
  tile, mpp = first.get("px"), first.get("um/px")
  return None if tile is None else int(tile[1]), None if mpp is None else mpp[1]


def _in_squares(coords: np.ndarray, extent: float) -> np.ndarray:
  """Returns an order in which neighbours along both axes are close."""
  x, y = coords.T
  side = _SQUARE * extent
  return np.lexsort((x, y, x // side, y // side))


# --- images ------------------------------------------------------------------


def _open_images(config: ml_collections.ConfigDict, bag: str) -> TileSet:
  config = config.copy_and_resolve_references()
  config.image_size = config.image_size or _USUAL
  examples = sources.open_source(config)
  of_rows, what = _bag_of_rows(examples, bag, config.source)
  rows: dict[str, list[int]] = {}
  for row, name in enumerate(of_rows):
    rows.setdefault(name, []).append(row)
  bags: list[Bag] = []
  taken: dict[str, str] = {}
  for name, own in rows.items():
    safe = files.safe_name(name)
    # On some file systems names that differ in capitals are one.
    other = taken.setdefault(safe.casefold(), name)
    if other != name:
      raise UsageError(
        f"config.data.source: the {what} {other!r} and {name!r} would be one"
        " file; rename one of them"
      )
    bags.append(
      ImageBag(
        safe,
        len(own),
        _shared([examples.classes[examples.labels[row]] for row in own]),
        _shared([examples.groups[row] for row in own])
        if examples.groups
        else "",
        examples,
        np.array(own, np.int64),
      )
    )
  reader = Reader(config.image_size, examples)
  return TileSet(
    bags, reader, config.image_size, what, None, None, {}, examples.notes
  )


def _bag_of_rows(
  examples: sources.Examples, bag: str, source: str
) -> tuple[list[str], str]:
  """Returns the bag of every row, and what bags are called."""
  known = {"slide": examples.slides, "group": examples.groups}
  if bag in known and known[bag] is None:
    raise UsageError(
      f"config.bag is {bag!r}, but {source} has no column {bag!r}"
    )
  if not bag:
    bag = next((kind for kind, of in known.items() if of), "folder")
  of_rows = known.get(bag)
  if of_rows is None:
    parents = [pathlib.PurePath(name).parent for name in examples.names]
    return [path.as_posix().replace("/", "-") for path in parents], "folders"
  if examples.groups is not None:
    # A row without a slide among rows with one has a group of its own.
    of_rows = [
      own or group for own, group in zip(of_rows, examples.groups, strict=True)
    ]
  return of_rows, f"{bag}s"


def _shared(values: Sequence[str]) -> str:
  """Returns what all say, or nothing."""
  return values[0] if len(set(values)) == 1 else ""


# --- some tiles of slides as examples ----------------------------------------


class Chosen(sources.Examples):
  """Some tiles of slides, as labelled images: for training on them.

  Args:
    chosen: (bag, tiles of it) of every slide.
    labels: of every slide; the tiles have their slide's.
    size: side in pixels that the tiles come out with.
  """

  def __init__(
    self,
    chosen: Sequence[tuple[SlideBag, np.ndarray]],
    labels: Sequence[str],
    size: int,
  ):
    self._size = size
    self._regions: list[Regions] = []
    of_rows: list[tuple[str, str, str]] = []
    self._digests = []
    for (bag, tiles), label in zip(chosen, labels, strict=True):
      places = bag.open()
      assert places.coords is not None
      self._digests.append(bag.digest)
      for tile in tiles.tolist():
        x, y = places.coords[tile]
        of_rows.append((f"{bag.name}/{x}_{y}", label, bag.name))
        self._regions.append(bag.piece(places, np.array([tile])))
    classes = sorted(set(labels))
    groups = {bag.name: bag.group or bag.name for bag, _ in chosen}
    super().__init__(
      classes=classes,
      labels=np.array([classes.index(label) for _, label, _ in of_rows], "i4"),
      names=[name for name, _, _ in of_rows],
      groups=[groups[slide] for _, _, slide in of_rows],
      slides=[slide for _, _, slide in of_rows],
    )
    self._reader = Reader(size)

  def read(self, row: int) -> np.ndarray:  # noqa: D102
    read = self._reader[self._regions[row]]
    if reason := read.broken or read.reasons[0]:
      raise images.ImageError(reason)
    return read.pixels[0]

  def fingerprint(self, rows: Sequence[int] | None = None) -> str:  # noqa: D102
    digest = hashlib.sha256(f"{self._size} {self._digests}".encode())
    digest.update("\n".join(self.names).encode())
    return digest.hexdigest()
