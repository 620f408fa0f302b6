"""Any method on another loss, from some epoch on."""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

# (outputs, batch, class_counts [C]) -> losses [B].
Loss = Callable[[base.PyTree, base.Batch, base.Array], base.Array]


class State(NamedTuple):
  """What `changed_loss` carries.

  Attributes:
    epoch: the current one, counted from 0; int32 scalar.
    inner: the method's own state.
  """

  epoch: base.Array
  inner: base.PyTree


def changed_loss(
  method: base.Method, loss: Loss, *, from_epoch: int = 0
) -> base.Method:
  """`method`, but what it calls the loss of an example is `loss`.

  Its weights, its `Gradients.losses` and the loss of its clean set follow; evaluation
  keeps the classifier's own loss. Methods that are a loss themselves keep theirs too:
  `forward_correction`, `s_model` once its layer is on, `ldam_drw`, all of
  `loss_baselines`. `warpi` trains on its rectified cross-entropy: of it, only the clean
  and the reported losses change.

  Wrap twice to change the loss twice (the outermost is the first to hold):

    changed_loss(changed_loss(absgd, weighted_ldam, from_epoch=160), ldam)

  Inside this, `training.validation.watched` measures the new loss, outside the
  classifier's own.

  Args:
    method: what turns the losses into a gradient.
    loss: `(outputs, batch, class_counts) -> [B]`.
    from_epoch: until then the loss that was there before holds.

  Raises:
    InputError: `from_epoch` is negative.
  """
  check_epoch("changed_loss", from_epoch)

  def init(key, problem, params):
    return State(jnp.zeros((), jnp.int32), method.init(key, problem, params))

  def changed(problem, epoch):
    def both(outputs, batch):
      new = loss(outputs, batch, problem.class_counts)
      if not from_epoch:
        return new
      return jnp.where(epoch >= from_epoch, new, problem.loss(outputs, batch))

    return dataclasses.replace(problem, loss=both)

  def gradients(state, problem, inputs):
    found, inner = method.gradients(state.inner, changed(problem, state.epoch), inputs)
    return found, state._replace(inner=inner)

  @functools.cache
  def bound(class_counts):
    counts = jnp.asarray(class_counts)
    return lambda outputs, batch: loss(outputs, batch, counts)

  def refresh(state, problem, view):
    if view.epoch >= from_epoch:
      # One function for all epochs: whoever compiles it does so once.
      counts = tuple(np.asarray(problem.class_counts).tolist())
      problem = dataclasses.replace(problem, loss=bound(counts))
    inner = method.refresh(state.inner, problem, view)
    return State(jnp.asarray(view.epoch, jnp.int32), inner)

  def inner_sample(state, problem, train, rng):
    return method.sample(state.inner, problem, train, rng)

  # The loop knows `permutation` and spares a look at the state.
  plain = method.sample is base.permutation
  sample = base.permutation if plain else inner_sample
  return method._replace(gradients=gradients, init=init, refresh=refresh, sample=sample)


def check_epoch(where: str, from_epoch: int) -> None:
  """Raises InputError unless `from_epoch` is an epoch."""
  if from_epoch < 0:
    raise base.InputError(f"{where}: from_epoch={from_epoch} must be at least 0.")
