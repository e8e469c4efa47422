"""The command line: one line and the right exit code for every mistake."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import numpy as np
import PIL.Image
import pytest

from jaxtransfer.data import stored_splits
from tests.data.tiles import open_source
from tests.jobs import configs

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'layers.py'}:resnet18"


def _run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "jaxtransfer.main", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--workdir=w"], "--config is missing"),
    ([CONFIG], "--workdir is missing"),
    ([CONFIG, "--workdir=w", "--config.tolerence=0.1"], "tolerance"),
    ([CONFIG, "--workdir=w", "--config.data.sourse=x"], "source"),
    ([CONFIG, "--workdir=w", "--config.halving=1"], "a key of truncate"),
    ([CONFIG, "--workdir=w", "--config.seeds=many"], "many"),
    ([CONFIG, "--workdir=w", "--wrkdir=x"], "wrkdir"),
    ([CONFIG, "--workdir=w", "layers"], "'layers'"),
    (["--config=no/such.py", "--workdir=w"], "no/such.py"),
    (["--config=layer:resnet18", "--workdir=w"], "--config=layers:resnet18?"),
    (["layers", "--workdir=w"], "did you mean --config=layers?"),
    (["--config=README.md", "--workdir=w"], "README.md, line "),
    ([CONFIG, "--workdir=w", "--config.job=layer"], "layer"),
    # The job itself looks at these, after JAX.
    pytest.param(
      *([CONFIG, "--workdir=w", "--config.strengths=a"], "config.strengths"),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *([CONFIG, "--workdir=w", "--config.data="], "config.data.source"),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_two(arguments, says, tmp_path):
  """Found before JAX is imported where it can be, and never a traceback."""
  arguments = [
    a.replace("--workdir=w", f"--workdir={tmp_path}") for a in arguments
  ]
  done = _run(*arguments)
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and says in lines[0], done.stderr


@pytest.mark.slow
def test_the_short_form_of_the_source_means_the_key(tmp_path):
  """`--config.data=x` is how people write it."""
  done = _run(CONFIG, f"--workdir={tmp_path}", "--config.data=/no/such.csv")
  assert done.returncode == 2 and "/no/such.csv" in done.stderr


@pytest.mark.slow
def test_a_dry_run_ends_before_the_workdir_is_made(tmp_path):
  """Through the command line, with what the parser and the checks refuse."""
  arguments = (
    "--config=finetune:cbr_tiny",
    f"--workdir={tmp_path / 'run'}",
    "--dry_run",
    "--config.network.weights=",
    "--config.network.until=block1",
    "--config.batch_size=8",
    "--config.epochs=1",
    "--config.data.image_size=16",
    "--config.data=synthetic:tissue?patients=10&tiles_per_patient=4",
  )
  done = _run(*arguments)
  assert done.returncode == 0, done.stderr
  assert "Nothing was written" in done.stdout
  done = _run(*arguments, "--config.metric=f2")
  assert done.returncode == 2 and "config.metric is 'f2'" in done.stderr
  done = _run(*arguments, "--distributed")
  assert done.returncode == 2 and "leave --distributed out" in done.stderr
  assert not list(tmp_path.iterdir())


def test_a_finished_directory_says_so_and_is_left_alone(tmp_path):
  """results.json is written last, so it is the sign; the exit code is that of
  the run that wrote it."""
  for failures in (0, 2):
    results = json.dumps({"summary": {"failures": failures}})
    (tmp_path / "results.json").write_text(results)
    done = _run(CONFIG, f"--workdir={tmp_path}")
    assert done.returncode == bool(failures) and "is finished" in done.stdout
    assert ("failures.csv" in done.stdout) == bool(failures)


def test_a_finished_directory_does_not_hide_data_that_have_changed(tmp_path):
  """The labels of its splits.json are compared with the manifest's, without
  JAX; where the data are gone, the results are still told."""
  manifest = configs.write_tiles(tmp_path, images=8)
  examples = open_source(manifest)
  run = tmp_path / "run"
  run.mkdir()
  (run / "results.json").write_text('{"summary": {}}')
  rows = {"train": np.arange(8)}
  stored_splits.save_splits(run / "splits.json", rows, examples)
  arguments = (CONFIG, f"--workdir={run}", f"--config.data={manifest}")
  done = _run(*arguments)
  assert done.returncode == 0 and "not compared" not in done.stdout
  text = manifest.read_text()
  manifest.write_text(text.replace("3.png,class 1", "3.png,class 0"))
  done = _run(*arguments)
  assert done.returncode == 2 and "is finished" not in done.stdout
  assert "row 4, 3.png: label 'class 1' there, 'class 0' now" in done.stderr
  manifest.unlink()
  done = _run(*arguments)
  assert done.returncode == 0 and "is finished" in done.stdout
  assert f"not compared with what they are now: {manifest}" in (
    done.stdout.replace("config.data.source: ", "")
  )


def test_a_workdir_that_cannot_be_made_is_a_mistake_in_the_flag(tmp_path):
  """A file stands where the directory should be."""
  (tmp_path / "file").write_text("")
  done = _run(CONFIG, f"--workdir={tmp_path / 'file'}")
  assert done.returncode == 2
  assert "--workdir" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_images_that_stop_a_run_are_all_listed(tmp_path):
  """The user needs to find them all, not the first of them."""
  manifest = configs.write_tiles(tmp_path, images=40)
  for i in range(0, 40, 2):
    (tmp_path / f"{i}.png").write_bytes(b"not an image")
  done = _run(
    f"--config={ROOT / 'configs' / 'finetune.py'}:resnet18",
    f"--workdir={tmp_path / 'run'}",
    f"--config.data={manifest}",
    "--config.data.image_size=32",
    "--config.network.weights=",
    "--config.network.until=stem",
    "--config.batch_size=8",
    "--config.epochs=1",
  )
  path = tmp_path / "run" / "failures.csv"
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert str(path) in done.stderr.splitlines()[-1], done.stderr
  name, *rows = path.read_text().splitlines()
  assert name == "name,reason" and len(rows) > 5
  assert all(int(row.split(".png")[0]) % 2 == 0 for row in rows)


# The program, for a user whom the system does not know.
NOBODY = """
import pwd

def getpwuid(uid):
  raise KeyError(uid)

pwd.getpwuid = getpwuid
from jaxtransfer import main
main.run()
"""


@pytest.mark.slow
def test_a_run_ends_whatever_it_is_started_in_and_on(tmp_path):
  """Names and classes that no encoding holds, a terminal of ASCII, a notebook's
  backend, no home: the report is there, the unreadable image is named, and the
  names in splits.json are those that open the files."""
  rng = np.random.default_rng(0)
  classes = (b"caf\xe9", "\u2603 \u0628".encode(), b"a\nb\x1b[2J\x01")
  for number, name in enumerate(classes):
    folder = os.path.join(os.fsencode(tmp_path), b"data", name)
    os.makedirs(folder)
    for i in range(12):
      image = rng.normal(128 + 30 * number, 40, (32, 32, 3)).clip(0, 255)
      with open(os.path.join(folder, b"%d\xff\r\n.png" % i), "wb") as file:
        PIL.Image.fromarray(image.astype(np.uint8)).save(file, "png")
  with open(os.path.join(folder, b"%d\xff\r\n.png" % i), "wb") as file:
    file.write(b"no image")
  kept = ("PATH", "PYTHONPATH", "JAX_PLATFORMS")
  done = subprocess.run(
    [
      *(sys.executable, "-c", NOBODY),
      CONFIG,
      f"--workdir={tmp_path / 'run'}",
      f"--config.data={tmp_path / 'data'}",
      "--config.network.weights=cifar10-resnet18",
      "--config.network.until=layer1",
      "--config.data.image_size=32",
      "--config.data.max_failures=0.1",
      "--config.taps=layer1",
      "--config.probes=nearest_mean",
      "--config.seeds=1",
      "--config.batch_size=12",
      "--config.cost_batch_size=4",
      "--config.resamples=20",
    ],
    env={
      **{name: os.environ[name] for name in kept if name in os.environ},
      "JAX_NUM_CPU_DEVICES": "1",
      "PYTHONIOENCODING": "ascii",
      "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    },
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1 and not done.stderr, done.stderr
  assert "not kept" in done.stdout and "set JAXTRANSFER_CACHE" in done.stdout
  assert "could not be read: 1;" in done.stdout
  run = tmp_path / "run"
  assert configs.check_json(run) == 6
  with open(run / "failures.csv", newline="", encoding="utf-8") as file:
    _, failure = csv.reader(file)
  assert failure[0] == "a\nb\x1b[2J\x01/11\\udcff\r\n.png"
  names = json.loads((run / "splits.json").read_bytes())["names"]
  assert all((tmp_path / "data" / name).exists() for name in names)
  assert r"caf\udce9" in (run / "report.html").read_text("utf-8")
  for path in (run / "figures").glob("*.svg"):
    xml.etree.ElementTree.parse(path)


@pytest.fixture
def small_disk(tmp_path):
  """A disk of a size that may be changed, where the system lets us have one."""
  path = tmp_path / "disk"
  path.mkdir()

  def resize(size, *options):
    options = ",".join((f"size={size}", *options))
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode

  if resize("1m"):
    pytest.skip("needs the right to mount a disk")
  yield path, lambda size: resize(size, "remount")
  subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("job", "network", "size", "file", "changes"),
  [
    ("layers", "resnet18", "24k", ".h5", ["network.weights=cifar10-resnet18"]),
    ("finetune", "resnet18", "200k", "checkpoints", ["epochs=1"]),
    (
      "truncate",
      "cbr_tiny",
      "200k",
      "checkpoints",
      ["taps=block1", "methods=ttl"],
    ),
  ],
)
def test_a_full_disk_is_one_line_and_what_was_done_stays(
  tmp_path, small_disk, job, network, size, file, changes
):
  """Whichever library was writing; no part of a file takes up the room."""
  path, resize = small_disk
  resize(size)
  (tmp_path / "data").mkdir()
  common = [
    f"data={configs.write_tiles(tmp_path / 'data', images=40)}",
    "network.until=" + {"layers": "layer1", "finetune": "stem"}.get(job, ""),
    "data.image_size=32",
    "batch_size=8",
    "resamples=20",
  ]
  if job != "layers":
    common.append("network.weights=")
  command = [
    f"--config={ROOT / 'configs' / job}.py:{network}",
    f"--workdir={path / 'run'}",
    *(f"--config.{change}" for change in common + changes),
  ]
  done = _run(*command)
  assert done.returncode == 1, done.stderr
  (line,) = done.stderr.splitlines()
  assert "No space left on device" in line and file in line
  assert "make room" in line and "the same command resumes" in line
  assert not list(path.rglob("*tmp*"))
  assert configs.check_json(path) >= 2
  if job == "finetune":
    resize("20m")
    assert _run(*command).returncode == 0


def _answers(process, number):
  """Whether a process has a handler of its own for a signal."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  caught = next(x for x in status.splitlines() if x.startswith("SigCgt"))
  return int(caught.split()[1], 16) >> (number - 1) & 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for handlers")
@pytest.mark.parametrize("module", ["jaxtransfer", "jaxtransfer.main"])
@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_while_it_starts_ends_it_without_a_traceback(
  tmp_path, module, number, code
):
  """From the first import on, through those of the job and the start of JAX:
  the line, the code and not a word of Python's. SIGTERM has no handler of
  Python's own, so that it has one is where the moments are counted from."""
  for seconds in (0.0, 0.3, 1.0):
    with subprocess.Popen(
      [
        sys.executable,
        *("-m", module),
        f"--config={ROOT / 'configs' / 'quickstart.py'}",
        f"--workdir={tmp_path / 'run'}",
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    ) as process:
      while not _answers(process, signal.SIGTERM):
        assert process.poll() is None, process.stderr.read()
      time.sleep(seconds)
      process.send_signal(number)
      _, errors = process.communicate()
    assert process.returncode == code, errors
    assert errors.startswith("jaxtransfer: ") and errors.count("\n") == 1


@pytest.mark.parametrize(
  ("number", "code"),
  [
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
  ],
)
def test_a_signal_ends_a_run_with_its_code(tmp_path, number, code):
  """Sent once the job has begun: no traceback, and the way to go on."""
  arguments = [
    f"--config={ROOT / 'configs' / 'quickstart.py'}",
    f"--workdir={tmp_path / 'run'}",
  ]
  with subprocess.Popen(
    [sys.executable, "-m", "jaxtransfer.main", *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    while not (tmp_path / "run" / "config.json").exists():
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate()
  assert process.returncode == code, errors
  assert "the same command resumes" in errors and "Traceback" not in errors
