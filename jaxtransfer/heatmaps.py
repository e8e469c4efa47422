"""Slides with what is said of their tiles: for the page and for QuPath."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from jaxtransfer import attention, files
from jaxtransfer.data import bags, slide_sets, slides
from jaxtransfer.errors import UsageError
from jaxtransfer.report import tile_scores
from jaxtransfer.report.tile_scores import View

# Sides in pixels: of a slide's picture, of a tile's.
_PICTURE, _TILE = 1024, 96
# Tiles of the highest and of the lowest attention that are shown.
_EXTREMES = 8
# Of more classes, the probability of what is said and what is true is shown.
_CLASSES = 6


class Slides:
  """Where the files of slides are, as far as anybody says.

  Args:
    config: `config.data`: slides, a folder or a manifest, or "" for what source
      names; and max_pixels.

  Raises:
    UsageError: slides are named that cannot be found.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self.max_pixels = config.max_pixels
    self.paths: dict[str, pathlib.Path] = {}
    self.mpp: dict[str, float | None] = {}
    asked = ml_collections.ConfigDict(
      {
        "source": config.slides or config.source,
        "max_pixels": config.max_pixels,
      }
    )
    try:
      found = slide_sets.open_slides(asked)
    except UsageError:
      # A table of labels need not say where slides are.
      if config.slides:
        raise
      return
    # As tables name them, with a suffix or without.
    for name, path, mpp in zip(
      found.names, found.paths, found.mpp, strict=True
    ):
      self.paths[bags.bare(name)] = path
      self.mpp[bags.bare(name)] = mpp

  def missing(self, names: Sequence[str]) -> list[str]:
    """Returns those of some slides whose files are not known."""
    return [name for name in names if name not in self.paths]

  def open(self, name: str) -> slides.Slide | None:
    """Returns a slide, None where it is not known or cannot be opened."""
    if name in self.paths:
      with contextlib.suppress(slides.SlideError):
        return slides.open_slide(
          self.paths[name], self.mpp[name], self.max_pixels
        )
    return None


def choose(
  labels: np.ndarray, probabilities: np.ndarray, most: int
) -> np.ndarray:
  """Chooses slides to look at: errors, and right ones of every class.

  Args:
    labels: (N,) int, the true classes; -1 where not known.
    probabilities: (N, C).
    most: how many.

  Returns:
    Indices: first the most confident errors, half of the room at most; then of
    every class that is said the most confident in turn.
  """
  called, sure = probabilities.argmax(1), probabilities.max(1)
  order = np.argsort(-sure, kind="stable")
  wrong = [i for i in order if labels[i] >= 0 and called[i] != labels[i]]
  chosen = wrong[: most // 2]
  turns: dict[int, int] = {}
  keyed = []
  for i in order:
    if i not in chosen:
      turns[called[i]] = turn = turns.get(called[i], -1) + 1
      keyed.append((turn, -called[i], i))
  chosen += [i for *_, i in sorted(keyed)][: most - len(chosen)]
  return np.array(chosen, np.int64)


def views(
  directory: pathlib.Path,
  network: str,
  names: Sequence[str],
  of_slides: Slides,
) -> Iterator[View]:
  """Yields slides with their scores, and writes these for other programs.

  Args:
    directory: the workdir, with `attention/<network>/`; `heatmaps/` is written,
      a CSV and a GeoJSON file for each slide.
    network: what the encoder, with its pooling, is called.
    names: of the slides.
    of_slides: where they are.
  """
  for name in names:
    tiles = attention.read(attention.path_of(directory, network, name))
    found = _view(name, tiles, of_slides)
    if found is not None:
      place = directory / "heatmaps" / files.safe_name(name)
      tile_scores.write_csv(f"{place}.csv", found)
      tile_scores.write_geojson(f"{place}.geojson", found)
      yield found


def _view(name: str, tiles: attention.Tiles, of_slides: Slides) -> View | None:
  """Returns a slide's view; None where nobody says where its tiles are."""
  about = tiles.attributes
  coords, extent = tiles.coords, about.get("extent")
  if coords is None or not len(coords):
    return None
  slide = of_slides.open(name)
  with contextlib.ExitStack() as opened:
    if slide is not None:
      opened.enter_context(slide)
    mpp: float | None = about["features"].get("level0_mpp")
    if not mpp and slide is not None:
      mpp = slide.mpp
    if about.get("unit") == "um":
      if not mpp:
        return None
      coords = np.rint(np.asarray(coords, np.float64) / mpp)
      extent = extent and extent / mpp
    if not extent:
      return None
    coords = np.asarray(coords, np.int64)
    picture, scale = None, 1.0
    most: list[tuple[int, np.ndarray]] = []
    least: list[tuple[int, np.ndarray]] = []
    if slide is not None:
      picture = slide.thumbnail(_PICTURE)
      scale = slide.width / picture.shape[1]
      for chosen, into in zip(
        tile_scores.extremes(tiles.attention, _EXTREMES),
        (most, least),
        strict=True,
      ):
        for i in chosen.tolist():
          with contextlib.suppress(slides.SlideError):
            x, y = coords[i].tolist()
            into.append((i, slide.region(x, y, extent, _TILE)))
    return View(
      name=name,
      coords=coords,
      extent=float(extent),
      scores=_scores(tiles),
      picture=picture,
      scale=scale,
      mpp=mpp or None,
      facts=_facts(about),
      most=most,
      least=least,
    )


def _scores(tiles: attention.Tiles) -> dict[str, np.ndarray]:
  """Returns what is shown of tiles, by label."""
  classes = list(tiles.attributes["classes"])
  shown = range(len(classes))
  if len(classes) == 2:
    shown = [1]
  elif len(classes) > _CLASSES:
    said = int(np.argmax(tiles.attributes["probabilities"]))
    label = tiles.attributes.get("label")
    true = [classes.index(label)] if label in classes else []
    shown = list(dict.fromkeys([said, *true]))
  return {
    tile_scores.ATTENTION: tiles.attention,
    **{f"P({classes[c]})": tiles.probabilities[:, c] for c in shown},
  }


def _facts(about: Mapping[str, Any]) -> dict[str, str | float]:
  said = int(np.argmax(about["probabilities"]))
  facts: dict[str, str | float] = {}
  if about.get("label"):
    facts["label"] = about["label"]
  facts["called"] = about["classes"][said]
  facts["probability"] = float(about["probabilities"][said])
  if about.get("group"):
    facts["group"] = about["group"]
  return facts
