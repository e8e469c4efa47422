"""The processes of a run: one, or several that train together.

Several are started with the same command, usually one on every machine. The
first of them writes and speaks; a mistake that one of them finds ends them all.
This module is jax-free until processes join: a mistake in the command line is
said at once.
"""

import contextlib
import io
import logging
import os
import pathlib
import signal
import sys
import traceback
from typing import Any, NoReturn

from jaxtransfer import errors, files, signals

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The first process may still write the report when the others have done.
_PATIENCE = 3600
_HUGE_PAGES = "glibc.malloc.hugetlb"


def settle_surroundings() -> None:
  """Makes the process independent of where it was started.

  A terminal of any encoding shows any text: what it lacks is escaped. What a
  notebook has told matplotlib of itself, which is read at its import and
  refused where that backend is not installed, does not hold here. A user
  without a home gets one that nobody can write to: libraries know how to do
  without a directory, but not without its name.
  """
  for stream in (sys.stdout, sys.stderr):
    # Other programs put streams of their own there, or none.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")
  os.environ["MPLBACKEND"] = "agg"
  # It warns of a cache that is not there.
  logging.getLogger("matplotlib").setLevel(logging.ERROR)
  try:
    pathlib.Path.home()
  except RuntimeError:
    os.environ["HOME"] = os.devnull


def use_huge_pages() -> None:
  """Starts this process anew with its memory in huge pages, on Linux.

  On CPU every step takes gigabytes from the system and gives them back, which
  in pages of 4 kB costs up to a quarter of its time. glibc asks for larger ones
  only where a variable said so when the process began. Nothing happens where
  the variable is set, or where Linux gives all processes huge pages or none.
  """
  settings = os.environ.get("GLIBC_TUNABLES", "")
  kernel = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  with contextlib.suppress(OSError):
    if "[madvise]" in kernel.read_text() and _HUGE_PAGES not in settings:
      settings = f"{settings}:" if settings else ""
      os.environ["GLIBC_TUNABLES"] = f"{settings}{_HUGE_PAGES}=1"
      # Blocked ones wait until the new process can answer.
      signal.pthread_sigmask(signal.SIG_BLOCK, signals.CODES)
      try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
      finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.CODES)


class One:
  """A run of one process.

  Attributes:
    first: whether this process writes.
  """

  first = True

  def broadcast(self, value: Any) -> Any:
    """Returns the first process's value once all have come here.

    Args:
      value: for JSON.

    Raises:
      UsageError, RunError, SystemExit: another process ended with it.
    """
    return value

  def begin(self) -> None:
    """Ends the checks: all processes have passed them, and the work begins.

    Raises:
      UsageError, RunError, SystemExit: as `broadcast` does.
    """

  def end(self, message: str, code: int) -> NoReturn:
    """Says why the process ends, and ends it.

    Args:
      message: one line.
      code: exit code.
    """
    if code in signals.SAID:
      # Impatience would end in a traceback.
      for number in signals.CODES:
        signal.signal(number, signal.SIG_IGN)
    _say(message)
    if code in signals.SAID:
      # Everything is closed by now but XLA's threads, which may be compiling:
      # to take the interpreter down under them can crash it.
      sys.stdout.flush()
      os._exit(code)
    sys.exit(code)

  def crash(self, error: Exception) -> NoReturn:
    """Ends the process after an error that nobody expected."""
    raise error

  def preempt(self, *_: object) -> None:
    """Ends the process after SIGTERM; a signal handler."""
    raise SystemExit(signals.PREEMPTED)


class Several(One):
  """The processes that jax.distributed joins.

  What they are told: `JAX_COORDINATOR_ADDRESS` (host:port of the first),
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; or nothing, where JAX finds it out
  itself: under Slurm, Open MPI, Kubernetes and on Cloud TPU.

  Raises:
    UsageError: the processes cannot find each other.
  """

  def __init__(self):
    import jax

    given = {name: os.environ.get(name) for name in _VARIABLES}
    address, count, index = given.values()
    explicit = None not in given.values()
    # SIGTERM is this program's own affair, see `training.loop`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
      jax.distributed.initialize(
        address,
        None if count is None else int(count),
        None if index is None else int(index),
        cluster_detection_method="deactivate" if explicit else None,
        shutdown_timeout_seconds=_PATIENCE,
      )
    except (ValueError, TypeError, RuntimeError) as e:
      reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
      raise errors.UsageError(
        f"--distributed: the processes cannot join ({reason}); set"
        f" {', '.join(_VARIABLES)} in each, or start them where JAX finds them"
        " itself (Slurm, Open MPI, Kubernetes, Cloud TPU)"
      ) from None
    self.first = jax.process_index() == 0
    # Checks: an error is for all. Work: the others are waiting for a result of
    # this process, which only its end can tell them. Over: all know.
    self._stage = "checks"
    if not self.first:
      sys.stdout = open(  # noqa: SIM115
        os.devnull, "w", encoding="utf-8", errors="backslashreplace"
      )

  def broadcast(self, value: Any) -> Any:  # noqa: D102
    messages = self._tell({"value": value})
    failed = [message for message in messages if "code" in message]
    if not failed:
      return messages[0]["value"]
    message, code = failed[0]["message"], failed[0]["code"]
    kinds = {2: errors.UsageError, 1: errors.RunError}
    raise kinds.get(code, SystemExit)(message if code in kinds else code)

  def begin(self) -> None:  # noqa: D102
    self.broadcast(None)
    self._stage = "work"

  def end(self, message: str, code: int) -> NoReturn:  # noqa: D102
    if self._stage == "checks":
      self._tell({"message": message, "code": code})
    elif self._stage == "work" and code != signals.PREEMPTED:
      self._leave(message, code)
    super().end(message, code)

  def crash(self, error: Exception) -> NoReturn:  # noqa: D102
    lost = any(word in str(error) for word in ("Gloo", "NCCL", "coordination"))
    if lost:
      reason = (str(error).splitlines() or [""])[0][:200]
      message = f"another process of the run has ended ({reason})"
    else:
      traceback.print_exception(error)
      message = f"{type(error).__name__}: {error}"
    if lost or self._stage != "checks":
      self._leave(message, 1)
    self.end(message, 1)

  def preempt(self, *_: object) -> None:  # noqa: D102
    # Where all agree on the step, training has a handler of its own.
    if self._stage == "work":
      self._leave(signals.SAID[signals.PREEMPTED], signals.PREEMPTED)
    super().preempt()

  def _tell(self, message: dict[str, Any]) -> list[dict[str, Any]]:
    from jaxtransfer import parallel

    messages = parallel.all_gather(message)
    if any("code" in one for one in messages):
      self._stage = "over"
    return messages

  def _leave(self, message: str, code: int) -> NoReturn:
    """Ends at once: a usual exit would wait for the others, who wait for us."""
    _say(message)
    sys.stdout.flush()
    os._exit(code)


def _say(message: str) -> None:
  # A file's name may hold a line break.
  line = f"jaxtransfer: {files.visible(message)}"
  print(line, file=sys.stderr, flush=True)
