"""Images that are in two splits are named, whatever they are called."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from jaxtransfer import errors
from jaxtransfer.data import dataset, duplicates
from tests.data import tiles
from tests.jobs import configs


def _source(root, names, side=32):
  """Opens smooth random images of one class; names may stand twice."""
  rng = np.random.default_rng(0)
  for name in names:
    coarse = rng.integers(0, 256, (9, 9, 3), np.uint8)
    image = PIL.Image.fromarray(coarse).resize((side, side))
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(root / name)
  lines = ["path,label", *(f"{name},a" for name in names)]
  (root / "manifest.csv").write_text("\n".join(lines) + "\n")
  return tiles.open_source(root / "manifest.csv")


def _places(**rows):
  return {name: np.array(of) for name, of in rows.items()}


def test_the_same_file_under_another_name_is_named(tmp_path):
  """Each image of the first split counts once, however many twins it has; what
  is twice in one split is no matter, and what is not there is left out."""
  names = [f"{c}.png" for c in "abcdefgh"]
  source = _source(tmp_path, names)
  for name, of in (("b", "a"), ("c", "a"), ("e", "d"), ("g", "f")):
    shutil.copy(tmp_path / f"{of}.png", tmp_path / f"{name}.png")
  (tmp_path / "h.png").unlink()
  # a = b = c: test, train, train; d = e: both test; f = g: val, train.
  places = _places(test=[0, 3, 4], val=[5, 7], train=[1, 2, 6])
  path = tmp_path / "run" / "duplicates.json"
  notes = duplicates.check(source, places, False, path)
  first, second = notes
  assert first.startswith("1 image of test is also in train: a.png = b.png. ")
  assert second.startswith("1 image of val is also in train: f.png = g.png. ")
  listed = json.loads(path.read_text())["pairs"]
  assert listed[0] == {
    "kind": "same",
    "name": "a.png",
    "split": "test",
    "other": "b.png",
    "other_split": "train",
  }
  assert len(listed) == 2


def test_it_is_done_once_for_the_same_files(tmp_path, monkeypatch):
  """A run that goes on reads none again; a file that has changed is read."""
  source = _source(tmp_path, ["a.png", "b.png", "c.png"])
  shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
  places = _places(test=[0], train=[1, 2])
  path = tmp_path / "duplicates.json"
  notes = duplicates.check(source, places, False, path)
  assert len(notes) == 1
  with monkeypatch.context() as patch:
    patch.delattr(type(source), "digest")
    assert duplicates.check(source, places, False, path) == notes
  for damaged in ("", "{}", '{"pairs": 1'):
    path.write_text(damaged)
    assert duplicates.check(source, places, False, path) == notes
  PIL.Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
  assert duplicates.check(source, places, False, path) == []


def test_many_are_counted_and_three_are_named(tmp_path):
  names = [f"{i}.png" for i in range(10)]
  source = _source(tmp_path, names, side=8)
  for i in range(5):
    shutil.copy(tmp_path / f"{i}.png", tmp_path / f"{i + 5}.png")
  places = _places(test=range(5), train=range(5, 10))
  (note,) = duplicates.check(source, places, False, tmp_path / "d.json")
  assert note.startswith(
    "5 images of test are also in train: 0.png = 5.png, 1.png = 6.png,"
    " 2.png = 7.png and 2 more. "
  )


def test_images_that_look_the_same_are_found(tmp_path):
  """Saved anew, or smaller: other bytes, the same picture. A picture that
  is no other's twin is not named, and an exact one is not told twice."""
  pytest.importorskip("imagehash")
  names = [f"{c}.png" for c in "abcdefg"]
  source = _source(tmp_path, names, side=64)
  with PIL.Image.open(tmp_path / "a.png") as image:
    image.resize((40, 40)).save(tmp_path / "b.png")
  with PIL.Image.open(tmp_path / "c.png") as image:
    image.save(tmp_path / "d.png", "JPEG", quality=95, subsampling=0)
  shutil.copy(tmp_path / "e.png", tmp_path / "f.png")
  places = _places(test=[0, 2, 4], train=[1, 3, 5, 6])
  exact, near = duplicates.check(source, places, True, tmp_path / "d.json")
  assert exact.startswith("1 image of test is also in train: e.png = f.png. ")
  assert near.startswith(
    "2 images of test look like one of train: a.png ~ b.png, c.png ~ d.png. "
  )


def test_hashes_are_compared_as_if_all_were():
  """Those with a row in common alone are compared, and none is missed that
  differs in as many bits as allowed; equal rows of many hide nothing."""
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2, (40, 256)).astype(bool)
  bits = np.repeat(bits, 6, axis=0)
  for i, row in enumerate(bits):
    row[rng.choice(256, 3 * (i % 6), replace=False)] ^= True
  bits[:100, :16] = False
  names = [np.packbits(row).tobytes().hex() for row in bits]
  apart = (bits[:, None] != bits[None]).sum(-1)
  expected = {
    (names[i], names[j])
    for i, j in np.argwhere(apart <= duplicates.MOST_BITS).tolist()
    if names[i] != names[j]
  }
  near = duplicates._neighbours(set(names))
  assert {(a, b) for a, of in near.items() for b in of} == expected
  assert len(expected) > 100
  assert duplicates._neighbours(set()) == {}


def test_what_is_not_installed_is_said_at_once(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  duplicates.check_installed(False)
  with pytest.raises(errors.UsageError, match=r"jaxtransfer\[duplicates\]"):
    duplicates.check_installed(True)


@pytest.mark.parametrize("folds", [0, 3])
def test_every_division_has_the_notes(tmp_path, folds):
  """Of folds the one that tests an image is its place."""
  manifest = configs.write_tiles(tmp_path, 8, 60, per_patient=3)
  config = configs.load("truncate", "resnet18")
  config.update_from_flattened_dict(
    {"data.source": str(manifest), "folds": folds}
  )
  divisions = dataset.open_divisions(config, tmp_path / "splits.json")
  tested = divisions[0].rows["test"][0]
  other = divisions[1].rows["test"][0] if folds else divisions[0].rows["val"][0]
  shutil.copy(tmp_path / f"{other}.png", tmp_path / f"{tested}.png")
  found = dataset.note_duplicates(
    divisions, config, tmp_path / "duplicates.json", lambda compute: compute()
  )
  words = "image of fold 0 is also in fold 1"
  if not folds:
    words = "image of the test split is also in the val split"
  pair = f"{tested}.png = {other}.png"
  assert [one.notes[:-1] for one in found] == [o.notes for o in divisions]
  for one in found:
    assert one.notes[-1].startswith(f"1 {words}: {pair}. ")
