"""Optimizers that monitor the loss of a validation set.

`optax.contrib.reduce_on_plateau` lowers the learning rate when a value stops
decreasing. The training step passes `Gradients.value` to such optimizers; `watched`
sets it to the loss of a validation set, computed before every epoch.
"""

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import inference
from l2rw_jax import losses
from l2rw_jax.data import examples as examples_lib

# (logits [B, C], labels [B]) -> weights [B] that sum to 1.
Weights = Callable[[base.Array, base.Array], base.Array]


class State(NamedTuple):
  """State of the method that `watched` returns.

  Attributes:
    value: loss of the validation set before this epoch, scalar.
    inner: the state of the wrapped method.
  """

  value: base.Array
  inner: base.PyTree


def watched(
  method: base.Method,
  validation: Mapping[int, examples_lib.Examples],
  *,
  weights: Weights | None = None,
  batch_size: int = 500,
) -> base.Method:
  """Returns `method` with the loss of a validation set as `Gradients.value`.

  The validation loss uses `loss` of the problem that this wrapper receives: the loss of
  the classifier if this function wraps `changed_loss`, and the changed loss if
  `changed_loss` wraps this function. Apply this function to the result of
  `baselines.fine_tuning` and not to the method of the first phase, because otherwise
  the last steps report the loss of the meta set.

  Args:
    method: the method; its gradients do not change.
    validation: the validation set of each run, by seed.
    weights: weights of the examples in a validation batch, given their logits and
      labels; uniform if None. They sum to 1 in every forward pass, and the results of
      the passes are averaged, weighted by their numbers of examples.
    batch_size: number of examples in a forward pass.

  Returns:
    A method with the state `State`. The value is computed by `refresh`; before the
    first call of `refresh` it is infinite.

  Raises:
    InputError: a validation set is empty or invalid, see `examples.check_examples`.
  """
  validation = {
    seed: examples_lib.check_examples(examples, f"validation of seed {seed}")
    for seed, examples in validation.items()
  }
  for seed, examples in validation.items():
    if not len(examples.label):
      raise base.InputError(
        f"the validation set of seed {seed} is empty: hold examples out (for instance"
        " with num_validation)."
      )

  def init(key, problem, params):
    return State(jnp.full((), jnp.inf), method.init(key, problem, params))

  def gradients(state, problem, inputs):
    result, inner = method.gradients(state.inner, problem, inputs)
    return result._replace(value=state.value), state._replace(inner=inner)

  def refresh(state, problem, view):
    examples = examples_lib.as_batch(validation[view.seed])
    value = _mean_loss(problem, weights, view, examples, batch_size)
    inner = method.refresh(state.inner, problem, view)
    return State(jnp.asarray(value, state.value.dtype), inner)

  def inner_sample(state, problem, train, rng):
    return method.sample(state.inner, problem, train, rng)

  def record(state, *step):
    return state._replace(inner=method.record(state.inner, *step))

  # If the order does not depend on the state, the loop does not wait for the devices.
  is_permutation = method.sample is base.permutation
  return method._replace(
    init=init,
    gradients=gradients,
    refresh=refresh,
    sample=base.permutation if is_permutation else inner_sample,
    report=lambda state: method.report(state.inner),
    record=record,
  )


def _mean_loss(problem, weights, view, examples, batch_size):
  def weighted_sum(batch):
    loss = _batch_loss(
      problem.forward, problem.loss, weights, view.params, view.model_state, batch
    )
    return np.array([float(loss) * len(batch["label"])])

  sums = inference.map_batches(weighted_sum, examples, batch_size)
  return sums.sum() / len(examples["label"])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_loss(forward, loss, weights, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  values = loss(outputs, batch)
  values = values.astype(base.accumulator_dtype(values.dtype))
  if weights is None:
    return values.mean()
  logits = losses.logits_of(outputs)
  return jnp.sum(weights(logits, batch["label"]) * values)


def reduce_on_plateau(
  optimizer: optax.GradientTransformation,
  steps_per_epoch: int,
  *,
  factor: float,
  patience: int,
  min_scale: float,
  rtol: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
  """Scales the updates of `optimizer` by `factor` when a value stops decreasing.

  The value is the argument `value` of `update`, to which the training step passes
  `Gradients.value`. This is PyTorch's ReduceLROnPlateau with one value for each epoch,
  but it decides one epoch later: a value that is computed before an epoch takes effect
  with the last update of that epoch.

  Args:
    optimizer: any optimizer.
    steps_per_epoch: number of updates between two values.
    factor: the number in (0, 1) by which the scale is multiplied at each reduction.
    patience: number of successive epochs without a new best value that do not reduce
      the scale; the next one does.
    min_scale: lower bound of the scale.
    rtol: relative decrease that makes a value the new best one.
  """
  plateau = optax.contrib.reduce_on_plateau(
    factor,
    # optax reduces when the patience is reached, PyTorch when it is exceeded.
    patience + 1,
    rtol,
    accumulation_size=steps_per_epoch,
    min_scale=min_scale,
  )

  return optax.chain(optimizer, plateau)
