"""Reads the training examples of upcoming steps in other threads, in bounded memory.

The rows of a step are those that `sampling` draws. A streamed run therefore gives the
same results as a run with resident data, and can be resumed at any step. A row is read
only for a step that uses it. The grain library runs the threads and returns their
results in order.
"""

from collections.abc import Callable
import os
from typing import Any

import numpy as np

from l2rw_jax import base

# Number of steps whose examples are read ahead and kept in memory.
STEPS_AHEAD = 8
# Each thread reads the examples of one step, or waits for a worker that reads them.
MOST_THREADS = STEPS_AHEAD


class Stream:
  """A `device_data.Store` that reads the examples of upcoming steps ahead.

  Attributes:
    num_bytes: 0, because no set is kept on the devices.
    steps_left: steps until the next call of `start`.
  """

  num_bytes = 0

  def __init__(self, read: Callable[[np.ndarray], Any]):
    """Stores the arguments; `start` starts the threads.

    Args:
      read: reads the examples of steps that take rows [D, R, K, b] (devices, runs,
        steps, examples of a device); called from several threads at once.
    """
    self.steps_left = 0
    self._read = read
    self._iterator: Any = None

  def start(self, num_steps: int, rows: Callable[[int], np.ndarray]) -> None:
    """Starts to read ahead the examples of the next steps.

    Args:
      num_steps: number of steps.
      rows: `i -> rows [D, R, 1, b]` of the i-th of these steps; called from several
        threads.

    Raises:
      InputError: grain is not installed.
    """
    try:
      import grain  # Installed with the experiments; not needed to import the package.
    except ImportError:
      raise base.InputError(
        "Streaming needs the package grain: pip install grain."
      ) from None
    self.close()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=STEPS_AHEAD)
    steps = grain.MapDataset.source(_Steps(num_steps, rows, self._read))
    self._iterator = iter(steps.to_iter_dataset(options))
    self.steps_left = num_steps

  def part(self, rows: np.ndarray) -> Any:
    """Waits for the examples of the next step.

    Args:
      rows: rows of the step, [D, R, 1, b].

    Returns:
      The result of `read` for these rows.
    """
    rows_read, part = next(self._iterator)
    self.steps_left -= 1
    if not np.array_equal(rows_read, rows):
      raise RuntimeError("the rows that were read ahead are not those of the step")
    return part

  def close(self) -> None:
    """Stops the threads."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None
    self.steps_left = 0


class _Steps:
  """A data source for grain: each step's rows and examples, read on demand."""

  def __init__(self, num_steps, rows, read):
    self._num_steps, self._rows, self._read = num_steps, rows, read

  def __len__(self):
    return self._num_steps

  def __getitem__(self, step):
    rows = self._rows(step)
    return rows, self._read(rows)
