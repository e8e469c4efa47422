"""What every layer of a pretrained network is worth on the user's images.

Frozen networks, pretrained and with random weights, give the pooled features
of every tap; probes on them give scores; the difference is the gain; and the
shallowest tap that loses no more than the tolerance is where to cut.

Source: the question, knowledge gain over a random-weight network, is Li and
  Plataniotis's (arXiv 2005.01609v3, PLoS One 15(10):e0240530). The formulas
  are this project's and stand in docs/layers.md.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxtransfer import (
  configuration,
  errors,
  features,
  files,
  inference,
  parallel,
  predictions,
  preview,
  progress,
  results,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import dataset, pipeline, stored_splits
from jaxtransfer.measure import (
  bootstrap,
  classification,
  gain,
  metrics,
  probes,
)
from jaxtransfer.networks import zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.report import page, sentences
from jaxtransfer.report.tables import Measurements
from jaxtransfer.weights import loading

SPLITS = ("val", "test")
# Features of one tap held at a time; probing needs a few times as much.
_PROBED_BYTES = 2**30
_NAMED = 3  # taps in a note; more are counted


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config.

  Attributes:
    network: the zoo's name.
    taps: layer names in the network's order.
    probes: kinds of probe; the first decides the cut.
    metrics: names of metrics; the first decides the cut.
    seeds: number of networks with random weights.
  """

  network: str
  taps: tuple[str, ...]
  probes: tuple[str, ...]
  metrics: tuple[str, ...]
  seeds: int


@dataclasses.dataclass(frozen=True)
class Measured:
  """What the probes of one tap measured; the first network is pretrained.

  Attributes:
    values: (networks, probes, metrics, 2) float64; the last axis is val, test.
    resampled: (networks, 2, resamples) float64: first probe, first metric.
    intervals: (probes, metrics, 2) low and high of the pretrained, on test.
    strengths: (networks, probes) chosen on val; NaN where a probe has none.
    beyond: (networks, probes) as `probes.ProbeResult` has it.
    converged: (networks, probes) bool.
    scores: (N, C) float32 of the pretrained network's first probe, of the test
      rows that could be read.
  """

  values: np.ndarray
  resampled: np.ndarray
  intervals: np.ndarray
  strengths: np.ndarray
  beyond: np.ndarray
  converged: np.ndarray
  scores: np.ndarray

  def save(self, path: pathlib.Path) -> None:
    """Writes the arrays, atomically."""
    with files.atomic_path(path) as temporary, open(temporary, "wb") as f:
      np.savez(f, **dataclasses.asdict(self))

  @classmethod
  def load(cls, path: pathlib.Path) -> "Measured":
    """Reads what `save` wrote."""
    with np.load(path, allow_pickle=False) as stored:
      return cls(**stored)


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/layers.py makes it.
    workdir: a claimed directory; what is there already is not done again.

  Returns:
    The exit code: 0, or 1 where images could not be read.

  Raises:
    UsageError: the config, the source or the weights cannot be used.
    RunError: too many images cannot be read.
  """
  plan = make_plan(config)
  (data,) = dataset.open_divisions(config, workdir.path / "splits.json")
  # After the images, because it may download.
  source = _resolve_weights(config, plan)
  networks = _networks(config, plan, source)
  label = next(iter(networks))
  networks[label].check_size(config.data.image_size)
  devices = parallel.Devices(config.parallel)
  images = features.Images(
    examples=data.examples,
    rows=np.sort(np.concatenate(list(data.rows.values()))),
    image_size=config.data.image_size,
    mean=source.mean,
    std=source.std,
    batch_size=config.batch_size,
    workers=config.data.workers,
    max_failures=config.data.max_failures,
  )
  if workdir.dry:
    return _preview(config, plan, data, images, networks, devices, workdir.path)
  begun = results.Run(**workdir.begin(str(devices)))
  dataset.save(workdir.path / "splits.json", [data])
  print(
    f"{data};"
    f" {plan.network} with {label} and {plan.seeds} random initialisations;"
    f" {len(plan.taps)} taps on {devices}",
    flush=True,
  )
  (data,) = dataset.note_duplicates(
    [data], config, workdir.path / "duplicates.json", workdir.share
  )
  for note in [*data.notes, *source.notes]:
    print(note, flush=True)

  started = time.monotonic()
  extracted = features.extract(
    images,
    networks,
    plan.taps,
    devices,
    workdir.path / "features",
    workdir.log,
  )
  failures = extracted[label].failures()
  if failures:
    pipeline.write_failures(workdir.path / "failures.csv", failures)
  extracting = time.monotonic() - started

  started = time.monotonic()
  measured = _measure(config, plan, data, extracted, workdir)
  probing = time.monotonic() - started

  started = time.monotonic()
  costs = inference.measure_cuts(
    networks[label],
    plan.taps,
    mean=images.mean,
    std=images.std,
    image_size=images.image_size,
    batch_size=devices.batch_size(config.cost_batch_size),
    devices=devices,
    directory=workdir.path / "features",
  )
  costing = time.monotonic() - started

  about = {
    "sum_over_whole": costs.sum_over_whole,
    "failures": len(failures),
    "seconds": {"extracting": extracting, "probing": probing, "cost": costing},
    "run": begun,
  }
  read = dataset.what_was_read([data], dict(failures))
  left = _results(
    config, plan, source, data, read, measured, costs.table, about
  )
  cut = cast(results.Layers, left["summary"])["cut"]
  of_test = _predictions(plan, data, extracted[label], measured, cut)
  predictions.write(workdir.path / "predictions.csv", of_test)
  page.write(workdir.path, left, predictions.show(config, of_test[:1]))
  _print(left)
  return workdir.finish(left)


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config)
  configuration.positive(config, "cost_batch_size", "resamples", "seeds")
  configuration.one_of("metric", config.metric, metrics.OF_SCORES)
  if config.tolerance < 0:
    raise errors.UsageError(
      f"config.tolerance is {config.tolerance}; a loss of zero or more"
    )
  if not config.strengths or min(config.strengths) <= 0:
    raise errors.UsageError(
      f"config.strengths is {config.strengths}; it must be positive numbers"
    )
  kinds = tuple(kind.strip() for kind in config.probes.split(","))
  for kind in kinds:
    configuration.one_of("probes", kind, probes.KINDS)
  taps = zoo.select_taps(
    config.network.name, config.taps, config.network.until or None
  )
  others = [m for m in metrics.OF_SCORES if m != config.metric]
  return Plan(
    network=config.network.name,
    taps=tuple(taps),
    probes=kinds,
    metrics=(config.metric, *others),
    seeds=config.seeds,
  )


def _resolve_weights(
  config: ml_collections.ConfigDict, plan: Plan
) -> loading.Source:
  """Returns the pretrained weights, which must be some."""
  source = loading.resolve_weights(
    plan.network, config.network.weights or None, config.network.prefix
  )
  if source.path is None:
    raise errors.UsageError(
      f"config.network.weights is {config.network.weights!r}; this job compares"
      " pretrained weights with random ones: name some, or give a file"
    )
  if source.slim_after:
    raise errors.UsageError(
      f"{source.path} holds layers of half the width after"
      f" {source.slim_after}; this job compares networks of the usual widths"
    )
  return source


def _networks(
  config: ml_collections.ConfigDict, plan: Plan, source: loading.Source
) -> dict[str, Network]:
  """Makes the pretrained network, first, and those with random weights."""
  settings = {"until": plan.taps[-1], "dtype": jnp.dtype(config.dtype)}
  networks = {
    source.label: loading.create_model(plan.network, weights=source, **settings)
  }
  for seed in range(plan.seeds):
    networks[f"random-{seed}"] = loading.create_model(
      plan.network, seed=config.seed + seed, **settings
    )
  return networks


def _preview(
  config: ml_collections.ConfigDict,
  plan: Plan,
  data: dataset.Dataset,
  images: features.Images,
  networks: Mapping[str, Network],
  devices: parallel.Devices,
  path: pathlib.Path,
) -> int:
  """Tells what the run would do, take and leave, for `--dry_run`."""
  layers = {
    layer.name: layer
    for layer in zoo.list_layers(plan.network, config.data.image_size)
  }
  speed, extracting = preview.of_extraction(
    images, networks, plan.taps, devices
  )
  widths = [layers[tap].channels for tap in plan.taps]
  probing = preview.of_probing(
    {split: len(rows) for split, rows in data.rows.items()},
    widths,
    len(networks),
    kinds=plan.probes,
    strengths=config.strengths,
    metric=plan.metrics[0],
    num_classes=len(data.names),
  )
  # A round is all parts and the cuts at the ends of stages.
  share = config.cost_batch_size / images.batch_size
  rounds = preview.Time(3 * share, 20 * share)
  costing = preview.Time(
    rounds.low * speed.computing.low, rounds.high * speed.computing.high
  )
  compiling = preview.Time(speed.compiling, 4 * speed.compiling)
  names = f"{next(iter(networks))} and {plan.seeds} random initialisations"
  work = [
    f"extracting: {len(images.rows):,} images through {len(networks)} networks,"
    f" {plan.network} with {names}, on {devices}: {extracting}",
    f"probing: {len(plan.taps)} taps x {len(networks)} networks x"
    f" {len(plan.probes)} probes: {probing}",
    f"timing {len(plan.taps)} cuts: {costing}",
  ]
  seconds = extracting + probing + costing + compiling
  size = 4 * len(networks) * len(images.rows) * sum(widths)
  return preview.tell(config, path, [data], work, speed, seconds, size)


def _measure(
  config: ml_collections.ConfigDict,
  plan: Plan,
  data: dataset.Dataset,
  extracted: Mapping[str, features.Features],
  workdir: workdirs.Workdir,
) -> list[Measured]:
  """Probes every tap, or reads what an earlier run of it measured."""
  rows = next(iter(extracted.values())).rows()
  # Positions in the features of the rows of each split that could be read.
  where = {name: np.isin(rows, split) for name, split in data.rows.items()}
  labels = {name: data.examples.labels[rows[m]] for name, m in where.items()}
  weights = {
    split: data.resample(rows[where[split]], config.resamples, config.seed)
    for split in SPLITS
  }
  determines = [
    [str(f.directory.name) for f in extracted.values()],
    [hashlib.sha256(m.tobytes()).hexdigest() for m in where.values()],
    stored_splits.digest(data.examples),
    [plan.probes, plan.metrics, config.strengths, config.resamples],
    config.seed,
    [field.name for field in dataclasses.fields(Measured)],
  ]
  digest = hashlib.sha256(json.dumps(determines).encode()).hexdigest()[:12]
  measured = []
  # Said once, by name, among the report's notes.
  warnings.simplefilter("ignore", classification.AbsentClassWarning)
  directory = workdir.path / "features" / f"probes-{digest}"
  missing = [t for t in plan.taps if not (directory / f"{t}.npz").exists()]
  done = len(plan.taps) - len(missing)
  bar = progress.Progress("probing", "taps", len(plan.taps), done)
  for tap in plan.taps:
    stored = directory / f"{tap}.npz"
    if tap in missing:
      _probe(
        plan,
        tap,
        config.strengths,
        where,
        labels,
        weights,
        extracted,
        len(data.names),
      ).save(stored)
    measured.append(Measured.load(stored))
    score = float(measured[-1].values[0, 0, 0, 1])
    workdir.log(event="probe", tap=tap, **{plan.metrics[0]: score})
    if tap in missing:
      on_val = float(measured[-1].values[0, 0, 0, 0])
      bar.update(words=f"{tap}, validation {plan.metrics[0]} {on_val:.3f}")
  bar.close()
  return measured


def _probe(
  plan: Plan,
  tap: str,
  strengths: Sequence[float],
  where: Mapping[str, np.ndarray],
  labels: Mapping[str, np.ndarray],
  weights: Mapping[str, np.ndarray],
  extracted: Mapping[str, features.Features],
  num_classes: int,
) -> Measured:
  """Fits every probe on one tap of all networks, and scores it."""
  networks = list(extracted.values())
  shape = (len(networks), len(plan.probes))
  values = np.empty((*shape, len(plan.metrics), len(SPLITS)))
  intervals = np.empty((len(plan.probes), len(plan.metrics), 2))
  chosen, beyond = np.empty(shape), np.empty(shape)
  converged = np.empty(shape, bool)
  test_scores = np.empty(0)
  resampled = np.empty((len(networks), len(SPLITS), len(weights["test"])))
  first = networks[0].tap(tap)
  # As many networks at a time as fit: all of them but for large sources.
  together = max(1, _PROBED_BYTES // first.nbytes)
  for start in range(0, len(networks), together):
    some = networks[start : start + together]
    stacked = np.stack([network.tap(tap) for network in some])
    parts = {name: stacked[:, mask] for name, mask in where.items()}
    for p, kind in enumerate(plan.probes):
      try:
        fitted = probes.fit_probe(
          kind,
          parts["train"],
          labels["train"],
          parts["val"],
          labels["val"],
          parts["test"],
          strengths,
          plan.metrics[0],
          num_classes,
        )
      except ValueError as e:
        raise errors.RunError(f"{kind} probe of {tap}: {e}") from e
      if start == p == 0:
        test_scores = fitted.test_scores[0]
      here = slice(start, start + len(some))
      chosen[here, p], beyond[here, p] = fitted.strength, fitted.beyond
      converged[here, p] = fitted.converged
      for s, split in enumerate(SPLITS):
        for r, scores in enumerate(getattr(fitted, f"{split}_scores"), start):
          for m, name in enumerate(plan.metrics):
            metric = metrics.METRICS[name].function
            values[r, p, m, s] = metric(labels[split], scores)
            main = p == 0 and m == 0
            if main or (r == 0 and split == "test"):
              in_resamples = metric(labels[split], scores, weights[split])
              if main:
                resampled[r, s] = in_resamples
              if r == 0 and split == "test":
                intervals[p, m] = bootstrap.interval(in_resamples)
  return Measured(
    values, resampled, intervals, chosen, beyond, converged, test_scores
  )


def _predictions(
  plan: Plan,
  data: dataset.Dataset,
  extracted: features.Features,
  measured: Sequence[Measured],
  cut: str,
) -> list[predictions.Predictions]:
  """Returns what the main probe says of the test split.

  Args:
    plan: the config, checked.
    data: the images.
    extracted: the pretrained network's features.
    measured: of every tap.
    cut: a tap; the deepest one is the other.
  """
  rows = extracted.rows()
  rows = rows[np.isin(rows, data.rows["test"])]
  networks = []
  for tap in dict.fromkeys((cut, plan.taps[-1])):
    scores = measured[plan.taps.index(tap)].scores
    values = probes.probabilities(plan.probes[0], scores)
    networks.append(predictions.Predictions(data, rows, values, tap))
  return networks


def _results(
  config: ml_collections.ConfigDict,
  plan: Plan,
  source: loading.Source,
  data: dataset.Dataset,
  read: dataset.Read,
  measured: Sequence[Measured],
  costs: Sequence[Mapping[str, float]],
  about: Mapping[str, Any],
) -> results.Results:
  """Turns arrays into the rows and the summary of results.json.

  Args:
    config: the whole config.
    plan: it, checked.
    source: of the pretrained network's weights.
    data: the images.
    read: what could be read of them.
    measured: of every tap.
    costs: of every tap.
    about: what the summary says of the run.
  """
  metric, label = plan.metrics[0], source.label
  val, test = ({"split": s, "n": read.rows[s]} for s in SPLITS)
  # (networks, 2, taps, resamples): the same resamples everywhere, so that
  # differences between networks and between taps are paired.
  resampled = np.stack([one.resampled for one in measured], axis=2)
  values = np.stack([one.values[:, 0, 0] for one in measured], axis=2)
  cut = gain.choose_cut(values[0, 0], resampled[0, 0], config.tolerance)
  random_best = int(np.nanargmax(values[1:, 0].mean(0)))
  rows = _score_rows(plan, label, measured, val, test)
  rows += _compared_rows(
    plan,
    label,
    values,
    resampled,
    cut,
    random_best,
    config.tolerance,
    val,
    test,
  )
  for tap, of_tap in zip(plan.taps, costs, strict=True):
    base = {"weights": label, "tap": tap}
    rows += [results.row(base, name, value) for name, value in of_tap.items()]
  for row in rows:
    row["network"] = plan.network
  count = f"{read.rows['test']:,} images, whose patients are not known,"
  if read.groups is not None:
    count = f"{read.groups['test']:,} groups"
  summary = results.Layers(
    **about,
    sentence="",
    rule=(
      "A tap is a layer whose output the probe reads; stem is the first"
      " convolution with its pooling. "
      + gain.rule(config.tolerance, results.metric_name(metric))
      + " The best tap and the interval come from the validation split."
    ),
    cut=plan.taps[cut.index],
    best=plan.taps[cut.best],
    random_best=plan.taps[random_best],
    metric=metric,
    probe=plan.probes[0],
    tolerance=config.tolerance,
    network=plan.network,
    weights=label,
    data=config.data.source,
    classes=data.names,
    taps=list(plan.taps),
    seeds=plan.seeds,
    rows=read.rows,
    groups=read.groups,
    notes=[
      *read.notes,
      *source.notes,
      *_notes(config, plan, label, measured, resampled),
    ],
    interval=(
      f"95 % percentile bootstrap over {count} of the test split,"
      f" {config.resamples:,} resamples, paired between networks and taps"
    ),
    normalisation={"mean": list(source.mean), "std": list(source.std)},
    weights_sha256=source.sha256,
  )
  summary["sentence"] = sentences.of_layers(summary, Measurements(rows))
  return {"job": "layers", "summary": summary, "measurements": rows}


def _compared_rows(
  plan: Plan,
  label: str,
  values: np.ndarray,
  resampled: np.ndarray,
  cut: gain.Cut,
  random_best: int,
  tolerance: float,
  val: Mapping[str, Any],
  test: Mapping[str, Any],
) -> list[results.Row]:
  """Returns what the main probe and metric say of the taps beside each other.

  Args:
    plan: the config, checked.
    label: of the pretrained network.
    values: (networks, 2, taps) scores on val and test, pretrained first.
    resampled: (networks, 2, taps, resamples) the same in resamples.
    cut: where to cut.
    random_best: the tap where random weights do best on validation.
    tolerance: of the cut.
    val: what rows of the validation split have in common.
    test: what rows of the test split have in common.
  """
  metric = plan.metrics[0]
  main = {"seed": None, "probe": plan.probes[0]}
  pretrained = {"weights": label, **main}
  random = {"weights": "random", **main}

  def less(array: np.ndarray, tap: int) -> np.ndarray:
    return array - array[tap]

  (on_val, on_test), (val_resampled, test_resampled) = values[0], resampled[0]
  mean, mean_resampled = values[1:, 1].mean(0), resampled[1:, 1].mean(0)
  quantities = [
    (random, metric, test, mean, mean_resampled),
    (random, f"{metric}:seed_sd", test, gain.seed_spread(values[1:, 1]), None),
  ]
  quantities += [
    (pretrained, f"{metric}:{name}", split, of_taps, of_resamples)
    for name, split, of_taps, of_resamples in (
      (
        "gain",
        test,
        gain.gain(on_test, values[1:, 1]),
        gain.gain(test_resampled, resampled[1:, 1]),
      ),
      (
        "marginal_gain",
        test,
        gain.marginal_gain(on_test),
        gain.marginal_gain(test_resampled),
      ),
      (
        "against_best",
        val,
        less(on_val, cut.best),
        less(val_resampled, cut.best),
      ),
      (
        "against_cut",
        test,
        less(on_test, cut.index),
        less(test_resampled, cut.index),
      ),
      (
        "over_random",
        test,
        on_test - mean[random_best],
        test_resampled - mean_resampled[random_best],
      ),
      (
        "chosen",
        val,
        gain.choice_shares(on_val, val_resampled, tolerance),
        None,
      ),
    )
  ]
  return [
    results.row(
      {**base, **split, "tap": tap},
      name,
      of_taps[t],
      None if of_resamples is None else bootstrap.interval(of_resamples[t]),
    )
    for t, tap in enumerate(plan.taps)
    for base, name, split, of_taps, of_resamples in quantities
  ]


def _notes(
  config: ml_collections.ConfigDict,
  plan: Plan,
  label: str,
  measured: Sequence[Measured],
  resampled: np.ndarray,
) -> list[str]:
  """Returns what the user should know of the measurements, a line each."""
  notes = []
  gains = gain.gain(resampled[0, 1], resampled[1:, 1])
  if not (bootstrap.interval(gains)[0] > 0).any():
    notes.append(
      "At no tap does the interval of the gain lie above zero: on these images"
      " the pretrained weights are not shown to be worth more than random ones."
    )
  # An end of the grid that is hardly better than its neighbour is as good a
  # place as any: only a slope says that more would be gained beyond it.
  at_end = [
    tap
    for tap, one in zip(plan.taps, measured, strict=True)
    if one.beyond[0, 0] > config.tolerance
  ]
  if at_end:
    shown = ", ".join(at_end[:_NAMED])
    if len(at_end) > _NAMED:
      shown += f" and {len(at_end) - _NAMED} more"
    notes.append(
      f"At {len(at_end)} of {len(plan.taps)} taps validation chose the smallest"
      f" or largest of config.strengths for {label}, more than"
      f" {config.tolerance:g} above the one beside it ({shown}): a wider grid"
      " may score higher there."
    )
  unfinished = sum(int((~one.converged).sum()) for one in measured)
  if unfinished:
    notes.append(
      f"{unfinished} fits of a probe stopped before they had converged."
    )
  return notes


def _score_rows(
  plan: Plan,
  label: str,
  measured: Sequence[Measured],
  val: Mapping[str, Any],
  test: Mapping[str, Any],
) -> list[results.Row]:
  """Returns a row for every tap, network, probe, metric and split."""
  rows = []
  for tap, one in zip(plan.taps, measured, strict=True):
    for p, probe in enumerate(plan.probes):
      for r in range(1 + plan.seeds):
        network = (
          {"weights": "random", "seed": r - 1}
          if r
          else {"weights": label, "seed": None}
        )
        base = {"tap": tap, "probe": probe, **network}
        if not np.isnan(one.strengths[r, p]):
          strength = one.strengths[r, p]
          rows.append(results.row({**base, **val}, "strength", strength))
        for m, metric in enumerate(plan.metrics):
          scores = one.values[r, p, m]
          rows.append(results.row({**base, **val}, metric, scores[0]))
          interval = None if r else one.intervals[p, m]
          rows.append(
            results.row({**base, **test}, metric, scores[1], interval)
          )
  return rows


def _print(left: results.Results) -> None:
  """Prints the curve as a table."""
  summary = cast(results.Layers, left["summary"])
  metric = summary["metric"]
  rows = {
    (row["tap"], row["metric"], row["weights"]): row
    for row in left["measurements"]
    if row["seed"] is None
    and row["split"] in ("test", None)
    and row["probe"] in (summary["probe"], None)
  }

  def cell(tap: str, name: str, weights: str) -> str:
    row = rows[tap, name, weights]
    if row["value"] is None:
      return "-"
    if row["low"] is None:
      return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

  def cost(tap: str, name: str) -> float:
    value = rows[tap, name, summary["weights"]]["value"]
    return np.nan if value is None else value

  header = ("tap", metric, "random", "gain", "params", "images/s")
  widths = (24, 22, 22, 24, 8, 9)
  print()
  print(" ".join(n.ljust(w) for n, w in zip(header, widths, strict=True)))
  for tap in summary["taps"]:
    weights = summary["weights"]
    cells = (
      tap + (" <- cut" if tap == summary["cut"] else ""),
      cell(tap, metric, weights),
      cell(tap, metric, "random"),
      cell(tap, f"{metric}:gain", weights),
      f"{cost(tap, 'params') / 1e6:.2f} M",
      f"{cost(tap, 'images_per_second'):.1f}",
    )
    print(" ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)))
