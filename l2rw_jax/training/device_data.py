"""Where examples are kept during training: on the devices if they fit, or on the host.

In both cases, a step receives arrays of examples and the rows to take from them, so one
compiled step works for both. A set that fits on the devices is sent once, and each call
sends only row numbers. Otherwise, each call sends the examples that its steps use;
`streaming` reads training examples ahead in other threads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax import processes
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import read_workers
from l2rw_jax.training import sampling
from l2rw_jax.training import streaming

# Share of an accelerator's free memory that sets may use. The rest is for activations,
# and for the second copy that exists while sets are copied to the devices.
_SHARE = 1 / 4
# Bytes for all CPU devices together. It is small, because keeping data on CPU devices
# gains little. This number is also used if `memory_stats()` is unavailable.
_HOST_BYTES = 2**30


class Part(NamedTuple):
  """Arrays of examples, and the rows of these arrays that K steps of R runs use.

  Attributes:
    examples: arrays [D, R, n, ...]: n examples for each run and each of the D devices
      of this process.
    rows: rows of these arrays, int32 [D, R, K, b], b for each step.
  """

  examples: base.Batch
  rows: base.Array | np.ndarray


class Batches(NamedTuple):
  """The examples that K steps use on the D devices of this process.

  N is the number of devices of all processes.

  Attributes:
    train: B / N examples for each step, device and run.
    meta: M / N examples, or M if M is not divisible by N; None without a meta set.
  """

  train: Part
  meta: Part | None


class DeviceData:
  """The training and meta sets of R runs.

  Attributes:
    is_streamed: whether one of the sets is kept on the host.
  """

  def __init__(
    self,
    splits: Sequence[examples_lib.Splits],
    devices: list[jax.Device],
    needs_meta: bool,
    kind: str = "auto",
    num_workers: int = 0,
  ):
    """Copies each set to the devices if it fits there.

    Args:
      splits: the data of each run.
      devices: the devices that train, of all processes.
      needs_meta: whether the method uses the meta set.
      kind: "resident" keeps the training set on the devices, "stream" reads its rows
        ahead of the steps that use them, and "auto" does the latter if the set does
        not fit on the devices or is a row source.
      num_workers: number of worker processes that read the rows of a row source; 0
        reads them in threads of this process.

    Raises:
      InputError: `kind` is "resident", but the training set is a row source; or the
        source cannot be sent to workers.
    """
    self._devices = devices
    # All processes must make the same choice, or they would run different programs.
    max_bytes = processes.smallest("device_data", budget(devices_lib.local(devices)))
    train = [examples_lib.as_batch(split.train) for split in splits]
    self._workers: read_workers.Workers | None = None
    if num_workers and kind != "resident":
      train, self._workers = read_workers.read_by_workers(train, num_workers)
    self._train = store(train, devices, max_bytes, kind, reads_ahead=True)
    self._meta: Store | None = None
    if needs_meta:
      meta = [examples_lib.as_batch(split.meta) for split in splits]
      self._meta = store(meta, devices, max_bytes - self._train.num_bytes)
    self.is_streamed = any(
      sets is not None and not sets.num_bytes for sets in (self._train, self._meta)
    )

  def read_ahead(
    self, num_steps: int, ahead: Callable[[], Callable[[int], np.ndarray]]
  ) -> None:
    """Starts to read the training examples of upcoming steps, if they are streamed.

    It does nothing while steps of an earlier call are left.

    Args:
      num_steps: number of upcoming steps whose rows are known.
      ahead: returns a function `i -> rows` of upcoming step i, see `Sampler.ahead`.

    Raises:
      InputError: the examples are streamed, but grain is not installed.
    """
    if isinstance(self._train, streaming.Stream) and not self._train.steps_left:
      rows = ahead()
      self._train.start(
        num_steps, lambda i: devices_lib.spread([rows(i)], self._devices)
      )

  def close(self) -> None:
    """Stops the threads and processes that read ahead."""
    if isinstance(self._train, streaming.Stream):
      self._train.close()
    if self._workers is not None:
      self._workers.close()

  def load(self, steps: Sequence[sampling.Rows]) -> Batches:
    """Returns the examples of some steps; reads those that are not on the devices."""
    train = devices_lib.spread([rows.train for rows in steps], self._devices)
    if self._meta is None:
      return Batches(self._train.part(train), None)
    meta = devices_lib.spread([rows.meta for rows in steps], self._devices)
    return Batches(self._train.part(train), self._meta.part(meta))


class Store(Protocol):
  """The training sets, or the meta sets, of R runs.

  Attributes:
    num_bytes: their size on each device; 0 if they are kept on the host.
  """

  num_bytes: int

  def part(self, rows: np.ndarray) -> Part:
    """The examples of steps that take rows [D, R, K, b] of their sets."""


def store(
  sets: Sequence[base.Batch],
  devices: list[jax.Device],
  max_bytes: int,
  kind: str = "auto",
  reads_ahead: bool = False,
) -> Store:
  """Puts sets on every device, or keeps them on the host.

  Args:
    sets: for each run, arrays with leading axis N or row sources.
    devices: the devices that train.
    max_bytes: bytes that may be used on each device, see `budget`. While the sets
      are copied, a device holds them twice.
    kind: as in `DeviceData`.
    reads_ahead: whether examples that are not on the devices are read ahead of the
      steps that use them.

  Raises:
    InputError: `kind` is "resident", but a set has a row source.
  """
  sets = [
    {k: np.asarray(x) if isinstance(x, jax.Array) else x for k, x in one.items()}
    for one in sets
  ]
  are_arrays = all(isinstance(x, np.ndarray) for one in sets for x in one.values())
  if kind == "resident" and not are_arrays:
    raise base.InputError(
      "--data=resident needs a training set that is in memory, but its images are a"
      " row source, which is read row by row; choose --data=stream."
    )
  fits = are_arrays and _num_bytes(sets) <= max_bytes
  if kind == "resident" or (kind == "auto" and fits):
    return OnDevices(sets, devices)
  on_host = OnHost(sets)
  return streaming.Stream(on_host.part) if reads_ahead else on_host


def budget(devices: list[jax.Device]) -> int:
  """Bytes that all sets together may use on each of the devices.

  It is a quarter of an accelerator's free memory. On CPU, it is one GiB for all virtual
  devices together; if `memory_stats()` is unavailable, it is one GiB for each device.
  """
  if devices[0].platform == "cpu":
    return _HOST_BYTES // len(devices)
  memory = devices[0].memory_stats() or {}
  if "bytes_limit" not in memory:
    return _HOST_BYTES
  return int(_SHARE * (memory["bytes_limit"] - memory.get("bytes_in_use", 0)))


def take(examples: base.Batch, rows: base.Array) -> base.Batch:
  """The batch [b, ...] of one step of one run on one device; traced."""
  # Rows are within bounds: training rows are checked when an epoch begins, and all
  # other rows are computed by this package.
  return {
    name: x.at[rows].get(mode="promise_in_bounds") for name, x in examples.items()
  }


class OnDevices:
  """A `Store` with a copy of the sets on every device."""

  def __init__(self, sets: Sequence[base.Batch], devices: list[jax.Device]):
    """Copies the sets to the devices."""
    self.num_bytes = _num_bytes(sets)
    stacked = {name: np.stack([one[name] for one in sets]) for name in sets[0]}
    self._examples = devices_lib.replicate(stacked, devices)

  def part(self, rows: np.ndarray) -> Part:
    """The examples on the devices; only the row numbers are on the host."""
    return Part(self._examples, rows)


class OnHost:
  """A `Store` of sets that are too large for the devices, or are read on demand."""

  num_bytes = 0

  def __init__(self, sets: Sequence[base.Batch]):
    """Copies nothing."""
    self._sets = sets

  def part(self, rows: np.ndarray) -> Part:
    """Gathers the examples of these steps, in order."""
    num_devices, _, num_steps, size = rows.shape
    # These are rows of the gathered examples, not of the set.
    local_rows = np.arange(num_steps * size, dtype=np.int32).reshape(num_steps, size)
    # Read rows only once if all devices take the same ones.
    distinct = rows[:1] if (rows == rows[:1]).all() else rows

    def gather(source, run):
      values = examples_lib.read_rows(source, distinct[:, run].reshape(-1))
      values = values.reshape(len(distinct), num_steps * size, *values.shape[1:])
      return np.broadcast_to(values, (num_devices, *values.shape[1:]))

    examples = {
      name: np.stack([gather(s[name], r) for r, s in enumerate(self._sets)], axis=1)
      for name in self._sets[0]
    }
    return Part(examples, np.broadcast_to(local_rows, rows.shape))


def _num_bytes(sets):
  return sum(x.nbytes for one in sets for x in one.values())
