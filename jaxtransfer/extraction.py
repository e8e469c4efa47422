"""Feature files of slides and of bags of images, by many encoders in one pass.

A bag, a slide's tiles or images that belong together, becomes a file for every
encoder, whole or not at all. Bags are units: any number of processes share
them, large ones first, and what is there already is looked at and kept.

Batches are composed by bag, or by packet of bags that are smaller than a few
batches, in an order that nothing but the bags decides. So a tile is computed at
the same place of the same batch whichever process does it, after whatever stop,
and comes out the same to the bit.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import errors, files, inference, parallel, progress, units
from jaxtransfer.data import feature_files, pipeline, tiles
from jaxtransfer.data import names as naming
from jaxtransfer.data.slides import SlideError
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.networks.network import Network, average
from jaxtransfer.weights import loading, readers

DTYPES = ("float16", "float32")
LAYOUTS = ("trident", "stamp")
# A network's own features: after its last layer, and a DenseNet's ReLU.
END = "end"

# Batches that a bag must fill to be a unit of its own, and those of a packet:
# the last batch of a unit is padded.
_ALONE, _TOGETHER = 4, 16
# Rows that are copied into a file at a time.
_ROWS = 4096
# Units whose files are being written while others are computed.
_WRITTEN = 2
# What must be equal of two files for their features to compare.
_DECIDING = (
  *("network", "cut", "weights_sha256", "normalisation"),
  *("image_size", "resize", "compute_dtype"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """A network, and which of its features are kept.

  Attributes:
    network: with values.
    source: where they come from, and how its images are normalised.
    taps: layers of it, or `END`.
  """

  network: Network
  source: loading.Source
  taps: tuple[str, ...]

  def cut(self, tap: str) -> str:
    """Returns the layer after which a tap is."""
    if tap != END:
      return tap
    last = self.network.layer_names[-1]
    stages = {layer: alias for alias, layer in self.network.aliases}
    name = stages.get(last, last)
    return f"{name}-relu" if self.network.relu else name

  def channels(self, tap: str) -> int:
    """Returns how many features a tap has."""
    if tap == END:
      return self.network.channels
    number = self.network.layer_names.index(self.network.resolve(tap))
    return self.network.layers[number].channels

  @functools.cached_property
  def weights_sha256(self) -> str:
    """Of the weights' file; of the numbers, where there is no file."""
    if self.source.sha256:
      return self.source.sha256
    digest = hashlib.sha256()
    for name, value in tensors.dump(self.network).items():
      digest.update(name.encode())
      digest.update(value.data)
    return digest.hexdigest()

  def compute(self, network: Network, x_NHWC: jax.Array) -> dict[str, Any]:
    """Returns {tap: (N, C) float32} of normalised images.

    Args:
      network: of this structure.
      x_NHWC: the images.
    """
    last = network.layer_names[-1]
    layers = {tap: last if tap == END else tap for tap in self.taps}
    maps = network.taps(x_NHWC, list(layers.values()), pool=False)
    if END in layers and network.relu:
      maps[END] = jax.nn.relu(maps[last])
      layers[END] = END
    return {tap: average(maps[layer]) for tap, layer in layers.items()}


def open_encoders(
  networks: str,
  taps: str,
  *,
  weights: str = "",
  prefix: str = "",
  until: str = "",
  seed: int = 0,
  dtype: str = "float32",
) -> list[Encoder]:
  """Makes the networks that a config names.

  Args:
    networks: names with commas between; each may be `name@weights`.
    taps: `END`, "blocks", "layers" or names of layers, with commas between.
    weights: of those that do not say; "" = random.
    prefix: of the one network's names in a file of several.
    until: the deepest layer; "" = where the weights end, or the network.
    seed: of random weights.
    dtype: that the layers compute in.

  Raises:
    UsageError: there is no such network, layer or file.
  """
  named = [name.strip() for name in networks.split(",") if name.strip()]
  if prefix and len(named) > 1:
    raise errors.UsageError(
      f"config.network.prefix is {prefix!r}, which is for one network, and"
      f" there are {len(named)}"
    )
  encoders = []
  for text in dict.fromkeys(named):
    name, at, own = text.partition("@")
    source = loading.resolve_weights(
      name, (own if at else weights) or None, prefix
    )
    last = zoo.build(name).layer_names[-1]
    end = until or (source.until if source.until != last else "")
    chosen = _taps(name, taps, end or None)
    deepest = None
    if END not in chosen:
      # What lies behind the deepest is neither built nor read.
      deepest = zoo.build(name, until=chosen[-1]).layer_names[-1]
    network = loading.create_model(
      name,
      until=deepest or end or None,
      weights=source,
      seed=seed,
      dtype=jnp.dtype(dtype),
    )
    encoders.append(Encoder(network, source, chosen))
  if not encoders:
    raise errors.UsageError("config.networks is empty: name one")
  return encoders


def _taps(name: str, taps: str, until: str | None) -> tuple[str, ...]:
  words = [word.strip() for word in taps.split(",") if word.strip()]
  rest = [word for word in words if word != END]
  chosen = zoo.select_taps(name, ",".join(rest), until) if rest else ()
  if END not in words:
    return chosen or zoo.select_taps(name, "", until)
  network = zoo.build(name, until=until)
  # But for a ReLU, the end is the last layer's, which may be named too.
  last = {network.resolve(tap) for tap in chosen} & {network.layer_names[-1]}
  return chosen if last and not network.relu else (*chosen, END)


@dataclasses.dataclass(frozen=True)
class Output:
  """A folder of feature files.

  Attributes:
    folder: its name.
    encoder: whose features they are.
    tap: of it.
  """

  folder: str
  encoder: Encoder
  tap: str

  @property
  def channels(self) -> int:
    """Features of a tile."""
    return self.encoder.channels(self.tap)


def outputs_of(encoders: Sequence[Encoder]) -> list[Output]:
  """Returns every tap of every encoder, under a name of its own."""
  named: dict[str, list[tuple[Encoder, str]]] = {}
  for encoder in encoders:
    label = encoder.source.label
    for suffix in readers.SUFFIXES:
      label = label.removesuffix(suffix)
    for tap in encoder.taps:
      cut = encoder.cut(tap)
      folder = files.safe_name(f"{encoder.network.name}-{label}-{cut}")
      named.setdefault(folder, []).append((encoder, tap))
  found = []
  for folder, of_name in named.items():
    for encoder, tap in of_name:
      # Files of weights may have the same name.
      digest = f"-{encoder.weights_sha256[:8]}" * (len(of_name) > 1)
      found.append(Output(f"{folder}{digest}", encoder, tap))
  return found


@dataclasses.dataclass(frozen=True)
class Settings:
  """How files are made.

  Attributes:
    batch_size: tiles in a step over all devices.
    workers: reading processes; 0 for threads.
    max_failures: share of unreadable tiles with which a bag fails.
    dtype: of the features, one of `DTYPES`.
    layout: of the files, one of `LAYOUTS`.
    versions: of packages, for the files to say.
  """

  batch_size: int
  workers: int = 0
  max_failures: float = 0.01
  dtype: str = "float16"
  layout: str = "trident"
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Packet:
  """Bags whose tiles share batches: one that is large, or several small."""

  bags: tuple[tiles.Bag, ...]

  @property
  def name(self) -> str:
    """The first bag's."""
    return self.bags[0].name

  @property
  def count(self) -> int:
    """How many tiles there are."""
    return sum(bag.count for bag in self.bags)


def pack(bags: Sequence[tiles.Bag], batch_size: int) -> list[Packet]:
  """Divides bags into units, the largest first.

  Args:
    bags: in an order that is the same at each start.
    batch_size: tiles of a batch.
  """
  packets, held = [], []
  for bag in bags:
    if bag.count >= _ALONE * batch_size:
      packets.append(Packet((bag,)))
      continue
    held.append(bag)
    if sum(of.count for of in held) >= _TOGETHER * batch_size:
      packets.append(Packet(tuple(held)))
      held = []
  if held:
    packets.append(Packet(tuple(held)))
  return sorted(packets, key=lambda packet: -packet.count)


class Extraction:
  """The feature files of bags, made by processes that share a directory.

  Args:
    of: the bags.
    encoders: whose features.
    devices: where.
    settings: how.
    directory: the workdir; files go to its `features/`, and what is said of
      each bag to its `units/`.

  Attributes:
    outputs: the folders.
    packets: the units.
    notes: what was found in the directory, a line each.
  """

  def __init__(
    self,
    of: tiles.TileSet,
    encoders: Sequence[Encoder],
    devices: parallel.Devices,
    settings: Settings,
    directory: pathlib.Path,
  ):
    self.tiles, self.settings = of, settings
    self.outputs = outputs_of(encoders)
    self.directory = directory
    self.batch_size = devices.batch_size(settings.batch_size)
    self.packets = pack(of.bags, self.batch_size)
    self.notes: list[str] = []
    self._encoders, self._devices = encoders, devices
    self._units = _Units(directory / "units", self._state)
    self._settled: dict[tiles.Bag, str] = {}
    self._damaged: set[pathlib.Path] = set()
    self._sent: collections.deque[tuple[_Work, int]] = collections.deque()
    self._exhausted = False
    self.attributes = {
      output.folder: self._attributes(output) for output in self.outputs
    }

  def path(self, output: Output, bag: tiles.Bag) -> pathlib.Path:
    """Returns a feature file's name, there or not."""
    return self.directory / "features" / output.folder / f"{bag.name}.h5"

  def look(self) -> list[tiles.Bag]:
    """Looks at what is there, inside of every file, and returns what is not.

    Raises:
      UsageError: a file is of other settings, or of other tiles.
    """
    self._settled.clear()
    missing = []
    with progress.Progress(
      "looking at what is there", self.tiles.what, len(self.tiles.bags)
    ) as bar:
      for bag in self.tiles.bags:
        if self._state(bag) == "open":
          missing.append(bag)
        bar.update()
    ours = {f"{bag.name}.h5" for bag in self.tiles.bags}
    self.notes = []
    for output in self.outputs:
      folder = self.path(output, self.tiles.bags[0]).parent
      others = [p for p in sorted(folder.glob("*.h5")) if p.name not in ours]
      for path in others:
        self._check(output, path, None)
      if others:
        names = naming.shown([path.stem for path in others])
        self.notes.append(
          f"{folder} holds files of {len(others):,} {self.tiles.what} that are"
          f" not in the source: {names}"
        )
    if self._damaged:
      names = naming.shown(sorted(map(str, self._damaged)))
      self.notes.append(
        f"{len(self._damaged):,} files were damaged and are made again: {names}"
      )
    return missing

  def retry(self) -> None:
    """Forgets what has failed, so that it is tried again."""
    for bag in self.tiles.bags:
      path = self._units.directory(bag) / "failed.json"
      path.unlink(missing_ok=True)
      self._settled.pop(bag, None)

  def run(self) -> None:
    """Makes what is missing, or waits for who makes it.

    Raises:
      OSError: the disk is full.
      RunError: a reading process has ended.
    """
    compute = self._place()
    claims = self._units.claims(self.packets)
    self._exhausted = False
    for bag in self.tiles.bags:
      self._state(bag)
    done = self._settled_tiles()
    with (
      contextlib.ExitStack() as held,
      pipeline.Readers(self.tiles.reader, self.settings.workers) as readers,
      progress.Progress(
        f"encoding, {len(self.outputs)} outputs",
        "tiles",
        self.tiles.count,
        done,
      ) as bar,
      _Writer() as writer,
    ):
      active: list[_Work] = []
      while True:
        batches = self._batches(claims, readers, held, active, writer)
        for _, _, values in inference.stream(compute, batches, self._devices):
          work, number = self._sent.popleft()
          work.add(number, values)
          if work.complete:
            writer.submit(work.write)
          counted = self._settled_tiles() + sum(w.tiles_done for w in active)
          bar.beside = (
            f"{len(self._settled):,} of {len(self.tiles.bags):,}"
            f" {self.tiles.what}"
          )
          bar.update(counted - done)
          done = counted
        writer.wait()
        if self._exhausted:
          break
        time.sleep(units.LOOK)

  def records(self) -> list[dict[str, Any]]:
    """Returns what came of every bag, those that nobody tiled among them.

    Each is a dict: name, label, group, tiles (rows of its files), dropped
    ((x, y, name, reason) of each tile that could not be read), seconds, and
    reason ("" but for a bag that failed).
    """
    found = []
    for bag in self.tiles.bags:
      kind = "failed" if self._state(bag) == "failed" else "done"
      record = self._units.read(bag, f"{kind}.json") or {}
      about = {"name": bag.name, "label": bag.label, "group": bag.group}
      found.append({**record, **about})
    empty = {"tiles": 0, "dropped": [], "seconds": 0.0, "label": "", "group": ""}
    found += [
      {**empty, "name": name, "reason": reason}
      for name, reason in self.tiles.absent.items()
    ]
    return found

  def sample(self) -> "Sample":
    """Returns batches of the first unit, to be measured."""
    return Sample(self)

  def compute(self) -> Callable[[dict[str, np.ndarray]], Any]:
    """Returns what encodes a batch on the devices."""
    program = self._place()
    return lambda batch: program(self._devices.put(batch["image"]))

  # --- what there is ---------------------------------------------------------

  def _attributes(self, output: Output) -> dict[str, Any]:
    encoder, source = output.encoder, output.encoder.source
    return {
      "encoder": output.folder,
      "network": encoder.network.name,
      "cut": encoder.cut(output.tap),
      "weights": source.label,
      "weights_sha256": encoder.weights_sha256,
      "normalisation": {"mean": list(source.mean), "std": list(source.std)},
      "image_size": self.tiles.size,
      "resize": self.tiles.resize(),
      "compute_dtype": str(encoder.network.dtype),
      "tile": self.tiles.tile,
      "mpp": self.tiles.mpp,
      "versions": dict(self.settings.versions),
    }

  def _settled_tiles(self) -> int:
    return sum(bag.count for bag in self._settled)

  def _state(self, bag: tiles.Bag) -> str:
    """Returns "done", "failed" or "open", by what is in the files."""
    if bag not in self._settled:
      digest = _digest(bag)
      failed = self._units.read(bag, "failed.json")
      done = self._units.read(bag, "done.json")
      if failed and failed["tiles_sha256"] == digest:
        self._settled[bag] = "failed"
      elif all(
        # Each is looked at: one of other settings is refused.
        [self._is_whole(output, bag, digest, done) for output in self.outputs]
      ):
        self._settled[bag] = "done"
    return self._settled.get(bag, "open")

  def _is_whole(
    self,
    output: Output,
    bag: tiles.Bag,
    digest: str,
    done: Mapping[str, Any] | None,
  ) -> bool:
    found = self._check(output, self.path(output, bag), digest)
    return (
      found is not None
      and done is not None
      and done["tiles_sha256"] == digest
      and found.count == done["tiles"]
    )

  def _check(
    self, output: Output, path: pathlib.Path, digest: str | None
  ) -> feature_files.Described | None:
    """Looks into a file; returns None where it is not there or not whole.

    Raises:
      UsageError: it is of other settings or, with a digest, of other tiles.
    """
    if not path.exists():
      return None
    try:
      found = feature_files.inspect(path)
    except feature_files.FeatureFileError:
      self._damaged.add(path)
      return None
    wanted = self.attributes[output.folder]
    layout = "stamp" if found.layout == "stamp" else "trident"
    pairs = {
      key: (found.attributes.get(key), wanted[key]) for key in _DECIDING
    }
    pairs |= {
      "channels": (found.dim, output.channels),
      "features_dtype": (str(found.dtype), self.settings.dtype),
      "layout": (layout, self.settings.layout),
    }
    if digest is not None:
      pairs["tiles"] = found.attributes.get("tiles_sha256"), digest
    unlike = [
      f"{key}: {there!r} there, {now!r} now"
      for key, (there, now) in pairs.items()
      if there != now
    ]
    if unlike:
      raise errors.UsageError(
        f"{path} holds other features ({'; '.join(unlike)}), and they are not"
        " mixed: choose another --workdir, or remove it"
      )
    return found

  # --- the pass --------------------------------------------------------------

  def _place(self) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns what gives {folder: (B, C)} of (B, S, S, 3) uint8."""
    # Networks that differ in their numbers alone share a program.
    alike: dict[Any, dict[int, Encoder]] = {}
    for i, encoder in enumerate(self._encoders):
      source = encoder.source
      key = encoder.network.name, encoder.taps, source.mean, source.std
      alike.setdefault(key, {})[i] = encoder
    dtype = jnp.dtype(self.settings.dtype)
    programs = []
    for (_, _, mean, std), of_kind in alike.items():
      first = next(iter(of_kind.values()))

      def compute(
        network: Network, x_NHWC: jax.Array, encoder: Encoder = first
      ) -> dict[str, jax.Array]:
        # Half of the bytes come back from the device.
        found = encoder.compute(network, x_NHWC)
        return {tap: value.astype(dtype) for tap, value in found.items()}

      networks = {str(i): of.network for i, of in of_kind.items()}
      programs.append(
        inference.place(networks, compute, self._devices, mean, std)
      )
    numbers = {id(of): str(i) for i, of in enumerate(self._encoders)}

    def run(pixels: jax.Array) -> dict[str, jax.Array]:
      found = {k: v for program in programs for k, v in program(pixels).items()}
      return {
        output.folder: found[numbers[id(output.encoder)]][output.tap]
        for output in self.outputs
      }

    return run

  def _batches(
    self,
    claims: Iterator[tuple[Packet, contextlib.ExitStack] | None],
    readers: pipeline.Readers,
    held: contextlib.ExitStack,
    active: "list[_Work]",
    writer: "_Writer",
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of one unit after the other, read ahead."""
    # All readers have work while a batch is put together and one is computed.
    depth = 1 + -(-2 * readers.count * tiles.PIECE // self.batch_size)
    asked: collections.deque[tuple[_Work, int, list[_Asked]]] = (
      collections.deque()
    )
    ahead = self._ahead(claims, held, active, writer)
    waiting = False
    while True:
      while not (waiting or self._exhausted) and len(asked) <= depth:
        following = next(ahead, "over")
        if following == "over":
          self._exhausted = True
        elif following is None:
          # What is left is in other hands, which may wait for what is in ours.
          waiting = True
        else:
          work, number = following
          asked.append((work, number, work.ask(number, readers)))
      if not asked:
        return
      work, number, pieces = asked.popleft()
      batch = work.batch(number, pieces)
      self._sent.append((work, number))
      yield batch

  def _ahead(
    self,
    claims: Iterator[tuple[Packet, contextlib.ExitStack] | None],
    held: contextlib.ExitStack,
    active: "list[_Work]",
    writer: "_Writer",
  ) -> "Iterator[tuple[_Work, int] | None]":
    """Yields the batches that are to be read, of units as they are claimed."""
    for claim in claims:
      if claim is None:
        yield None
        continue
      packet, holder = claim
      held.push(holder)
      work = _Work(self, packet, holder)
      active.append(work)
      work.over = functools.partial(active.remove, work)
      for number in range(work.batches):
        if work.wants(number):
          work.outstanding += 1
          yield work, number
      work.all_asked = True
      if work.complete:
        writer.submit(work.write)


class _Units(units.Units):
  """Units whose state is what their files say."""

  def __init__(
    self, path: pathlib.Path, state: Callable[[tiles.Bag], str]
  ):
    super().__init__(path)
    self._state = state

  def state(self, unit: Any, stop_after: int | None = None) -> str:
    """Returns "open" where one of the bags is."""
    states = [self._state(bag) for bag in unit.bags]
    return "open" if "open" in states else "done"


@dataclasses.dataclass(frozen=True)
class _Asked:
  """A piece that is being read: of a bag, its tiles, from a slot on."""

  bag: int
  tiles: np.ndarray
  slot: int
  future: futures.Future


class _Work:
  """A unit at work. Its tiles have slots, in the order in which they are read.

  Args:
    extraction: whose.
    packet: its bags.
    holder: of its lock.

  Attributes:
    batches: how many its tiles fill.
    outstanding: batches that were asked for and not added yet.
    all_asked: whether no other will be.
    tiles_done: how many were computed.
    over: called when its files are written.
  """

  def __init__(
    self,
    extraction: Extraction,
    packet: Packet,
    holder: contextlib.ExitStack,
  ):
    self._of, self._packet, self._holder = extraction, packet, holder
    self._started = time.monotonic()
    counts = [bag.count for bag in packet.bags]
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.batches = -(-packet.count // extraction.batch_size)
    self.outstanding, self.all_asked, self.tiles_done = 0, False, 0
    self.over: Callable[[], None] = lambda: None
    self._mask = np.zeros(packet.count, bool)
    self._unreadable: list[dict[int, str]] = [{} for _ in counts]
    self._failed: dict[int, str] = {}
    self._places: dict[int, tiles.Places] = {}
    for i, bag in enumerate(packet.bags):
      if extraction._state(bag) != "open":
        continue
      try:
        self._places[i] = bag.open()
      except SlideError as e:
        self._failed[i] = str(e)
    self._spools: dict[str, _Spool] = {}

  @property
  def _live(self) -> set[int]:
    """The bags that are to be made, and can be."""
    return set(self._places) - set(self._failed)

  @property
  def complete(self) -> bool:
    """Whether nothing more of it is to be read or computed."""
    return self.all_asked and not self.outstanding

  def _inside(self, number: int) -> list[tuple[int, int, int]]:
    """Returns (bag, first slot, last slot + 1) of those alive in a batch."""
    start = number * self._of.batch_size
    end = start + self._of.batch_size
    return [
      (i, max(start, self._starts[i]), min(end, self._starts[i + 1]))
      for i in sorted(self._live)
      if self._starts[i] < end and self._starts[i + 1] > start
    ]

  def wants(self, number: int) -> bool:
    """Whether any of a batch is to be made."""
    return bool(self._inside(number))

  def ask(self, number: int, readers: pipeline.Readers) -> list[_Asked]:
    """Has a batch read."""
    asked = []
    for i, first, last in self._inside(number):
      places, start = self._places[i], self._starts[i]
      slot = first
      for some in tiles.pieces(places.order[first - start : last - start]):
        key = self._packet.bags[i].piece(places, some)
        asked.append(_Asked(i, some, int(slot), readers.submit(key)))
        slot += len(some)
    return asked

  def batch(self, number: int, asked: Sequence[_Asked]) -> dict[str, np.ndarray]:
    """Waits for what was asked for and returns it as a batch."""
    size, side = self._of.batch_size, self._of.tiles.size
    start = number * size
    image = np.zeros((size, side, side, 3), np.uint8)
    row = np.full(size, -1, np.int64)
    mask = np.zeros(size, bool)
    for piece in asked:
      read: tiles.Read = piece.future.result()
      if read.broken:
        self._failed.setdefault(piece.bag, read.broken)
        continue
      slots = np.arange(piece.slot, piece.slot + len(piece.tiles))
      image[slots - start] = read.pixels
      row[slots - start] = slots
      can = np.array([not reason for reason in read.reasons])
      mask[slots - start] = self._mask[slots] = can
      self._note(piece, read.reasons)
    return {"image": image, "row": row, "mask": mask}

  def _note(self, piece: _Asked, reasons: Sequence[str]) -> None:
    """Notes which tiles could not be read: a bag with too many fails."""
    bag, unreadable = self._packet.bags[piece.bag], self._unreadable[piece.bag]
    unreadable |= {
      int(tile): reason
      for tile, reason in zip(piece.tiles, reasons, strict=True)
      if reason
    }
    limit = self._of.settings.max_failures
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
    """Keeps the features of a batch."""
    self.outstanding -= 1
    start = number * self._of.batch_size
    for i, first, last in self._inside(number):
      kept = self._mask[first:last]
      for folder, array in values.items():
        own = array[first - start : last - start]
        if not np.isfinite(own[kept]).all():
          self._failed[i] = self._why_not_finite(folder)
          break
        spool = self._spools.get(folder) or _Spool(
          self._of._units.directory(self._packet), own.shape[1], own.dtype
        )
        self._spools[folder] = spool
        spool.write(int(first), own)
      self.tiles_done += int(last - first)

  def _why_not_finite(self, folder: str) -> str:
    if self._of.settings.dtype == "float16":
      return (
        f"{folder}: features beyond what float16 holds, or NaN; with"
        " --config.features_dtype=float32, in another workdir, it may be encoded"
      )
    return f"{folder}: features are NaN or infinite"

  def write(self) -> None:
    """Writes the files of all bags, and lets go of the unit."""
    seconds = time.monotonic() - self._started
    with self._holder, contextlib.ExitStack() as spools:
      for spool in self._spools.values():
        spools.callback(spool.close)
      for i in sorted({*self._places, *self._failed}):
        bag = self._packet.bags[i]
        share = bag.count / max(1, self._packet.count)
        record = {
          "tiles_sha256": _digest(bag),
          "tiles": 0,
          "dropped": [],
          "seconds": seconds * share,
          "reason": self._failed.get(i, ""),
        }
        self._of._tidy(bag)
        if not record["reason"]:
          record |= self._write_bag(i)
        self._of._finish(bag, record)
    self.over()

  def _write_bag(self, i: int) -> dict[str, Any]:
    """Writes the files of one bag; returns what is recorded of it."""
    bag, places, start = self._packet.bags[i], self._places[i], self._starts[i]
    slots = np.empty(bag.count, np.int64)
    slots[places.order] = np.arange(start, start + bag.count)
    kept = np.flatnonzero(self._mask[slots])
    for output in self._of.outputs:
      features = _Rows(self._spools.get(output.folder), slots[kept], output, self._of)
      file = feature_files.FeatureFile(
        features=features,
        coords=None if places.coords is None else places.coords[kept],
        unit=None if places.coords is None else "px",
        extent=places.extent,
        names=None if places.names is None else [places.names[k] for k in kept],
        attributes={
          **places.attributes,
          **self._of.attributes[output.folder],
          "name": bag.name,
          "dropped": bag.count - len(kept),
          "tiles_sha256": _digest(bag),
        },
      )
      feature_files.write_features(
        self._of.path(output, bag), file, self._of.settings.layout
      )
    return {
      "tiles": len(kept),
      "dropped": [
        [*places.named(tile), reason]
        for tile, reason in sorted(self._unreadable[i].items())
      ],
    }
