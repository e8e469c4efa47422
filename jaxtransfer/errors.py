"""What a user can do something about: one line each, and no traceback."""

from collections.abc import Sequence


class UsageError(ValueError):
  """A mistake found before any work: a bad flag, config, file or name.

  The message is one line that says what is wrong, where (file, key, row) and
  what to do. `main` prints it and exits with 2.
  """


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
