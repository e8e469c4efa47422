"""Which slides there are, and what is known of each."""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import ml_collections

from jaxtransfer.data import images, manifests, slides
from jaxtransfer.data import names as naming
from jaxtransfer.errors import MissingSourceError, UsageError

COLUMNS = ("path", "slide", "label", "group", "mpp", "mask", "site")
_SOURCES = "a folder of slides, a manifest.csv or synthetic:slides"
# Of a file's beginning and end: what tells whether it is the same file.
_DIGESTED = 1 << 16
MASK_SUFFIXES = frozenset(
  ".geojson .json .png .tif .tiff .bmp .jpg .jpeg .webp".split()
)


@dataclasses.dataclass(eq=False)
class SlideSet:
  """Slides, none of them opened; a row is a slide.

  Attributes:
    names: unique, and fit for a file's name.
    paths: of the files.
    labels: as they are written; "" = unknown.
    groups: the patient of each; "" = unknown.
    mpp: what is to hold in place of what the file says, um/px; None = nothing.
    masks: an image or a GeoJSON of each slide's tissue, or None.
    sites: where each was made; "" = unknown.
    notes: what was ignored or assumed, a line each.
    max_pixels: of a picture that can only be decoded whole.
  """

  names: list[str]
  paths: list[pathlib.Path]
  labels: list[str]
  groups: list[str]
  mpp: list[float | None]
  masks: list[pathlib.Path | None]
  sites: list[str]
  notes: list[str] = dataclasses.field(default_factory=list)
  max_pixels: int = images.MAX_PIXELS

  def __len__(self) -> int:
    return len(self.names)

  def identities(self) -> list[str]:
    """Returns what tells each slide's file from another, as `identity` does.

    Files are read side by side: on a network file system each is a wait.
    """
    with futures.ThreadPoolExecutor(16) as pool:
      return list(pool.map(identity, self.paths, self.mpp, self.masks))

  def open(self, row: int, default_mpp: float | None = None) -> slides.Slide:
    """Opens one of them.

    Args:
      row: which.
      default_mpp: resolution of a slide of which nobody else says it.

    Raises:
      SlideError: it cannot be used, and why.
    """
    slide = slides.open_slide(self.paths[row], self.mpp[row], self.max_pixels)
    if slide.mpp is None and default_mpp:
      slide.close()
      slide = slides.open_slide(self.paths[row], default_mpp, self.max_pixels)
    return slide


def open_slides(config: ml_collections.ConfigDict) -> SlideSet:
  """Finds the slides that `config.source` names.

  - a folder: all slides in it and in the folders below. Pictures (PNG, JPEG,
    BMP, WebP) count where there is nothing else.
  - `<file>.csv`: a manifest with the column path or slide and, optionally,
    label, group, mpp, mask and site. Paths start in its folder. With both path
    and slide, slide is the name.
  - `synthetic:slides?<option>=<number>&...`: drawn into the cache, once, by
    `data.synthetic_slides.write_slides`, whose options these are.

  Args:
    config: `config.data`: source, max_pixels and, where the job has it, masks:
      a folder of masks by the names of the slides; a manifest's come first.

  Returns:
    The slides, by name; those of a manifest in its order.

  Raises:
    UsageError: the source cannot mean what it says; the line names the file
      and the row.
    MissingSourceError: the source is not there.
  """
  source = config.source
  if not source:
    raise UsageError(f"config.data.source is empty; give {_SOURCES}")
  if source.startswith("synthetic:"):
    # Drawing is of no use to those who have slides.
    from jaxtransfer.data import synthetic_slides

    path = synthetic_slides.cached(source)
  else:
    path = pathlib.Path(source).expanduser()
  if path.is_dir():
    found = _of_folder(path)
  elif not path.exists():
    raise MissingSourceError(
      f"config.data.source: {source} does not exist; give {_SOURCES}"
    )
  elif path.suffix.lower() in slides.SLIDE_SUFFIXES:
    found = _set_of([path])
  else:
    found = _of_manifest(path)
  found = dataclasses.replace(found, max_pixels=config.max_pixels)
  masks = config.get("masks", "")
  return _with_masks(found, masks) if masks else found


def _set_of(paths: Sequence[pathlib.Path], **columns: Any) -> SlideSet:
  """Returns slides with what is known of them, by default nothing."""
  count = len(paths)
  empty: dict[str, Any] = {
    "labels": [""] * count,
    "groups": [""] * count,
    "mpp": [None] * count,
    "masks": [None] * count,
    "sites": [""] * count,
  }
  fields = {**empty, **columns}
  fields.setdefault("names", [path.stem for path in paths])
  return SlideSet(paths=list(paths), **fields)


# --- folders -----------------------------------------------------------------


def _of_folder(root: pathlib.Path) -> SlideSet:
  found: dict[str, pathlib.Path] = {}
  pictures: list[pathlib.Path] = []
  series: dict[str, pathlib.Path] = {}
  others: collections.Counter[str] = collections.Counter()
  for path in _below(root):
    suffix = path.suffix.lower()
    if suffix in slides.PICTURE_SUFFIXES:
      pictures.append(path)
    elif suffix in slides.SLIDE_SUFFIXES:
      # Of DICOM every level is a file, and any of them opens the slide.
      uid = _series(path) if suffix == ".dcm" else ""
      if not uid or series.setdefault(f"{path.parent}/{uid}", path) == path:
        found[str(path)] = path
    elif path.name != "manifest.csv":
      others[suffix or "without suffix"] += 1
  notes = []
  if (root / "manifest.csv").is_file():
    notes.append(
      f"{root}: read as a folder; its manifest.csv (labels, groups, mpp) is not"
      " used, name it as config.data.source to use it"
    )
  if found and pictures:
    kinds = collections.Counter(path.suffix.lower() for path in pictures)
    notes.append(
      f"{root}: {len(pictures):,} pictures beside the slides are not used"
      f" ({naming.counted(kinds.elements())}); a manifest.csv can name them"
    )
  paths = list(found.values()) or pictures
  if not paths:
    seen = f"; there are {naming.counted(others.elements())}" if others else ""
    raise UsageError(
      f"{root}: no slides in it nor below, which end in"
      f" {', '.join(sorted(slides.SLIDE_SUFFIXES))}{seen}"
    )
  names = _unique([path.relative_to(root) for path in paths])
  order = sorted(range(len(paths)), key=lambda i: names[i])
  return _set_of(
    [paths[i] for i in order], names=[names[i] for i in order], notes=notes
  )


def _below(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the files of a folder and of those below, none hidden."""
  for folder, inside, names in os.walk(root, followlinks=True):
    here = pathlib.Path(folder)
    # A slide's own folder lies beside it, under its name.
    own = {
      name[: -len(".mrxs")] for name in names if name.lower().endswith(".mrxs")
    }
    inside[:] = sorted(
      name for name in inside if not name.startswith(".") and name not in own
    )
    for name in sorted(names):
      if not name.startswith("."):
        yield here / name


def _series(path: pathlib.Path) -> str:
  """Returns the UID that all files of a DICOM slide share, "" if unknown.

  Source: DICOM PS3.5, explicit and implicit little endian; Series Instance UID
    is (0020,000E).
  """
  try:
    with open(path, "rb") as file:
      head = file.read(_DIGESTED)
  except OSError:
    return ""
  _, found, rest = head.partition(b"\x20\x00\x0e\x00")
  length = rest[2:4] if rest[:2] == b"UI" else rest[:4]
  start = 4
  uid = rest[start : start + int.from_bytes(length, "little")]
  return uid.strip(b"\0 ").decode("ascii", "replace") if found else ""


def _unique(paths: Sequence[pathlib.PurePath]) -> list[str]:
  """Returns a name for every path: as short as it can be, each once.

  The stem; where others share it, as much of what stands around it as it takes.

  Args:
    paths: relative, each once.
  """
  forms = [
    lambda path: path.stem,
    lambda path: "-".join((*path.parent.parts, path.stem)),
    lambda path: "-".join(path.parts),
  ]
  names = [""] * len(paths)
  rest = list(range(len(paths)))
  for form in forms:
    here = {i: form(paths[i]) for i in rest}
    counts = collections.Counter([*here.values(), *names])
    for i, name in here.items():
      if counts[name] == 1:
        names[i] = name
    rest = [i for i in rest if not names[i]]
  for i in rest:
    digest = hashlib.sha256(str(paths[i]).encode(errors="surrogateescape"))
    names[i] = f"{paths[i].stem}-{digest.hexdigest()[:8]}"
  return names


# --- manifests ---------------------------------------------------------------


def _of_manifest(path: pathlib.Path) -> SlideSet:
  lines, columns, notes = _table(path)
  slide = columns.get("slide")
  written = columns.get("path") or slide or []
  paths = [_file(path, name) for name in written]
  _check_there(path, written, paths)
  seen: dict[str, int] = {}
  for line, file in zip(lines, paths, strict=True):
    first = seen.setdefault(os.path.normpath(file), line)
    if first != line:
      raise UsageError(
        f"{path}, line {line}: {file.name} is also in line {first}; remove one"
        " of them"
      )
  if slide and "path" in columns:
    names = slide
    for line, name in zip(lines, names, strict=True):
      if name != pathlib.PurePath(name).name or names.count(name) > 1:
        raise UsageError(
          f"{path}, line {line}: slide is {name!r}; it names files, so each is"
          " to have its own, without /"
        )
  else:
    # What all share tells none apart.
    shared = os.path.commonpath([file.parent for file in paths])
    names = _unique([file.relative_to(shared) for file in paths])
  labels, groups = columns.get("label"), columns.get("group")
  for what, values in (("labels", labels), ("groups", groups)):
    for note in naming.alike(what, values or ()):
      notes.append(f"{path}: {note.replace(' images)', ' slides)')}")
  return _set_of(
    paths,
    names=names,
    notes=notes,
    **_given("labels", labels),
    **_given("groups", groups),
    **_given("sites", columns.get("site")),
    **_given("mpp", _each(path, lines, columns.get("mpp"), _mpp)),
    **_given("masks", _each(path, lines, columns.get("mask"), _mask)),
  )


def _given(name: str, values: list[Any] | None) -> dict[str, list[Any]]:
  return {} if values is None else {name: values}


def _table(
  path: pathlib.Path,
) -> tuple[list[int], dict[str, list[str]], list[str]]:
  """Returns the line of every row, the columns that are there, and notes."""
  rows = manifests.csv_rows(path)
  _, header = next(rows, (0, []))
  header = [name.strip().lower() for name in header]
  if not {"path", "slide"} & set(header):
    raise UsageError(
      f"{path}: no column 'path' or 'slide'; a manifest is comma-separated and"
      f" its first line names the columns, here {', '.join(header) or 'none'}"
    )
  for name in COLUMNS:
    if header.count(name) > 1:
      raise UsageError(f"{path}: the column {name!r} is there twice")
  columns: dict[str, list[str]] = {n: [] for n in header if n in COLUMNS}
  lines = []
  for line, row in rows:
    if len(row) != len(header):
      raise UsageError(
        f"{path}, line {line}: {len(row)} cells, the header has {len(header)}"
        " (a comma in a path must be quoted)"
      )
    lines.append(line)
    for name, cell in zip(header, row, strict=True):
      if name in columns:
        columns[name].append(cell.strip())
    for name in {"path", "slide"} & set(columns):
      if not columns[name][-1]:
        raise UsageError(f"{path}, line {line}: empty {name}")
  if not lines:
    raise UsageError(f"{path}: no rows")
  unused = [name for name in header if name not in COLUMNS]
  notes = []
  if unused:
    notes.append(f"{path}: columns not used: {naming.shown(unused, 8)}")
  return lines, columns, notes


def _file(manifest: pathlib.Path, name: str) -> pathlib.Path:
  root = os.path.abspath(manifest.parent)
  exact = os.path.join(root, name)
  if not os.path.exists(exact):
    exact = manifests.respelled(root, name) or exact
  return pathlib.Path(exact)


def _check_there(
  path: pathlib.Path, written: Sequence[str], paths: Sequence[pathlib.Path]
) -> None:
  """Refuses a manifest of which no slide is there."""
  if any(file.exists() for file in paths):
    return
  why = manifests.why_missing(written[0])
  raise MissingSourceError(
    f"{path}: none of the {len(paths):,} slides is there; paths start in the"
    f" manifest's folder: {path.parent / written[0]}" + (f"; {why}" * bool(why))
  )


def _each(
  path: pathlib.Path,
  lines: Sequence[int],
  cells: list[str] | None,
  read: Callable[[pathlib.Path, int, str], Any],
) -> list[Any] | None:
  """Reads the cells of a column; what is empty is None."""
  if cells is None:
    return None
  return [
    read(path, line, cell) if cell else None
    for line, cell in zip(lines, cells, strict=True)
  ]


def _mpp(path: pathlib.Path, line: int, cell: str) -> float:
  try:
    mpp = float(cell)
  except ValueError:
    mpp = 0.0
  if not slides.FINEST <= mpp <= slides.COARSEST:
    raise UsageError(
      f"{path}, line {line}: mpp is {cell!r}; it is micrometres a pixel, from"
      f" {slides.FINEST:g} to {slides.COARSEST:g}"
    )
  return mpp


def _mask(path: pathlib.Path, line: int, cell: str) -> pathlib.Path:
  mask = _file(path, cell)
  if not mask.is_file():
    raise UsageError(f"{path}, line {line}: there is no mask {mask}")
  return mask


# --- masks -------------------------------------------------------------------


def _with_masks(of: SlideSet, folder: str) -> SlideSet:
  """Gives slides the masks of a folder, where there are some."""
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise UsageError(f"config.data.masks: there is no folder {folder}")
  there: dict[str, list[pathlib.Path]] = {}
  for path in sorted(root.iterdir()):
    if path.suffix.lower() in MASK_SUFFIXES and not path.name.startswith("."):
      there.setdefault(path.stem, []).append(path)
  masks, lacking = list(of.masks), []
  for row, name in enumerate(of.names):
    found = there.get(name, [])
    if len(found) > 1:
      raise UsageError(
        f"config.data.masks: {folder} has several masks of {name}:"
        f" {', '.join(path.name for path in found)}; leave one of them there"
      )
    masks[row] = masks[row] or next(iter(found), None)
    lacking += [name] * (masks[row] is None)
  if len(lacking) == len(of):
    raise UsageError(
      f"config.data.masks: {folder} has no mask by the name of a slide, such as"
      f" {of.names[0]}.geojson or {of.names[0]}.png"
    )
  notes = list(of.notes)
  if lacking:
    notes.append(
      f"{folder}: no mask of {len(lacking):,} of {len(of):,} slides"
      f" ({naming.shown(lacking)}); their tissue is found by colour"
    )
  return dataclasses.replace(of, masks=masks, notes=notes)


# --- the same slide -----------------------------------------------------------


def identity(
  path: pathlib.Path,
  mpp: float | None = None,
  mask: pathlib.Path | None = None,
) -> str:
  """Returns what tells a slide's file from another, and not from its copy.

  Args:
    path: of the slide.
    mpp: that is to hold for it.
    mask: of its tissue.

  Returns:
    A digest of sizes, beginnings and ends, or of why they cannot be read.
  """
  digest = hashlib.sha256(f"{mpp}".encode())
  parts = [path, *([mask] if mask else [])]
  folder = path.with_suffix("")
  if path.suffix.lower() == ".mrxs" and folder.is_dir():
    parts += sorted(folder.iterdir())
  for part in parts:
    try:
      with open(part, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f"{size}".encode())
        for start in sorted({0, max(0, size - _DIGESTED)}):
          file.seek(start)
          digest.update(file.read(_DIGESTED))
    except OSError as e:
      digest.update(f"{e.strerror}".encode())
  return digest.hexdigest()
