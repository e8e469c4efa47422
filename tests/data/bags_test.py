"""Slides from tables and folders of other tools, and what is refused."""

import shutil

import ml_collections
import numpy as np
import pytest

from jaxtransfer import errors
from jaxtransfer.data import bags, sources
from jaxtransfer.data.images import ImageError
from tests.data import slides as making


def config(source, features, max_failures=1.0):
  return ml_collections.ConfigDict(
    {
      "source": str(source),
      "features": features if isinstance(features, str) else str(features),
      "max_failures": max_failures,
    }
  )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp("slides")
  making.write_slides(root, slides=6)
  return root


@pytest.fixture
def copied(made, tmp_path):
  shutil.copytree(made, tmp_path / "copy")
  return tmp_path / "copy"


def test_a_table_and_a_folder_are_slides_with_patients(made):
  opened = sources.open_source(config(made / "labels.csv", made / "features"))
  assert opened.names == [f"slide{i:02d}" for i in range(6)]
  assert opened.groups == [f"patient {i // 2}" for i in range(6)]
  assert opened.classes == ["class 0", "class 1"]
  np.testing.assert_array_equal(opened.labels, [0, 0, 1, 1, 0, 0])
  (encoder,) = opened.encoders
  assert (encoder.name, encoder.channels) == (made.name, making.CHANNELS)
  np.testing.assert_array_equal(encoder.tiles, 3 + np.arange(6) * 7 % 38)
  expected = making.features(3, True, encoder.tiles[3])
  np.testing.assert_array_equal(opened.read(3), expected)
  assert encoder.attributes["patch_size"] == 256
  assert "name" not in encoder.attributes
  assert opened.failures == {} and opened.notes == []


def test_tables_of_clam_and_of_images_are_understood(made, tmp_path):
  """`case_id,slide_id,label`, and a manifest whose paths name the slides."""
  plain = bags.open_bags(config(made / "labels.csv", made / "features"))
  for header, name in (
    (("case_id", "slide_id", "label"), "slide{:02d}"),
    (("patient", "path", "label"), "scans/slide{:02d}.svs"),
    (("group", "path", "label"), "C:\\scans\\slide{:02d}.tiff"),
  ):
    rows = [
      (f"patient {i // 2}", name.format(i), f"class {i // 2 % 2}")
      for i in range(6)
    ]
    making.write_table(tmp_path / "table.csv", [header, *rows])
    opened = bags.open_bags(config(tmp_path / "table.csv", made / "features"))
    assert opened.names == plain.names and opened.groups == plain.groups
  assert bags.bare("TCGA-A1.0b2c") == "TCGA-A1.0b2c"
  assert bags.bare("a/b.ndpi") == "b" and bags.bare(".svs") == ".svs"


@pytest.mark.parametrize(
  ("layout", "folder", "given", "name"),
  [
    ("trident", "job/20x_256px/features_uni", "job/20x_256px", "features_uni"),
    ("clam", "FEATURES_resnet/h5_files", "FEATURES_resnet", "FEATURES_resnet"),
    ("stamp", "stamp-uni", "stamp-uni", "stamp-uni"),
    ("trident", "run/features/r18-im-layer3", "run", "r18-im-layer3"),
  ],
)
def test_folders_of_other_tools_are_found(
  tmp_path, layout, folder, given, name
):
  """Beside the features lie files of coordinates, which are none."""
  table = making.write_slides(tmp_path, 4, layout=layout, folder=folder)
  for beside in ("patches", "coords"):
    path = tmp_path / given / beside / "slide00.h5"
    making.write_file(path, np.zeros((1, 2)))
  (tmp_path / folder / "._slide00.h5").write_bytes(b"of a Mac")
  opened = bags.open_bags(config(table, tmp_path / given))
  (encoder,) = opened.encoders
  assert encoder.name == name
  half = layout == "stamp"
  assert encoder.dtype == (np.float16 if half else np.float32)
  file = encoder.read(0)
  assert file.features.dtype == encoder.dtype
  assert file.unit == ("um" if half else "px") and len(file.coords) == 3
  expected = making.features(0, False, 3)
  np.testing.assert_allclose(file.features, expected, atol=2e-3 * half)


def test_encoders_are_looked_at_on_the_same_slides(tmp_path):
  """One lacks a slide, the other has a broken one; both lose both."""
  table = making.write_slides(tmp_path, 8, folder="one", network="a")
  making.write_slides(tmp_path, 8, folder="two", channels=9, network="b")
  (tmp_path / "one" / "slide02.h5").unlink()
  path = tmp_path / "two" / "slide05.h5"
  path.write_bytes(path.read_bytes()[:-600])
  folders = f"{tmp_path / 'one'},{tmp_path / 'two'}"
  opened = bags.open_bags(config(table, folders))
  assert opened.names == [f"slide{i:02d}" for i in (0, 1, 3, 4, 6, 7)]
  assert [of.channels for of in opened.encoders] == [6, 9]
  assert [of.attributes["network"] for of in opened.encoders] == ["a", "b"]
  for encoder in opened.encoders:
    for row in range(6):
      assert encoder.paths[row].stem == opened.names[row]
      assert len(encoder.read(row).features) == encoder.tiles[row]
  assert set(opened.failures) == {"slide02", "slide05"}
  assert "no slide02.h5 in" in opened.failures["slide02"]
  assert "cut short" in opened.failures["slide05"]
  (note,) = opened.notes
  assert note.startswith("2 of 8 slides with a label are left out")
  with pytest.raises(errors.UnreadableError, match="2 of 8 slides") as error:
    bags.open_bags(config(table, folders, 0.1))
  assert [name for name, _ in error.value.failures] == ["slide02", "slide05"]


def test_folders_of_one_name_are_told_apart(tmp_path):
  for run in ("first", "second"):
    table = making.write_slides(tmp_path, 4, folder=f"{run}/features/uni v1")
  runs = f"{tmp_path / 'first'},{tmp_path / 'second'}"
  opened = bags.open_bags(config(table, runs))
  names = [encoder.name for encoder in opened.encoders]
  assert names == ["uni_v1", "features-uni_v1"]
  with pytest.raises(errors.UsageError, match="there twice"):
    bags.open_bags(config(table, f"{tmp_path / 'first'},{tmp_path / 'first'}"))


def test_what_has_no_label_or_no_features_is_told_and_counted(copied):
  """No tissue, not HDF5, missing; labels of slides that nobody has."""
  (copied / "features" / "slide00.h5").write_text("text")
  making.write_file(
    copied / "features" / "slide01.h5", np.zeros((0, making.CHANNELS), "f4")
  )
  rows = [(f"slide{i:02d}", f"class {i % 2}") for i in range(4)]
  rows += [("slide04", ""), ("nobody", "class 0")]
  table = copied / "labels.csv"
  making.write_table(table, [("slide", "label"), *rows])
  opened = bags.open_bags(config(table, copied / "features"))
  assert opened.names == ["slide02", "slide03"] and opened.groups is None
  reasons = opened.failures
  assert set(reasons) == {"slide00", "slide01", "nobody"}
  assert "not an HDF5 file" in reasons["slide00"]
  assert "no tile" in reasons["slide01"]
  notes = " | ".join(opened.notes)
  assert "1 of 6 slides have no label and are not used: slide04" in notes
  assert "features of 2 slides that have no label are not used" in notes
  assert "3 of 5 slides with a label are left out" in notes


def test_features_that_are_no_numbers_are_never_read(copied):
  path = copied / "features" / "slide02.h5"
  bad = making.features(2, True, 17)
  bad[4, 1], bad[9, 0] = np.nan, np.inf
  making.write_file(path, bad)
  opened = bags.open_bags(config(copied / "labels.csv", copied / "features"))
  with pytest.raises(ImageError, match="2 of 17 tiles hold NaN or infinity"):
    opened.read(2)
  making.write_file(path, bad[:3])
  with pytest.raises(ImageError):
    opened.read(2)
  making.write_file(path, making.features(2, True, 5))
  with pytest.raises(ImageError, match="changed since"):
    opened.read(2)


@pytest.mark.parametrize(
  ("attributes", "channels", "says"),
  [
    ({}, 9, r"slide00.h5 has channels 6, slide03.h5 9"),
    ({"encoder": "uni"}, 6, r"slide00.h5 has encoder conch, slide03.h5 uni"),
    ({"mpp": 0.25}, 6, r"slide00.h5 has mpp 0.5, slide03.h5 0.25"),
  ],
)
def test_two_encoders_in_one_folder_are_refused(
  tmp_path, attributes, channels, says
):
  """Of two widths, or saying so; what rounding changes is the same."""
  about = {"encoder": "conch", "mpp": 0.5}
  table = making.write_slides(tmp_path, 6, **about)
  for i, more in ((2, {"mpp": 0.5001}), (3, attributes)):
    drawn = making.features(i, False, 5, channels if i == 3 else 6)
    path = tmp_path / "features" / f"slide{i:02d}.h5"
    making.write_file(path, drawn, **(about | more))
  with pytest.raises(errors.UsageError, match=says):
    bags.open_bags(config(table, tmp_path / "features"))


def test_mistakes_are_one_line_that_says_where(made, tmp_path):
  table, folder = made / "labels.csv", made / "features"

  def refused(says, source=table, features=folder, kind=errors.UsageError):
    with pytest.raises(kind, match=says) as error:
      bags.open_bags(config(source, features))
    assert "\n" not in str(error.value)

  missing = errors.MissingSourceError
  refused("config.data.source is empty", source="")
  refused("does not exist", source=tmp_path / "no.csv", kind=missing)
  refused("is a folder", source=made, kind=missing)
  refused("config.data.features is empty", features=" , ")
  refused("no folder", features=tmp_path / "no", kind=missing)
  refused("no .h5 file", features=tmp_path)
  (tmp_path / "pt_files").mkdir()
  (tmp_path / "pt_files" / "a.pt").touch()
  refused("h5_files are read, not pt_files", features=tmp_path)
  other = tmp_path / "other.csv"
  making.write_table(other, [("slide", "label"), ("x", "a"), ("y", "b")])
  refused(
    "features of none of the 2 slides; the first is x",
    source=other,
    kind=missing,
  )
  making.write_table(other, [("slide", "label"), ("x", ""), ("y", "")])
  refused("no slide has a label", source=other)
  making.write_table(other, [("slide", "class"), ("x", "a")])
  refused("no column 'label'", source=other)
  rows = [
    ("slide", "label"),
    ("slide00", "a"),
    ("y", "b"),
    ("slide00.svs", "b"),
  ]
  making.write_table(other, rows)
  refused("line 4: the slide slide00 is also in line 2", source=other)
  rows = [("slide", "label", "split"), ("slide00", "a", "training")]
  making.write_table(other, rows)
  refused("line 2: split is 'training'", source=other)


def test_the_fingerprint_is_that_of_every_file(copied):
  about = config(copied / "labels.csv", copied / "features")
  before = bags.open_bags(about).fingerprint()
  assert bags.open_bags(about).fingerprint() == before
  # A slide that is there under two names is the same slide.
  path = copied / "features" / "slide05.h5"
  making.write_file(path, making.features(3, True, 24), "clam")
  opened = bags.open_bags(about)
  digests = [opened.digest(row) for row in range(6)]
  assert digests[3] == digests[5] and len(set(digests)) == 5
  making.write_file(
    copied / "features" / "slide03.h5", making.features(9, True, 24)
  )
  assert bags.open_bags(about).fingerprint() != before


@pytest.mark.parametrize(("mpp", "refused"), [(0.504, False), (0.55, True)])
def test_resolutions_of_one_tiling_may_differ_by_rounding(
  tmp_path, mpp, refused
):
  """As those of TRIDENT's coordinates on slides of two scanners do."""
  table = making.write_slides(tmp_path, 4, mpp=0.5)
  for i in range(2):
    drawn = making.features(i, False, 5)
    path = tmp_path / "features" / f"slide{i:02d}.h5"
    making.write_file(path, drawn, "trident", mpp=mpp)
  config = ml_collections.ConfigDict(
    {
      "source": str(table),
      "features": str(tmp_path / "features"),
      "max_failures": 0.0,
    }
  )
  if refused:
    with pytest.raises(errors.UsageError, match="mpp"):
      bags.open_bags(config)
  else:
    assert len(bags.open_bags(config)) == 4
