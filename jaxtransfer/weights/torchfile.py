"""Reads torch's files without torch, and without running their pickles.

A `.pth` is a pickle beside raw buffers; what the pickle comes to is found out
by `pickles`.
"""

import dataclasses
import io
import mmap
import pathlib
import posixpath
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxtransfer import errors
from jaxtransfer.weights import pickles
from jaxtransfer.weights.pickles import printable

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
ZIP_MAGIC = b"PK\x03\x04"

T = TypeVar("T")
_MAX_PICKLE_BYTES = 64 * 2**20

# What zipfile raises over damaged directories, names and entries.
_ZIP_ERRORS = (
  zipfile.BadZipFile,
  EOFError,
  LookupError,
  NotImplementedError,
  OSError,
  RuntimeError,
  ValueError,
  struct.error,
)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor of a checkpoint that has not been read.

  Attributes:
    shape: as it will be read, in the file's own layout.
    dtype: as it will be read.
    read: returns its numbers; UsageError where the file is damaged there.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class Checkpoint(dict[str, StoredTensor]):
  """A checkpoint's tensors by name, and what else it says.

  A tensor inside nested dicts is named by their keys, the last of them after a
  slash (`state_dict/conv1.weight`).

  Attributes:
    foreign: {name: what it is} of the objects that are not rebuilt.
    metadata: {key: text} that the file says of itself.
  """

  def __init__(
    self,
    tensors: Mapping[str, StoredTensor],
    *,
    foreign: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
  ):
    super().__init__(tensors)
    self.foreign = dict(foreign or {})
    self.metadata = dict(metadata or {})


def read_torch_file(path: pathlib.Path) -> Checkpoint:
  """Lists the tensors of a torch file; their numbers are read on demand.

  Args:
    path: a file of `torch.save`, in the zip format or the one before it.

  Returns:
    Its tensors, the names of objects beside them, and the texts in it.

  Raises:
    UsageError: the file is damaged, cut short, or holds no tensors but only
      objects that are not rebuilt.

  Source: torch/serialization.py, `_legacy_load` and `_load`.
  """
  try:
    contents, read_storage = _open(path, _contents_of)
    return Checkpoint(
      {
        name: _stored(path, view, read_storage)
        for name, view in contents.views.items()
      },
      foreign={name: str(what) for name, what in contents.foreign.items()},
      metadata=contents.metadata,
    )
  except pickles.Refused as refusal:
    raise errors.UsageError(f"{path}: {refusal}") from None


def read_tensor(path: pathlib.Path) -> np.ndarray:
  """Reads a torch file that holds one tensor alone, as CLAM's features do.

  Args:
    path: a file of `torch.save`, in either format.

  Returns:
    The tensor, in its own type.

  Raises:
    UsageError: the file is damaged, cut short, or holds something else.
  """
  try:
    view, read_storage = _open(path, _view_of)
    return _stored(path, view, read_storage).read()
  except pickles.Refused as refusal:
    raise errors.UsageError(f"{path}: {refusal}") from None


def _view_of(tree: Any) -> pickles.View:
  if not isinstance(tree, pickles.View):
    raise pickles.Refused("holds no tensor of its own, but other objects")
  return tree


def _open(
  path: pathlib.Path, judge: Callable[[Any], T]
) -> tuple[T, Callable[[pickles.Storage], bytes]]:
  """Returns what `judge` makes of what was saved, and what reads storages."""
  with open(path, "rb") as f:
    start = f.read(len(LEGACY_MAGIC))
  if start.startswith(ZIP_MAGIC):
    return _open_zip(path, judge)
  if start != LEGACY_MAGIC:
    raise pickles.Refused("not a file of torch.save")
  return _open_legacy(path, judge)


def _stored(
  path: pathlib.Path,
  view: pickles.View,
  read_storage: Callable[[pickles.Storage], bytes],
) -> StoredTensor:
  dtype = np.dtype(pickles.DTYPES[view.dtype])

  def read() -> np.ndarray:
    try:
      data = np.frombuffer(read_storage(view.storage), dtype)
    except pickles.Refused as refusal:
      raise errors.UsageError(f"{path}: {refusal}") from None
    if 0 in view.shape:
      return np.zeros(view.shape, dtype)
    # `_check_view` has shown that no element lies outside the storage.
    strided = np.lib.stride_tricks.as_strided(
      data[view.storage.start + view.offset :],
      view.shape,
      tuple(stride * dtype.itemsize for stride in view.strides),
    )
    return np.array(strided, order="C")

  return StoredTensor(view.shape, dtype, read)


@dataclasses.dataclass(frozen=True)
class _Contents:
  """What a file's pickle comes to: tensors and placeholders by name, texts."""

  views: dict[str, pickles.View]
  foreign: dict[str, pickles.Placeholder]
  metadata: dict[str, str]


def _contents_of(tree: Any) -> _Contents:
  """Walks nested containers.

  Raises:
    pickles.Refused: there are no tensors, but objects that are not rebuilt.
  """
  if isinstance(tree, pickles.Placeholder):
    what = "" if tree.is_model else "holds no dict of tensors; it is "
    raise pickles.Refused(f"{what}{tree}")
  if not isinstance(tree, dict):
    raise pickles.Refused("holds no dict of tensors")
  views: dict[str, pickles.View] = {}
  foreign: dict[str, pickles.Placeholder] = {}
  seen: set[int] = set()
  waiting: list[tuple[str, Any]] = [("", tree)]
  while waiting:
    container, node = waiting.pop()
    # Visited once only: shared containers can unfold to exponential trees.
    if id(node) in seen:
      continue
    seen.add(id(node))
    if isinstance(node, dict):
      items = [
        (str(key), value)
        for key, value in node.items()
        if isinstance(key, str | int)
      ]
    else:
      items = [(str(i), value) for i, value in enumerate(node)]
    for key, value in items:
      name = f"{container}/{key}" if container else key
      if isinstance(value, pickles.View):
        views[name] = value
      elif isinstance(value, pickles.Placeholder):
        foreign[name] = value
      elif isinstance(value, dict | list | tuple):
        waiting.append((name, value))
  if foreign and not views:
    name = min(foreign, key=lambda n: not foreign[n].is_model)
    raise pickles.Refused(
      f"holds no tensors; {printable(name)} is {foreign[name]}"
    )
  return _Contents(views, foreign, _texts_of(tree))


# Where training scripts keep what they were called with.
_SETTINGS = ("args", "config", "hyper_parameters", "hparams", "opt")


def _texts_of(tree: dict[Any, Any]) -> dict[str, str]:
  """Returns the texts beside the tensors: an architecture's name and such."""
  strings: dict[str, str] = {}
  for part in (*(tree.get(key) for key in _SETTINGS), tree):
    texts = part.state if isinstance(part, pickles.Placeholder) else part
    for key, value in texts.items() if isinstance(texts, dict) else ():
      if isinstance(key, str) and isinstance(value, str):
        strings[key] = value
  return strings


def _open_zip(
  path: pathlib.Path, judge: Callable[[Any], T]
) -> tuple[T, Callable[[pickles.Storage], bytes]]:
  try:
    archive = zipfile.ZipFile(path)
  except _ZIP_ERRORS:
    raise pickles.Refused(
      f"cut short or damaged: a zip without its directory, after"
      f" {path.stat().st_size:,} bytes; get the file again"
    ) from None
  entries = _check_entries(archive, path.stat().st_size)
  listed = [n for n in entries if posixpath.basename(n) == "data.pkl"]
  root = posixpath.dirname(listed[0]) if listed else ""
  if posixpath.join(root, "constants.pkl") in entries:
    raise pickles.Refused(
      "a TorchScript program, not a state dict; save model.state_dict()"
    )
  if len(listed) != 1:
    raise pickles.Refused("a zip, but not torch's: no data.pkl in it")
  order = entries.get(posixpath.join(root, "byteorder"))
  if order and _read_entry(archive, order).strip() != b"little":
    raise pickles.Refused("written on a big-endian machine; save it on another")
  if entries[listed[0]].file_size > _MAX_PICKLE_BYTES:
    raise pickles.Refused("its pickle is larger than any state dict's")

  def persistent(saved: Any) -> pickles.Storage | pickles.Placeholder:
    if (foreign := _foreign_of(saved)) is not None:
      return foreign
    storage, _ = _storage_of(saved, fields=5)
    entry = entries.get(posixpath.join(root, "data", storage.key))
    if entry is None:
      raise pickles.Refused(
        f"cut short: no data/{printable(storage.key)} in it"
      )
    if entry.file_size != storage.nbytes:
      raise pickles.Refused(
        f"data/{printable(storage.key)} has {entry.file_size:,} bytes where its"
        f" tensors need {storage.nbytes:,}: damaged"
      )
    return storage

  last: dict[str, bytes] = {}

  def read_storage(storage: pickles.Storage) -> bytes:
    # Tensors that share a storage follow each other: one is remembered.
    if storage.key not in last:
      entry = entries[posixpath.join(root, "data", storage.key)]
      data = _read_entry(archive, entry)
      last.clear()
      last[storage.key] = data
    return last[storage.key]

  stream = io.BytesIO(_read_entry(archive, entries[listed[0]]))
  return judge(pickles.interpret(stream, persistent)), read_storage


def _check_entries(
  archive: zipfile.ZipFile, file_bytes: int
) -> dict[str, zipfile.ZipInfo]:
  """Refuses what torch never writes: no entry here can be a bomb."""
  entries: dict[str, zipfile.ZipInfo] = {}
  for entry in archive.infolist():
    name = entry.filename
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
      raise pickles.Refused(
        f"a zip entry has the unsafe path {printable(name)}"
      )
    if name in entries:
      raise pickles.Refused(f"holds the zip entry {printable(name)} twice")
    if entry.flag_bits & 1:
      raise pickles.Refused(f"the zip entry {printable(name)} is encrypted")
    if (
      entry.compress_type != zipfile.ZIP_STORED
      or entry.compress_size != entry.file_size
    ):
      raise pickles.Refused(
        f"the zip entry {printable(name)} is compressed, which torch never"
        " does; refused"
      )
    entries[name] = entry
  total = sum(entry.file_size for entry in entries.values())
  if total > file_bytes:
    raise pickles.Refused(
      f"its zip entries claim {total:,} bytes in a file of {file_bytes:,}:"
      " cut short or damaged"
    )
  return entries


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
  try:
    with archive.open(entry) as f:
      data = f.read()
  except _ZIP_ERRORS as error:
    what = "wrong checksum" if "CRC" in str(error) else "damaged"
    raise pickles.Refused(
      f"{printable(entry.filename)}: {what}; get the file again"
    ) from None
  if len(data) != entry.file_size:
    raise pickles.Refused(f"{printable(entry.filename)}: cut short")
  return data


def _open_legacy(
  path: pathlib.Path, judge: Callable[[Any], T]
) -> tuple[T, Callable[[pickles.Storage], bytes]]:
  storages: dict[str, pickles.Storage] = {}

  def persistent(saved: Any) -> pickles.Storage | pickles.Placeholder:
    if (foreign := _foreign_of(saved)) is not None:
      if saved[0] == "storage":
        raise pickles.Refused(f"holds numbers of an unknown type, {foreign}")
      return foreign
    storage, view = _storage_of(saved, fields=6)
    if storages.setdefault(storage.key, storage) != storage:
      raise pickles.Refused(f"storage {printable(storage.key)} has two sizes")
    if view is None:
      return storage
    start, size = pickles.integers(view[1:])
    if (start + size) * pickles.itemsize(storage.dtype) > storage.nbytes:
      raise pickles.Refused("a storage's view is larger than the storage")
    return dataclasses.replace(storage, start=start)

  # Mapped, because a file's `read` would first allocate whatever length a
  # damaged pickle claims.
  with (
    open(path, "rb") as whole,
    mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_READ) as f,
  ):
    pickles.interpret(f, persistent)
    if pickles.interpret(f, persistent) != 1001:
      raise pickles.Refused("an unknown version of torch's old format")
    system = pickles.interpret(f, persistent)
    if isinstance(system, dict) and system.get("little_endian") is False:
      raise pickles.Refused(
        "written on a big-endian machine; save it on another"
      )
    judged = judge(pickles.interpret(f, persistent))
    keys = pickles.interpret(f, persistent)
    places: dict[str, int] = {}
    if not isinstance(keys, list):
      raise pickles.Refused("damaged: no list of storages")
    for key in map(str, keys):
      if key not in storages:
        raise pickles.Refused(f"damaged: storage {printable(key)} is not used")
      header = f.read(8)
      if len(header) < 8:
        raise pickles.Refused("cut short; get the file again")
      (numel,) = struct.unpack("<q", header)
      if numel * pickles.itemsize(storages[key].dtype) != storages[key].nbytes:
        raise pickles.Refused(
          f"damaged: storage {printable(key)} has another size"
        )
      places[key] = f.tell()
      if f.tell() + storages[key].nbytes > len(f):
        raise pickles.Refused("cut short; get the file again")
      f.seek(storages[key].nbytes, 1)
    if places.keys() != storages.keys():
      raise pickles.Refused("cut short; get the file again")

  def read_storage(storage: pickles.Storage) -> bytes:
    with open(path, "rb") as f:
      f.seek(places[storage.key])
      data = f.read(storage.nbytes)
    if len(data) != storage.nbytes:
      raise pickles.Refused("cut short; get the file again")
    return data

  return judged, read_storage


def _foreign_of(saved: Any) -> pickles.Placeholder | None:
  """Returns what stands for a reference to a class or an unknown storage.

  The old format refers to the source of a pickled model's classes so.
  """
  if (
    isinstance(saved, tuple)
    and len(saved) >= 2
    and saved[0] in ("module", "storage")
    and isinstance(saved[1], pickles.Placeholder)
  ):
    return saved[1]
  return None


def _storage_of(
  saved: Any, *, fields: int
) -> tuple[pickles.Storage, tuple[Any, ...] | None]:
  """Reads (kind, storage class, key, device, numel[, view])."""
  if (
    not isinstance(saved, tuple)
    or not 5 <= len(saved) <= fields
    or saved[0] != "storage"
    or not isinstance(saved[1], pickles.DType)
  ):
    raise pickles.Refused(
      "damaged: a reference that is not to a tensor's storage"
    )
  (numel,) = pickles.integers((saved[4],))
  view = saved[5] if len(saved) == 6 else None
  if view is not None and (not isinstance(view, tuple) or len(view) != 3):
    raise pickles.Refused("damaged: a storage's view is not described")
  nbytes = numel * pickles.itemsize(saved[1].name)
  return pickles.Storage(str(saved[2]), saved[1].name, nbytes), view
