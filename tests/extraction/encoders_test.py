"""Which features are kept of which networks, and what they are called."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import errors, parallel
from jaxtransfer.extraction import encoders
from jaxtransfer.weights import loading


def _features(encoder, x):
  found = jax.jit(functools.partial(encoder.compute, encoder.network))(x)
  assert set(found) == set(encoder.taps)
  for tap, values in found.items():
    assert values.shape == (len(x), encoder.channels(tap))
  return found


def test_the_end_of_a_cut_network_is_its_last_layer():
  """Which is what the network itself gives, pooled."""
  until = "denseblock1.denselayer1"
  (encoder,) = encoders.open_encoders("densenet121", "stem,end", until=until)
  x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  found = _features(encoder, x)
  whole = jax.jit(encoder.network)(x)
  np.testing.assert_allclose(found["end"], whole, rtol=1e-5)
  assert encoder.cut("end") == until and encoder.cut("stem") == "stem"


def test_a_relu_at_the_end_is_kept_and_named():
  """As an uncut DenseNet has it: beside the last layer itself, which may be
  asked for too."""
  source = loading.resolve_weights("densenet121", None)
  model = loading.create_model(
    "densenet121", until="denseblock1.denselayer1", weights=source
  )
  model.relu = True
  last = model.layer_names[-1]
  encoder = encoders.Encoder(model, source, (last, "end"))
  x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  found = _features(encoder, x)
  bare = jax.jit(lambda x: model.taps(x, [last], pool=False))(x)[last]
  np.testing.assert_allclose(found[last], bare.mean((1, 2)), rtol=1e-4)
  relu = jnp.maximum(bare, 0).mean((1, 2))
  np.testing.assert_allclose(found["end"], relu, rtol=1e-4)
  assert encoder.cut("end") == f"{last}-relu"


@pytest.mark.parametrize(
  ("taps", "until", "kept", "built"),
  [
    ("end", "", ("end",), "layer4.1"),
    ("end", "layer2", ("end",), "layer2.1"),
    ("layer2,stem", "", ("stem", "layer2"), "layer2.1"),
    ("layer2,end", "layer2", ("layer2",), "layer2.1"),
    ("blocks", "layer2", ("stem", "layer1", "layer2"), "layer2.1"),
    ("layer1.0,end", "layer2", ("layer1.0", "end"), "layer2.1"),
  ],
)
def test_what_lies_behind_the_deepest_tap_is_not_built(
  taps, until, kept, built
):
  (encoder,) = encoders.open_encoders("resnet18", taps, until=until)
  assert encoder.taps == kept
  assert encoder.network.layer_names[-1] == built
  if until and "end" in kept:
    assert encoder.cut("end") == until


def test_several_networks_have_their_own_weights_and_names(tmp_path):
  """A name alone has the config's weights; files of the same name are told
  apart by what is in them; an exported network ends where it was cut."""
  paths = []
  for seed in (1, 2):
    model = loading.create_model("resnet18", until="layer1", seed=seed)
    paths.append(tmp_path / f"{seed}" / "model.safetensors")
    loading.export(model, paths[-1], {"mean": [0.5] * 3, "std": [0.2] * 3})
  named = f"cbr_tiny@,resnet18@{paths[0]}, resnet18"
  found = encoders.open_encoders(named, "end", weights=str(paths[1]))
  assert [e.source.label for e in found] == [
    "random",
    "model.safetensors",
    "model.safetensors",
  ]
  assert found[1].source.mean == (0.5, 0.5, 0.5)
  outputs = encoders.outputs_of(found)
  assert [output.folder for output in outputs] == [
    "cbr_tiny-random-block4",
    f"resnet18-model-layer1-{found[1].weights_sha256[:8]}",
    f"resnet18-model-layer1-{found[2].weights_sha256[:8]}",
  ]
  assert found[1].weights_sha256 == found[1].source.sha256
  assert len(found[0].weights_sha256) == 64
  for output in outputs:
    said = output.attributes()
    assert said["encoder"] == output.folder
    assert said["normalisation"]["mean"] == list(output.encoder.source.mean)


def test_each_network_is_normalised_as_its_weights_are():
  """In one pass over the same pixels; the result is as small as it is kept."""
  source = loading.resolve_weights("cbr_tiny", None)
  model = loading.create_model("cbr_tiny", until="block1", weights=source)
  pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
  made = []
  for mean, std in (((0.5,) * 3, (0.25,) * 3), ((0.1, 0.2, 0.3), (0.5,) * 3)):
    of = dataclasses.replace(source, mean=mean, std=std, label=f"{mean[1]}")
    made.append(encoders.Encoder(model, of, ("block1",)))
  devices = parallel.Devices()
  outputs = encoders.outputs_of(made)
  found = encoders.place(outputs, devices, "float16")(devices.put(pixels))
  for output in outputs:
    of = output.encoder.source
    x = (pixels / 255 - of.mean) / of.std
    wanted = jax.jit(lambda x: model.taps(x, ["block1"])["block1"])(
      x.astype(np.float32)
    )
    values = np.asarray(found[output.folder])
    assert values.dtype == np.float16
    np.testing.assert_allclose(values, wanted, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
  ("networks", "settings", "says"),
  [
    ("", {}, "config.networks is empty"),
    ("resnet19", {}, "did you mean 'resnet18'"),
    ("resnet18", {"taps": "layer9"}, "no layer 'layer9'"),
    ("resnet18", {"taps": ""}, "config.taps is empty"),
    ("resnet18,cbr_tiny", {"prefix": "encoder."}, "is for one network"),
    ("resnet18@nowhere.pth", {}, "nowhere.pth"),
  ],
)
def test_mistakes_are_told(networks, settings, says):
  settings = {"taps": "end", **settings}
  with pytest.raises(errors.UsageError, match=says):
    encoders.open_encoders(networks, **settings)
