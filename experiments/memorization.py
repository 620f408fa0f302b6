r"""Selects networks that do not memorize wrong labels, without any clean label.

Paper: Forouzesh, Sedghi, Thiran (ICLR 2023): networks that fit a randomly labeled batch
  in one step memorize wrong labels. Many networks are trained at several learning
  rates. A share of the labels is replaced at random (the true class may be drawn
  again). The optimizer is SGD with momentum 0.9, weight decay 5e-4 and a cosine
  schedule, and susceptibility is measured before every epoch. Networks and data are
  choices of this project: MLPs (or LeNet) on few images, so that wrong labels are
  memorized within minutes.
Command: python -m experiments.memorization --data_dir=DIR
  without a download, in minutes: --dataset=digits
Device, time: one CPU core, 30 minutes, or 5 minutes for digits.
Published: no comparable number; the tables are for CIFAR and Clothing1M. Measured:
  results/memorization.
"""

from collections.abc import Sequence
import dataclasses
import functools
import operator
import pathlib
import re
from typing import Any

import numpy as np

from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax import susceptibility
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.training import memorization
from l2rw_jax.training import sampling

NETWORKS = {
  "mnist": [*("mlp-32", "mlp-128", "mlp-512", "mlp-1024"), *("mlp-128x3", "mlp-512x3")],
  "digits": ["mlp-16", "mlp-64", "mlp-256", "mlp-256x2"],
}
_MOST_WIDE, _MOST_DEEP, _MOST_WEIGHTS = 65_536, 100, 2**30
_PAIRS = (
  ("susceptibility", "wrong_subset_percent"),
  ("susceptibility", "accuracy_percent"),
  ("train_percent", "accuracy_percent"),
)
_REGIONS = (1, 2, 3, 4)
_MOST_CURVES = 4
# Loss drops differ by orders of magnitude, as the learning rates do, and some drops are
# negative. Their axis is therefore linear up to this absolute value and logarithmic
# above it.
_LINEAR = 1e-3
_SHORT = {
  "susceptibility": "susceptibility",
  "wrong_subset_percent": "accuracy on wrong labels",
  "accuracy_percent": "test accuracy",
  "train_percent": "training accuracy",
}


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flags of this script."""

  EXTENDABLE = ("networks", "learning_rate", "weight_decay", "noise_fraction")

  dataset: str = flag("mnist")
  networks: tuple[str, ...] | None = flag(
    None,
    "Networks to train, separated by commas: mlp-WIDTH, mlp-WIDTHxDEPTH or lenet (slow"
    " on a CPU). The default is six MLPs, or four for digits.",
  )
  learning_rate: tuple[float, ...] = flag(
    (0.1, 0.01, 0.001, 0.0001), "Learning rate at the start."
  )
  weight_decay: tuple[float, ...] = flag(
    (5e-4,), "Weight decay (L2), added to the gradient before momentum."
  )
  momentum: float = flag(0.9)
  noise_fraction: tuple[float, ...] = flag(
    (0.0, 0.25, 0.5),
    "Share of the labels that are replaced by a random class, possibly the true one.",
  )
  num_train: int | None = flag(None, unset="5,000, or all for digits")
  num_unlabeled: int = data_flag(
    0,
    "Number of held-out images that are labeled at random; 0 uses the training images,"
    " as in the released code.",
    bounds=settings_lib.IMAGES,
    aliases=["num_unlabelled"],
  )
  num_epochs: int | None = flag(None, unset="60, or 200 for digits")
  batch_size: int = flag(
    128, "Number of examples in a training step and in a measurement."
  )
  num_seeds: int = flag(
    1,
    "Number of seeds of every network, learning rate and weight decay, trained side by"
    " side.",
  )

  @property
  def epochs(self) -> int:
    """Number of passes over the training set."""
    return self.num_epochs or (200 if self.dataset == "digits" else 60)

  @property
  def unlabeled(self) -> str:
    """The part of the data that is labeled at random."""
    return "validation" if self.num_unlabeled else "train"

  def make_probes(self) -> list[Any]:
    """Probes of susceptibility and of memorized labels."""
    return [
      memorization.susceptibility(self.batch_size, self.unlabeled),
      memorization.accuracy,
    ]


TABLE = table.Layout(
  name="memorization",
  title="Which networks memorize wrong labels, measured without clean labels",
  metrics=(
    table.Metric("accuracy_percent", "clean test accuracy %"),
    table.Metric("susceptibility", "susceptibility", decimals=3),
    table.Metric("train_percent", "training accuracy, labels as given %"),
    table.Metric("wrong_subset_percent", "accuracy on wrong labels %"),
  ),
  settings={
    "dataset": "{}",
    "noise_fraction": "{:.0%} of the labels replaced",
    "num_train": "{:,} images",
    "num_epochs": "{} epochs",
  },
  keys=("noise_fraction",),
  method=lambda row: f"region {row['region'] or '-'}",
  method_heading="models of",
  repeat="model",
  identity=operator.itemgetter("network", "learning_rate", "weight_decay", "seed"),
  published="Published: nothing on these data. On Clothing1M, 19 models, the released"
  " README has test accuracies of 61.8, 57.9, 51.3 and 51.4 % in regions 1 to 4.",
)


def make_network(name: str, num_classes: int = 10) -> mlp.MLP | lenet.LeNet:
  """The network for a name in `--networks`.

  Raises:
    InputError: the name has another form, or the network is too large.
  """
  if name == "lenet":
    return lenet.LeNet(num_classes)
  match = re.fullmatch(r"mlp-([1-9]\d*)(?:x([1-9]\d*))?", name, re.ASCII)
  if match and not _is_small(*match.groups()):
    raise base.InputError(
      f"--networks={name[:60]}: give a width of at most {_MOST_WIDE}, a depth of at"
      f" most {_MOST_DEEP} and at most {_MOST_WEIGHTS} weights in all."
    )
  if not match:
    raise base.InputError(
      f"--networks={name}: give lenet, mlp-WIDTH or mlp-WIDTHxDEPTH, such as mlp-512x2."
    )
  return mlp.MLP(num_classes, (int(match[1]),) * int(match[2] or 1))


def _is_small(width: str, depth: str | None) -> bool:
  # Python refuses to convert numbers with thousands of digits.
  if max(len(width), len(depth or "")) > 9:
    return False
  wide, deep = int(width), int(depth or 1)
  num_weights = 784 * wide + (deep - 1) * wide**2
  return wide <= _MOST_WIDE and deep <= _MOST_DEEP and num_weights <= _MOST_WEIGHTS


def make_splits(
  settings: Settings, fraction: float, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The splits of some seeds; a seed has the same images at every noise fraction."""
  return [_make_split(settings, fraction, seed) for seed in seeds]


def _make_split(settings: Settings, fraction: float, seed: int) -> examples_lib.Splits:
  split = noisy_labels.noisy_labels(
    settings.load("train"),
    settings.load("test"),
    builder="mwn_uniform",
    fraction=fraction,
    num_meta_per_class=0,
    num_validation=settings.num_unlabeled,
    seed=seed,
  )
  size, available = settings.num_train, len(split.train.label)
  if size is None:
    size = available if settings.dataset == "digits" else 5000
  if size > available:
    raise base.InputError(
      f"--num_train={size} exceeds the {available} images that are available: lower"
      " --num_train or --num_unlabeled."
    )
  order = sampling.generator(seed, "training subset", 0).permutation(available)
  return examples_lib.keep_train(split, order[:size])


def make_models(settings: Settings) -> list[tuple[str, float, float]]:
  """Every network at every learning rate and weight decay.

  Raises:
    InputError: a name of a network is invalid, or there are fewer than two models.
  """
  networks = settings.networks
  if networks is None:
    networks = tuple(NETWORKS["digits" if settings.dataset == "digits" else "mnist"])
  models = [
    (network, rate, decay)
    for network in networks
    for rate in settings.learning_rate
    for decay in settings.weight_decay
  ]
  for network in networks:
    make_network(network)
  if "lenet" in networks:
    settings.load_images("train", "--networks=lenet")
  models = list(dict.fromkeys(models))
  if len(models) * settings.num_seeds < 2:
    raise base.InputError(
      "a comparison needs at least two models: give more --networks, --learning_rate,"
      " --weight_decay or --num_seeds."
    )
  return models


def make_cells(settings: Settings) -> list[runner.Cell]:
  """A cell for every model at every noise fraction."""
  models, method, data = make_models(settings), baselines.uniform(), {}
  for fraction in dict.fromkeys(settings.noise_fraction):
    splits = functools.partial(make_splits, settings, fraction)
    (split,) = splits((0,))
    steps_per_epoch = max(1, len(split.train.label) // settings.batch_size)
    config = settings.config(
      num_steps=settings.epochs * steps_per_epoch, eval_every=steps_per_epoch
    )
    runner.check_data(config, method, split)
    images = getattr(split, settings.unlabeled).image
    values = f"{settings.num_unlabeled}, --batch_size={settings.batch_size}"
    with settings_lib.naming("num_unlabeled", values):
      memorization.check(split, images, settings.batch_size)
    data[fraction] = splits, config, split.num_classes
  cells = []
  for network, rate, decay in models:
    name = f"{network}-rate-{rate}-decay-{decay}"
    optimizer = optimizers.OptimizerConfig(
      "sgd", rate, settings.momentum, False, decay, decay_all=True, cosine=True
    )
    facts = {"network": network, "learning_rate": rate, "weight_decay": decay}
    for fraction, (splits, config, num_classes) in data.items():
      cells.append(
        runner.Cell(
          name,
          {"noise_fraction": fraction, **facts},
          config,
          classifier.Classifier(make_network(network, num_classes), num_classes),
          method,
          optimizer,
          splits,
          f"noise-{fraction}/{name}",
          title=f"noise-{fraction} {name}",
        )
      )
  return cells


def make_row(
  settings: Settings, cell: runner.Cell, split: examples_lib.Splits, result: Any
) -> dict[str, Any]:
  """The row of a run in `results.csv`, before its region is known."""
  metrics, train = result.metrics, split.train
  last = {name: values[-1] for name, values in metrics["probes"].items()}
  wrong = last.get("train_accuracy_wrong")
  return {
    "dataset": settings.dataset,
    **cell.facts,
    "susceptibility": memorization.zeta(metrics),
    "train_percent": 100 * last["train_accuracy"],
    "clean_subset_percent": 100 * last["train_accuracy_clean"],
    "wrong_subset_percent": None if wrong is None else 100 * wrong,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "wrong_labels_percent": 100 * float((train.label != train.true_label).mean()),
    "num_train": len(train.label),
    "num_epochs": settings.epochs,
    "batch_size": settings.batch_size,
    **report.run_fields(metrics),
  }


def by_noise(rows: runner.Rows) -> dict[float, runner.Rows]:
  """The models that can be compared, by noise fraction in ascending order.

  A model without a susceptibility (because a drop was not finite) cannot be compared.
  """
  return {
    fraction: [row for row in models if row["susceptibility"] is not None]
    for fraction, models in sorted(report.grouped(rows, "noise_fraction").items())
  }


def with_regions(rows: runner.Rows) -> runner.Rows:
  """Adds the `region` of each row among the models of its noise fraction, or None."""
  regions: dict[int, int] = {}
  for models in by_noise(rows).values():
    if len(models) > 1:
      numbers = susceptibility.regions(
        _column(models, "susceptibility"), _column(models, "train_percent")
      )
      regions |= {
        id(row): int(region) for row, region in zip(models, numbers, strict=True)
      }
  return [{"region": regions.get(id(row)), **row} for row in rows]


def accuracy_by_region(rows: runner.Rows) -> str:
  """A Markdown table of clean test accuracy by region, as in the paper."""
  header = ["noise_fraction", "all models", *(f"region {r}" for r in _REGIONS)]
  lines = []
  for fraction, models in by_noise(rows).items():
    groups = [models, *([r for r in models if r["region"] == g] for g in _REGIONS)]
    lines.append([f"{fraction:g}", *map(_spread, groups)])
  title = "Clean test accuracy %, mean ± sample standard deviation (number of models)"
  return f"{title}:\n\n{report.table(header, lines)}"


def _spread(rows: runner.Rows) -> str:
  values = _column(rows, "accuracy_percent")
  if not values:
    return "-"
  if len(values) == 1:  # One model has no spread, which "± 0.00" would claim.
    return f"{values[0]:.2f} (1)"
  return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} ({len(values)})"


def correlations(rows: runner.Rows) -> str:
  """A Markdown table of rank correlations over the models of each noise fraction."""
  header = ["noise_fraction", *(f"{_SHORT[a]}, {_SHORT[b]}" for a, b in _PAIRS)]
  lines = [
    [f"{fraction:g}", *(_correlation(models, *pair) for pair in _PAIRS)]
    for fraction, models in by_noise(rows).items()
  ]
  return f"Rank correlations over models:\n\n{report.table(header, lines)}"


def _correlation(rows: runner.Rows, one: str, other: str) -> str:
  pairs = [(row[one], row[other]) for row in rows if row[other] is not None]
  if len(pairs) < 2:
    return "-"
  number = susceptibility.rank_correlation(*zip(*pairs, strict=True))
  return "-" if number is None else f"{number:+.2f}"


def _column(rows: runner.Rows, name: str) -> list[float]:
  return [row[name] for row in rows]


def draw(rows: runner.Rows, path: pathlib.Path) -> None:
  """Draws training accuracy against susceptibility, with a panel per noise fraction.

  A dot is a model, its color is the accuracy on clean test images, and lines are the
  means that separate the regions.
  """
  models_of = by_noise(rows)
  shape = (1, len(models_of))
  size = (4.2 * len(models_of), 3.8)
  with figures.figure(path, *shape, figsize=size, squeeze=False) as (figure, axes):
    for ax, (fraction, models) in zip(axes[0], models_of.items(), strict=True):
      _draw_noise(figure, ax, models)
      title = f"{rows[0]['dataset']}, {fraction:.0%} of the labels replaced"
      ax.set_title(figures.plain(title))


def _draw_noise(figure: Any, ax: Any, models: runner.Rows) -> None:
  zeta, accuracy = _column(models, "susceptibility"), _column(models, "train_percent")
  colors = _column(models, "accuracy_percent")
  options = {"cmap": "viridis", "edgecolors": "black", "linewidths": 0.4}
  dots = ax.scatter(zeta, accuracy, c=colors, **options)
  ax.set_xscale("symlog", linthresh=_LINEAR)
  ax.margins(0.12)
  figure.colorbar(dots, ax=ax, label="clean test accuracy (%)")
  if len(models) > 1:
    at_zeta, at_accuracy = susceptibility.boundaries(zeta, accuracy)
    ax.axvline(at_zeta, color="black", linewidth=0.8, linestyle=":")
    ax.axhline(at_accuracy, color="black", linewidth=0.8, linestyle=":")
  style = {"color": "C3", "fontsize": 13, "zorder": 0, "transform": ax.transAxes}
  for region, (x, y) in zip(_REGIONS, [(0, 1), (1, 1), (0, 0), (1, 0)], strict=True):
    place = {"ha": "right" if x else "left", "va": "top" if y else "bottom"}
    ax.text(0.03 + 0.94 * x, 0.03 + 0.94 * y, str(region), **place, **style)
  ax.set_xlabel("susceptibility (mean drop, nats)")
  ax.set_ylabel("training accuracy, labels as given (%)")


def draw_curves(
  runs: Sequence[tuple[dict[str, Any], dict[str, Any]]], path: pathlib.Path
) -> bool:
  """Draws susceptibility and memorization by epoch, at the highest noise fraction.

  Args:
    runs: row and probes of each run. Up to four are drawn, from the lowest
      susceptibility to the highest.
    path: path of the PNG file.

  Returns:
    Whether there was anything to draw.
  """
  highest = max(row["noise_fraction"] for row, _ in runs)
  chosen = [run for run in runs if by_noise([run[0]]).get(highest)]
  chosen.sort(key=lambda run: run[0]["susceptibility"])
  if not chosen:
    return False
  places = np.linspace(0, len(chosen) - 1, min(_MOST_CURVES, len(chosen)))
  with figures.figure(path, 1, 2, figsize=(9.5, 3.6), tight=True) as (figure, axes):
    left, right = axes
    for color, place in enumerate(np.rint(places).astype(int)):
      row, probes = chosen[place]
      zeta = susceptibility.running_average(probes["susceptibility_drop"][:-1])
      name = f"{row['network']}, rate {row['learning_rate']:g}"
      left.plot(np.arange(1, len(zeta) + 1), zeta, f"C{color}", label=name)
      wrong = probes.get("train_accuracy_wrong")
      if wrong:
        right.plot(100 * np.array(wrong), f"C{color}", label=name)
    left.set_yscale("symlog", linthresh=_LINEAR)
    left.set_ylabel("susceptibility so far (nats)")
    right.set_ylabel("accuracy on wrong labels (%)")
    for ax in axes:
      ax.set_xlabel("epoch")
    figures.legend_at_right(figure, *left.get_legend_handles_labels())
    title = f"{chosen[0][0]['dataset']}, {highest:.0%} of the labels replaced"
    figure.suptitle(figures.plain(title), fontsize=10)
    figure.tight_layout()
  return True


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison."""
  cells = make_cells(settings)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows, probed = [], []
  for cell in cells:
    results = runner.train(settings, cell, folder)
    for split, result in zip(cell.splits(cell.config.seeds), results, strict=True):
      rows.append(make_row(settings, cell, split, result))
      probed.append(result.metrics["probes"])
  runs = list(zip(with_regions(rows), probed, strict=True))
  runs.sort(key=lambda run: (run[0]["noise_fraction"], run[0]["region"] or 5))
  rows = [row for row, _ in runs]
  draw(rows, folder / "figure.png")
  files = ["figure.png"]
  if draw_curves(runs, folder / "curves.png"):
    files.append("curves.png")
  more = f"{accuracy_by_region(rows)}\n\n{correlations(rows)}"
  return runner.report(settings, TABLE, folder, rows, files, more=more)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
