"""LDAM-DRW: larger margins for rarer classes, class balancing late in training.

The logits of the classifier are cosines z in [-1, 1] (pass `cosine=True` to networks
of this library that have this attribute, see `models.split.Cosine`). Evaluation
predicts the class with the largest cosine, without margins.

References:
  Cao, Wei, Gaidon, Arechiga, Ma, "Learning Imbalanced Datasets with
  Label-Distribution-Aware Margin Loss", NeurIPS 2019, and its released code.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import class_balance
from l2rw_jax import losses
from l2rw_jax import weighted_update

BALANCES = ("reweight", "resample", "none")


def margins(class_counts: base.Array, max_margin: float = 0.5) -> base.Array:
  """Margin of each class, proportional to n^(-1/4) for a class of n examples.

  The rarest class that has examples gets `max_margin`; a class without examples gets 0.

  Args:
    class_counts: [C], non-negative.
    max_margin: at least 0, in units of a cosine, may be traced; 0.3 for iNaturalist in
      the paper.

  Returns:
    Margins [C].

  Raises:
    InputError: `max_margin` is negative or infinite, or `class_counts` are invalid, see
      `class_balance.inverse_frequency`.

  >>> import jax.numpy as jnp
  >>> print(margins(jnp.array([16, 1, 0])))
  [0.25 0.5  0.  ]
  """
  _check_max_margin(max_margin)
  counts = class_balance.as_counts(class_counts)
  present = counts != 0
  unscaled = jnp.where(present, jnp.where(present, counts, 1) ** -0.25, 0)
  max_margin = base.setting(max_margin, unscaled.dtype)
  return unscaled * max_margin / jnp.where(present.any(), unscaled.max(initial=0), 1)


def ldam(
  cosines: base.Array,
  labels: base.Array,
  class_margins: base.Array,
  scale: float = 30.0,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """Cross-entropy of scaled cosines, after subtracting the margin of the label.

  Args:
    cosines: z [B, C], C at least 2.
    labels: integer class of each example, [B].
    class_margins: [C], see `margins`.
    scale: multiplies the logits after the margin is subtracted, positive; may be
      traced. The paper's formula has no scale; its released code uses 30.
    where: which examples count, bool [B]; see `losses`.

  Returns:
    Losses [B], in nats; NaN for a label that is not a class.

  Raises:
    InputError: `scale` is infinite or not positive, or the shapes or types do not
      match.
  """
  _check_scale(scale)
  is_label, wide, class_margins = _checked(cosines, labels, class_margins, where)
  lowered = wide - jnp.where(is_label, class_margins, 0)
  scale = base.setting(scale, lowered.dtype)
  values = losses.softmax_cross_entropy(scale * lowered, labels, where=where)
  return values.astype(cosines.dtype)


def ldam_hinge(
  cosines: base.Array,
  labels: base.Array,
  class_margins: base.Array,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """max(max_{j != y} z_j - z_y + margin_y, 0): LDAM-HG of the paper.

  The arguments, the result and the errors are those of `ldam`, except that there is no
  scale, and that losses are in units of a cosine.
  """
  is_label, wide, class_margins = _checked(cosines, labels, class_margins, where)
  scale = losses.label_scale(is_label, where).astype(wide.dtype)
  if where is not None:
    wide = jnp.where(jnp.asarray(where)[:, None], wide, 0)
  lowered = jnp.sum(jnp.where(is_label, wide - class_margins, 0), axis=1)
  largest = jnp.max(jnp.where(is_label, -jnp.inf, wide), axis=1)
  return (jax.nn.relu(largest - lowered) * scale).astype(cosines.dtype)


def loss(
  max_margin: float = 0.5, scale: float = 30.0, *, hinge: bool = False
) -> changed_loss.Loss:
  """LDAM as the loss of another method, by `changed_loss.changed_loss(method, loss())`.

  The docstring of `changed_loss` lists the methods on which it has no effect. The
  caller must make sure that the logits are cosines; only `ldam_drw` checks this.

  Args:
    max_margin: see `margins`.
    scale: see `ldam`; not used by the hinge.
    hinge: whether to use `ldam_hinge` instead of `ldam`.

  Returns:
    `(outputs, batch, class_counts) -> [B]`, which raises InputError if the number of
    counts is not the number of classes of the network.

  Raises:
    InputError: a setting is out of range.
  """
  _check_max_margin(max_margin)
  _check_scale(scale)

  def losses_fn(outputs, batch, class_counts):
    cosines = losses.logits_of(outputs)
    class_balance.check_counts(class_counts, cosines.shape[-1])
    class_margins = margins(class_counts, max_margin)
    if hinge:
      return ldam_hinge(cosines, batch["label"], class_margins)
    return ldam(cosines, batch["label"], class_margins, scale)

  return losses_fn


def ldam_drw(
  max_margin: float = 0.5,
  scale: float = 30.0,
  beta: float = 0.9999,
  from_epoch: int | None = None,
  *,
  hinge: bool = False,
  balance: str = "reweight",
) -> base.Method:
  """LDAM with class balancing from some epoch on (LDAM-DRW, LDAM-DRS).

  `Gradients.losses` are LDAM losses, and `Gradients.weights` sum to 1 over the global
  batch. If the network has a head, `refresh` checks before epoch 0 that the logits are
  cosines. The paper trains for 200 epochs of SGD with momentum. From epoch 160 on, it
  balances the classes and divides the learning rate by 100.

  Args:
    max_margin: see `margins`.
    scale: see `ldam`.
    beta: beta of `class_balance.effective_number`, for "reweight". The paper states
      that inverse frequency (beta -> 1) performs equally well.
    from_epoch: the first epoch of class balancing, counted from 0; 160 of 200 in the
      paper. Required unless `balance` is "none".
    hinge: whether to use `ldam_hinge` instead of `ldam`.
    balance: "reweight" the losses (`class_balance.deferred_example_weights`),
      "resample" the examples (`class_balance.balanced_order`; in the released code,
      this option does not affect the data loader), or "none" for LDAM throughout.

  Returns:
    A `base.Method` whose state is the epoch, int32 scalar.

  Raises:
    InputError: a setting is out of range, or `from_epoch` is missing or not used; in
      training, the logits are not cosines.
  """
  if balance not in BALANCES:
    raise base.InputError(
      f"ldam_drw: balance={balance!r}; choose one of {', '.join(BALANCES)}."
    )
  if (from_epoch is None) != (balance == "none"):
    raise base.InputError(
      f"ldam_drw: from_epoch={from_epoch} does not fit balance={balance!r}: give the"
      " first epoch of balanced classes, or leave it out with balance='none'."
    )
  first_epoch = base.check_integer("ldam_drw: from_epoch", from_epoch or 0, 0)
  if balance == "reweight":
    class_balance.check_beta(beta)
  ldam_loss = loss(max_margin, scale, hinge=hinge)

  def gradients(state, problem, inputs):
    class_counts = problem.class_counts
    problem = dataclasses.replace(
      problem, loss=lambda outputs, batch: ldam_loss(outputs, batch, class_counts)
    )
    if balance != "reweight":
      return weighted_update.uniform_gradients(problem, inputs), state
    weights = class_balance.deferred_example_weights(
      problem.class_counts,
      inputs.batch["label"],
      beta,
      state,
      first_epoch,
      problem.axis_name,
    )
    return weighted_update.weighted_gradients(problem, inputs, lambda _: weights), state

  def refresh(state, problem, view):
    del state
    if view.epoch == 0:
      _check_cosines(problem, view.params)
    return jnp.asarray(view.epoch, jnp.int32)

  def sample(state, problem, train, rng):
    if state < first_epoch:
      return base.permutation(state, problem, train, rng)
    return class_balance.balanced_order(train["label"], rng)

  return base.Method(
    gradients,
    init=lambda key, problem, params: jnp.zeros((), jnp.int32),
    refresh=refresh,
    sample=sample if balance == "resample" else base.permutation,
  )


def _check_cosines(problem, params):
  """Raises InputError unless logits are at most 1 and ignore the scale of features."""
  if problem.head is None:
    return
  features = 1e4 * jax.random.normal(jax.random.key(0), (8, problem.num_features))
  with base.implicit_promotion():  # The parameters may have another type.
    logits, doubled = (
      losses.logits_of(problem.head(params, x)) for x in (features, 2 * features)
    )
  largest, change = jnp.max(jnp.abs(logits)), jnp.max(jnp.abs(doubled - logits))
  # Comparisons with NaN are false, so a NaN is refused, too.
  if not (0 < largest <= 1.01 and change <= 0.01 * largest):
    raise base.InputError(
      "ldam_drw: the network's logits are not cosines; build it with cosine=True"
      " (a last layer like models.split.Cosine)."
    )


def _check_max_margin(max_margin):
  max_margin = base.setting(max_margin)
  if not base.is_traced(max_margin) and not 0 <= max_margin < math.inf:
    raise base.InputError(
      f"ldam: max_margin={max_margin} must be at least 0, and finite."
    )


def _check_scale(scale):
  scale = base.setting(scale)
  if not base.is_traced(scale) and not 0 < scale < math.inf:
    raise base.InputError(f"ldam: scale={scale} must be more than 0, and finite.")


def _checked(cosines, labels, class_margins, where):
  """Checks the shapes; returns `label_mask` [B, C], cosines [B, C], margins [1, C].

  The cosines and margins have a type in which their difference is accurate.
  """
  losses.check_logits(cosines, labels, where)
  num_classes = cosines.shape[1]
  if num_classes < 2 or np.shape(class_margins) != (num_classes,):
    raise base.InputError(
      "ldam: cosines must be [B, C] with C at least 2, and margins [C]; got shapes"
      f" {cosines.shape} and {np.shape(class_margins)}."
    )
  is_label = losses.label_mask(labels, num_classes)
  dtype = base.accumulator_dtype(cosines.dtype)
  return is_label, cosines.astype(dtype), jnp.asarray(class_margins, dtype)[None, :]
