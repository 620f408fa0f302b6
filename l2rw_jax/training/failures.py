"""What to tell of a run whose losses or gradients became NaN or infinite."""

import numpy as np

from l2rw_jax import hypergradient
from l2rw_jax.training import step as step_lib


def first(failure: step_lib.Failure) -> int | None:
  """The run that failed first, of R with arrays [R]; None if all are well."""
  failed = np.flatnonzero(failure.step >= 0)
  return int(failed[np.argmin(failure.step[failed])]) if failed.size else None


def explain(failure: step_lib.Failure, run: int, batch_size: int) -> tuple[str, str]:
  """What happened to a run, and advice."""
  if count := int(failure.losses[run]):
    what = f"{count} of {batch_size} losses are NaN or infinite"
    return what, "Lower --learning_rate or look at the data."
  if failure.direction[run]:
    advice = f"If the clean images are sound, {hypergradient.OPTIMIZER_TRAP}"
    return "the direction is NaN or infinite", advice
  return "the update is NaN or infinite", "Lower --learning_rate."
