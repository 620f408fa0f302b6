"""What the label-noise experiments share: cells, rows, tables and figures."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import _methods
from experiments import _optimizer_config as optimisation_lib
from experiments import _probes
from experiments import _report
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods.mentornet import loss_dump
from l2rw_jax.models import classifier
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import loop
from l2rw_jax.training import results as results_lib
from l2rw_jax.training import validation

_GRID = np.concatenate([np.linspace(0, 10, 101), np.linspace(10.5, 20, 20)])


class Cell(NamedTuple):
  """One method under one noise.

  Attributes:
    name: of the method.
    noise: of the labels, for rows and folders: builder, fraction and so on.
    config: how to run.
    optimization: of the classifier.
    model: the network.
    method: the method.
  """

  name: str
  noise: dict[str, Any]
  config: config_lib.Config
  optimizer_config: optimisation_lib.OptimizerConfig
  model: classifier.Classifier
  method: base.Method

  def folder(self) -> str:
    """Where its runs are kept."""
    told = (str(v) for v in self.noise.values() if v is not None)
    return "-".join([*told, self.name])


def make_cell(
  name: str,
  noise: dict[str, Any],
  config: config_lib.Config,
  optimizer_config: optimisation_lib.OptimizerConfig,
  model: classifier.Classifier,
  noise_fraction: float,
  num_examples: int,
  lookahead_learning_rate: float | None = None,
) -> Cell:
  """A cell with its method made; arguments as in `Cell` and `_methods.Setting`.

  Without a `lookahead_learning_rate` the look-ahead uses the classifier's learning rate
  and its schedule. Deferred methods wait for two thirds of the run unless a flag says
  otherwise, as ABSGD's release does on CIFAR with wrong labels (80 of 120 epochs).
  """
  num_epochs = config.num_steps / max(1, num_examples // config.batch_size)
  setting = _methods.Setting(
    optimizer_config.schedule(config.num_steps)
    if lookahead_learning_rate is None
    else lookahead_learning_rate,
    config.num_steps,
    noise_fraction,
    model.num_classes,
    deferred_epoch=_methods.deferred_epoch(2 / 3, num_epochs),
  )
  _methods.check_begins(name, setting, num_epochs)
  method = _methods.make(name, setting)
  return Cell(name, noise, config, optimizer_config, model, method)


def train(
  cell: Cell,
  splits: Sequence[examples_lib.Splits],
  folder: pathlib.Path,
  *,
  dump_losses: bool = False,
  evaluators: Sequence[evaluation.Evaluator] = (evaluation.accuracy,),
) -> list[results_lib.Result]:
  """Trains a cell on every split, as many side by side as `config.seeds`.

  Args:
    cell: what to train.
    splits: of each of the cell's seeds.
    folder: of the experiment.
    dump_losses: keeps the training losses of every hundredth of the run in
      `losses-seed-S.npz`, for experiments.mentornet_pretrain.
    evaluators: of the test set.
  """
  own = folder / cell.folder()
  method = cell.method
  epoch_probes: list[evaluation.EpochProbe] = []
  if cell.name == "meta_weight_net":
    epoch_probes.append(_record_curves(own))
  if cell.optimizer_config.plateau_steps:
    method = _watch_validation(method, cell, splits)
  writer = loss_dump.Writer(own / "losses")
  steps_per_epoch = len(splits[0].train.label) // cell.config.batch_size
  if dump_losses:
    num_epochs = -(-cell.config.num_steps // steps_per_epoch)
    every = max(1, num_epochs // 100)
    epoch_probes.append(
      loss_dump.record_losses(writer, every=every, num_examples=10_000)
    )
  found = loop.train(
    cell.config,
    cell.model,
    method,
    cell.optimizer_config.optimizer(cell.config.num_steps),
    splits,
    own,
    evaluators,
    name=cell.folder(),
    probes=_probes.chosen(),
    epoch_probes=epoch_probes,
  )
  if dump_losses:
    for seed, split in zip(cell.config.seeds, splits, strict=True):
      dump = writer.combine(
        seed,
        split.train.label,
        split.train.true_label,
        batch_size=cell.config.batch_size,
        num_steps=cell.config.num_steps,
      )
      loss_dump.write_dump(own / f"losses-seed-{seed}.npz", dump)
  return found


def _watch_validation(
  method: base.Method, cell: Cell, splits: Sequence[examples_lib.Splits]
) -> base.Method:
  """For an optimizer that slows down on a plateau of the validation loss."""
  held_out = {
    s: split.validation for s, split in zip(cell.config.seeds, splits, strict=True)
  }
  # The released code of BARE selects in validation batches too.
  selects = cell.name == "bare"
  return validation.watched(
    method,
    held_out,
    weights=_methods.bare_weights if selects else None,
    batch_size=cell.config.batch_size if selects else 1000,
  )


def _record_curves(folder: pathlib.Path) -> evaluation.EpochProbe:
  """Saves Meta-Weight-Net's weight function before every epoch, for `draw_curves`."""

  def probe(snapshot, epoch):
    state = snapshot.state.method_state
    if isinstance(state, validation.State):
      state = state.inner
    net = meta_weight_net.WeightNet()
    curve = net.apply(jax.device_get(state.params), _GRID.astype(np.float32))
    run_folder = folder / "curves" / f"seed-{snapshot.seed}"
    run_folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(run_folder / f"epoch-{epoch:05d}.txt", np.asarray(curve), "%.6g")

  return probe


def row(cell: Cell, result: results_lib.Result, **facts: Any) -> dict[str, Any]:
  """One run's line of `results.csv`; `facts` go in front."""
  metrics = result.metrics
  optimizer_config = dataclasses.asdict(cell.optimizer_config)
  drops = " ".join(
    f"{share:g}:{factor:g}" for share, factor in optimizer_config["drops"]
  )
  return {
    **facts,
    "method": cell.name,
    **cell.noise,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "best_percent": 100 * metrics["best_accuracy"],
    "weight_auroc": _report.auroc(result.weights),
    "batch_size": cell.config.batch_size,
    **optimizer_config,
    "drops": drops,
    **_probes.columns(metrics),
    **_report.run_fields(metrics),
  }


def draw_curves(cell: Cell, folder: pathlib.Path, path: pathlib.Path) -> bool:
  """Meta-Weight-Net's weight against loss over the epochs of its first seed.

  Returns:
    Whether there was anything to draw.
  """
  own = folder / cell.folder() / "curves" / f"seed-{cell.config.seeds[0]}"
  files = sorted(own.glob("epoch-*.txt"))
  if not files:
    return False
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, 7)})
  figure, axes = plt.subplots(figsize=(5, 3.4))
  for i in chosen:
    epoch = int(files[i].stem.removeprefix("epoch-"))
    shade = plt.get_cmap("viridis")(0.9 * i / max(1, len(files) - 1))
    axes.plot(_GRID, np.loadtxt(files[i]), color=shade, label=f"before epoch {epoch}")
  axes.set_xlabel("training loss of an example")
  axes.set_ylabel("weight V (before averaging)")
  axes.set_ylim(0, 1)
  told = f"{cell.noise['noise']} {cell.noise['fraction']}"
  axes.set_title(f"Meta-Weight-Net's weights, {told}", fontsize=10)
  axes.legend(fontsize=8, frameon=False)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)
  return True
