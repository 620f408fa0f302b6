"""Signals that ask a run to stop, put off until its state can be saved."""

from collections.abc import Iterator
import contextlib
import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
  """Puts off SIGINT, SIGTERM and SIGHUP until the end of the `with`.

  The first signal is noted, so that the caller can save its state and leave; it is
  raised again at the end, for the handler that was there before. A second signal
  is not put off. Signals that the process ignores, as SIGHUP under `nohup`, stay
  ignored. In other threads than the main one nothing is put off.

  Yields:
    The signals received so far: a list that stays empty until one arrives.
  """
  received: list[int] = []
  before: dict[int, Any] = {}

  def restore():
    for number, handler in before.items():
      signal.signal(number, handler)

  def note(number, frame):
    del frame
    received.append(number)
    restore()

  if threading.current_thread() is threading.main_thread():
    for number in _SIGNALS:
      # None is a handler that was not installed from Python.
      if signal.getsignal(number) not in (signal.SIG_IGN, None):
        before[number] = signal.signal(number, note)
  try:
    yield received
  finally:
    restore()
  if received:
    signal.raise_signal(received[0])
