"""Whether probabilities mean what they say, and the temperature that helps."""

import numpy as np
from scipy import optimize, special

BINS = 15
# exp(+-5): a fit that ends at a border has no finite best temperature.
_LOG_TEMPERATURES = (-5.0, 5.0)


def expected_calibration_error(
  labels: np.ndarray,
  probabilities: np.ndarray,
  weights: np.ndarray | None = None,
  bins: int = BINS,
) -> float | np.ndarray:
  """Returns the mean distance between confidence and accuracy.

  Args:
    labels: (N,) int, the true classes.
    probabilities: (N, C), rows sum to one.
    weights: (R, N), how often an image counts in each of R resamples.
    bins: of equal width, over the confidence of the most probable class.

  Returns:
    The error, or (R,) of the resamples; NaN without images.

  Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 3.
  """
  confidence, right, place = _decisions(labels, probabilities, bins)
  gaps = np.zeros((len(labels), bins))
  gaps[np.arange(len(labels)), place] = right - confidence
  counts = np.ones((1, len(labels))) if weights is None else weights
  with np.errstate(invalid="ignore", divide="ignore"):
    errors = np.abs(counts @ gaps).sum(1) / counts.sum(1)
  return float(errors[0]) if weights is None else errors


def brier_score(
  labels: np.ndarray,
  probabilities: np.ndarray,
  weights: np.ndarray | None = None,
) -> float | np.ndarray:
  """Returns the mean squared distance to the truth, summed over classes.

  Args:
    labels: (N,) int, the true classes.
    probabilities: (N, C), rows sum to one.
    weights: (R, N), how often an image counts in each of R resamples.

  Returns:
    The score, 0 to 2, or (R,) of the resamples; NaN without images.

  Source: Brier 1950, Monthly Weather Review 78(1):1-3.
  """
  truth = np.arange(probabilities.shape[1]) == np.asarray(labels)[:, None]
  squares = np.square(probabilities - truth).sum(1)
  counts = np.ones((1, len(labels))) if weights is None else weights
  with np.errstate(invalid="ignore", divide="ignore"):
    scores = counts @ squares / counts.sum(1)
  return float(scores[0]) if weights is None else scores


def reliability(
  labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns what a reliability diagram shows, for each bin of confidence.

  Args:
    labels: (N,) int, the true classes.
    probabilities: (N, C), rows sum to one.
    bins: of equal width.

  Returns:
    Mean confidence, accuracy (NaN where a bin is empty) and images, (bins,)
    each.
  """
  confidence, right, place = _decisions(labels, probabilities, bins)
  count = np.bincount(place, minlength=bins)
  with np.errstate(invalid="ignore"):
    return (
      np.bincount(place, confidence, bins) / count,
      np.bincount(place, right, bins) / count,
      count,
    )


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
  """Returns the temperature that logits are divided by for the best likelihood.

  Args:
    labels: (N,) int, the true classes, of images not trained on.
    logits: (N, C).

  Returns:
    The temperature: above one, the network is too sure of itself.

  Raises:
    ValueError: there is no image.

  Source: Guo et al. 2017, section 4.2.
  """
  if not len(labels):
    raise ValueError("a temperature needs images to be fitted on")
  logits = np.asarray(logits, np.float64)
  # It depends on the inverse in a convex way, so one minimum is the minimum.
  minimum = optimize.minimize_scalar(
    lambda log: _surprise(labels, logits * np.exp(-log)),
    bounds=_LOG_TEMPERATURES,
    method="bounded",
    options={"xatol": 1e-6},
  )
  return float(np.exp(minimum.x))


def _surprise(labels: np.ndarray, logits: np.ndarray) -> float:
  chosen = logits[np.arange(len(labels)), labels]
  return float(np.mean(special.logsumexp(logits, axis=1) - chosen))


def _decisions(
  labels: np.ndarray, probabilities: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns confidence, whether it was right, and bin of every image."""
  confidence = probabilities.max(1, initial=0)
  right = (probabilities.argmax(1) == labels).astype(np.float64)
  place = np.clip((confidence * bins).astype(int), 0, bins - 1)
  return confidence, right, place
