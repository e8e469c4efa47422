"""One network, one cut: trained, evaluated once, and handed over.

Source: keeping a pretrained network up to a cut, putting a fresh head on it
  and training all that is kept is TTL of Peng et al. (arXiv 2106.05152v8);
  training from a layer up (LWFT) or the head alone (FAT) are its baselines.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from scipy import special

from jaxtransfer import configuration, errors, files, parallel
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import labels as labelling
from jaxtransfer.data import pipeline, sources
from jaxtransfer.data import splits as splitting
from jaxtransfer.measure import bootstrap, calibration
from jaxtransfer.networks import zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.report import page
from jaxtransfer.training import augment, loop, optimisers, scoring, steps
from jaxtransfer.weights import loading

HEADS = ("gap", "flatten")
CLASS_WEIGHTS = ("none", "balanced")
# A larger table of confusions is no longer one that somebody reads.
_MOST_CONFUSED = 50


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config.

  Attributes:
    network: the zoo's name.
    until: the last layer kept; None for the whole network.
    last: its name as the network's layers have it.
    frozen: how many of the first layers are not trained.
    optimiser: how parameters move.
    schedule: how the learning rate changes.
    augmentation: what happens to training images.
  """

  network: str
  until: str | None
  last: str
  frozen: int
  optimiser: optimisers.Optimiser
  schedule: optimisers.Schedule
  augmentation: augment.Augmentation


@dataclasses.dataclass(frozen=True)
class Data:
  """The images of a run.

  Attributes:
    examples: the source.
    rows: split -> rows of the source.
    names: of what is predicted.
    targets: (labels, C) float32, as `data.labels.read_targets` returns them.
    notes: what the user should know, a line each.
  """

  examples: sources.Examples
  rows: Mapping[str, np.ndarray]
  names: list[str]
  targets: np.ndarray
  notes: list[str]


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/finetune.py makes it.
    workdir: a claimed directory; what is there already is not done again.

  Returns:
    The exit code: 0, or 1 where images could not be read.

  Raises:
    UsageError: the config, the source or the weights cannot be used.
    RunError: the training diverged, too many images cannot be read, or the
      disk is full.
    SystemExit: 143 after SIGTERM, once the state is saved.
  """
  plan = make_plan(config)
  devices = parallel.Devices(config.parallel)
  _check_batch(config, devices)
  data = _open(config, workdir)
  source = loading.resolve_weights(plan.network, config.network.weights or None)
  network = loading.create_model(
    plan.network,
    until=plan.until,
    num_classes=len(data.names),
    weights=source,
    seed=config.seed,
    dtype=jnp.dtype(config.dtype),
    flatten=(
      config.data.image_size if config.network.head == "flatten" else None
    ),
  )
  train, per_epoch = _train_batches(config, data, devices)
  recipe = steps.Recipe(
    loss=_loss(config, data),
    optimiser=plan.optimiser,
    schedule=plan.schedule.multiplier(len(train), per_epoch),
    augmentation=plan.augmentation,
    mean=source.mean,
    std=source.std,
    frozen=plan.frozen,
    batch_norm=config.batch_norm,
    accumulate=config.accumulate,
    average=config.average,
  )
  settings = loop.Settings(
    epochs=config.epochs,
    metric=config.metric,
    log_steps=config.log_steps,
    checkpoint_steps=config.checkpoint_steps,
    checkpoints=config.checkpoints,
    images=len(data.rows["train"]),
    max_failures=config.data.max_failures,
  )
  begun = workdir.begin(str(devices))
  splitting.save_splits(
    workdir.path / "splits.json", data.rows, data.examples.names
  )
  counts = {name: len(rows) for name, rows in data.rows.items()}
  print(
    f"{sum(counts.values()):,} images of {len(data.names):,} classes"
    f" ({', '.join(f'{n:,} {name}' for name, n in counts.items())});"
    f" {plan.network} to {plan.last} with {source.label} weights;"
    f" {len(train):,} steps on {devices}",
    flush=True,
  )

  started = time.monotonic()
  unreadable: dict[str, str] = {}

  def batches(split: str) -> pipeline.Batches:
    return _Reported(config, data, split, devices, unreadable)

  def score(rows: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    found = scoring.measure(
      recipe.loss, data.names, data.examples.labels[rows], logits
    )
    return {**found.values, "classes": found.classes}

  fitted = loop.fit(
    network,
    recipe,
    plan.schedule,
    settings,
    train=train,
    validate=lambda: batches("val"),
    score=score,
    devices=devices,
    directory=workdir.path,
    journal=workdir,
    seed=config.seed,
  )
  training = time.monotonic() - started
  unreadable |= dict(fitted.failures)

  started = time.monotonic()
  graph, _, _ = steps.take_apart(network)
  forward = devices.compile(steps.make_predict(graph, source.mean, source.std))
  numbers = devices.replicate(fitted.numbers)
  outputs = {}
  for split in ("val", "test"):
    with batches(split) as read:
      outputs[split] = loop.predict(forward, numbers, read, devices)
  evaluated = _evaluate(config, data, recipe.loss, outputs)
  results = _results(config, plan, data, source, network, fitted, evaluated)
  summary = results["summary"]
  if unreadable:
    pipeline.write_failures(
      workdir.path / "failures.csv", sorted(unreadable.items())
    )
  summary |= {
    "failures": len(unreadable),
    "normalisation": {"mean": list(source.mean), "std": list(source.std)},
    "weights_sha256": source.sha256,
    "seconds": {
      "training": training,
      "evaluating": time.monotonic() - started,
    },
    "run": begun,
  }
  best = steps.put_together(graph, *jax.tree.map(jnp.asarray, fitted.numbers))
  loading.export(
    best,
    workdir.path / "export" / "model.safetensors",
    _card(config, data, source, evaluated),
  )
  page.write(workdir.path, results)
  # Last of all: it is the sign that the run is finished.
  files.write_json(workdir.path / "results.json", results)
  print(
    f"\n{summary['sentence']}\n\n{workdir.path / 'report.html'}", flush=True
  )
  return 1 if unreadable else 0


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.positive(config, "batch_size", "data.image_size", "resamples")
  configuration.one_of("dtype", config.dtype, ("float32", "bfloat16"))
  configuration.one_of("metric", config.metric, scoring.METRICS)
  configuration.one_of("network.head", config.network.head, HEADS)
  configuration.one_of(
    "loss.class_weights", config.loss.class_weights, CLASS_WEIGHTS
  )
  optimisers.check_range(
    "loss.label_smoothing", config.loss.label_smoothing, least=0, below=1
  )
  until = config.network.until or None
  network = zoo.build(config.network.name, until=until)
  names = network.layer_names
  if config.train_from == "head":
    frozen = len(names)
  elif config.train_from:
    frozen = _first_of(network, config.train_from)
  else:
    frozen = 0
  return Plan(
    network=config.network.name,
    until=until,
    last=names[-1] if until is None else until,
    frozen=frozen,
    optimiser=optimisers.Optimiser(**config.optimiser),
    schedule=optimisers.Schedule(**config.schedule),
    augmentation=augment.Augmentation(**config.augment),
  )


def _first_of(network: Network, layer: str) -> int:
  """Returns the place of a layer, or of the first layer of a stage."""
  names = network.layer_names
  inside = [i for i, name in enumerate(names) if name.startswith(f"{layer}.")]
  return inside[0] if inside else names.index(network.resolve(layer))


def _check_batch(
  config: ml_collections.ConfigDict, devices: parallel.Devices
) -> None:
  """Refuses a batch that the devices or its parts cannot share evenly."""
  optimisers.check_range("accumulate", config.accumulate, least=1)
  parts = len(devices.devices) * config.accumulate
  if config.batch_size % parts:
    raise errors.UsageError(
      f"config.batch_size is {config.batch_size}; it must be a multiple of"
      f" {parts}: {len(devices.devices)} devices x config.accumulate"
    )


def _open(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> Data:
  examples = sources.open_source(config.data)
  names, targets = labelling.read_targets(examples.classes, config.many_labels)
  divided, notes = splitting.divide(
    config,
    examples,
    workdir.path / "splits.json",
    every_class=not config.many_labels,
  )
  if len(names) < 2 - config.many_labels:
    raise errors.UsageError(
      f"{config.data.source} has {len(names)} classes; this needs two, or one"
      " with config.many_labels"
    )
  if config.many_labels:
    known = targets[examples.labels[divided["train"]]]
    for name, column in zip(names, known.T, strict=True):
      if not (column == 0).any() or not (column == 1).any():
        raise errors.UsageError(
          f"the train split has no image with, or none without, {name!r};"
          " leave it out or change the splits"
        )
  return Data(examples, divided, names, targets, [*examples.notes, *notes])


def _train_batches(
  config: ml_collections.ConfigDict, data: Data, devices: parallel.Devices
) -> tuple[pipeline.Batches, int]:
  optimisers.check_range("epochs", config.epochs, least=1)
  batches = pipeline.Batches(
    data.examples,
    data.rows["train"],
    image_size=config.data.image_size,
    batch_size=config.batch_size,
    workers=config.data.workers,
    shuffle_seed=config.seed,
    epochs=config.epochs,
    drop_last=True,
  )
  return batches, len(batches) // config.epochs


class _Reported(pipeline.Batches):
  """The batches of a split in order; says at its end what was unreadable."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: Data,
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
    )
    self._unreadable_of_run = unreadable
    self._limit = len(data.rows[split]), config.data.max_failures

  def close(self) -> None:
    super().close()
    self._unreadable_of_run |= dict(self.failures)
    pipeline.too_many(self.failures, *self._limit)


def _loss(config: ml_collections.ConfigDict, data: Data) -> steps.Loss:
  targets = data.targets[data.examples.labels[data.rows["train"]]]
  weights = np.ones(len(data.names), np.float32)
  if config.loss.class_weights == "balanced":
    there = np.nansum(targets, axis=0)
    if config.many_labels:
      weights = np.nansum(1 - targets, axis=0) / there
    else:
      weights = len(targets) / (len(data.names) * there)
  return steps.Loss(
    targets=data.targets,
    many=config.many_labels,
    weights=weights.astype(np.float32),
    smoothing=config.loss.label_smoothing,
  )


def _evaluate(
  config: ml_collections.ConfigDict,
  data: Data,
  loss: steps.Loss,
  outputs: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
  """Measures the best epoch, and fits the temperature on validation.

  Returns:
    temperature; rows: (split, metric, value, interval or None, images);
    confusion: (C, C) or None; reliability: of the test split.
  """
  labels = {s: data.examples.labels[rows] for s, (rows, _) in outputs.items()}
  temperature = calibration.fit_temperature(
    *scoring.decisions(loss, labels["val"], outputs["val"][1])
  )
  test_rows, test_logits = outputs["test"]
  groups = data.examples.groups
  weights = bootstrap.resample_weights(
    labels["test"],
    None if groups is None else [groups[row] for row in test_rows],
    config.resamples,
    config.seed,
  )
  rows = []
  for split, suffix, divisor, again in (
    ("val", "", 1.0, None),
    ("test", "", 1.0, weights),
    ("val", ":calibrated", temperature, None),
    ("test", ":calibrated", temperature, weights),
  ):
    logits = outputs[split][1] / divisor
    of = loss, data.names, labels[split], logits
    scores = scoring.measure(*of)
    resampled = None if again is None else scoring.measure(*of, again)
    flat = _flat(scores)
    flat_again = {} if resampled is None else _flat(resampled)
    for name, value in flat.items():
      # A temperature changes how sure a network is, not its order.
      if suffix and name not in loop.LOWER:
        continue
      interval = None
      if name in flat_again:
        interval = bootstrap.interval(flat_again[name])
      rows.append((split, name + suffix, value, interval, len(logits)))
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
    "reliability": {
      "before": _reliability(*of_decisions),
      "after": _reliability(of_decisions[0], of_decisions[1] / temperature),
    },
  }


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
    name: [_finite(v) for v in values]
    for name, values in zip(names, found, strict=True)
  }


def _results(
  config: ml_collections.ConfigDict,
  plan: Plan,
  data: Data,
  source: loading.Source,
  network: Network,
  fitted: loop.Fitted,
  evaluated: Mapping[str, Any],
) -> dict[str, Any]:
  """Turns numbers into the rows and the summary of results.json."""
  base = {
    "network": plan.network,
    "weights": source.label,
    "tap": plan.last,
    "probe": "finetune",
    "seed": config.seed,
  }
  measurements = [
    _row(base, split, metric, value, interval, n)
    for split, metric, value, interval, n in evaluated["rows"]
  ]
  params = sum(x.size for x in fitted.numbers[0].values())
  size = config.data.image_size
  layers = {layer.name: layer for layer in zoo.list_layers(plan.network, size)}
  for name, value in (
    ("params", params),
    ("macs", layers[plan.last].macs),
    ("temperature", evaluated["temperature"]),
    ("best_epoch", fitted.epoch),
  ):
    measurements.append(_row(base, None, name, value))
  epochs = loop.epochs_of(fitted.records)
  found = {
    (row["split"], row["metric"]): row for row in measurements if row["split"]
  }
  groups = None
  units, count = "images", found["test", "accuracy"]["n"]
  if data.examples.groups is not None:
    groups = {
      name: len({data.examples.groups[row] for row in rows})
      for name, rows in data.rows.items()
    }
    units, count = "groups", groups["test"]
  sentence = _sentence(plan, config, found, params, fitted.epoch, len(epochs))
  return {
    "job": "finetune",
    "summary": {
      "sentence": sentence,
      "rule": (
        f"The best of {len(epochs)} epochs by validation {config.metric};"
        " the test split was read once, after it was chosen."
      ),
      "cut": plan.last,
      "head": config.network.head,
      "metric": config.metric,
      "network": plan.network,
      "weights": source.label,
      "data": config.data.source,
      "classes": data.names,
      "taps": [plan.last],
      "trained_layers": list(network.layer_names[plan.frozen :]),
      "best_epoch": fitted.epoch,
      "temperature": evaluated["temperature"],
      "epochs": [_plain(record) for record in epochs],
      "confusion": evaluated["confusion"],
      "reliability": evaluated["reliability"],
      "rows": {name: len(rows) for name, rows in data.rows.items()},
      "groups": groups,
      "notes": [*data.notes, *fitted.notes],
      "interval": (
        f"95 % percentile bootstrap over {count:,} {units} of the test split,"
        f" {config.resamples:,} resamples"
      ),
    },
    "measurements": measurements,
  }


def _row(
  base: Mapping[str, Any],
  split: str | None,
  metric: str,
  value: float,
  interval: Sequence[float] | None = None,
  n: int | None = None,
) -> dict[str, Any]:
  low, high = (None, None) if interval is None else interval
  return {
    **base,
    "metric": metric,
    "split": split,
    "value": _finite(value),
    "low": _finite(low),
    "high": _finite(high),
    "n": n,
  }


def _finite(number: float | None) -> float | None:
  """JSON has no NaN: what could not be measured is null."""
  return float(number) if number is not None and np.isfinite(number) else None


def _plain(value: Any) -> Any:
  """Returns a line of metrics.jsonl without NaN."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  return _finite(value) if isinstance(value, float) else value


def _sentence(
  plan: Plan,
  config: ml_collections.ConfigDict,
  found: Mapping[tuple[str, str], Mapping[str, Any]],
  params: int,
  epoch: int,
  epochs: int,
) -> str:
  def said(metric: str) -> str:
    row = found["test", metric]
    if row["value"] is None:
      return f"an undefined {metric}"
    word = metric.upper() if metric in scoring.RANKING else metric
    text = f"{row['value']:.3f}"
    if row["low"] is not None:
      text += f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{text} {word.replace('_', ' ')}"

  # A loss chooses well and says little.
  first = "auroc" if config.metric in loop.LOWER else config.metric
  second = "auroc" if first == "accuracy" else "accuracy"
  return (
    f"{plan.network} cut after {plan.last}, fine-tuned: {said(first)}"
    f" and {said(second)} on the test split, with {params / 1e6:.2f} M"
    f" parameters, after epoch {epoch} of {epochs}."
  )


def _card(
  config: ml_collections.ConfigDict,
  data: Data,
  source: loading.Source,
  evaluated: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns what a user of the exported network must know."""
  return {
    "head": config.network.head,
    "classes": data.names,
    "many_labels": config.many_labels,
    "mean": list(source.mean),
    "std": list(source.std),
    "image_size": config.data.image_size,
    "temperature": evaluated["temperature"],
    "licence": source.licence,
    "weights": source.label,
    "weights_sha256": source.sha256,
    "metrics": {
      f"{split}:{metric}": _finite(value)
      for split, metric, value, _, _ in evaluated["rows"]
    },
  }
