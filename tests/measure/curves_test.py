import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from jaxtransfer.measure import bootstrap, classification, curves


def example(rows=400, ties=True, seed=3):
  rng = np.random.default_rng(seed)
  positive = rng.random(rows) < 0.3
  scores = rng.normal(positive * 1.1, 1.0)
  # A tenth's steps leave about sixty distinct scores among the rows.
  return positive, np.round(scores, 1) if ties else scores


def steps(positive, scores, x, weights=None):
  """scikit-learn's precision at the highest threshold that reaches x."""
  precision, recall, _ = metrics.precision_recall_curve(
    positive, scores, sample_weight=weights
  )
  # Its last point is recall zero, with a precision of one that no row has.
  precision, recall = precision[-2::-1], recall[-2::-1]
  return [
    precision[np.flatnonzero(recall >= at if at else recall > 0)[0]] for at in x
  ]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("points", [2, 101, 37])
def test_curves_are_those_of_scikit_learn_read_at_the_grid(ties, points):
  positive, scores = example(ties=ties)
  found = curves.roc(positive, scores, points=points)
  np.testing.assert_allclose(found.x, np.linspace(0, 1, points), atol=1e-15)
  fpr, tpr, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
  np.testing.assert_allclose(found.y, np.interp(found.x, fpr, tpr), atol=1e-12)
  found = curves.precision_recall(positive, scores, points=points)
  np.testing.assert_allclose(
    found.y, steps(positive, scores, found.x), atol=1e-12
  )
  assert found.low is None and found.high is None


def test_a_band_holds_the_percentiles_of_the_resampled_curves():
  """Each resample is what scikit-learn makes of the same multiplicities."""
  positive, scores = example(rows=60)
  weights = bootstrap.resample_weights(
    positive.astype(int), np.arange(60) // 4, 40, seed=1
  )
  x = np.arange(101) / 100
  rocs, precisions = [], []
  for row in weights:
    kept = row > 0
    some = positive[kept], scores[kept]
    fpr, tpr, _ = metrics.roc_curve(*some, sample_weight=row[kept])
    rocs.append(np.interp(x, fpr, tpr))
    precisions.append(steps(*some, x, row[kept]))
  for found, expected in (
    (curves.roc(positive, scores, weights), rocs),
    (curves.precision_recall(positive, scores, weights), precisions),
  ):
    low, high = np.quantile(expected, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found.low, low, atol=1e-9)
    np.testing.assert_allclose(found.high, high, atol=1e-9)


def test_areas_under_the_macro_curves_are_the_macro_metrics():
  """Averaging upright and taking the area are both sums: they commute."""
  rng = np.random.default_rng(0)
  labels = rng.integers(4, size=3000)
  logits = rng.normal(size=(3000, 4)) + 1.2 * np.eye(4)[labels]
  # Only after the softmax does a logit compare with that of another row.
  logits += 3 * rng.normal(size=(3000, 1))
  scores = special.softmax(logits, axis=1)
  found = curves.curves(np.eye(4)[labels], logits, points=4001)
  area = np.trapezoid(found["roc"]["y"], found["roc"]["x"])
  assert area == pytest.approx(classification.auroc(labels, scores), abs=1e-4)
  area = np.mean(found["precision_recall"]["y"][1:])
  assert area == pytest.approx(classification.auprc(labels, scores), abs=1e-3)


def test_two_classes_are_the_second_and_two_labels_are_both():
  positive, scores = example(ties=False)
  targets = np.stack([~positive, positive], 1).astype(float)
  table = np.stack([np.flip(scores), scores], 1)
  found = curves.curves(targets, table)
  # Of two classes the difference of the logits decides.
  apart = curves.roc(positive, scores - np.flip(scores))
  np.testing.assert_allclose(found["roc"]["y"], apart.y)
  alone = curves.roc(positive, scores)
  both = curves.curves(targets, table, multilabel=True)
  other = curves.roc(~positive, np.flip(scores))
  np.testing.assert_allclose(both["roc"]["y"], (alone.y + other.y) / 2)


def test_rows_of_unknown_targets_are_left_out_of_that_label_alone():
  positive, scores = example()
  rng = np.random.default_rng(2)
  unknown = rng.random(len(positive)) < 0.3
  weights = rng.integers(3, size=(20, len(positive)))
  targets = np.stack([positive, positive], 1).astype(float)
  targets[unknown, 1] = np.nan
  found = curves.curves(
    targets, np.stack([scores, -scores], 1), weights, multilabel=True
  )
  kept = ~unknown
  for name, one in (
    ("roc", curves.roc),
    ("precision_recall", curves.precision_recall),
  ):
    first = one(positive, scores).y
    second = one(positive[kept], -scores[kept]).y
    np.testing.assert_allclose(found[name]["y"], (first + second) / 2)
  assert len(found["roc"]["low"]) == 101


def test_a_class_that_is_absent_is_left_out():
  rng = np.random.default_rng(4)
  labels = rng.integers(2, size=200)
  logits = rng.normal(size=(200, 3)) + np.eye(3)[labels]
  scores = special.softmax(logits, axis=1)
  found = curves.curves(np.eye(3)[labels], logits)
  expected = [curves.roc(labels == k, scores[:, k]).y for k in (0, 1)]
  np.testing.assert_allclose(found["roc"]["y"], np.mean(expected, 0))


def test_what_is_undefined_is_nothing():
  one = np.ones(5), np.arange(5.0)
  assert np.isnan(curves.roc(*one).y).all()
  assert (curves.precision_recall(*one).y == 1).all()
  assert np.isnan(curves.precision_recall(np.zeros(5), one[1]).y).all()
  # The first resample holds no positive; the band is that of the second.
  weights = np.array([[0, 1, 1], [1, 1, 1]], np.uint8)
  found = curves.precision_recall([1, 0, 0], [3.0, 2.0, 1.0], weights)
  assert (found.low == 1).all() and (found.high == 1).all()
  unknown = curves.curves(np.full((3, 1), np.nan), np.zeros((3, 1)))
  assert unknown["roc"]["y"] == [None] * 101
  assert unknown["roc"]["low"] is None


def test_many_classes_have_curves_and_no_bands():
  labels = np.arange(101)
  found = curves.curves(
    np.eye(101)[labels], np.eye(101), np.ones((2, 101)), points=3
  )
  assert found["roc"]["y"] == [1, 1, 1] and found["roc"]["low"] is None


def test_extreme_scores_are_thresholds_like_others():
  scores = np.array([np.inf, 1.0, -np.inf, 0.0])
  found = curves.roc([1, 1, 0, 0], scores)
  assert (found.y == 1).all()
  # All tied: chance, a straight line, and the prevalence.
  same = np.zeros(4)
  tied = curves.roc([1, 0, 0, 0], same)
  np.testing.assert_allclose(tied.y, tied.x)
  assert (curves.precision_recall([1, 0, 0, 0], same).y == 0.25).all()


@pytest.mark.parametrize(
  "wrong",
  [
    {"scores": [0.1, 0.2, np.nan]},
    {"scores": [0.1, 0.2]},
    {"positive": [0, 1, 2]},
    {"weights": [[1, 1]]},
    {"weights": [[1, 1, -1]]},
    {"weights": np.zeros((0, 3))},
    {"points": 1},
  ],
)
def test_wrong_arguments_are_refused(wrong):
  right = {"positive": [0, 1, 1], "scores": [0.1, 0.2, 0.3]}
  with pytest.raises(ValueError):
    curves.roc(**(right | wrong))
