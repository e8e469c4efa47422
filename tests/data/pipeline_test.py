"""The same batches from threads and processes, now or after a stop."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jaxtransfer.data import pipeline, sources, tile_reading
from jaxtransfer.errors import RunError
from tests.data.counting import Numbers, Witness


def _batches(examples, rows=None, **options):
  return pipeline.Batches(
    examples,
    np.arange(len(examples)) if rows is None else rows,
    **{"image_size": 8, "batch_size": 4, **options},
  )


def _all(examples, rows=None, **options):
  with _batches(examples, rows, **options) as batches:
    return list(batches), batches.failures


def _equal(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    assert sorted(a) == sorted(b)
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def test_batches_hold_every_row_once_padded_to_one_shape():
  """10 rows in batches of 4: the last has two of each kind."""
  made, failures = _all(Numbers(10), np.arange(10)[::-1])
  assert failures == []
  for batch in made:
    assert batch["image"].shape == (4, 8, 8, 3)
    assert {key: value.dtype.name for key, value in batch.items()} == {
      "image": "uint8",
      "row": "int64",
      "label": "int32",
      "mask": "bool",
    }
    real = batch["mask"]
    np.testing.assert_array_equal(
      batch["image"][real][:, 0, 0, 0], batch["row"][real]
    )
    np.testing.assert_array_equal(batch["label"][real], batch["row"][real] % 2)
  rows = np.concatenate([batch["row"] for batch in made])
  np.testing.assert_array_equal(rows, [*range(9, -1, -1), -1, -1])
  np.testing.assert_array_equal(made[-1]["mask"], [True, True, False, False])
  assert not made[-1]["image"][2:].any()


def test_an_unreadable_image_is_masked_named_and_black():
  """It keeps its place: what it would have been is known, and not counted."""
  made, failures = _all(Numbers(10, broken=[2, 9]))
  assert failures == [
    ("2.png", "damaged image: for the test"),
    ("9.png", "damaged image: for the test"),
  ]
  np.testing.assert_array_equal(made[0]["mask"], [True, True, False, True])
  np.testing.assert_array_equal(made[0]["row"], [0, 1, 2, 3])
  assert not made[0]["image"][2].any()
  assert sum(batch["mask"].sum() for batch in made) == 8


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_make_the_batches_that_threads_make(workers):
  """Order, content and failures: 11 batches of two epochs, 3 by no divisor."""
  options = {"shuffle_seed": 5, "epochs": 2}
  examples = Numbers(21, broken=[4])
  made, failures = _all(examples, **options)
  again, failures_again = _all(examples, workers=workers, **options)
  _equal(made, again)
  assert failures == failures_again == [("4.png", failures[0][1])]


def test_more_processes_than_batches_are_not_started():
  """One batch of four rows: one process, which is not this one."""
  (batch,), _ = _all(Witness(4), workers=5, image_size=4)
  first, *others = batch["image"][:, 0, 0, :2].tolist()
  assert others == [first] * 3
  assert first != [os.getpid() % 256, os.getpid() // 256 % 256]


def test_a_process_does_not_import_jax():
  """It would cost seconds and, on a GPU, the memory of the first process."""
  (batch,), _ = _all(Witness(4), workers=1, image_size=4)
  assert not batch["image"][:, 0, 0, 2].any()


def test_every_epoch_is_another_order_that_the_seed_decides():
  rows = np.arange(3, 40)
  made = [
    np.concatenate(
      [
        b["row"][b["mask"]]
        for b in _all(Numbers(40), rows, shuffle_seed=seed, epochs=2)[0]
      ]
    )
    for seed in (1, 1, 2)
  ]
  np.testing.assert_array_equal(made[0], made[1])
  first, second = made[0][:37], made[0][37:]
  np.testing.assert_array_equal(np.sort(first), rows)
  np.testing.assert_array_equal(np.sort(second), rows)
  assert not np.array_equal(first, second)
  assert not np.array_equal(made[0], made[2])


def test_the_last_batch_is_dropped_on_request_unless_it_is_the_only_one():
  assert len(_all(Numbers(10), drop_last=True, epochs=2)[0]) == 4
  assert len(_all(Numbers(12), drop_last=True)[0]) == 3
  (only,), _ = _all(Numbers(3), drop_last=True)
  assert only["mask"].sum() == 3
  assert _all(Numbers(3), np.array([], int)) == ([], [])


def test_shards_are_parts_of_the_same_batches():
  """What several hosts read together is what one reads alone."""
  whole, _ = _all(Numbers(10), shuffle_seed=1)
  parts = [_all(Numbers(10), shuffle_seed=1, shard=(i, 2))[0] for i in (0, 1)]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*parts, strict=True)
  ]
  _equal(whole, joined)


def test_sizes_out_of_range_are_refused():
  for options in (
    {"batch_size": 0},
    {"image_size": 0},
    {"epochs": 0},
    {"shard": (2, 2)},
    {"shard": (0, 3)},
  ):
    with pytest.raises(ValueError, match="out of range|shards"):
      _batches(Numbers(4), **options)


def test_a_state_resumes_at_the_next_batch():
  """Also across an epoch, and the failures seen before are not forgotten."""
  options = {"shuffle_seed": 2, "epochs": 2}
  examples = Numbers(10, broken=[0, 7])
  made, failures = _all(examples, **options)
  with _batches(examples, **options) as first:
    for stop in range(len(made) + 1):
      state = json.loads(json.dumps(first.get_state()))
      with _batches(examples, **options) as second:
        next(second)  # it is somewhere else before
        second.set_state(state)
        _equal(list(second), made[stop:])
        assert second.failures == failures
      next(first, None)


def test_a_state_resumes_with_another_number_of_processes():
  options = {"shuffle_seed": 2, "epochs": 2}
  made, _ = _all(Numbers(10), **options)
  with _batches(Numbers(10), **options) as first:
    next(first)
    state = first.get_state()
  with _batches(Numbers(10), workers=2, **options) as second:
    second.set_state(state)
    _equal([next(second) for _ in range(3)], made[1:4])
    second.set_state(state)
    _equal([next(second)], made[1:2])


def test_orbax_saves_what_was_used_and_not_what_was_sent_ahead(tmp_path):
  """Batches on their way to the devices must come again after a restart."""
  examples = Numbers(40)
  made, _ = _all(examples, shuffle_seed=2)
  with pipeline.prefetch(
    _batches(examples, shuffle_seed=2), dict, depth=3
  ) as ahead:
    _equal([next(ahead) for _ in range(4)], made[:4])
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
      manager.save(4, args=grain.checkpoint.CheckpointSave(ahead))
      manager.wait_until_finished()
      _equal(list(ahead), made[4:])
      with pipeline.prefetch(_batches(examples, shuffle_seed=2), dict) as again:
        manager.restore(4, args=grain.checkpoint.CheckpointRestore(again))
        _equal(list(again), made[4:])


def test_prefetching_sends_ahead_and_no_further():
  sent = []
  with pipeline.prefetch(
    _batches(Numbers(40)), lambda b: sent.append(b["row"][0]) or b, depth=2
  ) as ahead:
    for used in range(1, 11):
      next(ahead)
      assert len(sent) == min(10, used + 2)
    assert next(ahead, None) is None


def test_memory_does_not_grow_with_the_number_of_images():
  """A consumer slower than the reader is what would let a queue grow.

  3 MB a batch: 60 of them, were all read ahead, would be 180 MB.
  """
  tracemalloc.start()
  try:
    with _batches(Numbers(240), np.arange(240), image_size=512) as batches:
      next(batches)
      time.sleep(0.5)
      next(batches)
      held = tracemalloc.get_traced_memory()[0]
      for _ in batches:
        pass
      peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert held < 20e6 and peak < 30e6


def test_a_closed_iterator_is_at_its_end():
  batches = _batches(Numbers(8))
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)


def test_a_dead_process_is_one_clear_line():
  with pytest.raises(RunError, match=r"exit code 7.*use fewer, or 0"):
    _all(Witness(100), np.array([1, 99]), workers=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_program_is_no_unreadable_image(workers):
  with pytest.raises(ValueError, match="a mistake in the program"):
    _all(Witness(100), np.array([98]), workers=workers)


# --- signals -----------------------------------------------------------------

_ENDLESS = """
if __name__ == "__main__":
  import sys, time
  import numpy as np
  from jaxtransfer.data import pipeline
  from tests.data.counting import Numbers
  batches = pipeline.Batches(
    Numbers(200), np.arange(200), image_size=64, batch_size=4, workers=2,
    epochs=1000000)
  try:
    print("made", flush=True)
    with batches:
      for number, _ in enumerate(batches):
        print(number, flush=True)
        time.sleep(0.01)
  except KeyboardInterrupt:
    sys.exit(130)
"""


def _start(tmp_path):
  """An endless run with two processes, in a group of its own, as in a shell."""
  script = tmp_path / "endless.py"
  script.write_text(_ENDLESS)
  root = pathlib.Path(__file__).resolve().parents[2]
  return subprocess.Popen(
    [sys.executable, script],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    env={**os.environ, "PYTHONPATH": str(root)},
  )


def _wait_for(process, line):
  for found in process.stdout:
    if found.strip() == line:
      return
  raise AssertionError(process.stderr.read())


def _members(group):
  """Processes of a group that still run; a dead one may wait for its parent."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[2]) == group and fields[0] != "Z":
      found.append(stat.parent.name)
  return found


def _gone(group):
  deadline = time.monotonic() + 20
  while _members(group):
    if time.monotonic() > deadline:
      return False
    time.sleep(0.05)
  return True


linux_only = pytest.mark.skipif(
  not pathlib.Path("/proc/self/stat").exists(), reason="reads /proc"
)


@linux_only
@pytest.mark.parametrize("line", ["made", "3"])
def test_ctrl_c_ends_everything_without_a_word(tmp_path, line):
  """While processes start, and while they work. A terminal signals them all."""
  process = _start(tmp_path)
  _wait_for(process, line)
  os.killpg(process.pid, signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 130
  assert errors == ""
  assert _gone(process.pid)


@linux_only
def test_sigterm_to_the_group_leaves_the_reading_to_the_parent(tmp_path):
  """A scheduler signals every process; the parent must still get batches.

  Here it has no handler and dies of it, and the processes with it.
  """
  process = _start(tmp_path)
  _wait_for(process, "3")
  others = [int(p) for p in _members(process.pid) if int(p) != process.pid]
  for pid in others:
    os.kill(pid, signal.SIGTERM)
  _wait_for(process, "30")
  process.terminate()
  process.communicate(timeout=60)
  assert _gone(process.pid)


@linux_only
def test_processes_do_not_outlive_a_killed_parent(tmp_path):
  process = _start(tmp_path)
  _wait_for(process, "3")
  process.kill()
  process.communicate(timeout=60)
  assert _gone(process.pid)


def test_an_iteration_that_is_not_closed_does_not_keep_python_from_ending():
  """Threads wait for batches, and Python's end for threads."""
  code = (
    "import numpy as np\n"
    "from jaxtransfer.data import pipeline\n"
    "from tests.data.counting import Numbers\n"
    "for workers in (0, 2):\n"
    "  batches = pipeline.Batches(Numbers(99), np.arange(99), image_size=8,\n"
    "    batch_size=4, workers=workers, epochs=1000)\n"
    "  globals()[f'kept{workers}'] = batches, next(batches)\n"
  )
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr) == (0, "")


# --- failures ----------------------------------------------------------------


def test_too_many_failures_stop_a_run_with_the_first_reason():
  failures = [("a.png", "empty file"), ("b.png", "no such file")]
  pipeline.too_many(failures, 100, 0.02)
  pipeline.too_many([], 100, 0.0)
  for total, limit in ((99, 0.02), (100, 0.0)):
    with pytest.raises(RunError, match="2 of .*; the first: a.png: empty file"):
      pipeline.too_many(failures, total, limit)


def test_failures_are_listed_in_a_table(tmp_path):
  path = tmp_path / "failures.csv"
  failures = [('a, "b".png', "empty file"), ("é.png", "no such file")]
  pipeline.write_failures(path, failures)
  with open(path, newline="", encoding="utf-8") as f:
    assert list(csv.reader(f)) == [["name", "reason"], *map(list, failures)]


def test_every_kind_of_broken_file_is_counted_and_none_is_fatal(tmp_path):
  """The whole way from a manifest to masks, with files that are really so."""
  good = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  Image.fromarray(good).save(tmp_path / "good.png")
  Image.fromarray(good).save(tmp_path / "whole.jpg")
  Image.fromarray(good[:1, :1]).save(tmp_path / "one.png")
  data = (tmp_path / "whole.jpg").read_bytes()
  (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
  (tmp_path / "text.png").write_text("not an image")
  (tmp_path / "empty.png").write_bytes(b"")
  Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
  names = ["good", "whole", "one", "cut", "text", "empty", "bomb", "missing"]
  files = [f"{n}.jpg" if n in ("whole", "cut") else f"{n}.png" for n in names]
  manifest = tmp_path / "manifest.csv"
  manifest.write_text("path,label\n" + "".join(f"{f},x\n" for f in files))
  config = {"source": str(manifest), "image_size": 8, "max_pixels": 10**8}
  examples = sources.open_source(_Config(**config, task="", tfds_dir=""))
  made, failures = _all(examples)
  mask = np.concatenate([batch["mask"] for batch in made])
  np.testing.assert_array_equal(mask, [True] * 3 + [False] * 5)
  reasons = dict(failures)
  assert "damaged" in reasons["cut.jpg"]
  assert "not a PNG" in reasons["text.png"]
  assert reasons["empty.png"] == "empty file"
  assert "too large" in reasons["bomb.png"]
  assert reasons["missing.png"] == "no such file"


class _Config:
  """config.data by attribute."""

  def __init__(self, **values):
    self.__dict__.update(values)


@pytest.mark.slow
def test_parts_are_read_by_key_in_threads_or_processes():
  """The same by both, in any order; a process that ends is said."""
  examples = Numbers(10, broken=[3])
  reader = tile_reading.Reader(8, examples)
  for workers in (0, 2):
    with pipeline.Readers(reader, workers) as readers:
      parts = [readers.submit([row, 3]) for row in (7, 0, 9)]
      found = [part.result() for part in parts]
    assert [int(read.pixels[0, 0, 0, 0]) for read in found] == [7, 0, 9]
    assert all(read.reasons[1] and not read.reasons[0] for read in found)
  witness = tile_reading.Reader(4, Witness(100))
  with pipeline.Readers(witness, 1) as readers:
    pixels = readers.submit([5]).result().pixels[0]
    # In a process without JAX.
    assert pixels[0, 0, 2] == 0
    with pytest.raises(RunError, match="exit code 7"):
      readers.submit([99]).result()
