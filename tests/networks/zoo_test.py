"""Which networks and layers there are, what they cost, and cutting them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtransfer import errors
from jaxtransfer.networks import densenet, network, tensors, zoo
from tests.golden import draw, ours

# Parameters with a head of 1000, and 10^9 multiply-accumulates at 224 px, as
# torchvision publishes them (WeightsEnum.meta: num_params, _ops).
PUBLISHED = {
  "densenet121": (7978856, 2.834),
  "densenet161": (28681000, 7.728),
  "densenet169": (14149480, 3.36),
  "densenet201": (20013928, 4.291),
  "resnet101": (44549160, 7.801),
  "resnet152": (60192808, 11.514),
  "resnet18": (11689512, 1.814),
  "resnet34": (21797672, 3.664),
  "resnet50": (25557032, 4.089),
  "resnext50_32x4d": (25028904, 4.23),
  "wide_resnet50_2": (68883240, 11.398),
}


def parameters(model):
  """How many trainable numbers a model holds, from its tensors' shapes."""
  return sum(
    math.prod(shape)
    for name, shape in tensors.shapes(model).items()
    if "running" not in name
  )


def images(batch=2, size=33, seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.normal(size=(batch, size, size, 3)), jnp.float32)


@functools.cache
def drawn(name, **options):
  return ours.drawn(name, **options)


def smallest():
  """A DenseNet of one layer per block, whose sizes are those of the others."""
  spec = densenet.Spec((1, 1, 1, 1), growth=8, width=16)
  dtype = jnp.dtype(jnp.float32)
  return list(densenet.make_layers(spec, dtype)), dtype


def test_every_published_network_is_there():
  """torchvision's, and the four small ones that they are compared with."""
  small = {"cbr_larget", "cbr_largew", "cbr_small", "cbr_tiny"}
  assert set(zoo.list_models()) == set(PUBLISHED) | small
  assert zoo.list_models() == sorted(zoo.list_models())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_costs_are_the_published_ones(name):
  params, macs = PUBLISHED[name]
  last = zoo.list_layers(name)[-1]
  head = last.channels * 1000
  assert parameters(zoo.build(name, num_classes=1000)) == params
  assert last.params + head + 1000 == params
  # Published to three digits after the point.
  assert (last.macs + head) / 1e9 == pytest.approx(macs, abs=0.0005001)


def test_resnet50_cut_after_layer3_has_8543296_parameters():
  """The trunk of CLAM's default encoder."""
  (layer,) = [x for x in zoo.list_layers("resnet50") if x.name == "layer3"]
  assert layer.params == parameters(zoo.build("resnet50", until="layer3"))
  assert (layer.params, layer.channels, layer.stride) == (8543296, 1024, 16)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      n, marks=() if n in ("resnet18", "resnet50") else [pytest.mark.slow]
    )
    for n in PUBLISHED
  ],
)
def test_every_cut_holds_what_it_lists_and_nothing_beyond(name):
  """Its tensors are the first of the whole network's, in order."""
  whole = list(tensors.shapes(zoo.build(name)).items())
  names = zoo.build(name).layer_names
  last = 0
  for layer in zoo.list_layers(name):
    cut = zoo.build(name, until=layer.name)
    shapes = list(tensors.shapes(cut).items())
    assert parameters(cut) == layer.params
    assert shapes == whole[: len(shapes)]
    assert cut.channels == layer.channels
    assert cut.layer_names == names[: len(cut.layer_names)]
    assert cut.layer_names[-1] == cut.resolve(layer.name)
    assert len(shapes) >= last
    last = len(shapes)
  assert last == len(whole)


@pytest.mark.parametrize(
  "name, at",
  [
    ("resnet18", ["stem", "layer1.0", "layer2", "layer3.1", "layer4"]),
    pytest.param(
      *("resnext50_32x4d", ["layer1.0", "layer2.0"]), marks=pytest.mark.slow
    ),
    (
      "densenet121",
      ["stem", "denseblock1.denselayer2", "denseblock1", "transition1"],
    ),
  ],
)
def test_a_cut_network_gives_the_tap_of_the_whole(name, at):
  """Bit for bit: op by op, both do the same work."""
  found = drawn(name).taps(images(), at)
  maps = drawn(name).taps(images(), at, pool=False)
  for layer in zoo.list_layers(name):
    if layer.name in at:
      cut = drawn(name, until=layer.name)
      np.testing.assert_array_equal(cut(images()), found[layer.name])
      pooled = np.asarray(maps[layer.name], float).mean((1, 2))
      np.testing.assert_allclose(found[layer.name], pooled, atol=1e-5)
      assert found[layer.name].shape == (2, layer.channels)


def products(function, *args):
  """Counts convolutions and matrix products in a function's jaxpr."""

  def inside(value):
    if isinstance(value, (list, tuple)):
      return sum(map(inside, value))
    value = getattr(value, "jaxpr", value)
    return count(value) if hasattr(value, "eqns") else 0

  def count(jaxpr):
    return sum(
      (equation.primitive.name in ("conv_general_dilated", "dot_general"))
      + inside(list(equation.params.values()))
      for equation in jaxpr.eqns
    )

  return inside(jax.make_jaxpr(function)(*args))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_all_taps_come_from_one_pass(name):
  """As many products as the plain forward has; a shallow tap needs fewer."""
  model = drawn(name)
  x = images(1)
  taps = [layer.name for layer in zoo.list_layers(name)]
  whole = products(model, x)
  shapes = tensors.shapes(model).values()
  assert whole >= sum(len(shape) == 4 for shape in shapes)
  assert products(lambda x: model.taps(x, taps), x) == whole
  shallow = taps[len(taps) // 2]
  # In any order asked, nothing beyond the deepest is traced.
  some = [shallow, "stem", taps[1]]
  own = products(drawn(name, until=shallow), x)
  assert products(lambda x: model.taps(x, some), x) == own < whole


@pytest.mark.parametrize(
  "name, alias, layer",
  [
    ("resnet18", "layer1", "layer1.1"),
    ("resnet152", "layer3", "layer3.35"),
    ("densenet121", "denseblock1", "denseblock1.denselayer6"),
  ],
)
def test_a_stage_is_its_last_layer(name, alias, layer):
  cut = zoo.build(name, until=alias)
  assert cut.layer_names == zoo.build(name, until=layer).layer_names
  listed = {x.name: x for x in zoo.list_layers(name)}
  assert listed[alias].params == listed[layer].params
  assert listed[alias].macs == listed[layer].macs


def test_taps_answer_under_the_names_and_in_the_order_asked():
  found = drawn("resnet18").taps(images(), ["layer1.1", "stem", "layer1"])
  assert list(found) == ["layer1.1", "stem", "layer1"]
  np.testing.assert_array_equal(found["layer1"], found["layer1.1"])


@pytest.mark.parametrize(
  "make, nearest",
  [
    (lambda: zoo.build("resnet5"), "did you mean 'resnet50'"),
    (lambda: zoo.build("resnet50", until="layr3"), "did you mean 'layer3'"),
    (lambda: zoo.list_layers("densnet121"), "did you mean 'densenet121'"),
    (lambda: zoo.build("resnet18", until=""), "no layer ''"),
    (lambda: zoo.build("cbr_tny"), "did you mean 'cbr_tiny'"),
    (
      lambda: zoo.build("resnet18", slim_after="layr3"),
      "did you mean 'layer3'",
    ),
    (lambda: zoo.build("resnet18", slim_after=""), "no layer ''"),
    (
      lambda: zoo.build("resnet18", slim_after="layer4"),
      "nothing after it in resnet18, which ends with layer4.1",
    ),
    (
      lambda: zoo.build("resnet18", until="layer2", slim_after="layer2.1"),
      "nothing after it in resnet18, which ends with layer2.1",
    ),
    (lambda: zoo.build("cbr_tiny", slim_after="block4"), "nothing after it"),
    (lambda: zoo.build("densenet121", slim_after="norm5"), "nothing after it"),
    (
      lambda: zoo.build("densenet121", until="layer3"),
      "densenet121 has no layer 'layer3' (its stages are stem, denseblock1,",
    ),
    (
      lambda: zoo.build("densenet121", slim_after="layer1.1"),
      "transition1, denseblock2, transition2, denseblock3, transition3,"
      " denseblock4, norm5; in them, layers such as denseblock1.denselayer1)",
    ),
    (
      lambda: zoo.select_taps("resnet18", "stem,denseblock1"),
      "'denseblock1' (its stages are stem, layer1, layer2, layer3, layer4; in",
    ),
    (lambda: zoo.build("cbr_tiny", until="layer1"), "(its stages are block1,"),
    (
      lambda: drawn("resnet18").taps(images(), ["layer1", "layr2"]),
      "did you mean 'layer2'",
    ),
    (
      lambda: drawn("resnet18", until="layer1.0").taps(images(), ["layer2.0"]),
      "resnet18 has no layer 'layer2.0'",
    ),
    (
      lambda: drawn("resnet18", until="layer1.0").taps(images(), ["layer1"]),
      "has no layer 'layer1'",
    ),
  ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(make, nearest):
  """In one line; a stage that was cut before its end is not there either."""
  with pytest.raises(errors.UsageError) as caught:
    make()
  assert nearest in str(caught.value)
  assert "\n" not in str(caught.value)


def test_only_the_whole_densenet_ends_in_a_relu():
  """norm5 as a tap or a cut is the module's output, negative values too.

  A network of one layer per block shows what the flag does.
  """
  assert zoo.build("densenet121").relu
  assert not zoo.build("densenet121", until="norm5").relu
  assert not zoo.build("densenet121", final_relu=False).relu
  assert not zoo.build("resnet18").relu
  layers, dtype = smallest()
  x = images()
  for relu in (True, False):
    small = network.Network(
      "small", densenet.FAMILY, layers, {}, relu, None, dtype
    )
    tensors.load(small, draw.tensors(tensors.shapes(small), 0))
    maps, features = jax.jit(
      lambda x, of=small: (of.taps(x, ["norm5"], pool=False)["norm5"], of(x))
    )(x)
    assert (maps < 0).any()
    expected = np.maximum(maps, 0 if relu else -np.inf).mean((1, 2))
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_images_too_small_for_a_densenet_are_refused():
  """Where torch refuses: 28 pixels become 14, 7, 3, 1, and then none."""
  layers, dtype = smallest()
  small = network.Network(
    "small", densenet.FAMILY, layers, {}, True, None, dtype
  )
  tensors.load(small, draw.tensors(tensors.shapes(small), 0))

  def shape(size):
    return jax.eval_shape(small, images(1, size)).shape

  assert shape(29) == (1, small.channels)
  with pytest.raises(errors.UsageError, match="1 x 1 pixels"):
    shape(28)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, until", [("resnet18", None), ("densenet121", "transition1")]
)
def test_bfloat16_stays_close_to_float32(name, until):
  """Within 2 % of each tap's largest feature; measured, 0.7 %.

  Parameters and statistics stay float32 through a training pass, or a running
  value would stop moving once its step is below 1/256 of it.
  """
  options = {"until": until, "num_classes": 10}
  model = ours.drawn(name, dtype=jnp.bfloat16, **options)
  exact = drawn(name, **options)
  x = images(2)
  taps = model.layer_names
  found = model.taps(x, taps, pool=False)
  assert {tap.dtype for tap in found.values()} == {jnp.dtype(jnp.bfloat16)}
  found, expected = model.taps(x, taps), exact.taps(x, taps)
  assert {tap.dtype for tap in found.values()} == {jnp.dtype(jnp.float32)}
  for tap, value in expected.items():
    value = np.asarray(value)
    error = np.abs(np.asarray(found[tap]) - value).max()
    assert error < 0.02 * np.abs(value).max(), tap
  logits = model(x, train=True)
  assert logits.dtype == jnp.float32
  kinds = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
  assert kinds == {jnp.dtype(jnp.float32)}


def test_resnet50_slim_after_layer3_has_the_published_size():
  """TransFusion's hybrid in the table of Peng et al.: 12.9 million."""
  params, macs = zoo.count(zoo.build("resnet50", slim_after="layer3"))
  # layer4 in halves: its first block, and two more; kernels, then BatchNorm.
  first = 1024 * 256 + 9 * 256**2 + 256 * 1024 + 1024 * 1024
  other = 1024 * 256 + 9 * 256**2 + 256 * 1024
  norms = 2 * (3 * (256 + 256 + 1024) + 1024)
  assert params == 8543296 + first + 2 * other + norms == 12945472
  # In that table 4.12 and 3.56, which count more than the products.
  full = zoo.count(zoo.build("resnet50"))[1]
  assert (full - macs) / 1e9 == pytest.approx(4.12 - 3.56, abs=0.01)


HYBRIDS = [
  ("resnet18", "stem"),
  ("resnet50", "layer3.2"),
  ("densenet121", "transition2"),
  ("cbr_largew", "block2"),
  *(
    pytest.param(*hybrid, marks=pytest.mark.slow)
    for hybrid in (
      ("resnet18", "layer2"),
      ("resnext50_32x4d", "layer2.1"),
      ("wide_resnet50_2", "layer3"),
      ("densenet121", "stem"),
      ("densenet161", "denseblock3.denselayer5"),
    )
  ),
]


@pytest.mark.parametrize("name, slim_after", HYBRIDS)
def test_a_hybrid_is_the_whole_below_and_half_as_wide_above(name, slim_after):
  """Its layers keep their names; each makes half of what it made."""
  whole = zoo.build(name)
  hybrid = zoo.build(name, slim_after=slim_after)
  assert hybrid.layer_names == whole.layer_names
  assert hybrid.slim_after == whole.resolve(slim_after)
  below = tensors.shapes(zoo.build(name, until=slim_after))
  expected, found = tensors.shapes(whole), tensors.shapes(hybrid)
  assert list(found.items())[: len(below)] == list(below.items())
  for tensor in set(found).difference(below):
    new = found[tensor]
    if tensor not in expected:
      # Beside the identity of a block whose input is of full width.
      assert ".downsample." in tensor
    elif len(new) == 4 and "transition" not in tensor:
      assert new[0] * 2 == expected[tensor][0], tensor
      assert new[2:] == expected[tensor][2:], tensor
  assert zoo.count(hybrid)[0] == parameters(hybrid) < parameters(whole)
  macs = zoo.count(whole)[1], zoo.count(hybrid)[1]
  assert zoo.count(zoo.build(name, until=slim_after))[1] < macs[1] < macs[0]
  # What a layer hands on is what the next one takes, to the head.
  graph, state = nnx.split(hybrid)
  features = jax.eval_shape(
    lambda state, x_NHWC: nnx.merge(graph, state)(x_NHWC), state, images(1, 64)
  )
  assert features.shape == (1, hybrid.channels)


@pytest.mark.parametrize(
  "name, slim_after", [("resnet18", "layer2.0"), ("resnet18", "layer3.0")]
)
def test_a_width_that_changes_inside_a_stage_gets_a_shortcut(name, slim_after):
  """Of stride one, in the first slim block alone."""
  stage = slim_after.removesuffix(".0")
  hybrid = tensors.shapes(zoo.build(name, slim_after=slim_after))
  new = set(hybrid).difference(tensors.shapes(zoo.build(name)))
  assert {n.split(".downsample")[0] for n in new} == {f"{stage}.1"}
  width = {"layer2": 128, "layer3": 256}[stage]
  shape = hybrid[f"{stage}.1.downsample.0.weight"]
  assert shape == (width // 2, width, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, slim_after, until",
  [
    ("resnet18", "layer1.0", "layer2"),
    ("densenet121", "denseblock1.denselayer4", "transition1"),
  ],
)
def test_a_hybrid_runs_compiled_in_training_and_in_bfloat16(
  name, slim_after, until
):
  """And gives below the change, bit for bit, what the whole network gives."""
  options = {"slim_after": slim_after, "until": until, "num_classes": 3}
  model = drawn(name, **options)
  x = images()
  found = model.taps(x, [slim_after])[slim_after]
  expected = drawn(name, until=until).taps(x, [slim_after])[slim_after]
  np.testing.assert_array_equal(found, expected)
  graph, state = nnx.split(model)

  @functools.partial(jax.jit, static_argnums=2)
  def forward(state, x_NHWC, train):
    return nnx.merge(graph, state)(x_NHWC, train=train)

  expected = np.asarray(model(x))
  np.testing.assert_allclose(forward(state, x, False), expected, atol=1e-4)
  half = zoo.build(name, dtype=jnp.bfloat16, **options)
  tensors.load(half, tensors.dump(model))
  half = jax.jit(half)(x)
  assert half.dtype == jnp.float32
  scale = np.abs(expected).max()
  np.testing.assert_allclose(half, expected, atol=0.05 * scale)
  logits = forward(state, x, True)
  parts = jax.vmap(
    lambda part: forward(state, part[None], "data"), axis_name="data"
  )(x)
  np.testing.assert_allclose(parts[:, 0], logits, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "cbr_small"])
def test_counts_are_those_of_the_last_layer_and_leave_out_the_head(name):
  """At any size of image, with values or without."""
  last = zoo.list_layers(name, 96)[-1]
  for classes in (None, 7):
    model = zoo.build(name, num_classes=classes)
    assert zoo.count(model, 96) == (last.params, last.macs)
  matrix = 7 * last.channels
  whole = last.params + matrix + 7, last.macs + matrix
  assert zoo.count(model, 96, head=True) == whole
  assert zoo.count(drawn(name), 96) == (last.params, last.macs)


def test_a_network_is_built_without_values():
  """So nothing is allocated for a network that is only asked about."""
  leaves = jax.tree.leaves(nnx.state(zoo.build("wide_resnet50_2")))
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
