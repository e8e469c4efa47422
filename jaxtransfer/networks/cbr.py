"""The small CBR networks: convolution, BatchNorm, ReLU, a few times over.

Source: Raghu et al. 2019, Transfusion, arXiv:1902.07208, whose appendix lists
widths and kernels and whose first table the parameters: 8,532,480, 8,432,128,
2,108,672 and 1,076,480. Where the two disagree the table holds, as it was
counted on what was run: for CBR-Tiny the list says 64 to 512 channels, which
would be 4.3 million parameters, and for LargeW and Small a first kernel of 7,
not 5. The table counts one input channel, one BatchNorm parameter per channel
and no head; here images are RGB, BatchNorm has scale and shift, and no
convolution has a bias. The source gives no padding; here, as in the zoo's
other networks, convolutions keep the size and pooling rounds it up, so that
small images reach the end. No weights are published for any of them.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxtransfer.networks import layers
from jaxtransfer.networks.family import Family, LayerModule, Layout


@dataclasses.dataclass(frozen=True)
class Spec:
  """What tells one CBR network from another.

  Attributes:
    widths: channels of each block.
    first: side of the first block's kernel.
    size: side of the other blocks' kernels.
    last_pool: whether the last block ends in a max-pool as the others do.
  """

  widths: tuple[int, ...]
  first: int
  size: int
  last_pool: bool = True


NETWORKS = {
  "cbr_larget": Spec((32, 64, 128, 256, 512), 7, 7, last_pool=False),
  "cbr_largew": Spec((64, 128, 256, 512), 5, 7),
  "cbr_small": Spec((32, 64, 128, 256), 5, 7),
  "cbr_tiny": Spec((32, 64, 128, 256), 5, 5),
}


class Block(LayerModule):
  """Convolution, normalisation, ReLU and perhaps a max-pool."""

  def __init__(
    self,
    channels_in: int,
    channels: int,
    size: int,
    pool: bool,
    dtype: jnp.dtype,
  ):
    self.channels = channels
    self.pool = pool
    self.conv = layers.Conv(channels_in, channels, size, dtype=dtype)
    self.bn = layers.BatchNorm(channels, dtype=dtype)

  def __call__(self, x_NHWC: jax.Array, train: bool | str) -> jax.Array:
    x_NHWC = jax.nn.relu(self.bn(self.conv(x_NHWC), train))
    return layers.max_pool(x_NHWC) if self.pool else x_NHWC

  def macs(self, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    macs, size = self.conv.macs(size)
    return macs, layers.halved(size) if self.pool else size


def layer_names(spec: Spec) -> list[str]:
  """Returns every block's name in order."""
  return [f"block{i}" for i, _ in enumerate(spec.widths, 1)]


def aliases(spec: Spec) -> dict[str, str]:
  """Returns no alias: every layer is a stage of its own."""
  return {}


def make_layers(
  spec: Spec, dtype: jnp.dtype, slim_after: str | None = None
) -> Iterator[tuple[str, LayerModule]]:
  """Yields (name, module) in order; what is not asked for is not built."""
  channels, slim = 3, False
  for i, name in enumerate(layer_names(spec)):
    width = spec.widths[i] // 2 if slim else spec.widths[i]
    size = spec.size if i else spec.first
    pool = spec.last_pool or i + 1 < len(spec.widths)
    yield name, Block(channels, width, size, pool, dtype)
    channels = width
    slim = slim or name == slim_after


FAMILY = Family(
  name="cbr",
  networks=NETWORKS,
  layer_names=layer_names,
  aliases=aliases,
  make_layers=make_layers,
  ends=("block",),
  layouts=(Layout("block1.conv.weight", heads=("fc",)),),
  small=True,
)
