"""The exact support vector machine against liblinear and its own optimality."""

import warnings

import numpy as np
import pytest
import sklearn.svm

from jaxtransfer.measure import hinge, probes


def _rows(rows, channels, apart, seed=0):
  """Returns (E, N) features with a row of ones, and their signs."""
  rng = np.random.default_rng(seed)
  sign = np.where(rng.random(rows) < 0.4, 1.0, -1.0)
  x = rng.normal(size=(channels, rows))
  x[0] += apart * sign
  return np.concatenate([x, np.ones((1, rows))]), sign


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("apart", [0.3, 5.0])
@pytest.mark.parametrize("channels", [40, 100])
def test_it_ends_at_the_minimum(strength, apart, channels):
  """The objective is convex: where its gradient is zero is the minimum,
  whether the classes can be separated or not, wherever it began, and whether
  its steps solve for weights or for rows."""
  x, sign = _rows(90, channels, apart)
  ridge = np.append(np.full(channels, 1 / strength), 0)
  gram, ends = x[:-1].T @ x[:-1], []
  draw = np.random.default_rng(1).normal(size=channels + 1)
  for start, of_rows in (
    (np.zeros(channels + 1), None),
    (draw, None),
    (np.zeros(channels + 1), gram),
    (draw, gram),
  ):
    w, steps, ended = hinge.minimise(x, sign, 1 / strength, start, of_rows)
    assert ended and steps < 40
    gap = np.maximum(1 - sign * (w @ x), 0)
    gradient = ridge * w - 2 * x @ (gap * sign)
    scale = np.abs(ridge * w).max() + np.abs(2 * x @ (gap * sign)).max()
    assert np.abs(gradient).max() <= 1e-9 * max(scale, 1.0)
    ends.append(w @ x)
  for end in ends[1:]:
    np.testing.assert_allclose(end, ends[0], atol=1e-6)


def test_it_is_liblinears():
  """The intercept is not penalised here, and next to not at all there."""
  x, sign = _rows(120, 10, 1.0)
  w, _, _ = hinge.minimise(x, sign, 1.0, np.zeros(11))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = sklearn.svm.LinearSVC(
      C=1.0, dual=False, intercept_scaling=300, tol=1e-10, max_iter=20000
    ).fit(x[:-1].T, sign)
  np.testing.assert_allclose(w[:-1], model.coef_[0], atol=1e-4)
  np.testing.assert_allclose(w[-1], model.intercept_[0], atol=1e-3)


def test_a_probe_of_separable_classes_converges_at_every_strength():
  """More channels than rows, hardly a penalty: thousands of steps along
  gradients did not end here."""
  rng = np.random.default_rng(2)
  y = np.arange(150) % 3
  x = rng.normal(size=(2, 150, 200)).astype(np.float32)
  for strength in (1.0, 1e3):
    found = probes.fit_probe("linear_svm", x, y, x, y, x, [strength], "auroc")
    assert found.converged.all()
    assert (found.test_scores.argmax(2) == y).all()
