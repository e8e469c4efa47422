"""A network as a chain of named layers, cut where asked."""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtransfer import errors
from jaxtransfer.networks import heads
from jaxtransfer.networks.family import Family, LayerModule
from jaxtransfer.networks.layers import bare, widened


class Network(nnx.Module):
  """Named layers in order, global average pooling, and perhaps a head.

  Args:
    name: the zoo's name.
    family: whose names and initialiser hold.
    layers: (layer name, module) in order, already cut.
    aliases: a stage's name -> the name of its last layer.
    relu: whether a ReLU follows the last layer before pooling, as after an
      uncut DenseNet's norm5.
    num_classes: width of the linear head; None for pooled features.
    dtype: what the layers compute in.
    flatten: side in pixels of the images whose whole last map the head reads;
      None for a head on the pooled features.
    slim_after: the last layer of full width; None where all are.
  """

  def __init__(
    self,
    name: str,
    family: Family,
    layers: Sequence[tuple[str, LayerModule]],
    aliases: Mapping[str, str],
    relu: bool,
    num_classes: int | None,
    dtype: jnp.dtype,
    flatten: int | None = None,
    slim_after: str | None = None,
  ):
    self.name = name
    self.family = family
    self.dtype = dtype
    self.layer_names = tuple(n for n, _ in layers)
    self.layers = nnx.List([layer for _, layer in layers])
    self.aliases = tuple(
      (alias, layer)
      for alias, layer in aliases.items()
      if layer in self.layer_names
    )
    self.relu = relu
    self.channels = layers[-1][1].channels
    self.flatten = flatten
    self.slim_after = slim_after
    height, width = (1, 1) if flatten is None else self._map_size(flatten)
    self.head = (
      None
      if num_classes is None
      else heads.Linear(self.channels * height * width, num_classes)
    )

  def __call__(
    self,
    images: jax.Array,
    *,
    train: bool | str = False,
    kept: Collection[int] = (),
  ) -> jax.Array:
    """Returns pooled features, or logits where the network has a head.

    Args:
      images: (N, H, W, 3) float, normalised.
      train: normalise with the batch's statistics and update the running ones;
        the name of a mapped axis takes those of the batch over all its devices.
      kept: which layers, counted from 0, run as in inference all the same.

    Returns:
      (N, channels) or (N, num_classes) float32.
    """
    x_NHWC = images
    for i, layer in enumerate(self.layers):
      x_NHWC = layer(x_NHWC, False if i in kept else train)
    x_NHWC = bare(x_NHWC)
    if self.relu:
      x_NHWC = jax.nn.relu(x_NHWC)
    if self.head is not None and self.flatten is not None:
      # In torch's order, channels first: the head's numbers are then torch's.
      x_NCHW = x_NHWC.transpose(0, 3, 1, 2)
      return self.head(x_NCHW.reshape(len(x_NCHW), -1))
    features = average(x_NHWC)
    return features if self.head is None else self.head(features)

  def taps(
    self,
    images: jax.Array,
    at: Sequence[str],
    *,
    pool: bool = True,
    train: bool = False,
  ) -> dict[str, jax.Array]:
    """Returns the outputs of several layers from one forward pass.

    Args:
      images: (N, H, W, 3) float, normalised.
      at: layer names; nothing beyond the deepest is computed.
      pool: average over height and width.
      train: as in `__call__`.

    Returns:
      {name: (N, C) float32}, or {name: (N, h, w, C)} where pool is False, in
      the order of `at`.

    Raises:
      UsageError: a name is not a layer of this (perhaps cut) network.
    """
    layer_of = {tap: self.resolve(tap) for tap in at}
    missing = set(layer_of.values())
    outputs: dict[str, jax.Array] = {}
    x_NHWC = images
    for name, layer in zip(self.layer_names, self.layers, strict=True):
      if not missing:
        break
      x_NHWC = layer(x_NHWC, train)
      if name in missing:
        output_NHWC = bare(x_NHWC)
        outputs[name] = average(output_NHWC) if pool else output_NHWC
        missing.remove(name)
    return {tap: outputs[name] for tap, name in layer_of.items()}

  def check_size(self, side: int) -> None:
    """Follows the shapes of an image through the network, without computing.

    Args:
      side: of the image, pixels.

    Raises:
      UsageError: the image is too small.
    """
    jax.eval_shape(self, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))

  def _map_size(self, side: int) -> tuple[int, int]:
    size = (side, side)
    for layer in self.layers:
      size = layer.macs(size)[1]
    return size

  def resolve(self, tap: str) -> str:
    """Returns the layer a tap names: itself, or the last layer of a stage.

    Raises:
      UsageError: no such layer in this network.
    """
    layer = dict(self.aliases).get(tap, tap)
    if layer not in self.layer_names:
      aliases = dict(self.aliases)
      raise unknown_layer(self.name, tap, self.layer_names, aliases)
    return layer


def stage_names(
  names: Sequence[str], aliases: Mapping[str, str]
) -> tuple[str, ...]:
  """Returns the ends of a network's stages, in order.

  Args:
    names: of its layers.
    aliases: a stage's name -> the name of its last layer.
  """
  stages = {layer: alias for alias, layer in aliases.items()}
  return tuple(
    stages.get(layer, layer)
    for layer in names
    if "." not in layer or layer in stages
  )


def unknown_layer(
  network: str, tap: str, names: Sequence[str], aliases: Mapping[str, str]
) -> errors.UsageError:
  """Returns the error for a layer name that a network does not have.

  It says how this network's layers are called, because most often the name is
  that of another family.

  Args:
    network: its name.
    tap: which it has not.
    names: of its layers.
    aliases: as for `stage_names`.
  """
  inside = [name for name in names if "." in name][:1]
  return errors.UsageError(
    f"{network} has no layer {tap!r}{errors.nearest(tap, [*aliases, *names])}"
    f" (its stages are {', '.join(stage_names(names, aliases))}"
    + "".join(f"; in them, layers such as {name}" for name in inside)
    + ")"
  )


def average(x_NHWC: jax.Array) -> jax.Array:
  """Returns the mean over height and width, (N, C) float32 (or wider)."""
  return widened(x_NHWC).mean((1, 2))
