"""The fast implementation of group normalization against that of flax."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import group_norm


def _random(*shape, seed=0):
  return jnp.asarray(3 * np.random.default_rng(seed).normal(size=shape) + 1, np.float32)


@pytest.mark.slow("shape0", "shape1")
@pytest.mark.parametrize("shape", [(4, 5, 6, 16), (3, 7, 24), (5, 24)])
def test_group_norm_equals_flax(shape):
  x = _random(*shape)
  layer, flax_layer = group_norm.GroupNorm(4), nn.GroupNorm(4)
  params = layer.init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, flax_layer.init(jax.random.key(0), x)
  )
  params = jax.tree.map(lambda p: p + _random(*p.shape, seed=1), params)
  cotangent = jnp.cos(_random(*shape, seed=2))

  def outcome(net):
    value, vjp = jax.vjp(net.apply, params, x)
    return value, vjp(cotangent)

  for a, b in zip(
    *map(jax.tree.leaves, (outcome(layer), outcome(flax_layer))), strict=True
  ):
    scale = np.max(np.abs(b))
    np.testing.assert_allclose(a / scale, b / scale, atol=3e-6)


@pytest.mark.slow
def test_constant_examples_have_finite_gradients():
  x = jnp.full((2, 4, 4, 8), 10.0)
  net = group_norm.GroupNorm(4)
  params = net.init(jax.random.key(0), x)
  gradient = jax.grad(lambda x: net.apply(params, x).sum())(x)
  np.testing.assert_allclose(net.apply(params, x), 0, atol=1e-2)
  assert np.all(np.isfinite(gradient))


def test_statistics_are_accumulated_in_float32():
  x = _random(2, 32, 32, 8)
  net = group_norm.GroupNorm(2)
  params = net.init(jax.random.key(0), x)
  result = net.apply(params, x.astype(jnp.bfloat16))
  assert result.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    result.astype(jnp.float32), net.apply(params, x), atol=0.03
  )


def test_groups_that_do_not_divide_the_channels_are_refused():
  with pytest.raises(base.InputError, match="num_groups=3 does not divide the 8"):
    group_norm.GroupNorm(3).init(jax.random.key(0), jnp.ones((1, 8)))
