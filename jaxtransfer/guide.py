"""What the program says of itself: help, version, networks, weights.

JAX is imported only where networks are counted.
"""

import ast
import importlib.metadata
import io
import pathlib
import platform
import shutil
import textwrap
import tokenize
from collections.abc import Iterable, Sequence

from absl import flags

from jaxtransfer import configuration, errors, jobs, mistakes

# What may be asked for in place of a run.
ASKED = ("models", "weights")
_HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull")
_VERSION = ("--version", "-version")
_FLAGS = ("config", "workdir", "dry_run", "distributed")
_USAGE = """\
jaxtransfer: how much of a pretrained network does my task need?

  jaxtransfer --config=NAME:NETWORK --workdir=FOLDER --config.data=SOURCE
      [--config.KEY=VALUE ...]     runs a job; the same command resumes it
  jaxtransfer --help NAME          what a config is for, and its keys
  jaxtransfer models [NETWORK]     the networks, or the layers of one
  jaxtransfer weights [NETWORK]    the published weights
  jaxtransfer --version
"""


def answer(arguments: Sequence[str]) -> str | None:
  """Returns what a command line asks to be told, None where it is a run.

  Args:
    arguments: without the program's name.

  Raises:
    UsageError: it asks of something that there is not.
  """
  words = [a for a in arguments if not a.startswith("-")]
  if any(a in _HELP for a in arguments):
    given = mistakes.named(arguments) or "".join(words[:1])
    return _of_config(given) if given else _help()
  if any(a in _VERSION for a in arguments):
    return f"jaxtransfer {_version()}, Python {platform.python_version()}"
  if not arguments or arguments[0] not in ASKED:
    return None
  kind, *rest = arguments
  if len(rest) > 1:
    raise errors.UsageError(
      f"unknown argument {rest[1]!r}; as in jaxtransfer {kind} resnet50"
    )
  if kind == "weights":
    return _weights(*rest)
  return _layers(*rest) if rest else _models()


def _help() -> str:
  parts = [_USAGE, "Flags:"]
  parts += [_entry(f"--{name}", flags.FLAGS[name].help) for name in _FLAGS]
  parts += ["", "Jobs, what each answers:"]
  parts += [_entry(job.name, job.question) for job in jobs.JOBS.values()]
  parts += ["", "Other configs that come with the program:"]
  for name, path in configuration.packaged().items():
    if name not in jobs.JOBS:
      first, _ = _docstring(path)
      parts.append(_entry(name, f"{first} ({mistakes.load(name).job})"))
  having: dict[tuple[str, str, str], list[str]] = {}
  for job in jobs.JOBS:
    for key in _keys(job):
      having.setdefault(key, []).append(job)
  groups: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
  for key, of_jobs in having.items():
    groups.setdefault(tuple(of_jobs), []).append(key)
  for of_jobs in sorted(groups, key=lambda names: -len(names)):
    every = len(of_jobs) == len(jobs.JOBS)
    of = "every job" if every else errors.listed(of_jobs)
    words = f"Keys of {of}, with what they are unless told otherwise:"
    parts += ["", *textwrap.wrap(words, _width())]
    parts += _of_keys(groups[of_jobs])
  return "\n".join(parts)


def _of_config(given: str) -> str:
  """Says what one config is for, and its keys."""
  config = mistakes.load(given)
  path = pathlib.Path(configuration.resolve(given).partition(":")[0])
  first, rest = _docstring(path)
  job = jobs.find(config.job)
  parts = [first, *(["", rest] if rest else [])]
  parts += ["", _entry(job.name, job.question, 12)]
  parts += ["", "Keys, with what they are unless told otherwise:"]
  return "\n".join([*parts, *_of_keys(_keys(given))])


def _docstring(path: pathlib.Path) -> tuple[str, str]:
  """Returns the first line of a config's docstring, and the others."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  first, _, rest = (ast.get_docstring(tree) or path.stem).partition("\n")
  return first, rest.strip()


def _keys(given: str) -> list[tuple[str, str, str]]:
  """Returns every key of a config, its default and what is said of it."""
  config = mistakes.load(given)
  path = pathlib.Path(configuration.resolve(given).partition(":")[0])
  words: dict[str, str] = {}
  # What a file says of a key holds until another says something else.
  for file in (
    pathlib.Path(configuration.__file__),
    configuration.packaged()[config.job],
    path,
  ):
    words |= {
      key: comment for key, comment in _comments(file).items() if comment
    }
  return [
    (key, configuration.written(value), words.get(key, ""))
    for key, value in configuration.flat(config).items()
    if key != "job"
  ]


def _comments(path: pathlib.Path) -> dict[str, str]:
  """Returns what the comments beside `config.key = value` say, by key."""
  text = path.read_text(encoding="utf-8")
  comments = {
    token.start[0]: token.string.lstrip("# ")
    for token in tokenize.generate_tokens(io.StringIO(text).readline)
    if token.type == tokenize.COMMENT
  }
  explanations = {}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Assign):
      name, _, key = ast.unparse(node.targets[0]).partition(".")
      lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
      if name == "config":
        explanations[key] = " ".join(
          comments[n] for n in lines if n in comments
        )
  return explanations


def _of_keys(keys: Iterable[tuple[str, str, str]]) -> list[str]:
  return [_entry(f"{key}={value}", words) for key, value, words in keys]


def _entry(name: str, words: str, column: int = 32) -> str:
  """Returns a name and, beside or below it, what is said of it."""
  blank = " " * column
  text = textwrap.fill(
    words,
    _width(),
    initial_indent=blank,
    subsequent_indent=blank,
    # An address is to be copied.
    break_long_words=False,
    break_on_hyphens=False,
  )
  name = f"  {name}"
  if len(name) < column:
    return name + text[len(name) :]
  return f"{name}\n{text}" if text else name


def _width() -> int:
  return min(100, shutil.get_terminal_size((80, 24)).columns)


def _version() -> str:
  try:
    return importlib.metadata.version("jaxtransfer")
  except importlib.metadata.PackageNotFoundError:
    return "(not installed)"


def _models() -> str:
  from jaxtransfer.networks import zoo
  from jaxtransfer.weights import catalog

  lines = [
    "Networks: their layers, and parameters and multiply-accumulates of the"
    " whole,\nwithout a head, for one image of 224 pixels.",
    "",
    f"{'network':<20}{'layers':>7}{'parameters':>12}{'MACs':>9}"
    "  published weights",
  ]
  for name in zoo.list_models():
    layers = zoo.list_layers(name)
    last = layers[-1]
    # A stage's name is another one of its last block's.
    count = len({(layer.params, layer.macs) for layer in layers})
    known = sum(row.network == name for row in catalog.rows())
    lines.append(
      f"{name:<20}{count:>7}{_millions(last.params):>12}"
      f"{last.macs / 1e9:>7.2f} G{known or '-':>19}"
    )
  return "\n".join(lines)


def _layers(network: str) -> str:
  from jaxtransfer.networks import zoo

  lines = [
    f"{network}, cut after each of its layers, without a head, for one image"
    " of 224\npixels; the stride is input pixels per output pixel.",
    "",
    f"{'layer':<28}{'channels':>9}{'stride':>8}{'parameters':>12}{'MACs':>9}",
  ]
  lines += [
    f"{layer.name:<28}{layer.channels:>9}{layer.stride:>8}"
    f"{_millions(layer.params):>12}{layer.macs / 1e9:>7.2f} G"
    for layer in zoo.list_layers(network)
  ]
  return "\n".join(lines)


def _millions(count: int) -> str:
  return f"{count / 1e6:.2f} M"


def _weights(network: str | None = None) -> str:
  from jaxtransfer.weights import catalog

  rows = catalog.rows()
  known = sorted({row.network for row in rows})
  if network is not None and network not in known:
    raise errors.UsageError(
      f"no weights of {network!r}{errors.nearest(network, known)}"
      f" (there are some of {', '.join(known)})"
    )
  parts = [
    "Published weights, for --config.network.weights; a path to a file works"
    " as well.\n`imagenet` and `imagenet-v2` are the network's own."
  ]
  for row in rows:
    if network not in (None, row.network):
      continue
    parts += ["", f"{row.name}: {row.network}"]
    facts = {
      "source": row.where,
      "licence": row.licence,
      "digest": row.known,
      "note": row.note,
    }
    parts += [_entry(name, of, 12) for name, of in facts.items() if of]
  return "\n".join(parts)
