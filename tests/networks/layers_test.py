"""The layers against plain NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.networks import layers

DATA, WHOLE = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()


def over_devices(function, devices, in_specs, out_specs):
  """The function compiled, each of the devices with its part of the batch."""
  mesh = jax.make_mesh(
    (devices,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  return jax.jit(
    jax.shard_map(
      function,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )
  )


def convolved(x_NHWC, kernel_HWIO, stride, groups):
  """A convolution padded by half its kernel, as written in a textbook."""
  size, _, inputs, outputs = kernel_HWIO.shape
  pad = size // 2
  x = np.pad(x_NHWC, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
  height = (x.shape[1] - size) // stride + 1
  width = (x.shape[2] - size) // stride + 1
  y = np.zeros((len(x), height, width, outputs))
  for row in range(height):
    for column in range(width):
      top, left = row * stride, column * stride
      patch = x[:, top : top + size, left : left + size]
      for o in range(outputs):
        first = o // (outputs // groups) * inputs
        seen = patch[..., first : first + inputs]
        y[:, row, column, o] = (seen * kernel_HWIO[..., o]).sum((1, 2, 3))
  return y


@pytest.mark.parametrize("height, width", [(8, 7), (1, 5), (2, 1)])
@pytest.mark.parametrize(
  "size, stride, groups",
  [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 2, 4), (7, 2, 1)],
)
def test_convolution_is_the_textbook_sum(height, width, size, stride, groups):
  """Border, stride and groups, also where the kernel exceeds the image."""
  random = np.random.default_rng(0)
  layer = layers.Conv(8, 12, size, stride=stride, groups=groups)
  kernel = random.normal(size=layer.kernel.shape).astype(np.float32)
  layer.kernel.set_value(jnp.asarray(kernel))
  x = random.normal(size=(2, height, width, 8)).astype(np.float32)
  expected = convolved(x.astype(float), kernel, stride, groups)
  y = np.asarray(layer(jnp.asarray(x)))
  np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
  macs, out = layer.macs((height, width))
  assert out == y.shape[1:3]
  assert macs == y[0].size * size * size * 8 // groups


@pytest.mark.parametrize("height, width", [(8, 7), (1, 1), (2, 3)])
def test_max_pool_ignores_the_border(height, width):
  """All values lie below zero, so a border of zeros would win."""
  random = np.random.default_rng(0)
  x = -1 - random.random((2, height, width, 3)).astype(np.float32)
  padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
  rows, columns = layers.halved((height, width))
  expected = [
    [
      padded[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].max((1, 2))
      for c in range(columns)
    ]
    for r in range(rows)
  ]
  y = np.asarray(layers.max_pool(jnp.asarray(x)))
  np.testing.assert_array_equal(y, np.array(expected).transpose(2, 0, 1, 3))


def test_average_pool_leaves_out_an_odd_row_and_column():
  x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
  expected = x[:, :4, :6].reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
  y = np.asarray(layers.average_pool(jnp.asarray(x)))
  np.testing.assert_allclose(y, expected, atol=1e-6)


def begun(scale, bias):
  """A BatchNorm whose running statistics are zero."""
  layer = layers.BatchNorm(len(scale))
  layer.scale.set_value(scale)
  layer.bias.set_value(bias)
  layer.mean.set_value(jnp.zeros_like(bias))
  layer.var.set_value(jnp.zeros_like(bias))
  return layer


def norm(channels, dtype=jnp.float32, seed=0):
  """A BatchNorm with random numbers, and these in float64."""
  random = np.random.default_rng(seed)
  layer = layers.BatchNorm(channels, dtype=dtype)
  numbers = {
    "scale": random.uniform(0.5, 2, channels),
    "bias": random.normal(0, 1, channels),
    "mean": random.normal(0, 1, channels),
    "var": random.uniform(0.1, 4, channels),
  }
  for name, value in numbers.items():
    value = value.astype(np.float32)
    numbers[name] = value.astype(float)
    getattr(layer, name).set_value(jnp.asarray(value))
  return layer, numbers


@pytest.mark.parametrize("mean, std", [(0, 1), (100, 0.1), (-3, 50)])
def test_training_statistics_are_those_of_float64(mean, std):
  """Normalised with the biased variance; the running one is unbiased.

  With ten values per channel the two variances differ by a ninth. A variance
  from E[x^2] - E[x]^2 in float32 would be noise at mean 100, deviation 0.1.
  """
  layer, numbers = norm(5)
  random = np.random.default_rng(1)
  x = random.normal(mean, std, (2, 1, 5, 5)).astype(np.float32)
  y = np.asarray(layer(jnp.asarray(x), train=True))
  x = x.astype(float)
  batch_mean = x.mean((0, 1, 2))
  biased = x.var((0, 1, 2))
  expected = (x - batch_mean) / np.sqrt(biased + 1e-5)
  expected = expected * numbers["scale"] + numbers["bias"]
  # Around 100 a float32 is a multiple of 8e-6, 1e-4 deviations.
  np.testing.assert_allclose(y, expected, atol=1e-5 + abs(mean) / std * 1e-6)
  running = 0.9 * numbers["mean"] + 0.1 * batch_mean
  np.testing.assert_allclose(np.asarray(layer.mean[...]), running, rtol=1e-5)
  running = 0.9 * numbers["var"] + 0.1 * x.var((0, 1, 2), ddof=1)
  np.testing.assert_allclose(np.asarray(layer.var[...]), running, rtol=1e-5)


def test_one_pixel_is_normalised_to_the_bias():
  """A variance of one value is zero; torch refuses, we stay finite."""
  layer, numbers = norm(5)
  x = jnp.full((1, 1, 1, 5), 3.0)
  y = np.asarray(layer(x, train=True))
  np.testing.assert_allclose(y[0, 0, 0], numbers["bias"], atol=1e-5)
  running = np.asarray(layer.var[...])
  np.testing.assert_allclose(running, 0.9 * numbers["var"], rtol=1e-6)


def test_inference_changes_no_statistic():
  layer, numbers = norm(5)
  before = np.asarray(layer.mean[...]), np.asarray(layer.var[...])
  x = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
  y = np.asarray(layer(jnp.asarray(x)))
  expected = (x - numbers["mean"]) / np.sqrt(numbers["var"] + 1e-5)
  expected = expected * numbers["scale"] + numbers["bias"]
  np.testing.assert_allclose(y, expected, atol=1e-5)
  np.testing.assert_array_equal(layer.mean[...], before[0])
  np.testing.assert_array_equal(layer.var[...], before[1])


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_loses_only_the_output_rounding(train):
  """A bfloat16 has 8 bits: rounding to it moves a value by 2^-8 of itself.

  Statistics cast to bfloat16 before normalising, as some libraries do, move it
  several times further, and most where scale times mean cancels.
  """
  layer, numbers = norm(64, dtype=jnp.bfloat16)
  random = np.random.default_rng(1)
  x = jnp.asarray(random.normal(size=(4, 8, 8, 64)), jnp.bfloat16)
  y = layer(x, train=train)
  assert y.dtype == jnp.bfloat16
  assert layer.mean[...].dtype == layer.var[...].dtype == jnp.float32
  x = np.asarray(x, float)
  mean = x.mean((0, 1, 2)) if train else numbers["mean"]
  var = x.var((0, 1, 2)) if train else numbers["var"]
  expected = (x - mean) / np.sqrt(var + 1e-5)
  expected = expected * numbers["scale"] + numbers["bias"]
  error = np.abs(np.asarray(y, float) - expected)
  assert (error <= 2**-8 * np.abs(expected) + 1e-5).all()


def test_gradients_reach_through_the_batch_statistics():
  """The batch's own mean and variance cancel any shift and scale of it.

  So a training output's gradient is orthogonal to a constant and to the
  normalised input; a mean or variance taken as constant breaks this.
  """
  layer, _ = norm(3)
  random = np.random.default_rng(1)
  x = jnp.asarray(random.normal(size=(4, 5, 5, 3)), jnp.float32)
  weights = jnp.asarray(random.normal(size=x.shape), jnp.float32)
  scale, bias = layer.scale[...], layer.bias[...]

  def loss(x):
    return (begun(scale, bias)(x, train=True) * weights).sum()

  gradient = np.asarray(jax.grad(loss)(x), float)
  size = np.abs(gradient).sum((0, 1, 2))
  assert (np.abs(gradient.sum((0, 1, 2))) < 1e-4 * size).all()
  assert (np.abs((gradient * x).sum((0, 1, 2))) < 1e-4 * size).all()


@pytest.mark.parametrize("devices", [1, 2])
def test_gradients_are_those_of_the_whole_batch(devices):
  """Written out by hand, so held against JAX's own, in float64 and unsplit."""
  layer, numbers = norm(3)
  random = np.random.default_rng(1)
  x = random.normal(5, 2, (4, 5, 6, 3)).astype(np.float32)
  dy = random.normal(size=x.shape).astype(np.float32)

  def textbook(x, scale, bias):
    centred = x - x.mean((0, 1, 2))
    var = jnp.square(centred).mean((0, 1, 2))
    return (centred / jnp.sqrt(var + 1e-5) * scale + bias) * dy

  def ours(x, scale, bias, dy):
    def loss(x, scale, bias):
      return (begun(scale, bias)(x, train="data") * dy).sum()

    dx, dscale, dbias = jax.grad(loss, (0, 1, 2))(x, scale, bias)
    return dx, *jax.lax.psum((dscale, dbias), "data")

  with jax.enable_x64(True):
    expected = jax.grad(lambda *a: textbook(*a).sum(), (0, 1, 2))(
      jnp.asarray(x, float),
      jnp.asarray(numbers["scale"]),
      jnp.asarray(numbers["bias"]),
    )
  found = over_devices(
    ours, devices, (DATA, WHOLE, WHOLE, DATA), (DATA, WHOLE, WHOLE)
  )(x, layer.scale[...], layer.bias[...], dy)
  for ours_of, expected_of in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours_of, expected_of, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_channels_measured_apart_are_those_measured_together(dtype):
  """A channel's statistics are its own, so parts may bring theirs.

  Output, running statistics and gradients: two layers read the first part, so
  what both ask of its statistics has to add up. Over two devices.
  """
  random = np.random.default_rng(2)
  first, second = (
    jnp.asarray(random.normal(3, 2, (4, 5, 6, channels)), dtype)
    for channels in (3, 2)
  )
  scales = [jnp.asarray(random.normal(size=c), jnp.float32) for c in (3, 5)]
  weights = jnp.asarray(random.normal(size=(4, 5, 6, 5)), jnp.float32)

  def normalise(x, scale):
    layer = begun(scale, jnp.zeros_like(scale))
    y = layer(x, train="data")
    return y, layer.mean[...], layer.var[...]

  def loss(parts, scales, weights, apart):
    if apart:
      first = layers.measure(parts[0], "data")
      both = layers.concatenate([first, layers.measure(parts[1], "data")])
    else:
      first = parts[0]
      both = layers.concatenate(parts)
    narrow, *_ = normalise(first, scales[0])
    wide, *running = normalise(both, scales[1])
    total = (jnp.square(wide) * weights).sum() + (narrow**3).sum()
    return total, (wide, running)

  def run(parts, scales, weights, apart):
    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
      parts, scales, weights, apart
    )
    wide, running = out
    return wide, running, gradients[0], jax.lax.psum(gradients[1], "data")

  results = [
    over_devices(
      functools.partial(run, apart=apart),
      2,
      (DATA, WHOLE, DATA),
      (DATA, WHOLE, DATA, WHOLE),
    )([first, second], scales, weights)
    for apart in (False, True)
  ]
  tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
  for together, apart in zip(*map(jax.tree.leaves, results), strict=True):
    together, apart = np.asarray(together, float), np.asarray(apart, float)
    np.testing.assert_allclose(
      apart, together, rtol=0, atol=tolerance * np.abs(together).max()
    )


def test_measuring_again_keeps_what_was_measured():
  x = jnp.arange(24.0).reshape(2, 3, 2, 2)
  measured = layers.measure(x, True)
  assert layers.measure(measured, True) is measured
  assert layers.bare(measured) is x
  assert layers.bare(x) is x
