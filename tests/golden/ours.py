"""What jaxtransfer computes where `make` has torch's outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxtransfer.networks import tensors, zoo
from tests.golden import draw

CLASSES = 10


def drawn(name: str, seed: int = 0, **options) -> nnx.Module:
  """Returns a network of the zoo with the weights that `draw` draws."""
  model = zoo.build(name, **options)
  tensors.load(model, draw.tensors(tensors.shapes(model), seed))
  return model


def forward(
  name: str, size: tuple[int, int], batch: int, seed: int
) -> dict[str, np.ndarray]:
  """Returns {tap: (N, C, h, w) float32} of all taps, and "logits"."""
  taps = [layer.name for layer in zoo.list_layers(name)]
  graph, state = nnx.split(drawn(name, seed, num_classes=1000))

  @jax.jit
  def run(state, x_NHWC):
    model = nnx.merge(graph, state)
    # XLA computes once what the two calls share.
    return model.taps(x_NHWC, taps, pool=False), model(x_NHWC)

  images_NCHW = draw.images(batch, size, seed)
  found, logits = run(state, images_NCHW.transpose(0, 2, 3, 1))
  # jit hands a dict back with its keys sorted.
  outputs = {tap: np.asarray(found[tap]).transpose(0, 3, 1, 2) for tap in taps}
  return {**outputs, "logits": np.asarray(logits)}


def train(
  name: str, size: int, batch: int, seed: int, rate: float, double: bool
) -> dict[str, np.ndarray]:
  """Returns all tensors after three steps of SGD, and "losses", (3,).

  Args:
    name: of the network.
    size: side of the images in pixels.
    batch: images of a step; every step has its own.
    seed: of weights, images and labels.
    rate: the learning rate; the momentum is 0.9.
    double: in float64.
  """
  with jax.enable_x64(double):
    dtype = jnp.float64 if double else jnp.float32
    model = drawn(name, seed, num_classes=CLASSES, dtype=dtype)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = jax.tree.map(lambda x: x.astype(dtype), (params, rest))
    optimizer = optax.sgd(rate, momentum=0.9)

    def loss_fn(params, rest, x_NHWC, labels):
      model = nnx.merge(graph, params, rest, copy=True)
      logits = model(x_NHWC, train=True)
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return loss.mean(), nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def step(params, rest, moments, x_NHWC, labels):
      (loss, rest), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        params, rest, x_NHWC, labels
      )
      updates, moments = optimizer.update(gradients, moments)
      return optax.apply_updates(params, updates), rest, moments, loss

    moments = optimizer.init(params)
    losses = []
    for i in range(3):
      images_NCHW = draw.images(batch, (size, size), seed + i).astype(dtype)
      x_NHWC = images_NCHW.transpose(0, 2, 3, 1)
      labels = draw.labels(batch, CLASSES, seed + i)
      params, rest, moments, loss = step(params, rest, moments, x_NHWC, labels)
      losses.append(float(loss))
    trained = tensors.dump(nnx.merge(graph, params, rest))
  return {**trained, "losses": np.array(losses)}
