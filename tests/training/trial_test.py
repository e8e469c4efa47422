"""What jobs that train share: weights of classes, and scores of outputs."""

import jax
import numpy as np
import PIL.Image
import pytest
from sklearn.utils import class_weight

from jaxtransfer import errors, parallel
from jaxtransfer.data import images, sources
from jaxtransfer.data import labels as labelling
from jaxtransfer.measure import calibration
from jaxtransfer.training import trial
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
      raise images.ImageError("cut short")
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
  return trial.Trial(
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
  weights = trial.make_loss(_config(), data).weights
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  flat = trial.make_loss(_config(**{"loss.class_weights": "none"}), data)
  assert flat.weights.tolist() == [1, 1, 1]


def test_balanced_weights_of_several_labels_are_absent_to_there():
  """torch's pos_weight; an unknown label is neither there nor absent."""
  classes = ["-", "x", "x;y", "?x;y"]
  labels = np.array([0, 0, 0, 1, 2, 3, 3])
  data = _data(_Source(classes, labels), many=True)
  weights = trial.make_loss(_config(many_labels=True), data).weights
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
