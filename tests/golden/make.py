"""What torch computes: the golden outputs, and whole outputs to compare with.

Needs torch, torchvision and timm in an environment of their own, as nothing
else of this project does:

    python3 -m venv .oracle
    .oracle/bin/pip install torch torchvision timm
    .oracle/bin/python -m tests.golden.make golden

The last line, run in the repository's root, writes this directory's `.npz`
files. `forward` and `train` write one network's whole outputs instead, for
`benchmarks/parity.py`. Made with torch 2.13.0, torchvision 0.28.0, timm 1.0.31
on a CPU; other versions differ in the last digits only.
"""

import argparse
import pathlib

import numpy as np
import torch

from tests.golden import draw

HERE = pathlib.Path(__file__).parent
NETWORKS = (
  "densenet121",
  "densenet161",
  "densenet169",
  "densenet201",
  "resnet101",
  "resnet152",
  "resnet18",
  "resnet34",
  "resnet50",
  "resnext50_32x4d",
  "wide_resnet50_2",
)
# The learning rates at which torch's float32 training can be compared: there
# torch in float32 and in float64 agree, too. With these weights, batches of
# eight and ResNet-50 it is so at none.
TRAINED = {"resnet18": 0.01, "resnet50": None, "densenet121": 0.001}
# Neither square nor even: rows and columns cannot be mixed up, and the sizes
# of the strided layers (75 38 19 10 5 3, 65 33 17 9 5 3; DenseNet 19 9 4 2,
# 17 8 4 2) meet both parities of every border.
SIZE = (75, 65)
CLASSES = 10


def torchvision_models():  # noqa: ANN201
  """Imports torchvision, also where its wheel was built for another torch."""
  try:
    from torchvision import models
  except RuntimeError:
    # A wheel for CUDA beside a CPU torch lacks two operators' declarations,
    # which importing wants and nothing here uses.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
      library.define(
        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
      )
    torchvision_models.library = library  # It lasts as long as it is held.
    from torchvision import models
  return models


def drawn(network: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Gives a torch network the weights that `draw` draws for its names."""
  state = network.state_dict()
  shapes = {
    name: tuple(tensor.shape)
    for name, tensor in state.items()
    if not name.endswith("num_batches_tracked")
  }
  for name, value in draw.tensors(shapes, seed).items():
    state[name] = torch.from_numpy(value)
  network.load_state_dict(state)
  return network


def tap_modules(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
  """Returns {tap: the module whose output it is}, in order."""
  taps = {}
  if hasattr(network, "features"):
    taps["stem"] = network.features.pool0
    for name, module in network.features.named_children():
      if name.startswith("denseblock"):
        for layer, child in module.named_children():
          taps[f"{name}.{layer}"] = child
      if name.startswith(("denseblock", "transition")) or name == "norm5":
        taps[name] = module
  else:
    taps["stem"] = network.maxpool
    for stage in ("layer1", "layer2", "layer3", "layer4"):
      module = getattr(network, stage)
      for i, block in enumerate(module):
        taps[f"{stage}.{i}"] = block
      taps[stage] = module
  return taps


def forward(
  name: str, size: tuple[int, int], batch: int, seed: int
) -> dict[str, np.ndarray]:
  """Returns {tap: (N, C, h, w) float32} and "logits", (N, 1000)."""
  network = drawn(getattr(torchvision_models(), name)(weights=None), seed)
  network.eval()
  found = {}

  def keep(tap: str):  # noqa: ANN202
    def hook(module, inputs, output) -> None:  # noqa: ANN001
      if ".denselayer" in tap:
        # torch's module returns its new channels alone and is given all
        # before as a list; the tap is what the next layer sees.
        output = torch.cat([*inputs[0], output], 1)
      # Copied, as a later ReLU may work in place.
      found[tap] = output.numpy().copy()

    return hook

  for tap, module in tap_modules(network).items():
    module.register_forward_hook(keep(tap))
  with torch.inference_mode():
    images = torch.from_numpy(draw.images(batch, size, seed))
    found["logits"] = network(images).numpy()
  return found


def train(
  name: str, size: int, batch: int, seed: int, rate: float, double: bool
) -> dict[str, np.ndarray]:
  """Returns all tensors after three steps of SGD, and "losses", (3,).

  Momentum 0.9, cross-entropy over ten classes, a new batch at each step.
  """
  network = getattr(torchvision_models(), name)(num_classes=CLASSES)
  kind = torch.float64 if double else torch.float32
  network = drawn(network, seed).to(kind).train()
  optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
  losses = []
  for step in range(3):
    images = torch.from_numpy(draw.images(batch, (size, size), seed + step))
    labels = torch.from_numpy(draw.labels(batch, CLASSES, seed + step))
    loss = torch.nn.functional.cross_entropy(network(images.to(kind)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
  found = {
    key: value.detach().numpy()
    for key, value in network.state_dict().items()
    if not key.endswith("num_batches_tracked")
  }
  return {**found, "losses": np.array(losses)}


def clam(seed: int) -> dict[str, np.ndarray]:
  """Returns what CLAM's default encoder gives, as CLAM calls it.

  "features", (2, 1024), are of normal numbers; "tiles", (4, 1024), of 8-bit
  tiles that are normalised as CLAM does.

  Source: CLAM, models/timm_wrapper.py (TimmCNNEncoder: timm's
    resnet50.tv_in1k, features_only, out_indices=(3,), average pooled) and
    utils/transform_utils.py (ToTensor, Normalize with ImageNet's).
  """
  torchvision_models()
  import timm

  encoder = timm.create_model(
    "resnet50.tv_in1k", features_only=True, out_indices=(3,), pretrained=False
  )
  drawn(encoder, seed).eval()

  def features(images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
      (x_NCHW,) = encoder(images)
      return torch.nn.AdaptiveAvgPool2d(1)(x_NCHW).flatten(1).numpy()

  tiles = torch.from_numpy(draw.tiles(4, 64, seed)).permute(0, 3, 1, 2) / 255
  mean, std = (
    torch.tensor(values).reshape(3, 1, 1)
    for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  )
  return {
    "features": features(torch.from_numpy(draw.images(2, (64, 96), seed))),
    "tiles": features((tiles - mean) / std),
  }


def largest(arrays: dict[str, np.ndarray]) -> np.ndarray:
  """Returns every array's largest magnitude, (arrays,) float32."""
  return np.array([np.abs(a).max() for a in arrays.values()], np.float32)


def write_golden() -> None:
  """Writes forward.npz, train.npz and clam.npz beside this file."""
  arrays = {}
  for name in NETWORKS:
    taps = forward(name, SIZE, 1, seed=0)
    logits = taps.pop("logits")
    arrays[f"{name}/names"] = np.array(list(taps), "S")
    arrays[f"{name}/digests"] = np.stack(
      [draw.digest_tap(tap, value) for tap, value in taps.items()]
    )
    arrays[f"{name}/largest"] = largest(taps)
    arrays[f"{name}/logits"] = logits[0]
  np.savez_compressed(HERE / "forward.npz", **arrays)
  arrays = {}
  for name, rate in TRAINED.items():
    for double in (False, True) if rate else (True,):
      # In float64 nothing is lost at a rate where float32 is all rounding.
      state = train(name, 64, 8, 0, 0.1 if double else rate, double)
      key = f"{name}/float{64 if double else 32}"
      arrays[f"{key}/losses"] = state.pop("losses")
      shapes = {tensor: value.shape for tensor, value in state.items()}
      changes = {
        tensor: state[tensor] - value
        for tensor, value in draw.tensors(shapes, 0).items()
      }
      arrays[f"{key}/names"] = np.array(list(state), "S")
      arrays[f"{key}/changes"] = np.stack(
        [draw.digest_tensor(tensor, value) for tensor, value in changes.items()]
      )
      arrays[f"{key}/largest_changes"] = largest(changes)
      arrays[f"{key}/largest"] = largest(state)
  np.savez_compressed(HERE / "train.npz", **arrays)
  np.savez_compressed(HERE / "clam.npz", **clam(seed=0))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest="command", required=True)
  commands.add_parser("golden", help="write this directory's files")
  for command in ("forward", "train"):
    whole = commands.add_parser(command, help="write one network's outputs")
    whole.add_argument("network", choices=NETWORKS)
    whole.add_argument("--size", type=int, default=224)
    whole.add_argument("--batch", type=int, default=2)
    whole.add_argument("--seed", type=int, default=0)
    whole.add_argument("--out", required=True)
    if command == "train":
      whole.add_argument("--rate", type=float, default=0.1)
      whole.add_argument("--double", action="store_true", help="in float64")
  args = parser.parse_args()
  if args.command == "golden":
    write_golden()
  elif args.command == "forward":
    size = (args.size, args.size)
    np.savez(args.out, **forward(args.network, size, args.batch, args.seed))
  else:
    state = train(
      args.network, args.size, args.batch, args.seed, args.rate, args.double
    )
    np.savez(args.out, **state)


if __name__ == "__main__":
  main()
