"""NumPy archives of features and labels."""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
from typing import Any
import zipfile

import numpy as np

from l2rw_jax import base
from l2rw_jax.data.own_data import containers
from l2rw_jax.data.own_data import csv_files

_FEATURE_KEYS = ("x", "images", "image", "features", "data")
_LABEL_KEYS = ("y", "labels", "label", "target", "targets")


def read_archive(path: pathlib.Path, split: str | None) -> tuple[containers.Raw, bool]:
  """Reads the features and labels of a NumPy archive.

  Args:
    path: the file.
    split: "train", "test" or None, as in `reading.read`.

  Returns:
    The examples that have a label, and whether the archive has a test set. If `split`
    is "test" and it has none, the examples are those of `split=None`.

  Raises:
    InputError: the file cannot be read, lacks features or labels, their type or shape
      is not supported, or there is not one label for each example.
  """
  with _opened(path) as stored:
    names = list(stored.files)
    pair, has_test = _archive_keys(path, names, split)
    # The other arrays are not read: they may be large, or Python objects.
    values = None if pair is None else [stored[key] for key in pair]
  if pair is None or values is None:
    return read_archive(path, None)[0], False
  notes = []
  if split is None and has_test:
    notes.append(f"The test arrays in {path} were not read.")
  features = _archive_features(path, pair[0], values[0], notes)
  labels, is_labeled = _archive_labels(path, pair[1], values[1])
  if len(labels) != len(features):
    raise base.InputError(
      f"{path} has {len(features)} examples in {pair[0]} but {len(labels)} labels in"
      f" {pair[1]}; give one label to each example"
    )
  rows = np.arange(len(labels))
  examples = np.array([f"row {row}" for row in rows], object)
  skipped = [
    (name, csv_files.reason_without_label(label))
    for name, label in zip(examples[~is_labeled], labels[~is_labeled], strict=True)
  ]
  raw = containers.Raw(features, labels, examples, rows, skipped, notes)
  return raw.take(is_labeled), has_test


def _archive_keys(
  path: pathlib.Path, names: Sequence[str], split: str | None
) -> tuple[tuple[str, str] | None, bool]:
  """The names of the features and labels of a split, and whether there is a test set.

  The names are None if the split is "test" and there is no test set.
  """
  keys = {name.lower(): name for name in names}

  def key(stems, suffix):
    return next((keys[s + suffix] for s in stems if s + suffix in keys), None)

  suffixes = ("", "_train") if split != "test" else ("_test",)
  pairs = [(key(_FEATURE_KEYS, s), key(_LABEL_KEYS, s)) for s in suffixes]
  pair = next((p for p in pairs if None not in p), None)
  has_test = bool(key(_FEATURE_KEYS, "_test") and key(_LABEL_KEYS, "_test"))
  if pair is None and split != "test":
    raise base.InputError(
      f"{path} must contain the arrays X and y, or images and labels; it contains"
      f" {', '.join(names) or 'nothing'}"
    )
  return pair, has_test


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  """Opens an archive; errors of reading it become one-line errors."""
  try:
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
      raise base.InputError(
        f"{path} contains a single array; save it as np.savez(FILE, X=..., y=...)"
      )
    with stored:
      yield stored
  except base.InputError:
    raise
  except OSError as error:
    raise base.InputError(
      f"{path} cannot be read: {error.strerror or 'it is not a NumPy archive'}"
    ) from error
  except (ValueError, EOFError, KeyError, zipfile.BadZipFile, SyntaxError) as error:
    # For a file that is not an archive, NumPy's error is also about pickled objects.
    if str(error).startswith("Object arrays"):
      raise base.InputError(
        f"{path} contains Python objects, which are not read because they can run code;"
        " save numbers, or strings with dtype=str"
      ) from error
    raise base.InputError(f"{path} is damaged or not a NumPy archive") from error


def _archive_features(
  path: pathlib.Path, name: str, features: np.ndarray, notes: list[str]
) -> np.ndarray:
  if features.dtype.kind not in "biuf" or 0 in features.shape[1:] or features.ndim < 2:
    raise base.InputError(
      f"{name} in {path} must be numbers, with an axis of examples and one or more axes"
      f" of features; it is {features.dtype} of shape {list(features.shape)}"
    )
  if features.ndim == 4 and features.shape[1] in (1, 3, 4):
    if features.shape[3] not in (1, 3, 4):
      features = np.moveaxis(features, 1, 3)
      notes.append(f"The channels of {name} were moved to the last axis.")
  elif features.ndim == 3:
    features = features[..., None]
  # Rows of features are standardized in float64: in float32, numbers such as times in
  # seconds since 1970 would lose the digits in which they differ.
  if features.ndim == 2 or features.dtype.kind in "biu":
    return features
  with np.errstate(over="ignore"):  # Infinite values count as missing.
    return features.astype(np.float32, copy=False)


def _archive_labels(
  path: pathlib.Path, name: str, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the labels as strings, and a mask of the examples that have one."""
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  elif labels.ndim == 2 and labels.dtype.kind in "biuf":
    is_one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
    labels = labels.argmax(axis=1) if is_one_hot else labels
  if labels.ndim != 1 or labels.dtype.kind not in "biufUS":
    raise base.InputError(
      f"{name} in {path} must have one label for each example, numbers or strings; it"
      f" is {labels.dtype} of shape {list(labels.shape)}"
    )
  if labels.dtype.kind == "f":
    is_labeled = np.isfinite(labels)
    # In float16, 2^53 is infinite.
    numbers = np.where(is_labeled, labels, 0).astype(np.float64)
    is_class = (numbers == np.round(numbers)) & (np.abs(numbers) <= 2**53)
    if not is_class.all():
      raise base.InputError(
        f"{name} in {path} has the value {numbers[~is_class][0]}; labels must be"
        " classes, not measurements"
      )
    classes = numbers.astype(np.int64).astype(str).astype(object)
    return np.where(is_labeled, classes, ""), is_labeled
  if labels.dtype.kind == "S":
    # Labels that are not UTF-8 stay different from each other.
    labels = np.char.decode(labels, "utf-8", "backslashreplace")
  if labels.dtype.kind == "b":
    labels = labels.astype(np.int64)
  strings = np.array([str(label).strip() for label in labels.tolist()], object)
  is_labeled = np.array([s.lower() not in csv_files.MISSING for s in strings], bool)
  return strings, is_labeled
