"""Files of pooling networks, with what their features must be."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxtransfer import errors
from jaxtransfer.networks import pooling
from jaxtransfer.weights import loading, readers


def export(
  network: pooling.BagNetwork,
  path: str | os.PathLike[str],
  details: Mapping[str, Any] | None = None,
) -> None:
  """Writes a pooling network as safetensors, as torch's Linear has weights.

  Args:
    network: with values.
    path: the `.safetensors` file; a JSON file of the same name is beside it.
    details: what a user of the file must know, for JSON: `classes`, `encoder`,
      `temperature` and the like.

  Raises:
    OSError: it cannot be written.
  """
  about = {"bags": network.settings, **(details or {})}
  loading.write(path, pooling.dump(network), about)


def load(
  path: str | os.PathLike[str], dtype: jnp.dtype = jnp.float32
) -> tuple[pooling.BagNetwork, dict[str, Any]]:
  """Reads a pooling network that `export` wrote.

  Args:
    path: the `.safetensors` file.
    dtype: what it is to compute in.

  Returns:
    The network, and what is said of it.

  Raises:
    UsageError: it is no such file.
  """
  stored = readers.open_checkpoint(path)
  try:
    about = json.loads(stored.metadata["jaxtransfer"])
    network = pooling.BagNetwork(dtype=dtype, **about["bags"])
    pooling.load(network, {n: tensor.read() for n, tensor in stored.items()})
  except (LookupError, TypeError, ValueError) as e:
    raise errors.UsageError(
      f"{path}: not a pooling network of the slides job ({e})"
    ) from None
  return network, about
