r"""NestedMAML against MAML where some of the training tasks are not like the rest.

Paper: Killamsetty et al., "A Nested Bi-level Optimization Framework for Robust Few
  Shot Learning" (AAAI 2022). Its protocol, on Omniglot in place of mini-ImageNet: a
  share of the training tasks comes from another data set, or a share of the training
  images is mislabeled; validation tasks, of classes of their own, are clean.
Command: python -m experiments.few_shot --data_dir=DIR
  mislabeled images: --ood=none --noise_share=0.3 --share=item
  without a download: --dataset=digits --ood=shuffled
  mini-ImageNet: --dataset=mini_imagenet --data_dir=FOLDER, which holds train, val and
  test, each CLASS/FILE.jpg, and the TFDS folder of --ood
Device, time: one CPU core, 8 minutes a share (five methods, two seeds), mostly
  compilation and NestedMAML. Step, clip and number of clusters of its weights were
  chosen on --evaluate_on=tuning classes, with --ood=shuffled at 0.9; nothing else was.
Published: mini-ImageNet with SVHN or FashionMNIST tasks only; nothing on these data.
Ours: results/few_shot.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib

from absl import flags
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _bounds
from experiments import _catalogue
from experiments import _few_shot_report
from experiments import _launch
from experiments import _report
from l2rw_jax import base
from l2rw_jax import weighted_update
from l2rw_jax.data import episodes
from l2rw_jax.data import image_classes
from l2rw_jax.data import sources
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import nested_maml
from l2rw_jax.models import conv4
from l2rw_jax.models import few_shot
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import loop
from l2rw_jax.training import results as results_lib

METHODS = (
  "maml",
  "maml_removed",
  "maml_zeroed",
  "nested_maml",
  "nested_maml_fo",
  "meta_only",
  "l2rw",
)
OODS = ("none", "mnist", "cifar10", "shuffled")
# Classes for training, validation tasks, choosing settings, testing.
_CLASSES = {"omniglot": (140, 30, 20, 52), "digits": (4, 2, 2, 2)}
# Of a foreign source: several hundred images of a class.
_NUM_FOREIGN = 5000

_DATASET = flags.DEFINE_enum(
  "dataset", "omniglot", ["omniglot", "digits", "mini_imagenet"], "Of the tasks."
)
_OOD = flags.DEFINE_enum(
  "ood", "mnist", OODS, "Other tasks' source; shuffled: own images, no classes."
)
_OOD_SHARE = flags.DEFINE_multi_float(
  "ood_share", [0.3, 0.6, 0.9], "Of the training tasks; may be repeated.", 0.0
)
_NOISE_SHARE = flags.DEFINE_float(
  "noise_share", 0.0, "Of the training images, relabeled at random.", 0.0, 1.0
)
_METHODS = flags.DEFINE_list("methods", list(METHODS[:5]), f"Of {', '.join(METHODS)}.")
_NUM_WAYS = flags.DEFINE_integer(
  "num_ways", None, "Classes of a task. [5; digits: 2]", lower_bound=2
)
_NUM_SHOTS = flags.DEFINE_integer("num_shots", 1, "Supports of a class.")
_NUM_QUERIES = flags.DEFINE_integer("num_queries", 5, "Queries of a class.")
_NUM_TASKS = flags.DEFINE_integer("num_tasks", 5000, "Training tasks.", 1)
_NUM_META_TASKS = flags.DEFINE_integer("num_meta_tasks", 1000, "Validation tasks.", 1)
_NUM_TEST_TASKS = flags.DEFINE_integer("num_test_tasks", 600, "Test tasks.", 2)
_EVALUATE_ON = flags.DEFINE_enum(
  "evaluate_on", "test", ["test", "tuning"], "Classes; tuning is to choose settings."
)
_ROTATIONS = flags.DEFINE_bool("rotations", False, "Four training classes of each.")
_SHARE = flags.DEFINE_enum(
  "share", "cluster", nested_maml.SHARES, "What has a weight in NestedMAML."
)
_NUM_CLUSTERS = flags.DEFINE_integer("num_clusters", 20, "Of training tasks.", 1)
_WEIGHT_LEARNING_RATE = flags.DEFINE_float(
  "weight_learning_rate", 1e4, "Of task weights, gamma.", 0.0
)
_LOOK_AHEAD_LEARNING_RATE = flags.DEFINE_float(
  "lookahead_learning_rate", None, "Eta. [--learning_rate]", 0.0
)
_CLIP = flags.DEFINE_float("clip", 2e-5, "Largest slope of a weight.", 0.0)
_EVERY = flags.DEFINE_integer("every", 1, "Steps between updates of weights.", 1)
_WIDTH = flags.DEFINE_integer("width", 32, "Channels of the network.", 1)
_INNER_LEARNING_RATE = flags.DEFINE_float("inner_learning_rate", 0.4, "Alpha.", 0.0)
_NUM_INNER_STEPS = flags.DEFINE_integer("num_inner_steps", 1, "In training.", 0)
_NUM_ADAPTATION_STEPS = flags.DEFINE_integer("num_adaptation_steps", 3, "In tests.", 0)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.003, "Of Adam.", 0.0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Tasks a step.", 1)
_META_BATCH_SIZE = flags.DEFINE_integer("meta_batch_size", 4, "Validation tasks.", 1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 500, "Updates.", 1)
_EVAL_EVERY = flags.DEFINE_integer("eval_every", 500, "Steps to an evaluation.", 1)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 2, "Repetitions.", lower_bound=1)
flags.adopt_module_key_flags(_launch)
_EXTENDABLE = ("methods", "ood_share")
_NESTED = ("nested_maml", "nested_maml_fo")
_OF_WEIGHTS = ("share", "weight_learning_rate", "lookahead_learning_rate", "clip")
_USED_BY = dict.fromkeys((*_OF_WEIGHTS, "every"), _NESTED)


def num_ways() -> int:
  """Classes of a task."""
  return _NUM_WAYS.value or (2 if _DATASET.value == "digits" else 5)


@functools.cache
def load(dataset: str) -> list[sources.Source]:
  """Sources of the training, validation, tuning and test classes; read once.

  Which class is where does not depend on the seed, so that no setting is chosen on
  a class that another seed tests on.
  """
  if dataset == "mini_imagenet":
    root = _launch.data_folders()["data_dir"]
    if root is None:
      raise base.InputError("--dataset=mini_imagenet needs its folder: --data_dir=.")
    train, val, test = (
      image_classes.image_folder(root, split, size=84)
      for split in ("train", "val", "test")
    )
    half = val.num_classes // 2
    return [train, *image_classes.split_classes(val, (half, half), 0), test]
  if dataset == "digits":
    whole = sources.load("digits", "train")
  else:
    folders = _launch.data_folders()
    whole = image_classes.omniglot(
      data_dir=folders["data_dir"], cache_dir=folders["cache_dir"]
    )
  return image_classes.split_classes(whole, _CLASSES[dataset], seed=0)


def foreign_source(train: sources.Source, seed: int) -> sources.Source | None:
  """Where `--ood` tasks are from, in images like those of `train`."""
  if _OOD.value == "none":
    return None
  if _OOD.value == "shuffled":
    return image_classes.shuffled(train, seed)
  found = load_foreign(_OOD.value)
  _, size, _, channels = train.images.shape
  return found._replace(images=image_classes.resized(found.images, size, channels))


@functools.cache
def load_foreign(name: str) -> sources.Source:
  """Some images of another data set."""
  return sources.load(name, f"train[:{_NUM_FOREIGN}]", **_launch.data_folders())


def make_problem(ood_share: float, seed: int) -> episodes.Episodes:
  """The tasks of one run."""
  train, meta, tuning, test = load(_DATASET.value)
  if _ROTATIONS.value:
    train = image_classes.rotated(train)
  return episodes.episodes(
    train,
    meta,
    test if _EVALUATE_ON.value == "test" else tuning,
    num_ways=num_ways(),
    num_shots=_NUM_SHOTS.value,
    num_queries=_NUM_QUERIES.value,
    num_tasks=_NUM_TASKS.value,
    num_meta_tasks=_NUM_META_TASKS.value,
    num_test_tasks=_NUM_TEST_TASKS.value,
    foreign=foreign_source(train, seed),
    foreign_share=ood_share,
    noise_share=_NOISE_SHARE.value,
    num_clusters=_NUM_CLUSTERS.value,
    seed=seed,
  )


def make_learner() -> few_shot.Learner:
  """The network and how it adapts."""
  pool = _DATASET.value == "mini_imagenet"
  return few_shot.Learner(
    network=conv4.Conv4(num_ways(), _WIDTH.value, pool=pool),
    num_ways=num_ways(),
    num_shots=_NUM_SHOTS.value,
    inner_learning_rate=_INNER_LEARNING_RATE.value,
    num_inner_steps=_NUM_INNER_STEPS.value,
    num_test_steps=_NUM_ADAPTATION_STEPS.value,
  )


def make_method(name: str) -> base.Method:
  """The `Method` behind a name of `--methods`."""
  if name not in METHODS:
    raise base.InputError(f"--methods={name}: choose among {', '.join(METHODS)}.")
  if name in ("maml", "maml_removed"):
    return baselines.uniform()
  if name == "maml_zeroed":
    return zeroed()
  if name == "meta_only":
    return baselines.clean_only()
  if name == "l2rw":
    return l2rw.l2rw()
  share, eta = _SHARE.value, _LOOK_AHEAD_LEARNING_RATE.value
  first_order = make_learner()._replace(first_order=True).forward
  return nested_maml.nested_maml(
    _WEIGHT_LEARNING_RATE.value,
    _LEARNING_RATE.value if eta is None else eta,
    share,
    num_clusters=_NUM_CLUSTERS.value if share == "cluster" else None,
    num_items=num_ways() * _NUM_QUERIES.value if share == "item" else None,
    clip=_CLIP.value,
    every=_EVERY.value,
    meta_forward=first_order if name == "nested_maml_fo" else None,
  )


def zeroed() -> base.Method:
  """MAML with weight 0 for tasks of group 1: the published skyline."""

  def gradients(state, task, inputs):
    def weights(losses):
      size = base.global_size(losses.shape[0], task.axis_name)
      return (inputs.batch["group"] == 0) / jnp.asarray(size, losses.dtype)

    return weighted_update.weighted_gradients(task, inputs, weights), state

  return base.Method(gradients)


def make_config(seed: int) -> config_lib.Config:
  """How every method is run."""
  return _launch.run_config(
    num_steps=_NUM_STEPS.value,
    batch_size=_BATCH_SIZE.value,
    meta_batch_size=_META_BATCH_SIZE.value,
    eval_every=_EVAL_EVERY.value,
    seeds=(seed,),
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """One line of `results.csv` to be."""

  method: str
  ood_share: float
  seed: int

  @property
  def folder(self) -> str:
    """Below that of the experiment."""
    return f"ood-{self.ood_share}/{self.method}/seed-{self.seed}"


def problem_of(run: Run, problem: episodes.Episodes) -> episodes.Episodes:
  """What a run trains on; two methods are told which tasks are foreign."""
  is_foreign = problem.pool.is_foreign
  if run.method == "maml_removed":
    return episodes.keep_tasks(problem, np.flatnonzero(~is_foreign))
  if run.method == "maml_zeroed":
    told = problem.splits.train._replace(group=is_foreign.astype(np.int32))
    return problem._replace(splits=problem.splits._replace(train=told))
  return problem


def train(
  run: Run,
  problem: episodes.Episodes,
  method: base.Method,
  optimizer: optax.GradientTransformation,
  folder: pathlib.Path,
) -> results_lib.Result:
  """Trains one run, or finishes it, or reads it back."""
  probes: Sequence[evaluation.Probe] = ()
  if run.method.startswith("nested"):
    probes = (_few_shot_report.weights_of(problem.pool, _SHARE.value),)
  (found,) = loop.train(
    make_config(run.seed),
    make_learner(),
    method,
    optimizer,
    [problem.splits],
    folder / run.folder,
    evaluators=(evaluation.accuracy, _few_shot_report.interval_over_tasks),
    name=run.folder,
    probes=probes,
  )
  return found


def check(
  runs: Sequence[Run],
  methods: dict[str, base.Method],
  problems: Callable[[float, int], episodes.Episodes],
) -> None:
  """Mistakes show before anything is written."""
  _bounds.check_used("ood_share", _OOD.value != "none", "with --ood=none")
  if not runs:
    raise base.InputError(f"--methods= is empty: choose among {', '.join(METHODS)}.")
  for run in runs:
    splits = problem_of(run, problems(run.ood_share, run.seed)).splits
    config_lib.check(make_config(run.seed), methods[run.method], [splits])


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  methods = {name: make_method(name) for name in _METHODS.value}
  shares = [0.0] if _OOD.value == "none" else list(dict.fromkeys(_OOD_SHARE.value))
  runs = [
    Run(method, share, seed)
    for share in shares
    for seed in range(_NUM_SEEDS.value)
    for method in methods
  ]
  problems = functools.cache(make_problem)
  check(runs, methods, problems)
  folder = _launch.prepare("few_shot", __name__, _EXTENDABLE)
  optimizer = optax.adam(_LEARNING_RATE.value)
  rows = []
  for run in runs:
    problem = problem_of(run, problems(run.ood_share, run.seed))
    found = train(run, problem, methods[run.method], optimizer, folder)
    facts = {
      "dataset": _DATASET.value,
      "ood": _OOD.value,
      "ood_share": run.ood_share,
      "noise_share": _NOISE_SHARE.value,
      "num_ways": num_ways(),
      "num_shots": _NUM_SHOTS.value,
      "num_clusters": _NUM_CLUSTERS.value,
      "share": _SHARE.value,
      "method": run.method,
    }
    rows.append(_few_shot_report.row(facts, problem.pool, found))
  flags_given = _launch.flags_of(__name__)
  _report.save(folder, rows, flags_given)
  _few_shot_report.draw(rows, folder / "figure.png")
  print(_bounds.unused(_USED_BY, _METHODS.value), end="")
  print(_catalogue.summary("few_shot", rows, flags_given))
  print(f"\nwritten: {folder}/results.json, results.csv, figure.png")


if __name__ == "__main__":
  _launch.run(main)
