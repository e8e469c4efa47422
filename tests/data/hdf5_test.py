"""HDF5 files that appear whole or not at all."""

import gc
import resource

import h5py
import numpy as np
import pytest

from jaxtransfer.data import hdf5


def _write(path):
  with hdf5.writing(path) as f:
    f["x"] = np.arange(5000)
    f.create_dataset("y", data=np.ones((100, 3)), compression="gzip")


@pytest.mark.parametrize("room", [0, 100, 1000, 30_000])
def test_a_full_disk_leaves_what_was_there(tmp_path, capfd, room):
  """HDF5 has addresses in its errors, and ends the process when it cannot close
  its file: the system's error names the file, which is as it was."""
  path = tmp_path / "sub" / "a.h5"
  _write(path)
  before = path.read_bytes()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
  try:
    with pytest.raises(OSError, match="File too large") as raised:
      _write(path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert raised.value.filename == str(path)
  gc.collect()
  assert "h5" not in capfd.readouterr().err
  assert [p.name for p in path.parent.iterdir()] == ["a.h5"]
  assert path.read_bytes() == before


def test_a_file_is_not_there_before_it_is_whole(tmp_path):
  """And never, where what fills it fails."""
  path = tmp_path / "a.h5"
  with pytest.raises(KeyError), hdf5.writing(path) as f:
    f["x"] = 1
    assert not path.exists()
    raise KeyError
  assert not list(tmp_path.iterdir())
  _write(path)
  with h5py.File(path) as f:
    np.testing.assert_array_equal(f["x"][:], np.arange(5000))
    assert f["y"][:].sum() == 300
