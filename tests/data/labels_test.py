"""Labels in words, and what they ask for."""

import numpy as np
import pytest

from jaxtransfer import errors
from jaxtransfer.data import labels


def test_one_label_is_one_class():
  names, targets = labels.read_targets(["a", "b;c"], multilabel=False)
  assert names == ["a", "b;c"] and (targets == np.eye(2)).all()


def test_several_labels_none_and_unknown():
  names, targets = labels.read_targets(
    ["-", "edema", "edema; ?effusion", "?edema"], multilabel=True
  )
  assert names == ["edema", "effusion"]
  np.testing.assert_array_equal(
    targets, [[0, 0], [1, 0], [1, np.nan], [np.nan, 0]]
  )


@pytest.mark.parametrize("label", ["a;;b", "a;", "?", "a;a", "a;?a"])
def test_a_label_that_says_nothing_or_the_same_twice_is_named(label):
  with pytest.raises(errors.UsageError, match="config.multilabel"):
    labels.read_targets([label], multilabel=True)
