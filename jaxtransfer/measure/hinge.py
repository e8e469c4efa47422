"""The exact minimum of a linear support vector machine, by Newton's method.

The squared hinge is quadratic wherever no row crosses its margin: a Newton
step ends there, and a handful of steps go from one set of rows inside the
margin to the next until it is the minimum's own. Where the classes can be
separated and the penalty is small, gradients alone take thousands of steps.
"""

import numpy as np
import scipy.linalg
import threadpoolctl

_MAX_STEPS = 100
# Up to this size a matrix is quicker with one thread.
_SMALL = 1024


def minimise(
  x: np.ndarray, sign: np.ndarray, ridge: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, int, bool]:
  """Minimises sum max(0, 1 - sign w'x)^2 + sum ridge w^2 / 2.

  Args:
    x: (E, N) float64 features.
    sign: (N,) 1 or -1.
    ridge: (E,) the penalty of each weight, 0 or more.
    weights: (E,) where to start.

  Returns:
    (E,) weights, the steps taken, and whether they ended at the minimum.

  Source: the finite Newton method for L2-SVM, Keerthi and DeCoste, JMLR 6
    (2005) 341-361.
  """
  w = np.asarray(weights, np.float64)
  logits = w @ x
  with threadpoolctl.threadpool_limits(1 if len(x) <= _SMALL else None, "blas"):
    for step in range(1, _MAX_STEPS + 1):
      inside = sign * logits < 1
      rows = x[:, inside]
      gap = sign[inside] - logits[inside]
      gradient = ridge * w - 2 * rows @ gap
      hessian = 2 * rows @ rows.T
      diagonal = np.einsum("ee->e", hessian)
      # Besides the intercept's missing penalty; far below what is solved for.
      diagonal += ridge + 1e-12 * max(diagonal.mean(), 1.0)
      try:
        way = scipy.linalg.solve(
          hessian, -gradient, assume_a="pos", check_finite=False
        )
      except np.linalg.LinAlgError:
        return w, step, False
      along = way @ x
      flat, bend = float(ridge @ (w * way)), float(ridge @ way**2)
      length = _search(sign, logits, along, flat, bend)
      w, logits = w + length * way, logits + length * along
      if abs(length - 1) < 1e-6 and (inside == (sign * logits < 1)).all():
        return w, step, True
  return w, _MAX_STEPS, False


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
