"""What a run says of single tiles: `attention/`, a file for each slide."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtransfer.data import feature_files, hdf5
from jaxtransfer.measure import scoring
from jaxtransfer.training import bags

_ARRAYS = ("attention", "scores", "probabilities")


@dataclasses.dataclass(frozen=True)
class Tiles:
  """What a network says of the N tiles of a slide.

  Attributes:
    attention: (N,) float32, what each counts; they sum to one.
    scores: (N,) float32, what that comes from: before the softmax, so that
      tiles of different slides compare.
    probabilities: (N, C) float32, of each class, of a slide that would be this
      tile alone; with the temperature.
    coords: (N, 2) top left corners, or None.
    attributes: of the slide: `slide`, `label`, `group`, `classes`,
      `probabilities`; of the network: `encoder`, `pooling`, `fold`, `seed`,
      `temperature`; of the tiles what the feature file says: `unit`, `extent`,
      `mpp` ...
  """

  attention: np.ndarray
  scores: np.ndarray
  probabilities: np.ndarray
  coords: np.ndarray | None
  attributes: dict[str, Any]


def tiles_of(
  slide: bags.Slide,
  file: feature_files.FeatureFile,
  about: Mapping[str, Any],
  temperature: float,
) -> Tiles:
  """Returns what there is to keep of a slide.

  Args:
    slide: what the network says.
    file: the features that it read.
    about: what else is to be kept of slide and network.
    temperature: that logits are divided by.
  """

  def probabilities(logits: np.ndarray) -> np.ndarray:
    return scoring.probabilities(
      logits, multilabel=False, temperature=temperature
    )

  return Tiles(
    slide.attention,
    slide.scores,
    probabilities(slide.tiles),
    file.coords,
    {
      **about,
      "probabilities": probabilities(slide.logits[None])[0].tolist(),
      "unit": file.unit,
      "extent": file.extent,
      "features": file.attributes,
    },
  )


def write(path: str | os.PathLike[str], tiles: Tiles) -> None:
  """Writes `attention`, `scores`, `probabilities` and `coords` as HDF5.

  Args:
    path: the file; it appears whole or not at all.
    tiles: what is written; the attributes are the file's.

  Raises:
    OSError: it cannot be written.
  """
  with hdf5.writing(path) as f:
    for name in _ARRAYS:
      f[name] = np.asarray(getattr(tiles, name), np.float32)
    if tiles.coords is not None:
      f["coords"] = tiles.coords
    # Classes and slides may be called anything, "None" or "[1]" too.
    f.attrs["about"] = json.dumps(tiles.attributes)


def read(path: str | os.PathLike[str]) -> Tiles:
  """Reads what `write` wrote.

  Raises:
    FeatureFileError: it is no such file, or is not whole.
  """
  try:
    with hdf5.reading(path) as f:
      arrays: dict[str, Any] = {}
      for name in (*_ARRAYS, "coords"):
        stored = hdf5.dataset(f, name)
        if stored is None and name in _ARRAYS:
          raise hdf5.Refused(f"is no file of attention: there is no {name}")
        arrays[name] = None if stored is None else stored[()]
      return Tiles(**arrays, attributes=json.loads(f.attrs["about"]))
  except hdf5.Refused as e:
    raise feature_files.FeatureFileError(f"{path}: {e}") from None


def path_of(directory: pathlib.Path, network: str, slide: str) -> pathlib.Path:
  """Returns the place of a slide's file in a workdir.

  Args:
    directory: the workdir.
    network: what the encoder, with its pooling, is called.
    slide: its name.
  """
  return directory / "attention" / network / f"{slide}.h5"
