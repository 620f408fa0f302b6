"""Splits from sources, their fingerprints, and checks of examples."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources


def source(split="train", dtype=np.uint8, **changes):
  labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
  images = np.arange(len(labels))[:, None, None, None] * np.ones((1, 2, 2, 1))
  original = sources.Source("toy", "1.0.0", split, images.astype(dtype), labels, 3, {})
  return original._replace(**changes)


def assemble(rows, train=None, test=None, **options):
  train, test = train or source(), test or source("test")
  arguments = {
    "labels": (train.labels + 1) % 3,
    "true_labels": train.labels,
    "test_labels": test.labels,
    "num_classes": 3,
    **options,
  }
  return examples_lib.assemble(train, test, rows, **arguments)


def test_parts_keep_the_order_of_the_source():
  splits = assemble({"train": np.array([5, 0, 3]), "test": np.array([1])})
  np.testing.assert_array_equal(splits.train.source_index, [0, 3, 5])
  np.testing.assert_array_equal(splits.train.index, [0, 1, 2])
  np.testing.assert_array_equal(splits.train.label, [1, 1, 0])
  np.testing.assert_array_equal(splits.train.true_label, [0, 0, 2])
  np.testing.assert_array_equal(splits.test.label, [1])
  np.testing.assert_array_equal(splits.test.true_label, [1])
  np.testing.assert_array_equal(splits.train.image[:, 0, 0, 0], [0, 3, 5])
  assert splits.train.image.dtype == np.uint8
  for column in splits.train[1:]:
    assert column.dtype == np.int32


def test_missing_parts_are_empty():
  splits = assemble({"train": np.arange(6), "test": np.arange(6)})
  assert splits.meta.image.shape == splits.validation.image.shape == (0, 2, 2, 1)
  assert splits.meta.label.dtype == np.int32


def test_float_images_are_unchanged():
  train = source(dtype=np.float64)
  splits = assemble({"train": np.arange(6), "test": np.arange(6)}, train=train)
  np.testing.assert_array_equal(splits.train.image, train.images.astype(np.float32))
  assert splits.train.image.dtype == np.float32


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2", np.longdouble])
def test_floats_of_every_byte_order_and_precision_are_converted(dtype):
  x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float16)
  splits = examples_lib.from_arrays((x.astype(dtype), np.arange(6) % 2))
  for part in (splits.train, splits.test, splits.meta):
    np.testing.assert_array_equal(jnp.asarray(part.image), x[: len(part.label)])
  plain = examples_lib.from_arrays((x, np.arange(6) % 2))
  assert plain.train.image is x


def test_masked_arrays_are_refused():
  x, y = np.ones((4, 2), np.float32), np.arange(4) % 2
  masked = np.ma.array(y, mask=[True, False, False, False])
  with pytest.raises(base.InputError, match="label in train must not be a masked arr"):
    examples_lib.from_arrays((x, masked))
  kept = np.ma.array([True, True, False, False], mask=[True, False, False, False])
  with pytest.raises(base.InputError, match="rows must not be a masked array"):
    examples_lib.keep_train(examples_lib.from_arrays((x, y)), kept)
  with pytest.raises(base.InputError, match="images in train must not be a masked arr"):
    examples_lib.from_arrays((np.ma.array(x), y))


def test_class_counts_use_the_training_labels():
  splits = assemble({"train": np.array([0, 1, 3]), "test": np.arange(6)})
  counts = examples_lib.class_counts(splits.train, 3)
  np.testing.assert_array_equal(counts, [0, 2, 1])
  assert counts.dtype == np.int64


def test_fingerprint_depends_on_rows_labels_groups_and_sources():
  rows = {"train": np.array([0, 1]), "meta": np.array([2]), "test": np.array([3])}
  fingerprints = [
    assemble(rows).fingerprint,
    assemble({**rows, "train": np.array([0, 4])}).fingerprint,
    assemble({**rows, "meta": np.array([4])}).fingerprint,
    assemble({**rows, "test": np.array([4])}).fingerprint,
    assemble({**rows, "validation": np.array([4])}).fingerprint,
    assemble({"train": np.array([0, 1, 2]), "test": np.array([3])}).fingerprint,
    assemble(rows, labels=np.zeros(6, np.int32)).fingerprint,
    assemble(rows, test_labels=np.ones(6, np.int32)).fingerprint,
    assemble(rows, train=source(name="other")).fingerprint,
    assemble(rows, train=source(version="1.0.1")).fingerprint,
    assemble(rows, test=source(split="val")).fingerprint,
    assemble(rows, groups=np.zeros(6, np.int32)).fingerprint,
    assemble(rows, test_groups=np.ones(6, np.int32)).fingerprint,
  ]
  assert len(set(fingerprints)) == len(fingerprints)
  assert all(len(f) == 16 and int(f, 16) >= 0 for f in fingerprints)


def test_fingerprint_ignores_the_order_of_drawing():
  one = assemble({"train": np.array([0, 1, 5]), "test": np.array([3, 2])})
  other = assemble({"test": np.array([2, 3]), "train": np.array([5, 0, 1])})
  assert one.fingerprint == other.fingerprint


def test_groups_default_to_the_true_classes():
  rows = {"train": np.array([0, 4]), "meta": np.array([2]), "test": np.array([3, 5])}
  splits = assemble(rows)
  for part in splits[:4]:
    np.testing.assert_array_equal(part.group, part.true_label)
  groups = np.array([5, 0, 7, 0, 6, 0])
  splits = assemble(rows, groups=groups, test_groups=groups[::-1])
  np.testing.assert_array_equal(splits.train.group, [5, 6])
  np.testing.assert_array_equal(splits.meta.group, [7])
  np.testing.assert_array_equal(splits.test.group, [7, 5])
  assert splits.train.group.dtype == np.int32
  same = assemble(rows, groups=source().labels, test_groups=source().labels)
  assert same.fingerprint == assemble(rows).fingerprint


def test_keep_train_keeps_rows_and_changes_the_fingerprint():
  splits = assemble({"train": np.arange(5), "test": np.array([1])})
  kept = examples_lib.keep_train(splits, np.array([3, 0]))
  np.testing.assert_array_equal(kept.train.source_index, [0, 3])
  np.testing.assert_array_equal(kept.train.index, [0, 1])
  for column, original in zip(kept.train, splits.train, strict=True):
    if column is not kept.train.index:
      np.testing.assert_array_equal(column, original[[0, 3]])
  for part in ("meta", "validation", "test"):
    assert getattr(kept, part) is getattr(splits, part)
  all_splits = [splits, kept, examples_lib.keep_train(splits, np.array([0, 4]))]
  assert len({s.fingerprint for s in all_splits}) == 3
  assert (
    examples_lib.keep_train(splits, np.array([0, 3])).fingerprint == kept.fingerprint
  )


def test_overlap_raises():
  rows = {"train": np.array([0, 3, 4]), "meta": np.array([5, 4, 3])}
  message = "train and meta share 2 images; the first is row 3"
  with pytest.raises(base.InputError, match=message):
    examples_lib.check_disjoint(rows)
  with pytest.raises(base.InputError, match=message):
    assemble({**rows, "test": np.array([0])})


def test_meta_in_train_allows_no_other_overlap():
  rows = {"train": np.array([0, 3]), "meta": np.array([3]), "test": np.array([0])}
  splits = assemble(rows, meta_in_train=True)
  np.testing.assert_array_equal(splits.meta.source_index, [3])
  with pytest.raises(base.InputError, match="meta and validation share 1"):
    assemble({**rows, "validation": np.array([3])}, meta_in_train=True)
  with pytest.raises(base.InputError, match="train and validation share 1"):
    assemble({**rows, "validation": np.array([0])}, meta_in_train=True)


def test_test_set_from_the_training_split_must_be_disjoint():
  rows = {"train": np.array([0, 1]), "test": np.array([1, 2])}
  assemble(rows)
  with pytest.raises(base.InputError, match="train and test share 1 images"):
    assemble(rows, test=source("train"))


def test_generators_are_independent_and_repeatable():
  one, two = (g.random(5) for g in examples_lib.generators(7, 2))
  again, _, _ = (g.random(5) for g in examples_lib.generators(7, 3))
  np.testing.assert_array_equal(one, again)
  assert np.all(one != two)
  assert np.all(one != examples_lib.generators(8, 1)[0].random(5))


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_invalid_seed_raises(seed):
  with pytest.raises(base.InputError, match=f"seed={seed} must be an integer"):
    examples_lib.generators(seed, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_raise(value):
  images = np.zeros((6, 2, 2, 1), np.float32)
  images[3, 1, 0, 0] = images[5, 0, 0, 0] = images[5, 1, 1, 0] = value
  message = "2 of some images have NaN or infinite pixels; the first is at index 3"
  with pytest.raises(base.InputError, match=message):
    examples_lib.check_images(images, "some images")
  with pytest.raises(base.InputError, match="of the images of toy test have NaN"):
    examples_lib.check_sources(source(), source("test", images=images))


def test_numbers_that_are_infinite_in_float32_are_refused():
  images = np.array([[1.0], [1e300]])
  with pytest.raises(base.InputError, match="1 of images have NaN or infinite pixels"):
    examples_lib.check_images(images, "images")


def test_floating_point_images_pass_and_integers_raise():
  examples_lib.check_images(np.zeros((2, 3), np.float64), "floats")
  examples_lib.check_images(np.zeros((0, 3), np.float32), "nothing")
  message = "integers must be uint8 or floating point; got int"
  with pytest.raises(base.InputError, match=message):
    examples_lib.check_images(np.zeros((2, 3), np.int64), "integers")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_classes": 2}, r"labels of toy test must lie in 0 .. 1"),
    ({"labels": np.array([0, -1, 0, 0, 0, 0])}, r"is -1 at index 1"),
    ({"labels": np.zeros(5, np.int32)}, "toy test has 6 images but 5 labels"),
    ({"num_classes": 4}, r"do not match: .* in 3 classes compared with .* in 4"),
    ({"images": np.zeros((6, 3, 3, 1), np.uint8)}, r"\(2, 2, 1\).*\(3, 3, 1\)"),
    # Networks would divide the pixels of one of the two by 255.
    (
      {"images": np.zeros((6, 2, 2, 1), np.float32)},
      "pixels of toy train are uint8, and those of toy test floating point",
    ),
  ],
)
def test_invalid_or_different_sources_raise(changes, message):
  examples_lib.check_sources(source(), source("test"))
  with pytest.raises(base.InputError, match=message):
    examples_lib.check_sources(source(), source("test")._replace(**changes))


@pytest.mark.parametrize(
  "others", [("train[:90%]", "train[50%:]"), ("train", "train[:5]")]
)
def test_slices_of_one_split_raise(others):
  one, other = (source(split) for split in others)
  with pytest.raises(base.InputError, match="may share images"):
    examples_lib.check_sources(one, other)
  examples_lib.check_sources(one, source("test"))


class _File:
  """A row source like HDF5: no `ndim`, and rows only in strictly ascending order."""

  def __init__(self, array):
    self._array, self.largest_read = array, 0
    self.shape, self.dtype = array.shape, array.dtype

  def __len__(self):
    return len(self._array)

  def __getitem__(self, rows):
    if not isinstance(rows, slice) and np.any(np.diff(rows) <= 0):
      raise TypeError("Indexing elements must be in increasing order")
    values = self._array[rows]
    self.largest_read = max(self.largest_read, len(values))
    return values


def test_float_images_in_a_file_are_checked_in_blocks(monkeypatch):
  monkeypatch.setattr(examples_lib, "_BLOCK_BYTES", 2 * 3 * 4)
  array = np.zeros((7, 3), np.float32)
  images = _File(array)
  examples_lib.check_images(images, "rows")
  assert images.largest_read == 2
  array[3, 1] = array[6, 0] = np.nan
  with pytest.raises(base.InputError, match=r"2 of rows have NaN .*at index 3"):
    examples_lib.check_images(images, "rows")
  with pytest.raises(base.InputError, match=r"rows must be an array, .* got list"):
    examples_lib.check_images([[1.0]], "rows")


def test_row_sources_are_not_read_to_make_splits():
  """The parts equal those of arrays; only the meta set is read into memory."""
  rng = np.random.default_rng(0)
  rows = {"train": [7, 1, 5], "meta": [0, 2], "validation": [3], "test": [4, 6]}
  rows = {name: np.array(part) for name, part in rows.items()}
  for images in (
    rng.integers(256, size=(8, 2, 2), dtype=np.uint8),
    rng.normal(size=(8, 2, 2)),
  ):
    splits = []
    for data in (images, _File(images)):
      one = source()._replace(images=data, labels=np.arange(8, dtype=np.int32) % 2)
      columns = dict.fromkeys(("labels", "true_labels", "test_labels"), one.labels)
      result = examples_lib.assemble(one, one, rows, num_classes=2, **columns)
      splits.append(examples_lib.keep_train(result, np.array([0, 2])))
    assert data.largest_read == 2  # The meta set.
    assert splits[0].fingerprint == splits[1].fingerprint
    for part in rows:
      expected, actual = (getattr(split, part).image for split in splits)
      assert isinstance(actual, np.ndarray) == (part == "meta")
      assert actual.dtype == expected.dtype and actual.shape == expected.shape
      assert actual.ndim == 3 and len(actual) == len(expected)
      np.testing.assert_array_equal(actual[:], expected)
      np.testing.assert_array_equal(actual[[0]], expected[[0]])


def test_read_rows_in_any_order():
  array = np.arange(12).reshape(6, 2)
  rows = np.array([4, 0, 4, 2])
  for source in (array, _File(array)):
    np.testing.assert_array_equal(examples_lib.read_rows(source, rows), array[rows])


@pytest.mark.parametrize(
  "values",
  [
    [0, 1, 1],
    np.array([0.0, 1.0, 1.0], np.float16),
    np.array([False, True, True]),
    np.array([0, 1, 1], object),
    np.array([0, 1, 1], np.uint8),
  ],
)
def test_integers_of_any_type_are_accepted(values):
  labels = examples_lib.integers("label", values)
  assert labels.dtype == np.int32 and labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (["cat", "dog"], "type <U3, the first is .*cat"),
    (np.array(["a", 1], object), "values of type"),
    (np.array([None, 1], object), "values of type"),
    ([0.0, 0.5], "1 are not, the first is 0.5"),
    ([0.0, np.nan], "1 are not, the first is nan"),
    ([0, 2**40], "the first is 1099511627776"),
    ([[0], [1, 2]], "got ragged lists"),
    ([1j], "type complex128"),
    (np.array(["2020-01-01"], "M8[D]"), "values of type"),
  ],
)
def test_labels_that_are_not_integers_raise(values, message):
  with pytest.raises(base.InputError, match=rf"label must be .*{message}") as caught:
    examples_lib.integers("label", values)
  assert "\n" not in str(caught.value)


def test_columns_of_another_length_raise():
  train = assemble({"train": np.arange(4), "test": np.arange(6)}).train
  lists = train._replace(label=train.label.tolist(), group=None)
  np.testing.assert_array_equal(
    examples_lib.check_examples(lists, "it").label, train.label
  )
  with pytest.raises(base.InputError, match=r"has shape \[3\], .* 4 images"):
    examples_lib.check_examples(train._replace(label=train.label[:3]), "it")


def test_the_default_test_set_consists_of_training_examples():
  x = np.arange(20.0)[:, None]
  test = examples_lib.from_arrays((x, np.arange(20) % 2)).test
  assert len(test.label) == 20
  np.testing.assert_array_equal(test.image, x[test.source_index])


def test_rows_to_keep_are_distinct_integers_or_bools():
  x, y = np.arange(20.0)[:, None], np.arange(20) % 2
  splits = examples_lib.from_arrays((x, y))
  assert not len(examples_lib.keep_train(splits, []).train.label)
  kept = examples_lib.keep_train(splits, np.arange(20) < 3)
  np.testing.assert_array_equal(kept.train.image[:, 0], [0, 1, 2])
  for rows in ([0, 20], [-1], [1, 1], [0.5], np.ones(3, bool), [[1]]):
    with pytest.raises(base.InputError, match="distinct integers from 0 to 19"):
      examples_lib.keep_train(splits, rows)


def test_features_of_another_type_or_shape_are_refused():
  x, y = np.zeros((4, 2), np.uint8), np.arange(4) % 2
  for other, message in (
    (np.zeros((4, 2)), "of meta are floating point .* train are uint8"),
    (np.zeros((4, 3), np.uint8), r"of meta are uint8 of shape \(3,\)"),
  ):
    with pytest.raises(base.InputError, match=message):
      examples_lib.from_arrays((x, y), meta=(other, y))


@pytest.mark.parametrize(
  "pair", [np.zeros((4, 2)), (1, 2, 3), (np.zeros((4, 2)), None), (np.zeros((4, 2)), 3)]
)
def test_a_part_is_a_pair(pair):
  with pytest.raises(base.InputError, match="train must be a pair"):
    examples_lib.from_arrays(pair)


@pytest.mark.parametrize("dtype", ["uint16", "int64", "object", "bool"])
def test_features_are_uint8_or_floating_point(dtype):
  features = np.zeros((2, 3), dtype)
  message = f"features of train must be uint8 or floating point; got {dtype}"
  with pytest.raises(base.InputError, match=message):
    examples_lib.from_arrays((features, np.array([0, 1])))


def test_the_number_of_classes_is_an_integer():
  with pytest.raises(base.InputError, match=r"num_classes=3\.0 must be an integer"):
    examples_lib.from_arrays((np.zeros((2, 2)), np.array([0, 1])), num_classes=3.0)


def test_the_part_of_an_invalid_label_is_named():
  with pytest.raises(base.InputError, match="labels of train"):
    examples_lib.from_arrays((np.zeros((2, 2)), np.array([0, -1])))
