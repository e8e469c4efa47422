"""Trainings of pooling networks: one for each encoder, pooling, fold and seed.

With `topk` there is a second one for each, of the encoder, too.

Each is a unit, with a directory below `units/`: it resumes, it is done once,
and processes that share a workdir divide the units among themselves.
"""

import copy
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxtransfer import (
  attention,
  errors,
  files,
  parallel,
  predictions,
  progress,
  results,
  trainings,
  tuning,
)
from jaxtransfer.data import bags, buckets, dataset, pipeline
from jaxtransfer.data import names as naming
from jaxtransfer.measure import calibration, evaluation, scoring
from jaxtransfer.networks import functional, pooling
from jaxtransfer.training import bags as training_bags
from jaxtransfer.training import loop
from jaxtransfer.units import Units
from jaxtransfer.weights import bags as weights_bags
from jaxtransfer.weights import loading

_GIGABYTE = 1e9


@dataclasses.dataclass(frozen=True)
class Unit:
  """One training.

  Attributes:
    encoder: whose features.
    pooling: of the tiles.
    seed: which training of the fold, from 0.
    fold: which one is tested; None where there is one division.
    top: tiles of each slide with which the encoder is trained, too; 0 where it
      stays as it is.
  """

  encoder: str
  pooling: str
  seed: int
  fold: int | None
  top: int = 0

  @property
  def name(self) -> str:
    """Its directory's name."""
    fold = "" if self.fold is None else f"-fold{self.fold}"
    top = f"-top{self.top}" if self.top else ""
    return f"{self.encoder}-{self.pooling}{top}{fold}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Row:
  """An encoder with a pooling, and all its trainings.

  Attributes:
    encoder: its place among the encoders.
    name: for people, and for files.
    units: seed by seed, and in each fold by fold.
  """

  encoder: int
  name: str
  units: tuple[Unit, ...]

  @property
  def top(self) -> int:
    """Tiles of each slide with which the encoder was trained; 0 for none."""
    return self.units[0].top

  def of_seed(self, seed: int) -> list[Unit]:
    """Returns the units of one seed, which test every slide once."""
    return [unit for unit in self.units if unit.seed == seed]


class Bench:
  """What all units of a run share, and where they are kept."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    poolings: Sequence[str],
    devices: parallel.Devices,
    divisions: Sequence[dataset.Dataset],
    path: pathlib.Path,
  ):
    self.config, self.poolings, self.devices = config, poolings, devices
    self.divisions, self.path = list(divisions), path
    self.kept = Units(path / "units")
    self.bags = cast(bags.Bags, divisions[0].examples)
    self.store = buckets.Store(self.bags, config.data.cache * _GIGABYTE)
    self.unreadable = dict(self.bags.failures)
    self._programs: dict[Any, training_bags.Programs] = {}
    self._encoded: dict[Unit, tuple[bags.Encoder, dict[str, str]]] = {}
    self.tuning = None
    if config.topk.tiles:
      self.tuning = tuning.Tuning(config, self.bags, devices)
    folds = range(config.folds) if config.folds else [None]
    several = "-{}" * (len(poolings) > 1)
    self.rows = [
      Row(
        number,
        encoder.name + several.format(name) + (f"-top{top}" if top else ""),
        tuple(
          Unit(encoder.name, name, seed, fold, top)
          for seed in range(config.seeds)
          for fold in folds
        ),
      )
      for number, encoder in enumerate(self.bags.encoders)
      for name in poolings
      for top in dict.fromkeys((0, config.topk.tiles))
    ]

  @property
  def first(self) -> dataset.Dataset:
    """The first division, for what all have in common."""
    return self.divisions[0]

  @property
  def units(self) -> list[Unit]:
    """All trainings, encoder by encoder."""
    return [unit for row in self.rows for unit in row.units]

  @property
  def told(self) -> str:
    """What is at hand, in words."""
    encoders = ", ".join(
      f"{encoder.name} ({encoder.channels} features,"
      f" {encoder.tiles.mean():,.0f} tiles a slide)"
      for encoder in self.bags.encoders
    )
    return f"{self.first}; {encoders}; pooling {', '.join(self.poolings)}"

  @property
  def repeated(self) -> str:
    """How often each is trained, in words."""
    config = self.config
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    if not config.folds:
      return seeds
    return f"{config.folds} folds" + f" x {seeds}" * (config.seeds > 1)

  def data(self, unit: Unit) -> dataset.Dataset:
    """Returns a unit's fold, or the one division that all seeds share."""
    return self.divisions[unit.fold or 0]

  def check_features(self) -> None:
    """Reads all features once; a slide that fails for one is left out for all.

    Raises:
      UnreadableError: too many cannot be read.
      RunError: what is left cannot be divided so.
    """
    self.unreadable |= self.store.check()
    count = len(self.bags) + len(self.bags.failures)
    pipeline.too_many(
      sorted(self.unreadable.items()),
      count,
      self.config.data.max_failures,
      self.bags.unit,
    )
    self.divisions = [data.without(self.unreadable) for data in self.divisions]
    for data in self.divisions:
      for split, rows in data.rows.items():
        # What was never trained on cannot be learnt; a fold of few may lack it.
        least = len(data.names) if split == "train" else 2
        if len(set(self.bags.labels[rows].tolist())) < least:
          where = "" if data.fold is None else f" of fold {data.fold}"
          raise errors.UnreadableError(
            f"without the slides that cannot be read the {split} split{where}"
            f" has fewer than {least} classes; mend their files",
            sorted(self.unreadable.items()),
          )

  def settle(self) -> None:
    """Sees to it that all units are trained, here or by another process."""
    if self.tuning is not None:
      self.tuning.check()
    for of, train in ((False, self._train), (True, self._tune)):
      units = [unit for unit in self.units if bool(unit.top) == of]
      trainings.settle(self.kept, units, train)

  def number(self, unit: Unit) -> int:
    """Returns the place of a unit's encoder among the encoders."""
    return [of.name for of in self.bags.encoders].index(unit.encoder)

  def features(self, unit: Unit) -> buckets.Features:
    """Returns what a unit's pooling network reads.

    Of a trained encoder those of the slides that are validated and tested,
    which are encoded where they are not yet.
    """
    number = self.number(unit)
    if not unit.top:
      self.store.only(number)
      return buckets.Features(self.store, number, self.bags.encoders[number])
    assert self.tuning is not None
    if unit not in self._encoded:
      rows = self.data(unit).rows
      directory = self.kept.directory(unit)
      self._encoded[unit] = self.tuning.encode(
        number,
        directory / "encoder.safetensors",
        np.concatenate([rows["val"], rows["test"]]),
        directory,
      )
    encoder, _ = self._encoded[unit]
    source = copy.copy(self.bags)
    source.encoders = [encoder]
    return buckets.Features(buckets.Store(source, 0), 0, encoder)

  def training(self, unit: Unit) -> training_bags.BagTask:
    """Returns a unit's training of the pooling network, at its beginning.

    Of a unit whose encoder is trained, what it ended with is to be read by it.
    """
    config, data = self.config, self.data(unit)
    encoder = self.bags.encoders[self.number(unit)]
    network = pooling.BagNetwork(
      encoder.channels,
      len(data.names),
      pooling=unit.pooling,
      embedding=[int(width) for width in config.pooling.embedding],
      attention=config.pooling.attention,
      dropout=config.pooling.dropout,
      attention_dropout=config.pooling.attention_dropout,
      dtype=jnp.dtype(config.dtype),
    )
    seed = config.seed + unit.seed
    pooling.randomise(network, seed)
    # Schedules that fall to the last step know how many there are.
    steps = len(data.rows["train"])
    if config.schedule.name in ("constant", "plateau"):
      steps = 0
    same = encoder.channels, encoder.dtype, unit.pooling, steps
    training = training_bags.BagTask(
      config,
      data,
      self.features(unit),
      network,
      self.devices,
      seed=seed,
      programs=self._programs.get(same),
    )
    self._programs[same] = training.programs
    return training

  def _train(self, unit: Unit, stop_after: int | None) -> None:
    directory = self.kept.directory(unit)
    training = self.training(unit)
    done = trainings.fit(
      self.kept, unit, training, self.devices, self.config.metric, stop_after
    )
    if done is None:
      return
    fitted, record = done
    outputs = training.predict(fitted.numbers, ["val"])["val"]
    trainings.save_outputs(directory / "val.npz", outputs)
    weights_bags.export(
      training.merged(fitted.numbers),
      directory / "model.safetensors",
      self.card(unit),
    )
    files.write_json(directory / "done.json", record)

  def beginning(self, unit: Unit) -> training_bags.BagTask:
    """Returns a training to be measured: of an encoder on any tiles."""
    if not unit.top:
      return self.training(unit)
    assert self.tuning is not None
    number, data = self.number(unit), self.data(unit)
    first = self.training(dataclasses.replace(unit, top=0))
    held = self.bags.encoders[number].tiles
    chosen = {
      row: np.arange(min(unit.top, held[row]))
      for split in ("train", "val")
      for row in data.rows[split].tolist()
    }
    params, statistics = first.first_state().params, {}
    head = first.merged((params, statistics))
    return self.tuning.task(number, chosen, data, head, 0, None)

  def tuned(self, unit: Unit) -> training_bags.BagTask:
    """Returns the training of a unit's encoder, at its beginning.

    Its tiles are chosen by the first stage, which is done.
    """
    assert self.tuning is not None
    first = dataclasses.replace(unit, top=0)
    numbers = self.numbers(first)
    chosen = self.tuning.choose(
      self.kept.directory(unit) / "tiles.json",
      self.training(first),
      numbers,
      ("train", "val"),
    )
    head, _ = weights_bags.load(
      self.kept.directory(first) / "model.safetensors",
      jnp.dtype(self.config.dtype),
    )
    same = unit.encoder, unit.pooling, unit.top
    task = self.tuning.task(
      self.number(unit),
      chosen,
      self.data(unit),
      head,
      self.config.seed + unit.seed,
      self._programs.get(same),
    )
    self._programs[same] = task.programs
    return task

  def _tune(self, unit: Unit, stop_after: int | None) -> None:
    assert self.tuning is not None
    directory = self.kept.directory(unit)
    first = dataclasses.replace(unit, top=0)
    if self.kept.state(first) == "failed":
      reason = f"its first stage, {first.name}, has failed"
      files.write_json(directory / "failed.json", {"reason": reason})
      return
    ended = directory / "ended.json"
    if not ended.exists():
      training = self.tuned(unit)
      done = trainings.fit(
        self.kept,
        unit,
        training,
        self.devices,
        self.config.metric,
        stop_after,
      )
      if done is None:
        return
      fitted, record = done
      network = training.merged(fitted.numbers)
      self.tuning.export(
        self.number(unit), network, directory / "encoder.safetensors"
      )
      weights_bags.export(network.bags, directory / "model.safetensors", {})
      # Trained: what is left is to encode, which resumes for itself.
      files.write_json(ended, record)
    record = json.loads(ended.read_text(encoding="utf-8"))
    task = self.training(unit)
    numbers = self.numbers(unit)
    outputs = task.predict(numbers, ["val"])["val"]
    trainings.save_outputs(directory / "val.npz", outputs)
    weights_bags.export(
      task.merged(numbers), directory / "model.safetensors", self.card(unit)
    )
    # What is chosen by has all tiles, as what is tested.
    val = scoring.measure(self._validated(unit)).flat()
    record["val"] = files.finite({**record["val"], **val})
    _, failures = self._encoded[unit]
    record["failures"] = {**record["failures"], **failures, **task.failures}
    files.write_json(directory / "done.json", record)

  def card(self, unit: Unit) -> dict[str, Any]:
    """Returns what a user of a unit's network must know."""
    data = self.data(unit)
    encoder = next(e for e in self.bags.encoders if e.name == unit.encoder)
    val = self._validated(unit)
    return {
      "classes": data.names,
      "encoder": {"name": encoder.name, **encoder.attributes},
      "tuned_with_tiles": unit.top,
      "temperature": calibration.fit_temperature(*val.decisions()),
      "fold": unit.fold,
      "seed": unit.seed,
    }

  def outputs(self, unit: Unit, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and logits of a split, read once and kept."""
    path = self.kept.directory(unit) / f"{split}.npz"
    if not path.exists():
      training = self.training(unit)
      predicted = training.predict(self.numbers(unit), [split])
      # The outputs last: once they are there, nothing is read again.
      files.write_json(
        path.with_name(f"{split}_failures.json"),
        {"failures": training.failures},
      )
      trainings.save_outputs(path, predicted[split])
    return trainings.load_outputs(path)

  def numbers(self, unit: Unit) -> functional.Numbers:
    """Returns the parameters that a finished unit ended with."""
    path = self.kept.directory(unit) / "model.safetensors"
    network, _ = weights_bags.load(path, jnp.dtype(self.config.dtype))
    _, params, statistics = functional.split(network)
    return params, statistics

  def temperature(self, unit: Unit) -> float:
    """Returns what a unit's logits are divided by, fitted on validation."""
    return self.card(unit)["temperature"]

  def epochs(self, unit: Unit) -> list[dict[str, Any]]:
    """Returns the epochs that a training has behind it."""
    return loop.epochs_of(self.kept.log(unit))

  def values(self, row: Row) -> list[float]:
    """Returns the validation metric of each training."""
    metric = self.config.metric
    return [
      trainings.value_of(self.kept.done(unit), metric) for unit in row.units
    ]

  def value(self, row: Row) -> float:
    """Returns the mean validation metric; NaN where one is undefined."""
    return float(np.mean(self.values(row)))

  def best_seed(self, row: Row) -> int:
    """Returns the seed whose trainings are best on validation."""
    means = np.reshape(self.values(row), (self.config.seeds, -1)).mean(1)
    return int(np.argmax(np.nan_to_num(means, nan=-np.inf)))

  def base(self, row: Row) -> dict[str, Any]:
    """Returns what all measurements of a row say.

    Of encoders whose files say the same, or nothing, the folder tells which.
    """
    said = [
      tuple(of.attributes.get(key) for key in ("network", "weights", "cut"))
      for of in self.bags.encoders
    ]
    network, weights, cut = said[row.encoder]
    if network is None or said.count(said[row.encoder]) > 1:
      network = self.bags.encoders[row.encoder].name
    return {
      "network": network,
      "weights": weights,
      "tap": cut,
      "probe": row.units[0].pooling + (f":top{row.top}" if row.top else ""),
    }

  def _measured(
    self, row: Row, read: Mapping[int, np.ndarray]
  ) -> list[scoring.Outputs]:
    """Returns what each training says of its test split, with resamples."""
    measured = []
    for number, unit in enumerate(row.units):
      rows, logits = self.outputs(unit, "test")
      kept = np.isin(rows, read[number])
      measured.append(
        self.data(unit).outputs(
          self.config, rows[kept], logits[kept], resample=True
        )
      )
    return measured

  def tested(
    self, row: Row, read: Mapping[int, np.ndarray]
  ) -> evaluation.Tested:
    """Measures all trainings of a row on the slides they test.

    Args:
      row: which.
      read: number of a training -> the rows that all encoders read there.
    """
    return evaluation.over_repeats(
      self._measured(row, read),
      [self._validated(unit) for unit in row.units],
      self.first.thresholds,
      tests=self.config.seeds,
    )

  def tested_patients(
    self, row: Row, read: Mapping[int, np.ndarray]
  ) -> evaluation.Tested | None:
    """Measures them on patients; None where each has one slide."""
    groups = self.bags.groups
    if groups is None or len(set(groups)) == len(groups):
      return None
    measured = []
    for unit, of in zip(row.units, self._measured(row, read), strict=True):
      # As predictions.csv has them, so that anybody can make them again.
      logits = of.logits / self.temperature(unit)
      measured.append(
        scoring.by_group(
          dataclasses.replace(of, logits=logits),
          [groups[r] for r in of.rows.tolist()],
        )
      )
    return evaluation.over_repeats(measured, tests=self.config.seeds)

  def notes(self) -> list[str]:
    """Returns what the user should know of patients."""
    groups, labels = self.bags.groups, self.bags.labels
    if groups is None or len(set(groups)) == len(groups):
      return []
    of_group: dict[str, set[int]] = {}
    for group, label in zip(groups, labels.tolist(), strict=True):
      of_group.setdefault(group, set()).add(label)
    mixed = [group for group, of in of_group.items() if len(of) > 1]
    if not mixed:
      return []
    return [
      f"{len(mixed):,} of {len(of_group):,} groups have slides of several"
      f" labels and are left out of the scores of patients:"
      f" {naming.shown(mixed)}"
    ]

  def _validated(self, unit: Unit) -> scoring.Outputs:
    return self.data(unit).outputs(self.config, *self.outputs(unit, "val"))

  def evaluated(self, row: Row, seed: int) -> evaluation.Evaluation:
    """Measures one seed in all ways, its folds together.

    Args:
      row: which.
      seed: which of its seeds.
    """
    units = row.of_seed(seed)
    test = [
      self.data(unit).outputs(
        self.config, *self.outputs(unit, "test"), resample=True
      )
      for unit in units
    ]
    return evaluation.evaluate(
      scoring.join([self._validated(unit) for unit in units]),
      scoring.join(test),
      self.first.thresholds,
    )

  def predicted(self, row: Row, unit: Unit) -> predictions.Predictions:
    """Returns what a training says of its test split."""
    return predictions.of_logits(
      self.data(unit),
      *self.outputs(unit, "test"),
      self.temperature(unit),
      row.name,
      row.units.index(unit),
    )

  def export(
    self, row: Row, seed: int, evaluated: evaluation.Evaluation
  ) -> results.Exported:
    """Writes a row's best network of a seed, by validation.

    Args:
      row: which.
      seed: which of its seeds.
      evaluated: what its folds together are worth.
    """
    units = row.of_seed(seed)
    values = [
      trainings.value_of(self.kept.done(unit), self.config.metric)
      for unit in units
    ]
    best = units[int(np.argmax(np.nan_to_num(values, nan=-np.inf)))]
    network, about = weights_bags.load(
      self.kept.directory(best) / "model.safetensors"
    )
    del about["bags"]
    weights_bags.export(
      network,
      self.path / "export" / "model.safetensors",
      {
        **about,
        "pooled": row.name,
        "multilabel": False,
        "operating_points": self._thresholds(best),
        "metrics": {
          f"{of.split}:{of.metric}": files.finite(of.value)
          for of in evaluated.values
        },
      },
    )
    if row.top:
      loading.copy_export(
        self.kept.directory(best) / "encoder.safetensors",
        self.path / "export" / "encoder.safetensors",
      )
    return {
      "seed": row.units.index(best),
      "cut": row.name,
      "val": files.finite(max(values)),
      "missed": results.missed(evaluated.missed),
    }

  def _thresholds(self, unit: Unit) -> dict[str, Any]:
    """Returns what a unit's thresholds are, chosen on its own validation."""
    test = self.data(unit).outputs(
      self.config, *self.outputs(unit, "test"), resample=True
    )
    of_unit = evaluation.operate(
      self._validated(unit), test, self.first.thresholds, self.temperature(unit)
    )
    points = evaluation.join_points([of_unit], 1)
    return results.operating_card(
      points, self.config.prevalence, multilabel=False, unit="slide"
    )

  def write_tiles(self, row: Row, seed: int) -> None:
    """Writes what the trainings of a seed say of every tile they test.

    Args:
      row: which.
      seed: which of its seeds.
    """
    encoder = self.bags.encoders[row.encoder]
    units = row.of_seed(seed)
    count = sum(len(self.data(unit).rows["test"]) for unit in units)
    with progress.Progress(
      f"attention of {row.name}", self.bags.unit, count
    ) as bar:
      for unit in units:
        data, card, task = (
          self.data(unit),
          self.card(unit),
          self.training(unit),
        )
        features = self.features(unit)
        temperature = card["temperature"]
        for slide in task.read(self.numbers(unit), "test"):
          about = card | {
            "encoder": encoder.name,
            "pooling": unit.pooling,
            "slide": self.bags.names[slide.row],
            "label": self.bags.classes[self.bags.labels[slide.row]],
            "group": (data.groups_of(np.array([slide.row])) or [None])[0],
          }
          file = features.file(slide.row)
          attention.write(
            attention.path_of(self.path, row.name, about["slide"]),
            attention.tiles_of(slide, file, about, temperature),
          )
          bar.update()
