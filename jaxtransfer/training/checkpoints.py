"""Saving a training so that it goes on as if it had never stopped.

One Orbax checkpoint holds everything at one step: the state, the best numbers
so far, the place in the batches and the lines of metrics.jsonl. It appears
whole or not at all, and every array has a checksum.

Of several processes the first writes and reads for all: the state is the same
on each, and a place counts batches of all together. So their number may change
between two runs, which the files of grain's own handler, one for each process,
would not allow.
"""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxtransfer import errors, files, parallel

_ABOUT = ("place", "best", "records", "devices", "seconds")


@dataclasses.dataclass(frozen=True)
class Saved:
  """What a checkpoint holds.

  Attributes:
    tree: the arrays, NumPy, in the structure that was saved.
    place: state of the iterator of the batches.
    records: lines of metrics.jsonl.
    devices: on which it was computed, in words.
    seconds: that the epoch in hand had taken.
  """

  tree: Any
  place: dict[str, Any]
  records: list[dict[str, Any]]
  devices: str
  seconds: float


class _NewestAndBest:
  """The last checkpoints, and that of the best epoch; Orbax asks it."""

  def __init__(self, keep: int):
    self._newest = checkpoint_managers.LatestN(keep)
    self.best: int | None = None

  def should_preserve(
    self,
    checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> list[bool]:
    newest = self._newest.should_preserve(checkpoints, context=context)
    return [
      new or checkpoint.step == self.best
      for new, checkpoint in zip(newest, checkpoints, strict=True)
    ]


class Checkpoints:
  """The newest checkpoints of one training, and that of its best epoch.

  Args:
    directory: where; made if it is not there.
    keep: how many of the newest.

  Attributes:
    newest: number of the last one saved or restored, None before.

  Raises:
    OSError: the directory cannot be written.
  """

  def __init__(self, directory: str | os.PathLike[str], keep: int):
    self._directory = pathlib.Path(directory).absolute()
    self.newest: int | None = None
    self._kept = _NewestAndBest(keep)
    self._manager = None
    _hear_once()
    if not parallel.is_first():
      return
    self._directory.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._kept,
        create=False,
        # What a killed save left behind.
        cleanup_tmp_directories=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          active_processes={0} if jax.process_count() > 1 else None
        ),
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    if kind is None:
      self.wait()
    if self._manager is not None:
      with contextlib.suppress(Exception):
        self._manager.close()

  def save(
    self,
    number: int,
    tree: Any,
    place: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    devices: str,
    *,
    seconds: float = 0.0,
    is_best: bool = False,
  ) -> None:
    """Begins to save; the arrays may be donated once this returns.

    Args:
      number: of the checkpoint, larger than any before.
      tree: arrays, the same on every process.
      place: state of the iterator of the batches after the last one used.
      records: lines of metrics.jsonl so far.
      devices: on which it was computed, in words.
      seconds: that the epoch in hand has taken.
      is_best: whether an epoch has just ended that is the best so far: the
        checkpoint is kept until there is a better one.

    Raises:
      RunError: this or the save before could not be written.
    """
    self.newest = number
    if is_best:
      self._kept.best = number
    if self._manager is None:
      return
    # Copies: on a CPU what `device_get` returns may be the array itself, whose
    # memory the next step is given.
    arrays = {n: np.array(x) for n, x in _named(jax.device_get(tree)).items()}
    about = {
      "place": dict(place),
      "best": self._kept.best,
      "records": files.finite(records),
      "devices": devices,
      "seconds": seconds,
      "checksums": {name: _checksum(x) for name, x in arrays.items()},
    }
    with self._reported():
      # Refused a directory, Orbax's threads keep the process for five minutes.
      tempfile.TemporaryFile(dir=self._directory).close()
      # Without room they leave a part behind; packed, it may be less.
      room = shutil.disk_usage(self._directory).free
      if room < sum(array.nbytes for array in arrays.values()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      self._manager.save(
        number,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays),
          about=ocp.args.JsonSave(about),
        ),
      )

  def wait(self) -> None:
    """Waits until what was begun is saved.

    Raises:
      RunError: it could not be written.
    """
    if self._manager is not None:
      with self._reported():
        self._manager.wait_until_finished()

  def restore(self, tree: Any) -> tuple[Saved | None, list[str]]:
    """Returns the newest checkpoint that is whole.

    Newer ones, which are damaged, are moved aside.

    Args:
      tree: arrays in the structure that was saved.

    Returns:
      What was saved, None without a checkpoint, and a line for every damaged
      one.

    Raises:
      RunError: there are checkpoints, but none is whole, or the disk or the
        memory does not let one be read; all are left as they are.
    """
    arrays, about, notes = None, None, []
    if self._manager is not None:
      arrays, about, notes = self._read(self._manager, tree)
    about, notes = parallel.all_gather([about, notes])[0]
    if about is None:
      return None, notes
    self.newest, self._kept.best = about["number"], about["best"]
    # The other processes give what has the right shapes.
    whole = parallel.broadcast(tree if arrays is None else arrays)
    return Saved(whole, **{k: about[k] for k in _ABOUT if k != "best"}), notes

  def _read(
    self, manager: ocp.CheckpointManager, tree: Any
  ) -> tuple[Any, dict[str, Any] | None, list[str]]:
    """Returns the arrays, what was saved beside them, and notes."""
    shapes = {
      name: np.zeros(x.shape, x.dtype) for name, x in _named(tree).items()
    }
    damaged: dict[int, str] = {}
    for number in sorted(manager.all_steps(), reverse=True):
      try:
        restored = manager.restore(
          number,
          args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(shapes),
            about=ocp.args.JsonRestore(),
          ),
        )
        arrays = {n: np.asarray(x) for n, x in restored["arrays"].items()}
        about = restored["about"]
        for name, value in arrays.items():
          if _checksum(value) != about["checksums"][name]:
            raise ValueError(f"{name} has another checksum")
        leaves = [arrays[name] for name in shapes]
        whole = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        state = {key: about[key] for key in _ABOUT}
      # Whatever a damaged file makes its reader raise.
      except Exception as e:  # noqa: BLE001
        self._check_readable(number, e)
        damaged[number] = _first_line(e)
        continue
      notes = [self._move_aside(*item) for item in damaged.items()]
      if damaged:
        manager.reload()
      return whole, {**state, "number": number}, notes
    if damaged:
      raise errors.RunError(
        f"{self._directory}: no checkpoint can be read; the newest:"
        f" {next(iter(damaged.values()))}; remove the directory to begin anew"
      )
    return None, None, []

  def _check_readable(self, number: int, error: Exception) -> None:
    """Tells a damaged checkpoint from one that cannot be read now.

    Tensorstore's errors are ValueErrors whatever their cause, and Orbax takes a
    directory that it may not enter for an empty one; so the files are read.

    Args:
      number: of the checkpoint.
      error: what restoring it raised.

    Raises:
      RunError: memory, the disk or a permission is in the way.
    """

    def refuse(e: Exception) -> None:
      raise errors.RunError(
        f"{self._directory / str(number)} cannot be read now"
        f" ({_first_line(e)}); it is left as it is: free memory, mend the disk"
        " or give permission, and the same command resumes"
      ) from error

    if isinstance(error, MemoryError):
      refuse(error)
    try:
      for folder, _, names in os.walk(
        self._directory / str(number), onerror=refuse
      ):
        for name in names:
          with open(os.path.join(folder, name), "rb") as file:
            while file.read(2**20):
              pass
    except OSError as e:
      refuse(e)

  def _move_aside(self, number: int, reason: str) -> str:
    """Hides a damaged checkpoint from Orbax; returns what to say of it."""
    path = self._directory / str(number)
    # Empty and of a new name, it is replaced by what is moved there.
    aside = tempfile.mkdtemp(prefix=f"damaged-{number}-", dir=self._directory)
    path.replace(aside)
    return (
      f"{path} is damaged ({reason}); it was moved to {aside}, and the"
      " checkpoint before it is used"
    )

  @contextlib.contextmanager
  def _reported(self) -> Iterator[None]:
    """Makes one line of an error in writing."""
    try:
      yield
    except Exception as e:
      for part in self._directory.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(part, ignore_errors=True)
      raise errors.RunError(
        f"{self._directory}: the checkpoint could not be written"
        f" ({_first_line(e)}); the one before is intact: make room or give"
        " permission, and the same command resumes"
      ) from e


@functools.cache
def _hear_once() -> None:
  """Keeps to itself what Orbax says of an error that it raises as well.

  Its threads log it, a traceback each, and tensorstore's, which come to an end
  later than the loop that waits for them, raise another one that nobody hears.
  """
  before = sys.unraisablehook

  def ignore(ignored: Any) -> None:
    if str(ignored.exc_value) != "Event loop is closed":
      before(ignored)

  sys.unraisablehook = ignore
  logging.getLogger("absl").addFilter(lambda r: "orbax" not in r.pathname)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _first_line(error: Exception) -> str:
  # Tensorstore's are long, and say at their end what the system said.
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if code:
    return os.strerror(int(code[1]))
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _named(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf}, in the tree's order."""
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
