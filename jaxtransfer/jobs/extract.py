"""Tiles of slides, or images, through networks, into feature files.

Source: truncating encoders of whole-slide tiles is HistoTransfer (Sharma et
  al., arXiv 2106.07068); the layout of the files is TRIDENT's and CLAM's, or
  STAMP's.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from jaxtransfer import (
  configuration,
  errors,
  files,
  parallel,
  preview,
  results,
)
from jaxtransfer import workdir as workdirs
from jaxtransfer.data import names as naming
from jaxtransfer.data import tiles
from jaxtransfer.data.slides import SlideError
from jaxtransfer.extraction import encoders, passes, store
from jaxtransfer.report import gallery, page, sentences

FAILURES = ("slide", "x", "y", "name", "reason")
SLIDES = ("slide", "label", "group", "tiles", "dropped", "seconds", "reason")


def run(config: ml_collections.ConfigDict, workdir: workdirs.Workdir) -> int:
  """Runs the job.

  Args:
    config: as configs/extract.py makes it.
    workdir: a claimed directory; what is there already is not done again.

  Returns:
    The exit code: 0, or 1 where slides or tiles could not be read.

  Raises:
    UsageError: the config, the source, the coordinates or the weights cannot be
      used, or files of other settings are there.
    RunError: a reading process has ended.
  """
  check(config)
  of = tiles.open_tiles(config.data, config.coords, config.bag)
  if config.layout == "stamp" and of.what != "slides":
    raise errors.UsageError(
      "config.layout is 'stamp', whose coordinates are micrometres on a slide;"
      " images have none: leave it out"
    )
  networks = encoders.open_encoders(
    config.networks or config.network.name,
    config.taps,
    weights=config.network.weights,
    prefix=config.network.prefix,
    until=config.network.until,
    seed=config.seed,
    dtype=config.dtype,
  )
  for encoder in networks:
    encoder.network.check_size(of.size)
  devices = parallel.Devices(config.parallel)
  extraction = passes.Extraction(
    of,
    networks,
    devices,
    store.Settings(
      batch_size=config.batch_size,
      workers=config.data.workers,
      max_failures=config.data.max_failures,
      dtype=config.features_dtype,
      layout=config.layout,
    ),
    workdir.path,
  )
  notes = [*of.notes, *(note for e in networks for note in e.source.notes)]
  missing = extraction.store.look()
  if workdir.dry:
    return _preview(config, extraction, devices, workdir.path, notes)
  if workdir.finished and not _begin_again(extraction, missing, workdir):
    print(f"{workdir.path} is finished; see {workdir.path}/report.html")
    return workdir.report_failures()
  begun = results.Run(**workdir.begin(str(devices)))
  print(
    f"{of.count:,} tiles of {len(of.bags):,} {of.what}, {of.size} pixels;"
    f" {len(extraction.outputs)} folders of features on {devices}",
    flush=True,
  )
  for note in [*notes, *extraction.store.notes]:
    print(note, flush=True)
  extraction.run()
  # Whoever comes first writes; the others wait.
  with files.lock(workdir.path / ".report.lock", wait=True):
    if workdir.finished:
      return workdir.report_failures()
    return _finish(config, extraction, workdir, begun, notes)


def check(config: ml_collections.ConfigDict) -> None:
  """Checks what can be checked without opening anything.

  Raises:
    UsageError: naming the key.
  """
  configuration.check(config, zero=("data.image_size",))
  configuration.one_of("bag", config.bag, tiles.BAGS)
  configuration.one_of("features_dtype", config.features_dtype, store.DTYPES)
  configuration.one_of("layout", config.layout, store.LAYOUTS)
  if config.layout == "stamp" and config.features_dtype != "float16":
    raise errors.UsageError(
      f"config.features_dtype is {config.features_dtype!r}, but STAMP's layout"
      " has float16: leave one of them out"
    )


def _begin_again(
  extraction: passes.Extraction,
  missing: Sequence[tiles.Bag],
  workdir: workdirs.Workdir,
) -> bool:
  """Whether a finished run has more to do: what is new, or has failed.

  What has failed is tried again, by whoever comes first.
  """
  path, kept = workdir.path / "results.json", extraction.store
  if not missing and "failed" not in kept.settled.values():
    told = json.loads(path.read_text(encoding="utf-8"))["summary"]["slides"]
    found = [(one["name"], one["reason"]) for one in kept.results()]
    # Those that nobody tiled may be others than before.
    if found == [(slide["name"], slide["reason"]) for slide in told]:
      return False
  with files.lock(workdir.path / ".again.lock", wait=True):
    if workdir.finished:
      kept.forget_failures()
      path.unlink()
  return True


def _preview(
  config: ml_collections.ConfigDict,
  extraction: passes.Extraction,
  devices: parallel.Devices,
  path: pathlib.Path,
  notes: Sequence[str],
) -> int:
  """Tells what the run would do, take and leave, for `--dry_run`."""
  of, outputs = extraction.tiles, extraction.outputs
  largest = max(of.bags, key=lambda bag: bag.count)
  work = [
    f"encoding: {of.count:,} tiles of {len(of.bags):,} {of.what}, {of.size}"
    f" pixels, on {devices}; the largest is {largest.name} with"
    f" {largest.count:,}",
    *(
      f"features/{output.folder}: {output.channels:,} each"
      for output in outputs
    ),
  ]
  if of.absent:
    names = naming.shown(list(of.absent))
    work.append(f"without coords, and left out: {len(of.absent):,}: {names}")
  speed, seconds = preview.of_encoding(extraction)
  width = sum(output.channels for output in outputs)
  bytes_each = width * np.dtype(config.features_dtype).itemsize
  size = of.count * (bytes_each + 16 * len(outputs))
  return preview.tell(config, path, [], work, speed, seconds, size, notes)


def _finish(
  config: ml_collections.ConfigDict,
  extraction: passes.Extraction,
  workdir: workdirs.Workdir,
  begun: results.Run,
  notes: Sequence[str],
) -> int:
  """Writes what the run came to."""
  of, found = extraction.tiles, extraction.store.results()
  summary, measurements = _results(config, extraction, found, begun, notes)
  left = results.Results(
    job="extract", summary=summary, measurements=measurements
  )
  dropped = [[r["name"], *tile] for r in found for tile in r["dropped"]]
  broken = [[r["name"], "", "", "", r["reason"]] for r in found if r["reason"]]
  if broken or dropped:
    rows = sorted(broken + dropped)
    files.write_csv(workdir.path / "failures.csv", FAILURES, rows)
  else:
    (workdir.path / "failures.csv").unlink(missing_ok=True)
  slides = summary["slides"]
  files.write_csv(
    workdir.path / "slides.csv",
    SLIDES,
    ([s["name"], *(s[column] for column in SLIDES[1:])] for s in slides),
  )
  page.write(workdir.path, left, _show(config, of, found))
  return workdir.finish(left)


def _results(
  config: ml_collections.ConfigDict,
  extraction: passes.Extraction,
  found: Sequence[Mapping[str, Any]],
  begun: results.Run,
  notes: Sequence[str],
) -> tuple[results.Extract, list[results.Row]]:
  """Turns what came of the slides into the summary and rows of results.json."""
  of = extraction.tiles
  slides = [
    results.EncodedSlide(
      name=one["name"],
      label=one["label"],
      group=one["group"],
      tiles=one["tiles"],
      mpp=one["mpp"],
      dropped=len(one["dropped"]),
      seconds=one["seconds"],
      reason=one["reason"],
    )
    for one in found
  ]
  by = [_encoded_by(extraction, output) for output in extraction.outputs]
  count = sum(slide["tiles"] for slide in slides)
  seconds = sum(slide["seconds"] for slide in slides)
  base = {"n": count}
  measurements = [
    results.row(base, "tiles", count),
    results.row(base, "tiles_per_second", count / seconds if seconds else None),
  ]
  for one in by:
    about = {key: one[key] for key in ("network", "weights")}
    about |= {"tap": one["cut"], "n": count}
    measurements += [
      results.row(about, name, one[name]) for name in ("channels", "bytes")
    ]
  broken = [
    results.Broken(name=slide["name"], reason=slide["reason"])
    for slide in slides
    if slide["reason"]
  ]
  whole = [slide for slide in slides if not slide["reason"]]
  summary = results.Extract(
    sentence="",
    data=config.data.source,
    coords=config.coords,
    classes=sorted({slide["label"] for slide in slides} - {""}),
    rows={"tiles": count},
    groups={of.what: len(whole)},
    notes=[*notes, *extraction.store.notes, *_unlike(whole, of.what)],
    failures=sum(slide["dropped"] for slide in slides),
    unit="tiles",
    seconds={"encoding, of all processes": seconds},
    run=begun,
    bags=of.what,
    slides=slides,
    encoders=by,
    broken=broken,
    image_size=of.size,
    tile=of.tile,
    mpp=of.mpp,
    features_dtype=config.features_dtype,
    layout=config.layout,
  )
  summary["sentence"] = sentences.of_extract(summary)
  return summary, measurements


def _encoded_by(
  extraction: passes.Extraction, output: encoders.Output
) -> results.EncodedBy:
  about = output.attributes()
  paths = [extraction.store.file(output, bag) for bag in extraction.tiles.bags]
  return results.EncodedBy(
    folder=output.folder,
    network=about["network"],
    weights=about["weights"],
    weights_sha256=about["weights_sha256"],
    cut=about["cut"],
    channels=output.channels,
    bytes=sum(path.stat().st_size for path in paths if path.exists()),
    normalisation=about["normalisation"],
  )


def _unlike(slides: Sequence[results.EncodedSlide], what: str) -> list[str]:
  """Returns a note where tiles are of other resolutions than others."""
  known = [slide["mpp"] for slide in slides if slide["mpp"]]
  notes = []
  if known and max(known) > 1.1 * min(known):
    notes.append(
      f"The tiles are of {min(known):.3g} to {max(known):.3g} um/px, and their"
      " features compare badly: tile by mpp and not by level."
    )
  if known and len(known) < len(slides):
    notes.append(
      f"Of {len(slides) - len(known):,} {what} nobody says the resolution."
    )
  return notes


def _show(
  config: ml_collections.ConfigDict,
  of: tiles.TileSet,
  found: Sequence[Mapping[str, Any]],
) -> list[gallery.Gallery]:
  """Reads some tiles, of as many slides as there are places."""
  rng = np.random.default_rng(config.seed)
  usable = {one["name"] for one in found if one["tiles"]}
  bags = [bag for bag in of.bags if bag.name in usable]
  if not bags or not config.thumbnails:
    return []
  shown = []
  for b in rng.permutation(len(bags))[: config.thumbnails]:
    bag = bags[b]
    with contextlib.suppress(SlideError):
      places = bag.open()
      tile = rng.integers(bag.count, size=1)
      read = of.reader[bag.piece(places, tile)]
      if not (read.broken or read.reasons[0]):
        x, y, name = places.named(int(tile[0]))
        where = name or f"({x}, {y})"
        shown.append(
          gallery.Thumbnail(read.pixels[0], bag.label or bag.name, where)
        )
  return [
    gallery.Gallery(
      "What the networks see",
      f"A tile of each of {len(shown):,} {of.what}, chosen by chance:"
      f" {of.size} x {of.size} pixels before normalisation. Below each stand"
      " the label, or the name of what it is of, and where it is.",
      shown,
    )
  ]
