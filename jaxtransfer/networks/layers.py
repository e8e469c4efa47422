"""The few layers that ResNet and DenseNet are made of, exact to torch's.

Every layer is built without values (`zoo.build` traces the constructors), so a
constructor only says which shapes there are; `tensors.load` fills them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Conv(nnx.Module):
  """A 2-D convolution without bias, padded as torch pads.

  Parameters are float32 and are cast to the compute dtype at each call.

  Args:
    channels_in: input channels.
    channels_out: output channels.
    size: side of the square kernel.
    stride: step of the kernel.
    groups: channel groups; each sees channels_in / groups inputs.
    dtype: compute dtype.
  """

  def __init__(
    self,
    channels_in: int,
    channels_out: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    dtype: jnp.dtype = jnp.float32,
  ):
    self.stride = stride
    self.groups = groups
    self.dtype = dtype
    self.kernel = nnx.Param(
      jnp.zeros((size, size, channels_in // groups, channels_out))
    )

  def __call__(self, x_NHWC: jax.Array) -> jax.Array:
    kernel_HWIO = self.kernel[...].astype(self.dtype)
    x_NHWC = x_NHWC.astype(self.dtype)
    # The GPU and TPU default for float32 is a faster, coarser product; who
    # asks for float32 here asks for torch's numbers.
    precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
    size = kernel_HWIO.shape[0]
    if size == 1:
      # XLA's CPU convolution is 2-5 times slower than this same product.
      x_NHWC = x_NHWC[:, :: self.stride, :: self.stride]
      return jnp.einsum(
        "nhwi,io->nhwo", x_NHWC, kernel_HWIO[0, 0], precision=precision
      )
    return lax.conv_general_dilated(
      x_NHWC,
      kernel_HWIO,
      (self.stride, self.stride),
      [(size // 2, size // 2)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=self.groups,
      precision=precision,
    )

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Returns multiply-accumulates for one image, and the output's size."""
    height, width = (-(-s // self.stride) for s in size)
    return self.kernel.size * height * width, (height, width)


class BatchNorm(nnx.Module):
  """Batch normalisation with torch's statistics, in float32 or wider.

  In training the batch is normalised with its biased variance while the
  running variance takes the unbiased one, and a running value moves a tenth
  of the way: torch.nn.BatchNorm2d(eps=1e-5, momentum=0.1).

  Args:
    channels: the last axis of the input.
    dtype: dtype of the output; statistics and the normalising are float32,
      or float64 where that is the input.

  `train` of a call is False for the running statistics, True for those of the
  batch at hand, or the name of a mapped axis for those of the batch that its
  devices hold together.
  """

  def __init__(self, channels: int, *, dtype: jnp.dtype = jnp.float32):
    self.dtype = dtype
    self.scale = nnx.Param(jnp.zeros((channels,)))
    self.bias = nnx.Param(jnp.zeros((channels,)))
    self.mean = nnx.BatchStat(jnp.zeros((channels,)))
    self.var = nnx.BatchStat(jnp.zeros((channels,)))

  def __call__(self, x_NHWC: jax.Array, train: bool | str = False) -> jax.Array:
    x_NHWC = widened(x_NHWC)
    if train:
      axis = train if isinstance(train, str) else ()
      mean = lax.pmean(x_NHWC.mean((0, 1, 2)), axis)
      # Two passes: E[x^2] - E[x]^2 cancels where the mean is far from zero.
      var = lax.pmean(jnp.square(x_NHWC - mean).mean((0, 1, 2)), axis)
      count = x_NHWC.size // x_NHWC.shape[-1] * lax.psum(1, axis)
      unbiased = var * (count / max(count - 1, 1))
      self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
      self.var[...] = 0.9 * self.var[...] + 0.1 * unbiased
    else:
      mean, var = self.mean[...], self.var[...]
    factor = self.scale[...] * lax.rsqrt(var + 1e-5)
    # Centred first: x * factor - mean * factor cancels where a channel hardly
    # varies and factor is large.
    y_NHWC = (x_NHWC - mean) * factor + self.bias[...]
    return y_NHWC.astype(self.dtype)


def widened(x: jax.Array) -> jax.Array:
  """Returns the array in float32, or as it is where it is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def max_pool(x_NHWC: jax.Array) -> jax.Array:
  """The 3x3 maximum with stride 2 after both families' first convolution."""
  # The border is minus infinity, as torch's is: it never wins.
  return lax.reduce_window(
    x_NHWC,
    -jnp.inf,
    lax.max,
    (1, 3, 3, 1),
    (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  )


def halved(size: tuple[int, int]) -> tuple[int, int]:
  """Returns the size after `max_pool`: half, rounded up."""
  return -(-size[0] // 2), -(-size[1] // 2)


def average_pool(x_NHWC: jax.Array) -> jax.Array:
  """The 2x2 mean with stride 2; an odd last row or column is left out."""
  height, width = x_NHWC.shape[1] // 2, x_NHWC.shape[2] // 2
  kept = widened(x_NHWC[:, : 2 * height, : 2 * width])
  total = sum(kept[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
  return (total / 4).astype(x_NHWC.dtype)
