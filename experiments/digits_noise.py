r"""L2RW against its baselines on handwritten digits with wrong labels.

This demonstration needs no download. It uses the 8x8 digits of scikit-learn: 1,247
training images with 40% of the labels flipped to another class, 5 more clean images of
each class, and 500 clean test images. The learning rate of every method follows a
cosine schedule. Nothing was chosen on the test set: accuracy is measured after the last
step ("best on test" is only for comparison). The run of L2RW also ranks the training
labels by how suspicious they are, and the list of the first seed is written as a page
with pictures, issues.html.
Command: python -m experiments.digits_noise
Device, time: 2 CPU cores, about 3 minutes.
Published: nothing; the problem is this project's, and the noise is that of Ren et al.
(2018). Measured: results/digits_noise.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.lib import figures
from experiments.lib import issue_files
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib import trusted
from experiments.lib.settings import flag, methods_flag
from experiments.tables import table
from l2rw_jax import audit
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import own_data
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import results as results_lib

METHODS = (
  *("uniform", "random", "class_proportion", "resampling"),
  *("clean_only", "fine_tuning", "fine_tuning_restarted", "early_stopped"),
  "l2rw",
)
_COMPARED = (
  *("uniform", "clean_only", "fine_tuning", "fine_tuning_restarted", "early_stopped"),
  "l2rw",
)
_NUM_SHOWN, _NUM_PICTURES = 12, 500


@dataclasses.dataclass(frozen=True)
class Settings(trusted.Settings, runner.Settings):
  """The flags of this script."""

  EXTENDABLE = ("methods",)

  dataset: str = flag("digits", recorded_with="dataset")
  methods: tuple[str, ...] = methods_flag(_COMPARED, METHODS)
  num_seeds: int = flag(5)
  noise: str = flag("uniform_flip", choices=["uniform_flip", "background_flip"])
  noise_fraction: float = flag(
    0.4,
    "Share of the training labels to flip. With --noise=background_flip, labels are"
    " changed to the background class, so images of that class keep their true label.",
  )
  num_meta: int = flag(5)
  num_steps: int = flag(3000)
  batch_size: int = flag(100)
  meta_batch_size: int | None = flag(None, unset="all clean examples")
  learning_rate: float = flag(0.1, "Learning rate of SGD.")
  momentum: float = flag(0.0)
  schedule: str = flag("cosine", choices=optimizers.SCHEDULES)


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
    table.Metric("audit_auroc", "AUROC of the list", decimals=3, is_optional=True),
    table.Metric(
      "audit_precision", "precision at k %", 100, decimals=1, is_optional=True
    ),
  ),
  settings={
    "noise": "{}",
    "noise_fraction": "noise fraction {:.0%}",
    "num_meta": "{} clean images a class",
    "num_steps": "{:,} steps",
    "schedule": "{} learning rate",
  },
  published="Published: nothing, the problem is this project's.",
)


def make_splits(settings: Settings, seeds: Sequence[int]) -> list[examples_lib.Splits]:
  """The splits of the given seeds."""
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
  """A cell for every method, whose seeds are trained side by side.

  Raises:
    InputError: a method is unknown, or the data set cannot be read.
  """
  names = settings_lib.choose("methods", settings.methods, METHODS)
  num_classes = settings.load("train").num_classes
  model = classifier.Classifier(mlp.MLP(num_classes), num_classes)
  config = settings.config(eval_every=max(1, settings.num_steps // 30))
  splits = functools.partial(make_splits, settings)
  cosine = settings.schedule == "cosine"
  optimizer = optimizers.OptimizerConfig(
    "sgd", settings.learning_rate, settings.momentum, cosine=cosine
  )
  return [
    runner.Cell(
      name,
      {},
      config,
      model,
      audit.recording(registries.simple_method(name, settings.num_steps)),
      optimizer.for_method(name, settings.num_steps),
      splits,
      folder=name,
    )
    for name in names
  ]


class Audit(NamedTuple):
  """The ranking of the training labels of one run.

  Attributes:
    data: the training set, in the form that the page shows.
    is_wrong: whether each label is wrong, in the order of the training set, bool [N].
    issues: the ranking.
  """

  data: own_data.OwnData
  is_wrong: np.ndarray
  issues: audit.LabelIssues

  @property
  def hits(self) -> np.ndarray:
    """Whether each label is wrong, the most suspicious first, bool [N]."""
    return self.is_wrong[self.issues.index]


def make_audit(
  settings: Settings, split: examples_lib.Splits, result: results_lib.Result
) -> Audit:
  """Ranks the training labels by the statistics of a run."""
  train = split.train
  chosen = (train.source_index, train.label)
  if own_data.is_own(settings.dataset):
    data = issue_files.take(settings.read_own(settings.dataset, "train"), *chosen)
  else:
    data = issue_files.as_own_data(settings.load("train"), *chosen)
  issues = audit.find_label_issues(result.statistics, train.label)
  return Audit(data, train.label != train.true_label, issues)


def ranking_columns(ranking: Audit) -> dict[str, float | None]:
  """Columns of the results that measure how well the ranking detects wrong labels."""
  number = int(ranking.is_wrong.sum())
  return {
    "audit_auroc": report.ranking_auroc(ranking.issues.score, ranking.hits),
    "audit_precision": float(ranking.hits[:number].mean()) if number else None,
    "audit_estimate": ranking.issues.num_issues / number if number else None,
  }


def draw(
  settings: Settings,
  rows: runner.Rows,
  weights: list[dict[str, np.ndarray]],
  ranking: Audit,
  path: pathlib.Path,
) -> None:
  """Draws the accuracies, the rejections of L2RW and the most suspicious labels."""
  by_method = report.grouped(rows, "method")
  with figures.figure(path, figsize=(10, 5.6), tight=True) as (drawn, axes):
    axes.set_axis_off()
    grid = drawn.add_gridspec(2, 1, height_ratios=(3.2, 1), hspace=0.8)
    above = grid[0].subgridspec(1, 2, wspace=0.22)
    left, right = (drawn.add_subplot(above[i]) for i in range(2))
    list_axes, below = drawn.add_subplot(grid[1]), grid[1].subgridspec(1, _NUM_SHOWN)
    list_axes.set_axis_off()
    for i, (method, runs) in enumerate(by_method.items()):
      values = [row["accuracy_percent"] for row in runs]
      mean, half_width, _ = report.interval(values)
      error, color = np.nan_to_num(half_width), "C1" if method == "l2rw" else "C0"
      left.barh(i, mean, xerr=error, capsize=3, color=color)
      left.text(2, i, f"{mean:.1f}", va="center", color="white")
    left.set_yticks(range(len(by_method)), list(by_method))
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("test accuracy (%)")
    name = pathlib.PurePath(settings.dataset).name
    title = f"{name}, {ranking.is_wrong.mean():.0%} wrong labels"
    left.set_title(figures.plain(title))
    if weights:
      figures.rejections(right, weights)
    else:
      right.set_axis_off()
    if ranking.data.features.ndim == 4:
      list_axes.set_title(_list_title(ranking), pad=30, fontsize=11)
      for place in range(min(_NUM_SHOWN, len(ranking.issues.index))):
        _draw_issue(drawn.add_subplot(below[place]), ranking, place)


def _list_title(ranking: Audit) -> str:
  title = f"The {_NUM_SHOWN} most suspicious of {len(ranking.is_wrong):,} labels"
  share = _share_of_wrong(ranking)
  return f"{title}; {share}" if share else title


def _share_of_wrong(ranking: Audit) -> str:
  """The share of wrong labels among the first k; k is the number of wrong labels."""
  number = int(ranking.is_wrong.sum())
  if not number:
    return ""
  return f"of the first {number}, {ranking.hits[:number].mean():.0%} are wrong"


def _draw_issue(axes: Any, ranking: Audit, place: int) -> None:
  """Draws one picture of the list, with the given and the suggested label."""
  issues, names = ranking.issues, ranking.data.form.class_names
  image = ranking.data.features[issues.index[place]]
  axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray")
  labels = (issues.given[place], issues.suggested[place])
  given, suggested = (figures.plain(names[label]) for label in labels)
  color = "C3" if ranking.hits[place] else "black"
  axes.set_title(f"given {given}\nlooks {suggested}", fontsize=8, color=color)
  axes.set_axis_off()


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison."""
  cells = make_cells(settings)
  runner.check(settings, cells)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows, weights, ranking = [], [], None
  listed = "l2rw" if "l2rw" in settings.methods else settings.methods[0]
  for cell in cells:
    splits = cell.splits(cell.config.seeds)
    results = runner.train(settings, cell, folder)
    for split, result in zip(splits, results, strict=True):
      audit_ranking = make_audit(settings, split, result)
      if cell.method_name == listed and ranking is None:
        ranking = audit_ranking
      rows.append(
        {
          "method": cell.method_name,
          "accuracy_percent": 100 * result.metrics["last"]["accuracy"],
          "weight_auroc": report.auroc(result.weights),
          "rejection_auroc": report.rejection_auroc(result.weights),
          **ranking_columns(audit_ranking),
          **settings.probe_columns(result.metrics),
          **report.run_fields(result.metrics),
        }
      )
      if cell.method_name == "l2rw":
        weights.append(result.weights)
  assert ranking is not None  # There is at least one method with one seed.
  draw(settings, rows, weights, ranking, folder / "figure.png")
  name = pathlib.PurePath(settings.dataset).name
  issue_files.write(
    folder, ranking.data, ranking.issues, name=name, num_pictures=_NUM_PICTURES
  )
  more = f"The labels of the first seed, ranked by the run of {listed}:\n"
  more += settings_lib.printable(issue_files.summary(ranking.data, ranking.issues))
  share = _share_of_wrong(ranking)
  more += f"\nIn this ranking, {share}." if share else ""
  files = ("figure.png", "issues.csv", "issues.html (open it in a browser)")
  return runner.report(settings, TABLE, folder, rows, files, more=more)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
