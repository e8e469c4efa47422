"""Training a pooling network on bags of features, as a config describes it."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from jaxtransfer import inference, parallel
from jaxtransfer.data import buckets, pipeline
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.measure import scoring
from jaxtransfer.networks import functional, pooling
from jaxtransfer.networks.functional import Arrays
from jaxtransfer.training import augment, configured, optimisers, steps

SAMPLING = ("shuffle", "balanced")


@dataclasses.dataclass(frozen=True)
class Objective:
  """A pooling network's loss on bags; the `steps.Objective` of them.

  A batch is as `buckets.Batches` makes it. What a bag's class counts comes with
  the bag and is no part of the program, which all folds share.

  Attributes:
    graph: the network's structure.
    loss: what is made small, all classes counting the same.
  """

  graph: nnx.GraphDef[Any]
  loss: steps.Loss

  @property
  def sums(self) -> tuple[str, ...]:
    """Names of what it adds up over bags."""
    return "loss", "weight", "hits", "decisions"

  @property
  def apart(self) -> bool:
    """Whether devices have running statistics of their own: there are none."""
    return False

  def inputs(
    self, batch: Mapping[str, jax.Array], key: jax.Array, step: jax.Array
  ) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns features, tiles, keys, labels and weights; and the weights."""
    keys = augment.keys_of(key, step, batch["row"])
    weights = batch["weight"]
    labels = jnp.where(batch["mask"], batch["label"], -1)
    return (batch["features"], batch["tiles"], keys, labels, weights), weights

  def __call__(
    self,
    params: Arrays,
    statistics: Arrays,
    inputs: tuple[jax.Array, ...],
    kept: Collection[str],
  ) -> tuple[Arrays, Arrays]:
    """Returns the sums of some bags; there are no statistics."""
    del kept
    features, tiles, keys, labels, weights = inputs
    network = functional.merge(self.graph, params, statistics)
    logits = network(features, mask_of(features, tiles), keys)
    there = (labels >= 0).astype(jnp.float32)
    hits, decisions = self.loss.hits(logits, labels)
    sums = {
      "loss": (weights * self.loss(logits, labels)).sum(),
      "weight": weights.sum(),
      "hits": (there * hits).sum(),
      "decisions": (there * decisions).sum(),
    }
    return sums, statistics


def mask_of(features: jax.Array, tiles: jax.Array) -> jax.Array:
  """Returns (B, L) bool, which tiles of padded bags are there.

  Args:
    features: (B, L, channels).
    tiles: (B,) int32, how many are.
  """
  return jnp.arange(features.shape[1]) < tiles[:, None]


class Programs(NamedTuple):
  """What is compiled for a task, anew for every length of bags alone.

  Attributes:
    step: of training, as `parallel.Devices.compile_step` makes it.
    forward: (numbers, inputs) -> the logits of bags.
    read: (numbers, inputs) -> `pooling.Read` of them.
  """

  step: Callable[..., tuple[steps.State, Arrays]]
  forward: Callable[[functional.Numbers, Any], jax.Array]
  read: Callable[[functional.Numbers, Any], pooling.Read]


class Slide(NamedTuple):
  """What a network says of a slide and of its N tiles.

  Attributes:
    row: of the source.
    logits: (C,) float32.
    attention: (N,) float32, sums to one.
    scores: (N,) float32, before the softmax.
    tiles: (N, C) float32, logits of each tile alone.
  """

  row: int
  logits: np.ndarray
  attention: np.ndarray
  scores: np.ndarray
  tiles: np.ndarray


class BagTask:
  """A pooling network, the slides it is trained on, and how: a `loop.Task`.

  Args:
    config: the whole config; of it the keys of `configuration.optimisation`,
      `bag_size`, `sampling` and `metric`.
    data: the slides and their division; its examples are `bags.Bags`.
    source: what their bags hold.
    network: as training begins, a `pooling.BagNetwork` or one that is called
      and read like it; it is not changed.
    devices: where.
    seed: decides the order of the slides and what is random in the steps.
    programs: of a task with the same network and encoder's type of numbers, so
      that what was compiled for it serves this one, too.

  Attributes:
    config: as given.
    batches: of the train split, of all epochs.
    recipe: what a step does.
    settings: of the loop.
    failures: slide -> why it could not be read.
    programs: what was compiled.

  Raises:
    UsageError: a key of the config is out of range.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    data: Dataset,
    source: buckets.Source,
    network: Any,
    devices: parallel.Devices,
    *,
    seed: int,
    programs: Programs | None = None,
  ):
    check(config, devices)
    self.config = config
    self._data = data
    self._source = source
    self._devices = devices
    self._seed = seed
    self.failures: dict[str, str] = {}
    labels = data.examples.labels
    self.batches = self._batches(
      buckets.Training(
        data.rows["train"],
        source.tiles,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=seed,
        bag_size=config.bag_size,
        balance=labels if config.sampling == "balanced" else None,
      )
    )
    self.recipe = configured.recipe(config, len(self.batches))
    self.settings = configured.settings(
      config, config.metric, len(data.rows["train"]), data.examples.unit
    )
    graph, params, statistics = functional.split(network)
    self._start = params, statistics
    self._objective = Objective(
      graph,
      steps.Loss(
        targets=data.targets,
        multilabel=False,
        weights=np.ones(len(data.names), np.float32),
        smoothing=0.0,
      ),
    )
    self.programs = programs or Programs(
      devices.compile_step(steps.make_step(self._objective, self.recipe)),
      devices.compile(_compute(graph, type(network).__call__)),
      devices.compile(_compute(graph, type(network).read)),
    )

  @property
  def trained_params(self) -> int:
    """How many numbers the training changes."""
    return sum(value.size for value in self._start[0].values())

  def first_state(self) -> steps.State:
    """Returns the state before the first step."""
    return steps.first_state(
      self._objective, self.recipe, *self._start, self._seed
    )

  def merged(self, numbers: functional.Numbers) -> Any:
    """Returns the network with other numbers.

    Args:
      numbers: parameters and statistics, NumPy.
    """
    graph = self._objective.graph
    return functional.merge(graph, *jax.tree.map(jnp.asarray, numbers))

  def step(self, epoch: int) -> Callable[..., tuple[steps.State, Arrays]]:
    """Returns the compiled step, the same in every epoch."""
    del epoch
    return self.programs.step

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Sends a batch to the devices."""
    return self._devices.put(batch)

  def validate(
    self,
    numbers: functional.Numbers,
    failures: inference.Failures,
    stop: Callable[[], bool],
  ) -> tuple[dict[str, Any], inference.Failures]:
    """Measures numbers on the validation split; see `loop.Task`."""
    with self._batches(self._evaluation("val")) as batches:
      batches.add_failures(failures)
      outputs = self._pass(self.programs.forward, numbers, batches, stop)
      rows, logits = _in_order(*inference.read(outputs))
      failures = batches.get_state()["failures"]
    scores = scoring.measure(self._data.outputs(self.config, rows, logits))
    return {**scores.values, "classes": scores.classes}, failures

  def predict(
    self, numbers: functional.Numbers, splits: Sequence[str]
  ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns split -> (n,) rows that could be read and (n, C) logits.

    Args:
      numbers: parameters and statistics.
      splits: which to read.
    """
    numbers = self._devices.replicate(numbers)
    outputs = {}
    for split in splits:
      with self._batches(self._evaluation(split)) as batches:
        outputs[split] = _in_order(
          *inference.read(self._pass(self.programs.forward, numbers, batches))
        )
      self._note(batches, split)
    return outputs

  def read(self, numbers: functional.Numbers, split: str) -> Iterator[Slide]:
    """Yields what there is to say of every slide of a split, all tiles.

    Args:
      numbers: parameters and statistics.
      split: which.
    """
    numbers = self._devices.replicate(numbers)
    with self._batches(self._evaluation(split)) as batches:
      outputs = self._pass(self.programs.read, numbers, batches)
      yield from _slides(outputs, self._source.tiles)
    self._note(batches, split)

  def _pass(
    self,
    program: Callable[[functional.Numbers, Any], Any],
    numbers: functional.Numbers,
    batches: buckets.Batches,
    stop: Callable[[], bool] = lambda: False,
  ) -> Iterator[inference.Outputs]:
    return _run(program, numbers, batches, self._devices, stop)

  def _note(self, batches: buckets.Batches, split: str) -> None:
    self.failures |= dict(batches.failures)
    pipeline.too_many(
      batches.failures,
      len(self._data.rows[split]),
      self.config.data.max_failures,
      self._data.examples.unit,
    )

  def _evaluation(self, split: str) -> buckets.Evaluation:
    return buckets.Evaluation(
      self._data.rows[split], self._source.tiles, len(self._devices.devices)
    )

  def _batches(self, plan: buckets.Plan) -> buckets.Batches:
    return buckets.Batches(
      self._source,
      plan,
      names=self._data.examples.names,
      labels=self._data.examples.labels,
      weights=self._data.class_weights(self.config.loss.class_weights),
    )


def read(
  network: pooling.BagNetwork,
  batches: buckets.Batches,
  source: buckets.Source,
  devices: parallel.Devices,
) -> Iterator[Slide]:
  """Yields what a finished network says of slides.

  Args:
    network: with values.
    batches: of the slides, all tiles.
    source: what these hold.
    devices: where.
  """
  graph, *numbers = functional.split(network)
  program = devices.compile(_compute(graph, pooling.BagNetwork.read))
  numbers = devices.replicate(tuple(numbers))
  yield from _slides(_run(program, numbers, batches, devices), source.tiles)


def _run(
  program: Callable[[functional.Numbers, Any], Any],
  numbers: functional.Numbers,
  batches: buckets.Batches,
  devices: parallel.Devices,
  stop: Callable[[], bool] = lambda: False,
) -> Iterator[inference.Outputs]:
  return inference.run(
    lambda inputs: program(numbers, inputs),
    batches,
    devices,
    inputs=lambda batch: (batch["features"], batch["tiles"]),
    stop=stop,
  )


def _slides(
  outputs: Iterator[inference.Outputs], tiles: np.ndarray
) -> Iterator[Slide]:
  """Yields every slide of batches without its padding."""
  for row, mask, values in outputs:
    for i in np.flatnonzero(mask).tolist():
      count = int(tiles[row[i]])
      yield Slide(
        int(row[i]),
        values.logits[i],
        values.attention.weights[i, :count],
        values.attention.scores[i, :count],
        values.tiles[i, :count],
      )


def _compute(
  graph: nnx.GraphDef[Any],
  function: Callable[[Any, jax.Array, jax.Array], Any],
) -> Callable[[functional.Numbers, tuple[jax.Array, jax.Array]], Any]:
  def compute(
    numbers: functional.Numbers, inputs: tuple[jax.Array, jax.Array]
  ) -> Any:
    network = functional.merge(graph, *numbers)
    return function(network, inputs[0], mask_of(*inputs))

  return compute


def _in_order(
  rows: np.ndarray, logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows that came by length in the order of the source."""
  order = np.argsort(rows, kind="stable")
  return rows[order], logits[order]


def check(config: ml_collections.ConfigDict, devices: parallel.Devices) -> None:
  """Checks the keys that say how to train, before anything is opened.

  Raises:
    UsageError: naming the key.
  """
  optimisers.check_one_of("sampling", config.sampling, SAMPLING)
  optimisers.check_range("bag_size", config.bag_size, least=0)
  configured.check(config, devices)
