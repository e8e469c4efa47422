"""Images per second of a forward pass, beside torchvision in the same minutes.

    python benchmarks/forward.py
    python benchmarks/forward.py --torch-python ../torch/bin/python

Ours, torch eager and torch.compile (both channels-last) take turns, round after
round, so that whatever else the machine does falls on all of them; a ratio is
the median over rounds of the ratio within a round. Torch runs in a process of
its own, from this interpreter if torch is here, or from --torch-python; with
neither, ours is measured alone. The networks hold random weights and end in
1000 logits; inputs lie on the device already. On a GPU the compute type is
bfloat16, on a CPU float32, for both sides.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

# Both sides share a GPU's memory, which JAX would otherwise take at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

OURS, EAGER, COMPILED = "jaxtransfer", "torch eager", "torch.compile"


def timed(
  call: Callable[[], object], wait: Callable[[object], object], repeats: int
) -> dict[str, float]:
  """Seconds per call, on the clock and of all this process's threads."""
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(repeats):
    result = call()
  wait(result)
  return {
    "wall": (time.perf_counter() - wall) / repeats,
    "cpu": (time.process_time() - cpu) / repeats,
  }


class Jax:
  """Our side, in this process."""

  def __init__(self, batch: int):
    import jax

    from jaxtransfer import parallel

    # As the launcher does.
    parallel.use_processors(batch)
    self.device = jax.devices()[0]
    self.gpu = self.device.platform == "gpu"

  def versions(self) -> str:
    return versions("jax", "jaxlib", "flax")

  def load(self, name: str, batch: int, size: int, dtype: str) -> dict:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxtransfer import parallel
    from jaxtransfer.networks import tensors, zoo

    devices = parallel.Devices()
    model = zoo.build(name, num_classes=1000, dtype=jnp.dtype(dtype))
    tensors.load(model, tensors.random(model, 0))
    graph, state = nnx.split(model)
    images = jax.random.normal(
      jax.random.key(0), (batch, size, size, 3), jnp.dtype(dtype)
    )
    state, images = devices.replicate(state), devices.put(images)
    forward = devices.compile(lambda state, x: nnx.merge(graph, state)(x))
    start = time.perf_counter()
    compiled = forward.lower(state, images).compile()
    seconds = time.perf_counter() - start
    self.call = lambda: compiled(state, images)
    jax.block_until_ready(self.call())
    return {OURS: seconds}

  def time(self, side: str, repeats: int) -> dict[str, float]:
    import jax

    return timed(self.call, jax.block_until_ready, repeats)


class Torch:
  """torchvision's side, in the process that `serve` runs."""

  def __init__(self):
    import torch

    # torchvision's wheel for CUDA, beside a CPU build of torch, lacks only
    # these declarations; no network here calls them.
    if not torch.cuda.is_available():
      boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
      self.library = torch.library.Library("torchvision", "DEF")
      self.library.define(f"nms{boxes}")
      self.library.define(f"qnms{boxes}")
    self.gpu = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = True

  def versions(self) -> str:
    return versions("torch", "torchvision")

  def load(self, name: str, batch: int, size: int, dtype: str) -> dict:
    import torch
    import torchvision

    where = {
      "device": "cuda" if self.gpu else "cpu",
      "dtype": getattr(torch, dtype),
      "memory_format": torch.channels_last,
    }
    torch._dynamo.reset()
    network = torchvision.models.get_model(name, weights=None).eval()
    network = network.to(**where)
    images = torch.randn(batch, 3, size, size).to(**where)
    compiled = torch.compile(network)
    self.calls = {
      EAGER: lambda: network(images),
      COMPILED: lambda: compiled(images),
    }
    seconds = {}
    for side in self.calls:
      start = time.perf_counter()
      self.time(side, 1)
      seconds[side] = time.perf_counter() - start
      self.time(side, 1)
    return seconds

  def time(self, side: str, repeats: int) -> dict[str, float]:
    import torch

    def wait(_: object) -> None:
      if self.gpu:
        torch.cuda.synchronize()

    with torch.inference_mode():
      wait(None)
      return timed(self.calls[side], wait, repeats)


class Server:
  """`Torch` in another process: one line of JSON asked, one answered."""

  def __init__(self, python: str):
    self.process = subprocess.Popen(
      [python, __file__, "--serve"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, method: str, *args: object) -> object:
    from jaxtransfer import errors

    try:
      self.process.stdin.write(json.dumps([method, *args]) + "\n")
      self.process.stdin.flush()
    except BrokenPipeError:
      pass
    line = self.process.stdout.readline()
    if not line:
      raise errors.RunError(
        f"{self.process.args[0]}: torch ended with exit code"
        f" {self.process.wait()}; its own message is above"
      )
    return json.loads(line)

  def versions(self) -> str:
    return self.ask("versions")

  def load(self, name: str, batch: int, size: int, dtype: str) -> dict:
    return self.ask("load", name, batch, size, dtype)

  def time(self, side: str, repeats: int) -> dict[str, float]:
    return self.ask("time", side, repeats)

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def serve() -> None:
  # Whatever torch prints must not come between the answers.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  torch = Torch()
  for line in sys.stdin:
    method, *args = json.loads(line)
    answers.write(json.dumps(getattr(torch, method)(*args)) + "\n")
    answers.flush()


def versions(*packages: str) -> str:
  return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)


def machine(ours: Jax) -> str:
  if ours.gpu:
    return ours.device.device_kind
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [l.split(":")[1].strip() for l in lines if l.startswith("model name")]
  cores = len(os.sched_getaffinity(0)) if names else os.cpu_count()
  return f"{names[0] if names else platform.machine()}, {cores} cores"


def measure(
  sides: dict[str, Jax | Server], rounds: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
  """Seconds per batch, {side: [one per round]}, the sides taking turns."""
  repeats = {
    side: max(1, round(seconds / who.time(side, 1)["wall"]))
    for side, who in sides.items()
  }
  found = {side: [] for side in sides}
  for _ in range(rounds):
    for side, who in sides.items():
      found[side].append(who.time(side, repeats[side]))
  return found


def row(
  name: str,
  side: str,
  batch: int,
  compile_seconds: float,
  found: dict[str, list[dict[str, float]]],
) -> str:
  rates = sorted(batch / t["wall"] for t in found[side])

  def ratio(clock: str) -> str:
    return "{:.2f}".format(
      statistics.median(
        theirs[clock] / ours[clock]
        for ours, theirs in zip(found[OURS], found[side], strict=True)
      )
    )

  cells = [
    name,
    side,
    *(f"{r:.1f}" for r in (rates[0], statistics.median(rates), rates[-1])),
    ratio("wall"),
    f"{batch / statistics.median(t['cpu'] for t in found[side]):.1f}",
    ratio("cpu"),
    f"{compile_seconds:.0f}",
  ]
  return f"| {' | '.join(cells)} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--networks", default="resnet18,resnet50,densenet121")
  parser.add_argument("--batch", type=int, help="16 on a CPU, 256 on a GPU")
  parser.add_argument("--size", type=int, default=224, help="pixels")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"])
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--seconds", type=float, default=2, help="of one turn")
  parser.add_argument("--torch-python", help="an interpreter that has torch")
  parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.serve:
    return serve()

  ours, server = Jax(flags.batch or 16), None
  if flags.torch_python or importlib.util.find_spec("torch"):
    server = Server(flags.torch_python or sys.executable)
  batch = flags.batch or (256 if ours.gpu else 16)
  dtype = flags.dtype or ("bfloat16" if ours.gpu else "float32")
  print(
    f"{machine(ours)}; {dtype}, batch {batch}, {flags.size} px,"
    f" {flags.rounds} rounds of {flags.seconds:g} s each;"
    f" Python {platform.python_version()}, {ours.versions()}"
    + (f", {server.versions()}" if server else "")
  )
  print(
    "\n| network | | images/s: least | median | most | ours is"
    " | images per CPU second | ours is | first call, s |"
  )
  print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
  for name in flags.networks.split(","):
    case = (name, batch, flags.size, dtype)
    sides = {OURS: ours}
    first = ours.load(*case)
    if server:
      first |= server.load(*case)
      sides |= {EAGER: server, COMPILED: server}
    found = measure(sides, flags.rounds, flags.seconds)
    for side in sides:
      print(row(name, side, batch, first[side], found), flush=True)
  if server:
    server.close()


if __name__ == "__main__":
  main()
