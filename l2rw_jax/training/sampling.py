"""The rows of the examples that each step uses.

All random draws depend only on the seed and on the number of the epoch or of the pass
over the meta set, so that an interrupted run can be continued exactly.
"""

from collections.abc import Callable, Sequence
import functools
import threading
from typing import NamedTuple

import numpy as np

from l2rw_jax import base


class Position(NamedTuple):
  """The next batch of a run: batch `offset` of epoch `epoch`, both counted from 0."""

  epoch: int
  offset: int


class Rows(NamedTuple):
  """The examples that one step of R runs uses, as row numbers on the host.

  Attributes:
    train: rows of each run's training set, [R, B].
    meta: rows of each run's meta set, [R, M], or None.
  """

  train: np.ndarray
  meta: np.ndarray | None


def generator(seed: int, purpose: str, number: int) -> np.random.Generator:
  """A NumPy generator for each (seed, purpose, number), independent of the others."""
  return np.random.default_rng([seed, *purpose.encode(), number])


class TrainSampler:
  """Batches of the training set of one run, epoch after epoch.

  Sampling can be resumed at any batch. If the last rows of an epoch do not fill a
  batch, they are left out; the next epoch draws from all rows again. An epoch that has
  fewer rows than a batch raises InputError.
  """

  def __init__(
    self,
    epoch_order: Callable[[int], np.ndarray],
    batch_size: int,
    position: Position | None = None,
  ):
    """Starts at `position`.

    Args:
      epoch_order: `epoch -> rows` to visit, in order.
      batch_size: B, over all devices.
      position: position of the next batch; the first one if None.
    """
    self.position = position or Position(0, 0)
    self._epoch_order = epoch_order
    self._batch_size = batch_size
    self._order: np.ndarray | None = None  # Drawn when it is needed.

  def starts_epoch(self) -> bool:
    """Whether the next batch is the first one of its epoch."""
    return self.position.offset == 0

  def epoch_length(self) -> int:
    """Number of batches in the current epoch, at least 1."""
    return len(self._rows()) // self._batch_size

  def steps_left(self) -> int:
    """Number of batches left in the current epoch, at least 1."""
    return self.epoch_length() - self.position.offset

  def ahead(self) -> Callable[[int], np.ndarray]:
    """Returns a function `i -> rows` of a batch; the next batch has i = 0.

    The function may be called in other threads, and its result does not change when
    this sampler advances. It draws the order of later epochs itself, so the order must
    depend only on the epoch, and all epochs must have the same length.
    """
    (epoch, offset), size = self.position, self._batch_size
    first, length = self._rows(), self.epoch_length()
    draw, lock = functools.lru_cache(maxsize=2)(self._epoch_order), threading.Lock()

    def rows(i: int) -> np.ndarray:
      later, place = divmod(offset + i, length)
      if later:
        with lock:  # If several threads need the same order, only one draws it.
          order = np.asarray(draw(epoch + later))
      else:
        order = first
      return order[place * size : (place + 1) * size]

    return rows

  def next(self) -> np.ndarray:
    """Returns the rows of the next batch, [B], and advances."""
    epoch, offset = self.position
    start = offset * self._batch_size
    rows = self._rows()[start : start + self._batch_size]
    if self.steps_left() == 1:
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


def meta_order(seed: int, number: int, num_meta: int) -> np.ndarray:
  """The order of the meta set in one of the passes over it, [num_meta]."""
  return generator(seed, "meta", number).permutation(num_meta)


def meta_rows(
  seed: int,
  step: int,
  num_meta: int,
  batch_size: int,
  order: Callable[[int, int, int], np.ndarray] = meta_order,
) -> np.ndarray:
  """Rows of the meta set for one step, [M], without replacement within a pass.

  Args:
    seed: seed of the run.
    step: number of updates so far.
    num_meta: size of the meta set.
    batch_size: M.
    order: `meta_order`, or a cached version of it that does not draw the order of a
      pass again in each of its steps.
  """
  steps_per_pass = num_meta // batch_size
  number, offset = divmod(step, steps_per_pass)
  if steps_per_pass == 1 and batch_size == num_meta:
    return np.arange(num_meta)
  rows = order(seed, number, num_meta)
  return rows[offset * batch_size : (offset + 1) * batch_size]


class Sampler:
  """Draws the training and meta rows of R runs that are trained side by side.

  An epoch whose rows do not exist, or do not fill a batch, raises InputError.

  Attributes:
    runs: the `TrainSampler` of each run.
  """

  def __init__(
    self,
    seeds: Sequence[int],
    epoch_order: Callable[[int, int, np.random.Generator], np.ndarray],
    *,
    num_train: int,
    batch_size: int,
    num_meta: int = 0,
    meta_batch_size: int | None = None,
  ):
    """Starts at the first batch of the first epoch.

    Args:
      seeds: the seed of each run.
      epoch_order: `(run, epoch, rng) -> rows` to visit in an epoch, in order.
      num_train: N, training examples of each run.
      batch_size: B, over all devices.
      num_meta: size of each run's meta set; 0 draws no meta batches.
      meta_batch_size: M, over all devices; the whole meta set if None.
    """

    def order(run: int, epoch: int) -> np.ndarray:
      rng = generator(seeds[run], "order", epoch)
      rows = np.asarray(epoch_order(run, epoch, rng))
      _check_rows(rows, num_train)
      return rows

    self.runs = [
      TrainSampler(functools.partial(order, run), batch_size)
      for run in range(len(seeds))
    ]
    self._seeds = seeds
    self._num_meta = num_meta
    self._meta_batch_size = meta_batch_size or num_meta
    # Each run keeps the order of its current pass over the meta set.
    self._meta_orders = [functools.lru_cache(maxsize=1)(meta_order) for _ in seeds]

  def positions(self) -> list[Position]:
    """The position of each run."""
    return [run.position for run in self.runs]

  def seek(self, positions: Sequence[Position]) -> None:
    """Continues each run at its given position. Call it only before the first batch."""
    for run, position in zip(self.runs, positions, strict=True):
      run.position = position

  def epoch(self) -> tuple[int, int]:
    """Number of steps left in the current epoch, and length of the epoch, in steps.

    Each is the minimum over the runs.
    """
    steps_left = min(run.steps_left() for run in self.runs)
    return steps_left, min(run.epoch_length() for run in self.runs)

  def ahead(self) -> Callable[[int], np.ndarray]:
    """Returns a function `i -> rows [R, B]` of a step; the next step has i = 0.

    See `TrainSampler.ahead`.
    """
    runs = [run.ahead() for run in self.runs]
    return lambda i: np.stack([rows(i) for rows in runs])

  def next(self, step: int) -> Rows:
    """Returns the rows of `step` and advances."""
    train = np.stack([run.next() for run in self.runs])
    if not self._num_meta:
      return Rows(train, None)
    size = (self._num_meta, self._meta_batch_size)
    meta = [
      meta_rows(seed, step, *size, order)
      for seed, order in zip(self._seeds, self._meta_orders, strict=True)
    ]
    return Rows(train, np.stack(meta))


def _check_rows(rows, num_examples):
  if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
    raise base.InputError(
      f"the method's `sample` returned {rows.dtype} {list(rows.shape)}; it must return"
      " the rows to visit, integers of shape [n] (for a mask, np.flatnonzero(mask))."
    )
  wrong = rows[(rows < 0) | (rows >= num_examples)]
  if wrong.size:
    raise base.InputError(
      f"the method's `sample` returned row {wrong[0]} of {num_examples} training"
      f" examples; rows are 0 to {num_examples - 1}."
    )
