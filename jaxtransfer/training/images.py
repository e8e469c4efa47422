"""Training a network on images, as a config describes it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from jaxtransfer import errors, files, inference, parallel, results
from jaxtransfer.data import images as imaging
from jaxtransfer.data import pipeline, preprocess
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.measure import evaluation, scoring
from jaxtransfer.networks import functional
from jaxtransfer.networks.functional import Arrays
from jaxtransfer.networks.network import Network
from jaxtransfer.training import augment, configured, optimisers, steps

HEADS = ("gap", "flatten")
BATCH_NORM = ("train", "train_per_device", "eval", "frozen")


@dataclasses.dataclass(frozen=True)
class Objective:
  """A network's loss on images; the `steps.Objective` of them.

  A batch has image (B, S, S, 3) uint8, row and label (B,) int32 and mask (B,)
  bool; images without mask count for nothing.

  Attributes:
    graph: the network's structure.
    loss: what is made small.
    augmentation: what happens to the images.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    batch_norm: of layers that are trained. "train": statistics of the batch
      over all devices; "train_per_device": of each device's part; "eval" and
      "frozen": the running ones. Layers that are kept have those, too.

  Raises:
    UsageError: a value out of range.
  """

  graph: nnx.GraphDef
  loss: steps.Loss
  augmentation: augment.Augmentation
  mean: Sequence[float]
  std: Sequence[float]
  batch_norm: str

  def __post_init__(self):
    optimisers.check_one_of("batch_norm", self.batch_norm, BATCH_NORM)

  @property
  def sums(self) -> tuple[str, ...]:
    """Names of what it adds up over images."""
    return "loss", "weight", "hits", "decisions"

  @property
  def apart(self) -> bool:
    """Whether each device has running statistics of its own."""
    return self.batch_norm == "train_per_device"

  def inputs(
    self, batch: Mapping[str, jax.Array], key: jax.Array, step: jax.Array
  ) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns pixels, keys and labels, -1 without mask, and weights."""
    keys = augment.keys_of(key, step, batch["row"])
    labels = jnp.where(batch["mask"], batch["label"], -1)
    return (batch["image"], keys, labels), self.loss.weight(labels)

  def __call__(
    self,
    params: Arrays,
    statistics: Arrays,
    inputs: tuple[jax.Array, ...],
    kept: Collection[str],
  ) -> tuple[Arrays, Arrays]:
    """Returns the sums of some images, and the statistics after them."""
    pixels, keys, labels = inputs
    pixels = self.augmentation(pixels, keys)
    x_NHWC = preprocess.preprocess(pixels, self.mean, self.std)
    network = functional.merge(self.graph, params, statistics)
    train = {"train": "data", "train_per_device": True}
    logits = network(
      x_NHWC,
      train=train.get(self.batch_norm, False),
      kept=functional.kept_layers(params, kept),
    )
    there = (labels >= 0).astype(jnp.float32)
    hits, decisions = self.loss.hits(logits, labels)
    sums = {
      "loss": (there * self.loss(logits, labels)).sum(),
      "weight": self.loss.weight(labels).sum(),
      "hits": (there * hits).sum(),
      "decisions": (there * decisions).sum(),
    }
    return sums, functional.split(network)[2]


class Programs(NamedTuple):
  """What is compiled for a task.

  Attributes:
    step: of training, as `parallel.Devices.compile_step` makes it.
    forward: the logits of images, as `inference.compile_forward` makes it.
  """

  step: Callable[..., tuple[steps.State, Arrays]]
  forward: Callable[[functional.Numbers, jax.Array], Any]


class ImageTask:
  """A network, the images it is trained on, and how: a `loop.Task`.

  Args:
    config: the whole config; of it the keys of `configuration.training`.
    data: the images and their division.
    network: as training begins; it is not changed.
    devices: where.
    mean: of each channel, in [0, 1].
    std: of each channel, in [0, 1].
    seed: decides the order of the images and what is random in the steps.
    metric: of validation, by which the epoch is chosen.
    frozen: how many of the network's first layers are not trained.
    backbone: learning rate of all but the head, as a share of the head's; the
      config's by default.
    programs: of a task that differs in its seed and its network's numbers
      alone, so that what was compiled for it serves this one, too.

  Attributes:
    config: as given.
    batches: of the train split, shuffled, of all epochs.
    recipe: what a step does.
    settings: of the loop.
    failures: image -> why it could not be read, of all splits read so far.
    programs: the compiled step, and the compiled network.

  Raises:
    UsageError: a key of the config is out of range.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: Dataset,
    network: Network,
    devices: parallel.Devices,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    metric: str,
    frozen: int = 0,
    backbone: float | None = None,
    programs: "Programs | None" = None,
  ):
    if network.head is None:
      raise errors.UsageError("a network without a head cannot be trained")
    check(config, devices)
    self.config = config
    self._data = data
    self._devices = devices
    self._seed = seed
    self.failures: dict[str, str] = {}
    self.batches = pipeline.Batches(
      data.examples,
      data.rows["train"],
      image_size=config.data.image_size,
      batch_size=config.batch_size,
      workers=config.data.workers,
      shuffle_seed=seed,
      epochs=config.epochs,
      drop_last=True,
      shard=devices.shard,
    )
    self.recipe = configured.recipe(
      config,
      len(self.batches),
      optimisers.layer_rates(
        frozen,
        config.optimiser.backbone if backbone is None else backbone,
        norms=config.batch_norm != "frozen",
      ),
    )
    self.settings = configured.settings(
      config, metric, len(data.rows["train"]), data.examples.unit
    )
    graph, params, statistics = functional.split(network)
    self._start = params, statistics
    self._objective = Objective(
      graph=graph,
      loss=steps.Loss(
        targets=data.targets,
        multilabel=data.multilabel,
        weights=data.class_weights(config.loss.class_weights),
        smoothing=config.loss.label_smoothing,
      ),
      augmentation=augment.Augmentation(**config.augment),
      mean=mean,
      std=std,
      batch_norm=config.batch_norm,
    )
    self.programs = programs or Programs(
      devices.compile_step(steps.make_step(self._objective, self.recipe)),
      inference.compile_forward(graph, inference.logits, devices, mean, std),
    )

  @property
  def trained_params(self) -> int:
    """How many numbers the training may change."""
    params, _ = self._start
    return sum(v.size for name, v in params.items() if self.recipe.rate(name))

  def first_state(self) -> steps.State:
    """Returns the state before the first step."""
    return steps.first_state(
      self._objective, self.recipe, *self._start, self._seed
    )

  def step(self, epoch: int) -> Callable[..., tuple[steps.State, Arrays]]:
    """Returns the compiled step, the same in every epoch."""
    del epoch
    return self.programs.step

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Sends a batch to the devices."""
    return self._devices.put(filled(batch))

  def validate(
    self,
    numbers: functional.Numbers,
    failures: inference.Failures,
    stop: Callable[[], bool],
  ) -> tuple[dict[str, Any], inference.Failures]:
    """Measures numbers on the validation split; see `loop.Task`."""
    with self._batches("val") as batches:
      batches.add_failures(failures)
      rows, logits = self._predict(numbers, batches, stop)
      failures = batches.get_state()["failures"]
    scores = scoring.measure(self._data.outputs(self.config, rows, logits))
    return {**scores.values, "classes": scores.classes}, failures

  def predict(
    self, numbers: functional.Numbers, splits: Sequence[str]
  ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns split -> (N,) rows that could be read and (N, C) logits.

    Args:
      numbers: parameters and statistics.
      splits: which to read.
    """
    numbers = self._devices.replicate(numbers)
    outputs = {}
    for split in splits:
      with self._batches(split) as batches:
        outputs[split] = self._predict(numbers, batches)
    return outputs

  def _predict(
    self,
    numbers: functional.Numbers,
    batches: pipeline.Batches,
    stop: Callable[[], bool] = lambda: False,
  ) -> tuple[np.ndarray, np.ndarray]:
    return inference.read(
      inference.run(
        lambda pixels: self.programs.forward(numbers, pixels),
        batches,
        self._devices,
        stop=stop,
      )
    )

  def _batches(self, split: str) -> "_Reported":
    return _Reported(
      self.config, self._data, split, self._devices, self.failures
    )


def check(config: ml_collections.ConfigDict, devices: parallel.Devices) -> None:
  """Checks the keys that say how to train, before anything is opened.

  Raises:
    UsageError: naming the key.
  """
  optimisers.check_one_of("network.head", config.network.head, HEADS)
  optimisers.check_range(
    "loss.label_smoothing", config.loss.label_smoothing, least=0, below=1
  )
  optimisers.check_range(
    "optimiser.backbone", config.optimiser.backbone, above=0
  )
  configured.check(config, devices)
  augment.Augmentation(**config.augment)


class _Reported(pipeline.Batches):
  """The batches of a split in order; says at its end what was unreadable."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: Dataset,
    split: str,
    devices: parallel.Devices,
    unreadable: dict[str, str],
  ):
    super().__init__(
      data.examples,
      data.rows[split],
      image_size=config.data.image_size,
      batch_size=devices.batch_size(config.batch_size),
      workers=config.data.workers,
      shard=devices.shard,
    )
    self._unreadable_of_run = unreadable
    self._limit = len(data.rows[split]), config.data.max_failures
    # What the run has found so far counts, in whichever pass it was.
    for row in data.rows[split].tolist() if unreadable else ():
      if reason := unreadable.get(data.examples.names[row]):
        self.add_failures([(row, reason)])

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close()
    self._unreadable_of_run |= dict(self.failures)
    # What ends the reading early, SIGTERM for one, is not to be hidden.
    if kind is None:
      pipeline.too_many(self.failures, *self._limit)


def filled(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Puts readable images in the place of those that are not, for BatchNorm.

  Their mask stays False, so they count for nothing in the loss; a black image
  would count in the batch's statistics.

  Args:
    batch: as the pipeline makes it.

  Returns:
    The batch with int32 rows; one without any readable image is as it was.
  """
  image, mask = batch["image"], batch["mask"]
  good, bad = np.flatnonzero(mask), np.flatnonzero(~mask)
  if len(good) and len(bad):
    image = image.copy()
    image[bad] = image[good[np.arange(len(bad)) % len(good)]]
  return {**batch, "image": image, "row": batch["row"].astype(np.int32)}


def card(
  config: ml_collections.ConfigDict,
  data: Dataset,
  evaluated: evaluation.Evaluation,
) -> dict[str, Any]:
  """Returns what a user of the exported network must know of its training.

  Args:
    config: the whole config.
    data: its images.
    evaluated: what it is worth.
  """
  return {
    "head": config.network.head,
    "classes": data.names,
    "multilabel": data.multilabel,
    "image_size": config.data.image_size,
    "resize": imaging.resize_card(config.data.image_size),
    "temperature": evaluated.temperature,
    "metrics": {
      f"{of.split}:{of.metric}": files.finite(of.value)
      for of in evaluated.values
    },
    "operating_points": results.operating_card(
      evaluated.points, config.prevalence, multilabel=data.multilabel
    ),
  }
