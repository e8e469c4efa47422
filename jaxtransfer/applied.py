"""What a handed-over network says of new images, and of new slides."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxtransfer import (
  attention,
  errors,
  exports,
  heatmaps,
  inference,
  parallel,
  predictions,
  preview,
  progress,
)
from jaxtransfer.data import (
  bags,
  buckets,
  labels,
  pipeline,
  sources,
  tiles,
)
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.extraction import encoders, passes, store
from jaxtransfer.report.gallery import Gallery
from jaxtransfer.training import bags as training_bags
from jaxtransfer.weights import bags as weights_bags
from jaxtransfer.weights import catalog, loading

_GIGABYTE = 1e9


class Said(NamedTuple):
  """What a network says of all that could be read.

  Attributes:
    rows: (N,) of the source.
    logits: (N, C) float32.
    failures: name -> why it could not be read.
  """

  rows: np.ndarray
  logits: np.ndarray
  failures: dict[str, str]


def _dataset(
  source: str, examples: sources.Examples, exported: exports.Exported
) -> Dataset:
  """Returns what is to be predicted, with the labels that are known.

  Raises:
    UsageError: a label is none of the network's classes.
  """
  card = exported.card
  try:
    names, targets = labels.read_targets(
      examples.classes, card["multilabel"], card["classes"]
    )
  except errors.UsageError as e:
    raise errors.UsageError(f"{source}: {e}") from None
  notes = list(examples.notes)
  unknown = int(np.isnan(targets[examples.labels]).all(1).sum())
  if 0 < unknown < len(examples):
    notes.append(
      f"{unknown:,} of {len(examples):,} {examples.unit} have no label: they"
      " are predicted, and not scored"
    )
  notes += exports.met_before(exported, examples)
  return Dataset(
    examples,
    {"test": np.arange(len(examples))},
    names,
    targets,
    card["multilabel"],
    notes=notes,
  )


class Images:
  """A network on images, resized, cropped and normalised as in training.

  Args:
    config: the whole config of `predict`.
    exported: the network.
    devices: where.

  Attributes:
    data: the images.
    what: the network is called.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    notes: on the weights.

  Raises:
    UsageError: the images or the network cannot be used.
  """

  unit = "images"
  later = False

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    exported: exports.Exported,
    devices: parallel.Devices,
  ):
    card = exported.card
    for key in ("features", "coords", "slides"):
      if config.data[key]:
        raise errors.UsageError(
          f"config.data.{key} is {config.data[key]!r}, but {exported.path}"
          " reads images and no slides: leave the key out"
        )
    self._devices, self._exported = devices, exported
    # As the pages of images take it.
    self._config = config.copy_and_resolve_references()
    with self._config.unlocked():
      self._config.data.image_size = card["image_size"]
      for key in ("features", "coords", "slides"):
        del self._config.data[key]
    examples = sources.open_source(self._config.data, known=card["classes"])
    self.data = _dataset(config.data.source, examples, exported)
    source = loading.resolve_weights(card["network"], exported.path)
    self._network = loading.create_model(
      card["network"],
      until=card["until"],
      keep_head=True,
      weights=source,
      dtype=jnp.dtype(config.dtype),
    )
    self.mean, self.std, self.notes = source.mean, source.std, source.notes
    self.what = f"{card['network']} cut after {card['until']}"

  def _compute(self) -> Callable[[jax.Array], dict[str, Any]]:
    return inference.place(
      {"": self._network}, inference.logits, self._devices, self.mean, self.std
    )

  def _batches(self) -> pipeline.Batches:
    config = self._config
    return pipeline.Batches(
      self.data.examples,
      self.data.rows["test"],
      image_size=config.data.image_size,
      batch_size=self._devices.batch_size(config.batch_size),
      workers=config.data.workers,
      shard=self._devices.shard,
    )

  def preview(self) -> tuple[preview.Speed, preview.Time, float, list[str]]:
    """Returns speed, time, bytes and the work, of a few batches."""
    compute, count = self._compute(), len(self.data.rows["test"])
    batches = self._batches()
    steps = len(batches)
    speed = preview.measure(
      batches, lambda batch: compute(self._devices.put(batch["image"]))
    )
    return (
      speed,
      speed.of(steps),
      # A line of predictions.csv, and the page.
      count * (80 + 20 * len(self.data.names)) + 2e6,
      [f"1 pass of {self.what} over {count:,} images, on {self._devices}"],
    )

  def predict(self) -> Said:
    """Returns what the network says."""
    with self._batches() as batches:
      rows, found = inference.read(
        inference.run(self._compute(), batches, self._devices)
      )
      return Said(rows, found[""], dict(sorted(batches.failures)))

  def show(self, of: predictions.Predictions) -> dict[str, Any]:
    """Returns what the page shows of single images."""
    shown: list[Gallery] = predictions.show(self._config, [of], "images")
    return {"galleries": shown}


class Slides:
  """A pooling network on slides, whose tiles are encoded as in training.

  Args:
    config: the whole config of `predict`.
    exported: the network.
    devices: where.
    directory: the workdir.

  Attributes:
    data: the slides.
    what: the network is called.
    mean: of each channel, in [0, 1], that the encoder expects.
    std: likewise.
    notes: what the user should know, a line each.

  Raises:
    UsageError: the slides or their features cannot be used, or are others than
      those that the network was trained on.
  """

  unit = "slides"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    exported: exports.Exported,
    devices: parallel.Devices,
    directory: pathlib.Path,
  ):
    self._config, self._exported = config, exported
    self._devices, self._directory = devices, directory
    self.what = exported.called
    self.notes: list[str] = []
    normalisation = exported.card["encoder"].get("normalisation") or {}
    self.mean = normalisation.get("mean") or ()
    self.std = normalisation.get("std") or ()
    if bool(config.data.features) == bool(config.data.coords):
      raise errors.UsageError(
        f"{exported.path} reads slides: give either the features of their"
        " tiles, --config.data.features=FOLDER, or where their tiles are, as"
        " the job tile leaves it, --config.data.coords=WORKDIR"
      )
    self._of_slides = heatmaps.Slides(config.data)
    self._extraction = self._encoding() if config.data.coords else None
    # Of slides that are to be encoded the labels are in their own table.
    self._data = None if self._extraction else self._open(config.data)

  @property
  def later(self) -> bool:
    """Whether the slides are opened once they are encoded."""
    return self._data is None

  @property
  def data(self) -> Dataset:
    """The slides; there once they are encoded."""
    assert self._data is not None
    return self._data

  def _encoding(self) -> passes.Extraction:
    """Returns what encodes the tiles of the slides."""
    config, card = self._config, self._exported.card["encoder"]
    data = config.data.copy_and_resolve_references()
    with data.unlocked():
      data.image_size = card.get("image_size") or 0
    of = tiles.open_tiles(data, config.data.coords)
    given = {"mpp": of.mpp, "tile": of.tile}
    _check_same(card, given, config.data.coords)
    encoder = self._encoder()
    if encoder.weights_sha256 != card.get("weights_sha256") and not self._tuned:
      raise errors.UsageError(
        f"{encoder.source.path or encoder.source.label} holds other weights"
        f" than those that {self._exported.path} was trained with: SHA-256"
        f" {encoder.weights_sha256[:12]}..., not"
        f" {str(card.get('weights_sha256'))[:12]}...; name them with"
        " --config.weights=PATH"
      )
    extraction = passes.Extraction(
      of,
      [encoder],
      self._devices,
      store.Settings(
        batch_size=config.batch_size,
        workers=config.data.workers,
        max_failures=config.data.max_failures,
        dtype="float16",
      ),
      self._directory,
    )
    self.notes += [*of.notes, *encoder.source.notes]
    return extraction

  @property
  def _tuned(self) -> bool:
    return bool(self._exported.card.get("tuned_with_tiles"))

  def _encoder(self) -> encoders.Encoder:
    """Returns the network that made the features of the training."""
    card, config = self._exported.card["encoder"], self._config
    name, cut = card.get("network"), card.get("cut")
    if not name or not cut:
      raise errors.UsageError(
        f"{self._exported.path} was trained on features whose files do not"
        " say which network made them: make those of the new slides in the same"
        " way, and give --config.data.features"
      )
    label = str(card.get("weights") or "random")
    weights: Any = config.weights or label
    if self._tuned:
      weights = self._exported.path.with_name("encoder.safetensors")
    elif not config.weights and label not in ("random", *catalog.names()):
      raise errors.UsageError(
        f"{self._exported.path} reads features of {name} with the weights"
        f" {label}, of a file: say where it is, --config.weights=PATH"
      )
    source = loading.resolve_weights(name, weights)
    network = loading.create_model(
      name,
      until=None if cut.endswith("-relu") else cut,
      weights=source,
      dtype=jnp.dtype(config.dtype),
    )
    return encoders.Encoder(network, source, (encoders.END,))

  def _open(self, data: ml_collections.ConfigDict) -> Dataset:
    """Opens the features of the slides."""
    examples = bags.open_bags(data, self._exported.card["classes"])
    if len(examples.encoders) > 1:
      found = ", ".join(of.name for of in examples.encoders)
      raise errors.UsageError(
        f"config.data.features: {data.features} holds features of several"
        f" encoders ({found}); name the folder of one"
      )
    (encoder,) = examples.encoders
    card, network = self._exported.card, self._exported.card["bags"]
    if encoder.channels != network["channels"]:
      raise errors.UsageError(
        f"{encoder.folder} holds {encoder.channels} features of a tile;"
        f" {self._exported.path} reads {network['channels']}, of"
        f" {card['encoder'].get('name')}"
      )
    if not self._tuned:
      _check_same(card["encoder"], encoder.attributes, str(encoder.folder))
    return _dataset(data.source, examples, self._exported)

  def preview(self) -> tuple[preview.Speed, preview.Time, float, list[str]]:
    """Returns speed, time, bytes and the work, of a few batches."""
    if self._extraction is None:
      encoder = self._bags.encoders[0]
      batches = self._batches()
      steps = len(batches)
      network, _ = weights_bags.load(self._exported.path)
      source = self._source()
      one = buckets.Batches(
        source,
        buckets.Evaluation(self.data.rows["test"], source.tiles),
        names=self.data.examples.names,
        labels=self.data.examples.labels,
        weights=np.ones(len(self.data.names), np.float32),
      )
      program = jax.jit(
        lambda batch: network(
          batch["features"],
          training_bags.mask_of(batch["features"], batch["tiles"]),
        )
      )
      speed = preview.measure(one, program)
      count = float(encoder.tiles.sum())
      return (
        speed,
        speed.of(steps),
        count * 4 * (3 + len(self.data.names)),
        [f"{self.what} on {len(self.data.examples):,} slides"],
      )
    of = self._extraction
    compute, sample = of.compute(), of.sample()
    speed = preview.measure(sample, compute)
    steps = sum(of.batches_of(packet) for packet in of.packets)
    size = sum(output.channels for output in of.outputs) * 2.0 * of.tiles.count
    return (
      speed,
      speed.of(steps),
      size,
      [
        f"{of.tiles.count:,} tiles of {len(of.tiles.bags):,} slides are encoded"
      ],
    )

  @property
  def _bags(self) -> bags.Bags:
    examples = self.data.examples
    assert isinstance(examples, bags.Bags)
    return examples

  def _source(self) -> buckets.Features:
    kept = buckets.Store(self._bags, self._config.data.cache * _GIGABYTE)
    return buckets.Features(kept, 0, self._bags.encoders[0])

  def _batches(self) -> buckets.Batches:
    return buckets.Batches(
      self._source(),
      buckets.Evaluation(
        self.data.rows["test"],
        self._bags.encoders[0].tiles,
        len(self._devices.devices),
      ),
      names=self.data.examples.names,
      labels=self.data.examples.labels,
      weights=np.ones(len(self.data.names), np.float32),
    )

  def encode(self) -> dict[str, str]:
    """Encodes what is to be encoded, and returns slide -> why it could not."""
    if self._extraction is None:
      return {}
    of = self._extraction
    of.store.look()
    of.run()
    (output,) = of.outputs
    data = self._config.data.copy_and_resolve_references()
    with data.unlocked():
      data.features = str(self._directory / "features" / output.folder)
      # What could not be encoded is told by name.
      data.max_failures = 1.0
      if pathlib.Path(data.source).expanduser().is_dir():
        data.source = ""
    self._data = self._open(data)
    return {
      record["name"]: record["reason"]
      for record in of.store.results()
      if record["reason"]
    }

  def predict(self) -> Said:
    """Returns what the network says, and writes it of every tile."""
    failures = {**self.encode(), **self._bags.failures}
    network, about = weights_bags.load(
      self._exported.path, jnp.dtype(self._config.dtype)
    )
    del about["bags"]
    source = self._source()
    rows, logits = [], []
    examples, groups = self._bags, self._bags.groups
    with (
      self._batches() as batches,
      progress.Progress("reading slides", self.unit, len(examples)) as bar,
    ):
      for slide in training_bags.read(network, batches, source, self._devices):
        name = examples.names[slide.row]
        said = {
          **about,
          "slide": name,
          "label": examples.classes[examples.labels[slide.row]],
          "group": None if groups is None else groups[slide.row],
        }
        attention.write(
          attention.path_of(self._directory, self.what, name),
          attention.tiles_of(
            slide, source.file(slide.row), said, about["temperature"]
          ),
        )
        rows.append(slide.row)
        logits.append(slide.logits)
        bar.update()
      failures |= dict(batches.failures)
    if not rows:
      name, reason = next(iter(failures.items()))
      raise errors.RunError(f"no slide could be read; {name}: {reason}")
    order = np.argsort(rows, kind="stable")
    return Said(
      np.array(rows, np.int64)[order], np.stack(logits)[order], failures
    )

  def show(self, of: predictions.Predictions) -> dict[str, Any]:
    """Returns what the page shows of single slides."""
    if not self._config.heatmaps:
      return {}
    known = ~np.isnan(self.data.targets_of(of.rows)).all(1)
    true = np.where(
      known, np.nan_to_num(self.data.targets_of(of.rows)).argmax(1), -1
    )
    chosen = heatmaps.choose(true, of.probabilities, self._config.heatmaps)
    names = [self.data.examples.names[i] for i in of.rows[chosen].tolist()]
    views: Iterator[heatmaps.View] = heatmaps.views(
      self._directory, self.what, names, self._of_slides
    )
    return {"views": views}


def _check_same(trained: dict[str, Any], given: Any, where: str) -> None:
  """Refuses tiles that are others than those that a network was trained on.

  Raises:
    UsageError: it says in what they differ.
  """
  if unlike := bags.unlike(trained, given):
    raise errors.UsageError(
      f"{where} is not what the network was trained on:"
      f" {errors.listed(unlike)}; make it in the same way"
    )
