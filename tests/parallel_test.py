"""jit and pmap, one device and eight: the same rows."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxtransfer import errors, parallel
from jaxtransfer.networks import tensors, zoo

TAPS = ["stem", "layer1"]


def _network():
  network = zoo.build("resnet18", until="layer1")
  tensors.load(network, tensors.random(network, 0))
  return nnx.split(network)


def _features(devices, images):
  graph, state = _network()
  program = devices.compile(lambda s, x: nnx.merge(graph, s).taps(x, TAPS))
  return devices.get(program(devices.replicate(state), devices.put(images)))


@pytest.mark.parametrize("mode", parallel.MODES)
@pytest.mark.parametrize("count", [1, 8])
def test_rows_do_not_depend_on_the_devices(mode, count):
  """Each image is worked on alone, so only the order of sums may differ."""
  images = np.random.default_rng(0).normal(size=(16, 33, 33, 3))
  images = images.astype(np.float32)
  one = _features(parallel.Devices("jit", jax.devices()[:1]), images)
  here = _features(parallel.Devices(mode, jax.devices()[:count]), images)
  for tap in TAPS:
    np.testing.assert_allclose(here[tap], one[tap], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", parallel.MODES)
def test_nothing_recompiles_and_nothing_moves_unasked(mode):
  """The guard refuses implicit transfers; a compilation would be counted."""
  graph, state = _network()
  devices = parallel.Devices(mode)
  traces = []

  def function(state, images):
    traces.append(1)
    return nnx.merge(graph, state).taps(images, TAPS)

  program = devices.compile(function)
  state = devices.replicate(state)
  rng = np.random.default_rng(0)
  for step in range(3):
    images = rng.normal(size=(8, 33, 33, 3)).astype(np.float32)
    if step:
      with jax.transfer_guard("disallow"):
        devices.get(program(state, devices.put(images)))
    else:
      devices.get(program(state, devices.put(images)))
      first = len(traces)
  assert len(traces) == first


def test_batch_size_is_a_multiple_of_the_devices():
  """Every device gets the same number of images, and none is left out."""
  devices = parallel.Devices("jit")
  assert [devices.batch_size(n) for n in (1, 8, 9)] == [8, 8, 16]


def test_an_unknown_mode_is_the_users_mistake():
  """Found before any work, with the modes there are."""
  with pytest.raises(errors.UsageError, match="jit, pmap"):
    parallel.Devices("pjit")
