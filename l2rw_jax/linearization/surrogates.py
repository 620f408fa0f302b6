"""Detects functions whose declared derivative is not the derivative of their values.

A straight-through estimator rounds its input and has the derivative of the identity; a
gradient reversal returns its input and has the negative derivative. Differentiation
follows the derivatives that `jax.custom_jvp`, `jax.custom_vjp` and
`jax.lax.stop_gradient` declare. A finite difference does not, so these functions have
to be detected.
"""

from collections.abc import Callable, Iterator
import os
import pathlib
from typing import Any

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np

# The separator at the end excludes folders such as `jaxopt`.
_JAX_FOLDER = os.path.join(pathlib.Path(jax.__file__).parent, "")
# Calls without a custom derivative, each with the name of the parameter for its body.
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}
# Largest relative difference of the two derivatives that is accepted, in single and
# half precision.
_TOLERANCE, _HALF_TOLERANCE = 0.1, 0.4


def find(jaxpr: Any) -> str | None:
  """Finds a function whose declared derivative is not the derivative of its values.

  The derivative of each `jax.custom_jvp`, each `jax.custom_vjp` and each operation with
  a body (such as a loop) that has a `stop_gradient` is compared with a central
  difference at random inputs. Functions that JAX defines, and functions that cannot be
  evaluated alone (such as collectives), are assumed to be consistent.

  Args:
    jaxpr: jaxpr of the function that is to be differentiated.

  Returns:
    The name of the first such function, or None.
  """
  consistent = set()
  for eqn in _suspects(jaxpr):
    name = name_of(eqn)
    avals = [v.aval for v in eqn.invars]
    # Calls of a function with different static arguments have different rules.
    rules = ((k, id(v)) for k, v in sorted(eqn.params.items()))
    key = (name, *((x.shape, x.dtype) for x in avals), *rules)
    if key not in consistent and _disagrees(eqn):
      return name
    consistent.add(key)
  return None


def hold_stopped(
  function: Callable[..., list[Any]], leaves: list[Any]
) -> Callable[[list[Any]], list[Any]]:
  """`function` with the arguments of `stop_gradient` held at their values at `leaves`.

  A `stop_gradient` in a loop or another body is not held; `find` checks those.

  Args:
    function: a function from a list of arrays to a list of arrays.
    leaves: its arguments.

  Returns:
    A function of the same arguments. If `find` returns None, its finite differences
    near `leaves` agree with the derivative of `function`.
  """
  closed = jax.make_jaxpr(function)(leaves)
  if not _has_stop_gradient(closed.jaxpr):
    return function
  held: list[Any] = []

  def record(value):
    held.append(value)
    return value

  _evaluate(closed.jaxpr, closed.consts, leaves, record)

  def replay(leaves):
    values = iter(held)
    return _evaluate(closed.jaxpr, closed.consts, leaves, lambda _: next(values))

  return replay


def _suspects(jaxpr: Any) -> Iterator[Any]:
  """The operations whose declared derivative may differ from the actual one."""
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    inside = list(jax_core.jaxprs_in_params(eqn.params))
    if name.startswith(("custom_jvp_call", "custom_vjp_call")):
      sources = _sources(eqn)
      if not sources or not all(map(_is_in_jax, sources)):
        yield eqn
    elif name in INLINED:
      yield from _suspects(getattr(inside[0], "jaxpr", inside[0]))
    elif inside:
      bodies = [getattr(body, "jaxpr", body) for body in inside]
      if any(map(_has_stop_gradient, bodies)):
        yield eqn
      else:
        for body in bodies:
          yield from _suspects(body)


def _has_stop_gradient(jaxpr: Any) -> bool:
  return any(
    eqn.primitive.name == "stop_gradient"
    or any(
      _has_stop_gradient(getattr(body, "jaxpr", body))
      for body in jax_core.jaxprs_in_params(eqn.params)
    )
    for eqn in jaxpr.eqns
  )


def _sources(eqn):
  """The sources of the function and of its rule, `name at path:line`, if known."""
  inner = eqn.params.get("call_jaxpr")
  rule = eqn.params.get("jvp_jaxpr_fun", eqn.params.get("bwd"))
  infos = [
    getattr(x, "debug_info", None) for x in (getattr(inner, "jaxpr", inner), rule)
  ]
  return [info.func_src_info for info in infos if info is not None]


def _is_in_jax(source):
  return source.rpartition(" at ")[2].startswith(_JAX_FOLDER)


def name_of(eqn: Any) -> str:
  """The function that defines an operation, as `name at path:line`.

  If JAX defines the function but not its derivative rule, the rule is named instead.
  """
  sources = _sources(eqn) or [eqn.primitive.name]
  return next((s for s in sources if not _is_in_jax(s)), sources[0])


def _evaluate(jaxpr, consts, args, stop):
  """Evaluates a jaxpr with the function `stop` in place of `stop_gradient`."""
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

  def read(atom):
    return atom.val if isinstance(atom, jax_core.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    values = [read(v) for v in eqn.invars]
    inner = eqn.params.get(INLINED.get(eqn.primitive.name, ""))
    if inner is not None:
      results = _evaluate(inner.jaxpr, inner.consts, values, stop)
    elif eqn.primitive.name == "stop_gradient":
      results = [stop(values[0])]
    else:
      results = _bind(eqn, values)
    env |= dict(zip(eqn.outvars, results, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _bind(eqn, values):
  params = eqn.primitive.get_bind_params(eqn.params)
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*values, **params)
  return list(results) if eqn.primitive.multiple_results else [results]


def _disagrees(eqn):
  """Whether the declared derivative differs from the derivative of the values."""
  rng = np.random.default_rng(0)
  draws = (
    lambda shape: rng.normal(size=shape),
    lambda shape: 10 * rng.normal(size=shape),
    lambda shape: rng.uniform(0.1, 0.9, size=shape),  # In the domain of logarithms.
  )
  with jax.ensure_compile_time_eval(), jax.debug_nans(False):
    try:
      return any(_disagrees_at(eqn, draw, rng) for draw in draws)
    except Exception:  # The operation cannot be evaluated alone.
      return False


def _disagrees_at(eqn, draw, rng):
  """`_disagrees` at one random point, along random directions of inputs and outputs."""
  avals = [v.aval for v in eqn.invars]
  is_inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in avals]
  types = [x.dtype for x, keep in zip(avals, is_inexact, strict=True) if keep]
  if not types:
    return False
  fixed = [
    None if keep else jnp.asarray(rng.integers(0, 2, x.shape), x.dtype)
    for x, keep in zip(avals, is_inexact, strict=True)
  ]
  point = [draw(x.shape) for x, keep in zip(avals, is_inexact, strict=True) if keep]
  direction = [rng.normal(size=x.shape) for x in point]

  def outputs(values):
    remaining = iter(values)
    args = [next(remaining) if x is None else x for x in fixed]
    return [y for y in _bind(eqn, args) if jnp.issubdtype(y.dtype, jnp.inexact)]

  def cast(values):
    return [jnp.asarray(x).astype(t) for x, t in zip(values, types, strict=True)]

  values, vjp_fn = jax.vjp(outputs, cast(point))
  cotangents = [
    jnp.asarray(1e3 * rng.normal(size=y.shape)).astype(y.dtype) for y in values
  ]
  (gradients,) = vjp_fn(cotangents)
  declared = sum(_dot(g, v) for g, v in zip(gradients, direction, strict=True))
  epsilon = max(float(jnp.finfo(t).eps) for t in types)
  largest = max((np.abs(x).max(initial=1) for x in point), default=1)
  step = 0.2 * epsilon ** (1 / 3) * largest

  def outputs_at(sign):
    moved = [x + sign * step * v for x, v in zip(point, direction, strict=True)]
    return [_array(y) for y in outputs(cast(moved))]

  difference, rounding = 0.0, 0.0
  for u, ahead, behind in zip(
    map(_array, cotangents), outputs_at(1), outputs_at(-1), strict=True
  ):
    difference += np.sum(u * (ahead - behind)) / (2 * step)
    rounding += np.sum(np.abs(u * ahead)) * epsilon / step
  if not np.isfinite(declared) or not np.isfinite(difference):
    return False
  is_half = any(jnp.finfo(t).bits < 32 for t in types)
  tolerance = _HALF_TOLERANCE if is_half else _TOLERANCE
  larger = max(abs(difference), abs(declared))
  return bool(abs(difference - declared) > tolerance * larger + 4 * rounding)


def _array(x):
  with jax.numpy_dtype_promotion("standard"):
    return np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def _dot(x, y):
  return np.sum(_array(x) * y)
