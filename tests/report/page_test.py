import html
import html.parser
import re

import numpy as np
import pytest

from jaxtransfer.report import page
from tests.report import example

VOID = {"meta", "br", "hr", "col", "img", "input"}


class _Page(html.parser.HTMLParser):
  """Reads a page strictly: every element is closed where it should be."""

  def __init__(self, text):
    super().__init__()
    self.open, self.words, self.links, self.tags = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f"never closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    names = [name for name, _ in attrs]
    assert len(names) == len(set(names)), f"{tag} says something twice"
    self.links += [
      (tag, name, value) for name, value in attrs if name in ("src", "href")
    ]
    assert not [name for name in names if name.startswith("on")]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.open.pop()

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f"</{tag}> out of place"

  def handle_data(self, data):
    if not self.open or self.open[-1] not in ("style",):
      self.words.append(data)

  @property
  def text(self):
    return re.sub(r"\s+", " ", "".join(self.words))


def written(tmp_path, results):
  path = page.write(tmp_path, results)
  return _Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def typical(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("typical")
  return workdir, written(workdir, example.results())


def test_the_page_is_balanced_and_says_what_was_found(typical):
  _, read = typical
  summary = example.results()["summary"]
  text = read.text.replace("\u00a0", " ")
  for words in (
    summary["sentence"],
    summary["rule"],
    summary["interval"],
    summary["run"]["command"],
    "3 images were left out",
    "lung_aca, lung_n, lung_scc",
    "train 171, val 57, test 57",
    "extracting 3 min",
    "jax 0.10.2",
    "c73c001",
  ):
    assert words in text
  assert read.tags.count("svg") == 5 and read.tags.count("h1") == 1
  ids = re.findall(r'\bid="', (typical[0] / "report.html").read_text())
  assert len(ids) > 100


def test_the_page_needs_nothing_but_itself(typical):
  """No script, and nothing is fetched: only links that a reader may follow.

  The policy in the page's head makes a browser hold to the same.
  """
  workdir, read = typical
  text = (workdir / "report.html").read_text(encoding="utf-8")
  assert "script" not in read.tags and "link" not in read.tags
  assert "default-src 'none'" in html.unescape(text)
  for element, name, value in read.links:
    assert name == "href"
    assert value.startswith("#") if element == "use" else element == "a"
    assert "//" not in value
  assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)", text))
  assert "@import" not in text and "@font-face" not in text


def test_the_files_the_page_names_are_there_and_no_others(typical):
  workdir, read = typical
  names = {"curve", "rule", "gain", "pareto", "probes"}
  drawn = {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
  assert {p.name for p in (workdir / "figures").iterdir()} == drawn
  assert {p.name for p in workdir.iterdir()} == {
    "figures",
    "report.html",
    "results.csv",
  }
  linked = {value for tag, _, value in read.links if tag == "a"}
  # The job itself leaves these.
  linked -= {"config.json", "results.json", "failures.csv"}
  assert all((workdir / name).is_file() for name in linked)


def test_names_cannot_become_markup(tmp_path):
  evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
  results = example.results(
    ["stem", evil],
    cut=1,
    best=1,
    seeds=0,
    probes=("logistic",),
    classes=[evil, "b"],
    sentence=evil,
    rule=evil,
    network=evil,
    weights=evil,
    data=evil,
    notes=[evil],
    groups={evil: 3},
    normalisation={evil: [0.5]},
    interval=evil,
    run={"command": evil, "versions": {evil: evil}},
  )
  for row in results["measurements"]:
    row["weights"] = evil
  read = written(tmp_path, results)
  assert "script" not in read.tags and "img" not in read.tags
  assert read.text.count("<script>alert(1)</script>") >= 10


def test_a_page_without_any_value_is_still_a_page(tmp_path):
  """Whatever is null is left out; nothing is made up for it."""
  results = example.results(seeds=2)
  for row in results["measurements"]:
    row.update(value=None, low=None, high=None, n=None)
  keep = ("taps",)
  summary = {k: v if k in keep else None for k, v in results["summary"].items()}
  for case in (
    {"job": "layers", "summary": summary, "measurements": []},
    results | {"summary": results["summary"] | {"cut": None, "best": None}},
    {"job": "layers", "summary": {}, "measurements": []},
    {"job": "layers", "summary": None, "measurements": None},
    {"job": "layers"},
  ):
    read = written(tmp_path, case)
    assert "svg" not in read.tags
    assert not re.search(r"\b(nan|NaN|inf|None)\b", read.text)


def test_single_values_that_are_missing_do_not_stop_the_page(tmp_path):
  results = example.results(seeds=1)
  rng = np.random.default_rng(5)
  missing = (None, float("nan"), float("inf"))
  for row in results["measurements"]:
    row[("value", "low", "high")[rng.integers(3)]] = missing[rng.integers(3)]
  read = written(tmp_path, results)
  assert read.tags.count("svg") == 5
  assert not re.search(r"\b(nan|NaN|inf|None)\b", read.text)


def test_ten_thousand_classes_and_long_names_stay_short(tmp_path):
  results = example.results(
    ["layer1", "layer2"],
    cut=0,
    best=1,
    seeds=0,
    probes=("logistic",),
    classes=[f"class {i} " + "x" * 3000 for i in range(10_000)],
    notes=[f"note {i}" for i in range(300)],
    data="d" * 5000,
  )
  read = written(tmp_path, results)
  assert "10,000: class 0" in read.text and "9,980 more" in read.text
  assert "class 500 " not in read.text and "note 40" not in read.text
  assert "280 more" in read.text


def test_few_measurements_stand_in_the_page_and_many_beside_it(tmp_path):
  few = example.results(
    ["layer1", "layer2"], cut=0, best=1, seeds=0, probes=("logistic",)
  )
  count = len(few["measurements"])
  read = written(tmp_path, few)
  assert read.tags.count("tr") == 1 + 2 + 1 + count
  many = few | {"measurements": few["measurements"] * (500 // count + 1)}
  read = written(tmp_path, many)
  assert read.tags.count("tr") == 1 + 2
  assert f"All {len(many['measurements']):,} measurements" in read.text


@pytest.mark.slow
def test_equal_results_give_equal_pages(tmp_path):
  results = example.results(["layer1", "layer2"], cut=0, best=1, seeds=1)
  first = page.write(tmp_path / "a", results).read_bytes()
  assert page.write(tmp_path / "b", results).read_bytes() == first


def test_a_job_without_figures_has_its_sentence_and_its_rows(tmp_path):
  results = {
    "job": "elsewhere",
    "summary": {"sentence": "It is so."},
    "measurements": [{"metric": "accuracy", "value": 0.5}],
  }
  read = written(tmp_path, results)
  assert "It is so." in read.text and "accuracy" in read.text
