"""The loop: what it chooses, when it ends, and on which devices it goes on."""

import json
import math
import signal
import types

import jax
import numpy as np
import pytest

from jaxtransfer import errors, inference, parallel
from jaxtransfer.data import pipeline, sources
from jaxtransfer.training import images, loop, optimisers, steps
from tests.training import examples


class _Drawn(sources.Examples):
  """Images of noise, brighter in the higher classes."""

  def __init__(self, count=32):
    labels = np.arange(count, dtype=np.int32) % 3
    names = [str(i) for i in range(count)]
    super().__init__(classes=list("abc"), labels=labels, names=names)

  def read(self, row):
    rng = np.random.default_rng(row)
    return rng.integers(0, 100 + 70 * self.labels[row], (16, 16, 3), np.uint8)


class _Memory:
  """Keeps the lines of metrics.jsonl."""

  def __init__(self):
    self.lines = []

  def log(self, **values):
    self.lines.append(values)

  def replace_log(self, records):
    self.lines = list(records)


class _Images:
  """Images as a task; the tests say what validation reads, and its scores."""

  def __init__(self, devices, recipe, batches, validation, score):
    self.batches, self.recipe, self.failures = batches, recipe, {}
    self._devices, self._validation, self._score = devices, validation, score
    network = examples.network()
    objective = examples.objective(network)
    self._first = examples.first_state(network, recipe, seed=0)
    self._step = devices.compile_step(steps.make_step(objective, recipe))
    self._forward = inference.compile_forward(
      objective.graph,
      inference.logits,
      devices,
      objective.mean,
      objective.std,
    )

  def first_state(self):
    return self._first

  def step(self, epoch):
    return self._step

  def put(self, batch):
    return self._devices.put(images.filled(batch))

  def validate(self, numbers, failures, stop):
    def forward(pixels):
      return self._forward(numbers, pixels)

    with self._validation() as batches:
      batches.add_failures(failures)
      rows, logits = inference.read(
        inference.run(forward, batches, self._devices, stop=stop)
      )
      failures = batches.get_state()["failures"]
    return self._score(rows, logits), failures


def _fit(
  path,
  *,
  mode="jit",
  count=1,
  epochs=3,
  schedule="constant",
  scores=None,
  patience=0,
  memory=None,
  validation=None,
  **changes,
):
  data = _Drawn()
  settings = loop.Settings(
    epochs=epochs,
    schedule=optimisers.Schedule(schedule, 0.0, 0.5, 0, 0.02),
    batch_size=8,
    metric="auroc",
    log_steps=1,
    checkpoint_steps=2,
    checkpoints=2,
    examples=32,
    max_failures=0.0,
    patience=patience,
  )
  given = iter(scores or [])

  def score(rows, logits):
    assert rows.tolist() == list(range(8)) and logits.shape == (8, 3)
    return next(given, {"loss": 1.0, "auroc": 0.5})

  def batches(rows, **options):
    return pipeline.Batches(
      data, np.arange(rows), image_size=16, batch_size=8, **options
    )

  memory = memory or _Memory()
  devices = parallel.Devices(mode, jax.devices()[:count])
  task = _Images(
    devices,
    examples.recipe(**changes),
    batches(32, shuffle_seed=0, epochs=epochs, drop_last=True),
    validation or (lambda: batches(8)),
    score,
  )
  fitted = loop.fit(
    task, settings, devices=devices, directory=path, journal=memory
  )
  assert memory.lines == fitted.records
  memory.failures = task.failures
  return fitted


def test_the_best_epoch_is_kept_and_training_goes_on(tmp_path):
  """Epoch 2 scores best: what comes back is what the network was after the
  second epoch, which a training of two epochs ends with."""
  scores = [{"loss": 1.0, "auroc": a} for a in (0.6, 0.9, 0.7)]
  fitted = _fit(tmp_path / "three", scores=scores)
  assert fitted.epoch == 2 and len(loop.epochs_of(fitted.records)) == 3
  two = _fit(tmp_path / "two", epochs=2, scores=scores)
  for name, value in two.numbers[0].items():
    np.testing.assert_array_equal(fitted.numbers[0][name], value)


def test_plateau_lowers_the_rate_and_ends_below_its_floor(tmp_path):
  """Patience 0 and a loss that stays: 0.05 becomes 0.025 after the second
  epoch and 0.0125, below the floor of 0.02, after the third of ten."""
  fitted = _fit(tmp_path, epochs=10, schedule="plateau")
  assert len(loop.epochs_of(fitted.records)) == 3
  rates = [r["learning_rate"] for r in fitted.records if r["event"] == "train"]
  assert rates == pytest.approx([0.05] * 8 + [0.025] * 4)


def test_patience_ends_after_epochs_that_are_no_better(tmp_path):
  """Two in a row that do not beat the second; the third of equals starts no
  new wait, and a better one in between does."""
  areas = (0.6, 0.5, 0.7, 0.7, 0.6, 0.9)
  scores = [{"loss": 1.0, "auroc": area} for area in areas]
  fitted = _fit(tmp_path, epochs=10, scores=scores, patience=2)
  assert fitted.ended and fitted.epoch == 3
  assert len(loop.epochs_of(fitted.records)) == 5


def test_sigterm_within_validation_saves_the_epoch(tmp_path):
  """Its steps are not done again, and its validation is; with averaged
  numbers, which are part of what is saved."""
  scores = [{"loss": 1.0, "auroc": area} for area in (0.6, 0.7)]
  whole = _fit(tmp_path / "whole", epochs=2, scores=scores, average=0.9)

  class Asked(_Memory):
    def log(self, **values):
      super().log(**values)
      if values["step"] == 8:
        # Heard at the next batch, which is the first of validation.
        signal.raise_signal(signal.SIGTERM)

  first = Asked()
  with pytest.raises(SystemExit):
    _fit(tmp_path / "run", epochs=2, scores=scores, memory=first, average=0.9)
  assert [r["step"] for r in loop.epochs_of(first.lines)] == [4]
  assert first.lines[-1]["step"] == 8
  resumed = _fit(tmp_path / "run", epochs=2, scores=scores[1:], average=0.9)
  assert resumed.records[:-1] == first.lines
  assert whole.epoch == resumed.epoch == 2
  for one, other in zip(whole.numbers, resumed.numbers, strict=True):
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_the_seconds_of_an_epoch_outlive_a_stop(tmp_path, monkeypatch):
  """By a clock that only a step's line moves on: with a stop after the third
  step, whose checkpoint is of the second, an epoch takes as long as without."""
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(loop, "time", clock)

  class Stop(Exception):
    pass

  class Slow(_Memory):
    def __init__(self, last=math.inf):
      super().__init__()
      self._last = last

    def log(self, **values):
      if values["step"] > self._last:
        raise Stop
      super().log(**values)
      now[0] += 100 if values["event"] == "train" else 7

  def seconds(fitted):
    return [
      record["timing"]["training_seconds"]
      for record in loop.epochs_of(fitted.records)
    ]

  # From the end of the first step on, and from the end of an epoch on.
  assert seconds(_fit(tmp_path / "whole", epochs=2, memory=Slow())) == [400] * 2
  for last in (2, 6):
    with pytest.raises(Stop):
      _fit(tmp_path / "run", epochs=2, memory=Slow(last))
  resumed = _fit(tmp_path / "run", epochs=2, memory=Slow())
  assert seconds(resumed) == [400, 400]


@pytest.mark.parametrize(("mode", "count"), [("jit", 8), ("pmap", 1)])
def test_going_on_with_other_devices_is_said(tmp_path, mode, count):
  """From one device to eight, and from jit to pmap, within an epoch: nearly
  the same numbers, and a note that they are not exactly so."""
  whole = _fit(tmp_path / "whole", epochs=2)

  class Stop(Exception):
    pass

  def interrupted():
    yield {"loss": 1.0, "auroc": 0.5}
    raise Stop

  with pytest.raises(Stop):
    _fit(tmp_path / "run", epochs=2, scores=interrupted())
  resumed = _fit(tmp_path / "run", epochs=2, mode=mode, count=count)
  assert len(resumed.notes) == 1 and "only up to rounding" in resumed.notes[0]
  assert [r["step"] for r in resumed.records] == [
    r["step"] for r in whole.records
  ]
  for name, value in whole.numbers[0].items():
    np.testing.assert_allclose(resumed.numbers[0][name], value, atol=1e-4)


def test_what_validation_could_not_read_outlives_a_stop(tmp_path):
  """A disk that fails now and then: another image in the second start than in
  the first. Both count in each pass of the second, and both come back."""
  seen = []

  class Failing(pipeline.Batches):
    """Of eight images one cannot be read, in the first pass alone."""

    def __init__(self, bad):
      super().__init__(_Drawn(), np.arange(8), image_size=16, batch_size=8)
      self._bad = bad

    def __next__(self):
      batch = super().__next__()
      if self._bad is not None:
        self.add_failures([(self._bad, "cut short")])
      return batch

    def __exit__(self, *about):
      seen.append([name for name, _ in self.failures])
      super().__exit__(*about)

  class Stop(Exception):
    pass

  def interrupted():
    yield {"loss": 1.0, "auroc": 0.5}
    raise Stop

  bad = iter([3, None, 5, None])
  options = {"epochs": 3, "validation": lambda: Failing(next(bad))}
  with pytest.raises(Stop):
    _fit(tmp_path, scores=interrupted(), **options)
  memory = _Memory()
  _fit(tmp_path, memory=memory, **options)
  assert seen == [["3"], ["3"], ["3", "5"], ["3", "5"]]
  assert memory.failures == {"3": "cut short", "5": "cut short"}


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
  optimiser = examples.optimiser(learning_rate=1e30)
  with pytest.raises(errors.RunError, match="lower config.optimiser.learning"):
    _fit(tmp_path, optimiser=optimiser)


def test_choosing_the_best_epoch():
  """Less is better of a loss, more of the rest, the first of equals, and what
  is not a number loses to any number."""

  def best(metric, *values):
    return loop.best_epoch(
      [
        {"event": "epoch", "epoch": i, "val": {metric: value}}
        for i, value in enumerate(values, 1)
      ],
      metric,
    )

  assert best("auroc", 0.5, 0.7, 0.7) == 2
  assert best("loss", 0.5, 0.3, 0.7) == 2
  assert best("auroc", math.nan, 0.1) == 2
  assert best("loss", math.nan, math.nan) == 1
  assert best("auroc", None, 0.1) == 2 and best("loss", None, None) == 1
  assert best("loss") == 0


def test_what_is_no_number_decides_the_same_when_it_is_read_back(tmp_path):
  """JSON has no NaN, so lines and checkpoints hold null: no epoch is best by
  it, plateau does not take it for a fall of the loss, and a second call, which
  knows the epochs from the checkpoint alone, ends where the first one did."""
  scores = [
    {"loss": math.nan, "auroc": math.nan},
    {"loss": 1.0, "auroc": 0.6},
    {"loss": math.inf, "auroc": math.nan},
  ]
  once = _fit(tmp_path, epochs=10, schedule="plateau", scores=scores)
  again = _fit(tmp_path, epochs=10, schedule="plateau")
  assert once.epoch == again.epoch == 2
  assert once.records == again.records
  json.dumps(once.records, allow_nan=False)
  epochs = loop.epochs_of(once.records)
  assert [e["val"]["loss"] for e in epochs] == [None, 1.0, None]


def test_unreadable_images_are_replaced_for_the_statistics_alone():
  """BatchNorm sees readable images there; the mask still hides them."""
  batch = examples.batch(0, size=5)
  batch["mask"] = np.array([True, False, True, False, False])
  filled = images.filled(batch)
  image = batch["image"]
  np.testing.assert_array_equal(filled["image"], image[[0, 0, 2, 2, 0]])
  assert filled["mask"] is batch["mask"]
  nothing = {**batch, "mask": np.zeros(5, bool)}
  assert (images.filled(nothing)["image"] == image).all()
