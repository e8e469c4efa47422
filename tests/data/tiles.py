"""Sources as the tests of this folder open them."""

import pathlib

import ml_collections
import numpy as np
from PIL import Image

from jaxtransfer.data import sources


def open_source(source: str | pathlib.Path, **options) -> sources.Examples:
  """Opens a source, other keys of `config.data` as given."""
  settings = {
    "source": str(source),
    "task": "",
    "image_size": 32,
    "max_pixels": 10**6,
    "tfds_dir": "",
    **options,
  }
  return sources.open_source(ml_collections.ConfigDict(settings))


def write_image(path: pathlib.Path, value: int) -> None:
  """Writes eight pixels square of one grey."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
