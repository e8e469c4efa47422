"""A finished run's network on something new: what it says, how good it is.

Nothing is fitted or chosen: network, input, temperature and thresholds are
those of the run. Where labels are known this is its external validation.
"""

import time
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from jaxtransfer import (
  applied,
  configuration,
  errors,
  exports,
  parallel,
  predictions,
  preview,
  results,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import pipeline
from jaxtransfer.measure import evaluation, scoring
from jaxtransfer.report import page, sentences


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/predict.py makes it.
    workdir: a claimed directory.

  Returns:
    The exit code: 0, or 1 where something could not be read.

  Raises:
    UsageError: the config, the run or the source cannot be used.
    RunError: too much cannot be read.
  """
  configuration.check(config)
  configuration.positive(config, "resamples")
  errors.check_range("prevalence", config.prevalence, least=0, below=1)
  errors.check_range("heatmaps", config.heatmaps, least=0, most=1000)
  exported = exports.find(config.run)
  devices = parallel.Devices(config.parallel)
  if exported.of_slides:
    of = applied.Slides(config, exported, devices, workdir.path)
  else:
    of = applied.Images(config, exported, devices)
  if workdir.dry:
    speed, seconds, size, work = of.preview()
    divisions = [] if of.later else [of.data]
    return preview.tell(
      config, workdir.path, divisions, work, speed, seconds, size
    )
  begun = results.Run(**workdir.begin(str(devices)))
  print(f"{of.what}, of {exported.path}", flush=True)
  started = time.monotonic()
  said = of.predict()
  count = len(said.rows) + len(said.failures)
  failures = list(said.failures.items())
  pipeline.too_many(failures, count, config.data.max_failures, of.unit)
  if failures:
    pipeline.write_failures(workdir.path / "failures.csv", failures)
  for note in [*of.data.notes, *of.notes]:
    print(note, flush=True)
  if not np.isfinite(said.logits).all():
    raise errors.RunError(
      f"{exported.path}: its outputs are no numbers; the file is damaged, or"
      f" config.dtype={config.dtype} does not hold them"
    )
  seconds_of = {"predicting": time.monotonic() - started}
  of_new = predictions.of_logits(
    of.data,
    said.rows,
    said.logits,
    exported.card["temperature"],
    _tap(exported),
    None,
  )
  left = _results(config, exported, of, of_new, said, begun)
  left["summary"]["seconds"] = seconds_of
  predictions.write(workdir.path / "predictions.csv", [of_new])
  page.write(workdir.path, left, **of.show(of_new))
  return workdir.finish(left)


def _tap(exported: exports.Exported) -> str:
  """Returns where the network is cut, or what encoder it reads."""
  card = exported.card
  return card["pooled"] if exported.of_slides else card["until"]


def _called(of: predictions.Predictions) -> list[results.Called]:
  """Counts how often each class is said."""
  if of.data.multilabel:
    counts = (of.probabilities > 0.5).sum(0)
  else:
    counts = np.bincount(
      of.probabilities.argmax(1), minlength=len(of.data.names)
    )
  return [
    results.Called(name=name, images=int(count), probability=float(mean))
    for name, count, mean in zip(
      of.data.names, counts, of.probabilities.mean(0), strict=True
    )
  ]


def _evaluate(
  config: ml_collections.ConfigDict,
  exported: exports.Exported,
  of: predictions.Predictions,
  logits: np.ndarray,
) -> tuple[evaluation.Evaluation | None, np.ndarray]:
  """Scores the images whose labels are known.

  Returns:
    None where there are none, and their rows.
  """
  data = of.data
  known = ~np.isnan(data.targets_of(of.rows)).all(1)
  rows = of.rows[known]
  if not len(rows):
    return None, rows
  classes = scoring.Classes(
    data.names, data.multilabel, np.ones(len(data.names), np.float32)
  )
  test = scoring.Outputs(
    classes,
    rows,
    data.targets_of(rows),
    logits[known],
    data.resample(rows, config.resamples, config.seed),
  )
  chosen = [of for of in exported.thresholds if of.name in data.names]
  return (
    evaluation.validate(
      test,
      exported.card["temperature"],
      chosen,
      _prevalence(config, exported),
    ),
    rows,
  )


def _prevalence(
  config: ml_collections.ConfigDict, exported: exports.Exported
) -> float | None:
  of_run = exported.card.get("operating_points", {}).get("prevalence")
  return config.prevalence or of_run


def _results(
  config: ml_collections.ConfigDict,
  exported: exports.Exported,
  of: applied.Images | applied.Slides,
  of_new: predictions.Predictions,
  said: applied.Said,
  begun: results.Run,
) -> results.Results:
  """Turns what was said, and what is true, into rows and a summary."""
  card, data = exported.card, of.data
  evaluated, labelled = _evaluate(config, exported, of_new, said.logits)
  encoder: Mapping[str, Any] = card["encoder"] if exported.of_slides else card
  base = {
    "network": encoder.get("network") or encoder.get("name"),
    "weights": str(encoder.get("weights", "")),
    "tap": _tap(exported),
    "probe": "predict",
  }
  called = _called(of_new)
  rows = [
    results.row(
      {**base, "split": "test", "n": len(of_new.rows)},
      f"{name}:{of['name']}",
      value,
    )
    for of in called
    for name, value in (
      ("images", of["images"]),
      ("probability", of["probability"]),
    )
  ]
  points: list[results.Point] = []
  if evaluated is not None:
    points = results.points(evaluated.points)
    rows += results.value_rows(base, evaluated.values)
    rows += results.point_rows(base, points, [0])
  groups = data.groups_of(labelled)
  of_what = f"{len(labelled):,} {of.unit}"
  if groups is not None:
    of_what = f"{len(set(groups)):,} groups"
  all_groups = data.groups_of(of_new.rows)
  summary = results.Predict(
    sentence="",
    rule=(
      "Network, input, temperature and thresholds are those of the run; nothing"
      f" was fitted or chosen on these {of.unit}."
    ),
    unit=of.unit,
    cut=base["tap"],
    metric="auroc",
    network=str(base["network"]),
    weights=base["weights"],
    data=config.data.source or config.data.features,
    classes=data.names,
    taps=[base["tap"]],
    rows={"read": len(of_new.rows), "labelled": len(labelled)},
    groups=None if all_groups is None else {"read": len(set(all_groups))},
    notes=[*data.notes, *of.notes],
    interval="",
    failures=len(said.failures),
    normalisation={"mean": list(of.mean), "std": list(of.std)},
    weights_sha256=str(encoder.get("weights_sha256", "")),
    seconds={},
    run=begun,
    multilabel=data.multilabel,
    used=str(exported.path),
    image_size=encoder.get("image_size"),
    temperature=card["temperature"],
    own_test={
      name: exported.own(name)
      for name in results.METRIC_WORDS
      if exported.own(name) is not None
    },
    called=called,
    labelled=len(labelled),
    prevalence=_prevalence(config, exported),
    missed=[],
    chance=None,
    confusion=None,
    operating=points,
    reliability=None,
    curves=None,
  )
  if evaluated is not None:
    summary["interval"] = (
      f"95 % percentile bootstrap over the {of_what} with labels,"
      f" {config.resamples:,} resamples"
    )
    summary["missed"] = results.missed(evaluated.missed)
    summary["chance"] = evaluated.chance
    summary["confusion"] = results.confusion(evaluated)
    summary["reliability"] = results.reliability(evaluated)
    summary["curves"] = results.curves(evaluated)
  scores = {row["metric"]: row for row in rows if row["split"] == "test"}
  summary["sentence"] = sentences.of_predict(summary, scores)
  return {"job": "predict", "summary": summary, "measurements": rows}
