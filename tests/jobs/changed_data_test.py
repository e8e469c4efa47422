"""Labels corrected between two starts of a run: refused in every job."""

import csv

import pytest

from jaxtransfer import errors, inference, workdir
from jaxtransfer.jobs import finetune, layers, truncate
from jaxtransfer.measure import probes
from jaxtransfer.networks import tensors, zoo
from jaxtransfer.training import loop
from jaxtransfer.weights import loading
from tests.jobs import configs


class Stopped(Exception):
  """The run was ended after its splits were saved."""


@pytest.fixture
def source(tmp_path):
  (tmp_path / "tiles").mkdir()
  return configs.write_tiles(tmp_path / "tiles", side=16, images=40)


def _correct(manifest, row, label):
  """Gives one row another label, as a pathologist would."""
  with open(manifest, newline="") as f:
    rows = list(csv.reader(f))
  rows[row + 1][1] = label
  with open(manifest, "w", newline="") as f:
    csv.writer(f).writerows(rows)


def _stop(*_, **__):
  raise Stopped


def _run(job, config, path):
  with workdir.claim(path, config.to_dict(), "", shared=True) as claimed:
    return job.run(config, claimed)


def _layers(source, folder):
  network = zoo.build("resnet18", until="stem")
  tensors.load(network, tensors.random(network, 77))
  loading.export(network, folder / "mine.safetensors")
  config = configs.load("layers", "resnet18")
  config.update_from_flattened_dict(
    {
      "seeds": 1,
      "resamples": 20,
      "strengths": (1.0,),
      "probes": "nearest_mean",
      "data.source": str(source),
      "data.image_size": 16,
      "network.until": "stem",
      "network.weights": str(folder / "mine.safetensors"),
    }
  )
  return config


@pytest.mark.parametrize(
  ("job", "network", "changes"),
  [
    (finetune, "resnet18", {"network.until": "stem"}),
    (finetune, "resnet18", {"network.until": "stem", "multilabel": True}),
    (truncate, "cbr_tiny", {"small": ""}),
    (truncate, "cbr_tiny", {"small": "", "folds": 3}),
  ],
)
def test_a_training_does_not_go_on_with_other_labels(
  source, tmp_path, monkeypatch, job, network, changes
):
  """One corrected label is named with both, whichever way rows are divided;
  put back, the run goes on."""
  config = configs.load(job.__name__.split(".")[-1], network)
  settings = {
    "batch_size": 16,
    "resamples": 20,
    "data.source": str(source),
    "data.image_size": 16,
    "network.weights": "",
  }
  config.update_from_flattened_dict({**settings, **changes})
  if config.multilabel:
    for row in range(40):
      _correct(source, row, ("old;stripes", "?old", "-", "stripes")[row % 4])
  before = source.read_text()
  label = list(csv.DictReader(source.open()))[7]["label"]
  monkeypatch.setattr(loop, "fit", _stop)
  with pytest.raises(Stopped):
    _run(job, config, tmp_path / "run")
  _correct(source, 7, "old" if config.multilabel else "class 0")
  with pytest.raises(errors.UsageError, match="row 8, 7.png") as caught:
    _run(job, config, tmp_path / "run")
  assert f"label {label!r} there" in str(caught.value)
  source.write_text(before)
  with pytest.raises(Stopped):
    _run(job, config, tmp_path / "run")


def test_probes_are_not_those_of_other_labels(source, tmp_path, monkeypatch):
  """Refused; and where splits.json was removed, measured anew from the same
  features, which do not depend on labels."""
  config, path = _layers(source, tmp_path), tmp_path / "run"
  fitted = []
  fit = probes.fit_probe
  monkeypatch.setattr(
    probes, "fit_probe", lambda *a: fitted.append(a) or fit(*a)
  )
  with monkeypatch.context() as patched:
    patched.setattr(inference, "measure_cuts", _stop)
    with pytest.raises(Stopped):
      _run(layers, config, path)
    # Both classes stay; those of two rows are exchanged.
    _correct(source, 0, "class 1")
    _correct(source, 1, "class 0")
    with pytest.raises(errors.UsageError, match="2 rows differ in all"):
      _run(layers, config, path)
    (path / "splits.json").unlink()
    with pytest.raises(Stopped):
      _run(layers, config, path)
  assert len(fitted) == 2
  assert len(list((path / "features").glob("probes-*"))) == 2
  assert len(list((path / "features").glob("random-0-*"))) == 1
