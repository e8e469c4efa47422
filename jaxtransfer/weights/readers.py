"""Opens checkpoints of any format; numbers are read only when asked for."""

import json
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors

from jaxtransfer import errors
from jaxtransfer.weights import pickles, torchfile
from jaxtransfer.weights.torchfile import Checkpoint, StoredTensor

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


_INDEX = ".index.json"
# As the hub names them; the first that is there is taken.
_HUB_FILES = tuple(
  f"{name}{end}"
  for name in ("model.safetensors", "pytorch_model.bin")
  for end in ("", _INDEX)
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".torch", ".bin")
# A list of some thousand names; a larger file is none.
_MAX_INDEX_BYTES = 64 * 2**20


def find_checkpoint(path: pathlib.Path) -> pathlib.Path:
  """Finds what `open_checkpoint` can open in a folder.

  Args:
    path: a folder of the hub, as it is downloaded or cached; an Orbax
      directory; a folder with one file of weights; or a file.

  Returns:
    The file in the folder, or the path itself where it is an Orbax directory
    or no folder.

  Raises:
    UsageError: there is nothing in it, or more than one can be meant.
  """
  if not path.is_dir() or (path / "_METADATA").is_file():
    return path
  for name in _HUB_FILES:
    if (path / name).is_file():
      return path / name
  inside = sorted(path.iterdir())
  if (path / "snapshots") in inside:
    inside = sorted((path / "snapshots").iterdir())
    if len(inside) == 1:
      return find_checkpoint(inside[0])
  else:
    inside = [p for p in inside if p.suffix in SUFFIXES and p.is_file()]
    if len(inside) == 1:
      return inside[0]
  if inside:
    listed = ", ".join(pickles.printable(p.name) for p in inside[:5])
    raise errors.UsageError(
      f"{path}: which of {len(inside)} is meant? Give the path of one: {listed}"
    )
  raise errors.UsageError(
    f"{path}: not an Orbax checkpoint of tensors (give the directory that holds"
    " its _METADATA), and no model.safetensors or pytorch_model.bin in it"
  )


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns all files that a checkpoint consists of.

  Args:
    path: as `find_checkpoint` returns it.

  Raises:
    UsageError: it is a list of files that is damaged.
  """
  if path.is_dir():
    check_orbax(path)
    return sorted(p for p in path.rglob("*") if p.is_file())
  if path.name.endswith(_INDEX):
    return [path, *sorted(set(_shards(path).values()))]
  return [path]


def open_checkpoint(
  path: str | os.PathLike[str],
) -> Checkpoint:
  """Lists a checkpoint's tensors without reading their numbers.

  The format is told by the file's first bytes and not by its name. No pickle
  is executed, no archive is unpacked.

  Args:
    path: a `.safetensors` file, a file of `torch.save` (zip or the format
      before it), the `.index.json` of several such files, or an Orbax
      directory.

  Returns:
    Its tensors, the names of objects beside them, and what it says of itself.

  Raises:
    UsageError: there is no such file, or it is damaged, cut short, of an
      unknown format, or holds no tensors but objects that are not rebuilt.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _read_orbax(path)
  if path.name.endswith(_INDEX):
    return _read_shards(path)
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


def _shards(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns {tensor's name: the file that holds it} of an `.index.json`."""
  try:
    if path.stat().st_size > _MAX_INDEX_BYTES:
      raise ValueError
    listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    shards = {}
    for name, file in listed.items():
      # A name with folders in it could be any file of the machine, and a list
      # of lists could name itself.
      shards[name] = path.parent / file
      if (
        file != pathlib.PurePath(file).name
        or file.endswith(_INDEX)
        or not file.isprintable()
        or shards[name].is_dir()
      ):
        raise ValueError
    return shards
  except OSError as error:
    raise errors.UsageError(
      f"{path}: cannot be read ({error.strerror})"
    ) from None
  except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
    raise errors.UsageError(
      f"{path}: damaged: no list of tensors and of files beside it"
    ) from None


def _read_shards(path: pathlib.Path) -> Checkpoint:
  shards = _shards(path)
  opened = {
    file: open_checkpoint(file) for file in sorted(set(shards.values()))
  }
  stored, foreign, metadata = {}, {}, {}
  for checkpoint in opened.values():
    foreign |= checkpoint.foreign
    metadata |= checkpoint.metadata
  for name, file in shards.items():
    if name not in opened[file]:
      raise errors.UsageError(
        f"{file}: no {pickles.printable(name)} in it, where {path.name} says"
      )
    stored[name] = opened[file][name]
  return Checkpoint(stored, foreign=foreign, metadata=metadata)


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


def _read_safetensors(path: pathlib.Path) -> Checkpoint:
  metadata, entries, start = _safetensors_header(path)
  stored = {}
  for name, entry in entries.items():
    if entry["dtype"] not in _SAFETENSORS:
      raise errors.UsageError(
        f"{path}: {pickles.printable(name)} has the unsupported type"
        f" {pickles.printable(entry['dtype'])}"
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

    stored[name] = StoredTensor(shape, dtype, read)
  return Checkpoint(stored, metadata=metadata)


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
      f"{path}: cut short or damaged ({pickles.printable(str(error))}); get the"
      " file again"
    ) from None
  return header.pop("__metadata__", {}), header, 8 + size


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


def _read_orbax(path: pathlib.Path) -> Checkpoint:
  check_orbax(path)
  path = path.absolute()
  # Orbax and TensorStore document no common exception for a damaged directory.
  try:
    metadata = ocp.StandardCheckpointer().metadata(path).item_metadata
    if metadata is None:
      raise ValueError("it says nothing of its arrays")
    tree = metadata.tree
  except Exception as error:
    raise errors.UsageError(
      f"{path}: cut short or damaged ({str(error).splitlines()[0][:200]})"
    ) from None
  stored = {}
  waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
  while waiting:
    keys, node = waiting.pop()
    if isinstance(node, dict):
      waiting.extend(((*keys, key), value) for key, value in node.items())
    elif getattr(node, "shape", None) is not None:
      stored["/".join(keys)] = StoredTensor(
        tuple(node.shape),
        np.dtype(node.dtype),
        _OrbaxRead(path, keys),
      )
  return Checkpoint(stored)


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
