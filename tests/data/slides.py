"""Feature files of small slides, and their table, as users have them."""

import csv
import pathlib

import h5py
import numpy as np

CHANNELS = 6


def write_file(
  path: pathlib.Path,
  features: np.ndarray,
  layout: str = "trident",
  **attributes,
) -> None:
  """Writes features as TRIDENT, CLAM or STAMP do, by h5py alone."""
  path.parent.mkdir(parents=True, exist_ok=True)
  coords = np.stack(
    [np.arange(len(features)) * 512, np.zeros(len(features))], 1
  )
  with h5py.File(path, "w") as f:
    if layout == "stamp":
      f["feats"] = features.astype(np.float16)
      f["coords"] = coords.astype(np.float64) / 4
      f.attrs.update(
        {"unit": "um", "tile_size_um": 128.0, "stamp_version": "2.0.0"}
      )
      f.attrs.update(attributes)
      return
    f["features"] = features
    f["coords"] = coords.astype(np.int64)
    if layout == "trident":
      f["features"].attrs.update({"name": path.stem, **attributes})
      f["coords"].attrs.update(
        {"patch_size": 256, "patch_size_level0": 512, "name": path.stem}
      )


def features(
  slide: int, positive: bool, tiles: int, channels: int = CHANNELS
) -> np.ndarray:
  """Returns noise; of a positive slide one tile in eight stands out."""
  rng = np.random.default_rng(slide)
  drawn = rng.normal(size=(tiles, channels)).astype(np.float32)
  if positive:
    drawn[: max(1, tiles // 8), :2] += 4
  return drawn


def write_slides(
  root: pathlib.Path,
  slides: int = 24,
  per_patient: int = 2,
  layout: str = "trident",
  folder: str = "features",
  classes: int = 2,
  channels: int = CHANNELS,
  **attributes,
) -> pathlib.Path:
  """Writes a folder of features and labels.csv beside it.

  Slides of a patient have one label; slide i has 3 to 40 tiles.

  Returns:
    The path of the table.
  """
  rows = []
  for i in range(slides):
    patient = i // per_patient
    label = patient % classes
    drawn = features(i, label > 0, 3 + (i * 7) % 38, channels)
    if label > 1:
      drawn[:, 2] += 4
    name = f"slide{i:02d}"
    write_file(root / folder / f"{name}.h5", drawn, layout, **attributes)
    rows.append((name, f"class {label}", f"patient {patient}"))
  write_table(root / "labels.csv", [("slide", "label", "group"), *rows])
  return root / "labels.csv"


def write_table(path: pathlib.Path, rows) -> None:
  with open(path, "w", newline="", encoding="utf-8") as f:
    csv.writer(f).writerows(rows)
