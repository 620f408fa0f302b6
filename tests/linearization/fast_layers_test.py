"""Layers that are written for speed, against those of JAX and flax."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import activations
from l2rw_jax.models import group_norm

pytestmark = pytest.mark.usefixtures("optimized")


def _x(*shape, seed=0):
  return jnp.asarray(3 * np.random.default_rng(seed).normal(size=shape) + 1, np.float32)


def test_relu_and_its_slopes_are_those_of_jax():
  x = jnp.array([-jnp.inf, -2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf, jnp.nan])
  np.testing.assert_array_equal(activations.relu(x), jax.nn.relu(x))
  slope, expected = (
    jax.vmap(jax.grad(f))(x[:-1]) for f in (activations.relu, jax.nn.relu)
  )
  np.testing.assert_array_equal(slope, expected)
  assert activations.relu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(4, 5, 6, 16), (3, 7, 24), (5, 24)])
def test_group_norm_is_flax_s(shape):
  x = _x(*shape)
  ours, theirs = group_norm.GroupNorm(4), nn.GroupNorm(4)
  params = ours.init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, theirs.init(jax.random.key(0), x)
  )
  params = jax.tree.map(lambda p: p + _x(*p.shape, seed=1), params)
  cotangent = jnp.cos(_x(*shape, seed=2))

  def outcome(net):
    value, pull = jax.vjp(net.apply, params, x)
    return value, pull(cotangent)

  for a, b in zip(*map(jax.tree.leaves, (outcome(ours), outcome(theirs))), strict=True):
    scale = np.max(np.abs(b))
    np.testing.assert_allclose(a / scale, b / scale, atol=3e-6)


def test_group_norm_of_examples_that_are_constant():
  x = jnp.full((2, 4, 4, 8), 10.0)
  net = group_norm.GroupNorm(4)
  params = net.init(jax.random.key(0), x)
  gradient = jax.grad(lambda x: net.apply(params, x).sum())(x)
  np.testing.assert_allclose(net.apply(params, x), 0, atol=1e-2)
  assert np.all(np.isfinite(gradient))


def test_group_norm_sums_in_float32():
  x = _x(2, 32, 32, 8)
  net = group_norm.GroupNorm(2)
  params = net.init(jax.random.key(0), x)
  found = net.apply(params, x.astype(jnp.bfloat16))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), net.apply(params, x), atol=0.03)


def test_group_norm_refuses_groups_that_do_not_divide():
  with pytest.raises(base.InputError, match="num_groups=3 does not divide the 8"):
    group_norm.GroupNorm(3).init(jax.random.key(0), jnp.ones((1, 8)))
