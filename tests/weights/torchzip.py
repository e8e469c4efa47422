"""Torch's zip format, written by hand: whole, and broken where a test asks."""

import pickle
import struct
import zipfile

import numpy as np


def text(value):
  return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
  return b"J" + struct.pack("<i", value)


def integers(values):
  return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(key="0", numel=6, offset=0, shape=(2, 3), strides=(3, 1)):
  """One tensor's opcodes, as torch.save writes them."""
  storage = (
    b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text(key)
    + text("cpu")
    + integer(numel)
    + b"tQ"
  )
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage
    + integer(offset)
    + integers(shape)
    + integers(strides)
    + b"\x89ccollections\nOrderedDict\n)RtR"
  )


def state_dict(**values):
  items = b"".join(text(name) + value for name, value in values.items())
  return b"\x80\x02}(" + items + b"u."


def write_zip(path, data_pkl, storages=None, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", data_pkl)
    for key, value in (
      storages or {"0": (np.arange(6, dtype="<f4") / 8).tobytes()}
    ).items():
      archive.writestr(f"archive/data/{key}", value)
  return path


def opcodes(value):
  """The opcodes that make a value and nothing else: a part of a pickle."""
  return pickle.dumps(value, 2)[2:-1]


def save(path, tree):
  """Writes what torch.save writes of nested dicts of float32 arrays.

  Bytes are opcodes of an object's own; what is neither is pickled.
  """
  storages = {}

  def write(node):
    if isinstance(node, dict):
      items = b"".join(text(key) + write(value) for key, value in node.items())
      return b"}(" + items + b"u"
    if isinstance(node, bytes):
      return node
    if not isinstance(node, np.ndarray):
      return opcodes(node)
    value = np.ascontiguousarray(node, "<f4")
    strides = tuple(s // value.itemsize for s in value.strides)
    key = str(len(storages))
    storages[key] = value.tobytes()
    return tensor(key, value.size, 0, value.shape, strides)

  return write_zip(path, b"\x80\x02" + write(tree) + b".", storages)
