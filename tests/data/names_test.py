"""Names that look alike are told, and a list of names stays short."""

import unicodedata

import pytest

from jaxtransfer.data import names


@pytest.mark.parametrize(
  "one, other",
  [
    ("tumour", "Tumour"),
    ("tumour", "tumour "),
    ("class 1", "class  1"),
    ("class 1", "class1"),
    ("class 1", "class_1"),
    ("non-tumour", "nontumour"),
    ("a (rare)", "a ( rare )"),
    ("straße", "STRASSE"),
    ("Tumör", unicodedata.normalize("NFD", "tumör")),
    ("tumour", "tumour\u200b"),
    ("tumour", "ｔｕｍｏｕｒ"),
    ("7", "007"),
    ("7", "7.0"),
    ("P1", "p1"),
    ("P1", "P01"),
    ("P 1", "P1"),
  ],
)
def test_names_that_a_reader_takes_for_one_are_told(one, other):
  """Both are shown, each so that it can be told from the other."""
  (note,) = names.alike("labels", [one, one, other, "stroma", ""])
  assert note.startswith("labels that differ only in")
  for name, count in ((one, 2), (other, 1)):
    written = repr(name), ascii(name)
    assert any(f"{w} ({count} images)" in note for w in written), note
  assert note.count("images)") == 2 and "stroma" not in note


def test_names_that_differ_are_not_told():
  """Signs and numbers mean something: 1-1 is not 11, and ER+ is not ER-."""
  apart = ["1-1", "11", "1.05", "1.5", "ER+", "ER-", "0", "", "10", "1"]
  assert names.alike("groups", apart) == []
  assert names.alike("groups", []) == []


def test_a_note_does_not_grow_with_the_names():
  """Of a thousand pairs three are shown and the others counted."""
  pairs = [f"{letter}{i}" for i in range(1000) for letter in "pP"]
  (note,) = names.alike("groups", pairs)
  assert len(note) < 400 and "and 997 more" in note
  assert names.shown(list("abcdef")) == "a, b, c and 3 more"
  assert names.shown(list("abc")) == "a, b, c"
