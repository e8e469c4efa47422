"""Eight virtual devices and a private cache for every test."""

import os
import pathlib
import signal

# Before jax is imported anywhere: the number of devices is fixed at its start.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
