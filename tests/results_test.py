"""What is written is what the types say, and what the pages ask for."""

import pathlib
import re
import typing

import pytest

from jaxtransfer import results
from jaxtransfer.report import finetune, layers, page, tables, truncate
from tests import typed
from tests.report import example

REPORT = pathlib.Path(page.__file__).parent
EXAMPLES = {
  "layers": example.results,
  "finetune": example.finetune_results,
  "truncate": example.truncate_results,
}


@pytest.mark.parametrize("job", EXAMPLES)
def test_examples_are_results_and_pages_ask_for_no_other_key(job):
  """The pages' tests draw what jobs write: the examples have all keys that the
  types have and no other. Drawn from them, a page asks for no key that there
  is not, in whatever depth: one misspelt would be a figure left out."""
  checked = typed.check_results(EXAMPLES[job]())
  content = {"layers": layers, "finetune": finetune, "truncate": truncate}[job]
  rows = tables.Measurements(checked["measurements"])
  drawn = content.content(checked["summary"], rows)
  assert drawn.sections and drawn.title


def test_every_key_that_a_page_asks_of_a_summary_is_one():
  """Read from the source: what no example reaches is asked for too."""
  known = set()
  for summary in results.SUMMARIES.values():
    known |= set(typing.get_type_hints(summary))
  asked = set()
  for path in REPORT.glob("*.py"):
    text = path.read_text()
    asked |= set(re.findall(r"summary\.get\(\s*\"(\w+)\"", text))
    asked |= set(re.findall(r"summary\[\"(\w+)\"\]", text))
  assert len(asked) > 40
  assert asked <= known


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda summary: summary.pop("cut"), "cut"),
    (lambda summary: summary.update(confusoin=None), "confusoin"),
    (lambda summary: summary["curves"].pop("roc"), "curves: .*roc"),
    (lambda summary: summary["epochs"][3].update(val=0.5), r"epochs\[3\].val"),
    (lambda summary: summary.update(best_epoch="12"), "best_epoch is '12'"),
  ],
)
def test_a_misspelt_key_is_found(change, says):
  """In whatever depth it stands, and on either side."""
  left = example.finetune_results()
  change(left["summary"])
  with pytest.raises(AssertionError, match=says):
    typed.check_results(left)
  whole = typed.check_results(example.finetune_results())
  with pytest.raises(AssertionError, match="no key 'colour'"):
    whole["summary"]["curves"]["roc"].get("colour")


def test_numbers_that_are_none_are_null():
  ends = (0.1, float("inf"))
  row = results.row({"network": "n"}, "auroc", float("nan"), ends)
  typed.strict(row, results.Row)
  assert row["value"] is None and row["low"] == 0.1 and row["high"] is None


def test_words_of_metrics_are_those_of_the_table():
  """Metrics whose losses are small come last on pages; what is no metric is
  said as it is."""
  assert list(results.METRIC_WORDS)[-3:] == ["loss", "ece", "brier"]
  assert results.metric_name("balanced_accuracy") == "balanced accuracy"
  assert results.metric_name("seed_sd") == "seed sd"
  assert results.metric_name(None) == "score"
