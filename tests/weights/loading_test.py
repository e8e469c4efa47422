"""Networks with numbers in them, exactly those of the file or none."""

import functools
import hashlib
import json
import os
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from jaxtransfer import errors
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.weights import catalog, loading
from tests.weights import torchzip

# Most files here are nobody's: what is assumed of them has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*assumed:UserWarning")

SMALL = {
  "resnet18": "layer1",
  "densenet121": "denseblock1.denselayer2",
  "cbr_tiny": "block3",
}
HYBRIDS = [
  ("resnet18", "layer1.0", "layer2"),
  ("densenet121", "denseblock1.denselayer2", "transition1"),
  ("cbr_tiny", "block1", None),
]


def drawn(network, until, seed=7, **options):
  """Numbers that no initialiser gives, statistics included."""
  rng = np.random.default_rng(seed)
  shapes = tensors.shapes(zoo.build(network, until=until, **options))
  return {
    name: rng.uniform(0.5, 1.5, shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def same(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == np.float32
    assert found[name].tobytes() == value.tobytes(), name


def refuses(*words, **options):
  with pytest.raises(errors.UsageError) as caught:
    loading.create_model(**options)
  assert "\n" not in str(caught.value)
  for word in words:
    assert str(word) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("network, until", SMALL.items())
def test_every_format_gives_the_same_numbers(tmp_path, network, until):
  values = drawn(network, until)
  save_file(values, tmp_path / "m.safetensors")
  torchzip.save(tmp_path / "m.pth", values)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "orbax", values)
  for name in ("m.safetensors", "m.pth", "orbax"):
    model = loading.create_model(network, until, weights=tmp_path / name)
    same(tensors.dump(model), values)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
  values = {k: v.astype(dtype) for k, v in drawn("resnet18", "stem").items()}
  save_file(values, tmp_path / "m.safetensors")
  model = loading.create_model(
    "resnet18", "stem", weights=str(tmp_path / "m.safetensors")
  )
  same(
    tensors.dump(model), {k: v.astype(np.float32) for k, v in values.items()}
  )


@pytest.mark.parametrize("network, until", SMALL.items())
def test_export_round_trip_is_bit_exact(tmp_path, network, until):
  """Out under torchvision's names, back in, header and head included."""
  values = drawn(network, until, num_classes=3)
  model = zoo.build(network, until=until, num_classes=3)
  tensors.load(model, values)
  path = tmp_path / "export" / "model.safetensors"
  details = {"mean": [0.5, 0.6, 0.7], "std": [0.1, 0.2, 0.3], "licence": "mine"}
  loading.export(model, path, details)
  source = loading.resolve_weights(network, path)
  assert source.mean == (0.5, 0.6, 0.7) and source.std == (0.1, 0.2, 0.3)
  assert source.licence == "mine" and source.label == "model.safetensors"
  assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  about = json.loads(path.with_suffix(".json").read_text())
  assert about["network"] == network and about["licence"] == "mine"
  again = loading.create_model(network, until, weights=source)
  head = zoo.family(network).head_names
  trunk = {k: v for k, v in values.items() if k not in head}
  same(tensors.dump(again), trunk)
  tensors.load(model, {**values, **tensors.dump(again)})
  loading.export(model, tmp_path / "again.safetensors", details)
  assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
  with pytest.raises(errors.UsageError, match=f"holds {network}, not resnet34"):
    loading.resolve_weights("resnet34", path)


def test_nothing_is_left_of_a_failed_export(tmp_path):
  model = loading.create_model("resnet18", "stem")
  with pytest.raises(ValueError):
    loading.export(model, tmp_path / "m.safetensors", {"mean": float("nan")})
  assert list(tmp_path.iterdir()) == []


def test_heads(tmp_path):
  """Kept: the file's own. Asked for by width: fresh and random. Else: none."""
  values = drawn("resnet18", None, num_classes=5)
  path = tmp_path / "m.safetensors"
  save_file(values, path)
  kept = loading.create_model("resnet18", keep_head=True, weights=path)
  same(tensors.dump(kept), values)
  fresh = loading.create_model("resnet18", num_classes=5, weights=path, seed=3)
  found = tensors.dump(fresh)
  random = tensors.dump(loading.create_model("resnet18", num_classes=5, seed=3))
  for name in ("fc.weight", "fc.bias"):
    assert np.array_equal(found[name], random[name])
    assert not np.array_equal(found[name], values[name])
  same(
    {k: v for k, v in found.items() if not k.startswith("fc.")},
    {k: v for k, v in values.items() if not k.startswith("fc.")},
  )
  bare = loading.create_model("resnet18", weights=path)
  assert bare.head is None
  values["fc.weight"] = np.zeros((5, 100), np.float32)
  save_file(values, path)
  refuses("head", "(5, 100)", name="resnet18", keep_head=True, weights=path)


def test_random_weights():
  """None and "random" are the family's initialiser, decided by the seed."""
  first, again, other = (
    tensors.dump(loading.create_model("resnet18", "stem", weights=w, seed=s))
    for w, s in ((None, 0), ("random", 0), (None, 1))
  )
  same(first, again)
  assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])
  source = loading.resolve_weights("resnet18", None)
  assert source.label == "random" and source.path is None


@pytest.mark.parametrize("network, slim_after, until", HYBRIDS)
def test_a_hybrid_begins_with_the_files_numbers(
  tmp_path, network, slim_after, until
):
  """The rest is the initialiser's, and the file's rest is never read."""
  below = drawn(network, slim_after)
  whole = tmp_path / "whole.safetensors"
  cut = tmp_path / "cut.safetensors"
  save_file(drawn(network, until), whole)
  save_file(below, cut)
  options = {"num_classes": 3, "slim_after": slim_after, "seed": 5}
  random = tensors.dump(loading.create_model(network, until, **options))
  assert any(not np.array_equal(random[name], below[name]) for name in below)
  for path in (whole, cut):
    hybrid = loading.create_model(network, until, weights=path, **options)
    found = tensors.dump(hybrid)
    same({name: found[name] for name in below}, drawn(network, slim_after))
    same(found, {**random, **{name: found[name] for name in below}})
    assert hybrid.slim_after == zoo.build(network).resolve(slim_after)


@pytest.mark.parametrize("network, slim_after, until", HYBRIDS)
def test_an_exported_hybrid_comes_back_by_itself(
  tmp_path, network, slim_after, until
):
  """Its header says where it is narrow; asked again, its numbers would go."""
  path = tmp_path / "m.safetensors"
  model = loading.create_model(
    network, until, num_classes=3, slim_after=slim_after, seed=2
  )
  loading.export(model, path)
  again = loading.create_model(network, until, weights=path, keep_head=True)
  same(tensors.dump(again), tensors.dump(model))
  assert again.slim_after == model.slim_after
  bare = loading.create_model(network, until, weights=path, num_classes=2)
  assert zoo.count(bare) == zoo.count(model)
  loading.export(again, tmp_path / "again.safetensors")
  assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
  refuses(
    f"{path} holds a network of half width after {model.slim_after}",
    "drop slim_after",
    name=network,
    until=until,
    weights=path,
    slim_after=slim_after,
  )


def test_a_header_that_names_no_layer_is_refused(tmp_path):
  for layer in (3, "layer9", ""):
    details = {"slim_after": layer}
    path = tmp_path / "m.safetensors"
    loading.export(loading.create_model("resnet18", "stem"), path, details)
    refuses(path, repr(layer), name="resnet18", until="stem", weights=path)


def test_a_cbr_network_goes_out_and_comes_back(tmp_path):
  """With its head; and as it has no published weights, says so."""
  model = loading.create_model("cbr_tiny", num_classes=3)
  path = tmp_path / "m.safetensors"
  loading.export(model, path)
  again = loading.create_model("cbr_tiny", weights=path, keep_head=True)
  same(tensors.dump(again), tensors.dump(model))
  assert tensors.shapes(again)["fc.weight"] == (3, 256)
  refuses(
    "none are published for cbr_tiny", name="cbr_tiny", weights="imagenet"
  )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_where_kept(tmp_path, bad):
  values = drawn("resnet18", "layer2")
  values["layer2.0.bn1.running_var"][3] = bad
  path = torchzip.save(tmp_path / "m.pth", values)
  refuses(
    path,
    "layer2.0.bn1.running_var holds 1 NaN or infinite numbers of 128",
    name="resnet18",
    until="layer2",
    weights=path,
  )
  assert loading.create_model("resnet18", "layer1", weights=path)


def test_overflow_to_float32_is_refused(tmp_path):
  values = {
    k: v.astype(np.float64) for k, v in drawn("resnet18", "stem").items()
  }
  values["bn1.bias"][0] = 1e300
  save_file(values, tmp_path / "m.safetensors")
  refuses(
    "bn1.bias",
    name="resnet18",
    until="stem",
    weights=tmp_path / "m.safetensors",
  )


def test_integers_are_refused(tmp_path):
  values = dict(drawn("resnet18", "stem"))
  values["bn1.bias"] = np.zeros(64, np.int8)
  save_file(values, tmp_path / "m.safetensors")
  refuses(
    "bn1.bias is int8",
    name="resnet18",
    until="stem",
    weights=tmp_path / "m.safetensors",
  )


def test_a_cut_never_reads_what_lies_beyond(tmp_path):
  """A wrong checksum beyond the cut is not met, one before it is."""
  values = drawn("resnet18", "layer2")
  path = torchzip.save(tmp_path / "m.pth", values)
  whole = bytearray(path.read_bytes())
  whole[whole.index(values["layer2.0.conv1.weight"].tobytes())] ^= 1
  path.write_bytes(whole)
  assert loading.create_model("resnet18", "layer1", weights=path)
  refuses("wrong checksum", name="resnet18", until="layer2", weights=path)


def test_a_file_that_does_not_fit_names_itself(tmp_path):
  path = torchzip.save(tmp_path / "m.pth", drawn("resnet18", "stem"))
  refuses(path, "does not fit resnet34", name="resnet34", weights=path)


@pytest.mark.parametrize(
  "options, word",
  [
    ({"keep_head": True}, "random weights have none"),
    ({"keep_head": True, "num_classes": 3}, "drop num_classes"),
    ({"keep_head": True, "until": "layer1"}, "until"),
    ({"num_classes": 0}, "at least 1"),
    ({"keep_head": True, "slim_after": "layer1"}, "drop one of them"),
    ({"slim_after": "layer4"}, "nothing after it"),
    ({"slim_after": ""}, "no layer ''"),
    ({"slim_after": "layer2", "until": "layer1"}, "nothing after it"),
    ({"until": "layer9"}, "layer9"),
    ({"weights": "none.pth"}, "none.pth cannot be read"),
    ({"weights": "some/where"}, "cannot be read"),
    ({"weights": ""}, "no weights ''"),
    ({"weights": "imagenett"}, "imagenet"),
    ({"weights": "retccl"}, "not of resnet18"),
    ({"weights": "retccl=x.pth"}, "not of resnet18"),
  ],
)
def test_contradictions_are_named(options, word):
  refuses(word, **{"name": "resnet18", **options})


def test_unknown_network_is_named_before_its_weights():
  refuses("no network 'resnet5'", name="resnet5", weights="none.pth")


def test_a_directory_that_is_no_checkpoint(tmp_path):
  refuses("_METADATA", name="resnet18", weights=tmp_path)


def test_a_file_of_ones_own_under_a_catalog_name(tmp_path):
  """`kimianet=path`: the file's numbers, the catalog's knowledge of them."""
  path = tmp_path / "kimianet.pth"
  values = {
    name.replace("features.", "module.model.0."): value
    for name, value in drawn("densenet121", "denseblock1").items()
  }
  torchzip.save(path, values)
  source = loading.resolve_weights("densenet121", f"kimianet={path}")
  assert source.label == "kimianet" and source.path == path
  assert not source.final_relu and source.notes == ()
  model = loading.create_model("densenet121", "denseblock1", weights=source)
  same(
    {
      k.replace("features.", "module.model.0."): v
      for k, v in tensors.dump(model).items()
    },
    values,
  )
  with pytest.raises(errors.UsageError, match="published with 931956f3"):
    loading.resolve_weights("resnet50", f"retccl={path}")


def test_without_the_final_relu_features_can_be_negative():
  """What KimiaNet's rows say reaches the network that is built."""
  with_relu = loading.Source("random", final_relu=True)
  without = loading.Source("random", final_relu=False)
  assert loading.create_model("densenet121", weights=with_relu).relu
  assert not loading.create_model("densenet121", weights=without).relu


def test_embedded_weights(tmp_path):
  """Shipped, and found by name; half precision kept them close to float32."""
  source = loading.resolve_weights("resnet18", "cifar10-resnet18")
  assert source.path == catalog.resolve("cifar10-resnet18")
  values = loading.read_weights(source, "resnet18", until="layer3")
  assert all(np.isfinite(v).all() for v in values.values())
  assert values["conv1.weight"].std() > 0.05
  refuses("layer4", name="resnet18", weights=source)
  assert loading.resolve_weights("resnet18", source.path).mean == source.mean


def test_embedded_weights_are_the_whole_networks(shared):
  """Rounded to half precision from the network that the card describes."""
  path = shared / "weights" / "resnet18_cifar10.safetensors"
  source = loading.resolve_weights("resnet18", path)
  exact = loading.read_weights(source, "resnet18", until="layer3")
  source = loading.resolve_weights("resnet18", "cifar10-resnet18")
  kept = loading.read_weights(source, "resnet18", until="layer3")
  for name, value in exact.items():
    rounded = value.astype(np.float16) if value.ndim == 4 else value
    np.testing.assert_array_equal(kept[name], rounded.astype(np.float32))


def test_weights_of_a_cut_network_say_where_they_end():
  """The network in the package ends at layer3."""
  with pytest.raises(errors.UsageError, match="until=layer3.1"):
    loading.create_model("resnet18", weights="cifar10-resnet18")


STEM = "stem_reference.npz"


def stem_of(shared, model, reference):
  """Our output for the reference's images, and torch's."""
  with np.load(shared / "cases" / "weights" / reference) as case:
    return np.asarray(model(jnp.asarray(case["x"]))), case["stem"]


@pytest.mark.parametrize(
  "file, left_out",
  [
    ("plain.pth", None),
    ("pos_weight.ckpt", "state_dict/criterion.pos_weight"),
    ("mocov3.pth.tar", "module.momentum_encoder.* (5 tensors)"),
    ("numbered_children.pt", None),
    ("hparams_partial.ckpt", None),
  ],
)
def test_peoples_own_files_give_torchs_output(shared, file, left_out):
  """Five ways to keep the same numbers; what stands beside them is told."""
  path = shared / "cases" / "weights" / file
  with pytest.warns(UserWarning) as told:
    model = loading.create_model("resnet18", "stem", weights=path)
  found, expected = stem_of(shared, model, STEM)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  messages = [str(one.message) for one in told]
  assert all("\n" not in message and file in message for message in messages)
  assert sum("assumed" in message for message in messages) == 1
  found = [message for message in messages if "left out" in message]
  assert [left_out in message for message in found] == [True] * bool(left_out)


def test_the_momentum_encoder_is_taken_where_the_key_says_so(shared):
  path = shared / "cases" / "weights" / "mocov3.pth.tar"
  source = loading.resolve_weights(
    "resnet18", path, "state_dict/module.momentum_encoder."
  )
  query = loading.resolve_weights("resnet18", path)
  found = loading.read_weights(source, "resnet18", until="stem")
  of_query = loading.read_weights(query, "resnet18", until="stem")
  for name, value in found.items():
    np.testing.assert_array_equal(value, of_query[name] / 2)


def test_a_whole_pickled_model_is_refused_by_the_way_out(shared):
  refuses(
    "a whole pickled model; save model.state_dict()",
    "__main__.TumourNet",
    name="resnet18",
    until="stem",
    weights=shared / "cases" / "weights" / "whole_own_class.pth",
  )


def test_anti_aliasing_cannot_be_seen_and_is_told(shared, tmp_path):
  """Its numbers are read as a ResNet-50's, whose output is another; where a
  config beside it says what it is, it is refused."""
  path = shared / "cases" / "weights" / "resnetaa50.pth"
  with pytest.warns(UserWarning, match="no anti-aliasing") as told:
    model = loading.create_model("resnet50", "stem", weights=path)
  assert len(told) == 1
  found, expected = stem_of(shared, model, "resnetaa50.npz")
  assert np.abs(found - expected).max() > 1
  (tmp_path / "model.pth").write_bytes(path.read_bytes())
  (tmp_path / "config.json").write_text('{"architecture": "resnetaa50"}')
  for weights in (tmp_path, tmp_path / "model.pth"):
    refuses("resnetaa50", name="resnet50", until="stem", weights=weights)


def test_a_files_own_words_refuse_it(tmp_path):
  """In a safetensors header and in a training's checkpoint."""
  values = drawn("resnet18", "stem")
  save_file(values, tmp_path / "m.safetensors", {"architecture": "resnetaa50"})
  tree = {"arch": "resnet18d", "state_dict": values}
  torchzip.save(tmp_path / "m.pth", tree)
  for file, name in (("m.safetensors", "resnetaa50"), ("m.pth", "resnet18d")):
    refuses(name, name="resnet18", until="stem", weights=tmp_path / file)
  torchzip.save(tmp_path / "m.pth", {**tree, "arch": "resnet18"})
  assert loading.create_model("resnet18", "stem", weights=tmp_path / "m.pth")


def notes(*arguments):
  return loading.resolve_weights(*arguments).notes


def test_what_is_known_needs_no_note(tmp_path):
  """Our own export, the catalog's rows, and a config that names the network."""
  model = loading.create_model("resnet18", "stem", num_classes=2)
  loading.export(model, tmp_path / "ours.safetensors", {"mean": [0.5] * 3})
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    loading.create_model(
      "resnet18", "stem", weights=tmp_path / "ours.safetensors"
    )
    loading.create_model("resnet18", "stem", weights="cifar10-resnet18")
  folder = tmp_path / "hub"
  folder.mkdir()
  save_file(drawn("resnet18", "stem"), folder / "model.safetensors")
  (first,) = notes("resnet18", folder)
  assert "hub: " in first and "anti-aliasing" in first and "mean" in first
  statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
  config = {"architecture": "resnet18", "pretrained_cfg": statistics}
  (folder / "config.json").write_text(json.dumps(config))
  source = loading.resolve_weights("resnet18", folder)
  assert source.notes == () and source.label == "hub"
  assert source.mean == (0.1, 0.2, 0.3) and source.std == (0.4, 0.5, 0.6)
  config["pretrained_cfg"]["mean"] = "grey"
  (folder / "config.json").write_text(json.dumps(config))
  refuses("mean", "three numbers", name="resnet18", weights=folder)


def test_shards_are_read_as_one_file(tmp_path):
  """With a digest of all of them."""
  values = drawn("resnet18", "layer1")
  names = sorted(values)
  parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
  for file, held in parts.items():
    save_file({name: values[name] for name in held}, tmp_path / file)
  weight_map = {name: file for file, held in parts.items() for name in held}
  (tmp_path / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": weight_map})
  )
  source = loading.resolve_weights("resnet18", tmp_path)
  same(tensors.dump(loading.create_model("resnet18", "layer1", weights=source)),
       values)  # fmt: skip
  values["bn1.bias"][0] += 1
  held = parts["a.safetensors"]
  save_file({name: values[name] for name in held}, tmp_path / "a.safetensors")
  again = loading.resolve_weights("resnet18", tmp_path)
  assert len(source.sha256) == 64 and again.sha256 != source.sha256
  (tmp_path / "b.safetensors").unlink()
  refuses("b.safetensors", "cannot be read", name="resnet18", weights=tmp_path)


class Harmful:
  """Pickles to a call."""

  def __init__(self, marker):
    self._marker = str(marker)

  def __reduce__(self):
    return os.mkdir, (self._marker,)


def test_only_a_kept_tensor_must_be_one(tmp_path):
  """A training's objects beside the network are nobody's business; nor are
  those beyond the cut."""
  values = drawn("resnet18", "layer1")
  harmful = Harmful(tmp_path / "marker")
  tree = {
    "hyper_parameters": {"optimiser": functools.partial(dict, rate=0.1)},
    "callbacks": harmful,
    "state_dict": {f"net.{name}": value for name, value in values.items()},
  }
  path = torchzip.save(tmp_path / "m.ckpt", tree)
  model = loading.create_model("resnet18", "layer1", weights=path)
  same(tensors.dump(model), values)
  tree["state_dict"]["net.layer1.0.bn1.bias"] = harmful
  torchzip.save(path, tree)
  assert loading.create_model("resnet18", "stem", weights=path)
  options = {"name": "resnet18", "weights": path}
  refuses(
    "net.layer1.0.bn1.bias", "posix.mkdir", "never run",
    until="layer1", **options,
  )  # fmt: skip
  del tree["state_dict"]
  tree |= {"optimizer": {"state": np.zeros(3)}}
  torchzip.save(path, tree)
  refuses("no conv1.weight", "never run", **options)
  assert not (tmp_path / "marker").exists()


def test_two_networks_and_the_key_that_chooses(tmp_path):
  one, other = drawn("resnet18", "stem", 1), drawn("resnet18", "stem", 2)
  tree = {
    "student": {f"module.{name}": value for name, value in one.items()},
    "teacher": dict(other),
  }
  path = torchzip.save(tmp_path / "dino.pth", tree)
  options = {"name": "resnet18", "until": "stem", "weights": path}
  refuses("student/module.*", "teacher/*", "config.network.prefix", **options)
  refuses("'teachers'", "teacher/", prefix="teachers", **options)
  for prefix, expected in (("student/module.", one), ("teacher/", other)):
    with pytest.warns(UserWarning, match="left out"):
      model = loading.create_model(prefix=prefix, **options)
    same(tensors.dump(model), expected)
  refuses("random weights", name="resnet18", prefix="teacher/")
  source = loading.resolve_weights("resnet18", path, "teacher/")
  refuses("its own", name="resnet18", weights=source, prefix="teacher/")


def test_the_same_numbers_twice_are_one_network(tmp_path):
  """Two names of one module, as an extractor beside its network has."""
  values = drawn("resnet18", "stem")
  again = {
    n.replace("conv1", "0").replace("bn1", "1"): v for n, v in values.items()
  }
  tree = {
    **{f"model.{name}": value for name, value in values.items()},
    **{f"extractor.{name}": value for name, value in again.items()},
  }
  path = torchzip.save(tmp_path / "m.pth", tree)
  with pytest.warns(UserWarning, match="under model. is read; left out: extr"):
    model = loading.create_model("resnet18", "stem", weights=path)
  same(tensors.dump(model), values)
  tree["extractor.1.bias"] = tree["extractor.1.bias"] + 1
  torchzip.save(path, tree)
  refuses("two networks", name="resnet18", until="stem", weights=path)


def test_numbered_children_of_another_order_are_told(tmp_path):
  values = drawn("resnet18", "layer1")
  place = {"conv1": "0", "bn1": "1", "layer1": "3"}
  path = torchzip.save(
    tmp_path / "m.pth",
    {place[n.split(".")[0]] + n[n.index(".") :]: v for n, v in values.items()},
  )
  with pytest.warns(UserWarning, match="children 0, 1, 3, .*would be 0, 1, 4"):
    model = loading.create_model("resnet18", "layer1", weights=path)
  same(tensors.dump(model), values)
