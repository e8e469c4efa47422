"""Training from the first step, or from a checkpoint, to the last.

What is trained, and on what, is a task's affair. The loop keeps what all of
them need: checkpoints and lines, the best epoch, patience, the decisions of a
schedule between epochs, preemption, and what could not be read.
"""

import collections
import contextlib
import dataclasses
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxtransfer import errors, files, inference, parallel, progress, signals
from jaxtransfer.data import pipeline
from jaxtransfer.measure.metrics import METRICS
from jaxtransfer.networks.functional import Arrays, Numbers
from jaxtransfer.training import checkpoints, optimisers, steps

# Steps given to the devices before one of them has ended: the devices never
# wait, and batches do not pile up in their memory.
_AHEAD = 2
# Which of equally good epochs is the best.
TIES = ("first", "last")

Record = dict[str, Any]


class Journal(Protocol):
  """Where metrics.jsonl is written."""

  def log(self, **values: Any) -> None:
    """Appends a line."""

  def replace_log(self, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes these lines in place of all that are there."""


class Batches(pipeline.Source, inference.Fallible, Protocol):
  """The batches of a whole training, all epochs, the same number in each."""

  @property
  def failures(self) -> pipeline.Failures:
    """(name, reason) of all that could not be read so far."""


class Task(Protocol):
  """What is trained.

  Attributes:
    recipe: what a step does, for the lines.
    failures: name -> why it could not be read; the loop adds what training and
      validation met.
  """

  recipe: steps.Recipe
  failures: dict[str, str]

  @property
  def batches(self) -> Batches:
    """Those of all epochs; the loop closes them."""

  def first_state(self) -> steps.State:
    """Returns the state before the first step, always the same."""

  def step(self, epoch: int) -> Callable[..., tuple[steps.State, Arrays]]:
    """Returns the compiled step of an epoch.

    Asked before each of its steps. What it does may change between epochs, for
    instance which parameters are kept, but not the state's structure.

    Args:
      epoch: from 1.

    Returns:
      (state, batch as `put` returns it) -> (state, {"loss": ()}); the state
      given to it is donated.
    """

  def put(self, batch: dict[str, np.ndarray]) -> Any:
    """Sends a batch to the devices, without waiting for it."""

  def validate(
    self,
    numbers: Numbers,
    failures: inference.Failures,
    stop: Callable[[], bool],
  ) -> tuple[dict[str, Any], inference.Failures]:
    """Measures numbers on the validation split.

    Args:
      numbers: parameters and statistics, on the devices.
      failures: (row, reason) of what earlier validations could not read.
      stop: to be asked between batches whether the process has to end.

    Returns:
      The metrics, `loss` and the settings' metric among them, and all that
      could not be read.

    Raises:
      inference.Stopped: `stop` said so.
    """


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long to train and what to write down.

  Attributes:
    epochs: at most.
    metric: of the validation split, by which the best epoch is chosen.
    log_steps: steps from line to line of metrics.jsonl.
    checkpoint_steps: steps from checkpoint to checkpoint; one more is saved
      after every epoch.
    checkpoints: how many are kept.
    schedule: for what is decided between epochs.
    batch_size: examples of a step over all devices.
    examples: of the training split.
    max_failures: share of unreadable examples that stops the run.
    patience: epochs without a better one after which training ends; 0 for
      never.
    least_epochs: those before patience may end it.
    ties: which of equally good epochs is the best, "first" or "last".
    checkpoint_seconds: that lie between two checkpoints at least. Where epochs
      take less than a checkpoint does, training again what a stop has lost is
      sooner done.
    unit: what an example is, for the lines.

  Raises:
    UsageError: a value out of range.
  """

  epochs: int
  metric: str
  log_steps: int
  checkpoint_steps: int
  checkpoints: int
  schedule: optimisers.Schedule
  batch_size: int
  examples: int
  max_failures: float
  patience: int = 0
  least_epochs: int = 0
  ties: str = "first"
  checkpoint_seconds: float = 0.0
  unit: str = "images"

  def __post_init__(self):
    optimisers.check_one_of("ties", self.ties, TIES)
    for name in ("patience", "least_epochs", "checkpoint_seconds"):
      optimisers.check_range(name, getattr(self, name), least=0)
    for name in ("epochs", "log_steps", "checkpoint_steps", "checkpoints"):
      optimisers.check_range(name, getattr(self, name), least=1)


@dataclasses.dataclass(frozen=True)
class Fitted:
  """What training came to.

  Attributes:
    numbers: parameters and statistics of the best epoch.
    epoch: which it was, from 1.
    records: the lines of metrics.jsonl.
    notes: what the user should know, a line each.
    ended: whether training is over; False where `stop_after` paused it.
  """

  numbers: Numbers
  epoch: int
  records: list[Record]
  notes: list[str]
  ended: bool


def fit(
  task: Task,
  settings: Settings,
  *,
  devices: parallel.Devices,
  directory: pathlib.Path,
  journal: Journal,
  stop_after: int | None = None,
) -> Fitted:
  """Trains; the same call after any stop goes on where it was.

  Args:
    task: what is trained.
    settings: how long, and what to write down.
    devices: where.
    directory: for `checkpoints/`.
    journal: takes the lines of metrics.jsonl.
    stop_after: epochs, counted from the first, after which to pause; the same
      call without it goes on as if there had been no pause.

  Returns:
    The best epoch's numbers, and all that was logged.

  Raises:
    RunError: the loss is no number, too many examples cannot be read, or a
      checkpoint cannot be written.
    SystemExit: 143 after SIGTERM, once the state is saved; on several
      processes all end at the same step, whichever got the signal.
  """
  with (
    _preemption() as asked_to_end,
    pipeline.prefetch(task.batches, task.put) as batches,
    checkpoints.Checkpoints(
      directory / "checkpoints", settings.checkpoints
    ) as store,
  ):
    run = _Run(
      task,
      settings,
      devices,
      journal,
      batches,
      store,
      devices.agreed(asked_to_end),
    )
    try:
      ended = run.train(stop_after)
    except inference.Stopped:
      run.save()
      store.wait()
      raise SystemExit(signals.PREEMPTED) from None
    return run.fitted(ended)


class _Run:
  """A training in hand: the state, what was logged, and the place in it."""

  def __init__(
    self,
    task: Task,
    settings: Settings,
    devices: parallel.Devices,
    journal: Journal,
    batches: pipeline.Prefetched,
    store: checkpoints.Checkpoints,
    preempted: Callable[[], bool],
  ):
    self._task = task
    self._settings = settings
    self._devices = devices
    self._journal = journal
    self._batches = batches
    self._store = store
    self._preempted = preempted
    self._steps = len(task.batches)
    self._per_epoch = self._steps // settings.epochs
    self._records: list[Record] = []
    self._unreadable: inference.Failures = []  # of validation
    # Of the epoch in hand, but for the first step of a process, which
    # compiles: before the last pause of the clock, and when it went on.
    self._spent = 0.0
    self._began: float | None = None
    self._clock = _Clock(settings.unit)
    self._saved = -math.inf
    self._running: collections.deque[jax.Array] = collections.deque()
    state = task.first_state()
    self._best = jax.tree.map(np.array, steps.trained_numbers(state))
    state = self._restore(state)
    self._done = int(state.step)
    self._state = devices.replicate(state)

  def _restore(self, state: steps.State) -> steps.State:
    """Returns the state to go on from: the newest saved, or the first."""
    saved, self._notes = self._store.restore((state, self._best))
    if saved is not None:
      (state, self._best), self._records = (
        saved.tree,
        files.finite(saved.records),
      )
      self._spent = saved.seconds
      self._batches.set_state(saved.place)
      self._unreadable = saved.place["unreadable"]
      if saved.devices != str(self._devices):
        self._notes.append(
          f"resumed on {self._devices} after {saved.devices}: the numbers are"
          " those of an uninterrupted run only up to rounding"
        )
    self._journal.replace_log(self._records)
    for note in self._notes:
      print(note, flush=True)
    return state

  def train(self, stop_after: int | None) -> bool:
    """Trains to the end or to a pause; returns whether it is the end.

    Raises:
      inference.Stopped: the process was asked to end.
    """
    epoch = 1 + len(epochs_of(self._records))
    with progress.Progress(
      "training",
      "steps",
      self._steps,
      self._done,
      at=f"at epoch {epoch} of {self._settings.epochs}, step {self._done:,}",
      quiet=not parallel.is_first(),
    ) as bar:
      while True:
        if self._done == (len(epochs_of(self._records)) + 1) * self._per_epoch:
          self._end_epoch()
          bar.tell(_in_words(self._records[-1], self._settings))
        if self._has_ended():
          return True
        if len(epochs_of(self._records)) >= (stop_after or math.inf):
          self.save()
          return False
        if self._preempted():
          raise inference.Stopped
        self._step()
        bar.update()
        self._after_step()

  def save(self, is_best: bool = False) -> None:
    """Begins to save where training is, if it is not saved yet."""
    # An epoch's end is saved once before its validation and once after it.
    number = self._done + len(epochs_of(self._records))
    if number == self._store.newest:
      return
    self._saved = time.monotonic()
    place = dict(self._batches.get_state())
    place["failures"] = inference.gather_failures(place["failures"])
    place["unreadable"] = self._unreadable
    self._store.save(
      number,
      (self._state, self._best),
      place,
      self._records,
      str(self._devices),
      seconds=self._seconds(),
      is_best=is_best,
    )

  def fitted(self, ended: bool) -> Fitted:
    """Returns what training came to, and tells the task what was unreadable."""
    batches = self._task.batches
    inference.share_failures(batches)
    batches.add_failures(self._unreadable)
    self._task.failures |= dict(batches.failures)
    settings = self._settings
    epoch = best_epoch(self._records, settings.metric, settings.ties)
    return Fitted(self._best, epoch, self._records, self._notes, ended)

  def _step(self) -> None:
    step = self._task.step(1 + self._done // self._per_epoch)
    with self._clock.waiting():
      batch = next(self._batches)
    self._state, metrics = step(self._state, batch)
    self._done += 1
    self._running.append(metrics["loss"])
    if len(self._running) > _AHEAD:
      self._running.popleft().block_until_ready()
    self._clock.tick(metrics["loss"], self._settings.batch_size)
    if self._began is None:
      self._began = time.monotonic()

  def _after_step(self) -> None:
    """Does what is due every so many steps."""
    settings, recipe = self._settings, self._task.recipe
    is_logged = self._done % settings.log_steps == 0
    is_last = self._done % self._per_epoch == 0
    if is_logged:
      self._write(
        event="train",
        epoch=1 + (self._done - 1) // self._per_epoch,
        step=self._done,
        **_means(self._state),
        learning_rate=float(
          recipe.optimiser.learning_rate
          * recipe.schedule(self._done - 1)
          * jax.device_get(self._state.scale)
        ),
        timing=self._clock.read(),
      )
    if is_logged or is_last:
      inference.share_failures(self._task.batches)
      pipeline.too_many(
        self._task.batches.failures,
        settings.examples,
        settings.max_failures,
        settings.unit,
      )
    if self._done % settings.checkpoint_steps == 0 and not is_last:
      self._save_if_due()

  def _end_epoch(self) -> None:
    """Validates, writes the epoch's line, and decides what follows."""
    jax.block_until_ready(self._state.step)
    self._spent, self._began = self._seconds(), None
    started = time.monotonic()
    numbers = steps.trained_numbers(self._state)
    scores, self._unreadable = self._task.validate(
      numbers, self._unreadable, self._preempted
    )
    is_best = _is_best(self._records, scores, self._settings)
    if is_best:
      self._best = jax.tree.map(np.array, jax.device_get(numbers))
    self._write(
      event="epoch",
      epoch=self._done // self._per_epoch,
      step=self._done,
      **_means(self._state),
      val=scores,
      timing={
        "training_seconds": self._spent,
        "validation_seconds": time.monotonic() - started,
      },
    )
    scale = self._settings.schedule.scale(_val_losses(self._records))
    self._state = dataclasses.replace(
      self._state,
      sums=self._devices.replicate(
        {name: np.zeros((), np.float32) for name in self._state.sums}
      ),
      scale=self._devices.replicate(np.float32(scale)),
    )
    self._spent = 0.0
    self._save_if_due(is_best)
    self._clock = _Clock(self._settings.unit)
    self._began = time.monotonic()

  def _save_if_due(self, is_best: bool = False) -> None:
    waited = time.monotonic() - self._saved
    if waited >= self._settings.checkpoint_seconds:
      self.save(is_best)

  def _has_ended(self) -> bool:
    rate = self._task.recipe.optimiser.learning_rate
    return (
      self._done == self._steps
      or self._settings.schedule.ended(rate, _val_losses(self._records))
      or _waited_enough(self._records, self._settings)
    )

  def _write(self, **record: Any) -> None:
    # As a checkpoint gives them back: what is no number is null.
    record = files.finite(record)
    self._records.append(record)
    self._journal.log(**record)

  def _seconds(self) -> float:
    if self._began is None:
      return self._spent
    return self._spent + time.monotonic() - self._began


def epochs_of(records: Sequence[Record]) -> list[Record]:
  """Returns the lines of epochs alone."""
  return [record for record in records if record["event"] == "epoch"]


def _in_words(record: Record, settings: Settings) -> str:
  """Says what the validation of an epoch came to."""
  scores = ", ".join(
    f"{name} {record['val'][name]:.3f}"
    for name in dict.fromkeys(("loss", settings.metric, "auroc"))
    if record["val"].get(name) is not None
  )
  return f"epoch {record['epoch']} of {settings.epochs}, validation {scores}"


def best_epoch(
  records: Sequence[Record], metric: str, ties: str = "first"
) -> int:
  """Returns the epoch, from 1, whose validation metric is best; 0 for none.

  One without a number is never best unless all are.

  Args:
    records: the lines of metrics.jsonl.
    metric: of the validation split.
    ties: which of equals it is, "first" or "last".
  """
  best, best_value = 0, -math.inf
  for record in epochs_of(records):
    value = _goodness(record["val"], metric)
    if not best or value > best_value or ties == "last" and value == best_value:
      best, best_value = record["epoch"], value
  return best


def _waited_enough(records: Sequence[Record], settings: Settings) -> bool:
  """Whether the last `patience` epochs brought no better one."""
  done = len(epochs_of(records))
  best = best_epoch(records, settings.metric, settings.ties)
  return done > settings.least_epochs and 0 < settings.patience <= done - best


def _is_best(
  records: Sequence[Record], scores: Mapping[str, float], settings: Settings
) -> bool:
  new = {"event": "epoch", "epoch": len(records) + 1, "val": scores}
  return (
    best_epoch([*records, new], settings.metric, settings.ties) == new["epoch"]
  )


def _goodness(scores: Mapping[str, float], metric: str) -> float:
  value = scores[metric]
  if value is None or not math.isfinite(value):
    return -math.inf
  return value if METRICS[metric].higher else -value


def _val_losses(records: Sequence[Record]) -> list[float]:
  losses = [record["val"]["loss"] for record in epochs_of(records)]
  return [math.nan if loss is None else loss for loss in losses]


def _means(state: steps.State) -> dict[str, float]:
  """Returns the means of the epoch so far; waits for the step."""
  sums = {k: float(v) for k, v in jax.device_get(state.sums).items()}
  loss = sums["loss"] / max(sums["weight"], 1e-12)
  if not math.isfinite(loss):
    raise errors.DivergedError(
      f"the training loss is {loss} at step {int(state.step)}; lower"
      " config.optimiser.learning_rate or set config.optimiser.clip_norm, in"
      " another workdir"
    )
  if "decisions" not in sums:
    return {"loss": loss}
  return {"loss": loss, "accuracy": sums["hits"] / max(sums["decisions"], 1.0)}


class _Clock:
  """Examples a second, and the share of time that went into waiting for them.

  Args:
    unit: what an example is.
  """

  def __init__(self, unit: str):
    self._unit = unit
    self._started: float | None = None
    self._waited = 0.0
    self._steps = 0
    self._examples = 0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    started = time.monotonic()
    yield
    self._waited += time.monotonic() - started

  def tick(self, result: jax.Array, examples: int) -> None:
    """Counts a step; the first one compiles, and only starts the clock."""
    if self._started is None:
      result.block_until_ready()
      self._restart()
      return
    self._steps += 1
    self._examples += examples

  def read(self) -> dict[str, float]:
    """Returns what was measured since it was last read."""
    now = time.monotonic()
    seconds = now - (now if self._started is None else self._started)
    measured: dict[str, float] = {}
    if self._steps:
      measured = {
        f"{self._unit}_per_second": self._examples / seconds,
        "step_seconds": seconds / self._steps,
        "waiting_share": self._waited / seconds,
      }
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
      measured["peak_memory_bytes"] = memory["peak_bytes_in_use"]
    self._restart()
    return measured

  def _restart(self) -> None:
    self._started = time.monotonic()
    self._waited, self._steps, self._examples = 0.0, 0, 0


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[], bool]]:
  """Takes SIGTERM as a wish: yields whether it has come."""
  asked = threading.Event()
  # Python allows handlers in the main thread alone; elsewhere, whoever runs
  # the thread decides.
  if threading.current_thread() is not threading.main_thread():
    yield asked.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield asked.is_set
  finally:
    signal.signal(signal.SIGTERM, before)
