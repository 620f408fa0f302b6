"""Splits with label noise, and every kind of noise."""

import itertools
import pathlib

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources


def source(split, counts):
  """Images whose pixels all have the value of their class."""
  labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  labels = np.random.default_rng(1).permutation(labels)
  images = np.broadcast_to(labels[:, None, None, None], (len(labels), 2, 2, 1))
  return sources.Source(
    "toy", "1.0.0", split, images.astype(np.uint8), labels, len(counts), {}
  )


def rows(part):
  return set(part.source_index.tolist())


TRAIN = source("train", [300, 250, 200, 250])
TEST = source("test", [20, 20, 20, 20])
BUILDERS = tuple(
  b for b in noisy_labels.BUILDERS if b not in ("bare_class_conditional", "human")
)
VARIANTS = ("paper", "official_code")


def make_splits(train=TRAIN, test=TEST, **options):
  arguments = {
    "builder": "uniform_flip",
    "fraction": 0.4,
    "num_meta_per_class": 10,
    "num_validation": 100,
    "seed": 0,
    **options,
  }
  return noisy_labels.noisy_labels(train, test, **arguments)


def test_splits_of_digits_never_change():
  train, test = (sources.load("digits", split) for split in ("train", "test"))
  splits = noisy_labels.noisy_labels(
    train,
    test,
    builder="background_flip",
    fraction=0.4,
    num_meta_per_class=5,
    num_validation=100,
    seed=0,
  )
  assert splits.fingerprint == "3857c0e8639421cc"


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_classes_and_share_of_wrong_labels(builder, variant):
  splits = make_splits(builder=builder, variant=variant)
  sizes = [len(part.label) for part in splits[:4]]
  assert sizes == [860, 40, 100, 80]
  chosen = [splits.train, splits.meta, splits.validation]
  for one, other in itertools.combinations(chosen, 2):
    assert not rows(one) & rows(other)
  assert rows(splits.train) | rows(splits.meta) | rows(splits.validation) == set(
    range(1000)
  )
  for part in splits[:4]:
    pixels = part.image[:, 0, 0, 0]
    np.testing.assert_array_equal(pixels, part.true_label)
  for part in (splits.meta, splits.test):
    np.testing.assert_array_equal(part.label, part.true_label)
  np.testing.assert_array_equal(examples_lib.class_counts(splits.meta, 4), [10] * 4)
  assert splits.num_classes == 4
  for part in (splits.train, splits.validation):
    # Loose bounds: with a transition matrix the number of wrong labels is random.
    assert 0.1 < np.mean(part.label != part.true_label) < 0.75


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("seed", [0, 1, 2, 7, 12345])
def test_splits_are_disjoint_and_the_meta_set_is_balanced(builder, seed):
  splits = make_splits(builder=builder, seed=seed)
  parts = [rows(part) for part in splits[:3]]
  assert sum(map(len, parts)) == len(set.union(*parts)) == 1000
  np.testing.assert_array_equal(examples_lib.class_counts(splits.meta, 4), [10] * 4)
  np.testing.assert_array_equal(
    splits.meta.label, TRAIN.labels[splits.meta.source_index]
  )


def test_uniform_flip_is_exact_in_train_and_validation():
  splits = make_splits()
  assert np.sum(splits.train.label != splits.train.true_label) == 344
  assert np.sum(splits.validation.label != splits.validation.true_label) == 40


@pytest.mark.parametrize("seed", range(8))
def test_train_and_validation_share_the_background(seed):
  splits = make_splits(builder="background_flip", seed=seed)
  targets = [
    set(part.label[part.label != part.true_label].tolist())
    for part in (splits.train, splits.validation)
  ]
  assert targets[0] == targets[1]
  assert len(targets[0]) == 1


def test_backgrounds_differ_between_seeds():
  drawn = set()
  for seed in range(20):
    part = make_splits(builder="background_flip", seed=seed).train
    drawn.update(part.label[part.label != part.true_label].tolist())
  assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("builder", BUILDERS)
def test_splits_are_determined_by_the_seed(builder):
  one, same, other = (make_splits(builder=builder, seed=seed) for seed in (3, 3, 4))
  assert one.fingerprint == same.fingerprint != other.fingerprint
  np.testing.assert_array_equal(one.train.label, same.train.label)
  assert rows(one.meta) != rows(other.meta)
  assert rows(one.validation) != rows(other.validation)


def test_draws_are_independent_of_other_settings():
  one = make_splits()
  for splits in (
    make_splits(fraction=0.1),
    make_splits(builder="background_flip"),
    make_splits(variant="official_code"),
  ):
    assert splits.fingerprint != one.fingerprint
    assert rows(splits.meta) == rows(one.meta)
    assert rows(splits.validation) == rows(one.validation)
  larger = make_splits(num_validation=200)
  assert rows(larger.meta) == rows(one.meta)
  assert rows(larger.validation) > rows(one.validation)


def test_without_meta_validation_and_noise():
  splits = make_splits(num_meta_per_class=0, num_validation=0, fraction=0.0)
  assert [len(part.label) for part in splits[:4]] == [1000, 0, 0, 80]
  np.testing.assert_array_equal(splits.train.label, TRAIN.labels)


def test_source_is_not_modified():
  before = TRAIN.labels.copy()
  make_splits(fraction=1.0)
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
    ({"num_validation": -1}, "num_validation=-1 must be an integer of at least 0"),
    ({"num_meta_per_class": 2.5}, "num_meta_per_class=2.5 must be an integer"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
    (
      {"train": TRAIN._replace(labels=TRAIN.labels + 1)},
      "labels of toy train must lie",
    ),
    ({"test": TRAIN}, "share 860 images"),
    (
      {"train": TRAIN._replace(images=np.full((1000, 2, 2, 1), np.nan))},
      "1000 of the images of toy train have NaN.*index 0",
    ),
  ],
)
def test_invalid_arguments_raise(options, message):
  with pytest.raises(base.InputError, match=message) as error:
    make_splits(**options)
  assert "\n" not in str(error.value)


def test_one_training_image_suffices():
  assert len(make_splits(num_validation=959).train.label) == 1


def balanced_source(name="toy", split="train", num_classes=10, each=5000, extra=None):
  """A source with `each` tiny images of every class."""
  labels = np.repeat(np.arange(num_classes), each).astype(np.int32)
  labels = np.random.default_rng(1).permutation(labels)
  images = np.zeros((len(labels), 1, 1, 1), np.uint8)
  return sources.Source(name, "1.0.0", split, images, labels, num_classes, extra or {})


def make_balanced(train, **options):
  arguments = {"fraction": 0.4, "num_meta_per_class": 10, "seed": 0, **options}
  return noisy_labels.noisy_labels(
    train, balanced_source(train.name, "test", each=2), **arguments
  )


def transitions(part, num_classes=10):
  """Estimated transition matrix, [C, C]."""
  counts = np.zeros((num_classes, num_classes))
  np.add.at(counts, (part.true_label, part.label), 1)
  return counts / counts.sum(1, keepdims=True)


@pytest.mark.parametrize(
  ("builder", "name", "variant", "wrong"),
  [
    ("uniform_flip", "toy", "paper", 0.4),
    ("uniform_flip", "toy", "official_code", 0.36),
    ("background_flip", "toy", "paper", 0.36),
    ("bare_symmetric", "toy", "paper", 0.4),
    ("bare_class_conditional", "mnist", "paper", 0.2),
    ("bare_class_conditional", "cifar10", "paper", 0.2),
    ("mwn_uniform", "toy", "paper", 0.36),
    ("mwn_flip", "toy", "paper", 0.4),
    ("mwn_flip2", "toy", "paper", 0.4),
    ("mwn_flip2", "toy", "official_code", 0.4),
  ],
)
def test_share_of_wrong_labels_at_fraction_0_4(builder, name, variant, wrong):
  part = make_balanced(balanced_source(name), builder=builder, variant=variant).train
  # Five standard deviations of a share of 49,900 labels.
  assert abs(np.mean(part.label != part.true_label) - wrong) < 0.011


@pytest.mark.parametrize(
  ("name", "pairs"),
  [
    ("mnist", {(7, 1), (2, 7), (3, 8), (5, 6), (6, 5)}),
    ("cifar10", {(9, 1), (2, 0), (3, 5), (5, 3), (4, 7)}),
    ("cifar10_n", {(9, 1), (2, 0), (3, 5), (5, 3), (4, 7)}),
  ],
)
def test_bare_class_conditional_confuses_its_pairs(name, pairs):
  train = balanced_source(name)
  part = make_balanced(train, builder="bare_class_conditional", fraction=0.45).train
  matrix = transitions(part)
  confused = {tuple(map(int, p)) for p in np.argwhere(matrix > 0) if p[0] != p[1]}
  assert confused == pairs
  # Five standard deviations of a share of 4,990 labels.
  np.testing.assert_allclose([matrix[p] for p in pairs], 0.45, atol=0.036)


@pytest.mark.parametrize(
  ("builder", "num_targets"), [("mwn_flip", 1), ("mwn_flip2", 2)]
)
def test_flip_targets_by_variant(builder, num_targets):
  def has_transition(seed, variant):
    splits = make_balanced(
      balanced_source(each=400),
      builder=builder,
      seed=seed,
      variant=variant,
      num_validation=1500,
    )
    train, validation = (
      transitions(part) > 0 for part in (splits.train, splits.validation)
    )
    np.testing.assert_array_equal(train, validation)  # One matrix for both.
    return train

  paper = [has_transition(seed, "paper") for seed in (0, 1)]
  official = [has_transition(seed, "official_code") for seed in (0, 1)]
  for matrix in (*paper, *official):
    np.testing.assert_array_equal(matrix.sum(1), 1 + num_targets)
  assert (paper[0] != paper[1]).any()
  np.testing.assert_array_equal(official[0], official[1])


@pytest.mark.parametrize(
  ("builder", "targets"),
  [
    # The draws of numpy.random.choice after numpy.random.seed(1), class by class.
    ("mwn_flip", [[6], [9], [6], [0], [0], [1], [8], [6], [2], [4]]),
    (
      "mwn_flip2",
      [[3, 9], [4, 8], [1, 8], [4, 8], [2, 5], [4, 7], [2, 9], [5, 8], [5, 6], [4, 5]],
    ),
  ],
)
def test_official_flip_targets_match_the_authors(builder, targets):
  part = make_balanced(
    balanced_source(each=200), builder=builder, variant="official_code", seed=5
  ).train
  is_target = transitions(part) - np.eye(10) > 0
  assert [np.flatnonzero(row).tolist() for row in is_target] == targets


HUMAN_FIELDS = dict.fromkeys(noisy_labels.ANNOTATIONS.values())


def human_source(each=20):
  plain = balanced_source("cifar10_n", each=each)
  extra = {
    field: (plain.labels + i) % 10
    for i, field in enumerate(sorted(HUMAN_FIELDS), start=1)
  }
  return plain._replace(extra=extra)


@pytest.mark.parametrize("annotation", noisy_labels.ANNOTATIONS)
def test_human_labels_are_read_from_the_source(annotation):
  train = human_source()
  options = {"builder": "human", "fraction": None, "annotation": annotation}
  splits = make_balanced(train, num_validation=50, **options)
  field = {
    "aggre": "aggre_label",
    "worst": "worse_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
  }[annotation]
  for part in (splits.train, splits.validation):
    np.testing.assert_array_equal(part.label, train.extra[field][part.source_index])
    np.testing.assert_array_equal(part.true_label, train.labels[part.source_index])
    assert (part.label != part.true_label).all()
  np.testing.assert_array_equal(splits.meta.label, splits.meta.true_label)


def test_docstring_lists_every_builder():
  assert set(noisy_labels.BUILDERS) == {
    "uniform_flip",
    "background_flip",
    "bare_symmetric",
    "bare_class_conditional",
    "mwn_uniform",
    "mwn_flip",
    "mwn_flip2",
    "human",
  }
  for name in noisy_labels.BUILDERS:
    assert f"`{name}`" in noisy_labels.__doc__


@pytest.mark.parametrize(
  ("train", "options", "message"),
  [
    (
      balanced_source("digits", each=20),
      {"builder": "bare_class_conditional"},
      "only for mnist, cifar10, cifar10_n; choose another builder for digits",
    ),
    (
      balanced_source("mnist", each=20),
      {"builder": "human", "fraction": None, "annotation": "worst"},
      "mnist has no human labels 'worse_label'.*needs the data set cifar10_n",
    ),
    (
      human_source(),
      {"builder": "human", "annotation": "worst"},
      "human has no fraction.*got 0.4: leave it out",
    ),
    (
      human_source(),
      {"builder": "human", "fraction": None},
      "annotation must be one of aggre, worst, random1.*; got None",
    ),
    (
      human_source(),
      {"builder": "human", "fraction": None, "annotation": "worse"},
      "annotation must be one of .*; got 'worse'",
    ),
    (
      human_source()._replace(extra=dict.fromkeys(HUMAN_FIELDS, np.full(200, -1))),
      {"builder": "human", "fraction": None, "annotation": "worst"},
      "human labels worse_label of cifar10_n train must lie in 0 .. 9",
    ),
    (
      balanced_source(each=20),
      {"builder": "mwn_flip", "annotation": "worst"},
      "annotation='worst' is for the builder human only; leave it out with mwn_flip",
    ),
    (
      balanced_source(each=20),
      {"builder": "mwn_flip", "fraction": None},
      "mwn_flip needs a fraction, such as 0.4",
    ),
    (
      balanced_source(each=20),
      {"builder": "bare_symmetric", "fraction": 50},
      r"fraction must lie in \[0, 1\].*got 50",
    ),
    (
      balanced_source(each=20),
      {"builder": "bare_symmetric", "variant": "code"},
      "variant must be one of .*; got 'code'",
    ),
  ],
)
def test_builder_with_invalid_arguments_raises(train, options, message):
  with pytest.raises(base.InputError, match=message) as error:
    make_balanced(train, **options)
  assert "\n" not in str(error.value)


@pytest.mark.real_data
def test_real_human_labels_have_the_published_share(tfds_dir: pathlib.Path, tmp_path):
  if not (tfds_dir / "cifar10_n").is_dir():
    pytest.skip(f"no prepared cifar10_n in {tfds_dir}")
  train, test = (
    sources.load("cifar10_n", split, data_dir=tfds_dir, cache_dir=tmp_path)
    for split in ("train[:2000]", "test[:100]")
  )
  # 40.208% and 9.010% of all 50,000 labels are wrong. The tolerances are four standard
  # deviations of a share of 1,900.
  for annotation, wrong, tolerance in (("worst", 0.402, 0.045), ("aggre", 0.09, 0.027)):
    part = noisy_labels.noisy_labels(
      train,
      test,
      builder="human",
      annotation=annotation,
      num_meta_per_class=10,
      seed=0,
    ).train
    assert len(part.label) == 1900
    assert abs(np.mean(part.label != part.true_label) - wrong) < tolerance
