"""Detects backward rules that are not linear in their cotangent.

The backward rule of a `jax.custom_vjp` maps a cotangent c to J^T c. A rule that clips
gradients, for instance, is not linear in c. The layerwise engine takes gradients at a
cotangent of 1 and multiplies them by the weights afterwards. With a nonlinear rule, its
results would differ from `jax.grad` of the weighted loss.
"""

from typing import Any

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.linearization import surrogates

# Operations that are linear in one argument, if the others do not depend on cotangents.
_BILINEAR = ("mul", "dot_general", "conv_general_dilated")
# fmt: off
_NONLINEAR = frozenset(
  {
    "abs", "acos", "acosh", "and", "argmax", "argmin", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "cos", "cosh", "cummax", "cummin", "cumprod",
    "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "ne", "not", "or", "pow", "reduce_max", "reduce_min", "reduce_prod", "rem", "round",
    "rsqrt", "sign", "sin", "sinh", "sort", "sqrt", "square", "tan", "tanh", "top_k",
  }
)
# fmt: on
# Largest relative deviation from linearity that is attributed to rounding, in single
# and half precision.
_TOLERANCE, _HALF_TOLERANCE = 1e-2, 0.1


def rule_of(eqn: Any) -> Any:
  """An operation and its backward rule as one function.

  The function is `(*inputs, *cotangents) -> (*outputs, *gradients)`.

  Args:
    eqn: an equation of a jaxpr, such as a `jax.custom_vjp`.

  Returns:
    A closed jaxpr.
  """
  params = eqn.primitive.get_bind_params(eqn.params)

  def gradients(values, cotangents):
    outputs, vjp_fn = jax.vjp(lambda *x: eqn.primitive.bind(*x, **params), *values)
    return outputs, vjp_fn(cotangents)

  values = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
  cotangents = [
    jax.ShapeDtypeStruct(
      v.aval.shape, v.aval.dtype if _is_inexact(v.aval) else jax.dtypes.float0
    )
    for v in eqn.outvars
  ]
  return jax.make_jaxpr(gradients)(values, cotangents)


def find_nonlinear(jaxpr: Any) -> str | None:
  """The name of a `jax.custom_vjp` whose backward rule is not linear, or None."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "custom_vjp_call":
      try:
        rule = rule_of(eqn)
      except Exception:  # The rule depends on a mesh or on arrays of another trace.
        continue
      if not is_linear(rule, len(eqn.outvars)):
        return surrogates.name_of(eqn)
      continue
    for inner in jax_core.jaxprs_in_params(eqn.params):
      name = find_nonlinear(getattr(inner, "jaxpr", inner))
      if name is not None:
        return name
  return None


def is_linear(rule: Any, num_cotangents: int) -> bool:
  """Returns False if a backward rule is found not to be linear in its cotangents.

  A rule that applies a nonlinear operation to cotangents is evaluated at random
  cotangents. Their entries are rarely above 80, so that a rule with bounds that only
  prevent an overflow counts as linear. Other rules are not evaluated, because arrays
  may be large. Loops and kernels in a rule are assumed to be linear, and so are a rule
  that cannot be evaluated alone, a rule with side effects (such as `jax.debug.print`),
  and a rule that is nonlinear only because it adds a constant.

  Args:
    rule: the result of `rule_of`.
    num_cotangents: the number of cotangents, which are the last inputs of `rule`.
  """
  num_fixed = len(rule.jaxpr.invars) - num_cotangents
  flags = [*[False] * num_fixed, *[True] * num_cotangents]
  if rule.effects or not _is_suspect(rule.jaxpr, flags)[0]:
    return True
  with jax.ensure_compile_time_eval(), jax.debug_nans(False):
    try:
      return _agrees(rule, num_fixed)
    except Exception:  # The rule cannot be evaluated alone (it has a collective).
      return True


def _is_suspect(jaxpr, flags):
  """Whether cotangents enter a nonlinear operation, and which outputs depend on them.

  `flags` says for each input of the jaxpr whether it depends on cotangents.
  """
  depends = dict(zip(jaxpr.invars, flags, strict=True))

  def has(atom):
    return not isinstance(atom, jax_core.Literal) and depends.get(atom, False)

  for eqn in jaxpr.eqns:
    inputs = [has(v) for v in eqn.invars]
    outputs = [any(inputs)] * len(eqn.outvars)
    inner = eqn.params.get(surrogates.INLINED.get(eqn.primitive.name, ""))
    if inner is not None:
      is_suspect, outputs = _is_suspect(inner.jaxpr, inputs)
    else:
      is_suspect = _is_nonlinear(eqn.primitive.name, inputs)
    if is_suspect:
      return True, []
    depends |= dict(zip(eqn.outvars, outputs, strict=True))
  return False, [has(v) for v in jaxpr.outvars]


def _is_nonlinear(name, depends):
  """Whether an operation is nonlinear in the inputs that depend on cotangents."""
  if name in _BILINEAR:
    return all(depends)
  if name == "div":
    return depends[1]
  if name == "select_n":
    return depends[0]
  return name in _NONLINEAR and any(depends)


def _agrees(rule, num_fixed):
  """Whether scaling the cotangents scales the gradients by the same factor."""
  rng = np.random.default_rng(0)
  avals = rule.in_avals

  def draw(aval):
    if _is_inexact(aval):
      return jnp.asarray(rng.standard_normal(aval.shape, np.float32), aval.dtype)
    if aval.dtype == jax.dtypes.float0:
      return np.zeros(aval.shape, aval.dtype)
    return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)

  fixed = [draw(x) for x in avals[:num_fixed]]
  cotangents = [draw(x) for x in avals[num_fixed:]]
  types = [x.dtype for x in cotangents if _is_inexact(x)]
  is_half = any(jnp.finfo(t).bits < 32 for t in types)
  factor = -(2.0**4)  # Negative, so that rules such as max(c, 0) are detected.
  scaled = [
    x * jnp.asarray(factor, x.dtype) if _is_inexact(x) else x for x in cotangents
  ]
  evaluate = jax_core.jaxpr_as_fun(rule)
  small, large = evaluate(*fixed, *cotangents), evaluate(*fixed, *scaled)
  gradients = slice(len(cotangents), None)
  for x, y in zip(small[gradients], large[gradients], strict=True):
    if not _is_inexact(x):
      continue
    wide = base.accumulator_dtype(x.dtype)
    expected, actual = factor * np.asarray(x.astype(wide)), np.asarray(y.astype(wide))
    if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
      continue
    size = max(np.abs(expected).max(initial=0), np.abs(actual).max(initial=0))
    tolerance = _HALF_TOLERANCE if is_half else _TOLERANCE
    if np.abs(expected - actual).max(initial=0) > tolerance * size:
      return False
  return True


def _is_inexact(x):
  return jnp.issubdtype(x.dtype, jnp.inexact)
