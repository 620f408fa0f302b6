"""The file of a fitted mentor, in JSON."""

from collections.abc import Callable
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import mentornet
from l2rw_jax.methods.mentornet import network as mentornet_network

_KIND = "l2rw_jax mentor"
_VERSION = 1
_REFIT = "fit another with experiments.mentornet_pretrain"


def save(
  path: str | os.PathLike, mentor: mentornet_network.Mentor, facts: dict[str, Any]
) -> None:
  """Writes a mentor atomically.

  Args:
    path: file to create or replace; its folder must exist.
    mentor: the fitted mentor.
    facts: JSON values to store with the mentor, such as the curriculum that it was
      fitted to and the errors of the fit.

  Raises:
    InputError: the file cannot be written.
    TypeError, ValueError: `facts` are not JSON values, or a number is NaN or infinite.
      In this case nothing is written.
  """
  # Keys become strings before the checksum is computed.
  facts = json.loads(json.dumps(facts, allow_nan=False))
  flat = jax.tree_util.tree_flatten_with_path(mentor.variables)[0]
  record = {
    "kind": _KIND,
    "version": _VERSION,
    "curriculum": mentor.curriculum,
    "compat": mentor.network.compat,
    "num_labels": mentor.network.num_labels,
    "num_classes": mentor.num_classes,
    "facts": facts,
    # A float32 survives the conversion to decimals and back without rounding.
    "variables": {_name(place): np.asarray(x).tolist() for place, x in flat},
  }
  workdir.write_json(path, record | {"sha256": _digest(record)})


def load(
  path: str | os.PathLike, num_classes: int | None = None
) -> mentornet_network.Mentor:
  """Reads a mentor from its file.

  Args:
    path: path of the file that `save` wrote.
    num_classes: C of the student's data; None skips the check.

  Raises:
    InputError: there is no mentor at `path`, the file is damaged or has another format,
      or the mentor was fitted to labels of a different number of classes.
  """
  record = read(path)
  fitted_classes = record["num_classes"]
  if num_classes is not None and fitted_classes not in (None, num_classes):
    mismatch = mentornet.class_mismatch(fitted_classes, num_classes)
    raise base.InputError(f"--mentor={path}: {mismatch}")
  network = mentornet_network.MentorNetwork(record["num_labels"], record["compat"])
  features = np.zeros(1, np.float32), np.zeros(1, np.int32)
  like = jax.eval_shape(
    network.init, jax.random.key(0), features[0], features[0], features[1], 0
  )
  stored = record["variables"]
  named = {_name(place): leaf for place, leaf in jax.tree.leaves_with_path(like)}
  if set(stored) != set(named):
    raise _damaged(path, "its variables have other names")
  arrays = {name: _array(path, name, stored[name], named[name].shape) for name in named}
  variables = jax.tree.map_with_path(lambda place, _: arrays[_name(place)], like)
  return mentornet_network.Mentor(
    record["curriculum"], network, variables, record["num_classes"]
  )


def _name(place):
  return jax.tree_util.keystr(place, simple=True, separator="/")


def _array(path, name, stored, shape):
  """One variable; raises InputError unless it is finite and has this shape."""
  try:
    with np.errstate(over="ignore"):
      array = np.asarray(np.asarray(stored, np.float64), np.float32)
  except (TypeError, ValueError, OverflowError) as error:
    raise _damaged(path, f"{name} is not an array of numbers") from error
  if array.shape != shape:
    raise _damaged(path, f"{name} has shape {list(array.shape)}, not {list(shape)}")
  if not np.isfinite(array).all():
    raise _damaged(path, f"{name} is not finite")
  return array


def read(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the whole record, including its facts, and checks it.

  Raises:
    InputError: the file is missing, damaged or has another format.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except OSError as error:
    raise base.InputError(
      f"--mentor={path}: cannot read it ({error.strerror}); name the mentor.json that"
      " experiments.mentornet_pretrain wrote."
    ) from error
  except UnicodeDecodeError as error:
    raise base.InputError(_not_a_mentor(path)) from error
  try:
    record = json.loads(text)
  # The parser recurses for every bracket, so a damaged file can cause a RecursionError.
  except (ValueError, RecursionError) as error:
    raise base.InputError(
      f"--mentor={path} is damaged or not a mentor, because it is not JSON: {_REFIT}."
    ) from error
  if not isinstance(record, dict) or record.get("kind") != _KIND:
    raise base.InputError(_not_a_mentor(path))
  if record.get("version") != _VERSION:
    raise base.InputError(
      f"--mentor={path} has format version {record.get('version')}, but this program"
      f" reads version {_VERSION}: {_REFIT}."
    )
  if record.pop("sha256", None) != _digest(record):
    raise _damaged(path, "its checksum differs")
  for name, is_valid in _FIELDS.items():
    if name not in record:
      raise _damaged(path, f"it has no {name}")
    if not is_valid(record[name]):
      raise _damaged(path, f"its {name} cannot be {str(record[name])[:40]!r}")
  if record["num_classes"] not in (None, record["num_labels"]):
    raise _damaged(path, "its num_classes and num_labels differ")
  return record


def _is_size(value):
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  return is_integer and 1 <= value <= _MAX_CLASSES


# A manipulated file can have a correct checksum, so each field is also checked.
_MAX_CLASSES = 1_000_000
_FIELDS: dict[str, Callable[[Any], bool]] = {
  "curriculum": lambda value: value in (*mentornet.CURRICULA, "dd"),
  "compat": lambda value: value in mentornet_network.COMPAT,
  "num_labels": _is_size,
  "num_classes": lambda value: value is None or _is_size(value),
  "facts": lambda value: isinstance(value, dict),
  "variables": lambda value: isinstance(value, dict),
}


def _damaged(path, reason):
  return base.InputError(f"--mentor={path} is damaged ({reason}): {_REFIT}.")


def _not_a_mentor(path):
  return (
    f"--mentor={path} is not a mentor; name the mentor.json that"
    " experiments.mentornet_pretrain wrote."
  )


def _digest(record):
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
