"""Every named noise: what it truly flips, where it fits, what it refuses."""

import pathlib

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import noise_builders
from l2rw_jax.data import sources
from l2rw_jax.data import splits


def source(name="toy", split="train", num_classes=10, each=5000, extra=None):
  """`each` tiny images of every class."""
  labels = np.repeat(np.arange(num_classes), each).astype(np.int32)
  labels = np.random.default_rng(1).permutation(labels)
  images = np.zeros((len(labels), 1, 1, 1), np.uint8)
  return sources.Source(name, "1.0.0", split, images, labels, num_classes, extra or {})


def made(train, **options):
  given = {"fraction": 0.4, "num_meta_per_class": 10, "seed": 0, **options}
  return splits.noisy_labels(train, source(train.name, "test", each=2), **given)


def transitions(part, num_classes=10):
  """Shares of each true class's new labels, [C, C]."""
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
def test_what_forty_percent_truly_flips(builder, name, variant, wrong):
  part = made(source(name), builder=builder, variant=variant).train
  # 49,900 labels: five standard deviations.
  assert abs(np.mean(part.label != part.true_label) - wrong) < 0.011


@pytest.mark.parametrize(
  ("name", "pairs"),
  [
    ("mnist", {(7, 1), (2, 7), (3, 8), (5, 6), (6, 5)}),
    ("cifar10", {(9, 1), (2, 0), (3, 5), (5, 3), (4, 7)}),
    ("cifar10_n", {(9, 1), (2, 0), (3, 5), (5, 3), (4, 7)}),
  ],
)
def test_class_conditional_noise_of_bare(name, pairs):
  train = source(name)
  part = made(train, builder="bare_class_conditional", fraction=0.45).train
  found = transitions(part)
  off = {tuple(map(int, p)) for p in np.argwhere(found > 0) if p[0] != p[1]}
  assert off == pairs
  np.testing.assert_allclose([found[p] for p in pairs], 0.45, atol=0.036)


@pytest.mark.parametrize(("builder", "targets"), [("mwn_flip", 1), ("mwn_flip2", 2)])
def test_flip_targets_by_variant(builder, targets):
  def hit(seed, variant):
    splits_made = made(
      source(each=400), builder=builder, seed=seed, variant=variant, num_validation=1500
    )
    train, validation = (
      transitions(part) > 0 for part in (splits_made.train, splits_made.validation)
    )
    np.testing.assert_array_equal(train, validation)  # One matrix for both.
    return train

  paper = [hit(seed, "paper") for seed in (0, 1)]
  official = [hit(seed, "official_code") for seed in (0, 1)]
  for found in (*paper, *official):
    np.testing.assert_array_equal(found.sum(1), 1 + targets)
  assert (paper[0] != paper[1]).any()
  np.testing.assert_array_equal(official[0], official[1])


@pytest.mark.parametrize(
  ("builder", "targets"),
  [
    # What numpy.random.seed(1) and numpy.random.choice give, class by class.
    ("mwn_flip", [[6], [9], [6], [0], [0], [1], [8], [6], [2], [4]]),
    (
      "mwn_flip2",
      [[3, 9], [4, 8], [1, 8], [4, 8], [2, 5], [4, 7], [2, 9], [5, 8], [5, 6], [4, 5]],
    ),
  ],
)
def test_official_flip_targets_are_those_of_the_authors(builder, targets):
  part = made(source(each=200), builder=builder, variant="official_code", seed=5).train
  found = transitions(part) - np.eye(10) > 0
  assert [np.flatnonzero(row).tolist() for row in found] == targets


HUMAN = dict.fromkeys(noise_builders.ANNOTATIONS.values())


def human_source(each=20):
  plain = source("cifar10_n", each=each)
  extra = {
    field: (plain.labels + i) % 10 for i, field in enumerate(sorted(HUMAN), start=1)
  }
  return plain._replace(extra=extra)


@pytest.mark.parametrize("annotation", splits.ANNOTATIONS)
def test_human_labels_are_those_of_the_set(annotation):
  train = human_source()
  options = {"builder": "human", "fraction": None, "annotation": annotation}
  found = made(train, num_validation=50, **options)
  field = {
    "aggre": "aggre_label",
    "worst": "worse_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
  }[annotation]
  for part in (found.train, found.validation):
    np.testing.assert_array_equal(part.label, train.extra[field][part.source_index])
    np.testing.assert_array_equal(part.true_label, train.labels[part.source_index])
    assert (part.label != part.true_label).all()
  np.testing.assert_array_equal(found.meta.label, found.meta.true_label)


def test_every_builder_has_a_name_and_its_meaning():
  assert set(splits.BUILDERS) == {
    "uniform_flip",
    "background_flip",
    "bare_symmetric",
    "bare_class_conditional",
    "mwn_uniform",
    "mwn_flip",
    "mwn_flip2",
    "human",
  }
  for name in splits.BUILDERS:
    assert f"`{name}`" in noise_builders.__doc__


@pytest.mark.parametrize(
  ("train", "options", "message"),
  [
    (
      source("digits", each=20),
      {"builder": "bare_class_conditional"},
      "knows .* mnist, cifar10, cifar10_n only; choose another builder for digits",
    ),
    (
      source("mnist", each=20),
      {"builder": "human", "fraction": None, "annotation": "worst"},
      "mnist has no human labels 'worse_label'.*needs the data set cifar10_n",
    ),
    (
      human_source(),
      {"builder": "human", "annotation": "worst"},
      "human takes no fraction.*leave it out instead of 0.4",
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
      human_source()._replace(extra=dict.fromkeys(HUMAN, np.full(200, -1))),
      {"builder": "human", "fraction": None, "annotation": "worst"},
      "human labels worse_label of cifar10_n train must lie in 0 .. 9",
    ),
    (
      source(each=20),
      {"builder": "mwn_flip", "annotation": "worst"},
      "annotation='worst' is for the builder human only; leave it out with mwn_flip",
    ),
    (
      source(each=20),
      {"builder": "mwn_flip", "fraction": None},
      "mwn_flip needs a fraction, such as 0.4",
    ),
    (
      source(each=20),
      {"builder": "bare_symmetric", "fraction": 50},
      r"fraction must lie in \[0, 1\].*got 50",
    ),
    (
      source(each=20),
      {"builder": "bare_symmetric", "variant": "code"},
      "variant must be one of .*; got 'code'",
    ),
  ],
)
def test_what_does_not_fit_is_told(train, options, message):
  with pytest.raises(base.InputError, match=message) as error:
    made(train, **options)
  assert "\n" not in str(error.value)


@pytest.mark.real_data
def test_human_labels_of_real_images(tfds_dir: pathlib.Path, tmp_path):
  if not (tfds_dir / "cifar10_n").is_dir():
    pytest.skip(f"no prepared cifar10_n in {tfds_dir}")
  train, test = (
    sources.load("cifar10_n", split, data_dir=tfds_dir, cache_dir=tmp_path)
    for split in ("train[:2000]", "test[:100]")
  )
  # 40.208% and 9.010% over all 50,000; four standard deviations of 1,900.
  for annotation, wrong, wide in (("worst", 0.402, 0.045), ("aggre", 0.09, 0.027)):
    part = splits.noisy_labels(
      train,
      test,
      builder="human",
      annotation=annotation,
      num_meta_per_class=10,
      seed=0,
    ).train
    assert len(part.label) == 1900
    assert abs(np.mean(part.label != part.true_label) - wrong) < wide
