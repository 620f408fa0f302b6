"""NestedMAML: the published equations, shared weights, the method in the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import hypergradient
from l2rw_jax.methods import nested_maml
from l2rw_jax.models import few_shot

pytestmark = pytest.mark.usefixtures("quick_compilation")

_ALPHA, _ETA = 0.1, 0.05


def _quadratic(first_order=False, alpha=_ALPHA):
  """Scalar tasks (a, s, b, q): adapt on a (p - s)^2 / 2, loss b (p - q)^2 / 2."""

  def losses_fn(params, tasks):
    def loss(a, s, b, q):
      def support_fn(p, _):
        return 0.5 * a * (p - s) ** 2

      adapted = few_shot.adapt(
        support_fn, params, None, learning_rate=alpha, first_order=first_order
      )
      return 0.5 * b * (adapted - q) ** 2

    return jax.vmap(loss)(*tasks)

  return losses_fn


_TRAIN = tuple(np.array(x) for x in ([1.0, 2.0], [0.5, -1.0], [1.0, 1.5], [1.0, -2.0]))
_META = tuple(np.array(x) for x in ([1.0, 0.5], [0.8, 1.2], [1.0, 2.0], [1.1, 0.9]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("first_order", "gradient", "weights"),
  [
    (False, (-0.02732427, 0.06902974), (0.52732427, 0.43097026)),
    (True, (-0.02934440, 0.07413323), (0.52934440, 0.42586677)),
  ],
)
def test_equation_8_in_the_scalar_case(first_order, gradient, weights):
  before = jnp.array([0.5, 0.5])
  result = nested_maml.weight_gradient(
    _quadratic(),
    jnp.zeros(()),
    _TRAIN,
    _META,
    before,
    lookahead_learning_rate=_ETA,
    meta_losses_fn=_quadratic(first_order),
  )
  np.testing.assert_allclose(result.gradient, gradient, atol=5e-9)
  np.testing.assert_allclose(result.meta_loss, 0.63357877, atol=5e-9)
  after = nested_maml.update_weights(before, result.gradient, 1.0)
  np.testing.assert_allclose(after, weights, atol=5e-9)
  assert result.finite and result.aux is None


def _net_item_losses(params, x, y):
  return 0.5 * (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


def _net_losses(first_order=False, num_steps=1):
  """A small network on tasks {"x": [T, 2, n, d], "y": [T, 2, n]}: support, query."""

  def losses_fn(params, tasks):
    def loss(x, y):
      adapted = few_shot.adapt(
        lambda p, _: _net_item_losses(p, x[0], y[0]),
        params,
        None,
        learning_rate=_ALPHA,
        num_steps=num_steps,
        first_order=first_order,
      )
      return jnp.mean(_net_item_losses(adapted, x[1], y[1]))

    return jax.vmap(loss)(tasks["x"], tasks["y"])

  return losses_fn


def _net_tasks(seed, number):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(number, 2, 4, 3)),
    "y": rng.normal(size=(number, 2, 4)),
  }


def _net_params():
  rng = np.random.default_rng(9)
  return {"w": rng.normal(size=(3, 5)), "v": rng.normal(size=5)}


@functools.partial(jax.jit, static_argnames="with_hessian")
def _literal_equation_8(params, tasks, meta_tasks, weights, with_hessian):
  """-(eta / mn) sum_j grad_phi L_Vj . (g_i - alpha H_j g_i), with explicit Hessians."""
  flat, unflatten = jax.flatten_util.ravel_pytree(params)

  def support(p, tasks, i):
    return jnp.mean(_net_item_losses(unflatten(p), tasks["x"][i, 0], tasks["y"][i, 0]))

  def query(p, tasks, i):
    return jnp.mean(_net_item_losses(unflatten(p), tasks["x"][i, 1], tasks["y"][i, 1]))

  def adapted_loss(p, i):
    return query(p - _ALPHA * jax.grad(support)(p, tasks, i), tasks, i)

  m, n = len(tasks["x"]), len(meta_tasks["x"])
  g = [jax.grad(adapted_loss)(flat, i) for i in range(m)]
  ahead = flat - _ETA / m * sum(w * gi for w, gi in zip(weights, g, strict=True))
  total = [0.0] * m
  for j in range(n):
    phi = ahead - _ALPHA * jax.grad(support)(ahead, meta_tasks, j)
    slope = jax.grad(query)(phi, meta_tasks, j)
    hessian = jax.hessian(support)(ahead, meta_tasks, j)
    for i in range(m):
      correction = _ALPHA * hessian @ g[i] if with_hessian else 0.0
      total[i] += slope @ (g[i] - correction)
  return -_ETA / (m * n) * jnp.stack(total)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first_order", [False, True])
def test_equation_8_with_explicit_hessians_or_without(first_order):
  params, weights = _net_params(), np.array([0.5, 1.0, 2.0])
  tasks, meta_tasks = _net_tasks(0, 3), _net_tasks(1, 2)
  slopes_fn = functools.partial(
    nested_maml.weight_gradient,
    _net_losses(),
    lookahead_learning_rate=_ETA,
    meta_losses_fn=_net_losses(first_order),
  )
  result = jax.jit(slopes_fn)(params, tasks, meta_tasks, weights)
  literal = functools.partial(_literal_equation_8, params, tasks, meta_tasks, weights)
  expected = literal(with_hessian=not first_order)
  np.testing.assert_allclose(result.gradient, expected, rtol=1e-9)
  other = literal(with_hessian=first_order)
  assert np.abs(other / expected - 1).max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_several_inner_steps_equal_the_unrolled_step_and_finite_differences():
  losses_fn = _net_losses(num_steps=3)
  params, weights = _net_params(), np.array([0.5, 1.0, 2.0])
  tasks, meta_tasks = _net_tasks(0, 3), _net_tasks(1, 2)
  optimizer = optax.sgd(_ETA)

  @jax.jit
  def slopes_both_ways(weights):
    given = params, tasks, meta_tasks
    computed = nested_maml.weight_gradient(
      losses_fn, *given, weights, lookahead_learning_rate=_ETA
    )
    unrolled = hypergradient.unrolled_weight_gradient(
      losses_fn,
      losses_fn,
      *given,
      weights / 3,
      optimizer=optimizer,
      opt_state=optimizer.init(params),
    )
    return computed, unrolled

  result, unrolled = slopes_both_ways(weights)
  np.testing.assert_allclose(result.gradient, unrolled / 3, rtol=1e-9)

  @jax.jit
  def validation_loss(weights):
    slope = jax.grad(lambda p: jnp.mean(weights * losses_fn(p, tasks)))(params)
    ahead = jax.tree.map(lambda p, g: p - _ETA * g, params, slope)
    return jnp.mean(losses_fn(ahead, meta_tasks))

  for i, move in enumerate(1e-4 * np.eye(3)):
    up, down = validation_loss(weights + move), validation_loss(weights - move)
    np.testing.assert_allclose(result.gradient[i], (up - down) / 2e-4, rtol=1e-6)
  np.testing.assert_allclose(result.meta_loss, validation_loss(weights), rtol=1e-12)


def test_weights_are_clipped_and_floored():
  weights, gradient = jnp.array([1.0, 1.0, 1.0]), jnp.array([-9.0, 9.0, 0.3])
  update = functools.partial(nested_maml.update_weights, weights, gradient, 0.5)
  np.testing.assert_allclose(update(), [5.5, 0.0, 0.85])
  np.testing.assert_allclose(update(clip=0.5), [1.25, 0.75, 0.85])
  np.testing.assert_allclose(update(floor=0.9), [5.5, 0.9, 0.9])
  np.testing.assert_allclose(update(floor=-np.inf), [5.5, -3.5, 0.85])


# -- in the loop -------------------------------------------------------------
