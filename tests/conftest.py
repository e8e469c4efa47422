"""Eight virtual devices and private caches for every test."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile

# Before jax is imported anywhere: the number of devices is fixed at its start.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests train or cut the same small network: each program is compiled once
# by this run, whichever of its workers comes first.
if "PYTEST_XDIST_WORKER" not in os.environ:
  _programs = tempfile.mkdtemp(prefix="jaxtransfer-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  atexit.register(shutil.rmtree, _programs, ignore_errors=True)

import pytest  # noqa: E402

# A runner started in the background may ignore Ctrl-C, and so would every
# program that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> pathlib.Path:
  """Real data and weights kept beside the repository, where there are any."""
  if not _SHARED.exists():
    pytest.skip("needs the real data sets beside the repository")
  return _SHARED


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
  """Keeps tests out of the user's own cache."""
  cache = tmp_path_factory.getbasetemp() / "cache"
  monkeypatch.setenv("JAXTRANSFER_CACHE", str(cache))
