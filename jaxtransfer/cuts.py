"""Which cuts of a network are tried, and which is chosen, by validation alone.

What is decided here needs no image: plans, names and rules.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxtransfer.networks import zoo

METHODS = ("ttl", "lwft", "fat", "tf")
PRETRAINED, RANDOM = "pretrained", "random"
_WORDS = {
  "ttl": "cut after {cut}, all of it trained",
  "ftl": "the whole network trained",
  "lwft": "the whole network, frozen up to {cut}",
  "fat": "cut after {cut}, only the head trained",
  "tf": "{weights} up to {cut}, then random and half as wide",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config.

  Attributes:
    network: the zoo's name.
    until: where what is called the whole network ends; None for its end.
    blocks: cuts of the first stage, in the network's order; the last is the
      whole network.
    layers: every layer of the network.
    methods: of `METHODS`, `ttl` first.
    layerwise: those with a second stage.
    small: networks trained from scratch beside it.
    repeats: trainings of every cut.
  """

  network: str
  until: str | None
  blocks: tuple[str, ...]
  layers: tuple[str, ...]
  methods: tuple[str, ...]
  layerwise: tuple[str, ...]
  small: tuple[str, ...]
  repeats: int

  @property
  def whole(self) -> str:
    """The last cut."""
    return self.blocks[-1]

  @functools.cached_property
  def places(self) -> dict[str, int]:
    """Where every cut lies among the layers."""
    resolve = zoo.build(self.network).resolve
    return {
      name: self.layers.index(resolve(name))
      for name in (*self.layers, *self.blocks)
    }

  def units(self, method: str, cut: str, weights: str) -> "tuple[Unit, ...]":
    """Returns all repeats of a method at a cut."""
    return tuple(
      Unit(method, cut, weights, repeat) for repeat in range(self.repeats)
    )

  def cuts(self, method: str) -> list[str]:
    """Returns the first stage's cuts that make sense for a method.

    Without anything after the cut, LWFT trains a head and TF nothing.
    """
    last = {"lwft": -1, "tf": -1}.get(method)
    return list(self.blocks[:last])

  def around(self, method: str, block: str, step: int) -> list[str]:
    """Returns the second stage's cuts: the layers beside the best block's end.

    In a ResNet those of the block and of the next; in a DenseNet, whose
    transitions compress what a block has gathered, those of the block, as in
    the paper.
    """
    ends = [self.places[name] for name in self.blocks]
    at = self.blocks.index(block)
    first = ends[at - 1] + 1 if at else 0
    beyond = ends[min(at + 1, len(ends) - 1)]
    if zoo.family(self.network).compresses:
      beyond = ends[at]
    known = {self.places[name] for name in self.cuts(method)}
    # Counted from the block's end: every step-th of both sides.
    return [
      self.layers[i]
      for i in range(first, beyond)
      if i not in known and (i - ends[at]) % max(step, 1) == 0
    ]


@dataclasses.dataclass(frozen=True)
class Unit:
  """One training.

  Attributes:
    method: of `METHODS`, or a small network's name.
    cut: the layer it is about; "" for a small network.
    weights: `PRETRAINED` or `RANDOM`.
    repeat: the how-manieth seed or fold.
  """

  method: str
  cut: str
  weights: str
  repeat: int

  @property
  def name(self) -> str:
    """The directory's name."""
    parts = (self.method, self.cut, self.weights, str(self.repeat))
    return "-".join(filter(None, parts))


@dataclasses.dataclass(frozen=True)
class Searched:
  """A cut that a method was tried at.

  Attributes:
    method: of `METHODS`.
    stage: "blocks" or "layers".
    cut: the layer.
    values: of the validation metric, one of each repeat, as far as it was
      trained; NaN where undefined.
    stopped: why it cannot be chosen by them; None where it can.
  """

  method: str
  stage: str
  cut: str
  values: tuple[float, ...]
  stopped: str | None

  @property
  def mean(self) -> float:
    """Over the repeats that have a value; NaN without any."""
    known = [value for value in self.values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan

  @property
  def value(self) -> float:
    """What it is chosen by: the mean, or -inf where it cannot be chosen."""
    whole = self.stopped is None and np.isfinite(self.values).all()
    return self.mean if whole else -np.inf


def choose(
  plan: Plan, search: Sequence[Searched], method: str, tolerance: float
) -> Searched | None:
  """Returns a method's cut by validation alone.

  Where a shallower cut is a smaller network, the shallowest of those that are
  within the tolerance of the best; the best otherwise.

  Args:
    plan: where the cuts lie.
    search: what was tried.
    method: of `METHODS`.
    tolerance: in the metric's own units.

  Returns:
    The cut; None where nothing can be chosen.
  """
  of = sorted(
    (s for s in search if s.method == method),
    key=lambda s: plan.places[s.cut],
  )
  best = max(of, key=lambda s: s.value)
  if not np.isfinite(best.value):
    return None
  if method not in ("ttl", "fat"):
    return best
  good = best.value - tolerance
  return next(s for s in of if s.value >= good)


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the final table.

  Attributes:
    name: for people, e.g. "TTL-2".
    method: of `METHODS`, "ftl", or a small network's name.
    units: its trainings.
    chosen: whether it is the cut that the search ended with.
  """

  name: str
  method: str
  units: tuple[Unit, ...]
  chosen: bool = False

  @property
  def cut(self) -> str:
    """The layer it is about; "" for a small network."""
    return self.units[0].cut

  @property
  def weights(self) -> str:
    """What its trainings began with."""
    return self.units[0].weights

  @property
  def words(self) -> str:
    """What was trained, for people."""
    words = _WORDS.get(self.method)
    if words is None:
      return "a small network, all of it trained"
    return words.format(cut=self.cut, weights=self.weights)


def compared(
  plan: Plan,
  search: Sequence[Searched],
  tolerance: float,
  began_with: str,
  random: bool,
) -> list[Row]:
  """Decides what is compared on the test split, by validation alone.

  Args:
    plan: what was to be tried.
    search: what was tried.
    tolerance: as `choose` takes it.
    began_with: the search's weights, `PRETRAINED` or `RANDOM`.
    random: whether each row is there a second time, from random weights.

  Returns:
    The rows of the table; those of a method of which nothing can be chosen are
    left out.
  """
  rows: dict[tuple[Unit, ...], Row] = {}
  whole = plan.units("ttl", plan.whole, began_with)

  def add(row: Row) -> None:
    if row.units == whole:
      row = dataclasses.replace(row, name="FTL", method="ftl")
    rows.setdefault(row.units, row)

  blocks = [s for s in search if s.stage == "blocks"]
  for method in plan.methods:
    coarse = choose(plan, blocks, method, tolerance)
    fine = choose(plan, search, method, tolerance)
    if coarse is None or fine is None:
      continue
    first, last = (
      plan.units(method, one.cut, began_with) for one in (coarse, fine)
    )
    name, chosen = method.upper(), method == "ttl"
    if first != last:
      add(Row(f"{name}-2", method, last, chosen))
      add(Row(f"{name}-1", method, first))
    else:
      add(Row(name, method, last, chosen))
    if chosen:
      add(Row("FTL", "ftl", whole))
  if began_with == PRETRAINED and random:
    for row in list(rows.values()):
      units = tuple(dataclasses.replace(u, weights=RANDOM) for u in row.units)
      add(dataclasses.replace(row, units=units, chosen=False))
  for name in plan.small:
    add(Row(name, name, plan.units(name, "", RANDOM)))
  return list(rows.values())
