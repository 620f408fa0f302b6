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
from l2rw_jax.training import devices as devices_lib

# Of the memory of an accelerator; the rest is for activations and the state.
_SHARE = 1 / 4
# On CPU devices, copies on all of them together: there the gain is small.
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
  """The examples of R runs."""

  def part(self, rows: np.ndarray) -> Part:
    """What the steps take that visit rows [D, R, K, b] of their sets."""


def store(sets: Sequence[base.Batch], devices: list[jax.Device]) -> Store:
  """Puts plain arrays that fit on every device; leaves all else on the host.

  A quarter of an accelerator's memory may be filled, on CPU one GiB for all virtual
  devices together.

  Args:
    sets: of each run, arrays with leading axis N or sources of rows.
    devices: where the steps are taken.
  """
  if _is_plain(sets) and _bytes(sets) <= _budget(devices):
    return Resident(sets, devices)
  return Streamed(sets)


def take(examples: base.Batch, rows: base.Array) -> base.Batch:
  """The batch [b, ...] of one run's step on one device; traced."""
  # The rows were compared with the size of the set when their epoch began.
  return {
    name: x.at[rows].get(mode="promise_in_bounds") for name, x in examples.items()
  }


class Resident:
  """Whole sets on every device."""

  def __init__(self, sets: Sequence[base.Batch], devices: list[jax.Device]):
    """Copies the sets to the devices."""
    stacked = {name: np.stack([one[name] for one in sets]) for name in sets[0]}
    self._examples = devices_lib.replicate(stacked, devices)

  def part(self, rows: np.ndarray) -> Part:
    """Row numbers alone are sent."""
    return Part(self._examples, rows)


class Streamed:
  """Sets too large for the devices, or read only when asked for."""

  def __init__(self, sets: Sequence[base.Batch]):
    """Nothing is copied."""
    self._sets = sets

  def part(self, rows: np.ndarray) -> Part:
    """Gathers the examples of these steps, in order."""
    num_devices, _, steps, size = rows.shape
    own = np.arange(steps * size, dtype=np.int32).reshape(steps, size)

    def gathered(source, run):
      found = source[rows[:, run].reshape(-1)]
      return found.reshape(num_devices, steps * size, *found.shape[1:])

    examples = {
      name: np.stack([gathered(s[name], r) for r, s in enumerate(self._sets)], axis=1)
      for name in self._sets[0]
    }
    return Part(examples, np.broadcast_to(own, rows.shape))


def _is_plain(sets):
  return all(isinstance(x, np.ndarray) for one in sets for x in one.values())


def _bytes(sets):
  return sum(x.nbytes for one in sets for x in one.values())


def _budget(devices):
  """Bytes that a copy on each of the devices may take."""
  memory = devices[0].memory_stats() or {}
  if devices[0].platform == "cpu" or "bytes_limit" not in memory:
    return _HOST_BYTES // len(devices)
  return int(_SHARE * memory["bytes_limit"])
