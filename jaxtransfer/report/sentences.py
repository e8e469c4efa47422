"""What a run says in a few sentences, its doubts among them.

A comparison comes with its paired interval, and where that holds zero, with
the words that the images cannot show a difference.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer import errors, results
from jaxtransfer.report import tables
from jaxtransfer.report.tables import Measurements

Row = Mapping[str, Any]
# Of the classes that the chosen network does not find, so many are named.
_NAMED = 2
# Of what is said of new images, so many classes are told.
_TOLD = 6


def of_layers(summary: Mapping[str, Any], measurements: Measurements) -> str:
  """Returns the sentence of a `layers` run.

  What random weights do as well comes first; then the cut, or between which
  layers the images leave it open; then the best and the deepest layer.

  Args:
    summary: of results.json, without its sentence.
    measurements: its measurements.

  Returns:
    Two to six short sentences.
  """
  taps, cut, metric = summary["taps"], summary["cut"], summary["metric"]
  word = results.metric_name(metric)

  def of(tap: str, kind: str = "", weights: str = summary["weights"]) -> Row:
    series = measurements.series(
      [tap],
      f"{metric}:{kind}" if kind else metric,
      weights=weights,
      probe=summary["probe"],
      split="test",
    )
    return {
      key: None if math.isnan(numbers[0]) else float(numbers[0])
      for key, numbers in series._asdict().items()
    }

  def share(tap: str) -> str:
    params = measurements.cost([tap, taps[-1]], "params")
    return f"{tables.percent(*params)} of the parameters"

  def score(tap: str) -> str:
    return _number({**of(tap), "low": None}, "value", metric, bare=True)

  sentences = []
  random, over = summary["random_best"], of(cut, "over_random")
  if _sign(over) != 1:
    first = "Pretraining is not shown to help here"
    if _sign(over) == -1:
      first = "Random weights do better here"
    elif _sign(over) == 0 and over["value"] <= summary["tolerance"]:
      first = "Random weights do as well here"
    sentences.append(
      f"{first}: random weights, read after {random}, score"
      f" {_number(of(random, weights='random'), 'value', metric)}; the"
      f" pretrained ones at the cut {_signed(over)} more."
    )
  shallower = taps[: taps.index(cut)]
  against = {tap: of(tap, "against_cut") for tap in shallower}
  same = [tap for tap in shallower if not _sign(against[tap])]
  whole_score = _number(of(cut), "value", metric)
  if same:
    sentences.append(
      f"These images leave open where to cut, between {same[0]} and {cut}:"
      f" {same[0]} scores {score(same[0])} with {share(same[0])}, {cut}"
      f" {whole_score} with {share(cut)}, a difference of"
      f" {_signed(against[same[0]])}. {cut} is the shallowest of which"
      f" validation rules out a loss above {summary['tolerance']:g}."
    )
  elif cut == taps[-1]:
    sentences.append(f"Keep all layers up to {cut}: {whole_score}.")
  else:
    speed = measurements.cost([cut, taps[-1]], "images_per_second")
    sentences.append(
      f"Cut after {cut}: {whole_score}, with {share(cut)} and"
      f" {speed[0] / speed[1]:.1f}x the speed of all layers up to {taps[-1]}."
    )
  better = [tap for tap in shallower if _sign(against[tap]) == 1]
  if better:
    tap = max(better, key=lambda t: against[t]["value"])
    sentences.append(
      f"On the test split {tap}, which is shallower, scores more: {score(tap)},"
      f" {_signed(against[tap])}."
    )
  others = {summary["best"]: "the best on validation"}
  others[taps[-1]] = "the deepest"
  for tap, what in others.items():
    if tap != cut:
      difference = of(tap, "against_cut")
      signs: dict[int | None, str] = {
        1: "more than the cut",
        -1: "less than the cut",
      }
      shown = signs.get(
        _sign(difference), "no difference that these images can show"
      )
      sentences.append(
        f"{tap}, {what}, scores {score(tap)}: {_signed(difference)}, {shown}."
      )
  if random != cut or _sign(over) == 1:
    sentences.append(
      f"At {cut} pretrained weights give {_signed(of(cut, 'gain'))} {word} over"
      " random ones read at the same layer."
    )
  return " ".join(sentences)


def of_truncate(summary: Mapping[str, Any]) -> str:
  """Returns the sentence of a `truncate` run.

  First what speaks against relying on it; then the cut beside the whole
  network, whether the data can tell these two apart, and the best of the other
  networks. Trainings that had not come to their end are said with what speaks
  against it, or last.

  Args:
    summary: of results.json; of it "whole", "table", "metric", "exported"
      and "unfinished".

  Returns:
    One to four sentences.
  """
  metric, table = summary["metric"], summary["table"]
  chosen = next(row for row in table if row["chosen"])
  whole = next((row for row in table if row["whole"]), None)
  others = [
    row
    for row in table
    if row is not chosen and row is not whole and _mean(row, metric) is not None
  ]
  best = max(others, key=lambda row: _mean(row, metric) or 0.0, default=None)

  own = _doubts("the network", chosen)
  if not own and (missed := summary["exported"]["missed"]):
    which = f"the exported network, seed {summary['exported']['seed']},"
    own = [_not_found(which, missed)]
  about = []
  sentences = [_verdict(summary["whole"], chosen, whole, metric)]
  if whole is not None and whole is not chosen:
    about += _doubts("the whole network", whole, brief=True)[:1]
    sentences.append(_compared(chosen["against_ftl"][metric]))
  if best is not None:
    about += _doubts("the best of the others", best, brief=True)[:1]
    sentences.append(_best_of_others(best, metric))
  lead = "Do not rely on it" if own else "Read this with care"
  late = unfinished(summary["unfinished"])
  return _with_doubts(sentences, lead, own + about, late)


def of_finetune(
  summary: Mapping[str, Any],
  scores: Mapping[str, Row],
  params: int,
  metrics: tuple[str, str],
) -> str:
  """Returns the sentence of a `finetune` run.

  Args:
    summary: of results.json; of it "network", "cut", "best_epoch", "epochs",
      "missed", "chance" and "unfinished".
    scores: metric -> its row of the test split.
    params: of the network.
    metrics: the two that are told.

  Returns:
    One to three sentences.
  """
  first, second = (
    _number(scores[metric], "value", metric) for metric in metrics
  )
  text = (
    f"{summary['network']} cut after {summary['cut']}, fine-tuned:"
    f" {first} and {second} on the test split, with"
    f" {params / 1e6:.2f} M parameters, after epoch {summary['best_epoch']} of"
    f" {len(summary['epochs'])}."
  )
  row = {
    "tests": 1,
    "missed": summary["missed"],
    "chance": summary["chance"],
    "test": {
      name: {"mean": of["value"], "low": of["low"], "high": of["high"]}
      for name, of in scores.items()
    },
  }
  doubts = _doubts("the network", row)
  late = unfinished(summary["unfinished"])
  return _with_doubts([text], "Do not rely on it", doubts, late)


def of_predict(summary: Mapping[str, Any], scores: Mapping[str, Row]) -> str:
  """Returns the sentence of a `predict` run.

  Args:
    summary: of results.json, without its sentence.
    scores: metric -> its row; none where no label is known.

  Returns:
    One to three sentences.
  """
  images, labelled = summary["rows"]["read"], summary["labelled"]
  unit = summary["unit"]
  what = f"{summary['network']} cut after {summary['cut']}"
  if unit == "slides":
    what = f"the network of {summary['cut']}"
  shares = [
    f"{of['images']:,} {of['name']}"
    for of in sorted(summary["called"], key=lambda of: -of["images"])
    if of["images"]
  ]
  if shares[_TOLD:]:
    shares = [*shares[:_TOLD], "others"]
  said = errors.listed(shares)
  if not labelled:
    return (
      f"Of {images:,} {unit} {what} calls {said}. No label is known, so"
      " nothing can be said of how often it is right here."
    )
  told = [_number(scores[m], "value", m) for m in ("auroc", "accuracy")]
  text = f"{what} gives {errors.listed(told)} on {labelled:,} labelled {unit}"
  text = text[0].upper() + text[1:] if unit == "slides" else text
  if labelled < images:
    text += f" of {images:,}"
  sentences = [f"{text}."]
  own = summary["own_test"].get("auroc")
  if own is not None:
    before = f"{own:.3f}"
    low, high = (scores["auroc"][end] for end in ("low", "high"))
    if low is not None and low <= own <= high:
      so = f"these {unit} do not show that it is worse or better here"
    elif low is not None:
      so = f"it is {'worse' if own > high else 'better'} here"
    else:
      so = "whether that is the same here cannot be said"
    sentences.append(f"On its own test split it had {before}: {so}.")
  row = {
    "tests": 1,
    "missed": summary["missed"],
    "chance": summary["chance"],
    "test": {
      name: {"mean": of["value"], "low": of["low"], "high": of["high"]}
      for name, of in scores.items()
    },
  }
  doubts = _doubts("the network", row, unit=unit)
  return _with_doubts(sentences, "Do not rely on it here", doubts, None)


def of_slides(summary: Mapping[str, Any]) -> str:
  """Returns the sentence of a `slides` run.

  First what speaks against relying on it; then the encoder that is best on
  validation, and how it compares with the best of the others.

  Args:
    summary: of results.json; of it "table", "metric", "groups" and
      "unfinished".

  Returns:
    One to four sentences.
  """
  metric, table = summary["metric"], summary["table"]
  chosen = next(row for row in table if row["chosen"])
  others = [
    row for row in table if row is not chosen and _mean(row, metric) is not None
  ]
  text = f"Features of {chosen['name']} give {_score(chosen, metric)}"
  if (of_patients := (chosen["patients"] or {}).get(metric)) is not None:
    text += (
      f" for slides and {_number(of_patients, 'mean', metric, bare=True)} for"
      f" patients"
    )
  sentences = [f"{text}, over {summary['repeats']}."]
  if others:
    best = max(others, key=lambda row: _mean(row, metric) or 0.0)
    difference = best["against_chosen"][metric]
    sign = _sign(difference)
    if sign is None:
      so = "their difference is undefined"
    elif sign:
      so = f"{'better' if sign > 0 else 'worse'} by {_size(difference)}"
    else:
      so = f"the slides cannot tell the two apart ({_signed(difference)})"
    sentences.append(
      f"The best of the {len(others):,} others, {best['name']}, gives"
      f" {_score(best, metric, bare=True)}: {so}."
      if len(others) > 1
      else f"{best['name']} gives {_score(best, metric, bare=True)}: {so}."
    )
  doubts = _doubts("the network", chosen, unit="slides")
  late = unfinished(summary["unfinished"])
  return _with_doubts(sentences, "Do not rely on it", doubts, late)


def of_guessing(auroc: float | None, low: float | None) -> list[str]:
  """Returns a note where a network cannot be told from guessing, for the page.

  Args:
    auroc: of the test split; None where undefined.
    low: end of its interval; None without one.
  """
  least = auroc if low is None else low
  if least is None or least > 0.5:
    return []
  what = "is" if low is None else "has an interval that reaches down to"
  return [
    f"The test AUROC {what} {least:.3f}: on these images the network cannot be"
    " told from guessing."
  ]


def unfinished(of: Mapping[str, int]) -> str | None:
  """Says that trainings were still getting better when they had to end.

  Args:
    of: "trainings", how many there are, and "at_last_epoch", of how many the
      best epoch is the last that was allowed.

  Returns:
    Words without a capital or a stop; None where there is none.
  """
  late, trainings = of["at_last_epoch"], of["trainings"]
  if not late:
    return None
  if trainings == 1:
    return "the best epoch is the last one allowed, so more epochs would help"
  return (
    f"{late:,} of {trainings:,} trainings had {'its' if late == 1 else 'their'}"
    " best epoch at the last one allowed, so more epochs would help"
  )


def _with_doubts(
  sentences: list[str], lead: str, doubts: list[str], late: str | None
) -> str:
  if doubts:
    doubts = [*doubts, *filter(None, [late])]
    sentences = [f"{lead}: {errors.listed(doubts, ';')}.", *sentences]
  elif late:
    sentences = [*sentences, f"{late[0].upper()}{late[1:]}."]
  return " ".join(sentences)


def _verdict(name: str, chosen: Row, whole: Row | None, metric: str) -> str:
  if chosen is whole:
    return f"Do not cut {name}: whole, it gives {_score(chosen, metric)}."
  text = (
    f"Cut {name} after {chosen['cut']}: fine-tuned, it gives"
    f" {_score(chosen, metric)}"
  )
  if whole is None:
    return f"{text}; the whole network could not be trained."
  speed = chosen["images_per_second"] / whole["images_per_second"]
  return (
    f"{text} against {_score(whole, metric, bare=True)} for the whole"
    " network, with"
    f" {tables.percent(chosen['params'], whole['params'])} of the parameters"
    f" and {speed:.1f}x the speed."
  )


def _compared(difference: Row) -> str:
  """Returns the sentence on the cut less the whole network."""
  sign = _sign(difference)
  if sign is None:
    return "Whether they differ cannot be said: the difference is undefined."
  if sign:
    better = "cut" if sign > 0 else "whole"
    return (
      f"On the same test images the {better} network is better by"
      f" {_size(difference)}."
    )
  return (
    "The data cannot tell the two apart: on the same test images they differ"
    f" by {_signed(difference)}."
  )


def _best_of_others(best: Row, metric: str) -> str:
  difference = best["against_chosen"][metric]
  sign = _sign(difference)
  if sign is None:
    so = "its difference from the cut is undefined"
  elif sign:
    so = f"{'better' if sign > 0 else 'worse'} by {_size(difference)}"
  else:
    so = f"the data cannot tell it from the chosen one ({_signed(difference)})"
  return (
    f"The best of the others, {best['words']} ({best['name']},"
    f" {best['weights']} weights), gives"
    f" {_score(best, metric, bare=True)}: {so}."
  )


def _doubts(
  name: str, row: Row, *, brief: bool = False, unit: str = "images"
) -> list[str]:
  """Returns what speaks against a network that it has learnt the task."""
  doubts = []
  missed = row["missed"]
  # Every image is tested once by each of the seeds, and once by all folds.
  seeds = row["tests"]
  if brief and len(missed) > 1:
    doubts.append(f"{name} hardly finds {len(missed):,} classes")
  elif missed:
    average = seeds > 1 and not brief
    who = f"{name}, on average over {seeds} seeds," if average else name
    doubts.append(_not_found(who, missed, seeds, unit))
  balanced = row["test"]["balanced_accuracy"]
  least = balanced["mean"] if balanced["low"] is None else balanced["low"]
  if least is not None and least <= row["chance"]:
    doubts.append(
      f"{name} cannot be told from guessing"
      f" ({_number(balanced, 'mean', 'balanced_accuracy')}, guessing"
      f" {row['chance']:.3f})"
    )
  return doubts


def _not_found(
  name: str, missed: Sequence[Row], repeats: int = 1, unit: str = "images"
) -> str:
  """Says of what classes a network finds hardly an example."""
  parts = []
  for one in missed[:_NAMED]:
    images, hits, alarms = (
      round(one[key] / repeats) for key in ("images", "found", "taken")
    )
    kind, instead = tables.shorten(one["class"]), one["instead"]
    if instead is True:
      parts.append(
        f"calls {alarms:,} of {images:,} {unit} without {kind} {kind}"
      )
    elif instead is False:
      parts.append(f"finds {kind} in {hits:,} of {images:,} {unit} with it")
    elif alarms + hits == images:
      instead = tables.shorten(instead)
      parts.append(f"calls {alarms:,} of {images:,} {kind} {unit} {instead}")
    else:
      parts.append(
        f"finds {hits:,} of {images:,} {kind} {unit} (calls {alarms:,}"
        f" {tables.shorten(instead)})"
      )
  more = len(missed) - _NAMED
  if more > 0:
    parts.append(f"hardly finds {more:,} more class{'es' * (more > 1)}")
  return f"{name} {errors.listed(parts)}"


def _mean(row: Row, metric: str) -> float | None:
  return row["test"][metric]["mean"]


def _score(row: Row, metric: str, *, bare: bool = False) -> str:
  return _number(row["test"][metric], "mean", metric, bare=bare)


def _number(of: Row, key: str, metric: str, *, bare: bool = False) -> str:
  """Returns a number with its interval and, unless bare, its metric's name."""
  word = results.metric_name(metric)
  if of[key] is None:
    return f"an undefined {word}"
  text = f"{of[key]:.3f}"
  if of["low"] is not None:
    text += f" [{of['low']:.3f}, {of['high']:.3f}]"
  return text if bare else f"{text} {word}"


def _sign(difference: Mapping[str, float | None]) -> int | None:
  """Returns 0 where the interval holds zero, None where there is none."""
  low, high = difference["low"], difference["high"]
  if low is None or high is None:
    return None
  return (low > 0) - (high < 0)


def _size(difference: Row) -> str:
  """Returns a difference that is not zero without its sign."""
  value, *ends = (abs(difference[key]) for key in ("value", "low", "high"))
  low, high = sorted(ends)
  return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _signed(difference: Mapping[str, float | None]) -> str:
  if difference["value"] is None:
    return "undefined"
  value, low, high = (
    tables.score(difference[key], signed=True)
    for key in ("value", "low", "high")
  )
  return f"{value} [{low}, {high}]"


def of_extract(summary: Mapping[str, Any]) -> str:
  """Returns the sentence of an `extract` run.

  Args:
    summary: of results.json, without its sentence.

  Returns:
    What could not be used, then what there is.
  """
  what, broken = summary["bags"], summary["broken"]
  whole = [s for s in summary["slides"] if not s["reason"]]
  sentences = []
  if broken:
    total = len(summary["slides"])
    sentences.append(
      f"{len(broken):,} of {total:,} {what} could not be used: the first,"
      f" {tables.shorten(broken[0]['name'])}:"
      f" {tables.shorten(broken[0]['reason'])}."
    )
  if dropped := summary["failures"]:
    share = tables.percent(dropped, dropped + summary["rows"]["tiles"])
    sentences.append(
      f"{dropped:,} tiles could not be read and are left out, {share}."
    )
  by = summary["encoders"]
  networks = len({(one["network"], one["weights"]) for one in by})
  plural = "s" * (networks > 1)
  cuts = f" at {len(by)} cuts" if len(by) > networks else ""
  sentences.append(
    f"{summary['rows']['tiles']:,} tiles of {len(whole):,} {what} are encoded"
    f" by {networks} network{plural}{cuts}."
  )
  return " ".join(sentences)
