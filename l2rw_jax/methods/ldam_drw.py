"""LDAM-DRW: larger margins for rarer classes, balanced only late in training.

The classifier's logits are cosines z in [-1, 1] (`cosine=True` of this library's
networks, `models.split.Cosine`); evaluation takes the largest, without margins.

References:
  Cao, Wei, Gaidon, Arechiga, Ma, "Learning Imbalanced Datasets with
  Label-Distribution-Aware Margin Loss", NeurIPS 2019, and its released code.
"""

import math

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.methods import changed_loss

BALANCES = ("reweight", "resample", "none")


def margins(class_counts: base.Array, max_margin: float = 0.5) -> base.Array:
  """Margin of each class, in proportion to n^(-1/4), n its number of examples.

  The rarest class that has examples gets `max_margin`, a class without any 0.

  Args:
    class_counts: [C], non-negative.
    max_margin: at least 0, in units of a cosine; 0.3 for iNaturalist in the paper.

  Returns:
    Margins [C].

  Raises:
    InputError: `max_margin` is negative, or `class_counts` are no counts, see
      `class_balance.inverse_frequency`.

  >>> import jax.numpy as jnp
  >>> print(margins(jnp.array([16, 1, 0])))
  [0.25 0.5  0.  ]
  """
  _check_max_margin(max_margin)
  counts = class_balance.as_counts(class_counts)
  present = counts != 0
  unscaled = jnp.where(present, jnp.where(present, counts, 1) ** -0.25, 0)
  return unscaled * max_margin / jnp.where(present.any(), unscaled.max(), 1)


def ldam(
  cosines: base.Array,
  labels: base.Array,
  class_margins: base.Array,
  scale: float = 30.0,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """Cross-entropy of the scaled cosines, the label's first made less by its margin.

  Args:
    cosines: z [B, C], C at least 2.
    labels: integer class of each example, [B].
    class_margins: [C], as of `margins`.
    scale: of z after the margin is taken off, positive. The paper's formula has
      none; its released code has 30.
    where: which examples count, bool [B]; see `losses`.

  Returns:
    Losses [B], in nats; NaN for a label that names no class.

  Raises:
    InputError: `scale` is not positive, or the shapes do not fit.
  """
  _check_scale(scale)
  is_label, class_margins = _checked(cosines, labels, class_margins, where)
  lowered = cosines - jnp.where(is_label, class_margins, 0)
  return losses.softmax_cross_entropy(scale * lowered, labels, where=where)


def ldam_hinge(
  cosines: base.Array,
  labels: base.Array,
  class_margins: base.Array,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """max(max_{j != y} z_j - z_y + margin_y, 0): LDAM-HG of the paper.

  Arguments, result and errors as of `ldam`, in units of a cosine.
  """
  is_label, class_margins = _checked(cosines, labels, class_margins, where)
  scale = losses.label_scale(is_label, where).astype(cosines.dtype)
  if where is not None:
    cosines = jnp.where(where[:, None], cosines, 0)
  lowered = jnp.sum(jnp.where(is_label, cosines - class_margins, 0), axis=1)
  largest = jnp.max(jnp.where(is_label, -jnp.inf, cosines), axis=1)
  return jax.nn.relu(largest - lowered) * scale


def loss(
  max_margin: float = 0.5, scale: float = 30.0, *, hinge: bool = False
) -> changed_loss.Loss:
  """LDAM as the loss of any other method: `changed_loss(method, loss())`.

  Only `ldam_drw` checks that the logits are cosines; here that is up to the caller.

  Args:
    max_margin: see `margins`.
    scale: see `ldam`; the hinge has none.
    hinge: `ldam_hinge` in place of `ldam`.

  Returns:
    `(outputs, batch, class_counts) -> [B]`, which raises InputError where the
    counts are not those of the network's classes.

  Raises:
    InputError: a setting out of range.
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
  """LDAM, and from some epoch on classes that count equally (LDAM-DRW, LDAM-DRS).

  `Gradients.losses` are LDAM's, `Gradients.weights` add up to 1 over the global
  batch. Where the network has a head, `refresh` tells by it whether the logits are
  cosines. The paper's schedule: 200 epochs of SGD with momentum, classes balanced
  from 160 on, where the learning rate falls by 100.

  Args:
    max_margin: see `margins`.
    scale: see `ldam`.
    beta: of `class_balance.effective_number`, for "reweight". The paper says that
      inverse frequency (beta -> 1) does as well.
    from_epoch: the first epoch, counted from 0, of balanced classes; 160 of 200 in
      the paper. Needed but for "none".
    hinge: `ldam_hinge` in place of `ldam`.
    balance: "reweight" the losses (`baselines.class_balanced`), "resample" the
      examples (`baselines.resampling`; the option of the released code never
      reaches its data loader), or "none": LDAM throughout.

  Raises:
    InputError: a setting out of range, or `from_epoch` left out or not used.
  """
  if balance not in BALANCES:
    raise base.InputError(
      f"ldam_drw: balance={balance!r}; choose one of {', '.join(BALANCES)}."
    )
  if (from_epoch is None) != (balance == "none"):
    raise base.InputError(
      f"ldam_drw: from_epoch={from_epoch} with balance={balance!r}; give the first"
      " epoch of balanced classes, or with 'none' leave it out."
    )
  if from_epoch is None:
    method = baselines.uniform()
  elif balance == "resample":
    method = baselines.resampling(from_epoch)
  else:
    method = baselines.class_balanced(beta, from_epoch)
  method = changed_loss.changed_loss(method, loss(max_margin, scale, hinge=hinge))

  def refresh(state, problem, view):
    if view.epoch == 0:
      _check_cosines(problem, view.params)
    return method.refresh(state, problem, view)

  return method._replace(refresh=refresh)


def _check_cosines(problem, params):
  """Features as long as you like have cosines of at most 1."""
  if problem.head is None:
    return
  features = 1e4 * jax.random.normal(jax.random.key(0), (8, problem.num_features))
  largest = jnp.max(jnp.abs(losses.logits_of(problem.head(params, features))))
  if largest > 1.01:
    raise base.InputError(
      "ldam_drw: the network's logits are not cosines; build it with cosine=True"
      " (a last layer like models.split.Cosine)."
    )


def _check_max_margin(max_margin):
  if not 0 <= max_margin < math.inf:
    raise base.InputError(f"ldam: max_margin={max_margin} must be at least 0.")


def _check_scale(scale):
  if not 0 < scale < math.inf:
    raise base.InputError(f"ldam: scale={scale} must be more than 0.")


def _checked(cosines, labels, class_margins, where):
  """Where each row has its label's column, bool [B, C], and margins [1, C]."""
  losses.check_logits(cosines, labels, where)
  num_classes = cosines.shape[1]
  if num_classes < 2 or jnp.shape(class_margins) != (num_classes,):
    raise base.InputError(
      "ldam: cosines must be [B, C] with C at least 2, and margins [C]; got shapes"
      f" {cosines.shape} and {jnp.shape(class_margins)}."
    )
  is_label = losses.label_mask(labels, num_classes)
  return is_label, jnp.asarray(class_margins).astype(cosines.dtype)[None, :]
