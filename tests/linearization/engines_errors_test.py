"""What `linearize` refuses, in which words, and what it lets through."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.linearization import microbatching

_B = 5


@jax.custom_vjp
def _sin(x):
  return jnp.sin(x)


_sin.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (g * cos,))


def _x():
  return np.random.default_rng(0).normal(size=(_B, 3))


def _losses_fn(params, x, sin=_sin):
  return jnp.cos(sin(x @ params)) + params.sum()


def _scanned(params, x):
  """The custom rule inside control flow and an inner jit."""
  return jax.lax.scan(lambda c, _: (jax.jit(_sin)(c), None), x @ params, length=2)[0]


def _directional(losses_fn, params, engine="forward"):
  linearized = linearization.linearize(losses_fn, params, _x(), engine=engine)
  return linearized.directional(params)


@pytest.mark.parametrize("losses_fn", [_losses_fn, _scanned])
@pytest.mark.parametrize(
  "wrap",
  [lambda f: f, jax.jit, lambda f: functools.partial(jax.eval_shape, f), jax.vmap],
  ids=["eager", "jit", "eval_shape", "vmap"],
)
def test_a_custom_vjp_is_told_the_way_out(losses_fn, wrap):
  params = jnp.ones((2, 3)) if wrap is jax.vmap else jnp.ones(3)
  with pytest.raises(base.InputError, match="engine='reverse'"):
    wrap(functools.partial(_directional, losses_fn))(params)


def test_constant_parameters_do_not_hide_a_custom_vjp_from_jit():
  linearized = linearization.linearize(_losses_fn, jnp.ones(3), _x(), engine="forward")
  with pytest.raises(base.InputError, match="engine='reverse'"):
    jax.jit(linearized.directional)(jnp.ones(3))


def test_a_custom_vjp_can_still_be_weighted():
  weights = jnp.arange(_B) / _B
  linearized = linearization.linearize(_losses_fn, jnp.ones(3), _x())
  expected = jax.grad(lambda p: weights @ _losses_fn(p, _x()))(jnp.ones(3))
  np.testing.assert_allclose(linearized.weighted_gradient(weights), expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("engine", "tolerance"), [("reverse", 1e-12), ("difference", 1e-7)]
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_custom_vjp_gives_the_numbers_of_a_plain_function(engine, tolerance, wrap):
  params, weights = jnp.array([0.5, -0.2, 0.3]), jnp.arange(_B) / _B

  def three(losses_fn, engine, params):
    linearized = linearization.linearize(losses_fn, params, _x(), engine=engine)
    gradient = linearized.weighted_gradient(weights)
    return linearized.losses, gradient, linearized.directional(gradient)

  plain = functools.partial(_losses_fn, sin=jnp.sin)
  expected = three(plain, "forward", params)
  actual = wrap(functools.partial(three, _losses_fn, engine))(params)
  chex.assert_trees_all_close(actual, expected, rtol=0, atol=tolerance)


def test_an_operation_without_any_derivative_points_to_the_difference():
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
def test_a_forgotten_has_aux_is_named(aux):
  with pytest.raises(base.InputError, match="has_aux=True"):
    linearization.linearize(lambda p, x: (x @ p, aux), jnp.ones(3), _x())


@pytest.mark.parametrize("engine", linearization.ENGINES)
@pytest.mark.parametrize("kind", [ValueError, TypeError, NotImplementedError, KeyError])
def test_errors_of_the_losses_function_pass_unchanged(engine, kind):
  error = kind("my own jvp of a custom_vjp does not support JVP")

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


def test_a_vector_of_another_structure_is_not_blamed_on_the_model():
  linearized = linearization.linearize(
    lambda p, x: x @ p["custom_vjp"], {"custom_vjp": jnp.ones(3)}, _x()
  )
  with pytest.raises(ValueError, match="mismatch") as caught:
    linearized.directional({"another": jnp.ones(3)})
  assert not isinstance(caught.value, base.InputError)


_LINEARIZE = {
  **{
    engine: functools.partial(linearization.linearize, engine=engine)
    for engine in linearization.ENGINES
  },
  "in parts": microbatching.microbatched(linearization.linearize, 2),
}


@pytest.mark.parametrize("linearize", _LINEARIZE)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None, None)])
def test_a_losses_function_without_aux_is_named(linearize, wrap):
  with pytest.raises(base.InputError, match=r"must return two values.*has_aux=True"):
    _LINEARIZE[linearize](lambda p, x: wrap(x @ p), jnp.ones(3), _x(), has_aux=True)


@pytest.mark.parametrize("linearize", _LINEARIZE)
@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_losses_that_are_no_floating_point_numbers_are_refused(linearize, dtype):
  with pytest.raises(base.InputError, match="must be floating-point numbers"):
    _LINEARIZE[linearize](lambda p, x: (x @ p).astype(dtype), jnp.ones(3), _x())
