"""What the page of the `predict` job shows."""

from collections.abc import Mapping
from typing import Any

from jaxtransfer import results
from jaxtransfer.report import finetune, operating, tables
from jaxtransfer.report.markup import Content, Html, Picture, Section
from jaxtransfer.report.tables import Measurements


def content(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  """Returns what a network says of new images, and how good it is there.

  Args:
    summary: `summary` of the job's `results.json`.
    measurements: its measurements.

  Returns:
    The page's middle; what needs labels is left out where none are known.
  """
  unit = str(summary.get("unit") or "images")
  title = f"{summary.get('network')} cut after {summary.get('cut')}"
  if unit == "slides":
    title = f"The network of {summary.get('cut')}"
  title += f", used on {summary.get('data')}"
  sections = [Section("What it says", [_called_table(summary)])]
  if not summary.get("labelled"):
    return Content(title, sections)
  ranking = finetune.ranking([("", summary.get("curves") or {})])
  confusion = finetune.confusion(summary)
  reliability = finetune.reliability(summary)

  def picture(name: str, figure: Any, title: str, words: str) -> Picture | None:
    return None if figure is None else Picture(name, figure, title, words)

  _, ranking_words = finetune.ranking_words(summary)
  _, confusion_words = finetune.CONFUSION_WORDS
  return Content(
    title,
    [
      *sections,
      Section("How good it is here", [_metric_table(summary, measurements)]),
      Section(
        "How it ranks",
        [
          picture(
            "ranking",
            ranking,
            f"ROC and precision-recall curves of the labelled {unit}",
            ranking_words,
          )
        ],
      ),
      Section(
        "Where it is wrong",
        [
          picture(
            "confusion",
            confusion,
            f"Labelled {unit} by true and predicted class",
            confusion_words,
          ),
          finetune.confusion_key(summary),
          finetune.class_table(
            summary, measurements, f"of the labelled {unit}"
          ),
        ],
      ),
      Section(
        "At the thresholds of its run",
        [
          operating.table(
            summary,
            [("", summary.get("operating") or ())],
            "Thresholds were chosen by the run, on its own validation split;"
            f" what they reach on these {unit} may be less.",
          )
        ],
      ),
      Section(
        "What its probabilities mean here",
        [
          picture(
            "reliability",
            reliability,
            f"Accuracy against confidence of the labelled {unit}",
            "On the dotted line a network is right as often as it says. Below"
            " it is too sure of itself. The temperature of the second line was"
            " fitted by the run on its own validation split, not on these"
            " images. Larger dots hold more images.",
          )
        ],
      ),
    ],
  )


def _called_table(summary: Mapping[str, Any]) -> Html:
  unit = str(summary.get("unit") or "images")
  total = tables.finite((summary.get("rows") or {}).get("read"))
  lines = [
    [
      tables.shorten(str(of.get("name"))),
      f"{of.get('images') or 0:,}",
      tables.percent(tables.finite(of.get("images")), total),
      tables.score(tables.finite(of.get("probability"))),
    ]
    for of in summary.get("called") or ()
  ]
  rule = (
    "of which it is likelier than not"
    if summary.get("multilabel")
    else ("whose likeliest class it is")
  )
  return tables.table(
    f"{unit.capitalize()} {rule}, and the mean probability over all {unit},"
    f" with the temperature of the run. predictions.csv has every one.",
    ["", unit, "share", "mean probability"],
    lines,
  )


def _metric_table(
  summary: Mapping[str, Any], measurements: Measurements
) -> Html:
  own = summary.get("own_test") or {}
  lines = [
    [
      word,
      finetune.cell(measurements, "test", name),
      finetune.cell(measurements, "test", f"{name}:calibrated"),
      tables.score(tables.finite(own.get(name))),
    ]
    for name, word in results.METRIC_WORDS.items()
  ]
  return tables.table(
    f"Of the {summary.get('unit') or 'images'} with labels. Brackets hold"
    " intervals. Beside it what the run measured on its own test split; its"
    " loss may weigh classes, this one does not.",
    ["", "here", "here, with temperature", "test split of its run"],
    lines,
  )
