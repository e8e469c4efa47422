"""Compiles each program of these tests once."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
  """Compiling a step takes seconds, and many tests train the same one."""
  before = {
    name: getattr(jax.config, name)
    for name in (
      "jax_compilation_cache_dir",
      "jax_persistent_cache_min_compile_time_secs",
    )
  }
  cache = tmp_path_factory.getbasetemp() / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
