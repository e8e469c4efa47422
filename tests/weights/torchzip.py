"""Torch's zip format, written by hand: whole, and broken where a test asks."""

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


def save(path, tensors):
  """Writes {name: array} as torch.save writes a state dict of float32."""
  values = {k: np.ascontiguousarray(v, "<f4") for k, v in tensors.items()}
  items, storages = {}, {}
  for key, (name, value) in enumerate(values.items()):
    strides = tuple(s // value.itemsize for s in value.strides)
    items[name] = tensor(str(key), value.size, 0, value.shape, strides)
    storages[str(key)] = value.tobytes()
  return write_zip(path, state_dict(**items), storages)
