"""The data of R runs side by side, cut into batches."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import device_data
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import sampling

_FIELDS = ("image", "label", "index", "group")


class Rows(NamedTuple):
  """Which examples one step takes; on the host.

  Attributes:
    train: rows of each run's training set, [R, B].
    meta: of each run's meta set, [R, M], or None.
  """

  train: np.ndarray
  meta: np.ndarray | None


class Batches(NamedTuple):
  """What a dispatch of K steps takes.

  Attributes:
    train: B / D examples a step, device and run.
    meta: M / D of them, or M where they do not divide among devices; or None.
  """

  train: device_data.Part
  meta: device_data.Part | None


class BatchSource:
  """Draws the batches of every run; a function of the seeds and the position.

  Attributes:
    streams: of each run, the rows of its training set.
    streamed: whether examples wait on the host.
  """

  def __init__(
    self,
    config: config_lib.Config,
    splits: Sequence[examples_lib.Splits],
    epoch_order: Callable[[int, int, np.random.Generator], np.ndarray],
    needs_meta: bool,
    devices: list[jax.Device],
    positions: Sequence[sampling.Position] | None,
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
    train = [examples_dict(split.train) for split in splits]
    room = device_data.budget(devices)
    self._train = device_data.store(train, devices, room)
    self.streamed = not self._train.num_bytes
    self._num_meta = len(splits[0].meta.label)
    if needs_meta:
      meta = [examples_dict(split.meta) for split in splits]
      self._meta = device_data.store(meta, devices, room - self._train.num_bytes)
      self.streamed |= not self._meta.num_bytes

    def order(run: int, epoch: int) -> np.ndarray:
      rng = sampling.generator(config.seeds[run], "order", epoch)
      rows = np.asarray(epoch_order(run, epoch, rng))
      _check_rows(rows, len(splits[run].train.label))
      return rows

    self.streams = [
      sampling.TrainSampler(
        functools.partial(order, run),
        config.batch_size,
        positions[run] if positions else sampling.Position(0, 0),
      )
      for run in range(len(splits))
    ]

  def positions(self) -> list[sampling.Position]:
    """Where every run stands."""
    return [s.position for s in self.streams]

  def epoch(self) -> tuple[int, int]:
    """Steps until one of the runs starts an epoch, and of the shortest epoch."""
    return min(s.left() for s in self.streams), min(s.whole() for s in self.streams)

  def next(self, step: int) -> Rows:
    """What `step` takes; moves on."""
    train = np.stack([s.next() for s in self.streams])
    return Rows(train, self._meta_rows(step) if self._needs_meta else None)

  def _meta_rows(self, step):
    size = self._config.meta_batch_size or self._num_meta
    seeds = self._config.seeds
    return np.stack(
      [sampling.meta_rows(seed, step, self._num_meta, size) for seed in seeds]
    )

  def load(self, steps: Sequence[Rows]) -> Batches:
    """Brings what some steps take to the devices, as far as it is not there."""
    train = self._train.part(self._spread([rows.train for rows in steps]))
    if not self._needs_meta:
      return Batches(train, None)
    return Batches(train, self._meta.part(self._spread([r.meta for r in steps])))

  def _spread(self, rows):
    rows = np.stack(rows, axis=1).astype(np.int32)  # [R, K, B]
    # Ten clean images do not divide among eight devices, nor need they: the mean
    # over devices that all hold the same examples is the same mean.
    if rows.shape[-1] % len(self._devices):
      return devices_lib.repeat(rows, self._devices)
    return devices_lib.shard(rows, self._devices)


def check_splits(
  splits: Sequence[examples_lib.Splits], seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """Splits whose labels, groups and row numbers are arrays of int32.

  Args:
    splits: the data of each run.
    seeds: of each run.

  Raises:
    InputError: labels, groups or row numbers that are no integers, or that are more
      or fewer than the images.
  """
  found = []
  for seed, split in zip(seeds, splits, strict=True):
    examples: dict[str, Any] = {
      part: examples_lib.check_examples(getattr(split, part), f"{part} of seed {seed}")
      for part in ("train", "meta", "validation", "test")
    }
    found.append(split._replace(**examples))
  return found


def examples_dict(examples: examples_lib.Examples) -> base.Batch:
  """The fields of a split that networks and methods may see."""
  if examples.group is None:
    examples = examples._replace(group=examples.true_label)
  return {name: getattr(examples, name) for name in _FIELDS}


def _check_rows(rows, num_examples):
  if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
    raise base.InputError(
      f"the method's `sample` gave {rows.dtype} {list(rows.shape)}; it must give the"
      " rows to visit, integers in one axis (np.flatnonzero of a mask)."
    )
  wrong = rows[(rows < 0) | (rows >= num_examples)]
  if wrong.size:
    raise base.InputError(
      f"the method's `sample` gave row {wrong[0]} of {num_examples} training examples;"
      f" rows are 0 to {num_examples - 1}."
    )
