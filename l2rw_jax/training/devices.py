"""The devices that train, the layout of arrays on them, and the only use of pmap.

Arrays on the devices have two leading axes, `[D, R, ...]`: D devices and R runs
(splits of the data, seeds) that one compiled step trains side by side. Rows and
outputs of K steps have a third one, `[D, R, K, ...]`. Arrays on the host have no device
axis: their batch axis contains the examples of all devices, in order.

With several processes, a step runs on the devices of all processes, in the order of the
processes, and D counts the devices of this process. `jax.shard_map` runs the same
program as `jax.pmap`. JAX no longer develops pmap, and since version 0.8 implements it
with shard_map. With several processes, pmap converts all arguments and results of every
call between arrays of this process and arrays of all processes. If shard_map is used
directly, the state remains an array of all processes.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import processes

AXIS_NAME = "devices"
# Ways to map a step over devices.
MAPS = ("pmap", "shard_map")


def choose(num_devices: int | None, batch_size: int) -> list[jax.Device]:
  """The devices that train: those of all processes, in the order of the processes.

  Args:
    num_devices: number of devices of all processes. If None, a single process takes the
      largest number that divides the batch size, and several processes take all.
    batch_size: B.

  Raises:
    InputError: there are fewer devices than `num_devices`, the number of devices that
      would train does not divide the batch size, or processes have or would use
      different numbers of devices.
  """
  if processes.count() > 1:
    return _choose_of_all(num_devices, batch_size)
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
      f"--batch_size={batch_size} is not a multiple of --num_devices={num_devices};"
      " choose a multiple, or fewer devices."
    )
  return available[:num_devices]


def _choose_of_all(num_devices, batch_size):
  by_process: dict[int, list[jax.Device]] = {p: [] for p in range(processes.count())}
  for device in jax.devices():
    by_process[device.process_index].append(device)
  sizes = {process: len(devices) for process, devices in by_process.items()}
  most = len(jax.devices())
  if len(set(sizes.values())) > 1:
    text = ", ".join(f"process {process} has {size}" for process, size in sizes.items())
    raise base.InputError(
      f"every process needs the same number of devices, but {text}."
    )
  total = most if num_devices is None else num_devices
  if not 1 <= total <= most or total % len(sizes):
    raise base.InputError(
      f"--num_devices={total}: the {len(sizes)} processes have {most}"
      f" {jax.devices()[0].platform} devices together; choose a multiple of"
      f" {len(sizes)} up to {most}."
    )
  if batch_size % total:
    raise base.InputError(
      f"--batch_size={batch_size} is not a multiple of the {total} devices of"
      f" {len(sizes)} processes; choose a multiple, or fewer with --num_devices."
    )
  share = total // len(sizes)
  return [device for process in sizes for device in by_process[process][:share]]


def local(devices: Sequence[jax.Device]) -> list[jax.Device]:
  """The devices that belong to this process."""
  return [d for d in devices if d.process_index == processes.index()]


def replicate(tree: base.PyTree, devices: list[jax.Device]) -> base.PyTree:
  """Copies `[...]` leaves to every device, `[D, ...]`; needs memory for two copies."""
  return _copier(tuple(devices))(np.arange(len(local(devices))), tree)


@functools.lru_cache(maxsize=8)
def _copier(devices):
  # Use the axis name of the step. With another name, the sharding of the first state
  # would differ from that of the states that the step returns, and the step would be
  # compiled twice.
  return jax.pmap(
    lambda _, x: x, axis_name=AXIS_NAME, in_axes=(0, None), devices=devices
  )


def unreplicate(tree: base.PyTree, run: int | None = None) -> base.PyTree:
  """The first device's copy of `[D, ...]` leaves, without gathering the rest.

  Args:
    tree: arrays [D, ...].
    run: index of a run. If it is given, the leaves are [D, R, ...], and only this run
      is copied.
  """
  first = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
  return take(first, 0) if run is None else _take_of_first(first, run)


@jax.jit
def take(tree: base.PyTree, index: int) -> base.PyTree:
  """Row `index` of every leaf, in one program instead of one for every shape."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
  )


@jax.jit
def _take_of_first(tree, index):
  return take(take(tree, 0), index)


def shard(rows: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
  """Splits `[..., B]` over all devices, `[len(devices), ..., B / len(devices)]`."""
  *shape, size = rows.shape
  rows = rows.reshape(*shape, len(devices), size // len(devices))
  return np.moveaxis(rows, -2, 0)


def repeat(rows: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
  """Repeats `[..., M]` for all devices, `[len(devices), ..., M]`, on the host."""
  return np.broadcast_to(rows, (len(devices), *rows.shape))


def spread(steps: Sequence[Any], devices: list[jax.Device]) -> np.ndarray:
  """Assigns the rows that K steps use to the devices.

  Args:
    steps: for each step, rows [R, B] of the global batch, the same in every process.
    devices: the devices of all processes, N of them.

  Returns:
    Rows of the D devices of this process, int32 [D, R, K, B / N]. If B is not
    divisible by N (such as ten meta examples on eight devices), every device takes all
    of them, [D, R, K, B]. The mean over the devices then equals the value on each
    device.
  """
  rows = np.stack(steps, axis=1).astype(np.int32)  # [R, K, B]
  parts = (repeat if rows.shape[-1] % len(devices) else shard)(rows, devices)
  first = devices.index(local(devices)[0])
  return parts[first : first + len(local(devices))]


def unshard(values: Any) -> np.ndarray:
  """Joins `[D, ..., B / D]` to `[..., B]` on the host; the inverse of `shard`."""
  values = np.moveaxis(np.asarray(values), 0, -2)
  return values.reshape(*values.shape[:-2], -1)


def first_copy(tree: base.PyTree) -> base.PyTree:
  """The first device's copy of `[D, ...]` leaves that are on the host."""
  return jax.tree.map(lambda x: x[0], tree)


def over_runs(fun: Callable[..., Any], num_runs: int) -> Callable[..., Any]:
  """Maps `fun` over the leading axis R of all its arguments.

  A single run is not mapped. Its axis is removed instead, because XLA:CPU takes a
  slower path for a convolution whose kernel has a batch axis, even of size one.
  """
  if num_runs > 1:
    return jax.vmap(fun)

  def single(*args):
    result = fun(*jax.tree.map(lambda x: x[0], args))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

  return single


def on_one_device(fun: Callable[..., Any]) -> Callable[..., Any]:
  """`fun` with `AXIS_NAME` bound to an axis of size one.

  Networks that share BatchNorm statistics over `AXIS_NAME` can then be used outside of
  the step.
  """

  def call(*args):
    one = jax.vmap(lambda _: fun(*args), axis_name=AXIS_NAME)(jnp.zeros(1))
    return jax.tree.map(lambda x: x[0], one)

  return call


def map_step(
  step: Callable[..., Any],
  num_runs: int,
  devices: list[jax.Device],
  kind: str = "pmap",
) -> Any:
  """Compiles `step` for `[D, R, ...]` arguments; the first one is donated.

  Args:
    step: `(state, ...) -> (state, output)` of one run on one device; `AXIS_NAME`
      names the devices of all processes.
    num_runs: R.
    devices: the devices of all processes.
    kind: one of `MAPS`; both compute the same numbers.

  Returns:
    The compiled step, which has the method `lower` of jitted functions.
  """
  step = over_runs(step, num_runs)
  if kind == "shard_map":
    return _ShardMapped(step, devices)
  return jax.pmap(step, axis_name=AXIS_NAME, devices=devices, donate_argnums=(0,))


class _ShardMapped:
  """A step under `jax.shard_map`, with the arguments and results of `jax.pmap`.

  With several processes, the state is an array of all processes, and every other
  argument and the output are arrays of this process.
  """

  def __init__(self, step: Callable[..., Any], devices: Sequence[jax.Device]):
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS_NAME,))
    spec = jax.sharding.PartitionSpec(AXIS_NAME)
    self._sharding = jax.sharding.NamedSharding(mesh, spec)
    self._local = jax.sharding.NamedSharding(mesh.local_mesh, spec)

    def block(*args):  # Arguments [1, R, ...].
      results = step(*jax.tree.map(lambda x: x[0], args))
      return jax.tree.map(lambda x: jnp.asarray(x)[None], results)

    mapped = jax.shard_map(
      block, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    self._jitted = jax.jit(
      mapped,
      in_shardings=self._sharding,
      out_shardings=self._sharding,
      donate_argnums=(0,),
    )

  def __call__(self, *args: base.PyTree) -> tuple[base.PyTree, base.PyTree]:
    state, output = self._jitted(*jax.tree.map(self._of_all, args))
    return state, jax.tree.map(self._of_this, output)

  def lower(self, *args: base.PyTree) -> jax.stages.Lowered:
    return self._jitted.lower(*jax.tree.map(self._of_all, args))

  def _of_all(self, x):
    if processes.count() == 1 or not getattr(x, "is_fully_addressable", True):
      return x
    if not isinstance(x, jax.Array):
      return jax.make_array_from_process_local_data(self._sharding, x)
    return _from_shards(x, self._sharding, processes.count())

  def _of_this(self, x):
    if processes.count() == 1:
      return x
    return _from_shards(x, self._local, 1 / processes.count())


def _from_shards(x, sharding, growth):
  """The shards of `x` in this process as an array with `growth` times as many rows."""
  shape = (round(x.shape[0] * growth), *x.shape[1:])
  shards = [shard.data for shard in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)
