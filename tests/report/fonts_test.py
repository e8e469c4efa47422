"""Names in every script are read somewhere: in the figure or beside it."""

import unicodedata
import warnings

import pytest
from matplotlib import font_manager

from jaxtransfer import files
from jaxtransfer.report import finetune, fonts, page
from tests.report import example
from tests.report.figures_test import assert_legible

NOWHERE = "\U0010fffd"  # private to whoever uses it: no font has it


CLASSES = [
  ("肿瘤", "正常组织", "炎症"),
  ("腺癌", "염증", "がん"),
  ("ट्यूमर", "सामान्य"),
  ("มะเร็ง", "ปกติ"),
  ("ورم", "سليم"),
  ("גידול", "תקין"),
  ("👍🏽", "👎🏽"),
  ("опухоль", "ade\u0301nome"),
  ("tab\there", "line\nhere"),
  (f"{NOWHERE} 1", f"{NOWHERE} 2"),
]


@pytest.mark.parametrize("classes", CLASSES)
def test_every_name_is_drawn_or_stands_beside_its_number(classes, tmp_path):
  """matplotlib warns of each letter that becomes a box; so none does. Which of
  the two it is depends on the machine's fonts."""
  results = example.finetune_results(classes)
  # The page itself shows a line break as two characters.
  classes = files.visible(list(classes))
  figure = finetune.confusion(files.visible(results["summary"]))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    text = page.write(tmp_path, results).read_text("utf-8")
    assert_legible("confusion", figure)
  drawn = [t.get_text() for t in figure.axes[0].get_yticklabels()]
  if fonts.labels(classes).numbered:
    assert drawn == [str(i + 1) for i in range(len(classes))]
    for number, name in zip(drawn, classes, strict=True):
      assert f"<dt>{number}</dt><dd><bdi>{name}</bdi></dd>" in text
  else:
    assert drawn == [unicodedata.normalize("NFC", name) for name in classes]
    assert "<bdi>" not in text


@pytest.mark.slow
@pytest.mark.parametrize("classes", CLASSES)
def test_equal_names_give_equal_pages(classes, tmp_path):
  results = example.finetune_results(classes)
  first, second = (page.write(tmp_path / of, results) for of in "ab")
  assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
  "name", ["سليم", "תקין", "क्षय", "e\u0353", "a\u200db", "\udcff", NOWHERE]
)
def test_what_matplotlib_would_draw_wrong_becomes_numbers(name):
  """DejaVu Sans has Arabic and Hebrew; matplotlib has them the wrong way."""
  found = fonts.labels(["tumour", name])
  assert found.numbered and found.words == ["1", "2"]


def test_a_font_of_this_machine_helps_out():
  """matplotlib brings a second font along, which has letters of its own."""
  usual, second = (
    set(
      font_manager.get_font(
        font_manager.findfont(font_manager.FontProperties(family=name))
      ).get_charmap()
    )
    for name in (fonts.USUAL, "STIXGeneral")
  )
  letter = next(
    chr(code)
    for code in sorted(second - usual)
    if unicodedata.category(chr(code)) in ("Ll", "Lo", "So", "Sm")
  )
  found = fonts.labels([f"class {letter}", "class b"])
  assert not found.numbered and found.words[0] == f"class {letter}"
  assert found.families[0] == fonts.USUAL and len(found.families) == 2


def test_names_that_all_fonts_have_are_left_alone():
  names = ["lung_aca", "$x_1$", "größer"]
  assert fonts.labels(names) == fonts.Labels(names, [fonts.USUAL], False)
  assert fonts.key(names) is None


def test_long_names_and_their_numbers_agree():
  """The figure shortens names; what it cannot draw may be in the part cut."""
  classes = ["a" * 30 + NOWHERE, "b"]
  summary = example.finetune_results(classes)["summary"]
  drawn = finetune.confusion(summary).axes[0].get_yticklabels()
  assert [t.get_text() for t in drawn] == ["1", "2"]
  assert classes[0] in finetune.confusion_key(summary)
