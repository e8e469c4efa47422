"""What is said of a mistake in the command line, and what was meant."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from jaxtransfer import configuration, errors, jobs, mistakes
from tests.jobs import configs

CONFIGS = configs.ROOT / "configs"


def _said(monkeypatch, *arguments, config=None):
  """Parses a command line as the program does and explains why it cannot."""
  config = config or f"{CONFIGS}/truncate.py:resnet18"
  argv = ["jaxtransfer", f"--config={config}", *arguments]
  monkeypatch.setattr(sys, "argv", argv)
  # Where the file before this one still lies.
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  with pytest.raises(Exception) as raised:  # noqa: PT011
    values(argv)
    assert values.config.job
  said = mistakes.explain(argv, raised.value)
  assert said and "\n" not in said
  return said


@pytest.mark.parametrize(
  ("key", "meant"),
  [
    ("tolerence", "tolerance"),
    ("data.sourse", "data.source"),
    ("datasource", "data.source"),
    ("optimiser.lr", "optimiser.learning_rate"),
    ("lr", "optimiser.learning_rate"),
    ("optimizer.lr", "optimiser.learning_rate"),
    ("optimizer.learning_rate", "optimiser.learning_rate"),
    ("optimiser.learning-rate", "optimiser.learning_rate"),
    ("learning_rate", "optimiser.learning_rate"),
    ("optimizer", "optimiser.name"),
    ("optimizer.name", "optimiser.name"),
    ("wd", "optimiser.weight_decay"),
    ("bs", "batch_size"),
    ("num_workers", "data.workers"),
    ("data.num_workers", "data.workers"),
    ("dataset.image_size", "data.image_size"),
    ("image_size", "data.image_size"),
    ("model", "network.name"),
    ("arch", "network.name"),
    ("model.name", "network.name"),
    ("backbone", "network.name"),
    ("pretrained", "network.weights"),
    ("network.weight", "network.weights"),
    ("scheduler.name", "schedule.name"),
    ("optimiser.name.x", "optimiser.name"),
    ("output_dir", "the flag --workdir"),
  ],
)
def test_an_unknown_key_names_the_one_that_was_meant(monkeypatch, key, meant):
  """By its whole dotted path, whether misspelled, cut short, or called as other
  tools call it."""
  said = _said(monkeypatch, f"--config.{key}=1")
  assert said == f"the config has no key {key}; did you mean {meant}?"


@pytest.mark.parametrize(
  ("job", "key", "says"),
  [
    (
      "layers",
      "epochs",
      ": it is a key of finetune, slides and truncate, not of layers",
    ),
    ("layers", "halving", ": it is a key of truncate, not of layers"),
    ("layers", "halvin", ": halving is a key of truncate, not of layers"),
    ("layers", "lr", ": optimiser.learning_rate is a key of finetune, slides"),
    ("finetune", "folds", ": it is a key of slides and truncate, not of fi"),
    ("truncate", "train_from", ": it is a key of finetune, not of truncate"),
    ("finetune", "qqqq", "; jaxtransfer --help finetune lists its keys"),
  ],
)
def test_a_key_of_another_job_is_said_to_be_one(monkeypatch, job, key, says):
  config = f"{CONFIGS}/{job}.py:resnet18"
  said = _said(monkeypatch, f"--config.{key}=1", config=config)
  assert said.startswith(f"the config has no key {key}{says}")


def test_a_key_says_what_it_is_called_now(monkeypatch, tmp_path):
  """On the command line and in a config of the user's own; the key that there
  is now is no mistake."""
  (tmp_path / "mine.py").write_text(MINE)
  said = _said(
    monkeypatch,
    "--config.many_labels=True",
    config=tmp_path / "mine.py",
  )
  assert said == (
    "the config has no key many_labels any more: it is called multilabel now"
  )
  said = _said(monkeypatch, "--many_labels=1", config=tmp_path / "mine.py")
  assert said.endswith("did you mean --config.multilabel?")
  config = mistakes.load(str(tmp_path / "mine.py"))
  configuration.check(config)
  config.many_labels = True
  with pytest.raises(errors.UsageError, match="is called config.multilabel no"):
    configuration.check(config)


# A config of the user's own.
MINE = """
from jaxtransfer import configuration

def get_config():
  config = configuration.shared("finetune", "resnet18")
  configuration.training(config)
  return config
"""


def test_a_file_is_meant_before_a_packaged_config(monkeypatch, tmp_path):
  """`layers` is the program's own wherever one stands, but a file of that name
  is what its owner means."""
  monkeypatch.chdir(tmp_path)
  assert mistakes.load("layers:resnet34").network.name == "resnet34"
  for name in ("layers", "layers.py"):
    (tmp_path / name).write_text(MINE)
    assert mistakes.load(name).job == "finetune"
  assert mistakes.load("quickstart").job == "layers"


def test_short_forms_are_written_out_whatever_their_shape(monkeypatch):
  monkeypatch.chdir(configs.ROOT)
  path = f"{configuration.CONFIGS / 'layers.py'}:resnet18"
  for short in (["--config=layers:resnet18"], ["-config", "layers:resnet18"]):
    *_, last = mistakes.written_out([*short, "--config.data=layers"])[:-1]
    assert last.removeprefix("--config=") == path
  kept = ["--config=configs/layers.py", "--config.data.source=x", "layers"]
  assert mistakes.written_out(kept) == kept
  assert mistakes.written_out(["--config.data=x"]) == [kept[1]]


def test_names_of_other_tools_stand_for_keys_that_there_are():
  """A renamed key must not leave advice behind that does not hold."""
  of_jobs = [set(_flat(job)) for job in jobs.JOBS]
  assert set(mistakes._CALLED) <= set().union(*of_jobs)
  called = {key: names.split() for key, names in mistakes._CALLED.items()}
  for keys in of_jobs:
    # In a job a name stands for one key, and never for another that it has.
    names = [n for key in keys & set(called) for n in called[key]]
    assert len(names) == len(set(names)) and not set(names) & keys


def _flat(name):
  return mistakes.configuration.flat(configs.load(name))


@pytest.mark.parametrize(
  ("argument", "says"),
  [
    ("--config.epochs=many", "config.epochs is 'many'; it must be a whole num"),
    ("--config.seeds=1.5", "config.seeds is '1.5'; it must be a whole number"),
    ("--config.tolerance=x", "config.tolerance is 'x'; it must be a number"),
    ("--config.multilabel=maybe", "'maybe'; it must be True or False"),
    ("--config.optimiser=adam", "a group of keys (optimiser."),
    ("--config.network=resnet50", "did you mean config.network.name?"),
    ("--config.epochs", "Missing value for flag --config.epochs"),
    ("--epochs=5", "unknown flag --epochs; did you mean --config.epochs?"),
    ("--lr=1", "did you mean --config.optimiser.learning_rate?"),
    ("--wrkdir=x", "unknown flag --wrkdir; did you mean --workdir?"),
    ("--output_dir=x", "did you mean --workdir?"),
  ],
)
def test_a_wrong_value_or_flag_says_what_is_right(monkeypatch, argument, says):
  """The key, the value and what the key takes."""
  assert says in _said(monkeypatch, argument)


def test_a_value_that_was_forgotten_is_not_the_next_flag(monkeypatch):
  said = _said(monkeypatch, "--config.epochs", "--workdir=x")
  assert said.startswith("--config.epochs has no value")


@pytest.mark.parametrize(
  ("config", "says"),
  [
    ("layer", "did you mean --config=layers?"),
    ("layer:resnet50", "did you mean --config=layers:resnet50?"),
    ("layers.py", "did you mean --config=layers?"),
    ("configs/layer.py", "did you mean --config=configs/layers.py?"),
    ("elsewhere/layers.py", "did you mean --config=layers?"),
    ("resnet50", f"own are {', '.join(configuration.packaged())}, as in"),
    ("configs", "as in --config=layers:resnet50"),
    ("", "there is no file ''"),
    ("/no/such.py", "there is no file '/no/such.py'"),
  ],
)
def test_a_config_that_is_not_there_names_those_that_are(
  monkeypatch, config, says
):
  monkeypatch.chdir(configs.ROOT)
  if not config:
    with pytest.raises(errors.UsageError, match=says):
      mistakes.load(config)
    return
  assert says in _said(monkeypatch, config=config)


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("def get_config(:\n", "mine.py, line 1: "),
    ("x = 1\n", "mine.py has no function get_config"),
    ("get_config = 1\n", "mine.py has no function get_config"),
    ("def get_config():\n  pass\n", "must return a ConfigDict"),
    ("def get_config():\n  return {'job': 'layers'}\n", "return a ConfigDict"),
    ("def get_config():\n\n  return 1 / 0\n", "mine.py, line 3: ZeroDivision"),
    ("import nothing_of_this_name\n", "mine.py, line 1: ModuleNotFoundError"),
    ("raise KeyError('a\\nb')\n", "mine.py, line 1: KeyError"),
  ],
)
def test_a_config_with_a_mistake_names_its_line(
  monkeypatch, tmp_path, text, says
):
  """Whatever the user's own file raises."""
  (tmp_path / "mine.py").write_text(text)
  assert says in _said(monkeypatch, config=tmp_path / "mine.py")


def test_a_config_without_an_argument_is_given_none(monkeypatch, tmp_path):
  text = "def get_config():\n  return {}\n"
  (tmp_path / "mine.py").write_text(text)
  said = _said(monkeypatch, config=f"{tmp_path / 'mine.py'}:resnet18")
  assert "mine.py: TypeError" in said and "0 positional arguments" in said
