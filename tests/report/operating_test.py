"""The table of thresholds says what is positive, and hides no number."""

import html
import re

import pytest

from jaxtransfer import results
from jaxtransfer.report import operating, page
from tests.report import example


def _point(name="yes", rule="youden", **said):
  score = {"mean": 0.9, "sd": None, "low": 0.8, "high": 0.95, "values": [0.9]}
  return {
    "class": name,
    "rule": rule,
    "words": "largest sensitivity + specificity",
    "thresholds": [0.41],
    "val": {"sensitivity": 0.92, "specificity": 0.88},
    "test": {"sensitivity": score, "specificity": score | {"mean": 0.7}},
    "images": [30, 50],
    **said,
  }


def _text(table):
  return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", table)))


def test_rows_hold_every_number_with_the_images_it_is_of():
  point = _point(thresholds=[0.41, None])
  point["test"]["ppv"] = point["test"]["sensitivity"]
  rows = results.point_rows({"probe": "ttl"}, [point], [0, 1])
  assert all(set(row) == set(results.COLUMNS) for row in rows)
  found = {(row["metric"], row["split"], row["seed"]): row for row in rows}
  sensitivity = found["sensitivity@youden:yes", "test", None]
  assert (sensitivity["value"], sensitivity["low"]) == (0.9, 0.8)
  counts = {row["metric"].partition("@")[0]: row["n"] for row in rows}
  assert counts["sensitivity"] == 30
  assert counts["specificity"] == 50
  assert counts["ppv"] == 80
  assert found["threshold@youden:yes", "val", 0]["value"] == 0.41
  assert found["threshold@youden:yes", "val", 1]["value"] is None


def test_the_table_names_the_positive_class():
  summary = {"classes": ["no", "yes"]}
  text = _text(operating.table(summary, [("", [_point()])]))
  assert "Positive is yes, negative no." in text
  assert "config.prevalence gives predictive values" in text
  assert "predictive value" not in text.partition("threshold chosen for")[2]
  three = {"classes": ["a", "b", "c"], "prevalence": 0.02}
  text = _text(operating.table(three, [("", [_point("b")])]))
  assert "Positive is b, negative all other classes." in text
  assert "where 2 % are positive" in text
  text = _text(operating.table(three, [("", [_point("a"), _point("b")])]))
  assert "Each class in turn is positive, all other classes negative." in text
  many = {"classes": ["a", "b"], "multilabel": True}
  text = _text(operating.table(many, [("", [_point("a"), _point("b")])]))
  assert "its absence negative" in text


def test_an_interval_without_width_is_no_certainty():
  """All of nineteen found is found in every resample."""
  sure = {"mean": 1.0, "low": 1.0, "high": 1.0}
  for score, said in ((sure, True), (dict.fromkeys(sure), False)):
    point = _point(test={"sensitivity": score})
    text = _text(operating.table({}, [("", [point])]))
    assert ("One without width" in text) == said


def test_what_is_undefined_is_a_dash():
  nothing = dict.fromkeys(("mean", "low", "high"))
  point = _point(thresholds=[None], test={"sensitivity": nothing})
  for points in ([point], [point | {"test": None}], [{"class": "yes"}]):
    text = _text(operating.table({}, [("TTL", points), ("FTL", [_point()])]))
    assert not re.search(r"\b(nan|inf|None)\b", text), text
  assert operating.table({}, [("TTL", [])]) is None


@pytest.mark.slow
def test_pages_show_the_table_where_there_are_points(tmp_path):
  results = example.finetune_results()
  written = page.write(tmp_path, results).read_text(encoding="utf-8")
  assert "At a threshold" not in written
  results["summary"]["operating"] = [_point("positive")]
  written = page.write(tmp_path, results).read_text(encoding="utf-8")
  assert "At a threshold" in written
  assert "Positive is positive, negative negative." in written
  results = example.truncate_results(cut=3)
  first, second, whole = results["summary"]["table"][:3]
  for row in (first, whole):
    row["operating"] = [_point("lung_n", thresholds=[0.4, 0.5, 0.6])]
  whole["whole"] = True
  first["against_ftl"] = {"auroc": {"value": 0.012, "low": -0.01, "high": 0.03}}
  text = _text(page.write(tmp_path, results).read_text(encoding="utf-8"))
  assert "0.400, 0.500, 0.600" in text
  assert "+0.012 [−0.010, +0.030]" in text
