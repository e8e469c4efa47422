"""The wheel: what is in it, and that it runs where there is no clone."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.jobs import configs

ROOT = configs.ROOT


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_folder(tmp_path):
  """Built from a copy without its history and unpacked where nothing else of
  ours is found: configs and weights are in it, every module of the clone is,
  and its program answers, runs the quickstart and is finished."""
  pytest.importorskip("setuptools", minversion="77")
  source = tmp_path / "source"
  source.mkdir()
  for name in ("jaxtransfer", "configs"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source / name)
  build = "from setuptools import build_meta; build_meta.build_wheel('.')"
  subprocess.run(
    [sys.executable, "-c", build], cwd=source, check=True, capture_output=True
  )
  (wheel,) = source.glob("*.whl")
  installed = tmp_path / "installed"
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(installed)
  there = {str(p.relative_to(installed)) for p in installed.rglob("*.*")}
  for path in (ROOT / "jaxtransfer").rglob("*.py"):
    assert str(path.relative_to(ROOT)) in there
  for path in (ROOT / "configs").glob("*.py"):
    assert f"jaxtransfer/configs/{path.name}" in there
  for path in (ROOT / "jaxtransfer" / "assets").iterdir():
    assert f"jaxtransfer/assets/{path.name}" in there
  assert {name.split("/")[0].split("-")[0] for name in there} == {"jaxtransfer"}

  empty = tmp_path / "empty"
  empty.mkdir()

  def run(*arguments):
    done = subprocess.run(
      [sys.executable, "-P", "-m", "jaxtransfer", *arguments],
      cwd=empty,
      env={**os.environ, "PYTHONPATH": str(installed)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  assert "quickstart" in run("--help") and "resnet50" in run("models")
  small = [
    "--config.data=synthetic:tissue?patients=10&tiles_per_patient=4",
    "--config.data.image_size=32",
    "--config.taps=layer1",
    "--config.probes=nearest_mean",
    "--config.seeds=1",
    "--config.resamples=20",
  ]
  run("--config=quickstart", "--workdir=q", *small)
  assert (empty / "q" / "report.html").exists()
  assert "is finished" in run("--config=quickstart", "--workdir=q", *small)
  assert "--config=quickstart" in (empty / "q" / "report.html").read_text()
