"""Eight virtual devices and private caches for every test."""

import atexit
import gc
import importlib.metadata
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


def pytest_configure(config):
  """Lets XLA hurry where a test's programs run for milliseconds.

  What is compiled in half the time and runs half as fast computes the same. The
  slow tests, and one alone, are compiled as users' programs are.
  """
  if config.option.markexpr != "not slow":
    return
  hurry = ["--xla_backend_optimization_level=0"]
  # The newer emitters need twice the time; later versions have no others.
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    hurry.append("--xla_cpu_use_fusion_emitters=false")
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *hurry])


def pytest_collection_finish():
  """Thousands of tests are no garbage: Python need not look at them again."""
  gc.freeze()


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
