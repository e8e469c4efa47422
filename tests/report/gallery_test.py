"""Images inside a page: small, safe, and no more than fit."""

import base64
import io
import re

import numpy as np
import PIL.Image

from jaxtransfer.report import gallery


def _gallery(count=1, shape=(8, 8, 3), label="a", name="1.png", words=()):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (count, *shape), np.uint8)
  thumbnails = [gallery.Thumbnail(p, label, name, words) for p in pixels]
  return gallery.Gallery("Title", "Caption.", thumbnails)


def _images(html):
  return [
    PIL.Image.open(io.BytesIO(base64.b64decode(data)))
    for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
  ]


def test_images_are_small_and_inside_the_page():
  """A large one becomes 96 pixels, a small one stays as it is; both are shown
  96 pixels wide, and nothing is fetched."""
  for shape, size in (((300, 300, 3), (96, 96)), ((32, 32, 3), (32, 32))):
    (html,) = gallery.blocks([_gallery(shape=shape)])
    (image,) = _images(html)
    assert image.size == size and image.format == "JPEG"
    assert 'width="96"' in html and "://" not in html


def test_colours_are_kept():
  """Within what JPEG loses; red and blue do not change places."""
  pixels = np.full((96, 96, 3), (200, 40, 90), np.uint8)
  thumbnail = gallery.Thumbnail(pixels, "a", "b")
  (html,) = gallery.blocks([gallery.Gallery("", "", [thumbnail])])
  found = np.asarray(_images(html)[0].convert("RGB"), int)
  assert np.abs(found - pixels).max() <= 4


def test_names_and_labels_are_only_text():
  hostile = '<script>alert("x")</script>'
  (html,) = gallery.blocks(
    [_gallery(label=hostile, name="\udcff\n'.png", words=[hostile + ": 0.9"])]
  )
  assert "<script" not in html
  assert html.count("&lt;script&gt;") == 3  # its alt text, label and words
  assert "\\udcff\\n" in html and 'alt="Image: &lt;script' in html
  assert gallery.blocks([]) == []


def test_a_page_holds_so_much_and_no_more():
  """Noise compresses worst: a hundred of each kind are cut short, and said."""
  whole = [_gallery(100, (96, 96, 3))] * 3
  html = "".join(gallery.blocks(whole))
  shown = len(_images(html))
  assert 40 < shown < 300
  assert len(html) < 1.1 * gallery.MOST_BYTES
  told = re.findall(r"([\d,]+) more would make the page too large", html)
  assert sum(map(int, told)) == 300 - shown
