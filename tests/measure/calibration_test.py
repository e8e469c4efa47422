"""Calibration measures against their definitions and scikit-learn."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from jaxtransfer.measure import calibration


def _drawn(n=4000, classes=4, sharpness=1.0, seed=0):
  """Draws labels from the probabilities themselves: calibrated at 1."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(n, classes)) * 2
  probabilities = special.softmax(logits, axis=1)
  labels = np.array([rng.choice(classes, p=p) for p in probabilities])
  return labels, logits * sharpness


def test_the_temperature_undoes_what_sharpened_the_logits():
  """Labels are drawn from softmax(logits): dividing 3 x logits by 3 is best."""
  for sharpness in (0.5, 1.0, 3.0):
    labels, logits = _drawn(sharpness=sharpness)
    found = calibration.fit_temperature(labels, logits)
    assert found == pytest.approx(sharpness, rel=0.06)


def test_calibrated_probabilities_have_a_small_error_and_sharp_ones_not():
  """The error of calibrated probabilities is the noise of the bins' means."""
  labels, logits = _drawn()
  error = calibration.expected_calibration_error
  assert error(labels, special.softmax(logits, axis=1)) < 0.03
  assert error(labels, special.softmax(4 * logits, axis=1)) > 0.15


def test_the_error_of_three_images_by_hand():
  """Bins (0.5, 0.6] and (0.9, 1.0]: gaps 0.55 - 0.5 and 0.95 - 0.95 + ..."""
  probabilities = np.array([[0.55, 0.45], [0.55, 0.45], [0.05, 0.95]])
  labels = np.array([0, 1, 1])
  # First bin: accuracy 1/2, confidence 0.55, two thirds of the images.
  # Last bin: accuracy 1, confidence 0.95, one third.
  expected = 2 / 3 * 0.05 + 1 / 3 * 0.05
  found = calibration.expected_calibration_error(labels, probabilities, bins=10)
  assert found == pytest.approx(expected)


def test_the_brier_score_is_scikit_learns():
  """Two classes: twice scikit-learn's, which counts one of the two."""
  labels, logits = _drawn(classes=2)
  probabilities = special.softmax(logits, axis=1)
  expected = metrics.brier_score_loss(labels, probabilities[:, 1])
  found = calibration.brier_score(labels, probabilities)
  assert found == pytest.approx(2 * expected)


def test_weights_are_repetitions():
  """An image of weight two is that image twice."""
  labels, logits = _drawn(n=50)
  probabilities = special.softmax(logits, axis=1)
  weights = np.random.default_rng(1).integers(0, 3, (3, 50))
  for metric in (
    calibration.expected_calibration_error,
    calibration.brier_score,
  ):
    found = metric(labels, probabilities, weights)
    for row, value in zip(weights, found, strict=True):
      again = np.repeat(np.arange(50), row)
      assert value == pytest.approx(metric(labels[again], probabilities[again]))


def test_the_diagram_counts_every_image_once():
  """A weighted mean of the bins' accuracies is the accuracy."""
  labels, logits = _drawn(n=300)
  probabilities = special.softmax(logits, axis=1)
  _, accuracy, count = calibration.reliability(labels, probabilities)
  assert count.sum() == 300
  right = np.nansum(accuracy * count)
  assert right == pytest.approx((probabilities.argmax(1) == labels).sum())


def test_no_images():
  """Nothing is measured as nothing, not as zero."""
  empty = np.zeros(0, int), np.zeros((0, 3))
  assert np.isnan(calibration.brier_score(*empty))
  assert np.isnan(calibration.expected_calibration_error(*empty))
  with pytest.raises(ValueError, match="needs images"):
    calibration.fit_temperature(*empty)
