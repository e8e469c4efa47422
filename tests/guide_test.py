"""What the program says of itself, without a run and, but for models, JAX."""

import importlib
import inspect
import subprocess
import sys

import pytest

from jaxtransfer import configuration, errors, guide, jobs, main
from jaxtransfer.networks import zoo
from jaxtransfer.weights import catalog
from tests.jobs import configs


def test_every_job_of_the_table_has_what_belongs_to_it():
  """A line in the table and files of its name: no other place lists jobs. The
  README and the page of docs say of it what `--help` says."""
  readme = " ".join((configs.ROOT / "README.md").read_text().split())
  for name, job in jobs.JOBS.items():
    module = importlib.import_module(job.module)
    assert list(inspect.signature(module.run).parameters) == [
      "config",
      "workdir",
    ]
    assert callable(
      importlib.import_module(f"jaxtransfer.report.{name}").content
    )
    assert configs.load(name).job == name
    assert (configs.ROOT / "docs" / f"{name}.md").exists()
    assert job.question in readme, name
  files = {
    path.stem for path in (configs.ROOT / "jaxtransfer/jobs").glob("*.py")
  }
  assert files == {*jobs.JOBS, "__init__"}


def test_help_has_every_job_and_every_key_with_its_words(monkeypatch):
  """No key is without a word of what it is."""
  monkeypatch.setenv("COLUMNS", "80")
  told = guide.answer(["--help"])
  for name, job in jobs.JOBS.items():
    assert job.question in " ".join(told.split())
    for key, value, words in guide._keys(name):
      assert words, key
      assert f"  {key}={value}" in told
      assert words in " ".join(told.split()), key
  assert max(map(len, told.splitlines())) <= 80
  assert main._WORKDIR.name in told and "quickstart" in told


def test_help_of_one_config_is_its_own(tmp_path):
  """By name, by path or as the config of a run; of a derived one the values
  that it changes, with the words of what it is made from."""
  for arguments in (
    ["--help", "quickstart"],
    ["--config=quickstart", "--workdir=q", "--help"],
    ["-h", str(configs.ROOT / "configs" / "quickstart.py")],
  ):
    told = guide.answer(arguments)
    assert told.startswith("The main job on drawn tissue")
    assert "taps=layers " in told and '"layers" = every one' in told
    assert "epochs=" not in told
  with pytest.raises(errors.UsageError, match="did you mean --config=layers"):
    guide.answer(["--help", "layer"])


def test_version_is_that_of_the_package():
  said = guide.answer(["--version"])
  assert said.startswith("jaxtransfer ") and "Python" in said


def test_models_and_weights_list_what_there_is():
  """Parameters and multiply-accumulates are those that `list_layers` counts."""
  told = guide.answer(["models"])
  for name in zoo.list_models():
    last = zoo.list_layers(name)[-1]
    (line,) = (x for x in told.splitlines() if x.startswith(f"{name} "))
    assert f"{last.params / 1e6:.2f} M" in line
    assert f"{last.macs / 1e9:.2f} G" in line
  told = guide.answer(["models", "resnet18"])
  assert [layer.name for layer in zoo.list_layers("resnet18")] == [
    line.split()[0] for line in told.splitlines()[4:]
  ]
  told = " ".join(guide.answer(["weights"]).split())
  for row in catalog.rows():
    assert f"{row.name}: {row.network}" in told
    assert row.where in told and row.licence in told
  kimianet = guide.answer(["weights", "densenet121"]).split("kimianet: ")[1]
  assert "digest    not known" in kimianet.split("\n\n")[0]
  assert "resnet" not in guide.answer(["weights", "densenet161"])


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["models", "resnt50"], "did you mean 'resnet50'"),
    (["weights", "resnt50"], "did you mean 'resnet50'"),
    (["weights", "resnet50", "x"], "unknown argument 'x'"),
  ],
)
def test_what_there_is_not_is_a_mistake(arguments, says):
  with pytest.raises(errors.UsageError, match=says):
    guide.answer(arguments)


def test_a_run_is_nothing_to_tell():
  assert guide.answer([]) is None
  assert guide.answer(["--config=layers", "--workdir=models"]) is None


def test_help_is_told_without_jax():
  """It takes a moment, where importing JAX takes seconds."""
  code = (
    "import sys\n"
    "from jaxtransfer import main\n"
    "sys.argv = ['jaxtransfer', '--help']\n"
    "main.run()\n"
    "assert not {'jax', 'numpy'} & set(sys.modules)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert str(configuration.packaged().keys()) and "Jobs, what" in done.stdout
