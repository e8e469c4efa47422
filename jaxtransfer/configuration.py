"""The keys that every config shares, so that one learns them once."""

import math
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from jaxtransfer import errors

Values = Mapping[str, Any] | ml_collections.ConfigDict

# A clone keeps them at its top, where people look; this is a link to them.
CONFIGS = pathlib.Path(__file__).parent / "configs"

# What a key was called before -> what it is called now.
RENAMED = {"many_labels": "multilabel"}


def packaged() -> dict[str, pathlib.Path]:
  """Returns name -> file of the configs that come with the program."""
  return {path.stem: path for path in sorted(CONFIGS.glob("*.py"))}


def resolve(given: str) -> str:
  """Returns what `--config` says, with a file in the place of a bare name.

  Args:
    given: a path, or the name of a packaged config; after a colon what its
      get_config takes. Where there is a file of that name, it is meant.
  """
  name, colon, argument = given.partition(":")
  if pathlib.Path(name).is_file() or name not in packaged():
    return given
  return f"{packaged()[name]}{colon}{argument}"


def basics(job: str) -> ml_collections.ConfigDict:
  """Returns a config with the keys of every job that divides examples.

  Args:
    job: the job's name, one of `jaxtransfer.jobs.JOBS`.
  """
  config = ml_collections.ConfigDict()
  config.job = job
  config.seed = 0  # decides splits, order, random weights and resamples
  config.batch_size = 64  # images over all devices
  config.dtype = "float32"  # "bfloat16" on GPU and TPU; parameters stay float32
  config.parallel = "jit"  # "pmap" gives the same results

  config.data = ml_collections.ConfigDict()
  config.data.source = ""  # manifest.csv, a folder, tfds:<name>, synthetic:...
  config.data.max_failures = 0.01  # unreadable share of images that stops a run
  config.data.split_fractions = (0.6, 0.2, 0.2)  # train, val, test, by group
  config.data.few_shot = 0  # train images of each class; 0 = all
  return config


def shared(job: str, network: str) -> ml_collections.ConfigDict:
  """Returns a config with the keys of every job on images, and their defaults.

  Args:
    job: the job's name, one of `jaxtransfer.jobs.JOBS`.
    network: a name of `jaxtransfer.list_models()`.
  """
  config = basics(job)
  config.thumbnails = 12  # images of each kind on the page; 0 = none

  config.data.task = ""  # of a manifest with several; "" = the only one
  config.data.image_size = 224  # pixels: shorter side resized, centre cropped
  config.data.workers = 0  # decoding processes; 0 = threads of this process
  config.data.max_pixels = 100_000_000  # larger images are refused unopened
  config.data.near_duplicates = False  # also images that look the same
  config.data.tfds_dir = ""  # where TFDS keeps data sets; "" = its default

  config.network = ml_collections.ConfigDict()
  config.network.name = network  # what follows the colon; see `models`
  config.network.weights = "imagenet"  # a catalog name or a path; "" = random
  config.network.prefix = ""  # of its names in a file of several; "" = found
  config.network.until = ""  # deepest layer used; "" = the whole network
  return config


def optimisation(config: ml_collections.ConfigDict) -> None:
  """Adds the keys of every training, whatever it trains on.

  Args:
    config: as `basics` returns it; changed in place.

  Source: the defaults are those of Peng et al., arXiv 2106.05152v8.
  """
  config.epochs = 200  # at most
  config.patience = 0  # epochs without a better one that end it; 0 = any
  config.accumulate = 1  # parts of a batch, one after the other, for memory
  config.average = 0.0  # decay of averaged weights, e.g. 0.999; 0 = none
  config.resamples = 1000  # of the groups, for the intervals
  config.sensitivities = (0.9, 0.95)  # reached on validation, for thresholds
  config.positive = (
    ""  # class that is to be found; "" = of two the last, or all
  )
  config.prevalence = 0.0  # its share among the tested; 0 = not known
  config.log_steps = 50  # from line to line of metrics.jsonl
  config.checkpoint_steps = 500  # and after every epoch
  config.checkpoints = 2  # kept; each holds the best epoch's weights too

  config.optimiser = ml_collections.ConfigDict()
  config.optimiser.name = "adam"  # or adamw, sgd (Nesterov)
  config.optimiser.learning_rate = 1e-4  # of the head
  config.optimiser.momentum = 0.9  # of sgd
  config.optimiser.weight_decay = 0.0  # of kernels
  config.optimiser.clip_norm = 0.0  # largest gradient norm; 0 = any

  config.schedule = ml_collections.ConfigDict()
  config.schedule.name = "plateau"  # or constant, cosine, one_cycle
  config.schedule.warmup_epochs = 0.0  # of cosine
  config.schedule.factor = 0.5  # of plateau
  config.schedule.patience = 5  # of plateau, epochs
  config.schedule.floor = 1e-6  # of plateau: training ends below it

  config.loss = ml_collections.ConfigDict()
  config.loss.class_weights = "balanced"  # or "none"


def training(config: ml_collections.ConfigDict) -> None:
  """Adds the keys of every job that trains on images, and their defaults.

  Args:
    config: as `shared` returns it; changed in place.

  Source: the defaults are those of Peng et al., arXiv 2106.05152v8.
  """
  config.network.head = "gap"  # "flatten" = linear on the whole last map
  config.multilabel = False  # True: `a;b` and `a;?b`, see data/labels.py
  config.batch_norm = "train"  # or train_per_device, eval, frozen
  optimisation(config)
  config.optimiser.backbone = 1.0  # of the rest, as a share; LWFT: 0.1
  config.loss.label_smoothing = 0.0  # share of the label given to all

  config.augment = ml_collections.ConfigDict()
  config.augment.crop = 0.08  # smallest share of the area kept; 1 = no crop
  config.augment.flip_horizontal = True  # half of the images
  config.augment.flip_vertical = False  # half of the images
  config.augment.quarter_turns = False  # by 0, 90, 180 or 270 degrees
  config.augment.stain = 0.0  # of hematoxylin and eosin; e.g. 0.05
  config.augment.brightness = 0.0  # largest change of the factor
  config.augment.contrast = 0.0  # likewise
  config.augment.saturation = 0.0  # likewise
  config.augment.hue = 0.0  # share of the circle


def flat(config: Values, prefix: str = "") -> dict[str, Any]:
  """Returns {dotted key: value} of a config.

  Args:
    config: a mapping of values and mappings.
    prefix: stands before every key.
  """
  values: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      values |= flat(value, f"{prefix}{key}.")
    else:
      values[f"{prefix}{key}"] = value
  return values


def written(value: Any) -> str:
  """Returns a key's value as it is given on a command line."""
  if isinstance(value, tuple):
    return ",".join(f"{number:g}" for number in value)
  return str(value)


def check(
  config: ml_collections.ConfigDict, zero: Collection[str] = ()
) -> None:
  """Checks the keys that jobs have and use in the same way.

  Args:
    config: the whole config.
    zero: keys that may be 0 too, which means something of its own.

  Raises:
    UsageError: naming the key.
  """
  values = flat(config)
  for key, value in values.items():
    if RENAMED.get(key) in values:
      raise errors.UsageError(
        f"config.{key} is called config.{RENAMED[key]} now"
      )
    # Tuples are of numbers; the flags' parser takes anything for one.
    several = value if isinstance(value, tuple) else (value,)
    if (several is value and any(isinstance(x, str) for x in several)) or any(
      isinstance(x, float) and not math.isfinite(x) for x in several
    ):
      raise errors.UsageError(
        f"config.{key} is {value}; it must be"
        f" {'finite numbers' if several is value else 'a finite number'}"
      )
  if "dtype" in config:
    one_of("dtype", config.dtype, ("float32", "bfloat16"))
  # NumPy refuses a negative seed; JAX takes the lowest 32 bits of a larger one.
  if "seed" in config:
    errors.check_range("seed", config.seed, least=0, most=2**32 - 1)
  for key, bounds in _BOUNDS.items():
    if key in values and not (key in zero and values[key] == 0):
      errors.check_range(key, values[key], **bounds)
  if "epochs" in config:
    errors.check_range("epochs", config.epochs, least=1, most=100_000)


# A larger batch, side or number of epochs is a slip of the finger.
_BOUNDS: dict[str, dict[str, Any]] = {
  "batch_size": {"least": 1, "most": 65_536},
  "data.image_size": {
    "least": 8,
    "most": 8_192,
    "why": "a network's first layer looks at 7 x 7 pixels, and sees nothing in"
    " fewer",
  },
  "data.workers": {"least": 0, "most": 1_024},
  "data.max_failures": {"least": 0, "most": 1, "why": "it is a share"},
  "data.max_pixels": {"least": 1},
  "data.few_shot": {"least": 0},
  "thumbnails": {"least": 0, "most": 100},
}


def _value_of(config: Values, key: str) -> Any:
  """Returns the value of a key that may lie deeper, such as `data.workers`."""
  for part in key.split("."):
    config = config[part]
  return config


def positive(config: Values, *keys: str) -> None:
  """Checks that integer keys of a config are at least one.

  Raises:
    UsageError: naming the first key that is not.
  """
  for key in keys:
    value = _value_of(config, key)
    if value < 1:
      raise errors.UsageError(f"config.{key} is {value}; it must be positive")


def one_of(name: str, value: str, known: Mapping[str, Any] | tuple) -> None:
  """Checks that a key's value is one of those there are.

  Raises:
    UsageError: it is not.
  """
  if value not in known:
    raise errors.UsageError(
      f"config.{name} is {value!r}; it is one of {', '.join(known)}"
    )
