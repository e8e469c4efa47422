"""Slides as bags: a table of their labels, and folders of tiles' features.

A row is a slide. Each folder is one encoder, with one file for a slide, whoever
wrote it; all encoders are looked at on the same slides.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import ml_collections
import numpy as np

from jaxtransfer import progress
from jaxtransfer.data import (
  feature_files,
  manifests,
  pipeline,
  sources,
  synthetic_slides,
)
from jaxtransfer.data import names as naming
from jaxtransfer.data.images import ImageError
from jaxtransfer.errors import MissingSourceError, UsageError

COLUMNS = ("slide", "label", "group", "split")
# As CLAM, STAMP and the manifests of images call them.
_CALLED = {
  "slide_id": "slide",
  "path": "slide",
  "case_id": "group",
  "patient": "group",
  "patient_id": "group",
}
_SUFFIX = ".h5"
# What stands behind a slide's name where its file is named.
_OF_SLIDES = frozenset(
  ".svs .ndpi .mrxs .scn .bif .czi .dcm .svslide .vms .vmu .tif .tiff .btf"
  " .h5 .pt .png .jpg .jpeg".split()
)
# Folders that say nothing of what is in them.
_PLAIN_FOLDERS = ("h5_files", "features", "pt_files")
# What files of one encoder have in common: what they were made with, and of
# which pixels. Where two differ, they are of two encoders.
_SAME = (
  "network",
  "weights",
  "weights_sha256",
  "cut",
  "encoder",
  "extractor",
  "normalisation",
  "mpp",
  "tile",
  "patch_size",
  "target_magnification",
  "tile_size_um",
)


# TRIDENT and CLAM round a tile's side to whole pixels: of one resolution
# what is exact differs from scanner to scanner.
_SAME_MPP = 0.02


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A folder of features.

  Attributes:
    name: what it is called; fit for a file's name, and no other's.
    folder: where the files are.
    channels: of the features of a tile.
    dtype: float16 or float32, what they are read as.
    tiles: (N,) int64, of each slide.
    paths: N files.
    attributes: what all files say that say it: network, weights, cut, mpp ...
  """

  name: str
  folder: pathlib.Path
  channels: int
  dtype: np.dtype
  tiles: np.ndarray
  paths: Sequence[pathlib.Path]
  attributes: Mapping[str, Any]

  def read(self, row: int) -> feature_files.FeatureFile:
    """Reads one slide.

    Raises:
      ImageError: it cannot be used, and why.
    """
    try:
      file = feature_files.read_features(self.paths[row])
    except feature_files.FeatureFileError as e:
      raise ImageError(str(e)) from None
    if bad := len(file.nonfinite):
      raise ImageError(
        f"{self.paths[row]}: the features of {bad:,} of"
        f" {len(file.features):,} tiles hold NaN or infinity"
      )
    if file.features.shape != (self.tiles[row], self.channels):
      raise ImageError(f"{self.paths[row]} has changed since the run began")
    features = file.features.astype(self.dtype, copy=False)
    return dataclasses.replace(file, features=features)


class Bags(sources.Examples):
  """Slides, by one or several encoders; a row is the same slide for all.

  Attributes:
    encoders: at least one.
    failures: slide -> why it is not among the rows though it has a label.
  """

  unit: ClassVar[str] = "slides"

  def __init__(
    self,
    encoders: Sequence[Encoder],
    failures: Mapping[str, str],
    **fields: Any,
  ):
    super().__init__(**fields)
    self.encoders = list(encoders)
    self.failures = dict(failures)

  def read(self, row: int) -> np.ndarray:
    """Reads the features that the first encoder made, (tiles, channels).

    Raises:
      ImageError: they cannot be used, and why.
    """
    return self.encoders[0].read(row).features

  def fingerprint(self, rows: Sequence[int] | None = None) -> str:
    """Returns a hash that changes when any of the files may have."""
    digest = hashlib.sha256()
    for encoder in self.encoders:
      paths = encoder.paths
      for path in paths if rows is None else [paths[row] for row in rows]:
        stat = os.stat(path)
        about = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(about.encode(errors="surrogateescape"))
    return digest.hexdigest()


def open_bags(
  config: ml_collections.ConfigDict, known: Sequence[str] | None = None
) -> Bags:
  """Opens the slides of a table, and the folders of their features.

  The table is a CSV file with the columns slide (or slide_id, or path, of which
  the file's name counts) and label and, optionally, group (or case_id, or
  patient) and split. Its slides are those with a label and with features of
  every encoder; what is left out is said, or counted as failed.

  Where a finished network is used, a slide needs no label, and without a table
  all slides of the first folder are meant.

  Args:
    config: `config.data`: source; features, folders with commas between; and
      max_failures.
    known: the classes of a finished network; None where all need labels.

  Returns:
    The slides, in the order of the table.

  Raises:
    UsageError: the table or a folder cannot be used; the line says where.
    MissingSourceError: one of them is not there.
    UnreadableError: too many slides with a label have no features.
  """
  failures: dict[str, str] = {}
  folders = _encoders(config.features, config.get("coords") or "")
  if known is not None and not config.source:
    names = list(_files(next(iter(folders.values()))))
    table = _Table(names, [""] * len(names), None, None, [])
  else:
    table = _read_table(config.source, labelled=known is None)
  found = []
  count = len(folders) * len(table.names)
  with progress.Progress("checking features", "files", count) as bar:
    for name, folder in folders.items():
      found.append(_Folder(name, folder, table.names, bar))
  for folder in found:
    failures |= folder.failures
  rows = [i for i, name in enumerate(table.names) if name not in failures]
  lines = list(failures.items())
  unit = Bags.unit
  pipeline.too_many(lines, len(table.names), config.max_failures, unit)
  if not rows:
    name, reason = lines[0]
    raise UsageError(f"{config.source}: no slide is left; {name}: {reason}")
  classes, labels, alike = sources.index([table.labels[i] for i in rows])
  notes = [*table.notes, *(f"{config.source}: {note}" for note in alike)]
  if lines:
    which = " with a label" * (known is None)
    first = [f"{name} ({reason})" for name, reason in lines]
    notes.append(
      f"{len(lines):,} of {len(table.names):,} slides{which} are left out for"
      f" every encoder: {naming.shown(first, 2, '; ')}; all are in"
      " failures.csv"
    )
  for folder in found:
    notes += folder.notes
  groups, splits = (
    None if column is None else [column[i] for i in rows]
    for column in (table.groups, table.splits)
  )
  return Bags(
    [folder.encoder(rows) for folder in found],
    failures,
    classes=classes,
    labels=labels,
    names=[table.names[i] for i in rows],
    groups=groups,
    splits=splits,
    notes=notes,
  )


# --- the table ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Table:
  """The slides of a table that are wanted."""

  names: list[str]
  labels: list[str]
  groups: list[str] | None
  splits: list[str] | None
  notes: list[str]


def _read_table(source: str, *, labelled: bool) -> _Table:
  if not source:
    raise UsageError(
      "config.data.source is empty; give a CSV file with the columns slide and"
      " label and, optionally, group (patient) and split"
    )
  path = pathlib.Path(source).expanduser()
  if source.partition(":")[0] == "synthetic":
    path = synthetic_slides.cached(source)
  if not path.is_file():
    kind = "is a folder" if path.is_dir() else "does not exist"
    raise MissingSourceError(
      f"config.data.source: {source} {kind}; give a CSV file with the columns"
      " slide and label"
    )
  required = ("slide", "label") if labelled else ("slide",)
  lines, columns, notes = manifests.table(
    path, COLUMNS, required, blank=("label",), called=_CALLED
  )
  written = columns["slide"] or []
  labels = columns["label"] or [""] * len(written)
  rows = [i for i, label in enumerate(labels) if label or not labelled]
  if not rows:
    raise UsageError(f"{path}: no slide has a label")
  without = [
    name for name, label in zip(written, labels, strict=True) if not label
  ]
  if without and labelled:
    notes.append(
      f"{path}: {len(without):,} of {len(written):,} slides have no label and"
      f" are not used: {naming.shown(without)}"
    )
  names = [bare(written[i]) for i in rows]
  first: dict[str, int] = {}
  for name, i in zip(names, rows, strict=True):
    if first.setdefault(name, i) != i:
      raise UsageError(
        f"{path}, line {lines[i]}: the slide {name} is also in line"
        f" {lines[first[name]]}; remove one of them"
      )
  groups, splits = (
    None if column is None else [column[i] for i in rows]
    for column in (columns["group"], columns["split"])
  )
  manifests.check_splits(path, [lines[i] for i in rows], splits)
  about = naming.alike("groups", groups or ())
  groups, more = manifests.grouped(names, groups, None)
  about += more
  return _Table(
    names,
    [labels[i] for i in rows],
    groups,
    splits,
    [*notes, *(f"{path}: {note}" for note in about)],
  )


def bare(name: str) -> str:
  """Returns a slide's name: of a file, without its folder and its suffix.

  Args:
    name: as a table has it.
  """
  name = name.replace("\\", "/").rpartition("/")[2]
  stem, dot, suffix = name.rpartition(".")
  return stem if stem and (dot + suffix).lower() in _OF_SLIDES else name


# --- the folders -------------------------------------------------------------


def _encoders(features: str, coords: str) -> dict[str, pathlib.Path]:
  """Returns name -> folder of all encoders that are asked for."""
  given = [part.strip() for part in features.split(",") if part.strip()]
  if not given and coords:
    raise MissingSourceError(
      "the features were made by the run itself; its table is compared when it"
      " goes on"
    )
  if not given:
    raise UsageError(
      "config.data.features is empty; give a folder of feature files, one .h5"
      " for each slide, or several with commas between"
    )
  folders: dict[str, pathlib.Path] = {}
  for part in given:
    path = pathlib.Path(part).expanduser()
    if not path.is_dir():
      raise MissingSourceError(
        f"config.data.features: there is no folder {part}"
      )
    for folder in _with_files(path):
      if folder in folders.values():
        raise UsageError(
          f"config.data.features: {folder} is there twice; name it once"
        )
      folders[_name_of(folder, folders)] = folder
  return folders


def _with_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of encoders that a path stands for.

  The folder itself, or those inside: of a workdir of `extract` all in
  `features/`, of CLAM's `h5_files`, of TRIDENT's every `features_<encoder>`.
  """
  if _files(path):
    return [path]
  for inside in (path, path / "features"):
    if not inside.is_dir():
      continue
    folders = sorted(p for p in inside.iterdir() if p.is_dir() and _files(p))
    # Beside a slide's features TRIDENT and CLAM keep where its tiles are.
    folders = [p for p in folders if p.name not in ("patches", "coords")]
    if folders:
      return folders
  beside = ""
  if any(path.glob("*.pt")) or any(path.glob("pt_files/*.pt")):
    beside = "; of CLAM's files those in h5_files are read, not pt_files"
  raise UsageError(
    f"config.data.features: there is no {_SUFFIX} file in {path}, nor in the"
    f" folders of encoders inside{beside}"
  )


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns slide -> file of a folder; hidden ones are none."""
  with os.scandir(path) as entries:
    names = sorted(
      entry.name
      for entry in entries
      if entry.name.endswith(_SUFFIX) and not entry.name.startswith(".")
    )
  return {name.removesuffix(_SUFFIX): path / name for name in names}


def _name_of(folder: pathlib.Path, taken: Mapping[str, Any]) -> str:
  """Returns what an encoder is called: by as many folders as tell it apart."""
  parts = [part for part in folder.absolute().parts if part.strip("/")]
  last = parts.pop() if parts else "features"
  if last in _PLAIN_FOLDERS and parts:
    last = parts.pop()
  name = _safe(last)
  while name in taken and parts:
    last = f"{parts.pop()}-{last}"
    name = _safe(last)
  return name


def _safe(name: str) -> str:
  return re.sub(r"[^\w.-]+", "_", name).strip(".") or "features"


class _Folder:
  """What is in the folder of an encoder, of the slides of a table.

  Args:
    name: of the encoder.
    folder: where.
    slides: N names.
    bar: is told of each.

  Attributes:
    failures: slide -> why its features cannot be used.
    notes: what the user should know, a line each.

  Raises:
    UsageError: no slide has features here, or they are of two encoders.
  """

  def __init__(
    self,
    name: str,
    folder: pathlib.Path,
    slides: Sequence[str],
    bar: progress.Progress,
  ):
    self._name, self._folder = name, folder
    self._slides = slides
    paths = _files(folder)
    if not paths.keys() & set(slides):
      raise MissingSourceError(
        f"config.data.features: {folder} has features of none of the"
        f" {len(slides):,} slides; the first is {slides[0]}, and the first file"
        f" there {next(iter(paths))}{_SUFFIX}"
      )
    self.failures: dict[str, str] = {}
    self._known: dict[str, feature_files.Described] = {}
    self._paths: dict[str, pathlib.Path] = {}
    for slide in slides:
      bar.update()
      if slide not in paths:
        self.failures[slide] = f"there is no {slide}{_SUFFIX} in {folder}"
        continue
      try:
        described = feature_files.inspect(paths[slide])
      except feature_files.FeatureFileError as e:
        self.failures[slide] = str(e)
        continue
      if not described.count:
        self.failures[slide] = f"{paths[slide]}: no tile, as of no tissue"
        continue
      self._known[slide] = described
      self._paths[slide] = paths[slide]
    self.notes = []
    if unused := sorted(paths.keys() - set(slides)):
      self.notes.append(
        f"{folder}: features of {len(unused):,} slides that have no label are"
        f" not used: {naming.shown(unused)}"
      )
    self._attributes = self._common()

  def encoder(self, rows: Sequence[int]) -> Encoder:
    """Returns the encoder.

    Args:
      rows: slides whose features can be used.
    """
    slides = [self._slides[row] for row in rows]
    known = [self._known[slide] for slide in slides]
    half = all(of.dtype.itemsize == 2 for of in known)
    return Encoder(
      self._name,
      self._folder,
      known[0].dim,
      np.dtype(np.float16 if half else np.float32),
      np.array([of.count for of in known], np.int64),
      [self._paths[slide] for slide in slides],
      self._attributes,
    )

  def _common(self) -> dict[str, Any]:
    """Returns what the files have in common, and refuses two encoders."""
    said: dict[str, tuple[str, Any]] = {}
    common: dict[str, Any] = {}
    for slide, described in self._known.items():
      for key, value in self._telling(described):
        first, before = said.setdefault(key, (slide, value))
        if not _alike(key, before, value):
          raise UsageError(
            f"config.data.features: {self._folder} holds two kinds of features:"
            f" {first}{_SUFFIX} has {key} {before}, {slide}{_SUFFIX} {value};"
            " give each kind a folder of its own"
          )
      if not common:
        common = dict(described.attributes)
      # Of each slide its own: name, width, height.
      common = {
        key: value
        for key, value in common.items()
        if key in _SAME or described.attributes.get(key) == value
      }
    return common

  def _telling(
    self, described: feature_files.Described
  ) -> Iterator[tuple[str, Any]]:
    yield "channels", described.dim
    for key in _SAME:
      if described.attributes.get(key) is not None:
        yield key, described.attributes[key]


def unlike(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """Returns in what two encoders' files differ, as far as both say it.

  Args:
    there: attributes of the ones.
    here: and of the others.
  """
  return [
    f"{key} {here[key]} for {there[key]}"
    for key in _SAME
    if there.get(key) is not None
    and here.get(key) is not None
    and key not in ("encoder", "weights")
    and not _alike(key, there[key], here[key])
  ]


def _alike(key: str, value: Any, other: Any) -> bool:
  """Whether two attributes say the same, rounding apart."""
  if isinstance(value, float | int) and isinstance(other, float | int):
    room = _SAME_MPP if key == "mpp" else 1e-3
    return abs(value - other) <= room * max(abs(value), abs(other))
  return value == other
