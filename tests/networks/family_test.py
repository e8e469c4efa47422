"""A new family needs its module and its place in the zoo's list, no more."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtransfer.networks import cbr, tensors, zoo
from jaxtransfer.networks.family import Family, Layout
from jaxtransfer.weights import loading


def _without_wrapper(names):
  return {name: re.sub(r"^inner\.", "", name) for name in names}


FAMILY = Family(
  name="plain",
  networks={"plain2": cbr.Spec((8, 16), 3, 3)},
  layer_names=cbr.layer_names,
  aliases=cbr.aliases,
  make_layers=cbr.make_layers,
  ends=("block2",),
  layouts=(
    Layout("block1.conv.weight", heads=("^out", "out")),
    Layout("inner.block1.conv.weight", _without_wrapper, ("^out",)),
  ),
  head="out",
  prefix="body.",
  fan="out",
  head_bias=False,
  final_relu=True,
  assumed="nothing but what is written",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setattr(zoo, "_FAMILIES", (*zoo._FAMILIES, FAMILY))


def test_names_initial_values_and_cuts_are_the_familys():
  """Its head and prefix, fan-out, a head without bias, where a search ends."""
  assert "plain2" in zoo.list_models() and zoo.family("plain2") is FAMILY
  model = zoo.build("plain2", num_classes=3)
  assert model.relu
  values = tensors.random(model, 0)
  assert {"body.block1.conv.weight", "out.weight"} < values.keys()
  assert not values["out.bias"].any() and values["out.weight"].any()
  kernel = values["body.block2.conv.weight"]
  assert kernel.std() == pytest.approx(np.sqrt(2 / (16 * 9)), rel=0.1)
  taps = zoo.select_taps("plain2", "blocks")
  assert FAMILY.select_ends(taps) == ("block2",)


def test_its_files_are_read_in_all_layouts_and_cut(tmp_path):
  """What is exported comes back; so do the names of its other layout, and the
  page is told what no file shows."""
  model = loading.create_model("plain2", num_classes=3, seed=1)
  loading.export(model, tmp_path / "own.safetensors")
  again = loading.create_model(
    "plain2", weights=tmp_path / "own.safetensors", keep_head=True
  )
  x_NHWC = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 9, 3)))
  np.testing.assert_array_equal(model(x_NHWC), again(x_NHWC))
  values = {
    name.replace("body.", "model.inner."): value
    for name, value in tensors.dump(model).items()
    if not name.startswith("out.")
  }
  save_file(values, tmp_path / "other.safetensors")
  source = loading.resolve_weights("plain2", tmp_path / "other.safetensors")
  assert any("nothing but what is written" in note for note in source.notes)
  cut = loading.create_model("plain2", until="block1", weights=source)
  np.testing.assert_array_equal(
    cut.taps(x_NHWC, ["block1"])["block1"],
    model.taps(x_NHWC, ["block1"])["block1"],
  )
