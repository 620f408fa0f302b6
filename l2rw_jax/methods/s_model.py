r"""The S-model: a transition layer learned with the network (Goldberger et al., 2017).

The network's softmax(z) is what it says of the true class; a layer T = softmax(A) by
rows, T_ij the probability that class i is given the label j, turns it into what it
says of the given label. Both learn from the one loss

    -log (softmax(z) @ softmax(A))[label]

and evaluation keeps to z. The loss alone does not tell the classes' names: T and z
could permute them together, so that T must start near the identity, or from the
confusion of a network that was trained without the layer. This is the paper's simple
model, whose T is the same for all examples.

Where the released program differs: it adds noise below 0.01 to A at the start, and
can add a share of the plain cross-entropy, which we do not.

References:
  Goldberger, Ben-Reuven, "Training Deep Neural-Networks Using a Noise Adaptation
  Layer", ICLR 2017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.methods import changed_loss
from l2rw_jax.methods import label_transition

INITIALS = ("identity", "confusion")


def smoothed_identity(num_classes: int, smoothing: float = 0.46) -> base.Array:
  """1 - smoothing on the diagonal, the rest spread evenly beside it; [C, C].

  The default is that of the S-model's released program, written for labels of which
  about so many are wrong.

  Raises:
    InputError: `smoothing` is not between 0 and 1.
  """
  _check_smoothing(smoothing)
  own = jnp.eye(num_classes)
  return (1 - smoothing) * own + smoothing * (1 - own) / max(num_classes - 1, 1)


def s_model_loss(
  logits: base.Array,
  labels: base.Array,
  transition_logits: base.Array,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """-log (softmax(z) @ softmax(A))[label], softmax by rows, in nats.

  Finite, with finite gradients in both, wherever A is.

  Args:
    logits: z [B, C] or [B, 1].
    labels: given, possibly wrong, class of each example, [B].
    transition_logits: A [C, C]; C = 2 for a single logit.
    where: which examples count, bool [B]; see `losses`.

  Returns:
    Losses [B]; NaN for a label that names no class.

  Raises:
    InputError: the shapes do not fit.
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
  """What `s_model` carries.

  Attributes:
    logits: A, float32 [C, C].
    opt_state: of A's optimizer.
    is_on: whether the layer is in the loss yet, bool scalar.
  """

  logits: base.Array
  opt_state: base.PyTree
  is_on: base.Array


def s_model(
  *,
  optimizer: optax.GradientTransformation | None = None,
  from_epoch: int = 0,
  initial: str = "identity",
  smoothing: float = 0.46,
) -> base.Method:
  """The S-model: a transition layer learned with the network, weighing all alike.

  Args:
    optimizer: of the layer's logits A; None is Adam at 1e-3, with which the
      released program trains network and layer alike.
    from_epoch: until then the task's own loss is trained on, without the layer.
    initial: T at that epoch: "identity", smoothed, or "confusion", that of the
      network's predictions on the training set (L2RW's "S-Model+Conf"), for which
      the network must have been trained: `from_epoch` at least 1.
    smoothing: of the identity, see `smoothed_identity`.

  Returns:
    A `base.Method` whose state is a `State`. Its losses are those of the given
    labels through the layer; it logs the mean of T's diagonal.

  Raises:
    InputError: a setting out of range.
  """
  changed_loss.check_epoch("s_model", from_epoch)
  if initial not in INITIALS:
    raise base.InputError(
      f"s_model: initial={initial!r}; choose 'identity' or 'confusion'."
    )
  if initial == "confusion" and from_epoch < 1:
    raise base.InputError(
      "s_model: initial='confusion' needs from_epoch of at least 1, for the network"
      " to have learned what it predicts."
    )
  _check_smoothing(smoothing)
  layer_optimizer = optax.adam(1e-3) if optimizer is None else optimizer

  def begun(transition, is_on):
    # The floor is the released program's; a row may be the identity's.
    logits = jnp.log(jnp.maximum(transition.astype(jnp.float32), 1e-8))
    with base.implicit_promotion():
      opt_state = layer_optimizer.init(logits)
    return State(logits, opt_state, jnp.array(is_on))

  def init(key, problem, params):
    del key, params
    return begun(smoothed_identity(problem.num_classes, smoothing), from_epoch == 0)

  def gradients(state, problem, inputs):
    batch = inputs.batch
    size = base.global_size(batch["label"].shape[0], problem.axis_name)

    def outputs_fn(params, batch):
      return problem.forward(params, inputs.model_state, batch, inputs.key, True)

    def mean(outputs, logits):
      through = s_model_loss(losses.logits_of(outputs), batch["label"], logits)
      values = jnp.where(state.is_on, through, problem.loss(outputs, batch))
      return values.sum() / size, values

    params, layer = base.local((inputs.params, state.logits), problem.axis_name)
    linearized = problem.linearize_outputs(outputs_fn, params, batch, has_aux=True)
    slopes, values = jax.grad(mean, (0, 1), has_aux=True)(linearized.outputs, layer)
    grads, slope = base.psum((linearized.vjp(slopes[0]), slopes[1]), problem.axis_name)
    diagonal = jnp.diag(jax.nn.softmax(state.logits, axis=1)).mean()
    metrics = {"transition_diagonal": jnp.where(state.is_on, diagonal, 1)}
    weights = jnp.full_like(values, 1 / size)
    found = base.Gradients(grads, weights, values, linearized.aux, metrics)
    return found, _learned(state, slope, layer_optimizer)

  def refresh(state, problem, view):
    if from_epoch == 0 or view.epoch != from_epoch:
      return state
    if initial == "identity":
      return state._replace(is_on=jnp.array(True))
    return begun(label_transition.estimate_by("confusion", problem, view), True)

  return base.Method(gradients, init=init, refresh=refresh)


def _check_smoothing(smoothing):
  if not 0 < smoothing < 1:
    raise base.InputError(f"smoothing={smoothing} must lie between 0 and 1.")


def _learned(state, slope, optimizer):
  with base.implicit_promotion():
    updates, opt_state = optimizer.update(slope, state.opt_state, state.logits)
  new = State(optax.apply_updates(state.logits, updates), opt_state, state.is_on)
  # Until the layer is on, neither decay nor the optimizer's clock may move it.
  return jax.tree.map(lambda a, b: jnp.where(state.is_on, a, b), new, state)
