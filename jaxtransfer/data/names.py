"""Names that people typed: how many are shown, and which look alike."""

import collections
import re
import unicodedata
from collections.abc import Iterable, Sequence

# What is typed in one way or another, and what is put in its place.
_SUBSTITUTES = (
  (re.compile(r"\s+(?=[\W_])|(?<=[\W_])\s+"), ""),
  # 1-1 is 1_1, and not 11.
  (re.compile(r"(?<=\d)(?:\s+|[_-]+)(?=\d)"), " "),
  (re.compile(r"(?<=[^\W\d_])(?:\s+|[_-]+)(?=[^\W_])"), ""),
  (re.compile(r"(?<=\d)(?:\s+|[_-]+)(?=[^\W\d_])"), ""),
  # Spreadsheets make 7 of 007, and 7.0 where another cell is empty.
  (re.compile(r"^([+-]?\d+)\.0+$"), r"\1"),
  (re.compile(r"(?<![\d.,])0+(?=\d)"), ""),
)


def shown(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
  """Returns the first few names, as "a, b, c and 12 more".

  Args:
    names: what to show.
    most: how many at most.
    between: what separates them.
  """
  text = between.join(names[:most])
  return text + (f" and {len(names) - most:,} more" if names[most:] else "")


def counted(values: Iterable[str], most: int = 8) -> str:
  """Returns values with how often each is there, the most frequent first.

  Args:
    values: one for each image.
    most: how many are shown at most.
  """
  counts = collections.Counter(values).most_common()
  return shown([f"{value or 'none'} ({n:,})" for value, n in counts], most)


def alike(what: str, values: Iterable[str]) -> list[str]:
  """Returns a note where different names may mean the same.

  They are alike where nothing tells them apart but capitals, blanks, hyphens
  and underscores, characters that nobody sees, the Unicode form, or leading
  zeros.

  Args:
    what: they name, in the plural.
    values: a name for each image; "" where none is given.

  Returns:
    One line, or none.
  """
  counts = collections.Counter(values)
  del counts[""]
  by_look: dict[str, list[str]] = {}
  for name in counts:
    by_look.setdefault(_look(name), []).append(name)
  clusters = [
    shown([f"{_visible(name)} ({counts[name]:,} images)" for name in names])
    for names in by_look.values()
    if len(names) > 1
  ]
  if not clusters:
    return []
  return [
    f"{what} that differ only in capitals, blanks, hyphens, leading zeros or"
    f" Unicode form are kept apart: {shown(clusters, between='; ')}. Where they"
    " mean the same, write them the same."
  ]


def _look(name: str) -> str:
  """Returns what names that look alike have in common."""
  if not name.isascii():
    name = unicodedata.normalize("NFKC", name).casefold()
    name = unicodedata.normalize("NFKC", name)
    name = "".join(c for c in name if unicodedata.category(c) != "Cf")
  name = name.casefold().strip()
  for typed, substitute in _SUBSTITUTES:
    name = typed.sub(substitute, name)
  return name


def _visible(name: str) -> str:
  """Returns a name in quotes, escaped where it would look like another."""
  composed = unicodedata.normalize("NFC", name) == name
  return repr(name) if composed and name.isprintable() else ascii(name)
