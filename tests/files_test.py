"""Files appear whole or not at all."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxtransfer import files


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
  """The rename is the only step that touches the name."""
  path = tmp_path / "a.txt"
  files.write_text(path, "old")
  with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
    temporary.write_text("half")
    raise RuntimeError
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path):
  """SIGKILL runs no handler: only the order of the steps protects the file."""
  path = tmp_path / "a.json"
  files.write_json(path, {"step": 1})
  code = (
    "import os, signal\n"
    "from jaxtransfer import files\n"
    f"with files.atomic_path({str(path)!r}) as t:\n"
    "  t.write_text('{')\n"
    "  os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  killed = subprocess.run([sys.executable, "-c", code], check=False)
  assert killed.returncode == -signal.SIGKILL
  assert json.loads(path.read_text()) == {"step": 1}


def test_nan_is_not_json(tmp_path):
  """A reader in another language would refuse the file."""
  with pytest.raises(ValueError):
    files.write_json(tmp_path / "a.json", {"value": float("nan")})
  assert not (tmp_path / "a.json").exists()


def test_what_is_no_number_is_null_however_deep_it_lies():
  """Then every reader of JSON, in any language, takes the file."""
  value = {"a": [1, math.nan, {"b": (math.inf, np.float32("nan"), "x")}]}
  assert files.finite(value) == {"a": [1, None, {"b": [None, None, "x"]}]}


def test_the_cache_is_private(tmp_path, monkeypatch):
  """Compiled programs in it are executed: nobody else may write there."""
  monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path / "cache"))
  files.cache_directory("weights")
  assert os.stat(tmp_path / "cache").st_mode & 0o077 == 0
