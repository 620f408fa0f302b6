"""The choice of the cheapest step that fits into a memory budget."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax.linearization import memory_plans
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net

_B, _LAYERS, _WIDTH = 256, 6, 16


def _losses_fn(params, x):
  for kernel in params:
    x = jax.nn.relu(x @ kernel)
  return (x**2).sum(1)


def _arguments():
  rng = np.random.default_rng(0)
  params = [
    rng.normal(size=(_WIDTH, _WIDTH)).astype(np.float32) / 4 for _ in range(_LAYERS)
  ]
  x, meta = rng.normal(size=(2, _B, _WIDTH)).astype(np.float32)
  return params, x, meta


def _l2rw(**options):
  return l2rw.weighted_value_and_grad(_losses_fn, **options)


def _meta_weight_net(**options):
  def step(params, x, meta):
    return meta_weight_net.network_gradient(
      lambda phi, values: jax.nn.sigmoid(phi * values),
      jnp.float32(1.0),
      _losses_fn,
      params,
      x,
      meta,
      optimizer=optax.sgd(0.1),
      **options,
    )

  return step


@functools.cache
def _sizes(make_step, plans):
  """The memory of the first four plans, from the compiler."""
  result = []
  for options in plans(_B)[:4]:
    compiled = jax.jit(make_step(**options)).lower(*_arguments()).compile()
    memory = compiled.memory_analysis()
    result.append(
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
    )
  return result


_METHODS = pytest.mark.parametrize(
  ("make_step", "plans"),
  [
    (_l2rw, memory_plans.l2rw_plans),
    (_meta_weight_net, memory_plans.meta_weight_net_plans),
  ],
)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@_METHODS
def test_the_first_plan_that_fits_is_chosen(make_step, plans):
  sizes, options = _sizes(make_step, plans), plans(_B)
  assert min(sizes[1:]) < sizes[0]
  first = next(i for i, size in enumerate(sizes) if size < sizes[0])
  for budget, expected in ((sizes[0], 0), (sizes[0] - 1, first)):
    choice = memory_plans.choose(make_step, _arguments(), options, budget)
    assert choice.options == options[expected]
    assert choice.num_bytes == sizes[expected] <= budget
  result = jax.tree.leaves(choice.step(*_arguments()))
  whole = jax.tree.leaves(jax.jit(make_step())(*_arguments()))
  numbers = [
    [np.asarray(x) for x in leaves if hasattr(x, "dtype")] for leaves in (result, whole)
  ]
  chex.assert_trees_all_close(*numbers, rtol=1e-4, atol=1e-5)


def test_donated_arguments_count_once():
  def make_step(donate_argnums):
    return jax.jit(lambda x: x + 1, donate_argnums=donate_argnums)

  x = jax.ShapeDtypeStruct((1000,), jnp.float32)
  plans = [{"donate_argnums": ()}, {"donate_argnums": 0}]
  choice = memory_plans.choose(make_step, [x], plans, 7999)
  assert choice.options == {"donate_argnums": 0} and choice.num_bytes == 4000
  assert memory_plans.choose(make_step, [x], plans, 8000).num_bytes == 8000


@pytest.mark.parametrize("batch_size", [0, -3, 5.0])
def test_batch_sizes_are_integers(batch_size):
  for plans in (memory_plans.l2rw_plans, memory_plans.meta_weight_net_plans):
    with pytest.raises(base.InputError, match=r"batch_size=.* must be an integer"):
      plans(batch_size)


def test_no_plan_fits():
  plans = [{}, {"engine": "forward"}]
  message = r"no plan fits into num_bytes=1000 .*: the smallest, .* needs 0\.\d MiB"
  with pytest.raises(base.InputError, match=message):
    memory_plans.choose(_l2rw, _arguments(), plans, 1000)


def test_plans_that_do_not_apply_are_left_out():
  @jax.custom_vjp
  def doubled(x):
    return 2 * x

  doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))

  def make_step(**options):
    # Neither the layerwise nor the forward engine supports a custom VJP of parameters.
    return l2rw.weighted_value_and_grad(lambda p, x: (x @ doubled(p)) ** 2, **options)

  args = jnp.ones(2), jnp.eye(2), jnp.ones((1, 2))
  plans = [{}, {"engine": "forward"}, {"engine": "reverse"}]
  choice = memory_plans.choose(make_step, args, plans, 2**20)
  assert choice.options == {"engine": "reverse"}
  with pytest.raises(base.InputError, match="without a forward-mode derivative"):
    memory_plans.choose(make_step, args, plans[:2], 2**20)
  with pytest.raises(base.InputError, match="plans is empty"):
    memory_plans.choose(make_step, args, [], 2**20)
