"""The devices of a run: one mesh axis `data`, with jit or with pmap.

Both ways lay a batch over the devices in the same order, so they give the same
rows; a program is compiled once because every batch has the same shape. The
devices may belong to several processes, each of which reads its part of a
batch; what comes back is the whole batch on all of them.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from jaxtransfer import errors, files
from jaxtransfer.data import pipeline

MODES = ("jit", "pmap")
# Answers that are on their way when the next question is asked.
_ASKED = 2
# Beyond, a device's part of a usual batch is too small to be worth a copy of
# the parameters.
_MOST_PROCESSORS = 8


def cache_programs() -> None:
  """Keeps compiled programs in the user's own cache, for the next run.

  A program compiled for one processor may not run on another: machines of a
  cluster that share a home directory have a directory each. Where none can be
  written, that is said, and each run compiles its own.
  """
  kind = hashlib.sha256(platform.processor().encode())
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    kind.update("".join(x for x in lines if "flags" in x[:9]).encode())
  try:
    directory = files.cache_directory("programs", kind.hexdigest()[:12])
  except errors.UsageError as e:
    print(f"compiled programs are not kept: {e}", flush=True)
    return
  # It may become full: then a program is compiled again, which is no news.
  warnings.filterwarnings("ignore", ".*persistent compilation cache")
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


def sharing(batch_size: int) -> list[jax.Device]:
  """Returns as many devices as share a batch evenly: of one example, one.

  Args:
    batch_size: of a part that is computed at a time.
  """
  devices = jax.devices()
  shares = range(1, min(len(devices), batch_size) + 1)
  return devices[: max(count for count in shares if batch_size % count == 0)]


def is_first() -> bool:
  """Whether this is the process that writes; one of several is."""
  return jax.process_index() == 0


def all_gather(value: Any) -> list[Any]:
  """Returns the values of all processes, in their order; all must call it.

  Args:
    value: for JSON, another one on each process.
  """
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  # Few different lengths: each is compiled.
  padded = np.zeros(2 ** int(sizes.max()).bit_length(), np.uint8)
  padded[: len(text)] = text
  texts = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(texts, sizes, strict=True)
  ]


def broadcast(tree: Any) -> Any:
  """Returns the first process's arrays on all, bit by bit; all must call it.

  Args:
    tree: NumPy arrays, of the same shapes and dtypes on every process.
  """
  if jax.process_count() == 1:
    return tree

  def send(x: np.ndarray) -> np.ndarray:
    # As bytes: numbers are sent as a sum, which turns -0.0 into 0.0.
    x = np.asarray(x)
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(flat))
    return sent.view(x.dtype).reshape(x.shape)

  return jax.tree.map(send, tree)


class Devices:
  """Lays state and batches over devices and compiles what runs on them.

  Args:
    mode: "jit" (sharded arrays, the default) or "pmap" (a leading axis of
      devices inside, the same results outside).
    devices: which to use; all by default, those of other processes too.

  Attributes:
    shard: (index, count) of the part of every batch that this process reads.

  Raises:
    UsageError: no such mode, or one that several processes cannot share.
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
    owners = [device.process_index for device in self.devices]
    counts = collections.Counter(owners)
    self.shard = sorted(counts).index(jax.process_index()), len(counts)
    self._several = len(counts) > 1
    if self._several:
      if mode == "pmap":
        raise errors.UsageError(
          "config.parallel is 'pmap', which is for one process; several need"
          " 'jit'"
        )
      if len(set(counts.values())) > 1:
        raise errors.UsageError(
          "--distributed: the processes have different numbers of devices"
          f" ({', '.join(map(str, counts.values()))})"
        )
      # In the processes' order, which is that of a batch's parts.
      self.devices.sort(key=lambda device: (device.process_index, device.id))
      self.mesh = Mesh(
        np.array(self.devices), ("data",), axis_types=(AxisType.Auto,)
      )
    else:
      self.mesh = jax.make_mesh(
        (len(self.devices),),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=self.devices,
      )
    self._sharded = NamedSharding(self.mesh, PartitionSpec("data"))
    self._replicated = NamedSharding(self.mesh, PartitionSpec())
    self._gathered = jax.jit(lambda tree: tree, out_shardings=self._replicated)
    self._any = jax.jit(jnp.any, out_shardings=self._replicated)

  def __str__(self) -> str:
    kind = self.devices[0].device_kind
    how = self.mode
    if self._several:
      how += f", {self.shard[1]} processes"
    return f"{len(self.devices)} x {kind} ({how})"

  def batch_size(self, wanted: int) -> int:
    """Returns `wanted` rounded up to a multiple of the devices."""
    count = len(self.devices)
    return -(-wanted // count) * count

  def replicate(self, tree: Any) -> Any:
    """Returns the tree with a copy on every device.

    Args:
      tree: arrays, the same on every process.
    """
    if self._several:
      return self._place(tree, self._replicated)
    return jax.device_put(tree, self._replicated)

  def put(self, tree: Any) -> Any:
    """Sends arrays whose first axis is the batch, a part to each device.

    Args:
      tree: arrays (B, ...), B a multiple of the devices; with several
        processes, this one's part of the batch.
    """
    if self._several:
      return self._place(tree, self._sharded)
    if self.mode == "pmap":
      tree = jax.tree.map(self._add_device_axis, tree)
    return jax.device_put(tree, self._sharded)

  def gather(self, tree: Any) -> Any:
    """Returns arrays of the whole batch; with one process, those given.

    Args:
      tree: NumPy arrays (B, ...) of this process's part of a batch.
    """
    return self._gathered(self.put(tree)) if self._several else tree

  def agreed(self, question: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a question to which all processes get the same answer.

    With several processes it is whether any of them would have said yes two
    questions ago: the devices bring the answer while they work, and nobody
    waits for it.

    Args:
      question: with an answer of this process alone.

    Returns:
      To be asked equally often by all processes.
    """
    if not self._several:
      return question
    local = len(self.devices) // self.shard[1]
    asked: collections.deque[jax.Array] = collections.deque()

    def ask() -> bool:
      asked.append(self._any(self.put(np.full(local, question()))))
      return len(asked) > _ASKED and bool(asked.popleft())

    return ask

  def get(self, tree: Any) -> Any:
    """Waits for arrays and returns them as NumPy arrays (B, ...)."""
    tree = jax.device_get(self._gathered(tree) if self._several else tree)
    if self.mode == "pmap":
      return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
    return tree

  def compile(self, function: Callable[[Any, Any], Any]) -> Wrapped:
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
      in_shardings=(self._replicated, self._sharded),
      out_shardings=self._replicated if self._several else self._sharded,
    )

  def compile_step(self, function: Callable[[Any, Any], Any]) -> Wrapped:
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

  def _place(self, tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
      tree,
    )

  def _add_device_axis(self, x: np.ndarray) -> np.ndarray:
    return x.reshape(len(self.devices), -1, *x.shape[1:])
