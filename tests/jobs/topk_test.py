"""Encoders trained with the tiles that count most, and slides looked at."""

import csv
import json
import re

import numpy as np
import pytest

from jaxtransfer import attention, errors, workdir
from jaxtransfer.data import feature_files
from jaxtransfer.jobs import slides
from jaxtransfer.weights import loading
from tests import typed
from tests.extraction import drawn
from tests.jobs import configs, tiled

TOP = 3
CHANGES = {
  "folds": 3,
  "epochs": 2,
  "resamples": 20,
  "checkpoint_seconds": 0.0,
  "pooling.embedding": (8,),
  "pooling.attention": 4,
  "optimiser.learning_rate": 0.01,
  "topk.tiles": TOP,
  "topk.epochs": 2,
  "topk.learning_rate": 0.01,
  "topk.encode_batch_size": 16,
  "heatmaps": 4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiled.write(tmp_path_factory.mktemp("topk"))


def _config(source, **changes):
  config = configs.load("slides")
  config.update_from_flattened_dict(
    {
      "data.source": str(source / "slides.csv"),
      "data.features": str(source / "features"),
      **CHANGES,
      **changes,
    }
  )
  return config


def _run(config, path):
  with workdir.claim(
    path, config.to_dict(), "the command", shared=True
  ) as claimed:
    return slides.run(config, claimed)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(path.parent / "cache"))
    assert _run(_config(source), path) == 0
  return path


def _unit(path, fold, top):
  (unit,) = path.glob(f"units/*-attention{'-top3' * top}-fold{fold}-seed0")
  return unit


def test_frozen_and_tuned_stand_side_by_side(finished):
  results = json.loads((finished / "results.json").read_text())
  typed.check_results(results)
  table = results["summary"]["table"]
  assert [row["top"] for row in table] == [0, TOP]
  assert table[1]["name"] == f"{table[0]['name']}-top{TOP}"
  # Every slide is tested once by each, and the two are compared in pairs.
  with open(finished / "predictions.csv", newline="") as f:
    lines = list(csv.DictReader(f))
  for row in table:
    of = [line["name"] for line in lines if line["tap"] == row["name"]]
    assert sorted(of) == [f"s{i:02d}" for i in range(tiled.SLIDES)]
  assert table[1]["against_first"]["auroc"]["value"] == pytest.approx(
    table[1]["test"]["auroc"]["mean"] - table[0]["test"]["auroc"]["mean"]
  )
  # The encoder's numbers are trained, too.
  assert table[1]["params"] > table[0]["params"]


def test_the_tiles_are_those_the_first_stage_scored_highest(finished, source):
  """Of the training and the validation slides of the fold alone."""
  splits = json.loads((finished / "splits.json").read_text())
  for fold in range(3):
    chosen = json.loads((_unit(finished, fold, 1) / "tiles.json").read_text())
    rows = splits[f"train{fold}"] + splits[f"val{fold}"]
    assert sorted(map(int, chosen)) == sorted(rows)
    assert not set(map(int, chosen)) & set(splits[f"test{fold}"])
    # A slide of this fold is tested in another, whose network scored it so.
  frozen = next((finished / "attention").iterdir()).parent
  name = json.loads((finished / "results.json").read_text())["summary"][
    "table"
  ][0]["name"]
  tiles = attention.read(frozen / name / "s00.h5")
  assert len(tiles.scores) == 25


def test_the_chosen_are_the_highest_scores(finished, source):
  """Recomputed with float64 NumPy from the first stage's own file."""
  from safetensors.numpy import load_file

  unit = _unit(finished, 0, 0)
  tensors = {
    k: v.astype(np.float64)
    for k, v in load_file(unit / "model.safetensors").items()
  }
  chosen = json.loads((_unit(finished, 0, 1) / "tiles.json").read_text())
  (folder,) = (source / "features" / "features").iterdir()
  for row, tiles in chosen.items():
    x = feature_files.read_features(folder / f"s{int(row):02d}.h5").features
    h = np.maximum(
      x @ tensors["embedding.0.weight"].T + tensors["embedding.0.bias"], 0
    )
    t = np.tanh(
      h @ tensors["pooling.tanh.weight"].T + tensors["pooling.tanh.bias"]
    )
    scores = (t @ tensors["pooling.score.weight"].T)[:, 0]
    assert set(tiles) == set(np.argsort(-scores)[:TOP].tolist())


def test_what_is_tested_is_all_tiles_by_the_trained_encoder(finished, source):
  """The encoder is another than before; what the run says of a slide is what
  its files give when they are put together by hand."""
  import jax.numpy as jnp

  unit = _unit(finished, 0, 1)
  before = loading.create_model("cbr_tiny", until="block1", seed=0)
  source_of = loading.resolve_weights("cbr_tiny", unit / "encoder.safetensors")
  after = loading.create_model("cbr_tiny", until="block1", weights=source_of)
  with np.load(unit / "test.npz") as stored:
    rows, logits = stored["rows"], stored["logits"]
  row = int(rows[0])
  corners = feature_files.read_coords(
    source / "coords" / f"s{row:02d}.h5"
  ).coords
  pixels = (drawn.pixels(row) * 0.4).astype(np.uint8)
  if row // 2 % 2:
    pixels[64:128, 96:160] = 250
  cut = np.stack([pixels[y : y + 32, x : x + 32] for x, y in corners])
  x = (cut / 255 - np.array(source_of.mean)) / np.array(source_of.std)
  features = np.asarray(after(jnp.asarray(x, jnp.float32)))
  assert (
    np.abs(features - np.asarray(before(jnp.asarray(x, jnp.float32)))).max()
    > 1e-3
  )
  from jaxtransfer.weights import bags as weights_bags

  head, _ = weights_bags.load(unit / "model.safetensors")
  again = head(jnp.asarray(features)[None], jnp.ones((1, len(features)), bool))
  np.testing.assert_allclose(again[0], logits[0], atol=1e-3)


def test_the_trained_encoder_is_handed_over(finished):
  summary = json.loads((finished / "results.json").read_text())["summary"]
  tuned = summary["exported"]["cut"].endswith(f"-top{TOP}")
  assert (finished / "export" / "encoder.safetensors").exists() == tuned
  card = json.loads((finished / "export" / "model.json").read_text())
  assert card["tuned_with_tiles"] == TOP * tuned


def test_slides_are_looked_at(finished):
  """Attention sums to one over the tiles there are; names are inert."""
  files = sorted((finished / "heatmaps").glob("*.csv"))
  assert len(files) == CHANGES["heatmaps"]
  with open(files[0], newline="") as f:
    lines = list(csv.DictReader(f))
  weights = np.array([float(line["attention"]) for line in lines])
  assert weights.sum() / len(lines) == pytest.approx(1, abs=1e-4)
  geojson = json.loads(files[0].with_suffix(".geojson").read_text())
  assert len(geojson["features"]) == len(lines)
  page = (finished / "report.html").read_text()
  assert "Where it looks" in page and "<b>b</b>" not in page
  assert len(re.findall(r"data:image/jpeg", page)) > 4


def test_the_same_command_does_nothing_twice(finished, source, capsys):
  path = finished
  before = {p: p.stat().st_mtime_ns for p in path.rglob("*.safetensors")}
  (path / "results.json").unlink()
  assert _run(_config(source), path) == 0
  assert "training 1 of" not in capsys.readouterr().out
  after = {p: p.stat().st_mtime_ns for p in path.glob("units/*/*.safetensors")}
  assert all(before[p] == time for p, time in after.items())


def test_encoders_are_made_and_compared_in_one_command(source, tmp_path):
  """Two cuts of a network, from pixels; as with the features made before."""
  changes = {
    "data.features": "",
    "data.coords": str(source / "coords"),
    "networks": "cbr_tiny@random",
    "taps": "block1,block2",
    "topk.tiles": 0,
    "heatmaps": 0,
  }
  path = tmp_path / "run"
  assert _run(_config(source, **changes), path) == 0
  table = json.loads((path / "results.json").read_text())["summary"]["table"]
  assert [row["tap"] for row in table] == ["block1", "block2"]
  assert (
    _run(
      _config(source, **{"topk.tiles": 0, "heatmaps": 0}), tmp_path / "other"
    )
    == 0
  )
  summary = json.loads((tmp_path / "other" / "results.json").read_text())
  (before,) = summary["summary"]["table"]
  # float16 against float32 features.
  assert table[0]["test"]["loss" if "loss" in table[0]["test"] else "auroc"][
    "mean"
  ] == pytest.approx(before["test"]["auroc"]["mean"], abs=0.13)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"networks": "cbr_tiny"}, "one of the two"),
    ({"networks": "cbr_tiny", "data.features": ""}, "both or neither"),
    ({"pooling.name": "mean"}, "scores no tile"),
    ({"topk.learning_rate": 0.0}, "topk.learning_rate"),
    ({"data.slides": "nowhere"}, "does not exist"),
  ],
)
def test_what_cannot_be_is_refused(source, tmp_path, changes, words):
  with pytest.raises(errors.UsageError, match=words):
    _run(_config(source, **changes), tmp_path / "run")


def test_another_network_than_that_of_the_features_is_refused(source, tmp_path):
  """Random weights of another seed make other features."""
  with pytest.raises(errors.UsageError, match="does not make the features"):
    _run(_config(source, seed=5), tmp_path / "run")
