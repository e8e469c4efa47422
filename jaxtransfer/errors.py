"""What a user can do something about: one line each, and no traceback."""

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns `; did you mean X?` for the closest of `names`, or nothing."""
  close = difflib.get_close_matches(name, list(names), n=1)
  return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Sequence[str]) -> str:
  """Returns names as a sentence lists them: a, b and c."""
  *others, last = names
  return f"{', '.join(others)} and {last}" if others else last


class UsageError(ValueError):
  """A mistake found before any work: a bad flag, config, file or name.

  The message is one line that says what is wrong, where (file, key, row) and
  what to do. `main` prints it and exits with 2.
  """


class MissingSourceError(UsageError):
  """The images are not where `config.data.source` says."""


class RunError(RuntimeError):
  """A run that cannot go on: too many unreadable images, a full disk.

  What was computed before it stays on disk. `main` prints the message, one
  line, and exits with 1.
  """


class UnreadableError(RunError):
  """Too many images that cannot be read.

  Attributes:
    failures: (name, reason) of each; `main` writes them to failures.csv.
  """

  def __init__(self, message: str, failures: Sequence[tuple[str, str]]):
    super().__init__(message)
    self.failures = list(failures)


class DivergedError(RunError):
  """A training whose numbers are no longer finite: it alone has failed."""


def check_range(
  key: str,
  value: float,
  *,
  least: float = float("-inf"),
  above: float = float("-inf"),
  most: float = float("inf"),
  below: float = float("inf"),
  why: str = "",
) -> None:
  """Checks that a key's value lies in a range; NaN lies in none.

  Args:
    key: its name, after `config.`.
    value: its value.
    least: the least it may be.
    above: what it must be above.
    most: the most it may be.
    below: what it must be below.
    why: said where it does not, for a bound that does not explain itself.

  Raises:
    UsageError: it does not.
  """
  if least <= value <= most and above < value < below:
    return
  bounds = (("at least", least), ("above", above))
  bounds += (("at most", most), ("below", below))
  words = " and ".join(
    f"{word} {bound:.12g}"
    for word, bound in bounds
    if abs(bound) != float("inf")
  )
  why = f": {why}" if why else ""
  raise UsageError(f"config.{key} is {value}; it must be {words}{why}")
