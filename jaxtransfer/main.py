"""absl flags -> config -> one job.

jaxtransfer --config=layers:resnet50 --workdir=runs/l1 \
  --config.data=manifest.csv
"""

from jaxtransfer import signals

if __name__ == "__main__":
  # Before the other imports, which take their time.
  signals.end_at_signals()

import contextlib
import errno
import functools
import importlib
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from jaxtransfer import (
  configuration,
  errors,
  files,
  guide,
  hosts,
  jobs,
  mistakes,
  workdir,
)

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A packaged config's name, or a file, and, after a colon, a network's name.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; the same command again resumes it."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Whether this is one of several processes that train together, each started"
  " with this command; see launch/README.md.",
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Says what the run would do, how long it would take and how much disk, and"
  " writes nothing.",
)

USAGE = 2
# What a disk says that is full or may not be written.
_MENDED = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
  *(errno.EROFS, errno.EACCES, errno.EPERM),
)


def _parse(argv: Sequence[str]) -> list[str]:
  """Reads the flags; a mistake in them is one line and exit code 2."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      near = errors.nearest(rest[1], guide.ASKED)
      if rest[1].partition(":")[0] in configuration.packaged():
        near = f"; did you mean --config={rest[1]}?"
      raise errors.UsageError(f"unknown argument {rest[1]!r}{near}")
    for flag in (_CONFIG, _WORKDIR):
      if flag.value in (None, ""):
        raise errors.UsageError(
          f"--{flag.name} is missing; jaxtransfer --help says what there is"
        )
    # A config file that could not be loaded says so when it is first used.
    jobs.find(_CONFIG.value.job)
    return rest
  # A config file is a program, and may raise anything.
  except Exception as e:  # noqa: BLE001
    hosts.One().end(mistakes.explain(argv, e), USAGE)


def _join(job: str) -> hosts.Several:
  """Joins the processes of the run, before JAX is used for anything else."""
  if not jobs.find(job).joins:
    joined = [name for name, of in jobs.JOBS.items() if of.joins]
    raise errors.UsageError(
      f"--distributed is for config.job {', '.join(joined)}; {job!r} runs in"
      " one process"
    )
  processes = hosts.Several()
  signals.hand_signals(processes.preempt)
  return processes


def _directory() -> str:
  """Returns the run's directory; that it is given was checked."""
  return _WORKDIR.value or ""


def _write_failures(failures: Sequence[tuple[str, str]]) -> str:
  """Lists the images that stopped a run, and returns where, in words."""
  if _DRY_RUN.value:
    return ""
  path = pathlib.Path(_directory()) / "failures.csv"
  try:
    files.write_csv(path, ("name", "reason"), failures)
  except OSError:
    return ""
  return f"; all are in {path}"


def _not_compared(config: ml_collections.ConfigDict) -> str | None:
  """Compares the data of a finished run with what they are now.

  Returns:
    What could not be compared, None where all could.

  Raises:
    UsageError: they have changed since.
  """
  # Here, so that a mistake in the command line is said at once.
  from jaxtransfer.data import sources, stored_splits

  path = pathlib.Path(_directory()) / "splits.json"
  if not path.exists():
    return f"there is no {path}"
  try:
    examples = sources.open_source(config.data)
  except errors.MissingSourceError as e:
    return str(e)
  return stored_splits.check_unchanged(path, examples)


def _workdir(
  config: ml_collections.ConfigDict,
  job: jobs.Job,
  command: str,
  processes: hosts.One,
) -> contextlib.AbstractContextManager[workdir.Workdir]:
  """Takes the workdir; for a dry run, only looks at it."""
  path, values, shared = _directory(), config.to_dict(), job.divides
  if _DRY_RUN.value:
    return contextlib.nullcontext(workdir.look(path, values, shared))
  return workdir.claim(path, values, command, processes, shared)


def main(command: str, argv: Sequence[str]) -> int:
  """Runs the job that the config names and returns the exit code.

  Args:
    command: as the user gave it.
    argv: what is left of it beside flags.
  """
  del argv
  config = _CONFIG.value
  processes = hosts.One()
  if not flags.FLAGS["verbosity"].present:
    # absl's own default lets every library tell what it does.
    logging.set_verbosity(logging.WARNING)
  try:
    job = jobs.find(config.job)
    if _DISTRIBUTED.value:
      if _DRY_RUN.value:
        raise errors.UsageError(
          "--dry_run is of one process; leave --distributed out"
        )
      processes = _join(config.job)
    with _workdir(config, job, command, processes) as claimed:
      if claimed.finished and not job.again:
        missing = claimed.share(lambda: _not_compared(config))
        print(f"{claimed.path} is finished; see {claimed.path}/report.html")
        if missing:
          print(f"Its data were not compared with what they are now: {missing}")
        return claimed.report_failures()
      dry = " (dry run)" * claimed.dry
      print(f"jaxtransfer {config.job} -> {claimed.path}{dry}", flush=True)
      module = importlib.import_module(job.module)
      parallel = importlib.import_module("jaxtransfer.parallel")
      parallel.cache_programs()
      if not _DISTRIBUTED.value:
        batch = config.get("batch_size", 1)
        together = batch // max(1, config.get("accumulate", 1))
        parallel.use_processors(max(1, together))
      signals.hand_signals(processes.preempt)
      return module.run(config, claimed)
  except errors.UsageError as e:
    processes.end(str(e), USAGE)
  except errors.UnreadableError as e:
    written = _write_failures(e.failures) if processes.first else ""
    processes.end(f"{e}{written}", 1)
  except errors.RunError as e:
    processes.end(str(e), 1)
  except OSError as e:
    message = f"{e.filename or _WORKDIR.value}: {e.strerror or e}"
    if e.errno in _MENDED:
      message += "; make room or give permission, and the same command resumes"
    processes.end(message, 1)
  except KeyboardInterrupt:
    code = signals.INTERRUPTED
    processes.end(signals.SAID[code], code)
  except SystemExit as e:
    if e.code != signals.PREEMPTED:
      raise
    processes.end(signals.SAID[e.code], e.code)
  except Exception as e:  # noqa: BLE001
    processes.crash(e)


def run() -> None:
  """Runs the command line; `__main__` is where it starts."""
  signals.end_at_signals()
  hosts.use_huge_pages()
  hosts.settle_surroundings()
  given = sys.argv[1:]
  try:
    answer = guide.answer(given)
  except errors.UsageError as e:
    hosts.One().end(str(e), USAGE)
  if answer is not None:
    # Whoever reads it may have read enough: `jaxtransfer --help | head`.
    with contextlib.suppress(BrokenPipeError):
      print(answer, flush=True)
      return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return
  command = shlex.join(["jaxtransfer", *given])
  # Where the config's flags look for themselves.
  sys.argv[1:] = mistakes.written_out(given)
  app.run(functools.partial(main, command), flags_parser=_parse)


if __name__ == "__main__":
  run()
