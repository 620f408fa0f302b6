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
    "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex",
    "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div",
    "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite",
    "layout_constraint", "le", "le_to", "lgamma", "log", "log1p", "log2", "logistic",
    "lt", "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter",
    "not", "one_minus_square", "or", "pcast", "polygamma", "population_count", "pow",
    "pvary", "real", "reduce_precision", "regularized_incomplete_beta", "rem",
    "reshard", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "threefry2x32", "xor", "zeta",
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
  f"random_{name}"
  for name in ("bits", "clone", "fold_in", "seed", "split", "unwrap", "wrap")
)
_SCATTERS = (
  "scatter",
  *(f"scatter-{name}" for name in ("add", "max", "min", "mul", "sub")),
)
# Of each matrix of a stack of matrices.
_OF_MATRICES = (
  *("cholesky", "eig", "eigh", "hessenberg", "householder_product", "lu", "qr"),
  *("schur", "svd", "triangular_solve", "tridiagonal"),
)
_CALLS = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
}


_LOOP = "it runs other operations, which are not followed"
_COLLECTIVE = "it takes values from other devices"
_STATE = "it reads or writes a reference"
_RARE = "few networks have it"
# The rest of JAX's operations, and why no examples are followed through them.
REFUSED = {
  **dict.fromkeys(("call", "cond", "scan", "while"), _LOOP),
  **dict.fromkeys(("eval_jaxpr", "remat2"), _LOOP),
  **dict.fromkeys(("checkpoint", "shard_map"), _LOOP),
  "custom_linear_solve": "its derivative solves another equation",
  "custom_lin": "its backward rule is not followed",
  "custom_vjp_call": "its backward rule is not followed",
  **dict.fromkeys(("all_gather", "all_to_all", "axis_index", "pmax"), _COLLECTIVE),
  **dict.fromkeys(("pmin", "ppermute", "psum", "ragged_all_to_all"), _COLLECTIVE),
  **dict.fromkeys(("get", "swap"), _STATE),
  **dict.fromkeys(("after_all", "create_token"), "it orders effects"),
  **dict.fromkeys(("empty2", "iota", "rng_uniform"), "it takes no examples"),
  **dict.fromkeys(("random_gamma", "rng_bit_generator"), "it draws for all at once"),
  **dict.fromkeys(("approx_top_k", "device_put", "polynomial", "reduce"), _RARE),
  **dict.fromkeys(("select_and_gather_add", "select_and_scatter"), _RARE),
  **dict.fromkeys(("select_and_scatter_add", "tridiagonal_solve"), _RARE),
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


def propagate(eqn: Any, axes: Sequence[Axis], *, rules: bool = True) -> list[Any]:
  """The batch axis of each result of an operation, or a MixedError in its place.

  A call has results that mix examples and results that do not.

  Args:
    eqn: of a jaxpr.
    axes: of its arguments, at least one not None.
    rules: whether the derivative of a custom_jvp is followed too.

  Raises:
    MixedError: the operation is no call, and mixes examples, or is not known to keep
      them apart.
  """
  inner = inner_jaxpr(eqn)
  if inner is not None:
    jaxpr, consts = inner
    found = _through(jaxpr, len(consts), axes, rules)
    if rules and eqn.primitive.name == "custom_jvp_call":
      return _through_rule(eqn, axes, found)
    return found
  name = eqn.primitive.name
  if name in _ELEMENTWISE:
    return [_same(eqn, axes)] * len(eqn.outvars)
  if name == "optimization_barrier":
    return list(axes)
  rule = _RULES.get(name)
  if rule is None:
    why = f": {REFUSED[name]}" if name in REFUSED else ""
    raise MixedError(f"{name}, which is not known to keep examples apart{why}")
  return [int(rule(eqn, axes))] * len(eqn.outvars)  # vmap writes NumPy integers.


def follows(name: str) -> bool:
  """Whether examples are followed through the operation of this name."""
  return (
    name in _ELEMENTWISE
    or name in _RULES
    or name in _CALLS
    or name == "optimization_barrier"
  )


def _through_rule(eqn, axes, found):
  """`found`, but for results of which the derivative of a custom_jvp mixes examples."""
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
  return [
    axis if other is None or other == axis else _mixes(eqn)
    for axis, other in zip(found, of_rule, strict=True)
  ]


def _through(jaxpr, num_consts, axes, rules):
  """The batch axes of what a jaxpr returns, whose constants have none."""
  found = dict(
    zip((*jaxpr.constvars, *jaxpr.invars), (*[None] * num_consts, *axes), strict=True)
  )

  def axis_of(atom):
    return None if isinstance(atom, jax_core.Literal) else found[atom]

  for eqn in jaxpr.eqns:
    own = [axis_of(v) for v in eqn.invars]
    # An error counts only if a result needs what it is about.
    errors = [axis for axis in own if isinstance(axis, MixedError)]
    if errors:
      outs: list[Any] = errors[:1] * len(eqn.outvars)
    elif all(axis is None for axis in own):
      outs = [None] * len(eqn.outvars)
    else:
      try:
        outs = propagate(eqn, own, rules=rules)
      except MixedError as error:
        outs = [error] * len(eqn.outvars)
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


def _stack(eqn, axes):
  axis = _only(eqn, axes)
  return axis + (eqn.params["axis"] <= axis)


def _tile(eqn, axes):
  if eqn.params["reps"][axes[0]] != 1:
    raise _mixes(eqn)
  return axes[0]


def _fft(eqn, axes):
  if axes[0] >= len(_shape(eqn.invars[0])) - len(eqn.params["fft_lengths"]):
    raise _mixes(eqn)
  return axes[0]


def _of_matrices(eqn, axes):
  axis = _only(eqn, axes)
  for atom, own in zip(eqn.invars, axes, strict=True):
    if own is not None and axis >= len(_shape(atom)) - 2:
      raise _mixes(eqn)
  return axis


def _dynamic_update_slice(eqn, axes):
  axis = _only(eqn, axes)
  operand, update = (_shape(v) for v in eqn.invars[:2])
  if any(a is not None for a in axes[2:]) or operand[axis] != update[axis]:
    raise _mixes(eqn)
  return axis


def _scatter(eqn, axes):
  """Along an axis that is updated as a whole, or index by index in step with it."""
  numbers = eqn.params["dimension_numbers"]
  operand, updates = (len(_shape(eqn.invars[i])) for i in (0, 2))
  gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
  window = [d for d in range(operand) if d not in gone]
  of_indices = [d for d in range(updates) if d not in numbers.update_window_dims]
  # For each axis of the operand, that of the indices and that of the updates.
  places = {
    d: (None, u)
    for d, u in zip(window, numbers.update_window_dims, strict=True)
    if d not in numbers.scatter_dims_to_operand_dims
    and _shape(eqn.invars[0])[d] == _shape(eqn.invars[2])[u]
  }
  places |= {
    d: (i, of_indices[i])
    for d, i in zip(
      numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    )
  }
  for axis, place in places.items():
    given = zip(axes, (axis, *place), strict=True)
    if all(have is None or have == want for have, want in given):
      return axis
  raise _mixes(eqn)


_RULES: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(_REDUCTIONS, _reduction),
  **dict.fromkeys(_CUMULATIVE, _along_axis),
  **dict.fromkeys(_WINDOWS, _window),
  **dict.fromkeys(_RANDOM, _in_place),
  **dict.fromkeys(_SCATTERS, _scatter),
  **dict.fromkeys(_OF_MATRICES, _of_matrices),
  **dict.fromkeys(("from_edtype", "to_edtype"), _in_place),
  "bitcast_convert_type": _in_place,
  "broadcast_in_dim": _broadcast_in_dim,
  "concatenate": _along_dimension,
  "conv_general_dilated": _convolution,
  "dot_general": _dot_general,
  "dynamic_slice": _slice,
  "dynamic_update_slice": _dynamic_update_slice,
  "fft": _fft,
  "gather": _gather,
  "pad": _pad,
  "reshape": _reshape,
  "rev": _reverse,
  "slice": _slice,
  "split": _along_axis,
  "sort": _along_dimension,
  "squeeze": _squeeze,
  "stack": _stack,
  "tile": _tile,
  "top_k": _top_k,
  "transpose": _transpose,
  "unstack": _unstack,
}
