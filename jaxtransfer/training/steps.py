"""One step of training, as a pure function, and the state it works on.

A network's numbers are flat dicts of arrays, `layers.3.conv1.kernel` to
`head.bias`: what is trained, what is kept as it is, and running statistics.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxtransfer import errors
from jaxtransfer.data import preprocess
from jaxtransfer.networks.network import Network
from jaxtransfer.training import augment, optimisers

Arrays = dict[str, jax.Array]

BATCH_NORM = ("train", "train_per_device", "eval", "frozen")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that a step changes, and what it must remember: a checkpoint.

  Attributes:
    step: () int32, steps done.
    params: what is trained.
    kept: parameters that are not.
    statistics: running means and variances.
    optimiser: optax's state.
    average: exponential moving average of `params` and `statistics`; empty
      without.
    scale: () float32, what plateau multiplies the learning rate by.
    sums: () float32 each since they were last read: weighted losses, their
      weights, hits, and decisions that could hit.
    key: (2,) uint32, of the run.
  """

  step: jax.Array
  params: Arrays
  kept: Arrays
  statistics: Arrays
  optimiser: Any
  average: Arrays
  scale: jax.Array
  sums: Arrays
  key: jax.Array


@dataclasses.dataclass(frozen=True)
class Loss:
  """Cross-entropy of logits against rows of a table of targets.

  One label: softmax; row k of the table is one at class k. Several labels:
  a sigmoid each; a target is 1, 0, or NaN where it is missing.

  Attributes:
    targets: (K, C) float32, what label k asks for.
    many: whether an image may have several labels.
    weights: (C,) float32. One label: of an image of that class. Several: of a
      positive against a negative.
    smoothing: share of the target that is spread over all classes, or, with
      several labels, over yes and no.

  Source: torch.nn.CrossEntropyLoss(weight, label_smoothing) and
    torch.nn.BCEWithLogitsLoss(pos_weight).
  """

  targets: np.ndarray
  many: bool
  weights: np.ndarray
  smoothing: float

  def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns every image's loss, (N,), summed over its labels.

    Args:
      logits: (N, C) float32.
      labels: (N,) int32, rows of `targets`.
    """
    targets, _ = self._known(labels)
    if self.many:
      weights = self._label_weights(labels)
      targets = targets * (1 - self.smoothing) + self.smoothing / 2
      losses = -(
        self.weights * targets * jax.nn.log_sigmoid(logits)
        + (1 - targets) * jax.nn.log_sigmoid(-logits)
      )
      return (weights * losses).sum(-1)
    share = self.smoothing / targets.shape[-1]
    targets = targets * (1 - self.smoothing) + share
    return -(self.weights * targets * jax.nn.log_softmax(logits)).sum(-1)

  def weight(self, labels: jax.Array) -> jax.Array:
    """Returns what every image's loss counts in the mean, (N,).

    Args:
      labels: (N,) int32; one below zero has no weight.
    """
    there = (labels >= 0).astype(jnp.float32)
    if self.many:
      return there * self._label_weights(labels).sum(-1)
    return there * (self._known(labels)[0] * self.weights).sum(-1)

  def hits(
    self, logits: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns right decisions and decisions of every image, (N,) each."""
    targets, known = self._known(labels)
    if self.many:
      right = known & ((logits > 0) == (targets > 0.5))
      return right.sum(-1), known.sum(-1)
    right = logits.argmax(-1) == targets.argmax(-1)
    return right.astype(jnp.int32), jnp.ones_like(labels)

  def _known(self, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    targets = jnp.asarray(self.targets)[labels.clip(0)]
    known = ~jnp.isnan(targets)
    return jnp.where(known, targets, 0), known

  def _label_weights(self, labels: jax.Array) -> jax.Array:
    return self._known(labels)[1].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a step does.

  Attributes:
    loss: what is made small.
    optimiser: how.
    schedule: share of the peak learning rate at a step.
    augmentation: what happens to the images.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    frozen: how many of the network's first layers are kept as they are, in
      inference mode.
    batch_norm: of the other layers. "train": statistics of the batch over all
      devices; "train_per_device": of each device's part; "eval": the running
      ones; "frozen": those, with scale and bias kept too.
    accumulate: parts in which a batch is computed, one after the other, for
      a smaller memory; each part has its own batch statistics.
    average: decay of the moving average of parameters and statistics; 0 for
      none. After t steps it is at most (1 + t) / (10 + t), so that the first
      parameters, a random head among them, are soon forgotten.

  Raises:
    UsageError: a value out of range.

  Source: the average's decay: tf.train.ExponentialMovingAverage(num_updates);
    that running statistics are averaged too: timm's ModelEma.
  """

  loss: Loss
  optimiser: optimisers.Optimiser
  schedule: Callable[[jax.Array], jax.Array]
  augmentation: augment.Augmentation
  mean: Sequence[float]
  std: Sequence[float]
  frozen: int
  batch_norm: str
  accumulate: int
  average: float

  def __post_init__(self):
    optimisers.check_one_of("batch_norm", self.batch_norm, BATCH_NORM)
    optimisers.check_range("accumulate", self.accumulate, least=1)
    optimisers.check_range("average", self.average, least=0, below=1)


def take_apart(network: Network) -> tuple[nnx.GraphDef, Arrays, Arrays]:
  """Returns a network's structure, parameters and statistics.

  Args:
    network: with values.
  """
  graph, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
  return graph, _flat(params), _flat(statistics)


def put_together(
  graph: nnx.GraphDef, params: Arrays, statistics: Arrays
) -> Network:
  """Returns the network that `take_apart` took apart, with these numbers."""
  variables = [
    (_path(name), kind(value))
    for kind, arrays in ((nnx.Param, params), (nnx.BatchStat, statistics))
    for name, value in arrays.items()
  ]
  return nnx.merge(graph, nnx.from_flat_state(variables))


def _flat(state: nnx.State) -> Arrays:
  return {
    ".".join(map(str, path)): variable[...]
    for path, variable in nnx.to_flat_state(state)
  }


def _path(name: str) -> tuple[str | int, ...]:
  return tuple(int(p) if p.isdigit() else p for p in name.split("."))


def first_state(network: Network, recipe: Recipe, seed: int) -> State:
  """Returns the state before the first step.

  Args:
    network: as training begins.
    recipe: what is trained of it, and how.
    seed: of all that is random in the steps.

  Raises:
    UsageError: nothing is left to train.
  """
  if network.head is None:
    raise errors.UsageError("a network without a head cannot be trained")
  _, params, statistics = take_apart(network)
  trained = {n: v for n, v in params.items() if _is_trained(n, recipe)}
  state = State(
    step=jnp.zeros((), jnp.int32),
    params=trained,
    kept={n: v for n, v in params.items() if n not in trained},
    statistics=statistics,
    optimiser=recipe.optimiser.direction().init(trained),
    average={**trained, **statistics} if recipe.average else {},
    scale=jnp.ones((), jnp.float32),
    sums=no_sums(),
    key=jax.random.key_data(jax.random.key(seed)),
  )
  # The step consumes its state: no array may be the network's own or be there
  # twice.
  return jax.tree.map(jnp.copy, state)


def _is_trained(name: str, recipe: Recipe) -> bool:
  path = _path(name)
  if path[0] == "head":
    return True
  if path[1] < recipe.frozen:
    return False
  # A trunk's convolutions have no bias: both are BatchNorm's.
  return recipe.batch_norm != "frozen" or path[-1] not in ("scale", "bias")


def no_sums() -> Arrays:
  """Returns the sums of no image."""
  names = ("loss", "weight", "hits", "decisions")
  return {name: jnp.zeros((), jnp.float32) for name in names}


def make_step(
  graph: nnx.GraphDef, recipe: Recipe
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, Arrays]]:
  """Returns the step, to be compiled by `parallel.Devices.compile_step`.

  Args:
    graph: the network's structure.
    recipe: what the step does.

  Returns:
    (state, batch) -> (state, {"loss": (), mean over the batch}), each device
    with its part of the batch: image (B, S, S, 3) uint8, row and label (B,)
    int32, mask (B,) bool. Images without mask count for nothing.
  """
  direction = recipe.optimiser.direction()
  train: bool | str = {"train": "data", "train_per_device": True}.get(
    recipe.batch_norm, False
  )

  def step(
    state: State, batch: Mapping[str, jax.Array]
  ) -> tuple[State, Arrays]:
    key = jax.random.wrap_key_data(state.key)
    keys = augment.keys_of(key, state.step, batch["row"])
    labels = jnp.where(batch["mask"], batch["label"], -1)
    weights = recipe.loss.weight(labels)
    # The mean is over all devices and parts, so its weight comes before.
    total = jnp.maximum(lax.psum(weights.sum(), "data"), 1e-12)

    def part_loss(
      params: Arrays,
      statistics: Arrays,
      pixels: jax.Array,
      keys: jax.Array,
      labels: jax.Array,
    ) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
      pixels = recipe.augmentation(pixels, keys)
      x_NHWC = preprocess.preprocess(pixels, recipe.mean, recipe.std)
      network = put_together(graph, {**params, **state.kept}, statistics)
      logits = network(x_NHWC, train=train, frozen=recipe.frozen)
      there = (labels >= 0).astype(jnp.float32)
      hits, decisions = recipe.loss.hits(logits, labels)
      sums = {
        "loss": (there * recipe.loss(logits, labels)).sum(),
        "weight": recipe.loss.weight(labels).sum(),
        "hits": (there * hits).sum(),
        "decisions": (there * decisions).sum(),
      }
      return sums["loss"] / total, (take_apart(network)[2], sums)

    gradient_of = jax.value_and_grad(part_loss, has_aux=True)

    def part(
      carry: tuple[Arrays, Arrays, Arrays], images: tuple[jax.Array, ...]
    ) -> tuple[tuple[Arrays, Arrays, Arrays], None]:
      statistics, gradient, sums = carry
      (_, (statistics, own_sums)), own = gradient_of(
        state.params, statistics, *images
      )
      gradient, sums = jax.tree.map(jnp.add, (gradient, sums), (own, own_sums))
      return (statistics, gradient, sums), None

    images = (batch["image"], keys, labels)
    carry = (
      state.statistics,
      jax.tree.map(jnp.zeros_like, state.params),
      no_sums(),
    )
    if recipe.accumulate == 1:
      carry, _ = part(carry, images)
    else:
      images = jax.tree.map(
        lambda x: x.reshape(recipe.accumulate, -1, *x.shape[1:]), images
      )
      carry, _ = lax.scan(part, carry, images)
    statistics, gradient, sums = carry
    gradient, sums = lax.psum((gradient, sums), "data")
    if recipe.batch_norm == "train_per_device":
      statistics = lax.pmean(statistics, "data")

    moves, optimiser = direction.update(gradient, state.optimiser, state.params)
    share = recipe.schedule(state.step) * state.scale
    rates = recipe.optimiser.rates(state.params)
    params = {
      name: value - rates[name] * share * moves[name]
      for name, value in state.params.items()
    }
    decay = jnp.minimum(recipe.average, (1 + state.step) / (10 + state.step))
    now = {**params, **statistics}
    # Written so that what does not move stays bit by bit.
    average = {
      name: value + (1 - decay) * (now[name] - value)
      for name, value in state.average.items()
    }
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      statistics=statistics,
      optimiser=optimiser,
      average=average,
      sums=jax.tree.map(jnp.add, state.sums, sums),
    )
    return state, {"loss": sums["loss"] / total}

  return step


def trained_numbers(state: State) -> tuple[Arrays, Arrays]:
  """Returns the numbers to judge and keep, averaged ones where there are.

  Args:
    state: after any step.

  Returns:
    All parameters and the statistics, as `put_together` takes them.
  """
  params = {**state.kept, **state.params}
  return (
    {name: state.average.get(name, x) for name, x in params.items()},
    {name: state.average.get(name, x) for name, x in state.statistics.items()},
  )


def make_predict(
  graph: nnx.GraphDef, mean: Sequence[float], std: Sequence[float]
) -> Callable[[tuple[Arrays, Arrays], jax.Array], jax.Array]:
  """Returns ((params, statistics), (N, S, S, 3) uint8) -> (N, C) logits."""

  def predict(numbers: tuple[Arrays, Arrays], pixels: jax.Array) -> jax.Array:
    x_NHWC = preprocess.preprocess(pixels, mean, std)
    return put_together(graph, *numbers)(x_NHWC)

  return predict
