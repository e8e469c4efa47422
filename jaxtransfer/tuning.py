"""Encoders trained with the tiles of each slide that count most.

Source: HistoTransfer, Sharma et al., arXiv 2106.07068: a pooling network that
  is trained on frozen features scores all tiles; the highest of every slide are
  kept, once; encoder and pooling network are trained on them, end to end,
  BatchNorm as in inference; then the tiles are encoded again, and all count.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from jaxtransfer import errors, files, heatmaps, parallel
from jaxtransfer.data import (
  bags,
  feature_files,
  preprocess,
  tile_reading,
  tiles,
)
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.images import ImageError
from jaxtransfer.extraction import encoders as encoding
from jaxtransfer.extraction import passes, store
from jaxtransfer.networks import pooling, zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.training import bags as training_bags
from jaxtransfer.weights import catalog, loading

_GIGABYTE = 1e9
# Tiles by which an encoder is compared with the features that are there, and
# how far they may differ, of the largest: float16, and another device's sums.
_COMPARED, _CLOSE = 4, 0.02
_POOLINGS = ("attention", "gated_attention")


class TunedNetwork(nnx.Module):
  """An encoder of tiles and the network of their bag, as one.

  Args:
    encoder: without a head; its running statistics stay as they are.
    bags: reads its features.
    size: side of the tiles, pixels.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
  """

  def __init__(
    self,
    encoder: Network,
    bags: pooling.BagNetwork,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
  ):
    self.encoder, self.bags = encoder, bags
    self.size, self.mean, self.std = size, tuple(mean), tuple(std)

  def encode(self, pixels: jax.Array) -> jax.Array:
    """Returns (B, L, C) float32 features.

    Args:
      pixels: (B, L, S * S * 3) uint8, the tiles of B bags.
    """
    shape = (-1, self.size, self.size, 3)
    x_NHWC = preprocess.preprocess(pixels.reshape(shape), self.mean, self.std)
    return self.encoder(x_NHWC).reshape(*pixels.shape[:2], -1)

  def __call__(
    self, pixels: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> jax.Array:
    """Returns (B, C) logits; `mask` and `keys` as of `pooling.BagNetwork`."""
    return self.bags(self.encode(pixels), mask, keys)

  def read(self, pixels: jax.Array, mask: jax.Array) -> pooling.Read:
    """Returns all that there is to say; arguments as of `__call__`."""
    return self.bags.read(self.encode(pixels), mask)


class TopTiles:
  """The chosen tiles of slides as bags of pixels; a `buckets.Source`.

  Args:
    chosen: row -> (n,) which of the tiles in its feature file.
    encoder: whose feature files.
    of_slides: where the slides are.
    names: of all N slides.
    size: side of a tile, pixels.
    budget: bytes that are kept in memory; the rest is read again.

  Attributes:
    tiles: (N,) int64 of each slide; 1 where none are chosen.
    channels: numbers of a tile.
    dtype: uint8.
  """

  def __init__(
    self,
    chosen: Mapping[int, np.ndarray],
    encoder: bags.Encoder,
    of_slides: Mapping[str, pathlib.Path],
    names: Sequence[str],
    size: int,
    budget: float,
    max_pixels: int,
  ):
    self._chosen, self._encoder = chosen, encoder
    self._slides, self._names = of_slides, names
    self._budget, self._max_pixels = budget, max_pixels
    self._reader = tile_reading.Reader(size)
    self._kept: dict[int, np.ndarray] = {}
    self.tiles = np.ones(len(names), np.int64)
    for row, indices in chosen.items():
      self.tiles[row] = len(indices)
    self.channels, self.dtype = size * size * 3, np.dtype(np.uint8)

  def read(self, row: int) -> np.ndarray:
    """Returns (n, S * S * 3) uint8.

    Raises:
      ImageError: a tile cannot be read, and why.
    """
    if row in self._kept:
      return self._kept[row]
    name, path = self._names[row], self._encoder.paths[row]
    file = self._encoder.read(row)
    if file.coords is None or file.unit != "px":
      raise ImageError(f"{path}: does not say where its tiles are, in pixels")
    coords = file.coords[self._chosen[row]].astype(np.int64)
    try:
      extent = feature_files.read_coords(path).extent
    except feature_files.FeatureFileError as e:
      raise ImageError(str(e)) from None
    read = self._reader[
      tile_reading.Regions(
        str(self._slides[name]), self._max_pixels, coords, extent
      )
    ]
    if reason := read.broken or next(filter(None, read.reasons), ""):
      raise ImageError(f"{self._slides[name]}: {reason}")
    pixels = read.pixels.reshape(len(coords), -1)
    if sum(of.nbytes for of in self._kept.values()) < self._budget:
      self._kept[row] = pixels
    return pixels


@dataclasses.dataclass(frozen=True)
class Frozen:
  """A network as its features were made.

  Attributes:
    encoder: of which feature files.
    network: with values, without a head.
    source: of the values.
    size: side of the tiles, pixels.
  """

  encoder: bags.Encoder
  network: Network
  source: loading.Source
  size: int


class Tuning:
  """What fine-tuning the encoders of a run needs beside their features.

  Args:
    config: the whole config; of it `topk`.
    source: the slides.
    devices: where.

  Raises:
    UsageError: a slide's file is missing, or an encoder cannot be made again.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    source: bags.Bags,
    devices: parallel.Devices,
  ):
    self._config, self._devices, self._bags = config, devices, source
    of_slides = heatmaps.Slides(config.data)
    self._paths = of_slides.paths
    where = config.data.slides or config.data.source
    self._data = ml_collections.ConfigDict(
      {"source": where, "max_pixels": config.data.max_pixels, "image_size": 0}
    )
    if missing := of_slides.missing(source.names):
      raise errors.UsageError(
        f"config.topk.tiles is {config.topk.tiles}, which needs the slides' own"
        f" files, but {where} does not say where {missing[0]} is"
        f" ({len(missing):,} of {len(source):,} are missing); name their folder"
        " or a CSV with the column path: --config.data.slides=..."
      )
    self.frozen = [self._open(encoder) for encoder in source.encoders]

  def _open(self, encoder: bags.Encoder) -> Frozen:
    """Makes the network that made features again."""
    said = encoder.attributes
    name, cut = said.get("network"), said.get("cut")
    if name not in zoo.list_models() or not isinstance(cut, str):
      raise errors.UsageError(
        f"config.topk.tiles is {self._config.topk.tiles}, but the files in"
        f" {encoder.folder} do not say which network and cut made them: encode"
        " the slides with the job extract"
      )
    label = str(said.get("weights") or "random")
    given = self._config.topk.weights
    if not given and label not in ("random", *catalog.names()):
      raise errors.UsageError(
        f"{encoder.folder} was made with the weights {label}, of a file: say"
        " where it is, --config.topk.weights=PATH"
      )
    source = loading.resolve_weights(name, given or label)
    network = loading.create_model(
      name,
      until=None if cut.endswith("-relu") else cut,
      weights=source,
      seed=self._config.seed,
      dtype=jnp.dtype(self._config.dtype),
    )
    size = said.get("image_size") or said.get("tile")
    if not size:
      raise errors.UsageError(
        f"the files in {encoder.folder} do not say how many pixels a tile had"
      )
    return Frozen(encoder, network, source, int(size))

  def check(self) -> None:
    """Encodes a few tiles of the first slide and compares them.

    Raises:
      UsageError: the network is another than that of the features, or the
        slides are.
    """
    for of in self.frozen:
      for row in range(len(self._bags)):
        count = min(_COMPARED, int(of.encoder.tiles[row]))
        try:
          stored = of.encoder.read(row).features[:count]
          pixels = self._tiles(of, {row: np.arange(count)}).read(row)
        except ImageError:
          # Whatever cannot be read is told where it is needed.
          continue
        shape = (count, of.size, of.size, 3)
        x_NHWC = preprocess.preprocess(
          jnp.asarray(pixels.reshape(shape)), of.source.mean, of.source.std
        )
        made = np.asarray(of.network(x_NHWC), np.float32)
        stored = stored.astype(np.float32)
        if (
          made.shape != stored.shape
          or np.abs(made - stored).max() > _CLOSE * np.abs(stored).max()
        ):
          raise errors.UsageError(
            f"{of.network.name} with the weights {of.source.label} does not"
            f" make the features in {of.encoder.folder} out of"
            f" {self._paths[self._bags.names[row]]}: other weights"
            " (config.topk.weights), another seed of random ones, or other"
            " slides (config.data.slides)"
          )
        break

  def _tiles(self, of: Frozen, chosen: Mapping[int, np.ndarray]) -> TopTiles:
    return TopTiles(
      chosen,
      of.encoder,
      self._paths,
      self._bags.names,
      of.size,
      self._config.data.cache * _GIGABYTE,
      self._config.data.max_pixels,
    )

  def settings(self) -> ml_collections.ConfigDict:
    """Returns the config of the second stage: of all keys the same but few."""
    config = self._config.copy_and_resolve_references()
    with config.unlocked():
      config.epochs = config.topk.epochs
      config.optimiser.learning_rate = config.topk.learning_rate
      config.batch_size = config.topk.batch_size
      config.bag_size = 0
      config.patience = min(config.patience, config.topk.epochs)
      config.least_epochs = 0
    return config

  def choose(
    self,
    path: pathlib.Path,
    frozen: training_bags.BagTask,
    numbers: Any,
    splits: Sequence[str],
  ) -> dict[int, np.ndarray]:
    """Returns the tiles of each slide that the first stage scores highest.

    Args:
      path: of the file where they are kept: they are chosen once.
      frozen: the first stage.
      numbers: what it ended with.
      splits: of the slides.

    Returns:
      Row -> (n,) tiles, in the order of its feature file.
    """
    if not path.exists():
      most = self._config.topk.tiles
      top = {
        str(slide.row): np.sort(
          np.argsort(-slide.scores, kind="stable")[:most]
        ).tolist()
        for split in splits
        for slide in frozen.read(numbers, split)
      }
      files.write_json(path, top)
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {int(row): np.array(of, np.int64) for row, of in stored.items()}

  def task(
    self,
    number: int,
    chosen: Mapping[int, np.ndarray],
    data: Dataset,
    head: pooling.BagNetwork,
    seed: int,
    programs: training_bags.Programs | None,
  ) -> training_bags.BagTask:
    """Returns the second stage's training.

    Args:
      number: of the encoder.
      chosen: as `choose` returns it.
      data: the fold, its slides those that have chosen tiles.
      head: the pooling network that the first stage ended with.
      seed: of the order.
      programs: of another fold's.
    """
    of = self.frozen[number]
    network = TunedNetwork(
      of.network, head, of.size, of.source.mean, of.source.std
    )
    return training_bags.BagTask(
      self.settings(),
      data,
      self._tiles(of, chosen),
      network,
      self._devices,
      seed=seed,
      programs=programs,
    )

  def export(
    self, number: int, network: TunedNetwork, path: pathlib.Path
  ) -> None:
    """Writes the trained encoder under torchvision's names.

    Args:
      number: of the encoder.
      network: that was trained.
      path: of the `.safetensors` file.
    """
    of = self.frozen[number]
    attributes = of.encoder.attributes
    kept = ("mpp", "tile", "image_size", "resize")
    about = {key: attributes[key] for key in kept if key in attributes}
    loading.export(network.encoder, path, {**of.source.card(), **about})

  def encode(
    self,
    number: int,
    weights: pathlib.Path,
    rows: np.ndarray,
    directory: pathlib.Path,
  ) -> tuple[bags.Encoder, dict[str, str]]:
    """Encodes all tiles of some slides with a trained encoder.

    What is there already is kept.

    Args:
      number: of the encoder.
      weights: what `export` wrote.
      rows: of the slides.
      directory: where `features/` is to be.

    Returns:
      The encoder of these files (other slides have none), and slide -> why it
      could not be encoded.
    """
    of, config = self.frozen[number], self._config
    until = loading.read_card(weights)["until"]
    source = loading.resolve_weights(of.network.name, weights)
    network = loading.create_model(
      of.network.name,
      until=None if of.network.relu else until,
      weights=source,
      dtype=jnp.dtype(config.dtype),
    )
    data = self._data.copy_and_resolve_references()
    data.image_size = of.size
    every = tiles.open_tiles(data, str(of.encoder.folder))
    names = {self._bags.names[row] for row in rows.tolist()}
    wanted = [bag for bag in every.bags if bag.name in names]
    failures = {
      name: reason for name, reason in every.absent.items() if name in names
    }
    extraction = passes.Extraction(
      dataclasses.replace(every, bags=wanted),
      [encoding.Encoder(network, source, (encoding.END,))],
      self._devices,
      store.Settings(
        batch_size=config.topk.encode_batch_size,
        workers=config.data.workers,
        max_failures=0.0,
        dtype=str(of.encoder.dtype),
      ),
      directory,
    )
    extraction.store.look()
    extraction.run()
    (output,) = extraction.outputs
    paths = list(of.encoder.paths)
    for bag in wanted:
      row = self._bags.names.index(bag.name)
      paths[row] = extraction.store.file(output, bag)
    failures |= {
      record["name"]: record["reason"]
      for record in extraction.store.results()
      if record["name"] in names and record["reason"]
    }
    return (
      dataclasses.replace(
        of.encoder, folder=paths[int(rows[0])].parent, paths=paths
      ),
      failures,
    )


def check(config: ml_collections.ConfigDict, poolings: Sequence[str]) -> None:
  """Checks the keys of `topk`, before anything is opened.

  Args:
    config: the whole config.
    poolings: that are asked for.

  Raises:
    UsageError: naming the key.
  """
  errors.check_range("topk.tiles", config.topk.tiles, least=0, most=4096)
  if not config.topk.tiles:
    return
  if others := [name for name in poolings if name not in _POOLINGS]:
    raise errors.UsageError(
      f"config.topk.tiles is {config.topk.tiles}, but the pooling {others[0]}"
      f" scores no tile; take {' or '.join(_POOLINGS)}"
    )
  for key in ("epochs", "batch_size", "encode_batch_size"):
    errors.check_range(f"topk.{key}", config.topk[key], least=1, most=65_536)
  errors.check_range(
    "topk.learning_rate", config.topk.learning_rate, above=0, below=10
  )
