"""Scores of tiles: what is refused, how they are ranked and written."""

import csv
import json

import matplotlib
import numpy as np
import pytest

from jaxtransfer.report import tile_scores

HOSTILE = '</script><img src=x onerror=alert(1)> "P": \u00e4,\n'


def view(count=40, *, extent=512, seed=0, **changes):
  """Returns a slide whose tiles stand in rows of eight."""
  rng = np.random.default_rng(seed)
  places = np.arange(count)
  coords = np.stack([places % 8, places // 8], axis=1) * int(extent)
  weights = rng.gamma(0.3, size=count).astype(np.float32)
  said = {
    "name": "slide",
    "coords": coords.astype(np.int64) + [1000, 3000],
    "extent": extent,
    "scores": {
      "attention": weights / max(weights.sum(), 1e-30),
      "P(tumour)": rng.random(count, np.float32),
    },
  }
  return tile_scores.View(**said | changes)


def test_a_percentile_is_the_share_of_tiles_that_score_less_or_as_much():
  """Written out: those below count whole, those equal share their mean rank."""
  rng = np.random.default_rng(1)
  values = rng.integers(0, 9, 50).astype(np.float32)
  expected = [
    ((values < v).sum() + ((values == v).sum() + 1) / 2) / 50 for v in values
  ]
  np.testing.assert_allclose(tile_scores.percentiles(values), expected)
  assert tile_scores.percentiles(np.array([3.0])).tolist() == [1]
  assert tile_scores.percentiles(np.zeros(0)).tolist() == []
  # All alike: nobody is first, and the mean is what it is of any ranks.
  assert set(tile_scores.percentiles(np.ones(4))) == {2.5 / 4}


def test_the_extremes_are_in_order_and_no_tile_is_both():
  rng = np.random.default_rng(2)
  values = rng.integers(0, 5, 30).astype(np.float32)
  most, least = tile_scores.extremes(values, 6)
  order = sorted(range(30), key=lambda i: (-values[i], i))
  assert most.tolist() == order[:6]
  assert least.tolist() == sorted(range(30), key=lambda i: (values[i], i))[:6]
  for count in range(6):
    most, least = tile_scores.extremes(values[:count], 4)
    assert len({*most.tolist(), *least.tolist()}) == count
    assert len(most) == -(-count // 2)
  # Where all are alike, too.
  most, least = tile_scores.extremes(np.ones(5), 3)
  assert most.tolist() == [0, 1, 2] and least.tolist() == [3, 4]


def test_attention_is_shown_as_multiples_of_the_even_share():
  shown = view().shown["attention"]
  np.testing.assert_allclose(shown.mean(), 1, rtol=1e-6)
  even = view(8, scores={"attention": np.full(8, 1 / 8)})
  np.testing.assert_allclose(even.shown["attention"], 1)
  np.testing.assert_array_equal(
    view().shown["P(tumour)"], view().scores["P(tumour)"]
  )


def test_weights_that_padding_took_a_part_of_are_refused():
  """As those before the mask: of the padded bag, cut to the tiles."""
  rng = np.random.default_rng(3)
  logits = rng.normal(size=64)
  over_all = np.exp(logits) / np.exp(logits).sum()
  with pytest.raises(ValueError, match=r"slide: the weights of attention sum"):
    view(40, scores={"attention": over_all[:40]})
  with pytest.raises(ValueError, match="not to 1"):
    view(40, scores={"attention for class a": logits[:40]})
  masked = np.exp(logits[:40]) / np.exp(logits[:40]).sum()
  view(40, scores={"attention": masked.astype(np.float16)})


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"coords": np.zeros((40, 3), np.int64)}, "coords"),
    ({"scores": {}}, "no scores"),
    ({"extent": 0}, "no extent"),
    ({"scores": {"a": np.zeros(39)}}, "40 tiles"),
    ({"scores": {"a": np.full(40, np.nan)}}, "one finite number"),
    ({"scores": {"P(a)": np.full(40, 1.2)}}, "not from 0 to 1"),
  ],
)
def test_what_does_not_fit_together_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    view(**changes)


def test_csv_has_a_row_for_every_tile(tmp_path):
  slide = view(name=HOSTILE)
  tile_scores.write_csv(tmp_path / "scores.csv", slide)
  with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as f:
    rows = list(csv.DictReader(f))
  assert list(rows[0]) == [
    "slide",
    "x",
    "y",
    "extent",
    "attention",
    "attention_percentile",
    "P(tumour)",
    "P(tumour)_percentile",
  ]
  # A line break in a name is written as it is in Python.
  assert {row["slide"] for row in rows} == {HOSTILE.replace("\n", "\\n")}
  places = [[int(row["x"]), int(row["y"])] for row in rows]
  np.testing.assert_array_equal(places, slide.coords)
  for label, values in slide.shown.items():
    written = np.array([float(row[label]) for row in rows], np.float32)
    np.testing.assert_allclose(written, values, rtol=1e-6)
    ranks = np.array([float(row[f"{label}_percentile"]) for row in rows])
    assert np.argsort(ranks).tolist() == np.argsort(values).tolist()
    assert 0 < ranks.min() and ranks.max() == 1


def test_geojson_is_what_qupath_reads(tmp_path):
  """A closed square per tile at level 0, numbers as measurements, and a class
  that QuPath takes for one name."""
  slide = view(extent=512.25)
  tile_scores.write_geojson(tmp_path / "a.geojson", slide)
  text = (tmp_path / "a.geojson").read_text(encoding="utf-8")
  collection = json.loads(text)
  assert collection["type"] == "FeatureCollection"
  assert len(collection["features"]) == 40
  for i, feature in enumerate(collection["features"]):
    assert feature["type"] == "Feature"
    assert feature["geometry"]["type"] == "Polygon"
    (ring,) = feature["geometry"]["coordinates"]
    ring = np.array(ring)
    assert ring[0].tolist() == ring[-1].tolist() == slide.coords[i].tolist()
    assert np.ptp(ring, axis=0).tolist() == [512.25, 512.25]
    x, y = ring.T
    area = (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2
    np.testing.assert_allclose(abs(area), 512.25**2)
    properties = feature["properties"]
    assert properties["objectType"] == "tile"
    measured = properties["measurements"]
    for label, values in slide.shown.items():
      np.testing.assert_allclose(measured[label], values[i], rtol=1e-6)
      share = 100 * tile_scores.percentiles(values)[i]
      np.testing.assert_allclose(measured[f"{label} percentile"], share)


def test_classes_are_tenths_in_the_colours_of_the_map(tmp_path):
  weights = np.arange(1, 101) / 5050
  slide = view(100, scores={"attention: a": weights})
  tile_scores.write_geojson(tmp_path / "a.geojson", slide)
  features = json.loads((tmp_path / "a.geojson").read_text())["features"]
  classes = [f["properties"]["classification"] for f in features]
  names = [c["name"] for c in classes]
  # Percentiles from 1 to 100: ten in each.
  assert names[:10] == ["attention  a 0-10 %"] * 10
  assert names[90:] == ["attention  a 90-100 %"] * 10
  assert len(set(names)) == 10
  highest = matplotlib.colormaps["viridis"](0.95, bytes=True)
  assert classes[-1]["color"] == [int(c) for c in highest[:3]]


def test_labels_are_text_in_geojson(tmp_path):
  slide = view(3, scores={f"P({HOSTILE})": np.array([0.2, 0.9, 0.5])})
  tile_scores.write_geojson(tmp_path / "a.geojson", slide)
  features = json.loads((tmp_path / "a.geojson").read_text())["features"]
  written = HOSTILE.replace("\n", "\\n")
  for feature, value in zip(features, (0.2, 0.9, 0.5), strict=True):
    assert feature["properties"]["measurements"][f"P({written})"] == value
    assert ":" not in feature["properties"]["classification"]["name"]


def test_a_slide_without_tiles_has_files_without_tiles(tmp_path):
  empty = view(0, scores={"attention": np.zeros(0, np.float32)})
  tile_scores.write_csv(tmp_path / "a.csv", empty)
  tile_scores.write_geojson(tmp_path / "a.geojson", empty)
  assert len((tmp_path / "a.csv").read_text().splitlines()) == 1
  text = (tmp_path / "a.geojson").read_text()
  assert json.loads(text) == {"type": "FeatureCollection", "features": []}
