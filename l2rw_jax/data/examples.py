"""Examples and splits: train, meta, validation and test sets drawn from a source.

All functions that make splits use this file: it has the types that they return,
`assemble`, and checks of their arguments.
"""

from collections.abc import Iterator, Mapping
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
  """One part of the data: N examples, possibly none.

  Attributes:
    image: uint8 or floating point [N, ...]. Pixels stay uint8, which takes a quarter of
      the memory of float32, until the model scales them (`classifier.Classifier`). The
      field may also be a row source: any object with `len`, `shape` and `dtype` that
      returns an array when indexed with a slice or an array of rows. A row source may
      be indexed from several threads at a time. It may have an attribute `fingerprint`,
      a string that changes whenever the rows change, such as a checksum of their file.
      Without this attribute, all rows are read, in blocks, when a run starts or
      continues, to compute a checksum and, for floats, to search for NaN.
    label: the labels for training, int32 [N]; [N, Q] if an example has Q labels.
    true_label: the true labels, of the same shape.
    index: int32 [N], 0 .. N - 1, the row in this part.
    source_index: int32 [N], the row in the source split, ascending.
    group: int32 [N], the attribute for which training should be fair; None stands for
      `true_label`. Methods may use true classes only on the meta set.
  """

  image: Any
  label: np.ndarray
  true_label: np.ndarray
  index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, unused here
  source_index: np.ndarray
  group: np.ndarray | None = None


class Splits(NamedTuple):
  """The four parts of the data of a learning problem.

  Attributes:
    train: the training set, with wrong labels or imbalanced classes.
    meta: the meta set, clean; N = 0 if there is none.
    validation: a set like `train`, for tuning; N = 0 if there is none.
    test: the test set, clean.
    num_classes: C.
    fingerprint: 16 hex digits of a SHA-256. `assemble` hashes the name, version and
      split of each source, the source rows and labels of all four parts, and their
      groups if these are not the classes; `from_arrays` hashes shapes and labels.
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
  """Number of examples with each training label, int64 [C]."""
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
  """Makes splits from rows of two sources; the parts must be disjoint.

  Args:
    train: source of the training, meta and validation sets; N images.
    test: source of the test set; N' images.
    rows: source rows of each part (`train`, `meta`, `validation`, `test`), in any
      order; `meta` and `validation` are empty if missing.
    labels: training labels of all images of `train`, int32 [N].
    true_labels: true labels of all images of `train`, int32 [N].
    test_labels: true labels of all images of `test`, int32 [N'].
    num_classes: C.
    meta_in_train: whether the meta and training sets may share images.
    groups: groups of all images of `train`, int32 [N]; the true labels if None.
    test_groups: groups of all images of `test`, int32 [N']; the true labels if None.

  Returns:
    The parts and their fingerprint.

  Raises:
    InputError: two parts share an image.
  """
  disjoint = dict(rows)
  if _origin(train) != _origin(test):
    del disjoint["test"]
  if meta_in_train:
    check_disjoint({name: part for name, part in disjoint.items() if name != "train"})
    del disjoint["meta"]
  check_disjoint(disjoint)
  no_rows = np.zeros(0, np.int64)
  # The meta set is always in memory: it is small, and every step uses some of it.
  is_lazy = {
    "train": not isinstance(train.images, np.ndarray),
    "test": not isinstance(test.images, np.ndarray),
  }
  is_lazy["validation"] = is_lazy["train"]
  parts = {
    name: _select(
      train.images,
      rows.get(name, no_rows),
      labels,
      true_labels,
      groups,
      is_lazy.get(name, False),
    )
    for name in ("train", "meta", "validation")
  }
  parts["test"] = _select(
    test.images, rows["test"], test_labels, test_labels, test_groups, is_lazy["test"]
  )
  fingerprint = _fingerprint(train, test, parts)
  return Splits(**parts, num_classes=num_classes, fingerprint=fingerprint)


Arrays = tuple[Any, Any]


def from_arrays(
  train: Arrays,
  *,
  meta: Arrays | None = None,
  validation: Arrays | None = None,
  test: Arrays | None = None,
  num_classes: int | None = None,
) -> Splits:
  """Makes splits from a user's arrays, without changing the arrays.

  Each part is a pair of features [N, ...], uint8 or floating point, and labels [N],
  integers from 0 to C - 1. The features of all parts have the same type and shape.

  Args:
    train: the training set.
    meta: trusted examples; None is an empty set.
    validation: the validation set; None is an empty set.
    test: the test set. None uses up to 500 random training examples, so that accuracy
      only shows how well the network agrees with the given labels.
    num_classes: C; None is one more than the largest label.

  Returns:
    Splits whose true labels are the given labels.

  Raises:
    InputError: a part is not a pair or is masked, its features and labels have
      different lengths, its features are neither uint8 nor floating point, their type
      or shape differs from that of `train`, labels are not integers from 0 to C - 1,
      `num_classes` is not an integer, or there is no training example.
  """
  given = {"train": train, "meta": meta, "validation": validation, "test": test}
  parts = {}
  for name, pair in given.items():
    if pair is None:
      continue
    if (
      not isinstance(pair, tuple | list)
      or len(pair) != 2
      or not hasattr(pair[1], "__len__")
    ):
      raise base.InputError(f"{name} must be a pair (features, labels)")
    parts[name] = check_examples(_arrays_examples(*pair), name)
  whole = parts["train"]
  if not len(whole.label):
    raise base.InputError("train has no examples")
  kinds = {name: _kind(part.image, name) for name, part in parts.items()}
  for name, kind in kinds.items():
    if len(parts[name].label) and kind != kinds["train"]:
      raise base.InputError(
        f"the features of {name} are {kind[0]} of shape {kind[1]}, but those of train"
        f" are {kinds['train'][0]} of shape {kinds['train'][1]}"
      )
  if test is None:
    rows = np.sort(np.random.default_rng(0).permutation(len(whole.label))[:500])
    drawn = _arrays_examples(read_rows(whole.image, rows), whole.label[rows])
    parts["test"] = drawn._replace(source_index=rows.astype(np.int32))
  for name in ("meta", "validation"):
    empty = _arrays_examples(whole.image[:0], np.zeros(0, np.int32))
    parts.setdefault(name, empty)
  if not isinstance(num_classes, int | np.integer | None):
    raise base.InputError(f"num_classes={num_classes} must be an integer")
  if num_classes is None:
    num_classes = 1 + max(int(part.label.max(initial=0)) for part in parts.values())
  digest = hashlib.sha256()
  for name in given:
    label_noise.check_labels(f"labels of {name}", parts[name].label, num_classes)
  for name, part in sorted(parts.items()):
    digest.update(repr((name, tuple(part.image.shape))).encode())
    digest.update(part.label.astype("<i4").tobytes())
  return Splits(**parts, num_classes=num_classes, fingerprint=digest.hexdigest()[:16])


def _kind(features: Any, name: str) -> tuple[str, tuple[int, ...]]:
  """The type of features, regardless of the precision of floats, and their shape."""
  try:
    dtype = np.dtype(features.dtype)
  except (AttributeError, TypeError):
    check_images(features, f"the images in {name}")
    raise
  is_float = jax.dtypes.issubdtype(dtype, np.floating)
  if not is_float and dtype != np.uint8:
    raise base.InputError(
      f"the features of {name} must be uint8 or floating point; got {dtype}"
    )
  return "floating point" if is_float else str(dtype), tuple(features.shape[1:])


def _arrays_examples(features: Any, labels: Any) -> Examples:
  index = np.arange(len(labels), dtype=np.int32)
  return Examples(features, labels, labels, index, index)


def keep_train(splits: Splits, rows: np.ndarray) -> Splits:
  """Keeps only some of the training examples.

  Args:
    splits: the splits.
    rows: rows of the training set to keep, all distinct; or a bool for each row.

  Returns:
    Splits with a new fingerprint, in which the training examples keep their order
    and have `index` 0 .. len(rows) - 1.

  Raises:
    InputError: a row does not exist or occurs twice, or `rows` is neither integers nor
      one bool for each training example.
  """
  whole = splits.train
  rows = different_rows("rows", rows, len(whole.label))
  is_array = isinstance(whole.image, np.ndarray)
  kept = Examples(
    image=whole.image[rows] if is_array else View(whole.image, rows),
    label=whole.label[rows],
    true_label=whole.true_label[rows],
    index=np.arange(len(rows), dtype=np.int32),
    source_index=whole.source_index[rows],
    group=None if whole.group is None else whole.group[rows],
  )
  digest = hashlib.sha256(splits.fingerprint.encode())
  digest.update(rows.astype("<i4").tobytes())
  return splits._replace(train=kept, fingerprint=digest.hexdigest()[:16])


def different_rows(name: str, rows: Any, size: int) -> np.ndarray:
  """Row numbers in ascending order.

  Args:
    name: name of the argument.
    rows: distinct integers from 0 to `size` - 1, or a bool for each row.
    size: number of rows that exist.

  Raises:
    InputError: a row does not exist or occurs twice, or `rows` is masked or is neither
      integers nor one bool for each row.
  """
  base.refuse_mask(name, rows)
  rows = np.asarray(rows)
  if rows.dtype == np.bool_ and rows.shape == (size,):
    rows = np.flatnonzero(rows)
  if rows.shape == (0,):
    rows = rows.astype(np.int64)
  if (
    not np.issubdtype(rows.dtype, np.integer)
    or rows.ndim != 1
    or len(np.unique(rows)) != len(rows)
    or (rows.size and not 0 <= rows.min() <= rows.max() < size)
  ):
    raise base.InputError(
      f"{name} must be distinct integers from 0 to {size - 1}, or {size} bools"
    )
  return np.sort(rows)


def check_trusted(
  train: sources.Source, trusted: sources.Source, num_meta_per_class: int
) -> None:
  """Raises InputError unless a source can be the meta set of a training source.

  Args:
    train: the source of the training set.
    trusted: the source of the meta set.
    num_meta_per_class: number of meta images per class from `train`, which must be 0.
  """
  check_sources(train, trusted)
  if num_meta_per_class:
    raise base.InputError(
      f"num_meta_per_class={num_meta_per_class} must be 0 if trusted examples are"
      " given, because these are the meta set"
    )


def with_meta(splits: Splits, source: sources.Source) -> Splits:
  """Replaces the meta set of splits with all examples of another source.

  Args:
    splits: the splits.
    source: examples in the same classes as those of `splits`, with true labels.

  Returns:
    Splits with a new fingerprint.
  """
  rows = np.arange(len(source.labels))
  meta = _select(source.images, rows, source.labels, source.labels, None)
  digest = hashlib.sha256(splits.fingerprint.encode())
  digest.update(repr(_origin(source)).encode() + source.labels.astype("<i4").tobytes())
  return splits._replace(meta=meta, fingerprint=digest.hexdigest()[:16])


def _origin(source: sources.Source) -> tuple[str, str, str]:
  return source.name, source.version, source.split


def _select(
  images: Any,
  rows: np.ndarray,
  labels: np.ndarray,
  true_labels: np.ndarray,
  groups: np.ndarray | None,
  is_lazy: bool = False,
) -> Examples:
  rows = np.sort(rows)
  return Examples(
    image=View(images, rows) if is_lazy else _narrow(read_rows(images, rows)),
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
  """Returns independent generators, so that draws do not affect each other.

  Raises:
    InputError: `seed` is not an integer of at least 0.
  """
  check_sizes(seed=seed)
  children = np.random.SeedSequence(seed).spawn(number)
  return [np.random.default_rng(child) for child in children]


def check_disjoint(rows: Mapping[str, np.ndarray]) -> None:
  """Raises InputError if two parts share a row of their common source.

  Args:
    rows: source rows of each part, by its name.
  """
  for (one, a), (other, b) in itertools.combinations(rows.items(), 2):
    shared = np.intersect1d(a, b)
    if len(shared):
      raise base.InputError(
        f"{one} and {other} share {len(shared)} images; the first is row"
        f" {shared[0]} of the source. Every image may be in only one part"
      )


def check_images(images: Any, what: str) -> None:
  """Raises InputError unless the images are uint8 or floats, finite in float32.

  Floats are read in blocks, so that a row source may be larger than memory. A row
  source with a `fingerprint` is not read. If it contains NaN or infinite values,
  training stops at the first loss that is not finite.

  Args:
    images: [N, ...], an array or a row source as in `Examples.image`.
    what: name of the images in the message.
  """
  try:
    dtype, _, _ = np.dtype(images.dtype), tuple(images.shape), len(images)
  except (AttributeError, TypeError):
    raise base.InputError(
      f"{what} must be an array, or a row source with a shape, a NumPy dtype and a"
      f" length; got {type(images).__name__}"
    ) from None
  if dtype == np.uint8:
    return
  if not jax.dtypes.issubdtype(dtype, np.floating):
    raise base.InputError(f"{what} must be uint8 or floating point; got {dtype}")
  if not isinstance(images, np.ndarray) and hasattr(images, "fingerprint"):
    return
  num_bad, first, start = 0, None, 0
  for pixels in blocks(images):
    with np.errstate(over="ignore"):
      is_finite = np.isfinite(pixels.astype(np.float32, copy=False))
    bad = np.flatnonzero(~is_finite.reshape(len(pixels), -1).all(axis=1))
    num_bad += len(bad)
    if first is None and len(bad):
      first = start + bad[0]
    start += len(pixels)
  if num_bad:
    raise base.InputError(
      f"{num_bad} of {what} have NaN or infinite pixels; the first is at index"
      f" {first}: remove or repair them"
    )


def blocks(source: Any) -> Iterator[np.ndarray]:
  """Yields the rows of an array or a row source in order, 64 MiB at a time.

  Args:
    source: [N, ...], as in `Examples.image`.
  """
  row_bytes = np.dtype(source.dtype).itemsize * math.prod(source.shape[1:])
  size, block = len(source), max(1, _BLOCK_BYTES // max(1, row_bytes))
  for start in range(0, size, block):
    yield np.asarray(source[start : min(start + block, size)])


class View:
  """Some rows of a row source, as a row source of uint8 or float32.

  If the source has a `fingerprint`, the view has one too.
  """

  def __init__(self, source: Any, rows: np.ndarray):
    """Stores the arguments without reading rows.

    Args:
      source: an array or a row source, as in `Examples.image`.
      rows: integers [n].
    """
    self.shape = (len(rows), *source.shape[1:])
    is_uint8 = np.dtype(source.dtype) == np.uint8
    self.dtype = np.dtype(np.uint8 if is_uint8 else np.float32)
    self._source, self._rows = source, rows
    if hasattr(source, "fingerprint"):
      digest = hashlib.sha256(str(source.fingerprint).encode())
      digest.update(rows.astype("<i8").tobytes())
      self.fingerprint = digest.hexdigest()

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.shape)

  def __len__(self) -> int:
    """The number of rows."""
    return len(self._rows)

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Reads rows, given by a slice or an array of integers."""
    return _narrow(read_rows(self._source, self._rows[rows]))


def _narrow(images: np.ndarray) -> np.ndarray:
  """uint8 images as they are, other images as float32."""
  return images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)


def read_rows(source: Any, rows: np.ndarray) -> np.ndarray:
  """Reads some rows of an array or of a row source, in the given order.

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
    # HDF5 requires ascending rows without repetition.
    ascending, places = np.unique(rows, return_inverse=True)
    return np.asarray(source[ascending])[places]


def integers(what: str, values: Any) -> np.ndarray:
  """Converts labels, groups or row numbers to int32 without changing a value.

  Args:
    what: name of the values in the message.
    values: an array or nested lists of integers, booleans or floats without a
      fractional part.

  Raises:
    InputError: the values have an unsupported type, are masked or are ragged lists, or
      one of them is not an integer that fits into int32.
  """
  base.refuse_mask(what, values)
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
      f" {array.flat[0]!r}: use numbers from 0"
    )
  limits = np.iinfo(np.int32)
  wide = array if array.dtype.kind in "biu" else array.astype(np.float64)
  fits = (wide >= limits.min) & (wide <= limits.max)
  fits &= wide == np.where(fits, wide, 0).astype(np.int64)
  if not fits.all():
    raise base.InputError(
      f"{what} must be integers that fit into 32 bits; {np.sum(~fits)} are not, the"
      f" first is {wide[~fits].flat[0]}"
    )
  return array.astype(np.int32)


def check_examples(examples: Examples, where: str) -> Examples:
  """Converts labels, indices and groups to int32, and checks the lengths of all fields.

  An array of images in a byte order or a precision that JAX does not support is
  converted, too.

  Args:
    examples: examples whose `label`, `true_label`, `index`, `source_index` and `group`
      may be lists, booleans or floats without a fractional part.
    where: name of the examples in the message, such as `train of seed 0`.

  Raises:
    InputError: an array is masked, the images are neither an array nor a row source, a
      column does not contain integers, or its length is not the number of images.
  """
  columns = {
    name: integers(f"{name} in {where}", getattr(examples, name))
    for name in Examples._fields
    if name != "image" and getattr(examples, name) is not None
  }
  image = examples.image
  base.refuse_mask(f"the images in {where}", image)
  if not hasattr(image, "shape"):
    check_images(image, f"the images in {where}")
  for name, column in columns.items():
    if not column.ndim or len(column) != len(image):
      raise base.InputError(
        f"{name} in {where} has shape {list(column.shape)}, but there are"
        f" {len(image)} images; give one for each"
      )
  if isinstance(image, np.ndarray) and image.dtype.kind == "f":
    native = image.dtype.newbyteorder("=")
    supported = np.dtype(np.float64) if native == np.longdouble else native
    image = image.astype(supported, copy=False)
  return examples._replace(image=image, **columns)


def check_sources(train: sources.Source, test: sources.Source) -> None:
  """Raises InputError unless two sources are valid and have the same kind of data.

  Both must have images of one shape, all uint8 or all floating point, and the same
  classes. Two different slices of one split are refused, because they may share images.
  """
  for source in (train, test):
    what = f"{source.name} {source.split}"
    label_noise.check_labels(f"labels of {what}", source.labels, source.num_classes)
    if len(source.images) != len(source.labels):
      raise base.InputError(
        f"{what} has {len(source.images)} images but {len(source.labels)} labels"
      )
    check_images(source.images, f"the images of {what}")
  one, other = (
    (source.images.shape[1:], source.num_classes) for source in (train, test)
  )
  both = f"{train.name} {train.split} and {test.name} {test.split}"
  if train[:2] == test[:2] and train.split != test.split:
    whole = [source.split.partition("[")[0] for source in (train, test)]
    if whole[0] == whole[1]:
      raise base.InputError(
        f"{train.split} and {test.split} of {train.name} may share images; give the"
        f" whole split {whole[0]} twice, or take one of the two from another split"
      )
  if one != other:
    raise base.InputError(
      f"{both} do not match: images of shape {one[0]} in {one[1]} classes"
      f" compared with {other[0]} in {other[1]}"
    )
  # Networks divide uint8 pixels by 255, but not floats.
  kinds = [_kind(source.images, source.name)[0] for source in (train, test)]
  if kinds[0] != kinds[1]:
    raise base.InputError(
      f"{both} do not match: the pixels of {train.name} {train.split} are {kinds[0]},"
      f" and those of {test.name} {test.split} {kinds[1]}; convert one of them"
    )
  names, others = train.class_names, test.class_names
  if names and others and names != others:
    label = next(
      i for i, pair in enumerate(zip(names, others, strict=True)) if pair[0] != pair[1]
    )
    raise base.InputError(
      f"{both} do not match: class {label} is {names[label]!r} in {train.split} of"
      f" {train.name} and {others[label]!r} in {test.split} of {test.name}; give both"
      " the same classes"
    )


def check_sizes(**sizes: int) -> None:
  """Raises InputError if a size is not an integer of at least 0."""
  for name, size in sizes.items():
    base.check_integer(name, size, 0)
