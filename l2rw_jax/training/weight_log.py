"""What weight each training example was given, over a run."""

from typing import NamedTuple

import numpy as np


class WeightLog(NamedTuple):
  """Per-example record of R runs, NumPy arrays [R, N]; updated in place.

  Weights are in units of the uniform weight: 1 is an equal share of a batch.

  Attributes:
    total: sum of the weights an example was given, float64.
    seen: how often it was in a batch, int64.
    rejected: how often its weight was zero, int64.
    last: the weight when last seen, NaN before; float64.
  """

  total: np.ndarray
  seen: np.ndarray
  rejected: np.ndarray
  last: np.ndarray

  @classmethod
  def empty(cls, num_runs: int, num_examples: int) -> "WeightLog":
    """A log in which nothing has been seen."""
    shape = (num_runs, num_examples)
    return cls(
      np.zeros(shape),
      np.zeros(shape, int),
      np.zeros(shape, int),
      np.full(shape, np.nan),
    )

  def add(self, rows: np.ndarray, weights: np.ndarray) -> None:
    """Notes one step: rows [R, B] were given weights [R, B]."""
    for run, (row, weight) in enumerate(zip(rows, weights, strict=True)):
      np.add.at(self.total[run], row, weight)
      np.add.at(self.seen[run], row, 1)
      np.add.at(self.rejected[run], row, weight == 0)
      self.last[run, row] = weight

  def mean(self) -> np.ndarray:
    """Mean weight when seen, [R, N]; NaN for examples never seen."""
    with np.errstate(invalid="ignore"):
      return self.total / np.where(self.seen > 0, self.seen, np.nan)
