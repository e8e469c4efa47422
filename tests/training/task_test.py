"""A task that is no image and no network goes through the same loop."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import inference, parallel
from jaxtransfer.training import loop, optimisers, steps
from tests.training import examples

SLOPES = np.array([1.0, -2.0, 0.5], np.float32)
STEPS, SIZE = 5, 16


class _Draws:
  """Batches of vectors drawn one after the other: the place is the draw's."""

  failures = ()

  def __init__(self, count, seed):
    self._count, self._next = count, 0
    self._rng = np.random.default_rng(seed)

  def __len__(self):
    return self._count

  def __iter__(self):
    return self

  def __next__(self):
    if self._next == self._count:
      raise StopIteration
    self._next += 1
    x = self._rng.normal(size=(SIZE, 3)).astype(np.float32)
    return {
      "x": x,
      "y": x @ SLOPES + 4,
      "row": np.arange(SIZE),
      "mask": np.arange(SIZE) < SIZE - 2,
    }

  def get_state(self):
    drawn = self._rng.bit_generator.state
    return {"next": self._next, "drawn": drawn, "failures": []}

  def set_state(self, state):
    self._next = state["next"]
    self._rng.bit_generator.state = state["drawn"]

  def add_failures(self, failures):
    assert not failures

  def close(self):
    pass


class _Squares:
  """The squared error of a line, of examples that the mask shows."""

  sums = ("loss", "weight")
  apart = False

  def inputs(self, batch, key, step):
    weights = batch["mask"].astype(jnp.float32)
    return (batch["x"], batch["y"], weights), weights

  def __call__(self, params, statistics, inputs, kept):
    x, y, weights = inputs
    errors = x @ params["slope.kernel"] + params["level.bias"] - y
    loss = (weights * errors**2).sum()
    return {"loss": loss, "weight": weights.sum()}, statistics


class _Regression:
  """In the first epoch the level alone; then the slopes too, twice as fast."""

  def __init__(self, devices, epochs):
    self.batches, self.failures = _Draws(STEPS * epochs, 0), {}
    self._devices = devices

    def recipe(slope):
      return examples.recipe(
        optimiser=examples.optimiser(learning_rate=0.02),
        rate=lambda name: slope if name == "slope.kernel" else 1.0,
      )

    self.recipe = recipe(2.0)
    self._steps = [
      devices.compile_step(steps.make_step(_Squares(), of))
      for of in (recipe(0.0), self.recipe)
    ]
    self._predict = devices.compile(
      lambda p, x: x @ p["slope.kernel"] + p["level.bias"]
    )

  def first_state(self):
    params = {"slope.kernel": jnp.zeros(3), "level.bias": jnp.zeros(())}
    return steps.first_state(_Squares(), self.recipe, params, {}, seed=0)

  def step(self, epoch):
    return self._steps[epoch > 1]

  def put(self, batch):
    return self._devices.put(batch)

  def validate(self, numbers, failures, stop):
    params, _ = numbers
    draws = _Draws(2, seed=1)
    _, y = inference.read(
      inference.run(
        lambda x: self._predict(params, x),
        draws,
        self._devices,
        inputs=lambda batch: batch["x"],
        stop=stop,
      )
    )
    expected = [batch["y"][batch["mask"]] for batch in _Draws(2, seed=1)]
    return {"loss": float(np.mean((y - np.concatenate(expected)) ** 2))}, []


class _Memory:
  """Keeps the lines of metrics.jsonl; at a step asks the process to end."""

  def __init__(self, stop_at=None):
    self.lines, self._stop_at = [], stop_at

  def log(self, **values):
    self.lines.append(values)
    if values["step"] == self._stop_at:
      signal.raise_signal(signal.SIGTERM)

  def replace_log(self, records):
    self.lines = list(records)


def _fit(
  path, memory, *, mode="jit", epochs=4, patience=0, stop_after=None, **changes
):
  devices = parallel.Devices(mode, jax.devices()[:2])
  settings = loop.Settings(
    epochs=epochs,
    metric="loss",
    log_steps=1,
    checkpoint_steps=100,
    checkpoints=2,
    schedule=optimisers.Schedule("constant", 0.0, 0.5, 0, 0.0),
    batch_size=SIZE,
    examples=STEPS * SIZE,
    max_failures=0.0,
    patience=patience,
    unit="lines",
    **changes,
  )
  return loop.fit(
    _Regression(devices, epochs),
    settings,
    devices=devices,
    directory=path,
    journal=memory,
    stop_after=stop_after,
  )


def _without_times(records):
  return [{k: v for k, v in r.items() if k != "timing"} for r in records]


@pytest.mark.parametrize("mode", parallel.MODES)
def test_a_line_is_fitted_and_a_stop_changes_no_bit(tmp_path, mode):
  """Stopped in the first epoch and in the third, whose steps are not the same:
  the draw, the state and the lines go on as if nothing had been."""
  whole = _fit(tmp_path / "whole", _Memory(), mode=mode)
  for stop_at in (3, 12):
    with pytest.raises(SystemExit) as ended:
      _fit(tmp_path / "run", _Memory(stop_at), mode=mode)
    assert ended.value.code == 143
  resumed = _fit(tmp_path / "run", _Memory(), mode=mode)
  assert _without_times(resumed.records) == _without_times(whole.records)
  json.dumps(whole.records, allow_nan=False)
  for name, value in whole.numbers[0].items():
    np.testing.assert_array_equal(resumed.numbers[0][name], value)
  losses = [r["val"]["loss"] for r in loop.epochs_of(whole.records)]
  # Without its slopes a line is off by their squares: 1 + 4 + 1/4.
  assert losses[0] > 5 and losses[-1] < 0.2 * losses[0]
  assert "accuracy" not in whole.records[0]
  assert any("lines_per_second" in r["timing"] for r in whole.records)


def test_patience_ends_it(tmp_path, monkeypatch):
  """Validation that says the same each time: two epochs after the first."""
  monkeypatch.setattr(
    _Regression, "validate", lambda self, *_: ({"loss": 1.0}, [])
  )
  fitted = _fit(tmp_path / "first", _Memory(), epochs=9, patience=2)
  assert fitted.ended and fitted.epoch == 1
  assert len(loop.epochs_of(fitted.records)) == 3
  # Not before more than five epochs; and of equals the last begins anew.
  fitted = _fit(
    tmp_path / "least", _Memory(), epochs=9, patience=2, least_epochs=5
  )
  assert fitted.epoch == 1 and len(loop.epochs_of(fitted.records)) == 6
  fitted = _fit(tmp_path / "last", _Memory(), epochs=4, patience=2, ties="last")
  assert fitted.epoch == 4 and len(loop.epochs_of(fitted.records)) == 4


def test_the_last_of_equals_is_kept_with_its_numbers(tmp_path, monkeypatch):
  """Validation is 2, 1, 1, 3: the numbers are those of the second or the third
  epoch, and a pause does not take them away."""
  losses = {1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0}
  seen = {}

  def validate(self, numbers, failures, stop):
    seen[len(seen) + 1] = np.asarray(numbers[0]["slope.kernel"])
    return {"loss": losses[len(seen)]}, []

  monkeypatch.setattr(_Regression, "validate", validate)
  for ties, best in (("first", 2), ("last", 3)):
    seen.clear()
    path = tmp_path / ties
    # Between two checkpoints lies more time than the training takes.
    about = {"ties": ties, "checkpoint_seconds": 1e9}
    paused = _fit(path, _Memory(), stop_after=3, **about)
    assert not paused.ended and paused.epoch == best
    fitted = _fit(path, _Memory(), **about)
    assert fitted.ended and fitted.epoch == best and len(seen) == 4
    np.testing.assert_array_equal(fitted.numbers[0]["slope.kernel"], seen[best])
