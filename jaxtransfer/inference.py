"""What running a network costs, cut at every tap, from one pass through it.

A network cut at one tap is the network cut at the tap before it and the layers
between. So the layers between taps are compiled and timed once, and added up;
the networks cut at the ends of stages are compiled and timed whole beside
them, and the sums are brought to what these take. Time and memory grow with
the network's depth and not with its square.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from jaxtransfer import files, parallel, progress
from jaxtransfer.data import preprocess
from jaxtransfer.measure import cost
from jaxtransfer.networks import zoo
from jaxtransfer.networks.network import Network, average

# Rounds of timing. Where one takes long there are fewer, but no fewer than a
# median needs that one interruption shall not move.
_ROUNDS, _LEAST_ROUNDS = 10, 3
_SECONDS = 30.0


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
  """

  images_per_second: np.ndarray
  peak_memory_bytes: list[int | None]
  sum_over_whole: dict[str, float]


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
  stored = {"memory": None, "rounds": []}
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
  )


class _Parts:
  """A network taken apart at its taps, and its cuts at the ends of stages.

  Attributes:
    ends: which taps, by number, are the last before the map gets smaller, and
      the deepest.
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
    strides = {
      layer.name: layer.stride
      for layer in zoo.list_layers(network.name, image_size)
    }
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
        start = time.perf_counter()
        jax.block_until_ready(program(pixels))
        seconds.append(time.perf_counter() - start)
      stored["rounds"].append(seconds)
      files.write_json(path, stored)
      bar.update()
