"""TIFFs against the samples that were written, and the names of the rest."""

import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

from jaxtransfer.data import images, tiff
from tests.data import tiffs

HEIGHT, WIDTH = 21, 19  # no multiple of a tile, a strip or a byte of bits
ALPHA, ASSOCIATED, UNKNOWN = [2], [1], [0]


def _samples(bits=8, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 1 << bits, (HEIGHT, WIDTH, channels))


def _expected(samples, bits, photometric, extra, palette):
  """Returns the pixels from the definition, (H, W, 3) in 8 bits."""
  share = samples / ((1 << bits) - 1) * 255
  if bits == 16:
    share = samples >> 8
  if photometric == 0:
    share = 255 - share
  if photometric == 3:
    rgb = palette[samples[..., 0]]
  else:
    colours = 3 if photometric == 2 else 1
    rgb = np.broadcast_to(share[..., :colours], (*share.shape[:2], 3))
  if extra == ALPHA:
    alpha = share[..., -1:] / 255
    rgb = rgb * alpha + 255 * (1 - alpha)
  return rgb


@pytest.mark.parametrize(
  ("photometric", "channels", "extra", "depths"),
  [
    (0, 1, None, (1, 2, 4, 8)),
    (1, 1, None, (1, 2, 4, 8)),
    (1, 2, ALPHA, (8,)),
    (2, 3, None, (8, 16)),
    (2, 4, UNKNOWN, (8, 16)),
    (2, 4, ALPHA, (8, 16)),
    (3, 1, None, (1, 2, 4, 8)),
    (3, 2, ALPHA, (8,)),
  ],
)
def test_every_way_to_lay_out_the_samples_gives_the_same_pixels(
  photometric, channels, extra, depths
):
  """What was written is known, so it is the measure, and not another reader;
  Pillow alone mixes up the planes of uncompressed 16-bit colour."""
  palette = np.random.default_rng(1).integers(0, 256, (256, 3))
  ways = itertools.product(
    depths, (1, 2), (1, 8, 32773), "<>", (0, 16), (0, 5), (1, 2), (1, 2)
  )
  for way in ways:
    bits, planar, compression, endian, tile, rows, predictor, order = way
    if (
      (tile and rows)
      or (planar == 2 and photometric != 2)
      or (predictor == 2 and (compression != 8 or bits < 8))
      or (order == 2 and (bits == 16 or endian == ">"))
    ):
      continue
    samples = _samples(bits, channels)
    more = [(338, 3, extra)] if extra else []
    if photometric == 3:
      colours = palette[: 1 << bits].T.ravel() * 257
      more.append((320, 3, list(colours)))
    data = tiffs.write(
      samples,
      bits=bits,
      photometric=photometric,
      planar=planar,
      compression=compression,
      endian=endian,
      tile=tile,
      rows=rows,
      predictor=predictor,
      fill_order=order,
      big=bool(rows),
      more=more,
    )
    expected = _expected(samples, bits, photometric, extra, palette)
    found = images.decode(data)
    assert np.abs(found - expected).max() <= 1, way


def test_only_the_first_page_is_read_and_only_its_pixels(tmp_path):
  """A stack of pages, or one with megabytes behind it, costs one page."""
  first, second = _samples(seed=1).astype("u1"), _samples(seed=2).astype("u1")
  path = tmp_path / "stack.tif"
  Image.fromarray(first).save(
    path, save_all=True, append_images=[Image.fromarray(second)]
  )
  with open(path, "ab") as f:
    f.truncate(10**9)  # a hole, not bytes on the disk

  class Counted(io.FileIO):
    read_bytes = 0

    def read(self, count=-1):
      data = super().read(count)
      self.read_bytes += len(data)
      return data

  with Counted(path) as file:
    pixels = tiff.first_page(file, 10**6)
    assert file.read_bytes < 4 * first.size
  np.testing.assert_array_equal(images.decode(pixels.data), first)
  np.testing.assert_array_equal(images.decode(path), first)


RATIONAL_NOWHERE = struct.pack("<II", 1, 0)


@pytest.mark.parametrize(
  "tag",
  [
    (282, 5, RATIONAL_NOWHERE),
    (282, 2, b"seventy-two\0"),
    (282, 3, [72, 1]),
    (296, 2, b"inch\0"),
    (270, 2, b"x" * 2_000_000),
    (270, 99, b"x" * 40),
    (700, 1, b"\xff" * 40),
    (34665, 4, [10**8]),
    (34665, 4, [8]),
    (34853, 4, [9]),
    (34675, 7, b"no profile"),
    (301, 3, [1] * 7),
    (330, 4, [10**8]),
    (339, 3, [4, 4, 4]),
    (65000, 16, [2**63]),
  ],
)
def test_a_bad_tag_costs_no_image(tag):
  """And the orientation, which stands between them, is still applied."""
  samples = _samples()
  for orientation in (3, [6]), (4, [6]):
    data = tiffs.write(samples, more=[tag, (274, *orientation)])
    np.testing.assert_array_equal(images.decode(data), np.rot90(samples, -1))


def test_a_text_that_ends_beyond_the_file_costs_no_image():
  """Pillow stops reading tags there, and finds no pixels."""
  data = tiffs.write(_samples(), more=[(270, 2, b"Leica scanner")])
  text = struct.pack("<HHI", 270, 2, 13)
  assert data.count(text) == 1
  data = data.replace(text, struct.pack("<HHI", 270, 2, 2**31))
  np.testing.assert_array_equal(images.decode(data), _samples())


def test_parts_of_odd_length_may_touch_each_other():
  """Nothing asks for the blank byte that this writer puts between them; nor
  for their lengths, where each reaches as far as the next."""
  samples = _samples(channels=1)[:, :WIDTH]
  data = tiffs.write(samples, photometric=1)
  packed = samples.astype("u1").tobytes()
  assert len(packed) % 2 and data[8 : 8 + len(packed)] == packed
  places = [8 + WIDTH * row for row in range(HEIGHT)]
  for lengths in [WIDTH] * HEIGHT, []:
    more = [(273, 4, places), (278, 3, [1])]
    more += [(279, 4, lengths)] if lengths else [(279, 2, b"none\0")]
    data = tiffs.write(samples, photometric=1, more=more)
    np.testing.assert_array_equal(
      images.decode(data), np.repeat(samples, 3, axis=2)
    )


def test_tags_of_pixels_are_read_in_whatever_type_they_are_written():
  more = [(256, 4, [WIDTH]), (258, 4, [8, 8, 8]), (277, 1, [3])]
  more += [(279, 4, [7])]  # wrong, and not needed without compression
  data = tiffs.write(_samples(), more=more)
  np.testing.assert_array_equal(images.decode(data), _samples())


IMAGEJ = b"ImageJ=1.53t\nimages=3\nchannels=3\nhyperstack=true\n\0"
OME = b'<OME><Image><Pixels SizeC="4" SizeX="19"></Pixels></Image></OME>\0'


@pytest.mark.parametrize(
  ("says", "shape", "options"),
  [
    ("a float TIFF of 32 bits", 3, {"bits": 32, "more": [(339, 3, [3] * 3)]}),
    ("a float TIFF of 16 bits", 1, {"bits": 16, "more": [(339, 3, [3])]}),
    ("a complex TIFF", 1, {"bits": 64, "more": [(339, 3, [6])]}),
    ("a signed-integer TIFF", 1, {"bits": 16, "more": [(339, 3, [2])]}),
    ("of 32-bit integers", 1, {"bits": 32, "photometric": 1}),
    ("of 5 channels", 5, {"more": [(338, 3, [0, 0])]}),
    ("of 7 channels", 7, {"photometric": 1, "planar": 2}),
    ("of 5 channels", 5, {"photometric": 5}),
    ("of 3 grey channels", 3, {"photometric": 1}),
    ("of 2 grey channels", 2, {"photometric": 1, "more": [(338, 3, [0])]}),
    ("of 16-bit grey:", 1, {"bits": 16, "photometric": 1}),
    ("of 12-bit grey:", 1, {"bits": 12, "photometric": 1}),
    (
      "of 16-bit grey with alpha",
      2,
      {"bits": 16, "photometric": 1, "more": [(338, 3, [2])]},
    ),
    (
      "with alpha in a plane of its own",
      2,
      {"photometric": 1, "planar": 2, "more": [(338, 3, [2])]},
    ),
    ("of 12-bit colour", 3, {"bits": 12}),
    ("of 16-bit palette colours", 1, {"bits": 16, "photometric": 3}),
    ("CMYK colours", 4, {"photometric": 5}),
    ("LAB colours", 3, {"photometric": 8}),
    ("of a sensor's raw colours", 1, {"photometric": 32803}),
    ("JPEG 2000 compression", 3, {"compression": 34712}),
    ("JPEG XL compression", 3, {"compression": 50002}),
    ("unknown .4711. compression", 3, {"compression": 4711}),
    (
      "an Aperio SVS slide with JPEG 2000 .* cut it into tiles",
      3,
      {"compression": 33005, "more": [(270, 2, b"Aperio Image Library\0")]},
    ),
    (
      "an Aperio SVS slide, too large.* cut it into tiles",
      3,
      {
        "more": [
          (270, 2, b"Aperio Image"),
          (256, 4, [10**5]),
          (257, 4, [10**5]),
        ]
      },
    ),
    (
      "a Hamamatsu NDPI slide, too large",
      3,
      {"more": [(65420, 4, [1]), (256, 4, [10**5]), (257, 4, [10**5])]},
    ),
    ("thumbnail of another", 3, {"more": [(254, 4, [1]), (330, 4, [8])]}),
  ],
)
def test_valid_pages_without_one_meaning_are_named(says, shape, options):
  options = {"bits": 8, **options}
  written = min(options["bits"], 16)
  data = tiffs.write(
    np.zeros((HEIGHT, WIDTH, shape), int),
    **{**options, "bits": written},
  )
  if written != options["bits"]:
    bits = struct.pack("<H", written) * shape
    data = data.replace(bits, struct.pack("<H", options["bits"]) * shape)
  with pytest.raises(images.ImageError, match=says):
    images.decode(data)


@pytest.mark.parametrize("words", [IMAGEJ, OME])
def test_channels_that_lie_in_pages_of_their_own_are_named(words):
  """The first page is one channel of a fluorescence, grey for any reader. A
  single page under such words is a picture like any other."""
  samples = _samples(channels=1)
  one = tiffs.write(samples, photometric=1, more=[(270, 2, words)])
  assert images.decode(one).shape == (HEIGHT, WIDTH, 3)
  several = one[:-4] + struct.pack("<I", 8)
  with pytest.raises(images.ImageError, match="[34] channels, each a page"):
    images.decode(several)


@pytest.mark.parametrize(
  "options",
  [{}, {"planar": 2}, {"compression": 8}, {"compression": 8, "tile": 16}],
)
def test_missing_parts_are_refused(options):
  """Where they are said to be there is nothing, or not enough."""
  data = tiffs.write(_samples(), rows=0 if "tile" in options else 4, **options)
  tag = 324 if "tile" in options else 273
  found = data.rindex(struct.pack("<HH", tag, 4))
  count, place = struct.unpack_from("<II", data, found + 4)
  broken = bytearray(data)
  last = place + 4 * (count - 1)
  broken[last : last + 4] = struct.pack("<I", len(data) - 3)
  with pytest.raises(images.ImageError, match="damaged"):
    images.decode(bytes(broken))
  fewer = bytearray(data)
  fewer[found + 4 : found + 8] = struct.pack("<I", count - 1)
  with pytest.raises(images.ImageError, match="damaged"):
    images.decode(bytes(fewer))
