"""The networks by name: which there are, their layers, and building one."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer import errors
from jaxtransfer.networks import cbr, densenet, resnet
from jaxtransfer.networks.family import Family
from jaxtransfer.networks.network import (
  Network,
  stage_names,
  unknown_layer,
)

_FAMILIES = (resnet.FAMILY, densenet.FAMILY, cbr.FAMILY)


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer, and what the network cut after it amounts to.

  Attributes:
    name: torchvision's.
    channels: width of its output, so of the pooled features.
    stride: input pixels per output pixel.
    params: trainable parameters up to and with this layer, no head.
    macs: multiply-accumulates for one image up to this layer.
  """

  name: str
  channels: int
  stride: int
  params: int
  macs: int


def list_models() -> list[str]:
  """Returns the names that `create_model` knows, sorted."""
  return sorted(name for known in _FAMILIES for name in known.networks)


def family(name: str) -> Family:
  """Returns the family that a network is of.

  Raises:
    UsageError: no such network.
  """
  for known in _FAMILIES:
    if name in known.networks:
      return known
  raise errors.UsageError(
    f"no network {name!r}{errors.nearest(name, list_models())}"
    f" (known: {', '.join(list_models())})"
  )


@functools.cache
def list_layers(name: str, image_size: int = 224) -> tuple[Layer, ...]:
  """Returns a network's layers in order, a stage's name after its last block.

  Args:
    name: one of `list_models`.
    image_size: side of the image whose multiply-accumulates are counted.

  Returns:
    A `Layer` for every name that `until` and `taps` accept.

  Raises:
    UsageError: no such network.
  """
  network = build(name)
  stages = {layer: alias for alias, layer in network.aliases}
  table = []
  strided = (224, 224)
  for layer_name, layer, (params, macs) in zip(
    network.layer_names,
    network.layers,
    _costs(network, image_size),
    strict=True,
  ):
    strided = layer.macs(strided)[1]
    for alias in filter(None, [layer_name, stages.get(layer_name)]):
      table.append(
        Layer(alias, layer.channels, 224 // strided[0], params, macs)
      )
  return tuple(table)


def count(
  network: Network, image_size: int = 224, *, head: bool = False
) -> tuple[int, int]:
  """Counts what any network holds and does.

  Args:
    network: cut, slim or whole, with or without values.
    image_size: side of the image whose multiply-accumulates are counted.
    head: whether its head counts, where it has one.

  Returns:
    Trainable parameters, and multiply-accumulates for one image.
  """
  *_, (params, macs) = _costs(network, image_size)
  if head and network.head is not None:
    leaves = jax.tree.leaves(nnx.state(network.head, nnx.Param))
    params += sum(leaf.size for leaf in leaves)
    # Each of the matrix's numbers is used once for an image.
    macs += sum(leaf.size for leaf in leaves if leaf.ndim > 1)
  return params, macs


def _costs(network: Network, image_size: int) -> Iterator[tuple[int, int]]:
  """Yields (parameters, multiply-accumulates) up to and with each layer."""
  params, macs = 0, 0
  size = (image_size, image_size)
  for layer in network.layers:
    state = nnx.state(layer, nnx.Param)
    params += sum(leaf.size for leaf in jax.tree.leaves(state))
    own, size = layer.macs(size)
    macs += own
    yield params, macs


def select_taps(
  name: str, taps: str, until: str | None = None
) -> tuple[str, ...]:
  """Returns the taps that a config's words mean, in the network's order.

  Args:
    name: one of `list_models`.
    taps: "blocks" for the stem and the end of every stage, dense block and
      transition; "layers" for every layer; or names with commas between.
    until: the deepest layer that "blocks" and "layers" go to; None for all.

  Returns:
    Layer names, none twice.

  Raises:
    UsageError: an unknown network or layer, or one beyond `until`.
  """
  network = build(name, until=until)
  if taps == "layers":
    return network.layer_names
  if taps == "blocks":
    return stage_names(network.layer_names, dict(network.aliases))
  wanted: dict[str, str] = {}
  for tap in filter(None, map(str.strip, taps.split(","))):
    wanted.setdefault(network.resolve(tap), tap)
  if not wanted:
    raise errors.UsageError(
      'config.taps is empty; give "blocks", "layers" or names of layers'
    )
  return tuple(wanted[n] for n in network.layer_names if n in wanted)


def build(
  name: str,
  *,
  until: str | None = None,
  num_classes: int | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
  final_relu: bool = True,
  flatten: int | None = None,
  slim_after: str | None = None,
) -> Network:
  """Builds a network without values: every variable holds a shape only.

  Args:
    name: one of `list_models`.
    until: the last layer kept; None for all. Later layers are never built.
    num_classes: width of a linear head; None for pooled features.
    dtype: compute dtype; parameters are float32.
    final_relu: whether an uncut DenseNet ends in torchvision's ReLU. Some
      published histology networks pool norm5 without it.
    flatten: side of the images whose whole last map the head reads, pixels;
      None for a head on the pooled features.
    slim_after: the last layer of full width; all after it have half the width
      (ResNet and CBR half the channels inside and out, DenseNet half the
      growth). Names stay; where the width changes inside a ResNet's stage its
      block gets a shortcut convolution. None for full width.

  Returns:
    The network; `tensors.load` gives it values.

  Raises:
    UsageError: no such network or layer, or none after `slim_after`.

  Source: `slim_after` is the hybrid of Raghu et al. 2019, arXiv:1902.07208.
  """
  kind = family(name)
  spec = kind.networks[name]
  names = kind.layer_names(spec)
  aliases = kind.aliases(spec)
  last = names[-1] if until is None else aliases.get(until, until)
  if last not in names:
    raise unknown_layer(name, last, names, aliases)
  full = None if slim_after is None else aliases.get(slim_after, slim_after)
  if full is not None and full not in names:
    raise unknown_layer(name, full, names, aliases)
  if full is not None and names.index(full) >= names.index(last):
    raise errors.UsageError(
      f"slim_after={slim_after!r}: nothing after it in {name}, which ends with"
      f" {last}; give an earlier layer"
    )
  dtype = jnp.dtype(dtype)

  layers = []
  for layer in kind.make_layers(spec, dtype, full):
    layers.append(layer)
    if layer[0] == last:
      break
  return Network(
    name,
    kind,
    layers,
    aliases,
    relu=kind.final_relu and until is None and final_relu,
    num_classes=num_classes,
    dtype=dtype,
    flatten=flatten,
    slim_after=full,
  )
