"""What the page of the `finetune` job shows: its figures and its tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from jaxtransfer import results
from jaxtransfer.report import figures, fonts, operating, tables
from jaxtransfer.report.markup import Content, Html, Picture, Section
from jaxtransfer.report.tables import Measurements

_LONGEST_NAME = 18
_BLUES = LinearSegmentedColormap.from_list("blues", ["white", figures.BLUE])


CONFUSION_WORDS = (
  "Test images by true and predicted class",
  "Rows are the truth. The colour is the share of the row, the number counts"
  " images.",
)


def ranking_words(summary: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the title and the caption of `ranking`.

  Args:
    summary: the job's summary.
  """
  words = (
    "Left, the share of a class that is found against the share of the rest"
    " that is taken for it; the dotted line is chance. Right, how much of what"
    " is called the class is of it, for each share found: this depends on how"
    " frequent the class is."
  )
  if len(summary.get("classes") or ()) > 2:
    words += " Mean over the classes, each against the rest."
  if interval := summary.get("interval"):
    words += f" Bands: {interval}."
  return "ROC and precision-recall curves on the test split", words


def reliability_words(summary: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the title and the caption of `reliability`.

  Args:
    summary: the job's summary.
  """
  temperature = tables.finite(summary.get("temperature"))
  number = f" {temperature:.2f}," if math.isfinite(temperature) else ""
  return (
    "Accuracy against confidence on the test split",
    "On the dotted line a network is right as often as it says. Below it is"
    f" too sure of itself. Dividing the logits by the temperature,{number}"
    " fitted on the validation split, gives the second line. Larger dots hold"
    f" more {summary.get('unit') or 'images'}.",
  )


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
    "ranking": ranking([("", summary.get("curves") or {})]),
    "reliability": reliability(summary),
  }

  def picture(name: str, title: str, caption: str) -> Picture | None:
    figure = drawn[name]
    return None if figure is None else Picture(name, figure, title, caption)

  metric = results.metric_name(summary.get("metric"))
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
      "How it ranks",
      [picture("ranking", *ranking_words(summary))],
    ),
    Section(
      "Where it is wrong",
      [
        picture("confusion", *CONFUSION_WORDS),
        confusion_key(summary),
        class_table(summary, measurements),
      ],
    ),
    Section(
      "At a threshold",
      [operating.table(summary, [("", summary.get("operating") or ())])],
    ),
    Section(
      "What its probabilities mean",
      [
        picture("reliability", *reliability_words(summary)),
      ],
    ),
  ]
  return Content(
    f"{summary.get('network')} cut after {summary.get('cut')},"
    f" fine-tuned on {summary.get('data')}",
    sections,
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
      scores.plot(
        x, of(name), color=colour, label=results.METRIC_WORDS[name], **shown
      )
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
  labels = fonts.labels(summary.get("classes") or [])
  names = list(map(_short, labels.words))
  shares = table / np.maximum(table.sum(1, keepdims=True), 1)
  side = 1.6 + 0.42 * len(names)
  with figures.style():
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = figure.subplots()
    axis.grid(False)
    axis.imshow(shares, cmap=_BLUES, vmin=0, vmax=1)
    ticks = range(len(names))
    font = {"fontfamily": labels.families}
    slant: dict[str, Any] = {}
    if not labels.numbered:
      slant = {"rotation": 45, "ha": "right"}
    axis.set_xticks(ticks, names, **slant, **font)
    axis.set_yticks(ticks, names, **font)
    axis.set_xlabel("predicted")
    axis.set_ylabel("truth")
    for (i, j), count in np.ndenumerate(table):
      if count:
        colour = "white" if shares[i, j] > 0.6 else figures.INK
        axis.text(
          j, i, f"{count:,}", ha="center", va="center", color=colour, fontsize=8
        )
  return figure


def confusion_key(summary: Mapping[str, Any]) -> Html | None:
  """Returns the classes of which `confusion` shows only the numbers.

  Args:
    summary: the job's summary.
  """
  if not summary.get("confusion"):
    return None
  return fonts.key(summary.get("classes") or [])


def ranking(
  networks: Sequence[tuple[str, Mapping[str, Any]]],
) -> Figure | None:
  """Draws ROC and precision-recall curves with their bands.

  Args:
    networks: names and curves, each "roc" and "precision_recall" with lists x,
      y, low and high, as results.json has them; the most important first.

  Returns:
    The figure, or None where there is no curve.
  """
  kinds = ("roc", "precision_recall")
  drawn = [
    (name, {kind: _points((curves or {}).get(kind)) for kind in kinds})
    for name, curves in networks
  ]
  drawn = [
    (name, points)
    for name, points in drawn
    if any(np.isfinite(p[:, 1]).any() for p in points.values())
  ]
  if not drawn:
    return None
  # Long names stand below each other.
  below = max(len(name) for name, _ in drawn) > _LONGEST_NAME
  height = 3.5 + 0.18 * len(drawn) * below
  with figures.style():
    layout = ConstrainedLayoutEngine(w_pad=6 / 72)
    figure = Figure(figsize=(6.8, height), layout=layout)
    axes = figure.subplots(1, 2)
    for kind, axis, (x_label, y_label) in zip(
      kinds,
      axes,
      (
        ("false positive rate", "true positive rate"),
        ("recall", "precision"),
      ),
      strict=True,
    ):
      axis.grid(True, axis="both")
      axis.set(xlabel=x_label, ylabel=y_label)
      axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
      axis.set_aspect("equal")
      # Last on top: the most important one.
      for i, (name, points) in reversed(list(enumerate(drawn))):
        x, y, low, high = points[kind].T
        colour = figures.SERIES[i % len(figures.SERIES)]
        # A precision holds from the recall before it up to its own.
        step = "pre" if kind == "precision_recall" else None
        axis.fill_between(
          x, low, high, step=step, color=colour, alpha=0.18, linewidth=0
        )
        axis.plot(
          x,
          y,
          color=colour,
          drawstyle="steps-pre" if step else "default",
          label=tables.shorten(name) or None,
        )
    axes[0].plot([0, 1], [0, 1], color=figures.INK, linestyle=":", linewidth=1)
    if any(name for name, _ in drawn):
      figures.legend(figure, axes[0], 1 if below else 3)
  return figure


def _points(curve: Mapping[str, Any] | None) -> np.ndarray:
  """Returns (P, 4) x, y, low, high; NaN for what is missing."""
  curve = curve or {}
  x = curve.get("x") or []
  nothing = [None] * len(x)
  columns = [x, *(curve.get(key) or nothing for key in ("y", "low", "high"))]
  return np.array(
    [
      [tables.finite(value) for value in row]
      for row in zip(*columns, strict=True)
    ]
  ).reshape(-1, 4)


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
    figures.legend(figure, axis, columns=2)
  return figure


def _metric_table(
  summary: Mapping[str, Any], measurements: Measurements
) -> Html:
  rows = []
  for name, word in results.METRIC_WORDS.items():
    cells = [
      cell(measurements, split, metric)
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


def class_table(
  summary: Mapping[str, Any],
  measurements: Measurements,
  where: str = "on the test split",
) -> Html | None:
  """Returns the scores of every class against the rest.

  Args:
    summary: the job's summary; of it "classes".
    measurements: its measurements.
    where: it was measured.

  Returns:
    The table, or None where nothing was measured of a class.
  """
  classes = summary.get("classes") or []
  rows = [
    [
      str(name),
      *(cell(measurements, "test", f"{m}:{name}") for m in results.BY_CLASS),
    ]
    for name in classes
  ]
  rows = [row for row in rows if any(cell != tables.ABSENT for cell in row[1:])]
  if not rows:
    return None
  return tables.table(
    f"Every class against the rest, {where}.",
    ["class", *map(results.metric_name, results.BY_CLASS)],
    rows,
  )


def cell(measurements: Measurements, split: str, metric: str) -> str:
  """Returns a metric of a split with its interval.

  Args:
    measurements: of the job.
    split: "val" or "test".
    metric: its name in a row.
  """
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
