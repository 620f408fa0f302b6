"""Optimizers and learning-rate schedules of the papers' experiments."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.lib import settings as settings_lib
from experiments.lib.settings import preset_flag
from l2rw_jax import base
from l2rw_jax.training import validation

_WARMUP_LEVELS = 5
SCHEDULES = ("constant", "cosine")


def fine_tuning_steps(num_steps: int) -> int:
  """The number of fine-tuning steps at the end of a run of `num_steps` steps."""
  return max(1, num_steps // 10)


def _restarted(
  make: Callable[[int], optax.Schedule], num_steps: int, tuned_steps: int
) -> optax.Schedule:
  """A schedule that starts again for the last `tuned_steps` steps of a run."""
  first = num_steps - tuned_steps
  if not tuned_steps or not first:
    return make(num_steps)
  return optax.join_schedules([make(first), make(tuned_steps)], [first])


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flag --schedule, for scripts whose presets have schedules."""

  schedule: str | None = preset_flag(choices=SCHEDULES, recorded_with="schedule")

  def scheduled(self, optimizer: "OptimizerConfig") -> "OptimizerConfig":
    """`optimizer` with the schedule of --schedule; the warm-up stays the same."""
    if self.schedule is None:
      return optimizer
    return dataclasses.replace(
      optimizer, drops=(), cosine=self.schedule == "cosine", plateau_steps=None
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """An optax optimizer and its schedule, in shares of the run.

  Attributes:
    name: "sgd" or "adam".
    learning_rate: the highest learning rate.
    momentum: momentum of SGD.
    nesterov: whether the momentum is Nesterov's.
    weight_decay: multiple of the parameters that is added to the gradient before
      momentum.
    drops: pairs of a share of the run and a factor by which the learning rate is then
      multiplied.
    decay_all: whether biases and BatchNorm parameters decay, too, as with PyTorch's
      optimizers. Otherwise only kernels decay, as with the L2 losses of released
      TensorFlow code.
    warmup: share of the run in which the learning rate rises in five equal
      increments (in LDAM's code, one for each of the first five epochs).
    cosine: whether the learning rate falls to 0 as a cosine instead of by drops.
    plateau_steps: number of updates in an epoch, for a learning rate that falls to a
      tenth (but not below 1e-5) whenever the loss of the examples `plateau_data` has
      not fallen for more than 5 epochs, as in BARE's released code. None disables this
      rule.
    plateau_data: "validation" or "meta", the examples whose loss is watched.
    tuned_steps: number of fine-tuning updates at the end of the run, for which the
      schedule starts again; 0 if it does not start again.
  """

  name: str = "sgd"
  learning_rate: float = 0.1
  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 0.0
  drops: tuple[tuple[float, float], ...] = ()
  decay_all: bool = True
  warmup: float = 0.0
  cosine: bool = False
  plateau_steps: int | None = None
  plateau_data: str = "validation"
  tuned_steps: int = 0

  def for_method(self, name: str, num_steps: int) -> "OptimizerConfig":
    """The optimizer of a method in a run of `num_steps` updates.

    `fine_tuning_restarted` starts the schedule again for the fine-tuning updates. At
    the end of a cosine, or of drops to a hundredth, the learning rate would otherwise
    be too low for them. With a constant learning rate, the method is the same as
    `fine_tuning`.

    Raises:
      InputError: the learning rate depends on a loss that is watched, so that it
        cannot start again.
    """
    if name != "fine_tuning_restarted":
      return self
    if self.plateau_steps:
      raise base.InputError(
        "--methods=fine_tuning_restarted cannot start a --plateau schedule again:"
        " choose fine_tuning, or another schedule."
      )
    return dataclasses.replace(self, tuned_steps=fine_tuning_steps(num_steps))

  @functools.cache  # noqa: B019  # The loop compiles again for a new function.
  def schedule(self, num_steps: int) -> optax.Schedule:
    """`step -> learning rate`."""
    return _restarted(self._one_schedule, num_steps, self.tuned_steps)

  def _one_schedule(self, num_steps: int) -> optax.Schedule:
    boundaries: dict[int, float] = {}
    for share, factor in self.drops:  # In a short run, drops may be at the same step.
      step = round(share * num_steps)
      boundaries[step] = boundaries.get(step, 1.0) * factor
    after = optax.piecewise_constant_schedule(self.learning_rate, boundaries)
    if self.cosine:
      after = optax.cosine_decay_schedule(self.learning_rate, num_steps)
    length = round(self.warmup * num_steps)
    if not length:
      return after

    def warmed_up(step):
      # Clip the step at the end of the warm-up: the product could overflow later.
      level = jnp.minimum(step, length) * _WARMUP_LEVELS // length + 1
      level = jnp.minimum(level, _WARMUP_LEVELS)
      return after(step) * level / _WARMUP_LEVELS

    return warmed_up

  @functools.cache  # noqa: B019
  def optimizer(self, num_steps: int) -> optax.GradientTransformation:
    """The optax optimizer."""
    schedule = self.schedule(num_steps)
    if self.name == "adam":
      step = optax.adam(schedule)
    else:
      step = optax.sgd(schedule, self.momentum or None, nesterov=self.nesterov)
    if self.plateau_steps:
      least = min(1.0, 1e-5 / self.learning_rate)
      step = validation.reduce_on_plateau(
        step, self.plateau_steps, factor=0.1, patience=5, min_scale=least
      )
    if not self.weight_decay:
      return step
    mask = None if self.decay_all else _kernels
    return optax.chain(optax.add_decayed_weights(self.weight_decay, mask), step)


def _kernels(params: Any) -> Any:
  return jax.tree.map(lambda x: x.ndim > 1, params)
