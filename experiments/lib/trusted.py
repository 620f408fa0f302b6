"""A user's trusted examples as the meta set of a script."""

import dataclasses
import functools
from typing import Any, cast

import numpy as np

from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag
from l2rw_jax.data import own_data
from l2rw_jax.data import sources


def _scale(images: Any) -> own_data.Pixels | None:
  """The pixel scale of images, which are an array or a row source; None if unknown."""
  if isinstance(images, np.ndarray):
    return own_data.pixels_of(images) if images.ndim > 2 else None
  return own_data.BYTES if images.dtype == np.uint8 else None


def show_report(name: str, data: own_data.OwnData) -> None:
  """Prints what was skipped or changed, and which classes have no trusted example."""
  settings_lib.show_report(name, data)
  class_names = data.form.class_names
  counts = np.bincount(data.labels, minlength=len(class_names))
  missing = [class_names[c] for c in np.flatnonzero(counts == 0)]
  if missing:
    shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    print(
      settings_lib.printable(
        f"{name}: {len(missing)} of {len(class_names)} classes have no trusted example"
        f" ({shown}). Methods that use a meta set give low weights to the examples of"
        " these classes."
      )
    )


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flag --trusted, for scripts that also have --dataset and --num_meta."""

  trusted: str | None = data_flag(
    None,
    "Your own data with labels that you trust: images:DIR, npz:FILE or csv:FILE. All of"
    " these examples become the meta set, instead of --num_meta clean images of each"
    " class.",
  )

  def record(self) -> dict[str, Any]:
    """Like the base class, but omits --num_meta if --trusted is given.

    If --trusted is not given, it is omitted, so that folders of versions that did not
    have it still match.
    """
    entries = super().record()
    del entries["trusted" if self.trusted is None else "num_meta"]
    return entries

  @property
  def dataset_name(self) -> str:
    """The name of the training data."""
    return cast(Any, self).dataset

  @functools.cached_property
  def trusted_source(self) -> sources.Source | None:
    """The examples of --trusted in the format of the training data, or None.

    Raises:
      InputError: --num_meta is also given, or the examples cannot be read or do not
        match the training data.
    """
    if self.trusted is None:
      return None
    self.check_used("num_meta", False, "with --trusted")
    train = self.load("train", self.dataset_name)
    if own_data.is_own(train.name):
      form = self.read_own(train.name, "train").form
    else:
      names = train.class_names or sources.numbers(train.num_classes)
      form = own_data.Form(names, train.images.shape[1:], pixels=_scale(train.images))
    with settings_lib.naming("trusted", self.trusted):
      data = own_data.read(self.trusted, like=form)
    show_report(self.trusted, data)
    self._show_overlap(data.features)
    return sources.from_own(self.trusted, "trusted", data)

  def _show_overlap(self, features: np.ndarray) -> None:
    """Prints how many trusted examples are test examples, which they must not be.

    Test images that are not in memory are not compared.
    """
    test = self.load("test", self.dataset_name).images
    if not isinstance(test, np.ndarray):
      return
    number = own_data.num_copies(features, test)
    if number:
      print(
        settings_lib.printable(
          f"{self.trusted}: {number} of {len(features)} trusted examples equal test"
          " examples. If they are copies, the accuracy of methods that use a meta set"
          " is too high: leave them out of --trusted or of --dataset."
        )
      )

  def meta_set(self, num_meta: int | None = None) -> dict[str, Any]:
    """The arguments that select the meta set, for functions that make splits.

    Args:
      num_meta: number of clean images of each class, if --trusted is not given; None
        takes the value of --num_meta.
    """
    if self.trusted_source is None:
      number = cast(Any, self).num_meta if num_meta is None else num_meta
      return {"num_meta_per_class": number}
    return {"num_meta_per_class": 0, "trusted": self.trusted_source}
