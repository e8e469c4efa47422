"""The import directions of the design, read from the source."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxtransfer"

# Room -> what of ours it may import besides itself.
ALLOWED = {
  "measure": set(),
  "networks": {"errors"},
  # Numbers reach pages as the types of results.json, and in no other way.
  "results": {"files", "measure"},
  "report": {"errors", "files", "results"},
  # Resamples are part of what is measured, and of a dataset's patients.
  "data": {"errors", "files", "measure", "progress"},
  "weights": {"errors", "files", "networks", "progress"},
  "training": {
    "data",
    "errors",
    "files",
    "inference",
    "measure",
    "networks",
    "parallel",
    "progress",
    "results",
    "signals",
  },
  "extraction": {
    "data",
    "errors",
    "files",
    "inference",
    "networks",
    "parallel",
    "progress",
    "units",
    "weights",
  },
  "predictions": {"data", "files", "measure", "report"},
  "jobs": {
    "applied",
    "configuration",
    "cuts",
    "data",
    "errors",
    "exports",
    "extraction",
    "features",
    "files",
    "heatmaps",
    "hosts",
    "inference",
    "measure",
    "networks",
    "parallel",
    "pooled",
    "predictions",
    "preview",
    "progress",
    "report",
    "results",
    "training",
    "trainings",
    "tuning",
    "units",
    "weights",
    "workdir",
  },
  "attention": {"data", "measure", "training"},
  "trainings": {
    "errors",
    "files",
    "hosts",
    "parallel",
    "progress",
    "training",
    "units",
    "workdir",
  },
  "pooled": {
    "attention",
    "data",
    "errors",
    "files",
    "measure",
    "networks",
    "parallel",
    "predictions",
    "progress",
    "results",
    "training",
    "trainings",
    "tuning",
    "units",
    "weights",
  },
  "tuning": {
    "data",
    "errors",
    "extraction",
    "files",
    "heatmaps",
    "networks",
    "parallel",
    "training",
    "weights",
  },
  "exports": {"data", "errors", "measure", "weights"},
  "heatmaps": {"attention", "data", "errors", "files", "report"},
}


def _imports(path: pathlib.Path) -> set[str]:
  """Returns the modules of ours that a file names, below `jaxtransfer.`."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    found |= {
      name.removeprefix("jaxtransfer.")
      for name in names
      if name.startswith("jaxtransfer.")
    }
  return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room):
  """Reading the imports themselves holds for every file, also a new one."""
  paths = [*(PACKAGE / room).rglob("*.py"), PACKAGE / f"{room}.py"]
  for path in filter(pathlib.Path.exists, paths):
    rooms = {name.split(".")[0] for name in _imports(path)} - {room}
    assert rooms <= ALLOWED[room], f"{path.name} imports {rooms}"


def test_no_job_imports_another():
  """A job is what a user runs; what two share belongs in another room."""
  for path in (PACKAGE / "jobs").glob("*.py"):
    jobs = {n for n in _imports(path) if n.startswith("jobs")}
    assert not jobs, f"{path.name} imports {jobs}"


def test_tensorflow_and_torch_are_never_imported():
  """Both are another framework's weight on every user's machine."""
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
      heads = {name.split(".")[0] for name in names}
      assert not heads & {"tensorflow", "torch", "torchvision"}, path
