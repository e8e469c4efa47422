"""Checkpoints: whole, newest, and never a damaged one."""

import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import errors
from jaxtransfer.data import pipeline
from jaxtransfer.training import checkpoints


class _Counting(pipeline.Batches):
  """Batches of nothing: only their place counts."""

  def __init__(self):
    super().__init__(
      None, np.arange(64), image_size=1, batch_size=1, shuffle_seed=0
    )


def _at(number):
  iterator = _Counting()
  iterator.set_state({**iterator.get_state(), "next_batch": number})
  return iterator


def _tree(value):
  return {
    "params": {"layers.0.kernel": jnp.full((300, 7), value)},
    "step": jnp.int32(value),
    "pair": (np.arange(3.0), jnp.zeros((), jnp.uint32)),
  }


@pytest.fixture
def saved(tmp_path):
  """Three checkpoints, of which two are kept."""
  with checkpoints.Checkpoints(tmp_path, keep=2) as kept:
    for number in (1, 2, 3):
      records = [{"event": "train", "loss": float("nan"), "step": number}]
      kept.save(number, _tree(number), _at(number), records, "one device")
  return tmp_path


def _restore(path):
  iterator = _Counting()
  with checkpoints.Checkpoints(path, keep=2) as kept:
    found, notes = kept.restore(_tree(0), iterator)
  return found, notes, iterator.get_state()["next_batch"]


def test_the_newest_comes_back_bit_by_bit(saved):
  found, notes, place = _restore(saved)
  assert not notes and place == 3
  assert jax.tree.structure(found.tree) == jax.tree.structure(_tree(0))
  for one, other in zip(
    jax.tree.leaves(found.tree), jax.tree.leaves(_tree(3)), strict=True
  ):
    assert one.dtype == other.dtype and (one == other).all()
  assert found.records[0]["step"] == 3 and np.isnan(found.records[0]["loss"])
  assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == [
    "2",
    "3",
  ]


def test_an_array_may_be_donated_once_save_returns(tmp_path):
  """The next step is given the memory; what is written is what there was."""
  step = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  state = {"a": jnp.zeros((1000, 1000))}
  with checkpoints.Checkpoints(tmp_path, keep=1) as kept:
    kept.save(1, state, _at(0), [], "")
    for _ in range(5):
      state = step(state)
    jax.block_until_ready(state)
  with checkpoints.Checkpoints(tmp_path, keep=1) as kept:
    found, _ = kept.restore(state, _at(0))
  assert (found.tree["a"] == 0).all()


def _largest_file(path):
  files = [p for p in path.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def _cut(path):
  file = _largest_file(path)
  os.truncate(file, file.stat().st_size // 2)


def _flip(path):
  file = _largest_file(path)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0xFF
  file.write_bytes(content)


def _empty_place(path):
  (next((path / "iterator").glob("*.json"))).write_text("")


def _lose_values(path):
  shutil.rmtree(path / "arrays")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty_place, _lose_values])
def test_a_damaged_one_is_said_and_the_one_before_is_used(saved, damage):
  """Whether files are short, changed, empty or gone; the iterator stands where
  the one that is used had it, and the damaged number can be saved again."""
  damage(saved / "3")
  found, notes, place = _restore(saved)
  assert len(notes) == 1 and "3 is damaged" in notes[0]
  assert (found.tree["step"], place) == (2, 2)
  with checkpoints.Checkpoints(saved, keep=2) as kept:
    kept.save(3, _tree(3), _at(3), [], "")
  assert _restore(saved)[0].tree["step"] == 3


def test_all_damaged_is_a_start_from_the_beginning(saved):
  for number in ("2", "3"):
    _cut(saved / number)
  found, notes, place = _restore(saved)
  assert found is None and len(notes) == 2 and place == 0


@pytest.fixture
def full_disk():
  """No file of this process can grow beyond 64 KB, as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_said_and_the_one_before_stays(saved, full_disk):
  """Writing goes on in the background; whoever waits for it is told."""
  noise = np.random.default_rng(0).normal(size=(300, 7000))
  with (
    pytest.raises(errors.RunError, match="the one before is intact"),
    checkpoints.Checkpoints(saved, keep=2) as kept,
  ):
    tree = {**_tree(4), "params": {"layers.0.kernel": noise}}
    kept.save(4, tree, _at(4), [], "")
    kept.wait()
  found, notes, _ = _restore(saved)
  assert found.tree["step"] == 3 and not notes
