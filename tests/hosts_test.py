"""Several processes that train together, on one machine."""

import csv
import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHANGES = {
  "data.source": "synthetic:tissue?patients=20&tiles_per_patient=4",
  "data.image_size": 32,
  "batch_size": 16,
  "epochs": 7,
  "log_steps": 1,
  "checkpoint_steps": 2,
  "resamples": 50,
  "optimiser.name": "sgd",
  "optimiser.learning_rate": 0.01,
  "network.until": "stem",
  "network.weights": "",
}
# The command, which also leaves the numbers that training gave back: only the
# first process exports them.
SCRIPT = """
import os
import numpy as np
from jaxtransfer import main
from jaxtransfer.training import loop

fit = loop.fit

def watched(*arguments, **options):
  fitted = fit(*arguments, **options)
  np.savez(os.environ["NUMBERS"], **fitted.numbers[0])
  return fitted

loop.fit = watched
main.run()
"""


HUGE = """
import os
import sys
import numpy as np
from jaxtransfer import hosts

hosts.use_huge_pages()
memory = np.ones(2**25)
lines = open("/proc/self/smaps_rollup").read().splitlines()
huge = [int(x.split()[1]) for x in lines if x.startswith("AnonHugePages")]
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1], *huge)
"""


def _kernel_gives_where_asked():
  path = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  libc, version = platform.libc_ver()
  return (
    path.exists()
    and "[madvise]" in path.read_text()
    and libc == "glibc"
    and tuple(map(int, version.split("."))) >= (2, 35)
  )


@pytest.mark.skipif(
  not _kernel_gives_where_asked(),
  reason="Linux gives huge pages to all or to none, or glibc is before 2.35",
)
@pytest.mark.parametrize("settings", [None, "glibc.malloc.tcache_count=5"])
def test_memory_is_taken_in_huge_pages(settings):
  """Of 256 MB some lie in them; the process and its arguments stay the same."""
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  if settings:
    environment["GLIBC_TUNABLES"] = settings
  process = subprocess.Popen(
    [sys.executable, "-c", HUGE, "an argument"],
    env=environment,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  words = process.communicate(timeout=60)[0].split()
  assert process.returncode == 0
  asked = "glibc.malloc.hugetlb=1"
  assert words[:4] == [
    str(process.pid),
    f"{settings}:{asked}" if settings else asked,
    "an",
    "argument",
  ]
  assert int(words[4]) > 0


COLLECTED = """
import gc
import os
import sys
import time
from jaxtransfer import hosts, signals

signals.end_at_signals()
one = hosts.One()
signals.hand_signals(one.preempt)

def interrupted(phase, _):
  if phase == "start":
    gc.callbacks.clear()
    os.kill(os.getpid(), int(sys.argv[1]))

gc.callbacks.append(interrupted)
try:
  gc.collect()
  time.sleep(60)
except KeyboardInterrupt:
  one.end("heard", 130)
except SystemExit as e:
  one.end("heard", e.code)
"""


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_in_the_middle_of_collecting_garbage_is_heard(number, code):
  """JAX is called then, and Python forgets what is raised there: the process
  would go on to its end, after a traceback."""
  done = subprocess.run(
    [sys.executable, "-c", COLLECTED, str(int(number))],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stderr) == (code, "jaxtransfer: heard\n")


class _Run:
  """The same command in one process or in two that are joined."""

  def __init__(self, path, cache, changes=None):
    self.path = path
    self.cache = cache
    self.changes = CHANGES | (changes or {})

  def numbers(self, index):
    with np.load(self.path.with_suffix(f".{index}.npz")) as stored:
      return dict(stored)

  def start(self, count=2, only=None):
    """Starts the processes; `only` is what the last is told differently."""
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    started = []
    for index in range(count):
      changes = dict(self.changes)
      if only and index == count - 1:
        changes |= only
      joined = {}
      if count > 1:
        joined = {
          "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
          "JAX_NUM_PROCESSES": str(count),
          "JAX_PROCESS_ID": str(index),
        }
      started.append(
        subprocess.Popen(
          [
            sys.executable,
            "-c",
            SCRIPT,
            f"--config={ROOT}/configs/finetune.py:resnet18",
            f"--workdir={self.path}",
            *(f"--config.{key}={value}" for key, value in changes.items()),
            *(["--distributed"] if count > 1 else []),
          ],
          env={
            **os.environ,
            **joined,
            "NUMBERS": str(self.path.with_suffix(f".{index}.npz")),
            "JAX_NUM_CPU_DEVICES": "1",
            "JAXTRANSFER_CACHE": str(self.cache),
          },
          cwd=ROOT,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
      )
    return started

  def end(self, processes):
    """Returns (exit code, output) of each, at the latest after minutes."""
    outputs = []
    try:
      for process in processes:
        output, _ = process.communicate(timeout=300)
        outputs.append((process.returncode, output))
    finally:
      for process in processes:
        process.kill()
    return outputs

  def finish(self, count=2):
    outputs = self.end(self.start(count))
    assert [code for code, _ in outputs] == [0] * count, outputs
    return outputs

  def records(self):
    lines = (self.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
      del record["timing"]
    return records

  def signal_after(self, lines, index, number):
    """Starts both and signals one of them after some lines of the log."""
    processes = self.start()
    log = self.path / "metrics.jsonl"
    while processes[index].poll() is None:
      if log.exists() and log.read_text().count("\n") >= lines:
        break
      time.sleep(0.002)
    processes[index].send_signal(number)
    return self.end(processes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A run of two processes that nothing interrupted."""
  root = tmp_path_factory.mktemp("pair")
  run = _Run(root / "run", root / "cache")
  run.finish()
  return run


def _flat(value):
  if isinstance(value, dict):
    return [x for key in sorted(value) for x in _flat(value[key])]
  return [value] if isinstance(value, float) else []


@pytest.mark.slow
def test_two_processes_train_as_one(pair, tmp_path):
  """Twenty-one steps: each process reads half of a batch and the gradient is
  the sum over both, so only the order of sums differs from one process. Both
  processes hold the same bits, and one of them has written."""
  one = _Run(tmp_path / "run", pair.cache)
  one.finish(count=1)
  records, expected = pair.records(), one.records()
  assert records[-1]["step"] == 21 and len(records) == len(expected) == 28
  for record, other in zip(records, expected, strict=True):
    assert record["event"] == other["event"]
    np.testing.assert_allclose(
      _flat(record), _flat(other), rtol=0, atol=1e-5, err_msg=str(record)
    )
  for name, value in pair.numbers(0).items():
    np.testing.assert_array_equal(value, pair.numbers(1)[name])
    np.testing.assert_allclose(value, one.numbers(0)[name], atol=1e-5)
  about = json.loads((pair.path / "config.json").read_text())["run"]
  assert about["devices"] == "2 x cpu (jit, 2 processes)"
  results = [
    json.loads((run.path / "results.json").read_text())["measurements"]
    for run in (pair, one)
  ]
  for row, other in zip(*results, strict=True):
    assert (row["metric"], row["n"]) == (other["metric"], other["n"])
    np.testing.assert_allclose(_flat(row), _flat(other), atol=1e-4)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(pair):
  """The first process sees it, and tells the others."""
  outputs = pair.finish()
  assert "is finished" in outputs[0][1]
  assert "is finished" not in outputs[1][1]


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all(pair, tmp_path):
  """One host has not got the images: each says so and none waits."""
  run = _Run(tmp_path / "run", pair.cache)
  outputs = run.end(run.start(only={"data.source": "/no/such.csv"}))
  for code, output in outputs:
    assert code == 2 and "/no/such.csv" in output and "Trace" not in output
  assert not (run.path / "config.json").exists()


@pytest.mark.slow
def test_unreadable_images_of_all_processes_are_counted(pair, tmp_path):
  """Whoever meets a broken file, it is listed once, and what one has not seen
  itself ends it too when together there are too many."""
  rows = []
  for i in range(80):
    path = tmp_path / f"{i}.png"
    path.write_text("no image")
    if i % 10:
      noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
      PIL.Image.fromarray(noise).save(path)
    rows.append((path.name, f"class {i % 2}"))
  with open(tmp_path / "manifest.csv", "w", newline="") as f:
    csv.writer(f).writerows([("path", "label"), *rows])
  changes = {"data.source": str(tmp_path / "manifest.csv"), "epochs": 1}
  run = _Run(tmp_path / "run", pair.cache, changes | {"data.max_failures": 0.5})
  outputs = run.end(run.start())
  assert [code for code, _ in outputs] == [1, 1], outputs
  listed = (run.path / "failures.csv").read_text().splitlines()[1:]
  assert len(listed) == len(set(listed)) == 8
  strict = _Run(tmp_path / "strict", pair.cache, changes)
  for code, output in strict.end(strict.start()):
    assert code == 1 and "images could not be read" in output, output
    assert "Traceback" not in output


def test_what_cannot_be_joined_is_a_mistake_in_the_flag(tmp_path):
  """No scheduler, no variables: said at once, with the names."""
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "jaxtransfer.main",
      f"--config={ROOT}/configs/finetune.py:resnet18",
      f"--workdir={tmp_path}",
      "--distributed",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2 and "JAX_COORDINATOR_ADDRESS" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_signal_stops_all_at_one_step(pair, tmp_path):
  """SIGTERM to the process that does not write: both save, exit with 143, and
  go on as if nothing had been. Then the one that writes is killed: the other
  ends too, and the last run ends with the bits of the uninterrupted one."""
  run = _Run(tmp_path / "run", pair.cache)
  outputs = run.signal_after(5, 1, signal.SIGTERM)
  assert [code for code, _ in outputs] == [143, 143], outputs
  stopped = len(run.records())
  assert 5 <= stopped < len(pair.records())
  outputs = run.signal_after(stopped + 4, 0, signal.SIGKILL)
  assert outputs[0][0] == -signal.SIGKILL and outputs[1][0] != 0, outputs
  run.finish()
  assert run.records() == pair.records()
  export = "export/model.safetensors"
  assert (run.path / export).read_bytes() == (pair.path / export).read_bytes()


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(pair, tmp_path):
  """A place counts batches of all processes, so it means the same to one; that
  the numbers are only nearly those of two is said."""
  run = _Run(tmp_path / "run", pair.cache)
  outputs = run.signal_after(5, 0, signal.SIGTERM)
  assert [code for code, _ in outputs] == [143, 143], outputs
  ((_, output),) = run.finish(count=1)
  assert "only up to rounding" in output
  for name, value in pair.numbers(0).items():
    np.testing.assert_allclose(value, run.numbers(0)[name], atol=1e-5)
