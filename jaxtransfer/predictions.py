"""What a run says of single test images: predictions.csv, and those shown."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from jaxtransfer import files
from jaxtransfer.data import images
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.measure import scoring
from jaxtransfer.report.gallery import Gallery, Thumbnail

# What stands before the name of a class, which may be any text.
_PROBABILITY = "probability:"


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What one network says of test images.

  Attributes:
    data: the images.
    rows: (N,) of the source.
    probabilities: (N, C) float64.
    tap: the layer that is read, or the last that is kept.
    seed: which repeat it is of; None where there is one.
    temperature: that the logits were divided by; None without one.
  """

  data: Dataset
  rows: np.ndarray
  probabilities: np.ndarray
  tap: str
  seed: int | None = None
  temperature: float | None = None


def of_logits(
  data: Dataset,
  rows: np.ndarray,
  logits: np.ndarray,
  temperature: float,
  tap: str,
  seed: int | None,
) -> Predictions:
  """Returns what a network says, its probabilities calibrated.

  Args:
    data: the images.
    rows: (N,) of the source.
    logits: (N, C) float32.
    temperature: that they are divided by.
    tap: the last layer kept.
    seed: which repeat it is of; None where there is one.
  """
  probabilities = scoring.probabilities(
    logits, multilabel=data.multilabel, temperature=temperature
  )
  return Predictions(data, rows, probabilities, tap, seed, temperature)


def write(
  path: str | os.PathLike[str], predictions: Sequence[Predictions]
) -> None:
  """Writes predictions.csv, atomically: a line for each image and network.

  Args:
    path: the file.
    predictions: of the same classes; folds and taps one after the other.
  """
  names = predictions[0].data.names
  header = ["name", "group", "label", "tap", "seed", "temperature"]
  header += [_PROBABILITY + name for name in names]
  files.write_csv(
    path, header, (line for of in predictions for line in _lines(of))
  )


def _lines(of: Predictions) -> Iterator[list[str | int | float | None]]:
  examples, rows = of.data.examples, of.rows.tolist()
  groups = of.data.groups_of(of.rows) or [""] * len(rows)
  for row, group, values in zip(
    rows, groups, of.probabilities.tolist(), strict=True
  ):
    label = examples.classes[examples.labels[row]]
    about = [examples.names[row], group, label]
    yield [*about, of.tap, of.seed, of.temperature, *values]


class Decisions(NamedTuple):
  """What is said of images: a class of each, or of each of several labels.

  Attributes:
    rows: (M,) of the source.
    classes: (M,) which is said, or the label in question.
    values: (M,) its probability.
    sure: (M,) the probability of being right.
    wrong: (M,) bool; what is not known is not wrong.
  """

  rows: np.ndarray
  classes: np.ndarray
  values: np.ndarray
  sure: np.ndarray
  wrong: np.ndarray

  def first_images(self, order: np.ndarray, most: int) -> np.ndarray:
    """Returns the first decisions of a few images.

    Args:
      order: decisions, the most telling ones first.
      most: how many images.
    """
    _, first = np.unique(self.rows[order], return_index=True)
    return order[np.sort(first)[:most]]


def decide(of: Predictions) -> Decisions:
  """Returns every decision.

  Of several labels those that are known; all where an image's are not.
  """
  targets = of.data.targets_of(of.rows)
  unknown = np.isnan(targets).all(axis=1, keepdims=True)
  if of.data.multilabel:
    i, c = np.nonzero(~np.isnan(targets) | unknown)
    values = of.probabilities[i, c]
    sure = np.maximum(values, 1 - values)
    wrong = ~unknown[i, 0] & ((values > 0.5) != (targets[i, c] > 0.5))
  else:
    i, c = np.arange(len(of.rows)), of.probabilities.argmax(1)
    sure = values = of.probabilities[i, c]
    wrong = ~unknown[i, 0] & (c != targets.argmax(1))
  return Decisions(of.rows[i], c, values, sure, wrong)


def spread(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Chooses images of all classes, as many of each as there is room for.

  Args:
    labels: (N,) int.
    count: how many; where there are more classes, of the most frequent ones.
    seed: decides which.

  Returns:
    Indices, by class.
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  turn = np.empty(len(labels), int)
  frequency = np.bincount(labels)
  for label in np.unique(labels):
    of_label = order[labels[order] == label]
    turn[of_label] = np.arange(len(of_label))
  first = np.lexsort((labels, -frequency[labels], turn))[:count]
  return first[np.lexsort((turn[first], labels[first]))]


def show(
  config: ml_collections.ConfigDict,
  predictions: Sequence[Predictions],
  what: str = "test images",
) -> list[Gallery]:
  """Reads the images that a page shows, with their words.

  Args:
    config: of it `thumbnails`, how many of each kind, and how images are
      fitted.
    predictions: of one network, or of one in each fold.
    what: the images are.

  Returns:
    Inputs of every class, the most confident errors, and what the network is
    least sure of; those that cannot be read any more are counted. Where no
    label is known, inputs of every class that is said, and no errors.
  """
  most, size = config.thumbnails, config.data.image_size
  if not most:
    return []
  data = predictions[0].data
  labels, classes = data.examples.labels, data.examples.classes
  rows = np.concatenate([of.rows for of in predictions])
  parts = zip(*map(decide, predictions), strict=True)
  decisions = Decisions(*map(np.concatenate, parts))

  def words(chosen: np.ndarray) -> list[tuple[int, list[str]]]:
    return [
      (
        decisions.rows[d],
        [_words(data.names[decisions.classes[d]], decisions.values[d])],
      )
      for d in chosen
    ]

  surest = np.argsort(-decisions.sure, kind="stable")
  number = f"Of the {len(rows):,} {what}"
  meaning = (
    "Below each stand its true label, the probability of what it is taken for,"
    " and its name."
  )
  if data.multilabel:
    meaning = (
      "Below each stand its true labels, the probability of the label in"
      " question, and its name."
    )
  seen = f"resized and cropped to {size} x {size} pixels, before normalisation."
  galleries = [
    (
      "What the network sees",
      f"{number} some of each class, {seen} Below each stand its label and its"
      " name.",
      [(row, []) for row in rows[spread(labels[rows], most, config.seed)]],
    ),
    (
      "Most confident errors",
      f"{number} those that the network is surest of and wrong. {meaning}",
      words(decisions.first_images(surest[decisions.wrong[surest]], most)),
    ),
    (
      "Least confident",
      f"{number} those that the network is least sure of, right or wrong."
      f" {meaning}",
      words(
        decisions.first_images(np.argsort(decisions.sure, kind="stable"), most)
      ),
    ),
  ]
  if np.isnan(data.targets_of(rows)).all():
    meaning = (
      "Below each stand the probability of what it is taken for, and its name."
    )
    first = decisions.first_images(surest, len(surest))
    called = spread(decisions.classes[first], most, config.seed)
    galleries = [
      (
        "What the network sees",
        f"{number} some of each class that it says, {seen} {meaning}",
        words(first[called]),
      ),
      (
        "Least confident",
        f"{number} those that the network is least sure of. {meaning}",
        galleries[-1][2],
      ),
    ]
  shown = []
  for title, caption, chosen in galleries:
    thumbnails = []
    for row, lines in chosen:
      with contextlib.suppress(images.ImageError):
        pixels = images.fit(data.examples.read(int(row)), size)
        name = data.examples.names[row]
        label = classes[labels[row]] or "label not known"
        thumbnails.append(Thumbnail(pixels, label, name, lines))
    if gone := len(chosen) - len(thumbnails):
      caption += f" {gone:,} of them cannot be read any more."
    if chosen:
      shown.append(Gallery(title, caption, thumbnails))
  return shown


def _words(name: str, probability: float) -> str:
  text = f"{probability:.3f}"
  # Rounded, it would be certain.
  text = {"1.000": "> 0.999", "0.000": "< 0.001"}.get(text, text)
  return f"{name}: {text}"
