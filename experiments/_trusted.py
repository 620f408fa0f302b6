"""Users' own trusted examples as the meta set of a script: --trusted."""

import functools
from typing import Any

from absl import flags

from experiments import _bounds
from experiments import _own_data
from l2rw_jax.data import own_data
from l2rw_jax.data import sources

_TRUSTED = flags.DEFINE_string(
  "trusted",
  None,
  "Data of your own with labels that you trust, images:DIR, npz:FILE or csv:FILE: all"
  " of them are the meta set, in place of clean examples drawn by --num_meta.",
)


def load(train: sources.Source) -> sources.Source | None:
  """The examples of --trusted, in the form of the training data; None without them.

  Args:
    train: the training data.
  """
  name = _TRUSTED.value
  if name is None:
    return None
  _bounds.check_used("num_meta", False, "with --trusted")
  if own_data.is_own(train.name):
    form = _own_data.read(train.name, "train").form
  else:
    names = train.class_names or sources.numbers(train.num_classes)
    form = own_data.Form(names, train.images.shape[1:])
  return _read(name, form)


@functools.lru_cache(maxsize=1)
def _read(name: str, form: own_data.Form) -> sources.Source:
  data = own_data.read(name, like=form)
  _own_data.show_report(name, data)
  return sources.from_own(name, "trusted", data)


def given() -> dict[str, Any]:
  """--trusted for the settings of a folder, if it is given.

  So a folder from before there was this flag still fits.
  """
  return {} if _TRUSTED.value is None else {"trusted": _TRUSTED.value}
