"""One pass gives all features, whatever the devices, parts and stops."""

import dataclasses
import gc
import logging
import pathlib
import resource

import jax
import numpy as np
import PIL.Image
import pytest

from jaxtransfer import errors, features, parallel
from jaxtransfer.configuration import shared as shared_config
from jaxtransfer.data import images as reading
from jaxtransfer.data import sources
from jaxtransfer.networks import tensors, zoo

TAPS = ["stem", "layer1.0"]
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture
def source(tmp_path):
  """Nineteen small images of two classes in a folder."""
  rng = np.random.default_rng(0)
  for i in range(19):
    path = tmp_path / "tiles" / "ab"[i % 2] / f"{i:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  return tmp_path / "tiles"


def _images(source: pathlib.Path, **changes) -> features.Images:
  config = shared_config("layers", "resnet18").data
  config.source = str(source)
  examples = sources.open_source(config)
  images = features.Images(
    examples=examples,
    rows=np.arange(len(examples)),
    image_size=32,
    mean=MEAN,
    std=STD,
    batch_size=8,
    workers=0,
    max_failures=0.2,
  )
  return dataclasses.replace(images, **changes)


def _networks(count=2):
  networks = {}
  for seed in range(count):
    networks[f"random-{seed}"] = zoo.build("resnet18", until=TAPS[-1])
    values = tensors.random(networks[f"random-{seed}"], seed)
    tensors.load(networks[f"random-{seed}"], values)
  return networks


def _extract(images, directory, devices=None, networks=None):
  return features.extract(
    images,
    networks or _networks(),
    TAPS,
    devices or parallel.Devices("jit", jax.devices()[:1]),
    directory,
    lambda **_: None,
  )


@pytest.mark.parametrize("mode", parallel.MODES)
@pytest.mark.parametrize("count", [1, 3, 19])
def test_rows_are_in_order_for_any_devices_and_number(
  source, tmp_path, mode, count
):
  """Each row is compared with the network applied to that image alone, in
  float64-normalised pixels: batching, padding, order and devices are all
  between the two, and three images are fewer than the eight devices.
  """
  images = _images(source, rows=np.arange(count)[::-1])
  devices = parallel.Devices(mode)
  found = _extract(images, tmp_path / "f", devices)
  network = _networks()["random-1"]
  for position, row in enumerate(images.rows):
    pixels = reading.fit(images.examples.read(int(row)), 32)
    x = ((pixels / 255 - MEAN) / STD)[None].astype(np.float32)
    for tap, alone in network.taps(x, TAPS).items():
      np.testing.assert_allclose(
        found["random-1"].tap(tap)[position], alone[0], rtol=1e-4, atol=1e-5
      )
  assert found["random-1"].rows().tolist() == images.rows.tolist()


@pytest.mark.parametrize("room", [0, 100, 1000, 4000])
def test_a_part_that_cannot_be_written_is_said_by_the_system(
  source, tmp_path, capfd, room
):
  """HDF5 has addresses in its errors, and ends the process when it cannot close
  its file: the one line names the part, and with room the pass goes on."""
  images = _images(source)
  # Compiled and kept before there is no room for it.
  _extract(images, tmp_path / "before")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
  try:
    with pytest.raises(OSError, match="File too large") as raised:
      _extract(images, tmp_path / "f")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert raised.value.filename.endswith("part-00000-of-00001.h5")
  gc.collect()
  assert not [path for path in (tmp_path / "f").rglob("*") if path.is_file()]
  assert "h5" not in capfd.readouterr().err
  found = _extract(images, tmp_path / "f")
  assert found["random-1"].rows().tolist() == images.rows.tolist()


def test_a_pass_that_stopped_goes_on_after_its_last_part(
  source, tmp_path, monkeypatch
):
  """Parts of five rows and batches of eight end at different rows; what is
  there already is neither read again nor changed.
  """
  monkeypatch.setattr(features, "PART_ROWS", 5)
  images = _images(source)
  whole = _extract(images, tmp_path / "whole")
  resumed = _extract(images, tmp_path / "resumed")
  resumed["random-0"].part(1).unlink()
  resumed["random-1"].part(3).write_bytes(b"cut short")
  kept = resumed["random-0"].part(0).stat().st_mtime_ns
  read = []
  original = images.examples.read
  monkeypatch.setattr(
    images.examples, "read", lambda row: (read.append(row), original(row))[1]
  )
  resumed = _extract(images, tmp_path / "resumed")
  assert sorted(read) == [5, 6, 7, 8, 9, 15, 16, 17, 18]
  assert resumed["random-0"].part(0).stat().st_mtime_ns == kept
  for label in whole:
    for tap in TAPS:
      np.testing.assert_allclose(
        resumed[label].tap(tap), whole[label].tap(tap), rtol=1e-5, atol=1e-6
      )


def test_unreadable_images_are_left_out_and_named(source, tmp_path):
  """The other rows keep their features: a bad one never shifts them."""
  (source / "a" / "04.png").write_bytes(b"not an image")
  found = _extract(_images(source), tmp_path / "f")["random-0"]
  bad = _images(source).examples.names.index("a/04.png")
  assert bad not in found.rows() and len(found.rows()) == 18
  assert len(found.tap("stem")) == 18
  assert [name for name, _ in found.failures()] == ["a/04.png"]
  with pytest.raises(errors.RunError, match="max_failures"):
    _extract(_images(source, max_failures=0.0), tmp_path / "g")


def test_the_limit_counts_what_earlier_starts_read(
  source, tmp_path, monkeypatch
):
  """Three of 19 images are one too many, in whichever start each was found:
  stopped after the second part, the run does not go on from zero; and all
  parts on disk are no way around it."""
  monkeypatch.setattr(features, "PART_ROWS", 5)
  names = _images(source).examples.names
  for row in (1, 7, 17):
    (source / names[row]).write_bytes(b"not an image")
  found = _extract(_images(source), tmp_path / "f")
  strict = _images(source, max_failures=2 / 19)
  with pytest.raises(errors.UnreadableError, match="3 of 19") as caught:
    _extract(strict, tmp_path / "f")
  for features_of in found.values():
    for part in (2, 3):
      features_of.part(part).unlink()
  with pytest.raises(errors.UnreadableError, match="3 of 19") as caught:
    _extract(strict, tmp_path / "f")
  assert [name for name, _ in caught.value.failures] == [
    names[row] for row in (1, 7, 17)
  ]
  kept = _images(source, max_failures=3 / 19)
  assert len(_extract(kept, tmp_path / "f")["random-0"].failures()) == 3


def test_what_determines_features_names_their_directory(source, tmp_path):
  """Another normalisation or an edited image must not find the old numbers."""
  first = _extract(_images(source), tmp_path / "f")["random-0"].directory
  again = _extract(_images(source), tmp_path / "f")["random-0"].directory
  other = _extract(_images(source, mean=(0, 0, 0)), tmp_path / "f")
  assert first == again != other["random-0"].directory
  PIL.Image.new("RGB", (32, 32)).save(source / "a" / "00.png")
  edited = _extract(_images(source), tmp_path / "f")["random-0"].directory
  assert edited != first


def test_one_compilation_serves_all_networks_and_batches(source, tmp_path):
  """Networks that differ only in numbers have one program; a second trace
  would show as a second entry in the log of compilations.
  """
  records = []
  handler = logging.Handler()
  handler.emit = lambda record: records.append(record.getMessage())
  logger = logging.getLogger("jax._src.dispatch")
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      _extract(_images(source), tmp_path / "f", networks=_networks(3))
  finally:
    logger.removeHandler(handler)
  compiled = [r for r in records if "XLA compilation of jit(forward)" in r]
  assert len(compiled) == 1
