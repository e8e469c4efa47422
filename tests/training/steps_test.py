"""The step: the same in both modes and on any devices, exact in its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxtransfer import parallel
from jaxtransfer.networks import functional
from jaxtransfer.training import steps
from tests.training import examples


def _train(
  recipe=None,
  network=None,
  mode="jit",
  count=1,
  number=3,
  change=lambda b: b,
  **objective,
):
  """Returns the state after some steps, on the host, and their losses."""
  network = network or examples.network()
  recipe = recipe or examples.recipe()
  devices = parallel.Devices(mode, jax.devices()[:count])
  objective = examples.objective(network, **objective)
  step = devices.compile_step(steps.make_step(objective, recipe))
  state = devices.replicate(examples.first_state(network, recipe))
  losses = []
  for i in range(number):
    batch = change(examples.batch(i, masked=2))
    state, metrics = step(state, devices.put(batch))
    losses.append(float(metrics["loss"]))
  return jax.device_get(state), np.array(losses)


def _largest(one, other):
  differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
  return max(jax.tree.leaves(differences))


def test_jit_and_pmap_and_one_and_eight_devices_train_alike():
  """Gradients and BatchNorm's statistics are those of the whole batch, so how
  it is divided changes nothing but the order of sums: 20 steps in float32, at
  a rate at which no rounding tips a ReLU or a max-pool over."""
  network = examples.network("layer1.0")
  recipe = examples.recipe(optimiser=examples.optimiser(learning_rate=0.001))
  flipped = examples.augmentation(flip_horizontal=True)
  runs = [
    _train(recipe, network, mode, count, number=20, augmentation=flipped)
    for mode, count in (("jit", 1), ("jit", 8), ("pmap", 8))
  ]
  for state, losses in runs[1:]:
    np.testing.assert_allclose(losses, runs[0][1], atol=1e-5)
    assert _largest(state.params, runs[0][0].params) < 1e-4
    assert _largest(state.statistics, runs[0][0].statistics) < 1e-4
  assert runs[0][1][-1] != runs[0][1][0]


def test_statistics_of_one_device_are_another_training_alike_in_both_modes():
  """Each of four devices normalises its own four images; what is kept is the
  mean over the devices, the same on all."""
  apart = {"batch_norm": "train_per_device", "count": 4}
  jit, losses = _train(mode="jit", **apart)
  pmap, again = _train(mode="pmap", **apart)
  np.testing.assert_allclose(losses, again, atol=1e-5)
  assert _largest(jit.statistics, pmap.statistics) < 1e-5
  _, together = _train(count=4)
  assert np.abs(together - losses).max() > 1e-3


def test_an_image_without_mask_counts_for_nothing():
  """With BatchNorm's running statistics images do not see each other, so the
  pixels and the label of one that is masked cannot matter at all."""

  def spoil(batch):
    hidden = ~batch["mask"]
    image = np.where(hidden[:, None, None, None], 255, batch["image"])
    return {
      **batch,
      "image": image.astype(np.uint8),
      "label": np.where(hidden, -1, batch["label"]).astype(np.int32),
    }

  one, losses = _train(batch_norm="eval")
  other, again = _train(batch_norm="eval", change=spoil)
  assert losses.tolist() == again.tolist()
  assert _largest(one.params, other.params) == 0
  assert one.sums["decisions"] == 3 * 14


def test_a_batch_without_any_image_is_no_number_nowhere():
  state, losses = _train(
    number=1,
    change=lambda b: {**b, "mask": np.zeros(16, bool)},
  )
  assert losses == [0.0]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_parts_of_a_batch_add_up_to_it():
  """Gradients are sums over images, so four parts give what one gives."""
  whole, losses = _train(batch_norm="eval")
  parts, again = _train(examples.recipe(accumulate=4), batch_norm="eval")
  np.testing.assert_allclose(losses, again, atol=1e-5)
  assert _largest(whole.params, parts.params) < 1e-5
  assert _largest(whole.sums, parts.sums) < 1e-3


@pytest.mark.parametrize(
  ("frozen", "batch_norm", "moves"),
  [
    (2, "train", {"head"}),
    (1, "train", {"layers.1", "head"}),
    (0, "frozen", {"layers.0", "layers.1", "head"}),
    (0, "train", {"layers.0", "layers.1", "head"}),
  ],
)
def test_what_is_kept_is_kept_bit_by_bit(frozen, batch_norm, moves):
  """Parameters and running statistics of layers that are not trained, and, with
  frozen BatchNorm, all scales, biases and statistics."""
  network = examples.network("layer1.0")
  recipe = examples.recipe(frozen, norms=batch_norm != "frozen")
  _, params, statistics = functional.split(network)
  before = jax.device_get({**params, **statistics})
  state, _ = _train(recipe, network, number=1, batch_norm=batch_norm)
  after = {**state.kept, **state.params, **state.statistics}
  assert after.keys() == before.keys()
  changed = {n for n in after if (after[n] != before[n]).any()}
  owners = {".".join(n.split(".")[:2]) for n in changed}
  assert {o if o.startswith("layers") else "head" for o in owners} == moves
  if batch_norm == "frozen":
    trunk = {n for n in changed if not n.startswith("head")}
    assert all(n.endswith("kernel") for n in trunk)


def test_the_average_follows_its_recursion():
  """a <- d a + (1 - d) p, after each step, from the first parameters; d grows
  to the decay that was asked for. BatchNorm's statistics likewise."""
  recipe = examples.recipe(average=0.15)
  network = examples.network()
  start = jax.device_get(examples.first_state(network, recipe))
  average = start.average
  # (1 + t) / (10 + t), and then the recipe's.
  for number, decay in ((1, 1 / 10), (2, 0.15), (3, 0.15)):
    state, _ = _train(recipe, number=number)
    average = jax.tree.map(
      lambda a, p, d=decay: d * a + (1 - d) * p,
      average,
      {**state.params, **state.statistics},
    )
  assert _largest(state.average, average) < 1e-6
  params, statistics = steps.trained_numbers(state)
  assert _largest({**params, **statistics}, state.average) == 0
  assert _largest(params, state.params) > 1e-5
  assert _largest(statistics, state.statistics) > 1e-3


def test_an_average_of_what_does_not_move_is_what_it_was():
  """With the trunk frozen its statistics are the first ones bit by bit."""
  network = examples.network()
  recipe = examples.recipe(average=0.999, frozen=1)
  state, _ = _train(recipe, network, number=2)
  _, before = jax.device_get(functional.split(network)[1:])
  _, judged = steps.trained_numbers(state)
  assert judged.keys() == before.keys()
  assert all((judged[name] == before[name]).all() for name in judged)


def test_an_average_forgets_the_first_parameters():
  """After 30 steps with 0.999 what is judged is nearer to where training is
  than to where it began; without the slow start 0.97 of it were the start."""
  recipe = examples.recipe(average=0.999)
  start = jax.device_get(examples.first_state(examples.network(), recipe))
  state, _ = _train(recipe, number=30)
  name = "head.kernel"
  judged = steps.trained_numbers(state)[0][name]
  moved = np.linalg.norm(state.params[name] - start.params[name])
  assert np.linalg.norm(judged - state.params[name]) < 0.5 * moved


def test_bfloat16_computes_and_float32_stays():
  """Half the mantissa moves the loss by a little; parameters stay float32."""
  _, exact = _train(number=1)
  half = examples.network(dtype=jnp.bfloat16)
  state, losses = _train(network=half, number=1)
  assert losses == pytest.approx(exact, rel=0.03) and losses != exact
  kinds = {x.dtype for x in jax.tree.leaves((state.params, state.statistics))}
  assert kinds == {np.dtype("float32")}


def test_the_flatten_head_reads_every_place_of_the_map():
  """Its weight has torch's order, channels then rows then columns."""
  network = examples.network(flatten=16)
  x_NHWC = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)))
  map_NHWC = network.taps(x_NHWC, ["stem"], pool=False)["stem"]
  flat = np.asarray(map_NHWC).transpose(0, 3, 1, 2).reshape(2, -1)
  expected = flat @ np.asarray(network.head.kernel[...])
  found = network(x_NHWC) - network.head.bias[...]
  assert network.head.kernel.shape == (64 * 4 * 4, 3)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_cross_entropy_is_torchs():
  """torch.nn.CrossEntropyLoss(weight, label_smoothing): the smoothed targets
  are weighted by class, the mean is over the weights of the true classes."""
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(9, 4)), rng.integers(0, 4, 9)
  weights = rng.uniform(0.5, 2, 4)
  loss = steps.Loss(
    np.eye(4, dtype=np.float32), False, weights.astype(np.float32), 0.1
  )
  log_p = special.log_softmax(logits, axis=1)
  targets = 0.9 * np.eye(4)[labels] + 0.1 / 4
  expected = -(targets * weights * log_p).sum(1)
  logits = jnp.asarray(logits, jnp.float32)
  np.testing.assert_allclose(loss(logits, labels), expected, rtol=1e-5)
  np.testing.assert_allclose(loss.weight(labels), weights[labels], rtol=1e-6)
  assert loss.weight(jnp.array([-1, 0]))[0] == 0


def test_several_labels_are_a_sigmoid_each_and_missing_ones_are_nothing():
  """torch.nn.BCEWithLogitsLoss(pos_weight) over the labels that are known."""
  rng = np.random.default_rng(0)
  targets = np.array([[1, 0, np.nan], [0, np.nan, np.nan], [1, 1, 0]])
  logits = rng.normal(size=(3, 3))
  positive = np.array([2.0, 1.0, 0.5])
  loss = steps.Loss(
    targets.astype(np.float32), True, positive.astype(np.float32), 0.0
  )
  p = special.expit(logits)
  each = -(positive * targets * np.log(p) + (1 - targets) * np.log(1 - p))
  labels = np.arange(3)
  found = loss(jnp.asarray(logits, jnp.float32), labels)
  np.testing.assert_allclose(found, np.nansum(each, 1), rtol=1e-5)
  np.testing.assert_allclose(loss.weight(labels), [2, 1, 3])
  gradient = jax.grad(lambda x: loss(x, labels).sum())(jnp.asarray(logits))
  assert (np.asarray(gradient)[np.isnan(targets)] == 0).all()
  right, known = loss.hits(jnp.asarray(logits), labels)
  expected = ((logits > 0) == (targets == 1)) & ~np.isnan(targets)
  assert right.tolist() == expected.sum(1).tolist()
  assert known.tolist() == [2, 1, 3]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_what_is_kept_at_first_can_be_trained_later(name):
  """Two steps share a state: by the first the trunk, its statistics and all
  that the optimiser remembers of it stay as they were, decay or not; by the
  second it moves as fast as its name says."""
  network = examples.network("layer1.0")
  optimiser = examples.optimiser(
    name=name, weight_decay=0.1, clip_norm=1.0, learning_rate=0.001
  )
  later = examples.recipe(optimiser=optimiser, backbone=0.5)
  warm_up = examples.recipe(optimiser=optimiser, frozen=2)
  objective = examples.objective(network)
  devices = parallel.Devices("jit", jax.devices()[:1])
  state = devices.replicate(examples.first_state(network, later))
  start = jax.device_get(state)
  batch = devices.put(examples.batch(0))
  step = devices.compile_step(steps.make_step(objective, warm_up))
  for _ in range(2):
    state, _ = step(state, batch)
  warm = jax.device_get(state)
  for key, value in warm.params.items():
    assert (value == start.params[key]).all() == key.startswith("layers"), key
  assert _largest(warm.statistics, start.statistics) == 0
  remembered = jax.tree_util.tree_leaves_with_path(warm.optimiser)
  trunk = [x for path, x in remembered if "layers" in str(path)]
  assert trunk and not any(np.any(x) for x in trunk)
  state, _ = devices.compile_step(steps.make_step(objective, later))(
    state, batch
  )
  moved = jax.device_get(state).params
  assert all((v != warm.params[k]).any() for k, v in moved.items())


def test_a_rate_is_a_share_of_the_step_of_what_it_names():
  """Without momentum one step of half the rate is half as long; whatever is
  named by its end, not by a layer's number, can have a rate of its own."""
  plain = examples.optimiser(momentum=0.0)
  network = examples.network()
  start = jax.device_get(examples.first_state(network, examples.recipe()))

  def moved(rate):
    recipe = examples.recipe(optimiser=plain, rate=rate)
    state, _ = _train(recipe, network, number=1, batch_norm="eval")
    return {n: v - start.params[n] for n, v in state.params.items()}

  whole = moved(lambda name: 1.0)
  half = moved(lambda name: 0.5 if name.endswith("kernel") else 1.0)
  for name, move in whole.items():
    share = 0.5 if name.endswith("kernel") else 1.0
    np.testing.assert_allclose(half[name], share * move, atol=1e-7)
