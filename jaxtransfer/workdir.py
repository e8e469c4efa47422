"""What a run leaves in its directory, and whose directory it is."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from jaxtransfer import configuration, errors, files, hosts

# A run may go on with more workers or other devices, and show other images; the
# rest decides numbers.
_FREE_KEYS = ("data.workers", "parallel", "thumbnails")
_PACKAGES = (
  "jaxtransfer",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
  "scipy",
  "scikit-learn",
  "pillow",
)


class Workdir:
  """One run's directory: config.json, metrics.jsonl, results and features.

  Args:
    path: the directory; `claim` made it.
    config: the whole config as plain values.
    command: the exact command line.
    processes: of the run.
    dry: whether nothing is to be done.

  Attributes:
    writes: whether this process writes to the directory; one of several does.
    dry: whether the job is to tell what it would do, once its checks are over,
      and to write nothing.
  """

  def __init__(
    self,
    path: pathlib.Path,
    config: Mapping[str, Any],
    command: str,
    processes: hosts.One,
    dry: bool = False,
  ):
    self.path = path
    self.config = config
    self.command = command
    self.writes = processes.first and not dry
    self.dry = dry
    self._processes = processes

  def begin(self, devices: str) -> dict[str, Any]:
    """Writes config.json: the run's checks are over and its work begins.

    Args:
      devices: which they are, in words.

    Returns:
      What was run: command, versions, devices, commit, time.

    Raises:
      UsageError: another config was begun here in the meantime.
      UsageError, RunError, SystemExit: another process of the run failed its
        checks.
    """
    self._processes.begin()
    run = {
      "command": self.command,
      "versions": _versions(),
      "devices": devices,
      "commit": _commit(),
      "started": datetime.datetime.now(datetime.UTC).isoformat(
        timespec="seconds"
      ),
    }
    if self.writes:
      # Of several that share the directory all may have found it empty.
      with files.lock(self.path / ".begin.lock", wait=True):
        _refuse_other(self.path, self.config)
        files.write_json(
          self.path / "config.json", {"config": self.config, "run": run}
        )
    return run

  def log(self, **values: Any) -> None:
    """Appends one line to metrics.jsonl."""
    if not self.writes:
      return
    files.append_line(self.path / "metrics.jsonl", _line(values))

  def replace_log(self, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl anew, atomically: what a resumed run knows of."""
    if not self.writes:
      return
    text = "".join(f"{_line(record)}\n" for record in records)
    files.write_text(self.path / "metrics.jsonl", text)

  @property
  def finished(self) -> bool:
    """Whether a run of this config has left its results here.

    With several processes all must ask.
    """
    return self._processes.broadcast((self.path / "results.json").exists())

  def share(self, compute: Callable[[], Any]) -> Any:
    """Returns what the first process of the run computes, to all of them.

    Args:
      compute: what; its result is for JSON.
    """
    return self._processes.broadcast(
      compute() if self._processes.first else None
    )

  def finish(self, results: Mapping[str, Any]) -> int:
    """Writes results.json, the sign that the run is finished, and tells it.

    Args:
      results: `summary` and `measurements`; what is no number becomes null.

    Returns:
      The exit code.
    """
    files.write_json(self.path / "results.json", files.finite(results))
    summary = results["summary"]
    print(f"\n{summary['sentence']}\n\n{self.path / 'report.html'}", flush=True)
    return self._report(summary)

  def report_failures(self) -> int:
    """Says what a finished run had to leave out.

    Returns:
      The exit code: 0, or 1 where something was left out.
    """
    if not self.writes:
      return 0
    text = (self.path / "results.json").read_text(encoding="utf-8")
    return self._report(json.loads(text)["summary"])

  def _report(self, summary: Mapping[str, Any]) -> int:
    unreadable, failed = summary.get("failures"), summary.get("failed")
    broken, path = summary.get("broken"), self.path / "failures.csv"
    if unreadable:
      unit = str(summary.get("unit") or "images").capitalize()
      print(f"{unit} that could not be read: {unreadable:,}; see {path}")
    if failed:
      print(f"Trainings that failed: {len(failed):,}; see the report")
    if broken:
      print(f"Slides that could not be used: {len(broken):,}; see {path}")
    return 1 if unreadable or failed or broken else 0


@contextlib.contextmanager
def claim(
  path: str | os.PathLike[str],
  config: Mapping[str, Any],
  command: str,
  processes: hosts.One | None = None,
  shared: bool = False,
) -> Iterator[Workdir]:
  """Takes a directory for one run of one config, for as long as it runs.

  Args:
    path: the directory; made if it is not there.
    config: the whole config as plain values.
    command: the exact command line.
    processes: of the run, of which the first takes it for all; one by default.
    shared: whether other runs of the same config may be at work in it at the
      same time, and divide the work among themselves.

  Yields:
    The directory. A run that stopped before goes on in it.

  Raises:
    UsageError: another process is at work in it, it holds a run of another
      config, or it cannot be written or named.
  """
  path = pathlib.Path(path)
  _check_name(path)
  config = json.loads(json.dumps(files.finite(config)))
  processes = processes or hosts.One()
  if not processes.first:
    yield Workdir(path, config, command, processes)
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = open(  # noqa: SIM115
      path / ".lock", "a+", encoding="utf-8", errors="backslashreplace"
    )
  except OSError as e:
    raise errors.UsageError(
      f"--workdir={path} cannot be written: {e.strerror}"
    ) from None
  with lock:
    if not _take(path, lock, shared):
      print(
        f"--workdir={path}: its file system has no locks, so a second process"
        " that works in it would not be noticed; start one at a time",
        flush=True,
      )
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()
    _refuse_other(path, config)
    yield Workdir(path, config, command, processes)


def look(
  path: str | os.PathLike[str],
  config: Mapping[str, Any],
  shared: bool = False,
) -> Workdir:
  """Checks a directory as `claim` does, but makes and writes nothing.

  Args:
    path: the directory, there or not.
    config: as `claim` takes it.
    shared: likewise.

  Returns:
    The directory, for a dry run.

  Raises:
    UsageError: `claim` would refuse it.
  """
  path = pathlib.Path(path)
  _check_name(path)
  config = json.loads(json.dumps(files.finite(config)))
  there = files.nearest_existing(path)
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    reason = errno.EACCES if there.is_dir() else errno.ENOTDIR
    raise errors.UsageError(
      f"--workdir={path} cannot be written: {os.strerror(reason)}"
    )
  with contextlib.suppress(FileNotFoundError):
    with open(path / ".lock", encoding="utf-8", errors="replace") as lock:
      _take(path, lock, shared)
  _refuse_other(path, config)
  return Workdir(path, config, "", hosts.One(), dry=True)


def _take(path: pathlib.Path, lock: IO[str], shared: bool) -> bool:
  """Takes a directory's lock; returns whether its file system has locks.

  The kernel lets go of it when the process ends, however it ends.

  Raises:
    UsageError: another process has it.
  """
  taken = files.take_lock(lock, wait=False, shared=shared)
  if taken is False:
    lock.seek(0)
    raise errors.UsageError(
      f"--workdir={path} is in use by process {lock.read().strip()};"
      " wait for it or choose another directory"
    )
  return taken is not None


def _check_name(path: pathlib.Path) -> None:
  if not _is_utf8(path):
    raise errors.UsageError(
      f"--workdir={path.absolute()} is no UTF-8, and checkpoints cannot be kept"
      " under such a name; choose another directory"
    )


def _is_utf8(path: pathlib.Path) -> bool:
  try:
    str(path.absolute()).encode()
  except UnicodeEncodeError:
    return False
  return True


def _line(record: Mapping[str, Any]) -> str:
  return json.dumps(files.finite(record), allow_nan=False)


def _refuse_other(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Refuses a directory in which another config was run."""
  stored = path / "config.json"
  if not stored.exists():
    return
  try:
    before = json.loads(stored.read_text(encoding="utf-8"))["config"]
  except (ValueError, KeyError):
    raise errors.UsageError(
      f"{stored} is not a config this program wrote; choose another --workdir"
    ) from None
  old, new = configuration.flat(before), configuration.flat(config)
  if old.get("job") != new.get("job"):
    old, new = {"job": old.get("job")}, {"job": new.get("job")}
  # An older version called some keys otherwise, and did not have every one:
  # "", 0 and False are without it.
  renamed = configuration.RENAMED
  old = {renamed[k] if renamed.get(k) in new else k: old[k] for k in old}
  old = {key: value for key, value in new.items() if not value} | old
  differences = [
    f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key not in _FREE_KEYS
  ]
  if differences:
    raise errors.UsageError(
      f"--workdir={path} holds a run of another config"
      f" ({'; '.join(differences)}); choose another directory"
    )


def _versions() -> dict[str, str]:
  versions = {"python": platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return versions


def _commit() -> str | None:
  """Returns the commit of the source this runs from, where it is a clone."""
  root = pathlib.Path(__file__).parent.parent
  if not (root / ".git").exists():
    return None
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    return subprocess.run(
      ["git", "-C", str(root), "rev-parse", "HEAD"],
      capture_output=True,
      check=True,
      text=True,
      timeout=10,
    ).stdout.strip()
  return None
