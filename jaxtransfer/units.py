"""Work divided into named, resumable units that processes share.

A unit has a directory of its own. It is done once: whoever takes its lock first
does it, and the others wait for what it leaves there, `done.json`,
`failed.json`, or `paused.json` where it is to go on later.
"""

import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from jaxtransfer import files

# Seconds between two looks at what other processes are doing.
LOOK = 2.0


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

  def claims(
    self, units: Sequence[U], stop_after: int | None = None
  ) -> Iterator[tuple[U, contextlib.ExitStack] | None]:
    """Takes units that are open, one after the other, until none is left.

    Args:
      units: which.
      stop_after: epochs after which a unit may pause.

    Yields:
      A unit, and what holds its lock until it is closed; None where other
      processes are at work on all that is left: whoever asks again at once
      gets it again.
    """
    rest = list(dict.fromkeys(units))
    while rest:
      claimed = False
      for unit in list(rest):
        if self.state(unit, stop_after) == "open":
          holder = contextlib.ExitStack()
          lock = files.lock(self.directory(unit) / ".lock", wait=False)
          if not holder.enter_context(lock):
            holder.close()
            continue
          if self.state(unit, stop_after) == "open":
            rest.remove(unit)
            claimed = True
            yield unit, holder
            continue
          holder.close()
        rest.remove(unit)
      if rest and not claimed:
        yield None

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
    for claim in self.claims(rest, stop_after):
      if claim is None:
        time.sleep(LOOK)
        continue
      unit, holder = claim
      with holder:
        work(unit, stop_after)
      self._tidy(unit)
    for unit in rest:
      self._tidy(unit)

  def _tidy(self, unit: Named) -> None:
    """Removes what a unit that is done needs no more: most of its bytes."""
    if self.state(unit) == "done":
      directory = self.directory(unit)
      shutil.rmtree(directory / "checkpoints", ignore_errors=True)
      (directory / "paused.json").unlink(missing_ok=True)
