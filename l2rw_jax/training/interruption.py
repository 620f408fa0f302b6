"""Signals that ask a run to stop, deferred until its state can be saved."""

from collections.abc import Iterator
import contextlib
import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
  """Defers SIGINT, SIGTERM and SIGHUP until the end of the `with`.

  The first signal is recorded, so that the caller can save its state and leave; it is
  raised again at the end, for the previous handler. A second signal is not deferred.
  Signals that the process ignores, such as SIGHUP under `nohup`, stay ignored.
  Outside of the main thread nothing is deferred.

  Yields:
    The signals received so far: a list that stays empty until one arrives.
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
      # None is a handler that was not installed from Python.
      if signal.getsignal(number) not in (signal.SIG_IGN, None):
        previous[number] = signal.signal(number, record)
  try:
    yield received
  finally:
    restore()
  if received:
    signal.raise_signal(received[0])
