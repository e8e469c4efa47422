"""What every training reads of its config, whatever it trains on."""

from collections.abc import Callable

import ml_collections

from jaxtransfer import errors, parallel
from jaxtransfer.training import loop, optimisers, steps

CLASS_WEIGHTS = ("none", "balanced")


def check(config: ml_collections.ConfigDict, devices: parallel.Devices) -> None:
  """Checks the keys that say how to train, before anything is opened.

  Args:
    config: the whole config, with the keys of `configuration.optimisation`.
    devices: where.

  Raises:
    UsageError: naming the key.
  """
  optimisers.check_one_of(
    "loss.class_weights", config.loss.class_weights, CLASS_WEIGHTS
  )
  for key in ("resamples", "epochs", "accumulate"):
    optimisers.check_range(key, config[key], least=1)
  optimisers.check_range("prevalence", config.prevalence, least=0, below=1)
  for share in config.sensitivities:
    optimisers.check_range("sensitivities", share, above=0, most=1)
  rate = optimiser(config).learning_rate
  if optimisers.Schedule(**config.schedule).ended(rate, []):
    raise errors.UsageError(
      f"config.optimiser.learning_rate is {rate}, below config.schedule.floor,"
      f" {config.schedule.floor}: training would end before its first step;"
      " raise the one or lower the other"
    )
  parts = len(devices.devices) * config.accumulate
  if config.batch_size % parts:
    raise errors.UsageError(
      f"config.batch_size is {config.batch_size}; it must be a multiple of"
      f" {parts}: {len(devices.devices)} devices x config.accumulate"
    )


def optimiser(config: ml_collections.ConfigDict) -> optimisers.Optimiser:
  """Makes the optimiser; the rate of a backbone is a parameter's affair."""
  settings = dict(config.optimiser)
  settings.pop("backbone", None)
  return optimisers.Optimiser(**settings)


def recipe(
  config: ml_collections.ConfigDict,
  count: int,
  rate: Callable[[str], float] = lambda name: 1.0,
) -> steps.Recipe:
  """Returns what a step does.

  Args:
    config: the whole config.
    count: of the steps of all epochs.
    rate: a parameter's name -> its share of the learning rate.
  """
  schedule = optimisers.Schedule(**config.schedule)
  return steps.Recipe(
    optimiser=optimiser(config),
    schedule=schedule.multiplier(count, count // config.epochs),
    rate=rate,
    accumulate=config.accumulate,
    average=config.average,
  )


def settings(
  config: ml_collections.ConfigDict, metric: str, examples: int, unit: str
) -> loop.Settings:
  """Returns how long to train, and what to write down.

  Args:
    config: the whole config; of it `least_epochs`, `ties` and
      `checkpoint_seconds` where the job has them.
    metric: of validation, by which the epoch is chosen.
    examples: of the training split.
    unit: what they are.
  """
  keys = ("least_epochs", "ties", "checkpoint_seconds")
  return loop.Settings(
    epochs=config.epochs,
    metric=metric,
    log_steps=config.log_steps,
    checkpoint_steps=config.checkpoint_steps,
    checkpoints=config.checkpoints,
    schedule=optimisers.Schedule(**config.schedule),
    batch_size=config.batch_size,
    examples=examples,
    max_failures=config.data.max_failures,
    patience=config.patience,
    unit=unit,
    **{key: config[key] for key in keys if key in config},
  )
