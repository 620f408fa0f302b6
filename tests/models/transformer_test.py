"""The vision transformer: its size, its formula, layerwise linearization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import transformer


def _small(**options):
  return transformer.VisionTransformer(3, width=16, depth=2, num_heads=2, **options)


def _images(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _variables(model, images):
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  # Random values, so that biases and scales affect the result.
  return jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32) + 0.1, shapes
  )


def test_parameters_match_a_manual_count():
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  model = transformer.VisionTransformer(10)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
  assert logits.shape == (2, 10)
  d = 128
  block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 4 * d + (4 * d + 1) * d
  outside = (4 * 4 * 3 + 1) * d + 64 * d + 2 * d + (d + 1) * 10
  total = sum(x.size for x in jax.tree.leaves(variables))
  assert total == 4 * block + outside == 809_098


def test_network_equals_numpy():
  images = _images(2, 8, 12, 3)
  model = _small()
  variables = _variables(model, images)
  p = variables["params"]

  def norm(x, layer):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * layer["scale"] + layer["bias"]

  patches = images.reshape(2, 2, 4, 3, 4, 3).swapaxes(2, 3).reshape(2, 6, 48)
  x = patches @ p["patches"]["kernel"].reshape(48, 16) + p["patches"]["bias"]
  x = x + p["positions"]
  for block in (p["block_0"], p["block_1"]):
    y = norm(x, block["norm_before_attention"])
    qkv = np.einsum("btd,dshk->sbthk", y, block["qkv"]["kernel"])
    q, k, v = qkv + block["qkv"]["bias"][:, None, None]
    scores = np.exp(np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshk->bthk", scores, v)
    x = x + np.einsum("bthk,hkd->btd", mixed, block["out"]["kernel"])
    x = x + block["out"]["bias"]
    y = norm(x, block["norm_before_dense"])
    y = y @ block["expand"]["kernel"] + block["expand"]["bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + y @ block["contract"]["kernel"] + block["contract"]["bias"]
  features = norm(x, p["norm"]).mean(1)
  expected = features @ p["head"]["kernel"] + p["head"]["bias"]
  result = jax.jit(functools.partial(model.apply, train=True))(variables, images)
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layerwise_linearization_is_supported():
  images, model = _images(5, 8, 8, 3), _small().clone(depth=1)
  variables = _variables(model, images)

  def losses_fn(params, batch):
    return losses.softmax_cross_entropy(model.apply(params, batch), jnp.arange(5) % 3)

  @functools.partial(jax.jit, static_argnums=1)
  def change(variables, engine):
    result = linearization.linearize(losses_fn, variables, images, engine=engine)
    return result.directional(variables)

  result = [change(variables, engine) for engine in ("layerwise", "forward")]
  np.testing.assert_allclose(*result, rtol=1e-4, atol=1e-4)


def test_half_precision_is_close_to_float32():
  images = _images(4, 8, 8, 3)
  model = _small(cosine=True)
  variables = _variables(model, images)
  whole = jax.jit(model.apply)(variables, images)
  assert whole.dtype == jnp.float32 and np.abs(whole).max() <= 1 + 1e-5
  half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)
  np.testing.assert_allclose(half(variables, images), whole, atol=0.05)
  traced = jax.eval_shape(
    functools.partial(model.clone(dtype=jnp.bfloat16).apply, method="features"),
    *(variables, images),
  )
  assert traced.dtype == jnp.bfloat16


def test_empty_batches_and_double_precision_are_supported(x64):
  images = _images(0, 8, 8, 3).astype(np.float64)
  model = _small(dtype=jnp.float64)
  outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
  assert outputs.dtype == jnp.float64 and outputs.shape[0] == 0


@pytest.mark.parametrize(
  ("options", "message"),
  [({"patch": 3}, "patch=3 does not divide"), ({"num_heads": 3}, "num_heads=3 does")],
)
def test_indivisible_sizes_are_refused(options, message):
  model = _small().clone(**options)
  with pytest.raises(base.InputError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), _images(1, 8, 8, 3))
