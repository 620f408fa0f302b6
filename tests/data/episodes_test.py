"""Few-shot tasks: classes, images, labels, noise, clusters and invalid arguments."""

import itertools

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import episodes
from l2rw_jax.data import sources

_WAYS, _SHOTS, _QUERIES = 3, 2, 4
_SIZES = {"train": 8, "meta": 4, "test": 5, "ood": 6}


def _source(name, num_classes, per_class=12, shape=(2, 2, 1)):
  """Images whose pixels encode their source and their row."""
  number = num_classes * per_class
  rows = np.arange(number)
  images = np.zeros((number, *shape), np.uint8)
  images[:, 0, 0, 0] = list(_SIZES).index(name)
  images[:, 0, 1, 0] = rows % 256
  labels = (rows % num_classes).astype(np.int32)
  return sources.Source(name, "1", "all", images, labels, num_classes, {})


_SOURCES = {name: _source(name, size) for name, size in _SIZES.items()}


def _make(**settings):
  arguments = {
    "num_ways": _WAYS,
    "num_shots": _SHOTS,
    "num_queries": _QUERIES,
    "num_tasks": 40,
    "num_meta_tasks": 6,
    "num_test_tasks": 7,
    "seed": 0,
    **{name: source for name, source in _SOURCES.items() if name != "ood"},
    **settings,
  }
  if arguments.get("ood_share"):
    arguments.setdefault("ood", _SOURCES["ood"])
  return episodes.episodes(**arguments)


def _source_and_row(images):
  """Source and row of each image of a task."""
  return images[..., 0, 0, 0], images[..., 0, 1, 0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_tasks_have_their_classes_and_the_ood_share_is_exact(share):
  splits, pool = _make(ood_share=share)
  images = splits.train.image[:]
  assert images.shape == splits.train.image.shape == (40, _WAYS, 6, 2, 2, 1)
  origin, row = _source_and_row(images)
  expected = np.where(pool.is_ood, 3, 0)[:, None, None]
  np.testing.assert_array_equal(origin, np.broadcast_to(expected, origin.shape))
  assert pool.is_ood.sum() == round(40 * share) and not pool.is_wrong.any()
  num_ood_classes = 6 if share else 0
  labels = np.where(expected == 3, row % 6, row % 8 + num_ood_classes)
  np.testing.assert_array_equal(labels, pool.classes[..., None] + 0 * labels)
  for task in range(40):
    assert len(set(pool.classes[task])) == _WAYS
    assert len(set(row[task].ravel())) == _WAYS * 6  # No image is repeated.


def test_labels_are_ways_and_held_out_tasks_use_other_sources():
  splits, _ = _make(ood_share=0.5)
  expected = np.repeat(np.arange(_WAYS), _QUERIES)
  for name, number in (("train", 40), ("meta", 6), ("test", 7)):
    part = getattr(splits, name)
    np.testing.assert_array_equal(part.label, np.tile(expected, (number, 1)))
    np.testing.assert_array_equal(part.true_label, part.label)
    np.testing.assert_array_equal(part.index, np.arange(number))
  assert (_source_and_row(splits.meta.image[:])[0] == 1).all()
  assert (_source_and_row(splits.test.image[:])[0] == 2).all()
  assert len(splits.validation.label) == 0 and splits.num_classes == _WAYS


def test_noise_affects_supports_and_queries_and_is_recorded():
  train = _source("train", 8, per_class=30)
  clean, noisy = (_make(train=train, noise_share=s, num_tasks=400) for s in (0.0, 0.4))
  assert not clean.pool.is_wrong.any()
  _, row = _source_and_row(noisy.splits.train.image[:])
  is_wrong = row % 8 != noisy.pool.classes[..., None]
  np.testing.assert_array_equal(is_wrong, noisy.pool.is_wrong)
  for part in (is_wrong[..., :_SHOTS], is_wrong[..., _SHOTS:]):
    assert abs(part.mean() - 0.4 * 7 / 8) < 0.06
  expected = np.where(noisy.pool.wrong_items(), -1, noisy.splits.train.label)
  np.testing.assert_array_equal(noisy.splits.train.true_label, expected)
  # Noise is added before tasks are drawn, so it is the same in all tasks.
  by_image = {}
  for image, label, wrong in zip(
    row.ravel(), np.repeat(noisy.pool.classes, 6), is_wrong.ravel(), strict=True
  ):
    assert by_image.setdefault(image, (label, wrong)) == (label, wrong)


def test_meta_and_test_tasks_depend_only_on_the_seed():
  one, again, other = _make(seed=1), _make(seed=1), _make(seed=2)
  shared = _make(seed=1, ood_share=0.5, noise_share=0.2, num_clusters=4)
  assert one.splits.fingerprint == again.splits.fingerprint
  fingerprints = {p.splits.fingerprint for p in (one, other, shared)}
  assert len(fingerprints) == 3
  for name in ("meta", "test"):
    images = [getattr(p.splits, name).image[:] for p in (one, again, shared, other)]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    assert (images[0] != images[3]).any()


def test_no_cluster_has_both_ood_and_other_tasks():
  splits, pool = _make(ood_share=0.5, num_tasks=60, num_clusters=10)
  clusters = splits.train.group
  assert set(clusters) == set(range(10))
  purity = [
    max(np.mean(pool.is_ood[clusters == c]), np.mean(~pool.is_ood[clusters == c]))
    for c in range(10)
  ]
  np.testing.assert_array_equal(purity, 1.0)  # No class is in both sources.


def test_images_are_gathered_on_demand():
  bank = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
  rows = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [0, 2]]])
  images = episodes.TaskImages(bank, rows)
  assert len(images) == 3 and images.dtype == np.uint8 and images.ndim == 6
  assert images.shape == images[:].shape == (3, 2, 2, 2, 2, 1)
  np.testing.assert_array_equal(images[np.array([2, 0])], bank[rows[[2, 0]]])
  np.testing.assert_array_equal(images.take(np.array([1]))[:1], bank[rows[1:2]])


def test_some_tasks_can_be_kept():
  problem = _make(ood_share=0.5, noise_share=0.3, num_clusters=4)
  in_distribution = np.flatnonzero(~problem.pool.is_ood)
  kept = episodes.keep_tasks(problem, in_distribution[::-1])
  assert not kept.pool.is_ood.any() and len(kept.pool.classes) == 20
  np.testing.assert_array_equal(
    kept.splits.train.image[:], problem.splits.train.image[in_distribution]
  )
  np.testing.assert_array_equal(kept.splits.train.source_index, in_distribution)
  np.testing.assert_array_equal(kept.splits.train.index, np.arange(20))
  np.testing.assert_array_equal(
    kept.pool.is_wrong, problem.pool.is_wrong[in_distribution]
  )
  assert kept.splits.fingerprint != problem.splits.fingerprint
  assert kept.splits.test is problem.splits.test


def test_tasks_are_kept_by_a_mask():
  problem = _make()
  is_kept = np.arange(40) < 2
  for tasks in (is_kept, is_kept.tolist()):
    kept = episodes.keep_tasks(problem, tasks).splits
    assert kept.train.source_index.tolist() == [0, 1]
  assert len(episodes.keep_tasks(problem, []).splits.train.label) == 0


@pytest.mark.parametrize("tasks", [[3, 3], [-1], [40], [0.5], [True], [[1]]])
def test_invalid_numbers_of_tasks_to_keep_are_refused(tasks):
  with pytest.raises(
    base.InputError, match="tasks must be distinct integers from 0 to"
  ):
    episodes.keep_tasks(_make(), tasks)


@pytest.mark.parametrize("share, number", [(0.29, 29), (0.57, 57), (0.575, 57)])
def test_the_number_of_noisy_labels_is_exact(share, number):
  # With a million classes, no random label is the true one.
  source = _SOURCES["train"]._replace(
    labels=np.full(100, -1, np.int32), num_classes=10**6
  )
  labels = episodes._noisy(source, share, np.random.default_rng(0)).labels
  assert (labels >= 0).sum() == number


def test_seeds_may_have_more_than_32_bits():
  problem = _make(seed=2**32, num_clusters=2)
  assert set(problem.splits.train.group) == {0, 1}


_LARGE = _source("meta", 4, shape=(3, 3, 1))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"num_ways": 5}, "a task needs num_ways = 5 classes, but meta all has 4"),
    ({"num_ways": 1}, "num_ways=1 must be an integer of at least 2"),
    ({"num_shots": 0}, "num_shots=0 must be an integer of at least 1"),
    ({"num_queries": 0}, "num_queries=0 must be an integer of at least 1"),
    ({"num_queries": 11}, "num_shots . num_queries = 13 images of a class, but a"),
    ({"num_test_tasks": 0}, "num_test_tasks=0 must be an integer of at least 1"),
    ({"num_tasks": 0}, "num_tasks=0 must be an integer of at least 1"),
    ({"ood_share": 1.0}, r"ood_share must lie in \[0, 1\); got 1.0"),
    ({"ood_share": np.nan}, r"ood_share must lie in \[0, 1\); got nan"),
    ({"ood_share": 0.5, "ood": None}, "ood_share=0.5 needs a source ood"),
    ({"noise_share": 1.5}, r"noise_share must lie in \[0, 1\]; got 1.5"),
    ({"num_clusters": 0}, "num_clusters=0 must be an integer of at least 1"),
    ({"num_clusters": 2.0}, "num_clusters=2.0 must be an integer of at least 1"),
    ({"num_clusters": 41}, "num_clusters=41 must lie between 1 and 40, the number"),
    ({"meta": _LARGE}, r"the meta images are uint8 of shape \(3, 3, 1\)"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
  ],
)
def test_invalid_arguments_raise_in_one_line(settings, message):
  with pytest.raises(base.InputError, match=message) as caught:
    _make(**settings)
  assert "\n" not in str(caught.value)


def test_class_in_two_sources_raises():
  named = {
    name: source._replace(
      name="one", class_names=tuple(f"{name}{i}" for i in range(source.num_classes))
    )
    for name, source in _SOURCES.items()
  }
  _make(**named)
  for one, other in itertools.combinations(named, 2):
    names = (named[one].class_names[0], *named[other].class_names[1:])
    changed = {**named, other: named[other]._replace(class_names=names)}
    with pytest.raises(base.InputError, match="sources share 1 classes") as caught:
      _make(**changed)
    assert f"{names[0]!r} of one" in str(caught.value)
  with pytest.raises(base.InputError, match="train and test sources share 8 classes"):
    _make(test=_SOURCES["train"])


def test_there_may_be_no_validation_tasks():
  splits, _ = _make(num_meta_tasks=0)
  assert len(splits.meta.label) == 0 and len(splits.train.label) == 40


def test_one_cluster_needs_no_descriptors():
  # With an entry for each class, the descriptors would not fit in any memory.
  clusters = episodes._clusters(np.array([[0, 1], [2, 3]]), 10**15, 1, 0)
  assert clusters.tolist() == [0, 0] and clusters.dtype == np.int32
