"""The flag --evaluate_on: settings can be chosen without using the test set."""

import dataclasses
import functools
from typing import Any

import numpy as np

from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources

_SEED = 1712
# A class with fewer images gives none to the validation images.
_IMAGES_PER_HELD_OUT = 10


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flag --evaluate_on, for scripts with one training and one test set."""

  evaluate_on: str = data_flag(
    "test",
    "Images to measure the accuracy on: the test set, or validation images, so that"
    " flags can be chosen without the test set. The validation images are a tenth of"
    " each class of the training set, and are not trained on. They are the same for all"
    " seeds.",
    choices=["test", "validation"],
    # Folders of older versions do not have this entry.
    recorded_with="evaluate_on",
  )

  def load(self, split: str, dataset: str | None = None) -> sources.Source:
    """Like the base class, without the test set if --evaluate_on=validation.

    The split "test" is then the validation images, and "train" is all others.
    """
    if self.evaluate_on == "test" or split not in ("train", "test"):
      return super().load(split, dataset)
    if (split, dataset) not in self._parts:
      whole = super().load("train", dataset)
      rows = validation_rows(whole.labels, whole.num_classes)
      if not rows.any():
        raise base.InputError(
          f"--evaluate_on=validation: no class of {whole.name} has"
          f" {_IMAGES_PER_HELD_OUT} training images, so there are no validation images."
        )
      self._parts["train", dataset] = _part(whole, "without validation", ~rows)
      self._parts["test", dataset] = _part(whole, "validation", rows)
    return self._parts[split, dataset]

  @functools.cached_property
  def _parts(self) -> dict[tuple[str, str | None], sources.Source]:
    """The parts that `load` has made, by split and data set."""
    return {}


def column(settings: Any) -> dict[str, str]:
  """The column of rows that were not measured on the test set, such as "validation".

  Rows that were measured on the test set do not have this column, and neither do rows
  of older versions.
  """
  part = getattr(settings, "evaluate_on", "test")
  return {} if part == "test" else {"evaluate_on": part}


def validation_rows(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Selects a tenth of each class, rounded down; always the same rows.

  Args:
    labels: labels of the training set, integers [N].
    num_classes: number of classes.

  Returns:
    Whether each example is a validation example, bool [N].
  """
  (rng,) = examples_lib.generators(_SEED, 1)
  is_chosen = np.zeros(len(labels), bool)
  for rows in base.rows_by_class(labels, np.arange(num_classes)):
    is_chosen[rng.permutation(rows)[: len(rows) // _IMAGES_PER_HELD_OUT]] = True
  return is_chosen


def _part(source: sources.Source, name: str, is_chosen: np.ndarray) -> sources.Source:
  rows = np.flatnonzero(is_chosen)
  images: Any = source.images
  is_array = isinstance(images, np.ndarray)
  return source._replace(
    split=f"{source.split}, {name}",
    images=images[rows] if is_array else examples_lib.View(images, rows),
    labels=source.labels[rows],
    extra={key: labels[rows] for key, labels in source.extra.items()},
  )
