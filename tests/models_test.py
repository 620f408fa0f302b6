"""The shipped networks: sizes, shapes, pooling, batch statistics."""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import pooling
from l2rw_jax.models import resnet

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_lenet_has_the_parameters_of_the_released_code():
  logits, variables = _shapes(lenet.LeNet(1), 5, 28, 28, 1)
  assert logits.shape == (5, 1)
  assert _size(variables) == 167_113
  assert variables["params"]["Conv_0"]["kernel"].shape == (5, 5, 1, 16)
  assert variables["params"]["Dense_0"]["kernel"].shape == (4 * 4 * 64, 100)


def test_lenet_starts_with_truncated_weights_and_zero_biases():
  params = jax.jit(lenet.LeNet(2).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  for layer in params["params"].values():
    assert not layer["bias"].any()
    assert np.abs(layer["kernel"]).max() < 0.1 * 2 / 0.87  # What truncation leaves.


def test_resnet_32_has_the_parameters_of_the_paper():
  logits, variables = _shapes(resnet.ResNet(10), 2, 32, 32, 3)
  assert logits.shape == (2, 10)
  assert _size(variables["params"]) == 464_154
  kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
  assert len(kernels) == 6 * 5 + 2


@pytest.mark.parametrize("size", [8, 9])
def test_resnet_takes_images_of_any_size_and_halves_them_twice(size):
  model = resnet.ResNet(3, blocks=1, width=2)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
  )
  widths = [2] * 3 + [4] * 2 + [8] * 2
  found = [variables["params"][f"Conv_{i}"]["kernel"].shape[-1] for i in range(7)]
  assert found == widths


def test_running_statistics_move_only_in_training():
  model = resnet.ResNet(3, blocks=1, width=2)
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def run(train):
    apply = jax.jit(lambda v: model.apply(v, x, train=train, mutable=["batch_stats"]))
    return apply(variables)

  logits, state = run(train=False)
  assert np.isfinite(logits).all()
  chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])
  trained_logits, state = run(train=True)
  assert (np.abs(trained_logits - logits) > 1e-3).any()
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), state["batch_stats"], variables["batch_stats"]
  )
  assert all(jax.tree.leaves(moved))


def test_mlp_flattens_and_counts():
  logits, variables = _shapes(mlp.MLP(3, hidden=(7, 5)), 2, 4, 6)
  assert logits.shape == (2, 3)
  assert _size(variables) == (24 * 7 + 7) + (7 * 5 + 5) + (5 * 3 + 3)
  logits, variables = _shapes(mlp.MLP(3, hidden=()), 2, 4)
  assert logits.shape == (2, 3)
  assert _size(variables) == 4 * 3 + 3


def _reference(x, window, stride):
  return nn.max_pool(x, (window, window), (stride, stride), "SAME")


@pytest.mark.parametrize("shape", [(28, 28), (7, 7), (6, 5), (1, 2)])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (2, 3), (3, 1)])
def test_max_pool_is_that_of_flax(shape, window, stride):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *shape, 3)).astype(np.float32)

  def both(x):
    expected, expected_vjp = jax.vjp(lambda x: _reference(x, window, stride), x)
    actual, vjp = jax.vjp(lambda x: pooling.max_pool(x, window, stride), x)
    cotangent = jnp.cos(jnp.arange(expected.size, dtype=float)).reshape(expected.shape)
    return (actual, *vjp(cotangent)), (expected, *expected_vjp(cotangent))

  actual, expected = jax.jit(both)(x)
  np.testing.assert_array_equal(actual[0], expected[0])
  np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6, atol=1e-6)


def test_max_pool_hands_on_nan():
  for i in range(5):
    x = jnp.zeros((1, 5, 5, 1)).at[0, i, 2, 0].set(jnp.nan)
    np.testing.assert_array_equal(pooling.max_pool(x, 3, 2), _reference(x, 3, 2))


def test_max_pool_does_not_lose_gradient_to_ties():
  x = jnp.zeros((1, 4, 4, 1))
  gradient = jax.grad(lambda x: pooling.max_pool(x, 2, 2).sum())(x)
  np.testing.assert_array_equal(
    gradient.reshape(2, 2, 2, 2).sum((1, 3)), np.ones((2, 2))
  )
