"""What the sentences say of measurements made up for each case."""

import pytest

from jaxtransfer.report import sentences, tables

TAPS = ["stem", "layer1", "layer2"]


def _said(cut="layer2", best="layer2", over=(0.1, 0.05, 0.15), against=None):
  """The sentence of a run in which every layer scores 0.8 on test."""
  summary = {
    "taps": TAPS,
    "cut": cut,
    "best": best,
    "random_best": "stem",
    "metric": "auroc",
    "probe": "logistic",
    "tolerance": 0.02,
    "weights": "imagenet",
  }
  main = {"probe": "logistic", "split": "test", "weights": "imagenet"}
  worse = (-0.1, -0.15, -0.05)
  rows = []
  for i, tap in enumerate(TAPS):
    of_tap = main | {"tap": tap}
    rows.append(tables.row(of_tap, "auroc", 0.8, (0.75, 0.85)))
    rows.append(
      tables.row(of_tap | {"weights": "random"}, "auroc", 0.7, (0.6, 0.8))
    )
    rows.append(tables.row(of_tap, "auroc:gain", 0.1, (0.05, 0.15)))
    rows.append(tables.row(of_tap, "auroc:over_random", over[0], over[1:]))
    found = (against or {}).get(tap, worse)
    rows.append(tables.row(of_tap, "auroc:against_cut", found[0], found[1:]))
    cost = {"tap": tap, "weights": "imagenet"}
    rows.append(tables.row(cost, "params", 10.0 ** (i + 3)))
    rows.append(tables.row(cost, "images_per_second", 100 / (i + 1)))
  return sentences.layers(summary, tables.Measurements(rows))


def test_a_cut_that_the_images_show_is_said_plainly():
  said = _said(cut="layer1", against={"layer2": (0.001, -0.002, 0.004)})
  assert said.startswith("Cut after layer1: 0.800 [0.750, 0.850] AUROC, with")
  assert "10 % of the parameters and 1.5x the speed" in said
  assert "layer2, the best on validation" not in said  # it is the deepest too
  assert "layer2, the deepest" in said and "no difference that these" in said
  assert "At layer1 pretrained weights give +0.100 [+0.050, +0.150]" in said


def test_shallower_layers_that_cannot_be_told_apart_leave_the_cut_open():
  """One seed of a run then does not contradict the next, that cuts there."""
  said = _said(against={"layer1": (0.057, -0.01, 0.11)})
  assert "leave open where to cut, between layer1 and layer2" in said
  assert "Cut after" not in said and "Keep all" not in said
  assert "10 % of the parameters" in said and "+0.057 [-0.010, +0.110]" in said


def test_a_shallower_layer_that_is_better_on_test_is_named():
  said = _said(against={"layer1": (0.057, 0.01, 0.11)})
  assert "On the test split layer1, which is shallower, scores more" in said


@pytest.mark.parametrize(
  ("over", "first"),
  [
    ((0.01, -0.02, 0.04), "Random weights do as well here"),
    ((-0.05, -0.09, -0.01), "Random weights do better here"),
    ((0.08, -0.01, 0.17), "Pretraining is not shown to help here"),
    ((0.08, 0.01, 0.17), "Keep all layers up to layer2"),
  ],
)
def test_random_weights_that_do_as_well_come_first(over, first):
  said = _said(over=over)
  assert said.startswith(first)
  assert (f"{over[0]:+.3f}" in said) == (not first.startswith("Keep"))


def test_an_undefined_score_is_no_proof():
  """Of a test split of one class nothing is known, and nothing is claimed."""
  nothing = (float("nan"),) * 3
  said = _said(over=nothing, against=dict.fromkeys(TAPS, nothing))
  assert "undefined" in said and "nan" not in said
  assert said.startswith("Pretraining is not shown to help")
