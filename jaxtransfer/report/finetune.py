"""What the page of the `finetune` job shows: its figures and its tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxtransfer.report import figures, tables
from jaxtransfer.report.markup import Content, Html, Picture, Section
from jaxtransfer.report.tables import Measurements

_METRICS = {
  "accuracy": "accuracy",
  "balanced_accuracy": "balanced accuracy",
  "auroc": "AUROC",
  "auprc": "AUPRC",
  "loss": "loss",
  "ece": "calibration error",
  "brier": "Brier score",
}
_LONGEST_NAME = 18
_BLUES = LinearSegmentedColormap.from_list("blues", ["white", figures.BLUE])


def content(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  """Returns the figures and the tables of a `finetune` run, with their words.

  Args:
    summary: `summary` of the job's `results.json`.
    measurements: its measurements.

  Returns:
    The page's middle; a figure that nothing was measured for is left out.
  """
  drawn = {
    "training": training(summary),
    "confusion": confusion(summary),
    "reliability": reliability(summary),
  }

  def picture(name: str, title: str, caption: str) -> Picture | None:
    figure = drawn[name]
    return figure and Picture(name, figure, title, caption)

  metric = _METRICS.get(summary.get("metric"), str(summary.get("metric")))
  sections = [
    Section("How good it is", [_metric_table(summary, measurements)]),
    Section(
      "How it was trained",
      [
        picture(
          "training",
          "Loss and scores of every epoch",
          "The dashed line marks the epoch that is kept: the best by"
          f" validation {metric}. The training loss is the one made small, on"
          " augmented images; with label smoothing it does not compare with"
          " the other.",
        )
      ],
    ),
    Section(
      "Where it is wrong",
      [
        picture(
          "confusion",
          "Test images by true and predicted class",
          "Rows are the truth. The colour is the share of the row, the number"
          " counts images.",
        ),
        _class_table(summary, measurements),
      ],
    ),
    Section(
      "What its probabilities mean",
      [
        picture(
          "reliability",
          "Accuracy against confidence on the test split",
          "On the dotted line a network is right as often as it says. Below it"
          " is too sure of itself. Dividing the logits by the temperature,"
          f" {tables.finite(summary.get('temperature')):.2f}, fitted on the"
          " validation split, gives the second line. Larger dots hold more"
          " images.",
        )
      ],
    ),
  ]
  kept = [
    Section(s.heading, [block for block in s.blocks if block]) for s in sections
  ]
  return Content(
    f"{summary.get('network')} cut after {summary.get('cut')},"
    f" fine-tuned on {summary.get('data')}",
    [section for section in kept if section.blocks],
  )


def training(summary: Mapping[str, Any]) -> Figure | None:
  """Draws losses and validation scores against the epoch.

  Args:
    summary: the job's summary.

  Returns:
    The figure, or None without an epoch.
  """
  epochs = summary.get("epochs") or []
  if not epochs:
    return None
  x = [record["epoch"] for record in epochs]

  def of(name: str) -> list[float]:
    return [tables.finite(record["val"].get(name)) for record in epochs]

  marker = "o" if len(x) < 30 else None
  shown = {"marker": marker, "markersize": 3}
  with figures.style():
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    train = [tables.finite(record["loss"]) for record in epochs]
    losses.plot(x, train, color=figures.GREY, label="training", **shown)
    losses.plot(x, of("loss"), color=figures.BLUE, label="validation", **shown)
    losses.set_ylabel("loss")
    for name, colour in (
      ("auroc", figures.BLUE),
      ("auprc", figures.VERMILLION),
      ("balanced_accuracy", figures.GREEN),
    ):
      scores.plot(x, of(name), color=colour, label=_METRICS[name], **shown)
    scores.set_ylabel("validation score")
    scores.set_xlabel("epoch")
    scores.xaxis.get_major_locator().set_params(integer=True)
    for axis in (losses, scores):
      if summary.get("best_epoch"):
        axis.axvline(
          summary["best_epoch"], color=figures.INK, linestyle="--", linewidth=1
        )
      axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def confusion(summary: Mapping[str, Any]) -> Figure | None:
  """Draws the table of confusions.

  Args:
    summary: the job's summary.

  Returns:
    The figure, or None where there is no such table.
  """
  table = np.array(summary.get("confusion") or [])
  if not table.size:
    return None
  names = [_short(name) for name in summary.get("classes") or []]
  shares = table / np.maximum(table.sum(1, keepdims=True), 1)
  side = 1.6 + 0.42 * len(names)
  with figures.style():
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = figure.subplots()
    axis.grid(False)
    axis.imshow(shares, cmap=_BLUES, vmin=0, vmax=1)
    ticks = range(len(names))
    axis.set_xticks(ticks, names, rotation=45, ha="right")
    axis.set_yticks(ticks, names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("truth")
    for (i, j), count in np.ndenumerate(table):
      if count:
        colour = "white" if shares[i, j] > 0.6 else figures.INK
        axis.text(
          j, i, f"{count:,}", ha="center", va="center", color=colour, fontsize=8
        )
  return figure


def reliability(summary: Mapping[str, Any]) -> Figure | None:
  """Draws accuracy against confidence, before and after the temperature.

  Args:
    summary: the job's summary.

  Returns:
    The figure, or None where it was not measured.
  """
  diagrams = summary.get("reliability") or {}
  if not diagrams:
    return None
  with figures.style():
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=figures.INK, linestyle=":", linewidth=1)
    for key, label, colour in (
      ("before", "as trained", figures.VERMILLION),
      ("after", "with the temperature", figures.BLUE),
    ):
      diagram = diagrams.get(key) or {}
      points = [
        tuple(map(tables.finite, point))
        for point in zip(
          diagram.get("confidence", ()),
          diagram.get("accuracy", ()),
          diagram.get("count", ()),
          strict=True,
        )
        if point[2]
      ]
      if points:
        confidence, accuracy, count = np.array(points).T
        axis.plot(confidence, accuracy, color=colour, label=label)
        axis.scatter(
          confidence, accuracy, s=8 + 60 * count / count.sum(), color=colour
        )
    axis.set_xlabel("confidence")
    axis.set_ylabel("accuracy")
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.legend(loc="upper left")
  return figure


def _metric_table(
  summary: Mapping[str, Any], measurements: Measurements
) -> Html:
  rows = []
  for name, word in _METRICS.items():
    cells = [
      _cell(measurements, split, metric)
      for split, metric in (
        ("test", name),
        ("val", name),
        ("test", f"{name}:calibrated"),
      )
    ]
    rows.append([word, *cells])
  epoch = summary.get("best_epoch")
  return tables.table(
    f"The network of epoch {epoch}. Brackets hold intervals;"
    " the last column is with the temperature, where that matters.",
    ["", "test", "validation", "test, with temperature"],
    rows,
  )


def _class_table(
  summary: Mapping[str, Any], measurements: Measurements
) -> Html | None:
  classes = summary.get("classes") or []
  rows = [
    [
      str(name),
      *(_cell(measurements, "test", f"{m}:{name}") for m in ("auroc", "auprc")),
    ]
    for name in classes
  ]
  rows = [row for row in rows if any(cell != tables.ABSENT for cell in row[1:])]
  if not rows:
    return None
  return tables.table(
    "Every class against the rest, on the test split.",
    ["class", "AUROC", "AUPRC"],
    rows,
  )


def _cell(measurements: Measurements, split: str, metric: str) -> str:
  for row in measurements.rows:
    if row.get("split") == split and row.get("metric") == metric:
      numbers = (tables.finite(row.get(k)) for k in ("value", "low", "high"))
      return tables.with_interval(*numbers)
  return tables.ABSENT


def _short(name: str) -> str:
  name = str(name)
  if len(name) <= _LONGEST_NAME:
    return name
  return f"{name[: _LONGEST_NAME - 1]}…"
