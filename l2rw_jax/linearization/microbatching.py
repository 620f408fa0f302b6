"""A batch, linearized a few examples at a time, for batches that do not fit.

The losses, their change along a direction and their weighted gradient are sums or
rows over examples, so that each can be taken over parts of the batch, one part after
the other, and nothing of a part is kept but its result. The numbers are those of the
whole batch; the memory is that of one part, and what a pass stored it computes again:
costs in forward passes of the batch are 1 for the losses, 3 for `directional` and 3
for `weighted_gradient`, against 2, 1 and 1 for the layerwise engine and 1, 2 and 2
for forward mode. With parts as large as the batch, activations are recomputed
instead of kept between these three.

What depends on more than one example is taken over the part instead: BatchNorm in
training normalizes each part by itself (and is refused where its statistics come out
of the losses function), and a mask drawn for a whole batch, as by dropout, is the same
in every part.

With `axis_name` the parts are of each device's own examples. Of arrays that are
sharded under `jit` they are of the global batch, and examples move between devices.

On CPU the parts are written out one by one, because XLA:CPU runs a convolution in a
loop 6 to 14 times slower, so that compile time grows with their number; elsewhere
they are a loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.linearization import engines
from l2rw_jax.linearization import ordering


def check(microbatch_size: int | None) -> None:
  """Raises InputError unless `microbatch_size` is None or a positive integer."""
  if microbatch_size is not None and not (
    isinstance(microbatch_size, (int, np.integer))
    and not isinstance(microbatch_size, bool)
    and microbatch_size >= 1
  ):
    raise base.InputError(
      f"microbatch_size={microbatch_size!r}: must be a positive integer, or None for"
      " the whole batch at once."
    )


def microbatched(
  linearize: Callable[..., base.Linearized], microbatch_size: int | None
) -> Callable[..., base.Linearized]:
  """A `linearize` that sees `microbatch_size` examples at a time.

  Args:
    linearize: `linearization.linearize`, or a `base.Problem`'s.
    microbatch_size: examples of this device at a time, the last part may be smaller;
      None is all at once: `linearize` itself.

  Returns:
    A function of the arguments of `linearize`, which returns a `base.Linearized`.
    Its `directional` is that of `linearize`; losses come from the losses function,
    gradients from reverse mode.
    Its `batch` must be arrays with a row per example (close over what examples
    share), and so must aux. Call it inside `jit`: outside, every call compiles.

  Raises:
    InputError: `microbatch_size` is not positive; when called, an array of `batch` or
      of aux has no row per example.

  Example:
    >>> import jax.numpy as jnp
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

  def linearize_microbatched(losses_fn, params, batch, *, has_aux=False, **options):
    call = _always_aux(losses_fn, has_aux)
    num_rows(batch)
    engines.check_trainable(params)
    if has_aux:
      _check_aux(call, params, batch, microbatch_size)
    partition, combine = engines.differentiable(params)

    def losses_of(leaves, part):
      return leaves, call(combine(leaves), part)

    def slopes_of(vector, part):
      found = linearize(losses_fn, params, part, has_aux=has_aux, **options)
      return vector, found.directional(combine(vector, zeros=True))

    def directional(vector):
      return _sweep(slopes_of, partition(vector), batch, microbatch_size)[1]

    def vjp_fn(weights):
      if jnp.shape(weights) != losses.shape:
        raise base.InputError(
          f"weights must be one number per loss, {losses.shape}; got"
          f" {jnp.shape(weights)}."
        )
      found = weighted_gradient(
        losses_fn, params, batch, weights, microbatch_size, has_aux=has_aux
      )
      return found.gradient

    _, (losses, aux) = _sweep(losses_of, partition(params), batch, microbatch_size)
    return base.Linearized(losses, directional, vjp_fn, aux)

  return linearize_microbatched


class Weighted(NamedTuple):
  """What one pass over a batch with given weights finds.

  Attributes:
    losses: [B].
    gradient: of sum_i weights_i losses_i, shaped like `params`.
    aux: what the losses function returned beside the losses, else None.
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
  """The gradient of sum_i w_i l_i at weights that are known beforehand.

  Reverse mode, for any model; parts are added up in float32 or better.

  Args:
    losses_fn: `(params, batch) -> losses`, one per row of any number of rows (with
      `has_aux`, and aux, with a row per example too).
    params: as in `linearization.linearize`.
    batch: arrays with a row per example.
    weights: [B], or one number for all.
    microbatch_size: examples at a time.
    has_aux: whether `losses_fn` returns something beside the losses.

  Raises:
    InputError: as `microbatched`, or `weights` are not one per example.
  """
  check(microbatch_size)
  call, size = _always_aux(losses_fn, has_aux), num_rows(batch)
  if has_aux:
    _check_aux(call, params, batch, microbatch_size)
  if jnp.shape(weights) not in ((), (size,)):
    raise base.InputError(
      f"weights must be one number per loss, {(size,)}; got {jnp.shape(weights)}."
    )
  weights = jnp.broadcast_to(jnp.asarray(weights), size)
  partition, combine = engines.differentiable(params)
  leaves = partition(params)

  def add(total, rows):
    part, weights = rows
    losses, vjp_fn, aux = jax.vjp(
      lambda leaves: call(combine(leaves), part), leaves, has_aux=True
    )
    # Times ones, to be as local to devices as the losses are.
    (gradient,) = vjp_fn(weights.astype(losses.dtype) * jnp.ones_like(losses))
    added = [t + g.astype(t.dtype) for t, g in zip(total, gradient, strict=True)]
    return added, (losses, aux)

  with jax.numpy_dtype_promotion("standard"):
    types = [base.accumulator_dtype(x.dtype) for x in leaves]
  zeros = [jnp.zeros_like(x, dtype=t) for x, t in zip(leaves, types, strict=True)]
  total, (losses, aux) = _sweep(add, zeros, (batch, weights), microbatch_size)
  gradient = [t.astype(x.dtype) for t, x in zip(total, leaves, strict=True)]
  return Weighted(losses, combine(gradient, zeros=True), aux)


def num_rows(batch):
  """The number of examples, of which each array of `batch` must have a row.

  Raises:
    InputError: one does not.
  """
  sizes = set()
  for path, x in jax.tree_util.tree_leaves_with_path(batch):
    if not getattr(x, "shape", ()):
      raise base.InputError(
        f"batch{jax.tree_util.keystr(path)} has no row per example: with"
        " microbatch_size, close over what examples share."
      )
    if jax.typeof(x).sharding.spec[:1] not in ((), (None,)):
      raise base.InputError(
        f"batch{jax.tree_util.keystr(path)} is spread over devices by its sharding:"
        " with microbatch_size, spread it by shard_map or pmap and pass axis_name."
      )
    sizes.add(x.shape[0])
  if len(sizes) != 1:
    raise base.InputError(
      f"the arrays of batch have {sorted(sizes)} rows: with microbatch_size, each must"
      " have one per example; close over what examples share."
    )
  return sizes.pop()


def _always_aux(losses_fn, has_aux):
  """`(params, batch) -> (losses, aux)`."""

  def call(params, batch):
    return base.losses_and_aux("losses_fn", losses_fn(params, batch), has_aux)

  return call


def _check_aux(call, params, batch, microbatch_size):
  """Raises InputError unless every array of aux has a row per example."""
  # Two sizes tell such a row from a statistic of as many channels as examples.
  sizes = (microbatch_size, 2 * microbatch_size)

  def aux_of(size):
    def part(x):
      return jax.typeof(x).update(shape=(size, *x.shape[1:]))

    return jax.eval_shape(call, params, jax.tree.map(part, batch))[1]

  one, two = map(aux_of, sizes)
  named = jax.tree_util.tree_leaves_with_path(one)
  for (path, x), y in zip(named, jax.tree.leaves(two), strict=True):
    if (x.shape[:1], y.shape[:1]) != tuple((size,) for size in sizes):
      raise base.InputError(
        f"losses_fn returns aux{jax.tree_util.keystr(path)}, which has no row per"
        " example and cannot be taken in parts: leave microbatch_size out, or train a"
        " model without BatchNorm."
      )


def _sweep(step, carry, rows, microbatch_size):
  """`jax.lax.scan` over parts of `rows`, strictly one after the other.

  Args:
    step: `(carry, part) -> (carry, rows of results)`.
    carry: what goes from part to part.
    rows: pytree of arrays with a row per example.
    microbatch_size: rows at a time.

  Returns:
    The last carry, and the results with a row per example.
  """

  def ordered(state, part):
    zero, carry = state
    # Otherwise XLA:CPU starts on all parts at once.
    carry, found = step(carry, ordering.after(zero, part))
    return (ordering.zero_after((carry, found)), carry), found

  size = jax.tree.leaves(rows)[0].shape[0]
  count = size // microbatch_size
  whole = count * microbatch_size
  state, found = (ordering.zero_after((carry, rows)), carry), []
  if count:
    parts = jax.tree.map(
      lambda x: x[:whole].reshape(count, microbatch_size, *x.shape[1:]), rows
    )
    unroll = count if jax.default_backend() == "cpu" else 1
    state, results = jax.lax.scan(ordered, state, parts, unroll=unroll)
    found.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results))
  if whole < size or not count:
    state, results = ordered(state, jax.tree.map(lambda x: x[whole:], rows))
    found.append(results)
  return state[1], jax.tree.map(lambda *x: jnp.concatenate(x), *found)
