"""Loads the configs that users start from."""

import importlib.util
import pathlib

import ml_collections

ROOT = pathlib.Path(__file__).parents[2]


def load(name: str, *arguments: str) -> ml_collections.ConfigDict:
  """Returns what configs/<name>.py makes, as the launcher would load it."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"config_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)
