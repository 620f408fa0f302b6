"""The compiled program of one update: its memory and its size. Nothing is run.

The limits hold for XLA:CPU.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.methods import baselines
from l2rw_jax.training import step as step_lib

pytestmark = pytest.mark.usefixtures("optimized")


def _compiled(optimizer, shapes):
  """The step of a network of dense layers."""

  def forward(params, model_state, batch, key, train):
    del key, train
    x = batch["x"]
    for p in params:
      x = jax.nn.relu(x @ p)
    return x, model_state

  problem = base.Problem(
    forward=forward,
    loss=lambda outputs, _: (outputs**2).sum(1),
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=2,
    class_counts=jnp.array([2, 2]),
    num_examples=8,
    num_steps=10,
  )
  params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  state = jax.eval_shape(
    lambda params: step_lib.init_state(params, {}, (), optimizer), params
  )
  batch = {
    "x": jax.ShapeDtypeStruct((8, shapes[0][0]), jnp.float32),
    "label": jax.ShapeDtypeStruct((8,), jnp.int32),
  }
  step = functools.partial(
    step_lib.train_step,
    problem=problem,
    method=baselines.uniform(),
    optimizer=optimizer,
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.jit(step, donate_argnums=0).lower(state, batch, None, key).compile()


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
def test_only_the_gradient_is_kept_until_a_step_is_known_to_be_finite(optimizer):
  compiled = _compiled(optimizer, [(512, 512)] * 8)
  size = 8 * 512**2 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * size


def test_the_program_grows_in_proportion_to_the_number_of_parameter_arrays():
  """XLA must not repeat the check of all arrays in the update of each of them."""
  few, many = (
    len(_compiled(optax.sgd(0.1, momentum=0.9), [(8, 8)] * n).as_text())
    for n in (10, 40)
  )
  assert many < 4.5 * few
