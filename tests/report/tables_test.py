import csv
import math

import numpy as np
import pytest

from jaxtransfer.report import tables
from jaxtransfer.report.markup import Html, join, tag
from tests.report import example


def test_results_csv_holds_every_row_in_the_order_of_the_columns(tmp_path):
  """Read back, a field is what the row says and empty where it is null."""
  rows = example.results(seeds=1)["measurements"]
  rows[0]["value"] = float("nan")
  rows[1]["tap"] = 'a, "b"\nc'
  path = tmp_path / "results.csv"
  tables.write_results_csv(path, rows)
  with open(path, newline="", encoding="utf-8") as f:
    header, *read = csv.reader(f)
  assert header == (
    "network weights tap probe metric split value low high n seed".split()
  )
  assert len(read) == len(rows)
  assert read[0][6] == "" and read[1][2] == 'a, "b"\nc'
  for fields, row in zip(read[2:], rows[2:], strict=True):
    for field, key in zip(fields, header, strict=True):
      value = row[key]
      if value is None:
        assert field == ""
      elif isinstance(value, str):
        assert field == value
      else:
        assert float(field) == value


@pytest.mark.parametrize(
  "value, text",
  [
    (0, "0"),
    (64, "64.0"),
    (999.4, "999"),
    (999.7, "1.00 k"),
    (11_176_512, "11.2 M"),
    (9_999_999, "10.0 M"),
    (1_814_083_944, "1.81 G"),
    (math.nan, "–"),
    (math.inf, "–"),
  ],
)
def test_quantity_has_three_digits_and_the_right_prefix(value, text):
  assert tables.quantity(value) == text


def test_numbers_read_as_they_should():
  assert tables.quantity(8e6, trim=True) == "8 M"
  assert tables.quantity(800e6, trim=True) == "800 M"
  assert tables.quantity(1.6e9, trim=True) == "1.6 G"
  assert tables.memory(180 * 2**20) == "180 MiB"
  assert tables.memory(1536 * 2**20) == "1.50 GiB"
  assert tables.seconds(12.34) == "12.3 s"
  assert tables.seconds(184) == "3 min"
  assert tables.seconds(2 * 3600 + 300) == "2 h 05 min"
  assert tables.score(0.9124) == "0.912"
  assert tables.score(-0.0314, signed=True) == "−0.031"
  assert tables.score(0.0314, signed=True) == "+0.031"
  assert tables.score(-0.0001, signed=True) == "0.000"
  assert tables.score(math.nan) == "–"
  assert tables.with_interval(0.5, math.nan, 0.6) == "0.500"


@pytest.mark.parametrize("value", [None, "0.5", True, math.inf, math.nan, []])
def test_what_is_no_finite_number_counts_as_not_measured(value):
  assert math.isnan(tables.finite(value))


def test_series_follow_the_taps_and_tell_null_from_any():
  rows = [
    {"weights": "w", "tap": "b", "metric": "m", "seed": None, "value": 2},
    {"weights": "w", "tap": "a", "metric": "m", "seed": 0, "value": 9},
    {"weights": "w", "tap": "a", "metric": "m", "seed": None, "value": 1},
  ]
  found = tables.Measurements(rows)
  mean = found.series(["a", "b", "c"], "m", weights="w")
  np.testing.assert_array_equal(mean.value, [1, 2, np.nan])
  assert np.isnan(mean.low).all()
  single = found.series(["a", "b", "c"], "m", weights="w", seed=0)
  np.testing.assert_array_equal(single.value, [9, np.nan, np.nan])
  assert not found.series(["a"], "m").measured
  assert found.values_of("seed", metric="m") == [0]


def test_text_is_escaped_wherever_it_stands():
  assert tag("p", "<b>&", title='"x"') == (
    '<p title="&quot;x&quot;">&lt;b&gt;&amp;</p>'
  )
  assert join("<", Html("<i></i>"), None) == "&lt;<i></i>"
  assert tag("meta", http_equiv="a") == '<meta http-equiv="a">'
