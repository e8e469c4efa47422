"""What Ctrl-C and SIGTERM do to the process, from its first moment on.

Nothing is imported here that takes time: until `end_at_signals` is called a
signal ends in a traceback of Python's own.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

INTERRUPTED = 130
PREEMPTED = 143
SAID = {
  INTERRUPTED: "interrupted; the same command resumes",
  PREEMPTED: "preempted; the same command resumes",
}
CODES: dict[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}


def end_at_signals() -> None:
  """Lets Ctrl-C and SIGTERM end the process at once, until a job takes over.

  While libraries are imported and JAX starts there is nothing to save, and an
  exception in the middle of it comes out as a traceback, as another error or
  not at all. To be called before anything else.
  """
  for number in CODES:
    # Python's own, or none: what a shell has ignored stays ignored.
    if signal.getsignal(number) in (
      signal.default_int_handler,
      signal.SIG_DFL,
    ):
      signal.signal(number, _end_at_once)
  # Those that came while `use_huge_pages` started the process anew.
  signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)


def _end_at_once(number: int, _: object) -> NoReturn:
  code = CODES[number]
  # `print` could be what was interrupted, and is not to be entered twice.
  os.write(2, f"jaxtransfer: {SAID[code]}\n".encode())
  os._exit(code)


def hand_signals(preempt: Callable[..., None]) -> None:
  """Gives the signals to a job: it may have something to save.

  Args:
    preempt: the handler of SIGTERM; Ctrl-C raises KeyboardInterrupt.
  """
  if signal.getsignal(signal.SIGINT) is _end_at_once:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGTERM, preempt)
  sys.unraisablehook = _ask_again


def _ask_again(ignored: Any) -> None:
  """Repeats a signal whose exception nobody could hear.

  It may come while Python collects garbage: libraries are called then, and an
  exception in them is printed and forgotten, and the process would go on.
  """
  error = ignored.exc_value
  if isinstance(error, KeyboardInterrupt):
    number = signal.SIGINT
  elif isinstance(error, SystemExit) and error.code == PREEMPTED:
    number = signal.SIGTERM
  else:
    sys.__unraisablehook__(ignored)
    return
  # When it is over; this function too is called in the middle of it.
  import threading

  repeat = threading.Timer(0.01, os.kill, (os.getpid(), number))
  repeat.daemon = True
  repeat.start()
