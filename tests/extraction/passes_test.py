"""Files hold what networks make of each tile, whatever happens to the pass."""

import functools
import logging
import pathlib
import shutil
import threading

import h5py
import jax
import ml_collections
import numpy as np
import pytest

from jaxtransfer import errors, parallel
from jaxtransfer.data import feature_files, preprocess, tiles
from jaxtransfer.extraction import encoders, passes, store
from jaxtransfer.networks import tensors
from tests.extraction import drawn

COUNTS = {"a": 70, "b": 20, "empty": 0, "c": 9}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Slides of a large, two small and no number of tiles."""
  return drawn.write(tmp_path_factory.mktemp("drawn"), COUNTS)


@pytest.fixture(scope="module")
def networks():
  """Two small networks, one of them at two cuts."""
  return [
    *encoders.open_encoders("resnet18", "stem"),
    *encoders.open_encoders("cbr_tiny", "block1,block2", seed=3),
  ]


def _open(root, **changes):
  config = ml_collections.ConfigDict(
    {
      "source": str(root / "slides"),
      "image_size": 0,
      "max_pixels": 10**8,
      "task": "",
      "tfds_dir": "",
      **changes,
    }
  )
  return tiles.open_tiles(config, str(root / "coords"))


def _extraction(root, networks, directory, devices=None, **changes):
  settings = {"batch_size": 16, "max_failures": 0.1, **changes}
  return passes.Extraction(
    _open(root),
    networks,
    devices or parallel.Devices("jit", jax.devices()[:1]),
    store.Settings(**settings),
    directory,
  )


def _run(*arguments, **changes):
  extraction = _extraction(*arguments, **changes)
  extraction.store.look()
  extraction.run()
  return extraction


def _bytes(directory: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in directory.rglob("*.h5")
  }


@pytest.fixture(scope="module")
def finished(written, networks, tmp_path_factory):
  """A run that nothing disturbed."""
  return _run(written, networks, tmp_path_factory.mktemp("finished"))


@pytest.mark.parametrize("mode", parallel.MODES)
def test_each_row_is_the_network_on_that_tile(
  written, networks, tmp_path, mode
):
  """In the order of the coords, which is not that of reading: each compared
  with the network on the tile alone, cut out of the drawn pixels; on several
  devices, with batches that hold tiles of several slides, and padding."""
  devices = parallel.Devices(mode, jax.devices()[: 8 if mode == "jit" else 2])
  extraction = _run(written, networks, tmp_path, devices, dtype="float32")
  assert [o.folder for o in extraction.outputs] == [
    "resnet18-random-stem",
    "cbr_tiny-random-block1",
    "cbr_tiny-random-block2",
  ]
  places = [drawn.places(n, seed) for seed, n in enumerate(COUNTS.values())]
  pixels = np.stack(
    [drawn.tile(seed, c) for seed, found in enumerate(places) for c in found]
  )
  rows = np.split(np.arange(len(pixels)), np.cumsum(list(COUNTS.values())))
  for output in extraction.outputs:
    encoder = output.encoder
    x = preprocess.preprocess(pixels, encoder.source.mean, encoder.source.std)
    wanted = jax.jit(functools.partial(encoder.compute, encoder.network))(x)
    for name, of_slide, corners in zip(COUNTS, rows[:-1], places, strict=True):
      path = tmp_path / "features" / output.folder / f"{name}.h5"
      with h5py.File(path) as f:
        features, coords = f["features"][:], f["coords"][:]
      assert features.shape == (COUNTS[name], output.channels)
      assert coords.dtype == np.int64
      np.testing.assert_array_equal(coords, corners)
      np.testing.assert_allclose(
        features, wanted[output.tap][of_slide], rtol=1e-4, atol=1e-5
      )


def test_files_say_of_what_they_are(finished, networks):
  """What decides features stands beside them; TRIDENT's own attributes, and the
  exact resolution, beside coords."""
  output = finished.outputs[2]
  path = finished.store.file(output, finished.tiles.bags[0])
  read = feature_files.read_features(path)
  assert read.features.dtype == np.float16
  said = read.attributes
  assert said["network"] == "cbr_tiny" and said["cut"] == "block2"
  assert said["weights"] == "random" and len(said["weights_sha256"]) == 64
  assert said["normalisation"]["mean"] == [0.485, 0.456, 0.406]
  assert said["image_size"] == said["tile"] == said["patch_size"] == drawn.TILE
  assert said["mpp"] == drawn.MPP and said["level0_width"] == drawn.SIDE
  assert said["dropped"] == 0 and said["resize"]["interpolation"] == "bilinear"
  assert said["encoder"] == output.folder and said["name"] == "a"


def test_what_is_missing_is_made_again_to_the_bit(
  written, networks, finished, tmp_path
):
  """One file gone, one cut short, one record gone, one process killed while it
  wrote: the slides that they are of are made again, of a packet only its own,
  and the others stay."""
  directory = tmp_path / "run"
  shutil.copytree(finished.store.path.parent, directory)
  before = _bytes(directory)
  folders = [output.folder for output in finished.outputs]
  features = directory / "features"
  (features / folders[0] / "a.h5").unlink()
  cut = features / folders[1] / "b.h5"
  cut.write_bytes(cut.read_bytes()[:-100])
  kept = features / folders[1] / "c.h5"
  stamp = kept.stat().st_mtime_ns
  left = features / folders[1] / ".b.h5.0123abcd.tmp"
  left.write_bytes(b"a part")
  (directory / "units" / "empty" / "done.json").unlink()
  extraction = _extraction(written, networks, directory)
  missing = extraction.store.look()
  assert [bag.name for bag in missing] == ["a", "b", "empty"]
  assert any("damaged" in note for note in extraction.store.notes)
  extraction.run()
  assert _bytes(directory) == before and not left.exists()
  assert kept.stat().st_mtime_ns == stamp
  assert not extraction.store.look()


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"dtype": "float32"}, "features_dtype: 'float16' there, 'float32' now"),
    ({"layout": "stamp"}, "layout: 'trident' there, 'stamp' now"),
  ],
)
def test_files_of_other_settings_are_refused(
  written, networks, finished, change, says
):
  extraction = _extraction(
    written, networks, finished.store.path.parent, **change
  )
  with pytest.raises(errors.UsageError, match=says):
    extraction.store.look()


def test_files_of_other_tiles_or_weights_are_refused(
  written, networks, finished, tmp_path
):
  """Coordinates or a slide that changed since, other weights under the same
  name, or a file that somebody put there."""
  root, directory = tmp_path / "drawn", tmp_path / "run"
  shutil.copytree(written, root)
  shutil.copytree(finished.store.path.parent, directory)
  _extraction(root, networks, directory).store.look()

  def refused(match, used=networks):
    extraction = _extraction(root, used, directory)
    with pytest.raises(errors.UsageError, match=match):
      extraction.store.look()

  path = root / "coords" / "b.h5"
  before = path.read_bytes()
  feature_files.write_coords(path, drawn.coords(drawn.places(20, 9)))
  refused("b.h5 holds other features .tiles: ")
  path.write_bytes(before)
  slide = root / "slides" / "c.tiff"
  data = bytearray(slide.read_bytes())
  data[-1] ^= 1
  slide.write_bytes(data)
  refused("c.h5 holds other features .tiles: ")
  data[-1] ^= 1
  slide.write_bytes(data)
  others = encoders.open_encoders("cbr_tiny", "block1,block2", seed=4)
  refused("weights_sha256", others)
  folder = directory / "features" / finished.outputs[0].folder
  with h5py.File(folder / "stray.h5", "w") as f:
    f["features"] = np.zeros((3, 64), np.float16)
  refused("stray.h5 holds other features .network: None there")


def test_a_tile_that_cannot_be_read_is_dropped_and_named(networks, tmp_path):
  """Its neighbours keep their features and places, and no file has a row of a
  white or black tile; too many, and the slide fails while the rest go on."""
  root = drawn.write(tmp_path / "drawn", {"a": 70, "b": 20})
  whole = _run(root, networks, tmp_path / "whole")
  drawn.damage(root / "slides" / "a.tiff", 0)
  # Of its own tiles, a block of a corner is a small share.
  corners = drawn.places(70, 0)
  bad = (corners < 64).all(1)
  assert 1 < bad.sum() < 12
  found = _run(root, networks, tmp_path / "run", max_failures=0.2)
  record = next(r for r in found.store.results() if r["name"] == "a")
  assert record["tiles"] == 70 - bad.sum() and not record["reason"]
  dropped = {(int(x), int(y)) for x, y, _, _ in record["dropped"]}
  assert dropped == set(map(tuple, corners[bad].tolist()))
  assert all("damaged there" in reason for *_, reason in record["dropped"])
  for output in found.outputs:
    rows = feature_files.read_features(
      found.store.file(output, found.tiles.bags[0])
    )
    before = feature_files.read_features(
      whole.store.file(output, whole.tiles.bags[0])
    )
    np.testing.assert_array_equal(rows.coords, corners[~bad])
    np.testing.assert_array_equal(rows.features, before.features[~bad])
    assert rows.attributes["dropped"] == bad.sum()

  strict = _run(root, networks, tmp_path / "strict", max_failures=0.01)
  a, b = strict.store.results()
  assert "more than data.max_failures = 0.01; the first: (" in a["reason"]
  assert not b["reason"] and b["tiles"] == 20
  assert not list((tmp_path / "strict" / "features").glob("*/a.h5"))
  # Found by whoever comes next, and tried again only when that is asked for.
  again = _extraction(root, networks, tmp_path / "strict", max_failures=0.01)
  assert not again.store.look() and again.store.results()[0] == a
  again.store.forget_failures()
  assert [bag.name for bag in again.store.look()] == ["a"]


def test_slides_that_cannot_be_used_are_told_and_the_rest_go_on(
  networks, tmp_path
):
  """A text named as a slide, a slide cut short, coordinates of a slide of
  another size or resolution, and of another level, whose last tiles lie
  outside; a slide that nobody tiled, and coordinates that are none."""
  names = ["good", "text", "short", "size", "mpp", "level", "untiled", "none"]
  root = drawn.write(tmp_path / "drawn", dict.fromkeys(names, 20))
  slides, coords = root / "slides", root / "coords"
  (slides / "text.tiff").write_text("no slide")
  data = (slides / "short.tiff").read_bytes()
  (slides / "short.tiff").write_bytes(data[: len(data) // 2])
  some = drawn.places(20, 3)
  for name, corners, changes in (
    ("size", some, {"width": 640, "height": 640}),
    ("mpp", some, {"mpp": 0.25}),
    ("level", 4 * some, {}),
  ):
    path = coords / f"{name}.h5"
    feature_files.write_coords(path, drawn.coords(corners, **changes))
  (coords / "untiled.h5").unlink()
  (coords / "none.h5").write_bytes(b"nothing")
  # One mpp beside others is refused before any work.
  with pytest.raises(errors.UsageError, match="0.25 .mpp.; their features"):
    _open(root)
  path = coords / "mpp.h5"
  feature_files.write_coords(path, drawn.coords(some, extent=16.0))
  found = _run(root, networks, tmp_path / "run")
  reasons = {r["name"]: r["reason"] for r in found.store.results()}
  assert set(reasons) == set(names) and not reasons["good"]
  for name, words in {
    "text": "a text file",
    "size": "640 x 640 pixels, but it has 320 x 320",
    "mpp": "1 um/px at level 0, but it has 0.5",
    "level": "lies outside of its 320 x 320 pixels",
    "untiled": "no coords: no untiled.h5",
    "none": "not an HDF5 file",
  }.items():
    assert words in reasons[name], reasons[name]
  assert reasons["short"]
  left = {path.stem for path in (tmp_path / "run").rglob("*.h5")}
  assert left == {"good"}


def test_numbers_beyond_float16_fail_the_slide(written, networks, tmp_path):
  """It is said, and by how it can be mended; float32 holds them."""
  network = encoders.open_encoders("cbr_tiny", "block1")[0]
  values = tensors.dump(network.network)
  name = next(n for n in values if n.endswith("weight") and values[n].ndim == 1)
  values[name] = values[name] * 1e6
  tensors.load(network.network, values)
  found = _run(written, [network], tmp_path / "half")
  reasons = [r["reason"] for r in found.store.results() if r["name"] != "empty"]
  assert all("features_dtype=float32" in reason for reason in reasons)
  found = _run(written, [network], tmp_path / "single", dtype="float32")
  assert not any(r["reason"] for r in found.store.results())


def test_processes_that_share_a_directory_do_each_slide_once(
  written, networks, finished, tmp_path
):
  """Here three of them in threads: each waits for what another has in hands,
  and none for ever."""
  runs = [_extraction(written, networks, tmp_path) for _ in range(3)]
  made = []
  for run in runs:
    original = run.store.record
    run.store.record = lambda bag, record, original=original: (
      made.append(bag.name),
      original(bag, record),
    )
    run.store.look()
  threads = [threading.Thread(target=run.run) for run in runs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
    assert not thread.is_alive()
  assert sorted(made) == sorted(COUNTS)
  assert _bytes(tmp_path) == _bytes(finished.store.path.parent)


def test_a_full_disk_ends_the_run_and_leaves_no_lock(
  written, networks, tmp_path, monkeypatch
):
  """The error is the system's; with room the same directory goes on."""
  extraction = _extraction(written, networks, tmp_path)
  extraction.store.look()

  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left"):
      extraction.run()
  assert not list(tmp_path.rglob("*.h5"))
  again = _run(written, networks, tmp_path)
  assert not any(r["reason"] for r in again.store.results())


def test_nothing_is_compiled_after_the_first_batch(written, networks, tmp_path):
  """Not for another slide, the padded batch at a packet's end, nor for a second
  network that differs in its numbers alone."""
  used = networks + encoders.open_encoders("cbr_tiny", "block1,block2", seed=5)
  records = []
  handler = logging.Handler()
  handler.emit = lambda record: records.append(record.getMessage())
  logger = logging.getLogger("jax._src.dispatch")
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      _run(written, used, tmp_path)
  finally:
    logger.removeHandler(handler)
  compiled = [r for r in records if "XLA compilation of jit(forward)" in r]
  assert len(compiled) == 2


def test_packets_are_large_first_and_hold_each_bag_once():
  counts = [3, 500, 64, 63, 0, 900, 40, 40, 200]
  bags = [tiles.Bag(f"{i}", count, "", "") for i, count in enumerate(counts)]
  packets = store.pack(bags, 16)
  assert sorted(b.name for p in packets for b in p.bags) == sorted(
    b.name for b in bags
  )
  sizes = [packet.count for packet in packets]
  assert sizes == sorted(sizes, reverse=True)
  for packet in packets:
    # Small ones share batches, so that few are padded.
    assert len(packet.bags) == 1 or all(b.count < 64 for b in packet.bags)
  assert max(sizes) == 900 and store.pack(bags, 16) == packets


def test_neighbours_are_read_together():
  """A piece of sixteen tiles of a grid is a square of four by four, in
  whatever order the file has them."""
  x, y = np.meshgrid(np.arange(16) * 100, np.arange(8) * 100)
  corners = np.stack([x.ravel(), y.ravel()], 1)
  corners = np.random.default_rng(0).permutation(corners)
  order = tiles._in_squares(corners, 100)
  assert sorted(order) == list(range(len(corners)))
  for start in range(0, len(order), 16):
    piece = corners[order[start : start + 16]]
    assert (np.ptp(piece, axis=0) == 300).all()
