"""Repeated trainings, pairs of networks, and classes that are not found."""

import numpy as np
import pytest

from jaxtransfer.measure import bootstrap, evaluation


def _scores(generator, shift, repeats=3, images=400):
  """Returns a score of rights and wrongs, and of the same images shifted."""
  hard = generator.random(images)
  weights = bootstrap.resample_weights(np.zeros(images, int), None, 500, 0)
  found = []
  for least in (0.7, 0.7 + shift):
    hits = hard < least + generator.normal(0, 0.02, (repeats, images))
    again = [weights @ hit.astype(float) / images for hit in hits]
    found.append(evaluation.score(hits.mean(1), again))
  return found


def test_a_difference_is_that_of_the_means_and_its_interval_is_paired():
  """Two networks that fail on the same images: the interval of the difference
  is far narrower than either's, and knows a small difference from none."""
  one, other = _scores(np.random.default_rng(0), 0.06)
  found = other.above(one)
  assert found.value == pytest.approx(other.mean - one.mean)
  assert found.low < found.value < found.high
  assert found.high - found.low < 0.7 * (one.interval[1] - one.interval[0])
  assert found.told_apart
  one, same = _scores(np.random.default_rng(1), 0.0)
  assert not same.above(one).told_apart
  back = one.above(same)
  assert back.low == pytest.approx(-same.above(one).high)


def test_of_a_score_that_is_undefined_nothing_is_told():
  known = evaluation.score([0.5], [np.array([0.4, 0.6])])
  unknown = evaluation.score([np.nan], [np.array([np.nan, np.nan])])
  found = unknown.above(known)
  assert np.isnan(found).all() and not found.told_apart
  assert np.isnan(known.deviation)


def test_a_class_that_is_hardly_ever_called_is_named_with_its_numbers():
  """Four of thirty are found where guessing would find fifteen; the other
  class, and one of which half of a half is found, are no matter."""
  labels = np.repeat([0, 1], [30, 40])
  predicted = np.repeat([0, 1, 1], [4, 26, 40])
  found = evaluation.hardly_found(labels, predicted, 2)
  assert found == [evaluation.Missed(0, 30, 4, 1, 26)]
  predicted[:8] = 0
  assert not evaluation.hardly_found(labels, predicted, 2)


def test_classes_without_images_are_not_missed():
  labels = np.repeat([0, 2], 20)
  found = evaluation.hardly_found(labels, np.full(40, 2), 4)
  assert [(m.label, m.instead, m.taken) for m in found] == [(0, 2, 20)]


def test_guessing():
  """Whoever calls everything the same finds one class of those there are."""
  targets = np.eye(4)[[0, 1, 1, 3]]
  assert evaluation.chance(targets, multilabel=False) == pytest.approx(1 / 3)
  assert evaluation.chance(targets, multilabel=True) == 0.5
