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
  """

  def __init__(self, channels_in: int, channels_out: int):
    self.kernel = nnx.Param(layers.without_value(channels_in, channels_out))
    self.bias = nnx.Param(layers.without_value(channels_out))

  def __call__(self, features: jax.Array) -> jax.Array:
    logits = jnp.dot(
      layers.widened(features),
      self.kernel[...],
      precision=lax.Precision.HIGHEST,
    )
    return logits + self.bias[...]
