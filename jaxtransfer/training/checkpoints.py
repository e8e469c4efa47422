"""Saving a training so that it goes on as if it had never stopped.

One Orbax checkpoint holds everything at one step: the state, the best numbers
so far, the iterator of the batches and the lines of metrics.jsonl. It appears
whole or not at all, and every array has a checksum.
"""

import contextlib
import dataclasses
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from grain import checkpoint as grain_checkpoint

from jaxtransfer import errors


@dataclasses.dataclass(frozen=True)
class Saved:
  """What a checkpoint holds beside the iterator's place.

  Attributes:
    tree: the arrays, NumPy, in the structure that was saved.
    records: lines of metrics.jsonl.
    devices: on which it was computed, in words.
  """

  tree: Any
  records: list[dict[str, Any]]
  devices: str


class Checkpoints:
  """The newest checkpoints of one training.

  Args:
    directory: where; made if it is not there.
    keep: how many.

  Raises:
    OSError: the directory cannot be written.
  """

  def __init__(self, directory: str | os.PathLike[str], keep: int):
    self._directory = pathlib.Path(directory).absolute()
    self._directory.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        # What a killed save left behind.
        cleanup_tmp_directories=True,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    if kind is None:
      self.wait()
    with contextlib.suppress(Exception):
      self._manager.close()

  def newest(self) -> int | None:
    """Returns the number of the newest checkpoint, None without any."""
    return self._manager.latest_step()

  def save(
    self,
    number: int,
    tree: Any,
    iterator: grain.DatasetIterator,
    records: Sequence[Mapping[str, Any]],
    devices: str,
  ) -> None:
    """Begins to save; the arrays may be donated once this returns.

    Args:
      number: of the checkpoint, larger than any before.
      tree: arrays.
      iterator: of the batches, after the last one used.
      records: lines of metrics.jsonl so far.
      devices: on which it was computed, in words.

    Raises:
      RunError: this or the save before could not be written.
    """
    # Copies: on a CPU what `device_get` returns may be the array itself, whose
    # memory the next step is given.
    arrays = {n: np.array(x) for n, x in _named(jax.device_get(tree)).items()}
    about = {
      "records": [dict(record) for record in records],
      "devices": devices,
      "checksums": {name: _checksum(x) for name, x in arrays.items()},
    }
    with self._reported():
      self._manager.save(
        number,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays),
          iterator=grain_checkpoint.CheckpointSave(iterator),
          about=ocp.args.JsonSave(about),
        ),
      )

  def wait(self) -> None:
    """Waits until what was begun is saved.

    Raises:
      RunError: it could not be written.
    """
    with self._reported():
      self._manager.wait_until_finished()

  def restore(
    self, tree: Any, iterator: grain.DatasetIterator
  ) -> tuple[Saved | None, list[str]]:
    """Returns the newest checkpoint that is whole; damaged ones are removed.

    Args:
      tree: arrays or shapes in the structure that was saved.
      iterator: is set to the place it had.

    Returns:
      What was saved, None without a checkpoint, and a line for every damaged
      one.
    """
    start = iterator.get_state()
    shapes = {
      name: np.zeros(x.shape, x.dtype) for name, x in _named(tree).items()
    }
    notes = []
    for number in sorted(self._manager.all_steps(), reverse=True):
      try:
        found = self._manager.restore(
          number,
          args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(shapes),
            iterator=grain_checkpoint.CheckpointRestore(iterator),
            about=ocp.args.JsonRestore(),
          ),
        )
        arrays = {n: np.asarray(x) for n, x in found["arrays"].items()}
        about = found["about"]
        for name, value in arrays.items():
          if _checksum(value) != about["checksums"][name]:
            raise ValueError(f"{name} has another checksum")
        leaves = [arrays[name] for name in shapes]
        whole = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        return Saved(whole, about["records"], about["devices"]), notes
      # Whatever a damaged file makes its reader raise.
      except Exception as e:  # noqa: BLE001
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        notes.append(
          f"{self._directory / str(number)} is damaged ({reason}); it was"
          " removed and the checkpoint before it used"
        )
        iterator.set_state(start)
        self._manager.delete(number)
    return None, notes

  @contextlib.contextmanager
  def _reported(self) -> Iterator[None]:
    """Makes one line of an error in writing."""
    try:
      yield
    except Exception as e:
      reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
      raise errors.RunError(
        f"{self._directory}: the checkpoint could not be written ({reason});"
        " the one before is intact: make room or give permission, and the same"
        " command resumes"
      ) from e


def _named(tree: Any) -> dict[str, Any]:
  """Returns {path: leaf}, in the tree's order."""
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
