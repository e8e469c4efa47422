"""Sources as the tests of this folder open them."""

import pathlib

import ml_collections
import numpy as np
from PIL import Image

from jaxtransfer.data import dataset, sources
from jaxtransfer.data import labels as labelling


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


def divide(
  source: sources.Examples, multilabel: bool = False, **rows: np.ndarray
) -> dataset.Dataset:
  """Returns a dataset whose splits hold everything, but for those given."""
  names, targets = labelling.read_targets(source.classes, multilabel)
  everything = np.arange(len(source))
  rows = {**dict.fromkeys(("train", "val", "test"), everything), **rows}
  return dataset.Dataset(source, rows, names, targets, multilabel)
