"""What the two long-tail scripts share: flags, data, cells, rows, the main loop."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from absl import flags

from experiments import _bounds
from experiments import _catalogue
from experiments import _launch
from experiments import _long_tail_methods
from experiments import _long_tail_report
from experiments import _methods
from experiments import _noise
from experiments import _optimizer_config
from experiments import _probes
from experiments import _published_cifar
from experiments import _report
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import long_tail
from l2rw_jax.data import sources
from l2rw_jax.models import classifier
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import results as results_lib

_METHODS = flags.DEFINE_list(
  "methods",
  None,
  f"Comma-separated, of {', '.join(_long_tail_methods.NAMES)}. [those compared]",
)
_SHAPE = flags.DEFINE_enum(
  "shape", "exponential", long_tail.SHAPES, "Of the tail: falling, or half of them low."
)
_IMBALANCE = flags.DEFINE_multi_float(
  "imbalance", [100.0], "Largest over smallest class; repeat the flag for several."
)
_BUILDER = flags.DEFINE_enum(
  "builder",
  None,
  long_tail.BUILDERS,
  "Whose class sizes: ldam (meta set from what is left over) or mwn (meta images"
  " taken out first). [the preset's]",
)
_NUM_META = flags.DEFINE_integer(
  "num_meta", None, "Clean meta images a class. [the preset's]", lower_bound=0
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Repetitions.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer(
  "seeds_at_once",
  None,
  "Seeds trained side by side. [all; convolutions: 1]",
  lower_bound=1,
)
_NUM_EPOCHS = flags.DEFINE_integer(
  "num_epochs",
  None,
  "Passes over the training set; drops keep their place. [the preset's]",
  lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Training images a step. [the preset's]", lower_bound=1
)
_META_BATCH_SIZE = flags.DEFINE_integer(
  "meta_batch_size",
  None,
  "Meta images a step. [100, or as many as there are]",
  lower_bound=1,
)
_LEARNING_RATE = flags.DEFINE_float(
  "learning_rate", None, "Of SGD, at its highest. [the preset's]", lower_bound=0.0
)
_MOMENTUM = flags.DEFINE_float(
  "momentum", None, "Of SGD. [the preset's]", lower_bound=0.0
)
_WEIGHT_DECAY = flags.DEFINE_float(
  "weight_decay", None, "Of all parameters. [the preset's]", lower_bound=0.0
)
_EVAL_EVERY = flags.DEFINE_integer(
  "eval_every", 1, "Epochs between two evaluations.", lower_bound=1
)
flags.adopt_module_key_flags(_long_tail_methods)
flags.adopt_module_key_flags(_launch)
flags.adopt_module_key_flags(_probes)
# These choose which runs to do.
EXTENDABLE = ("methods", "imbalance", "mentor")


class Preset(NamedTuple):
  """How to train.

  Attributes:
    num_epochs: passes over the training set.
    batch_size: B.
    optimization: of every method.
    builder: of the training set.
    num_meta: meta images a class.
    deferred: share of the run after which deferred methods begin.
  """

  num_epochs: int
  batch_size: int
  optimizer_config: _optimizer_config.OptimizerConfig
  builder: str
  num_meta: int
  deferred: float = 0.8


class Experiment(NamedTuple):
  """What the scripts differ in.

  Attributes:
    name: of the script, for the default folder.
    module: of the script; its flags decide the outcome too.
    train: images to cut the tail from.
    test: images of the test set.
    make_model: whether the classifier is of cosines -> the network.
    preset: how to train; the flags of this module override it.
    facts: entries of every row: dataset, network and so on.
    methods: compared by default.
    alone: whether seeds are better trained one after the other.
    comparable: whether published numbers may stand beside these.
  """

  name: str
  module: str
  train: sources.Source
  test: sources.Source
  make_model: Callable[[bool], classifier.Classifier]
  preset: Preset
  facts: dict[str, Any]
  methods: Sequence[str]
  alone: bool
  comparable: bool = False


@functools.cache
def load(
  name: str, split: str, data_dir: str | None, cache_dir: str | None
) -> sources.Source:
  """A split of a data set, read once."""
  return sources.load(name, split, data_dir=data_dir, cache_dir=cache_dir)


def _with_flags(preset: Preset) -> Preset:
  """The preset under the flags that were given."""

  def given(**values):
    return {k: v for k, v in values.items() if v is not None}

  optimizer_config = dataclasses.replace(
    preset.optimizer_config,
    **given(
      learning_rate=_LEARNING_RATE.value,
      momentum=_MOMENTUM.value,
      weight_decay=_WEIGHT_DECAY.value,
    ),
  )
  return preset._replace(
    optimizer_config=optimizer_config,
    **given(
      num_epochs=_NUM_EPOCHS.value,
      batch_size=_BATCH_SIZE.value,
      builder=_BUILDER.value,
      num_meta=_NUM_META.value,
      deferred=_methods.deferred_share(),
    ),
  )


def _make_splits(
  experiment: Experiment, imbalance: float, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The data of some seeds."""
  return [
    long_tail.long_tail_splits(
      experiment.train,
      experiment.test,
      builder=experiment.preset.builder,
      shape=_SHAPE.value,
      imbalance=imbalance,
      num_meta_per_class=experiment.preset.num_meta,
      seed=seed,
    )
    for seed in seeds
  ]


def _make_cell(
  name: str, experiment: Experiment, imbalance: float, split: examples_lib.Splits
) -> _noise.Cell:
  """How a method is run."""
  preset = experiment.preset
  steps = max(1, len(split.train.label) // preset.batch_size)  # an epoch
  num_meta = len(split.meta.label)
  config = _launch.run_config(
    num_steps=preset.num_epochs * steps,
    batch_size=preset.batch_size,
    meta_batch_size=_META_BATCH_SIZE.value or min(100, num_meta) or None,
    eval_every=_EVAL_EVERY.value * steps,
  )
  setting = _methods.Setting(
    preset.optimizer_config.schedule(config.num_steps),
    config.num_steps,
    noise_fraction=0.0,
    num_classes=split.num_classes,
    deferred_epoch=_methods.deferred_epoch(preset.deferred, preset.num_epochs),
    # ABSGD's package, demonstrating itself on CIFAR-10 of imbalance 100.
    absgd=_methods.AbsgdSetting(2.0, 0.9, 1.0),
    mwn_preset="imbalance",
  )
  _methods.check_begins(name, setting, preset.num_epochs, _long_tail_methods.DEFERRED)
  tail = {"builder": preset.builder, "shape": _SHAPE.value, "imbalance": imbalance}
  model = experiment.make_model(_long_tail_methods.needs_cosines(name))
  method = _methods.make(name, setting, _long_tail_methods.METHODS)
  return _noise.Cell(name, tail, config, preset.optimizer_config, model, method)


def _train(
  cell: _noise.Cell, experiment: Experiment, folder: pathlib.Path
) -> list[dict[str, Any]]:
  """Trains a cell for every seed; a result row for each."""
  at_once = _AT_ONCE.value or (1 if experiment.alone else _NUM_SEEDS.value)
  seeds, rows = range(_NUM_SEEDS.value), []
  for first in seeds[::at_once]:
    own = tuple(seeds[first : first + at_once])
    splits = _make_splits(experiment, cell.noise["imbalance"], own)
    counts = examples_lib.class_counts(splits[0].train, splits[0].num_classes).tolist()
    limits = evaluation.shot_thresholds(counts)
    results = _noise.train(
      cell._replace(config=dataclasses.replace(cell.config, seeds=own)),
      splits,
      folder / f"seeds-{own[0]}-{own[-1]}",
      evaluators=(
        evaluation.accuracy,
        evaluation.per_class_accuracy,
        evaluation.shot_accuracy(counts, *limits),
      ),
    )
    rows += [_row(cell, experiment, counts, limits, result) for result in results]
  return rows


def _row(
  cell: _noise.Cell,
  experiment: Experiment,
  counts: Sequence[int],
  limits: tuple[int, int],
  result: results_lib.Result,
) -> dict[str, Any]:
  """One run's line of `results.csv`."""
  published = None
  if experiment.comparable:
    published = _published_cifar.long_tail(
      experiment.facts["dataset"], cell.name, **cell.noise
    )
  row = _noise.row(
    cell,
    result,
    **experiment.facts,
    **_long_tail_report.measured(result.metrics["last"]),
    published_percent=published,
    published_spread=None,
    many_above=limits[0],
    few_below=limits[1],
    num_train=sum(counts),
    class_counts=" ".join(map(str, counts)),
    num_meta=experiment.preset.num_meta,
    num_epochs=experiment.preset.num_epochs,
    deferred=experiment.preset.deferred,
  )
  del row["weight_auroc"]  # no label is wrong
  return row


def main(experiment: Experiment) -> None:
  """Trains what is missing, then prints and writes the comparison."""
  names = experiment.methods if _METHODS.value is None else _METHODS.value
  names = _methods.check(names, _long_tail_methods.NAMES)
  preset = _with_flags(experiment.preset)
  # Published numbers are of the preset as it is; the meta set is the methods' own.
  is_preset = preset._replace(num_meta=experiment.preset.num_meta) == experiment.preset
  experiment = experiment._replace(
    preset=preset, comparable=experiment.comparable and is_preset
  )
  if not _IMBALANCE.value:
    raise base.InputError("--imbalance= is empty: give a number of at least 1.")
  cells = []
  for imbalance in dict.fromkeys(_IMBALANCE.value):
    (split,) = _make_splits(experiment, imbalance, [0])
    _probes.check(split)
    for name in names:  # mistakes show before anything is written
      cell = _make_cell(name, experiment, imbalance, split)
      config_lib.check(cell.config, cell.method, [split])
      cells.append(cell)
  libraries = (_long_tail_methods, _methods)
  modules = (experiment.module, __name__, *(m.__name__ for m in libraries))
  folder = _launch.prepare(
    experiment.name, modules[0], EXTENDABLE, *modules[1:], **_probes.given()
  )
  rows = [row for cell in cells for row in _train(cell, experiment, folder)]
  found = _launch.flags_of(*modules) | _probes.given()
  _report.save(folder, rows, found)
  _long_tail_report.draw(rows, folder / "figure.png")
  print(_bounds.unused(_long_tail_methods.USED_BY, names), end="")
  print(_catalogue.summary(experiment.name, rows, found))
  print(f"\n{_long_tail_report.thresholds(rows)}")
  print(f"\nwritten: {folder}/results.json, results.csv, figure.png")
