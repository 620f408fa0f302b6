"""Ghost products equal those of formed gradients; the cheaper form is chosen.

`per_example_test` compares whole networks with `vmap` of `grad`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.linearization import ghost_products
from l2rw_jax.linearization import parameter_uses

_B, _L, _R = 3, 5, 2


def _factors(num_positions, is_index=False):
  rng = np.random.default_rng(0)
  left = rng.normal(size=(_B, 1, num_positions, _L)).astype(np.float32)
  if is_index:  # Two positions of an example may look up the same row.
    left = rng.integers(_L, size=(_B, 1, num_positions))
  right = rng.normal(size=(_B, 1, num_positions, _R)).astype(np.float32)
  return ghost_products._Factors(
    0, (_L, _R), ((), (0,), (1,)), jnp.asarray(left), jnp.asarray(right)
  )


def _gradients(factors):
  """[B, L, R] in NumPy, as sums over positions."""
  left, right = np.asarray(factors.left)[:, 0], np.asarray(factors.right)[:, 0]
  if factors.is_index:
    left = np.eye(_L)[left]
  return np.einsum("btl,btr->blr", left, right)


@pytest.mark.parametrize(
  "uses",
  [
    [_factors(1)],
    [_factors(4)],
    [_factors(4, is_index=True)],
    [_factors(3), _factors(4, is_index=True)],  # A tied embedding.
  ],
  ids=["dense", "positions", "embedding", "tied"],
)
def test_ghost_products_are_those_of_the_formed_gradients(uses):
  expected = sum(_gradients(use) for use in uses)
  formed = sum(use.formed((_L, _R)) for use in uses)
  np.testing.assert_allclose(formed, expected, atol=1e-6)
  flat = expected.reshape(_B, -1)
  products = ghost_products._ghost_products(uses)
  np.testing.assert_allclose(products, flat @ flat.T, atol=1e-5)
  squares = ghost_products._ghost_squares(uses)
  np.testing.assert_allclose(squares, np.sum(flat**2, axis=1), rtol=1e-5)


def test_the_ghost_form_is_chosen_for_few_positions():
  # Ghost: 2 T^2 (L + R) = 14 T^2. Formed: 2 T L R + 2 L R = 20 T + 20.
  choices = [ghost_products._is_ghost_cheaper([_factors(t)], False, _B) for t in (1, 2)]
  assert choices == [True, True]  # 14 < 40 and 56 < 60.
  assert not ghost_products._is_ghost_cheaper([_factors(3)], False, _B)  # 126 > 80.


def test_parameters_in_a_loop_are_refused():
  def losses_fn(leaves, batch):
    def body(h, _):
      return jnp.tanh(h @ leaves[0]), None

    return jax.lax.scan(body, batch["x"], length=2)[0].sum(axis=1), None

  kernel, batch = jnp.eye(2), {"x": jnp.ones((_B, 2))}
  plan, *_ = parameter_uses.trace(losses_fn, [kernel], batch, ["kernel"])
  with pytest.raises(parameter_uses.NotLayerwiseError, match="used inside a scan"):
    ghost_products.uses_of(plan)


def test_sums_are_accumulated_in_float32():
  total = ghost_products.summed([jnp.float32([1.5]), jnp.float32([2.0])])
  assert total.dtype == jnp.float32 and total.tolist() == [3.5]
  assert ghost_products.wide(jnp.ones(1, jnp.bfloat16)).dtype == jnp.float32
