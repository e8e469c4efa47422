"""Slides with labels, coordinates and features, small and whole."""

import pathlib

import numpy as np
import pytest

from jaxtransfer import workdir
from jaxtransfer.data import feature_files
from jaxtransfer.jobs import extract
from tests.data import slide_files
from tests.extraction import drawn
from tests.jobs import configs

SLIDES = 12


def write(root: pathlib.Path) -> pathlib.Path:
  """Writes twelve slides of six patients; those of one class have a bright
  patch. Their features are those of a small network with random weights.

  Returns:
    The root: slides.csv, slides/, coords/ and features/, a run of extract.
  """
  (root / "slides").mkdir()
  rows = ["path,label,group"]
  for i in range(SLIDES):
    pixels = (drawn.pixels(i) * 0.4).astype(np.uint8)
    patient = i // 2
    if patient % 2:
      pixels[64:128, 96:160] = 250
    name = f"s{i:02d}"
    path = root / "slides" / f"{name}.tiff"
    slide_files.write_pyramid(path, [pixels], drawn.MPP)
    x, y = np.meshgrid(range(0, 320, 64), range(0, 320, 64))
    corners = np.stack([x.ravel(), y.ravel()], 1)[: 25 - i % 3]
    feature_files.write_coords(
      root / "coords" / f"{name}.h5", drawn.coords(corners)
    )
    rows.append(
      f"slides/{name}.tiff,{['a', '<b>b</b>'][patient % 2]},p{patient}"
    )
  (root / "slides.csv").write_text("\n".join(rows) + "\n")
  config = configs.load("extract", "cbr_tiny")
  config.update_from_flattened_dict(
    {
      "data.source": str(root / "slides.csv"),
      "coords": str(root / "coords"),
      "network.weights": "",
      "taps": "block1",
      "features_dtype": "float32",
    }
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXTRANSFER_CACHE", str(root / "cache"))
    with workdir.claim(
      root / "features", config.to_dict(), "the command", shared=True
    ) as claimed:
      assert extract.run(config, claimed) == 0
  return root
