"""Trains cells (one method on one kind of data) and reports the rows of the runs."""

from collections.abc import Callable, Collection, Iterator, Sequence
import dataclasses
import hashlib
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import optax

from experiments.lib import distributed
from experiments.lib import early_stopping
from experiments.lib import held_out
from experiments.lib import optimizers
from experiments.lib import probes
from experiments.lib import registries
from experiments.lib import report as report_lib
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from experiments.tables import formats
from experiments.tables import table as table_lib
from l2rw_jax import base
from l2rw_jax import processes
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods.mentornet import loss_dump
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import loop
from l2rw_jax.training import results as results_lib
from l2rw_jax.training import validation

Rows = list[dict[str, Any]]
Folder = str | os.PathLike
MakeSplits = Callable[[Sequence[int]], list[examples_lib.Splits]]
EVALUATORS = (evaluation.accuracy, evaluation.per_class_accuracy)
# Losses at which the curve of Meta-Weight-Net is recorded.
LOSS_GRID = np.concatenate([np.linspace(0, 10, 101), np.linspace(10.5, 20, 20)])


@dataclasses.dataclass(frozen=True)
class Settings(probes.Settings):
  """The flags that most scripts for classifiers have: probes and seeds."""

  num_seeds: int = flag(3)


@dataclasses.dataclass(frozen=True)
class Cell:
  """One method on one kind of data, trained once for every seed.

  Attributes:
    method_name: name of the method in --methods; in `fairness`, a cell that trains on
      a part of the data has another name.
    facts: columns of its rows, which distinguish cells of one method.
    config: configuration of the runs; its seeds are those of all runs.
    model: the network and its loss.
    method: the method.
    optimizer: optimizer of the classifier.
    splits: `seeds -> splits`, a function that makes the splits of each seed.
    folder: folder of its runs, inside the experiment's folder. {first} and {last} are
      replaced by the first and the last of the seeds that are trained side by side.
    side_by_side: number of seeds that are trained side by side; None for all.
    evaluators: evaluators of the test set.
    title: title for messages; if it is empty, the facts and the method.
    probes: probes of every evaluation, in addition to those of the flags and that of
      the method early_stopped.
  """

  method_name: str
  facts: dict[str, Any]
  config: config_lib.Config
  model: config_lib.Model
  method: base.Method
  optimizer: optimizers.OptimizerConfig | optax.GradientTransformation
  splits: MakeSplits
  folder: str
  side_by_side: int | None = None
  evaluators: Sequence[evaluation.Evaluator] = (evaluation.accuracy,)
  title: str = ""
  probes: Sequence[evaluation.Probe] = ()

  @property
  def name(self) -> str:
    """Name of the cell in messages."""
    return self.title or "-".join(_names(self.facts, self.method_name))

  def groups(self) -> Iterator[tuple[tuple[int, ...], pathlib.PurePath]]:
    """Yields each group of seeds that are trained side by side, and its folder."""
    seeds = self.config.seeds
    size = self.side_by_side or len(seeds)
    for start in range(0, len(seeds), size):
      group = seeds[start : start + size]
      yield group, pathlib.PurePath(self.folder.format(first=group[0], last=group[-1]))


def folder_name(facts: dict[str, Any], method_name: str) -> str:
  """The name of the folder of a cell, without slashes and braces.

  A value with a character that is not a letter, a digit or one of `_.+-`, such as the
  path of a user's data, is replaced by its last path component and a checksum.
  """
  return "-".join(map(_in_path, _names(facts, method_name)))


def _names(facts, method_name):
  return [*(str(value) for value in facts.values() if value is not None), method_name]


def _in_path(value):
  if re.fullmatch(r"[\w.+-]+", value):
    return value
  end = re.sub(r"[^\w.+-]", "_", pathlib.PurePath(value).name)[-40:]
  return f"{end}_{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def seeds_at_once(given: int | None, has_convolutions: bool) -> int | None:
  """Number of seeds to train side by side: `given`, or a default; None for all.

  On a CPU, convolutions are faster with one seed at a time.
  """
  return given or (1 if has_convolutions and jax.default_backend() == "cpu" else None)


def method_cell(
  settings: registries.Settings,
  name: str,
  facts: dict[str, Any],
  config: config_lib.Config,
  model: config_lib.Model,
  optimizer: optimizers.OptimizerConfig,
  splits: MakeSplits,
  side_by_side: int | None,
  *,
  num_epochs: float,
  deferred: float = 2 / 3,
  evaluators: Sequence[evaluation.Evaluator] = EVALUATORS,
  **problem: Any,
) -> Cell:
  """The cell of a method of `registries`; other arguments are those of `Cell`.

  Args:
    settings: settings of the methods.
    name: name of the method.
    optimizer: optimizer of the preset. Its learning rate and schedule are those of the
      look-ahead step, unless `problem` has another `lookahead_learning_rate`.
    num_epochs: number of epochs of the run.
    deferred: share of the run after which the deferred part of a method begins, unless
      --deferred is given. The default is two thirds, as in ABSGD's released code for
      CIFAR with wrong labels (80 of 120 epochs).
    **problem: other fields of `registries.Problem`.

  Raises:
    InputError: the settings of the method are invalid, its deferred part would begin
      after the end of the run, or its learning rate schedule cannot be restarted.
  """
  schedule = optimizer.schedule(config.num_steps)
  whole_problem = registries.Problem(
    num_steps=config.num_steps,
    deferred_epoch=settings.deferred_epoch(deferred, num_epochs),
    **{"lookahead_learning_rate": schedule, **problem},
  )
  return Cell(
    name,
    facts,
    config,
    model,
    registries.make_method(name, settings, whole_problem, num_epochs),
    optimizer.for_method(name, config.num_steps),
    splits,
    "seeds-{first}-{last}/" + folder_name(facts, name),
    side_by_side,
    evaluators,
  )


def check(settings: probes.Settings, cells: Sequence[Cell]) -> None:
  """Raises InputError unless every cell can be trained, before anything is written."""
  make_splits = None
  for cell in cells:
    if cell.splits is not make_splits:  # Some cells share this function.
      make_splits = cell.splits
      (split,) = make_splits(cell.config.seeds[:1])
      settings.check_probes(split)
    check_data(cell.config, cell.method, split)


def check_data(
  config: config_lib.Config, method: base.Method, split: examples_lib.Splits
) -> None:
  """Raises InputError unless a method can be trained on the data of the first seed."""
  first = dataclasses.replace(config, seeds=config.seeds[:1])
  config_lib.check(first, method, [split])


def open_folder(
  settings: settings_lib.Flags, name: str, workdir: Folder, **facts: Any
) -> pathlib.Path:
  """Creates or reopens the folder of an experiment.

  Args:
    settings: settings that are compared with those of the folder, except for the
      extendable ones.
    name: name of the experiment.
    workdir: the folder.
    **facts: other values that are compared.

  Raises:
    InputError: the folder contains a run with other settings or input files, or cannot
      be written; the script does not support several processes, or their flags differ.
  """
  if not settings.SEVERAL_PROCESSES and processes.count() > 1:
    raise base.InputError(distributed.refusal("jax.distributed"))
  flags = settings_lib.flags_of(type(settings))
  files = settings.input_files()
  # Some flags change a method's program, but not its results, and others select the
  # runs. `prepare` does not compare them, but they must be the same in all processes.
  # Hosts may have the same file in different places; `prepare` compares the contents.
  processes.check_same(
    "the flags",
    {
      name: getattr(settings, name)
      for name, details in flags.items()
      if name in settings.EXTENDABLE
      or (details.group == "method" and not details.recorded)
      if not _names_files(getattr(settings, name), files.values())
    },
  )
  record = settings.record()
  compared = {k: v for k, v in record.items() if k not in settings.EXTENDABLE}
  compared = {**compared, **facts, "experiment": name}
  return workdir_lib.prepare(workdir, compared, files, settings.EXTENDABLE)


def _names_files(value: Any, paths: Collection[str]) -> bool:
  """Whether the value of a flag is the path of a file, or a list of such paths."""
  values = value if isinstance(value, tuple) else (value,)
  return bool(values) and all(one in paths for one in values)


def train(settings: Any, cell: Cell, folder: pathlib.Path) -> list[results_lib.Result]:
  """Trains a cell for every seed, continues an interrupted run, or reads finished ones.

  If `dump_losses` is set, the losses of at most 10,000 random training examples are
  saved at regular intervals (before each epoch, if there are fewer than 200) in
  `losses-seed-S.npz`, for experiments.mentornet_pretrain.

  Args:
    settings: settings of the script.
    cell: the cell to train.
    folder: folder of the experiment.

  Returns:
    The result of each seed. For early_stopped, `metrics["last"]` has the metrics at the
    step with the lowest loss on the meta set.
  """
  results = []
  for seeds, place in cell.groups():
    config = dataclasses.replace(cell.config, seeds=seeds)
    results += _train_group(settings, cell, config, folder / place)
  return results


def _train_group(
  settings: settings_lib.TrainingFlags,
  cell: Cell,
  config: config_lib.Config,
  folder: pathlib.Path,
) -> list[results_lib.Result]:
  splits, method, optimizer = cell.splits(config.seeds), cell.method, cell.optimizer
  epoch_probes: list[evaluation.EpochProbe] = []
  step_probes = [*settings.make_probes(), *cell.probes]
  stops_early = cell.method_name == "early_stopped"
  if stops_early:
    step_probes.append(early_stopping.probe(cell.evaluators))
  if cell.method_name == "meta_weight_net":
    epoch_probes.append(_record_curves(folder))
  if isinstance(optimizer, optimizers.OptimizerConfig):
    if optimizer.plateau_steps:
      method = _watch(optimizer.plateau_data, method, settings, cell, config, splits)
    optimizer = optimizer.optimizer(config.num_steps)
  writer = loss_dump.Writer(folder / "losses")
  dumps = getattr(settings, "dump_losses", False)
  if dumps:
    steps_per_epoch = len(splits[0].train.label) // config.batch_size
    num_epochs = -(-config.num_steps // steps_per_epoch)
    every = max(1, num_epochs // 100)
    epoch_probes.append(
      loss_dump.record_losses(writer, every=every, num_examples=10_000)
    )
  results = loop.train(
    config,
    cell.model,
    method,
    optimizer,
    splits,
    folder,
    cell.evaluators,
    name=cell.name,
    probes=step_probes,
    epoch_probes=epoch_probes,
  )
  # The first process has recorded the losses.
  has_dumps = dumps and processes.is_first()
  for seed, split in zip(config.seeds, splits, strict=True) if has_dumps else ():
    dump = writer.combine(
      seed,
      split.train.label,
      split.train.true_label,
      batch_size=config.batch_size,
      num_steps=config.num_steps,
    )
    loss_dump.write_dump(folder / f"losses-seed-{seed}.npz", dump)
  if stops_early:
    for result, split in zip(results, splits, strict=True):
      metrics, size = result.metrics, len(split.meta.label)
      metrics["last"] = early_stopping.at_lowest_loss(metrics, size)
  return results


def _watch(
  part: str,
  method: base.Method,
  settings: Any,
  cell: Cell,
  config: config_lib.Config,
  splits: Sequence[examples_lib.Splits],
) -> base.Method:
  """Wraps the method for a learning rate that depends on the loss of a set."""
  examples = {
    s: getattr(split, part) for s, split in zip(config.seeds, splits, strict=True)
  }
  # The released code of BARE also selects examples in validation batches.
  selects = cell.method_name == "bare"
  return validation.watched(
    method,
    examples,
    weights=settings.bare_weights if selects else None,
    batch_size=config.batch_size if selects else 1000,
  )


def _record_curves(folder: pathlib.Path) -> evaluation.EpochProbe:
  """A probe that saves Meta-Weight-Net's weight function before every epoch."""

  def probe(snapshot, epoch):
    state = snapshot.state.method_state
    if isinstance(state, validation.State):
      state = state.inner
    params = jax.device_get(state.params)
    net = meta_weight_net.WeightNet.of(params)
    curve = net.apply(params, LOSS_GRID.astype(np.float32))
    run_folder = folder / "curves" / f"seed-{snapshot.seed}"
    run_folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(run_folder / f"epoch-{epoch:05d}.txt", np.asarray(curve), "%.6g")

  return probe


def row(
  settings: probes.Settings, cell: Cell, result: results_lib.Result, **facts: Any
) -> dict[str, Any]:
  """A run's row in `results.csv`; `facts` are its first columns."""
  metrics, optimizer = result.metrics, {}
  if isinstance(cell.optimizer, optimizers.OptimizerConfig):
    optimizer = dataclasses.asdict(cell.optimizer)
    drops = (f"{share:g}:{factor:g}" for share, factor in optimizer["drops"])
    optimizer["drops"] = " ".join(drops)
    if optimizer["plateau_data"] == "validation":
      del optimizer["plateau_data"]  # Rows of older versions lack this column.
  return {
    **facts,
    "method": cell.method_name,
    **cell.facts,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "best_percent": 100 * metrics["best_accuracy"],
    "weight_auroc": report_lib.auroc(result.weights),
    "batch_size": cell.config.batch_size,
    **optimizer,
    **settings.probe_columns(metrics),
    **held_out.column(settings),
    **report_lib.run_fields(metrics),
  }


def report(
  settings: settings_lib.Flags,
  table: table_lib.Layout,
  folder: pathlib.Path,
  rows: Rows,
  files: Sequence[str] = ("figure.png",),
  *,
  methods: tuple[Sequence[str], Sequence[str]] = ((), ()),
  more: str = "",
  before: Sequence[str] = (),
) -> Rows:
  """Writes results.json and results.csv, and prints the table; in process 0 only.

  Args:
    settings: settings with which the rows were made.
    table: layout of the printed table.
    folder: folder of the experiment.
    rows: one row per run.
    files: other files that were written to the folder.
    methods: the methods that the script offers and those that were run, for notes on
      flags that have no effect.
    more: text to print below the table.
    before: like `files`, but listed before `results.json`.

  Returns:
    The rows.
  """
  if not processes.is_first():
    return rows
  flags = settings.record()
  report_lib.save(folder, rows, flags)
  print(settings.notes(*methods), end="")
  print(
    formats.summary(table_lib.make(table_lib.Section(table.name, table, rows, flags)))
  )
  if more:
    print(f"\n{more}")
  written = [*before, "results.json", "results.csv", *files]
  print(f"\nwritten: {folder}/{', '.join(written)}")
  return rows


def first_images(source: sources.Source, size: int) -> sources.Source:
  """A source of only the first `size` images of a split, for quick trials."""
  return source._replace(
    split=f"{source.split}[:{size}]",
    images=source.images[:size],
    labels=source.labels[:size],
    extra={name: labels[:size] for name, labels in source.extra.items()},
  )
