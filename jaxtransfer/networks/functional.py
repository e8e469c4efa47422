"""Networks as pure functions: a structure, and the numbers it computes with.

The numbers are flat dicts of arrays, `layers.3.conv1.kernel` to `head.bias`:
parameters, and running statistics. What is done to a parameter in training is
decided by its name there.
"""

from collections.abc import Collection, Iterable
from typing import TypeVar

import jax
from flax import nnx

Arrays = dict[str, jax.Array]
Numbers = tuple[Arrays, Arrays]
M = TypeVar("M", bound=nnx.Module)


def split(module: M) -> tuple[nnx.GraphDef[M], Arrays, Arrays]:
  """Returns a module's structure, parameters and statistics.

  Args:
    module: with values.
  """
  graph, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)
  return graph, _flat(params), _flat(statistics)


def merge(graph: nnx.GraphDef[M], params: Arrays, statistics: Arrays) -> M:
  """Returns the module that `split` split, with these numbers."""
  variables = [
    (_path(name), kind(value))
    for kind, arrays in ((nnx.Param, params), (nnx.BatchStat, statistics))
    for name, value in arrays.items()
  ]
  return nnx.merge(graph, nnx.from_flat_state(variables))


def layer_of(name: str) -> int | None:
  """Returns which of a network's layers a parameter is of; None for none."""
  owner, *inside = name.split(".")
  return int(inside[0]) if owner == "layers" else None


def kept_layers(params: Iterable[str], kept: Collection[str]) -> frozenset[int]:
  """Returns the layers of which every parameter is kept as it is.

  Args:
    params: names of all parameters of a network.
    kept: names of those that are not trained.
  """
  trained = {layer_of(name) for name in params if name not in kept}
  return frozenset(
    layer
    for layer in map(layer_of, kept)
    if layer is not None and layer not in trained
  )


def _flat(state: nnx.State) -> Arrays:
  return {
    ".".join(map(str, path)): variable[...]
    for path, variable in nnx.to_flat_state(state)
  }


def _path(name: str) -> tuple[str | int, ...]:
  return tuple(int(p) if p.isdigit() else p for p in name.split("."))
