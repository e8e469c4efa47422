"""What is said of single images: the file, and which of them are shown."""

import csv

import ml_collections
import numpy as np

from jaxtransfer import predictions
from jaxtransfer.data import dataset, images, sources


def _data(labels, classes, names=None, groups=None, **fields):
  count = len(labels)
  source = sources.Examples(
    list(classes),
    np.array(labels, np.int32),
    names or [f"{i}.png" for i in range(count)],
    groups,
  )
  targets = np.eye(len(classes), dtype=np.float32)
  fields = {"names": list(classes), "targets": targets} | fields
  return dataset.Dataset(source, {"test": np.arange(count)}, **fields)


def test_any_name_and_label_is_read_back(tmp_path):
  """By Python's own reader: commas, quotes, line breaks and bytes that are no
  UTF-8, which stand there as Python writes them; numbers to the last bit."""
  classes = ['a,"b"', "probability:x", "two\nlines"]
  names = ["\udcff.png", 'x,"y".png', "=1+1.png"]
  data = _data([0, 1, 2], classes, names, ["p;1", "", "p,2"])
  values = np.random.default_rng(0).dirichlet(np.ones(3), 3)
  said = predictions.Predictions(data, np.array([2, 0, 1]), values, "layer1.0")
  predictions.write(tmp_path / "predictions.csv", [said])
  with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as f:
    header, *lines = csv.reader(f)
  assert header[:6] == "name group label tap seed temperature".split()
  assert header[6:] == [f"probability:{name}" for name in classes]
  assert [line[:3] for line in lines] == [
    ["=1+1.png", "p,2", "two\nlines"],
    ["\\udcff.png", "p;1", 'a,"b"'],
    ['x,"y".png', "", "probability:x"],
  ]
  assert {tuple(line[3:6]) for line in lines} == {("layer1.0", "", "")}
  found = np.array([line[6:] for line in lines], float)
  np.testing.assert_array_equal(found, values)


def test_probabilities_are_those_of_the_calibrated_logits():
  """Raised to the temperature and made to add up to one, they are those of the
  logits themselves: nothing is lost."""
  logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  data = _data([0, 1, 2, 0, 1], "abc")
  said = predictions.of_logits(data, np.arange(5), logits, 2.5, "layer1", 0)
  back = said.probabilities**2.5
  back /= back.sum(1, keepdims=True)
  plain = np.exp(logits.astype(float))
  np.testing.assert_allclose(back, plain / plain.sum(1, keepdims=True))


class _Drawn(sources.Examples):
  """Images of one grey each, which its row decides; some cannot be read."""

  broken = ()

  def read(self, row):
    if row in self.broken:
      raise images.ImageError("no such file")
    return np.full((8, 12, 3), row, np.uint8)


def _drawn(labels, classes):
  names = [f"{i}.png" for i in range(len(labels))]
  return _Drawn(list(classes), np.array(labels, np.int32), names)


def _config(thumbnails=3):
  values = {"thumbnails": thumbnails, "seed": 0, "data": {"image_size": 8}}
  return ml_collections.ConfigDict(values)


def _names(gallery):
  return [image.name for image in gallery.images]


def test_which_images_are_shown():
  """Errors with the highest probability first; the least sure, right or wrong,
  with the lowest; each as the network sees it, with the truth."""
  examples = _drawn([0, 0, 0, 1, 1, 1], ["<b>", "y"])
  data = dataset.Dataset(
    examples, {}, examples.classes, np.eye(2, dtype=np.float32)
  )
  first = np.array([0.9, 0.3, 0.01, 0.55, 0.2, 0.9999])
  said = predictions.Predictions(
    data, np.arange(6), np.stack([first, 1 - first], 1), "stem"
  )
  inputs, wrong, unsure = predictions.show(_config(), [said])
  assert _names(wrong) == ["5.png", "2.png", "1.png"]
  assert [image.words for image in wrong.images] == [
    ["<b>: > 0.999"],
    ["y: 0.990"],
    ["y: 0.700"],
  ]
  assert [image.label for image in wrong.images] == ["y", "<b>", "<b>"]
  assert _names(unsure) == ["3.png", "1.png", "4.png"]
  assert len(inputs.images) == 3
  assert [image.label for image in inputs.images] == ["<b>", "<b>", "y"]
  for image in inputs.images:
    assert image.pixels.shape == (8, 8, 3)
    assert f"{image.pixels[0, 0, 0]}.png" == image.name
  assert predictions.show(_config(0), [said]) == []
  # What is gone is counted, in its own place alone.
  examples.broken = (2,)
  _, wrong, unsure = predictions.show(_config(), [said])
  assert _names(wrong) == ["5.png", "1.png"]
  assert "1 of them cannot be read any more" in wrong.caption
  assert len(unsure.images) == 3 and "any more" not in unsure.caption


def test_folds_are_shown_together():
  """The surest error of all folds is the first."""
  examples = _drawn([0, 0, 0, 0], "ab")
  data = dataset.Dataset(examples, {}, ["a", "b"], np.eye(2, dtype="f"))
  folds = [
    predictions.Predictions(
      data, np.array(rows), np.stack([1 - p, p], 1), "stem", fold
    )
    for fold, rows, p in (
      (0, [3, 0], np.array([0.6, 0.2])),
      (1, [2, 1], np.array([0.7, 0.9])),
    )
  ]
  _, wrong, unsure = predictions.show(_config(4), folds)
  assert _names(wrong) == ["1.png", "2.png", "3.png"]
  assert _names(unsure) == ["3.png", "2.png", "0.png", "1.png"]


def test_of_several_labels_the_telling_one_is_shown():
  """An image stands once, for its worst label; what is unknown is no error."""
  examples = _drawn([0, 1, 2], ["a;b", "a;?b", "-"])
  targets = np.array([[1, 1], [1, np.nan], [0, 0]], np.float32)
  data = dataset.Dataset(examples, {}, ["a", "b"], targets, True)
  values = np.array([[0.4, 0.1], [0.9, 0.99], [0.3, 0.8]])
  said = predictions.Predictions(data, np.arange(3), values, "stem")
  _, wrong, unsure = predictions.show(_config(), [said])
  assert [(i.name, *i.words) for i in wrong.images] == [
    ("0.png", "b: 0.100"),
    ("2.png", "b: 0.800"),
  ]
  assert [(i.name, *i.words) for i in unsure.images] == [
    ("0.png", "a: 0.400"),
    ("2.png", "a: 0.300"),
    ("1.png", "a: 0.900"),
  ]


def test_inputs_are_spread_over_the_classes():
  """As evenly as the classes allow, the same ones every time; where there are
  more classes than places, one of each of the most frequent."""
  labels = np.array([0] * 50 + [1] * 2 + [2] * 30)
  chosen = predictions.spread(labels, 12, 0)
  assert np.bincount(labels[chosen]).tolist() == [5, 2, 5]
  assert (np.diff(labels[chosen]) >= 0).all()
  np.testing.assert_array_equal(chosen, predictions.spread(labels, 12, 0))
  assert labels[predictions.spread(labels, 2, 0)].tolist() == [0, 2]
  assert len(predictions.spread(labels, 100, 0)) == 82
