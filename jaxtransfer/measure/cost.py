"""What running a network costs here: images per second and memory."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Speed:
  """How fast a program ran.

  Attributes:
    median: images per second, the median over the repeats.
    low: its lower quartile.
    high: its upper quartile.
    repeats: how many times it was run and timed.
  """

  median: float
  low: float
  high: float
  repeats: int


def measure_forward(
  programs: Sequence[Callable[[], Any]], images: int, repeats: int = 10
) -> list[Speed]:
  """Times programs in turns, each run up to the moment its result is there.

  In turns, so that what else a machine does at some moment slows all of them,
  and their ratios hold where the numbers themselves do not.

  Args:
    programs: what to call, best compiled already and its arguments on the
      device.
    images: how many images one call works on.
    repeats: how many calls of each are timed. Two more go before them,
      untimed: the first may compile, the second finds caches and allocator
      warm.

  Returns:
    A speed for each; the quartiles show how calm the machine was.

  Raises:
    ValueError: images or repeats below 1.
  """
  if images < 1 or repeats < 1:
    raise ValueError(
      f"images and repeats must be 1 or more, got {images} and {repeats}"
    )
  for program in programs:
    for _ in range(2):
      jax.block_until_ready(program())
  seconds = np.empty((len(programs), repeats))
  for i in range(repeats):
    for j, program in enumerate(programs):
      start = time.perf_counter()
      jax.block_until_ready(program())
      seconds[j, i] = time.perf_counter() - start
  quartiles = np.quantile(
    images / seconds, [0.25, 0.5, 0.75], axis=1
  ).T.tolist()
  return [Speed(median, low, high, repeats) for low, median, high in quartiles]


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
  """Returns the bytes a compiled program holds at most, by the compiler's plan.

  Arguments (parameters and images), results and temporary buffers, less what
  they share, on one device. It is a plan and not a measurement, and so the
  same in every run; what libraries allocate for themselves is not in it.

  Args:
    compiled: of `jax.jit(f).lower(...).compile()`.

  Returns:
    Bytes; None where the platform does not tell.
  """
  plan = compiled.memory_analysis()
  if plan is None:
    return None
  return int(
    plan.argument_size_in_bytes
    + plan.output_size_in_bytes
    + plan.temp_size_in_bytes
    - plan.alias_size_in_bytes
  )


def allocated_peak(device: jax.Device) -> int | None:
  """Returns the most bytes ever in use on a device since the process began.

  Args:
    device: of `jax.devices()`.

  Returns:
    Bytes; None where the platform keeps no account, as the CPU.
  """
  statistics = device.memory_stats()
  return None if not statistics else statistics.get("peak_bytes_in_use")
