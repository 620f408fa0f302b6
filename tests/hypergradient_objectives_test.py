"""A look-ahead towards another objective than the mean, on one device or many."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import hypergradient
from l2rw_jax import linearization

pytestmark = pytest.mark.usefixtures("x64")

_B, _M = 5, 4


def _data():
  rng = np.random.default_rng(0)
  return [
    {"x": rng.normal(size=(size, 3)), "y": rng.normal(size=size)} for size in (_B, _M)
  ]


def _params():
  rng = np.random.default_rng(1)
  return {"w": rng.normal(size=(3, 4)), "out": rng.normal(size=4)}


def _losses_fn(params, batch):
  return (jnp.tanh(batch["x"] @ params["w"]) @ params["out"] - batch["y"]) ** 2


def _peaked(values):
  """No mean: an objective whose gradient in a loss depends on all of them."""
  return jax.nn.logsumexp(3 * values) / 3 + (values[0] - values[-1]) ** 2


def test_another_objective_than_the_mean():
  batch, meta_batch = _data()
  optimizer, weights = optax.sgd(0.3), jnp.full(_B, 1 / _B)
  options = {"optimizer": optimizer, "opt_state": optimizer.init(_params())}
  options["objective"] = _peaked

  @jax.jit
  def both(params):
    linearized = linearization.linearize(_losses_fn, params, batch)
    gradient = linearized.weighted_gradient(weights)
    direction = hypergradient.direction(
      _losses_fn, params, meta_batch, gradient, **options
    )
    unrolled = hypergradient.unrolled_weight_gradient(
      _losses_fn, _losses_fn, params, batch, meta_batch, weights, **options
    )
    ahead = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    value = _peaked(_losses_fn(ahead, meta_batch))
    found = hypergradient.weight_gradient(linearized, direction)
    return (found, direction.meta_loss), (unrolled, value)

  found, expected = both(_params())
  assert np.abs(expected[0]).max() > 1e-3
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-10, atol=1e-14)
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-13)


def _shard_map(check_vma):
  def wrap(fun, axis_name):
    mesh = jax.make_mesh(
      (2,),
      (axis_name,),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:2],
    )
    split, whole = jax.sharding.PartitionSpec(axis_name), jax.sharding.PartitionSpec()
    return jax.shard_map(
      fun, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=check_vma
    )

  return wrap


def _stacked(map_fn):
  def wrap(fun, axis_name):
    mapped = map_fn(fun, axis_name=axis_name, in_axes=(None, 0))

    def run(params, meta_batch):
      parts = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), meta_batch)
      found = mapped(params, parts)
      first, second = (jax.tree.map(lambda x, i=i: x[i], found) for i in (0, 1))
      chex.assert_trees_all_close(second, first, rtol=1e-13)
      return first

    return run

  return wrap


@pytest.mark.parametrize(
  "wrap",
  [_stacked(jax.pmap), _stacked(jax.vmap), _shard_map(True), _shard_map(False)],
  ids=["pmap", "vmap", "shard_map", "shard_map_unchecked"],
)
@pytest.mark.parametrize("objective", [None, _peaked], ids=["mean", "peaked"])
def test_an_objective_is_of_the_losses_of_all_devices(wrap, objective):
  optimizer = optax.sgd(0.3)

  def run(axis_name):
    def direction(params, meta_batch):
      found = hypergradient.direction(
        _losses_fn,
        params,
        meta_batch,
        optimizer=optimizer,
        opt_state=optimizer.init(params),
        objective=objective,
        axis_name=axis_name,
      )
      return found.vector, found.meta_loss

    return direction

  meta_batch = _data()[1]
  expected = jax.jit(run(None))(_params(), meta_batch)
  found = wrap(run("parts"), "parts")(_params(), meta_batch)
  chex.assert_trees_all_close(found, expected, rtol=1e-12)
