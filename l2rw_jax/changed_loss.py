"""Trains any method on another loss, from some epoch on."""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

# (outputs, batch, class_counts [C]) -> losses [B].
Loss = Callable[[base.PyTree, base.Batch, base.Array], base.Array]


class State(NamedTuple):
  """State of `changed_loss`.

  Attributes:
    epoch: the current epoch, counted from 0; int32 scalar.
    inner: state of the wrapped method.
  """

  epoch: base.Array
  inner: base.PyTree


def changed_loss(
  method: base.Method, loss: Loss, *, from_epoch: int = 0
) -> base.Method:
  """Replaces the per-example training loss of `method` with `loss`.

  The gradients of the method, its `Gradients.losses`, its meta loss, and its weights if
  they depend on losses (those of `bare` do not) are computed from the new loss.
  Evaluation uses the loss of the classifier. The wrapper has no effect on methods that
  define a loss themselves: `forward_correction`, `s_model` once its layer is active,
  `ldam_drw` and the baselines that are named after a loss. `warpi` always trains on its
  rectified cross-entropy; only its meta loss and its reported losses change.

  Wrap a method twice to change the loss twice. The outer loss is used first. This
  example uses LDAM until epoch 160 and then weighted LDAM:

    changed_loss(changed_loss(absgd, weighted_ldam, from_epoch=160), ldam)

  Applied inside this wrapper, `training.validation.watched` measures the new loss;
  applied outside, it measures the loss of the classifier.

  Args:
    method: the method to wrap.
    loss: `(outputs, batch, class_counts) -> [B]`.
    from_epoch: the first epoch, counted from 0, that uses `loss`. Both losses are
      computed in every epoch if this is not 0. The one that is not used has no
      influence, even if its values or derivatives are NaN.

  Returns:
    A `base.Method` whose state is a `State`.

  Raises:
    InputError: `from_epoch` is negative or not an integer.
  """
  from_epoch = base.check_integer("changed_loss: from_epoch", from_epoch, 0)

  def init(key, problem, params):
    return State(jnp.zeros((), jnp.int32), method.init(key, problem, params))

  def changed(problem, epoch):
    def current_loss(outputs, batch):
      if not from_epoch:
        return loss(outputs, batch, problem.class_counts)
      is_new = epoch >= from_epoch
      new = loss(where_used(is_new, outputs), batch, problem.class_counts)
      old = problem.loss(where_used(~is_new, outputs), batch)
      dtype = base.common_dtype(new, old)
      return jnp.where(is_new, new.astype(dtype), old.astype(dtype))

    return dataclasses.replace(problem, loss=current_loss)

  def gradients(state, problem, inputs):
    gradients, inner = method.gradients(
      state.inner, changed(problem, state.epoch), inputs
    )
    return gradients, state._replace(inner=inner)

  @functools.cache
  def loss_with_counts(class_counts):
    counts = jnp.asarray(class_counts)
    return lambda outputs, batch: loss(outputs, batch, counts)

  def refresh(state, problem, view):
    if view.epoch >= from_epoch:
      # One function object for all epochs, so that it is compiled only once.
      counts = tuple(np.asarray(problem.class_counts).tolist())
      problem = dataclasses.replace(problem, loss=loss_with_counts(counts))
    inner = method.refresh(state.inner, problem, view)
    return State(jnp.asarray(view.epoch, jnp.int32), inner)

  def inner_sample(state, problem, train, rng):
    return method.sample(state.inner, problem, train, rng)

  def record(state, problem, *step):
    inner = method.record(state.inner, changed(problem, state.epoch), *step)
    return state._replace(inner=inner)

  # The training loop recognizes `base.permutation` and then does not fetch the state.
  is_permutation = method.sample is base.permutation
  sample = base.permutation if is_permutation else inner_sample
  return method._replace(
    gradients=gradients,
    init=init,
    refresh=refresh,
    sample=sample,
    report=lambda state: method.report(state.inner),
    record=record,
  )


def where_used(is_used: base.Array, outputs: base.PyTree) -> base.PyTree:
  """`outputs`, to which no derivative is propagated unless `is_used`, a bool scalar.

  The gradient of `jnp.where(is_used, f(x), g(x))` is NaN if that of f is infinite,
  although f is not used, because it is multiplied by 0.
  """
  return jax.tree.map(
    lambda x: jnp.where(is_used, x, jax.lax.stop_gradient(x)), outputs
  )
