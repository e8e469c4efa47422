"""A network's numbers under torchvision's names and in torch's layout."""

import zlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtransfer.networks.network import Network

_SUFFIXES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def _variables(model: Network) -> Iterator[tuple[str, nnx.Variable]]:
  """Yields (torchvision name, variable), in the network's order."""
  family = model.family
  for name, layer in zip(model.layer_names, model.layers, strict=True):
    module = "" if name in family.bare else f"{name}."
    yield from _under(f"{family.prefix}{module}", layer, family.modules)
  if model.head is not None:
    yield from _under(f"{family.head}.", model.head, {})


def _under(
  prefix: str, module: nnx.Module, modules: Mapping[str, str]
) -> Iterator[tuple[str, nnx.Variable]]:
  for path, variable in nnx.to_flat_state(nnx.state(module)):
    parts = ".".join(map(str, path[:-1]))
    parts = modules.get(parts, parts)
    inside = f"{parts}." if parts else ""
    yield f"{prefix}{inside}{_SUFFIXES[str(path[-1])]}", variable


def shapes(model: Network) -> dict[str, tuple[int, ...]]:
  """Returns {torchvision name: shape in torch's layout} of all it holds."""
  return {
    name: tuple(_permute(variable.shape, to_torch=True))
    for name, variable in _variables(model)
  }


def load(model: Network, tensors: Mapping[str, np.ndarray]) -> None:
  """Gives every variable of a model its value, in place.

  Args:
    model: as `zoo.build` returns it, or one that has values already.
    tensors: {torchvision name: array in torch's layout}; exactly the names
      and shapes of `shapes(model)`, converted to float32 here.

  Raises:
    ValueError: a name is missing or left over, or a shape differs; the model
      is as it was.
  """
  expected = shapes(model)
  if expected.keys() != tensors.keys():
    raise ValueError(
      f"missing {sorted(expected.keys() - tensors.keys())[:3]},"
      f" left over {sorted(tensors.keys() - expected.keys())[:3]}"
    )
  values = {}
  for name, shape in expected.items():
    value = np.asarray(tensors[name])
    if value.shape != shape:
      raise ValueError(f"{name}: shape {value.shape}, expected {shape}")
    order = _permute(range(value.ndim), to_torch=False)
    values[name] = np.ascontiguousarray(
      value.transpose(order), dtype=np.float32
    )
  for name, variable in _variables(model):
    variable.set_value(jnp.asarray(values[name]))


def dump(model: Network) -> dict[str, np.ndarray]:
  """Returns {torchvision name: float32 array in torch's layout}."""
  arrays = {}
  for name, variable in _variables(model):
    value = np.asarray(jax.device_get(variable.get_value()))
    order = _permute(range(value.ndim), to_torch=True)
    arrays[name] = np.ascontiguousarray(value.transpose(order))
  return arrays


def random(model: Network, seed: int) -> dict[str, np.ndarray]:
  """Draws the family's own initial values, as torchvision initialises.

  Every tensor is drawn from a generator seeded by (seed, its name): a cut
  network gets exactly the numbers of the same layers of the whole one.

  Args:
    model: any network; only its shapes are used.
    seed: decides all values.

  Returns:
    {torchvision name: float32 array in torch's layout}.

  Source: the constructors of torchvision.models.resnet (Kaiming normal,
    fan-out) and torchvision.models.densenet (Kaiming normal, fan-in), and
    torch.nn.Linear. CBR's is not published; it gets Kaiming normal, fan-in.
  """
  family = model.family
  values, of_all = {}, shapes(model)
  for name, shape in of_all.items():
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if len(shape) == 4:
      fan = shape[0] if family.fan == "out" else shape[1]
      std = np.sqrt(2 / (fan * shape[2] * shape[3]))
      value = generator.standard_normal(shape) * std
    elif name in family.head_names and (len(shape) == 2 or family.head_bias):
      fan = of_all[family.head_names[0]][1]
      value = generator.uniform(-1, 1, shape) / np.sqrt(fan)
    else:
      # Normalisation begins as the identity, DenseNet's head without bias.
      ones = name.endswith(("weight", "running_var"))
      value = np.full(shape, float(ones))
    values[name] = value.astype(np.float32)
  return values


def _permute(axes, *, to_torch: bool):  # noqa: ANN001, ANN202
  """Reorders four axes HWIO <-> OIHW, two in <-> out; one stays."""
  axes = tuple(axes)
  if len(axes) == 4:
    order = (3, 2, 0, 1) if to_torch else (2, 3, 1, 0)
  else:
    order = tuple(reversed(range(len(axes))))
  return tuple(axes[i] for i in order)
