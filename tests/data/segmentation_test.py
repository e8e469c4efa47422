"""Tissue is found where it was drawn, and outlines are the mask's, exactly."""

import colorsys
import json

import matplotlib.path
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxtransfer.data import segmentation
from jaxtransfer.data.segmentation import Polygon, Settings

MPP = 8.0
PINK, WHITE = (200, 120, 180), (243, 241, 244)


def _slide(*tissue, side=200, background=WHITE, colour=PINK, seed=0):
  """A noisy background with tissue in some masks."""
  rng = np.random.default_rng(seed)
  pixels = np.broadcast_to(np.array(background, float), (side, side, 3)).copy()
  for mask in tissue:
    pixels[mask] = colour
  return np.clip(pixels + rng.normal(0, 2, pixels.shape), 0, 255).astype(
    np.uint8
  )


def _disk(x, y, radius, side=200):
  rows, columns = np.mgrid[:side, :side]
  return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def test_saturation_is_that_of_hsv_and_black_has_none():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
  found = segmentation.saturation(pixels)
  for colour, value in zip(pixels.reshape(-1, 3), found.ravel(), strict=True):
    wanted = 255 * colorsys.rgb_to_hsv(*colour / 255)[1]
    assert abs(value - wanted * (colour.max() >= 50)) <= 0.51


def test_otsu_is_the_threshold_that_divides_best():
  """Against the definition: all thresholds tried, in float64."""
  rng = np.random.default_rng(1)
  values = np.concatenate([rng.normal(20, 8, 3000), rng.normal(120, 30, 900)])
  values = np.clip(values, 0, 255).astype(np.uint8)

  def within(threshold):
    parts = values[values <= threshold], values[values > threshold]
    return sum(len(p) * p.astype(float).var() for p in parts if len(p))

  found = segmentation.otsu(values)
  assert within(found) == pytest.approx(min(map(within, range(256))))
  assert 40 < found < 80


def test_tissue_is_found_where_it_is():
  """Its area to 3 %; specks are left out, small holes filled, large ones not.

  The numbers are those of the defaults: 0.02 mm2 are 312 pixels of 8 um, 0.01
  mm2 are 156.
  """
  large, small = _disk(100, 100, 60), _disk(20, 20, 8)
  lumen, gap = _disk(85, 100, 4), _disk(120, 100, 15)
  drawn = large & ~lumen & ~gap
  mask, notes = segmentation.segment(_slide(drawn, small), MPP)
  assert notes == []
  wanted = large & ~gap
  assert (mask ^ wanted).sum() < 0.03 * wanted.sum()
  assert not mask[small].any()
  assert mask[lumen].all()
  assert not mask[_disk(120, 100, 10)].any()
  kept, _ = segmentation.segment(
    _slide(drawn, small), MPP, Settings(min_area=0.005)
  )
  assert kept[small].mean() > 0.9


def test_a_slide_with_nothing_on_it_has_no_tissue():
  """Otsu divides the noise of any background; the least saturation holds."""
  mask, notes = segmentation.segment(_slide(), MPP)
  assert not mask.any() and notes == []


def test_a_slide_full_of_tissue_is_all_tissue():
  """Otsu divides pale from dark tissue; the most saturation holds."""
  pale = _disk(60, 60, 50)
  slide = _slide(~pale, background=(215, 165, 200), colour=(120, 40, 110))
  mask, _ = segmentation.segment(slide, MPP)
  assert mask.all()


def test_a_dark_slide_is_told():
  slide = _slide(
    _disk(100, 100, 50), background=(3, 0, 8), colour=(20, 30, 220)
  )
  mask, notes = segmentation.segment(slide, MPP)
  assert len(notes) == 1 and "fluorescence" in notes[0]
  # Black has no colour, whatever its three numbers are.
  assert not mask[~_disk(100, 100, 55)].any()


def test_ink_is_no_tissue_where_it_is_asked_for():
  """Green, blue and black pens; hematoxylin, eosin and blood stay."""
  tissue = _disk(60, 100, 50)
  pen = np.zeros((200, 200), bool)
  pen[:, 150:170] = True
  for colour in ((30, 140, 90), (40, 70, 190), (15, 15, 20)):
    slide = _slide(tissue)
    slide[pen] = colour
    mask, _ = segmentation.segment(slide, MPP, Settings(pen=True))
    assert not mask[pen].any() and mask[_disk(60, 100, 45)].all(), colour
  slide[pen] = (40, 70, 190)
  assert segmentation.segment(slide, MPP)[0][pen].mean() > 0.9
  for colour in (PINK, (90, 60, 150), (120, 40, 110), (190, 40, 60), WHITE):
    assert not segmentation.ink(_slide(background=colour)).any()


def test_a_threshold_of_ones_own_holds():
  faint = _slide(_disk(100, 100, 50), colour=(240, 205, 228))
  assert segmentation.segment(faint, MPP)[0].any()
  strict = Settings(threshold=60)
  assert not segmentation.segment(faint, MPP, strict)[0].any()


# --- outlines ----------------------------------------------------------------


def _random_mask(seed, shape=(60, 83)):
  noise = np.random.default_rng(seed).normal(size=shape)
  return ndimage.gaussian_filter(noise, 2) > 0.02


@pytest.mark.parametrize("seed", range(6))
def test_the_outlines_of_a_mask_make_the_same_mask(seed):
  """With islands, holes, islands in holes, and what touches the border."""
  mask = _random_mask(seed)
  scales = 7.25, 6.5
  polygons = segmentation.polygons_of(mask, scales)
  assert any(polygon.holes for polygon in polygons)
  again = segmentation.rasterise(polygons, mask.shape[::-1], scales)
  np.testing.assert_array_equal(again, mask)
  for polygon in polygons:
    x, y = polygon.outer.T
    assert x.min() >= 0 and x.max() <= mask.shape[1] * scales[0]
    assert y.min() >= 0 and y.max() <= mask.shape[0] * scales[1]


def test_a_rectangle_is_outlined_by_its_corners():
  """Eight of them, since outlines cut off the corners of pixels."""
  mask = np.zeros((20, 30), bool)
  mask[4:10, 5:25] = True
  (polygon,) = segmentation.polygons_of(mask, (2.0, 3.0))
  assert len(polygon.outer) == 8 and not polygon.holes
  np.testing.assert_array_equal(polygon.outer.min(0), [10, 12])
  np.testing.assert_array_equal(polygon.outer.max(0), [50, 30])


def test_filling_is_that_of_another_implementation():
  """matplotlib's test of points, for any polygon, also one that crosses itself
  in no pixel's centre."""
  rng = np.random.default_rng(3)
  for _ in range(5):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radii = rng.uniform(5, 40, 12)
    ring = 30 + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    found = segmentation.rasterise([Polygon(ring)], (60, 60), (1.0, 1.0))
    centres = np.stack(np.meshgrid(*[np.arange(60) + 0.5] * 2), -1)
    wanted = matplotlib.path.Path(ring).contains_points(centres.reshape(-1, 2))
    np.testing.assert_array_equal(found, wanted.reshape(60, 60))


def test_regions_that_lie_in_each_other_are_one_region():
  square = np.array([[0, 0], [20, 0], [20, 20], [0, 20]], float)
  twice = [Polygon(square), Polygon(square / 2 + 5)]
  assert segmentation.rasterise(twice, (20, 20), (1.0, 1.0)).all()


# --- files -------------------------------------------------------------------


def test_geojson_is_what_qupath_opens(tmp_path):
  """RFC 7946: closed rings, the outer first; QuPath's keys beside them."""
  mask = _random_mask(0)
  polygons = segmentation.polygons_of(mask, (10.0, 10.0))
  path = tmp_path / "a.geojson"
  segmentation.write_geojson(path, polygons)
  value = json.loads(path.read_text())
  assert value["type"] == "FeatureCollection"
  assert len(value["features"]) == len(polygons)
  for feature in value["features"]:
    assert feature["type"] == "Feature"
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    assert feature["geometry"]["type"] == "Polygon"
    for ring in feature["geometry"]["coordinates"]:
      assert ring[0] == ring[-1] and len(ring) >= 4
  meant, ignored = segmentation.read_geojson(path)
  again = segmentation.rasterise(meant, mask.shape[::-1], (10.0, 10.0))
  np.testing.assert_array_equal(again, mask)
  assert ignored == []
  segmentation.write_geojson(path, [])
  assert json.loads(path.read_text())["features"] == []


def _square(left, top, side):
  right, bottom = left + side, top + side
  return [
    [left, top],
    [right, top],
    [right, bottom],
    [left, bottom],
    [left, top],
  ]


def test_geojson_of_others_is_read(tmp_path):
  """A list of features, several kinds of geometry, and classes to ignore."""
  path = tmp_path / "a.geojson"

  def mask(value):
    path.write_text(json.dumps(value))
    return segmentation.read_mask(path, (400, 400), (40, 40))

  polygon = {"type": "Polygon", "coordinates": [_square(100, 100, 200)]}
  wanted = np.zeros((40, 40), bool)
  wanted[10:30, 10:30] = True
  feature = {"type": "Feature", "geometry": polygon, "properties": None}
  point = {"type": "Point", "coordinates": [5, 5]}
  for value in (
    polygon,
    feature,
    [feature],
    {"type": "FeatureCollection", "features": [feature]},
    {"type": "GeometryCollection", "geometries": [point, polygon]},
    {"type": "MultiPolygon", "coordinates": [[_square(100, 100, 200)]]},
  ):
    np.testing.assert_array_equal(mask(value), wanted)
  taken = {
    "type": "Feature",
    "geometry": {"type": "Polygon", "coordinates": [_square(100, 100, 100)]},
    "properties": {"classification": {"name": "Ignore*"}},
  }
  wanted[10:20, 10:20] = False
  np.testing.assert_array_equal(mask([feature, taken]), wanted)
  hole = [_square(100, 100, 200), _square(100, 100, 100)]
  holed = {"type": "Polygon", "coordinates": hole}
  np.testing.assert_array_equal(mask(holed), wanted)


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("no JSON", "no GeoJSON of regions"),
    ('{"type": "FeatureCollection"}', "no GeoJSON of regions"),
    ('{"type": "Point", "coordinates": [1, 2]}', "of polygons there is none"),
    ('{"type": "FeatureCollection", "features": []}', "there is none"),
    ('{"type": "Polygon", "coordinates": [[["a", 1]]]}', "no GeoJSON"),
    ('{"type": "Polygon", "coordinates": [[[NaN, 1], [2, 3]]]}', "no number"),
    (
      json.dumps({"type": "Polygon", "coordinates": [_square(900, 900, 50)]}),
      "outside of the slide, 400 x 400 pixels",
    ),
  ],
)
def test_geojson_that_cannot_be_used_is_told(tmp_path, text, says):
  path = tmp_path / "a.geojson"
  path.write_text(text)
  with pytest.raises(segmentation.MaskError, match=says):
    segmentation.read_mask(path, (400, 400), (40, 40))


def test_a_mask_may_be_an_image_of_any_size(tmp_path):
  mask = np.zeros((30, 60), np.uint8)
  mask[10:20, 20:40] = 1
  path = tmp_path / "a.png"
  Image.fromarray(mask).save(path)
  found = segmentation.read_mask(path, (6000, 3000), (120, 60))
  np.testing.assert_array_equal(found, np.kron(mask, np.ones((2, 2))) > 0)
  with pytest.raises(segmentation.MaskError, match="another shape"):
    segmentation.read_mask(path, (3000, 3000), (60, 60))
  with pytest.raises(segmentation.MaskError, match="no such file"):
    segmentation.read_mask(tmp_path / "b.png", (3000, 3000), (60, 60))
