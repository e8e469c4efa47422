"""Intervals by resampling patients, the same for everything compared."""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

# Draws held at a time; part of what a seed means, so not to be changed.
_BLOCK = 2**22


def resample_weights(
  labels: npt.ArrayLike,
  groups: Sequence[Hashable] | np.ndarray | None,
  resamples: int,
  seed: int | Sequence[int],
) -> np.ndarray:
  """Draws whole groups with replacement, as multiplicities of their rows.

  Rows of one patient are not independent: what is drawn is the patient, with
  all its rows. The draw is stratified by each group's most frequent label (of
  equally frequent ones the lowest), so that no class vanishes. Using the same
  weights for two networks or two taps makes their differences paired.

  Classes with a single group each are drawn as one stratum. Where there is one
  such class, its group is in every resample: an interval cannot show how it
  would vary between patients.

  Args:
    labels: (N,) int.
    groups: N names of the groups the rows belong to; None: every row its own.
    resamples: B, how many.
    seed: decides the draw, together with the labels and groups. Splits that
      share no patient, as folds do, need one each: with one seed for all, the
      same places would be drawn in each, and a mean over the splits would vary
      as if their patients were the same.

  Returns:
    (B, N) of the smallest unsigned type that holds them: how often row n is
    in resample b.

  Raises:
    ValueError: labels and groups that do not fit, or B < 1.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not len(labels):
    raise ValueError(f"labels must be (N,), N > 0, got shape {labels.shape}")
  if resamples < 1:
    raise ValueError(f"resamples must be 1 or more, got {resamples}")
  if groups is None:
    group, majority = np.arange(len(labels)), labels
  else:
    if len(groups) != len(labels):
      raise ValueError(f"{len(groups)} groups for {len(labels)} labels")
    group = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    majority = _majority(labels, group)
  strata, sizes = np.unique(majority, return_counts=True)
  single = np.isin(majority, strata[sizes == 1])
  if single.any():
    majority = np.where(single, majority[single].min(), majority)
  generator = np.random.default_rng(seed)
  counts = np.zeros((resamples, len(majority)), np.uint16)
  for label in np.unique(majority):
    members = np.flatnonzero(majority == label)
    size = len(members)
    step = max(1, _BLOCK // size)
    for start in range(0, resamples, step):
      some = min(step, resamples - start)
      drawn = generator.integers(size, size=(some, size))
      drawn += size * np.arange(some)[:, None]
      table = np.bincount(drawn.reshape(-1), minlength=some * size)
      counts[start : start + some, members] = table.reshape(some, size)
  return counts.astype(np.min_scalar_type(counts.max()))[:, group]


def interval(
  values: npt.ArrayLike, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the percentile interval of resampled values.

  Args:
    values: (..., B), a statistic in each of B resamples, or a difference of
      two in the same resamples. NaN, undefined in a resample, is left out.
    level: the share of the resamples inside, between 0 and 1.

  Returns:
    Low and high, each (...) float64; NaN where no resample has a value.

  Raises:
    ValueError: no resamples, or a level outside (0, 1).

  Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13.
  """
  values = np.asarray(values, np.float64)
  if not values.ndim or not values.shape[-1]:
    raise ValueError(f"values must be (..., B), B > 0, got {values.shape}")
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, got {level}")
  ends = np.array([(1 - level) / 2, (1 + level) / 2])
  bare = np.asarray(np.isnan(values).all(-1, keepdims=True))
  # Zero in place of nothing at all, put right below: nanquantile would warn.
  low, high = np.nanquantile(np.where(bare, 0, values), ends, axis=-1)
  bare = bare[..., 0]
  return np.where(bare, np.nan, low), np.where(bare, np.nan, high)


def _majority(labels: np.ndarray, group: np.ndarray) -> np.ndarray:
  """Returns (G,), the most frequent label of each group, ties to the lowest."""
  values, index = np.unique(labels, return_inverse=True)
  pairs, counts = np.unique(
    group * len(values) + index.reshape(-1), return_counts=True
  )
  of, label = np.divmod(pairs, len(values))
  # By group, most frequent first, and of these the lowest label first.
  order = np.lexsort((label, -counts, of))
  first = order[np.flatnonzero(np.diff(of[order], prepend=-1))]
  return values[label[first]]
