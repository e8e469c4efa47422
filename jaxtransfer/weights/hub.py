"""What is said beside the numbers: a config.json, a header, a script's words.

Names and shapes do not show what a network computes. Where somebody wrote down
which network it is, that is believed, and another one is refused by its name.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtransfer import errors
from jaxtransfer.networks import zoo
from jaxtransfer.weights import pickles

# Where timm, transformers and training scripts write an architecture's name.
_NAMED = (
  "architecture",
  "arch",
  "model_arch",
  "model_name",
  "timm_model_name",
  "backbone",
  "encoder",
  "encoder_name",
  "model",
  "network",
)
# `resnetaa50`, `wide_resnet101_2`, `densenetblur121d`: a name and a depth.
_ARCHITECTURE = re.compile(
  r"(?:res|dense)[a-z]*ne[sx]?t[a-z0-9_]*?(?<!\d)\d{2,3}(?!\d)"
)
# Words around a name that say where its numbers come from; others, in the
# name of an architecture, say that it computes something else.
_SAME = {"tv", "ssl", "swsl", "gluon", "v1b"}
# Words that say so in any name, also in that of somebody's run.
_OTHER = set(
  "wide se sk eca cbam ibn bam gc ge legacy aa blur antialiased dilated gn"
  " caffe v1 v1c v1d v1s v1e".split()
)
# What timm's and transformers' configs call whatever no tensor shows, and
# what it is in torchvision's networks.
_USUAL: Mapping[str, tuple[Any, ...]] = {
  "downsample_in_first_stage": (False,),
  "downsample_in_bottleneck": (False,),
  "hidden_act": ("relu",),
  "output_stride": (32,),
  "dilation": (False, 1),
  "replace_stride_with_dilation": (False,),
  "aa_layer": (),
  "act_layer": ("relu",),
  "avg_down": (False,),
  "stem_type": (),
  "replace_stem_pool": (False,),
}


def check_architecture(
  network: str, path: pathlib.Path, metadata: Mapping[str, str]
) -> bool:
  """Refuses weights that somebody says are another network's.

  Args:
    network: the zoo's name of the network that is to be filled.
    path: the file of weights; a config.json beside it is read.
    metadata: what the file says of itself.

  Returns:
    Whether a config.json says that this network's function is torchvision's.

  Raises:
    UsageError: another network, or another function under the same names.
  """
  config = _config(path)
  beside = "config.json beside it"
  for part in (config, _part(config, "pretrained_cfg")):
    for key, name in _names(part):
      strict = key == "architecture"
      _check_name(network, path, f"{beside} gives {key}", name, strict=strict)
  for key, name in _names(metadata):
    _check_name(network, path, f"it says itself {key}", name, strict=False)
  for part in (
    config,
    _part(config, "model_args"),
    _part(config, "backbone_config"),
  ):
    for key, usual in _USUAL.items():
      value = part.get(key)
      if isinstance(value, list):
        value = next(filter(None, value), None)
      if value not in (None, "", *usual):
        raise errors.UsageError(
          f"{path}: {beside} gives {key} {value!r}: under the same names it"
          f" computes something else than {network} here, and is refused"
        )
  return (
    isinstance(config.get("architecture"), str)
    or config.get("model_type") == "resnet"
  )


def statistics(path: pathlib.Path) -> dict[str, Any]:
  """Returns the mean and std that a hub folder's configs give, {} for none."""
  for part, prefix in (
    (_part(_config(path), "pretrained_cfg"), ""),
    (_read(path.parent / "preprocessor_config.json"), "image_"),
  ):
    values = {key: part.get(f"{prefix}{key}") for key in ("mean", "std")}
    if None not in values.values():
      return values
  return {}


def _config(path: pathlib.Path) -> Mapping[str, Any]:
  return {} if path.is_dir() else _read(path.parent / "config.json")


def _read(path: pathlib.Path) -> Mapping[str, Any]:
  """Returns a JSON dict; {} for none, because the numbers are what counts."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
  part = config.get(key)
  return part if isinstance(part, dict) else {}


def _names(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  for key in _NAMED:
    if isinstance(config.get(key), str):
      yield key, config[key]


def _check_name(
  network: str, path: pathlib.Path, where: str, name: str, *, strict: bool
) -> None:
  """Refuses an architecture's name that is not the network's.

  What is no such name, such as that of somebody's run, says nothing; where it
  is not `strict`, a run's name may hold the network's.
  """
  # `timm/resnet50.a1_in1k`: the last part is about the training.
  plain = name.lower().rsplit("/", 1)[-1].split(".")[0]
  words = "_".join(re.findall(r"[a-z0-9]+", plain))
  words = re.sub(r"(ne[sx]?t)_(?=\d{2,3}(?:_|$))", r"\1", words)
  if not _ARCHITECTURE.search(words):
    return
  around = f"_{words}_".split(f"_{network}_")
  if len(around) == 2:
    more = set("_".join(around).split("_")) - {""}
    if not (more - _SAME if strict else more & _OTHER):
      return
  known = zoo.list_models()
  raise errors.UsageError(
    f"{path}: {where} {pickles.printable(name)!r}, which is not {network},"
    " whatever names and shapes fit: "
    + (
      f"give {words} as the network"
      if words in known
      else f"refused; known are {', '.join(known)}"
    )
  )
