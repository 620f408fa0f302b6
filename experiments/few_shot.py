r"""NestedMAML compared with MAML when some training tasks are out of distribution.

Paper: Killamsetty et al., "A Nested Bi-level Optimization Framework for Robust Few
  Shot Learning" (AAAI 2022). The protocol follows the paper, with Omniglot in place of
  mini-ImageNet: a share of the training tasks comes from another data set (tasks out
  of distribution, OOD), or a share of the training images is mislabeled. Validation
  tasks have other classes and are clean.
Command: python -m experiments.few_shot --data_dir=DIR
  mislabeled images: --ood=none --noise_share=0.3 --share=item
  without a download: --dataset=digits --ood=shuffled
  mini-ImageNet: --dataset=mini_imagenet --data_dir=FOLDER, where FOLDER contains the
  prepared TFDS data set of --ood, and train, val and test with files CLASS/FILE.jpg
Device, time: one CPU core, 8 minutes per share (five methods, two seeds), mostly
  compilation and NestedMAML.
Tuning: --weight_learning_rate, --clip and --num_clusters were chosen with
  --evaluate_on=tuning --ood=shuffled --ood_share=0.9; nothing else was tuned.
Published: mini-ImageNet with SVHN or FashionMNIST tasks only; nothing on these data.
Measured: results/few_shot.
"""

import dataclasses
import functools
import pathlib
from typing import Any
import warnings

import numpy as np

from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag, methods_flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax import weighted_update
from l2rw_jax.data import episodes
from l2rw_jax.data import image_classes
from l2rw_jax.data import own_data
from l2rw_jax.data import sources
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import nested_maml
from l2rw_jax.models import conv4
from l2rw_jax.models import few_shot
from l2rw_jax.training import evaluation
from l2rw_jax.training import results as results_lib

METHODS = (
  *("maml", "maml_removed", "maml_zeroed", "nested_maml", "nested_maml_fo"),
  *("meta_only", "l2rw"),
)
_NESTED = ("nested_maml", "nested_maml_fo")
# Numbers of classes for training, validation, tuning and testing. For other data sets,
# the first three parts get `_SHARES` of the classes, and testing gets the rest, except
# that mini_imagenet has a folder for each of its splits.
_CLASSES = {"omniglot": (140, 30, 20, 52), "digits": (4, 2, 2, 2)}
_SHARES = (0.6, 0.15, 0.05)
# Largest number of images that are taken from another data set for OOD tasks (not from
# omniglot, which has 20 images per class): about 500 per class of MNIST.
_NUM_OOD = 5000
# Names of the results of `weights_of`: mean weights of parts of the training tasks.
WEIGHTS = ("in_distribution_weight", "ood_weight", "right_weight", "wrong_weight")


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flags of this script."""

  EXTENDABLE = ("methods", "ood_share", "num_seeds")

  dataset: str = flag(
    "omniglot",
    "Data set of the tasks: omniglot, digits, mini_imagenet (folders of images in"
    " --data_dir), the name of any image set that TFDS has prepared in --data_dir, or"
    " your own uint8 images: images:DIR or npz:FILE. The classes are divided.",
  )
  ood: str = data_flag(
    "mnist",
    "Source of the out-of-distribution tasks: none, shuffled (images of --dataset with"
    " permuted labels), omniglot, digits, the name of any image set that TFDS has"
    " prepared in --data_dir, or your own uint8 images: images:DIR or npz:FILE.",
  )
  ood_share: tuple[float, ...] = data_flag(
    (0.3, 0.6, 0.9),
    "Share of the training tasks that come from --ood.",
    bounds=(0, settings_lib.BELOW_ONE),
  )
  noise_share: float = data_flag(
    0.0, "Share of the training images to relabel at random.", bounds=settings_lib.SHARE
  )
  methods: tuple[str, ...] = methods_flag(METHODS[:5], METHODS)
  num_ways: int | None = data_flag(
    None, "Number of classes of a task. The default is 5; digits: 2.", bounds=(2, 10**4)
  )
  num_shots: int = data_flag(
    1, "Number of support images of a class.", bounds=(1, 10**5)
  )
  num_queries: int = data_flag(
    5, "Number of query images of a class.", bounds=(1, 10**5)
  )
  num_tasks: int = data_flag(5000, "Number of training tasks.", bounds=(1, 10**6))
  num_meta_tasks: int = data_flag(
    1000, "Number of validation tasks.", bounds=(1, 10**6)
  )
  num_test_tasks: int = data_flag(600, "Number of test tasks.", bounds=(2, 10**6))
  evaluate_on: str = data_flag(
    "test",
    "Classes to evaluate on; tuning classes are for choosing settings.",
    choices=["test", "tuning"],
  )
  rotations: bool = data_flag(
    False, "Also train on every class rotated by 90, 180 and 270 degrees."
  )
  share: str = flag(
    "cluster",
    "Unit that gets a weight in NestedMAML: a task, a cluster of tasks, or an item (a"
    " query image).",
    choices=nested_maml.SHARES,
    methods=_NESTED,
  )
  num_clusters: int = flag(
    20,
    "Number of clusters of training tasks; fewer if there are fewer distinct tasks.",
    bounds=(1, 10**6),
    methods=_NESTED,
  )
  weight_learning_rate: float = flag(
    1e4, "Learning rate of the task weights; 0 keeps them constant.", methods=_NESTED
  )
  lookahead_learning_rate: float | None = flag(
    None,
    "Learning rate of NestedMAML's look-ahead step. The default is --learning_rate.",
    methods=_NESTED,
    aliases=["look_ahead_learning_rate"],
  )
  clip: float = flag(
    2e-5,
    "Magnitude to which derivatives with respect to a task weight are clipped.",
    bounds=(settings_lib.TINY, 1e6),
    methods=_NESTED,
  )
  every: int = flag(
    1,
    "Number of steps from one update of the task weights to the next.",
    bounds=settings_lib.STEPS,
    methods=_NESTED,
  )
  width: int = flag(32, "Number of channels of the network.", bounds=(1, 4096))
  inner_learning_rate: float = flag(0.4)
  num_inner_steps: int = flag(
    1,
    "Number of steps of the inner loop in training.",
    bounds=(0, 10**4),
    group="method",
  )
  num_adaptation_steps: int = flag(
    3, "Number of steps of the inner loop in tests.", bounds=(0, 10**4), group="method"
  )
  learning_rate: float = flag(0.003, "Learning rate of Adam in the outer loop.")
  batch_size: int = flag(4, "Number of training tasks in a step.")
  meta_batch_size: int = flag(4, "Number of validation tasks in a step.")
  num_steps: int = flag(500)
  eval_every: int = flag(500)
  num_seeds: int = flag(2)

  @property
  def ways(self) -> int:
    """Number of classes of a task."""
    return self.num_ways or (2 if self.dataset == "digits" else 5)

  @functools.cached_property
  def class_sources(self) -> list[sources.Source]:
    """The result of `load_classes`, which is kept with these settings.

    It is not kept for the whole process, because a user's files may change before other
    settings read them.
    """
    return load_classes(self)


TABLE = table.Layout(
  name="few_shot",
  title="Few-shot learning with tasks of another kind",
  metrics=(
    table.Metric("accuracy_percent", "meta-test accuracy %"),
    table.Metric("interval_percent", "interval over tasks, ± %"),
    table.Metric("in_distribution_weight", "weight of in-distribution tasks"),
    table.Metric("ood_weight", "weight of other tasks"),
    table.Metric("right_weight", "weight of queries with right labels"),
    table.Metric("wrong_weight", "weight of queries with wrong labels"),
    table.Metric("weight_auroc", "AUROC of weights", decimals=3),
  ),
  settings={
    "dataset": "{}",
    "num_ways": "{}-way",
    "num_shots": "{}-shot",
    "evaluate_on": "{} classes",
    "ood": "other tasks from {}",
    "ood_share": "{:.0%} of the training tasks",
    "noise_share": "{:.0%} of the images with a random label",
    "num_clusters": "{} clusters",
    "share": "a weight for each {}",
    "num_steps": "{:,} steps",
  },
  keys=("ood", "ood_share", "noise_share"),
  published=(
    "Published: mini-ImageNet with SVHN or FashionMNIST tasks only (Killamsetty et"
    " al. 2022); nothing on these data."
  ),
)


def load_classes(settings: Settings) -> list[sources.Source]:
  """The sources of the training, validation, tuning and test classes.

  The division of the classes does not depend on the seed, so that no setting is chosen
  on a class that another seed tests on.

  Raises:
    InputError: a data set cannot be loaded, or has too few classes.
  """
  dataset, data_dir = settings.dataset, settings.data_dir
  if dataset == "mini_imagenet":
    if data_dir is None:
      raise base.InputError("--dataset=mini_imagenet needs --data_dir=FOLDER.")
    train, val, test = (
      image_classes.image_folder(data_dir, split, size=84)
      for split in ("train", "val", "test")
    )
    half = val.num_classes // 2
    return [train, *image_classes.split_classes(val, (half, half), 0), test]
  if dataset == "omniglot":
    whole = image_classes.omniglot(data_dir=data_dir, cache_dir=settings.cache_dir)
  else:
    whole = settings.load("train")
    if whole.images.ndim != 4 or whole.images.dtype != np.uint8:
      raise base.InputError(f"--dataset={dataset} has no uint8 images [N, H, W, C].")
  first = [max(1, round(share * whole.num_classes)) for share in _SHARES]
  shares = (*first, whole.num_classes - sum(first))
  return image_classes.split_classes(whole, _CLASSES.get(dataset, shares), seed=0)


def ood_source(
  settings: Settings, train: sources.Source, seed: int
) -> sources.Source | None:
  """The source of the `--ood` tasks, with images of the size of `train`, or None.

  Raises:
    InputError: the source cannot be loaded, or has no uint8 images.
  """
  if settings.ood == "none":
    return None
  if settings.ood == "shuffled":
    return image_classes.shuffled(train, seed)
  if settings.ood == "omniglot":
    source = image_classes.omniglot(
      data_dir=settings.data_dir, cache_dir=settings.cache_dir
    )
  elif settings.ood == "digits" or own_data.is_own(settings.ood):
    # These sources do not support a slice of a split, which is used below.
    source = runner.first_images(settings.load("train", settings.ood), _NUM_OOD)
  else:
    source = settings.load(f"train[:{_NUM_OOD}]", settings.ood)
  _, size, _, channels = train.images.shape
  if source.images.ndim != 4 or source.images.dtype != np.uint8:
    raise base.InputError(f"--ood={settings.ood} has no uint8 images [N, H, W, C].")
  return source._replace(images=image_classes.resized(source.images, size, channels))


def make_problem(settings: Settings, ood_share: float, seed: int) -> episodes.Episodes:
  """The tasks for a seed and a share of OOD tasks; all methods use the same tasks."""
  train, meta, tuning, test = settings.class_sources
  if settings.rotations:
    train = image_classes.rotated(train)
  num_clusters = settings.num_clusters
  if settings.share != "cluster":  # Unused, but recorded with the data.
    num_clusters = min(num_clusters, settings.num_tasks)
  with warnings.catch_warnings():
    # With few classes, there may be fewer distinct tasks than clusters.
    warnings.filterwarnings("ignore", "Number of distinct clusters")
    return episodes.episodes(
      train,
      meta,
      test if settings.evaluate_on == "test" else tuning,
      num_ways=settings.ways,
      num_shots=settings.num_shots,
      num_queries=settings.num_queries,
      num_tasks=settings.num_tasks,
      num_meta_tasks=settings.num_meta_tasks,
      num_test_tasks=settings.num_test_tasks,
      ood=ood_source(settings, train, seed),
      ood_share=ood_share,
      noise_share=settings.noise_share,
      num_clusters=num_clusters,
      seed=seed,
    )


def make_learner(settings: Settings) -> few_shot.Learner:
  """The network and its adaptation to a task."""
  pool = settings.dataset == "mini_imagenet"
  return few_shot.Learner(
    network=conv4.Conv4(settings.ways, settings.width, pool=pool),
    num_ways=settings.ways,
    num_shots=settings.num_shots,
    inner_learning_rate=settings.inner_learning_rate,
    num_inner_steps=settings.num_inner_steps,
    num_test_steps=settings.num_adaptation_steps,
  )


def make_method(settings: Settings, name: str) -> base.Method:
  """The `Method` for a name in `--methods`."""
  if name in ("maml", "maml_removed"):
    return baselines.uniform()
  if name == "maml_zeroed":
    return zeroed()
  if name == "meta_only":
    return baselines.clean_only()
  if name == "l2rw":
    return l2rw.l2rw()
  share, eta = settings.share, settings.lookahead_learning_rate
  first_order = make_learner(settings)._replace(first_order=True).forward
  return nested_maml.nested_maml(
    settings.weight_learning_rate,
    settings.learning_rate if eta is None else eta,
    share,
    num_clusters=settings.num_clusters if share == "cluster" else None,
    num_items=settings.ways * settings.num_queries if share == "item" else None,
    clip=settings.clip,
    every=settings.every,
    meta_forward=first_order if name == "nested_maml_fo" else None,
  )


def zeroed() -> base.Method:
  """MAML with weight 0 for OOD tasks (group 1), the upper bound in the paper."""

  def gradients(state, problem, inputs):
    def weights(losses):
      size = base.global_size(losses.shape[0], problem.axis_name)
      return (inputs.batch["group"] == 0).astype(losses.dtype) / size

    return weighted_update.weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients)


def problem_of(method: str, problem: episodes.Episodes) -> episodes.Episodes:
  """The tasks of a method; two methods know which training tasks are OOD."""
  is_ood = problem.pool.is_ood
  if method == "maml_removed":
    return episodes.keep_tasks(problem, np.flatnonzero(~is_ood))
  if method == "maml_zeroed":
    train = problem.splits.train._replace(group=is_ood.astype(np.int32))
    return problem._replace(splits=problem.splits._replace(train=train))
  return problem


def make_cell(
  settings: Settings,
  name: str,
  method: base.Method,
  ood_share: float,
  seed: int,
  problem: episodes.Episodes,
) -> runner.Cell:
  """The cell of one run, which becomes a row of `results.csv`."""
  return runner.Cell(
    name,
    {
      "dataset": settings.dataset,
      "ood": settings.ood,
      "ood_share": ood_share,
      "noise_share": settings.noise_share,
      "num_ways": settings.ways,
      "num_shots": settings.num_shots,
      "num_clusters": settings.num_clusters if settings.share == "cluster" else None,
      "share": settings.share,
      "method": name,
    },
    settings.config(seeds=(seed,)),
    make_learner(settings),
    method,
    optimizers.OptimizerConfig("adam", settings.learning_rate),
    # Each call makes the splits again, to save memory.
    lambda _: [problem_of(name, problem).splits],
    f"ood-{ood_share}/{name}/seed-{seed}",
    evaluators=(evaluation.accuracy, interval_over_tasks),
    title=f"ood-{ood_share}/{name}/seed-{seed}",
    probes=[weights_of(problem.pool, settings.share)] if name in _NESTED else (),
  )


def interval_over_tasks(predictions: evaluation.Predictions) -> dict[str, float]:
  """`interval`: 1.96 standard errors of the mean accuracy over tasks."""
  accuracies = (predictions.predicted == predictions.labels).mean(axis=1)
  spread = np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))
  return {"interval": float(1.96 * spread)}


def weights_of(pool: episodes.Pool, share: str) -> evaluation.Probe:
  """A probe of NestedMAML: mean weights of tasks, and of queries if they have weights.

  Empty groups of tasks or queries are left out.

  Args:
    pool: the training tasks.
    share: which examples share a weight, see `nested_maml.nested_maml`.
  """

  def probe(snapshot):
    state: nested_maml.State = snapshot.state.method_state
    weights = np.asarray(state.weights)
    if share == "cluster":
      weights = weights[snapshot.splits.train.group]
    is_wrong = pool.wrong_items()
    is_ood = pool.is_ood
    parts = {"in_distribution_weight": weights[~is_ood], "ood_weight": weights[is_ood]}
    if weights.ndim == 2:
      parts["right_weight"] = weights[~is_wrong]
      parts["wrong_weight"] = weights[is_wrong]
    return {name: float(np.mean(part)) for name, part in parts.items() if part.size}

  return probe


def make_row(
  facts: dict[str, Any], pool: episodes.Pool, result: results_lib.Result
) -> dict[str, Any]:
  """The row of a run in `results.csv`.

  Args:
    facts: the settings that distinguish rows.
    pool: the training tasks.
    result: result of the run.
  """
  metrics = result.metrics
  probes = metrics.get("probes", {})
  return {
    **facts,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "interval_percent": 100 * metrics["last"]["interval"],
    **{name: probes[name][-1] if name in probes else None for name in WEIGHTS},
    "weight_auroc": report.ranking_auroc(-result.weights["mean_weight"], pool.is_ood),
    "num_tasks": len(pool.is_ood),
    **report.run_fields(metrics),
  }


def pooled(rows: runner.Rows) -> tuple[float, float]:
  """Mean accuracy and its interval over the test tasks of all seeds, in percent."""
  mean = np.mean([r["accuracy_percent"] for r in rows])
  squares = np.sum([r["interval_percent"] ** 2 for r in rows])
  return float(mean), float(np.sqrt(squares) / len(rows))


def draw(rows: runner.Rows, path: pathlib.Path) -> None:
  """Draws the accuracy against the share of OOD tasks, and mean weights.

  If there is a single share, each method has a row instead of a curve.
  """
  has_weights = any(r[name] is not None for r in rows for name in WEIGHTS)
  panels = 2 if has_weights else 1
  kind = {"none": "OOD"}.get(rows[0]["ood"], rows[0]["ood"])
  shares = sorted({r["ood_share"] for r in rows})
  by_method = report.grouped(rows, "method")
  accuracy, weight = "accuracy % (± over tasks; dots: seeds)", "mean weight at the end"
  ways, shots, noise = (rows[0][k] for k in ("num_ways", "num_shots", "noise_share"))
  title = f"{rows[0]['dataset']}, {ways}-way {shots}-shot"
  title += f", {noise:.0%} of the labels redrawn" if noise else ""
  height = 4 if len(shares) > 1 else 1.6 + 0.3 * len(by_method)
  size = (2.3 + 5.5 * panels, height)
  with figures.figure(path, 1, panels, figsize=size, squeeze=False) as (figure, axes):
    left, right = axes[0, 0], axes[0, -1]
    if len(shares) == 1:
      title += f", {shares[0]:.0%} {kind} tasks"
      _draw_lines(left, right, by_method)
      left.set_xlabel(accuracy)
      if has_weights:
        right.set_xlabel(f"{weight}, 1 at the start")
    else:
      for i, (method, of_method) in enumerate(by_method.items()):
        _draw_method(left, right, method, of_method, i)
      left.set_ylabel(accuracy)
      if has_weights:
        right.set_ylabel(f"{weight}, 1 at the start")
        right.set_ylim(bottom=0)
      for ax in axes[0]:
        ax.set_xlabel(figures.plain(f"share of {kind} tasks"))
        ax.set_xticks(shares)
        figures.legend_at_right(ax)
    figure.suptitle(figures.plain(title))


def _draw_lines(left: Any, right: Any, by_method: dict[str, runner.Rows]) -> None:
  weights = {}
  for i, (method, rows) in enumerate(by_method.items()):
    mean, interval = pooled(rows)
    left.errorbar(mean, i, xerr=interval, fmt="o", color="C0", capsize=3)
    left.plot(
      [r["accuracy_percent"] for r in rows], [i] * len(rows), "k.", markersize=4
    )
    for name in WEIGHTS:
      if all(r[name] is not None for r in rows):
        label = f"{method}, {name.removesuffix('_weight')}"
        weights[label] = np.mean([r[name] for r in rows])
  left.set_yticks(range(len(by_method)), list(by_method))
  left.set_ylim(len(by_method) - 0.5, -0.5)
  left.set_xlim(0, 100)
  if weights:
    right.barh(range(len(weights)), list(weights.values()), height=0.4)
    right.set_yticks(range(len(weights)), list(weights))
    right.set_ylim(len(weights) - 0.5, -0.5)


def _draw_method(
  left: Any, right: Any, method: str, rows: runner.Rows, number: int
) -> None:
  color = f"C{number}"
  shares, by_share = zip(
    *sorted(report.grouped(rows, "ood_share").items()), strict=True
  )
  means, intervals = zip(*map(pooled, by_share), strict=True)
  left.errorbar(
    shares, means, intervals, capsize=3, color=color, marker="o", label=method
  )
  points = [r["ood_share"] for r in rows], [r["accuracy_percent"] for r in rows]
  left.plot(*points, "k.", markersize=4)
  for name, line in zip(WEIGHTS, ("-", "--", "-.", ":"), strict=True):
    if all(r[name] is not None for r in rows):
      weights = [np.mean([r[name] for r in part]) for part in by_share]
      label = f"{method}, {name.removesuffix('_weight')}"
      right.plot(shares, weights, color=color, linestyle=line, marker="o", label=label)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison.

  Raises:
    InputError: a flag is invalid, or the data cannot be read.
  """
  settings.check_used("ood_share", settings.ood != "none", "with --ood=none")
  where = f"with --share={settings.share}"
  settings.check_used("num_clusters", settings.share == "cluster", where)
  names = settings_lib.choose("methods", settings.methods, METHODS)
  methods = {name: make_method(settings, name) for name in names}
  shares = [0.0] if settings.ood == "none" else list(dict.fromkeys(settings.ood_share))
  cells, pools = [], []
  for share in shares:
    for seed in settings.seeds:
      problem = make_problem(settings, share, seed)
      for name, method in methods.items():
        method_problem = problem_of(name, problem)
        cells.append(make_cell(settings, name, method, share, seed, problem))
        pools.append(method_problem.pool)
        runner.check_data(cells[-1].config, method, method_problem.splits)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows = []
  for cell, pool in zip(cells, pools, strict=True):
    (result,) = runner.train(settings, cell, folder)
    rows.append(make_row(cell.facts, pool, result))
  draw(rows, folder / "figure.png")
  return runner.report(
    settings, TABLE, folder, rows, methods=(METHODS, settings.methods)
  )


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
