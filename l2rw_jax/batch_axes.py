"""Which axis of a value tells the examples of a batch apart, operation by operation.

A network treats its examples one by one if row i of everything it computes depends
on row i of the batch alone. `propagate` follows that axis through one operation of
a jaxpr, or tells that the operation mixes examples, or that it cannot know.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

# The axis of each value; None for a value that is the same for every example.
Axis = int | None


class MixedError(Exception):
  """An operation mixes examples, or may do so; the message names it."""


# fmt: off
_ELEMENTWISE = frozenset(
  {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos",
    "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igammac", "integer_pow", "is_finite", "le",
    "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "or", "pcast", "pow", "pvary", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
  }
)
# fmt: on
_REDUCTIONS = (
  *(f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or", "xor")),
  "argmax",
  "argmin",
)
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_WINDOWS = (
  "reduce_window",
  *(f"reduce_window_{name}" for name in ("sum", "max", "min")),
)
_RANDOM = tuple(
  f"random_{name}" for name in ("bits", "fold_in", "split", "seed", "wrap")
)
_CALLS = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
}


def inner_jaxpr(eqn: Any) -> Any:
  """The jaxpr that a call runs, as `(jaxpr, consts)`; None for an operation."""
  name = _CALLS.get(eqn.primitive.name)
  if name is None or name not in eqn.params:
    return None
  inner = eqn.params[name]
  if isinstance(inner, jax_core.ClosedJaxpr):
    return inner.jaxpr, inner.consts
  return inner, ()


def inlined(eqn: Any) -> Any:
  """`inner_jaxpr` of a call that means no more than what it runs."""
  name = eqn.primitive.name
  return None if name.startswith("custom_") else inner_jaxpr(eqn)


def propagate(eqn: Any, axes: Sequence[Axis], *, rules: bool = True) -> list[Axis]:
  """The batch axis of what an operation returns.

  Args:
    eqn: of a jaxpr.
    axes: of its arguments, at least one not None.
    rules: whether the derivative of a custom_jvp is followed too.

  Raises:
    MixedError: the operation mixes examples, or is not known to keep them apart.
  """
  inner = inner_jaxpr(eqn)
  if inner is not None:
    jaxpr, consts = inner
    found = _through(jaxpr, len(consts), axes, rules)
    if rules and eqn.primitive.name == "custom_jvp_call":
      _check_rule(eqn, axes, found)
    return found
  name = eqn.primitive.name
  if name in _ELEMENTWISE:
    return [_same(eqn, axes)] * len(eqn.outvars)
  rule = _RULES.get(name)
  if rule is None:
    raise MixedError(f"{name}, which is not known to keep examples apart")
  return [int(rule(eqn, axes))] * len(eqn.outvars)  # vmap writes NumPy integers.


def _check_rule(eqn, axes, found):
  """Raises MixedError if the derivative of a custom_jvp mixes what it does not."""
  params = eqn.primitive.get_bind_params(eqn.params)

  def derivative(values, tangents):
    return jax.jvp(lambda *x: eqn.primitive.bind(*x, **params), values, tangents)[1]

  values = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
  tangents = tuple(
    v if jnp.issubdtype(v.dtype, jnp.inexact) else v.update(dtype=jax.dtypes.float0)
    for v in values
  )
  rule = jax.make_jaxpr(derivative)(values, tangents)
  # Which calls the function itself again.
  of_rule = _through(rule.jaxpr, len(rule.consts), (*axes, *axes), rules=False)
  if any(a not in (None, b) for a, b in zip(of_rule, found, strict=True)):
    raise _mixes(eqn)


def _through(jaxpr, num_consts, axes, rules):
  """The batch axes of what a jaxpr returns, whose constants have none."""
  found = dict(
    zip((*jaxpr.constvars, *jaxpr.invars), (*[None] * num_consts, *axes), strict=True)
  )

  def axis_of(atom):
    return None if isinstance(atom, jax_core.Literal) else found[atom]

  for eqn in jaxpr.eqns:
    own = [axis_of(v) for v in eqn.invars]
    known = any(axis is not None for axis in own)
    outs = propagate(eqn, own, rules=rules) if known else [None] * len(eqn.outvars)
    found |= dict(zip(eqn.outvars, outs, strict=True))
  return [axis_of(v) for v in jaxpr.outvars]


def _shape(atom):
  return atom.aval.shape


def _mixes(eqn):
  return MixedError(f"{eqn.primitive.name}, which mixes examples")


def _only(eqn, axes):
  """The one axis that the arguments with examples agree on."""
  found = {axis for axis in axes if axis is not None}
  if len(found) > 1:
    raise _mixes(eqn)
  return found.pop()


def _same(eqn, axes):
  axis = _only(eqn, axes)
  # A size of one would be stretched over another value's axis.
  for atom, own in zip(eqn.invars, axes, strict=True):
    if own is not None and _shape(atom)[axis] != _shape(eqn.outvars[0])[axis]:
      raise _mixes(eqn)
  return axis


def _reduction(eqn, axes):
  (axis,) = axes
  if axis in eqn.params["axes"]:
    raise _mixes(eqn)
  return axis - sum(a < axis for a in eqn.params["axes"])


def _along_dimension(eqn, axes):
  axis = _only(eqn, axes)
  if axis == eqn.params["dimension"]:
    raise _mixes(eqn)
  return axis


def _top_k(eqn, axes):
  rank = len(_shape(eqn.invars[0]))
  if axes[0] == eqn.params.get("axis", -1) % rank:
    raise _mixes(eqn)
  return axes[0]


def _in_place(eqn, axes):
  """Draws from keys and casts of bits, which may add or take away last axes."""
  axis = _only(eqn, axes)
  if axis >= len(_shape(eqn.outvars[0])):
    raise _mixes(eqn)
  return axis


def _broadcast_in_dim(eqn, axes):
  axis = eqn.params["broadcast_dimensions"][axes[0]]
  if _shape(eqn.outvars[0])[axis] != _shape(eqn.invars[0])[axes[0]]:
    raise _mixes(eqn)
  return axis


def _reshape(eqn, axes):
  axis, old, new = axes[0], _shape(eqn.invars[0]), _shape(eqn.outvars[0])
  if eqn.params.get("dimensions") is not None:  # It transposes first.
    raise _mixes(eqn)
  before = math.prod(old[:axis])
  for i, size in enumerate(new):
    # Axes of size one before it make no difference.
    if size == old[axis] and math.prod(new[:i]) == before:
      return i
  raise MixedError("reshape, which merges the examples' axis with another")


def _unstack(eqn, axes):
  acts = eqn.params["axis"]
  if axes[0] == acts:
    raise _mixes(eqn)
  return axes[0] - (acts < axes[0])


def _squeeze(eqn, axes):
  gone = eqn.params["dimensions"]
  if axes[0] in gone:
    raise _mixes(eqn)
  return axes[0] - sum(d < axes[0] for d in gone)


def _transpose(eqn, axes):
  return eqn.params["permutation"].index(axes[0])


def _dot_general(eqn, axes):
  (contract, batch) = eqn.params["dimension_numbers"]
  if any(a in dims for a, dims in zip(axes, contract, strict=True) if a is not None):
    raise _mixes(eqn)
  places = [
    dims.index(a) if a in dims else None for a, dims in zip(axes, batch, strict=True)
  ]
  if None not in axes:
    if places[0] is None or places[0] != places[1]:
      raise _mixes(eqn)
    return places[0]
  side = 0 if axes[0] is not None else 1
  if places[side] is not None:
    return places[side]
  taken = {*contract[side], *batch[side]}
  free = [d for d in range(len(_shape(eqn.invars[side]))) if d not in taken]
  before = len(batch[0])
  if side == 1:
    first = len(_shape(eqn.invars[0])) - len(contract[0]) - len(batch[0])
    before += first
  return before + free.index(axes[side])


def _convolution(eqn, axes):
  numbers = eqn.params["dimension_numbers"]
  if axes[1] is not None or axes[0] != numbers.lhs_spec[0]:
    raise _mixes(eqn)
  if eqn.params["batch_group_count"] != 1:
    raise _mixes(eqn)
  return numbers.out_spec[0]


def _gather(eqn, axes):
  numbers = eqn.params["dimension_numbers"]
  operand, indices = axes
  out_rank = len(_shape(eqn.outvars[0]))
  of_indices = [d for d in range(out_rank) if d not in numbers.offset_dims]
  paired = dict(
    zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
  )
  if operand is None:
    if indices == len(_shape(eqn.invars[1])) - 1:
      raise _mixes(eqn)
    return of_indices[indices]
  if operand in paired:
    if indices is not None and indices != paired[operand]:
      raise _mixes(eqn)
    return of_indices[paired[operand]]
  whole = eqn.params["slice_sizes"][operand] == _shape(eqn.invars[0])[operand]
  gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  if indices is not None or not whole or operand in gone:
    raise _mixes(eqn)
  kept = [d for d in range(len(_shape(eqn.invars[0]))) if d not in gone]
  return numbers.offset_dims[kept.index(operand)]


def _slice(eqn, axes):
  if _shape(eqn.outvars[0])[axes[0]] != _shape(eqn.invars[0])[axes[0]]:
    raise _mixes(eqn)
  if any(axis is not None for axis in axes[1:]):  # data-dependent starts
    raise _mixes(eqn)
  return axes[0]


def _pad(eqn, axes):
  if axes[0] is None or axes[1] is not None:
    raise _mixes(eqn)
  if tuple(eqn.params["padding_config"][axes[0]]) != (0, 0, 0):
    raise _mixes(eqn)
  return axes[0]


def _reverse(eqn, axes):
  if axes[0] in eqn.params["dimensions"]:
    raise _mixes(eqn)
  return axes[0]


def _window(eqn, axes):
  axis = _only(eqn, axes)
  if (
    eqn.params["window_dimensions"][axis] != 1
    or eqn.params["base_dilation"][axis] != 1
    or eqn.params["window_strides"][axis] != 1
    or tuple(eqn.params["padding"][axis]) != (0, 0)
  ):
    raise _mixes(eqn)
  return axis


def _along_axis(eqn, axes):
  if axes[0] == eqn.params["axis"]:
    raise _mixes(eqn)
  return axes[0]


_RULES: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(_REDUCTIONS, _reduction),
  **dict.fromkeys(_CUMULATIVE, _along_axis),
  **dict.fromkeys(_WINDOWS, _window),
  **dict.fromkeys(_RANDOM, _in_place),
  "bitcast_convert_type": _in_place,
  "broadcast_in_dim": _broadcast_in_dim,
  "concatenate": _along_dimension,
  "conv_general_dilated": _convolution,
  "dot_general": _dot_general,
  "dynamic_slice": _slice,
  "gather": _gather,
  "pad": _pad,
  "reshape": _reshape,
  "rev": _reverse,
  "slice": _slice,
  "split": _along_axis,
  "sort": _along_dimension,
  "squeeze": _squeeze,
  "top_k": _top_k,
  "transpose": _transpose,
  "unstack": _unstack,
}
