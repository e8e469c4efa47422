"""Drawn slides: the same from every side, readable by OpenSlide, with lesions
that no colour gives away."""

import collections
import csv
import json
import threading

import numpy as np
import openslide
import PIL.Image
import PIL.ImageDraw
import pytest
from scipy import ndimage

from jaxtransfer.data import drawing, slide_drawing, synthetic_slides
from jaxtransfer.data.synthetic_slides import parse, write_slides
from jaxtransfer.errors import UsageError

SMALL = {"slides": 4, "patients": 2, "sites": 2, "size": 640, "seed": 3}


def _drawn(seed, side=1024, mpp=0.5, lesion=True, look=0):
  looks = np.random.default_rng(look)
  return slide_drawing.DrawnSlide(
    seed, side, mpp, drawing.draw_look(looks), lesion
  )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """Four slides of two patients, as files."""
  return write_slides(tmp_path_factory.mktemp("slides"), **SMALL)


def _rows(path):
  with open(path, newline="", encoding="utf-8") as f:
    return list(csv.DictReader(f))


# --- drawing -----------------------------------------------------------------


def test_parts_fit_each_other():
  """A slide is drawn tile by tile: whatever lies across a border (glands,
  nuclei, fibres, grain) is the same from both sides, to the last level of
  rounding, and so is a part at any place and of any size."""
  slide = _drawn(5)
  x, y = (int(at[0] / slide.mpp) for at in slide.regions.lesions[:2])
  x, y = x - 300, y - 300
  whole = slide.region(x, y, 600).astype(int)
  assert whole.std() > 20
  for left, top, size in ((0, 0, 256), (243, 200, 131), (297, 303, 290)):
    part = _drawn(5).region(x + left, y + top, size).astype(int)
    same = whole[top : top + size, left : left + size]
    assert np.abs(part - same).max() <= 2
    assert (part != same).mean() < 1e-3
  tile = slide.tile(1, 0, 512)
  np.testing.assert_array_equal(tile, slide.region(512, 0, 512))


def test_places_far_out_are_as_sharp():
  """At 100,000 pixels single precision would be short of digits."""
  slide = _drawn(5, side=100_032)
  x, y = (int(at[0] / slide.mpp) for at in slide.regions.pieces[:2])
  part = slide.region(x, y, 200).astype(int)
  assert part.std() > 10
  again = slide.region(x - 77, y - 55, 277).astype(int)[55:, 77:][:200, :200]
  assert np.abs(part - again).max() <= 2


@pytest.mark.parametrize("seed", range(4))
def test_a_lesion_is_in_the_tissue_and_a_small_part_of_it(seed):
  """Measured on the picture, at 4 um: what is not white, and the polygons."""
  slide = _drawn(seed, side=400, mpp=4.0)
  pixels = slide.region(0, 0, 400).astype(int)
  tissue = pixels.min(2) < 215
  assert 0.25 < tissue.mean() < 0.7
  area = tissue.sum() * 4.0**2
  assert slide.tissue_area == pytest.approx(area, rel=0.12)
  mask = PIL.Image.new("1", (400, 400))
  for corners in slide.outlines():
    PIL.ImageDraw.Draw(mask).polygon([tuple(c) for c in corners], fill=1)
  lesion = np.asarray(mask)
  assert 0.009 < lesion.sum() / tissue.sum() < 0.03
  assert tissue[lesion].mean() > 0.8
  assert not _drawn(seed, lesion=False).outlines()


def test_a_lesion_changes_no_colour_of_the_slide():
  """The same slide with and without: its mean is moved by less than a level,
  and those of other patients' slides lie ten times as far apart."""

  def mean(seed, lesion):
    slide = _drawn(seed, 250, 4.0, lesion, look=seed)
    return slide.region(0, 0, 250).reshape(-1, 3).mean(0)

  moved = [np.abs(mean(s, True) - mean(s, False)).max() for s in range(4)]
  apart = np.stack([mean(s, False) for s in range(4)]).std(0).max()
  assert 0 < max(moved) < 0.7
  assert apart > 4


def test_nuclei_of_a_lesion_are_larger_than_any_others():
  """The radius of nuclei, by the distance to what is not nucleus, in a lesion
  and in the same places of the same slide without it, follicles and all."""
  ratios = []
  for seed in range(4):
    with_lesion, without = _drawn(seed, 4096), _drawn(seed, 4096, lesion=False)
    blobs = with_lesion.regions.lesions
    x, y = (int(at[0] / 0.5) - 200 for at in blobs[:2])
    radii = []
    for slide in (with_lesion, without):
      red = slide.region(x, y, 400)[..., 0].astype(float)
      # Nuclei absorb most of the red, the stain that is blue.
      nucleus = ndimage.gaussian_filter(red, 1) < np.percentile(red, 99) * 0.58
      labelled, count = ndimage.label(ndimage.binary_opening(nucleus))
      depth = ndimage.distance_transform_edt(nucleus)
      peaks = ndimage.maximum(depth, labelled, np.arange(1, count + 1))
      radii.append(np.percentile(peaks, 90))
    ratios.append(radii[0] / radii[1])
  assert np.median(ratios) > 1.25


# --- patients ----------------------------------------------------------------


@pytest.mark.parametrize("positive", [0.5, 0.3])
def test_labels_are_of_patients_and_alike_at_every_site(positive):
  """One to three slides each, and a site that says nothing of the label."""
  recipe = synthetic_slides._checked(120, 60, 3, 512, positive, seed=4)
  slides = recipe.plan()
  assert [slide.name for slide in slides[:2]] == ["slide_0000", "slide_0001"]
  assert len({slide.name for slide in slides}) == 120
  patients = collections.defaultdict(list)
  for slide in slides:
    patients[slide.patient].append((slide.site, slide.positive))
  assert len(patients) == 60
  assert {len(of) for of in patients.values()} == {1, 2, 3}
  assert all(len(set(of)) == 1 for of in patients.values())
  firsts = [of[0] for of in patients.values()]
  for site in range(3):
    labels = [label for at, label in firsts if at == site]
    assert len(labels) == 20
    assert abs(sum(labels) - 20 * positive) <= 1
    of_slides = [slide.positive for slide in slides if slide.site == site]
    assert abs(len(of_slides) - 40) <= 3
    assert abs(np.mean(of_slides) - positive) < 0.06


@pytest.mark.parametrize("slides", range(7, 22))
def test_any_number_of_slides_is_shared_out(slides):
  """From one for each of seven patients to three."""
  recipe = synthetic_slides._checked(slides, 7, 2, 512, 0.5, seed=1)
  counts = collections.Counter(slide.patient for slide in recipe.plan())
  assert sum(counts.values()) == slides
  assert len(counts) == 7 and max(counts.values()) <= 3


def test_sites_differ_in_scanner_and_stain(small):
  """A slide of smaller pixels has more of them, for the same tissue."""
  rows = _rows(small)
  assert {(row["site"], row["mpp"]) for row in rows} == {
    ("site_0", "0.499"),
    ("site_1", "0.4537"),
  }
  for row in rows:
    with openslide.OpenSlide(small.parent / row["path"]) as slide:
      width = slide.dimensions[0] * float(row["mpp"])
    assert width == pytest.approx(640 * 0.5, abs=32 * 0.5)


# --- files -------------------------------------------------------------------


def test_openslide_reads_all_levels_at_the_right_scale(small):
  """Level 0 is what is drawn, but for JPEG; level 1 is its mean over 4 x 4;
  the resolution comes from the file."""
  recipe = synthetic_slides._checked(**SMALL)
  for row, planned in zip(_rows(small), recipe.plan(), strict=True):
    drawn = synthetic_slides._drawn(recipe, planned)
    with openslide.OpenSlide(small.parent / row["path"]) as slide:
      assert slide.properties["openslide.vendor"] == "generic-tiff"
      mpp = float(slide.properties["openslide.mpp-x"])
      assert mpp == pytest.approx(float(row["mpp"]), rel=1e-6)
      assert slide.level_downsamples[:2] == (1.0, 4.0)
      width, height = slide.dimensions
      assert width == height == drawn.side
      levels = [
        np.asarray(slide.read_region((0, 0), level, size).convert("RGB"))
        for level, size in enumerate(slide.level_dimensions)
      ]
    expected = drawn.region(0, 0, width)
    assert np.abs(levels[0].astype(int) - expected).mean() < 6
    assert np.abs(levels[0].mean((0, 1)) - expected.mean((0, 1))).max() < 0.7
    means = levels[0].reshape(width // 4, 4, height // 4, 4, 3).mean((1, 3))
    # A pixel to either side is worse than all that JPEG does to the light.
    lower, means = levels[1].mean(2), means.mean(2)
    off = [np.abs(lower - np.roll(means, k, 1)).mean() for k in (0, 1, -1)]
    assert off[0] < 0.6 * min(off[1:])
    assert off[1] == pytest.approx(off[2], rel=0.05)
    assert abs(lower.mean() - means.mean()) < 0.7


def test_lesions_are_qupaths_annotations_where_the_table_says(small):
  """Closed rings of level-0 pixels, for positive slides alone."""
  table = collections.Counter(
    row["slide"] for row in _rows(small.parent / "lesions.csv")
  )
  shares = collections.Counter()
  for row in _rows(small.parent / "lesions.csv"):
    shares[row["slide"]] += float(row["tissue_share"])
  for row in _rows(small):
    path = small.parent / "lesions" / f"{row['slide']}.geojson"
    found = json.loads(path.read_text())
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == table[row["slide"]]
    assert bool(found["features"]) == (row["label"] == "tumour")
    assert shares[row["slide"]] < 0.03
    for feature in found["features"]:
      (ring,) = feature["geometry"]["coordinates"]
      assert ring[0] == ring[-1] and len(ring) > 100
      assert feature["properties"]["objectType"] == "annotation"


def test_what_is_missing_is_drawn_again_the_same(small, tmp_path):
  """A stop leaves whole slides and no manifest; the same command goes on, and
  the ends are the same to the byte, also when two start at the same time."""
  folder = tmp_path / "again"
  threads = [
    threading.Thread(target=write_slides, args=[folder], kwargs=SMALL)
    for _ in range(2)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  names = {
    str(path.relative_to(small.parent)) for path in small.parent.rglob("*.*")
  }
  assert {str(p.relative_to(folder)) for p in folder.rglob("*.*")} == names
  kept = folder / "slides" / "slide_0001.tiff"
  before = kept.stat().st_mtime_ns
  for name in ("manifest.csv", "lesions.csv", "slides/slide_0002.tiff"):
    (folder / name).unlink()
  assert write_slides(folder, **SMALL) == folder / "manifest.csv"
  assert kept.stat().st_mtime_ns == before
  for name in names:
    assert (folder / name).read_bytes() == (small.parent / name).read_bytes()


def test_other_slides_are_never_mixed_in(small):
  """A folder is of one recipe."""
  with pytest.raises(UsageError, match="holds other slides .*seed: 3 there, 4"):
    write_slides(small.parent, **{**SMALL, "seed": 4})


def test_a_source_is_drawn_into_the_cache_once(tmp_path, monkeypatch):
  """Found again by what it asks for, however it is written."""
  monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path))
  source = "synthetic:slides?slides=1&size=512"
  first = synthetic_slides.cached(source)
  assert first.is_relative_to(tmp_path) and len(_rows(first)) == 1
  same = "synthetic:slides?seed=0&size=512&slides=1&patients=1"
  assert synthetic_slides.cached(same) == first


@pytest.mark.parametrize(
  ("source", "options"),
  [
    ("synthetic:slides", {}),
    (
      "synthetic:slides?slides=60&patients=30&sites=3&size=4096&seed=0",
      {"slides": 60, "patients": 30, "sites": 3, "size": 4096, "seed": 0},
    ),
    ("synthetic:slides?slides=5", {"slides": 5, "patients": 3, "sites": 3}),
    ("synthetic:slides?positive=0.25", {"positive": 0.25}),
  ],
)
def test_sources_say_what_they_mean(source, options):
  """What follows the question mark, and no more patients than slides."""
  assert parse(source) == options


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("synthetic:slide", "no such slides; the ones there are"),
    ("synthetic:slides?tiles=3", "no option 'tiles'; there are slides, "),
    ("synthetic:slides?slides=many", "slides is 'many', not a number"),
    ("synthetic:slides?slides=-1", "slides is '-1', not a number"),
    ("synthetic:slides?slides=1.5", "slides is '1.5', not a number"),
    ("synthetic:slides?positive=.", "positive is '.', not a number"),
    ("synthetic:slides?positive=1.5", "positive is 1.5; it must be 0 to 1"),
    ("synthetic:slides?size=12", "size is 12; it must be a whole number, 512"),
    ("synthetic:slides?patients=61", "patients is 61; .* 20 to 60 for one to"),
    ("synthetic:slides?sites=31", "sites is 31; .* 1 to 30"),
  ],
)
def test_sources_that_cannot_be_meant_are_refused(source, message):
  """Before anything is drawn, in one line."""
  with pytest.raises(UsageError, match=message) as caught:
    synthetic_slides.cached(source)
  assert "\n" not in str(caught.value)
