"""Timing of several training steps in alternating turns.

In each round, every implementation takes one turn: a few steps that are timed as a
whole. Other load on the machine therefore affects all implementations equally.
"""

from collections.abc import Callable, Sequence
import math
import os
import time
from typing import Any, NamedTuple

import numpy as np

# Short steps are repeated within a turn until the turn is far longer than the
# resolution of the clock.
_MIN_SECONDS = 0.03
_MIN_TURNS = 5


class Implementation(NamedTuple):
  """One implementation of a training step.

  Attributes:
    method: the name of the method.
    engine: how the derivatives are computed; None if there is only one way.
    framework: "jax", "torch" or "torch.compile".
    run: takes the given number of steps, waits for the last one, and returns its loss.
    info: further columns of the row of results.
  """

  method: str
  engine: str | None
  framework: str
  run: Callable[[int], float]
  info: dict[str, Any]

  @property
  def label(self) -> str:
    """A readable name for messages."""
    engine = "" if self.engine is None else f", {self.engine}"
    return f"{self.method}{engine} ({self.framework})"


class Turns(NamedTuple):
  """The measurements of one implementation.

  Attributes:
    seconds: the seconds per step in each turn.
    steps: the number of steps in a turn.
  """

  seconds: np.ndarray
  steps: int


def take(
  implementations: Sequence[Implementation], repeats: int, seconds: float, seed: int = 0
) -> list[Turns]:
  """Times implementations in rounds; in each round, all take a turn in random order.

  Args:
    implementations: the implementations, which must have run before. One more step,
      which is not counted, determines the number of steps in a turn.
    repeats: the largest number of rounds.
    seconds: the number of seconds after which no new round begins, except for the
      first five rounds.
    seed: the seed of the random order.

  Returns:
    A `Turns` for each implementation, in the given order. All of them have the same
    number of rounds.

  Raises:
    FloatingPointError: if a loss is not finite: the time of such a step is not
      representative.
  """
  steps = [_steps_per_turn(implementation) for implementation in implementations]
  taken: list[list[float]] = [[] for _ in implementations]
  rng, started = np.random.default_rng(seed), time.perf_counter()
  for completed in range(repeats):
    if completed >= _MIN_TURNS and time.perf_counter() - started > seconds:
      break
    for i in rng.permutation(len(implementations)):
      taken[i].append(_turn(implementations[i], steps[i]))
  return [Turns(np.array(s), n) for s, n in zip(taken, steps, strict=True)]


def _steps_per_turn(implementation):
  started = time.perf_counter()
  run(implementation, 1)
  return math.ceil(_MIN_SECONDS / (time.perf_counter() - started))


def _turn(implementation, steps):
  if steps > 1:
    # Let the threads of the previous implementation become idle, and fill the caches.
    run(implementation, 1)
  started = time.perf_counter()
  run(implementation, steps)
  return (time.perf_counter() - started) / steps


def num_cpus() -> int:
  """Returns the number of processor cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def run(implementation: Implementation, steps: int) -> None:
  """Takes steps and checks that the last loss is finite.

  Raises:
    FloatingPointError: if the loss is not finite.
  """
  loss = implementation.run(steps)
  if not math.isfinite(loss):
    raise FloatingPointError(f"{implementation.label}: the loss is {loss}.")


def summary(turns: Turns, plain: Turns, peer: Turns | None) -> dict[str, Any]:
  """Computes the columns of a row: medians over turns, of times and of ratios.

  Ratios compare times within the same round.

  Args:
    turns: the measurements of the implementation.
    plain: the measurements of plain training in the same framework.
    peer: the measurements of the same method in PyTorch, or None.
  """
  quarters = (0.25, 0.5, 0.75)
  low, median, high = map(float, np.quantile(1e3 * turns.seconds, quarters))
  ratio_low, ratio, ratio_high = map(
    float, np.quantile(turns.seconds / plain.seconds, quarters)
  )
  return {
    "milliseconds": median,
    "milliseconds_quartile_1": low,
    "milliseconds_quartile_3": high,
    "ratio": ratio,
    "ratio_quartile_1": ratio_low,
    "ratio_quartile_3": ratio_high,
    "plain_milliseconds": float(1e3 * np.median(plain.seconds)),
    "faster_than_torch": None
    if peer is None
    else float(np.median(peer.seconds / turns.seconds)),
    "repeats": len(turns.seconds),
    "steps_per_turn": turns.steps,
  }
