"""Test results of a finished run as a function of its training time."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.io import metric_writer
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.training import callbacks


class Curve(NamedTuple):
  """One run's evaluations.

  Attributes:
    steps: number of steps taken before each evaluation, [E].
    seconds: seconds of training before each evaluation, [E].
    values: results on the test set, [E].
  """

  steps: np.ndarray
  seconds: np.ndarray
  values: np.ndarray

  def at(self, seconds: Any) -> Any:
    """The results after this many seconds of training.

    Results are interpolated linearly between evaluations. They are NaN before the first
    evaluation and constant after the last one.
    """
    return np.interp(seconds, self.seconds, self.values, left=np.nan)

  def reaches(self, value: float) -> float | None:
    """Seconds to the first evaluation with at least this result, or None."""
    reached = np.flatnonzero(self.values >= value)
    return float(self.seconds[reached[0]]) if reached.size else None


def read(folder: pathlib.Path, seed: int, name: str) -> Curve:
  """The curve of a finished run.

  Args:
    folder: folder with `timing.json`.
    seed: seed of the run.
    name: name of the metric on the test set, such as "accuracy".

  Raises:
    InputError: a file of the run is missing or damaged, or the seconds of the first
      steps are unknown.
  """
  timing = workdir_lib.read_record(folder / callbacks.TIMING)
  if timing["untimed_steps"]:
    raise base.InputError(
      f"{folder / callbacks.TIMING} was missing, damaged or of another version when the"
      f" run was resumed, so the seconds of the first {timing['untimed_steps']} steps"
      f" are unknown. Delete {folder} to train again."
    )
  measured = {
    line["step"]: line[f"test/{name}"]
    for line in metric_writer.read(folder / f"seed-{seed}")
    if line.get(f"test/{name}") is not None
  }
  steps, seconds = (np.array(x) for x in zip(*timing["evaluations"], strict=True))
  return Curve(steps, seconds, np.array([measured[step] for step in steps.tolist()]))


def refresh_seconds(folder: pathlib.Path) -> list[float]:
  """The seconds of every refresh that changed the state of the method, in order.

  Args:
    folder: folder with the `timing.json` of a finished run.

  Raises:
    InputError: the file is missing or damaged, or another version wrote it.
  """
  timing = workdir_lib.read_record(folder / callbacks.TIMING)
  if "refreshes" not in timing:
    raise base.InputError(
      f"{folder / callbacks.TIMING} has no refreshes: another version wrote it. Delete"
      f" {folder} to train again."
    )
  return [float(seconds) for _, seconds in timing["refreshes"]]
