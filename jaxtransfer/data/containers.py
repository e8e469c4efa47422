"""What of an image file is pixels: the file again, without all else it says.

Decoders stumble over colour profiles, texts, maker notes and resolutions that
are damaged or huge, although no pixel needs them. They are cut out before a
decoder sees them; of all they say, the orientation is kept.
"""

import dataclasses
import re
import struct
import zlib
from typing import BinaryIO

from jaxtransfer.data import tags

READABLE = "PNG, JPEG, TIFF, BMP or WebP image"
RGB_FIRST = "convert the image to RGB first"
RANGE_FIRST = "convert it to 8 bits with the range that matters"
_MOST_TEXT = 1 << 20


class ImageError(Exception):
  """An image that cannot be used; its message is the reason, one line."""

  def __init__(self, reason: str):
    super().__init__(" ".join(reason.split()))


@dataclasses.dataclass(frozen=True)
class Pixels:
  """A file that holds one picture and nothing else.

  Attributes:
    form: Pillow's name of the format.
    data: the bytes of the file.
    orientation: as EXIF counts, 1 to 8; no longer in the file.
    codec: what the decoder may have been built without.
  """

  form: str
  data: bytes
  orientation: int = 1
  codec: str = ""


def check_size(
  width: int, height: int, max_pixels: int, what: str = ""
) -> None:
  """Refuses what is too large, before it is decoded.

  Args:
    width: pixels.
    height: pixels.
    max_pixels: the limit.
    what: what the file is, where that helps.

  Raises:
    ImageError: it is larger, or empty.
  """
  if width < 1 or height < 1:
    raise ImageError(f"damaged image: {width} x {height} pixels")
  if width * height > max_pixels:
    raise ImageError(
      f"{what}too large: {width} x {height} pixels, {width * height} in all;"
      f" the limit data.max_pixels is {max_pixels}"
    )


# --- what a file is ----------------------------------------------------------

_MAGIC = (
  (b"\x89PNG\r\n\x1a\n", "PNG"),
  (b"\xff\xd8\xff", "JPEG"),
  (b"BM", "BMP"),
  (b"II\x2a\x00", "TIFF"),
  (b"MM\x00\x2a", "TIFF"),
  # Wrong, and written all the same.
  (b"II\x00\x2a", "TIFF"),
  (b"MM\x2a\x00", "TIFF"),
  (b"II\x2b\x00", "TIFF"),
  (b"MM\x00\x2b", "TIFF"),
)

_OTHERS = (
  (b"version https://git-lfs", "a Git LFS pointer: run git lfs pull"),
  (b"GIF8", "a GIF file"),
  (b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
  (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
  (b"\xff\x0a", "a JPEG XL file"),
  (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
  (b"II\xbc\x01", "a JPEG XR file"),
  (b"%PDF", "a PDF file"),
  (b"%!PS", "a PostScript file"),
  (b"8BPS", "a Photoshop file"),
  (b"\x76\x2f\x31\x01", "an OpenEXR file"),
  (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
  (b"\x93NUMPY", "a NumPy file"),
  (b"NRRD", "an NRRD file"),
  (b"ZISRAWFILE", "a Zeiss CZI slide: cut it into tiles first"),
  (b"\xda\xce\xbe\x0a", "a Nikon ND2 file"),
  (b"SQLite format 3", "an SQLite file"),
  (b"\0\x05\x16\x07", "a file in which macOS keeps attributes of another"),
  (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft compound file"),
  (b"PK\x03\x04", "a ZIP archive"),
  (b"Rar!", "a RAR archive"),
  (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
  (b"\x1f\x8b", "a gzip file"),
  (b"BZh", "a bzip2 file"),
  (b"\xfd7zXZ", "an xz file"),
  (b"\x28\xb5\x2f\xfd", "a zstd file"),
)

# The brand of an ISO media file, which pictures and films share.
_BRANDS = (
  ((b"avif", b"avis"), "an AVIF file"),
  ((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "a HEIC file"),
  ((b"mif1", b"msf1"), "a HEIF file"),
  ((b"crx ",), "a camera's raw file"),
)


def form_of(head: bytes) -> str:
  """Returns Pillow's name of the format of a file.

  Args:
    head: its first bytes, 512 where there are as many.

  Raises:
    ImageError: none that is read; it says what the file is, where that shows.
  """
  for magic, form in _MAGIC:
    if head.startswith(magic):
      return form
  if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
    return "WEBP"
  if not head:
    raise ImageError("empty file")
  what = what_else(head)
  what = f"{what}; " if what else ""
  raise ImageError(f"{what}not a {READABLE}")


def what_else(head: bytes) -> str:
  """Returns what a file is that is no picture read here, "" if unknown.

  Args:
    head: its first bytes, 512 where there are as many.
  """
  for magic, what in _OTHERS:
    if head.startswith(magic):
      return what
  if head[128:132] == b"DICM":
    return "a DICOM file"
  if head[344:347] in (b"n+1", b"ni1"):
    return "a NIfTI file"
  if head[4:8] == b"ftyp":
    # An AVIF may call itself mif1 first and say what it is after that.
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, 64, 4))}
    for known, what in _BRANDS:
      if brands.intersection(known):
        return what
    return "a film"
  if re.match(rb"P[1-7]\s", head):
    return "a PNM file"
  text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
  if re.match(rb"<!doctype html|<(html|head|body|script)\b", text):
    return "an HTML page (saved in place of the image?)"
  if text.startswith(b"<svg") or (b"<svg" in text and text[:1] == b"<"):
    return "an SVG file"
  if re.match(rb"<(\?xml|[a-z]+[\s>])", text):
    return "an XML file"
  if re.match(rb"[{\[]\s*[\"{\[\]}\d]", text):
    return "a JSON file"
  if not head.strip(b"\0"):
    return "nothing but zero bytes where it begins (a broken copy?)"
  if not re.search(rb"[^\t\n\r\x20-\x7e]", head):
    return "a text file"
  return ""


# --- the formats -------------------------------------------------------------


def png(file: BinaryIO, max_pixels: int) -> Pixels:
  """Returns the pixels of a PNG; of an animated one, the picture it stands for.

  Args:
    file: from its beginning.
    max_pixels: as `images.decode` takes it.

  Raises:
    ImageError: it cannot be used.
  """
  data = file.read()
  if data[12:16] != b"IHDR" or len(data) < 33:
    raise ImageError("damaged image: a PNG without its header")
  width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
  check_size(width, height, max_pixels)
  if depth == 16 and colour == 4:
    raise ImageError(f"16-bit grey with alpha: {RANGE_FIRST}")
  chunks, exif, xmp = [data[:8]], b"", b""
  at = 8
  while at < len(data):
    length = int.from_bytes(data[at : at + 4], "big")
    kind, end = data[at + 4 : at + 8], at + 12 + length
    body = data[at + 8 : end - 4]
    # A lower letter: what a decoder may leave out. One of them is pixels too.
    if kind[:1].isupper() or kind == b"tRNS":
      chunks.append(data[at:end])
    elif kind == b"eXIf":
      exif = body
    elif kind in (b"tEXt", b"zTXt", b"iTXt"):
      key, _, text = body.partition(b"\0")
      if key == b"XML:com.adobe.xmp":
        xmp = _text(kind, text)
      elif key.startswith(b"Raw profile type ") and not exif:
        exif = _raw_profile(_text(kind, text))
    if kind == b"IEND":
      break
    at = end
  turned = tags.orientation(exif.removeprefix(b"Exif\0\0"), xmp)
  return Pixels("PNG", b"".join(chunks), turned)


def _text(kind: bytes, body: bytes) -> bytes:
  """Returns the text of a PNG's chunk, as far as it can be unpacked."""
  if kind == b"tEXt":
    return body
  packed = kind == b"zTXt"
  if packed:
    body = body[1:]
  elif kind == b"iTXt":
    packed = body[:1] == b"\1"
    body = body[2:].split(b"\0", 2)[-1]
  if not packed:
    return body
  try:
    return zlib.decompressobj().decompress(body, _MOST_TEXT)
  except zlib.error:
    return b""


def _raw_profile(text: bytes) -> bytes:
  """Returns what ImageMagick writes as hexadecimal digits in a text."""
  try:
    return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("latin-1"))
  except ValueError:
    return b""


_WITHOUT_BODY = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_UNREAD_FRAMES = {
  **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "a hierarchical JPEG"),
  0xF7: "a JPEG-LS file",
}


def jpeg(file: BinaryIO, max_pixels: int) -> Pixels:
  """Returns the pixels of a JPEG; of one that holds several, the first.

  Args:
    file: from its beginning.
    max_pixels: as `images.decode` takes it.

  Raises:
    ImageError: it cannot be used.
  """
  data = file.read()
  segments, exif, xmp = [data[:2]], b"", b""
  at, size = 2, None
  while 0 <= (at := data.find(b"\xff", at)) < len(data) - 3:
    marker = data[at + 1]
    if marker == 0xFF:
      at += 1
      continue
    if marker in (0xD9, 0xDA):
      segments.append(data[at:])
      break
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    if marker in _WITHOUT_BODY or length < 2:
      at += 2
      continue
    body = data[at + 4 : at + 2 + length]
    if marker == 0xE1 and body.startswith(b"Exif\0"):
      exif += body[6:]
    elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/"):
      xmp = body
    elif marker == 0xE0 and body.startswith(b"JFIF\0"):
      # Both say which colours these are; no other word of theirs is needed.
      segments.append(
        b"\xff\xe0\0\x10JFIF\0\x01\x01\0" + struct.pack(">HHBB", 1, 1, 0, 0)
      )
    elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
      segments.append(b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + body[11:12])
    elif not 0xE0 <= marker <= 0xEF and marker != 0xFE:
      segments.append(data[at : at + 2 + length])
    if marker in _FRAMES and len(body) >= 6:
      size = _check_frame(marker, body, max_pixels)
    at += 2 + length
  if size is None:
    raise ImageError("damaged image: a JPEG without its header")
  return Pixels("JPEG", b"".join(segments), tags.orientation(exif, xmp))


def _check_frame(marker: int, body: bytes, max_pixels: int) -> tuple[int, int]:
  bits, height, width, channels = struct.unpack(">BHHB", body[:6])
  if marker in _UNREAD_FRAMES:
    raise ImageError(f"{_UNREAD_FRAMES[marker]}; not a {READABLE}")
  if bits != 8:
    raise ImageError(f"a {bits}-bit JPEG: {RANGE_FIRST}")
  if channels not in (1, 3, 4):
    raise ImageError(f"a JPEG of {channels} channels: {RGB_FIRST}")
  check_size(width, height, max_pixels)
  return width, height


def webp(file: BinaryIO, max_pixels: int) -> Pixels:
  """Returns the pixels of a WebP; of an animated one, the first frame is used.

  Args:
    file: from its beginning.
    max_pixels: as `images.decode` takes it.

  Raises:
    ImageError: it cannot be used.
  """
  data = file.read()
  chunks, exif, xmp, size = [], b"", b"", None
  at = 12
  while at + 8 <= len(data):
    kind = data[at : at + 4]
    length = int.from_bytes(data[at + 4 : at + 8], "little")
    end = at + 8 + length + length % 2
    chunk = data[at:end]
    body = chunk[8 : 8 + length]
    if kind == b"EXIF":
      exif = body.removeprefix(b"Exif\0\0")
    elif kind == b"XMP ":
      xmp = body
    elif kind == b"VP8X" and len(body) >= 10:
      # The profile, EXIF and XMP that it announces are gone.
      body = bytes([body[0] & ~0x2C]) + body[1:]
      chunks.append(chunk[:8] + body)
    elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
      chunks.append(chunk)
    size = size or _webp_size(kind, body)
    at = end
  if size is None:
    raise ImageError("damaged image: a WebP without its header")
  check_size(*size, max_pixels)
  whole = b"WEBP" + b"".join(chunks)
  riff = b"RIFF" + struct.pack("<I", len(whole)) + whole
  return Pixels("WEBP", riff, tags.orientation(exif, xmp))


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int] | None:
  if kind == b"VP8X" and len(body) >= 10:
    width, height = (
      int.from_bytes(side, "little") + 1 for side in (body[4:7], body[7:10])
    )
    return width, height
  if kind == b"VP8 " and len(body) >= 10:
    width, height = struct.unpack("<HH", body[6:10])
    return width & 0x3FFF, height & 0x3FFF
  if kind == b"VP8L" and len(body) >= 5:
    bits = int.from_bytes(body[1:5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
  return None


def bmp(file: BinaryIO, max_pixels: int) -> Pixels:
  """Returns a BMP, which says nothing beside its pixels.

  Args:
    file: from its beginning.
    max_pixels: as `images.decode` takes it.

  Raises:
    ImageError: it cannot be used.
  """
  data = file.read()
  if len(data) < 26:
    raise ImageError("damaged image: a BMP without its header")
  kind = "<HH" if data[14:18] == b"\x0c\0\0\0" else "<ii"
  width, height = struct.unpack_from(kind, data, 18)
  check_size(width, abs(height), max_pixels)
  return Pixels("BMP", data)
