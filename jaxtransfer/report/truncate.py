"""What the page of the `truncate` job shows: its figures and its tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxtransfer import results
from jaxtransfer.report import figures, finetune, operating, tables
from jaxtransfer.report.figures import Mark
from jaxtransfer.report.markup import Content, Html, Picture, Section, join, tag
from jaxtransfer.report.tables import Measurements, Series


class _Method(NamedTuple):
  """How a method of the search is called and drawn."""

  name: str
  words: str
  colour: str
  marker: str


_METHODS = {
  "ttl": _Method("TTL", "cut there, all trained", figures.BLUE, "o"),
  "lwft": _Method("LWFT", "whole, trained after it", figures.PURPLE, "s"),
  "fat": _Method("FAT", "cut there, head trained", figures.GREEN, "^"),
  "tf": _Method("TF", "half wide, random after it", figures.GREY, "D"),
}
_UNKNOWN = _Method("", "", figures.INK, "v")


def content(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  """Returns the figures and the tables of a `truncate` run, with their words.

  Args:
    summary: `summary` of the job's `results.json`.
    measurements: its measurements.

  Returns:
    The page's middle; a figure that nothing was measured for is left out.
  """
  del measurements  # The summary holds all that is drawn here.
  metric = _metric(summary)
  interval = summary.get("interval")
  intervals = f" Intervals: {interval}." if interval else ""

  def picture(
    name: str, figure: Figure | None, title: str, caption: str
  ) -> Picture | None:
    return None if figure is None else Picture(name, figure, title, caption)

  exported = _exported(summary)
  confusion_title, confusion_caption = finetune.CONFUSION_WORDS
  # Of one repeat each: the interval of the means is not theirs.
  ranking_title, ranking_caption = finetune.ranking_words(
    {**summary, "interval": "95 %, resampling the test split"}
  )
  ranking_caption += " Of each network the repeat that is best on validation."
  reliability_title, reliability_caption = finetune.reliability_words(summary)
  sections = [
    Section(
      "Score against cut",
      [
        picture(
          "search",
          search(summary),
          f"Validation {metric} at every cut that was tried",
          _search_words(summary),
        )
      ],
    ),
    Section("Every network, tested", [network_table(summary)]),
    Section(
      "Score against cost",
      [
        picture(
          "pareto",
          pareto(summary),
          "Test AUROC against the cost of the network",
          "Up is better, left is cheaper. The line joins the networks that no"
          " other beats in both. A name is left out where it would cover"
          " another; grey lines are intervals." + intervals,
        )
      ],
    ),
    Section(
      "How they were trained",
      [
        picture(
          "learning",
          learning(summary),
          f"Loss and validation {metric} of every epoch",
          "A line for each of the "
          + str(summary.get("repeats") or "repeats")
          + ". The dashed training loss is the one made small, on augmented"
          " images; with label smoothing it does not compare with the other.",
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
          confusion_title,
          confusion_caption + exported,
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
            if row.get("chosen") or row.get("whole")
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
          reliability_caption + exported,
        )
      ],
    ),
    Section("Every cut, on validation", [search_table(summary)]),
    Section("What failed", [failure_table(summary)]),
  ]
  network = summary.get("network") or "the network"
  title = f"Where to cut {network}"
  if data := summary.get("data"):
    title += f" for {tables.shorten(str(data))}"
  return Content(title, sections)


def search(summary: Mapping[str, Any]) -> Figure | None:
  """Draws the validation score of every method at every cut, above its cost.

  Args:
    summary: the job's summary.

  Returns:
    The figure, or None where no cut has a score.
  """
  taps = summary["taps"]
  points_of = {
    method: points
    for method in _methods(summary)
    if (points := _points(summary, method))
  }
  if not points_of:
    return None
  cut = summary.get("cut")
  marks = [] if cut is None or cut not in taps else [Mark(cut, "cut")]
  share = _share_of_macs(summary)
  heights = [2.9, 0.75] if np.isfinite(share).any() else [2.9]
  with figures.style():
    figure, (main, *below) = figures.depth_panels(taps, heights, marks)
    # TTL last, on top of the others and first in the legend.
    for method in sorted(points_of, key=lambda m: m == "ttl"):
      _draw_method(main, points_of[method], method)
    figures.name_marks(main, taps, marks)
    main.set_ylabel(f"validation {_metric(summary)}")
    figures.score_limits(main, summary.get("metric"))
    for axis in below:
      figures.draw_cost(axis, 100 * share, "MACs, %\nof whole")
      axis.set_ylim(0, max(105, 105 * np.nanmax(share)))
    figure.align_ylabels()
    figures.legend(figure, main, columns=2)
  return figure


class _Point(NamedTuple):
  """One trained cut in the figure."""

  x: int
  item: Mapping[str, Any]
  value: float


def _methods(summary: Mapping[str, Any]) -> list[str]:
  names = {str(item.get("method")) for item in summary.get("search") or ()}
  known = [method for method in _METHODS if method in names]
  return known + sorted(names - set(known))


def _points(summary: Mapping[str, Any], method: str) -> list[_Point]:
  """Returns a method's scores along depth, one for each cut.

  Of a cut that was trained twice, what was trained to the end counts, and of
  these what was trained last.
  """
  taps = summary["taps"]
  points: dict[int, _Point] = {}
  for item in summary.get("search") or ():
    value = tables.finite(item.get("value"))
    cut = item.get("cut")
    if item.get("method") != method or cut not in taps or math.isnan(value):
      continue
    x = taps.index(cut)
    if x in points and item.get("stopped") and not _stopped(points[x]):
      continue
    points[x] = _Point(x, item, value)
  return [points[x] for x in sorted(points)]


def _stopped(point: _Point) -> bool:
  return bool(point.item.get("stopped"))


def _draw_method(axis: Axes, points: Sequence[_Point], method: str) -> None:
  """Draws one method: its means joined, and of TTL also seeds and intervals."""
  look = _METHODS.get(method, _UNKNOWN._replace(name=method))
  label = f"{look.name}: {look.words}" if look.words else look.name
  main = method == "ttl"
  whole = [point for point in points if not _stopped(point)]
  stopped = [point for point in points if _stopped(point)]
  if main:
    for point in whole:
      values = [tables.finite(v) for v in point.item.get("values") or ()]
      values = [value for value in values if math.isfinite(value)]
      values = values if len(values) > 1 else []
      axis.scatter(
        [point.x] * len(values),
        values,
        s=12,
        color=look.colour,
        alpha=0.35,
        linewidths=0,
      )
      low, high = (tables.finite(point.item.get(k)) for k in ("low", "high"))
      if math.isfinite(low + high):
        axis.vlines(point.x, low, high, color=look.colour, linewidth=1.4)
  if stopped:
    axis.plot(
      [point.x for point in stopped],
      [point.value for point in stopped],
      linestyle="none",
      marker=look.marker,
      markersize=4,
      markerfacecolor="white",
      color=look.colour,
      label=None if whole else label,
    )
  if whole:
    axis.plot(
      [point.x for point in whole],
      [point.value for point in whole],
      color=look.colour,
      linewidth=1.6 if main else 1.1,
      marker=look.marker,
      markersize=5 if main else 3.5,
      zorder=3 if main else 2,
      label=label,
    )


def _share_of_macs(summary: Mapping[str, Any]) -> np.ndarray:
  """Returns the MACs of the network cut at each tap, as a share of its whole.

  A whole network that was never trained is known by those who keep it.
  """
  taps = summary["taps"]
  macs = np.full(len(taps), np.nan)
  for item in summary.get("search") or ():
    if item.get("method") in ("ttl", "fat") and item.get("cut") in taps:
      macs[taps.index(item["cut"])] = tables.finite(item.get("macs"))
  wholes = [
    tables.finite(item.get("macs"))
    for key, methods in (("search", ("lwft",)), ("table", ("ftl", "lwft")))
    for item in summary.get(key) or ()
    if item.get("method") in methods
  ]
  wholes = [*wholes, *macs[-1:]]
  whole = max((macs for macs in wholes if macs > 0), default=math.nan)
  return macs / whole


def _search_words(summary: Mapping[str, Any]) -> str:
  """Returns how the first figure is read, saying only what stands in it."""
  items = summary.get("search") or ()
  words = "Shallow cuts stand left. A point is "
  single = _single(summary)
  repeats = summary.get("repeats") or "the repeats"
  words += "one training" if single else f"the mean over {repeats}"
  if not single and any(item.get("method") == "ttl" for item in items):
    words += "; of TTL the pale dots are the single ones"
    if any(math.isfinite(tables.finite(item.get("low"))) for item in items):
      words += " and the bars 95 % intervals of the mean"
  words += "."
  if any(item.get("stopped") for item in items):
    words += (
      " Hollow points were stopped before their end, or lack a repeat that"
      " failed, and cannot be chosen."
    )
  if halving := summary.get("halving"):
    words += f" {halving}"
  if np.isfinite(_share_of_macs(summary)).any():
    words += (
      " Below, the multiply-accumulates of the network cut there, where one"
      " was trained."
    )
  return words


def _single(summary: Mapping[str, Any]) -> bool:
  """Whether every cut was trained once."""
  items = summary.get("search") or ()
  return all(len(item.get("values") or ()) == 1 for item in items)


def pareto(summary: Mapping[str, Any]) -> Figure | None:
  """Draws the test AUROC of every network of the table against its cost.

  Args:
    summary: the job's summary.

  Returns:
    The figure, or None where no network has both.
  """
  rows = summary.get("table") or []
  names = distinct([_name(row) for row in rows])
  tested = [_tested(row, "auroc") for row in rows]
  series = Series(
    *(
      np.array([tables.finite(t.get(key)) for t in tested], np.float64)
      for key in ("mean", "low", "high")
    )
  )
  costs = []
  for key, label in (("macs", "MACs per image"), ("params", "parameters")):
    cost = np.array([tables.finite(row.get(key)) for row in rows], np.float64)
    if ((cost > 0) & np.isfinite(series.value)).any():
      costs.append((cost, label))
  if not costs:
    return None
  marks = [
    Mark(name, "chosen")
    for name, row in zip(names, rows, strict=True)
    if row.get("chosen")
  ]
  with figures.style():
    return figures.pareto_panels(
      names,
      costs,
      series,
      marks,
      "test AUROC",
      kind="network",
      wanted=range(len(names)),
      stacked=True,
    )


def _name(row: Mapping[str, Any]) -> str:
  name = tables.shorten(str(row.get("name") or row.get("method") or "unnamed"))
  # A small network, which has no cut, is always random: saying so would set
  # none apart.
  always = not row.get("cut")
  if row.get("weights") != "random" or always or "random" in name.lower():
    return name
  return f"{name}, random"


def distinct(names: Sequence[str]) -> list[str]:
  """Returns the names with a number where one stands a second time.

  Args:
    names: for people.
  """
  return [
    name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})"
    for i, name in enumerate(names)
  ]


def learning(summary: Mapping[str, Any]) -> Figure | None:
  """Draws losses and validation scores against the epoch, a line per repeat.

  Args:
    summary: the job's summary.

  Returns:
    The figure, or None without an epoch.
  """
  networks = [
    (str(network.get("name") or ""), runs)
    for network in summary.get("learning") or ()
    if (runs := [run for run in network.get("epochs") or () if run])
  ]
  if not networks:
    return None
  metric = str(summary.get("metric"))
  with figures.style():
    figure = Figure(figsize=(6.8, 4.6), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    for i, (name, runs) in reversed(list(enumerate(networks))):
      colour = figures.SERIES[i % len(figures.SERIES)]
      for j, run in enumerate(runs):
        x = [record["epoch"] for record in run]
        first = j == 0

        def of(key: str, run: Sequence[Mapping[str, Any]] = run) -> list[float]:
          validations = (record.get("val") or {} for record in run)
          return [tables.finite(scores.get(key)) for scores in validations]

        train = [tables.finite(record.get("loss")) for record in run]
        shown = {
          "color": colour,
          "linewidth": 1.1,
          "marker": "." if len(x) < 3 else None,
        }
        losses.plot(
          x,
          train,
          linestyle="--",
          alpha=0.6,
          label=f"{name}, training" if first else None,
          **shown,
        )
        losses.plot(
          x, of("loss"), label=f"{name}, validation" if first else None, **shown
        )
        scores.plot(x, of(metric), **shown)
    losses.set_ylabel("loss")
    scores.set_ylabel(f"validation {_metric(summary)}")
    scores.set_xlabel("epoch")
    scores.xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    figures.legend(figure, losses, columns=2)
  return figure


def network_table(summary: Mapping[str, Any]) -> Html | None:
  """Returns what was measured of every network that was tested, a row each.

  Args:
    summary: the job's summary.

  Returns:
    The table, or None where no network was tested.
  """
  items = summary.get("table") or []
  if not items:
    return None
  whole = next((row for row in items if row.get("method") == "ftl"), {})
  rows = []
  for item in items:
    params, macs = (tables.finite(item.get(k)) for k in ("params", "macs"))
    latency = tables.finite(item.get("latency_ms"))
    trained = tables.finite(item.get("trained_params"))
    epochs = tables.finite(item.get("epochs"))
    rows.append(
      [
        _named(item),
        *(mean_and_spread(_tested(item, name)) for name in ("auroc", "auprc")),
        _difference(item, summary),
        tables.with_note(
          _mean(item, "accuracy"),
          f"balanced {_mean(item, 'balanced_accuracy')}",
        ),
        tables.score(tables.finite(item.get("val"))),
        tables.with_note(
          tables.quantity(params), f"{tables.quantity(trained)} trained"
        )
        if math.isfinite(trained)
        else tables.quantity(params),
        tables.with_note(
          tables.quantity(macs),
          tables.percent(macs, tables.finite(whole.get("macs"))),
        ),
        f"{latency:.3g} ms" if math.isfinite(latency) else tables.ABSENT,
        tables.rate(tables.finite(item.get("images_per_second"))),
        tables.with_note(
          tables.seconds(tables.finite(item.get("training_seconds"))),
          f"{epochs:.3g} epochs" if math.isfinite(epochs) else tables.ABSENT,
        ),
      ]
    )
  header = [
    "network",
    "test AUROC",
    "test AUPRC",
    f"test {_metric(summary)} above the whole network's",
    "test accuracy",
    f"validation {_metric(summary)}",
    "parameters",
    "MACs",
    "latency, batch 1",
    f"images/s, batch {summary.get('cost_batch_size') or tables.ABSENT}",
    "training",
  ]
  columns = [
    j
    for j in range(len(header))
    if not j or any(row[j] != tables.ABSENT for row in rows)
  ]
  words = "Test scores: mean"
  if _single(summary):
    words = "Test scores of one training"
  elif repeats := summary.get("repeats"):
    words += f" ± standard deviation over {repeats}"
  words += ", 95 % intervals in brackets. Training: mean of one run."
  if any(row.get("against_ftl") for row in items):
    words += (
      " Differences from the whole network are paired, of the same images in"
      " the same resamples: where an interval holds zero, the data cannot tell"
      " the two apart."
    )
  if whole:
    words += " Percentages compare MACs with the whole network."
  return tables.table(
    words,
    [header[j] for j in columns],
    [[row[j] for j in columns] for row in rows],
    ["chosen" if item.get("chosen") else None for item in items],
  )


def _named(item: Mapping[str, Any]) -> Html:
  role = tag("span", "chosen", class_="role") if item.get("chosen") else None
  words = item.get("words")
  return join(
    _name(item),
    role,
    tag("span", str(words), class_="words") if words else None,
  )


def _mean(item: Mapping[str, Any], metric: str) -> str:
  return tables.score(tables.finite(_tested(item, metric).get("mean")))


def _difference(item: Mapping[str, Any], summary: Mapping[str, Any]) -> Html:
  """Returns a cell: what a network scores above the whole one, paired."""
  of = (item.get("against_ftl") or {}).get(summary.get("metric")) or {}
  numbers = (tables.finite(of.get(key)) for key in ("value", "low", "high"))
  return tables.with_interval(*numbers, signed=True)


def mean_and_spread(tested: Mapping[str, Any]) -> Html:
  """Returns a cell: mean ± standard deviation, the interval below.

  Args:
    tested: a `results.Score`.
  """
  mean, spread, low, high = (
    tables.finite(tested.get(key)) for key in ("mean", "sd", "low", "high")
  )
  text = tables.score(mean)
  if math.isfinite(mean) and math.isfinite(spread):
    text += f" ± {tables.score(spread)}"
  if math.isnan(low) or math.isnan(high):
    return join(text)
  return tables.with_note(text, f"[{tables.score(low)}, {tables.score(high)}]")


def search_table(summary: Mapping[str, Any]) -> Html | None:
  """Returns every cut of the search in the order of training, folded away.

  Args:
    summary: the job's summary.

  Returns:
    The table, or None where nothing was searched.
  """
  items = summary.get("search") or []
  if not items:
    return None
  rows = []
  for item in items:
    method = str(item.get("method") or "")
    numbers = (tables.finite(item.get(k)) for k in ("value", "low", "high"))
    values = [tables.finite(value) for value in item.get("values") or ()]
    role = tag("span", "chosen", class_="role") if item.get("chosen") else None
    rows.append(
      [
        join(_METHODS.get(method, _UNKNOWN).name or method, role),
        str(item.get("stage") or tables.ABSENT),
        tables.shorten(str(item.get("cut") or tables.ABSENT)),
        tables.with_interval(*numbers),
        ", ".join(map(tables.score, values)) or tables.ABSENT,
        tables.quantity(tables.finite(item.get("params"))),
        tables.quantity(tables.finite(item.get("macs"))),
        tag("span", str(item.get("stopped") or ""), class_="words"),
      ]
    )
  header = [
    "method",
    "stage",
    "cut",
    f"validation {_metric(summary)}",
    "single values",
    "parameters",
    "MACs",
    "stopped",
  ]
  width = len(header) - (not any(item.get("stopped") for item in items))
  words = "In the order of training. Means over"
  words += f" {summary.get('repeats') or 'repeats'}, intervals in brackets."
  if halving := summary.get("halving"):
    words += f" {halving}"
  return tag(
    "details",
    tag("summary", f"All {len(rows):,} cuts that were tried"),
    tables.table(
      words,
      header[:width],
      [row[:width] for row in rows],
      ["chosen" if item.get("chosen") else None for item in items],
    ),
  )


def failure_table(summary: Mapping[str, Any]) -> Html | None:
  """Returns what was not trained to its end, and why.

  Args:
    summary: the job's summary.

  Returns:
    The table, or None where nothing failed.
  """
  failed = summary.get("failed") or []
  if not failed:
    return None
  return tables.table(
    "These could not be trained; the rest went on without them. A cut that"
    " lacks a training was not chosen, and no network that lacks one tested.",
    ["what", "why"],
    [
      [
        tables.shorten(str(item.get("unit"))),
        tag("span", str(item.get("reason") or tables.ABSENT), class_="reason"),
      ]
      for item in failed
    ],
  )


def _exported(summary: Mapping[str, Any]) -> str:
  """Returns the words that say which network a figure is of."""
  seed = (summary.get("exported") or {}).get("seed")
  kind = "fold" if "fold" in str(summary.get("repeats")) else "seed"
  return "" if seed is None else f" Of the exported network, {kind} {seed}."


def _tested(row: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
  return (row.get("test") or {}).get(metric) or {}


def _metric(summary: Mapping[str, Any]) -> str:
  return results.metric_name(summary.get("metric"))
