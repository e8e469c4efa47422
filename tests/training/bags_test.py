"""A training on bags: its loss and steps, and that a stop changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import errors, parallel
from jaxtransfer.data import buckets, dataset
from jaxtransfer.networks import functional, pooling
from jaxtransfer.training import bags, loop
from tests.data import slides as making
from tests.jobs import configs
from tests.networks.pooling_test import reference
from tests.training.task_test import _Memory, _without_times

SLIDES = 16


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  return making.write_slides(tmp_path_factory.mktemp("slides"), SLIDES)


def config(table, **changes):
  made = configs.load("slides")
  settings = {
    "data.source": str(table),
    "data.features": str(table.parent / "features"),
    "folds": 0,
    "data.split_fractions": (0.5, 0.25, 0.25),
    "epochs": 2,
    "log_steps": 1,
    "checkpoint_seconds": 0.0,
    "pooling.embedding": (8,),
    "pooling.attention": 4,
  }
  made.update_from_flattened_dict(settings | changes)
  return made


def task(table, tmp_path, *, mode="jit", count=1, programs=None, **changes):
  made = config(table, **changes)
  (data,) = dataset.open_divisions(made, tmp_path / "no" / "splits.json")
  store = buckets.Store(data.examples, 1e9)
  source = buckets.Features(store, 0, data.examples.encoders[0])
  network = pooling.BagNetwork(
    making.CHANNELS,
    len(data.names),
    pooling="gated_attention",
    embedding=made.pooling.embedding,
    attention=made.pooling.attention,
    dropout=made.pooling.dropout,
  )
  pooling.randomise(network, 0)
  devices = parallel.Devices(mode, jax.devices()[:count])
  return (
    bags.BagTask(
      made, data, source, network, devices, seed=1, programs=programs
    ),
    data,
    devices,
  )


def stepped(made, devices, number=1):
  """Returns the parameters after some steps, and each step's loss."""
  state, losses = devices.replicate(made.first_state()), []
  with made.batches as batches:
    for _ in range(number):
      state, metrics = made.step(1)(state, made.put(next(batches)))
      losses.append(float(metrics["loss"]))
  return jax.device_get(state.params), losses


def test_a_step_goes_down_the_weighted_mean_of_the_bags_losses(table, tmp_path):
  """Plain descent: what it moved is the gradient, that of torch's
  CrossEntropyLoss(weight), written out and taken of one bag after the other;
  the last batch is not full."""
  changes = {
    "batch_size": 3,
    "data.few_shot": 2,
    "loss.class_weights": "balanced",
    "optimiser.name": "sgd",
    "optimiser.momentum": 0.0,
    "optimiser.learning_rate": 1.0,
  }
  made, data, devices = task(table, tmp_path, **changes)
  assert len(data.rows["train"]) == 4
  batches = list(made.batches)
  assert [int(batch["mask"].sum()) for batch in batches[:2]] == [3, 1]
  start = made.first_state()
  network = made.merged((jax.device_get(start.params), {}))
  graph, params, _ = functional.split(network)
  weights = data.class_weights("balanced")

  @functools.partial(jax.jit, static_argnums=1)
  def of_loss(params, row):
    features = data.examples.read(row)[None]
    label = data.examples.labels[row]

    def loss(params):
      network = functional.merge(graph, params, {})
      logits = network(features, jnp.ones(features.shape[:2], bool))[0]
      return -weights[label] * jax.nn.log_softmax(logits)[label]

    return jax.value_and_grad(loss)(params)

  state = devices.replicate(start)
  for batch in batches[:2]:
    before = jax.device_get(state.params)
    state, metrics = made.step(1)(state, made.put(batch))
    rows = batch["row"][batch["mask"]]
    total = weights[data.examples.labels[rows]].sum()
    found = [of_loss(before, int(row)) for row in rows]
    assert abs(metrics["loss"] - sum(f[0] for f in found) / total) < 1e-6
    for name, value in jax.device_get(state.params).items():
      gradient = sum(of[name] for _, of in found) / total
      np.testing.assert_allclose(
        before[name] - value, gradient, atol=2e-6, err_msg=name
      )


@pytest.mark.parametrize(
  ("mode", "count", "accumulate"),
  [
    ("jit", 2, 1),
    ("jit", 1, 2),
    pytest.param(*("pmap", 2, 1), marks=pytest.mark.slow),
  ],
)
def test_devices_and_parts_give_the_same_step(
  table, tmp_path, mode, count, accumulate
):
  """With what is dropped: it is each bag's own."""
  about = {
    "batch_size": 4,
    "bag_size": 16,
    "pooling.dropout": 0.3,
    # Of the score's bias every gradient is zero; Adam makes much of rounding.
    "optimiser.name": "sgd",
    "optimiser.learning_rate": 0.1,
  }
  expected, losses = stepped(*task(table, tmp_path, **about)[::2], number=3)
  found, again = stepped(
    *task(
      table,
      tmp_path,
      mode=mode,
      count=count,
      accumulate=accumulate,
      **about,
    )[::2],
    number=3,
  )
  np.testing.assert_allclose(again, losses, atol=1e-6)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, atol=3e-6, err_msg=name)


def test_folds_share_what_was_compiled(table, tmp_path):
  """Another fold, other class weights and another seed compile nothing: six
  lengths at most, here one, of a step and of a forward pass each."""
  changes = {"folds": 4, "loss.class_weights": "balanced"}
  made = config(table, **changes)
  divisions = dataset.open_divisions(made, tmp_path / "splits.json")
  examples = divisions[0].examples
  store = buckets.Store(examples, 1e9)
  source = buckets.Features(store, 0, examples.encoders[0])
  devices = parallel.Devices("jit", jax.devices()[:1])
  programs = None
  for fold in range(2):
    network = pooling.BagNetwork(
      making.CHANNELS, 2, pooling="mean", embedding=(4,), attention=1
    )
    pooling.randomise(network, fold)
    training = bags.BagTask(
      made,
      divisions[fold],
      source,
      network,
      devices,
      seed=fold,
      programs=programs,
    )
    programs = training.programs
    params, _ = stepped(training, devices, number=4)
    training.validate((devices.replicate(params), {}), [], lambda: False)
  lengths = len(buckets.lengths(divisions[0].examples.encoders[0].tiles))
  assert programs.step._cache_size() <= lengths
  assert programs.forward._cache_size() <= lengths


def test_predictions_are_of_all_tiles_in_the_order_of_the_slides(
  table, tmp_path
):
  """Whatever is drawn in training; beside them what every tile counts."""
  made, data, _ = task(table, tmp_path, bag_size=2)
  made.batches.close()
  numbers = jax.device_get((made.first_state().params, {}))
  arrays = pooling.dump(made.merged(numbers))

  def said(features):
    return reference(arrays, features, "gated_attention")

  outputs = made.predict(numbers, ("val", "test"))
  for split, (rows, logits) in outputs.items():
    assert rows.tolist() == data.rows[split].tolist()
    for row, of_row in zip(rows.tolist(), logits, strict=True):
      expected, _, _ = said(data.examples.read(row))
      np.testing.assert_allclose(of_row, expected, atol=1e-6)
  slides = {slide.row: slide for slide in made.read(numbers, "test")}
  assert sorted(slides) == data.rows["test"].tolist()
  for row, slide in slides.items():
    features = data.examples.read(row)
    logits, weights, scores = said(features)
    np.testing.assert_allclose(slide.logits, logits, atol=1e-6)
    np.testing.assert_allclose(slide.attention, weights, atol=1e-6)
    np.testing.assert_allclose(slide.scores, scores, atol=1e-6)
    alone = [said(tile[None])[0] for tile in features]
    np.testing.assert_allclose(slide.tiles, alone, atol=1e-6)
  assert made.failures == {}


def fit(table, path, memory, **changes):
  made, _, devices = task(table, path, **changes)
  return loop.fit(
    made, made.settings, devices=devices, directory=path, journal=memory
  )


def test_a_stop_changes_no_bit(table, tmp_path):
  """Drawn tiles, drawn slides, what is dropped, Adam: stopped within the second
  epoch and gone on from a checkpoint of the first, or of none."""
  changes = {
    "epochs": 3,
    "bag_size": 8,
    "sampling": "balanced",
    "pooling.dropout": 0.25,
    "epoch_metric": "loss",
    "optimiser.weight_decay": 1e-3,
  }
  whole = fit(table, tmp_path / "whole", _Memory(), **changes)
  for seconds, stop_at in ((0.0, 12), (1e9, 13)):
    path = tmp_path / f"stopped-{stop_at}"
    about = changes | {"checkpoint_seconds": seconds}
    with pytest.raises(SystemExit) as ended:
      fit(table, path, _Memory(stop_at), **about)
    assert ended.value.code == 143
    resumed = fit(table, path, _Memory(), **about)
    assert _without_times(resumed.records) == _without_times(whole.records)
    for name, value in whole.numbers[0].items():
      np.testing.assert_array_equal(resumed.numbers[0][name], value)
  losses = [r["val"]["loss"] for r in loop.epochs_of(whole.records)]
  assert whole.epoch == 1 + int(np.argmin(losses))
  assert any("slides_per_second" in r["timing"] for r in whole.records)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"sampling": "all"}, "config.sampling"),
    ({"bag_size": -1}, "config.bag_size"),
    ({"batch_size": 3, "accumulate": 2}, "config.batch_size"),
    ({"loss.class_weights": "some"}, "config.loss.class_weights"),
    ({"optimiser.name": "lion"}, "config.optimiser.name"),
    ({"ties": "both"}, "config.ties"),
    ({"least_epochs": -1}, "config.least_epochs"),
  ],
)
def test_a_key_out_of_range_is_named(table, tmp_path, changes, says):
  with pytest.raises(errors.UsageError, match=says):
    task(table, tmp_path, **changes)
