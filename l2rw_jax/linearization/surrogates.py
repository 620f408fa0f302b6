"""Where a function's declared derivative is not the slope of its values.

A straight-through estimator rounds and passes gradients as if it did not; a gradient
reversal returns its input and the negative gradient. Differentiation follows what is
declared, by `jax.custom_jvp`, `jax.custom_vjp` or `jax.lax.stop_gradient`; a
difference of two values cannot, unless it knows where.
"""

from collections.abc import Callable, Iterator
import pathlib
from typing import Any

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np

_OF_JAX = str(pathlib.Path(jax.__file__).parent)
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}
# How far the two may be apart, as a share of the larger one.
_TOLERANCE, _TOLERANCE_OF_HALF = 0.1, 0.4


def find(jaxpr: Any) -> str | None:
  """The first function whose derivative disagrees with its values, or None.

  Each `jax.custom_jvp`, `jax.custom_vjp` and loop with a `stop_gradient` inside is
  evaluated at random inputs: its derivative against a central difference. JAX's own
  functions are trusted, and so is what cannot be evaluated by itself (a collective).

  Args:
    jaxpr: of the function that is to be differentiated.
  """
  seen = set()
  for eqn in _suspects(jaxpr):
    name = _name(eqn)
    avals = [v.aval for v in eqn.invars]
    key = (name, *((x.shape, x.dtype) for x in avals))
    if key not in seen and _disagrees(eqn):
      return name
    seen.add(key)
  return None


def holding(
  function: Callable[..., list[Any]], leaves: list[Any]
) -> Callable[[list[Any]], list[Any]]:
  """`function`, with what passes a `stop_gradient` held as it is at `leaves`.

  Args:
    function: a list of arrays to a list of arrays.
    leaves: arrays.

  Returns:
    A function of such a list, whose slopes are those that differentiation gives.
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
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    inside = list(jax_core.jaxprs_in_params(eqn.params))
    if name.startswith(("custom_jvp_call", "custom_vjp_call")):
      if not all(_is_of_jax(source) for source in _sources(eqn)):
        yield eqn
    elif name in _INLINED:
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
  """The function and its rule, as `name at path:line`, as far as they are known."""
  inner = eqn.params.get("call_jaxpr")
  rule = eqn.params.get("jvp_jaxpr_fun", eqn.params.get("bwd"))
  infos = [
    getattr(x, "debug_info", None) for x in (getattr(inner, "jaxpr", inner), rule)
  ]
  return [info.func_src_info for info in infos if info is not None]


def _is_of_jax(source):
  return source.rpartition(" at ")[2].startswith(_OF_JAX)


def _name(eqn):
  """The function that its user wrote, as `name at path:line`."""
  sources = _sources(eqn) or [eqn.primitive.name]
  return next((s for s in sources if not _is_of_jax(s)), sources[0])


def _evaluate(jaxpr, consts, args, stop):
  """What a jaxpr computes, with `stop` in the place of `stop_gradient`."""
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

  def read(atom):
    return atom.val if isinstance(atom, jax_core.Literal) else env[atom]

  for eqn in jaxpr.eqns:
    values = [read(v) for v in eqn.invars]
    inner = eqn.params.get(_INLINED.get(eqn.primitive.name, ""))
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
  rng = np.random.default_rng(0)
  draws = (
    lambda shape: rng.normal(size=shape),
    lambda shape: 10 * rng.normal(size=shape),
    lambda shape: rng.uniform(0.1, 0.9, size=shape),  # where logarithms are defined
  )
  with jax.ensure_compile_time_eval(), jax.debug_nans(False):
    try:
      return any(_disagrees_at(eqn, draw, rng) for draw in draws)
    except Exception:  # It cannot be evaluated by itself.
      return False


def _disagrees_at(eqn, draw, rng):
  avals = [v.aval for v in eqn.invars]
  inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in avals]
  types = [x.dtype for x, keep in zip(avals, inexact, strict=True) if keep]
  if not types:
    return False
  fixed = [
    None if keep else jnp.asarray(rng.integers(0, 2, x.shape), x.dtype)
    for x, keep in zip(avals, inexact, strict=True)
  ]
  point = [draw(x.shape) for x, keep in zip(avals, inexact, strict=True) if keep]
  along = [rng.normal(size=x.shape) for x in point]

  def outputs(values):
    chosen = iter(values)
    args = [next(chosen) if x is None else x for x in fixed]
    return [y for y in _bind(eqn, args) if jnp.issubdtype(y.dtype, jnp.inexact)]

  def cast(values):
    return [jnp.asarray(x).astype(t) for x, t in zip(values, types, strict=True)]

  values, pull = jax.vjp(outputs, cast(point))
  probes = [1e3 * rng.normal(size=y.shape) for y in values]
  probes = [jnp.asarray(u).astype(y.dtype) for u, y in zip(probes, values, strict=True)]
  (slopes,) = pull(probes)
  declared = sum(_dot(s, v) for s, v in zip(slopes, along, strict=True))
  epsilon = max(float(jnp.finfo(t).eps) for t in types)
  largest = max((np.abs(x).max(initial=1) for x in point), default=1)
  step = 0.2 * epsilon ** (1 / 3) * largest

  def at(sign):
    moved = [x + sign * step * v for x, v in zip(point, along, strict=True)]
    return [_array(y) for y in outputs(cast(moved))]

  found, noise = 0.0, 0.0
  for u, ahead, behind in zip(map(_array, probes), at(1), at(-1), strict=True):
    found += np.sum(u * (ahead - behind)) / (2 * step)
    noise += np.sum(np.abs(u * ahead)) * epsilon / step
  if not np.isfinite(declared) or not np.isfinite(found):
    return False
  half = any(jnp.finfo(t).bits < 32 for t in types)
  share = _TOLERANCE_OF_HALF if half else _TOLERANCE
  larger = max(abs(found), abs(declared))
  return bool(abs(found - declared) > share * larger + 4 * noise)


def _array(x):
  with jax.numpy_dtype_promotion("standard"):
    return np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def _dot(x, y):
  return np.sum(_array(x) * y)
