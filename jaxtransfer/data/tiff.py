"""The first page of a TIFF as a file of its own, or the name of what it is."""

import re
import struct
from collections.abc import Sequence
from typing import BinaryIO

from PIL import TiffImagePlugin

from jaxtransfer.data import containers, tags
from jaxtransfer.data.containers import ImageError, Pixels
from jaxtransfer.data.tags import Tags

_SUBFILE, _WIDTH, _HEIGHT, _BITS = 254, 256, 257, 258
_COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _DESCRIPTION = 259, 262, 266, 270
_STRIPS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_SIZES = 273, 277, 278, 279
_PLANAR, _PREDICTOR, _COLOURS = 284, 317, 320
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 322, 323, 324, 325
_SUB_DIRECTORIES, _EXTRA, _SAMPLE_FORMAT, _SUBSAMPLING = 330, 338, 339, 530

# What codecs need beside these, copied as it is: fax options, JPEG tables, and
# how YCbCr becomes RGB.
_COPIED = (292, 293, 347, 512, 513, 514, 515, 519, 520, 521)
_COPIED += (529, _SUBSAMPLING, 531, 532)

# Sample formats; the rest are whole numbers from zero.
_NOT_WHOLE = {2: "signed-integer", 3: "float", 5: "complex", 6: "complex"}
_OLD_JPEG = 6
_COMPRESSIONS = {
  9: "JBIG",
  10: "JBIG",
  32766: "NeXT",
  33003: "JPEG 2000",
  33005: "JPEG 2000",
  34661: "JBIG",
  34712: "JPEG 2000",
  34887: "LERC",
  34892: "raw",
  50002: "JPEG XL",
  52546: "JPEG XL",
}
# libtiff can be built without these; the others are always there.
_OPTIONAL = {34925: "LZMA", 50000: "zstd", 50001: "WebP"}
_CHANNELS_FIRST = "make 8-bit RGB of the channels that matter"
_SLIDE = "; cut it into tiles first"
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# Codecs to which the order of bits is a matter of their own.
_OWN_FILL_ORDER = (2, 3, 4, _OLD_JPEG, 7)


def first_page(file: BinaryIO, max_pixels: int) -> Pixels:
  """Returns the pixels of a TIFF's first page.

  No more than this page is read, however many there are.

  Args:
    file: from its beginning.
    max_pixels: as `images.decode` takes it.

  Raises:
    ImageError: it cannot be used.
  """
  try:
    page = Tags(file)
  except ValueError as e:
    raise ImageError(f"damaged image: {e}") from None
  width, height = page.number(_WIDTH, 0), page.number(_HEIGHT, 0)
  what, advice = _what(file, page)
  for number, word in _NOT_WHOLE.items():
    if number in page.numbers(_SAMPLE_FORMAT):
      bits = max(_samples(page)[1])
      raise ImageError(
        f"a {word} TIFF of {bits} bits: {containers.RANGE_FIRST}"
      )
  if reason := _unsupported(page):
    raise ImageError(f"{what} {reason}{advice}")
  try:
    containers.check_size(width, height, max_pixels)
  except ImageError as e:
    # That it is a slide says more than its size.
    if advice:
      raise ImageError(f"{what}, {e}{advice}") from None
    raise
  data = _rewritten(file, page, width, height)
  turned = tags.orientation(file, page.raw(tags.XMP))
  codec = _OPTIONAL.get(page.number(_COMPRESSION, 1), "")
  return Pixels("TIFF", data, turned, codec)


def _what(file: BinaryIO, page: Tags) -> tuple[str, str]:
  """Returns what the file is called, and what is done with such."""
  if page.text(_DESCRIPTION).startswith("Aperio"):
    return "an Aperio SVS slide", _SLIDE
  if 65420 in page:
    return "a Hamamatsu NDPI slide", _SLIDE
  file.seek(8)
  if 50706 in page or file.read(2) == b"CR":
    return "a camera's raw file", ""
  return "a TIFF", ""


def _samples(page: Tags) -> tuple[int, tuple[int, ...]]:
  """Returns how many channels there are, and the bits of each."""
  bits = page.numbers(_BITS) or (1,)
  samples = page.number(_SAMPLES, len(bits))
  if len(bits) < samples:
    bits = bits[:1] * samples if samples < 1 << 16 else bits
  return samples, bits[:samples]


def _unsupported(page: Tags) -> str:
  """Returns what a valid page is that has no one meaning in 8-bit RGB.

  The words follow "a TIFF"; there are none where it may be read.
  """
  samples, bits = _samples(page)
  deepest = max(bits, default=1)
  compression = page.number(_COMPRESSION, 1)
  photometric = page.number(_PHOTOMETRIC, 0)
  ranged, chosen = containers.RANGE_FIRST, _CHANNELS_FIRST
  if samples >= 5:
    return f"of {samples} channels: {chosen}"
  if compression not in TiffImagePlugin.COMPRESSION_INFO:
    name = _COMPRESSIONS.get(compression, f"unknown ({compression})")
    return f"with {name} compression: save it with another, such as LZW"
  if deepest > 16:
    return f"of {deepest}-bit integers: {ranged}"
  if photometric == 5:
    return f"in CMYK colours: {containers.RGB_FIRST}"
  if photometric in (8, 9, 10):
    return f"in LAB colours: {containers.RGB_FIRST}"
  if photometric in (0, 1):
    return _unsupported_grey(page, samples, deepest)
  if photometric == 3 and (samples > 2 or deepest > 8):
    return f"of {deepest}-bit palette colours: {containers.RGB_FIRST}"
  if photometric in (2, 6) and samples < 3 and compression != _OLD_JPEG:
    return f"of {samples} channels that calls itself colour: {chosen}"
  if photometric == 2 and set(bits) not in ({8}, {16}):
    depth = " and ".join(f"{b}-bit" for b in sorted(set(bits)))
    return f"of {depth} colour: {ranged}"
  if photometric in (32803, 34892):
    return f"of a sensor's raw colours: {containers.RGB_FIRST}"
  if photometric not in (2, 3, 6):
    return f"of unknown colours ({photometric}): {containers.RGB_FIRST}"
  if photometric == 3 and samples == 2 and page.number(_PLANAR, 1) == 2:
    return f"with alpha in a plane of its own: {containers.RGB_FIRST}"
  if page.number(_SUBFILE, 0) & 1 and (page.more or _SUB_DIRECTORIES in page):
    return "whose first page is the thumbnail of another: save that one alone"
  return ""


def _unsupported_grey(page: Tags, samples: int, bits: int) -> str:
  if samples == 2 and page.number(_EXTRA, 0) in (1, 2):
    if bits > 8:
      return f"of {bits}-bit grey with alpha: {containers.RANGE_FIRST}"
    if page.number(_PLANAR, 1) == 2:
      return f"with alpha in a plane of its own: {containers.RGB_FIRST}"
  elif samples > 1:
    return f"of {samples} grey channels: {_CHANNELS_FIRST}"
  elif bits > 8:
    return f"of {bits}-bit grey: {containers.RANGE_FIRST}"
  # ImageJ and OME write every channel of a fluorescence as a page.
  words = page.text(_DESCRIPTION)
  match = re.search(r"^ImageJ=(?s:.*)^channels=(\d+)", words, re.MULTILINE)
  match = match or re.search(r"<Pixels\b[^>]*\bSizeC=\"(\d+)\"", words)
  if match and page.more and int(match[1]) > 1:
    return f"of {match[1]} channels, each a page: {_CHANNELS_FIRST}"
  return ""


# --- the page, written again -------------------------------------------------


def _rewritten(file: BinaryIO, page: Tags, width: int, height: int) -> bytes:
  """Returns a TIFF of one page that holds what its pixels need."""
  samples, bits = _samples(page)
  compression = page.number(_COMPRESSION, 1)
  photometric = page.number(_PHOTOMETRIC, 0)
  planar = page.number(_PLANAR, 1) if samples > 1 else 1
  tiled = _TILES in page
  rows = min(page.number(_ROWS_PER_STRIP, height) or height, height)
  shape = (page.number(_TILE_WIDTH, 0), page.number(_TILE_HEIGHT, 0))
  if not tiled:
    shape = width, rows
  if min(shape) < 1:
    raise ImageError(f"damaged image: tiles of {shape[0]} x {shape[1]} pixels")
  across, down = -(-width // shape[0]), -(-height // shape[1])
  extra = page.numbers(_EXTRA)
  if photometric == 2 and samples == 4:
    # Four channels without a word about the last are usually this.
    extra = extra or (2,)
    if planar == 2 and extra[0] not in (1, 2):
      # Its last plane means nothing, and not every reader passes it over.
      samples, bits, extra = 3, bits[:3], ()
  planes = samples if planar == 2 else 1
  total = across * down * planes
  offsets = page.numbers(_TILES if tiled else _STRIPS)
  counts = page.numbers(_TILE_SIZES if tiled else _STRIP_SIZES)
  if len(offsets) < total and compression != _OLD_JPEG:
    raise ImageError(
      f"damaged image: {len(offsets)} of {total} parts of the TIFF are there"
    )
  if compression == 1 and (photometric != 6 or planar == 2):
    # What the sides say; some writers count wrongly.
    each = sum(bits) if planar != 2 else bits[0]
    line = -(-shape[0] * each // 8)
    counts = [line * shape[1]] * total
    if not tiled:
      last = height - shape[1] * (down - 1)
      counts[down - 1 :: down] = [line * last] * planes
  fields: dict[int, Sequence[int]] = {
    _WIDTH: [width],
    _HEIGHT: [height],
    _BITS: bits,
    _COMPRESSION: [compression],
    _PHOTOMETRIC: [photometric],
    _SAMPLES: [samples],
    _PLANAR: [planar],
  }
  if extra:
    fields[_EXTRA] = extra
  for tag in (_FILL_ORDER, _PREDICTOR, _COLOURS):
    if values := page.numbers(tag):
      fields[tag] = values
  if compression == _OLD_JPEG:
    # Its tables lie anywhere in the file, and say where.
    file.seek(0)
    base = file.read()
    counts = counts or _to_the_end(offsets, len(base))
  else:
    base, offsets, counts = _gathered(file, offsets, counts, total)
    if compression not in _OWN_FILL_ORDER:
      if page.number(_FILL_ORDER, 1) == 2:
        base = base.translate(_REVERSED)
      fields.pop(_FILL_ORDER, None)
  if tiled:
    fields |= {_TILE_WIDTH: shape[:1], _TILE_HEIGHT: shape[1:]}
    fields |= {_TILES: offsets, _TILE_SIZES: counts}
  else:
    fields |= {_ROWS_PER_STRIP: [rows], _STRIPS: offsets, _STRIP_SIZES: counts}
  copied = {tag: page.raw(tag) for tag in _COPIED}
  return _written(base, page, fields, copied)


def _to_the_end(offsets: Sequence[int], end: int) -> list[int]:
  """Returns how far it is from each strip to what follows it."""
  ends = sorted({*offsets, end})
  after = dict(zip(ends, ends[1:], strict=False))
  return [after[o] - o if o < end else 0 for o in offsets]


def _gathered(
  file: BinaryIO, offsets: Sequence[int], counts: Sequence[int], total: int
) -> tuple[bytes, list[int], list[int]]:
  """Returns strips or tiles one after the other, and where they are then.

  Args:
    file: where they are now.
    offsets: of each.
    counts: bytes of each; none where the file does not say.
    total: how many there are, at most as many as offsets.

  Raises:
    ImageError: some are cut short.
  """
  size = file.seek(0, 2)
  if len(counts) < total:
    counts = _to_the_end(offsets, size)
  places = list(zip(offsets[:total], counts[:total], strict=True))
  # The first bytes are the header's.
  parts, there, at, room = [b"\0" * 8], {}, 8, size
  for place in places:
    offset, count = place
    if place in there:
      continue
    if not 0 < offset < offset + count <= size:
      raise ImageError("damaged image: truncated, pixels of the TIFF missing")
    room -= count
    if room < 0:
      raise ImageError("damaged image: parts of the TIFF lie in each other")
    file.seek(offset)
    parts.append(file.read(count))
    # An odd place would be one more thing that a decoder may refuse.
    parts.append(b"\0" * (count % 2))
    there[place] = at
    at += count + count % 2
  return (
    b"".join(parts),
    [there[place] for place in places],
    [count for _, count in places],
  )


def _written(
  base: bytes,
  page: Tags,
  fields: dict[int, Sequence[int]],
  copied: dict[int, bytes],
) -> bytes:
  """Returns the bytes of a TIFF whose directory follows what it points to."""
  end = page.endian
  entries, beyond = [], [base, b"\0" * (len(base) % 2)]
  at = len(base) + len(base) % 2
  encoded = {}
  for tag, values in fields.items():
    if not values:
      continue
    short = max(values) < 1 << 16 and min(values) >= 0
    try:
      data = struct.pack(f"{end}{len(values)}{'H' if short else 'I'}", *values)
    except struct.error:
      raise ImageError(f"damaged image: TIFF tag {tag}") from None
    encoded[tag] = (3 if short else 4), len(values), data
  for tag, data in copied.items():
    if data:
      encoded[tag] = page.kind(tag), page.count(tag), data
  for tag, (kind, count, data) in sorted(encoded.items()):
    value = data.ljust(4, b"\0")
    if len(data) > 4:
      value = struct.pack(end + "I", at)
      data += b"\0" * (len(data) % 2)
      beyond.append(data)
      at += len(data)
    entries.append(struct.pack(end + "HHI", tag, kind, count) + value)
  directory = struct.pack(end + "H", len(entries)) + b"".join(entries)
  mark = b"II" if end == "<" else b"MM"
  head = mark + struct.pack(end + "HI", 42, at)
  return head + b"".join(beyond)[8:] + directory + b"\0" * 4
