"""One pass over batches, and what networks cost: sums of layers against
networks that were cut and compiled."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtransfer import inference, parallel
from jaxtransfer.data import images as imaging
from jaxtransfer.data import pipeline, preprocess, sources
from jaxtransfer.measure import cost
from jaxtransfer.networks import tensors, zoo

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
TAPS = ("stem", "layer1.0", "layer1", "layer2.0", "layer2")


@pytest.fixture(scope="module")
def network():
  network = zoo.build("resnet18", until="layer2")
  tensors.load(network, tensors.random(network, 0))
  return network


@pytest.fixture(scope="module")
def devices():
  return parallel.Devices("jit", jax.devices()[:2])


def _measure(network, devices, directory, taps=TAPS):
  return inference.measure_cuts(
    network,
    taps,
    mean=MEAN,
    std=STD,
    image_size=32,
    batch_size=4,
    devices=devices,
    directory=directory,
  )


@pytest.mark.parametrize(
  "name, mode",
  [
    ("densenet121", "jit"),
    pytest.param("resnet18", "pmap", marks=pytest.mark.slow),
    pytest.param("resnet18", "jit", marks=pytest.mark.slow),
    pytest.param("densenet121", "pmap", marks=pytest.mark.slow),
  ],
)
def test_the_parts_put_together_are_the_network(name, mode):
  """What is timed computes the taps of the network itself: each part's map is
  the next one's input, and the networks cut at the ends of stages are whole.
  """
  until = {"resnet18": "layer2", "densenet121": "transition1"}[name]
  network = zoo.build(name, until=until)
  tensors.load(network, tensors.random(network, 3))
  taps = zoo.select_taps(name, "layers", until)
  devices = parallel.Devices(mode, jax.devices()[:2])
  parts = inference._Parts(network, taps, MEAN, STD, 64, devices)
  pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
  images = preprocess.preprocess(pixels, MEAN, STD)
  expected = jax.jit(lambda x: network.taps(x, taps, pool=False))(images)
  x_NHWC = devices.put(pixels)
  for tap, segment in zip(taps, parts.segments(), strict=True):
    x_NHWC = segment(x_NHWC)
    np.testing.assert_allclose(
      devices.get(x_NHWC), expected[tap], rtol=1e-4, atol=1e-4
    )
  for end in parts.ends:
    program, _ = parts.whole(end, devices.put(pixels))
    np.testing.assert_allclose(
      devices.get(program(devices.put(pixels))),
      np.mean(expected[taps[end]], (1, 2)),
      rtol=1e-4,
      atol=1e-4,
    )


@pytest.fixture(scope="module")
def measured(network, devices, tmp_path_factory):
  """What was measured once, and the directory that it left."""
  directory = tmp_path_factory.mktemp("features")
  return _measure(network, devices, directory), directory


def test_at_the_ends_of_stages_speed_and_memory_are_those_of_the_whole(
  network, devices, measured
):
  """There nothing is added up: the network cut there was timed itself, and the
  compiler's plan of it is exact. A deeper cut holds no less."""
  found, directory = measured
  assert list(found.sum_over_whole) == ["layer1", "layer2"]
  assert (np.diff(found.peak_memory_bytes) >= 0).all()
  (stored,) = directory.glob("cost-*.json")
  rounds = np.array(json.loads(stored.read_text())["rounds"])
  whole = np.median(rounds, axis=0)[len(TAPS) :]
  np.testing.assert_allclose(found.images_per_second[[2, 4]], 4 / whole)
  for t in (2, 4):
    cut = zoo.build("resnet18", until=TAPS[t])
    values = tensors.dump(network)
    tensors.load(cut, {name: values[name] for name in tensors.shapes(cut)})
    graph, state = nnx.split(cut)

    def forward(state, pixels, graph=graph):
      x = preprocess.preprocess(pixels, MEAN, STD)
      return nnx.merge(graph, state)(x)

    program = devices.compile(forward).lower(
      devices.replicate(state),
      jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8),
    )
    planned = cost.peak_memory(program.compile())
    assert found.peak_memory_bytes[t] == pytest.approx(planned, rel=0.05)


def test_rounds_are_kept_and_not_timed_again(
  network, devices, measured, tmp_path
):
  """A run that was stopped goes on with the next round; one that has them all
  times nothing and gives the same numbers."""
  first, directory = measured
  (path,) = directory.glob("cost-*.json")
  stored = json.loads(path.read_text())
  path = tmp_path / path.name
  rounds = stored["rounds"]
  assert len(rounds) == inference._ROUNDS
  path.write_text(json.dumps(stored | {"rounds": rounds[:4]}))
  _measure(network, devices, tmp_path)
  assert json.loads(path.read_text())["rounds"][:4] == rounds[:4]
  path.write_text(json.dumps(stored))
  before = path.stat().st_mtime_ns
  again = _measure(network, devices, tmp_path)
  np.testing.assert_array_equal(
    again.images_per_second, first.images_per_second
  )
  assert path.stat().st_mtime_ns == before


def test_programs_grow_with_the_depth_and_not_with_its_square(devices):
  """Blocks of one shape share a program, and only the ends of stages are
  compiled whole: of a ResNet-34's 17 layers stem, two blocks a stage but for
  the first with one, and four wholes."""
  network = zoo.build("resnet34")
  tensors.load(network, tensors.random(network, 0))
  taps = zoo.select_taps("resnet34", "layers")
  parts = inference._Parts(network, taps, MEAN, STD, 32, devices)
  programs = {id(segment.func) for segment in parts.segments()}
  assert (len(taps), len(programs), len(parts.ends)) == (17, 8, 4)


def test_other_taps_are_other_measurements(network, devices, tmp_path):
  _measure(network, devices, tmp_path, TAPS[:1])
  _measure(network, devices, tmp_path, TAPS[:2])
  assert len(list(tmp_path.glob("cost-*.json"))) == 2


class _Drawn(sources.Examples):
  """Images of noise, of which the fifth cannot be read."""

  def __init__(self):
    names = [str(i) for i in range(11)]
    super().__init__(["a"], np.zeros(11, np.int32), names)

  def read(self, row):
    if row == 5:
      raise imaging.ImageError("cut short")
    rng = np.random.default_rng(row)
    return rng.integers(0, 256, (16, 16, 3), np.uint8)


def _batches():
  return pipeline.Batches(
    _Drawn(), np.arange(11)[::-1], image_size=16, batch_size=4
  )


@pytest.mark.parametrize("mode", parallel.MODES)
def test_maps_and_logits_of_several_networks_come_from_one_pass(mode):
  """Each row is that of the network alone on that image; padding and what is
  unreadable leave no row, and every image is read once."""
  networks = {}
  for seed in range(2):
    networks[f"seed {seed}"] = zoo.build(
      "resnet18", until="stem", num_classes=3
    )
    values = tensors.random(networks[f"seed {seed}"], seed)
    tensors.load(networks[f"seed {seed}"], values)
  devices = parallel.Devices(mode, jax.devices()[:2])

  def compute(network, x_NHWC):
    maps = network.taps(x_NHWC, ["stem"], pool=False)["stem"]
    return {"map": maps, "logits": network(x_NHWC)}

  placed = inference.place(networks, compute, devices, MEAN, STD)
  with _batches() as batches:
    rows, outputs = inference.read(inference.run(placed, batches, devices))
    assert batches.failures == [("5", "cut short")]
  assert rows.tolist() == [10, 9, 8, 7, 6, 4, 3, 2, 1, 0]
  pixels = np.stack([_Drawn().read(row) for row in rows])
  x_NHWC = preprocess.preprocess(pixels, MEAN, STD)
  for label, network in networks.items():
    for key, expected in compute(network, x_NHWC).items():
      np.testing.assert_allclose(outputs[label][key], expected, atol=1e-4)


def test_a_pass_ends_when_it_is_asked_to():
  """Asked before each batch: what was under way is not waited for."""
  devices = parallel.Devices("jit", jax.devices()[:1])
  asked = iter([False, False, True])
  outputs = []
  with pytest.raises(inference.Stopped), _batches() as batches:
    for of in inference.run(
      lambda pixels: pixels, batches, devices, stop=lambda: next(asked)
    ):
      outputs.append(of.row.tolist())
  assert outputs == [[10, 9, 8, 7]]
