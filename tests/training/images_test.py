"""A training on images: what it reads, and what its card says."""

import jax
import numpy as np
import pytest

from jaxtransfer import errors, parallel
from jaxtransfer.data import dataset, sources
from jaxtransfer.data import images as imaging
from jaxtransfer.measure import calibration, evaluation
from jaxtransfer.training import images
from tests.data import tiles
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


def _config(**changes):
  config = configs.load("finetune", "resnet18")
  changes = {"batch_size": 8, "epochs": 1, "data.image_size": 16, **changes}
  config.update_from_flattened_dict(changes)
  return config


def _task(data, **changes):
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
  """Returns what a network is worth, and its values by split and metric."""
  config = _config(resamples=200, **changes)
  evaluated = evaluation.evaluate(
    data.outputs(config, data.rows["val"], val.astype(np.float32)),
    data.outputs(
      config, data.rows["test"], test.astype(np.float32), resample=True
    ),
    evaluation.Thresholds(
      dataset.positive_classes(config, data.names),
      config.sensitivities,
      config.prevalence or None,
    ),
  )
  values = {(of.split, of.metric): of for of in evaluated.values}
  return evaluated, values


def test_intervals_are_over_groups():
  """Five images of a patient that say the same are one: the intervals are
  those of one image each, and not narrower."""
  rng = np.random.default_rng(0)
  labels = np.arange(24) % 2
  logits = rng.normal(size=(24, 2)) + np.eye(2)[labels]
  alone = tiles.divide(_Source(["a", "b"], labels))
  groups = [f"patient {i:02}" for i in range(24) for _ in range(5)]
  together = tiles.divide(_Source(["a", "b"], labels.repeat(5), groups))
  _, expected = _evaluated(alone, logits, logits)
  five = logits.repeat(5, 0)
  _, values = _evaluated(together, five, five)
  for metric in ("accuracy", "loss", "auroc"):
    low, high = expected["test", metric].interval
    assert low < high
    np.testing.assert_allclose(
      values["test", metric].interval, (low, high), rtol=1e-5
    )


def test_intervals_of_rare_combinations_of_labels_have_a_width():
  """Every image has another combination: drawn within its combination it would
  be in each resample, and nothing would vary."""
  words = "abcd"
  classes = [
    ";".join(w for i, w in enumerate(words) if number >> i & 1) or "-"
    for number in range(16)
  ]
  data = tiles.divide(_Source(classes, np.arange(16)), multilabel=True)
  logits = np.random.default_rng(0).normal(size=(16, 4))
  _, values = _evaluated(data, logits, logits, multilabel=True)
  for metric in ("accuracy", "loss", "auroc"):
    low, high = values["test", metric].interval
    assert low < values["test", metric].value < high


def test_the_temperature_is_that_of_validation():
  """Three times too sure on validation, half as sure as it should be on test:
  the first decides, and the test split is not looked at."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(300, 3)) * 2
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  labels = np.array([rng.choice(3, p=of) for of in p])
  data = tiles.divide(_Source(list("abc"), labels))
  evaluated, _ = _evaluated(data, 3 * logits, logits / 2)
  expected = calibration.fit_temperature(labels, 3 * logits)
  assert evaluated.temperature == pytest.approx(expected, rel=1e-3)
  assert 2 < expected < 4.5


def test_what_is_counted_is_what_a_score_is_of():
  """A label that is not known of an image is not scored there."""
  classes = ["x", "y", "?x;y", "-"]
  data = tiles.divide(_Source(classes, [0, 1, 2, 3] * 10), multilabel=True)
  logits = np.random.default_rng(0).normal(size=(40, 2))
  evaluated, values = _evaluated(data, logits, logits, multilabel=True)
  assert values["test", "auroc"].images == 40
  for of_x in (("test", "auroc:x"), ("val", "auprc:x")):
    assert values[of_x].images == 30
  images = {point.name: point.images for point in evaluated.points}
  assert images == {"x": (10, 20), "y": (20, 20)}


def test_thresholds_are_of_the_calibrated_probability():
  """As the exported network's user computes it, from logits and temperature."""
  rng = np.random.default_rng(0)
  labels = np.arange(200) % 2
  logits = 3 * (rng.normal(size=(200, 2)) + np.eye(2)[labels])
  data = tiles.divide(_Source(["no", "yes"], labels))
  changes = {"positive": "no", "prevalence": 0.2}
  evaluated, _ = _evaluated(data, logits, logits, **changes)
  card = images.card(_config(), data, evaluated)["operating_points"]
  assert "softmax(logits / temperature)" in card["meaning"]
  logits = logits.astype(np.float32) / evaluated.temperature
  p = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
  assert [point["class"] for point in card["points"]] == ["no"] * 3
  for point in card["points"]:
    called = p >= point["threshold"] - 1e-6
    sensitivity = point["test"]["sensitivity"]
    assert sensitivity["value"] == pytest.approx(called[labels == 0].mean())
    assert sensitivity["low"] <= sensitivity["value"] <= sensitivity["high"]
    assert 0 <= point["test"]["ppv"]["value"] <= 1
    assert point["val"]["specificity"] == point["test"]["specificity"]["value"]


def test_too_many_unreadable_images_do_not_hide_why_reading_ended():
  """SIGTERM among the batches of validation is still SIGTERM, and saves."""
  data = tiles.divide(_Source(["a", "b"], np.arange(16) % 2, broken={0}))
  strict = {"data.max_failures": 0.0}

  class Asked(Exception):
    pass

  begun = _task(data, **strict)
  with pytest.raises(Asked), begun._batches("val") as batches:
    next(batches)
    raise Asked
  assert begun.failures == {"image 0": "cut short"}
  with (
    pytest.raises(errors.UnreadableError, match="image 0"),
    _task(data, **strict)._batches("val") as batches,
  ):
    next(batches)


def test_the_limit_counts_what_the_run_knows():
  """One image broken in an earlier pass and one in this are two of sixteen;
  what another split lost is that one's."""
  data = tiles.divide(_Source(["a", "b"], np.arange(16) % 2, broken={0}))
  data.rows["test"] = np.arange(4)
  begun = _task(data, **{"data.max_failures": 1.5 / 16})
  begun.failures["image 9"] = "cut short"
  with (
    pytest.raises(errors.UnreadableError, match="2 of 16"),
    begun._batches("val") as batches,
  ):
    next(batches)
  strict = _task(data, **{"data.max_failures": 0.25})
  strict.failures["image 9"] = "cut short"
  with strict._batches("test") as batches:
    next(batches)
  assert len(batches.failures) == 1 and len(strict.failures) == 2


def test_a_network_without_a_head_is_refused():
  source = _Source(["a", "b"], np.arange(16) % 2)
  with pytest.raises(errors.UsageError, match="without a head"):
    images.ImageTask(
      _config(),
      tiles.divide(source),
      examples.network(num_classes=None),
      parallel.Devices("jit", jax.devices()[:1]),
      mean=(0.5, 0.5, 0.5),
      std=(0.25, 0.25, 0.25),
      seed=0,
      metric="loss",
    )
