"""Thresholds and what they do, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn import metrics

from jaxtransfer.measure import operating


def _drawn(seed=0, n=200, ties=False):
  rng = np.random.default_rng(seed)
  positive = rng.random(n) < 0.4
  scores = rng.normal(size=n) + 1.2 * positive
  return positive, np.round(scores, 1) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
def test_youden_is_the_best_corner_of_scikit_learns_curve(ties):
  """Of equally good corners the lowest threshold, which finds most."""
  for seed in range(20):
    positive, scores = _drawn(seed, 60, ties)
    alarms, found, thresholds = metrics.roc_curve(
      positive, scores, drop_intermediate=False
    )
    best = np.flatnonzero(np.isclose(found - alarms, (found - alarms).max()))
    assert operating.youden(positive, scores) == thresholds[best[-1]]


@pytest.mark.parametrize("ties", [False, True])
def test_rates_are_scikit_learns_recalls(ties):
  positive, scores = _drawn(ties=ties)
  for threshold in (-np.inf, *np.quantile(scores, [0.1, 0.5, 0.9]), np.inf):
    called = scores >= threshold
    found = operating.rates(positive, scores, threshold)
    assert found.sensitivity == metrics.recall_score(positive, called)
    assert found.specificity == metrics.recall_score(~positive, ~called)


def test_a_wanted_sensitivity_is_reached_by_the_highest_threshold():
  """One score higher would miss it: no other threshold that reaches it calls
  fewer of the others."""
  for ties in (False, True):
    positive, scores = _drawn(ties=ties)
    for least in (0.5, 0.9, 0.95, 1.0):
      threshold = operating.reaching(positive, scores, least)
      assert operating.rates(positive, scores, threshold).sensitivity >= least
      higher = np.unique(scores[scores > threshold])
      missed = operating.rates(positive, scores, higher[0]).sensitivity
      assert missed < least


def test_shares_that_are_met_exactly_are_met():
  """Nine of ten are 0.9, though 0.9 is no binary fraction."""
  for n in (10, 20, 30, 70):
    threshold = operating.reaching(np.ones(n), np.arange(n), 0.9)
    assert threshold == n - round(0.9 * n)


def test_infinite_scores_are_scores():
  positive = np.array([1, 1, 0, 0], bool)
  scores = np.array([np.inf, np.inf, -np.inf, np.inf])
  assert operating.youden(positive, scores) == np.inf
  assert operating.rates(positive, scores, np.inf) == (1, 0.5)
  assert operating.rates(positive, scores, -np.inf) == (1, 0)


def test_resamples_are_the_rows_repeated():
  positive, scores = _drawn(n=40)
  weights = np.random.default_rng(1).integers(0, 3, (15, 40)).astype(np.uint8)
  weights[3] = positive  # without any of the others
  found = operating.rates(positive, scores, 0.5, weights)
  for r, row in enumerate(weights):
    again = np.repeat(np.arange(40), row)
    alone = operating.rates(positive[again], scores[again], 0.5)
    np.testing.assert_allclose([f[r] for f in found], alone, equal_nan=True)
  assert np.isnan(found.specificity[3])


def test_what_is_undefined_is_no_number():
  positive, scores = np.array([True, True]), np.array([0.2, 0.4])
  assert np.isnan(operating.youden(positive, scores))
  assert np.isnan(operating.youden([], []))
  assert np.isnan(operating.reaching(~positive, scores, 0.9))
  found = operating.rates(positive, scores, 0.3)
  assert found.sensitivity == 0.5 and np.isnan(found.specificity)
  # A threshold that could not be chosen calls nothing, rightly or wrongly.
  assert np.isnan(operating.rates(positive, scores, np.nan)).all()


def test_predictive_values_are_counts_of_a_population():
  """Ten thousand people, one in fifty ill, counted."""
  found = operating.predictive_values(operating.Rates(0.9, 0.8), 0.02)
  assert found.positive == pytest.approx(180 / (180 + 1960))
  assert found.negative == pytest.approx(7840 / (7840 + 20))
  nothing = operating.predictive_values(operating.Rates(0.0, 1.0), 0.02)
  assert np.isnan(nothing.positive)
  assert nothing.negative == pytest.approx(0.98)
  # At the data's own prevalence they are the data's precision.
  positive, scores = _drawn()
  of = operating.rates(positive, scores, 0.7)
  there = operating.predictive_values(of, positive.mean())
  precision = metrics.precision_score(positive, scores >= 0.7)
  assert there.positive == pytest.approx(precision)


def test_points_choose_on_one_split_and_measure_on_another():
  """The test split has no part in the thresholds, and an unknown label none in
  anything."""
  val, test = _drawn(0), _drawn(1)
  weights = np.random.default_rng(1).integers(0, 3, (9, 200))
  found = operating.points(
    val, test, sensitivities=(0.9,), prevalence=0.1, weights=weights
  )
  assert [point.rule for point in found] == ["youden", "sensitivity_0.9"]
  assert found[0].threshold == operating.youden(*val)
  assert found[1].threshold == operating.reaching(*val, 0.9)
  for point in found:
    expected = operating.rates(*test, point.threshold)
    assert point.values["sensitivity"] == expected.sensitivity
    assert set(point.values) == {"sensitivity", "specificity", "ppv", "npv"}
    again = operating.rates(*test, point.threshold, weights)
    np.testing.assert_array_equal(
      point.resampled["specificity"], again.specificity
    )
    assert point.images == (test[0].sum(), (~test[0]).sum())
  targets = test[0].astype(float)
  targets[:50] = np.nan
  some = operating.points(val, (targets, test[1]), weights=weights)[0]
  rest = operating.points(
    val, (targets[50:], test[1][50:]), weights=weights[:, 50:]
  )[0]
  assert some.values == rest.values
  np.testing.assert_array_equal(
    some.resampled["sensitivity"], rest.resampled["sensitivity"]
  )


@pytest.mark.parametrize(
  ("call", "says"),
  [
    (lambda: operating.youden([1, 0], [0.1]), "shapes"),
    (lambda: operating.youden([1, 0], [0.1, np.nan]), "row 1 is NaN"),
    (lambda: operating.reaching([1, 0], [0.1, 0.2], 0), "sensitivity"),
    (
      lambda: operating.rates([1, 0], [0.1, 0.2], 0, np.ones((2, 3))),
      r"weights must be \(R, 2\)",
    ),
    (
      lambda: operating.predictive_values(operating.Rates(1, 1), 0),
      "prevalence",
    ),
  ],
)
def test_refuses(call, says):
  with pytest.raises(ValueError, match=says):
    call()
