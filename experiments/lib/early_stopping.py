"""Early stopping on the meta set, a control for methods that need clean data.

The run itself trains with uniform weights to its last step. At every evaluation, a
probe measures the loss on the meta set and the metrics of the test set. Afterwards, the
metrics at the step with the lowest loss on the meta set replace those of the last step;
the parameters are still those after the last step.
The test set does not influence this choice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import evaluation


def probe(
  evaluators: Sequence[evaluation.Evaluator], sizes: Sequence[int] = ()
) -> evaluation.Probe:
  """The probe that records what `at_lowest_loss` needs.

  Args:
    evaluators: evaluators of the test set.
    sizes: for each size n, the mean loss of the first n examples of the meta set is
      recorded. If empty, the mean loss of the whole meta set is recorded.
  """

  def measure(snapshot: evaluation.Snapshot) -> dict[str, float]:
    state, clean = snapshot.state, examples_lib.as_batch(snapshot.splits.meta)
    problem = snapshot.problem
    predictions = evaluation.predict(problem, state.params, state.model_state, clean)
    metrics = evaluation.measure(snapshot, evaluators, ())
    for size in sizes or (len(predictions.losses),):
      losses = predictions.losses[:size]
      metrics[f"clean_loss_{size}"] = float(losses.mean(dtype=np.float64))
    return metrics

  return measure


def at_lowest_loss(metrics: dict[str, Any], size: int) -> dict[str, Any]:
  """The test metrics at the step with the lowest loss on the meta set.

  Args:
    metrics: metrics of a finished run with `probe`.
    size: number of examples of the meta set whose loss is used.

  Returns:
    Like `metrics["last"]`, with the step as `kept_step`. If no loss is finite, the
    first evaluation is used.
  """
  values = metrics["probes"]
  losses = np.array(values[f"clean_loss_{size}"], float)  # None becomes NaN.
  best = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
  at_best = {
    name.removeprefix("test/"): column[best]
    for name, column in values.items()
    if name.startswith("test/")
  }
  return {**at_best, "kept_step": values["step"][best]}
