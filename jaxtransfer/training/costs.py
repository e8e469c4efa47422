"""What networks cost: their size, and their speed where they run."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer import parallel
from jaxtransfer.measure import cost
from jaxtransfer.networks import zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.training import steps


def measure(
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
  counts, places = [], []
  known: dict[Any, int] = {}
  calls: dict[str, list] = {"latency": [], "throughput": []}
  for network in networks:
    counts.append(zoo.count(network, image_size, head=True))
    graph, *numbers = steps.take_apart(network)
    places.append(known.setdefault(graph, len(known)))
    if places[-1] < len(calls["latency"]):
      continue
    forward = steps.make_predict(graph, mean, std)
    for kind, where, images in (
      ("latency", one, 1),
      ("throughput", devices, batch_size),
    ):
      pixels = np.random.default_rng(seed).integers(
        0, 256, (images, image_size, image_size, 3), np.uint8
      )
      calls[kind].append(
        functools.partial(
          where.compile(forward),
          where.replicate(tuple(numbers)),
          where.put(pixels),
        )
      )
  latency = cost.measure_forward(calls["latency"], 1, repeats=30)
  throughput = cost.measure_forward(calls["throughput"], batch_size)
  return [
    {
      "params": params,
      "macs": macs,
      "latency_ms": 1000 / latency[place].median,
      "images_per_second": throughput[place].median,
    }
    for (params, macs), place in zip(counts, places, strict=True)
  ]
