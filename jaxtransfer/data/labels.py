"""What a label says: one class, or several findings that may be unknown."""

from collections.abc import Sequence

import numpy as np

from jaxtransfer.errors import UsageError

_NONE = "-"
_UNKNOWN = "?"


def read_targets(
  classes: Sequence[str], multilabel: bool
) -> tuple[list[str], np.ndarray]:
  """Returns what there is to predict, and what each label asks for.

  With `multilabel`, a label lists what is there, `edema;effusion`, and after a
  question mark what nobody knows, `edema;?effusion`; `-` is nothing at all.
  Whatever a label does not name is absent.

  Args:
    classes: the source's labels, all that there are.
    multilabel: whether an image may have several.

  Returns:
    The C names, sorted, and (len(classes), C) float32: 1 there, 0 absent, NaN
    unknown.

  Raises:
    UsageError: a label that names nothing, or one thing twice.
  """
  if not multilabel:
    return list(classes), np.eye(len(classes), dtype=np.float32)
  parsed = [_parse(label) for label in classes]
  names = sorted({name for found in parsed for name in found})
  targets = np.zeros((len(classes), len(names)), np.float32)
  for row, found in enumerate(parsed):
    for name, value in found.items():
      targets[row, names.index(name)] = value
  return names, targets


def _parse(label: str) -> dict[str, float]:
  found: dict[str, float] = {}
  if label.strip() == _NONE:
    return found
  for part in label.split(";"):
    name = part.strip().removeprefix(_UNKNOWN).strip()
    if not name or name in found:
      raise UsageError(
        f"label {label!r} {'names ' + name + ' twice' if name else 'has a gap'}"
        "; with config.multilabel it is names with ';' between, '?' before an"
        " unknown one, or '-' for none"
      )
    found[name] = np.nan if part.strip().startswith(_UNKNOWN) else 1.0
  return found
