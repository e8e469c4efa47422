"""The search for a cut, whole, on small images and the smallest network."""

import collections
import csv
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import sklearn.metrics
from safetensors.numpy import load_file, save_file
from scipy import special

from jaxtransfer import errors, workdir
from jaxtransfer.data import dataset, preprocess, sources
from jaxtransfer.data import images as imaging
from jaxtransfer.jobs import truncate
from jaxtransfer.measure import bootstrap, metrics
from jaxtransfer.networks import zoo
from jaxtransfer.weights import loading
from tests import typed
from tests.jobs import configs

CHANGES = {
  "batch_size": 16,
  "epochs": 2,
  "log_steps": 1,
  "resamples": 20,
  "seeds": 2,
  "small": "",
  "layer_step": 0,
  "methods": "ttl,lwft",
  "taps": "block1,block2",  # and block4, the whole network
  "cost_batch_size": 8,
  "optimiser.learning_rate": 0.01,
  "data.image_size": 16,
  "network.weights": "",
  "augment.crop": 1.0,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Eighty small images of two textures and twenty patients."""
  return configs.write_tiles(tmp_path_factory.mktemp("tiles"), side=16)


def _config(source, network="cbr_tiny", **changes):
  config = configs.load("truncate", network)
  changes = {**CHANGES, "data.source": str(source), **changes}
  config.update_from_flattened_dict(changes)
  return config


def _run(config, path):
  with workdir.claim(
    path, config.to_dict(), "the command", shared=True
  ) as claimed:
    return truncate.run(config, claimed)


def _results(path):
  return json.loads((path / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
  """A finished run of two methods."""
  path = tmp_path_factory.mktemp("runs") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(path.parent / "cache"))
    assert _run(_config(source), path) == 0
  return path


def test_the_cut_is_the_shallowest_within_the_tolerance_on_validation(finished):
  """Recomputed from the single trainings, and not from what the job says of
  them; the test split has no part in it."""
  summary = _results(finished)["summary"]
  scores = collections.defaultdict(list)
  for unit in (finished / "units").iterdir():
    method, cut, weights, _ = unit.name.split("-")
    record = json.loads((unit / "done.json").read_text())
    if method == "ttl" and weights == "random":
      scores[cut].append(record["val"]["auroc"])
  assert {len(values) for values in scores.values()} == {2}
  means = {cut: np.mean(values) for cut, values in scores.items()}
  best = max(means.values())
  good = [c for c in ("block1", "block2", "block4") if c in means]
  good = [cut for cut in good if means[cut] >= best - 0.01]
  assert summary["cut"] == good[0]
  for one in summary["search"]:
    if one["method"] == "ttl":
      assert one["value"] == pytest.approx(means[one["cut"]])
      assert one["low"] <= one["high"]
      assert one["chosen"] == (one["cut"] == good[0])


def test_a_dry_run_counts_the_trainings_that_a_run_makes(
  finished, source, tmp_path, capsys
):
  """Between the least and the most that it names lie those that were made."""
  config = _config(source)
  looked = workdir.look(tmp_path / "run", config.to_dict(), shared=True)
  assert truncate.run(config, looked) == 0 and not list(tmp_path.iterdir())
  told = capsys.readouterr().out
  least, most = re.search(r"(\d+)(?: to (\d+))? trainings of", told).groups()
  made = len(list(finished.glob("units/*/done.json")))
  assert int(least) <= made <= int(most or least)


def test_what_a_run_leaves(finished):
  """The files of a workdir, and a table with a row of every method."""
  names = {path.name for path in finished.iterdir()}
  assert {
    "config.json",
    "results.json",
    "results.csv",
    "report.html",
    "splits.json",
    "export",
    "units",
  } <= names
  assert configs.check_json(finished) > 20
  results = _results(finished)
  typed.check_results(results)
  methods = {row["method"] for row in results["summary"]["table"]}
  assert "lwft" in methods and "ttl" in methods
  for row in results["summary"]["table"]:
    assert row["latency_ms"] > 0 and row["images_per_second"] > 0
    assert 0 < row["trained_params"] <= row["params"]
    score = row["test"]["auroc"]
    assert score["mean"] == pytest.approx(np.mean(score["values"]))
    assert score["sd"] == pytest.approx(np.std(score["values"], ddof=1))
  read = {r["metric"] for r in results["measurements"] if r["split"] == "test"}
  assert {"auroc", "auprc"} <= read
  # A checkpoint is three times a network; none is left.
  assert not list(finished.glob("units/*/checkpoints"))


def _logits(path, unit, split="test"):
  with np.load(path / "units" / unit / f"{split}.npz") as stored:
    return stored["rows"], stored["logits"].astype(float)


def _resampled(path, source, units, metric="auroc", folds=False):
  """Returns a row's resampled metric, from what its units left."""
  examples = sources.open_source(_config(source).data)
  found = []
  for repeat, unit in enumerate(units):
    rows, logits = _logits(path, unit)
    labels = examples.labels[rows]
    groups = [examples.groups[r] for r in rows]
    seed = (0, repeat) if folds else 0
    weights = bootstrap.resample_weights(labels, groups, 20, seed)
    scores = special.softmax(logits, axis=1)
    score = metrics.METRICS[metric].function
    found.append(score(labels, scores, weights))
  return np.mean(found, axis=0)


@pytest.mark.parametrize("metric", ["auroc", "accuracy"])
def test_what_the_sentence_compares_is_paired(finished, source, metric):
  """The interval of the difference is that of differences in the same
  resamples, recomputed from the logits that the trainings left."""
  results = _results(finished)
  table = results["summary"]["table"]
  whole = next(row for row in table if row["whole"])
  assert whole["cut"] == "block4" and whole["against_ftl"] is None
  of_whole = _resampled(
    finished, source, [f"ttl-block4-random-{i}" for i in range(2)], metric
  )
  rows = {
    (row["probe"], row["tap"]): row
    for row in results["measurements"]
    if row["metric"] == f"{metric}:against_ftl"
  }
  others = [row for row in table if not row["whole"]]
  assert others and len(rows) == len(others)
  for row in others:
    units = [f"{row['method']}-{row['cut']}-random-{i}" for i in range(2)]
    again = _resampled(finished, source, units, metric) - of_whole
    difference = row["test"][metric]["mean"] - whole["test"][metric]["mean"]
    found = list(row["against_ftl"][metric].values())
    np.testing.assert_allclose(
      found, [difference, *bootstrap.interval(again)], atol=1e-12
    )
    said = rows[row["method"], row["cut"]]
    assert [said[key] for key in ("value", "low", "high")] == found
  chosen = next(row for row in table if row["chosen"])
  assert chosen["against_chosen"] is None
  assert all(r["against_chosen"] for r in table if r is not chosen)


def test_trainings_that_ended_early_are_counted_and_said(finished):
  summary = _results(finished)["summary"]
  records = [
    json.loads(path.read_text()) for path in finished.glob("units/*/done.json")
  ]
  late = sum(record["best_epoch"] == 2 for record in records)
  assert summary["unfinished"] == {
    "trainings": len(records),
    "at_last_epoch": late,
  }
  said = f"{late} of {len(records)} trainings had their best epoch at the last"
  assert (said in summary["sentence"]) == (late > 0)
  assert summary["sentence"].count(". ") <= 3


def test_thresholds_are_chosen_by_every_training_on_its_validation(
  finished, source
):
  """Their sensitivities are averaged; the exported network's own thresholds
  stand in its card."""
  results = _results(finished)
  table = results["summary"]["table"]
  chosen = next(row for row in table if row["chosen"])
  youden = chosen["operating"][0]
  assert (youden["class"], youden["rule"]) == ("class 1", "youden")
  assert len(youden["thresholds"]) == 2
  seed = results["summary"]["exported"]["seed"]
  card = json.loads((finished / "export" / "model.json").read_text())
  point = card["operating_points"]["points"][0]
  assert point["threshold"] == pytest.approx(youden["thresholds"][seed])
  values = youden["test"]["sensitivity"]["values"]
  assert point["test"]["sensitivity"]["value"] == pytest.approx(values[seed])
  (row,) = [
    row
    for row in results["measurements"]
    if row["metric"] == "sensitivity@youden:class 1"
    and (row["probe"], row["tap"]) == (chosen["method"], chosen["cut"])
  ]
  assert row["value"] == pytest.approx(np.mean(values)) and row["n"] > 0
  assert "At a threshold" in (finished / "report.html").read_text()


def test_the_export_is_the_network_that_was_measured(finished, source):
  """Loaded as a user loads it, it gives the logits that were kept of the test
  split."""
  summary = _results(finished)["summary"]
  card = json.loads((finished / "export" / "model.json").read_text())
  assert card["until"] == summary["cut"]
  assert card["classes"] == ["class 0", "class 1"]
  assert card["resize"] == imaging.resize_card(16)
  exported = finished / "export" / "model.safetensors"
  model = loading.create_model(
    "cbr_tiny",
    until=None if summary["cut"] == "block4" else summary["cut"],
    weights=exported,
    keep_head=True,
  )
  unit = f"ttl-{summary['cut']}-random-{summary['exported']['seed']}"
  with np.load(finished / "units" / unit / "test.npz") as stored:
    rows, logits = stored["rows"], stored["logits"]
  examples = sources.open_source(_config(source).data)
  images = np.stack([examples.read(row) for row in rows])
  found = model(preprocess.preprocess(images, card["mean"], card["std"]))
  assert np.abs(np.asarray(found) - logits).max() < 1e-4 * np.abs(logits).max()


def test_nothing_is_trained_twice(finished, source, tmp_path):
  """Without its results, the run only measures again; without a unit, it
  trains this one to the same bits."""
  units = finished / "units"
  before = _results(finished)
  stamps = {p: p.stat().st_mtime_ns for p in units.glob("*/done.json")}
  lost = units / "ttl-block2-random-1"
  numbers = load_file(lost / "model.safetensors")
  for path in lost.iterdir():
    path.unlink()
  (finished / "results.json").unlink()
  assert _run(_config(source), finished) == 0
  for path, stamp in stamps.items():
    assert (path.stat().st_mtime_ns == stamp) == (path.parent != lost)
  again = load_file(lost / "model.safetensors")
  assert all(np.array_equal(numbers[n], again[n]) for n in numbers)
  after = _results(finished)

  def scores(results):
    return [
      row
      for row in results["measurements"]
      if row["metric"] in ("auroc", "auprc", "accuracy")
    ]

  assert scores(before) == scores(after)


@pytest.mark.slow
def test_halving_drops_cuts_and_changes_no_other(finished, source, tmp_path):
  """A training that was paused and went on is that which never paused."""
  path = tmp_path / "run"
  _run(_config(source, halving=1, methods="ttl", taps="blocks"), path)
  summary = _results(path)["summary"]
  assert "halving" in summary["halving"]
  stopped = {one["cut"] for one in summary["search"] if one["stopped"]}
  assert stopped and "block4" not in stopped
  # They are drawn with what they came to, and stand in no other measurement.
  assert all(one["value"] is not None for one in summary["search"])
  assert not stopped & {row["tap"] for row in _results(path)["measurements"]}
  for unit in (path / "units").iterdir():
    if unit.name.split("-")[1] in stopped:
      assert json.loads((unit / "paused.json").read_text())["epoch"] == 1
      continue
    whole = finished / "units" / unit.name / "model.safetensors"
    if whole.exists():
      numbers = load_file(whole)
      found = load_file(unit / "model.safetensors")
      assert all(np.array_equal(found[n], numbers[n]) for n in numbers)


@pytest.mark.slow
def test_halving_is_the_same_when_it_is_done_again(source, tmp_path):
  """What was trained after a round has no part in it: gone through a second
  time, as after a stop, with everything trained, it drops the same cuts."""
  path = tmp_path / "run"
  config = _config(source, halving=1, methods="ttl", taps="blocks", seeds=1)
  _run(config, path)
  before = _results(path)["summary"]["search"]
  # What a survivor came to later would turn the order around.
  for unit in path.glob("units/*/done.json"):
    record = json.loads(unit.read_text())
    record["val"]["auroc"] *= 1e-3
    unit.write_text(json.dumps(record))
  (path / "results.json").unlink()
  _run(config, path)
  after = _results(path)["summary"]["search"]
  assert [(one["cut"], one["stopped"]) for one in before] == [
    (one["cut"], one["stopped"]) for one in after
  ]


@pytest.mark.slow
def test_every_image_is_tested_once_by_folds(source, tmp_path):
  path = tmp_path / "run"
  config = _config(source, folds=3, methods="ttl", taps="block1")
  assert _run(config, path) == 0
  results = _results(path)
  typed.check_results(results)
  assert results["summary"]["repeats"] == "3 folds"
  assert results["summary"]["rows"] == {"each tested once": 80}
  rows = [
    np.load(p)["rows"] for p in sorted(path.glob("units/ttl-block4*/test.npz"))
  ]
  assert sorted(np.concatenate(rows)) == list(range(80))
  counts = {
    row["seed"]: row["n"]
    for row in results["measurements"]
    if row["metric"] == "auroc" and row["split"] == "test"
  }
  assert counts == {None: 80, **{i: len(of) for i, of in enumerate(rows)}}
  # Each fold has patients of its own, and is drawn on its own.
  units = [f"ttl-block4-random-{i}" for i in range(3)]
  again = _resampled(path, source, units, folds=True)
  whole = next(r for r in results["summary"]["table"] if r["whole"])
  low, high = bootstrap.interval(again)
  assert whole["test"]["auroc"]["low"] == pytest.approx(low)
  assert whole["test"]["auroc"]["high"] == pytest.approx(high)
  # Every image once, from the fold that tested it.
  _check_predictions(path, range(3))
  lines, _ = configs.read_predictions(path)
  assert len({line["name"] for line in lines}) == len(lines) == 80


def _check_predictions(path, seeds):
  """Scores predictions.csv with scikit-learn, by repeat, beside the table."""
  chosen = next(r for r in _results(path)["summary"]["table"] if r["chosen"])
  lines, _ = configs.read_predictions(path)
  assert {int(line["seed"]) for line in lines} == set(seeds)
  for seed in seeds:
    lines, values = configs.read_predictions(path, seed=str(seed))
    assert {line["tap"] for line in lines} == {chosen["cut"]}
    truth = [line["label"] == "class 1" for line in lines]
    score = sklearn.metrics.roc_auc_score(truth, values[:, 1])
    found = chosen["test"]["auroc"]["values"][seed]
    assert score == pytest.approx(found, abs=1e-12)


def test_predictions_are_those_of_the_exported_network(finished):
  summary = _results(finished)["summary"]
  _check_predictions(finished, [summary["exported"]["seed"]])
  page = (finished / "report.html").read_text()
  assert page.count('src="data:image/jpeg') > 12
  lines, _ = configs.read_predictions(finished)
  assert len(lines) == summary["rows"]["test"]
  assert float(lines[0]["temperature"]) == summary["temperature"]


def _fail(path, unit):
  (path / "units" / unit).mkdir(parents=True)
  reason = json.dumps({"reason": "the loss is nan"})
  (path / "units" / unit / "failed.json").write_text(reason)


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["block2", "block4"])
def test_a_failed_training_is_reported_and_the_rest_go_on(
  source, tmp_path, cut
):
  """Of a cut with a failed training nothing is chosen, and where it is the
  whole network nothing is compared with it; the run says so and ends with 1."""
  path = tmp_path / "run"
  _fail(path, f"ttl-{cut}-random-0")
  assert _run(_config(source, methods="ttl", seeds=1), path) == 1
  summary = _results(path)["summary"]
  assert summary["failed"] == [
    {"unit": f"ttl-{cut}-random-0", "reason": "the loss is nan"}
  ]
  stopped = {one["cut"]: one["stopped"] for one in summary["search"]}
  assert stopped.pop(cut) == "1 of 1 trainings failed"
  assert not any(stopped.values()) and summary["cut"] != cut
  tested = {row["cut"] for row in summary["table"]}
  assert tested and cut not in tested
  missing = "could not be trained" in summary["sentence"]
  assert missing == (cut == "block4")


@pytest.mark.slow
def test_a_baseline_that_fails_everywhere_is_left_out(source, tmp_path):
  path = tmp_path / "run"
  for cut in ("block1", "block2"):
    _fail(path, f"lwft-{cut}-random-0")
  assert _run(_config(source, seeds=1), path) == 1
  summary = _results(path)["summary"]
  assert {row["method"] for row in summary["table"]} <= {"ttl", "ftl"}
  assert len(summary["failed"]) == 2


@pytest.mark.slow
def test_every_baseline_stands_in_the_table(finished, source, tmp_path):
  """Both stages and all methods, from weights: each row of the table is there
  a second time from random ones, and the small network once."""
  exported = finished / "units" / "ttl-block4-random-0" / "model.safetensors"
  # Without our header: somebody's file, of which something is assumed.
  weights = tmp_path / "model.safetensors"
  save_file(load_file(exported), weights)
  config = _config(
    source,
    methods="ttl,lwft,fat,tf",
    taps="block2",
    layer_step=1,
    layerwise="ttl,lwft",
    small="cbr_tiny",
    seeds=1,
    epochs=1,
    **{"network.weights": str(weights)},
  )
  path = tmp_path / "run"
  assert _run(config, path) == 0
  results = _results(path)
  summary = results["summary"]
  second = {
    method: {
      one["cut"]
      for one in summary["search"]
      if (one["method"], one["stage"]) == (method, "layers")
    }
    for method in ("ttl", "lwft", "fat", "tf")
  }
  # Around block2 both, around the whole network what lies between.
  assert second["ttl"] in ({"block1", "block3"}, {"block3"})
  assert second["lwft"] == {"block1", "block3"}
  assert not second["fat"] | second["tf"]
  rows = summary["table"]
  of = collections.defaultdict(set)
  for row in rows:
    of[row["weights"]].add((row["name"], row["cut"]))
  small = {("cbr_tiny", None)}
  assert of["pretrained"] and of["random"] - small == of["pretrained"]
  methods = {row["method"] for row in rows}
  assert methods >= {"ftl", "lwft", "fat", "tf", "cbr_tiny"}
  assert sum(row["chosen"] for row in rows) == 1
  # Its second row holds nothing pretrained, and does not say so.
  of_tf = [row for row in rows if row["method"] == "tf"]
  assert all(row["words"].startswith(row["weights"]) for row in of_tf)
  assert {row["weights"] for row in of_tf} == {"pretrained", "random"}
  named = {
    (row["probe"], row["network"], row["weights"])
    for row in results["measurements"]
    if row["split"] == "test"
  }
  assert ("cbr_tiny", "cbr_tiny", "random") in named
  assert ("ftl", "cbr_tiny", "model.safetensors") in named
  assert sum("are assumed" in note for note in summary["notes"]) == 1


@pytest.mark.slow
def test_unreadable_images_are_listed_whatever_split_they_are_in(
  source, tmp_path
):
  """Seven broken files of eighty: each is named once, and it ends with 1."""
  rows = list(csv.DictReader(source.open()))
  for i, row in enumerate(rows):
    row["path"] = str(source.parent / row["path"])
    if i % 13 == 0:
      row["path"] = str(tmp_path / f"broken{i}.png")
      (tmp_path / f"broken{i}.png").write_text("no image")
  with open(tmp_path / "manifest.csv", "w", newline="") as f:
    writer = csv.DictWriter(f, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  config = _config(
    tmp_path / "manifest.csv",
    methods="ttl",
    seeds=1,
    taps="block1",
    **{"data.max_failures": 0.5},
  )
  assert _run(config, tmp_path / "run") == 1
  listed = list(csv.reader((tmp_path / "run" / "failures.csv").open()))[1:]
  names = sorted(pathlib.Path(line[0]).name for line in listed)
  assert names == sorted(f"broken{i}.png" for i in range(0, 80, 13))
  results = _results(tmp_path / "run")
  planned = json.loads((tmp_path / "run" / "splits.json").read_text())
  broken = set(range(0, 80, 13))
  read = {s: len(set(planned[s]) - broken) for s in ("train", "val", "test")}
  assert results["summary"]["rows"] == read
  scored = [r for r in results["measurements"] if r["metric"] == "auroc"]
  assert scored and all(row["n"] == read[row["split"]] for row in scored)
  said = f"The test split holds {read['test']} images of"
  assert any(note.startswith(said) for note in results["summary"]["notes"])


@pytest.mark.slow
def test_a_diverged_training_fails_alone(source, tmp_path):
  """At an absurd rate nothing can be chosen: one line, and the reasons stay."""
  config = _config(
    source, methods="ttl", seeds=1, **{"optimiser.learning_rate": 1e30}
  )
  with pytest.raises(errors.RunError, match="no cut of ttl"):
    _run(config, tmp_path / "run")
  reasons = list((tmp_path / "run" / "units").glob("*/failed.json"))
  assert len(reasons) == 3


def _start(source, path):
  """Starts a process that trains all repeats of all cuts with TTL."""
  changes = {**CHANGES, "data.source": str(source), "methods": "ttl"}
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "jaxtransfer.main",
      f"--config={configs.ROOT}/configs/truncate.py:cbr_tiny",
      f"--workdir={path}",
      *(f"--config.{key}={value}" for key, value in changes.items()),
    ],
    env={**os.environ, "JAXTRANSFER_CACHE": str(path.parent / "cache")},
    cwd=configs.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.slow
def test_a_process_killed_in_a_training_is_replaced_by_the_other(
  finished, source, tmp_path
):
  """Its lock goes with it: the other goes on from its last checkpoint, and the
  networks are those of a run that nobody disturbed, bit by bit."""
  path = tmp_path / "run"
  killed, other = _start(source, path), _start(source, path)
  try:
    said = next(x for x in killed.stdout if x.startswith("training "))
    unit = path / "units" / re.search(r"ttl-\S+-random-\d", said)[0]
    log = unit / "metrics.jsonl"
    until = time.monotonic() + 300
    while not (log.exists() and "val" in log.read_text()):
      assert killed.poll() is None and time.monotonic() < until
      time.sleep(0.001)
    killed.kill()
    assert not (unit / "done.json").exists()
    output, _ = other.communicate(timeout=600)
    assert other.returncode == 0 and f"{unit.name}: 2 epochs" in output, output
  finally:
    killed.kill()
    other.kill()
  for one in (path / "units").iterdir():
    numbers = load_file(one / "model.safetensors")
    expected = load_file(finished / "units" / one.name / "model.safetensors")
    assert all((numbers[n] == expected[n]).all() for n in expected), one.name
  assert len(list((path / "units").iterdir())) == 6


@pytest.mark.slow
def test_two_processes_share_the_trainings(source, tmp_path):
  """Each says what it has trained: together everything, nothing twice."""
  path = tmp_path / "run"
  running = [_start(source, path) for _ in range(2)]
  said = [process.communicate(timeout=300)[0] for process in running]
  assert [process.returncode for process in running] == [0, 0], said
  lines = [line for text in said for line in text.splitlines()]
  trained = [x.split(":")[0] for x in lines if ": 2 epochs" in x]
  expected = {f"ttl-block{b}-random-{s}" for b in (1, 2, 4) for s in range(2)}
  assert sorted(trained) == sorted(expected)
  assert _results(path)["summary"]["cut"]


def test_the_second_stage_looks_around_the_best_block():
  """The 17 points of ResNet-50 that Peng et al. number, and DenseNet's within
  the winning block."""
  plan = truncate.make_plan(configs.load("truncate", "resnet50"))
  assert plan.blocks == ("layer1", "layer2", "layer3", "layer4")
  assert len(plan.layers) == 17
  around = plan.around("ttl", "layer3", 1)
  assert around == [
    *(f"layer3.{i}" for i in range(5)),
    *(f"layer4.{i}" for i in range(2)),
  ]
  assert plan.around("ttl", "layer1", 1)[0] == "stem"
  assert plan.around("ttl", "layer4", 1) == ["layer4.0", "layer4.1"]
  assert plan.around("ttl", "layer3", 2) == ["layer3.1", "layer3.3", "layer4.1"]

  plan = truncate.make_plan(configs.load("truncate", "densenet121"))
  assert plan.blocks == (
    "transition1",
    "transition2",
    "transition3",
    "norm5",
  )
  around = plan.around("ttl", "transition2", 1)
  assert around == [f"denseblock2.denselayer{i}" for i in range(1, 13)]


def test_the_whole_network_may_end_earlier(source):
  """With weights that end at layer3, that is what is called whole."""
  config = _config(
    source, "resnet18", taps="blocks", **{"network.until": "layer3"}
  )
  plan = truncate.make_plan(config)
  assert plan.blocks == ("layer1", "layer2", "layer3")
  assert plan.around("ttl", "layer3", 1) == ["layer3.0"]
  config.network.weights = "cifar10-resnet18"
  data = dataset.open_divisions(config, source.parent / "none.json")
  weights = loading.resolve_weights("resnet18", config.network.weights)
  bench = truncate._Bench(
    config, plan, truncate.parallel.Devices(), data, weights, source.parent
  )
  for method in ("ttl", "lwft", "tf"):
    (unit, _) = bench.units(method, "layer2")
    last = bench.network(unit).layer_names[-1]
    assert last == ("layer2.1" if method == "ttl" else "layer3.1")


def test_methods_train_what_they_say(source):
  """Frozen layers and half widths, counted on ResNet-18."""
  config = _config(
    source, network="resnet18", methods="ttl,lwft,fat,tf", taps="blocks"
  )
  plan = truncate.make_plan(config)
  data = dataset.open_divisions(config, source.parent / "none.json")
  weights = loading.resolve_weights("resnet18", None)
  bench = truncate._Bench(
    config, plan, truncate.parallel.Devices(), data, weights, source.parent
  )
  layers = {x.name: x.params for x in zoo.list_layers("resnet18")}

  def trained(method, cut):
    (unit, _) = bench.units(method, cut)
    return bench.training(unit, bench.network(unit)).trained_params

  head = 512 * 2 + 2
  assert trained("ttl", "layer4") == layers["layer4"] + head
  assert trained("ttl", "layer2") == layers["layer2"] + 128 * 2 + 2
  assert trained("lwft", "layer2") == layers["layer4"] - layers["layer2"] + head
  assert trained("fat", "layer3") == 256 * 2 + 2
  narrow = zoo.build("resnet18", slim_after="layer3", num_classes=2)
  params, _ = zoo.count(narrow)
  assert trained("tf", "layer3") == params + 256 * 2 + 2
  assert params < layers["layer4"]


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"methods": "lwft"}, "ttl"),
    ({"methods": "ttl,ftl"}, "config.methods"),
    ({"small": "resnet18"}, "config.small"),
    ({"metric": "loss"}, "config.metric"),
    ({"folds": 2}, "config.folds"),
    ({"halving": -1}, "config.halving"),
    ({"halving": 2}, "4 epochs or more"),
    ({"halving": 9, "epochs": 500}, "512 epochs or more"),
    ({"network.until": "block1"}, "block2"),
    ({"taps": "block9"}, "block9"),
    ({"taps": "block4"}, "--config.methods=ttl"),
  ],
)
def test_mistakes_are_said_before_any_work(source, tmp_path, changes, says):
  with pytest.raises(errors.UsageError, match=says):
    _run(_config(source, **changes), tmp_path / "run")
  assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock"}


def test_units_have_names_of_their_own():
  """Two trainings in one directory would be one."""
  unit = truncate.Unit("ttl", "layer2.0", "pretrained", 1)
  others = [
    dataclasses.replace(unit, **change)
    for change in (
      {"method": "fat"},
      {"cut": "layer2"},
      {"weights": "random"},
      {"repeat": 2},
    )
  ]
  assert len({u.name for u in (unit, *others)}) == 5
