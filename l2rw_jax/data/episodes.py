"""Few-shot tasks as the examples of a learning problem.

A task has several classes (ways) with k support and q query images each. The training
tasks are a fixed pool. Some of them are from another distribution or have images of
wrong classes. Validation (`meta`) and test tasks are clean, and the three sets of tasks
have no class in common. A task stores only the row numbers of its images, which are
gathered when a batch needs them.
"""

import hashlib
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources

# With this offset, 29% of 100 images are 29, although 0.29 * 100 is below 29.
_ROUNDING = 1e-6
# KMeans takes only 32-bit seeds.
_SEEDS = 2**32


class TaskImages:
  """Images of N tasks, [N, ways, k + q, H, W, channels], as a row source."""

  def __init__(self, bank: np.ndarray, rows: np.ndarray):
    """Stores the arguments without copying them.

    Args:
      bank: all images, [n, H, W, channels].
      rows: the row of `bank` for each image of each task, [N, ways, k + q].
    """
    self._bank, self.rows = bank, rows
    self.shape = (*rows.shape, *bank.shape[1:])
    self.dtype = bank.dtype
    self.ndim = len(self.shape)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, tasks: Any) -> np.ndarray:
    """The images of some tasks, given as a slice or an array of task numbers."""
    return self._bank[self.rows[tasks]]

  def take(self, tasks: np.ndarray) -> "TaskImages":
    """Selects some of the tasks, without gathering their images."""
    return TaskImages(self._bank, self.rows[tasks])


class Pool(NamedTuple):
  """The truth about the training tasks, which methods must not use.

  Attributes:
    classes: classes of each task, [N, ways]. The out-of-distribution classes of `ood`
      are numbered first, and the classes of `train` after them.
    is_ood: whether a task is out of distribution, bool [N].
    is_wrong: whether an image's class is not the class of its way, bool
      [N, ways, k + q].
    num_shots: k; images from index k on are queries.
  """

  classes: np.ndarray
  is_ood: np.ndarray
  is_wrong: np.ndarray
  num_shots: int

  def wrong_items(self) -> np.ndarray:
    """Whether a query is mislabeled, bool [N, ways * q], as in `Examples.label`."""
    wrong = self.is_wrong[:, :, self.num_shots :]
    return wrong.reshape(len(wrong), math.prod(wrong.shape[1:]))


class Episodes(NamedTuple):
  """A few-shot learning problem.

  Attributes:
    splits: splits whose examples are tasks. `label` and `true_label` are
      [N, ways * q]; `true_label` is -1 if the query's class is not the class of its
      way. `group` is the cluster of a training task, and 0 for the other tasks.
    pool: the truth about the training tasks.
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
  ood: sources.Source | None = None,
  ood_share: float = 0.0,
  noise_share: float = 0.0,
  num_clusters: int = 1,
  seed: int,
) -> Episodes:
  """Makes tasks with k shots and q queries of each way.

  A task draws its classes and then their images at random without replacement.
  Exactly round(`num_tasks` * `ood_share`) of the training tasks are drawn from
  `ood`. Label noise is added to `train` before tasks are drawn, so it affects both
  support and query images. Of the n training images, floor(`noise_share` * n) get a
  label drawn uniformly from all C training classes, including the true one; the
  expected share of wrong labels is therefore `noise_share` * (C - 1) / C. The
  validation and test tasks do not depend on `ood_share` or `noise_share`.

  NestedMAML can learn one weight for all tasks of a group. Groups are k-means clusters
  (scikit-learn) of task descriptors. A descriptor has an entry for every class of `ood`
  and `train`, which is 1 if the task has the class and 0 otherwise.

  Args:
    train: images of the training classes.
    meta: images of the validation classes.
    test: images of the test classes.
    num_ways: number of ways (classes) of a task.
    num_shots: k, the number of support images of each way.
    num_queries: q, the number of queries of each way.
    num_tasks: number of training tasks.
    num_meta_tasks: number of validation tasks.
    num_test_tasks: number of test tasks.
    ood: source of the out-of-distribution tasks, with images of the same shape.
    ood_share: share of training tasks from `ood`, in [0, 1).
    noise_share: share of training images with a random label, in [0, 1].
    num_clusters: number of clusters of the training tasks.
    seed: seed of all draws, at least 0.

  Returns:
    The problem; `splits.validation` is empty.

  Raises:
    InputError: an argument is out of range, there are too few classes or images, the
      images have different shapes or types, or two of the sources share a class.

  References:
    Killamsetty et al., "A Nested Bi-level Optimization Framework for Robust Few Shot
    Learning", AAAI 2022 (https://arxiv.org/abs/2011.06782), and its released code: the
    descriptor, the clusters and the noise. In the released code, the number of OOD
    tasks is random.
  """
  examples_lib.check_sizes(num_meta_tasks=num_meta_tasks)
  base.check_integer("num_tasks", num_tasks)
  _check(train, meta, test, ood, ood_share, noise_share)
  base.check_integer("num_ways", num_ways, 2)
  base.check_integer("num_shots", num_shots)
  base.check_integer("num_queries", num_queries)
  base.check_integer("num_test_tasks", num_test_tasks)
  num_ood = round(num_tasks * float(ood_share))
  train_rng, meta_rng, test_rng = examples_lib.generators(seed, 3)
  shape = _Shape(num_ways, num_shots, num_queries)
  images, pool = _training_tasks(
    train, ood, num_tasks, num_ood, noise_share, shape, train_rng
  )
  num_classes = train.num_classes + (ood.num_classes if ood else 0)
  clusters = _clusters(pool.classes, num_classes, num_clusters, seed)
  parts = {
    "train": _examples(images, pool, clusters),
    "meta": _clean_tasks(meta, num_meta_tasks, shape, meta_rng),
    "test": _clean_tasks(test, num_test_tasks, shape, test_rng),
  }
  splits = examples_lib.Splits(
    **parts,
    validation=_take(parts["test"], np.zeros(0, np.int64)),
    num_classes=num_ways,
    fingerprint=_fingerprint((train, meta, test, ood), parts, pool, clusters),
  )
  return Episodes(splits, pool)


def keep_tasks(problem: Episodes, tasks: np.ndarray) -> Episodes:
  """Keeps only some of the training tasks.

  Args:
    problem: the problem.
    tasks: numbers of the tasks to keep, all distinct; or a bool for each task.

  Raises:
    InputError: a task does not exist or occurs twice, or `tasks` is neither integers
      nor one bool for each task.
  """
  splits, pool = problem
  tasks = examples_lib.different_rows("tasks", tasks, len(splits.train.label))
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


def _training_tasks(train, ood, num_tasks, num_ood, noise_share, shape, rng):
  """`TaskImages` and their `Pool`, OOD and other tasks in random order."""
  noise_rng, train_rng, ood_rng, order_rng = rng.spawn(4)
  noisy = _noisy(train, noise_share, noise_rng)
  rows, classes = _draw(noisy, num_tasks - num_ood, shape, train_rng)
  bank, truth = train.images, train.labels
  if ood is not None:
    others = _draw(ood, num_ood, shape, ood_rng)
    rows = np.concatenate([others[0], rows + len(ood.images)])
    classes = np.concatenate([others[1], classes + ood.num_classes])
    bank = np.concatenate([ood.images, bank])
    truth = np.concatenate([ood.labels, truth + ood.num_classes])
  order = order_rng.permutation(num_tasks)
  rows, classes = rows[order], classes[order]
  is_wrong = truth[rows] != classes[:, :, None]
  pool = Pool(classes, order < num_ood, is_wrong, shape.num_shots)
  return TaskImages(bank, rows), pool


def _clean_tasks(source, number, shape, rng):
  rows, classes = _draw(source, number, shape, rng)
  is_wrong = np.zeros(rows.shape, bool)
  pool = Pool(classes, np.zeros(number, bool), is_wrong, shape.num_shots)
  return _examples(TaskImages(source.images, rows), pool, np.zeros(number, np.int32))


def _draw(source, number, shape, rng):
  """Rows [number, ways, k + q] and classes [number, ways] of random tasks."""
  num_ways, size = shape.num_ways, shape.num_shots + shape.num_queries
  name = f"{source.name} {source.split[:40]}"
  if source.num_classes < num_ways:
    raise base.InputError(
      f"a task needs num_ways = {num_ways} classes, but {name} has"
      f" {source.num_classes}. Lower num_ways."
    )
  members = base.rows_by_class(source.labels, np.arange(source.num_classes))
  fewest = min(map(len, members))
  if fewest < size:
    raise base.InputError(
      f"a task needs num_shots + num_queries = {size} images of a class, but a class of"
      f" {name} has {fewest} (after label noise, if there is any). Lower num_shots or"
      " num_queries."
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
  number = math.floor(float(share) * len(labels) + _ROUNDING)
  chosen = rng.permutation(len(labels))[:number]
  labels[chosen] = rng.integers(source.num_classes, size=len(chosen))
  return source._replace(labels=labels)


def _clusters(classes, num_classes, num_clusters, seed):
  """The k-means cluster of each task, from the classes it has, int32 [N]."""
  num_clusters = base.check_integer("num_clusters", num_clusters)
  if num_clusters > len(classes):
    raise base.InputError(
      f"num_clusters={num_clusters} must lie between 1 and {len(classes)}, the number"
      " of tasks."
    )
  if num_clusters == 1:  # Descriptors of many tasks and classes can be large.
    return np.zeros(len(classes), np.int32)
  descriptors = np.zeros((len(classes), num_classes), np.float32)
  np.put_along_axis(descriptors, classes, 1, axis=1)
  from sklearn import cluster

  kmeans = cluster.KMeans(num_clusters, n_init=1, random_state=seed % _SEEDS)
  return kmeans.fit_predict(descriptors).astype(np.int32)


def _examples(images, pool, clusters):
  number, num_ways, size = pool.is_wrong.shape
  ways = np.repeat(np.arange(num_ways), size - pool.num_shots)
  label = np.tile(ways, (number, 1)).astype(np.int32)
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


def _fingerprint(all_sources, parts, pool, clusters):
  origins = [None if s is None else (s.name, s.version, s.split) for s in all_sources]
  digest = hashlib.sha256(repr(origins).encode())
  for column in (pool.classes, pool.is_wrong, clusters):
    digest.update(column.astype("<i4").tobytes())
  for part in parts.values():
    digest.update(repr(part.image.shape).encode())
    digest.update(part.image.rows.astype("<i4").tobytes())
  return digest.hexdigest()[:16]


def _check(train, meta, test, ood, ood_share, noise_share):
  for name, source in (("meta", meta), ("test", test), ("ood", ood)):
    if source is None:
      continue
    one, other = ((s.images.dtype, tuple(s.images.shape[1:])) for s in (train, source))
    if one != other:
      raise base.InputError(
        f"the {name} images are {other[0]} of shape {other[1]}, but the training"
        f" images are {one[0]} of shape {one[1]}; give both the same shape and type."
      )
  all_sources = {"train": train, "meta": meta, "test": test, "ood": ood}
  all_sources = {n: source for n, source in all_sources.items() if source is not None}
  for (first, a), (second, b) in itertools.combinations(all_sources.items(), 2):
    shared = _shared_classes(a, b)
    if shared:
      raise base.InputError(
        f"the {first} and {second} sources share {len(shared)} classes; the first is"
        f" {min(shared)!r} of {a.name}. Every class may be in only one source."
      )
  if ood is None and ood_share:
    raise base.InputError(
      f"ood_share={ood_share} needs a source ood; pass one, or set ood_share to 0."
    )
  if not 0 <= ood_share < 1:
    raise base.InputError(f"ood_share must lie in [0, 1); got {ood_share}.")
  if not 0 <= noise_share <= 1:
    raise base.InputError(f"noise_share must lie in [0, 1]; got {noise_share}.")


def _shared_classes(one, other):
  """Names of the classes that both sources take from the same data set."""
  data_sets = {source.name.partition("+")[0] for source in (one, other)}
  if len(data_sets) > 1:
    return set()
  if None not in (one.class_names, other.class_names):
    return set(one.class_names) & set(other.class_names)
  # Without names, classes are known to be the same only if the examples are the same.
  is_same = one.name == other.name and one[1:3] == other[1:3]
  return set(sources.numbers(one.num_classes)) if is_same else set()
