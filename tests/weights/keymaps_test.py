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


def locate(names, network, **options):
  return keymaps.locate(
    names,
    family=zoo.family(network),
    network=network,
    trunk=trunk(network),
    **options,
  )


def match(names, network, until=None, keep_head=False, prefix=""):
  return keymaps.fit(
    locate(names, network, prefix=prefix),
    names,
    network=network,
    wanted=trunk(network, until),
    trunk=trunk(network),
    head=zoo.family(network).head_names if keep_head else None,
  )


def told(names, network, **options):
  """What is left out, in words."""
  place = locate(names, network, **options)
  return keymaps.left_out(place, names, zoo.family(network).head_names)


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
  [
    *("", "state_dict/", "model/module.", "backbone.", "encoder.", "a.b/c.d."),
    *("_orig_mod.", "state_dict/model._orig_mod.module.backbone."),
    "module._orig_mod.encoder.model.",
  ],
)
def test_containers_and_prefixes_are_found(network, prefix):
  """torchvision's and timm's names, wherever they stand; the head follows."""
  names = prefixed(prefix, whole(network))
  found = match(names, network, keep_head=True)
  head = zoo.family(network).head_names
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


def test_a_tie_is_broken_by_a_key():
  """Which the refusal names; with both numbers alike there is no tie."""
  names = prefixed("student/module.backbone.", whole("resnet18"))
  names |= prefixed("teacher/backbone.", whole("resnet18"))
  refuses(names, "resnet18", "config.network.prefix", "student/module.backbone")
  for key in ("teacher/backbone.", "teacher/backbone"):
    found = match(names, "resnet18", prefix=key)
    assert found["conv1.weight"] == "teacher/backbone.conv1.weight"
  assert told(names, "resnet18", prefix="teacher/backbone.") == (
    "student/* (102 tensors)"
  )
  one = locate(names, "resnet18", same=lambda a, b: True)
  assert one.start in ("student/module.backbone.", "teacher/backbone.")
  refuses(names, "resnet18", "several networks", prefix="backbone")
  # The end of a word is no word.
  refuses(names, "resnet18", "no network is under it", prefix="ackbone")
  refuses(names, "resnet18", "teacher/backbone.", prefix="decoder")


def test_a_network_without_prefix_beside_another():
  """Neither is a part of the other, whichever is longer."""
  names = {**whole("resnet18"), **prefixed("teacher.", whole("resnet18"))}
  refuses(names, "resnet18", "without prefix", "teacher.")
  assert match(names, "resnet18", prefix=".")["conv1.weight"] == "conv1.weight"
  found = match(names, "resnet18", prefix="teacher")
  assert found["conv1.weight"] == "teacher.conv1.weight"


COPIES = [
  ("state_dict/module.encoder_q.", "state_dict/module.encoder_k."),
  ("state_dict/module.base_encoder.", "state_dict/module.momentum_encoder."),
  ("backbone.", "momentum_backbone."),
  ("state_dict/backbone.", "state_dict/backbone_momentum."),
  ("online_encoder.net.", "target_encoder.net."),
  ("online_network.encoder.", "target_network.encoder."),
  ("backbone.", "target_backbone."),
  ("query_encoder.", "key_encoder."),
  ("model.", "ema.module."),
  ("model/", "model_ema/"),
  ("state_dict/", "state_dict_ema/"),
  ("", "ema."),
]


@pytest.mark.parametrize("original, copy", COPIES)
def test_copies_beside_the_trunk_are_left_out(original, copy):
  """In either order; the key takes them all the same, and alone they are the
  network."""
  one = prefixed(original, whole("resnet18"))
  other = prefixed(copy, whole("resnet18"))
  for names in ({**one, **other}, {**other, **one}):
    found = match(names, "resnet18")
    assert found["conv1.weight"] == f"{original}conv1.weight"
    assert "(102 tensors)" in told(names, "resnet18")
    taken = match(names, "resnet18", prefix=copy)
    assert taken["conv1.weight"] == f"{copy}conv1.weight"
  assert match(other, "resnet18")["conv1.weight"] == f"{copy}conv1.weight"


@pytest.mark.parametrize(
  "one, other",
  [
    ("source_encoder.", "target_encoder."),
    ("student.", "teacher."),
    ("models/0/", "models/1/"),
  ],
)
def test_equals_are_not_chosen_between(one, other):
  names = prefixed(one, whole("resnet18"))
  names |= prefixed(other, whole("resnet18"))
  refuses(names, "resnet18", "two networks", one, other)


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "resnet101"])
def test_another_networks_trunk_beside_is_told(network):
  """A ResNet-101 has all tensors of a ResNet-50, and more: it is not one."""
  others = {"resnet18", "resnet50", "resnet101"} - {network}
  names = prefixed("net.", whole(network))
  for other in others:
    names |= prefixed(f"{other}.", whole(other))
  assert match(names, network)["conv1.weight"] == "net.conv1.weight"
  assert all(other in told(names, network) for other in others)


def test_what_is_left_out_is_told():
  """Everything outside the trunk may be there; by name where it is alone."""
  names = {
    **prefixed("state_dict/model.backbone.", trunk("resnet18")),
    "state_dict/model.head.0.weight": (2, 512),
    "state_dict/model.head.0.bias": (2,),
    "state_dict/criterion.pos_weight": (1,),
    "state_dict/attention.weight": (1, 512),
    "optimizer_states/0/state/0/exp_avg": (64, 3, 7, 7),
    "optimizer_states/0/state/1/exp_avg": (64,),
  }
  assert told(names, "resnet18") == (
    "optimizer_states/* (2 tensors), state_dict/attention.weight,"
    " state_dict/criterion.pos_weight, state_dict/model.head.* (2 tensors)"
  )
  assert told(whole("resnet18"), "resnet18") == ""
  assert told(whole("densenet121"), "densenet121") == ""
  many = {f"{letter}.weight": (1,) for letter in "abcdefgh"}
  names = {**prefixed("net.", trunk("resnet18")), **many}
  assert told(names, "resnet18").endswith("f.weight and 2 more")


def test_losses_may_stand_among_the_networks_own_names():
  """What nobody could take for a part of the network; the rest is refused."""
  beside = {"criterion.pos_weight": (1,), "loss_fn.weight": (2,)}
  beside |= {"train_auroc.confmat": (2, 2), "head.weight": (2, 512)}
  names = {**trunk("resnet18"), **beside}
  assert match(names, "resnet18").keys() == trunk("resnet18").keys()
  assert all(name in told(names, "resnet18") for name in beside)
  names["attention.fc1.weight"] = (4, 64)
  refuses(names, "resnet18", "1 left over (attention.fc1.weight)")


def test_wrappers_inside_the_network_are_seen_through():
  """A part of it compiled or sharded; the same tensor twice is no part."""
  changes = {
    "conv1.": "conv1._orig_mod.",
    "layer1.": "layer1._fsdp_wrapped_module.",
    "layer2.0.": "layer2.0._checkpoint_wrapped_module.",
    "layer3.": "layer3.module.",
  }
  names = {}
  for name, shape in whole("resnet18").items():
    starts = [start for start in changes if name.startswith(start)]
    for start in starts:
      names[f"_orig_mod.{changes[start]}{name[len(start) :]}"] = shape
    if not starts:
      names[f"_orig_mod.{name}"] = shape
  found = match(names, "resnet18", keep_head=True)
  assert found["conv1.weight"] == "_orig_mod.conv1._orig_mod.weight"
  assert len(found) == len(trunk("resnet18")) + 2
  names["_orig_mod.conv1.weight"] = (64, 3, 7, 7)
  refuses(names, "resnet18", "1 left over")


RESNET = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
DENSENET = (
  *("conv0", "norm0", "denseblock1", "transition1", "denseblock2"),
  *("transition2", "denseblock3", "transition3", "denseblock4", "norm5"),
)


def numbered(network, places):
  """A network as the children of an `nn.Sequential`, at these places."""
  if zoo.family(network).name == "densenet":
    names, modules = trunk(network), DENSENET
    names = {n.removeprefix("features."): s for n, s in names.items()}
  else:
    names, modules = whole(network), RESNET
  places = dict(zip(modules, places, strict=False))
  return {
    name.replace(module, str(places[module]), 1): shape
    for name, shape in names.items()
    for module in [name.split(".")[0]]
    if module in places
  }


@pytest.mark.parametrize(
  "network, places",
  [
    ("resnet18", (0, 1, 4, 5, 6, 7, 9)),
    ("resnet18", (0, 1, 4, 5, 6, 7)),
    ("resnet50", (0, 1, 3, 4, 5, 6, 8)),
    ("resnet18", (0, 1, 2, 3, 4, 5)),
    ("resnet18", (2, 3, 6, 7, 8, 9, 12)),
    ("densenet121", (0, 1, 4, 5, 6, 7, 8, 9, 10, 11)),
    ("densenet121", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
  ],
)
@pytest.mark.parametrize("prefix", ["", "backbone.", "model/0.", "a/module.b."])
def test_numbered_children(network, places, prefix):
  """As RadImageNet's and fastai's files have them; the order decides, and a
  numbering that shows other modules than ReLU and max-pool is told."""
  names = prefixed(prefix, numbered(network, places))
  found = match(names, network)
  assert found.keys() == trunk(network).keys()
  assert all(names[place] == trunk(network)[n] for n, place in found.items())
  assert len(set(found.values())) == len(found)
  usual = [places[0] + i + (2 if i > 1 else 0) for i in range(len(places))]
  place = locate(names, network)
  numbers = len(DENSENET) if network == "densenet121" else 6
  told_of = "" if list(places[:numbers]) == usual[:numbers] else "ReLU"
  assert told_of in keymaps.numbering(place)
  assert bool(told_of) == bool(keymaps.numbering(place))
  if len(places) == len(RESNET):
    head = match(names, network, keep_head=True)
    assert head["fc.weight"] == f"{prefix}{places[-1]}.weight"


@pytest.mark.parametrize("stem", ["0", "layer0", "stem"])
def test_children_with_a_module_of_their_own_for_the_stem(stem):
  """`Sequential(Sequential(conv1, bn1, ...), layer1, ...)` and its like."""
  names = numbered("resnet18", (0, 1))
  names = prefixed(f"net.{stem}.", names)
  for name, shape in trunk("resnet18").items():
    if name.startswith("layer"):
      stage = name[5] if stem == "0" else f"layer{name[5]}"
      names[f"net.{stage}{name[6:]}"] = shape
  found = match(names, "resnet18")
  assert found.keys() == trunk("resnet18").keys()
  assert found["bn1.bias"] == f"net.{stem}.1.bias"


def test_fastais_head_is_left_out():
  names = prefixed("model/0.", numbered("resnet18", (0, 1, 4, 5, 6, 7)))
  names |= {"model/1.2.weight": (1024,), "model/1.4.weight": (512, 1024)}
  assert match(names, "resnet18").keys() == trunk("resnet18").keys()
  assert told(names, "resnet18") == "model/1.* (2 tensors)"
  refuses(names, "resnet18", "2 missing (fc.weight, fc.bias)", keep_head=True)


def test_numbered_children_are_as_strict_as_named_ones():
  """A module with tensors between, a head of several, another network."""
  names = numbered("resnet18", (0, 1, 4, 5, 6, 7))
  refuses({**names, "3.weight": (64,)}, "resnet18", "1 left over (3.weight)")
  refuses({**names, "4.0.se.weight": (64,)}, "resnet18", "4.0.se.weight")
  refuses({**names, "0.bias": (64,)}, "resnet18", "0.bias")
  refuses(names, "resnet34", "missing")
  refuses(numbered("resnet50", (0, 1, 4, 5, 6, 7)), "resnet18", "does not fit")
  head = {"9.0.weight": (2, 512), "9.0.bias": (2,), "9.2.weight": (2, 2)}
  assert match({**names, **head}, "resnet18")
  refuses({**names, **head}, "resnet18", "fc.weight", keep_head=True)
  # Cut after layer2, its head is no layer3.
  cut = {**numbered("resnet18", (0, 1, 4, 5)), "8.weight": (2, 128)}
  assert match(cut, "resnet18", until="layer2")
  refuses(cut, "resnet18", "it ends at layer2.1")
  refuses({"0.weight": (64, 3, 3, 3)}, "resnet18", "no conv1.weight")


def test_objects_in_a_tensors_place_are_named():
  """Only those: others beside the network are nobody's business."""
  names = dict(trunk("resnet18"))
  del names["bn1.bias"]
  foreign = {"bn1.bias": "made by posix.mkdir, which is never run", "a": "b"}
  place = locate(names, "resnet18", foreign=foreign)
  with pytest.raises(errors.UsageError, match="bn1.bias is made by posix") as e:
    keymaps.fit(
      place,
      names,
      network="resnet18",
      wanted=trunk("resnet18"),
      trunk=trunk("resnet18"),
      foreign=foreign,
    )
  assert "missing" not in str(e.value) and "left over" not in str(e.value)
  with pytest.raises(errors.UsageError, match="model in it is a whole pickled"):
    locate(
      {"optimizer/0": (1,)},
      "resnet18",
      foreign={"a": "made by b", "model": "a whole pickled model; save"},
    )


def test_hostile_names():
  """Neither a terminal nor the time of day is theirs."""
  names = {f"a{i}.conv1.weight": (64, 3, 7, 7) for i in range(3000)}
  refuses(names, "resnet18", "3,000 layers in it could be the first")
  for name in ("\x1b[2J.0.weight", "9" * 5000 + ".weight", "\u00b2.weight"):
    refuses({name: (64, 3, 7, 7), f"{name}x": (1,)}, "resnet18", "does not fit")
  with pytest.raises(errors.UsageError) as caught:
    match({"conv1.weight": (64, 3, 7, 7), "\x1b[2J\n": (1,)}, "resnet18")
  assert "\\x1b[2J\\n" in str(caught.value)


def test_files_without_a_network():
  refuses({}, "resnet18", "no tensors")
  refuses({"weight": (3, 3)}, "resnet18", "no conv1.weight", "weight")
