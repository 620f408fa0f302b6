"""The two functions of a run that are compiled: how it begins, and one step."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import optax

from l2rw_jax import base
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import step as step_lib


@functools.lru_cache(maxsize=8)
def functions(
  model: config_lib.Model,
  method: base.Method,
  optimizer: optax.GradientTransformation,
  num_examples: int,
  num_steps: int,
  num_runs: int,
  devices: tuple[jax.Device, ...],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """`(init, step)` for arrays of R runs; the same for every split of a table.

  A script trains one split after the other; keeping the functions keeps what
  was compiled for them.

  Args:
    model: the network and its loss.
    method: its `gradients` and `init`; the rest of it is not traced.
    optimizer: of the network.
    num_examples: N.
    num_steps: length of the run.
    num_runs: R.
    devices: to train on.

  Returns:
    init: `(keys [R], class_counts [R, C], examples [R, 1, ...]) -> TrainState`.
    step: `train_step` of arrays `[D, R, ...]`.
  """

  def task(class_counts, axis_name=None):
    return model.task(
      class_counts=class_counts,
      num_examples=num_examples,
      num_steps=num_steps,
      axis_name=axis_name,
    )

  def init(key, class_counts, example):
    params, model_state = model.init(jax.random.fold_in(key, 0), example)
    method_state = method.init(jax.random.fold_in(key, 1), task(class_counts), params)
    return step_lib.init_state(params, model_state, method_state, optimizer)

  def step(state, batch, meta_batch, key, class_counts):
    return step_lib.train_step(
      state,
      batch,
      meta_batch,
      key,
      task=task(class_counts, devices_lib.AXIS_NAME),
      method=method,
      optimizer=optimizer,
    )

  return (
    jax.jit(devices_lib.over_runs(init, num_runs)),
    devices_lib.pmap_step(step, num_runs, list(devices)),
  )
