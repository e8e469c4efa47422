"""Really broken files, and what a good one becomes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxtransfer.data import images


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


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied_once(form):
  """A reader that applies it too would turn the image back or too far.

  The left half is dark; turned by 90 degrees clockwise (orientation 6), the
  upper half is.
  """
  array = np.zeros((20, 40, 3), np.uint8)
  array[:, 20:] = 200
  exif = Image.Exif()
  exif[0x0112] = 6
  decoded = images.decode(_saved(array, form, exif=exif))
  assert decoded.shape == (40, 20, 3)
  assert decoded[:15].max() < 20 and decoded[25:].min() > 180


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
  def chunk(name, body):
    check = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + check

  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", data)
    + chunk(b"IEND", b"")
  )


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


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP"])
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


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_hostile_bytes_never_raise_anything_else():
  """Readers run into many error types; a run survives ImageError alone."""
  rng = np.random.default_rng(0)
  for form in ("PNG", "JPEG", "TIFF", "BMP"):
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
