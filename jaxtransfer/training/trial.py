"""One training as a config describes it: what all jobs that train share.

A `Trial` binds a network to images, a division of them and a recipe; it is
trained, judged on validation, and read on the test split when it is asked to.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from scipy import special

from jaxtransfer import errors, files, parallel
from jaxtransfer.data import images as imaging
from jaxtransfer.data import labels as labelling
from jaxtransfer.data import pipeline, sources
from jaxtransfer.data import splits as splitting
from jaxtransfer.measure import bootstrap, calibration, curves, evaluation
from jaxtransfer.networks.network import Network
from jaxtransfer.training import augment, loop, optimisers, scoring, steps

HEADS = ("gap", "flatten")
CLASS_WEIGHTS = ("none", "balanced")
# A larger table of confusions is no longer one that somebody reads.
_MOST_CONFUSED = 50


@dataclasses.dataclass(frozen=True)
class Data:
  """The images of a run.

  Attributes:
    examples: the source.
    rows: split -> rows of the source.
    names: of what is predicted.
    targets: (labels, C) float32, as `data.labels.read_targets` returns them.
    notes: what the user should know, a line each.
    fold: which of the divisions of a cross-validation it is; None where there
      is one division.
  """

  examples: sources.Examples
  rows: Mapping[str, np.ndarray]
  names: list[str]
  targets: np.ndarray
  notes: list[str]
  fold: int | None = None

  def groups_of(self, rows: np.ndarray) -> list[str] | None:
    """Returns the groups of some rows, None where none are known."""
    groups = self.examples.groups
    return None if groups is None else [groups[row] for row in rows]

  def resample(
    self, rows: np.ndarray, many_labels: bool, resamples: int, seed: int
  ) -> np.ndarray:
    """Returns (R, N), how often each row is in each of R resamples.

    Args:
      rows: (N,) of the source.
      many_labels: whether an image may have several labels. The resamples are
        then not stratified: a label of the source is a combination, and the
        only group with a rare one would be in every resample.
      resamples: R.
      seed: decides the draw, together with the fold: every fold tests other
        patients, and is drawn on its own.
    """
    labels = self.examples.labels[rows]
    return bootstrap.resample_weights(
      np.zeros_like(labels) if many_labels else labels,
      self.groups_of(rows),
      resamples,
      seed if self.fold is None else (seed, self.fold),
    )


def open_data(
  config: ml_collections.ConfigDict, splits: str | os.PathLike[str]
) -> Data:
  """Opens the source and divides it, or reads how it was divided.

  Args:
    config: the whole config.
    splits: path of splits.json.

  Raises:
    UsageError: the source or its labels cannot be used.
  """
  check_splits(splits)
  examples, names, targets = open_labelled(config)
  divided, notes = splitting.divide(
    config, examples, splits, every_class=not config.many_labels
  )
  if len(divided["train"]) < config.batch_size:
    notes.append(
      "The train split holds fewer images than config.batch_size,"
      f" {config.batch_size}: every epoch is one step."
    )
  if config.many_labels:
    of_split = {s: targets[examples.labels[r]] for s, r in divided.items()}
    for split in ("val", "test"):
      if np.isnan(of_split[split]).all():
        raise errors.UsageError(
          f"the {split} split has no image with a known label; change the"
          " splits"
        )
    for name, column in zip(names, of_split["train"].T, strict=True):
      if not (column == 0).any() or not (column == 1).any():
        raise errors.UsageError(
          f"the train split has no image with, or none without, {name!r};"
          " leave it out or change the splits"
        )
  return Data(examples, divided, names, targets, [*examples.notes, *notes])


def check_splits(path: str | os.PathLike[str]) -> None:
  """Refuses to draw splits anew beside what was trained on others.

  Args:
    path: of splits.json.

  Raises:
    UsageError: trainings have begun beside it, and it is gone.
  """
  path = pathlib.Path(path)
  begun = ("checkpoints/*", "units/*/checkpoints", "units/*/done.json")
  if not path.exists() and any(any(path.parent.glob(of)) for of in begun):
    raise errors.UsageError(
      f"{path} is gone, and other splits would test on what was trained on;"
      " put it back or choose another --workdir"
    )


def open_labelled(
  config: ml_collections.ConfigDict,
) -> tuple[sources.Examples, list[str], np.ndarray]:
  """Opens the source and reads what its labels ask for.

  Returns:
    The source, and names and targets as `Data` holds them.

  Raises:
    UsageError: the source or its labels cannot be used.
  """
  examples = sources.open_source(config.data)
  names, targets = labelling.read_targets(examples.classes, config.many_labels)
  if len(names) < 2 - config.many_labels:
    raise errors.UsageError(
      f"{config.data.source} has {len(names)} classes; this needs two, or one"
      " with config.many_labels"
    )
  scoring.positives(config, names)
  return examples, names, targets


class Trial:
  """A network, what it is trained on, and how.

  Args:
    config: the whole config; of it the keys of `configuration.training`.
    data: the images and their division.
    network: as training begins; it is not changed.
    devices: where.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    seed: decides the order of the images and what is random in the steps.
    metric: of validation, by which the epoch is chosen.
    frozen: how many of the network's first layers are not trained.
    backbone: learning rate of all but the head, as a share of the head's; the
      config's by default.

  Attributes:
    config: as given.
    loss: what is made small.
    batches: of the train split, shuffled, of all epochs.
    steps: of the whole training.
    failures: image -> why it could not be read, of all splits read so far.

  Raises:
    UsageError: a key of the config is out of range.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: Data,
    network: Network,
    devices: parallel.Devices,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    metric: str,
    frozen: int = 0,
    backbone: float | None = None,
  ):
    self.config = config
    self._data = data
    self._network = network
    self._devices = devices
    self._mean, self._std = mean, std
    self._seed = seed
    self.failures: dict[str, str] = {}
    check(config, devices)
    self.batches = pipeline.Batches(
      data.examples,
      data.rows["train"],
      image_size=config.data.image_size,
      batch_size=config.batch_size,
      workers=config.data.workers,
      shuffle_seed=seed,
      epochs=config.epochs,
      drop_last=True,
      shard=devices.shard,
    )
    self.steps = len(self.batches)
    self.loss = make_loss(config, data)
    self._schedule = optimisers.Schedule(**config.schedule)
    optimiser = optimisers.Optimiser(**config.optimiser)
    if backbone is not None:
      optimiser = dataclasses.replace(optimiser, backbone=backbone)
    self._recipe = steps.Recipe(
      loss=self.loss,
      optimiser=optimiser,
      schedule=self._schedule.multiplier(
        self.steps, self.steps // config.epochs
      ),
      augmentation=augment.Augmentation(**config.augment),
      mean=mean,
      std=std,
      frozen=frozen,
      batch_norm=config.batch_norm,
      accumulate=config.accumulate,
      average=config.average,
    )
    self._settings = loop.Settings(
      epochs=config.epochs,
      metric=metric,
      log_steps=config.log_steps,
      checkpoint_steps=config.checkpoint_steps,
      checkpoints=config.checkpoints,
      images=len(data.rows["train"]),
      max_failures=config.data.max_failures,
      patience=config.patience,
    )

  def first_state(self) -> steps.State:
    """Returns the state before the first step."""
    return steps.first_state(self._network, self._recipe, self._seed)

  def step(self, epoch: int) -> Callable:
    """Returns the compiled step, the same in every epoch."""
    del epoch
    graph, _, _ = steps.take_apart(self._network)
    return self._devices.compile_step(steps.make_step(graph, self._recipe))

  def put(self, batch: dict[str, np.ndarray]) -> Any:
    """Sends a batch to the devices."""
    return self._devices.put(loop.filled(batch))

  @property
  def trained_params(self) -> int:
    """How many numbers the training may change."""
    state = self.first_state()
    return sum(value.size for value in state.params.values())

  def fit(
    self,
    directory: pathlib.Path,
    journal: loop.Journal,
    stop_after: int | None = None,
  ) -> loop.Fitted:
    """Trains; the same call after any stop goes on where it was.

    Args:
      directory: for `checkpoints/`.
      journal: takes the lines of metrics.jsonl.
      stop_after: as `loop.fit` takes it.

    Raises:
      RunError, SystemExit: as `loop.fit` raises them.
    """
    fitted = loop.fit(
      self._network,
      self._recipe,
      self._schedule,
      self._settings,
      train=self.batches,
      validate=lambda: self._batches("val"),
      score=self._score,
      devices=self._devices,
      directory=directory,
      journal=journal,
      seed=self._seed,
      stop_after=stop_after,
    )
    self.failures |= dict(fitted.failures)
    return fitted

  def predict(
    self, numbers: loop.Numbers, splits: Sequence[str]
  ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns split -> (N,) rows that could be read and (N, C) logits.

    Args:
      numbers: parameters and statistics.
      splits: which to read.
    """
    graph, _, _ = steps.take_apart(self._network)
    forward = self._devices.compile(
      steps.make_predict(graph, self._mean, self._std)
    )
    numbers = self._devices.replicate(numbers)
    outputs = {}
    for split in splits:
      with self._batches(split) as read:
        outputs[split] = loop.predict(forward, numbers, read, self._devices)
    return outputs

  def measure(
    self,
    rows: np.ndarray,
    logits: np.ndarray,
    weights: np.ndarray | None = None,
  ) -> scoring.Scores:
    """Measures logits; see `scoring.measure`.

    Args:
      rows: (N,) of the source.
      logits: (N, C) float32.
      weights: (R, N), how often an image counts in each of R resamples.
    """
    labels = self._data.examples.labels[rows]
    return scoring.measure(self.loss, self._data.names, labels, logits, weights)

  def _score(self, rows: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    found = self.measure(rows, logits)
    return {**found.values, "classes": found.classes}

  def _batches(self, split: str) -> "_Reported":
    return _Reported(
      self.config, self._data, split, self._devices, self.failures
    )


def check(config: ml_collections.ConfigDict, devices: parallel.Devices) -> None:
  """Checks the keys that say how to train, before anything is opened.

  Raises:
    UsageError: naming the key.
  """
  optimisers.check_one_of("network.head", config.network.head, HEADS)
  optimisers.check_one_of(
    "loss.class_weights", config.loss.class_weights, CLASS_WEIGHTS
  )
  optimisers.check_range(
    "loss.label_smoothing", config.loss.label_smoothing, least=0, below=1
  )
  for key in ("resamples", "epochs", "accumulate"):
    optimisers.check_range(key, config[key], least=1)
  optimisers.check_range("prevalence", config.prevalence, least=0, below=1)
  for share in config.sensitivities:
    optimisers.check_range("sensitivities", share, above=0, most=1)
  optimiser = optimisers.Optimiser(**config.optimiser)
  if optimisers.Schedule(**config.schedule).ended(optimiser.learning_rate, []):
    raise errors.UsageError(
      f"config.optimiser.learning_rate is {config.optimiser.learning_rate},"
      f" below config.schedule.floor, {config.schedule.floor}: training would"
      " end before its first step; raise the one or lower the other"
    )
  augment.Augmentation(**config.augment)
  parts = len(devices.devices) * config.accumulate
  if config.batch_size % parts:
    raise errors.UsageError(
      f"config.batch_size is {config.batch_size}; it must be a multiple of"
      f" {parts}: {len(devices.devices)} devices x config.accumulate"
    )


class _Reported(pipeline.Batches):
  """The batches of a split in order; says at its end what was unreadable."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: Data,
    split: str,
    devices: parallel.Devices,
    unreadable: dict[str, str],
  ):
    super().__init__(
      data.examples,
      data.rows[split],
      image_size=config.data.image_size,
      batch_size=devices.batch_size(config.batch_size),
      workers=config.data.workers,
      shard=devices.shard,
    )
    self._unreadable_of_run = unreadable
    self._limit = len(data.rows[split]), config.data.max_failures
    # What the run has found so far counts, in whichever pass it was.
    for row in data.rows[split].tolist() if unreadable else ():
      if reason := unreadable.get(data.examples.names[row]):
        self.add_failures([(row, reason)])

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close()
    self._unreadable_of_run |= dict(self.failures)
    # What ends the reading early, SIGTERM for one, is not to be hidden.
    if kind is None:
      pipeline.too_many(self.failures, *self._limit)


def make_loss(config: ml_collections.ConfigDict, data: Data) -> steps.Loss:
  """Returns what training makes small.

  Args:
    config: of it `loss` and `many_labels`.
    data: whose train split the classes are weighted by.
  """
  targets = data.targets[data.examples.labels[data.rows["train"]]]
  weights = np.ones(len(data.names), np.float32)
  if config.loss.class_weights == "balanced":
    there = np.nansum(targets, axis=0)
    if config.many_labels:
      weights = np.nansum(1 - targets, axis=0) / there
    else:
      weights = len(targets) / (len(data.names) * there)
  return steps.Loss(
    targets=data.targets,
    many=config.many_labels,
    weights=weights.astype(np.float32),
    smoothing=config.loss.label_smoothing,
  )


def evaluate(
  trial: Trial,
  data: Data,
  outputs: Mapping[str, tuple[np.ndarray, np.ndarray]],
  resamples: int,
  seed: int,
) -> dict[str, Any]:
  """Measures one trained network, its temperature fitted on validation.

  Args:
    trial: it.
    data: its images.
    outputs: of `val` and `test`, as `Trial.predict` returns them.
    resamples: of the groups, for the intervals of the test split.
    seed: of these.

  Returns:
    temperature; rows: (split, metric, value, interval or None, images);
    of the test split confusion: (C, C) or None; missed, operating: as
    `scoring.missed` and `join_points` return them; chance: the balanced
    accuracy of guessing; reliability and curves.
  """
  loss = trial.loss
  labels = {s: data.examples.labels[rows] for s, (rows, _) in outputs.items()}
  labelled = {s: (labels[s], logits) for s, (_, logits) in outputs.items()}
  temperature = calibration.fit_temperature(
    *scoring.decisions(loss, *labelled["val"])
  )
  test_rows, test_logits = outputs["test"]
  weights = data.resample(test_rows, loss.many, resamples, seed)
  rows = []
  for split, suffix, divisor, again in (
    ("val", "", 1.0, None),
    ("test", "", 1.0, weights),
    ("val", ":calibrated", temperature, None),
    ("test", ":calibrated", temperature, weights),
  ):
    read, logits = outputs[split][0], outputs[split][1] / divisor
    flat = _flat(trial.measure(read, logits))
    flat_again = (
      {} if again is None else _flat(trial.measure(read, logits, again))
    )
    for name, value in flat.items():
      # A temperature changes how sure a network is, not its order.
      if suffix and name not in loop.LOWER:
        continue
      interval = None
      if name in flat_again:
        interval = bootstrap.interval(flat_again[name])
      count = scoring.images(loss, data.names, labels[split], name)
      rows.append((split, name + suffix, value, interval, count))
  points = scoring.operate(
    trial.config, loss, data.names, labelled, temperature, weights
  )
  confusion = None
  if not loss.many and len(data.names) <= _MOST_CONFUSED:
    table = np.zeros((len(data.names),) * 2, int)
    np.add.at(table, (labels["test"], test_logits.argmax(1)), 1)
    confusion = table.tolist()
  of_decisions = scoring.decisions(loss, labels["test"], test_logits)
  return {
    "temperature": temperature,
    "rows": rows,
    "confusion": confusion,
    "missed": scoring.missed(loss, data.names, *labelled["test"]),
    "chance": evaluation.chance(loss.targets[labels["test"]], many=loss.many),
    "operating": scoring.join_points([points]),
    "curves": curves.curves(
      loss.targets[labels["test"]],
      test_logits,
      weights,
      many_labels=loss.many,
    ),
    "reliability": {
      "before": _reliability(*of_decisions),
      "after": _reliability(of_decisions[0], of_decisions[1] / temperature),
    },
  }


def doubts(auroc: float | None, low: float | None) -> list[str]:
  """Returns a note where a network cannot be told from guessing, for the page.

  Args:
    auroc: of the test split; None where undefined.
    low: end of its interval; None without one.
  """
  least = auroc if low is None else low
  if least is None or least > 0.5:
    return []
  what = "is" if low is None else "has an interval that reaches down to"
  return [
    f"The test AUROC {what} {least:.3f}: on these images the network cannot be"
    " told from guessing."
  ]


def _flat(scores: scoring.Scores) -> dict[str, scoring.Value]:
  of_classes = {
    f"{metric}:{name}": value
    for metric, values in scores.classes.items()
    for name, value in values.items()
  }
  return {**scores.values, **of_classes}


def _reliability(labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
  probabilities = special.softmax(logits, axis=1)
  found = calibration.reliability(labels, probabilities)
  names = ("confidence", "accuracy", "count")
  return {
    name: [files.finite(v) for v in values]
    for name, values in zip(names, found, strict=True)
  }


def card(
  config: ml_collections.ConfigDict, data: Data, evaluated: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what a user of the exported network must know of its training.

  Args:
    config: the whole config.
    data: its images.
    evaluated: as `evaluate` returns it.
  """
  activation = "sigmoid" if config.many_labels else "softmax"
  return {
    "head": config.network.head,
    "classes": data.names,
    "many_labels": config.many_labels,
    "image_size": config.data.image_size,
    "resize": imaging.resize_card(config.data.image_size),
    "temperature": evaluated["temperature"],
    "metrics": {
      f"{split}:{metric}": files.finite(value)
      for split, metric, value, _, _ in evaluated["rows"]
    },
    "operating_points": {
      "meaning": (
        "An image is called of the class where the probability of this class,"
        f" {activation}(logits / temperature), is at or above the threshold."
        " Thresholds were chosen on the validation split and measured on the"
        " test split."
      ),
      "prevalence": config.prevalence or None,
      "points": [
        {
          "class": point["class"],
          "rule": point["words"],
          "threshold": point["thresholds"][0],
          "val": point["val"],
          "test": {
            key: {"value": of["mean"], "low": of["low"], "high": of["high"]}
            for key, of in point["test"].items()
          },
        }
        for point in evaluated["operating"]
      ],
    },
  }
