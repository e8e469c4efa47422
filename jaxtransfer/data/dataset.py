"""A run's examples, how they are divided, and what their labels ask for."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from jaxtransfer.data import duplicates, sources, stored_splits
from jaxtransfer.data import labels as labelling
from jaxtransfer.data import splits as splitting
from jaxtransfer.errors import DivergedError, RunError, UsageError
from jaxtransfer.measure import bootstrap, evaluation, scoring

# Beyond it, the thresholds of single classes would drown the others.
_MOST_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The examples of a run, divided once.

  Attributes:
    examples: the source.
    rows: split -> rows of the source.
    names: of the C classes that are predicted.
    targets: (labels, C) float32, as `data.labels.read_targets` returns them;
      a label of the source is a row of it.
    multilabel: whether an example may have several labels.
    thresholds: for what thresholds are chosen.
    notes: what the user should know, a line each.
    fold: which of the divisions of a cross-validation it is; None where there
      is one division.
  """

  examples: sources.Examples
  rows: Mapping[str, np.ndarray]
  names: list[str]
  targets: np.ndarray
  multilabel: bool = False
  thresholds: evaluation.Thresholds = evaluation.Thresholds()
  notes: Sequence[str] = ()
  fold: int | None = None

  def __str__(self) -> str:
    counts = {split: len(rows) for split, rows in self.rows.items()}
    return (
      f"{sum(counts.values()):,} {self.examples.unit} of"
      f" {len(self.names):,} classes"
      f" ({', '.join(f'{n:,} {split}' for split, n in counts.items())})"
    )

  def targets_of(self, rows: np.ndarray) -> np.ndarray:
    """Returns (N, C) float32 targets of (N,) rows: 1, 0, NaN if unknown."""
    return self.targets[self.examples.labels[rows]]

  def groups_of(self, rows: np.ndarray) -> list[str] | None:
    """Returns the groups of some rows, None where none are known."""
    groups = self.examples.groups
    return None if groups is None else [groups[row] for row in rows]

  def resample(self, rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Returns (R, N), how often each row is in each of R resamples.

    With several labels the resamples are not stratified: a label of the source
    is then a combination, and the only group with a rare one would be in every
    resample.

    Args:
      rows: (N,) of the source.
      resamples: R.
      seed: decides the draw, together with the fold: every fold tests other
        patients, and is drawn on its own.
    """
    labels = self.examples.labels[rows]
    return bootstrap.resample_weights(
      np.zeros_like(labels) if self.multilabel else labels,
      self.groups_of(rows),
      resamples,
      seed if self.fold is None else (seed, self.fold),
    )

  def class_weights(self, kind: str) -> np.ndarray:
    """Returns (C,) float32, what each class counts in the loss.

    Args:
      kind: "none" or "balanced": by how frequent it is in the train split.

    Source: scikit-learn's `compute_class_weight`; with several labels torch's
      `pos_weight`, absent to there.
    """
    weights = np.ones(len(self.names))
    if kind == "balanced":
      targets = self.targets_of(self.rows["train"])
      there = np.nansum(targets, axis=0)
      if self.multilabel:
        weights = np.nansum(1 - targets, axis=0) / there
      else:
        weights = len(targets) / (len(self.names) * there)
    return weights.astype(np.float32)

  def outputs(
    self,
    config: ml_collections.ConfigDict,
    rows: np.ndarray,
    logits: np.ndarray,
    *,
    resample: bool = False,
  ) -> scoring.Outputs:
    """Puts what a network says beside what is true.

    Args:
      config: of it `loss.class_weights` and, for resamples, `resamples` and
        `seed`.
      rows: (N,) of the source.
      logits: (N, C) float32.
      resample: whether intervals are wanted.

    Raises:
      RunError: there is no row, none with a known label, or a logit is no
        number.
    """
    classes = scoring.Classes(
      self.names,
      self.multilabel,
      self.class_weights(config.loss.class_weights),
    )
    resamples = None
    if resample and len(rows):
      resamples = self.resample(rows, config.resamples, config.seed)
    try:
      return scoring.Outputs(
        classes, rows, self.targets_of(rows), logits, resamples
      )
    except scoring.EmptyError as e:
      raise RunError(str(e)) from e
    except scoring.NotFiniteError as e:
      raise DivergedError(
        f"{e}; lower config.optimiser.learning_rate, in another workdir"
      ) from e

  def without(self, failures: Container[str]) -> "Dataset":
    """Returns the dataset without what could not be read.

    Args:
      failures: names of these examples; one that stands twice is gone twice.
    """
    names = self.examples.names
    rows = {
      split: np.array([r for r in rows if names[r] not in failures], np.int64)
      for split, rows in self.rows.items()
    }
    return dataclasses.replace(self, rows=rows)

  def holdings(self) -> list[str]:
    """Returns notes on what the splits hold, and lack."""
    notes = []
    if not self.multilabel:
      notes += splitting.lacking(
        self.rows,
        self.examples.labels,
        self.examples.classes,
        self.examples.unit,
      )
    return notes + splitting.rough(
      self.rows, self.examples.groups, self.examples.unit
    )


def open_divisions(
  config: ml_collections.ConfigDict, path: str | os.PathLike[str]
) -> list[Dataset]:
  """Opens the source and divides it, or reads how it was divided.

  Args:
    config: the whole config; `folds` and `multilabel` where the job has them.
    path: of splits.json; `save` writes it once the run's checks are over.

  Returns:
    One for every fold, or the one that all seeds share.

  Raises:
    UsageError: the source, its labels or its splits cannot be used.
  """
  check_splits(path)
  duplicates.check_installed(config.data.get("near_duplicates", False))
  examples = sources.open_source(config.data)
  multilabel = bool(config.get("multilabel", False))
  names, targets = labelling.read_targets(examples.classes, multilabel)
  if len(names) < 2 - multilabel:
    other = ", or one with config.multilabel" * ("multilabel" in config)
    raise UsageError(
      f"{config.data.source} has {len(names)} classes; this needs two{other}"
    )
  thresholds = evaluation.Thresholds(
    positive_classes(config, names),
    config.get("sensitivities") or (),
    config.get("prevalence") or None,
  )
  every_class = not multilabel
  folds = config.get("folds", 0)
  if folds:
    divisions, notes = splitting.divide_folds(
      config, examples, path, every_class=every_class
    )
  else:
    rows, notes = splitting.divide(
      config, examples, path, every_class=every_class
    )
    divisions = [rows]
  least = min(len(rows["train"]) for rows in divisions)
  if "epochs" in config and least < config.batch_size:
    notes.append(
      f"The train split holds fewer {examples.unit} than config.batch_size,"
      f" {config.batch_size}: every epoch is one step."
    )
  datasets = [
    Dataset(
      examples,
      rows,
      names,
      targets,
      multilabel,
      thresholds,
      [*examples.notes, *notes],
      number if folds else None,
    )
    for number, rows in enumerate(divisions)
  ]
  if multilabel:
    for dataset in datasets:
      _check_labels(dataset)
  return datasets


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
    raise UsageError(
      f"{path} is gone, and other splits would test on what was trained on;"
      " put it back or choose another --workdir"
    )


def _check_labels(dataset: Dataset) -> None:
  """Checks that every label can be learnt, and some measured."""
  for split in ("val", "test"):
    if np.isnan(dataset.targets_of(dataset.rows[split])).all():
      raise UsageError(
        f"the {split} split has no image with a known label; change the splits"
      )
  trained = dataset.targets_of(dataset.rows["train"])
  for name, column in zip(dataset.names, trained.T, strict=True):
    if not (column == 0).any() or not (column == 1).any():
      raise UsageError(
        f"the train split has no image with, or none without, {name!r};"
        " leave it out or change the splits"
      )


def positive_classes(
  config: ml_collections.ConfigDict, names: Sequence[str]
) -> list[int]:
  """Returns the classes that thresholds are for, each against the rest.

  Of two classes that exclude each other one is enough: the other's sensitivity
  is its specificity.

  Args:
    config: of it `positive`, `prevalence` and `multilabel`, where it has them.
    names: of the classes.

  Raises:
    UsageError: `positive` is no class, or it is not said whose `prevalence`
      it is.
  """
  positive = config.get("positive", "")
  prevalence = config.get("prevalence", 0.0)
  if positive:
    if positive not in names:
      raise UsageError(
        f"config.positive is {positive!r}; it is one of {', '.join(names)}"
      )
    return [names.index(positive)]
  if len(names) == 2 and not config.get("multilabel", False):
    return [1]
  if prevalence and len(names) > 1:
    raise UsageError(
      f"config.prevalence is {prevalence:g}, but there are {len(names)}"
      " classes; name the one whose it is: --config.positive="
      f"{names[-1]!r}"
    )
  return list(range(len(names) if len(names) <= _MOST_CLASSES else 0))


def save(path: str | os.PathLike[str], divisions: Sequence[Dataset]) -> None:
  """Writes splits.json, which `open_divisions` reads at the next start.

  Args:
    path: the file, written atomically.
    divisions: as `open_divisions` returns them.
  """
  first = divisions[0]
  rows = first.rows
  if first.fold is not None:
    rows = splitting.join_folds([one.rows for one in divisions])
  stored_splits.save_splits(path, rows, first.examples)


def note_duplicates(
  divisions: Sequence[Dataset],
  config: ml_collections.ConfigDict,
  path: str | os.PathLike[str],
  share: Callable[[Callable[[], Any]], Any],
) -> list[Dataset]:
  """Notes which images are in two splits, or in two folds.

  Args:
    divisions: as `open_divisions` returns them.
    config: the whole config; of it `data.near_duplicates`, where it is.
    path: of duplicates.json, by which it is done once.
    share: gives what the first process of a run computes to all.

  Returns:
    The same, with what was found in their notes.
  """
  first = divisions[0]
  places = {
    f"the {split} split" if split != "train" else "train": first.rows[split]
    for split in ("test", "val", "train")
  }
  if first.fold is not None:
    places = {f"fold {one.fold}": one.rows["test"] for one in divisions}
  notes = share(
    lambda: duplicates.check(
      first.examples,
      places,
      config.data.get("near_duplicates", False),
      path,
    )
  )
  return [
    dataclasses.replace(one, notes=[*one.notes, *notes]) for one in divisions
  ]


class Read(NamedTuple):
  """What a run has read of what it was given.

  Attributes:
    rows: split -> how many rows.
    groups: split -> of how many groups; None where none are known.
    notes: those of the dataset, what a split holds said of what was read.
  """

  rows: dict[str, int]
  groups: dict[str, int] | None
  notes: list[str]


def what_was_read(
  divisions: Sequence[Dataset], failures: Container[str]
) -> Read:
  """Counts without what could not be read.

  Args:
    divisions: as `open_divisions` returns them.
    failures: names of the examples that could not be read.
  """
  read = [one.without(failures) for one in divisions]
  first = read[0]
  counted = first.rows
  if first.fold is not None:
    tested = np.concatenate([one.rows["test"] for one in read])
    counted = {"each tested once": tested}
  groups = None
  if first.examples.groups is not None:
    groups = {s: len(set(first.groups_of(r) or ())) for s, r in counted.items()}
  stale = {note for one in divisions for note in one.holdings()}
  notes = [note for note in first.notes if note not in stale]
  notes += [note for one in read for note in one.holdings()]
  return Read(
    {split: len(rows) for split, rows in counted.items()},
    groups,
    list(dict.fromkeys(notes)),
  )
