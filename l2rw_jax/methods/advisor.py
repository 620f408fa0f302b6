"""Advisor network (MFRW): a meta-learned gate on the features of each example.

The classifier is split at its penultimate layer into features f and a linear head
(Ricci et al., 2022). Instead of scaling the loss of an example whose label may be
wrong, the advisor scales its features, so that the classifier learns from the features
that lower the loss of clean examples:

    pre-loss      l = cross-entropy of head(f), without a gate and without a gradient
    gate          W = sigmoid(C [relu(A f + a); relu(b l + b0)] + c) in (0, 1)^d
    virtual step  p' = p - eta grad_p mean CE(head(f * W)), for backbone and head
    meta step     an Adam step of the advisor on the gradient of the meta loss at p';
                  the meta loss is computed without a gate
    real step     a step of p on grad_p mean CE(head(f * W)), with the new advisor's W
                  held constant

f and l are constant inputs of the advisor, which sees the label only through l. There
is no gate at test time. With the default initialization of linear layers, W is near
1/2, so that features are halved in training but not at test time.

The meta equalization softmax (MES) of the journal version is not implemented, because
its equations are not public in sufficient detail. Only the authors' Clothing1M program
is public; the settings for other data are choices of this library (hidden = 100 as in
the released program; d is the network's number of features).

`Gradients.weights` contains each example's mean gate / B, which is not a loss weight.

References:
  Ricci, Uricchio, Del Bimbo, "Learning advisor networks for noisy image
  classification", ICIAP 2022, arXiv:2211.04177.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import meta_network


class AdvisorNet(nn.Module):
  """Maps (features, loss) to a gate on the features.

  Attributes:
    num_features: d; 616,748 parameters for d = 2048 and hidden = 100.
    hidden: width of each of the two branches.
  """

  num_features: int
  hidden: int = 100

  @nn.compact
  def __call__(self, features: jax.Array, losses: jax.Array) -> jax.Array:
    """Maps features [B, d] and losses [B] to a gate in (0, 1), [B, d]."""
    with base.implicit_promotion():  # flax promotes inputs and parameters to one type.
      a = nn.relu(meta_network.dense(self.hidden, self.num_features)(features))
      b = nn.relu(meta_network.dense(self.hidden, 1)(losses[:, None]))
      hidden = jnp.concatenate([a, b], axis=-1)
      return nn.sigmoid(meta_network.dense(self.num_features, 2 * self.hidden)(hidden))


def gate(
  net: AdvisorNet, psi: base.PyTree, features: base.Array, losses: base.Array
) -> base.Array:
  """The advisor's gate, [B, d], in the type of the features.

  Features and losses are held constant.

  Args:
    net: the advisor.
    psi: variables of the advisor.
    features: [B, d].
    losses: losses of the head on the features without a gate, [B].
  """
  features, losses = jax.lax.stop_gradient((features, losses))
  result: Any = net.apply(psi, features, losses)
  return result.astype(features.dtype)


def advisor(
  learning_rate: meta_network.Schedule,
  *,
  hidden: int = 100,
  optimizer: optax.GradientTransformation | None = None,
  every: int = 1,
) -> base.Method:
  """The advisor network (MFRW) for the training loop.

  Args:
    learning_rate: learning rate of the virtual step, a number or a schedule; in the
      paper it is the classifier's learning rate.
    hidden: width of the advisor's branches.
    optimizer: optimizer of the advisor; None is Adam at a constant 1e-4, as released.
    every: number of steps from one meta step to the next; 1 in the paper.

  Returns:
    A `base.Method` that needs a meta batch and a problem with `features` and `head`;
    its state is a `meta_network.State`.

  Raises:
    InputError: `every` is not a positive integer; in training, the network cannot be
      split.
  """
  every = base.check_integer("advisor: every", every)
  meta_optimizer = optimizer or optax.adam(1e-4)

  def init(key, problem, params):
    del params
    _check_split(problem)
    width = problem.num_features
    psi = AdvisorNet(width, hidden).init(key, jnp.zeros((1, width)), jnp.zeros(1))
    return meta_network.init(psi, meta_optimizer)

  def gradients(state, problem, inputs):
    batch = inputs.batch

    def outputs_fn(params, batch):
      features, model_state = problem.features(
        params, inputs.model_state, batch, inputs.key, True
      )
      # The parameters are an output too, because the loss uses the head.
      return (features, params), model_state

    linearized = problem.linearize_batch_outputs(inputs, outputs_fn)
    features, _ = linearized.outputs
    net = AdvisorNet(problem.num_features, hidden)
    losses = problem.loss(problem.head(inputs.params, features), batch)
    size = base.global_size(losses.shape[0], problem.axis_name)

    def loss_fn(outputs, psi):
      # `features`, the gate's input, is constant; `output_features` is not.
      output_features, params = outputs
      gated = output_features * gate(net, psi, features, losses)
      return problem.loss(problem.head(params, gated), batch).sum() / size

    grads, state = meta_network.iterate(
      state,
      problem,
      inputs,
      linearized,
      loss_fn,
      loss_fn,
      learning_rate=learning_rate,
      optimizer=meta_optimizer,
      every=every,
    )
    mean_gate = gate(net, state.params, features, losses).mean(axis=-1)
    metrics = {
      **meta_network.metrics(state),
      "gate": base.pmean(mean_gate.mean(), problem.axis_name),
    }
    gradients = base.Gradients(
      grads,
      mean_gate / size,
      losses,
      linearized.aux,
      metrics,
      fault=state.fault,
      zero_slope=state.zero_slope,
    )
    return gradients, state

  return base.Method(gradients, init, needs_meta=True)


def _check_split(problem):
  if problem.features is None or problem.head is None or problem.num_features is None:
    raise base.InputError(
      "the advisor gates features: it needs a network with the methods features and"
      " head and the attribute num_features, like those of l2rw_jax.models; choose"
      " another method or split the network."
    )
