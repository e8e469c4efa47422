"""Small images inside a page, with their words."""

import base64
import dataclasses
import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxtransfer import files
from jaxtransfer.report import tables
from jaxtransfer.report.markup import Html, join, tag

SIDE = 96  # pixels
# Of all images of a page, as they stand in it.
MOST_BYTES = 2**20
_QUALITY = 85


@dataclasses.dataclass(frozen=True)
class Thumbnail:
  """One image.

  Attributes:
    pixels: (H, W, 3) uint8, of any size.
    label: what it is.
    name: which it is.
    words: what else is to be said of it, a line each.
  """

  pixels: np.ndarray
  label: str
  name: str
  words: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Images that have something in common.

  Attributes:
    title: what.
    caption: how they were chosen, and what their words mean.
    images: in order.
  """

  title: str
  caption: str
  images: Sequence[Thumbnail]


def blocks(galleries: Sequence[Gallery]) -> list[Html]:
  """Returns each gallery as a part of a page.

  Args:
    galleries: together they hold no more than `MOST_BYTES`; what is beyond is
      counted in the caption.
  """
  left, parts = MOST_BYTES, []
  for gallery in galleries:
    items: list[Html] = []
    for image in gallery.images:
      uri = data_uri(image.pixels, SIDE)
      left -= len(uri)
      if left < 0:
        break
      items.append(_item(image, uri))
    caption = gallery.caption
    if missing := len(gallery.images) - len(items):
      caption += (
        f" {missing:,} more would make the page too large and are left out."
      )
    parts.append(
      join(
        tag("h3", gallery.title),
        tag("p", caption, class_="caption"),
        tag("ul", *items, class_="gallery") if items else None,
      )
    )
  return parts


def _item(image: Thumbnail, uri: str) -> Html:
  label, name, *words = (
    tables.shorten(files.visible(text))
    for text in (image.label, image.name, *image.words)
  )
  return tag(
    "li",
    tag("img", src=uri, alt=f"Image: {label}", width=SIDE, height=SIDE),
    tag("b", _breakable(label)),
    *(tag("span", _breakable(line)) for line in words),
    tag("span", _breakable(name), class_="minor"),
  )


def _breakable(text: str) -> Html:
  """Returns a text whose lines end inside of words only where they must."""
  parts = re.split(r"(?<=[/_-])(?=\w)", text)
  return Html("<wbr>".join(map(join, parts)))


def data_uri(pixels: np.ndarray, longest: int, quality: int = _QUALITY) -> str:
  """Returns an image as a JPEG that stands in the page itself.

  Args:
    pixels: (H, W, 3) uint8; a smaller one stays as it is, for the page to
      enlarge.
    longest: pixels of its longer side, at most.
    quality: JPEG's, up to 95.
  """
  image = Image.fromarray(pixels)
  image.thumbnail((longest, longest), Image.Resampling.BOX)
  data = io.BytesIO()
  # Colours as fine as the rest, for stains.
  image.save(data, "JPEG", quality=quality, subsampling=0, optimize=True)
  text = base64.b64encode(data.getvalue()).decode("ascii")
  return f"data:image/jpeg;base64,{text}"
