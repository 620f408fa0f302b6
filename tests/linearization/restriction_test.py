"""Directional derivatives along some layers: exact for these layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.linearization import microbatching
from l2rw_jax.linearization import restriction


def _losses(params, x):
  for i in range(5):
    x = jnp.tanh(
      x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"][None]
    )
  return jnp.sum(x**2, axis=1)


def _problem():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {f"layer_{i}": {"kernel": normal(4, 4), "bias": normal(4)} for i in range(5)}
  params["count"] = jnp.array(3)
  return params, normal(6, 4), jax.tree.map(lambda x: normal(*x.shape), params)


def _masked(vector, names):
  return {
    name: layer if name in names else jax.tree.map(jnp.zeros_like, layer)
    for name, layer in vector.items()
  }


_LAYERS = {
  "names": (["layer_1/kernel", "layer_1/bias", "layer_4"], ("layer_1", "layer_4")),
  "predicate": (lambda path: path.startswith("layer_2/"), ("layer_2",)),
  "share": (0.41, ("layer_3", "layer_4")),
}


@pytest.mark.slow(unless=("predicate",))
@pytest.mark.parametrize("name", _LAYERS)
def test_directional_is_that_of_the_chosen_layers(name):
  layers, used = _LAYERS[name]
  params, x, vector = _problem()

  @jax.jit
  def results(params, x, vector):
    exact = linearization.linearize(_losses, params, x)
    weights = jnp.linspace(-1, 1, 6)
    pairs = []
    for engine, size in (("layerwise", None), ("forward", None), ("auto", 4)):
      linearize = restriction.restricted(linearization.linearize, layers)
      linearize = microbatching.microbatched(linearize, size)
      actual = linearize(_losses, params, x, engine=engine)
      pairs.append((actual.directional(vector), actual.weighted_gradient(weights)))
    expected = exact.directional(_masked(vector, used))
    return (expected, exact.weighted_gradient(weights)), pairs

  expected, pairs = results(params, x, vector)
  for actual in pairs:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_a_share_never_chooses_a_bias_without_its_kernel():
  params, x, vector = _problem()
  # The last two layers cost 40%. The kernel of a third one would exceed the share, but
  # its bias alone would not.
  linearize = restriction.restricted(linearization.linearize, 0.59)
  actual = linearize(_losses, params, x).directional(vector)
  expected = linearization.linearize(_losses, params, x).directional(
    _masked(vector, ("layer_3", "layer_4"))
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_layers_of_a_share_may_have_one_parent():
  rng = np.random.default_rng(0)
  params = {
    "net": [jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(4)]
  }
  x = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)

  def losses_fn(params, x):
    for kernel in params["net"]:
      x = jnp.tanh(x @ kernel)
    return x.sum(axis=1)

  actual = restriction.restricted(linearization.linearize, 0.5)(losses_fn, params, x)
  masked = {"net": [jnp.zeros((4, 4))] * 2 + params["net"][2:]}
  expected = linearization.linearize(losses_fn, params, x).directional(masked)
  np.testing.assert_allclose(actual.directional(params), expected, rtol=1e-5)


def test_a_share_chooses_both_parameters_of_a_normalized_kernel():
  rng = np.random.default_rng(0)
  params = [
    {"scale": rng.normal(size=4), "vector": rng.normal(size=(4, 4))} for _ in range(2)
  ]

  def losses_fn(params, x):
    for layer in params:
      v = layer["vector"]
      norms = jnp.linalg.norm(v, axis=0, keepdims=True)
      x = jnp.tanh(x @ (layer["scale"][None] * v / norms))
    return x.sum(axis=1)

  x = rng.normal(size=(6, 4))
  actual = restriction.restricted(linearization.linearize, 0.5)(losses_fn, params, x)
  masked = [jax.tree.map(np.zeros_like, params[0]), params[1]]
  expected = linearization.linearize(losses_fn, params, x).directional(masked)
  np.testing.assert_allclose(actual.directional(params), expected, rtol=1e-5)


@pytest.mark.slow
def test_central_differences_along_one_layer_are_close():
  params, x, vector = _problem()
  linearize = restriction.restricted(linearization.linearize, "layer_4")
  expected = linearize(_losses, params, x).directional(vector)
  actual = linearize(_losses, params, x, engine="difference").directional(vector)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("layers", "reason"),
  [
    (0.0, "must be a share"),
    (True, "must be a share"),
    ((), "must be a share"),
    ("layer", "no parameter has 'layer' among the components"),
    (lambda path: False, "selects no parameter"),
    (1e-3, r"the last layer \(layer_4/kernel\) alone costs more"),
    (np.float32(1e-3), r"the last layer \(layer_4/kernel\) alone costs more"),
    (np.int64(2), "must be a share"),
    (np.zeros(()), "must be a share"),
    ((name for name in ("layer_4",)), "must be a share"),
  ],
)
def test_wrong_layers_are_reported(layers, reason):
  params, x, _ = _problem()
  with pytest.raises(base.InputError, match=reason):
    restriction.restricted(linearization.linearize, layers)(_losses, params, x)


@pytest.mark.parametrize("layers", [0.5, "a"])
def test_errors_name_params_if_they_are_a_single_array(layers):
  linearize = restriction.restricted(linearization.linearize, layers)
  with pytest.raises(base.InputError, match=r"params \(a single array\)"):
    linearize(lambda p, x: x @ p, jnp.ones(2), jnp.eye(2))


def test_a_share_needs_the_layerwise_engine():
  params, x, _ = _problem()

  def normalized(params, x):
    return _losses(params, x - x.mean(0, keepdims=True))

  linearize = restriction.restricted(linearization.linearize, 0.5)
  with pytest.raises(base.InputError, match="Name the layers instead"):
    linearize(normalized, params, x)
