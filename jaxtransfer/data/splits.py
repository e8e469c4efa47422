"""Which rows train, choose and test: by group, balanced by label, seeded."""

import collections
import os
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from jaxtransfer.data import names as naming
from jaxtransfer.data import stored_splits
from jaxtransfer.data.sources import Examples
from jaxtransfer.errors import UsageError

SPLITS = ("train", "val", "test")
# Groups below which percentile intervals are known to be too narrow.
_FEW = 20


def make_splits(
  labels: np.ndarray,
  groups: Sequence[str] | None,
  given: Sequence[str] | None = None,
  fractions: Sequence[float] = (0.6, 0.2, 0.2),
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Divides rows into train, val and test.

  Rows of one group stay together, every label is divided by `fractions` as
  nearly as the groups allow; a label with three groups or more is in all three
  unless groups of several labels stand against it. Splits that the source
  gives are used as they are; a val or test that it does not give is carved out
  of its train in the same way.

  Args:
    labels: (N,) int, the class of every row.
    groups: N names, or None: every row is a group of its own.
    given: N of "train", "val", "test", or None.
    fractions: shares of train, val and test; they sum to one.
    seed: another seed is another draw.

  Returns:
    Sorted row indices, (n,) int64 each, of train, val and test. A split whose
    fraction is zero is empty unless it is given.

  Raises:
    UsageError: fractions that are no fractions, or a given split without a
      train.
  """
  share_of = dict(zip(SPLITS, fractions, strict=False))
  if (
    len(fractions) != len(SPLITS)
    or min(fractions) < 0
    or fractions[0] <= 0
    or abs(sum(fractions) - 1) > 1e-6
  ):
    raise UsageError(
      f"config.data.split_fractions is {tuple(fractions)}; it must be the"
      " shares of train, val and test and sum to one, train above zero"
    )
  labels = np.asarray(labels)
  if given is None:
    splits = {name: np.empty(0, np.int64) for name in SPLITS}
    splits["train"] = np.arange(len(labels))
  else:
    names = np.asarray(given)
    splits = {name: np.flatnonzero(names == name) for name in SPLITS}
    if not len(splits["train"]):
      raise UsageError(
        "no row of the given splits is train; give some or give none"
      )
  carved = ["train"] + [n for n in SPLITS[1:] if not len(splits[n])]
  shares = np.array([share_of[name] for name in carved])
  rows = splits["train"]
  part = _divide(
    labels[rows],
    None if groups is None else [groups[row] for row in rows.tolist()],
    shares / shares.sum(),
    seed,
  )
  for i, name in enumerate(carved):
    splits[name] = rows[part == i]
  return splits


def k_folds(
  labels: np.ndarray, groups: Sequence[str] | None, k: int, seed: int = 0
) -> np.ndarray:
  """Divides rows into k folds of equal size, by group, balanced by label.

  Args:
    labels: (N,) int, the class of every row.
    groups: N names, or None: every row is a group of its own.
    k: how many folds.
    seed: another seed is another draw.

  Returns:
    (N,) int32, the fold of every row, 0 to k-1.

  Raises:
    UsageError: fewer groups than folds.
  """
  count = len(labels) if groups is None else len(set(groups))
  if not 2 <= k <= count:
    raise UsageError(
      f"{k} folds of {count} groups; from 2 to the number of groups"
    )
  return _divide(np.asarray(labels), groups, np.full(k, 1 / k), seed)


def _divide(
  labels: np.ndarray,
  groups: Sequence[str] | None,
  shares: np.ndarray,
  seed: int,
) -> np.ndarray:
  """Assigns every group to one of the parts: (N,) int32."""
  rng = np.random.default_rng(seed)
  n = len(labels)
  if groups is None:
    group = np.arange(n)
  else:
    # Numbered by first appearance, so that a group's name has no influence.
    number: dict[str, int] = {}
    group = np.fromiter(
      (number.setdefault(name, len(number)) for name in groups), np.int64, n
    )
  sizes = np.bincount(group)
  totals = np.bincount(labels)
  # (label, rows) of every group, from one sort of the pairs. A table of groups
  # by labels would be 24 GB for 300,000 rows of 10,000 classes.
  pairs, counts = np.unique(group * len(totals) + labels, return_counts=True)
  contents: list[list[tuple[int, int]]] = [[] for _ in sizes]
  for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
    label = pair % len(totals)
    contents[pair // len(totals)].append((label, count))

  # Few groups are hard to balance and cheap to draw again.
  draws = min(20, 1 + 200_000 // len(pairs))
  best, best_cost = np.empty(0, np.int32), np.inf
  for _ in range(draws):
    # Large groups come early, or they would not fit in; were the order by size
    # alone, every seed would give the same parts.
    order = np.argsort(-sizes * np.exp(rng.random(len(sizes))), kind="stable")
    part_of_group, have = _fill(order, sizes, contents, totals, shares)
    seen = totals > 0
    absent = (have[:, seen] == 0) & (shares > 0)[:, None]
    cost = (
      np.square(have[:, seen] / totals[seen] - shares[:, None]).sum()
      + absent.sum()
      + len(totals) * len(shares) * absent[0].sum()  # of train: unusable
    )
    if cost < best_cost:
      best, best_cost = part_of_group, cost
  return best[group]


def _fill(
  order: np.ndarray,
  sizes: np.ndarray,
  contents: list[list[tuple[int, int]]],
  totals: np.ndarray,
  shares: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Gives each group in turn to the part that lacks most of what it has.

  A part without any of a label goes before the others. Linear in the number
  of (group, label) pairs.

  Source: iterative stratification, Sechidis et al. 2011, for groups.

  Args:
    order: (G,) the groups, first to last.
    sizes: (G,) rows of each group.
    contents: (label, rows) pairs of each group.
    totals: (L,) rows of each label.
    shares: (P,) share of each part, which sum to one.

  Returns:
    The part of each group, (G,) int32, and the rows of each label in each
    part, (P, L).
  """
  n = int(sizes.sum())
  share_of = shares.tolist()
  parts = [part for part, share in enumerate(share_of) if share > 0]
  total_of, size_of = totals.tolist(), sizes.tolist()
  have = [[0] * len(total_of) for _ in share_of]
  rows_in = [0] * len(share_of)
  part_of_group = np.empty(len(sizes), np.int32)
  for g in order.tolist():
    best, best_need = parts[0], (-np.inf, -np.inf)
    for part in parts:
      need, share, mine = 0.0, share_of[part], have[part]
      for label, count in contents[g]:
        total = total_of[label]
        lacking = share - mine[label] / total
        need += count / total * (lacking if mine[label] else lacking + 1)
      # Labels decide, and the part's size between equals: that is what keeps
      # the shares where labels have too few groups to.
      key = (round(need, 12), share - rows_in[part] / n)
      if key > best_need:
        best, best_need = part, key
    part_of_group[g] = best
    rows_in[best] += size_of[g]
    mine = have[best]
    for label, count in contents[g]:
      mine[label] += count
  return part_of_group, np.array(have)


def few_shot(
  rows: np.ndarray,
  labels: np.ndarray,
  groups: Sequence[str] | None,
  per_class: int,
  seed: int = 0,
) -> np.ndarray:
  """Keeps `per_class` rows of every class, from as many groups as possible.

  With the same seed, fewer shots are a part of more shots.

  Args:
    rows: (n,) int, the rows to choose from.
    labels: (N,) int, the class of every row of the source.
    groups: N names, or None.
    per_class: how many of each class; a class with fewer gives all it has.
    seed: another seed is another draw.

  Returns:
    Sorted row indices, int64.
  """
  rng = np.random.default_rng(seed)
  rows = rng.permutation(np.sort(np.asarray(rows, np.int64)))
  counts: collections.Counter[tuple[int, str]] = collections.Counter()
  turn = np.zeros(len(rows), np.int64)  # the how-manieth of its group and class
  for i, row in enumerate(rows.tolist()):
    key = (int(labels[row]), groups[row] if groups is not None else str(row))
    turn[i] = counts[key]
    counts[key] += 1
  classes = np.asarray(labels)[rows]
  order = np.lexsort((turn, classes))
  rows, classes = rows[order], classes[order]
  starts = np.searchsorted(classes, classes)
  return np.sort(rows[np.arange(len(rows)) - starts < per_class])


def check_splits(
  splits: Mapping[str, np.ndarray],
  labels: np.ndarray,
  groups: Sequence[str] | None,
  names: Sequence[str],
  classes: Sequence[str],
  slides: Sequence[str] | None = None,
  unit: str = "images",
) -> list[str]:
  """Checks that splits can be used; run it at every start, given or drawn.

  Args:
    splits: row indices of every split.
    labels: (N,) int, the class of every row.
    groups: N names, or None.
    names: N names of the rows.
    classes: names of the classes.
    slides: N names, "" where unknown, if no slide may be in two splits; None
      where groups alone decide.
    unit: what the rows are.

  Returns:
    Warnings, a line each: classes that val or test lack.

  Raises:
    UsageError: a row, a group or a slide in two splits, or a class that train
      lacks.
  """
  _check_disjoint(splits, names, names, unit.removesuffix("s"), unit=unit)
  if groups is not None:
    of_slides = slides is not None and all(
      group == slide
      for group, slide in zip(groups, slides, strict=True)
      if slide
    )
    what = "slide" if of_slides else "group"
    _check_disjoint(splits, groups, names, what, unit=unit)
  if slides is not None:
    _check_disjoint(
      splits,
      slides,
      names,
      "slide",
      "; each of these slides is of several groups: where slides are numbered"
      " anew in each group, or hold several patients, leave the column 'slide'"
      " out",
    )
  absent = "train" in splits and _absent(splits["train"], labels, classes, unit)
  if absent:
    raise UsageError(
      f"the train split has {absent}; leave them out or change the splits"
    )
  return lacking(splits, labels, classes, unit)


def divide(
  config: ml_collections.ConfigDict,
  examples: Examples,
  path: str | os.PathLike[str],
  *,
  every_class: bool = True,
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Draws a run's splits, or reads those that it saved.

  They are to be saved once the run's checks are over: a run that was refused
  must not decide the next one's.

  Args:
    config: the whole config: `seed`, and of `data` the keys `split_fractions`
      and `few_shot`.
    examples: the source.
    path: of splits.json.
    every_class: whether train must hold every class, and val and test two;
      not so where a class is a combination of labels.

  Returns:
    Row indices of train, val and test, none empty, and what the user should
    know, a line each.

  Raises:
    UsageError: the splits cannot be used, or the source has changed since.
  """
  if os.path.exists(path):
    divided = stored_splits.load_splits(path, examples)
  else:
    divided = make_splits(
      examples.labels,
      examples.groups,
      examples.splits,
      config.data.split_fractions,
      config.seed,
    )
    _keep_few(config, examples, divided)
  return divided, _check_usable(
    config, examples, divided, every_class, examples.splits
  )


def divide_folds(
  config: ml_collections.ConfigDict,
  examples: Examples,
  path: str | os.PathLike[str],
  *,
  every_class: bool = True,
) -> tuple[list[dict[str, np.ndarray]], list[str]]:
  """Divides the source for cross-validation: each row is tested once.

  Fold i is the test split of the i-th division, the one after it the
  validation split, the others are trained on.

  Args:
    config: as in `divide`, with `folds`, 3 or more.
    examples: the source; splits that it gives itself are not used.
    path: of splits.json; where it exists, `join_folds` made what is in it.
    every_class: as in `divide`.

  Returns:
    Row indices of train, val and test of every division, and what the user
    should know.

  Raises:
    UsageError: too few groups, a division that cannot be used, or the source
      has changed since.
  """
  if os.path.exists(path):
    stored = stored_splits.load_splits(path, examples)
    divisions = [
      {split: stored[f"{split}{i}"] for split in SPLITS}
      for i in range(config.folds)
    ]
  else:
    divisions = _draw_folds(config, examples)
  notes = []
  if examples.splits is not None:
    notes.append("the source's own splits are not used: config.folds is set")
  for divided in divisions:
    notes += _check_usable(config, examples, divided, every_class)
  return divisions, list(dict.fromkeys(notes))


def _draw_folds(
  config: ml_collections.ConfigDict, examples: Examples
) -> list[dict[str, np.ndarray]]:
  folds = config.folds
  _check_enough(examples, folds)
  fold = k_folds(examples.labels, examples.groups, folds, config.seed)
  divisions = []
  for i in range(folds):
    val = fold == (i + 1) % folds
    divided = {
      "train": np.flatnonzero((fold != i) & ~val),
      "val": np.flatnonzero(val),
      "test": np.flatnonzero(fold == i),
    }
    _keep_few(config, examples, divided)
    divisions.append(divided)
  return divisions


def _check_enough(examples: Examples, folds: int) -> None:
  """Refuses folds of which some could not test a class."""
  groups = examples.groups or examples.names
  for number, name in enumerate(examples.classes):
    rows = np.flatnonzero(examples.labels == number).tolist()
    count = len({groups[row] for row in rows})
    what = "groups" if examples.groups else examples.unit
    if count < folds:
      fewer = f"use {count} folds or fewer, or " if count >= 3 else ""
      raise UsageError(
        f"config.folds is {folds}, but the class {name} has {count} {what}, and"
        f" some folds would not test it: {fewer}leave the class out"
      )


def join_folds(
  divisions: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
  """Returns all divisions as one, train0 to test<last>, for splits.json."""
  return {
    f"{split}{i}": rows
    for i, divided in enumerate(divisions)
    for split, rows in divided.items()
  }


def _keep_few(
  config: ml_collections.ConfigDict,
  examples: Examples,
  divided: dict[str, np.ndarray],
) -> None:
  """Leaves `config.data.few_shot` training rows of each class, in place."""
  if config.data.few_shot:
    divided["train"] = few_shot(
      divided["train"],
      examples.labels,
      examples.groups,
      config.data.few_shot,
      config.seed,
    )


def _check_usable(
  config: ml_collections.ConfigDict,
  examples: Examples,
  divided: Mapping[str, np.ndarray],
  every_class: bool,
  given: Sequence[str] | None = None,
) -> list[str]:
  """Checks one division and returns what the user should know.

  Groups alone decide unless the source gives splits: then they can have been
  made without regard to slides.
  """
  unit = examples.unit
  for name, rows in divided.items():
    present = {examples.classes[c] for c in examples.labels[rows]}
    if len(present) < 1 + every_class:
      raise UsageError(
        f"the {name} split of {config.data.source} has"
        f" {len(rows)} {unit} of {len(present)} classes"
        f" ({', '.join(sorted(present)) or 'none'}); train, val and test need"
        f" {'two each' if every_class else 'some'}: more {unit}, other groups"
        " or other config.data.split_fractions"
      )
  labels, classes = examples.labels, examples.classes
  if not every_class:
    labels, classes = np.zeros_like(labels), ["any"]
  notes = check_splits(
    divided,
    labels,
    examples.groups,
    examples.names,
    classes,
    None if given is None else examples.slides,
    unit,
  )
  if given is not None:
    notes += _taken_from_train(given, divided, unit)
  if examples.groups is None:
    notes.append(
      f"The source names no groups (patients): {unit} were divided and"
      " resampled one by one. Scores are too high and intervals too narrow"
      f" where {unit} of one patient are alike."
    )
  return notes + rough(divided, examples.groups, unit)


def _check_disjoint(
  splits: Mapping[str, np.ndarray],
  values: Sequence[str],
  names: Sequence[str],
  what: str,
  hint: str = "",
  unit: str = "images",
) -> None:
  """Refuses splits that share a value, "" excepted, with a row of each."""
  owner: dict[str, tuple[str, int]] = {"": ("", 0)}
  shared: dict[str, str] = {}
  for split, rows in splits.items():
    for row in rows.tolist():
      value = values[row]
      other, first = owner.setdefault(value, (split, row))
      if other != split and value and value not in shared:
        shared[value] = f"{other} and {split}" + (
          f" (row {first + 1}, {names[first]}; row {row + 1}, {names[row]})"
        )
  if shared:
    overlaps = [
      f"the {what} {value} is in both {of}" for value, of in shared.items()
    ]
    raise UsageError(
      f"{naming.shown(overlaps, between='; ')}: the scores would be those of"
      f" {unit} already seen; put each in one{hint}"
    )


def _taken_from_train(
  given: Sequence[str], divided: Mapping[str, np.ndarray], unit: str
) -> list[str]:
  """Says which splits the source does not give."""
  count = collections.Counter(given)
  return [
    f"The source gives no {split} split: {len(divided[split]):,} of its"
    f" {count['train']:,} train {unit} were taken for it."
    for split in SPLITS
    if not count[split]
  ]


def rough(
  splits: Mapping[str, np.ndarray],
  groups: Sequence[str] | None,
  unit: str = "images",
) -> list[str]:
  """Returns a line for val and test each where they are too small to trust.

  Args:
    splits: row indices of every split.
    groups: N names, or None.
    unit: what the rows are.
  """
  notes = []
  for name in SPLITS[1:]:
    rows = splits[name]
    held = f"{len(rows):,} {unit}"
    count = len(rows)
    if groups is not None:
      count = len({groups[row] for row in rows})
      held += f" of {count:,} groups"
    if count < _FEW:
      notes.append(
        f"The {name} split holds {held}: its scores are rough, and resamples of"
        " so few give intervals that are too narrow."
      )
  return notes


def lacking(
  splits: Mapping[str, np.ndarray],
  labels: np.ndarray,
  classes: Sequence[str],
  unit: str = "images",
) -> list[str]:
  """Returns a line for every split that lacks classes but not all rows.

  Args:
    splits: row indices of every split.
    labels: (N,) int, the class of every row.
    classes: names of the classes.
    unit: what the rows are.
  """
  notes = []
  for split, rows in splits.items():
    if len(rows) and (absent := _absent(rows, labels, classes, unit)):
      so = "its scores leave them out"
      if split == "train":
        so = "the network never saw one"
      notes.append(f"the {split} split has {absent}; {so}")
  return notes


def _absent(
  rows: Sequence[int] | np.ndarray,
  labels: np.ndarray,
  classes: Sequence[str],
  unit: str,
) -> str | None:
  """Says which classes some rows lack; None where they lack none."""
  of_rows = np.asarray(labels)[np.asarray(rows, np.int64)]
  counts = np.bincount(of_rows, minlength=len(classes))
  absent = [classes[c] for c in np.flatnonzero(counts == 0).tolist()]
  if not absent:
    return None
  shown = naming.shown(absent, 5)
  one = unit.removesuffix("s")
  return f"no {one} of {len(absent)} of {len(classes)} classes: {shown}"
