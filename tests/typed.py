"""Checks that results hold what their types say, and pages ask for no more."""

import types
import typing

from jaxtransfer import results as types_of


class Strict(dict):
  """A dict of a type: a key that the type does not know cannot be asked for."""

  known: frozenset[str]

  def __getitem__(self, key):
    return super().__getitem__(self._checked(key))

  def get(self, key, default=None):
    return super().get(self._checked(key), default)

  def _checked(self, key):
    assert key in self.known, f"no key {key!r}; known: {sorted(self.known)}"
    return key


def strict(value, of, path="results"):
  """Returns results whose every dict is `Strict`.

  Args:
    value: what is there.
    of: its type: a TypedDict, a list, dict or union of such, or plain.
    path: where it stands, for the message.

  Raises:
    AssertionError: a key is missing or unknown, or a value of another type.
  """
  if typing.is_typeddict(of):
    assert isinstance(value, dict), f"{path} is {value!r}"
    fields = typing.get_type_hints(of)
    unlike = value.keys() ^ fields.keys()
    assert not unlike, f"{path}: {sorted(unlike)} missing or unknown"
    # Own keys in their own order.
    checked = Strict(
      {k: strict(v, fields[k], f"{path}.{k}") for k, v in value.items()}
    )
    checked.known = frozenset(fields)
    return checked
  origin, arguments = typing.get_origin(of), typing.get_args(of)
  if origin in (types.UnionType, typing.Union):
    return _one_of(value, arguments, path)
  if origin is list:
    assert isinstance(value, list), f"{path} is {value!r}"
    (kind,) = arguments
    return [strict(v, kind, f"{path}[{i}]") for i, v in enumerate(value)]
  if origin is dict:
    assert isinstance(value, dict), f"{path} is {value!r}"
    return {k: strict(v, arguments[1], f"{path}.{k}") for k, v in value.items()}
  if of is typing.Any:
    return value
  if of is float:
    # As JSON and type checkers have it, an int is a float; a bool is not.
    whole = isinstance(value, int) and not isinstance(value, bool)
    assert whole or isinstance(value, float), f"{path} is {value!r}"
    return value
  assert type(value) is of, f"{path} is {value!r}, no {of}"
  return value


def _one_of(value, kinds, path):
  """Returns the value by the first kind that it is of."""
  reasons = []
  for kind in kinds:
    try:
      return strict(value, kind, path)
    except AssertionError as e:
      reasons.append(str(e))
  raise AssertionError("; or ".join(reasons))


def check_results(results):
  """Checks a whole results.json; returns it with `Strict` dicts.

  A page may ask a summary for what another job's has: what they share is drawn
  by the same functions.
  """
  job = results["job"]
  fields = typing.get_type_hints(types_of.Results)
  assert results.keys() == fields.keys()
  summary = strict(results["summary"], types_of.SUMMARIES[job], "summary")
  summary.known = frozenset().union(
    *(typing.get_type_hints(of) for of in types_of.SUMMARIES.values())
  )
  rows = strict(results["measurements"], list[types_of.Row], "measurements")
  return {"job": job, "summary": summary, "measurements": rows}
