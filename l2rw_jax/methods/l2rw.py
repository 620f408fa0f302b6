"""L2RW: example weights from gradient directions (Ren et al., 2018).

An example gets a positive weight if a step on it lowers the loss of a small set of
clean examples, the meta set. Let p'(w) be the parameters after one look-ahead step on
sum_i w_i l_i, and M(p') the meta loss. Then [eq. 4-6]:

    score_i  = -dM/dw_i at w = 0        = <grad l_i, grad M> for plain SGD
    weight_i = max(score_i, 0) / S,  S = sum_j max(score_j, 0)     [eq. 7-9]

If no score is positive, all weights are zero (the term delta in the paper). The
learning rate of the look-ahead step cancels. The weights sum to 1 over the *global*
batch, so the weighted loss is a sum without another factor 1/B.

The authors' released code for CIFAR differs from the paper in two ways. Instead of
computing p', it computes inner products of the meta gradient with per-example gradients
(the same numbers). Its L2 penalty is part of both losses, which changes the scores to
s_i = <grad l_i, grad M + decay * p>. Their code for MNIST computes p' with a learning
rate of 1, without a penalty. In this library, weight decay changes the scores only if
your losses contain it. `optax.add_decayed_weights` in the look-ahead optimizer changes
the point at which the gradient of M is computed. Weight decay in the outer optimizer
alone (the default of this library) has neither effect.

Two approximations make a step cheaper:

- `layers`: scores from some of the layers. The inner product above is a sum over the
  parameters; only the terms of some layers, such as the last, are computed.
- `refresh_every`: the direction of an earlier step. The gradient of the meta loss is
  computed only once in several steps, although it may change a lot from step to step.

The cost of an exact step with the layerwise engine is 4 B + 3 M forward passes of one
example. With both approximations it is 3 B + f B + 3 M / k, where f is the share of the
selected layers in the cost, and the meta gradient is computed every k steps. Both
approximations change the weights, and which of them changes the weights more depends on
the problem. The second can make the trained network much worse. The documentation of
L2RW lists measured rank correlations and accuracies.

Other weights can be computed from the same scores with `normalize`, for instance
`normalization.equal_weights`.

Matrix products on TPU and recent GPUs are rounded to bfloat16 or TF32 by default. A
score is a sum of terms that largely cancel, so rounding can change the sign of a small
score. Wrap the call in `jax.default_matmul_precision("float32")` to get scores that
agree with the CPU to 1e-5.

References:
  Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep
  Learning", ICML 2018, Algorithm 1, arXiv:1803.09050.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

from absl import logging
import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import normalization
from l2rw_jax.linearization import control_flow
from l2rw_jax.linearization import microbatching
from l2rw_jax.linearization import restriction
from l2rw_jax.linearization import trainable

# Maps the scores of this device, [B], and the name of the mapped axis to weights.
Normalize: TypeAlias = Callable[[base.Array, base.AxisName], base.Array]


class ExampleWeights(NamedTuple):
  """L2RW's weights of one batch.

  Attributes:
    weights: weights, [B]. Those of the rules in `normalization` are not negative, and
      their sum over all devices is 1, or all are 0.
    scores: -dM/dw at w = 0, [B], in float32 or wider. A score is the decrease of the
      meta loss per unit of the example's weight.
    meta_loss: mean loss of the meta batch at the look-ahead parameters, scalar.
    losses: losses of the training batch, [B].
    finite: False if a loss of either batch, the meta gradient, its product with the
      derivative of the optimizer step, a score or a weight is NaN or infinite; bool
      scalar.
    zero_slope: whether the look-ahead optimizer's step ignores the gradient, so
      that all weights are zero, see `hypergradient.Direction`; bool scalar.
    fault: the first quantity that is not finite, a `base.Fault`; int32 scalar.
    aux: the auxiliary output of `losses_fn` for `batch`, or None.
    engine: the engine that linearized `batch`, for instance the one that "auto"
      selected; see `base.Linearized`.
    order: "batches" if the meta batch is finished before the training batch begins,
      "layers" if the compiler orders them, see `hypergradient.order_of`; empty for
      `example_weights`, which does not set an order.
  """

  weights: base.Array
  scores: base.Array
  meta_loss: base.Array
  losses: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array
  aux: Any = None
  engine: base.StaticStr = base.StaticStr()
  order: base.StaticStr = base.StaticStr()


def example_weights(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  meta_batch: Any,
  *,
  optimizer: optax.GradientTransformation | None = None,
  opt_state: base.PyTree = None,
  meta_losses_fn: base.LossesFn | None = None,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
  engine: str = "auto",
  microbatch_size: int | None = None,
  layers: restriction.Layers | None = None,
  normalize: Normalize = normalization.rectify,
  direction: hypergradient.Direction | None = None,
) -> ExampleWeights:
  """Weights of the examples of a batch, by how much they lower the meta loss.

  This function is pure: it works inside `jit`, `vmap`, `pmap`, `shard_map`, and under
  `jit` with sharded arrays. Without `jax.checkpoint`, it costs at most 3 forward
  passes of each batch. The gradient that the caller computes afterwards costs only 2
  more, because it shares a forward pass with the scores; see `linearization.linearize`.
  With `microbatch_size`, this function costs 3 passes of the meta batch and 4 of the
  training batch. The gradient then costs 3 more, because nothing is shared.

  Args:
    losses_fn: `(params, batch) -> losses [B]`; from a loss of one example:
      `jax.vmap(loss_fn, in_axes=(None, 0))`.
    params: any pytree of parameters.
    batch: the training batch, in the form that `losses_fn` takes.
    meta_batch: a few examples whose labels are correct.
    optimizer: the optimizer of the look-ahead step; None is `optax.sgd`, as in the
      paper. Adam in its initial state, `clip_by_global_norm` and other optimizers that
      compute the square root of a squared gradient have no derivative at zero: see
      `Raises`.
    opt_state: state of `optimizer`; None initializes it.
    meta_losses_fn: like `losses_fn`, for `meta_batch`; None is `losses_fn`.
    axis_name: mapped axis over which both batches are sharded; weights then sum to 1
      over all devices.
    has_aux: whether both losses functions return `(losses, aux)`.
    engine: see `linearization.linearize`; needed for a model with a `jax.custom_vjp` to
      which the layerwise engine does not apply.
    microbatch_size: number of examples of each batch that are in memory at a time on
      this device, see `microbatching.microbatched`; None is all.
    layers: the parameters from which scores are computed, see `restriction.restricted`;
      None is all. This is an approximation.
    normalize: `(scores [B], axis_name) -> weights [B]`, the rule that turns scores into
      weights. The default is that of the paper; see also `normalization.equal_weights`.
    direction: a result of `meta_direction`, at these parameters or, as an
      approximation, at those of an earlier step. If it is given, `meta_batch`,
      `meta_losses_fn`, `optimizer` and `opt_state` are not used. None computes it.

  Returns:
    An `ExampleWeights`; no gradient flows through its weights and scores.

  Raises:
    InputError: the losses or weights do not have shape [B], the model has no forward
      derivative, both `meta_batch` and `direction` are None, or another argument is
      invalid, see `hypergradient.direction`, `linearization.linearize`,
      `microbatching.microbatched` and `restriction.restricted`. Outside `jit`, it is
      also raised if the optimizer's step ignores the gradient (under `jit`, check
      `.zero_slope`).
    FloatingPointError: outside `jit`, if a loss, the direction, a score or a weight is
      not finite (under `jit` check `.finite`).

  Example:
    >>> import jax, jax.numpy as jnp
    >>> loss_fn = lambda p, example: (example["x"] @ p - example["y"]) ** 2
    >>> losses_fn = jax.vmap(loss_fn, in_axes=(None, 0))
    >>> batch = {"x": jnp.eye(2), "y": jnp.array([1., -1.])}   # the second is wrong
    >>> clean = {"x": jnp.ones((1, 2)), "y": jnp.array([2.])}
    >>> print(example_weights(losses_fn, jnp.zeros(2), batch, clean).weights)
    [1. 0.]
  """
  if direction is None:
    direction = meta_direction(
      meta_losses_fn or losses_fn,
      params,
      meta_batch,
      optimizer=optimizer,
      opt_state=opt_state,
      axis_name=axis_name,
      has_aux=has_aux,
      microbatch_size=microbatch_size,
    )
  # `hypergradient.batch_after` is not used here, so that under one `jit` the caller's
  # gradient at `params` shares this forward pass.
  linearize = _linearize(linearization.linearize, layers, microbatch_size)
  direction = hypergradient.local(direction, axis_name)
  linearized = linearize(
    losses_fn,
    base.local(params, axis_name),
    batch,
    has_aux=has_aux,
    engine=engine,
    direction=hypergradient.known_vector(direction),
  )
  return weigh(linearized, direction, axis_name, normalize)


def _linearize(linearize, layers, microbatch_size):
  restricted = restriction.restricted(linearize, layers)
  return microbatching.microbatched(restricted, microbatch_size)


def meta_direction(
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_batch: Any,
  **options: Any,
) -> hypergradient.Direction:
  """The direction v with dM/dw = J v at w = 0.

  The arguments are those of `example_weights`; the options are `optimizer`,
  `opt_state`, `axis_name`, `has_aux` and `microbatch_size`. Returns a
  `hypergradient.Direction`.

  Raises:
    InputError: `meta_batch` is None, or an error of `hypergradient.direction`.
  """
  if meta_batch is None:
    raise base.InputError(
      "meta_batch is None: give a few trusted examples, or the result of"
      " l2rw.meta_direction as direction=."
    )
  return hypergradient.direction(meta_losses_fn, params, meta_batch, **options)


def weigh(
  linearized: base.Linearized,
  direction: hypergradient.Direction,
  axis_name: base.AxisName = None,
  normalize: Normalize = normalization.rectify,
) -> ExampleWeights:
  """`example_weights` of a linearized batch, given the result of `meta_direction`.

  Raises:
    InputError: the losses or the weights do not have shape [B].
    FloatingPointError: outside `jit`, if a loss, a score or a weight is not finite.
  """
  base.check_losses("losses_fn's result", linearized.losses)
  losses_finite = base.check_finite(
    "training losses", linearized.losses, axis_name, ": check batch and params"
  )
  scores = -hypergradient.weight_gradient(linearized, direction, axis_name)
  # Scores are constants, even if this function is called inside a loss that is
  # differentiated.
  scores = jax.lax.stop_gradient(scores)
  scores_finite = base.check_finite(
    "scores",
    scores,
    axis_name,
    ": the losses are finite; check their gradients (the scale of the inputs)",
  )
  weights = normalize(scores, axis_name)
  shape = getattr(weights, "shape", None)
  if shape != scores.shape:  # It would be broadcast.
    got = f"a value of type {type(weights).__name__}" if shape is None else shape
    raise base.InputError(
      "normalize must return an array with one weight for each example, [B] ="
      f" {list(scores.shape)}; got {got}."
    )
  weights = weights.astype(linearized.losses.dtype)
  slopes_finite = scores_finite
  # The rules of this library give finite weights for finite scores. For them, the check
  # would be one more sum over devices.
  if normalize not in (normalization.rectify, normalization.equal_weights):
    slopes_finite &= base.check_finite(
      "weights", weights, axis_name, ": the scores are finite; check normalize"
    )
  fault = base.first_fault(
    direction.fault, training_losses=losses_finite, slopes=slopes_finite
  )
  return ExampleWeights(
    weights=weights,
    scores=scores,
    meta_loss=direction.meta_loss,
    losses=linearized.losses,
    finite=fault == 0,
    zero_slope=direction.zero_slope,
    fault=fault,
    aux=linearized.aux,
    engine=linearized.engine,
  )


def weighted_value_and_grad(
  losses_fn: base.LossesFn,
  *,
  optimizer: optax.GradientTransformation | None = None,
  meta_losses_fn: base.LossesFn | None = None,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
  engine: str = "auto",
  microbatch_size: int | None = None,
  layers: restriction.Layers | None = None,
  normalize: Normalize = normalization.rectify,
) -> Callable[..., tuple[tuple[base.Array, ExampleWeights], base.PyTree]]:
  """Like `jax.value_and_grad` of a mean loss, but weighted by L2RW.

  It replaces `jax.value_and_grad` in a training step. Without `microbatch_size` and
  `jax.checkpoint`, a single forward pass of the batch is used for its losses, its
  scores and the weighted gradient. The first pass of the batch starts after the meta
  batch has been processed, so that the activations of only one batch at a time are in
  memory, unless the parameters take more memory than the activations (see
  `hypergradient.order_of`; `info.order` is the order that was used). Arguments are
  those of `example_weights`.

  Returns:
    `(params, batch, meta_batch, opt_state=None, direction=None) -> ((loss, info),
    grads)`, where `loss` is sum_i weights_i losses_i over all devices, `info` is an
    `ExampleWeights` (its `.aux` is that of `losses_fn`), and `grads` is the gradient of
    `loss`, summed over devices. As with `jax.grad`, conjugate the gradients of complex
    parameters before you pass them to an optimizer. It raises the errors of
    `example_weights`.

  Raises:
    InputError: `microbatch_size` or `layers` is invalid.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, x: (x @ p - 1.) ** 2
    >>> (loss, info), grads = weighted_value_and_grad(losses_fn)(
    ...     jnp.zeros(2), jnp.eye(2), jnp.array([[1., 0.]]))
    >>> print(loss, info.weights, grads)
    1.0 [1. 0.] [-2. -0.]
  """

  linearize = _linearize(linearization.linearize, layers, microbatch_size)

  def value_and_grad(params, batch, meta_batch, opt_state=None, direction=None):
    if direction is None:
      direction = meta_direction(
        meta_losses_fn or losses_fn,
        params,
        meta_batch,
        optimizer=optimizer,
        opt_state=opt_state,
        axis_name=axis_name,
        has_aux=has_aux,
        microbatch_size=microbatch_size,
      )
    order = hypergradient.order_of(direction, batch)
    local_direction = hypergradient.local(direction, axis_name)

    def after_direction(batch):
      linearized = linearize(
        losses_fn,
        base.local(params, axis_name),
        batch,
        has_aux=has_aux,
        engine=engine,
        direction=hypergradient.known_vector(local_direction),
      )
      info = weigh(linearized, local_direction, axis_name, normalize)
      info = info._replace(order=order)
      loss = base.psum(jnp.sum(info.weights * info.losses), axis_name)
      grads = base.summed_gradient(linearized, info.weights, axis_name)
      return (loss, info), grads

    result = hypergradient.after_direction(direction, batch, after_direction)
    _log_plan(result[0][1])
    return result

  return value_and_grad


def _log_plan(info):
  logging.log_first_n(
    logging.INFO,
    "L2RW uses engine=%s and order=%s (see hypergradient.order_of).",
    1,
    info.engine,
    info.order,
  )


def l2rw(
  optimizer: optax.GradientTransformation | None = None,
  *,
  microbatch_size: int | None = None,
  reweight: bool = True,
  layers: restriction.Layers | None = None,
  refresh_every: int = 1,
  normalize: Normalize = normalization.rectify,
) -> base.Method:
  """L2RW for the training loop.

  The look-ahead step does not change BatchNorm's running statistics: each pass of the
  meta step uses the statistics of its batch, as in the released code, and only the pass
  of the training batch updates the running statistics. The derivatives in the scores
  include those of the batch statistics.

  Args:
    optimizer: None takes the look-ahead step with plain SGD, as the paper does.
      Otherwise it must be the outer optimizer of the run, whose state is then used in
      the look-ahead step.
    microbatch_size: number of examples of each batch that are in memory at a time on
      each device; None is all.
    reweight: whether to train with the weights. If it is False, training is plain, and
      the scores are only reported, for instance to `audit.recording`.
    layers: the parameters from which scores are computed, see `restriction.restricted`;
      None is all. This is an approximation.
    refresh_every: number of steps for which one gradient of the meta loss is used. A
      number above 1 is an approximation, which can lower the accuracy considerably:
      compare it with 1 on your data. Several runs under one `vmap` compute the gradient
      in every step.
    normalize: see `example_weights`.

  Returns:
    A `base.Method` that needs a meta batch. If `refresh_every` is above 1, its state is
    the direction, which has the size of the parameters; otherwise it has no state.

  Raises:
    InputError: `microbatch_size` or `refresh_every` is not a positive integer, or
      `layers` has an unsupported form, see `restriction.restricted`.
  """
  microbatching.check(microbatch_size)
  refresh_every = base.check_integer("l2rw: refresh_every", refresh_every)
  restriction.check(layers)

  def new_direction(problem, inputs):
    return meta_direction(
      problem.meta_losses_fn(inputs.model_state, inputs.key),
      inputs.params,
      inputs.meta_batch,
      optimizer=optimizer,
      opt_state=None if optimizer is None else inputs.opt_state,
      axis_name=problem.axis_name,
      has_aux=True,
      microbatch_size=microbatch_size,
    )

  def gradients(state, problem, inputs):
    if refresh_every == 1:
      direction = new_direction(problem, inputs)
    else:
      state = control_flow.cond(
        inputs.step % refresh_every == 0,
        lambda: _stored(new_direction(problem, inputs), inputs.params),
        lambda: state,
      )
      partition = trainable.Partition(inputs.params)
      direction = state._replace(vector=partition.combine_gradient(state.vector))
    linearize = _linearize(problem.linearize, layers, microbatch_size)
    problem = dataclasses.replace(problem, linearize=linearize)
    order = hypergradient.order_of(direction, inputs.batch)
    local_direction = hypergradient.local(direction, problem.axis_name)

    def after_direction(batch):
      linearized = problem.linearize_batch(
        inputs._replace(batch=batch),
        direction=hypergradient.known_vector(local_direction),
      )
      info = weigh(linearized, local_direction, problem.axis_name, normalize)
      weights = info.weights
      if not reweight:
        size = base.global_size(weights.shape[0], problem.axis_name)
        weights = jnp.full_like(info.losses, 1 / size)
      grads = base.summed_gradient(linearized, weights, problem.axis_name)
      return info._replace(order=order), weights, grads

    info, weights, grads = hypergradient.after_direction(
      direction, inputs.batch, after_direction
    )
    _log_plan(info)
    rejected = base.pmean(jnp.mean(info.weights == 0), problem.axis_name)
    metrics = {
      "meta_loss": info.meta_loss,
      "rejected": rejected,
      "direction_finite": info.finite.astype(jnp.float32),
      "zero_slope": info.zero_slope.astype(jnp.float32),
    }
    gradients = base.Gradients(
      grads,
      weights,
      info.losses,
      info.aux,
      metrics,
      fault=info.fault,
      zero_slope=info.zero_slope,
      scores=info.scores,
    )
    return gradients, state

  if refresh_every == 1:
    return base.Method(gradients, needs_meta=True)
  init = functools.partial(_no_direction, uses_value=optimizer is not None)
  return base.Method(gradients, init, needs_meta=True)


def _stored(direction, params):
  """The part of a direction that is kept from step to step; it contains only arrays."""
  loss = direction.meta_loss.astype(jnp.result_type(float))
  vector = trainable.Partition(params).leaves(direction.vector)
  return direction._replace(
    vector=vector,
    meta_loss=loss,
    aux=None,
    activation_ratio=base.StaticFloat("inf"),
  )


def _no_direction(key, problem, params, uses_value):
  """The state before the first step, which replaces it."""
  del key, problem
  return hypergradient.Direction(
    [jnp.zeros_like(x) for x in trainable.Partition(params).leaves(params)],
    jnp.zeros((), jnp.result_type(float)),
    jnp.array(True),
    jnp.array(False),
    jnp.zeros((), jnp.int32),
    value_slope=jnp.zeros(()) if uses_value else None,
  )
