"""How far something long has come: a bar on a terminal, else lines at times."""

import math
import time
from types import TracebackType

import tqdm

# Seconds from line to line: soon one that says how long it will take, then
# fewer and fewer. Epochs have a line each, unless they are shorter than this.
_FIRST, _MOST, _LEAST = 15.0, 240.0, 5.0
_SIZES = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


def duration(seconds: float) -> str:
  """Returns a time in words, to two digits.

  Args:
    seconds: zero or more.
  """
  size, unit = next(s for s in _SIZES if seconds >= 1.5 * s[0] or s[0] == 1)
  count = seconds / size
  text = f"{count:.0f}" if count >= 10 or size == 1 else f"{count:.2g}"
  return f"{text} {unit}{'s' * (text != '1')}"


class Progress:
  """Shows how far a pass is, and what has come out of it so far.

  A pass that begins in the middle says from where it goes on.

  Args:
    what: is being done.
    unit: of what is counted, in the plural.
    total: how many there are; None where nobody knows.
    done: how many were there before.
    at: where it goes on, in words; by default as it is counted.
    quiet: whether another process tells it all.

  Attributes:
    beside: stands beside the count wherever that is told, e.g. "3 of 60
      slides".
  """

  def __init__(
    self,
    what: str,
    unit: str,
    total: int | None,
    done: int = 0,
    *,
    at: str = "",
    quiet: bool = False,
  ):
    self._what, self._unit, self._total = what, unit, total
    self._done = done
    self.beside = ""
    self._told, self._wait = time.monotonic(), _FIRST
    # When the first had come, which compiles, and how much was done then.
    self._begun: tuple[float, int] | None = None
    self._words_told = -math.inf
    if done and done != total and not quiet:
      print(f"{what} goes on {at or f'after {self._counted()}'}", flush=True)
    # None: where there is a terminal.
    self._bar = tqdm.tqdm(
      desc=what,
      total=total,
      initial=done,
      unit=f" {unit}",
      unit_scale=unit == "bytes",
      disable=quiet or None,
    )
    self._lines = bool(self._bar.disable) and not quiet

  def __enter__(self) -> "Progress":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def close(self) -> None:
    """Leaves the bar as it is."""
    self._bar.close()

  def update(self, count: int = 1, words: str = "") -> None:
    """Counts what has been done since.

    Args:
      count: how many.
      words: to be told of it, as `tell` does.
    """
    self._done += count
    if self.beside:
      self._bar.set_postfix_str(self.beside, refresh=False)
    self._bar.update(count)
    self._begun = self._begun or (time.monotonic(), self._done)
    if words:
      self.tell(words)
    elif self._lines and time.monotonic() - self._told >= self._wait:
      self._wait = min(2 * self._wait, _MOST)
      self._line(self._counted())

  def tell(self, words: str) -> None:
    """Says what has come out so far, beside the bar or in a line of its own.

    Args:
      words: e.g. an epoch and its scores.
    """
    self._bar.set_postfix_str(words)
    now = time.monotonic()
    if self._lines and (
      self._done == self._total or now - self._words_told >= _LEAST
    ):
      self._words_told = now
      self._line(words)

  def _counted(self) -> str:
    of = "" if self._total is None else f" of {self._total:,}"
    beside = f", {self.beside}" if self.beside else ""
    return f"{self._done:,}{of} {self._unit}{beside}"

  def _line(self, words: str) -> None:
    self._told = time.monotonic()
    remaining = (self._total or 0) - self._done
    if self._begun is not None and remaining > 0:
      started, before = self._begun
      if self._done > before:
        seconds = (self._told - started) / (self._done - before) * remaining
        words += f"; {duration(seconds)} left"
    print(f"{self._what}: {words}", flush=True)
