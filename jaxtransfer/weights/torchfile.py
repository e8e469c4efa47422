"""Reads torch's files without torch, and without running their pickles.

A `.pth` is a pickle beside raw buffers, and a pickle is a program. The
interpreter here walks its opcodes itself: a global is never imported, and a
call reaches only the few inert functions of this file, which return plain
containers, numbers and descriptions of tensors. Whatever else a file names
becomes a placeholder that holds the name and does nothing.
"""

import dataclasses
import io
import math
import mmap
import pathlib
import pickletools
import posixpath
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxtransfer import errors

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
ZIP_MAGIC = b"PK\x03\x04"

# A state dict of a thousand tensors takes about 30,000 opcodes; this bounds
# the time that a hostile file can take.
_MAX_OPCODES = 3_000_000
_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_AXES = 8

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

_DTYPES: dict[str, Any] = {
  "float64": "<f8",
  "float32": "<f4",
  "float16": "<f2",
  "bfloat16": ml_dtypes.bfloat16,
  "int64": "<i8",
  "int32": "<i4",
  "int16": "<i2",
  "int8": "i1",
  "uint8": "u1",
  "bool": "?",
  "complex64": "<c8",
  "complex128": "<c16",
}
_STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
  "ComplexFloatStorage": "complex64",
  "ComplexDoubleStorage": "complex128",
}

_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


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
    said: {key: text} that the file says of itself.
  """

  def __init__(
    self,
    tensors: Mapping[str, StoredTensor],
    *,
    foreign: Mapping[str, str] | None = None,
    said: Mapping[str, str] | None = None,
  ):
    super().__init__(tensors)
    self.foreign = dict(foreign or {})
    self.said = dict(said or {})


class _Refused(Exception):
  """Why a file is not read; the message completes `<path>: `."""


@dataclasses.dataclass(eq=False)
class _Placeholder:
  """Stands for an object that is not rebuilt.

  Attributes:
    name: of the class or function that would make it.
    is_model: whether its state is that of a torch module.
  """

  name: str
  is_model: bool = False

  def __str__(self) -> str:
    name = printable(self.name)
    if self.is_model:
      return f"a whole pickled model; save model.state_dict() (it is a {name})"
    return f"made by {name}, which is never run"


@dataclasses.dataclass(frozen=True)
class _Function:
  """One of the functions of this file that a pickle may call."""

  name: str
  call: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _DType:
  """A torch dtype, or the storage class of one; `name` None is untyped."""

  name: str | None


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A buffer of the file: its key, its bytes, and a view's first element."""

  key: str
  dtype: str | None
  nbytes: int
  start: int = 0


@dataclasses.dataclass(frozen=True)
class _View:
  """A tensor as torch describes it: strides over a storage, in elements."""

  storage: _Storage
  dtype: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


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
  with open(path, "rb") as f:
    is_zip = f.read(4) == ZIP_MAGIC
  try:
    contents, read_storage = _open_zip(path) if is_zip else _open_legacy(path)
    return Checkpoint(
      {
        name: _stored(path, view, read_storage)
        for name, view in contents.views.items()
      },
      foreign={name: str(what) for name, what in contents.foreign.items()},
      said=contents.said,
    )
  except _Refused as refusal:
    raise errors.UsageError(f"{path}: {refusal}") from None


def _stored(
  path: pathlib.Path,
  view: _View,
  read_storage: Callable[[_Storage], bytes],
) -> StoredTensor:
  dtype = np.dtype(_DTYPES[view.dtype])

  def read() -> np.ndarray:
    try:
      data = np.frombuffer(read_storage(view.storage), dtype)
    except _Refused as refusal:
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

  views: dict[str, _View]
  foreign: dict[str, _Placeholder]
  said: dict[str, str]


def _contents_of(tree: Any) -> _Contents:
  """Walks nested containers.

  Raises:
    _Refused: there are no tensors, but objects that are not rebuilt.
  """
  if isinstance(tree, _Placeholder):
    what = "" if tree.is_model else "holds no dict of tensors; it is "
    raise _Refused(f"{what}{tree}")
  if not isinstance(tree, dict):
    raise _Refused("holds no dict of tensors")
  views: dict[str, _View] = {}
  foreign: dict[str, _Placeholder] = {}
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
      if isinstance(value, _View):
        views[name] = value
      elif isinstance(value, _Placeholder):
        foreign[name] = value
      elif isinstance(value, dict | list | tuple):
        waiting.append((name, value))
  if foreign and not views:
    name = min(foreign, key=lambda n: not foreign[n].is_model)
    raise _Refused(f"holds no tensors; {printable(name)} is {foreign[name]}")
  return _Contents(views, foreign, _texts_of(tree))


# Where training scripts keep what they were called with.
_SETTINGS = ("args", "config", "hyper_parameters", "hparams", "opt")


def _texts_of(tree: dict[Any, Any]) -> dict[str, str]:
  """Returns the texts beside the tensors: an architecture's name and such."""
  found: dict[str, str] = {}
  for part in (*(tree.get(key) for key in _SETTINGS), tree):
    for key, value in part.items() if isinstance(part, dict) else ():
      if isinstance(key, str) and isinstance(value, str):
        found[key] = value
  return found


def _open_zip(
  path: pathlib.Path,
) -> tuple[_Contents, Callable[[_Storage], bytes]]:
  try:
    archive = zipfile.ZipFile(path)
  except _ZIP_ERRORS:
    raise _Refused(
      f"cut short or damaged: a zip without its directory, after"
      f" {path.stat().st_size:,} bytes; get the file again"
    ) from None
  entries = _check_entries(archive, path.stat().st_size)
  pickles = [n for n in entries if posixpath.basename(n) == "data.pkl"]
  root = posixpath.dirname(pickles[0]) if pickles else ""
  if posixpath.join(root, "constants.pkl") in entries:
    raise _Refused(
      "a TorchScript program, not a state dict; save model.state_dict()"
    )
  if len(pickles) != 1:
    raise _Refused("a zip, but not torch's: no data.pkl in it")
  order = entries.get(posixpath.join(root, "byteorder"))
  if order and _read_entry(archive, order).strip() != b"little":
    raise _Refused("written on a big-endian machine; save it on another")
  if entries[pickles[0]].file_size > _MAX_PICKLE_BYTES:
    raise _Refused("its pickle is larger than any state dict's")

  def persistent(saved: Any) -> _Storage | _Placeholder:
    if (foreign := _foreign_of(saved)) is not None:
      return foreign
    storage, _ = _storage_of(saved, fields=5)
    entry = entries.get(posixpath.join(root, "data", storage.key))
    if entry is None:
      raise _Refused(f"cut short: no data/{storage.key} in it")
    if entry.file_size != storage.nbytes:
      raise _Refused(
        f"data/{storage.key} has {entry.file_size:,} bytes where its tensors"
        f" need {storage.nbytes:,}: damaged"
      )
    return storage

  last: dict[str, bytes] = {}

  def read_storage(storage: _Storage) -> bytes:
    # Tensors that share a storage follow each other: one is remembered.
    if storage.key not in last:
      entry = entries[posixpath.join(root, "data", storage.key)]
      data = _read_entry(archive, entry)
      last.clear()
      last[storage.key] = data
    return last[storage.key]

  stream = io.BytesIO(_read_entry(archive, entries[pickles[0]]))
  return _contents_of(_interpret(stream, persistent)), read_storage


def _check_entries(
  archive: zipfile.ZipFile, file_bytes: int
) -> dict[str, zipfile.ZipInfo]:
  """Refuses what torch never writes: no entry here can be a bomb."""
  entries: dict[str, zipfile.ZipInfo] = {}
  for entry in archive.infolist():
    name = entry.filename
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
      raise _Refused(f"a zip entry has the unsafe path {printable(name)}")
    if name in entries:
      raise _Refused(f"holds the zip entry {printable(name)} twice")
    if entry.flag_bits & 1:
      raise _Refused(f"the zip entry {printable(name)} is encrypted")
    if (
      entry.compress_type != zipfile.ZIP_STORED
      or entry.compress_size != entry.file_size
    ):
      raise _Refused(
        f"the zip entry {printable(name)} is compressed, which torch never"
        " does; refused"
      )
    entries[name] = entry
  total = sum(entry.file_size for entry in entries.values())
  if total > file_bytes:
    raise _Refused(
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
    raise _Refused(
      f"{printable(entry.filename)}: {what}; get the file again"
    ) from None
  if len(data) != entry.file_size:
    raise _Refused(f"{printable(entry.filename)}: cut short")
  return data


def _open_legacy(
  path: pathlib.Path,
) -> tuple[_Contents, Callable[[_Storage], bytes]]:
  storages: dict[str, _Storage] = {}

  def persistent(saved: Any) -> _Storage | _Placeholder:
    if (foreign := _foreign_of(saved)) is not None:
      if saved[0] == "storage":
        raise _Refused(f"holds numbers of an unknown type, {foreign}")
      return foreign
    storage, view = _storage_of(saved, fields=6)
    if storages.setdefault(storage.key, storage) != storage:
      raise _Refused(f"storage {printable(storage.key)} has two sizes")
    if view is None:
      return storage
    start, size = _integers(view[1:])
    if (start + size) * _itemsize(storage.dtype) > storage.nbytes:
      raise _Refused("a storage's view is larger than the storage")
    return dataclasses.replace(storage, start=start)

  # Mapped, because a file's `read` would first allocate whatever length a
  # damaged pickle claims.
  with (
    open(path, "rb") as whole,
    mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_READ) as f,
  ):
    _interpret(f, persistent)
    if _interpret(f, persistent) != 1001:
      raise _Refused("an unknown version of torch's old format")
    system = _interpret(f, persistent)
    if isinstance(system, dict) and system.get("little_endian") is False:
      raise _Refused("written on a big-endian machine; save it on another")
    contents = _contents_of(_interpret(f, persistent))
    keys = _interpret(f, persistent)
    places: dict[str, int] = {}
    if not isinstance(keys, list):
      raise _Refused("damaged: no list of storages")
    for key in map(str, keys):
      if key not in storages:
        raise _Refused(f"damaged: storage {printable(key)} is not used")
      header = f.read(8)
      if len(header) < 8:
        raise _Refused("cut short; get the file again")
      (numel,) = struct.unpack("<q", header)
      if numel * _itemsize(storages[key].dtype) != storages[key].nbytes:
        raise _Refused(f"damaged: storage {printable(key)} has another size")
      places[key] = f.tell()
      if f.tell() + storages[key].nbytes > len(f):
        raise _Refused("cut short; get the file again")
      f.seek(storages[key].nbytes, 1)
    if places.keys() != storages.keys():
      raise _Refused("cut short; get the file again")

  def read_storage(storage: _Storage) -> bytes:
    with open(path, "rb") as f:
      f.seek(places[storage.key])
      data = f.read(storage.nbytes)
    if len(data) != storage.nbytes:
      raise _Refused("cut short; get the file again")
    return data

  return contents, read_storage


def _foreign_of(saved: Any) -> _Placeholder | None:
  """Returns what stands for a reference to a class or an unknown storage.

  The old format refers to the source of a pickled model's classes so.
  """
  if (
    isinstance(saved, tuple)
    and len(saved) >= 2
    and saved[0] in ("module", "storage")
    and isinstance(saved[1], _Placeholder)
  ):
    return saved[1]
  return None


def _storage_of(
  saved: Any, *, fields: int
) -> tuple[_Storage, tuple[Any, ...] | None]:
  """Reads (kind, storage class, key, device, numel[, view])."""
  if (
    not isinstance(saved, tuple)
    or not 5 <= len(saved) <= fields
    or saved[0] != "storage"
    or not isinstance(saved[1], _DType)
  ):
    raise _Refused("damaged: a reference that is not to a tensor's storage")
  (numel,) = _integers((saved[4],))
  view = saved[5] if len(saved) == 6 else None
  if view is not None and (not isinstance(view, tuple) or len(view) != 3):
    raise _Refused("damaged: a storage's view is not described")
  nbytes = numel * _itemsize(saved[1].name)
  return _Storage(str(saved[2]), saved[1].name, nbytes), view


def _itemsize(dtype: str | None) -> int:
  return 1 if dtype is None else np.dtype(_DTYPES[dtype]).itemsize


def _integers(values: Any) -> tuple[int, ...]:
  if not isinstance(values, tuple | list) or not all(
    type(value) is int and 0 <= value < 2**48 for value in values
  ):
    raise _Refused("damaged: a tensor's sizes are not natural numbers")
  return tuple(values)


def _make_view(
  storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any
) -> _View | _Placeholder:
  """Stands for torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
  if isinstance(storage, _Placeholder):
    return storage
  if not isinstance(storage, _Storage) or storage.dtype is None:
    raise _Refused("damaged: a tensor without a storage")
  return _check_view(storage, storage.dtype, offset, shape, strides)


def _make_typed_view(
  storage: Any,
  offset: Any,
  shape: Any,
  strides: Any,
  _requires_grad: Any,
  _hooks: Any,
  dtype: Any,
  *_rest: Any,
) -> _View | _Placeholder:
  """Stands for torch._utils._rebuild_tensor_v3, over untyped bytes."""
  if isinstance(dtype, _Placeholder):
    return dtype
  if (
    not isinstance(storage, _Storage)
    or not isinstance(dtype, _DType)
    or dtype.name is None
  ):
    raise _Refused("damaged: a tensor without a storage or type")
  return _check_view(storage, dtype.name, offset, shape, strides)


def _check_view(
  storage: _Storage, dtype: str, offset: Any, shape: Any, strides: Any
) -> _View:
  (offset,) = _integers((offset,))
  shape, strides = _integers(shape), _integers(strides)
  if len(shape) != len(strides) or len(shape) > _MAX_AXES:
    raise _Refused("damaged: a tensor's shape and strides do not agree")
  held = storage.nbytes // _itemsize(dtype) - storage.start
  last = offset + sum(
    (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
  )
  # The count guards against strides of zero, which unfold to any size.
  if 0 not in shape and (last >= held or math.prod(shape) > held):
    raise _Refused(
      f"a tensor of shape {shape} reaches beyond its storage of {held:,}"
      " numbers: damaged"
    )
  return _View(storage, dtype, offset, shape, strides)


def _make_parameter(data: Any, *_rest: Any) -> Any:
  """Stands for torch._utils._rebuild_parameter: the tensor in it."""
  return data


def _make_from_type(function: Any, _type: Any, args: Any, *_rest: Any) -> Any:
  """Stands for torch._tensor._rebuild_from_type_v2, for tensor subclasses."""
  return _call(function, args)


def _make_dict(*args: Any) -> dict[Any, Any]:
  """Stands for collections.OrderedDict and its like."""
  found: dict[Any, Any] = {}
  pairs = args[0] if args and isinstance(args[0], list | tuple) else ()
  for pair in pairs:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
      raise _Refused("damaged: an ordered dict that is not of pairs")
    _set_item(found, *pair)
  return found


def _make_size(sizes: Any) -> tuple[int, ...]:
  """Stands for torch.Size."""
  return _integers(sizes)


_FUNCTIONS = {
  name: _Function(name, call)
  for name, call in {
    "torch._utils._rebuild_tensor": _make_view,
    "torch._utils._rebuild_tensor_v2": _make_view,
    "torch._utils._rebuild_tensor_v3": _make_typed_view,
    "torch._utils._rebuild_parameter": _make_parameter,
    "torch._utils._rebuild_parameter_with_state": _make_parameter,
    "torch._tensor._rebuild_from_type_v2": _make_from_type,
    "torch.Size": _make_size,
    "collections.OrderedDict": _make_dict,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda *_: {},
  }.items()
}
_TYPES = {
  **{f"torch.{name}": _DType(name) for name in _DTYPES},
  **{
    f"{module}.{name}": _DType(dtype)
    for module in ("torch", "torch.cuda")
    for name, dtype in _STORAGES.items()
  },
  "torch.storage.UntypedStorage": _DType(None),
  "torch.UntypedStorage": _DType(None),
}


def _find_global(module: Any, name: Any) -> Any:
  if not isinstance(module, str) or not isinstance(name, str):
    raise _Refused("damaged: a name that is not text")
  full = f"{_OLD_MODULES.get(module, module)}.{name}"
  if full in _FUNCTIONS:
    return _FUNCTIONS[full]
  if full in _TYPES:
    return _TYPES[full]
  return _Placeholder(full)


def _call(function: Any, args: Any) -> Any:
  if isinstance(function, _Placeholder):
    # Another one each time: its state says whether it is a model.
    return _Placeholder(function.name)
  if not isinstance(function, _Function) or not isinstance(args, tuple):
    raise _Refused("damaged: it calls what is no function")
  try:
    return function.call(*args)
  except TypeError:
    raise _Refused(f"damaged: {function.name} has other arguments") from None


def _set_item(container: Any, key: Any, value: Any) -> None:
  if isinstance(container, _Placeholder):
    return
  if not isinstance(container, dict):
    raise _Refused("damaged: an item is set in what is no dict")
  # Nothing sought is stored under another key, and hashing nested tuples can
  # be made to take for ever.
  if isinstance(key, bytes):
    key = key.decode("utf-8", "replace")
  if isinstance(key, str | int | float):
    container[key] = value


def _extend(container: Any, values: list[Any]) -> None:
  if isinstance(container, _Placeholder):
    return
  if not isinstance(container, list):
    raise _Refused("damaged: an item is added to what is no list")
  container.extend(values)


def printable(text: str) -> str:
  """Escapes what a hostile name could do to a terminal or a log."""
  return text.encode("unicode_escape").decode()[:120]


_MARK = object()
_Persistent = Callable[[Any], _Storage | _Placeholder]


def _interpret(
  stream: io.BytesIO | mmap.mmap,
  persistent: _Persistent,
) -> Any:
  """Evaluates one pickle by the rules of this file.

  Args:
    stream: read from its position up to the pickle's end.
    persistent: makes a storage of a persistent id.

  Returns:
    Dicts, lists, tuples, numbers, strings, `_View`s and placeholders.

  Raises:
    _Refused: the pickle is damaged or names what is not rebuilt.

  Source: pickletools.py, which documents every opcode.
  """
  machine = _Machine(persistent)
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
      if count > _MAX_OPCODES:
        raise _Refused("its pickle is longer than any state dict's")
      if opcode.name == "STOP":
        return machine.pop()
      machine.step(opcode.name, argument)
  except (ValueError, LookupError, RecursionError, struct.error):
    raise _Refused(
      "cut short or damaged: its pickle cannot be read; get the file again"
    ) from None
  raise _Refused("cut short: its pickle does not end")


class _Machine:
  """The pickle's stack machine over inert values.

  Args:
    persistent: makes a storage of a persistent id.
  """

  def __init__(self, persistent: _Persistent):
    self._persistent = persistent
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def pop(self) -> Any:
    value = self._stack.pop()
    if value is _MARK:
      raise _Refused("damaged: its pickle's stack is out of order")
    return value

  def _pop_to_mark(self) -> list[Any]:
    values = []
    while (value := self._stack.pop()) is not _MARK:
      values.append(value)
    return values[::-1]

  def _top(self) -> Any:
    if self._stack[-1] is _MARK:
      raise _Refused("damaged: its pickle's stack is out of order")
    return self._stack[-1]

  def step(self, opcode: str, argument: Any) -> None:
    """Carries out one opcode."""
    push = self._stack.append
    match opcode:
      case "PROTO" | "FRAME":
        pass
      case "MARK":
        push(_MARK)
      case "NONE":
        push(None)
      case "NEWTRUE" | "NEWFALSE":
        push(opcode == "NEWTRUE")
      case _ if opcode in _LITERALS:
        push(argument)
      case "EMPTY_DICT":
        push({})
      case "EMPTY_LIST" | "EMPTY_SET":
        push([])
      case "EMPTY_TUPLE":
        push(())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        values = [self.pop() for _ in range(int(opcode[-1]))]
        push(tuple(values[::-1]))
      case "TUPLE" | "FROZENSET":
        push(tuple(self._pop_to_mark()))
      case "LIST":
        push(self._pop_to_mark())
      case "DICT":
        values = self._pop_to_mark()
        push({})
        self._set_items(values)
      case "SETITEM":
        value, key = self.pop(), self.pop()
        self._set_items([key, value])
      case "SETITEMS":
        self._set_items(self._pop_to_mark())
      case "APPEND":
        value = self.pop()
        _extend(self._top(), [value])
      case "APPENDS" | "ADDITEMS":
        values = self._pop_to_mark()
        _extend(self._top(), values)
      case "PUT" | "BINPUT" | "LONG_BINPUT":
        self._memo[argument] = self._top()
      case "MEMOIZE":
        self._memo[len(self._memo)] = self._top()
      case "GET" | "BINGET" | "LONG_BINGET":
        push(self._memo[argument])
      case "DUP":
        push(self._top())
      case "POP":
        self._stack.pop()
      case "POP_MARK":
        self._pop_to_mark()
      case "GLOBAL":
        push(_find_global(*argument.split(" ", 1)))
      case "STACK_GLOBAL":
        name, module = self.pop(), self.pop()
        push(_find_global(module, name))
      case "REDUCE" | "NEWOBJ":
        args, function = self.pop(), self.pop()
        push(_call(function, args))
      case "NEWOBJ_EX":
        _, args, function = self.pop(), self.pop(), self.pop()
        push(_call(function, args))
      case "INST":
        args = tuple(self._pop_to_mark())
        push(_call(_find_global(*argument.split(" ", 1)), args))
      case "OBJ":
        function, *args = self._pop_to_mark()
        push(_call(function, tuple(args)))
      case "BUILD":
        # Attributes (a state dict's `_metadata`, a callback's state) are of
        # no use to a reader of tensors, but a module is told by them.
        state, top = self.pop(), self._top()
        if isinstance(top, _Placeholder) and isinstance(state, dict):
          top.is_model |= "_modules" in state and "_parameters" in state
      case "BINPERSID":
        push(self._persistent(self.pop()))
      case _:
        raise _Refused(f"refused, because its pickle uses {opcode}")

  def _set_items(self, values: list[Any]) -> None:
    if len(values) % 2:
      raise _Refused("damaged: a dict with a key and no value")
    container = self._top()
    for key, value in zip(values[::2], values[1::2], strict=True):
      _set_item(container, key, value)


_LITERALS = frozenset(
  (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE"),
    *("SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
  )
)
