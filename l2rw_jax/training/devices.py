"""The devices that train, the layout of arrays on them, and the only pmap.

Arrays on the devices have two leading axes, `[D, R, ...]`: D local devices and R runs
(splits of the data, seeds) that one compiled step trains side by side. Rows and
outputs of K steps have a third one, `[D, R, K, ...]`. On the host there is no device
axis: the batch axis holds the examples of all devices, in order.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

AXIS_NAME = "devices"


def choose(num_devices: int | None, batch_size: int) -> list[jax.Device]:
  """The first `num_devices` local devices.

  Args:
    num_devices: how many; if None, the largest number that divides the batch size.
    batch_size: B.

  Raises:
    InputError: the machine has fewer devices, or their number does not divide the
      batch size.
  """
  available = jax.local_devices()
  if num_devices is None:
    most = min(len(available), batch_size)
    return available[: next(n for n in range(most, 0, -1) if batch_size % n == 0)]
  if not 1 <= num_devices <= len(available):
    raise base.InputError(
      f"--num_devices={num_devices}: this machine has {len(available)}"
      f" {available[0].platform} device(s)."
    )
  if batch_size % num_devices:
    raise base.InputError(
      f"--batch_size={batch_size} does not divide among --num_devices={num_devices};"
      " choose a multiple, or fewer devices."
    )
  return available[:num_devices]


def replicate(tree: base.PyTree, devices: list[jax.Device]) -> base.PyTree:
  """Copies `[...]` leaves to every device, `[D, ...]`; needs room for two copies."""
  return _copier(tuple(devices))(np.arange(len(devices)), tree)


@functools.lru_cache(maxsize=8)
def _copier(devices):
  # This uses the axis of the step: with arrays of another axis, the step would be
  # compiled a second time when it receives its first output.
  return jax.pmap(
    lambda _, x: x, axis_name=AXIS_NAME, in_axes=(0, None), devices=devices
  )


def unreplicate(tree: base.PyTree) -> base.PyTree:
  """The first device's copy of `[D, ...]` leaves, without gathering the rest."""
  return take(jax.tree.map(lambda x: x.addressable_shards[0].data, tree), 0)


@jax.jit
def take(tree: base.PyTree, index: int) -> base.PyTree:
  """Row `index` of every leaf, in one program instead of one for every shape."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
  )


def shard(rows: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
  """Splits `[..., B]` into `[D, ..., B / D]` on the host, in order."""
  *shape, size = rows.shape
  rows = rows.reshape(*shape, len(devices), size // len(devices))
  return np.moveaxis(rows, -2, 0)


def repeat(rows: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
  """Repeats `[..., M]` for every device, `[D, ..., M]`, on the host."""
  return np.broadcast_to(rows, (len(devices), *rows.shape))


def spread(steps: Sequence[Any], devices: list[jax.Device]) -> np.ndarray:
  """Assigns the rows that K steps take to the devices.

  Args:
    steps: for each step, rows [R, B].
    devices: D devices.

  Returns:
    Rows, int32 [D, R, K, B / D]. If B is not divisible by D, every device takes all
    of them, [D, R, K, B]: a mean over devices that hold the same examples is the
    same mean. (Ten meta examples need not be divisible by eight devices.)
  """
  rows = np.stack(steps, axis=1).astype(np.int32)  # [R, K, B]
  return (repeat if rows.shape[-1] % len(devices) else shard)(rows, devices)


def unshard(values: Any) -> np.ndarray:
  """Joins `[D, ..., B / D]` to `[..., B]` on the host; the inverse of `shard`."""
  values = np.moveaxis(np.asarray(values), 0, -2)
  return values.reshape(*values.shape[:-2], -1)


def over_runs(fun: Callable[..., Any], num_runs: int) -> Callable[..., Any]:
  """Maps `fun` over the leading axis R of all its arguments.

  A single run is not mapped: its axis is removed. XLA:CPU takes a slower path for a
  convolution whose kernel has a batch axis, even if its size is one.
  """
  if num_runs > 1:
    return jax.vmap(fun)

  def single(*args):
    result = fun(*jax.tree.map(lambda x: x[0], args))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

  return single


def on_one_device(fun: Callable[..., Any]) -> Callable[..., Any]:
  """`fun` with `AXIS_NAME` bound to an axis of size one.

  This makes networks that share BatchNorm statistics over `AXIS_NAME` usable outside
  of the step.
  """

  def call(*args):
    one = jax.vmap(lambda _: fun(*args), axis_name=AXIS_NAME)(jnp.zeros(1))
    return jax.tree.map(lambda x: x[0], one)

  return call


def pmap_step(
  step: Callable[..., Any], num_runs: int, devices: list[jax.Device]
) -> jax.stages.Wrapped:
  """Compiles `step` for `[D, R, ...]` arguments; the first one is donated."""
  return jax.pmap(
    over_runs(step, num_runs),
    axis_name=AXIS_NAME,
    devices=devices,
    donate_argnums=(0,),
  )
