"""Signals that stop a run, deferred until the state of the run can be saved."""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import signal
import threading
from typing import Any

import jax

from l2rw_jax import base
from l2rw_jax import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
  """Defers SIGINT, SIGTERM and SIGHUP until the end of the `with` block.

  The first signal is recorded, so that the caller can save its state and leave the
  block. At the end of the block, the signal is raised again for the previous handler. A
  second signal is not deferred. Signals that the process ignores, such as SIGHUP under
  `nohup`, stay ignored. Outside of the main thread, no signal is deferred.

  Yields:
    A list of the signals that were received so far, which is empty at first.
  """
  received: list[int] = []
  previous: dict[int, Any] = {}

  def restore():
    for number, handler in previous.items():
      signal.signal(number, handler)

  def record(number, frame):
    del frame
    received.append(number)
    restore()

  if threading.current_thread() is threading.main_thread():
    for number in _SIGNALS:
      # None stands for a handler that was not installed from Python.
      if signal.getsignal(number) not in (signal.SIG_IGN, None):
        previous[number] = signal.signal(number, record)
  try:
    yield received
  finally:
    restore()
  if received:
    signal.raise_signal(received[0])


@contextlib.contextmanager
def agreed(signals: list[int]) -> Iterator[Callable[[], bool]]:
  """Lets all processes stop between the same two calls of the compiled step.

  Args:
    signals: the list that `deferred` yields. The signal of another process is appended
      to it.

  Yields:
    A function that must be called before every call of the step. It returns whether to
    stop. A single process stops after its first signal.
  """
  if processes.count() == 1:
    yield lambda: bool(signals)
    return
  agreement = _Agreement(signals)
  try:
    yield agreement.stops
  finally:
    agreement.close()


_numbers = itertools.count()  # Numbers the agreements, the same in all processes.
_POLL_SECONDS = 0.5


class _Agreement:
  """Decides after how many calls of the step all processes stop.

  The devices of one process wait for those of the others, so all processes must make
  the same calls. In each process, a thread looks for a signal of any process in the
  store of the coordination service. If there is one, the thread keeps its process from
  starting more calls, and publishes how many have been started. All processes then make
  as many calls as the process that had started the most. The main thread only counts
  calls, under a lock that is usually free.
  """

  def __init__(self, signals: list[int]):
    self._signals = signals
    self._prefix = f"l2rw_jax/stop/{next(_numbers)}"
    self._lock = threading.Lock()
    self._num_calls = 0
    self._is_held = False
    self._decided = threading.Event()
    self._last_call = 0
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def stops(self) -> bool:
    """Counts a call, or returns True after the last one."""
    with self._lock:
      if not self._is_held:
        self._num_calls += 1
        return False
    while not self._decided.wait(1.0):  # Signal handlers run between two waits.
      pass
    if self._num_calls >= self._last_call:
      return True
    self._num_calls += 1
    return False

  def close(self) -> None:
    """Ends the thread, and publishes the number of calls if the thread did not."""
    self._closed.set()
    self._thread.join()
    if not self._is_held:
      processes.client().key_value_set(
        f"{self._prefix}/{processes.index()}", str(self._num_calls)
      )

  def _watch(self):
    # If the connection is lost, the main thread reports it.
    try:
      number = self._request()
      if number is not None:
        self._decide(number)
    except (jax.errors.JaxRuntimeError, base.InputError):
      pass
    finally:
      self._decided.set()

  def _request(self):
    """The signal that one of the processes received; None if training ends first."""
    client, key = processes.client(), f"{self._prefix}/signal"
    while not self._closed.wait(_POLL_SECONDS):
      if self._signals:
        number = str(self._signals[0])
        client.key_value_set(key, number, allow_overwrite=True)
        return int(number)
      try:
        return int(client.key_value_try_get(key))
      except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("NOT_FOUND"):
          raise
    return None

  def _decide(self, number):
    with self._lock:
      self._is_held = True
      num_calls = self._num_calls
    client = processes.client()
    client.key_value_set(f"{self._prefix}/{processes.index()}", str(num_calls))
    counts = [
      int(processes.wait_for(f"{self._prefix}/{process}"))
      for process in range(processes.count())
    ]
    self._last_call = max(counts)
    if not self._signals:
      self._signals.append(number)
