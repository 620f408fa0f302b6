r"""The S-model: a transition layer learned with the network (Goldberger et al., 2017).

The network's softmax(z) predicts the true class. A layer T = softmax(A), computed by
rows, converts it to a prediction of the given label: T_ij is the probability that an
example of class i is given the label j. The network and the layer both minimize

    -log (softmax(z) @ softmax(A))[label]

and evaluation uses z. The loss does not determine the order of the true classes,
because it stays the same if the entries of z and the rows of T are permuted in the same
way. T therefore starts near the identity, or at the confusion matrix of a network that
was trained without the layer. This is the simple model of the paper, in which T is the
same for all examples.

Differences from the released program: the released program adds noise below 0.01 to the
smoothed identity's A, and can add a multiple of the plain cross-entropy to the loss.
This module does neither. To the shares in the confusion matrix, the released program
adds 1e-8; here, one example is spread evenly over each row of counts.

References:
  Goldberger, Ben-Reuven, "Training Deep Neural-Networks Using a Noise Adaptation
  Layer", ICLR 2017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import hypergradient
from l2rw_jax import label_transition
from l2rw_jax import losses

INITIALS = ("identity", "confusion")


def smoothed_identity(num_classes: int, smoothing: float = 0.46) -> base.Array:
  """A matrix [C, C] with 1 - smoothing on the diagonal; rows sum to 1.

  The other entries of a row are equal. The default is that of the released program,
  which was written for data in which about this share of the labels is wrong.

  Raises:
    InputError: `num_classes` is not a positive integer, or `smoothing` is not between
      0 and 1.
  """
  num_classes = base.check_integer("num_classes", num_classes)
  _check_smoothing(smoothing)
  identity = jnp.eye(num_classes)
  off_diagonal = smoothing * (1 - identity) / max(num_classes - 1, 1)
  return (1 - smoothing) * identity + off_diagonal


def s_model_loss(
  logits: base.Array,
  labels: base.Array,
  transition_logits: base.Array,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """-log (softmax(z) @ softmax(A))[label], softmax by rows, in nats.

  For any finite A, the loss and its gradients with respect to z and A are finite.

  Args:
    logits: z [B, C] or [B, 1].
    labels: given (possibly wrong) class of each example, [B].
    transition_logits: A [C, C]; C = 2 for a single logit.
    where: which examples count, bool [B]; see `losses`.

  Returns:
    Losses [B]; NaN for a label that is not a class.

  Raises:
    InputError: the shapes or types do not match.
  """
  log_p, is_label, scale = losses.label_rows(logits, labels, where)
  size = log_p.shape[1]
  if jnp.shape(transition_logits) != (size, size):
    raise base.InputError(
      f"s_model_loss: predictions of {size} classes need transition logits"
      f" ({size}, {size}); got {jnp.shape(transition_logits)}."
    )
  log_t = jax.nn.log_softmax(transition_logits.astype(log_p.dtype), axis=1)
  loss = losses.transition_loss(log_p, is_label, log_t)
  return (loss * scale).astype(logits.dtype)


class State(NamedTuple):
  """State of `s_model`.

  Attributes:
    logits: A, float32 [C, C].
    opt_state: state of the optimizer of A.
    is_active: whether the loss already includes the layer, bool scalar.
  """

  logits: base.Array
  opt_state: base.PyTree
  is_active: base.Array


def s_model(
  *,
  optimizer: optax.GradientTransformation | None = None,
  from_epoch: int = 0,
  initial: str = "identity",
  smoothing: float = 0.46,
) -> base.Method:
  """The S-model: a transition layer learned with the network; uniform weights.

  Args:
    optimizer: optimizer of the layer's logits A; None is Adam at 1e-3, which the
      released program uses for both the network and the layer.
    from_epoch: the first epoch, counted from 0, whose loss includes the layer; before
      this epoch, the loss of the problem is minimized.
    initial: T at that epoch: "identity" is the smoothed identity, and "confusion" is
      the confusion matrix of the network's predictions on the training set
      ("S-Model+Conf" in the L2RW paper). The latter needs a trained network, so
      `from_epoch` must be at least 1.
    smoothing: smoothing of the identity, see `smoothed_identity`.

  Returns:
    A `base.Method` whose state is a `State`. Its losses are those of the given labels
    after the layer; it logs the mean of T's diagonal.

  Raises:
    InputError: `initial` is unknown, or a setting is out of range; in training,
      `optimizer` is not supported, see `hypergradient.update`.
  """
  from_epoch = base.check_integer("s_model: from_epoch", from_epoch, 0)
  if initial not in INITIALS:
    raise base.InputError(
      f"s_model: initial={initial!r}; choose 'identity' or 'confusion'."
    )
  if initial == "confusion" and from_epoch < 1:
    raise base.InputError(
      "s_model: initial='confusion' needs from_epoch of at least 1, because it uses the"
      " predictions of a trained network."
    )
  _check_smoothing(smoothing)
  layer_optimizer = optax.adam(1e-3) if optimizer is None else optimizer

  def initial_state(transition, is_active):
    # The row of a class that is never predicted has zeros in the confusion matrix.
    logits = jnp.log(jnp.maximum(transition.astype(jnp.float32), 1e-8))
    with base.implicit_promotion():
      opt_state = layer_optimizer.init(logits)
    return State(logits, opt_state, jnp.array(is_active))

  def init(key, problem, params):
    del key, params
    identity = smoothed_identity(problem.num_classes, smoothing)
    return initial_state(identity, from_epoch == 0)

  def gradients(state, problem, inputs):
    batch = inputs.batch
    size = base.global_size(batch["label"].shape[0], problem.axis_name)

    def mean_loss(outputs, logits):
      used = changed_loss.where_used(state.is_active, outputs)
      through_layer = s_model_loss(losses.logits_of(used), batch["label"], logits)
      used = changed_loss.where_used(~state.is_active, outputs)
      values = jnp.where(state.is_active, through_layer, problem.loss(used, batch))
      return values.sum() / size, values

    linearized = problem.linearize_batch_outputs(inputs)
    layer_logits = base.local(state.logits, problem.axis_name)
    (output_gradient, layer_gradient), values = jax.grad(
      mean_loss, (0, 1), has_aux=True
    )(linearized.outputs, layer_logits)
    grads, layer_gradient = base.psum(
      (linearized.vjp(output_gradient), layer_gradient), problem.axis_name
    )
    diagonal = jnp.diag(jax.nn.softmax(state.logits, axis=1)).mean()
    metrics = {"transition_diagonal": jnp.where(state.is_active, diagonal, 1)}
    weights = jnp.full_like(values, 1 / size)
    gradients = base.Gradients(grads, weights, values, linearized.aux, metrics)
    # In half precision, the sum would overflow and the mean would be rounded.
    wide = values.astype(base.accumulator_dtype(values.dtype))
    loss = base.psum(wide.sum() / size, problem.axis_name)
    return gradients, _updated(state, layer_gradient, layer_optimizer, loss)

  def refresh(state, problem, view):
    if from_epoch == 0 or view.epoch != from_epoch:
      return state
    if initial == "identity":
      return state._replace(is_active=jnp.array(True))
    confusion = label_transition.estimate_from_network("confusion", problem, view)
    return initial_state(confusion, True)

  return base.Method(gradients, init=init, refresh=refresh)


def _check_smoothing(smoothing):
  if not 0 < smoothing < 1:
    raise base.InputError(f"smoothing={smoothing} must be more than 0 and less than 1.")


def _updated(state, gradient, optimizer, loss):
  loss = loss.astype(jnp.result_type(float))
  updates, opt_state = hypergradient.update(
    optimizer, gradient, state.opt_state, state.logits, loss, "layer"
  )
  with base.implicit_promotion():
    logits = optax.apply_updates(state.logits, updates)
  new = State(logits, opt_state, state.is_active)
  # Until the layer is active, neither weight decay nor the optimizer's step count may
  # change the state.
  return jax.tree.map(lambda a, b: jnp.where(state.is_active, a, b), new, state)
