"""Loops that allocate their results late compute the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.linearization import loop_buffers
from l2rw_jax.methods import l2rw

_B, _D, _LAYERS = 5, 4, 3


def _rows_of_every_type(x):
  """Stacked outputs of loops: numbers, Booleans and keys."""

  def forward(carry, row):
    key, used = jax.random.split(carry[1])
    h = jnp.tanh(carry[0] + row)
    return (h, key), (h, h > 0, jnp.int8(3), used, jnp.zeros((0, 2)))

  def outer(h, row):
    h, inner = jax.lax.scan(lambda h, y: (h * y, h), h + row, row[None])
    return h, (inner, h.astype(jnp.bfloat16))

  (h, _), (rows, signs, ints, keys, empty) = jax.lax.scan(
    forward, (x[0], jax.random.key(0)), x, reverse=True
  )
  draws = jax.vmap(lambda key: jax.random.uniform(key))(keys)
  h, inner = jax.jit(lambda h, x: jax.lax.scan(outer, h, x, unroll=2))(h, x)
  counts = jax.lax.scan(lambda i, _: (i + 1, i), 0, length=4)[1]
  none = jax.lax.map(jnp.sin, jnp.zeros((0, 3)))
  return h, rows, signs, ints, draws, empty, inner, counts, none


@pytest.mark.slow(unless=("jit",))
@pytest.mark.parametrize(
  "wrap", [jax.jit, lambda f: f, jax.vmap], ids=["jit", "eager", "vmap"]
)
def test_values_are_the_same(wrap):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, _D)), jnp.float32)
  x = x if wrap is jax.vmap else x[0]

  def allocated_late(x):
    return loop_buffers.allocated_after(
      {"nan": x * jnp.nan}, lambda: _rows_of_every_type(x)
    )

  actual, expected = wrap(allocated_late)(x), wrap(_rows_of_every_type)(x)
  for got, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(
      np.asarray(got, np.float64), np.asarray(wanted, np.float64), rtol=1e-6
    )


def _losses(params, x):
  @jax.checkpoint
  def recomputed(h, kernel):
    return h + jnp.tanh(h @ kernel), None

  def stored(h, kernel):
    return jnp.tanh(h @ kernel), (h**2).sum(1)

  h = jax.lax.scan(recomputed, x, params["first"])[0]
  h, rows = jax.lax.scan(stored, h, params["last"])
  return (h**2).sum(1) + rows.sum(0)


@pytest.mark.slow(unless=("5",))
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [_B, 40])
def test_both_orders_give_the_results_of_separate_calls(size):
  """With a batch of 5, only the wide parameters take more memory than activations.

  With a batch of 40, activations always take more.
  """
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(0.5 * rng.normal(size=(_LAYERS, _D, _D)))
    for name in ("first", "last")
  }
  wide = {**params, "unused": jnp.zeros(400)}
  batch, meta = (jnp.asarray(rng.normal(size=(size, _D))) for _ in range(2))

  def separate(params, engine):
    info = l2rw.example_weights(_losses, params, batch, meta, engine=engine)
    grads = jax.grad(lambda p: info.weights @ _losses(p, batch))(params)
    return info.scores, grads

  @jax.jit
  def run(params, wide):
    results, orders = [], []
    for engine in ("forward", "layerwise"):
      for given in (params, wide):
        (_, info), grads = l2rw.weighted_value_and_grad(_losses, engine=engine)(
          given, batch, meta
        )
        grads = {name: grads[name] for name in params}
        results.append((info.scores, grads))
        orders.append(info.order)
    return separate(params, "forward"), results, orders

  expected, results, orders = run(params, wide)
  assert orders == ["batches", "layers" if size == _B else "batches"] * 2
  for actual in results:
    for got, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
      np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
