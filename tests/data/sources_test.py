"""The same images, whatever they come as."""

import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxtransfer.data import images, sources, stored_splits
from jaxtransfer.errors import UsageError
from tests.data.tiles import open_source, write_image


def _manifest(folder, text, encoding="utf-8"):
  path = folder / "manifest.csv"
  path.write_bytes(text.encode(encoding))
  return path


def test_a_manifest_gives_what_it_says(tmp_path):
  write_image(tmp_path / "b" / "1.png", 10)
  path = _manifest(
    tmp_path,
    "label,path,group,split,slide\n"
    "tumor,b/1.png,p1,train,s1\n"
    "\n"
    '"normal, rare",b/2.png,,test,\n',
  )
  examples = open_source(path)
  assert examples.classes == ["normal, rare", "tumor"]
  np.testing.assert_array_equal(examples.labels, [1, 0])
  assert examples.labels.dtype == np.int32
  assert examples.names == ["b/1.png", "b/2.png"]
  assert examples.groups == ["p1", "ungrouped:b/2.png"]
  assert examples.splits == ["train", "test"]
  assert examples.slides == ["s1", ""]
  assert examples.tasks is None and len(examples) == 2
  assert "1 of 2 rows name no group" in examples.notes[0]
  assert (examples.read(0) == 10).all()
  with pytest.raises(images.ImageError, match="no such file"):
    examples.read(1)


def test_a_spreadsheet_s_manifest_is_read(tmp_path):
  """Byte-order mark, CRLF, capitals, spaces and an empty column."""
  write_image(tmp_path / "a.png", 5)
  path = _manifest(
    tmp_path,
    "Path , Label,group,stain\r\na.png,é,,HE\r\nb.png,x,,HE\r\n",
    "utf-8-sig",
  )
  examples = open_source(path)
  assert examples.classes == ["x", "é"]
  assert examples.groups is None
  assert examples.notes == [f"{path}: columns not used: stain"]


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "no column 'path'.*here none"),
    ("path;label\na;b\n", "no column 'path'.*here path;label"),
    ("path,label,label\na,b,c\n", "'label' is there twice"),
    ("path,label\n", "no rows"),
    ("path,label\na.png,x\nb.png,\n", "line 3: empty label"),
    ("path,label\n,x\n", "line 2: empty path"),
    ("path,label\na.png\n", "line 2: 1 cells, the header has 2"),
    ("path,label\na,1.png,x\n", "line 2: 3 cells"),
    ("path,label\na.png,x\n\n./a.png,y\n", "line 4: ./a.png is also in line 2"),
    ("path,label,split\na,x,train\nb,x,dev\n", "line 3: split is 'dev'"),
    ("path,label,split\na,x,train\nb,x,\n", "line 3: split is ''"),
    ('path,label\n"a.png,x\nb.png,y\n', "line 3: unexpected end of data"),
  ],
)
def test_a_manifest_s_mistake_is_named_with_its_line(tmp_path, text, message):
  path = _manifest(tmp_path, text)
  with pytest.raises(UsageError, match=message) as caught:
    open_source(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_manifest_that_is_no_utf_8_is_refused(tmp_path):
  path = _manifest(tmp_path, "path,label\na.png,tumör\n", "latin-1")
  with pytest.raises(UsageError, match="not UTF-8"):
    open_source(path)


def test_a_manifest_whose_images_are_elsewhere_says_where_it_looked(tmp_path):
  path = _manifest(tmp_path, "path,label\ntiles/a.png,x\ntiles/b.png,y\n")
  with pytest.raises(UsageError, match=f"none .* 2 .*{tmp_path}/tiles/a.png"):
    open_source(path)
  write_image(tmp_path / "tiles" / "b.png", 5)
  assert open_source(path).names == ["tiles/a.png", "tiles/b.png"]


def test_a_folder_is_its_classes(tmp_path):
  for name in ("b/2.png", "b/1.JPG", "a/3.tiff"):
    write_image(tmp_path / name, 5)
  (tmp_path / "a" / "Thumbs.db").write_text("no image")
  (tmp_path / "a" / ".hidden.png").write_text("no image")
  (tmp_path / "manifest.csv").write_text("path,label\n")
  examples = open_source(tmp_path)
  assert examples.names == ["a/3.tiff", "b/1.JPG", "b/2.png"]
  assert examples.classes == ["a", "b"]
  np.testing.assert_array_equal(examples.labels, [0, 1, 1])
  assert examples.groups is None and examples.splits is None
  assert len(examples.notes) == 2  # the manifest, Thumbs.db


def test_a_folder_of_splits_is_its_splits(tmp_path):
  """A class that one split lacks is a class all the same."""
  for name in (
    "train/a/1.png",
    "train/b/2.png",
    "valid/a/3.png",
    "test/b/4.png",
  ):
    write_image(tmp_path / name, 5)
  examples = open_source(tmp_path)
  assert dict(zip(examples.names, examples.splits, strict=True)) == {
    "train/a/1.png": "train",
    "train/b/2.png": "train",
    "valid/a/3.png": "val",
    "test/b/4.png": "test",
  }
  assert examples.classes == ["a", "b"]


def test_a_folder_without_the_layout_is_refused(tmp_path):
  with pytest.raises(UsageError, match="no images"):
    open_source(tmp_path)
  write_image(tmp_path / "a" / "patient" / "1.png", 0)
  with pytest.raises(UsageError, match="folders where images should be"):
    open_source(tmp_path)


def test_what_a_folder_leaves_out_is_named(tmp_path):
  """A class that has no image that can be read, files beside the classes, and
  what lies among the images: by name, kind and number."""
  for name in ("a/1.png", "b/2.png", "b/below/3.png", "4.png"):
    write_image(tmp_path / name, 5)
  (tmp_path / "empty").mkdir()
  (tmp_path / "scans").mkdir()
  for i in range(12):
    (tmp_path / "scans" / f"{i}.svs").write_text("no image")
  (tmp_path / "scans" / "0.dcm").write_text("no image")
  (tmp_path / "README").write_text("no image")
  (tmp_path / "a" / "labels.txt").write_text("no image")
  examples = open_source(tmp_path)
  assert examples.classes == ["a", "b"] and len(examples) == 2
  said = "\n".join(examples.notes)
  assert (
    "no image in empty (empty), scans (12 .svs, 1 .dcm), so no class empty,"
    " scans" in said
  )
  assert "2 files beside the class folders are not used" in said
  assert "1 .png" in said and "1 without suffix" in said
  assert "2 entries that are not images" in said
  assert "1 .txt" in said and "1 folders" in said


def test_a_class_that_one_split_lacks_is_named_and_stays_a_class(tmp_path):
  for name in ("train/a/1.png", "train/b/2.png", "test/b/4.png", "train/5.png"):
    write_image(tmp_path / name, 5)
  (tmp_path / "test" / "a").mkdir()
  (tmp_path / "test" / "c").mkdir()
  examples = open_source(tmp_path)
  assert examples.classes == ["a", "b"]
  said = "\n".join(examples.notes)
  assert "no image in test/a (empty), test/c (empty), so no class c" in said
  assert "1 files beside the class folders" in said


def test_many_empty_folders_are_not_all_named(tmp_path):
  for name in "ab":
    write_image(tmp_path / name / "1.png", 5)
  for i in range(500):
    (tmp_path / f"empty {i}").mkdir()
  (note,) = open_source(tmp_path).notes
  assert "and 495 more" in note and len(note) < 1000


@pytest.mark.parametrize("left", [0, 1])
def test_where_too_few_classes_are_left_the_others_are_named(tmp_path, left):
  (tmp_path / "scans").mkdir()
  (tmp_path / "scans" / "1.svs").write_text("no image")
  write_image(tmp_path / "0.png", 5)
  if left:
    write_image(tmp_path / "a" / "1.png", 5)
  with pytest.raises(
    UsageError, match=r"scans \(1 .svs\).*1 files beside .*\(1 .png\)"
  ):
    open_source(tmp_path)


def test_class_folders_that_look_alike_are_told(tmp_path):
  for name in ("train/a", "test/A", "train/b", "test/b "):
    write_image(tmp_path / name / "1.png", 5)
  (note,) = open_source(tmp_path).notes
  assert "labels that differ only" in note and "'b '" in note


def test_names_that_are_not_utf_8_are_names(tmp_path):
  """The file system knows bytes; a hash and splits.json must hold any."""
  write_image(tmp_path / "a" / "1.png", 5)
  other = os.fsencode(tmp_path) + b"/b\xff"
  os.mkdir(other)
  shutil.copy(tmp_path / "a" / "1.png", os.path.join(other, b"\xe9.png"))
  examples = open_source(tmp_path)
  assert examples.names[1] == os.fsdecode(b"b\xff/\xe9.png")
  assert (examples.read(1) == 5).all() and examples.fingerprint()
  path = tmp_path / "splits.json"
  rows = {"train": np.arange(2)}
  stored_splits.save_splits(path, rows, examples)
  path.read_bytes().decode("ascii")
  assert list(stored_splits.load_splits(path, examples)) == ["train"]


def test_a_source_that_is_none_is_refused(tmp_path):
  for source, message in [
    ("", "is empty"),
    (tmp_path / "none.csv", "does not exist"),
    ("synthetic:cells", "the one there is synthetic:tissue"),
    ("synthetic:tissue/none", "no such task"),
    ("synthetic:tissue?colour=1", "no option 'colour'"),
    ("synthetic:tissue?seed=-1", "not a number"),
  ]:
    with pytest.raises(UsageError, match=message):
      open_source(source)


def test_tissue_takes_its_options_from_the_source():
  examples = open_source(
    "synthetic:tissue/density?patients=3&tiles_per_patient=4"
  )
  assert len(examples) == 12 and len(set(examples.groups)) == 3
  assert examples.read(0).shape == (32, 32, 3)
  assert open_source("synthetic:tissue?size=48").read(0).shape == (48, 48, 3)


def test_the_fingerprint_changes_with_the_images_alone(tmp_path):
  """Features are cached under it: equal for equal images, else not.

  Where the images lie and what they are called by is no property of them.
  """
  for i in range(3):
    write_image(tmp_path / "one" / "a" / f"{i}.png", i)
  first = open_source(tmp_path / "one").fingerprint()
  os.rename(tmp_path / "one", tmp_path / "two")
  again = open_source(tmp_path / "two")
  assert again.fingerprint() == first
  os.utime(tmp_path / "two" / "a" / "1.png", ns=(0, 1))
  assert again.fingerprint() != first
  os.remove(tmp_path / "two" / "a" / "1.png")
  missing = again.fingerprint()
  assert missing != first
  assert open_source(tmp_path / "two").fingerprint() != missing


def test_examples_travel_to_another_process(tmp_path):
  write_image(tmp_path / "a" / "1.png", 9)
  examples = pickle.loads(pickle.dumps(open_source(tmp_path)))
  assert (examples.read(0) == 9).all()
  assert examples.fingerprint() == open_source(tmp_path).fingerprint()


def test_many_rows_and_classes(tmp_path):
  """300,000 rows of 10,000 classes: nothing about them is quadratic."""
  rows = (f"{i}.png,c{i % 10_000:05d},p{i // 30}" for i in range(300_000))
  path = _manifest(tmp_path, "path,label,group\n" + "\n".join(rows))
  write_image(tmp_path / "0.png", 5)
  examples = open_source(path)
  assert len(examples) == 300_000 and len(examples.classes) == 10_000
  assert examples.classes[examples.labels[123_456]] == "c03456"


# --- TFDS --------------------------------------------------------------------

# In another process: it must be shown that nothing imports TensorFlow, and a
# registered builder would stay registered.
_PREPARE = """
import pathlib, sys
import tensorflow_datasets as tfds
root = pathlib.Path(sys.argv[1])
class TinyTiles(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    features = tfds.features.FeaturesDict({
      "id": tfds.features.Text(),
      "tile": tfds.features.Image(shape=(None, None, 3)),
      "diagnosis": tfds.features.ClassLabel(names=["tumor", "normal"])})
    return tfds.core.DatasetInfo(builder=self, features=features)
  def _split_generators(self, _):
    return {"train": self._some(range(300)), "validation": self._some([7]),
            "unlabelled": self._some([5])}
  def _generate_examples(self):
    pass
  def _some(self, numbers):
    for i in numbers:
      tile = root / f"{i % 10}.png"
      yield i, {"id": str(i), "tile": tile, "diagnosis": i % 2}
TinyTiles(data_dir=root, file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  for i in range(10):
    write_image(folder / f"{i}.png", i)
  subprocess.run(
    [sys.executable, "-c", _PREPARE, folder],
    check=True,
    capture_output=True,
  )
  return folder


def test_tfds_is_read_without_tensorflow(prepared):
  """Every image holds its own number's last digit, whose parity is its class.

  TFDS stores records in an order of its own.
  """
  examples = open_source("tfds:tiny_tiles", tfds_dir=str(prepared))
  assert examples.classes == ["normal", "tumor"]
  assert len(examples) == 301 and len(set(examples.names)) == 301
  assert examples.splits.count("train") == 300
  assert examples.splits[-1] == "val"
  assert "unlabelled" in examples.notes[0]
  for row in (0, 17, 299, 300):
    digit = int(examples.read(row)[0, 0, 0])
    assert (digit % 2 == 0) == (examples.labels[row] == 1)
  assert int(examples.read(300)[0, 0, 0]) == 7
  other = pickle.loads(pickle.dumps(examples))
  np.testing.assert_array_equal(other.read(17), examples.read(17))
  assert other.fingerprint() == examples.fingerprint()
  assert "tensorflow" not in sys.modules


def test_a_tfds_set_that_is_not_prepared_says_how_to(tmp_path, prepared):
  for name, message in [
    (
      "patch_camelyon",
      "prepare it once:.*tfds-prepare.*tfds build patch_camelyon"
      " --file_format=array_record --data_dir=",
    ),
    ("no_such_tiles", "knows no such data set"),
    ("bad name==", "Parsing"),
  ]:
    with pytest.raises(UsageError, match=message) as caught:
      open_source(f"tfds:{name}", tfds_dir=str(tmp_path))
    assert "\n" not in str(caught.value)
  with pytest.raises(UsageError, match="no such data set"):
    open_source("tfds:tiny_tiles:9.9.9", tfds_dir=str(prepared))


def test_a_tfds_set_in_another_format_says_how_to_prepare_it_again(
  tmp_path, prepared
):
  """The format is what the set's own description says it is."""
  copy = shutil.copytree(prepared, tmp_path / "copy")
  (path,) = copy.rglob("dataset_info.json")
  text = path.read_text()
  assert "array_record" in text
  path.write_text(text.replace("array_record", "tfrecord"))
  with pytest.raises(UsageError, match="prepared as tfrecord.*--overwrite"):
    open_source("tfds:tiny_tiles", tfds_dir=str(copy))


# --- real sets ---------------------------------------------------------------


@pytest.mark.parametrize(
  "name, count, classes, groups",
  [
    ("lc25000_lung", 3025, 3, 145),
    ("crchisto_nuclei4", 6104, 4, 60),
    ("cervical_lbc", 2246, 4, 950),
    ("herlev_pap", 917, 7, 538),
  ],
)
def test_real_sets_have_what_their_readme_says(
  shared, name, count, classes, groups
):
  examples = open_source(shared / "data" / name / "manifest.csv")
  assert len(examples) == count and len(examples.classes) == classes
  assert len(set(examples.groups)) == groups
  for row in range(0, count, count // 7):
    assert examples.read(row).dtype == np.uint8
  folder = open_source(shared / "data" / name)
  labels = dict(zip(folder.names, folder.labels, strict=True))
  assert [labels[n] for n in examples.names] == examples.labels.tolist()
  assert pathlib.Path(examples.names[0]).suffix in sources.SUFFIXES
