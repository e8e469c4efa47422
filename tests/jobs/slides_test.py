"""Slides from the features of their tiles, whole, on small bags."""

import csv
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import sklearn.metrics
from safetensors.numpy import load_file
from scipy import special

from jaxtransfer import attention, errors, workdir
from jaxtransfer.jobs import slides
from jaxtransfer.weights import bags as weights_bags
from tests import typed
from tests.data import slides as making
from tests.jobs import configs
from tests.networks.pooling_test import reference

CHANGES = {
  "folds": 3,
  "epochs": 3,
  "resamples": 30,
  "checkpoint_seconds": 0.0,
  "pooling.embedding": (8,),
  "pooling.attention": 4,
  "optimiser.learning_rate": 0.02,
}
ABOUT = {"network": "resnet18", "weights": "imagenet", "cut": "layer3"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """24 slides of 12 patients, by an encoder that sees the lesions and by one
  that sees noise, which says nothing of itself."""
  root = tmp_path_factory.mktemp("slides")
  table = making.write_slides(root, folder="seeing", **ABOUT)
  for i in range(24):
    drawn = making.features(100 + i, False, 5 + i % 9)
    making.write_file(root / "blind" / f"slide{i:02d}.h5", drawn, "clam")
  return table


def config_of(table, **changes):
  config = configs.load("slides")
  folders = ",".join(str(table.parent / name) for name in ("blind", "seeing"))
  changes = {
    "data.source": str(table),
    "data.features": folders,
    **CHANGES,
    **changes,
  }
  config.update_from_flattened_dict(changes)
  return config


def run(config, path):
  with workdir.claim(
    path, config.to_dict(), "the command", shared=True
  ) as claimed:
    return slides.run(config, claimed)


def results_of(path):
  return json.loads((path / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(path.parent / "cache"))
    assert run(config_of(source), path) == 0
  return path


def predicted(path, **said):
  lines, probabilities = configs.read_predictions(path, **said)
  return {
    (line["tap"], line["seed"], line["name"]): (line, of)
    for line, of in zip(lines, probabilities, strict=True)
  }


def test_what_a_run_leaves(finished):
  names = {path.name for path in finished.iterdir()}
  assert names >= {
    "attention",
    "config.json",
    "export",
    "predictions.csv",
    "report.html",
    "results.csv",
    "results.json",
    "splits.json",
    "units",
  }
  assert "failures.csv" not in names
  assert configs.check_json(finished) > 20
  results = results_of(finished)
  typed.check_results(results)
  summary = results["summary"]
  assert not list(finished.glob("units/*/checkpoints"))
  assert [row["name"] for row in summary["table"]] == ["blind", "seeing"]
  said = [
    tuple(row[k] for k in ("network", "weights", "tap"))
    for row in summary["table"]
  ]
  assert said == [(None, None, None), ("resnet18", "imagenet", "layer3")]
  rows = results["measurements"]
  assert {row["network"] for row in rows} == {"blind", "resnet18"}
  page = (finished / "report.html").read_text()
  assert "best on validation" in page and "over 3 folds" in page


def test_no_patient_is_trained_and_tested_on(finished, source):
  """Every slide is tested once and validates once, and in no fold is one of
  its patient's in another split."""
  stored = json.loads((finished / "splits.json").read_text())
  with open(source, newline="") as f:
    patients = [row["group"] for row in csv.DictReader(f)]
  for fold in range(3):
    splits = [stored[f"{s}{fold}"] for s in ("train", "val", "test")]
    held = [{patients[row] for row in rows} for rows in splits]
    assert sum(map(len, splits)) == 24 and len(set.union(*held)) == 12
    assert sum(map(len, held)) == 12
  for split in ("val", "test"):
    every = sum((stored[f"{split}{fold}"] for fold in range(3)), [])
    assert sorted(every) == list(range(24))
  tested = predicted(finished, tap="seeing")
  for (_, seed, name), _ in tested.items():
    assert int(name.removeprefix("slide")) in stored[f"test{seed}"]
  assert len(tested) == 24


def test_scores_are_those_of_the_predictions(finished):
  """Recomputed from predictions.csv alone, slides and patients: the mean over
  folds, and the probabilities of a patient's slides."""
  summary = results_of(finished)["summary"]
  assert summary["repeats"] == "3 folds" and summary["unit"] == "slides"
  rows = {row["name"]: row for row in summary["table"]}
  for name, row in rows.items():
    of_folds = {"slides": [], "patients": []}
    for fold in range(3):
      lines, values = configs.read_predictions(
        finished, tap=name, seed=str(fold)
      )
      truth = np.array([line["label"] == "class 1" for line in lines])
      of_folds["slides"].append(
        sklearn.metrics.roc_auc_score(truth, values[:, 1])
      )
      group = np.array([line["group"] for line in lines])
      patients = np.unique(group)
      means = [values[group == p, 1].mean() for p in patients]
      labels = [truth[group == p].all() for p in patients]
      of_folds["patients"].append(sklearn.metrics.roc_auc_score(labels, means))
    for of, key in (("slides", "test"), ("patients", "patients")):
      score = row[key]["auroc"]
      np.testing.assert_allclose(score["values"], of_folds[of], atol=1e-9)
      assert score["mean"] == pytest.approx(np.mean(of_folds[of]))
      assert score["low"] <= score["mean"] <= score["high"]
    assert row["patients_tested"] == 12 and row["tests"] == 1
  assert rows["seeing"]["test"]["auroc"]["mean"] > 0.9
  assert np.sum(summary["confusion"]) == 24
  measured = {
    (row["network"], row["metric"]): row
    for row in results_of(finished)["measurements"]
    if row["split"] == "test" and row["seed"] is None
  }
  assert measured["resnet18", "auroc"]["n"] == 24
  assert measured["resnet18", "auroc:patients"]["n"] == 12
  # Positive and negative slides, each counted once over the folds.
  (point, *_) = rows["seeing"]["operating"]
  assert point["images"] == [12, 12] and point["class"] == "class 1"


def test_encoders_are_compared_in_pairs_with_the_best_on_validation(finished):
  """Which that is, only validation says; the differences are of the table."""
  summary = results_of(finished)["summary"]
  values = {}
  for unit in (finished / "units").iterdir():
    encoder = unit.name.split("-")[0]
    record = json.loads((unit / "done.json").read_text())
    values.setdefault(encoder, []).append(record["val"]["auroc"])
  blind, seeing = summary["table"]
  assert np.mean(values["seeing"]) > np.mean(values["blind"])
  assert seeing["chosen"] and not blind["chosen"]
  assert seeing["val"] == pytest.approx(np.mean(values["seeing"]))
  assert seeing["against_chosen"] is None and blind["against_first"] is None
  for metric in ("auroc", "accuracy"):
    expected = seeing["test"][metric]["mean"] - blind["test"][metric]["mean"]
    difference = seeing["against_first"][metric]
    assert difference["value"] == pytest.approx(expected)
    assert difference["low"] <= expected <= difference["high"]
    other = blind["against_chosen"][metric]
    assert other["value"] == pytest.approx(-expected)
    assert other["low"] == pytest.approx(-difference["high"])
  assert "seeing" in summary["sentence"] and "worse by" in summary["sentence"]


def test_every_tile_of_a_tested_slide_has_its_attention(finished, source):
  """As the network of the fold that tested the slide gives it, beside where the
  tile is; lesions get the most of it."""
  paths = sorted((finished / "attention" / "seeing").iterdir())
  assert [path.stem for path in paths] == [f"slide{i:02d}" for i in range(24)]
  tested, shares = predicted(finished, tap="seeing"), []
  for i, path in enumerate(paths):
    tiles = attention.read(path)
    about = tiles.attributes
    features = making.features(i, (i // 2) % 2 > 0, 3 + (i * 7) % 38)
    with h5py.File(source.parent / "seeing" / path.name) as f:
      np.testing.assert_array_equal(tiles.coords, f["coords"])
    assert about["unit"] == "px" and about["extent"] == 512
    assert about["slide"] == path.stem and about["classes"][1] == "class 1"
    unit = f"seeing-attention-fold{about['fold']}-seed0"
    of_unit = finished / "units" / unit
    card = json.loads((of_unit / "model.json").read_text())
    arrays = load_file(of_unit / "model.safetensors")
    logits, weights, scores = reference(arrays, features, "attention")
    np.testing.assert_allclose(tiles.attention, weights, atol=1e-6)
    np.testing.assert_allclose(tiles.scores, scores, atol=1e-5)
    alone = [reference(arrays, f[None], "attention")[0] for f in features]
    expected = special.softmax(np.array(alone) / card["temperature"], axis=1)
    np.testing.assert_allclose(tiles.probabilities, expected, atol=1e-5)
    expected = special.softmax(logits / card["temperature"])
    np.testing.assert_allclose(about["probabilities"], expected, atol=1e-5)
    line, probabilities = tested["seeing", str(about["fold"]), path.stem]
    np.testing.assert_allclose(about["probabilities"], probabilities, atol=1e-6)
    assert about["label"] == line["label"] and about["group"] == line["group"]
    if about["label"] == "class 1":
      lesions = max(1, len(features) // 8)
      shares.append(tiles.attention[:lesions].sum() * len(features) / lesions)
  assert np.median(shares) > 1.5
  assert len(list((finished / "attention" / "blind").iterdir())) == 24


def test_the_network_that_is_handed_over_is_the_best_fold_s(finished):
  """Of the encoder that is best, by validation; it says of which features."""
  exported = results_of(finished)["summary"]["exported"]
  network, card = weights_bags.load(finished / "export" / "model.safetensors")
  values = {}
  for fold in range(3):
    unit = finished / "units" / f"seeing-attention-fold{fold}-seed0"
    values[fold] = json.loads((unit / "done.json").read_text())["val"]["auroc"]
  best = max(values, key=lambda fold: values[fold])
  assert exported["cut"] == "seeing" and exported["val"] == max(values.values())
  unit = finished / "units" / f"seeing-attention-fold{best}-seed0"
  expected = load_file(unit / "model.safetensors")
  found = load_file(finished / "export" / "model.safetensors")
  assert all((found[name] == expected[name]).all() for name in expected)
  assert card["encoder"] == {"name": "seeing", **card["encoder"], **ABOUT}
  assert card["classes"] == ["class 0", "class 1"] and card["temperature"] > 0
  assert network.settings["pooling"] == "attention"


def test_a_dry_run_counts_the_trainings_and_leaves_nothing(
  source, tmp_path, capsys
):
  config = config_of(source, seeds=2)
  looked = workdir.look(tmp_path / "run", config.to_dict(), shared=True)
  assert slides.run(config, looked) == 0 and not list(tmp_path.iterdir())
  told = capsys.readouterr().out
  assert "12 trainings of 3 epochs" in told and "3 folds x 2 seeds" in told
  assert "seeing: 6 features" in told and "slides" in told


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"folds": 2}, "config.folds is 2"),
    ({"folds": 7}, "config.folds is 7, but the class class 0 has 6 groups"),
    ({"seeds": 0}, "config.seeds"),
    ({"metric": "f1"}, "config.metric"),
    ({"metric": "loss"}, "config.metric"),
    ({"epoch_metric": "f1"}, "config.epoch_metric"),
    ({"pooling.name": "attention,median"}, "config.pooling.name is 'median'"),
    ({"pooling.name": ""}, "config.pooling.name"),
    ({"pooling.embedding": (8, 0)}, "config.pooling.embedding"),
    ({"pooling.dropout": 1.0}, "config.pooling.dropout"),
    ({"data.cache": -1.0}, "config.data.cache"),
    ({"batch_size": 0}, "config.batch_size"),
  ],
)
def test_a_mistake_is_one_line_before_any_work(source, tmp_path, changes, says):
  with pytest.raises(errors.UsageError, match=says) as error:
    run(config_of(source, **changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("preset", ["histotransfer", "ilse", "clam", "eva"])
def test_presets_are_configs(preset):
  config = configs.load("slides", preset)
  assert slides.make_plan(config)


def test_an_unknown_preset_is_named():
  with pytest.raises(errors.UsageError, match="did you mean 'clam'"):
    configs.load("slides", "clamm")


# --- whole runs --------------------------------------------------------------


@pytest.mark.slow
def test_slides_that_fail_are_left_out_for_all_encoders(source, tmp_path):
  """NaN, no tissue and a missing file, each of one encoder; the run ends with
  1, says so, and scores both on the same slides."""
  root = tmp_path / "copy"
  shutil.copytree(source.parent, root)
  bad = making.features(3, False, 9)
  bad[2] = np.inf
  making.write_file(root / "blind" / "slide03.h5", bad, "clam")
  making.write_file(root / "seeing" / "slide08.h5", bad[:0], **ABOUT)
  (root / "seeing" / "slide13.h5").unlink()
  config = config_of(root / "labels.csv", **{"data.max_failures": 0.2})
  assert run(config, tmp_path / "run") == 1
  with open(tmp_path / "run" / "failures.csv", newline="") as f:
    reasons = {row["name"]: row["reason"] for row in csv.DictReader(f)}
  assert list(reasons) == ["slide03", "slide08", "slide13"]
  assert "1 of 9 tiles" in reasons["slide03"]
  for name in ("blind", "seeing"):
    lines, _ = configs.read_predictions(tmp_path / "run", tap=name)
    assert len(lines) == 21 and not {r["name"] for r in lines} & set(reasons)
  results = results_of(tmp_path / "run")
  typed.check_results(results)
  assert results["summary"]["failures"] == 3
  assert "3 slides were left out" in (tmp_path / "run/report.html").read_text()
  config = config_of(root / "labels.csv", **{"data.max_failures": 0.05})
  with pytest.raises(errors.UnreadableError, match="2 of 24 slides"):
    run(config, tmp_path / "strict")


@pytest.mark.slow
def test_poolings_seeds_and_given_splits(tmp_path):
  """Three classes, two poolings, two seeds, no folds: the table's own splits;
  a patient of two labels is left out of the scores of patients."""
  table = making.write_slides(tmp_path, 36, classes=3)
  with open(table, newline="") as f:
    rows = list(csv.DictReader(f))
  splits = ["train"] * 18 + ["val"] * 6 + ["test"] * 12
  labels = [row["label"] for row in rows]
  labels[35] = "class 0"
  making.write_table(
    table,
    [
      ("slide", "label", "group", "split"),
      *(
        (row["slide"], label, row["group"], split)
        for row, label, split in zip(rows, labels, splits, strict=True)
      ),
    ],
  )
  config = config_of(
    table,
    folds=0,
    seeds=2,
    **{
      "data.features": str(tmp_path / "features"),
      "pooling.name": "max,gated_attention",
      "batch_size": 2,
      "bag_size": 10,
    },
  )
  path = tmp_path / "run"
  assert run(config, path) == 0
  results = results_of(path)
  typed.check_results(results)
  summary = results["summary"]
  assert summary["rows"] == {"train": 18, "val": 6, "test": 12}
  assert summary["repeats"] == "2 seeds"
  name = tmp_path.name
  assert [row["name"] for row in summary["table"]] == [
    f"{name}-max",
    f"{name}-gated_attention",
  ]
  assert any(
    "1 of 18 groups have slides of several" in n for n in summary["notes"]
  )
  for row in summary["table"]:
    assert row["patients_tested"] == 5 and row["tests"] == 2
    (point, *_) = row["operating"]
    assert sum(point["images"]) == 12
  folders = {p.name for p in (path / "attention").iterdir()}
  assert folders == {row["name"] for row in summary["table"]}
  lines, _ = configs.read_predictions(path)
  assert len(lines) == 2 * 2 * 12


class _Runs:
  """The same command, again and again, in one directory."""

  def __init__(self, table, path, cache):
    self.path = path
    root = pathlib.Path(__file__).parents[2]
    folders = ",".join(str(table.parent / name) for name in ("blind", "seeing"))
    changes = {
      **CHANGES,
      "epochs": 8,
      "data.source": table,
      "data.features": folders,
      "pooling.embedding": "8,",
    }
    self._command = [
      sys.executable,
      "-m",
      "jaxtransfer.main",
      f"--config={root / 'configs' / 'slides.py'}",
      f"--workdir={path}",
      *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    self._environment = os.environ | {
      "JAX_NUM_CPU_DEVICES": "1",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAXTRANSFER_CACHE": str(cache),
    }

  def start(self):
    return subprocess.Popen(
      self._command,
      env=self._environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def finish(self):
    process = self.start()
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output

  def marks(self):
    """How far it is: lines of journals, files of units and of attention."""
    count = 0
    for path in self.path.glob("units/*/metrics.jsonl"):
      count += path.read_bytes().count(b"\n")
    return count + len(list(self.path.glob("attention/*/*.h5")))

  def result(self):
    """Returns all that two equal runs must have in common."""
    measured = results_of(self.path)["measurements"]
    rows = [row for row in measured if row["metric"] != "training_seconds"]
    networks = {
      path.parent.name: path.read_bytes()
      for path in sorted(self.path.glob("units/*/model.safetensors"))
    }
    tiles = {
      f"{path.parent.name}/{path.name}": attention.read(path)
      for path in sorted(self.path.glob("attention/*/*.h5"))
    }
    of_tiles = {
      name: (of.attention.tolist(), of.scores.tolist(), of.attributes)
      for name, of in tiles.items()
    }
    predictions = (self.path / "predictions.csv").read_text()
    return rows, networks, of_tiles, predictions


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
  cache = tmp_path_factory.mktemp("compiled")
  runs = _Runs(source, tmp_path_factory.mktemp("whole") / "run", cache)
  runs.finish()
  assert len(runs.result()[1]) == 6
  return cache, runs.result()


@pytest.mark.slow
def test_twelve_kills_leave_the_run_of_none(source, undisturbed, tmp_path):
  """At random moments, of the trainings, the checkpoints, and of the writing of
  attention: every number, network and tile is that of an undisturbed run."""
  cache, expected = undisturbed
  runs = _Runs(source, tmp_path / "run", cache)
  draw, kills = random.Random(0), 0
  while kills < 12:
    before, process = runs.marks(), runs.start()
    wanted = before + draw.randint(1, 5)
    while process.poll() is None and runs.marks() < wanted:
      time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.2))
    process.kill()
    output, _ = process.communicate()
    if process.returncode == 0:
      break
    assert process.returncode == -signal.SIGKILL, output
    kills += 1
  assert kills >= 10, "the run ended before it was killed ten times"
  runs.finish()
  assert runs.result() == expected
  assert "is finished" in runs.finish()


@pytest.mark.slow
def test_three_processes_share_the_trainings_and_one_is_killed(
  source, undisturbed, tmp_path
):
  """Nothing is lost and nothing trained twice."""
  cache, expected = undisturbed
  runs = _Runs(source, tmp_path / "run", cache)
  running = [runs.start() for _ in range(3)]
  until = time.monotonic() + 300
  while runs.marks() < 4:
    assert time.monotonic() < until
    time.sleep(0.001)
  running[0].kill()
  said = [process.communicate(timeout=900)[0] for process in running]
  assert [p.returncode for p in running] == [-signal.SIGKILL, 0, 0], said
  assert runs.result() == expected
  lines = [line for text in said for line in text.splitlines()]
  trained = [line.split(":")[0] for line in lines if ": 8 epochs" in line]
  assert len(trained) == len(set(trained)) <= 6
