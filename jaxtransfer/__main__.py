"""The console script, and `python -m jaxtransfer`: first of all, signals."""

from jaxtransfer import signals


def run() -> None:
  """Answers signals, then imports the program and runs it."""
  signals.end_at_signals()
  from jaxtransfer import main

  main.run()


if __name__ == "__main__":
  run()
