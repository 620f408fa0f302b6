"""Linearization in microbatches, for batches that do not fit into memory.

Losses, their derivatives along a direction and their weighted gradient are computed one
microbatch at a time, and only these results are kept. They equal the results of the
whole batch. Activations take the memory of one microbatch, but every pass recomputes
them. The costs in forward passes of the batch are 1 for the losses, 3 for `directional`
and 3 for `weighted_gradient`, compared with 2, 1 and 1 for the layerwise engine and 1,
2 and 2 for forward mode.

Anything that depends on several examples is computed from one microbatch: BatchNorm in
training mode normalizes each microbatch separately (an error is raised if the losses
function returns its statistics), and a dropout mask that is drawn for a whole batch is
the same in every microbatch.

Under `jax.pmap` and `jax.shard_map`, the microbatches are parts of each device's batch.
If arrays are sharded over an automatic mesh, the microbatches are parts of the global
batch, so examples are moved between devices.

Microbatches are processed in a loop, so compile time does not depend on their number.
On a CPU, `control_flow.channels_last` converts the convolutions in this loop to a
layout in which they are fast.
"""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import control_flow
from l2rw_jax.linearization import ordering
from l2rw_jax.linearization import trainable


def check(microbatch_size: int | None) -> None:
  """Raises InputError unless `microbatch_size` is None or a positive integer."""
  if microbatch_size is not None:
    base.check_integer("microbatch_size", microbatch_size)


def microbatched(
  linearize: Callable[..., base.Linearized], microbatch_size: int | None
) -> Callable[..., base.Linearized]:
  """Wraps `linearize` to process `microbatch_size` examples at a time.

  Args:
    linearize: `linearization.linearize`, or the `linearize` of a `base.Problem`.
    microbatch_size: number of examples that this device processes at a time; the last
      microbatch may be smaller. None processes the whole batch at once; the result is
      then `linearize` itself.

  Returns:
    A function of the arguments of `linearize` that returns a `base.Linearized`. Its
    `directional` uses `linearize`, and its `weighted_gradient` uses reverse mode. Every
    array of the batch and of aux must have a row per example; close over arrays that
    examples share. Call the function inside `jit`: outside, every call compiles.

  Raises:
    InputError: `microbatch_size` is neither None nor a positive integer. When the
      returned function is called: an array of the batch or of aux does not have a row
      per example, an array of the batch is sharded over an explicit mesh, or
      `losses_fn` does not return one loss per example of a microbatch.

  Example:
    >>> import jax.numpy as jnp
    >>> from l2rw_jax import linearization
    >>> losses_fn = lambda p, x: (x @ p) ** 2
    >>> one_by_one = microbatched(linearization.linearize, 1)
    >>> lin = one_by_one(losses_fn, jnp.array([1., 2.]), jnp.eye(2))
    >>> print(lin.losses, lin.directional(jnp.array([1., 0.])))
    [1. 4.] [2. 0.]
    >>> print(lin.weighted_gradient(jnp.array([0., 1.])))
    [0. 4.]
  """
  check(microbatch_size)
  if microbatch_size is None:
    return linearize
  microbatch_size = int(microbatch_size)  # Products in a narrow type would overflow.

  def linearize_microbatched(
    losses_fn, params, batch, *, has_aux=False, direction=None, **options
  ):
    del direction  # Each vector needs a separate pass.
    call = _always_aux(losses_fn, has_aux)
    num_rows(batch)
    trainable.check(params)
    if has_aux:
      check_aux(call, params, batch, microbatch_size)
    partition = trainable.Partition(params)

    def losses_step(leaves, microbatch):
      return leaves, call(partition.combine(leaves), microbatch)

    def directional_step(vector, microbatch):
      direction = partition.combine_gradient(vector)
      linearized = linearize(
        losses_fn, params, microbatch, has_aux=has_aux, direction=direction, **options
      )
      return vector, linearized.directional(direction)

    def directional(vector):
      leaves = partition.leaves(vector)
      return scan(directional_step, leaves, batch, microbatch_size)[1]

    def gradient_of(weights):
      if jnp.shape(weights) != losses.shape:
        raise base.InputError(
          f"weights must be one number per loss, {losses.shape}; got"
          f" {jnp.shape(weights)}."
        )
      return weighted_gradient(
        losses_fn, params, batch, weights, microbatch_size, has_aux=has_aux
      ).gradient

    leaves = partition.leaves(params)
    _, (losses, aux) = scan(losses_step, leaves, batch, microbatch_size)
    engine = base.StaticStr("microbatched")
    return base.Linearized(losses, directional, gradient_of, aux, engine)

  return linearize_microbatched


# Part of the messages about losses functions that fail or return a different number of
# losses for a microbatch.
ONE_LOSS_PER_ROW = (
  "It must compute one loss for each row of its batch: pass arrays with a row per"
  " example (such as labels) in the batch, and do not close over them."
)


class Weighted(NamedTuple):
  """Result of `weighted_gradient`.

  Attributes:
    losses: [B].
    gradient: gradient of sum_i weights_i losses_i, shaped like `params`.
    aux: the auxiliary output of the losses function, or None.
  """

  losses: base.Array
  gradient: base.PyTree
  aux: Any


def weighted_gradient(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  weights: Any,
  microbatch_size: int,
  *,
  has_aux: bool = False,
) -> Weighted:
  """The gradient of sum_i w_i l_i in microbatches, for weights that are known.

  It uses reverse mode and supports any model. Gradients are summed in float32 or wider.

  Args:
    losses_fn: `(params, batch) -> losses`, one per row of a batch of any size, or
      `(losses, aux)` with `has_aux`, where aux has a row per example too.
    params: see `linearization.linearize`.
    batch: arrays with a row per example.
    weights: [B], or a scalar for all examples.
    microbatch_size: number of examples that are processed at a time.
    has_aux: whether `losses_fn` returns an auxiliary output in addition to the losses.

  Returns:
    A `Weighted`.

  Raises:
    InputError: the arguments are invalid, see `microbatched`, or `weights` is not one
      number per example.
  """
  check(microbatch_size)
  call, size = _always_aux(losses_fn, has_aux), num_rows(batch)
  if has_aux:
    check_aux(call, params, batch, microbatch_size)
  if jnp.shape(weights) not in ((), (size,)):
    raise base.InputError(
      f"weights must be one number per loss, {(size,)}; got {jnp.shape(weights)}."
    )
  weights = jnp.broadcast_to(jnp.asarray(weights), size)
  partition = trainable.Partition(params)
  leaves = partition.leaves(params)

  def add(total, rows):
    microbatch, weights = rows
    losses, vjp_fn, aux = jax.vjp(
      lambda leaves: call(partition.combine(leaves), microbatch), leaves, has_aux=True
    )
    # The factor of ones makes the weights vary over the same devices as the losses.
    (gradient,) = vjp_fn(weights.astype(losses.dtype) * jnp.ones_like(losses))
    added = [t + g.astype(t.dtype) for t, g in zip(total, gradient, strict=True)]
    return added, (losses, aux)

  with jax.numpy_dtype_promotion("standard"):
    types = [base.accumulator_dtype(x.dtype) for x in leaves]
  zeros = [jnp.zeros_like(x, dtype=t) for x, t in zip(leaves, types, strict=True)]
  total, (losses, aux) = scan(add, zeros, (batch, weights), microbatch_size)
  gradient = [t.astype(x.dtype) for t, x in zip(total, leaves, strict=True)]
  return Weighted(losses, partition.combine_gradient(gradient), aux)


def num_rows(batch: Any) -> int:
  """The number of examples of a batch whose arrays have a row per example.

  Raises:
    InputError: an array does not have a row per example, or it is sharded over an
      explicit mesh.
  """
  sizes = set()
  for path, x in jax.tree_util.tree_leaves_with_path(batch):
    if not getattr(x, "shape", ()):
      raise base.InputError(
        f"batch{jax.tree_util.keystr(path)} has no row per example: with"
        " microbatch_size, close over arrays that examples share."
      )
    sizes.add(x.shape[0])
  check_unsharded(batch, "with microbatch_size")
  if len(sizes) != 1:
    raise base.InputError(
      f"the arrays of batch have {sorted(sizes)} rows: with microbatch_size, each must"
      " have one row per example; close over arrays that examples share."
    )
  return sizes.pop()


def check_unsharded(batch: Any, where: str) -> None:
  """Raises InputError if an array of `batch` is sharded over an explicit mesh.

  Args:
    batch: pytree of arrays and other values.
    where: the case in which this is not supported, for the error message.
  """
  for path, x in jax.tree_util.tree_leaves_with_path(batch):
    is_array = isinstance(x, jax.Array)
    if is_array and jax.typeof(x).sharding.spec[:1] not in ((), (None,)):
      raise base.InputError(
        f"batch{jax.tree_util.keystr(path)} is spread over devices by its sharding:"
        f" {where}, spread it by shard_map or pmap and pass axis_name."
      )


@contextlib.contextmanager
def noting_size(size: int | None) -> Iterator[None]:
  """Adds the number of examples to the errors of a losses function in a `with` block.

  A function may fail only because it gets fewer examples than the caller's batch has,
  which its error does not say.

  Args:
    size: number of examples that the function gets; None if these are the whole batch,
      and errors need no note.
  """
  try:
    yield
  except Exception as error:
    if size is not None:
      part = "one example" if size == 1 else f"a microbatch of {size} examples"
      error.add_note(f"losses_fn was called with {part}. {ONE_LOSS_PER_ROW}")
    raise


def _always_aux(losses_fn, has_aux):
  """Returns `(params, batch) -> (losses, aux)`."""

  def call(params, batch):
    size = jax.tree.leaves(batch)[0].shape[0]
    with noting_size(size):
      result = losses_fn(params, batch)
    losses, aux = base.losses_and_aux("losses_fn", result, has_aux)
    if losses.shape[0] != size:
      raise base.InputError(
        f"losses_fn returned {losses.shape[0]} losses for a microbatch of {size}"
        f" examples. {ONE_LOSS_PER_ROW}"
      )
    return losses, aux

  return call


def check_aux(call, params, batch, microbatch_size):
  """Raises InputError unless every array of aux has a row per example."""
  # Two sizes, because one of them may equal the number of channels of a statistic.
  sizes = (microbatch_size, 2 * microbatch_size)

  def aux_of(size):
    def resized(x):
      return jax.typeof(x).update(shape=(size, *x.shape[1:]))

    return jax.eval_shape(call, params, jax.tree.map(resized, batch))[1]

  one, two = map(aux_of, sizes)
  named = jax.tree_util.tree_leaves_with_path(one)
  for (path, x), y in zip(named, jax.tree.leaves(two), strict=True):
    if (x.shape[:1], y.shape[:1]) != tuple((size,) for size in sizes):
      raise base.InputError(
        f"losses_fn returns aux{jax.tree_util.keystr(path)}, which has no row per"
        " example and cannot be computed in microbatches: leave microbatch_size out, or"
        " do not return this array (for BatchNorm statistics, use a model without"
        " BatchNorm)."
      )


def scan(step, carry, rows, microbatch_size):
  """`jax.lax.scan` over microbatches of `rows`, strictly one after the other.

  Args:
    step: `(carry, microbatch) -> (carry, results)`, with a row of results per example.
    carry: initial carry.
    rows: pytree of arrays with a row per example.
    microbatch_size: number of rows in a microbatch.

  Returns:
    The last carry, and the results with a row per example.
  """

  def ordered(state, microbatch):
    zero, carry = state
    # Without this dependency, XLA:CPU starts on all microbatches at the same time.
    carry, results = step(carry, ordering.after(zero, microbatch))
    return (ordering.zero_after((carry, results)), carry), results

  size = jax.tree.leaves(rows)[0].shape[0]
  count = size // microbatch_size
  num_full = count * microbatch_size
  state, all_results = (ordering.zero_after((carry, rows)), carry), []
  if count:
    microbatches = jax.tree.map(
      lambda x: x[:num_full].reshape(count, microbatch_size, *x.shape[1:]), rows
    )
    state, results = jax.lax.scan(
      control_flow.channels_last(ordered), state, microbatches
    )
    results = jax.tree.map(lambda x: x.reshape(num_full, *x.shape[2:]), results)
    all_results.append(results)
  if num_full < size or not count:
    state, results = ordered(state, jax.tree.map(lambda x: x[num_full:], rows))
    all_results.append(results)
  return state[1], jax.tree.map(lambda *x: jnp.concatenate(x), *all_results)
