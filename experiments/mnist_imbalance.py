r"""L2RW's MNIST imbalance figure: 4 against 9, the 9s in a large majority.

Paper: Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
  (ICML 2018), figure 3: test error against the majority's share, with 5,000 training
  images, 10 clean images and 10 splits.
Command: python -m experiments.mnist_imbalance --data_dir=DIR
  for the whole figure; with --majority=0.995 --num_seeds=3 for its right end.
Device, time: one CPU core, 8 to 14 minutes per run.
Published (error %, majority 0.995): baseline 18.26, class_proportion 8.30, hard
  mining 7.74, L2RW 3.62. Measured: results/mnist_imbalance.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag, methods_flag
from experiments.tables import published
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import four_vs_nine
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.training import results as results_lib

FIGURE_METHODS = tuple(published.MNIST_IMBALANCE)
METHODS = (*FIGURE_METHODS, "fine_tuning", "clean_only", "early_stopped")


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Settings of the paper or of its released code, see the flags of these names."""

  num_steps: int
  l2rw_steps: int
  hard_mining_batch: int
  variant: str
  clean_in_train: bool
  num_test: int


# The paper does not mention momentum; both protocols use 0.9, as in the released code.
# Neither decays the learning rate: the decay in the released code has no effect.
PROTOCOLS = {
  "paper": Protocol(8000, 8000, 100, "paper", False, 0),
  "official_code": Protocol(8000, 4000, 500, "official_code", True, 500),
}
_protocol_flag = functools.partial(flag, None, unset="the protocol's")


@dataclasses.dataclass(frozen=True)
class Settings(runner.Settings):
  """The flags of this script."""

  EXTENDABLE = ("majority", "methods", "num_seeds", "seeds_at_once")

  dataset: str = flag(
    "mnist",
    "Data set with the 4s and 9s: digits, which needs no download, the name of any"
    " image set that TFDS has prepared in --data_dir, or your own images: images:DIR or"
    " npz:FILE. It needs ten classes or more; the classes 4 and 9 are used.",
  )
  protocol: str = flag(
    "paper", "Settings to start from, which other flags override.", choices=PROTOCOLS
  )
  majority: tuple[float, ...] | None = data_flag(
    None,
    "Share of the 9s. The default is the paper's 0.9, 0.95, 0.98, 0.99 and 0.995, or"
    " 0.9 and 0.95 for digits.",
    bounds=settings_lib.INNER_SHARE,
  )
  methods: tuple[str, ...] = methods_flag(FIGURE_METHODS, METHODS)
  num_seeds: int = flag(10, aliases=["num_splits"])
  seeds_at_once: int | None = flag(
    None, unset="1 on CPU and all elsewhere", aliases=["splits_at_once"]
  )
  num_steps: int | None = _protocol_flag(
    "Number of parameter updates of the baselines."
  )
  l2rw_steps: int | None = _protocol_flag(
    "Number of parameter updates of L2RW.", bounds=settings_lib.STEPS, methods=["l2rw"]
  )
  batch_size: int = flag(
    100, "Number of training examples in a step, except for hard mining."
  )
  hard_mining_batch: int | None = _protocol_flag(
    "Batch size of hard mining.", bounds=settings_lib.BATCH, methods=["hard_mining"]
  )
  variant: str | None = _protocol_flag(
    "Variant of the methods class_proportion and hard_mining.",
    choices=["paper", "official_code"],
    group="method",
  )
  clean_in_train: bool | None = _protocol_flag(
    "Let methods that need no clean images train on them, too.", group="data"
  )
  num_test: int | None = _protocol_flag(
    "Number of test images, half 4s and half 9s; 0 uses as many as there are, which"
    " digits always do.",
    bounds=settings_lib.IMAGES,
    group="data",
  )
  learning_rate: float = flag(1e-3, "Learning rate of SGD.")
  momentum: float = flag(0.9)
  num_train: int | None = flag(
    None,
    "Number of images, including the clean ones. The default is 5,000, or 136 for"
    " digits.",
  )
  num_meta: int | None = flag(
    None,
    "Number of clean images, half 4s and half 9s. The default is 10, or 4 for digits.",
  )
  eval_every: int = flag(500)


TABLE = table.Layout(
  name="mnist_imbalance",
  title="4 against 9, the 9s in a large majority",
  metrics=(
    table.Metric(
      "error_percent",
      "test error %",
      published="published_error_percent",
      spread="published_error_bar",
    ),
  ),
  settings={"dataset": "{}", "majority": "majority {:g}", "protocol": "protocol {}"},
  keys=("majority",),
  repeat="split",
  published=published.MNIST_IMBALANCE_SOURCE,
)


@functools.cache  # The compiled program of a method is used for all majorities.
def make_method(name: str, variant: str, num_steps: int) -> base.Method:
  """The `Method` for a name in `--methods`."""
  variants = {
    "class_proportion": lambda: baselines.class_proportion(variant),
    "hard_mining": lambda: baselines.hard_mining(variant),
  }
  return registries.simple_method(name, num_steps, variants)


def make_protocol(settings: Settings) -> Protocol:
  """The protocol with the flags that override it."""
  names = (
    *("num_steps", "l2rw_steps", "hard_mining_batch", "variant"),
    *("clean_in_train", "num_test"),
  )
  given = settings_lib.given_values(**{name: getattr(settings, name) for name in names})
  return dataclasses.replace(PROTOCOLS[settings.protocol], **given)


def make_cell(settings: Settings, name: str, majority: float) -> runner.Cell:
  """The cell of a method, with the protocol's settings unless flags override them."""
  protocol = make_protocol(settings)
  steps = protocol.l2rw_steps if name == "l2rw" else protocol.num_steps
  is_hard_mining = name == "hard_mining"
  config = settings.config(
    num_steps=steps,
    batch_size=protocol.hard_mining_batch if is_hard_mining else settings.batch_size,
  )
  method = make_method(name, protocol.variant, steps)
  include_meta = protocol.clean_in_train and not method.needs_meta
  return runner.Cell(
    name,
    {"majority": majority},
    config,
    classifier.Classifier(lenet.LeNet(1), num_classes=2),
    method,
    optimizers.OptimizerConfig("sgd", settings.learning_rate, settings.momentum),
    functools.partial(make_splits, settings, majority, include_meta),
    f"majority-{majority}-{name}" + "/splits-{first}-{last}",
    runner.seeds_at_once(settings.seeds_at_once, has_convolutions=True),
    runner.EVALUATORS,
    f"{name} at {majority:g}",
  )


def make_splits(
  settings: Settings, majority: float, include_meta: bool, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The data of some of the random splits.

  Raises:
    InputError: the data set lacks a 4 or a 9, or a flag about the data is invalid.
  """
  small, num_meta = settings.dataset == "digits", settings.num_meta
  num_test = make_protocol(settings).num_test
  if not {4, 9} <= set(settings.load_images("train").labels.tolist()):
    raise base.InputError(f"--dataset={settings.dataset} needs the classes 4 and 9.")
  return [
    four_vs_nine.four_vs_nine(
      settings.load("train"),
      settings.load("test"),
      majority=majority,
      seed=seed,
      num_train=settings.num_train or (136 if small else 5000),
      num_meta=num_meta if num_meta is not None else (4 if small else 10),
      include_meta=include_meta,
      num_test=(not small and num_test) or None,
    )
    for seed in seeds
  ]


def make_row(
  settings: Settings, cell: runner.Cell, result: results_lib.Result
) -> dict[str, Any]:
  """The row of a run in `results.csv`."""
  majority, metrics = cell.facts["majority"], result.metrics
  numbers: tuple[float | None, float | None] = (None, None)
  if settings.follows({"dataset": "mnist"}, cell.method_name, ("majority", "protocol")):
    of_method = published.MNIST_IMBALANCE.get(cell.method_name, {})
    numbers = of_method.get(majority, numbers)
  return {
    "dataset": settings.dataset,
    "protocol": settings.protocol,
    "method": cell.method_name,
    "majority": majority,
    "error_percent": 100 * (1 - metrics["last"]["accuracy"]),
    "published_error_percent": numbers[0],
    "published_error_bar": numbers[1],
    "batch_size": cell.config.batch_size,
    **settings.probe_columns(metrics),
    **report.run_fields(metrics),
  }


def draw(rows: runner.Rows, path: pathlib.Path) -> None:
  """Draws bars with intervals, a dot per split, and diamonds for published means."""
  majorities = sorted({r["majority"] for r in rows})
  by_cell = report.grouped(rows, "method", "majority")
  errors = {
    method: [[r["error_percent"] for r in by_cell[method, m]] for m in majorities]
    for method in report.grouped(rows, "method")
  }
  size = (4 + 1.1 * len(majorities), 3.6)
  with figures.figure(path, figsize=size, tight=True) as (_, axes):
    edges = figures.grouped_bars(axes, errors, [f"{m:g}" for m in majorities])
    axes.plot([], [], "k.", markersize=3, label="one split")
    published_of = {
      key: runs[0]["published_error_percent"]
      for key, runs in by_cell.items()
      if runs[0]["published_error_percent"] is not None
    }
    if published_of:
      places = [edges[method][majorities.index(m)] for method, m in published_of]
      means = list(published_of.values())
      axes.plot(places, means, "kD", markersize=4, label="published mean")
    axes.set_xlabel("share of the majority class")
    axes.set_ylabel("test error (%), mean and 95% interval")
    title = f"{rows[0]['dataset']}, 4 against 9, {rows[0]['protocol']} protocol"
    axes.set_title(figures.plain(title))
    axes.set_ylim(0, min(axes.get_ylim()[1], 100))
    figures.legend_at_right(axes)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison.

  Raises:
    InputError: a flag is invalid, or the data cannot be read.
  """
  names = settings_lib.choose("methods", settings.methods, METHODS)
  is_digits = settings.dataset == "digits"
  settings.check_used("num_test", not is_digits, "with --dataset=digits")
  majorities = settings.majority
  if majorities is None:
    majorities = (0.9, 0.95) if is_digits else (0.9, 0.95, 0.98, 0.99, 0.995)
  cells = [make_cell(settings, n, m) for m in dict.fromkeys(majorities) for n in names]
  runner.check(settings, cells)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows = [
    make_row(settings, cell, result)
    for cell in cells
    for result in runner.train(settings, cell, folder)
  ]
  draw(rows, folder / "figure.png")
  return runner.report(settings, TABLE, folder, rows, methods=(METHODS, names))


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
