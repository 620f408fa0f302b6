"""The GPT model: its size, causality, and the forms in which it can be computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import classifier
from l2rw_jax.models import gpt

_B, _T, _V, _D = 3, 5, 7, 8
_GPT = functools.partial(gpt.GPT, _V, _D, depth=2, num_heads=2, expansion=2)
_CLASSIFIER = {"tied": False, "last_only": True}


def _tokens():
  return np.random.default_rng(0).integers(_V, size=(_B, _T)).astype(np.uint8)


def _params(**options):
  rng = np.random.default_rng(1)
  model = _GPT(**options)
  shapes = jax.eval_shape(model.init, jax.random.key(0), _tokens())["params"]
  return jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape) + 0.1).astype(np.float32), shapes
  )


def _stacked(params):
  """The parameters of the same network with `scan=True`."""
  blocks = [params["block_0"], params["block_1"]]
  others = {k: v for k, v in params.items() if not k.startswith("block_")}
  return {**others, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


@pytest.mark.parametrize(
  ("options", "head"),
  [({}, 0), ({"scan": True}, 0), ({**_CLASSIFIER, "scan": True}, (_D + 1) * _V)],
)
def test_parameters_match_a_manual_count(options, head):
  d, hidden = _D, 2 * _D
  block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * hidden
  block += (hidden + 1) * d
  expected = (_V + _T) * d + 2 * block + 2 * d + head
  assert sum(x.size for x in jax.tree.leaves(_params(**options))) == expected


def test_logits_depend_on_positions_but_not_on_later_tokens():
  run = jax.jit(lambda tokens: _GPT().apply({"params": _params()}, tokens))
  tokens = _tokens()
  changed = tokens.copy()
  changed[:, 3:] = (changed[:, 3:] + 1) % _V
  before, after = run(tokens), run(changed)
  assert before.shape == (_B, _T, _V)
  np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-5)
  assert (np.abs(before[:, 3:] - after[:, 3:]).max(axis=(1, 2)) > 1e-3).all()
  # Without position embeddings, the logits of equal tokens would be equal.
  equal = run(np.zeros_like(tokens))
  assert (np.abs(np.diff(equal, axis=1)).max(axis=2) > 1e-3).all()


@pytest.mark.slow
def test_all_forms_agree():
  """Blocks one by one, in a loop, and in a loop with `remat`."""
  params = _params(**_CLASSIFIER)
  weights = jnp.linspace(-1, 1, _B)

  def make_losses_fn(**form):
    model = _GPT(**_CLASSIFIER, **form)

    def losses_fn(params, tokens):
      logits = model.apply({"params": params}, tokens)
      return losses.softmax_cross_entropy(logits, jnp.arange(_B))

    return losses_fn

  @jax.jit
  def run(params, direction, tokens):
    plain = make_losses_fn()
    results = [
      (
        *jax.jvp(lambda p: plain(p, tokens), (params,), (direction,)),
        _stacked(jax.grad(lambda p: weights @ plain(p, tokens))(params)),
      )
    ]
    params, direction = _stacked(params), _stacked(direction)
    for form, engine in (({}, "layerwise"), ({"remat": True}, "forward")):
      losses_fn = make_losses_fn(scan=True, **form)
      lin = linearization.linearize(losses_fn, params, tokens, direction=direction)
      assert lin.engine == engine
      gradient = lin.weighted_gradient(weights)
      results.append((lin.losses, lin.directional(direction), gradient))
    return results

  direction = jax.tree.map(lambda x: np.cos(9 * x), params)
  expected, *others = jax.device_get(run(params, direction, _tokens()))
  for actual in others:
    for x, y in zip(actual, expected, strict=True):
      pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
      scale = max(np.abs(b).max() for _, b in pairs)
      assert max(np.abs(a - b).max() for a, b in pairs) / scale < 2e-6


@pytest.mark.parametrize("options", [{}, _CLASSIFIER])
def test_logits_of_a_half_precision_network_are_float32(options):
  variables = {"params": _params(**options)}
  model = _GPT(dtype=jnp.bfloat16, **options)
  assert jax.eval_shape(model.apply, variables, _tokens()).dtype == jnp.float32


def test_a_classifier_does_not_scale_tokens_and_floats_are_refused():
  model = classifier.Classifier(_GPT(**_CLASSIFIER), _V)
  problem_params = _params(**_CLASSIFIER)
  run = jax.jit(
    lambda x: model.forward(problem_params, {}, x, jax.random.key(0), False)
  )
  tokens = _tokens()
  expected = run({"image": tokens.astype(np.int32)})[0]
  np.testing.assert_array_equal(run({"image": tokens})[0], expected)
  assert not (expected == expected[:1]).all()
  with pytest.raises(base.InputError, match="tokens must be integers; got float32"):
    run({"image": tokens.astype(np.float32)})


@pytest.mark.ci
@pytest.mark.parametrize("token", [-1, 5])
def test_tokens_outside_the_vocabulary_give_nan(token):
  model = gpt.GPT(5, 8, depth=1, num_heads=2)
  tokens = jnp.array([[0, 1]])
  logits, variables = model.init_with_output(jax.random.key(0), tokens)
  assert np.isfinite(logits).all()
  assert np.isnan(model.apply(variables, tokens.at[0, 1].set(token))).all()
