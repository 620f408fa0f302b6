"""Backward rules that are not linear in their cotangent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.linearization import backward_rules

_LINEAR = {
  "sine": lambda x, g: g * jnp.cos(x),
  "convolution": lambda x, g: jnp.convolve(g, x, "same"),
  "guarded": lambda x, g: jnp.where(g == 0, 0.0, g * x),
  "loop": lambda x, g: jax.lax.fori_loop(0, 3, lambda i, g: g * x, g),
  "inner function": lambda x, g: jax.jit(jnp.multiply)(jnp.exp(x), g),
  "guard against overflow": lambda x, g: jnp.clip(g, -1e4, 1e4) * x,
}
_NONLINEAR = {
  "clipping": lambda x, g: jnp.clip(g, -1, 1),
  "normalization": lambda x, g: g / jnp.maximum(jnp.linalg.norm(g), 1),
  "sign": lambda x, g: jnp.sign(g) * x,
  "guided backpropagation": lambda x, g: jnp.maximum(g, 0),
  "square": lambda x, g: g * g,
  "inner function": lambda x, g: jax.jit(jnp.tanh)(g),
}


def _find(rule, dtype):
  function = jax.custom_vjp(lambda x: x)
  function.defvjp(lambda x: (x, x), lambda x, g: (rule(x, g).astype(x.dtype),))
  # The function is inside of a loop and of another function.
  loop = lambda x: jax.lax.scan(lambda h, _: (function(h), None), x, length=2)[0]  # noqa: E731
  return backward_rules.find_nonlinear(
    jax.make_jaxpr(jax.jit(loop))(np.ones(5, dtype)).jaxpr
  )


@pytest.mark.parametrize("name", _LINEAR)
def test_linear_rules_are_accepted(name):
  assert _find(_LINEAR[name], np.float32) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", _NONLINEAR)
def test_nonlinear_rules_are_named(name, dtype):
  assert "<lambda>" in _find(_NONLINEAR[name], dtype)


def test_rules_with_side_effects_are_not_run(capfd):
  def rule(x, g):
    jax.debug.print("norm {}", jnp.linalg.norm(g))
    return g * x

  assert _find(rule, np.float32) is None
  jax.effects_barrier()
  assert "norm" not in capfd.readouterr().out


def test_rules_that_cannot_be_traced_alone_are_accepted():
  def losses(weights):
    function = jax.custom_vjp(lambda x: x * weights)
    function.defvjp(lambda x: (x * weights, None), lambda _, g: (jnp.clip(g, -1, 1),))
    return function(jnp.ones(3))

  # The rule refers to `weights`, an argument of the function that contains it.
  traced = jax.make_jaxpr(losses)(jnp.ones(3)).jaxpr
  assert backward_rules.find_nonlinear(traced) is None
