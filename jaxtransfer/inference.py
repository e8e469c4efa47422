"""One pass over batches, and what running networks costs.

Whatever is computed of images, logits of one network or the taps of several,
goes through `run`: a batch goes to the devices once, as uint8, and what comes
of it is fetched when the next one is already under way.

What a network costs, cut at every tap, is measured in one pass through it: a
network cut at one tap is the network cut at the tap before it and the layers
between. So the layers between taps are compiled and timed once, and added up;
the networks cut at the ends of stages are compiled and timed whole beside
them, and the sums are brought to what these take. Time and memory grow with
the network's depth and not with its square.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import operator
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from jaxtransfer import files, parallel, progress
from jaxtransfer.data import preprocess
from jaxtransfer.measure import cost
from jaxtransfer.networks import functional, zoo
from jaxtransfer.networks.network import Network, average

# Rounds of timing. Where one takes long there are fewer, but no fewer than a
# median needs that one interruption shall not move.
_ROUNDS, _LEAST_ROUNDS = 10, 3
_SECONDS = 30.0
# Calls of each network whose latency is measured.
_LATENCY_REPEATS = 30

Failures = list[tuple[int, str]]


class Stopped(Exception):
  """The process was asked to end."""


class Fallible(Protocol):
  """What is read, and what of it could not be."""

  def get_state(self) -> dict[str, Any]:
    """Returns the place, as JSON values; `failures`, (row, reason), in it."""

  def add_failures(self, failures: Failures) -> None:
    """Takes up what another process, or an earlier one, could not read."""


class Batches(Fallible, Protocol):
  """Batches in some order, of which each process reads a part.

  A batch is a dict of arrays (B, ...), `row` and `mask` among them: (B,) ints,
  which example it is, -1 where padded; (B,) bool, False where an example is
  padded or could not be read.
  """

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Returns the batches."""


class Outputs(NamedTuple):
  """What was computed of a batch, on every process the whole of it.

  Attributes:
    row: (B,) int32, which example; -1 where padded.
    mask: (B,) bool, False where padded or unreadable.
    values: arrays (B, ...), NumPy.
  """

  row: np.ndarray
  mask: np.ndarray
  values: Any


def run(
  compute: Callable[[Any], Any],
  batches: Batches,
  devices: parallel.Devices,
  *,
  inputs: Callable[[dict[str, np.ndarray]], Any] = operator.itemgetter("image"),
  stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outputs]:
  """Computes something of all batches.

  Args:
    compute: what; takes what `inputs` chose, on the devices, and returns arrays
      (B, ...) there.
    batches: in order. At the pass's end the failures of all processes are in
      them.
    devices: where.
    inputs: what of a batch is sent to the devices.
    stop: asked before each batch whether the process has to end.

  Yields:
    Of every batch, in order, what was computed.

  Raises:
    Stopped: `stop` said so.
  """
  yield from stream(compute, batches, devices, inputs=inputs, stop=stop)
  share_failures(batches)


def stream(
  compute: Callable[[Any], Any],
  batches: Iterable[dict[str, np.ndarray]],
  devices: parallel.Devices,
  *,
  inputs: Callable[[dict[str, np.ndarray]], Any] = operator.itemgetter("image"),
  stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outputs]:
  """Computes something of batches whose failures are the caller's to count.

  Args:
    compute: as for `run`.
    batches: in order.
    devices: where.
    inputs: as for `run`.
    stop: likewise.

  Yields:
    As `run` does.

  Raises:
    Stopped: `stop` said so.
  """
  # One batch is on its way while the one before is fetched: the devices never
  # wait for this process.
  waiting: collections.deque = collections.deque()

  def fetch() -> Outputs:
    about, values = waiting.popleft()
    row, mask = jax.device_get(about)
    return Outputs(row, mask, devices.get(values))

  for batch in batches:
    if stop():
      raise Stopped
    values = compute(devices.put(inputs(batch)))
    about = batch["row"].astype(np.int32), batch["mask"]
    waiting.append((devices.gather(about), values))
    if len(waiting) > 1:
      yield fetch()
  while waiting:
    yield fetch()


def read(outputs: Iterator[Outputs]) -> tuple[np.ndarray, Any]:
  """Joins a pass, without what could not be read.

  Args:
    outputs: as `run` yields them.

  Returns:
    (N,) int64 rows, and arrays (N, ...): all of them on every process.
  """
  rows, values = [], []
  for of in outputs:
    rows.append(of.row[of.mask])
    values.append(jax.tree.map(operator.itemgetter(of.mask), of.values))
  joined = jax.tree.map(lambda *parts: np.concatenate(parts), *values)
  return np.concatenate(rows).astype(np.int64), joined


def gather_failures(failures: Failures) -> Failures:
  """Returns (row, reason) of what any process could not read."""
  pairs = [pair for part in parallel.all_gather(failures) for pair in part]
  return list(dict(pairs).items())


def share_failures(batches: Fallible) -> None:
  """Tells every process what any of them could not read."""
  failures = batches.get_state()["failures"]
  batches.add_failures(gather_failures(failures))


def compile_forward(
  graph: nnx.GraphDef[Network],
  compute: Callable[[Network, jax.Array], Any],
  devices: parallel.Devices,
  mean: Sequence[float],
  std: Sequence[float],
) -> Callable[[functional.Numbers, jax.Array], Any]:
  """Compiles what is computed of images, for networks of one structure.

  Args:
    graph: the structure.
    compute: of a network and images (N, S, S, 3), normalised.
    devices: where.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].

  Returns:
    A function of (parameters, statistics), replicated, and (N, S, S, 3) uint8.
  """

  def forward(numbers: functional.Numbers, pixels: jax.Array) -> Any:
    x_NHWC = preprocess.preprocess(pixels, mean, std)
    return compute(functional.merge(graph, *numbers), x_NHWC)

  return devices.compile(forward)


def place(
  networks: Mapping[str, Network],
  compute: Callable[[Network, jax.Array], Any],
  devices: parallel.Devices,
  mean: Sequence[float],
  std: Sequence[float],
) -> Callable[[jax.Array], dict[str, Any]]:
  """Places networks on devices, to be run on the same images.

  Networks that differ in their numbers alone share one program.

  Args:
    networks: label -> network.
    compute: as for `compile_forward`.
    devices: where.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].

  Returns:
    (N, S, S, 3) uint8 -> {label: what was computed}, for `run`.
  """
  compiled = functools.cache(
    functools.partial(
      compile_forward, compute=compute, devices=devices, mean=mean, std=std
    )
  )
  programs = {}
  for label, network in networks.items():
    graph, *numbers = functional.split(network)
    programs[label] = functools.partial(
      compiled(graph), devices.replicate(tuple(numbers))
    )
  return lambda pixels: {
    label: program(pixels) for label, program in programs.items()
  }


def logits(network: Network, images: jax.Array) -> jax.Array:
  """Returns a network's output, (N, C), for `compile_forward` and `place`."""
  return network(images)


def measure_speeds(
  networks: Sequence[Network],
  devices: parallel.Devices,
  one: parallel.Devices,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  image_size: int,
  batch_size: int,
  seed: int,
) -> list[dict[str, float]]:
  """Counts each network, and measures the speed of all of them in turns.

  Networks that differ in their numbers alone have one speed, measured once.

  Args:
    networks: which.
    devices: for the throughput.
    one: a single device, for the latency of one image.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    image_size: side of the images.
    batch_size: images a step, a multiple of the number of devices.
    seed: of the pixels.

  Returns:
    Of each network params, macs, latency_ms and images_per_second.
  """
  graphs = [functional.split(network)[0] for network in networks]
  distinct: dict[nnx.GraphDef, Network] = {}
  for graph, network in zip(graphs, networks, strict=True):
    distinct.setdefault(graph, network)

  def speeds(
    where: parallel.Devices, images: int, **settings: int
  ) -> dict[nnx.GraphDef, float]:
    pixels = np.random.default_rng(seed).integers(
      0, 256, (images, image_size, image_size, 3), np.uint8
    )
    calls = [
      functools.partial(
        place({"": network}, logits, where, mean, std), where.put(pixels)
      )
      for network in distinct.values()
    ]
    measured = cost.measure_forward(calls, images, **settings)
    return {g: of.median for g, of in zip(distinct, measured, strict=True)}

  latency = speeds(one, 1, repeats=_LATENCY_REPEATS)
  throughput = speeds(devices, batch_size)
  rows = []
  for network, graph in zip(networks, graphs, strict=True):
    params, macs = zoo.count(network, image_size, head=True)
    rows.append(
      {
        "params": params,
        "macs": macs,
        "latency_ms": 1000 / latency[graph],
        "images_per_second": throughput[graph],
      }
    )
  return rows


@dataclasses.dataclass(frozen=True)
class CutCosts:
  """What a network costs on some devices, cut at each of T taps.

  Attributes:
    images_per_second: (T,) float64.
    peak_memory_bytes: (T,) on one device by the compiler's plan, None where
      the platform does not tell: exact at the ends of stages, between them the
      plan of the next end less the weights that lie after the tap.
    sum_over_whole: tap -> time of all its layers, each timed alone, over that
      of the network cut there and timed whole.
    layers: T, what the taps themselves amount to.
  """

  images_per_second: np.ndarray
  peak_memory_bytes: list[int | None]
  sum_over_whole: dict[str, float]
  layers: list[zoo.Layer]

  @property
  def table(self) -> list[dict[str, Any]]:
    """What each cut costs: its width, size, memory and speed."""
    return [
      {
        "channels": layer.channels,
        "params": layer.params,
        "macs": layer.macs,
        "peak_memory_bytes": memory,
        "images_per_second": float(speed),
      }
      for layer, memory, speed in zip(
        self.layers,
        self.peak_memory_bytes,
        self.images_per_second,
        strict=True,
      )
    ]


def measure_cuts(
  network: Network,
  taps: Sequence[str],
  *,
  mean: Sequence[float],
  std: Sequence[float],
  image_size: int,
  batch_size: int,
  devices: parallel.Devices,
  directory: pathlib.Path,
) -> CutCosts:
  """Measures a network cut at every tap, from 8-bit images to pooled features.

  Args:
    network: with values, down to the deepest tap at least.
    taps: T layer names in the network's order.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    image_size: side of the images, pixels.
    batch_size: images at a time, a multiple of the devices.
    devices: where.
    directory: where every round of timing is kept: a run that was stopped goes
      on with the next.

  Returns:
    Speed and memory of every cut.
  """
  settings = [network.name, list(taps), str(network.dtype), jax.__version__]
  settings += [image_size, batch_size, str(devices)]
  digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
  path = directory / f"cost-{digest}.json"
  stored: dict[str, Any] = {"memory": None, "rounds": []}
  if path.exists():
    stored = json.loads(path.read_text(encoding="utf-8"))
  parts = _Parts(network, taps, mean, std, image_size, devices)
  if not _enough(stored["rounds"]):
    shape = (batch_size, image_size, image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    _time(parts, devices.put(pixels), stored, path)
  seconds = np.median(stored["rounds"], axis=0)
  sums, whole = np.cumsum(seconds[: len(taps)]), seconds[len(taps) :]
  # The ratio changes evenly from one end to the next.
  ratio = np.interp(sums, sums[parts.ends], whole / sums[parts.ends])
  memory = stored["memory"]
  return CutCosts(
    images_per_second=batch_size / (sums * ratio),
    peak_memory_bytes=[
      None if planned is None else planned - spared
      for planned, spared in (
        (memory[end], parts.bytes_between(t, parts.ends[end]))
        for t, end in enumerate(np.searchsorted(parts.ends, range(len(taps))))
      )
    ],
    sum_over_whole={
      taps[end]: float(sums[end] / exact)
      for end, exact in zip(parts.ends, whole, strict=True)
    },
    layers=[parts.layers[tap] for tap in taps],
  )


class _Parts:
  """A network taken apart at its taps, and its cuts at the ends of stages.

  Attributes:
    ends: which taps, by number, are the last before the map gets smaller, and
      the deepest.
    layers: of the whole network, by name.
  """

  def __init__(
    self,
    network: Network,
    taps: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    devices: parallel.Devices,
  ):
    self.layers = {
      layer.name: layer for layer in zoo.list_layers(network.name, image_size)
    }
    strides = {name: layer.stride for name, layer in self.layers.items()}
    self.ends = [
      t
      for t, tap in enumerate(taps)
      if tap == taps[-1] or strides[tap] != strides[taps[t + 1]]
    ]
    self._normalise = functools.partial(
      preprocess.preprocess, mean=mean, std=std
    )
    self._devices = devices
    places = [network.layer_names.index(network.resolve(tap)) for tap in taps]
    self._graphs, self._states = [], []
    first = 0
    for place in places:
      layers = nnx.List(network.layers[first : place + 1])
      graph, state = nnx.split(layers)
      self._graphs.append(graph)
      self._states.append(devices.replicate(state))
      first = place + 1

  def bytes_between(self, tap: int, deeper: int) -> int:
    """Returns the bytes of the weights after one tap up to a deeper one."""
    leaves = jax.tree.leaves(self._states[tap + 1 : deeper + 1])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  def segments(self) -> list[Callable[[jax.Array], jax.Array]]:
    """Returns what computes each tap's map from that of the tap before it."""

    @functools.cache
    def compiled(graph: nnx.GraphDef, first: bool) -> Callable:
      # Blocks of one shape share a program.
      def run(state: nnx.State, x_NHWC: jax.Array) -> jax.Array:
        if first:
          x_NHWC = self._normalise(x_NHWC)
        return _run(graph, state, x_NHWC)

      return self._devices.compile(run)

    return [
      functools.partial(compiled(graph, t == 0), state)
      for t, (graph, state) in enumerate(
        zip(self._graphs, self._states, strict=True)
      )
    ]

  def whole(self, end: int, pixels: jax.Array) -> tuple[Callable, int | None]:
    """Compiles the network cut at a tap.

    Returns:
      A function of the pixels, and its peak memory in bytes.
    """
    graphs, states = self._graphs[: end + 1], self._states[: end + 1]

    def run(states: list[nnx.State], pixels: jax.Array) -> jax.Array:
      x_NHWC = self._normalise(pixels)
      for graph, state in zip(graphs, states, strict=True):
        x_NHWC = _run(graph, state, x_NHWC)
      return average(x_NHWC)

    program = self._devices.compile(run).lower(states, pixels).compile()
    return functools.partial(program, states), cost.peak_memory(program)


def _run(graph: nnx.GraphDef, state: nnx.State, x_NHWC: jax.Array) -> jax.Array:
  for layer in nnx.merge(graph, state):
    x_NHWC = layer(x_NHWC, False)
  return x_NHWC


def _enough(rounds: Sequence[Sequence[float]]) -> bool:
  spent = sum(map(sum, rounds))
  return len(rounds) >= _ROUNDS or (
    len(rounds) >= _LEAST_ROUNDS and spent >= _SECONDS
  )


def _time(
  parts: _Parts, pixels: jax.Array, stored: dict, path: pathlib.Path
) -> None:
  """Adds rounds to `stored` until there are enough, and keeps each on disk.

  In a round every program runs once, so that what else a machine does at some
  moment slows all of them.
  """
  segments = parts.segments()
  with progress.Progress(
    "compiling the cuts", "programs", len(segments) + len(parts.ends)
  ) as bar:
    x_NHWC = pixels
    for segment in segments:
      x_NHWC = jax.block_until_ready(segment(x_NHWC))
      bar.update()
    wholes = []
    stored["memory"] = []
    for end in parts.ends:
      program, memory = parts.whole(end, pixels)
      jax.block_until_ready(program(pixels))
      wholes.append(program)
      stored["memory"].append(memory)
      bar.update()
  with progress.Progress(
    "timing the cuts", "rounds", _ROUNDS, len(stored["rounds"])
  ) as bar:
    while not _enough(stored["rounds"]):
      seconds = []
      x_NHWC = pixels
      for segment in segments:
        start = time.perf_counter()
        x_NHWC = jax.block_until_ready(segment(x_NHWC))
        seconds.append(time.perf_counter() - start)
      for program in wholes:
        # Its memory is given to it in the first of two runs: after the small
        # programs a large one would pay for that alone.
        jax.block_until_ready(program(pixels))
        start = time.perf_counter()
        jax.block_until_ready(program(pixels))
        seconds.append(time.perf_counter() - start)
      stored["rounds"].append(seconds)
      files.write_json(path, stored)
      bar.update()
