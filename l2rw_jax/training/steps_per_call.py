"""The number of steps in a call of the compiled function."""

import jax

from l2rw_jax.training import config as config_lib

# On a CPU, the overhead of a call is less than a millisecond. Several steps per call
# therefore speed up only steps of a few milliseconds or less, but always need the
# compilation of a second program.
_ON_CPU, _ON_ACCELERATORS = 1, 20


def most(
  config: config_lib.Config, devices: list[jax.Device], is_streamed: bool = False
) -> int:
  """K, the number of steps in a full call.

  K is at most the smallest interval after which the host logs, evaluates or saves.

  Args:
    config: the intervals and the requested number of steps.
    devices: the devices that train.
    is_streamed: whether examples are kept on the host. In this case K is 1, because
      devices queue calls, and each call stores the examples of all its steps.
  """
  if is_streamed:
    return 1
  requested = config.steps_per_call
  if requested is None:
    requested = _ON_CPU if devices[0].platform == "cpu" else _ON_ACCELERATORS
  return min(requested, *config.intervals)


def length(
  config: config_lib.Config, step: int, most: int, epoch: tuple[int, int] | None
) -> int:
  """Number of steps in the next call: that of a full call, or 1.

  A call never continues past a step after which the host logs, evaluates or saves, so
  that neither the results nor the checkpoints depend on `most`, except for rounding. If
  fewer than `most` steps remain before such a step, they are taken one by one. If all
  epochs have the same length, two compiled programs are therefore enough, and no step
  is computed and then discarded.

  Args:
    config: the intervals.
    step: number of updates so far.
    most: number of steps in a full call. If an epoch is shorter, the whole epoch is a
      full call.
    epoch: number of steps left in the current epoch, and number of steps in the whole
      epoch, if the host has to act between epochs; otherwise None.
  """
  free = min(every - step % every for every in config.intervals)
  free = min(free, config.num_steps - step)
  if epoch is not None:
    steps_left, epoch_length = epoch
    free, most = min(free, steps_left), min(most, epoch_length)
  return most if free >= most else 1
