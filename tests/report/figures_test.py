import io
import itertools
import re
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from jaxtransfer.report import figures, layers, tables
from jaxtransfer.report.tables import Measurements
from tests.report import example

DRAWN = (
  layers.curve,
  layers.rule,
  layers.gain,
  layers.pareto,
  layers.probes,
)


def drawn(results):
  rows = Measurements(results["measurements"])
  found = {f.__name__: f(results["summary"], rows) for f in DRAWN}
  return {name: figure for name, figure in found.items() if figure}


def written(figure):
  """Returns the visible texts and their boxes as they come out."""
  with figures.style():
    figure.savefig(io.BytesIO(), format="png")
  renderer = FigureCanvasAgg(figure).get_renderer()
  texts = [
    text
    for text in figure.findobj(Text)
    if text.get_visible() and text.get_text().strip()
  ]
  # A tick beyond its axis keeps its text object and is not drawn.
  shown = []
  for axis in figure.axes:
    for which in (axis.xaxis, axis.yaxis):
      low, high = sorted(which.get_view_interval())
      for tick in which.get_major_ticks():
        outside = not low - 1e-9 <= tick.get_loc() <= high + 1e-9
        for label in (tick.label1, tick.label2):
          if outside or not label.get_visible():
            texts = [text for text in texts if text is not label]
  for text in texts:
    shown.append((text.get_text(), text, text.get_window_extent(renderer)))
  return shown, figure.bbox


def assert_legible(name, figure):
  """Every text lies inside the figure and none touches another.

  Boxes of slanted names overlap where the names do not, so those are held
  against each other only through their distance along the axis.
  """
  texts, canvas = written(figure)
  for words, _, box in texts:
    inside = canvas.x0 - 1 <= box.x0 and box.x1 <= canvas.x1 + 1
    inside &= canvas.y0 - 1 <= box.y0 and box.y1 <= canvas.y1 + 1
    assert inside, f"{name}: {words!r} is cut off"
  straight = [t for t in texts if t[1].get_rotation() in (0, 90)]
  for (a, _, box), (b, _, other) in itertools.combinations(straight, 2):
    assert not box.overlaps(other), f"{name}: {a!r} touches {b!r}"
  slanted = [t for t in texts if t[1].get_rotation() == 45]
  for axis in figure.axes:
    ends = sorted(t[2].x1 for t in slanted if t[1].axes is axis)
    # 8 points high at 45 degrees: neighbours need 8 * sqrt(2) points.
    gaps = np.diff(ends) * 72 / figure.dpi
    assert (gaps > 11.3).all(), f"{name}: names run into each other"


@pytest.mark.parametrize(
  "taps, cut, best",
  [
    (["stem"], 0, 0),
    (["layer1", "layer2", "layer3"], 0, 2),
    (example.RESNET18, 5, 7),
    (example.RESNET18, 7, 6),
    (["stem"] + [f"layer{i % 4 + 1}.{i}" for i in range(16)], 2, 16),
    pytest.param(
      *(example.densenet_taps((6, 12, 48, 32)), 0, 101), marks=pytest.mark.slow
    ),
  ],
  ids=["1", "3", "9", "9-swapped", "17", "103"],
)
def test_nothing_is_cut_off_and_no_names_overlap(taps, cut, best):
  results = example.results(
    taps, cut=cut, best=best, seeds=1, probes=("logistic", "linear_svm")
  )
  for name, figure in drawn(results).items():
    assert_legible(name, figure)


def test_marked_taps_keep_their_names_when_names_are_thinned():
  """With 103 taps not every name fits, the cut's and the best's always do."""
  taps = example.densenet_taps((6, 12, 48, 32))
  results = example.results(taps, cut=41, best=77, seeds=0)
  axis = drawn(results)["curve"].axes[-1]
  named = [label.get_text() for label in axis.get_xticklabels()]
  assert {taps[0], taps[41], taps[77], taps[-1]} <= set(named)
  assert {tap for tap in taps if "." not in tap} <= set(named)
  assert len(named) < len(taps)
  assert len(axis.get_xticks(minor=True)) + len(named) >= len(taps)


def test_front_is_what_no_other_point_beats():
  """Against the definition, point by point, with ties and gaps."""
  rng = np.random.default_rng(3)
  cost = rng.integers(1, 8, 60).astype(float)
  score = rng.integers(1, 8, 60).astype(float)
  cost[3] = score[5] = np.nan
  front = figures.pareto_front(cost, score)
  for i in range(60):
    beaten = any(
      cost[j] <= cost[i]
      and score[j] >= score[i]
      and (cost[j] < cost[i] or score[j] > score[i])
      for j in range(60)
    )
    known = np.isfinite(cost[i]) and np.isfinite(score[i])
    assert front[i] == (known and not beaten)


def test_inlined_figures_share_no_id_and_find_their_own(tmp_path):
  """Two SVGs in one page must not take each other's glyphs and clips."""
  found = drawn(example.results(seeds=1))
  svgs = {
    name: figures.save(figure, tmp_path, name) for name, figure in found.items()
  }
  ids = [i for svg in svgs.values() for i in re.findall(r'\bid="([^"]*)"', svg)]
  assert ids and len(ids) == len(set(ids))
  for svg in svgs.values():
    own = set(re.findall(r'\bid="([^"]*)"', svg))
    used = re.findall(r'href="#([^"]*)"', svg)
    used += re.findall(r"url\(#([^)]*)\)", svg)
    assert used and set(used) <= own
    # A style sheet or a script inside would reach the whole page.
    assert not re.search(r"<(style|script|metadata|text|image)\b", svg)


def test_equal_rows_give_equal_files(tmp_path):
  """No date, no random id: a report can be compared by its bytes."""
  for place in ("a", "b"):
    figure = drawn(example.results(seeds=2))["curve"]
    figures.save(figure, tmp_path / place, "curve")
  for ending in ("svg", "png"):
    name = f"curve.{ending}"
    first, second = tmp_path / "a" / name, tmp_path / "b" / name
    assert first.read_bytes() == second.read_bytes()
  assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
    "curve.png",
    "curve.svg",
  ]


def test_the_users_matplotlib_settings_neither_change_nor_matter(tmp_path):
  with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none"}):
    before = dict(matplotlib.rcParams)
    svg = figures.save(drawn(example.results(seeds=1))["rule"], tmp_path, "r")
    assert dict(matplotlib.rcParams) == before
  plain = figures.save(drawn(example.results(seeds=1))["rule"], tmp_path, "r")
  assert svg == plain


@pytest.mark.slow
def test_every_figure_is_drawn_without_a_warning(tmp_path):
  """No missing glyph, no empty mean, no collapsed layout."""
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for kind in ({}, {"seeds": 0, "cost": False}, {"lift": -0.1}):
      results = example.results(["stem", "$x_1^2$", "layer2"], cut=1, best=1)
      results = example.results(**kind) if kind else results
      for name, figure in drawn(results).items():
        figures.save(figure, tmp_path, name)


def test_names_of_crowded_points_are_dropped_rather_than_piled_up():
  """Twelve taps of nearly equal cost and score: some names cannot fit."""
  taps = [f"denseblock1.denselayer{i}" for i in range(12)]
  cost = 1e9 + 1e6 * np.arange(12.0)
  cost[0] = 1e6
  value = 0.9 + 1e-4 * np.arange(12.0)
  value[0] = 0.5
  series = tables.Series(value, value - 0.01, value + 0.01)
  marks = [figures.Mark(taps[11], "cut")]
  with figures.style():
    figure = figures.pareto_panels(taps, [(cost, "MACs")], series, marks, "s")
  texts, _ = written(figure)
  names = [text for text in texts if text[0] in taps]
  assert taps[11] in [name[0] for name in names] and len(names) < 12
  for (a, _, box), (b, _, other) in itertools.combinations(names, 2):
    assert not box.overlaps(other), f"{a!r} touches {b!r}"
