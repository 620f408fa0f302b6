"""Code of the two long-tail scripts: flags, data, cells, rows and the figure."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
import types
from typing import Any, NamedTuple

import numpy as np

from experiments.lib import figures
from experiments.lib import held_out
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib import trusted
from experiments.lib.settings import data_flag, flag, methods_flag, preset_flag
from experiments.tables import published_cifar
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import long_tail
from l2rw_jax.data import own_data
from l2rw_jax.data import sources
from l2rw_jax.models import classifier
from l2rw_jax.training import evaluation
from l2rw_jax.training import results as results_lib

METHODS = tuple(registries.LONG_TAIL)
_SHOTS = {f"{name}_percent": f"{name}-shot" for name in evaluation.SHOTS}
_COLORS = {"many_percent": "C2", "medium_percent": "C1", "few_percent": "C3"}


@dataclasses.dataclass(frozen=True)
class Settings(
  registries.LongTailSettings,
  trusted.Settings,
  held_out.Settings,
  optimizers.Settings,
  runner.Settings,
):
  """The flags of both scripts, which set different values of `UNSET`."""

  EXTENDABLE = ("methods", "imbalance", "num_seeds", "seeds_at_once", "mentor")

  dataset: str = flag("mnist")
  methods: tuple[str, ...] | None = methods_flag(None, METHODS)
  shape: str = data_flag(
    "exponential",
    "Shape of the tail: class sizes fall exponentially, or half of the classes are"
    " small.",
    choices=long_tail.SHAPES,
  )
  imbalance: tuple[float, ...] = flag((100.0,))
  builder: str | None = preset_flag(
    "Paper whose class sizes are used: ldam (meta images are drawn from images outside"
    " the tail; a class with too few of these gives up training images) or mwn (meta"
    " images are removed before the tail is made).",
    choices=long_tail.BUILDERS,
    group="data",
  )
  num_meta: int | None = preset_flag("Number of clean meta images of each class.")
  seeds_at_once: int | None = flag(None)
  num_epochs: int | None = preset_flag(
    "Number of passes over the training set. The drops of the learning rate move in"
    " proportion."
  )
  batch_size: int | None = preset_flag("Number of training images in a step.")
  meta_batch_size: int | None = flag(
    None,
    "Number of meta images in a step. The default is 100, or all if there are fewer.",
  )
  learning_rate: float | None = preset_flag("Highest learning rate of SGD.")
  momentum: float | None = preset_flag("Momentum of SGD.")
  weight_decay: float | None = preset_flag("Weight decay of all parameters.")
  eval_every: int = flag(1, "Number of epochs between two evaluations.")


class Preset(NamedTuple):
  """Settings of training: values of flags, and the optimizer of every method.

  Attributes that are not the value of a flag:
    optimizer: optimizer of the methods.
    learning_rates: maps methods to their learning rates, if they differ from that of
      `optimizer` and --learning_rate is not given.
  """

  num_epochs: int
  batch_size: int
  optimizer: optimizers.OptimizerConfig
  builder: str
  num_meta: int
  deferred: float = 0.8
  learning_rates: Mapping[str, float] = types.MappingProxyType({})

  def optimizer_of(self, method: str) -> optimizers.OptimizerConfig:
    """The optimizer of a method."""
    rate = self.learning_rates.get(method, self.optimizer.learning_rate)
    return dataclasses.replace(self.optimizer, learning_rate=rate)


class Experiment(NamedTuple):
  """The differences between the scripts.

  Attributes:
    table: table of the script.
    train: images from which the long-tailed training set is drawn.
    test: images of the test set.
    make_model: `cosine -> model`; `cosine` is whether the logits are cosines.
    preset: settings of training, which flags override.
    facts: entries of every row: data set, network and so on.
    methods: methods that are compared by default.
    side_by_side: number of seeds that are trained side by side by default.
    comparable: whether published numbers are shown next to results of the unchanged
      preset.
  """

  table: table.Layout
  train: sources.Source
  test: sources.Source
  make_model: Callable[[bool], classifier.Classifier]
  preset: Preset
  facts: dict[str, Any]
  methods: Sequence[str]
  side_by_side: int | None
  comparable: bool = False


def make_table(name: str, title: str, published: str, *keys: str) -> table.Layout:
  """The layout of a script's table."""
  return table.Layout(
    name=name,
    title=title,
    metrics=(
      table.NOISE_METRICS[0],
      table.Metric("balanced_percent", "balanced %"),
      *(table.Metric(column, f"{shots} %") for column, shots in _SHOTS.items()),
      table.NOISE_METRICS[1],
    ),
    settings={
      "dataset": "{}",
      "network": "{}",
      "preset": "preset {}",
      "builder": "builder {}",
      "shape": "{}",
      "imbalance": "imbalance {:g}",
      "num_meta": "{} meta images a class",
      "num_epochs": "{} epochs",
    },
    keys=("shape", "imbalance", *keys),
    published=published,
  )


# The flags that `with_flags` reads.
_OVERRIDING = (
  *("learning_rate", "momentum", "weight_decay", "schedule", "num_epochs"),
  *("batch_size", "builder", "num_meta", "deferred"),
)


def with_flags(settings: Settings, experiment: Experiment) -> Experiment:
  """The experiment with the values of the flags.

  If the preset changes, its results are not compared with published numbers.
  """
  old = experiment.preset
  rates = ("learning_rate", "momentum", "weight_decay")
  others = ("num_epochs", "batch_size", "builder", "num_meta", "deferred")
  given_rates, given = (
    settings_lib.given_values(**{name: getattr(settings, name) for name in names})
    for names in (rates, others)
  )
  optimizer = dataclasses.replace(old.optimizer, **given_rates)
  if settings.learning_rate is not None:
    given["learning_rates"] = types.MappingProxyType({})
  new = old._replace(optimizer=settings.scheduled(optimizer), **given)
  # With the builder "ldam", the size of the meta set hardly changes the training set.
  # With "mwn", it determines the sizes of all classes.
  compared = new._replace(num_meta=old.num_meta) if new.builder == "ldam" else new
  is_comparable = experiment.comparable and compared == old
  return experiment._replace(preset=new, comparable=is_comparable)


def _make_splits(
  settings: Settings, experiment: Experiment, imbalance: float, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The splits of the given seeds."""
  return [
    long_tail.long_tail_splits(
      experiment.train,
      experiment.test,
      builder=experiment.preset.builder,
      shape=settings.shape,
      imbalance=imbalance,
      seed=seed,
      **settings.meta_set(experiment.preset.num_meta),
    )
    for seed in seeds
  ]


def _counts(split: examples_lib.Splits) -> list[int]:
  return examples_lib.class_counts(split.train, split.num_classes).tolist()


def make_cells(
  settings: Settings, experiment: Experiment, names: Sequence[str], imbalance: float
) -> list[runner.Cell]:
  """A cell for every method on a tail."""
  preset = experiment.preset
  splits = functools.partial(_make_splits, settings, experiment, imbalance)
  (split,) = splits((0,))
  steps_per_epoch = max(1, len(split.train.label) // preset.batch_size)
  num_meta = len(split.meta.label)
  config = settings.config(
    num_steps=preset.num_epochs * steps_per_epoch,
    batch_size=preset.batch_size,
    meta_batch_size=settings.meta_batch_size or min(100, num_meta) or None,
    eval_every=settings.eval_every * steps_per_epoch,
  )
  counts = _counts(split)
  return [
    runner.method_cell(
      settings,
      name,
      {"builder": preset.builder, "shape": settings.shape, "imbalance": imbalance},
      config,
      experiment.make_model(registries.needs_cosines(name)),
      preset.optimizer_of(name),
      splits,
      settings.seeds_at_once or experiment.side_by_side,
      num_epochs=preset.num_epochs,
      deferred=preset.deferred,
      evaluators=(
        *runner.EVALUATORS,
        evaluation.shot_accuracy(counts, *evaluation.shot_thresholds(counts)),
      ),
      num_classes=split.num_classes,
      # These settings are from the demonstration of ABSGD's package, on CIFAR-10 with
      # imbalance 100.
      absgd=registries.Absgd(2.0, 0.9, 1.0),
      mwn_preset="imbalance",
    )
    for name in names
  ]


def _rows(
  settings: Settings,
  experiment: Experiment,
  cell: runner.Cell,
  results: Sequence[results_lib.Result],
) -> runner.Rows:
  """The rows of a cell's runs in `results.csv`."""
  (split,) = cell.splits((0,))
  counts = _counts(split)
  limits = evaluation.shot_thresholds(counts)
  published = None
  # These flags may differ from their defaults: the script, `with_flags` and
  # `published_cifar.long_tail` compare their values.
  exempt = ("dataset", "preset", "network", "shape", "imbalance", *_OVERRIDING)
  if experiment.comparable and settings.follows({}, cell.method_name, exempt):
    published = published_cifar.long_tail(
      experiment.facts["dataset"], cell.method_name, **cell.facts
    )
  # A group of classes that has no member is not measured.
  measured = {f"{name}_percent": f"{name}_shot_accuracy" for name in evaluation.SHOTS}
  measured = {"balanced_percent": "balanced_accuracy"} | measured
  rows = []
  for result in results:
    last = result.metrics["last"]
    row = runner.row(
      settings,
      cell,
      result,
      **experiment.facts,
      **{k: 100 * last[v] if v in last else None for k, v in measured.items()},
      published_percent=published,
      published_spread=None,
      many_above=limits[0],
      few_below=limits[1],
      num_train=sum(counts),
      class_counts=" ".join(map(str, counts)),
      num_meta=len(split.meta.label) // split.num_classes,
      num_epochs=experiment.preset.num_epochs,
      deferred=experiment.preset.deferred,
    )
    del row["weight_auroc"]  # No label is wrong.
    rows.append(row)
  return rows


def thresholds(rows: runner.Rows) -> str:
  """A line for each tail that says which classes are many-shot and few-shot."""
  tails = {(r["shape"], r["imbalance"], r["many_above"], r["few_below"]) for r in rows}
  return "\n".join(
    f"{shape} {imbalance:g}: many-shot classes have more than {many} training images,"
    f" few-shot classes fewer than {few}."
    for shape, imbalance, many, few in sorted(tails)
  )


def draw(rows: runner.Rows, path: pathlib.Path) -> None:
  """Draws a panel per tail, with a row per method.

  Colored dots are the mean accuracies on many-, medium- and few-shot classes, joined by
  a line. A vertical mark is the mean accuracy on all classes, small black dots are the
  runs, and a diamond is a published value.
  """

  def add_legend_entries(ax):
    for column, shots in _SHOTS.items():
      if any(r[column] is not None for r in rows):
        ax.plot([], [], "o", color=_COLORS[column], label=f"{shots} classes")
    ax.plot([], [], "k|", markersize=10, markeredgewidth=2, label="all (dots: seeds)")
    if any(r["published_percent"] is not None for r in rows):
      ax.plot([], [], "D", color="C4", label="published, all")

  figures.panels(
    rows,
    ("dataset", "builder", "shape", "imbalance", "num_epochs"),
    path,
    draw_method=_draw_method,
    add_legend_entries=add_legend_entries,
    title=lambda dataset, builder, shape, imbalance, num_epochs: (
      f"{dataset}, {shape} ({builder})\nimbalance {imbalance:g}, {num_epochs} epochs"
    ),
  )


def _draw_method(ax: Any, place: int, rows: runner.Rows) -> None:
  shots = {c: np.mean([r[c] for r in rows]) for c in _SHOTS if rows[0][c] is not None}
  ax.hlines(place, min(shots.values()), max(shots.values()), color="0.75", zorder=1)
  for column, mean in shots.items():
    ax.plot(mean, place, "o", color=_COLORS[column], markersize=5)
  values = [r["accuracy_percent"] for r in rows]
  ax.plot(np.mean(values), place, "k|", markersize=15, markeredgewidth=2)
  ax.plot(values, [place] * len(values), "k.", markersize=3)
  if rows[0]["published_percent"] is not None:
    ax.plot(rows[0]["published_percent"], place, "D", color="C4", markersize=5)
  ax.grid(axis="x", linewidth=0.4)
  ax.set_axisbelow(True)


def note_on_sizes(train: sources.Source) -> str | None:
  """A note on a user's data if its class sizes differ by a factor of 2 or more.

  For all other data, the result is None.
  """
  counts = np.bincount(train.labels, minlength=train.num_classes)
  smallest, largest = np.min(counts), np.max(counts)
  if not own_data.is_own(train.name) or largest < 2 * smallest:
    return None
  return (
    f"The classes of {train.name} have {smallest} to {largest} training"
    " images. The tail is cut from these classes, and its largest class is not larger"
    " than the smallest of them. To train on the classes as they are, use the library"
    " (docs/your_own_data.md)."
  )


def run(
  settings: Settings, experiment: Experiment, workdir: runner.Folder
) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison.

  Raises:
    InputError: a flag is invalid, or the data cannot be read.
  """
  if note := note_on_sizes(experiment.train):
    print(settings_lib.printable(note))
  methods = experiment.methods if settings.methods is None else settings.methods
  names = settings.choose_methods(methods, METHODS)
  experiment = with_flags(settings, experiment)
  if not settings.imbalance:
    raise base.InputError("--imbalance= is empty: give a number of at least 1.")
  cells = []
  for imbalance in dict.fromkeys(settings.imbalance):
    cells += make_cells(settings, experiment, names, imbalance)
  runner.check(settings, cells)
  # The default rates have changed between versions, so they are recorded: a folder can
  # only be continued with the same rates.
  rates = dict(experiment.preset.learning_rates)
  facts = {"learning_rates": rates} if rates else {}
  folder = runner.open_folder(settings, experiment.table.name, workdir, **facts)
  rows = []
  for cell in cells:
    results = runner.train(settings, cell, folder)
    rows += _rows(settings, experiment, cell, results)
  draw(rows, folder / "figure.png")
  return runner.report(
    settings,
    experiment.table,
    folder,
    rows,
    methods=(METHODS, names),
    more=thresholds(rows),
  )
