"""Feature and coordinate files of slides: ours, TRIDENT's, CLAM's and STAMP's.

  TRIDENT   `features` (N, D) and `coords` (N, 2) at level 0, top left, with how
            large a tile is written beside `coords`. Ours are these, and say
            more beside both: the exact mpp, the network, its weights.
  CLAM      the same datasets; its coordinate files say `patch_size` at
            `patch_level`, its feature files nothing.
  STAMP     `feats` (N, D) float16, `coords` (N, 2) in micrometres.
  others    `features` (1, N, D).

Sources: TRIDENT trident/IO.py (`coords_to_h5`, `save_h5`, `read_coords_legacy`)
and trident/wsi_objects/WSIPatcher.py (`from_legacy_coords`); CLAM
wsi_core/WholeSlideImage.py; STAMP src/stamp/modeling/data.py (`get_coords`).
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import h5py
import numpy as np

from jaxtransfer import files
from jaxtransfer.data import hdf5

# The oldest STAMP whose reader knows the attributes written here; it refuses
# files of versions newer than its own.
_STAMP_VERSION = "2.0.0"
# Attributes that TRIDENT has on `coords`, and the two exact ones of ours.
_OF_COORDS = (
  "patch_size",
  "patch_size_level0",
  "level0_magnification",
  "target_magnification",
  "overlap",
  "name",
  "savetodir",
  "level0_width",
  "level0_height",
  "mpp",
  "level0_mpp",
)
# Below this mpp a scan is called that: TRIDENT's bounds.
_MAGNIFICATIONS = (
  (0.16, 80),
  (0.2, 60),
  (0.3, 40),
  (0.6, 20),
  (1.2, 10),
  (2.4, 5),
)
# Rows that are looked at together, to need little memory.
_ROWS = 8192


class FeatureFileError(Exception):
  """Why a file of features or coordinates cannot be used: one line."""


@dataclasses.dataclass
class Coords:
  """Where the tiles of a slide are.

  Attributes:
    coords: (N, 2) int64, x and y of the top left corners, level-0 pixels.
    extent: side of a tile in level-0 pixels.
    tile: side of a tile in pixels as a network sees it; None = not said.
    mpp: micrometres per pixel of the tile; None = not said exactly.
    width: of the slide in level-0 pixels; None = not said.
    height: likewise.
    attributes: what else the file says; of ours, `name` and `overlap`.
    layout: "ours", "trident" or "clam".
  """

  coords: np.ndarray
  extent: float
  tile: int | None
  mpp: float | None
  width: int | None = None
  height: int | None = None
  attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
  layout: str = "ours"

  @property
  def level0_mpp(self) -> float | None:
    """Micrometres per level-0 pixel, where `mpp` and `tile` are known."""
    if self.mpp is None or self.tile is None:
      return None
    return self.mpp * self.tile / self.extent

  def described(self) -> dict[str, Any]:
    """Returns TRIDENT's attributes, and `mpp` and `level0_mpp`, exact.

    TRIDENT has whole magnifications and a whole `patch_size_level0`, so the
    exact numbers stand beside them.
    """
    level0_mpp = self.level0_mpp
    return {
      "patch_size": self.tile,
      "patch_size_level0": round(self.extent),
      "level0_magnification": level0_mpp and _magnification(level0_mpp),
      "target_magnification": self.mpp and _magnification(self.mpp),
      "overlap": self.attributes.get("overlap", 0),
      "name": self.attributes.get("name"),
      "savetodir": self.attributes.get("savetodir"),
      "level0_width": self.width,
      "level0_height": self.height,
      "mpp": self.mpp,
      "level0_mpp": level0_mpp,
    }


@dataclasses.dataclass
class FeatureFile:
  """The features of a slide's tiles, or of other images.

  Attributes:
    features: (N, D) float16 or float32.
    coords: (N, 2), top left corners, int64 where `unit` is "px"; or None.
    unit: "px" (level 0) or "um"; None where there are no coords, or nobody
      says.
    extent: side of a tile in that unit; None = not said.
    names: of every row, where the images are files; or None.
    attributes: what is written beside features and coords; of ours `network`,
      `cut`, `weights`, `weights_sha256`, `mpp`, `tile`, `normalisation`,
      `versions`, `encoder`, `name`.
    layout: "ours", "trident", "clam" or "stamp".
    nonfinite: rows that hold NaN or infinity, int64; what becomes of them is
      the caller's to say.
    notes: what was converted, a line each.
  """

  features: np.ndarray
  coords: np.ndarray | None = None
  unit: str | None = None
  extent: float | None = None
  names: list[str] | None = None
  attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
  layout: str = "ours"
  nonfinite: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int64)
  )
  notes: list[str] = dataclasses.field(default_factory=list)

  def take(self, rows: np.ndarray) -> "FeatureFile":
    """Returns the same file with some of its rows.

    Args:
      rows: (M,) which, as indices or as a mask over all.
    """
    kept = np.arange(len(self.features))[rows]
    bad = np.flatnonzero(np.isin(kept, self.nonfinite))
    return dataclasses.replace(
      self,
      features=self.features[kept],
      coords=None if self.coords is None else self.coords[kept],
      names=None if self.names is None else [self.names[i] for i in kept],
      nonfinite=bad,
    )


@dataclasses.dataclass(frozen=True)
class Described:
  """What a feature file is, without its numbers.

  Attributes:
    count: how many rows.
    dim: features of each.
    dtype: as it is stored.
    attributes: as in `FeatureFile`.
    layout: likewise.
  """

  count: int
  dim: int
  dtype: np.dtype
  attributes: dict[str, Any]
  layout: str


def _magnification(mpp: float) -> int:
  """Returns what a resolution is called, in TRIDENT's whole numbers."""
  for bound, magnification in _MAGNIFICATIONS:
    if mpp < bound:
      return magnification
  return max(1, round(10 / mpp))


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[h5py.File]:
  try:
    with hdf5.reading(path) as f:
      yield f
  except hdf5.Refused as refusal:
    raise FeatureFileError(f"{files.visible(str(path))}: {refusal}") from None


# --- coordinates -------------------------------------------------------------


def read_coords(path: str | os.PathLike[str]) -> Coords:
  """Reads where the tiles of a slide are.

  How large a tile is, is what the file says: `patch_size_level0`, or CLAM's
  `patch_size` times `downsample` (and `custom_downsample`, in older files), or,
  in files of ours, `patch_size` times `mpp` through `level0_mpp`, exact.

  Args:
    path: a coordinate file, or a feature file that says how large tiles are.

  Returns:
    The coordinates; none of them where the slide has no tissue.

  Raises:
    FeatureFileError: it is none, is cut short, or does not say it.
  """
  with _opened(pathlib.Path(path)) as f:
    stored = hdf5.dataset(f, "coords")
    if stored is None:
      raise hdf5.Refused(f"has no coords; there {_listed(f)}")
    attributes = hdf5.attributes(stored)
    geometry = _geometry(attributes)
    if geometry.extent is None:
      raise hdf5.Refused(
        "does not say how large a tile is: its coords have neither"
        " patch_size_level0 nor patch_size with patch_level and downsample"
      )
    return Coords(
      _pixels(_corners(stored)),
      geometry.extent,
      geometry.tile,
      geometry.mpp,
      geometry.width,
      geometry.height,
      attributes,
      geometry.layout,
    )


def write_coords(path: str | os.PathLike[str], coords: Coords) -> None:
  """Writes where the tiles of a slide are, as TRIDENT does, and exactly.

  Args:
    path: the file; it appears whole or not at all.
    coords: what is written; attributes that TRIDENT does not have follow its.

  Raises:
    OSError: it cannot be written.
  """
  described = coords.described()
  more = {k: v for k, v in coords.attributes.items() if k not in described}
  with hdf5.writing(path) as f:
    _write_corners(f, coords.coords.astype(np.int64), {**described, **more})


@dataclasses.dataclass(frozen=True)
class _Geometry:
  """What the attributes of coordinates say of the tiles."""

  extent: float | None
  tile: int | None
  mpp: float | None
  width: int | None
  height: int | None
  layout: str


def _geometry(attributes: Mapping[str, Any]) -> _Geometry:
  tile = _positive(attributes, "patch_size")
  mpp = _positive(attributes, "mpp")
  level0_mpp = _positive(attributes, "level0_mpp")
  extent = _positive(attributes, "patch_size_level0")
  width = _positive(attributes, "level0_width")
  height = _positive(attributes, "level0_height")
  layout = "trident" if extent else "clam"
  if extent and tile and mpp and level0_mpp:
    exact = tile * mpp / level0_mpp
    if abs(exact - extent) > 1:
      raise hdf5.Refused(
        f"says two sizes of a tile: patch_size_level0 is {extent:g}, and"
        f" {tile:g} px of {mpp:g} um are {exact:.1f} of {level0_mpp:g} um"
      )
    extent, layout = exact, "ours"
  elif not extent and tile and "patch_level" in attributes:
    downsample = _positive(attributes, "downsample")
    if attributes["patch_level"] == 0:
      downsample = downsample or 1.0
      width, height = _sides(attributes.get("level_dim"))
    more = _positive(attributes, "custom_downsample") or 1.0
    extent = downsample and tile * downsample * more
  return _Geometry(
    extent,
    None if tile is None else round(tile),
    mpp,
    None if width is None else round(width),
    None if height is None else round(height),
    layout,
  )


def _positive(attributes: Mapping[str, Any], key: str) -> float | None:
  """Returns a number, or the mean of one for each side; None = not there."""
  value = attributes.get(key)
  if value is None:
    return None
  try:
    # Some tools write every attribute as text.
    number = float(np.mean(np.asarray(value, np.float64)))
  except (TypeError, ValueError):
    number = math.nan
  if not 0 < number < math.inf:
    raise hdf5.Refused(f"its coords have {key} {value!r}; it must be above 0")
  return number


def _sides(value: Any) -> tuple[float | None, float | None]:
  if isinstance(value, list) and len(value) == 2:
    return value[0], value[1]
  return None, None


def _corners(stored: h5py.Dataset) -> np.ndarray:
  """Returns (N, 2) of any type of number."""
  shape = stored.shape
  if shape[:1] == (1,) and len(shape) == 3:
    shape = shape[1:]
  if shape[:1] == (0,):
    return np.zeros((0, 2), np.int64)
  if len(shape) != 2 or shape[1] != 2 or stored.dtype.kind not in "iuf":
    raise hdf5.Refused(
      f"coords are {stored.shape} of {stored.dtype}, not (tiles, 2) of numbers"
    )
  corners = stored[()].reshape(shape)
  if not np.isfinite(corners).all():
    raise hdf5.Refused("coords hold NaN or infinity")
  return corners


def _pixels(corners: np.ndarray) -> np.ndarray:
  """Returns coordinates as int64, which those in pixels are."""
  whole = corners.astype(np.int64)
  if not np.array_equal(whole, corners):
    raise hdf5.Refused("coords are not whole pixels of level 0")
  return whole


def _write_corners(
  f: h5py.File, corners: np.ndarray, attributes: dict[str, Any]
) -> None:
  stored = f.create_dataset("coords", data=corners)
  hdf5.write_attributes(stored, attributes)


# --- features ----------------------------------------------------------------


def read_features(
  path: str | os.PathLike[str],
  read_tensor: Callable[[pathlib.Path], np.ndarray] | None = None,
) -> FeatureFile:
  """Reads the features of a slide's tiles, whoever wrote them.

  Args:
    path: an HDF5 file of ours, TRIDENT's, CLAM's or STAMP's, or of others with
      `features` of (N, D) or (1, N, D); or CLAM's `.pt`.
    read_tensor: reads the tensor that a `.pt` is, as `weights.torchfile` does.

  Returns:
    The features; rows that are not finite are named, not dropped.

  Raises:
    FeatureFileError: it is none, is cut short or damaged, or its parts do not
      fit each other.
  """
  path = pathlib.Path(path)
  if path.suffix == ".pt" and read_tensor is not None:
    return _read_tensor(path, read_tensor)
  with _opened(path) as f:
    parts = _parts(f)
    notes = []
    features = parts.features[()].reshape(parts.count, parts.dim)
    dtype = _kept(features.dtype)
    if dtype.itemsize < features.dtype.itemsize:
      notes.append(f"features are {features.dtype}, read as {dtype}")
    features = _converted(features, dtype)
    corners, unit, extent = _placed(parts)
    names = hdf5.dataset(f, "names")
    return FeatureFile(
      features,
      corners,
      unit,
      extent,
      None if names is None else [str(n) for n in names.asstr()[()]],
      parts.attributes,
      parts.layout,
      _nonfinite(features),
      notes,
    )


def inspect(path: str | os.PathLike[str]) -> Described:
  """Says what a feature file is, and that all of it is there.

  Args:
    path: as for `read_features`, HDF5.

  Returns:
    What it is; no array is read.

  Raises:
    FeatureFileError: as `read_features` does, but for values.
  """
  with _opened(pathlib.Path(path)) as f:
    parts = _parts(f)
    return Described(
      parts.count,
      parts.dim,
      parts.features.dtype,
      parts.attributes,
      parts.layout,
    )


def write_features(
  path: str | os.PathLike[str], file: FeatureFile, layout: str = "trident"
) -> None:
  """Writes features so that the tools of that layout read them.

  Args:
    path: the file; it appears whole or not at all.
    file: what is written. Beside `features` go its attributes, beside `coords`
      those of TRIDENT: with `**coords.described()` among the attributes it is
      all there.
    layout: "trident", which CLAM reads too, or "stamp", which has float16 and
      micrometres, and so needs `level0_mpp` among the attributes.

  Raises:
    FeatureFileError: STAMP's layout cannot hold it.
    OSError: it cannot be written.
    ValueError: the parts do not fit each other.
  """
  _check(file)
  if layout == "stamp":
    _write_stamp(path, file)
    return
  if layout != "trident":
    raise ValueError(f"layout {layout!r}; there are trident and stamp")
  of_coords = {k: v for k, v in file.attributes.items() if k in _OF_COORDS}
  shared = ("name", "savetodir", "mpp")
  of_features = {
    k: v
    for k, v in file.attributes.items()
    if k not in _OF_COORDS or k in shared
  }
  with hdf5.writing(path) as f:
    stored = f.create_dataset("features", data=file.features)
    hdf5.write_attributes(stored, of_features)
    if file.coords is not None:
      corners = file.coords.astype(np.int64)
      if file.extent is not None:
        of_coords.setdefault("patch_size_level0", round(file.extent))
      _write_corners(f, corners, of_coords)
    if file.names is not None:
      names = [files.visible(name) for name in file.names]
      f.create_dataset("names", data=names, dtype=h5py.string_dtype())


def _check(file: FeatureFile) -> None:
  features, coords, names = file.features, file.coords, file.names
  if features.ndim != 2 or features.dtype not in (np.float16, np.float32):
    raise ValueError(f"features are {features.shape} of {features.dtype}")
  if coords is not None and (
    coords.shape != (len(features), 2) or file.unit != "px"
  ):
    raise ValueError(
      f"coords are {coords.shape} in {file.unit} for {len(features)} rows"
    )
  if names is not None and len(names) != len(features):
    raise ValueError(f"{len(names)} names for {len(features)} rows")


def _write_stamp(path: str | os.PathLike[str], file: FeatureFile) -> None:
  attributes = file.attributes
  level0_mpp, tile = attributes.get("level0_mpp"), attributes.get("patch_size")
  where = files.visible(str(path))
  if file.coords is None or not level0_mpp or not tile or not file.extent:
    raise FeatureFileError(
      f"{where}: STAMP's layout has coordinates in micrometres, which need"
      " tiles of slides whose mpp is known"
    )
  halves = _converted(file.features, np.dtype(np.float16))
  if len(_nonfinite(halves)) > len(_nonfinite(file.features)):
    raise FeatureFileError(
      f"{where}: STAMP's layout has float16, and features reach"
      f" {np.abs(file.features).max():.3g}, above its {np.finfo('f2').max:.0f}"
    )
  of_file = {
    "stamp_version": _STAMP_VERSION,
    "extractor": attributes.get("encoder") or attributes.get("network") or "",
    "unit": "um",
    "tile_size_um": file.extent * level0_mpp,
    "tile_size_px": tile,
    "code_hash": attributes.get("weights_sha256") or "",
    "feat_type": "tile",
  }
  more = {k: v for k, v in attributes.items() if k not in of_file}
  with hdf5.writing(path) as f:
    f["feats"] = halves
    f["coords"] = (file.coords * level0_mpp).astype(np.float32)
    hdf5.write_attributes(f, {**of_file, **more})


@dataclasses.dataclass(frozen=True)
class _Parts:
  """The datasets of a feature file, checked against each other, not read."""

  features: h5py.Dataset
  coords: h5py.Dataset | None
  count: int
  dim: int
  extent: float | None
  attributes: dict[str, Any]
  layout: str


def _parts(f: h5py.File) -> _Parts:
  stored, layout = hdf5.dataset(f, "features"), "clam"
  if stored is None:
    stored, layout = hdf5.dataset(f, "feats"), "stamp"
  if stored is None:
    raise hdf5.Refused(f"has no features; there {_listed(f)}")
  shape = stored.shape
  if len(shape) == 3 and shape[0] == 1:
    shape = shape[1:]
  if len(shape) != 2 or not shape[1]:
    raise hdf5.Refused(
      f"features have the shape {stored.shape}, not (tiles, channels)"
    )
  _kept(stored.dtype)
  count, dim = shape
  coords = hdf5.dataset(f, "coords")
  attributes: dict[str, Any] = {}
  extent = None
  if coords is not None:
    length = coords.shape[1 if len(coords.shape) == 3 else 0]
    if length != count:
      raise hdf5.Refused(
        f"has {count:,} rows of features and {length:,} of coords"
      )
    attributes = hdf5.attributes(coords)
    if layout == "clam":
      geometry = _geometry(attributes)
      layout, extent = geometry.layout, geometry.extent
  own = hdf5.attributes(stored)
  if "weights_sha256" in own:
    layout = "ours"
  attributes = {**attributes, **own, **hdf5.attributes(f)}
  return _Parts(stored, coords, count, dim, extent, attributes, layout)


def _listed(f: h5py.File) -> str:
  names = [files.visible(str(name)) for name in f]
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return f"is {', '.join(names[:5])}{more}" if names else "is nothing in it"


def _kept(dtype: np.dtype) -> np.dtype:
  """Returns the type that features are read as."""
  if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
    raise hdf5.Refused(
      f"features are {dtype}; those of networks are float16 or float32"
    )
  return np.dtype(np.float16 if dtype.itemsize == 2 else np.float32)


def _converted(features: np.ndarray, dtype: np.dtype) -> np.ndarray:
  with np.errstate(over="ignore"):
    return features.astype(dtype, copy=False)


def _nonfinite(features: np.ndarray) -> np.ndarray:
  """Returns the rows of (N, D) that hold NaN or infinity, int64."""
  found = [
    start + np.flatnonzero(~np.isfinite(features[start : start + _ROWS]).all(1))
    for start in range(0, len(features), _ROWS)
  ]
  return np.concatenate([np.zeros(0, np.int64), *found])


def _placed(
  parts: _Parts,
) -> tuple[np.ndarray | None, str | None, float | None]:
  """Returns coordinates, their unit, and a tile's side in it."""
  if parts.coords is None:
    return None, None, None
  corners = _corners(parts.coords)
  if parts.layout != "stamp":
    return _pixels(corners), "px", parts.extent
  # Versions of STAMP before 2 had `tile_size`, and those before said nothing.
  keys = ["tile_size_um"]
  if parts.attributes.get("unit") == "um":
    keys.append("tile_size")
  for key in keys:
    if extent := _positive(parts.attributes, key):
      return corners.astype(np.float64), "um", extent
  return corners, None, None


def _read_tensor(
  path: pathlib.Path, read_tensor: Callable[[pathlib.Path], np.ndarray]
) -> FeatureFile:
  features = read_tensor(path)
  try:
    dtype = _kept(features.dtype)
  except hdf5.Refused as refusal:
    raise FeatureFileError(f"{files.visible(str(path))}: {refusal}") from None
  if features.ndim == 3 and len(features) == 1:
    features = features[0]
  if features.ndim != 2:
    raise FeatureFileError(
      f"{files.visible(str(path))}: features have the shape {features.shape},"
      " not (tiles, channels)"
    )
  features = _converted(features, dtype)
  return FeatureFile(features, nonfinite=_nonfinite(features), layout="clam")
