"""What all jobs share of their images: divisions, labels, weights, counts."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from sklearn.utils import class_weight

from jaxtransfer import errors
from jaxtransfer.data import dataset, sources
from jaxtransfer.measure import bootstrap
from tests.data import tiles
from tests.jobs import configs


def _source(classes, labels, groups=None, names=None):
  return sources.Examples(
    classes=classes,
    labels=np.asarray(labels, np.int32),
    names=names or [f"{i}.png" for i in range(len(labels))],
    groups=groups,
  )


def _config(**changes):
  config = configs.load("finetune", "resnet18")
  config.update_from_flattened_dict(changes)
  return config


def test_balanced_weights_are_scikit_learns():
  """Of the train split alone: the other rows would change them."""
  labels = np.array([0] * 7 + [1] * 2 + [2] * 3 + [1] * 20)
  data = tiles.divide(_source(list("abc"), labels), train=np.arange(12))
  expected = class_weight.compute_class_weight(
    "balanced", classes=np.arange(3), y=labels[:12]
  )
  weights = data.class_weights("balanced")
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  assert data.class_weights("none").tolist() == [1, 1, 1]


def test_balanced_weights_of_several_labels_are_absent_to_there():
  """torch's pos_weight; an unknown label is neither there nor absent."""
  classes = ["-", "x", "x;y", "?x;y"]
  labels = np.array([0, 0, 0, 1, 2, 3, 3])
  data = tiles.divide(_source(classes, labels), multilabel=True)
  weights = data.class_weights("balanced")
  # x: there in 2, absent in 3, unknown in 2; y: there in 3, absent in 4.
  np.testing.assert_allclose(weights, [3 / 2, 4 / 3], rtol=1e-6)


@pytest.mark.parametrize("crossed", [False, True])
def test_intervals_of_a_mean_over_folds_cover_as_they_say(crossed):
  """A source lists its patients in some order, here from easy to hard, so the
  first of every fold are alike. Each fold drawn on its own, the 95 % interval
  of the mean over folds holds the truth in about 95 % of a thousand data sets.
  One draw for all folds takes the same places in each: twice too wide an
  interval where the places are alike, and far too narrow where half of the
  folds are listed the other way round."""
  folds, patients, sets = 4, 40, 1000
  draw = np.random.default_rng(0).normal(size=(sets, folds * patients))
  skill = np.sort(draw, axis=1).reshape(sets, patients, folds).swapaxes(1, 2)
  if crossed:
    skill[:, 1::2] = skill[:, 1::2, ::-1]
  source = _source(["a"], np.zeros(folds * patients, int))
  rows = np.arange(folds * patients).reshape(folds, patients)

  def coverage(numbers):
    weights = np.array(
      [
        dataset.Dataset(source, {}, ["a"], np.ones((1, 1)), fold=fold)
        .resample(rows[k], 1500, 0)
        .astype(float)
        for k, fold in enumerate(numbers)
      ]
    )
    means = np.einsum("kri,dki->dr", weights, skill, optimize=True)
    low, high = bootstrap.interval(means / (folds * patients))
    return np.mean((low <= 0) & (high >= 0)), np.mean(high - low)

  own, width = coverage(range(folds))
  one, width_of_one = coverage([None] * folds)
  assert 0.93 <= own <= 0.97
  if crossed:
    assert one < 0.6
  else:
    assert one > 0.995 and width_of_one > 1.8 * width


def test_seeds_share_the_draw_and_folds_do_not():
  """Networks compared within a fold are drawn alike, whichever seed they had;
  another fold has other patients, and a draw of its own."""
  labels = np.arange(40) % 2
  data = tiles.divide(_source(["a", "b"], labels))
  rows = np.arange(40)

  def drawn(fold):
    of_fold = dataclasses.replace(data, fold=fold)
    return of_fold.resample(rows, 20, 3)

  np.testing.assert_array_equal(drawn(None), drawn(None))
  np.testing.assert_array_equal(drawn(1), drawn(1))
  assert (drawn(1) != drawn(2)).any()


@pytest.mark.parametrize(
  ("classes", "changes", "says"),
  [
    ("ab", {"positive": "c"}, "it is one of a, b"),
    ("abc", {"prevalence": 0.1}, "config.positive='c'"),
  ],
)
def test_whose_threshold_it_is_must_be_known(classes, changes, says):
  with pytest.raises(errors.UsageError, match=says):
    dataset.positive_classes(_config(**changes), list(classes))


def test_positives():
  """Of two classes the last, of more each, or the one that is named."""
  assert dataset.positive_classes(_config(), list("ab")) == [1]
  assert dataset.positive_classes(_config(positive="a"), list("ab")) == [0]
  assert dataset.positive_classes(_config(), list("abc")) == [0, 1, 2]
  one = _config(positive="b", prevalence=0.1)
  assert dataset.positive_classes(one, list("abc")) == [1]
  assert dataset.positive_classes(_config(multilabel=True), list("ab")) == [
    0,
    1,
  ]


def test_a_split_whose_labels_nobody_knows_is_refused(tmp_path):
  """Before any work, for there is nothing to choose the epoch by."""
  for i in range(12):
    pixels = np.full((16, 16, 3), 20 * i, np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
  lines = ["path,label,split"]
  for i in range(12):
    split = ("train", "val", "test")[i % 3]
    label = ("x", "-")[i // 3 % 2] if split != "val" else "?x"
    lines.append(f"{i}.png,{label},{split}")
  (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
  config = _config(
    multilabel=True, **{"data.source": str(tmp_path / "manifest.csv")}
  )
  with pytest.raises(errors.UsageError, match="the val split has no image"):
    dataset.open_divisions(config, tmp_path / "splits.json")


@pytest.mark.parametrize(
  "there", ["checkpoints/7", "units/ttl-a-random-0/checkpoints"]
)
def test_splits_are_not_drawn_anew_beside_what_was_trained(tmp_path, there):
  """New splits would test on images that were trained on."""
  dataset.check_splits(tmp_path / "splits.json")
  (tmp_path / there).mkdir(parents=True)
  with pytest.raises(errors.UsageError, match="splits.json is gone"):
    dataset.check_splits(tmp_path / "splits.json")
  (tmp_path / "splits.json").write_text("{}")
  dataset.check_splits(tmp_path / "splits.json")


def test_what_could_not_be_read_is_not_counted():
  """By name, in every split; an image that stands twice is gone twice."""
  rows = {"train": np.array([0, 3]), "val": np.array([1]), "test": np.arange(3)}
  source = _source(["x"], [0] * 4, names=["a", "b", "c", "a"])
  data = tiles.divide(source, **rows)
  read = data.without({"a": "cut short"}).rows
  assert {split: r.tolist() for split, r in read.items()} == {
    "train": [],
    "val": [1],
    "test": [1, 2],
  }
  assert all(r.dtype == np.int64 for r in read.values())
  counts = dataset.what_was_read([data], {"a": "cut short"})
  assert counts.rows == {"train": 0, "val": 1, "test": 2}
  assert counts.groups is None


def test_notes_on_a_split_are_of_what_was_read():
  """Three of twenty-one groups gone: what was no matter is one now. A class
  whose images are all gone is named, and other notes stay."""
  labels = np.array([0] * 40 + [1] * 2)
  groups = [str(i // 2) for i in range(42)]
  data = tiles.divide(_source(["a", "b"], labels, groups))
  assert data.holdings() == []
  data = dataclasses.replace(data, notes=["another"])
  gone = {f"{i}.png": "" for i in range(36, 42)}
  read = dataset.what_was_read([data], gone)
  assert read.notes[0] == "another"
  assert sum("36 images of 18 groups" in note for note in read.notes) == 2
  assert (
    sum("no image of 1 of 2 classes: b" in note for note in read.notes) == 3
  )
  assert read.groups == dict.fromkeys(("train", "val", "test"), 18)
  # What a run knew at its start is not said a second time.
  known = dataclasses.replace(data.without(gone), notes=read.notes)
  assert dataset.what_was_read([known], gone).notes == read.notes


@pytest.mark.parametrize(
  ("job", "changes", "folds"),
  [
    ("layers", {}, [None]),
    ("finetune", {}, [None]),
    ("truncate", {"seeds": 3}, [None]),
    ("truncate", {"folds": 3}, [0, 1, 2]),
  ],
)
def test_every_job_opens_and_opens_again_what_it_saved(
  tmp_path, job, changes, folds
):
  """Drawn, saved and read back they are the same divisions; of folds every
  row is tested once, and counted so."""
  manifest = configs.write_tiles(tmp_path, 4, 90, per_patient=3)
  config = configs.load(job, "resnet18")
  config.update_from_flattened_dict({"data.source": str(manifest), **changes})
  path = tmp_path / "splits.json"
  drawn = dataset.open_divisions(config, path)
  dataset.save(path, drawn)
  stored = dataset.open_divisions(config, path)
  assert [one.fold for one in drawn] == [one.fold for one in stored] == folds
  for one, other in zip(drawn, stored, strict=True):
    assert str(one) == str(other)
    assert str(one).startswith("90 images of 2 classes (")
    for split in ("train", "val", "test"):
      np.testing.assert_array_equal(one.rows[split], other.rows[split])
  read = dataset.what_was_read(drawn, {"7.png": "cut short"})
  assert sum(read.rows.values()) == 89
  if len(folds) > 1:
    assert read.rows == {"each tested once": 89}
    tested = np.concatenate([one.rows["test"] for one in drawn])
    assert sorted(tested) == list(range(90))


def test_splits_are_saved_after_the_checks_alone(tmp_path):
  """A run that was refused must not decide the next one's splits."""
  manifest = configs.write_tiles(tmp_path, 4, 30, per_patient=3)
  config = _config(**{"data.source": str(manifest), "batch_size": 64})
  (data,) = dataset.open_divisions(config, tmp_path / "splits.json")
  assert not (tmp_path / "splits.json").exists()
  assert any("every epoch is one step" in note for note in data.notes)
