r"""Meta-Weight-Net: a small network maps losses to weights (Shu et al., 2019).

V(l; phi) in (0, 1) is a multilayer perceptron whose only input is the example's loss.
M is the mean loss of a meta batch. Every iteration has three parts:

    look-ahead    p' = p - a sum_i w_i(phi) grad l_i(p)
    network       a step of any optax optimizer on the gradient dM(p')/dphi
    classifier    a step of the outer optimizer on sum_i w_i(phi_new) grad l_i(p)

`network_gradient` computes dM/dphi alone. In closed form, for SGD and weights
w_i = V_i / B: dM/dphi = -(a / B) sum_i <grad l_i(p), grad M(p')> dV(l_i)/dphi.

Options for the differences between the paper and the three released programs:

* `normalization`: "mean" is w_i = V_i / B (the later noise release); "sum" is
  w_i = V_i / sum_j V_j over the global batch (imbalance release, first noise
  release), where all weights are zero if the sum is zero.
* `detached`: V's input is constant in the look-ahead step (both noise releases and the
  published algorithm). In the imbalance release it is not, which adds
  sum_j (dw_j / dl_i) l_j to the factor w_i of grad l_i.
* `PRESETS`: the meta optimizer, normalization and `detached` of each release:
  "imbalance", "noise" (the first noise release) and "noise_stable" (the later one).
  "bare" has the meta optimizer and the weighting network of the MNIST experiments in
  BARE's code (Patel and Sastry, WACV 2023, arXiv:2106.15292); the other options are
  those of "noise".

The default is the preset "noise_stable": the published algorithm is the detached one,
and with "mean" the effective step of the classifier does not vary from batch to batch.
The look-ahead step is plain SGD with the classifier's learning rate, as in all releases
(the imbalance release lowers the rate of the look-ahead one epoch after that of the
classifier; this delay is not reproduced). The look-ahead step does not change
BatchNorm's running statistics.

Reference: Shu, Xie, Yi, Zhao, Zhou, Xu, Meng, "Meta-Weight-Net: Learning an Explicit
Mapping For Sample Weighting", NeurIPS 2019, arXiv:1902.07379.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import meta_network
from l2rw_jax import normalization as normalization_lib
from l2rw_jax.linearization import control_flow
from l2rw_jax.linearization import microbatching

WeightFn = Callable[[base.PyTree, base.Array], Any]
NORMALIZATIONS = ("mean", "sum")


class WeightNet(nn.Module):
  """V: maps the loss of each example to a weight in (0, 1).

  Kernels and biases are initialized uniformly in +-1 / sqrt(fan-in), as in the
  releases.

  Attributes:
    hidden: widths of the hidden ReLU layers; (100,) has 301 parameters.
  """

  hidden: Sequence[int] = (100,)

  @classmethod
  def of(cls, params: base.PyTree) -> "WeightNet":
    """The network whose parameters are `params`, such as those of a method's state."""
    layers = params["params"]
    kernels = [layers[f"Dense_{i}"]["kernel"] for i in range(len(layers))]
    return cls(tuple(kernel.shape[1] for kernel in kernels[:-1]))

  @nn.compact
  def __call__(self, losses: jax.Array) -> jax.Array:
    """Maps losses [B] to V [B]."""
    x = losses[:, None]
    with base.implicit_promotion():  # flax promotes inputs and parameters to one type.
      for width in self.hidden:
        x = nn.relu(meta_network.dense(width, x.shape[-1])(x))
      return nn.sigmoid(meta_network.dense(1, x.shape[-1])(x)[:, 0])


def example_weights(
  weight_fn: WeightFn,
  phi: base.PyTree,
  losses: base.Array,
  *,
  normalization: str = "mean",
  axis_name: base.AxisName = None,
) -> base.Array:
  """Weights w(phi) [B] of this device's losses [B]; sum_i w_i l_i is minimized.

  Args:
    weight_fn: `(phi, losses [B]) -> V [B]`, for instance `WeightNet().apply`.
    phi: parameters of `weight_fn`.
    losses: [B], held constant.
    normalization: "mean" or "sum", see the module docstring.
    axis_name: mapped axis over which the batch is sharded.

  Raises:
    InputError: the normalization is unknown, the losses are not floating-point numbers
      of shape [B], or the result of `weight_fn` does not have their shape.

  >>> import jax.numpy as jnp
  >>> print(example_weights(lambda k, l: l > k, 1., jnp.array([0., 2., 3., 4.])))
  [0.   0.25 0.25 0.25]
  """
  base.check_losses("losses", losses)
  _check(normalization)
  values = _values(weight_fn, phi, jax.lax.stop_gradient(losses))
  if normalization == "sum":
    return normalization_lib.sum_to_one(values, axis_name)
  return _divided(values, base.global_size(values.shape[0], axis_name))


def _values(weight_fn, phi, losses):
  """V [B], of the type of the losses."""
  values = weight_fn(phi, losses)
  if jnp.shape(values) != losses.shape:
    raise base.InputError(
      f"weight_fn must return one number per loss, shape {losses.shape}; got shape"
      f" {jnp.shape(values)}."
    )
  return jnp.asarray(values).astype(losses.dtype)


def _divided(values, size):
  # In float16, a size above 65504 would be infinite.
  wide = values.astype(base.accumulator_dtype(values.dtype))
  return (wide / size).astype(values.dtype)


def inner_weights(
  weight_fn: WeightFn,
  phi: base.PyTree,
  losses: base.Array,
  *,
  normalization: str = "mean",
  detached: bool = True,
) -> base.Array:
  """dL/dl [B], where L = sum_i w_i l_i is the loss of the look-ahead step.

  If `detached` is True, these are the weights. Otherwise the weights depend on the
  losses, which adds w'(l) l to each derivative (and, with "sum", terms from all other
  examples). Losses and derivatives are those of the global batch. The arguments other
  than `detached` are those of `example_weights`.

  Raises:
    InputError: the normalization is unknown, or the result of `weight_fn` does not have
      the shape of the losses.
  """

  def weights(losses):
    values = _values(weight_fn, phi, losses)
    if normalization == "sum":
      return normalization_lib.sum_to_one(values)
    return _divided(values, values.shape[0])

  _check(normalization)
  if detached:
    return weights(jax.lax.stop_gradient(losses))
  return jax.grad(lambda losses: jnp.sum(weights(losses) * losses))(losses)


def network_gradient(
  weight_fn: WeightFn,
  phi: base.PyTree,
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  meta_batch: Any,
  *,
  optimizer: optax.GradientTransformation,
  opt_state: base.PyTree = None,
  meta_losses_fn: base.LossesFn | None = None,
  normalization: str = "mean",
  detached: bool = True,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
  engine: str = "auto",
  microbatch_size: int | None = None,
  recompute: bool = False,
) -> meta_network.MetaGradient:
  """dM/dphi, the gradient of the meta loss with respect to the weighting network.

  This function is pure: it works inside `jit`, `vmap`, `pmap` and `shard_map`.

  Args:
    weight_fn: `(phi, losses [B]) -> V [B]`; V_i must depend only on the loss of example
      i.
    phi: parameters of the weighting network.
    losses_fn: `(params, batch) -> losses [B]`.
    params: parameters of the classifier.
    batch: the training batch.
    meta_batch: clean examples.
    optimizer: the optimizer of the look-ahead step; in the paper, it is `optax.sgd`
      with the classifier's learning rate.
    opt_state: state of `optimizer`; None initializes it.
    meta_losses_fn: like `losses_fn`, for `meta_batch`; None is `losses_fn`.
    normalization: "mean" or "sum".
    detached: whether V's input is constant in the look-ahead step.
    axis_name: mapped axis over which both batches are sharded.
    has_aux: whether both losses functions return `(losses, aux)`.
    engine: see `linearization.linearize`.
    microbatch_size: number of examples of each batch that are in memory at a time, see
      `microbatching`.
    recompute: whether the training batch is processed a second time after the meta
      batch. Then the activations of only one batch at a time are in memory, at the cost
      of two more forward passes of the training batch with the layerwise engine, and of
      one with forward mode.

  Returns:
    A `meta_network.MetaGradient`.

  Raises:
    InputError: the losses do not have shape [B], an option is unknown or invalid,
      `meta_batch` is None, both `microbatch_size` and `recompute` are given, or the
      model has no forward derivative; outside `jit` also if the optimizer's step
      ignores the gradient.
    FloatingPointError: outside `jit`, if a loss, the direction or the gradient is
      not finite.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> losses_fn = lambda p, b: (b["x"] * p - b["y"]) ** 2
    >>> batch = {"x": jnp.ones(2), "y": jnp.array([1., -3.])}  # the second is wrong
    >>> result = network_gradient(
    ...     lambda k, l: jnp.exp(-k * l), 0., losses_fn, 0., batch,
    ...     {"x": jnp.ones(1), "y": jnp.ones(1)}, optimizer=optax.sgd(0.1))
    >>> bool(result.gradient < 0)  # a step on phi lowers the weight of large losses
    True
  """
  _check_memory_options(microbatch_size, recompute)
  linearize = microbatching.microbatched(linearization.linearize, microbatch_size)

  def linearized(batch, engine, vector=None):
    local_params = base.local(params, axis_name)
    return linearize(
      losses_fn,
      local_params,
      batch,
      has_aux=has_aux,
      engine=engine,
      direction=vector,
    )

  first = linearized(batch, "reverse" if recompute else engine)
  lookahead = _lookahead(
    first,
    weight_fn,
    phi,
    meta_losses_fn or losses_fn,
    params,
    meta_batch,
    normalization=normalization,
    detached=detached,
    optimizer=optimizer,
    opt_state=opt_state,
    has_aux=has_aux,
    axis_name=axis_name,
    microbatch_size=microbatch_size,
  )
  if not recompute:
    return _meta_gradient(first, lookahead, phi, axis_name)

  def after_direction(batch):
    second = linearized(batch, engine, _known_vector(lookahead, axis_name))
    return _meta_gradient(second, lookahead, phi, axis_name)

  return hypergradient.after_direction(lookahead.direction, batch, after_direction)


def meta_gradient(
  linearized: base.Linearized,
  weight_fn: WeightFn,
  phi: base.PyTree,
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_batch: Any,
  *,
  axis_name: base.AxisName = None,
  **options: Any,
) -> meta_network.MetaGradient:
  """`network_gradient` of a batch that is already linearized at `params`.

  `options` contains `normalization`, `detached`, and the other arguments of
  `hypergradient.direction`.

  Raises:
    InputError, FloatingPointError: see `network_gradient`.
  """
  lookahead = _lookahead(
    linearized,
    weight_fn,
    phi,
    meta_losses_fn,
    params,
    meta_batch,
    axis_name=axis_name,
    **options,
  )
  return _meta_gradient(linearized, lookahead, phi, axis_name)


class _Lookahead(NamedTuple):
  """The results of the look-ahead step from which the meta gradient is computed.

  Attributes:
    weights_fn: maps phi to the coefficients of the per-example gradients in the
      look-ahead step, for the global batch.
    remainder_fn: maps phi to the inner loss of the global batch minus the sum of
      coefficients times losses; None if they are equal.
    direction: the gradient of the meta loss, pulled back through the optimizer step.
    losses_finite: whether the losses of the training batch are finite.
  """

  weights_fn: Callable[[base.PyTree], base.Array]
  remainder_fn: Callable[[base.PyTree], base.Array] | None
  direction: hypergradient.Direction
  losses_finite: Any


def _lookahead(
  linearized,
  weight_fn,
  phi,
  meta_losses_fn,
  params,
  meta_batch,
  *,
  normalization="mean",
  detached=True,
  axis_name=None,
  **options,
):
  if meta_batch is None:
    raise base.InputError("meta_batch is None: give clean examples.")
  base.check_losses("losses_fn's result", linearized.losses)
  losses_finite = base.check_finite(
    "training losses", linearized.losses, axis_name, ": check batch and params"
  )
  # Every device computes the weights of the global batch, so that "sum" is
  # differentiated without a collective; the network is small enough.
  losses = base.gather(linearized.losses, axis_name)

  def weights_fn(phi, detached=detached):
    return inner_weights(
      weight_fn, phi, losses, normalization=normalization, detached=detached
    )

  def loss_fn(phi):
    return jnp.sum(weights_fn(phi, detached=True) * losses)

  def remainder_fn(phi):
    return loss_fn(phi) - jnp.sum(weights_fn(phi) * losses)

  local_weights = base.local_slice(weights_fn(phi), axis_name)
  direction = hypergradient.direction(
    meta_losses_fn,
    params,
    meta_batch,
    base.summed_gradient(linearized, local_weights, axis_name),
    axis_name=axis_name,
    # The inner loss does not depend on whether its weights are differentiated.
    value=base.pmean(loss_fn(phi), axis_name),
    **options,
  )
  remainder = None if detached else remainder_fn
  return _Lookahead(weights_fn, remainder, direction, losses_finite)


def _meta_gradient(linearized, lookahead, phi, axis_name):
  """The meta gradient.

  `linearized` is the training batch, linearized; with `recompute`, `lookahead` was
  computed from an earlier linearization.
  """
  weights_fn, remainder_fn, direction, losses_finite = lookahead
  logging.log_first_n(
    logging.INFO, "Meta-Weight-Net uses engine=%s.", 1, linearized.engine
  )
  weight_gradient = hypergradient.weight_gradient(linearized, direction, axis_name)
  gradient = hypergradient.network_gradient(
    weights_fn, base.local(phi, axis_name), base.gather(weight_gradient, axis_name)
  )
  if remainder_fn is not None:
    remainder = jax.grad(remainder_fn)(base.local(phi, axis_name))
    gradient = jax.tree.map(
      lambda g, r: g + hypergradient.through_value(direction, r, axis_name),
      gradient,
      remainder,
    )
  # The value is equal on every device; the mean marks it as equal for `shard_map`.
  gradient = base.pmean(gradient, axis_name)
  return meta_network.checked_meta_gradient(
    gradient, direction, losses_finite, linearized.engine
  )


def _known_vector(lookahead, axis_name):
  local = hypergradient.local(lookahead.direction, axis_name)
  return hypergradient.known_vector(local)


class Preset(NamedTuple):
  """Settings of one released program, see the module docstring.

  Attributes:
    normalization: "mean" or "sum".
    detached: whether the input of the weighting network is constant.
    optimizer: optimizer of the weighting network.
    hidden: widths of the hidden layers of the weighting network.
  """

  normalization: str
  detached: bool
  optimizer: optax.GradientTransformation
  hidden: tuple[int, ...] = (100,)


def _sgd(learning_rate):
  return optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.sgd(learning_rate, momentum=0.9, nesterov=True),
  )


PRESETS = {
  "imbalance": Preset("sum", False, _sgd(1e-5)),
  "noise": Preset("sum", True, _sgd(1e-3)),
  "noise_stable": Preset(
    "mean", True, optax.chain(optax.add_decayed_weights(1e-4), optax.adam(1e-3))
  ),
  "bare": Preset("sum", True, optax.sgd(1e-3, momentum=0.9), (50, 50)),
}


def meta_weight_net(
  learning_rate: meta_network.Schedule,
  preset: str = "noise_stable",
  *,
  hidden: Sequence[int] | None = None,
  normalization: str | None = None,
  detached: bool | None = None,
  optimizer: optax.GradientTransformation | None = None,
  every: int = 1,
  microbatch_size: int | None = None,
  recompute: bool = False,
) -> base.Method:
  """Meta-Weight-Net for the training loop.

  Args:
    learning_rate: learning rate of the look-ahead step; in the paper, it is that of the
      classifier.
    preset: a key of `PRESETS`.
    hidden: widths of the hidden layers of the weighting network; None means those of
      the preset.
    normalization: "mean" or "sum"; None is that of the preset.
    detached: see the module docstring; None is that of the preset.
    optimizer: optimizer of the weighting network; None is that of the preset.
    every: number of steps from one meta step to the next; 1 in the paper.
    microbatch_size: number of examples of each batch that are in memory at a time, see
      `microbatching`.
    recompute: see `network_gradient`; the gradient of the classifier needs no
      additional pass. With BatchNorm, the running statistics are updated by the second
      pass.

  Returns:
    A `base.Method` that needs a meta batch; its state is a `meta_network.State`.

  Raises:
    InputError: the preset or the normalization is unknown, `every` or `microbatch_size`
      is not a positive integer, or both `microbatch_size` and `recompute` are given.
  """
  if preset not in PRESETS:
    raise base.InputError(f"preset={preset!r}; choose among {', '.join(PRESETS)}.")
  chosen = PRESETS[preset]
  normalization = normalization or chosen.normalization
  detached = chosen.detached if detached is None else detached
  _check(normalization)
  meta_optimizer = optimizer or chosen.optimizer
  every = base.check_integer("meta_weight_net: every", every)
  _check_memory_options(microbatch_size, recompute)
  net = WeightNet(chosen.hidden if hidden is None else tuple(hidden))

  def init(key, problem, params):
    del problem, params
    return meta_network.init(net.init(key, jnp.zeros(1)), meta_optimizer)

  def lookahead_of(linearized, phi, problem, inputs):
    return _lookahead(
      linearized,
      net.apply,
      phi,
      problem.meta_losses_fn(inputs.model_state, inputs.key),
      inputs.params,
      inputs.meta_batch,
      normalization=normalization,
      detached=detached,
      axis_name=problem.axis_name,
      microbatch_size=microbatch_size,
      **meta_network.sgd_lookahead(learning_rate, inputs),
    )

  def classifier_gradients(linearized, state, axis_name):
    losses = linearized.losses
    weights = example_weights(
      net.apply, state.params, losses, normalization=normalization, axis_name=axis_name
    )
    grads = base.summed_gradient(linearized, weights, axis_name)
    # This is the mean of V with "mean", and 1 with "sum".
    dtype = base.accumulator_dtype(weights.dtype)
    total_weight = base.psum(jnp.sum(weights.astype(dtype)), axis_name)
    metrics = meta_network.metrics(state) | {"total_weight": total_weight}
    return base.Gradients(
      grads,
      weights,
      losses,
      linearized.aux,
      metrics,
      fault=state.fault,
      zero_slope=state.zero_slope,
    )

  def gradients(state, problem, inputs):
    linearize = microbatching.microbatched(problem.linearize, microbatch_size)
    problem = dataclasses.replace(problem, linearize=linearize)
    axis_name = problem.axis_name
    linearized = problem.linearize_batch(inputs)

    def meta_gradient_fn(phi):
      lookahead = lookahead_of(linearized, phi, problem, inputs)
      return _meta_gradient(linearized, lookahead, phi, axis_name)

    state = meta_network.update(
      state, meta_gradient_fn, meta_optimizer, inputs.step, every
    )
    return classifier_gradients(linearized, state, axis_name), state

  def recomputed_gradients(state, problem, inputs):
    axis_name = problem.axis_name

    def with_update():
      # Only the losses and one weighted gradient are needed, and for these, reverse
      # mode stores the least.
      reverse = functools.partial(linearization.linearize, engine="reverse")
      first = dataclasses.replace(problem, linearize=reverse).linearize_batch(inputs)
      lookahead = lookahead_of(first, state.params, problem, inputs)

      def after_direction(batch):
        second = problem.linearize_batch(
          inputs._replace(batch=batch), direction=_known_vector(lookahead, axis_name)
        )
        new_state = meta_network.update(
          state,
          lambda phi: _meta_gradient(second, lookahead, phi, axis_name),
          meta_optimizer,
          inputs.step,
        )
        return classifier_gradients(second, new_state, axis_name), new_state

      return hypergradient.after_direction(
        lookahead.direction, inputs.batch, after_direction
      )

    def without_update():
      linearized = problem.linearize_batch(inputs)
      return classifier_gradients(linearized, state, axis_name), state

    if every == 1:
      return with_update()
    return control_flow.cond(inputs.step % every == 0, with_update, without_update)

  return base.Method(
    recomputed_gradients if recompute else gradients, init, needs_meta=True
  )


def _check_memory_options(microbatch_size, recompute):
  microbatching.check(microbatch_size)
  if recompute and microbatch_size is not None:
    raise base.InputError(
      f"recompute=True and microbatch_size={microbatch_size}: microbatches are"
      " recomputed in any case; leave out recompute=True."
    )


def _check(normalization):
  if normalization not in NORMALIZATIONS:
    raise base.InputError(f"normalization={normalization!r}; choose 'mean' or 'sum'.")
