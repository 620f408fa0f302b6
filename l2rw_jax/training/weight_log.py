"""The weights of every training example during a run."""

from typing import NamedTuple

import numpy as np


class WeightLog(NamedTuple):
  """Statistics of the example weights of R runs, NumPy arrays [R, N].

  Weights are in units of the uniform weight: 1 is an equal share of a batch.

  Attributes:
    total: sum of the weights of an example, float64.
    seen: number of times that the example was in a batch, int64.
    rejected: number of these times with a weight of exactly zero, int64.
    last: latest weight of the example, float64; NaN if it was never in a batch.
  """

  total: np.ndarray
  seen: np.ndarray
  rejected: np.ndarray
  last: np.ndarray

  @classmethod
  def empty(cls, num_runs: int, num_examples: int) -> "WeightLog":
    """A log without any step."""
    shape = (num_runs, num_examples)
    return cls(
      np.zeros(shape),
      np.zeros(shape, int),
      np.zeros(shape, int),
      np.full(shape, np.nan),
    )

  def add(self, rows: np.ndarray, weights: np.ndarray) -> None:
    """Adds one step, in place: `weights` [R, B] of the examples in `rows` [R, B]."""
    for run, (row, weight) in enumerate(zip(rows, weights, strict=True)):
      np.add.at(self.total[run], row, weight)
      np.add.at(self.seen[run], row, 1)
      np.add.at(self.rejected[run], row, weight == 0)
      self.last[run, row] = weight

  def mean(self) -> np.ndarray:
    """Mean weight of each example, [R, N]; NaN if it was never in a batch."""
    with np.errstate(invalid="ignore"):
      return self.total / np.where(self.seen > 0, self.seen, np.nan)
