"""How hard `synthetic:tissue` is, measured without any network.

  python benchmarks/tissue_baselines.py [--tasks gland,density] [--size 96]

Five readers of every task, by patient (three folds; the strength of the
regularisation is chosen on a fifth of the training patients):

  pixels      multinomial logistic regression on the tile averaged to 32 x 32
  colour      the same on colour statistics: mean, deviation and nine
              percentiles of R, G and B, in light and in optical density
  histogram   the same on 16-bin histograms of R, G and B
  oracle      logistic regression on what the generator knows of the scene
  nuisance    the same on what patient, section and scanner did: 0.5 is right

Printed: macro one-vs-rest AUROC, mean and range over the folds, and how well
the classes' mean stain amounts match. The difficulty of the tasks was set with
these numbers and with no network.
"""

import argparse
import concurrent.futures
import sys
import time

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxtransfer.data.tissue import TASKS, Tissue, open_tissue

STRENGTHS = (1e-5, 1e-3, 1e-1)


def pixels(images: np.ndarray) -> np.ndarray:
  """(N, S, S, 3) uint8 -> (N, 3072): averaged to 32 x 32."""
  n, size = len(images), images.shape[1]
  block = size // 32
  cut = images[:, : 32 * block, : 32 * block].astype(np.float32)
  return cut.reshape(n, 32, block, 32, block, 3).mean((2, 4)).reshape(n, -1)


def colour(images: np.ndarray) -> np.ndarray:
  """(N, S, S, 3) uint8 -> (N, 66): statistics of light and of density."""
  light = np.sort(images.reshape(len(images), -1, 3), axis=1)
  at = np.array([1, 5, 10, 25, 50, 75, 90, 95, 99]) * light.shape[1] // 100
  density = -np.log((np.arange(256) + 1) / 256)
  found = []
  for table in (np.arange(256.0), density):
    values = table.astype(np.float32)[light]
    found += [values.mean(1), values.std(1), *values[:, at].swapaxes(0, 1)]
  return np.concatenate(found, 1)


def histogram(images: np.ndarray) -> np.ndarray:
  """(N, S, S, 3) uint8 -> (N, 48): 16 bins of R, of G and of B."""
  n = len(images)
  bins = (images.reshape(n, -1, 3) >> 4).astype(np.int64)
  shifted = bins + 16 * np.arange(3) + 48 * np.arange(n)[:, None, None]
  counts = np.bincount(shifted.ravel(), minlength=48 * n).reshape(n, 48)
  return counts / (images.shape[1] * images.shape[2])


def auroc(features: np.ndarray, tissue: Tissue) -> list[float]:
  """Macro one-vs-rest AUROC of every fold."""
  labels, groups = tissue.labels, np.asarray(tissue.groups)
  scores = []
  for train, test in GroupKFold(3).split(features, labels, groups):
    fit, choose = next(
      GroupShuffleSplit(1, test_size=0.2, random_state=0).split(
        train, groups=groups[train]
      )
    )
    fit, choose = train[fit], train[choose]
    best = max(
      STRENGTHS,
      key=lambda c: _macro(  # noqa: B023, called before the next fold
        _linear(c, features[fit], labels[fit]),
        features[choose],
        labels[choose],
      ),
    )
    model = _linear(best, features[train], labels[train])
    scores.append(_macro(model, features[test], labels[test]))
  return scores


def _linear(strength: float, features: np.ndarray, labels: np.ndarray):
  model = make_pipeline(
    StandardScaler(), LogisticRegression(C=strength, max_iter=200, tol=1e-3)
  )
  return model.fit(features, labels)


def _macro(model, features: np.ndarray, labels: np.ndarray) -> float:
  return roc_auc_score(
    labels, model.predict_proba(features), multi_class="ovr", average="macro"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--tasks", default=",".join(TASKS))
  parser.add_argument("--patients", type=int, default=60)
  parser.add_argument("--tiles_per_patient", type=int, default=25)
  parser.add_argument("--size", type=int, default=96)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  if args.size < 32:
    sys.exit("--size: at least 32, so that there are 32 x 32 pixels")
  for task in args.tasks.split(","):
    tissue = open_tissue(
      task,
      patients=args.patients,
      tiles_per_patient=args.tiles_per_patient,
      size=args.size,
      seed=args.seed,
    )
    rows = range(len(tissue))
    began = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor() as pool:
      images = np.stack(list(pool.map(tissue.read, rows, chunksize=50)))
    rate = len(tissue) / (time.perf_counter() - began)
    stains = np.array(
      [[c.mean() for c in tissue.concentrations(row)] for row in rows[::4]]
    )
    latents = [tissue.latents(row) for row in rows]
    nuisance = [tissue.nuisance(row) for row in rows]
    print(f"{task}: {images.shape}, {rate:.0f} tiles/s")
    for label, name in enumerate(tissue.classes):
      mine = tissue.labels == label
      red, green, blue = images[mine].mean((0, 1, 2))
      h, e = stains[mine[::4]].mean(0)
      dh, de = stains[mine[::4]].std(0)
      print(
        f"  {name:12s} R {red:5.1f} G {green:5.1f} B {blue:5.1f}"
        f"  c_H {h:.3f} (sd {dh:.3f})  c_E {e:.3f} (sd {de:.3f})"
      )
    for name, features in (
      ("pixels", pixels(images)),
      ("colour", colour(images)),
      ("histogram", histogram(images)),
      ("oracle", _table(latents)),
      ("nuisance", _table(nuisance)),
    ):
      scores = auroc(features, tissue)
      print(
        f"  {name:12s} AUROC {np.mean(scores):.3f}"
        f"  [{min(scores):.3f}, {max(scores):.3f}]",
        flush=True,
      )


def _table(rows: list[dict[str, float]]) -> np.ndarray:
  return np.array([list(row.values()) for row in rows])


if __name__ == "__main__":
  main()
