"""Results as the `layers` job leaves them, drawn from smooth curves."""

import math

import numpy as np

RESNET18 = [
  "stem",
  "layer1.0",
  "layer1.1",
  "layer2.0",
  "layer2.1",
  "layer3.0",
  "layer3.1",
  "layer4.0",
  "layer4.1",
]
METRICS = ("accuracy", "balanced_accuracy", "auroc", "auprc")
PROBES = ("logistic", "linear_svm", "knn", "nearest_mean")


def densenet_taps(blocks=(6, 12, 24, 16)):
  taps = ["stem"]
  for b, layers in enumerate(blocks, 1):
    taps += [f"denseblock{b}.denselayer{i}" for i in range(1, layers + 1)]
    taps.append(f"transition{b}" if b < len(blocks) else "norm5")
  return taps


def results(
  taps=RESNET18,
  *,
  seeds=5,
  cut=5,
  best=7,
  cost=True,
  lift=0.12,
  probes=PROBES,
  **summary,
):
  """Returns a whole results.json; `lift` is what pretraining adds."""
  rng = np.random.default_rng(7)
  taps = list(taps)
  weights = "cifar10-resnet18"
  rows = []

  def add(value, width=None, **said):
    row = dict.fromkeys(
      ("weights", "tap", "probe", "metric", "split", "low", "high", "seed")
    )
    row |= {"network": "resnet18", "n": 900, "value": float(value)} | said
    if width is not None:
      row |= {"low": float(value - width), "high": float(value + width)}
    rows.append(row)

  for i, tap in enumerate(taps):
    depth = i / max(1, len(taps) - 1)
    shape = 1 - (depth - 0.72) ** 2
    for p, probe in enumerate(probes):
      for m, metric in enumerate(METRICS):
        base = 0.74 - 0.02 * p - 0.01 * m
        for split in ("val", "test"):
          said = {"tap": tap, "probe": probe, "metric": metric, "split": split}
          pretrained = base + lift * shape + 0.06 * depth
          pretrained += rng.normal(0, 0.004)
          add(pretrained, 0.02, weights=weights, **said)
          singles = base + 0.02 * shape + rng.normal(0, 0.012, seeds)
          for seed, single in enumerate(singles):
            add(single, weights="random", seed=seed, **said)
          if seeds:
            add(singles.mean(), 0.018, weights="random", **said)
          if metric != "auroc" or split != "test" or not seeds:
            continue
          said.pop("metric")
          add(
            singles.std(),
            weights="random",
            metric="auroc:seed_sd",
            **said,
          )
          gain = pretrained - singles.mean()
          add(gain, 0.022, weights=weights, metric="auroc:gain", **said)
          add(
            0.1 / (i + 1) - 0.02,
            0.015,
            weights=weights,
            metric="auroc:marginal_gain",
            **said,
          )
    add(
      0 if i == best else -0.16 * (depth - best / max(1, len(taps) - 1)) ** 2,
      0 if i == best else 0.008,
      weights=weights,
      tap=tap,
      probe="logistic",
      metric="auroc:against_best",
      split="val",
    )
    if cost:
      growth = math.exp(4 * depth) / math.exp(4)
      for metric, value in (
        ("params", 11_176_512 * growth),
        ("macs", 1_814_000_000 * (0.1 + 0.9 * depth)),
        ("images_per_second", 410 / (0.25 + depth)),
        ("peak_memory_bytes", 2**20 * (180 + 40 * depth)),
        ("channels", 64 * 2 ** int(3.99 * depth)),
      ):
        add(value, weights=weights, tap=tap, metric=metric)
  return {
    "job": "layers",
    "summary": {
      "sentence": (
        f"Cut after {taps[cut]}: 0.912 [0.89, 0.93] AUROC against 0.915 "
        "at full depth, with 24 % of the parameters and 1.6x the speed"
      ),
      "rule": (
        "the shallowest tap whose paired 95 % interval against the best "
        "tap on validation contains no loss larger than 0.02 AUROC"
      ),
      "cut": taps[cut],
      "best": taps[best],
      "metric": "auroc",
      "probe": "logistic",
      "tolerance": 0.02,
      "network": "resnet18",
      "weights": weights,
      "data": "lc25000_lung/manifest.csv",
      "classes": ["lung_aca", "lung_n", "lung_scc"],
      "taps": taps,
      "seeds": seeds,
      "rows": {"train": 2700, "val": 900, "test": 900},
      "groups": {"train": 171, "val": 57, "test": 57},
      "failures": 3,
      "notes": ["The data names no patients; every image is its own."],
      "normalisation": {
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.247, 0.2435, 0.2616],
      },
      "seconds": {"extracting": 184.2, "probing": 41.0, "cost": 12.34},
      "run": {
        "command": (
          "jaxtransfer --config=configs/layers.py:resnet18"
          " --workdir=runs/lung"
          " --config.data.source=lc25000_lung/manifest.csv"
        ),
        "versions": {"jaxtransfer": "0.1.0", "jax": "0.10.2"},
        "devices": "2 x cpu",
        "commit": "c73c001",
        "started": "2026-11-20T21:41:00Z",
      },
      "interval": ("95 % percentile bootstrap over 57 groups, 1000 resamples"),
    }
    | summary,
    "measurements": rows,
  }
