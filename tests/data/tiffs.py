"""TIFFs as other programs write them, which Pillow's writer cannot make."""

import struct
import zlib

import numpy as np

_FORMATS = {1: "B", 3: "H", 4: "I", 8: "h", 16: "Q"}
_REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


def write(
  samples: np.ndarray,
  *,
  bits: int = 8,
  photometric: int = 2,
  planar: int = 1,
  compression: int = 1,
  endian: str = "<",
  predictor: int = 1,
  tile: int = 0,
  rows: int = 0,
  fill_order: int = 1,
  big: bool = False,
  more: tuple[tuple[int, int, object], ...] = (),
) -> bytes:
  """Returns the bytes of a TIFF of one page.

  Args:
    samples: (H, W, C) whole numbers.
    bits: of each.
    photometric: 0 white is zero, 1 grey, 2 RGB, 3 palette, ...
    planar: 1 or 2.
    compression: 1, 8 (Deflate), 32773 (PackBits); any other is only written
      down.
    endian: "<" or ">".
    predictor: 1 or 2.
    tile: side of the tiles; 0 = strips.
    rows: of a strip; 0 = all.
    fill_order: 1 or 2.
    big: whether it is a BigTIFF.
    more: other tags, (number, type, numbers or bytes); they come instead of
      those of the same number.
  """
  height, width, channels = samples.shape
  parts = []
  for plane in [samples] if planar == 1 else np.split(samples, channels, 2):
    for block in _blocks(plane, tile, rows or height):
      part = _encoded(block, bits, compression, endian, predictor)
      parts.append(part.translate(_REVERSED) if fill_order == 2 else part)
  head = 16 if big else 8
  offsets, body = [], b""
  for part in parts:
    offsets.append(head + len(body))
    body += part + b"\0" * (len(part) % 2)
  fields = {
    256: (3, [width]),
    257: (3, [height]),
    258: (3, [bits] * channels),
    259: (3, [compression]),
    262: (3, [photometric]),
    266: (3, [fill_order]),
    277: (3, [channels]),
    284: (3, [planar]),
    317: (3, [predictor]),
  }
  places, sizes = (324, 325) if tile else (273, 279)
  fields |= {places: (4, offsets), sizes: (4, [len(p) for p in parts])}
  if tile:
    fields |= {322: (3, [tile]), 323: (3, [tile])}
  else:
    fields[278] = 3, [rows or height]
  fields |= {tag: (kind, value) for tag, kind, value in more}
  entries, number, size = b"", "Q" if big else "I", 8 if big else 4
  for tag, (kind, value) in sorted(fields.items()):
    data, count = value, 0
    if not isinstance(value, bytes):
      count = len(value)
      data = struct.pack(f"{endian}{count}{_FORMATS[kind]}", *value)
    count = count or len(data) // {5: 8, 4: 4}.get(kind, 1)
    if len(data) > size:
      place = struct.pack(endian + number, head + len(body))
      body += data + b"\0" * (len(data) % 2)
      data = place
    entries += struct.pack(endian + "HH" + number, tag, kind, count)
    entries += data.ljust(size, b"\0")
  start = head + len(body)
  mark = b"II" if endian == "<" else b"MM"
  if big:
    mark += struct.pack(endian + "HHHQ", 43, 8, 0, start)
  else:
    mark += struct.pack(endian + "HI", 42, start)
  count = struct.pack(endian + ("Q" if big else "H"), len(fields))
  return mark + body + count + entries + b"\0" * size


def _blocks(plane, tile, rows):
  if not tile:
    return [plane[y : y + rows] for y in range(0, len(plane), rows)]
  height, width, _ = plane.shape
  padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
  return [
    padded[y : y + tile, x : x + tile]
    for y in range(0, height, tile)
    for x in range(0, width, tile)
  ]


def _encoded(block, bits, compression, endian, predictor):
  values = block.astype(np.int64)
  if predictor == 2:
    values[:, 1:] -= block[:, :-1]
    values %= 1 << bits
  lines = values.reshape(len(values), -1)
  if bits in (8, 16):
    packed = [line.astype(f"{endian}u{bits // 8}").tobytes() for line in lines]
  else:
    each = (lines[..., None] >> np.arange(bits)[::-1]) & 1
    packed = [
      row.tobytes() for row in np.packbits(each.reshape(len(each), -1), 1)
    ]
  if compression == 8:
    return zlib.compress(b"".join(packed))
  if compression == 32773:
    packed = [
      b"".join(
        bytes([len(piece) - 1]) + piece
        for piece in (line[i : i + 128] for i in range(0, len(line), 128))
      )
      for line in packed
    ]
  return b"".join(packed)
