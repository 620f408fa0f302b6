"""How a run is set up, and whether its settings and data fit each other."""

from collections.abc import Sequence
import dataclasses
from typing import Protocol

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import devices


class Model(Protocol):
  """What can be trained: `models.classifier.Classifier`, or anything like it.

  Hashable: what is compiled for a model is kept by it.
  """

  def check(self, batch: base.Batch, num_classes: int) -> None:
    """Raises InputError unless the model fits examples of C classes."""

  def init(self, key: base.Array, batch: base.Batch) -> tuple[base.PyTree, base.PyTree]:
    """Fresh `(params, model_state)` for examples of this shape."""

  def problem(
    self,
    *,
    class_counts: base.Array,
    num_examples: int,
    num_steps: int,
    axis_name: base.AxisName = None,
  ) -> base.Problem:
    """The learning problem; arguments as in `base.Problem`."""


@dataclasses.dataclass(frozen=True)
class Config:
  """How to run.

  Attributes:
    num_steps: updates.
    batch_size: B, over all devices.
    meta_batch_size: M, over all devices; every clean example if None.
    seeds: one run for each; initialization, batch order and method noise.
    log_every: steps between two rows of training metrics.
    eval_every: steps between two evaluations.
    checkpoint_every: steps between two checkpoints.
    num_devices: local devices to use; if None, the most that divide the batch.
    steps_per_call: steps sent to the devices at once, as a loop that is compiled;
      if None, 1 on CPU, where convolutions in such a loop are slow, else 20; never
      more than between two looks, and 1 where training examples wait on the host.
      Changes how fast a run is, and what it does only as far as XLA rounds such a
      loop differently.
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


def check(
  config: Config, method: base.Method, splits: Sequence[examples_lib.Splits]
) -> None:
  """Raises InputError unless `train` can start with these."""
  devices.choose(config.num_devices, config.batch_size)
  if config.steps_per_call is not None and config.steps_per_call < 1:
    raise base.InputError(
      f"--steps_per_call={config.steps_per_call} must be at least 1."
    )
  for seed, split in zip(config.seeds, splits, strict=True):
    for part in ("train", "meta", "test"):
      examples = getattr(split, part)
      _check_labels(examples.label, split.num_classes, f"{part} of seed {seed}")
      examples_lib.check_images(examples.image, f"the {part} images of seed {seed}")
    if config.batch_size > len(split.train.label):
      raise base.InputError(
        f"--batch_size={config.batch_size} is larger than the"
        f" {len(split.train.label)} training examples."
      )
    _check_meta(config, method, len(split.meta.label))
  for part in ("train", "meta") if method.needs_meta else ("train",):
    _check_alike([getattr(s, part) for s in splits], part)


def _check_alike(examples, part):
  """Runs side by side are one array."""
  for what, found in (
    ("one size", {len(e.label) for e in examples}),
    ("one label shape", {np.shape(e.label)[1:] for e in examples}),
    ("one image shape", {tuple(e.image.shape[1:]) for e in examples}),
    ("one image dtype", {str(np.dtype(e.image.dtype)) for e in examples}),
  ):
    if len(found) > 1:
      raise base.InputError(
        f"splits trained side by side must be of {what}; the {part} sets have"
        f" {' and '.join(map(str, sorted(found)))}: train them one by one."
      )


def _check_labels(labels, num_classes, where):
  wrong = np.argwhere((labels < 0) | (labels >= num_classes))
  if len(wrong):
    first = tuple(wrong[0])
    raise base.InputError(
      f"label out of range in {where}: example {first[0]} has label"
      f" {int(labels[first])}, classes are 0 to {num_classes - 1}."
    )


def _check_meta(config, method, num_meta):
  if method.needs_meta and num_meta == 0:
    raise base.InputError(
      "this method needs a clean meta set and it is empty: raise --num_meta, or"
      " choose a --methods that needs none."
    )
  if config.meta_batch_size is not None and (
    config.meta_batch_size > num_meta or config.meta_batch_size < 1
  ):
    raise base.InputError(
      f"--meta_batch_size={config.meta_batch_size} must lie between 1 and the"
      f" {num_meta} clean examples."
    )
