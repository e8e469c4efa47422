"""How far and where parameters move: optimisers and learning-rate schedules."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import errors
from jaxtransfer.errors import check_range
from jaxtransfer.networks import functional

OPTIMISERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "one_cycle", "plateau")
# torch's ReduceLROnPlateau: an improvement smaller than this share is none.
_PLATEAU_THRESHOLD = 1e-4


@dataclasses.dataclass(frozen=True)
class Optimiser:
  """An optimiser's settings.

  Attributes:
    name: "adam" and "sgd" (Nesterov) add the weight decay to the gradient, as
      torch's do; "adamw" takes it off the weights.
    learning_rate: at the schedule's peak, of what has the whole rate.
    momentum: of sgd.
    weight_decay: of kernels; biases and normalisation have none.
    clip_norm: largest norm of the gradient of all parameters; 0 for no limit.

  Raises:
    UsageError: a value out of range.
  """

  name: str
  learning_rate: float
  momentum: float
  weight_decay: float
  clip_norm: float

  def __post_init__(self):
    check_one_of("optimiser.name", self.name, OPTIMISERS)
    check_range("optimiser.learning_rate", self.learning_rate, above=0)
    check_range("optimiser.momentum", self.momentum, least=0, below=1)
    check_range("optimiser.weight_decay", self.weight_decay, least=0)
    check_range("optimiser.clip_norm", self.clip_norm, least=0)

  def direction(
    self, rate: Callable[[str], float]
  ) -> optax.GradientTransformation:
    """Returns gradient -> direction; the step takes the rate times it away.

    Args:
      rate: of every parameter by its name; what has none does not decay.
    """
    clip = (
      optax.clip_by_global_norm(self.clip_norm)
      if self.clip_norm
      else optax.identity()
    )

    def decayed(params: Mapping[str, jax.Array]) -> dict[str, bool]:
      return {n: n.endswith(".kernel") and rate(n) > 0 for n in params}

    decay = optax.add_decayed_weights(self.weight_decay, mask=decayed)
    if not self.weight_decay:
      decay = optax.identity()
    if self.name == "adamw":
      return optax.chain(clip, optax.scale_by_adam(), decay)
    if self.name == "adam":
      return optax.chain(clip, decay, optax.scale_by_adam())
    if not self.momentum:
      return optax.chain(clip, decay)
    return optax.chain(clip, decay, optax.trace(self.momentum, nesterov=True))


def layer_rates(
  first: int, backbone: float, *, norms: bool = True
) -> Callable[[str], float]:
  """Returns the rates of a network that is trained from some layer on.

  Args:
    first: which layer that is, counted from 0; those before it are kept as
      they are.
    backbone: rate of the layers, as a share of that of all else: the head.
    norms: whether the layers' normalisation is trained.

  Returns:
    A parameter's name, as `networks.functional` gives it -> its share of the
    learning rate; 0 where it is kept as it is.
  """

  def rate(name: str) -> float:
    layer = functional.layer_of(name)
    if layer is None:
      return 1.0
    # The layers' convolutions have no bias: both are normalisation's.
    if layer < first or not norms and name.endswith((".scale", ".bias")):
      return 0.0
    return backbone

  return rate


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How the learning rate changes.

  Attributes:
    name: "constant"; "cosine" to zero, after a linear warm-up; "one_cycle" up
      from 1/25 in the first 30 % of the steps and down to 1e-4 / 25, both as
      cosines; "plateau" by `factor` when the validation loss has not fallen
      for more than `patience` epochs.
    warmup_epochs: of cosine.
    factor: of plateau.
    patience: of plateau, epochs.
    floor: of plateau: training ends when the learning rate falls below it.

  Raises:
    UsageError: a value out of range.
  """

  name: str
  warmup_epochs: float
  factor: float
  patience: int
  floor: float

  def __post_init__(self):
    check_one_of("schedule.name", self.name, SCHEDULES)
    check_range("schedule.warmup_epochs", self.warmup_epochs, least=0)
    check_range("schedule.factor", self.factor, above=0, below=1)
    check_range("schedule.patience", self.patience, least=0)
    check_range("schedule.floor", self.floor, least=0)

  def multiplier(self, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns step -> share of the peak learning rate.

    Args:
      steps: of the whole training.
      steps_per_epoch: for the warm-up.

    Raises:
      UsageError: the warm-up is not shorter than the training.
    """
    if self.name == "cosine":
      warmup = round(self.warmup_epochs * steps_per_epoch)
      if warmup >= steps:
        raise errors.UsageError(
          f"config.schedule.warmup_epochs is {self.warmup_epochs}: all of the"
          " training; give fewer or more epochs"
        )
      return optax.warmup_cosine_decay_schedule(
        # The first step moves: at zero it would be wasted.
        1 / (warmup + 1),
        1.0,
        warmup,
        steps,
      )
    if self.name == "one_cycle":
      # Below a few steps optax's cycle has an empty half, which is no number.
      return optax.cosine_onecycle_schedule(max(steps, 4), 1.0)
    return lambda step: jnp.ones((), jnp.float32)

  def scale(self, val_losses: Sequence[float]) -> float:
    """Returns what plateau multiplies the learning rate by from now on.

    Args:
      val_losses: of all epochs so far.

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau with its defaults for
      mode, threshold and cooldown.
    """
    if self.name != "plateau":
      return 1.0
    scale, best, waited = 1.0, float("inf"), 0
    for loss in val_losses:
      if loss < best * (1 - _PLATEAU_THRESHOLD):
        best, waited = loss, 0
      else:
        waited += 1
      if waited > self.patience:
        scale, waited = scale * self.factor, 0
    return scale

  def ended(self, learning_rate: float, val_losses: Sequence[float]) -> bool:
    """Whether plateau has taken the learning rate below its floor."""
    return (
      self.name == "plateau"
      and learning_rate * self.scale(val_losses) < self.floor
    )


def check_one_of(key: str, value: str, known: Sequence[str]) -> None:
  """Checks that a key's value is one of those there are.

  Raises:
    UsageError: it is not.
  """
  if value not in known:
    raise errors.UsageError(
      f"config.{key} is {value!r}; it is one of {', '.join(known)}"
    )
