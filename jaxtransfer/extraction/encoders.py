"""Networks with values, and which of their features are kept."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import errors, files, inference, parallel
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.networks.network import Network, average
from jaxtransfer.weights import loading, readers

# A network's own features: after its last layer, and a DenseNet's ReLU.
END = "end"


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """A network, and which of its features are kept.

  Attributes:
    network: with values.
    source: where they come from, and how its images are normalised.
    taps: layers of it, or `END`.
  """

  network: Network
  source: loading.Source
  taps: tuple[str, ...]

  def cut(self, tap: str) -> str:
    """Returns the layer after which a tap is."""
    if tap != END:
      return tap
    last = self.network.layer_names[-1]
    stages = {layer: alias for alias, layer in self.network.aliases}
    name = stages.get(last, last)
    return f"{name}-relu" if self.network.relu else name

  def channels(self, tap: str) -> int:
    """Returns how many features a tap has."""
    if tap == END:
      return self.network.channels
    number = self.network.layer_names.index(self.network.resolve(tap))
    return self.network.layers[number].channels

  @functools.cached_property
  def weights_sha256(self) -> str:
    """Of the weights' file; of the numbers, where there is no file."""
    if self.source.sha256:
      return self.source.sha256
    digest = hashlib.sha256()
    for name, value in tensors.dump(self.network).items():
      digest.update(name.encode())
      digest.update(value.data)
    return digest.hexdigest()

  def compute(self, network: Network, x_NHWC: jax.Array) -> dict[str, Any]:
    """Returns {tap: (N, C) float32} of normalised images.

    Args:
      network: of this structure.
      x_NHWC: the images.
    """
    last = network.layer_names[-1]
    layers = {tap: last if tap == END else tap for tap in self.taps}
    maps = network.taps(x_NHWC, list(layers.values()), pool=False)
    if END in layers and network.relu:
      maps[END] = jax.nn.relu(maps[last])
      layers[END] = END
    return {tap: average(maps[layer]) for tap, layer in layers.items()}


def open_encoders(
  networks: str,
  taps: str,
  *,
  weights: str = "",
  prefix: str = "",
  until: str = "",
  seed: int = 0,
  dtype: str = "float32",
) -> list[Encoder]:
  """Makes the networks that a config names.

  Args:
    networks: names with commas between; each may be `name@weights`.
    taps: `END`, "blocks", "layers" or names of layers, with commas between.
    weights: of those that do not say; "" = random.
    prefix: of the one network's names in a file of several.
    until: the deepest layer; "" = where the weights end, or the network.
    seed: of random weights.
    dtype: that the layers compute in.

  Raises:
    UsageError: there is no such network, layer or file.
  """
  named = [name.strip() for name in networks.split(",") if name.strip()]
  if prefix and len(named) > 1:
    raise errors.UsageError(
      f"config.network.prefix is {prefix!r}, which is for one network, and"
      f" there are {len(named)}"
    )
  encoders = []
  for text in dict.fromkeys(named):
    name, at, own = text.partition("@")
    source = loading.resolve_weights(
      name, (own if at else weights) or None, prefix
    )
    last = zoo.build(name).layer_names[-1]
    end = until or (source.until if source.until != last else "")
    chosen = _taps(name, taps, end or None)
    deepest = None
    if END not in chosen:
      # What lies behind the deepest is neither built nor read.
      deepest = zoo.build(name, until=chosen[-1]).layer_names[-1]
    network = loading.create_model(
      name,
      until=deepest or end or None,
      weights=source,
      seed=seed,
      dtype=jnp.dtype(dtype),
    )
    encoders.append(Encoder(network, source, chosen))
  if not encoders:
    raise errors.UsageError("config.networks is empty: name one")
  return encoders


def _taps(name: str, taps: str, until: str | None) -> tuple[str, ...]:
  words = [word.strip() for word in taps.split(",") if word.strip()]
  rest = [word for word in words if word != END]
  chosen = zoo.select_taps(name, ",".join(rest), until) if rest else ()
  if END not in words:
    return chosen or zoo.select_taps(name, "", until)
  network = zoo.build(name, until=until)
  # But for a ReLU, the end is the last layer's, which may be named too.
  last = {network.resolve(tap) for tap in chosen} & {network.layer_names[-1]}
  return chosen if last and not network.relu else (*chosen, END)


@dataclasses.dataclass(frozen=True)
class Output:
  """A folder of feature files.

  Attributes:
    folder: its name.
    encoder: whose features they are.
    tap: of it.
  """

  folder: str
  encoder: Encoder
  tap: str

  @property
  def channels(self) -> int:
    """Features of a tile."""
    return self.encoder.channels(self.tap)

  def attributes(self) -> dict[str, Any]:
    """Returns what its files say of the network."""
    source = self.encoder.source
    return {
      "encoder": self.folder,
      "network": self.encoder.network.name,
      "cut": self.encoder.cut(self.tap),
      "weights": source.label,
      "weights_sha256": self.encoder.weights_sha256,
      "normalisation": {"mean": list(source.mean), "std": list(source.std)},
      "compute_dtype": str(self.encoder.network.dtype),
    }


def outputs_of(encoders: Sequence[Encoder]) -> list[Output]:
  """Returns every tap of every encoder, under a name of its own."""
  named: dict[str, list[tuple[Encoder, str]]] = {}
  for encoder in encoders:
    label = encoder.source.label
    for suffix in readers.SUFFIXES:
      label = label.removesuffix(suffix)
    for tap in encoder.taps:
      cut = encoder.cut(tap)
      folder = files.safe_name(f"{encoder.network.name}-{label}-{cut}")
      named.setdefault(folder, []).append((encoder, tap))
  found = []
  for folder, of_name in named.items():
    for encoder, tap in of_name:
      # Files of weights may have the same name.
      digest = f"-{encoder.weights_sha256[:8]}" * (len(of_name) > 1)
      found.append(Output(f"{folder}{digest}", encoder, tap))
  return found


def place(
  outputs: Sequence[Output], devices: parallel.Devices, dtype: str
) -> Callable[[jax.Array], dict[str, jax.Array]]:
  """Places networks on devices, to be run on the same images.

  Args:
    outputs: whatever of them is wanted.
    devices: where.
    dtype: of the features.

  Returns:
    (B, S, S, 3) uint8 on the devices -> {folder: (B, C)}.
  """
  encoders = list(dict.fromkeys(output.encoder for output in outputs))
  numbers = {encoder: str(i) for i, encoder in enumerate(encoders)}
  # Networks that differ in their numbers alone share a program.
  alike: dict[Any, list[Encoder]] = {}
  for encoder in encoders:
    source = encoder.source
    key = encoder.network.name, encoder.taps, source.mean, source.std
    alike.setdefault(key, []).append(encoder)
  programs = []
  for (_, _, mean, std), of_kind in alike.items():

    def compute(
      network: Network, x_NHWC: jax.Array, encoder: Encoder = of_kind[0]
    ) -> dict[str, jax.Array]:
      # As small as they are kept, they come back from the devices.
      found = encoder.compute(network, x_NHWC)
      return {tap: value.astype(dtype) for tap, value in found.items()}

    networks = {numbers[encoder]: encoder.network for encoder in of_kind}
    programs.append(inference.place(networks, compute, devices, mean, std))

  def run(pixels: jax.Array) -> dict[str, jax.Array]:
    found = {k: v for program in programs for k, v in program(pixels).items()}
    return {
      output.folder: found[numbers[output.encoder]][output.tap]
      for output in outputs
    }

  return run
