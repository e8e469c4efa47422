"""Results as the `layers` job leaves them, drawn from smooth curves."""

import math

import numpy as np

from jaxtransfer import results as results_types

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
      "random_best": taps[best],
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
      "weights_sha256": "0" * 64,
      "sum_over_whole": {},
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


RESNET50 = ["stem"] + [
  f"layer{stage}.{block}"
  for stage, blocks in enumerate((3, 4, 6, 3), 1)
  for block in range(blocks)
]
WORDS = {
  "ttl": "everything kept up to {}, all of it trained",
  "ftl": "the whole network, all of it trained",
  "lwft": "the whole network, frozen up to {}",
  "fat": "everything kept up to {}, the head alone trained",
  "tf": "pretrained up to {}, half as wide and random above",
}


def epochs(count, best=0.9, seed=0):
  """Returns the records of a run that learns."""
  rng = np.random.default_rng(seed)
  records = []
  for epoch in range(1, count + 1):
    left = math.exp(-epoch / 5)
    noise = rng.normal(0, 0.01, 3)
    records.append(
      {
        "event": "epoch",
        "epoch": epoch,
        "step": 40 * epoch,
        "accuracy": 0.9 - 0.3 * left,
        "timing": {"training_seconds": 11.0, "validation_seconds": 2.0},
        "loss": 0.2 + left + noise[0],
        "val": {
          "loss": 1.2 - best + 0.9 * left + noise[1],
          "auroc": best - 0.3 * left + noise[2],
          "auprc": best - 0.05 - 0.3 * left,
          "balanced_accuracy": best - 0.1 - 0.3 * left,
        },
      }
    )
  return records


def evaluated(classes, seed=0):
  """Returns what a summary says of one network on the test split."""
  rng = np.random.default_rng(seed)
  count = len(classes)
  labels = rng.integers(count, size=300)
  logits = rng.normal(size=(300, count)) + 1.7 * np.eye(count)[labels]
  table = np.zeros((count, count), int)
  np.add.at(table, (labels, logits.argmax(1)), 1)
  centres = (np.arange(15) + 0.5) / 15
  counts = np.array([0, 0, 0, 0, 3, 9, 14, 20, 26, 30, 33, 38, 41, 44, 42])
  x = np.arange(101) / 100

  def curve(y):
    low, high = np.clip([y - 0.06, y + 0.05], 0, 1)
    return {
      "x": x.tolist(),
      "y": y.tolist(),
      "low": low.tolist(),
      "high": high.tolist(),
    }

  return {
    "confusion": table.tolist(),
    "temperature": 1.42,
    "reliability": {
      name: {
        "confidence": np.where(counts, centres, None).tolist(),
        "accuracy": np.where(counts, centres * factor, None).tolist(),
        "count": counts.tolist(),
      }
      for name, factor in (("before", 0.82), ("after", 0.97))
    },
    "curves": {
      "roc": curve(x ** (0.2 + 0.1 * seed)),
      "precision_recall": curve(1 - 0.55 * x ** (4 - seed)),
    },
  }


def truncate_results(
  taps=RESNET50,
  *,
  methods=("ttl", "lwft", "fat", "tf"),
  seeds=3,
  cut=11,
  classes=("lung_aca", "lung_n", "lung_scc"),
  table=True,
  **summary,
):
  """Returns a whole results.json of the `truncate` job."""
  rng = np.random.default_rng(11)
  taps = list(taps)
  last = len(taps) - 1
  base = results(taps, cut=cut, best=cut, seeds=0, probes=(), cost=False)

  def cost(i):
    depth = (i + 1) / len(taps)
    return int(23_508_032 * depth**2.2), int(4_087_136_256 * depth)

  searched, rows = [], []
  for method in methods:
    for i, tap in enumerate(taps):
      depth = i / max(1, last)
      level = {"ttl": 0.86, "lwft": 0.85, "fat": 0.78, "tf": 0.84}[method]
      values = level - 0.25 * (depth - 0.72) ** 2 + rng.normal(0, 0.008, seeds)
      params, macs = cost(last if method == "lwft" else i)
      mean = float(values.mean())
      searched.append(
        {
          "method": method,
          "stage": "layers" if "." in tap else "blocks",
          "cut": tap,
          "params": params,
          "macs": macs,
          "value": mean,
          "values": values.tolist(),
          "low": mean - 0.012 if seeds > 1 else None,
          "high": mean + 0.012 if seeds > 1 else None,
          "chosen": method == "ttl" and i == cut,
          "stopped": None,
        }
      )

  def add(name, method, weights, at, score):
    params, macs = cost(last if at is None or method == "lwft" else at)
    where = None if at is None else taps[at]
    spread = rng.normal(0, 0.006, seeds)
    rows.append(
      {
        "name": name,
        "method": method,
        "weights": weights,
        "cut": where,
        "words": WORDS.get(method, "a small network for medical images").format(
          where
        ),
        "params": params + 6147,
        "trained_params": params // (3 if method == "lwft" else 1) + 6147,
        "macs": macs,
        "latency_ms": macs / 1e9 * 9.3,
        "images_per_second": 2.6e11 / macs,
        "training_seconds": macs / 1e9 * 312.0,
        "epochs": 14 + 1 / 3,
        "val": score + 0.011,
        "test": {
          metric: {
            "mean": score - 0.03 * m,
            "sd": float(spread.std(ddof=1)) if seeds > 1 else None,
            "low": score - 0.03 * m - 0.02,
            "high": score - 0.03 * m + 0.018,
            "values": (score - 0.03 * m + spread).tolist(),
          }
          for m, metric in enumerate(
            ("auroc", "auprc", "accuracy", "balanced_accuracy")
          )
        },
        "operating": [],
        "missed": [],
        "chance": 1 / len(classes),
        "tests": seeds,
        "chosen": name == "TTL-2" and weights == "pretrained",
        "whole": name == "FTL" and weights == "pretrained",
        "against_chosen": None,
        "against_ftl": None,
      }
    )

  if table:
    block = max(0, cut - 2)
    for weights, lift in (("pretrained", 0.0), ("random", -0.09)):
      add("TTL-2", "ttl", weights, cut, 0.861 + lift)
      add("TTL-1", "ttl", weights, block, 0.851 + lift)
      add("FTL", "ftl", weights, last, 0.849 + lift)
      add("LWFT-1", "lwft", weights, block, 0.848 + lift)
      add("LWFT-2", "lwft", weights, cut, 0.853 + lift)
      add("FAT", "fat", weights, cut, 0.79 + lift)
      add("TF-1", "tf", weights, block, 0.8561 + lift)
      add("TF-2", "tf", weights, cut, 0.856 + lift)
    for i, size in enumerate(("LargeT", "LargeW", "Small", "Tiny")):
      add(f"CBR-{size}", f"cbr_{size.lower()}", "random", i % 2, 0.77)
      rows[-1]["cut"] = None
  exported = evaluated(classes)
  first = {"name": "TTL-2", **exported.pop("curves")}
  whole = {"name": "FTL", **evaluated(classes, 1)["curves"]}
  learning = [
    {"name": name, "epochs": [epochs(14 + s, best, s) for s in range(seeds)]}
    for name, best in (("TTL-2", 0.87), ("FTL", 0.85))
  ]
  base["job"] = "truncate"
  for key in ("best", "random_best", "probe", "seeds", "sum_over_whole"):
    base["summary"].pop(key)
  base["summary"] |= {
    "sentence": (
      f"Keep resnet18 up to {taps[cut]}: 0.861 [0.841, 0.879] AUROC on the"
      " test split against 0.849 [0.829, 0.867] for the whole network, with"
      " 27 % of the parameters and 70 % of the multiply-accumulates."
    ),
    "rule": (
      "The best mean of validation AUROC over 3 seeds, blocks first, then the"
      " layers around the best block; the test split was read once."
    ),
    "classes": list(classes),
    "multilabel": False,
    "prevalence": None,
    "unfinished": {"trainings": 3 * len(searched), "at_last_epoch": 0},
    "whole": "resnet50",
    "cost_batch_size": 32,
    "epoch_metric": "loss",
    "repeats": f"{seeds} seeds",
    "halving": None,
    "image_size": 224,
    "search": searched,
    "table": rows,
    "learning": learning,
    "exported": {"seed": 1, "cut": taps[cut], "val": 0.87, "missed": []},
    **exported,
    "curves": [first, whole],
    "failed": [],
    **summary,
  }
  base["measurements"] = [
    dict.fromkeys(("low", "high"))
    | {
      "network": "resnet50",
      "weights": "pretrained",
      "tap": item["cut"],
      "probe": item["method"],
      "metric": "auroc",
      "split": "val",
      "value": value,
      "n": 900,
      "seed": seed,
    }
    for item in searched
    for seed, value in enumerate(item["values"])
  ]
  return base


def finetune_results(classes=("negative", "positive"), **summary):
  """Returns a whole results.json of the `finetune` job."""
  base = results(["layer3"], cut=0, best=0, seeds=0, probes=(), cost=False)
  rows = [
    results_types.row({"split": split, "n": 900}, metric, value, (0.7, 0.95))
    for split in ("val", "test")
    for metric, value in (("accuracy", 0.81), ("auroc", 0.9), ("loss", 0.4))
  ]
  base["job"] = "finetune"
  gone = "best random_best probe seeds tolerance sum_over_whole"
  for key in gone.split():
    base["summary"].pop(key)
  base["measurements"] = rows
  base["summary"] |= {
    "classes": list(classes),
    "multilabel": False,
    "prevalence": None,
    "head": "gap",
    "trained_layers": ["layer3"],
    "unfinished": {"trainings": 1, "at_last_epoch": 0},
    "missed": [],
    "chance": 1 / len(classes),
    "operating": [],
    "metric": "loss",
    "best_epoch": 12,
    "epochs": epochs(18),
    **evaluated(classes),
    **summary,
  }
  return base
