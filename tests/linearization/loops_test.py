"""The layerwise engine, for layers and time steps in a `jax.lax.scan`."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.linearization import microbatching

_B, _T, _D, _LAYERS = 5, 4, 6, 3
_FLAX_IN_FLOAT64 = pytest.mark.promotes("flax's layers mix float64 with float32")


def _array(*shape, seed=0):
  return 0.5 * np.random.default_rng(seed).normal(size=shape)


class _Block(nn.Module):
  """A transformer block with the signature that `nn.scan` expects."""

  dtype: str = "float64"

  @nn.compact
  def __call__(self, h, _):
    options = {"dtype": self.dtype, "param_dtype": "float64"}
    normed = nn.LayerNorm(**options)(h)
    h = h + nn.MultiHeadDotProductAttention(2, **options)(normed)
    y = nn.gelu(nn.Dense(8, **options)(nn.LayerNorm(**options)(h)))
    return h + nn.Dense(_D, **options)(y), None


def _scanned(block):
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=_LAYERS,
  )


class _Language(nn.Module):
  """Embeddings of tokens and positions, scanned blocks and tied output weights."""

  dtype: str = "float64"

  @nn.compact
  def __call__(self, tokens):
    table = nn.Embed(11, _D, param_dtype="float64")
    h = table(tokens) + self.param("positions", nn.initializers.normal(), (1, _T, _D))
    h, _ = _scanned(_Block)(self.dtype)(h.astype(self.dtype), None)
    return table.attend(h.astype("float64"))


class _Recurrent(nn.Module):
  """Two recurrent layers and a dense one."""

  @nn.compact
  def __call__(self, x):
    for cell in (nn.OptimizedLSTMCell, nn.GRUCell):
      x = nn.RNN(cell(_D, param_dtype="float64"))(x)
    return nn.Dense(3, param_dtype="float64")(x[:, -1])


def _language(dtype="float64"):
  tokens = np.random.default_rng(0).integers(11, size=(_B, _T))
  net = _Language(dtype)

  def losses_fn(params, tokens):
    log_probs = jax.nn.log_softmax(net.apply(params, tokens)[:, :-1])
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], 2).mean((1, 2))

  return net, losses_fn, tokens


def _recurrent():
  net, x = _Recurrent(), _array(_B, _T, 3)
  labels = jnp.arange(_B) % 3
  return net, lambda p, x: losses.softmax_cross_entropy(net.apply(p, x), labels), x


def _with_random_params(make):
  net, losses_fn, x = make()
  shapes = jax.eval_shape(net.init, jax.random.key(0), x)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda s: 0.1 + 0.3 * rng.normal(size=s.shape), shapes)
  return losses_fn, params, x


def _stacked(params, x):
  """Scanned layers with a counter and a key in the carry, and with stacked outputs."""

  def layer(carry, weights):
    h, i, key = carry
    key, used = jax.random.split(key)
    kept = jax.random.bernoulli(used, 0.8, h.shape[1:])
    scale = params["scale"][i][None] * weights["scale"]
    h = h + jnp.where(kept[None], jnp.tanh(h @ weights["kernel"] * scale), 0)
    return (h, i + 1, key), (h.mean(1), i)

  init = (x @ params["first"], 0, jax.random.key(0))
  (h, i, key), (means, indices) = jax.lax.scan(layer, init, params["layers"])
  noise = jax.random.normal(key, h.shape[1:]) * i + indices.sum()
  return (h * noise[None]).sum(1) + (means**2).sum(0)


def _penalized(params, x):
  """A scan with carries and stacked outputs that depend on parameters alone."""

  def layer(carry, weights):
    h, penalty, gain = carry
    gain = gain * weights["scale"][:, :1]
    h = jnp.tanh(h @ weights["kernel"]) * gain
    return (h, penalty + (weights["kernel"] ** 2).sum(), gain), gain.sum()

  init = (x @ params["first"], jnp.zeros(()), params["scale"][0, :1][None])
  (h, penalty, _), gains = jax.lax.scan(layer, init, params["layers"], reverse=True)
  return h.sum(1) * gains.prod() + penalty


def _nested(params, x):
  """Time steps within layers; all layers read an input with an example axis."""
  memory = jnp.cos(x)

  def layer(h, weights):
    def step(state, row):
      state = jnp.tanh(state @ weights["kernel"] + row @ params["first"])
      return state, state.sum(1)

    h, sums = jax.lax.scan(step, h, jnp.stack([memory, h[:, :4], memory**2]))
    return h * weights["scale"], sums.T

  _, sums = jax.lax.scan(layer, jnp.zeros((_B, _D)), params["layers"], unroll=2)
  return (sums**2).sum((0, 2))


def _indexed(params, x):
  """A `fori_loop` that indexes its weights by the loop counter."""

  def body(i, h):
    return jnp.tanh(h @ params["layers"]["kernel"][i]) + params["scale"][i][None]

  return jax.lax.fori_loop(0, _LAYERS, body, x @ params["first"]).sum(1)


def _mapped(params, x):
  """A loop that carries nothing, over matrices that multiply the same examples."""
  h = x @ params["first"]
  outputs = jax.lax.map(lambda w: jnp.tanh(h @ w), params["layers"]["kernel"])
  return (outputs.sum(0) ** 2).sum(1)


def _plain_network(losses_fn):
  """`losses_fn`, random parameters for the functions above, and inputs [_B, 4]."""
  params = {
    "first": _array(4, _D, seed=1),
    "scale": 1 + _array(_LAYERS, _D, seed=2),
    "layers": {
      "kernel": _array(_LAYERS, _D, _D, seed=3),
      "scale": 1 + _array(_LAYERS, 1, _D, seed=4),
    },
  }
  return losses_fn, params, _array(_B, 4)


@jax.custom_vjp
def _attention(query, key, value):
  """Attention whose backward rule recomputes the probabilities."""
  scores = jnp.einsum("btd,bsd->bts", query, key)
  return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), value)


def _attention_backward(saved, gradient):
  query, key, value = saved
  probs = jax.nn.softmax(jnp.einsum("btd,bsd->bts", query, key))
  grad_probs = jnp.einsum("btd,bsd->bts", gradient, value)
  mean = jnp.sum(grad_probs * probs, -1, keepdims=True)
  grad_scores = probs * (grad_probs - mean)
  return (
    jnp.einsum("bts,bsd->btd", grad_scores, key),
    jnp.einsum("bts,btd->bsd", grad_scores, query),
    jnp.einsum("bts,btd->bsd", probs, gradient),
  )


_attention.defvjp(lambda *qkv: (_attention(*qkv), qkv), _attention_backward)


def _attentive(params, x, attention=_attention):
  """Layers in which `jax.checkpoint` recomputes only the attention."""

  def layer(h, weights):
    values = jnp.tanh(h @ weights["kernel"])
    return h + jax.checkpoint(attention)(
      h, values, values * weights["scale"][None]
    ), None

  h = jnp.stack([x, x**2], 1) @ params["first"]
  return (jax.lax.scan(layer, h, params["layers"])[0] ** 2).sum((1, 2))


def _recomputed(params, x, attention=_attention):
  """Layers with attention, each recomputed as a whole, inside and outside a loop."""
  key = jax.random.key(0)

  def layer(h, weights):
    kept = jax.random.bernoulli(key, 0.8, h.shape[1:])[None]
    keys = (
      jnp.tanh(jnp.where(kept, h, 0) @ weights["kernel"]) + params["scale"][:1][None]
    )
    return h + attention(h, keys, keys * weights["scale"][None]), (h**2).sum(1)

  checkpointed = jax.checkpoint(layer)
  h = jnp.stack([x, x**2], 1) @ params["first"]
  h, sums = jax.lax.scan(checkpointed, h, params["layers"])
  h, _ = checkpointed(h, jax.tree.map(lambda w: w[0], params["layers"]))
  return (h**2).sum((1, 2)) + jnp.sin(sums).sum((0, 2))


def _adapted(params, x):
  """Parameters that each example changes in every iteration, as in MAML."""

  def loss(x):
    def step(kernel, _):
      return kernel - 0.1 * jax.grad(lambda k: ((x @ k) ** 2).sum())(kernel), None

    kernel, _ = jax.lax.scan(step, params["first"], None, length=2)
    return ((x @ kernel) ** 2).sum()

  return jax.vmap(loss)(x)


def _reset(params, x):
  """A carry with an example axis, which the body replaces by parameters."""

  def body(h, kernel):
    return kernel[:_B], (h @ kernel).sum(1)

  h, sums = jax.lax.scan(body, x @ params["first"], params["layers"]["kernel"])
  return sums.sum(0) + (h**2).sum(1)


_NETWORKS = {
  "stacked": lambda: _plain_network(_stacked),
  "penalized": lambda: _plain_network(_penalized),
  "nested": lambda: _plain_network(_nested),
  "indexed": lambda: _plain_network(_indexed),
  "mapped": lambda: _plain_network(_mapped),
  "attentive": lambda: _plain_network(_attentive),
  "recomputed": lambda: _plain_network(_recomputed),
  "adapted": lambda: _plain_network(_adapted),
  "reset": lambda: _plain_network(_reset),
  "language": lambda: _with_random_params(_language),
  "recurrent": lambda: _with_random_params(_recurrent),
}


def _like(tree, seed=9):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), tree)


def _results(losses_fn, params, x, engine):
  linearized = linearization.linearize(losses_fn, params, x, engine=engine)
  weights = jnp.linspace(-1, 2, _B).astype(linearized.losses.dtype)
  return (
    linearized.losses,
    linearized.directional(_like(params)),
    linearized.weighted_gradient(weights),
  )


def _error(actual, expected):
  """The largest difference, relative to the largest expected entry."""
  pairs = list(zip(*map(jax.tree.leaves, (actual, expected)), strict=True))
  scale = max(np.abs(y).max() for _, y in pairs)
  return max(np.abs(x - y).max() for x, y in pairs) / scale


@pytest.mark.ci(unless=("stacked", "recurrent", "adapted"))
@pytest.mark.slow("language", "penalized", "nested")
@pytest.mark.usefixtures("x64")
@_FLAX_IN_FLOAT64
@pytest.mark.parametrize("name", _NETWORKS)
def test_layerwise_equals_forward_mode(name):
  losses_fn, params, x = _NETWORKS[name]()

  reference = losses_fn
  if name in ("attentive", "recomputed"):
    # Forward mode does not support custom_vjp.
    reference = functools.partial(losses_fn, attention=_attention.__wrapped__)

  @jax.jit
  def both(params, x):
    return [
      _results(losses_fn, params, x, "layerwise"),
      _results(reference, params, x, "forward"),
    ]

  for actual, expected in zip(*jax.device_get(both(params, x)), strict=True):
    assert _error(actual, expected) < 1e-12


@pytest.mark.slow
def test_recomputed_layers_are_accurate_in_half_precision():
  """Compared with float32, the error is less than twice that of forward mode."""
  _, params, x = _plain_network(_recomputed)
  params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
  plain = functools.partial(_recomputed, attention=_attention.__wrapped__)

  @jax.jit
  def run(params, x):
    def results(network, dtype, engine):
      def losses_fn(params, x):
        params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
        return network(params, x).astype(jnp.float32)

      return _results(losses_fn, params, x, engine)

    return (
      results(_recomputed, "bfloat16", "layerwise"),
      results(plain, "bfloat16", "forward"),
      results(plain, "float32", "forward"),
    )

  for actual, other, exact in zip(*jax.device_get(run(params, x)), strict=True):
    assert _error(actual, exact) < 2 * _error(other, exact) < 0.5


def test_auto_takes_the_cheapest_engine_that_supports_the_model():
  _, params, x = _plain_network(_recomputed)
  params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))

  def engine(losses_fn):
    return linearization.linearize(losses_fn, params, x).engine

  plain = functools.partial(_recomputed, attention=_attention.__wrapped__)
  engines = [
    jax.eval_shape(functools.partial(engine, f))
    for f in (_attentive, _recomputed, plain)
  ]
  assert engines == ["layerwise", "layerwise", "forward"]


def test_auto_takes_the_layerwise_engine_if_the_model_recomputes_little():
  params = {"kernels": jnp.ones((3, 64, 64)), "scales": jnp.ones((3, 64))}
  x = jnp.ones((_B, 64))

  @jax.checkpoint
  def norm(h, scale):
    return h * jax.lax.rsqrt((h**2).mean(1, keepdims=True) + 1) * scale[None]

  def losses_fn(params, x):
    for kernel, scale in zip(params["kernels"], params["scales"], strict=True):
      x = x + jnp.tanh(norm(x, scale) @ kernel)
    return (x**2).sum(1)

  def lowered(engine, losses_fn):
    return jax.jit(lambda *args: _results(losses_fn, *args, engine)).lower(params, x)

  flops = {
    name: lowered(name, losses_fn).cost_analysis()["flops"]
    for name in ("auto", "layerwise", "forward")
  }
  assert flops["auto"] == flops["layerwise"] < 0.95 * flops["forward"]
  whole = [lowered(name, jax.checkpoint(losses_fn)) for name in ("auto", "forward")]
  assert whole[0].as_text() == whole[1].as_text()


def _mixing(backward):
  function = jax.custom_vjp(jnp.sin)
  function.defvjp(lambda h: (jnp.sin(h), h), backward)
  return function


_MIXING_RULES = {
  "mean": _mixing(lambda h, g: (jnp.cos(h) * g.mean(0, keepdims=True),)),
  "sort": _mixing(lambda h, g: (jnp.sort(h, axis=0) * g,)),
}


@pytest.mark.parametrize("name", _MIXING_RULES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["", "checkpoint"])
def test_a_backward_rule_that_mixes_examples_is_refused(name, wrap):
  def losses_fn(params, x):
    def layer(h, kernel):
      return wrap(_MIXING_RULES[name])(h @ kernel), None

    return jax.lax.scan(layer, x, params)[0].sum(1)

  params, x = jnp.ones((2, 4, 4)), jnp.asarray(_array(_B, 4), jnp.float32)
  with pytest.raises(base.InputError, match="custom_vjp_call, whose backward rule"):
    linearization.linearize(losses_fn, params, x, engine="layerwise")


@pytest.mark.ci
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [None, 2])
def test_results_of_a_loop_can_be_differentiated(size):
  params, vector, x = _array(3, 3), _array(3, 3, seed=1), _array(4, 3, seed=2)
  weights = _array(4, seed=3)

  def losses_fn(params, x):
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ params), None), x, length=2)
    return h.sum(axis=1) ** 2

  linearize = microbatching.microbatched(linearization.linearize, size)

  def slopes(params):
    return linearize(losses_fn, params, x).directional(vector).sum()

  def norm(params):
    return (linearize(losses_fn, params, x).weighted_gradient(weights) ** 2).sum()

  def expected_slopes(params):
    return jax.jvp(lambda p: losses_fn(p, x), (params,), (vector,))[1].sum()

  def expected_norm(params):
    gradient = jax.grad(lambda p: weights @ losses_fn(p, x))(params)
    return (gradient**2).sum()

  for actual, expected in ((slopes, expected_slopes), (norm, expected_norm)):
    np.testing.assert_allclose(
      jax.grad(actual)(params), jax.grad(expected)(params), rtol=1e-10
    )
