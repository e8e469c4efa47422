import html.parser
import re
import warnings

import numpy as np
import pytest

from jaxtransfer.report import figures, finetune, markup, page, truncate
from tests.report import example
from tests.report.figures_test import assert_legible


def drawn(results):
  summary = results["summary"]
  found = {
    "search": truncate.search(summary),
    "pareto": truncate.pareto(summary),
    "learning": truncate.learning(summary),
    "ranking": finetune.ranking(
      [(curves["name"], curves) for curves in summary["curves"]]
    ),
    "confusion": finetune.confusion(summary),
    "reliability": finetune.reliability(summary),
  }
  return {name: figure for name, figure in found.items() if figure}


def line(axis, label):
  """Returns the line whose name in the legend begins so."""
  return next(x for x in axis.get_lines() if x.get_label().startswith(label))


class _Page(html.parser.HTMLParser):
  """A page's words, its elements, and the rows of its tables."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.words, self.rows = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("th", "td"):
      self.rows[-1].append("")

  def handle_data(self, data):
    self.words.append(data)
    if self.rows and self.rows[-1]:
      self.rows[-1][-1] += data

  @property
  def text(self):
    return re.sub(r"\s+", " ", "".join(self.words))


def written(tmp_path, results):
  return _Page(page.write(tmp_path, results).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
  "kind",
  [
    {},
    {"taps": example.RESNET18, "cut": 0, "seeds": 1, "methods": ("ttl",)},
    {"taps": ["layer1", "layer2"], "cut": 1, "classes": ("n" * 60, "p")},
    {"taps": example.densenet_taps(), "cut": 62, "methods": ("ttl", "fat")},
  ],
  ids=["17", "9", "2", "63"],
)
def test_nothing_is_cut_off_and_no_names_overlap(kind):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for name, figure in drawn(example.truncate_results(**kind)).items():
      assert_legible(name, figure)


def test_search_draws_every_method_at_its_place_in_the_network():
  """In whichever order it was trained, and where only some cuts were."""
  results = example.truncate_results()
  summary = results["summary"]
  rng = np.random.default_rng(0)
  kept = rng.permutation(summary["search"])[:40].tolist()
  axis = truncate.search(summary | {"search": kept}).axes[0]
  for method, name in (("ttl", "TTL"), ("lwft", "LWFT"), ("tf", "TF")):
    expected = sorted(
      (summary["taps"].index(item["cut"]), item["value"])
      for item in kept
      if item["method"] == method
    )
    found = line(axis, f"{name}:")
    np.testing.assert_array_equal(np.transpose(found.get_data()), expected)


def test_seeds_of_ttl_stand_behind_their_mean_with_its_interval():
  results = example.truncate_results(methods=("ttl", "fat"), seeds=3)
  items = [i for i in results["summary"]["search"] if i["method"] == "ttl"]
  axis = truncate.search(results["summary"]).axes[0]
  dots = np.concatenate(
    [c.get_offsets() for c in axis.collections if len(c.get_offsets()) == 3]
  )
  np.testing.assert_allclose(
    dots[:, 1], [v for i in items for v in i["values"]]
  )
  bars = [
    segment[:, 1]
    for c in axis.collections
    if hasattr(c, "get_segments")
    for segment in c.get_segments()
  ]
  np.testing.assert_allclose(bars, [(i["low"], i["high"]) for i in items])


def test_macs_are_shares_of_the_whole_network():
  results = example.truncate_results()
  axis = truncate.search(results["summary"]).axes[1]
  found = [bar.get_height() for bar in axis.patches]
  macs = [i["macs"] for i in results["summary"]["search"]][:17]
  np.testing.assert_allclose(found, 100 * np.array(macs) / macs[-1])


def test_what_was_stopped_is_hollow_and_not_joined():
  results = example.truncate_results(methods=("ttl",))
  search = results["summary"]["search"]
  search[3]["stopped"] = "dropped after 4 epochs"
  search[4] |= {"stopped": "1 of 3 trainings failed", "value": None}
  axis = truncate.search(results["summary"]).axes[0]
  whole = line(axis, "TTL")
  assert whole.get_xdata().tolist() == [0, 1, 2, *range(5, 17)]
  hollow = [x for x in axis.get_lines() if x.get_markerfacecolor() == "white"]
  assert [x.get_xdata().tolist() for x in hollow] == [[3]]


def test_the_front_is_of_the_tables_rows_and_the_chosen_is_named():
  results = example.truncate_results()
  rows = results["summary"]["table"]
  cost = np.array([row["macs"] for row in rows], float)
  score = np.array([row["test"]["auroc"]["mean"] for row in rows])
  front = figures.pareto_front(cost, score)
  axis, other = truncate.pareto(results["summary"]).axes
  points = next(c for c in axis.collections if c.get_label() == "on the front")
  found = np.sort(points.get_offsets()[:, 0])
  np.testing.assert_array_equal(found, np.sort(cost[front]))
  for panel in (axis, other):
    assert "TTL-2" in [text.get_text() for text in panel.texts]


def test_equal_names_are_told_apart_by_their_weights():
  results = example.truncate_results()
  header, *rows = _Page(truncate.network_table(results["summary"])).rows
  names = [row[0] for row in rows]
  assert len(set(names)) == len(names) == 20
  assert names[0].startswith("TTL-2chosen")
  assert sum(", random" in name for name in names) == 8
  # A small network is always random; nothing needs to be told apart.
  assert names[-1].startswith("CBR-Tinya small network")


def test_table_says_of_every_network_what_was_measured():
  results = example.truncate_results()
  header, *rows = _Page(truncate.network_table(results["summary"])).rows
  for row, item in zip(rows, results["summary"]["table"], strict=True):
    cells = dict(zip(header, row, strict=True))
    test = item["test"]["auprc"]
    assert cells["test AUPRC"] == (
      f"{test['mean']:.3f} ± {test['sd']:.3f}"
      f" [{test['low']:.3f}, {test['high']:.3f}]"
    )
    assert cells["test accuracy"].startswith(
      f"{item['test']['accuracy']['mean']:.3f} balanced"
    )
    assert cells["latency, batch 1"] == f"{item['latency_ms']:.3g} ms"
    assert cells["training"].endswith("14.3 epochs")
  assert rows[2][header.index("MACs")].endswith(" 100 %")


def test_one_seed_has_no_spread():
  results = example.truncate_results(seeds=1)
  assert (
    "±" not in truncate.network_table(results["summary"]).split("<table")[1]
  )
  words = truncate.content(results["summary"], None)
  caption = words.sections[0].blocks[0].caption
  assert "one training" in caption and "pale dots" not in caption


def test_learning_has_a_line_for_every_repeat():
  results = example.truncate_results(seeds=3)
  losses, scores = truncate.learning(results["summary"]).axes
  assert len(losses.get_lines()) == 2 * 2 * 3
  expected = [
    [record["val"]["auroc"] for record in run]
    for network in results["summary"]["learning"]
    for run in network["epochs"]
  ]
  found = [list(x.get_ydata()) for x in scores.get_lines()]
  assert sorted(found) == sorted(expected)


def test_the_page_holds_every_section_and_every_failure(tmp_path):
  failed = [{"unit": "lwft-layer2.3-1", "reason": "the loss is <nan>"}]
  halving = "The worse half was dropped twice."
  results = example.truncate_results(failed=failed, halving=halving)
  read = written(tmp_path, results)
  assert read.tags.count("svg") == 6
  for words in ("the loss is <nan>", halving, "224 px", "seed 1", "3 seeds"):
    assert words in read.text
  drawings = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
  assert drawings == set(drawn(results))


@pytest.mark.slow
def test_a_run_without_failures_does_not_speak_of_them(tmp_path):
  assert "What failed" not in written(tmp_path, example.truncate_results()).text


@pytest.mark.slow
def test_what_is_missing_is_left_out(tmp_path):
  """Whatever is null, or not there, takes its figure with it and no more."""
  results = example.truncate_results(example.RESNET18, cut=5)
  whole = results["summary"]
  keys = ("search", "table", "learning", "curves", "confusion", "reliability")
  for key in keys:
    for nothing in (None, []):
      content = truncate.content(whole | {key: nothing}, None)
      blocks = [b for section in content.sections for b in section.blocks]
      assert sum(isinstance(b, markup.Picture) for b in blocks) == 5, key
  read = written(tmp_path, results | {"summary": dict.fromkeys(whole)})
  assert "svg" not in read.tags
  assert not re.search(r"\b(nan|NaN|inf|None)\b", read.text)


@pytest.mark.slow
def test_single_values_that_are_missing_do_not_stop_the_page(tmp_path):
  results = example.truncate_results(example.RESNET18, cut=5)
  rng = np.random.default_rng(3)

  def holes(value):
    if isinstance(value, dict):
      return {key: holes(inner) for key, inner in value.items()}
    if isinstance(value, list):
      return [holes(inner) for inner in value]
    missing = isinstance(value, float) and rng.random() < 0.3
    return None if missing else value

  summary = results["summary"]
  for key in ("search", "table", "learning", "curves", "reliability"):
    summary[key] = holes(summary[key])
  for row in summary["table"][::3]:
    row["test"] = None
  read = written(tmp_path, results)
  assert read.tags.count("svg") == 6
  assert not re.search(r"\b(nan|NaN|inf|None)\b", read.text)


@pytest.mark.slow
def test_names_cannot_become_markup(tmp_path):
  evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
  results = example.truncate_results(
    ["layer1", evil], cut=1, classes=(evil, "b"), repeats=evil, halving=evil
  )
  summary = results["summary"]
  for row in summary["table"]:
    row |= {"name": evil, "words": evil}
  for item in summary["search"]:
    item |= {"stage": evil, "stopped": evil, "method": evil}
  for network in (*summary["curves"], *summary["learning"]):
    network["name"] = evil
  summary["failed"] = [{"unit": evil, "reason": evil}]
  read = written(tmp_path, results)
  assert "script" not in read.tags and "img" not in read.tags


@pytest.mark.slow
def test_equal_results_give_equal_pages(tmp_path):
  results = example.truncate_results(["layer1", "layer2"], cut=1)
  first = page.write(tmp_path / "a", results).read_bytes()
  assert page.write(tmp_path / "b", results).read_bytes() == first
