"""MentorNet: example weights from a curriculum (Jiang et al., 2018).

The classifier that is trained is called the student. A curriculum maps four features of
an example to its weight v in [0, 1]: the loss l, the difference d = l - m from a moving
percentile m of the losses, the label, and the epoch percent e, which is the percent of
the training that is done, 0 to 99. The loss of the student is sum_i v_i l_i / n,
divided by the batch size n and not by sum_i v_i; v is constant under differentiation. A
curriculum is either predefined (below) or a network, the mentor. The mentor is fitted
to a predefined curriculum (MentorNet-PD) or to labels that are known to be right or
wrong (MentorNet-DD), see `network` and `fitting`.

A training step of the student, as in the released code:

    e = floor(100 step / num_steps)
    m <- decay m + (1 - decay) percentile_p(losses of the batch), m = 0 at first
    v = curriculum(l, l - m, label, e), or 1 during burn-in
    v = 0 for all but floor(n (1 - rate(e))) random examples

Differences between the released code and the paper, as far as we know the paper's text:
the paper samples examples by v, whereas the code uses v as weights and drops examples
at random; the code scales weight decay by the mean of v (`weight_decay`); and its hard
mining keeps every example with a label above 0 (`positive_labels`).

References:
  Jiang, Zhou, Leung, Li, Fei-Fei, "MentorNet: Learning Data-Driven Curriculum
  for Very Deep Neural Networks on Corrupted Labels", ICML 2018, eq. 1 and 7,
  algorithm 1, arXiv:1712.05055.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

# (losses [B], differences [B], labels [B], epoch percent []) -> weights [B]. Some
# curricula are differentiable in the losses; apply `stop_gradient` to the weights.
Curriculum = Callable[[Any, Any, Any, Any], Any]
# (rate, number of epoch percents) in order; the numbers sum to 100.
Schedule = Sequence[tuple[float, int]]
NO_DROPOUT: Schedule = ((0.0, 100),)
# This number is folded into the key of the step, so that example dropout and the
# network draw different random numbers.
_DROPOUT_KEY = 0x6D656E74


def uniform(
  losses: Any, differences: Any = None, labels: Any = None, epoch: Any = None
) -> Any:
  """Weight 1 for every example, [B]."""
  del differences, labels, epoch
  return jnp.ones_like(losses)


def self_paced(
  losses: Any, differences: Any, labels: Any = None, epoch: Any = None
) -> Any:
  """1 if d <= 0 and 0 otherwise [eq. 7 with lambda_2 = 0]; [B]."""
  del labels, epoch
  return _unless_nan(differences <= 0, losses, differences)


def hard(
  losses: Any,
  differences: Any,
  labels: Any = None,
  epoch: Any = None,
  *,
  positive_labels: bool = False,
) -> Any:
  """1 if d >= 0 and 0 otherwise: hard example mining; [B].

  Args:
    losses: [B].
    differences: [B].
    labels: [B]; needed only with `positive_labels`.
    epoch: not used.
    positive_labels: whether the weight is also 1 if the label is above 0, as in the
      released code. In that code the labels are 0 (background) or 1, and always 0 in
      training. With the labels of a classifier of C classes, this exempts all classes
      except class 0 from mining.

  Raises:
    InputError: `positive_labels` without labels.
  """
  del epoch
  kept = differences >= 0
  if positive_labels:
    if labels is None:
      raise base.InputError("hard: positive_labels=True needs labels.")
    kept = kept | (labels > 0)
  return _unless_nan(kept, losses, differences)


def _unless_nan(kept, losses, differences):
  """1 if `kept` and 0 otherwise; a NaN difference gives NaN, so that it is noticed."""
  dtype = jnp.asarray(losses).dtype
  differences = jnp.asarray(differences, dtype)
  return jnp.where(jnp.isnan(differences), differences, kept.astype(dtype))


def focal(
  losses: Any,
  differences: Any = None,
  labels: Any = None,
  epoch: Any = None,
  *,
  gamma: float = 2.0,
) -> Any:
  """(1 - exp(-l))^gamma, the factor of the focal loss for a cross-entropy l; [B].

  Raises:
    InputError: `gamma` is negative.
  """
  del differences, labels, epoch
  gamma = base.setting(gamma, jnp.result_type(losses))
  if not base.is_traced(gamma) and not gamma >= 0:
    raise base.InputError(f"focal: gamma={gamma} must be at least 0.")
  return (-jnp.expm1(-jnp.maximum(losses, 0))) ** gamma


def spcl_linear(
  losses: Any,
  differences: Any,
  labels: Any = None,
  epoch: Any = None,
  *,
  gamma: float = 1.0,
) -> Any:
  """1 - d / gamma, clipped to [0, 1] [eq. 7; gamma is its lambda_2 > 0]; [B].

  Raises:
    InputError: `gamma` is not positive.
  """
  del losses, labels, epoch
  gamma = base.setting(gamma, jnp.result_type(differences))
  if not base.is_traced(gamma) and not gamma > 0:
    raise base.InputError(f"spcl_linear: gamma={gamma} must be more than 0.")
  return jnp.clip(1 - differences / gamma, 0, 1)


def pd_mixture(losses: Any, differences: Any, labels: Any, epoch: Any) -> Any:
  """MentorNet-PD's target: 1 up to e = 18, self-paced to e = 89, then SPCL; [B]."""
  features = (losses, differences, labels, epoch)
  late = jnp.where(epoch < 90, self_paced(*features), spcl_linear(*features))
  return jnp.where(epoch <= 18, uniform(*features), late)


CURRICULA: dict[str, Curriculum] = {
  "self_paced": self_paced,
  "hard": hard,
  "focal": focal,
  "spcl": spcl_linear,
  "pd": pd_mixture,
}


def moving_percentile(
  previous: Any,
  losses: Any,
  percentile: float,
  *,
  decay: float = 0.5,
  axis_name: base.AxisName = None,
) -> base.Array:
  """decay * previous + (1 - decay) * percentile of the global batch; [].

  Args:
    previous: the previous value, 0 before the first batch.
    losses: this device's losses [B], held constant.
    percentile: from 0 to 100. It selects the nearest of the sorted losses (the lower
      one at a tie), without interpolation. The result is NaN if the selected loss is
      infinite, or a loss is NaN.
    decay: decay rate; 0.5 in the released CIFAR program, which calls a function with a
      default of 0.9.
    axis_name: mapped axis over which the batch is sharded.

  Raises:
    InputError: losses do not have shape [B] or are empty, `decay` is out of range, or
      `check_percentile` refuses `percentile`.

  >>> import jax.numpy as jnp
  >>> print(moving_percentile(0., jnp.array([4., 1., 3., 2.]), 75.))
  1.5
  """
  base.check_vector("losses", losses)
  base.check_not_empty("losses", losses)
  _check_range("decay", decay, 0, 1)
  check_percentile(percentile)
  dtype = base.accumulator_dtype(losses.dtype)
  decay = base.setting(decay, dtype)
  all_losses = base.unsharded(base.gather(losses, axis_name))
  ordered = jnp.sort(jax.lax.stop_gradient(all_losses).astype(dtype))
  # If the percentile is an integer, the product is exact, and so are ties.
  nearest = math.ceil((float(percentile) * (ordered.size - 1) - 50) / 100)
  # NaN is sorted to the end, so a percentile below 100 would ignore it.
  value = jnp.where(jnp.isnan(ordered[-1]), ordered[-1], ordered[nearest])
  # An infinite average would stay infinite, and later losses would all be below it.
  value = value * jnp.sqrt(jnp.where(jnp.isinf(value), -1.0, 1.0)).astype(dtype)
  previous = jnp.asarray(previous, dtype)
  # The value is equal on every device; the maximum marks it as equal for `shard_map`.
  return decay * previous + (1 - decay) * base.pmax(value, axis_name)


def check_percentile(percentile: float) -> None:
  """Raises InputError for a percentile outside [0, 100], in (0, 1), or traced.

  A percentile in (0, 1) is likely a fraction, such as 0.75 instead of 75.
  """
  percentile = base.known_setting("percentile", percentile)
  _check_range("percentile", percentile, 0, 100)
  if 0 < percentile < 1:
    raise base.InputError(
      f"percentile={percentile} must be a number from 0 to 100, not a fraction: use"
      f" {100 * percentile:g}."
    )


def epoch_percent(step: Any, num_steps: int) -> base.Array:
  """floor(100 step / num_steps), at most 99; int32 [].

  Args:
    step: updates done so far, one integer of any type; may be traced.
    num_steps: length of the run, a Python integer.

  Raises:
    InputError: `step` is not a single integer, or `num_steps` not a positive one.

  >>> print(epoch_percent(25_000_000, 30_000_000))
  83
  """
  num_steps = base.check_integer("epoch_percent: num_steps", num_steps)
  step = base.host_or_jax_array(step)
  if step.shape:
    raise base.InputError(
      f"epoch_percent: step must be one integer; got an array of shape {step.shape}."
      " Use jax.vmap for several steps."
    )
  if not jnp.issubdtype(step.dtype, jnp.integer):
    raise base.InputError(
      f"epoch_percent: step must be an integer; got {step.dtype}. Convert it with"
      " step.astype(int)."
    )
  if not isinstance(step, jax.Array):
    # A Python or NumPy integer may have more bits than JAX keeps, so the percent is
    # computed on the host.
    return jnp.asarray(min(max(100 * int(step) // num_steps, 0), 99), jnp.int32)
  # Compare with the first step of each percent, because 100 * step overflows int32.
  # Percents that start above the largest number of the type cannot be reached.
  firsts = (-(-k * num_steps // 100) for k in range(1, 100))
  largest = np.iinfo(step.dtype).max
  reachable = np.array([first for first in firsts if first <= largest], step.dtype)
  return jnp.sum(step >= reachable).astype(jnp.int32)


def example_dropout(
  key: base.Array, weights: Any, rate: Any, *, axis_name: base.AxisName = None
) -> base.Array:
  """Keeps floor(n (1 - rate)) random weights of the global batch; the others become 0.

  Args:
    key: typed PRNG key, the same on every device.
    weights: this device's weights [B].
    rate: share to drop, in [0, 1]; may be traced.
    axis_name: mapped axis over which the batch is sharded.
  """
  size = base.global_size(weights.shape[0], axis_name)
  # The offset prevents 10 (1 - 0.9) = 0.99999998 from being rounded down to 0.
  num_kept = jnp.floor(size * (1 - jnp.asarray(rate, jnp.float32)) + 1e-3)
  order = jax.random.permutation(key, size)
  kept = order < num_kept.astype(order.dtype)
  kept = base.sharded_like(base.local_slice(kept, axis_name), weights)
  return jnp.where(kept, weights, jnp.zeros_like(weights))


def dropout_rates(schedule: Schedule) -> np.ndarray:
  """The dropout rate of every epoch percent, float32 [100].

  Raises:
    InputError: a rate is outside [0, 1], a number is negative, or the numbers do not
      sum to 100.
  """
  for rate, _ in schedule:
    _check_range("dropout: rate", rate, 0, 1)
  counts = [count for _, count in schedule]
  if sum(counts) != 100 or min(counts) < 0:
    raise base.InputError(
      f"dropout: the numbers of epoch percents {counts} must add up to 100, and"
      " none may be negative."
    )
  return np.repeat(np.array([rate for rate, _ in schedule], np.float32), counts)


class Preset(NamedTuple):
  """Settings of a curriculum in the released commands for CIFAR; see `preset`.

  Attributes:
    percentiles: percentiles for 20%, 40% and 80% noise.
    burn_in: v is 1 while the epoch percent is below burn_in - 1; 0 disables the
      burn-in.
    fixed_epoch_after_burn_in: whether the epoch percent stops at `burn_in`.
    dropout: schedule of the example dropout.
  """

  percentiles: tuple[float, float, float]
  burn_in: int
  fixed_epoch_after_burn_in: bool
  dropout: Schedule


_DD_PERCENTILES = (80.0, 60.0, 50.0)
_EARLY_DROPOUT = ((0.5, 17), (0.05, 83))
PRESETS = {
  "self_paced": Preset((70.0,) * 3, 0, False, NO_DROPOUT),
  "focal": Preset((70.0,) * 3, 0, False, NO_DROPOUT),
  "pd": Preset((75.0, 75.0, 50.0), 0, False, _EARLY_DROPOUT),
  "dd_resnet": Preset(_DD_PERCENTILES, 18, True, ((0.5, 17), (0.05, 78), (0.9, 5))),
  "dd_inception": Preset(_DD_PERCENTILES, 18, True, _EARLY_DROPOUT),
}


def preset(name: str, noise_fraction: float) -> dict[str, Any]:
  """Keyword arguments of `mentornet` from the released CIFAR commands.

  The last segment of "dd_resnet"'s dropout schedule is reached neither in the release
  nor here, because the epoch percent stops at 18.

  Args:
    name: a key of `PRESETS`.
    noise_fraction: share of wrong labels. The settings are those of the nearest of 0.2,
      0.4 and 0.8 (the lower one at a tie).

  Raises:
    InputError: there is no such preset.
  """
  if name not in PRESETS:
    raise base.InputError(f"preset={name!r}: choose among {', '.join(PRESETS)}.")
  percentiles, burn_in, is_fixed, dropout = PRESETS[name]
  # The differences are rounded, because 0.6 - 0.4 and 0.8 - 0.6 differ in floating
  # point.
  gaps = [round(abs(float(noise_fraction) - level), 6) for level in (0.2, 0.4, 0.8)]
  return {
    "percentile": percentiles[gaps.index(min(gaps))],
    "decay": 0.5,
    "burn_in": burn_in,
    "fixed_epoch_after_burn_in": is_fixed,
    "dropout": dropout,
  }


def mentornet(
  weights_fn: Curriculum,
  *,
  percentile: float = 75.0,
  decay: float = 0.5,
  burn_in: int = 0,
  fixed_epoch_after_burn_in: bool = False,
  dropout: Schedule = NO_DROPOUT,
  weight_decay: float = 0.0,
) -> base.Method:
  """MentorNet for the training loop: trains a student under a curriculum.

  Args:
    weights_fn: a curriculum of this file or a `network.Mentor`.
    percentile: percentile of the batch's losses, from 0 to 100.
    decay: decay rate of `moving_percentile`.
    burn_in: v is 1 while e < burn_in - 1.
    fixed_epoch_after_burn_in: whether e stops at `burn_in`, for both the curriculum and
      the dropout schedule.
    dropout: schedule of the example dropout.
    weight_decay: adds weight_decay * mean(v) * p to the gradient of every parameter p
      with more than one axis, as the released code does; `losses` do not include it.
      With 0, weight decay is left to the optimizer, which does not scale it by v.

  Returns:
    A `base.Method` whose state is the moving percentile, float32 [].

  Raises:
    InputError: a setting is out of range, or (when the step is traced) the mentor was
      fitted for a different number of classes.
  """
  check_percentile(percentile)
  _check_range("decay", decay, 0, 1)
  _check_range("burn_in", burn_in, 0, 100)
  weight_decay = base.setting(weight_decay)
  rates = dropout_rates(dropout)
  num_classes = getattr(weights_fn, "num_classes", None)

  def curriculum(losses, labels, moving, step, problem, key):
    epoch = epoch_percent(step, problem.num_steps)
    losses = losses.astype(moving.dtype)  # Half precision is computed in float32.
    if fixed_epoch_after_burn_in:
      epoch = jnp.minimum(epoch, burn_in)
    v = weights_fn(losses, losses - moving, labels, epoch)
    v = jnp.where(epoch < burn_in - 1, jnp.ones_like(losses), v)
    rate = jnp.asarray(rates)[epoch]
    return example_dropout(key, v, rate, axis_name=problem.axis_name)

  def gradients(state, problem, inputs):
    if num_classes not in (None, problem.num_classes):
      raise base.InputError(class_mismatch(num_classes, problem.num_classes))
    linearized = problem.linearize_batch(inputs)
    losses = linearized.losses
    size = base.global_size(losses.shape[0], problem.axis_name)
    moving = moving_percentile(
      state, losses, percentile, decay=decay, axis_name=problem.axis_name
    )
    labels, key = inputs.batch["label"], jax.random.fold_in(inputs.key, _DROPOUT_KEY)
    v = curriculum(losses, labels, moving, inputs.step, problem, key)
    weights = (v / size).astype(losses.dtype)
    mean_weight = base.psum(jnp.sum(weights), problem.axis_name)
    grads = base.summed_gradient(linearized, weights, problem.axis_name)
    if base.is_traced(weight_decay) or weight_decay:
      grads = _add_decay(grads, inputs.params, weight_decay * mean_weight)
    metrics = {"percentile": moving, "mean_weight": mean_weight}
    # The state keeps its type, even for losses in float64.
    moving = moving.astype(state.dtype)
    return base.Gradients(grads, weights, losses, linearized.aux, metrics), moving

  return base.Method(gradients, init=lambda *_: jnp.zeros((), jnp.float32))


def class_mismatch(num_classes: int, expected: int) -> str:
  """Error message for a mentor that was fitted for a different number of classes."""
  return (
    f"the mentor was fitted for the labels of {num_classes} classes, but the data have"
    f" {expected}: fit one to losses of these data, or without labels for any number of"
    " classes, see experiments.mentornet_pretrain."
  )


def _add_decay(grads, params, decay):
  def add(g, p):
    if p.ndim <= 1:
      return g
    # The decay has the type of the losses, which may differ from that of the gradient.
    dtype = base.accumulator_dtype(p.dtype)
    return g + (decay.astype(dtype) * p.astype(dtype)).astype(g.dtype)

  return jax.tree.map(add, grads, params)


def _check_range(name, value, low, high):
  value = base.setting(value)
  if not base.is_traced(value) and not low <= value <= high:
    raise base.InputError(f"{name}={value} must lie between {low} and {high}.")
