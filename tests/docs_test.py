"""The code in docs/ does what it says there."""

import os
import pathlib
import re
import runpy
import subprocess

import numpy as np
import pytest

from jaxtransfer import jobs
from jaxtransfer.data import preprocess
from jaxtransfer.networks import pooling
from jaxtransfer.weights import bags as weights_bags
from jaxtransfer.weights import loading

DOCS = pathlib.Path(__file__).parents[1] / "docs"

# torchvision's wheel for CUDA, beside a CPU build of torch, lacks only these
# declarations; no network here calls it.
_PRELUDE = """
import numpy, torch
if not torch.cuda.is_available():
  library = torch.library.Library("torchvision", "DEF")
  boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
  library.define(f"nms{boxes}")
  library.define(f"qnms{boxes}")
"""


@pytest.mark.parametrize("until", ["stem", "layer2.0", "layer3"])
def test_torch_reads_an_exported_network_as_the_page_says(tmp_path, until):
  """The page's own code, on random pixels in place of its zeros, gives our
  logits."""
  torch = os.environ.get("JAXTRANSFER_TORCH_PYTHON")
  if not torch:
    pytest.skip("JAXTRANSFER_TORCH_PYTHON names no interpreter with torch")
  model = loading.create_model("resnet18", until=until, num_classes=3, seed=1)
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
  loading.export(
    model,
    tmp_path / "runs" / "truncate" / "export" / "model.safetensors",
    {"mean": mean, "std": std, "image_size": 64, "temperature": 1.5},
  )
  pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
  np.save(tmp_path / "pixels.npy", pixels)
  text = (DOCS / "truncate.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  zeros = re.search(r"^pixels = .*$", code, re.M)[0]
  ours = (
    'pixels = torch.from_numpy(numpy.load("pixels.npy") / numpy.float32(255))'
    ".permute(0, 3, 1, 2)"
  )
  script = _PRELUDE + code.replace(zeros, ours)
  script += 'numpy.save("logits.npy", logits.numpy())\n'
  subprocess.run([torch, "-c", script], cwd=tmp_path, check=True)
  expected = np.asarray(model(preprocess.preprocess(pixels, mean, std)))
  found = np.load(tmp_path / "logits.npy")
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["attention", "gated_attention"])
def test_torch_computes_what_an_exported_pooling_network_does(tmp_path, kind):
  """The page's own code, of random features in place of its zeros."""
  torch = os.environ.get("JAXTRANSFER_TORCH_PYTHON")
  if not torch:
    pytest.skip("JAXTRANSFER_TORCH_PYTHON names no interpreter with torch")
  network = pooling.BagNetwork(
    6, 3, pooling=kind, embedding=(9, 5), attention=4, dropout=0.5
  )
  pooling.randomise(network, 0)
  weights_bags.export(
    network, tmp_path / "runs" / "slides" / "export" / "model.safetensors"
  )
  features = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
  np.save(tmp_path / "features.npy", features)
  (code,) = re.findall(
    r"```python\n(.*?)```", (DOCS / "slides.md").read_text(), re.DOTALL
  )
  zeros = re.search(r"^features = .*$", code, re.M)[0]
  code = code.replace(
    zeros, 'import numpy\nfeatures = torch.tensor(numpy.load("features.npy"))'
  )
  code += 'numpy.save("said.npy", logits.numpy())\n'
  subprocess.run([torch, "-c", code], cwd=tmp_path, check=True)
  expected = network(features[None], np.ones((1, 7), bool))[0]
  np.testing.assert_allclose(
    np.load(tmp_path / "said.npy"), expected, atol=1e-6
  )


def test_every_link_leads_somewhere():
  for page in DOCS.glob("*.md"):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
      if not target.startswith("http"):
        assert (DOCS / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("job", jobs.JOBS)
def test_every_key_of_a_config_is_told(job):
  """In the page of its job, or in finetune.md, which tells the shared ones."""
  path = DOCS.parent / "configs" / f"{job}.py"
  config = runpy.run_path(str(path))["get_config"]()
  text = (DOCS / "finetune.md").read_text() + (DOCS / f"{job}.md").read_text()
  told = set(re.findall(r"`(?:config\.)?(?:\w+\.)?(\w+)`", text))
  assert set(_leaves(config)) - told == {"job"}


def _leaves(config):
  for key, value in config.items():
    if hasattr(value, "items"):
      yield from _leaves(value)
    else:
      yield key
