"""Probes against scikit-learn, on features as awkward as real ones are."""

import warnings

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.neighbors
import sklearn.preprocessing
import sklearn.svm

from jaxtransfer.measure import classification, metrics, probes

ROWS, QUERIES = 250, 3000


def _gaussian(generator, rows, classes, channels):
  labels = generator.permutation(np.arange(rows) % classes)
  centres = np.random.default_rng(1).normal(size=(classes, channels))
  noise = generator.normal(size=(rows, channels))
  return labels, centres[labels] * 2 / np.sqrt(channels) + noise


def _features(name, seed, rows, classes=5):
  """Features of one kind; the same kind for another seed is more of it."""
  generator = np.random.default_rng(seed)
  fixed = np.random.default_rng(2)
  channels = {"wide": ROWS + 100}.get(name, 48)
  labels, x = _gaussian(generator, rows, classes, channels)
  if name == "low_rank":
    x = x[:, :9] @ fixed.normal(size=(9, channels))
  elif name == "relu":
    # What pooled activations look like: nonnegative, heavy-tailed, of very
    # different scales, some channels never active.
    x = np.maximum(x, 0) ** 3 * np.exp(fixed.normal(0, 3, channels))
    x[:, :4] = 0
    x[:, 4] = 0.1
  elif name == "duplicates":
    copies = x[:, :24] + 1e-4 * generator.normal(size=(rows, 24))
    x = np.concatenate([x[:, :24], copies], 1)
  elif name == "offset":
    x = 1000 + x
  return labels, x.astype(np.float32)


KINDS = ["plain", "low_rank", "relu", "duplicates", "offset", "wide"]


def _logits(kind, train, labels, queries, strengths):
  """Every strength's fit and not only the best: (S, Nq, C) and converged."""
  found = []
  bases, best = probes._fit_linear(
    kind,
    train[None],
    labels,
    queries[None],
    np.asarray(strengths),
    lambda logits: float(len(found.append(logits) or found)),
  )
  assert len(bases) == len(best) == 1
  return np.stack(found)


def _standardised(train, queries):
  scaler = sklearn.preprocessing.StandardScaler().fit(train.astype(np.float64))
  return scaler.transform(train.astype(np.float64)), scaler.transform(
    queries.astype(np.float64)
  )


def _agreement(a, b):
  return (a.argmax(1) == b.argmax(1)).mean()


@pytest.mark.parametrize("name", KINDS)
def test_logistic_predicts_as_scikit_learn(name):
  """The same objective has one minimum: run to convergence, both agree but
  for rows on the boundary itself."""
  strengths = [1e-4, 1e-2, 1, 100, 1e4]
  labels, train = _features(name, 10, ROWS)
  _, queries = _features(name, 11, QUERIES)
  found = _logits("logistic", train, labels, queries, strengths)
  x, q = _standardised(train, queries)
  for strength, logits in zip(strengths, found, strict=True):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      expected = (
        sklearn.linear_model.LogisticRegression(
          C=strength, solver="newton-cg", tol=1e-9, max_iter=1000
        )
        .fit(x, labels)
        .decision_function(q)
      )
    assert _agreement(logits, expected) >= 0.999, strength
    # Logits, too, and not only which is largest: to 1 % of their own spread.
    expected = expected - expected.mean(1, keepdims=True)
    logits = logits - logits.mean(1, keepdims=True)
    assert np.abs(logits - expected).mean() <= 0.01 * expected.std(), strength


@pytest.mark.parametrize("strength", [1e-3, 1, 1e3])
def test_logistic_of_two_classes_is_scikit_learns(strength):
  """scikit-learn fits one vector for two classes, which is regularised half
  as much as two vectors would be; the probabilities tell which it was."""
  labels, train = _features("plain", 20, ROWS, classes=2)
  _, queries = _features("plain", 21, QUERIES, classes=2)
  found = probes.fit_probe(
    "logistic",
    train[None],
    labels,
    train[None],
    labels,
    queries[None],
    [strength],
    "auroc",
  )
  x, q = _standardised(train, queries)
  model = sklearn.linear_model.LogisticRegression(
    C=strength, tol=1e-9, max_iter=5000
  ).fit(x, labels)
  np.testing.assert_allclose(
    np.exp(found.test_scores[0]), model.predict_proba(q), atol=2e-3
  )


@pytest.mark.parametrize(
  ("name", "classes"), [(name, 5) for name in KINDS] + [("plain", 2)]
)
def test_linear_svm_predicts_as_liblinear(name, classes):
  """liblinear penalises the intercept; with a large `intercept_scaling` by
  next to nothing, which is the problem solved here."""
  strengths = [1e-4, 1e-2, 1]
  labels, train = _features(name, 30, ROWS, classes)
  _, queries = _features(name, 31, QUERIES, classes)
  found = _logits("linear_svm", train, labels, queries, strengths)
  x, q = _standardised(train, queries)
  for strength, logits in zip(strengths, found, strict=True):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      expected = (
        sklearn.svm.LinearSVC(
          C=strength,
          dual=False,
          intercept_scaling=300,
          tol=1e-9,
          max_iter=20000,
        )
        .fit(x, labels)
        .decision_function(q)
      )
    if classes == 2:
      expected = np.stack([-expected, expected], axis=1)
    assert _agreement(logits, expected) >= 0.999, strength
    assert np.abs(logits - expected).mean() <= 0.01 * expected.std(), strength


@pytest.mark.parametrize("rows", [ROWS, 12])
def test_knn_is_scikit_learns(rows):
  """Votes of min(20, N) neighbours on centred features of unit length."""
  labels, train = _features("relu", 40, rows, classes=3)
  _, queries = _features("relu", 41, 1500, classes=3)
  # Twin rows of different classes would tie, in any order.
  result = probes.fit_probe(
    "knn", train[None], labels, train[None], labels, queries[None], [], "auroc"
  )
  mean = train.mean(0, dtype=np.float64)
  unit = sklearn.preprocessing.normalize
  model = sklearn.neighbors.KNeighborsClassifier(min(20, rows)).fit(
    unit(train - mean), labels
  )
  expected = model.predict_proba(unit(queries - mean))
  close = np.isclose(result.test_scores[0], expected, atol=1e-6).all(1)
  # Two neighbours as far as float32 can tell may change places.
  assert close.mean() >= 0.999
  assert np.isnan(result.strength).all()
  assert result.converged.all()


def test_nearest_mean_is_simple_shot():
  labels, train = _features("relu", 50, ROWS, classes=4)
  _, queries = _features("relu", 51, 500, classes=4)
  result = probes.fit_probe(
    "nearest_mean",
    train[None],
    labels,
    train[None],
    labels,
    queries[None],
    [],
    "auroc",
  )
  mean = train.mean(0, dtype=np.float64)
  unit = sklearn.preprocessing.normalize
  x, q = unit(train - mean), unit(queries - mean)
  means = np.stack([x[labels == k].mean(0) for k in range(4)])
  squared = ((q[:, None] - means) ** 2).sum(2)
  expected = -squared - np.log(np.exp(-squared).sum(1, keepdims=True))
  np.testing.assert_allclose(result.test_scores[0], expected, atol=1e-5)


def _fit(kind, networks=1, **changes):
  labels, train = _features("plain", 60, 120, classes=3)
  y_val, val = _features("plain", 61, 90, classes=3)
  _, test = _features("plain", 62, 50, classes=3)
  arguments = {
    "train_features": np.stack([train] * networks),
    "train_labels": labels,
    "val_features": np.stack([val] * networks),
    "val_labels": y_val,
    "test_features": np.stack([test] * networks),
    "strengths": [1e-3, 0.1, 10],
    "metric": "auroc",
  }
  return probes.fit_probe(kind, **arguments | changes), arguments


@pytest.mark.parametrize("kind", probes.KINDS)
def test_result_has_a_row_per_network(kind):
  result, arguments = _fit(kind, networks=3)
  assert result.val_scores.shape == (3, 90, 3)
  assert result.test_scores.shape == (3, 50, 3)
  assert result.test_scores.dtype == np.float32
  for field in (result.strength, result.converged, result.iterations):
    assert field.shape == (3,)
  assert result.converged.all()
  value = classification.auroc(arguments["val_labels"], result.val_scores[0])
  assert value > 0.6
  # Equal networks, equal scores: fits do not disturb one another.
  np.testing.assert_allclose(
    result.test_scores[0], result.test_scores[2], atol=1e-5
  )


@pytest.mark.parametrize("kind", ["logistic", "linear_svm"])
def test_strength_is_the_best_on_validation(kind):
  """Each strength alone gives a validation score; the grid takes the one
  with the highest, and scores as that one alone does."""
  result, arguments = _fit(kind)
  alone = [_fit(kind, strengths=[s])[0] for s in arguments["strengths"]]
  values = [
    classification.auroc(arguments["val_labels"], one.val_scores[0])
    for one in alone
  ]
  best = int(np.argmax(values))
  assert result.strength == [arguments["strengths"][best]]
  np.testing.assert_allclose(
    result.test_scores, alone[best].test_scores, atol=0.02
  )


@pytest.mark.parametrize(
  "kind", ["logistic", pytest.param("linear_svm", marks=pytest.mark.slow)]
)
def test_an_end_of_the_grid_says_what_may_lie_beyond(kind):
  """By how much it beats the strength beside it; a plateau, where all are
  equal and the smallest is taken, is no reason for a wider grid."""
  labels, train = _features("relu", 3, ROWS)
  val_labels, val = _features("relu", 4, QUERIES)

  def fit(strengths):
    return probes.fit_probe(
      kind,
      train[None],
      labels,
      val[None],
      val_labels,
      val[None],
      strengths,
      "auroc",
    )

  grid = [1e-12, 1e-11, 1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2]
  alone = np.array(
    [classification.auroc(val_labels, fit([s]).val_scores[0]) for s in grid]
  )
  best = int(alone.argmax())
  assert 3 <= best < len(grid) - 1
  assert fit(grid).beyond[0] == 0
  up, down = fit(grid[2 : best + 1]), fit(grid[best:])
  assert up.strength[0] == down.strength[0] == grid[best]
  for end, beside in ((up, best - 1), (down, best + 1)):
    expected = alone[best] - alone[beside]
    assert end.beyond[0] == pytest.approx(expected, abs=1e-3)
    assert expected > 0
  assert abs(fit(grid[:2]).beyond[0]) < 1e-3
  assert fit(grid[:1]).beyond[0] == 0


def test_of_equally_good_strengths_the_most_regularised():
  """Classes far apart are told apart by any strength."""
  labels = np.arange(60) % 3
  x = np.eye(3, 5)[labels] * 50
  x += np.random.default_rng(0).normal(size=x.shape)
  result = probes.fit_probe(
    "logistic", x[None], labels, x[None], labels, x[None], [10, 0.1], "accuracy"
  )
  assert result.strength == [0.1]
  assert classification.accuracy(labels, result.test_scores[0]) == 1


def test_metric_decides():
  """With 90 % in one class, accuracy is content with the prior and balanced
  accuracy is not: what is chosen must depend on what is asked."""
  generator = np.random.default_rng(3)
  labels = (np.arange(600) % 10 == 0).astype(int)
  x = generator.normal(size=(600, 20)) + 0.8 * labels[:, None]
  split = (x[:200], labels[:200], x[200:], labels[200:])
  chosen = {
    metric: probes.fit_probe(
      "logistic",
      split[0][None],
      split[1],
      split[2][None],
      split[3],
      split[2][None],
      [1e-4, 1e-2],
      metric,
    )
    for metric in ("accuracy", "balanced_accuracy")
  }
  for metric, result in chosen.items():
    of = metrics.METRICS[metric].function
    other = chosen[
      "accuracy" if metric == "balanced_accuracy" else "balanced_accuracy"
    ]
    assert of(split[3], result.val_scores[0]) >= of(
      split[3], other.val_scores[0]
    )


@pytest.mark.parametrize("kind", probes.KINDS)
def test_class_without_training_rows_is_never_predicted(kind):
  labels, train = _features("plain", 70, 90, classes=3)
  kept = labels != 1
  result = probes.fit_probe(
    kind,
    train[None, kept],
    labels[kept],
    train[None],
    labels,
    train[None],
    [0.1],
    "accuracy",
    num_classes=5,
  )
  scores = result.test_scores[0]
  assert scores.shape == (90, 5)
  assert not np.isin(scores.argmax(1), [1, 3, 4]).any()
  expected = 0 if kind == "knn" else -np.inf
  assert (scores[:, [1, 3, 4]] == expected).all()
  assert np.isfinite(scores[:, [0, 2]]).all()


@pytest.mark.parametrize("kind", ["logistic", "linear_svm"])
def test_chunks_do_not_change_the_predictions(kind, monkeypatch):
  labels, train = _features("relu", 80, 200, classes=3)
  _, queries = _features("relu", 81, 1000, classes=3)
  pair = np.stack([train, train[:, ::-1]])
  arguments = (
    kind,
    pair,
    labels,
    pair,
    labels,
    np.stack([queries, queries[:, ::-1]]),
    [1e-3, 0.1, 10, 100],
    "auroc",
  )
  together = probes.fit_probe(*arguments)
  monkeypatch.setattr(probes, "_CACHE_BYTES", 1)
  monkeypatch.setattr(probes, "_COLUMNS", 1)
  apart = probes.fit_probe(*arguments)
  np.testing.assert_array_equal(together.strength, apart.strength)
  for a, b in zip(together.test_scores, apart.test_scores, strict=True):
    assert _agreement(a, b) >= 0.998


def test_features_that_say_nothing():
  """All constant: what is left is the intercept, the share of each class."""
  labels = np.array([0] * 30 + [1] * 10 + [2] * 20)
  x = np.full((1, 60, 7), 0.1, np.float32)
  result = probes.fit_probe(
    "logistic", x, labels, x, labels, x, [1e-3, 1.0], "accuracy"
  )
  np.testing.assert_allclose(
    np.exp(result.test_scores[0, 0]), [1 / 2, 1 / 6, 1 / 3], atol=1e-3
  )


def test_many_classes():
  """More classes than channels, with few rows each."""
  generator = np.random.default_rng(0)
  labels = np.arange(600) % 200
  centres = 3 * generator.normal(size=(200, 32))
  x = (centres[labels] + generator.normal(size=(600, 32)))[None]
  result = probes.fit_probe(
    "logistic", x, labels, x, labels, x, [0.01, 1], "accuracy"
  )
  assert result.converged.all()
  assert classification.accuracy(labels, result.test_scores[0]) > 0.95


def test_a_fit_that_is_stopped_says_so(monkeypatch):
  monkeypatch.setattr(probes, "MAX_ITERATIONS", 1)
  monkeypatch.setattr(probes, "_FIRST_ROUND", 1)
  labels, train = _features("relu", 90, 120, classes=3)
  result = probes.fit_probe(
    "logistic",
    train[None],
    labels,
    train[None],
    labels,
    train[None],
    [1e4],
    "accuracy",
  )
  assert not result.converged[0]
  assert result.iterations[0] == 1


def _broken(row, value):
  labels, train = _features("plain", 60, 120, classes=3)
  train[row, 2] = value
  return np.stack([_features("plain", 60, 120, classes=3)[1], train])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "forest"}, "kind must be one of logistic"),
    ({"metric": "f1"}, "metric must be one of accuracy"),
    ({"train_features": np.zeros((120, 48))}, r"\(R, N, D\)"),
    ({"val_features": np.zeros((1, 90, 47))}, "channels"),
    ({"train_labels": np.zeros(119, int)}, "train labels must be"),
    ({"train_labels": np.zeros(120)}, "integers"),
    ({"train_labels": np.full(120, 2)}, "all of one class"),
    ({"val_labels": np.full(90, 1)}, "not defined"),
    ({"strengths": []}, "strengths"),
    ({"strengths": [0.0, 1.0]}, "strengths"),
    ({"num_classes": 2}, "num_classes = 2"),
    ({"train_features": _broken(7, np.nan)[1:]}, "train features of row 7"),
    ({"train_features": _broken(9, np.inf)[1:]}, "row 9 .network 0."),
  ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    _fit(changes.pop("kind", "logistic"), **changes)


def test_a_last_chunk_that_is_not_full_ends_with_its_fits(monkeypatch):
  """Three networks in chunks of two: the place left over must not go on.

  Its scores are never read, so only the number of rounds would tell: each is
  one call, and twice as long as the one before.
  """
  random = np.random.default_rng(0)
  y = np.arange(240) % 3
  x = random.normal(size=(3, 240, 16)).astype(np.float32) + y[:, None] / 2
  rounds = []
  descend = probes._descend
  monkeypatch.setattr(
    probes, "_descend", lambda *a: (rounds.append(a[-1]), descend(*a))[1]
  )
  monkeypatch.setattr(probes, "_chunks", lambda *_: (2, 2))
  probes.fit_probe("logistic", x, y, x, y, x, (0.01, 1.0), "auroc")
  assert len(rounds) <= 4
