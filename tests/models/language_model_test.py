"""The language model: its size, causality, scan and remat, the loss of a sequence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import language_model

_V, _T, _D = 7, 5, 8
_GPT = functools.partial(language_model.GPT, _V, _D, depth=2, num_heads=2, expansion=2)


def _tokens(size=3):
  return np.random.default_rng(0).integers(_V, size=(size, _T)).astype(np.uint8)


@functools.cache
def _params():
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(_GPT().init, jax.random.key(0), _tokens())["params"]
  return jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape) + 0.1).astype(np.float32), shapes
  )


def _stacked(params):
  blocks = [params["block_0"], params["block_1"]]
  others = {k: v for k, v in params.items() if not k.startswith("block_")}
  return {**others, "blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}


def test_parameters_match_a_manual_count():
  d, hidden = _D, 2 * _D
  block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * hidden
  block += (hidden + 1) * d
  expected = (_V + _T) * d + 2 * block + 2 * d
  assert sum(x.size for x in jax.tree.leaves(_params())) == expected


def test_logits_do_not_depend_on_later_tokens():
  run = jax.jit(lambda tokens: _GPT().apply({"params": _params()}, tokens))
  tokens = _tokens()
  changed = tokens.copy()
  changed[:, 3:] = (changed[:, 3:] + 1) % _V
  before, after = run(tokens), run(changed)
  assert before.shape == (3, _T, _V)
  np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-5)
  assert (np.abs(before[:, 3:] - after[:, 3:]).max(axis=(1, 2)) > 1e-3).all()


def test_scan_and_remat_change_neither_values_nor_gradients():
  tokens = _tokens()
  batch = {"image": tokens, "label": tokens.astype(np.int32)}

  def value_and_grad(params, **options):
    model = language_model.LanguageModel(_GPT(**options), _V)

    def loss(params):
      return model.loss(model.forward(params, {}, batch, None, True)[0], batch).sum()

    return jax.jit(jax.value_and_grad(loss))(params)

  value, gradient = value_and_grad(_params())
  for options in ({"remat": True}, {"scan": True, "remat": True}):
    stack = _stacked if "scan" in options else lambda tree: tree
    actual = value_and_grad(stack(_params()), **options)
    np.testing.assert_allclose(actual[0], value, rtol=1e-5)
    chex.assert_trees_all_close(actual[1], stack(gradient), rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_that_count():
  logits = np.random.default_rng(2).normal(size=(2, 3, _V)).astype(np.float32)
  labels = np.array([[1, 2, -1], [-1, -1, -1]], np.int32)
  model = language_model.LanguageModel(_GPT(), _V)
  actual = model.loss(jnp.asarray(logits), {"label": jnp.asarray(labels)})
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  expected = -(log_p[0, 0, 1] + log_p[0, 1, 2]) / 2
  np.testing.assert_allclose(actual, [expected, 0], rtol=1e-5)


def test_logits_of_a_half_precision_network_are_float32():
  variables = {"params": _params()}
  model = _GPT(dtype=jnp.bfloat16)
  assert jax.eval_shape(model.apply, variables, _tokens()).dtype == jnp.float32


def test_another_number_of_tokens_is_refused():
  model = language_model.LanguageModel(_GPT(), _V)
  with pytest.raises(base.InputError, match="of 7 tokens does not fit data of 256"):
    model.check({}, 256)
