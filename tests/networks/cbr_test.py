"""The CBR networks against the published counts and a plain computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib import stride_tricks

from jaxtransfer.networks import cbr, tensors, zoo
from tests.golden import ours

# Parameters in the paper's first table.
PUBLISHED = {
  "cbr_larget": 8532480,
  "cbr_largew": 8432128,
  "cbr_small": 2108672,
  "cbr_tiny": 1076480,
}


def images(batch=2, size=(19, 16), seed=0):
  random = np.random.default_rng(seed)
  return random.normal(size=(batch, *size, 3))


def windows(x_NHWC, size, stride, border):
  """Every (size, size) window of a padded image: (N, h, w, C, size, size)."""
  half = size // 2
  pad = ((0, 0), (half, half), (half, half), (0, 0))
  x_NHWC = np.pad(x_NHWC, pad, constant_values=border)
  found = stride_tricks.sliding_window_view(x_NHWC, (size, size), (1, 2))
  return found[:, ::stride, ::stride]


def plain(values, spec, x_NHWC, train):
  """The features in float64 NumPy, from tensors in torch's layout."""
  for i in range(1, len(spec.widths) + 1):
    kernel_OIHW = values[f"block{i}.conv.weight"].astype(float)
    patches = windows(x_NHWC, kernel_OIHW.shape[-1], 1, 0)
    x_NHWC = np.einsum("nhwcij,ocij->nhwo", patches, kernel_OIHW, optimize=True)
    mean = values[f"block{i}.bn.running_mean"].astype(float)
    var = values[f"block{i}.bn.running_var"].astype(float)
    if train:
      mean, var = x_NHWC.mean((0, 1, 2)), x_NHWC.var((0, 1, 2))
    x_NHWC = (x_NHWC - mean) / np.sqrt(var + 1e-5)
    x_NHWC = x_NHWC * values[f"block{i}.bn.weight"]
    x_NHWC = np.maximum(x_NHWC + values[f"block{i}.bn.bias"], 0)
    if i < len(spec.widths) or spec.last_pool:
      x_NHWC = windows(x_NHWC, 3, 2, -np.inf).max((-2, -1))
  return x_NHWC.mean((1, 2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_for_grey_images(name):
  """Published for one channel, and one BatchNorm parameter each.

  RGB adds two channels to the first kernel, and BatchNorm here a scale to the
  shift that the source's library has alone.
  """
  spec = cbr.NETWORKS[name]
  params, _ = zoo.count(zoo.build(name, num_classes=5))
  colours = 2 * spec.first**2 * spec.widths[0]
  assert params - colours - sum(spec.widths) == PUBLISHED[name]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_features_are_those_of_a_plain_computation(name, train):
  """On odd and even sides, where padding and pooling differ."""
  model = ours.drawn(name)
  x = images()
  expected = plain(tensors.dump(model), cbr.NETWORKS[name], x, train)
  found = model(jnp.asarray(x, jnp.float32), train=train)
  assert (
    found.shape == expected.shape == (2, zoo.list_layers(name)[-1].channels)
  )
  np.testing.assert_allclose(found, expected, atol=2e-4)


def test_layers_are_blocks_that_halve_the_image():
  """Only LargeT's last block keeps the size: its average follows at once."""
  names = [f"block{i}" for i in range(1, 6)]
  for name in PUBLISHED:
    layers = zoo.list_layers(name)
    assert [layer.name for layer in layers] == names[: len(layers)]
    assert [layer.stride for layer in layers] == [2, 4, 8, 16, 16][
      : len(layers)
    ]
    assert zoo.select_taps(name, "blocks") == zoo.select_taps(name, "layers")
  layers = zoo.list_layers("cbr_tiny", 64)
  kernel = 25
  assert [layer.macs for layer in layers[:2]] == [
    64**2 * kernel * 3 * 32,
    64**2 * kernel * 3 * 32 + 32**2 * kernel * 32 * 64,
  ]


def test_a_mapped_axis_gives_the_statistics_of_the_whole_batch():
  """And the compiled gradient of all parameters is there and finite."""
  model = ours.drawn("cbr_tiny", num_classes=3, slim_after="block2")
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  x = jnp.asarray(images(4), jnp.float32)

  def forward(params, x_NHWC, train):
    model = nnx.merge(graph, params, rest, copy=True)
    logits = model(x_NHWC, train=train)
    return logits.sum(), (logits, nnx.state(model, nnx.Not(nnx.Param)))

  def mapped(params, x_NHWC):
    parts = x_NHWC.reshape(2, 2, *x_NHWC.shape[1:])
    run = functools.partial(forward, params, train="data")
    return jax.vmap(run, axis_name="data")(parts)[1]

  whole = jax.jit(
    jax.value_and_grad(functools.partial(forward, train=True), has_aux=True)
  )
  (_, (logits, after)), gradient = whole(params, x)
  parts, each = jax.jit(mapped)(params, x)
  np.testing.assert_allclose(parts.reshape(4, 3), logits, atol=1e-4)
  for expected, found in zip(
    jax.tree.leaves(after), jax.tree.leaves(each), strict=True
  ):
    np.testing.assert_allclose(found, [expected, expected], atol=1e-5)
  for leaf in jax.tree.leaves(gradient):
    assert np.isfinite(leaf).all() and (leaf != 0).any()


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32():
  """Within 2 % of the largest logit; parameters stay float32."""
  options = {"num_classes": 10}
  model = ours.drawn("cbr_tiny", dtype=jnp.bfloat16, **options)
  x = jnp.asarray(images(), jnp.float32)
  expected = np.asarray(ours.drawn("cbr_tiny", **options)(x))
  found = model(x)
  assert found.dtype == jnp.float32
  assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
  kinds = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
  assert kinds == {jnp.dtype(jnp.float32)}


def test_one_pixel_reaches_the_end():
  model = ours.drawn("cbr_tiny")
  assert np.isfinite(model(jnp.ones((1, 1, 1, 3)))).all()
