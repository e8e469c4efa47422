"""What is said of single images: the file, and which of them are shown."""

import csv

import numpy as np

from jaxtransfer import predictions
from jaxtransfer.data import dataset, sources


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
