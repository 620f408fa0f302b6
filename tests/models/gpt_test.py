"""The language model: its size, causality, and the engine for each of its forms."""

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import gpt
from l2rw_jax.models import transformer

_B, _T, _TOKENS = 3, 5, 7


def _small(**options):
  return gpt.GPT(_TOKENS, width=8, depth=2, num_heads=2, expansion=2, **options)


def _tokens():
  return np.random.default_rng(0).integers(_TOKENS, size=(_B, _T))


def _random(shapes):
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32) + 0.1, shapes
  )


def _params(model):
  tokens = jnp.asarray(_tokens())
  return _random(jax.eval_shape(model.init, jax.random.key(0), tokens))


def test_parameters_match_a_manual_count():
  d = 8
  block = 2 * 2 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 2 * d + (2 * d + 1) * d
  outside = _TOKENS * d + _T * d + 2 * d + (d + 1) * _TOKENS
  sizes = [x.size for x in jax.tree.leaves(_params(_small()))]
  assert sum(sizes) == 2 * block + outside


def test_a_position_does_not_see_later_ones():
  block = transformer.Block(2, 2, jnp.float32, causal=True)
  x = np.random.default_rng(2).normal(size=(_B, _T, 8)).astype(np.float32)
  params = _random(jax.eval_shape(block.init, jax.random.key(0), x))
  changed = x.copy()
  changed[:, -1] += 1
  before, after = jax.jit(jax.vmap(block.apply, (None, 0)))(
    params, np.stack([x, changed])
  )
  np.testing.assert_allclose(before[:, :-1], after[:, :-1], rtol=1e-5)
  assert np.abs(before[:, -1] - after[:, -1]).max() > 0.1


def test_both_forms_agree():
  """Layer by layer without `remat`, and in forward mode with it."""
  params = _params(_small())
  direction = jax.tree.map(lambda x: jnp.cos(9 * x), params)

  @jax.jit
  def run(params, tokens):
    def three(remat):
      model = _small(remat=remat)

      def losses_fn(params, tokens):
        logits = model.apply(params, tokens)
        return losses.softmax_cross_entropy(logits, jnp.arange(_B))

      lin = linearization.linearize(losses_fn, params, tokens, direction=direction)
      assert lin.engine == ("forward" if remat else "layerwise")
      gradient = lin.weighted_gradient(jnp.linspace(-1, 1, _B))
      return lin.losses, lin.directional(direction), gradient

    return three(False), three(True)

  actual, expected = jax.device_get(run(params, jnp.asarray(_tokens())))
  for x, y in zip(actual, expected, strict=True):
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    scale = max(np.abs(b).max() for _, b in pairs)
    assert max(np.abs(a - b).max() for a, b in pairs) / scale < 2e-6
