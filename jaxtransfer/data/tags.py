"""Tags as TIFF and EXIF write them, as far as they can be read.

Most of what a file says beside its pixels is wrong somewhere: a length beyond
the end, a denominator of zero, a text where a number belongs. So a value is
looked at only where it is asked for, and what makes no sense is not there.
"""

import io
import math
import re
import struct
from typing import BinaryIO

ORIENTATION = 274
XMP = 700

# Type -> bytes of one value; text and unknown bytes have one each.
_SIZES = {2: 1, 5: 8, 7: 1, 10: 8}
_FORMATS = {
  1: "B",
  3: "H",
  4: "I",
  6: "b",
  8: "h",
  9: "i",
  11: "f",
  12: "d",
  13: "I",
  16: "Q",
  17: "q",
  18: "Q",
}
_SIZES |= {kind: struct.calcsize("=" + f) for kind, f in _FORMATS.items()}
_RATIONALS = {5: "I", 10: "i"}
_MOST_ENTRIES = 4096


class Tags:
  """The first directory of a TIFF or of an EXIF block.

  Args:
    file: the whole of it; it is read again at every question.

  Attributes:
    endian: "<" or ">", of every number in the file.
    more: whether another directory follows.

  Raises:
    ValueError: no such file, or its directory lies outside it.
  """

  def __init__(self, file: BinaryIO):
    self._file = file
    head = self._at(0, 16)
    if head[:2] not in (b"II", b"MM") or len(head) < 8:
      raise ValueError("no TIFF header")
    self.endian = "<" if head[:2] == b"II" else ">"
    big = 43 in head[2:4]
    if not big and 42 not in head[2:4]:
      raise ValueError("no TIFF header")
    number, width = ("Q", 8) if big else ("I", 4)
    start = self._number(number, head[width : 2 * width])
    self._entries: dict[int, tuple[int, int, int]] = {}
    counted = self._at(start, 8 if big else 2)
    count = self._number("Q" if big else "H", counted)
    first, size = start + len(counted), 4 + 2 * width
    for at in range(first, first + size * min(count, _MOST_ENTRIES), size):
      entry = self._at(at, size)
      if len(entry) < size:
        break
      tag, kind = struct.unpack(self.endian + "HH", entry[:4])
      length = self._number(number, entry[4 : 4 + width])
      if tag in self._entries or kind not in _SIZES or not length:
        continue
      value = at + 4 + width
      if length * _SIZES[kind] > width:
        value = self._number(number, entry[4 + width :])
      self._entries[tag] = kind, length, value
    after = self._at(first + size * count, width)
    self.more = len(after) == width and any(after)

  def _at(self, position: int, count: int) -> bytes:
    if position >= 2**63:
      return b""
    self._file.seek(position)
    return self._file.read(count)

  def _number(self, kind: str, data: bytes) -> int:
    if len(data) != struct.calcsize("=" + kind):
      raise ValueError("the TIFF directory lies beyond the end of the file")
    return struct.unpack(self.endian + kind, data)[0]

  def __contains__(self, tag: int) -> bool:
    return tag in self._entries

  def kind(self, tag: int) -> int:
    """Returns the type that a tag is written in."""
    return self._entries[tag][0]

  def count(self, tag: int) -> int:
    """Returns how many values of its type a tag has."""
    return self._entries[tag][1]

  def raw(self, tag: int, most: int = 1 << 26) -> bytes:
    """Returns a tag's bytes; none where it is not there, cut short or longer.

    Args:
      tag: its number.
      most: bytes.
    """
    kind, length, position = self._entries.get(tag, (7, 0, 0))
    size = length * _SIZES[kind]
    data = self._at(position, size) if size <= most else b""
    return data if len(data) == size else b""

  def numbers(self, tag: int) -> tuple[int, ...]:
    """Returns a tag's whole numbers, whatever type they are written in.

    Args:
      tag: its number.

    Returns:
      The numbers; none where one of them is not whole.
    """
    data = self.raw(tag)
    if not data:
      return ()
    kind = self._entries[tag][0]
    if kind in _RATIONALS:
      parts = struct.unpack(
        f"{self.endian}{len(data) // 4}{_RATIONALS[kind]}", data
      )
      values = [
        over / under if under else math.nan
        for over, under in zip(parts[::2], parts[1::2], strict=True)
      ]
    elif kind in _FORMATS:
      count = len(data) // _SIZES[kind]
      values = struct.unpack(f"{self.endian}{count}{_FORMATS[kind]}", data)
    else:
      return ()
    if not all(math.isfinite(v) and v == int(v) for v in values):
      return ()
    return tuple(map(int, values))

  def number(self, tag: int, default: int) -> int:
    """Returns a tag's first whole number, or the default."""
    return (self.numbers(tag) or (default,))[0]

  def text(self, tag: int) -> str:
    """Returns a tag's bytes as text."""
    return self.raw(tag).decode("latin-1")


def orientation(exif: bytes | BinaryIO, xmp: bytes = b"") -> int:
  """Returns how an image must be turned, 1 to 8; 1, as it is, where unknown.

  Args:
    exif: a TIFF, or the block that EXIF writes like one.
    xmp: an XMP packet; it counts where EXIF says nothing.
  """
  file = io.BytesIO(exif) if isinstance(exif, bytes) else exif
  turn = 0
  try:
    turn = Tags(file).number(ORIENTATION, 0)
  except ValueError:
    pass
  if not 1 <= turn <= 8:
    match = re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])", xmp)
    turn = int(match[1]) if match else 1
  return turn
