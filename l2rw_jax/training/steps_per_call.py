"""How many steps are sent to the devices at once."""

import jax

from l2rw_jax.training import config as config_lib

# On XLA:CPU a convolution inside a loop takes 6 to 14 times as long as one outside.
_ON_CPU, _ON_ACCELERATORS = 1, 20


def most(
  config: config_lib.Config, devices: list[jax.Device], streamed: bool = False
) -> int:
  """K, the steps of a full dispatch: no more than the host lets pass unseen.

  Args:
    config: when the host looks, and what it asks for.
    devices: where the steps are taken.
    streamed: whether each dispatch brings examples along. Then it is one step, for
      devices queue so many dispatches, each with all its examples.
  """
  if streamed:
    return 1
  asked = config.steps_per_call
  if asked is None:
    asked = _ON_CPU if devices[0].platform == "cpu" else _ON_ACCELERATORS
  return min(asked, *_looks(config))


def length(
  config: config_lib.Config, step: int, most: int, epoch: tuple[int, int] | None
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
    most: steps of a full dispatch; an epoch, where that is shorter.
    epoch: where the method looks at the training set between epochs, the steps left
      of this one and the steps of the whole; else None.
  """
  free = min(every - step % every for every in _looks(config))
  free = min(free, config.num_steps - step)
  if epoch is not None:
    left, whole = epoch
    free, most = min(free, left), min(most, whole)
  return most if free >= most else 1


def _looks(config):
  return config.log_every, config.eval_every, config.checkpoint_every
