"""Floor 0: the types every other file speaks, and the only collectives.

Letters used in every docstring: `B` training batch, `M` meta (clean) batch,
`C` classes, `N` training set. `meta_` marks what belongs to the clean set.
"""

from collections.abc import Callable, Iterator
import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any
_META_KEY = 0x6D657461
# One dictionary of arrays with a common leading axis. Always has "index" [B],
# the row of each example in its training set, beside the model's own inputs.
Batch = dict[str, Any]
LossesFn = Callable[..., Any]
# One mapped axis, several ("data", "model"), or None outside any mapping.
AxisName = str | tuple[str, ...] | None


class InputError(ValueError):
  """A mistake of the caller, told in one line: what is wrong and how to mend it.

  Experiments print it without a traceback and exit with status 2.
  """


class Fault(enum.IntEnum):
  """The first quantity of a meta step that held a NaN or an infinity.

  Later quantities are computed from earlier ones, hence the order.
  """

  NONE = 0
  META_LOSSES = 1  # a meta loss, or the objective that is made of them
  META_GRADIENT = 2  # the gradient of finite meta losses
  OPTIMIZER_STEP = 3  # a finite meta gradient, differentiated through the step
  TRAINING_LOSSES = 4  # a loss of the training batch
  SLOPES = 5  # what was made of finite losses and a finite direction


class Linearized(NamedTuple):
  """A batch of per-example losses l(p) in R^B, linearized at `params`.

  With J the Jacobian dl/dp:

  Attributes:
    losses: l(p), shape [B].
    directional: `v -> J v`, shape [B]; `v` is shaped like `params`. How fast
      each example's loss grows along v.
    weighted_gradient: `w [B] -> J^T w`, shaped like `params`. The gradient of
      sum_i w_i l_i(p).
    aux: what the losses function returned beside the losses, else None.
  """

  losses: Array
  directional: Callable[[PyTree], Array]
  weighted_gradient: Callable[[Array], PyTree]
  aux: Any = None


class LinearizedOutputs(NamedTuple):
  """Whatever a network makes of a batch, linearized at `params`.

  Attributes:
    outputs: f(p), a pytree of arrays, such as logits.
    push: `v -> J v`, shaped like `outputs`; `v` is shaped like `params`.
    pull: `c -> J^T c`, shaped like `params`; `c` is shaped like `outputs`.
    aux: what the outputs function returned beside the outputs, else None.
  """

  outputs: PyTree
  jvp: Callable[[PyTree], PyTree]
  vjp: Callable[[PyTree], PyTree]
  aux: Any = None


class Inputs(NamedTuple):
  """What a method sees of one training step.

  Attributes:
    params: network parameters.
    model_state: non-trained variables (BatchNorm statistics), possibly `{}`.
    opt_state: state of the outer optimizer.
    batch: this device's share of the training batch, leading axis B.
    meta_batch: this device's share of the clean batch, leading axis M, or None
      in a run without a meta set.
    step: number of updates done so far, int32 scalar.
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
  """What a method makes of one training step.

  Attributes:
    grads: gradient of sum_i weights_i * losses_i over the *global* batch,
      already summed over devices; shaped like `params`.
    weights: this device's example weights [B]; uniform is 1 / B_global. Methods
      that change the loss instead of weighing it say what they put here.
    losses: this device's unweighted losses [B].
    model_state: the variables after this batch.
    metrics: scalars to log, the same on every device.
    value: what an optimizer may watch (optax's `value`: reduce_on_plateau,
      Polyak's step); the weighted loss if None.
    fault: the `Fault` of a meta-learned method, int32 scalar; None for a method
      that has no meta step.
    zero_slope: whether the look-ahead step ignores the gradient, so that no example
      can matter, see `hypergradient.Direction`; bool scalar, or None.
  """

  grads: PyTree
  weights: Array
  losses: Array
  model_state: PyTree
  metrics: dict[str, Array]
  value: Array | None = None
  fault: Array | None = None
  zero_slope: Array | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
  """The learning problem as pure functions, handed to every method.

  Attributes:
    forward: `(params, model_state, batch, key, train) -> (outputs, model_state)`;
      `outputs` are logits [B, C], or a tuple that begins with them.
    loss: `(outputs, batch) -> [B]` unreduced losses.
    linearize: the engine, `(losses_fn, params, batch, *, has_aux) -> Linearized`.
    linearize_outputs: the engine for what comes before the loss,
      `(outputs_fn, params, batch, *, has_aux) -> LinearizedOutputs`.
    num_classes: C.
    class_counts: training examples of each class, [C].
    num_examples: N.
    num_steps: length of the run in updates.
    axis_name: mapped device axis, or None outside `pmap`.
    features: like `forward`, but stops at the penultimate layer: outputs [B, d].
      None if the model cannot be split there.
    head: `(params, features) -> logits`; forward is head after features.
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
    """Training-mode `(params, batch) -> (losses [B], new model_state)`."""

    def losses(params, batch):
      outputs, new_state = self.forward(params, model_state, batch, key, True)
      return self.loss(outputs, batch), new_state

    return losses

  def meta_losses_fn(
    self, model_state: PyTree, key: Array
  ) -> Callable[[PyTree, Batch], tuple[Array, PyTree]]:
    """`losses_fn` for the clean batch: other dropout and augmentation.

    A clean example must not share its crop or its mask with the training example
    of the same index: methods compare the gradients of the two.
    """
    return self.losses_fn(model_state, jax.random.fold_in(key, _META_KEY))

  def linearize_batch(
    self, inputs: Inputs, losses_fn: Callable[..., tuple[Array, Any]] | None = None
  ) -> Linearized:
    """The training batch of a step, linearized at the step's parameters.

    Args:
      inputs: of the step.
      losses_fn: `(params, batch) -> (losses [B], aux)`; None is `losses_fn` of this
        problem, whose aux is the new model state.
    """
    return self.linearize(
      losses_fn or self.losses_fn(inputs.model_state, inputs.key),
      local(inputs.params, self.axis_name),
      inputs.batch,
      has_aux=True,
    )

  def linearize_batch_outputs(
    self, inputs: Inputs, outputs_fn: Callable[..., tuple[Any, Any]] | None = None
  ) -> LinearizedOutputs:
    """Like `linearize_batch`, for the outputs of the network.

    Args:
      inputs: of the step.
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
  """What `Method.refresh` may look at, on the host, before an epoch.

  Attributes:
    seed: of the run.
    epoch: the epoch about to start, counted from 0.
    params: current parameters (unreplicated).
    model_state: current variables (unreplicated).
    train: the whole training set as NumPy arrays, leading axis N.
    rng: NumPy generator seeded by (seed, epoch): same numbers after a resume.
  """

  seed: int
  epoch: int
  params: PyTree
  model_state: PyTree
  train: Batch
  rng: np.random.Generator


def no_state(key: Array, problem: Problem, params: PyTree) -> PyTree:
  """`Method.init` of a method that carries nothing from step to step."""
  del key, problem, params
  return ()


def keep_state(state: PyTree, problem: Problem, view: EpochView) -> PyTree:
  """`Method.refresh` that changes nothing."""
  del problem, view
  return state


def permutation(
  state: PyTree, problem: Problem, train: Batch, rng: np.random.Generator
) -> np.ndarray:
  """`Method.sample` that visits every example once, in random order."""
  del state, problem
  return rng.permutation(len(train["index"]))


class Method(NamedTuple):
  """A way to turn a batch into a gradient; the loop knows nothing more.

  Attributes:
    gradients: `(state, problem, inputs) -> (Gradients, state)`; traced, pure.
    init: `(key, problem, params) -> state`, a pytree of arrays.
    refresh: `(state, problem, view) -> state`, on the host before every epoch.
    sample: `(state, problem, train, rng) -> int array`: the rows of the training
      set to visit in an epoch, in order; batches are cut from it. It may depend
      on what `refresh` left in the state, not on what `gradients` changes, so
      that an interrupted epoch can be resumed.
    needs_meta: whether `inputs.meta_batch` must be there.
  """

  gradients: Callable[[PyTree, Problem, Inputs], tuple[Gradients, PyTree]]
  init: Callable[[Array, Problem, PyTree], PyTree] = no_state
  refresh: Callable[[PyTree, Problem, EpochView], PyTree] = keep_state
  sample: Callable[[PyTree, Problem, Batch, np.random.Generator], np.ndarray] = (
    permutation
  )
  needs_meta: bool = False


def split_batches(examples: Batch, batch_size: int) -> Iterator[Batch]:
  """Cuts N examples into consecutive batches; the last one may be smaller.

  Args:
    examples: arrays, or sources of rows, with leading axis N.
    batch_size: rows of a batch.
  """
  size = len(next(iter(examples.values())))
  for start in range(0, size, batch_size):
    yield {name: x[start : start + batch_size] for name, x in examples.items()}


def summed_gradient(
  linearized: Linearized, weights: Array, axis_name: AxisName
) -> PyTree:
  """Gradient of sum_i weights_i * losses_i over the global batch, like `params`.

  Args:
    linearized: this device's batch.
    weights: of this device's examples, [B], held constant.
    axis_name: mapped axis over which the batch is sharded.
  """
  return psum(linearized.weighted_gradient(weights), axis_name)


def psum(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Sum over the devices of `axis_name`; the identity when it is None.

  Never differentiate through this under `pmap`: the transpose of psum is psum
  there, and the result comes out too large by the number of devices.
  """
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def pmean(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Mean over the devices of `axis_name`; the identity when it is None."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def pmax(value: Array, axis_name: AxisName) -> Array:
  """Maximum over the devices of `axis_name`; the identity when it is None."""
  return value if axis_name is None else jax.lax.pmax(value, axis_name)


def local(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Marks `tree` as this device's own, so that its gradient stays local too.

  Only `shard_map` with `check_vma=True` tells apart values that are equal on
  every device from values that vary, and silently sums the gradient of the
  former. Everywhere else this is the identity.
  """
  if axis_name is None:
    return tree
  tracked = _varying_axes(jax.lax.axis_index(axis_name))

  def mark(x):
    missing = tuple(tracked - _varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(mark, tree)


def varying(value: Array, aval: Any) -> Array:
  """`value`, marked as this device's own where `aval`, a type, is; see `local`."""
  axes = tuple(aval.manual_axis_type.varying)
  return jax.lax.pcast(value, axes, to="varying") if axes else value


def _varying_axes(x: Any) -> frozenset[str]:
  return jax.typeof(x).manual_axis_type.varying


def global_size(local_size: int, axis_name: AxisName) -> int:
  """Number of examples over all devices, each holding `local_size`."""
  if axis_name is None:
    return local_size
  return local_size * jax.lax.axis_size(axis_name)


def gather(local_values: Array, axis_name: AxisName) -> Array:
  """This device's [B] values to those of the global batch, in device order."""
  if axis_name is None:
    return local_values
  return jax.lax.all_gather(local_values, axis_name, tiled=True)


def local_slice(global_values: Array, axis_name: AxisName) -> Array:
  """The inverse of `gather`: this device's [B] slice of the global batch."""
  if axis_name is None:
    return global_values
  size = global_values.shape[0] // jax.lax.axis_size(axis_name)
  start = jax.lax.axis_index(axis_name) * size
  return jax.lax.dynamic_slice_in_dim(global_values, start, size)


def take(table: Array, index: Array) -> Array:
  """`table[index]`, on any kind of mesh, and NaN for rows that do not exist.

  Under a mesh with explicit sharding, JAX must know how the result is sharded: as
  `index` is. Plain indexing counts negative numbers from the end and clamps large ones.

  Args:
    table: a row for each class or group, [C, ...], the same on every device.
    index: integers from 0 to C - 1, of any shape. Others give NaN, if the table holds
      floating point numbers.

  Returns:
    An array of shape `index.shape + table.shape[1:]`.
  """
  table, index = jnp.asarray(table), jnp.asarray(index)
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


def unsharded(x: Array) -> Array:
  """`x`, gathered on every device where a mesh with explicit sharding spreads it.

  For operations that JAX refuses on a sharded axis, such as a sort. Everywhere else
  this is the identity: automatic meshes need no such help.
  """
  sharding = jax.typeof(x).sharding
  if not any(sharding.spec):
    return x
  whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.sharding.reshard(x, whole)


def sharded_like(value: Array, like: Array) -> Array:
  """`value`, spread over an explicit mesh as `like`, of equal leading axes, is."""
  sharding = jax.typeof(like).sharding
  if not any(sharding.spec):
    return value
  spec = jax.sharding.PartitionSpec(*sharding.spec[: value.ndim])
  return jax.sharding.reshard(value, jax.sharding.NamedSharding(sharding.mesh, spec))


def all_finite(tree: PyTree) -> Array:
  """True when no leaf of `tree` holds a NaN or an infinity; bool scalar."""
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.stack(
    [jnp.all(jnp.isfinite(x)) for x in leaves] or [jnp.array(True)]
  ).all()


def max_abs(tree: PyTree) -> Array:
  """Largest absolute value in the floating point leaves of `tree`, scalar.

  It is NaN or infinite exactly if `tree` is not finite, and 0 exactly if `tree` is
  zero: one pass over the numbers answers both.
  """
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  sizes = [jnp.max(jnp.abs(x), initial=0) for x in leaves]
  dtype = jnp.result_type(float)
  return jnp.max(jnp.stack([x.astype(dtype) for x in sizes] or [jnp.zeros(())]))


def finite_rows(
  name: str, values: Array, axis_name: AxisName = None, advice: str = ""
) -> Array:
  """Whether every one of `values` [B] is finite on every device; bool scalar.

  Args:
    name: what the values are, in the plural.
    values: [B], of this device.
    axis_name: mapped axis over which the values are sharded.
    advice: how the error message ends.

  Raises:
    FloatingPointError: outside `jit`, if one is not; the message has the number of
      such values and the first row.
  """
  bad = ~jnp.isfinite(values)
  num_bad = psum(jnp.sum(bad), axis_name)
  if not isinstance(num_bad, jax.core.Tracer) and num_bad:
    raise FloatingPointError(
      f"{num_bad} of {values.size} {name} are NaN or infinite, the first in row"
      f" {int(np.flatnonzero(np.asarray(bad))[0])}{advice}."
    )
  return num_bad == 0


def first_fault(fault: Array, **healthy: Array) -> Array:
  """`fault`, or else the first of the named quantities that is not healthy.

  Args:
    fault: a `Fault` found earlier, int32 scalar.
    **healthy: names of members of `Fault`, in their order, and bool scalars.
  """
  for name, is_healthy in healthy.items():
    this = jnp.where(is_healthy, 0, Fault[name.upper()].value).astype(jnp.int32)
    fault = jnp.where(fault == 0, this, fault)
  return fault


def accumulator_dtype(dtype: Any) -> Any:
  """The dtype for sums and quotients of numbers of `dtype`: float32 or better."""
  if not jnp.issubdtype(dtype, jnp.inexact):
    return jnp.result_type(float)
  return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def losses_and_aux(name: str, returned: Any, has_aux: bool) -> tuple[Array, Any]:
  """What the losses function `name` returned, as `(losses [B], aux)`; aux may be None.

  Raises:
    InputError: it is not what `has_aux` announces, or losses are not floating point
      numbers of shape [B].
  """
  losses, aux = split_aux(name, returned, has_aux)
  check_losses(f"{name}'s result", losses)
  return losses, aux


def split_aux(name: str, returned: Any, has_aux: bool) -> tuple[Any, Any]:
  """What the function `name` returned, as `(result, aux)`; aux may be None.

  Raises:
    InputError: it is not a pair although `has_aux`.
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
  """Raises InputError unless `losses` are floating-point numbers of shape [B]."""
  check_vector(name, losses)
  if not jnp.issubdtype(losses.dtype, jnp.floating):
    raise InputError(
      f"{name} must be floating-point numbers; got {losses.dtype}, which has no"
      " gradient, so that no example could matter. Compute the losses in float32."
    )


def check_vector(name: str, value: Any) -> None:
  """Raises InputError unless `value` has shape [B] (one number an example)."""
  # Not chex.assert_rank: it takes a tuple (losses, aux) for a list of arrays.
  if not hasattr(value, "shape"):
    raise InputError(
      f"{name} must be an array of shape [B]; got a value of type"
      f" {type(value).__name__}."
      " If it is (losses, aux), pass has_aux=True."
    )
  if len(value.shape) != 1:
    raise InputError(
      f"{name} must be one number per example, shape [B]; got shape"
      f" {value.shape}. Do not average over the batch."
    )
