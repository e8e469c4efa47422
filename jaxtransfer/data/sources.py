"""Where images come from: manifests, folders, TFDS and the built-in tissue.

All become the same thing, `Examples`: names, labels, groups and a `read(row)`.
Opening one touches no image; a missing or broken one shows when it is read.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, ClassVar

import ml_collections
import numpy as np
from absl import logging

from jaxtransfer.data import images, manifests
from jaxtransfer.data import names as naming
from jaxtransfer.errors import MissingSourceError, UsageError
from jaxtransfer.files import sha256_of

SUFFIXES = frozenset(".png .jpg .jpeg .tif .tiff .bmp .webp".split())
# How folders and TFDS name the three splits; a manifest says train, val, test.
_SPLIT_NAMES = {
  "train": "train",
  "val": "val",
  "valid": "val",
  "validation": "val",
  "test": "test",
}


@dataclasses.dataclass(eq=False)
class Examples:
  """Labelled images, read one at a time.

  Attributes:
    unit: what they are called, in the plural.
    classes: names of the classes, sorted.
    labels: (N,) int32, index into `classes`.
    names: path (relative to the source) or id of every row.
    groups: patient of every row, or its slide where the source names no
      patients, or None where it names neither. A row that names neither among
      rows that do is a group of its own.
    slides: slide of every row ("" = unknown), or None.
    splits: "train", "val" or "test" of every row, or None: to be drawn.
    tasks: task of every row, or None.
    notes: what was ignored or assumed, a line each, for the user to read.
  """

  classes: list[str]
  labels: np.ndarray
  names: list[str]
  groups: list[str] | None = None
  slides: list[str] | None = None
  splits: list[str] | None = None
  tasks: list[str] | None = None
  notes: list[str] = dataclasses.field(default_factory=list)
  unit: ClassVar[str] = "images"

  def __len__(self) -> int:
    return len(self.names)

  def read(self, row: int) -> np.ndarray:
    """Reads one image, (H, W, 3) uint8.

    Raises:
      ImageError: it cannot be used, and why.
    """
    raise NotImplementedError

  def digest(self, row: int) -> str:
    """Returns what is equal for two rows that are the same image.

    Raises:
      ImageError: it cannot be read, and why.
    """
    pixels = self.read(row)
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()

  def fingerprint(self, rows: Sequence[int] | None = None) -> str:
    """Returns a hash that changes when any of the images may have.

    Args:
      rows: which images; all by default. It may change with others too.
    """
    raise NotImplementedError


def open_source(
  config: ml_collections.ConfigDict, known: Sequence[str] | None = None
) -> Examples:
  """Opens the images that `config.source` names.

  - `<file>.csv`: a manifest with the columns path and label and, optionally,
    group, split, slide and task. Paths are relative to the file.
  - a folder: `<class>/<image>` or `<split>/<class>/<image>`.
  - `<file>.csv` with `config.features`: slides, whose tiles' features are in
    these folders; see `data.bags.open_bags`.
  - `tfds:<name>[/<config>][:<version>]`: a prepared TFDS data set.
  - `synthetic:tissue[/<task>][?<option>=<number>&...]`: tiles drawn by
    `data.tissue.open_tissue`, whose options these are; `size` is
    `image_size` unless given.

  Where a finished network is used, labels may be missing: a manifest then needs
  no column label, or has empty ones, and a folder whose folders are no classes
  is read with all folders below it.

  Args:
    config: `config.data`: source, task, image_size, max_pixels, tfds_dir; or
      source, features and max_failures.
    known: the classes of a finished network; None where all need labels.

  Returns:
    The examples, in the order of the source; a label that is not known is "".

  Raises:
    UsageError: the source cannot mean what it says; the line names the file
      and the row.
    MissingSourceError: the source is not there.
  """
  if getattr(config, "features", None) is not None:
    # It imports `Examples`, which its slides are.
    from jaxtransfer.data import bags

    return bags.open_bags(config, known)
  source = config.source
  if not source:
    raise UsageError(
      "config.data.source is empty; give a manifest.csv, a folder,"
      " tfds:<name> or synthetic:tissue"
    )
  scheme, _, rest = source.partition(":")
  path = pathlib.Path(source).expanduser()
  if config.task and (scheme in ("synthetic", "tfds") or path.is_dir()):
    raise UsageError(
      f"config.data.task is {config.task!r}, but {source} is no manifest with a"
      " column 'task'; leave the key out"
    )
  if scheme == "synthetic":
    return _open_synthetic(rest, config.image_size)
  if scheme == "tfds":
    return _open_tfds(rest, config.tfds_dir or None, config.max_pixels)
  if path.is_dir():
    if known is not None and not _is_labelled(path, known):
      return _open_tree(path, config.max_pixels)
    return _open_folder(path, config.max_pixels)
  if not path.exists():
    raise MissingSourceError(
      f"config.data.source: {source} does not exist; give a manifest.csv, a"
      " folder, tfds:<name> or synthetic:tissue"
    )
  return _open_manifest(
    path, config.task, config.max_pixels, labelled=known is None
  )


class _Files(Examples):
  """Images that are files below one directory."""

  def __init__(self, root: pathlib.Path, max_pixels: int, **fields: Any):
    super().__init__(**fields)
    self._root = os.path.abspath(root)
    self._max_pixels = max_pixels

  def read(self, row: int) -> np.ndarray:
    return images.decode(self._path(row), max_pixels=self._max_pixels)

  def digest(self, row: int) -> str:
    try:
      return sha256_of(self._path(row))
    except OSError as e:
      raise images.ImageError(f"cannot be read: {e.strerror}") from None

  def _path(self, row: int) -> str:
    name = self.names[row]
    path = os.path.join(self._root, name)
    if not os.path.exists(path):
      path = manifests.respelled(self._root, name) or path
      why = manifests.why_missing(name)
      if why and not os.path.exists(path):
        raise images.ImageError(f"no such file; {why}")
    return path

  def fingerprint(self, rows: Sequence[int] | None = None) -> str:
    names = self.names if rows is None else [self.names[row] for row in rows]
    # A stat is a round trip on a network file system, and 300,000 in a row
    # are minutes; side by side they are seconds.
    chunks = [names[i : i + 1024] for i in range(0, len(names), 1024)]
    with futures.ThreadPoolExecutor(16) as pool:
      return _hash(self._max_pixels, pool.map(self._stats, chunks))

  def _stats(self, names: list[str]) -> list[tuple[str, int, int]]:
    stats = []
    for name in names:
      path = os.path.join(self._root, name)
      stat = _stat(path) or _stat(manifests.respelled(self._root, name))
      size, time = (stat.st_size, stat.st_mtime_ns) if stat else (-1, -1)
      stats.append((name, size, time))
    return stats


def _stat(path: str | None) -> os.stat_result | None:
  try:
    return os.stat(path) if path else None
  except OSError:
    return None


def _hash(max_pixels: int, items: Iterable[Any]) -> str:
  digest = hashlib.sha256(f"max_pixels={max_pixels}\n".encode())
  for item in items:
    digest.update(json.dumps(item).encode() + b"\n")
  return digest.hexdigest()


def index(
  labels: Sequence[str],
) -> tuple[list[str], np.ndarray, list[str]]:
  """Returns the classes, sorted, and which each label is.

  Args:
    labels: N of them.

  Returns:
    The classes, (N,) int32 index into them, and notes on those that look alike.
  """
  counts = collections.Counter(labels)
  classes = sorted(counts)
  number = {name: i for i, name in enumerate(classes)}
  # With config.multilabel a label is a list.
  words = collections.Counter()
  for label, count in counts.items():
    several = label.split(";") if ";" in label else []
    parts = [part.strip().removeprefix("?").strip() for part in several]
    words.update({word: count for word in parts or [label]})
  return (
    classes,
    np.array([number[label] for label in labels], np.int32),
    naming.alike("labels", words),
  )


# --- manifests ---------------------------------------------------------------


def _open_manifest(
  path: pathlib.Path, task: str, max_pixels: int, *, labelled: bool
) -> Examples:
  manifest = manifests.read(path, task, labelled=labelled)
  classes, labels, notes = index(manifest.labels)
  return _Files(
    path.parent,
    max_pixels,
    classes=classes,
    labels=labels,
    names=manifest.names,
    groups=manifest.groups,
    slides=manifest.slides,
    splits=manifest.splits,
    tasks=manifest.tasks,
    notes=[*manifest.notes, *(f"{path}: {note}" for note in notes)],
  )


# --- folders -----------------------------------------------------------------


def _open_folder(root: pathlib.Path, max_pixels: int) -> Examples:
  notes = []
  if (root / "manifest.csv").is_file():
    notes.append(
      f"{root}: read as a folder; its manifest.csv (groups, splits) is not"
      " used, name it as config.data.source to use it"
    )
  top, *_ = _listing(root)
  by_split = bool(top) and all(name in _SPLIT_NAMES for name in top)
  prefixes = [f"{name}/" for name in top] if by_split else [""]
  names, labels, splits = [], [], []
  ignored, beside = collections.Counter(), collections.Counter()
  empty: dict[str, str] = {}  # folder -> what is in it
  for prefix in dict.fromkeys(["", *prefixes]):
    folders, *files = _listing(root / prefix)
    beside += _kinds(*files)
    for label in folders if prefix in prefixes else ():
      inside, image_names, others = _listing(root / prefix / label)
      if inside and not image_names:
        raise UsageError(
          f"{root / prefix / label}: folders where images should be; the"
          " layout is <class>/<image> or <split>/<class>/<image>; for any"
          " other write a manifest.csv"
        )
      kinds = _kinds(others, folders=inside)
      if image_names:
        ignored += kinds
      else:
        empty[prefix + label] = _said(kinds) or "empty"
      names.extend(f"{prefix}{label}/{n}" for n in image_names)
      labels.extend([label] * len(image_names))
      if by_split:
        splits.extend([_SPLIT_NAMES[prefix[:-1]]] * len(image_names))
  left_out = _left_out(set(labels), empty, beside, ignored)
  if not names:
    raise UsageError(
      f"{root}: no images; the layout is <class>/<image> or"
      f" <split>/<class>/<image>, with {', '.join(sorted(SUFFIXES))}"
      + "".join(f"; {line}" for line in left_out)
    )
  if (empty or beside) and len(set(labels)) < 2:
    raise UsageError(
      f"{root}: only the class {labels[0]} has images; {'; '.join(left_out)};"
      f" images are {', '.join(sorted(SUFFIXES))}"
    )
  classes, numbers, alike = index(labels)
  return _Files(
    root,
    max_pixels,
    classes=classes,
    labels=numbers,
    names=names,
    splits=splits or None,
    notes=[*notes, *(f"{root}: {line}" for line in [*left_out, *alike])],
  )


def _is_labelled(root: pathlib.Path, known: Sequence[str]) -> bool:
  """Whether the folders of a folder are classes that a network tells apart.

  Raises:
    UsageError: some are, and others are not.
  """
  top, *_ = _listing(root)
  if top and all(name in _SPLIT_NAMES for name in top):
    top = sorted({f for name in top for f in _listing(root / name)[0]})
  others = [name for name in top if name not in known]
  if others and len(others) < len(top):
    raise UsageError(
      f"{root}: {naming.shown(others, 5)} is no class of the network, which"
      f" predicts {naming.shown(known, 8)}; rename it, or say in a manifest.csv"
      " which image is what"
    )
  return bool(top) and not others


def _open_tree(root: pathlib.Path, max_pixels: int) -> Examples:
  """Opens every image below a folder, without labels."""
  names, others = [], collections.Counter()
  folders = [""]
  for prefix in folders:
    inside, image_names, rest = _listing(root / prefix)
    folders += [f"{prefix}{name}/" for name in inside]
    names += [prefix + name for name in image_names]
    others += _kinds(rest)
  if not names:
    raise UsageError(
      f"{root}: no images; they are {', '.join(sorted(SUFFIXES))}"
      + (f"; there are {_said(others)}" if others else "")
    )
  top = sorted({name.partition("/")[0] for name in names if "/" in name})
  notes = [f"{root}: images without labels"]
  if top:
    notes = [
      f"{root}: its folders, {naming.shown(top, 5)}, are none of the network's"
      " classes, so no label is known"
    ]
  if others:
    notes.append(f"{root}: not read: {_said(others)}")
  return _Files(
    root,
    max_pixels,
    classes=[""],
    labels=np.zeros(len(names), np.int32),
    names=names,
    notes=notes,
  )


def _left_out(
  labels: set[str],
  empty: Mapping[str, str],
  beside: collections.Counter[str],
  ignored: collections.Counter[str],
) -> list[str]:
  """Says what of a folder is no image of a class.

  Args:
    labels: the classes that have images.
    empty: folders of classes without any, and what is in them.
    beside: files beside the folders of classes, by kind.
    ignored: what lies among the images, by kind.
  """
  lines = []
  if empty:
    folders = [f"{name} ({what})" for name, what in empty.items()]
    gone = sorted({pathlib.PurePath(name).name for name in empty} - labels)
    lines.append(
      f"no image in {naming.shown(folders, 5)}"
      + (f", so no class {naming.shown(gone, 5)}" if gone else "")
    )
  if beside:
    lines.append(
      f"{beside.total():,} files beside the class folders are not used"
      f" ({_said(beside)})"
    )
  if ignored:
    lines.append(
      f"{ignored.total():,} entries that are not images were ignored"
      f" ({_said(ignored)})"
    )
  return lines


def _listing(path: pathlib.Path) -> tuple[list[str], list[str], list[str]]:
  """Returns folders, images and other files of a folder, none hidden."""
  folders, image_names, others = [], [], []
  with os.scandir(path) as entries:
    for entry in entries:
      if entry.name.startswith(".") or entry.name == "manifest.csv":
        continue
      is_image = pathlib.PurePath(entry.name).suffix.lower() in SUFFIXES
      kind = folders if entry.is_dir() else image_names if is_image else others
      kind.append(entry.name)
  return sorted(folders), sorted(image_names), sorted(others)


def _kinds(
  *files: Sequence[str], folders: Sequence[str] = ()
) -> collections.Counter[str]:
  """Counts files by suffix, and folders."""
  counts = collections.Counter(
    pathlib.PurePath(name).suffix.lower() or "without suffix"
    for name in itertools.chain(*files)
  )
  return counts + collections.Counter({"folders": len(folders)})


def _said(kinds: collections.Counter[str]) -> str:
  return naming.shown([f"{n:,} {kind}" for kind, n in kinds.most_common()], 5)


# --- TFDS --------------------------------------------------------------------


class _Tfds(Examples):
  """Records of a TFDS data set in a random-access format, encoded images."""

  def __init__(
    self,
    name: str,
    data_dir: str | None,
    image_key: str,
    parts: list[tuple[str, int]],
    files: list[tuple[str, int, int]],
    max_pixels: int,
    **fields: Any,
  ):
    super().__init__(**fields)
    self._name = name
    self._data_dir = data_dir
    self._image_key = image_key
    self._parts = parts  # (split, number of rows), in the order of rows
    self._files = files
    self._max_pixels = max_pixels
    self._sources: dict[str, Any] = {}

  def __getstate__(self) -> dict[str, Any]:
    # Open readers stay in the process that opened them.
    return {**self.__dict__, "_sources": {}}

  def _locate(self, row: int) -> tuple[str, int]:
    for split, count in self._parts:
      if row < count:
        return split, row
      row -= count
    raise IndexError(row)

  def read(self, row: int) -> np.ndarray:
    return images.decode(self._encoded(row), max_pixels=self._max_pixels)

  def digest(self, row: int) -> str:
    return hashlib.sha256(self._encoded(row)).hexdigest()

  def _encoded(self, row: int) -> bytes:
    split, index = self._locate(row)
    if split not in self._sources:
      builder = _tfds_builder(self._name, self._data_dir)
      self._sources[split] = _undecoded(builder, split, self._image_key)
    try:
      return self._sources[split][index][self._image_key]
    # The reader raises whatever its C++ side does on a damaged file.
    except Exception as e:
      raise images.ImageError(f"damaged record: {e}") from None

  def fingerprint(self, rows: Sequence[int] | None = None) -> str:
    return _hash(self._max_pixels, self._files)


def _open_tfds(name: str, data_dir: str | None, max_pixels: int) -> Examples:
  import tensorflow_datasets as tfds

  builder = _tfds_builder(name, data_dir)
  features = builder.info.features
  image_key = _only_key(name, features, tfds.features.Image, "image")
  label_key = _only_key(name, features, tfds.features.ClassLabel, "label")
  ignored = [s for s in builder.info.splits if s not in _SPLIT_NAMES]
  used = [s for s in builder.info.splits if s in _SPLIT_NAMES]
  if not used:
    raise UsageError(
      f"tfds:{name}: its splits are {', '.join(ignored)}; train, validation or"
      " test is needed"
    )
  labels, names, splits, parts, files = [], [], [], [], []
  for split in used:
    source = _undecoded(builder, split, image_key)
    for start in range(0, len(source), 256):
      chunk = range(start, min(start + 256, len(source)))
      labels.extend(
        int(record[label_key]) for record in source.__getitems__(list(chunk))
      )
    names.extend(f"{split}/{i:06d}" for i in range(len(source)))
    splits.extend([_SPLIT_NAMES[split]] * len(source))
    parts.append((split, len(source)))
    for filename in builder.info.splits[split].filenames:
      stat = os.stat(os.path.join(builder.data_dir, filename))
      files.append((filename, stat.st_size, stat.st_mtime_ns))
  if min(labels, default=0) < 0:
    raise UsageError(f"tfds:{name}: {names[labels.index(-1)]} has no label")
  label_names = features[label_key].names
  classes, numbers, notes = index([label_names[label] for label in labels])
  if gone := sorted(set(label_names) - set(classes)):
    notes.append(f"no image of the classes {naming.shown(gone, 5)}")
  if ignored:
    notes.append(f"splits not used: {', '.join(ignored)}")
  return _Tfds(
    name,
    data_dir,
    image_key,
    parts,
    files,
    max_pixels,
    classes=classes,
    labels=numbers,
    names=names,
    splits=splits if len(set(splits)) > 1 else None,
    notes=[f"tfds:{name}: {note}" for note in notes],
  )


def _tfds_builder(name: str, data_dir: str | None) -> Any:
  """Opens a prepared TFDS data set; says how to prepare one that is not."""
  import tensorflow_datasets as tfds

  prepare = (
    'pip install "jaxtransfer[tfds-prepare]" && tfds build'
    f" {name} --file_format=array_record"
  ) + (f" --data_dir={data_dir}" if data_dir else "")
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # it warns of what we report ourselves
  try:
    options: dict[str, Any] = {"data_dir": data_dir} if data_dir else {}
    builder = tfds.builder(name, **options)
    prepared = builder.is_prepared()
  except tfds.core.DatasetNotFoundError:
    raise MissingSourceError(
      f"tfds:{name}: TFDS knows no such data set and none is prepared in"
      f" {data_dir or '~/tensorflow_datasets'}"
    ) from None
  except Exception as e:
    raise UsageError(f"tfds:{name}: {str(e).splitlines()[0]}") from e
  finally:
    logging.set_verbosity(verbosity)
  if not prepared:
    raise MissingSourceError(
      f"tfds:{name} is not prepared in {builder.data_dir}; prepare it once:"
      f" {prepare}"
    )
  try:
    builder.as_data_source(split=next(iter(builder.info.splits)))
  except NotImplementedError:
    raise UsageError(
      f"tfds:{name} is prepared as {builder.info.file_format.value}, which"
      f" needs TensorFlow to read; prepare it again: {prepare} --overwrite"
    ) from None
  return builder


def _undecoded(builder: Any, split: str, image_key: str) -> Any:
  """A split's records with the image as the bytes of its file."""
  import tensorflow_datasets as tfds

  return builder.as_data_source(
    split=split, decoders={image_key: tfds.decode.SkipDecoding()}
  )


def _only_key(name: str, features: Any, kind: type, usual: str) -> str:
  """The key of the one feature of a kind, or the usual one of several."""
  keys = [k for k, feature in features.items() if isinstance(feature, kind)]
  if usual in keys:
    return usual
  if len(keys) != 1:
    raise UsageError(
      f"tfds:{name}: {len(keys)} features of type {kind.__name__} among"
      f" {', '.join(features)}; one is needed"
    )
  return keys[0]


# --- synthetic ---------------------------------------------------------------


def _open_synthetic(name: str, image_size: int) -> Examples:
  path, _, query = name.partition("?")
  kind, _, task = path.partition("/")
  if kind != "tissue":
    raise UsageError(f"synthetic:{name}: the one there is synthetic:tissue")
  # It imports `Examples`, which its tiles are.
  from jaxtransfer.data import tissue

  options: dict[str, Any] = {"task": task} if task else {}
  options["size"] = image_size
  for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if key not in ("patients", "tiles_per_patient", "size", "seed"):
      raise UsageError(
        f"synthetic:{name}: no option {key!r}; there are patients,"
        " tiles_per_patient, size and seed"
      )
    if not value.isdecimal():
      raise UsageError(f"synthetic:{name}: {key} is {value!r}, not a number")
    options[key] = int(value)
  return tissue.open_tissue(**options)
