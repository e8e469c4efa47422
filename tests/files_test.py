"""Files appear whole or not at all."""

import csv
import json
import math
import os
import pwd
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxtransfer import errors, files


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


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
  """What a kill left of the last one goes, and a full disk, here a limit of the
  process, leaves the lines that were there."""
  path = tmp_path / "a.jsonl"
  for line in ("1", "2"):
    files.append_line(path, line)
  with open(path, "a") as f:
    f.write('{"half')
  files.append_line(path, "3")
  assert path.read_text() == "1\n2\n3\n"
  path.write_text("no line break")
  files.append_line(path, "1")
  assert path.read_text() == "1\n"
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
  try:
    with pytest.raises(OSError) as raised:
      files.append_line(path, "2" * 1000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert raised.value.filename == str(path) and path.read_text() == "1\n"


def test_an_error_names_the_file_and_not_what_is_written_beside_it(tmp_path):
  path = tmp_path / "missing" / "a.txt"
  path.parent.write_text("a file where a folder should be")
  with pytest.raises(OSError):
    files.write_text(path, "")
  path = tmp_path / "a.txt"
  with pytest.raises(OSError) as raised, files.atomic_path(path):
    raise OSError(28, "No space left on device")
  assert raised.value.filename == str(path)


def test_what_is_no_number_is_null_however_deep_it_lies():
  """Then every reader of JSON, in any language, takes the file."""
  value = {"a": [1, math.nan, {"b": (math.inf, np.float32("nan"), "x")}]}
  assert files.finite(value) == {"a": [1, None, {"b": [None, None, "x"]}]}


def test_any_name_can_be_written_and_read_by_all(tmp_path):
  """Bytes that are no UTF-8, a lone surrogate, line breaks and a terminal's
  commands: whatever a file system allows. CSV is read back with all but what
  UTF-8 lacks, and what names files again, JSON, gives back what went in."""
  odd = os.fsdecode(b"caf\xe9\xff\n\r\x1b[2J") + "\ud800 \u2603"
  seen = r"caf\udce9\udcff\n\r\x1b[2J\ud800 " + "\u2603"
  assert files.visible({odd: [odd, 1, None]}) == {seen: [seen, 1, None]}
  files.write_csv(tmp_path / "a.csv", ("name", "reason"), [(odd, "broken")])
  with open(tmp_path / "a.csv", newline="", encoding="utf-8") as f:
    header, row = csv.reader(f)
  told = "caf\\udce9\\udcff\n\r\x1b[2J\\ud800 \u2603"
  assert header == ["name", "reason"] and row == [told, "broken"]
  files.write_text(tmp_path / "a.html", odd)
  assert (tmp_path / "a.html").read_text("utf-8").startswith(r"caf\udce9")
  files.write_json(tmp_path / "a.json", [odd])
  assert json.loads((tmp_path / "a.json").read_bytes()) == [odd]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, tmp_path):
  """Neither a variable nor an entry of passwd; or a home that is no folder."""

  def getpwuid(uid):
    raise KeyError(uid)

  monkeypatch.delenv("JAXTRANSFER_CACHE")
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", getpwuid)
  for home in (None, os.devnull):
    if home:
      monkeypatch.setenv("HOME", home)
    with pytest.raises(errors.UsageError, match="set JAXTRANSFER_CACHE"):
      files.cache_directory("programs")
  assert not os.path.exists("~")


def test_the_cache_is_private(tmp_path, monkeypatch):
  """Compiled programs in it are executed: nobody else may write there."""
  monkeypatch.setenv("JAXTRANSFER_CACHE", str(tmp_path / "cache"))
  files.cache_directory("weights")
  assert os.stat(tmp_path / "cache").st_mode & 0o077 == 0


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
  """A failure leaves the old one; of an unfinished one nothing is taken over;
  what comes takes the place of what was there."""
  path = tmp_path / "tiles" / "a"
  with files.atomic_directory(path) as temporary:
    (temporary / "1").write_text("old")
    assert not path.exists()
  with pytest.raises(ValueError):
    with files.atomic_directory(path) as temporary:
      (temporary / "2").write_text("new")
      raise ValueError
  assert [file.name for file in path.iterdir()] == ["1"]
  left = path.with_name(".a.tmp")
  left.mkdir()
  (left / "3").write_text("killed")
  with files.atomic_directory(path) as temporary:
    (temporary / "2").write_text("new")
  assert [file.name for file in path.iterdir()] == ["2"]
  assert [file.name for file in path.parent.iterdir()] == ["a"]


@pytest.mark.parametrize(
  "text", ["", ".", "..", "a/b", "a\\b", "\0", ".hid", "é" * 300, "\udcff"]
)
def test_any_text_can_name_a_file(text, tmp_path):
  """In one folder, not hidden, and the same name for the same text."""
  name = files.safe_name(text)
  assert name == files.safe_name(text)
  (tmp_path / f"{name}.h5").write_text("there")
  assert [p.name for p in tmp_path.glob("[!.]*")] == [f"{name}.h5"]


def test_a_name_stays_as_it_is():
  for name in ("TCGA-02-0010.a", "slide 7 (copy)", "Präparat", "a" * 200):
    assert files.safe_name(name) == name
  assert files.safe_name("a" * 201) != files.safe_name("a" * 202)
