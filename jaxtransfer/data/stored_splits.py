"""splits.json: what was in which split, and what each row was then."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtransfer import files
from jaxtransfer.data import names as naming
from jaxtransfer.data.sources import Examples
from jaxtransfer.errors import UsageError

# What a row is said to be, beside its name.
_COLUMNS = ("label", "group", "slide", "task", "split")
_SHOWN = 3


def save_splits(
  path: str | os.PathLike[str],
  splits: Mapping[str, np.ndarray],
  examples: Examples,
) -> None:
  """Writes splits.json: the rows of every split, and what all rows are.

  A column is {"values": the distinct ones, "rows": which of them each row
  has}, or null where the source has none.

  Args:
    path: the file, written atomically.
    splits: row indices of every split.
    examples: the source, by which one that has changed is known again.
  """
  value: dict[str, Any] = {name: rows.tolist() for name, rows in splits.items()}
  value["names"] = list(examples.names)
  value["classes"] = list(examples.classes)
  value["columns"] = {
    name: _coded(values) for name, values in _columns(examples).items()
  }
  # A line for each, for 300,000 rows with a line for every number are long.
  lines = [f"{json.dumps(k)}: {_compact(v)}" for k, v in value.items()]
  files.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load_splits(
  path: str | os.PathLike[str], examples: Examples
) -> dict[str, np.ndarray]:
  """Reads splits.json back, for the same rows in the same order.

  Args:
    path: the file.
    examples: the source as it is now.

  Returns:
    Row indices of every split.

  Raises:
    UsageError: the file is damaged or of an older version, or the source has
      changed since.
  """
  splits, stored = _read(path)
  if "columns" not in stored:
    raise UsageError(
      f"{path} is of an older version, which did not keep the labels: whether"
      " they are still those of the run cannot be told; use another --workdir"
    )
  _compare(path, stored, examples)
  return splits


def check_unchanged(
  path: str | os.PathLike[str], examples: Examples
) -> str | None:
  """Checks that the source is still what a finished run was made of.

  Args:
    path: of splits.json.
    examples: the source as it is now.

  Returns:
    What could not be compared, or None.

  Raises:
    UsageError: the file is damaged, or the source has changed since.
  """
  _, stored = _read(path)
  _compare(path, stored, examples)
  if "columns" not in stored:
    return f"{path} is of an older version, which kept names and no labels"
  return None


def digest(examples: Examples) -> str:
  """Returns a hash of what all rows are: names, labels, groups and so on."""
  content = [
    list(examples.names),
    list(examples.classes),
    list(_columns(examples).items()),
  ]
  return hashlib.sha256(_compact(content).encode()).hexdigest()


def _columns(examples: Examples) -> dict[str, list[str] | None]:
  labels = [examples.classes[c] for c in examples.labels.tolist()]
  return {
    "label": labels,
    "group": examples.groups,
    "slide": examples.slides,
    "task": examples.tasks,
    "split": examples.splits,
  }


def _coded(values: list[str] | None) -> dict[str, list[Any]] | None:
  if values is None:
    return None
  number: dict[str, int] = {}
  rows = [number.setdefault(value, len(number)) for value in values]
  return {"values": list(number), "rows": rows}


def _decoded(coded: Mapping[str, list[Any]] | None) -> list[str] | None:
  if coded is None:
    return None
  values = coded["values"]
  return [values[i] for i in coded["rows"]]


def _compact(value: Any) -> str:
  # Escaped to ASCII: a name on disk need not be UTF-8.
  return json.dumps(value, separators=(",", ":"))


def _read(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns the splits, and what was stored of the rows."""
  try:
    with open(path, encoding="utf-8") as f:
      value = dict(json.load(f))
    stored: dict[str, Any] = {"names": list(value.pop("names"))}
    if "columns" in value:
      stored["classes"] = list(value.pop("classes"))
      columns = value.pop("columns")
      stored["columns"] = {name: _decoded(columns[name]) for name in _COLUMNS}
    splits = {k: np.array(rows, np.int64) for k, rows in value.items()}
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
    raise UsageError(f"{path}: not a splits.json ({e}); remove it") from e
  return splits, stored


def _compare(
  path: str | os.PathLike[str], stored: Mapping[str, Any], examples: Examples
) -> None:
  """Refuses a source that is not what was stored, with its first rows."""
  difference = _different_names(
    stored["names"], list(examples.names), examples.unit
  )
  if not difference and "columns" in stored:
    difference = _different_rows(stored["columns"], examples)
    if not difference and stored["classes"] != list(examples.classes):
      difference = (
        f"its classes were {naming.shown(stored['classes'], 5)}, and are"
        f" {naming.shown(examples.classes, 5)}"
      )
  if difference:
    raise UsageError(
      f"{path}: the source has changed since: {difference}; use another"
      " --workdir"
    )


def _different_names(old: list[str], new: list[str], unit: str) -> str:
  if old == new:
    return ""
  gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
  if not gone and not added and len(old) == len(new):
    row = next(i for i in range(len(old)) if old[i] != new[i])
    return (
      f"the order of rows: row {row + 1} is {old[row]} there, {new[row]} now"
    )
  examples = naming.shown([*added, *gone], _SHOWN)
  return f"{len(added):,} {unit} are new, {len(gone):,} gone ({examples})"


def _different_rows(
  stored: Mapping[str, list[str] | None], examples: Examples
) -> str:
  """Says which rows are another than stored, by all columns; or nothing."""
  now = _columns(examples)
  changed = [name for name in _COLUMNS if stored[name] != now[name]]
  pairs = {
    name: [
      column if column is not None else [""] * len(examples)
      for column in (stored[name], now[name])
    ]
    for name in changed
  }
  rows = sorted(
    {
      row
      for old, new in pairs.values()
      for row in np.flatnonzero(
        np.array(old, object) != np.array(new, object)
      ).tolist()
    }
  )
  changes = []
  for row in rows[:_SHOWN]:
    differences = [
      f"{name} {_said(old[row])} there, {_said(new[row])} now"
      for name, (old, new) in pairs.items()
      if old[row] != new[row]
    ]
    changes.append(
      f"row {row + 1}, {examples.names[row]}: {', '.join(differences)}"
    )
  if len(rows) > 1:
    changes.append(f"{len(rows):,} rows differ in all")
  return "; ".join(changes)


def _said(value: str) -> str:
  return repr(value) if value else "none"
