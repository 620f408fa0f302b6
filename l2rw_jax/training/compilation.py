"""The two compiled functions of a run: one initializes its state, one takes steps."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax.linearization import control_flow
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import device_data
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import step as step_lib


# Scripts may train several methods on one data set and then on the next one. Up to 16
# methods are then compiled only once.
@functools.lru_cache(maxsize=16)
def functions(
  model: config_lib.Model,
  method: base.Method,
  optimizer: optax.GradientTransformation,
  num_examples: int,
  num_steps: int,
  num_runs: int,
  devices: tuple[jax.Device, ...],
  device_map: str = "pmap",
) -> tuple[Callable[..., Any], Any]:
  """`(init, steps)` for arrays of R runs, cached.

  Scripts train on one split after another; the cache avoids recompiling the steps.

  Args:
    model: the network and its loss.
    method: only its `gradients`, `init` and `record` are used.
    optimizer: the optimizer of the network.
    num_examples: number of training examples of a run.
    num_steps: number of steps of the run.
    num_runs: R.
    devices: the devices that train, those of all processes.
    device_map: how the steps are mapped over them, one of `devices.MAPS`.

  Returns:
    init: `(keys [R], class_counts [R, C], examples [R, 1, ...]) -> TrainState`.
    steps: `(state, train, meta, keys, class_counts) -> (state, outputs)` for arrays
      `[D, R, ...]` on the D devices of this process. `train` and `meta` are those of
      `device_data.Batches`. `steps` applies `train_step` K times, once for each of the
      K batches in `train.rows`; the outputs are a `StepOutput` with arrays
      `[D, R, K, ...]`.
  """

  def problem(class_counts, axis_name=None):
    return model.problem(
      class_counts=class_counts,
      num_examples=num_examples,
      num_steps=num_steps,
      axis_name=axis_name,
    )

  def init(key, class_counts, example):
    params, model_state = model.init(jax.random.fold_in(key, 0), example)
    method_state = method.init(
      jax.random.fold_in(key, 1), problem(class_counts), params
    )
    return step_lib.init_state(params, model_state, method_state, optimizer)

  def steps(state, train, meta, key, class_counts):
    def step(state, rows):
      return step_lib.train_step(
        state,
        device_data.take(train.examples, rows[0]),
        None if meta is None else device_data.take(meta.examples, rows[1]),
        key,
        problem=problem(class_counts, devices_lib.AXIS_NAME),
        method=method,
        optimizer=optimizer,
      )

    rows = (train.rows, None if meta is None else meta.rows)
    if len(train.rows) > 1:
      return jax.lax.scan(control_flow.channels_last(step), state, rows)
    state, output = step(state, jax.tree.map(lambda x: x[0], rows))
    return state, jax.tree.map(lambda x: jnp.asarray(x)[None], output)

  return (
    jax.jit(devices_lib.over_runs(init, num_runs)),
    devices_lib.map_step(steps, num_runs, list(devices), device_map),
  )
