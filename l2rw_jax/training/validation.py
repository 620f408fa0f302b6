"""The loss of a held-out set, shown to an optimizer that watches it.

`optax.contrib.reduce_on_plateau` lowers the learning rate when a value stops
falling. The training step gives every such optimizer `Gradients.value`; here that
becomes the loss of a validation set, measured before every epoch.
"""

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import batches as batches_lib

# (logits [B, C], labels [B]) -> weights [B] that sum to 1.
Weights = Callable[[base.Array, base.Array], base.Array]


class State(NamedTuple):
  """What `watched` carries.

  Attributes:
    value: loss of the validation set before this epoch, scalar.
    inner: the method's own state.
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
  """`method`, with the loss of a validation set as `Gradients.value`.

  The loss is the task's where this stands: around `changed_loss` the classifier's
  own, within it the changed one. Put it around `baselines.fine_tuning`, whose last
  steps would else show the loss of the clean set.

  Args:
    method: trains as without this.
    validation: by seed of the run.
    weights: of the examples of a validation batch, from their logits and labels;
      uniform if None.
    batch_size: examples a forward pass.

  Raises:
    InputError: a validation set is empty.
  """
  validation = {
    seed: examples_lib.check_examples(examples, f"validation of seed {seed}")
    for seed, examples in validation.items()
  }
  for seed, examples in validation.items():
    if not len(examples.label):
      raise base.InputError(
        f"the validation set of seed {seed} is empty: raise num_validation."
      )

  def init(key, problem, params):
    return State(jnp.full((), jnp.inf), method.init(key, problem, params))

  def gradients(state, problem, inputs):
    found, inner = method.gradients(state.inner, problem, inputs)
    return found._replace(value=state.value), state._replace(inner=inner)

  def refresh(state, problem, view):
    examples = batches_lib.examples_dict(validation[view.seed])
    value = _mean_loss(problem, weights, view, examples, batch_size)
    inner = method.refresh(state.inner, problem, view)
    return State(jnp.asarray(value, state.value.dtype), inner)

  def inner_sample(state, problem, train, rng):
    return method.sample(state.inner, problem, train, rng)

  plain = method.sample is base.permutation
  return method._replace(
    init=init,
    gradients=gradients,
    refresh=refresh,
    sample=base.permutation if plain else inner_sample,
  )


def _mean_loss(problem, weights, view, examples, batch_size):
  size = len(examples["label"])
  total = 0.0
  for start in range(0, size, batch_size):
    batch = {k: v[start : start + batch_size] for k, v in examples.items()}
    loss = _batch_loss(
      problem.forward, problem.loss, weights, view.params, view.model_state, batch
    )
    total += float(loss) * len(batch["label"])
  return total / size


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_loss(forward, loss, weights, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  values = loss(outputs, batch)
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
  """`optimizer`, slowed by `factor` when the watched value stops falling.

  PyTorch's ReduceLROnPlateau with one value an epoch, decided an epoch later: the
  value of before an epoch is judged at its end.

  Args:
    optimizer: any.
    steps_per_epoch: updates between two values.
    factor: in (0, 1).
    patience: epochs without a new best value that are let pass.
    min_scale: the lowest product of factors.
    rtol: by which share a value must be lower to be the best.
  """
  plateau = optax.contrib.reduce_on_plateau(
    factor,
    patience + 1,  # optax acts on reaching it, PyTorch on passing it
    rtol,
    accumulation_size=steps_per_epoch,
    min_scale=min_scale,
  )

  return optax.chain(optimizer, plateau)
