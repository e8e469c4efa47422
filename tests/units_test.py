"""Units of work that several processes share."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest

from jaxtransfer import files
from jaxtransfer.units import Units

# One of the processes: works on every unit, line by line into its log, and
# waits in the one it is told to, as a training that takes its time would.
WORKER = """
import dataclasses, pathlib, sys, time
from jaxtransfer import files
from jaxtransfer.units import Units

path, me, slow = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

@dataclasses.dataclass(frozen=True)
class Unit:
  name: str

def work(unit, stop_after):
  directory = units.directory(unit)
  with open(directory / "metrics.jsonl", "a") as log:
    log.write(f'{{"by": "{me}"}}\\n')
  if unit.name == slow:
    (directory / "waits").touch()
    time.sleep(600)
  time.sleep(0.05)
  files.write_json(directory / "done.json", {"by": me})

units = Units(path)
units.settle([Unit(f"unit-{i}") for i in range(6)], work)
"""


@dataclasses.dataclass(frozen=True)
class Unit:
  name: str


def _start(path, me, slow="none"):
  command = [sys.executable, "-c", WORKER, str(path), me, slow]
  return subprocess.Popen(command)


def _wait_for(path):
  until = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < until, f"{path} never came"
    time.sleep(0.01)


def test_a_unit_whose_process_is_killed_is_taken_over(tmp_path):
  """The system frees a dead process's lock: the other one, which until then
  waited for what the unit comes to, does it again from where it stands; every
  other unit has been done once."""
  with _start(tmp_path, "killed", slow="unit-2") as killed:
    try:
      _wait_for(tmp_path / "unit-2" / "waits")
      with _start(tmp_path, "other") as other:
        try:
          # All that is left then is the unit in the first one's hands.
          for i in range(3, 6):
            _wait_for(tmp_path / f"unit-{i}" / "done.json")
          assert other.poll() is None
          killed.send_signal(signal.SIGKILL)
          assert other.wait(60) == 0
        finally:
          other.kill()
    finally:
      killed.kill()
  units = Units(tmp_path)
  logs = [[one["by"] for one in units.log(Unit(f"unit-{i}"))] for i in range(6)]
  assert logs.pop(2) == ["killed", "other"]
  assert all(len(log) == 1 for log in logs)
  assert units.done(Unit("unit-2")) == {"by": "other"}
  assert len(units.records("done.json")) == 6


def test_states_are_what_lies_in_the_directory(tmp_path):
  """Paused is late enough only for who asked for no more; what failed is not
  tried again until somebody removes its file."""
  units, unit = Units(tmp_path), Unit("one")
  calls = []

  def work(one, stop_after):
    calls.append(stop_after)
    kind = "done" if stop_after is None else "paused"
    (units.directory(one) / "checkpoints").mkdir(exist_ok=True)
    record = {"epoch": stop_after}
    files.write_json(units.directory(one) / f"{kind}.json", record)

  assert units.state(unit) == "open" and units.read(unit, "done.json") is None
  units.settle([unit, unit], work, stop_after=2)
  assert units.state(unit, 2) == units.state(unit, 1) == "paused"
  assert units.state(unit, 3) == units.state(unit) == "open"
  units.settle([unit], work, stop_after=1)
  assert calls == [2]
  units.settle([unit], work)
  assert calls == [2, None] and units.state(unit) == "done"
  # What is needed to go on is gone once it is done.
  left = {path.name for path in units.directory(unit).iterdir()}
  assert left == {".lock", "done.json"}

  other = Unit("other")
  units.directory(other).mkdir()
  failed = units.directory(other) / "failed.json"
  failed.write_text(json.dumps({"reason": "the loss is nan"}))
  units.settle([other], work)
  assert units.state(other) == "failed" and len(calls) == 2
  failed.unlink()
  units.settle([other], work)
  assert units.state(other) == "done" and len(calls) == 3


def test_a_unit_that_raises_stays_open(tmp_path):
  """And unlocked: the next process, or this one, begins it again."""
  units, unit = Units(tmp_path), Unit("one")

  def fail(one, stop_after):
    raise OSError("no space")

  with pytest.raises(OSError, match="no space"):
    units.settle([unit], fail)
  assert units.state(unit) == "open"
  with files.lock(units.directory(unit) / ".lock", wait=False) as lock:
    assert lock


def test_claims_are_locked_until_they_are_closed_and_waited_for(tmp_path):
  """Two may be held at once; what another process has is asked for again, and
  is over once it has done it."""
  mine, other = Units(tmp_path), Units(tmp_path)
  wanted = [Unit("a"), Unit("b"), Unit("c")]
  theirs = other.claims(wanted)
  first, holder = next(theirs)
  claims = mine.claims(wanted)
  found = [next(claims), next(claims)]
  assert [first.name, *(unit.name for unit, _ in found)] == ["a", "b", "c"]
  assert next(claims) is None and next(claims) is None
  for unit, held in found:
    files.write_json(mine.directory(unit) / "done.json", {})
    held.close()
  files.write_json(other.directory(first) / "done.json", {})
  assert next(claims, "over") == "over"
  holder.close()
  assert next(theirs, "over") == "over"
