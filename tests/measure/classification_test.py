"""Metrics against scikit-learn, and resamples against repeated rows."""

import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from jaxtransfer.measure import classification, metrics

METRICS = {n: metrics.METRICS[n].function for n in metrics.OF_SCORES}


def _drawn(seed, rows=120, classes=4, ties=False):
  generator = np.random.default_rng(seed)
  labels = generator.permutation(np.arange(rows) % classes)
  scores = generator.normal(size=(rows, classes))
  scores[np.arange(rows), labels] += 0.7
  if ties:
    scores = np.round(scores)
  return labels, scores


def _references(labels, scores, weight=None):
  """scikit-learn's numbers, one class against the rest, then the mean.

  `roc_auc_score(multi_class="ovr")` refuses scores that do not sum to one, so
  it is called class by class, which is what it does itself.
  """
  classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
  chosen = scores.argmax(1)
  return {
    "accuracy": reference.accuracy_score(labels, chosen, sample_weight=weight),
    "balanced_accuracy": reference.balanced_accuracy_score(
      labels, chosen, sample_weight=weight
    ),
    "auroc": np.mean(
      [
        reference.roc_auc_score(labels == k, scores[:, k], sample_weight=weight)
        for k in classes
      ]
    ),
    "auprc": np.mean(
      [
        reference.average_precision_score(
          labels == k, scores[:, k], sample_weight=weight
        )
        for k in classes
      ]
    ),
  }


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_scikit_learn(name, classes, ties, seed):
  labels, scores = _drawn(seed, classes=classes, ties=ties)
  expected = _references(labels, scores)[name]
  found = METRICS[name](labels, scores)
  assert isinstance(found, float)
  assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int64, np.float64])
def test_weights_are_sample_weights(name, classes, kind):
  labels, scores = _drawn(2, classes=classes, ties=True)
  generator = np.random.default_rng(3)
  weights = generator.poisson(2, (20, len(labels))).astype(kind)
  if kind is np.float64:
    weights *= generator.uniform(0.1, 3, weights.shape)
  expected = [_references(labels, scores, w)[name] for w in weights]
  found = METRICS[name](labels, scores, weights)
  assert found.shape == (20,)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [2, 5])
def test_weights_are_repeated_rows(name, classes):
  """A multiplicity means that the row is there so often, which is the whole
  point of using weights for a bootstrap."""
  labels, scores = _drawn(4, classes=classes, ties=True)
  weights = np.random.default_rng(5).poisson(1, (10, len(labels)))
  metric = METRICS[name]
  repeated = [
    metric(np.repeat(labels, w), np.repeat(scores, w, axis=0)) for w in weights
  ]
  np.testing.assert_allclose(
    metric(labels, scores, weights), repeated, rtol=0, atol=1e-12
  )


@pytest.mark.parametrize("name", ["auroc", "auprc"])
def test_only_the_order_of_scores_counts(name):
  labels, scores = _drawn(6, ties=True)
  metric = METRICS[name]
  assert metric(labels, np.exp(scores)) == metric(labels, scores)
  scores[np.arange(5), 0] = -np.inf
  finite = np.where(np.isinf(scores), -1e9, scores)
  assert metric(labels, scores) == metric(labels, finite)


def test_bounds_and_chance():
  """Perfect scores give one; equal scores give chance, which for the area is
  one half and for average precision the share of the class."""
  labels = np.arange(60) % 3
  perfect = np.eye(3)[labels]
  level = np.zeros((60, 3))
  for name, metric in METRICS.items():
    assert metric(labels, perfect) == 1, name
  assert classification.auroc(labels, level) == 0.5
  assert classification.auprc(labels, level) == pytest.approx(1 / 3)
  assert classification.auroc(labels, -perfect) == 0


@pytest.mark.parametrize("name", ["balanced_accuracy", "auroc", "auprc"])
def test_class_absent_from_a_resample_is_left_out_of_its_mean(name):
  labels, scores = _drawn(7, classes=4)
  weights = np.ones((2, len(labels)), np.uint8)
  weights[1, labels == 3] = 0
  metric = METRICS[name]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = metric(labels, scores, weights)
  assert found[0] == pytest.approx(metric(labels, scores), abs=1e-12)
  if name == "balanced_accuracy":
    kept = labels < 3
    expected = reference.recall_score(
      labels[kept],
      scores[kept].argmax(1),
      average=None,
      labels=range(3),
      zero_division=0,
    ).mean()
  else:
    of = {
      "auroc": reference.roc_auc_score,
      "auprc": reference.average_precision_score,
    }[name]
    kept = labels < 3
    expected = np.mean(
      [of(labels[kept] == k, scores[kept, k]) for k in range(3)]
    )
  assert found[1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["balanced_accuracy", "auroc", "auprc"])
def test_class_absent_from_the_data_is_named(name):
  labels, scores = _drawn(8, classes=4)
  labels[labels == 2] = 1
  with pytest.warns(classification.AbsentClassWarning, match=": 2") as caught:
    value = METRICS[name](labels, scores)
  assert 0 < value < 1
  # The warning points at the caller, who knows what the class is called.
  assert caught[0].filename == __file__


def test_nothing_to_tell_apart_is_nan():
  labels, scores = (
    np.zeros(9, int),
    np.random.default_rng(0).normal(size=(9, 2)),
  )
  with pytest.warns(classification.AbsentClassWarning):
    assert np.isnan(classification.auroc(labels, scores))
  empty = np.zeros((1, 9), int)
  assert np.isnan(classification.accuracy(labels, scores, empty))[0]


@pytest.mark.parametrize(
  ("labels", "scores", "weights", "message"),
  [
    ([], np.zeros((0, 2)), None, "labels must be"),
    ([0.0, 1.0], np.zeros((2, 2)), None, "integers"),
    ([0, 1], np.zeros((3, 2)), None, "scores must be"),
    ([0, 2], np.zeros((2, 2)), None, "0 to 1"),
    ([0, -1], np.zeros((2, 2)), None, "0 to 1"),
    ([0, 1], [[0, 1], [np.nan, 0]], None, "row 1"),
    ([0, 1], np.zeros((2, 2)), [1, 1], "weights must be"),
    ([0, 1], np.zeros((2, 2)), [[1, -1]], "negative"),
    ([0, 1], np.zeros((2, 2)), [[1, np.nan]], "NaN"),
  ],
)
def test_refuses(labels, scores, weights, message):
  for metric in METRICS.values():
    with pytest.raises(ValueError, match=message):
      metric(labels, scores, weights)


def test_memory_is_bounded():
  """What is held beside the weights grows with a block, not with B x N x C."""
  labels, scores = _drawn(9, rows=20_000, classes=10)
  weights = np.random.default_rng(0).poisson(1, (400, 20_000)).astype(np.uint8)
  tracemalloc.start()
  classification.auroc(labels, scores, weights)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 3 * weights.nbytes + 8 * classification._BLOCK_BYTES
