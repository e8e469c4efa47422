"""Numbers in and out of a network, and the families' initial ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtransfer.networks import tensors, zoo
from tests.golden import draw, ours


@pytest.mark.parametrize(
  "name, until",
  [
    ("resnet18", None),
    ("resnext50_32x4d", "layer2.0"),
    ("densenet121", None),
    ("cbr_small", None),
  ],
)
def test_what_goes_in_comes_out_bit_for_bit(name, until):
  model = zoo.build(name, until=until, num_classes=7)
  shapes = tensors.shapes(model)
  given = draw.tensors(shapes, seed=3)
  # Not a number loses no bit either.
  first = next(iter(given))
  given[first].flat[:2] = np.nan, -0.0
  tensors.load(model, given)
  found = tensors.dump(model)
  assert list(found) == list(shapes)
  for key, value in given.items():
    assert found[key].dtype == np.float32
    assert found[key].flags.c_contiguous
    assert found[key].shape == shapes[key] == value.shape
    assert found[key].tobytes() == value.tobytes()


def test_other_floats_become_float32():
  """Half precision is exact in float32; a double is rounded."""
  model = zoo.build("resnet18", until="stem")
  given = draw.tensors(tensors.shapes(model), seed=0)
  halves = {k: v.astype(np.float16) for k, v in given.items()}
  tensors.load(model, halves)
  for key, value in tensors.dump(model).items():
    np.testing.assert_array_equal(value, halves[key].astype(np.float32))


def broken(shapes):
  """Names of a fault -> tensors that have it."""
  good = draw.tensors(shapes, seed=1)
  last = list(good)[-1]
  return {
    "missing": {k: v for k, v in good.items() if k != last},
    "left over": {**good, "fc.bias": np.zeros(3)},
    "shape": {**good, last: good[last][:-1]},
    "convert": {**good, last: np.full(good[last].shape, "text")},
  }


@pytest.mark.parametrize("fault", ["missing", "left over", "shape", "convert"])
def test_a_failing_load_changes_nothing(fault):
  """The fault is in the last tensor: the first are not set on the way."""
  model = ours.drawn("resnet18", until="layer1.0")
  before = tensors.dump(model)
  with pytest.raises(ValueError, match=fault):
    tensors.load(model, broken(tensors.shapes(model))[fault])
  after = tensors.dump(model)
  for key, value in before.items():
    np.testing.assert_array_equal(after[key], value)
  model = zoo.build("resnet18", until="layer1.0")
  with pytest.raises(ValueError):
    tensors.load(model, broken(tensors.shapes(model))[fault])
  leaves = jax.tree.leaves(nnx.state(model))
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize(
  "name, until, fan_axis",
  [
    ("resnet18", "layer3", 0),
    ("resnext50_32x4d", "layer2", 0),
    ("densenet121", "transition1", 1),
    ("cbr_tiny", None, 1),
  ],
)
def test_random_is_the_familys_initialiser(name, until, fan_axis):
  """Kaiming normal: fan-out in ResNet, fan-in in DenseNet and CBR.

  The second moment of n normals of variance s^2 is s^2 within sqrt(2/n), the
  fourth 3 s^4 within sqrt(96/n); six of those are allowed.
  """
  model = zoo.build(name, until=until, num_classes=50)
  values = tensors.random(model, seed=0)
  assert values.keys() == tensors.shapes(model).keys()
  for key, value in values.items():
    assert value.dtype == np.float32
    assert value.shape == tensors.shapes(model)[key]
    if value.ndim == 4:
      fan = value.shape[fan_axis] * value.shape[2] * value.shape[3]
      scaled = value.astype(float) * np.sqrt(fan / 2)
      error = 6 / np.sqrt(value.size)
      assert abs(scaled.mean()) < error
      assert abs((scaled**2).mean() - 1) < error * np.sqrt(2), key
      assert abs((scaled**4).mean() - 3) < error * np.sqrt(96), key
    elif key.startswith(("fc", "classifier")):
      limit = 1 / np.sqrt(model.channels)
      if key == "classifier.bias":
        assert (value == 0).all()
      else:
        assert limit * 0.8 < np.abs(value).max() <= limit
        assert abs(value.mean()) < 6 * limit / np.sqrt(3 * value.size)
    else:
      ones = key.endswith((".weight", "running_var"))
      assert (value == float(ones)).all(), key


@pytest.mark.parametrize(
  "name, until", [("resnet18", "layer2.0"), ("densenet121", "transition1")]
)
def test_a_cut_network_begins_with_the_wholes_numbers(name, until):
  """So a comparison of cuts compares cuts, not draws; a seed decides all."""
  whole = tensors.random(zoo.build(name, num_classes=5), seed=4)
  cut = tensors.random(zoo.build(name, until=until), seed=4)
  other = tensors.random(zoo.build(name, until=until), seed=5)
  assert cut.keys() < whole.keys()
  for key, value in cut.items():
    np.testing.assert_array_equal(value, whole[key])
    assert value.ndim < 4 or (value != other[key]).any()
  # No two tensors share their numbers.
  drawn = [v.ravel()[:8].tobytes() for v in whole.values() if v.ndim == 4]
  assert len(set(drawn)) == len(drawn)


def test_torch_lays_a_kernel_out_as_output_input_height_width():
  """A kernel of 7 x 7 with one weight set moves just that pixel through."""
  model = zoo.build("resnet18", until="stem")
  given = {
    key: np.zeros(shape, np.float32)
    for key, shape in tensors.shapes(model).items()
  }
  assert given["conv1.weight"].shape == (64, 3, 7, 7)
  given["conv1.weight"][5, 1, 2, 4] = 9
  tensors.load(model, given)
  kernel_HWIO = np.array(model.layers[0].conv1.kernel[...])
  assert kernel_HWIO[2, 4, 1, 5] == 9
  assert np.count_nonzero(kernel_HWIO) == 1
  assert isinstance(model.layers[0].conv1.kernel[...], jnp.ndarray)
