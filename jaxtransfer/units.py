"""Work divided into named, resumable units that processes share.

A unit has a directory of its own. It is done once: whoever takes its lock first
does it, and the others wait for what it leaves there, `done.json`,
`failed.json`, or `paused.json` where it is to go on later.
"""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from jaxtransfer import files

# Seconds between two looks at what other processes are doing.
_LOOK = 2.0


class Named(Protocol):
  """What a unit must say of itself."""

  @property
  def name(self) -> str:
    """The directory's name."""


U = TypeVar("U", bound=Named)


class Units:
  """The units of a run.

  Args:
    path: where their directories are.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path

  def directory(self, unit: Named) -> pathlib.Path:
    """Returns a unit's directory, there or not."""
    return self.path / unit.name

  def read(self, unit: Named, file: str) -> dict[str, Any] | None:
    """Returns one of a unit's JSON files, None where it is not there yet."""
    try:
      text = (self.directory(unit) / file).read_text(encoding="utf-8")
    except FileNotFoundError:
      return None
    return json.loads(text)

  def done(self, unit: Named) -> dict[str, Any]:
    """Returns what a unit that is done came to."""
    path = self.directory(unit) / "done.json"
    return json.loads(path.read_text(encoding="utf-8"))

  def records(self, pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Returns name -> JSON files of that unit, of all there are.

    Args:
      pattern: of the files' names.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(self.path.glob(f"*/{pattern}")):
      record = json.loads(path.read_text(encoding="utf-8"))
      records.setdefault(path.parent.name, []).append(record)
    return records

  def log(self, unit: Named) -> list[dict[str, Any]]:
    """Returns the lines of a unit's metrics.jsonl so far."""
    path = self.directory(unit) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # Another process may be writing the last line.
    *lines, _ = text.split("\n")
    return [json.loads(line) for line in lines]

  def state(self, unit: Named, stop_after: int | None = None) -> str:
    """Returns "done", "failed", "paused" (late enough) or "open"."""
    for file in ("done", "failed"):
      if (self.directory(unit) / f"{file}.json").exists():
        return file
    paused = self.read(unit, "paused.json")
    if paused and stop_after and paused["epoch"] >= stop_after:
      return "paused"
    return "open"

  def settle(
    self,
    units: Sequence[U],
    work: Callable[[U, int | None], None],
    stop_after: int | None = None,
  ) -> None:
    """Sees to it that units are done, here or by another process.

    Args:
      units: which.
      work: does one, and leaves its file; it is given `stop_after` too.
      stop_after: epochs after which a unit may pause.
    """
    rest = list(dict.fromkeys(units))
    while rest:
      worked = False
      for unit in list(rest):
        if self.state(unit, stop_after) == "open":
          path = self.directory(unit) / ".lock"
          with files.lock(path, wait=False) as lock:
            if not lock:
              continue
            if self.state(unit, stop_after) == "open":
              work(unit, stop_after)
              worked = True
        if self.state(unit) == "done":
          # Most of its bytes, and needed no more.
          directory = self.directory(unit)
          shutil.rmtree(directory / "checkpoints", ignore_errors=True)
          (directory / "paused.json").unlink(missing_ok=True)
        rest.remove(unit)
      if rest and not worked:
        time.sleep(_LOOK)
