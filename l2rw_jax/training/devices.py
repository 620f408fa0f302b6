"""Where the step meets the machine: the only pmap.

Arrays of a run carry two leading axes, `[D, R, ...]`: D local devices and R runs
side by side (splits of the data, seeds), trained by one compiled step.
"""

from collections.abc import Callable
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
    num_devices: how many; if None, the most that divide the batch evenly.
    batch_size: B.

  Raises:
    InputError: there are not that many, or the batch does not divide among them.
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
  """`[...]` leaves to `[D, ...]`, one copy on every device; for a moment, two."""
  return _copier(tuple(devices))(np.arange(len(devices)), tree)


@functools.lru_cache(maxsize=8)
def _copier(devices):
  # Over the step's own axis: given arrays of another one, the step would be
  # compiled a second time when it first meets its own output.
  return jax.pmap(
    lambda _, x: x, axis_name=AXIS_NAME, in_axes=(0, None), devices=devices
  )


def unreplicate(tree: base.PyTree) -> base.PyTree:
  """The first device's copy of `[D, ...]` leaves, without gathering the rest."""
  return take(jax.tree.map(lambda x: x.addressable_shards[0].data, tree), 0)


@jax.jit
def take(tree: base.PyTree, index: int) -> base.PyTree:
  """Row `index` of every leaf; one program, where each leaf would be one a shape."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
  )


def shard(rows: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
  """`[..., B]` to `[D, ..., B / D]` on the host, in order."""
  *shape, size = rows.shape
  rows = rows.reshape(*shape, len(devices), size // len(devices))
  return np.moveaxis(rows, -2, 0)


def repeat(rows: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
  """`[..., M]` to `[D, ..., M]` on the host, the same for every device."""
  return np.broadcast_to(rows, (len(devices), *rows.shape))


def unshard(values: Any) -> np.ndarray:
  """`[D, ..., B / D]` to `[..., B]` on the host; the inverse of `shard`."""
  values = np.moveaxis(np.asarray(values), 0, -2)
  return values.reshape(*values.shape[:-2], -1)


def over_runs(fun: Callable[..., Any], num_runs: int) -> Callable[..., Any]:
  """Maps `fun` over the leading axis R of all its arguments.

  One run is not vmapped but unpacked: XLA:CPU takes a slower path for a
  convolution whose kernel has a batch axis, even of size one.
  """
  if num_runs > 1:
    return jax.vmap(fun)

  def single(*args):
    result = fun(*jax.tree.map(lambda x: x[0], args))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

  return single


def alone(fun: Callable[..., Any]) -> Callable[..., Any]:
  """`fun` as the step's single device would call it, for a look from outside.

  Within, `AXIS_NAME` is an axis of size one, for networks that share the statistics
  of BatchNorm over it.
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
