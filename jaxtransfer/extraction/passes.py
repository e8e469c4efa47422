"""One pass over the tiles of all slides, or over bags of images.

Any number of processes share the bags, large ones first, and what is there
already is looked at and kept.

Batches are composed by bag, or by packet of bags that are smaller than a few
batches, in an order that nothing but the bags decides. So a tile is computed at
the same place of the same batch whichever process does it, after whatever stop,
and comes out the same to the bit.
"""

import collections
import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxtransfer import inference, parallel, progress, units
from jaxtransfer.data import pipeline, tile_reading, tiles
from jaxtransfer.extraction.encoders import Encoder, outputs_of, place
from jaxtransfer.extraction.store import Packet, Settings, Store, pack
from jaxtransfer.extraction.work import Asked, Work, Writer

Claim = tuple[Packet, contextlib.ExitStack] | None


class Extraction:
  """The feature files of bags, made by processes that share a directory.

  Args:
    of: the bags.
    encoders: whose features.
    devices: where.
    settings: how.
    directory: the workdir: files go to its `features/`, and what is said of
      each bag to its `units/`.

  Attributes:
    tiles: the bags.
    outputs: the folders of files.
    packets: the units.
    store: the files.
  """

  def __init__(
    self,
    of: tiles.TileSet,
    encoders: Sequence[Encoder],
    devices: parallel.Devices,
    settings: Settings,
    directory: pathlib.Path,
  ):
    self.tiles = of
    self.outputs = outputs_of(encoders)
    self.store = Store(of, self.outputs, settings, directory)
    self._devices, self._settings = devices, settings
    self._batch_size = devices.batch_size(settings.batch_size)
    self.packets = pack(of.bags, self._batch_size)
    self._sent: collections.deque[tuple[Work, int]] = collections.deque()
    self._active: list[Work] = []
    self._exhausted = False

  def run(self) -> None:
    """Makes what is missing, or waits for who makes it.

    What is there is known from `store.look`.

    Raises:
      OSError: the disk is full.
      RunError: a reading process has ended.
      UsageError: a file is of other settings, or of other tiles.
    """
    compute = place(self.outputs, self._devices, self._settings.dtype)
    claims = self.store.claims(self.packets)
    done, count = self.store.settled_tiles, len(self.tiles.bags)
    self._sent.clear()
    self._active, self._exhausted = [], False
    with (
      contextlib.ExitStack() as held,
      pipeline.Readers(self.tiles.reader, self._settings.workers) as readers,
      progress.Progress("encoding", "tiles", self.tiles.count, done) as bar,
      Writer() as writer,
    ):
      while not self._exhausted:
        batches = self._batches(claims, readers, held, writer)
        for output in inference.stream(compute, batches, self._devices):
          work, number = self._sent.popleft()
          work.add(number, output.values)
          if work.complete:
            writer.submit(work.write)
          settled = len(self.store.settled)
          bar.beside = f"{settled:,} of {count:,} {self.tiles.what}"
          now = self.store.settled_tiles
          now += sum(work.computed for work in list(self._active))
          if now > done:
            bar.update(now - done)
            done = now
        writer.wait()
        if not self._exhausted:
          time.sleep(units.LOOK)

  def _batches(
    self,
    claims: Iterator[Claim],
    readers: pipeline.Readers,
    held: contextlib.ExitStack,
    writer: Writer,
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of one unit after the other, read ahead."""
    # All readers have work while a batch is waited for and one is computed.
    pieces = -(-self._batch_size // tile_reading.PIECE)
    depth = 1 + -(-2 * readers.count // pieces)
    asked: collections.deque[tuple[Work, int, list[Asked]]]
    asked = collections.deque()
    ahead = self._ahead(claims, held, writer)
    waits = False
    while True:
      while len(asked) < depth and not (waits or self._exhausted):
        try:
          following = next(ahead)
        except StopIteration:
          self._exhausted = True
          break
        if following is None:
          # What is left is in other hands, which may wait for what is in ours:
          # that is finished first.
          waits = True
          break
        work, number = following
        asked.append((work, number, work.ask(number, readers)))
      if not asked:
        return
      work, number, parts = asked.popleft()
      batch = work.batch(number, parts)
      self._sent.append((work, number))
      yield batch

  def _ahead(
    self, claims: Iterator[Claim], held: contextlib.ExitStack, writer: Writer
  ) -> Iterator[tuple[Work, int] | None]:
    """Yields what is to be read, of units as they are claimed."""
    for claim in claims:
      if claim is None:
        yield None
        continue
      packet, holder = claim
      # Whatever happens, its lock is not kept.
      held.push(holder)
      work = self._work(packet, holder)
      self._active.append(work)
      for number in range(work.batches):
        if work.wants(number):
          work.outstanding += 1
          yield work, number
      work.all_asked = True
      if work.complete:
        writer.submit(work.write)

  def _work(self, packet: Packet, holder: contextlib.ExitStack) -> Work:
    def release() -> None:
      self._active.remove(work)
      holder.close()

    work = Work(packet, self.store, self._batch_size, self.tiles.size, release)
    return work

  def batches_of(self, packet: Packet) -> int:
    """Returns how many batches a unit is."""
    return -(-packet.count // self._batch_size)

  def compute(self) -> Callable[[dict[str, np.ndarray]], Any]:
    """Returns what encodes a batch on the devices."""
    program = place(self.outputs, self._devices, self._settings.dtype)

    def run(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
      return program(self._devices.put(batch["image"]))

    return run

  def sample(self) -> "Sample":
    """Returns the batches of the largest unit that is left, not claimed."""
    left = [of for of in self.packets if self.store.state(of) == "open"]
    packet = (left or self.packets)[0]
    side = self.tiles.size
    work = Work(packet, self.store, self._batch_size, side, lambda: None)
    return Sample(
      work, pipeline.Readers(self.tiles.reader, self._settings.workers)
    )


class Sample:
  """Batches of a unit that is looked at and not claimed.

  Args:
    work: the unit.
    readers: of it; closed with this.
  """

  def __init__(self, work: Work, readers: pipeline.Readers):
    self._work, self._readers, self._next = work, readers, 0

  def __len__(self) -> int:
    return self._work.batches

  def __next__(self) -> dict[str, np.ndarray]:
    number, self._next = self._next, self._next + 1
    return self._work.batch(number, self._work.ask(number, self._readers))

  def close(self) -> None:
    """Ends what reads."""
    self._readers.close()
