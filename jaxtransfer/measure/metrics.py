"""The table of metrics: what each is called, which way is better, what it is.

A metric that stands here is measured, written and shown by every job.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxtransfer.measure import calibration, classification

# What a metric is made of. Scores only have to rank and to choose; a
# temperature changes the others, which ask how sure a network is.
LOGITS, SCORES, PROBABILITIES = "logits", "scores", "probabilities"


@dataclasses.dataclass(frozen=True)
class Metric:
  """One metric.

  Attributes:
    words: how it is called where people read.
    function: of scores or probabilities (labels (N,), (N, C), weights (R, N)
      or None) -> a number, or (R,) of the resamples; NaN where undefined. With
      several labels it is the mean of each label's. Of logits as
      `classification.cross_entropy`, of all labels at once.
    of: `LOGITS`, `SCORES` or `PROBABILITIES`.
    higher: whether more is better.
    by_class: whether it is told of each class against the rest too.
  """

  words: str
  function: Callable[..., float | np.ndarray]
  of: str = SCORES
  higher: bool = True
  by_class: bool = False


METRICS = {
  "loss": Metric("loss", classification.cross_entropy, of=LOGITS, higher=False),
  "accuracy": Metric("accuracy", classification.accuracy),
  "balanced_accuracy": Metric(
    "balanced accuracy", classification.balanced_accuracy
  ),
  "auroc": Metric("AUROC", classification.auroc, by_class=True),
  "auprc": Metric("AUPRC", classification.auprc, by_class=True),
  "ece": Metric(
    "calibration error",
    calibration.expected_calibration_error,
    of=PROBABILITIES,
    higher=False,
  ),
  "brier": Metric(
    "Brier score", calibration.brier_score, of=PROBABILITIES, higher=False
  ),
}
# Those that a probe's scores have too, which are no probabilities.
OF_SCORES = tuple(name for name, of in METRICS.items() if of.of == SCORES)
