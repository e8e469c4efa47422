"""The feature files of a workdir: which are there, and of what they are.

A file is known by what is in it, not by its name alone: one that is cut short
is made again, one of other settings or of other tiles is refused.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

from jaxtransfer import errors, files, progress, units
from jaxtransfer.data import feature_files, tiles
from jaxtransfer.data import names as naming
from jaxtransfer.extraction.encoders import Output

DTYPES = ("float16", "float32")
LAYOUTS = ("trident", "stamp")

# Batches that a bag must fill to be a unit of its own, and those of a packet:
# the last batch of a unit is padded.
_ALONE, _TOGETHER = 4, 16
# Files that are looked into at the same time.
_LOOKS = 16
# What must be equal of two files for their features to compare.
_DECIDING = (
  *("network", "cut", "weights_sha256", "normalisation"),
  *("image_size", "resize", "compute_dtype"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How files are made.

  Attributes:
    batch_size: tiles in a step over all devices.
    workers: reading processes; 0 for threads.
    max_failures: share of unreadable tiles with which a bag fails.
    dtype: of the features, one of `DTYPES`.
    layout: of the files, one of `LAYOUTS`.
    versions: of packages, for the files to say.
  """

  batch_size: int
  workers: int = 0
  max_failures: float = 0.01
  dtype: str = "float16"
  layout: str = "trident"
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Packet:
  """Bags whose tiles share batches: one that is large, or several small."""

  bags: tuple[tiles.Bag, ...]

  @property
  def name(self) -> str:
    """The first bag's."""
    return self.bags[0].name

  @property
  def count(self) -> int:
    """How many tiles there are."""
    return sum(bag.count for bag in self.bags)


def pack(bags: Sequence[tiles.Bag], batch_size: int) -> list[Packet]:
  """Divides bags into units, the largest first.

  Args:
    bags: in an order that is the same at each start.
    batch_size: tiles of a batch.
  """
  packets, held = [], []
  for bag in bags:
    if bag.count >= _ALONE * batch_size:
      packets.append(Packet((bag,)))
      continue
    held.append(bag)
    if sum(of.count for of in held) >= _TOGETHER * batch_size:
      packets.append(Packet(tuple(held)))
      held = []
  if held:
    packets.append(Packet(tuple(held)))
  return sorted(packets, key=lambda packet: -packet.count)


class Store(units.Units):
  """The files of bags and what is said of each, shared by processes.

  A unit is a packet of bags; its state is what the files of its bags say.

  Args:
    of: the bags.
    outputs: the folders of files.
    settings: how they are made.
    directory: the workdir: files are in `features/`, and what is said of each
      bag in `units/`.

  Attributes:
    outputs: as given.
    settings: likewise.
    settled: what came of bags so far, "done" or "failed".
    notes: what was found beside, a line each.
  """

  def __init__(
    self,
    of: tiles.TileSet,
    outputs: Sequence[Output],
    settings: Settings,
    directory: pathlib.Path,
  ):
    super().__init__(directory / "units")
    self.outputs, self.settings = outputs, settings
    self.settled: dict[tiles.Bag, str] = {}
    self.notes: list[str] = []
    self._tiles, self._directory = of, directory
    self._damaged: set[pathlib.Path] = set()
    self._attributes = {
      output.folder: {
        **output.attributes(),
        "image_size": of.size,
        "resize": of.resize(),
        "tile": of.tile,
        "versions": dict(settings.versions),
      }
      for output in outputs
    }

  @property
  def settled_tiles(self) -> int:
    """How many tiles the bags have that are settled."""
    # Another thread may settle one meanwhile.
    return sum(bag.count for bag in list(self.settled))

  def file(self, output: Output, bag: tiles.Bag) -> pathlib.Path:
    """Returns a feature file's name, there or not."""
    return self._directory / "features" / output.folder / f"{bag.name}.h5"

  def look(self) -> list[tiles.Bag]:
    """Looks into every file, and returns the bags that have not all of theirs.

    Raises:
      UsageError: a file is of other settings, or of other tiles.
    """
    bags, what = self._tiles.bags, self._tiles.what
    self.settled.clear()
    self._damaged.clear()
    missing = []
    # On a network file system a look is a round trip.
    with (
      progress.Progress("looking into files", what, len(bags)) as bar,
      futures.ThreadPoolExecutor(_LOOKS) as pool,
    ):
      for bag, is_open in zip(bags, pool.map(self.is_open, bags), strict=True):
        if is_open:
          missing.append(bag)
        bar.update()
    self.notes = []
    ours = {f"{bag.name}.h5" for bag in bags}
    for output in self.outputs:
      folder = self._directory / "features" / output.folder
      others = [p for p in sorted(folder.glob("*.h5")) if p.name not in ours]
      for path in others:
        self._look_into(output, path, None)
      if others:
        names = naming.shown([path.stem for path in others])
        self.notes.append(
          f"{folder} holds files of {what} that are not in the source,"
          f" {len(others):,}: {names}"
        )
    if self._damaged:
      names = naming.shown(sorted(map(str, self._damaged)))
      self.notes.append(
        f"damaged files, {len(self._damaged):,}, are made again: {names}"
      )
    return missing

  def forget_failures(self) -> None:
    """Forgets which bags have failed, so that they are tried again."""
    for bag in self._tiles.bags:
      path = self.path / bag.name / "failed.json"
      path.unlink(missing_ok=True)
      self.settled.pop(bag, None)

  def state(self, unit: Any, stop_after: int | None = None) -> str:
    """Returns "open" where one of a packet's bags is, else "done"."""
    del stop_after
    # Of all, so that what other processes have settled is known.
    states = [self.is_open(bag) for bag in unit.bags]
    return "open" if any(states) else "done"

  def is_open(self, bag: tiles.Bag) -> bool:
    """Whether a bag's files are still to be made.

    Raises:
      UsageError: one of them is of other settings, or of other tiles.
    """
    if bag in self.settled:
      return False
    failed, done = self._record(bag, "failed"), self._record(bag, "done")
    paths = {output: self.file(output, bag) for output in self.outputs}
    if not (failed or done or any(map(pathlib.Path.exists, paths.values()))):
      # Its slide need not be read to know that.
      return True
    found = [
      self._look_into(output, path, bag.digest)
      for output, path in paths.items()
    ]
    if failed and failed["tiles_sha256"] == bag.digest:
      self.settled[bag] = "failed"
    elif (
      done
      and done["tiles_sha256"] == bag.digest
      and all(file and file.count == done["tiles"] for file in found)
    ):
      self.settled[bag] = "done"
    return bag not in self.settled

  def _record(self, bag: tiles.Bag, kind: str) -> dict[str, Any] | None:
    return self.read(Packet((bag,)), f"{kind}.json")

  def _look_into(
    self, output: Output, path: pathlib.Path, digest: str | None
  ) -> feature_files.Described | None:
    """Returns what a file is; None where it is not there or not whole.

    Raises:
      UsageError: it is of other settings or, with a digest, of other tiles.
    """
    if not path.exists():
      return None
    try:
      found = feature_files.inspect(path)
    except feature_files.FeatureFileError:
      self._damaged.add(path)
      return None
    wanted = self._attributes[output.folder]
    layout = "stamp" if found.layout == "stamp" else "trident"
    pairs = {key: (found.attributes.get(key), wanted[key]) for key in _DECIDING}
    pairs |= {
      "channels": (found.dim, output.channels),
      "features_dtype": (str(found.dtype), self.settings.dtype),
      "layout": (layout, self.settings.layout),
    }
    if digest is not None:
      pairs["tiles"] = found.attributes.get("tiles_sha256"), digest
    unlike = [
      f"{key}: {there!r} there, {now!r} now"
      for key, (there, now) in pairs.items()
      if there != now
    ]
    if unlike:
      raise errors.UsageError(
        f"{path} holds other features ({'; '.join(unlike)}), and they are not"
        " mixed: choose another --workdir, or remove it"
      )
    return found

  def tidy(self, bag: tiles.Bag) -> None:
    """Removes what a process that was killed has left of a bag's files."""
    for output in self.outputs:
      path = self.file(output, bag)
      if path.parent.is_dir():
        start, end = f".{path.name}.", ".tmp"
        for left in os.listdir(path.parent):
          if left.startswith(start) and left.endswith(end):
            (path.parent / left).unlink(missing_ok=True)

  def write(
    self,
    output: Output,
    bag: tiles.Bag,
    places: tiles.Places,
    kept: Any,
    features: Any,
  ) -> None:
    """Writes a feature file.

    Args:
      output: which.
      bag: of which bag.
      places: where its tiles are.
      kept: (K,) those that could be read.
      features: (K, D), or what gives slices of its rows.

    Raises:
      FeatureFileError: the layout cannot hold it.
      OSError: the disk is full.
    """
    coords, names = places.coords, places.names
    file = feature_files.FeatureFile(
      features=features,
      coords=None if coords is None else coords[kept],
      unit=None if coords is None else "px",
      extent=places.extent,
      names=None if names is None else [names[tile] for tile in kept],
      attributes={
        **places.attributes,
        **self._attributes[output.folder],
        "name": bag.name,
        "dropped": bag.count - len(kept),
        "tiles_sha256": bag.digest,
      },
    )
    path = self.file(output, bag)
    feature_files.write_features(path, file, self.settings.layout)

  def record(self, bag: tiles.Bag, record: Mapping[str, Any]) -> None:
    """Records what came of a bag: its files are there, or will never be.

    Args:
      bag: which.
      record: of it `reason`, "" where they are.
    """
    kind = "failed" if record["reason"] else "done"
    files.write_json(
      self.path / bag.name / f"{kind}.json",
      {"tiles_sha256": bag.digest, **record},
    )
    self.settled[bag] = kind

  def results(self) -> list[dict[str, Any]]:
    """Returns what came of every bag, those that nobody tiled among them.

    Each is a dict: `name`, `label`, `group`, `tiles` (rows of its files),
    `mpp` (um/px of them, or None), `dropped` ([x, y, name, reason] of each tile
    that could not be read), `seconds`, and `reason`, "" but for one that
    failed.
    """
    found = []
    for bag in self._tiles.bags:
      about = {"name": bag.name, "label": bag.label, "group": bag.group}
      record = self._record(bag, self.settled.get(bag, "done")) or {}
      found.append({**record, **about})
    for name, reason in self._tiles.absent.items():
      found.append({"name": name, "label": "", "group": "", **failed(reason)})
    return found


def failed(reason: str) -> dict[str, Any]:
  """Returns the record of a bag that has failed.

  Args:
    reason: why.
  """
  return {
    **{"tiles": 0, "mpp": None, "dropped": []},
    **{"seconds": 0.0, "reason": reason},
  }
