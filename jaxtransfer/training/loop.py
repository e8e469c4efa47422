"""Training from the first step, or from a checkpoint, to the last."""

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

from jaxtransfer import errors, files, parallel, progress, signals
from jaxtransfer.data import pipeline
from jaxtransfer.networks.network import Network
from jaxtransfer.training import checkpoints, optimisers, steps

# Metrics of which less is better.
LOWER = ("loss", "ece", "brier")
# Steps given to the devices before one of them has ended: the devices never
# wait, and images do not pile up in their memory.
_AHEAD = 2

Numbers = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
Record = dict[str, Any]


class Journal(Protocol):
  """Where metrics.jsonl is written."""

  def log(self, **values: Any) -> None:
    """Appends a line."""

  def replace_log(self, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes these lines in place of all that are there."""


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
    images: of the training split.
    max_failures: share of unreadable images that stops the run.
    patience: epochs without a better one after which training ends; 0 for
      never.

  Raises:
    UsageError: a value out of range.
  """

  epochs: int
  metric: str
  log_steps: int
  checkpoint_steps: int
  checkpoints: int
  images: int
  max_failures: float
  patience: int = 0

  def __post_init__(self):
    optimisers.check_range("patience", self.patience, least=0)
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
    failures: (name, reason) of images of training and validation that could
      not be read, in this start of the run or one before.
    ended: whether training is over; False where `stop_after` paused it.
  """

  numbers: Numbers
  epoch: int
  records: list[Record]
  notes: list[str]
  failures: list[tuple[str, str]]
  ended: bool


class _Preempted(Exception):
  """The process was asked to end."""


def fit(
  network: Network,
  recipe: steps.Recipe,
  schedule: optimisers.Schedule,
  settings: Settings,
  *,
  train: pipeline.Batches,
  validate: Callable[[], pipeline.Batches],
  score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
  devices: parallel.Devices,
  directory: pathlib.Path,
  journal: Journal,
  seed: int,
  stop_after: int | None = None,
) -> Fitted:
  """Trains a network; the same call after any stop goes on where it was.

  Args:
    network: as training begins; it is not changed.
    recipe: what a step does.
    schedule: for what is decided between epochs.
    settings: how long, and what to write down.
    train: shuffled batches of all epochs; it is closed.
    validate: makes the validation batches, in order.
    score: (rows, logits (N, C)) -> the metrics of the validation split, `loss`
      and `settings.metric` among them.
    devices: where.
    directory: for `checkpoints/`.
    journal: takes the lines of metrics.jsonl.
    seed: of what is random in the steps.
    stop_after: epochs, counted from the first, after which to pause; the same
      call without it goes on as if there had been no pause.

  Returns:
    The best epoch's numbers, and all that was logged.

  Raises:
    RunError: the loss is no number, too many images cannot be read, or a
      checkpoint cannot be written.
    SystemExit: 143 after SIGTERM, once the state is saved; on several
      processes all end at the same step, whichever got the signal.
  """
  graph, params, statistics = steps.take_apart(network)
  step = devices.compile_step(steps.make_step(graph, recipe))
  forward = devices.compile(steps.make_predict(graph, recipe.mean, recipe.std))
  state = steps.first_state(network, recipe, seed)
  best: Numbers = jax.tree.map(np.array, (params, statistics))
  per_epoch = len(train) // settings.epochs
  learning_rate = recipe.optimiser.learning_rate
  with (
    _preemption() as asked_to_end,
    pipeline.prefetch(train, lambda b: devices.put(filled(b))) as batches,
    checkpoints.Checkpoints(
      directory / "checkpoints", settings.checkpoints
    ) as kept,
  ):
    preempted = devices.agreed(asked_to_end)
    found, notes = kept.restore((state, best))
    records: list[Record] = []
    # Of the epoch in hand, but for the first step of a process, which
    # compiles: before the last pause of the clock, and when it went on.
    spent, began = 0.0, None
    unreadable: list[list[Any]] = []  # (row, reason), of validation
    if found is not None:
      (state, best), records = found.tree, files.finite(found.records)
      spent = found.seconds
      batches.set_state(found.place)
      unreadable = found.place["unreadable"]
      if found.devices != str(devices):
        notes.append(
          f"resumed on {devices} after {found.devices}: the numbers are those"
          " of an uninterrupted run only up to rounding"
        )
    journal.replace_log(records)
    for note in notes:
      print(note, flush=True)
    done = int(state.step)
    state = devices.replicate(state)

    def write(**record: Any) -> None:
      # As a checkpoint gives them back: what is no number is null.
      record = files.finite(record)
      records.append(record)
      journal.log(**record)

    def seconds() -> float:
      return spent if began is None else spent + time.monotonic() - began

    def save(is_best: bool = False) -> None:
      # An epoch's end is saved once before its validation and once after it.
      number = done + len(epochs_of(records))
      if number != kept.newest:
        place = dict(batches.get_state())
        place["failures"] = _of_everyone(place["failures"])
        place["unreadable"] = unreadable
        kept.save(
          number,
          (state, best),
          place,
          records,
          str(devices),
          seconds=seconds(),
          is_best=is_best,
        )

    clock = _Clock()
    running: collections.deque[jax.Array] = collections.deque()
    epoch = 1 + len(epochs_of(records))
    bar = progress.Progress(
      "training",
      "steps",
      len(train),
      done,
      at=f"at epoch {epoch} of {settings.epochs}, step {done:,}",
      quiet=not parallel.is_first(),
    )
    try:
      while True:
        if done == (len(epochs_of(records)) + 1) * per_epoch:
          jax.block_until_ready(state.step)
          spent, began = seconds(), None
          started = time.monotonic()
          numbers = steps.trained_numbers(state)
          with validate() as val:
            val.add_failures(unreadable)
            rows, logits = predict(forward, numbers, val, devices, preempted)
            unreadable = val.get_state()["failures"]
          scores = score(rows, logits)
          is_best = _is_best(records, scores, settings.metric)
          if is_best:
            best = jax.tree.map(np.array, jax.device_get(numbers))
          write(
            event="epoch",
            epoch=done // per_epoch,
            step=done,
            **_means(state),
            val=scores,
            timing={
              "training_seconds": spent,
              "validation_seconds": time.monotonic() - started,
            },
          )
          bar.tell(_in_words(records[-1], settings))
          scale = schedule.scale(_val_losses(records))
          state = dataclasses.replace(
            state,
            sums=devices.replicate(steps.no_sums()),
            scale=devices.replicate(np.float32(scale)),
          )
          spent = 0.0
          save(is_best)
          clock, began = _Clock(), time.monotonic()
        ended = (
          done == len(train)
          or schedule.ended(learning_rate, _val_losses(records))
          or _waited_enough(records, settings)
        )
        paused = len(epochs_of(records)) >= (stop_after or math.inf)
        if ended or paused:
          break
        if preempted():
          raise _Preempted
        with clock.waiting():
          batch = next(batches)
        state, metrics = step(state, batch)
        done += 1
        bar.update()
        running.append(metrics["loss"])
        if len(running) > _AHEAD:
          running.popleft().block_until_ready()
        clock.tick(metrics["loss"], batch["label"].size)
        if began is None:
          began = time.monotonic()
        if done % settings.log_steps == 0:
          write(
            event="train",
            epoch=1 + (done - 1) // per_epoch,
            step=done,
            **_means(state),
            learning_rate=float(
              learning_rate
              * recipe.schedule(done - 1)
              * jax.device_get(state.scale)
            ),
            timing=clock.read(),
          )
        if done % per_epoch == 0 or done % settings.log_steps == 0:
          _share_failures(train)
          pipeline.too_many(
            train.failures, settings.images, settings.max_failures
          )
        if done % settings.checkpoint_steps == 0 and done % per_epoch:
          save()
    except _Preempted:
      save()
      kept.wait()
      raise SystemExit(signals.PREEMPTED) from None
    finally:
      bar.close()
    _share_failures(train)
    train.add_failures(unreadable)
    return Fitted(
      best,
      best_epoch(records, settings.metric),
      records,
      notes,
      train.failures,
      ended,
    )


def predict(
  forward: Callable[[Numbers, Any], jax.Array],
  numbers: Numbers,
  batches: pipeline.Batches,
  devices: parallel.Devices,
  stop: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the logits of all images that could be read.

  Args:
    forward: `steps.make_predict`, compiled.
    numbers: parameters and statistics on the devices.
    batches: in order.
    devices: where it was compiled for.
    stop: asked between batches whether the process has to end.

  Returns:
    (N,) int64 rows of the source and (N, C) float32 logits: all of them, and
    the failures of `batches` too, on every process.
  """
  rows, logits = [], []
  # One batch is on its way while the one before is fetched.
  last = None

  def fetch() -> None:
    about, output = last
    row, mask = jax.device_get(about)
    rows.append(row[mask])
    logits.append(devices.get(output)[mask])

  for batch in batches:
    if stop():
      raise _Preempted
    output = forward(numbers, devices.put(batch["image"]))
    if last is not None:
      fetch()
    about = batch["row"].astype(np.int32), batch["mask"]
    last = devices.share(about), output
  if last is not None:
    fetch()
  _share_failures(batches)
  return np.concatenate(rows).astype(np.int64), np.concatenate(logits)


def _of_everyone(failures: list[list[Any]]) -> list[list[Any]]:
  """Returns (row, reason) of what any process could not read."""
  found = [pair for part in parallel.everyone(failures) for pair in part]
  return [list(pair) for pair in dict(found).items()]


def _share_failures(batches: pipeline.Batches) -> None:
  batches.add_failures(_of_everyone(batches.get_state()["failures"]))


def filled(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Puts readable images in the place of those that are not, for BatchNorm.

  Their mask stays False, so they count for nothing in the loss; a black image
  would count in the batch's statistics.

  Args:
    batch: as the pipeline makes it.

  Returns:
    The batch with int32 rows; one without any readable image is as it was.
  """
  image, mask = batch["image"], batch["mask"]
  good, bad = np.flatnonzero(mask), np.flatnonzero(~mask)
  if len(good) and len(bad):
    image = image.copy()
    image[bad] = image[good[np.arange(len(bad)) % len(good)]]
  return {**batch, "image": image, "row": batch["row"].astype(np.int32)}


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


def best_epoch(records: Sequence[Record], metric: str) -> int:
  """Returns the epoch, from 1, whose validation metric is best; 0 for none.

  The first of equals; one without a number is never best unless all are.
  """
  best, best_value = 0, -math.inf
  for record in epochs_of(records):
    value = _goodness(record["val"], metric)
    if not best or value > best_value:
      best, best_value = record["epoch"], value
  return best


def _waited_enough(records: Sequence[Record], settings: Settings) -> bool:
  """Whether the last `patience` epochs brought no better one."""
  done = len(epochs_of(records))
  best = best_epoch(records, settings.metric)
  return 0 < settings.patience <= done - best


def _is_best(
  records: Sequence[Record], scores: Mapping[str, float], metric: str
) -> bool:
  new = {"event": "epoch", "epoch": len(records) + 1, "val": scores}
  return best_epoch([*records, new], metric) == new["epoch"]


def _goodness(scores: Mapping[str, float], metric: str) -> float:
  value = scores[metric]
  if value is None or not math.isfinite(value):
    return -math.inf
  return -value if metric in LOWER else value


def _val_losses(records: Sequence[Record]) -> list[float]:
  losses = [record["val"]["loss"] for record in epochs_of(records)]
  return [math.nan if loss is None else loss for loss in losses]


def _means(state: steps.State) -> dict[str, float]:
  """Returns loss and accuracy of the epoch so far; waits for the step."""
  sums = {k: float(v) for k, v in jax.device_get(state.sums).items()}
  loss = sums["loss"] / max(sums["weight"], 1e-12)
  if not math.isfinite(loss):
    raise errors.DivergedError(
      f"the training loss is {loss} at step {int(state.step)}; lower"
      " config.optimiser.learning_rate or set config.optimiser.clip_norm, in"
      " another workdir"
    )
  accuracy = sums["hits"] / max(sums["decisions"], 1.0)
  return {"loss": loss, "accuracy": accuracy}


class _Clock:
  """Images a second, and how much of the time went into waiting for them."""

  def __init__(self):
    self._started: float | None = None
    self._waited = 0.0
    self._steps = 0
    self._images = 0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    started = time.monotonic()
    yield
    self._waited += time.monotonic() - started

  def tick(self, result: jax.Array, images: int) -> None:
    """Counts a step; the first one compiles, and only starts the clock."""
    if self._started is None:
      result.block_until_ready()
      self._restart()
      return
    self._steps += 1
    self._images += images

  def read(self) -> dict[str, float]:
    """Returns what was measured since it was last read."""
    seconds = time.monotonic() - self._started
    found: dict[str, float] = {}
    if self._steps:
      found = {
        "images_per_second": self._images / seconds,
        "step_seconds": seconds / self._steps,
        "waiting_share": self._waited / seconds,
      }
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
      found["peak_memory_bytes"] = memory["peak_bytes_in_use"]
    self._restart()
    return found

  def _restart(self) -> None:
    self._started = time.monotonic()
    self._waited, self._steps, self._images = 0.0, 0, 0


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
