"""Regions show the place that is asked for, whoever reads the file."""

import pickle

import numpy as np
import pytest
import tifffile
from PIL import Image

from jaxtransfer.data import slides
from tests.data import slide_files

WIDTH, HEIGHT = 1203, 903


def _levels(*downsamples):
  """Levels as scanners make them: what is less than a pixel is left out."""
  return [
    slide_files.level(WIDTH // d, HEIGHT // d, d) for d in (1, *downsamples)
  ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """The same plane in every kind of file."""
  folder = tmp_path_factory.mktemp("slides")
  first, *others = _levels(2, 4, 8)
  paths = {
    "one level": slide_files.write_pyramid(folder / "one.tiff", [first]),
    "pyramid": slide_files.write_pyramid(
      folder / "pyramid.tiff", [first, *others]
    ),
    "ome": slide_files.write_ome(folder / "ome.tiff", [first, *others]),
  }
  paths["strips"] = folder / "strips.tiff"
  tifffile.imwrite(
    paths["strips"],
    first,
    photometric="rgb",
    rowsperstrip=32,
    compression="lzw",
    resolution=(2e4, 2e4),
    resolutionunit="CENTIMETER",
    metadata=None,
  )
  paths["planes"] = folder / "planes.tiff"
  tifffile.imwrite(
    paths["planes"],
    np.moveaxis(first, -1, 0),
    photometric="rgb",
    planarconfig="separate",
    rowsperstrip=64,
    metadata=None,
  )
  paths["png"] = folder / "picture.png"
  Image.fromarray(first).save(paths["png"])
  return paths


BACKENDS = {
  "one level": "openslide",
  "pyramid": "openslide",
  "ome": "tifffile",
  "strips": "tifffile",
  "planes": "tifffile",
  "png": "pillow",
}


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_region_shows_its_place_to_a_fraction_of_a_pixel(files, kind):
  """At every resolution, near and far from the corner where errors add up.

  The tolerances leave room for 8 bits and for the filter's own blur alone:
  half a pixel would be five times as much.
  """
  with slides.open_slide(files[kind], mpp=0.5) as slide:
    assert slide.backend == BACKENDS[kind]
    for extent, size in (
      (96, 96),
      (96, 64),
      (192, 96),
      (101.3, 77),
      (250.7, 61),
      (64, 100),
      (600, 75),
      (400.4, 31),
    ):
      for x, y in ((0, 0), (3, 7), (1203 - 601, 903 - 601), (602, 301)):
        shown = slide.region(x, y, extent, size)
        wanted = slide_files.pattern(x, y, x + extent, y + extent, size, size)
        assert shown.dtype == np.uint8
        assert shown.shape == (size, size, 3)
        where = f"{kind} {extent} {size} at {x}, {y}"
        assert np.abs(slide_files.shift(shown, wanted)).max() < 0.1, where


def test_levels_whose_sizes_are_cut_off_are_whole_ratios(files):
  """OpenSlide's own ratio here would be a pixel of the level at its far end."""
  with slides.open_slide(files["pyramid"]) as slide:
    assert slide._downsamples[1] == pytest.approx(2.0020, abs=1e-4)
    assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
    assert [level.width for level in slide.levels] == [1203, 601, 300, 150]
  stretched = slides.levels_of([(1000, 1000), (430, 410)])[1]
  assert stretched.scales == (1000 / 430, 1000 / 410)
  # What the maker of the file wrote down holds.
  stated = slides.levels_of([(1000, 1000), (512, 512)], [1.0, 2.0])[1]
  assert stated.downsample == 2


def test_the_coarsest_level_that_is_fine_enough_is_read(files):
  with slides.open_slide(files["pyramid"]) as slide:
    for wanted, level in (
      (0.5, 0),
      (1, 0),
      (1.9, 0),
      # 0.4955 um/px where 0.5 is asked for costs nothing that one can see.
      (1.99, 1),
      (2, 1),
      (7, 2),
      (100, 3),
    ):
      assert slide.level_for(wanted) == level


@pytest.mark.parametrize("kind", ["pyramid", "ome", "png"])
def test_pixels_of_a_level_come_as_they_are(files, kind):
  """At level 0 nothing is resampled: the bytes are the file's."""
  first = _levels()[0]
  with slides.open_slide(files[kind]) as slide:
    np.testing.assert_array_equal(
      slide.region(37, 211, 130, 130), first[211:341, 37:167]
    )


@pytest.mark.parametrize("kind", ["pyramid", "ome"])
def test_tiles_side_by_side_are_the_large_region(files, kind):
  """Without a margin each tile would bend its own edge."""
  with slides.open_slide(files[kind]) as slide:
    whole = slide.region(100, 60, 410, 128).astype(int)
    half = 205
    tiles = [
      [slide.region(100 + half * i, 60 + half * j, half, 64) for i in range(2)]
      for j in range(2)
    ]
    joined = np.vstack([np.hstack(row) for row in tiles]).astype(int)
    # OpenSlide interpolates too where its levels are no whole ratios.
    assert np.abs(joined - whole).max() <= 2


@pytest.mark.parametrize("kind", BACKENDS)
def test_outside_of_the_slide_is_white(files, kind):
  with slides.open_slide(files[kind]) as slide:
    corner = slide.region(-64, -64, 128, 128)
    assert (corner[:64] == 255).all()
    assert (corner[:, :64] == 255).all()
    np.testing.assert_array_equal(corner[64:, 64:], _levels()[0][:64, :64])
    assert (slide.region(WIDTH + 8, 0, 256, 64) == 255).all()
    assert (slide.region(WIDTH + 5000, -9000, 256, 64) == 255).all()


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_thumbnail_is_the_whole_slide(files, kind, monkeypatch):
  """And the same where it is read in parts, as a slide without levels is."""
  with slides.open_slide(files[kind]) as slide:
    thumbnail = slide.thumbnail(120)
    assert thumbnail.shape == (90, 120, 3)
    wanted = slide_files.pattern(0, 0, WIDTH, HEIGHT, 120, 90)
    assert np.abs(slide_files.shift(thumbnail, wanted)).max() < 0.1
    read = []
    whole = slide._read

    def counted(*place):
      read.append(place[-1] * place[-2])
      return whole(*place)

    monkeypatch.setattr(slides, "_MOST_PIXELS", 10_000)
    monkeypatch.setattr(slide, "_read", counted)
    parts = slide.thumbnail(120)
    assert max(read) <= 10_000
    # The last pixels show what is beyond the edge, too.
    missed = np.abs(parts.astype(int) - thumbnail)[:-1, :-1]
    assert missed.max() <= 2


@pytest.mark.parametrize("kind", ["pyramid", "ome", "png"])
def test_a_pickled_slide_reads_the_same(files, kind):
  with slides.open_slide(files[kind], mpp=0.3) as slide:
    with pickle.loads(pickle.dumps(slide)) as other:
      assert other.mpp == 0.3
      np.testing.assert_array_equal(
        other.region(9, 9, 99, 50), slide.region(9, 9, 99, 50)
      )


def test_transparent_pixels_are_white(tmp_path):
  pixels = np.full((128, 128, 4), 40, np.uint8)
  pixels[:, 64:, 3] = 0
  pixels[:, :64, 3] = 255
  Image.fromarray(pixels).save(tmp_path / "a.png")
  shown = slides.open_slide(tmp_path / "a.png").region(0, 0, 128, 128)
  assert (shown[:, :64] == 40).all()
  assert (shown[:, 64:] == 255).all()


# --- resolution --------------------------------------------------------------


def _stated(tmp_path, **tags):
  path = tmp_path / "a.tiff"
  tifffile.imwrite(
    path,
    np.zeros((80, 80, 3), np.uint8),
    tile=(64, 64),
    photometric="rgb",
    metadata=None,
    **tags,
  )
  return slides.open_slide(path)


def test_the_file_says_its_resolution(files):
  for kind in ("one level", "pyramid", "ome", "strips"):
    slide = slides.open_slide(files[kind])
    assert slide.mpp == pytest.approx(0.5), kind
    assert slide.why_no_mpp == ""
  assert slides.open_slide(files["pyramid"], mpp=0.25).mpp == 0.25
  assert slides.open_slide(files["png"]).mpp is None


def test_a_printers_resolution_is_none(tmp_path):
  """A TIFF that was exported says 72 dots an inch, 352.8 um/px."""
  slide = _stated(tmp_path, resolution=(28.34, 28.34), resolutionunit=3)
  assert slide.mpp is None
  assert "352.9 um/px (72 dots an inch)" in slide.why_no_mpp
  slide = _stated(tmp_path)
  assert (slide.mpp, slide.why_no_mpp) == (None, "it states no resolution")


def test_pixels_that_are_not_square_have_no_one_resolution(tmp_path):
  slide = _stated(tmp_path, resolution=(4e4, 2e4), resolutionunit=3)
  assert slide.mpp is None
  assert "0.25 by 0.5 um and not square" in slide.why_no_mpp


def test_units_of_ome_are_read(tmp_path):
  first = slide_files.level(200, 100)
  path = tmp_path / "a.ome.tif"
  for unit, mpp in (("µm", 0.5), ("nm", 5e-4), ("mm", 500), ("pixel", None)):
    tifffile.imwrite(
      path,
      first,
      photometric="rgb",
      tile=(64, 64),
      metadata={
        "axes": "YXS",
        "PhysicalSizeX": 0.5,
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": unit,
      },
    )
    slide = slides.open_slide(path)
    assert slide.name == "a.ome"
    if unit == "µm":
      assert slide.mpp == mpp
    else:
      assert slide.mpp is None
    assert ("states no" in slide.why_no_mpp) == (mpp is None)


# --- what cannot be used -----------------------------------------------------


def _reason(path, **options):
  with pytest.raises(slides.SlideError) as e:
    slides.open_slide(path, **options)
  assert "\n" not in str(e.value)
  return str(e.value)


def test_what_is_no_slide_is_told_in_one_line(tmp_path):
  assert _reason(tmp_path / "x.svs") == "no such file"
  assert _reason(tmp_path) == "a folder, not a file"
  path = tmp_path / "x.svs"
  path.write_text("slide,label\na,b\n")
  assert "OpenSlide does not know it" in _reason(path)
  path.write_bytes(b"")
  assert "empty file" in _reason(path)
  path.write_bytes(b"II*\0\x08\0\0\0")
  assert _reason(path).startswith("damaged TIFF")
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
  assert "git lfs pull" in _reason(path)
  Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(path, "PNG")
  assert "data.max_pixels is 100" in _reason(path, max_pixels=100)


def test_what_is_not_8_bit_colour_is_refused(tmp_path):
  path = tmp_path / "a.tiff"
  tifffile.imwrite(path, np.zeros((80, 80), np.uint16), tile=(64, 64))
  assert "16-bit uint16" in _reason(path)
  tifffile.imwrite(
    tmp_path / "b.ome.tiff",
    np.zeros((4, 80, 80), np.uint8),
    tile=(64, 64),
    photometric="minisblack",
    metadata={"axes": "CYX"},
  )
  assert "4 channels, each a page" in _reason(tmp_path / "b.ome.tiff")
  tifffile.imwrite(
    path,
    np.zeros((90, 90, 3), np.uint8),
    photometric="rgb",
    rowsperstrip=90,
    metadata=None,
  )
  assert "save it as a tiled TIFF" in _reason(path, max_pixels=5000)


@pytest.mark.parametrize("write", ["write_pyramid", "write_ome"])
def test_damaged_pixels_are_never_white(tmp_path, write):
  """Neither those behind the end of a truncated file nor those overwritten.

  And what is whole can still be read: OpenSlide's handle dies of an error.
  """
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (256, 256, 3), np.uint8)
  path = getattr(slide_files, write)(
    tmp_path / "a.tiff", [noise], compression="jpeg"
  )
  data = bytearray(path.read_bytes())
  with tifffile.TiffFile(path) as file:
    offsets = file.pages[0].dataoffsets
  last = max(offsets)
  path.write_bytes(data[: last + 100])
  with slides.open_slide(path) as slide:
    for _ in range(2):
      with pytest.raises(slides.SlideError, match="damaged|truncated"):
        slide.region(192, 192, 64, 64)
      assert slide.region(0, 0, 64, 64).std() > 10
  data[offsets[5] : offsets[5] + 200] = b"\0" * 200
  path.write_bytes(data)
  with slides.open_slide(path) as slide:
    with pytest.raises(slides.SlideError, match="damaged"):
      slide.region(64, 64, 64, 64)
    assert slide.region(128, 128, 64, 64).std() > 10


def test_the_real_slides(shared):
  """What each of them is, as its README says."""
  folder = shared / "data" / "slides"
  with slides.open_slide(folder / "small_HE.svs") as slide:
    assert (slide.width, slide.height) == (2220, 2967)
    assert slide.mpp == 0.499
    assert slide.region(900, 1500, 256 * 0.5 / 0.499, 256).std() > 10
  with slides.open_slide(folder / "tcga_two_levels_no_mpp.svs") as slide:
    assert slide.mpp is None
    assert [level.downsample for level in slide.levels] == [1, 2]
  with slides.open_slide(folder / "hamamatsu_seven_levels.ndpi") as slide:
    assert slide.mpp == pytest.approx(0.228, abs=1e-3)
    assert len(slide.levels) == 7
  with slides.open_slide(folder / "small_HE_levels.tiff") as slide:
    assert "72 dots an inch" in slide.why_no_mpp
    assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
  assert "OpenSlide refuses it" in _reason(folder / "small_dicom.dcm")
  assert "OpenSlide does not know it" in _reason(folder / "broken.svs")


def test_two_levels_of_a_real_slide_show_the_same_place(shared):
  """The far end of a slide of 4443 pixels whose second level has 2221."""
  path = shared / "data" / "slides" / "tcga_two_levels_no_mpp.svs"
  with slides.open_slide(path) as slide:
    x, y, extent = 3700, 2700, 512
    assert slide.level_for(2) == 1
    coarse = slide.region(x, y, extent, 256)
    fine = slide.region(x, y, extent, extent).astype(float)
  wanted = fine.reshape(256, 2, 256, 2, 3).mean((1, 3))
  assert np.abs(slide_files.shift(coarse, wanted)).max() < 0.1
