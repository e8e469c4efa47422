"""Augmentation by its properties: what a key decides, and what it cannot."""

import functools

import jax
import numpy as np
import pytest

from jaxtransfer import errors, parallel
from jaxtransfer.training import augment

NOTHING = {
  "crop": 1.0,
  "flip_horizontal": False,
  "flip_vertical": False,
  "quarter_turns": False,
  "stain": 0.0,
  "brightness": 0.0,
  "contrast": 0.0,
  "saturation": 0.0,
  "hue": 0.0,
}
ALL = {
  "crop": 0.3,
  "flip_horizontal": True,
  "flip_vertical": True,
  "quarter_turns": True,
  "stain": 0.1,
  "brightness": 0.2,
  "contrast": 0.2,
  "saturation": 0.2,
  "hue": 0.1,
}
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)


@functools.cache
def _program(changes):
  augmentation = augment.Augmentation(**{**NOTHING, **dict(changes)})

  def change(images, seed, step, rows):
    keys = augment.keys_of(jax.random.key(seed), step, rows)
    return augmentation(images, keys)

  return jax.jit(change)


def _changed(images=IMAGES, step=0, seed=0, rows=None, **changes):
  rows = np.arange(len(images)) if rows is None else rows
  program = _program(tuple(changes.items()))
  return np.asarray(program(images, seed, step, rows))


def test_nothing_asked_for_changes_nothing():
  np.testing.assert_allclose(_changed(), IMAGES, atol=1e-4)


def test_an_image_with_its_key_is_the_same_on_one_device_and_on_eight():
  """The key is made from (seed, step, row) and the image is changed by itself,
  so neither the batch nor the device it is in can matter."""
  augmentation = augment.Augmentation(**ALL)

  def change(state, batch):
    keys = augment.keys_of(jax.random.key(state), 7, batch["row"])
    return augmentation(batch["image"], keys)

  devices = parallel.Devices("jit", jax.devices()[:8])
  batch = devices.put({"image": IMAGES, "row": np.arange(64, dtype=np.int32)})
  program = devices.compile(change)
  eight = devices.get(program(devices.replicate(np.int32(3)), batch))
  one = _changed(step=7, seed=3, **ALL)
  np.testing.assert_allclose(one, eight, atol=1e-3)
  # And in another order, beside other images, it is the same again.
  order = np.random.default_rng(1).permutation(64)
  again = _changed(IMAGES[order], step=7, seed=3, rows=order, **ALL)
  np.testing.assert_allclose(again, one[order], atol=1e-3)


def test_step_row_and_seed_each_decide():
  """Two images that are equal become different under any other key."""
  same = np.repeat(IMAGES[:1], 64, 0)
  first = _changed(same, step=0, **ALL)
  assert len({image.tobytes() for image in first}) == 64
  assert (first != _changed(same, step=1, **ALL)).any((1, 2, 3)).all()
  assert (first != _changed(same, seed=1, **ALL)).any((1, 2, 3)).all()


def test_flips_and_turns_move_pixels_and_change_none():
  """Each result is one of the square's symmetries that were asked for, and
  among 64 images each of them occurs."""
  for changes, symmetries in (
    ({"flip_horizontal": True}, [lambda x: x, lambda x: x[:, ::-1]]),
    ({"flip_vertical": True}, [lambda x: x, lambda x: x[::-1]]),
    (
      {"quarter_turns": True},
      [lambda x, k=k: np.rot90(x, k) for k in range(4)],
    ),
  ):
    found = _changed(**changes)
    seen = set()
    for before, after in zip(IMAGES, found, strict=True):
      equal = [
        i
        for i, symmetry in enumerate(symmetries)
        if np.allclose(symmetry(before), after, atol=1e-3)
      ]
      assert len(equal) == 1
      seen |= set(equal)
    assert seen == set(range(len(symmetries)))


def test_a_crop_of_a_gradient_is_a_gradient():
  """Interpolation is linear: a plane stays a plane, within its range, and what
  is cropped spans less of it, at least by the smallest share."""
  ramp = np.broadcast_to(np.linspace(20, 230, 32)[None, :, None], (32, 32, 3))
  images = np.repeat(ramp[None], 64, 0).astype(np.uint8)
  found = _changed(images, crop=0.25)
  assert found.min() >= 19 and found.max() <= 231
  inner = found[:, 4:-4, 4:-4, 0]
  slopes = np.diff(inner, axis=2).mean((1, 2))
  slope = 210 / 31
  # sqrt(0.25 x 3/4) of the side at the least, and no enlarging at the most.
  assert (slopes < slope * 1.05).all()
  assert (slopes > slope * np.sqrt(0.25 * 3 / 4) * 0.9).all()
  assert np.ptp(slopes) > 1
  assert np.abs(np.diff(inner, axis=1)).max() < 1


def test_a_crop_keeps_its_least_share_of_the_area():
  """Of two ramps the slopes are as the sides of the crop: their product is its
  area, of images of which nine tenths are to be kept too, where most aspects
  do not fit."""
  ramp = np.linspace(20, 230, 32)
  image = np.stack([*np.meshgrid(ramp, ramp), np.zeros((32, 32))], axis=-1)
  images = np.repeat(image[None], 64, 0).round().astype(np.uint8)
  found = _changed(images, crop=0.9)[:, 4:-4, 4:-4]
  sides = [
    np.diff(found[..., channel], axis=axis).mean((1, 2)) * 31 / 210
    for axis, channel in ((2, 0), (1, 1))
  ]
  area = sides[0] * sides[1]
  assert area.min() > 0.9 - 0.01 and area.max() < 1 + 0.01
  assert np.ptp(area) > 0.05 and np.ptp(sides[0] / sides[1]) > 0.05


def test_colours_change_as_their_names_say():
  """Grey stays grey under saturation and hue; contrast keeps a flat image;
  brightness is one factor for all pixels."""
  grey = np.repeat(IMAGES[..., :1], 3, 3)
  np.testing.assert_allclose(_changed(grey, saturation=0.9), grey, atol=0.01)
  np.testing.assert_allclose(_changed(grey, hue=0.5), grey, atol=0.1)
  flat = np.full((8, 4, 4, 3), 90, np.uint8)
  np.testing.assert_allclose(_changed(flat, contrast=0.9), flat, atol=0.01)
  dark = IMAGES // 3 + 1
  factors = _changed(dark, brightness=0.5) / dark
  assert np.ptp(factors, axis=(1, 2, 3)).max() < 1e-5
  assert (0.5 <= factors).all() and (factors <= 1.5).all()
  luma = np.array([0.299, 0.587, 0.114])
  middle = IMAGES // 4 + 96
  turned = _changed(middle, hue=0.5)
  assert np.abs(turned - middle).max() > 20
  np.testing.assert_allclose(turned @ luma, middle @ luma, atol=0.5)


def test_stain_moves_an_image_along_the_stains_alone():
  """In optical density a pixel of one stain stays a multiple of the stains;
  the change is one map for the whole image, so equal pixels stay equal."""
  density = np.array([0.65, 0.70, 0.29])
  pixel = 255 * np.exp(-density / np.linalg.norm(density))
  images = np.broadcast_to(pixel, (16, 4, 4, 3)).round().astype(np.uint8)
  found = _changed(images, stain=0.2)
  assert np.ptp(found, axis=(1, 2)).max() < 1e-3
  assert np.ptp(found[:, 0, 0, 0]) > 5
  # 20 % of one density and three shifts of 0.2, each along a unit vector.
  moved = np.log(found / images)
  assert np.linalg.norm(moved, axis=-1).max() <= 0.2 * 4 + 0.02


@pytest.mark.parametrize(
  ("key", "value"),
  [("crop", 0.0), ("crop", 1.5), ("stain", -0.1), ("hue", 0.6)],
)
def test_values_out_of_range_are_named(key, value):
  with pytest.raises(errors.UsageError, match=f"augment.{key}"):
    augment.Augmentation(**{**NOTHING, key: value})
