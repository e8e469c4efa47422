"""What every layer of a pretrained network is worth on the user's images.

Frozen networks, pretrained and with random weights, give the pooled features
of every tap; probes on them give scores; the difference is the gain; and the
shallowest tap that loses no more than the tolerance is where to cut.

Source: the question, knowledge gain over a random-weight network, is Li and
  Plataniotis's (arXiv 2005.01609v3, PLoS One 15(10):e0240530). The formulas
  are this project's and stand in docs/layers.md.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from jaxtransfer import configuration, errors, features, files, parallel
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import pipeline, sources
from jaxtransfer.data import splits as splitting
from jaxtransfer.measure import bootstrap, classification, cost, gain, probes
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.report import page, tables
from jaxtransfer.training import steps
from jaxtransfer.weights import loading

SPLITS = ("val", "test")
# Features of one tap held at a time; probing needs a few times as much.
_PROBED_BYTES = 2**30


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
    converged: (networks, probes) bool.
  """

  values: np.ndarray
  resampled: np.ndarray
  intervals: np.ndarray
  strengths: np.ndarray
  converged: np.ndarray

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
  examples = sources.open_source(config.data)
  divided, notes = splitting.divide(
    config, examples, workdir.path / "splits.json"
  )
  # After the images, because it may download.
  source = loading.resolve_weights(
    plan.network, config.network.weights, config.network.prefix
  )
  notes = [*notes, *source.notes]
  if source.slim_after:
    raise errors.UsageError(
      f"{source.path} holds layers of half the width after"
      f" {source.slim_after}; this job compares networks of the usual widths"
    )
  networks = _networks(config, plan, source)
  label = next(iter(networks))
  networks[label].check_size(config.data.image_size)
  devices = parallel.Devices(config.parallel)
  begun = workdir.begin(str(devices))
  splitting.save_splits(workdir.path / "splits.json", divided, examples.names)
  print(
    f"{splitting.counted(divided, examples.classes)};"
    f" {plan.network} with {label} and {plan.seeds} random initialisations;"
    f" {len(plan.taps)} taps on {devices}",
    flush=True,
  )
  for note in [*examples.notes, *notes]:
    print(note, flush=True)

  started = time.monotonic()
  images = features.Images(
    examples=examples,
    rows=np.sort(np.concatenate(list(divided.values()))),
    image_size=config.data.image_size,
    mean=source.mean,
    std=source.std,
    batch_size=config.batch_size,
    workers=config.data.workers,
    max_failures=config.data.max_failures,
  )
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
  measured = _measure(config, plan, examples, divided, extracted, workdir)
  probing = time.monotonic() - started

  started = time.monotonic()
  costs = _costs(config, plan, networks[label], images, devices)
  costing = time.monotonic() - started

  results = _results(config, plan, label, examples, divided, measured, costs)
  summary = results["summary"]
  summary |= {
    "failures": len(failures),
    "normalisation": {"mean": list(source.mean), "std": list(source.std)},
    "weights_sha256": source.sha256,
    "seconds": {"extracting": extracting, "probing": probing, "cost": costing},
    "run": begun,
  }
  summary["notes"] = [*examples.notes, *notes, *summary["notes"]]
  page.write(workdir.path, results)
  _print(results)
  return workdir.finish(results)


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config)
  configuration.positive(config, "cost_batch_size", "resamples", "seeds")
  configuration.one_of("metric", config.metric, classification.METRICS)
  if config.tolerance < 0:
    raise errors.UsageError(
      f"config.tolerance is {config.tolerance}; a loss of zero or more"
    )
  if not config.strengths or min(config.strengths) <= 0:
    raise errors.UsageError(
      f"config.strengths is {config.strengths}; it must be positive numbers"
    )
  if not config.network.weights:
    raise errors.UsageError(
      "config.network.weights is empty; this job compares pretrained weights"
      " with random ones: name some, or give a file"
    )
  kinds = tuple(kind.strip() for kind in config.probes.split(","))
  for kind in kinds:
    configuration.one_of("probes", kind, probes.KINDS)
  taps = zoo.select_taps(
    config.network.name, config.taps, config.network.until or None
  )
  others = [m for m in classification.METRICS if m != config.metric]
  return Plan(
    network=config.network.name,
    taps=tuple(taps),
    probes=kinds,
    metrics=(config.metric, *others),
    seeds=config.seeds,
  )


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


def _measure(
  config: ml_collections.ConfigDict,
  plan: Plan,
  examples: sources.Examples,
  divided: Mapping[str, np.ndarray],
  extracted: Mapping[str, features.Features],
  workdir: workdirs.Workdir,
) -> list[Measured]:
  """Probes every tap, or reads what an earlier run of it measured."""
  rows = next(iter(extracted.values())).rows()
  # Positions in the features of the rows of each split that could be read.
  where = {name: np.isin(rows, split) for name, split in divided.items()}
  labels = {name: examples.labels[rows[m]] for name, m in where.items()}
  weights = {
    split: bootstrap.resample_weights(
      labels[split],
      None
      if examples.groups is None
      else [examples.groups[row] for row in rows[where[split]]],
      config.resamples,
      config.seed,
    )
    for split in SPLITS
  }
  determines = [
    [str(f.directory.name) for f in extracted.values()],
    [hashlib.sha256(m.tobytes()).hexdigest() for m in where.values()],
    [plan.probes, plan.metrics, config.strengths, config.resamples],
    config.seed,
  ]
  digest = hashlib.sha256(json.dumps(determines).encode()).hexdigest()[:12]
  found = []
  # Said once, by name, among the report's notes.
  warnings.simplefilter("ignore", classification.AbsentClassWarning)
  for tap in tqdm.tqdm(plan.taps, desc="probing", unit=" taps", disable=None):
    stored = workdir.path / "features" / f"probes-{digest}" / f"{tap}.npz"
    if not stored.exists():
      _probe(
        plan,
        tap,
        config.strengths,
        where,
        labels,
        weights,
        extracted,
        len(examples.classes),
      ).save(stored)
    found.append(Measured.load(stored))
    score = float(found[-1].values[0, 0, 0, 1])
    workdir.log(event="probe", tap=tap, **{plan.metrics[0]: score})
  return found


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
  chosen, converged = np.empty(shape), np.empty(shape, bool)
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
      here = slice(start, start + len(some))
      chosen[here, p], converged[here, p] = fitted.strength, fitted.converged
      for s, split in enumerate(SPLITS):
        for r, scores in enumerate(getattr(fitted, f"{split}_scores"), start):
          for m, name in enumerate(plan.metrics):
            metric = classification.METRICS[name]
            values[r, p, m, s] = metric(labels[split], scores)
            main = p == 0 and m == 0
            if main or (r == 0 and split == "test"):
              again = metric(labels[split], scores, weights[split])
              if main:
                resampled[r, s] = again
              if r == 0 and split == "test":
                intervals[p, m] = bootstrap.interval(again)
  return Measured(values, resampled, intervals, chosen, converged)


def _costs(
  config: ml_collections.ConfigDict,
  plan: Plan,
  network: Network,
  images: features.Images,
  devices: parallel.Devices,
) -> list[dict[str, float]]:
  """Cuts the network at every tap and measures what the cut one costs."""
  layers = {
    layer.name: layer
    for layer in zoo.list_layers(plan.network, images.image_size)
  }
  values = tensors.dump(network)
  size = devices.batch_size(config.cost_batch_size)
  pixels = np.random.default_rng(config.seed).integers(
    0, 256, (size, images.image_size, images.image_size, 3), np.uint8
  )
  batch = devices.put(pixels)
  calls, found = [], []
  for tap in plan.taps:
    cut = zoo.build(plan.network, until=tap, dtype=jnp.dtype(config.dtype))
    tensors.load(cut, {name: values[name] for name in tensors.shapes(cut)})
    graph, *numbers = steps.take_apart(cut)
    forward = steps.make_predict(graph, images.mean, images.std)
    numbers = devices.replicate(tuple(numbers))
    program = devices.compile(forward).lower(numbers, batch).compile()
    calls.append(functools.partial(program, numbers, batch))
    layer = layers[tap]
    found.append(
      {
        "channels": layer.channels,
        "params": layer.params,
        "macs": layer.macs,
        "peak_memory_bytes": cost.peak_memory(program),
      }
    )
  speeds = cost.measure_forward(calls, size)
  return [
    {**of_cut, "images_per_second": speed.median}
    for of_cut, speed in zip(found, speeds, strict=True)
  ]


def _results(
  config: ml_collections.ConfigDict,
  plan: Plan,
  label: str,
  examples: sources.Examples,
  divided: Mapping[str, np.ndarray],
  measured: Sequence[Measured],
  costs: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
  """Turns arrays into the rows and the summary of results.json."""
  metric, probe = plan.metrics[0], plan.probes[0]
  val, test = ({"split": s, "n": len(divided[s])} for s in SPLITS)
  rows = _score_rows(plan, label, measured, val, test)

  # (networks, 2, taps, resamples): the same resamples everywhere, so that
  # differences between networks and between taps are paired.
  resampled = np.stack([one.resampled for one in measured], axis=2)
  values = np.stack([one.values[:, 0, 0] for one in measured], axis=2)
  main = {"tap": None, "probe": probe}
  pretrained = {"weights": label, "seed": None, **main}
  random = {"weights": "random", "seed": None, **main}
  gains = gain.gain(values[0, 1], values[1:, 1])
  gains_again = gain.gain(resampled[0, 1], resampled[1:, 1])
  spread = gain.seed_spread(values[1:, 1])
  marginal = gain.marginal_gain(values[0, 1])
  marginal_again = gain.marginal_gain(resampled[0, 1])
  mean_again = resampled[1:, 1].mean(0)
  cut = gain.choose_cut(values[0, 0], resampled[0, 0], config.tolerance)
  against = values[0, 0] - values[0, 0][cut.best]
  against_again = resampled[0, 0] - resampled[0, 0][cut.best]
  for t, tap in enumerate(plan.taps):
    for base, name, split, value, again in (
      (random, metric, test, values[1:, 1, t].mean(), mean_again[t]),
      (random, f"{metric}:seed_sd", test, spread[t], None),
      (pretrained, f"{metric}:gain", test, gains[t], gains_again[t]),
      (
        pretrained,
        f"{metric}:marginal_gain",
        test,
        marginal[t],
        marginal_again[t],
      ),
      (
        pretrained,
        f"{metric}:against_best",
        val,
        against[t],
        against_again[t],
      ),
    ):
      interval = None if again is None else bootstrap.interval(again)
      rows.append(
        tables.row(base | split | {"tap": tap}, name, value, interval)
      )
    for name, value in costs[t].items():
      rows.append(tables.row({"weights": label, "tap": tap}, name, value))
  rows = [{**row, "network": plan.network} for row in rows]

  gain_low = np.array([bootstrap.interval(again)[0] for again in gains_again])
  notes = []
  if not (gain_low > 0).any():
    notes.append(
      "At no tap does the interval of the gain lie above zero: on these images"
      " the pretrained weights are not shown to be worth more than random ones."
    )
  ends = {min(config.strengths), max(config.strengths)}
  at_end = [
    tap
    for tap, one in zip(plan.taps, measured, strict=True)
    if len(ends) > 1 and one.strengths[0, 0] in ends
  ]
  if at_end:
    notes.append(
      f"Validation chose the smallest or largest of config.strengths for"
      f" {label} at {', '.join(at_end)}: a wider grid may score higher there."
    )
  unfinished = sum(int((~one.converged).sum()) for one in measured)
  if unfinished:
    notes.append(
      f"{unfinished} fits of a probe stopped before they had converged."
    )
  groups = None
  if examples.groups is not None:
    groups = {
      name: len({examples.groups[row] for row in split})
      for name, split in divided.items()
    }
  units = "images" if groups is None else "groups"
  count = len(divided["test"]) if groups is None else groups["test"]
  low, high = bootstrap.interval(resampled[0, 1, cut.index])
  return {
    "job": "layers",
    "summary": {
      "sentence": _sentence(
        plan,
        cut,
        values[0, 1],
        (low, high),
        (gains, [bootstrap.interval(again) for again in gains_again]),
        costs,
      ),
      "rule": (
        gain.rule(config.tolerance, tables.metric_name(metric))
        + " The best tap and the interval come from the validation split."
      ),
      "cut": plan.taps[cut.index],
      "best": plan.taps[cut.best],
      "metric": metric,
      "probe": probe,
      "tolerance": config.tolerance,
      "network": plan.network,
      "weights": label,
      "data": config.data.source,
      "classes": examples.classes,
      "taps": list(plan.taps),
      "seeds": plan.seeds,
      "rows": {name: len(split) for name, split in divided.items()},
      "groups": groups,
      "notes": notes,
      "interval": (
        f"95 % percentile bootstrap over {count:,} {units} of the test split,"
        f" {config.resamples:,} resamples, paired between networks and taps"
      ),
    },
    "measurements": rows,
  }


def _score_rows(
  plan: Plan,
  label: str,
  measured: Sequence[Measured],
  val: Mapping[str, Any],
  test: Mapping[str, Any],
) -> list[dict[str, Any]]:
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
          rows.append(tables.row(base | val, "strength", strength))
        for m, metric in enumerate(plan.metrics):
          scores = one.values[r, p, m]
          rows.append(tables.row(base | val, metric, scores[0]))
          interval = None if r else one.intervals[p, m]
          rows.append(tables.row(base | test, metric, scores[1], interval))
  return rows


def _sentence(
  plan: Plan,
  cut: gain.Cut,
  scores: np.ndarray,
  interval: tuple[float, float],
  gains: tuple[np.ndarray, Sequence[tuple[float, float]]],
  costs: Sequence[Mapping[str, float]],
) -> str:
  """Says in words where to cut, what it costs and what pretraining gave."""
  here, full = costs[cut.index], costs[-1]
  metric = tables.metric_name(plan.metrics[0])
  tap, deepest = plan.taps[cut.index], plan.taps[-1]
  score = f"{scores[cut.index]:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
  low, high = gains[1][cut.index]
  worth = (
    f"There the pretrained weights are worth {gains[0][cut.index]:+.3f}"
    f" [{low:+.3f}, {high:+.3f}] {metric} over random ones."
  )
  if cut.index == len(plan.taps) - 1:
    return f"Keep all layers up to {tap}: {score} {metric}. {worth}"
  return (
    f"Cut after {tap}: {score} {metric} against {scores[-1]:.3f} at {deepest},"
    " the deepest, with"
    f" {tables.percent(here['params'], full['params'])} of the parameters and"
    f" {here['images_per_second'] / full['images_per_second']:.1f}x the speed."
    f" {worth}"
  )


def _print(results: Mapping[str, Any]) -> None:
  """Prints the curve as a table."""
  summary = results["summary"]
  metric = summary["metric"]
  found = {
    (row["tap"], row["metric"], row["weights"]): row
    for row in results["measurements"]
    if row["seed"] is None
    and row["split"] in ("test", None)
    and row["probe"] in (summary["probe"], None)
  }

  def cell(tap: str, name: str, weights: str) -> str:
    row = found[tap, name, weights]
    if row["value"] is None:
      return "-"
    if row["low"] is None:
      return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

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
      f"{found[tap, 'params', weights]['value'] / 1e6:.2f} M",
      f"{found[tap, 'images_per_second', weights]['value']:.1f}",
    )
    print(" ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)))
