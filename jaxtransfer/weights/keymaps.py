"""From the names in published checkpoints to torchvision's."""

import dataclasses
import re
from collections.abc import Callable, Mapping

from jaxtransfer import errors

Shapes = Mapping[str, tuple[int, ...]]

# torch forbade dots inside module names after the DenseNets were published.
_OLD_DENSE_LAYER = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")

# Heads and training machinery that published files carry beside the network:
# ImageNet and KimiaNet classifiers, MTDP's task heads, and the projections,
# prototypes, queues and momentum encoders of self-supervised training.
_BESIDE = re.compile(
  r"(fc|fc_\d+|classifier|heads?|"
  r"projector|projection|projection_head|proj|proj_head|predictor|prototypes|"
  r"bn|queue|queue_ptr|encoder_k)(\.|$)"
)

_HUGGING_FACE = (
  (r"^embedder\.embedder\.convolution\.", r"conv1."),
  (r"^embedder\.embedder\.normalization\.", r"bn1."),
  (r"\.shortcut\.convolution\.", r".downsample.0."),
  (r"\.shortcut\.normalization\.", r".downsample.1."),
)
_HUGGING_FACE_LAYER = re.compile(
  r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)\."
  r"(convolution|normalization)\.)?"
)


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How one kind of checkpoint names a family's tensors.

  Attributes:
    anchor: the first convolution's weight, by which a prefix is found.
    rename: a name without the prefix -> torchvision's.
    heads: where the head may be, relative to the prefix: each a weight's
      module name, after as many levels up as it has leading `^`.
  """

  anchor: str
  rename: Callable[[str], str]
  heads: tuple[str, ...]


def _rename_hugging_face(name: str) -> str:
  for pattern, replacement in _HUGGING_FACE:
    name = re.sub(pattern, replacement, name)
  match = _HUGGING_FACE_LAYER.match(name)
  if match is None:
    return name
  stage, block, number, kind = match.groups()
  inside = ""
  if number is not None:
    inside = f"{'conv' if kind == 'convolution' else 'bn'}{int(number) + 1}."
  return f"layer{int(stage) + 1}.{block}.{inside}{name[match.end() :]}"


_LAYOUTS = {
  "resnet": (
    _Layout("conv1.weight", lambda name: name, ("fc",)),
    _Layout(
      "embedder.embedder.convolution.weight",
      _rename_hugging_face,
      ("^classifier.1", "classifier.1"),
    ),
  ),
  # torchvision keeps the trunk under `features.`, which is a prefix here.
  "densenet": (
    _Layout(
      "conv0.weight",
      lambda name: f"features.{name}",
      ("^classifier", "classifier", "^^fc_4"),
    ),
  ),
  "cbr": (_Layout("block1.conv.weight", lambda name: name, ("fc",)),),
}


_LAYER = re.compile(
  r"layer\d+\.\d+|denseblock\d+\.denselayer\d+|transition\d+|block\d+"
)


def to_torchvision(
  names: Shapes,
  *,
  family: str,
  network: str,
  wanted: Shapes,
  trunk: Shapes,
  head: tuple[str, str] | None = None,
) -> dict[str, str]:
  """Finds a network's tensors in a checkpoint, or says why it does not fit.

  Names inside the trunk are strict; heads and training machinery beside it
  (a listed few) are dropped. The container (`state_dict/`, `model/`) and the
  prefix (`module.`, `backbone.`, `module.model.0.`) are those under which
  most of the trunk's names are found.

  Args:
    names: {name in the checkpoint: shape}, containers ended by a slash.
    family: "resnet", "densenet" or "cbr".
    network: the network's name, for messages.
    wanted: {torchvision name: shape} of the tensors to find, without a head.
    trunk: the same of the uncut network: names that may be present. All that
      is present must have the trunk's shapes.
    head: torchvision's names of the head's weight and bias, to find them too;
      None drops any head.

  Returns:
    {torchvision name: name in the checkpoint}, for `wanted` and `head`.

  Raises:
    UsageError: a tensor is missing, left over, or of another shape; or two
      places fit equally well. The message is one line without the path.
  """
  container, prefix, layout = _locate(names, family, network, trunk)
  start = f"{container}{prefix}"
  found: dict[str, str] = {}
  left_over = []
  for name in names:
    if not name.startswith(container) or "/" in name[len(container) :]:
      continue
    if name.endswith("num_batches_tracked"):
      continue
    target = _OLD_DENSE_LAYER.sub(r"\1\2", name[len(start) :])
    target = layout.rename(target)
    if name.startswith(start) and target in trunk:
      found[target] = name
    elif not _is_beside(name[len(container) :], prefix):
      left_over.append(name)
  missing = [name for name in wanted if name not in found]
  kept = {name: found[name] for name in wanted if name in found}
  if head is not None:
    kept |= _find_head(names, container, prefix, layout, head)
    missing += [name for name in head if name not in kept]
  reshaped = [
    f"{found[name]} is {names[found[name]]}, needed {trunk[name]}"
    for name in trunk
    if name in found and names[found[name]] != trunk[name]
  ]
  problems = [
    f"{len(listed)} {what} ({', '.join(listed[:3])}"
    f"{', ...' if len(listed) > 3 else ''})"
    for what, listed in (
      ("missing", missing),
      ("left over", left_over),
      ("of another shape", reshaped),
    )
    if listed
  ]
  if problems:
    raise errors.UsageError(
      f"does not fit {network}: {'; '.join(problems)}{_ends_at(wanted, found)}"
    )
  return kept


def _ends_at(wanted: Shapes, found: Mapping[str, str]) -> str:
  """Returns where a cut network's tensors end, nothing for another problem."""
  there = [name in found for name in wanted]
  if not any(there) or not all(there[: sum(there)]) or all(there):
    return ""
  last = _LAYER.search(list(wanted)[sum(there) - 1])
  if last is None:
    return ""
  return f"; it ends at {last[0]}: give until={last[0]} to use what is there"


def _is_beside(name: str, prefix: str) -> bool:
  """Whether a name is of a head or of training, and not inside the trunk."""
  for level in prefix.split(".")[:-1]:
    if not name.startswith(f"{level}."):
      break
    name = name.removeprefix(f"{level}.")
  return _BESIDE.match(name) is not None


def _locate(
  names: Shapes, family: str, network: str, trunk: Shapes
) -> tuple[str, str, _Layout]:
  """Returns (container, prefix, layout) under which most names are known."""
  scores: dict[tuple[str, str, _Layout], int] = {}
  for name in names:
    cut = name.rfind("/") + 1
    for layout in _LAYOUTS[family]:
      inner = name[cut:]
      # Every block has a `conv1` of its own; only the stem sees an image.
      if f".{inner}".endswith(f".{layout.anchor}") and (
        len(names[name]) == 4 and names[name][1] <= 4
      ):
        place = (name[:cut], inner.removesuffix(layout.anchor), layout)
        scores[place] = _count_known(names, place, trunk)
  best = max(scores.values(), default=0)
  if not scores:
    raise errors.UsageError(_why_nothing(names, family, network))
  places = [place for place, score in scores.items() if score == best]
  # MoCo keeps two encoders; the momentum copy is not the one it evaluates.
  if len(places) > 1:
    places = [p for p in places if "encoder_k." not in p[1]] or places
  if len(places) > 1:
    listed = " and ".join(f"{c}{p}*" for c, p, _ in places[:2])
    raise errors.UsageError(
      f"holds two networks, {listed}; save the one you want by itself"
    )
  return places[0]


def _count_known(
  names: Shapes, place: tuple[str, str, _Layout], trunk: Shapes
) -> int:
  container, prefix, layout = place
  start = f"{container}{prefix}"
  return sum(
    layout.rename(_OLD_DENSE_LAYER.sub(r"\1\2", name[len(start) :])) in trunk
    for name in names
    if name.startswith(start)
  )


def _why_nothing(names: Shapes, family: str, network: str) -> str:
  if not names:
    return "holds no tensors"
  inner = [name[name.rfind("/") + 1 :] for name in names]
  if any(re.search(r"(^|\.)conv1\.0\.weight$", name) for name in inner):
    return (
      f"does not fit {network}: it has the deep stem (conv1.0, conv1.3,"
      " conv1.6) of timm's 'c', 'd', 's' and 't' variants"
    )
  anchors = " or ".join(layout.anchor for layout in _LAYOUTS[family])
  return (
    f"does not fit {network}: no {anchors} in it"
    f" (it has {', '.join(list(names)[:3])}, ...)"
  )


def _find_head(
  names: Shapes,
  container: str,
  prefix: str,
  layout: _Layout,
  head: tuple[str, str],
) -> dict[str, str]:
  """Finds the head's weight and bias beside or above the trunk's prefix."""
  for place in layout.heads:
    module = place.lstrip("^")
    above = prefix.split(".")
    levels = len(place) - len(module)
    if levels >= len(above):
      continue
    parent = ".".join(above[: len(above) - 1 - levels])
    start = f"{container}{parent}." if parent else container
    found = {
      target: f"{start}{module}.{target.rsplit('.', 1)[1]}" for target in head
    }
    if all(name in names for name in found.values()):
      return found
  return {}
