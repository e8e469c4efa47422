"""Files that appear whole or not at all."""

import contextlib
import csv
import hashlib
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


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
    OSError: the directory cannot be written or the disk is full; `path` is as
      it was.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Random, since processes of several hosts may write at the same time.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    yield temporary
    _fsync(temporary)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  _fsync(path.parent)


def _fsync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes `text` as UTF-8, atomically."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes `value` as indented JSON, atomically; NaN is refused.

  Raises:
    ValueError: `value` holds NaN or infinity, which are not JSON.
  """
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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
  if isinstance(value, float | np.floating):
    return float(value) if math.isfinite(value) else None
  return value.item() if isinstance(value, np.generic) else value


def write_csv(
  path: str | os.PathLike[str],
  header: Sequence[str],
  rows: Iterable[Sequence[Any]],
) -> None:
  """Writes a header and rows as CSV, atomically."""
  with atomic_path(path) as temporary:
    with open(temporary, "w", newline="", encoding="utf-8") as f:
      writer = csv.writer(f, lineterminator="\n")
      writer.writerow(header)
      writer.writerows(rows)


def sha256_of(path: str | os.PathLike[str]) -> str:
  """Returns the hex SHA-256 of a file's bytes."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def cache_root() -> pathlib.Path:
  """Returns `$JAXTRANSFER_CACHE` or `~/.cache/jaxtransfer`, there or not."""
  given = os.environ.get("JAXTRANSFER_CACHE")
  return pathlib.Path(given or "~/.cache/jaxtransfer").expanduser()


def cache_directory(*parts: str) -> pathlib.Path:
  """Makes and returns a directory of the user's own cache.

  The cache is readable by its owner alone: compiled programs kept in it are
  executed.

  Args:
    *parts: directories below `cache_root`.
  """
  root = cache_root()
  root.mkdir(mode=0o700, parents=True, exist_ok=True)
  directory = root.joinpath(*parts)
  directory.mkdir(parents=True, exist_ok=True)
  return directory
