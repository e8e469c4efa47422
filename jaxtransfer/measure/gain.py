"""What pretraining gives at every tap, and where the network can be cut."""

import dataclasses

import numpy as np
import numpy.typing as npt

from jaxtransfer.measure import bootstrap


@dataclasses.dataclass(frozen=True)
class Cut:
  """Where to cut.

  Attributes:
    index: the shallowest tap that satisfies the rule.
    best: the tap with the highest score; of equal ones the shallowest.
    low: (T,) low end of the interval of each tap's score less the best one's.
    high: (T,) its high end.
  """

  index: int
  best: int
  low: np.ndarray
  high: np.ndarray


def gain(pretrained: npt.ArrayLike, random: npt.ArrayLike) -> np.ndarray:
  """Returns what a pretrained network scores above its random twins.

  With resampled scores of the same resamples it gives the paired differences
  whose `bootstrap.interval` is the interval of the gain.

  Args:
    pretrained: (T, ...) scores at T taps.
    random: (S, T, ...) scores of S random initialisations at the same taps.

  Returns:
    (T, ...): pretrained less the mean over the random initialisations.

  Raises:
    ValueError: shapes that do not fit, or S = 0.

  Source: our definition of the question of Li and Plataniotis, PLoS One
    15(10):e0240530, 2020, "knowledge gain" over a random-weight model.
  """
  pretrained = np.asarray(pretrained, np.float64)
  return pretrained - _of_seeds(random, pretrained.shape).mean(0)


def seed_spread(random: npt.ArrayLike) -> np.ndarray:
  """Returns how far random initialisations differ from one another.

  Args:
    random: (S, T, ...) scores of S random initialisations.

  Returns:
    (T, ...): their standard deviation (S - 1 in the denominator), which says
    nothing about the images drawn; NaN for a single one.

  Raises:
    ValueError: no initialisation.
  """
  random = _of_seeds(random, None)
  if len(random) == 1:
    return np.full(random.shape[1:], np.nan)
  return random.std(0, ddof=1)


def marginal_gain(values: npt.ArrayLike) -> np.ndarray:
  """Returns what each tap adds to the tap before it.

  Args:
    values: (T, ...) scores of one network at T taps, shallowest first.

  Returns:
    (T, ...): values[t] - values[t - 1]; NaN at the first tap, which has none
    before it.

  Raises:
    ValueError: no taps.
  """
  values = np.asarray(values, np.float64)
  if not values.ndim or not len(values):
    raise ValueError(f"values must be (T, ...), T > 0, got {values.shape}")
  before = np.concatenate([np.full_like(values[:1], np.nan), values[:-1]])
  return values - before


def choose_cut(
  values: npt.ArrayLike,
  resampled: npt.ArrayLike,
  tolerance: float,
  level: float = 0.95,
) -> Cut:
  """Finds the shallowest tap that shows no loss beyond the tolerance.

  A tap qualifies where the low end of the paired interval of its score less
  the best tap's is not below minus the tolerance. The best tap always does.

  Args:
    values: (T,) scores of one network at T taps, shallowest first.
    resampled: (T, B) the same in B resamples, the same ones at every tap.
    tolerance: the largest loss that is accepted, in the metric's own units.
    level: of the interval.

  Returns:
    The cut.

  Raises:
    ValueError: shapes that do not fit, NaN scores, a negative tolerance.
  """
  values = np.asarray(values, np.float64)
  resampled = np.asarray(resampled, np.float64)
  if values.ndim != 1 or not len(values):
    raise ValueError(f"values must be (T,), T > 0, got shape {values.shape}")
  if resampled.ndim != 2 or len(resampled) != len(values):
    raise ValueError(
      f"resampled must be ({len(values)}, B), got shape {resampled.shape}"
    )
  if np.isnan(values).any():
    tap = int(np.flatnonzero(np.isnan(values))[0])
    raise ValueError(f"the score of tap {tap} is NaN: no cut can be chosen")
  if not tolerance >= 0:
    raise ValueError(f"tolerance must not be negative, got {tolerance}")
  best = int(values.argmax())
  low, high = bootstrap.interval(resampled - resampled[best], level)
  # Rounding in a mean over the classes must not decide about a tap; and the
  # best tap, which loses nothing to itself, is never in doubt.
  fits = low >= -tolerance - 1e-12
  fits[best] = True
  return Cut(int(fits.argmax()), best, low, high)


def choice_shares(
  values: npt.ArrayLike,
  resampled: npt.ArrayLike,
  tolerance: float,
  level: float = 0.95,
) -> np.ndarray:
  """Returns how often `choose_cut` would have chosen each tap.

  Every resample is taken for the data once. The intervals that the rule then
  asks for would need resamples of the resample; they are taken to be as wide
  to both sides as those of the data themselves.

  Args:
    values: (T,) scores of one network at T taps, shallowest first.
    resampled: (T, B) the same in B resamples, the same ones at every tap.
    tolerance: as `choose_cut` takes it.
    level: of the interval.

  Returns:
    (T,) shares of the B resamples, which sum to one. Resamples in which a
    score is undefined are left out; NaN where all are.

  Raises:
    ValueError: as `choose_cut` raises it.

  Source: choosing anew in every resample is Efron's "Estimation and accuracy
    after model selection", JASA 2014.
  """
  values = np.asarray(values, np.float64)
  resampled = np.asarray(resampled, np.float64)
  choose_cut(values, resampled, tolerance, level)
  resampled = resampled[:, ~np.isnan(resampled).any(0)]
  if not resampled.shape[1]:
    return np.full(len(values), np.nan)
  best = resampled.argmax(0)
  counts = np.zeros(len(values))
  for tap in np.unique(best):
    low, _ = bootstrap.interval(resampled - resampled[tap], level)
    below = low - (values - values[tap])
    some = resampled[:, best == tap]
    fits = some - some[tap] + below[:, None] >= -tolerance - 1e-12
    fits[tap] = True
    counts += np.bincount(fits.argmax(0), minlength=len(values))
  return counts / counts.sum()


def rule(tolerance: float, metric: str, level: float = 0.95) -> str:
  """Says in words how `choose_cut` chooses.

  Args:
    tolerance: the largest loss that is accepted.
    metric: its name, as it is to be read.
    level: of the interval.

  Returns:
    One sentence.
  """
  return (
    f"The cut is the shallowest tap whose {metric} is not shown to fall short"
    f" of the best tap's by more than {tolerance:g}: the {100 * level:g} %"
    " interval of the difference, paired over the same resamples, lies wholly"
    f" at or above {-tolerance or 0:g}."
  )


def _of_seeds(
  random: npt.ArrayLike, shape: tuple[int, ...] | None
) -> np.ndarray:
  """Returns `random` as (S, *shape), refused where it is not."""
  random = np.asarray(random, np.float64)
  if not random.ndim or not len(random):
    raise ValueError("random must be (S, T, ...) with S > 0")
  if shape is not None and random.shape[1:] != shape:
    raise ValueError(
      f"random must be (S, *{shape}) as pretrained is {shape}, got"
      f" {random.shape}"
    )
  return random
