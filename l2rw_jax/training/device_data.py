"""Where examples wait for their step: on the devices if they fit, or on the host.

Either way a step is given examples and the rows of them to take, so that one
compiled step serves both. A set on the devices is sent once, and then row numbers
only; of a set on the host, each dispatch is sent the examples it takes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import devices as devices_lib

# Of the free memory of an accelerator; the rest is for activations, and for the
# second copy that is there while sets are spread over the devices.
_SHARE = 1 / 4
# On CPU, copies on all devices together: there the gain is small. Also for what
# does not tell its memory.
_HOST_BYTES = 2**30


class Part(NamedTuple):
  """Examples on the devices, and which of them K steps take.

  Attributes:
    examples: arrays [D, R, n, ...].
    rows: of these arrays, int32 [D, R, K, b].
  """

  examples: base.Batch
  rows: base.Array | np.ndarray


class Store(Protocol):
  """The examples of R runs.

  Attributes:
    num_bytes: what they take on each device; 0 where they wait on the host.
  """

  num_bytes: int

  def part(self, rows: np.ndarray) -> Part:
    """What the steps take that visit rows [D, R, K, b] of their sets."""


def store(sets: Sequence[base.Batch], devices: list[jax.Device], room: int) -> Store:
  """Puts plain arrays that fit on every device; leaves all else on the host.

  Args:
    sets: of each run, arrays with leading axis N or sources of rows.
    devices: where the steps are taken.
    room: bytes that may be filled on each; see `budget`. While they are filled,
      a device holds the sets twice.
  """
  sets = [{name: _on_host(x) for name, x in one.items()} for one in sets]
  if _is_plain(sets) and _bytes(sets) <= room:
    return Resident(sets, devices)
  return Streamed(sets)


def budget(devices: list[jax.Device]) -> int:
  """Bytes that all sets together may take on each of the devices.

  A quarter of an accelerator's memory that is free now; on CPU one GiB for all
  virtual devices together, and on what does not tell its memory one GiB each.
  """
  if devices[0].platform == "cpu":
    return _HOST_BYTES // len(devices)
  memory = devices[0].memory_stats() or {}
  if "bytes_limit" not in memory:
    return _HOST_BYTES
  return int(_SHARE * (memory["bytes_limit"] - memory.get("bytes_in_use", 0)))


def take(examples: base.Batch, rows: base.Array) -> base.Batch:
  """The batch [b, ...] of one run's step on one device; traced."""
  # Rows for training were compared with the size of their set when the epoch began;
  # the others are made within theirs.
  return {
    name: x.at[rows].get(mode="promise_in_bounds") for name, x in examples.items()
  }


class Resident:
  """Whole sets on every device."""

  def __init__(self, sets: Sequence[base.Batch], devices: list[jax.Device]):
    """Copies the sets to the devices."""
    self.num_bytes = _bytes(sets)
    stacked = {name: np.stack([one[name] for one in sets]) for name in sets[0]}
    self._examples = devices_lib.replicate(stacked, devices)

  def part(self, rows: np.ndarray) -> Part:
    """Row numbers alone are sent."""
    return Part(self._examples, rows)


class Streamed:
  """Sets too large for the devices, or read only when asked for."""

  num_bytes = 0

  def __init__(self, sets: Sequence[base.Batch]):
    """Nothing is copied."""
    self._sets = sets

  def part(self, rows: np.ndarray) -> Part:
    """Gathers the examples of these steps, in order."""
    num_devices, _, steps, size = rows.shape
    own = np.arange(steps * size, dtype=np.int32).reshape(steps, size)
    asked = rows[:1] if (rows == rows[:1]).all() else rows  # Read once what all take.

    def gathered(source, run):
      found = examples_lib.read_rows(source, asked[:, run].reshape(-1))
      found = found.reshape(len(asked), steps * size, *found.shape[1:])
      return np.broadcast_to(found, (num_devices, *found.shape[1:]))

    examples = {
      name: np.stack([gathered(s[name], r) for r, s in enumerate(self._sets)], axis=1)
      for name in self._sets[0]
    }
    return Part(examples, np.broadcast_to(own, rows.shape))


def _on_host(x):
  return np.asarray(x) if isinstance(x, jax.Array) else x


def _is_plain(sets):
  return all(isinstance(x, np.ndarray) for one in sets for x in one.values())


def _bytes(sets):
  return sum(x.nbytes for one in sets for x in one.values())
