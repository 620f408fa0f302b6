"""Reads row sources in other processes.

Most of the time to read a small image is spent in Python code, which holds the global
interpreter lock, so several threads are hardly faster than one. The worker processes
are spawned, because forking is unsafe once JAX runs threads. They receive the pickled
sources once, and then receive row numbers and return arrays.
"""

from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import process as process_futures
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from typing import Any

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib

# The sources of a worker process.
_sources: list[Any] = []


class Workers:
  """Worker processes that read rows of some sources."""

  def __init__(self, sources: Sequence[Any], num_workers: int):
    """Pickles the sources. The workers start when rows are first read.

    Args:
      sources: row sources, see `examples.Examples.image`.
      num_workers: number of worker processes.

    Raises:
      InputError: a source cannot be pickled.
    """
    try:
      content = pickle.dumps(list(sources))
    except Exception as error:  # Pickling calls methods of the sources.
      reason = str(error).partition("\n")[0]
      raise base.InputError(
        f"--data_workers={num_workers}: the training images cannot be sent to other"
        f" processes ({reason}). With --data_workers=0, threads of this process read"
        " the images."
      ) from error
    self._num_workers = num_workers
    self._pool = futures.ProcessPoolExecutor(
      num_workers,
      multiprocessing.get_context("spawn"),
      _start_worker,
      (content,),
    )

  def read(self, number: int, rows: np.ndarray) -> np.ndarray:
    """Rows [n, ...] of the source with this number; may be called in several threads.

    Raises:
      InputError: a worker process ended.
    """
    try:
      return self._pool.submit(_read, number, rows).result()
    except process_futures.BrokenProcessPool:
      raise base.InputError(
        f"--data_workers={self._num_workers}: a process that reads the training images"
        " ended. It may have run out of memory (use fewer processes), or it could not"
        " import the class of the images (define it in a module, and start training"
        ' under `if __name__ == "__main__":`). With --data_workers=0, threads of this'
        " process read the images."
      ) from None

  def close(self) -> None:
    """Ends the worker processes once they have finished their current reads."""
    self._pool.shutdown(cancel_futures=True)


class _ReadByWorkers:
  """A row source that worker processes read."""

  def __init__(self, workers: Workers, number: int, source: Any):
    self.shape, self.dtype = source.shape, source.dtype
    self._workers, self._number = workers, number

  def __len__(self):
    return self.shape[0]

  def __getitem__(self, rows):
    return self._workers.read(self._number, rows)


def read_by_workers(
  sets: Sequence[base.Batch], num_workers: int
) -> tuple[list[base.Batch], Workers | None]:
  """Replaces the row sources of sets with ones that worker processes read.

  Args:
    sets: for each run, arrays or row sources by name.
    num_workers: number of worker processes.

  Returns:
    The sets, and their workers (None if the sets contain only arrays).

  Raises:
    InputError: a source cannot be pickled.
  """
  sources: list[Any] = []
  places = []
  for run, one in enumerate(sets):
    for name, source in one.items():
      if not isinstance(source, np.ndarray | jax.Array):
        places.append((run, name))
        sources.append(source)
  if not sources:
    return list(sets), None
  workers = Workers(sources, num_workers)
  replaced = [dict(one) for one in sets]
  for number, (run, name) in enumerate(places):
    replaced[run][name] = _ReadByWorkers(workers, number, sources[number])
  return replaced, workers


def _start_worker(content: bytes) -> None:
  # Signals to the process group are meant for the training process, which may still
  # need examples for the step after which it saves a checkpoint.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  # Do not repeat the warnings that the training process has already logged.
  logging.disable(logging.WARNING)
  # Workers do not compute, and must not reserve an accelerator.
  jax.config.update("jax_platforms", "cpu")
  _sources[:] = pickle.loads(content)


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(0)


def _read(number: int, rows: np.ndarray) -> np.ndarray:
  return examples_lib.read_rows(_sources[number], rows)
