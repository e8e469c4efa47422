"""Every command of the README does what it says there."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.data import slide_files
from tests.jobs import configs

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Makes a run of each job small, without touching what the README says.
SMALL = {
  "layers": (
    "--config.data.image_size=32",
    "--config.network.weights=weights.safetensors",
    "--config.network.until=layer1",
    "--config.seeds=1",
    "--config.cost_batch_size=8",
  ),
  "finetune": (
    "--config.data.image_size=32",
    "--config.network.weights=weights.safetensors",
    "--config.network.until=layer1",
    "--config.epochs=1",
  ),
  "truncate": (
    "--config.data.image_size=32",
    "--config.network.weights=",
    "--config.taps=stem",
    "--config.layer_step=0",
    "--config.methods=ttl",
    "--config.small=",
    "--config.seeds=1",
    "--config.epochs=1",
    "--config.cost_batch_size=8",
  ),
  "predict": (),
  "tile": ("--config.tile=32", "--config.tissue.min_area=0"),
  "extract": ("--config.network.weights=", "--config.network.until=stem"),
  "slides": ("--config.folds=3", "--config.epochs=1"),
}
# Keys that not every job has.
ALL_SMALL = {"resamples": 20, "batch_size": 8}
# What only some jobs leave.
OF_JOBS = {
  # Of images without labels there is nothing to draw.
  "figures": ("layers", "finetune", "truncate"),
  "features": ("layers", "extract"),
  "checkpoints": ("finetune",),
  "units": ("truncate", "tile", "extract", "slides"),
  "export": ("finetune", "truncate", "slides"),
  "predictions.csv": ("layers", "finetune", "truncate", "slides", "predict"),
  "attention": ("slides",),
  "metrics.jsonl": ("layers", "finetune"),
  "splits.json": ("layers", "finetune", "truncate", "slides"),
  "duplicates.json": ("layers", "finetune", "truncate"),
}


def _blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _commands() -> list[str]:
  lines = [line for block in _blocks("bash") for line in block.splitlines()]
  return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A directory as a user's: a manifest and small tiles, and new ones.

  What one command leaves there the next ones use, as the README says.
  """
  from jaxtransfer.networks import tensors, zoo  # noqa: PLC0415
  from jaxtransfer.weights import loading  # noqa: PLC0415

  tmp_path = tmp_path_factory.mktemp("user")
  rng = np.random.default_rng(0)
  rows = ["path,label,group"]
  for i in range(24):
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    rows.append(f"{i}.png,{'ab'[i % 2]},patient {i // 2}")
  (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
  (tmp_path / "new_tiles").mkdir()
  PIL.Image.fromarray(pixels).save(tmp_path / "new_tiles" / "new.png")
  for name, count in (("slides", 12), ("new_slides", 2)):
    (tmp_path / name).mkdir()
    rows = ["path,label,group"]
    for i in range(count):
      pixels = np.full((128, 128, 3), 245, np.uint8)
      pixels[16:112, 16:112] = rng.integers(90, 240, (96, 96, 3)) * (1, 0.5, 1)
      path = tmp_path / name / f"{name}{i}.tiff"
      slide_files.write_pyramid(path, [pixels], 0.5)
      rows.append(f"{name}/{path.name},{'ab'[i % 2]},patient {i}")
    if name == "slides":
      (tmp_path / "slides.csv").write_text("\n".join(rows) + "\n")
  network = zoo.build("resnet50", until="layer1")
  tensors.load(network, tensors.random(network, 1))
  loading.export(network, tmp_path / "weights.safetensors")
  return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
  "command", [c for c in _commands() if c.startswith("jaxtransfer")]
)
def test_a_job_runs_as_the_readme_starts_it(command, folder):
  """The same words; only what makes it small is added."""
  _, *arguments = shlex.split(command)
  job = re.search(r"--config=(\w+)", command)[1]
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "jaxtransfer.main",
      *arguments,
      *SMALL[job],
      *(
        f"--config.{key}={value}"
        for key, value in ALL_SMALL.items()
        if key in configs.load(job)
      ),
    ],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  workdir = re.search(r"--workdir=(\S+)", command)[1]
  assert (folder / workdir / "report.html").exists()
  rows = re.findall(r"^\| (`[^|]*`) \|", README.split("## What a run")[1], re.M)
  for name in re.findall(r"`([\w.]+)/?`", " ".join(rows)):
    if name != "failures.csv" and job in OF_JOBS.get(name, SMALL):
      assert (folder / workdir / name).exists(), name


@pytest.mark.slow
def test_the_quickstart_ends_with_a_gain_above_zero(tmp_path):
  """What `make quickstart` runs, on fewer tiles of the same drawing."""
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "jaxtransfer.main",
      f"--config={ROOT / 'configs' / 'quickstart.py'}",
      f"--workdir={tmp_path}",
      "--config.data=synthetic:tissue?patients=40&tiles_per_patient=12",
      "--config.data.image_size=64",
      "--config.taps=layer2.0,layer3",
      "--config.seeds=2",
      "--config.probes=logistic",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "results.json").read_text())
  gains = [
    row["low"]
    for row in results["measurements"]
    if row["metric"] == "auroc:gain"
  ]
  assert max(gains) > 0
  assert results["summary"]["weights"] == "cifar10-resnet18"


@pytest.mark.slow
@pytest.mark.parametrize("code", _blocks("python"))
def test_the_python_of_the_readme_runs(code):
  """Shapes stand in its comments; they are checked here."""
  names = {}
  exec(compile(code, "README.md", "exec"), names)  # noqa: S102
  assert names["features"].shape == (4, 256)
  assert names["maps"]["layer2.0"].shape == (4, 12, 12, 128)
  assert names["logits"].shape == (4, 5)


def test_make_has_the_targets_that_the_readme_names():
  """Both are run by continuous integration, from a fresh clone."""
  makefile = (ROOT / "Makefile").read_text()
  for command in _commands():
    if command.startswith("make "):
      assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command


def test_every_link_leads_somewhere():
  for target in re.findall(r"\]\(([^)#]+)\)", README):
    if not target.startswith("http"):
      assert (ROOT / target).exists(), target
