"""Feature and coordinate files as TRIDENT, CLAM and STAMP read and write them.

Their own code is not run here: what it does to a file, one call of h5py at a
time, is written out below, from the sources that the module names.
"""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from jaxtransfer.data import feature_files
from jaxtransfer.data.feature_files import (
  Coords,
  FeatureFile,
  FeatureFileError,
  inspect,
  read_coords,
  read_features,
  write_coords,
  write_features,
)

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(7, 12)).astype(np.float32)
COORDS = RNG.integers(0, 90_000, (7, 2))
# A Hamamatsu scanner's: TRIDENT calls it 40x, and halves a tile's 512 px.
LEVEL0_MPP = 0.2265
OURS = Coords(
  COORDS,
  extent=256 * 0.5 / LEVEL0_MPP,
  tile=256,
  mpp=0.5,
  width=100_000,
  height=80_000,
  attributes={"name": "a slide", "overlap": 0, "tissue": "otsu"},
)
TRIDENT = {
  "patch_size": 256,
  "patch_size_level0": 256 * 40 // 20,
  "level0_magnification": 40,
  "target_magnification": 20,
  "overlap": 0,
  "name": "a slide",
  "savetodir": "/somewhere/patches",
  "level0_width": 100_000,
  "level0_height": 80_000,
}
CLAM = {
  "patch_size": 256,
  "patch_level": 1,
  "downsample": np.array([4.0, 4.0002]),
  "downsampled_level_dim": np.array([25_000, 20_000]),
  "level_dim": np.array([25_000, 20_000]),
  "name": "a slide",
  "save_path": "patches",
}


def _save(path, assets, attributes=None):
  """Writes as TRIDENT's `save_h5` and CLAM's `save_hdf5` do: in two batches,
  one row to a chunk, None and dicts as text."""
  with h5py.File(path, "w") as f:
    for key, value in assets.items():
      half = len(value) // 2
      data = f.create_dataset(
        key,
        shape=value[:half].shape,
        maxshape=(None, *value.shape[1:]),
        chunks=(1, *value.shape[1:]),
        dtype=value.dtype,
      )
      data[:] = value[:half]
      data.resize(len(value), axis=0)
      data[half:] = value[half:]
      for name, attribute in (attributes or {}).get(key, {}).items():
        if isinstance(attribute, dict):
          attribute = json.dumps(attribute)
        data.attrs[name] = "None" if attribute is None else attribute
  return path


def _stamp(path, features, attributes, coords):
  with h5py.File(path, "w") as f:
    f["feats"] = features
    f["coords"] = coords
    f.attrs.update(attributes)
  return path


# --- coordinates -------------------------------------------------------------


def test_trident_reads_our_coordinates(tmp_path):
  """TRIDENT takes attributes and coords whole, and draws squares of
  `patch_size_level0`, which must be a whole number."""
  path = tmp_path / "coords" / "slide.h5"
  write_coords(path, OURS)
  with h5py.File(path) as f:
    attributes, coords = dict(f["coords"].attrs), f["coords"][:]
  assert coords.dtype == np.int64
  np.testing.assert_array_equal(coords, COORDS)
  assert set(TRIDENT) <= set(attributes)
  assert attributes["patch_size_level0"] == 565
  assert attributes["patch_size"] == 256
  assert attributes["level0_magnification"] == 40
  assert attributes["target_magnification"] == 20
  assert attributes["level0_width"] == 100_000
  assert attributes["name"] == "a slide"
  assert attributes["savetodir"] == "None"


def test_our_coordinates_come_back_exactly(tmp_path):
  """565 px are whole, 565.12 are right: over a row of 150 tiles the two differ
  by 18 px, and a tile is asked for by its fraction."""
  write_coords(tmp_path / "a.h5", OURS)
  read = read_coords(tmp_path / "a.h5")
  assert read.extent == pytest.approx(256 * 0.5 / LEVEL0_MPP, rel=1e-14)
  assert read.level0_mpp == pytest.approx(LEVEL0_MPP, rel=1e-14)
  assert (read.tile, read.mpp, read.layout) == (256, 0.5, "ours")
  assert (read.width, read.height) == (100_000, 80_000)
  assert read.attributes["tissue"] == "otsu"
  np.testing.assert_array_equal(read.coords, COORDS)
  write_coords(tmp_path / "b.h5", read)
  assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_tridents_coordinates_have_its_own_size_of_a_tile(tmp_path):
  """Its attribute is what it read: 512 px, whatever the slide's mpp says."""
  path = _save(tmp_path / "a.h5", {"coords": COORDS}, {"coords": TRIDENT})
  read = read_coords(path)
  assert (read.extent, read.tile, read.layout) == (512.0, 256, "trident")
  assert (read.mpp, read.level0_mpp) == (None, None)
  assert (read.width, read.height) == (100_000, 80_000)
  np.testing.assert_array_equal(read.coords, COORDS)


@pytest.mark.parametrize(
  ("changes", "extent"),
  [
    ({}, 256 * 4.0001),
    ({"downsample": 4.0}, 1024),
    ({"custom_downsample": 2}, 256 * 4.0001 * 2),
    ({"patch_level": 0, "downsample": 1.0}, 256),
    ({"patch_level": 0, "downsample": None}, 256),
    ({"patch_size": "256", "downsample": "4"}, 1024),
  ],
)
def test_clams_tiles_are_as_large_as_their_level_says(
  tmp_path, changes, extent
):
  """`from_legacy_coords` of TRIDENT: the level's downsample times the custom
  one, and what it reads becomes `patch_size` pixels."""
  attributes = {**CLAM, **changes}
  attributes = {k: v for k, v in attributes.items() if v is not None}
  path = _save(tmp_path / "a.h5", {"coords": COORDS}, {"coords": attributes})
  read = read_coords(path)
  assert read.extent == pytest.approx(extent, rel=1e-12)
  assert (read.tile, read.layout) == (256, "clam")
  at_level0 = attributes["patch_level"] == 0
  assert read.width == (25_000 if at_level0 else None)


@pytest.mark.parametrize("shape", [(0, 2), (0,)])
def test_a_slide_without_tissue_has_no_tiles(tmp_path, shape):
  """TRIDENT's `np.array([])` has one axis and is float64."""
  with h5py.File(tmp_path / "a.h5", "w") as f:
    f["coords"] = np.zeros(shape)
    f["coords"].attrs.update(TRIDENT)
  read = read_coords(tmp_path / "a.h5")
  assert read.coords.shape == (0, 2) and read.coords.dtype == np.int64
  write_coords(tmp_path / "b.h5", read)
  assert read_coords(tmp_path / "b.h5").coords.shape == (0, 2)


@pytest.mark.parametrize(
  ("coords", "attributes", "message"),
  [
    (COORDS, {"patch_size": 256, "patch_level": 2}, "does not say how large"),
    (COORDS, {}, "does not say how large"),
    (COORDS, {"patch_size_level0": 0}, "patch_size_level0 0; it must be"),
    (COORDS, {"patch_size_level0": "wide"}, "'wide'; it must be above 0"),
    (COORDS + 0.5, TRIDENT, "not whole pixels"),
    (COORDS * np.nan, TRIDENT, "NaN or infinity"),
    (COORDS[:, :1], TRIDENT, r"\(7, 1\) of int64, not \(tiles, 2\)"),
    (
      COORDS,
      {**TRIDENT, "mpp": 0.5, "level0_mpp": 0.5},
      "two sizes of a tile: patch_size_level0 is 512, .* are 256.0",
    ),
  ],
)
def test_coordinates_that_cannot_be_used_say_why(
  tmp_path, coords, attributes, message
):
  """The path comes first, in one line, whatever is wrong."""
  path = _save(tmp_path / "a.h5", {"coords": coords}, {"coords": attributes})
  with pytest.raises(FeatureFileError, match=message) as caught:
    read_coords(path)
  assert str(caught.value).startswith(f"{path}: ")
  assert "\n" not in str(caught.value)


# --- features ----------------------------------------------------------------


def _ours(**changes):
  attributes = {
    **OURS.described(),
    "network": "resnet50",
    "cut": "layer3",
    "weights": None,
    "weights_sha256": "0f" * 32,
    "tile": 256,
    "normalisation": {"mean": [0.5, 0.4, 0.6], "std": [0.2, 0.3, 0.25]},
    "versions": {"jax": "0.10.2"},
    "encoder": "resnet50-imagenet-layer3",
  }
  file = FeatureFile(FEATURES, COORDS, "px", OURS.extent, None, attributes)
  for key, value in changes.items():
    setattr(file, key, value)
  return file


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_clam_and_trident_read_our_features(tmp_path, dtype):
  """CLAM takes `features` and `coords` whole; TRIDENT looks at the attributes
  of both."""
  features = FEATURES.astype(dtype)
  write_features(tmp_path / "a.h5", _ours(features=features))
  with h5py.File(tmp_path / "a.h5", "r") as f:
    np.testing.assert_array_equal(f["features"][:], features)
    np.testing.assert_array_equal(f["coords"][:], COORDS)
    assert f["features"].dtype == dtype
    assert f["coords"].attrs["patch_size_level0"] == 565
    assert f["features"].attrs["encoder"] == "resnet50-imagenet-layer3"
    assert f["features"].attrs["weights"] == "None"
    assert f["features"].attrs["mpp"] == 0.5
    assert f["features"].attrs["name"] == "a slide"
    means = json.loads(f["features"].attrs["normalisation"])["mean"]
    assert means == [0.5, 0.4, 0.6]


def test_our_features_come_back_with_all_they_say(tmp_path):
  """And they are coordinates too: how large a tile is stands in them."""
  write_features(tmp_path / "a.h5", _ours())
  read = read_features(tmp_path / "a.h5")
  np.testing.assert_array_equal(read.features, FEATURES)
  np.testing.assert_array_equal(read.coords, COORDS)
  assert (read.unit, read.layout, read.names) == ("px", "ours", None)
  assert read.extent == pytest.approx(OURS.extent, rel=1e-14)
  assert read.attributes == _ours().attributes
  assert len(read.nonfinite) == 0 and not read.notes
  coords = read_coords(tmp_path / "a.h5")
  assert coords.extent == read.extent and coords.layout == "ours"
  described = inspect(tmp_path / "a.h5")
  assert (described.count, described.dim) == (7, 12)
  assert described.attributes == read.attributes
  assert (described.dtype, described.layout) == (np.float32, "ours")


def test_features_of_images_have_their_names(tmp_path):
  """Images of a folder lie nowhere on a slide, and their names may be
  anything."""
  names = [f"a/{i}.png" for i in range(5)] + ["ü\udcff.png", "<b>\n"]
  write_features(tmp_path / "a.h5", FeatureFile(FEATURES, names=names))
  read = read_features(tmp_path / "a.h5")
  assert read.names == [*names[:5], "ü\\udcff.png", "<b>\\n"]
  assert (read.coords, read.unit, read.extent) == (None, None, None)
  some = read.take(np.array([6, 0]))
  assert some.names == ["<b>\\n", "a/0.png"]
  np.testing.assert_array_equal(some.features, FEATURES[[6, 0]])


def test_tridents_and_clams_features_are_read(tmp_path):
  """TRIDENT writes None and dicts as text; CLAM writes nothing beside them."""
  assets = {"features": FEATURES, "coords": COORDS}
  own = {"name": "[1]", "savetodir": None, "encoder": "uni", "x": {"a": [1]}}
  path = _save(tmp_path / "a.h5", assets, {"features": own, "coords": TRIDENT})
  read = read_features(path)
  np.testing.assert_array_equal(read.features, FEATURES)
  np.testing.assert_array_equal(read.coords, COORDS)
  assert (read.unit, read.extent, read.layout) == ("px", 512.0, "trident")
  assert read.attributes == {**TRIDENT, **own}
  assert inspect(path).layout == "trident"
  clam = read_features(_save(tmp_path / "b.h5", assets))
  np.testing.assert_array_equal(clam.coords, COORDS)
  assert (clam.unit, clam.extent, clam.layout) == ("px", None, "clam")
  assert clam.attributes == {}


def test_a_leading_one_is_no_axis_of_tiles(tmp_path):
  """Of older files, with and without coordinates."""
  path = _save(
    tmp_path / "a.h5", {"coords": COORDS, "features": FEATURES[None]}
  )
  read = read_features(path)
  np.testing.assert_array_equal(read.features, FEATURES)
  assert inspect(path).count == 7
  with h5py.File(tmp_path / "b.h5", "w") as f:
    f["features"] = FEATURES[None]
  assert read_features(tmp_path / "b.h5").features.shape == (7, 12)


@pytest.mark.parametrize(
  ("attributes", "unit", "extent"),
  [
    ({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224}, "um", 256.0),
    ({"unit": "um", "tile_size": 256.0}, "um", 256.0),
    ({}, None, None),
  ],
)
def test_stamps_features_are_in_micrometres(tmp_path, attributes, unit, extent):
  """Its first versions do not say their unit; nothing is made up for them."""
  coords = COORDS * 0.25
  path = _stamp(
    tmp_path / "a.h5", FEATURES.astype(np.float16), attributes, coords
  )
  read = read_features(path)
  assert read.features.dtype == np.float16 and read.layout == "stamp"
  assert (read.unit, read.extent) == (unit, extent)
  np.testing.assert_array_equal(read.coords, coords)


def test_stamp_reads_our_features(tmp_path):
  """Its loader takes `feats`, `coords` and these attributes of the file."""
  write_features(tmp_path / "a.h5", _ours(), "stamp")
  with h5py.File(tmp_path / "a.h5", "r") as f:
    assert f["feats"].dtype == np.float16
    np.testing.assert_allclose(f["feats"][:], FEATURES, rtol=1e-3)
    np.testing.assert_allclose(f["coords"][:], COORDS * LEVEL0_MPP, rtol=1e-6)
    assert f.attrs["unit"] == "um" and f.attrs["feat_type"] == "tile"
    assert float(f.attrs["tile_size_um"]) == pytest.approx(128.0)
    assert int(f.attrs["tile_size_px"]) == 256
    assert tuple(map(int, f.attrs["stamp_version"].split("."))) <= (2, 5, 0)
    assert f.attrs["extractor"] == "resnet50-imagenet-layer3"
    assert f.attrs["code_hash"] == "0f" * 32
  read = read_features(tmp_path / "a.h5")
  assert (read.unit, read.layout) == ("um", "stamp")
  assert read.extent == pytest.approx(128.0)
  assert read.attributes["network"] == "resnet50"


def test_what_stamp_cannot_hold_is_refused(tmp_path):
  """A number above float16's largest, or a slide of unknown resolution."""
  large = FEATURES.copy()
  large[3, 3] = 1e5
  with pytest.raises(FeatureFileError, match="reach 1e[+]05, above its 65504"):
    write_features(tmp_path / "a.h5", _ours(features=large), "stamp")
  with pytest.raises(FeatureFileError, match="need tiles of slides whose mpp"):
    write_features(tmp_path / "a.h5", _ours(attributes=TRIDENT), "stamp")
  assert not list(tmp_path.iterdir())


def test_rows_that_are_not_finite_are_named(tmp_path, monkeypatch):
  """None is dropped here, and what is dropped takes its coordinates along."""
  monkeypatch.setattr(feature_files, "_ROWS", 3)
  features = FEATURES.copy()
  features[2, 5], features[6, 0] = np.nan, -np.inf
  write_features(tmp_path / "a.h5", _ours(features=features))
  read = read_features(tmp_path / "a.h5")
  assert read.nonfinite.tolist() == [2, 6]
  mask = np.ones(7, bool)
  mask[2] = False
  kept = read.take(mask)
  assert kept.nonfinite.tolist() == [5]
  np.testing.assert_array_equal(kept.coords, COORDS[mask])


def test_doubles_are_read_as_floats_and_told(tmp_path):
  """Twice the memory for digits that no network gave; big-endian ones too."""
  _save(tmp_path / "a.h5", {"features": FEATURES.astype(">f8")})
  read = read_features(tmp_path / "a.h5")
  assert read.features.dtype == np.float32
  assert read.notes == ["features are >f8, read as float32"]
  np.testing.assert_array_equal(read.features, FEATURES)
  _save(tmp_path / "b.h5", {"features": FEATURES.astype(">f4")})
  read = read_features(tmp_path / "b.h5")
  assert read.features.dtype == np.float32 and not read.notes


def test_a_slide_without_tiles_has_features_of_no_rows(tmp_path):
  """Written and read: (0, D), with its (0, 2) coordinates."""
  none = _ours(features=FEATURES[:0], coords=COORDS[:0])
  write_features(tmp_path / "a.h5", none)
  read = read_features(tmp_path / "a.h5")
  assert read.features.shape == (0, 12) and read.coords.shape == (0, 2)
  assert inspect(tmp_path / "a.h5").count == 0


@pytest.mark.parametrize(
  ("assets", "message"),
  [
    ({"features": FEATURES.astype(np.int32)}, "features are int32; those"),
    ({"features": FEATURES[0]}, r"the shape \(12,\), not \(tiles, channels\)"),
    ({"features": np.stack([FEATURES] * 2)}, r"the shape \(2, 7, 12\)"),
    ({"features": FEATURES, "coords": COORDS[1:]}, "7 rows of .* 6 of coords"),
    ({"coords": COORDS, "x": COORDS}, "no features; there is coords, x"),
    ({}, "no features; there is nothing in it"),
  ],
)
def test_features_that_cannot_be_used_say_why(tmp_path, assets, message):
  """With the shape or the type, and for `inspect` as for `read_features`."""
  path = _save(tmp_path / "a.h5", assets)
  for read in (read_features, inspect):
    with pytest.raises(FeatureFileError, match=message) as caught:
      read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# --- damaged files -----------------------------------------------------------


def _refused(path, message):
  for read in (read_features, inspect):
    with pytest.raises(FeatureFileError, match=message) as caught:
      read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("writer", ["ours", "clam"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, writer):
  """At 60 lengths: none is read as fewer tiles, none ends in a traceback."""
  path = tmp_path / "a.h5"
  if writer == "ours":
    write_features(path, _ours())
  else:
    _save(path, {"features": FEATURES, "coords": COORDS})
  whole = path.read_bytes()
  for length in np.linspace(0, len(whole) - 1, 60).astype(int):
    path.write_bytes(whole[:length])
    _refused(path, "cut short|not an HDF5 file|damaged")
  path.write_bytes(whole)
  assert len(read_features(path).features) == 7


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("rows", [0, 1, 24])
def test_rows_declared_but_never_written_are_not_read_as_zeros(
  tmp_path, rows, compression
):
  """HDF5 gives zeros for them; a killed writer leaves such files, and its
  chunks at the ends are larger than what they hold."""
  features = RNG.normal(size=(25, 10)).astype(np.float32)
  for chunks in ((8, 8), (1, 10), None):
    if compression and not chunks:
      continue
    with h5py.File(tmp_path / "a.h5", "w") as f:
      stored = f.create_dataset(
        "features", (25, 10), "f4", chunks=chunks, compression=compression
      )
      if rows and chunks:
        stored[:rows] = features[:rows]
    _refused(tmp_path / "a.h5", "25 x 10 of float32, is not all in the file")
    if chunks:
      with h5py.File(tmp_path / "a.h5", "r+") as f:
        f["features"][:] = features
      read = read_features(tmp_path / "a.h5")
      np.testing.assert_array_equal(read.features, features)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_shape_that_no_memory_holds_is_refused_before_it_is_read(
  tmp_path, compression
):
  """A file of a few kilobytes claims eight exabytes."""
  with h5py.File(tmp_path / "a.h5", "w") as f:
    stored = f.create_dataset(
      "features", (2**50, 2**11), "f4", chunks=(4, 8), compression=compression
    )
    stored[:8, :8] = 1.0
  _refused(tmp_path / "a.h5", "is not all in the file")


def test_other_files_are_not_looked_into(tmp_path):
  """A link in a feature file could show any file that the user may read."""
  other = _save(tmp_path / "other.h5", {"features": FEATURES})
  raw = tmp_path / "raw.bin"
  raw.write_bytes(FEATURES.tobytes())
  path = tmp_path / "a.h5"

  def soft(f):
    f["inside"] = FEATURES
    f["features"] = h5py.SoftLink("/inside")

  def outside(f):
    f["features"] = h5py.ExternalLink(str(other), "/features")

  def external(f):
    f.create_dataset("features", (7, 12), "f4", external=[(raw, 0, 336)])

  def virtual(f):
    layout = h5py.VirtualLayout((7, 12), "f4")
    layout[:] = h5py.VirtualSource(str(other), "features", (7, 12))
    f.create_virtual_dataset("features", layout)

  def group(f):
    f.create_group("features")

  def empty(f):
    f["features"] = h5py.Empty("f4")

  def reference(f):
    f.create_dataset("features", (7, 12), h5py.ref_dtype)[:] = f.ref

  for write, message in (
    (soft, "features is a link, which is not followed"),
    (outside, "features is a link, which is not followed"),
    (external, "features lies in other files"),
    (virtual, "features lies in other files"),
    (group, "features is not a dataset"),
    (empty, "features is empty: it has no shape"),
    (reference, "features are object"),
  ):
    with h5py.File(path, "w") as f:
      write(f)
    _refused(path, message)


def test_what_is_no_hdf5_file_is_refused(tmp_path):
  """Text under that name, nothing, a folder, no file, none that may be read."""
  path = tmp_path / "a.h5"
  _refused(path, "there is no such file")
  path.write_text("slide,label\n")
  _refused(path, "not an HDF5 file")
  path.write_text("")
  _refused(path, "empty, not an HDF5 file")
  path.unlink()
  path.mkdir()
  _refused(path, "is a folder, not an HDF5 file")
  path.rmdir()
  if os.getuid():
    write_features(path, _ours())
    path.chmod(0)
    _refused(path, "permission denied")


def test_a_file_being_written_is_refused(tmp_path):
  """CLAM appends to the final file for as long as a slide takes."""
  path = _save(tmp_path / "a.h5", {"features": FEATURES})
  code = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print(); input()"
  with subprocess.Popen(
    [sys.executable, "-c", code],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as writer:
    writer.stdout.readline()
    _refused(path, "is being written by another process")
    writer.communicate(b"\n")
  assert len(read_features(path).features) == 7


def test_strange_attributes_are_left_out(tmp_path):
  """References, a text that is not UTF-8, JSON nested past all reason."""
  path = _save(tmp_path / "a.h5", {"features": FEATURES})
  with h5py.File(path, "r+") as f:
    attributes = f["features"].attrs
    attributes["reference"] = f["features"].ref
    attributes["bytes"] = np.bytes_(b"\xff\xfe")
    attributes["deep"] = "[" * 60_000
    attributes["broken"] = "{not json"
    attributes["empty"] = h5py.Empty("f4")
    attributes["flag"] = True
    attributes["several"] = np.arange(3)
    attributes["texts"] = ["a", "None"]
  attributes = read_features(path).attributes
  assert attributes.pop("deep")[:2] == "[["
  assert attributes.pop("bytes") in ("\\xff\\xfe", "\udcff\udcfe")
  assert attributes == {
    "broken": "{not json",
    "empty": None,
    "flag": True,
    "several": [0, 1, 2],
    "texts": ["a", None],
  }


def test_a_writers_mistakes_are_errors(tmp_path):
  """A file whose parts do not fit each other is never written."""
  for changes in (
    {"coords": COORDS[1:]},
    {"unit": "um"},
    {"features": FEATURES.astype(np.float64)},
    {"features": FEATURES[0]},
    {"names": ["a"]},
  ):
    with pytest.raises(ValueError, match="for|of"):
      write_features(tmp_path / "a.h5", _ours(**changes))
  with pytest.raises(ValueError, match="layout 'clam'"):
    write_features(tmp_path / "a.h5", _ours(), "clam")
  assert not list(tmp_path.iterdir())
