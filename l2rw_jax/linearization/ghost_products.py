"""Inner products of per-example gradients from recorded activations and cotangents.

The gradient of the loss of example i with respect to the parameters of one operation (a
*use*) is a sum over positions t of products of two vectors: an activation and a
cotangent, which is the gradient of the loss with respect to the output of the
operation:

    dense layer, convolution    G_i = sum_t left_it right_it^T
    embedding                   the same, where left_it is one-hot and kept as an index

Inner products therefore have two forms:

    formed    <G_i, G_j>, from G_i and G_j
    ghost     sum_ts <left_it, left_js> <right_it, right_js>

For T positions and vectors of lengths L and R, the FLOPs of the formed product are
proportional to T L R, and those of the ghost product are proportional to T^2 (L + R).
`PerExampleGradients` adds the gradients of all uses of a parameter and chooses the form
with fewer FLOPs. The gradients of other operations (scales, biases, ...) are formed.

References: see `per_example`.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import batch_axes
from l2rw_jax.linearization import parameter_uses

# Operations on a parameter that do not change inner products of its gradients.
_ISOMETRIES = ("convert_element_type", "copy", "neg", "reshape", "squeeze", "transpose")
_ELEMENTWISE = frozenset(
  (
    *("add", "add_any", "atan2", "clamp", "complex", "div", "max", "min", "mul"),
    *("nextafter", "pow", "rem", "select_n", "sub"),
  )
)


class _Factors(NamedTuple):
  """The gradients of a use as sums of products of two vectors.

  The axes of the parameter are split into three tuples: axes along which the products
  are separate (groups of a convolution), axes of the left vectors, and axes of the
  right vectors. Their sizes are G, L and R; T is the number of positions.

  Attributes:
    place: the gradients are with respect to the value at this place in the program.
    shape: shape of this value, possibly with axes split.
    axes: group, left and right axes of `shape`.
    left: [B, G, T, L], or [B, 1, T] integers that stand for one-hot vectors.
    right: [B, G, T, R].
    form: computes the gradients, [B, *shape of the value]; if it is None, they are
      computed as sums of products of the vectors.
  """

  place: int
  shape: tuple[int, ...]
  axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
  left: base.Array
  right: base.Array
  form: Callable[[], base.Array] | None = None

  @property
  def is_index(self) -> bool:
    """Whether the left vectors are one-hot."""
    return self.left.ndim == 3

  def swapped(self) -> "_Factors":
    """The same sum with left and right vectors exchanged."""
    groups, left, right = self.axes
    return self._replace(axes=(groups, right, left), left=self.right, right=self.left)

  def sizes(self) -> tuple[int, int, int, int]:
    """G, T, L and R."""
    groups, left, _ = (math.prod(self.shape[a] for a in axes) for axes in self.axes)
    return groups, self.right.shape[2], left, self.right.shape[3]

  def formed(self, shape: tuple[int, ...]) -> base.Array:
    """The gradients, [B, *shape]."""
    if self.form is not None:
      return self.form()
    _, _, size, _ = self.sizes()
    if self.is_index:

      def add_rows(index, right):
        return jnp.zeros((size, right.shape[-1]), right.dtype).at[index].add(right)

      gradients = jax.vmap(add_rows)(self.left[:, 0], wide(self.right[:, 0]))
    else:
      gradients = _einsum("bgtl,bgtr->bglr", self.left, self.right)
    axes = sum(self.axes, ())
    batch = gradients.shape[0]
    gradients = gradients.reshape(batch, *(self.shape[a] for a in axes))
    order = [1 + axes.index(a) for a in range(len(axes))]
    return gradients.transpose(0, *order).reshape(batch, *shape)


class _Formed(NamedTuple):
  """The gradients of a use.

  Attributes:
    place: the gradients are with respect to the value at this place in the program.
    gradients: [B, *shape of the value].
  """

  place: int
  gradients: base.Array


def uses_of(plan: parameter_uses.Plan) -> list[parameter_uses.Step]:
  """The uses of parameters in a program.

  Raises:
    NotLayerwiseError: one of them is a loop or a call, whose gradients are not products
      of its inputs and cotangents.
  """
  uses: list[parameter_uses.Step] = []
  for step in plan.parameter_uses():
    name = "scan" if isinstance(step, parameter_uses.Loop) else "checkpoint"
    if isinstance(step, parameter_uses.Step):
      if not any(True for _ in jax_core.jaxprs_in_params(step.eqn.params)):
        uses.append(step)
        continue
      name = step.eqn.primitive.name
    raise parameter_uses.NotLayerwiseError(f"parameters are used inside a {name}")
  return uses


class PerExampleGradients:
  """The gradients of the losses of a batch, one for each example."""

  def __init__(
    self,
    plan: parameter_uses.Plan,
    values: dict[int, Any],
    leaves: list[base.Array],
    cotangents: list[list[base.Array]],
    size: int,
  ):
    """Prepares the uses of a program that has been run.

    Args:
      plan: the operations of the program.
      values: the values that the plan computes, by their place in it.
      leaves: the parameters; their places are 0, 1, ...
      cotangents: for each parameter use, the gradients of the sum of the losses with
        respect to its differentiable outputs.
      size: B.
    """
    self._plan = plan
    self._steps = uses_of(plan)
    self._values = values
    self._leaves = leaves
    self._cotangents = cotangents
    self._size = size
    self._sources, self._producers = plan.sources, plan.producers
    self._uses: list[_Factors | _Formed] = []
    for step, gradients in zip(self._steps, cotangents, strict=True):
      for index in step.param_inputs:
        self._uses.append(self._use(step, index, gradients))

  def squares(self) -> base.Array:
    """The squared norm of the gradient of each example, [B]."""
    return self._total(pairs=False)

  def products(self) -> base.Array:
    """The inner products of the gradients of all pairs of examples, [B, B]."""
    return self._total(pairs=True)

  def weighted(self, weights: base.Array) -> list[base.Array]:
    """The sum of w_i g_i over the examples, as a list like the leaves.

    Args:
      weights: w, [B].
    """
    places, param_cotangents = [], []
    for step, cotangents in zip(self._steps, self._cotangents, strict=True):
      inputs = [parameter_uses.value_of(value, self._values) for value in step.inputs]
      weighted = [
        _times(cotangent, weights, axis)
        for cotangent, (_, axis) in zip(
          cotangents, step.differentiable_outputs, strict=True
        )
      ]
      apply, parameters = _as_function(step, inputs, step.param_inputs)
      param_cotangents += jax.vjp(apply, *parameters)[1](weighted)
      places += [step.inputs[i].place for i in step.param_inputs]
    _, vjp_fn = jax.vjp(self._values_at(places, range(len(self._leaves))), self._leaves)
    return vjp_fn(param_cotangents)[0]

  def _values_at(self, places, leaves):
    """The values at some places as a function of the leaves with these indices."""

    def values_of(moving):
      values = self._values | dict(zip(leaves, moving, strict=True))
      self._plan.run(parameter_uses.Kind.PARAMS, values, run_refused=False)
      return [values[place] for place in places]

    return values_of

  def _total(self, pairs):
    terms, formed = [], list(range(len(self._leaves)))
    for i, factors in self._candidates().items():
      if _is_ghost_cheaper(factors, pairs, self._size):
        terms.append(_ghost_products(factors) if pairs else _ghost_squares(factors))
        formed.remove(i)
    for gradients in self._formed(formed):
      flat = wide(gradients.reshape(self._size, -1))
      if pairs:
        terms.append(jnp.real(_einsum("bp,cp->bc", flat, jnp.conj(flat))))
      else:
        terms.append(jnp.sum(jnp.square(jnp.abs(flat)), axis=1))
    if not terms:
      return jnp.zeros((self._size, self._size) if pairs else self._size)
    return summed(terms)

  def _candidates(self):
    """Factors of the parameters that have a ghost form, by the index of the leaf."""
    places: dict[int, set[int]] = {i: set() for i in range(len(self._leaves))}
    for use in self._uses:
      for i in self._sources(use.place):
        places[i].add(use.place)
    candidates = {}
    for i, used in places.items():
      if len(used) == 1 and self._is_view(*used):
        factors = _merged([use for use in self._uses if use.place in used])
        if factors is not None:
          candidates[i] = factors
    return candidates

  def _is_view(self, place):
    """Whether a value is a leaf, up to operations that keep inner products."""
    while place in self._producers:
      step = self._producers[place]
      same_size = step.eqn.invars[0].aval.size == step.eqn.outvars[0].aval.size
      is_view = step.eqn.primitive.name in _ISOMETRIES or (
        step.eqn.primitive.name == "broadcast_in_dim" and same_size
      )
      if not is_view:
        return False
      place = step.inputs[0].place
    return place < len(self._leaves)

  def _formed(self, leaves):
    """The gradients of the leaves with these indices, each [B, *shape]."""
    totals: dict[int, base.Array] = {}
    for use in self._uses:
      if not self._sources(use.place).isdisjoint(leaves):
        shape = jnp.shape(self._values[use.place])
        gradients = use.gradients if isinstance(use, _Formed) else use.formed(shape)
        gradients = gradients.astype(self._values[use.place].dtype)
        if use.place in totals:
          gradients += totals[use.place]
        totals[use.place] = gradients
    if not totals:
      return []

    moving = [self._leaves[i] for i in leaves]
    _, vjp_fn = jax.vjp(self._values_at(list(totals), leaves), moving)
    return jax.vmap(vjp_fn)(list(totals.values()))[0]

  def _use(self, step, index, cotangents):
    """The gradients of one use with respect to the input with index `index`."""
    inputs = [parameter_uses.value_of(value, self._values) for value in step.inputs]
    name = step.eqn.primitive.name
    if len(step.param_inputs) == 1 and name in _FACTORS:
      place, permutation = self._untransposed(step.inputs[index].place, name)
      factors = _FACTORS[name](step, inputs, cotangents[0], permutation)
      if factors is not None:
        return _Factors(place, *factors)
    place = step.inputs[index].place
    apply, (parameter,) = _as_function(step, inputs, [index])
    if name in _ELEMENTWISE:
      return self._elementwise_use(step, place, parameter, apply, cotangents)
    axis = self._row_axis(step, index)
    if axis is not None:
      (rows,) = jax.vjp(apply, parameter)[1](cotangents)
      return self._rows(place, rows, axis)
    return _Formed(place, _one_by_one(step, apply, parameter, cotangents, self._size))

  def _untransposed(self, place, name):
    """The place before casts and transpositions, and a permutation of axes.

    Axis a of the value at the given place is axis `permutation[a]` at the returned one.
    For a convolution, only casts are undone. `name` is the operation of the use.
    """
    permutation = list(range(jnp.ndim(self._values[place])))
    while place in self._producers:
      step = self._producers[place]
      if step.eqn.primitive.name == "transpose" and name != "conv_general_dilated":
        permutation = [step.eqn.params["permutation"][a] for a in permutation]
      elif step.eqn.primitive.name not in ("convert_element_type", "copy"):
        break
      place = step.inputs[0].place
    return place, permutation

  def _elementwise_use(self, step, place, parameter, apply, cotangents):
    """The gradients with respect to an operand of an elementwise operation."""
    (cotangent,), ((_, axis),) = cotangents, step.differentiable_outputs
    # If every position has a separate copy of the parameter, the gradient of the sum of
    # the losses with respect to the copies contains the gradients of single examples.
    whole = jax.lax.broadcast_in_dim(
      parameter, cotangent.shape, range(cotangent.ndim) if parameter.ndim else ()
    )
    (rows,) = jax.vjp(apply, whole)[1]([cotangent])
    rows = wide(rows)
    if not parameter.ndim:
      return _Formed(place, rows.sum([a for a in range(rows.ndim) if a != axis]))
    repeated = [a for a, size in enumerate(parameter.shape) if size == 1 and a != axis]
    rows = rows.sum(repeated, keepdims=True)
    if parameter.shape[axis] == 1:
      rows = jnp.moveaxis(rows, axis, 0)
      return _Formed(place, jnp.expand_dims(rows, axis + 1))
    return self._rows(place, rows, axis)

  def _row_axis(self, step, index):
    """The axis along which a parameter has a row for each example, or None."""
    for axis, size in enumerate(step.eqn.invars[index].aval.shape):
      if size == self._size:
        axes = [value.axis for value in step.inputs]
        axes[index] = axis
        try:
          results = batch_axes.propagate(step.eqn, axes)
        except batch_axes.MixedError:
          continue
        if all(results[i] == a for i, a in step.differentiable_outputs):
          return axis
    return None

  def _rows(self, place, rows, axis):
    """The gradients with respect to a parameter with one row per example on an axis."""
    producer = self._producers.get(place)
    if producer is not None and producer.eqn.primitive.name == "broadcast_in_dim":
      old = producer.eqn.invars[0].aval.shape
      dimensions = producer.eqn.params["broadcast_dimensions"]
      old_axes = {d for d, size in zip(dimensions, old, strict=True) if size != 1}
      if axis not in old_axes:  # In this case all rows of the parameter are the same.
        repeated = [a for a in range(rows.ndim) if a not in old_axes and a != axis]
        rows = jnp.moveaxis(rows.sum(repeated, keepdims=True), axis, 0)
        source: Any = producer.inputs[0].place
        return _Formed(source, rows.reshape(self._size, *old))
    # Example i has a gradient only in row i.
    is_row = jnp.expand_dims(
      jnp.eye(self._size, dtype=bool), [a + 1 for a in range(rows.ndim) if a != axis]
    )
    return _Formed(place, jnp.where(is_row, rows[None], jnp.zeros_like(rows[None])))


def summed(terms: Sequence[base.Array]) -> base.Array:
  """The sum of arrays of the same shape, in their common dtype."""
  dtype = base.common_dtype(*terms)
  # Use a product, because XLA repeats a chain of sums in every operation that uses the
  # result.
  ones = jnp.ones(len(terms), dtype)
  stacked = jnp.stack([term.astype(dtype) for term in terms])
  return jnp.tensordot(ones, stacked, axes=1, precision="highest")


def wide(x: base.Array) -> base.Array:
  """Casts to float32 or wider (complex64 or wider)."""
  return x.astype(base.accumulator_dtype(x.dtype))


def _as_function(step, inputs, indices):
  """A use as a function of the inputs with these indices, and these inputs."""

  def apply(*parameters):
    replaced = dict(zip(indices, parameters, strict=True))
    results = parameter_uses.bind(
      step.eqn, [replaced.get(i, x) for i, x in enumerate(inputs)]
    )
    return [results[i] for i, _ in step.differentiable_outputs]

  return apply, [inputs[i] for i in indices]


def _times(cotangent, weights, axis):
  """A cotangent times the weights of the examples, in the type of the cotangent."""
  dtype = base.common_dtype(cotangent, weights)
  weights = jnp.expand_dims(weights, [a for a in range(cotangent.ndim) if a != axis])
  return (cotangent.astype(dtype) * weights.astype(dtype)).astype(cotangent.dtype)


def _one_by_one(step, apply, parameter, cotangents, size):
  """The gradients of any operation, by one backward pass of it for each example."""
  _, vjp_fn = jax.vjp(apply, parameter)

  def gradient(is_row):
    def only(cotangent, axis):
      mask = jnp.expand_dims(is_row, [a for a in range(cotangent.ndim) if a != axis])
      return jnp.where(mask, cotangent, jnp.zeros_like(cotangent))

    pairs = zip(cotangents, step.differentiable_outputs, strict=True)
    return vjp_fn([only(cotangent, axis) for cotangent, (_, axis) in pairs])[0]

  return jax.vmap(gradient)(jnp.eye(size, dtype=bool))


def _dense_factors(step, inputs, cotangent, permutation):
  """Factors of a matrix product."""
  (index,) = step.param_inputs
  data = 1 - index
  axis = step.inputs[data].axis
  contract, batch = step.eqn.params["dimension_numbers"]
  free = [
    [a for a in range(inputs[i].ndim) if a not in (*contract[i], *batch[i])]
    for i in range(2)
  ]
  if axis not in free[data]:
    return None

  def ordered(axes):
    """Pairs of axes of both operands, in the order of the parameter's axes."""
    pairs = zip(axes[index], axes[data], strict=True)
    return sorted(pairs, key=lambda pair: permutation[pair[0]])

  groups, contracted = ordered(batch), ordered(contract)
  positions = [a for a in free[data] if a != axis]
  right_axes = sorted(free[index], key=lambda a: permutation[a])
  # The axes of the output: those of `batch`, then the free ones of both operands.
  start = [len(batch[0]), len(batch[0]) + len(free[0])]

  def output_axis(operand, a):
    return start[operand] + free[operand].index(a)

  left = inputs[data].transpose(
    axis, *(a for _, a in groups), *positions, *(a for _, a in contracted)
  )
  right = cotangent.transpose(
    output_axis(data, axis),
    *(list(batch[data]).index(a) for _, a in groups),
    *(output_axis(data, a) for a in positions),
    *(output_axis(index, a) for a in right_axes),
  )
  shape = inputs[index].shape
  sizes = [math.prod(shape[a] for a, _ in pairs) for pairs in (groups, contracted)]
  num_positions = math.prod(inputs[data].shape[a] for a in positions)
  batch_size = cotangent.shape[step.differentiable_outputs[0][1]]
  num_right = math.prod(shape[a] for a in right_axes)
  axes = (
    tuple(permutation[a] for a, _ in groups),
    tuple(permutation[a] for a, _ in contracted),
    tuple(permutation[a] for a in right_axes),
  )
  untransposed = [0] * len(shape)
  for a, size in zip(permutation, shape, strict=True):
    untransposed[a] = size
  return (
    tuple(untransposed),
    axes,
    left.reshape(batch_size, sizes[0], num_positions, sizes[1]),
    right.reshape(batch_size, sizes[0], num_positions, num_right),
  )


def _convolution_factors(step, inputs, cotangent, permutation):
  """Factors of a convolution: the left vectors are patches of the images."""
  del permutation  # The identity, because `_untransposed` undoes only casts here.
  params = step.eqn.params
  numbers, groups = params["dimension_numbers"], params["feature_group_count"]
  kernel = inputs[1].transpose(numbers.rhs_spec)  # Output channels, input channels.
  num_outputs, num_inputs, *window = kernel.shape
  images = inputs[0].transpose(numbers.lhs_spec)
  channels_first = cotangent.transpose(numbers.out_spec)
  size, _, *positions = channels_first.shape
  padding = [
    (low, high, dilation - 1)
    for (low, high), dilation in zip(
      params["padding"], params["lhs_dilation"], strict=True
    )
  ]
  images = jax.lax.pad(
    images, jnp.zeros((), images.dtype), [(0, 0, 0), (0, 0, 0), *padding]
  )
  patches = []
  for flat in range(math.prod(window)):
    start: list[int] = []
    remaining = flat
    for length in reversed(window):
      start.insert(0, remaining % length)
      remaining //= length
    start = [a * b for a, b in zip(start, params["rhs_dilation"], strict=True)]
    strides = params["window_strides"]
    stop = [
      a + (length - 1) * stride + 1
      for a, length, stride in zip(start, positions, strides, strict=True)
    ]
    patches.append(
      jax.lax.slice(
        images, (0, 0, *start), (*images.shape[:2], *stop), (1, 1, *strides)
      )
    )
  # [B, groups, input channels of a group times window, positions]
  left = jnp.stack(patches, axis=2).reshape(
    size, groups, num_inputs * len(patches), math.prod(positions)
  )
  right = channels_first.reshape(
    size, groups, num_outputs // groups, math.prod(positions)
  )
  # The axis of output channels is split into groups and the channels of a group.
  spec = numbers.rhs_spec
  split = spec[0]
  shape = list(inputs[1].shape)
  shape[split : split + 1] = [groups, num_outputs // groups]
  moved = [a + (a > split) for a in spec[1:]]
  return (
    tuple(shape),
    ((split,), tuple(moved), (split + 1,)),
    left.swapaxes(2, 3),
    right.swapaxes(2, 3),
    lambda: _kernel_gradients(step, inputs, cotangent),
  )


def _kernel_gradients(step, inputs, cotangent):
  """The gradients with respect to a kernel, by one convolution per image."""
  numbers = step.eqn.params["dimension_numbers"]
  axes = numbers.lhs_spec[0], numbers.out_spec[0]

  def gradient(image, cotangent):
    image, cotangent = (
      jnp.expand_dims(x, a) for x, a in zip((image, cotangent), axes, strict=True)
    )
    apply, (kernel,) = _as_function(step, [image, inputs[1]], [1])
    return jax.vjp(apply, kernel)[1]([cotangent])[0]

  return jax.vmap(gradient, axes)(inputs[0], cotangent)


def _embedding_factors(step, inputs, cotangent, permutation):
  """Factors of a lookup in a table, in which one or more indices select a row."""
  params, (table, indices) = step.eqn.params, inputs
  numbers, axis = params["dimension_numbers"], step.inputs[1].axis
  if step.param_inputs != [0] or axis is None:
    return None
  start = {a: indices[..., j] for j, a in enumerate(numbers.start_index_map)}
  batching = zip(
    numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
  )
  start |= {
    a: jax.lax.broadcasted_iota(jnp.int32, indices.shape[:-1], i) for a, i in batching
  }
  sizes = params["slice_sizes"]
  is_row = [a in start and size == 1 for a, size in enumerate(sizes)]
  if not any(is_row) or any(
    size < whole and not row
    for size, whole, row in zip(sizes, table.shape, is_row, strict=True)
  ):
    return None

  def ordered(axes):
    return sorted(axes, key=lambda a: permutation[a])

  rows = ordered(a for a in range(table.ndim) if is_row[a])
  columns = [a for a in range(table.ndim) if not is_row[a]]
  index: Any = 0
  for a in rows:
    size = table.shape[a]
    index = index * size + jnp.clip(start[a], 0, size - 1).astype(jnp.int32)
  inside: Any = True
  for a in start:
    inside &= (start[a] >= 0) & (start[a] <= table.shape[a] - sizes[a])

  def by_example(x):
    x = jnp.moveaxis(x, axis, 0)
    return x.reshape(x.shape[0], 1, -1)

  index, inside = by_example(index), by_example(inside)
  positions = [a for a in range(cotangent.ndim) if a not in numbers.offset_dims]
  first = positions.pop(axis)
  removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  window = [a for a in range(table.ndim) if a not in removed]
  offsets = dict(zip(window, numbers.offset_dims, strict=True))
  ones = [offsets[a] for a in rows if a in offsets]  # Axes of size one.
  right = cotangent.transpose(
    first, *positions, *ones, *(offsets[a] for a in ordered(columns))
  ).reshape(*index.shape, -1)
  if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
    right = jnp.where(inside[..., None], right, jnp.zeros_like(right))
  shape = [0] * table.ndim
  for a, size in zip(permutation, table.shape, strict=True):
    shape[a] = size
  axes = tuple(tuple(permutation[a] for a in x) for x in (rows, ordered(columns)))
  return tuple(shape), ((), *axes), index, right


_FACTORS = {
  "dot_general": _dense_factors,
  "conv_general_dilated": _convolution_factors,
  "gather": _embedding_factors,
}


def _merged(uses: Sequence[_Factors | _Formed]) -> list[_Factors] | None:
  """At most one dense and one index factor for all uses; None if this is impossible."""
  factors = [use for use in uses if isinstance(use, _Factors)]
  if len(factors) < len(uses):
    return None
  first = next((use for use in factors if use.is_index), factors[0])
  dense: list[_Factors] = []
  index: list[_Factors] = []
  for use in factors:
    if use.axes != first.axes and not use.is_index:
      use = use.swapped()
    is_complex = any(map(jnp.iscomplexobj, (use.left, use.right)))
    if (use.axes, use.shape) != (first.axes, first.shape) or is_complex:
      return None
    (index if use.is_index else dense).append(use)
  return [_concatenated(group) for group in (dense, index) if group]


def _concatenated(uses):
  """Joins uses of the same kind into one use that has all their positions."""
  if len(uses) == 1:
    return uses[0]

  def join(arrays):
    dtype = base.common_dtype(*arrays)
    return jnp.concatenate([x.astype(dtype) for x in arrays], axis=2)

  return uses[0]._replace(
    form=None,
    left=join([use.left for use in uses]),
    right=join([use.right for use in uses]),
  )


def _is_ghost_cheaper(factors, pairs, size):
  """Whether the ghost form takes fewer FLOPs per example than the formed one."""
  ghost, formed = 0, 0
  num_pairs = size if pairs else 1  # For each example.
  before = 0  # Number of positions of the dense use, which comes first.
  for use in factors:
    groups, length, left, right = use.sizes()
    if use.is_index:
      ghost += num_pairs * 2 * length**2 * right if pairs else length**2
      ghost += num_pairs * 2 * length * before * right
      formed += length * right
    else:
      ghost += num_pairs * 2 * groups * length**2 * (left + right)
      formed += 2 * groups * length * left * right
      before = length
  formed += num_pairs * 2 * math.prod(factors[0].shape)
  return ghost < formed


def _ghost_squares(factors):
  """Squared norms [B] of the sum of at most one dense and one index use."""
  total: Any = 0
  for use in factors:
    if use.is_index:
      # Add the cotangents of a row of the table at the first position of this row.
      index = use.left[:, 0]
      first = jnp.argmax(index[:, :, None] == index[:, None], axis=2)
      right = wide(use.right[:, 0])
      rows = jax.vmap(lambda i, x: jnp.zeros_like(x).at[i].add(x))(first, right)
      total += jnp.sum(jnp.square(rows), axis=(1, 2))
    elif use.right.shape[2] == 1:
      left, right = (
        jnp.sum(jnp.square(wide(x[:, :, 0])), axis=2) for x in (use.left, use.right)
      )
      total += jnp.sum(left * right, axis=1)
    else:
      left, right = (_einsum("bgtl,bgsl->bgts", x, x) for x in (use.left, use.right))
      total += jnp.sum(left * right, axis=(1, 2, 3))
  if len(factors) == 2:
    dense, index = factors
    picked = jnp.take_along_axis(dense.left[:, 0], index.left, axis=2)
    products = _einsum("btr,bsr->bts", dense.right[:, 0], index.right[:, 0])
    total += 2 * jnp.sum(wide(picked) * products, axis=(1, 2))
  return jnp.maximum(total, 0)  # Rounding may make a sum of products negative.


def _ghost_products(factors):
  """Inner products [B, B] of the sums of at most one dense and one index use."""
  total: Any = 0
  for use in factors:
    if use.is_index:
      index = use.left[:, 0]
      left = index[:, None, :, None] == index[None, :, None, :]
      right = _einsum("btr,csr->bcts", use.right[:, 0], use.right[:, 0])
      total += jnp.sum(jnp.where(left, right, jnp.zeros_like(right)), axis=(2, 3))
    else:
      left, right = (_einsum("bgtl,cgsl->bcgts", x, x) for x in (use.left, use.right))
      total += jnp.sum(left * right, axis=(2, 3, 4))
  if len(factors) == 2:
    dense, index = factors
    picked = jnp.take(dense.left[:, 0], index.left[:, 0], axis=2)
    products = _einsum("btr,csr->btcs", dense.right[:, 0], index.right[:, 0])
    cross = jnp.sum(wide(picked) * products, axis=(1, 3))
    total += cross + cross.T
  return total


def _einsum(formula, x, y):
  """The product of two arrays, summed in float32 or wider."""
  dtype = base.common_dtype(x, y)
  return jnp.einsum(
    formula,
    x.astype(dtype),
    y.astype(dtype),
    preferred_element_type=base.accumulator_dtype(dtype),
  )
