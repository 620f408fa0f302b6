"""What to tell of a run whose losses or gradients became NaN or infinite."""

import numpy as np

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax.training import step as step_lib

_SCALE = "Look at the scale of the inputs and lower --learning_rate."
# What happened, and advice.
_FAULTS = {
  base.Fault.META_LOSSES: (
    "a clean loss, or the objective made of them, is NaN or infinite",
    "Look at the clean images and labels, or lower --learning_rate.",
  ),
  base.Fault.META_GRADIENT: (
    "the clean losses are finite, but their gradient is NaN or infinite",
    _SCALE,
  ),
  base.Fault.OPTIMIZER_STEP: (
    "the clean gradient is finite, but the look-ahead optimizer's step makes it NaN"
    " or infinite",
    f"With plain SGD it overflows: lower --learning_rate. Otherwise,"
    f" {hypergradient.OPTIMIZER_TRAP}",
  ),
  base.Fault.TRAINING_LOSSES: ("a training loss is NaN or infinite", _SCALE),
  base.Fault.SLOPES: (
    "the losses and the clean gradient are finite, but what the method makes of them"
    " (scores, weights or the gradient of its network) is NaN or infinite",
    _SCALE,
  ),
}


def first(failure: step_lib.Failure) -> int | None:
  """The run that failed first, of R with arrays [R]; None if all are well."""
  failed = np.flatnonzero(failure.step >= 0)
  return int(failed[np.argmin(failure.step[failed])]) if failed.size else None


def explain(failure: step_lib.Failure, run: int, batch_size: int) -> tuple[str, str]:
  """What happened to a run, and advice."""
  if count := int(failure.losses[run]):
    what = f"{count} of {batch_size} losses are NaN or infinite"
    return what, "Lower --learning_rate or look at the data."
  if fault := int(failure.fault[run]):
    return _FAULTS[base.Fault(fault)]
  return "the update is NaN or infinite", "Lower --learning_rate."
