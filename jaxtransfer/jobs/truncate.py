"""Fine-tunes a network at every cut, beside its baselines, and picks the cut.

Two stages: every block, then every layer around the best block. What is
trained of one cut with one seed is a unit: it resumes, it is done once, and
several processes that share a workdir divide the units among themselves.

Source: TTL of Peng et al., arXiv 2106.05152v8, with its baselines: FTL (the
  whole network), LWFT (the layers after the cut at a tenth of the head's
  rate, those before it frozen), FAT (cut, and only the head trained), TF
  (TransFusion, Raghu et al., arXiv 1902.07208: pretrained up to the cut, half
  as wide and random after it) and that paper's small networks.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxtransfer import (
  configuration,
  cuts,
  errors,
  files,
  inference,
  parallel,
  predictions,
  preview,
  results,
  trainings,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.cuts import (
  METHODS,
  PRETRAINED,
  RANDOM,
  Plan,
  Row,
  Searched,
  Unit,
)
from jaxtransfer.data import dataset, pipeline
from jaxtransfer.measure import calibration, evaluation, metrics
from jaxtransfer.networks import functional, tensors, zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.report import page, sentences
from jaxtransfer.training import (
  images,
  loop,
  optimisers,
)
from jaxtransfer.units import Units
from jaxtransfer.weights import loading, readers

# Of the backbone against the head, as Peng et al. train LWFT.
_LWFT_RATE = 0.1
# Of a network that was tested, beside its scores.
_COSTS = (
  "params",
  "macs",
  "trained_params",
  "latency_ms",
  "images_per_second",
  "training_seconds",
)


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/truncate.py makes it.
    workdir: a claimed directory; what is there already is not done again.

  Returns:
    The exit code: 0, or 1 where images could not be read or trainings failed.

  Raises:
    UsageError: the config, the source or the weights cannot be used.
    RunError: too many images cannot be read, the disk is full, or every
      training of the network failed.
    SystemExit: 143 after SIGTERM, once the state is saved.
  """
  plan = make_plan(config)
  devices = parallel.Devices(config.parallel)
  images.check(config, devices)
  divisions = dataset.open_divisions(config, workdir.path / "splits.json")
  source = loading.resolve_weights(
    plan.network, config.network.weights or None, config.network.prefix
  )
  bench = _Bench(config, plan, devices, divisions, source, workdir.path)
  # A batch that is too large or weights that do not fit are said now.
  first = Unit("ttl", plan.whole, bench.began_with, 0)
  network = bench.network(first)
  network.check_size(config.data.image_size)
  training = bench.training(first, network)
  if workdir.dry:
    return _preview(bench, network, training)
  begun = results.Run(**workdir.begin(str(devices)))
  dataset.save(workdir.path / "splits.json", divisions)
  print(
    f"{divisions[0]};"
    f" {plan.network} with {source.label} weights, cuts"
    f" {', '.join(plan.blocks)} on {devices}",
    flush=True,
  )
  bench.divisions = dataset.note_duplicates(
    divisions, config, workdir.path / "duplicates.json", workdir.share
  )
  for note in [*bench.first.notes, *source.notes]:
    print(note, flush=True)
  search = _search(bench)
  rows = cuts.compared(
    plan, search, config.tolerance, bench.began_with, config.random
  )
  bench.settle([unit for row in rows for unit in row.units])
  # Whoever comes first reads the test split and writes; the others wait.
  with files.lock(workdir.path / ".report.lock", wait=True):
    if workdir.finished:
      return workdir.report_failures()
    left = _report(bench, search, rows, begun)
    chosen = next(row for row in rows if row.chosen)
    of_test = bench.predicted(chosen)
    predictions.write(workdir.path / "predictions.csv", of_test)
    page.write(workdir.path, left, predictions.show(config, of_test))
    return workdir.finish(left)


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config)
  configuration.positive(config, "seeds", "cost_batch_size")
  configuration.one_of("metric", config.metric, metrics.OF_SCORES)
  configuration.one_of("epoch_metric", config.epoch_metric, metrics.METRICS)
  for key, least in (("tolerance", 0), ("layer_step", 0), ("halving", 0)):
    optimisers.check_range(key, config[key], least=least)
  if config.folds and config.folds < 3:
    raise errors.UsageError(
      f"config.folds is {config.folds}; it must be 0, or 3 or more: one fold"
      " to test, one to validate, the rest to train"
    )
  if config.folds and config.multilabel:
    raise errors.UsageError(
      "config.folds needs one label for each image; use config.seeds"
    )
  if config.epochs < 2**config.halving:
    raise errors.UsageError(
      f"config.halving is {config.halving}, and config.epochs"
      f" {config.epochs}: every round needs more epochs than the one before;"
      f" {2**config.halving} epochs or more, or fewer rounds"
    )
  name, until = config.network.name, config.network.until or None
  blocks = zoo.select_taps(name, config.taps, until)
  if config.taps == "blocks":
    # As Peng et al. cut: after a ResNet's stages and a DenseNet's transitions.
    blocks = zoo.family(name).select_ends(blocks)
  whole = zoo.build(name, until=until)
  layers = whole.layer_names
  if not blocks or whole.resolve(blocks[-1]) != layers[-1]:
    blocks = (*blocks, until or zoo.select_taps(name, "blocks")[-1])
  methods = _listed("methods", config.methods, METHODS)
  if "ttl" not in methods:
    raise errors.UsageError(
      f"config.methods is {config.methods!r}; ttl, which decides the cut, must"
      " be among them"
    )
  if len(blocks) == 1 and (without := {"lwft", "tf"}.intersection(methods)):
    left = ",".join(m for m in METHODS if m in methods and m not in without)
    raise errors.UsageError(
      f"config.methods is {config.methods!r}, but with {blocks[0]} as the only"
      f" cut there is none before it; use --config.methods={left}, or other"
      " config.taps"
    )
  small = tuple(n for n in zoo.list_models() if zoo.family(n).small)
  return Plan(
    network=name,
    until=until,
    blocks=blocks,
    layers=layers,
    methods=tuple(m for m in METHODS if m in methods),
    layerwise=_listed("layerwise", config.layerwise, METHODS),
    small=_listed("small", config.small, small),
    repeats=config.folds or config.seeds,
  )


def _listed(key: str, value: str, known: Sequence[str]) -> tuple[str, ...]:
  """Returns the words of a list with commas."""
  words = tuple(filter(None, map(str.strip, value.split(","))))
  for word in words:
    configuration.one_of(key, word, tuple(known))
  return words


def _preview(
  bench: "_Bench", whole: Network, training: images.ImageTask
) -> int:
  """Tells what the run would do, take and leave, for `--dry_run`.

  Measured is the whole network's training; a cut one's takes its share of the
  multiply-accumulates.
  """
  config, plan, size = bench.config, bench.plan, bench.config.data.image_size
  params, macs = zoo.count(whole, size)
  share_of = {
    layer.name: layer.macs / macs
    for layer in zoo.list_layers(plan.network, size)
  }

  def shares(method: str, cuts: Sequence[str]) -> list[float]:
    shorter = method in ("ttl", "fat")
    return [share_of[cut] if shorter else 1.0 for cut in cuts]

  blocks = [s for m in plan.methods for s in shares(m, plan.cuts(m))]
  least, most = list(blocks), list(blocks)
  for method in plan.methods:
    if config.layer_step and method in plan.layerwise:
      options = [
        shares(method, plan.around(method, block, config.layer_step))
        for block in plan.cuts(method)
      ]
      least += min(options, key=sum)
      most += max(options, key=sum)
  if bench.began_with == PRETRAINED and config.random:
    # The whole network, and each method's best of one stage or of both.
    least += [min(blocks)] * len(plan.methods)
    most += [1.0] * (1 + 2 * len(plan.methods))
  small = [zoo.count(zoo.build(name), size)[1] / macs for name in plan.small]
  least, most = least + small, most + small
  state = preview.bytes_of_training(training)
  judged = len(bench.first.rows["val"])
  speed, once = preview.of_training(training, bench.devices, judged)
  # Halving ends most of them early; what is frozen needs no backward pass.
  halved = 2.0**-config.halving / 3
  seconds = preview.Time(
    once.low * sum(least) * plan.repeats * halved,
    (once.high * sum(most) + speed.compiling * len(most)) * plan.repeats,
  )
  counts = (len(of) * plan.repeats for of in (least, most))
  work = [
    f"{' to '.join(f'{c:,}' for c in dict.fromkeys(counts))} trainings of"
    f" {config.epochs} epochs at most, {bench.repeated} of each network, on"
    f" {bench.devices}",
    f"{plan.network} with {bench.source.label} weights, cuts"
    f" {', '.join(plan.blocks)}; methods {', '.join(plan.methods)}",
    f"one training of the whole network: {once}",
  ]
  # Networks of all trainings, and checkpoints of those that are at work.
  paused = len(most) * plan.repeats if config.halving else 1
  kept = 4 * params * sum(most) * plan.repeats + state * paused
  return preview.tell(
    config,
    bench.path,
    bench.divisions,
    work,
    speed,
    seconds,
    kept,
    bench.source.notes,
  )


def _search(bench: "_Bench") -> list[Searched]:
  """Trains all cuts of both stages."""
  plan, config = bench.plan, bench.config
  stopped: dict[tuple[str, str], str] = {}

  def train(wanted: Mapping[str, Sequence[str]]) -> None:
    for method, of_method in wanted.items():
      stopped.update(_halve(bench, method, of_method))
    bench.settle(
      [
        unit
        for method, of_method in wanted.items()
        for cut in of_method
        if (method, cut) not in stopped
        for unit in bench.units(method, cut)
      ]
    )

  def searched(
    tried: Mapping[str, Sequence[str]], stage: str
  ) -> list[Searched]:
    return [
      bench.searched(method, stage, cut, stopped.get((method, cut)))
      for method, of_method in tried.items()
      for cut in of_method
    ]

  blocks = {method: plan.cuts(method) for method in plan.methods}
  train(blocks)
  search = searched(blocks, "blocks")
  if config.layer_step:
    layers = {
      method: plan.around(method, best.cut, config.layer_step)
      for method in plan.methods
      if (best := bench.choose(search, method)) and method in plan.layerwise
    }
    train(layers)
    search += searched(layers, "layers")
  return search


def _halve(
  bench: "_Bench", method: str, cuts: Sequence[str]
) -> dict[tuple[str, str], str]:
  """Trains cuts for a part of the epochs and drops the worse half, repeatedly.

  The whole network is never dropped: it is what the cuts are compared with.

  Returns:
    (method, cut) -> why it was dropped.

  Source: successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943.
  """
  config, dropped = bench.config, {}
  alive = list(cuts)
  for i in range(config.halving):
    epochs = config.epochs // 2 ** (config.halving - i)
    units = [unit for cut in alive for unit in bench.units(method, cut)]
    bench.settle(units, stop_after=epochs)
    values = {cut: bench.so_far(method, cut, epochs) for cut in alive}
    ranked = sorted(alive, key=lambda cut: -values[cut])
    kept = ranked[: max(1, -(-len(ranked) // 2))]
    for cut in set(ranked) - set(kept) - {bench.plan.whole}:
      dropped[method, cut] = f"dropped after {epochs} epochs"
    alive = [cut for cut in alive if (method, cut) not in dropped]
  return dropped


def _report(
  bench: "_Bench",
  search: Sequence[Searched],
  rows: Sequence[Row],
  begun: results.Run,
) -> results.Results:
  """Reads the test split for the rows of the table, and fills results.json."""
  config = bench.config
  started = time.monotonic()
  rows = [
    row for row in rows if all(bench.kept.state(u) == "done" for u in row.units)
  ]
  searched, measurements = _searched(bench, search)
  table, of_table = _table(bench, rows)
  measurements += of_table
  compared = [
    row
    for row in rows
    if row.chosen or row.method == "ftl" and row.weights == bench.began_with
  ]
  evaluations = {row.name: bench.evaluated(row) for row in compared}
  chosen = next(row for row in rows if row.chosen)
  evaluated = evaluations[chosen.name]
  exported = _export(bench, chosen, evaluated)
  unreadable = trainings.unreadable(bench.kept)
  if unreadable:
    pipeline.write_failures(
      bench.path / "failures.csv", sorted(unreadable.items())
    )
  of_auroc = next(row for row in table if row["chosen"])["test"]["auroc"]
  records = [of for (of,) in bench.kept.records("done.json").values()]
  summary = results.Truncate(
    **_settings(bench, unreadable),
    sentence="",
    cut=bench.final(search).cut,
    taps=sorted({s.cut for s in search}, key=bench.plan.places.__getitem__),
    search=searched,
    table=table,
    unfinished={
      "trainings": len(records),
      "at_last_epoch": sum(r["best_epoch"] == config.epochs for r in records),
    },
    learning=[
      results.Learning(
        name=row.name,
        epochs=[results.epochs(bench.epochs(u)) for u in row.units],
      )
      for row in compared
    ],
    exported=exported,
    confusion=results.confusion(evaluated),
    reliability=results.reliability(evaluated),
    temperature=evaluated.temperature,
    curves=[
      results.NamedCurves(name=name, **results.curves(of))
      for name, of in evaluations.items()
    ],
    failed=[
      results.Failed(unit=name, reason=reason)
      for name, reason in trainings.failed(bench.kept).items()
    ],
    seconds={
      "training": sum(record["seconds"] for record in records),
      "evaluating": time.monotonic() - started,
    },
    run=begun,
  )
  summary["notes"] += sentences.of_guessing(of_auroc["mean"], of_auroc["low"])
  summary["sentence"] = sentences.of_truncate(summary)
  return {"job": "truncate", "summary": summary, "measurements": measurements}


def _settings(bench: "_Bench", unreadable: Mapping[str, str]) -> dict[str, Any]:
  """Returns what the summary says of how it was done, and on what."""
  config, plan, source = bench.config, bench.plan, bench.source
  metric = results.metric_name(config.metric)
  units = "images" if bench.first.examples.groups is None else "groups"
  drawn = ", each fold's drawn on their own" if config.folds else ""
  halving = None
  if config.halving:
    halving = (
      f"Successive halving, {config.halving} x: the worse half of each"
      " method's cuts was dropped before the last epoch."
    )
  read = dataset.what_was_read(bench.divisions, unreadable)
  return {
    "rule": (
      f"Of the cuts whose mean validation {metric} is within"
      f" {config.tolerance:g} of the best, the shallowest; every training"
      " keeps its best epoch by validation"
      f" {results.metric_name(config.epoch_metric)}. The test"
      " split was read once, after everything was chosen."
    ),
    "metric": config.metric,
    "epoch_metric": config.epoch_metric,
    "network": plan.network,
    "whole": plan.network + (f" up to {plan.until}" if plan.until else ""),
    "weights": source.label,
    "data": config.data.source,
    "classes": bench.first.names,
    "multilabel": bench.first.multilabel,
    "prevalence": config.prevalence or None,
    "image_size": config.data.image_size,
    "cost_batch_size": bench.devices.batch_size(config.cost_batch_size),
    "repeats": bench.repeated,
    "tolerance": config.tolerance,
    "halving": halving,
    "interval": (
      f"95 % percentile bootstrap over the {units} of the split{drawn},"
      f" {config.resamples:,} resamples, of the mean over {bench.repeated}"
    ),
    "normalisation": {"mean": list(source.mean), "std": list(source.std)},
    "weights_sha256": source.sha256,
    "rows": read.rows,
    "groups": read.groups,
    "notes": [*read.notes, *source.notes],
    "failures": len(unreadable),
  }


def _searched(
  bench: "_Bench", search: Sequence[Searched]
) -> tuple[list[results.Searched], list[results.Row]]:
  """Returns what the summary holds of every cut, and its measurements."""
  config, plan = bench.config, bench.plan
  searched, measurements = [], []
  final = bench.final(search)
  for one in sorted(search, key=lambda s: s.stage):
    units = bench.units(one.method, one.cut)
    params, macs = zoo.count(
      bench.built(units[0]), config.data.image_size, head=True
    )
    interval = (np.nan, np.nan)
    if one.stopped is None:
      tested = bench.tested(units, "val")
      interval = tested.scores[config.metric].interval
      measurements += results.score_rows(
        {
          "network": plan.network,
          "weights": bench.label(units[0]),
          "tap": one.cut,
          "probe": one.method,
          "split": "val",
        },
        config.metric,
        dataclasses.replace(tested.scores[config.metric], values=one.values),
        tested.images,
      )
    searched.append(
      {
        "method": one.method,
        "stage": one.stage,
        "cut": one.cut,
        "params": params,
        "macs": macs,
        "value": files.finite(one.mean),
        "values": [files.finite(value) for value in one.values],
        "low": files.finite(interval[0]),
        "high": files.finite(interval[1]),
        "chosen": one == final,
        "stopped": one.stopped,
      }
    )
  return searched, measurements


def _table(
  bench: "_Bench", rows: Sequence[Row]
) -> tuple[list[results.Tested], list[results.Row]]:
  """Returns a line for every network that was tested, and its measurements."""
  read = evaluation.read_by_all(
    [(u.repeat, bench.outputs(u, "test")[0]) for row in rows for u in row.units]
  )
  tested = [bench.tested(row.units, "test", read) for row in rows]
  references = {}
  for row, of_row in zip(rows, tested, strict=True):
    if row.chosen:
      references["chosen"] = of_row
    if row.method == "ftl" and row.weights == bench.began_with:
      references["ftl"] = of_row
  table, measurements = [], []
  for row, of_row, of_cost in zip(
    rows, tested, _costs(bench, rows), strict=True
  ):
    records = [bench.kept.done(unit) for unit in row.units]
    values = [trainings.value_of(r, bench.config.metric) for r in records]
    points = results.points(of_row.points)
    line: dict[str, Any] = {
      **of_cost,
      "name": row.name,
      "method": row.method,
      "weights": row.weights,
      "cut": row.cut or None,
      "words": row.words,
      "trained_params": records[0]["trained_params"],
      "training_seconds": float(np.mean([r["seconds"] for r in records])),
      "epochs": float(np.mean([r["epoch"] for r in records])),
      "val": files.finite(float(np.mean(values))),
      "test": {n: results.score(s) for n, s in of_row.scores.items()},
      "operating": points,
      "missed": results.missed(of_row.missed),
      "chance": of_row.chance,
      "tests": 1 if bench.config.folds else len(row.units),
      "chosen": row.chosen,
      "whole": of_row is references.get("ftl"),
      "against_chosen": None,
      "against_ftl": None,
    }
    base = {
      "network": bench.plan.network if row.cut else row.method,
      "weights": bench.label(row.units[0]),
      "tap": row.cut or None,
      "probe": row.method,
    }
    of_test = {**base, "split": "test", "n": of_row.images.distinct}
    for name, score in of_row.scores.items():
      measurements += results.score_rows(
        base | {"split": "test"}, name, score, of_row.images
      )
    for key, other in references.items():
      if other is not of_row:
        differences = {
          name: score.above(other.scores[name])
          for name, score in of_row.scores.items()
        }
        line[f"against_{key}"] = {
          name: results.difference(of) for name, of in differences.items()
        }
        measurements += [
          results.row(of_test, f"{name}:against_{key}", of.value, of[1:])
          for name, of in differences.items()
        ]
    measurements += results.point_rows(base, points, range(len(row.units)))
    measurements += [results.row(base, name, line[name]) for name in _COSTS]
    table.append(results.Tested(**line))
  return table, measurements


def _costs(bench: "_Bench", rows: Sequence[Row]) -> list[dict[str, float]]:
  config = bench.config
  print(f"timing {len(rows)} networks", flush=True)
  return inference.measure_speeds(
    [bench.network(row.units[0]) for row in rows],
    bench.devices,
    parallel.Devices(config.parallel, bench.devices.devices[:1]),
    mean=bench.source.mean,
    std=bench.source.std,
    image_size=config.data.image_size,
    batch_size=bench.devices.batch_size(config.cost_batch_size),
    seed=config.seed,
  )


def _export(
  bench: "_Bench", row: Row, evaluated: evaluation.Evaluation
) -> results.Exported:
  """Writes the chosen cut's best network of all repeats, by validation."""
  best, value = bench.best(row)
  data = bench.data(best)
  loading.export(
    bench.trained(best),
    bench.path / "export" / "model.safetensors",
    bench.source.card() | images.card(bench.config, data, evaluated),
  )
  return {
    "seed": best.repeat,
    "cut": best.cut,
    "val": files.finite(value),
    "missed": results.missed(evaluated.missed),
  }


class _Bench:
  """What all units of a run share, and where they are kept."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    plan: Plan,
    devices: parallel.Devices,
    divisions: Sequence[dataset.Dataset],
    source: loading.Source,
    path: pathlib.Path,
  ):
    self.config, self.plan, self.devices = config, plan, devices
    self.divisions, self.source, self.path = divisions, source, path
    self.kept = Units(path / "units")
    # Of the last method and cut alone: its repeats come one after the other,
    # and tracing a deep network takes longer than an epoch of few images.
    self._programs: dict[tuple[str, str, int], images.Programs] = {}
    self.random = dataclasses.replace(
      loading.resolve_weights(plan.network, None),
      mean=source.mean,
      std=source.std,
    )

  @property
  def began_with(self) -> str:
    """What the units of the search begin with."""
    return RANDOM if self.source.path is None else PRETRAINED

  @property
  def first(self) -> dataset.Dataset:
    """The first division, for what all have in common."""
    return self.divisions[0]

  def data(self, unit: Unit) -> dataset.Dataset:
    """Returns a unit's fold, or the one division that all seeds share."""
    return self.divisions[unit.repeat if self.config.folds else 0]

  @property
  def repeated(self) -> str:
    """How often every cut is trained, in words."""
    kind = "fold" if self.config.folds else "seed"
    return f"{self.plan.repeats} {kind}{'s' * (self.plan.repeats > 1)}"

  def units(self, method: str, cut: str) -> tuple[Unit, ...]:
    """Returns all repeats of a method at a cut."""
    return self.plan.units(method, cut, self.began_with)

  def label(self, unit: Unit) -> str:
    """Returns what the weights that a unit begins with are called."""
    source = self.source if unit.weights == PRETRAINED else self.random
    return source.label

  def choose(self, search: Sequence[Searched], method: str) -> Searched | None:
    """Returns a method's cut by validation alone; None where there is none.

    Raises:
      RunError: as `final`.
    """
    if method == "ttl":
      return self.final(search)
    return cuts.choose(self.plan, search, method, self.config.tolerance)

  def final(self, search: Sequence[Searched]) -> Searched:
    """Returns TTL's cut, which the job is about.

    Raises:
      RunError: nothing can be chosen.
    """
    cut = cuts.choose(self.plan, search, "ttl", self.config.tolerance)
    if cut is None:
      raise errors.RunError(
        f"no cut of ttl has a validation {self.config.metric}; see"
        f" {self.path / 'units'}: failed.json there says why; remove it to try"
        " again"
      )
    return cut

  def so_far(self, method: str, cut: str, epochs: int) -> float:
    """Returns the mean validation metric after so many epochs.

    Whatever was trained since has no part in it: a run that goes on after a
    stop, or beside another, drops the same cuts.
    """
    values = []
    for unit in self.units(method, cut):
      records = self.epochs(unit)[:epochs]
      if self.kept.state(unit) == "failed" and len(records) < epochs:
        return -np.inf
      best = loop.best_epoch(records, self.config.epoch_metric)
      values.append(trainings.value_of(records[best - 1], self.config.metric))
    mean = float(np.mean(values))
    return mean if np.isfinite(mean) else -np.inf

  def searched(
    self, method: str, stage: str, cut: str, stopped: str | None
  ) -> Searched:
    """Reads what the trainings of a cut came to."""
    units = self.units(method, cut)
    records = [
      self.kept.read(unit, "done.json") or self.kept.read(unit, "paused.json")
      for unit in units
    ]
    values = tuple(trainings.value_of(r, self.config.metric) for r in records)
    if failed := [unit for unit in units if self.kept.state(unit) == "failed"]:
      stopped = f"{len(failed)} of {len(units)} trainings failed"
    return Searched(method, stage, cut, values, stopped)

  def built(self, unit: Unit) -> Network:
    """Makes a unit's network without its values, for what is counted."""
    name, settings = self._shape(unit)
    return zoo.build(name, **settings)

  def network(self, unit: Unit) -> Network:
    """Makes a unit's network as its training begins."""
    name, settings = self._shape(unit)
    return loading.create_model(
      name,
      seed=self.config.seed + unit.repeat,
      weights=self.source if unit.weights == PRETRAINED else self.random,
      **settings,
    )

  def _shape(self, unit: Unit) -> tuple[str, dict[str, Any]]:
    """Returns the zoo's name of a unit's network, and how it is built."""
    config, whole = self.config, unit.cut == self.plan.whole
    settings = {
      "num_classes": len(self.first.names),
      "dtype": jnp.dtype(config.dtype),
      "flatten": (
        config.data.image_size if config.network.head == "flatten" else None
      ),
    }
    if unit.method not in METHODS:
      return unit.method, settings
    cuts = unit.method in ("ttl", "fat") and not whole
    settings["until"] = unit.cut if cuts else self.plan.until
    if unit.method == "tf":
      settings["slim_after"] = unit.cut
    return self.plan.network, settings

  def training(self, unit: Unit, network: Network) -> images.ImageTask:
    """Returns a unit's training."""
    names = network.layer_names
    frozen = {"fat": len(names)}.get(unit.method, 0)
    if unit.method == "lwft":
      frozen = names.index(network.resolve(unit.cut)) + 1
    # Folds have class weights and numbers of steps of their own.
    fold = unit.repeat if self.config.folds else 0
    same = unit.method, unit.cut, fold
    training = images.ImageTask(
      self.config,
      self.data(unit),
      network,
      self.devices,
      mean=self.source.mean,
      std=self.source.std,
      seed=self.config.seed + unit.repeat,
      metric=self.config.epoch_metric,
      frozen=frozen,
      backbone=_LWFT_RATE if unit.method == "lwft" else None,
      programs=self._programs.get(same),
    )
    self._programs = {same: training.programs}
    training.failures |= trainings.unreadable(self.kept)
    return training

  def settle(
    self, units: Sequence[Unit], stop_after: int | None = None
  ) -> None:
    """Sees to it that units are trained, here or by another process."""
    trainings.settle(self.kept, units, self._train, stop_after)

  def _train(self, unit: Unit, stop_after: int | None) -> None:
    directory = self.kept.directory(unit)
    network = self.network(unit)
    training = self.training(unit, network)
    done = trainings.fit(
      self.kept, unit, training, self.devices, self.config.metric, stop_after
    )
    if done is None:
      return
    fitted, record = done
    graph, _, _ = functional.split(network)
    best = functional.merge(graph, *jax.tree.map(jnp.asarray, fitted.numbers))
    loading.export(best, directory / "model.safetensors", self.source.card())
    (outputs,) = training.predict(fitted.numbers, ["val"]).values()
    trainings.save_outputs(directory / "val.npz", outputs)
    files.write_json(directory / "done.json", record)

  def trained(self, unit: Unit) -> Network:
    """Returns the network that a finished unit ended with."""
    network = self.network(unit)
    stored = readers.open_checkpoint(
      self.kept.directory(unit) / "model.safetensors"
    )
    tensors.load(network, {n: tensor.read() for n, tensor in stored.items()})
    return network

  def epochs(self, unit: Unit) -> list[dict[str, Any]]:
    """Returns the epochs that a training has behind it."""
    return loop.epochs_of(self.kept.log(unit))

  def tested(
    self,
    units: Sequence[Unit],
    split: str,
    only: Mapping[int, np.ndarray] | None = None,
  ) -> evaluation.Tested:
    """Measures what all repeats of a network are worth on a split.

    Args:
      units: the repeats.
      split: "val" or "test".
      only: repeat -> rows of the split; None for all that were read.
    """
    measured = []
    for unit in units:
      rows, logits = self.outputs(unit, split)
      if only is not None:
        kept = np.isin(rows, only[unit.repeat])
        rows, logits = rows[kept], logits[kept]
      data = self.data(unit)
      measured.append(data.outputs(self.config, rows, logits, resample=True))
    tests = 1 if self.config.folds else len(units)
    if split == "val":
      return evaluation.over_repeats(measured, tests=tests)
    val = [
      self.data(unit).outputs(self.config, *self.outputs(unit, "val"))
      for unit in units
    ]
    thresholds = self.first.thresholds
    return evaluation.over_repeats(measured, val, thresholds, tests=tests)

  def best(self, row: Row) -> tuple[Unit, float]:
    """Returns the best of a row's repeats, and its score, by validation."""
    records = [self.kept.done(unit) for unit in row.units]
    values = [trainings.value_of(r, self.config.metric) for r in records]
    at = int(np.argmax(np.nan_to_num(values, nan=-np.inf)))
    return row.units[at], values[at]

  def evaluated(self, row: Row) -> evaluation.Evaluation:
    """Measures a row's best network in all ways."""
    best, _ = self.best(row)
    data, config = self.data(best), self.config
    return evaluation.evaluate(
      data.outputs(config, *self.outputs(best, "val")),
      data.outputs(config, *self.outputs(best, "test"), resample=True),
      data.thresholds,
    )

  def predicted(self, row: Row) -> list[predictions.Predictions]:
    """Returns what a row's best network says of the test split.

    Of folds all say what they say of theirs.
    """
    units = row.units if self.config.folds else [self.best(row)[0]]
    networks = []
    for unit in units:
      data = self.data(unit)
      val = data.outputs(self.config, *self.outputs(unit, "val"))
      temperature = calibration.fit_temperature(*val.decisions())
      networks.append(
        predictions.of_logits(
          data,
          *self.outputs(unit, "test"),
          temperature,
          unit.cut,
          unit.repeat,
        )
      )
    return networks

  def outputs(self, unit: Unit, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and logits of a split, read once and kept."""
    path = self.kept.directory(unit) / f"{split}.npz"
    if not path.exists():
      network = self.trained(unit)
      training = self.training(unit, network)
      _, params, statistics = functional.split(network)
      predicted = training.predict((params, statistics), [split])
      # The outputs last: once they are there, nothing is read again.
      files.write_json(
        path.with_name(f"{split}_failures.json"),
        {"failures": training.failures},
      )
      trainings.save_outputs(path, predicted[split])
    return trainings.load_outputs(path)
