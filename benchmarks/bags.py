r"""Bags trained a second, beside a plain torch loop over the same files.

    python -m benchmarks.bags --torch-python ../torch/bin/python
    python -m benchmarks.bags --preset=clam --channels=1024 --tiles=4000 \
      --torch-python ../torch/bin/python

Feature files are drawn once into a folder: so many slides, as many tiles as a
log-normal draw says. Ours trains as the `slides` job does, from the files to
the step. Torch's loop is what one writes: a DataLoader that opens the slide's
HDF5 file, the same network, cross-entropy, the same optimiser, one slide a
step; once so, and once with all features as tensors in memory, which a careful
user would have. The sides take turns, round after round, so that whatever else
the machine does falls on all of them; a ratio is the median over rounds of the
ratio within a round. Torch runs in a process of its own. Memory is the largest
that each process had.

With --longest one bag of that many tiles is trained and evaluated, for the
memory it takes.
"""

import argparse
import csv
import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

OURS, LOADER, MEMORY = "jaxtransfer", "torch DataLoader", "torch in memory"


class Ours:
  """The `slides` job's own training, without its loop's checkpoints."""

  def __init__(self, folder: pathlib.Path, flags: argparse.Namespace):
    import runpy

    import jax

    from jaxtransfer import configuration, parallel, pooled
    from jaxtransfer.data import dataset

    parallel.use_processors(1)
    path = configuration.packaged()["slides"]
    config = runpy.run_path(str(path))["get_config"](flags.preset)
    config.data.source = str(folder / "labels.csv")
    config.data.features = str(folder / "features")
    config.folds = 0
    config.data.split_fractions = (0.8, 0.1, 0.1)
    config.epochs = 10_000
    # Of long bags nothing is kept, so that all memory is that of a step.
    config.data.cache = 0.0 if flags.longest else 4.0
    devices = parallel.Devices("jit", parallel.sharing(config.batch_size))
    divisions = dataset.open_divisions(config, folder / "no" / "splits.json")
    name = config.pooling.name
    bench = pooled.Bench(config, (name,), devices, divisions, folder / "no")
    bench.check_features()
    self.task = bench.training(bench.units[0])
    data = divisions[0]
    self.names = [data.examples.names[row] for row in data.rows["train"]]
    self.batch_size = config.batch_size
    self.device = jax.devices()[0].device_kind
    self.state = devices.replicate(self.task.first_state())
    self.batches = None

  def train(self, seconds: float, least: int = 0) -> dict[str, float]:
    """Trains for so long; returns bags a second, on the clock and of CPU."""
    import jax

    from jaxtransfer.data import pipeline

    if self.batches is None:
      self.batches = pipeline.prefetch(self.task.batches, self.task.put)
    step, running = self.task.step(1), []

    def go() -> int:
      self.state, metrics = step(self.state, next(self.batches))
      running.append(metrics["loss"])
      if len(running) > 2:
        running.pop(0).block_until_ready()
      return self.batch_size

    def wait() -> None:
      jax.block_until_ready(self.state.step)

    return timed(go, wait, seconds, least)

  def evaluate(self) -> None:
    """Reads every test slide, attention and all."""
    numbers = (self.state.params, self.state.statistics)
    for _ in self.task.read(numbers, "test"):
      pass


class Torch:
  """The plain loop, in the process that `serve` runs."""

  def __init__(self, folder: str, preset: str, rows: list[str]):
    import torch

    self.gpu = torch.cuda.is_available()
    self.device = "cuda" if self.gpu else "cpu"
    root = pathlib.Path(folder)
    with open(root / "labels.csv", newline="") as f:
      labels = {row["slide"]: row["label"] for row in csv.DictReader(f)}
    slides = [(root / "features" / f"{n}.h5", int(labels[n])) for n in rows]
    settings = NETWORKS[preset]
    self.loaders = {
      LOADER: torch.utils.data.DataLoader(
        Files(slides),
        batch_size=1,
        shuffle=True,
        num_workers=settings["workers"],
        persistent_workers=settings["workers"] > 0,
      ),
      MEMORY: torch.utils.data.DataLoader(
        list(map(Files(slides).__getitem__, range(len(slides)))),
        batch_size=1,
        shuffle=True,
      ),
    }
    width = self.loaders[MEMORY].dataset[0][0].shape[1]
    self.network = make_network(width, settings).to(self.device)
    self.optimiser = torch.optim.Adam(
      self.network.parameters(), settings["rate"]
    )

  def train(self, side: str, seconds: float) -> dict[str, float]:
    import torch

    loader = self.loaders[side]
    batches = iter(loader)

    def go() -> int:
      nonlocal batches
      batch = next(batches, None)
      if batch is None:
        batches = iter(loader)
        batch = next(batches)
      features, label = (x.to(self.device, non_blocking=True) for x in batch)
      logits = self.network(features[0].float())
      loss = torch.nn.functional.cross_entropy(logits[None], label)
      self.optimiser.zero_grad()
      loss.backward()
      self.optimiser.step()
      # As such loops do, for the mean that they print.
      loss.item()
      return 1

    return timed(go, lambda: None, seconds)

  def memory(self) -> float:
    return peak()


# As configs/slides.py has them.
NETWORKS = {
  "histotransfer": {
    "embedding": (256, 64),
    "attention": 32,
    "gated": False,
    "dropout": 0.0,
    "rate": 1e-3,
    "workers": 2,
  },
  "clam": {
    "embedding": (512,),
    "attention": 256,
    "gated": True,
    "dropout": 0.25,
    "rate": 2e-4,
    "workers": 2,
  },
}


class Files:
  """A dataset of HDF5 files, opened when asked for."""

  def __init__(self, slides: list[tuple[pathlib.Path, int]]):
    self.slides = slides

  def __len__(self) -> int:
    return len(self.slides)

  def __getitem__(self, index: int) -> tuple:
    import h5py
    import torch

    path, label = self.slides[index]
    with h5py.File(path) as f:
      return torch.from_numpy(f["features"][:]), label


def make_network(width: int, settings: dict) -> object:
  import torch
  from torch import nn

  class Attention(nn.Module):
    def __init__(self):
      super().__init__()
      layers, before = [], width
      for after in settings["embedding"]:
        layers += [nn.Linear(before, after), nn.ReLU()]
        layers += [nn.Dropout(settings["dropout"])]
        before = after
      self.embedding = nn.Sequential(*layers)
      self.tanh = nn.Linear(before, settings["attention"])
      self.gate = nn.Linear(before, settings["attention"])
      self.score = nn.Linear(settings["attention"], 1)
      self.dropout = nn.Dropout(settings["dropout"])
      self.head = nn.Linear(before, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
      h = self.embedding(features)
      a = self.dropout(torch.tanh(self.tanh(h)))
      if settings["gated"]:
        a = a * self.dropout(torch.sigmoid(self.gate(h)))
      weights = torch.softmax(self.score(a), 0)
      return self.head((weights * h).sum(0))

  return Attention()


def timed(
  go: object, wait: object, seconds: float, least: int = 0
) -> dict[str, float]:
  """Bags a second, on the clock and of the processor time of this process."""
  # The first call does not count: it may compile.
  go()
  wait()
  wall, cpu, bags = time.perf_counter(), time.process_time(), 0
  while time.perf_counter() - wall < seconds or bags < least:
    bags += go()
  wait()
  return {
    "wall": bags / (time.perf_counter() - wall),
    "cpu": bags / (time.process_time() - cpu),
  }


def peak() -> float:
  """Bytes of the largest memory that this process had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Server:
  """`Torch` in another process: one line of JSON asked, one answered."""

  def __init__(self, python: str, *arguments: object):
    settings = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    self.process = subprocess.Popen(
      [python, __file__, "--serve"],
      env=settings,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.ask(*arguments)

  def ask(self, *request: object) -> object:
    self.process.stdin.write(json.dumps(request) + "\n")
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"torch ended with exit code {self.process.wait()}")
    return json.loads(line)


def serve() -> None:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  side = None
  for line in sys.stdin:
    request = json.loads(line)
    answer = None
    if side is None:
      side = Torch(*request)
    else:
      method, *arguments = request
      answer = getattr(side, method)(*arguments)
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def draw(folder: pathlib.Path, flags: argparse.Namespace) -> None:
  """Writes features of slides that have a lesion, and of slides that have not.

  In TRIDENT's layout, whose chunks are single rows; with --contiguous as h5py
  writes an array.
  """
  import h5py
  import numpy as np

  from jaxtransfer import files

  rng = np.random.default_rng(0)
  tiles = np.exp(rng.normal(np.log(flags.tiles), 0.5, flags.slides))
  tiles = np.maximum(tiles.astype(int), 8)
  if flags.longest:
    tiles[:] = flags.longest
  rows = []
  (folder / "features").mkdir()
  for i, count in enumerate(tiles):
    path = folder / "features" / f"{i:04d}.h5"
    rows.append((path.stem, i % 2))
    if flags.longest and i:
      # For memory alone: all are the same.
      os.link(folder / "features" / "0000.h5", path)
      continue
    features = rng.normal(size=(count, flags.channels)).astype(flags.dtype)
    if i % 2:
      features[: max(1, count // 30), :8] += 2
    with h5py.File(path, "w") as f:
      chunks = None if flags.contiguous else (1, flags.channels)
      f.create_dataset("features", data=features, chunks=chunks)
  files.write_csv(folder / "labels.csv", ("slide", "label"), rows)
  print(
    f"{flags.slides} slides of {tiles.min():,} to {tiles.max():,} tiles, median"
    f" {int(np.median(tiles)):,}, {flags.channels} features, {flags.dtype}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--preset", default="histotransfer", choices=NETWORKS)
  parser.add_argument("--slides", type=int, default=80)
  parser.add_argument("--tiles", type=int, default=1000, help="median")
  parser.add_argument("--channels", type=int, default=512)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--contiguous", action="store_true")
  parser.add_argument("--longest", type=int, default=0)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=4, help="of one turn")
  parser.add_argument("--torch-python", help="an interpreter that has torch")
  parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.serve:
    return serve()

  from jaxtransfer import hosts

  # As the launcher does.
  hosts.use_huge_pages()
  with tempfile.TemporaryDirectory() as folder:
    compare(pathlib.Path(folder), flags)


def compare(folder: pathlib.Path, flags: argparse.Namespace) -> None:
  drawing = multiprocessing.get_context("spawn").Process(
    target=draw, args=(folder, flags)
  )
  drawing.start()
  drawing.join()
  ours = Ours(folder, flags)
  features = peak()
  if flags.longest:
    ours.train(flags.seconds)
    print(
      f"memory {peak() / 1e9:.2f} GB at most, {features / 1e9:.2f} GB of it"
      " before the first step"
    )
    ours.evaluate()
    print(f"and with all test slides read, {peak() / 1e9:.2f} GB")
    return
  server = None
  if flags.torch_python:
    server = Server(flags.torch_python, str(folder), flags.preset, ours.names)
  # A whole epoch, so that every length of bags is compiled.
  ours.train(0.0, len(ours.names))
  found: dict[str, list[dict[str, float]]] = {}
  for _ in range(flags.rounds):
    found.setdefault(OURS, []).append(ours.train(flags.seconds))
    for side in (LOADER, MEMORY) if server else ():
      found.setdefault(side, []).append(
        server.ask("train", side, flags.seconds)
      )
  print(
    f"{ours.device}, {len(os.sched_getaffinity(0))} cores; {flags.preset},"
    f" {flags.rounds} rounds of {flags.seconds:g} s\n"
  )
  print("| | bags/s: least | median | most | ours is | bags per CPU s | ours |")
  print("|---|--:|--:|--:|--:|--:|--:|")
  for side, rounds in found.items():
    rates = sorted(of["wall"] for of in rounds)
    ratios = [
      statistics.median(
        mine[clock] / of[clock]
        for mine, of in zip(found[OURS], rounds, strict=True)
      )
      for clock in ("wall", "cpu")
    ]
    middle = statistics.median(of["cpu"] for of in rounds)
    print(
      f"| {side} | {rates[0]:.1f} | {statistics.median(rates):.1f} |"
      f" {rates[-1]:.1f} | {ratios[0]:.2f} | {middle:.1f} | {ratios[1]:.2f} |"
    )
  memory = f"{peak() / 1e9:.2f} GB"
  if server:
    memory += f", torch {server.ask('memory') / 1e9:.2f} GB"
  print(f"\nmemory at most: {memory}")


if __name__ == "__main__":
  main()
