r"""Training on a few weighted examples: accuracy against seconds of training.

Paper: AdaCore (Pooladzandi et al., ICML 2022) and CRAIG (Mirzasoleiman et al., ICML
  2020) select a weighted subset by its gradients and train on it until the next
  selection. They are compared with random subsets that are drawn equally often
  (`random`) or once (`random_fixed`), and with all data (`full`). Every run takes the
  same number of steps at the same learning rate. Its seconds include selections, but
  neither compilation nor evaluation. Each seed is trained alone, so that no run waits
  for the selection of another.
Command: python -m experiments.coreset --data_dir=DIR
  for a long tail: --network=mlp --fraction=0.1 --imbalance=100 --workdir=runs/tail
  without a download: --dataset=digits
Device, time: one CPU core, 40 minutes.
Published: on other data sets, training was more than 2.9 times faster than on all data
  and 4.5 times faster than on random subsets; the paper's tables were not available.
Measured: results/coreset.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import optax

from experiments.lib import curves as curves_lib
from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag, methods_flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import long_tail
from l2rw_jax.data import noisy_labels
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import adacore
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import results as results_lib

METHODS = ("full", "random", "random_fixed", "craig", "adacore")
_SELECTING = ("craig", "adacore")
HIDDEN: dict[str, tuple[int, ...]] = {"logistic": (), "mlp": (256,)}
# For each of these test accuracies in percent, the seconds to reach it are reported.
TARGETS = (80, 90, 95, 97)
# Methods are compared at these shares of the seconds of the shortest run with the same
# model and seed.
_SHARES = {"quarter": 0.25, "half": 0.5, "equal": 1.0}


@dataclasses.dataclass(frozen=True)
class Settings(runner.Settings):
  """The flags of this script."""

  SEVERAL_PROCESSES = False

  EXTENDABLE = ("network", "methods", "fraction", "num_seeds")

  dataset: str = flag("mnist")
  network: tuple[str, ...] = flag(
    tuple(HIDDEN),
    "Networks to train, separated by commas: any of logistic (regression) and mlp"
    " (one hidden layer of 256 units).",
    aliases=["model"],
  )
  methods: tuple[str, ...] = methods_flag(METHODS, METHODS)
  fraction: tuple[float, ...] | None = data_flag(
    None,
    "Share of the training set to select, in (0, 1]. The default is 0.01, 0.1 and 0.3;"
    " digits: 0.1 and 0.3.",
    bounds=(1e-6, 1),
  )
  imbalance: float = flag(
    1.0,
    "Size of the largest class divided by that of the smallest; 1 leaves the data"
    " unchanged.",
  )
  refresh_every: int | None = flag(
    None,
    "Number of passes over a subset from one selection to the next. By default,"
    " these passes have about as many steps as two passes over all data.",
    bounds=settings_lib.EPOCHS,
    methods=["random", *_SELECTING],
  )
  greedy: str = flag(
    "stochastic",
    "Greedy selection: lazy is exact; stochastic selects from random candidates.",
    choices=coresets.GREEDY,
    methods=_SELECTING,
  )
  greedy_epsilon: float = flag(
    0.1,
    "Epsilon of the guarantee of stochastic greedy selection, in (0, 1).",
    bounds=settings_lib.INNER_SHARE,
    methods=_SELECTING,
  )
  hessian_scope: str = flag(
    "shared",
    "Curvature in AdaCore: the same for all examples, or a separate one for each.",
    choices=["shared", "example"],
    methods=["adacore"],
  )
  budget: str = flag(
    "proportional",
    "Division of a selection among the classes.",
    choices=coresets.BUDGETS,
    methods=_SELECTING,
  )
  num_steps: int | None = flag(None, unset="3,600; digits: 1,000")
  batch_size: int | None = flag(None, unset="100; digits: 20")
  learning_rate: float = flag(0.1, "Learning rate of SGD.")
  momentum: float = flag(0.0)
  eval_every: int | None = flag(None, unset="150; digits: 50")

  @functools.cached_property
  def split_of(self) -> Callable[[int], examples_lib.Splits]:
    """`seed -> splits`, with a cache of the last splits.

    The cache belongs to these settings, not to the process, because a user's files may
    change before other settings read them.
    """
    return functools.lru_cache(maxsize=1)(functools.partial(_make_split, self))

  def resolve(self) -> "Settings":
    """The settings with the defaults of the data set."""
    small = self.dataset == "digits"
    fractions = (0.1, 0.3) if small else (0.01, 0.1, 0.3)
    return self.replace(
      fraction=fractions if self.fraction is None else self.fraction,
      num_steps=self.num_steps or (1000 if small else 3600),
      batch_size=self.batch_size or (20 if small else 100),
      eval_every=self.eval_every or (50 if small else 150),
    )


TABLE = table.Layout(
  name="coreset",
  title="Training on a small weighted subset: accuracy against seconds",
  metrics=(
    table.Metric("accuracy_percent", "test accuracy %"),
    table.Metric(
      "percent_at_quarter", "test accuracy % after a quarter of equal seconds"
    ),
    table.Metric("percent_at_equal", "test accuracy % after equal seconds"),
    table.Metric("seconds", "seconds", decimals=1),
    table.Metric("selection_seconds", "seconds of selection", decimals=1),
    table.Metric("seconds_to_90", "seconds to 90 %", decimals=1),
  ),
  settings={
    "dataset": "{}",
    "imbalance": "largest class over smallest {:g}",
    "network": "{}",
    "fraction": "{:.0%} of the data",
    "num_steps": "{:,} steps",
  },
  keys=("network", "fraction"),
  published="Published: on other data, more than 2.9 times faster than on all data"
  " and 4.5 times faster than on random subsets; the protocol is this project's.",
)


def make_splits(settings: Settings, seeds: Sequence[int]) -> list[examples_lib.Splits]:
  """The splits of some seeds: all data, or a long tail."""
  # All cells of a seed are trained before the next seed, so a cache of one is enough.
  return [settings.split_of(seed) for seed in seeds]


def _make_split(settings: Settings, seed: int) -> examples_lib.Splits:
  train, test = settings.load("train"), settings.load("test")
  if settings.imbalance == 1:
    return noisy_labels.noisy_labels(
      train, test, builder="uniform_flip", fraction=0.0, num_meta_per_class=0, seed=seed
    )
  return long_tail.long_tail_splits(
    train,
    test,
    builder="ldam",
    shape="exponential",
    imbalance=settings.imbalance,
    num_meta_per_class=0,
    seed=seed,
  )


def make_method(settings: Settings, method: str, fraction: float) -> base.Method:
  """The `Method` for a name in `--methods`; `full` ignores the fraction."""
  every = settings.refresh_every or max(1, round(2 / fraction))
  if method == "full":
    return baselines.uniform()
  if method not in _SELECTING:
    return adacore.random_subset(fraction, every if method == "random" else None)
  return adacore.adacore(
    fraction,
    every,
    curvature=method == "adacore",
    hessian_scope=settings.hessian_scope,
    budget=settings.budget,
    greedy=settings.greedy,
    greedy_epsilon=settings.greedy_epsilon,
  )


def make_facts(settings: Settings, split: examples_lib.Splits) -> list[dict[str, Any]]:
  """Checks the flags and returns the model, method and fraction of every curve.

  A fraction of 1 means all data.

  Raises:
    InputError: a flag is invalid, or --greedy_epsilon has no effect.
  """
  is_stochastic = settings.greedy == "stochastic"
  settings.check_used(
    "greedy_epsilon", is_stochastic, f"with --greedy={settings.greedy}"
  )
  networks = settings_lib.choose("network", settings.network, tuple(HIDDEN))
  methods = settings_lib.choose("methods", settings.methods, METHODS)
  if not settings.fraction:
    raise base.InputError("--fraction= is empty: give a number above 0 and at most 1.")
  for fraction in settings.fraction:
    _check_fraction(settings, fraction, split)
  curves = dict.fromkeys(
    (network, method, 1.0 if method == "full" else fraction)
    for network in networks
    for fraction in settings.fraction
    for method in methods
  )
  return [
    {"network": network, "method": method, "fraction": fraction}
    for network, method, fraction in curves
  ]


def _check_fraction(
  settings: Settings, fraction: float, split: examples_lib.Splits
) -> None:
  adacore.check_fraction("--fraction", fraction)
  try:
    size = adacore.subset_size(fraction, len(split.train.label))
    counts = examples_lib.class_counts(split.train, split.num_classes)
    coresets.class_budgets(counts.tolist(), size)
  except base.InputError as error:
    raise base.InputError(
      f"--fraction={fraction}: {error} Raise --fraction."
    ) from error
  if size < (settings.batch_size or 0):
    raise base.InputError(
      f"--fraction={fraction} keeps {size} of {len(split.train.label)} images, fewer"
      f" than --batch_size={settings.batch_size}: raise --fraction or lower"
      " --batch_size."
    )


# All runs share one object, because JAX would compile again for a second object, even
# an equal one.
@functools.cache
def make_model(name: str, num_classes: int) -> classifier.Classifier:
  """The network for a name in `--network`."""
  return classifier.Classifier(mlp.MLP(num_classes, HIDDEN[name]), num_classes)


def make_cells(settings: Settings) -> list[runner.Cell]:
  """A cell for every curve; each seed is trained alone."""
  splits = functools.partial(make_splits, settings)
  (split,) = splits((0,))
  config = settings.config()
  # All runs share one object, so that a step is compiled once.
  optimizer = optax.sgd(settings.learning_rate, settings.momentum or None)
  return [
    runner.Cell(
      facts["method"],
      facts,
      config,
      make_model(facts["network"], split.num_classes),
      make_method(settings, facts["method"], facts["fraction"]),
      optimizer,
      splits,
      "-".join(map(str, facts.values())) + "/seeds-{first}",
      1,
      runner.EVALUATORS,
      "-".join(map(str, facts.values())),
    )
    for facts in make_facts(settings, split)
  ]


def train(
  settings: Settings, cell: runner.Cell, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
  """Trains one seed of a cell; returns its row, which contains the run's curve."""
  config = dataclasses.replace(cell.config, seeds=(seed,))
  cell = dataclasses.replace(cell, config=config)
  ((_, place),) = cell.groups()
  run_folder = folder / place
  if not (run_folder / f"seed-{seed}" / results_lib.RESULTS).exists():
    # This short run compiles all programs, including those of a selection, so that
    # compilation does not count in the seconds of the run below.
    with workdir_lib.scratch(folder) as scratch:
      short = dataclasses.replace(config, num_steps=1)
      runner.train(
        settings, dataclasses.replace(cell, config=short, folder=""), scratch
      )
  (result,) = runner.train(settings, cell, folder)
  (split,) = cell.splits((seed,))
  facts = {"dataset": settings.dataset, "imbalance": settings.imbalance}
  facts |= {**cell.facts, "num_train": len(split.train.label)}
  return make_row(facts, run_folder, result) | settings.probe_columns(result.metrics)


def make_row(
  facts: dict[str, Any], folder: pathlib.Path, result: results_lib.Result
) -> dict[str, Any]:
  """The row of a run in `results.csv`, with its `curve`.

  Args:
    facts: the first entries of the row.
    folder: folder of the run.
    result: result of the run.
  """
  metrics = result.metrics
  curve = curves_lib.read(folder, metrics["seed"], "accuracy")
  curve = curve._replace(values=100 * curve.values)
  selections = curves_lib.refresh_seconds(folder)
  return {
    **facts,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "balanced_percent": 100 * metrics["last"]["balanced_accuracy"],
    "seconds": float(curve.seconds[-1]),
    "num_selections": len(selections),
    "selection_seconds": sum(selections),
    **{f"seconds_to_{target}": curve.reaches(target) for target in TARGETS},
    **report.run_fields(metrics),
    "curve": curve,
  }


def panels(rows: runner.Rows) -> dict[tuple[str, float], list[int]]:
  """The indices of the rows of each panel, by the model and the fraction.

  Rows of `full` are drawn in every panel of their model.
  """
  names = [(row["network"], row["fraction"]) for row in rows]
  is_full = [row["method"] == "full" for row in rows]
  partial = [name for name, full in zip(names, is_full, strict=True) if not full]
  return {
    panel: [
      i
      for i, name in enumerate(names)
      if name == panel or (is_full[i] and name[0] == panel[0])
    ]
    for panel in dict.fromkeys(partial or names)
  }


def with_equal_seconds(rows: runner.Rows) -> runner.Rows:
  """Returns the rows with accuracies after equal numbers of seconds for all methods.

  For each model and seed, these numbers of seconds are shares of the seconds of the
  shortest run. Only runs of the same seed are compared, because they follow each other
  and the speed of a machine varies.
  """
  extended, compared = [], report.grouped(rows, "network", "seed")
  for one in rows:
    equal = min(r["seconds"] for r in compared[one["network"], one["seed"]])
    percents = {
      f"percent_at_{name}": _or_none(one["curve"].at(share * equal))
      for name, share in _SHARES.items()
    }
    extended.append({**one, "equal_seconds": equal, **percents})
  return extended


def _or_none(value: Any) -> float | None:
  return None if np.isnan(value) else float(value)


def save_curves(
  rows: runner.Rows, curves: Sequence[curves_lib.Curve], path: pathlib.Path
) -> None:
  """Writes every evaluation of every run as a line of CSV."""
  columns = ("network", "method", "fraction", "seed")
  lines = [",".join((*columns, "step", "seconds", "accuracy_percent"))]
  for row, curve in zip(rows, curves, strict=True):
    name = ",".join(str(row[column]) for column in columns)
    lines += [
      f"{name},{step},{seconds:.4f},{percent:.2f}"
      for step, seconds, percent in zip(*curve, strict=True)
    ]
  workdir_lib.write_text(path, "\n".join(lines) + "\n")


def draw(
  rows: runner.Rows, curves: Sequence[curves_lib.Curve], path: pathlib.Path
) -> None:
  """Draws accuracy against seconds, with a row per model and a column per fraction.

  A line is the mean over seeds, for as long as all seeds are training. The band around
  the line goes from the lowest to the highest seed.
  """
  members = panels(rows)
  models = list(dict.fromkeys(model for model, _ in members))
  width = max(sum(m == model for m, _ in members) for model in models)
  size = (4.2 * width + 1.3, 3.2 * len(models))
  colors = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(r["method"] for r in rows))}
  shape = (len(models), width)
  with figures.figure(path, *shape, figsize=size, squeeze=False) as (_, axes):
    for ax in axes.ravel():
      ax.set_visible(False)
    for (model, fraction), numbers in members.items():
      column = [f for m, f in members if m == model].index(fraction)
      ax = axes[models.index(model), column]
      ax.set_visible(True)
      for method, color in colors.items():
        chosen = [curves[i] for i in numbers if rows[i]["method"] == method]
        if chosen:
          _draw_curve(ax, chosen, method, color)
      lowest = min(rows[i]["accuracy_percent"] for i in numbers)
      ax.set_ylim(bottom=max(ax.get_ylim()[0], lowest - 8))
      ax.set_xscale("log")
      figures.few_log_ticks(ax)
      tail = rows[0].get("imbalance") or 1
      title = f"{rows[0]['dataset']}, {model}, {fraction:.0%}"
      title += f", imbalance {tail:g}" if tail != 1 else ""
      ax.set_title(figures.plain(title), fontsize=10)
      ax.set_xlabel("seconds of training and selecting")
      ax.set_ylabel("test accuracy (%), mean and range")
      ax.grid(linewidth=0.3)
    figures.legend_at_right(axes[0, -1])


def _draw_curve(
  ax: Any, curves: Sequence[curves_lib.Curve], method: str, color: str
) -> None:
  first = max(curve.seconds[0] for curve in curves)
  last = min(curve.seconds[-1] for curve in curves)
  grid = np.geomspace(first, max(first, last), 200)
  values = np.stack([curve.at(grid) for curve in curves])
  lowest, highest = values.min(axis=0), values.max(axis=0)
  ax.plot(grid, values.mean(axis=0), color=color, label=method, linewidth=1.4)
  ax.fill_between(grid, lowest, highest, color=color, alpha=0.2, linewidth=0)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison."""
  resolved = settings.resolve()
  cells = make_cells(resolved)
  runner.check(resolved, cells)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  # All cells of a seed are trained before the next seed, because the speed of a machine
  # varies.
  by_seed = [
    [train(resolved, cell, seed, folder) for cell in cells] for seed in settings.seeds
  ]
  rows = [row for rows in zip(*by_seed, strict=True) for row in rows]
  rows = with_equal_seconds(rows)
  curves = [row.pop("curve") for row in rows]
  save_curves(rows, curves, folder / "curves.csv")
  draw(rows, curves, folder / "figure.png")
  files = ("curves.csv", "figure.png")
  methods = METHODS, settings.methods
  return runner.report(settings, TABLE, folder, rows, files, methods=methods)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
