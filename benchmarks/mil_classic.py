r"""The classical bags (MUSK, Elephant) as a feature folder and a table.

python -m benchmarks.mil_classic musk1.npz runs/musk1-bags
jaxtransfer --config=slides:ilse --workdir=runs/musk1 \
  --config.data=runs/musk1-bags/labels.csv \
  --config.data.features=runs/musk1-bags/features \
  --config.pooling.name=attention,gated_attention \
  --config.folds=10 --config.seeds=5 --config.metric=accuracy

The file holds features (N, D), bag (N,), label (B,) and name (B,). Features are
standardised over all rows first, as in the published runs. The benchmarks'
README has what came out, beside Ilse et al., arXiv 1802.04712, table 1.
"""

import argparse
import pathlib

import numpy as np

from jaxtransfer import files
from jaxtransfer.data import feature_files


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("npz", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path)
  arguments = parser.parse_args()
  write(arguments.npz, arguments.folder)


def write(npz: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes `labels.csv` and `features/<bag>.h5`."""
  with np.load(npz, allow_pickle=False) as stored:
    features, bag = stored["features"].astype(np.float64), stored["bag"]
    labels, names = stored["label"], stored["name"]
  deviation = features.std(0)
  features = (features - features.mean(0)) / np.where(deviation, deviation, 1)
  rows = []
  for number, (label, name) in enumerate(zip(labels, names, strict=True)):
    slide = f"{number:03d}-{name}"
    feature_files.write_features(
      folder / "features" / f"{slide}.h5",
      feature_files.FeatureFile(features[bag == number].astype(np.float32)),
    )
    rows.append((slide, "positive" if label > 0 else "negative"))
  files.write_csv(folder / "labels.csv", ("slide", "label"), rows)


if __name__ == "__main__":
  main()
