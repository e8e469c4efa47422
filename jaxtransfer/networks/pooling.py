"""Networks of bags: the features of a slide's tiles become its classes.

Every tile is embedded, the tiles are pooled to one vector, a linear head reads
that. A bag is padded to a length that others share; a mask says which of its
tiles are there, and the others count for nothing, to the last bit of the
attention.

Source: Ilse, Tomczak and Welling 2018, arXiv 1802.04712: attention (eq. 8) and
  gated attention (eq. 9); mean and max pooling are its baselines.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxtransfer import errors
from jaxtransfer.networks import functional, heads, layers


class Attention(NamedTuple):
  """What every tile of some bags counts.

  Attributes:
    weights: (B, N) float32, of each bag they sum to one; 0 where padded.
    scores: (B, N) float32, what they come from, not brought to any sum; 0
      where padded.
  """

  weights: jax.Array
  scores: jax.Array


class Read(NamedTuple):
  """All that a network says of some bags.

  Attributes:
    logits: (B, C) float32, of the bags.
    attention: of their tiles.
    tiles: (B, N, C) float32, what the network would say of a bag that held
      this tile alone.
  """

  logits: jax.Array
  attention: Attention
  tiles: jax.Array


class AttentionPooling(nnx.Module):
  """The mean of the tiles, weighted by softmax of w^T tanh(V h).

  Args:
    width: of the embedded tiles.
    hidden: of the attention.
    dropout: share of the hidden values that are dropped in training.
    dtype: what V h is computed in; None for float32.
  """

  def __init__(
    self, width: int, hidden: int, dropout: float, dtype: jnp.dtype | None
  ):
    self.tanh = heads.Linear(width, hidden, dtype)
    self.score = heads.Linear(hidden, 1)
    self.dropout = dropout

  def hidden(self, embedded: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Returns (B, N, hidden), what the score is a weighted sum of."""
    return _drop(jnp.tanh(self.tanh(embedded)), self.dropout, keys, 0)

  def attention(
    self, embedded: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> Attention:
    """Returns what every tile counts.

    Args:
      embedded: (B, N, width).
      mask: (B, N) bool, False where padded.
      keys: (B,) of what is dropped in training; None in inference.
    """
    scores = self.score(self.hidden(embedded, keys))[..., 0]
    return Attention(_softmax(scores, mask), jnp.where(mask, scores, 0))

  def __call__(
    self, embedded: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> jax.Array:
    """Returns (B, width), the bags; arguments as of `attention`."""
    return _weighted(self.attention(embedded, mask, keys).weights, embedded)


class GatedAttentionPooling(AttentionPooling):
  """As `AttentionPooling`, of w^T (tanh(V h) * sigmoid(U h))."""

  def __init__(
    self, width: int, hidden: int, dropout: float, dtype: jnp.dtype | None
  ):
    super().__init__(width, hidden, dropout, dtype)
    self.gate = heads.Linear(width, hidden, dtype)

  def hidden(self, embedded: jax.Array, keys: jax.Array | None) -> jax.Array:
    gate = jax.nn.sigmoid(self.gate(embedded))
    return super().hidden(embedded, keys) * _drop(gate, self.dropout, keys, 1)


class MeanPooling(nnx.Module):
  """The mean of the tiles; every tile counts the same, its score is 0."""

  def __init__(self, *_: object):
    pass

  def attention(
    self, embedded: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> Attention:
    scores = jnp.zeros(embedded.shape[:2])
    return Attention(_softmax(scores, mask), scores)

  def __call__(
    self, embedded: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> jax.Array:
    return _weighted(self.attention(embedded, mask).weights, embedded)


class MaxPooling(nnx.Module):
  """The largest value of every channel over the tiles.

  A tile counts by the share of channels in which it is the largest, equal ones
  sharing it; its score is that share.
  """

  def __init__(self, *_: object):
    pass

  def attention(
    self, embedded: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> Attention:
    there = mask[..., None]
    largest = there & (embedded == self(embedded, mask)[:, None])
    held = largest / jnp.maximum(largest.sum(1, keepdims=True), 1)
    shares = held.mean(-1)
    return Attention(shares, shares)

  def __call__(
    self, embedded: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> jax.Array:
    x_BNE = layers.widened(embedded)
    largest = jnp.where(mask[..., None], x_BNE, -jnp.inf).max(1)
    return jnp.where(mask.any(1)[:, None], largest, 0)


POOLINGS = {
  "attention": AttentionPooling,
  "gated_attention": GatedAttentionPooling,
  "mean": MeanPooling,
  "max": MaxPooling,
}


class BagNetwork(nnx.Module):
  """Embedding layers with ReLU, a pooling, and a linear head.

  Args:
    channels: of the tiles' features.
    num_classes: how many classes there are.
    pooling: a name of `POOLINGS`.
    embedding: width of each embedding layer; none leaves features as they are.
    attention: width of the attention's hidden layer.
    dropout: share of the values after each embedding layer that are dropped in
      training.
    attention_dropout: likewise in the attention's hidden layer.
    dtype: what embedding and attention are computed in; scores, weights, the
      pooled vector and logits are float32.

  Raises:
    UsageError: there is no such pooling.
  """

  def __init__(
    self,
    channels: int,
    num_classes: int,
    *,
    pooling: str,
    embedding: Sequence[int],
    attention: int,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    dtype: jnp.dtype = jnp.float32,
  ):
    if pooling not in POOLINGS:
      raise errors.UsageError(
        f"there is no pooling {pooling!r}{errors.nearest(pooling, POOLINGS)};"
        f" there are {', '.join(POOLINGS)}"
      )
    self.channels = channels
    self.num_classes = num_classes
    self.kind = pooling
    self.widths = tuple(embedding)
    self.hidden = attention
    self.dropout = dropout
    self.attention_dropout = attention_dropout
    narrow = None if dtype == jnp.float32 else jnp.dtype(dtype)
    widths = [channels, *embedding]
    self.embedding = nnx.List(
      [
        heads.Linear(before, after, narrow)
        for before, after in zip(widths[:-1], widths[1:], strict=True)
      ]
    )
    self.pooling = POOLINGS[pooling](
      widths[-1], attention, attention_dropout, narrow
    )
    self.head = heads.Linear(widths[-1], num_classes)

  @property
  def settings(self) -> dict[str, Any]:
    """What a network of the same parameters is built with, for JSON."""
    return {
      "channels": self.channels,
      "num_classes": self.num_classes,
      "pooling": self.kind,
      "embedding": list(self.widths),
      "attention": self.hidden,
      "dropout": self.dropout,
      "attention_dropout": self.attention_dropout,
    }

  def embed(
    self, features: jax.Array, keys: jax.Array | None = None
  ) -> jax.Array:
    """Returns (B, N, E), every tile for itself.

    Args:
      features: (B, N, channels), of any float type.
      keys: (B,) of what is dropped in training; None in inference.
    """
    x_BNE = features
    for i, layer in enumerate(self.embedding):
      x_BNE = _drop(jax.nn.relu(layer(x_BNE)), self.dropout, keys, 2 + i)
    return x_BNE

  def __call__(
    self,
    features: jax.Array,
    mask: jax.Array,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the logits of bags, (B, num_classes) float32.

    Args:
      features: (B, N, channels), of any float type.
      mask: (B, N) bool, False where padded. A bag without a tile is taken for
        one of zeros.
      keys: (B,) typed keys, one for each bag, of what is dropped in training;
        None in inference.
    """
    return self.head(self.pooling(self.embed(features, keys), mask, keys))

  def attention(self, features: jax.Array, mask: jax.Array) -> Attention:
    """Returns what every tile counts; arguments as of `__call__`."""
    return self.pooling.attention(self.embed(features), mask)

  def read(self, features: jax.Array, mask: jax.Array) -> Read:
    """Returns all that there is to say; arguments as of `__call__`."""
    x_BNE = self.embed(features)
    return Read(
      self.head(self.pooling(x_BNE, mask)),
      self.pooling.attention(x_BNE, mask),
      self.head(x_BNE),
    )


def dump(network: BagNetwork) -> dict[str, np.ndarray]:
  """Returns {name: float32 array}, as torch's Linear has them: (out, in).

  Args:
    network: with values.
  """
  _, params, _ = functional.split(network)
  return {
    _torch_name(name): np.ascontiguousarray(np.asarray(value).T)
    for name, value in params.items()
  }


def load(network: BagNetwork, tensors: Mapping[str, np.ndarray]) -> None:
  """Gives every parameter its value, in place.

  Args:
    network: with values or without.
    tensors: as `dump` returns them.

  Raises:
    ValueError: a name is missing or left over, or a shape differs; the network
      is as it was.
  """
  expected = shapes(network)
  found = {name: np.shape(value) for name, value in tensors.items()}
  if expected != found:
    different = sorted(set(expected.items()) ^ set(found.items()))
    raise ValueError(f"not of this network: {different[:3]}")
  for path, variable in nnx.to_flat_state(nnx.state(network)):
    value = tensors[_torch_name(".".join(map(str, path)))]
    variable.set_value(jnp.asarray(np.asarray(value, np.float32).T))


def shapes(network: BagNetwork) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} of what `dump` returns."""
  return {
    _torch_name(".".join(map(str, path))): tuple(reversed(variable.shape))
    for path, variable in nnx.to_flat_state(nnx.state(network))
  }


def randomise(network: BagNetwork, seed: int) -> None:
  """Gives every parameter the value that training begins with, in place.

  Every one is drawn from a generator seeded by (seed, its name).

  Args:
    network: with values or without.
    seed: decides all values.

  Source: torch.nn.Linear's constructor: uniform within 1 / sqrt(inputs), the
    bias too.
  """
  of_all = shapes(network)
  values = {}
  for name, shape in of_all.items():
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    inputs = of_all[name.replace(".bias", ".weight")][1]
    values[name] = generator.uniform(-1, 1, shape) / np.sqrt(inputs)
  load(network, values)


def _torch_name(name: str) -> str:
  return name.replace(".kernel", ".weight")


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the softmax over the tiles that are there; 0 for the others."""
  scores = jnp.where(mask, scores, -jnp.inf)
  top = lax.stop_gradient(scores.max(-1, keepdims=True))
  # Of a bag without tiles there is none.
  top = jnp.where(jnp.isfinite(top), top, 0)
  shares = jnp.where(mask, jnp.exp(scores - top), 0)
  return shares / jnp.maximum(shares.sum(-1, keepdims=True), 1e-30)


def _weighted(weights: jax.Array, embedded: jax.Array) -> jax.Array:
  return jnp.einsum(
    "bn,bne->be",
    weights,
    layers.widened(embedded),
    precision=lax.Precision.HIGHEST,
  )


def _drop(
  x_BNE: jax.Array, rate: float, keys: jax.Array | None, place: int
) -> jax.Array:
  """Drops values of every bag by its own key, and scales up the others.

  Which they are depends on the tile's place in the bag, and not on how many
  are padded behind it.

  Args:
    x_BNE: (B, N, E).
    rate: share that is dropped.
    keys: (B,); None in inference.
    place: a number for each place in the network where values are dropped.
  """
  if keys is None or not rate:
    return x_BNE

  def kept(key: jax.Array) -> jax.Array:
    key = jax.random.fold_in(key, place)
    return jax.random.bernoulli(key, 1 - rate, x_BNE.shape[1:])

  return jnp.where(jax.vmap(kept)(keys), x_BNE / (1 - rate), 0)
