"""What is put on a cut network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxtransfer.networks import layers


class Linear(nnx.Module):
  """An affine map in float32 or wider, whatever the trunk computes in.

  Args:
    channels_in: width of the features.
    channels_out: number of classes.
    dtype: what it computes in all the same; None for float32 or wider.
  """

  def __init__(
    self, channels_in: int, channels_out: int, dtype: jnp.dtype | None = None
  ):
    self.kernel = nnx.Param(layers.without_value(channels_in, channels_out))
    self.bias = nnx.Param(layers.without_value(channels_out))
    self.dtype = dtype

  def __call__(self, features: jax.Array) -> jax.Array:
    kernel, bias = self.kernel[...], self.bias[...]
    if self.dtype is None:
      features = layers.widened(features)
    else:
      features, kernel, bias = (
        x.astype(self.dtype) for x in (features, kernel, bias)
      )
    return jnp.dot(features, kernel, precision=lax.Precision.HIGHEST) + bias
