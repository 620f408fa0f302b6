r"""ABSGD: weights in proportion to exp(loss / lambda), by a moving normalizer.

One scalar of memory, u, turns the exponentials of a batch into weights:

    u  <- (1 - gamma) u + gamma alpha mean_i exp(l_i / lambda)        u = 0 at first
    p_i = exp(l_i / lambda) / (u B),    then a step on grad sum_i p_i l_i, p constant

lambda > 0 favors heavy losses (rare classes), lambda < 0 light ones (wrong labels),
infinite lambda nobody: p_i = 1 / B. With gamma = alpha = 1 the weights are a softmax
and the step is the gradient of F(w) = lambda log mean_i exp(l_i(w) / lambda), the
KL-regularized worst (lambda > 0) or best (lambda < 0) case over weightings.

What to know of the weights: they sum to mean exp(l / lambda) / u, which is 1 / alpha
when the losses stand still and 1 / (gamma alpha) at the first step (u has no bias
correction), so alpha divides the learning rate. gamma multiplies the *new* value:
0.9 hardly remembers. No weight, nor their sum, exceeds 1 / (gamma alpha).

What is ours. The released code exponentiates as written, and overflows in float32
from l / lambda = 89 on. Here v = log u is kept, and all is reckoned relative to the
largest l / lambda of the batch: the same numbers, finite for any finite losses (in
float32 u is remembered to a relative error of about 1e-7 |v|). The released code takes
any lambda of 200 or more for infinite, and never changes a finite one, which would
change the unit of u; here u then starts again.

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
from l2rw_jax.methods import baselines
from l2rw_jax.methods import changed_loss

# A number, or the number of an epoch counted from 0 (on the host).
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
  """Weights of a batch, and log u with this batch in it.

  Args:
    losses: of this device's examples, [B].
    log_normalizer: log u so far, scalar; -inf at first. Start again with -inf
      when lambda changes: u is in units of exp(loss / lambda).
    lam: lambda, in units of the loss, not 0; may be traced. Infinite: weights
      are 1 / B whatever the options, and u is left alone.
    gamma: share of the new batch in u, in (0, 1].
    alpha: scale of the new batch in u, above 0; divides the weights.
    clip: upper bound of p_i, such as 1e4 / B; none in the released code.
    uniform_share: adds uniform_share / B to every p_i, after the bound. 1 in the
      released label-noise program, 0 in the others.
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    Weights [B], from 0 to 1 / (gamma alpha) plus uniform_share / B, held constant
    under differentiation; log u, scalar. NaN losses give NaN, in all weights, but
    not where lambda is infinite: 1 / B then as ever.

  Raises:
    InputError: losses not of shape [B]; unless traced, a setting out of range. A
      traced lambda of 0 gives NaN weights.

  >>> import jax.numpy as jnp
  >>> losses = jnp.log(jnp.array([1., 4., 16.]))
  >>> weights, log_u = example_weights(losses, -jnp.inf, 2.0, gamma=0.5)
  >>> print(jnp.round(7 * weights), jnp.round(6 * jnp.exp(log_u)))
  [2. 4. 8.] 7.0
  """
  base.check_vector("losses", losses)
  _check_settings(lam, gamma, alpha, clip, uniform_share)
  dtype = base.accumulator_dtype(losses.dtype)
  # Here, not at the end: nothing below, collectives least, is to be differentiated.
  scores, memory, lam = (
    jax.lax.stop_gradient(jnp.asarray(x, dtype)) for x in (losses, log_normalizer, lam)
  )
  limit = jnp.finfo(dtype).max / 4  # Differences of two scores are then finite too.
  # A traced lambda of 0 makes all weights NaN: the square root is 1 elsewhere.
  is_zero = jnp.abs(lam) < jnp.finfo(dtype).tiny
  lam = jnp.where(is_zero, 1, lam) * jnp.sqrt(jnp.where(is_zero, -1.0, 1.0))
  scores = jnp.clip(scores / lam.astype(dtype), -limit, limit)
  size = base.global_size(losses.shape[0], axis_name)
  largest = base.pmax(jnp.max(scores), axis_name)
  scores = scores - largest
  mean = base.psum(jnp.sum(jnp.exp(scores)), axis_name) / size
  # -inf at first and at gamma = 1. The two large numbers meet first, to lose less.
  kept = jnp.log1p(-jnp.asarray(gamma, dtype)) + (memory - largest)
  relative = jnp.logaddexp(kept, jnp.log(gamma * alpha * mean))
  weights = jnp.exp(scores - relative - math.log(size))
  if clip is not None:
    weights = jnp.minimum(weights, clip)
  weights = weights + uniform_share / size
  is_plain = jnp.isinf(lam)
  weights = jnp.where(is_plain, 1 / size, weights)
  memory = jnp.where(is_plain, memory, largest + relative)
  return weights.astype(losses.dtype), memory


def two_stage(lam: float, from_epoch: int) -> Callable[[int], float]:
  """The released schedule of lambda: infinite, and `lam` from an epoch on.

  Args:
    lam: lambda of the second stage.
    from_epoch: its first epoch, counted from 0. Released: 160 of 200 (imbalance),
      80 of 120 (CIFAR with wrong labels), 5 of 10 (Clothing1M).

  Raises:
    InputError: lambda is 0 or NaN, or the epoch negative.

  >>> schedule = two_stage(-5.0, 80)
  >>> schedule(79), schedule(80)
  (inf, -5.0)
  """
  _check_lam(lam)
  changed_loss.check_epoch("two_stage", from_epoch)
  return lambda epoch: lam if epoch >= from_epoch else math.inf


class State(NamedTuple):
  """What `absgd` carries.

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

  For another base loss wrap it in `changed_loss`; a class weight belongs into that
  loss, so that it acts in the exponent too, as released. The released programs for
  imbalance give lambda 3 to 5 with gamma 0.45 to 0.7 and alpha 0.3 to 0.5, the one
  for Clothing1M -5 with 0.5 and 0.5. Momentum, 0.9, is the outer optimizer's.

  Args:
    lam: lambda in units of the loss, not 0; or a function of the epoch, see
      `two_stage`. The normalizer starts afresh when its value changes.
    gamma: share of the new batch in the normalizer, in (0, 1].
    alpha: scale of the new batch in it; the learning rate is divided by it.
    clip: upper bound of a weight before `add_uniform`.
    add_uniform: adds 1 / B to every weight, as the released label-noise program.

  Returns:
    A `base.Method` whose state is a `State`. It logs log u (0 while lambda is
    infinite) and the sum of the weights.

  Raises:
    InputError: a setting out of range, the schedule's values included.
  """
  schedule = lam if callable(lam) else lambda _: lam
  _check_settings(schedule(0), gamma, alpha, clip)

  def fresh(epoch):
    lam = schedule(epoch)
    _check_lam(lam)
    return State(jnp.asarray(-jnp.inf, jnp.float32), jnp.asarray(lam, jnp.float32))

  def gradients(state, problem, inputs):
    found, log_normalizer = baselines.weighted_gradients(
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
      "total_weight": base.psum(jnp.sum(found.weights), problem.axis_name),
    }
    state = state._replace(log_normalizer=log_normalizer.astype(jnp.float32))
    return found._replace(metrics=metrics), state

  def refresh(state, problem, view):
    del problem
    new = fresh(view.epoch)
    return state if new.lam == state.lam else new

  return base.Method(gradients, init=lambda *_: fresh(0), refresh=refresh)


def _check_settings(lam, gamma, alpha, clip, uniform_share=0.0):
  if _is_known(lam):
    _check_lam(lam)
  if _is_known(gamma) and not 0 < gamma <= 1:
    raise base.InputError(f"absgd: gamma={gamma} must be above 0 and at most 1.")
  for name, value in (("alpha", alpha), ("clip", 1 if clip is None else clip)):
    if _is_known(value) and not 0 < value < math.inf:
      raise base.InputError(f"absgd: {name}={value} must be a number above 0.")
  if _is_known(uniform_share) and not 0 <= uniform_share < math.inf:
    raise base.InputError(f"absgd: uniform_share={uniform_share} must be at least 0.")


def _is_known(value):
  return not isinstance(value, jax.core.Tracer)


def _check_lam(lam):
  # Not only 0: below the smallest normal number, float32 on most devices has 0 too.
  if not abs(lam) >= np.finfo(np.float32).tiny:
    raise base.InputError(
      f"absgd: lam={lam} must not be 0; above 0 for imbalance, below for wrong labels,"
      " math.inf for the plain mean."
    )
