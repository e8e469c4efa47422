"""Trainings as units: told, trained once, and kept with what they came to.

A unit's directory holds metrics.jsonl and checkpoints while it is trained, and
then `done.json`, or `failed.json` with the reason, and what is predicted.
"""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from jaxtransfer import errors, files, hosts, parallel, progress
from jaxtransfer import workdir as workdirs
from jaxtransfer.training import loop
from jaxtransfer.units import Named, Units

U = TypeVar("U", bound=Named)


class Training(loop.Task, Protocol):
  """A task with how long it is trained."""

  @property
  def settings(self) -> loop.Settings:
    """Of the loop."""

  @property
  def trained_params(self) -> int:
    """How many numbers the training may change."""


def settle(
  kept: Units,
  units: Sequence[U],
  train: Callable[[U, int | None], None],
  stop_after: int | None = None,
) -> None:
  """Sees to it that units are trained, here or by another process, and tells.

  Args:
    kept: where they are.
    units: which.
    train: trains one; it is given `stop_after` too.
    stop_after: epochs after which a unit may pause.
  """
  units, seconds = list(dict.fromkeys(units)), []

  def work(unit: U, stop_after: int | None) -> None:
    left = sum(kept.state(u, stop_after) == "open" for u in units)
    words = ""
    if seconds:
      mean = float(np.mean(seconds))
      words = f"; {progress.duration(mean * left)} left"
    print(
      f"training {len(units) - left + 1} of {len(units)}: {unit.name}{words}",
      flush=True,
    )
    started = time.monotonic()
    train(unit, stop_after)
    seconds.append(time.monotonic() - started)

  kept.settle(units, work, stop_after)


def fit(
  kept: Units,
  unit: Named,
  training: Training,
  devices: parallel.Devices,
  metric: str,
  stop_after: int | None = None,
) -> tuple[loop.Fitted, dict[str, Any]] | None:
  """Trains a unit, to its end or to a pause.

  One that diverges, or does not fit the memory, leaves failed.json, and the
  others go on; one that pauses leaves paused.json.

  Args:
    kept: where units are.
    unit: which.
    training: what is trained.
    devices: where.
    metric: of validation, that is told.
    stop_after: as `loop.fit` takes it.

  Returns:
    What came of it, and the record that makes it done once everything else is
    written; None where it failed or paused.
  """
  directory = kept.directory(unit)
  journal = workdirs.Workdir(directory, {}, "", hosts.One())
  try:
    fitted = loop.fit(
      training,
      training.settings,
      devices=devices,
      directory=directory,
      journal=journal,
      stop_after=stop_after,
    )
  except (errors.DivergedError, jax.errors.JaxRuntimeError) as e:
    if "RESOURCE_EXHAUSTED" not in str(e) and not isinstance(
      e, errors.DivergedError
    ):
      raise
    reason = str(e).splitlines()[0][:300]
    print(f"{unit.name} failed: {reason}", flush=True)
    files.write_json(directory / "failed.json", {"reason": reason})
    return None
  epochs = loop.epochs_of(fitted.records)
  record = {
    "epoch": len(epochs),
    "best_epoch": fitted.epoch,
    "val": epochs[fitted.epoch - 1]["val"],
    "seconds": sum(
      seconds
      for line in epochs
      for key, seconds in line["timing"].items()
      if key.endswith("seconds")
    ),
    "trained_params": training.trained_params,
    "failures": training.failures,
  }
  value = record["val"][metric]
  print(
    f"{unit.name}: {len(epochs)} epochs,"
    f" validation {metric} {'undefined' if value is None else f'{value:.3f}'},"
    f" {record['seconds']:.0f} s",
    flush=True,
  )
  if not fitted.ended:
    files.write_json(directory / "paused.json", record)
    return None
  return fitted, record


def unreadable(kept: Units) -> dict[str, str]:
  """Returns example -> why it could not be read, of all trainings."""
  reasons: dict[str, str] = {}
  for pattern in ("done.json", "*_failures.json"):
    for records in kept.records(pattern).values():
      for record in records:
        reasons |= record.get("failures", {})
  return reasons


def failed(kept: Units) -> dict[str, str]:
  """Returns the name of every training that failed -> why."""
  return {
    name: record["reason"]
    for name, (record,) in kept.records("failed.json").items()
  }


def value_of(record: Mapping[str, Any] | None, metric: str) -> float:
  """Returns a training's score of validation; NaN where undefined.

  Args:
    record: as `fit` returns it; None where there is none.
    metric: which.
  """
  value = None if record is None else record["val"][metric]
  return np.nan if value is None else value


def save_outputs(
  path: pathlib.Path, outputs: tuple[np.ndarray, np.ndarray]
) -> None:
  """Writes rows and logits of a split, atomically."""
  rows, logits = outputs
  with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
    np.savez(f, rows=rows, logits=logits)


def load_outputs(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows and logits that `save_outputs` wrote."""
  with np.load(path, allow_pickle=False) as stored:
    return stored["rows"], stored["logits"]
