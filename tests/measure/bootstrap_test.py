"""What a bootstrap over patients must hold, and that its intervals cover."""

import numpy as np
import pytest

from jaxtransfer.measure import bootstrap, classification


def test_a_group_is_drawn_whole():
  labels = np.arange(60) % 3
  groups = [f"patient{i // 4}" for i in range(60)]
  weights = bootstrap.resample_weights(labels, groups, 50, seed=0)
  by_group = weights.reshape(50, 15, 4)
  assert weights.shape == (50, 60)
  assert weights.dtype == np.uint8
  assert (by_group == by_group[:, :, :1]).all()
  assert (by_group[:, :, 0].sum(1) == 15).all()


def test_strata_keep_their_number_of_groups():
  """Drawn by majority label, no class can vanish: each resample has as many
  groups of every label as there are."""
  generator = np.random.default_rng(0)
  labels = np.repeat([0] * 20 + [1] * 3, 5)
  groups = np.repeat(generator.permutation(23), 5)
  weights = bootstrap.resample_weights(labels, groups, 200, seed=1)
  assert (weights[:, labels == 1].sum(1) == 15).all()
  assert (weights[:, labels == 0].sum(1) == 100).all()
  assert len(np.unique(weights, axis=0)) > 100


def test_majority_label_and_its_ties():
  labels = np.array([1, 1, 0, 2, 0, 0, 5, 5, 2, 0])
  group = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
  np.testing.assert_array_equal(
    bootstrap._majority(labels, group), [1, 0, 5, 0]
  )


def test_rows_are_groups_when_none_are_known():
  labels = np.arange(40) % 2
  weights = bootstrap.resample_weights(labels, None, 300, seed=0)
  alone = bootstrap.resample_weights(labels, np.arange(40), 300, seed=0)
  np.testing.assert_array_equal(weights, alone)
  assert (weights.sum(1) == 40).all()
  # A row is missing from a resample with probability (1 - 1/20)^20 = 0.36.
  assert (weights == 0).mean() == pytest.approx(0.358, abs=0.02)


def test_seeds():
  labels, groups = np.arange(30) % 3, np.arange(30) // 2
  draw = [bootstrap.resample_weights(labels, groups, 9, s) for s in (0, 0, 1)]
  np.testing.assert_array_equal(draw[0], draw[1])
  assert (draw[0] != draw[2]).any()


def test_blocks_of_draws_do_not_change_how_many_are_drawn(monkeypatch):
  monkeypatch.setattr(bootstrap, "_BLOCK", 7)
  weights = bootstrap.resample_weights(np.arange(30) % 3, None, 50, 0)
  assert (weights.sum(1) == 30).all()


def test_interval_is_percentiles_along_the_last_axis():
  values = np.random.default_rng(0).normal(size=(3, 4, 999))
  low, high = bootstrap.interval(values, level=0.9)
  assert low.shape == high.shape == (3, 4)
  np.testing.assert_allclose(low, np.quantile(values, 0.05, axis=-1))
  np.testing.assert_allclose(high, np.quantile(values, 0.95, axis=-1))


def test_interval_leaves_out_what_is_undefined():
  values = np.array([[1.0, np.nan, 3.0, 2.0], [np.nan] * 4])
  low, high = bootstrap.interval(values, 0.5)
  np.testing.assert_allclose(low, [1.5, np.nan])
  np.testing.assert_allclose(high, [2.5, np.nan])


def test_coverage_on_clustered_rows():
  """Rows of a patient are right or wrong together here, so an interval over
  rows is far too narrow and one over patients covers about as it says. 60
  patients and 400 repetitions: a true coverage of 0.94 lies within 0.90 and
  0.98 with a probability above 0.999."""
  generator = np.random.default_rng(0)
  patients, rows, repetitions, truth = 60, 8, 400, 0.7
  covered = {"patients": 0, "rows": 0}
  labels = np.repeat(np.arange(patients) % 2, rows)
  groups = np.repeat(np.arange(patients), rows)
  weights = {
    "patients": bootstrap.resample_weights(labels, groups, 1000, 1),
    "rows": bootstrap.resample_weights(labels, None, 1000, 1),
  }
  for _ in range(repetitions):
    skill = generator.beta(0.7 * 2, 0.3 * 2, patients)
    hit = generator.random(patients * rows) < np.repeat(skill, rows)
    scores = np.eye(2)[np.where(hit, labels, 1 - labels)]
    for unit, of in weights.items():
      low, high = bootstrap.interval(
        classification.accuracy(labels, scores, of)
      )
      covered[unit] += low <= truth <= high
  assert 0.90 <= covered["patients"] / repetitions <= 0.98
  assert covered["rows"] / repetitions < 0.8


def test_pairing_narrows_a_difference():
  """Two networks that fail on the same patients differ by little: with the
  same resamples the interval of the difference sees that, and with different
  ones it cannot."""
  generator = np.random.default_rng(0)
  labels = np.repeat(np.arange(50) % 2, 6)
  groups = np.repeat(np.arange(50), 6)
  hard = np.repeat(generator.random(50), 6)
  one = np.eye(2)[np.where(hard < 0.7, labels, 1 - labels)]
  two = np.eye(2)[np.where(hard < 0.68, labels, 1 - labels)]
  first, other = (
    bootstrap.resample_weights(labels, groups, 1000, s) for s in (0, 1)
  )
  score = classification.accuracy

  def span(weights):
    low, high = bootstrap.interval(
      score(labels, one, first) - score(labels, two, weights)
    )
    return high - low

  assert span(first) < 0.6 * span(other)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (([], None, 5, 0), "labels"),
    (([0, 1], ["a"], 5, 0), "1 groups for 2 labels"),
    (([0, 1], None, 0, 0), "resamples"),
  ],
)
def test_refuses(arguments, message):
  with pytest.raises(ValueError, match=message):
    bootstrap.resample_weights(*arguments)


def test_interval_refuses():
  with pytest.raises(ValueError, match="level"):
    bootstrap.interval([1.0, 2.0], 95)
  with pytest.raises(ValueError, match="B > 0"):
    bootstrap.interval(np.zeros((3, 0)))


def test_classes_of_one_patient_each_are_drawn_together():
  """Otherwise every resample is the sample, and an interval has no width; a
  class of several patients stays whole."""
  labels = np.repeat([0, 1, 2, 3], [2, 2, 2, 6])
  groups = np.array(list("aabbccddeeff"))
  weights = bootstrap.resample_weights(labels, groups, 200, 0)
  firsts = weights[:, [0, 2, 4]]
  assert (firsts.sum(1) == 3).all() and len(np.unique(firsts, axis=0)) > 5
  assert (weights[:, 6:].sum(1) == 6).all()
  alone = bootstrap.resample_weights(labels[4:], groups[4:], 200, 0)
  assert (alone[:, :2] == 1).all()
