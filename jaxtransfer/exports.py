"""Networks that finished runs handed over, to be used on something new."""

import dataclasses
import json
import pathlib
from typing import Any

from jaxtransfer import errors
from jaxtransfer.data import images, names, sources
from jaxtransfer.measure import evaluation, operating
from jaxtransfer.weights import loading

# Of the card that an export has, what a network cannot be used without.
_OF_IMAGES = (
  *("network", "until", "classes", "multilabel", "image_size", "resize"),
  "temperature",
)
_OF_SLIDES = ("bags", "encoder", "classes", "multilabel", "temperature")


@dataclasses.dataclass(frozen=True)
class Exported:
  """A network that a run handed over.

  Attributes:
    path: of its safetensors file.
    card: what its file says of it.
    run: the workdir of the run; None where only its export is there.
  """

  path: pathlib.Path
  card: dict[str, Any]
  run: pathlib.Path | None

  @property
  def of_slides(self) -> bool:
    """Whether it reads the features of slides' tiles, and not images."""
    return "bags" in self.card

  @property
  def called(self) -> str:
    """What it is called: its network, or the encoder that it reads."""
    return str(self.card["pooled" if self.of_slides else "network"])

  @property
  def thresholds(self) -> list[evaluation.Chosen]:
    """Those that the run chose on its validation split."""
    points = self.card.get("operating_points", {}).get("points", ())
    return [
      evaluation.Chosen(
        point["class"],
        point.get("name", point["rule"]),
        float("nan") if point["threshold"] is None else point["threshold"],
        operating.Rates(
          *(
            float("nan") if value is None else value
            for value in (point["val"][r] for r in operating.Rates._fields)
          )
        ),
      )
      for point in points
    ]

  def own(self, metric: str) -> float | None:
    """Returns what the run measured on its own test split."""
    return self.card.get("metrics", {}).get(f"test:{metric}")


def find(run: str) -> Exported:
  """Finds what a finished run handed over.

  Args:
    run: its workdir, the folder `export`, or the file in it.

  Raises:
    UsageError: there is none, or it cannot be used here.
  """
  if not run:
    raise errors.UsageError(
      "config.run is empty; give the workdir of a finished finetune, truncate"
      " or slides, or its export folder"
    )
  given = pathlib.Path(run).expanduser()
  if not given.exists():
    raise errors.UsageError(f"config.run: {run} does not exist")
  places = [given / "export" / "model.safetensors", given / "model.safetensors"]
  path = next((p for p in places if p.is_file()), given)
  if not path.is_file():
    raise errors.UsageError(f"config.run: {run} {_why_nothing(given)}")
  card = loading.read_card(path)
  needed = _OF_SLIDES if "bags" in card else _OF_IMAGES
  if missing := [key for key in needed if key not in card]:
    raise errors.UsageError(
      f"config.run: {path} says nothing of {', '.join(missing)}; it is no"
      " network that finetune, truncate or slides exported"
    )
  if "resize" in card and card["resize"] != images.resize_card(
    card["image_size"]
  ):
    raise errors.UsageError(
      f"config.run: {path} was trained on images resized otherwise"
      f" ({card['resize']}); this version cannot do it"
    )
  home = path.parent.parent
  return Exported(path, card, home if (home / "splits.json").exists() else None)


def _why_nothing(workdir: pathlib.Path) -> str:
  """Says why a folder holds no network."""
  if not (workdir / "config.json").exists():
    return "is no workdir of a finished run, and no export folder"
  if not (workdir / "results.json").exists():
    return "is not finished; run its command again first"
  text = (workdir / "config.json").read_text(encoding="utf-8")
  job = json.loads(text)["config"]["job"]
  return f"is of the job {job}, which hands over no network"


def met_before(exported: Exported, examples: sources.Examples) -> list[str]:
  """Notes examples and groups that the network was trained or chosen on.

  Args:
    exported: the network.
    examples: that it is used on.
  """
  if exported.run is None:
    return []
  text = (exported.run / "splits.json").read_text(encoding="utf-8")
  stored = json.loads(text)
  fold = exported.card.get("fold")
  fold = "" if fold is None else fold
  used = [
    row
    for split in (f"train{fold}", f"val{fold}")
    for row in stored.get(split, ())
  ]
  groups = (stored.get("columns") or {}).get("group")
  known = {stored["names"][row] for row in used}
  notes = []
  if both := [name for name in examples.names if name in known]:
    notes.append(
      f"{len(both):,} {examples.unit} have the name of one that the run"
      f" trained or validated on ({names.shown(both)}): where they are the"
      " same, scores flatter"
    )
  if groups and examples.groups is not None:
    of_run = {groups["values"][groups["rows"][row]] for row in used}
    if shared := sorted(set(examples.groups) & of_run):
      notes.append(
        f"{len(shared):,} groups have the name of one that the run trained or"
        f" validated on ({names.shown(shared)}): where they are the same"
        " patients, the scores flatter"
      )
  return notes
