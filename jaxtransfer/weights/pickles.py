"""Evaluates a torch file's pickle without running it.

A pickle is a program. The interpreter here walks its opcodes itself: a global
is never imported, and a call reaches only the few inert functions of this file,
which return plain containers, numbers and descriptions of tensors. Whatever
else a file names becomes a placeholder that holds the name and does nothing.
"""

import dataclasses
import io
import math
import mmap
import pickletools
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# A state dict of a thousand tensors takes about 30,000 opcodes; this bounds
# the time that a hostile file can take.
_MAX_OPCODES = 3_000_000
_MAX_AXES = 8

DTYPES: dict[str, Any] = {
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


class Refused(Exception):
  """Why a file is not read; the message completes `<path>: `."""


@dataclasses.dataclass(eq=False)
class Placeholder:
  """Stands for an object that is not rebuilt.

  Attributes:
    name: of the class or function that would make it.
    state: the attributes that it would get.
  """

  name: str
  state: Any = None

  @property
  def is_model(self) -> bool:
    """Whether its state is that of a torch module."""
    return isinstance(self.state, dict) and "_modules" in self.state

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
class DType:
  """A torch dtype, or the storage class of one; `name` None is untyped."""

  name: str | None


@dataclasses.dataclass(frozen=True)
class Storage:
  """A buffer of the file: its key, its bytes, and a view's first element."""

  key: str
  dtype: str | None
  nbytes: int
  start: int = 0


@dataclasses.dataclass(frozen=True)
class View:
  """A tensor as torch describes it: strides over a storage, in elements."""

  storage: Storage
  dtype: str
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def itemsize(dtype: str | None) -> int:
  """Returns a torch type's bytes; one for an untyped storage's."""
  return 1 if dtype is None else np.dtype(DTYPES[dtype]).itemsize


def integers(values: Any) -> tuple[int, ...]:
  """Checks that sizes or places are some, and no larger than any file's.

  Raises:
    Refused: they are not.
  """
  if not isinstance(values, tuple | list) or not all(
    type(value) is int and 0 <= value < 2**48 for value in values
  ):
    raise Refused("damaged: a tensor's sizes are not natural numbers")
  return tuple(values)


def _make_view(
  storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any
) -> View | Placeholder:
  """Stands for torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
  if isinstance(storage, Placeholder):
    return storage
  if not isinstance(storage, Storage) or storage.dtype is None:
    raise Refused("damaged: a tensor without a storage")
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
) -> View | Placeholder:
  """Stands for torch._utils._rebuild_tensor_v3, over untyped bytes."""
  if isinstance(dtype, Placeholder):
    return dtype
  if (
    not isinstance(storage, Storage)
    or not isinstance(dtype, DType)
    or dtype.name is None
  ):
    raise Refused("damaged: a tensor without a storage or type")
  return _check_view(storage, dtype.name, offset, shape, strides)


def _check_view(
  storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any
) -> View:
  (offset,) = integers((offset,))
  shape, strides = integers(shape), integers(strides)
  if len(shape) != len(strides) or len(shape) > _MAX_AXES:
    raise Refused("damaged: a tensor's shape and strides do not agree")
  held = storage.nbytes // itemsize(dtype) - storage.start
  last = offset + sum(
    (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
  )
  # The count guards against strides of zero, which unfold to any size.
  if 0 not in shape and (last >= held or math.prod(shape) > held):
    raise Refused(
      f"a tensor of shape {shape} reaches beyond its storage of {held:,}"
      " numbers: damaged"
    )
  return View(storage, dtype, offset, shape, strides)


def _make_parameter(data: Any, *_rest: Any) -> Any:
  """Stands for torch._utils._rebuild_parameter: the tensor in it."""
  return data


def _make_from_type(function: Any, _type: Any, args: Any, *_rest: Any) -> Any:
  """Stands for torch._tensor._rebuild_from_type_v2, for tensor subclasses."""
  return _call(function, args)


def _make_dict(*args: Any) -> dict[Any, Any]:
  """Stands for collections.OrderedDict and its like."""
  made: dict[Any, Any] = {}
  pairs = args[0] if args and isinstance(args[0], list | tuple) else ()
  for pair in pairs:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
      raise Refused("damaged: an ordered dict that is not of pairs")
    _set_item(made, *pair)
  return made


def _make_size(sizes: Any) -> tuple[int, ...]:
  """Stands for torch.Size."""
  return integers(sizes)


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
  **{f"torch.{name}": DType(name) for name in DTYPES},
  **{
    f"{module}.{name}": DType(dtype)
    for module in ("torch", "torch.cuda")
    for name, dtype in _STORAGES.items()
  },
  "torch.storage.UntypedStorage": DType(None),
  "torch.UntypedStorage": DType(None),
}


def _find_global(module: Any, name: Any) -> Any:
  if not isinstance(module, str) or not isinstance(name, str):
    raise Refused("damaged: a name that is not text")
  full = f"{_OLD_MODULES.get(module, module)}.{name}"
  if full in _FUNCTIONS:
    return _FUNCTIONS[full]
  if full in _TYPES:
    return _TYPES[full]
  return Placeholder(full)


def _call(function: Any, args: Any) -> Any:
  if isinstance(function, Placeholder):
    # Another one each time: its state says whether it is a model.
    return Placeholder(function.name)
  if not isinstance(function, _Function) or not isinstance(args, tuple):
    raise Refused("damaged: it calls what is no function")
  try:
    return function.call(*args)
  except TypeError:
    raise Refused(f"damaged: {function.name} has other arguments") from None


def _set_item(container: Any, key: Any, value: Any) -> None:
  if isinstance(container, Placeholder):
    return
  if not isinstance(container, dict):
    raise Refused("damaged: an item is set in what is no dict")
  # Nothing sought is stored under another key, and hashing nested tuples can
  # be made to take for ever.
  if isinstance(key, bytes):
    key = key.decode("utf-8", "replace")
  if isinstance(key, str | int | float):
    container[key] = value


def _extend(container: Any, values: list[Any]) -> None:
  if isinstance(container, Placeholder):
    return
  if not isinstance(container, list):
    raise Refused("damaged: an item is added to what is no list")
  container.extend(values)


def printable(text: str) -> str:
  """Escapes what a hostile name could do to a terminal or a log."""
  return text.encode("unicode_escape").decode()[:120]


_MARK = object()
_Persistent = Callable[[Any], Storage | Placeholder]


def interpret(
  stream: io.BytesIO | mmap.mmap,
  persistent: _Persistent,
) -> Any:
  """Evaluates one pickle by the rules of this file.

  Args:
    stream: read from its position up to the pickle's end.
    persistent: makes a storage of a persistent id.

  Returns:
    Dicts, lists, tuples, numbers, strings, `View`s and placeholders.

  Raises:
    Refused: the pickle is damaged or names what is not rebuilt.

  Source: pickletools.py, which documents every opcode.
  """
  machine = _Machine(persistent)
  try:
    # It needs `read` and `readline` alone; its stubs ask for a whole IO.
    # pyrefly: ignore[bad-argument-type]
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
      if count > _MAX_OPCODES:
        raise Refused("its pickle is longer than any state dict's")
      if opcode.name == "STOP":
        return machine.pop()
      machine.step(opcode.name, argument)
  except (ValueError, LookupError, RecursionError, struct.error):
    raise Refused(
      "cut short or damaged: its pickle cannot be read; get the file again"
    ) from None
  raise Refused("cut short: its pickle does not end")


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
      raise Refused("damaged: its pickle's stack is out of order")
    return value

  def _pop_to_mark(self) -> list[Any]:
    values = []
    while (value := self._stack.pop()) is not _MARK:
      values.append(value)
    return values[::-1]

  def _top(self) -> Any:
    if self._stack[-1] is _MARK:
      raise Refused("damaged: its pickle's stack is out of order")
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
        # no use to a reader of tensors, but they tell a module and a script's
        # arguments.
        state, top = self.pop(), self._top()
        if isinstance(top, Placeholder):
          top.state = state
      case "BINPERSID":
        push(self._persistent(self.pop()))
      case _:
        raise Refused(f"refused, because its pickle uses {opcode}")

  def _set_items(self, values: list[Any]) -> None:
    if len(values) % 2:
      raise Refused("damaged: a dict with a key and no value")
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
