"""The fine-tuning job, whole, on small images and the stem of a network."""

import csv
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sklearn.metrics

from jaxtransfer import errors, workdir
from jaxtransfer.data import images, pipeline, preprocess, sources
from jaxtransfer.jobs import finetune
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.weights import loading
from tests import typed
from tests.jobs import configs
from tests.weights import torchzip

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Eighty 32-pixel images of two textures and twenty patients."""
  return configs.write_tiles(tmp_path_factory.mktemp("tiles"))


CHANGES = {
  "batch_size": 16,
  "epochs": 4,
  "log_steps": 2,
  "checkpoint_steps": 2,
  "resamples": 50,
  "optimiser.learning_rate": 0.01,
  "data.image_size": 32,
  "network.until": "stem",
  "network.weights": "",
  "augment.crop": 1.0,
  "augment.quarter_turns": True,
}


def _config(source, **changes):
  config = configs.load("finetune", "resnet18")
  changes = {**CHANGES, "data.source": str(source), **changes}
  config.update_from_flattened_dict(changes)
  return config


def _run(config, path):
  with workdir.claim(path, config.to_dict(), "the command") as claimed:
    return finetune.run(config, claimed)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
  """A finished run."""
  path = tmp_path_factory.mktemp("runs") / "run"
  config = _config(source, batch_size=16)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(path.parent / "cache"))
    assert _run(config, path) == 0
  return path


def _command(source, path, **changes):
  changes = {**CHANGES, "data.source": str(source), **changes}
  return [
    sys.executable,
    "-m",
    "jaxtransfer.main",
    f"--config={ROOT}/configs/finetune.py:resnet18",
    f"--workdir={path}",
    *(f"--config.{key}={value}" for key, value in changes.items()),
  ]


# What a step can depend on: a learning rate that changes, averaged numbers,
# parts of a batch, two devices.
STATE = {
  "epochs": 12,
  "optimiser.learning_rate": 0.5,
  "schedule.patience": 0,
  "average": 0.5,
  "accumulate": 2,
}


class _Runs:
  """Starts the same command again and again, as its user would."""

  def __init__(self, source, path, cache, **changes):
    self.path = path
    self._command = _command(source, path, **STATE, **changes)
    self._left = set()
    self._environment = {
      **os.environ,
      "JAX_NUM_CPU_DEVICES": "2",
      # What is compiled once serves all runs: seconds instead of minutes.
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

  def start(self):
    return subprocess.Popen(
      self._command,
      env=self._environment,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def finish(self):
    process = self.start()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output

  def stop(self, when, signal_number):
    """Sends a signal as soon as `when()`; returns exit code and output.

    The code is the signal's only where it came before the end.
    """
    self._left = self._unfinished()
    process = self.start()
    while process.poll() is None and not when():
      time.sleep(0.0005)
    process.send_signal(signal_number)
    output, _ = process.communicate()
    return process.returncode, output

  def saving(self):
    """Whether a checkpoint is begun and not ended since the last start."""
    found = self._unfinished()
    # One that an earlier process left is of this one once it was gone.
    self._left &= found
    return bool(found - self._left)

  def _unfinished(self):
    return set(self.path.glob("checkpoints/*tmp*"))

  def lines(self):
    log = self.path / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0

  def result(self):
    """Returns all that two equal runs must have in common."""
    lines = (self.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
      del record["timing"]
    results = json.loads((self.path / "results.json").read_text())
    return (
      records,
      results["measurements"],
      (self.path / "export" / "model.safetensors").read_bytes(),
    )


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
  cache = tmp_path_factory.mktemp("compiled")
  runs = _Runs(source, tmp_path_factory.mktemp("runs") / "whole", cache)
  runs.finish()
  records, *_ = expected = runs.result()
  rates = {r["learning_rate"] for r in records if r["event"] == "train"}
  assert len(rates) > 1, "the plateau never came"
  return cache, expected


@pytest.mark.slow
def test_stopped_runs_end_as_one_that_was_not(source, uninterrupted, tmp_path):
  """Killed while it saves, then asked to end, then left alone: bit by bit the
  same parameters, and the same lines of metrics.jsonl. All that a step depends
  on is in the checkpoint, so where it was taken cannot matter."""
  cache, expected = uninterrupted
  # Nothing is saved within an epoch, but for SIGTERM.
  runs = _Runs(source, tmp_path / "run", cache, checkpoint_steps=1000)
  code, output = runs.stop(runs.saving, signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  # The sixth line is of step 8, the second step of three of the third epoch.
  code, output = runs.stop(lambda: runs.lines() >= 6, signal.SIGTERM)
  assert code == 143, output
  assert "the same command resumes" in output
  log = runs.path / "metrics.jsonl"
  before = log.read_text()
  output = runs.finish()
  # In a line, because nobody sees a bar: from where, and what comes out of it.
  assert "training goes on at epoch " in output, output
  assert re.search("training: epoch . of 12, validation loss ", output)
  assert runs.result() == expected
  # Not a line was measured again: their timing, too, is what it was.
  assert log.read_text().startswith(before)
  # And a finished run is not run again.
  assert "is finished" in runs.finish()


@pytest.mark.slow
def test_twelve_kills(source, uninterrupted, tmp_path):
  """As above with twelve kills, at least ten of which came before the run's
  end: six while a checkpoint is being written, the others at random moments of
  the training."""
  cache, expected = uninterrupted
  runs = _Runs(source, tmp_path / "run", cache)
  draw = random.Random(0)
  kills = during_save = 0
  for number in range(12):
    before = runs.lines()

    def moment(number=number, before=before):
      if number % 2 == 0:
        return runs.saving()
      if runs.lines() > before:
        time.sleep(draw.uniform(0, 0.15))
        return True
      return False

    code, output = runs.stop(moment, signal.SIGKILL)
    if code == 0:
      break
    assert code == -signal.SIGKILL, output
    kills += 1
    during_save += runs.saving()
  assert kills >= 10, "the run ended before it was killed ten times"
  assert during_save >= 3
  runs.finish()
  assert runs.result() == expected


def test_what_a_run_leaves(finished):
  """Every file that the design promises, and numbers that are numbers."""
  results = json.loads((finished / "results.json").read_text())
  rows = {(row["split"], row["metric"]): row for row in results["measurements"]}
  typed.check_results(results)
  assert rows["test", "auroc"]["low"] <= rows["test", "auroc"]["value"]
  assert rows["test", "auroc"]["value"] <= rows["test", "auroc"]["high"]
  for name in ("ece", "brier", "loss", "accuracy", "auprc", "auroc:class 1"):
    assert ("test", name) in rows and ("val", name) in rows
  # Fitted there, a temperature cannot make the likelihood worse.
  assert (
    rows["val", "loss:calibrated"]["value"]
    <= rows["val", "loss"]["value"] + 1e-6
  )
  confusion = np.array(results["summary"]["confusion"])
  assert confusion.sum() == rows["test", "accuracy"]["n"]
  accuracy = np.trace(confusion) / confusion.sum()
  assert accuracy == pytest.approx(rows["test", "accuracy"]["value"])
  page = (finished / "report.html").read_text()
  assert page.count('src="data:image/jpeg') > 12 and "Least confident" in page
  assert len(results["summary"]["epochs"]) == 4


def test_predictions_score_what_the_page_says(finished, source):
  """Recomputed from the file by scikit-learn; every test image stands in it,
  under the label and the patient that the source gives it."""
  results = json.loads((finished / "results.json").read_text())
  rows = {(row["split"], row["metric"]): row for row in results["measurements"]}
  lines, values = configs.read_predictions(finished)
  with open(source) as f:
    given = {row["path"]: row for row in csv.DictReader(f)}
  assert len({line["name"] for line in lines}) == len(lines)
  assert len(lines) == results["summary"]["rows"]["test"]
  for line in lines:
    row = given[line["name"]]
    assert (line["label"], line["group"]) == (row["label"], row["group"])
  truth = np.array([line["label"] == "class 1" for line in lines])
  score = sklearn.metrics.roc_auc_score(truth, values[:, 1])
  assert score == pytest.approx(rows["test", "auroc"]["value"], abs=1e-12)
  assert {float(line["temperature"]) for line in lines} == {
    results["summary"]["temperature"]
  }
  assert {line["tap"] for line in lines} == {"stem"}


def test_thresholds_and_doubts_stand_in_all_that_is_left(finished):
  """Sensitivity and specificity in the rows, on the page and in the card; the
  positive class by its name."""
  results = json.loads((finished / "results.json").read_text())
  summary = results["summary"]
  found = {
    (row["split"], row["metric"]): row for row in results["measurements"]
  }
  rules = ("youden", "sensitivity_0.9", "sensitivity_0.95")
  for rule in rules:
    assert found["val", f"threshold@{rule}:class 1"]["value"] is not None
    row = found["test", f"sensitivity@{rule}:class 1"]
    assert row["low"] <= row["value"] <= row["high"]
    table = np.array(summary["confusion"])
    assert row["n"] == table[1].sum()
    assert found["test", f"specificity@{rule}:class 1"]["n"] == table[0].sum()
  card = json.loads((finished / "export" / "model.json").read_text())
  points = card["operating_points"]["points"]
  assert {point["class"] for point in points} == {"class 1"}
  assert len(points) == len(rules)
  text = (finished / "report.html").read_text()
  assert "At a threshold" in text
  assert "Positive is class 1, negative class 0." in text
  late = summary["best_epoch"] == 4
  assert ("more epochs would help" in summary["sentence"]) == late


def test_a_score_that_is_no_number_is_null_in_every_file(source, tmp_path):
  """Validation of which one class alone can be read has no AUROC: the lines,
  checkpoints, results and the export hold null, which every reader of JSON
  takes, and the same command goes on from them to the same end."""
  rows = list(csv.DictReader(source.open()))
  for i, row in enumerate(rows):
    row["path"] = str(source.parent / row["path"])
    row["split"] = "train" if i < 40 else "test" if i < 60 else "val"
    if row["split"] == "val" and row["label"] == "class 1":
      row["path"] = str(tmp_path / f"broken{i}.png")
      pathlib.Path(row["path"]).write_text("no image")
  with open(tmp_path / "manifest.csv", "w", newline="") as f:
    writer = csv.DictWriter(f, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  changes = {"epochs": 2, "metric": "auroc", "data.max_failures": 0.9}
  config = _config(tmp_path / "manifest.csv", **changes)
  found = []
  for _ in range(2):
    assert _run(config, tmp_path / "run") == 1
    assert configs.check_json(tmp_path / "run") > 6
    path = tmp_path / "run" / "results.json"
    found.append(json.loads(path.read_text())["summary"])
    path.unlink()
  assert found[0]["epochs"] == found[1]["epochs"]
  assert [e["val"]["auroc"] for e in found[0]["epochs"]] == [None] * 2
  assert found[0]["best_epoch"] == found[1]["best_epoch"] == 1


def test_the_export_is_the_network_that_was_measured(finished, source):
  """Loaded back by name, cut and head, its decisions on the test split are
  those of the table of confusions."""
  card = json.loads((finished / "export" / "model.json").read_text())
  model = loading.create_model(
    "resnet18",
    until="stem",
    weights=finished / "export" / "model.safetensors",
    keep_head=True,
  )
  examples = sources.open_source(_config(source).data)
  rows = np.array(json.loads((finished / "splits.json").read_text())["test"])
  with pipeline.Batches(
    examples, rows, image_size=32, batch_size=len(rows)
  ) as batches:
    batch = next(batches)
  x = preprocess.preprocess(batch["image"], card["mean"], card["std"])
  chosen = np.asarray(model(x)).argmax(1)
  confusion = np.zeros((2, 2), int)
  np.add.at(confusion, (batch["label"], chosen), 1)
  results = json.loads((finished / "results.json").read_text())
  assert confusion.tolist() == results["summary"]["confusion"]
  assert card["until"] == "stem" and card["classes"] == ["class 0", "class 1"]
  assert card["resize"] == images.resize_card(32)


def test_what_a_file_of_weights_does_not_show_is_told(source, tmp_path, capsys):
  """Of a student and a teacher the key takes one; printed and on the page."""
  values = tensors.random(zoo.build("resnet18", until="stem"), 1)
  tree = {"student": values, "teacher": values | {"bn1.bias": np.ones(64)}}
  path = torchzip.save(tmp_path / "dino.pth", tree)
  config = _config(source, epochs=1, **{"network.weights": str(path)})
  with pytest.raises(errors.UsageError, match="config.network.prefix"):
    _run(config, tmp_path / "run")
  config.network.prefix = "teacher"
  assert _run(config, tmp_path / "run") == 0
  printed = capsys.readouterr().out
  notes = json.loads((tmp_path / "run" / "results.json").read_text())
  for word in ("left out: student/*", "no anti-aliasing"):
    assert sum(word in line for line in printed.splitlines()) == 1
    assert sum(word in note for note in notes["summary"]["notes"]) == 1
    assert word in (tmp_path / "run" / "report.html").read_text()


def test_several_labels_on_a_whole_map_with_a_frozen_trunk(source, tmp_path):
  """Findings that may be unknown, the flatten head, the head alone trained:
  every switch at once still ends with numbers and an export that loads."""
  rows = list(csv.DictReader(source.open()))
  words = ("stripes", "stripes;old", "-", "?stripes;old")
  for i, row in enumerate(rows):
    row["path"] = str(source.parent / row["path"])
    row["label"] = words[i % 4]
  with open(tmp_path / "many.csv", "w", newline="") as f:
    writer = csv.DictWriter(f, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  config = _config(
    tmp_path / "many.csv",
    **{
      "multilabel": True,
      "network.head": "flatten",
      "train_from": "head",
      "epochs": 1,
      "average": 0.5,
      "metric": "auroc",
      "accumulate": 2,
      "thumbnails": 0,
    },
  )
  assert _run(config, tmp_path / "run") == 0
  assert "<img" not in (tmp_path / "run" / "report.html").read_text()
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  typed.check_results(results)
  found = {
    row["metric"]: row
    for row in results["measurements"]
    if row["split"] == "test"
  }
  assert found["auroc:old"]["value"] is not None
  # A probability for each label, beside the label as the source has it; an
  # image of which a label is unknown has no part in that label's score.
  lines, values = configs.read_predictions(tmp_path / "run")
  assert {line["label"] for line in lines} == set(words)
  known = [i for i, line in enumerate(lines) if "?" not in line["label"]]
  old = ["old" in lines[i]["label"] for i in known]
  score = sklearn.metrics.roc_auc_score(old, values[known, 0])
  assert score == pytest.approx(found["auroc:old"]["value"], abs=1e-12)
  assert results["summary"]["classes"] == ["old", "stripes"]
  export = tmp_path / "run" / "export" / "model.safetensors"
  model = loading.create_model(
    "resnet18", until="stem", weights=export, keep_head=True
  )
  assert model.head.kernel.shape == (64 * 8 * 8, 2)
  start = loading.create_model(
    "resnet18", until="stem", num_classes=2, flatten=32
  )
  trunk = start.layers[0].conv1.kernel[...]
  np.testing.assert_array_equal(model.layers[0].conv1.kernel[...], trunk)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"epochs": 0}, "config.epochs is 0"),
    ({"batch_size": 12}, "multiple of 8: 8 devices"),
    ({"metric": "kappa"}, "config.metric"),
    ({"network.head": "mlp"}, "config.network.head"),
    ({"network.until": "layer9"}, "layer9"),
    ({"train_from": "layer2"}, "no layer 'layer2'"),
    ({"batch_norm": "group"}, "config.batch_norm"),
    ({"optimiser.name": "lion"}, "config.optimiser.name"),
    ({"augment.crop": 0.0}, "config.augment.crop"),
    (
      {
        "network.name": "densenet121",
        "network.until": "transition3",
        "data.image_size": 9,
      },
      "29 x 29",
    ),
    ({"loss.label_smoothing": 1.0}, "config.loss.label_smoothing"),
    ({"optimiser.learning_rate": 1e-7}, "below config.schedule.floor"),
    ({"seed": -1}, "config.seed is -1"),
    ({"data.workers": -1}, "config.data.workers is -1"),
    ({"accumulate": 0}, "config.accumulate is 0"),
    ({"sensitivities": (0.9, 95.0)}, "config.sensitivities is 95"),
    ({"prevalence": 1.0}, "config.prevalence is 1"),
    ({"positive": "cancer"}, "config.positive is 'cancer'"),
    ({"checkpoint_steps": 0}, "config.checkpoint_steps"),
    ({"data.split_fractions": (0.8, 0.2, 0.0)}, "the test split of"),
  ],
)
def test_mistakes_are_said_before_any_work(source, tmp_path, changes, says):
  """A usage error names the key, and the directory holds no run."""
  with pytest.raises(errors.UsageError, match=says):
    _run(_config(source, **changes), tmp_path / "run")
  left = {path.name for path in (tmp_path / "run").iterdir()}
  assert left == {".lock"}


@pytest.mark.parametrize(
  ("network", "layer", "kept", "first"),
  [
    ("resnet18", "layer3", "layer2.1", "layer3.0"),
    ("resnet18", "layer3.1", "layer3.0", "layer3.1"),
    ("densenet121", "transition3", "denseblock3.denselayer24", "transition3"),
    (
      "densenet121",
      "denseblock4",
      "transition3",
      "denseblock4.denselayer1",
    ),
  ],
)
def test_training_begins_with_the_first_layer_of_what_is_named(
  network, layer, kept, first
):
  """A stage is all its layers, and nothing before it is trained."""
  config = configs.load("finetune", network)
  config.train_from = layer
  plan = finetune.make_plan(config)
  names = zoo.build(network).layer_names
  assert names[plan.frozen - 1 : plan.frozen + 1] == (kept, first)


def test_the_recipe_of_the_embedded_weights_is_a_config_that_holds():
  """What configs/cifar10.py asks for passes every check but the download."""
  config = configs.load("cifar10")
  plan = finetune.make_plan(config)
  assert plan.network == "resnet18" and plan.until is None
  assert config.epochs == 13 and config.loss.label_smoothing == 0.05
  assert config.schedule.name == "one_cycle" and config.optimiser.name == "sgd"


def test_unreadable_images_are_listed_and_limited(source, tmp_path):
  """Two broken files of eighty: named, exit code 1, unless the limit is
  lower."""
  for name in ("run", "strict"):
    (tmp_path / name).mkdir()
  rows = list(csv.DictReader(source.open()))
  for i, row in enumerate(rows):
    row["path"] = str(source.parent / row["path"])
    if i in (0, 41):
      broken = tmp_path / f"broken{i}.png"
      broken.write_text("no image")
      row["path"] = str(broken)
  with open(tmp_path / "broken.csv", "w", newline="") as f:
    writer = csv.DictWriter(f, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  changes = {"epochs": 1, "data.max_failures": 0.2}
  config = _config(tmp_path / "broken.csv", **changes)
  assert _run(config, tmp_path / "run") == 1
  listed = (tmp_path / "run" / "failures.csv").read_text()
  assert "broken0.png" in listed and "broken41.png" in listed
  # What is counted is what was read: of images, of patients, and in words.
  planned = json.loads((tmp_path / "run" / "splits.json").read_text())
  summary = json.loads((tmp_path / "run" / "results.json").read_text())[
    "summary"
  ]
  for split, count in summary["rows"].items():
    assert count == len(set(planned[split]) - {0, 41})
  assert sum(summary["rows"].values()) == 78
  said = f"The test split holds {summary['rows']['test']} images of"
  assert any(note.startswith(said) for note in summary["notes"])
  config.data.max_failures = 0.0
  with pytest.raises(errors.RunError, match="broken"):
    _run(config, tmp_path / "strict")
