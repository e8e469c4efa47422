"""HDF5 files: ours appear whole or not at all, others' are read with care.

HDF5 gives zeros where a file's numbers were never written, allocates whatever
a few bytes claim, and follows links into other files. None of it happens here.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from jaxtransfer import files

# A larger attribute is none that anybody reads: most files cannot hold one.
_MAX_ATTRIBUTE_BYTES = 2**20
# Deflate, the strongest of the usual filters, makes of 1032 bytes one.
_MAX_RATIO = 1040
# Of a slide's name and folder, which may look like anything.
_PLAIN = frozenset({"name", "savetodir", "save_path"})


class Refused(Exception):
  """Why a file is not read, in words that follow its path."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
  """Opens a new HDF5 file that is at `path` when all of it is on the disk.

  Args:
    path: where it is to appear. Its directory is made.

  Yields:
    The file, to be filled.

  Raises:
    OSError: the disk is full or the directory cannot be written; it names
      `path`, which is as it was.
  """
  with files.atomic_path(path) as temporary, _Target(temporary) as target:
    try:
      with h5py.File(target, "w") as f:
        yield f
    finally:
      if target.error is not None:
        raise target.error from None


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
  """Opens an HDF5 file; whatever is wrong with it becomes `Refused`.

  Args:
    path: the file.

  Yields:
    The file, open for reading.

  Raises:
    Refused: it is not there, not HDF5, cut short, damaged, or being written.
  """
  try:
    with h5py.File(path, locking="best-effort") as f:
      yield f
  except FileNotFoundError:
    raise Refused("there is no such file") from None
  except PermissionError:
    raise Refused("may not be read: permission denied") from None
  except IsADirectoryError:
    raise Refused("is a folder, not an HDF5 file") from None
  except BlockingIOError:
    raise Refused("is being written by another process") from None
  # All that h5py makes of HDF5's errors.
  except (OSError, RuntimeError, LookupError, TypeError, ValueError) as e:
    raise Refused(_reason(path, str(e))) from None


def _reason(path: str | os.PathLike[str], message: str) -> str:
  size = os.path.getsize(path) if os.path.exists(path) else 0
  stored = re.search(r"truncated file.*stored_eof = (\d+)", message)
  if stored:
    return (
      f"cut short: it has {size:,} bytes of {int(stored[1]):,}; make it again"
    )
  if "signature not found" in message:
    return "not an HDF5 file" if size else "empty, not an HDF5 file"
  detail = message.splitlines()[0] if message else "no reason is given"
  return f"damaged, or not HDF5 as h5py reads it ({files.visible(detail)})"


def dataset(f: h5py.File, name: str) -> h5py.Dataset | None:
  """Returns a dataset of a file, known to be there to the last byte.

  No number is read, whatever the size.

  Args:
    f: the file.
    name: of the dataset, in the file's root.

  Returns:
    The dataset; None where there is none of that name.

  Raises:
    Refused: it is a link or lies in another file, or is not all there.
  """
  link = f.get(name, getlink=True)
  if link is None:
    return None
  if not isinstance(link, h5py.HardLink):
    raise Refused(f"{name} is a link, which is not followed")
  found = f[name]
  if not isinstance(found, h5py.Dataset):
    raise Refused(f"{name} is not a dataset")
  if found.is_virtual or found.external:
    raise Refused(f"{name} lies in other files, which are not read")
  if found.shape is None:
    raise Refused(f"{name} is empty: it has no shape")
  _check_stored(f, found, name)
  return found


def _check_stored(f: h5py.File, found: h5py.Dataset, name: str) -> None:
  shape, itemsize = found.shape, found.dtype.itemsize
  needed = math.prod(shape) * itemsize
  stored = found.id.get_storage_size()
  filtered = found.id.get_create_plist().get_nfilters() > 0
  limit = os.path.getsize(f.filename) * (_MAX_RATIO if filtered else 1)
  whole = needed
  if needed and found.chunks:
    # Chunks at the ends are stored whole; one without a filter has one size.
    pairs = zip(shape, found.chunks, strict=True)
    whole = math.prod(-(-length // chunk) for length, chunk in pairs)
    if not filtered:
      whole *= math.prod(found.chunks) * itemsize
    elif needed <= limit:
      stored = found.id.get_num_chunks()
  if stored < whole or needed > limit:
    raise Refused(
      f"{name}, {_words(shape)} of {found.dtype}, is not all in the file: cut"
      " short; make it again"
    )


def _words(shape: tuple[int, ...]) -> str:
  return " x ".join(f"{length:,}" for length in shape) or "one number"


def attributes(node: h5py.File | h5py.Dataset) -> dict[str, Any]:
  """Returns what is written beside a file or dataset, as Python's types.

  Args:
    node: the file or dataset.

  Returns:
    {key: bool, int, float, text, None, or a list or dict of such}. The text
    "None" is None, and text that is JSON of a list or dict is that. What is no
    number or text, as references, is left out, and so is what is damaged.
  """
  found = {}
  for key in node.attrs:
    with contextlib.suppress(
      OSError, RuntimeError, LookupError, TypeError, ValueError
    ):
      stored = node.attrs.get_id(key)
      size = math.prod(stored.shape or ()) * stored.dtype.itemsize
      text = h5py.check_string_dtype(stored.dtype) is not None
      if size <= _MAX_ATTRIBUTE_BYTES and (text or stored.dtype.kind in "biuf"):
        found[str(key)] = _plain(str(key), node.attrs[key])
  return found


def _plain(key: str, value: Any) -> Any:
  if isinstance(value, np.ndarray):
    return [_plain(key, inner) for inner in value.tolist()]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, bytes):
    value = value.decode("utf-8", "backslashreplace")
  if isinstance(value, h5py.Empty) or value == "None":
    return None
  if isinstance(value, str) and value[:1] in ("{", "[") and key not in _PLAIN:
    with contextlib.suppress(ValueError, RecursionError):
      return json.loads(value)
  return value


def write_attributes(
  node: h5py.File | h5py.Dataset, values: dict[str, Any]
) -> None:
  """Writes numbers and texts beside a file or dataset, as `attributes` reads.

  Args:
    node: the file or dataset.
    values: {key: value}; a list or dict becomes JSON, None the text "None".
  """
  for key, value in values.items():
    if value is None:
      value = "None"
    elif isinstance(value, dict | list | tuple):
      value = json.dumps(value)
    # HDF5 has no text with zeros in it, nor with bytes that are no UTF-8.
    node.attrs[key] = files.visible(value)


class _Target(io.FileIO):
  """A file for HDF5, which does not survive that one cannot be written.

  It would say so in words of its own, with addresses, and close the file in a
  way that can end the process. So it hears of no error, and whoever wrote asks.

  Args:
    path: of a file, made anew.

  Attributes:
    error: the first one; None where all was written.
  """

  def __init__(self, path: pathlib.Path):
    super().__init__(path, "w+")
    self.error: OSError | None = None

  def write(self, data: Any) -> int:  # noqa: D102
    rest = memoryview(data).cast("B")
    with self._noted():
      while self.error is None and rest:
        rest = rest[super().write(rest) :]
    return memoryview(data).nbytes

  def truncate(self, size: int | None = None) -> int:  # noqa: D102
    with self._noted():
      super().truncate(size)
    return self.tell() if size is None else size

  @contextlib.contextmanager
  def _noted(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      self.error = self.error or e
