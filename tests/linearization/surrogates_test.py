"""Detection of surrogates: declared derivatives that are not the true ones."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.linearization import surrogates


def _custom_vjp(forward, backward):
  function = jax.custom_vjp(forward)
  function.defvjp(lambda x: (forward(x), x), lambda x, g: (backward(x, g),))
  return function


def _custom_jvp(forward, slope):
  function = jax.custom_jvp(forward)
  function.defjvp(lambda x, t: (forward(x[0]), slope(x[0]) * t[0]))
  return function


_SURROGATES = {
  "rounding": _custom_vjp(lambda x: jnp.round(x), lambda x, g: g),
  "rounding, forward": _custom_jvp(lambda x: jnp.round(x), jnp.ones_like),
  "sign": _custom_vjp(jnp.sign, lambda x, g: jnp.where(abs(x) <= 1, g, 0 * g)),
  "spike": _custom_jvp(lambda x: (x > 0).astype(x.dtype), lambda x: 1 / (1 + x**2)),
  "reversal": _custom_vjp(lambda x: x, lambda x, g: -0.5 * g),
  "scaling": _custom_vjp(lambda x: x, lambda x, g: 0.5 * g),
  "clipping": _custom_vjp(lambda x: x, lambda x, g: jnp.clip(g, -1, 1)),
}
_CONSISTENT = {
  "sine": _custom_vjp(jnp.sin, lambda x, g: g * jnp.cos(x)),
  "logarithm": _custom_vjp(jnp.log, lambda x, g: g / x),
  "relu": _custom_jvp(lambda x: jnp.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
  "callback": _custom_vjp(
    lambda x: jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
    lambda x, g: g * (1 - jnp.tanh(x) ** 2),
  ),
  "jax": lambda x: jax.nn.relu(x) + jax.nn.silu(x) + jax.nn.relu6(x) + jnp.sinc(x),
  "softmax": jax.nn.softmax,
}
_X = np.random.default_rng(0).uniform(0.2, 0.8, (5, 3)).astype(np.float32)
_P = np.random.default_rng(1).uniform(0.2, 0.8, (3, 2)).astype(np.float32)


def _directional(function, engine, p=_P):
  def losses_fn(p, x):
    return (function(x.astype(p.dtype) @ p) ** 2).sum(1)

  linearized = linearization.linearize(losses_fn, p, _X, engine=engine)
  return linearized.directional(p)


def _looped(function):
  return lambda x: jax.lax.scan(lambda c, _: (function(c), None), x, length=1)[0]


@pytest.mark.parametrize("name", _SURROGATES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, _looped])
def test_difference_refuses_surrogates(name, wrap):
  run = functools.partial(_directional, wrap(_SURROGATES[name]), "difference")
  for run_once in (run, jax.jit(run)):
    with pytest.raises(base.InputError, match=r"surrogates_test.py.*engine='reverse'"):
      run_once()


@pytest.mark.slow("float32-jax", "bfloat16-jax", "bfloat16-softmax", "bfloat16-sine")
@pytest.mark.parametrize("name", _CONSISTENT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_difference_accepts_consistent_derivatives(name, dtype):
  p = jnp.asarray(_P, dtype)
  actual = _directional(_CONSISTENT[name], "difference", p)
  # In bfloat16, difference quotients are too inexact to compare.
  if dtype == "float32":
    expected = _directional(_CONSISTENT[name], "reverse", p)
    np.testing.assert_allclose(actual, expected, rtol=1e-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scaled_gradient(x, scale):
  return x


_scaled_gradient.defvjp(lambda x, scale: (x, None), lambda scale, _, g: (scale * g,))


def test_each_call_of_a_function_is_examined_with_its_constants():
  with pytest.raises(base.InputError, match="declared derivative of _scaled_gradient"):
    _directional(
      lambda x: _scaled_gradient(_scaled_gradient(x, 1.0), -1.0), "difference"
    )


def _straight_through(x):
  return x + jax.lax.stop_gradient(jnp.round(x) - x)


@pytest.mark.parametrize(
  "function",
  [
    _straight_through,
    jax.jit(_straight_through),
    lambda x: x * jax.lax.stop_gradient(x),
    lambda x: 2 * jax.lax.stop_gradient(jnp.sin(x)) - x,
  ],
)
@pytest.mark.parametrize("engine", linearization.ENGINES)
def test_every_engine_follows_stop_gradient(function, engine):
  def losses_fn(p, x):
    return (function(x @ p) ** 2).sum(1)

  _, expected = jax.jvp(lambda p: losses_fn(p, _X), (_P,), (_P,))
  actual = jax.jit(functools.partial(_directional, function, engine))()
  np.testing.assert_allclose(actual, expected, rtol=5e-3)


def test_difference_refuses_stop_gradient_in_a_loop():
  with pytest.raises(base.InputError, match=r"'difference' does not fit.*scan"):
    _directional(_looped(_straight_through), "difference")


@pytest.mark.parametrize("name", ["rounding", "sign", "reversal"])
def test_reverse_mode_follows_declared_derivatives(name):
  def loss(p, weights):
    return weights @ (_SURROGATES[name](_X @ p) ** 2).sum(1)

  gradient = jax.grad(loss)
  expected = [jnp.vdot(gradient(_P, w), _P) for w in jnp.eye(5)]
  np.testing.assert_allclose(
    _directional(_SURROGATES[name], "reverse"), jnp.stack(expected), rtol=1e-5
  )


def test_only_functions_of_jax_itself_are_trusted():
  folder = pathlib.Path(jax.__file__).parent
  assert surrogates._is_in_jax(f"relu at {folder}/_src/nn/functions.py:1")
  assert not surrogates._is_in_jax(f"round at {folder}opt/rounding.py:1")
