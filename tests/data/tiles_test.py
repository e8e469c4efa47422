"""What a feature file is made of: slides with anyone's coords, and images."""

import csv
import pickle

import h5py
import ml_collections
import numpy as np
import PIL.Image
import pytest

from jaxtransfer import errors
from jaxtransfer.data import feature_files, images, tile_reading, tiles
from jaxtransfer.data.slides import SlideError
from tests.data import slide_files
from tests.extraction import drawn


def _open(source, coords="", bag="", **changes):
  config = {
    "source": str(source),
    "image_size": 0,
    "max_pixels": 10**8,
    "task": "",
    "tfds_dir": "",
  }
  config = ml_collections.ConfigDict({**config, **changes})
  return tiles.open_tiles(config, str(coords), bag)


def _read(of, bag, which):
  places = bag.open()
  return of.reader[bag.piece(places, np.asarray(which))]


def _write_clam(path, corners, patch_size, level, downsample):
  """Writes coordinates as CLAM does, whatever is in them."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with h5py.File(path, "w") as f:
    f["coords"] = corners
    f["coords"].attrs.update(
      {
        "patch_size": patch_size,
        "patch_level": level,
        "downsample": (downsample, downsample),
        "downsampled_level_dim": (160, 160),
        "level_dim": (160, 160),
        "name": path.stem,
        "save_path": "elsewhere",
      }
    )


def _write_trident(path, corners, size, size_level0):
  """Writes coordinates as TRIDENT does."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with h5py.File(path, "w") as f:
    f["coords"] = corners
    f["coords"].attrs.update(
      {
        "patch_size": size,
        "patch_size_level0": size_level0,
        "level0_magnification": 20,
        "target_magnification": 10,
        "overlap": 0,
        "name": path.stem,
        "savetodir": "elsewhere",
        "level0_width": drawn.SIDE,
        "level0_height": drawn.SIDE,
      }
    )


@pytest.mark.parametrize("layout", ["ours", "trident", "clam"])
def test_coords_of_anyone_show_the_same_tissue(layout, tmp_path):
  """A tile of 32 pixels at half of the slide's resolution is 64 of its own,
  averaged by twos: pixels are compared with those of the drawn plane. The exact
  resolution, which only our files say, is then the slide's."""
  slides, corners = tmp_path / "slides", drawn.places(20, 0)[:, ::-1] // 2
  slides.mkdir()
  image = slide_files.level(drawn.SIDE, drawn.SIDE)
  slide_files.write_pyramid(slides / "s.tiff", [image], 0.5)
  folder = tmp_path / "job"
  if layout == "ours":
    found = drawn.coords(corners, extent=64.0, mpp=1.0)
    feature_files.write_coords(folder / "coords" / "s.h5", found)
  elif layout == "trident":
    folder = folder / "10x_32px_0px_overlap"
    _write_trident(folder / "patches" / "s_patches.h5", corners, 32, 64)
  else:
    _write_clam(folder / "patches" / "s.h5", corners, 32, 1, 2.0)
  of = _open(slides, folder)
  (bag,) = of.bags
  assert (bag.name, bag.count, of.size) == ("s", 20, 32)
  places = bag.open()
  assert places.extent == 64
  np.testing.assert_array_equal(places.coords, corners)
  said = places.attributes
  assert said["mpp"] == pytest.approx(1.0)
  assert said["level0_mpp"] == pytest.approx(0.5)
  assert said["level0_width"] == drawn.SIDE
  read = _read(of, bag, range(20))
  assert not read.broken and not any(read.reasons)
  for (x, y), pixels in zip(corners, read.pixels, strict=True):
    wanted = slide_files.pattern(x, y, x + 64, y + 64, 32, 32)
    # At the slide's edge the filter looks beyond it.
    assert np.abs(pixels - wanted)[1:, 1:].max() < 4
  # Resized in one step, not twice.
  of = _open(slides, folder, image_size=16)
  read = _read(of, of.bags[0], [3])
  x, y = corners[3]
  wanted = slide_files.pattern(x, y, x + 64, y + 64, 16, 16)
  assert np.abs(read.pixels[0] - wanted)[1:, 1:].max() < 4


def test_the_folder_of_a_whole_job_is_enough(tmp_path):
  """The job's, where it holds one tiling; of two, both are named."""
  root = drawn.write(tmp_path / "drawn", {"s": 5})
  job = tmp_path / "job"
  for name in ("20x_256px_0px_overlap", "10x_256px_0px_overlap"):
    path = job / name / "patches" / "s_patches.h5"
    _write_trident(path, drawn.places(5, 0), 32, 32)
  with pytest.raises(errors.UsageError, match="10x_256px.*20x_256px|20x.*10x"):
    _open(root / "slides", job)
  assert _open(root / "slides", path.parent).count == 5
  assert _open(root / "slides", path.parents[1]).count == 5
  path.unlink()
  assert _open(root / "slides", job).count == 5
  with pytest.raises(errors.UsageError, match="found in nothing"):
    _open(root / "slides", root / "slides")
  with pytest.raises(errors.MissingSourceError, match="no folder"):
    _open(root / "slides", tmp_path / "gone")


def test_tiles_that_would_not_compare_are_refused(tmp_path):
  root = drawn.write(tmp_path / "drawn", {"a": 5, "b": 5})
  path = root / "coords" / "b.h5"
  some = drawn.places(5, 0)
  feature_files.write_coords(path, drawn.coords(some, tile=64, extent=64.0))
  with pytest.raises(errors.UsageError, match="32 px .a. and of 64 .b."):
    _open(root / "slides", root / "coords")


def test_coords_of_no_slide_and_slides_without_tiles_are_told(tmp_path):
  root = drawn.write(tmp_path / "drawn", {"a": 5, "b": 0, "c": 5})
  (root / "slides" / "c.tiff").unlink()
  of = _open(root / "slides", root / "coords")
  assert [bag.name for bag in of.bags] == ["a", "b"]
  assert any("not used, 1: c" in note for note in of.notes)
  assert any("files without a row, 1: b" in note for note in of.notes)


def test_a_digest_knows_a_slide_and_its_tiles(tmp_path):
  """A copy of both is the same; another tile, or another slide, is not."""
  a = drawn.write(tmp_path / "a", {"s": 5})
  b = drawn.write(tmp_path / "b", {"s": 5})

  def digest(root):
    return _open(root / "slides", root / "coords").bags[0].digest

  assert digest(a) == digest(b)
  path = b / "coords" / "s.h5"
  feature_files.write_coords(path, drawn.coords(drawn.places(5, 1)))
  assert digest(a) != digest(b)
  feature_files.write_coords(path, drawn.coords(drawn.places(5, 0)))
  assert digest(a) == digest(b)
  slide = b / "slides" / "s.tiff"
  slide_files.write_pyramid(slide, [drawn.pixels(7)], drawn.MPP)
  assert digest(a) != digest(b)


def test_a_reader_has_few_slides_open_and_none_in_another_process(
  tmp_path, monkeypatch
):
  """Two: the one that ends and the one that begins; a copy opens its own."""
  root = drawn.write(tmp_path / "drawn", dict.fromkeys("abcd", 5))
  of = _open(root / "slides", root / "coords")
  opened, closed = [], []
  original = tile_reading.slides.open_slide

  def open_slide(path, *settings, **named):
    slide = original(path, *settings, **named)
    opened.append(slide.name)
    close = slide.close
    slide.close = lambda: (closed.append(slide.name), close())
    return slide

  monkeypatch.setattr(tile_reading.slides, "open_slide", open_slide)
  pieces = [bag.piece(bag.open(), np.arange(2)) for bag in of.bags]
  opened.clear()
  closed.clear()
  for i in (0, 0, 1, 0, 2, 3):
    of.reader[pieces[i]]
  assert opened == ["a", "b", "c", "d"] and closed == ["b", "a"]
  copy = pickle.loads(pickle.dumps(of.reader))
  np.testing.assert_array_equal(
    copy[pieces[1]].pixels, of.reader[pieces[1]].pixels
  )
  assert opened[4:] == ["b", "b"]


def test_some_tiles_are_labelled_images(tmp_path):
  """For training on them: each has its slide's label, group and pixels, and
  what cannot be read is an image's error."""
  root = drawn.write(tmp_path / "drawn", {"a": 20, "b": 30})
  with open(root / "slides" / "slides.csv", "w") as f:
    f.write("path,label,group\na.tiff,tumour,p1\nb.tiff,none,p2\n")
  of = _open(root / "slides" / "slides.csv", root / "coords")
  assert [(b.label, b.group) for b in of.bags] == [
    ("tumour", "p1"),
    ("none", "p2"),
  ]
  which = [np.array([3, 1]), np.array([29])]
  chosen = tiles.Chosen(
    list(zip(of.bags, which, strict=True)), ["tumour", "none"], 32
  )
  corners = drawn.places(20, 0)
  assert chosen.names[0] == f"a/{corners[3][0]}_{corners[3][1]}"
  assert chosen.classes == ["none", "tumour"]
  assert chosen.labels.tolist() == [1, 1, 0]
  assert chosen.groups == ["p1", "p1", "p2"]
  np.testing.assert_array_equal(chosen.read(1), drawn.tile(0, corners[1]))
  same = tiles.Chosen(
    list(zip(of.bags, which, strict=True)), ["tumour", "none"], 16
  )
  assert same.fingerprint() != chosen.fingerprint()
  (root / "slides" / "b.tiff").write_text("gone")
  with pytest.raises(images.ImageError, match="a text file"):
    chosen.read(2)
  with pytest.raises(SlideError):
    of.bags[1].open()


# --- images ------------------------------------------------------------------


def _write_images(root, names):
  rng = np.random.default_rng(0)
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def _manifest(root, header, rows):
  _write_images(root, [row[0] for row in rows])
  with open(root / "manifest.csv", "w", newline="") as f:
    csv.writer(f).writerows([header, *rows])
  return root / "manifest.csv"


def test_images_of_a_group_or_slide_are_a_bag(tmp_path):
  """The slide before the group, whichever the manifest has; labels that all of
  a bag share are its own; rows stay in the source's order."""
  rows = [
    (
      f"{i}.png",
      "x" if i < 4 else "xy"[i % 2],
      f"p{i % 3}",
      f"s{i % 2}/{i % 3}",
    )
    for i in range(12)
  ]
  groups = tmp_path / "groups"
  path = _manifest(groups, ("path", "label", "group"), [r[:3] for r in rows])
  of = _open(path, image_size=16)
  assert of.what == "groups" and [b.name for b in of.bags] == ["p0", "p1", "p2"]
  assert [bag.count for bag in of.bags] == [4, 4, 4]
  places = of.bags[1].open()
  assert places.names == ["1.png", "4.png", "7.png", "10.png"]
  assert places.coords is None
  read = _read(of, of.bags[1], [2, 0])
  for pixels, name in zip(read.pixels, ("7.png", "1.png"), strict=True):
    whole = images.decode(groups / name)
    np.testing.assert_array_equal(pixels, images.fit(whole, 16))

  slides = tmp_path / "slides"
  path = _manifest(slides, ("path", "label", "group", "slide"), rows)
  of = _open(path)
  assert of.what == "slides" and of.size == 224
  # A name that no file can have.
  assert [b.name for b in of.bags][:2] == ["s0_0", "s1_1"]
  assert {b.group for b in of.bags} == {"p0", "p1", "p2"}
  of = _open(path, bag="group")
  assert [bag.label for bag in of.bags] == ["", "", ""]
  assert len(_open(path, bag="folder").bags) == 1
  with pytest.raises(errors.UsageError, match="no column 'slide'"):
    _open(groups / "manifest.csv", bag="slide")


def test_a_folder_of_saved_tiles_has_coordinates(tmp_path):
  """As `tile` saves them, <slide>/<x>_<y>.jpg; one other name, and there are
  none, for they would be of some rows alone."""
  names = ["s1/0_64.png", "s1/128_64.png", "s2/5_7.png", "s2/5_8.png"]
  _write_images(tmp_path / "tiles", names)
  of = _open(tmp_path / "tiles")
  assert of.what == "folders"
  assert [(b.name, b.label) for b in of.bags] == [("s1", "s1"), ("s2", "s2")]
  found = of.bags[0].open().coords
  assert sorted(found.tolist()) == [[0, 64], [128, 64]]
  _write_images(tmp_path / "tiles", ["s2/overview.png"])
  of = _open(tmp_path / "tiles")
  assert of.bags[1].open().coords is None


def test_bags_that_would_be_one_file_are_refused(tmp_path):
  rows = [("1.png", "x", "a/b"), ("2.png", "y", "a:b"), ("3.png", "x", "c")]
  path = _manifest(tmp_path, ("path", "label", "group"), rows)
  with pytest.raises(errors.UsageError, match="'a/b' and 'a:b' would be one"):
    _open(path)


def test_an_image_that_changed_is_known(tmp_path):
  """And it alone: the digests of other bags stay."""
  rows = [(f"{i}.png", "xy"[i % 2], f"p{i % 2}") for i in range(4)]
  path = _manifest(tmp_path, ("path", "label", "group"), rows)
  before = [bag.digest for bag in _open(path).bags]
  assert before == [bag.digest for bag in _open(path).bags]
  (tmp_path / "1.png").write_bytes(b"no image")
  of = _open(path)
  assert [bag.digest for bag in of.bags][0] == before[0]
  assert [bag.digest for bag in of.bags][1] != before[1]
  read = _read(of, of.bags[1], [0, 1])
  assert read.reasons[0] and not read.reasons[1] and not read.broken


@pytest.mark.parametrize(
  ("source", "coords", "bag", "says"),
  [
    ("synthetic:slides?slides=2", "", "", "run the job tile on it"),
    ("synthetic:tissue", "anything", "group", "leave one of them out"),
  ],
)
def test_mistakes_are_told(source, coords, bag, says):
  with pytest.raises(errors.UsageError, match=says):
    _open(source, coords, bag)
