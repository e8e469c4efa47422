"""The public names, and what importing them costs."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np

import jaxtransfer as jt


def test_the_public_calls_work_together():
  """A cut network on raw bytes, as the README shows it."""
  model = jt.create_model("resnet18", until="layer1", num_classes=3)
  images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
  x = jt.preprocess(images, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
  assert model(x).shape == (2, 3) and model(x).dtype == jnp.float32
  taps = model.taps(x, at=["layer1.0", "layer1"], pool=False)
  assert {name: tap.shape for name, tap in taps.items()} == {
    "layer1.0": (2, 10, 10, 64),
    "layer1": (2, 10, 10, 64),
  }
  last = jt.list_layers("resnet18")[-1]
  assert last.name == "layer4" and isinstance(last, jt.Layer)
  assert "resnet18" in jt.list_models()


def test_importing_the_package_does_not_import_jax():
  """Decoding processes import it and must start in a moment."""
  code = "import sys, jaxtransfer.data.images; print('jax' in sys.modules)"
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert out.stdout == "False\n"


def test_every_name_is_there():
  """`dir` and `__all__` promise nothing that is missing."""
  assert all(getattr(jt, name) is not None for name in dir(jt))
