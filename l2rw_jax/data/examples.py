"""Floor 4: train, meta, validation and test sets cut out of a source, disjoint.

What every builder of splits needs: the types it returns, `assemble` to make
them, and the checks of what it was given.
"""

from collections.abc import Mapping
import hashlib
import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import label_noise
from l2rw_jax.data import sources

_BATCH_FIELDS = ("image", "label", "index", "group")
_BLOCK_BYTES = 2**26


class Examples(NamedTuple):
  """One part of the data, N examples, possibly none.

  Attributes:
    image: float32 [N, ...]; uint8 pixels become [0, 1], floats stay as they are.
      Any source of rows will do that has `len`, `shape` and `dtype` and gives an
      array for a slice or an array of rows; its pixels are the model's to scale.
    label: int32 [N], what training sees; [N, Q] for Q labels an example.
    true_label: int32, likewise.
    index: int32 [N], 0 .. N - 1, the row in this part.
    source_index: int32 [N], the row in the source split, ascending.
    group: int32 [N], the attribute in which the examples are to be treated alike;
      None stands for the true class. A truth, like `true_label`: what a method
      may know is the group of the meta set.
  """

  image: np.ndarray
  label: np.ndarray
  true_label: np.ndarray
  index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, unused here
  source_index: np.ndarray
  group: np.ndarray | None = None


class Splits(NamedTuple):
  """The four parts of a learning problem.

  Attributes:
    train: with the wrong labels or counts.
    meta: clean and class-balanced; N = 0 without a meta set.
    validation: wrong like `train`, for tuning; N = 0 if not asked for.
    test: clean.
    num_classes: C.
    fingerprint: 16 hex digits of a SHA-256 over data set names and versions,
      and over the source rows and labels of all four parts, and their groups
      if they are not the classes.
  """

  train: Examples
  meta: Examples
  validation: Examples
  test: Examples
  num_classes: int
  fingerprint: str


def as_batch(examples: Examples) -> base.Batch:
  """The fields of `examples` that networks and methods may use."""
  if examples.group is None:
    examples = examples._replace(group=examples.true_label)
  return {name: getattr(examples, name) for name in _BATCH_FIELDS}


def class_counts(examples: Examples, num_classes: int) -> np.ndarray:
  """How often each class occurs among the labels that training sees, int64 [C]."""
  labels = np.ravel(examples.label)
  return np.bincount(labels, minlength=num_classes).astype(np.int64)


def assemble(
  train: sources.Source,
  test: sources.Source,
  rows: Mapping[str, np.ndarray],
  *,
  labels: np.ndarray,
  true_labels: np.ndarray,
  test_labels: np.ndarray,
  num_classes: int,
  meta_in_train: bool = False,
  groups: np.ndarray | None = None,
  test_groups: np.ndarray | None = None,
) -> Splits:
  """Cuts the parts out of their sources, once they are seen to be disjoint.

  Args:
    train: source of train, meta and validation; N images.
    test: source of test; N' images.
    rows: source rows by part (`train`, `meta`, `validation`, `test`), in any
      order; a missing meta or validation is empty.
    labels: what training sees, for the whole of `train`, int32 [N].
    true_labels: the truth for the whole of `train`, int32 [N].
    test_labels: the truth for the whole of `test`, int32 [N'].
    num_classes: C of these labels.
    meta_in_train: whether meta may share images with train.
    groups: of the whole of `train`, int32 [N]; the true labels if None.
    test_groups: of the whole of `test`, int32 [N'], likewise.

  Returns:
    The parts and their fingerprint.

  Raises:
    InputError: two parts share an image.
  """
  apart = dict(rows)
  if _origin(train) != _origin(test):
    del apart["test"]
  if meta_in_train:
    check_disjoint({name: part for name, part in apart.items() if name != "train"})
    del apart["meta"]
  check_disjoint(apart)
  none = np.zeros(0, np.int64)
  parts = {
    name: _cut(train.images, rows.get(name, none), labels, true_labels, groups)
    for name in ("train", "meta", "validation")
  }
  parts["test"] = _cut(test.images, rows["test"], test_labels, test_labels, test_groups)
  fingerprint = _fingerprint(train, test, parts)
  return Splits(**parts, num_classes=num_classes, fingerprint=fingerprint)


def keep_train(splits: Splits, rows: np.ndarray) -> Splits:
  """The same problem with only some of its training examples.

  Args:
    splits: the whole.
    rows: of the training set to keep, all different.

  Returns:
    Splits whose train has `index` 0 .. len(rows) - 1 in the old order, under a
    fingerprint of its own.
  """
  rows = np.sort(rows)
  whole = splits.train
  kept = Examples(
    image=whole.image[rows],
    label=whole.label[rows],
    true_label=whole.true_label[rows],
    index=np.arange(len(rows), dtype=np.int32),
    source_index=whole.source_index[rows],
    group=None if whole.group is None else whole.group[rows],
  )
  digest = hashlib.sha256(splits.fingerprint.encode())
  digest.update(rows.astype("<i4").tobytes())
  return splits._replace(train=kept, fingerprint=digest.hexdigest()[:16])


def _origin(source: sources.Source) -> tuple[str, str, str]:
  return source.name, source.version, source.split


def _cut(
  images: np.ndarray,
  rows: np.ndarray,
  labels: np.ndarray,
  true_labels: np.ndarray,
  groups: np.ndarray | None,
) -> Examples:
  rows = np.sort(rows)
  chosen = images[rows]
  if chosen.dtype == np.uint8:
    chosen = np.divide(chosen, np.float32(255), dtype=np.float32)
  return Examples(
    image=chosen.astype(np.float32, copy=False),
    label=labels[rows].astype(np.int32),
    true_label=true_labels[rows].astype(np.int32),
    index=np.arange(len(rows), dtype=np.int32),
    source_index=rows.astype(np.int32),
    group=(true_labels if groups is None else groups)[rows].astype(np.int32),
  )


def _fingerprint(
  train: sources.Source, test: sources.Source, parts: Mapping[str, Examples]
) -> str:
  digest = hashlib.sha256(repr((_origin(train), _origin(test))).encode())
  for name, part in parts.items():
    digest.update(repr((name, len(part.label))).encode())
    for column in (part.source_index, part.label):
      digest.update(column.astype("<i4").tobytes())
    if part.group is not None and not np.array_equal(part.group, part.true_label):
      digest.update(b"group" + part.group.astype("<i4").tobytes())
  return digest.hexdigest()[:16]


def generators(seed: int, number: int) -> list[np.random.Generator]:
  """Independent generators of one seed, for draws that must not disturb others.

  Raises:
    InputError: `seed` is not an integer of at least 0.
  """
  check_sizes(seed=seed)
  children = np.random.SeedSequence(seed).spawn(number)
  return [np.random.default_rng(child) for child in children]


def check_disjoint(rows: Mapping[str, np.ndarray]) -> None:
  """Raises InputError when two parts share a row of their common source.

  Args:
    rows: source rows by name of the part.
  """
  for (one, a), (other, b) in itertools.combinations(rows.items(), 2):
    shared = np.intersect1d(a, b)
    if len(shared):
      raise base.InputError(
        f"{one} and {other} share {len(shared)} images, the first is row"
        f" {shared[0]} of the source; every image may be in one part only"
      )


def check_images(images: Any, what: str) -> None:
  """Raises InputError unless the images are uint8, or floats that are finite.

  Floats are read some rows at a time, so that a source of rows larger than memory
  can be checked.

  Args:
    images: [N, ...], an array or a source of rows as in `Examples.image`.
    what: how the message calls them.
  """
  try:
    dtype, shape, size = np.dtype(images.dtype), tuple(images.shape), len(images)
  except (AttributeError, TypeError):
    raise base.InputError(
      f"{what} must be an array, or a source of rows with shape, dtype of NumPy and"
      f" len; got {type(images).__name__}"
    ) from None
  if dtype == np.uint8:
    return
  if not jax.dtypes.issubdtype(dtype, np.floating):
    raise base.InputError(f"{what} must be uint8 or floating; got {dtype}")
  block = max(1, _BLOCK_BYTES // max(1, dtype.itemsize * math.prod(shape[1:])))
  wrong, first = 0, None
  for start in range(0, size, block):
    found = np.asarray(images[start : min(start + block, size)])
    bad = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))
    wrong += len(bad)
    if first is None and len(bad):
      first = start + bad[0]
  if wrong:
    raise base.InputError(
      f"{wrong} of {what} hold NaN or infinite pixels, the first at index"
      f" {first}; drop or mend them"
    )


def read_rows(source: Any, rows: np.ndarray) -> np.ndarray:
  """Some rows of an array or of a source of rows, in the order of `rows`.

  Args:
    source: [N, ...], as in `Examples.image`.
    rows: integers [n], in any order, possibly repeated.

  Returns:
    The rows, [n, ...].
  """
  if isinstance(source, np.ndarray):
    return source[rows]
  try:
    return np.asarray(source[rows])
  except (TypeError, ValueError):
    # HDF5 reads rows in ascending order only, each of them once.
    ascending, places = np.unique(rows, return_inverse=True)
    return np.asarray(source[ascending])[places]


def integers(what: str, values: Any) -> np.ndarray:
  """Labels, groups or row numbers as int32, if no value changes by that.

  Args:
    what: how the message calls them.
    values: an array or nested lists of integers, booleans or floats without a
      fractional part.

  Raises:
    InputError: another kind of values, ragged lists, or a value that is no int32.
  """
  try:
    array = np.asarray(values)
    if array.dtype == object:
      array = np.asarray(array.tolist())
  except ValueError:
    raise base.InputError(
      f"{what} must be one array of integers; got ragged lists"
    ) from None
  if not array.size:
    return np.zeros(array.shape, np.int32)
  if array.dtype.kind not in "biu" and not jax.dtypes.issubdtype(
    array.dtype, np.floating
  ):
    raise base.InputError(
      f"{what} must be integers; got values of type {array.dtype}, the first is"
      f" {array.flat[0]!r}: number the classes from 0 on"
    )
  limits = np.iinfo(np.int32)
  wide = array if array.dtype.kind in "biu" else array.astype(np.float64)
  fits = (wide >= limits.min) & (wide <= limits.max)
  fits &= wide == np.where(fits, wide, 0).astype(np.int64)
  if not fits.all():
    raise base.InputError(
      f"{what} must be integers; {np.sum(~fits)} are not, the first is"
      f" {wide[~fits].flat[0]}"
    )
  return array.astype(np.int32)


def check_examples(examples: Examples, where: str) -> Examples:
  """The same examples with integer columns, once all fields are of one length.

  Args:
    examples: whose `label`, `true_label`, `index`, `source_index` and `group` may be
      lists, booleans or floats without a fractional part.
    where: how the message calls the examples, such as `train of seed 0`.

  Raises:
    InputError: a column that is not of integers, or of another length than the
      images.
  """
  columns = {
    name: integers(f"{name} in {where}", getattr(examples, name))
    for name in Examples._fields
    if name != "image" and getattr(examples, name) is not None
  }
  if not hasattr(examples.image, "shape"):
    check_images(examples.image, f"the images in {where}")
  for name, column in columns.items():
    if not column.ndim or len(column) != len(examples.image):
      raise base.InputError(
        f"{name} in {where} has shape {list(column.shape)} and there are"
        f" {len(examples.image)} images; give one to each"
      )
  return examples._replace(**columns)


def check_sources(train: sources.Source, test: sources.Source) -> None:
  """Raises InputError unless two splits are sound and fit together."""
  for source in (train, test):
    what = f"{source.name} {source.split}"
    label_noise.check_labels(f"labels of {what}", source.labels, source.num_classes)
    if len(source.images) != len(source.labels):
      raise base.InputError(
        f"{what} has {len(source.images)} images and {len(source.labels)} labels"
      )
    check_images(source.images, f"the images of {what}")
  one, other = (
    (source.images.shape[1:], source.num_classes) for source in (train, test)
  )
  if train[:2] == test[:2] and train.split != test.split:
    whole = [source.split.partition("[")[0] for source in (train, test)]
    if whole[0] == whole[1]:
      raise base.InputError(
        f"{train.split} and {test.split} of {train.name} may share images; give the"
        f" whole split {whole[0]} twice, or take test from another split"
      )
  if one != other:
    raise base.InputError(
      f"train and test do not fit: images of shape {one[0]} in {one[1]} classes"
      f" against {other[0]} in {other[1]}"
    )
  names, others = train.class_names, test.class_names
  if names and others and names != others:
    label = next(
      i for i, pair in enumerate(zip(names, others, strict=True)) if pair[0] != pair[1]
    )
    raise base.InputError(
      f"train and test do not fit: class {label} is {names[label]!r} in"
      f" {train.split} of {train.name} and {others[label]!r} in {test.split} of"
      f" {test.name}; give both the same classes"
    )


def check_sizes(**sizes: int) -> None:
  """Raises InputError, by name, for a size that is no integer of at least 0."""
  for name, size in sizes.items():
    if not isinstance(size, int | np.integer) or size < 0:
      raise base.InputError(f"{name} must be an integer of at least 0; got {size!r}")
