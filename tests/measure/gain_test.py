"""The gain, and the rule that cuts, on cases worked out by hand."""

import numpy as np
import pytest

from jaxtransfer.measure import bootstrap, gain


def test_gain_is_pretrained_less_the_mean_of_the_seeds():
  pretrained = np.array([0.8, 0.9])
  random = np.array([[0.5, 0.7], [0.7, 0.5], [0.6, 0.6]])
  np.testing.assert_allclose(gain.gain(pretrained, random), [0.2, 0.3])
  np.testing.assert_allclose(gain.seed_spread(random), [0.1, 0.1])
  assert np.isnan(gain.seed_spread(random[:1])).all()


def test_gain_of_resamples_is_paired():
  """The mean over resamples of the differences is the difference of means,
  and what both share cancels: a hard resample lowers both."""
  generator = np.random.default_rng(0)
  shared = generator.normal(0, 0.1, 500)
  pretrained = np.stack([0.8 + shared, 0.9 + shared])
  random = np.stack([pretrained - 0.3, pretrained - 0.2])
  again = gain.gain(pretrained, random)
  assert again.shape == (2, 500)
  low, high = bootstrap.interval(again)
  np.testing.assert_allclose(low, 0.25)
  np.testing.assert_allclose(high, 0.25)


def test_marginal_gain():
  values = np.array([0.5, 0.8, 0.75])
  found = gain.marginal_gain(values)
  assert np.isnan(found[0])
  np.testing.assert_allclose(found[1:], [0.3, -0.05])
  again = gain.marginal_gain(np.stack([values, values + 1], axis=1))
  np.testing.assert_allclose(again[1:], np.stack([found[1:]] * 2, axis=1))


def _resampled(values, spread, seed=0, resamples=2000):
  noise = np.random.default_rng(seed).normal(size=(len(values), resamples))
  return np.asarray(values)[:, None] + np.asarray(spread)[:, None] * noise


def test_cut_is_the_shallowest_tap_without_a_loss_beyond_the_tolerance():
  values = [0.70, 0.895, 0.90, 0.89]
  resampled = _resampled(values, [0.001] * 4)
  cut = gain.choose_cut(values, resampled, tolerance=0.01)
  assert (cut.index, cut.best) == (1, 2)
  assert gain.choose_cut(values, resampled, 0.0).index == 2
  assert gain.choose_cut(values, resampled, 0.5).index == 0


def test_a_noisy_tap_is_not_good_enough():
  """The rule asks that a loss be ruled out, not that one be not shown: a tap
  nobody knows enough about does not qualify."""
  values = [0.89, 0.90]
  certain = gain.choose_cut(values, _resampled(values, [0.001, 0.001]), 0.02)
  unsure = gain.choose_cut(values, _resampled(values, [0.05, 0.001]), 0.02)
  assert (certain.index, unsure.index) == (0, 1)


def test_cut_uses_pairs():
  """Noise that the taps share says nothing about their difference."""
  values = np.array([0.895, 0.90])
  shared = np.random.default_rng(0).normal(0, 0.1, 1000)
  cut = gain.choose_cut(values, values[:, None] + shared, tolerance=0.01)
  assert cut.index == 0
  np.testing.assert_allclose(cut.low, [-0.005, 0], atol=1e-12)
  np.testing.assert_allclose(cut.high, [-0.005, 0], atol=1e-12)


def test_of_equal_taps_the_shallowest():
  cut = gain.choose_cut([0.9, 0.9, 0.9], np.full((3, 10), 0.9), 0.0)
  assert (cut.index, cut.best) == (0, 0)


def test_one_tap_is_the_cut():
  cut = gain.choose_cut([0.4], [[0.4, 0.5]], 0.0)
  assert (cut.index, cut.best) == (0, 0)


def test_choice_shares_are_those_of_choosing_again():
  """Against the rule itself, applied to each resample with resamples of it:
  the scores of T taps are means over rows, so drawing rows of a draw is cheap.
  """
  generator = np.random.default_rng(0)
  rows, resamples = 60, 400
  truth = np.array([0.80, 0.88, 0.90])
  scores = truth[:, None] + generator.normal(0, 0.15, (3, rows))

  def draws(of, count):
    picked = generator.integers(of.shape[1], size=(count, of.shape[1]))
    return of[:, picked]  # (3, count, rows)

  drawn = draws(scores, resamples)
  shares = gain.choice_shares(scores.mean(1), drawn.mean(2), 0.03)
  counts = np.zeros(3)
  for b in range(resamples):
    again = draws(drawn[:, b], 200).mean(2)
    counts[gain.choose_cut(drawn[:, b].mean(1), again, 0.03).index] += 1
  assert shares.sum() == pytest.approx(1)
  assert 0.05 < shares[2] < 0.95
  # Two shares of 400 differ by up to 0.07 by chance alone.
  np.testing.assert_allclose(shares, counts / resamples, atol=0.08)


def test_choice_shares_without_doubt_and_without_a_score():
  certain = _resampled([0.5, 0.9, 0.9], [1e-4] * 3)
  shares = gain.choice_shares([0.5, 0.9, 0.9], certain, 0.01)
  np.testing.assert_allclose(shares, [0, 1, 0])
  certain[0, :1000] = np.nan
  again = gain.choice_shares([0.5, 0.9, 0.9], certain, 0.01)
  np.testing.assert_allclose(again, shares)
  nothing = gain.choice_shares([0.5], [[np.nan, np.nan]], 0.01)
  assert np.isnan(nothing).all()


def test_rule_says_what_is_done():
  text = gain.rule(0.02, "AUROC")
  assert "AUROC" in text
  assert "0.02" in text
  assert "95 %" in text
  assert "shallowest" in text
  assert "-0 " not in gain.rule(0, "accuracy") + " "


@pytest.mark.parametrize(
  ("values", "resampled", "tolerance", "message"),
  [
    ([], np.zeros((0, 3)), 0, "T > 0"),
    ([0.5, 0.6], np.zeros((3, 2)), 0, "resampled"),
    ([0.5, np.nan], np.zeros((2, 2)), 0, "tap 1 is NaN"),
    ([0.5, 0.6], np.zeros((2, 2)), -0.1, "tolerance"),
    ([0.5, 0.6], np.zeros((2, 2)), np.nan, "tolerance"),
  ],
)
def test_choose_cut_refuses(values, resampled, tolerance, message):
  with pytest.raises(ValueError, match=message):
    gain.choose_cut(values, resampled, tolerance)


def test_gain_refuses_shapes_that_do_not_fit():
  with pytest.raises(ValueError, match="random must be"):
    gain.gain(np.zeros(3), np.zeros((5, 4)))
  with pytest.raises(ValueError, match="S > 0"):
    gain.gain(np.zeros(3), np.zeros((0, 3)))
