"""Opens checkpoints of any format; numbers are read only when asked for."""

import json
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors

from jaxtransfer import errors
from jaxtransfer.weights import torchfile
from jaxtransfer.weights.torchfile import StoredTensor

_SAFETENSORS = {
  "F64": "<f8",
  "F32": "<f4",
  "F16": "<f2",
  "BF16": ml_dtypes.bfloat16,
  "I64": "<i8",
  "I32": "<i4",
  "I16": "<i2",
  "I8": "i1",
  "U64": "<u8",
  "U32": "<u4",
  "U16": "<u2",
  "U8": "u1",
  "BOOL": "?",
}


def open_checkpoint(
  path: str | os.PathLike[str],
) -> Mapping[str, StoredTensor]:
  """Lists a checkpoint's tensors without reading their numbers.

  The format is told by the file's first bytes and not by its name. No pickle
  is executed, no archive is unpacked.

  Args:
    path: a `.safetensors` file, a file of `torch.save` (zip or the format
      before it), or an Orbax directory.

  Returns:
    {name: tensor}; a tensor inside nested dicts is named by their keys, the
    last of them after a slash (`state_dict/conv1.weight`).

  Raises:
    UsageError: there is no such file, or it is damaged, cut short, of an
      unknown format, or holds anything but tensors, containers and numbers.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _read_orbax(path)
  try:
    with open(path, "rb") as f:
      start = f.read(16)
  except OSError as error:
    raise errors.UsageError(
      f"{path}: cannot be read ({error.strerror})"
    ) from None
  if start.startswith((torchfile.ZIP_MAGIC, torchfile.LEGACY_MAGIC)):
    return torchfile.read_torch_file(path)
  if start[8:9] == b"{" or path.suffix == ".safetensors":
    return _read_safetensors(path)
  raise errors.UsageError(f"{path}: {_what_instead(start)}")


def _what_instead(start: bytes) -> str:
  if not start:
    return "an empty file"
  if start.startswith(b"version https://"):
    return "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
  if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
    return "a web page, not weights; the download did not reach the file"
  if start.startswith(b"\x80"):
    return "a plain pickle, which is never executed; save it as safetensors"
  return "neither safetensors nor a file of torch.save nor an Orbax directory"


def _read_safetensors(path: pathlib.Path) -> dict[str, StoredTensor]:
  _, entries, start = _safetensors_header(path)
  found = {}
  for name, entry in entries.items():
    if entry["dtype"] not in _SAFETENSORS:
      raise errors.UsageError(
        f"{path}: {name} has the unsupported type {entry['dtype']}"
      )
    dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
    shape = tuple(entry["shape"])
    offset = start + entry["data_offsets"][0]

    def read(
      shape: tuple[int, ...] = shape,
      dtype: np.dtype = dtype,
      offset: int = offset,
    ) -> np.ndarray:
      count = int(np.prod(shape, dtype=np.int64))
      data = np.fromfile(path, dtype, count, offset=offset)
      if data.size != count:
        raise errors.UsageError(f"{path}: cut short; get the file again")
      return data.reshape(shape)

    found[name] = StoredTensor(shape, dtype, read)
  return found


def _safetensors_header(
  path: pathlib.Path,
) -> tuple[dict[str, str], dict[str, Any], int]:
  """Returns (metadata, {name: entry}, first byte of the numbers)."""
  try:
    # The library checks the header: its size, and that the tensors cover the
    # file without gap or overlap.
    with safetensors.safe_open(path, framework="np"):
      pass
    with open(path, "rb") as f:
      (size,) = struct.unpack("<Q", f.read(8))
      header = json.loads(f.read(size))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise errors.UsageError(
      f"{path}: cut short or damaged ({error}); get the file again"
    ) from None
  return header.pop("__metadata__", {}), header, 8 + size


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """Returns what a safetensors file says of itself; {} for other formats.

  Raises:
    UsageError: the file is damaged.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors" or not path.is_file():
    return {}
  return _safetensors_header(path)[0]


def check_orbax(path: pathlib.Path) -> None:
  """Checks that a directory can be an Orbax checkpoint, cheaply.

  Raises:
    UsageError: it cannot.
  """
  if not (path / "_METADATA").is_file():
    raise errors.UsageError(
      f"{path}: not an Orbax checkpoint of tensors; give the directory that"
      " holds its _METADATA"
    )


def _read_orbax(path: pathlib.Path) -> dict[str, StoredTensor]:
  check_orbax(path)
  path = path.absolute()
  # Orbax and TensorStore document no common exception for a damaged directory.
  try:
    tree = ocp.StandardCheckpointer().metadata(path).item_metadata.tree
  except Exception as error:
    raise errors.UsageError(
      f"{path}: cut short or damaged ({str(error).splitlines()[0][:200]})"
    ) from None
  found = {}
  waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
  while waiting:
    keys, node = waiting.pop()
    if isinstance(node, dict):
      waiting.extend(((*keys, key), value) for key, value in node.items())
    elif getattr(node, "shape", None) is not None:
      found["/".join(keys)] = StoredTensor(
        tuple(node.shape),
        np.dtype(node.dtype),
        _OrbaxRead(path, keys),
      )
  return found


class _OrbaxRead:
  """Reads one tensor of an Orbax directory.

  Args:
    path: the directory.
    keys: where in its tree the tensor is.
  """

  def __init__(self, path: pathlib.Path, keys: tuple[str, ...]):
    self._path = path
    self._keys = keys

  def __call__(self) -> np.ndarray:
    item: Any = np.zeros(0)
    how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(self._keys):
      item, how = {key: item}, {key: how}
    try:
      value = ocp.PyTreeCheckpointer().restore(
        self._path,
        args=ocp.args.PyTreeRestore(
          item=item, restore_args=how, partial_restore=True
        ),
      )
    except Exception as error:
      raise errors.UsageError(
        f"{self._path}: {'/'.join(self._keys)} cannot be read"
        f" ({str(error).splitlines()[0][:200]})"
      ) from None
    for key in self._keys:
      value = value[key]
    return np.asarray(value)
