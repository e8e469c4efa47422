"""ResNet, wide ResNet and ResNeXt as torchvision builds them.

Source: torchvision.models.resnet ("v1.5": the stride sits in the 3x3).
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer.networks import layers
from jaxtransfer.networks.family import Family, LayerModule, Layout, children


@dataclasses.dataclass(frozen=True)
class Spec:
  """What tells one ResNet from another.

  Attributes:
    depths: blocks in each of the four stages.
    bottleneck: 1x1-3x3-1x1 blocks instead of 3x3-3x3.
    groups: channel groups of a bottleneck's 3x3.
    width_per_group: channels of a group in the first stage.
  """

  depths: tuple[int, int, int, int]
  bottleneck: bool
  groups: int = 1
  width_per_group: int = 64


NETWORKS = {
  "resnet18": Spec((2, 2, 2, 2), bottleneck=False),
  "resnet34": Spec((3, 4, 6, 3), bottleneck=False),
  "resnet50": Spec((3, 4, 6, 3), bottleneck=True),
  "resnet101": Spec((3, 4, 23, 3), bottleneck=True),
  "resnet152": Spec((3, 8, 36, 3), bottleneck=True),
  "resnext50_32x4d": Spec(
    (3, 4, 6, 3), bottleneck=True, groups=32, width_per_group=4
  ),
  "wide_resnet50_2": Spec((3, 4, 6, 3), bottleneck=True, width_per_group=128),
}


class Stem(LayerModule):
  """7x7 convolution, normalisation, ReLU and max-pool: a quarter the size."""

  def __init__(self, dtype: jnp.dtype):
    self.channels = 64
    self.conv1 = layers.Conv(3, 64, 7, stride=2, dtype=dtype)
    self.bn1 = layers.BatchNorm(64, dtype=dtype)

  def __call__(self, x_NHWC: jax.Array, train: bool | str) -> jax.Array:
    x_NHWC = jax.nn.relu(self.bn1(self.conv1(x_NHWC), train))
    return layers.max_pool(x_NHWC)

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    macs, size = self.conv1.macs(size)
    return macs, layers.halved(size)


class Downsample(nnx.Module):
  """The shortcut of a block that changes size or width."""

  def __init__(
    self, channels_in: int, channels_out: int, stride: int, dtype: jnp.dtype
  ):
    self.conv = layers.Conv(
      channels_in, channels_out, 1, stride=stride, dtype=dtype
    )
    self.bn = layers.BatchNorm(channels_out, dtype=dtype)

  def __call__(self, x_NHWC: jax.Array, train: bool | str) -> jax.Array:
    return self.bn(self.conv(x_NHWC), train)


class Block(LayerModule):
  """A residual block: two 3x3, or 1x1-3x3-1x1, with its shortcut.

  Args:
    spec: the network's.
    channels_in: width of the input.
    planes: the stage's base width (64, 128, 256, 512), or half of it.
    stride: 2 in the first block of stages two to four.
    dtype: compute dtype.
  """

  def __init__(
    self,
    spec: Spec,
    channels_in: int,
    planes: int,
    stride: int,
    dtype: jnp.dtype,
  ):
    self.channels = planes * (4 if spec.bottleneck else 1)
    if spec.bottleneck:
      width = planes * spec.width_per_group // 64 * spec.groups
      plan = [
        (channels_in, width, 1, 1, 1),
        (width, width, 3, stride, spec.groups),
        (width, self.channels, 1, 1, 1),
      ]
    else:
      plan = [(channels_in, planes, 3, stride, 1), (planes, planes, 3, 1, 1)]
    self.depth = len(plan)
    for i, (wide_in, wide_out, size, step, groups) in enumerate(plan, 1):
      conv = layers.Conv(
        wide_in, wide_out, size, stride=step, groups=groups, dtype=dtype
      )
      setattr(self, f"conv{i}", conv)
      setattr(self, f"bn{i}", layers.BatchNorm(wide_out, dtype=dtype))
    self.downsample = (
      Downsample(channels_in, self.channels, stride, dtype)
      if stride != 1 or channels_in != self.channels
      else None
    )

  def __call__(self, x_NHWC: jax.Array, train: bool | str) -> jax.Array:
    y_NHWC = x_NHWC
    for i in range(1, self.depth + 1):
      y_NHWC = getattr(self, f"conv{i}")(y_NHWC)
      y_NHWC = getattr(self, f"bn{i}")(y_NHWC, train)
      if i < self.depth:
        y_NHWC = jax.nn.relu(y_NHWC)
    if self.downsample is not None:
      x_NHWC = self.downsample(x_NHWC, train)
    return jax.nn.relu(x_NHWC.astype(y_NHWC.dtype) + y_NHWC)

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    total = 0 if self.downsample is None else self.downsample.conv.macs(size)[0]
    for i in range(1, self.depth + 1):
      macs, size = getattr(self, f"conv{i}").macs(size)
      total += macs
    return total, size


def layer_names(spec: Spec) -> list[str]:
  """Returns every layer's name in order, without the stages' own names."""
  return ["stem"] + [
    f"layer{stage}.{i}"
    for stage, depth in enumerate(spec.depths, 1)
    for i in range(depth)
  ]


def aliases(spec: Spec) -> dict[str, str]:
  """Returns {stage: its last block}."""
  return {
    f"layer{stage}": f"layer{stage}.{depth - 1}"
    for stage, depth in enumerate(spec.depths, 1)
  }


def make_layers(
  spec: Spec, dtype: jnp.dtype, slim_after: str | None = None
) -> Iterator[tuple[str, LayerModule]]:
  """Yields (name, module) in order; what is not asked for is not built."""
  stem = Stem(dtype)
  yield "stem", stem
  slim = slim_after == "stem"
  channels = stem.channels
  for stage, depth in enumerate(spec.depths, 1):
    for i in range(depth):
      stride = 2 if stage > 1 and i == 0 else 1
      planes = 32 * 2**stage // (2 if slim else 1)
      block = Block(spec, channels, planes, stride, dtype)
      yield f"layer{stage}.{i}", block
      channels = block.channels
      slim = slim or slim_after == f"layer{stage}.{i}"


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


def _rename_hugging_face(names: Sequence[str]) -> dict[str, str]:
  renamed = {}
  for name in names:
    inner = name
    for pattern, replacement in _HUGGING_FACE:
      inner = re.sub(pattern, replacement, inner)
    if match := _HUGGING_FACE_LAYER.match(inner):
      stage, block, number, kind = match.groups()
      inside = ""
      if number is not None:
        kind = "conv" if kind == "convolution" else "bn"
        inside = f"{kind}{int(number) + 1}."
      rest = inner[match.end() :]
      inner = f"layer{int(stage) + 1}.{block}.{inside}{rest}"
    renamed[name] = inner
  return renamed


FAMILY = Family(
  name="resnet",
  networks=NETWORKS,
  layer_names=layer_names,
  aliases=aliases,
  make_layers=make_layers,
  ends=("layer",),
  layouts=(
    Layout("conv1.weight", heads=("fc",)),
    Layout(
      "embedder.embedder.convolution.weight",
      _rename_hugging_face,
      ("^classifier.1", "classifier.1"),
    ),
    *children(("fc",)),
  ),
  # torch numbers the two modules of a shortcut.
  modules={"downsample.conv": "downsample.0", "downsample.bn": "downsample.1"},
  fan="out",
  assumed=(
    "stride in the 3x3 convolutions, max-pool in the stem, no dilation, no"
    " anti-aliasing, ReLU"
  ),
)
