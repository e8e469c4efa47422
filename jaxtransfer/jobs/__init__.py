"""The jobs that there are: one file here is one thing a user can run.

To add one: a line below, its own file, its config, its page's file in
`report/` and its page of docs. Importing this imports no job, and no JAX.
"""

import dataclasses

from jaxtransfer import errors


@dataclasses.dataclass(frozen=True)
class Job:
  """One thing a user can run.

  Its function is `run` of `jaxtransfer.jobs.<name>`, its config
  `configs/<name>.py`, its page `content` of `jaxtransfer.report.<name>`.

  Attributes:
    name: what `config.job` says.
    question: what it answers.
    joins: whether several processes may train together in it, each started
      with `--distributed`.
    divides: whether runs with the same workdir divide its work among
      themselves.
  """

  name: str
  question: str
  joins: bool = False
  divides: bool = False

  @property
  def module(self) -> str:
    """Its module's name."""
    return f"{__name__}.{self.name}"


JOBS: dict[str, Job] = {
  job.name: job
  for job in (
    Job(
      "layers",
      "What is each layer of a pretrained network worth on my images, and after"
      " which can it be cut?",
    ),
    Job(
      "finetune",
      "How good does one network become, cut and trained on my images?",
      joins=True,
    ),
    Job(
      "slides",
      "What is a slide, from the features of its tiles, and whose features say"
      " it best?",
      divides=True,
    ),
    Job(
      "truncate",
      "Where can a network be cut that is fine-tuned on my images, and what"
      " does it lose?",
      divides=True,
    ),
    Job(
      "predict",
      "What does a network that I trained say of new images, and how good is it"
      " there?",
    ),
  )
}


def find(name: str) -> Job:
  """Returns the job that `config.job` names.

  Raises:
    UsageError: there is none.
  """
  if name not in JOBS:
    raise errors.UsageError(
      f"config.job is {name!r}{errors.nearest(name, JOBS)}; there are"
      f" {', '.join(JOBS)}"
    )
  return JOBS[name]
