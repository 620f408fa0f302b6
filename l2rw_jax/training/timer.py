"""How long training took, without the time spent on looking at it."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import pathlib
import time

from absl import logging

from l2rw_jax import base
from l2rw_jax.io import workdir

# Steps at which it was written that are kept, more than there are checkpoints.
_SAVED = 4


class Timer:
  """A stopwatch that is read at every evaluation and goes on after a resume.

  What counts is what training needs: the method's `refresh`, the batches, all the
  steps. What does not is compiling them, evaluations, probes and checkpoints. It is
  kept in a file of its own, because nothing else that a run leaves behind depends on
  how fast it was.
  """

  def __init__(
    self,
    seconds: float = 0.0,
    evaluations: Sequence[tuple[int, float]] = (),
    untimed_steps: int = 0,
  ):
    """Stopped, at what an earlier process had reached.

    Args:
      seconds: of training so far.
      evaluations: (step, seconds) of each so far.
      untimed_steps: how many of the steps so far took nobody knows how long.
    """
    self._untimed_steps = untimed_steps
    self._seconds = seconds
    self._started: float | None = None
    self._evaluations = list(evaluations)
    self._saved: dict[str, float] = {}

  @classmethod
  def restore(cls, path: pathlib.Path, step: int) -> "Timer":
    """The clock of a run that goes on from `step`.

    Args:
      path: of the file that `write` wrote.
      step: updates done; 0 for a new clock.

    Returns:
      The clock. Where the file is missing or damaged it begins at 0 and a warning
      says so, for nothing else of the run depends on it.
    """
    if not step:
      return cls()
    try:
      kept = workdir.read_record(path)
    except base.InputError as error:
      logging.warning("%s The %d steps before count as 0 seconds.", error, step)
      return cls(untimed_steps=step)
    then = [(at, seconds) for at, seconds in kept["evaluations"] if at <= step]
    last = then[-1][1] if then else 0.0
    return cls(kept["saved"].get(str(step), last), then, kept["untimed_steps"])

  def write(
    self, path: pathlib.Path, step: int, facts: Mapping[str, int] | None = None
  ) -> None:
    """Keeps it for a process that goes on from `step`, and for readers.

    Args:
      path: of the file.
      step: updates done.
      facts: further entries, on which the speed depends.
    """
    self._saved = {**self._saved, str(step): self.read()}
    workdir.write_record(
      path,
      {
        "seconds": self.read(),
        "steps": step,
        "untimed_steps": self._untimed_steps,
        "evaluations": self._evaluations,
        "saved": dict(list(self._saved.items())[-_SAVED:]),
        **(facts or {}),
      },
    )

  def start(self) -> None:
    """Goes on."""
    self._started = time.perf_counter()

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    """Stands still within a `with`."""
    self._seconds, self._started = self.read(), None
    yield
    self.start()

  def read(self) -> float:
    """Seconds of training so far."""
    if self._started is None:
      return self._seconds
    return self._seconds + time.perf_counter() - self._started

  def note(self, step: int) -> None:
    """Remembers when `step` was evaluated."""
    self._evaluations.append((step, self.read()))
