"""Networks with numbers in them, and files with a network's numbers."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from jaxtransfer import errors, files
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.networks.network import Network
from jaxtransfer.weights import catalog, hub, keymaps, readers
from jaxtransfer.weights.pickles import printable


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a network's numbers come from, and what images they are made for.

  Attributes:
    label: "random", a catalog name, or the file's name: for reports.
    path: the file or directory; None for random weights.
    sha256: digest of its bytes; "" for random weights.
    mean: per RGB channel, for pixels scaled to [0, 1].
    std: likewise.
    final_relu: whether an uncut DenseNet's features end in the ReLU.
    licence: as its publisher states it; "" where nothing is known.
    until: the last layer of a network that `export` wrote; "" where the file
      does not say.
    flatten: side of the images whose whole map the file's head reads, pixels;
      None for a head on pooled features.
    slim_after: the last layer of full width in a network that `export` wrote;
      None where all are, or the file does not say.
    prefix: what stands before the network's names in the file; "" to find it.
    notes: what a user must know of a file of somebody's own: what of it is
      left out, and what no file can show.
  """

  label: str
  path: pathlib.Path | None = None
  sha256: str = ""
  mean: tuple[float, float, float] = catalog.IMAGENET_MEAN
  std: tuple[float, float, float] = catalog.IMAGENET_STD
  final_relu: bool = True
  licence: str = ""
  until: str = ""
  flatten: int | None = None
  slim_after: str | None = None
  prefix: str = ""
  notes: tuple[str, ...] = ()

  def card(self) -> dict[str, Any]:
    """Returns what a network that began with these weights says of them."""
    return {
      "weights": self.label,
      "weights_sha256": self.sha256,
      "mean": list(self.mean),
      "std": list(self.std),
      "licence": self.licence,
    }


def resolve_weights(
  network: str,
  weights: str | os.PathLike[str] | None,
  prefix: str = "",
) -> Source:
  """Finds the file that `weights=` means, and what is known of it.

  Args:
    network: the zoo's name of the network that is to be filled.
    weights: None or "random"; a catalog name; a path; or `name=path`, a file
      of one's own that is what the catalog describes under that name.
    prefix: which network of a file that holds several: what stands before its
      names, e.g. `module.momentum_encoder.`, "." for nothing; "" to find it.

  Returns:
    The source. A path without a name is taken to expect ImageNet's mean and
    standard deviation, unless it is a safetensors file that `export` wrote or
    lies in a folder of the hub, which say.

  Raises:
    UsageError: no such name or file, its digest is wrong, it is of another
      network, or nobody can tell which of its networks is meant.
  """
  zoo.family(network)
  if weights is None or weights == "random":
    if prefix:
      raise errors.UsageError(
        f"config.network.prefix (prefix= of create_model) is {prefix!r}, but"
        " random weights come from no file: drop it, or give weights"
      )
    return Source("random")
  text = os.fspath(weights)
  name, is_named, path_text = text.partition("=")
  if is_named and name in catalog.names():
    row = catalog.find(name, network)
    path = readers.find_checkpoint(pathlib.Path(path_text).expanduser())
    source = _source_of_row(row, path, prefix)
    if not source.sha256.startswith(row.sha256 or ""):
      raise errors.UsageError(
        f"{source.path}: SHA-256 is {source.sha256}, but {row.name} was"
        f" published with {row.sha256}"
      )
    stored = readers.open_checkpoint(path)
    notes = _left_out(source, network, stored)
    return dataclasses.replace(source, notes=tuple(notes))
  given = pathlib.Path(text).expanduser()
  if text in catalog.names() or not _is_path(weights, given):
    row = catalog.find(text, network)
    return _source_of_row(row, catalog.resolve(row), prefix)
  return _source_of_path(network, given, prefix)


def _source_of_path(network: str, given: pathlib.Path, prefix: str) -> Source:
  """Looks at a file of somebody's, and says what cannot be seen in it."""
  path = readers.find_checkpoint(given)
  digest = _digest(path)
  stored = readers.open_checkpoint(path)
  about = _read_details(path, stored)
  if about.get("network", network) != network:
    held = printable(str(about["network"]))
    raise errors.UsageError(f"{path} holds {held}, not {network}")
  is_known = hub.check_architecture(network, path, stored.metadata)
  beside = hub.statistics(path)
  source = Source(
    # `.` and `..` have no name of their own.
    (given if given.name.strip(".") else given.resolve()).name,
    path,
    digest,
    mean=_triple(path, beside | about, "mean", catalog.IMAGENET_MEAN),
    std=_triple(path, beside | about, "std", catalog.IMAGENET_STD),
    final_relu=about.get("final_relu", True) is not False,
    licence=str(about.get("licence", "")),
    until=str(about.get("until", "")),
    flatten=_side(path, about.get("flatten")),
    slim_after=_layer(path, about.get("slim_after")),
    prefix=prefix,
  )
  if "network" in about:
    return source
  notes = _left_out(source, network, stored)
  assumed = "" if is_known else zoo.family(network).assumed
  if assumed:
    notes.append(
      f"{source.label}: names and shapes are {network}'s; what no file of"
      f" tensors shows is assumed to be torchvision's: {assumed}"
      + ("" if beside else "; and ImageNet's mean and std for its images")
    )
  elif not beside:
    notes.append(
      f"{source.label}: ImageNet's mean and std are assumed for its images"
    )
  return dataclasses.replace(source, notes=tuple(notes))


def _left_out(
  source: Source, network: str, stored: readers.Checkpoint
) -> list[str]:
  """Says which part of a file is read, and what is guessed of its numbering."""
  place = _locate(source, network, stored)
  notes = []
  if left_out := keymaps.left_out(
    place, _shapes_of(stored), zoo.family(network).head_names
  ):
    start = printable(place.start)
    where = f"what stands under {start}" if start else "the network"
    notes.append(f"{source.label}: {where} is read; left out: {left_out}")
  if numbering := keymaps.numbering(place):
    notes.append(f"{source.label}: {numbering}")
  return notes


def _is_path(weights: str | os.PathLike[str], path: pathlib.Path) -> bool:
  """Whether what is no catalog name was meant as a path."""
  return (
    not isinstance(weights, str)
    or (weights != "" and path.exists())
    or os.sep in weights
    or path.suffix in readers.SUFFIXES
  )


def _source_of_row(row: catalog.Row, path: pathlib.Path, prefix: str) -> Source:
  return Source(
    row.name,
    path,
    _digest(path),
    row.mean,
    row.std,
    row.final_relu,
    row.licence,
    prefix=prefix,
  )


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns what `export` wrote into a file's header; {} for other files.

  Args:
    path: of the `.safetensors` file.

  Raises:
    UsageError: the file is damaged.
  """
  path = pathlib.Path(path)
  return _read_details(path, readers.open_checkpoint(path))


def _read_details(
  path: pathlib.Path, stored: readers.Checkpoint
) -> dict[str, Any]:
  """Returns what `export` wrote into a file's header; {} for other files."""
  try:
    details = json.loads(stored.metadata.get("jaxtransfer", "{}"))
  except ValueError:
    details = None
  if not isinstance(details, dict):
    raise errors.UsageError(
      f"{path}: its jaxtransfer header is not a JSON dict"
    )
  return details


def _side(path: pathlib.Path, value: Any) -> int | None:
  if value is None or (type(value) is int and 0 < value < 10_000):
    return value
  raise errors.UsageError(f"{path}: flatten in its header is {value!r}")


def _layer(path: pathlib.Path, value: Any) -> str | None:
  if value is None or isinstance(value, str):
    return value
  raise errors.UsageError(f"{path}: slim_after in its header is {value!r}")


def _triple(
  path: pathlib.Path,
  details: Mapping[str, Any],
  key: str,
  default: tuple[float, float, float],
) -> tuple[float, float, float]:
  value = details.get(key, default)
  try:
    red, green, blue = (float(v) for v in value)
  except (TypeError, ValueError):
    raise errors.UsageError(
      f"{path}: {key} in its header or config is not three numbers"
    ) from None
  return red, green, blue


def _digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, or of several files' names and bytes."""
  try:
    listed = readers.files_of(path)
    if listed == [path]:
      return files.sha256_of(path)
    digest = hashlib.sha256()
    root = path if path.is_dir() else path.parent
    for inner in listed:
      name = inner.relative_to(root).as_posix()
      digest.update(f"{name}\0{files.sha256_of(inner)}\n".encode())
    return digest.hexdigest()
  except OSError as error:
    raise errors.UsageError(
      f"weights {error.filename or path} cannot be read ({error.strerror})"
    ) from None


@functools.cache
def _trunk(network: str, slim_after: str | None) -> dict[str, tuple[int, ...]]:
  return tensors.shapes(zoo.build(network, slim_after=slim_after))


def _shapes_of(stored: readers.Checkpoint) -> dict[str, tuple[int, ...]]:
  return {name: tensor.shape for name, tensor in stored.items()}


def _locate(
  source: Source, network: str, stored: readers.Checkpoint
) -> keymaps.Place:
  """Finds the network in an opened file."""

  def same(one: keymaps.Place, other: keymaps.Place) -> bool:
    return all(
      stored[place].read().tobytes()
      == stored[other.names[name]].read().tobytes()
      for name, place in one.names.items()
      if name in other.names
    )

  try:
    return keymaps.locate(
      _shapes_of(stored),
      family=zoo.family(network),
      network=network,
      trunk=_trunk(network, source.slim_after),
      prefix=source.prefix,
      foreign=stored.foreign,
      same=same,
    )
  except errors.UsageError as error:
    raise errors.UsageError(f"{source.path}: {error}") from None


def read_weights(
  source: Source,
  network: str,
  *,
  until: str | None = None,
  keep_head: bool = False,
) -> dict[str, np.ndarray]:
  """Reads the tensors of a (cut) network from a checkpoint, and no others.

  Args:
    source: as `resolve_weights` returns it, with a path.
    network: the zoo's name.
    until: the last layer kept; None for all.
    keep_head: also return the checkpoint's own head.

  Returns:
    {torchvision name: float32 array in torch's layout}.

  Raises:
    UsageError: the file is damaged; a tensor is missing, left over, of another
      shape, not floating point, or holds NaN or infinity.
    ValueError: the source has no path.
  """
  if source.path is None:
    raise ValueError(f"{source.label}: there is no file to read")
  stored = readers.open_checkpoint(source.path)
  place = _locate(source, network, stored)
  head = zoo.family(network).head_names if keep_head else None
  try:
    places = keymaps.fit(
      place,
      _shapes_of(stored),
      network=network,
      wanted=tensors.shapes(
        zoo.build(network, until=until, slim_after=source.slim_after)
      ),
      trunk=_trunk(network, source.slim_after),
      head=head,
      foreign=stored.foreign,
    )
  except errors.UsageError as error:
    raise errors.UsageError(f"{source.path}: {error}") from None
  values = {}
  for name, place in places.items():
    if not jnp.issubdtype(stored[place].dtype, jnp.floating):
      raise errors.UsageError(
        f"{source.path}: {printable(place)} is {stored[place].dtype}, not"
        " floating point"
      )
    with np.errstate(over="ignore"):
      value = stored[place].read().astype(np.float32)
    if not np.isfinite(value).all():
      bad = np.count_nonzero(~np.isfinite(value))
      raise errors.UsageError(
        f"{source.path}: {printable(place)} holds {bad:,} NaN or infinite"
        f" numbers of {value.size:,}"
      )
    values[name] = value
  return values


def create_model(
  name: str,
  until: str | None = None,
  num_classes: int | None = None,
  keep_head: bool = False,
  weights: str | os.PathLike[str] | Source | None = None,
  seed: int = 0,
  dtype: Any = jnp.float32,
  flatten: int | None = None,
  slim_after: str | None = None,
  prefix: str = "",
) -> Network:
  """Creates a network, cut where asked, with pretrained or random weights.

  Args:
    name: one of `list_models()`.
    until: the last layer kept; None for the whole network. Later layers are
      never built and their numbers never read.
    num_classes: width of a fresh, random linear head; None for pooled
      features.
    keep_head: keep the checkpoint's own head: of an uncut network, or of one
      that `export` wrote, cut where it says.
    weights: None for random; a catalog name (`catalog.names()`); a path to
      safetensors, a torch file, a folder of the hub or an Orbax directory;
      `name=path`; or what `resolve_weights` returned. Of a file that is not
      the catalog's, a warning says what is left out and what is assumed.
    seed: of all that is random.
    dtype: compute dtype; parameters stay float32.
    flatten: makes the fresh head read the whole last map of images of this
      side, in pixels, and not its mean.
    slim_after: the last layer that has its full width and the weights' own
      numbers; all after it have half the width and random ones, and theirs
      are never read. None for full width, or for the width of a file that
      `export` wrote.
    prefix: as for `resolve_weights`, where `weights` is a path or a name.

  Returns:
    The network: `model(images)` with images (N, H, W, 3) float, normalised by
    the weights' mean and standard deviation, gives (N, C) features or
    (N, num_classes) logits.

  Raises:
    UsageError: no such network, layer or weights; a checkpoint that does not
      fit; or arguments that contradict each other.
  """
  notes: tuple[str, ...] = ()
  if not isinstance(weights, Source):
    weights = resolve_weights(name, weights, prefix)
    notes = weights.notes
  elif prefix:
    raise errors.UsageError(
      f"prefix is {prefix!r}, but a Source has its own: give it to"
      " resolve_weights"
    )
  if keep_head and num_classes is not None:
    raise errors.UsageError(
      "keep_head=True keeps the checkpoint's own head: drop num_classes, or"
      " drop keep_head"
    )
  if keep_head and until is not None:
    last = zoo.build(name, until=until).layer_names[-1]
    if last != weights.until:
      raise errors.UsageError(
        "keep_head=True keeps the head where it was trained, after"
        f" {weights.until or 'the last layer'}: until={until!r} cuts it off;"
        " drop one of them"
      )
  if slim_after is not None:
    if keep_head:
      raise errors.UsageError(
        "keep_head=True keeps a head of other features than those of random"
        f" layers after slim_after={slim_after!r}: drop one of them"
      )
    if weights.slim_after is not None:
      raise errors.UsageError(
        f"{weights.path} holds a network of half width after"
        f" {weights.slim_after} and its numbers: drop slim_after"
      )
    zoo.build(name, until=until, slim_after=slim_after)
  if keep_head:
    flatten = weights.flatten
  if keep_head and weights.path is None:
    raise errors.UsageError(
      "keep_head=True needs weights with a head; random weights have none:"
      " give num_classes instead"
    )
  if num_classes is not None and num_classes < 1:
    raise errors.UsageError(f"num_classes={num_classes}: at least 1")
  values: dict[str, np.ndarray] = {}
  if weights.path is not None:
    values = read_weights(
      weights, name, until=slim_after or until, keep_head=keep_head
    )
  if keep_head:
    weight, _ = zoo.family(name).head_names
    num_classes = len(values[weight])
  model = zoo.build(
    name,
    until=until,
    num_classes=num_classes,
    dtype=dtype,
    final_relu=weights.final_relu,
    flatten=flatten,
    slim_after=slim_after or weights.slim_after,
  )
  expected = tensors.shapes(model)
  for tensor in zoo.family(name).head_names if keep_head else ():
    if values[tensor].shape != expected[tensor]:
      raise errors.UsageError(
        f"{weights.path}: the head's {tensor} is {values[tensor].shape},"
        f" needed {expected[tensor]}"
      )
  if expected.keys() != values.keys():
    values = tensors.random(model, seed) | values
  tensors.load(model, values)
  for note in notes:
    warnings.warn(note, stacklevel=2)
  return model


def export(
  model: Network,
  path: str | os.PathLike[str],
  details: Mapping[str, Any] | None = None,
) -> None:
  """Writes a network as safetensors under torchvision's names, float32.

  `torch.nn.Module.load_state_dict` takes the file, and so does `weights=`
  here, bit for bit. `details` goes into the file's header and into a JSON file
  of the same name beside it.

  Args:
    model: the network, cut or not, with or without a head.
    path: the `.safetensors` file to write.
    details: what a user of the file must know, as JSON: `mean`, `std`,
      `licence`, `classes` and the like.

  Raises:
    OSError: the directory cannot be written or the disk is full.
    ValueError: `details` is not JSON, or holds NaN.
  """
  about = {
    "network": model.name,
    "until": model.layer_names[-1],
    "flatten": model.flatten,
    "slim_after": model.slim_after,
    "final_relu": model.relu or not model.family.final_relu,
    **(details or {}),
  }
  write(path, tensors.dump(model), about)


def write(
  path: str | os.PathLike[str],
  arrays: Mapping[str, np.ndarray],
  about: Mapping[str, Any],
) -> None:
  """Writes arrays as safetensors, and what is said of them beside them.

  Args:
    path: the `.safetensors` file; a JSON file of the same name is beside it.
    arrays: by name.
    about: for JSON; it goes into the file's header, too.

  Raises:
    OSError: the directory cannot be written or the disk is full.
    ValueError: `about` is not JSON, or holds NaN.
  """
  path = pathlib.Path(path)
  # One entry: the library writes several in no fixed order, and the same
  # network must give the same bytes, whose digest is the cache's key.
  header = {"jaxtransfer": json.dumps(about, allow_nan=False)}
  with files.atomic_path(path) as temporary:
    temporary.write_bytes(save(dict(arrays), metadata=header))
  files.write_json(path.with_suffix(".json"), about)
