"""What the page of the `slides` job shows: its figures and its tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from jaxtransfer import results
from jaxtransfer.report import (
  figures,
  finetune,
  fonts,
  operating,
  tables,
  truncate,
)
from jaxtransfer.report.markup import Content, Html, Picture, Section, join, tag
from jaxtransfer.report.tables import Measurements

_POOLINGS = {
  "attention": "attention",
  "gated_attention": "gated attention",
  "mean": "mean",
  "max": "maximum",
}


def content(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  """Returns the figures and the tables of a `slides` run, with their words.

  Args:
    summary: `summary` of the job's `results.json`.
    measurements: its measurements.

  Returns:
    The page's middle; a figure that nothing was measured for is left out.
  """
  del measurements  # The summary holds all that is drawn here.
  metric = results.metric_name(summary.get("metric"))
  interval = summary.get("interval")
  intervals = f" Intervals: {interval}." if interval else ""
  # Folds tested together: the interval of the mean over them is not theirs.
  ranking_title, ranking_caption = finetune.ranking_words(
    {**summary, "interval": "95 %, resampling the tested slides"}
  )
  ranking_caption += _together(summary)
  reliability_title, reliability_caption = finetune.reliability_words(summary)

  def picture(
    name: str, figure: Figure | None, title: str, caption: str
  ) -> Picture | None:
    return None if figure is None else Picture(name, figure, title, caption)

  sections = [
    Section("Every encoder, tested", [encoder_table(summary)]),
    Section(
      "Encoders beside each other",
      [
        picture(
          "encoders",
          encoders(summary),
          f"Test {metric} of every encoder",
          "Left, the mean with its interval. Right, what each scores above the"
          " best on validation, which is drawn in red, paired: of the same"
          " slides in the same resamples. A full point's interval leaves out"
          " zero." + intervals,
        ),
        fonts.key([_name(row) for row in summary.get("table") or ()]),
      ],
    ),
    Section(
      "How it was trained",
      [
        picture(
          "learning",
          truncate.learning(summary),
          f"Loss and validation {metric} of every epoch",
          f"The best encoder, a line for each of the {summary.get('repeats')}."
          " The dashed training loss is the one made small.",
        )
      ],
    ),
    Section(
      "How it ranks",
      [
        picture(
          "ranking",
          finetune.ranking(
            [
              (str(network.get("name") or ""), network)
              for network in summary.get("curves") or ()
            ]
          ),
          ranking_title,
          ranking_caption,
        )
      ],
    ),
    Section(
      "Where it is wrong",
      [
        picture(
          "confusion",
          finetune.confusion(summary),
          "Tested slides by true and predicted class",
          "Rows are the truth. The colour is the share of the row, the number"
          " counts slides." + _together(summary),
        ),
        finetune.confusion_key(summary),
      ],
    ),
    Section(
      "At a threshold",
      [
        operating.table(
          summary,
          [
            (_name(row), row.get("operating") or ())
            for row in summary.get("table") or ()
            if row.get("chosen")
          ],
        )
      ],
    ),
    Section(
      "What its probabilities mean",
      [
        picture(
          "reliability",
          finetune.reliability(summary),
          reliability_title,
          reliability_caption + _together(summary),
        )
      ],
    ),
    Section("What failed", [truncate.failure_table(summary)]),
  ]
  title = "Slides from the features of their tiles"
  if data := summary.get("data"):
    title += f": {tables.shorten(str(data))}"
  return Content(title, sections)


def _together(summary: Mapping[str, Any]) -> str:
  """Says of which trainings a figure is."""
  seed = summary.get("seed")
  if seed is None:
    return ""
  folds = "fold" in str(summary.get("repeats"))
  words = " The folds together, each slide tested once" if folds else ""
  return f"{words or ' Of one training'}, seed {seed}."


def encoders(summary: Mapping[str, Any]) -> Figure | None:
  """Draws the score of every encoder, and its difference from the best.

  Args:
    summary: the job's summary.

  Returns:
    The figure, or None where there is nothing to compare.
  """
  metric = summary.get("metric")
  items = [
    row
    for row in summary.get("table") or ()
    if math.isfinite(_tested(row, metric, "mean"))
  ]
  if len(items) < 2:
    return None
  names = truncate.distinct([_name(row) for row in items])
  chosen = [bool(row.get("chosen")) for row in items]
  scores = _series([(row.get("test") or {}).get(metric) for row in items])
  differences = _series(
    [(row.get("against_chosen") or {}).get(metric) for row in items], "value"
  )
  # One is told apart from the best where its interval leaves out zero.
  apart = (differences.low > 0) | (differences.high < 0)
  y = np.arange(len(items))
  with figures.style():
    figure = Figure(
      figsize=(7.2, 0.9 + 0.28 * len(items)),
      layout=ConstrainedLayoutEngine(w_pad=4 / 72),
    )
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, series, full in (
      (left, scores, np.ones(len(items), bool)),
      (right, differences, apart),
    ):
      axis.grid(True, axis="x")
      axis.grid(False, axis="y")
      colours = np.where(chosen, figures.VERMILLION, figures.BLUE)
      known = np.isfinite(series.low + series.high)
      axis.hlines(
        y[known], series.low[known], series.high[known], color=colours[known]
      )
      axis.scatter(
        series.value,
        y,
        s=24,
        c=np.where(full, colours, "white"),
        edgecolors=colours,
        linewidths=1,
        zorder=3,
      )
    right.axvline(0, color=figures.INK, linewidth=0.8)
    left.set_xlabel(f"test {results.metric_name(metric)}")
    right.set_xlabel("above the best on validation")
    labels = fonts.labels(names)
    left.set_yticks(y, labels.words, fontfamily=labels.families)
    left.set_ylim(len(items) - 0.4, -0.6)
    for label, is_chosen in zip(left.get_yticklabels(), chosen, strict=True):
      if is_chosen:
        label.set(color=figures.VERMILLION, fontweight="bold")
  return figure


def _series(
  items: Sequence[Mapping[str, Any] | None], value: str = "mean"
) -> tables.Series:
  return tables.Series(
    *(
      np.array([tables.finite((of or {}).get(key)) for of in items], np.float64)
      for key in (value, "low", "high")
    )
  )


def encoder_table(summary: Mapping[str, Any]) -> Html | None:
  """Returns what was measured of every encoder, a row each.

  Args:
    summary: the job's summary.

  Returns:
    The table, or None where none was tested.
  """
  items = summary.get("table") or []
  if not items:
    return None
  metric = summary.get("metric")
  word = results.metric_name(metric)
  shown = list(dict.fromkeys([metric, "auroc", "auprc"]))
  rows = [
    [
      _named(row),
      *(
        truncate.mean_and_spread((row.get("test") or {}).get(name) or {})
        for name in shown
      ),
      truncate.mean_and_spread((row.get("patients") or {}).get(metric) or {}),
      _difference(row, "against_chosen", metric),
      _difference(row, "against_first", metric),
      tables.with_note(
        tables.score(_tested(row, "accuracy", "mean")),
        "balanced " + tables.score(_tested(row, "balanced_accuracy", "mean")),
      ),
      tables.score(tables.finite(row.get("val"))),
      tables.with_note(
        f"{row.get('channels') or tables.ABSENT}",
        f"{tables.quantity(tables.finite(row.get('tiles')))} tiles a slide",
      ),
      tables.quantity(tables.finite(row.get("params"))),
      tables.with_note(
        tables.seconds(tables.finite(row.get("training_seconds"))),
        f"{tables.finite(row.get('epochs')):.3g} epochs",
      ),
    ]
    for row in items
  ]
  patients = [row.get("patients_tested") for row in items]
  counted = next((f"{n:,} " for n in patients if n), "")
  header = [
    "encoder",
    *(f"test {results.metric_name(name)}" for name in shown),
    f"{word} of {counted}patients",
    f"{word} above the best on validation",
    f"{word} above the first",
    "test accuracy",
    f"validation {word}",
    "features",
    "parameters of the pooling",
    "training",
  ]
  columns = [
    j
    for j in range(len(header))
    if not j or any(row[j] != tables.ABSENT for row in rows)
  ]
  words = (
    f"Test scores of slides: mean ± standard deviation over"
    f" {summary.get('repeats') or 'repeats'}, 95 % intervals in brackets. The"
    " best is that on validation."
  )
  if counted:
    words += (
      " A patient's probabilities are the means of those of the patient's"
      " slides."
    )
  if len(items) > 1:
    words += (
      " Differences are paired, of the same slides in the same resamples:"
      " where an interval holds zero, the slides cannot tell the two apart."
    )
  return tables.table(
    words,
    [header[j] for j in columns],
    [[row[j] for j in columns] for row in rows],
    ["chosen" if item.get("chosen") else None for item in items],
  )


def _named(row: Mapping[str, Any]) -> Html:
  role = None
  if row.get("chosen"):
    role = tag("span", "best", class_="role")
  pooling = str(row.get("pooling") or "")
  about = [
    str(row[key]) for key in ("network", "weights", "tap") if row.get(key)
  ]
  words = f"{_POOLINGS.get(pooling, pooling)} pooling"
  if about:
    words = f"{', '.join(about)}; {words}"
  return join(_name(row), role, tag("span", words, class_="words"))


def _name(row: Mapping[str, Any]) -> str:
  return tables.shorten(str(row.get("name") or "unnamed"))


def _tested(row: Mapping[str, Any], metric: Any, key: str) -> float:
  return tables.finite(((row.get("test") or {}).get(metric) or {}).get(key))


def _difference(row: Mapping[str, Any], against: str, metric: Any) -> Html:
  of = (row.get(against) or {}).get(metric) or {}
  numbers = (tables.finite(of.get(key)) for key in ("value", "low", "high"))
  return tables.with_interval(*numbers, signed=True)
