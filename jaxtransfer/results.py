"""results.json: what every job writes and every page reads, as types.

What is no finite number is null there. A key is only ever of one meaning:
jobs fill these types, pages read them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, TypedDict, cast

from jaxtransfer import files
from jaxtransfer.measure import evaluation, operating
from jaxtransfer.measure.metrics import METRICS

Number = float | None

# How each metric is called where people read: those to be high come first.
METRIC_WORDS = {
  name: METRICS[name].words
  for name in sorted(METRICS, key=lambda name: not METRICS[name].higher)
}
# Those that are told of each class against the rest.
BY_CLASS = tuple(name for name, of in METRICS.items() if of.by_class)


class Row(TypedDict):
  """A line of `measurements`: one number and all that it is of.

  Attributes:
    network: the zoo's name.
    weights: what they are called; "random".
    tap: the layer that is read, or the last that is kept.
    probe: what reads it: a probe, "finetune", or a method of the search.
    metric: what was measured; a part of it after ":", a threshold after "@".
    split: "val" or "test"; null for what is of no split.
    value: null where it is undefined.
    low: the lower end of its interval; null without one.
    high: the upper end.
    n: images.
    seed: which repeat; null for all of them.
  """

  network: str | None
  weights: str | None
  tap: str | None
  probe: str | None
  metric: str
  split: str | None
  value: Number
  low: Number
  high: Number
  n: int | None
  seed: int | None


COLUMNS = tuple(Row.__annotations__)


class Score(TypedDict):
  """A metric over repeated trainings, as `evaluation.Score` has it."""

  mean: Number
  sd: Number
  low: Number
  high: Number
  values: list[Number]


class Difference(TypedDict):
  """What one network scores above another, paired."""

  value: Number
  low: Number
  high: Number


Missed = TypedDict(
  "Missed",
  {
    "class": str,
    "label": int,
    "images": int,
    "found": int,
    "instead": str | bool,
    "taken": int,
  },
)
Missed.__doc__ = "A class that is hardly found, as `evaluation.Missed` has it."


class Rates(TypedDict):
  """What happens at a threshold on the split that chose it."""

  sensitivity: Number
  specificity: Number


Point = TypedDict(
  "Point",
  {
    "class": str,
    "rule": str,
    "words": str,
    "thresholds": list[Number],
    "val": Rates,
    "test": dict[str, Score],
    "images": list[int],
  },
)
Point.__doc__ = "What happens at thresholds, as `evaluation.Operating` has it."


class Diagram(TypedDict):
  """A reliability diagram, a number for every bin."""

  confidence: list[Number]
  accuracy: list[Number]
  count: list[int]


class Reliability(TypedDict):
  """Diagrams before and after the temperature."""

  before: Diagram
  after: Diagram


class Curve(TypedDict):
  """A curve and its band; null without resamples."""

  x: list[Number]
  y: list[Number]
  low: list[Number] | None
  high: list[Number] | None


class Curves(TypedDict):
  """How a network ranks."""

  roc: Curve
  precision_recall: Curve


class NamedCurves(Curves):
  """The same of one of several networks."""

  name: str


class Epoch(TypedDict):
  """The line of metrics.jsonl that ends an epoch."""

  event: str
  epoch: int
  step: int
  loss: Number
  accuracy: Number
  val: dict[str, Any]
  timing: dict[str, float]


class Unfinished(TypedDict):
  """How many trainings had their best epoch at the last one allowed."""

  trainings: int
  at_last_epoch: int


class Normalisation(TypedDict):
  """Of each channel, in [0, 1]."""

  mean: list[float]
  std: list[float]


class Run(TypedDict):
  """What was run, as `workdir.begin` returns it."""

  command: str
  versions: dict[str, str]
  devices: str
  commit: str | None
  started: str


class Told(TypedDict):
  """What the summaries of all jobs that divide examples hold.

  Attributes:
    sentence: what came out, for people.
    rule: how it was decided.
    metric: the one that decides.
    data: where the examples are from.
    classes: what is predicted.
    rows: split -> examples that were read.
    groups: split -> their groups; null where none are known.
    notes: what the user should know, a line each.
    interval: what the intervals are.
    failures: examples that could not be read.
    seconds: what took how long.
    run: what was run.
  """

  sentence: str
  rule: str
  metric: str
  data: str
  classes: list[str]
  rows: dict[str, int]
  groups: dict[str, int] | None
  notes: list[str]
  interval: str
  failures: int
  seconds: dict[str, float]
  run: Run


class Summary(Told):
  """What the summaries of jobs on images have besides.

  Attributes:
    cut: the last layer kept, or to keep.
    network: the zoo's name.
    weights: what they are called.
    taps: the layers in question, in the network's order.
    normalisation: of the images.
    weights_sha256: of the weights' file; "" without one.
  """

  cut: str
  network: str
  weights: str
  taps: list[str]
  normalisation: Normalisation
  weights_sha256: str


class Layers(Summary):
  """The summary of `layers`.

  Attributes:
    best: the best tap by validation.
    random_best: the best with random weights.
    probe: the one that decides.
    tolerance: what a cut may lose.
    seeds: networks with random weights.
    sum_over_whole: tap -> how speeds that were added up compare with measured
      ones.
  """

  best: str
  random_best: str
  probe: str
  tolerance: float
  seeds: int
  sum_over_whole: dict[str, float]


class Learnt(TypedDict):
  """What the summaries of jobs that train have besides.

  Attributes:
    multilabel: whether an example may have several labels.
    prevalence: of the positive class among the tested; null where not known.
    unfinished: trainings that more epochs would have helped.
    temperature: that the logits are divided by.
    confusion: (C, C) test examples by true and predicted class, or null.
    reliability: of the test split.
  """

  multilabel: bool
  prevalence: Number
  unfinished: Unfinished
  temperature: float
  confusion: list[list[int]] | None
  reliability: Reliability


class Trained(Summary, Learnt):
  """The summary of a job that trains on images."""


class Finetune(Trained):
  """The summary of `finetune`.

  Attributes:
    head: what is on top of the cut.
    trained_layers: those whose parameters changed.
    best_epoch: the one kept, from 1.
    epochs: all of them.
    missed: classes that are hardly found.
    chance: the balanced accuracy of guessing.
    operating: at thresholds.
    curves: on the test split.
  """

  head: str
  trained_layers: list[str]
  best_epoch: int
  epochs: list[Epoch]
  missed: list[Missed]
  chance: float
  operating: list[Point]
  curves: Curves


class Searched(TypedDict):
  """A cut that a method was tried at, as `cuts.Searched` has it."""

  method: str
  stage: str
  cut: str
  params: int
  macs: int
  value: Number
  values: list[Number]
  low: Number
  high: Number
  chosen: bool
  stopped: str | None


class Tested(TypedDict):
  """A network that was tested.

  Attributes:
    params: of the network with its head.
    macs: of an image.
    latency_ms: of one image on one device.
    images_per_second: of batches on all devices.
    name: for people.
    method: of the search, "ftl", or a small network's name.
    weights: "pretrained" or "random".
    cut: null for a small network.
    words: what was trained.
    trained_params: how many could change.
    training_seconds: the mean of the repeats.
    epochs: likewise.
    val: the metric on validation, likewise.
    test: metric -> score.
    operating: at thresholds.
    missed: classes that are hardly found, of all repeats together.
    chance: the balanced accuracy of guessing.
    tests: how often every image is tested.
    chosen: whether it is the cut that the search ended with.
    whole: whether it is the whole network.
    against_chosen: metric -> what it scores above the chosen one; null of
      itself.
    against_ftl: likewise above the whole network; null too where there is none.
  """

  params: int
  macs: int
  latency_ms: float
  images_per_second: float
  name: str
  method: str
  weights: str
  cut: str | None
  words: str
  trained_params: int
  training_seconds: float
  epochs: float
  val: Number
  test: dict[str, Score]
  operating: list[Point]
  missed: list[Missed]
  chance: float
  tests: int
  chosen: bool
  whole: bool
  against_chosen: dict[str, Difference] | None
  against_ftl: dict[str, Difference] | None


class Learning(TypedDict):
  """The epochs of every repeat of a network."""

  name: str
  epochs: list[list[Epoch]]


class Exported(TypedDict):
  """Which network was handed over: the best repeat, by validation."""

  seed: int
  cut: str
  val: Number
  missed: list[Missed]


class Failed(TypedDict):
  """A training that failed, and why."""

  unit: str
  reason: str


class Truncate(Trained):
  """The summary of `truncate`.

  Attributes:
    epoch_metric: by which the epoch of a training is chosen.
    whole: what is called the whole network.
    image_size: pixels.
    cost_batch_size: of the measured speed.
    repeats: how often every cut was trained, in words.
    tolerance: what a cut may lose.
    halving: how cuts were dropped, in words; null where none were.
    search: every cut that was tried.
    table: every network that was tested.
    learning: of the chosen and the whole network.
    exported: which was handed over.
    curves: of the chosen and the whole network.
    failed: trainings that failed.
  """

  epoch_metric: str
  whole: str
  image_size: int
  cost_batch_size: int
  repeats: str
  tolerance: float
  halving: str | None
  search: list[Searched]
  table: list[Tested]
  learning: list[Learning]
  exported: Exported
  curves: list[NamedCurves]
  failed: list[Failed]


class Called(TypedDict):
  """How often a class is said.

  Attributes:
    name: of the class, or of one of several labels.
    images: that it is said of: the likeliest class, or a label of which more
      than even odds are given.
    probability: its mean over all images.
  """

  name: str
  images: int
  probability: float


class Predict(Summary):
  """The summary of `predict`.

  Attributes:
    unit: what an example is.
    multilabel: whether an example may have several labels.
    used: what is used: the workdir or the export.
    image_size: pixels.
    temperature: that the logits are divided by.
    own_test: metric -> what the run of the network measured on its own test
      split.
    called: how often each class is said.
    labelled: images whose label is known.
    prevalence: of the positive class; null where not known.
    missed: classes that are hardly found; empty where no label is known, as are
      the others below.
    chance: the balanced accuracy of guessing; null likewise.
    confusion: of labelled images; null likewise, as the others.
    operating: at the thresholds of the run.
    reliability: of labelled images.
    curves: of labelled images.
  """

  unit: str
  multilabel: bool
  used: str
  image_size: int | None
  temperature: float
  own_test: dict[str, Number]
  called: list[Called]
  labelled: int
  prevalence: Number
  missed: list[Missed]
  chance: Number
  confusion: list[list[int]] | None
  operating: list[Point]
  reliability: Reliability | None
  curves: Curves | None


class Broken(TypedDict):
  """A slide that could not be used, and why."""

  name: str
  reason: str


class TiledSlide(TypedDict):
  """A slide, and what became of it; a line of slides.csv.

  Attributes:
    name: of its files.
    path: of the slide.
    width: pixels of level 0; null, as what follows, where it cannot be opened.
    height: likewise.
    mpp: micrometres of one.
    levels: the downsample of each.
    tiles: how many are kept.
    tissue_mm2: the area of its tissue.
    seconds: that it took.
    problem: what is to be known of it; "" where nothing is.
    failed: whether it could not be used.
  """

  name: str
  path: str
  width: int | None
  height: int | None
  mpp: Number
  levels: list[float]
  tiles: int | None
  tissue_mm2: Number
  seconds: Number
  problem: str
  failed: bool


class Tile(TypedDict):
  """The summary of `tile`.

  Attributes:
    unit: what could not be read is.
    sentence: what came out, for people.
    data: where the slides are from.
    tile: pixels of a tile's side.
    mpp: micrometres of one.
    table: every slide.
    notes: what the user should know, a line each.
    failures: tiles that could not be read.
    broken: slides that could not be used.
    seconds: what took how long.
    run: what was run.
  """

  sentence: str
  data: str
  tile: int
  mpp: float
  table: list[TiledSlide]
  notes: list[str]
  failures: int
  broken: list[Broken]
  unit: str
  seconds: dict[str, float]
  run: Run


class EncodedSlide(TypedDict):
  """A slide, or a bag of images, and what came of it.

  Attributes:
    name: of it, and of its files.
    label: "" where it has none.
    group: its patient; "" where nobody says.
    tiles: rows of its files.
    mpp: micrometres per pixel of its tiles; null where nobody says.
    dropped: tiles that could not be read.
    seconds: that it took one process.
    reason: why it failed; "" where it did not.
  """

  name: str
  label: str
  group: str
  tiles: int
  mpp: Number
  dropped: int
  seconds: float
  reason: str


class EncodedBy(TypedDict):
  """A folder of feature files.

  Attributes:
    folder: under `features/`.
    network: the zoo's name.
    weights: what they are called.
    weights_sha256: of their file, or of the numbers.
    cut: the layer whose features they are.
    channels: of each tile.
    bytes: of all files.
    normalisation: of the images.
  """

  folder: str
  network: str
  weights: str
  weights_sha256: str
  cut: str
  channels: int
  bytes: int
  normalisation: Normalisation


class Extract(TypedDict):
  """The summary of `extract`.

  Attributes:
    unit: what could not be read is.
    sentence: what came out, for people.
    data: where the slides or images are from.
    coords: where their tiles are from; "" for images.
    classes: labels of slides.
    rows: "tiles" -> how many are encoded.
    groups: what a feature file is of -> of how many there are files.
    notes: what the user should know, a line each.
    failures: tiles that could not be read.
    seconds: what took how long.
    run: what was run.
    bags: what a feature file is of, in the plural: "slides", "groups", ...
    slides: every one of them.
    encoders: every folder.
    broken: those that could not be used.
    image_size: of the tiles as networks saw them, pixels.
    tile: of the tiles on the slides, pixels; null where nobody says.
    mpp: micrometres per pixel of them, likewise.
    features_dtype: of the numbers.
    layout: of the files.
  """

  sentence: str
  data: str
  coords: str
  classes: list[str]
  rows: dict[str, int]
  groups: dict[str, int]
  notes: list[str]
  failures: int
  unit: str
  seconds: dict[str, float]
  run: Run
  bags: str
  slides: list[EncodedSlide]
  encoders: list[EncodedBy]
  broken: list[Broken]
  image_size: int
  tile: int | None
  mpp: Number
  features_dtype: str
  layout: str


class Pooled(TypedDict):
  """An encoder's features with a pooling, tested.

  Attributes:
    name: for people.
    encoder: what its folder is called.
    pooling: of the tiles.
    top: tiles of each slide with which the encoder was trained; 0 where it was
      not.
    network: that made the features; null where the files do not say.
    weights: its weights, likewise.
    tap: the layer that was read, likewise.
    channels: of a tile's features.
    tiles: of a slide, the mean.
    params: of the pooling network with its head.
    training_seconds: the mean of the repeats.
    epochs: likewise.
    val: the metric on validation, likewise.
    test: metric -> score, of slides.
    patients: likewise, of groups; null where none has several slides.
    patients_tested: how many groups.
    operating: at thresholds.
    missed: classes that are hardly found, of all repeats together.
    chance: the balanced accuracy of guessing.
    tests: how often every slide is tested.
    chosen: whether it is the best on validation.
    against_chosen: metric -> what it scores above the chosen one; null of
      itself.
    against_first: likewise above the first of the table.
  """

  name: str
  encoder: str
  pooling: str
  top: int
  network: str | None
  weights: str | None
  tap: str | None
  channels: int
  tiles: float
  params: int
  training_seconds: float
  epochs: float
  val: Number
  test: dict[str, Score]
  patients: dict[str, Score] | None
  patients_tested: int | None
  operating: list[Point]
  missed: list[Missed]
  chance: float
  tests: int
  chosen: bool
  against_chosen: dict[str, Difference] | None
  against_first: dict[str, Difference] | None


class Slides(Told, Learnt):
  """The summary of `slides`.

  Attributes:
    unit: what an example is.
    epoch_metric: by which the epoch of a training is chosen.
    repeats: how often each was trained, in words.
    table: every encoder with every pooling.
    learning: of the chosen one.
    exported: which network was handed over.
    seed: of the trainings that the curves, the confusions and the tiles'
      attention are of.
    curves: of the chosen one and the others.
    failed: trainings that failed.
  """

  unit: str
  epoch_metric: str
  repeats: str
  table: list[Pooled]
  learning: list[Learning]
  exported: Exported
  seed: int
  curves: list[NamedCurves]
  failed: list[Failed]


class Results(TypedDict):
  """A whole results.json."""

  job: str
  summary: Layers | Finetune | Truncate | Extract | Tile | Slides | Predict
  measurements: list[Row]


# The summary of each job.
SUMMARIES = {
  "extract": Extract,
  "finetune": Finetune,
  "layers": Layers,
  "predict": Predict,
  "slides": Slides,
  "tile": Tile,
  "truncate": Truncate,
}


def metric_name(name: Any) -> str:
  """Returns how a metric is called in words.

  Args:
    name: as a config or a row has it.
  """
  name = str(name or "score")
  return METRIC_WORDS.get(name, name.replace("_", " "))


def row(
  base: Mapping[str, Any],
  metric: str,
  value: SupportsFloat | None,
  interval: Sequence[SupportsFloat | None] | None = None,
) -> Row:
  """Returns one row of `measurements`.

  Args:
    base: what is said of it in the other columns; null where nothing is.
    metric: what was measured.
    value: NaN or None where it is not defined.
    interval: its ends.
  """
  low, high = (None, None) if interval is None else interval
  numbers = {"value": value, "low": low, "high": high}
  columns: dict[str, Any] = {
    **dict.fromkeys(COLUMNS),
    **base,
    "metric": metric,
    **{
      name: None if number is None else files.finite(float(number))
      for name, number in numbers.items()
    },
  }
  return Row(**columns)


def score(of: evaluation.Score) -> Score:
  """Returns a score over repeats."""
  low, high = of.interval
  return files.finite(
    Score(
      mean=of.mean,
      sd=of.deviation,
      low=low,
      high=high,
      values=[*of.values],
    )
  )


def difference(of: evaluation.Difference) -> Difference:
  """Returns a paired difference."""
  return files.finite(Difference(**of._asdict()))


def missed(classes: Sequence[evaluation.Missed]) -> list[Missed]:
  """Returns classes that are hardly found."""
  fields = [of._asdict() for of in classes]
  return [Missed(**{"class": of.pop("name"), **of}) for of in fields]


def points(of: Sequence[evaluation.Operating]) -> list[Point]:
  """Returns what happens at thresholds."""
  return [
    {
      "class": point.name,
      "rule": point.rule,
      "words": operating.rule_words(point.rule),
      "thresholds": files.finite(list(point.thresholds)),
      "val": files.finite(point.val),
      "test": {name: score(value) for name, value in point.test.items()},
      "images": list(point.images),
    }
    for point in of
  ]


def operating_card(
  of: Sequence[evaluation.Operating],
  prevalence: float,
  *,
  multilabel: bool,
  unit: str = "image",
) -> dict[str, Any]:
  """Returns what a user of an exported network must know of its thresholds.

  Args:
    of: its points.
    prevalence: of the positive, that predictive values are for; 0 for none.
    multilabel: whether an example may have several labels.
    unit: what an example is.
  """
  activation = "sigmoid" if multilabel else "softmax"
  return {
    "meaning": (
      f"A{'n' * (unit[0] in 'aeiou')} {unit} is called of the class where"
      f" the probability of this class, {activation}(logits / temperature), is"
      " at or above the threshold. Thresholds were chosen on the validation"
      " split and measured on the test split."
    ),
    "prevalence": prevalence or None,
    "points": [
      {
        "class": point["class"],
        "name": point["rule"],
        "rule": point["words"],
        "threshold": point["thresholds"][0],
        "val": point["val"],
        "test": {
          key: {"value": of["mean"], "low": of["low"], "high": of["high"]}
          for key, of in point["test"].items()
        },
      }
      for point in points(of)
    ],
  }


def point_rows(
  base: Mapping[str, Any], of: Sequence[Point], seeds: Sequence[int]
) -> list[Row]:
  """Returns the rows that say what happens at thresholds.

  Args:
    base: what is said of the network in the other columns.
    of: as `points` returns them.
    seeds: of each repeat, whose thresholds are rows of their own.
  """
  rows = []
  for point in of:
    about = f"@{point['rule']}:{point['class']}"
    positive, negative = point["images"]
    counts = {"sensitivity": positive, "specificity": negative}
    for seed, threshold in zip(seeds, point["thresholds"], strict=True):
      chosen = {**base, "split": "val", "n": None, "seed": seed}
      rows.append(row(chosen, f"threshold{about}", threshold))
    for name, value in point["test"].items():
      tested = {**base, "split": "test"}
      tested["n"] = counts.get(name, positive + negative)
      interval = value["low"], value["high"]
      rows.append(row(tested, name + about, value["mean"], interval))
  return rows


def value_rows(
  base: Mapping[str, Any], values: Sequence[evaluation.Value]
) -> list[Row]:
  """Returns the rows of one network's metrics.

  Args:
    base: what is said of the network in the other columns.
    values: as `evaluation.evaluate` returns them.
  """
  return [
    row({**base, "split": of.split, "n": of.images}, of.metric, *of[2:4])
    for of in values
  ]


def score_rows(
  base: Mapping[str, Any],
  metric: str,
  of: evaluation.Score,
  images: evaluation.Images,
) -> list[Row]:
  """Returns a row for the mean over repeats and one for each repeat.

  Args:
    base: what is said of the network in the other columns.
    metric: what was measured.
    of: it.
    images: how many it is of.
  """
  every = row({**base, "n": images.distinct}, metric, of.mean, of.interval)
  singles = zip(images.of_repeats, of.values, strict=True)
  return [
    every,
    *(
      row({**base, "seed": repeat, "n": count}, metric, value)
      for repeat, (count, value) in enumerate(singles)
    ),
  ]


def confusion(of: evaluation.Evaluation) -> list[list[int]] | None:
  """Returns the table of confusions, where there is one."""
  return None if of.confusion is None else of.confusion.tolist()


def reliability(of: evaluation.Evaluation) -> Reliability:
  """Returns the reliability diagrams."""
  return Reliability(
    **{
      name: Diagram(
        **{
          key: files.finite(values.tolist())
          for key, values in diagram._asdict().items()
        }
      )
      for name, diagram in of.reliability.items()
    }
  )


def curves(of: evaluation.Evaluation) -> Curves:
  """Returns how a network ranks; `measure` has it in the same words."""
  return cast(Curves, of.curves)


def epochs(records: Sequence[Mapping[str, Any]]) -> list[Epoch]:
  """Returns the epochs of a training.

  Args:
    records: the lines of metrics.jsonl that end them.
  """
  return [Epoch(**record) for record in records]
