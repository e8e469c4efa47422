"""The few layers that the networks are made of, exact to torch's.

Every layer is built without values: a constructor only says which shapes there
are, and `tensors.load` fills them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxtransfer.networks import convolution


def without_value(*shape: int) -> jax.ShapeDtypeStruct:
  """Returns what a variable holds until it is given its value.

  A network is then built without tracing or allocating anything.
  """
  return jax.ShapeDtypeStruct(shape, jnp.float32)


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
    dtype: jax.typing.DTypeLike = jnp.float32,
  ):
    self.stride = stride
    self.groups = groups
    self.dtype = dtype
    self.kernel = nnx.Param(
      without_value(size, size, channels_in // groups, channels_out)
    )

  def __call__(self, x_NHWC: jax.Array) -> jax.Array:
    kernel_HWIO = self.kernel[...].astype(self.dtype)
    x_NHWC = x_NHWC.astype(self.dtype)
    # The GPU and TPU default for float32 is a faster, coarser product; who
    # asks for float32 here asks for torch's numbers.
    precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
    return convolution.conv2d(
      x_NHWC,
      kernel_HWIO,
      stride=self.stride,
      groups=self.groups,
      precision=precision,
    )

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Returns multiply-accumulates for one image, and the output's size."""
    height, width = (-(-s // self.stride) for s in size)
    return self.kernel.size * height * width, (height, width)


class Measured(NamedTuple):
  """A map with its batch's statistics, for all layers that will normalise it.

  Attributes:
    x_NHWC: (N, H, W, C).
    mean: (C,).
    var: (C,), biased.
  """

  x_NHWC: jax.Array
  mean: jax.Array
  var: jax.Array


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

  def __init__(
    self, channels: int, *, dtype: jax.typing.DTypeLike = jnp.float32
  ):
    self.dtype = dtype
    self.scale = nnx.Param(without_value(channels))
    self.bias = nnx.Param(without_value(channels))
    self.mean = nnx.BatchStat(without_value(channels))
    self.var = nnx.BatchStat(without_value(channels))

  def __call__(
    self, x_NHWC: jax.Array | Measured, train: bool | str = False
  ) -> jax.Array:
    if not train:
      x_NHWC = bare(x_NHWC)
      mean, var = self.mean[...], self.var[...]
    else:
      x_NHWC, mean, var = measure(x_NHWC, train)
      count = x_NHWC.size // x_NHWC.shape[-1] * _devices(_axis(train))
      unbiased = var * (count / max(count - 1, 1))
      self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
      self.var[...] = 0.9 * self.var[...] + 0.1 * unbiased
    y_NHWC = _normalise(x_NHWC, mean, var, self.scale[...], self.bias[...])
    return y_NHWC.astype(self.dtype)


def measure(
  x_NHWC: jax.Array | Measured, train: bool | str
) -> jax.Array | Measured:
  """Returns the map with its batch's statistics, computed where it has none.

  Args:
    x_NHWC: (N, H, W, C).
    train: as for `BatchNorm`; for False, which needs none, the map is returned
      as it is.
  """
  if not train or isinstance(x_NHWC, Measured):
    return x_NHWC
  return Measured(x_NHWC, *_statistics(x_NHWC, _axis(train)))


def bare(x_NHWC: jax.Array | Measured) -> jax.Array:
  """Returns the map alone."""
  return x_NHWC.x_NHWC if isinstance(x_NHWC, Measured) else x_NHWC


def _axis(train: bool | str) -> str | None:
  return train if isinstance(train, str) else None


def _devices(axis: str | None) -> int:
  return lax.psum(1, axis) if axis else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _statistics(
  x_NHWC: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """Returns each channel's mean and biased variance.

  Its gradient and that of `_normalise` are written out because those that JAX
  derives read and write the map three times as often, and ask the other devices
  twice as often.

  Args:
    x_NHWC: (N, H, W, C).
    axis: the devices that hold the batch together; none for this one alone.
  """
  wide_NHWC = widened(x_NHWC)
  # Two passes: E[x^2] - E[x]^2 cancels where the mean is far from zero.
  mean = wide_NHWC.mean((0, 1, 2))
  var = jnp.square(wide_NHWC - mean).mean((0, 1, 2))
  if axis:
    # Together: every exchange waits for the slowest device.
    means, variances = lax.all_gather(jnp.stack([mean, var]), axis, axis=1)
    mean = means.mean(0)
    var = (variances + jnp.square(means - mean)).mean(0)
  return mean, var


def _statistics_forward(
  x_NHWC: jax.Array, axis: str | None
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  mean, var = _statistics(x_NHWC, axis)
  return (mean, var), (x_NHWC, mean)


def _statistics_backward(
  axis: str | None,
  kept: tuple[jax.Array, jax.Array],
  gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array]:
  x_NHWC, mean = kept
  # A pixel moves the statistics that all devices normalise with.
  if axis:
    gradients = lax.psum(gradients, axis)
  count = x_NHWC.size // x_NHWC.shape[-1] * _devices(axis)
  dmean, dvar = (gradient / count for gradient in gradients)
  dx_NHWC = dmean + (widened(x_NHWC) - mean) * (2 * dvar)
  return (dx_NHWC.astype(x_NHWC.dtype),)


_statistics.defvjp(_statistics_forward, _statistics_backward)


@jax.custom_vjp
def _normalise(
  x_NHWC: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
) -> jax.Array:
  """Returns (x - mean) / sqrt(var + 1e-5) * scale + bias; (C,) but for x."""
  # Centred first: x * factor - mean * factor cancels where a channel hardly
  # varies and factor is large.
  factor = scale * lax.rsqrt(var + 1e-5)
  return (widened(x_NHWC) - mean) * factor + bias


def _normalise_forward(
  x_NHWC: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  y_NHWC = _normalise(x_NHWC, mean, var, scale, bias)
  return y_NHWC, (x_NHWC, mean, var, scale)


def _normalise_backward(
  kept: tuple[jax.Array, ...], dy_NHWC: jax.Array
) -> tuple[jax.Array, ...]:
  x_NHWC, mean, var, scale = kept
  # Else the compiler keeps x - mean from the forward pass, a second map as
  # large as x, to save a subtraction.
  mean = lax.optimization_barrier(mean)
  inverse_std = lax.rsqrt(var + 1e-5)
  factor = scale * inverse_std
  dbias = dy_NHWC.sum((0, 1, 2))
  dfactor = (dy_NHWC * (widened(x_NHWC) - mean)).sum((0, 1, 2))
  dx_NHWC = (dy_NHWC * factor).astype(x_NHWC.dtype)
  dmean = -factor * dbias
  dvar = -0.5 * factor * jnp.square(inverse_std) * dfactor
  return dx_NHWC, dmean, dvar, dfactor * inverse_std, dbias


_normalise.defvjp(_normalise_forward, _normalise_backward)


def concatenate(parts: Sequence[jax.Array | Measured]) -> jax.Array | Measured:
  """Joins channels, and their statistics where they have them.

  Args:
    parts: (N, H, W, C) each, measured all or none.
  """
  measured = [part for part in parts if isinstance(part, Measured)]
  if measured:
    maps, means, variances = zip(*measured, strict=True)
    return Measured(
      _join(*maps), jnp.concatenate(means), jnp.concatenate(variances)
    )
  return _join(*(part for part in parts if not isinstance(part, Measured)))


def _join(*maps: jax.Array) -> jax.Array:
  def join(*maps: jax.Array) -> jax.Array:
    return jnp.concatenate(maps, axis=-1)

  def cpu(*maps: jax.Array) -> jax.Array:
    # Kept as it is, or XLA makes what is joined again and again one copy of
    # many small pieces.
    return lax.optimization_barrier(join(*maps))

  return lax.platform_dependent(*maps, cpu=cpu, default=join)


def widened(x: jax.Array) -> jax.Array:
  """Returns the array in float32, or as it is where it is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.custom_vjp
def max_pool(x_NHWC: jax.Array) -> jax.Array:
  """The 3x3 maximum with stride 2, padded by one as torch pads.

  Args:
    x_NHWC: (N, H, W, C).

  Returns:
    (N, ceil(H / 2), ceil(W / 2), C). Of equal values the first, in reading
    order, gets the gradient, as in torch.
  """

  def cpu(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _windows(x))

  return lax.platform_dependent(x_NHWC, cpu=cpu, default=_reduce_windows)


def _max_pool_forward(x_NHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
  return max_pool(x_NHWC), x_NHWC


def _max_pool_backward(
  x_NHWC: jax.Array, dy_NHWC: jax.Array
) -> tuple[jax.Array]:
  def native(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.vjp(_reduce_windows, x)[1](dy)[0]

  return (
    lax.platform_dependent(
      x_NHWC, dy_NHWC, cpu=_gather_gradient, default=native
    ),
  )


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _reduce_windows(x_NHWC: jax.Array) -> jax.Array:
  # The border is minus infinity, as torch's is: it never wins.
  return lax.reduce_window(
    x_NHWC,
    -jnp.inf,
    lax.max,
    (1, 3, 3, 1),
    (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  )


def _windows(x_NHWC: jax.Array) -> list[jax.Array]:
  """Returns the nine values under every window, in reading order."""
  height, width = x_NHWC.shape[1:3]
  padded = jnp.pad(
    x_NHWC,
    ((0, 0), (1, height % 2), (1, width % 2), (0, 0)),
    constant_values=-jnp.inf,
  )
  high, wide = padded.shape[1] - 1, padded.shape[2] - 1
  return [
    padded[:, i : i + high : 2, j : j + wide : 2]
    for i in range(3)
    for j in range(3)
  ]


def _gather_gradient(x_NHWC: jax.Array, dy_NHWC: jax.Array) -> jax.Array:
  """Every pixel collects from the windows that it wins.

  A pixel in an even row and column lies in one window, as its centre; beside
  and between windows it lies in two, and at a corner in four. XLA's scatter
  takes 16 times as long.
  """
  height, width = x_NHWC.shape[1:3]
  high, wide = dy_NHWC.shape[1:3]
  windows = _windows(x_NHWC)
  best, winner = windows[0], jnp.zeros(dy_NHWC.shape, jnp.int8)
  for i, window in enumerate(windows[1:], 1):
    winner = jnp.where(window > best, jnp.int8(i), winner)
    best = jnp.maximum(best, window)
  # One more window each way than the pixels need: a slice that left the border
  # out would be computed anew from all that the gradient was made of.
  after = ((0, 0), (0, 2), (0, 2), (0, 0))
  winner = jnp.pad(winner, after, constant_values=-1)
  dy_NHWC = jnp.pad(dy_NHWC, after)
  high, wide = high + 1, wide + 1

  def won(place: int, row: int = 0, column: int = 0) -> jax.Array:
    where = np.s_[:, row : row + high, column : column + wide]
    return jnp.where(winner[where] == place, dy_NHWC[where], 0)

  even = [won(4), won(5) + won(3, 0, 1)]
  odd = [
    won(7) + won(1, 1, 0),
    won(8) + won(6, 0, 1) + won(2, 1, 0) + won(0, 1, 1),
  ]
  dx = jnp.stack([jnp.stack(even, axis=3), jnp.stack(odd, axis=3)], axis=2)
  return dx.reshape(len(dx), 2 * high, 2 * wide, -1)[:, :height, :width]


def halved(size: tuple[int, int]) -> tuple[int, int]:
  """Returns the size after `max_pool`: half, rounded up."""
  return -(-size[0] // 2), -(-size[1] // 2)


def average_pool(x_NHWC: jax.Array) -> jax.Array:
  """The 2x2 mean with stride 2; an odd last row or column is left out."""
  height, width = x_NHWC.shape[1] // 2, x_NHWC.shape[2] // 2
  kept = widened(x_NHWC[:, : 2 * height, : 2 * width])
  corners = [kept[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
  total = functools.reduce(jnp.add, corners)
  return (total / 4).astype(x_NHWC.dtype)
