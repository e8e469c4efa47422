"""jaxtransfer: how much of a pretrained network does my task need?"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxtransfer.data.preprocess import preprocess
  from jaxtransfer.networks.zoo import Layer, list_layers, list_models
  from jaxtransfer.weights.loading import create_model

__all__ = ["Layer", "create_model", "list_layers", "list_models", "preprocess"]

_HOMES = {
  "Layer": "jaxtransfer.networks.zoo",
  "create_model": "jaxtransfer.weights.loading",
  "list_layers": "jaxtransfer.networks.zoo",
  "list_models": "jaxtransfer.networks.zoo",
  "preprocess": "jaxtransfer.data.preprocess",
}


def __getattr__(name: str) -> Any:
  # Found when asked for: a decoding process imports this package, and must
  # not pay for JAX.
  if name not in _HOMES:
    raise AttributeError(f"module 'jaxtransfer' has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
  return __all__
