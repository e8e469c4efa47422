"""Writes the torch files beside it; run once, with torch.

python tests/weights/data/make.py
"""

import argparse
import collections
import pathlib
import sys
import types

import torch

HERE = pathlib.Path(__file__).parent


def ramp(*shape, dtype=torch.float32):
  count = torch.tensor(shape).prod().item()
  return (torch.arange(count, dtype=torch.float64) / 8).to(dtype).view(shape)


def tensors():
  shared = ramp(4, 6)
  return collections.OrderedDict(
    {
      "plain": ramp(2, 3),
      "transposed": ramp(2, 3).t(),
      "rows": shared[1:3],
      "columns": shared[:, ::2],
      "flat": shared.view(-1)[5:9],
      "scalar": torch.tensor(2.5),
      "empty": torch.zeros(0, 3),
      "double": ramp(3, dtype=torch.float64),
      "half": ramp(3, dtype=torch.float16),
      "bfloat16": ramp(3, dtype=torch.bfloat16),
      "int64": torch.arange(3),
      "bool": torch.tensor([True, False]),
      "parameter": torch.nn.Parameter(ramp(2, 2)),
    }
  )


def lightning():
  """A checkpoint that torch cannot load without pytorch_lightning."""
  names = ["pytorch_lightning", "pytorch_lightning.callbacks"]
  modules = [types.ModuleType(name) for name in names]
  sys.modules.update(zip(names, modules, strict=True))

  class ModelCheckpoint:
    pass

  ModelCheckpoint.__module__ = "pytorch_lightning.callbacks"
  ModelCheckpoint.__qualname__ = "ModelCheckpoint"
  modules[1].ModelCheckpoint = ModelCheckpoint
  return {
    "epoch": 3,
    "callbacks": {ModelCheckpoint: {"best": torch.tensor(0.5)}},
    "hyper_parameters": argparse.Namespace(lr=0.1, path=HERE.name),
    "state_dict": {"model.resnet.conv1.weight": ramp(2, 3)},
    "optimizer_states": [{"state": {0: {"exp_avg": ramp(2, 3)}}}],
  }


if __name__ == "__main__":
  torch.save(tensors(), HERE / "zip.pth")
  torch.save(
    {"state_dict": tensors()},
    HERE / "legacy.pth",
    _use_new_zipfile_serialization=False,
  )
  torch.save(lightning(), HERE / "lightning.ckpt")
  torch.save(torch.nn.Linear(2, 2), HERE / "module.pth")
