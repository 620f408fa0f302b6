r"""L2RW against its baselines on handwritten digits with wrong labels.

The demonstration that needs no download: scikit-learn's bundled 8x8 digits,
1,247 to train on with 40% of the labels flipped to another class, 5 more clean
images a class, 500 clean test images.
Command: python -m experiments.digits_noise
Device, time: 2 CPU cores, under 3 minutes.
Published: nothing; the problem is this project's, the noise is that of Ren et al.
(2018). Measured: results/digits_noise.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import optax

from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import trusted
from experiments.lib.settings import flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

METHODS = (
  *("uniform", "random", "proportion", "resampling", "clean_only", "fine_tuning"),
  "l2rw",
)


@dataclasses.dataclass(frozen=True)
class Settings(trusted.Settings, runner.Settings):
  """The flags of this script."""

  EXTENDABLE = ("methods",)

  dataset: str = flag("digits", recorded=False)
  methods: tuple[str, ...] = flag(
    METHODS, f"Methods to compare, of {', '.join(METHODS)}.", group="method"
  )
  noise: str = flag("uniform_flip", choices=["uniform_flip", "background_flip"])
  noise_fraction: float = flag(0.4, "Share of the training labels that is flipped.")
  num_meta: int = flag(5)
  num_steps: int = flag(3000)
  batch_size: int = flag(100)
  meta_batch_size: int | None = flag(None, unset="all of them")
  learning_rate: float = flag(0.1, "Learning rate of SGD.")
  momentum: float = flag(0.0)

  def record(self) -> dict[str, Any]:
    """As in the base class; the data set if it is not digits."""
    entries = super().record()
    return entries if self.dataset == "digits" else {**entries, "dataset": self.dataset}


TABLE = table.Layout(
  name="digits_noise",
  title="Handwritten digits with wrong labels",
  metrics=(
    table.Metric("accuracy_percent", "test accuracy %"),
    table.Metric("best_accuracy", "best on test %", scale=100),
    table.Metric("weight_auroc", "AUROC of mean weights", decimals=3),
    table.Metric(
      "rejection_auroc", "AUROC of zero weights", decimals=3, is_optional=True
    ),
  ),
  settings={
    "noise": "{}",
    "noise_fraction": "{:.0%} of the labels wrong",
    "num_meta": "{} clean images a class",
    "num_steps": "{:,} steps",
  },
  published="Published: nothing, the problem is this project's.",
)


def make_method(name: str, num_steps: int) -> base.Method:
  """The `Method` of a name of `--methods`."""
  methods = {
    "uniform": baselines.uniform,
    "random": baselines.random,
    "proportion": baselines.class_proportion,
    "resampling": baselines.resampling,
    "clean_only": baselines.clean_only,
    "fine_tuning": lambda: baselines.fine_tuning(max(1, num_steps // 10)),
    "l2rw": l2rw.l2rw,
  }
  if name not in methods:
    raise base.InputError(f"--methods={name}: choose among {', '.join(methods)}.")
  return methods[name]()


def make_splits(settings: Settings, seeds: Sequence[int]) -> list[examples_lib.Splits]:
  """The data of some seeds."""
  return [
    noisy_labels.noisy_labels(
      settings.load("train"),
      settings.load("test"),
      builder=settings.noise,
      fraction=settings.noise_fraction,
      seed=seed,
      **settings.meta_set(),
    )
    for seed in seeds
  ]


def make_cells(settings: Settings) -> list[runner.Cell]:
  """A cell for every method, its seeds side by side."""
  if not settings.methods:
    raise base.InputError(f"--methods= is empty: choose among {', '.join(METHODS)}.")
  num_classes = settings.load("train").num_classes
  model = classifier.Classifier(mlp.MLP(num_classes), num_classes)
  config = settings.config(
    num_steps=settings.num_steps,
    batch_size=settings.batch_size,
    meta_batch_size=settings.meta_batch_size,
    seeds=settings.seeds,
  )
  optimizer = optax.sgd(settings.learning_rate, momentum=settings.momentum)
  splits = functools.partial(make_splits, settings)
  return [
    runner.Cell(
      name,
      {},
      config,
      model,
      make_method(name, settings.num_steps),
      optimizer,
      splits,
      folder=name,
    )
    for name in dict.fromkeys(settings.methods)
  ]


def draw(
  settings: Settings,
  rows: runner.Rows,
  weights: list[dict[str, np.ndarray]],
  path: pathlib.Path,
) -> None:
  """Accuracy of every method; how often L2RW rejects clean and flipped labels."""
  methods = list(dict.fromkeys(row["method"] for row in rows))
  with figures.figure(path, 1, 2, figsize=(10, 3.6)) as (_, (left, right)):
    for i, method in enumerate(methods):
      values = [r["accuracy_percent"] for r in rows if r["method"] == method]
      mean, half_width, _ = report.interval(values)
      error, color = np.nan_to_num(half_width), "C1" if method == "l2rw" else "C0"
      left.barh(i, mean, xerr=error, capsize=3, color=color)
      left.text(2, i, f"{mean:.1f}", va="center", color="white")
    left.set_yticks(range(len(methods)), methods)
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("test accuracy (%)")
    name = pathlib.PurePath(settings.dataset).name
    left.set_title(f"{name}, {settings.noise_fraction:.0%} wrong labels")
    if weights:
      figures.rejections(right, weights)
    else:
      right.set_axis_off()


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains what is missing, then prints and writes the comparison."""
  cells = make_cells(settings)
  runner.check(settings, cells)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows, weights = [], []
  for cell in cells:
    for result in runner.train(settings, cell, folder):
      rows.append(
        {
          "method": cell.method_name,
          "accuracy_percent": 100 * result.metrics["last"]["accuracy"],
          "weight_auroc": report.auroc(result.weights),
          "rejection_auroc": report.rejection_auroc(result.weights),
          **settings.probe_columns(result.metrics),
          **report.run_fields(result.metrics),
        }
      )
      if cell.method_name == "l2rw":
        weights.append(result.weights)
  draw(settings, rows, weights, folder / "figure.png")
  return runner.report(settings, TABLE, folder, rows)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
