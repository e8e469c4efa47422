"""One step of training, as a pure function, and the state it works on.

What a batch is made of is the objective's affair: it turns numbers and inputs
into a loss. The step is the same for all of them: parts of a batch, devices,
the optimiser, what is kept, and the average.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxtransfer.networks.functional import Arrays, Numbers
from jaxtransfer.training import optimisers


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
    sums: () float32 each, the objective's since they were last read.
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


class Objective(Protocol):
  """What a training makes small."""

  @property
  def sums(self) -> tuple[str, ...]:
    """Names of what it adds up over examples.

    "loss" and "weight", whose quotient is the mean loss, and, where examples
    are decided right or wrong, "hits" and "decisions".
    """

  @property
  def apart(self) -> bool:
    """Whether devices have running statistics of their own; the mean stays."""

  def inputs(
    self, batch: Mapping[str, jax.Array], key: jax.Array, step: jax.Array
  ) -> tuple[Any, jax.Array]:
    """Returns what a batch's loss is computed from, and how much it counts.

    Args:
      batch: one device's part, B examples; the axis "data" joins the devices.
      key: of the run, typed.
      step: () int32, steps done.

    Returns:
      Arrays (B, ...), and (B,), what every example's loss counts in the mean.
    """

  def __call__(
    self,
    params: Arrays,
    statistics: Arrays,
    inputs: Any,
    kept: Collection[str],
  ) -> tuple[Arrays, Arrays]:
    """Returns the sums over some examples, and the statistics after them.

    Args:
      params: all of them.
      statistics: running ones.
      inputs: of these examples.
      kept: names of parameters that are not trained.
    """


@dataclasses.dataclass(frozen=True)
class Loss:
  """Cross-entropy of logits against rows of a table of targets.

  One label: softmax; row k of the table is one at class k. Several labels:
  a sigmoid each; a target is 1, 0, or NaN where it is missing.

  Attributes:
    targets: (K, C) float32, what label k asks for.
    multilabel: whether an image may have several labels.
    weights: (C,) float32. One label: of an image of that class. Several: of a
      positive against a negative.
    smoothing: share of the target that is spread over all classes, or, with
      several labels, over yes and no.

  Source: torch.nn.CrossEntropyLoss(weight, label_smoothing) and
    torch.nn.BCEWithLogitsLoss(pos_weight).
  """

  targets: np.ndarray
  multilabel: bool
  weights: np.ndarray
  smoothing: float

  def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns every image's loss, (N,), summed over its labels.

    Args:
      logits: (N, C) float32.
      labels: (N,) int32, rows of `targets`.
    """
    targets, _ = self._known(labels)
    if self.multilabel:
      weights = self._label_weights(labels)
      targets = targets * (1 - self.smoothing) + self.smoothing / 2
      losses = -(
        self.weights * targets * jax.nn.log_sigmoid(logits)
        + (1 - targets) * jax.nn.log_sigmoid(-logits)
      )
      return (weights * losses).sum(-1)
    share = self.smoothing / targets.shape[-1]
    targets = targets * (1 - self.smoothing) + share
    return -(targets * self.weights * jax.nn.log_softmax(logits)).sum(-1)

  def weight(self, labels: jax.Array) -> jax.Array:
    """Returns what every image's loss counts in the mean, (N,).

    Args:
      labels: (N,) int32; one below zero has no weight.
    """
    there = (labels >= 0).astype(jnp.float32)
    if self.multilabel:
      return there * self._label_weights(labels).sum(-1)
    return there * (self._known(labels)[0] * self.weights).sum(-1)

  def hits(
    self, logits: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns right decisions and decisions of every image, (N,) each."""
    targets, known = self._known(labels)
    if self.multilabel:
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
  """What a step does with a gradient.

  Attributes:
    optimiser: how parameters move.
    schedule: share of the peak learning rate at a step.
    rate: a parameter's name -> its share of the learning rate; 0 where it is
      kept as it is.
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

  optimiser: optimisers.Optimiser
  schedule: optax.Schedule
  rate: Callable[[str], float]
  accumulate: int
  average: float

  def __post_init__(self):
    optimisers.check_range("accumulate", self.accumulate, least=1)
    optimisers.check_range("average", self.average, least=0, below=1)


def first_state(
  objective: Objective,
  recipe: Recipe,
  params: Arrays,
  statistics: Arrays,
  seed: int,
) -> State:
  """Returns the state before the first step.

  Args:
    objective: what is made small.
    recipe: which parameters are trained, and how.
    params: as training begins.
    statistics: likewise.
    seed: of all that is random in the steps.
  """
  trained = {n: v for n, v in params.items() if recipe.rate(n)}
  state = State(
    step=jnp.zeros((), jnp.int32),
    params=trained,
    kept={n: v for n, v in params.items() if n not in trained},
    statistics=statistics,
    optimiser=recipe.optimiser.direction(recipe.rate).init(trained),
    average={**trained, **statistics} if recipe.average else {},
    scale=jnp.ones((), jnp.float32),
    sums=no_sums(objective),
    key=jax.random.key_data(jax.random.key(seed)),
  )
  # The step consumes its state: no array may be the network's own or be there
  # twice.
  return jax.tree.map(jnp.copy, state)


def no_sums(objective: Objective) -> Arrays:
  """Returns the sums of no example."""
  return {name: jnp.zeros((), jnp.float32) for name in objective.sums}


def make_step(
  objective: Objective, recipe: Recipe
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, Arrays]]:
  """Returns the step, to be compiled by `parallel.Devices.compile_step`.

  A state may hold parameters among the trained ones that this recipe keeps as
  they are. So a part can be kept at first and trained later, by two steps that
  share a state.

  Args:
    objective: what is made small.
    recipe: what the step does.

  Returns:
    (state, batch) -> (state, {"loss": (), mean over the batch}), each device
    with its part of the batch.
  """
  direction = recipe.optimiser.direction(recipe.rate)

  def step(
    state: State, batch: Mapping[str, jax.Array]
  ) -> tuple[State, Arrays]:
    key = jax.random.wrap_key_data(state.key)
    inputs, weights = objective.inputs(batch, key, state.step)
    # The mean is over all devices and parts, so its weight comes before.
    total = jnp.maximum(lax.psum(weights.sum(), "data"), 1e-12)
    kept = {n for n in (*state.params, *state.kept) if not recipe.rate(n)}

    def part_loss(
      params: Arrays, statistics: Arrays, inputs: Any
    ) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
      params = {
        name: lax.stop_gradient(value) if name in kept else value
        for name, value in params.items()
      }
      sums, statistics = objective(
        {**params, **state.kept}, statistics, inputs, kept
      )
      return sums["loss"] / total, (statistics, sums)

    gradient_of = jax.value_and_grad(part_loss, has_aux=True)

    def part(
      carry: tuple[Arrays, Arrays, Arrays], inputs: Any
    ) -> tuple[tuple[Arrays, Arrays, Arrays], None]:
      statistics, gradient, sums = carry
      (_, (statistics, own_sums)), own = gradient_of(
        state.params, statistics, inputs
      )
      gradient, sums = jax.tree.map(jnp.add, (gradient, sums), (own, own_sums))
      return (statistics, gradient, sums), None

    carry = (
      state.statistics,
      jax.tree.map(jnp.zeros_like, state.params),
      no_sums(objective),
    )
    if recipe.accumulate == 1:
      carry, _ = part(carry, inputs)
    else:
      inputs = jax.tree.map(
        lambda x: x.reshape(recipe.accumulate, -1, *x.shape[1:]), inputs
      )
      carry, _ = lax.scan(part, carry, inputs)
    statistics, gradient, sums = carry
    gradient, sums = lax.psum((gradient, sums), "data")
    if objective.apart:
      statistics = lax.pmean(statistics, "data")

    tree, optimiser = direction.update(gradient, state.optimiser, state.params)
    moves = cast(Arrays, tree)  # optax says any tree; it is the gradient's
    share = recipe.schedule(state.step) * state.scale
    rate = {
      name: recipe.optimiser.learning_rate * recipe.rate(name)
      for name in state.params
    }
    params = {
      name: value if name in kept else value - rate[name] * share * moves[name]
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


def trained_numbers(state: State) -> Numbers:
  """Returns the numbers to judge and keep, averaged ones where there are.

  Args:
    state: after any step.

  Returns:
    All parameters and the statistics, as `functional.merge` takes them.
  """
  params = {**state.kept, **state.params}
  return (
    {name: state.average.get(name, x) for name, x in params.items()},
    {name: state.average.get(name, x) for name, x in state.statistics.items()},
  )
