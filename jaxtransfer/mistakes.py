"""What is wrong with a command line, and what was probably meant: one line."""

import difflib
import pathlib
import re
import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from jaxtransfer import configuration, errors, jobs
from jaxtransfer.errors import UsageError

# What other tools call our keys, by the last part of their name.
_CALLED = {
  "optimiser.learning_rate": "lr base_lr init_lr max_lr",
  "optimiser.weight_decay": "wd decay l2",
  "optimiser.name": "opt optim optimiser",
  "optimiser.clip_norm": (
    "clip clip_grad grad_clip gradient_clip_val max_grad_norm"
  ),
  "schedule.name": "sched schedule scheduler lr_scheduler lr_schedule",
  "schedule.warmup_epochs": "warmup",
  "schedule.factor": "gamma lr_decay",
  "loss.label_smoothing": "smoothing",
  "loss.class_weights": "class_weight weighted balanced",
  "batch_size": "bs batch batchsize train_batch_size",
  "epochs": "epoch max_epochs num_epochs n_epochs",
  "patience": "early_stop early_stopping",
  "accumulate": (
    "accum grad_accum accumulation accumulate_grad_batches"
    " gradient_accumulation_steps"
  ),
  "average": "ema ema_decay model_ema",
  "dtype": "precision amp fp16 bf16 half mixed_precision",
  "seed": "random_seed random_state manual_seed",
  "seeds": "n_seeds num_seeds repeats",
  "folds": "fold kfold k_folds n_folds num_folds n_splits cv",
  "metric": "monitor score scoring",
  "resamples": "bootstrap bootstraps n_bootstrap n_resamples",
  "multilabel": "multi_label",
  "log_steps": "log_every log_interval print_freq",
  "checkpoint_steps": "save_every save_freq save_steps",
  "checkpoints": "keep save_total_limit",
  "train_from": "freeze freeze_until frozen unfreeze",
  "network.name": "model arch architecture backbone encoder net model_name",
  "network.weights": "pretrained weight checkpoint ckpt init",
  "network.until": "cut layer truncate last_layer stop_at",
  "data.source": (
    "dataset data_dir data_path data_root root csv manifest path images"
  ),
  "data.image_size": (
    "img_size imgsize input_size size resolution crop_size tile_size patch_size"
  ),
  "tile": "patch_size patchsize tile_size tile_px",
  "mpp": "resolution spacing target_mpp pixel_size um_px",
  "mag": "magnification target_mag power objective",
  "overlap": "patch_overlap",
  "min_tissue": "min_tissue_proportion tissue_threshold tissue_percentage",
  "save_tiles": "save_patches",
  "data.features": (
    "features_dir feat_dir features_path embeddings data_root_dir feature_dir"
  ),
  "pooling.name": "model_type mil aggregator pool aggregation",
  "pooling.dropout": "drop_out dropout",
  "bag_size": "max_bag_size tiles_per_bag n_instances num_instances",
  "sampling": "weighted_sample sampler",
  "data.workers": "num_workers n_workers n_jobs threads",
  "data.split_fractions": "split splits val_split test_split test_size",
  "data.few_shot": "shots n_shot shot",
  "augment.flip_horizontal": "flip hflip horizontal_flip",
  "augment.flip_vertical": "vflip vertical_flip",
  "augment.quarter_turns": "rotate rotation rot90",
}
# Of some names several keys, of different jobs.
_KEYS_CALLED: dict[str, list[str]] = {}
for _key, _others in _CALLED.items():
  for _other in _others.split():
    _KEYS_CALLED.setdefault(_other, []).append(_key)
_GROUP_CALLED = {
  "model": "network",
  "dataset": "data",
  "dataloader": "data",
  "optimizer": "optimiser",
  "optim": "optimiser",
  "scheduler": "schedule",
  "lr_scheduler": "schedule",
  "criterion": "loss",
  "augmentation": "augment",
  "transforms": "augment",
}
_WORKDIR_CALLED = (
  *("workdir", "out", "output", "out_dir", "output_dir"),
  *("save_dir", "logdir", "log_dir"),
)
_FLAGS = ("config", "workdir", "dry_run", "distributed", "help", "version")
_VALUES = {
  bool: "True or False",
  int: "a whole number",
  float: "a number",
  tuple: "numbers with commas between them",
}


def explain(argv: Sequence[str], error: Exception) -> str:
  """Says in one line why flags could not be parsed.

  Args:
    argv: the command line.
    error: what parsing it raised.
  """
  if isinstance(error, UsageError):
    return str(error)
  if isinstance(error, flags.UnrecognizedFlagError):
    return f"unknown flag --{error.flagname}{_flag(argv, error.flagname)}"
  config_file = named(argv)
  if config_file is not None:
    try:
      config = load(config_file)
    except UsageError as e:
      return str(e)
    keys = configuration.flat(config)
    for name in _overrides(argv):
      group = any(key.startswith(f"{name}.") for key in keys)
      if name not in keys and not group:
        return _unknown(name, config)
      value = re.search(rf"--config\.{name}=(.*?): ", str(error), re.DOTALL)
      if value:
        return _wrong(name, value[1], keys)
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[-1] if lines else type(error).__name__


def load(given: str) -> ml_collections.ConfigDict:
  """Reads a config as `--config` names it.

  Args:
    given: as `configuration.resolve` takes it.

  Raises:
    UsageError: there is no such file, or it gives no config; with its line.
  """
  file, *argument = configuration.resolve(given).split(":", 1)
  path = pathlib.Path(file)
  if not path.is_file():
    raise UsageError(
      f"--config={given}: there is no file {file!r}"
      + _other_file(path, argument)
    )
  try:
    get_config = runpy.run_path(str(path)).get("get_config")
    if not callable(get_config):
      raise UsageError(
        f"{path} has no function get_config, which returns the config; see"
        f" {configuration.CONFIGS}"
      )
    config = get_config(*argument)
  except UsageError:
    raise
  except SyntaxError as e:
    raise UsageError(f"{e.filename}, line {e.lineno}: {e.msg}") from None
  except Exception as e:
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(e.__traceback__)
      if frame.filename == str(path)
    ]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    reason = (str(e).splitlines() or [""])[0]
    raise UsageError(f"{where}: {type(e).__name__}: {reason}") from None
  if not isinstance(config, ml_collections.ConfigDict) or "job" not in config:
    raise UsageError(
      f"{path}: get_config must return a ConfigDict with a key job; see"
      f" {configuration.CONFIGS}"
    )
  return config


def written_out(arguments: Sequence[str]) -> list[str]:
  """Returns a command line's arguments without what is short for others.

  `--config=layers` stands for the packaged file of that name,
  `--config.data=tiles.csv` for the key that names the source.

  Args:
    arguments: without the program's name.
  """
  texts: list[str] = []
  for argument in arguments:
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config") and equals:
      argument = f"{name}={configuration.resolve(value)}"
    elif texts and texts[-1] in ("--config", "-config"):
      argument = configuration.resolve(argument)
    elif name == "--config.data" and equals:
      argument = f"--config.data.source={value}"
    texts.append(argument)
  return texts


def named(argv: Sequence[str]) -> str | None:
  """Returns the value of --config, None where it is not there."""
  for i, argument in enumerate(argv):
    match = re.fullmatch(r"--?config(=(.*))?", argument, re.DOTALL)
    if match:
      return match[2] if match[1] else "".join(argv[i + 1 : i + 2])
  return None


def _overrides(argv: Sequence[str]) -> list[str]:
  """Returns the key of every --config.key=value."""
  matches = [re.match(r"--?(?:no)?config\.([^=]+)", text) for text in argv]
  return [match[1] for match in matches if match]


def _other_file(path: pathlib.Path, argument: Sequence[str]) -> str:
  """Says which file may have been meant in place of one that is not there."""
  rest = "".join(f":{a}" for a in argument)
  beside = {f.stem: f for f in sorted(path.parent.glob("*.py"))}
  ours = configuration.packaged()
  for near in difflib.get_close_matches(path.stem, {**ours, **beside}, n=1):
    # Whoever gave a path means a file.
    is_name = len(path.parts) < 2 and near in ours
    meant = near if is_name else beside.get(near, near)
    return f"; did you mean --config={meant}{rest}?"
  return (
    f"; the program's own are {', '.join(ours)}, as in --config=layers:resnet50"
  )


def _flag(argv: Sequence[str], name: str) -> str:
  """Says which flag, or which key of the config, may have been meant."""
  near = difflib.get_close_matches(name, _FLAGS, n=1)
  if near or name in _WORKDIR_CALLED:
    return f"; did you mean --{near[0] if near else 'workdir'}?"
  config_file = named(argv)
  if config_file is not None:
    try:
      keys = configuration.flat(load(config_file))
    except UsageError:
      return ""
    meant = _meant(name, keys) or _near(name, keys)
    if meant:
      return f"; did you mean --config.{meant}?"
  return "; a key of the config is given as --config.key=value"


def _unknown(key: str, config: ml_collections.ConfigDict) -> str:
  """Says of a key that the config has not which one may have been meant."""
  message = f"the config has no key {key}"
  if key in _WORKDIR_CALLED:
    return f"{message}; did you mean the flag --workdir?"
  keys = configuration.flat(config)
  if (new := configuration.RENAMED.get(key)) in keys:
    return f"{message} any more: it is called {new} now"
  others = {
    job: configuration.flat(load(str(configuration.packaged()[job])))
    for job in jobs.JOBS
    if job != config.job
  }
  elsewhere = sorted({k for of_job in others.values() for k in of_job})
  for of_this, other in (
    ("", key if key in elsewhere else ""),
    (_meant(key, keys), _meant(key, elsewhere)),
    (_near(key, keys), _near(key, elsewhere)),
  ):
    if of_this:
      return f"{message}; did you mean {of_this}?"
    if other:
      having = [job for job, of_job in others.items() if other in of_job]
      it = "it" if other == key else other
      return (
        f"{message}: {it} is a key of {errors.listed(having)}, not of"
        f" {config.job}"
      )
  return f"{message}; jaxtransfer --help {config.job} lists its keys"


def _meant(key: str, known: Iterable[str]) -> str:
  """Returns what a key of another tool, or half of one of ours, stands for."""
  known = list(known)
  *groups, last = key.lower().replace("-", "_").split(".")
  groups = [_GROUP_CALLED.get(group, group) for group in groups]
  ours = ".".join([*groups, last])
  for name in (configuration.RENAMED.get(ours), ours):
    if name in known:
      return name
  for name in (last, _GROUP_CALLED.get(last, last)):
    for called in _KEYS_CALLED.get(name, ()):
      if called in known:
        return called
  ending = [k for k in known if k.rpartition(".")[2] == last]
  same = [k for k in ending if groups and k.startswith(f"{groups[-1]}.")]
  return " or ".join(same or ending)


def _near(key: str, known: Iterable[str]) -> str:
  """Returns the key that is spelled most like one, if any is much."""
  known = list(known)
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
  if not near:
    # Only what stands after the last dot may be misspelled, in another group.
    lasts = {k.rpartition(".")[2]: k for k in known}
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(last, lasts, n=1, cutoff=0.8)
    near = [lasts[name] for name in near]
  return near[0] if near else ""


def _wrong(key: str, value: str, keys: Mapping[str, Any]) -> str:
  """Says what kind of value a key takes, in place of one it does not take."""
  if value.startswith("--"):
    return f"--config.{key} has no value; give it as --config.{key}=VALUE"
  message = f"config.{key} is {value!r}"
  if key not in keys:
    inner = [k for k in keys if k.startswith(f"{key}.")]
    several = [*_KEYS_CALLED.get(key, ()), f"{key}.name"]
    meant = next((k for k in several if k in inner), "")
    near = f"; did you mean config.{meant}?" if meant else ""
    return f"{message}, but it is a group of keys ({', '.join(inner)}){near}"
  kind = _VALUES.get(type(keys[key]), "text")
  return (
    f"{message}; it must be {kind}, e.g. {configuration.written(keys[key])}"
  )
