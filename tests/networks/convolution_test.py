"""The CPU's own forms against XLA's operations, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jaxtransfer.networks import convolution, layers


def plain(x_NHWC, kernel_HWIO, stride, groups):
  half = kernel_HWIO.shape[0] // 2
  return lax.conv_general_dilated(
    x_NHWC,
    kernel_HWIO,
    (stride, stride),
    [(half, half)] * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
    precision=lax.Precision.HIGHEST,
  )


def ours(x_NHWC, kernel_HWIO, stride, groups):
  return convolution.conv2d(
    x_NHWC,
    kernel_HWIO,
    stride=stride,
    groups=groups,
    precision=lax.Precision.HIGHEST,
  )


def operands(batch, height, width, inputs, outputs, size, groups):
  random = np.random.default_rng(0)
  x = random.normal(size=(batch, height, width, inputs))
  kernel = random.normal(size=(size, size, inputs // groups, outputs))
  return x.astype(np.float32), kernel.astype(np.float32)


def assert_close(found, expected):
  """To 1e-5 of the largest value: sums in another order, no more."""
  expected = np.asarray(expected)
  assert found.shape == expected.shape and found.dtype == expected.dtype
  assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def value_and_gradients(function, x, kernel):
  """The value, and the gradients of a sum with an uneven weight per output."""

  @jax.jit
  def both(x, kernel):
    y, pull = jax.vjp(function, x, kernel)
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32))
    return y, *pull(weights.reshape(y.shape))

  return both(x, kernel)


def assert_plain(x, kernel, stride, groups):
  """Value and both gradients are those of XLA's convolution."""
  for found, expected in zip(
    value_and_gradients(lambda x, k: ours(x, k, stride, groups), x, kernel),
    value_and_gradients(lambda x, k: plain(x, k, stride, groups), x, kernel),
    strict=True,
  ):
    assert_close(found, expected)


@pytest.mark.parametrize(
  "batch, height, width, inputs, outputs",
  [
    (1, 56, 56, 16, 8),  # whole tiles of four rows
    (2, 25, 13, 8, 16),  # a last tile with one row
    (3, 7, 7, 8, 24),
    (1, 6, 1, 4, 2),  # a width below the kernel's
    (1, 3, 9, 4, 4),  # one tile, not full
    (2, 5, 9, 4, 4),  # a last tile too empty to pay
    (1, 1, 1, 8, 8),
    (1, 1, 40, 4, 4),
    (1, 4, 4, 4, 64),  # pays for the input's gradient and not forward
    (2, 3, 3, 8, 128),  # a kernel that outweighs the pixels
    (4, 14, 12, 8, 8),  # the kernel's gradient from shifts of both sides
  ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_3x3_is_the_plain_convolution(
  batch, height, width, inputs, outputs, stride
):
  x, kernel = operands(batch, height, width, inputs, outputs, 3, 1)
  assert_plain(x, kernel, stride, 1)


@pytest.mark.parametrize(
  "inputs, outputs, groups",
  [
    (128, 128, 32),  # eight groups of four are joined
    (256, 256, 4),  # 64 channels: none are
    (48, 24, 8),  # six inputs and three outputs each
    (8, 16, 8),
  ],
)
@pytest.mark.parametrize("stride, side", [(1, 9), (2, 8), (1, 1)])
def test_groups_are_the_plain_convolution(
  inputs, outputs, groups, stride, side
):
  x, kernel = operands(2, side, side, inputs, outputs, 3, groups)
  assert_plain(x, kernel, stride, groups)


@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (7, 2), (5, 1)])
@pytest.mark.parametrize("height", [11, 4])  # 4: the kernel lies on the border
def test_other_kernels_are_the_plain_convolution(size, stride, height):
  x, kernel = operands(2, height, 8, 3, 5, size, 1)
  assert_plain(x, kernel, stride, 1)


@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (7, 2), (5, 1)])
@pytest.mark.parametrize("most", [1, 20_000])
def test_the_kernels_gradient_may_be_summed_in_parts(
  monkeypatch, size, stride, most
):
  """One image at a time, and in parts of two or three where they fit."""
  monkeypatch.setattr(convolution, "_MOST_IN_CACHE", most)
  x, kernel = operands(6, 24, 21, 3, 5, size, 1)
  assert_plain(x, kernel, stride, 1)


@pytest.mark.parametrize(
  "height, width, size, stride, rows",
  [
    (48, 44, 3, 2, 8),  # three bands, each sharing a row with the next
    (48, 44, 7, 2, 12),
    (47, 45, 3, 2, 4),
    (16, 40, 5, 1, 8),
    (46, 46, 3, 2, 23),  # a prime number of rows is not cut
  ],
)
def test_the_kernels_gradient_may_be_summed_over_bands(
  monkeypatch, height, width, size, stride, rows
):
  outputs = [-(-n // stride) for n in (height, width)]
  numbers = rows * outputs[1] * size * size * 3
  monkeypatch.setattr(convolution, "_MOST_IN_OWN_CACHE", numbers)
  x, kernel = operands(2, height, width, 3, 5, size, 1)
  cut = []
  uncut = convolution._cut_to_bands
  monkeypatch.setattr(
    convolution, "_cut_to_bands", lambda *a: cut.append(uncut(*a)) or cut[-1]
  )
  assert_plain(x, kernel, stride, 1)
  # What the case is about did happen: as many images as bands of all of them.
  assert [dy.shape[:2] for _, dy in cut] == [(2 * outputs[0] // rows, rows)]


def test_parts_of_sixteen_bits_add_up_in_more(monkeypatch):
  """Of 64 images, each a part: not more is lost than by one rounding of each.

  A total of eight bits' precision would lose whole images' gradients.
  """
  monkeypatch.setattr(convolution, "_MOST_IN_CACHE", 1)
  x, kernel = operands(64, 24, 21, 3, 5, 3, 1)
  x = np.abs(x)

  def gradient(dtype, function):
    loss = lambda x, k: function(x, k, 1, 1).sum(dtype=jnp.float32)  # noqa: E731
    arrays = (jnp.asarray(a, dtype) for a in (x, kernel))
    return np.asarray(jax.grad(loss, 1)(*arrays), np.float64)

  exact = gradient(jnp.float32, plain)
  found = gradient(jnp.bfloat16, ours)
  assert np.abs(found - exact).max() < 2**-7 * np.abs(exact).max()


def test_rounding_stays_near_the_plain_sum():
  """Within five times the plain convolution's own error against float64.

  The fixed points of the transform are chosen for this; the customary ones,
  and a slip in any coefficient, lose more.
  """
  x, kernel = operands(4, 28, 28, 128, 32, 3, 1)
  exact = np.zeros((4, 28, 28, 32))
  padded = np.pad(x.astype(float), [(0, 0), (1, 1), (1, 1), (0, 0)])
  for i in range(3):
    for j in range(3):
      exact += padded[:, i : i + 28, j : j + 28] @ kernel[i, j].astype(float)
  rms = lambda y: np.sqrt(np.square(np.asarray(y) - exact).mean())  # noqa: E731
  assert rms(ours(x, kernel, 1, 1)) < 5 * rms(plain(x, kernel, 1, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_keep_the_plain_convolution(dtype):
  """Sums and differences of inputs would lose what little they hold."""
  x, kernel = operands(2, 8, 8, 4, 4, 3, 1)
  x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
  found = ours(x, kernel, 1, 1)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, plain(x, kernel, 1, 1))


def one_platform(function, *args, platform):
  return (
    jax.jit(function)
    .trace(*args)
    .lower(lowering_platforms=(platform,))
    .as_text()
  )


@pytest.mark.parametrize("groups", [1, 8])
def test_other_platforms_get_one_convolution(groups):
  """A GPU's program holds XLA's own operation, and nothing of the CPU's."""
  x, kernel = operands(2, 8, 8, 32, 32, 3, groups)
  function = functools.partial(ours, stride=1, groups=groups)
  cuda = one_platform(function, x, kernel, platform="cuda")
  assert cuda.count("stablehlo.convolution") == 1
  cpu = one_platform(function, x, kernel, platform="cpu")
  assert cpu.count("stablehlo.convolution") == (6 if groups == 1 else 1)
  compiled = jax.jit(function).lower(x, kernel).compile().as_text()
  assert "conditional" not in compiled
  pooled = one_platform(layers.max_pool, x, platform="cuda")
  assert pooled.count("stablehlo.reduce_window") == 1


def test_transformed_as_any_function():
  """vmap, pmap and shard_map, forward and back, give the plain values."""
  x, kernel = operands(8, 8, 6, 4, 4, 3, 1)
  x = x.reshape(4, 2, 8, 6, 4)

  def gradient(function):
    loss = lambda x, k: jnp.square(function(x, k, 1, 1)).sum()  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1)))

  expected = [gradient(plain)(part, kernel) for part in x]
  mapped = jax.vmap(gradient(ours), (0, None))(x, kernel)
  count = min(4, jax.device_count())
  over_devices = jax.pmap(
    gradient(ours), in_axes=(0, None), devices=jax.devices()[:count]
  )(x[:count], kernel)
  mesh = jax.make_mesh(
    (count,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:count],
  )
  data = PartitionSpec("data")

  def one_shard(x, kernel):
    dx, dkernel = gradient(ours)(x[0], kernel)
    return dx[None], dkernel[None]

  sharded = jax.jit(
    jax.shard_map(
      one_shard,
      mesh=mesh,
      in_specs=(data, PartitionSpec()),
      out_specs=(data, data),
      check_vma=False,
    )
  )(x[:count], kernel)
  for found in (mapped, over_devices, sharded):
    for i in range(count):
      assert_close(found[0][i], expected[i][0])
      assert_close(found[1][i], expected[i][1])


def reduce_windows(x):
  return lax.reduce_window(
    x,
    -jnp.inf,
    lax.max,
    (1, 3, 3, 1),
    (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 1), (0, 0)),
  )


@pytest.mark.parametrize("height, width", [(8, 8), (7, 9), (1, 1), (2, 5)])
@pytest.mark.parametrize("values", [3, 1000])
def test_max_pool_and_its_gradient_are_the_plain_ones(height, width, values):
  """Bit for bit, ties included: with three values most windows have one."""
  random = np.random.default_rng(0)
  x = random.integers(0, values, (2, height, width, 3)).astype(np.float32)
  y = layers.max_pool(x)
  np.testing.assert_array_equal(y, reduce_windows(x))
  # Whole numbers, so that sums are exact in any order.
  dy = random.integers(-9, 9, y.shape).astype(np.float32)
  found, expected = (
    jax.jit(lambda x, f=f: jax.vjp(f, x)[1](dy)[0])(x)
    for f in (layers.max_pool, reduce_windows)
  )
  np.testing.assert_array_equal(found, expected)
