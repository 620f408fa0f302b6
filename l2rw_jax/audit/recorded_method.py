"""The statistics of training as a part of any method's state.

    method = audit.recording(baselines.uniform())
    (result,) = loop.train(config, model, method, optimizer, [splits], folder)
    issues = audit.find_label_issues(result.statistics, splits.train.label)

What is recorded belongs to the method's state. So it is saved in every checkpoint,
and an interrupted run continues with what it had.
"""

import functools
from typing import NamedTuple

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.audit import statistics as statistics_lib


class Recorded(NamedTuple):
  """What `recording` carries.

  Attributes:
    statistics: of the run so far.
    inner: the method's state.
  """

  statistics: statistics_lib.State
  inner: base.PyTree


@functools.lru_cache(maxsize=16)  # One program for all runs of a method.
def recording(method: base.Method) -> base.Method:
  """`method`, with the statistics of every training example recorded.

  Training is the same without. The logits are those of the training batch before the
  step's update, as the network is trained (dropout, batch statistics). They cost at
  most one forward pass a step, and none where XLA shares it with the method's own: on
  LeNet, recording adds 0.01% to the FLOPs of plain training and 15% to those of L2RW
  with as many clean examples. Weights are recorded, and so are the scores of methods
  that report them (L2RW). Wrap a method in other wrappers before this one.

  Args:
    method: of a classifier with one label an example.

  Returns:
    A `base.Method` whose state is a `Recorded` and whose `report` is `summarize`.
  """

  def init(key, problem, params):
    statistics = statistics_lib.init(problem.num_examples, max(problem.num_classes, 2))
    return Recorded(statistics, method.init(key, problem, params))

  def gradients(state, problem, inputs):
    found, inner = method.gradients(state.inner, problem, inputs)
    outputs, _ = problem.forward(
      inputs.params, inputs.model_state, inputs.batch, inputs.key, True
    )
    statistics = statistics_lib.update(
      state.statistics,
      inputs.batch["index"],
      losses.logits_of(outputs),
      inputs.batch["label"],
      found.weights,
      found.scores,
      axis_name=problem.axis_name,
    )
    return found, Recorded(statistics, inner)

  def refresh(state, problem, view):
    return state._replace(inner=method.refresh(state.inner, problem, view))

  def inner_sample(state, problem, train, rng):
    return method.sample(state.inner, problem, train, rng)

  # The loop treats these two functions specially: it does not look at the state.
  keeps = method.refresh is base.keep_state
  permutes = method.sample is base.permutation
  return method._replace(
    gradients=gradients,
    init=init,
    refresh=base.keep_state if keeps else refresh,
    sample=base.permutation if permutes else inner_sample,
    report=lambda state: statistics_lib.summarize(state.statistics),
  )
