"""Early stopping on the clean set, a control for methods that need clean data.

The run itself is uniform training for all steps. At every evaluation a probe measures
the loss on the clean set and whatever is measured on the test set; afterwards the
evaluation with the lowest loss on the clean set takes the place of the last one. The
test set has no part in the choice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import results as results_lib


def probe(
  evaluators: Sequence[evaluation.Evaluator], sizes: Sequence[int] = ()
) -> evaluation.Probe:
  """Measures what `kept` needs.

  Args:
    evaluators: of the test set.
    sizes: numbers of clean examples, the first ones of the meta set, to stop on; all
      of them if there is none.
  """

  def measure(snapshot: evaluation.Snapshot) -> dict[str, float]:
    state, clean = snapshot.state, examples_lib.as_batch(snapshot.splits.meta)
    found = evaluation.predict(snapshot.problem, state.params, state.model_state, clean)
    metrics = evaluation.measure(snapshot, evaluators, ())
    for size in sizes or (len(found.losses),):
      metrics[f"clean_loss_{size}"] = float(found.losses[:size].mean())
    return metrics

  return measure


def kept(metrics: dict[str, Any], size: int) -> dict[str, Any]:
  """The evaluators' metrics at the step with the lowest loss on the clean set.

  Args:
    metrics: of a finished run with `probe`.
    size: number of clean examples to stop on.

  Returns:
    As `metrics["last"]`, with the step as `kept_step`.
  """
  values = metrics["probes"]
  # A loss that overflowed is None.
  losses = np.array(values[f"clean_loss_{size}"], float)
  best = int(np.nanargmin(losses))
  at_best = {
    name.removeprefix("test/"): column[best]
    for name, column in values.items()
    if name.startswith("test/")
  }
  return {**at_best, "kept_step": values["step"][best]}


def with_kept(result: results_lib.Result, size: int) -> results_lib.Result:
  """A run whose last metrics are those of the step that early stopping chose.

  The parameters and their checksum stay those after the last step.

  Args:
    result: of a run with `probe`.
    size: number of clean examples to stop on.
  """
  last = kept(result.metrics, size)
  return result._replace(metrics={**result.metrics, "last": last})
