import html.parser

import numpy as np
from matplotlib.colors import to_rgba

from jaxtransfer.report import figures, layers
from jaxtransfer.report.tables import Measurements
from tests.report import example


def rows_of(results):
  return Measurements(results["measurements"])


def said(results, **wanted):
  """Returns the values of the rows that say this, by tap."""
  return {
    row["tap"]: row["value"]
    for row in results["measurements"]
    if all(row.get(key) == value for key, value in wanted.items())
  }


def test_curve_draws_the_rows_of_the_main_probe_on_test():
  results = example.results(seeds=3)
  axis = layers.curve(results["summary"], rows_of(results)).axes[0]
  lines = {line.get_label(): line for line in axis.get_lines()}
  main = {"probe": "logistic", "metric": "auroc", "split": "test"}
  for label, weights in (
    ("pretrained", "cifar10-resnet18"),
    ("random weights, mean", "random"),
  ):
    expected = said(results, weights=weights, seed=None, **main)
    drawn = lines[label].get_ydata()
    np.testing.assert_array_equal(drawn, list(expected.values()))
  # Pretrained, the mean, three single networks, and the two marks.
  assert len(axis.get_lines()) == 1 + 1 + 3 + 2


def test_curve_shows_macs_and_parameters_on_the_same_axis_of_depth():
  results = example.results(seeds=0)
  main, *costs = layers.curve(results["summary"], rows_of(results)).axes
  assert [axis.get_ylabel() for axis in costs] == ["MACs", "parameters"]
  for axis, metric in zip(costs, ("macs", "params"), strict=True):
    assert axis.get_shared_x_axes().joined(axis, main)
    heights = [bar.get_height() for bar in axis.patches]
    expected = list(said(results, metric=metric).values())
    np.testing.assert_array_equal(heights, expected)


def test_gain_bars_are_full_only_where_the_interval_excludes_zero():
  results = example.results()
  summary = results["summary"]
  by_tap = {
    row["tap"]: row
    for row in results["measurements"]
    if row["metric"] == "auroc:marginal_gain" and row["probe"] == "logistic"
  }
  axis = layers.gain(summary, rows_of(results)).axes[1]
  for tap, bar in zip(summary["taps"], axis.patches, strict=True):
    row = by_tap[tap]
    sure = row["low"] > 0 or row["high"] < 0
    expected = figures.BLUE if sure else figures.PALE_BLUE
    assert bar.get_facecolor() == to_rgba(expected)


def test_the_taps_that_the_rule_allows_are_full():
  """Full means that the whole interval lies above minus the tolerance."""
  results = example.results()
  axis = layers.rule(results["summary"], rows_of(results)).axes[0]
  points = next(c for c in axis.collections if len(c.get_offsets()) == 9)
  full = [tuple(c) == to_rgba(figures.BLUE) for c in points.get_facecolors()]
  allowed = [
    row["low"] >= -0.02
    for row in results["measurements"]
    if row["metric"] == "auroc:against_best"
  ]
  assert full == allowed and any(full) and not all(full)


def test_what_was_not_measured_is_not_drawn():
  results = example.results(seeds=0, cost=False, cut=8, best=8)
  summary, rows = results["summary"], rows_of(results)
  assert layers.gain(summary, rows) is None
  assert layers.pareto(summary, rows) is None
  assert len(layers.curve(summary, rows).axes) == 1
  empty = Measurements([])
  for draw in (layers.curve, layers.rule, layers.gain, layers.probes):
    assert draw(summary, empty) is None


def test_a_score_that_is_missing_leaves_a_gap_and_the_rest_stands():
  results = example.results(seeds=0)
  for row in results["measurements"]:
    if row["tap"] == "layer2.0":
      row["value"] = row["low"] = row["high"] = None
    if row["tap"] == "layer3.0":
      row["value"] = float("nan")
  axis = layers.curve(results["summary"], rows_of(results)).axes[0]
  line = next(x for x in axis.get_lines() if x.get_label() == "pretrained")
  gaps = np.flatnonzero(~np.isfinite(line.get_ydata()))
  assert gaps.tolist() == [3, 5]


class _Cells(html.parser.HTMLParser):
  """A table's rows as lists of text."""

  def __init__(self, text):
    super().__init__()
    self.rows = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    if tag == "tr":
      self.rows.append([])
    if tag in ("th", "td"):
      self.rows[-1].append("")

  def handle_data(self, data):
    if self.rows:
      self.rows[-1][-1] += data


def test_table_says_of_every_tap_what_the_rows_say():
  results = example.results(seeds=2)
  table = layers.tap_table(results["summary"], rows_of(results))
  header, *rows = _Cells(table).rows
  assert len(rows) == 9 and all(len(row) == len(header) for row in rows)
  main = {"probe": "logistic", "metric": "auroc", "split": "test"}
  scores = said(results, weights="cifar10-resnet18", **main)
  params = said(results, metric="params")
  speed = said(results, metric="images_per_second")
  for row, tap in zip(rows, results["summary"]["taps"], strict=True):
    cells = dict(zip(header, row, strict=True))
    assert cells["tap"].startswith(tap)
    assert cells["test AUROC"].startswith(f"{scores[tap]:.3f} [")
    share = 100 * params[tap] / params["layer4.1"]
    assert cells["parameters"].endswith(f" {share:.0f} %")
    factor = speed[tap] / speed["layer4.1"]
    assert cells["images/s"].endswith(f" {factor:.1f}×")
  assert table.count('class="chosen"') == 1


def test_table_has_no_column_for_what_no_run_measured():
  results = example.results(seeds=0, cost=False)
  header = _Cells(layers.tap_table(results["summary"], rows_of(results))).rows
  assert header[0] == ["tap", "test AUROC", "against best (validation)"]
