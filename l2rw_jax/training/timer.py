"""Seconds of training, without compilation, evaluations and checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import pathlib
import time
from typing import Any

from absl import logging

from l2rw_jax import base
from l2rw_jax.io import workdir

# Number of saved steps that are kept, which is more than the number of checkpoints.
_SAVED = 4


class Timer:
  """A stopwatch that can be saved and resumed.

  It includes the method's `refresh`, the loading of batches, epoch probes and all
  steps, but not compilation, evaluations with their probes, or checkpoints. It is saved
  in a separate file, so that no other file of a run depends on the speed of the run.
  """

  def __init__(
    self,
    seconds: float = 0.0,
    evaluations: Sequence[tuple[int, float]] = (),
    untimed_steps: int = 0,
    refreshes: Sequence[tuple[int, float]] = (),
  ):
    """Creates a stopped timer.

    Args:
      seconds: seconds of training so far.
      evaluations: (step, seconds) at each evaluation so far.
      untimed_steps: number of steps so far whose time is unknown.
      refreshes: (step, seconds) of each refresh so far that changed the state of the
        method: the number of steps taken before it, and its duration.
    """
    self._untimed_steps = untimed_steps
    self._seconds = seconds
    self._started: float | None = None
    self._evaluations = list(evaluations)
    self._refreshes = list(refreshes)
    self._saved: dict[str, float] = {}

  @classmethod
  def restore(cls, path: pathlib.Path, step: int) -> "Timer":
    """The timer of a run that continues from `step`.

    Args:
      path: the file that `write` wrote.
      step: number of updates so far; 0 for a new timer.

    Returns:
      The timer. If the file is missing, damaged or of another version, the timer starts
      at 0 with a warning instead of an error, because nothing else in the run depends
      on it.
    """
    if not step:
      return cls()
    try:
      record = workdir.read_record(path)
    except base.InputError as error:
      logging.warning("%s The first %d steps count as 0 seconds.", error, step)
      return cls(untimed_steps=step)
    needed = {"evaluations", "refreshes", "saved", "untimed_steps"}
    missing = needed - record.keys()
    if missing:
      logging.warning(
        "%s has no %s: another version wrote it. The first %d steps count as 0"
        " seconds.",
        *(path, min(missing), step),
      )
      return cls(untimed_steps=step)
    earlier = [(at, seconds) for at, seconds in record["evaluations"] if at <= step]
    last = earlier[-1][1] if earlier else 0.0
    seconds = record["saved"].get(str(step), last)
    # The refresh before `step` itself comes after the checkpoint and is repeated.
    refreshes = [(at, seconds) for at, seconds in record["refreshes"] if at < step]
    timer = cls(seconds, earlier, record["untimed_steps"], refreshes)
    # Checkpoints of earlier steps may still exist, and the newest may be damaged.
    kept = [(at, s) for at, s in record["saved"].items() if int(at) <= step]
    timer._saved = dict(sorted(kept, key=lambda item: int(item[0])))
    return timer

  def write(
    self, path: pathlib.Path, step: int, facts: Mapping[str, Any] | None = None
  ) -> None:
    """Saves the timer for a process that continues from `step`, and for reports.

    Args:
      path: the file.
      step: number of updates so far.
      facts: additional entries, such as settings that affect the speed.

    Raises:
      InputError: the file cannot be written.
    """
    self._saved = {**self._saved, str(step): self.read()}
    workdir.write_record(
      path,
      {
        "seconds": self.read(),
        "steps": step,
        "untimed_steps": self._untimed_steps,
        "evaluations": self._evaluations,
        "refreshes": self._refreshes,
        "saved": dict(list(self._saved.items())[-_SAVED:]),
        **(facts or {}),
      },
    )

  def start(self) -> None:
    """Starts or continues the timer, or has no effect if it is running."""
    self._seconds = self.read()
    self._started = time.perf_counter()

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    """Stops the timer inside a `with` block."""
    was_running = self._started is not None
    self._seconds, self._started = self.read(), None
    try:
      yield
    finally:
      if was_running:
        self.start()

  def read(self) -> float:
    """Seconds of training so far."""
    if self._started is None:
      return self._seconds
    return self._seconds + time.perf_counter() - self._started

  def note(self, step: int) -> None:
    """Records the seconds of training before the evaluation at `step`."""
    self._evaluations.append((step, self.read()))

  def note_refresh(self, step: int, seconds: float) -> None:
    """Records the seconds of a refresh that changed the state before `step`."""
    self._refreshes.append((step, seconds))
