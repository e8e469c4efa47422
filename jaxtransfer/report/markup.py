"""What a page is made of: HTML that is safe by construction, and sections."""

import dataclasses
import html
from collections.abc import Sequence

from matplotlib.figure import Figure

_VOID = frozenset({"meta", "br", "col", "hr", "img", "input"})


class Html(str):
  """Text that is HTML already; every other string is escaped by `tag`."""


def tag(
  name: str, /, *children: str | None, **attributes: str | int | None
) -> Html:
  """Returns one HTML element.

  Args:
    name: the element's name.
    *children: its content in order. `Html` is taken as it is, any other string
      is escaped, None is left out.
    **attributes: its attributes; a trailing underscore is dropped and an inner
      one becomes a hyphen (`class_`, `aria_label`). None is left out.

  Returns:
    The element, balanced and escaped.
  """
  opening = name + "".join(
    f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  if name in _VOID:
    return Html(f"<{opening}>")
  return Html(f"<{opening}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
  """Returns the children one after the other, escaped where they are text."""
  return Html(
    "".join(
      child if isinstance(child, Html) else html.escape(child)
      for child in children
      if child is not None
    )
  )


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure with its words.

  Attributes:
    name: the file name under `figures/`, without an ending; also the prefix of
      the ids in the page.
    figure: the drawing.
    title: one line; what a reader who cannot see it is told.
    caption: what to see in it and how to read its marks.
  """

  name: str
  figure: Figure
  title: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading and what stands under it, in order; None is left out."""

  heading: str
  blocks: Sequence[Html | Picture | None]

  def __post_init__(self):
    object.__setattr__(self, "blocks", [b for b in self.blocks if b])


@dataclasses.dataclass(frozen=True)
class Content:
  """What one job puts on its page between the sentence and the settings.

  A section with nothing in it is left out.
  """

  title: str
  sections: Sequence[Section]

  def __post_init__(self):
    object.__setattr__(self, "sections", [s for s in self.sections if s.blocks])
