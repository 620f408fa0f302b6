"""L2RW: cases in which a naive implementation is silently wrong."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import l2rw_jax
from l2rw_jax import base
from l2rw_jax import l2rw
from l2rw_jax import normalization


def losses_fn(params, batch):
  return (batch["x"] @ params - batch["y"]) ** 2


def problem(size: int, seed: int = 0):
  rng = np.random.default_rng(seed)

  def part(n):
    return {
      "x": rng.normal(size=(n, 3)).astype(np.float32),
      "y": rng.normal(size=n).astype(np.float32),
    }

  return jnp.ones(3), part(size), part(4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_two_mapped_axes_equal_one_device(check_vma):
  params, batch, clean = problem(8)
  fun = l2rw_jax.weighted_value_and_grad(losses_fn)
  (_, expected), grads = fun(params, batch, clean)
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def body(params, batch, clean):
    fun = l2rw_jax.weighted_value_and_grad(losses_fn, axis_name=("a", "b"))
    (_, info), grads = fun(params, batch, clean)
    return grads, info.scores, info.weights

  shards = P(("a", "b"))
  mapped = jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(P(), shards, shards),
    out_specs=(P(), shards, shards),
    check_vma=check_vma,
  )
  result = jax.jit(mapped)(params, batch, clean)
  wanted = (grads, expected.scores, expected.weights)
  for one, other in zip(result, wanted, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_nan_example_is_reported():
  params, batch, clean = problem(4)
  batch["x"][2] = np.nan
  with pytest.raises(
    FloatingPointError, match=r"1 of 4 training losses .* first in row 2"
  ):
    l2rw.example_weights(losses_fn, params, batch, clean)
  weigh = jax.jit(lambda *args: l2rw.example_weights(losses_fn, *args))
  result = weigh(params, batch, clean)
  assert not result.finite and np.isnan(result.weights).all()


def test_no_gradient_flows_through_the_weights():
  params, batch, clean = problem(4)

  def weighted(params):
    weights = l2rw.example_weights(losses_fn, params, batch, clean).weights
    return jnp.sum(weights * losses_fn(params, batch))

  _, grads = l2rw_jax.weighted_value_and_grad(losses_fn)(params, batch, clean)
  np.testing.assert_allclose(jax.grad(weighted)(params), grads, rtol=1e-5)


@pytest.mark.parametrize(
  ("scores", "expected"),
  [
    (np.float32([8e37] * 5), [0.2] * 5),
    (np.float16([1000] * 100), [0.01] * 100),
    (np.float32([2e-38, 2e-38]), [0.5, 0.5]),
  ],
)
def test_weights_of_extreme_scores(scores, expected):
  result = normalization.rectify(jnp.asarray(scores))
  np.testing.assert_allclose(result, expected, rtol=2e-3)


def test_weights_of_the_wrong_shape_are_refused():
  params, batch, _ = problem(4)
  linearized = l2rw_jax.linearize(losses_fn, params, batch)
  with pytest.raises(base.InputError, match=r"\(4,\).*\(3,\)"):
    linearized.weighted_gradient(jnp.ones(3))


def test_empty_meta_batch_is_refused_under_jit():
  params, batch, clean = problem(4)
  clean = {name: values[:0] for name, values in clean.items()}
  with pytest.raises(base.InputError, match="meta_batch is empty"):
    jax.jit(lambda: l2rw.example_weights(losses_fn, params, batch, clean))()


def test_params_with_a_function_are_refused_with_advice():
  params = {"w": jnp.ones(3), "activation": jnp.tanh}
  with pytest.raises(base.InputError, match=r"eqx\.partition"):
    l2rw_jax.linearize(lambda p, x: x @ p["w"], params, jnp.ones((2, 3)))


@pytest.mark.parametrize("where", ["training", "clean"])
def test_nan_loss_with_a_zero_gradient_is_not_finite(where):
  params, batch, clean = problem(4)

  def spoiled(params, batch):
    losses = losses_fn(params, batch)
    return jnp.where(jnp.arange(4) == 1, jnp.nan, losses)

  fns = {"training": (spoiled, losses_fn), "clean": (losses_fn, spoiled)}[where]

  def run(batch):
    return l2rw.example_weights(fns[0], params, batch, clean, meta_losses_fn=fns[1])

  with pytest.raises(FloatingPointError, match=r"1 of 4 .* losses .* first in row 1"):
    run(batch)
  result = jax.jit(run)(batch)
  assert not result.finite and np.isfinite(result.weights).all()


def test_opt_state_without_optimizer_is_refused():
  params, batch, clean = problem(4)
  with pytest.raises(base.InputError, match="opt_state without optimizer"):
    l2rw.example_weights(losses_fn, params, batch, clean, opt_state=())
