"""Manifests: CSV files that say what every image is, and where it lies."""

import csv
import dataclasses
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from jaxtransfer.data import names as naming
from jaxtransfer.errors import MissingSourceError, UsageError, nearest

COLUMNS = ("path", "label", "group", "split", "slide", "task")
# Paths that start elsewhere are seen in a few images as well as in all.
_LOOKED_AT = 100
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@dataclasses.dataclass
class Manifest:
  """What a manifest says of N images, in its order.

  Attributes:
    names: path of every image, as it is written.
    labels: of every image, as it is written; "" where none need be known.
    groups: patient of every image, or its slide where no patient is named;
      one of its own where neither is. None where no image has either.
    slides: slide of every image ("" = unknown), or None.
    splits: "train", "val" or "test" of every image, or None.
    tasks: task of every image, all the same, or None.
    notes: what was ignored or assumed, a line each.
  """

  names: list[str]
  labels: list[str]
  groups: list[str] | None
  slides: list[str] | None
  splits: list[str] | None
  tasks: list[str] | None
  notes: list[str]


def read(
  path: pathlib.Path, task: str = "", *, labelled: bool = True
) -> Manifest:
  """Reads a manifest and checks it.

  Args:
    path: the file.
    task: whose rows are read; "" where there is one task or none.
    labelled: whether every image must have a label.

  Raises:
    UsageError: a mistake in it, with the line.
    MissingSourceError: none of its first images is there.
  """
  required = ("path", "label") if labelled else ("path",)
  lines, columns, notes = table(path, COLUMNS, required)
  check_splits(path, lines, columns["split"])
  _check_duplicates(path, lines, columns)
  about = naming.alike("tasks", columns["task"] or ())
  rows = _of_task(path, len(lines), columns["task"], task)
  if len(rows) < len(lines):
    about.append(
      f"{len(rows):,} of {len(lines):,} rows are of task {task}; the others are"
      " not used"
    )
    columns = {
      name: values and _filled([values[i] for i in rows])
      for name, values in columns.items()
    }
  names = columns["path"] or []
  labels = columns["label"] or [""] * len(names)
  _check_there(path, names)
  if written := sum("\\" in name for name in names):
    about.append(
      f"{written:,} paths have backslashes; they are read as slashes where no"
      " file has that very name"
    )
  about += naming.alike("groups", columns["group"] or ())
  about += naming.alike("slides", columns["slide"] or ())
  groups, about_groups = grouped(names, columns["group"], columns["slide"])
  about += about_groups
  return Manifest(
    names=names,
    labels=labels,
    groups=groups,
    slides=columns["slide"],
    splits=columns["split"],
    tasks=columns["task"],
    notes=[*notes, *(f"{path}: {line}" for line in about)],
  )


def respelled(root: str, name: str) -> str | None:
  """Finds a file that is not there by the name that a manifest gives it.

  macOS takes letters with accents apart that others keep together, and Windows
  writes backslashes.

  Args:
    root: where names start.
    name: as the manifest has it.

  Returns:
    The file's path, or None.
  """
  if name.isascii() and "\\" not in name:
    return None
  spellings = dict.fromkeys((name, name.replace("\\", "/")))
  paths = (_walk(root, pathlib.PurePosixPath(s).parts) for s in spellings)
  return next((path for path in paths if path is not None), None)


def _walk(path: str, parts: Sequence[str]) -> str | None:
  if not parts:
    return path
  forms = [parts[0]]
  forms += [unicodedata.normalize(form, parts[0]) for form in ("NFC", "NFD")]
  for form in dict.fromkeys(forms):
    inside = os.path.join(path, form)
    if os.path.exists(inside):
      path_inside = _walk(inside, parts[1:])
      if path_inside is not None:
        return path_inside
  return None


def why_missing(name: str) -> str:
  """Returns why a file may not be there, or "".

  Args:
    name: as the manifest has it.
  """
  if _WINDOWS.match(name):
    return (
      "it is a Windows path: write paths that start in the manifest's folder,"
      " with / between folders"
    )
  if "\\" in name:
    return "nor is there one with / for its backslashes"
  return ""


def table(
  path: pathlib.Path,
  names: Sequence[str],
  required: Sequence[str],
  *,
  blank: Sequence[str] = (),
  called: Mapping[str, str] | None = None,
) -> tuple[list[int], dict[str, list[str] | None], list[str]]:
  """Reads the columns of a CSV file whose first line names them.

  Args:
    path: the file.
    names: of the columns that are used.
    required: those of them that must be there.
    blank: those of these that may be empty in some rows.
    called: what a column is called elsewhere -> what it is called here; it is
      used where there is none of the right name.

  Returns:
    The line of every row, {name: its values, None where there are none}, and
    notes.

  Raises:
    UsageError: a mistake in it, with the line.
  """
  columns: dict[str, list[str]] = {name: [] for name in names}
  lines: list[int] = []
  notes = []
  rows = _csv_rows(path)
  _, header = next(rows, (0, []))
  header = [name.strip().lower() for name in header]
  for other, name in (called or {}).items():
    if other in header and name not in header:
      header = [name if column == other else column for column in header]
  for name in required:
    if name not in header:
      raise UsageError(
        f"{path}: no column {name!r}; a manifest is comma-separated and its"
        f" first line names the columns, here {', '.join(header) or 'none'}"
      )
  for name in names:
    if header.count(name) > 1:
      raise UsageError(f"{path}: the column {name!r} is there twice")
  unused = [name for name in header if name not in names]
  if unused:
    notes.append(f"{path}: columns not used: {naming.shown(unused, 8)}")
  positions = [(name, header.index(name)) for name in names if name in header]
  for line, row in rows:
    if len(row) != len(header):
      raise UsageError(
        f"{path}, line {line}: {len(row)} cells, the header has {len(header)}"
        " (a comma in a path must be quoted)"
      )
    lines.append(line)
    for name, position in positions:
      columns[name].append(row[position].strip())
  if not lines:
    raise UsageError(f"{path}: no rows")
  for name in required:
    for line, value in zip(lines, columns[name], strict=True):
      if not value and name not in blank:
        raise UsageError(f"{path}, line {line}: empty {name}")
  return lines, {name: _filled(vs) for name, vs in columns.items()}, notes


def _filled(values: list[str]) -> list[str] | None:
  # An unused optional column reads the same as none.
  return values if any(values) else None


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Yields (line, cells) of every line that is not blank."""
  try:
    # utf-8-sig: spreadsheets put a byte-order mark before the first column.
    with open(path, newline="", encoding="utf-8-sig") as f:
      reader = csv.reader(f, strict=True)
      try:
        for row in reader:
          if any(cell.strip() for cell in row):
            yield reader.line_num, row
      except csv.Error as e:
        raise UsageError(f"{path}, line {reader.line_num}: {e}") from e
  except UnicodeDecodeError as e:
    raise UsageError(f"{path}: not UTF-8 text ({e}); save it as UTF-8") from e
  except OSError as e:
    raise UsageError(f"{path}: {e.strerror}") from e


def check_splits(
  path: pathlib.Path, lines: list[int], splits: list[str] | None
) -> None:
  """Checks that a column of splits says train, val or test in every row.

  Args:
    path: the file.
    lines: of every row.
    splits: of every row, or None.

  Raises:
    UsageError: it does not, with the line.
  """
  for line, split in zip(lines, splits or [], strict=False):
    if split not in ("train", "val", "test"):
      raise UsageError(
        f"{path}, line {line}: split is {split!r}; it must be train, val or"
        " test, in every row or in none"
      )


def _check_duplicates(
  path: pathlib.Path,
  lines: list[int],
  columns: dict[str, list[str] | None],
) -> None:
  """One image may serve several tasks, but only once each."""
  names, tasks = columns["path"] or [], columns["task"]
  root = os.path.abspath(path.parent)
  seen: dict[tuple[str, str], int] = {}
  for row, name in enumerate(names):
    # Two spellings of one file are one image.
    same = os.path.normpath(name.replace("\\", "/"))
    same = unicodedata.normalize("NFC", same)
    key = (same, tasks[row] if tasks else "")
    first = seen.setdefault(key, row)
    if first != row and _file(root, names[first]) == _file(root, name):
      raise UsageError(
        f"{path}, line {lines[row]}: {name} is also in line {lines[first]};"
        " remove one of them"
      )


def _file(root: str, name: str) -> str:
  """Returns the normal path of the file that a name stands for."""
  exact = os.path.join(root, name)
  file = exact if os.path.exists(exact) else respelled(root, name)
  return os.path.normpath(file or exact)


def _of_task(
  path: pathlib.Path, count: int, tasks: list[str] | None, task: str
) -> list[int]:
  """Returns which of the rows are of a task."""
  if tasks is None:
    if task:
      raise UsageError(
        f"config.data.task is {task!r}, but {path} has no column 'task'; leave"
        " the key out"
      )
    return list(range(count))
  known = set(tasks) - {""}
  if task and task not in known:
    raise UsageError(
      f"config.data.task is {task!r}{nearest(task, sorted(known))}; {path} has"
      f" {naming.counted(tasks)}"
    )
  if not task and len(set(tasks)) > 1:
    raise UsageError(
      f"{path}: several tasks are not one problem: {naming.counted(tasks)};"
      " config.data.task=NAME picks one"
    )
  return [i for i, name in enumerate(tasks) if name == (task or tasks[0])]


def _check_there(path: pathlib.Path, names: Sequence[str]) -> None:
  some = names[:_LOOKED_AT]
  root = os.path.abspath(path.parent)
  why = why_missing(some[0])
  if not any(os.path.exists(_file(root, name)) for name in some):
    raise MissingSourceError(
      f"{path}: none of the first {len(some)} images is there; paths start in"
      f" the manifest's folder: {path.parent / some[0]}"
      + (f"; {why}" if why else "")
    )


def grouped(
  names: Sequence[str],
  groups: Sequence[str] | None,
  slides: Sequence[str] | None,
) -> tuple[list[str] | None, list[str]]:
  """Returns the group of every row, and notes.

  A slide is of one patient, so that rows of one slide are never divided.

  Args:
    names: of every row.
    groups: of every row, "" where none is named; None for no column.
    slides: likewise.
  """
  notes = []
  if groups is None:
    if slides is None:
      return None, []
    notes.append("no column group (patient) is filled; slides are the groups")
    groups = slides
  slides = slides or [""] * len(names)
  owners: dict[str, dict[str, None]] = {}
  for group, slide in zip(groups, slides, strict=True):
    if group and slide:
      owners.setdefault(slide, {})[group] = None
  wide = [
    f"{slide} ({naming.shown(list(of))})"
    for slide, of in owners.items()
    if len(of) > 1
  ]
  if wide:
    notes.append(
      f"slides of more than one group: {naming.shown(wide)}. Groups are what is"
      " divided: right where slides are numbered anew in each group or hold"
      " several patients; else images of one slide may be trained and tested on"
    )
  of_rows, of_slide, alone = [], 0, 0
  for name, group, slide in zip(names, groups, slides, strict=True):
    if not group:
      of_slide, alone = of_slide + bool(slide), alone + (not slide)
      known = list(owners.get(slide, ()))
      group = known[0] if len(known) == 1 else f"ungrouped:{slide or name}"
    of_rows.append(group)
  count = f"of {len(names):,} rows name"
  if of_slide:
    notes.append(f"{of_slide:,} {count} no group; their slide decides it")
  if alone:
    missing = "slide" if groups is slides else "group"
    notes.append(
      f"{alone:,} {count} no {missing}; each is taken as a group of its own"
    )
  return of_rows, notes
