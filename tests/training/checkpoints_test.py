"""Checkpoints: whole, newest, and never a damaged one."""

import contextlib
import os
import pathlib
import resource
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import errors
from jaxtransfer.training import checkpoints


def _place(number):
  return {"next_batch": number, "failures": [[7, "cut short"]]}


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
      kept.save(
        number,
        _tree(number),
        _place(number),
        records,
        "one device",
        seconds=number / 4,
      )
  return tmp_path


def _restore(path):
  with checkpoints.Checkpoints(path, keep=2) as kept:
    return kept.restore(_tree(0))


def test_the_newest_comes_back_bit_by_bit(saved):
  found, notes = _restore(saved)
  assert not notes and found.place == _place(3)
  assert found.devices == "one device" and found.seconds == 0.75
  assert jax.tree.structure(found.tree) == jax.tree.structure(_tree(0))
  for one, other in zip(
    jax.tree.leaves(found.tree), jax.tree.leaves(_tree(3)), strict=True
  ):
    assert one.dtype == other.dtype and (one == other).all()
  # JSON has no NaN: what was no number is null.
  assert found.records[0]["step"] == 3 and found.records[0]["loss"] is None
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
    kept.save(1, state, _place(0), [], "")
    for _ in range(5):
      state = step(state)
    jax.block_until_ready(state)
  with checkpoints.Checkpoints(tmp_path, keep=1) as kept:
    found, _ = kept.restore(state)
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
  (path / "about" / "metadata").write_text("")


def _lose_place(path):
  file = path / "about" / "metadata"
  file.write_text(file.read_text().replace("place", "plate"))


def _lose_values(path):
  shutil.rmtree(path / "arrays")


@pytest.mark.parametrize(
  "damage", [_cut, _flip, _empty_place, _lose_place, _lose_values]
)
def test_a_damaged_one_is_said_and_the_one_before_is_used(saved, damage):
  """Whether files are short, changed, empty or gone; and the damaged number can
  be saved again."""
  damage(saved / "3")
  found, notes = _restore(saved)
  assert len(notes) == 1 and "3 is damaged" in notes[0]
  assert found.tree["step"] == 2 and found.place == _place(2)
  with checkpoints.Checkpoints(saved, keep=2) as kept:
    kept.save(3, _tree(3), _place(3), [], "")
  assert _restore(saved)[0].tree["step"] == 3


def _everything(path):
  return {
    p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()
  }


def test_a_damaged_one_is_moved_and_not_removed(saved):
  """Where the note says, file by file."""
  _cut(saved / "3")
  before = _everything(saved / "3")
  _, notes = _restore(saved)
  (moved,) = saved.glob("damaged-3-*")
  assert str(moved) in notes[0] and not (saved / "3").exists()
  assert _everything(moved) == before


def test_all_damaged_is_no_start_from_the_beginning(saved):
  """It is refused, now and the next time, and nothing is touched."""
  for number in ("2", "3"):
    _cut(saved / number)
  before = _everything(saved)
  for _ in range(2):
    with pytest.raises(errors.RunError, match="remove the directory") as raised:
      _restore(saved)
    assert str(saved) in str(raised.value) and "\n" not in str(raised.value)
  assert _everything(saved) == before


def test_another_structure_is_no_damage_to_be_swept_away(saved):
  """A state with one more array fits no checkpoint: all stay."""
  before = _everything(saved)
  with (
    checkpoints.Checkpoints(saved, keep=2) as kept,
    pytest.raises(errors.RunError, match="no checkpoint can be read"),
  ):
    kept.restore({**_tree(0), "more": jnp.zeros(3)})
  assert _everything(saved) == before
  assert _restore(saved)[0].tree["step"] == 3


@pytest.mark.parametrize("name", ["arrays", "arrays/manifest.ocdbt", "about"])
def test_what_may_not_be_read_is_not_damaged(name):
  """Once the permission is back, the newest is there as it was."""
  with tempfile.TemporaryDirectory() as root:
    path = pathlib.Path(root) / "checkpoints"
    with checkpoints.Checkpoints(path, keep=2) as kept:
      for number in (1, 2):
        kept.save(number, _tree(number), _place(number), [], "")
    for part in (path.parent, *path.parent.rglob("*")):
      part.chmod(0o777)
    (path / "2" / name).chmod(0)
    with (
      _powerless(),
      pytest.raises(errors.RunError, match="give permission") as raised,
    ):
      _restore(path)
    assert str(path / "2") in str(raised.value)
    (path / "2" / name).chmod(0o777)
    found, notes = _restore(path)
    assert found.tree["step"] == 2 and not notes


def test_too_little_memory_is_not_damage(saved, monkeypatch):
  """NumPy's and tensorstore's own error, raised where the arrays are read."""

  def exhausted(*_, **__):
    raise MemoryError("no room for 8 GiB")

  with checkpoints.Checkpoints(saved, keep=2) as kept:
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints, "_checksum", exhausted)
      with pytest.raises(errors.RunError, match="8 GiB.*free memory"):
        kept.restore(_tree(0))
    assert kept.restore(_tree(0))[0].tree["step"] == 3


def _numbers(path):
  return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def test_the_best_epoch_stays_however_old_it_is(tmp_path):
  """Beside the newest two there is that of the best epoch, until there is a
  better one, also after a new start; when the newest are damaged, it is what
  training goes on from."""
  for number in range(1, 6):
    # Each a run of its own.
    with checkpoints.Checkpoints(tmp_path, keep=2) as kept:
      kept.restore(_tree(0))
      kept.save(
        number, _tree(number), _place(number), [], "", is_best=number == 2
      )
  assert _numbers(tmp_path) == [2, 4, 5]
  for number in ("4", "5"):
    _cut(tmp_path / number)
  found, notes = _restore(tmp_path)
  assert found.tree["step"] == 2 and len(notes) == 2
  with checkpoints.Checkpoints(tmp_path, keep=1) as kept:
    kept.restore(_tree(0))
    for number in (3, 4, 5):
      kept.save(number, _tree(3), _place(3), [], "", is_best=number == 4)
  assert _numbers(tmp_path) == [4, 5]


@contextlib.contextmanager
def _powerless():
  """Takes away what lets root write where permissions forbid it."""
  user = os.geteuid()
  if user == 0:
    os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(user)


def test_a_directory_that_cannot_be_written_is_said():
  """One line that names it, and the checkpoint that was there is intact."""
  # Not pytest's own, which only its owner may enter.
  with tempfile.TemporaryDirectory() as name:
    path = pathlib.Path(name) / "checkpoints"
    with checkpoints.Checkpoints(path, keep=2) as kept:
      kept.save(1, _tree(1), _place(1), [], "")
    path.parent.chmod(0o755)
    path.chmod(0o555)
    with (
      _powerless(),
      pytest.raises(errors.RunError, match="give permission") as raised,
      checkpoints.Checkpoints(path, keep=2) as kept,
    ):
      found, _ = kept.restore(_tree(0))
      assert found.tree["step"] == 1
      kept.save(2, _tree(2), _place(2), [], "")
      kept.wait()
    path.chmod(0o755)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    found, notes = _restore(path)
    assert found.tree["step"] == 1 and not notes


@pytest.fixture
def full_disk():
  """No file of this process can grow beyond 64 KB, as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_said_and_the_one_before_stays(saved, full_disk, capfd):
  """Writing goes on in the background; whoever waits for it is told, in one
  line, and nothing that was begun is left to take up the room."""
  noise = np.random.default_rng(0).normal(size=(300, 7000))
  with (
    pytest.raises(errors.RunError, match="the one before is intact") as raised,
    checkpoints.Checkpoints(saved, keep=2) as kept,
  ):
    tree = {**_tree(4), "params": {"layers.0.kernel": noise}}
    kept.save(4, tree, _place(4), [], "")
    kept.wait()
  assert "(File too large)" in str(raised.value)
  assert {path.name for path in saved.iterdir()} == {"2", "3"}
  assert capfd.readouterr().err == ""
  found, notes = _restore(saved)
  assert found.tree["step"] == 3 and not notes
