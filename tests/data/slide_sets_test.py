"""Slides are found, named once each, and known again."""

import shutil

import ml_collections
import numpy as np
import pytest
from PIL import Image

from jaxtransfer.data import slide_sets
from jaxtransfer.errors import MissingSourceError, UsageError
from tests.data import slide_files


def _open(source):
  config = {"source": str(source), "max_pixels": 10**6}
  return slide_sets.open_slides(ml_collections.ConfigDict(config))


def _touch(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(name.encode())


def test_a_folder_has_its_slides_and_those_below(tmp_path):
  """Hidden files, the data of MRXS and pictures beside slides are none."""
  _touch(
    tmp_path,
    "b.svs",
    "deep/er/a.NDPI",
    "c.mrxs",
    "c/Data0001.dat",
    "c/preview.tif",
    "overview.png",
    ".hidden.svs",
    ".cache/x.svs",
    "notes.txt",
  )
  found = _open(tmp_path)
  assert found.names == ["a", "b", "c"]
  assert found.paths[0] == tmp_path / "deep/er/a.NDPI"
  assert found.labels == found.groups == ["", "", ""]
  assert found.mpp == found.masks == [None] * 3
  (note,) = found.notes
  assert "1 pictures" in note and ".png (1)" in note


def test_pictures_are_slides_where_there_is_nothing_else(tmp_path):
  _touch(tmp_path, "b.png", "a.jpg")
  assert _open(tmp_path).names == ["a", "b"]
  assert _open(tmp_path / "a.jpg").names == ["a"]


def test_names_are_as_short_as_they_can_be_and_each_once(tmp_path):
  _touch(
    tmp_path, "x/1.svs", "y/1.svs", "y/2.svs", "2.svs", "2.tiff", "x-1.svs"
  )
  names = _open(tmp_path).names
  assert len(set(names)) == 6
  assert set(names) >= {"y-1", "x-1"}
  assert not any("/" in name for name in names)


def test_files_of_one_dicom_series_are_one_slide(tmp_path):
  def dicom(name, uid):
    data = b"\0" * 128 + b"DICM"
    data += b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little")
    (tmp_path / name).write_bytes(data + uid + b"\0" * 50)

  dicom("level-0.dcm", b"1.2.3.40")
  dicom("level-1.dcm", b"1.2.3.40")
  dicom("other.dcm", b"1.2.3.41")
  _touch(tmp_path, "text.dcm")
  assert _open(tmp_path).names == ["level-0", "other", "text"]


def test_a_manifest_says_what_is_known(tmp_path):
  _touch(tmp_path, "a.svs", "b/c.svs", "mask.png")
  (tmp_path / "m.csv").write_text(
    "Path,label,group,mpp,mask,site,extra\n"
    "a.svs,tumour,p1,0.5,mask.png,north,1\n"
    "b/c.svs,,,,,,2\n"
    "gone.svs,normal,p2,,,,3\n"
  )
  found = _open(tmp_path / "m.csv")
  assert found.names == ["a", "c", "gone"]
  assert found.labels == ["tumour", "", "normal"]
  assert found.groups == ["p1", "", "p2"]
  assert found.mpp == [0.5, None, None]
  assert found.masks == [tmp_path / "mask.png", None, None]
  assert found.sites == ["north", "", ""]
  assert found.notes == [f"{tmp_path / 'm.csv'}: columns not used: extra"]


def test_the_column_slide_is_a_path_or_beside_one_a_name(tmp_path):
  _touch(tmp_path, "a.svs", "b.svs")
  path = tmp_path / "m.csv"
  path.write_text("slide\na.svs\nb.svs\n")
  assert _open(path).names == ["a", "b"]
  path.write_text("path,slide\na.svs,S1\nb.svs,S2\n")
  assert _open(path).names == ["S1", "S2"]


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("file,label\na.svs,x\n", "no column 'path' or 'slide'"),
    ("path,path\na.svs,a.svs\n", "'path' is there twice"),
    ("path\n", "no rows"),
    ("path,label\na.svs\n", "line 2: 1 cells, the header has 2"),
    ("path,label\n,x\n", "line 2: empty path"),
    ("path\na.svs\n./a.svs\n", "line 3: a.svs is also in line 2"),
    ("path,slide\na.svs,s\nb.svs,s\n", "line 2: slide is 's'"),
    ("path,slide\na.svs,x/s\nb.svs,s\n", "without /"),
    ("path,mpp\na.svs,20x\n", "line 2: mpp is '20x'"),
    ("path,mpp\na.svs,352.8\n", "from 0.02 to 20"),
    ("path,mask\na.svs,m.png\n", "there is no mask"),
  ],
)
def test_a_mistake_in_a_manifest_is_told_with_its_line(tmp_path, text, says):
  _touch(tmp_path, "a.svs", "b.svs")
  path = tmp_path / "m.csv"
  path.write_text(text)
  with pytest.raises(UsageError, match=says) as e:
    _open(path)
  assert str(path) in str(e.value)


def test_what_is_not_there_is_told(tmp_path):
  with pytest.raises(MissingSourceError, match="does not exist"):
    _open(tmp_path / "no")
  with pytest.raises(UsageError, match="is empty"):
    _open("")
  with pytest.raises(UsageError, match="synthetic:tissue"):
    _open("synthetic:tissue")
  _touch(tmp_path, "a.txt")
  with pytest.raises(UsageError, match=r"no slides .* \.txt \(1\)"):
    _open(tmp_path)
  (tmp_path / "m.csv").write_text("path\nC:\\x\\a.svs\n")
  with pytest.raises(MissingSourceError, match="Windows path"):
    _open(tmp_path / "m.csv")


def test_the_manifest_is_believed_before_the_file_and_the_default(tmp_path):
  pixels = slide_files.level(100, 100)
  slide_files.write_pyramid(tmp_path / "says.tiff", [pixels], 0.25)
  slide_files.write_pyramid(tmp_path / "silent.tiff", [pixels], None)
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "p.png")
  shutil.copy(tmp_path / "says.tiff", tmp_path / "other.tiff")
  (tmp_path / "m.csv").write_text(
    "path,mpp\nsays.tiff,\nsilent.tiff,\nother.tiff,1\n"
  )
  found = _open(tmp_path / "m.csv")
  assert found.open(0, 0.7).mpp == pytest.approx(0.25)
  assert found.open(1, 0.7).mpp == 0.7
  assert found.open(1).mpp is None
  assert found.open(2, 0.7).mpp == 1


def test_slides_are_known_again_by_their_content(tmp_path):
  """A copy is the same; one that was changed, anywhere it is looked at, not."""
  folder = tmp_path / "slides"
  _touch(folder, "a.svs", "b.svs", "c.mrxs", "c/Slidedat.ini")
  (folder / "long.svs").write_bytes(bytes(300_000))
  before = _open(folder).identities()
  shutil.copytree(folder, tmp_path / "copy")
  assert _open(tmp_path / "copy").identities() == before
  assert len(set(before)) == 4

  (folder / "c/Slidedat.ini").write_bytes(b"other")
  data = bytearray((folder / "long.svs").read_bytes())
  data[-9] = 1
  (folder / "long.svs").write_bytes(data)
  after = _open(folder).identities()
  changed = [old != new for old, new in zip(before, after, strict=True)]
  assert changed == [False, False, True, True]
  _touch(tmp_path, "mask.png", "m.csv")
  path = folder / "a.svs"
  assert (
    len(
      {
        slide_sets.identity(path),
        slide_sets.identity(path, 0.5),
        slide_sets.identity(path, mask=tmp_path / "mask.png"),
        slide_sets.identity(tmp_path / "gone.svs"),
      }
    )
    == 4
  )
