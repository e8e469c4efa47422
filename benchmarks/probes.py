"""The logistic probe on the device against scikit-learn on the same fits.

    python benchmarks/probes.py
    python benchmarks/probes.py --networks=6 --strengths=1e-4,1e-2,1
    python benchmarks/probes.py --features=features.npz    # x (R,N,D), y (N,)

Features of the widths of a ResNet-18's and a ResNet-50's taps, with the
spectrum and the heavy tails of pooled activations, 3,000 training rows of 8
classes: for every network a fit per strength, standardised once. scikit-learn
runs `LogisticRegression` at its default tolerance and at one at which it has
converged; agreement is the share of 1,000 test rows predicted alike by the
converged one and ours. Times are wall clock and CPU seconds; ours includes
compiling, which later taps of the same width do not pay. scikit-learn's is
measured on the first network and multiplied by their number.
"""

import os
import platform
import time
import warnings

import jax
import numpy as np
import sklearn
from absl import app, flags
from sklearn import linear_model, preprocessing

from jaxtransfer.measure import probes

_WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256", "512"], "channels")
_NETWORKS = flags.DEFINE_integer("networks", 6, "networks per tap")
_STRENGTHS = flags.DEFINE_list(
  "strengths", [f"1e{k}" for k in range(-4, 4)], "scikit-learn's C"
)
_ROWS = flags.DEFINE_integer("rows", 3000, "training rows")
_CLASSES = flags.DEFINE_integer("classes", 8, "classes")
_FEATURES = flags.DEFINE_string("features", None, "npz of x (R,N,D), y (N,)")
_REFERENCE = flags.DEFINE_bool("reference", True, "run scikit-learn too")


def _drawn(width, networks, rows, classes):
  """Rectified mixtures of few shared factors and much of their own noise."""
  found = []
  labels = np.arange(rows) % classes
  for seed in range(networks):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, width // 4))
    factors = centres[labels] + 3 * generator.normal(size=(rows, width // 4))
    mixing = generator.normal(size=(width // 4, width))
    mixing *= np.arange(1, width // 4 + 1)[:, None] ** -0.7
    x = factors @ mixing + 0.3 * generator.normal(size=(rows, width))
    found.append(np.maximum(x, 0) * np.exp(generator.normal(0, 1, width)))
  return np.stack(found).astype(np.float32), labels


def _timed(function):
  wall, cpu = time.perf_counter(), time.process_time()
  result = function()
  return result, time.perf_counter() - wall, time.process_time() - cpu


def _ours(x, y, test, strengths):
  """Returns the logits of every fit, in the order in which they are done."""
  logits = []

  def validate(of_one):
    logits.append(of_one)
    return 0.0

  probes._fit_linear(
    "logistic", x, y, np.stack([test] * len(x)), strengths, validate
  )
  return logits


def _reference(x, y, test, strengths, tolerance):
  # In float32, scikit-learn's own predictions differ in a row in 500.
  x, test = x.astype(np.float64), test.astype(np.float64)
  scaler = preprocessing.StandardScaler().fit(x)
  x, test = scaler.transform(x), scaler.transform(test)
  return [
    linear_model.LogisticRegression(C=c, tol=tolerance, max_iter=100_000)
    .fit(x, y)
    .predict(test)
    for c in strengths
  ]


def main(_):
  warnings.simplefilter("ignore")
  print(
    f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores,"
    f" load {os.getloadavg()[0]:.1f}; {jax.devices()[0].device_kind},"
    f" jax {jax.__version__}, scikit-learn {sklearn.__version__},"
    f" numpy {np.__version__}, Python {platform.python_version()}"
  )
  strengths = np.array([float(s) for s in _STRENGTHS.value])
  print(f"{_NETWORKS.value} networks x {len(strengths)} strengths per width")
  if _FEATURES.value:
    stored = np.load(_FEATURES.value)
    sets = [(stored["x"], stored["y"])]
  else:
    rows = _ROWS.value + 1000
    sets = (
      _drawn(int(w), _NETWORKS.value, rows, _CLASSES.value)
      for w in _WIDTHS.value
    )
  print(
    "width   ours first  again (cpu)   sklearn default (cpu)"
    "   converged (cpu)   ratio  agreement"
  )
  for x, y in sets:
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:-1000], order[-1000:]
    arguments = x[:, train], y[train], x[0, test], strengths
    _, compiled, _ = _timed(lambda a=arguments: _ours(*a))
    logits, wall, cpu = _timed(lambda a=arguments: _ours(*a))
    line = f"{x.shape[2]:5d}  {compiled:8.1f} s {wall:6.1f} ({cpu:5.1f}) s"
    if _REFERENCE.value:
      n = len(x)
      one = x[0, train], y[train], x[0, test], strengths
      _, default, default_cpu = _timed(lambda a=one: _reference(*a, 1e-4))
      found, full, full_cpu = _timed(lambda a=one: _reference(*a, 1e-7))
      # A chunk may hold several networks: the first one's logits come first.
      chunk = probes._chunks(
        n,
        len(strengths),
        int(y.max()) + 1,
        len(train),
        probes._width(x.shape[2]) + 1,
      )[0]
      ours = [logits[s * chunk].argmax(1) for s in range(len(strengths))]
      agreement = [(a == b).mean() for a, b in zip(ours, found, strict=True)]
      line += (
        f"  {n * default:9.1f} ({n * default_cpu:7.1f}) s"
        f" {n * full:9.1f} ({n * full_cpu:7.1f}) s {n * full_cpu / cpu:6.0f}x"
        f"  {100 * min(agreement):.2f} to {100 * max(agreement):.2f} %"
      )
    print(line, flush=True)


if __name__ == "__main__":
  app.run(main)
