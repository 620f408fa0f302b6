"""The multilayer perceptron: sizes."""

import jax
import jax.numpy as jnp
import pytest

from l2rw_jax.models import mlp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_input_is_flattened_and_parameters_are_counted():
  logits, variables = _shapes(mlp.MLP(3, hidden=(7, 5)), 2, 4, 6)
  assert logits.shape == (2, 3)
  assert _size(variables) == (24 * 7 + 7) + (7 * 5 + 5) + (5 * 3 + 3)
  logits, variables = _shapes(mlp.MLP(3, hidden=()), 2, 4)
  assert logits.shape == (2, 3)
  assert _size(variables) == 4 * 3 + 3
