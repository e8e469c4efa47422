"""The convolution, for XLA's CPU in a form that it runs faster.

GPUs and TPUs run XLA's own. On CPU it is far from what the machine can do for
some kernels (benchmarks/README.md), so that platform, and only that, gets the
same sums in another order. Which form is compiled is decided when the platform
is known, not when the function is traced.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def conv2d(
  x_NHWC: jax.Array,
  kernel_HWIO: jax.Array,
  *,
  stride: int = 1,
  groups: int = 1,
  precision: lax.Precision | None = None,
) -> jax.Array:
  """Convolves with a square kernel of odd size, padded by half of it.

  Args:
    x_NHWC: (N, H, W, C).
    kernel_HWIO: (k, k, C / groups, channels out), of the same dtype.
    stride: step of the kernel.
    groups: channel groups.
    precision: of the products, for platforms with more than one.

  Returns:
    (N, ceil(H / stride), ceil(W / stride), channels out), of the same dtype.
  """
  size = kernel_HWIO.shape[0]
  if size == 1 and groups == 1:
    return _multiply(
      x_NHWC[:, ::stride, ::stride], kernel_HWIO[0, 0], precision
    )
  if groups == 1 and min(x_NHWC.shape[1:3]) <= 2 * (size // 2):
    # Where most of the kernel lies on the border, XLA's CPU convolution takes
    # up to 70 times as long; elsewhere this is a product like any other.
    return _convolve_patches(x_NHWC, kernel_HWIO, stride, precision)
  return _conv2d(x_NHWC, kernel_HWIO, stride, groups, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv2d(
  x_NHWC: jax.Array,
  kernel_HWIO: jax.Array,
  stride: int,
  groups: int,
  precision: lax.Precision | None,
) -> jax.Array:
  def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve(x, kernel, stride, groups, precision)

  def cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if groups > 1:
      return _convolve_groups(x, kernel, stride, groups, precision)
    if _tiles_pay(x, kernel, stride):
      return _convolve_tiles(x, kernel, precision)
    return native(x, kernel)

  return lax.platform_dependent(x_NHWC, kernel_HWIO, cpu=cpu, default=native)


def _conv2d_forward(
  x_NHWC: jax.Array, kernel_HWIO: jax.Array, *static: object
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _conv2d(x_NHWC, kernel_HWIO, *static), (x_NHWC, kernel_HWIO)


def _conv2d_backward(
  stride: int,
  groups: int,
  precision: lax.Precision | None,
  operands: tuple[jax.Array, jax.Array],
  dy_NHWC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve(x, kernel, stride, groups, precision)

  def native(
    x: jax.Array, kernel: jax.Array, dy: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(convolve, x, kernel)[1](dy)

  def cpu(
    x: jax.Array, kernel: jax.Array, dy: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    if groups > 1:

      def convolve_groups(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _convolve_groups(x, kernel, stride, groups, precision)

      return jax.vjp(convolve_groups, x, kernel)[1](dy)
    turned_HWIO = kernel[::-1, ::-1].swapaxes(2, 3)
    if _tiles_pay(dy, turned_HWIO, stride):
      dx = _convolve_tiles(dy, turned_HWIO, precision)
    elif _few_pixels(*dy.shape[1:]):
      # XLA's would first turn the kernel around in memory.
      def convolve_patches(x: jax.Array) -> jax.Array:
        return _convolve_patches(x, kernel, stride, precision)

      dx = jax.vjp(convolve_patches, x)[1](dy)[0]
    else:
      dx = jax.vjp(lambda x: convolve(x, kernel), x)[1](dy)[0]
    return dx, _kernel_gradient(x, dy, kernel.shape[0], stride, precision)

  return lax.platform_dependent(*operands, dy_NHWC, cpu=cpu, default=native)


_conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _convolve(
  x_NHWC: jax.Array,
  kernel_HWIO: jax.Array,
  stride: int,
  groups: int,
  precision: lax.Precision | None,
  padding: Sequence[tuple[int, int]] | None = None,
) -> jax.Array:
  """XLA's convolution, padded by half the kernel where not said otherwise."""
  half = kernel_HWIO.shape[0] // 2
  return lax.conv_general_dilated(
    x_NHWC,
    kernel_HWIO,
    (stride, stride),
    padding or [(half, half)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
    precision=precision,
  )


def _flat(x_NHWC: jax.Array) -> jax.Array:
  """Returns the pixels of all images, (N H W, C)."""
  return x_NHWC.reshape(-1, x_NHWC.shape[-1])


def _multiply(
  x_NHWC: jax.Array, kernel_IO: jax.Array, precision: lax.Precision | None
) -> jax.Array:
  """One product for every pixel, (N, H, W, channels out).

  Flat: of a product that sums over three axes, as the kernel's gradient would,
  XLA's CPU compiler first turns both sides around in memory.
  """
  y = jnp.matmul(_flat(x_NHWC), kernel_IO, precision=precision)
  return y.reshape(*x_NHWC.shape[:3], -1)


# A matrix of patches beyond it does not stay in a processor's cache.
_MOST_PATCHES = 2**21


def _kernel_gradient(
  x_NHWC: jax.Array,
  dy_NHWC: jax.Array,
  size: int,
  stride: int,
  precision: lax.Precision | None,
) -> jax.Array:
  """The kernel's gradient as one product of laid out patches, on CPU.

  XLA's own, a convolution with a kernel as large as the image, takes twice as
  long. The images are taken in parts, so that the patches stay in cache.

  Args:
    x_NHWC: the convolution's input.
    dy_NHWC: the gradient of its output.
    size: side of the kernel.
    stride: of the convolution.
    precision: of the products.

  Returns:
    (size, size, C, channels out).
  """
  height, width = dy_NHWC.shape[1:3]
  half = size // 2
  # Shifted by columns in the input and by rows in the output, the patches are
  # a third as wide; but rows of zeros are multiplied too.
  both = stride == 1 and height >= 4 * size

  def patches(
    array_NHWC: jax.Array, rows: int, columns: int, high: int
  ) -> jax.Array:
    return jnp.concatenate(
      [
        array_NHWC[
          :,
          i : i + stride * (high - 1) + 1 : stride,
          j : j + stride * (width - 1) + 1 : stride,
        ]
        for i in range(rows)
        for j in range(columns)
      ],
      axis=-1,
    )

  def gradient(x_NHWC: jax.Array, dy_NHWC: jax.Array) -> jax.Array:
    border = half + stride - 1
    x_NHWC = jnp.pad(x_NHWC, ((0, 0), (half, border), (half, border), (0, 0)))
    if both:
      left = patches(x_NHWC, 1, size, height + 2 * half)
      dy_NHWC = jnp.pad(dy_NHWC, ((0, 0), (2 * half, 2 * half), (0, 0), (0, 0)))
      right = patches(dy_NHWC, size, 1, height + 2 * half)
    else:
      left, right = patches(x_NHWC, size, size, height), dy_NHWC
    return jnp.matmul(_flat(left).T, _flat(right), precision=precision)

  batch, channels_in = x_NHWC.shape[0], x_NHWC.shape[-1]
  channels_out = dy_NHWC.shape[-1]
  per_image = (
    height
    * width
    * size
    * (channels_in + channels_out if both else size * channels_in)
  )
  parts = next(
    n
    for n in range(1, batch + 1)
    if batch % n == 0
    and (n == batch or batch // n * per_image <= _MOST_PATCHES)
  )
  if parts == 1:
    total = gradient(x_NHWC, dy_NHWC)
  else:
    images = (a.reshape(parts, -1, *a.shape[1:]) for a in (x_NHWC, dy_NHWC))
    total = lax.map(lambda part: gradient(*part), tuple(images)).sum(0)
  if both:
    # The first of the output's shifts meets the kernel's last row.
    total = total.reshape(size, channels_in, size, channels_out)
    return total.transpose(2, 0, 1, 3)[::-1]
  return total.reshape(size, size, channels_in, channels_out)


def _convolve_patches(
  x_NHWC: jax.Array,
  kernel_HWIO: jax.Array,
  stride: int,
  precision: lax.Precision | None,
) -> jax.Array:
  """One product of all patches, laid out, with the whole kernel."""
  size, _, channels_in, channels_out = kernel_HWIO.shape
  half = size // 2
  height, width = x_NHWC.shape[1:3]
  x_NHWC = jnp.pad(x_NHWC, ((0, 0), (half, half), (half, half), (0, 0)))
  patches = jnp.concatenate(
    [
      x_NHWC[:, i : i + height : stride, j : j + width : stride]
      for i in range(size)
      for j in range(size)
    ],
    axis=-1,
  )
  kernel = kernel_HWIO.reshape(size * size * channels_in, channels_out)
  return _multiply(patches, kernel, precision)


def _toom_cook() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Matrices that give 4 outputs of a 3-tap filter from 6 products, not 12.

  Both are polynomials, taken at six points, multiplied there and interpolated.
  The points 0, +-3/4, +-3/2 and infinity lose least in float32: 2.4 times the
  rounding of the plain sum, where the customary 0, +-1, +-2 lose 3.5 times.

  Returns:
    For the input (6, 6), the kernel (6, 3) and the output (4, 6).

  Source: Winograd's F(4, 3), as in Lavin and Gray 2015, arXiv:1509.09308.
  """
  points = np.array([0, 0.75, -0.75, 1.5, -1.5])

  def powers(count: int) -> np.ndarray:
    infinity = np.eye(count)[-1:]
    return np.vstack([points[:, None] ** np.arange(count), infinity])

  # The inverse has exact zeros; rounding restores them.
  return np.linalg.inv(powers(6)).T.round(12), powers(3), powers(4).T


_INPUT, _KERNEL, _OUTPUT = _toom_cook()


def _few_pixels(height: int, width: int, channels_out: int) -> bool:
  """Whether a 3x3 kernel outweighs the pixels that come out of it.

  That is asked of sixteen images, however many there are: the rounding of one
  image must not depend on how many share its device.
  """
  return 16 * height * width < 2 * channels_out


def _tiles_pay(x_NHWC: jax.Array, kernel_HWIO: jax.Array, stride: int) -> bool:
  """Whether tiles of four rows beat XLA's convolution on CPU.

  They do not where most of the last tile is empty, nor where transforming the
  kernel, twice its size, costs more than it saves.
  """
  _, height, width, _ = x_NHWC.shape
  return (
    kernel_HWIO.shape[:2] == (3, 3)
    and stride == 1
    and x_NHWC.dtype == jnp.float32
    and 4 * height >= 3 * (height + -height % 4)
    and not _few_pixels(height, width, kernel_HWIO.shape[3])
  )


def _combine(weights: np.ndarray, arrays: Sequence[jax.Array]) -> jax.Array:
  """Returns the weighted sum, zeros left out."""
  terms = [
    array if weight == 1 else array * np.float32(weight)
    for weight, array in zip(weights, arrays, strict=True)
    if weight
  ]
  return functools.reduce(jnp.add, terms)


def _convolve_tiles(
  x_NHWC: jax.Array, kernel_HWIO: jax.Array, precision: lax.Precision | None
) -> jax.Array:
  """A 3x3 convolution with half the products: four output rows from six.

  Only rows are tiled. Tiling columns too would halve the products again, but
  the 36 arrays it moves and compiles cost more than that.
  """
  batch, height, width, _ = x_NHWC.shape
  tiles = -(-height // 4)
  padded = jnp.pad(
    x_NHWC, ((0, 0), (1, 4 * tiles + 1 - height), (0, 0), (0, 0))
  )
  rows = [padded[:, i : i + 4 * tiles - 3 : 4] for i in range(6)]
  products = [
    _convolve(
      _combine(from_rows, rows),
      _combine(from_kernel, kernel_HWIO)[None],
      1,
      1,
      precision,
      [(0, 0), (1, 1)],
    )
    for from_rows, from_kernel in zip(_INPUT, _KERNEL, strict=True)
  ]
  y = jnp.stack([_combine(weights, products) for weights in _OUTPUT], axis=2)
  return y.reshape(batch, 4 * tiles, width, -1)[:, :height]


def _convolve_groups(
  x_NHWC: jax.Array,
  kernel_HWIO: jax.Array,
  stride: int,
  groups: int,
  precision: lax.Precision | None,
) -> jax.Array:
  """A grouped convolution as a few dense ones over 32 channels or more.

  Narrow groups are joined and the kernel between them filled with zeros: the
  products wasted cost less than XLA's grouped convolution, whose gradient
  takes seconds per layer.
  """
  size, _, channels_in, channels_out = kernel_HWIO.shape
  joined = max(
    (
      n
      for n in range(1, groups + 1)
      if groups % n == 0 and n * channels_in <= 32
    ),
    default=1,
  )
  parts = groups // joined
  blocks = jnp.einsum(
    "klipjo,qj->klqipjo",
    kernel_HWIO.reshape(
      size, size, channels_in, parts, joined, channels_out // groups
    ),
    jnp.eye(joined, dtype=kernel_HWIO.dtype),
    precision=lax.Precision.HIGHEST,
  ).reshape(size, size, joined * channels_in, channels_out)
  outputs = [
    _convolve(x, block, stride, 1, precision)
    for x, block in zip(
      jnp.split(x_NHWC, parts, axis=-1),
      jnp.split(blocks, parts, axis=-1),
      strict=True,
    )
  ]
  return jnp.concatenate(outputs, axis=-1)
