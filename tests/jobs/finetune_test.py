"""The fine-tuning job, whole, on small images and the stem of a network."""

import csv
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from jaxtransfer import workdir
from jaxtransfer.data import pipeline, preprocess, sources
from jaxtransfer.jobs import finetune
from jaxtransfer.weights import loading
from tests.jobs import configs

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Eighty 32-pixel images of two textures and twenty patients."""
  root = tmp_path_factory.mktemp("tiles")
  rng = np.random.default_rng(0)
  rows = []
  for i in range(80):
    label, patient = i % 2, i // 4
    wave = np.sin(np.arange(32) * (0.4 + 0.5 * label))
    noise = rng.normal(0, 60, (32, 32, 3))
    image = 128 + 60 * wave[:, None, None] + noise
    path = root / f"{i}.png"
    PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    rows.append((path.name, f"class {label}", f"patient {patient}"))
  with open(root / "manifest.csv", "w", newline="") as f:
    csv.writer(f).writerows([("path", "label", "group"), *rows])
  return root / "manifest.csv"


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


class _Runs:
  """Starts the same command again and again, as its user would."""

  def __init__(self, source, path, cache):
    self.path = path
    self._command = _command(source, path)
    self._environment = {
      **os.environ,
      "JAX_NUM_CPU_DEVICES": "1",
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
    """Sends a signal as soon as `when()`; returns exit code and output."""
    process = self.start()
    while process.poll() is None and not when():
      time.sleep(0.0005)
    process.send_signal(signal_number)
    output, _ = process.communicate()
    return process.returncode, output

  def saving(self):
    return any(self.path.glob("checkpoints/*tmp*"))

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
  return cache, runs.result()


def test_stopped_runs_end_as_one_that_was_not(source, uninterrupted, tmp_path):
  """Killed while it saves, then asked to end, then left alone: bit by bit the
  same parameters, and the same lines of metrics.jsonl. All that a step depends
  on is in the checkpoint, so where it was taken cannot matter."""
  cache, expected = uninterrupted
  runs = _Runs(source, tmp_path / "run", cache)
  code, output = runs.stop(runs.saving, signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  code, output = runs.stop(lambda: runs.lines() >= 5, signal.SIGTERM)
  assert code == 143, output
  assert "the same command resumes" in output
  runs.finish()
  assert runs.result() == expected
  # And a finished run is not run again.
  assert "is finished" in runs.finish()


@pytest.mark.slow
def test_twelve_kills(source, uninterrupted, tmp_path):
  """As above with twelve kills: six while a checkpoint is being written, six
  at random moments of the training."""
  cache, expected = uninterrupted
  runs = _Runs(source, tmp_path / "run", cache)
  draw = random.Random(0)
  during_save = 0
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
    during_save += runs.saving()
  assert number >= 9, "the run ended before it was killed ten times"
  assert during_save >= 3
  runs.finish()
  assert runs.result() == expected


def test_what_a_run_leaves(finished):
  """Every file that the design promises, and numbers that are numbers."""
  results = json.loads((finished / "results.json").read_text())
  rows = {(row["split"], row["metric"]): row for row in results["measurements"]}
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
  assert (finished / "report.html").exists()
  assert len(results["summary"]["epochs"]) == 4


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
