"""What a label says: one class, or several findings that may be unknown."""

from collections.abc import Sequence

import numpy as np

from jaxtransfer.data.names import shown
from jaxtransfer.errors import UsageError, nearest

_NONE = "-"
_UNKNOWN = "?"


def read_targets(
  classes: Sequence[str],
  multilabel: bool,
  names: Sequence[str] | None = None,
) -> tuple[list[str], np.ndarray]:
  """Returns what there is to predict, and what each label asks for.

  With `multilabel`, a label lists what is there, `edema;effusion`, and after a
  question mark what nobody knows, `edema;?effusion`; `-` is nothing at all.
  Whatever a label does not name is absent.

  Args:
    classes: the source's labels, all that there are.
    multilabel: whether an image may have several.
    names: what a finished network predicts, C in its order; an empty label is
      not known then. None where the labels decide it.

  Returns:
    The C names, sorted unless given, and (len(classes), C) float32: 1 there, 0
    absent, NaN unknown.

  Raises:
    UsageError: a label that names nothing, one thing twice, or what is not
      among the given names.
  """
  if not multilabel and names is None:
    return list(classes), np.eye(len(classes), dtype=np.float32)
  parsed = [
    _parse(label) if multilabel and label else {label: 1.0} for label in classes
  ]
  known = names is not None
  if names is None:
    names = sorted({name for marks in parsed for name in marks})
  targets = np.zeros((len(classes), len(names)), np.float32)
  for row, marks in enumerate(parsed):
    if known and not classes[row]:
      targets[row] = np.nan
      continue
    for name, value in marks.items():
      if name not in names:
        raise UsageError(
          f"label {classes[row]!r}: the network predicts {shown(names, 8)}"
          f"{nearest(name, names)}; correct it, or leave the label empty"
        )
      targets[row, names.index(name)] = value
  return list(names), targets


def _parse(label: str) -> dict[str, float]:
  marks: dict[str, float] = {}
  if label.strip() == _NONE:
    return marks
  for part in label.split(";"):
    name = part.strip().removeprefix(_UNKNOWN).strip()
    if not name or name in marks:
      raise UsageError(
        f"label {label!r} {'names ' + name + ' twice' if name else 'has a gap'}"
        "; with config.multilabel it is names with ';' between, '?' before an"
        " unknown one, or '-' for none"
      )
    marks[name] = np.nan if part.strip().startswith(_UNKNOWN) else 1.0
  return marks
