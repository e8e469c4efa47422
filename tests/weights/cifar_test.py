"""The real network: torch's own numbers for real photographs."""

import io
import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxtransfer.weights import loading

SHARED = pathlib.Path(__file__).parents[2].parent / "shared"
WEIGHTS = SHARED / "weights" / "resnet18_cifar10.safetensors"
IMAGES = SHARED / "data" / "cifar10_test.zip"

pytestmark = pytest.mark.skipif(
  not (WEIGHTS.exists() and IMAGES.exists()),
  reason="needs ../shared/weights and ../shared/data/cifar10_test.zip",
)


def card():
  return json.loads(WEIGHTS.with_suffix(".json").read_text())


def decode(archive, name):
  with Image.open(io.BytesIO(archive.read(name))) as image:
    return np.asarray(image.convert("RGB"))


def logits_of(model, source):
  graph, state = nnx.split(model)

  @jax.jit
  def forward(state, images_uint8):
    # The card's preprocessing: bilinear to 64 px with half-pixel centres and
    # no antialiasing, after scaling to [0, 1] and before normalising.
    x_NHWC = images_uint8.astype(jnp.float32) / 255
    x_NHWC = jax.image.resize(
      x_NHWC, (len(x_NHWC), 64, 64, 3), "bilinear", antialias=False
    )
    x_NHWC = (x_NHWC - jnp.array(source.mean)) / jnp.array(source.std)
    return nnx.merge(graph, state)(x_NHWC)

  return lambda images: np.asarray(forward(state, jnp.asarray(images)))


def converted():
  source = loading.resolve_weights("resnet18", WEIGHTS)
  assert source.sha256 == card()["sha256"]
  model = loading.create_model("resnet18", weights=source, keep_head=True)
  return logits_of(model, source)


def test_logits_are_torchs():
  """Same numbers, same photographs: torch printed its logits to 5 digits."""
  expected = card()["logits"]
  with zipfile.ZipFile(IMAGES) as archive:
    names = archive.namelist()
    paths = [next(n for n in names if n.endswith(k)) for k in expected]
    images = np.stack([decode(archive, path) for path in paths])
  found = converted()(images)
  np.testing.assert_allclose(found, list(expected.values()), atol=2e-4)


@pytest.mark.slow
def test_top1_is_torchs():
  """On all 10,000 photographs, to the 0.05 points that rounding may move."""
  forward = converted()
  classes = card()["classes"]
  right = total = 0
  with zipfile.ZipFile(IMAGES) as archive:
    paths = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
    assert len(paths) == card()["test_images"]
    for start in range(0, len(paths), 250):
      batch = paths[start : start + 250]
      labels = [classes.index(path.split("/")[-2]) for path in batch]
      images = np.stack([decode(archive, path) for path in batch])
      right += int((forward(images).argmax(1) == labels).sum())
      total += len(batch)
  top1 = 100 * right / total
  print(
    f"top-1 {top1:.2f} %, torch {card()['test_top1_percent_torch_float32']}"
  )
  assert abs(top1 - card()["test_top1_percent_torch_float32"]) <= 0.05
