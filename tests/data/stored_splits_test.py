"""splits.json: a source that is not what it was is refused, with its rows."""

import copy
import json

import numpy as np
import pytest

from jaxtransfer.data import sources, splits, stored_splits
from jaxtransfer.errors import UsageError


class _Rows(sources.Examples):
  """Rows that nobody reads."""


def _rows(count=20, **changes):
  fields = {
    "classes": ["stroma", "tumour"],
    "labels": np.arange(count, dtype=np.int32) % 2,
    "names": [f"{i}.png" for i in range(count)],
    "groups": [f"p{i // 4}" for i in range(count)],
    "slides": [f"s{i // 2}" if i else "" for i in range(count)],
    "splits": ["train"] * count,
    "tasks": None,
  }
  return _Rows(**{**fields, **changes})


def _saved(path, examples):
  made = splits.make_splits(examples.labels, examples.groups)
  stored_splits.save_splits(path, made, examples)
  return made


def _with(examples, column, row, value):
  changed = copy.copy(examples)
  values = list(getattr(examples, column))
  values[row] = value
  setattr(changed, column, values)
  return changed


def test_saved_splits_come_back_for_the_same_rows_only(tmp_path):
  path, examples = tmp_path / "splits.json", _rows()
  made = _saved(path, examples)
  loaded = stored_splits.load_splits(path, examples)
  assert list(loaded) == list(made)
  for name in made:
    np.testing.assert_array_equal(loaded[name], made[name])
    assert loaded[name].dtype == np.int64
  assert stored_splits.check_unchanged(path, examples) is None
  names = examples.names
  for changed, message in [
    (names[:-1], "0 images are new, 1 gone .19.png"),
    (names + ["new.png"], "1 images are new, 0 gone .new.png"),
    (names[::-1], "the order of rows: row 1 is 0.png there, 19.png now"),
  ]:
    other = _rows(len(changed), names=changed)
    for check in (stored_splits.load_splits, stored_splits.check_unchanged):
      with pytest.raises(UsageError, match=f"{message}.*another --workdir"):
        check(path, other)


@pytest.mark.parametrize(
  "column, value, says",
  [
    ("groups", "p9", "group 'p1' there, 'p9' now"),
    ("slides", "", "slide 's3' there, none now"),
    ("splits", "test", "split 'train' there, 'test' now"),
  ],
)
def test_what_a_row_was_is_held(tmp_path, column, value, says):
  """And a digest of it changes with it, as what is cached under it must."""
  path, examples = tmp_path / "splits.json", _rows()
  _saved(path, examples)
  changed = _with(examples, column, 6, value)
  assert stored_splits.digest(changed) != stored_splits.digest(examples)
  with pytest.raises(UsageError, match=f"row 7, 6.png: {says}"):
    stored_splits.load_splits(path, changed)


def test_corrected_labels_are_shown(tmp_path):
  """The first rows with both labels, and how many there are in all; a class
  that is new, or that nobody has any more, changes every number behind a
  label and no row that keeps its own."""
  path, examples = tmp_path / "splits.json", _rows()
  _saved(path, examples)
  labels = ["necrosis", "stroma", "tumour"]
  number = np.arange(20) % 2 + 1
  number[[3, 5, 8, 9, 11]] = 0
  changed = _rows(classes=labels, labels=number)
  assert stored_splits.digest(changed) != stored_splits.digest(examples)
  with pytest.raises(UsageError) as caught:
    stored_splits.load_splits(path, changed)
  said = str(caught.value)
  assert "row 4, 3.png: label 'tumour' there, 'necrosis' now;" in said
  assert "row 9, 8.png: label 'stroma' there, 'necrosis' now;" in said
  assert "row 10" not in said and "5 rows differ in all" in said
  assert "\n" not in said


def test_a_column_that_is_new_is_another_source(tmp_path):
  """Patients that were not known when the rows were divided one by one."""
  path = tmp_path / "splits.json"
  _saved(path, _rows(groups=None))
  with pytest.raises(UsageError, match="group none there, 'p0' now"):
    stored_splits.load_splits(path, _rows())
  unused = _rows(groups=None, tasks=["grade"] * 20)
  with pytest.raises(UsageError, match="task none there, 'grade' now"):
    stored_splits.load_splits(path, unused)


def test_an_older_file_is_refused_but_for_a_finished_run(tmp_path):
  """It holds names alone: they are compared, and more cannot be."""
  path, examples = tmp_path / "splits.json", _rows()
  path.write_text(json.dumps({"train": [0, 1], "names": examples.names}))
  with pytest.raises(UsageError, match="older version.*another --workdir"):
    stored_splits.load_splits(path, examples)
  said = stored_splits.check_unchanged(path, examples)
  assert "names and no labels" in said
  with pytest.raises(UsageError, match="0 images are new, 1 gone"):
    stored_splits.check_unchanged(path, _rows(19))


def test_a_damaged_splits_file_is_named(tmp_path):
  path = tmp_path / "splits.json"
  whole = {"train": [0], "names": ["a"], "classes": ["x"], "columns": {}}
  for text in (
    "",
    '{"train": [0]',
    "[]",
    json.dumps({"train": [0]}),
    json.dumps(whole),
    json.dumps({**whole, "columns": None}),
  ):
    path.write_text(text)
    with pytest.raises(UsageError, match="splits.json.*remove it"):
      stored_splits.load_splits(path, _rows())


def test_many_rows_are_small_on_disk(tmp_path):
  """300,000 rows of 5,000 patients: the file is little more than the names."""
  count = 300_000
  examples = _rows(count, groups=[f"patient {i // 60}" for i in range(count)])
  path = tmp_path / "splits.json"
  made = {"train": np.arange(count)}
  stored_splits.save_splits(path, made, examples)
  assert path.stat().st_size < 40 * count
  loaded = stored_splits.load_splits(path, examples)
  np.testing.assert_array_equal(loaded["train"], made["train"])
  with pytest.raises(UsageError, match="row 123457, 123456.png"):
    stored_splits.load_splits(path, _with(examples, "groups", 123_456, "p"))
