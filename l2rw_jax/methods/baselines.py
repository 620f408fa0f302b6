"""Baselines from published papers: simple weights, sampling schemes and losses.

Each factory returns a `base.Method`. Unless its docstring says otherwise, the loss is
a weighted sum whose weights sum to 1 over the global batch. The methods named after a
loss (`focal`, `bootstrapping`, ...) minimize the mean of that loss; to combine another
loss with other weights use `changed_loss.changed_loss`.

References:
  Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep
  Learning", ICML 2018, section 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import class_balance
from l2rw_jax import losses as losses_lib
from l2rw_jax import normalization
from l2rw_jax import weighted_update
from l2rw_jax.linearization import batch_axes
from l2rw_jax.linearization import control_flow


def uniform() -> base.Method:
  """Minimizes the mean loss: every example has weight 1 / B."""

  def gradients(state, problem, inputs):
    return weighted_update.uniform_gradients(problem, inputs), state

  return base.Method(gradients)


def random() -> base.Method:
  """Rectified Gaussian weights max(z, 0) / sum, z ~ N(0, 1), drawn at every step."""

  def gradients(state, problem, inputs):
    def weights(losses):
      size = base.global_size(losses.shape[0], problem.axis_name)
      noise = jax.random.normal(inputs.key, (size,), losses.dtype)
      local_weights = base.local_slice(normalization.rectify(noise), problem.axis_name)
      return base.sharded_like(local_weights, losses)

    return weighted_update.weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients)


def class_proportion(variant: str = "paper") -> base.Method:
  """Weights inversely proportional to the number of training examples of the class.

  Args:
    variant: "paper" computes a weighted average, w_i = N / (C n_y) / B, for the C
      classes that have examples; these weights sum to 1 on average over batches.
      "official_code" uses the formula of the released code, w_i = 1 - n_y / N, which is
      not divided by B; with two classes at 90% and 10% and B = 100, its effective step
      is 18 times larger.

  Raises:
    InputError: the variant is unknown.
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
    return weighted_update.weighted_gradients(problem, inputs, lambda _: weights), state

  return base.Method(gradients)


def class_balanced(beta: float = 0.9999, from_epoch: int = 0) -> base.Method:
  """Class weights by the effective number of examples, from some epoch on.

  The weights sum to 1 over the global batch, like PyTorch's weighted mean; before
  `from_epoch` they are uniform (deferred re-weighting, DRW; with plain cross-entropy
  this is ERM-DRW). beta = 0 gives uniform weights, beta -> 1 inverse frequency.

  Args:
    beta: beta of `class_balance.effective_number`, in [0, 1).
    from_epoch: the first epoch of class-balanced weights, counted from 0.

  Raises:
    InputError: a setting is out of range.

  References:
    Cui et al., CVPR 2019; Cao et al., NeurIPS 2019, Algorithm 1.
  """
  class_balance.check_beta(beta)
  from_epoch = base.check_integer("class_balanced: from_epoch", from_epoch, 0)

  def gradients(state, problem, inputs):
    class_balance.check_counts(problem.class_counts, problem.num_classes)
    weights = class_balance.deferred_example_weights(
      problem.class_counts,
      inputs.batch["label"],
      beta,
      state if from_epoch else 0,
      from_epoch,
      problem.axis_name,
    )
    return weighted_update.weighted_gradients(problem, inputs, lambda _: weights), state

  return _with_epoch_state(base.Method(gradients), from_epoch)


def resampling(from_epoch: int = 0) -> base.Method:
  """The mean loss of class-balanced batches, see `class_balance.balanced_order`.

  Before `from_epoch` an epoch visits every example once (deferred re-sampling, DRS).

  Args:
    from_epoch: the first epoch of class-balanced batches, counted from 0.

  Raises:
    InputError: `from_epoch` is negative or not an integer.
  """
  from_epoch = base.check_integer("resampling: from_epoch", from_epoch, 0)

  def sample(state, problem, train, rng):
    if from_epoch and state < from_epoch:
      return base.permutation(state, problem, train, rng)
    return class_balance.balanced_order(train["label"], rng)

  return _with_epoch_state(uniform()._replace(sample=sample), from_epoch)


class Retraining(NamedTuple):
  """State of `classifier_retraining`.

  Attributes:
    epoch: the current epoch, counted from 0; int32 scalar.
    restarts: whether the next step sets the last layer to `initial`; bool scalar.
    initial: parameters of the last layer at the start of the run.
  """

  epoch: base.Array
  restarts: base.Array
  initial: list[base.Array]


def classifier_retraining(from_epoch: int, *, restart: bool = True) -> base.Method:
  """Trains a network, then its last layer alone on class-balanced batches (cRT).

  Until `from_epoch` this is `uniform`. With `restart`, the first step of epoch
  `from_epoch` only resets the last layer to its parameters at the start of the run. All
  later steps train the last layer on the mean loss of batches from
  `class_balance.balanced_order`. The parameters of the features do not change, even
  under momentum and weight decay (`Gradients.fixed`). A step costs as much as in plain
  training.

  BatchNorm stays in training mode, as in the released code: it uses the statistics of
  the balanced batches, and its running statistics follow them. Unlike in the paper,
  the last layer does not start from new random numbers, and the second phase continues
  the optimizer and the learning rate schedule of the first. The paper starts a new
  schedule, of 10 epochs on ImageNet-LT. If the learning rate has fallen by the start of
  the second phase, a last layer that is reset may need more epochs than are left.

  Args:
    from_epoch: the first epoch of the second phase, counted from 0.
    restart: whether the last layer is reset; False continues to train it.

  Returns:
    A `base.Method` whose state is a `Retraining`.

  Raises:
    InputError: `from_epoch` is negative or not an integer; in training, the network
      has no separate last layer (`base.Problem.head`).

  References:
    Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis, "Decoupling Representation and
    Classifier for Long-Tailed Recognition", ICLR 2020 (cRT), and its released
    code.
  """
  from_epoch = base.check_integer("classifier_retraining: from_epoch", from_epoch, 0)

  def init(key, problem, params):
    del key
    leaves = jax.tree.leaves(params)
    is_head = _head_leaves(problem, params)
    # These are copies, because a training loop may donate the parameters.
    initial = [jnp.array(x) for x, keep in zip(leaves, is_head, strict=True) if keep]
    return Retraining(jnp.zeros((), jnp.int32), jnp.zeros((), bool), initial)

  def gradients(state, problem, inputs):
    result = weighted_update.uniform_gradients(problem, inputs)
    is_head = _head_leaves(problem, inputs.params)
    is_second = state.epoch >= from_epoch
    leaves, treedef = jax.tree.flatten(inputs.params)
    initial = iter(state.initial)
    values = [
      next(initial) if head else x for x, head in zip(leaves, is_head, strict=True)
    ]
    is_fixed = [state.restarts if head else is_second for head in is_head]
    grads = [
      x if head else jnp.where(is_second, jnp.zeros_like(x), x)
      for x, head in zip(jax.tree.leaves(result.grads), is_head, strict=True)
    ]
    fixed = tuple(jax.tree.unflatten(treedef, x) for x in (is_fixed, values))
    result = result._replace(grads=jax.tree.unflatten(treedef, grads), fixed=fixed)
    return result, state._replace(restarts=jnp.zeros_like(state.restarts))

  def refresh(state, problem, view):
    del problem
    epoch = jnp.asarray(view.epoch, jnp.int32)
    return state._replace(epoch=epoch, restarts=(epoch == from_epoch) & restart)

  def sample(state, problem, train, rng):
    if state.epoch < from_epoch:
      return base.permutation(state, problem, train, rng)
    return class_balance.balanced_order(train["label"], rng)

  return base.Method(gradients, init=init, refresh=refresh, sample=sample)


def _head_leaves(problem, params):
  """For each leaf of the parameters, in order, whether the last layer reads it."""
  if problem.head is None or problem.num_features is None:
    raise base.InputError(
      "classifier_retraining trains the last layer alone: it needs a network with"
      " the methods features and head and the attribute num_features, like those of"
      " l2rw_jax.models; choose another method or split the network."
    )
  features = jax.ShapeDtypeStruct((1, problem.num_features), jnp.result_type(float))
  # The features of a network may have another type, which does not matter here.
  with base.implicit_promotion():
    closed = jax.make_jaxpr(problem.head)(params, features)
  return _is_read(closed.jaxpr)[:-1]


def _is_read(jaxpr):
  """For each input of a jaxpr, whether it is read and not merely passed to a call."""
  read = {id(v) for v in jaxpr.outvars}
  for eqn in jaxpr.eqns:
    call = batch_axes.inlined(eqn)
    if call is None:
      read |= {id(v) for v in eqn.invars}
    else:
      flags = _is_read(call[0])
      read |= {id(v) for v, flag in zip(eqn.invars, flags, strict=True) if flag}
  return [id(v) in read for v in jaxpr.invars]


def hard_mining(variant: str = "paper") -> base.Method:
  """Equal weights for the minority and for the hardest majority examples.

  The majority is the largest class of the training set. In the global batch, the method
  keeps all examples of other classes, and the k examples of the majority that have the
  highest losses. k is the number of examples of other classes in the batch, but at
  least 1. Weights are 1 / (number of kept examples).

  Args:
    variant: "paper" ranks by each example's loss. "official_code" reproduces a mistake
      of the released code, which ranks by a loss that is already averaged over the
      batch. All examples are then tied, and the first k are kept, which is random
      under-sampling.

  Raises:
    InputError: the variant is unknown.
  """
  _check_variant("hard_mining", variant)

  def gradients(state, problem, inputs):
    majority_class = jnp.argmax(jnp.asarray(problem.class_counts))

    def weights(losses):
      losses = base.gather(losses, problem.axis_name)
      labels = base.gather(inputs.batch["label"], problem.axis_name)
      labels = base.wide_integers(labels, problem.num_classes)
      kept = hardest(
        losses if variant == "paper" else jnp.zeros_like(losses),
        labels == majority_class.astype(labels.dtype),
      )
      uniform_weights = normalization.sum_to_one(kept.astype(losses.dtype))
      return base.local_slice(uniform_weights, problem.axis_name)

    return weighted_update.weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients)


def hardest(losses: base.Array, majority: base.Array) -> base.Array:
  """Which examples hard mining keeps, bool [B].

  Args:
    losses: [B].
    majority: whether each example is in the majority class, bool [B].

  Raises:
    InputError: `losses` does not have shape [B].

  >>> import jax.numpy as jnp
  >>> print(hardest(jnp.array([1., 3., 2., 0.]), jnp.array([True, True, True, False])))
  [False  True False  True]
  """
  base.check_vector("losses", losses)
  majority = majority.astype(bool)
  num_kept = jnp.maximum(jnp.sum(~majority), 1)
  # A NaN loss ranks as the hardest, so that it is kept and noticed.
  hardness = jnp.where(jnp.isnan(losses), jnp.inf, losses)
  ranked = base.unsharded(jnp.where(majority, -hardness, jnp.inf))
  order = jnp.argsort(ranked, stable=True)
  rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
  return ~majority | base.sharded_like(rank < num_kept, majority)


def clean_only() -> base.Method:
  """Minimizes the mean loss of the meta set alone; training examples get weight 0."""

  def gradients(state, problem, inputs):
    losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
    losses, _ = losses_fn(inputs.params, inputs.batch)
    clean = weighted_update.uniform_gradients(
      problem, inputs._replace(batch=inputs.meta_batch)
    )
    # The value is the meta batch's loss: with weights of 0, the default would be 0.
    return clean._replace(
      value=_value(clean, problem), weights=jnp.zeros_like(losses), losses=losses
    ), state

  return base.Method(gradients, needs_meta=True)


def fine_tuning(num_steps: int, method: base.Method | None = None) -> base.Method:
  """Trains with a method, and in the last `num_steps` steps on the meta set alone.

  Args:
    num_steps: number of steps of the second phase (`clean_only`), at least 1.
    method: the method of the first phase; None is `uniform()`.

  Raises:
    InputError: `num_steps` is not an integer of at least 1; in training, the first
      phase is `classifier_retraining`.
  """
  num_steps = base.check_integer("fine_tuning: num_steps", num_steps)
  first = method or uniform()
  second = clean_only()

  def gradients(state, problem, inputs):
    def clean(state):
      gradients, _ = second.gradients((), problem, inputs)
      return _same_structure(gradients, problem), state

    def initial(state):
      gradients, state = first.gradients(state, problem, inputs)
      return _same_structure(gradients, problem), state

    is_last = inputs.step >= problem.num_steps - num_steps
    return control_flow.cond(is_last, clean, initial, state)

  return first._replace(gradients=gradients, needs_meta=True)


def _same_structure(gradients, problem):
  """`gradients` without metrics and scores, and with `value`, `fault`, `zero_slope`.

  Both branches of `jax.lax.cond` must return the same structure.
  """
  if gradients.fixed is not None:
    raise base.InputError(
      "fine_tuning trains all parameters in its last steps, so the method of the first"
      " phase must not fix some of them, as classifier_retraining does."
    )
  has_meta_step = gradients.fault is not None
  dtype = base.accumulator_dtype(gradients.losses.dtype)
  return gradients._replace(
    losses=gradients.losses.astype(dtype),
    weights=gradients.weights.astype(dtype),
    metrics={},
    scores=None,
    value=_value(gradients, problem),
    fault=gradients.fault if has_meta_step else jnp.zeros((), jnp.int32),
    zero_slope=gradients.zero_slope if has_meta_step else jnp.zeros((), bool),
  )


def _value(gradients, problem):
  """`Gradients.value`, or its default, the weighted loss of the global batch."""
  value = gradients.value
  if value is None:
    dtype = base.accumulator_dtype(gradients.losses.dtype)
    terms = gradients.weights.astype(dtype) * gradients.losses.astype(dtype)
    value = base.psum(jnp.sum(terms), problem.axis_name)
  return jnp.asarray(value, jnp.float32)


def focal(gamma: float = 2.0) -> base.Method:
  """Minimizes the mean of `losses.focal`.

  Raises:
    InputError: `gamma` is negative or infinite.
  """
  return _with_loss(uniform(), functools.partial(losses_lib.focal, gamma=gamma))


def class_balanced_focal(
  gamma: float = 2.0, beta: float = 0.9999, from_epoch: int = 0
) -> base.Method:
  """`losses.focal` under the weights of `class_balanced`.

  The focal loss is used from the start; `from_epoch` applies to the weights.

  Raises:
    InputError: a setting is out of range.
  """
  focal_loss = functools.partial(losses_lib.focal, gamma=gamma)
  return _with_loss(class_balanced(beta, from_epoch), focal_loss)


def balanced_softmax() -> base.Method:
  """Minimizes the mean of `losses.balanced_softmax`; evaluation uses plain logits."""
  return _with_counts_loss(uniform(), losses_lib.balanced_softmax)


def logit_adjusted(tau: float = 1.0) -> base.Method:
  """Minimizes the mean of `losses.logit_adjusted`; evaluation uses plain logits.

  Raises:
    InputError: `tau` is negative or infinite.
  """
  loss_fn = functools.partial(losses_lib.logit_adjusted, tau=tau)
  return _with_counts_loss(uniform(), loss_fn)


def bootstrapping(kind: str, beta: float | None = None) -> base.Method:
  """Minimizes the mean of `losses.bootstrapping_soft` or `losses.bootstrapping_hard`.

  Args:
    kind: "soft" or "hard".
    beta: share of the given label in the target, in [0, 1]; None is the paper's
      value, 0.95 (soft) or 0.8 (hard).

  Raises:
    InputError: a setting is out of range.
  """
  kinds = {"soft": losses_lib.bootstrapping_soft, "hard": losses_lib.bootstrapping_hard}
  if kind not in kinds:
    raise base.InputError(f"bootstrapping: kind={kind!r}; choose 'soft' or 'hard'.")
  loss_fn = kinds[kind] if beta is None else functools.partial(kinds[kind], beta=beta)
  return _with_loss(uniform(), loss_fn)


def symmetric_cross_entropy(alpha: float = 0.1, beta: float = 1.0) -> base.Method:
  """Minimizes the mean of `losses.symmetric_cross_entropy`.

  Raises:
    InputError: a setting is out of range.
  """
  loss_fn = losses_lib.symmetric_cross_entropy
  return _with_loss(uniform(), functools.partial(loss_fn, alpha=alpha, beta=beta))


def generalized_cross_entropy(
  q: float = 0.7, threshold: float | None = None
) -> base.Method:
  """Minimizes the mean of `losses.generalized_cross_entropy`.

  Args:
    q: in (0, 1]; near 0 this is the cross-entropy, and at 1 it is 1 - p_y.
    threshold: probability below which the loss is truncated; None does not truncate.

  Raises:
    InputError: a setting is out of range.
  """
  loss_fn = losses_lib.generalized_cross_entropy
  return _with_loss(uniform(), functools.partial(loss_fn, q=q, threshold=threshold))


def _with_loss(method, loss_fn):
  """`method` with the loss `(logits, labels) -> [B]`; raises for invalid settings."""
  return _with_counts_loss(
    method, lambda logits, labels, class_counts: loss_fn(logits, labels)
  )


def _with_counts_loss(method, loss_fn):
  """Like `_with_loss`, for `(logits, labels, class_counts) -> [B]`."""
  label = jax.ShapeDtypeStruct((1,), jnp.int32)
  counts = jax.ShapeDtypeStruct((2,), jnp.int32)
  jax.eval_shape(loss_fn, jax.ShapeDtypeStruct((1, 2), jnp.float32), label, counts)

  def loss(outputs, batch, class_counts):
    return loss_fn(losses_lib.logits_of(outputs), batch["label"], class_counts)

  return changed_loss.changed_loss(method, loss)


def _with_epoch_state(method, from_epoch):
  """`method` with the epoch as its state, unless `from_epoch` is 0."""
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
