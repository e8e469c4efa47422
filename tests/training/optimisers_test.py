"""Optimisers and schedules against their definitions, in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import errors
from jaxtransfer.training import optimisers


def _optimiser(**changes):
  settings = {
    "name": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
  }
  return optimisers.Optimiser(**{**settings, **changes})


def _schedule(name, **changes):
  settings = {"warmup_epochs": 0.0, "factor": 0.5, "patience": 2, "floor": 1e-6}
  return optimisers.Schedule(name, **{**settings, **changes})


def _walk(optimiser, steps=4):
  """Follows f(w) = |w|^2 / 2, whose gradient is w."""
  direction = optimiser.direction(lambda name: 1.0)
  params = {"a.kernel": jnp.array([3.0, -4.0]), "a.bias": jnp.array([2.0])}
  state = direction.init(params)
  for _ in range(steps):
    moves, state = direction.update(params, state, params)
    params = {
      n: v - optimiser.learning_rate * moves[n] for n, v in params.items()
    }
  return params


def test_nesterov_momentum_with_decay_is_torchs():
  """torch.optim.SGD(nesterov=True): g += decay w, b = m b + g, w -= lr (g +
  m b); the decay is the kernels' alone."""
  found = _walk(_optimiser(weight_decay=0.1))
  for name, start, decay in (
    ("a.kernel", np.array([3.0, -4.0]), 0.1),
    ("a.bias", np.array([2.0]), 0.0),
  ):
    w, b = start, 0.0
    for _ in range(4):
      g = w + decay * w
      b = 0.9 * b + g
      w = w - 0.1 * (g + 0.9 * b)
    np.testing.assert_allclose(found[name], w, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_where_its_decay_goes(name):
  """adam decays through the gradient, adamw beside it."""
  found = _walk(_optimiser(name=name, weight_decay=0.1))["a.kernel"]
  w, m, v = np.array([3.0, -4.0]), 0.0, 0.0
  for t in range(1, 5):
    g = w + (0.1 * w if name == "adam" else 0)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    move = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    w = w - 0.1 * (move + (0.1 * w if name == "adamw" else 0))
  np.testing.assert_allclose(found, w, rtol=1e-4)


def test_clipping_bounds_the_norm_of_all_gradients_together():
  """One step of plain SGD is as long as rate x clip_norm, in the gradient's
  direction."""
  found = _walk(_optimiser(momentum=0.0, clip_norm=1.0), steps=1)
  start = np.array([3.0, -4.0, 2.0])
  moved = np.concatenate([found["a.kernel"], found["a.bias"]]) - start
  np.testing.assert_allclose(
    moved, -0.1 * start / np.linalg.norm(start), rtol=1e-5
  )


def test_the_backbone_has_its_share_of_the_rate():
  """The layers before the first have none, and without their norms neither
  have those after it; what is no layer, a head of any name, has all of it."""
  names = (
    *("layers.2.conv1.kernel", "layers.3.bn1.scale", "layers.10.conv1.kernel"),
    *("head.kernel", "head.bias", "heads.lung.bias"),
  )
  rate = optimisers.layer_rates(3, 0.1)
  assert [rate(name) for name in names] == [0, 0.1, 0.1, 1, 1, 1]
  rate = optimisers.layer_rates(3, 0.1, norms=False)
  assert [rate(name) for name in names] == [0, 0, 0.1, 1, 1, 1]


def test_plateau_is_torchs():
  """patience 2: the third epoch without an improvement halves the rate, and
  the count begins again. An improvement below 1e-4 of the best is none."""
  schedule = _schedule("plateau")
  losses = [1.0, 0.5, 0.6, 0.6, 0.49999, 0.6, 0.6, 0.6, 0.4, 0.5]
  scales = [schedule.scale(losses[: i + 1]) for i in range(len(losses))]
  # 0.49999 is the third after 0.5; then 0.6, 0.6, 0.6 are three more.
  assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
  assert not schedule.ended(3.9e-6, losses[:7])
  assert schedule.ended(3.9e-6, losses)
  assert not _schedule("constant").ended(0.0, losses)


def test_a_loss_that_is_no_number_never_improves():
  """Comparisons with NaN are false: the rate falls until training ends."""
  schedule = _schedule("plateau")
  assert schedule.scale([float("nan")] * 6) == 0.25


def test_shapes_of_the_schedules():
  """Cosine rises linearly to one and falls to zero; one cycle starts at 1/25
  and peaks after 30 %."""
  cosine = _schedule("cosine", warmup_epochs=2).multiplier(100, 5)
  values = np.array([cosine(step) for step in range(101)])
  assert 0 < values[0] < 0.2 and values[10] == pytest.approx(1)
  assert (np.diff(values[:11]) > 0).all() and (np.diff(values[10:]) < 0).all()
  assert values[100] == pytest.approx(0, abs=1e-6)
  cycle = _schedule("one_cycle").multiplier(100, 5)
  values = np.array([cycle(step) for step in range(100)])
  assert values[0] == pytest.approx(1 / 25)
  assert values.argmax() == 30 and values.max() == pytest.approx(1)
  assert all(
    np.isfinite(_schedule("one_cycle").multiplier(n, 1)(0)) for n in range(1, 9)
  )


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: _optimiser(name="lion"), "optimiser.name"),
    (lambda: _optimiser(learning_rate=0), "optimiser.learning_rate"),
    (lambda: _optimiser(learning_rate=float("nan")), "learning_rate is nan"),
    (lambda: _optimiser(momentum=1.0), "below 1"),
    (lambda: _schedule("step"), "schedule.name"),
    (lambda: _schedule("plateau", factor=1.0), "schedule.factor"),
    (
      lambda: _schedule("cosine", warmup_epochs=3).multiplier(15, 5),
      "warmup_epochs",
    ),
  ],
)
def test_values_out_of_range_are_named(make, says):
  with pytest.raises(errors.UsageError, match=says):
    make()
