"""Heatmaps as a part of a page, as they are without a script."""

import base64
import hashlib
import html
import io
import itertools
import json
import re
import zlib

import matplotlib
import numpy as np
import PIL.Image
import pytest

from jaxtransfer.report import heatmap, page
from tests.report.page_test import _Page
from tests.report.tile_scores_test import HOSTILE, view

RESULTS = {"job": "slides", "summary": {"sentence": "Looked at."}}


def picture(height=60, width=80):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def overlay(text):
  """Returns the first slide's scores as (h, w, 4) uint8."""
  (data, *_) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
  image = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
  return np.asarray(image.convert("RGBA"))


def data(text):
  """Returns what stands beside each slide for the script."""
  found = re.findall(r'data-view="([^"]+)"', text)
  return [json.loads(html.unescape(said)) for said in found]


def unpacked(text, dtype):
  return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


@pytest.mark.parametrize("side", [0.3, 1.0, 3.7, 9.0])
def test_a_pixel_shows_the_nearest_tile_that_it_lies_in(side):
  """Against every pixel and tile written out, with tiles that overlap, lie
  beside each other, over the edge, and outside."""
  rng = np.random.default_rng(int(10 * side))
  corners = rng.uniform(-5, 32, (60, 2))
  corners[10] = corners[20]
  shape = (23, 31)
  expected = np.full(shape, -1)
  for row, column in np.ndindex(shape):
    point = np.array([column + 0.5, row + 0.5])
    holds = ((corners <= point) & (point < corners + side)).all(1)
    far = np.where(holds, ((corners + side / 2 - point) ** 2).sum(1), np.inf)
    if holds.any():
      expected[row, column] = far.argmin()
  found = heatmap.owners(corners, side, shape)
  if side >= 1:
    np.testing.assert_array_equal(found, expected)
    assert (found >= 0).any() and (found < 0).any()
    return
  # A tile between the centres of pixels is seen all the same.
  seen = expected >= 0
  np.testing.assert_array_equal(found[seen], expected[seen])
  centres = np.floor(corners + side / 2).astype(int)
  inside = ((centres >= 0) & (centres < shape[::-1])).all(1)
  assert set(centres[inside] @ [1, 31]) == set(np.flatnonzero(found >= 0))


def test_the_static_map_has_each_tiles_colour_and_none_elsewhere():
  """Half of the places are tiles; the others stay clear."""
  slide = view(40, extent=64)
  keep = np.arange(40) % 2 == np.arange(40) // 8 % 2
  weights = slide.scores["attention"][keep]
  slide = view(
    20,
    coords=slide.coords[keep] - slide.coords.min(0),
    extent=64,
    scores={"attention": weights / weights.sum()},
    picture=picture(),
    scale=8,
  )
  (_, text) = heatmap.blocks([slide])
  pixels = overlay(text)
  height, width = pixels.shape[:2]
  np.testing.assert_allclose(width / height, 80 / 60, rtol=0.02)
  table = matplotlib.colormaps["viridis"].resampled(255)
  ranks = weights.argsort().argsort() + 1
  at = slide.coords + 32
  columns, rows = (at / [640, 480] * [width, height]).astype(int).T
  expected = 255 * table(np.floor(254 * ranks / 20 + 0.5).astype(int))[:, :3]
  assert np.abs(pixels[rows, columns, :3] - expected).max() <= 1
  covered = 20 * 64**2 / (640 * 480)
  np.testing.assert_allclose((pixels[..., 3] > 0).mean(), covered, rtol=0.02)
  corners = {tuple(c) for c in (slide.coords // 64).tolist()}
  for row, column in np.ndindex(7, 10):
    y, x = (64 * row + 32) * height // 480, (64 * column + 32) * width // 640
    assert (pixels[y, x, 3] > 0) == ((column, row) in corners)


def test_adjoining_tiles_of_a_fractional_side_leave_no_lines():
  """Their corners are whole pixels of level 0, so that they are up to one
  apart; a line of tissue between them would look like a boundary."""
  side = 447.6
  places = np.stack(np.meshgrid(np.arange(40), np.arange(30)), -1)
  coords = np.round(places.reshape(-1, 2) * side).astype(np.int64)
  slide = view(
    1200, coords=coords, extent=side, picture=picture(150, 200), scale=89.52
  )
  (_, text) = heatmap.blocks([slide])
  assert (overlay(text)[..., 3] == 255).all()


def test_numbers_beside_the_picture_are_the_slides():
  slide = view(40, picture=picture(), scale=100.5, mpp=0.5)
  (_, text) = heatmap.blocks([slide])
  (said,) = data(text)
  assert said["width"] == 80 * 100.5 and said["height"] == 60 * 100.5
  steps = unpacked(said["coords"], "<i4").reshape(2, 40)
  np.testing.assert_array_equal(steps.cumsum(1).T, slide.coords)
  for score, (label, values) in zip(
    said["scores"], slide.shown.items(), strict=True
  ):
    assert score["label"] == label
    np.testing.assert_array_equal(unpacked(score["values"], "<f4"), values)
  # 8040 px of 0.5 um: a bar of 1 mm is a quarter of it.
  (share,) = re.findall(r'class="scale-bar" style="width: ([\d.]+)%"', text)
  np.testing.assert_allclose(float(share), 100 * 1000 / 4020, rtol=1e-4)
  assert ">1 mm<" in text


def test_a_large_slide_is_small_on_the_page():
  """100,000 tiles: their places take little, their scores four bytes."""
  places = np.stack(np.meshgrid(np.arange(400), np.arange(250)), -1)
  coords = np.round(places.reshape(-1, 2) * 447.6).astype(np.int64)
  (_, text) = heatmap.blocks([view(100_000, coords=coords, extent=447.6)])
  (said,) = data(text)
  assert len(said["coords"]) < 50_000
  assert len(text) < 1_600_000


def test_names_and_labels_are_text_on_the_page(tmp_path):
  slide = view(
    16,
    name=HOSTILE,
    title=HOSTILE,
    scores={f"P({HOSTILE})": np.linspace(0, 1, 16), HOSTILE: np.arange(16)},
    facts={HOSTILE: HOSTILE, "P(a)": 0.25},
    picture=picture(),
    most=[(3, picture(8, 8))],
  )
  path = page.write(tmp_path, RESULTS, views=[slide, slide])
  text = path.read_text(encoding="utf-8")
  read = _Page(text)
  assert read.tags.count("script") == 1 and "onerror" not in read.tags
  assert read.text.count("alert(1)") >= 6
  labels = {score["label"] for said in data(text) for score in said["scores"]}
  written = HOSTILE.replace("\n", "\\n")
  assert labels == {f"P({written})", written}
  allowed = ("src", "href")
  for element, name, value in read.links:
    assert name in allowed and element in ("a", "img", "use")
    assert "//" not in value.removeprefix("data:").split(";")[0]
    assert element != "img" or value.startswith("data:image/")


def test_the_policy_names_the_script_that_is_there_and_no_other(tmp_path):
  text = page.write(tmp_path, RESULTS, views=[view()]).read_text()
  (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = html.unescape(re.findall(r'content="(default-src[^"]+)"', text)[0])
  assert policy.endswith(f"; script-src 'sha256-{digest}'")
  assert "unsafe-inline' script" not in policy and "http" not in policy
  for word in ("innerHTML", "eval(", "fetch(", "XMLHttp", "import(", "http"):
    assert word not in script


def test_one_slide_has_no_list_and_several_say_what_is_known_of_each():
  facts = [
    {"truth": "tumour", "P(tumour)": 0.9342},
    {"truth": "normal", "note": "pale"},
  ]
  views = [view(name=f"s{i}", facts=f) for i, f in enumerate(facts)]
  (_, one) = heatmap.blocks(views[:1])
  assert "<table" not in one.split("<template")[0]
  assert "truth tumour · P(tumour) 0.934 · 40 tiles" in one
  (_, two) = heatmap.blocks(views)
  rows = re.findall(r"<tr>(.*?)</tr>", two)
  cells = [
    re.findall(r">([^<>]+)</t[hda]", row.replace("</a>", "")) for row in rows
  ]
  assert cells[:3] == [
    ["slide", "truth", "P(tumour)", "note"],
    ["s0", "tumour", "0.934", "–"],
    ["s1", "normal", "–", "pale"],
  ]
  assert 'href="#heatmap-2"' in two and 'id="heatmap-2"' in two


def test_pictures_of_tiles_say_where_they_are_and_how_they_score():
  slide = view(
    16, extent=256, most=[(5, picture(300, 300))], least=[(9, picture(8, 8))]
  )
  (_, text) = heatmap.blocks([slide])
  value = heatmap.number(float(slide.shown["attention"][5]))
  (first, second) = re.findall(r'<li><a [^>]*data-tile="\d+">.*?</a>', text)
  assert f"<b>{value}</b>" in first and 'data-tile="5"' in first
  assert "2,280, 3,000" in first and "1,256, 3,256" in second
  assert text.index("Highest attention") < text.index("Lowest attention")


def test_a_page_holds_so_much_and_takes_no_more_slides_than_that():
  taken = itertools.count()

  def slides():
    while True:
      yield view(1000, name=str(next(taken)))

  (_, text) = heatmap.blocks(slides(), 60_000)
  shown = text.count("<article")
  assert 2 < shown < 20 and next(taken) == shown + 1
  assert "Further slides would make the page too large" in text
  assert len(text) < 90_000
  assert heatmap.blocks([]) == []


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("background", [None, picture()])
def test_a_slide_of_no_tile_or_one(count, background):
  scores = {"attention": np.ones(count, np.float32)}
  slide = view(count, scores=scores, picture=background, scale=50)
  (_, text) = heatmap.blocks([slide])
  assert f"{count} tile" in text and "NaN" not in text
  assert (overlay(text)[..., 3] > 0).any() == (
    count == 1 and background is None
  )


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0"),
    (1, "1"),
    (0.0004, "<0.001"),
    (-1e-9, ">−0.001"),
    (0.01234, "0.0123"),
    (-0.5, "−0.5"),
    (12.345, "12.3"),
    (999.6, "1,000"),
    (123456, "123,000"),
  ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
  assert heatmap.number(value) == text


def test_one_slide_alone_that_is_too_large_is_told():
  (_, text) = heatmap.blocks([view(1000)], 100)
  assert "<article" not in text and "would make the page too large" in text
