"""The devices of a run: one mesh axis `data`, with jit or with pmap.

Both ways lay a batch over the devices in the same order, so they give the same
rows; a program is compiled once because every batch has the same shape.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtransfer import errors, files
from jaxtransfer.data import pipeline

MODES = ("jit", "pmap")
# Beyond, a device's part of a usual batch is too small to be worth a copy of
# the parameters.
_MOST_PROCESSORS = 8


def cache_programs() -> None:
  """Keeps compiled programs in the user's own cache, for the next run.

  A program compiled for one processor may not run on another: machines of a
  cluster that share a home directory have a directory each.
  """
  kind = hashlib.sha256(platform.processor().encode())
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    kind.update("".join(x for x in lines if "flags" in x[:9]).encode())
  directory = files.cache_directory("programs", kind.hexdigest()[:12])
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def use_processors(batch_size: int) -> None:
  """Makes each processor a device where there is no accelerator.

  Much of what XLA's CPU compiler makes of a network runs on one thread; with a
  part of the batch on each processor all of them have work. Where
  JAX_NUM_CPU_DEVICES is set, it holds. To be called before JAX is used.

  Args:
    batch_size: which the devices have to share evenly.
  """
  if "JAX_NUM_CPU_DEVICES" in os.environ:
    return
  count = _MOST_PROCESSORS
  while count > pipeline.processors() or batch_size % count:
    count //= 2
  jax.config.update("jax_num_cpu_devices", count)


class Devices:
  """Lays state and batches over devices and compiles what runs on them.

  Args:
    mode: "jit" (sharded arrays, the default) or "pmap" (a leading axis of
      devices inside, the same results outside).
    devices: which to use; all by default.

  Raises:
    UsageError: no such mode.
  """

  def __init__(
    self, mode: str = "jit", devices: list[jax.Device] | None = None
  ):
    if mode not in MODES:
      raise errors.UsageError(
        f"config.parallel is {mode!r}; it is one of {', '.join(MODES)}"
      )
    self.mode = mode
    self.devices = list(jax.devices() if devices is None else devices)
    self.mesh = jax.make_mesh(
      (len(self.devices),),
      ("data",),
      axis_types=(AxisType.Auto,),
      devices=self.devices,
    )
    self._split = NamedSharding(self.mesh, PartitionSpec("data"))
    self._whole = NamedSharding(self.mesh, PartitionSpec())

  def __str__(self) -> str:
    kind = self.devices[0].device_kind
    return f"{len(self.devices)} x {kind} ({self.mode})"

  def batch_size(self, wanted: int) -> int:
    """Returns `wanted` rounded up to a multiple of the devices."""
    count = len(self.devices)
    return -(-wanted // count) * count

  def replicate(self, tree: Any) -> Any:
    """Returns the tree with a copy on every device."""
    return jax.device_put(tree, self._whole)

  def put(self, tree: Any) -> Any:
    """Sends arrays whose first axis is the batch, a part to each device.

    Args:
      tree: arrays (B, ...), B a multiple of the devices.
    """
    if self.mode == "pmap":
      tree = jax.tree.map(self._by_device, tree)
    return jax.device_put(tree, self._split)

  def get(self, tree: Any) -> Any:
    """Waits for arrays and returns them as NumPy arrays (B, ...)."""
    tree = jax.device_get(tree)
    if self.mode == "pmap":
      return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
    return tree

  def compile(self, function: Callable[[Any, Any], Any]) -> Callable:
    """Compiles `function(state, batch)` for replicated state, split batch.

    Args:
      function: pure; what it returns has the batch as its first axis.

    Returns:
      A function of (replicated state, batch as `put` returns it).
    """
    if self.mode == "pmap":
      return jax.pmap(function, "data", in_axes=(None, 0), devices=self.devices)
    return jax.jit(
      function,
      in_shardings=(self._whole, self._split),
      out_shardings=self._split,
    )

  def compile_step(self, function: Callable[[Any, Any], Any]) -> Callable:
    """Compiles `function(state, batch) -> (state, metrics)`, one training step.

    With jit as with pmap every device runs the function on its own part of the
    batch, and the axis "data" joins them: what the function returns must be
    equal on all of them (`lax.psum`, `lax.pmean`). So both modes are the same
    program with the same choice between statistics of one device and of all.

    Args:
      function: pure.

    Returns:
      A function of (replicated state, batch as `put` returns it); the state
      given to it is donated and must not be used again.
    """
    if self.mode == "pmap":
      return jax.pmap(
        function,
        "data",
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=self.devices,
        donate_argnums=0,
      )
    whole, split = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=(whole, split),
      out_specs=(whole, whole),
      # As in pmap: a gradient is that of the device's own loss until it is
      # summed in so many words.
      check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)

  def _by_device(self, x: np.ndarray) -> np.ndarray:
    return x.reshape(len(self.devices), -1, *x.shape[1:])
