import itertools
import pathlib

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import sources
from l2rw_jax.data import splits


def source(split, counts):
  """Images that hold their own class in their pixels."""
  labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  labels = np.random.default_rng(1).permutation(labels)
  images = np.broadcast_to(labels[:, None, None, None], (len(labels), 2, 2, 1))
  return sources.Source(
    "toy", "1.0.0", split, images.astype(np.uint8), labels, len(counts), {}
  )


DIGITS = source("train", [7] * 4 + [5842] + [7] * 4 + [5949])
DIGITS_TEST = source("test", [3] * 4 + [982] + [3] * 4 + [1009])
NO_NINES = source("test", [3] * 9 + [0])


def four_versus_nine(train=DIGITS, test=DIGITS_TEST, **options):
  return splits.four_versus_nine(
    train, test, **{"majority": 0.995, "seed": 0, **options}
  )


def rows(part):
  return set(part.source_index.tolist())


@pytest.mark.parametrize(
  ("majority", "fours", "nines"),
  [
    (0.9, 494, 4495),
    (0.95, 245, 4745),
    (0.98, 95, 4895),
    (0.99, 45, 4945),
    (0.995, 20, 4970),
  ],
)
def test_counts_of_the_authors_program(majority, fours, nines):
  made = four_versus_nine(majority=majority)
  np.testing.assert_array_equal(splits.class_counts(made.train, 2), [fours, nines])
  np.testing.assert_array_equal(splits.class_counts(made.meta, 2), [5, 5])
  np.testing.assert_array_equal(splits.class_counts(made.test, 2), [982, 982])
  assert len(made.validation.label) == 0
  assert made.num_classes == 2


def test_fours_and_nines_are_what_they_are_called():
  made = four_versus_nine(num_test=500)
  for part in (made.train, made.meta, made.test):
    digit = np.round(part.image[:, 0, 0, 0] * 255)
    np.testing.assert_array_equal(digit, np.where(part.label == 0, 4, 9))
    np.testing.assert_array_equal(part.label, part.true_label)
  np.testing.assert_array_equal(splits.class_counts(made.test, 2), [250, 250])
  assert not rows(made.train) & rows(made.meta)


def test_meta_left_in_train_gives_the_same_images():
  apart = four_versus_nine()
  together = four_versus_nine(include_meta=True)
  assert rows(together.meta) == rows(apart.meta)
  assert rows(together.train) == rows(apart.train) | rows(apart.meta)
  np.testing.assert_array_equal(splits.class_counts(together.train, 2), [25, 4975])


def test_no_meta_set():
  made = four_versus_nine(num_meta=0)
  assert len(made.meta.label) == 0
  np.testing.assert_array_equal(splits.class_counts(made.train, 2), [25, 4975])


def test_four_versus_nine_is_a_function_of_its_seed():
  one, same, other = (four_versus_nine(seed=seed) for seed in (3, 3, 4))
  assert one.fingerprint == same.fingerprint != other.fingerprint
  assert rows(one.train) == rows(same.train) != rows(other.train)
  assert rows(one.meta) == rows(same.meta) != rows(other.meta)


def test_splits_of_bundled_digits_never_change():
  train, test = (sources.load("digits", split) for split in ("train", "test"))
  imbalanced = splits.four_versus_nine(train, test, majority=0.9, seed=0, num_train=130)
  np.testing.assert_array_equal(splits.class_counts(imbalanced.train, 2), [7, 112])
  assert imbalanced.fingerprint == "56adc42f22c14f3f"
  noisy = splits.noisy_labels(
    train,
    test,
    builder="background_flip",
    fraction=0.4,
    num_meta_per_class=5,
    num_validation=100,
    seed=0,
  )
  assert noisy.fingerprint == "3857c0e8639421cc"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"majority": 0.0}, "majority must lie between 0 and 1; got 0.0"),
    ({"majority": 1.0}, "majority must lie between 0 and 1; got 1.0"),
    ({"majority": 99.5}, "majority must lie between 0 and 1; got 99.5"),
    ({"majority": float("nan")}, "majority must lie between 0 and 1; got nan"),
    ({"num_meta": 9}, "num_meta must be even.*got 9"),
    ({"num_meta": -2}, "num_meta must be an integer of at least 0; got -2"),
    ({"num_train": 99.5}, "num_train must be an integer of at least 0; got 99.5"),
    ({"num_test": 501}, "num_test must be even.*got 501"),
    ({"num_test": 1966}, "983 nines; toy test has 982 and 1009. Use .* 2 to 1964"),
    ({"num_test": 0}, "num_test=0 needs 0 fours"),
    ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
    ({"num_train": 6000}, "draws 30 fours and 5970 nines; toy train has 5842 and 5949"),
    (
      {"num_train": 1000},
      "nothing is left.*draws 5 fours and 995 nines, and at least 6 ",
    ),
    ({"num_train": 100, "num_meta": 0}, "nothing is left.*draws 0 fours and 99 nines"),
    ({"num_train": 100, "include_meta": True}, "nothing is left.*draws 0 fours"),
    ({"test": NO_NINES}, "num_test=None needs 0 fours .* toy test has 3 and 0"),
    ({"num_train": 0}, "nothing is left.*draws 0 fours and 0 nines"),
  ],
)
def test_four_versus_nine_bad_input(options, message):
  with pytest.raises(base.InputError, match=message) as error:
    four_versus_nine(**options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("majority", "most"), [(0.3, 184), (0.9, 143), (0.99, 130)])
def test_too_large_a_demand_names_the_largest_that_can_be_met(majority, most):
  train, test = source("train", [129] * 10), source("test", [50] * 10)
  options = {"majority": majority, "num_meta": 0}
  message = f"has 129 and 129. Use num_train={most} or less"
  with pytest.raises(base.InputError, match=message):
    four_versus_nine(train, test, **options)
  made = four_versus_nine(train, test, num_train=most, **options)
  assert len(made.train.label) >= most - 1
  with pytest.raises(base.InputError, match=message):
    four_versus_nine(train, test, num_train=most + 2, **options)


def test_one_minority_image_is_enough():
  made = four_versus_nine(num_train=1200)
  np.testing.assert_array_equal(splits.class_counts(made.train, 2), [1, 1189])


TRAIN = source("train", [300, 250, 200, 250])
TEST = source("test", [20, 20, 20, 20])
BUILDERS = tuple(
  b for b in splits.BUILDERS if b not in ("bare_class_conditional", "human")
)
VARIANTS = ("paper", "official_code")


def noisy_labels(train=TRAIN, test=TEST, **options):
  given = {
    "builder": "uniform_flip",
    "fraction": 0.4,
    "num_meta_per_class": 10,
    "num_validation": 100,
    "seed": 0,
    **options,
  }
  return splits.noisy_labels(train, test, **given)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_noisy_parts(builder, variant):
  made = noisy_labels(builder=builder, variant=variant)
  sizes = [len(part.label) for part in made[:4]]
  assert sizes == [860, 40, 100, 80]
  chosen = [made.train, made.meta, made.validation]
  for one, other in itertools.combinations(chosen, 2):
    assert not rows(one) & rows(other)
  assert rows(made.train) | rows(made.meta) | rows(made.validation) == set(range(1000))
  for part in made[:4]:
    pixels = np.round(part.image[:, 0, 0, 0] * 255)
    np.testing.assert_array_equal(pixels, part.true_label)
  for part in (made.meta, made.test):
    np.testing.assert_array_equal(part.label, part.true_label)
  np.testing.assert_array_equal(splits.class_counts(made.meta, 4), [10] * 4)
  assert made.num_classes == 4
  for part in (made.train, made.validation):
    # Binomial in the matrix builders: 40 labels, four standard deviations.
    assert 0.1 < np.mean(part.label != part.true_label) < 0.75


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("seed", [0, 1, 2, 7, 12345])
def test_no_seed_lets_clean_images_into_train(builder, seed):
  made = noisy_labels(builder=builder, seed=seed)
  parts = [rows(part) for part in made[:3]]
  assert sum(map(len, parts)) == len(set.union(*parts)) == 1000
  np.testing.assert_array_equal(splits.class_counts(made.meta, 4), [10] * 4)
  np.testing.assert_array_equal(made.meta.label, TRAIN.labels[made.meta.source_index])


def test_uniform_paper_fraction_is_exact_in_both_noisy_parts():
  made = noisy_labels()
  assert np.sum(made.train.label != made.train.true_label) == 344
  assert np.sum(made.validation.label != made.validation.true_label) == 40


@pytest.mark.parametrize("seed", range(8))
def test_train_and_validation_share_the_background(seed):
  made = noisy_labels(builder="background_flip", seed=seed)
  targets = [
    set(part.label[part.label != part.true_label].tolist())
    for part in (made.train, made.validation)
  ]
  assert targets[0] == targets[1]
  assert len(targets[0]) == 1


def test_backgrounds_differ_between_seeds():
  drawn = set()
  for seed in range(20):
    part = noisy_labels(builder="background_flip", seed=seed).train
    drawn.update(part.label[part.label != part.true_label].tolist())
  assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("builder", BUILDERS)
def test_noisy_labels_are_a_function_of_the_seed(builder):
  one, same, other = (noisy_labels(builder=builder, seed=seed) for seed in (3, 3, 4))
  assert one.fingerprint == same.fingerprint != other.fingerprint
  np.testing.assert_array_equal(one.train.label, same.train.label)
  assert rows(one.meta) != rows(other.meta)
  assert rows(one.validation) != rows(other.validation)


def test_other_settings_leave_the_draws_alone():
  one = noisy_labels()
  for made in (
    noisy_labels(fraction=0.1),
    noisy_labels(builder="background_flip"),
    noisy_labels(variant="official_code"),
  ):
    assert made.fingerprint != one.fingerprint
    assert rows(made.meta) == rows(one.meta)
    assert rows(made.validation) == rows(one.validation)
  larger = noisy_labels(num_validation=200)
  assert rows(larger.meta) == rows(one.meta)
  assert rows(larger.validation) > rows(one.validation)


def test_no_meta_no_validation_no_noise():
  made = noisy_labels(num_meta_per_class=0, num_validation=0, fraction=0.0)
  assert [len(part.label) for part in made[:4]] == [1000, 0, 0, 80]
  np.testing.assert_array_equal(made.train.label, TRAIN.labels)


def test_source_is_left_alone():
  before = TRAIN.labels.copy()
  noisy_labels(fraction=1.0)
  np.testing.assert_array_equal(TRAIN.labels, before)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"builder": "flip"},
      "builder must be one of uniform_flip, .*, human; got 'flip'",
    ),
    ({"variant": "code"}, "variant must be one of .*; got 'code'"),
    ({"fraction": 40}, r"fraction must lie in \[0, 1\].*got 40"),
    ({"num_meta_per_class": 201}, "class 2 has 200 images in toy train.*needs 201"),
    ({"num_validation": 960}, "nothing is left.* has 1000 images.*takes 40.*=960"),
    ({"num_validation": -1}, "num_validation must be an integer of at least 0; got -1"),
    ({"num_meta_per_class": 2.5}, "num_meta_per_class must be an integer"),
    ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
    (
      {"train": TRAIN._replace(labels=TRAIN.labels + 1)},
      "labels of toy train must lie",
    ),
    ({"test": TRAIN}, "share 860 images"),
    (
      {"train": TRAIN._replace(images=np.full((1000, 2, 2, 1), np.nan))},
      "1000 of the images of toy train hold NaN.*index 0",
    ),
  ],
)
def test_noisy_labels_bad_input(options, message):
  with pytest.raises(base.InputError, match=message) as error:
    noisy_labels(**options)
  assert "\n" not in str(error.value)


def test_one_image_is_enough_to_train_on():
  assert len(noisy_labels(num_validation=959).train.label) == 1


@pytest.mark.real_data
def test_real_mnist_as_in_the_paper(tfds_dir: pathlib.Path, decoded: pathlib.Path):
  train, test = (
    sources.load("mnist", split, data_dir=tfds_dir, cache_dir=decoded)
    for split in ("train", "test")
  )
  made = splits.four_versus_nine(train, test, majority=0.995, seed=0, num_test=500)
  np.testing.assert_array_equal(splits.class_counts(made.train, 2), [20, 4970])
  np.testing.assert_array_equal(splits.class_counts(made.test, 2), [250, 250])
  np.testing.assert_array_equal(
    train.labels[made.train.source_index], np.where(made.train.label, 9, 4)
  )
  assert made.train.image.shape == (4990, 28, 28, 1)
  assert 0 <= made.train.image.min() < made.train.image.max() == 1
