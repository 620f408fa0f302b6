"""Propagation of the batch axis through the operations of a jaxpr.

A network processes examples independently if row i of every value, along some axis,
depends only on row i of the batch. `propagate` computes this axis for the outputs of
one operation from the axes of its inputs. It raises an error if the operation mixes
examples, or may do so.
"""

from collections.abc import Callable, Collection, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from l2rw_jax.linearization import backward_rules

# The axis of the examples; None for a value that does not depend on examples.
Axis = int | None


class MixedError(Exception):
  """An operation mixes examples, or may do so. The message names the operation."""


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
    "not", "one_minus_square", "or", "pcast", "polygamma", "polynomial",
    "population_count", "pow", "pvary", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "reshard", "round", "rsqrt", "select_n",
    "sharding_constraint", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient",
    "sub", "tan", "tanh", "threefry2x32", "xor", "zeta",
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
# Linear algebra on the last two axes.
_MATRIX_OPERATIONS = (
  *("cholesky", "eig", "eigh", "hessenberg", "householder_product", "lu", "qr"),
  *("schur", "svd", "triangular_solve", "tridiagonal"),
)
_CALLS = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "checkpoint": "jaxpr",
  "remat2": "jaxpr",
}
# Calls that can be replaced by their bodies.
_INLINED = ("jit", "pjit", "closed_call", "core_call", "call_hi_primitive")


_BODY = "the operations in its body are not analyzed"
_COLLECTIVE = "it takes values from other devices"
_STATE = "it reads or writes a reference"
_RARE = "few networks use it, so it has no rule here"
# All other operations of JAX, and the reasons why they are not supported.
REFUSED = {
  **dict.fromkeys(("call", "cond", "while"), _BODY),
  **dict.fromkeys(("eval_jaxpr", "shard_map"), _BODY),
  "custom_linear_solve": "its derivative solves another linear system",
  "custom_lin": "its backward rule is not analyzed",
  **dict.fromkeys(("all_gather", "all_to_all", "axis_index", "pmax"), _COLLECTIVE),
  **dict.fromkeys(("pmin", "ppermute", "psum", "ragged_all_to_all"), _COLLECTIVE),
  **dict.fromkeys(("get", "swap"), _STATE),
  **dict.fromkeys(("after_all", "create_token"), "it orders side effects"),
  **dict.fromkeys(("empty2", "iota", "rng_uniform"), "it takes no examples"),
  **dict.fromkeys(
    ("random_gamma", "rng_bit_generator"), "it draws numbers for all examples at once"
  ),
  **dict.fromkeys(("approx_top_k", "device_put", "reduce"), _RARE),
  **dict.fromkeys(("select_and_gather_add", "select_and_scatter"), _RARE),
  **dict.fromkeys(("select_and_scatter_add", "tridiagonal_solve"), _RARE),
}


def inner_jaxpr(eqn: Any) -> Any:
  """The jaxpr of a call, as `(jaxpr, consts)`; None if `eqn` is not a call."""
  if eqn.primitive.name == "call_hi_primitive":
    return _expanded(eqn)
  name = _CALLS.get(eqn.primitive.name)
  if name is None or name not in eqn.params:
    return None
  inner = eqn.params[name]
  if isinstance(inner, jax_core.ClosedJaxpr):
    return inner.jaxpr, inner.consts
  return inner, ()


def _expanded(eqn):
  """The jaxpr of an operation that JAX defines by others, such as `jnp.searchsorted`.

  None if an output is inexact, because the operation may then have a derivative rule.
  """
  if any(_is_inexact(v) for v in eqn.outvars):
    return None
  closed = jax.make_jaxpr(eqn.params["_prim"].expand)(*(v.aval for v in eqn.invars))
  return closed.jaxpr, closed.consts


def inlined(eqn: Any) -> Any:
  """`inner_jaxpr` of a call that can be inlined; None otherwise.

  A call with a custom derivative or with rematerialization cannot be inlined.
  """
  return inner_jaxpr(eqn) if eqn.primitive.name in _INLINED else None


class Scan(NamedTuple):
  """The parts of a `jax.lax.scan`.

  Attributes:
    jaxpr: the body, `(*consts, *carry, *rows of xs) -> (*carry, *rows of ys)`.
    closed_consts: values of the constants of `jaxpr`.
    num_consts: number of inputs that are the same in every iteration.
    num_carry: number of values that an iteration passes to the next.
    length: number of iterations.
    reverse: whether the scan runs from the last row to the first.
    unroll: number of iterations in one iteration of the compiled loop.
  """

  jaxpr: Any
  closed_consts: Sequence[Any]
  num_consts: int
  num_carry: int
  length: int
  reverse: bool
  unroll: int


def scan(eqn: Any) -> Scan:
  """The parts of the equation of a `jax.lax.scan`."""
  params = eqn.params
  inner = params["jaxpr"]
  is_closed = isinstance(inner, jax_core.ClosedJaxpr)
  if "ft_in" in params:  # Since jax 0.11.
    num_consts, num_carry, _ = (len(part) for part in params["ft_in"].unpack())
  else:
    num_consts, num_carry = params["num_consts"], params["num_carry"]
  return Scan(
    inner.jaxpr if is_closed else inner,
    inner.consts if is_closed else (),
    num_consts,
    num_carry,
    params["length"],
    params["reverse"],
    params["unroll"],
  )


def body_axes(
  eqn: Any, axes: Sequence[Axis], *, check_rules: bool = True
) -> tuple[list[Axis | MixedError], list[Axis | MixedError]]:
  """The batch axes of the inputs and outputs of the body of a `jax.lax.scan`.

  The axis of a carry is the same before and after every iteration.

  Args:
    eqn: equation of the scan.
    axes: batch axes of its inputs.
    check_rules: see `propagate`.

  Returns:
    A batch axis, or a MixedError, for each input of the body and for each output.

  Raises:
    MixedError: the scan iterates over the examples.
  """
  loop = scan(eqn)
  first_x = loop.num_consts + loop.num_carry
  if 0 in axes[first_x:]:
    raise MixedError("scan, which iterates over the examples")
  inputs: list[Any] = [*axes[:first_x]]
  inputs += [None if axis is None else axis - 1 for axis in axes[first_x:]]
  carry = slice(loop.num_consts, first_x)
  # Derivative rules take long to trace, so they are checked only when the axes of the
  # carry are known.
  for check in dict.fromkeys((False, check_rules)):
    before: list[Any] | None = None
    while before != inputs[carry]:  # This runs once if nothing is carried.
      before = inputs[carry]
      outputs = _propagate_jaxpr(loop.jaxpr, len(loop.closed_consts), inputs, check)
      inputs[carry] = [
        _common_carry(*pair)
        for pair in zip(before, outputs[: loop.num_carry], strict=True)
      ]
  return inputs, outputs


def _common_carry(before, after):
  """The batch axis of a carry, given its axes before and after one iteration."""
  if before is None or isinstance(after, MixedError):
    return before if isinstance(before, MixedError) else after
  if after is None or isinstance(before, MixedError) or before == after:
    return before
  return MixedError("a scan that moves the batch axis of its carry")


def propagate(
  eqn: Any,
  axes: Sequence[Axis],
  *,
  check_rules: bool = True,
  row_columns: Collection[tuple[int, int]] = (),
) -> list[Axis | MixedError]:
  """The batch axis of each output of an operation.

  Args:
    eqn: equation of a jaxpr.
    axes: batch axes of its inputs, at least one of them not None.
    check_rules: whether the derivative rules of a `jax.custom_jvp` or `jax.custom_vjp`
      are also checked.
    row_columns: pairs (j, i) such that entry j of every index vector of a gather or
      scatter is known to equal the position of this vector along axis i of the array
      of indices, as in `x[jnp.arange(len(x)), labels]`.

  Returns:
    A batch axis for each output. An output of a call or of a scan that mixes examples
    has a MixedError instead.

  Raises:
    MixedError: the operation mixes examples or may do so, and is neither a call nor a
      scan; or a scan iterates over the examples.
  """
  name = eqn.primitive.name
  inner = inner_jaxpr(eqn)
  if inner is not None:
    jaxpr, consts = inner
    output_axes = _propagate_jaxpr(jaxpr, len(consts), axes, check_rules)
    if check_rules and name == "custom_jvp_call":
      return _checked_by_rule(eqn, axes, output_axes)
    if check_rules and name == "custom_vjp_call":
      return _checked_by_backward_rule(eqn, axes, output_axes)
    return output_axes
  if name == "scan":
    inputs, outputs = body_axes(eqn, axes, check_rules=check_rules)
    first, end = scan(eqn).num_consts, scan(eqn).num_consts + scan(eqn).num_carry
    rows = outputs[end - first :]
    return [
      *inputs[first:end],
      *(axis + 1 if isinstance(axis, int) else axis for axis in rows),
    ]
  if name in _ELEMENTWISE:
    return [_elementwise(eqn, axes)] * len(eqn.outvars)
  if name == "optimization_barrier":
    return list(axes)
  if name == "pallas_call":
    return _pallas_call(eqn, axes)
  rule = _RULES.get(name)
  if rule is None:
    why = f": {REFUSED[name]}" if name in REFUSED else ""
    raise MixedError(f"{name}, which is not known to keep examples apart{why}")
  if row_columns and takes_indices(name):
    rule = functools.partial(rule, row_columns=row_columns)
  # `vmap` uses NumPy integers for axes.
  return [int(rule(eqn, axes))] * len(eqn.outvars)


def takes_indices(name: str) -> bool:
  """Whether the operation with this name is a gather or a scatter."""
  return name == "gather" or name in _SCATTERS


def is_supported(name: str) -> bool:
  """Whether `propagate` supports the operation with this name."""
  return (
    name in _ELEMENTWISE
    or name in _RULES
    or name in _CALLS
    or name in ("optimization_barrier", "pallas_call", "scan")
  )


def is_elementwise(jaxpr: Any) -> bool:
  """Whether all operations are elementwise, broadcasts or reductions."""

  def is_cheap(eqn):
    call = inner_jaxpr(eqn)
    if call is not None:
      return is_elementwise(call[0])
    name = eqn.primitive.name
    return name in _ELEMENTWISE or name in _REDUCTIONS or name == "broadcast_in_dim"

  return all(map(is_cheap, jaxpr.eqns))


def _checked_by_rule(eqn, axes, output_axes):
  """`output_axes`, with errors where the rule of a custom_jvp mixes examples."""
  params = eqn.primitive.get_bind_params(eqn.params)

  def derivative(values, tangents):
    return jax.jvp(lambda *x: eqn.primitive.bind(*x, **params), values, tangents)[1]

  values = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
  tangents = tuple(
    v if jnp.issubdtype(v.dtype, jnp.inexact) else v.update(dtype=jax.dtypes.float0)
    for v in values
  )
  rule = jax.make_jaxpr(derivative)(values, tangents)
  # The rule may call the function itself, whose rule must not be checked again.
  tangent_axes = _propagate_jaxpr(
    rule.jaxpr, len(rule.consts), (*axes, *axes), check_rules=False
  )
  return [
    axis if tangent_axis is None or tangent_axis == axis else _mixes(eqn)
    for axis, tangent_axis in zip(output_axes, tangent_axes, strict=True)
  ]


def _checked_by_backward_rule(eqn, axes, output_axes):
  """`output_axes`, or errors if the backward rule of a custom_vjp is not supported.

  The rule must not mix examples and must be linear (see `backward_rules`).
  """
  rule = backward_rules.rule_of(eqn)
  known = [None if isinstance(axis, MixedError) else axis for axis in output_axes]
  # The rule may call the function itself, whose rule must not be checked again.
  rule_axes = _propagate_jaxpr(
    rule.jaxpr, len(rule.consts), (*axes, *known), check_rules=False
  )
  pairs = zip((*output_axes, *axes), rule_axes, strict=True)
  # Outputs that mix examples are not used, nor are gradients with respect to constant
  # inputs.
  is_apart = all(
    actual is None or actual == expected
    for expected, actual in pairs
    if not isinstance(expected, MixedError) and expected is not None
  )
  if is_apart and backward_rules.is_linear(rule, len(eqn.outvars)):
    return output_axes
  fault = "is not linear in its cotangent" if is_apart else "mixes examples"
  error = MixedError(f"{eqn.primitive.name}, whose backward rule {fault}")
  return [axis if isinstance(axis, MixedError) else error for axis in output_axes]


def _propagate_jaxpr(jaxpr, num_consts, axes, check_rules):
  """The batch axes of the outputs of a jaxpr; its constants have no axis."""
  axis_by_var = dict(
    zip((*jaxpr.constvars, *jaxpr.invars), (*[None] * num_consts, *axes), strict=True)
  )

  def axis_of(atom):
    return None if isinstance(atom, jax_core.Literal) else axis_by_var[atom]

  for eqn in jaxpr.eqns:
    input_axes = [axis_of(v) for v in eqn.invars]
    # Errors are kept as values, because they only matter if an output depends on them.
    errors = [axis for axis in input_axes if isinstance(axis, MixedError)]
    if errors:
      output_axes: list[Any] = errors[:1] * len(eqn.outvars)
    elif all(axis is None for axis in input_axes):
      output_axes = [None] * len(eqn.outvars)
    else:
      try:
        output_axes = propagate(eqn, input_axes, check_rules=check_rules)
      except MixedError as error:
        output_axes = [error] * len(eqn.outvars)
    axis_by_var |= dict(zip(eqn.outvars, output_axes, strict=True))
  return [axis_of(v) for v in jaxpr.outvars]


def _shape(atom):
  return atom.aval.shape


def _is_inexact(atom):
  return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _mixes(eqn):
  return MixedError(f"{eqn.primitive.name}, which mixes examples")


def _common_axis(eqn, axes):
  """The batch axis of the inputs, which must be the same for all that have one."""
  distinct = {axis for axis in axes if axis is not None}
  if len(distinct) > 1:
    raise _mixes(eqn)
  return distinct.pop()


def _elementwise(eqn, axes):
  axis = _common_axis(eqn, axes)
  # A batch of size one would be broadcast along an axis of another input.
  for atom, input_axis in zip(eqn.invars, axes, strict=True):
    if input_axis is not None and _shape(atom)[axis] != _shape(eqn.outvars[0])[axis]:
      raise _mixes(eqn)
  return axis


def _reduction(eqn, axes):
  (axis,) = axes
  if axis in eqn.params["axes"]:
    raise _mixes(eqn)
  return axis - sum(a < axis for a in eqn.params["axes"])


def _along_dimension(eqn, axes):
  axis = _common_axis(eqn, axes)
  if axis == eqn.params["dimension"]:
    raise _mixes(eqn)
  return axis


def _top_k(eqn, axes):
  rank = len(_shape(eqn.invars[0]))
  if axes[0] == eqn.params.get("axis", -1) % rank:
    raise _mixes(eqn)
  return axes[0]


def _leading_axes(eqn, axes):
  """The batch axis of a random draw or bitcast, which changes only trailing axes."""
  axis = _common_axis(eqn, axes)
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
  if eqn.params.get("dimensions") is not None:  # The reshape also transposes.
    raise _mixes(eqn)
  before = math.prod(old[:axis])
  for i, size in enumerate(new):
    # Compare products of sizes, which do not change with axes of size one.
    if size == old[axis] and math.prod(new[:i]) == before:
      return i
  raise MixedError("reshape, which merges the batch axis with another axis")


def _unstack(eqn, axes):
  removed = eqn.params["axis"]
  if axes[0] == removed:
    raise _mixes(eqn)
  return axes[0] - (removed < axes[0])


def _squeeze(eqn, axes):
  removed = eqn.params["dimensions"]
  if axes[0] in removed:
    raise _mixes(eqn)
  return axes[0] - sum(d < axes[0] for d in removed)


def _transpose(eqn, axes):
  return eqn.params["permutation"].index(axes[0])


def _dot_general(eqn, axes):
  (contract, batch) = eqn.params["dimension_numbers"]
  if any(a in dims for a, dims in zip(axes, contract, strict=True) if a is not None):
    raise _mixes(eqn)
  batch_positions = [
    dims.index(a) if a in dims else None for a, dims in zip(axes, batch, strict=True)
  ]
  if None not in axes:
    if batch_positions[0] is None or batch_positions[0] != batch_positions[1]:
      raise _mixes(eqn)
    return batch_positions[0]
  side = 0 if axes[0] is not None else 1
  if batch_positions[side] is not None:
    return batch_positions[side]
  removed = {*contract[side], *batch[side]}
  free = [d for d in range(len(_shape(eqn.invars[side]))) if d not in removed]
  before = len(batch[0])
  if side == 1:
    before += len(_shape(eqn.invars[0])) - len(contract[0]) - len(batch[0])
  return before + free.index(axes[side])


def _convolution(eqn, axes):
  numbers = eqn.params["dimension_numbers"]
  if axes[1] is not None or axes[0] != numbers.lhs_spec[0]:
    raise _mixes(eqn)
  if eqn.params["batch_group_count"] != 1:
    raise _mixes(eqn)
  return numbers.out_spec[0]


def _gather(eqn, axes, row_columns=()):
  numbers = eqn.params["dimension_numbers"]
  operand, indices = axes
  out_rank = len(_shape(eqn.outvars[0]))
  index_dims = [d for d in range(out_rank) if d not in numbers.offset_dims]
  paired = dict(
    zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
  )
  if operand is None:
    if indices == len(_shape(eqn.invars[1])) - 1:
      raise _mixes(eqn)
    return index_dims[indices]
  if operand in paired:
    if indices is not None and indices != paired[operand]:
      raise _mixes(eqn)
    return index_dims[paired[operand]]
  row_axis = _row_axis(eqn, operand, numbers.start_index_map, row_columns)
  if row_axis is not None and operand in numbers.collapsed_slice_dims:
    if indices is not None and indices != row_axis:
      raise _mixes(eqn)
    return index_dims[row_axis]
  is_whole = eqn.params["slice_sizes"][operand] == _shape(eqn.invars[0])[operand]
  removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  if indices is not None or not is_whole or operand in removed:
    raise _mixes(eqn)
  window = [d for d in range(len(_shape(eqn.invars[0]))) if d not in removed]
  return numbers.offset_dims[window.index(operand)]


def _row_axis(eqn, axis, index_map, row_columns):
  """The axis of the indices along which a gather or scatter visits all rows in order.

  Args:
    eqn: the operation.
    axis: an axis of its operand.
    index_map: the axes of the operand to which the entries of an index vector belong.
    row_columns: see `propagate`.

  Returns:
    The axis, or None if there is none.
  """
  sizes = _shape(eqn.invars[1])
  for j, i in row_columns:
    if index_map[j] == axis and sizes[i] == _shape(eqn.invars[0])[axis]:
      return i
  return None


def _slice(eqn, axes):
  if _shape(eqn.outvars[0])[axes[0]] != _shape(eqn.invars[0])[axes[0]]:
    raise _mixes(eqn)
  if any(axis is not None for axis in axes[1:]):  # The starts depend on examples.
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
  axis = _common_axis(eqn, axes)
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
  axis = _common_axis(eqn, axes)
  return axis + (eqn.params["axis"] <= axis)


def _tile(eqn, axes):
  if eqn.params["reps"][axes[0]] != 1:
    raise _mixes(eqn)
  return axes[0]


def _fft(eqn, axes):
  if axes[0] >= len(_shape(eqn.invars[0])) - len(eqn.params["fft_lengths"]):
    raise _mixes(eqn)
  return axes[0]


def _matrix_operation(eqn, axes):
  axis = _common_axis(eqn, axes)
  for atom, input_axis in zip(eqn.invars, axes, strict=True):
    if input_axis is not None and axis >= len(_shape(atom)) - 2:
      raise _mixes(eqn)
  return axis


def _dynamic_update_slice(eqn, axes):
  axis = _common_axis(eqn, axes)
  operand, update = (_shape(v) for v in eqn.invars[:2])
  if any(a is not None for a in axes[2:]) or operand[axis] != update[axis]:
    raise _mixes(eqn)
  return axis


def _scatter(eqn, axes, row_columns=()):
  """The batch axis, along which the operand is updated as a whole or row by row."""
  numbers = eqn.params["dimension_numbers"]
  operand, updates = (len(_shape(eqn.invars[i])) for i in (0, 2))
  removed = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
  window = [d for d in range(operand) if d not in removed]
  index_dims = [d for d in range(updates) if d not in numbers.update_window_dims]
  # Possible batch axes of the operand, each with the corresponding batch axes of the
  # indices and of the updates.
  candidates = {
    d: (None, u)
    for d, u in zip(window, numbers.update_window_dims, strict=True)
    if d not in numbers.scatter_dims_to_operand_dims
    and _shape(eqn.invars[0])[d] == _shape(eqn.invars[2])[u]
  }
  candidates |= {
    d: (i, index_dims[i])
    for d, i in zip(
      numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    )
  }
  by_row = {
    d: _row_axis(eqn, d, numbers.scatter_dims_to_operand_dims, row_columns)
    for d in numbers.inserted_window_dims
  }
  candidates |= {d: (i, index_dims[i]) for d, i in by_row.items() if i is not None}
  for axis, other_axes in candidates.items():
    pairs = zip(axes, (axis, *other_axes), strict=True)
    if all(actual is None or actual == expected for actual, expected in pairs):
      return axis
  raise _mixes(eqn)


def _pallas_call(eqn, axes):
  """The batch axes of the outputs of a kernel whose programs read one example each."""
  mapping = eqn.params["grid_mapping"]
  first = len(axes) - mapping.num_inputs  # Grid sizes and indices come first.
  inputs = mapping.block_mappings[: mapping.num_inputs]
  outputs = mapping.block_mappings[mapping.num_inputs :]
  dimensions = {
    _grid_dimension(block, axis)
    for block, axis in zip(inputs, axes[first:], strict=True)
    if axis is not None
  }
  if len(dimensions) != 1 or None in dimensions or set(axes[:first]) - {None}:
    raise _mixes(eqn)
  (dimension,) = dimensions
  if eqn.params.get("input_output_aliases"):
    raise MixedError("pallas_call, which writes into its inputs")
  if mapping.scratch_avals and not _is_parallel(eqn, dimension):
    raise MixedError("pallas_call, whose programs may share scratch memory")
  result = []
  for block in outputs:
    candidates = [
      axis
      for axis in range(len(block.block_shape))
      if _grid_dimension(block, axis) == dimension
    ]
    if len(candidates) != 1:
      raise _mixes(eqn)
    result += candidates
  return result


def _grid_dimension(block, axis):
  """The dimension of the grid that indexes the rows of an axis; None if none does."""
  size = block.block_shape[axis]
  is_row = type(size).__name__ == "Squeezed" or getattr(size, "block_size", size) == 1
  index_map = getattr(block.index_map_jaxpr, "jaxpr", block.index_map_jaxpr)
  index = index_map.outvars[axis]
  if not is_row or block.transforms:
    return None
  return next((i for i, v in enumerate(index_map.invars) if v is index), None)


def _is_parallel(eqn, dimension):
  """Whether the programs along a dimension of the grid are declared independent."""
  params = eqn.params.get("compiler_params")
  for options in params.values() if hasattr(params, "values") else [params]:
    semantics = getattr(options, "dimension_semantics", None) or ()
    if dimension < len(semantics):
      declared = getattr(semantics[dimension], "value", semantics[dimension])
      if declared == "parallel":
        return True
  return False


_RULES: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(_REDUCTIONS, _reduction),
  **dict.fromkeys(_CUMULATIVE, _along_axis),
  **dict.fromkeys(_WINDOWS, _window),
  **dict.fromkeys(_RANDOM, _leading_axes),
  **dict.fromkeys(_SCATTERS, _scatter),
  **dict.fromkeys(_MATRIX_OPERATIONS, _matrix_operation),
  **dict.fromkeys(("from_edtype", "to_edtype"), _leading_axes),
  "bitcast_convert_type": _leading_axes,
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
