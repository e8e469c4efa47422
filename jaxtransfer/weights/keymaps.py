"""From the names in published checkpoints to torchvision's."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxtransfer import errors
from jaxtransfer.networks import zoo
from jaxtransfer.networks.family import Family, Layout
from jaxtransfer.weights.pickles import printable

Shapes = Mapping[str, tuple[int, ...]]

# What torch's wrappers of one module put between a network's own names.
_WRAPPER = (
  r"(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|"
  r"_checkpoint_wrapped_module)\."
)
_WRAPPERS = re.compile(rf"(?<![^.]){_WRAPPER}")

# Heads and training machinery that stand among the network's own names:
# ImageNet and KimiaNet classifiers, MTDP's task heads, the projections,
# prototypes and queues of self-supervised training, losses and metrics.
_BESIDE = re.compile(
  r"(fc\w*|last_linear|linear|mlp|logits|\w*classifiers?|(\w+_)?heads?|head_\w+|"
  r"projector|projection|projection_head|proj|proj_head|predictor|prototypes|"
  r"bn|queue|queue_ptr|encoder_k|decoder|n_averaged|temperature|logit_scale|"
  r"\w*criterion\w*|\w*loss\w*|\w*metrics?|pos_weight|class_weights?|"
  r"(train|val|valid|validation|test)_\w+)(\.|$)"
)

# Copies that follow a network slowly, as self-supervised training keeps them:
# never what is evaluated, as long as the network itself is there. Which of a
# student and a teacher is wanted, nobody can tell.
_COPY = re.compile(r"(^|_)(ema|k|momentum)(_|$)")
_COPY_OF = {"target": "online", "key": "query"}


def _rename_children(
  names: Sequence[str], anchor: str, trunk: Sequence[str]
) -> dict[str, str]:
  """Names the children of an `nn.Sequential` after torchvision's, in order.

  Modules without tensors (ReLU, pooling) may have been counted or not. The
  first children may stand in a module of their own (`0.0`, `layer0.0`).

  Args:
    names: inside the network.
    anchor: the first convolution's weight among them.
    trunk: torchvision's names, in the network's order.

  Returns:
    {name: torchvision's}; a lone child after the trunk's becomes its head.
  """
  first = anchor.split(".")[:-2]
  units: dict[tuple[int, ...], dict[str, str]] = collections.defaultdict(dict)
  for name in names:
    parts = name.split(".")
    depth = 2 if parts[:1] == first else 1
    if re.fullmatch(r"[0-9]{1,4}", parts[depth - 1]) and len(parts) > depth:
      # The first module comes first, also where it has a name.
      key = [int(p) if p.isdecimal() else -1 for p in parts[:depth]]
      units[tuple(key)][name] = ".".join(parts[depth:])
  mapping = {name: name for name in names}
  known = set(trunk)
  modules = list(dict.fromkeys(name.split(".")[0] for name in trunk))
  after: list[dict[str, str]] = []
  for key in sorted(units):
    unit = units[key]
    if modules and any(f"{modules[0]}.{i}" in known for i in unit.values()):
      module, after = modules.pop(0), []
      mapping |= {name: f"{module}.{i}" for name, i in unit.items()}
    else:
      after.append(unit)
  for number, unit in enumerate(after):
    head = "fc" if len(after) == 1 else f"fc_{number}"
    mapping |= {name: f"{head}.{i}" for name, i in unit.items()}
  return mapping


_NUMBERS = "num_batches_tracked"
# More than any ensemble has; each costs a look at all names.
_MAX_PLACES = 200


@dataclasses.dataclass(frozen=True)
class _Reading:
  """A way to read a part of a checkpoint.

  Attributes:
    anchor: the name of what would be the first convolution's weight.
    container: the dicts it stands in, ended by a slash; "" for none.
    prefix: what stands before the layout's name in the container.
    layout: how the names after it are made.
    family: of the network that is looked for.
  """

  anchor: str
  container: str
  prefix: str
  layout: Layout
  family: Family

  @property
  def start(self) -> str:
    """What stands before the network's names."""
    return f"{self.container}{self.prefix}"


@dataclasses.dataclass(frozen=True)
class Place:
  """One network in a checkpoint.

  Attributes:
    reading: where it is and how its names are made.
    names: {torchvision's name: name in the checkpoint}, head included where
      the network's own names show it.
    left_over: names among its own that the network has no place for.
    reshaped: torchvision's names of tensors that have another shape.
  """

  reading: _Reading
  names: Mapping[str, str]
  left_over: tuple[str, ...]
  reshaped: tuple[str, ...]

  @property
  def start(self) -> str:
    """What stands before its names in the checkpoint."""
    return self.reading.start

  @property
  def fits(self) -> bool:
    """Whether nothing in it is of another network; all of it may be less."""
    return not self.left_over and not self.reshaped


def locate(
  names: Shapes,
  *,
  family: Family,
  network: str,
  trunk: Shapes,
  prefix: str = "",
  foreign: Mapping[str, str] | None = None,
  same: Callable[[Place, Place], bool] = lambda a, b: False,
) -> Place:
  """Finds the network that a checkpoint holds.

  Names inside it are strict; heads and training machinery (a listed few) are
  not its own, and all that stands outside it is left out. It may stand in any
  container (`state_dict/`) and under any prefix (`module.backbone.`).

  Args:
    names: {name in the checkpoint: shape}, containers ended by a slash.
    family: of the network.
    network: the network's name, for messages.
    trunk: {torchvision name: shape} of the uncut network without a head.
    prefix: which of several networks is meant: what stands before its names,
      or the end of that; "." where nothing does; "" to find it.
    foreign: {name: what it is} of what is no tensor in the checkpoint.
    same: whether two places hold the same numbers.

  Returns:
    The place: the one network there is, or the one of which the others are
    momentum copies, other networks, or the same again.

  Raises:
    UsageError: there is none, or several that could be meant. The message is
      one line without the path.
  """
  foreign = foreign or {}
  every = {**dict.fromkeys(foreign, ()), **names}
  # The stem's own tensors come in no order.
  first = f"{family.prefix}{family.layouts[0].anchor}"
  trunk = {first: trunk[first], **trunk}
  readings = list(_readings(names, family, trunk))
  if len(readings) > _MAX_PLACES:
    raise errors.UsageError(
      f"does not fit {network}: {len(readings):,} layers in it could be the"
      " first of a network"
    )
  places_of: dict[str, list[Place]] = collections.defaultdict(list)
  for reading in readings:
    others = [r.start for r in readings if r.anchor != reading.anchor]
    place = _read(every, foreign, reading, trunk, others)
    places_of[reading.anchor].append(place)
  # One network of each first layer, in the words that explain most of it.
  places = [
    max(ways, key=lambda p: (p.fits, _count(p), len(p.start)))
    for ways in places_of.values()
  ]
  if not places:
    raise errors.UsageError(_why_nothing(names, family, network, foreign))
  if prefix:
    return _named(places, prefix)
  fitting = [place for place in places if place.fits]
  if not fitting:
    return max(places, key=_count)
  fitting = [p for p in fitting if not _is_copy(p, fitting)] or fitting
  whole = [p for p in fitting if trunk.keys() <= p.names.keys()] or fitting
  fullest = max(whole, key=_count)
  if all(place is fullest or same(fullest, place) for place in whole):
    return fullest
  *first, last = map(_shown, whole[:5])
  number = "two" if len(whole) == 2 else len(whole)
  raise errors.UsageError(
    f"holds {number} networks, {', '.join(first)} and {last}; choose one with"
    " config.network.prefix (prefix= of create_model), e.g."
    f" {printable(whole[0].start or '.')!r}"
  )


def fit(
  place: Place,
  names: Shapes,
  *,
  network: str,
  wanted: Shapes,
  trunk: Shapes,
  head: tuple[str, str] | None = None,
  foreign: Mapping[str, str] | None = None,
) -> dict[str, str]:
  """Returns where the tensors of a (cut) network are, or says what is wrong.

  Args:
    place: as `locate` returns it.
    names: as for `locate`.
    network: likewise.
    wanted: {torchvision name: shape} of the tensors to find, without a head.
    trunk: the same of the uncut network: names that may be present. All that
      is present must have the trunk's shapes.
    head: torchvision's names of the head's weight and bias, to find them too;
      None drops any head.
    foreign: as for `locate`.

  Returns:
    {torchvision name: name in the checkpoint}, for `wanted` and `head`.

  Raises:
    UsageError: a tensor is missing, left over, or of another shape. The
      message is one line without the path.
  """
  foreign = foreign or {}
  stored = place.names
  missing = [name for name in wanted if name not in stored]
  kept = {name: stored[name] for name in wanted if name in stored}
  if head is not None:
    kept |= _find_head(names, place, head)
    missing += [name for name in head if name not in kept]
  reshaped = [
    f"{printable(stored[name])} is {names[stored[name]]}, needed {trunk[name]}"
    for name in place.reshaped
  ]
  unmade = [
    f"{printable(n)} is {foreign[n]}" for n in kept.values() if n in foreign
  ]
  problems = [
    f"{len(listed)} {what} ({', '.join(listed[:3])}"
    f"{', ...' if len(listed) > 3 else ''})"
    for what, listed in (
      ("missing", missing),
      ("not rebuilt", unmade),
      ("left over", list(map(printable, place.left_over))),
      ("of another shape", reshaped),
    )
    if listed
  ]
  if problems:
    raise errors.UsageError(
      f"does not fit {network}: {'; '.join(problems)}"
      f"{_ends_at(wanted, stored, network)}"
    )
  return kept


def left_out(place: Place, names: Shapes, head: tuple[str, str]) -> str:
  """Says in words what of a checkpoint is not read; "" where nothing is.

  Args:
    place: as `locate` returns it.
    names: as for `locate`.
    head: torchvision's names of the network's own head, which is not told.
  """
  kept = {*place.names.values(), *_find_head(names, place, head).values()}
  groups: dict[str, list[str]] = collections.defaultdict(list)
  for name in names:
    if name not in kept and not name.endswith(_NUMBERS):
      groups[_group(name, place)].append(name)
  descriptions = [
    printable(listed[0])
    if len(listed) == 1
    else f"{printable(group)}* ({len(listed):,} tensors)"
    for group, listed in sorted(groups.items())
  ]
  more = f" and {len(descriptions) - 6:,} more" if len(descriptions) > 6 else ""
  return f"{', '.join(descriptions[:6])}{more}"


def numbering(place: Place) -> str:
  """Says in words where numbered children are not torchvision's; else ""."""
  if not place.reading.layout.numbered:
    return ""
  units: dict[str, None] = {}
  for name, stored in place.names.items():
    # What the child that is the module `conv0` calls `weight`.
    own = name.removeprefix(place.reading.family.prefix).partition(".")[2]
    if not name.startswith("fc."):
      units.setdefault(_WRAPPERS.sub("", stored).removesuffix(f".{own}"))
  above, _, last = zip(*(unit.rpartition(".") for unit in units), strict=True)
  if len(set(above)) > 1 or not all(map(str.isdecimal, last)):
    return ""
  numbers = sorted(map(int, last))
  # Two without tensors stand after the first two: ReLU and max-pool.
  usual = [numbers[0] + i + (2 if i > 1 else 0) for i in range(len(numbers))]
  if numbers == usual:
    return ""
  return (
    f"its layers are children {', '.join(map(str, numbers))}, torchvision's"
    f" would be {', '.join(map(str, usual))}: that ReLU and max-pool follow"
    " the first two is assumed"
  )


def _group(name: str, place: Place) -> str:
  """Returns the beginning by which a name that is left out is told."""
  start = place.reading.container
  if not name.startswith(start) or "/" in name[len(start) :]:
    return name[: name.find("/") + 1]
  for level in place.reading.prefix.split(".")[:-1]:
    if not name.startswith(f"{start}{level}."):
      break
    start = f"{start}{level}."
  return f"{start}{name[len(start) :].split('.')[0]}."


def _ends_at(wanted: Shapes, stored: Mapping[str, str], network: str) -> str:
  """Returns where a cut network's tensors end, nothing for another problem."""
  there = [name in stored for name in wanted]
  if not any(there) or not all(there[: sum(there)]) or all(there):
    return ""
  family = zoo.family(network)
  last = list(wanted)[sum(there) - 1].removeprefix(family.prefix)
  for name in family.layer_names(family.networks[network]):
    if last.startswith(f"{name}."):
      return f"; it ends at {name}: give until={name} to use what is there"
  return ""


def _readings(
  names: Shapes, family: Family, trunk: Shapes
) -> Iterator[_Reading]:
  """Yields all ways to read what may be a network's first layer."""
  shape = next(iter(trunk.values()))
  for name in names:
    # Every block has a `conv1` of its own; only the stem sees an image.
    if len(names[name]) != 4 or names[name][1] > 4:
      continue
    cut = name.rfind("/") + 1
    for layout in family.layouts:
      pattern = layout.anchor.replace(".", rf"\.(?:{_WRAPPER})*")
      match = re.search(rf"(?:^|\.)({pattern})$", name[cut:])
      if match and (names[name] == shape or not layout.numbered):
        prefix = name[cut : cut + match.start(1)]
        yield _Reading(name, name[:cut], prefix, layout, family)


def _read(
  names: Shapes,
  foreign: Mapping[str, str],
  reading: _Reading,
  trunk: Shapes,
  others: Sequence[str],
) -> Place:
  """Reads a part of a checkpoint.

  Args:
    names: {name in the checkpoint: shape}, foreign ones too.
    foreign: as for `locate`.
    reading: which part, and how.
    trunk: {torchvision name: shape} of the uncut network.
    others: what stands before the names of other networks.
  """
  start, above = reading.start, reading.family.prefix
  inside = {
    name: _WRAPPERS.sub("", name[len(start) :])
    for name in names
    if name.startswith(start)
    and "/" not in name[len(reading.container) :]
    and not name.endswith(_NUMBERS)
  }
  rename = reading.layout.rename
  if rename is None:
    renamed = _rename_children(
      list(inside.values()),
      inside[reading.anchor],
      [name.removeprefix(above) for name in trunk],
    )
  else:
    renamed = rename(list(inside.values()))
  nested = tuple(o for o in others if o != start and o.startswith(start))
  stored: dict[str, str] = {}
  left_over = []
  for name, inner in inside.items():
    target = f"{above}{renamed[inner]}"
    if target not in trunk:
      target = renamed[inner]
    if target not in stored and (
      target in trunk or target in ("fc.weight", "fc.bias")
    ):
      stored[target] = name
    elif not (
      name in foreign
      or _BESIDE.match(target)
      or (nested and name.startswith(nested))
    ):
      left_over.append(name)
  reshaped = tuple(
    name
    for name in trunk
    if name in stored
    and stored[name] not in foreign
    and names[stored[name]] != trunk[name]
  )
  return Place(reading, stored, tuple(left_over), reshaped)


def _count(place: Place) -> int:
  """Returns how many tensors are in their place and of the right shape."""
  return len(place.names) - len(place.reshaped)


def _shown(place: Place) -> str:
  return f"{printable(place.start)}*" if place.start else "names without prefix"


def _named(places: Sequence[Place], prefix: str) -> Place:
  """Returns the place that a config's key means."""
  word = prefix.strip("./")
  starts = [place.start.rstrip("./") for place in places]
  named = [
    place
    for place, start in zip(places, starts, strict=True)
    if (re.search(rf"(^|[./]){re.escape(word)}$", start) if word else not start)
  ]
  exact = [place for place in named if place.start.rstrip("./") == word]
  if len(exact or named) == 1:
    return (exact or named)[0]
  listed = [printable(place.start or ".") for place in (named or places)[:5]]
  raise errors.UsageError(
    f"config.network.prefix (prefix= of create_model) is {printable(prefix)!r},"
    f" but {'several networks are' if named else 'no network is'} under it;"
    f" there are {', '.join(listed)}"
  )


def _is_copy(place: Place, places: Sequence[Place]) -> bool:
  """Whether a network is a slow copy of another one of the places."""
  if any(map(_COPY.search, re.split(r"[./]", place.start))):
    return True
  others = [other.start for other in places if other is not place]
  for word, partner in _COPY_OF.items():
    pattern = rf"(?<![a-z]){word}(?![a-z])"
    if re.search(pattern, place.start):
      bare = re.sub(rf"{pattern}_|_{pattern}", "", place.start)
      return any(bare == o or re.search(partner, o) for o in others)
  return False


def _why_nothing(
  names: Shapes, family: Family, network: str, foreign: Mapping[str, str]
) -> str:
  if not names:
    return "holds no tensors"
  inner = [name[name.rfind("/") + 1 :] for name in names]
  if any(re.search(r"(^|\.)conv1\.0\.weight$", name) for name in inner):
    return (
      f"does not fit {network}: it has the deep stem (conv1.0, conv1.3,"
      " conv1.6) of timm's 'c', 'd', 's' and 't' variants"
    )
  anchors = " or ".join(
    layout.anchor for layout in family.layouts if not layout.numbered
  )
  listed = ", ".join(map(printable, list(names)[:3]))
  # What is a whole model in a dict says so.
  models = [n for n, what in foreign.items() if what.startswith("a whole")]
  objects = ""
  for name in (models or list(foreign))[:1]:
    objects = f"; {printable(name)} in it is {foreign[name]}"
  return (
    f"does not fit {network}: no {anchors} in it (it has {listed}, ...)"
    f"{objects}"
  )


def _find_head(
  names: Shapes, place: Place, head: tuple[str, str]
) -> dict[str, str]:
  """Finds the head's weight and bias beside or above the trunk's prefix."""
  seen = {name: place.names[name] for name in head if name in place.names}
  if len(seen) == len(head):
    return seen
  for where in place.reading.layout.heads:
    module = where.lstrip("^")
    above = place.reading.prefix.split(".")
    levels = len(where) - len(module)
    if levels >= len(above):
      continue
    parent = ".".join(above[: len(above) - 1 - levels])
    start = place.reading.container + (f"{parent}." if parent else "")
    stored = {
      target: f"{start}{module}.{target.rsplit('.', 1)[1]}" for target in head
    }
    if all(name in names for name in stored.values()):
      return stored
  return {}
