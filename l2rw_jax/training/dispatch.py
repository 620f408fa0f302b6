"""How many steps are sent to the devices at once."""

import jax

from l2rw_jax.training import config as config_lib

# On XLA:CPU a convolution inside a loop takes 6 to 14 times as long as one outside.
_ON_CPU, _ON_ACCELERATORS = 1, 20


def most(config: config_lib.Config, devices: list[jax.Device]) -> int:
  """K, the steps of a full dispatch: no more than the host lets pass unseen."""
  asked = config.steps_per_dispatch
  if asked is None:
    asked = _ON_CPU if devices[0].platform == "cpu" else _ON_ACCELERATORS
  return min(asked, *_looks(config))


def length(
  config: config_lib.Config, step: int, most: int, left_in_epoch: int | None
) -> int:
  """Steps of the next dispatch: `most` of them, or one.

  None goes past a step after which the host looks at the run, so that neither
  results nor the points to resume from depend on `most`. What is left before such
  a step and does not fill a dispatch is done one by one: two programs serve all
  lengths, and no step is computed in vain, as the rest of a masked dispatch would
  be.

  Args:
    config: when the host looks.
    step: updates done.
    most: steps of a full dispatch.
    left_in_epoch: steps until the method looks at the training set; None if it
      does not.
  """
  free = min(every - step % every for every in _looks(config))
  free = min(free, config.num_steps - step)
  if left_in_epoch is not None:
    free = min(free, left_in_epoch)
  return most if free >= most else 1


def _looks(config):
  return config.log_every, config.eval_every, config.checkpoint_every
