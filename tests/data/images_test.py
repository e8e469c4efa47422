"""Really broken files, and what a good one becomes."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jaxtransfer.data import images, sources


def _photo(height=40, width=60, seed=0):
  """Smooth enough that JPEG keeps it to a few grey levels."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
  return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def _saved(array, form, mode=None, **options):
  buffer = io.BytesIO()
  image = array if isinstance(array, Image.Image) else Image.fromarray(array)
  if mode:
    image = image.convert(mode)
  image.save(buffer, form, **options)
  return buffer.getvalue()


@pytest.mark.parametrize(
  "form, options",
  [
    ("PNG", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("WEBP", {"lossless": True}),
  ],
)
def test_lossless_formats_give_the_pixels_back(form, options, tmp_path):
  """From bytes as from a path, since they are the same bytes."""
  data = _saved(_photo(), form, **options)
  path = tmp_path / "image"
  path.write_bytes(data)
  np.testing.assert_array_equal(images.decode(data), _photo())
  np.testing.assert_array_equal(images.decode(path), _photo())
  assert images.decode(path).flags.c_contiguous


def test_jpeg_is_near_and_the_same_every_time():
  data = _saved(_photo(), "JPEG", quality=95)
  decoded = images.decode(data)
  assert np.abs(decoded.astype(int) - _photo()).mean() < 4
  np.testing.assert_array_equal(decoded, images.decode(data))


def test_grey_bilevel_and_palette_become_rgb():
  """All three hold these colours exactly, so that equality is the measure."""
  grey = np.where(_photo()[..., 0] > 127, 255, 0).astype(np.uint8)
  expected = np.repeat(grey[..., None], 3, axis=2)
  for mode in ("L", "1", "P"):
    decoded = images.decode(_saved(grey, "PNG", mode))
    np.testing.assert_array_equal(decoded, expected)


def test_transparency_is_composited_on_white():
  """Half of black on white is the middle grey; none of it is white."""
  rgba = np.zeros((2, 3, 4), np.uint8)
  rgba[:, 0, 3], rgba[:, 1, 3] = 255, 128
  decoded = images.decode(_saved(rgba, "PNG"))
  np.testing.assert_array_equal(decoded[0], [[0] * 3, [127] * 3, [255] * 3])
  palette = Image.fromarray(np.array([[0, 1]], np.uint8))
  palette.putpalette([10, 20, 30, 40, 50, 60])
  decoded = images.decode(_saved(palette, "PNG", transparency=1))
  np.testing.assert_array_equal(decoded, [[[10, 20, 30], [255, 255, 255]]])


def _orientation(*before, tail=b"", kind=3):
  """Returns EXIF that says orientation 6 after other entries."""
  entries = [*before, (274, kind, 1, struct.pack("<I", 6))]
  block = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
  for tag, number, count, value in entries:
    block += struct.pack("<HHI", tag, number, count) + value
  return b"Exif\0\0" + block + b"\0" * 4 + tail


NOWHERE = struct.pack("<I", 10**8)
NEXT = struct.pack("<I", 38)
EXIF = {
  "plain": _orientation(),
  "long": _orientation(kind=4),
  "denominator 0": _orientation(
    (282, 5, 1, NEXT), tail=struct.pack("<II", 72, 0)
  ),
  "text beyond the end": _orientation((270, 2, 10**8, NOWHERE)),
  "maker note nowhere": _orientation((37500, 7, 2**31, NOWHERE)),
  "directory nowhere": _orientation((34665, 4, 1, NOWHERE)),
  "directory in itself": _orientation((34665, 4, 1, struct.pack("<I", 8))),
  "directory of noise": _orientation((34665, 4, 1, NEXT), tail=b"\xff" * 99),
  "no such type": _orientation((271, 99, 4, b"what")),
  "cut short": _orientation()[: 6 + 22],
}


@pytest.mark.parametrize(
  ("form", "exif"),
  [("TIFF", "plain"), *itertools.product(("JPEG", "PNG", "WEBP"), EXIF)],
)
def test_orientation_is_applied_once_whatever_else_is_said(form, exif):
  """A reader that applies it too would turn the image back or too far, and one
  that reads all the rest would stumble.

  The left half is dark; turned by 90 degrees clockwise (orientation 6), the
  upper half is.
  """
  array = np.zeros((20, 40, 3), np.uint8)
  array[:, 20:] = 200
  # tiff_test.py writes a TIFF's other tags; Pillow writes these into it.
  options = {"exif": EXIF[exif]}
  decoded = images.decode(_saved(array, form, **options))
  assert decoded.shape == (40, 20, 3)
  assert decoded[:15].max() < 20 and decoded[25:].min() > 180


@pytest.mark.parametrize(
  ("form", "options"),
  [
    ("JPEG", {"xmp": b'<rdf tiff:Orientation="6"/>'}),
    ("WEBP", {"xmp": b"<tiff:Orientation>6</tiff:Orientation>"}),
    ("PNG", {"pnginfo": ("XML:com.adobe.xmp", "<r tiff:Orientation='6'/>")}),
    (
      "PNG",
      {
        "pnginfo": (
          "Raw profile type exif",
          f"\nexif\n 32\n{_orientation().hex()[12:]}\n",
        )
      },
    ),
  ],
)
def test_orientation_is_found_where_programs_put_it(form, options):
  if "pnginfo" in options:
    text = PngImagePlugin.PngInfo()
    text.add_itxt(*options["pnginfo"], zip=True)
    options = {"pnginfo": text}
  assert images.decode(_saved(_photo(), form, **options)).shape == (60, 40, 3)


def _chunk(name, body):
  check = struct.pack(">I", zlib.crc32(name + body))
  return struct.pack(">I", len(body)) + name + body + check


def _riff(name, body):
  return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


HUGE = zlib.compress(b"x" * 70_000_000, 1)


@pytest.mark.parametrize(
  "chunk",
  [
    _chunk(b"zTXt", b"a\0\0" + HUGE),
    _chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE),
    _chunk(b"iCCP", b"a\0\0" + HUGE),
    _chunk(b"tEXt", b"a" * 2_000_000),
    _chunk(b"zTXt", b"Raw profile type exif\0\0no zlib"),
    _chunk(b"tEXt", b"Raw profile type exif\0\n\n\nno digits"),
    _chunk(b"iTXt", b"XML:com.adobe.xmp\0"),
    _chunk(b"iCCP", b"x"),
    _chunk(b"eXIf", b"II"),
    _chunk(b"tEXt", b"a\0b")[:-1] + b"!",
    *(_chunk(n, b"") for n in (b"pHYs", b"cHRM", b"gAMA", b"sRGB", b"acTL")),
  ],
  ids=lambda chunk: chunk[4:8].decode(),
)
def test_whatever_a_png_says_beside_its_pixels_costs_none(chunk):
  """Bombs of text and profiles, broken ones, and a wrong checksum of a word."""
  data = _saved(_photo(), "PNG")
  data = data[:33] + chunk + data[33:]
  np.testing.assert_array_equal(images.decode(data), _photo())


@pytest.mark.parametrize(
  "segment",
  [
    (0xE0, b"JFIF\0"),
    (0xE0, b"JFXX\0\x10broken"),
    (0xE1, b"Exif\0\0"),
    (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    (0xE2, b"ICC_PROFILE\0"),
    (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff"),
    (0xFE, b"\xff" * 60_000),
  ],
)
def test_whatever_a_jpeg_says_beside_its_pixels_costs_none(segment):
  marker, body = segment
  data = _saved(_photo(), "JPEG", quality=95)
  said = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
  found = images.decode(data[:2] + said + data[2:])
  np.testing.assert_array_equal(found, images.decode(data))


def test_the_colours_of_a_jpeg_are_those_its_markers_name():
  """Adobe's marker says that they are RGB; without it they would be YCbCr."""
  data = _saved(_photo(), "JPEG", quality=95, keep_rgb=True, subsampling=0)
  assert b"Adobe" in data
  assert np.abs(images.decode(data).astype(int) - _photo()).mean() < 4


@pytest.mark.parametrize(
  "chunk", [_riff(b"EXIF", b"I"), _riff(b"XMP ", b"<x"), b"EXIF\xff\xff\xff\0a"]
)
def test_whatever_a_webp_says_beside_its_pixels_costs_none(chunk):
  """The last one ends before its length: what is cut off is no pixel."""
  data = _saved(_photo(), "WEBP", lossless=True, icc_profile=b"no profile")
  assert data[12:16] == b"VP8X" and b"ICCP" in data
  data = data[:20] + b"\x2c" + data[21:] + chunk
  data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
  np.testing.assert_array_equal(images.decode(data), _photo())


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_used(form):
  frames = [Image.fromarray(_photo(seed=seed)) for seed in range(3)]
  options = {"lossless": True} if form == "WEBP" else {}
  data = _saved(
    frames[0], form, save_all=True, append_images=frames[1:], **options
  )
  np.testing.assert_array_equal(images.decode(data), _photo(seed=0))


def test_of_several_jpegs_in_one_file_the_first_is_used():
  """A camera with two lenses writes them one after the other (MPO)."""
  first, second = (_saved(_photo(seed=seed), "JPEG") for seed in (0, 1))
  index = b"MPF\0II*\0\x08\0\0\0\0\0"
  said = b"\xff\xe2" + struct.pack(">H", len(index) + 2) + index
  found = images.decode(first[:2] + said + first[2:] + second)
  np.testing.assert_array_equal(found, images.decode(first))


def test_what_has_no_one_meaning_in_8_bit_rgb_is_refused_by_name():
  with pytest.raises(images.ImageError, match=r"16-bit .*I;16"):
    images.decode(_saved(np.full((4, 4), 900, np.uint16), "PNG"))
  with pytest.raises(images.ImageError, match="a float TIFF"):
    images.decode(_saved(np.ones((4, 4), np.float32), "TIFF"))
  for mode in ("CMYK", "LAB"):
    with pytest.raises(images.ImageError, match=f"{mode} colours"):
      images.decode(_saved(_photo(), "TIFF", mode))
  with pytest.raises(images.ImageError, match="fully transparent"):
    images.decode(_saved(np.zeros((4, 4, 4), np.uint8), "PNG"))


def test_16_bit_colour_keeps_its_high_byte():
  """PNG defines 16-bit samples over their full range, so this is exact."""
  samples = np.arange(2 * 3 * 3, dtype=np.uint16).reshape(2, 3, 3) * 3600 + 77
  raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
  decoded = images.decode(_png(3, 2, 16, 2, zlib.compress(raw)))
  np.testing.assert_array_equal(decoded, samples >> 8)


def _png(width, height, depth, colour, data):
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", header)
    + _chunk(b"IDAT", data)
    + _chunk(b"IEND", b"")
  )


def test_16_bit_grey_with_alpha_is_refused_as_16_bit_grey_is():
  """Pillow would keep its high byte, which a range may not reach."""
  data = _png(1, 1, 16, 4, zlib.compress(b"\0" * 5))
  with pytest.raises(images.ImageError, match="16-bit grey with alpha"):
    images.decode(data)


def test_a_bomb_is_refused_from_its_header():
  """400 megapixels in 50 kB: a whole and valid file. Decoded it is 1.2 GB."""
  pack = zlib.compressobj(9)
  row = b"\0" * 2501
  data = b"".join(pack.compress(row * 100) for _ in range(200)) + pack.flush()
  bomb = _png(20_000, 20_000, 1, 0, data)
  assert len(bomb) < 100_000
  with pytest.raises(images.ImageError, match="too large.*400000000"):
    images.decode(bomb)


def test_the_limit_on_pixels_is_the_caller_s():
  data = _saved(_photo(40, 60), "PNG")
  images.decode(data, max_pixels=2400)
  with pytest.raises(images.ImageError, match="60 x 40 pixels.*2399"):
    images.decode(data, max_pixels=2399)


def test_pillow_s_own_limit_does_not_count(monkeypatch):
  """It refuses at twice this number, whatever the user allows. The header of
  each format is held against ours alone, before anything is decoded."""
  for form in images.FORMATS:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = _saved(_photo(40, 60), form)
    assert images.decode(data, max_pixels=2400).shape == (40, 60, 3)
    with pytest.raises(images.ImageError, match="60 x 40 pixels.*2399"):
      images.decode(data, max_pixels=2399)


@pytest.mark.parametrize("form", images.FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_truncated_file_is_refused_however_much_there_is(form, share):
  """What a reader fills the missing rows with is not the patient's."""
  data = _saved(_photo(200, 300), form)
  with pytest.raises(images.ImageError, match="damaged|not a PNG"):
    images.decode(data[: int(len(data) * share)])


def test_a_flipped_bit_in_a_png_is_refused():
  data = bytearray(_saved(_photo(), "PNG"))
  data[len(data) // 2] ^= 4
  with pytest.raises(images.ImageError, match="damaged"):
    images.decode(bytes(data))


def test_files_that_are_no_images_say_so(tmp_path):
  text, empty = tmp_path / "text.png", tmp_path / "empty.jpg"
  text.write_text("path,label\n")
  empty.write_bytes(b"")
  for path, reason in [
    (text, "a text file; not a PNG, JPEG, TIFF, BMP or WebP image"),
    (empty, "empty file"),
    (tmp_path / "missing.png", "no such file"),
    (tmp_path, "a folder, not a file"),
  ]:
    with pytest.raises(images.ImageError, match=reason):
      images.decode(path)
  with pytest.raises(images.ImageError, match="empty file"):
    images.decode(b"")
  with pytest.raises(images.ImageError, match="a GIF file; not a PNG"):
    images.decode(_saved(_photo(), "GIF"))


@pytest.mark.parametrize(
  ("head", "name"),
  [
    (b"\0" * 128 + b"DICM\2\0", "a DICOM file"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
    (b"\n<!DOCTYPE HTML><html>", "an HTML page"),
    (b"\xef\xbb\xbf<html lang='en'>", "an HTML page"),
    (b"<?xml version='1.0'?><Error>", "an XML file"),
    (b'<?xml version="1.0"?><svg xmlns="', "an SVG file"),
    (b'{"message": "Not Found"}', "a JSON file"),
    (b"404: Not Found", "a text file"),
    (b"%PDF-1.7\n\xff", "a PDF file"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC file"),
    (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "an AVIF file"),
    (b"\0\0\0\x1cftypisom\0\0\0\0isomavc1", "a film"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 file"),
    (b"\xff\x0a\x7f", "a JPEG XL file"),
    (b"8BPS\0\1", "a Photoshop file"),
    (b"PK\3\4\x14", "a ZIP archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY\1", "a NumPy file"),
    (b"\0" * 344 + b"n+1\0", "a NIfTI file"),
    (b"ZISRAWFILE\0", "a Zeiss CZI slide"),
    (b"\0\5\x16\7\0\2", "macOS keeps attributes"),
    (b"P6\n3 2\n255\n\xff", "a PNM file"),
    (b"\0" * 600, "nothing but zero bytes"),
  ],
)
def test_other_files_are_named_for_what_they_are(head, name):
  with pytest.raises(images.ImageError, match=f"{name}.*; not a PNG"):
    images.decode(head)


@pytest.mark.parametrize(
  ("at", "value", "name"),
  [(4, 12, "a 12-bit JPEG"), (9, 2, "a JPEG of 2 channels")],
)
def test_jpegs_of_another_kind_are_named(at, value, name):
  data = bytearray(_saved(_photo(), "JPEG"))
  data[data.index(b"\xff\xc0") + at] = value
  with pytest.raises(images.ImageError, match=name):
    images.decode(bytes(data))
  data[data.index(b"\xff\xc0") + 1] = 0xF7
  with pytest.raises(images.ImageError, match="a JPEG-LS file"):
    images.decode(bytes(data))


@pytest.mark.parametrize(
  ("name", "shape"),
  [("exif_rational.jpg", (60, 30, 3)), ("png_00.png", (48, 48, 3))],
)
def test_files_that_people_have(shared, name, shape):
  path = shared / "cases" / "images" / name
  assert images.decode(path).shape == shape


def test_planes_that_people_have(shared):
  raw, deflated = (
    images.decode(shared / "cases" / "images" / f"planar_{kind}.tif")
    for kind in ("raw", "deflate")
  )
  np.testing.assert_array_equal(raw, deflated)
  with pytest.raises(images.ImageError, match="a float TIFF"):
    images.decode(shared / "cases" / "images" / "float32_rgb.tif")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_hostile_bytes_never_raise_anything_else():
  """Readers run into many error types; a run survives ImageError alone."""
  rng = np.random.default_rng(0)
  for form in images.FORMATS:
    data = _saved(_photo(), form)
    for _ in range(60):
      broken = bytearray(data)
      for position in rng.integers(0, min(len(data), 400), 4):
        broken[position] = rng.integers(256)
      try:
        assert images.decode(bytes(broken), max_pixels=10**6).dtype == np.uint8
      except images.ImageError as e:
        assert "\n" not in str(e) and str(e)


def test_fit_keeps_what_fits_and_grows_one_pixel():
  array = _photo(32, 32)
  assert images.fit(array, 32) is array
  one = np.array([[[1, 2, 3]]], np.uint8)
  np.testing.assert_array_equal(
    images.fit(one, 8), np.broadcast_to(one, (8, 8, 3))
  )


def test_fit_scales_the_shorter_side_and_crops_the_centre():
  """The centre square of a wide image, resized by itself, is the same.

  It differs only where the kernel reaches over the crop's edge.
  """
  array = _photo(64, 128)
  whole = images.fit(array, 32)
  square = np.asarray(
    Image.fromarray(array[:, 32:96]).resize((32, 32), Image.Resampling.BILINEAR)
  )
  assert whole.shape == (32, 32, 3)
  np.testing.assert_array_equal(whole[:, 2:-2], square[:, 2:-2])


def test_fit_is_antialiased():
  """Alternating columns average to their mean instead of picking one."""
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 200
  inner = images.fit(stripes, 8)[:, 1:-1]
  assert np.abs(inner.astype(int) - 100).max() <= 2


def test_a_thin_strip_costs_no_gigabytes():
  """Its short side is one pixel: scaled whole, it would be 22 GB."""
  for shape in ((1, 100_000, 3), (100_000, 1, 3)):
    assert images.fit(np.full(shape, 7, np.uint8), 224).shape == (224, 224, 3)


def test_every_format_that_is_read_is_looked_for_in_folders():
  assert {f".{form.lower()}" for form in images.FORMATS} <= sources.SUFFIXES


def test_the_card_says_what_fit_does():
  """Another program that follows it gets the same pixels."""
  card = images.resize_card(32)
  filters = {"bilinear": Image.Resampling.BILINEAR}  # of Pillow: antialiased
  assert card["antialias"] and card["crop"] == "centre"
  whole = Image.fromarray(_photo(64, 128)).resize(
    (64, card["shorter_side"]), filters[card["interpolation"]]
  )
  cut = np.asarray(whole)[:, 16:48]
  np.testing.assert_array_equal(images.fit(_photo(64, 128), 32), cut)
