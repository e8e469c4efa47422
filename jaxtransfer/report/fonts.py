"""Which names a figure can show, and with which of this machine's fonts."""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Sequence

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

from jaxtransfer.report.markup import Html, join, tag

USUAL = "DejaVu Sans"

# Their letters are pictures in colour, or boxes for every letter there is.
_NO_LETTERS = re.compile(r"emoji|last ?resort|blank", re.IGNORECASE)
_SANS = re.compile(r"sans|gothic|hei\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Labels:
  """Names as a figure shows them.

  Attributes:
    words: N texts that can be drawn.
    families: the fonts to draw them with, the usual one first.
    numbered: whether the words are 1 to N, and the page must say of what.
  """

  words: list[str]
  families: list[str]
  numbered: bool


def labels(names: Sequence[str]) -> Labels:
  """Returns how names are drawn: as they are, or else all as numbers.

  Letters that the usual font lacks are taken from another font of this
  machine. Where none has them, and where letters change their order or shape
  beside others (Arabic, Hebrew, Devanagari, joined emoji), which matplotlib
  does not do, all names become numbers: one that is drawn could be a number.

  Args:
    names: N names, in the order of the figure.
  """
  # One letter instead of a letter and its accent: fonts have the former.
  words = [unicodedata.normalize("NFC", str(name)) for name in names]
  letters = frozenset("".join(words))
  families = None
  if not any(map(_needs_shaping, letters)):
    families = _families(letters)
  if families is None:
    numbers = [str(i) for i, _ in enumerate(names, start=1)]
    return Labels(numbers, [USUAL], True)
  return Labels(words, families, False)


def key(names: Sequence[str]) -> Html | None:
  """Returns the names of which a figure shows the numbers, None without any.

  Args:
    names: as `labels` takes them.
  """
  texts = labels(names)
  if not texts.numbered:
    return None
  return join(
    tag(
      "p",
      "The figure's fonts cannot show the names of the classes; its numbers"
      " are:",
      class_="caption",
    ),
    tag(
      "dl",
      *(
        join(tag("dt", number), tag("dd", tag("bdi", str(name))))
        for number, name in zip(texts.words, names, strict=True)
      ),
    ),
  )


def _needs_shaping(letter: str) -> bool:
  """Returns whether a letter depends on its neighbours, or is none."""
  category = unicodedata.category(letter)
  right_to_left = unicodedata.bidirectional(letter) in ("R", "AL", "AN")
  return right_to_left or category[0] == "M" or category in ("Cc", "Cf", "Cs")


@functools.lru_cache
def _families(letters: frozenset[str]) -> list[str] | None:
  """Returns fonts that have all letters between them, None without such."""
  missing = letters - _has(USUAL, letters)
  families = [USUAL]
  if missing:
    for name in _others():
      if font := _has(name, missing):
        families.append(name)
        missing -= font
      if not missing:
        break
  return None if missing else families


@functools.cache
def _others() -> list[str]:
  """Returns the upright fonts of usual weight, those without serifs first."""
  names = {
    entry.name
    for entry in font_manager.fontManager.ttflist
    if entry.style == "normal"
    and entry.weight in (400, "normal", "regular", "book")
    and not _NO_LETTERS.search(entry.name)
  }
  return sorted(names, key=lambda name: (not _SANS.search(name), name))


def _has(family: str, letters: frozenset[str]) -> frozenset[str]:
  """Returns those of the letters that a font has."""
  try:
    path = font_manager.findfont(
      FontProperties(family=family), fallback_to_default=False
    )
    font = font_manager.get_font(path)
  # A font of another kind, or one that is no longer where it was.
  except (RuntimeError, ValueError, OSError):
    return frozenset()
  return frozenset(x for x in letters if font.get_char_index(ord(x)))
