"""Slides become tiles: what is left, what is told, and who does which slide."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from PIL import Image

from jaxtransfer import errors, workdir
from jaxtransfer.data import feature_files, slides
from jaxtransfer.jobs import tile
from tests import typed
from tests.data import slide_files
from tests.jobs import configs

ROOT = configs.ROOT


def _tissue(width, height, *boxes, seed=0):
  """A slide of white with stained boxes, left, top, right, bottom."""
  rng = np.random.default_rng(seed)
  pixels = np.full((height, width, 3), 243, np.int16)
  for left, top, right, bottom in boxes:
    pixels[top:bottom, left:right] = (200, 120, 180)
  pixels += rng.integers(-12, 13, (height, width, 1), np.int16)
  return np.clip(pixels, 0, 255).astype(np.uint8)


def _write(path, pixels, mpp=0.5, **options):
  return slide_files.write_pyramid(
    path, [pixels, pixels[::2, ::2], pixels[::4, ::4]], mpp, 256, **options
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Slides of every kind, three of which can be used."""
  root = tmp_path_factory.mktemp("slides")
  large = _tissue(1600, 1200, (0, 0, 640, 1200), (1000, 300, 1500, 900))
  _write(root / "large.tiff", large)
  _write(root / "fine.tiff", _tissue(1200, 1000, (100, 100, 900, 900)), 0.25)
  _write(root / "white.tiff", _tissue(600, 600))
  _write(root / "no_mpp.tiff", _tissue(600, 600, (0, 0, 600, 600)), None)
  (root / "text.svs").write_text("no slide\n")
  path = _write(root / "cut_short.tiff", large, compression="jpeg")
  path.write_bytes(path.read_bytes()[:40_000])
  return root


def _config(folder, **changes):
  config = configs.load("tile")
  config.update_from_flattened_dict(
    {"tile": 128, "data.source": str(folder), "data.workers": 2, **changes}
  )
  return config


def _run(config, path, dry=False):
  if dry:
    return tile.run(config, workdir.look(path, config.to_dict(), True))
  with workdir.claim(
    path, config.to_dict(), "the command", shared=True
  ) as claimed:
    return tile.run(config, claimed)


def _table(path):
  with open(path / "slides.csv", newline="", encoding="utf-8") as f:
    return {row["name"]: row for row in csv.DictReader(f)}


def _bytes(path):
  """Returns what a run left of its slides."""
  folders = ("coords", "overlays", "tissue", "tiles")
  found = [file for name in folders for file in (path / name).rglob("*.*")]
  # Of a process that was killed a part may be left, which nobody reads.
  return {
    file.relative_to(path): file.read_bytes()
    for file in found
    if file.is_file() and not file.name.startswith(".")
  }


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "run"
  assert _run(_config(folder), path) == 1
  return path


def test_a_run_leaves_what_it_says(finished, folder):
  """A line for every slide, files for those that could be used, and why not
  of the others."""
  table = _table(finished)
  assert set(table) == {path.stem for path in folder.iterdir()}
  used = {"large", "fine", "white"}
  for name in ("coords", "overlays", "tissue"):
    assert {path.stem for path in (finished / name).iterdir()} == used
  assert table["large"]["width"] == "1600" and table["large"]["mpp"] == "0.5"
  assert table["large"]["levels"] == "1 2 4"
  assert float(table["fine"]["tissue_mm2"]) == pytest.approx(0.04, rel=0.1)
  assert table["white"]["tiles"] == "0"
  assert table["white"]["problem"] == "no tissue"
  assert "config.default_mpp" in table["no_mpp"]["problem"]
  with open(finished / "failures.csv", newline="") as f:
    failures = {row["name"]: row["reason"] for row in csv.DictReader(f)}
  assert set(failures) == set(table) - used
  assert "text file" in failures["text"]
  left = typed.check_results(
    json.loads((finished / "results.json").read_text())
  )
  assert len(left["summary"]["broken"]) == 3
  assert "3 of 6 slides" in left["summary"]["sentence"]
  page = (finished / "report.html").read_text()
  assert page.count("data:image/jpeg") == 3 and "left out" in page
  assert configs.check_json(finished) > 6


def test_coordinates_are_read_as_trident_and_clam_read_them(finished):
  """By h5py alone, in the words of their loaders."""
  with h5py.File(finished / "coords" / "large.h5") as f:
    coords = f["coords"][:]
    attributes = dict(f["coords"].attrs)
  assert coords.dtype == np.int64 and coords.shape[1] == 2
  assert attributes["patch_size"] == 128
  assert attributes["patch_size_level0"] == 128
  assert attributes["overlap"] == 0
  assert attributes["name"] == "large"
  assert (attributes["level0_width"], attributes["level0_height"]) == (
    1600,
    1200,
  )
  fine = feature_files.read_coords(finished / "coords" / "fine.h5")
  assert (fine.extent, fine.tile, fine.mpp) == (256, 128, 0.5)
  with h5py.File(finished / "coords" / "white.h5") as f:
    assert f["coords"].shape == (0, 2)


def test_tiles_lie_on_the_tissue_that_was_drawn(finished):
  """Five columns of the left piece, all rows that fit, and the right piece."""
  coords = feature_files.read_coords(finished / "coords" / "large.h5").coords
  left = {(x, y) for x, y in coords.tolist() if x < 640}
  assert left == {(128 * i, 128 * j) for i in range(5) for j in range(9)}
  right = coords[coords[:, 0] >= 640]
  # A quarter of a tile, but for a pixel of the mask.
  assert len(right) and (right[:, 0] >= 1000 - 128 * 0.75 - 16).all()


def test_a_finished_run_does_nothing_until_there_is_something(
  finished, folder, tmp_path, capsys
):
  """What failed is tried again, what is new is done, what has changed is
  refused, and what was lost is made again: byte by byte what it was."""
  before = _bytes(finished)
  config = _config(tmp_path / "slides")
  run = tmp_path / "run"
  (tmp_path / "slides").mkdir()
  os.link(folder / "large.tiff", tmp_path / "slides" / "large.tiff")
  os.link(folder / "text.svs", tmp_path / "slides" / "fine.tiff")
  assert _run(config, run) == 1
  (tmp_path / "slides" / "fine.tiff").unlink()
  os.link(folder / "fine.tiff", tmp_path / "slides" / "fine.tiff")
  os.link(folder / "white.tiff", tmp_path / "slides" / "white.tiff")
  assert _run(config, run) == 0
  assert _bytes(run) == before
  capsys.readouterr()
  assert _run(config, run) == 0
  assert "is finished" in capsys.readouterr().out

  (run / "coords" / "large.h5").write_bytes(b"cut short")
  assert _run(config, run) == 0
  assert _bytes(run) == before
  _write(tmp_path / "slides" / "other.tiff", _tissue(600, 600))
  (tmp_path / "slides" / "other.tiff").replace(
    tmp_path / "slides" / "large.tiff"
  )
  with pytest.raises(errors.UsageError, match="changed since .*: large;"):
    _run(config, run)


def test_tissue_is_edited_and_given_back(finished, folder, tmp_path):
  """As QuPath would: a region cut down, by hand, in the file of the first."""
  masks = tmp_path / "masks"
  masks.mkdir()
  value = json.loads((finished / "tissue" / "large.geojson").read_text())
  assert len(value["features"]) == 2
  ring = [[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]
  value["features"][0]["geometry"]["coordinates"] = [ring]
  del value["features"][1]
  (masks / "large.geojson").write_text(json.dumps(value["features"]))
  source = tmp_path / "slides"
  source.mkdir()
  for name in ("large", "fine"):
    os.link(folder / f"{name}.tiff", source / f"{name}.tiff")
  config = _config(source, **{"data.masks": str(masks)})
  assert _run(config, tmp_path / "run") == 0
  coords = feature_files.read_coords(tmp_path / "run" / "coords" / "large.h5")
  assert coords.coords.tolist() == [[0, 0], [128, 0], [0, 128], [128, 128]]
  assert _table(tmp_path / "run")["fine"] | {"seconds": "", "path": ""} == (
    _table(finished)["fine"] | {"seconds": "", "path": ""}
  )
  (masks / "large.geojson").write_text("[]")
  run = tmp_path / "other"
  assert _run(config, run) == 1
  assert "mask" in _table(run)["large"]["problem"]


def test_tiles_are_saved_as_they_are_read(folder, tmp_path):
  """For the jobs that take folders of tiles; the same pixels but for JPEG."""
  source = tmp_path / "slides"
  source.mkdir()
  os.link(folder / "fine.tiff", source / "fine.tiff")
  assert _run(_config(source, save_tiles=True), tmp_path / "run") == 0
  tiles = tmp_path / "run" / "tiles" / "fine"
  coords = feature_files.read_coords(tmp_path / "run" / "coords" / "fine.h5")
  assert {path.name for path in tiles.iterdir()} == {
    f"{x}_{y}.jpg" for x, y in coords.coords.tolist()
  }
  with slides.open_slide(folder / "fine.tiff") as slide:
    for x, y in coords.coords[:3].tolist():
      wanted = slide.region(x, y, 256, 128).astype(float)
      found = np.asarray(Image.open(tiles / f"{x}_{y}.jpg"))
      assert np.abs(found - wanted).mean() < 4


def test_blurred_tiles_are_left_out(tmp_path):
  """The right half of the slide has no noise at all."""
  pixels = _tissue(1024, 512, (0, 0, 1024, 512))
  pixels[:, 512:] = (200, 120, 180)
  (tmp_path / "slides").mkdir()
  _write(tmp_path / "slides" / "a.tiff", pixels)
  config = _config(tmp_path / "slides", min_sharpness=20.0)
  assert _run(config, tmp_path / "run") == 0
  coords = feature_files.read_coords(tmp_path / "run" / "coords" / "a.h5")
  assert len(coords.coords) == 16 and coords.coords[:, 0].max() == 384
  assert _table(tmp_path / "run")["a"]["problem"] == (
    "16 tiles are blurred and left out"
  )
  assert not (tmp_path / "run" / "tiles").exists()


def test_tiles_that_cannot_be_read_are_counted_and_listed(tmp_path):
  """The slide made small is of another level, and shows nothing of it."""
  pixels = _tissue(1024, 1024, (0, 0, 1024, 1024))
  (tmp_path / "slides").mkdir()
  path = _write(tmp_path / "slides" / "a.tiff", pixels, compression="jpeg")
  with slides.open_slide(path) as slide:
    assert slide.backend == "openslide"
  import tifffile

  with tifffile.TiffFile(path) as file:
    offset = file.pages[0].dataoffsets[5]
  data = bytearray(path.read_bytes())
  data[offset : offset + 100] = bytes(100)
  path.write_bytes(data)
  config = _config(tmp_path / "slides", save_tiles=True)
  assert _run(config, tmp_path / "run") == 1
  row = _table(tmp_path / "run")["a"]
  assert row["tiles"] == "60" and "4 tiles cannot be read" in row["problem"]
  with open(tmp_path / "run" / "failures.csv", newline="") as f:
    names = [line["name"] for line in csv.DictReader(f)]
  assert names == [f"a/{x}_{y}.jpg" for y in (256, 384) for x in (256, 384)]
  assert len(list((tmp_path / "run" / "tiles" / "a").iterdir())) == 60


def test_resolution_may_be_given(folder, tmp_path):
  """For all that say none, or for one in a manifest; or as a magnification."""
  manifest = tmp_path / "m.csv"
  manifest.write_text(f"path,mpp\n{folder / 'no_mpp.tiff'},0.25\n")
  assert _run(_config(manifest), tmp_path / "manifest") == 0
  assert _table(tmp_path / "manifest")["no_mpp"]["mpp"] == "0.25"
  manifest.write_text(f"path\n{folder / 'no_mpp.tiff'}\n")
  config = _config(manifest, default_mpp=0.25, mag=40.0, tile=64)
  assert _run(config, tmp_path / "default") == 0
  coords = feature_files.read_coords(tmp_path / "default/coords/no_mpp.h5")
  assert (coords.mpp, coords.extent) == (0.25, 64)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"mag": 40.0, "mpp": 1.0}, "give one of them"),
    ({"mpp": 0.0}, "config.mpp"),
    ({"default_mpp": 352.8}, "config.default_mpp"),
    ({"overlap": 128}, "config.overlap"),
    ({"min_tissue": 1.5}, "config.min_tissue"),
    ({"tissue.threshold": 300}, "config.tissue.threshold"),
    ({"data.masks": "/no/such"}, "config.data.masks"),
    ({"data.source": "/no/such"}, "config.data.source"),
  ],
)
def test_a_mistake_is_told_before_any_work(folder, tmp_path, changes, says):
  with pytest.raises(errors.UsageError, match=says):
    _run(_config(folder, **changes), tmp_path / "run", dry=True)
  assert not (tmp_path / "run").exists()


def test_slides_none_of_which_can_be_used_are_an_error(folder, tmp_path):
  (tmp_path / "slides").mkdir()
  os.link(folder / "text.svs", tmp_path / "slides" / "text.svs")
  with pytest.raises(errors.RunError, match="none of 1 slides"):
    _run(_config(tmp_path / "slides"), tmp_path / "run")
  assert (tmp_path / "run" / "failures.csv").exists()
  assert not (tmp_path / "run" / "results.json").exists()


def test_a_dry_run_tells_and_writes_nothing(folder, tmp_path, capsys):
  config = _config(folder, save_tiles=True)
  assert _run(config, tmp_path / "run", dry=True) == 0
  told = capsys.readouterr().out
  assert "6 slides, of which 6 were tried" in told
  assert "text cannot be used" in told and "Nothing was written" in told
  assert not (tmp_path / "run").exists()


def _start(config, path):
  changes = {
    "tile": config.tile,
    "save_tiles": config.save_tiles,
    "data.workers": 1,
    "data.source": config.data.source,
  }
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "jaxtransfer.main"),
      *(f"--config={ROOT}/configs/tile.py", f"--workdir={path}"),
      *(f"--config.{key}={value}" for key, value in changes.items()),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    cwd=ROOT,
  )


@pytest.mark.slow
def test_processes_share_slides_and_one_may_be_killed(tmp_path):
  """Whatever moment it is: the files are those of one process alone."""
  (tmp_path / "slides").mkdir()
  for i in range(8):
    pixels = _tissue(1600, 1200, (0, 0, 900 + 60 * i, 1200), seed=i)
    _write(tmp_path / "slides" / f"s{i}.tiff", pixels)
  config = _config(tmp_path / "slides", save_tiles=True)
  assert _run(config, tmp_path / "alone") == 0
  rng = np.random.default_rng(0)
  for number in range(3):
    run = tmp_path / f"run{number}"
    processes = [_start(config, run) for _ in range(3)]
    until = time.monotonic() + 120
    while not (run / "units").exists() and time.monotonic() < until:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.5))
    processes[number % 3].send_signal(signal.SIGKILL)
    codes = [process.wait(240) for process in processes]
    assert sorted(codes)[-2:] == [0, 0] or codes == [0, 0, 0], codes
    assert _bytes(run) == _bytes(tmp_path / "alone")
    assert len(_table(run)) == 8
