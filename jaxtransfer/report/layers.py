"""What the page of the `layers` job shows: its figures and its table."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxtransfer import results
from jaxtransfer.report import figures, tables
from jaxtransfer.report.figures import Mark
from jaxtransfer.report.markup import Content, Html, Picture, Section, join, tag
from jaxtransfer.report.tables import Measurements, Series

PROBES = {
  "logistic": "logistic regression",
  "linear_svm": "linear SVM",
  "knn": "nearest neighbours",
  "nearest_mean": "nearest class mean",
}
_RANDOM = "random"


def content(summary: Mapping[str, Any], measurements: Measurements) -> Content:
  """Returns the figures and the table of a `layers` run, with their words.

  Args:
    summary: `summary` of the job's `results.json`.
    measurements: its measurements.

  Returns:
    The page's middle; a figure that nothing was measured for is left out, and
    where that needs a reason it is given.
  """
  metric = _metric(summary)
  probe = _probe(summary.get("probe"))
  drawn = {
    name: draw(summary, measurements)
    for name, draw in (
      ("curve", curve),
      ("rule", rule),
      ("gain", gain),
      ("pareto", pareto),
      ("probes", probes),
    )
  }

  def picture(name: str, title: str, caption: str) -> Picture | None:
    figure = drawn[name]
    return None if figure is None else Picture(name, figure, title, caption)

  sections = [
    Section(
      "Score against depth",
      [
        picture(
          "curve",
          f"Test {metric} of a {probe} probe at every tap",
          _reading(summary, measurements),
        ),
        picture(
          "rule",
          f"Validation {metric}: difference to the best tap",
          "Below zero a tap is worse than the best one. The dotted "
          "line is the tolerated loss; taps whose whole interval lies "
          "above it are full, the others hollow. Below, how often the rule "
          "would have chosen each tap, had other patients of the same kind "
          "been in the validation split: where no bar is long, the cut is a "
          "matter of chance.",
        ),
      ],
    ),
    Section(
      "Gain from pretraining",
      [
        picture(
          "gain",
          f"Test {metric} gained over random weights",
          "Above, the pretrained score minus the mean of the same "
          "network with random weights; below, the marginal gain: how "
          "much it is more than at the tap before. Pale bars: the "
          "interval holds zero.",
        )
        or tag(
          "p",
          "No gain was measured: it needs networks with random weights "
          "to compare with.",
        )
      ],
    ),
    Section(
      "Score against cost",
      [
        picture(
          "pareto",
          f"Test {metric} against the cost of the cut network",
          "Each point is the network cut at one tap; up is better, "
          "left is cheaper. The line joins the taps that no other tap "
          "beats in both.",
        )
        or tag("p", "No cost was measured.")
      ],
    ),
    Section(
      "Every probe",
      [
        picture(
          "probes",
          f"Test {metric} of every probe at every tap",
          "The same features read by each probe. Bands are intervals; "
          "vertical lines as in the first figure.",
        )
      ],
    ),
    Section("Every tap", [tap_table(summary, measurements)]),
  ]
  network = summary.get("network") or "the network"
  title = f"What every layer of {network} is worth"
  if data := summary.get("data"):
    title += f" on {tables.shorten(str(data))}"
  return Content(title, sections)


def _reading(summary: Mapping[str, Any], measurements: Measurements) -> str:
  """Returns how the first figure is read, saying only what stands in it."""
  words = "Shallow taps stand left. Bands are intervals"
  if _scores(summary, measurements, weights=_RANDOM).measured:
    words += (
      "; the thin grey lines are single random networks, the dashed line their "
      "mean"
    )
  words += "."
  if _costs(summary, measurements):
    words += " Below, what the network cut at that tap costs."
  if interval := summary.get("interval"):
    words += f" Intervals: {interval}."
  return words


def curve(
  summary: Mapping[str, Any], measurements: Measurements
) -> Figure | None:
  """Draws the score against depth, pretrained and random, above its cost.

  Args:
    summary: the job's summary.
    measurements: its measurements.

  Returns:
    The figure, or None where no score was measured.
  """
  taps = summary["taps"]
  pretrained = _scores(summary, measurements)
  if not pretrained.measured:
    return None
  costs = _costs(summary, measurements)
  with figures.style():
    figure, (main, *panels) = figures.depth_panels(
      taps, [2.9] + [0.75] * len(costs), _marks(summary)
    )
    _pretrained_and_random(summary, measurements, main, summary.get("probe"))
    figures.name_marks(main, taps, _marks(summary))
    main.set_ylabel(f"test {_metric(summary)}")
    figures.score_limits(main, summary.get("metric"))
    for axis, (cost, label) in zip(panels, costs, strict=True):
      figures.draw_cost(axis, cost, label)
    figure.align_ylabels()
    figures.legend(figure, main)
  return figure


def _costs(
  summary: Mapping[str, Any], measurements: Measurements
) -> list[tuple[np.ndarray, str]]:
  """Returns the costs that were measured, each with its name."""
  costs = [
    (measurements.cost(summary["taps"], metric), label)
    for metric, label in (("macs", "MACs"), ("params", "parameters"))
  ]
  return [(cost, label) for cost, label in costs if np.isfinite(cost).any()]


def rule(
  summary: Mapping[str, Any], measurements: Measurements
) -> Figure | None:
  """Draws what the cut was chosen by: differences to the best tap.

  Args:
    summary: the job's summary.
    measurements: its measurements.

  Returns:
    The figure, or None where no difference was measured.
  """
  taps = summary["taps"]
  loss = measurements.series(
    taps,
    f"{summary.get('metric')}:against_best",
    weights=summary.get("weights"),
    probe=summary.get("probe"),
    split="val",
  )
  if not loss.measured:
    return None
  tolerance = tables.finite(summary.get("tolerance"))
  chosen = _chosen(summary, measurements)
  heights = [2.0, 0.75] if chosen.measured else [2.0]
  with figures.style():
    figure, (axis, *below) = figures.depth_panels(
      taps, heights, _marks(summary)
    )
    figures.draw_differences(axis, loss, -tolerance)
    figures.name_marks(axis, taps, _marks(summary))
    axis.set_ylabel(f"validation {_metric(summary)}\nminus the best tap's")
    for panel in below:
      figures.draw_cost(panel, 100 * chosen.value, "chosen, %")
    figure.align_ylabels()
  return figure


def _chosen(summary: Mapping[str, Any], measurements: Measurements) -> Series:
  """Returns in what share of the resamples the rule would choose each tap."""
  return measurements.series(
    summary["taps"],
    f"{summary.get('metric')}:chosen",
    weights=summary.get("weights"),
    probe=summary.get("probe"),
    split="val",
  )


def gain(
  summary: Mapping[str, Any], measurements: Measurements
) -> Figure | None:
  """Draws the gain over random weights, and each tap's own part in it.

  Args:
    summary: the job's summary.
    measurements: its measurements.

  Returns:
    The figure, or None where no gain was measured.
  """
  panels = [
    (series, label)
    for kind, label in (
      ("gain", "gain"),
      ("marginal_gain", "marginal gain"),
    )
    if (series := _scores(summary, measurements, kind=kind)).measured
  ]
  if not panels:
    return None
  taps = summary["taps"]
  with figures.style():
    figure, axes = figures.depth_panels(
      taps, [1.9] * len(panels), _marks(summary)
    )
    for axis, (series, label) in zip(axes, panels, strict=True):
      figures.draw_bars(axis, series)
      axis.set_ylabel(f"{label} ({_metric(summary)})")
    figures.name_marks(axes[0], taps, _marks(summary))
    figure.align_ylabels()
  return figure


def pareto(
  summary: Mapping[str, Any], measurements: Measurements
) -> Figure | None:
  """Draws the score against what the cut network costs.

  Args:
    summary: the job's summary.
    measurements: its measurements.

  Returns:
    The figure, or None where no cost or no score was measured.
  """
  taps = summary["taps"]
  scores = _scores(summary, measurements)
  speed = measurements.cost(taps, "images_per_second")
  costs = [
    (measurements.cost(taps, "macs"), "MACs per image"),
    (1000 / np.where(speed > 0, speed, np.nan), "measured ms per image"),
  ]
  costs = [
    (cost, label)
    for cost, label in costs
    if np.isfinite(cost + scores.value).any()
  ]
  if not costs:
    return None
  with figures.style():
    return figures.pareto_panels(
      taps, costs, scores, _marks(summary), f"test {_metric(summary)}"
    )


def probes(
  summary: Mapping[str, Any], measurements: Measurements
) -> Figure | None:
  """Draws the curve once more for every probe, on one scale.

  Args:
    summary: the job's summary.
    measurements: its measurements.

  Returns:
    The figure, or None where no score was measured.
  """
  names = measurements.values_of(
    "probe", measured=True, metric=summary.get("metric"), split="test"
  )
  names.sort(key=lambda p: list(PROBES).index(p) if p in PROBES else 99)
  if not names:
    return None
  # A last row of one panel would leave the panel above without tap names.
  columns = 2 if len(names) % 2 == 0 else 1
  with figures.style():
    figure, axes = figures.depth_panels(
      summary["taps"],
      [1.9] * (len(names) // columns),
      _marks(summary),
      columns,
    )
    for i, (axis, probe) in enumerate(zip(axes, names, strict=True)):
      _pretrained_and_random(summary, measurements, axis, probe)
      axis.set_title(_probe(probe))
      if i % columns == 0:
        axis.set_ylabel(f"test {_metric(summary)}")
    for axis in axes:
      figures.score_limits(axis, summary.get("metric"))
    figures.legend(figure, axes[0])
  return figure


def tap_table(summary: Mapping[str, Any], measurements: Measurements) -> Html:
  """Returns what is known of every tap, one row each.

  Args:
    summary: the job's summary.
    measurements: its measurements.
  """
  taps = summary["taps"]
  metric = _metric(summary)
  name = summary.get("metric")
  probe = summary.get("probe")
  scores = _scores(summary, measurements)
  chance = _scores(summary, measurements, weights=_RANDOM)
  spread = _scores(summary, measurements, weights=_RANDOM, kind="seed_sd")
  gained = _scores(summary, measurements, kind="gain")
  beside = _scores(summary, measurements, kind="against_cut")
  chosen = _chosen(summary, measurements)
  loss = measurements.series(
    taps,
    f"{name}:against_best",
    weights=summary.get("weights"),
    probe=probe,
    split="val",
  )
  params = measurements.cost(taps, "params")
  macs = measurements.cost(taps, "macs")
  speed = measurements.cost(taps, "images_per_second")
  memory = measurements.cost(taps, "peak_memory_bytes")
  channels = measurements.cost(taps, "channels")

  def random(i: int) -> Html:
    text = tables.with_interval(*(part[i] for part in chance))
    if not math.isfinite(spread.value[i]):
      return text
    seeds = f"s.d. {tables.score(spread.value[i])}"
    return join(text, " ", tag("span", seeds, class_="minor"))

  rows = []
  for i, tap in enumerate(taps):
    rows.append(
      [
        _named(tap, summary),
        tables.with_interval(*(part[i] for part in scores)),
        random(i),
        tables.with_interval(*(part[i] for part in gained), signed=True),
        tables.with_interval(*(part[i] for part in beside), signed=True),
        tables.with_interval(*(part[i] for part in loss), signed=True),
        tables.percent(chosen.value[i], 1),
        _whole(channels[i]),
        tables.with_note(
          tables.quantity(params[i]), tables.percent(params[i], params[-1])
        ),
        tables.quantity(macs[i]),
        tables.with_note(tables.rate(speed[i]), _times(speed[i], speed[-1])),
        tables.memory(memory[i]),
      ]
    )
  header = [
    "tap",
    f"test {metric}",
    "random weights",
    "gain",
    "against the cut",
    "against best (validation)",
    "chosen (validation)",
    "channels",
    "parameters",
    "MACs",
    "images/s",
    "peak memory",
  ]
  # What no run measured takes no column.
  columns = [
    j
    for j in range(len(header))
    if j < 2 or any(row[j] != tables.ABSENT for row in rows)
  ]
  words = f"Probe: {_probe(probe)}. Intervals in brackets."
  if beside.measured:
    words += (
      " Against the cut: test scores, paired; where the interval holds zero"
      " these images cannot tell the two apart."
    )
  if chosen.measured:
    words += " Chosen: in how many resamples of the validation split."
  if spread.measured:
    words += " s.d.: the spread over random networks."
  if taps:
    words += (
      " Percentages and factors compare parameters and speed with the deepest "
      f"tap, {taps[-1]}."
    )
  checked = summary.get("sum_over_whole") or {}
  if 0 < len(checked) < len(taps):
    ratios = [tables.finite(ratio) for ratio in checked.values()]
    words += (
      " Speeds between the ends of stages are sums over layers, each timed"
      " alone, brought to the networks cut at the ends and timed whole"
    )
    words += f" (sums were {min(ratios):.2f} to {max(ratios):.2f} of these)."
  return tables.table(
    words,
    [header[j] for j in columns],
    [[row[j] for j in columns] for row in rows],
    ["chosen" if tap == summary.get("cut") else None for tap in taps],
  )


def _named(tap: str, summary: Mapping[str, Any]) -> Html:
  roles = [role for role in ("cut", "best") if summary.get(role) == tap]
  return join(tap, *(tag("span", role, class_="role") for role in roles))


def _whole(value: float) -> str:
  return f"{value:,.0f}" if math.isfinite(value) else tables.ABSENT


def _times(value: float, full: float) -> str:
  if not math.isfinite(value + full) or full <= 0:
    return tables.ABSENT
  return f"{value / full:.1f}×"


def _metric(summary: Mapping[str, Any]) -> str:
  return results.metric_name(summary.get("metric"))


def _probe(name: str | None) -> str:
  return PROBES.get(name or "", str(name or "unnamed probe"))


def _scores(
  summary: Mapping[str, Any],
  measurements: Measurements,
  *,
  kind: str | None = None,
  weights: str | None = None,
) -> Series:
  """Returns the main metric on the test split, or a quantity made from it."""
  metric = summary.get("metric")
  return measurements.series(
    summary["taps"],
    f"{metric}:{kind}" if kind else metric,
    weights=weights or summary.get("weights"),
    probe=summary.get("probe"),
    split="test",
  )


def _marks(summary: Mapping[str, Any]) -> list[Mark]:
  cut, best = summary.get("cut"), summary.get("best")
  if cut is not None and cut == best:
    return [Mark(cut, "cut and best")]
  marks, taps = [], summary["taps"]
  if cut is not None and cut in taps:
    marks.append(Mark(cut, "cut"))
  if best is not None and best in taps:
    marks.append(Mark(best, "best", figures.GREEN, "--"))
  return marks


def _pretrained_and_random(
  summary: Mapping[str, Any],
  measurements: Measurements,
  axis: figures.Axes,
  probe: str | None,
) -> None:
  taps = summary["taps"]
  selection = {"metric": summary.get("metric"), "probe": probe, "split": "test"}
  seeds = measurements.values_of("seed", weights=_RANDOM, **selection)
  random = measurements.series(taps, weights=_RANDOM, **selection)
  if random.measured or seeds:
    figures.draw_curve(
      axis,
      random,
      label="random weights, mean",
      colour=figures.GREY,
      line="--",
      marker="s",
      members=[
        measurements.series(taps, weights=_RANDOM, seed=seed, **selection)
        for seed in seeds
      ],
      members_label="single random networks",
    )
  if summary.get("weights") != _RANDOM:
    figures.draw_curve(
      axis,
      measurements.series(taps, weights=summary.get("weights"), **selection),
      label="pretrained",
      colour=figures.BLUE,
    )
