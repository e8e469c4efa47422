r"""Fields of nuclei as bags: does attention find the nuclei that decide?

CRCHistoPhenotypes: 60 fields of colorectal tissue, the nuclei of each as tiles,
of four classes. A field is positive if it holds epithelial nuclei; which they
are is not told. The order:

jaxtransfer --config=extract:resnet18 --workdir=runs/nuclei \
  --config.data=crchisto_nuclei4/manifest.csv --config.data.image_size=32 \
  --config.network.weights=cifar10-resnet18 --config.network.until=layer3 \
  --config.taps=layer1,layer2,layer3
python -m benchmarks.nuclei_bags labels crchisto_nuclei4/manifest.csv fields.csv
jaxtransfer --config=slides --workdir=runs/fields --config.data=fields.csv \
  --config.data.features=runs/nuclei --config.seeds=3 \
  --config.pooling.name=mean,max,gated_attention
python -m benchmarks.nuclei_bags attention runs/fields runs/nuclei

The last line's numbers are of every positive field that was tested: how well
the attention of its nuclei, and the class probability of each alone, tell
epithelial ones from the others, AUROC; the mean over fields, and its 95 %
interval by resampling fields.
"""

import argparse
import collections
import csv
import pathlib

import numpy as np
import sklearn.metrics

from jaxtransfer import attention, files
from jaxtransfer.data import feature_files
from jaxtransfer.measure import bootstrap

POSITIVE = "epithelial"


def write_labels(manifest: pathlib.Path, table: pathlib.Path) -> None:
  """Writes a table of fields: positive if they hold epithelial nuclei."""
  counts: dict[str, collections.Counter] = {}
  with open(manifest, newline="", encoding="utf-8") as f:
    for row in csv.DictReader(f):
      of_field = counts.setdefault(row["group"], collections.Counter())
      of_field[row["label"]] += 1
  rows = [
    (field, POSITIVE if of[POSITIVE] else f"no {POSITIVE}", field)
    for field, of in counts.items()
  ]
  files.write_csv(table, ("slide", "label", "group"), rows)
  print(collections.Counter(label for _, label, _ in rows))


def tell_attention(workdir: pathlib.Path, features: pathlib.Path) -> None:
  """Prints how well attention finds the positive nuclei of positive fields."""
  print("| | fields | nuclei's attention | each alone |")
  print("|---|--:|--:|--:|")
  for folder in sorted((workdir / "attention").iterdir()):
    scores = {"attention": [], "alone": []}
    for path in sorted(folder.glob("*.h5")):
      tiles = attention.read(path)
      encoder = tiles.attributes["encoder"]
      encoder = encoder["name"] if isinstance(encoder, dict) else encoder
      file = feature_files.read_features(
        features / "features" / encoder / path.name
      )
      truth = np.array([n.split("/")[0] == POSITIVE for n in file.names])
      if not truth.any() or truth.all():
        continue
      positive = tiles.attributes["classes"].index(POSITIVE)
      for name, values in (
        ("attention", tiles.attention),
        ("alone", tiles.probabilities[:, positive]),
      ):
        scores[name].append(sklearn.metrics.roc_auc_score(truth, values))
    cells = []
    for values in scores.values():
      draws = np.random.default_rng(0).choice(values, (2000, len(values)))
      low, high = bootstrap.interval(draws.mean(1))
      cells.append(f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]")
    count = len(scores["alone"])
    print(f"| {folder.name} | {count} | {' | '.join(cells)} |")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=("labels", "attention"))
  parser.add_argument("source", type=pathlib.Path)
  parser.add_argument("target", type=pathlib.Path)
  flags = parser.parse_args()
  if flags.what == "labels":
    write_labels(flags.source, flags.target)
  else:
    tell_attention(flags.source, flags.target)


if __name__ == "__main__":
  main()
