"""absl flags -> config -> one job.

jaxtransfer --config=configs/layers.py:resnet50 --workdir=runs/l1 \
  --config.data=manifest.csv
"""

import importlib
import re
import shlex
import signal
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from jaxtransfer import configuration, errors, workdir

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/ and, after a colon, a network's name."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; the same command again resumes it."
)

USAGE = 2
INTERRUPTED = 130
PREEMPTED = 143


def _parse(argv: Sequence[str]) -> list[str]:
  """Reads the flags; a mistake in them is one line and exit code 2."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise errors.UsageError(f"unknown argument {rest[1]!r}")
    for flag in (_CONFIG, _WORKDIR):
      if flag.value is None:
        raise errors.UsageError(f"--{flag.name} is missing")
    # A config file that could not be loaded says so when it is first used.
    configuration.job_module(_CONFIG.value.job)
    return rest
  except (KeyError, AttributeError) as e:
    # ml_collections quotes the unknown key, twice over, and the nearest.
    near = re.search(r"Did you mean \"(\w+)\"", str(e))
    unknown = re.search(r"\w+", str(e))
    _fail(
      f"the config has no key {unknown[0] if unknown else e!r}"
      + (f"; did you mean {near[1]}?" if near else ""),
      USAGE,
    )
  except (flags.Error, OSError, TypeError, ValueError) as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    _fail(lines[-1].removeprefix("jaxtransfer.errors.UsageError: "), USAGE)


def _fail(message: str, code: int) -> None:
  print(f"jaxtransfer: {message}", file=sys.stderr, flush=True)
  sys.exit(code)


def _preempt(*_) -> None:  # noqa: ANN002
  raise SystemExit(PREEMPTED)


def main(argv: Sequence[str]) -> int:
  """Runs the job that the config names and returns the exit code."""
  config = _CONFIG.value
  signal.signal(signal.SIGTERM, _preempt)
  if not flags.FLAGS["verbosity"].present:
    # absl's own default lets every library tell what it does.
    logging.set_verbosity(logging.WARNING)
  try:
    module = configuration.job_module(config.job)
    command = shlex.join(["jaxtransfer", *sys.argv[1:]])
    with workdir.claim(_WORKDIR.value, config.to_dict(), command) as claimed:
      if claimed.finished:
        print(f"{claimed.path} is finished; see {claimed.path}/report.html")
        return 0
      print(f"jaxtransfer {config.job} -> {claimed.path}", flush=True)
      job = importlib.import_module(module)
      parallel = importlib.import_module("jaxtransfer.parallel")
      parallel.cache_programs()
      together = config.batch_size // config.get("accumulate", 1)
      parallel.use_processors(max(1, together))
      return job.run(config, claimed)
  except errors.UsageError as e:
    _fail(str(e), USAGE)
  except errors.RunError as e:
    _fail(str(e), 1)
  except OSError as e:
    _fail(f"{e.filename or _WORKDIR.value}: {e.strerror or e}", 1)
  except KeyboardInterrupt:
    _fail("interrupted; the same command resumes", INTERRUPTED)
  except SystemExit as e:
    if e.code == PREEMPTED:
      print("jaxtransfer: preempted; the same command resumes", file=sys.stderr)
    raise


def run() -> None:
  """The console script."""
  # `--config.data=tiles.csv` is short for the key that names the source.
  sys.argv[1:] = [
    argument.replace("--config.data=", "--config.data.source=", 1)
    if argument.startswith("--config.data=")
    else argument
    for argument in sys.argv[1:]
  ]
  app.run(main, flags_parser=_parse)


if __name__ == "__main__":
  run()
