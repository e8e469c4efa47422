"""Images per second of the forward pass, against torchvision in the same run.

    python benchmarks/forward.py --torch=.oracle/bin/python

`--torch` is the Python of an environment with torch and torchvision, which may
be this one (`--torch=python`); without it, only this project is measured. Both
sides stay loaded and take turns, round after round, so that what else the
machine does meets both; the ratio is taken round by round.

torchvision runs eagerly and under torch.compile, with channels-last tensors. On
a GPU give --dtype=bfloat16 and a larger --batch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time

NETWORKS = ("resnet18", "resnet50", "densenet121")


def parse(argv):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--torch", help="Python of an environment with torch")
  parser.add_argument("--networks", nargs="+", default=NETWORKS)
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
  parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def timed(forward, batch, seconds):
  """Images per second of `forward`, run for about `seconds`."""
  count, started = 0, time.perf_counter()
  while time.perf_counter() - started < seconds:
    forward()
    count += batch
  return count / (time.perf_counter() - started)


def ours(args):
  """Returns {network: a forward pass that ends when its result is there}."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from jaxtransfer.networks import tensors, zoo

  x = np.random.default_rng(0).normal(
    size=(args.batch, args.size, args.size, 3)
  )
  x = jax.device_put(x.astype(np.float32))

  def ready(name):
    network = zoo.build(name, num_classes=1000, dtype=jnp.dtype(args.dtype))
    tensors.load(network, tensors.random(network, 0))
    graph, state = nnx.split(network)
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda: program(state, x).block_until_ready()

  device = jax.devices()[0]
  print(
    f"jax {jax.__version__} on {len(jax.devices())} x {device.device_kind}",
    f"flax {importlib.metadata.version('flax')}",
    sep=", ",
  )
  return {name: ready(name) for name in args.networks}


def serve(args):
  """Times torch where a line on standard input asks for it."""
  import torch

  if not torch.cuda.is_available():
    # torchvision's wheel is built for CUDA; beside a CPU torch it lacks these.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float t) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float t) -> Tensor")
  import torchvision

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cudnn.benchmark = True
  dtype = getattr(torch, args.dtype)
  x = torch.randn(args.batch, 3, args.size, args.size)
  x = x.to(device, dtype, memory_format=torch.channels_last)

  def ready(name, compiled):
    network = getattr(torchvision.models, name)(weights=None).eval()
    network = network.to(device, dtype, memory_format=torch.channels_last)
    if compiled:
      network = torch.compile(network)

    def forward():
      with torch.inference_mode():
        network(x)
      if device == "cuda":
        torch.cuda.synchronize()

    return forward

  print(json.dumps(f"torch {torch.__version__} on {device}"), flush=True)
  passes = {}
  for line in sys.stdin:
    name, compiled = json.loads(line)
    if (name, compiled) not in passes:
      passes[name, compiled] = ready(name, compiled)
      for _ in range(3):
        passes[name, compiled]()
    rate = timed(passes[name, compiled], args.batch, args.seconds)
    print(json.dumps(rate), flush=True)


def main():
  args = parse(None)
  if args.serve:
    serve(args)
    return
  print(f"{platform.machine()}, {os.cpu_count()} cores, {args.dtype}", end=", ")
  print(f"{args.size} px, batch {args.batch}, {args.rounds} rounds")
  passes = ours(args)
  torch = None
  if args.torch:
    command = [args.torch, __file__, "--serve", *sys.argv[1:]]
    torch = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    print(json.loads(torch.stdout.readline()))

  def of_torch(name, compiled):
    torch.stdin.write(json.dumps([name, compiled]) + "\n")
    torch.stdin.flush()
    return json.loads(torch.stdout.readline())

  print("network        ours img/s (min median max)    eager  compile  ratios")
  for name in args.networks:
    started = time.perf_counter()
    passes[name]()
    compiling = time.perf_counter() - started
    rates = []
    for _ in range(args.rounds + 1):
      one = [timed(passes[name], args.batch, args.seconds)]
      if torch:
        one += [of_torch(name, False), of_torch(name, True)]
      rates.append(one)
    rates = rates[1:]  # the first round warms up
    mine = sorted(one[0] for one in rates)
    line = f"{name:14} {mine[0]:8.1f} {statistics.median(mine):8.1f}"
    line += f" {mine[-1]:8.1f}     "
    for k in (1, 2) if torch else ():
      line += f" {statistics.median(one[k] for one in rates):8.1f}"
    for k in (1, 2) if torch else ():
      ratio = statistics.median(one[0] / one[k] for one in rates)
      line += f"  {ratio:.2f}x"
    print(f"{line}   (first call {compiling:.1f} s)", flush=True)
  if torch:
    torch.stdin.close()
    torch.wait()


if __name__ == "__main__":
  main()
