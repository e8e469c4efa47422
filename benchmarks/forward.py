"""Images per second, beside torchvision in the same minutes.

    python -m benchmarks.forward
    python -m benchmarks.forward --torch-python ../torch/bin/python
    python -m benchmarks.forward --train --torch-python ../torch/bin/python

A forward pass, or, with --train, a whole step: forward, backward, Adam on all
parameters; ours also turns uint8 images into floats, as it does for a user.

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

  def load(
    self, name: str, batch: int, size: int, dtype: str, train: bool
  ) -> dict:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxtransfer import parallel
    from jaxtransfer.networks import tensors, zoo

    devices = parallel.Devices()
    model = zoo.build(name, num_classes=1000, dtype=jnp.dtype(dtype))
    tensors.load(model, tensors.random(model, 0))
    if train:
      return self.load_step(devices, model, batch, size)
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

  def load_step(self, devices, model, count: int, size: int) -> dict:
    import jax
    import numpy as np

    from jaxtransfer.networks import functional
    from jaxtransfer.training import augment, images, optimisers, steps

    recipe = steps.Recipe(
      optimiser=optimisers.Optimiser(
        name="adam",
        learning_rate=1e-4,
        momentum=0.9,
        weight_decay=0.0,
        clip_norm=0.0,
      ),
      schedule=lambda step: 1.0,
      rate=lambda name: 1.0,
      accumulate=1,
      average=0.0,
    )
    graph, *numbers = functional.split(model)
    objective = images.Objective(
      graph=graph,
      loss=steps.Loss(np.eye(1000), False, np.ones(1000), 0.0),
      augmentation=augment.Augmentation(
        crop=1.0,
        flip_horizontal=False,
        flip_vertical=False,
        quarter_turns=False,
        stain=0.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
      ),
      mean=(0.5, 0.5, 0.5),
      std=(0.25, 0.25, 0.25),
      batch_norm="train",
    )
    generator = np.random.default_rng(0)
    batch = devices.put(
      {
        "image": generator.integers(0, 256, (count, size, size, 3), np.uint8),
        "row": np.arange(count, dtype=np.int32),
        "label": generator.integers(0, 1000, count).astype(np.int32),
        "mask": np.ones(count, bool),
      }
    )
    step = devices.compile_step(steps.make_step(objective, recipe))
    first = steps.first_state(objective, recipe, *numbers, 0)
    state = [devices.replicate(first)]

    def call() -> jax.Array:
      state[0], metrics = step(state[0], batch)
      return metrics["loss"]

    self.call = call
    start = time.perf_counter()
    jax.block_until_ready(self.call())
    seconds = time.perf_counter() - start
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

  def load(
    self, name: str, batch: int, size: int, dtype: str, train: bool
  ) -> dict:
    import torch
    import torchvision

    where = {
      "device": "cuda" if self.gpu else "cpu",
      "dtype": getattr(torch, dtype),
      "memory_format": torch.channels_last,
    }
    torch._dynamo.reset()
    network = torchvision.models.get_model(name, weights=None).train(train)
    images = torch.randn(batch, 3, size, size).to(**where)
    self.train = train
    if train:
      # The parameters stay float32, as ours do.
      network = network.to(where["device"], memory_format=torch.channels_last)
      labels = torch.randint(0, 1000, (batch,), device=where["device"])
      optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
      mixed = torch.autocast(
        where["device"], torch.bfloat16, enabled=dtype == "bfloat16"
      )

      def step(forward: Callable) -> object:
        with mixed:
          loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss

    else:
      network = network.to(**where)

      def step(forward: Callable) -> object:
        return forward(images)

    compiled = torch.compile(network)
    self.calls = {
      EAGER: lambda: step(network),
      COMPILED: lambda: step(compiled),
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

    with torch.inference_mode(not self.train):
      wait(None)
      return timed(self.calls[side], wait, repeats)


class Server:
  """`Torch` in another process: one line of JSON asked, one answered."""

  def __init__(self, python: str):
    # As a user starts it: huge pages are ours, and it gains nothing by them.
    settings = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    self.process = subprocess.Popen(
      [python, __file__, "--serve"],
      env=settings,
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

  def load(self, *case: object) -> dict:
    return self.ask("load", *case)

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
      # The first call does not count: a virtual machine may have given the
      # memory away that lay unused during the others' turns.
      who.time(side, 1)
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
  parser.add_argument("--train", action="store_true", help="a whole step")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--seconds", type=float, default=2, help="of one turn")
  parser.add_argument("--torch-python", help="an interpreter that has torch")
  parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.serve:
    return serve()

  from jaxtransfer import hosts

  # As the launcher does.
  hosts.use_huge_pages()
  ours, server = Jax(flags.batch or 16), None
  if flags.torch_python or importlib.util.find_spec("torch"):
    server = Server(flags.torch_python or sys.executable)
  batch = flags.batch or (256 if ours.gpu else 16)
  dtype = flags.dtype or ("bfloat16" if ours.gpu else "float32")
  print(
    f"{machine(ours)}; {'training, ' if flags.train else ''}{dtype},"
    f" batch {batch}, {flags.size} px,"
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
    case = (name, batch, flags.size, dtype, flags.train)
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
