"""Normalising on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.data.preprocess import preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_every_byte_agrees_with_float64():
  """256 values of 3 channels are all there are."""
  bytes_ = np.arange(256, dtype=np.uint8)
  x_NHWC = np.stack([bytes_] * 3, axis=-1).reshape(1, 16, 16, 3)
  expected = (x_NHWC / 255.0 - np.array(MEAN)) / np.array(STD)
  for function in (preprocess, jax.jit(preprocess, static_argnums=(1, 2))):
    y_NHWC = function(x_NHWC, MEAN, STD)
    assert y_NHWC.dtype == jnp.float32 and y_NHWC.shape == x_NHWC.shape
    np.testing.assert_allclose(y_NHWC, expected, rtol=0, atol=1e-6)


def test_bfloat16_rounds_the_float32_result_once():
  """The result is the nearest bfloat16: nothing was rounded on the way."""
  x_NHWC = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
  y_NHWC = preprocess(x_NHWC, MEAN, STD, jnp.bfloat16)
  assert y_NHWC.dtype == jnp.bfloat16
  exact = preprocess(x_NHWC, MEAN, STD).astype(jnp.bfloat16)
  np.testing.assert_array_equal(y_NHWC, exact)
