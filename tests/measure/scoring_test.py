"""What a split's numbers are made of, against scikit-learn and training."""

import dataclasses

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as reference

from jaxtransfer.data import labels as labelling
from jaxtransfer.measure import metrics, scoring
from jaxtransfer.training import steps


def _three():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 90).astype(np.int32)
  logits = rng.normal(size=(90, 3)) + np.eye(3)[labels]
  return labels, logits.astype(np.float32)


def _outputs(targets, logits, names="abc", multilabel=False, weights=None):
  weights = np.ones(len(names)) if weights is None else weights
  classes = scoring.Classes(list(names), multilabel, weights)
  return scoring.Outputs(classes, np.arange(len(logits)), targets, logits)


def _several():
  """Returns label combinations, rows of them and logits."""
  combinations = ["-", "x", "y", "x;y", "?x;y", "x;?y"]
  names, targets = labelling.read_targets(combinations, multilabel=True)
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 6, 200).astype(np.int32)
  logits = rng.normal(size=(200, 2)).astype(np.float32)
  return names, targets, labels, logits


def test_three_classes_are_scikit_learns():
  labels, logits = _three()
  scores = scoring.measure(_outputs(np.eye(3)[labels], logits))
  p = special.softmax(logits.astype(float), axis=1)
  values = scores.values
  loss = reference.log_loss(labels, p)
  assert values["loss"] == pytest.approx(loss, rel=1e-6)
  assert values["accuracy"] == reference.accuracy_score(labels, p.argmax(1))
  assert values["auroc"] == pytest.approx(
    reference.roc_auc_score(labels, p, multi_class="ovr")
  )
  assert scores.classes["auprc"]["b"] == pytest.approx(
    reference.average_precision_score(labels == 1, p[:, 1])
  )
  assert list(values) == list(metrics.METRICS)
  assert scores.flat()["auprc:b"] == scores.classes["auprc"]["b"]


def test_resamples_of_every_image_once_are_the_split():
  labels, logits = _three()
  one = _outputs(np.eye(3)[labels], logits)
  both = dataclasses.replace(one, resamples=np.ones((2, 90), int))
  once = scoring.measure(one).flat()
  resampled = scoring.measure(both, resampled=True).flat()
  for name, value in once.items():
    assert resampled[name] == pytest.approx([value] * 2)


def test_several_labels_are_measured_where_they_are_known():
  """Each label by itself on the images that know it, then the mean."""
  names, targets, labels, logits = _several()
  outputs = _outputs(targets[labels], logits, names, multilabel=True)
  scores = scoring.measure(outputs)
  areas = []
  for c in range(2):
    y = targets[labels, c]
    known = ~np.isnan(y)
    areas.append(reference.roc_auc_score(y[known], logits[known, c]))
  assert scores.values["auroc"] == pytest.approx(np.mean(areas))
  assert scores.classes["auroc"]["y"] == pytest.approx(areas[1])
  decided, two = outputs.decisions()
  assert len(decided) == (~np.isnan(targets[labels])).sum()
  assert two.shape == (len(decided), 2)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("scale", [1, 200])
def test_the_loss_is_what_training_makes_small(multilabel, scale):
  """Weighted classes, unknown labels, sure and wrong: the same number, to what
  float32 holds of it. In resamples it is the loss of the rows repeated."""
  names, targets, labels, logits = _several()
  if not multilabel:
    labels, logits = _three()
    names, targets = list("abc"), np.eye(3, dtype=np.float32)
  logits = logits * scale
  weights = np.array([0.5, 2.0, 3.0][: len(names)], np.float32)
  trained = steps.Loss(targets, multilabel, weights, 0.0)
  outputs = _outputs(targets[labels], logits, names, multilabel, weights)
  counts = np.random.default_rng(1).integers(0, 3, (2, len(labels)))
  outputs = dataclasses.replace(outputs, resamples=counts)
  once = scoring.measure(outputs).values["loss"]
  resampled = scoring.measure(outputs, resampled=True).values["loss"]
  every = np.arange(len(labels))
  every = [every, *(every.repeat(count) for count in counts)]
  for value, rows in zip([once, *resampled], every, strict=True):
    sums = np.asarray(trained(logits[rows], labels[rows]), float).sum()
    expected = sums / np.asarray(trained.weight(labels[rows]), float).sum()
    assert value == pytest.approx(expected, rel=1e-6)


def test_nothing_and_no_number_are_errors():
  labels, logits = _three()
  targets = np.eye(3)[labels]
  with pytest.raises(scoring.EmptyError, match="no image"):
    _outputs(targets[:0], logits[:0])
  with pytest.raises(scoring.EmptyError, match="no known label"):
    _outputs(np.full((90, 3), np.nan), logits, multilabel=True)
  logits[3, 1] = np.nan
  with pytest.raises(scoring.NotFiniteError, match="not finite"):
    _outputs(targets, logits)


def test_every_metric_of_the_table_knows_chance_from_certainty():
  """Its direction is that in which a sure and right network is better than one
  that says the same of every image."""
  labels = np.arange(60) % 3
  targets = np.eye(3)[labels]
  sure = scoring.measure(_outputs(targets, 20 * targets)).values
  none = scoring.measure(_outputs(targets, 0 * targets)).values
  for name, metric in metrics.METRICS.items():
    if name != "ece":  # who always says one third is right in one third
      assert (sure[name] > none[name]) == metric.higher, name
