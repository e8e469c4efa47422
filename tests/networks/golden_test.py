"""Exactly torchvision: digests of its outputs, from tests/golden/make.py.

Weights and images are drawn from a seed and each tensor's name on both sides,
so a tensor under a wrong name, or of a wrong shape, shows as well.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import draw, ours

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# Not square; odd and even at the strided layers, so each border is met.
SIZE = (75, 65)
FAST = ("resnet18", "resnet50")


def golden(file, prefix):
  """The arrays of a golden file below a prefix; names as text."""
  with np.load(GOLDEN / file) as arrays:
    found = {
      key.removeprefix(prefix): arrays[key]
      for key in arrays.files
      if key.startswith(prefix)
    }
  found["names"] = [name.decode() for name in found["names"]]
  return found


def networks():
  with np.load(GOLDEN / "forward.npz") as arrays:
    names = sorted({key.split("/")[0] for key in arrays.files})
  return [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in names
  ]


@pytest.mark.parametrize("name", networks())
def test_every_tap_and_the_logits_are_torchs(name):
  """Within 1e-4 of the largest value of each tap; measured, 3e-6.

  A digest holds the corners, edges and random pixels before pooling, where
  wrong padding shows, and random signed sums over all pooled channels. The
  running statistics are far from 0 and 1, where a wrong epsilon shows.
  """
  expected = golden("forward.npz", f"{name}/")
  found = ours.forward(name, SIZE, batch=1, seed=0)
  logits = found.pop("logits")[0]
  assert list(found) == expected["names"]
  for tap, digest, largest in zip(
    found, expected["digests"], expected["largest"], strict=True
  ):
    error = np.abs(draw.digest_tap(tap, found[tap]) - digest).max()
    assert error < 1e-4 * largest, tap
  error = np.abs(logits - expected["logits"]).max()
  assert error < 1e-4 * np.abs(expected["logits"]).max()


@pytest.mark.parametrize(
  "name",
  [
    "resnet18",
    pytest.param("resnet50", marks=pytest.mark.slow),
    pytest.param("densenet121", marks=pytest.mark.slow),
  ],
)
def test_three_training_steps_are_torchs_in_float64(name):
  """Every change of a parameter and running statistic, to a millionth of it.

  Relative to the largest change of the tensor, at learning rate 0.1 and
  momentum 0.9. Both sides in float64, as in float32 torch itself is off by a
  fifth of a change: a ReLU or a maximum decided by rounding moves a gradient
  by a whole term. What is proved is the arithmetic: momentum's convention,
  which variance is the biased one, gradients through the batch's statistics.
  """
  expected = golden("train.npz", f"{name}/float64/")
  found = ours.train(name, 64, 8, seed=0, rate=0.1, double=True)
  np.testing.assert_allclose(found.pop("losses"), expected["losses"], rtol=1e-9)
  shapes = {key: value.shape for key, value in found.items()}
  assert shapes.keys() == set(expected["names"])
  initial = draw.tensors(shapes, 0)
  for key, digest, largest in zip(
    expected["names"],
    expected["changes"],
    expected["largest_changes"],
    strict=True,
  ):
    change = draw.digest_tensor(key, found[key] - initial[key])
    assert np.abs(change - digest).max() < 1e-6 * largest, key


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, rate", [("resnet18", 0.01), ("densenet121", 0.001)]
)
def test_three_training_steps_are_torchs_in_float32(name, rate):
  """Parameters and running statistics to 1e-3 of each tensor's largest.

  At rates where torch in float32 agrees with torch in float64 to that.
  """
  expected = golden("train.npz", f"{name}/float32/")
  found = ours.train(name, 64, 8, seed=0, rate=rate, double=False)
  np.testing.assert_allclose(found.pop("losses"), expected["losses"], rtol=1e-3)
  shapes = {key: value.shape for key, value in found.items()}
  initial = draw.tensors(shapes, 0)
  for key, digest, largest in zip(
    expected["names"], expected["changes"], expected["largest"], strict=True
  ):
    assert found[key].dtype == np.float32
    change = draw.digest_tensor(key, found[key] - initial[key])
    assert np.abs(change - digest).max() < 1e-3 * largest, key


@pytest.mark.slow
def test_clams_default_encoder_is_resnet50_cut_after_layer3():
  """timm's resnet50.tv_in1k, features_only, out_indices=(3,), average pooled.

  Its tensors have torchvision's names, as drawing by name shows.
  """
  with np.load(GOLDEN / "clam.npz") as arrays:
    expected = arrays["features"]
  model = ours.drawn("resnet50", until="layer3")
  images_NCHW = draw.images(2, (64, 96), 0)
  found = model(jnp.asarray(images_NCHW.transpose(0, 2, 3, 1)))
  assert found.shape == expected.shape == (2, 1024)
  error = np.abs(np.asarray(found) - expected).max()
  assert error < 1e-5 * np.abs(expected).max()
