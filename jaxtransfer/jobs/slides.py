"""Slides classified from the features of their tiles, encoders side by side.

The features of every encoder are pooled by a network that is trained for it, on
the same slides and the same folds by patient. What is trained of one encoder
with one pooling, on one fold, with one seed, is a unit: it resumes, it is done
once, and several processes that share a workdir divide the units among
themselves.

Source: the frozen stage of HistoTransfer (Sharma et al., arXiv 2106.07068), on
  attention pooling (Ilse et al., arXiv 1802.04712).
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import ml_collections
import numpy as np

from jaxtransfer import (
  configuration,
  errors,
  files,
  heatmaps,
  parallel,
  pooled,
  predictions,
  preview,
  results,
  trainings,
  tuning,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import buckets, dataset, pipeline, tiles
from jaxtransfer.extraction import encoders, passes, store
from jaxtransfer.measure import evaluation, metrics
from jaxtransfer.networks import pooling
from jaxtransfer.report import page, sentences
from jaxtransfer.training import bags as training_bags
from jaxtransfer.training import loop, optimisers

# A fold to test, one to validate, and the rest to train on.
_LEAST_FOLDS = 3
# Where features are that the run makes itself, with units of their own.
_ENCODED = "encoded"
# Encoders whose curves are drawn, the chosen one first.
_DRAWN = 5
# Of a row of the table, beside its scores.
_COSTS = ("params", "channels", "tiles", "training_seconds", "epochs")


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/slides.py makes it.
    workdir: a claimed directory; what is there already is not done again.

  Returns:
    The exit code: 0, or 1 where slides could not be read or trainings failed.

  Raises:
    UsageError: the config, the table or the features cannot be used.
    RunError: too many slides cannot be read, the disk is full, or no encoder
      has all its trainings.
    SystemExit: 143 after SIGTERM, once the state is saved.
  """
  poolings = make_plan(config)
  _check_features(config)
  together = max(1, config.batch_size // max(1, config.accumulate))
  devices = parallel.Devices(config.parallel, parallel.sharing(together))
  training_bags.check(config, devices)
  of_slides = heatmaps.Slides(config.data)
  if config.networks:
    extraction = _extraction(config, devices, workdir)
    if workdir.dry:
      return _preview_encoding(config, extraction, devices, workdir)
    workdir.begin(str(devices))
    extraction.run()
    config = config.copy_and_resolve_references()
    with config.unlocked():
      config.data.features = str(workdir.path / _ENCODED)
  divisions = dataset.open_divisions(config, workdir.path / "splits.json")
  bench = pooled.Bench(config, poolings, devices, divisions, workdir.path)
  if workdir.dry:
    return _preview(bench)
  begun = results.Run(**workdir.begin(str(devices)))
  dataset.save(workdir.path / "splits.json", divisions)
  print(f"{bench.told} on {devices}", flush=True)
  bench.check_features()
  bench.divisions = dataset.note_duplicates(
    bench.divisions, config, workdir.path / "duplicates.json", workdir.share
  )
  for note in bench.first.notes:
    print(note, flush=True)
  bench.settle()
  # Whoever comes first reads the test split and writes; the others wait.
  with files.lock(workdir.path / ".report.lock", wait=True):
    if workdir.finished:
      return workdir.report_failures()
    left, told = _report(bench, begun)
    predictions.write(workdir.path / "predictions.csv", told)
    page.write(workdir.path, left, views=_views(bench, of_slides, left))
    return workdir.finish(left)


def _views(
  bench: pooled.Bench, of_slides: heatmaps.Slides, left: results.Results
) -> Iterator[heatmaps.View]:
  """Returns tested slides of the chosen encoder with what its tiles scored."""
  config, summary = bench.config, cast(results.Slides, left["summary"])
  if not config.heatmaps or not config.tile_scores:
    return iter(())
  name = next(line["name"] for line in summary["table"] if line["chosen"])
  row = next(row for row in bench.rows if row.name == name)
  told = [bench.predicted(row, unit) for unit in row.of_seed(summary["seed"])]
  rows = np.concatenate([of.rows for of in told])
  chosen = heatmaps.choose(
    bench.bags.labels[rows],
    np.concatenate([of.probabilities for of in told]),
    config.heatmaps,
  )
  names = [bench.bags.names[i] for i in rows[chosen].tolist()]
  return heatmaps.views(bench.path, name, names, of_slides)


def _extraction(
  config: ml_collections.ConfigDict,
  devices: parallel.Devices,
  workdir: workdirs.Workdir,
) -> passes.Extraction:
  """Returns what encodes the slides' tiles with the networks of the config."""
  data = config.data.copy_and_resolve_references()
  with data.unlocked():
    data.source = data.slides or data.source
  networks = encoders.open_encoders(
    config.networks, config.taps, seed=config.seed, dtype=config.dtype
  )
  of = tiles.open_tiles(data, config.data.coords)
  for encoder in networks:
    encoder.network.check_size(of.size)
    for note in encoder.source.notes:
      print(note, flush=True)
  extraction = passes.Extraction(
    of,
    networks,
    devices,
    store.Settings(
      batch_size=config.topk.encode_batch_size, workers=config.data.workers
    ),
    workdir.path / _ENCODED,
  )
  extraction.store.look()
  return extraction


def _preview_encoding(
  config: ml_collections.ConfigDict,
  extraction: passes.Extraction,
  devices: parallel.Devices,
  workdir: workdirs.Workdir,
) -> int:
  """Tells how long the tiles take; the trainings depend on what comes out."""
  speed = preview.measure(extraction.sample(), extraction.compute())
  steps = sum(extraction.batches_of(packet) for packet in extraction.packets)
  width = sum(output.channels for output in extraction.outputs)
  work = [
    f"{extraction.tiles.count:,} tiles of {len(extraction.tiles.bags):,} slides"
    f" through {len(extraction.outputs)} encoders, on {devices}",
    "then the trainings, whose time is not in what follows; with the features"
    " at hand, data.features in place of networks, --dry_run has it",
  ]
  return preview.tell(
    config,
    workdir.path,
    [],
    work,
    speed,
    speed.of(steps),
    2.0 * width * extraction.tiles.count,
  )


def make_plan(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Checks what can be checked without opening anything.

  Returns:
    The poolings.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config, zero=("data.image_size",))
  configuration.positive(config, "seeds")
  configuration.one_of("metric", config.metric, metrics.OF_SCORES)
  configuration.one_of("epoch_metric", config.epoch_metric, metrics.METRICS)
  configuration.one_of("ties", config.ties, loop.TIES)
  if config.folds and config.folds < _LEAST_FOLDS:
    raise errors.UsageError(
      f"config.folds is {config.folds}; it must be 0, or 3 or more: one fold"
      " to test, one to validate, the rest to train"
    )
  names = tuple(filter(None, map(str.strip, config.pooling.name.split(","))))
  for name in names or ("",):
    configuration.one_of("pooling.name", name, pooling.POOLINGS)
  optimisers.check_range("data.cache", config.data.cache, least=0)
  widths = (*config.pooling.embedding, config.pooling.attention)
  if any(width != int(width) or width < 1 for width in widths):
    raise errors.UsageError(
      "config.pooling.embedding and config.pooling.attention are"
      f" {config.pooling.embedding} and {config.pooling.attention}; widths are"
      " whole numbers above 0"
    )
  errors.check_range("heatmaps", config.heatmaps, least=0, most=1000)
  for key in ("dropout", "attention_dropout"):
    share = config.pooling[key]
    optimisers.check_range(f"pooling.{key}", share, least=0, below=1)
  tuning.check(config, names)
  return tuple(dict.fromkeys(names))


def _check_features(config: ml_collections.ConfigDict) -> None:
  """Checks that it is said where features come from, and once."""
  if bool(config.networks) == bool(config.data.features):
    raise errors.UsageError(
      "give config.data.features, the features of the slides' tiles, or"
      " config.networks with config.data.coords, to make them here: one of the"
      " two"
    )
  if bool(config.networks) != bool(config.data.coords):
    raise errors.UsageError(
      f"config.networks is {config.networks!r}, and config.data.coords"
      f" {config.data.coords!r}: networks encode the tiles that coords name;"
      " give both or neither"
    )


def _preview(bench: pooled.Bench) -> int:
  """Tells what the run would do, take and leave, for `--dry_run`."""
  config = bench.config
  speed, seconds = preview.Speed(0, 0.0, preview.Time(0, 0), 0.0), None
  size = 0.0
  # Of another width an encoder has another program, and its own speed.
  for row in bench.rows:
    unit = row.units[0]
    training = bench.beginning(unit)
    kept = preview.bytes_of_training(training)
    judged = len(bench.data(unit).rows["val"])
    speed, once = preview.of_training(training, bench.devices, judged)
    count = len(row.units)
    times = preview.Time(
      once.low * count, once.high * count + speed.compiling * buckets.MOST
    )
    if row.top:
      # A step goes there and back through these tiles; then all go through.
      data = bench.data(unit)
      held = bench.bags.encoders[row.encoder].tiles
      tiles = held[np.concatenate([data.rows["val"], data.rows["test"]])].sum()
      share = tiles / row.top / config.topk.batch_size * count
      times = times + preview.Time(
        share * speed.computing.low / 3, share * speed.computing.high / 2
      )
      encoder = bench.bags.encoders[row.encoder]
      size += float(tiles) * encoder.channels * encoder.dtype.itemsize * count
    seconds = times if seconds is None else seconds + times
    size += 4 * training.trained_params * count + kept
    if config.tile_scores:
      tiles = bench.bags.encoders[row.encoder].tiles.sum()
      size += float(tiles) * 4 * (2 + len(bench.first.names))
  work = [
    f"{len(bench.units)} trainings of {config.epochs} epochs at most,"
    f" {bench.repeated} of each encoder and pooling, on {bench.devices}",
    *(
      f"{encoder.name}: {encoder.channels} features of"
      f" {encoder.tiles.mean():,.0f} tiles a slide, {encoder.tiles.max():,} at"
      " most"
      for encoder in bench.bags.encoders
    ),
    f"pooling {', '.join(bench.poolings)}",
  ]
  assert seconds is not None
  return preview.tell(
    config, bench.path, bench.divisions, work, speed, seconds, size
  )


def _report(
  bench: pooled.Bench, begun: results.Run
) -> tuple[results.Results, list[predictions.Predictions]]:
  """Reads the test split, fills results.json, and hands over what is best."""
  config, started = bench.config, time.monotonic()
  rows = [
    row
    for row in bench.rows
    if all(bench.kept.state(unit) == "done" for unit in row.units)
  ]
  if not rows:
    raise errors.RunError(
      f"every encoder lacks a training; see {bench.path / 'units'}: failed.json"
      " there says why; remove it to try again"
    )
  for row in rows:
    for unit in row.units:
      bench.outputs(unit, "test")
  bench.unreadable |= trainings.unreadable(bench.kept)
  ranked = sorted(
    rows, key=lambda row: -np.nan_to_num(bench.value(row), nan=-1)
  )
  chosen = ranked[0]
  table, measurements = _table(bench, rows, chosen)
  seeds = {row.name: bench.best_seed(row) for row in rows}
  evaluations = {
    row.name: bench.evaluated(row, seeds[row.name]) for row in ranked[:_DRAWN]
  }
  evaluated = evaluations[chosen.name]
  exported = bench.export(chosen, seeds[chosen.name], evaluated)
  if config.tile_scores:
    for row in rows:
      bench.write_tiles(row, seeds[row.name])
  if bench.unreadable:
    pipeline.write_failures(
      bench.path / "failures.csv", sorted(bench.unreadable.items())
    )
  read = dataset.what_was_read(bench.divisions, bench.unreadable)
  records = [of for (of,) in bench.kept.records("done.json").values()]
  units = "slides" if bench.bags.groups is None else "groups"
  drawn = ", each fold's drawn on their own" if config.folds else ""
  last = ", of equally good ones the last" * (config.ties == "last")
  summary = results.Slides(
    sentence="",
    rule=(
      "Every training keeps its best epoch by validation"
      f" {results.metric_name(config.epoch_metric)}{last}; the best encoder is"
      f" the one with the highest mean validation"
      f" {results.metric_name(config.metric)}. No slide had a part in the"
      " training, the epoch or the temperature of the network that tests it."
    ),
    unit=bench.bags.unit,
    metric=config.metric,
    epoch_metric=config.epoch_metric,
    data=config.data.source,
    classes=bench.first.names,
    multilabel=False,
    prevalence=config.prevalence or None,
    repeats=bench.repeated,
    rows=read.rows,
    groups=read.groups,
    notes=[*read.notes, *bench.notes()],
    interval=(
      f"95 % percentile bootstrap over the {units} of the test split{drawn},"
      f" {config.resamples:,} resamples, of the mean over {bench.repeated}"
    ),
    failures=len(bench.unreadable),
    table=table,
    unfinished={
      "trainings": len(records),
      "at_last_epoch": sum(r["best_epoch"] == config.epochs for r in records)
      if config.patience
      else 0,
    },
    learning=[
      results.Learning(
        name=chosen.name,
        epochs=[results.epochs(bench.epochs(unit)) for unit in chosen.units],
      )
    ],
    exported=exported,
    seed=seeds[chosen.name],
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
  summary["sentence"] = sentences.of_slides(summary)
  told = [bench.predicted(row, unit) for row in rows for unit in row.units]
  left = {"job": "slides", "summary": summary, "measurements": measurements}
  return results.Results(**left), told


def _table(
  bench: pooled.Bench, rows: Sequence[pooled.Row], chosen: pooled.Row
) -> tuple[list[results.Pooled], list[results.Row]]:
  """Returns a line for every encoder and pooling, and its measurements."""
  config = bench.config
  read = evaluation.read_by_all(
    [
      (number, bench.outputs(unit, "test")[0])
      for row in rows
      for number, unit in enumerate(row.units)
    ]
  )
  tested = {row.name: bench.tested(row, read) for row in rows}
  patients = {row.name: bench.tested_patients(row, read) for row in rows}
  table, measurements = [], []
  for row in rows:
    encoder = bench.bags.encoders[row.encoder]
    records = [bench.kept.done(unit) for unit in row.units]
    of_row, of_patients = tested[row.name], patients[row.name]
    points = results.points(of_row.points)
    base = bench.base(row)
    line: dict[str, Any] = {
      "name": row.name,
      "encoder": encoder.name,
      "pooling": row.units[0].pooling,
      "top": row.top,
      **{key: encoder.attributes.get(key) for key in ("network", "weights")},
      "tap": encoder.attributes.get("cut"),
      "channels": encoder.channels,
      "tiles": float(encoder.tiles.mean()),
      "params": records[0]["trained_params"],
      "training_seconds": float(np.mean([r["seconds"] for r in records])),
      "epochs": float(np.mean([r["epoch"] for r in records])),
      "val": files.finite(bench.value(row)),
      "test": {n: results.score(s) for n, s in of_row.scores.items()},
      "patients": None,
      "patients_tested": None,
      "operating": points,
      "missed": results.missed(of_row.missed),
      "chance": of_row.chance,
      "tests": config.seeds,
      "chosen": row is chosen,
      "against_chosen": None,
      "against_first": None,
    }
    of_test = {**base, "split": "test"}
    for name, score in of_row.scores.items():
      measurements += results.score_rows(of_test, name, score, of_row.images)
    if of_patients is not None:
      line["patients_tested"] = of_patients.images.distinct
      line["patients"] = {
        name: results.score(score) for name, score in of_patients.scores.items()
      }
      for name, score in of_patients.scores.items():
        measurements += results.score_rows(
          of_test, f"{name}:patients", score, of_patients.images
        )
    for key, other in (("chosen", chosen), ("first", rows[0])):
      if other is row:
        continue
      differences = {
        name: score.above(tested[other.name].scores[name])
        for name, score in of_row.scores.items()
      }
      line[f"against_{key}"] = {
        name: results.difference(of) for name, of in differences.items()
      }
      about = {**of_test, "n": of_row.images.distinct}
      measurements += [
        results.row(about, f"{name}:against_{key}", of.value, of[1:])
        for name, of in differences.items()
      ]
    values = bench.values(row)
    about = {**base, "split": "val"}
    measurements.append(results.row(about, config.metric, bench.value(row)))
    measurements += [
      results.row({**about, "seed": number}, config.metric, value)
      for number, value in enumerate(values)
    ]
    measurements += results.point_rows(base, points, range(len(row.units)))
    measurements += [results.row(base, name, line[name]) for name in _COSTS]
    table.append(results.Pooled(**line))
  return table, measurements
