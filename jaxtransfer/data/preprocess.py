"""Bytes to what a network was trained on; runs on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def preprocess(
  images_uint8: jax.typing.ArrayLike,
  mean: Sequence[float],
  std: Sequence[float],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Scales 8-bit images to [0, 1], subtracts `mean`, divides by `std`.

  Args:
    images_uint8: (N, H, W, 3) uint8.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    dtype: of the result; the arithmetic is float32 whatever it is.

  Returns:
    (N, H, W, 3) of `dtype`.

  Source: torchvision.transforms `ToTensor`, then `Normalize(mean, std)`.
  """
  x_NHWC = jnp.asarray(images_uint8).astype(jnp.float32) / 255
  x_NHWC = (x_NHWC - jnp.asarray(mean, jnp.float32)) / jnp.asarray(
    std, jnp.float32
  )
  return x_NHWC.astype(dtype)
