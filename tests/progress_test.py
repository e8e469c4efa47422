"""What a long pass tells, with a terminal and without."""

import io
import sys

import pytest

from jaxtransfer import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize(
  ("seconds", "words"),
  [
    (0, "0 seconds"),
    (1.2, "1 second"),
    (89, "89 seconds"),
    (90, "1.5 minutes"),
    (600, "10 minutes"),
    (3 * 3600, "3 hours"),
    (40 * 3600, "1.7 days"),
  ],
)
def test_a_time_is_said_in_the_unit_that_people_would_use(seconds, words):
  assert progress.duration(seconds) == words


def test_without_a_terminal_scores_come_in_lines_with_the_time_left(capsys):
  """The first and the last always; no bar, whose redrawing would fill a log."""
  with progress.Progress("training", "steps", 8) as bar:
    for epoch in range(1, 5):
      bar.update()
      bar.update()
      bar.tell(f"epoch {epoch} of 4")
  out, err = capsys.readouterr()
  first, last = out.splitlines()
  assert first == "training: epoch 1 of 4; 0 seconds left"
  assert last == "training: epoch 4 of 4" and not err


def test_a_pass_that_goes_on_says_from_where(capsys):
  """By its count, or in words of its own; one from the start, or over, not."""
  for done in (0, 4096, 9000):
    progress.Progress("extracting", "images", 9000, done).close()
  progress.Progress("training", "steps", 9, 3, at="at epoch 2 of 3").close()
  progress.Progress("training", "steps", 9, 3, quiet=True).close()
  assert capsys.readouterr().out.splitlines() == [
    "extracting goes on after 4,096 of 9,000 images",
    "training goes on at epoch 2 of 3",
  ]


def test_what_compiles_has_no_part_in_the_time_left(capsys, monkeypatch):
  """The first step of a training may take as long as all the others."""
  now = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  with progress.Progress("training", "steps", 100) as bar:
    now[0] = 120
    bar.update(words="epoch 1 of 100")
    now[0] = 130
    bar.update(words="epoch 2 of 100")
  assert capsys.readouterr().out.splitlines() == [
    "training: epoch 1 of 100",
    "training: epoch 2 of 100; 16 minutes left",
  ]


def test_long_passes_are_heard_of_at_times(capsys, monkeypatch):
  """Soon once, then ever more rarely, however many there are to count."""
  now = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  with progress.Progress("extracting", "images", 10_000) as bar:
    for _ in range(1000):
      now[0] += 1
      bar.update(10)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == ("extracting: 150 of 10,000 images; 16 minutes left")
  assert len(lines) == 7


def test_on_a_terminal_the_bar_shows_the_last_words(capsys, monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with progress.Progress("training", "steps", 2) as bar:
    bar.update()
    bar.tell("validation auroc 0.912")
  assert "validation auroc 0.912" in terminal.getvalue()
  assert "1/2" in terminal.getvalue() and not capsys.readouterr().out


def test_what_stands_beside_the_count_is_told_with_it(capsys, monkeypatch):
  monkeypatch.setattr(progress, "_FIRST", 0.0)
  with progress.Progress("encoding", "tiles", 100) as bar:
    bar.beside = "3 of 60 slides"
    bar.update(20)
  told = capsys.readouterr().out
  assert "encoding: 20 of 100 tiles, 3 of 60 slides" in told
