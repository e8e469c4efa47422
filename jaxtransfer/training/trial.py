"""One training as a config describes it: what all jobs that train share.

A `Trial` binds a network to images, a division of them and a recipe; it is
trained, judged on validation, and read on the test split when it is asked to.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from jaxtransfer import errors, files, parallel, results
from jaxtransfer.data import images as imaging
from jaxtransfer.data import pipeline
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.measure import evaluation, scoring
from jaxtransfer.networks.network import Network
from jaxtransfer.training import augment, loop, optimisers, steps

HEADS = ("gap", "flatten")
CLASS_WEIGHTS = ("none", "balanced")


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
    steps: of the whole training.
    failures: image -> why it could not be read, of all splits read so far.

  Raises:
    UsageError: a key of the config is out of range.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: Dataset,
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
    self._train = pipeline.Batches(
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
    self.steps = len(self._train)
    loss = steps.Loss(
      targets=data.targets,
      many=data.multilabel,
      weights=data.class_weights(config.loss.class_weights),
      smoothing=config.loss.label_smoothing,
    )
    self._schedule = optimisers.Schedule(**config.schedule)
    optimiser = optimisers.Optimiser(**config.optimiser)
    if backbone is not None:
      optimiser = dataclasses.replace(optimiser, backbone=backbone)
    self._recipe = steps.Recipe(
      loss=loss,
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

  @property
  def trained_params(self) -> int:
    """How many numbers the training may change."""
    state = steps.first_state(self._network, self._recipe, self._seed)
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
      train=self._train,
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

  def _score(self, rows: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    scores = scoring.measure(self._data.outputs(self.config, rows, logits))
    return {**scores.values, "classes": scores.classes}

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
    data: Dataset,
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


def card(
  config: ml_collections.ConfigDict,
  data: Dataset,
  evaluated: evaluation.Evaluation,
) -> dict[str, Any]:
  """Returns what a user of the exported network must know of its training.

  Args:
    config: the whole config.
    data: its images.
    evaluated: what it is worth.
  """
  activation = "sigmoid" if data.multilabel else "softmax"
  return {
    "head": config.network.head,
    "classes": data.names,
    "many_labels": data.multilabel,
    "image_size": config.data.image_size,
    "resize": imaging.resize_card(config.data.image_size),
    "temperature": evaluated.temperature,
    "metrics": {
      f"{of.split}:{of.metric}": files.finite(of.value)
      for of in evaluated.values
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
        for point in results.points(evaluated.points)
      ],
    },
  }
