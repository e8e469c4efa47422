"""Probes: simple classifiers on frozen features, which say what they hold.

`fit_probe` fits one kind of probe on the features of R networks (the same
tap of a pretrained network and of its random twins) and the same rows, and
gives scores of validation and test rows. All four kinds run on the device.

Where strengths are to be chosen, they are scikit-learn's C: the weight of the
sum of losses beside ||W||^2 / 2, larger is less regularised.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import scipy.special
import threadpoolctl

from jaxtransfer.measure import hinge, metrics

KINDS = ("logistic", "linear_svm", "knn", "nearest_mean")

# Norm of the gradient over that of the residuals at which a fit has converged;
# both as `_descend` defines them. Predictions then agree with those of the
# exact minimum on all but about one row in two thousand.
TOLERANCE = 1e-4
MAX_ITERATIONS = 2000
NEIGHBOURS = 20

# Features are padded to these widths (and their multiples), so that the taps
# of a network need few compilations.
_WIDTHS = (128, 256, 512, 1024, 2048)
# Or to the number of rows, rounded up to this, where that is less: a fit costs
# the width's cube.
_ROWS = 64
# Features of one chunk of networks on a CPU.
_CACHE_BYTES = 2**23
# Columns that one product on the device should at least have to be efficient.
_COLUMNS = 32
# Bytes that one chunk of fits, or of neighbour distances, may fill.
_CHUNK_BYTES = 2**31
# Iterations before the first new preconditioner; doubled after each.
_FIRST_ROUND = 15
_HISTORY = 10


@dataclasses.dataclass(frozen=True)
class ProbeResult:
  """The scores of one kind of probe on R networks.

  Attributes:
    val_scores: (R, Nv, C) float32, higher is likelier; a class without
      training rows scores -inf.
    test_scores: (R, Nt, C) float32.
    strength: (R,) float64, chosen on validation; NaN where there is none.
    beyond: (R,) float64, by how much the strength, where it is an end of the
      grid, does better on validation than the one beside it: whether a wider
      grid might do better still. Zero inside the grid.
    converged: (R,) bool, of the fit with that strength.
    iterations: (R,) int, of the same.
  """

  val_scores: np.ndarray
  test_scores: np.ndarray
  strength: np.ndarray
  beyond: np.ndarray
  converged: np.ndarray
  iterations: np.ndarray


def fit_probe(
  kind: str,
  train_features: npt.ArrayLike,
  train_labels: npt.ArrayLike,
  val_features: npt.ArrayLike,
  val_labels: npt.ArrayLike,
  test_features: npt.ArrayLike,
  strengths: Sequence[float],
  metric: str,
  num_classes: int | None = None,
) -> ProbeResult:
  """Fits a probe per network, its strength chosen on the validation rows.

  `logistic`: multinomial logistic regression, features standardised by the
  training rows, intercept not penalised: the objective of scikit-learn's
  `LogisticRegression(C=strength)`, two classes included. Scores are log
  probabilities.

  `linear_svm`: squared hinge, one against the rest, the objective of
  `LinearSVC(C=strength)` on standardised features, but for the intercept,
  which liblinear penalises and this does not: the limit of a large
  `intercept_scaling`. Scores are the signed distances times ||w||.

  `knn`: the 20 nearest training rows (all, where there are fewer) by the
  Euclidean distance of features centred by the training mean and scaled to
  unit length; scores are the shares of the votes.

  `nearest_mean`: SimpleShot, the mean of each class of features centred and
  scaled in the same way; scores are the log-softmax of minus the squared
  distances, so that of two classes, too, the score of class 1 ranks the rows
  as the decision does.

  Args:
    kind: one of `KINDS`.
    train_features: (R, N, D) float.
    train_labels: (N,) int, 0 to C - 1.
    val_features: (R, Nv, D) float.
    val_labels: (Nv,) int.
    test_features: (R, Nt, D) float.
    strengths: the grid; of equally good ones the smallest is taken. Not used
      by `knn` and `nearest_mean`, which have none.
    metric: the name in `metrics.OF_SCORES` that chooses.
    num_classes: C; None takes the largest label of training and validation.

  Returns:
    Scores, strengths and whether the fits converged.

  Raises:
    ValueError: unknown names, shapes that do not fit, features that are not
      finite (naming the row), fewer than two classes in training, strengths
      that are not positive.

  Source: `knn` and `nearest_mean` follow the evaluation of UNI (Chen et al.,
    Nature Medicine 2024); SimpleShot is Wang et al., arXiv 1911.04623; the
    softmax of squared distances is Snell et al., arXiv 1703.05175.
  """
  if kind not in KINDS:
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
  if metric not in metrics.OF_SCORES:
    known = ", ".join(metrics.OF_SCORES)
    raise ValueError(f"metric must be one of {known}, got {metric!r}")
  train, y, val, y_val, test, classes = _checked(
    train_features,
    train_labels,
    val_features,
    val_labels,
    test_features,
    num_classes,
  )
  present, y = np.unique(y, return_inverse=True)
  if kind in ("logistic", "linear_svm"):
    grid = np.unique(np.asarray(strengths, np.float64))
    if not grid.size or not ((grid > 0) & np.isfinite(grid)).all():
      raise ValueError("strengths must be positive numbers, one at least")
    score = metrics.METRICS[metric].function

    def scores_of(logits: np.ndarray) -> np.ndarray:
      if kind == "logistic":
        logits = scipy.special.log_softmax(logits, axis=1)
      return _widen(logits, classes, present, -np.inf)

    def validate(logits: np.ndarray) -> float:
      value = float(score(y_val, scores_of(logits)))
      if np.isnan(value):
        raise ValueError(
          f"{metric} of the validation rows is not defined, and so no strength"
          " can be chosen: they are all of one class"
        )
      return value

    bases, best = _fit_linear(kind, train, y, val, grid, validate)

    def result(part: np.ndarray) -> np.ndarray:
      return np.stack(
        [
          scores_of(basis(rows) @ one.weights[:, :-1].T + one.weights[:, -1])
          for basis, one, rows in zip(bases, best, part, strict=True)
        ]
      )

    return ProbeResult(
      result(val),
      result(test),
      np.array([one.strength for one in best]),
      np.array([one.beyond for one in best]),
      np.array([one.converged for one in best]),
      np.array([one.iterations for one in best]),
    )
  of = _neighbours if kind == "knn" else _prototypes
  networks = len(train)
  scores = [
    of(train[r], y, len(present), np.concatenate([val[r], test[r]]))
    for r in range(networks)
  ]
  fill = 0 if kind == "knn" else -np.inf
  scores = np.stack([_widen(s, classes, present, fill) for s in scores])
  return ProbeResult(
    scores[:, : len(y_val)],
    scores[:, len(y_val) :],
    np.full(networks, np.nan),
    np.zeros(networks),
    np.ones(networks, bool),
    np.zeros(networks, int),
  )


def probabilities(kind: str, scores: npt.ArrayLike) -> np.ndarray:
  """Returns what a probe's scores say as probabilities.

  A `linear_svm` has none: its signed distances are put through the logistic
  function, each class against the rest, and do not add up to one.

  Args:
    kind: one of `KINDS`.
    scores: (N, C) as `fit_probe` returns them.

  Returns:
    (N, C) float64, each class's in the order of its scores.
  """
  scores = np.asarray(scores, np.float64)
  if kind == "knn":
    return scores
  return scipy.special.expit(scores) if kind == "linear_svm" else np.exp(scores)


def _checked(
  train: npt.ArrayLike,
  y: npt.ArrayLike,
  val: npt.ArrayLike,
  y_val: npt.ArrayLike,
  test: npt.ArrayLike,
  classes: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
  """Returns the arguments of `fit_probe` as arrays that fit together."""
  given = {"train": train, "val": val, "test": test}
  parts: dict[str, np.ndarray] = {}
  for name, features in given.items():
    part = parts[name] = np.asarray(features)
    if part.ndim != 3:
      raise ValueError(f"{name} features must be (R, N, D), got {part.shape}")
    if part.shape[::2] != parts["train"].shape[::2]:
      raise ValueError(
        f"{name} features {part.shape} must have the networks and channels of"
        f" the train features {parts['train'].shape}"
      )
    # The sum is NaN or infinite where a value is, and needs no mask.
    for r, rows in enumerate(part):
      with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(rows.sum(dtype=np.float64))
      if not finite and not (fine := np.isfinite(rows).all(1)).all():
        row = int(np.flatnonzero(~fine)[0])
        raise ValueError(
          f"the {name} features of row {row} (network {r}) are not finite"
        )
  labels = {"train": np.asarray(y), "val": np.asarray(y_val)}
  for name, of in labels.items():
    if of.shape != (parts[name].shape[1],):
      raise ValueError(
        f"{name} labels must be ({parts[name].shape[1]},) as the features"
        f" have it, got {of.shape}"
      )
    if not np.issubdtype(of.dtype, np.integer) or (of < 0).any():
      raise ValueError(f"{name} labels must be integers from 0")
    if not of.size:
      raise ValueError(f"there are no {name} rows")
  largest = int(max(of.max() for of in labels.values()))
  if classes is None:
    classes = largest + 1
  elif largest >= classes:
    raise ValueError(f"label {largest} is not below num_classes = {classes}")
  if (labels["train"] == labels["train"][0]).all():
    raise ValueError(
      "the training rows are all of one class: a probe needs two at least"
    )
  if not parts["train"].shape[2]:
    raise ValueError("the features have no channels")
  return (
    parts["train"],
    labels["train"],
    parts["val"],
    labels["val"],
    parts["test"],
    classes,
  )


def _widen(
  scores: np.ndarray, classes: int, present: np.ndarray, fill: float
) -> np.ndarray:
  """Returns (N, C) float32 scores from those of the classes present."""
  wide = np.full((len(scores), classes), fill, np.float32)
  wide[:, present] = scores
  return wide


# Linear probes -------------------------------------------------------------
#
# Both minimise  sum_n loss(W x_n + b, y_n) + (penalty / 2) ||W||^2. The fits
# are batched as (R, S, G): networks, strengths, and the groups of classes that
# are independent of each other, each with K classes: (1, C) for the logistic
# loss and (C, 1) for one-against-the-rest.


@dataclasses.dataclass(frozen=True)
class _Loss:
  """What a linear probe minimises.

  Attributes:
    slope: (logits (R,S,G,K,N), onehot (G,K,N)) -> the loss's derivative.
    curve: the same arguments and the slope -> (R,S,N) its second derivative,
      the mean over the classes, for the preconditioner.
    bound: what the second derivative never exceeds.
  """

  slope: Callable[[jax.Array, jax.Array], jax.Array]
  curve: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  bound: float


def _logistic_slope(logits: jax.Array, onehot: jax.Array) -> jax.Array:
  # Against the true class's logit: the loss and slope of a row that is fitted
  # well are then small numbers of full precision, and not 1 - 0.9999999.
  margin = logits - jnp.sum(logits * onehot, axis=3, keepdims=True)
  e = jnp.exp(margin - jnp.max(margin, axis=3, keepdims=True))
  p = e / jnp.sum(e, axis=3, keepdims=True) * (1 - onehot)
  return p - onehot * jnp.sum(p, axis=3, keepdims=True)


def _logistic_curve(
  logits: jax.Array, onehot: jax.Array, slope: jax.Array
) -> jax.Array:
  del logits, onehot
  p = jnp.abs(slope)
  return jnp.mean(p * (1 - p), axis=(2, 3))


def _hinge_slope(logits: jax.Array, onehot: jax.Array) -> jax.Array:
  sign = 2 * onehot - 1
  return -2 * sign * jnp.maximum(1 - sign * logits, 0)


def _hinge_curve(
  logits: jax.Array, onehot: jax.Array, slope: jax.Array
) -> jax.Array:
  del logits, onehot
  return jnp.mean(2.0 * (slope != 0), axis=(2, 3))


_LOSSES = {
  # Boehning, Multinomial logistic regression algorithm, 1992: the Hessian of
  # the multinomial log-likelihood is at most one half of X'X in every class.
  "logistic": _Loss(_logistic_slope, _logistic_curve, 0.5),
  "linear_svm": _Loss(_hinge_slope, _hinge_curve, 2.0),
}


@dataclasses.dataclass(frozen=True)
class _Basis:
  """Standardised features turned to the axes of their own covariance.

  Turning leaves ||W||^2 and so the minimum as they are, and makes the Hessian
  nearly diagonal, which L-BFGS then needs few iterations for. Directions in
  which the training rows do not vary are dropped: the minimum has no part in
  them. In float64, so that nearly equal features keep their difference.

  Attributes:
    mean: (D,) of the training rows.
    turn: (D, D') divides by the standard deviation and turns.
    squares: (D',) sums of squares of the turned training features.
  """

  mean: np.ndarray
  turn: np.ndarray
  squares: np.ndarray

  def __call__(self, features: np.ndarray) -> np.ndarray:
    """Returns (N, D') float64 of (N, D)."""
    return (features.astype(np.float64) - self.mean) @ self.turn


def _basis(features: np.ndarray) -> _Basis:
  x = features.astype(np.float64)
  rows, channels = x.shape
  epsilon = np.finfo(np.float64).eps
  mean = x.mean(0)
  x -= mean
  deviation = np.sqrt(np.mean(x**2, axis=0))
  # Rounding of the mean gives a constant feature a deviation just above zero.
  varies = deviation > rows * epsilon * np.abs(mean)
  scale = np.divide(1, deviation, out=np.zeros(channels), where=varies)
  x *= scale
  # Threads do not pay for a small matrix, and where the processors have other
  # work they wait for one another for many times what one thread takes.
  small = min(rows, channels) <= 1024
  with threadpoolctl.threadpool_limits(1 if small else None, "blas"):
    if channels <= rows:
      squares, turn = np.linalg.eigh(x.T @ x)
    else:
      squares, left = np.linalg.eigh(x @ x.T)
      length = np.sqrt(np.maximum(squares, np.finfo(float).tiny))
      turn = x.T @ (left / length)
  keep = squares > squares[-1] * 4 * epsilon * max(rows, channels)
  return _Basis(mean, scale[:, None] * turn[:, keep], squares[keep])


def _width(channels: int, rows: int) -> int:
  """Returns the padded number of features, of which there are at most rows."""
  size = min(channels, rows)
  steps = -(-size // _WIDTHS[-1]) * _WIDTHS[-1]
  padded = next((width for width in _WIDTHS if size <= width), steps)
  # All taps with more channels than rows share this one.
  return min(padded, -(-rows // _ROWS) * _ROWS)


def _product(spec: str, *arrays: jax.Array) -> jax.Array:
  # An accelerator's default precision is not float32's.
  return jnp.einsum(spec, *arrays, precision=jax.lax.Precision.HIGHEST)


def _slopes(
  loss: _Loss, x: jax.Array, onehot: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns logits and the slope of the loss in them, (R,S,G,K,N) both."""
  logits = _product("rsgke,ren->rsgkn", weights, x)
  return logits, loss.slope(logits, onehot)


def _inverse_factor(matrix: jax.Array, block: int = 32) -> jax.Array:
  """Returns the inverse of the Cholesky factor of (E,E), by blocks.

  Products for the most part. LAPACK would be called from XLA's threads with
  its own, and they wait for one another: tens of milliseconds for each call,
  however small, on a machine that has other work.
  """
  size = len(matrix)
  padded = -(-size // block) * block
  a = jnp.eye(padded).at[:size, :size].set(matrix)

  def step(j: int, carry: tuple[jax.Array, jax.Array]) -> tuple:
    a, inverse = carry
    at = j * block
    pivot = jax.lax.dynamic_slice(a, (at, at), (block, block))
    panel = jax.lax.dynamic_slice_in_dim(a, at, block, 1)
    rows = jax.lax.dynamic_slice_in_dim(inverse, at, block, 0)
    turn = jax.lax.rsqrt(pivot) if block == 1 else _inverse_factor(pivot, 1)
    below = jnp.arange(padded)[:, None] >= at + block
    panel = jnp.where(below, _product("ij,kj->ik", panel, turn), 0)
    rows = _product("ij,jk->ik", turn, rows)
    a -= _product("ik,jk->ij", panel, panel)
    inverse -= _product("ik,kj->ij", panel, rows)
    return a, jax.lax.dynamic_update_slice_in_dim(inverse, rows, at, 0)

  _, inverse = jax.lax.fori_loop(0, padded // block, step, (a, jnp.eye(padded)))
  return inverse[:size, :size]


@functools.partial(jax.jit, static_argnames="kind")
def _precondition(
  kind: str,
  x: jax.Array,
  onehot: jax.Array,
  ridge: jax.Array,
  scale: jax.Array,
  weights: jax.Array,
) -> jax.Array:
  """Returns (R,S,E,E): W = P v makes the Hessian in v near the identity.

  P P' is the inverse of the Hessian at `weights`, averaged over the classes.
  """
  loss = _LOSSES[kind]
  logits, slope = _slopes(loss, x, onehot, weights)
  curve = loss.curve(logits, onehot, slope)

  def of_one(x: jax.Array, curve: jax.Array, of: tuple[jax.Array, ...]):  # noqa: ANN202
    ridge, scale = of
    scaled = x * scale[:, None]
    hessian = _product("en,fn->ef", scaled * curve, scaled)
    hessian += jnp.diag(ridge * scale**2)
    size = len(hessian)
    # So much above singular that float32 has the factor; what is a direction
    # of almost no curvature only converges the slower for it.
    jitter = 1e-5 * jnp.trace(hessian) / size
    inverse = _inverse_factor(hessian + jitter * jnp.eye(size))
    return scale[:, None] * inverse.T

  # One at a time: the Gram matrix of a fit has the whole machine's work.
  return jax.lax.map(
    lambda r: jax.lax.map(
      lambda s: of_one(r[0], s[0], s[1:]), (r[1], ridge, r[2])
    ),
    (x, curve, scale),
  )


@functools.partial(jax.jit, static_argnames="kind")
def _descend(
  kind: str,
  x: jax.Array,
  onehot: jax.Array,
  ridge: jax.Array,
  scale: jax.Array,
  precondition: jax.Array,
  weights: jax.Array,
  limit: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Runs L-BFGS from `weights` until all fits converge or the limit.

  A fit has converged when the norm of its gradient, in coordinates in which
  the Hessian nowhere exceeds the identity, is at most `TOLERANCE` times both
  the norm of the slopes (the part of the residuals that the features could
  still explain is that small) and the norm of the weights in these
  coordinates, or a hundredth of the slopes' where that is more; and when,
  besides, loss and penalty balance to 100 times it, or the preconditioned
  gradient, nearly the step that is left, is at most 0.3 times it.

  Args:
    kind: in `_LOSSES`.
    x: (R,E,N) features, the last of the E a row of ones for the intercept.
    onehot: (G,K,N) float, the labels.
    ridge: (S,E) the penalty of each weight; 0 for the intercept.
    scale: (R,S,E) one over the root of the bound on the Hessian's diagonal.
    precondition: (R,S,E,E) P, of W = P v; v is what L-BFGS sees.
    weights: (R,S,G,K,E) where to start.
    limit: the number of iterations at most.

  Returns:
    weights, (R,S,G) converged, (R,S,G) iterations.
  """
  loss = _LOSSES[kind]

  def weights_of(v: jax.Array) -> jax.Array:
    return _product("rsef,rsgkf->rsgke", precondition, v)

  def total(a: jax.Array) -> jax.Array:
    return jnp.sum(a, axis=(3, 4))

  def norm(a: jax.Array) -> jax.Array:
    return jnp.sqrt(total(a**2))

  def gradient(slope: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    force = ridge[:, None, None] * w
    g = _product("rsgkn,ren->rsgke", slope, x) + force
    turned = _product("rsef,rsgke->rsgkf", precondition, g)
    bound = scale[:, :, None, None]
    size, residual = norm(g * bound), norm(slope)
    # Under strong regularisation the weights, not the residuals, are small.
    signal = norm((w / bound)[..., :-1])
    small = size <= TOLERANCE * jnp.clip(signal, 0.01 * residual, residual)
    # Under weak regularisation of classes that are separable, far less than
    # the bound is the curvature, and so the gradient, long before the end.
    balanced = size <= 100 * TOLERANCE * norm(force * bound)
    arrived = norm(turned) <= 0.3 * TOLERANCE * residual
    return turned, small & (balanced | arrived)

  lbfgs = optax.scale_by_lbfgs(_HISTORY)
  # The counter is shared, so that the history is written in one place.
  # As axes of vmap, not as a state.
  # pyrefly: ignore[bad-argument-type]
  axes = optax.ScaleByLBFGSState(None, 0, 0, 0, 0, 0)
  update: Callable[..., Any] = lbfgs.update
  for _ in range(3):
    update = jax.vmap(update, in_axes=(0, axes, 0), out_axes=(0, axes))

  def along(t: jax.Array) -> jax.Array:
    return t[..., None, None]

  def step(carry: tuple) -> tuple:
    v, w, logits, slope, g, done, iterations, i, history = carry
    d, history = update(g, history, v)
    # Rounding near the minimum can give a pair without curvature.
    sound = jnp.isfinite(history.weights_memory) & (history.weights_memory > 0)
    history = history._replace(
      weights_memory=jnp.where(sound, history.weights_memory, 0)
    )
    falls = total(d * g) > 0
    d = -jnp.where(along(falls), d, g)
    w_d = weights_of(d)
    logits_d = _product("rsgke,ren->rsgkn", w_d, x)
    flat = total(ridge[:, None, None] * w * w_d)
    bend = total(ridge[:, None, None] * w_d**2)
    first = total(slope * logits_d) + flat
    # The first step of an empty history has length one at most, where the
    # whole negative gradient is safe.
    guess = jnp.where(i == 0, jnp.maximum(1, jnp.sqrt(total(g**2))), 1.0)

    # The logits are linear in the step: a search costs no product with x. The
    # derivative along a convex function only rises, so its sign brackets.
    def search(s: tuple) -> tuple:
      t, low, at_low, high, at_high, _, ends, tries = s
      new = loss.slope(logits + along(t) * logits_d, onehot)
      rise = total(new * logits_d) + flat + t * bend
      ends |= jnp.abs(rise) <= 0.5 * jnp.abs(first)
      below = rise < 0
      last, at_last = low, at_low
      low = jnp.where(below, t, low)
      at_low = jnp.where(below, rise, at_low)
      high = jnp.where(below, high, t)
      at_high = jnp.where(below, at_high, rise)
      inside = jnp.isfinite(high)
      between = low - at_low * (high - low) / (at_high - at_low)
      room = 0.1 * (high - low)
      between = jnp.clip(between, low + room, high - room)
      beyond = low - at_low * (low - last) / (at_low - at_last)
      beyond = jnp.clip(beyond, 1.5 * t, 10 * t)
      t = jnp.where(
        ends, t, jnp.where(inside, between, jnp.nan_to_num(beyond, nan=2 * t))
      )
      return t, low, at_low, high, at_high, new, ends, tries + 1

    zero = jnp.zeros_like(first)
    t, *_, new, _, _ = jax.lax.while_loop(
      lambda s: ~jnp.all(s[6]) & (s[7] < 20),
      search,
      (
        jnp.where(done, 0, guess),
        zero,
        first,
        zero + jnp.inf,
        zero,
        slope,
        done,
        0,
      ),
    )
    return finish(carry, t, d, w_d, logits_d, new, history)

  def finish(carry, t, d, w_d, logits_d, new, history):  # noqa: ANN001, ANN202
    v, w, logits, _, _, done, iterations, i, _ = carry
    v, w = v + along(t) * d, w + along(t) * w_d
    g, now = gradient(new, w)
    return (
      v,
      w,
      logits + along(t) * logits_d,
      new,
      g,
      done | now,
      iterations + ~done,
      i + 1,
      history,
    )

  logits, slope = _slopes(loss, x, onehot, weights)
  g, done = gradient(slope, weights)
  # v itself is never needed, only its differences: it may start from zero.
  v = jnp.zeros_like(weights)
  # For optax, any tree.
  state = cast(optax.ScaleByLBFGSState, lbfgs.init(v[0, 0, 0]))
  fits = v.shape[:3]
  history = jax.tree.map(
    lambda leaf: jnp.zeros((*fits, *leaf.shape), leaf.dtype), state
  )._replace(count=state.count)
  carry = (
    v,
    weights,
    logits,
    slope,
    g,
    done,
    jnp.zeros(fits, jnp.int32),
    0,
    history,
  )
  carry = jax.lax.while_loop(
    lambda c: ~jnp.all(c[5]) & (c[7] < limit), step, carry
  )
  return carry[1], carry[5], carry[6]


@dataclasses.dataclass
class _Best:
  """The fit of a network that does best on validation so far."""

  value: float = -np.inf
  strength: float = np.nan
  beyond: float = 0.0
  converged: bool = False
  iterations: int = 0
  weights: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0, 1))
  )


def _fit_linear(
  kind: str,
  train: np.ndarray,
  y: np.ndarray,
  val: np.ndarray,
  strengths: np.ndarray,
  validate: Callable[[np.ndarray], float],
) -> tuple[list[_Basis], list[_Best]]:
  """Fits every network with every strength and keeps each network's best.

  Args:
    kind: in `_LOSSES`.
    train: (R, N, D) features.
    y: (N,) labels, 0 to C - 1, each of them there.
    val: (R, Nv, D) features.
    strengths: (S,), ascending.
    validate: (Nv, C) logits -> what is best when highest.

  Returns:
    For each network its basis and its best fit, weights (C, D' + 1) float64.
  """
  networks, rows, channels = train.shape
  classes = int(y.max()) + 1
  width = _width(channels, rows) + 1
  onehot = (y == np.arange(classes)[:, None]).astype(np.float32)
  onehot = onehot[None] if kind == "logistic" else onehot[:, None]
  # scikit-learn fits two classes with one vector w, penalised by ||w||^2 / 2:
  # as two vectors +-w/2 that is twice their ||W||^2 / 2.
  double = 2 if kind == "logistic" and classes == 2 else 1
  together, wide = _chunks(networks, len(strengths), classes, rows, width)
  bases, best = [], [_Best() for _ in range(networks)]
  values = np.empty((networks, len(strengths)))
  for first in range(0, networks, together):
    some = range(first, min(first + together, networks))
    x = np.zeros((together, width, rows), np.float32)
    squares = np.zeros((together, width))
    turned = []
    for i, r in enumerate(some):
      basis = _basis(train[r])
      bases.append(basis)
      turned.append(basis(val[r]))
      kept = len(basis.squares)
      x[i, :kept] = basis(train[r]).T
      squares[i, :kept] = basis.squares
    # The last chunk is filled up with what converges when the rest does.
    x[len(some) :], squares[len(some) :] = (
      x[len(some) - 1],
      squares[len(some) - 1],
    )
    x[:, -1], squares[:, -1] = 1, rows
    fits = _fit_path(
      kind, jnp.asarray(x), onehot, squares, double / strengths, wide
    )
    for s, (weights, converged, iterations) in enumerate(fits):
      for i, r in enumerate(some):
        w = weights[i].astype(np.float64)
        kept = turned[i].shape[1]
        value = validate(turned[i] @ w[:, :kept].T + w[:, -1])
        values[r, s] = value
        # Strictly: of equal ones the first, the most regularised.
        if value > best[r].value:
          w = np.concatenate([w[:, :kept], w[:, -1:]], 1)
          best[r] = _Best(
            value,
            strengths[s],
            converged=bool(converged[i]),
            iterations=int(iterations[i]),
            weights=w,
          )
  for one, of_one in zip(best, values, strict=True):
    if len(strengths) > 1 and one.strength == strengths[0]:
      one.beyond = one.value - of_one[1]
    elif len(strengths) > 1 and one.strength == strengths[-1]:
      one.beyond = one.value - of_one[-2]
  return bases, best


def _chunks(
  networks: int, strengths: int, classes: int, rows: int, width: int
) -> tuple[int, int]:
  """Returns how many networks and how many strengths to fit at once."""
  fit = 4 * (6 * classes * rows + (2 * _HISTORY + 8) * classes * width)
  fit += 4 * 3 * width**2
  features = 4 * width * rows
  if jax.default_backend() == "cpu":
    # Few, so that a fit which has converged seldom waits for others, and the
    # features stay in the cache; enough for an efficient product.
    wide = min(strengths, max(1, _COLUMNS // classes))
    # As even as they go: the last chunk is filled up with its hardest fit.
    wide = -(-strengths // -(-strengths // wide))
    together = max(1, _CACHE_BYTES // features)
  else:
    wide = min(strengths, max(1, _CHUNK_BYTES // fit))
    together = max(1, _CHUNK_BYTES // (features + wide * fit))
  return min(networks, together), wide


def _fit_path(
  kind: str,
  x: jax.Array,
  onehot: np.ndarray,
  squares: np.ndarray,
  penalties: np.ndarray,
  wide: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields (R,C,E) weights, (R,) converged, (R,) iterations per penalty.

  From the largest penalty to the smallest, `wide` of them at a time, each
  chunk from where the one before ended.
  """
  networks, width, _ = x.shape
  start = jnp.zeros((networks, 1, *onehot.shape[:2], width))
  hard = False
  newton = kind == "linear_svm" and jax.default_backend() == "cpu"
  for first in range(0, len(penalties), wide):
    chunk = penalties[first : first + wide]
    # The last chunk is filled up, so that one program serves all of them.
    filled = np.pad(chunk, (0, wide - len(chunk)), mode="edge")
    ridge = np.repeat(filled[:, None], width, axis=1)
    ridge[:, -1] = 0
    scale = 1 / np.sqrt(_LOSSES[kind].bound * squares[:, None] + ridge)
    ridge, scale = jnp.float32(ridge), jnp.float32(scale)
    fixed = (kind, x, jnp.asarray(onehot), ridge, scale)
    weights = jnp.repeat(start, wide, axis=1)
    iterations, limit = 0, _FIRST_ROUND
    # Where the last chunk needed the Hessian, so will this one.
    change = _precondition(*fixed, weights) if hard else _diagonal(scale)
    while True:
      weights, done, more = _descend(*fixed, change, weights, limit)
      iterations = iterations + np.asarray(more)
      done = np.asarray(done)
      # Independent classes of one fit are one fit to whoever reads of it.
      converged = np.asarray(done.all(2))
      if converged.all() or iterations.max() >= MAX_ITERATIONS:
        break
      # Once the iterations have cost what Newton's method is about to: then
      # both together cost at most twice what the better one would have.
      rest = np.count_nonzero(~done) * width
      if newton and rest <= 12 * iterations.max() * iterations.size:
        weights, converged, iterations = _finish_hinge(
          x, onehot, squares, filled, weights, done, iterations
        )
        break
      hard = True
      change = _precondition(*fixed, weights)
      limit *= 2
    start = weights[:, len(chunk) - 1 :][:, :1]
    fits = np.asarray(weights).reshape(networks, wide, -1, width)
    for s in range(len(chunk)):
      yield fits[:, s], converged[:, s], iterations[:, s].max(1)


def _finish_hinge(
  x: jax.Array,
  onehot: np.ndarray,
  squares: np.ndarray,
  penalties: np.ndarray,
  weights: jax.Array,
  done: np.ndarray,
  iterations: np.ndarray,
) -> tuple[jax.Array, np.ndarray, np.ndarray]:
  """Ends the fits that have not converged, each alone, in float64.

  Args:
    x: (R,E,N) features.
    onehot: (G,1,N) labels.
    squares: (R,E) of the features; zero where they are filled up.
    penalties: (S,).
    weights: (R,S,G,1,E) so far.
    done: (R,S,G) whether they have converged.
    iterations: (R,S,G) so far.

  Returns:
    weights, (R,S) converged, (R,S,G) iterations.
  """
  ended, done, iterations = np.array(weights), done.copy(), iterations.copy()
  signs = 2 * onehot[:, 0].astype(np.float64) - 1
  for r, of_network in enumerate(x):
    if done[r].all():
      continue
    used = squares[r] > 0
    features = np.asarray(of_network, np.float64)[used]
    few = features.shape[1] <= 2 * len(features)
    gram = features[:-1].T @ features[:-1] if few else None
    for s, g in np.argwhere(~done[r]):
      ended[r, s, g, 0, used], steps, done[r, s, g] = hinge.minimise(
        features, signs[g], penalties[s], ended[r, s, g, 0, used], gram
      )
      iterations[r, s, g] += steps
  return jnp.asarray(ended), np.asarray(done.all(2)), iterations


@jax.jit
def _diagonal(scale: jax.Array) -> jax.Array:
  """Returns (R,S,E,E): the preconditioner of the bound on the Hessian."""
  return scale[..., None] * jnp.eye(scale.shape[-1])


# Nearest neighbours and class means ----------------------------------------


def _unit(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
  """Returns (N, D) float32, centred and scaled to unit length; zero stays."""
  x = features.astype(np.float64) - mean
  length = np.linalg.norm(x, axis=1, keepdims=True)
  return np.divide(x, length, out=np.zeros_like(x), where=length > 0).astype(
    np.float32
  )


def _centred(
  train: np.ndarray, queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  mean = train.mean(0, dtype=np.float64)
  return _unit(train, mean), _unit(queries, mean)


def _neighbours(
  train: np.ndarray, y: np.ndarray, classes: int, queries: np.ndarray
) -> np.ndarray:
  """Returns (Nq, C): the shares of the classes among the 20 nearest rows."""
  train, queries = _centred(train, queries)
  k = min(NEIGHBOURS, len(train))
  # Whole chunks of one shape: the last is filled up with zero rows.
  step = max(1, min(1024, _CHUNK_BYTES // (8 * len(train))))
  padded = np.pad(queries, ((0, -len(queries) % step), (0, 0)))
  rows, labels = jnp.asarray(train), jnp.asarray(y)
  votes = [
    np.asarray(_vote(rows, labels, padded[start : start + step], k, classes))
    for start in range(0, len(padded), step)
  ]
  return np.concatenate(votes)[: len(queries)] / np.float32(k)


@functools.partial(jax.jit, static_argnames=("k", "classes"))
def _vote(
  train: jax.Array, y: jax.Array, queries: jax.Array, k: int, classes: int
) -> jax.Array:
  # |a - b|^2 = |a|^2 + |b|^2 - 2ab. The lengths are one, but for rows equal
  # to the mean; |a|^2 of the query is the same for all its neighbours.
  near = 2 * _product("qd,nd->qn", queries, train) - jnp.sum(train**2, axis=1)
  _, index = jax.lax.top_k(near, k)
  return jax.vmap(lambda of: jnp.bincount(of, length=classes))(y[index])


def _prototypes(
  train: np.ndarray, y: np.ndarray, classes: int, queries: np.ndarray
) -> np.ndarray:
  """Returns (Nq, C): log-softmax of minus squared distances to the means."""
  train, queries = _centred(train, queries)
  return np.asarray(_nearest(jnp.asarray(train), y, classes, queries))


@functools.partial(jax.jit, static_argnames="classes")
def _nearest(
  train: jax.Array, y: jax.Array, classes: int, queries: jax.Array
) -> jax.Array:
  counts = jnp.bincount(y, length=classes)
  means = jax.ops.segment_sum(train, y, classes) / counts[:, None]
  # The query's own length is the same for every class.
  near = 2 * _product("qd,cd->qc", queries, means) - jnp.sum(means**2, axis=1)
  return jax.nn.log_softmax(near, axis=1)
