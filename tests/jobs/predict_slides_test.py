"""A finished `slides` run on new slides, by features and by pixels."""

import csv
import json
import shutil

import numpy as np
import pytest

from jaxtransfer import attention, errors, workdir
from jaxtransfer.jobs import extract, predict, slides
from tests import typed
from tests.jobs import configs, tiled
from tests.jobs.topk_test import CHANGES


def _run(job, name, path, **changes):
  config = configs.load(name)
  config.update_from_flattened_dict(changes)
  with workdir.claim(
    path, config.to_dict(), "the command", shared=True
  ) as claimed:
    return job.run(config, claimed)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiled.write(tmp_path_factory.mktemp("topk"))


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
  """A finished `slides` run, its encoder frozen."""
  path = tmp_path_factory.mktemp("runs") / "trained"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(path.parent / "cache"))
    changes = {k: v for k, v in CHANGES.items() if not k.startswith("topk")}
    changes["data.source"] = str(source / "slides.csv")
    changes["data.features"] = str(source / "features")
    assert _run(slides, "slides", path, **changes) == 0
  return path


def _predict(trained, path, **changes):
  changes = {"run": str(trained), "batch_size": 16, "resamples": 20, **changes}
  return _run(predict, "predict", path, **changes)


def _probabilities(path, **said):
  lines, found = configs.read_predictions(path, **said)
  return {line["name"]: of for line, of in zip(lines, found, strict=True)}


def test_what_a_fold_tested_comes_out_again(trained, source, tmp_path):
  """The exported network is one fold's: of the slides that this fold tested
  the probabilities are those that the run itself has."""
  path = tmp_path / "new"
  assert (
    _predict(
      trained,
      path,
      **{
        "data.source": str(source / "slides.csv"),
        "data.features": str(source / "features"),
      },
    )
    == 0
  )
  left = json.loads((path / "results.json").read_text())
  typed.check_results(left)
  card = json.loads((trained / "export" / "model.json").read_text())
  seed = str(card["fold"])
  theirs = _probabilities(trained, seed=seed)
  ours = _probabilities(path)
  assert len(ours) == tiled.SLIDES and theirs
  for name, of in theirs.items():
    np.testing.assert_allclose(ours[name], of, atol=1e-5)
  summary = left["summary"]
  assert summary["unit"] == "slides" and summary["labelled"] == tiled.SLIDES
  told = " ".join(summary["notes"])
  assert "slides have the name of one that the run trained" in told
  # The thresholds are those of this fold's validation split.
  assert [p["thresholds"][0] for p in summary["operating"]] == [
    p["threshold"] for p in card["operating_points"]["points"]
  ]
  page = (path / "report.html").read_text()
  assert "Where it looks" in page and "How good it is here" in page


def test_pixels_and_features_say_the_same(trained, source, tmp_path):
  """Encoded here, from the tiles, as in training: no label, no table."""
  by_pixels, by_features = tmp_path / "pixels", tmp_path / "features"
  changes = {
    "data.source": str(source / "slides"),
    "data.coords": str(source / "coords"),
  }
  assert _predict(trained, by_pixels, **changes) == 0
  assert (
    _predict(
      trained, by_features, **{"data.features": str(source / "features")}
    )
    == 0
  )
  one, other = _probabilities(by_pixels), _probabilities(by_features)
  assert one.keys() == other.keys() and len(one) == tiled.SLIDES
  for name, of in one.items():
    # float16 against float32 features.
    np.testing.assert_allclose(of, other[name], atol=5e-3)
  summary = json.loads((by_pixels / "results.json").read_text())["summary"]
  assert summary["labelled"] == 0
  tiles = next((by_pixels / "attention").glob("*/s00.h5"))
  assert attention.read(tiles).attention.sum() == pytest.approx(1, abs=1e-5)


def test_a_broken_slide_is_listed_and_the_rest_predicted(
  trained,
  source,
  tmp_path,
):
  shutil.copytree(source / "slides", tmp_path / "slides")
  (tmp_path / "slides" / "s03.tiff").write_bytes(b"no slide")
  changes = {
    "data.source": str(tmp_path / "slides"),
    "data.coords": str(source / "coords"),
  }
  with pytest.raises(errors.UnreadableError, match="s03"):
    _predict(trained, tmp_path / "strict", **changes)
  path = tmp_path / "run"
  assert _predict(trained, path, **{**changes, "data.max_failures": 0.2}) == 1
  with open(path / "failures.csv", newline="") as f:
    assert [line["name"] for line in csv.DictReader(f)] == ["s03"]
  assert len(_probabilities(path)) == tiled.SLIDES - 1


def test_what_was_made_otherwise_is_refused(trained, source, tmp_path):
  """Another cut, another width, both or neither of features and tiles."""
  other = tmp_path / "other"
  changes = {
    "data.source": str(source / "slides.csv"),
    "coords": str(source / "coords"),
    "network.name": "cbr_tiny",
    "network.weights": "",
    "taps": "block2",
  }
  assert _run(extract, "extract", other, **changes) == 0
  for changes, words in (
    ({"data.features": str(other)}, "features of a tile"),
    ({}, "give either the features"),
    (
      {
        "data.features": str(other),
        "data.coords": str(source / "coords"),
        "data.source": str(source / "slides"),
      },
      "give either the features",
    ),
  ):
    with pytest.raises(errors.UsageError, match=words):
      _predict(trained, tmp_path / "run", **changes)


def test_labels_that_the_network_does_not_know_are_refused(
  trained, source, tmp_path
):
  (tmp_path / "t.csv").write_text("slide,label\ns00,c\n")
  with pytest.raises(errors.UsageError, match="the network predicts"):
    _predict(
      trained,
      tmp_path / "run",
      **{
        "data.source": str(tmp_path / "t.csv"),
        "data.features": str(source / "features"),
      },
    )
