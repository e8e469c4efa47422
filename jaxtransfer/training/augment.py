"""Random changes of images, on the device, each image from its own key.

What happens to an image depends on its key alone, not on the batch or the
device it is in: the step makes the key from (seed, step, row of the source).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.training import optimisers

# Optical densities (R, G, B) of hematoxylin, eosin and DAB: Ruifrok and
# Johnston 2001, as scikit-image's `rgb_from_hed` has them.
_STAINS = np.array(
  [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32
)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# RGB to luma and two axes of colour (NTSC's YIQ), where a hue is an angle.
_YIQ = np.array(
  [
    [0.299, 0.587, 0.114],
    [0.595716, -0.274453, -0.321263],
    [0.211456, -0.522591, 0.311135],
  ],
  np.float32,
)
_ASPECT = 4 / 3


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Which random changes, in the order in which they are made.

  Attributes:
    crop: smallest share of the image's area that a random crop keeps, of an
      aspect from 3:4 to 4:3 as far as it fits into the image, scaled back to
      the image's size; 1 for no crop.
    flip_horizontal: mirror left and right, every second time.
    flip_vertical: mirror top and bottom, every second time.
    quarter_turns: turn by 0, 90, 180 or 270 degrees.
    stain: sigma of Tellez et al.: the amounts of hematoxylin, eosin and
      residual stain are multiplied by 1 - sigma to 1 + sigma and moved by
      -sigma to sigma, in optical density.
    brightness: largest change of the factor from one.
    contrast: likewise, about the image's mean grey.
    saturation: likewise, about every pixel's grey.
    hue: largest turn of the hue, as a share of the circle, to 0.5.

  Raises:
    UsageError: a value out of range.

  Source: torchvision.transforms RandomResizedCrop (it draws again where a crop
    does not fit, here the aspect is drawn among those that do) and ColorJitter
    (its order of the four is random, here it is this one; its hue turns in
    HSV, here in YIQ); stain: Tellez et al. 2018, IEEE TMI 37(9):2126-2136.
  """

  crop: float
  flip_horizontal: bool
  flip_vertical: bool
  quarter_turns: bool
  stain: float
  brightness: float
  contrast: float
  saturation: float
  hue: float

  def __post_init__(self):
    optimisers.check_range("augment.crop", self.crop, above=0, most=1)
    for name in ("stain", "brightness", "contrast", "saturation"):
      value = getattr(self, name)
      optimisers.check_range(f"augment.{name}", value, least=0, most=1)
    optimisers.check_range("augment.hue", self.hue, least=0, most=0.5)

  def __call__(self, images: jax.Array, keys: jax.Array) -> jax.Array:
    """Changes every image by its own key.

    Args:
      images: (N, S, S, 3), 0 to 255.
      keys: (N,) typed keys.

    Returns:
      (N, S, S, 3) float32, 0 to 255.
    """
    x_NHWC = images.astype(jnp.float32) / 255
    return 255 * jax.vmap(self._one)(x_NHWC, keys)

  def _one(self, x_HWC: jax.Array, key: jax.Array) -> jax.Array:
    """Changes one image, 0 to 1."""
    # A key for every change: leaving one out does not draw another next.
    (
      crop_key,
      horizontal_key,
      vertical_key,
      turns_key,
      stain_key,
      brightness_key,
      contrast_key,
      saturation_key,
      hue_key,
    ) = jax.random.split(key, 9)
    if self.crop < 1:
      x_HWC = _crop(x_HWC, crop_key, self.crop)
    if self.flip_horizontal:
      flip = jax.random.bernoulli(horizontal_key)
      x_HWC = jnp.where(flip, x_HWC[:, ::-1], x_HWC)
    if self.flip_vertical:
      flip = jax.random.bernoulli(vertical_key)
      x_HWC = jnp.where(flip, x_HWC[::-1], x_HWC)
    if self.quarter_turns:
      turns = jax.random.randint(turns_key, (), 0, 4)
      x_HWC = jnp.where(turns % 2, x_HWC.swapaxes(0, 1), x_HWC)
      x_HWC = jnp.where(turns >= 2, x_HWC[::-1, ::-1], x_HWC)
      # Transposed is a mirrored quarter turn; mirrored once more it is one.
      x_HWC = jnp.where(turns % 2, x_HWC[::-1], x_HWC)
    if self.stain:
      x_HWC = _stain(x_HWC, stain_key, self.stain)
    if self.brightness:
      x_HWC = x_HWC * _factor(brightness_key, self.brightness)
      x_HWC = x_HWC.clip(0, 1)
    if self.contrast:
      mean = _grey(x_HWC).mean()
      x_HWC = mean + (x_HWC - mean) * _factor(contrast_key, self.contrast)
      x_HWC = x_HWC.clip(0, 1)
    if self.saturation:
      grey = _grey(x_HWC)
      x_HWC = grey + (x_HWC - grey) * _factor(saturation_key, self.saturation)
      x_HWC = x_HWC.clip(0, 1)
    if self.hue:
      x_HWC = _turn_hue(x_HWC, hue_key, self.hue)
    return x_HWC


def keys_of(key: jax.Array, step: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns the key of every image of a step.

  Args:
    key: the run's.
    step: () int32.
    rows: (N,) int32, of the source.

  Returns:
    (N,) typed keys.
  """
  at_step = jax.random.fold_in(key, step)
  return jax.vmap(lambda row: jax.random.fold_in(at_step, row))(rows)


def _factor(key: jax.Array, most: float) -> jax.Array:
  return jax.random.uniform(key, (), minval=1 - most, maxval=1 + most)


def _grey(x_HWC: jax.Array) -> jax.Array:
  return _colours(x_HWC, _LUMA[None])


def _colours(x_HWC: jax.Array, matrix: jax.typing.ArrayLike) -> jax.Array:
  """Maps every pixel's colour by a matrix, in full precision."""
  return jnp.einsum(
    "hwc,dc->hwd", x_HWC, matrix, precision=jax.lax.Precision.HIGHEST
  )


def _crop(x_HWC: jax.Array, key: jax.Array, least: float) -> jax.Array:
  size = x_HWC.shape[0]
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  area = jax.random.uniform(area_key, (), minval=least, maxval=1)
  # A longer side would not fit, and cut to fit would keep less than the area.
  limit = jnp.minimum(np.log(_ASPECT), -jnp.log(area))
  aspect = jnp.exp(
    jax.random.uniform(aspect_key, (), minval=-limit, maxval=limit)
  )
  sides = jnp.sqrt(area * jnp.stack([1 / aspect, aspect])).clip(0, 1) * size
  corner = jax.random.uniform(place_key, (2,)) * (size - sides)
  scale = size / sides
  return jax.image.scale_and_translate(
    x_HWC,
    x_HWC.shape,
    (0, 1),
    scale,
    -corner * scale,
    "linear",
    precision=jax.lax.Precision.HIGHEST,
  )


def _stain(x_HWC: jax.Array, key: jax.Array, sigma: float) -> jax.Array:
  stains = _STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)
  # Black has no finite density; 1/255 is the darkest that 8 bits tell apart.
  density = -jnp.log(x_HWC.clip(1 / 255, 1))
  amounts = _colours(density, np.linalg.inv(stains).T)
  factor_key, shift_key = jax.random.split(key)
  factor = jax.random.uniform(
    factor_key, (3,), minval=1 - sigma, maxval=1 + sigma
  )
  shift = jax.random.uniform(shift_key, (3,), minval=-sigma, maxval=sigma)
  density = _colours(amounts * factor + shift, stains.T)
  return jnp.exp(-density).clip(0, 1)


def _turn_hue(x_HWC: jax.Array, key: jax.Array, most: float) -> jax.Array:
  angle = 2 * np.pi * jax.random.uniform(key, (), minval=-most, maxval=most)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  one, zero = jnp.ones(()), jnp.zeros(())
  turn = jnp.stack(
    [
      jnp.stack([one, zero, zero]),
      jnp.stack([zero, cos, -sin]),
      jnp.stack([zero, sin, cos]),
    ]
  )
  highest = jax.lax.Precision.HIGHEST
  matrix = jnp.matmul(
    jnp.matmul(np.linalg.inv(_YIQ), turn, precision=highest),
    _YIQ,
    precision=highest,
  )
  return _colours(x_HWC, matrix).clip(0, 1)
