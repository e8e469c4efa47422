"""A finished run's network on new images: what it says, how good it is there.

Nothing is fitted or chosen: network, input, temperature and thresholds are
those of the run. Where labels are known this is its external validation.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxtransfer import (
  configuration,
  errors,
  inference,
  parallel,
  predictions,
  preview,
  results,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import images as imaging
from jaxtransfer.data import labels, names, pipeline, sources
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.measure import evaluation, operating, scoring
from jaxtransfer.report import page, sentences
from jaxtransfer.weights import loading

# Of the card that an export has, what a network cannot be used without.
_NEEDED = ("network", "until", "classes", "multilabel", "image_size", "resize")


@dataclasses.dataclass(frozen=True)
class Exported:
  """A network that a run handed over.

  Attributes:
    path: of its safetensors file.
    card: what `loading.export` and `training.images.card` say of it.
    run: the workdir of the run; None where only its export is there.
  """

  path: pathlib.Path
  card: dict[str, Any]
  run: pathlib.Path | None

  @property
  def thresholds(self) -> list[evaluation.Chosen]:
    """Those that the run chose on its validation split."""
    points = self.card.get("operating_points", {}).get("points", ())
    return [
      evaluation.Chosen(
        point["class"],
        point.get("name", point["rule"]),
        float("nan") if point["threshold"] is None else point["threshold"],
        operating.Rates(
          *(
            float("nan") if value is None else value
            for value in (point["val"][r] for r in operating.Rates._fields)
          )
        ),
      )
      for point in points
    ]

  def own(self, metric: str) -> float | None:
    """Returns what the run measured on its own test split."""
    return self.card.get("metrics", {}).get(f"test:{metric}")


def find(run: str) -> Exported:
  """Finds what a finished run handed over.

  Args:
    run: its workdir, the folder `export`, or the file in it.

  Raises:
    UsageError: there is none, or it cannot be used here.
  """
  if not run:
    raise errors.UsageError(
      "config.run is empty; give the workdir of a finished finetune or"
      " truncate, or its export folder"
    )
  given = pathlib.Path(run).expanduser()
  if not given.exists():
    raise errors.UsageError(f"config.run: {run} does not exist")
  places = [given / "export" / "model.safetensors", given / "model.safetensors"]
  path = next((p for p in places if p.is_file()), given)
  if not path.is_file():
    raise errors.UsageError(f"config.run: {run} {_why_nothing(given)}")
  card = loading.read_card(path)
  if missing := [key for key in _NEEDED if key not in card]:
    raise errors.UsageError(
      f"config.run: {path} says nothing of {', '.join(missing)}; it is no"
      " network that finetune or truncate exported"
    )
  if card["resize"] != imaging.resize_card(card["image_size"]):
    raise errors.UsageError(
      f"config.run: {path} was trained on images resized otherwise"
      f" ({card['resize']}); this version cannot do it"
    )
  home = path.parent.parent
  return Exported(path, card, home if (home / "splits.json").exists() else None)


def _why_nothing(workdir: pathlib.Path) -> str:
  """Says why a folder holds no network."""
  if not (workdir / "config.json").exists():
    return "is no workdir of a finished run, and no export folder"
  if not (workdir / "results.json").exists():
    return "is not finished; run its command again first"
  text = (workdir / "config.json").read_text(encoding="utf-8")
  job = json.loads(text)["config"]["job"]
  return f"is of the job {job}, which hands over no network"


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/predict.py makes it.
    workdir: a claimed directory.

  Returns:
    The exit code: 0, or 1 where images could not be read.

  Raises:
    UsageError: the config, the run or the source cannot be used.
    RunError: too many images cannot be read.
  """
  configuration.check(config)
  configuration.positive(config, "resamples")
  errors.check_range("prevalence", config.prevalence, least=0, below=1)
  exported = find(config.run)
  card = exported.card
  devices = parallel.Devices(config.parallel)
  seen = config.copy_and_resolve_references()
  with seen.unlocked():
    seen.data.image_size = card["image_size"]
  data = _open(seen, exported)
  source = loading.resolve_weights(card["network"], exported.path)
  network = loading.create_model(
    card["network"],
    until=card["until"],
    keep_head=True,
    weights=source,
    dtype=jnp.dtype(config.dtype),
  )
  compute = inference.place(
    {"": network}, inference.logits, devices, source.mean, source.std
  )
  rows = data.rows["test"]
  size = devices.batch_size(config.batch_size)
  batches = pipeline.Batches(
    data.examples,
    rows,
    image_size=card["image_size"],
    batch_size=size,
    workers=config.data.workers,
    shard=devices.shard,
  )
  what = f"{card['network']} cut after {card['until']}"
  if workdir.dry:
    speed = preview.measure(
      batches, lambda batch: compute(devices.put(batch["image"]))
    )
    return preview.tell(
      config,
      workdir.path,
      [data],
      [f"1 pass of {what} over {len(rows):,} images, on {devices}"],
      speed,
      speed.of(-(-len(rows) // size)),
      # A line of predictions.csv, and the page.
      len(rows) * (80 + 20 * len(data.names)) + 2e6,
    )
  begun = results.Run(**workdir.begin(str(devices)))
  print(f"{len(rows):,} images; {what}, of {exported.path}", flush=True)
  for note in data.notes:
    print(note, flush=True)
  started = time.monotonic()
  with batches:
    read, of_networks = inference.read(inference.run(compute, batches, devices))
    unreadable = sorted(batches.failures)
  pipeline.too_many(unreadable, len(rows), config.data.max_failures)
  if unreadable:
    pipeline.write_failures(workdir.path / "failures.csv", unreadable)
  logits = of_networks[""]
  if not np.isfinite(logits).all():
    raise errors.RunError(
      f"{exported.path}: its outputs are no numbers; the file is damaged, or"
      f" config.dtype={config.dtype} does not hold them"
    )
  seconds = {"predicting": time.monotonic() - started}
  of_new = predictions.of_logits(
    data, read, logits, card["temperature"], card["until"], None
  )
  left = _results(
    config, exported, source, data, of_new, logits, dict(unreadable), begun
  )
  left["summary"]["seconds"] = seconds
  predictions.write(workdir.path / "predictions.csv", [of_new])
  shown = predictions.show(seen, [of_new], "images")
  page.write(workdir.path, left, shown)
  return workdir.finish(left)


def _open(config: ml_collections.ConfigDict, exported: Exported) -> Dataset:
  """Opens the new images, with the labels that are known."""
  card = exported.card
  examples = sources.open_source(config.data, known=card["classes"])
  try:
    classes, targets = labels.read_targets(
      examples.classes, card["multilabel"], card["classes"]
    )
  except errors.UsageError as e:
    raise errors.UsageError(f"{config.data.source}: {e}") from None
  rows = np.arange(len(examples))
  notes = list(examples.notes)
  unknown = int(np.isnan(targets[examples.labels]).all(1).sum())
  if 0 < unknown < len(examples):
    notes.append(
      f"{unknown:,} of {len(examples):,} images have no label: they are"
      " predicted, and not scored"
    )
  notes += _met_before(exported, examples)
  return Dataset(
    examples,
    {"test": rows},
    classes,
    targets,
    card["multilabel"],
    notes=notes,
  )


def _met_before(exported: Exported, examples: sources.Examples) -> list[str]:
  """Notes images and groups that the network was trained or chosen on."""
  if exported.run is None:
    return []
  text = (exported.run / "splits.json").read_text(encoding="utf-8")
  stored = json.loads(text)
  used = [
    row
    for split, of in stored.items()
    if split.startswith(("train", "val"))
    for row in of
  ]
  groups = (stored.get("columns") or {}).get("group")
  known = {stored["names"][row] for row in used}
  notes = []
  if both := [name for name in examples.names if name in known]:
    notes.append(
      f"{len(both):,} images have the name of one that the run trained or"
      f" validated on ({names.shown(both)}): where they are the same, the"
      " scores flatter"
    )
  if groups and examples.groups is not None:
    of_run = {groups["values"][groups["rows"][row]] for row in used}
    if shared := sorted(set(examples.groups) & of_run):
      notes.append(
        f"{len(shared):,} groups have the name of one that the run trained or"
        f" validated on ({names.shown(shared)}): where they are the same"
        " patients, the scores flatter"
      )
  return notes


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
  exported: Exported,
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
  config: ml_collections.ConfigDict, exported: Exported
) -> float | None:
  of_run = exported.card.get("operating_points", {}).get("prevalence")
  return config.prevalence or of_run


def _results(
  config: ml_collections.ConfigDict,
  exported: Exported,
  source: loading.Source,
  data: Dataset,
  of_new: predictions.Predictions,
  logits: np.ndarray,
  failures: Mapping[str, str],
  begun: results.Run,
) -> results.Results:
  """Turns what was said, and what is true, into rows and a summary."""
  card = exported.card
  evaluated, labelled = _evaluate(config, exported, of_new, logits)
  base = {
    "network": card["network"],
    "weights": str(card.get("weights", "")),
    "tap": card["until"],
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
  of_what = f"{len(labelled):,} images"
  if groups is not None:
    of_what = f"{len(set(groups)):,} groups"
  all_groups = data.groups_of(of_new.rows)
  summary = results.Predict(
    sentence="",
    rule=(
      "Network, input, temperature and thresholds are those of the run; nothing"
      " was fitted or chosen on these images."
    ),
    cut=card["until"],
    metric="auroc",
    network=card["network"],
    weights=str(card.get("weights", "")),
    data=config.data.source,
    classes=data.names,
    taps=[card["until"]],
    rows={"read": len(of_new.rows), "labelled": len(labelled)},
    groups=None if all_groups is None else {"read": len(set(all_groups))},
    notes=[*data.notes, *source.notes],
    interval="",
    failures=len(failures),
    normalisation={"mean": list(source.mean), "std": list(source.std)},
    weights_sha256=source.sha256,
    seconds={},
    run=begun,
    multilabel=data.multilabel,
    used=str(exported.path),
    image_size=card["image_size"],
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
