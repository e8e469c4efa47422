"""The grid of tiles, and how much tissue each holds, against plain counting."""

import numpy as np
import pytest

from jaxtransfer.data import segmentation, slides, tiling
from jaxtransfer.data.tiling import Grid
from tests.data import slide_files


@pytest.mark.parametrize("slide_mpp", [0.5, 0.499, 0.2281750559, 1.3])
@pytest.mark.parametrize("overlap", [0, 37])
def test_tiles_lie_in_the_slide_and_errors_do_not_add_up(slide_mpp, overlap):
  """Each corner is the nearest pixel to its place; the last is as near."""
  grid = Grid(256, 0.5, overlap)
  width, height = 20_011, 7_003
  coords = grid.corners(width, height, slide_mpp)
  extent = 256 * 0.5 / slide_mpp
  step = (256 - overlap) * 0.5 / slide_mpp
  x, y = np.unique(coords[:, 0]), np.unique(coords[:, 1])
  assert coords.dtype == np.int64 and len(coords) == len(x) * len(y)
  for places, side in ((x, width), (y, height)):
    assert np.abs(places - np.arange(len(places)) * step).max() <= 0.5
    assert places[-1] + extent <= side + 0.5
    # No further one would fit.
    assert len(places) * step + extent > side
  assert (
    np.lexsort((coords[:, 0], coords[:, 1])) == np.arange(len(coords))
  ).all()


def test_a_slide_smaller_than_a_tile_has_none_and_one_as_large_has_one():
  grid = Grid(256, 0.5)
  assert grid.corners(255, 900, 0.5).shape == (0, 2)
  assert grid.corners(256, 256, 0.5).tolist() == [[0, 0]]
  # 0.1 + 0.2 is not 0.3: rounding alone costs no tile.
  assert len(Grid(100, 0.3).corners(300, 300, 0.1 + 1e-17)) == 1


def test_shares_are_those_of_a_fine_count():
  """Each pixel of the mask is cut into 40 x 40 and counted."""
  rng = np.random.default_rng(0)
  mask = rng.random((9, 12)) < 0.5
  scales, extent = (3.0, 2.5), 7.4
  coords = np.array([[0, 0], [3, 4], [11, 9], [20, 13], [25, 15], [33, 20]])
  fine = 40
  counted = np.kron(mask, np.ones((fine, fine)))
  found = tiling.shares(mask, scales, coords, extent)
  for (x, y), share in zip(coords, found, strict=True):
    rows = slice(
      round(y / scales[1] * fine), round((y + extent) / scales[1] * fine)
    )
    columns = slice(
      round(x / scales[0] * fine), round((x + extent) / scales[0] * fine)
    )
    part = counted[rows, columns].sum()
    area = (extent / scales[0] * fine) * (extent / scales[1] * fine)
    assert share == pytest.approx(part / area, abs=0.01)


def test_sharpness_is_the_variance_of_the_laplacian():
  """Written out at every pixel; a blurred image has less of it."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (12, 15, 3), np.uint8)
  grey = pixels.astype(float) @ [0.299, 0.587, 0.114]
  padded = np.pad(grey, 1, mode="edge")
  laplacian = (
    padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
  ) - 4 * grey
  assert tiling.sharpness(pixels) == pytest.approx(laplacian.var())
  blurred = slide_files.level(64, 64)
  assert tiling.sharpness(blurred) < 5 < tiling.sharpness(pixels)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
  """A slide of 1 um/px whose left half is tissue, but for 100 um."""
  pixels = np.full((1024, 1024, 3), 242, np.uint8)
  pixels[:, :412] = (200, 120, 180)
  path = tmp_path_factory.mktemp("slide") / "a.tiff"
  return slides.open_slide(slide_files.write_pyramid(path, [pixels], 1.0, 256))


def test_tiles_that_hold_enough_tissue_are_kept(slide):
  """Of eight columns of 128 um three are tissue, one holds 28 of 128 um."""
  settings = segmentation.Settings()
  for least, columns in ((0.3, 3), (0.1, 4), (1.0, 3), (0.0, 4)):
    cut = tiling.cut(slide, Grid(256, 0.5, 0, least), settings, 8.0)
    assert np.unique(cut.coords[:, 0]).tolist() == [
      128 * i for i in range(columns)
    ]
    assert len(cut.coords) == len(cut.tissue) == 8 * columns
    assert cut.extent == 128
    assert cut.area == pytest.approx(0.412 * 1.024, rel=0.02)
    np.testing.assert_allclose(cut.tissue[:3], 1)


def test_what_a_user_should_know_of_a_slide_is_told(slide, tmp_path):
  settings = segmentation.Settings()
  (note,) = tiling.cut(slide, Grid(256, 0.5), settings, 8.0).notes
  assert "tiles are enlarged 2 times" in note
  assert not tiling.cut(slide, Grid(128, 1.0), settings, 8.0).notes
  notes = tiling.cut(slide, Grid(1024, 2.0), settings, 8.0).notes
  assert "smaller than a tile of 2048 um" in notes[0]
  mask = tmp_path / "corner.geojson"
  corner = np.array([[0, 0], [40, 0], [40, 40], [0, 40]], float)
  segmentation.write_geojson(mask, [segmentation.Polygon(corner)])
  cut = tiling.cut(slide, Grid(128, 1.0), settings, 8.0, mask)
  assert cut.notes == ["none of 64 tiles of 128 um has 25% tissue"]
  assert cut.area == pytest.approx(0.0016)


def test_a_slide_without_resolution_is_not_cut(tmp_path):
  path = tmp_path / "a.tiff"
  slide_files.write_pyramid(path, [slide_files.level(200, 200)], None)
  with pytest.raises(slides.SlideError, match="config.default_mpp"):
    tiling.cut(
      slides.open_slide(path), Grid(64, 1.0), segmentation.Settings(), 8.0
    )


def test_an_overlay_marks_tiles_and_tissue(slide):
  cut = tiling.cut(slide, Grid(128, 1.0), segmentation.Settings(), 8.0)
  assert cut.picture.shape == (128, 128, 3)
  cut = tiling.cut(
    slide, Grid(128, 1.0), segmentation.Settings(), 8.0, shown=256
  )
  assert cut.picture.shape == (256, 256, 3) and cut.mask.shape == (128, 128)
  drawn = tiling.overlay((slide.width, slide.height), cut, 256)
  changed = (drawn != cut.picture).any(-1)
  assert changed[:, 32].mean() > 0.9  # between the first tiles
  assert changed[:, 102:105].any()  # where tissue ends
  assert not changed[:, 130:].any()
