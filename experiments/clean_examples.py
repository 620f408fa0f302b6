r"""Test accuracy against the number of clean examples of each class.

Methods that learn weights need clean examples. The same examples have simpler uses:
training on them alone, fine-tuning on them, and early stopping on them. This script
compares these uses with methods that learn weights, with the same number of steps and
the same cosine schedule, on two kinds of wrong labels and on a long tail. It plots how
the accuracy of each method depends on the number of clean examples. The accuracy is
measured after the last step, except for early stopping, which uses the step with the
lowest loss on the clean examples.

Uniform training, early stopping and the method that needs no clean data (generalized
cross-entropy, or balanced softmax in a long tail) are trained once for all numbers of
clean examples. Training on the clean examples alone does not depend on the problem, so
it is run only once for each data set and number of clean examples, and its rows are
repeated for each problem.
Command: python -m experiments.clean_examples --data_dir=DIR
Device, time: about a third of one CPU core (shared with other work), 27 minutes.
Published: nothing. Measured: results/clean_examples.
Tuning: the learning rate of each method (1e-3 or 3e-3) and then the share of
  fine-tuning (0.1, 0.3 or 0.6) were chosen on images held out from the training split,
  for symmetric noise on MNIST with 10 clean images per class and one seed. This command
  does not use the test set:
  python -m experiments.clean_examples --data_dir=DIR --evaluate_on=validation
  --datasets=mnist --problems=symmetric --num_clean=10 --num_seeds=1
  --learning_rate=RATE --workdir=runs/RATE
  For Meta-Weight-Net, --lookahead_learning_rate was also chosen among 0.01, 0.1 and 1.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from experiments.lib import early_stopping
from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag, methods_flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import long_tail
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import evaluation

# The kind of label noise and its fraction; None for the long tail.
PROBLEMS: dict[str, tuple[str, float] | None] = {
  "symmetric": ("bare_symmetric", 0.5),
  "pair_flip": ("mwn_flip", 0.4),
  "long_tail": None,
}
# The label of a method in the figure, and its highest learning rate of Adam.
METHODS = {
  "uniform": ("uniform", 1e-3),
  "no_clean_data": ("GCE, or balanced softmax (no clean data)", 3e-3),
  "clean_only": ("clean set alone", 1e-3),
  "early_stopped": ("uniform, early-stopped on it", 3e-3),
  "fine_tuning": ("uniform, then fine-tuned on it", 3e-3),
  "l2rw": ("L2RW", 3e-3),
  "l2rw_equal": ("L2RW, equal weights", 3e-3),
  "l2rw_fine_tuning": ("L2RW, then fine-tuned on it", 3e-3),
  "meta_weight_net": ("Meta-Weight-Net", 3e-3),
}
_COMPARED = (
  *("uniform", "no_clean_data", "clean_only", "early_stopped", "fine_tuning"),
  "l2rw",
)
_WITHOUT_CLEAN_DATA = ("uniform", "no_clean_data")
_TRAINED_ONCE = (*_WITHOUT_CLEAN_DATA, "early_stopped")


@dataclasses.dataclass(frozen=True)
class Settings(runner.Settings):
  """The flags of this script."""

  EXTENDABLE = ("datasets", "problems", "methods")

  datasets: tuple[str, ...] = data_flag(
    ("mnist", "fashion_mnist"),
    "Data sets, separated by commas: digits (needs no download), the names of image"
    f" sets that TFDS has prepared in --data_dir, {settings_lib.OWN_DATA}.",
    aliases=["dataset"],
  )
  problems: tuple[str, ...] = flag(
    tuple(PROBLEMS), "What is wrong with the training set.", choices=PROBLEMS
  )
  methods: tuple[str, ...] = methods_flag(_COMPARED, METHODS)
  num_clean: tuple[int, ...] = data_flag(
    (1, 3, 10, 30, 90),
    "Numbers of clean images of each class; each must divide the largest. The smaller"
    " sets are parts of the largest one, repeated until they have its size.",
    bounds=(1, 10**6),
  )
  imbalance: float = flag(100.0)
  largest_class: int = data_flag(
    2000,
    "Number of training images of the largest class of the long tail. The other"
    " problems have as many images as the whole tail.",
    bounds=(1, 10**8),
  )
  num_validation: int = flag(
    5000, "Number of images with true labels that are held out of training."
  )
  evaluate_on: str = flag(
    "test",
    "Images to measure the accuracy on: those of the test set, or those held out.",
    choices=["test", "validation"],
  )
  num_seeds: int = flag(5)
  num_steps: int = flag(1000)
  batch_size: int = flag(50)
  eval_every: int = flag(
    100,
    "Number of steps between two evaluations of early stopping.",
    methods=["early_stopped"],
  )
  learning_rate: float | None = flag(
    None,
    "Highest learning rate of Adam.",
    unset="0.001 for uniform and clean_only, and 0.003 otherwise",
  )
  fine_tuning_share: float = flag(
    0.3,
    "Share of the steps used to fine-tune.",
    bounds=settings_lib.INNER_SHARE,
    methods=["fine_tuning", "l2rw_fine_tuning"],
  )
  lookahead_learning_rate: float = flag(0.1, methods=["meta_weight_net"])


TABLE = table.Layout(
  name="clean_examples",
  title="Accuracy against the number of clean examples",
  metrics=(table.Metric("accuracy_percent", "test accuracy %"),),
  settings={"dataset": "{}", "problem": "{}", "num_steps": "{:,} steps"},
  keys=("dataset", "problem"),
  method=lambda row: (
    f"{row['method']}, {row['num_clean']}" if row["num_clean"] else row["method"]
  ),
  method_heading="method, clean images per class",
  published="Published: nothing, the problems are this project's.",
)


def _part(source: sources.Source, name: str, rows: np.ndarray) -> sources.Source:
  """Some rows of a source; the name distinguishes the draws of different seeds."""
  return source._replace(
    split=f"{source.split}, {name}",
    images=source.images[rows],
    labels=source.labels[rows],
    extra={},
  )


def make_splits(
  settings: Settings, dataset: str, problem: str, count: int, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The splits of the given seeds; `count` changes only the content of the meta set.

  The sets have the same sizes for all problems and counts, so that cells of the same
  `Method` share one compiled program.

  Raises:
    InputError: a class has too few images, or an argument of a builder is invalid.
  """
  source = settings.load("train", dataset)
  splits = []
  for seed in seeds:
    (rng,) = examples_lib.generators(seed, 1)
    order = rng.permutation(len(source.labels))
    held_out, order = np.split(order, [settings.num_validation])
    pools = [order[source.labels[order] == c] for c in range(source.num_classes)]
    most = max(settings.num_clean)
    if min(map(len, pools)) < most + settings.largest_class:
      raise base.InputError(
        f"--largest_class={settings.largest_class} and --num_clean={most} need more"
        f" images of a class than {dataset} has left after"
        f" --num_validation={settings.num_validation} images are held out: lower one of"
        " these flags."
      )
    # The order is one image of each class, then a second one of each, and so on, so
    # that every smaller set consists of the first images of the largest set.
    clean = np.stack([pool[:most] for pool in pools], axis=1).reshape(-1)
    clean = np.tile(clean[: count * len(pools)], most // count)
    pools = [pool[most : most + settings.largest_class] for pool in pools]
    test = settings.load("test", dataset)
    if settings.evaluate_on == "validation":
      test = _part(source, f"held out, seed {seed}", held_out)
    shared: dict[str, Any] = {
      "num_meta_per_class": 0,
      "seed": seed,
      "trusted": _part(source, f"clean, seed {seed}", clean),
    }
    tail = ("exponential", settings.largest_class, len(pools), settings.imbalance)
    rows, noise = np.concatenate(pools), PROBLEMS[problem]
    if noise is None:
      train = _part(source, f"rest, seed {seed}", rows)
      shared |= {"builder": "mwn", "shape": tail[0], "imbalance": tail[3]}
      splits.append(long_tail.long_tail_splits(train, test, **shared))
    else:
      rows = rng.permutation(rows)[: long_tail.class_sizes(*tail).sum()]
      train = _part(source, f"rest, seed {seed}", rows)
      shared |= {"builder": noise[0], "fraction": noise[1]}
      splits.append(noisy_labels.noisy_labels(train, test, **shared))
  return splits


@functools.cache  # Cells with the same method share their compiled programs.
def make_method(
  name: str, is_noisy: bool, tuned_steps: int, lookahead_rate: float
) -> base.Method:
  """The `Method` that is trained for a name of `METHODS`.

  Args:
    name: a key of `METHODS`.
    is_noisy: whether labels are wrong; otherwise the classes are a long tail.
    tuned_steps: number of steps of fine-tuning.
    lookahead_rate: learning rate of the look-ahead of Meta-Weight-Net.
  """
  variants = {
    "no_clean_data": (
      baselines.generalized_cross_entropy if is_noisy else baselines.balanced_softmax
    ),
    "fine_tuning": lambda: baselines.fine_tuning(tuned_steps),
    "l2rw_fine_tuning": lambda: baselines.fine_tuning(tuned_steps, l2rw.l2rw()),
    "meta_weight_net": lambda: meta_weight_net.meta_weight_net(
      lookahead_rate, "noise_stable" if is_noisy else "imbalance"
    ),
  }
  return registries.simple_method(name, variants=variants)


def make_cell(
  settings: Settings, name: str, dataset: str, problem: str, count: int
) -> runner.Cell:
  """The cell of a method that is trained with `count` clean images of each class."""
  num_classes = settings.load("train", dataset).num_classes
  stops_early, num_steps = name == "early_stopped", settings.num_steps
  rate = settings.learning_rate or METHODS[name][1]
  sizes = [num_classes * k for k in settings.num_clean]
  probe = early_stopping.probe((evaluation.accuracy,), sizes)
  facts = {"dataset": dataset, "problem": problem, "num_clean": count}
  return runner.Cell(
    name,
    facts,
    settings.config(
      meta_batch_size=min(settings.batch_size, max(settings.num_clean) * num_classes),
      eval_every=settings.eval_every if stops_early else num_steps,
    ),
    classifier.Classifier(mlp.MLP(num_classes, hidden=(64,)), num_classes),
    make_method(
      name,
      PROBLEMS[problem] is not None,
      max(1, round(settings.fine_tuning_share * num_steps)),
      settings.lookahead_learning_rate,
    ),
    optimizers.OptimizerConfig("adam", rate, cosine=True),
    functools.partial(make_splits, settings, dataset, problem, count),
    runner.folder_name(facts, name),
    probes=[probe] if stops_early else (),
  )


def make_cells(settings: Settings, methods: Sequence[str]) -> list[runner.Cell]:
  """The cells of all runs that are needed, without repetition."""
  counts, cells = dict.fromkeys(settings.num_clean), []
  largest = max(counts)
  for name in methods:
    for dataset in dict.fromkeys(settings.datasets):
      for problem in dict.fromkeys(settings.problems):
        if name == "clean_only" and problem != settings.problems[0]:
          continue
        for count in (largest,) if name in _TRAINED_ONCE else counts:
          cells.append(make_cell(settings, name, dataset, problem, count))
  return cells


def make_rows(settings: Settings, cell: runner.Cell, result: Any) -> runner.Rows:
  """The rows of one run.

  Early stopping has a row for each number of clean images, and training on the clean
  images alone a row for each problem.
  """
  row = {
    **cell.facts,
    "method": cell.method_name,
    "accuracy_percent": 100 * result.metrics["last"]["accuracy"],
    "kept_step": settings.num_steps,
    "learning_rate": settings.learning_rate or METHODS[cell.method_name][1],
    **report.run_fields(result.metrics),
  }
  if cell.method_name == "clean_only":
    return [{**row, "problem": name} for name in dict.fromkeys(settings.problems)]
  if cell.method_name in _WITHOUT_CLEAN_DATA:
    return [{**row, "num_clean": 0}]
  if cell.method_name != "early_stopped":
    return [row]
  num_classes, rows = settings.load("train", row["dataset"]).num_classes, []
  for count in dict.fromkeys(settings.num_clean):
    last = early_stopping.at_lowest_loss(result.metrics, count * num_classes)
    accuracy = {"accuracy_percent": 100 * last["accuracy"]}
    chosen = {"num_clean": count, "kept_step": last["kept_step"]}
    rows.append({**row, **chosen, **accuracy})
  return rows


def draw(rows: runner.Rows, path: pathlib.Path, label: str) -> None:
  """Draws a panel for each data set and problem.

  `label` is the label of the vertical axis, which is the accuracy. Methods that use no
  clean images are dashed lines.
  """
  by_panel = report.grouped(rows, "dataset", "problem")
  datasets, problems = (list(report.grouped(rows, c)) for c in ("dataset", "problem"))
  shape = (len(datasets), len(problems))
  size = (1 + 3.6 * shape[1], 1.2 + 3 * shape[0])
  with figures.figure(
    path, *shape, figsize=size, squeeze=False, sharex=True, tight=True
  ) as (drawn, axes):
    for (i, j), ax in np.ndenumerate(axes):
      here = by_panel[datasets[i], problems[j]]
      for method, of_method in report.grouped(here, "method").items():
        _draw_method(ax, method, of_method)
      ax.set_xscale("log")
      counts = sorted({row["num_clean"] for row in here} - {0})
      ax.set_xticks(counts, [str(count) for count in counts])
      ax.minorticks_off()
      ax.grid(linewidth=0.4)
      title = f"{datasets[i]}, {problems[j]}".replace("_", " ")
      ax.set_title(figures.plain(title), fontsize=10)
      # Training on the clean images alone starts so low that it would compress the
      # other curves.
      shown = [r["accuracy_percent"] for r in here if r["method"] != "clean_only"]
      ax.set_ylim(bottom=min(shown, default=0) - 5)
    for ax in axes[-1]:
      ax.set_xlabel("clean images of each class")
    for ax in axes[:, 0]:
      ax.set_ylabel(label)
    legend = {
      name: handle
      for ax in axes.flat
      for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    title = f"mean and 95% interval; seeds: {len({row['seed'] for row in rows})}"
    drawn.suptitle(title, fontsize=11, y=0.95)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": 3}
    drawn.legend(legend.values(), legend, frameon=False, **below)


def _draw_method(ax: Any, method: str, rows: runner.Rows) -> None:
  by_count = report.grouped(rows, "num_clean")
  counts = sorted(by_count)
  intervals = [
    report.interval([row["accuracy_percent"] for row in by_count[count]])
    for count in counts
  ]
  means, errors = [i.mean for i in intervals], figures.clipped_errors(intervals)
  style = {"color": f"C{list(METHODS).index(method)}", "label": METHODS[method][0]}
  if method in _WITHOUT_CLEAN_DATA:
    ax.axhline(means[0], linestyle="--", **style)
    low, high = means[0] - errors[0, 0], means[0] + errors[1, 0]
    ax.axhspan(low, high, alpha=0.15, color=style["color"], linewidth=0)
  else:
    # Points are shifted by method, so that the intervals at a count do not overlap.
    places = np.array(counts) * 1.04 ** (list(METHODS).index(method) - 4)
    ax.errorbar(places, means, errors, marker="o", markersize=3, capsize=2, **style)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison.

  Raises:
    InputError: a flag is invalid, or the data cannot be read.
  """
  for name in ("datasets", "problems", "num_clean"):
    values = getattr(settings, name)
    if not values or "" in values:
      raise base.InputError(
        f"--{name} has no value, or an empty one: give one or more values."
      )
  for count in settings.num_clean:
    if max(settings.num_clean) % count:
      raise base.InputError(
        f"--num_clean={count} does not divide the largest, {max(settings.num_clean)}:"
        " choose another number."
      )
  if settings.evaluate_on == "validation" and not settings.num_validation:
    raise base.InputError("--evaluate_on=validation needs --num_validation above 0.")
  methods = settings_lib.choose("methods", settings.methods, tuple(METHODS))
  cells = make_cells(settings, methods)
  runner.check(settings, cells)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows = [
    row
    for cell in cells
    for result in runner.train(settings, cell, folder)
    for row in make_rows(settings, cell, result)
  ]
  order = (*METHODS, *settings.datasets, *settings.problems)
  names = ("method", "dataset", "problem")
  rows.sort(key=lambda row: ([order.index(row[n]) for n in names], row["num_clean"]))
  draw(rows, folder / "figure.png", f"{settings.evaluate_on} accuracy (%)")
  return runner.report(settings, TABLE, folder, rows, methods=([*METHODS], methods))


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
