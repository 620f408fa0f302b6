r"""ABSGD: weights proportional to exp(loss / lambda), with a moving normalizer.

The normalizer u is a scalar that is kept between steps. It converts the exponentials of
a batch to weights:

    u  <- (1 - gamma) u + gamma alpha mean_i exp(l_i / lambda)        u = 0 at first
    p_i = exp(l_i / lambda) / (u B),    then a step on grad sum_i p_i l_i, p constant

lambda > 0 gives more weight to large losses (for rare classes), and lambda < 0 to small
losses (for wrong labels). If lambda is infinite, the weights are uniform,
p_i = 1 / B. With gamma = alpha = 1, the weights are a softmax, and the step follows the
gradient of lambda log mean_i exp(l_i / lambda) with respect to the parameters. This
objective is the KL-regularized worst case (lambda > 0) or best case (lambda < 0) over
all example weights.

The weights sum to mean exp(l / lambda) / u. This is 1 / (gamma alpha) at the first step
(u has no bias correction) and approaches 1 / alpha if the losses stay the same, so
alpha divides the learning rate. gamma multiplies the *new* value: with 0.9 the average
depends on little more than the last batch. Neither a weight nor the sum of the weights
exceeds 1 / (gamma alpha).

Differences from the released code: the released code computes exp(l / lambda) directly,
which overflows in float32 if l / lambda is 89 or more. This module stores v = log u and
computes everything relative to the largest l / lambda of the batch. The numbers are the
same, and they are finite for any finite losses (in float32, u has a relative error of
about 1e-7 |v|). The released code treats any lambda of 200 or more as infinite. If a
finite lambda changes (which it does not in the published commands), the released code
keeps u, whose unit depends on lambda; this module resets u.

References:
  Qi, Xu, Yin, Jin, Yang, "Attentional-Biased Stochastic Gradient Descent", TMLR
  2023, arXiv:2012.06951.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import weighted_update

# A number, or a function of the epoch, counted from 0, that is called on the host.
Schedule = float | Callable[[int], float]


def example_weights(
  losses: base.Array,
  log_normalizer: base.Array,
  lam: float | base.Array,
  *,
  gamma: float,
  alpha: float = 1.0,
  clip: float | None = None,
  uniform_share: float = 0.0,
  axis_name: base.AxisName = None,
) -> tuple[base.Array, base.Array]:
  """Weights of a batch, and log u after this batch.

  Args:
    losses: losses of this device's examples, [B].
    log_normalizer: log u before this batch, scalar; -inf at first. Reset it to -inf
      when lambda changes, because u is in units of exp(loss / lambda).
    lam: lambda, in units of the loss, not 0; may be traced. If it is infinite, the
      weights are 1 / B regardless of the other options, and u does not change.
    gamma: share of the new batch in u, in (0, 1]; like the following numbers, it may be
      traced.
    alpha: scale of the new batch in u, above 0; divides the weights.
    clip: upper bound of p_i, such as 1e4 / B; the released code has none.
    uniform_share: adds uniform_share / B to every p_i after clipping. It is 1 in the
      released label-noise program and 0 in the others.
    axis_name: mapped axis over which the batch is sharded. In the formulas, B then
      counts the examples of all devices.

  Returns:
    Weights [B], from 0 to 1 / (gamma alpha) plus uniform_share / B, constant under
    differentiation; log u, scalar. A loss that is NaN, or infinite with the sign of
    lambda, makes all weights and log u NaN, unless lambda is infinite, which makes the
    weights 1 / B. To skip such a step, keep the previous log u.

  Raises:
    InputError: the losses are not floating-point numbers of shape [B] or are empty, or
      a setting that is not traced is out of range. A traced lambda of 0 gives NaN
      weights.

  >>> import jax.numpy as jnp
  >>> losses = jnp.log(jnp.array([1., 4., 16.]))
  >>> weights, log_u = example_weights(losses, -jnp.inf, 2.0, gamma=0.5)
  >>> print(jnp.round(7 * weights), jnp.round(6 * jnp.exp(log_u)))
  [2. 4. 8.] 7.0
  """
  base.check_losses("losses", losses)
  base.check_not_empty("losses", losses)
  _check_settings(lam, gamma, alpha, clip, uniform_share)
  dtype = base.accumulator_dtype(losses.dtype)
  gamma, alpha, clip, uniform_share = (
    base.setting(x, dtype) for x in (gamma, alpha, clip, uniform_share)
  )
  # Stop gradients before the collectives, which must not be differentiated.
  scores, log_u, lam = (
    jax.lax.stop_gradient(jnp.asarray(x, dtype)) for x in (losses, log_normalizer, lam)
  )
  limit = jnp.finfo(dtype).max / 4  # Differences of two scores are then finite.
  # The square root is NaN for a traced lambda of 0, and 1 otherwise.
  is_zero = jnp.abs(lam) < jnp.finfo(dtype).tiny
  lam = jnp.where(is_zero, 1, lam) * jnp.sqrt(jnp.where(is_zero, -1.0, 1.0))
  # A score of +infinity would make u infinite and all later weights 0, so it becomes
  # NaN. Other scores are only clipped.
  is_infinite = jnp.isinf(scores) & ((scores > 0) == (lam > 0))
  scores = jnp.clip(scores / lam.astype(dtype), -limit, limit)
  scores = scores * jnp.sqrt(jnp.where(is_infinite, -1.0, 1.0)).astype(dtype)
  size = base.global_size(losses.shape[0], axis_name)
  largest = base.pmax(jnp.max(scores), axis_name)
  scores = scores - largest
  mean = base.psum(jnp.sum(jnp.exp(scores)), axis_name) / size
  # `old_part` is -inf at the first batch and if gamma is 1. Subtracting the two large
  # numbers first loses less precision.
  old_part = jnp.log1p(-jnp.asarray(gamma, dtype)) + (log_u - largest)
  relative = jnp.logaddexp(old_part, jnp.log(gamma * alpha * mean))
  weights = jnp.exp(scores - relative - math.log(size))
  if clip is not None:
    weights = jnp.minimum(weights, clip)
  weights = weights + uniform_share / size
  is_uniform = jnp.isinf(lam)
  weights = jnp.where(is_uniform, 1 / size, weights)
  log_u = jnp.where(is_uniform, log_u, largest + relative)
  # The settings may be traced, too.
  return jax.lax.stop_gradient((weights.astype(losses.dtype), log_u))


def two_stage(lam: float, from_epoch: int) -> Callable[[int], float]:
  """The released schedule of lambda: infinite at first, and `lam` from an epoch on.

  Args:
    lam: lambda of the second stage.
    from_epoch: first epoch of the second stage, counted from 0. The released values
      are 160 of 200 (imbalance), 80 of 120 (CIFAR with wrong labels) and 5 of 10
      (Clothing1M).

  Raises:
    InputError: lambda is 0 or NaN, or the epoch is negative or not an integer.

  >>> schedule = two_stage(-5.0, 80)
  >>> schedule(79), schedule(80)
  (inf, -5.0)
  """
  _check_lam(lam)
  from_epoch = base.check_integer("two_stage: from_epoch", from_epoch, 0)
  return lambda epoch: lam if epoch >= from_epoch else math.inf


class State(NamedTuple):
  """State of `absgd`.

  Attributes:
    log_normalizer: log u, -inf before the first batch; float32 scalar.
    lam: lambda of the current epoch, float32 scalar.
  """

  log_normalizer: base.Array
  lam: base.Array


def absgd(
  lam: Schedule,
  *,
  gamma: float = 0.9,
  alpha: float = 1.0,
  clip: float | None = None,
  add_uniform: bool = False,
) -> base.Method:
  """ABSGD for the training loop.

  To train on another loss, wrap the method in `changed_loss`. Put class weights into
  that loss, so that they are also part of the exponent, as in the released code. The
  released programs for imbalance use lambda 3 to 5, gamma 0.45 to 0.7 and alpha 0.3 to
  0.5; the one for Clothing1M uses -5, 0.5 and 0.5. Set the momentum (0.9 in the
  released programs) in the outer optimizer.

  Args:
    lam: lambda in units of the loss, not 0; or a function of the epoch, see
      `two_stage`. The normalizer is reset when lambda changes.
    gamma: share of the new batch in the normalizer, in (0, 1].
    alpha: scale of the new batch in the normalizer; divides the learning rate.
    clip: upper bound of a weight before `add_uniform`.
    add_uniform: whether to add 1 / B to every weight, as the released label-noise
      program does.

  Returns:
    A `base.Method` whose state is a `State`. It logs log u (0 while lambda is
    infinite) and the sum of the weights.

  Raises:
    InputError: a setting or a value of the schedule is out of range.
  """
  schedule = lam if callable(lam) else lambda _: lam
  _check_settings(schedule(0), gamma, alpha, clip)

  def initial_state(epoch):
    lam = schedule(epoch)
    _check_lam(lam)
    return State(jnp.asarray(-jnp.inf, jnp.float32), jnp.asarray(lam, jnp.float32))

  def gradients(state, problem, inputs):
    gradients, log_normalizer = weighted_update.weighted_gradients(
      problem,
      inputs,
      lambda losses: example_weights(
        losses,
        *state,
        gamma=gamma,
        alpha=alpha,
        clip=clip,
        uniform_share=float(add_uniform),
        axis_name=problem.axis_name,
      ),
      has_aux=True,
    )
    metrics = {
      "log_normalizer": jnp.where(jnp.isinf(state.lam), 0, log_normalizer),
      "total_weight": base.psum(jnp.sum(gradients.weights), problem.axis_name),
    }
    state = state._replace(log_normalizer=log_normalizer.astype(jnp.float32))
    return gradients._replace(metrics=metrics), state

  def refresh(state, problem, view):
    del problem
    new = initial_state(view.epoch)
    return state if new.lam == state.lam else new

  return base.Method(gradients, init=lambda *_: initial_state(0), refresh=refresh)


def _check_settings(lam, gamma, alpha, clip, uniform_share=0.0):
  gamma, alpha, clip, uniform_share = (
    base.setting(x) for x in (gamma, alpha, clip, uniform_share)
  )
  _check_lam(lam)
  if not base.is_traced(gamma) and not 0 < gamma <= 1:
    raise base.InputError(f"absgd: gamma={gamma} must be above 0 and at most 1.")
  for name, value in (("alpha", alpha), ("clip", 1 if clip is None else clip)):
    if not base.is_traced(value) and not 0 < value < math.inf:
      raise base.InputError(f"absgd: {name}={value} must be above 0, and finite.")
  if not base.is_traced(uniform_share) and not 0 <= uniform_share < math.inf:
    raise base.InputError(
      f"absgd: uniform_share={uniform_share} must be at least 0, and finite."
    )


def _check_lam(lam):
  lam = base.setting(lam)
  # Most devices flush float32 numbers below the smallest normal number to 0.
  if not base.is_traced(lam) and not abs(lam) >= np.finfo(np.float32).tiny:
    raise base.InputError(
      f"absgd: lam={lam} must be a number that is not 0 in float32. Use a positive"
      " number for imbalance, a negative one for wrong labels, and math.inf for the"
      " plain mean."
    )
