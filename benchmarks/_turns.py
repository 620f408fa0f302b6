"""Contestants take turns, so that other work on the machine meets all alike."""

from collections.abc import Callable, Sequence
import math
import os
import time
from typing import Any, NamedTuple

import numpy as np

# A turn of several short steps is timed as a whole; the clock is finer by far.
_LEAST_SECONDS = 0.03
_LEAST_TURNS = 5


class Contestant(NamedTuple):
  """One way to take a training step.

  Attributes:
    method: its name.
    engine: how its derivatives are taken, where there is a choice.
    framework: "jax", "torch" or "torch.compile".
    run: takes so many steps, waits for the last, and returns its loss.
    facts: what else a row says of it.
  """

  method: str
  engine: str | None
  framework: str
  run: Callable[[int], float]
  facts: dict[str, Any]

  @property
  def label(self) -> str:
    """For people."""
    engine = "" if self.engine is None else f", {self.engine}"
    return f"{self.method}{engine} ({self.framework})"


class Turns(NamedTuple):
  """What was measured of one contestant.

  Attributes:
    seconds: of a step, by turn.
    steps: in a turn.
  """

  seconds: np.ndarray
  steps: int


def take(
  contestants: Sequence[Contestant], repeats: int, seconds: float, seed: int = 0
) -> list[Turns]:
  """Times the contestants, one turn each in every round, in an order by chance.

  Args:
    contestants: that have run before; one more step, not counted, tells how many
      make a turn.
    repeats: rounds at most.
    seconds: no new round begins after this long, except that five are made.
    seed: of the order.

  Returns:
    A `Turns` for each, in the order given; all of equally many rounds.

  Raises:
    FloatingPointError: a loss is not finite, and so the time that of another sum.
  """
  steps = [_steps_a_turn(contestant) for contestant in contestants]
  taken: list[list[float]] = [[] for _ in contestants]
  rng, started = np.random.default_rng(seed), time.perf_counter()
  for done in range(repeats):
    if done >= _LEAST_TURNS and time.perf_counter() - started > seconds:
      break
    for i in rng.permutation(len(contestants)):
      taken[i].append(_turn(contestants[i], steps[i]))
  return [Turns(np.array(s), n) for s, n in zip(taken, steps, strict=True)]


def _steps_a_turn(contestant):
  started = time.perf_counter()
  run(contestant, 1)
  return math.ceil(_LEAST_SECONDS / (time.perf_counter() - started))


def _turn(contestant, steps):
  if steps > 1:
    # The threads of the one before go to rest, and caches fill.
    run(contestant, 1)
  started = time.perf_counter()
  run(contestant, steps)
  return (time.perf_counter() - started) / steps


def num_cpus() -> int:
  """Processor cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def run(contestant: Contestant, steps: int) -> None:
  """Some steps, not timed; see `take` for what it raises."""
  loss = contestant.run(steps)
  if not math.isfinite(loss):
    raise FloatingPointError(f"{contestant.label}: the loss is {loss}.")


def summary(own: Turns, plain: Turns, peer: Turns | None) -> dict[str, Any]:
  """Columns of a row: medians over turns, ratios within the same turn.

  Args:
    own: turns of the contestant.
    plain: of plain training in the same framework.
    peer: of the same method in the other framework, if it is there.
  """
  quarters = (0.25, 0.5, 0.75)
  low, median, high = map(float, np.quantile(1e3 * own.seconds, quarters))
  least, ratio, most = map(float, np.quantile(own.seconds / plain.seconds, quarters))
  return {
    "milliseconds": median,
    "milliseconds_quartile_1": low,
    "milliseconds_quartile_3": high,
    "ratio": ratio,
    "ratio_quartile_1": least,
    "ratio_quartile_3": most,
    "plain_milliseconds": float(1e3 * np.median(plain.seconds)),
    "faster_than_torch": None
    if peer is None
    else float(np.median(peer.seconds / own.seconds)),
    "repeats": len(own.seconds),
    "steps_per_turn": own.steps,
  }
