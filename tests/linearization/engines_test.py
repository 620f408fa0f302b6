"""Losses, J v and J^T w of every engine against the explicit Jacobian, and errors."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.linearization import microbatching

_B = 5
_EXACT = ("auto", "layerwise", "forward", "reverse")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("w", "b"), meta_fields=()
)
@dataclasses.dataclass
class _Dataclass:
  w: Any
  b: Any


class _Tuple(NamedTuple):
  w: Any
  b: Any


_CONTAINERS = {
  "dict": lambda w, b: {"w": w, "b": b},
  "tuple": lambda w, b: (w, b),
  "dataclass": _Dataclass,
  "namedtuple": _Tuple,
}


def _x(dtype=np.float64):
  return np.random.default_rng(0).normal(size=(_B, 3)).astype(dtype)


def _losses_fn(params, x):
  """`params` is any container of a matrix w and a scalar b."""
  w, b = sorted(jax.tree.leaves(params), key=jnp.ndim, reverse=True)
  return jnp.sum(jnp.tanh(x @ w + b) ** 2, axis=1) + jnp.sin(b * x[:, 0])


def _like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=np.shape(x)).astype(x.dtype), tree)


def _explicit(losses_fn, params, batch, vector, weights):
  """(J v, J^T w), computed from the explicit Jacobian."""
  jacobian = jax.jit(jax.jacrev(losses_fn))(params, batch)
  products = jax.tree.map(
    lambda j, v: jnp.tensordot(j, v, jnp.ndim(v)), jacobian, vector
  )
  gradient = jax.tree.map(lambda j: jnp.tensordot(weights, j, 1), jacobian)
  return sum(jax.tree.leaves(products)), gradient


def _results(losses_fn, params, batch, vector, weights, **options):
  """Losses, J v and J^T w."""
  linearized = linearization.linearize(losses_fn, params, batch, **options)
  return (
    linearized.losses,
    linearized.directional(vector),
    linearized.weighted_gradient(weights),
  )


def _relative_error(actual, expected):
  return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("container", _CONTAINERS)
def test_engines_equal_the_explicit_jacobian(container):
  params = _CONTAINERS[container](np.arange(6.0).reshape(3, 2) / 5, np.float64(0.3))
  vector, weights = _like(params, 1), np.array([0.5, 0.0, -1.0, 2.0, 0.1])
  expected = _explicit(_losses_fn, params, _x(), vector, weights)
  for engine in linearization.ENGINES:
    values, directional, gradient = jax.jit(
      functools.partial(_results, _losses_fn, engine=engine)
    )(params, _x(), vector, weights)
    np.testing.assert_allclose(values, _losses_fn(params, _x()), rtol=1e-14)
    tolerance = 1e-12 if engine in _EXACT else 1e-7
    assert _relative_error(directional, expected[0]) < tolerance
    chex.assert_trees_all_close(gradient, expected[1], rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("engine", ["layerwise", "forward", "reverse"])
def test_a_known_direction_does_not_change_the_results(engine):
  params = {"w": np.arange(6.0).reshape(3, 2) / 5, "b": np.float64(0.3)}
  vector, weights = _like(params, 1), np.linspace(-1, 1, _B)

  @jax.jit
  def run(params, vector):
    linearized = linearization.linearize(
      _losses_fn, params, _x(), engine=engine, direction=vector
    )
    double = jax.tree.map(lambda v: 2 * v, vector)
    return (
      linearized.losses,
      linearized.directional(vector),
      linearized.directional(double) / 2,
      linearized.weighted_gradient(weights),
    )

  losses_, directional, half, gradient = run(params, vector)
  expected = _explicit(_losses_fn, params, _x(), vector, weights)
  np.testing.assert_allclose(losses_, _losses_fn(params, _x()), rtol=1e-14)
  assert _relative_error(directional, expected[0]) < 1e-12
  assert _relative_error(half, expected[0]) < 1e-12
  chex.assert_trees_all_close(gradient, expected[1], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_unit_vectors_give_the_gradient_of_each_example():
  params = {"w": np.arange(6.0).reshape(3, 2) / 5, "b": np.float64(0.3)}
  linearized = linearization.linearize(_losses_fn, params, _x())
  actual = jax.vmap(linearized.weighted_gradient)(jnp.eye(_B))

  def loss_fn(params, example):
    return _losses_fn(params, example[None])[0]

  expected = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, _x())
  chex.assert_trees_all_close(actual, expected, rtol=1e-12)


@pytest.mark.slow("eager-difference", "eager-reverse", "eager-forward")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("engine", linearization.ENGINES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_fixed_leaves_have_zero_gradients(engine, wrap):
  trainable = {"w": np.arange(6.0).reshape(3, 2) / 5, "b": np.float64(0.3)}
  fixed = {
    "count": jnp.int32(2),
    "mask": jnp.array([True, False]),
    "key": jax.random.key(3),
    "none": None,
  }

  def losses_fn(params, x):
    shift = jax.random.uniform(params["key"]) + params["mask"].sum().astype(float)
    values = _losses_fn({k: params[k] for k in ("w", "b")}, x)
    return values * params["count"].astype(float) + shift

  linearize = functools.partial(_results, losses_fn, engine=engine)
  params, vector = trainable | fixed, _like(trainable, 1)
  weights = jnp.arange(_B) / _B
  values, directional, gradient = wrap(linearize)(params, _x(), vector | fixed, weights)
  expected_directional, expected_gradient = _explicit(
    _losses_fn, trainable, _x(), vector, weights
  )
  tolerance = 1e-12 if engine in _EXACT else 1e-7
  assert _relative_error(directional, 2 * expected_directional) < tolerance
  np.testing.assert_allclose(values, losses_fn(params, _x()), rtol=1e-14)
  for name, expected in expected_gradient.items():
    np.testing.assert_allclose(gradient[name], 2 * expected, rtol=1e-12)
  assert gradient["count"].dtype == jnp.int32
  assert gradient["mask"].dtype == jnp.bool
  assert not gradient["mask"].any() and not gradient["count"]
  assert gradient["key"].dtype == jax.dtypes.float0
  assert gradient["none"] is None
  # A gradient has the structure of a vector.
  chex.assert_trees_all_equal(
    wrap(linearize)(params, _x(), gradient, weights)[0], values
  )


@pytest.mark.parametrize("engine", linearization.ENGINES)
@pytest.mark.parametrize("params", [{"count": jnp.int32(3)}, {}, [np.ones(3, int)]])
def test_params_without_a_trainable_leaf_are_refused(engine, params):
  with pytest.raises(base.InputError, match="params has no floating-point array"):
    linearization.linearize(lambda p, x: x[:, 0], params, _x(), engine=engine)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3, param_dtype=float)(x)
    x = nn.BatchNorm(use_running_average=False, param_dtype=float)(x)
    return nn.Dense(2, param_dtype=float)(nn.tanh(x))


@pytest.mark.ci
@pytest.mark.promotes("flax keeps running statistics in float32, here next to float64")
@pytest.mark.usefixtures("x64")
def test_engines_differentiate_batch_statistics():
  variables = jax.jit(_Net().init)(jax.random.key(0), _x())
  params, labels = variables.pop("params"), np.array([0, 1, 0, 1, 1])

  def losses_fn(params, x):
    logits, new_state = _Net().apply(
      {"params": params, **variables}, x, mutable="batch_stats"
    )
    return losses.softmax_cross_entropy(logits, labels), new_state

  vector, weights = _like(params, 1), np.arange(_B) / _B
  expected = _explicit(lambda *args: losses_fn(*args)[0], params, _x(), vector, weights)
  for engine in ("auto", "forward", "reverse", "difference"):

    def linearize(params, vector, engine=engine):
      linearized = linearization.linearize(
        losses_fn, params, _x(), has_aux=True, engine=engine
      )
      directional = linearized.directional(vector)
      return directional, linearized.weighted_gradient(weights), linearized.aux

    directional, gradient, aux = jax.jit(linearize)(params, vector)
    tolerance = 1e-12 if engine in _EXACT else 1e-7
    assert _relative_error(directional, expected[0]) < tolerance
    chex.assert_trees_all_close(gradient, expected[1], rtol=1e-11, atol=1e-14)
    chex.assert_trees_all_close(aux, losses_fn(params, _x())[1], rtol=1e-12)
    assert abs(jax.tree.leaves(aux)[0]).max() > 0  # The mean is updated.


def _scaled(scale):
  return lambda params, x: jnp.tanh(x @ params / scale) ** 2


@pytest.mark.parametrize(
  ("params", "scale", "vector_scale"),
  [
    ([0.0, 0.0, 0.0], 1.0, 1.0),
    ([1e-6, 2e-6, -1e-6], 1.0, 1.0),
    ([1.0, 2.0, 3.0], 1.0, 1.0),
    ([1.0, 2.0, 3.0], 1.0, 1e-30),
    ([1.0, 2.0, 3.0], 1.0, 1e30),
    ([1e3, 2e3, 3e3], 1e3, 1.0),
    ([1e6, 2e6, 3e6], 1e6, 1e-10),
  ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_difference_has_the_documented_accuracy(params, scale, vector_scale, dtype):
  with jax.enable_x64(dtype == "float64"):
    losses_fn = _scaled(scale) if any(params) else lambda p, x: jnp.sin(x @ p)
    params = jnp.array(params, dtype)
    vector = jnp.array([1.0, -2.0, 0.5], dtype) * vector_scale
    weights = jnp.zeros(_B, dtype)
    _, expected, _ = _results(losses_fn, params, _x(dtype), vector, weights)
    _, actual, _ = _results(
      losses_fn, params, _x(dtype), vector, weights, engine="difference"
    )
    tolerance = 1e-7 if dtype == "float64" else 2e-3
    assert _relative_error(actual, expected) < tolerance


def test_difference_in_half_precision_has_the_right_sign():
  params, vector = jnp.array([0.3, 0.6, 0.9]), jnp.array([1.0, -2.0, 0.5])
  data = (jnp.asarray(_x()), vector, jnp.zeros(_B))
  _, expected, _ = _results(_scaled(1.0), params, *data)
  params, *data = (x.astype(jnp.bfloat16) for x in (params, *data))
  _, actual, _ = _results(_scaled(1.0), params, *data, engine="difference")
  assert actual.dtype == jnp.bfloat16
  assert _relative_error(actual.astype(float), expected) < 0.2


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_difference_of_a_network_in_half_precision(dtype, tolerance):
  def losses_fn(params, x):
    hidden = jnp.tanh(x.astype(dtype) @ params.astype(dtype))
    return jnp.sum(hidden, axis=1).astype(jnp.float32) ** 2

  params, vector = jnp.ones((3, 4)) / 2, jnp.linspace(-1, 1, 12).reshape(3, 4)
  exact, difference = (
    linearization.linearize(losses_fn, params, _x(np.float32), engine=engine)
    for engine in ("forward", "difference")
  )
  actual, expected = difference.directional(vector), exact.directional(vector)
  assert _relative_error(actual, expected) < tolerance


def test_difference_does_not_depend_on_the_type_of_the_data():
  def losses_fn(params, x):
    return jax.jit(lambda params, x: jnp.tanh(x.astype(jnp.float32) @ params) ** 2)(
      params, x
    )

  params, vector = jnp.array([0.3, 0.6, 0.9]), jnp.array([1.0, -2.0, 0.5])
  exact, difference = (
    linearization.linearize(losses_fn, params, jnp.bfloat16(_x()), engine=engine)
    for engine in ("forward", "difference")
  )
  actual, expected = difference.directional(vector), exact.directional(vector)
  assert _relative_error(actual, expected) < 1e-3


@pytest.mark.parametrize(("scale", "entry"), [(1024, 100), (2**-12, 2**-14)])
def test_products_of_a_network_in_float16_neither_overflow_nor_vanish(scale, entry):
  def losses_fn(params, x):
    return scale * jnp.sum(x @ params.astype(jnp.float16), axis=1).astype(jnp.float32)

  params, x = jnp.ones((2, 3)), jnp.ones((_B, 2), jnp.float16)
  vector = jnp.full_like(params, entry)
  linearized = linearization.linearize(losses_fn, params, x, engine="layerwise")
  expected = np.full(_B, scale * 2 * 3 * entry)
  np.testing.assert_allclose(linearized.directional(vector), expected, rtol=1e-6)


@pytest.mark.parametrize("engine", linearization.ENGINES)
def test_zero_directions_and_weights_give_zeros(engine):
  params = jnp.array([1.0, 2.0, 3.0])
  _, directional, gradient = _results(
    _scaled(1.0),
    params,
    _x(np.float32),
    jnp.zeros(3),
    jnp.zeros(_B),
    engine=engine,
  )
  assert not directional.any()
  assert not gradient.any()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_complex_parameters_agree_with_the_unrolled_step():
  def losses_fn(params, x):
    x = x.astype(complex)
    return jnp.abs(x @ params) ** 2 + jnp.real(x @ params**2)

  rng = np.random.default_rng(5)
  params = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3))
  weights, optimizer = jnp.arange(_B) / _B, optax.sgd(0.1)
  options = {"optimizer": optimizer, "opt_state": optimizer.init(params)}
  linearized = linearization.linearize(losses_fn, params, _x())
  direction = hypergradient.direction(
    losses_fn, params, _x()[:2], linearized.weighted_gradient(weights), **options
  )
  expected = hypergradient.unrolled_weight_gradient(
    losses_fn, losses_fn, params, _x(), _x()[:2], weights, **options
  )
  actual = hypergradient.weight_gradient(linearized, direction)
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_unknown_engines_are_refused():
  with pytest.raises(base.InputError, match=r"'backward'.*forward.*reverse"):
    linearization.linearize(_scaled(1.0), jnp.ones(3), _x(), engine="backward")
  with pytest.raises(base.InputError, match="engine='layerwise': choose one of"):
    linearization.linearize_outputs(
      lambda p, x: x @ p, jnp.ones(3), _x(), engine="layerwise"
    )


@pytest.mark.parametrize("engine", ["forward", "reverse", "difference"])
def test_linearize_outputs_supports_any_pytree(x64, engine):
  def outputs_fn(params, x):
    hidden = jnp.tanh(x @ params["w"])
    return {"logits": hidden @ params["v"], "features": hidden}, jnp.sum(x)

  rng = np.random.default_rng(0)
  params = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 2))}
  vector = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 2))}
  x = rng.normal(size=(5, 3))
  linearized = linearization.linearize_outputs(
    outputs_fn, params, x, has_aux=True, engine=engine
  )
  assert linearized.engine == engine
  outputs, tangent, aux = jax.jvp(
    lambda p: outputs_fn(p, x), (params,), (vector,), has_aux=True
  )
  cotangent = jax.tree.map(lambda y: rng.normal(size=y.shape), outputs)
  _, vjp_fn, _ = jax.vjp(lambda p: outputs_fn(p, x), params, has_aux=True)
  (gradient,) = vjp_fn(cotangent)
  chex.assert_trees_all_close(linearized.outputs, outputs, rtol=1e-14)
  tolerance = 1e-12 if engine in _EXACT else 1e-7
  chex.assert_trees_all_close(
    linearized.jvp(vector), tangent, rtol=tolerance, atol=tolerance
  )
  chex.assert_trees_all_close(linearized.vjp(cotangent), gradient, rtol=1e-12)
  np.testing.assert_allclose(linearized.aux, aux)


@pytest.mark.ci(unless=("float32-auto", "bfloat16-forward"))
@pytest.mark.slow(
  "bfloat16-microbatched",
  "bfloat16-auto",
  "bfloat16-reverse",
  "bfloat16-difference",
  "float32-forward",
)
@pytest.mark.parametrize("engine", [*linearization.ENGINES, "microbatched"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_work_without_promotion_and_with_nan_checks(engine, dtype):
  def losses_fn(p, x):
    h = jnp.tanh(x.astype(dtype) @ p["w"] + p["b"][None, :]).astype(jnp.float32)
    return (h**2).sum(1) * p["s"]

  params = {"w": jnp.ones((3, 2), dtype), "b": jnp.ones(2, dtype), "s": jnp.float32(2)}
  weights, x = jnp.arange(_B, dtype=jnp.float32), jnp.asarray(_x(np.float32))
  linearize = functools.partial(linearization.linearize, engine=engine)
  if engine == "microbatched":
    linearize = microbatching.microbatched(linearization.linearize, 2)
  with (
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
    jax.debug_nans(True),
  ):
    linearized = linearize(losses_fn, params, x)
    directional = linearized.directional(params)
    gradient = linearized.weighted_gradient(weights)
  expected = jax.jvp(lambda p: losses_fn(p, x), (params,), (params,))[1]
  exact, difference = (1e-6, 5e-3) if dtype == "float32" else (1e-2, 0.3)
  tolerance = difference if engine == "difference" else exact
  assert _relative_error(directional, expected) < tolerance
  chex.assert_trees_all_equal_dtypes(gradient, params)
  assert linearized.engine == ("layerwise" if engine == "auto" else engine)


@jax.custom_vjp
def _sin(x):
  return jnp.sin(x)


_sin.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (g * cos,))


def _sin_losses_fn(params, x, sin=_sin):
  return jnp.cos(sin(x @ params)) + params.sum()


def _scanned(params, x):
  """The custom rule inside a scan and a jit."""
  return jax.lax.scan(lambda c, _: (jax.jit(_sin)(c), None), x @ params, length=2)[0]


def _directional(losses_fn, params, engine="forward", direction=None):
  linearized = linearization.linearize(
    losses_fn, params, _x(), engine=engine, direction=direction
  )
  return linearized.directional(params)


def _known_directional(losses_fn, params):
  return _directional(losses_fn, params, direction=params)


@pytest.mark.parametrize("directional", [_directional, _known_directional])
@pytest.mark.parametrize("losses_fn", [_sin_losses_fn, _scanned])
@pytest.mark.parametrize(
  "wrap",
  [lambda f: f, jax.jit, lambda f: functools.partial(jax.eval_shape, f), jax.vmap],
  ids=["eager", "jit", "eval_shape", "vmap"],
)
def test_forward_mode_refuses_a_custom_vjp(losses_fn, wrap, directional):
  params = jnp.ones((2, 3)) if wrap is jax.vmap else jnp.ones(3)
  with pytest.raises(base.InputError, match="engine='reverse'"):
    wrap(functools.partial(directional, losses_fn))(params)


@pytest.mark.parametrize("directional", [_directional, _known_directional])
def test_forward_mode_supports_linear_solves(directional):
  def losses_fn(params, x):
    return jnp.sum(jnp.linalg.solve(jnp.diag(params), x.T).T * x, 1)

  params = jnp.array([1.0, 2.0, 3.0])
  actual = jax.jit(functools.partial(directional, losses_fn))(params)
  # The losses are sum_j x_j^2 / p_j, and the direction is p.
  np.testing.assert_allclose(actual, -(_x() ** 2 / params[None]).sum(1), rtol=1e-5)


def test_a_custom_vjp_of_constant_parameters_is_refused_under_jit():
  linearized = linearization.linearize(
    _sin_losses_fn, jnp.ones(3), _x(), engine="forward"
  )
  with pytest.raises(base.InputError, match="engine='reverse'"):
    jax.jit(linearized.directional)(jnp.ones(3))


def test_a_custom_vjp_has_a_weighted_gradient():
  weights = jnp.arange(_B) / _B
  linearized = linearization.linearize(_sin_losses_fn, jnp.ones(3), _x())
  expected = jax.grad(lambda p: weights @ _sin_losses_fn(p, _x()))(jnp.ones(3))
  np.testing.assert_allclose(linearized.weighted_gradient(weights), expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("engine", "tolerance"), [("reverse", 1e-12), ("difference", 1e-7)]
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_reverse_and_difference_support_a_custom_vjp(engine, tolerance, wrap):
  params, weights = jnp.array([0.5, -0.2, 0.3]), jnp.arange(_B) / _B

  def results(losses_fn, engine, params):
    linearized = linearization.linearize(losses_fn, params, _x(), engine=engine)
    gradient = linearized.weighted_gradient(weights)
    return linearized.losses, gradient, linearized.directional(gradient)

  plain = functools.partial(_sin_losses_fn, sin=jnp.sin)
  expected = results(plain, "forward", params)
  actual = wrap(functools.partial(results, _sin_losses_fn, engine))(params)
  chex.assert_trees_all_close(actual, expected, rtol=0, atol=tolerance)


def test_the_error_for_a_callback_suggests_the_engine_difference():
  def losses_fn(params, x):
    return jax.pure_callback(
      lambda z: np.sin(z).astype(np.float32),
      jax.ShapeDtypeStruct((_B,), jnp.float32),
      x @ params,
    )

  for wrap in (lambda f: f, jax.jit):
    with pytest.raises(base.InputError, match="engine='difference'"):
      wrap(functools.partial(_directional, losses_fn))(jnp.ones(3))


@pytest.mark.parametrize("engine", linearization.ENGINES)
@pytest.mark.parametrize(
  ("reduce", "shape"),
  [(jnp.mean, r"\(\)"), (lambda z: z[:, None], r"\(5, 1\)")],
  ids=["scalar", "column"],
)
@pytest.mark.parametrize(
  "wrap",
  [lambda f: f, jax.jit, lambda f: functools.partial(jax.eval_shape, f)],
  ids=["eager", "jit", "eval_shape"],
)
def test_losses_of_another_shape_are_refused(engine, reduce, shape, wrap):
  def losses_fn(params, x):
    return reduce(x @ params)

  with pytest.raises(base.InputError, match=f"losses_fn's result .*got shape {shape}"):
    wrap(functools.partial(_directional, losses_fn, engine=engine))(jnp.ones(3))


@pytest.mark.parametrize("aux", [jnp.ones(2), {"mean": jnp.ones(2)}, None])
def test_a_missing_has_aux_is_reported(aux):
  with pytest.raises(base.InputError, match="has_aux=True"):
    linearization.linearize(lambda p, x: (x @ p, aux), jnp.ones(3), _x())


@pytest.mark.parametrize("engine", linearization.ENGINES)
@pytest.mark.parametrize("kind", [ValueError, TypeError, NotImplementedError, KeyError])
def test_errors_of_the_losses_function_pass_unchanged(engine, kind):
  error = kind("the jvp of my custom_vjp does not support JVP")

  def losses_fn(params, x):
    raise error

  for wrap in (lambda f: f, jax.jit):
    with pytest.raises(kind) as caught:
      wrap(functools.partial(_directional, losses_fn, engine=engine))(jnp.ones(3))
    assert caught.value is error


def test_a_shape_error_inside_the_model_passes_unchanged():
  with pytest.raises(TypeError, match="dot_general") as caught:
    _directional(lambda params, x: x @ params, jnp.ones(4))
  assert not isinstance(caught.value, base.InputError)


@pytest.mark.parametrize("engine", linearization.ENGINES)
@pytest.mark.parametrize(
  ("vector", "message"),
  [
    ({"another": np.ones(3)}, "must be a pytree like params"),
    ({"w": np.ones(1)}, r"it has \(1,\) at w, where params has \(3,\)"),
    ({"w": 1.0}, r"it has \(\) at w, where params has \(3,\)"),
    ({"w": np.ones(3) + 1j}, "is complex at w, where params is real"),
  ],
)
def test_vectors_that_are_not_like_params_are_refused(engine, vector, message):
  def linearize(**options):
    params = {"w": jnp.ones(3)}
    return linearization.linearize(
      lambda p, x: x @ p["w"], params, _x(), engine=engine, **options
    )

  with pytest.raises(base.InputError, match=message):
    linearize().directional(vector)
  if engine == "forward":
    with pytest.raises(base.InputError, match=message):
      linearize(direction=vector)


def test_outputs_without_a_derivative_are_refused():
  with pytest.raises(base.InputError, match=r"no floating-point array .*int32"):
    linearization.linearize_outputs(lambda p, x: jnp.int32(x @ p), jnp.ones(3), _x())
  with pytest.raises(base.InputError, match="nothing can be trained"):
    linearization.linearize_outputs(lambda p, x: x @ p, jnp.arange(3), _x())


@jax.custom_vjp
def _clip_gradient(x):
  return x


_clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


def test_a_backward_rule_that_clips_gradients_has_only_a_weighted_gradient():
  x = jnp.array([[1.0, 0], [0, 1], [1, 1], [2, 1]])
  targets, params = jnp.array([0.0, 4, -3, 1]), jnp.array([1.0, 2])
  weights = jnp.full(4, 0.25)

  def losses_fn(p, x):
    return (_clip_gradient(x @ p) - targets) ** 2

  expected = jax.grad(lambda p: weights @ losses_fn(p, x))(params)
  linearized = linearization.linearize(losses_fn, params, x)
  np.testing.assert_allclose(linearized.weighted_gradient(weights), expected)
  with pytest.raises(base.InputError, match="without a forward-mode derivative"):
    linearized.directional(params)
  with pytest.raises(base.InputError, match="is not linear in its cotangent"):
    linearization.linearize(losses_fn, params, x, engine="layerwise")
  with pytest.raises(base.InputError, match=r"_clip_gradient at .* is not linear"):
    linearization.linearize(losses_fn, params, x, engine="reverse")


_LINEARIZE = {
  **{
    engine: functools.partial(linearization.linearize, engine=engine)
    for engine in linearization.ENGINES
  },
  "microbatched": microbatching.microbatched(linearization.linearize, 2),
}


@pytest.mark.parametrize("linearize", _LINEARIZE)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None, None)])
def test_a_losses_function_without_aux_is_reported(linearize, wrap):
  with pytest.raises(base.InputError, match=r"must return two values.*has_aux=True"):
    _LINEARIZE[linearize](lambda p, x: wrap(x @ p), jnp.ones(3), _x(), has_aux=True)


@pytest.mark.parametrize("linearize", _LINEARIZE)
@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_losses_of_another_type_are_refused(linearize, dtype):
  with pytest.raises(base.InputError, match="must be floating-point numbers"):
    _LINEARIZE[linearize](lambda p, x: (x @ p).astype(dtype), jnp.ones(3), _x())


@pytest.mark.usefixtures("x64")
def test_difference_supports_complex_parameters():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
  params = jnp.array([1 + 2j, 0.5 - 1j])

  def jvp(params, vector, engine):
    lin = linearization.linearize_outputs(
      lambda p, x: jnp.abs(x.astype(p.dtype) @ p) ** 2, params, x, engine=engine
    )
    return lin.jvp(vector)

  vector = jnp.array([0.3 - 1j, 2j])
  expected = jvp(params, vector, "forward")
  np.testing.assert_allclose(jvp(params, vector, "difference"), expected, rtol=1e-7)
