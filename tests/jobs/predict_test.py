"""A finished network on new images: the same numbers, and honest refusals."""

import csv
import json
import shutil

import numpy as np
import pytest

from jaxtransfer import errors, workdir
from jaxtransfer.jobs import finetune, predict
from tests import typed
from tests.jobs import configs
from tests.jobs.finetune_test import CHANGES


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Eighty images of two textures and twenty patients, a third mislabelled.

  Learnt well, every score would be 1 and every interval empty.
  """
  path = configs.write_tiles(tmp_path_factory.mktemp("tiles"))
  header, *lines = path.read_text().splitlines()
  swapped = {"class 0": "class 1", "class 1": "class 0"}
  for i, line in enumerate(lines):
    name, label, group = line.split(",")
    label = swapped[label] if i % 3 == 0 else label
    lines[i] = ",".join((name, label, group))
  path.write_text("\n".join([header, *lines]) + "\n")
  return path


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
  """A finished `finetune` run on them."""
  path = tmp_path_factory.mktemp("runs") / "trained"
  config = configs.load("finetune", "resnet18")
  changes = {**CHANGES, "data.source": str(source), "epochs": 3}
  config.update_from_flattened_dict(changes)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(path.parent / "cache"))
    with workdir.claim(path, config.to_dict(), "the command") as claimed:
      assert finetune.run(config, claimed) == 0
  return path


def _predict(run, source, path, **changes):
  config = configs.load("predict", str(run))
  config.update_from_flattened_dict(
    {
      "batch_size": 16,
      "resamples": CHANGES["resamples"],
      "data.source": str(source),
      **changes,
    }
  )
  with workdir.claim(path, config.to_dict(), "the command") as claimed:
    return predict.run(config, claimed)


def _results(path):
  left = json.loads((path / "results.json").read_text())
  typed.check_results(left)
  return left


def _test_rows(trained, source, path):
  """Writes a manifest of what the run tested on, in its order."""
  splits = json.loads((trained / "splits.json").read_text())
  with open(source, newline="") as f:
    lines = list(csv.DictReader(f))
  with open(path, "w", newline="") as f:
    writer = csv.DictWriter(f, ["path", "label", "group"])
    writer.writeheader()
    for row in splits["test"]:
      name = str(source.parent / lines[row]["path"])
      writer.writerow({**lines[row], "path": name})
  return path


def test_the_run_s_own_test_images_come_out_as_the_run_had_them(
  trained, source, tmp_path
):
  """Same network, same input, same temperature, same thresholds, same draws:
  every probability and every score with its interval is the run's."""
  manifest = _test_rows(trained, source, tmp_path / "again.csv")
  assert _predict(trained, manifest, tmp_path / "new") == 0
  _, theirs = configs.read_predictions(trained)
  _, ours = configs.read_predictions(tmp_path / "new")
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  ran = json.loads((trained / "results.json").read_text())["measurements"]
  left = _results(tmp_path / "new")
  again = {
    row["metric"]: row for row in left["measurements"] if row["split"] == "test"
  }
  compared = 0
  for row in ran:
    # Its loss is weighted by class.
    if row["split"] == "test" and not row["metric"].startswith("loss"):
      for key in ("value", "low", "high"):
        if row[key] is None:
          assert again[row["metric"]][key] is None
        else:
          number = again[row["metric"]][key]
          assert number == pytest.approx(row[key], abs=1e-4)
        compared += 1
  assert compared > 40
  assert left["summary"]["own_test"]["auroc"] == pytest.approx(
    again["auroc"]["value"]
  )
  assert "On its own test split" in left["summary"]["sentence"]
  page = (tmp_path / "new" / "report.html").read_text()
  assert "How good it is here" in page


def test_images_without_labels_are_predicted_and_not_scored(
  trained, source, tmp_path
):
  """From folders that are no classes, at any depth."""
  for i in range(6):
    folder = tmp_path / "new" / f"slide {i % 2}" / "tiles"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source.parent / f"{i}.png", folder / f"{i}.png")
  path = tmp_path / "run"
  assert _predict(trained, tmp_path / "new", path) == 0
  lines, probabilities = configs.read_predictions(path)
  assert [line["label"] for line in lines] == [""] * 6
  assert {line["name"] for line in lines} >= {"slide 0/tiles/0.png"}
  np.testing.assert_allclose(probabilities.sum(1), 1)
  left = _results(path)
  assert left["summary"]["labelled"] == 0
  assert sum(of["images"] for of in left["summary"]["called"]) == 6
  assert "No label is known" in left["summary"]["sentence"]
  page = (path / "report.html").read_text()
  assert "How good it is here" not in page and "errors" not in page


def test_those_with_a_label_are_scored_among_others(trained, source, tmp_path):
  with open(source, newline="") as f:
    lines = list(csv.reader(f))[1:9]
  with open(tmp_path / "m.csv", "w", newline="") as f:
    writer = csv.writer(f)
    writer.writerow(["path", "label"])
    for i, (name, label, _) in enumerate(lines):
      writer.writerow([source.parent / name, label if i < 6 else ""])
  assert _predict(trained, tmp_path / "m.csv", tmp_path / "run") == 0
  summary = _results(tmp_path / "run")["summary"]
  assert summary["rows"] == {"read": 8, "labelled": 6}
  assert any("2 of 8 images have no label" in n for n in summary["notes"])
  assert np.sum(summary["confusion"]) == 6


def test_what_was_trained_on_is_told(trained, source, tmp_path):
  assert _predict(trained, source, tmp_path / "run") == 0
  notes = " ".join(_results(tmp_path / "run")["summary"]["notes"])
  assert "images have the name of one that the run trained" in notes
  assert "groups have the name of one that the run trained" in notes


def test_an_unreadable_image_is_listed_and_the_rest_predicted(
  trained, source, tmp_path
):
  new = tmp_path / "new"
  new.mkdir()
  for i in range(4):
    shutil.copy(source.parent / f"{i}.png", new / f"{i}.png")
  (new / "2.png").write_bytes(b"no image")
  with pytest.raises(errors.UnreadableError, match=r"1 of 4 .* 2\.png"):
    _predict(trained, new, tmp_path / "strict")
  run = tmp_path / "run"
  assert _predict(trained, new, run, **{"data.max_failures": 0.5}) == 1
  assert "2.png" in (run / "failures.csv").read_text()
  lines, _ = configs.read_predictions(run)
  assert {line["name"] for line in lines} == {"0.png", "1.png", "3.png"}


@pytest.mark.parametrize(
  ("label", "words"),
  [("class 2", "did you mean 'class"), ("<b>", "predicts class 0, class 1")],
)
def test_other_classes_are_refused(trained, source, tmp_path, label, words):
  (tmp_path / "m.csv").write_text(
    f"path,label\n{source.parent / '0.png'},{label}\n"
  )
  with pytest.raises(errors.UsageError, match=words):
    _predict(trained, tmp_path / "m.csv", tmp_path / "run")


def test_folders_of_which_some_are_classes_are_refused(
  trained, source, tmp_path
):
  for name in ("class 0", "class 9"):
    (tmp_path / "in" / name).mkdir(parents=True)
    shutil.copy(source.parent / "0.png", tmp_path / "in" / name / "0.png")
  with pytest.raises(errors.UsageError, match="class 9 is no class"):
    _predict(trained, tmp_path / "in", tmp_path / "run")


def test_what_is_no_finished_run_is_refused(trained, source, tmp_path):
  for run, words in (
    ("", "config.run is empty"),
    (tmp_path / "gone", "does not exist"),
    (tmp_path, "no workdir of a finished run"),
  ):
    with pytest.raises(errors.UsageError, match=words):
      _predict(run, source, tmp_path / "run")
  begun = tmp_path / "begun"
  begun.mkdir()
  shutil.copy(trained / "config.json", begun / "config.json")
  with pytest.raises(errors.UsageError, match="is not finished"):
    _predict(begun, source, tmp_path / "run")
  shutil.copy(trained / "results.json", begun / "results.json")
  with pytest.raises(errors.UsageError, match="hands over no network"):
    _predict(begun, source, tmp_path / "run")


def test_the_export_alone_is_enough(trained, source, tmp_path):
  export = shutil.copytree(trained / "export", tmp_path / "export")
  for run in (export, export / "model.safetensors"):
    name = f"run-{run.suffix}"
    assert _predict(run, source, tmp_path / name) == 0
  one, other = (
    configs.read_predictions(tmp_path / name)[1]
    for name in ("run-", "run-.safetensors")
  )
  np.testing.assert_array_equal(one, other)
