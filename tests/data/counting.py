"""Examples whose images say what they are; light, as processes import it."""

import os
import sys

import numpy as np

from jaxtransfer.data import images, sources


class Numbers(sources.Examples):
  """Row i is a grey image of value i; some cannot be read."""

  def __init__(self, count, broken=()):
    super().__init__(
      classes=["even", "odd"],
      labels=(np.arange(count) % 2).astype(np.int32),
      names=[f"{i}.png" for i in range(count)],
    )
    self.broken = frozenset(broken)

  def read(self, row):
    if row in self.broken:
      raise images.ImageError("damaged image: for the test")
    return np.full((10, 12, 3), row, np.uint8)


class Witness(Numbers):
  """Its images say in which process they were read, or end it."""

  def read(self, row):
    if row == 99:
      os._exit(7)
    if row == 98:
      raise ValueError("a mistake in the program")
    value = np.zeros((4, 4, 3), np.uint8)
    process = os.getpid()
    value[0, 0] = [process % 256, process // 256 % 256, "jax" in sys.modules]
    return value
