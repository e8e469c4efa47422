"""Tiles per second from slides to feature files, beside a plain torch loop.

    python -m benchmarks.extract --torch-python ../torch/bin/python
    python -m benchmarks.extract --slides=DIR --networks=resnet50:layer3

The other side is what one would write with torch: for every slide a Dataset
that cuts tiles out with OpenSlide (`get_best_level_for_downsample`,
`read_region`, Pillow's resize where the level is not the resolution asked for),
a DataLoader with worker processes, the same torchvision network cut at the same
place, features appended to an HDF5 file. Slides and coordinates are the same;
so are weights, random ones. Both sides are read alone, too.

Sides take turns, round after round, each in a process of its own with its
programs compiled before; a ratio is the median over rounds of the ratio within
a round. Times are from the first slide to the last file, on the clock and in
processor seconds; memory is the largest sum over the processes of a side,
shared pages counted once.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

OURS, TORCH = "jaxtransfer", "torch"


def clock() -> list[float]:
  """Seconds on the clock, and of all processors for this and its children."""
  return [time.perf_counter(), sum(os.times()[:4])]


def since(started: list[float]) -> list[float]:
  return [now - then for now, then in zip(clock(), started, strict=True)]


# --- ours --------------------------------------------------------------------


def ours(settings: dict) -> dict:
  """Reads all tiles, then encodes them into files; returns seconds of each."""
  import ml_collections

  from jaxtransfer import parallel
  from jaxtransfer.data import pipeline, tile_reading, tiles
  from jaxtransfer.extraction import encoders, passes, store

  parallel.cache_programs()
  parallel.use_processors(settings["batch"])
  config = ml_collections.ConfigDict(
    {
      "source": settings["slides"],
      "task": "",
      "image_size": 0,
      "max_pixels": 10**8,
    }
  )
  of = tiles.open_tiles(config, settings["coords"])
  started = clock()
  with pipeline.Readers(of.reader, settings["workers"]) as readers:
    for bag in of.bags:
      places = bag.open()
      pieces = [
        readers.submit(bag.piece(places, some))
        for some in tile_reading.pieces(places.order)
      ]
      for piece in pieces:
        assert not any(piece.result().reasons)
  read = since(started)

  name, _, until = settings["network"].partition(":")
  networks = encoders.open_encoders(name, "end", until=until)
  devices = parallel.Devices()
  options = store.Settings(settings["batch"], settings["workers"])

  def extract(directory: str) -> list[float]:
    extraction = passes.Extraction(
      of, networks, devices, options, pathlib.Path(directory)
    )
    extraction.store.look()
    batch = next(extraction.sample())
    extraction.compute()(batch)
    started = clock()
    extraction.run()
    seconds = since(started)
    assert not any(record["reason"] for record in extraction.store.results())
    return seconds

  with tempfile.TemporaryDirectory() as directory:
    seconds = extract(directory)
  return {"tiles": of.count, "read": read, "encode": seconds}


# --- torch's -----------------------------------------------------------------


def torchs(settings: dict) -> dict:
  """The same, with torch."""
  import h5py
  import numpy as np
  import openslide
  import torch
  from PIL import Image

  if not torch.cuda.is_available():
    # torchvision's wheel for CUDA, beside a CPU build of torch, lacks only
    # these declarations; no network here calls them.
    library = torch.library.Library("torchvision", "DEF")
    boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    library.define(f"nms{boxes}")
    library.define(f"qnms{boxes}")
  import torchvision

  class Tiles(torch.utils.data.Dataset):
    """The tiles of one slide; every worker opens it anew."""

    def __init__(self, path: str, coords: str):
      self.path, self.slide = path, None
      with h5py.File(coords) as f:
        said = f["coords"].attrs
        self.corners = f["coords"][:]
        self.size = int(said["patch_size"])
        self.extent = self.size * said["mpp"] / said["level0_mpp"]
      self.transform = torchvision.transforms.Compose(
        [
          torchvision.transforms.ToTensor(),
          torchvision.transforms.Normalize(
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
          ),
        ]
      )

    def __len__(self):
      return len(self.corners)

    def __getitem__(self, i):
      if self.slide is None:
        self.slide = openslide.OpenSlide(self.path)
        downsample = self.extent / self.size
        self.level = self.slide.get_best_level_for_downsample(downsample * 1.01)
        scale = self.slide.level_downsamples[self.level]
        self.pixels = round(self.extent / scale)
      tile = self.slide.read_region(
        tuple(map(int, self.corners[i])), self.level, (self.pixels,) * 2
      ).convert("RGB")
      if self.pixels != self.size:
        tile = tile.resize((self.size,) * 2, Image.Resampling.BILINEAR)
      return self.transform(tile), self.corners[i]

  def loader(name: str) -> torch.utils.data.DataLoader:
    (path,) = pathlib.Path(settings["slides"]).rglob(f"{name}.*")
    coords = pathlib.Path(settings["coords"]) / f"{name}.h5"
    return torch.utils.data.DataLoader(
      Tiles(str(path), str(coords)),
      batch_size=settings["batch"],
      num_workers=settings["workers"],
    )

  names = sorted(p.stem for p in pathlib.Path(settings["coords"]).glob("*.h5"))
  started = clock()
  count = sum(len(batch) for name in names for batch, _ in loader(name))
  read = since(started)

  name, _, until = settings["network"].partition(":")
  whole = torchvision.models.get_model(name, weights=None).eval()
  layers = {k: v for k, v in whole.named_children() if k != "fc"}
  kept = list(layers)[: list(layers).index(until) + 1 if until else None]
  pool = torch.nn.AdaptiveAvgPool2d(1)
  network = torch.nn.Sequential(
    *(layers[k] for k in kept if k != "avgpool"), pool, torch.nn.Flatten()
  ).to(memory_format=torch.channels_last)
  where = "cuda" if torch.cuda.is_available() else "cpu"
  network = network.to(where)
  started = clock()
  with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
    for slide in names:
      with h5py.File(f"{directory}/{slide}.h5", "w") as f:
        for images, corners in loader(slide):
          images = images.to(where, memory_format=torch.channels_last)
          features = network(images).cpu().numpy().astype(np.float16)
          for key, rows in (
            ("features", features),
            ("coords", np.asarray(corners)),
          ):
            if key not in f:
              f.create_dataset(
                key,
                data=rows,
                maxshape=(None, *rows.shape[1:]),
                chunks=(1, *rows.shape[1:]),
              )
            else:
              f[key].resize(len(f[key]) + len(rows), axis=0)
              f[key][-len(rows) :] = rows
  return {
    "tiles": count,
    "read": read,
    "encode": since(started),
  }


# --- turns -------------------------------------------------------------------


class Memory(threading.Thread):
  """Watches how much a process and those it started take together.

  Attributes:
    most: bytes, shared pages counted once.
  """

  def __init__(self, process: int):
    super().__init__(daemon=True)
    self.process, self.most, self.over = process, 0, threading.Event()

  def run(self) -> None:
    while not self.over.wait(0.1):
      self.most = max(self.most, sum(map(_bytes, _tree(self.process))))


def _tree(process: int) -> list[int]:
  found = [process]
  for task in pathlib.Path(f"/proc/{process}/task").glob("*/children"):
    try:
      for child in task.read_text().split():
        found += _tree(int(child))
    except OSError:
      continue
  return found


def _bytes(process: int) -> int:
  try:
    text = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text()
  except OSError:
    return 0
  lines = (line.split() for line in text.splitlines())
  return sum(int(line[1]) * 1024 for line in lines if line[0] == "Pss:")


def take(side: str, python: str, settings: dict) -> dict:
  """Runs one side in a process of its own."""
  environment = dict(os.environ)
  if side == TORCH:
    # As a user starts it: huge pages are ours, and it gains nothing by them.
    environment.pop("GLIBC_TUNABLES", None)
  process = subprocess.Popen(
    [python, __file__, f"--side={side}", f"--settings={json.dumps(settings)}"],
    env=environment | {"PYTHONPATH": os.getcwd()},
    stdout=subprocess.PIPE,
    text=True,
  )
  memory = Memory(process.pid)
  memory.start()
  out, _ = process.communicate()
  memory.over.set()
  memory.join()
  if process.returncode:
    sys.exit(f"{side} ended with exit code {process.returncode}")
  return {**json.loads(out.splitlines()[-1]), "memory": memory.most}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--torch-python", default=sys.executable)
  parser.add_argument("--slides", default="", help="a folder; else drawn ones")
  parser.add_argument("--networks", default="resnet18,resnet50:layer3")
  parser.add_argument("--mpp", type=float, default=0.5)
  parser.add_argument("--tile", type=int, default=256)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--workers", type=int, default=0, help="of ours")
  parser.add_argument("--torch-workers", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--side", choices=(OURS, TORCH))
  parser.add_argument("--settings", type=json.loads)
  given = parser.parse_args()
  if given.side:
    found = {OURS: ours, TORCH: torchs}[given.side](given.settings)
    print(json.dumps(found))
    return
  # As the launcher does for ours.
  os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
  root = pathlib.Path(tempfile.mkdtemp())
  slides = given.slides or str(draw(root))
  command = [sys.executable, "-m", "jaxtransfer.main", "--config=tile"]
  subprocess.run(
    [
      *command,
      f"--workdir={root / 'tiles'}",
      f"--config.data={slides}",
      f"--config.mpp={given.mpp}",
      f"--config.tile={given.tile}",
    ],
    stdout=subprocess.DEVNULL,
  )
  settings = {
    "slides": slides,
    "coords": str(root / "tiles" / "coords"),
    "batch": given.batch,
  }
  for network in given.networks.split(","):
    sides = {
      OURS: (sys.executable, {"workers": given.workers}),
      TORCH: (given.torch_python, {"workers": given.torch_workers}),
    }
    rounds = []
    for number in range(-1, given.rounds):
      # The first only compiles, and brings the slides into memory.
      found = {
        side: take(side, python, {**settings, **own, "network": network})
        for side, (python, own) in sides.items()
      }
      if number >= 0:
        rounds.append(found)
    tell(network, rounds)
  shutil.rmtree(root)


def draw(root: pathlib.Path) -> pathlib.Path:
  """Draws slides; returns their folder."""
  from jaxtransfer.data import synthetic_slides

  synthetic_slides.write_slides(
    root / "drawn", slides=4, patients=2, sites=1, size=4096
  )
  return root / "drawn" / "slides"


def tell(network: str, rounds: list[dict]) -> None:
  tiles = rounds[0][OURS]["tiles"]
  print(f"\n{network}: {tiles:,} tiles, {len(rounds)} rounds")
  for what in ("read", "encode"):
    for kind, unit in enumerate(("second", "processor second")):
      speeds = {
        side: [one[side]["tiles"] / one[side][what][kind] for one in rounds]
        for side in (OURS, TORCH)
      }
      pairs = zip(speeds[OURS], speeds[TORCH], strict=True)
      ratio = statistics.median(a / b for a, b in pairs)
      for side, values in speeds.items():
        low, most = min(values), max(values)
        print(
          f"  {what:<7}{side:<12} tiles a {unit}: {low:.1f},"
          f" {statistics.median(values):.1f}, {most:.1f}"
        )
      print(f"  {what:<7}ours is {ratio:.2f}")
  for side in (OURS, TORCH):
    most = max(one[side]["memory"] for one in rounds)
    print(f"  memory {side:<12} {most / 2**20:,.0f} MiB")


if __name__ == "__main__":
  main()
