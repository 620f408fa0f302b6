"""What every paper here compares with: simple weightings and samplings.

Each factory returns a `base.Method`. Unless said otherwise the loss is the
weighted sum with weights that add up to 1 over the global batch.

References:
  Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep
  Learning", ICML 2018, section 4.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax import normalization
from l2rw_jax.methods import changed_loss


def weighted_gradients(
  problem: base.Problem,
  inputs: base.Inputs,
  weights_fn: Callable[[base.Array], Any],
  *,
  has_aux: bool = False,
) -> Any:
  """Gradients of the batch under weights that are a function of its losses.

  Args:
    task: the learning problem.
    inputs: the step's inputs.
    weights_fn: this device's losses [B] -> its weights [B], held constant.
    has_aux: whether it returns `(weights, aux)`.

  Returns:
    `base.Gradients`, or with `has_aux` a pair of these and aux.
  """
  linearized = problem.linearize(
    problem.losses_fn(inputs.model_state, inputs.key),
    base.local(inputs.params, problem.axis_name),
    inputs.batch,
    has_aux=True,
  )
  weights, aux = weights_fn(linearized.losses), None
  if has_aux:
    weights, aux = weights
  grads = base.psum(linearized.weighted_gradient(weights), problem.axis_name)
  found = base.Gradients(grads, weights, linearized.losses, linearized.aux, {})
  return (found, aux) if has_aux else found


def uniform() -> base.Method:
  """Weight 1 / B for everyone: the plain mean loss."""

  def gradients(state, problem, inputs):
    def weights(losses):
      size = base.global_size(losses.shape[0], problem.axis_name)
      return jnp.full_like(losses, 1 / size)

    return weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients)


def random() -> base.Method:
  """Rectified Gaussian weights max(z, 0) / sum, z ~ N(0, 1), new every step."""

  def gradients(state, problem, inputs):
    def weights(losses):
      size = base.global_size(losses.shape[0], problem.axis_name)
      noise = jax.random.normal(inputs.key, (size,), losses.dtype)
      own = base.local_slice(normalization.rectify(noise), problem.axis_name)
      return base.sharded_like(own, losses)

    return weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients)


def class_proportion(variant: str = "paper") -> base.Method:
  """Weights in proportion to 1 / (number of training examples of the class).

  Args:
    variant: "paper" keeps a weighted average, w_i = N / (C n_y) / B.
      "official_code" is what was released: w_i = 1 - n_y / N without dividing
      by B, so that its effective step is up to 18 times larger on MNIST.
  """
  _check_variant("class_proportion", variant)

  def gradients(state, problem, inputs):
    class_balance.check_counts(problem.class_counts, problem.num_classes)
    counts = class_balance.as_counts(problem.class_counts)
    if variant == "paper":
      size = base.global_size(inputs.batch["label"].shape[0], problem.axis_name)
      per_class = class_balance.inverse_frequency(counts) / size
    else:
      per_class = 1 - counts / counts.sum()
    weights = base.take(per_class, inputs.batch["label"])
    return weighted_gradients(problem, inputs, lambda _: weights), state

  return base.Method(gradients)


def class_balanced(beta: float = 0.9999, from_epoch: int = 0) -> base.Method:
  """Weights in proportion to the class's, by the effective number of its examples.

  They add up to 1 over the global batch, like PyTorch's weighted mean; before
  `from_epoch` they are uniform (deferred re-weighting, DRW; on the plain
  cross-entropy ERM-DRW). beta = 0 is uniform, beta -> 1 inverse frequency.

  Args:
    beta: of `class_balance.effective_number`, in [0, 1).
    from_epoch: the first epoch of balanced classes, counted from 0.

  Raises:
    InputError: a setting out of range.

  References:
    Cui et al., CVPR 2019; Cao et al., NeurIPS 2019, Algorithm 1.
  """
  class_balance.check_beta(beta)
  changed_loss.check_epoch("class_balanced", from_epoch)

  def gradients(state, problem, inputs):
    class_balance.check_counts(problem.class_counts, problem.num_classes)
    per_class = class_balance.effective_number(problem.class_counts, beta)
    if from_epoch:
      per_class = jnp.where(state >= from_epoch, per_class, 1)
    labels = inputs.batch["label"]
    weights = class_balance.example_weights(per_class, labels, problem.axis_name)
    return weighted_gradients(problem, inputs, lambda _: weights), state

  return _deferred(base.Method(gradients), from_epoch)


def resampling(from_epoch: int = 0) -> base.Method:
  """Class-balanced batches: every class equally often, drawn with replacement.

  Examples come in rounds of C, one of each class, so a batch whose size is a
  multiple of C is exactly balanced. Before `from_epoch` an epoch visits every
  example once (deferred resampling, DRS).

  Args:
    from_epoch: the first epoch of balanced batches, counted from 0.

  Raises:
    InputError: `from_epoch` is negative.
  """
  changed_loss.check_epoch("resampling", from_epoch)

  def sample(state, problem, train, rng):
    if from_epoch and state < from_epoch:
      return base.permutation(state, problem, train, rng)
    labels = train["label"]
    classes = np.unique(labels)
    rounds = len(labels) // len(classes)
    columns = [rng.choice(np.flatnonzero(labels == c), size=rounds) for c in classes]
    return rng.permuted(np.stack(columns, axis=1), axis=1).ravel()

  return _deferred(uniform()._replace(sample=sample), from_epoch)


def hard_mining(variant: str = "paper") -> base.Method:
  """All minority examples and the hardest of the majority, weighted equally.

  Of the global batch, keeps every example outside the largest training class
  and the k examples of that class with the highest losses, k = the number of
  the others in the batch, at least 1. Weights are 1 / (number kept).

  Args:
    variant: "paper" ranks by each example's loss. "official_code" repeats the
      released code's accident: it ranks by a loss already averaged over the
      batch, so ties keep the first k, which is random under-sampling.
  """
  _check_variant("hard_mining", variant)

  def gradients(state, problem, inputs):
    majority_class = jnp.argmax(jnp.asarray(problem.class_counts))

    def weights(losses):
      losses = base.gather(losses, problem.axis_name)
      labels = base.gather(inputs.batch["label"], problem.axis_name)
      kept = hardest(
        losses if variant == "paper" else jnp.zeros_like(losses),
        labels == majority_class,
      )
      uniform_weights = normalization.sum_to_one(kept.astype(losses.dtype))
      return base.local_slice(uniform_weights, problem.axis_name)

    return weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients)


def hardest(losses: base.Array, majority: base.Array) -> base.Array:
  """Which examples hard mining keeps, bool [B].

  Args:
    losses: [B].
    majority: whether each example is of the majority class, bool [B].

  >>> import jax.numpy as jnp
  >>> print(hardest(jnp.array([1., 3., 2., 0.]), jnp.array([True, True, True, False])))
  [False  True False  True]
  """
  base.check_vector("losses", losses)
  num_kept = jnp.maximum(jnp.sum(~majority), 1)
  # A NaN loss is the hardest, so that it is kept and noticed.
  hardness = jnp.where(jnp.isnan(losses), jnp.inf, losses)
  ranked = base.unsharded(jnp.where(majority, -hardness, jnp.inf))
  order = jnp.argsort(ranked, stable=True)
  rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
  return ~majority | base.sharded_like(rank < num_kept, majority)


def clean_only() -> base.Method:
  """The mean loss of the clean set alone; the training batch gets weight 0."""

  def gradients(state, problem, inputs):
    losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
    losses, _ = losses_fn(inputs.params, inputs.batch)
    on_clean = inputs._replace(batch=inputs.meta_batch)
    clean, state = uniform().gradients(state, problem, on_clean)
    # Its value is of the clean batch: with these weights the step would watch 0.
    shown = {"weights": jnp.zeros_like(losses), "losses": losses}
    return clean._replace(value=_value(clean, problem), **shown), state

  return base.Method(gradients, needs_meta=True)


def fine_tuning(num_steps: int, method: base.Method | None = None) -> base.Method:
  """A method, then `num_steps` last steps on the clean set alone (`clean_only`).

  Args:
    num_steps: length of the second phase, at the end of the run; at least 1.
    method: the first phase; `uniform()` if None.

  Raises:
    InputError: `num_steps` is less than 1.
  """
  if num_steps < 1:
    raise base.InputError(f"fine_tuning: num_steps={num_steps} must be at least 1.")
  first = method or uniform()
  second = clean_only()

  def gradients(state, problem, inputs):
    def clean(state):
      found, _ = second.gradients((), problem, inputs)
      return _alike(found, problem), state

    def initial(state):
      found, state = first.gradients(state, problem, inputs)
      return _alike(found, problem), state

    is_last = inputs.step >= problem.num_steps - num_steps
    return jax.lax.cond(is_last, clean, initial, state)

  return first._replace(gradients=gradients, needs_meta=True)


def _alike(found, problem):
  """`found` without metrics and with all that a method may leave out."""
  has_meta_step = found.fault is not None
  return found._replace(
    metrics={},
    value=_value(found, problem),
    fault=found.fault if has_meta_step else jnp.zeros((), jnp.int32),
    zero_slope=found.zero_slope if has_meta_step else jnp.zeros((), bool),
  )


def _value(found, problem):
  """What an optimizer watches, also where a method leaves it to the step."""
  value = found.value
  if value is None:
    value = base.psum(jnp.sum(found.weights * found.losses), problem.axis_name)
  return jnp.asarray(value, jnp.float32)


def _deferred(method, from_epoch):
  """`method` whose state is the epoch, for what waits for `from_epoch`."""
  if not from_epoch:
    return method
  return method._replace(
    init=lambda key, problem, params: jnp.zeros((), jnp.int32),
    refresh=lambda state, problem, view: jnp.asarray(view.epoch, jnp.int32),
  )


def _check_variant(name, variant):
  if variant not in ("paper", "official_code"):
    raise base.InputError(
      f"{name}: variant={variant!r}; choose 'paper' or 'official_code'."
    )
