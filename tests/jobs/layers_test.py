"""The main job, whole, on small images and a small part of a network."""

import csv
import json
import pathlib

import jax
import numpy as np
import pytest
import sklearn.metrics
from safetensors.numpy import load_file, save_file

from jaxtransfer import errors, inference, workdir
from jaxtransfer.jobs import layers
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.weights import loading
from tests import typed
from tests.jobs import configs

TAPS = ("stem", "layer1.0", "layer1.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Sixty 32-pixel images of three textures and twelve patients."""
  return configs.write_tiles(
    tmp_path_factory.mktemp("tiles"), images=60, classes=3, per_patient=5
  )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A file of weights: another draw than those that the job makes."""
  network = zoo.build("resnet18", until="layer1")
  tensors.load(network, tensors.random(network, 77))
  path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
  loading.export(network, path)
  return path


def _config(source, weights, **changes):
  config = configs.load("layers", "resnet18")
  config.update(
    {
      "batch_size": 16,
      "cost_batch_size": 8,
      "resamples": 50,
      "seeds": 2,
      "strengths": (0.01, 1.0),
      "taps": "layers",
      "data": {"source": str(source), "image_size": 32},
      "network": {"weights": str(weights), "until": "layer1"},
    }
  )
  for key, value in changes.items():
    config.update_from_flattened_dict({key.replace("__", "."): value})
  return config


def _run(config, path):
  with workdir.claim(path, config.to_dict(), "jaxtransfer") as claimed:
    return layers.run(config, claimed)


@pytest.fixture(scope="module")
def finished(source, weights, tmp_path_factory):
  """One finished run, for all tests that only look at what it left."""
  path = tmp_path_factory.mktemp("run")
  assert _run(_config(source, weights), path) == 0
  return path


def _results(path: pathlib.Path):
  return json.loads((path / "results.json").read_text())


def _select(results, **said):
  return [
    row
    for row in results["measurements"]
    if all(row[key] == value for key, value in said.items())
  ]


def test_it_leaves_what_the_design_names(finished):
  for name in ("config.json", "metrics.jsonl", "report.html", "splits.json"):
    assert (finished / name).stat().st_size > 0
  assert configs.check_json(finished) == 6
  typed.check_results(_results(finished))
  with open(finished / "results.csv") as f:
    rows = list(csv.DictReader(f))
  assert len(rows) == len(_results(finished)["measurements"])
  assert list(rows[0]) == (
    "network weights tap probe metric split value low high n seed".split()
  )


def test_every_tap_network_probe_and_metric_is_measured(finished):
  """Three taps, one pretrained and two random networks, four of each."""
  results = _results(finished)
  assert results["summary"]["taps"] == list(TAPS)
  for metric in ("auroc", "auprc", "accuracy", "balanced_accuracy"):
    for probe in ("logistic", "linear_svm", "knn", "nearest_mean"):
      for tap in TAPS:
        said = {"tap": tap, "probe": probe, "metric": metric, "split": "test"}
        found = _select(results, **said)
        # Beside each network, the first probe's mean over seeds.
        main = (probe, metric) == ("logistic", "auroc")
        assert len(found) == 3 + main, said
        pretrained = _select(results, weights="mine.safetensors", **said)[0]
        assert pretrained["low"] <= pretrained["value"] <= pretrained["high"]


def test_gain_is_the_pretrained_score_less_the_random_mean(finished):
  """Recomputed here from the rows of single networks."""
  results = _results(finished)
  said = {"probe": "logistic", "split": "test"}
  for tap in TAPS:
    scores = _select(results, tap=tap, metric="auroc", **said)
    pretrained = [r["value"] for r in scores if r["weights"] != "random"]
    random = [r["value"] for r in scores if r["seed"] is not None]
    gain = _select(results, tap=tap, metric="auroc:gain", **said)[0]
    expected = pretrained[0] - np.mean(random)
    assert gain["value"] == pytest.approx(expected, abs=1e-12)
    spread = _select(results, tap=tap, metric="auroc:seed_sd", **said)[0]
    assert spread["value"] == pytest.approx(np.std(random, ddof=1))


def test_the_cut_follows_its_rule_on_the_validation_split(finished):
  """The shallowest tap without a loss beyond the tolerance in its interval."""
  results = _results(finished)
  summary = results["summary"]
  evidence = {
    row["tap"]: row
    for row in _select(results, metric="auroc:against_best", split="val")
  }
  allowed = [t for t in TAPS if evidence[t]["low"] >= -summary["tolerance"]]
  assert summary["cut"] == allowed[0]
  assert evidence[summary["best"]]["value"] == 0
  assert summary["cut"] in summary["sentence"]
  shares = [r["value"] for r in _select(results, metric="auroc:chosen")]
  assert len(shares) == len(TAPS) and sum(shares) == pytest.approx(1)


def test_every_tap_is_compared_with_the_cut_on_test(finished):
  """Recomputed from the scores; the cut beside itself is a sure zero."""
  results = _results(finished)
  cut = results["summary"]["cut"]
  label = "mine.safetensors"
  said = {"probe": "logistic", "split": "test", "weights": label}
  scores = {r["tap"]: r for r in _select(results, metric="auroc", **said)}
  beside = _select(results, metric="auroc:against_cut", **said)
  assert [r["tap"] for r in beside] == list(TAPS)
  for row in beside:
    expected = scores[row["tap"]]["value"] - scores[cut]["value"]
    assert row["value"] == pytest.approx(expected, abs=1e-12)
    assert row["low"] <= row["value"] <= row["high"]
    if row["tap"] == cut:
      assert row["low"] == row["high"] == 0


def test_predictions_score_what_the_page_says(finished):
  """At the cut and at the deepest tap, recomputed by scikit-learn."""
  results = _results(finished)
  for tap in {results["summary"]["cut"], TAPS[-1]}:
    lines, values = configs.read_predictions(finished, tap=tap)
    assert len(lines) == results["summary"]["rows"]["test"]
    labels = [line["label"] for line in lines]
    np.testing.assert_allclose(values.sum(1), 1, rtol=1e-6)
    said = {"tap": tap, "probe": "logistic", "metric": "auroc"}
    (row,) = _select(results, split="test", weights="mine.safetensors", **said)
    own = [
      sklearn.metrics.roc_auc_score([one == name for one in labels], column)
      for name, column in zip(
        results["summary"]["classes"], values.T, strict=True
      )
    ]
    assert np.mean(own) == pytest.approx(row["value"], abs=1e-12)
  page = (finished / "report.html").read_text()
  assert page.count('src="data:image/jpeg') > 12
  lines, _ = configs.read_predictions(finished)
  assert {line["tap"] for line in lines} == {
    results["summary"]["cut"],
    TAPS[-1],
  }


def test_costs_are_those_of_the_cut_network(finished):
  results = _results(finished)
  layer_of = {layer.name: layer for layer in zoo.list_layers("resnet18", 32)}
  for tap in TAPS:
    cost = {
      row["metric"]: row["value"]
      for row in _select(results, tap=tap, probe=None)
    }
    assert cost["params"] == layer_of[tap].params
    assert cost["macs"] == layer_of[tap].macs
    assert cost["images_per_second"] > 0
    # At least the weights and the images have to be in memory.
    assert cost["peak_memory_bytes"] > 4 * cost["params"] + 8 * 32 * 32 * 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_another_run_of_the_same_config_gives_the_same_numbers(
  finished, source, weights, tmp_path, mode
):
  """One seed decides everything; jit and pmap run the same program."""
  _run(_config(source, weights, parallel=mode), tmp_path)
  measured_here = ("images_per_second", "peak_memory_bytes")
  first, second = (
    [r for r in _results(p)["measurements"] if r["metric"] not in measured_here]
    for p in (finished, tmp_path)
  )
  for one, other in zip(first, second, strict=True):
    numbers = [
      (r["value"], r["low"], r["high"]) if mode == "jit" else r["metric"]
      for r in (one, other)
    ]
    assert numbers[0] == numbers[1], one


def test_a_run_that_stopped_does_nothing_twice(
  source, weights, tmp_path, monkeypatch
):
  """Killed before the report, it neither extracts nor probes again."""
  config = _config(source, weights)

  def stop(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(inference, "measure_cuts", stop)
    with pytest.raises(KeyboardInterrupt):
      _run(config, tmp_path)
  assert not (tmp_path / "results.json").exists()
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("features/*/*")}
  assert before
  assert _run(config, tmp_path) == 0
  after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("features/*/*")}
  assert after == before


@pytest.mark.slow
def test_a_bad_image_is_listed_and_the_exit_code_says_so(
  finished, source, weights, tmp_path, capsys
):
  """And what is assumed of weights that do not say what network they are, and
  which images are in two splits."""
  folder = tmp_path / "tiles"
  folder.mkdir()
  for path in source.parent.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:100])
  # Drawn again from the same patients, the splits are those of the other run.
  splits = json.loads((finished / "splits.json").read_text())
  twins = [
    f"{next(r for r in splits[s] if r != 7)}.png" for s in ("test", "train")
  ]
  (folder / twins[0]).write_bytes((folder / twins[1]).read_bytes())
  theirs = tmp_path / "theirs.safetensors"
  save_file(load_file(weights), theirs)
  config = _config(
    folder / "manifest.csv", theirs, data__max_failures=0.05, seeds=1
  )
  assert _run(config, tmp_path / "run") == 1
  assert "7.png" in (tmp_path / "run" / "failures.csv").read_text()
  results = _results(tmp_path / "run")
  summary = results["summary"]
  assert summary["failures"] == 1
  # What is counted is what was read: of 60 images one is in no score.
  assert sum(summary["rows"].values()) == 59
  for split in ("val", "test"):
    counts = {r["n"] for r in _select(results, split=split)}
    assert counts == {summary["rows"][split]}
  assert sum("no anti-aliasing" in note for note in summary["notes"]) == 1
  told = f"1 image of the test split is also in train: {' = '.join(twins)}."
  assert sum(told in note for note in summary["notes"]) == 1
  assert told in capsys.readouterr().out
  assert told in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"taps": "layer9"}, "no layer 'layer9'"),
    ({"taps": "layer2"}, "no layer 'layer2'"),
    ({"taps": ""}, "config.taps is empty"),
    ({"metric": "auc"}, "auroc"),
    ({"probes": "logistic,tree"}, "'tree'"),
    ({"seeds": 0}, "config.seeds is 0"),
    ({"strengths": (0.0,)}, "config.strengths"),
    ({"tolerance": -0.1}, "config.tolerance"),
    ({"dtype": "float16"}, "bfloat16"),
    ({"network__name": "resnet51"}, "did you mean"),
    ({"network__weights": ""}, "config.network.weights"),
    ({"network__weights": "random"}, "config.network.weights"),
    ({"network__weights": "/no/such.pth"}, "/no/such.pth"),
    ({"network__prefix": "teacher"}, "config.network.prefix"),
    ({"data__source": "/no/such.csv"}, "/no/such.csv"),
    ({"data__split_fractions": (0.5, 0.5, 0.0)}, "the test split"),
  ],
)
def test_a_mistake_is_found_before_any_work(
  source, weights, tmp_path, changes, says
):
  """Nothing is written: the directory can be used with the right config."""
  with pytest.raises(errors.UsageError, match=says) as raised:
    _run(_config(source, weights, **changes), tmp_path)
  assert "\n" not in str(raised.value)
  assert not (tmp_path / "config.json").exists()


def test_features_that_are_not_finite_stop_the_run_by_name(source, tmp_path):
  """A network of enormous weights overflows; its scores would be nonsense."""
  network = zoo.build("resnet18", until="stem")
  values = tensors.random(network, 0)
  values["bn1.weight"] = np.full_like(values["bn1.weight"], 3e38)
  tensors.load(network, values)
  loading.export(network, tmp_path / "huge.safetensors")
  config = _config(
    source, tmp_path / "huge.safetensors", network__until="stem", seeds=1
  )
  with pytest.raises(errors.RunError, match="stem"):
    _run(config, tmp_path / "run")


def test_eight_devices_are_there():
  """The tests above are about several devices: conftest must give them."""
  assert len(jax.devices()) == 8
