"""DenseNet as torchvision builds it. Source: torchvision.models.densenet."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxtransfer import errors
from jaxtransfer.networks import layers
from jaxtransfer.networks.family import Family, LayerModule, Layout, children


@dataclasses.dataclass(frozen=True)
class Spec:
  """What tells one DenseNet from another.

  Attributes:
    depths: dense layers in each of the four blocks.
    growth: new channels of a dense layer.
    width: channels of the stem.
  """

  depths: tuple[int, int, int, int]
  growth: int = 32
  width: int = 64


NETWORKS = {
  "densenet121": Spec((6, 12, 24, 16)),
  "densenet161": Spec((6, 12, 36, 24), growth=48, width=96),
  "densenet169": Spec((6, 12, 32, 32)),
  "densenet201": Spec((6, 12, 48, 32)),
}


class Stem(LayerModule):
  """7x7 convolution, normalisation, ReLU and max-pool: a quarter the size."""

  def __init__(self, channels: int, dtype: jnp.dtype):
    self.channels = channels
    self.conv0 = layers.Conv(3, channels, 7, stride=2, dtype=dtype)
    self.norm0 = layers.BatchNorm(channels, dtype=dtype)

  def __call__(self, x_NHWC: jax.Array, train: bool | str) -> jax.Array:
    x_NHWC = jax.nn.relu(self.norm0(self.conv0(x_NHWC), train))
    return layers.max_pool(x_NHWC)

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    macs, size = self.conv0.macs(size)
    return macs, layers.halved(size)


class DenseLayer(LayerModule):
  """Adds `growth` channels to all channels before it, and hands on both."""

  def __init__(self, channels_in: int, growth: int, dtype: jnp.dtype):
    self.channels = channels_in + growth
    self.norm1 = layers.BatchNorm(channels_in, dtype=dtype)
    self.conv1 = layers.Conv(channels_in, 4 * growth, 1, dtype=dtype)
    self.norm2 = layers.BatchNorm(4 * growth, dtype=dtype)
    self.conv2 = layers.Conv(4 * growth, growth, 3, dtype=dtype)

  def __call__(
    self, x_NHWC: jax.Array | layers.Measured, train: bool | str
  ) -> jax.Array | layers.Measured:
    # All layers of the block read these channels: measured once for all.
    x_NHWC = layers.measure(x_NHWC, train)
    y_NHWC = self.conv1(jax.nn.relu(self.norm1(x_NHWC, train)))
    y_NHWC = self.conv2(jax.nn.relu(self.norm2(y_NHWC, train)))
    return layers.concatenate([x_NHWC, layers.measure(y_NHWC, train)])

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return self.conv1.macs(size)[0] + self.conv2.macs(size)[0], size


class Transition(LayerModule):
  """Halves the channels and the size between two dense blocks."""

  def __init__(self, channels_in: int, dtype: jnp.dtype):
    self.channels = channels_in // 2
    self.norm = layers.BatchNorm(channels_in, dtype=dtype)
    self.conv = layers.Conv(channels_in, self.channels, 1, dtype=dtype)

  def __call__(self, x_NHWC: jax.Array, train: bool | str) -> jax.Array:
    height, width = layers.bare(x_NHWC).shape[1:3]
    if min(height, width) < 2:
      # The mean of no pixels would be NaN, and so all features after it.
      raise errors.UsageError(
        f"the images are too small for a DenseNet: a transition gets {height}"
        f" x {width} pixels and cannot halve them; 29 x 29 reach the end"
      )
    x_NHWC = jax.nn.relu(self.norm(x_NHWC, train))
    # Both are linear, so the order is free: pooled first, the convolution has
    # a quarter of the pixels.
    return self.conv(layers.average_pool(x_NHWC))

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    # Counted in the published order, convolution first, to compare with it.
    return self.conv.macs(size)[0], (size[0] // 2, size[1] // 2)


class FinalNorm(LayerModule):
  """The normalisation after the last block; its ReLU is the network's."""

  def __init__(self, channels: int, dtype: jnp.dtype):
    self.channels = channels
    self.norm5 = layers.BatchNorm(channels, dtype=dtype)

  def __call__(self, x_NHWC: jax.Array, train: bool | str) -> jax.Array:
    return self.norm5(x_NHWC, train)

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return 0, size


def layer_names(spec: Spec) -> list[str]:
  """Returns every layer's name in order, without the blocks' own names."""
  return [name for name, _ in _plan(spec)]


def aliases(spec: Spec) -> dict[str, str]:
  """Returns {dense block: its last layer}."""
  return {
    f"denseblock{b}": f"denseblock{b}.denselayer{depth}"
    for b, depth in enumerate(spec.depths, 1)
  }


def make_layers(
  spec: Spec, dtype: jnp.dtype, slim_after: str | None = None
) -> Iterator[tuple[str, LayerModule]]:
  """Yields (name, module) in order; what is not asked for is not built."""
  channels, growth = spec.width, spec.growth
  for name, kind in _plan(spec):
    match kind:
      case "stem":
        layer = Stem(channels, dtype)
      case "dense":
        layer = DenseLayer(channels, growth, dtype)
      case "transition":
        layer = Transition(channels, dtype)
      case _:
        layer = FinalNorm(channels, dtype)
    channels = layer.channels
    yield name, layer
    if name == slim_after:
      growth //= 2


def _plan(spec: Spec) -> Iterator[tuple[str, str]]:
  """Yields (layer name, kind of layer) in order."""
  yield "stem", "stem"
  for block, depth in enumerate(spec.depths, 1):
    for i in range(1, depth + 1):
      yield f"denseblock{block}.denselayer{i}", "dense"
    if block < len(spec.depths):
      yield f"transition{block}", "transition"
  yield "norm5", "norm"


# torch forbade dots inside module names after the DenseNets were published.
_OLD_DENSE_LAYER = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")


def _rename_old(names: Sequence[str]) -> dict[str, str]:
  return {name: _OLD_DENSE_LAYER.sub(r"\1\2", name) for name in names}


FAMILY = Family(
  name="densenet",
  networks=NETWORKS,
  layer_names=layer_names,
  aliases=aliases,
  make_layers=make_layers,
  ends=("transition", "norm"),
  layouts=(
    Layout(
      "conv0.weight", _rename_old, ("^classifier", "classifier", "^^fc_4")
    ),
    *children(("^classifier", "classifier")),
  ),
  head="classifier",
  prefix="features.",
  bare=("stem", "norm5"),
  head_bias=False,
  final_relu=True,
  compresses=True,
  assumed=(
    "max-pool in the stem, average pooling in the transitions, no"
    " anti-aliasing, ReLU, also after norm5"
  ),
)
