"""Every published layout, by its names and shapes, and what must not fit."""

import functools
import re

import pytest

from jaxtransfer import errors
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.weights import keymaps


@functools.cache
def trunk(network, until=None):
  return tensors.shapes(zoo.build(network, until=until))


@functools.cache
def whole(network, classes=1000):
  """What torch saves: trunk, head and the counters of every BatchNorm."""
  shapes = tensors.shapes(zoo.build(network, num_classes=classes))
  counters = {
    name.replace("running_mean", "num_batches_tracked"): ()
    for name in shapes
    if name.endswith("running_mean")
  }
  return {**shapes, **counters}


def match(names, network, until=None, keep_head=False):
  family = zoo.family(network)
  return keymaps.to_torchvision(
    names,
    family=family,
    network=network,
    wanted=trunk(network, until),
    trunk=trunk(network),
    head=tensors.head_names(family) if keep_head else None,
  )


def prefixed(prefix, names):
  return {f"{prefix}{name}": shape for name, shape in names.items()}


def refuses(names, network, *words, **options):
  with pytest.raises(errors.UsageError) as caught:
    match(names, network, **options)
  assert "\n" not in str(caught.value)
  for word in words:
    assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("network", zoo.list_models())
@pytest.mark.parametrize(
  "prefix",
  ["", "state_dict/", "model/module.", "backbone.", "encoder.", "a.b/c.d."],
)
def test_containers_and_prefixes_are_found(network, prefix):
  """torchvision's and timm's names, wherever they stand; the head follows."""
  names = prefixed(prefix, whole(network))
  found = match(names, network, keep_head=True)
  head = tensors.head_names(zoo.family(network))
  assert found == {n: f"{prefix}{n}" for n in [*trunk(network), *head]}
  assert match(names, network).keys() == trunk(network).keys()


@pytest.mark.parametrize(
  "network, until",
  [
    ("resnet18", "stem"),
    ("resnet50", "layer3"),
    ("densenet121", "denseblock2.denselayer3"),
    ("cbr_larget", "block2"),
  ],
)
def test_a_cut_reads_only_what_is_kept(network, until):
  """Of the whole file and of a file that holds no more than the cut."""
  for names in (whole(network), trunk(network, until)):
    found = match(names, network, until=until)
    assert found.keys() == trunk(network, until).keys()


def old_dense_name(name):
  return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name)


def test_old_densenet_names():
  """torchvision's own files still say `denselayer1.norm.1`."""
  names = {old_dense_name(n): s for n, s in whole("densenet121").items()}
  assert "features.denseblock1.denselayer1.norm.1.weight" in names
  found = match(names, "densenet121", keep_head=True)
  assert all(found[n] == old_dense_name(n) for n in found)


def kimianet():
  """DataParallel(fully_connected(Sequential(features, pool), fc_4))."""
  names = {
    name.replace("features.", "module.model.0."): shape
    for name, shape in whole("densenet121").items()
    if not name.startswith("classifier")
  }
  return {**names, "module.fc_4.weight": (30, 1024), "module.fc_4.bias": (30,)}


def test_kimianet():
  found = match(kimianet(), "densenet121", keep_head=True)
  assert found["features.norm5.bias"] == "module.model.0.norm5.bias"
  assert found["classifier.weight"] == "module.fc_4.weight"
  dropped = match(kimianet(), "densenet121")
  assert dropped.keys() == trunk("densenet121").keys()


@pytest.mark.parametrize("prefix", ["model.resnet.", "resnet.", "model."])
def test_ciga(prefix):
  """Lightning around a ResNet whose fc is SimCLR's projection."""
  names = {n: s for n, s in whole("resnet18").items() if "fc." not in n}
  names |= {"fc.1.weight": (512, 512), "fc.1.bias": (512,)}
  names |= {"fc.3.weight": (128, 512), "fc.3.bias": (128,)}
  names = prefixed(f"state_dict/{prefix}", names)
  names["optimizer_states/0/state/0/exp_avg"] = (64, 3, 7, 7)
  assert match(names, "resnet18")["conv1.weight"] == (
    f"state_dict/{prefix}conv1.weight"
  )
  refuses(names, "resnet18", "2 missing", "fc.weight", keep_head=True)


def test_no_head_as_retccl_and_lunit():
  names = trunk("resnet50")
  assert match(names, "resnet50") == {n: n for n in names}
  refuses(names, "resnet50", "2 missing", "fc.weight", keep_head=True)


@pytest.mark.parametrize("network", ["resnet50", "densenet121"])
def test_mtdp(network):
  """A shared `features.` with its own unused classifier, and many heads."""
  names = prefixed("features.", whole(network))
  names |= {"heads.crc.fc.weight": (8, 2048), "heads.crc.fc.bias": (8,)}
  found = match(names, network)
  assert found == {n: f"features.{n}" for n in trunk(network)}


def test_self_supervised_training_files():
  """MoCo evaluates its query encoder; queues and projections are dropped."""
  plain = {n: s for n, s in trunk("resnet50").items()}
  moco = {
    **prefixed("state_dict/module.encoder_q.", plain),
    **prefixed("state_dict/module.encoder_k.", plain),
    "state_dict/module.encoder_q.fc.0.weight": (2048, 2048),
    "state_dict/module.queue": (128, 65536),
    "state_dict/module.queue_ptr": (1,),
  }
  found = match(moco, "resnet50")
  assert found["conv1.weight"] == "state_dict/module.encoder_q.conv1.weight"
  barlow = {
    **prefixed("model/module.backbone.", plain),
    "model/module.projector.0.weight": (8192, 2048),
    "model/module.bn.running_mean": (8192,),
  }
  assert match(barlow, "resnet50").keys() == plain.keys()
  swav = {
    **prefixed("module.", plain),
    "module.projection_head.0.weight": (2048, 2048),
    "module.prototypes.weight": (3000, 128),
  }
  assert match(swav, "resnet50").keys() == plain.keys()


def hugging_face_name(name):
  """The inverse map, written from transformers' module tree."""
  kinds = {"conv": "convolution", "bn": "normalization"}
  if name.startswith("fc."):
    return name.replace("fc.", "classifier.1.")
  stem = re.match(r"(conv|bn)1\.(.*)", name)
  if stem:
    return f"resnet.embedder.embedder.{kinds[stem[1]]}.{stem[2]}"
  stage, block, rest = re.match(r"layer(\d)\.(\d+)\.(.*)", name).groups()
  start = f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}"
  if rest.startswith("downsample"):
    kind = kinds["conv" if rest[11] == "0" else "bn"]
    return f"{start}.shortcut.{kind}.{rest[13:]}"
  kind, number, leaf = re.match(r"(conv|bn)(\d)\.(.*)", rest).groups()
  return f"{start}.layer.{int(number) - 1}.{kinds[kind]}.{leaf}"


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_hugging_face_resnet(network):
  names = {hugging_face_name(n): s for n, s in whole(network).items()}
  found = match(names, network, keep_head=True)
  assert found == {
    n: hugging_face_name(n) for n in [*trunk(network), "fc.weight", "fc.bias"]
  }
  bare = {
    n.removeprefix("resnet."): s
    for n, s in names.items()
    if n.startswith("resnet.")
  }
  assert match(bare, network).keys() == trunk(network).keys()


@pytest.mark.parametrize("file", ["resnet18", "resnet50", "densenet121"])
@pytest.mark.parametrize("network", zoo.list_models())
def test_another_network_never_fits(file, network):
  if network != file:
    refuses(whole(file), network, f"does not fit {network}")


def test_another_network_never_fits_a_cut():
  """The stem of ResNets is common, but a file of another is still refused."""
  refuses(whole("resnet50"), "resnet34", "another shape", until="stem")


def test_failures_say_what_and_how_much():
  names = dict(whole("resnet18"))
  del names["layer4.1.bn2.weight"]
  refuses(names, "resnet18", "1 missing (layer4.1.bn2.weight)")
  assert match(names, "resnet18", until="layer3")
  names = {**whole("resnet18"), "layer1.0.se.fc.weight": (4, 64)}
  refuses(names, "resnet18", "1 left over (layer1.0.se.fc.weight)")
  names = {**whole("resnet18"), "layer3.0.conv2.weight": (256, 256, 1, 1)}
  refuses(
    names,
    "resnet18",
    "1 of another shape (layer3.0.conv2.weight is (256, 256, 1, 1),"
    " needed (256, 256, 3, 3))",
    until="layer1",
  )


def test_deep_stem_is_named():
  """timm's resnet50d and its like begin with three convolutions."""
  names = {n: s for n, s in whole("resnet50").items() if n != "conv1.weight"}
  names |= {
    "conv1.0.weight": (32, 3, 3, 3),
    "conv1.3.weight": (32, 32, 3, 3),
    "conv1.6.weight": (64, 32, 3, 3),
  }
  refuses(names, "resnet50", "deep stem")


def test_two_networks_are_not_chosen_between():
  names = prefixed("student/", trunk("resnet18"))
  names |= prefixed("teacher/", trunk("resnet18"))
  refuses(names, "resnet18", "two networks", "student/", "teacher/")


def test_files_without_a_network():
  refuses({}, "resnet18", "no tensors")
  refuses({"weight": (3, 3)}, "resnet18", "no conv1.weight", "weight")
