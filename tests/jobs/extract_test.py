"""The job as people run it: on slides and on images, stopped and gone on."""

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import h5py
import jax
import numpy as np
import PIL.Image
import pytest

from jaxtransfer import errors, workdir
from jaxtransfer.data import feature_files, preprocess
from jaxtransfer.jobs import extract
from jaxtransfer.networks import zoo
from jaxtransfer.report import page
from jaxtransfer.weights import loading
from tests import typed
from tests.data import slide_files
from tests.extraction import drawn
from tests.golden import draw, ours
from tests.jobs import configs

NETWORK = {
  "network.weights": "",
  "network.until": "block1",
  "batch_size": 16,
  "thumbnails": 3,
}


def _config(source, coords="", **changes):
  config = configs.load("extract", "cbr_tiny")
  changes = {"data.source": str(source), "coords": str(coords), **changes}
  config.update_from_flattened_dict({**NETWORK, **changes})
  return config


def _run(config, path):
  with workdir.claim(
    path, config.to_dict(), "the command", shared=True
  ) as claimed:
    return extract.run(config, claimed)


def _summary(path):
  return json.loads((path / "results.json").read_text())["summary"]


def _rows(path, name):
  with open(path / name, newline="") as f:
    return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Slides with labels, and one that is none."""
  root = drawn.write(
    tmp_path_factory.mktemp("drawn"), {"a": 40, "b": 12, "c": 0}
  )
  (root / "slides" / "broken.svs").write_text("no slide")
  with open(root / "slides" / "manifest.csv", "w") as f:
    f.write("path,label,group\na.tiff,tumour,p1\nb.tiff,<b>none</b>,p2\n")
    f.write("c.tiff,none,p3\nbroken.svs,none,p4\n")
  shutil.copy(root / "coords" / "b.h5", root / "coords" / "broken.h5")
  return root


@pytest.fixture(scope="module")
def finished(written, tmp_path_factory):
  """A finished run on slides."""
  path = tmp_path_factory.mktemp("runs") / "run"
  config = _config(written / "slides" / "manifest.csv", written / "coords")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(path.parent / "cache"))
    assert _run(config, path) == 1
  return path


def test_what_a_run_on_slides_leaves(finished, written):
  """Files, the table of slides, which is what trains on them, and the page."""
  results = json.loads((finished / "results.json").read_text())
  typed.check_results(results)
  assert configs.check_json(finished) > 3
  summary = results["summary"]
  assert summary["sentence"].startswith("1 of 4 slides could not be used")
  assert "52 tiles of 3 slides are encoded by 1 network." in summary["sentence"]
  assert summary["rows"] == {"tiles": 52} and summary["groups"] == {"slides": 3}
  (encoder,) = summary["encoders"]
  folder = finished / "features" / encoder["folder"]
  assert encoder["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
  for row in _rows(finished, "slides.csv"):
    if row["slide"] != "broken":
      with h5py.File(folder / f"{row['slide']}.h5") as f:
        assert f["features"].shape == (int(row["tiles"]), encoder["channels"])
        assert np.isfinite(f["features"][:]).all()
  labels = {row["slide"]: row["label"] for row in _rows(finished, "slides.csv")}
  assert labels["a"] == "tumour"
  (failure,) = _rows(finished, "failures.csv")
  assert failure["slide"] == "broken" and "text file" in failure["reason"]
  text = (finished / "report.html").read_text()
  assert encoder["folder"] in text and "What the networks see" in text
  assert "<b>none</b>" not in text and "&lt;b&gt;none&lt;/b&gt;" in text
  # As many pictures as there are slides with tiles, and places.
  assert text.count("data:image/jpeg") == 2


def test_a_page_asks_for_no_key_that_there_is_not(finished, tmp_path):
  checked = typed.check_results(
    json.loads((finished / "results.json").read_text())
  )
  page.write(tmp_path, checked)
  checked["summary"]["slides"] *= 300
  page.write(tmp_path, checked)
  assert "more are in slides.csv" in (tmp_path / "report.html").read_text()


def test_a_finished_run_looks_again(finished, written, tmp_path, capsys):
  """It does nothing while nothing is new; a slide that has been mended, or is
  new, is encoded, and the others stay as they are."""
  root, path = tmp_path / "drawn", tmp_path / "run"
  shutil.copytree(written, root)
  source = root / "slides" / "manifest.csv"
  config = _config(source, root / "coords")
  assert _run(config, path) == 1
  before = {p: p.stat().st_mtime_ns for p in path.rglob("*.h5")}
  page_written = (path / "report.html").stat().st_mtime_ns
  # The broken slide is tried again, and is no better.
  assert _run(config, path) == 1
  assert "Slides that could not be used: 1" in capsys.readouterr().out
  shutil.copy(root / "slides" / "b.tiff", root / "slides" / "broken.svs")
  assert _run(config, path) == 0
  assert not (path / "failures.csv").exists()
  assert _summary(path)["broken"] == []
  assert {p: p.stat().st_mtime_ns for p in before} == before
  assert len(list(path.rglob("*.h5"))) == len(before) + 1
  assert (path / "report.html").stat().st_mtime_ns > page_written
  page_written = (path / "report.html").stat().st_mtime_ns
  capsys.readouterr()
  assert _run(config, path) == 0
  assert "is finished; see" in capsys.readouterr().out
  assert (path / "report.html").stat().st_mtime_ns == page_written


def test_images_become_files_by_group(tmp_path):
  """With the names of the images, and no more; unreadable ones are dropped."""
  source = configs.write_tiles(tmp_path, 24, 20)
  (tmp_path / "3.png").write_bytes(b"no image")
  config = _config(source, **{"data.image_size": 16, "data.max_failures": 0.3})
  assert _run(config, tmp_path / "run") == 1
  summary = _summary(tmp_path / "run")
  typed.check_results(
    json.loads((tmp_path / "run" / "results.json").read_text())
  )
  assert summary["bags"] == "groups" and summary["failures"] == 1
  assert [s["tiles"] for s in summary["slides"]] == [3, 4, 4, 4, 4]
  (failure,) = _rows(tmp_path / "run", "failures.csv")
  assert (failure["slide"], failure["name"]) == ("patient 0", "3.png")
  (encoder,) = summary["encoders"]
  folder = tmp_path / "run" / "features" / encoder["folder"]
  read = feature_files.read_features(folder / "patient 0.h5")
  assert read.names == ["0.png", "1.png", "2.png"] and read.coords is None
  source = loading.resolve_weights("cbr_tiny", None)
  model = loading.create_model("cbr_tiny", until="block1", weights=source)
  with PIL.Image.open(tmp_path / "1.png") as image:
    # Torchvision's Resize(16) of a square.
    pixels = np.asarray(image.resize((16, 16), PIL.Image.Resampling.BILINEAR))
  x = preprocess.preprocess(pixels[None], source.mean, source.std)
  wanted = jax.jit(lambda x: model.taps(x, ["block1"]))(x)["block1"][0]
  np.testing.assert_allclose(read.features[1], wanted, rtol=2e-3, atol=1e-3)


def test_a_dry_run_counts_and_writes_nothing(written, tmp_path, capsys):
  config = _config(written / "slides" / "manifest.csv", written / "coords")
  looked = workdir.look(tmp_path / "run", config.to_dict(), shared=True)
  assert extract.run(config, looked) == 0 and not list(tmp_path.iterdir())
  told = capsys.readouterr().out
  assert "64 tiles of 4 slides, 32 pixels" in told
  (line,) = re.findall("features/cbr_tiny-random-block1: (.*) each", told)
  assert int(line) == zoo.build("cbr_tiny", until="block1").channels
  assert re.search(r"Time: (about|between) .* \w+s?\. Of ", told)
  assert "coords=" + str(written / "coords") in told


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"layout": "clam"}, "it is one of trident, stamp"),
    ({"features_dtype": "bfloat16"}, "it is one of float16, float32"),
    ({"bag": "patient"}, "config.bag is 'patient'"),
    ({"layout": "stamp", "features_dtype": "float32"}, "has float16"),
    ({"layout": "stamp", "coords": ""}, "images have none"),
    ({"data.image_size": 4}, "config.data.image_size is 4"),
    ({"network.until": "block9"}, "no layer 'block9'"),
  ],
)
def test_mistakes_are_told_before_any_work(tmp_path, changes, says):
  source = configs.write_tiles(tmp_path, 16, 8)
  with pytest.raises(errors.UsageError, match=says):
    _run(_config(source, **changes), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_stamps_layout_is_in_micrometres(written, tmp_path):
  """As STAMP's loader reads it: `feats` float16, `coords` in um, and what says
  so on the file."""
  config = _config(written / "slides", written / "coords", layout="stamp")
  assert _run(config, tmp_path / "run") == 1
  (path,) = (tmp_path / "run" / "features").glob("*/a.h5")
  with h5py.File(path) as f:
    assert f["feats"].dtype == np.float16 and f.attrs["unit"] == "um"
    assert f.attrs["tile_size_um"] == drawn.TILE * drawn.MPP
    np.testing.assert_allclose(f["coords"][:], drawn.places(40, 0) * drawn.MPP)
  assert _run(config, tmp_path / "run") == 1


@pytest.mark.slow
def test_clams_encoder_gives_clams_features(tmp_path):
  """resnet50 cut after layer3 on tiles of a slide with CLAM's coordinates: the
  numbers of timm's network as CLAM calls it, drawn weights in both."""
  tiles = draw.tiles(4, 64, 0)
  image = np.concatenate(
    [np.concatenate(row, 1) for row in (tiles[:2], tiles[2:])]
  )
  corners = np.array([[0, 0], [64, 0], [0, 64], [64, 64]])
  (tmp_path / "slides").mkdir()
  slide_files.write_pyramid(tmp_path / "slides" / "s.tiff", [image])
  (tmp_path / "clam" / "patches").mkdir(parents=True)
  with h5py.File(tmp_path / "clam" / "patches" / "s.h5", "w") as f:
    f["coords"] = corners
    f["coords"].attrs.update({"patch_size": 64, "patch_level": 0})
    f["coords"].attrs["downsample"] = (1.0, 1.0)
  loading.export(ours.drawn("resnet50"), tmp_path / "w.safetensors")
  config = configs.load("extract", "resnet50")
  config.update_from_flattened_dict(
    {
      "data.source": str(tmp_path / "slides"),
      "coords": str(tmp_path / "clam"),
      "network.weights": str(tmp_path / "w.safetensors"),
      "network.until": "layer3",
      "features_dtype": "float32",
      "batch_size": 8,
    }
  )
  assert _run(config, tmp_path / "run") == 0
  (path,) = (tmp_path / "run").rglob("s.h5")
  # As CLAM reads it: dataset_modules/dataset_generic.py.
  with h5py.File(path, "r") as hdf5_file:
    features = hdf5_file["features"][:]
    np.testing.assert_array_equal(hdf5_file["coords"][:], corners)
  with np.load(pathlib.Path(draw.__file__).parent / "clam.npz") as arrays:
    wanted = arrays["tiles"]
  assert features.shape == wanted.shape == (4, 1024)
  assert np.abs(features - wanted).max() < 1e-5 * np.abs(wanted).max()


# --- whole runs of the command -----------------------------------------------


def _command(root, path, *more):
  return [
    *(sys.executable, "-m", "jaxtransfer.main"),
    *("--config=extract:resnet18", f"--workdir={path}"),
    *(f"--config.data={root / 'slides'}", f"--config.coords={root / 'coords'}"),
    *("--config.network.weights=", "--config.taps=stem,layer1"),
    *("--config.batch_size=16", *more),
  ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """Two devices, and programs that are compiled once."""
  cache = str(tmp_path_factory.mktemp("cache"))
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
  environment |= {"JAXTRANSFER_CACHE": cache, "GLIBC_TUNABLES": ""}
  environment.pop("XLA_FLAGS", None)
  return environment


def _left(path: pathlib.Path) -> dict[str, bytes]:
  return {
    str(file.relative_to(path)): file.read_bytes()
    for file in sorted((path / "features").rglob("*"))
    if file.is_file()
  }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
  """Slides, and a run on them that nothing disturbed."""
  root = tmp_path_factory.mktemp("whole")
  counts = {f"s{i}": 150 + 30 * i for i in range(6)} | {"t1": 7, "t2": 9}
  drawn.write(root, counts)
  drawn.damage(root / "slides" / "s3.tiff", 7)
  options = ["--config.data.max_failures=0.2"]
  done = subprocess.run(_command(root, root / "run", *options), env=environment)
  assert done.returncode == 1
  return root


@pytest.mark.slow
def test_killed_at_any_moment_the_files_are_those_of_an_undisturbed_run(
  undisturbed, environment, tmp_path
):
  """To the bit, after at least ten kills at random moments of the work; what
  could not be read is counted once, and nothing unfinished is left."""
  rng = np.random.default_rng(0)
  path, kills = tmp_path / "run", 0
  command = _command(undisturbed, path, "--config.data.max_failures=0.2")
  for _ in range(40):
    with subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
      # Its checks are over, or it was killed once all was done.
      for line in process.stdout:
        if "folders of features" in line:
          break
      try:
        process.communicate(timeout=rng.uniform(0, 1.5))
      except subprocess.TimeoutExpired:
        process.kill()
        kills += 1
    if process.returncode == 1:
      if kills >= 10:
        break
      # Finished too soon: some of it is to be made again.
      (path / "results.json").unlink(missing_ok=True)
      for name in rng.choice([f"s{i}" for i in range(6)], 3, replace=False):
        shutil.rmtree(path / "units" / name)
  assert kills >= 10 and process.returncode == 1
  assert _left(path) == _left(undisturbed / "run")
  failures = [_rows(p, "failures.csv") for p in (path, undisturbed / "run")]
  assert failures[0] == failures[1] and len(failures[0]) > 5


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_nothing_is_lost_nor_done_twice(
  undisturbed, environment, tmp_path
):
  """The others take over what it had in hands; the slides that were done before
  are done once, as the records' times say."""
  path = tmp_path / "run"
  command = _command(undisturbed, path, "--config.data.max_failures=0.2")
  processes = [subprocess.Popen(command, env=environment) for _ in range(4)]
  try:
    until = time.monotonic() + 120
    while not list(path.glob("units/*/done.json")):
      assert time.monotonic() < until
      time.sleep(0.01)
    processes[0].send_signal(signal.SIGKILL)
    codes = [process.wait(180) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert codes == [-signal.SIGKILL, 1, 1, 1]
  assert _left(path) == _left(undisturbed / "run")
  for record in path.glob("units/*/done.json"):
    # Written last of a slide, and once: no file of it is younger.
    for file in path.glob(f"features/*/{record.parent.name}.h5"):
      assert file.stat().st_mtime_ns <= record.stat().st_mtime_ns


@pytest.mark.slow
def test_processes_that_read_give_the_same_files(
  undisturbed, environment, tmp_path
):
  options = ("--config.data.max_failures=0.2", "--config.data.workers=2")
  command = _command(undisturbed, tmp_path / "run", *options)
  assert subprocess.run(command, env=environment).returncode == 1
  assert _left(tmp_path / "run") == _left(undisturbed / "run")
