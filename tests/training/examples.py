"""A small network, a recipe and batches, for the tests of training."""

import jax.numpy as jnp
import numpy as np

from jaxtransfer.networks import functional, tensors, zoo
from jaxtransfer.training import augment, images, optimisers, steps


def network(until="stem", num_classes=3, dtype=jnp.float32, flatten=None):
  built = zoo.build(
    "resnet18",
    until=until,
    num_classes=num_classes,
    dtype=dtype,
    flatten=flatten,
  )
  tensors.load(built, tensors.random(built, 0))
  return built


def loss(num_classes=3, smoothing=0.0):
  return steps.Loss(
    targets=np.eye(num_classes, dtype=np.float32),
    multilabel=False,
    weights=np.ones(num_classes, np.float32),
    smoothing=smoothing,
  )


def optimiser(**changes):
  settings = {
    "name": "sgd",
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
  }
  return optimisers.Optimiser(**{**settings, **changes})


def augmentation(**changes):
  settings = {
    "crop": 1.0,
    "flip_horizontal": False,
    "flip_vertical": False,
    "quarter_turns": False,
    "stain": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
  }
  return augment.Augmentation(**{**settings, **changes})


def recipe(frozen=0, backbone=1.0, norms=True, **changes):
  settings = {
    "optimiser": optimiser(),
    "schedule": lambda step: jnp.ones(()),
    "rate": optimisers.layer_rates(frozen, backbone, norms=norms),
    "accumulate": 1,
    "average": 0.0,
  }
  return steps.Recipe(**{**settings, **changes})


def objective(network, **changes):
  settings = {
    "loss": loss(),
    "augmentation": augmentation(),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "batch_norm": "train",
  }
  graph, _, _ = functional.split(network)
  return images.Objective(graph, **{**settings, **changes})


def first_state(network, recipe, seed=1):
  _, *numbers = functional.split(network)
  return steps.first_state(objective(network), recipe, *numbers, seed)


def batch(number, size=16, side=16, masked=0):
  """The numbered batch: random images and labels, the last ones masked."""
  rng = np.random.default_rng(number)
  return {
    "image": rng.integers(0, 256, (size, side, side, 3), np.uint8),
    "row": rng.permutation(1000)[:size].astype(np.int32),
    "label": rng.integers(0, 3, size).astype(np.int32),
    "mask": np.arange(size) < size - masked,
  }
