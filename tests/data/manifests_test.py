"""Manifests as people write them: tasks, slides, spellings of paths."""

import unicodedata

import pytest

from jaxtransfer.data import images, manifests, sources
from jaxtransfer.errors import MissingSourceError, UsageError
from tests.data.tiles import open_source, write_image


def _manifest(folder, *lines):
  path = folder / "manifest.csv"
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return path


# --- tasks -------------------------------------------------------------------


@pytest.fixture
def two_tasks(tmp_path):
  """Three images with a grade, of which two have a stage."""
  write_image(tmp_path / "a.png", 5)
  return _manifest(
    tmp_path,
    "path,label,task,group",
    "a.png,low,grade,",
    "a.png,II,stage,p1",
    "b.png,high,grade,",
    "c.png,low,grade,",
    "c.png,III,stage,p2",
  )


def test_several_tasks_are_one_problem_only_where_one_is_picked(two_tasks):
  """Its rows, its classes and its groups are all there is."""
  with pytest.raises(UsageError, match=r"grade \(3\), stage \(2\).*data.task="):
    open_source(two_tasks)
  grade = open_source(two_tasks, task="grade")
  assert grade.names == ["a.png", "b.png", "c.png"]
  assert grade.classes == ["high", "low"] and grade.groups is None
  assert any("3 of 5 rows are of task grade" in note for note in grade.notes)
  stage = open_source(two_tasks, task="stage")
  assert stage.classes == ["II", "III"] and stage.groups == ["p1", "p2"]


@pytest.mark.parametrize(
  "task, says",
  [
    ("grad", r"did you mean 'grade'\?.* grade \(3\), stage \(2\)"),
    ("Stage", r"did you mean 'stage'\?"),
    ("none", r"grade \(3\)"),
  ],
)
def test_a_task_that_is_not_there_names_the_nearest(two_tasks, task, says):
  with pytest.raises(UsageError, match=f"config.data.task.*{says}"):
    open_source(two_tasks, task=task)


def test_rows_without_a_task_among_others_are_another_task(tmp_path):
  write_image(tmp_path / "b.png", 5)
  path = _manifest(tmp_path, "path,label,task", "a.png,x,", "b.png,y,grade")
  with pytest.raises(UsageError, match=r"none \(1\), grade \(1\)"):
    open_source(path)
  assert open_source(path, task="grade").names == ["b.png"]


def test_one_task_needs_no_key_and_no_task_takes_none(tmp_path):
  """A key that could mean nothing is refused, whatever the source."""
  write_image(tmp_path / "tiles" / "x" / "a.png", 5)
  path = _manifest(tmp_path, "path,label,task", "tiles/x/a.png,x,grade")
  for task in ("", "grade"):
    assert open_source(path, task=task).tasks == ["grade"]
  path = _manifest(tmp_path, "path,label", "tiles/x/a.png,x")
  for source in (path, tmp_path / "tiles", "synthetic:tissue"):
    with pytest.raises(UsageError, match="'grade', but .*column 'task'"):
      open_source(source, task="grade")


# --- slides ------------------------------------------------------------------


def test_slides_are_the_groups_where_nobody_names_a_patient(tmp_path):
  write_image(tmp_path / "a.png", 5)
  path = _manifest(
    tmp_path,
    "path,label,slide,group",
    "a.png,x,s1,",
    "b.png,y,s1,",
    "c.png,x,,",
  )
  examples = open_source(path)
  assert examples.groups == ["s1", "s1", "ungrouped:c.png"]
  said = "\n".join(examples.notes)
  assert "slides are the groups" in said
  assert "1 of 3 rows name no slide; each is taken as a group" in said


def test_a_row_without_a_group_is_of_its_slide_s(tmp_path):
  """Rows of one slide are of one patient, also where one does not say so."""
  write_image(tmp_path / "a.png", 5)
  path = _manifest(
    tmp_path,
    "path,label,slide,group",
    "a.png,x,s1,p1",
    "b.png,y,s1,",
    "c.png,x,s2,",
    "d.png,x,s2,",
    "e.png,x,,",
  )
  examples = open_source(path)
  assert examples.groups == [
    "p1",
    "p1",
    "ungrouped:s2",
    "ungrouped:s2",
    "ungrouped:e.png",
  ]
  said = "\n".join(examples.notes)
  assert "3 of 5 rows name no group; their slide decides it" in said
  assert "1 of 5 rows name no group; each" in said


def test_a_slide_of_several_groups_is_told(tmp_path):
  write_image(tmp_path / "a.png", 5)
  rows = [f"{i}.png,x,s{i // 2},p{i}" for i in range(20)]
  path = _manifest(tmp_path, "path,label,slide,group", "a.png,x,s0,p0", *rows)
  (note,) = open_source(path).notes
  assert "slides of more than one group: s0 (p0, p1)" in note
  assert "and 7 more" in note and len(note) < 500


def test_names_that_look_alike_are_told_for_every_column(tmp_path):
  write_image(tmp_path / "a.png", 5)
  path = _manifest(
    tmp_path,
    "path,label,slide,group",
    "a.png,tumour,s1,7",
    "b.png,Tumour,S1,007",
  )
  examples = open_source(path)
  assert examples.classes == ["Tumour", "tumour"]
  assert examples.groups == ["7", "007"]
  said = "\n".join(examples.notes)
  for what in ("labels", "groups", "slides"):
    assert f"{path}: {what} that differ only" in said


def test_of_a_list_of_labels_the_words_are_compared(tmp_path):
  """`edema; x` and `x;edema` are no spellings; `Edema` is one."""
  write_image(tmp_path / "a.png", 5)
  lines = ["path,label", "a.png,edema; x", "b.png,x;?edema", "c.png,x"]
  assert open_source(_manifest(tmp_path, *lines)).notes == []
  (note,) = open_source(_manifest(tmp_path, *lines, "d.png,Edema;y")).notes
  assert "'edema' (2 images), 'Edema' (1 images)" in note


# --- paths -------------------------------------------------------------------


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_is_found_in_either_unicode_form(tmp_path, on_disk, written):
  """macOS writes one and the rest the other; folders and files may differ.

  The name stays what the manifest says, and so does the fingerprint of the
  file behind it.
  """
  folder, file = (
    unicodedata.normalize(on_disk, n) for n in ("Müller", "é.png")
  )
  write_image(tmp_path / "Müller" / file, 7)
  (tmp_path / "Müller").rename(tmp_path / folder)
  name = unicodedata.normalize(written, "Müller/é.png")
  examples = open_source(_manifest(tmp_path, "path,label", f"{name},x"))
  assert examples.names == [name] and (examples.read(0) == 7).all()
  before = examples.fingerprint()
  write_image(tmp_path / folder / file, 8)
  assert examples.fingerprint() != before


def test_backslashes_are_slashes_where_no_file_has_that_name(tmp_path):
  write_image(tmp_path / "tiles" / "a.png", 7)
  write_image(tmp_path / "tiles\\b.png", 8)
  write_image(tmp_path / "tiles" / "b.png", 9)
  path = _manifest(
    tmp_path,
    "path,label",
    "tiles\\a.png,x",
    "tiles\\b.png,x",
    "tiles/b.png,x",
    "tiles\\c.png,x",
    "C:\\tiles\\a.png,x",
  )
  examples = open_source(path)
  assert [int(examples.read(i)[0, 0, 0]) for i in range(3)] == [7, 8, 9]
  with pytest.raises(
    images.ImageError, match="no such file; nor .*backslashes"
  ):
    examples.read(3)
  with pytest.raises(images.ImageError, match="no such file; it is a Windows"):
    examples.read(4)
  assert any("4 paths have backslashes" in note for note in examples.notes)


@pytest.mark.parametrize(
  "name, says",
  [
    ("C:\\tiles\\a.png", "it is a Windows path"),
    ("D:/tiles/a.png", "it is a Windows path"),
    ("\\\\server\\tiles\\a.png", "it is a Windows path"),
    ("tiles\\a.png", "nor is there one with /"),
  ],
)
def test_a_windows_path_that_leads_nowhere_is_the_reason(tmp_path, name, says):
  with pytest.raises(MissingSourceError, match=says):
    open_source(_manifest(tmp_path, "path,label", f"{name},x"))


def test_one_image_in_two_spellings_is_there_twice(tmp_path):
  """It could be trained and tested on; two files in two forms could not."""
  write_image(tmp_path / "tiles" / "é.png", 7)
  decomposed = unicodedata.normalize("NFD", "tiles/é.png")
  for other in ("tiles\\é.png", decomposed, "./tiles/é.png"):
    path = _manifest(tmp_path, "path,label", "tiles/é.png,x", f"{other},y")
    with pytest.raises(UsageError, match="line 3: .* is also in line 2"):
      open_source(path)
  write_image(tmp_path / decomposed, 8)
  path = _manifest(tmp_path, "path,label", "tiles/é.png,x", f"{decomposed},y")
  assert len(open_source(path)) == 2


def test_a_name_that_is_there_is_looked_for_once(tmp_path, monkeypatch):
  """On a network every look is a round trip: no other spelling is tried."""
  write_image(tmp_path / "é.png", 7)
  examples = open_source(_manifest(tmp_path, "path,label", "é.png,x"))
  monkeypatch.delattr(manifests, "respelled")
  assert (examples.read(0) == 7).all() and examples.fingerprint()
  assert isinstance(examples, sources.Examples)
