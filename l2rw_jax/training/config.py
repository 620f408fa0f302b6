"""Settings of a run, and checks that the settings, the method and the data match."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Protocol

from absl import logging
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import devices
from l2rw_jax.training import streaming

# Where training examples are kept, see `Config.data`.
DATA = ("auto", "resident", "stream")
# Settings that are at least 1; those in the second line may be None.
_COUNTS = ("num_steps", "batch_size", "log_every", "eval_every", "checkpoint_every")
_OPTIONAL_COUNTS = ("meta_batch_size", "num_devices", "steps_per_call")
# `jax.random.key` ignores the higher bits of a seed.
_SEED_BITS = 32


class Model(Protocol):
  """A network and its loss, such as `models.classifier.Classifier`."""

  def __hash__(self) -> int:
    """Models are keys of the cache of compiled functions."""

  def check(self, batch: base.Batch, num_classes: int) -> None:
    """Raises InputError unless the model accepts these examples of C classes."""

  def init(self, key: base.Array, batch: base.Batch) -> tuple[base.PyTree, base.PyTree]:
    """Initial `(params, model_state)` for examples of this shape."""

  def problem(
    self,
    *,
    class_counts: base.Array,
    num_examples: int,
    num_steps: int,
    axis_name: base.AxisName = None,
  ) -> base.Problem:
    """The learning problem; the arguments are documented in `base.Problem`."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Attributes:
    num_steps: number of updates.
    batch_size: B, over all devices.
    meta_batch_size: M, over all devices; the whole meta set if None.
    seeds: one run is trained for each of these distinct integers, which lie between 0
      and 2^32 - 1. The seed determines the initialization, the order of the batches and
      the random numbers of the method.
    log_every: number of steps between two rows of training metrics. A row is also
      written at every evaluation and checkpoint. Each row has the means over the steps
      since the previous row.
    eval_every: number of steps between two evaluations.
    checkpoint_every: number of steps between two checkpoints.
    num_devices: number of devices in all processes. If None, one process uses the
      largest number that divides the batch size, and several processes use all.
    steps_per_call: number of steps in one call of the compiled function. None means 20,
      but 1 on CPU, where several steps per call speed up only steps of a few
      milliseconds or less. With more than one, a second program is compiled. The number
      is reduced to the smallest of the three intervals above, and to 1 if the training
      or meta examples are not kept on the devices. It affects only speed (and
      rounding).
    data: where training examples are kept. "resident" keeps them on the devices,
      "stream" reads them ahead of the steps that use them, and "auto" streams them if
      they do not fit on the devices or are a row source. It affects only speed.
    data_workers: number of worker processes that read the rows of a row source; 0 reads
      them in threads. See `read_workers`. It affects only speed.
    device_map: how a step is mapped over the devices, "pmap" or "shard_map". Both run
      the same program.

  Raises:
    InputError: a number is not an integer or is out of range, or `seeds` is not a
      sequence, is empty, or contains an integer twice.
  """

  num_steps: int
  batch_size: int = 100
  meta_batch_size: int | None = None
  seeds: tuple[int, ...] = (0,)
  log_every: int = 100
  eval_every: int = 500
  checkpoint_every: int = 1000
  num_devices: int | None = None
  steps_per_call: int | None = None
  data: str = "auto"
  data_workers: int = 0
  device_map: str = "pmap"

  def __post_init__(self) -> None:
    for name in (*_COUNTS, *_OPTIONAL_COUNTS):
      value = getattr(self, name)
      if value is not None or name in _COUNTS:
        self._set(name, base.check_integer(f"--{name}", value))
    self._set(
      "data_workers", base.check_integer("--data_workers", self.data_workers, 0)
    )
    given: Any = self.seeds
    if np.ndim(given) == 0:
      raise base.InputError(f"seeds={given} must be a sequence, such as (0,).")
    # These are Python integers, because JSON does not have NumPy's.
    seeds = tuple(base.check_integer("each of the seeds", s, 0) for s in given)
    if not seeds or len(set(seeds)) < len(seeds):
      raise base.InputError(
        f"seeds={list(seeds)} must be one or more distinct integers: give each run"
        " its own seed."
      )
    if max(seeds) >> _SEED_BITS:
      raise base.InputError(
        f"the seed {max(seeds)} must be below 2^{_SEED_BITS}; choose another one."
      )
    self._set("seeds", seeds)

  def _set(self, name, value):
    object.__setattr__(self, name, value)  # The class is frozen.

  @property
  def intervals(self) -> tuple[int, int, int]:
    """`log_every`, `eval_every` and `checkpoint_every`."""
    return self.log_every, self.eval_every, self.checkpoint_every

  def is_due(self, step: int, *intervals: int) -> bool:
    """Whether something is due after `step` updates.

    Args:
      step: number of updates so far.
      *intervals: numbers of steps between two events. Everything is due after the last
        step.
    """
    return step == self.num_steps or any(step % every == 0 for every in intervals)


def check(
  config: Config, method: base.Method, splits: Sequence[examples_lib.Splits]
) -> None:
  """Raises InputError unless `loop.train` accepts these arguments.

  Args:
    config: the settings.
    method: the method of all runs.
    splits: the data of each run, from `as_integers`.
  """
  devices.choose(config.num_devices, config.batch_size)
  if config.device_map not in devices.MAPS:
    raise base.InputError(
      f"--device_map={config.device_map} must be {' or '.join(devices.MAPS)}."
    )
  if config.data not in DATA:
    raise base.InputError(f"--data={config.data}: choose among {', '.join(DATA)}.")
  if config.data_workers > streaming.MOST_THREADS:
    raise base.InputError(
      f"--data_workers={config.data_workers} must lie between 0 and"
      f" {streaming.MOST_THREADS}, the number of steps whose examples are read ahead."
    )
  for seed, split in zip(config.seeds, splits, strict=True):
    for part in ("train", "meta", "test"):
      examples = getattr(split, part)
      _check_labels(examples.label, split.num_classes, f"{part} of seed {seed}")
      examples_lib.check_images(examples.image, f"the {part} images of seed {seed}")
    if not len(split.test.label):
      raise base.InputError(
        f"the test set of seed {seed} is empty: give it the examples that measure the"
        " accuracy of the run."
      )
    if config.batch_size > len(split.train.label):
      raise base.InputError(
        f"--batch_size={config.batch_size} is larger than the"
        f" {len(split.train.label)} training examples."
      )
    _check_meta(config, method, len(split.meta.label))
  for part in ("train", "meta") if method.needs_meta else ("train",):
    _check_same_kind([getattr(s, part) for s in splits], part)


def as_integers(
  splits: Sequence[examples_lib.Splits], seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """Splits whose labels, groups and row numbers are int32 arrays.

  Args:
    splits: the data of each run.
    seeds: the seed of each run, for error messages.

  Raises:
    InputError: labels, groups or row numbers are not integers, or there is not one for
      each image; there are not as many splits as seeds.
  """
  if len(splits) != len(seeds):
    raise base.InputError(
      f"there are {len(splits)} splits for {len(seeds)} seeds; give one for each seed."
    )
  results = []
  for seed, split in zip(seeds, splits, strict=True):
    parts: dict[str, Any] = {
      part: examples_lib.check_examples(getattr(split, part), f"{part} of seed {seed}")
      for part in ("train", "meta", "validation", "test")
    }
    results.append(split._replace(**parts))
  return results


def warn_of_missing_groups(split: examples_lib.Splits, *, needs_meta: bool) -> None:
  """Logs a warning if only some of the parts that are used have groups."""
  parts = {"train": split.train, "test": split.test}
  if needs_meta:
    parts["meta"] = split.meta
  missing = [name for name, part in parts.items() if part.group is None]
  if 0 < len(missing) < len(parts):
    given = [name for name in parts if name not in missing]
    logging.warning(
      "group is given for %s, but not for %s: the true labels are the groups of the"
      " latter.",
      " and ".join(given),
      " and ".join(missing),
    )


def _check_same_kind(examples, part):
  """Raises InputError unless the data of all runs have the same shapes and types.

  Runs that are trained side by side share arrays.
  """
  for what, values in (
    ("one size", {len(e.label) for e in examples}),
    ("one label shape", {np.shape(e.label)[1:] for e in examples}),
    ("one image shape", {tuple(e.image.shape[1:]) for e in examples}),
    ("one image dtype", {str(np.dtype(e.image.dtype)) for e in examples}),
  ):
    if len(values) > 1:
      raise base.InputError(
        f"splits trained side by side must have {what}; the {part} sets have"
        f" {' and '.join(map(str, sorted(values)))}: train them one by one."
      )


def _check_labels(labels, num_classes, where):
  wrong = np.argwhere((labels < 0) | (labels >= num_classes))
  if len(wrong):
    first = tuple(wrong[0])
    raise base.InputError(
      f"label out of range in {where}: example {first[0]} has label"
      f" {int(labels[first])}, but classes are 0 to {num_classes - 1}."
    )


def _check_meta(config, method, num_meta):
  if method.needs_meta and num_meta == 0:
    raise base.InputError(
      "this method needs a meta set of clean examples, but the set is empty: raise"
      " --num_meta, or choose --methods that need none."
    )
  if config.meta_batch_size is not None and config.meta_batch_size > num_meta:
    raise base.InputError(
      f"--meta_batch_size={config.meta_batch_size} is larger than the meta set of"
      f" {num_meta} clean examples; lower it, or leave it out to use all of them."
    )
