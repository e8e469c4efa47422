"""What the headline of a run that trained must not leave out."""

import re

import pytest

from jaxtransfer import results
from jaxtransfer.report import sentences, tables


def _row(name, mean, *, above=None, balanced=(0.8, 0.7, 0.9), **said):
  """Returns a line of the table; `above` is its difference from the others."""
  score = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
  difference = above and dict(zip(("value", "low", "high"), above, strict=True))
  return {
    "name": name,
    "words": f"{name} in words",
    "weights": "pretrained",
    "cut": "layer1",
    "params": 10,
    "images_per_second": 20,
    "tests": 3,
    "missed": [],
    "chance": 0.5,
    "chosen": False,
    "whole": False,
    "test": {
      "auroc": score,
      "balanced_accuracy": dict(
        zip(("mean", "low", "high"), balanced, strict=True)
      ),
    },
    "against_ftl": {"auroc": difference},
    "against_chosen": {"auroc": difference},
    **said,
  }


def _summary(chosen=(), whole=(), others=(), late=0, **said):
  cut = _row("TTL", 0.82, chosen=True, above=(0.137, 0.05, 0.21))
  all_of_it = _row("FTL", 0.683, whole=True, params=100, images_per_second=10)
  return {
    "whole": "resnet18",
    "metric": "auroc",
    "table": [cut | dict(chosen), all_of_it | dict(whole), *others],
    "exported": {"seed": 1, "missed": []},
    "unfinished": {"trainings": 52, "at_last_epoch": late},
    **said,
  }


MISSED = {
  "class": "carcinoma",
  "images": 90,
  "found": 12,
  "instead": "normal",
  "taken": 78,
}


def _count(text):
  return len(re.findall(r"[.](?= [A-Z]|$)", text))


def test_a_sound_run_says_what_it_found_and_no_more():
  text = sentences.of_truncate(_summary())
  assert text == (
    "Cut resnet18 after layer1: fine-tuned, it gives 0.820 [0.770, 0.870] AUROC"
    " against 0.683 [0.633, 0.733] for the whole network, with 10 % of the"
    " parameters and 2.0x the speed. On the same test images the cut"
    " network is better by 0.137 [0.050, 0.210]."
  )


@pytest.mark.parametrize("others", [[], [_row("TF", 0.8, above=(0, -1, 1))]])
def test_a_collapse_comes_first_with_its_numbers(others):
  """An AUROC says nothing of it: the network still ranks. The mean over the
  seeds tells thirty images, not ninety."""
  text = sentences.of_truncate(
    _summary({"missed": [MISSED]}, others=others, late=40)
  )
  assert text.startswith(
    "Do not rely on it: the network, on average over 3 seeds, calls 26 of 30"
    " carcinoma images normal; and 40 of 52 trainings had their best epoch at"
    " the last one allowed, so more epochs would help. Cut resnet18"
  )
  assert _count(text) <= 4
  # Every image is tested once by folds, and by a single seed.
  text = sentences.of_truncate(_summary({"missed": [MISSED], "tests": 1}))
  assert "the network calls 78 of 90 carcinoma images normal." in text


def test_a_collapse_of_what_it_is_compared_with_is_told_too():
  """Better than a network that has not learnt is no praise."""
  text = sentences.of_truncate(_summary(whole={"missed": [MISSED]}))
  assert text.startswith(
    "Read this with care: the whole network calls 26 of 30 carcinoma images"
  )
  text = sentences.of_truncate(_summary(whole={"missed": [MISSED] * 2}))
  assert "care: the whole network hardly finds 2 classes. Cut" in text
  worse = _row("TF", 0.6, above=(-0.2, -0.3, -0.1), balanced=(0.5, 0.45, 0.6))
  text = sentences.of_truncate(_summary(others=[worse]))
  assert text.startswith(
    "Read this with care: the best of the others cannot be told from guessing"
    " (0.500 [0.450, 0.600] balanced accuracy, guessing 0.500)."
  )


def test_a_network_that_is_exported_is_looked_at_by_itself():
  """The seeds together may find what the exported one of them does not."""
  one = MISSED | {"images": 30, "found": 0, "taken": 30}
  text = sentences.of_truncate(_summary(exported={"seed": 1, "missed": [one]}))
  assert text.startswith(
    "Do not rely on it: the exported network, seed 1, calls 30 of 30 carcinoma"
    " images normal."
  )


def test_a_balanced_accuracy_that_may_be_chance_is_told():
  text = sentences.of_truncate(_summary({"chance": 0.75}))
  assert "the network cannot be told from guessing (0.800 [0.700" in text


def test_what_the_data_cannot_tell_apart_is_said():
  unsure = {"value": 0.137, "low": -0.02, "high": 0.29}
  text = sentences.of_truncate(_summary({"against_ftl": {"auroc": unsure}}))
  assert (
    "The data cannot tell the two apart: on the same test images they differ by"
    " +0.137 [−0.020, +0.290]." in text
  )
  worse = {"value": -0.1, "low": -0.2, "high": -0.05}
  text = sentences.of_truncate(_summary({"against_ftl": {"auroc": worse}}))
  assert "the whole network is better by 0.100 [0.050, 0.200]." in text
  undefined = dict.fromkeys(("value", "low", "high"))
  text = sentences.of_truncate(_summary({"against_ftl": {"auroc": undefined}}))
  assert "the difference is undefined" in text


def test_the_best_of_the_others_is_compared_with_the_chosen_one():
  others = [
    _row("LWFT", 0.7, above=(-0.12, -0.2, -0.04)),
    _row("TF", 0.81, above=(-0.01, -0.05, 0.02)),
  ]
  text = sentences.of_truncate(_summary(others=others))
  assert text.endswith(
    "The best of the others, TF in words (TF, pretrained weights), gives 0.810"
    " [0.760, 0.860]: the data cannot tell it from the chosen one (−0.010"
    " [−0.050, +0.020])."
  )
  text = sentences.of_truncate(_summary(others=others[:1]))
  assert text.endswith("[0.650, 0.750]: worse by 0.120 [0.040, 0.200].")


def test_trainings_that_were_cut_short_are_counted():
  text = sentences.of_truncate(_summary(late=2))
  assert text.endswith(
    " 2 of 52 trainings had their best epoch at the last one allowed, so more"
    " epochs would help."
  )
  assert "epochs would help" not in sentences.of_truncate(_summary())


def test_without_a_whole_network_and_without_a_cut():
  summary = _summary()
  summary["table"].pop()
  assert "could not be trained." in sentences.of_truncate(summary)
  summary = _summary(whole={"chosen": True})
  summary["table"].pop(0)
  text = sentences.of_truncate(summary)
  assert text == (
    "Do not cut resnet18: whole, it gives 0.683 [0.633, 0.733] AUROC."
  )


@pytest.mark.parametrize(
  ("missed", "says"),
  [
    (
      [MISSED | {"images": 30, "found": 1, "taken": 20}],
      "finds 1 of 30 carcinoma images (calls 20 normal)",
    ),
    (
      [MISSED | {"images": 9, "found": 1, "taken": 8, "instead": False}],
      "finds carcinoma in 1 of 9 images with it",
    ),
    (
      [MISSED | {"images": 9, "found": 1, "taken": 8, "instead": True}],
      "calls 8 of 9 images without carcinoma carcinoma",
    ),
    ([MISSED | {"class": c} for c in "abcd"], "hardly finds 2 more classes"),
  ],
)
def test_finetune_says_what_its_network_does_not_find(missed, says):
  score = {"value": 0.9, "low": 0.85, "high": 0.95}
  summary = {
    "network": "resnet18",
    "cut": "layer1",
    "best_epoch": 4,
    "epochs": [{}] * 4,
    "missed": missed,
    "chance": 0.5,
    "unfinished": {"trainings": 1, "at_last_epoch": 1},
  }
  scores = dict.fromkeys(("auroc", "accuracy", "balanced_accuracy"), score)

  def said(**changes):
    return sentences.of_finetune(
      summary | changes, scores, 10**6, ("auroc", "accuracy")
    )

  assert said().startswith("Do not rely on it: the network ") and says in said()
  assert "; and the best epoch is the last one allowed" in said()
  assert said(missed=[]).endswith(
    "after epoch 4 of 4. The best epoch is the last one allowed, so more epochs"
    " would help."
  )
  sound = said(missed=[], unfinished={"trainings": 1, "at_last_epoch": 0})
  assert sound.startswith("resnet18 cut after layer1, fine-tuned: 0.900 [0.850")
  assert _count(sound) == 1


TAPS = ["stem", "layer1", "layer2"]


def _of_layers(
  cut="layer2", best="layer2", over=(0.1, 0.05, 0.15), against=None
):
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
    rows.append(results.row(of_tap, "auroc", 0.8, (0.75, 0.85)))
    rows.append(
      results.row(of_tap | {"weights": "random"}, "auroc", 0.7, (0.6, 0.8))
    )
    rows.append(results.row(of_tap, "auroc:gain", 0.1, (0.05, 0.15)))
    rows.append(results.row(of_tap, "auroc:over_random", over[0], over[1:]))
    found = (against or {}).get(tap, worse)
    rows.append(results.row(of_tap, "auroc:against_cut", found[0], found[1:]))
    cost = {"tap": tap, "weights": "imagenet"}
    rows.append(results.row(cost, "params", 10.0 ** (i + 3)))
    rows.append(results.row(cost, "images_per_second", 100 / (i + 1)))
  return sentences.of_layers(summary, tables.Measurements(rows))


def test_a_cut_that_the_images_show_is_said_plainly():
  said = _of_layers(cut="layer1", against={"layer2": (0.001, -0.002, 0.004)})
  assert said.startswith("Cut after layer1: 0.800 [0.750, 0.850] AUROC, with")
  assert "10 % of the parameters and 1.5x the speed" in said
  assert "layer2, the best on validation" not in said  # it is the deepest too
  assert "layer2, the deepest" in said and "no difference that these" in said
  assert "At layer1 pretrained weights give +0.100 [+0.050, +0.150]" in said


def test_shallower_layers_that_cannot_be_told_apart_leave_the_cut_open():
  """One seed of a run then does not contradict the next, that cuts there."""
  said = _of_layers(against={"layer1": (0.057, -0.01, 0.11)})
  assert "leave open where to cut, between layer1 and layer2" in said
  assert "Cut after" not in said and "Keep all" not in said
  assert "10 % of the parameters" in said and "+0.057 [−0.010, +0.110]" in said


def test_a_shallower_layer_that_is_better_on_test_is_named():
  said = _of_layers(against={"layer1": (0.057, 0.01, 0.11)})
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
  said = _of_layers(over=over)
  assert said.startswith(first)
  assert (tables.score(over[0], signed=True) in said) == (
    not first.startswith("Keep")
  )


def test_an_undefined_score_is_no_proof():
  """Of a test split of one class nothing is known, and nothing is claimed."""
  nothing = (float("nan"),) * 3
  said = _of_layers(over=nothing, against=dict.fromkeys(TAPS, nothing))
  assert "undefined" in said and "nan" not in said
  assert said.startswith("Pretraining is not shown to help")


@pytest.mark.parametrize(
  "value, low, said",
  [
    (0.81, 0.7, None),
    (0.61, 0.48, "reaches down to 0.480"),
    (0.44, None, "is 0.440"),
    (None, None, None),  # one class in the test split
  ],
)
def test_what_guessing_could_have_scored_is_noted(value, low, said):
  notes = sentences.of_guessing(value, low)
  assert len(notes) == (said is not None)
  assert said is None or said in notes[0]
