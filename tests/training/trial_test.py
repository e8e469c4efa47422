"""What jobs that train share: weights of classes, and scores of outputs."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest
from sklearn.utils import class_weight

from jaxtransfer import errors, parallel
from jaxtransfer.data import images as imaging
from jaxtransfer.data import labels as labelling
from jaxtransfer.data import sources
from jaxtransfer.measure import bootstrap, calibration
from jaxtransfer.training import images, scoring, trial
from tests.jobs import configs
from tests.training import examples


class _Source(sources.Examples):
  """Images of which those in `broken` cannot be read."""

  def __init__(self, classes, labels, groups=None, broken=()):
    super().__init__(
      classes=classes,
      labels=np.asarray(labels, np.int32),
      names=[f"image {i}" for i in range(len(labels))],
      groups=groups,
    )
    self._broken = broken

  def read(self, row):
    if row in self._broken:
      raise imaging.ImageError("cut short")
    return np.zeros((16, 16, 3), np.uint8)


def _data(source, many=False, **rows):
  names, targets = labelling.read_targets(source.classes, many)
  everything = np.arange(len(source))
  rows = {**dict.fromkeys(("train", "val", "test"), everything), **rows}
  return trial.Data(source, rows, names, targets, [])


def _config(**changes):
  config = configs.load("finetune", "resnet18")
  changes = {"batch_size": 8, "epochs": 1, "data.image_size": 16, **changes}
  config.update_from_flattened_dict(changes)
  return config


def _trial(data, **changes):
  return images.ImageTask(
    _config(**changes),
    data,
    examples.network(num_classes=len(data.names)),
    parallel.Devices("jit", jax.devices()[:1]),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    seed=0,
    metric="loss",
  )


def _evaluated(data, val, test, **changes):
  """Returns what `evaluate` says, and its rows by split and metric."""
  found = trial.evaluate(
    _trial(data, **changes),
    data,
    {
      "val": (data.rows["val"], val.astype(np.float32)),
      "test": (data.rows["test"], test.astype(np.float32)),
    },
    resamples=200,
    seed=0,
  )
  rows = {
    (split, metric): (value, interval)
    for split, metric, value, interval, _ in found["rows"]
  }
  return found, rows


def test_balanced_weights_are_scikit_learns():
  """Of the train split alone: the other rows would change them."""
  labels = np.array([0] * 7 + [1] * 2 + [2] * 3 + [1] * 20)
  data = _data(_Source(list("abc"), labels), train=np.arange(12))
  expected = class_weight.compute_class_weight(
    "balanced", classes=np.arange(3), y=labels[:12]
  )
  weights = images.make_loss(_config(), data).weights
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  flat = images.make_loss(_config(**{"loss.class_weights": "none"}), data)
  assert flat.weights.tolist() == [1, 1, 1]


def test_balanced_weights_of_several_labels_are_absent_to_there():
  """torch's pos_weight; an unknown label is neither there nor absent."""
  classes = ["-", "x", "x;y", "?x;y"]
  labels = np.array([0, 0, 0, 1, 2, 3, 3])
  data = _data(_Source(classes, labels), many=True)
  weights = images.make_loss(_config(many_labels=True), data).weights
  # x: there in 2, absent in 3, unknown in 2; y: there in 3, absent in 4.
  np.testing.assert_allclose(weights, [3 / 2, 4 / 3], rtol=1e-6)


def test_intervals_are_over_groups():
  """Five images of a patient that say the same are one: the intervals are
  those of one image each, and not narrower."""
  rng = np.random.default_rng(0)
  labels = np.arange(24) % 2
  logits = rng.normal(size=(24, 2)) + np.eye(2)[labels]
  alone = _data(_Source(["a", "b"], labels))
  groups = [f"patient {i:02}" for i in range(24) for _ in range(5)]
  together = _data(_Source(["a", "b"], labels.repeat(5), groups))
  _, expected = _evaluated(alone, logits, logits)
  five = logits.repeat(5, 0)
  _, found = _evaluated(together, five, five)
  for metric in ("accuracy", "loss", "auroc"):
    low, high = expected["test", metric][1]
    assert low < high
    np.testing.assert_allclose(found["test", metric][1], (low, high), rtol=1e-5)


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
  source = _Source(["a"], np.zeros(folds * patients, int))
  rows = np.arange(folds * patients).reshape(folds, patients)

  def coverage(numbers):
    weights = np.array(
      [
        trial.Data(source, {}, ["a"], np.ones((1, 1)), [], fold)
        .resample(rows[k], False, 1500, 0)
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
  data = _data(_Source(["a", "b"], labels))
  rows = np.arange(40)

  def drawn(fold):
    of_fold = dataclasses.replace(data, fold=fold)
    return of_fold.resample(rows, False, 20, 3)

  np.testing.assert_array_equal(drawn(None), drawn(None))
  np.testing.assert_array_equal(drawn(1), drawn(1))
  assert (drawn(1) != drawn(2)).any()


def test_intervals_of_rare_combinations_of_labels_have_a_width():
  """Every image has another combination: drawn within its combination it would
  be in each resample, and nothing would vary."""
  words = "abcd"
  classes = [
    ";".join(w for i, w in enumerate(words) if number >> i & 1) or "-"
    for number in range(16)
  ]
  data = _data(_Source(classes, np.arange(16)), many=True)
  logits = np.random.default_rng(0).normal(size=(16, 4))
  _, rows = _evaluated(data, logits, logits, many_labels=True)
  for metric in ("accuracy", "loss", "auroc"):
    low, high = rows["test", metric][1]
    assert low < rows["test", metric][0] < high


def test_the_temperature_is_that_of_validation():
  """Three times too sure on validation, half as sure as it should be on test:
  the first decides, and the test split is not looked at."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(300, 3)) * 2
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  labels = np.array([rng.choice(3, p=of) for of in p])
  data = _data(_Source(list("abc"), labels))
  found, _ = _evaluated(data, 3 * logits, logits / 2)
  expected = calibration.fit_temperature(labels, 3 * logits)
  assert found["temperature"] == pytest.approx(expected, rel=1e-3)
  assert 2 < expected < 4.5


def test_what_is_counted_is_what_a_score_is_of():
  """A label that is not known of an image is not scored there."""
  classes = ["x", "y", "?x;y", "-"]
  data = _data(_Source(classes, [0, 1, 2, 3] * 10), many=True)
  logits = np.random.default_rng(0).normal(size=(40, 2))
  found, _ = _evaluated(data, logits, logits, many_labels=True)
  counts = {(s, m): n for s, m, _, _, n in found["rows"]}
  assert counts["test", "auroc"] == 40
  assert counts["test", "auroc:x"] == counts["val", "auprc:x"] == 30
  images = {p["class"]: p["images"] for p in found["operating"]}
  assert images == {"x": [10, 20], "y": [20, 20]}


def test_thresholds_are_of_the_calibrated_probability():
  """As the exported network's user computes it, from logits and temperature."""
  rng = np.random.default_rng(0)
  labels = np.arange(200) % 2
  logits = 3 * (rng.normal(size=(200, 2)) + np.eye(2)[labels])
  data = _data(_Source(["no", "yes"], labels))
  found, _ = _evaluated(data, logits, logits, positive="no", prevalence=0.2)
  card = trial.card(_config(), data, found)["operating_points"]
  assert "softmax(logits / temperature)" in card["meaning"]
  logits = logits.astype(np.float32) / found["temperature"]
  p = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
  assert [point["class"] for point in card["points"]] == ["no"] * 3
  for point in card["points"]:
    called = p >= point["threshold"] - 1e-6
    sensitivity = point["test"]["sensitivity"]
    assert sensitivity["value"] == pytest.approx(called[labels == 0].mean())
    assert sensitivity["low"] <= sensitivity["value"] <= sensitivity["high"]
    assert 0 <= point["test"]["ppv"]["value"] <= 1
    assert point["val"]["specificity"] == point["test"]["specificity"]["value"]


@pytest.mark.parametrize(
  ("classes", "changes", "says"),
  [
    ("ab", {"positive": "c"}, "it is one of a, b"),
    ("abc", {"prevalence": 0.1}, "config.positive='c'"),
  ],
)
def test_whose_threshold_it_is_must_be_known(classes, changes, says):
  with pytest.raises(errors.UsageError, match=says):
    scoring.positives(_config(**changes), list(classes))


def test_positives():
  """Of two classes the last, of more each, or the one that is named."""
  assert scoring.positives(_config(), list("ab")) == [1]
  assert scoring.positives(_config(positive="a"), list("ab")) == [0]
  assert scoring.positives(_config(), list("abc")) == [0, 1, 2]
  one = _config(positive="b", prevalence=0.1)
  assert scoring.positives(one, list("abc")) == [1]
  assert scoring.positives(_config(many_labels=True), list("ab")) == [0, 1]


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
    many_labels=True, **{"data.source": str(tmp_path / "manifest.csv")}
  )
  with pytest.raises(errors.UsageError, match="the val split has no image"):
    trial.open_data(config, tmp_path / "splits.json")


def test_too_many_unreadable_images_do_not_hide_why_reading_ended():
  """SIGTERM among the batches of validation is still SIGTERM, and saves."""
  data = _data(_Source(["a", "b"], np.arange(16) % 2, broken={0}))
  strict = {"data.max_failures": 0.0}

  class Asked(Exception):
    pass

  begun = _trial(data, **strict)
  with pytest.raises(Asked), begun._batches("val") as batches:
    next(batches)
    raise Asked
  assert begun.failures == {"image 0": "cut short"}
  with (
    pytest.raises(errors.UnreadableError, match="image 0"),
    _trial(data, **strict)._batches("val") as batches,
  ):
    next(batches)


def test_the_limit_counts_what_the_run_knows():
  """One image broken in an earlier pass and one in this are two of sixteen;
  what another split lost is that one's."""
  data = _data(_Source(["a", "b"], np.arange(16) % 2, broken={0}))
  data.rows["test"] = np.arange(4)
  begun = _trial(data, **{"data.max_failures": 1.5 / 16})
  begun.failures["image 9"] = "cut short"
  with (
    pytest.raises(errors.UnreadableError, match="2 of 16"),
    begun._batches("val") as batches,
  ):
    next(batches)
  strict = _trial(data, **{"data.max_failures": 0.25})
  strict.failures["image 9"] = "cut short"
  with strict._batches("test") as batches:
    next(batches)
  assert len(batches.failures) == 1 and len(strict.failures) == 2


@pytest.mark.parametrize(
  "there", ["checkpoints/7", "units/ttl-a-random-0/checkpoints"]
)
def test_splits_are_not_drawn_anew_beside_what_was_trained(tmp_path, there):
  """New splits would test on images that were trained on."""
  trial.check_splits(tmp_path / "splits.json")
  (tmp_path / there).mkdir(parents=True)
  with pytest.raises(errors.UsageError, match="splits.json is gone"):
    trial.check_splits(tmp_path / "splits.json")
  (tmp_path / "splits.json").write_text("{}")
  trial.check_splits(tmp_path / "splits.json")


@pytest.mark.parametrize(
  "value, low, said",
  [
    (0.81, 0.7, None),
    (0.61, 0.48, "reaches down to 0.480"),
    (0.44, None, "is 0.440"),
    (None, None, None),  # one class in the test split
  ],
)
def test_what_guessing_could_have_scored_is_noted(value, low, said):
  notes = trial.doubts(value, low)
  assert len(notes) == (said is not None)
  assert said is None or said in notes[0]


def test_a_network_without_a_head_is_refused():
  source = _Source(["a", "b"], np.arange(16) % 2)
  with pytest.raises(errors.UsageError, match="without a head"):
    images.ImageTask(
      _config(),
      _data(source),
      examples.network(num_classes=None),
      parallel.Devices("jit", jax.devices()[:1]),
      mean=(0.5, 0.5, 0.5),
      std=(0.25, 0.25, 0.25),
      seed=0,
      metric="loss",
    )
