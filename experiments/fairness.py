r"""FORML against its baselines on data that are unfair to some groups.

Paper: Yan, Seto, Apostoloff, "FORML: Learning to Reweight Data for Fairness"
  (DataPerf at ICML 2022). Its tables, its surrogate loss and its data sizes were not
  available, so the protocol is that of this project. By default, the training set has a
  long tail of classes, and the classes are the groups. With --groups=inverted, a few
  images are inverted, and the groups are the inverted and the other images.
  --noise_fraction adds wrong labels to either training set. The exemplar set, which is
  the meta set, is balanced and clean.
Command: python -m experiments.fairness --data_dir=DIR
  without a download: --dataset=digits; an attribute: --groups=inverted;
  data condensation: --condense=10,25,50,75 --condense_by=forml_worst
Device, time: one CPU core, 8 minutes with condensation (MNIST, 3 seeds).
Tuning: the product of FORML's two learning rates is 0.02 by default. Among 0.0004,
  0.002, 0.01, 0.02, 0.05 and 0.1, this product has the highest accuracy on the worst
  class, averaged over the four objectives, on held-out images
  (--evaluate_on=validation, three seeds). No other method was tuned.
Published: improved equality of opportunity, but no comparable number.
Measured: results/fairness.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments.lib import figures
from experiments.lib import held_out
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag, methods_flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax import group_objectives
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import fairness
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.models import classifier
from l2rw_jax.training import devices
from l2rw_jax.training import evaluation

FORML = tuple(f"forml_{name}" for name in forml.OBJECTIVES)
METHODS = (
  *("uniform", "class_proportion", "l2rw"),
  *("clean_only", "fine_tuning", "early_stopped", *FORML),
)
NETWORKS = {**registries.SMALL_NETWORKS, "resnet": registries.NETWORKS["resnet_32"]}
# Maps a column of a row to its heading and to the name of the metric, which is
# measured by `evaluation.accuracy` or `evaluation.equal_opportunity`.
MEASURES = {
  "accuracy_percent": ("accuracy %", "accuracy"),
  "worst_group_percent": ("worst group %", "worst_group_accuracy"),
  "worst_cell_percent": ("worst class and group %", "worst_cell_accuracy"),
  "gap_max_percent": ("largest TPR gap %", "tpr_gap_max"),
  "gap_mean_percent": ("mean TPR gap %", "tpr_gap_mean"),
}


@dataclasses.dataclass(frozen=True)
class Settings(held_out.Settings, runner.Settings):
  """The flags of this script."""

  EXTENDABLE = ("methods", "num_seeds", "condense", "condense_by")

  dataset: str = flag("mnist")
  groups: str = data_flag(
    "class",
    "Groups for which training should be fair: the classes, or inverted and other"
    " images.",
    choices=fairness.GROUPS,
  )
  imbalance: float | None = flag(None, unset="100; digits: 10; --groups=inverted: 1")
  noise_fraction: float = flag(0.0, "Share of the training labels to flip.")
  minority_share: float = data_flag(
    0.05,
    "Share of the training images to invert, for --groups=inverted.",
    bounds=settings_lib.INNER_SHARE,
  )
  num_exemplars: int | None = data_flag(
    None,
    "Number of exemplars (clean examples) of each class. With --groups=inverted, each"
    " class has this many inverted exemplars and this many others. The default is 10;"
    " digits: 5.",
    bounds=settings_lib.IMAGES,
  )
  network: str | None = flag(
    None,
    "Network to train: an MLP with one hidden layer of 256 units, L2RW's LeNet, or"
    " ResNet-32. The default is mlp; cifar10: resnet.",
    choices=NETWORKS,
    aliases=["model"],
  )
  methods: tuple[str, ...] = methods_flag(METHODS, METHODS)
  weight_learning_rate: float | None = flag(
    None,
    "Learning rate of FORML's weights; 0 keeps them constant. The default is 0.02 /"
    " --inner_learning_rate.",
    methods=FORML,
  )
  inner_learning_rate: float | None = flag(
    None,
    "Learning rate of FORML's look-ahead step. The default is --learning_rate.",
    methods=FORML,
  )
  reduction: str = flag(
    "mean",
    "Reduction over pairs of groups in the objectives gap and soft_tpr.",
    choices=["mean", "max"],
    methods=["forml_gap", "forml_soft_tpr"],
  )
  mean_coefficient: float = flag(
    1.0,
    "Coefficient of the mean in the objectives gap and soft_tpr.",
    bounds=settings_lib.COEFFICIENT,
    methods=["forml_gap", "forml_soft_tpr"],
  )
  temperature: float = flag(
    0.0,
    "Temperature of the objective worst; 0 is the hard maximum.",
    bounds=settings_lib.COEFFICIENT,
    methods=["forml_worst"],
  )
  condense: tuple[str, ...] = flag(
    (),
    "Percentages q, separated by commas. For each, also train uniformly on the q% of"
    " the images with the highest FORML weights, and on as many random images.",
    group="method",
  )
  condense_by: str | None = flag(
    None,
    "Method whose weights --condense uses. The default is the last forml_ method of"
    " --methods.",
    group="method",
  )
  num_steps: int | None = flag(None, unset="3,000; cifar10: 20,000")
  batch_size: int = flag(100)
  meta_batch_size: int | None = flag(
    None, "Number of exemplars in a step. The default is all; cifar10: 100."
  )
  learning_rate: float | None = flag(
    None, "Learning rate of SGD. The default is 0.1; --groups=inverted: 0.02."
  )
  momentum: float = flag(0.0)
  eval_every: int = flag(500)

  @property
  def rate(self) -> float:
    """Learning rate of SGD; its default is lower for inverted images (larger norm)."""
    default = 0.02 if self.groups == "inverted" else 0.1
    return default if self.learning_rate is None else self.learning_rate

  @property
  def steps(self) -> int:
    """Number of parameter updates; its default is larger for CIFAR-10."""
    return self.num_steps or (20_000 if self.dataset == "cifar10" else 3000)

  @property
  def num_groups(self) -> int:
    """Number of groups for which training should be fair."""
    return self.load("train").num_classes if self.groups == "class" else 2


def method_label(row: Mapping[str, Any]) -> str:
  """The name of a row's method in the table."""
  if row["kept_percent"] is None:
    return row["method"]
  by = f" by {row['method']}" if row["kept"] == "top" else ""
  return f"uniform on {row['kept']} {row['kept_percent']}%{by}"


TABLE = table.Layout(
  name="fairness",
  title="Fairness between groups",
  metrics=tuple(
    table.Metric(column, heading) for column, (heading, _) in MEASURES.items()
  ),
  settings={
    "dataset": "{}",
    "groups": "groups by {}",
    "imbalance": "largest class over smallest {:g}",
    "noise_fraction": "{:.0%} of the labels wrong",
    "num_steps": "{:,} steps",
    "evaluate_on": "{} images",
  },
  method=method_label,
  published="Published: no comparable number; the protocol is this project's.",
)


def make_facts(
  method: str, percent: int | None = None, kept: str = ""
) -> dict[str, Any]:
  """The columns that distinguish the lines of the table.

  Args:
    method: the method or, with condensation, the method whose weights select images.
    percent: percentage of the images for uniform training; None for all images.
    kept: how these images are selected, "top" or "random"; "" for all images.
  """
  return {"method": method, "kept_percent": percent, "kept": kept}


def make_method(settings: Settings, name: str) -> base.Method:
  """The `Method` for a name in `--methods`."""
  if name in FORML:
    return _make_forml(settings, name.removeprefix("forml_"))
  return registries.simple_method(name, settings.steps)


def _make_forml(settings: Settings, objective: str) -> base.Method:
  inner, rate = settings.inner_learning_rate, settings.weight_learning_rate
  inner = settings.rate if inner is None else inner
  if rate is None:
    # The change of a weight is proportional to the product of the two learning rates.
    rate = 0.02 / inner
  options: dict[str, Any] = {
    "reduction": settings.reduction,
    "mean_coefficient": settings.mean_coefficient,
    "temperature": settings.temperature,
  }
  used = forml.objective_settings(objective, settings.reduction)
  options = {name: options[name] for name in used}
  return forml.forml(
    rate, objective, settings.num_groups, inner_learning_rate=inner, **options
  )


def make_splits(settings: Settings, seeds: Sequence[int]) -> list[examples_lib.Splits]:
  """The splits of the given seeds.

  Raises:
    InputError: --minority_share has no effect or is too small, or another flag about
      the data is invalid.
  """
  is_inverted, small = settings.groups == "inverted", settings.dataset == "digits"
  settings.check_used("minority_share", is_inverted, f"with --groups={settings.groups}")
  imbalance, num_exemplars = settings.imbalance, settings.num_exemplars
  if imbalance is None:
    imbalance = 1.0 if is_inverted else 10.0 if small else 100.0
  if num_exemplars is None:
    num_exemplars = 5 if small else 10
  splits = [
    fairness.fairness(
      settings.load("train"),
      settings.load("test"),
      groups=settings.groups,
      imbalance=imbalance,
      noise_fraction=settings.noise_fraction,
      minority_share=settings.minority_share,
      num_exemplars=num_exemplars,
      seed=seed,
    )
    for seed in seeds
  ]
  largest = examples_lib.class_counts(splits[0].train, splits[0].num_classes).max()
  if is_inverted and settings.minority_share * largest < 0.5:
    raise base.InputError(
      f"--minority_share={settings.minority_share:g} is less than one image of the"
      f" {largest} of a class: raise it."
    )
  return splits


def make_cell(
  settings: Settings,
  facts: dict[str, Any],
  method: base.Method,
  splits: Sequence[examples_lib.Splits],
) -> runner.Cell:
  """The cell of a line of the table.

  Its seeds run side by side, except for convolutional networks on a CPU.
  """
  name, percent, kept = (facts[k] for k in ("method", "kept_percent", "kept"))
  if percent is not None:
    name = f"condensed-{name}-{kept}-{percent}"
  large, num_classes = settings.dataset == "cifar10", splits[0].num_classes
  network = settings.network or ("resnet" if large else "mlp")
  if network != "mlp":
    settings.load_images("train", f"--network={network}")
  meta_batch_size = settings.meta_batch_size
  if meta_batch_size is None and large:
    meta_batch_size = 100
  config = settings.config(
    num_steps=settings.steps,
    meta_batch_size=meta_batch_size,
  )
  module = NETWORKS[network](num_classes, axis_name=devices.AXIS_NAME)
  return runner.Cell(
    name,
    facts,
    config,
    classifier.Classifier(module, num_classes),
    method,
    optimizers.OptimizerConfig("sgd", settings.rate, settings.momentum),
    lambda seeds: [splits[seed] for seed in seeds],
    name + "/seeds-{first}-{last}",
    runner.seeds_at_once(None, network != "mlp"),
    (*runner.EVALUATORS, evaluation.equal_opportunity),
    title=name,
  )


def condensations(
  settings: Settings, methods: Sequence[str], size: int
) -> list[dict[str, Any]]:
  """Checks `--condense` and returns the facts of its cells.

  Args:
    settings: the flags of the script.
    methods: the names in `--methods`.
    size: number of training images.

  Raises:
    InputError: a percentage is invalid or leaves less than a batch, or `--condense_by`
      has no effect or names no FORML method of `methods`.
  """
  last = next((m for m in reversed(methods) if m in FORML), "")
  by = settings.condense_by or last
  if settings.condense_by is not None and not settings.condense:
    raise base.InputError(
      f"--condense_by={settings.condense_by} needs --condense: give percentages there,"
      " or leave --condense_by out."
    )
  for text in settings.condense:
    if not (text.isdecimal() and len(text) < 3 and 1 <= int(text) <= 99):
      raise base.InputError(
        f"--condense={text}: give whole percentages between 1 and 99, such as 10,25,50."
      )
    number = num_kept(size, int(text))
    if number < settings.batch_size:
      raise base.InputError(
        f"--condense={text} keeps {number} of {size} images, fewer"
        f" than --batch_size={settings.batch_size}: raise --condense or lower"
        " --batch_size."
      )
  if settings.condense and (by not in FORML or by not in methods):
    raise base.InputError(
      f"--condense needs the weights of a forml_ method of --methods; --condense_by is"
      f" {repr(by) if by else 'not given'}. Choose among {', '.join(FORML)}, and list"
      " it in --methods too."
    )
  percents = dict.fromkeys(map(int, settings.condense))
  return [make_facts(by, p, kept) for p in percents for kept in ("top", "random")]


def condensed(
  splits: examples_lib.Splits,
  last_weight: np.ndarray,
  percent: int,
  kept: str,
  seed: int,
) -> examples_lib.Splits:
  """The data with only a part of the training set.

  Args:
    splits: the whole data.
    last_weight: the last weight of each training example, [N]. NaN (for an example that
      was never in a batch) counts as the initial weight 1. Ties are broken at random.
    percent: percentage of the examples to keep.
    kept: "top" by weight, or "random".
    seed: seed of the draw.
  """
  rng = np.random.default_rng([seed, percent])
  order = rng.permutation(len(last_weight))
  if kept == "top":
    weights = np.nan_to_num(last_weight, nan=1.0)
    order = order[np.argsort(-weights[order], kind="stable")]
  return examples_lib.keep_train(splits, order[: num_kept(len(order), percent)])


def num_kept(size: int, percent: int) -> int:
  """The number of examples that make up `percent` percent of `size`."""
  return round(size * percent / 100)


def make_row(settings: Settings, cell: runner.Cell, result: Any) -> dict[str, Any]:
  """The row of a run in `results.csv`."""
  last = result.metrics["last"]
  return {
    "dataset": settings.dataset,
    "groups": settings.groups,
    **held_out.column(settings),
    **cell.facts,
    **{
      column: None if name not in last else 100 * last[name]
      for column, (_, name) in MEASURES.items()
    },
    **report.run_fields(result.metrics),
    **settings.probe_columns(result.metrics),
  }


def draw(rows: runner.Rows, path: pathlib.Path) -> None:
  """Draws bars for every measure and method, and the curves of condensation if any."""
  whole = [r for r in rows if r["kept_percent"] is None]
  smaller = [r for r in rows if r["kept_percent"] is not None]
  panels = 1 + bool(smaller)
  size = (4 + 5 * panels, 3.8)
  with figures.figure(path, 1, panels, figsize=size, squeeze=False) as (_, axes):
    _draw_bars(axes[0, 0], whole)
    if smaller:
      _draw_curves(axes[0, 1], whole, smaller)


def _draw_bars(axes: Any, rows: runner.Rows) -> None:
  columns = [column for column in MEASURES if rows[0][column] is not None]
  values = {
    method: [[run[column] for run in runs] for column in columns]
    for method, runs in report.grouped(rows, "method").items()
  }
  figures.grouped_bars(axes, values, [MEASURES[column][0] for column in columns])
  axes.tick_params(axis="x", labelsize=8)
  axes.set_ylabel("mean and 95% interval; dots: seeds")
  part = rows[0].get("evaluate_on", "test")
  title = f"{rows[0]['dataset']}, groups: {rows[0]['groups']}, {part} images"
  axes.set_title(figures.plain(title))
  axes.set_ylim(0, 100)
  figures.legend_at_right(axes)


def _draw_curves(axes: Any, whole: runner.Rows, rows: runner.Rows) -> None:
  percents = sorted(report.grouped(rows, "kept_percent"))
  by_cell = report.grouped(rows, "kept", "kept_percent")
  for column, line in (("accuracy_percent", "s:"), ("worst_group_percent", "o-")):
    heading = MEASURES[column][0]
    for kept, color in (("top", "C3"), ("random", "C0")):
      means = [np.mean([r[column] for r in by_cell[kept, p]]) for p in percents]
      axes.plot(percents, means, f"{color}{line}", label=f"{kept}: {heading}")
      runs = [(p, r[column]) for p in percents for r in by_cell[kept, p]]
      axes.plot(*zip(*runs, strict=True), f"{color}.", markersize=4, alpha=0.6)
    uniform = [r[column] for r in whole if r["method"] == "uniform"]
    if uniform:
      axes.axhline(np.mean(uniform), color="black", linestyle=line[1:], linewidth=0.8)
  axes.set_xlabel("% of the training set kept (small dots: seeds; black: all images)")
  axes.set_title(f"uniform on a part, top by {rows[0]['method']} weight")
  axes.set_ylim(0, 100)
  axes.legend(fontsize=7, loc="lower right")


def _check(settings: Settings, cells: Sequence[runner.Cell]) -> None:
  for cell in cells:
    for split in cell.splits(settings.seeds) if cell.method.needs_meta else ():
      try:
        group_objectives.check_groups(split.meta.group, settings.num_groups)
      except base.InputError as error:
        raise base.InputError(f"{error} Raise --num_exemplars.") from error
  runner.check(settings, cells)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison.

  Raises:
    InputError: a flag is invalid, or the data cannot be read.
  """
  names = settings_lib.choose("methods", settings.methods, METHODS)
  methods = {name: make_method(settings, name) for name in names}
  splits = make_splits(settings, settings.seeds)
  cells = [
    make_cell(settings, make_facts(name), method, splits)
    for name, method in methods.items()
  ]
  _check(settings, cells)
  smaller = condensations(settings, list(methods), len(splits[0].train.label))
  folder = runner.open_folder(settings, TABLE.name, workdir)
  runs = [(cell, runner.train(settings, cell, folder)) for cell in cells]
  results_of = {cell.method_name: results for cell, results in runs}
  for facts in smaller:
    results = results_of[facts["method"]]
    parts = [
      condensed(
        split, result.weights["last_weight"], facts["kept_percent"], facts["kept"], seed
      )
      for seed, (split, result) in enumerate(zip(splits, results, strict=True))
    ]
    cell = make_cell(settings, facts, baselines.uniform(), parts)
    runs.append((cell, runner.train(settings, cell, folder)))
  rows = [
    make_row(settings, cell, result) for cell, results in runs for result in results
  ]
  draw(rows, folder / "figure.png")
  return runner.report(
    settings, TABLE, folder, rows, methods=(METHODS, settings.methods)
  )


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
