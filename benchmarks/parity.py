"""Compares every network with torchvision: all taps, logits, and training.

torch is never installed beside jaxtransfer: give the Python of an environment
that has it (`pip install torch torchvision`), and run in the repository's root:

    python -m benchmarks.parity --torch=.oracle/bin/python

Weights, BatchNorm statistics among them, are drawn from a seed and each
tensor's name on both sides. Prints, per network and size, the worst

    max |jax - torch| / max |torch|

over all taps, each whole, and the logits, and where it is. Then, after three
steps of SGD (momentum 0.9, batches of eight at 64 px), the same over all
parameters and running statistics, and the error relative to the largest change
of a tensor, max |jax - torch| / max |torch - initial|, in float64 at rate 0.1
and in float32. Exits with 1 if a worst error exceeds its bound.

In float32 a ReLU that rounding decides moves a gradient by a whole term: torch
in float32 differs from torch in float64 as much as from us, at rate 0.1 by 4 %
of ResNet-18's weights and a fifth of DenseNet-121's. So float64 proves that the
arithmetic is the same, and float32 is compared at rates that are low enough for
torch to agree with itself.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from jaxtransfer.networks import zoo
from tests.golden import draw, ours

FORWARD_BOUND = 1e-4
TRAIN_BOUND = 1e-3
DOUBLE_BOUND = 1e-9
NETWORKS = [name for name in zoo.list_models() if not zoo.family(name).small]
# Learning rates at which torch in float32 agrees with torch in float64.
RATES = {"resnet18": 0.01, "resnet50": 1e-5, "densenet121": 0.001}


def torch_outputs(python: str, *args: str) -> dict[str, np.ndarray]:
  """Returns what `tests.golden.make` writes in torch's environment."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, "torch.npz")
    command = [python, "-m", "tests.golden.make", *args, f"--out={out}"]
    subprocess.run(command, check=True)
    with np.load(out) as arrays:
      return dict(arrays)


def worst(
  ours: dict[str, np.ndarray],
  theirs: dict[str, np.ndarray],
  scales: dict[str, float],
) -> tuple[float, str]:
  """Returns the largest max |ours - theirs| / scale, and its name."""
  if ours.keys() != theirs.keys():
    raise ValueError(f"different names: {sorted(ours.keys() ^ theirs.keys())}")
  for name, value in ours.items():
    if value.shape != theirs[name].shape:
      raise ValueError(f"{name}: {value.shape} against {theirs[name].shape}")
  errors = {
    name: float(np.abs(value - theirs[name]).max() / scales[name])
    for name, value in ours.items()
  }
  if not np.isfinite(list(errors.values())).all():
    raise ValueError("an output is not finite")
  where = max(errors, key=errors.get)
  return errors[where], where


def magnitudes(arrays: dict[str, np.ndarray]) -> dict[str, float]:
  return {name: float(np.abs(value).max()) for name, value in arrays.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--torch", required=True, help="a Python that has torch")
  parser.add_argument("--networks", nargs="*", default=NETWORKS)
  parser.add_argument("--sizes", nargs="*", type=int, default=[224, 97])
  parser.add_argument(
    "--trained", nargs="*", default=["resnet18", "resnet50", "densenet121"]
  )
  args = parser.parse_args()
  failed = False
  print("| network | px | taps | worst error | at | logits | seconds |")
  print("|---|---|---|---|---|---|---|")
  for name in args.networks:
    for size in args.sizes:
      theirs = torch_outputs(args.torch, "forward", name, f"--size={size}")
      start = time.perf_counter()
      found = ours.forward(name, (size, size), batch=2, seed=0)
      seconds = time.perf_counter() - start
      scales = magnitudes(theirs)
      error, where = worst(found, theirs, scales)
      logits = np.abs(found["logits"] - theirs["logits"]).max()
      print(
        f"| {name} | {size} | {len(found) - 1} | {error:.1e} | {where}"
        f" | {logits / scales['logits']:.1e} | {seconds:.0f} |",
        flush=True,
      )
      failed |= error > FORWARD_BOUND
  print("\n| network | float | rate | worst error | at | of the change | at |")
  print("|---|---|---|---|---|---|---|")
  for name in args.trained:
    runs = [(0.1, True)]
    if name in RATES:
      runs.append((RATES[name], False))
    for rate, double in runs:
      options = ["--size=64", "--batch=8", f"--rate={rate}"]
      options += ["--double"] if double else []
      theirs = torch_outputs(args.torch, "train", name, *options)
      found = ours.train(name, 64, 8, seed=0, rate=rate, double=double)
      np.testing.assert_allclose(
        found.pop("losses"), theirs.pop("losses"), rtol=1e-3
      )
      shapes = {key: value.shape for key, value in found.items()}
      initial = draw.tensors(shapes, 0)
      changes = {key: theirs[key] - initial[key] for key in initial}
      error, where = worst(found, theirs, magnitudes(theirs))
      change, there = worst(found, theirs, magnitudes(changes))
      print(
        f"| {name} | {64 if double else 32} | {rate} | {error:.1e} | {where}"
        f" | {change:.1e} | {there} |",
        flush=True,
      )
      failed |= error > (DOUBLE_BOUND if double else TRAIN_BOUND)
  sys.exit(int(failed))


if __name__ == "__main__":
  main()
