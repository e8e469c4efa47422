"""The data of a training, and what its outputs are worth."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np
from scipy import special

from jaxtransfer import errors, files
from jaxtransfer.data import images as imaging
from jaxtransfer.data import labels as labelling
from jaxtransfer.data import sources
from jaxtransfer.data import splits as splitting
from jaxtransfer.measure import bootstrap, calibration, curves, evaluation
from jaxtransfer.training import loop, scoring

if TYPE_CHECKING:
  from jaxtransfer.training import images

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


def evaluate(
  trial: "images.ImageTask",
  data: Data,
  outputs: Mapping[str, tuple[np.ndarray, np.ndarray]],
  resamples: int,
  seed: int,
) -> dict[str, Any]:
  """Measures one trained network, its temperature fitted on validation.

  Args:
    trial: it.
    data: its images.
    outputs: of `val` and `test`, as `ImageTask.predict` returns them.
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
