"""What is known of all networks of one family, for its module to say."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx


def same(names: Sequence[str]) -> dict[str, str]:
  """Returns the names as they are."""
  return {name: name for name in names}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one kind of checkpoint names a family's tensors.

  Attributes:
    anchor: the first convolution's weight, by which a prefix is found.
    rename: names without the prefix -> {name: torchvision's}, without the
      prefix of torchvision's trunk; None where the names are the places of
      children.
    heads: where the head may be, relative to the prefix: each a weight's
      module name, after as many levels up as it has leading `^`.
  """

  anchor: str
  rename: Callable[[Sequence[str]], dict[str, str]] | None = same
  heads: tuple[str, ...] = ()

  @property
  def numbered(self) -> bool:
    """Whether its names are the places of children."""
    return self.rename is None


class LayerModule(nnx.Module):
  """One of a network's layers.

  Called with (x_NHWC, train), it gives the next x_NHWC, perhaps `Measured`.

  Attributes:
    channels: of its output.
  """

  channels: int

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Returns its multiply-accumulates, and the size that it hands on.

    Args:
      size: (height, width) of one image's map.
    """
    raise NotImplementedError


# Compared as what it is: a network, whose structure is a key of compiled
# programs, holds it.
@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """A family of networks.

  Attributes:
    name: its own.
    networks: the zoo's name -> what tells that network from the others.
    layer_names: such a description -> every layer's name in order.
    aliases: likewise -> {a stage's name: its last layer}.
    make_layers: (description, compute dtype, the last layer of full width or
      None) -> (name, module) in order.
    ends: where a search of cuts ends a network: how the names of those stages
      and layers begin.
    layouts: of checkpoints, torchvision's first.
    head: torchvision's name of the head's module.
    prefix: what torchvision puts before the trunk's names.
    bare: layers whose modules lie beside the others in torch's tree.
    modules: a module's name here -> torchvision's, where it is another.
    fan: which side of a kernel Kaiming's initial values are scaled by, "in" or
      "out".
    head_bias: whether the head's initial bias is drawn, and not zero.
    final_relu: whether a ReLU follows an uncut network's last layer.
    compresses: whether a stage's end holds what the stage has gathered, so
      that a better cut lies before it and not in the next stage.
    assumed: what torchvision's networks do and no file of tensors shows; ""
      where no such file is to be expected.
    small: whether its networks are trained from random weights alone, beside
      cut ones.
  """

  name: str
  networks: Mapping[str, Any]
  layer_names: Callable[[Any], list[str]]
  aliases: Callable[[Any], dict[str, str]]
  make_layers: Callable[
    [Any, jnp.dtype, str | None], Iterator[tuple[str, LayerModule]]
  ]
  ends: tuple[str, ...]
  layouts: tuple[Layout, ...]
  head: str = "fc"
  prefix: str = ""
  bare: tuple[str, ...] = ("stem",)
  modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fan: str = "in"
  head_bias: bool = True
  final_relu: bool = False
  compresses: bool = False
  assumed: str = ""
  small: bool = False

  @property
  def head_names(self) -> tuple[str, str]:
    """Names of the head's weight and bias."""
    return f"{self.head}.weight", f"{self.head}.bias"

  def select_ends(self, taps: Iterable[str]) -> tuple[str, ...]:
    """Returns those of some taps at which a search of cuts ends a network."""
    return tuple(tap for tap in taps if tap.startswith(self.ends))


def children(heads: tuple[str, ...]) -> tuple[Layout, ...]:
  """Returns the layouts in which names are the places of children.

  Args:
    heads: as of a layout.
  """
  return tuple(
    Layout(anchor, None, heads)
    for anchor in (r"[0-9]+.weight", r"\w+.[0-9]+.weight")
  )
