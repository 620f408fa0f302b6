"""Floor 4: few-shot tasks as the examples of a learning problem.

A task is N classes with k + q images each. Training tasks are a fixed pool, some of
it of another distribution or with images of wrong classes; validation (`meta`) and
test tasks are clean, and no class is on two sides. Images are gathered from a bank
when a batch asks for them: a pool is a table of rows.
"""

import hashlib
import itertools
from typing import Any, NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources


class TaskImages:
  """Images of N tasks, [N, ways, k + q, H, W, channels], as a source of rows."""

  def __init__(self, bank: np.ndarray, rows: np.ndarray):
    """Nothing is copied.

    Args:
      bank: images, [n, H, W, channels].
      rows: of the bank, for each image of each task, [N, ways, k + q].
    """
    self._bank, self.rows = bank, rows
    self.shape = (*rows.shape, *bank.shape[1:])
    self.dtype = bank.dtype
    self.ndim = len(self.shape)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, tasks: Any) -> np.ndarray:
    """The images of some tasks: a slice or an array of their numbers."""
    return self._bank[self.rows[tasks]]

  def take(self, tasks: np.ndarray) -> "TaskImages":
    """Only some tasks, still not gathered."""
    return TaskImages(self._bank, self.rows[tasks])


class Pool(NamedTuple):
  """What is known of the training tasks, and what no method may see.

  Attributes:
    classes: of each task, [N, ways]; the foreign classes come first, then those of
      the training source.
    is_foreign: whether a task is out of distribution, bool [N].
    is_wrong: whether an image is of another class than its place says, bool
      [N, ways, k + q].
    num_shots: k; the images from there on are queries.
  """

  classes: np.ndarray
  is_foreign: np.ndarray
  is_wrong: np.ndarray
  num_shots: int

  def wrong_items(self) -> np.ndarray:
    """Whether a query is mislabeled, bool [N, ways * q], as in `Examples.label`."""
    return self.is_wrong[:, :, self.num_shots :].reshape(len(self.is_wrong), -1)


class Episodes(NamedTuple):
  """A few-shot learning problem.

  Attributes:
    splits: `train` has tasks with `group` their cluster; `label` and `true_label`
      are [N, ways * q], in the latter -1 where the query is of another class.
    pool: what is known of the training tasks.
  """

  splits: examples_lib.Splits
  pool: Pool


def episodes(
  train: sources.Source,
  meta: sources.Source,
  test: sources.Source,
  *,
  num_ways: int,
  num_shots: int,
  num_queries: int,
  num_tasks: int,
  num_meta_tasks: int,
  num_test_tasks: int,
  foreign: sources.Source | None = None,
  foreign_share: float = 0.0,
  noise_share: float = 0.0,
  num_clusters: int = 1,
  seed: int,
) -> Episodes:
  """Pools of tasks, N ways, k shots and q queries of each way.

  A task draws its classes and then its images at random without repetition. Of the
  training tasks exactly round(`num_tasks` * `foreign_share`) are drawn from
  `foreign`. Noise is in the images of `train` before tasks are drawn, so that it hits
  supports and queries: floor(share * n) images get a label drawn uniformly from all
  training classes, the true one among them, so that share * (C - 1) / C of them are
  wrong. The draws do not depend on one another: neither another share nor another
  noise changes the validation and test tasks.

  Tasks share weights by k-means clusters (scikit-learn) of their descriptors, 1 for
  every class of `foreign` and `train` that a task has, else 0.

  Args:
    train: images of the training classes.
    meta: of the validation classes.
    test: of the test classes.
    num_ways: N.
    num_shots: k supports of each way.
    num_queries: q queries of each way.
    num_tasks: training tasks.
    num_meta_tasks: validation tasks.
    num_test_tasks: test tasks.
    foreign: where tasks out of distribution come from; images of the same shape.
    foreign_share: of the training tasks, in [0, 1).
    noise_share: of the training images, in [0, 1].
    num_clusters: of the training tasks.
    seed: of all draws, at least 0.

  Returns:
    The problem; `validation` is empty.

  Raises:
    InputError: an argument out of range, too few classes or images of one, images
      that do not fit together, or a class that is in two of the sources.

  References:
    Killamsetty et al., "A Nested Bi-level Optimization Framework for Robust Few Shot
    Learning", AAAI 2022 (https://arxiv.org/abs/2011.06782), and its released code: the
    descriptor, the clusters and the noise; there a task is foreign with a probability,
    not an exact share.
  """
  examples_lib.check_sizes(num_tasks=num_tasks, num_meta_tasks=num_meta_tasks)
  _check(train, meta, test, foreign, foreign_share, noise_share)
  _check_at_least(num_ways=(num_ways, 2), num_shots=(num_shots, 1))
  _check_at_least(num_queries=(num_queries, 1), num_test_tasks=(num_test_tasks, 1))
  num_foreign = round(num_tasks * foreign_share)
  train_rng, meta_rng, test_rng = examples_lib.generators(seed, 3)
  shape = _Shape(num_ways, num_shots, num_queries)
  images, pool = _training_tasks(
    train, foreign, num_tasks, num_foreign, noise_share, shape, train_rng
  )
  num_classes = train.num_classes + (foreign.num_classes if foreign else 0)
  clusters = _clusters(pool.classes, num_classes, num_clusters, seed)
  found = {
    "train": _examples(images, pool, clusters),
    "meta": _clean_tasks(meta, num_meta_tasks, shape, meta_rng),
    "test": _clean_tasks(test, num_test_tasks, shape, test_rng),
  }
  splits = examples_lib.Splits(
    **found,
    validation=_take(found["test"], np.zeros(0, np.int64)),
    num_classes=num_ways,
    fingerprint=_fingerprint((train, meta, test, foreign), found, pool, clusters),
  )
  return Episodes(splits, pool)


def keep_tasks(problem: Episodes, tasks: np.ndarray) -> Episodes:
  """The same problem with only some of its training tasks.

  Args:
    problem: the whole.
    tasks: their numbers, all different.
  """
  tasks = np.sort(tasks)
  splits, pool = problem
  digest = hashlib.sha256(splits.fingerprint.encode() + tasks.astype("<i4").tobytes())
  splits = splits._replace(
    train=_take(splits.train, tasks), fingerprint=digest.hexdigest()[:16]
  )
  kept = {name: getattr(pool, name)[tasks] for name in pool._fields[:3]}
  return Episodes(splits, pool._replace(**kept))


class _Shape(NamedTuple):
  num_ways: int
  num_shots: int
  num_queries: int


def _training_tasks(train, foreign, num_tasks, num_foreign, noise_share, shape, rng):
  """`TaskImages` and their `Pool`: foreign and own tasks, mixed."""
  noise_rng, own_rng, foreign_rng, order_rng = rng.spawn(4)
  noisy = _noisy(train, noise_share, noise_rng)
  rows, classes = _draw(noisy, num_tasks - num_foreign, shape, own_rng)
  bank, truth = train.images, train.labels
  if foreign is not None:
    others = _draw(foreign, num_foreign, shape, foreign_rng)
    rows = np.concatenate([others[0], rows + len(foreign.images)])
    classes = np.concatenate([others[1], classes + foreign.num_classes])
    bank = np.concatenate([foreign.images, bank])
    truth = np.concatenate([foreign.labels, truth + foreign.num_classes])
  order = order_rng.permutation(num_tasks)
  rows, classes = rows[order], classes[order]
  is_wrong = truth[rows] != classes[:, :, None]
  pool = Pool(classes, order < num_foreign, is_wrong, shape.num_shots)
  return TaskImages(bank, rows), pool


def _clean_tasks(source, number, shape, rng):
  rows, classes = _draw(source, number, shape, rng)
  right = np.zeros(rows.shape, bool)
  pool = Pool(classes, np.zeros(number, bool), right, shape.num_shots)
  return _examples(TaskImages(source.images, rows), pool, np.zeros(number, np.int32))


def _draw(source, number, shape, rng):
  """Rows [number, ways, k + q] and classes [number, ways] of random tasks."""
  num_ways, size = shape.num_ways, shape.num_shots + shape.num_queries
  name = f"{source.name} {source.split[:40]}"
  if source.num_classes < num_ways:
    raise base.InputError(
      f"tasks of num_ways={num_ways} need as many classes; {name} has"
      f" {source.num_classes}. Lower num_ways."
    )
  members = [np.flatnonzero(source.labels == c) for c in range(source.num_classes)]
  fewest = min(map(len, members))
  if fewest < size:
    raise base.InputError(
      f"a task needs num_shots + num_queries = {size} images of a class; one of {name}"
      f" has {fewest}. Lower one of them."
    )
  rows = np.empty((number, num_ways, size), np.int64)
  classes = np.empty((number, num_ways), np.int64)
  for task in range(number):
    classes[task] = rng.choice(source.num_classes, num_ways, replace=False)
    for way, label in enumerate(classes[task]):
      rows[task, way] = rng.choice(members[label], size, replace=False)
  return rows, classes


def _noisy(source, share, rng):
  labels = source.labels.copy()
  chosen = rng.permutation(len(labels))[: int(share * len(labels))]
  labels[chosen] = rng.integers(source.num_classes, size=len(chosen))
  return source._replace(labels=labels)


def _clusters(classes, num_classes, num_clusters, seed):
  """The k-means cluster of each task by the classes it has, int32 [N]."""
  if not 1 <= num_clusters <= len(classes):
    raise base.InputError(
      f"num_clusters={num_clusters} must lie between 1 and the {len(classes)} tasks."
    )
  descriptors = np.zeros((len(classes), num_classes), np.float32)
  np.put_along_axis(descriptors, classes, 1, axis=1)
  from sklearn import cluster

  kmeans = cluster.KMeans(num_clusters, n_init=1, random_state=seed)
  return kmeans.fit_predict(descriptors).astype(np.int32)


def _examples(images, pool, clusters):
  number, num_ways, size = pool.is_wrong.shape
  row = np.repeat(np.arange(num_ways), size - pool.num_shots)
  label = np.tile(row, (number, 1)).astype(np.int32)
  index = np.arange(number, dtype=np.int32)
  return examples_lib.Examples(
    image=images,
    label=label,
    true_label=np.where(pool.wrong_items(), -1, label).astype(np.int32),
    index=index,
    source_index=index,
    group=clusters,
  )


def _take(examples, tasks):
  return examples_lib.Examples(
    image=examples.image.take(tasks),
    label=examples.label[tasks],
    true_label=examples.true_label[tasks],
    index=np.arange(len(tasks), dtype=np.int32),
    source_index=examples.source_index[tasks],
    group=examples.group[tasks],
  )


def _fingerprint(given, found, pool, clusters):
  origins = [None if s is None else (s.name, s.version, s.split) for s in given]
  digest = hashlib.sha256(repr(origins).encode())
  for column in (pool.classes, pool.is_wrong, clusters):
    digest.update(column.astype("<i4").tobytes())
  for part in found.values():
    digest.update(repr(part.image.shape).encode())
    digest.update(part.image.rows.astype("<i4").tobytes())
  return digest.hexdigest()[:16]


def _check(train, meta, test, foreign, foreign_share, noise_share):
  for name, source in (("meta", meta), ("test", test), ("foreign", foreign)):
    if source is None:
      continue
    one, other = ((s.images.dtype, tuple(s.images.shape[1:])) for s in (train, source))
    if one != other:
      raise base.InputError(
        f"the {name} images are {other[0]} of shape {other[1]} and the training images"
        f" {one[0]} of shape {one[1]}; make them alike."
      )
  given = {"train": train, "meta": meta, "test": test, "foreign": foreign}
  given = {name: source for name, source in given.items() if source is not None}
  for (first, a), (second, b) in itertools.combinations(given.items(), 2):
    shared = _shared_classes(a, b)
    if shared:
      raise base.InputError(
        f"the {first} and {second} sources share {len(shared)} classes, the first is"
        f" {min(shared)!r} of {a.name}; every class may be in one source only."
      )
  if foreign is None and foreign_share:
    raise base.InputError(
      f"foreign_share={foreign_share} needs a foreign source; give one or 0."
    )
  if not 0 <= foreign_share < 1:
    raise base.InputError(f"foreign_share must lie in [0, 1); got {foreign_share}.")
  if not 0 <= noise_share <= 1:
    raise base.InputError(f"noise_share must lie in [0, 1]; got {noise_share}.")


def _shared_classes(one, other):
  """Names of the classes of one data set that are in both sources."""
  data_sets = {source.name.partition("+")[0] for source in (one, other)}
  if len(data_sets) > 1:
    return set()
  if None not in (one.class_names, other.class_names):
    return set(one.class_names) & set(other.class_names)
  # Without names, only the same examples are surely of the same classes.
  is_same = one.name == other.name and one[1:3] == other[1:3]
  return set(sources.numbers(one.num_classes)) if is_same else set()


def _check_at_least(**sizes):
  for name, (size, least) in sizes.items():
    if size < least:
      raise base.InputError(f"{name}={size} must be at least {least}.")
