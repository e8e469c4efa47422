import numpy as np

from jaxtransfer.measure import curves
from jaxtransfer.report import finetune, page
from tests.report import example
from tests.report.figures_test import assert_legible


def test_every_figure_is_legible_with_two_classes_and_with_many():
  for classes in (("no", "yes"), tuple(f"class {i}" for i in range(12))):
    summary = example.finetune_results(classes)["summary"]
    for draw in (finetune.training, finetune.confusion, finetune.reliability):
      assert_legible(draw.__name__, draw(summary))
    assert_legible("ranking", finetune.ranking([("", summary["curves"])]))


def test_curves_are_drawn_as_they_were_measured():
  """ROC straight between its points; a precision back to the recall before."""
  rng = np.random.default_rng(0)
  labels = rng.integers(2, size=80)
  logits = rng.normal(size=(80, 2)) + np.eye(2)[labels]
  weights = rng.integers(3, size=(30, 80))
  found = curves.curves(np.eye(2)[labels], logits, weights)
  roc, precision = finetune.ranking([("cut", found)]).axes
  for axis, name, style in (
    (roc, "roc", "default"),
    (precision, "precision_recall", "steps-pre"),
  ):
    line = next(x for x in axis.get_lines() if x.get_label() == "cut")
    np.testing.assert_array_equal(line.get_ydata(), found[name]["y"])
    assert line.get_drawstyle() == style
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == min(found[name]["low"])
    assert band.max() == max(found[name]["high"])


def test_curves_without_resamples_have_no_band_and_stand_all_the_same():
  found = curves.curves([[0, 1], [1, 0], [0, 1]], [[0, 1], [1, 0], [0, 2]])
  figure = finetune.ranking([("", found)])
  assert_legible("ranking", figure)
  assert figure.axes[0].get_legend() is None
  assert finetune.ranking([("", {}), ("x", None)]) is None
  undefined = curves.curves([[0.0, 1.0]], [[0.0, 1.0]])["roc"]
  assert finetune.ranking([("", {"roc": undefined})]) is None


def test_the_page_shows_the_curves_and_does_without_them(tmp_path):
  results = example.finetune_results()
  text = page.write(tmp_path, results).read_text(encoding="utf-8")
  assert "How it ranks" in text and text.count("<svg") == 4
  results["summary"]["curves"] = None
  text = page.write(tmp_path, results).read_text(encoding="utf-8")
  assert "How it ranks" not in text and text.count("<svg") == 3
