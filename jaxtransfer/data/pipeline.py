"""Batches of images from rows, in an order that only the seed decides."""

import atexit
import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import grain
import numpy as np

from jaxtransfer import errors, files
from jaxtransfer.data import reading
from jaxtransfer.data.sources import Examples

Failures = list[tuple[str, str]]


class Batches(grain.DatasetIterator):
  """Batches of one shape, read ahead of whoever takes them.

  What comes out depends on the arguments but not on `workers`. A batch:

  - image: (B, S, S, 3) uint8, fitted by `images.fit`
  - row: (B,) int64, index into `examples`; -1 where padded
  - label: (B,) int32; -1 where padded
  - mask: (B,) bool, False where padded or unreadable: the image is black
    there and must count for nothing

  Close it, or use it as a context manager, when it is left before its end. Its
  state is the number of the next batch and the failures so far: a checkpoint
  holds it, and it can be restored with other workers or another `shard`.

  Args:
    examples: where to read.
    rows: (n,) int, which rows, in this order unless shuffled.
    image_size: side of the images, S.
    batch_size: images of a batch over all shards.
    workers: 0 reads in threads of this process, which is as fast where
      decoding dominates (it runs outside the interpreter lock); N > 0 starts
      N processes, for sources that compute in Python.
    shuffle_seed: None keeps the order of `rows`; a number draws another one
      for every epoch.
    epochs: how often all rows are read. Each epoch starts a new batch, and its
      last batch is padded.
    drop_last: leaves the padded batch out, for training, unless it is the only
      one.
    shard: (index, count): the part of every batch that this process reads,
      batch_size / count images.

  Raises:
    ValueError: sizes that are not positive, or a batch that `shard` cannot
      divide.
  """

  # What runs, once started. Here, because it is closed even if it is never
  # made whole.
  _source: grain.DatasetIterator | None = None
  _pool: futures.Executor | None = None
  _processes: "_Processes | None" = None
  _running: "weakref.WeakSet[Batches]" = weakref.WeakSet()

  def __init__(
    self,
    examples: Examples,
    rows: np.ndarray,
    *,
    image_size: int,
    batch_size: int,
    workers: int = 0,
    shuffle_seed: int | None = None,
    epochs: int = 1,
    drop_last: bool = False,
    shard: tuple[int, int] = (0, 1),
  ):
    super().__init__()
    self._reader = reading.Reader(
      examples,
      np.asarray(rows, np.int64),
      image_size,
      batch_size,
      shuffle_seed,
      epochs,
      drop_last,
      shard,
    )
    self._workers = workers
    self._next = 0
    self._unreadable: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._reader)

  def __next__(self) -> reading.Batch:
    self._assert_not_closed()
    if self._next >= len(self._reader):
      self._stop()
      raise StopIteration
    source = self._start() if self._source is None else self._source
    batch = next(source)
    self._next += 1
    self._unreadable.update(batch.pop("failures"))
    return batch

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close()

  @property
  def failures(self) -> Failures:
    """(name, reason) of every image that could not be read, by row."""
    names = self._reader.examples.names
    return [
      (names[row], self._unreadable[row]) for row in sorted(self._unreadable)
    ]

  def get_state(self) -> dict[str, Any]:
    """Returns where the iterator is, as JSON values."""
    return {
      "next_batch": self._next,
      "failures": [list(item) for item in self._unreadable.items()],
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called."""
    self._stop()
    self._next = state["next_batch"]
    self._unreadable = dict(state["failures"])

  def add_failures(self, failures: Sequence[tuple[int, str]]) -> None:
    """Takes up what another process could not read.

    Args:
      failures: as in the state, (row, reason) of each.
    """
    self._unreadable.update(dict(failures))

  def start_prefetch(self) -> None:
    """Begins to read, before the first batch is asked for."""
    if self._source is None and self._next < len(self._reader):
      self._start()

  def close(self) -> None:
    """Ends the threads or processes that read."""
    self._stop()
    self._closed = True

  def _start(self) -> grain.DatasetIterator:
    self._running.add(self)
    source: grain.sources.RandomAccessDataSource[dict[str, Any]]
    if self._workers:
      count = min(self._workers, len(self) - self._next)
      source = self._processes = _Processes(
        self._reader, count, len(self._reader)
      )
      threads = count
    else:
      # Two batches in the making, so that no thread waits for the slowest
      # image of one.
      self._pool = futures.ThreadPoolExecutor(
        processors(), thread_name_prefix="read"
      )
      self._reader.pool = self._pool
      source, threads = self._reader, 2
    self._source = iter(
      grain.MapDataset.source(source)[self._next :].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
      )
    )
    return self._source

  def _stop(self) -> None:
    self._running.discard(self)
    source, self._source = self._source, None
    if source is not None:
      source.close()
    pool, self._pool = self._pool, None
    if pool is not None:
      pool.shutdown(wait=False, cancel_futures=True)
    processes, self._processes = self._processes, None
    if processes is not None:
      processes.close()


# What is left open is closed before multiprocessing, whose turn at exit comes
# after that of what was registered later, waits for its processes.
@atexit.register
def _close_all() -> None:
  for batches in list(Batches._running):
    batches.close()


def processors() -> int:
  """Returns how many processors this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class Readers:
  """Whatever a reader gives, each part made by whichever worker is idle.

  For what is asked for piece by piece; `Batches` are in an order that is known
  beforehand. To be closed, or used as a context manager.

  Args:
    reader: gives a part by its key; of a process it is a copy.
    workers: 0 reads in threads of this process; N > 0 starts N processes.

  Attributes:
    count: how many parts are made at the same time.
  """

  def __init__(self, reader: "Keyed", workers: int):
    self.count = workers or processors()
    self._processes = _Processes(reader, workers) if workers else None
    self._reader = reader if self._processes is None else self._processes
    self._pool = futures.ThreadPoolExecutor(
      self.count, thread_name_prefix="read"
    )

  def __enter__(self) -> "Readers":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def submit(self, key: Any) -> futures.Future:
    """Asks for a part; what its future raises, a reader raised."""
    return self._pool.submit(self._reader.__getitem__, key)

  def close(self) -> None:
    """Ends the threads or processes; what was asked for may never come."""
    if self._processes is not None:
      self._processes.close()
    self._pool.shutdown(cancel_futures=True)


class Keyed(Protocol):
  """A reader: of batches by their number, or of anything by any key."""

  def __getitem__(self, key: Any, /) -> Any:
    """Returns what is read."""


class _Processes:
  """A reader's batches, each made by whichever process is idle.

  grain's own processes are not used: leaving an iteration over them before its
  end, as Ctrl-C does, waits for ever (google/grain issue 1372).
  """

  def __init__(self, reader: Keyed, count: int, length: int = 0):
    self._length = length
    self._closing = False
    self._workers: list[BaseProcess] = []
    # A process that has no reader yet lies here with the reader.
    self._idle: queue.SimpleQueue[
      tuple[BaseProcess, connection.Connection, Keyed | None]
    ] = queue.SimpleQueue()
    # A fork would copy JAX's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with _interrupts_deferred():
      for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(
          target=reading.serve, args=(theirs,), daemon=True
        )
        process.start()
        # With the one copy of its end in the process, its end ends the pipe.
        theirs.close()
        self._workers.append(process)
        self._idle.put((process, ours, reader))

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: Any) -> Any:
    process, pipe, reader = self._idle.get()
    try:
      # Sent from here and not when the process begins, because that waits
      # until it reads; so do all begin at once.
      if reader is not None:
        pipe.send(reader)
      pipe.send(index)
      result = pipe.recv()
    except (EOFError, OSError):
      if not self._closing:
        process.join(1)
      raise errors.RunError(
        f"a process of data.workers ended (exit code {process.exitcode};"
        " -9 is out of memory); use fewer, or 0"
      ) from None
    finally:
      self._idle.put((process, pipe, None))
    if isinstance(result, Exception):
      raise result
    return result

  def close(self) -> None:
    """Ends the processes at once: they hold nothing that could be lost."""
    self._closing = True
    for process in self._workers:
      process.kill()
    for process in self._workers:
      process.join()


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
  """Puts off Ctrl-C, and keeps it from processes begun meanwhile.

  A blocked signal stays blocked in them. They take seconds to come as far as
  ignoring it, and would fill the terminal with tracebacks until then.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  # Were it begun later, by the first process, it would lift the block.
  resource_tracker.ensure_running()
  interrupts: list[int] = []
  handler = signal.signal(
    signal.SIGINT, lambda number, _: interrupts.append(number)
  )
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if interrupts:
      signal.raise_signal(signal.SIGINT)


class Source(Protocol):
  """Batches in a fixed order, whose place in it can be kept and restored."""

  def __len__(self) -> int:
    """Returns how many there are."""

  def __next__(self) -> reading.Batch:
    """Returns the next batch: this process's part of it."""

  def get_state(self) -> dict[str, Any]:
    """Returns the place in the order, as JSON values."""

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called."""

  def start_prefetch(self) -> None:
    """Begins to read, before the first batch is asked for."""

  def close(self) -> None:
    """Ends whatever reads."""


def prefetch(
  source: Source, put: Callable[[reading.Batch], Any], depth: int = 2
) -> "Prefetched":
  """Sends batches to devices before they are asked for.

  Args:
    source: the batches; closed with the result.
    put: what sends one and is given on, e.g.
      `lambda batch: jax.device_put(batch, sharding)`; it must not wait for the
      transfer.
    depth: how many are under way beside the one in use.

  Returns:
    An iterator of what `put` returned. Its state is that of the last batch it
    gave, not of the last one sent.
  """
  return Prefetched(source, put, depth)


class Prefetched(grain.DatasetIterator):
  """The iterator that `prefetch` makes."""

  def __init__(
    self, source: Source, put: Callable[[reading.Batch], Any], depth: int
  ):
    super().__init__()
    self._source = source
    self._put = put
    self._depth = depth
    self._state = source.get_state()
    self._sent: collections.deque[tuple[Any, dict[str, Any]]] = (
      collections.deque()
    )

  def __len__(self) -> int:
    return len(self._source)

  def __next__(self) -> Any:
    self._assert_not_closed()
    while len(self._sent) <= self._depth:
      try:
        batch = next(self._source)
      except StopIteration:
        break
      self._sent.append((self._put(batch), self._source.get_state()))
    if not self._sent:
      raise StopIteration
    sent, self._state = self._sent.popleft()
    return sent

  def __enter__(self) -> "Prefetched":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def get_state(self) -> dict[str, Any]:
    """Returns the state after the last batch given."""
    return self._state

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called."""
    self._sent.clear()
    self._source.set_state(state)
    self._state = state

  def start_prefetch(self) -> None:
    """Begins to read, before the first batch is asked for."""
    self._source.start_prefetch()

  def close(self) -> None:
    """Closes the source and lets go of what was sent."""
    self._sent.clear()
    self._source.close()
    self._closed = True


def too_many(
  failures: Failures, total: int, limit: float, unit: str = "images"
) -> None:
  """Stops a run in which too many examples could not be read.

  Args:
    failures: (name, reason) of each.
    total: how many there are.
    limit: the share that may fail, `config.data.max_failures`; 0 allows none.
    unit: what they are.

  Raises:
    UnreadableError: more failed.
  """
  if len(failures) > limit * total:
    name, reason = failures[0]
    raise errors.UnreadableError(
      f"{len(failures)} of {total} {unit} could not be read, more than"
      f" data.max_failures = {limit:g}; the first: {name}: {reason}",
      failures,
    )


def write_failures(path: str | os.PathLike[str], failures: Failures) -> None:
  """Writes failures.csv, name and reason of each, atomically."""
  files.write_csv(path, ("name", "reason"), failures)
