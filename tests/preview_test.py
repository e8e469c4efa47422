"""What a dry run tells, and that it leaves nothing."""

import importlib
import re

import numpy as np
import pytest

from jaxtransfer import configuration, errors, jobs, preview, workdir
from tests.jobs import configs

# What makes a run of each job small, and is told of it.
SMALL = {
  "layers": (
    "resnet18",
    {
      "network.weights": "cifar10-resnet18",
      "network.until": "layer1",
      "probes": "nearest_mean",
      "seeds": 2,
    },
    ["72 images through 3 networks", "2 taps x 3 networks x 1 probes"],
  ),
  "finetune": (
    "cbr_tiny",
    {"network.weights": "", "network.until": "block1", "epochs": 3},
    ["1 training of 6 steps, 3 epochs"],
  ),
  "truncate": (
    "cbr_tiny",
    {
      "network.weights": "",
      "taps": "block1,block2",
      "methods": "ttl,lwft",
      "small": "cbr_tiny",
      "seeds": 2,
      "epochs": 3,
    },
    # Three cuts of ttl, two of lwft, a small network; and the layers beside.
    ["12 to ", " trainings of 3 epochs", "2 seeds of each"],
  ),
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
  """72 images of three classes and 18 patients."""
  tiles = tmp_path_factory.mktemp("tiles")
  return configs.write_tiles(tiles, images=72, classes=3)


def _config(job, manifest):
  network, changes, _ = SMALL[job]
  config = configs.load(job, network)
  changes = {
    "data.source": str(manifest),
    "data.image_size": 16,
    "batch_size": 16,
    **changes,
  }
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize("job", SMALL)
def test_a_dry_run_tells_what_a_run_would_do_and_writes_nothing(
  job, manifest, tmp_path, capsys
):
  """Every key as it will be, how many images of each class and of how many
  patients are in each split, the work in numbers, time and disk; there is no
  workdir afterwards, and the folder of the images is as it was."""
  config = _config(job, manifest)
  before = sorted(manifest.parent.iterdir())
  looked = workdir.look(tmp_path / "run", config.to_dict())
  module = importlib.import_module(jobs.find(job).module)
  assert module.run(config, looked) == 0
  assert not list(tmp_path.iterdir())
  assert sorted(manifest.parent.iterdir()) == before
  told = capsys.readouterr().out
  for key, value in configuration.flat(config).items():
    assert f"  {key}={configuration.written(value)}\n" in told
  counts = {
    name: [int(n) for n in re.search(rf"{name} +([\d ]+)\n", told)[1].split()]
    for name in ("class 0", "class 1", "class 2", "images", "groups")
  }
  assert sum(counts["images"]) == 72 and sum(counts["groups"]) == 18
  parts = np.array([counts[f"class {c}"] for c in range(3)])
  assert parts.sum(0).tolist() == counts["images"]
  assert (parts.sum(1) == 24).all()
  for words in SMALL[job][2]:
    assert words in told
  assert re.search(r"Time: (about|between) .* \w+s?\. Of ", told)
  assert re.search(r"Disk: about [\d.]+ [kM]B in ", told)


def test_mistakes_are_those_of_the_run(manifest, tmp_path):
  """Up to the end of its checks a dry run is the run."""
  config = _config("finetune", manifest)
  config.batch_size = 16
  config.accumulate = 5
  module = importlib.import_module(jobs.find("finetune").module)
  said = []
  for take in (
    lambda: workdir.look(tmp_path / "dry", config.to_dict()),
    lambda: workdir.claim(tmp_path / "run", config.to_dict(), "").__enter__(),
  ):
    with pytest.raises(errors.UsageError) as caught:
      module.run(config, take())
    said.append(str(caught.value))
  assert said[0] == said[1] and "accumulate" in said[0]


def test_a_directory_is_refused_as_in_the_run(tmp_path):
  """In use, of another config, or one that cannot be made."""
  config, other = {"job": "layers", "seed": 0}, {"job": "layers", "seed": 1}
  with workdir.claim(tmp_path / "run", config, "") as run:
    with pytest.raises(errors.UsageError, match="in use by process"):
      workdir.look(tmp_path / "run", config)
    run.begin("one")
  before = sorted(path.stat().st_mtime_ns for path in run.path.iterdir())
  assert workdir.look(run.path, config).dry
  with pytest.raises(errors.UsageError, match="seed: 0 there, 1 now"):
    workdir.look(run.path, other)
  after = sorted(path.stat().st_mtime_ns for path in run.path.iterdir())
  assert after == before
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UsageError, match="cannot be written"):
    workdir.look(tmp_path / "file" / "run", config)


class Counted:
  """Batches that are numbers."""

  def __init__(self, count):
    self._left = iter(range(count))
    self.count, self.closed = count, False

  def __len__(self):
    return self.count

  def __next__(self):
    return next(self._left)

  def close(self):
    self.closed = True


def test_what_is_measured_is_a_few_batches_however_many_there_are():
  """Each is read once, the first computed once more to compile."""
  for count, read in ((1, 1), (3, 3), (1000, preview._BATCHES)):
    batches, computed = Counted(count), []
    speed = preview.measure(batches, computed.append)
    assert speed.batches == read and batches.closed
    assert computed == [0, *range(read)]
    assert 0 <= speed.reading and 0 <= speed.compiling


def test_time_is_that_of_the_slower_or_of_both():
  """Batches are read while those before are computed: at best the shorter of
  the two costs nothing, at worst each waits for the other."""
  speed = preview.Speed(5, 2.0, preview.Time(1.0, 3.0), 10.0)
  assert speed.of(10) == preview.Time(20.0, 50.0)
  assert speed.of(10, 4, 4) == preview.Time(40.0, 140.0)
  assert str(speed.of(10) + speed.of(1)) == "between 22 seconds and 55 seconds"
