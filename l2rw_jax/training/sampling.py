"""Which examples come at which step, as a function of the seed alone."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from l2rw_jax import base


class Position(NamedTuple):
  """Where a run stands: `offset` batches into `epoch`."""

  epoch: int
  offset: int


def generator(seed: int, purpose: str, number: int) -> np.random.Generator:
  """An independent NumPy stream for every (seed, purpose, number)."""
  return np.random.default_rng([seed, *purpose.encode(), number])


class TrainSampler:
  """Batches of row numbers, epoch after epoch, resumable at any batch.

  The last rows of an epoch that do not fill a batch are left out; the next
  epoch's order brings them back.
  """

  def __init__(
    self,
    epoch_order: Callable[[int], np.ndarray],
    batch_size: int,
    position: Position,
  ):
    """Starts at `position`.

    Args:
      epoch_order: epoch -> rows to visit, in order.
      batch_size: B, over all devices.
      position: where to go on.
    """
    self._epoch_order = epoch_order
    self._batch_size = batch_size
    self.position = position
    self._order: np.ndarray | None = None

  def starts_epoch(self) -> bool:
    """Whether the next batch is the first of its epoch."""
    return self.position.offset == 0

  def whole(self) -> int:
    """Batches of this epoch, 1 or more; asks for the order if it is due."""
    return len(self._rows()) // self._batch_size

  def left(self) -> int:
    """Batches until the next epoch, 1 or more; asks for the order if it is due."""
    return self.whole() - self.position.offset

  def next(self) -> np.ndarray:
    """The next batch of rows, [B]; moves on."""
    epoch, offset = self.position
    start = offset * self._batch_size
    rows = self._rows()[start : start + self._batch_size]
    if self.left() == 1:
      self.position, self._order = Position(epoch + 1, 0), None
    else:
      self.position = Position(epoch, offset + 1)
    return rows

  def _rows(self):
    if self._order is None:
      self._order = np.asarray(self._epoch_order(self.position.epoch))
      if len(self._order) < self._batch_size:
        raise base.InputError(
          f"--batch_size={self._batch_size} is larger than the {len(self._order)}"
          " examples of an epoch; choose a smaller batch."
        )
    return self._order


def meta_rows(seed: int, step: int, num_meta: int, batch_size: int) -> np.ndarray:
  """Rows of the clean set for one step, [M], without replacement in a pass."""
  per_pass = num_meta // batch_size
  number, offset = divmod(step, per_pass)
  if per_pass == 1 and batch_size == num_meta:
    return np.arange(num_meta)
  order = generator(seed, "meta", number).permutation(num_meta)
  return order[offset * batch_size : (offset + 1) * batch_size]
