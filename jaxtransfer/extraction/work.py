"""A unit at work: its tiles are read, encoded, and written.

Features wait on the disk until those of a bag are all there. What is written
last of a bag is the record of it.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from jaxtransfer.data import feature_files, pipeline, tile_reading, tiles
from jaxtransfer.data.slides import SlideError
from jaxtransfer.extraction.store import Packet, Store, failed

# Bags of a packet that are opened at the same time.
_OPENED = 8
# Units whose files are being written while others are computed.
_WRITTEN = 2


@dataclasses.dataclass(frozen=True)
class Asked:
  """A piece that is being read.

  Attributes:
    bag: its number in the packet.
    tiles: (n,) of the bag.
    slot: of the first of them.
    future: of a `Read`.
  """

  bag: int
  tiles: np.ndarray
  slot: int
  future: futures.Future[tile_reading.Read]


class Work:
  """A packet at work. Its tiles have slots, in the order of being read.

  Args:
    packet: its bags.
    store: of their files.
    batch_size: tiles of a batch.
    image_size: side of a tile as it is read, pixels.
    release: called when all is written.

  Attributes:
    batches: how many the slots fill.
    outstanding: batches that were asked for and not added yet.
    all_asked: whether no other will be.
    computed: tiles so far, until they are written.
  """

  def __init__(
    self,
    packet: Packet,
    store: Store,
    batch_size: int,
    image_size: int,
    release: Callable[[], None],
  ):
    self.batches = -(-packet.count // batch_size)
    self.outstanding, self.all_asked, self.computed = 0, False, 0
    self._packet, self._store, self._release = packet, store, release
    self._batch_size, self._image_size = batch_size, image_size
    self._started = time.monotonic()
    counts = [bag.count for bag in packet.bags]
    self._starts = [0, *itertools.accumulate(counts)]
    self._mask = np.zeros(packet.count, bool)
    self._unreadable: list[dict[int, str]] = [{} for _ in counts]
    self._failed: dict[int, str] = {}
    self._places: dict[int, tiles.Places] = {}
    self._spools: dict[str, Spool] = {}
    wanted = [i for i, bag in enumerate(packet.bags) if store.is_open(bag)]
    with futures.ThreadPoolExecutor(_OPENED) as pool:
      opened = pool.map(_open, [packet.bags[i] for i in wanted])
      for i, places in zip(wanted, opened, strict=True):
        if isinstance(places, str):
          self._failed[i] = places
        else:
          self._places[i] = places

  @property
  def complete(self) -> bool:
    """Whether nothing more of it is to be read or computed."""
    return self.all_asked and not self.outstanding

  def _inside(self, number: int) -> list[tuple[int, int, int]]:
    """Returns bag, first slot and last + 1 of what is wanted of a batch."""
    start = number * self._batch_size
    end = start + self._batch_size
    spans = zip(self._starts[:-1], self._starts[1:], strict=True)
    return [
      (i, max(start, first), min(end, last))
      for i, (first, last) in enumerate(spans)
      if i in self._places
      and i not in self._failed
      and max(start, first) < min(end, last)
    ]

  def wants(self, number: int) -> bool:
    """Whether any tile of a batch is wanted."""
    return bool(self._inside(number))

  def ask(self, number: int, readers: pipeline.Readers) -> list[Asked]:
    """Has a batch read."""
    asked = []
    for i, first, last in self._inside(number):
      places, start = self._places[i], self._starts[i]
      slot = first
      for some in tile_reading.pieces(
        places.order[first - start : last - start]
      ):
        piece = self._packet.bags[i].piece(places, some)
        asked.append(Asked(i, some, slot, readers.submit(piece)))
        slot += len(some)
    return asked

  def batch(self, number: int, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Waits for what was asked for.

    Returns:
      image, row and mask, as `inference.stream` takes them.
    """
    size, side = self._batch_size, self._image_size
    image = np.zeros((size, side, side, 3), np.uint8)
    row = np.full(size, -1, np.int64)
    for piece in asked:
      read = piece.future.result()
      if read.broken:
        self._failed.setdefault(piece.bag, read.broken)
        continue
      count, at = len(piece.tiles), piece.slot - number * size
      image[at : at + count] = read.pixels
      row[at : at + count] = np.arange(piece.slot, piece.slot + count)
      self._mask[piece.slot : piece.slot + count] = [
        not reason for reason in read.reasons
      ]
      self._note(piece, read.reasons)
    return {"image": image, "row": row, "mask": row >= 0}

  def _note(self, piece: Asked, reasons: Sequence[str]) -> None:
    """Notes which tiles could not be read: a bag with too many fails."""
    bag, unreadable = self._packet.bags[piece.bag], self._unreadable[piece.bag]
    unreadable.update(
      (int(tile), reason)
      for tile, reason in zip(piece.tiles, reasons, strict=True)
      if reason
    )
    limit = self._store.settings.max_failures
    if len(unreadable) > limit * bag.count:
      tile, reason = next(iter(unreadable.items()))
      x, y, name = self._places[piece.bag].named(tile)
      self._failed.setdefault(
        piece.bag,
        f"{len(unreadable):,} of {bag.count:,} tiles could not be read, more"
        f" than data.max_failures = {limit:g}; the first:"
        f" {name or f'({x}, {y})'}: {reason}",
      )

  def add(self, number: int, values: Mapping[str, np.ndarray]) -> None:
    """Keeps the features of a batch.

    Args:
      number: which batch.
      values: folder -> (B, D).
    """
    self.outstanding -= 1
    start = number * self._batch_size
    for i, first, last in self._inside(number):
      kept = self._mask[first:last]
      for folder, array in values.items():
        own = array[first - start : last - start]
        if not np.isfinite(own[kept]).all():
          self._failed[i] = _why_not_finite(folder, own.dtype)
          break
        if folder not in self._spools:
          directory = self._store.directory(self._packet)
          self._spools[folder] = Spool(directory, own.shape[1], own.dtype)
        self._spools[folder].write(first, own)
      self.computed += last - first

  def write(self) -> None:
    """Writes the files of all bags, and the record of each after its own.

    Raises:
      OSError: the disk is full.
    """
    seconds = time.monotonic() - self._started
    self.computed = 0
    with contextlib.ExitStack() as over:
      over.callback(self._release)
      for spool in self._spools.values():
        over.callback(spool.close)
      for i in sorted({*self._places, *self._failed}):
        bag = self._packet.bags[i]
        share = seconds * bag.count / max(1, self._packet.count)
        self._store.tidy(bag)
        try:
          if i in self._failed:
            record = failed(self._failed[i])
          else:
            record = self._write_bag(i)
        except feature_files.FeatureFileError as e:
          record = failed(str(e))
        self._store.record(bag, {**record, "seconds": share})

  def _write_bag(self, i: int) -> dict[str, Any]:
    """Writes the files of one bag; returns what is recorded of it."""
    bag, places, start = self._packet.bags[i], self._places[i], self._starts[i]
    slots = np.empty(bag.count, np.int64)
    slots[places.order] = np.arange(start, start + bag.count)
    kept = np.flatnonzero(self._mask[slots])
    dtype = np.dtype(self._store.settings.dtype)
    for output in self._store.outputs:
      spool = self._spools.get(output.folder)
      rows = Rows(spool, slots[kept], output.channels, dtype)
      self._store.write(output, bag, places, kept, rows)
    dropped = sorted(self._unreadable[i].items())
    return {
      "tiles": len(kept),
      "mpp": places.attributes.get("mpp"),
      "dropped": [[*places.named(tile), reason] for tile, reason in dropped],
      "reason": "",
    }


def _open(bag: tiles.Bag) -> tiles.Places | str:
  """Returns where a bag's tiles are, or why it cannot be used."""
  try:
    return bag.open()
  except SlideError as e:
    return str(e)


def _why_not_finite(folder: str, dtype: np.dtype) -> str:
  if dtype == np.float16:
    return (
      f"{folder}: NaN, or more than float16 holds; in another workdir,"
      " --config.features_dtype=float32 may hold it"
    )
  return f"{folder}: NaN or infinite"


class Spool:
  """Rows of features on the disk, in a file without a name.

  So memory does not grow with a slide, and nothing is left of a process that
  was killed.

  Args:
    directory: on the disk that is to be used.
    width: numbers of a row.
    dtype: of them.
  """

  def __init__(self, directory: pathlib.Path, width: int, dtype: np.dtype):
    self.width, self.dtype = width, dtype
    self._file = tempfile.TemporaryFile(dir=directory, buffering=0)

  def write(self, first: int, rows: np.ndarray) -> None:
    """Writes rows from a place on.

    Raises:
      OSError: the disk is full.
    """
    rest = np.ascontiguousarray(rows).data.cast("B")
    offset = first * self._row_bytes
    while rest:
      count = os.pwrite(self._file.fileno(), rest, offset)
      rest, offset = rest[count:], offset + count

  def read(self, places: np.ndarray) -> np.ndarray:
    """Returns (n, width) rows.

    Args:
      places: (n,) which; those that follow each other are read together.
    """
    found = np.empty((len(places), self.width), self.dtype)
    ends = np.flatnonzero(np.diff(places) != 1) + 1
    bounds = [0, *ends.tolist(), len(places)]
    for start, end in zip(bounds, bounds[1:], strict=False):
      size = (end - start) * self._row_bytes
      at = int(places[start]) * self._row_bytes
      data = os.pread(self._file.fileno(), size, at)
      found[start:end] = np.frombuffer(data, self.dtype).reshape(-1, self.width)
    return found

  @property
  def _row_bytes(self) -> int:
    return self.width * self.dtype.itemsize

  def close(self) -> None:
    """Lets go of the disk."""
    self._file.close()


class Rows:
  """The features of a bag as (N, D), read as they are written.

  Args:
    spool: where they are; None where there is none.
    slots: (N,) of it, in the bag's order.
    width: D.
    dtype: of them.
  """

  ndim = 2

  def __init__(
    self,
    spool: Spool | None,
    slots: np.ndarray,
    width: int,
    dtype: np.dtype,
  ):
    self._spool, self._slots = spool, slots
    self.shape, self.dtype = (len(slots), width), dtype

  def __len__(self) -> int:
    return len(self._slots)

  def __getitem__(self, rows: slice) -> np.ndarray:
    assert self._spool is not None
    return self._spool.read(self._slots[rows])


class Writer:
  """Writes files while others are computed, one unit after the other."""

  def __enter__(self) -> "Writer":
    self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="write")
    self._pending: collections.deque[futures.Future] = collections.deque()
    return self

  def __exit__(self, *_: object) -> None:
    self._pool.shutdown(cancel_futures=True)

  def submit(self, write: Callable[[], None]) -> None:
    """Has something written; waits where too much is waiting.

    Raises:
      OSError: what was submitted before could not be written.
    """
    self._pending.append(self._pool.submit(write))
    self.wait(_WRITTEN)

  def wait(self, left: int = 0) -> None:
    """Waits until no more than some are left.

    Raises:
      OSError: one of them could not be written.
    """
    while len(self._pending) > left:
      self._pending.popleft().result()
