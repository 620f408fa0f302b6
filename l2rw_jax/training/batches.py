"""The data of R runs side by side, cut into batches on the devices."""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import splits as splits_lib
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import stream

_FIELDS = ("image", "label", "index", "group")


class Batches(NamedTuple):
  """What one step takes.

  Attributes:
    rows: rows of each run's training set, [R, B], on the host.
    train: arrays [D, R, B / D, ...].
    meta: arrays [D, R, M / D, ...], or None.
  """

  rows: np.ndarray
  train: base.Batch
  meta: base.Batch | None


class BatchSource:
  """Draws the batches of every run; a function of the seeds and the position."""

  def __init__(
    self,
    config: config_lib.Config,
    splits: Sequence[splits_lib.Splits],
    epoch_order: Callable[[int, int, np.random.Generator], np.ndarray],
    needs_meta: bool,
    devices: list[jax.Device],
    positions: Sequence[stream.Position] | None,
  ):
    """Starts at `positions`, or at the beginning.

    Args:
      config: sizes and seeds.
      splits: the data of each run.
      epoch_order: (run, epoch, rng) -> rows to visit.
      needs_meta: whether to draw meta batches.
      devices: where the batches go.
      positions: of each run, from a checkpoint.
    """
    self._config, self._devices, self._needs_meta = config, devices, needs_meta
    self._train = [examples_dict(split.train) for split in splits]
    self._meta = [examples_dict(split.meta) for split in splits]

    def order(run: int, epoch: int) -> np.ndarray:
      rng = stream.generator(config.seeds[run], "order", epoch)
      return epoch_order(run, epoch, rng)

    self.streams = [
      stream.TrainStream(
        functools.partial(order, run),
        config.batch_size,
        positions[run] if positions else stream.Position(0, 0),
      )
      for run in range(len(splits))
    ]

  def positions(self) -> list[stream.Position]:
    """Where every run stands."""
    return [s.position for s in self.streams]

  def next(self, step: int) -> Batches:
    """The batches of `step`; moves on."""
    rows = np.stack([s.next() for s in self.streams])
    train = devices_lib.shard(_take(self._train, rows), self._devices)
    return Batches(rows, train, self._next_meta(step) if self._needs_meta else None)

  def _next_meta(self, step):
    num_meta = len(self._meta[0]["label"])
    size = self._config.meta_batch_size or num_meta
    rows = np.stack(
      [stream.meta_rows(seed, step, num_meta, size) for seed in self._config.seeds]
    )
    batch = _take(self._meta, rows)
    # Ten clean images do not divide among eight devices, nor need they: the mean
    # over devices that all hold the same examples is the same mean.
    if size % len(self._devices):
      return devices_lib.repeat(batch, self._devices)
    return devices_lib.shard(batch, self._devices)


def examples_dict(examples: splits_lib.Examples) -> base.Batch:
  """The fields of a split that networks and methods may see."""
  if examples.group is None:
    examples = examples._replace(group=examples.true_label)
  return {name: getattr(examples, name) for name in _FIELDS}


def _take(sets, rows):
  return {
    name: np.stack([part[name][r] for part, r in zip(sets, rows, strict=True)])
    for name in _FIELDS
  }
