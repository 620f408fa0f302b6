"""The types that methods and the training loop share, and the package's collectives.

Unless a docstring says otherwise, these letters are sizes: `B` of the training batch,
`M` of the meta batch, `N` of the training set; `C` is the number of classes. In the
names of batches and losses, the prefix `meta_` marks those of the meta set, whose
labels are trusted.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import enum
import operator
from typing import Any, NamedTuple

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any
_META_KEY = 0x6D657461  # "meta" in ASCII.
# A dictionary of arrays with a common leading axis. In the training loop, it also has
# "index" [B], the row of each example in its data set.
Batch = dict[str, Any]
LossesFn = Callable[..., Any]
# One mapped axis, several of them, such as ("data", "model"), or None outside any
# mapping.
AxisName = str | tuple[str, ...] | None


class InputError(ValueError):
  """A mistake of the caller. One line describes the mistake and how to fix it.

  Scripts print the line without a traceback and exit with status 2.
  """


@jax.tree_util.register_static
class StaticStr(str):
  """A string as a pytree without leaves, which transformed functions may return."""

  __slots__ = ()


@jax.tree_util.register_static
class StaticFloat(float):
  """A number as a pytree without leaves, like `StaticStr`."""

  __slots__ = ()


for _static in (StaticStr, StaticFloat):
  # There are no arrays to store: flax restores into a target, whose value remains.
  serialization.register_serialization_state(
    _static, lambda value: {}, lambda value, state: value
  )


class Fault(enum.IntEnum):
  """The first quantity of a meta step that held a NaN or an infinity.

  The members are in the order in which L2RW computes them. The look-ahead of other
  methods uses the training losses, which therefore come first; see `lookahead_fault`.
  """

  NONE = 0
  META_LOSSES = 1  # A meta loss, or the objective of the meta losses.
  META_GRADIENT = 2  # The gradient of finite meta losses.
  OPTIMIZER_STEP = 3  # The vjp of the optimizer step at a finite meta gradient.
  TRAINING_LOSSES = 4  # A loss of the training batch.
  SLOPES = 5  # Scores, weights or a gradient computed from finite inputs.


class Linearized(NamedTuple):
  """The per-example losses l(p) in R^B of a batch, linearized at `params`.

  J is the Jacobian dl/dp.

  Attributes:
    losses: l(p), [B].
    directional: `v -> J v`, [B], the derivative of each example's loss along `v`,
      which is shaped like `params`.
    weighted_gradient: `w [B] -> J^T w`, shaped like `params`, the gradient of
      sum_i w_i l_i(p).
    aux: the auxiliary output of the losses function, or None.
    engine: name of the engine that was used, one of `linearization.ENGINES` without
      "auto", or "microbatched".
  """

  losses: Array
  directional: Callable[[PyTree], Array]
  weighted_gradient: Callable[[Array], PyTree]
  aux: Any = None
  engine: StaticStr = StaticStr()


class LinearizedOutputs(NamedTuple):
  """The outputs f(p) of a network for a batch, linearized at `params`.

  J is the Jacobian df/dp.

  Attributes:
    outputs: f(p), a pytree of arrays, such as logits.
    jvp: `v -> J v`, shaped like `outputs`; `v` is shaped like `params`.
    vjp: `c -> J^T c`, shaped like `params`; `c` is shaped like `outputs`.
    aux: the auxiliary output of the outputs function, or None.
    engine: name of the engine that was used, one of `linearization.ENGINES` without
      "auto".
  """

  outputs: PyTree
  jvp: Callable[[PyTree], PyTree]
  vjp: Callable[[PyTree], PyTree]
  aux: Any = None
  engine: StaticStr = StaticStr()


class Inputs(NamedTuple):
  """The inputs of a method in one training step.

  Attributes:
    params: network parameters.
    model_state: variables that are not trained (BatchNorm statistics), possibly `{}`.
    opt_state: state of the outer optimizer.
    batch: this device's share of the training batch, leading axis B.
    meta_batch: this device's share of the meta batch, leading axis M, or None for a
      method that needs none.
    step: number of updates so far, int32 scalar.
    key: a typed PRNG key, the same on every device and new at every step.
  """

  params: PyTree
  model_state: PyTree
  opt_state: PyTree
  batch: Batch
  meta_batch: Batch | None
  step: Array
  key: Array


class Gradients(NamedTuple):
  """The result of a method for one training step.

  Attributes:
    grads: gradient of sum_i weights_i * losses_i over the *global* batch,
      already summed over devices; shaped like `params`.
    weights: this device's example weights [B]; uniform is 1 / B_global. A method
      that changes the loss instead of weighting it documents which values it returns.
    losses: this device's unweighted losses [B].
    model_state: the variables that are not trained, after this batch.
    metrics: scalars that are used only in the logs, the same on every device.
    value: the `value` that is passed to the outer optimizer (used by
      `optax.contrib.reduce_on_plateau` and by Polyak's step); None stands for the
      weighted loss.
    fault: the `Fault` of a meta-learning method, int32 scalar; None for a method
      without a meta step.
    zero_slope: whether the look-ahead step ignores the gradient, so that all weight
      gradients are zero, see `hypergradient.Direction`; bool scalar, or None.
    scores: this device's scores before they are clipped at zero, [B]; None for a
      method without scores.
    fixed: `(is_fixed, values)`, a pair of pytrees with the structure of `params`. Where
      `is_fixed` holds True, a bool scalar per leaf, the leaf of `values` is the
      parameter after the step, regardless of the optimizer. Fixed values are needed
      because momentum and weight decay also move parameters without a gradient. None
      leaves all parameters to the optimizer.
  """

  grads: PyTree
  weights: Array
  losses: Array
  model_state: PyTree
  metrics: dict[str, Array]
  value: Array | None = None
  fault: Array | None = None
  zero_slope: Array | None = None
  scores: Array | None = None
  fixed: tuple[PyTree, PyTree] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
  """The learning problem as pure functions.

  Attributes:
    forward: `(params, model_state, batch, key, train) -> (outputs, model_state)`;
      `outputs` are logits [B, C], or a tuple that begins with them.
    loss: `(outputs, batch) -> [B]` unreduced losses.
    linearize: `(losses_fn, params, batch, *, has_aux, direction=None) -> Linearized`.
    linearize_outputs: `(outputs_fn, params, batch, *, has_aux) ->
      LinearizedOutputs`, for functions of the outputs before the loss.
    num_classes: C.
    class_counts: number of training examples of each class, [C].
    num_examples: N.
    num_steps: number of updates of the run.
    axis_name: mapped device axis; None if the step is not mapped over devices.
    features: like `forward`, but returns the inputs of the last layer, [B, d]; None
      if the model cannot be split there.
    head: `(params, features) -> logits`, the last layer.
    num_features: d.
  """

  forward: Callable[..., tuple[Any, PyTree]]
  loss: Callable[[Any, Batch], Array]
  linearize: Callable[..., Linearized]
  linearize_outputs: Callable[..., LinearizedOutputs]
  num_classes: int
  class_counts: Array
  num_examples: int
  num_steps: int
  axis_name: AxisName = None
  features: Callable[..., tuple[Any, PyTree]] | None = None
  head: Callable[[PyTree, Any], Any] | None = None
  num_features: int | None = None

  def losses_fn(
    self, model_state: PyTree, key: Array
  ) -> Callable[[PyTree, Batch], tuple[Array, PyTree]]:
    """Returns `(params, batch) -> (losses [B], new model_state)` in training mode."""

    def losses(params, batch):
      outputs, new_state = self.forward(params, model_state, batch, key, True)
      return self.loss(outputs, batch), new_state

    return losses

  def meta_losses_fn(
    self, model_state: PyTree, key: Array
  ) -> Callable[[PyTree, Batch], tuple[Array, PyTree]]:
    """Returns `losses_fn` for the meta batch, with different random numbers.

    Methods compare the gradients of the two batches, so a meta example must not share
    its crop or its dropout mask with the training example of the same index.
    """
    return self.losses_fn(model_state, jax.random.fold_in(key, _META_KEY))

  def linearize_batch(
    self,
    inputs: Inputs,
    losses_fn: Callable[..., tuple[Array, Any]] | None = None,
    direction: PyTree | None = None,
  ) -> Linearized:
    """Linearizes the training batch of a step at the parameters of the step.

    Args:
      inputs: inputs of the training step.
      losses_fn: `(params, batch) -> (losses [B], aux)`; None is `losses_fn` of this
        problem, whose aux is the new model state.
      direction: the vector of a directional derivative that is computed together with
        the losses, see `linearization.linearize`.
    """
    return self.linearize(
      losses_fn or self.losses_fn(inputs.model_state, inputs.key),
      local(inputs.params, self.axis_name),
      inputs.batch,
      has_aux=True,
      **({} if direction is None else {"direction": direction}),
    )

  def linearize_batch_outputs(
    self, inputs: Inputs, outputs_fn: Callable[..., tuple[Any, Any]] | None = None
  ) -> LinearizedOutputs:
    """Like `linearize_batch`, for the outputs of the network.

    Args:
      inputs: inputs of the training step.
      outputs_fn: `(params, batch) -> (outputs, aux)`; None is `forward` in training
        mode, whose aux is the new model state.
    """

    def forward(params, batch):
      return self.forward(params, inputs.model_state, batch, inputs.key, True)

    params = local(inputs.params, self.axis_name)
    return self.linearize_outputs(
      outputs_fn or forward, params, inputs.batch, has_aux=True
    )


class EpochView(NamedTuple):
  """The inputs of `Method.refresh`, on the host before an epoch.

  Attributes:
    seed: seed of the run.
    epoch: the epoch about to start, counted from 0.
    params: current parameters (not replicated).
    model_state: current variables (not replicated).
    train: the whole training set, leading axis N: NumPy arrays, or a row source for
      images that are not in memory.
    rng: NumPy generator seeded by (seed, epoch), so that a resumed run draws the same
      numbers.
  """

  seed: int
  epoch: int
  params: PyTree
  model_state: PyTree
  train: Batch
  rng: np.random.Generator


def no_state(key: Array, problem: Problem, params: PyTree) -> PyTree:
  """`Method.init` of a method without a state."""
  del key, problem, params
  return ()


def keep_state(state: PyTree, problem: Problem, view: EpochView) -> PyTree:
  """`Method.refresh` of a method that keeps its state."""
  del problem, view
  return state


def permutation(
  state: PyTree, problem: Problem, train: Batch, rng: np.random.Generator
) -> np.ndarray:
  """The `Method.sample` that visits every example once in random order."""
  del state, problem
  return rng.permutation(len(train["index"]))


def no_report(state: PyTree) -> dict[str, np.ndarray]:
  """`Method.report` of a method without statistics of single examples."""
  del state
  return {}


def no_record(
  state: PyTree, problem: Problem, inputs: Inputs, result: Gradients, is_taken: Array
) -> PyTree:
  """`Method.record` of a method without statistics of single examples."""
  del problem, inputs, result, is_taken
  return state


class Method(NamedTuple):
  """The functions of a training method, as the training loop uses them.

  Attributes:
    gradients: `(state, problem, inputs) -> (Gradients, state)`; pure and traced.
    init: `(key, problem, params) -> state`, a pytree of arrays.
    refresh: `(state, problem, view) -> state`, called on the host before every epoch.
    sample: `(state, problem, train, rng) -> int array`: the rows of the training set
      to visit in an epoch, in order. Batches are consecutive slices of it. It may
      depend on the parts of the state that `refresh` changes, but not on those that
      `gradients` changes, so that an interrupted epoch can be resumed.
    needs_meta: whether `inputs.meta_batch` is required.
    report: `state -> arrays [N, ...] by name`: statistics of the training examples to
      keep when the run is finished; called on the host.
    record: `(state, problem, inputs, result, is_taken) -> state`, pure and traced: adds
      the step to arrays of the state that have a row for each training example.
      `result` is the `Gradients` of the step, `state` is the one after it, and nothing
      may change unless the bool scalar `is_taken` is True. All other changes of the
      state are undone if a step is not finite, which takes a pass over the whole
      arrays in every step, whereas `record` can write single rows.
  """

  gradients: Callable[[PyTree, Problem, Inputs], tuple[Gradients, PyTree]]
  init: Callable[[Array, Problem, PyTree], PyTree] = no_state
  refresh: Callable[[PyTree, Problem, EpochView], PyTree] = keep_state
  sample: Callable[[PyTree, Problem, Batch, np.random.Generator], np.ndarray] = (
    permutation
  )
  needs_meta: bool = False
  report: Callable[[PyTree], dict[str, np.ndarray]] = no_report
  record: Callable[[PyTree, Problem, Inputs, Gradients, Array], PyTree] = no_record


def summed_gradient(
  linearized: Linearized, weights: Array, axis_name: AxisName
) -> PyTree:
  """Gradient of sum_i weights_i * losses_i over the global batch.

  Args:
    linearized: the linearized losses of this device's batch.
    weights: weights of this device's examples, [B], held constant.
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    The gradient, summed over devices, shaped like `params`.
  """
  return psum(linearized.weighted_gradient(weights), axis_name)


def psum(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Sum over the devices of `axis_name`; the identity if it is None.

  Never differentiate through this under `pmap`: the transpose of psum is psum there, so
  the gradient would be too large by a factor of the number of devices.
  """
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def pmean(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Mean over the devices of `axis_name`; the identity if it is None."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def pmax(value: Array, axis_name: AxisName) -> Array:
  """Maximum over the devices of `axis_name`; the identity if it is None."""
  return value if axis_name is None else jax.lax.pmax(value, axis_name)


def local(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Marks `tree` as varying over devices; gradients with respect to it then stay local.

  `shard_map` with `check_vma=True` distinguishes values that are equal on every device
  from values that vary, and silently sums the gradient with respect to the former over
  devices. Outside of such a `shard_map` this function is the identity.
  """
  if axis_name is None:
    return tree
  tracked = _varying_axes(jax.lax.axis_index(axis_name))

  def mark(x):
    missing = tuple(tracked - _varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(mark, tree)


def varying(value: Array, aval: Any) -> Array:
  """`value`, marked as varying over the axes over which the type `aval` varies."""
  axes = tuple(aval.manual_axis_type.varying)
  return jax.lax.pcast(value, axes, to="varying") if axes else value


def _varying_axes(x: Any) -> frozenset[str]:
  return jax.typeof(x).manual_axis_type.varying


def global_size(local_size: int, axis_name: AxisName) -> int:
  """Number of examples on all devices, each of which has `local_size` examples."""
  if axis_name is None:
    return local_size
  return local_size * jax.lax.axis_size(axis_name)


def gather(local_values: Array, axis_name: AxisName) -> Array:
  """Gathers the values [B] of all devices into the global batch, in device order."""
  if axis_name is None:
    return local_values
  return jax.lax.all_gather(local_values, axis_name, tiled=True)


def gather_replicated(local_values: Array, axis_name: AxisName) -> Array:
  """Like `gather`, for any rank, with a result that `shard_map` knows to be replicated.

  `all_gather` leaves its result marked as varying over the devices, so a state computed
  from it could not leave `shard_map` as a replicated one. A sum over devices has no
  such mark. Each device puts its rows at their place in an array of zeros, so the sum
  adds only zeros to each number and is exact.
  """
  if axis_name is None:
    return local_values
  is_bool = local_values.dtype == jnp.bool_
  values = local_values.astype(jnp.int32) if is_bool else local_values
  size = values.shape[0]
  whole = jnp.zeros((global_size(size, axis_name), *values.shape[1:]), values.dtype)
  start = jax.lax.axis_index(axis_name) * size
  placed = jax.lax.dynamic_update_slice_in_dim(
    local(whole, axis_name), values, start, axis=0
  )
  result = psum(placed, axis_name)
  return result.astype(jnp.bool_) if is_bool else result


def local_slice(global_values: Array, axis_name: AxisName) -> Array:
  """The inverse of `gather`: this device's [B] slice of the global batch."""
  if axis_name is None:
    return global_values
  size = global_values.shape[0] // jax.lax.axis_size(axis_name)
  start = jax.lax.axis_index(axis_name) * size
  return jax.lax.dynamic_slice_in_dim(global_values, start, size)


def take(table: Array, index: Array) -> Array:
  """`table[index]` under any kind of mesh, with NaN for rows that do not exist.

  Under a mesh with explicit sharding, the result is sharded like `index`, which JAX
  cannot infer from `table[index]`. Plain indexing would count negative numbers from the
  end and clamp large ones.

  Args:
    table: a row for each class or group, [C, ...], the same on every device.
    index: integers from 0 to C - 1, of any shape. Other integers give NaN if the
      table has a floating-point type; in a table of integers or booleans, they select
      an arbitrary row.

  Returns:
    An array of shape `index.shape + table.shape[1:]`.

  Raises:
    InputError: `index` is neither integer nor boolean.
  """
  table = jnp.asarray(table)
  index = wide_integers(index, table.shape[0])
  sharding = jax.typeof(index).sharding
  options: dict[str, Any] = {}
  if any(sharding.spec):
    spec = jax.sharding.PartitionSpec(*sharding.spec, *[None] * (table.ndim - 1))
    options = {"out_sharding": jax.sharding.NamedSharding(sharding.mesh, spec)}
  if jnp.issubdtype(table.dtype, jnp.inexact):
    size = table.shape[0]
    index = jnp.where((index >= 0) & (index < size), index, size)
    options |= {"mode": "fill", "fill_value": jnp.nan}
  return table.at[index].get(**options)


def entry(batch: Batch, key: str, method: str) -> Any:
  """The entry of a training batch that a method needs.

  Raises:
    InputError: the batch does not have it.
  """
  if key not in batch:
    what = " (the row of each example in the training set)" if key == "index" else ""
    raise InputError(
      f"{method}: the training batch has no {key!r}{what}: add it to the batch, which"
      f" has only {sorted(batch)}."
    )
  return batch[key]


def host_or_jax_array(values: Any) -> Any:
  """Returns JAX arrays unchanged, and all other values as NumPy arrays.

  Unlike JAX without x64, NumPy keeps 64-bit integers.

  Raises:
    InputError: the values are a masked array.
  """
  refuse_mask("an array of labels, groups or other values", values)
  if hasattr(values, "__jax_array__"):  # A variable of flax.nnx, for instance.
    values = jnp.asarray(values)
  return values if isinstance(values, jax.Array) else np.asarray(values)


def refuse_mask(what: str, values: Any) -> None:
  """Raises InputError for masked arrays, whose mask NumPy and JAX ignore or refuse."""
  if isinstance(values, np.ma.MaskedArray):
    raise InputError(
      f"{what} must not be a masked array; leave out the examples with masked values,"
      " or fill them (.filled)."
    )


def wide_integers(values: Any, size: int) -> Array:
  """Integers in a type that can represent -1 and `size`, unlike uint8 for instance.

  Args:
    values: integers or booleans of any type, or a list of them.
    size: number of values that exist, 0 to `size` - 1. All others become -1 if `values`
      is not a JAX array, because JAX would keep only the lower 32 of 64 bits, so that
      2**32 would become 0.

  Returns:
    An array of int32, or of int64 if `values` is a JAX array of a 64-bit type.

  Raises:
    InputError: `values` are neither integers nor booleans. Whole numbers of a
      floating-point type are refused, too.
  """
  values = host_or_jax_array(values)
  is_integer = jnp.issubdtype(values.dtype, jnp.integer) or values.dtype == jnp.bool_
  if values.size and not is_integer:
    raise InputError(
      f"classes and groups must be integers; got {values.dtype}. Convert them with"
      " astype(int)."
    )
  if not isinstance(values, jax.Array):
    exists = (values >= 0) & (values < size)
    return jnp.asarray(np.where(exists, values.astype(np.int32), -1), jnp.int32)
  is_wide = jnp.dtype(values.dtype).itemsize == 8
  return values.astype(jnp.int64 if is_wide else jnp.int32)


def rows_by_class(labels: np.ndarray, classes: np.ndarray) -> list[np.ndarray]:
  """The rows of each class, from one sort instead of a pass for each class.

  Args:
    labels: integers, strings or other values that can be sorted, [N].
    classes: the values to look for, in any order, [C].

  Returns:
    For each of `classes`, the rows that have this label, ascending.

  >>> rows_by_class(np.array([7, 3, 7]), np.array([3, 5, 7]))
  [array([1]), array([], dtype=int64), array([0, 2])]
  """
  order = np.argsort(labels, kind="stable")
  ordered = labels[order]
  starts, ends = (np.searchsorted(ordered, classes, side) for side in ("left", "right"))
  return [order[start:end] for start, end in zip(starts, ends, strict=True)]


def check_integer(name: str, value: Any, at_least: int = 1) -> int:
  """`value` as an int.

  Args:
    name: the argument and, before it, the function, such as "warpi: num_samples".
    value: a Python, NumPy or JAX integer that is not traced.
    at_least: the smallest allowed value.

  Raises:
    InputError: `value` is not an integer (booleans and 2.0 are not), is too small, or
      is traced.
  """
  try:
    number = operator.index(value)
  except TypeError:
    number = None
  if isinstance(value, jax.core.Tracer):
    raise InputError(
      f"{name} is traced, but must be known when the function is traced: pass a Python"
      " integer, or make it a static argument of jax.jit."
    )
  if number is None or number < at_least or isinstance(value, bool | np.bool_):
    raise InputError(f"{name}={value} must be an integer of at least {at_least}.")
  return number


def setting(value: Any, dtype: Any = None) -> Any:
  """A setting of a formula, such as a temperature, as a Python number.

  NumPy and JAX numbers would promote the arrays with which they are combined, and
  under `jit`, comparisons of JAX arrays are traced even if their values are known.

  Args:
    value: a Python, NumPy or JAX number, or a traced one. Anything else is returned
      unchanged.
    dtype: the type of the result if the value is traced. Integer types, in which 0.5
      would become 0, are ignored.

  >>> import numpy as np
  >>> setting(np.float64(0.5)), setting(np.array(2))
  (0.5, 2)
  """
  if isinstance(value, jax.core.Tracer):
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return value.astype(dtype) if is_float else value
  is_number = isinstance(value, np.generic | np.ndarray | jax.Array)
  return value.item() if is_number and value.size == 1 else value


def is_traced(*values: Any) -> bool:
  """Whether one of the values is traced, so that it cannot be compared."""
  return any(isinstance(value, jax.core.Tracer) for value in values)


def is_array(value: Any) -> bool:
  """Whether a leaf of a batch is an array of a type that JAX has.

  Python numbers are not arrays, and JAX has no arrays of strings, dates or objects.
  """
  dtype = getattr(value, "dtype", None)
  return dtype is not None and getattr(dtype, "kind", None) not in tuple("OSTUMm")


def known_setting(name: str, value: Any) -> Any:
  """`setting(value)` of a value that determines the program or needs double precision.

  Raises:
    InputError: the value is traced.
  """
  if is_traced(value):
    raise InputError(
      f"{name} is traced, but must be known when the function is traced: pass a Python"
      " number, or make it a static argument of jax.jit."
    )
  return setting(value)


def unsharded(x: Array) -> Array:
  """`x`, replicated if it is sharded over a mesh with explicit axes.

  JAX refuses some operations, such as a sort, on an explicitly sharded axis. Without
  explicit axes this function is the identity.
  """
  sharding = jax.typeof(x).sharding
  if not any(sharding.spec):
    return x
  replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.sharding.reshard(x, replicated)


def sharded_like(value: Array, like: Array) -> Array:
  """`value`, sharded over an explicit mesh in the same way as `like`.

  The leading axes of both arrays are the same.
  """
  sharding = jax.typeof(like).sharding
  if not any(sharding.spec):
    return value
  spec = jax.sharding.PartitionSpec(*sharding.spec[: value.ndim])
  return jax.sharding.reshard(value, jax.sharding.NamedSharding(sharding.mesh, spec))


def all_finite(tree: PyTree) -> Array:
  """Whether all leaves of `tree` are finite; bool scalar."""
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
  # This is a product instead of a conjunction, because XLA repeats a chain of
  # operations on scalars in every operation that reads its result. The program would
  # then grow with the square of the number of leaves.
  faults = 1 - jnp.stack(finite or [jnp.array(True)]).astype(jnp.float32)
  return jnp.dot(faults, faults) == 0


def max_abs(tree: PyTree) -> Array:
  """Largest absolute value in the floating-point leaves of `tree`, scalar.

  It is finite if and only if `tree` is finite, and 0 if and only if `tree` is zero, so
  that one pass over the numbers is enough for both checks.
  """
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  dtype = jnp.result_type(float)
  largest = [jnp.max(jnp.abs(x)).astype(dtype) for x in leaves if x.size]
  # This is the last element of a sort instead of a maximum, because XLA repeats a chain
  # of comparisons of scalars in every operation that reads its result. NaN is sorted to
  # the end.
  return jnp.sort(jnp.stack(largest or [jnp.zeros((), dtype)]))[-1]


def divide_by_largest(values: Array, largest: Array) -> Array:
  """`values / largest` for any magnitude of `values`; 0 if all of them are 0.

  To divide an array by a broadcast number, XLA multiplies the array by the reciprocal
  of the number. In float32, the reciprocal is flushed to zero for numbers above 8.5e37
  and is infinite for numbers below 2.9e-39. Derivatives contain squares and cubes of
  the reciprocal, for which the range is much smaller. This function avoids both.

  Args:
    values: floating-point array.
    largest: largest absolute value, of a shape that broadcasts to that of `values`.

  >>> import jax.numpy as jnp
  >>> print(divide_by_largest(jnp.array([1.5e38, 3e38]), jnp.array([3e38])))
  [0.5 1. ]
  """
  result_dtype = values.dtype
  dtype = accumulator_dtype(values.dtype)  # Powers of two overflow in float16.
  largest = largest.astype(dtype)
  # Both are multiplied by the same power of two, so that the divisor is at least 1/2
  # and below 1, and its powers, of which the derivatives consist, neither overflow nor
  # underflow. Powers of two do not cause rounding. The power itself may be infinite,
  # so it is split into two factors.
  is_usable = (largest != 0) & jnp.isfinite(largest)
  _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.where(is_usable, largest, 1)))
  for part in (exponent // 2, exponent - exponent // 2):
    factor = jnp.ldexp(jnp.ones((), dtype), -part)
    values, largest = values.astype(dtype) * factor, largest * factor
  divisor = jnp.where(largest == 0, jnp.ones_like(largest), largest)
  return (values / divisor).astype(result_dtype)


def check_finite(
  name: str, values: Array, axis_name: AxisName = None, advice: str = ""
) -> Array:
  """Whether all `values` [B] are finite on every device; bool scalar.

  Args:
    name: a plural noun for the values, for the error message.
    values: values of this device, [B].
    axis_name: mapped axis over which the values are sharded.
    advice: end of the error message.

  Raises:
    FloatingPointError: outside `jit`, if a value is not finite; the message gives the
      number of such values and the first row.
  """
  bad = ~jnp.isfinite(values)
  num_bad = psum(jnp.sum(bad), axis_name)
  if not isinstance(num_bad, jax.core.Tracer) and num_bad:
    raise FloatingPointError(
      f"{num_bad} of {values.size} {name} are NaN or infinite, the first in row"
      f" {int(np.flatnonzero(np.asarray(bad))[0])}{advice}."
    )
  return num_bad == 0


def first_fault(fault: Array, **is_finite: Array) -> Array:
  """`fault`, or if it is `Fault.NONE`, the first of the quantities that is not finite.

  Args:
    fault: the `Fault` of earlier quantities, int32 scalar.
    **is_finite: bool scalars, named like members of `Fault` but in lower case, in the
      order of the computation.
  """
  for name, finite in is_finite.items():
    code = jnp.where(finite, 0, Fault[name.upper()].value).astype(jnp.int32)
    fault = jnp.where(fault == 0, code, fault)
  return fault


def lookahead_fault(
  direction_fault: Array, *, losses_finite: Array, slopes_finite: Array
) -> Array:
  """The first fault of a method whose look-ahead uses the training losses.

  Args:
    direction_fault: the `Fault` of the meta losses and the direction, int32 scalar.
    losses_finite: whether the training losses are finite; bool scalar.
    slopes_finite: whether what is computed from them and from the direction is finite;
      bool scalar.
  """
  fault = first_fault(jnp.zeros((), jnp.int32), training_losses=losses_finite)
  fault = jnp.where(fault == 0, direction_fault, fault)
  return first_fault(fault, slopes=slopes_finite)


@contextlib.contextmanager
def implicit_promotion() -> Iterator[None]:
  """Allows promotion of ranks and types while code of other libraries runs.

  Users may run under `jax_numpy_rank_promotion="raise"` and
  `jax_numpy_dtype_promotion="strict"`. This library supports both, but optax does not:
  its Adam and its schedules raise floating-point numbers to the power of an integer
  step count.
  """
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def common_dtype(*arrays: Any) -> Any:
  """The dtype to which all `arrays` are promoted, for explicit casts."""
  with implicit_promotion():
    return jnp.result_type(*arrays)


def accumulator_dtype(dtype: Any) -> Any:
  """The type in which numbers of `dtype` are summed and divided: float32 or wider."""
  if not jnp.issubdtype(dtype, jnp.inexact):
    return jnp.result_type(float)
  return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def losses_and_aux(name: str, returned: Any, has_aux: bool) -> tuple[Array, Any]:
  """Checks and splits the result of a losses function.

  Args:
    name: name of the losses function, for error messages.
    returned: its result, losses or a pair (losses, aux).
    has_aux: whether the result should be a pair.

  Returns:
    The losses [B], and aux or None.

  Raises:
    InputError: the result is not a pair although `has_aux` is True, or the losses are
      not floating-point numbers of shape [B].
  """
  losses, aux = split_aux(name, returned, has_aux)
  check_losses(f"{name}'s result", losses)
  return losses, aux


def split_aux(name: str, returned: Any, has_aux: bool) -> tuple[Any, Any]:
  """Splits the result of the function `name` into (result, aux).

  aux is None if `has_aux` is False.

  Raises:
    InputError: the result is not a pair although `has_aux` is True.
  """
  if not has_aux:
    return returned, None
  if not isinstance(returned, (tuple, list)) or len(returned) != 2:
    if isinstance(returned, (tuple, list)):
      what = f"{len(returned)} values"
    elif hasattr(returned, "shape"):
      what = "one array"
    else:
      what = f"one value of type {type(returned).__name__}"
    raise InputError(
      f"{name} must return two values, the second being aux, because has_aux=True; it"
      f" returns {what}. Return both, or leave has_aux out."
    )
  result, aux = returned
  return result, aux


def check_losses(name: str, losses: Any) -> None:
  """Raises InputError unless `losses` has a floating-point type and shape [B]."""
  check_vector(name, losses)
  if not jnp.issubdtype(losses.dtype, jnp.floating):
    raise InputError(
      f"{name} must be floating-point numbers; got {losses.dtype}. Integers have no"
      " gradient, so that all weights would be zero. Compute the losses in float32."
    )


def check_not_empty(name: str, value: Array) -> None:
  """Raises InputError if a batch has no example: its statistics are undefined."""
  if not value.shape[0]:
    raise InputError(f"{name} is empty: the batch needs at least one example.")


def check_vector(name: str, value: Any) -> None:
  """Raises InputError unless `value` has shape [B], one number per example."""
  # `chex.assert_rank` would accept a tuple (losses, aux) as a list of arrays.
  if not hasattr(value, "shape"):
    raise InputError(
      f"{name} must be an array of shape [B]; got a value of type"
      f" {type(value).__name__}."
      " If it is (losses, aux), pass has_aux=True."
    )
  if len(value.shape) == 2:
    raise InputError(
      f"{name} must be one number per example, shape [B]; got shape {value.shape}. If"
      " every token or position is an example, flatten the array with reshape(-1),"
      " [B * T]; if every sequence is an example, average over axis 1. Do not average"
      " over the batch."
    )
  if len(value.shape) != 1:
    raise InputError(
      f"{name} must be one number per example, shape [B]; got shape"
      f" {value.shape}. Do not average over the batch."
    )
