"""Splits that share no patient and have the same mix of labels."""

import collections
import copy

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from jaxtransfer.data import sources, splits, stored_splits
from jaxtransfer.errors import UsageError
from tests.data.tiles import write_image
from tests.jobs import configs


def _patients(seed=0, patients=60, classes=4):
  """Patients of unequal size, each with several labels unequally mixed."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(5, 80, patients)
  labels = [
    rng.choice(classes, n, p=rng.dirichlet([1] * classes)) for n in sizes
  ]
  groups = np.repeat([f"p{i}" for i in range(patients)], sizes)
  return np.concatenate(labels).astype(np.int32), groups.tolist()


def _shares(parts, labels):
  """(parts, labels) share of each label that each part has."""
  counts = np.array([np.bincount(labels[p], minlength=4) for p in parts])
  return counts / counts.sum(0)


def test_splits_are_whole_disjoint_and_by_group():
  labels, groups = _patients()
  made = splits.make_splits(labels, groups)
  assert list(made) == ["train", "val", "test"]
  rows = np.sort(np.concatenate(list(made.values())))
  np.testing.assert_array_equal(rows, np.arange(len(labels)))
  owner = collections.defaultdict(set)
  for name, part in made.items():
    np.testing.assert_array_equal(part, np.sort(part))
    for row in part:
      owner[groups[row]].add(name)
  assert {len(names) for names in owner.values()} == {1}


def test_labels_are_balanced_as_far_as_groups_allow():
  """60 patients of 4 labels leave some unevenness; 2 % is little of it."""
  labels, groups = _patients()
  for seed in range(3):
    made = splits.make_splits(labels, groups, seed=seed)
    shares = _shares(made.values(), labels)
    np.testing.assert_allclose(shares.T, [[0.6, 0.2, 0.2]] * 4, atol=0.02)


def test_without_groups_labels_are_divided_to_the_row():
  labels = np.repeat([0, 1, 2, 3], [500, 50, 10, 5])
  made = splits.make_splits(labels, None)
  counts = [
    np.bincount(part, minlength=4)
    for part in (labels[made[name]] for name in splits.SPLITS)
  ]
  np.testing.assert_array_equal(
    counts, [[300, 30, 6, 3], [100, 10, 2, 1], [100, 10, 2, 1]]
  )


def test_the_seed_decides_and_names_do_not():
  """The same draw for renamed patients; another for another seed."""
  labels, groups = _patients()
  made = splits.make_splits(labels, groups, seed=1)
  renamed = [f"x{g[::-1]}" for g in groups]
  again = splits.make_splits(labels, renamed, seed=1)
  other = splits.make_splits(labels, groups, seed=2)
  np.testing.assert_array_equal(made["test"], again["test"])
  assert not np.array_equal(made["test"], other["test"])


def test_a_class_with_few_members_is_in_train_first():
  """One member: train, and a warning for the rest. Three: one in each."""
  labels = np.array([0] * 30 + [1] + [2] * 3)
  made = splits.make_splits(labels, None)
  names = [str(i) for i in range(len(labels))]
  assert 30 in made["train"]
  for part in made.values():
    assert (labels[part] == 2).sum() == 1
  warnings = splits.check_splits(made, labels, None, names, ["a", "b", "c"])
  assert len(warnings) == 2
  assert all("no image of 1 of 3 classes: b" in line for line in warnings)


def test_given_splits_are_kept_and_missing_ones_carved_out_of_train():
  labels, groups = _patients()
  test = {f"p{i}" for i in range(12)}
  given = ["test" if g in test else "train" for g in groups]
  made = splits.make_splits(labels, groups, given)
  assert {groups[row] for row in made["test"]} == test
  assert not {groups[r] for r in made["train"]} & {
    groups[r] for r in made["val"]
  }
  left = len(labels) - len(made["test"])
  assert abs(len(made["val"]) / left - 0.2 / 0.8) < 0.02
  complete = ["train", "val", "test"] * 2
  kept = splits.make_splits(np.zeros(6, int), None, complete)
  assert {k: v.tolist() for k, v in kept.items()} == {
    "train": [0, 3],
    "val": [1, 4],
    "test": [2, 5],
  }
  with pytest.raises(UsageError, match="no row .* is train"):
    splits.make_splits(np.zeros(2, int), None, ["val", "test"])


@pytest.mark.parametrize(
  "fractions", [(0.6, 0.2), (0.6, 0.2, 0.3), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)]
)
def test_fractions_that_are_none_are_refused(fractions):
  with pytest.raises(UsageError, match="split_fractions"):
    splits.make_splits(np.zeros(9, int), None, fractions=fractions)


def test_a_fraction_of_zero_is_an_empty_split():
  made = splits.make_splits(np.zeros(10, int), None, fractions=(0.8, 0.0, 0.2))
  assert [len(made[name]) for name in splits.SPLITS] == [8, 0, 2]


def test_folds_are_as_balanced_as_scikit_learn_s():
  """By the worst deviation of any label's share of any fold, over seeds."""
  ours, theirs = [], []
  for seed in range(3):
    labels, groups = _patients(seed)
    fold = splits.k_folds(labels, groups, 5, seed)
    assert fold.shape == labels.shape and set(fold) == set(range(5))
    assert len(set(zip(groups, fold, strict=True))) == len(set(groups))
    parts = [np.flatnonzero(fold == k) for k in range(5)]
    ours.append(np.abs(_shares(parts, labels) - 0.2).max())
    reference = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    parts = [p for _, p in reference.split(labels, labels, groups)]
    theirs.append(np.abs(_shares(parts, labels) - 0.2).max())
  assert np.mean(ours) < 1.2 * np.mean(theirs)


def test_more_folds_than_groups_are_refused():
  with pytest.raises(UsageError, match="3 folds of 2 groups"):
    splits.k_folds(np.zeros(9, int), ["a", "b", "b"] * 3, 3)


def test_few_shots_are_nested_and_of_many_patients():
  labels, groups = _patients()
  rows = splits.make_splits(labels, groups)["train"]
  before: set[int] = set()
  for shots in (1, 5, 10):
    chosen = splits.few_shot(rows, labels, groups, shots, seed=3)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [shots] * 4)
    assert before <= set(chosen) <= set(rows)
    before = set(chosen)
    for label in range(4):
      own = [groups[row] for row in chosen if labels[row] == label]
      assert len(set(own)) == shots  # there are more patients than shots
  assert set(splits.few_shot(rows, labels, groups, 5, seed=4)) != set(
    splits.few_shot(rows, labels, groups, 5, seed=3)
  )


def test_a_class_with_fewer_than_the_shots_gives_all():
  labels = np.array([0] * 10 + [1] * 2)
  chosen = splits.few_shot(np.arange(12), labels, None, 4)
  np.testing.assert_array_equal(np.bincount(labels[chosen]), [4, 2])


def test_what_is_in_two_splits_is_named():
  parts = {
    "train": np.array([0, 1]),
    "val": np.array([2]),
    "test": np.array([3]),
  }
  arguments = (np.zeros(4, int), ["p1", "p2", "p3", "p2"], list("abcd"), ["x"])
  with pytest.raises(UsageError, match="group p2 is in both train and test"):
    splits.check_splits(parts, *arguments)
  parts["test"] = np.array([2])
  with pytest.raises(UsageError, match="image c is in both val and test"):
    splits.check_splits(parts, *arguments)


def test_all_that_splits_share_is_named_with_rows():
  """The first few with a row of each split, the others counted."""
  parts = {
    "train": np.arange(6),
    "val": np.arange(6, 12),
    "test": np.arange(12, 18),
  }
  names = [f"{i}.png" for i in range(18)]
  groups = [f"p{i % 6}" for i in range(18)]
  with pytest.raises(UsageError) as caught:
    splits.check_splits(parts, np.zeros(18, int), groups, names, ["x"])
  said = str(caught.value)
  assert "p0 is in both train and val (row 1, 0.png; row 7, 6.png); the" in said
  assert "group p2" in said and "and 3 more" in said and "p3" not in said


def _divide(folder, lines):
  """Writes images and a manifest of these columns, opens and divides them."""
  header, *rows = lines
  for row in rows:
    write_image(folder / row.split(",")[0], 5)
  manifest = folder / "manifest.csv"
  manifest.write_text("\n".join(lines) + "\n")
  config = configs.load("finetune", "resnet18")
  config.data.source = str(manifest)
  examples = sources.open_source(config.data)
  divided, notes = splits.divide(config, examples, folder / "splits.json")
  return examples, divided, [*examples.notes, *notes]


def _given(column, of, given=("train", "val", "test")):
  """Lines of a manifest with splits in turns, and a column that `of` gives."""
  rows = [
    f"{i}.png,{'xy'[i // 3 % 2]},{given[i % 3]},{of(i)}" for i in range(24)
  ]
  return [f"path,label,split,{column}", *rows]


def test_given_splits_that_share_a_slide_are_refused(tmp_path):
  """With or without groups; with both, the slide is of several groups, and
  what to do where that is right is said."""
  slides = _given("slide", lambda i: f"s{i // 2}")
  with pytest.raises(
    UsageError, match=r"the slide s0 .* \(row 1, 0.png; row 2"
  ):
    _divide(tmp_path, slides)
  both = _given("slide,group", lambda i: f"s{i // 2},p{i}")
  with pytest.raises(
    UsageError,
    match="the slide s0 .*and 9 more.*several groups.*column 'slide'",
  ):
    _divide(tmp_path, both)
  patients = _given("slide,group", lambda i: f"s{i},p{i // 2}")
  with pytest.raises(UsageError, match="the group p0 is in both"):
    _divide(tmp_path, patients)
  # One without a slide is on none, so that it shares none.
  examples, *_ = _divide(tmp_path, _given("slide,group", lambda i: f",p{i}"))
  assert examples.slides is None


def test_drawn_splits_are_by_slide_where_nobody_names_a_patient(tmp_path):
  rows = [f"{i}.png,{'xy'[i % 2]},s{i // 4}" for i in range(60)]
  _, divided, notes = _divide(tmp_path, ["path,label,slide", *rows])
  of_split = [{row // 4 for row in rows.tolist()} for rows in divided.values()]
  assert sum(map(len, of_split)) == 15
  assert not any("names no groups" in note for note in notes)


def test_groups_divide_slides_that_hold_several_patients(tmp_path):
  """A tissue microarray: one slide, many patients; they are what is divided,
  and that is told."""
  rows = [f"{i}.png,{'xy'[i % 2]},array,p{i // 2}" for i in range(60)]
  _, divided, notes = _divide(tmp_path, ["path,label,slide,group", *rows])
  assert all(len(rows) for rows in divided.values())
  assert any("slides of more than one group: array (p0" in n for n in notes)


@pytest.mark.parametrize("missing", ["val", "test"])
def test_a_split_that_is_not_given_is_said_to_come_from_train(
  tmp_path, missing
):
  """Of a manifest, and of the same images in folders."""
  given = ["train", "train", {"val": "test", "test": "val"}[missing]]
  lines = _given("group", lambda i: f"p{i}", given)
  _, divided, notes = _divide(tmp_path, lines)
  said = (
    f"gives no {missing} split: {len(divided[missing])} of its 16 train images"
  )
  assert sum(said in note for note in notes) == 1, notes
  for line in lines[1:]:
    name, label, split, _ = line.split(",")
    write_image(tmp_path / "folders" / split / label / name, 5)
  config = configs.load("finetune", "resnet18")
  config.data.source = str(tmp_path / "folders")
  examples = sources.open_source(config.data)
  _, notes = splits.divide(config, examples, tmp_path / "splits.json")
  assert any(f"gives no {missing} split" in note for note in notes)


def test_a_class_that_train_lacks_is_an_error():
  parts = {
    "train": np.array([0]),
    "val": np.array([1]),
    "test": np.array([], int),
  }
  with pytest.raises(
    UsageError, match="train split has no image of 1 of 2.*: y"
  ):
    splits.check_splits(parts, np.array([0, 1]), None, ["a", "b"], ["x", "y"])


@pytest.mark.slow
def test_many_rows_and_classes_are_divided_and_checked():
  """300,000 rows of 10,000 classes and 5,000 patients: no table of both."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 10_000, 300_000)
  groups = [f"p{i}" for i in rng.integers(0, 5_000, 300_000)]
  for known in (groups, None):
    made = splits.make_splits(labels, known)
    assert abs(len(made["train"]) / 300_000 - 0.6) < 0.02
    names = [str(i) for i in range(300_000)]
    classes = [str(i) for i in range(10_000)]
    assert splits.check_splits(made, labels, known, names, classes) == []


@pytest.mark.parametrize(("patients", "said"), [(12, True), (150, False)])
def test_a_split_of_few_patients_is_said_to_be_rough(tmp_path, patients, said):
  """What counts are patients: 12 of them leave two or three to test on."""
  manifest = configs.write_tiles(tmp_path, 4, 3 * patients, per_patient=3)
  config = configs.load("finetune", "resnet18")
  config.data.source = str(manifest)
  examples = sources.open_source(config.data)
  _, notes = splits.divide(config, examples, tmp_path / "splits.json")
  assert any("test split holds" in note for note in notes) == said, notes


def test_stored_folds_are_read_back_and_checked(tmp_path):
  """A splits.json that puts a patient into two splits of a fold is refused;
  splits that the source gives are not used, and that is said."""
  manifest = configs.write_tiles(tmp_path, 4, 90, per_patient=3)
  config = configs.load("truncate", "resnet18")
  config.data.source = str(manifest)
  config.folds = 3
  examples = sources.open_source(config.data)
  given = copy.copy(examples)
  given.splits = ["train"] * 90
  path = tmp_path / "splits.json"
  drawn, notes = splits.divide_folds(config, given, path)
  assert "the source's own splits are not used" in notes[0]
  joined = splits.join_folds(drawn)
  stored_splits.save_splits(path, joined, examples)
  again, notes = splits.divide_folds(config, examples, path)
  assert not any("own splits" in note for note in notes)
  for one, other in zip(drawn, again, strict=True):
    assert all(np.array_equal(one[name], other[name]) for name in splits.SPLITS)
  joined["train1"] = np.append(joined["train1"], joined["test1"][0])
  stored_splits.save_splits(path, joined, examples)
  with pytest.raises(UsageError, match="train and test"):
    splits.divide_folds(config, examples, path)
