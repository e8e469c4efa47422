"""One directory, one run of one config."""

import contextlib
import errno
import fcntl
import json
import math
import os
import subprocess
import sys

import pytest

from jaxtransfer import errors, files, workdir
from tests.jobs import configs

CONFIG = {"job": "layers", "data": {"source": "a.csv", "workers": 0}}


def test_the_same_config_goes_on_and_another_is_refused(tmp_path):
  """The refusal names the key and both values; workers, and how many images are
  shown, may change freely."""
  with workdir.claim(tmp_path / "run", CONFIG, "command") as run:
    run.begin("1 x cpu")
  more_workers = {"job": "layers", "data": {"source": "a.csv", "workers": 4}}
  more_workers["thumbnails"] = 0
  with workdir.claim(tmp_path / "run", more_workers, "command"):
    pass
  other = {"job": "layers", "data": {"source": "b.csv", "workers": 0}}
  with (
    pytest.raises(errors.UsageError, match="data.source: 'a.csv' there"),
    workdir.claim(tmp_path / "run", other, "command"),
  ):
    pass


def test_a_key_that_an_older_version_did_not_have_is_no_difference(tmp_path):
  """Where it is left at "", 0 or False, which are without what it does."""
  with workdir.claim(tmp_path, CONFIG, "command") as run:
    run.begin("1 x cpu")
  for task, same in (("", True), ("grade", False)):
    newer = {"job": "layers", "data": {**CONFIG["data"], "task": task}}
    with contextlib.ExitStack() as stack:
      if not same:
        stack.enter_context(
          pytest.raises(
            errors.UsageError, match="data.task: None there, 'grade'"
          )
        )
      stack.enter_context(workdir.claim(tmp_path, newer, "command"))


def test_a_key_that_an_older_version_called_otherwise_is_no_difference(
  tmp_path,
):
  """A run that was begun with it goes on under the new name."""
  with workdir.claim(
    tmp_path, {**CONFIG, "many_labels": True}, "command"
  ) as run:
    run.begin("1 x cpu")
  with workdir.claim(tmp_path, {**CONFIG, "multilabel": True}, "command"):
    pass
  with (
    pytest.raises(errors.UsageError, match="multilabel: True there, False"),
    workdir.claim(tmp_path, {**CONFIG, "multilabel": False}, "command"),
  ):
    pass


def test_of_two_configs_begun_at_once_one_is_refused(tmp_path):
  """Both have found the shared directory empty; who comes second is told, and
  does not write over what the first one said."""
  other = {**CONFIG, "seed": 1}
  with (
    workdir.claim(tmp_path, CONFIG, "command", shared=True) as one,
    workdir.claim(tmp_path, other, "command", shared=True) as two,
    workdir.claim(tmp_path, CONFIG, "command", shared=True) as three,
  ):
    one.begin("1 x cpu")
    with pytest.raises(errors.UsageError, match="seed: None there, 1 now"):
      two.begin("1 x cpu")
    three.begin("1 x cpu")
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["config"] == CONFIG


def test_two_processes_cannot_work_in_one_directory(tmp_path):
  """The lock is the kernel's: held by the other process, gone with it."""
  code = (
    "from jaxtransfer import errors, workdir\n"
    "try:\n"
    f"  with workdir.claim({str(tmp_path)!r}, {CONFIG!r}, ''): print('in')\n"
    "except errors.UsageError as e: print(e)\n"
  )

  def attempt():
    return subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

  with workdir.claim(tmp_path, CONFIG, "command"):
    assert "in use by process" in attempt()
  assert attempt() == "in\n"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_said_and_used(
  tmp_path, monkeypatch, capsys, shared, code
):
  """Some network file systems have none: one process alone works there as
  anywhere, units and report and all, and is told what cannot be seen to."""

  def flock(*_):
    raise OSError(getattr(errno, code), "no locks")

  monkeypatch.setattr(fcntl, "flock", flock)
  with workdir.claim(tmp_path, CONFIG, "command", shared=shared) as run:
    run.begin("1 x cpu")
    for wait in (True, False):
      with files.lock(tmp_path / "units" / ".lock", wait=wait) as taken:
        assert taken
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 1 and "has no locks" in said[0] and "one at" in said[0]


def test_a_directory_that_checkpoints_cannot_name_is_refused_at_once(tmp_path):
  """Their library takes UTF-8 alone; said after the first epoch is too late."""
  path = os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")
  with (
    pytest.raises(errors.UsageError, match="no UTF-8"),
    workdir.claim(path, CONFIG, "command"),
  ):
    pass
  assert not os.path.exists(path)


def test_config_json_says_what_ran(tmp_path):
  """Config, versions, devices and the command are enough to repeat a run."""
  with workdir.claim(tmp_path, CONFIG, "jaxtransfer --x") as run:
    run.begin("1 x cpu")
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["config"] == CONFIG
  assert stored["run"]["command"] == "jaxtransfer --x"
  assert "jax" in stored["run"]["versions"]


def test_what_is_written_is_json_whatever_was_measured(tmp_path):
  """NaN and infinity are not JSON: null stands for them, in the config too, and
  the config that was written is the one that is there when it goes on."""
  config = {**CONFIG, "tolerance": math.nan}
  for _ in range(2):
    with workdir.claim(tmp_path, config, "command") as run:
      run.begin("1 x cpu")
      run.log(event="epoch", val={"auroc": math.nan, "classes": [math.inf]})
  run.finish({"summary": {"sentence": "", "values": [math.nan]}})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  run.replace_log([json.loads(line) for line in lines] + [{"x": math.nan}])
  configs.check_json(tmp_path)
  *lines, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
  expected = {"event": "epoch", "val": {"auroc": None, "classes": [None]}}
  assert [json.loads(line) for line in lines] == [expected] * 2
  assert json.loads(last) == {"x": None}


@pytest.mark.parametrize(
  ("left_out", "code", "says"),
  [
    ({}, 0, ""),
    ({"failures": 0, "failed": []}, 0, ""),
    ({"failures": 2}, 1, "could not be read: 2; see"),
    ({"failed": [{"unit": "a"}]}, 1, "Trainings that failed: 1"),
  ],
)
def test_a_finished_run_says_what_it_left_out(
  tmp_path, capsys, left_out, code, says
):
  """At its end, and again when it is asked for a second time."""
  with workdir.claim(tmp_path, CONFIG, "command") as run:
    summary = {"sentence": "Cut.", **left_out}
    assert run.finish({"summary": summary, "measurements": []}) == code
    said = capsys.readouterr().out
    assert "Cut." in said and "report.html" in said and says in said
    assert run.finished and run.report_failures() == code
    assert says in capsys.readouterr().out
