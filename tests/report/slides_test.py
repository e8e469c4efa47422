"""The page of the `slides` job."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from jaxtransfer.report import figures, page, sentences, slides
from tests import typed
from tests.report import example
from tests.report.figures_test import assert_legible
from tests.report.truncate_test import _Page

METRICS = ("auroc", "auprc", "accuracy", "balanced_accuracy")
RUN = {
  "command": "jaxtransfer --config=slides",
  "versions": {"jax": "0.10"},
  "devices": "1 x cpu (jit)",
  "commit": None,
  "started": "2026-11-27T12:00:00+00:00",
}


def score(mean, width=0.05):
  return {
    "mean": mean,
    "sd": 0.04,
    "low": mean - width,
    "high": mean + width,
    "values": [mean] * 5,
  }


def row(name, value, difference, chosen=False, **changes):
  """A line of the table; `difference` is that from the best, with its ends."""
  away = dict(zip(("value", "low", "high"), difference or (), strict=False))
  of_all = {name: away for name in METRICS} if away else None
  return {
    "name": name,
    "encoder": name,
    "pooling": "gated_attention",
    "top": 0,
    "network": "resnet18",
    "weights": "imagenet",
    "tap": "layer3",
    "channels": 256,
    "tiles": 1234.5,
    "params": 82_306,
    "training_seconds": 12.0,
    "epochs": 20.0,
    "val": value + 0.01,
    "test": {name: score(value) for name in METRICS},
    "patients": {name: score(value - 0.01) for name in METRICS},
    "patients_tested": 37,
    "operating": [],
    "missed": [],
    "chance": 0.5,
    "tests": 1,
    "chosen": chosen,
    "against_chosen": of_all,
    "against_first": None,
    **changes,
  }


def made(rows, **changes):
  trained = example.evaluated(("normal", "tumour"))
  curves = trained.pop("curves")
  summary = {
    "sentence": "",
    "rule": "By validation.",
    "unit": "slides",
    "metric": "auroc",
    "epoch_metric": "accuracy",
    "data": "labels.csv",
    "classes": ["normal", "tumour"],
    "multilabel": False,
    "prevalence": None,
    "repeats": "5 folds",
    "rows": {"each tested once": 80},
    "groups": {"each tested once": 37},
    "notes": [],
    "interval": "95 %",
    "failures": 2,
    "table": rows,
    "unfinished": {"trainings": 10, "at_last_epoch": 0},
    "learning": [{"name": rows[0]["name"], "epochs": [example.epochs(6, 0.8)]}],
    "exported": {"seed": 3, "cut": rows[0]["name"], "val": 0.9, "missed": []},
    "seed": 0,
    "temperature": 1.4,
    "confusion": trained["confusion"],
    "reliability": trained["reliability"],
    "curves": [{"name": of["name"], **curves} for of in rows[:5]],
    "failed": [],
    "seconds": {"training": 12.0},
    "run": RUN,
    **changes,
  }
  return {"job": "slides", "summary": summary, "measurements": []}


def several():
  return [
    row("first", 0.71, (-0.2, -0.3, -0.1)),
    row("near", 0.88, (-0.03, -0.08, 0.02)),
    row("best", 0.91, None, chosen=True),
    row("no interval", 0.8, (-0.11, None, None)),
  ]


def test_the_results_are_of_their_type():
  typed.check_results(made(several()))


def test_the_figure_shows_what_the_table_says():
  """Scores with their intervals; differences full where zero is left out."""
  figure = slides.encoders(made(several())["summary"])
  left, right = figure.axes
  (scores,), (differences,) = left.collections[1:], right.collections[1:]
  np.testing.assert_allclose(
    scores.get_offsets(), [(0.71, 0), (0.88, 1), (0.91, 2), (0.8, 3)]
  )
  found = [segment[:, 0] for segment in left.collections[0].get_segments()]
  np.testing.assert_allclose(
    found, [(0.66, 0.76), (0.83, 0.93), (0.86, 0.96), (0.75, 0.85)]
  )
  offsets = np.ma.filled(differences.get_offsets(), np.nan)
  np.testing.assert_allclose(offsets[:, 0], [-0.2, -0.03, np.nan, -0.11])
  faces = list(map(to_hex, differences.get_facecolors()))
  full = [face != "#ffffff" for face in faces]
  assert full[:2] == [True, False] and not full[3]
  names = [label.get_text() for label in left.get_yticklabels()]
  assert names == ["first", "near", "best", "no interval"]
  (marked,) = [
    label.get_text()
    for label in left.get_yticklabels()
    if label.get_color() == figures.VERMILLION
  ]
  assert marked == "best"
  # The first is on top.
  assert left.get_ylim()[0] > left.get_ylim()[1]


@pytest.mark.parametrize("count", [2, 30])
def test_names_are_not_cut_off(count):
  rows = [
    row(f"densenet121-kimianet-transition{i}", 0.5 + i / 90, (0.1, 0, 0.2))
    for i in range(count)
  ]
  rows[1]["chosen"] = True
  summary = made(rows)["summary"]
  assert_legible("encoders", slides.encoders(summary))


def test_the_page_tells_every_encoder_and_escapes_its_name(tmp_path):
  """Its differences are signed, patients counted, slides called slides."""
  rows = several()
  rows[1]["name"] = "<script>alert(1)</script>"
  results = made(rows)
  results["summary"]["sentence"] = sentences.of_slides(results["summary"])
  text = page.write(tmp_path, results).read_text(encoding="utf-8")
  assert "<script>alert" not in text and "&lt;script&gt;alert" in text
  shown = _Page(text)
  rows = [line for line in shown.rows if line]
  header, first, best = (
    next(line for line in rows if line[0].startswith(word))
    for word in ("encoder", "first", "best")
  )
  of = header.index("AUROC of 37 patients")
  assert best[of].startswith("0.900 ± 0.040 [0.850, 0.950]")
  of = header.index("AUROC above the best on validation")
  assert first[of] == "−0.200 [−0.300, −0.100]"
  assert best[of] == "–"
  assert "resnet18, imagenet, layer3; gated attention pooling" in first[0]
  assert "2 slides were left out" in shown.text
  assert "the slides cannot tell the two apart (−0.030" in shown.text
  assert "Larger dots hold more slides" in shown.text
  assert "images" not in shown.text.replace("images/", "")


def test_one_encoder_without_patients_is_told_alone(tmp_path):
  """No figure and no column of what there is nothing to compare with."""
  alone = row("only", 0.8, None, chosen=True, patients=None)
  alone["patients_tested"] = alone["network"] = None
  results = made([alone], curves=[], learning=[], confusion=None)
  assert slides.encoders(results["summary"]) is None
  sentence = sentences.of_slides(results["summary"])
  assert (
    sentence
    == "Features of only give 0.800 [0.750, 0.850] AUROC, over 5 folds."
  )
  shown = _Page(page.write(tmp_path, results).read_text(encoding="utf-8"))
  (header,) = [line for line in shown.rows if line and line[0] == "encoder"]
  assert not any("above" in name or "patients" in name for name in header)


def test_what_speaks_against_it_comes_first():
  """A class that is hardly found, and trainings that patience did not end."""
  missed = {"class": "tumour", "label": 1, "images": 20, "found": 2}
  chosen = row(
    "only",
    0.6,
    None,
    chosen=True,
    missed=[missed | {"instead": "normal", "taken": 18}],
  )
  chosen["test"]["balanced_accuracy"] = score(0.52)
  summary = made([chosen])["summary"]
  summary["unfinished"]["at_last_epoch"] = 4
  sentence = sentences.of_slides(summary)
  assert sentence.startswith("Do not rely on it: the network calls 18 of 20")
  assert "tumour slides normal" in sentence and "guessing" in sentence
  assert "4 of 10 trainings had their best epoch at the last" in sentence
