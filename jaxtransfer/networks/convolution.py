"""The convolution, for XLA's CPU in a form that it runs faster.

GPUs and TPUs run XLA's own. On CPU it is far from what the machine can do for
some kernels (benchmarks/README.md), so that platform, and only that, gets the
same sums in another order. Which form is compiled is decided when the platform
is known, not when the function is traced.
"""

import functools
import math
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
    return _convolve_im2col(x_NHWC, kernel_HWIO, stride, precision)
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
    if _winograd_pays(x, kernel.shape, stride):
      return _convolve_winograd(x, kernel, precision)
    if _kernel_outweighs(x, kernel.shape, stride):
      return _convolve_im2col(x, kernel, stride, precision)
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
    transposed_HWIO = kernel[::-1, ::-1].swapaxes(2, 3)
    if _winograd_pays(dy, transposed_HWIO.shape, stride):
      dx = _convolve_winograd(dy, transposed_HWIO, precision, transposed=True)
    elif kernel.shape[0] == 3:
      # XLA's would first turn the kernel around in memory.
      def convolve_im2col(x: jax.Array) -> jax.Array:
        return _convolve_im2col(x, kernel, stride, precision)

      dx = jax.vjp(convolve_im2col, x)[1](dy)[0]
    else:
      dx = jax.vjp(lambda x: convolve(x, kernel), x)[1](dy)[0]
    return dx, _kernel_gradient(x, dy, kernel.shape, stride, precision)

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
  y = _matmul(_flat(x_NHWC), kernel_IO, precision)
  return y.reshape(*x_NHWC.shape[:3], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(
  x: jax.Array, kernel_IO: jax.Array, precision: lax.Precision | None
) -> jax.Array:
  return jnp.matmul(x, kernel_IO, precision=precision)


def _matmul_forward(
  x: jax.Array, kernel_IO: jax.Array, precision: lax.Precision | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _matmul(x, kernel_IO, precision), (x, kernel_IO)


def _matmul_backward(
  precision: lax.Precision | None,
  operands: tuple[jax.Array, jax.Array],
  dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  x, kernel_IO = operands
  dkernel_IO = lax.platform_dependent(
    x,
    dy,
    cpu=functools.partial(_sum_products, precision=precision),
    default=lambda x, dy: jnp.matmul(x.T, dy, precision=precision),
  )
  return jnp.matmul(dy, kernel_IO.T, precision=precision), dkernel_IO


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _sum_products(
  left: jax.Array, right: jax.Array, precision: lax.Precision | None
) -> jax.Array:
  """Returns left.T @ right, on CPU.

  XLA's CPU product is up to a third slower with the wider side turned around;
  but of few rows, turning the result costs more. The barrier keeps the compiler
  from exchanging the sides again.
  """
  if left.shape[1] <= right.shape[1] or len(left) < right.shape[1]:
    return jnp.matmul(left.T, right, precision=precision)
  product = jnp.matmul(right.T, left, precision=precision)
  return lax.optimization_barrier(product).T


# Numbers laid out beyond it do not stay in the caches that processors share.
_MOST_IN_CACHE = 2**21
# Nor beyond this in a processor's own.
_MOST_IN_OWN_CACHE = 2**19


def _kernel_gradient(
  x_NHWC: jax.Array,
  dy_NHWC: jax.Array,
  shape_HWIO: tuple[int, ...],
  stride: int,
  precision: lax.Precision | None,
) -> jax.Array:
  """The kernel's gradient as products of pixels in columns, on CPU.

  XLA's own, a convolution with a kernel as large as the image, takes twice as
  long and more. The images are taken in parts that stay in cache.

  Args:
    x_NHWC: the convolution's input.
    dy_NHWC: the gradient of its output.
    shape_HWIO: the kernel's, (size, size, C, channels out).
    stride: of the convolution.
    precision: of the products.

  Returns:
    The gradient, in the kernel's shape.
  """
  batch, height, width, channels_out = dy_NHWC.shape
  size, _, channels_in, _ = shape_HWIO
  most = _MOST_IN_CACHE
  if _winograd_pays(x_NHWC, shape_HWIO, stride):
    gradient = functools.partial(_kernel_gradient_winograd, precision=precision)
    dy_NHWC = _pad_to_tiles(dy_NHWC)
    per_pixel = 1.5 * (channels_in + 3 * channels_out)
  elif stride == 1 and height >= 4 * size:
    gradient = functools.partial(
      _kernel_gradient_shifted, size=size, precision=precision
    )
    per_pixel = size * (channels_in + channels_out)
  else:
    gradient = functools.partial(
      _kernel_gradient_im2col, size=size, stride=stride, precision=precision
    )
    per_pixel = size * size * channels_in
    border = (size // 2, size // 2 + stride - 1)
    x_NHWC = jnp.pad(x_NHWC, ((0, 0), border, border, (0, 0)))
    # Of fewer pixels, adding up kernels costs more than the cache saves.
    if height * width >= 512:
      most = _MOST_IN_OWN_CACHE
      rows = max(1, most // (per_pixel * width))
      x_NHWC, dy_NHWC = _cut_to_bands(x_NHWC, dy_NHWC, size, stride, rows)
      batch, height, width, _ = dy_NHWC.shape
  part = max(
    n
    for n in range(1, batch + 1)
    if batch % n == 0 and (n == 1 or n * height * width * per_pixel <= most)
  )
  if part == batch:
    return gradient(x_NHWC, dy_NHWC)

  def add(i: jax.Array, total: jax.Array) -> jax.Array:
    images = (
      lax.dynamic_slice_in_dim(array, i * part, part)
      for array in (x_NHWC, dy_NHWC)
    )
    return total + gradient(*images)

  # Sixteen bits would lose what many parts add up to.
  wide = jnp.promote_types(dy_NHWC.dtype, jnp.float32)
  total = lax.fori_loop(0, batch // part, add, jnp.zeros(shape_HWIO, wide))
  return total.astype(dy_NHWC.dtype)


def _kernel_gradient_im2col(
  x_NHWC: jax.Array,
  dy_NHWC: jax.Array,
  size: int,
  stride: int,
  precision: lax.Precision | None,
) -> jax.Array:
  """The kernel's gradient with im2col, of padded x."""
  _, height, width, channels_out = dy_NHWC.shape
  left = _im2col(x_NHWC, (size, size), (height, width), stride)
  total = _sum_products(_flat(left), _flat(dy_NHWC), precision)
  return total.reshape(size, size, -1, channels_out)


def _cut_to_bands(
  x_NHWC: jax.Array,
  dy_NHWC: jax.Array,
  size: int,
  stride: int,
  most_rows: int,
) -> tuple[jax.Array, jax.Array]:
  """Makes an image for each band of rows, where the rows part evenly.

  Args:
    x_NHWC: the convolution's input, padded.
    dy_NHWC: the gradient of its output.
    size: of the kernel.
    stride: of the convolution.
    most_rows: of the output in a band.

  Returns:
    Both, with bands for images.
  """
  batch, height, width, channels = dy_NHWC.shape
  rows = max(
    n for n in range(1, height + 1) if height % n == 0 and n <= most_rows
  )
  # Bands of a few rows are not worth what they share with the next.
  if rows == height or rows < size:
    return x_NHWC, dy_NHWC
  reach = stride * (rows - 1) + size
  bands = [
    x_NHWC[:, stride * first : stride * first + reach]
    for first in range(0, height, rows)
  ]
  x_NHWC = jnp.stack(bands, axis=1)
  return (
    x_NHWC.reshape(-1, *x_NHWC.shape[2:]),
    dy_NHWC.reshape(-1, rows, width, channels),
  )


def _kernel_gradient_shifted(
  x_NHWC: jax.Array,
  dy_NHWC: jax.Array,
  size: int,
  precision: lax.Precision | None,
) -> jax.Array:
  """The same where the stride is 1, columns shifted here and rows there.

  What is laid out is narrower by the kernel's size; but rows of zeros are
  multiplied too.
  """
  _, height, width, channels_out = dy_NHWC.shape
  border, rows = (size // 2, size // 2), height + size - 1
  x_NHWC = jnp.pad(x_NHWC, ((0, 0), border, border, (0, 0)))
  left = _im2col(x_NHWC, (1, size), (rows, width))
  dy_NHWC = jnp.pad(dy_NHWC, ((0, 0), (size - 1, size - 1), (0, 0), (0, 0)))
  right = _im2col(dy_NHWC, (size, 1), (rows, width))
  total = _sum_products(_flat(left), _flat(right), precision)
  # The first of the output's shifts meets the kernel's last row.
  total = total.reshape(size, -1, size, channels_out)
  return total.transpose(2, 0, 1, 3)[::-1]


def _im2col(
  array_NHWC: jax.Array,
  shifts: tuple[int, int],
  size: tuple[int, int],
  stride: int = 1,
) -> jax.Array:
  """Lays every pixel beside those below and to the right of it.

  Args:
    array_NHWC: (N, H, W, C).
    shifts: how many rows and columns of them.
    size: rows and columns of the result.
    stride: pixels from one to the next.

  Returns:
    (N, rows, columns, shifts C), column shifts varying faster than row shifts.
  """
  rows, columns = (stride * (n - 1) + 1 for n in size)
  return jnp.concatenate(
    [
      array_NHWC[:, i : i + rows : stride, j : j + columns : stride]
      for i in range(shifts[0])
      for j in range(shifts[1])
    ],
    axis=-1,
  )


def _convolve_im2col(
  x_NHWC: jax.Array,
  kernel_HWIO: jax.Array,
  stride: int,
  precision: lax.Precision | None,
) -> jax.Array:
  """im2col: one product of all patches with the whole kernel."""
  size, _, channels_in, channels_out = kernel_HWIO.shape
  half = size // 2
  height, width = x_NHWC.shape[1:3]
  x_NHWC = jnp.pad(x_NHWC, ((0, 0), (half, half), (half, half), (0, 0)))
  outputs = -(-height // stride), -(-width // stride)
  patches = _im2col(x_NHWC, (size, size), outputs, stride)
  kernel = kernel_HWIO.reshape(size * size * channels_in, channels_out)
  return _multiply(patches, kernel, precision)


def _winograd_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


_INPUT, _KERNEL, _OUTPUT = _winograd_matrices()


def _kernel_outweighs(
  x_NHWC: jax.Array, shape_HWIO: tuple[int, ...], stride: int
) -> bool:
  """Whether a 3x3 kernel outweighs the pixels that come out of it.

  That is asked of sixteen images, however many there are: the rounding of one
  image must not depend on how many share its device.
  """
  size, _, _, channels_out = shape_HWIO
  pixels = math.prod(-(-n // stride) for n in x_NHWC.shape[1:3])
  return size == 3 and 16 * pixels < 2 * channels_out


def _winograd_pays(
  x_NHWC: jax.Array, shape_HWIO: tuple[int, ...], stride: int
) -> bool:
  """Whether Winograd's tiles of four rows beat XLA's convolution on CPU.

  They do not where most of the last tile is empty, nor where transforming the
  kernel, twice its size, costs more than it saves.
  """
  height = x_NHWC.shape[1]
  return (
    shape_HWIO[0] == 3
    and stride == 1
    and x_NHWC.dtype == jnp.float32
    and 4 * height >= 3 * (height + -height % 4)
    and not _kernel_outweighs(x_NHWC, shape_HWIO, stride)
  )


def _combine(
  weights: np.ndarray, arrays: Sequence[jax.Array] | jax.Array
) -> jax.Array:
  """Returns the weighted sum, zeros left out."""
  terms = [
    array if weight == 1 else array * np.float32(weight)
    for weight, array in zip(weights, arrays, strict=True)
    if weight
  ]
  return functools.reduce(jnp.add, terms)


def _pad_to_tiles(x_NHWC: jax.Array, beside: int = 1) -> jax.Array:
  """Adds a border of one pixel, and below it the rows that fill a tile.

  Both gradients of a convolution take the output's from here, so that the
  compiler finds one padded array and not what it was made of several times.
  """
  beyond = -x_NHWC.shape[1] % 4
  border = ((0, 0), (1, beyond + 1), (beside, beside), (0, 0))
  return jnp.pad(x_NHWC, border)


def _tile_rows(padded_NHWC: jax.Array) -> list[jax.Array]:
  """Returns the six rows that each tile of four outputs is made from."""
  rows = padded_NHWC.shape[1] - 2
  return [padded_NHWC[:, i : i + rows - 3 : 4] for i in range(6)]


def _convolve_winograd(
  x_NHWC: jax.Array,
  kernel_HWIO: jax.Array,
  precision: lax.Precision | None,
  transposed: bool = False,
) -> jax.Array:
  """Winograd's 3x3 convolution, F(4, 3): four output rows from six products.

  Only rows are tiled. Tiling columns too would halve the products again, but
  the 36 arrays it moves and compiles cost more than that.

  Args:
    x_NHWC: (N, H, W, C).
    kernel_HWIO: (3, 3, C, channels out).
    precision: of the products.
    transposed: whether the kernel is that of a transposed convolution: its
      channels are exchanged in memory.

  Returns:
    (N, H, W, channels out).
  """
  batch, height, width, _ = x_NHWC.shape
  # XLA's convolution would exchange the channels in memory, element by element;
  # a product takes them as they lie, but lays out three columns for each pixel.
  if transposed and height * width <= 32 * 32:
    convolve = _convolve_columns_im2col
  else:

    def convolve(
      x: jax.Array, kernel_WIO: jax.Array, precision: lax.Precision | None
    ) -> jax.Array:
      return _convolve(x, kernel_WIO[None], 1, 1, precision, [(0, 0), (0, 0)])

  rows = _tile_rows(_pad_to_tiles(x_NHWC))
  products = [
    convolve(
      _combine(from_rows, rows), _combine(from_kernel, kernel_HWIO), precision
    )
    for from_rows, from_kernel in zip(_INPUT, _KERNEL, strict=True)
  ]
  y = jnp.stack([_combine(weights, products) for weights in _OUTPUT], axis=2)
  return y.reshape(batch, -1, width, y.shape[-1])[:, :height]


def _convolve_columns_im2col(
  x_NHWC: jax.Array, kernel_WIO: jax.Array, precision: lax.Precision | None
) -> jax.Array:
  """A 1x3 convolution with im2col."""
  height, width = x_NHWC.shape[1:3]
  patches = _im2col(x_NHWC, (1, 3), (height, width - 2))
  # Turned around twice: a kernel whose channels are exchanged lies in memory as
  # it is after the first, and a product takes the second without moving it.
  kernel = kernel_WIO.transpose(2, 0, 1).reshape(kernel_WIO.shape[2], -1)
  return _multiply(patches, kernel.T, precision)


def _kernel_gradient_winograd(
  x_NHWC: jax.Array, dy_NHWC: jax.Array, precision: lax.Precision | None
) -> jax.Array:
  """The kernel's gradient through Winograd's tiles, with half the products.

  Args:
    x_NHWC: (N, H, W, C).
    dy_NHWC: (N, H, W, channels out), padded to tiles.
    precision: of the products.

  Returns:
    (3, 3, C, channels out).
  """
  rows = _tile_rows(_pad_to_tiles(x_NHWC, 0))
  # Which neighbour a pixel meets is laid out in the gradient, the narrower of
  # the two where they differ, and once, before its rows are combined.
  height, width = dy_NHWC.shape[1] - 2, dy_NHWC.shape[2] - 2
  dy_NHWC = _im2col(dy_NHWC[:, 1:-1], (1, 3), (height, width))
  outputs = [dy_NHWC[:, i::4] for i in range(4)]
  products = [
    _sum_products(
      _flat(_combine(from_rows, rows)),
      _flat(_combine(from_outputs, outputs)),
      precision,
    )
    for from_rows, from_outputs in zip(_INPUT, _OUTPUT.T, strict=True)
  ]
  total = jnp.stack([_combine(weights, products) for weights in _KERNEL.T])
  # The first shift meets the kernel's last column.
  total = total.reshape(3, x_NHWC.shape[-1], 3, -1)[:, :, ::-1]
  return total.transpose(0, 2, 1, 3)


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
