"""The exact minimum of a linear support vector machine, by Newton's method.

The squared hinge is quadratic wherever no row crosses its margin: a Newton
step ends there, and a handful of steps go from one set of rows inside the
margin to the next until it is the minimum's own. Where the classes can be
separated and the penalty is small, gradients alone take thousands of steps.

A step solves for the weights, or, where fewer rows than weights lie inside the
margin, for a multiplier of each of these rows: the same point either way.
"""

import numpy as np
import scipy.linalg
import threadpoolctl

_MAX_STEPS = 100
# Up to this size a matrix is quicker with one thread.
_SMALL = 1024


def minimise(
  x: np.ndarray,
  sign: np.ndarray,
  penalty: float,
  weights: np.ndarray,
  gram: np.ndarray | None = None,
) -> tuple[np.ndarray, int, bool]:
  """Minimises sum max(0, 1 - sign w'x)^2 + penalty |w|^2 / 2.

  Args:
    x: (E, N) float64 features; the last row is the intercept's, of ones, and
      its weight is not penalised.
    sign: (N,) 1 or -1.
    penalty: of the other weights, above 0.
    weights: (E,) where to start.
    gram: (N, N) products of the rows without the intercept's; without them
      every step solves for the weights.

  Returns:
    (E,) weights, the steps taken, and whether they ended at the minimum.

  Source: the finite Newton method for L2-SVM, Keerthi and DeCoste, JMLR 6
    (2005) 341-361; for the rows, Chapelle, Training a support vector machine
    in the primal, Neural Computation 19 (2007), section 3.
  """
  w = np.asarray(weights, np.float64)
  logits = w @ x
  ridge = np.append(np.full(len(x) - 1, penalty), 0.0)
  with threadpoolctl.threadpool_limits(1 if len(x) <= _SMALL else None, "blas"):
    for step in range(1, _MAX_STEPS + 1):
      inside = sign * logits < 1
      try:
        if gram is not None and 0 < np.count_nonzero(inside) < len(x):
          end = _solve_rows(x, sign, penalty, gram, inside)
        else:
          end = _solve_weights(x, sign, ridge, w, logits, inside)
      except np.linalg.LinAlgError:
        return w, step, False
      way = end - w
      along = way @ x
      flat, bend = float(ridge @ (w * way)), float(ridge @ way**2)
      length = _search(sign, logits, along, flat, bend)
      w, logits = w + length * way, logits + length * along
      if abs(length - 1) < 1e-6 and (inside == (sign * logits < 1)).all():
        return w, step, True
  return w, _MAX_STEPS, False


def _solve_weights(
  x: np.ndarray,
  sign: np.ndarray,
  ridge: np.ndarray,
  weights: np.ndarray,
  logits: np.ndarray,
  inside: np.ndarray,
) -> np.ndarray:
  """Returns the minimum for the rows inside the margin, by their Hessian."""
  rows = x[:, inside]
  gap = sign[inside] - logits[inside]
  gradient = ridge * weights - 2 * rows @ gap
  hessian = 2 * rows @ rows.T
  diagonal = np.einsum("ee->e", hessian)
  # Besides the intercept's missing penalty; far below what is solved for.
  diagonal += ridge + 1e-12 * max(diagonal.mean(), 1.0)
  return weights - scipy.linalg.solve(
    hessian, gradient, assume_a="pos", check_finite=False
  )


def _solve_rows(
  x: np.ndarray,
  sign: np.ndarray,
  penalty: float,
  gram: np.ndarray,
  inside: np.ndarray,
) -> np.ndarray:
  """Returns the same by the rows' multipliers, w = sum of multiplier x.

  At the minimum of these rows' squares the multiplier of each is 2 / penalty
  times what its logit lacks, and they add up to zero, for the intercept.
  """
  index = np.flatnonzero(inside)
  system = gram[np.ix_(index, index)]
  np.einsum("nn->n", system)[:] += penalty / 2
  factor = scipy.linalg.cho_factor(
    system, lower=True, overwrite_a=True, check_finite=False
  )
  right = np.stack([sign[index], np.ones(len(index))], axis=1)
  solved = scipy.linalg.cho_solve(factor, right, check_finite=False)
  of_sign, of_one = np.transpose(solved)
  intercept = of_sign.sum() / of_one.sum()
  multipliers = of_sign - intercept * of_one
  return np.append(x[:-1, index] @ multipliers, intercept)


def _search(
  sign: np.ndarray,
  logits: np.ndarray,
  along: np.ndarray,
  flat: float,
  bend: float,
) -> float:
  """Returns the length of the step at which the objective is least.

  Its slope along the step rises, in straight pieces between the lengths at
  which a row crosses its margin.
  """

  def slope(t: float) -> float:
    gap = np.maximum(1 - sign * (logits + t * along), 0)
    return float(flat + t * bend - 2 * (gap * sign) @ along)

  if abs(slope(1.0)) <= 1e-9 * abs(slope(0.0)):
    return 1.0
  moves = along != 0
  crossings = (sign - logits)[moves] / along[moves]
  crossings = np.sort(crossings[crossings > 0])
  first, last = 0, len(crossings)
  while first < last:
    middle = (first + last) // 2
    if slope(crossings[middle]) < 0:
      first = middle + 1
    else:
      last = middle
  low = crossings[first - 1] if first else 0.0
  high = crossings[first] if first < len(crossings) else low + 1
  at_low, at_high = slope(low), slope(high)
  if at_high == at_low:
    return low
  return low - at_low * (high - low) / (at_high - at_low)
