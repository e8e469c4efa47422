"""Files that appear whole or not at all."""

import contextlib
import csv
import fcntl
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from jaxtransfer import errors

# What no file's name may hold, or some file system's or shell's cannot.
_UNNAMEABLE = re.compile(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff/\\:*?"<>|]')
_LONGEST_NAME = 200  # bytes; 255 are allowed, and endings are added
# What no reader sees, and some refuse: control characters and surrogates.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a name to write beside `path`; renames it there on success.

  Whatever happens in between, a reader sees the old file or the new one and
  never a part: the temporary file is flushed to disk before the rename, the
  directory after it, and a failure removes the temporary file.

  Args:
    path: where the finished file is to appear. Its directory is made.

  Yields:
    The temporary path, `.<name>.<random>.tmp` in the same directory.

  Raises:
    OSError: the directory cannot be written or the disk is full; it names
      `path`, which is as it was.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Random, since processes of several hosts may write at the same time.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    yield temporary
    _fsync(temporary)
    os.replace(temporary, path)
  except BaseException as e:
    temporary.unlink(missing_ok=True)
    if isinstance(e, OSError) and e.filename in (None, str(temporary)):
      e.filename = str(path)
    raise
  _fsync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder to fill beside `path`; renames it there on success.

  Of one that was left unfinished nothing is taken over. Only one process at a
  time may fill it.

  Args:
    path: where the folder is to appear; what is there is replaced.

  Yields:
    `.<name>.tmp` in the same directory, empty.

  Raises:
    OSError: it cannot be written; what was there is as it was.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    yield temporary
    for file in temporary.iterdir():
      _fsync(file)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  _fsync(path.parent)


def _fsync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes `text` as UTF-8, atomically; what UTF-8 lacks is escaped."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes `value` as indented JSON, atomically; NaN is refused.

  Raises:
    ValueError: `value` holds NaN or infinity, which are not JSON.
  """
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: str | os.PathLike[str], line: str) -> None:
  """Adds a line to a text file, or leaves the file's lines as they are.

  Args:
    path: the file, made if it is not there. What follows its last line break,
      the beginning of a line that a kill or a full disk has cut short, goes.
    line: ASCII, without a line break.

  Raises:
    OSError: the line could not be written.
  """
  with open(path, "ab+", buffering=0) as f:
    size = f.seek(0, os.SEEK_END)
    # Longer lines than this are not written here.
    start = max(0, size - 2**20)
    f.seek(start)
    tail = f.read()
    whole = size if tail.endswith(b"\n") else start + tail.rfind(b"\n") + 1
    try:
      if whole < size:
        f.truncate(whole)
      rest = memoryview(f"{line}\n".encode("ascii"))
      while rest:
        rest = rest[f.write(rest) :]
    except OSError as e:
      f.truncate(whole)
      e.filename = os.fspath(path)
      raise


def finite(value: Any) -> Any:
  """Returns a value for JSON, which has no NaN: null for what is no number.

  Args:
    value: a number, None, or a mapping or list of such and of other things,
      which stay as they are.
  """
  if isinstance(value, Mapping):
    return {key: finite(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [finite(inner) for inner in value]
  # NumPy's numbers become Python's.
  value = value.item() if hasattr(value, "item") else value
  is_number = not isinstance(value, float) or math.isfinite(value)
  return value if is_number else None


def visible(value: Any) -> Any:
  r"""Returns a value for people and pages, with every text in characters.

  A file's name, and so a class's, may hold bytes that are no UTF-8, which
  Python keeps as lone surrogates, line breaks and a terminal's commands. Each
  such is written as Python writes it: `\udcff` is the byte 0xff, `\n` a line
  break.

  Args:
    value: a text, or a mapping or list of texts and of other things, which stay
      as they are.
  """
  if isinstance(value, str):
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], value)
  if isinstance(value, Mapping):
    return {visible(key): visible(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [visible(inner) for inner in value]
  return value


def safe_name(text: str) -> str:
  """Returns a text as a name for a file or folder, the same if it is one.

  What a name may not hold becomes `_`; a name that is too long ends in a
  digest.

  Args:
    text: any.
  """
  name = _UNNAMEABLE.sub("_", text).strip()
  if name.startswith(".") or not name:
    name = f"_{name[1:]}"
  encoded = name.encode()
  if len(encoded) > _LONGEST_NAME:
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    start = encoded[: _LONGEST_NAME - 13].decode(errors="ignore")
    name = f"{start}-{digest}"
  return name


def write_csv(
  path: str | os.PathLike[str],
  header: Sequence[str],
  rows: Iterable[Sequence[Any]],
) -> None:
  """Writes a header and rows as CSV, atomically; as `write_text` does."""
  with (
    atomic_path(path) as temporary,
    open(
      temporary, "w", newline="", encoding="utf-8", errors="backslashreplace"
    ) as f,
  ):
    # Only what may end a line is quoted, and a reader takes more for that than
    # is written here.
    writer = csv.writer(_Lines(f), lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows(rows)


class _Lines:
  """A text file that ends lines in one character."""

  def __init__(self, file: IO[str]):
    self._file = file

  def write(self, line: str) -> None:
    self._file.write(line.removesuffix("\r\n") + "\n")


def take_lock(file: IO, *, wait: bool, shared: bool = False) -> bool | None:
  """Takes the kernel's lock on a file; it goes when the file is closed.

  Args:
    file: open for reading and writing.
    wait: whether to wait for who has it.
    shared: whether others may have it shared too.

  Returns:
    Whether it is taken; None where the file system has no locks, as some
    network file systems: then nobody else can have it either.
  """
  kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  try:
    fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True


@contextlib.contextmanager
def lock(path: pathlib.Path, *, wait: bool) -> Iterator[bool]:
  """Takes a lock that the kernel lets go when the process ends.

  Args:
    path: the lock's file, made with its directory if it is not there.
    wait: whether to wait for who has it.

  Yields:
    Whether it is taken; always if waited for, or without locks to take.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "w+", encoding="utf-8", opener=_open_for_group) as file:
    yield take_lock(file, wait=wait) is not False


def _open_for_group(path: str, flags: int) -> int:
  descriptor = os.open(path, flags, 0o664)
  # Several users may share a cache.
  with contextlib.suppress(OSError):
    os.fchmod(descriptor, 0o664)
  return descriptor


def sha256_of(path: str | os.PathLike[str]) -> str:
  """Returns the hex SHA-256 of a file's bytes."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def nearest_existing(path: pathlib.Path) -> pathlib.Path:
  """Returns a path, or the nearest of the directories above that is there."""
  path = path.absolute()
  while not path.exists():
    path = path.parent
  return path


def cache_root() -> pathlib.Path:
  """Returns `$JAXTRANSFER_CACHE` or `~/.cache/jaxtransfer`, there or not.

  Raises:
    UsageError: the user has no home.
  """
  given = os.environ.get("JAXTRANSFER_CACHE")
  try:
    return pathlib.Path(given or "~/.cache/jaxtransfer").expanduser()
  except RuntimeError:
    raise errors.UsageError(
      "there is no home directory for the cache; set JAXTRANSFER_CACHE to a"
      " directory with room"
    ) from None


def cache_directory(*parts: str) -> pathlib.Path:
  """Makes and returns a directory of the user's own cache.

  The cache is readable by its owner alone: compiled programs kept in it are
  executed.

  Args:
    *parts: directories below `cache_root`.

  Raises:
    UsageError: the user has no home, or it cannot be written.
  """
  root = cache_root()
  directory = root.joinpath(*parts)
  try:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    # There, it may be another user's, or the disk read-only.
    tempfile.TemporaryFile(dir=directory).close()
  except OSError as e:
    raise errors.UsageError(
      f"{directory} cannot be written ({e.strerror}); set JAXTRANSFER_CACHE to"
      " a directory with room"
    ) from None
  return directory
