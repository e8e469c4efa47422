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
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxtransfer import configuration, errors, files, hosts, parallel
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import pipeline
from jaxtransfer.data import splits as splitting
from jaxtransfer.measure import bootstrap, classification, cost
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.report import page, tables
from jaxtransfer.training import loop, optimisers, scoring, steps, trial
from jaxtransfer.weights import loading, readers

METHODS = ("ttl", "lwft", "fat", "tf")
PRETRAINED, RANDOM = "pretrained", "random"
# Of the backbone against the head, as Peng et al. train LWFT.
_LWFT_RATE = 0.1
# Seconds between two looks at what other processes are doing.
_LOOK = 2.0
_WORDS = {
  "ttl": "cut after {cut}, all of it trained",
  "ftl": "the whole network trained",
  "lwft": "the whole network, frozen up to {cut}",
  "fat": "cut after {cut}, only the head trained",
  "tf": "{weights} up to {cut}, then random and half as wide",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config.

  Attributes:
    network: the zoo's name.
    until: where what is called the whole network ends; None for its end.
    blocks: cuts of the first stage, in the network's order; the last is the
      whole network.
    layers: every layer of the network.
    methods: of `METHODS`, `ttl` first.
    layerwise: those with a second stage.
    small: networks trained from scratch beside it.
    repeats: trainings of every cut.
  """

  network: str
  until: str | None
  blocks: tuple[str, ...]
  layers: tuple[str, ...]
  methods: tuple[str, ...]
  layerwise: tuple[str, ...]
  small: tuple[str, ...]
  repeats: int

  @property
  def whole(self) -> str:
    """The last cut."""
    return self.blocks[-1]

  @functools.cached_property
  def places(self) -> dict[str, int]:
    """Where every cut lies among the layers."""
    resolve = zoo.build(self.network).resolve
    return {
      name: self.layers.index(resolve(name))
      for name in (*self.layers, *self.blocks)
    }

  def cuts(self, method: str) -> list[str]:
    """Returns the first stage's cuts that make sense for a method.

    Without anything after the cut, LWFT trains a head and TF nothing.
    """
    last = {"lwft": -1, "tf": -1}.get(method)
    return list(self.blocks[:last])

  def around(self, method: str, block: str, step: int) -> list[str]:
    """Returns the second stage's cuts: the layers beside the best block's end.

    In a ResNet those of the block and of the next; in a DenseNet, whose
    transitions compress what a block has gathered, those of the block, as in
    the paper.
    """
    ends = [self.places[name] for name in self.blocks]
    at = self.blocks.index(block)
    first = ends[at - 1] + 1 if at else 0
    beyond = ends[min(at + 1, len(ends) - 1)]
    if zoo.family(self.network) == "densenet":
      beyond = ends[at]
    known = {self.places[name] for name in self.cuts(method)}
    # Counted from the block's end: every step-th of both sides.
    return [
      self.layers[i]
      for i in range(first, beyond)
      if i not in known and (i - ends[at]) % max(step, 1) == 0
    ]


@dataclasses.dataclass(frozen=True)
class Unit:
  """One training.

  Attributes:
    method: of `METHODS`, or a small network's name.
    cut: the layer it is about; "" for a small network.
    weights: `PRETRAINED` or `RANDOM`.
    repeat: the how-manieth seed or fold.
  """

  method: str
  cut: str
  weights: str
  repeat: int

  @property
  def name(self) -> str:
    """The directory's name."""
    parts = (self.method, self.cut, self.weights, str(self.repeat))
    return "-".join(filter(None, parts))


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
  trial.check(config, devices)
  data = _open(config, plan, workdir.path / "splits.json")
  source = loading.resolve_weights(
    plan.network, config.network.weights or None, config.network.prefix
  )
  bench = _Bench(config, plan, devices, data, source, workdir.path)
  # A batch that is too large or weights that do not fit are said now.
  first = Unit("ttl", plan.whole, bench.began_with, 0)
  network = bench.network(first)
  network.check_size(config.data.image_size)
  bench.training(first, network)
  begun = workdir.begin(str(devices))
  _save_splits(workdir.path / "splits.json", data)
  print(
    f"{splitting.counted(data[0].rows, data[0].names)};"
    f" {plan.network} with {source.label} weights, cuts"
    f" {', '.join(plan.blocks)} on {devices}",
    flush=True,
  )
  for note in [*data[0].notes, *source.notes]:
    print(note, flush=True)
  search = _search(bench)
  rows = _rows(bench, search)
  bench.settle([unit for row in rows for unit in row.units])
  # Whoever comes first reads the test split and writes; the others wait.
  with workdirs.lock(workdir.path / ".report.lock", wait=True):
    if workdir.finished:
      return workdir.report_failures()
    results = _report(bench, search, rows, begun)
    page.write(workdir.path, results)
    return workdir.finish(results)


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config)
  configuration.positive(config, "seeds", "cost_batch_size")
  configuration.one_of("metric", config.metric, classification.METRICS)
  configuration.one_of("epoch_metric", config.epoch_metric, scoring.METRICS)
  for key, least in (("tolerance", 0), ("layer_step", 0), ("halving", 0)):
    optimisers.check_range(key, config[key], least=least)
  if config.folds and config.folds < 3:
    raise errors.UsageError(
      f"config.folds is {config.folds}; it must be 0, or 3 or more: one fold"
      " to test, one to validate, the rest to train"
    )
  if config.folds and config.many_labels:
    raise errors.UsageError(
      "config.folds needs one label for each image; use config.seeds"
    )
  name, until = config.network.name, config.network.until or None
  blocks = zoo.select_taps(name, config.taps, until)
  if config.taps == "blocks":
    # As Peng et al. cut: after a ResNet's stages and a DenseNet's transitions.
    ends = ("layer", "transition", "norm", "block")
    blocks = tuple(tap for tap in blocks if tap.startswith(ends))
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
  small = tuple(n for n in zoo.list_models() if zoo.family(n) == "cbr")
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


def _open(
  config: ml_collections.ConfigDict, plan: Plan, path: pathlib.Path
) -> list[trial.Data]:
  """Opens the source and divides it, once for all seeds or for every fold."""
  if not config.folds:
    return [trial.open_data(config, path)] * plan.repeats
  trial.check_splits(path)
  examples, names, targets = trial.open_labelled(config)
  divisions, notes = splitting.divide_folds(config, examples, path)
  notes = [*examples.notes, *notes]
  return [
    trial.Data(examples, rows, names, targets, notes) for rows in divisions
  ]


def _save_splits(path: pathlib.Path, data: Sequence[trial.Data]) -> None:
  rows = data[0].rows
  if data[0] is not data[-1]:
    rows = splitting.join_folds([one.rows for one in data])
  splitting.save_splits(path, rows, data[0].examples.names)


@dataclasses.dataclass(frozen=True)
class Searched:
  """A cut that a method was tried at.

  Attributes:
    method: of `METHODS`.
    stage: "blocks" or "layers".
    cut: the layer.
    values: of the validation metric, one of each repeat, as far as it was
      trained; NaN where undefined.
    stopped: why it cannot be chosen by them; None where it can.
  """

  method: str
  stage: str
  cut: str
  values: tuple[float, ...]
  stopped: str | None

  @property
  def mean(self) -> float:
    """Over the repeats that have a value; NaN without any."""
    known = [value for value in self.values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan

  @property
  def value(self) -> float:
    """What it is chosen by: the mean, or -inf where it cannot be chosen."""
    whole = self.stopped is None and np.isfinite(self.values).all()
    return self.mean if whole else -np.inf


def _search(bench: "_Bench") -> list[Searched]:
  """Trains all cuts of both stages."""
  plan, config = bench.plan, bench.config
  stopped: dict[tuple[str, str], str] = {}

  def train(cuts: Mapping[str, Sequence[str]]) -> None:
    for method, of_method in cuts.items():
      stopped.update(_halve(bench, method, of_method))
    bench.settle(
      [
        unit
        for method, of_method in cuts.items()
        for cut in of_method
        if (method, cut) not in stopped
        for unit in bench.units(method, cut)
      ]
    )

  def searched(cuts: Mapping[str, Sequence[str]], stage: str) -> list[Searched]:
    return [
      bench.searched(method, stage, cut, stopped.get((method, cut)))
      for method, of_method in cuts.items()
      for cut in of_method
    ]

  blocks = {method: plan.cuts(method) for method in plan.methods}
  train(blocks)
  found = searched(blocks, "blocks")
  if config.layer_step:
    layers = {
      method: plan.around(method, best.cut, config.layer_step)
      for method in plan.methods
      if (best := bench.choose(found, method)) and method in plan.layerwise
    }
    train(layers)
    found += searched(layers, "layers")
  return found


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
    epochs = max(1, config.epochs // 2 ** (config.halving - i))
    units = [unit for cut in alive for unit in bench.units(method, cut)]
    bench.settle(units, stop_after=epochs)
    values = {cut: bench.so_far(method, cut, epochs) for cut in alive}
    ranked = sorted(alive, key=lambda cut: -values[cut])
    kept = ranked[: max(1, -(-len(ranked) // 2))]
    for cut in set(ranked) - set(kept) - {bench.plan.whole}:
      dropped[method, cut] = f"dropped after {epochs} epochs"
    alive = [cut for cut in alive if (method, cut) not in dropped]
  return dropped


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the final table.

  Attributes:
    name: for people, e.g. "TTL-2".
    method: of `METHODS`, "ftl", or a small network's name.
    units: its trainings.
    chosen: whether it is the cut that the search ended with.
  """

  name: str
  method: str
  units: tuple[Unit, ...]
  chosen: bool = False


def _rows(bench: "_Bench", search: Sequence[Searched]) -> list[Row]:
  """Decides what is compared on the test split, by validation alone."""
  plan = bench.plan
  rows: dict[tuple[Unit, ...], Row] = {}
  whole = bench.units("ttl", plan.whole)

  def add(row: Row) -> None:
    if row.units == whole:
      row = dataclasses.replace(row, name="FTL", method="ftl")
    rows.setdefault(row.units, row)

  for method in plan.methods:
    blocks = [s for s in search if s.stage == "blocks"]
    best = [bench.choose(of, method) for of in (blocks, search)]
    if None in best:
      continue
    first, last = (bench.units(method, one.cut) for one in best)
    name, chosen = method.upper(), method == "ttl"
    if first != last:
      add(Row(f"{name}-2", method, last, chosen))
      add(Row(f"{name}-1", method, first))
    else:
      add(Row(name, method, last, chosen))
    if chosen:
      add(Row("FTL", "ftl", whole))
  if bench.began_with == PRETRAINED and bench.config.random:
    for row in list(rows.values()):
      units = tuple(dataclasses.replace(u, weights=RANDOM) for u in row.units)
      add(dataclasses.replace(row, units=units, chosen=False))
  for name in plan.small:
    add(Row(name, name, bench.units(name, "")))
  return list(rows.values())


def _report(
  bench: "_Bench",
  search: Sequence[Searched],
  rows: Sequence[Row],
  begun: Mapping[str, Any],
) -> dict[str, Any]:
  """Reads the test split for the rows of the table, and says what was found."""
  config, plan, data = bench.config, bench.plan, bench.data[0]
  started = time.monotonic()
  failed = [
    {"unit": path.parent.name, "reason": json.loads(path.read_text())["reason"]}
    for path in sorted((bench.path / "units").glob("*/failed.json"))
  ]
  rows = [
    row for row in rows if all(bench.state(u) == "done" for u in row.units)
  ]
  chosen = next(row for row in rows if row.chosen)
  measurements, searched, table = [], [], []
  final = bench.choose(search, "ttl")
  labels = {PRETRAINED: bench.source.label, RANDOM: bench.random.label}
  for one in sorted(search, key=lambda s: s.stage):
    units = bench.units(one.method, one.cut)
    interval = (np.nan, np.nan)
    if one.stopped is None:
      interval = bench.scores(units, "val")[config.metric].interval
    params, macs = zoo.count(
      bench.network(units[0]), config.data.image_size, head=True
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
    if one.stopped:
      continue
    of_cut = {
      "network": plan.network,
      "weights": labels[units[0].weights],
      "tap": one.cut,
      "probe": one.method,
      "split": "val",
      "n": bench.images("val"),
    }
    measurements.append(tables.row(of_cut, config.metric, one.mean, interval))
    measurements += [
      tables.row(of_cut | bench.of_repeat(unit, "val"), config.metric, value)
      for unit, value in zip(units, one.values, strict=True)
    ]
  costs = _costs(bench, rows)
  for row, of_row in zip(rows, costs, strict=True):
    unit = row.units[0]
    records = [bench.read(u, "done.json") for u in row.units]
    scores = bench.scores(row.units, "test")
    of_row |= {
      "name": row.name,
      "method": row.method,
      "weights": unit.weights,
      "cut": unit.cut or None,
      "words": _words(row),
      "trained_params": records[0]["trained_params"],
      "training_seconds": float(np.mean([r["seconds"] for r in records])),
      "epochs": float(np.mean([r["epoch"] for r in records])),
      "val": files.finite(
        float(np.mean([_number(r["val"][config.metric]) for r in records]))
      ),
      "test": {name: score.plain() for name, score in scores.items()},
      "chosen": row.chosen,
    }
    table.append(of_row)
    of_test = {
      "network": plan.network if unit.cut else row.method,
      "weights": labels[unit.weights],
      "tap": unit.cut or None,
      "probe": row.method,
      "split": "test",
      "n": bench.images("test"),
    }
    for name, score in scores.items():
      measurements.append(tables.row(of_test, name, score.mean, score.interval))
      measurements += [
        tables.row(of_test | bench.of_repeat(u, "test"), name, value)
        for u, value in zip(row.units, score.values, strict=True)
      ]
    for name in (
      "params",
      "macs",
      "trained_params",
      "latency_ms",
      "images_per_second",
      "training_seconds",
    ):
      measurements.append(
        tables.row(of_test | {"split": None, "n": None}, name, of_row[name])
      )
  compared = [
    row
    for row in rows
    if (row.chosen or row.method == "ftl")
    and row.units[0].weights == bench.began_with
  ]
  evaluations = {row.name: bench.evaluated(row) for row in compared}
  evaluated = evaluations[chosen.name]
  exported = _export(bench, chosen, evaluated)
  unreadable = _unreadable(bench)
  if unreadable:
    pipeline.write_failures(
      bench.path / "failures.csv", sorted(unreadable.items())
    )
  of_auroc = next(row for row in table if row["chosen"])["test"]["auroc"]
  groups = data.examples.groups
  counted = data.rows
  if config.folds:
    counted = {"each tested once": np.arange(len(data.examples.names))}
  cuts = sorted({s.cut for s in search}, key=plan.places.__getitem__)
  kind = "fold" if config.folds else "seed"
  repeats = f"{plan.repeats} {kind}{'s' * (plan.repeats > 1)}"
  units_of_test = "images" if groups is None else "groups"
  return {
    "job": "truncate",
    "summary": {
      "sentence": _sentence(bench, table),
      "rule": (
        "Of the cuts whose mean validation"
        f" {tables.metric_name(config.metric)} is within"
        f" {config.tolerance:g} of the best, the shallowest; every training"
        " keeps its best epoch by validation"
        f" {tables.metric_name(config.epoch_metric)}. The test"
        " split was read once, after everything was chosen."
      ),
      "cut": final.cut,
      "metric": config.metric,
      "epoch_metric": config.epoch_metric,
      "network": plan.network,
      "weights": bench.source.label,
      "data": config.data.source,
      "classes": data.names,
      "taps": cuts,
      "rows": {split: len(rows) for split, rows in counted.items()},
      "groups": None
      if groups is None
      else {
        split: len(set(data.groups_of(rows))) for split, rows in counted.items()
      },
      "notes": [
        *data.notes,
        *bench.source.notes,
        *trial.doubts(of_auroc["mean"], of_auroc["low"]),
      ],
      "image_size": config.data.image_size,
      "cost_batch_size": bench.devices.batch_size(config.cost_batch_size),
      "repeats": repeats,
      "tolerance": config.tolerance,
      "halving": (
        f"Successive halving, {config.halving} x: the worse half of each"
        " method's cuts was dropped before the last epoch."
        if config.halving
        else None
      ),
      "interval": (
        f"95 % percentile bootstrap over the {units_of_test} of the split,"
        f" {config.resamples:,} resamples, of the mean over {repeats}"
      ),
      "search": searched,
      "table": table,
      "learning": [
        {
          "name": row.name,
          "epochs": [
            [files.finite(r) for r in bench.epochs(u)] for u in row.units
          ],
        }
        for row in compared
      ],
      "exported": exported,
      "confusion": evaluated["confusion"],
      "reliability": evaluated["reliability"],
      "temperature": evaluated["temperature"],
      "curves": [
        {"name": name, **one["curves"]} for name, one in evaluations.items()
      ],
      "failed": failed,
      "failures": len(unreadable),
      "normalisation": {
        "mean": list(bench.source.mean),
        "std": list(bench.source.std),
      },
      "weights_sha256": bench.source.sha256,
      "seconds": {
        "training": sum(
          (json.loads(path.read_text())["seconds"])
          for path in (bench.path / "units").glob("*/done.json")
        ),
        "evaluating": time.monotonic() - started,
      },
      "run": begun,
    },
    "measurements": measurements,
  }


def _number(value: float | None) -> float:
  return np.nan if value is None else value


def _words(row: Row) -> str:
  words = _WORDS.get(row.method)
  if words is None:
    return "a small network, all of it trained"
  unit = row.units[0]
  return words.format(cut=unit.cut, weights=unit.weights)


def _unreadable(bench: "_Bench") -> dict[str, str]:
  """Returns image -> why it could not be read, of all trainings."""
  found = {}
  for pattern in ("*/done.json", "*/*_failures.json"):
    for path in (bench.path / "units").glob(pattern):
      record = json.loads(path.read_text(encoding="utf-8"))
      found |= record.get("failures", {})
  return found


def _costs(bench: "_Bench", rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Measures each row's size, and all rows' speed in turns.

  Rows of one network with different weights have one speed, measured once.
  """
  config = bench.config
  one = parallel.Devices(config.parallel, bench.devices.devices[:1])
  size = bench.devices.batch_size(config.cost_batch_size)
  counts, places = [], []
  known: dict[Any, int] = {}
  calls: dict[str, list] = {"latency": [], "throughput": []}
  side = config.data.image_size
  for row in rows:
    network = bench.network(row.units[0])
    counts.append(zoo.count(network, side, head=True))
    graph, *numbers = steps.take_apart(network)
    places.append(known.setdefault(graph, len(known)))
    if places[-1] < len(calls["latency"]):
      continue
    forward = steps.make_predict(graph, bench.source.mean, bench.source.std)
    for kind, devices, images in (
      ("latency", one, 1),
      ("throughput", bench.devices, size),
    ):
      pixels = np.random.default_rng(config.seed).integers(
        0, 256, (images, side, side, 3), np.uint8
      )
      calls[kind].append(
        functools.partial(
          devices.compile(forward),
          devices.replicate(tuple(numbers)),
          devices.put(pixels),
        )
      )
  latency = cost.measure_forward(calls["latency"], 1, repeats=30)
  throughput = cost.measure_forward(calls["throughput"], size)
  return [
    {
      "params": params,
      "macs": macs,
      "latency_ms": 1000 / latency[place].median,
      "images_per_second": throughput[place].median,
    }
    for (params, macs), place in zip(counts, places, strict=True)
  ]


def _export(
  bench: "_Bench", row: Row, evaluated: Mapping[str, Any]
) -> dict[str, Any]:
  """Writes the chosen cut's best network of all repeats, by validation."""
  best, value = bench.best(row)
  data = bench.data[best.repeat]
  loading.export(
    bench.trained(best),
    bench.path / "export" / "model.safetensors",
    bench.source.card() | trial.card(bench.config, data, evaluated),
  )
  return {"seed": best.repeat, "cut": best.cut, "val": files.finite(value)}


def _sentence(bench: "_Bench", table: Sequence[Mapping[str, Any]]) -> str:
  plan, metric = bench.plan, bench.config.metric
  name = plan.network + (f" up to {plan.until}" if plan.until else "")
  chosen = next(row for row in table if row["chosen"])
  word = tables.metric_name(metric)

  def said(row: Mapping[str, Any]) -> str:
    score = row["test"][metric]
    if score["mean"] is None:
      return f"an undefined {word}"
    text = f"{score['mean']:.3f}"
    if score["low"] is not None:
      text += f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{text} {word}"

  whole = next(
    (
      row
      for row in table
      if row["method"] == "ftl" and row["weights"] == bench.began_with
    ),
    None,
  )
  if chosen is whole:
    text = f"Do not cut {name}: whole, it gives {said(chosen)}"
  else:
    text = (
      f"Cut {name} after {chosen['cut']}: fine-tuned, it gives {said(chosen)}"
    )
    if whole is None:
      text += "; the whole network could not be trained"
    else:
      text += (
        f" against {said(whole)} for the whole network, with"
        f" {tables.percent(chosen['params'], whole['params'])} of the"
        " parameters and"
        f" {chosen['images_per_second'] / whole['images_per_second']:.1f}x the"
        " speed"
      )
  scored = [
    row
    for row in table
    if not row["chosen"]
    and row is not whole
    and row["test"][metric]["mean"] is not None
  ]
  if scored:
    best = max(scored, key=lambda row: row["test"][metric]["mean"])
    text += (
      f". The best of the others is {best['name']} from {best['weights']}"
      f" weights with {said(best)}"
    )
  return text + "."


@dataclasses.dataclass(frozen=True)
class Score:
  """A metric over the repeats of one row.

  Attributes:
    values: of each repeat.
    interval: of their mean.
  """

  values: tuple[float, ...]
  interval: tuple[float, float]

  @property
  def mean(self) -> float:
    """Over the repeats."""
    return float(np.mean(self.values))

  def plain(self) -> dict[str, Any]:
    """Returns it for results.json."""
    deviation = np.std(self.values, ddof=1) if len(self.values) > 1 else np.nan
    return files.finite(
      {
        "mean": self.mean,
        "sd": float(deviation),
        "low": self.interval[0],
        "high": self.interval[1],
        "values": [files.finite(value) for value in self.values],
      }
    )


class _Bench:
  """What all units of a run share, and where they are kept."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    plan: Plan,
    devices: parallel.Devices,
    data: Sequence[trial.Data],
    source: loading.Source,
    path: pathlib.Path,
  ):
    self.config, self.plan, self.devices = config, plan, devices
    self.data, self.source, self.path = data, source, path
    self.random = dataclasses.replace(
      loading.resolve_weights(plan.network, None),
      mean=source.mean,
      std=source.std,
    )

  @property
  def began_with(self) -> str:
    """What the units of the search begin with."""
    return RANDOM if self.source.path is None else PRETRAINED

  def units(self, method: str, cut: str) -> tuple[Unit, ...]:
    """Returns all repeats of a method at a cut, or of a small network."""
    weights = self.began_with if cut else RANDOM
    return tuple(
      Unit(method, cut, weights, repeat) for repeat in range(self.plan.repeats)
    )

  def so_far(self, method: str, cut: str, epochs: int) -> float:
    """Returns the mean validation metric after so many epochs.

    Whatever was trained since has no part in it: a run that goes on after a
    stop, or beside another, drops the same cuts.
    """
    values = []
    for unit in self.units(method, cut):
      records = self.epochs(unit)[:epochs]
      if self.state(unit) == "failed" and len(records) < epochs:
        return -np.inf
      best = loop.best_epoch(records, self.config.epoch_metric)
      values.append(_number(records[best - 1]["val"][self.config.metric]))
    mean = float(np.mean(values))
    return mean if np.isfinite(mean) else -np.inf

  def images(self, split: str) -> int:
    """Returns how many images of a split the mean of all repeats is of."""
    divisions = self.data if self.config.folds else self.data[:1]
    return sum(len(data.rows[split]) for data in divisions)

  def of_repeat(self, unit: Unit, split: str) -> dict[str, int]:
    """Returns what sets a repeat's measurement apart from that of the mean."""
    rows = self.data[unit.repeat].rows[split]
    return {"seed": unit.repeat, "n": len(rows)}

  def searched(
    self, method: str, stage: str, cut: str, stopped: str | None
  ) -> Searched:
    """Reads what the trainings of a cut came to."""
    units = self.units(method, cut)
    records = [
      self.read(unit, "done.json") or self.read(unit, "paused.json")
      for unit in units
    ]
    values = tuple(_number(r and r["val"][self.config.metric]) for r in records)
    if failed := [unit for unit in units if self.state(unit) == "failed"]:
      stopped = f"{len(failed)} of {len(units)} trainings failed"
    return Searched(method, stage, cut, values, stopped)

  def choose(self, search: Sequence[Searched], method: str) -> Searched | None:
    """Returns a method's cut by validation alone.

    Where a shallower cut is a smaller network, the shallowest of those that
    are within the tolerance of the best; the best otherwise. None where
    nothing can be chosen.

    Raises:
      RunError: nothing can be chosen of TTL, which the job is about.
    """
    of = sorted(
      (s for s in search if s.method == method),
      key=lambda s: self.plan.places[s.cut],
    )
    best = max(of, key=lambda s: s.value)
    if not np.isfinite(best.value):
      if method != "ttl":
        return None
      raise errors.RunError(
        f"no cut of {method} has a validation {self.config.metric}; see"
        f" {self.path / 'units'}: failed.json there says why; remove it to try"
        " again"
      )
    if method not in ("ttl", "fat"):
      return best
    good = best.value - self.config.tolerance
    return next(s for s in of if s.value >= good)

  def directory(self, unit: Unit) -> pathlib.Path:
    return self.path / "units" / unit.name

  def network(self, unit: Unit) -> Network:
    """Makes a unit's network as its training begins."""
    config, whole = self.config, unit.cut == self.plan.whole
    settings = {
      "num_classes": len(self.data[0].names),
      "seed": config.seed + unit.repeat,
      "dtype": jnp.dtype(config.dtype),
      "flatten": (
        config.data.image_size if config.network.head == "flatten" else None
      ),
      "weights": self.source if unit.weights == PRETRAINED else self.random,
    }
    if unit.method in METHODS:
      cuts = unit.method in ("ttl", "fat") and not whole
      settings["until"] = unit.cut if cuts else self.plan.until
    if unit.method == "tf":
      settings["slim_after"] = unit.cut
    name = self.plan.network if unit.method in METHODS else unit.method
    return loading.create_model(name, **settings)

  def training(self, unit: Unit, network: Network) -> trial.Trial:
    """Returns a unit's training."""
    names = network.layer_names
    frozen = {"fat": len(names)}.get(unit.method, 0)
    if unit.method == "lwft":
      frozen = names.index(network.resolve(unit.cut)) + 1
    return trial.Trial(
      self.config,
      self.data[unit.repeat],
      network,
      self.devices,
      mean=self.source.mean,
      std=self.source.std,
      seed=self.config.seed + unit.repeat,
      metric=self.config.epoch_metric,
      frozen=frozen,
      backbone=_LWFT_RATE if unit.method == "lwft" else None,
    )

  def read(self, unit: Unit, file: str) -> dict[str, Any] | None:
    """Returns one of a unit's JSON files, None where it is not there yet."""
    try:
      text = (self.directory(unit) / file).read_text(encoding="utf-8")
    except FileNotFoundError:
      return None
    return json.loads(text)

  def state(self, unit: Unit, stop_after: int | None = None) -> str:
    """Returns "done", "failed", "paused" (late enough) or "open"."""
    for file in ("done", "failed"):
      if (self.directory(unit) / f"{file}.json").exists():
        return file
    paused = self.read(unit, "paused.json")
    if paused and stop_after and paused["epoch"] >= stop_after:
      return "paused"
    return "open"

  def settle(
    self, units: Sequence[Unit], stop_after: int | None = None
  ) -> None:
    """Sees to it that units are trained, here or by another process."""
    left = list(dict.fromkeys(units))
    while left:
      worked = False
      for unit in list(left):
        if self.state(unit, stop_after) == "open":
          path = self.directory(unit) / ".lock"
          with workdirs.lock(path, wait=False) as taken:
            if not taken:
              continue
            if self.state(unit, stop_after) == "open":
              self._train(unit, stop_after)
              worked = True
        if self.state(unit) == "done":
          # Most of its bytes, and needed no more.
          directory = self.directory(unit)
          shutil.rmtree(directory / "checkpoints", ignore_errors=True)
          (directory / "paused.json").unlink(missing_ok=True)
        left.remove(unit)
      if left and not worked:
        time.sleep(_LOOK)

  def _train(self, unit: Unit, stop_after: int | None) -> None:
    directory = self.directory(unit)
    journal = workdirs.Workdir(directory, {}, "", hosts.One())
    network = self.network(unit)
    training = self.training(unit, network)
    try:
      fitted = training.fit(directory, journal, stop_after)
    except (errors.DivergedError, jax.errors.JaxRuntimeError) as e:
      if "RESOURCE_EXHAUSTED" not in str(e) and not isinstance(
        e, errors.DivergedError
      ):
        raise
      reason = str(e).splitlines()[0][:300]
      print(f"{unit.name} failed: {reason}", flush=True)
      files.write_json(directory / "failed.json", {"reason": reason})
      return
    epochs = loop.epochs_of(fitted.records)
    best = epochs[fitted.epoch - 1]
    record = {
      "epoch": len(epochs),
      "best_epoch": fitted.epoch,
      "val": files.finite(best["val"]),
      "seconds": sum(
        seconds
        for line in epochs
        for key, seconds in line["timing"].items()
        if key.endswith("seconds")
      ),
      "trained_params": training.trained_params,
      "failures": training.failures,
    }
    value = record["val"][self.config.metric]
    print(
      f"{unit.name}: {len(epochs)} epochs,"
      f" validation {self.config.metric} {_said(value)},"
      f" {record['seconds']:.0f} s",
      flush=True,
    )
    if not fitted.ended:
      files.write_json(directory / "paused.json", record)
      return
    graph, _, _ = steps.take_apart(network)
    best = steps.put_together(graph, *jax.tree.map(jnp.asarray, fitted.numbers))
    loading.export(best, directory / "model.safetensors", self.source.card())
    _save(directory / "val.npz", training.predict(fitted.numbers, ["val"]))
    files.write_json(directory / "done.json", record)

  def trained(self, unit: Unit) -> Network:
    """Returns the network that a finished unit ended with."""
    network = self.network(unit)
    stored = readers.open_checkpoint(self.directory(unit) / "model.safetensors")
    tensors.load(network, {n: tensor.read() for n, tensor in stored.items()})
    return network

  def epochs(self, unit: Unit) -> list[dict[str, Any]]:
    """Returns the epochs that a training has behind it."""
    path = self.directory(unit) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    # Another process may be writing the last line.
    *lines, _ = text.split("\n")
    return loop.epochs_of([json.loads(line) for line in lines])

  def scores(self, units: Sequence[Unit], split: str) -> dict[str, Score]:
    """Returns metric -> what the repeats of a row score on a split."""
    values, again = [], []
    for unit in units:
      data = self.data[unit.repeat]
      rows, logits = self.outputs(unit, split)
      labels = data.examples.labels[rows]
      weights = data.resample(
        rows, self.config.many_labels, self.config.resamples, self.config.seed
      )
      loss = trial.make_loss(self.config, data)
      of = loss, data.names, labels, logits
      values.append(scoring.measure(*of).values)
      again.append(scoring.measure(*of, weights).values)
    found = {}
    for metric in classification.METRICS:
      # The same resamples for all seeds: what is resampled are the patients.
      low, high = bootstrap.interval(
        np.mean([one[metric] for one in again], axis=0)
      )
      found[metric] = Score(
        tuple(float(one[metric]) for one in values), (float(low), float(high))
      )
    return found

  def best(self, row: Row) -> tuple[Unit, float]:
    """Returns the best of a row's repeats, and its score, by validation."""
    records = [self.read(unit, "done.json") for unit in row.units]
    values = [_number(r["val"][self.config.metric]) for r in records]
    at = int(np.argmax(np.nan_to_num(values, nan=-np.inf)))
    return row.units[at], values[at]

  def evaluated(self, row: Row) -> dict[str, Any]:
    """Returns what `trial.evaluate` says of a row's best network."""
    best, _ = self.best(row)
    outputs = {split: self.outputs(best, split) for split in ("val", "test")}
    return trial.evaluate(
      self.training(best, self.network(best)),
      self.data[best.repeat],
      outputs,
      self.config.resamples,
      self.config.seed,
    )

  def outputs(self, unit: Unit, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and logits of a split, read once and kept."""
    path = self.directory(unit) / f"{split}.npz"
    if not path.exists():
      network = self.trained(unit)
      training = self.training(unit, network)
      _, params, statistics = steps.take_apart(network)
      predicted = training.predict((params, statistics), [split])
      # The outputs last: once they are there, nothing is read again.
      files.write_json(
        path.with_name(f"{split}_failures.json"),
        {"failures": training.failures},
      )
      _save(path, predicted)
    with np.load(path, allow_pickle=False) as stored:
      return stored["rows"], stored["logits"]


def _save(
  path: pathlib.Path, outputs: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
  ((rows, logits),) = outputs.values()
  with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
    np.savez(f, rows=rows, logits=logits)


def _said(value: float | None) -> str:
  return "undefined" if value is None else f"{value:.3f}"
