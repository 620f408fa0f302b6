"""Optimizers and learning-rate schedules of the papers' experiments."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax.training import validation

_STAIRS = 5
SCHEDULES = ("constant", "cosine")


@functools.cache  # The training loop compiles again for a new function.
def schedule(name: str, learning_rate: float, num_steps: int) -> optax.ScalarOrSchedule:
  """The learning rate for a value of `--schedule`.

  Args:
    name: one of `SCHEDULES`; "cosine" falls to 0 at the last step.
    learning_rate: learning rate at the start.
    num_steps: number of steps of the run.
  """
  if name == "constant":
    return learning_rate
  return optax.cosine_decay_schedule(learning_rate, num_steps)


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flag --schedule, for scripts whose presets have schedules."""

  schedule: str | None = flag(None, unset="the preset's", choices=SCHEDULES)

  def record(self) -> dict[str, Any]:
    """Like the base class, but without --schedule if it is not set.

    Folders of versions without --schedule therefore still match.
    """
    entries = super().record()
    if self.schedule is None:
      del entries["schedule"]
    return entries

  def scheduled(self, optimizer: "OptimizerConfig") -> "OptimizerConfig":
    """`optimizer` with the schedule of --schedule; it replaces all but the warm-up."""
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
    weight_decay: factor of the L2 penalty, which is added to the gradient before
      momentum.
    drops: pairs of a share of the run and a factor by which the learning rate is then
      multiplied.
    decay_all: whether biases and BatchNorm decay too, as with PyTorch's optimizers;
      otherwise only kernels decay, as with the L2 losses of released TensorFlow code.
    warmup: share of the run in which the learning rate rises in five equal steps
      (in LDAM's code, one in each of the first five epochs).
    cosine: whether the learning rate falls to 0 as a cosine instead of by drops.
    plateau_steps: number of updates in an epoch. The learning rate then falls to a
      tenth (but not below 1e-5) whenever the validation loss has not fallen for more
      than 5 epochs, as in BARE's released code. None disables this rule.
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

  @functools.cache  # noqa: B019  # frozen; the loop compiles again for new functions
  def schedule(self, num_steps: int) -> optax.Schedule:
    """`step -> learning rate`."""
    boundaries = {round(share * num_steps): factor for share, factor in self.drops}
    after = optax.piecewise_constant_schedule(self.learning_rate, boundaries)
    if self.cosine:
      after = optax.cosine_decay_schedule(self.learning_rate, num_steps)
    length = round(self.warmup * num_steps)
    if not length:
      return after

    def climbing(step):
      # Clip the step at the warm-up, because the product would overflow in long runs.
      stair = jnp.minimum(step, length) * _STAIRS // length + 1
      stair = jnp.minimum(stair, _STAIRS)
      return after(step) * stair / _STAIRS

    return climbing

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
