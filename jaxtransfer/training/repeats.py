"""Several trainings of one network, measured together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from jaxtransfer.measure import calibration, classification, evaluation
from jaxtransfer.training import images, scoring, trial

Outputs = tuple[np.ndarray, np.ndarray]


class Images(NamedTuple):
  """How many images a score is of.

  Attributes:
    distinct: different ones over all repeats.
    of_repeats: of each repeat.
  """

  distinct: int
  of_repeats: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Tested:
  """What all repeats of a network are worth on a split.

  Attributes:
    scores: metric -> over the repeats.
    points: as `scoring.join_points` returns them; none but of the test split.
    missed: as `scoring.missed` returns it, of all repeats together.
    chance: the balanced accuracy of guessing.
    images: how many they are of.
  """

  scores: dict[str, evaluation.Score]
  points: list[dict[str, Any]]
  missed: list[dict[str, Any]]
  chance: float
  images: Images


def measure(
  config: ml_collections.ConfigDict,
  repeats: Sequence[tuple[trial.Data, Mapping[str, Outputs]]],
  split: str,
) -> Tested:
  """Measures a network that was trained once or several times.

  Networks that are measured on the same rows are drawn in the same resamples,
  each fold in its own, so that their scores can be compared in pairs.

  Args:
    config: the whole config.
    repeats: of each its data, and split -> (N,) rows and (N, C) logits; of the
      test split the thresholds need those of "val" too.
    split: "val" or "test".
  """
  values, again, points, tested = [], [], [], []
  for data, outputs in repeats:
    loss, names = images.make_loss(config, data), data.names
    labelled = {
      name: (data.examples.labels[rows], logits)
      for name, (rows, logits) in outputs.items()
    }
    rows = outputs[split][0]
    weights = data.resample(
      rows, config.many_labels, config.resamples, config.seed
    )
    of = loss, names, *labelled[split]
    values.append(scoring.measure(*of).values)
    again.append(scoring.measure(*of, weights).values)
    tested.append((rows, *labelled[split]))
    if split == "test":
      temperature = calibration.fit_temperature(
        *scoring.decisions(loss, *labelled["val"])
      )
      points.append(
        scoring.operate(config, loss, names, labelled, temperature, weights)
      )
  counts = [scoring.images(loss, names, labels) for _, labels, _ in tested]
  rows, labels, logits = map(np.concatenate, zip(*tested, strict=True))
  _, first = np.unique(rows, return_index=True)
  disjoint = repeats[0][0].fold is not None
  return Tested(
    scores={
      name: evaluation.score(
        [v[name] for v in values], [a[name] for a in again]
      )
      for name in classification.METRICS
    },
    points=scoring.join_points(points, disjoint) if points else [],
    missed=scoring.missed(loss, names, labels, logits),
    chance=evaluation.chance(loss.targets[labels], many=loss.many),
    images=Images(scoring.images(loss, names, labels[first]), counts),
  )


def read_by_all(
  rows: Sequence[tuple[int, np.ndarray]],
) -> dict[int, np.ndarray]:
  """Returns repeat -> the rows that each of its networks read.

  What is compared is compared on the same images, even where one of them could
  be read at one time and not at another.

  Args:
    rows: the number of a repeat and (N,) rows that a network of it read.
  """
  common: dict[int, np.ndarray] = {}
  for repeat, of_network in rows:
    before = common.get(repeat, of_network)
    common[repeat] = np.intersect1d(of_network, before)
  return common
