"""Bags in batches of few shapes: what is in them, in which order, and kept."""

import itertools

import ml_collections
import numpy as np
import pytest

from jaxtransfer.data import bags, buckets
from tests.data import slides as making


@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_lengths_are_those_that_pad_least(most):
  """Of all that could be chosen; one holds the largest bag."""
  rng = np.random.default_rng(most)
  for _ in range(5):
    tiles = rng.integers(1, 400, rng.integers(1, 40))
    sizes = buckets.lengths(tiles, most)
    assert len(sizes) <= most and sizes[-1] >= tiles.max()
    assert (np.diff(sizes) > 0).all() and not (sizes % 32).any()
    every = np.unique(-(-tiles // 32) * 32)
    least = min(
      buckets.padded(tiles, np.array([*some, every[-1]])).sum()
      for count in range(most)
      for some in itertools.combinations(every[:-1], count)
    )
    assert buckets.padded(tiles, sizes).sum() == least


def test_lengths_of_many_slides_are_chosen_at_once():
  rng = np.random.default_rng(0)
  tiles = rng.lognormal(8.5, 0.6, 20_000).astype(int) + 1
  sizes = buckets.lengths(tiles)
  waste = buckets.padded(tiles, sizes).sum() / tiles.sum()
  assert len(sizes) == buckets.MOST and waste < 1.3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  root = tmp_path_factory.mktemp("slides")
  table = making.write_slides(root, 12)
  making.write_slides(root, 12, folder="other", channels=4)
  return bags.open_bags(
    ml_collections.ConfigDict(
      {
        "source": str(table),
        "features": f"{root / 'features'},{root / 'other'}",
        "max_failures": 0.0,
      }
    )
  )


def batches(source, plan, read=None):
  store = buckets.Store(source, 1e9)
  features = buckets.Features(store, 0, source.encoders[0])
  if read is not None:
    features.read = read
  return buckets.Batches(
    features,
    plan,
    names=source.names,
    labels=source.labels,
    weights=np.array([0.5, 2.0], np.float32),
  )


def training(source, rows, **changes):
  settings = {"batch_size": 4, "epochs": 3, "seed": 5} | changes
  return buckets.Training(rows, source.encoders[0].tiles, **settings)


def test_a_batch_holds_its_bags_and_zeros_behind_them(source):
  """Every slide once in every epoch, in another order in each."""
  rows = np.array([0, 2, 3, 5, 7, 8, 10, 11, 4])
  plan = training(source, rows)
  with batches(source, plan) as made:
    every = list(made)
  assert len(every) == len(plan) == 9
  orders = []
  for batch in every:
    count, length, _ = batch["features"].shape
    assert count == 4
    there = batch["mask"]
    np.testing.assert_array_equal(batch["row"] >= 0, there)
    held = batch["row"][there]
    orders += held.tolist()
    np.testing.assert_array_equal(batch["label"][there], source.labels[held])
    assert (batch["label"][~there] == -1).all()
    expected = np.array([0.5, 2.0])[source.labels[held]]
    np.testing.assert_array_equal(batch["weight"][there], expected)
    assert (
      not batch["weight"][~there].any() and not batch["tiles"][~there].any()
    )
    assert length - batch["tiles"].max() < 32
    for i, row in enumerate(held):
      tiles = batch["tiles"][i]
      np.testing.assert_array_equal(
        batch["features"][i, :tiles], source.read(row)
      )
      assert not batch["features"][i, tiles:].any()
    assert not batch["features"][~there].any()
  epochs = np.reshape(orders, (3, 9))
  np.testing.assert_array_equal(np.sort(epochs), [np.sort(rows)] * 3)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  again = training(source, rows)
  np.testing.assert_array_equal(
    np.concatenate([again[i].rows for i in range(9)]), orders
  )
  other = training(source, rows, seed=6)
  assert list(other[0].rows) != list(again[0].rows)


def test_it_goes_on_where_it_was(source):
  """And what could not be read is known there, too, and counts for nothing."""

  def read(row):
    if row == 3:
      raise bags.ImageError("gone")
    return source.read(row)

  plan = training(source, np.arange(12))
  with batches(source, plan, read) as made:
    every = [next(made) for _ in range(5)]
    state = made.get_state()
    every += list(made)
    assert made.failures == [("slide03", "gone")]
  with batches(source, plan, read) as resumed:
    resumed.set_state(state)
    rest = list(resumed)
  assert len(rest) == 4 and len(every) == 9
  for batch, expected in zip(rest, every[5:], strict=True):
    for name, value in batch.items():
      np.testing.assert_array_equal(value, expected[name], err_msg=name)
  for batch in every:
    lost = batch["row"] == 3
    assert not batch["mask"][lost].any() and not batch["features"][lost].any()
    assert not batch["weight"][lost].any() and batch["mask"][~lost].all()


def test_drawn_tiles_are_others_in_each_epoch_and_of_the_bag(source):
  """Without replacement, in order, equally often; small bags are whole."""
  plan = training(source, np.arange(12), bag_size=8, epochs=400)
  assert max(plan[i].length for i in range(3)) == 32
  tiles = int(source.encoders[0].tiles[5])
  assert plan.draw(0, 8, 0) is None and tiles > 30
  draws = [plan.draw(5, tiles, epoch) for epoch in range(400)]
  assert all((np.diff(drawn) > 0).all() and len(drawn) == 8 for drawn in draws)
  counts = np.bincount(np.concatenate(draws), minlength=tiles)
  expected = 400 * 8 / tiles
  assert (
    len(counts) == tiles and abs(counts - expected).max() < 5 * expected**0.5
  )
  np.testing.assert_array_equal(plan.draw(5, tiles, 7), draws[7])
  assert list(plan.draw(4, tiles, 7)) != list(draws[7])
  with batches(source, plan) as made:
    batch = next(made)
  for i, row in enumerate(batch["row"]):
    whole = source.read(row)
    drawn = plan.draw(row, len(whole), 0)
    expected = whole if drawn is None else whole[drawn]
    np.testing.assert_array_equal(
      batch["features"][i, : batch["tiles"][i]], expected
    )


def test_balanced_draws_show_each_class_as_often(source):
  """Of eight slides of one class and four of the other."""
  rows = np.concatenate(
    [np.flatnonzero(source.labels == 0), np.flatnonzero(source.labels == 1)[:2]]
  )
  plan = training(source, rows, balance=source.labels, epochs=300)
  drawn = np.concatenate([plan[i].rows for i in range(len(plan))])
  assert len(drawn) == 300 * len(rows) and set(drawn) == set(rows.tolist())
  assert abs(source.labels[drawn].mean() - 0.5) < 0.03


@pytest.mark.parametrize("multiple", [1, 8])
def test_evaluation_takes_all_tiles_of_every_slide_once(source, multiple):
  rows = np.array([11, 3, 0, 7, 5])
  plan = buckets.Evaluation(rows, source.encoders[0].tiles, multiple)
  seen = np.concatenate([plan[i].rows for i in range(len(plan))])
  np.testing.assert_array_equal(np.sort(seen), np.sort(rows))
  assert not any(plan[i].count % multiple for i in range(len(plan)))
  assert len({plan[i].length for i in range(len(plan))}) == len(plan)
  # Long bags are not put together: the batch would need their memory at once.
  plan = buckets.Evaluation(np.arange(3), np.array([100_000, 99_000, 5]))
  counts = [plan[i].count for i in range(len(plan))]
  assert counts[0] > 1 and counts[1:] == [1, 1]


def test_the_store_keeps_what_fits_and_reads_the_rest_again(source, tmp_path):
  reads = []

  class Counting(bags.Bags):
    def __init__(self):
      self.__dict__.update(source.__dict__)
      self.encoders = [Read(of, n) for n, of in enumerate(source.encoders)]

  class Read:
    def __init__(self, of, number):
      self._of, self._number = of, number

    def __getattr__(self, name):
      return getattr(self._of, name)

    def read(self, row):
      reads.append((self._number, row))
      return self._of.read(row)

  sizes = [
    int(of.tiles.sum()) * of.channels * of.dtype.itemsize
    for of in source.encoders
  ]
  everything = [(e, r) for e in range(2) for r in range(12)]
  for budget, again in ((sum(sizes), []), (0, everything)):
    reads.clear()
    store = buckets.Store(Counting(), budget)
    assert store.check() == {} and reads == everything
    reads.clear()
    for encoder, row in everything:
      found = store.read(row, encoder).features
      np.testing.assert_array_equal(
        found, source.encoders[encoder].read(row).features
      )
    assert reads == again
  # Room for the larger of the two alone: the other's is given to it.
  store = buckets.Store(Counting(), sizes[0])
  store.check()
  for encoder in (0, 1, 0):
    store.only(encoder)
    for _ in range(2):
      reads.clear()
      for row in range(12):
        store.read(row, encoder)
    assert reads == [], encoder


def test_all_that_cannot_be_read_is_found_before_training(source, tmp_path):
  table = making.write_slides(tmp_path, 4)
  bad = making.features(1, False, 10)
  bad[3] = np.nan
  making.write_file(tmp_path / "features" / "slide01.h5", bad)
  opened = bags.open_bags(
    ml_collections.ConfigDict(
      {
        "source": str(table),
        "features": str(tmp_path / "features"),
        "max_failures": 1.0,
      }
    )
  )
  failures = buckets.Store(opened, 1e9).check()
  assert set(failures) == {"slide01"} and "1 of 10 tiles" in failures["slide01"]
