"""One network, one cut: trained, evaluated once, and handed over.

Source: keeping a pretrained network up to a cut, putting a fresh head on it
  and training all that is kept is TTL of Peng et al. (arXiv 2106.05152v8);
  training from a layer up (LWFT) or the head alone (FAT) are its baselines.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from jaxtransfer import (
  configuration,
  parallel,
  predictions,
  preview,
  results,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import dataset, pipeline
from jaxtransfer.measure import evaluation
from jaxtransfer.measure.metrics import METRICS
from jaxtransfer.networks import functional, zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.report import page, sentences
from jaxtransfer.training import images, loop
from jaxtransfer.weights import loading


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config.

  Attributes:
    network: the zoo's name.
    until: the last layer kept; None for the whole network.
    last: its name as the network's layers have it.
    frozen: how many of the first layers are not trained.
  """

  network: str
  until: str | None
  last: str
  frozen: int


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
  images.check(config, devices)
  (data,) = dataset.open_divisions(config, workdir.path / "splits.json")
  source = loading.resolve_weights(
    plan.network, config.network.weights or None, config.network.prefix
  )
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
  network.check_size(config.data.image_size)
  training = images.ImageTask(
    config,
    data,
    network,
    devices,
    mean=source.mean,
    std=source.std,
    seed=config.seed,
    metric=config.metric,
    frozen=plan.frozen,
  )
  if workdir.dry:
    # Before the training is measured, which uses it up.
    size = preview.bytes_of_training(training) + 4 * zoo.count(network)[0]
    speed, seconds = preview.of_training(
      training, devices, len(data.rows["val"])
    )
    work = (
      f"1 training of {len(training.batches):,} steps, {config.epochs} epochs,"
      f" of {plan.network} to {plan.last} with {source.label} weights, on"
      f" {devices}"
    )
    return preview.tell(
      config,
      workdir.path,
      [data],
      [work],
      speed,
      seconds,
      size,
      source.notes,
    )
  begun = results.Run(**workdir.begin(str(devices)))
  if workdir.writes:
    dataset.save(workdir.path / "splits.json", [data])
  print(
    f"{data};"
    f" {plan.network} to {plan.last} with {source.label} weights;"
    f" {len(training.batches):,} steps on {devices}",
    flush=True,
  )
  (data,) = dataset.note_duplicates(
    [data], config, workdir.path / "duplicates.json", workdir.share
  )
  for note in [*data.notes, *source.notes]:
    print(note, flush=True)

  started = time.monotonic()
  fitted = loop.fit(
    training,
    training.settings,
    devices=devices,
    directory=workdir.path,
    journal=workdir,
  )
  seconds = {"training": time.monotonic() - started}

  started = time.monotonic()
  outputs = training.predict(fitted.numbers, ("val", "test"))
  if not workdir.writes:
    return 1 if training.failures else 0
  evaluated = evaluation.evaluate(
    data.outputs(config, *outputs["val"]),
    data.outputs(config, *outputs["test"], resample=True),
    data.thresholds,
  )
  unreadable = training.failures
  if unreadable:
    pipeline.write_failures(
      workdir.path / "failures.csv", sorted(unreadable.items())
    )
  left = _results(
    config, plan, data, source, network, fitted, evaluated, unreadable, begun
  )
  left["summary"]["seconds"] = {
    **seconds,
    "evaluating": time.monotonic() - started,
  }
  graph, _, _ = functional.split(network)
  best = functional.merge(graph, *jax.tree.map(jnp.asarray, fitted.numbers))
  loading.export(
    best,
    workdir.path / "export" / "model.safetensors",
    source.card() | images.card(config, data, evaluated),
  )
  of_test = predictions.of_logits(
    data, *outputs["test"], evaluated.temperature, plan.last, config.seed
  )
  predictions.write(workdir.path / "predictions.csv", [of_test])
  page.write(workdir.path, left, predictions.show(config, [of_test]))
  return workdir.finish(left)


def make_plan(config: ml_collections.ConfigDict) -> Plan:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config)
  configuration.one_of("metric", config.metric, METRICS)
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
  )


def _first_of(network: Network, layer: str) -> int:
  """Returns the place of a layer, or of the first layer of a stage."""
  names = network.layer_names
  inside = [i for i, name in enumerate(names) if name.startswith(f"{layer}.")]
  return inside[0] if inside else names.index(network.resolve(layer))


def _measurements(
  base: Mapping[str, Any],
  evaluated: evaluation.Evaluation,
  numbers: Mapping[str, float],
) -> list[results.Row]:
  """Returns the rows of results.json.

  Args:
    base: what all of them say.
    evaluated: what the network is worth.
    numbers: what else is known of it.
  """
  points = results.points(evaluated.points)
  return [
    *results.value_rows(base, evaluated.values),
    *(results.row(base, name, value) for name, value in numbers.items()),
    *results.point_rows(base, points, [base["seed"]]),
  ]


def _results(
  config: ml_collections.ConfigDict,
  plan: Plan,
  data: dataset.Dataset,
  source: loading.Source,
  network: Network,
  fitted: loop.Fitted,
  evaluated: evaluation.Evaluation,
  failures: Mapping[str, str],
  begun: results.Run,
) -> results.Results:
  """Turns numbers into the rows and the summary of results.json."""
  params, macs = zoo.count(network, config.data.image_size, head=True)
  base = {
    "network": plan.network,
    "weights": source.label,
    "tap": plan.last,
    "probe": "finetune",
    "seed": config.seed,
  }
  numbers = {
    "params": params,
    "macs": macs,
    "temperature": evaluated.temperature,
    "best_epoch": fitted.epoch,
  }
  measurements = _measurements(base, evaluated, numbers)
  epochs = loop.epochs_of(fitted.records)
  scores = {
    row["metric"]: row for row in measurements if row["split"] == "test"
  }
  read = dataset.what_was_read([data], failures)
  of_test = f"{read.rows['test']:,} images"
  if read.groups is not None:
    of_test = f"{read.groups['test']:,} groups"
  of_auroc = scores["auroc"]
  summary = results.Finetune(
    sentence="",
    rule=(
      f"The best of {len(epochs)} epochs by validation {config.metric};"
      " the test split was read once, after it was chosen."
    ),
    cut=plan.last,
    head=config.network.head,
    metric=config.metric,
    network=plan.network,
    weights=source.label,
    data=config.data.source,
    classes=data.names,
    multilabel=data.multilabel,
    prevalence=config.prevalence or None,
    taps=[plan.last],
    trained_layers=list(network.layer_names[plan.frozen :]),
    best_epoch=fitted.epoch,
    unfinished={
      "trainings": 1,
      "at_last_epoch": int(fitted.epoch == config.epochs),
    },
    epochs=results.epochs(epochs),
    temperature=evaluated.temperature,
    missed=results.missed(evaluated.missed),
    chance=evaluated.chance,
    confusion=results.confusion(evaluated),
    operating=results.points(evaluated.points),
    reliability=results.reliability(evaluated),
    curves=results.curves(evaluated),
    rows=read.rows,
    groups=read.groups,
    notes=[
      *read.notes,
      *source.notes,
      *fitted.notes,
      *sentences.of_guessing(of_auroc["value"], of_auroc["low"]),
    ],
    interval=(
      f"95 % percentile bootstrap over {of_test} of the test split,"
      f" {config.resamples:,} resamples"
    ),
    failures=len(failures),
    normalisation={"mean": list(source.mean), "std": list(source.std)},
    weights_sha256=source.sha256,
    seconds={},
    run=begun,
  )
  # A loss chooses well and says little.
  first = config.metric if METRICS[config.metric].higher else "auroc"
  told = first, "auroc" if first == "accuracy" else "accuracy"
  summary["sentence"] = sentences.of_finetune(summary, scores, params, told)
  return {"job": "finetune", "summary": summary, "measurements": measurements}
