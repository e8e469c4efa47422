"""The configs that users start from, and images for the jobs that train."""

import csv
import importlib.util
import json
import pathlib

import ml_collections
import numpy as np
import PIL.Image

ROOT = pathlib.Path(__file__).parents[2]


def load(name: str, *arguments: str) -> ml_collections.ConfigDict:
  """Returns what configs/<name>.py makes, as the launcher would load it."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"config_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


def check_json(path: pathlib.Path) -> int:
  """Parses every JSON below a directory, as a reader without NaN would.

  Returns:
    How many files there were.
  """

  def refuse(constant: str):
    raise AssertionError(f"{file}: {constant} is not JSON")

  found = 0
  for file in path.rglob("*"):
    # Orbax's own metadata has no ending.
    if not file.is_file() or (
      file.suffix not in (".json", ".jsonl") and "metadata" not in file.name
    ):
      continue
    text = file.read_text(encoding="utf-8")
    for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
      json.loads(part, parse_constant=refuse)
    found += 1
  return found


def read_predictions(
  path: pathlib.Path, **said: str
) -> tuple[list[dict[str, str]], np.ndarray]:
  """Reads a run's predictions.csv.

  Args:
    path: the workdir.
    said: what columns must say.

  Returns:
    The lines, and (N, C) their probabilities.
  """
  with open(path / "predictions.csv", newline="", encoding="utf-8") as f:
    lines = [r for r in csv.DictReader(f) if said.items() <= r.items()]
  columns = [name for name in lines[0] if name.startswith("probability:")]
  return lines, np.array([[line[c] for c in columns] for line in lines], float)


def write_tiles(
  root: pathlib.Path,
  side: int = 32,
  images: int = 80,
  classes: int = 2,
  per_patient: int = 4,
) -> pathlib.Path:
  """Writes images whose classes are textures.

  Returns:
    The path of their manifest.
  """
  rng = np.random.default_rng(0)
  rows = []
  for i in range(images):
    label, patient = i % classes, i // per_patient
    wave = np.sin(np.arange(side) * (0.4 + 0.5 * label))
    noise = rng.normal(0, 60, (side, side, 3))
    image = 128 + 60 * wave[:, None, None] + noise
    path = root / f"{i}.png"
    PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    rows.append((path.name, f"class {label}", f"patient {patient}"))
  with open(root / "manifest.csv", "w", newline="") as f:
    csv.writer(f).writerows([("path", "label", "group"), *rows])
  return root / "manifest.csv"
