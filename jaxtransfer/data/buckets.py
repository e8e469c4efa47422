"""Bags of many lengths in batches of few shapes, so that little is compiled.

A bag is padded to the next of a few lengths. Features are kept in memory as far
as they fit, and read ahead of whoever takes the batches.
"""

import collections
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtransfer import progress
from jaxtransfer.data import bags, feature_files
from jaxtransfer.data.images import ImageError

# Programs that are compiled at most, one for each length.
MOST = 6
# Lengths are multiples of so many tiles: fewer take no less time.
_STEP = 32
# Tiles of a batch that is only evaluated, and its bags, at most; a longer bag
# is a batch of its own.
_TILES, _BAGS = 4096, 64
# Batches that are being made or wait to be taken.
_AHEAD = 3


def lengths(tiles: np.ndarray, most: int = MOST) -> np.ndarray:
  """Returns the lengths to which bags are padded, so that least is padded.

  Args:
    tiles: (N,) of each bag, at least one.
    most: how many lengths at most.

  Returns:
    (K,) int64, rising; the last holds the largest bag. All are multiples of
    32, of more where the largest bag is large.
  """
  # Of more than 512 sizes the best few would take long to choose.
  step = _STEP * -(-int(tiles.max()) // (512 * _STEP))
  padded = -(-np.asarray(tiles, np.int64) // step) * step
  sizes, counts = np.unique(padded, return_counts=True)
  behind = np.concatenate([[0], np.cumsum(counts)])
  # cost[j]: of the bags up to the j-th size, with as many lengths as turns.
  cost = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)
  choices = []
  # Of all bags from the i-th size on, padded to the j-th.
  whole = sizes[None, :] * (behind[None, 1:] - behind[:-1, None])
  whole = np.where(np.tri(len(sizes), k=-1, dtype=bool), np.inf, whole)
  for _ in range(min(most, len(sizes))):
    total = cost[:-1, None] + whole
    choices.append(total.argmin(0))
    cost = np.concatenate([[0.0], total.min(0)])
  chosen, end = [], len(sizes)
  for choice in reversed(choices):
    if end:
      chosen.append(sizes[end - 1])
      end = choice[end - 1]
  return np.array(chosen[::-1], np.int64)


def padded(tiles: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """Returns (N,), the length to which each bag is padded.

  Args:
    tiles: (N,) of each bag.
    sizes: as `lengths` returns them, of these bags or more.
  """
  return sizes[np.searchsorted(sizes, tiles)]


class Store:
  """The features of slides, in memory as far as they fit.

  Args:
    source: the slides.
    budget: bytes that are kept.
  """

  def __init__(self, source: bags.Bags, budget: float):
    self._source = source
    self._budget = budget
    self._kept: dict[tuple[int, int], feature_files.FeatureFile] = {}
    self._used = 0

  def read(self, row: int, encoder: int) -> feature_files.FeatureFile:
    """Returns a slide's features, of the encoder's type.

    Raises:
      ImageError: they cannot be used, and why.
    """
    kept = self._kept.get((encoder, row))
    if kept is not None:
      return kept
    file = self._source.encoders[encoder].read(row)
    if self._used + file.features.nbytes <= self._budget:
      self._kept[encoder, row] = file
      self._used += file.features.nbytes
    return file

  def check(self) -> dict[str, str]:
    """Reads all features once.

    Returns:
      Slide -> why its features cannot be used, of the first encoder of which
      they cannot.
    """
    names, failures = self._source.names, {}
    encoders = range(len(self._source.encoders))
    with progress.Progress(
      "reading features", "slides", len(names) * len(encoders)
    ) as bar:
      for encoder in encoders:
        for row, name in enumerate(names):
          try:
            self.read(row, encoder)
          except ImageError as e:
            failures.setdefault(name, str(e))
          bar.update()
    return failures

  def only(self, encoder: int) -> None:
    """Lets go of what is kept of other encoders, where it takes the room.

    Args:
      encoder: whose features are needed now.
    """
    of = self._source.encoders[encoder]
    size = int(of.tiles.sum()) * of.channels * of.dtype.itemsize
    mine = {k: v for k, v in self._kept.items() if k[0] == encoder}
    held = sum(file.features.nbytes for file in mine.values())
    if held < size and held < self._used:
      self._kept, self._used = mine, held


class Source(Protocol):
  """What the bags of N slides hold for a network.

  Attributes:
    tiles: (N,) int64, of each slide.
    channels: numbers of a tile.
    dtype: of them.
  """

  tiles: np.ndarray
  channels: int
  dtype: np.dtype

  def read(self, row: int) -> np.ndarray:
    """Returns (tiles, channels) of a slide.

    Raises:
      ImageError: it cannot be used, and why.
    """


class Features:
  """The features that one encoder made of slides; a `Source`.

  Args:
    store: where they are kept.
    encoder: its number.
    of: the encoder.

  Attributes:
    tiles: as of `Source`, like the others.
    channels: of a tile.
    dtype: of the features.
  """

  def __init__(self, store: Store, encoder: int, of: bags.Encoder):
    self._store, self._encoder = store, encoder
    self.tiles, self.channels, self.dtype = of.tiles, of.channels, of.dtype

  def file(self, row: int) -> feature_files.FeatureFile:
    """Returns a slide's features with what their file says.

    Raises:
      ImageError: they cannot be used, and why.
    """
    return self._store.read(row, self._encoder)

  def read(self, row: int) -> np.ndarray:
    """Returns the features; see `Source`."""
    return self.file(row).features


class Batches:
  """Batches of bags in a fixed order, read ahead; a `pipeline.Source`.

  A batch of B bags, padded to the length L of the longest of them:

  - features: (B, L, channels), as they are stored, 0 where padded
  - tiles: (B,) int32, how many of L are there
  - row: (B,) int32, index into the slides; -1 where there is no bag
  - label: (B,) int32; -1 where there is no bag
  - weight: (B,) float32, what the bag counts in the loss; 0 where there is none
  - mask: (B,) bool, False where there is no bag or it could not be read

  Args:
    source: what the bags hold.
    plan: which slides make each batch, a `Training` or an `Evaluation`.
    names: of all slides.
    labels: (N,) int32, of all slides.
    weights: (C,) float32, what a bag of each class counts in the loss.
  """

  def __init__(
    self,
    source: Source,
    plan: "Plan",
    *,
    names: Sequence[str],
    labels: np.ndarray,
    weights: np.ndarray,
  ):
    self._source, self._plan = source, plan
    self._names, self._labels, self._weights = names, labels, weights
    self._next = 0
    self._unreadable: dict[int, str] = {}
    self._pool: futures.ThreadPoolExecutor | None = None
    self._ahead: collections.deque[futures.Future] = collections.deque()

  def __len__(self) -> int:
    return len(self._plan)

  def __iter__(self) -> "Batches":
    return self

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def __next__(self) -> dict[str, np.ndarray]:
    if self._next == len(self):
      raise StopIteration
    self.start_prefetch()
    batch, failures = self._ahead.popleft().result()
    self._next += 1
    self._unreadable |= failures
    return batch

  @property
  def failures(self) -> list[tuple[str, str]]:
    """(name, reason) of every slide that could not be read, by row."""
    return [
      (self._names[row], self._unreadable[row])
      for row in sorted(self._unreadable)
    ]

  def get_state(self) -> dict[str, Any]:
    """Returns where the iterator is, as JSON values."""
    failures = [list(item) for item in self._unreadable.items()]
    return {"next_batch": self._next, "failures": failures}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to where `get_state` was called."""
    self._ahead.clear()
    self._next = state["next_batch"]
    self._unreadable = dict(state["failures"])

  def add_failures(self, failures: Sequence[tuple[int, str]]) -> None:
    """Takes up what could not be read elsewhere.

    Args:
      failures: (row, reason) of each.
    """
    self._unreadable |= dict(failures)

  def start_prefetch(self) -> None:
    """Begins to read, before the first batch is asked for."""
    if self._pool is None:
      self._pool = futures.ThreadPoolExecutor(2, thread_name_prefix="bags")
    while len(self._ahead) < _AHEAD and self._next + len(self._ahead) < len(
      self
    ):
      index = self._next + len(self._ahead)
      self._ahead.append(self._pool.submit(self._make, index))

  def close(self) -> None:
    """Ends the threads that read."""
    self._ahead.clear()
    if self._pool is not None:
      self._pool.shutdown(wait=False, cancel_futures=True)
    self._pool = None

  def _make(self, index: int) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Returns a batch, and row -> why it could not be read."""
    rows, count, length, epoch = self._plan[index]
    batch = {
      # Not made as zeros: most of it is written once.
      "features": np.empty(
        (count, length, self._source.channels), self._source.dtype
      ),
      "tiles": np.zeros(count, np.int32),
      "row": np.full(count, -1, np.int32),
      "label": np.full(count, -1, np.int32),
      "weight": np.zeros(count, np.float32),
      "mask": np.zeros(count, bool),
    }
    batch["row"][: len(rows)] = rows
    batch["label"][: len(rows)] = self._labels[rows]
    failures = {}
    for i, row in enumerate(rows.tolist()):
      try:
        features = self._source.read(row)
      except ImageError as e:
        failures[row] = str(e)
        continue
      chosen = self._plan.draw(row, len(features), epoch)
      features = features if chosen is None else features[chosen]
      batch["features"][i, : len(features)] = features
      batch["tiles"][i] = len(features)
      batch["weight"][i] = self._weights[self._labels[row]]
      batch["mask"][i] = True
    for features, tiles in zip(batch["features"], batch["tiles"], strict=True):
      features[tiles:] = 0
    return batch, failures


class Planned(NamedTuple):
  """What a batch holds.

  Attributes:
    rows: (n,) of the slides.
    count: of bags, with those that are padded.
    length: to which each is padded.
    epoch: in which it is, from 0.
  """

  rows: np.ndarray
  count: int
  length: int
  epoch: int


class Plan(Protocol):
  """Which slides make each batch."""

  def __len__(self) -> int:
    """Returns how many batches there are."""

  def __getitem__(self, index: int) -> Planned:
    """Returns what a batch holds."""

  def draw(self, row: int, tiles: int, epoch: int) -> np.ndarray | None:
    """Returns which of a slide's tiles are taken; None for all."""


class Training:
  """The batches of a whole training, the same number in each epoch.

  Args:
    rows: (n,) that are trained on.
    tiles: (N,) of all slides.
    batch_size: bags of a batch; the last one of an epoch may hold fewer.
    epochs: how many.
    seed: decides the order, and which tiles are drawn.
    bag_size: tiles that are drawn of a larger bag, others in each epoch; 0
      takes all.
    balance: (N,) the class of every slide: an epoch is then as many draws, with
      replacement, each class as often; None takes every slide once.
  """

  def __init__(
    self,
    rows: np.ndarray,
    tiles: np.ndarray,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    bag_size: int = 0,
    balance: np.ndarray | None = None,
  ):
    self._rows, self._batch_size = rows, batch_size
    self._seed, self._bag_size = seed, bag_size
    held = np.minimum(tiles, bag_size) if bag_size else tiles
    self._padded = padded(held, lengths(held))
    self._share = None
    if balance is not None:
      share = 1 / np.bincount(balance[rows])[balance[rows]]
      self._share = share / share.sum()
    self._per_epoch = -(-len(rows) // batch_size)
    self._length = epochs * self._per_epoch
    self._drawn = -1, rows

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Planned:
    epoch, step = divmod(index, self._per_epoch)
    start = step * self._batch_size
    rows = self._order(epoch)[start : start + self._batch_size]
    length = int(self._padded[rows].max())
    return Planned(rows, self._batch_size, length, epoch)

  def _order(self, epoch: int) -> np.ndarray:
    # Threads may draw it twice at an epoch's start; both draw the same.
    drawn, order = self._drawn
    if drawn != epoch:
      rng = np.random.default_rng([self._seed, epoch])
      order = rng.permutation(self._rows)
      if self._share is not None:
        order = rng.choice(self._rows, len(self._rows), p=self._share)
      self._drawn = epoch, order
    return order

  def draw(self, row: int, tiles: int, epoch: int) -> np.ndarray | None:
    """Returns which of a slide's tiles are taken; None for all."""
    if not self._bag_size or tiles <= self._bag_size:
      return None
    rng = np.random.default_rng([self._seed, epoch, row])
    return np.sort(rng.choice(tiles, self._bag_size, replace=False))


class Evaluation:
  """Batches of all tiles of slides, those of one length together.

  Args:
    rows: (n,) that are evaluated.
    tiles: (N,) of all slides.
    multiple: of which every batch's number of bags is one: the devices.
  """

  def __init__(self, rows: np.ndarray, tiles: np.ndarray, multiple: int = 1):
    sizes = padded(tiles, lengths(tiles))
    self._batches: list[Planned] = []
    for size in np.unique(sizes[rows]).tolist():
      of_size = rows[sizes[rows] == size]
      count = max(1, min(_BAGS, _TILES // size))
      count = -(-count // multiple) * multiple
      for start in range(0, len(of_size), count):
        batch = of_size[start : start + count]
        self._batches.append(Planned(batch, count, size, 0))

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, index: int) -> Planned:
    return self._batches[index]

  def draw(self, row: int, tiles: int, epoch: int) -> None:
    """Returns which of a slide's tiles are taken: None, for all."""
    del row, tiles, epoch
