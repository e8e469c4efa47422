"""What a split's numbers are made of, against scikit-learn."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from jaxtransfer import errors
from jaxtransfer.data import labels as labelling
from jaxtransfer.training import scoring, steps
from tests.training import examples


def _three():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 90).astype(np.int32)
  logits = rng.normal(size=(90, 3)) + np.eye(3)[labels]
  return labels, logits.astype(np.float32)


def test_three_classes_are_scikit_learns():
  labels, logits = _three()
  found = scoring.measure(examples.loss(), ["a", "b", "c"], labels, logits)
  p = special.softmax(logits.astype(float), axis=1)
  values = found.values
  assert values["loss"] == pytest.approx(metrics.log_loss(labels, p), rel=1e-5)
  assert values["accuracy"] == metrics.accuracy_score(labels, p.argmax(1))
  assert values["auroc"] == pytest.approx(
    metrics.roc_auc_score(labels, p, multi_class="ovr")
  )
  assert found.classes["auprc"]["b"] == pytest.approx(
    metrics.average_precision_score(labels == 1, p[:, 1])
  )
  assert set(values) == set(scoring.METRICS)


def test_resamples_of_every_image_once_are_the_split():
  labels, logits = _three()
  of = examples.loss(), ["a", "b", "c"], labels, logits
  one, many = scoring.measure(*of), scoring.measure(*of, np.ones((2, 90), int))
  for name, value in one.values.items():
    assert many.values[name] == pytest.approx([value] * 2)


def test_several_labels_are_measured_where_they_are_known():
  """Each label by itself on the images that know it, then the mean."""
  combinations = ["-", "x", "y", "x;y", "?x;y", "x;?y"]
  names, targets = labelling.read_targets(combinations, many=True)
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 6, 200).astype(np.int32)
  logits = rng.normal(size=(200, 2)).astype(np.float32)
  loss = steps.Loss(targets, True, np.ones(2, np.float32), 0.0)
  found = scoring.measure(loss, names, labels, logits)
  areas = []
  for c in range(2):
    y = targets[labels, c]
    known = ~np.isnan(y)
    areas.append(metrics.roc_auc_score(y[known], logits[known, c]))
  assert found.values["auroc"] == pytest.approx(np.mean(areas))
  assert found.classes["auroc"]["y"] == pytest.approx(areas[1])
  decided, two = scoring.decisions(loss, labels, logits)
  assert len(decided) == (~np.isnan(targets[labels])).sum()
  assert two.shape == (len(decided), 2)


def test_nothing_and_no_number_are_errors():
  labels, logits = _three()
  with pytest.raises(errors.RunError, match="no image"):
    scoring.measure(examples.loss(), list("abc"), labels[:0], logits[:0])
  logits[3, 1] = np.nan
  with pytest.raises(errors.RunError, match="not finite"):
    scoring.measure(examples.loss(), list("abc"), labels, logits)
