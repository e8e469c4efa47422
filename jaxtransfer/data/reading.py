"""One batch of images from rows, in this process or in one of its own.

A reading process imports this module and what the source needs, not JAX.
"""

import contextlib
import functools
import signal
from concurrent import futures
from multiprocessing import connection
from typing import Any

import numpy as np

from jaxtransfer.data import images
from jaxtransfer.data.sources import Examples

Batch = dict[str, np.ndarray]


class Reader:
  """Random access to batches: what grain calls a data source.

  The arguments are those of `pipeline.Batches`, which documents the batch.
  """

  def __init__(
    self,
    examples: Examples,
    rows: np.ndarray,
    image_size: int,
    batch_size: int,
    shuffle_seed: int | None,
    epochs: int,
    drop_last: bool,
    shard: tuple[int, int],
  ):
    index, count = shard
    if min(image_size, batch_size, epochs, count) < 1 or not 0 <= index < count:
      raise ValueError(
        f"image_size {image_size}, batch_size {batch_size}, epochs {epochs},"
        f" shard {shard}: out of range"
      )
    if batch_size % count:
      raise ValueError(f"batch_size {batch_size} in {count} shards")
    self.examples = examples
    self._rows = rows
    self._image_size = image_size
    self._batch_size = batch_size
    self._shuffle_seed = shuffle_seed
    self._shard = shard
    full, rest = divmod(len(rows), batch_size)
    self._per_epoch = full + (rest > 0 and not (drop_last and full))
    self._length = epochs * self._per_epoch
    self._drawn = -1, self._rows
    self.pool: futures.Executor | None = None

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    epoch, step = divmod(index, self._per_epoch)
    part, parts = self._shard
    local = self._batch_size // parts
    start = step * self._batch_size + part * local
    rows = self._order(epoch)[start : start + local]
    batch = {
      "image": np.zeros((local, self._image_size, self._image_size, 3), "u1"),
      "row": np.full(local, -1, np.int64),
      "label": np.full(local, -1, np.int32),
      "mask": np.zeros(local, bool),
    }
    batch["row"][: len(rows)] = rows
    batch["label"][: len(rows)] = self.examples.labels[rows]
    read = functools.partial(self._read, batch)
    reasons = (self.pool.map if self.pool else map)(read, range(len(rows)))
    failures = [
      (int(row), reason)
      for row, reason in zip(rows, reasons, strict=True)
      if reason
    ]
    return {**batch, "failures": failures}

  def _order(self, epoch: int) -> np.ndarray:
    if self._shuffle_seed is None:
      return self._rows
    # Threads may draw it twice at an epoch's start; both draw the same.
    drawn, order = self._drawn
    if drawn != epoch:
      rng = np.random.default_rng([self._shuffle_seed, epoch])
      order = rng.permutation(self._rows)
      self._drawn = epoch, order
    return order

  def _read(self, batch: Batch, i: int) -> str:
    try:
      image = self.examples.read(int(batch["row"][i]))
    except images.ImageError as e:
      return str(e)
    batch["image"][i] = images.fit(image, self._image_size)
    batch["mask"][i] = True
    return ""


def serve(pipe: connection.Connection) -> None:
  """Makes batches in a process of its own until the pipe ends."""
  # Both reach the whole process group. The parent decides what they mean: it
  # may need one more batch before it has saved its state.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  # The pipe ends when the parent does, however it ends.
  with contextlib.suppress(EOFError, OSError):
    reader = pipe.recv()
    while True:
      number = pipe.recv()
      try:
        result = reader[number]
      except Exception as e:
        result = e
      pipe.send(result)
