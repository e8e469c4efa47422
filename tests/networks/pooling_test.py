"""Pooling networks against the papers' formulas in float64, and padded."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import errors
from jaxtransfer.networks import functional, pooling
from jaxtransfer.weights import bags as weights_bags

CHANNELS, CLASSES = 12, 3
# The gated attention has the other one in it.
KINDS = [
  kind
  if kind in ("gated_attention", "max")
  else pytest.param(kind, marks=pytest.mark.slow)
  for kind in pooling.POOLINGS
]


def network(kind="attention", seed=0, **changes):
  settings = {"embedding": (10, 7), "attention": 5} | changes
  made = pooling.BagNetwork(CHANNELS, CLASSES, pooling=kind, **settings)
  pooling.randomise(made, seed)
  return made


def compiled(made, method="__call__"):
  """Returns a method of a network as one program."""
  graph, params, statistics = functional.split(made)

  @jax.jit
  def run(*arguments):
    return getattr(functional.merge(graph, params, statistics), method)(
      *arguments
    )

  return run


def bag(tiles, number=0):
  draw = np.random.default_rng(number).normal(size=(tiles, CHANNELS))
  return draw.astype(np.float32)


def padded(bags, length):
  features = np.full((len(bags), length, CHANNELS), 1e4, np.float32)
  mask = np.zeros((len(bags), length), bool)
  for i, tiles in enumerate(bags):
    features[i, : len(tiles)] = tiles
    mask[i, : len(tiles)] = True
  return features, mask


def linear(values, arrays, name):
  weight, bias = (arrays[f"{name}.{of}"] for of in ("weight", "bias"))
  return values @ weight.astype(np.float64).T + bias


def reference(arrays, features, kind):
  """Ilse et al.'s equations 7 to 9, a bag at a time, float64.

  Returns:
    Logits, the weights of the tiles, and their scores.
  """
  h = features.astype(np.float64)
  for i in range(sum(".weight" in n and "embedding" in n for n in arrays)):
    h = np.maximum(linear(h, arrays, f"embedding.{i}"), 0)
  if kind == "mean":
    return linear(h.mean(0), arrays, "head"), np.full(len(h), 1 / len(h)), None
  if kind == "max":
    held = [np.flatnonzero(h[:, c] == h[:, c].max()) for c in range(h.shape[1])]
    shares = np.zeros(len(h))
    for places in held:
      shares[places] += 1 / len(places) / len(held)
    return linear(h.max(0), arrays, "head"), shares, None
  inside = np.tanh(linear(h, arrays, "pooling.tanh"))
  if kind == "gated_attention":
    inside /= 1 + np.exp(-linear(h, arrays, "pooling.gate"))
  scores = linear(inside, arrays, "pooling.score")[:, 0]
  weights = np.exp(scores) / np.exp(scores).sum()
  return linear(weights @ h, arrays, "head"), weights, scores


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_published_formula_however_much_is_padded(kind):
  """Three bags, one of a single tile, padded by what would count most if it
  counted at all."""
  made, bags = network(kind), [bag(9), bag(1, 1), bag(4, 2)]
  arrays = pooling.dump(made)
  for length in (9, 32):
    features, mask = padded(bags, length)
    read = compiled(made, "read")(features, mask)
    np.testing.assert_allclose(
      compiled(made)(features, mask), read.logits, atol=1e-6
    )
    for i, tiles in enumerate(bags):
      logits, weights, scores = reference(arrays, tiles, kind)
      n = len(tiles)
      np.testing.assert_allclose(read.logits[i], logits, atol=2e-6)
      found = read.attention.weights[i]
      np.testing.assert_allclose(found[:n], weights, atol=1e-6)
      assert not found[n:].any() and abs(found.sum() - 1) < 1e-6
      assert not read.attention.scores[i, n:].any()
      if scores is not None:
        np.testing.assert_allclose(
          read.attention.scores[i, :n], scores, atol=2e-6
        )
      for j, tile in enumerate(tiles):
        alone, _, _ = reference(arrays, tile[None], kind)
        np.testing.assert_allclose(read.tiles[i, j], alone, atol=2e-6)
    of = compiled(made, "attention")(features, mask)
    np.testing.assert_allclose(of.weights, read.attention.weights, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_several_bags_have_the_gradients_of_each_alone(kind):
  """With what is dropped, too: it is the bag's own, and not its place's, nor
  that of the padding behind it."""
  made = network(kind, dropout=0.3, attention_dropout=0.2)
  graph, params, statistics = functional.split(made)
  bags, labels = [bag(6), bag(1, 1), bag(17, 2)], [0, 2, 1]
  keys = jax.random.split(jax.random.key(3), len(bags))

  @functools.partial(jax.jit, static_argnums=(1, 2))
  @jax.grad
  def gradient(params, which, length):
    features, mask = padded([bags[i] for i in which], length)
    logits = functional.merge(graph, params, statistics)(
      features, mask, keys[jnp.array(which)]
    )
    chosen = jax.nn.log_softmax(logits)
    right = chosen[np.arange(len(which)), np.array(labels)[list(which)]]
    return -right.mean()

  together = gradient(params, (0, 1, 2), 32)
  alone = [gradient(params, (i,), len(bags[i])) for i in range(3)]
  assert any(np.abs(value).max() > 1e-3 for value in together.values())
  for name, value in together.items():
    mean = np.mean([of[name] for of in alone], axis=0)
    np.testing.assert_allclose(value, mean, atol=1e-6, err_msg=name)
  # In inference nothing is dropped.
  features, mask = padded(bags, 17)
  plain = compiled(network(kind))(features, mask)
  np.testing.assert_array_equal(compiled(made)(features, mask), plain)


def test_dropout_drops_its_share_and_keeps_the_mean():
  made = network("mean", dropout=0.4, embedding=(200,))
  features, mask = padded([np.ones((50, CHANNELS), np.float32)], 50)
  whole = np.asarray(made.embed(features))
  dropped = np.asarray(
    made.embed(features, jax.random.split(jax.random.key(0), 1))
  )
  there = whole > 0
  assert abs((dropped[there] == 0).mean() - 0.4) < 0.02
  kept = there & (dropped != 0)
  np.testing.assert_allclose(dropped[kept], whole[kept] / 0.6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bag_without_tiles_gives_numbers_and_no_gradient(kind):
  """What is padded to fill a batch is such a bag."""
  made = network(kind)
  graph, params, statistics = functional.split(made)
  features, mask = padded([bag(3), bag(0)], 8)

  @jax.jit
  def both(params):
    def logits(params):
      return functional.merge(graph, params, statistics)(features, mask)

    return logits(params), jax.grad(lambda p: logits(p)[1].sum())(params)

  logits, gradient = both(params)
  assert np.isfinite(logits).all()
  for name, value in gradient.items():
    assert np.isfinite(value).all(), name
    if not name.startswith("head"):
      assert not np.asarray(value).any(), name


def test_half_precision_stays_near_and_features_may_be_of_any_type():
  features, mask = padded([bag(20)], 20)
  exact = compiled(network("gated_attention"))(features, mask)
  made = network("gated_attention", dtype=jnp.bfloat16)
  found = compiled(made)(features, mask)
  assert found.dtype == jnp.float32
  assert 1e-5 < np.abs(found - exact).max() < 0.03
  half = compiled(network("gated_attention"))(features.astype(np.float16), mask)
  np.testing.assert_allclose(half, exact, atol=2e-3)


def test_numbers_are_those_of_torch_s_linear_and_of_their_names():
  """Uniform within 1 / sqrt(inputs), every tensor by its name: another pooling
  begins with the same embedding and head."""
  made = pooling.dump(network("attention", embedding=(300, 64)))
  other = pooling.dump(network("gated_attention", embedding=(300, 64)))
  for name in ("embedding.0.weight", "embedding.1.bias", "head.weight"):
    np.testing.assert_array_equal(made[name], other[name])
  assert made["embedding.0.weight"].shape == (300, CHANNELS)
  for name in ("embedding.1.weight", "embedding.1.bias"):
    bound = 1 / np.sqrt(300)
    assert 0.9 * bound < np.abs(made[name]).max() <= bound
  again = pooling.dump(network("attention", seed=1, embedding=(300, 64)))
  assert (again["head.weight"] != made["head.weight"]).all()


def test_what_is_exported_is_read_back(tmp_path):
  path = tmp_path / "model.safetensors"
  made = network("gated_attention", dropout=0.25)
  weights_bags.export(made, path, {"classes": ["a", "b", "c"]})
  back, about = weights_bags.load(path)
  assert about["classes"] == ["a", "b", "c"]
  assert json.loads(path.with_suffix(".json").read_text()) == about
  features, mask = padded([bag(5)], 8)
  np.testing.assert_array_equal(
    compiled(back)(features, mask), compiled(made)(features, mask)
  )
  assert back.settings == made.settings
  (tmp_path / "other.safetensors").write_bytes(b"no")
  with pytest.raises(errors.UsageError, match="other"):
    weights_bags.load(tmp_path / "other.safetensors")


def test_what_does_not_fit_is_refused():
  with pytest.raises(errors.UsageError, match="did you mean 'attention'"):
    network("atention")
  made = network("attention")
  arrays = pooling.dump(made)
  arrays["head.bias"] = np.zeros(2)
  with pytest.raises(ValueError, match="head.bias"):
    pooling.load(made, arrays)
