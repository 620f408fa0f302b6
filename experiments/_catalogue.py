"""What the table of each experiment shows: one entry a folder of results."""

from collections.abc import Sequence
import dataclasses
import operator

from experiments import _fairness_report
from experiments import _published
from experiments import _published_cifar
from experiments import _table_formats
from experiments import _tables

_ACCURACY = _tables.Metric(
  "accuracy_percent",
  "test accuracy %",
  published="published_percent",
  spread="published_spread",
)
_BEST = _tables.Metric("best_percent", "best on test %")
_AUROC = _tables.Metric("weight_auroc", "AUROC of mean weights", decimals=3)
_REJECTION = _tables.Metric("rejection_auroc", "AUROC of zero weights", decimals=3)

_MNIST_NOISE = _tables.Experiment(
  title="MNIST with wrong labels",
  metrics=(_ACCURACY, _BEST, _AUROC),
  settings={
    "dataset": "{}",
    "network": "{}",
    "preset": "preset {}",
    "pixels": "{} pixels",
    "noise": "{}",
    "variant": "variant {}",
    "fraction": "fraction {:g}",
    "num_meta": "{:,} clean images",
    "num_steps": "{:,} steps",
    "plateau_steps": "plateau",
  },
  keys=("noise", "fraction"),
  published=_published.MNIST_NOISE_SOURCE,
)


def _long_tail(title: str, published: str, *keys: str) -> _tables.Experiment:
  return _tables.Experiment(
    title=title,
    metrics=(
      _ACCURACY,
      _tables.Metric("balanced_percent", "balanced %"),
      _tables.Metric("many_percent", "many-shot %"),
      _tables.Metric("medium_percent", "medium-shot %"),
      _tables.Metric("few_percent", "few-shot %"),
      _BEST,
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


def _step_label(row: _tables.Row) -> str:
  """Method, engine and framework of a timed step."""
  engine = "" if row["engine"] is None else f", {row['engine']}"
  framework = {"jax": "", "torch": " (PyTorch)"}.get(
    row["framework"], f" ({row['framework']})"
  )
  return f"{row['method']}{engine}{framework}"


EXPERIMENTS = {
  "digits_noise": _tables.Experiment(
    title="Handwritten digits with wrong labels",
    metrics=(
      _tables.Metric("accuracy_percent", "test accuracy %"),
      _tables.Metric("best_accuracy", "best on test %", scale=100),
      _AUROC,
      _REJECTION,
    ),
    settings={
      "noise": "{}",
      "noise_fraction": "{:.0%} of the labels wrong",
      "num_meta": "{} clean images a class",
      "num_steps": "{:,} steps",
    },
    published="Published: nothing, the task is ours.",
  ),
  "mnist_imbalance": _tables.Experiment(
    title="4 against 9, the 9s in a large majority",
    metrics=(
      _tables.Metric(
        "error_percent",
        "test error %",
        published="published_error_percent",
        spread="published_error_bar",
      ),
    ),
    settings={
      "dataset": "{}",
      "majority": "majority {:g}",
      "protocol": "protocol {}",
    },
    keys=("majority",),
    repeat="split",
    published=_published.MNIST_IMBALANCE_SOURCE,
  ),
  "mnist_noise": _MNIST_NOISE,
  "mnist_noise_bare": dataclasses.replace(
    _MNIST_NOISE,
    title="MNIST with wrong labels, as BARE's table was made",
    keys=("noise", "fraction", "pixels", "plateau_steps"),
  ),
  "cifar_noise": _tables.Experiment(
    title="CIFAR with wrong labels",
    metrics=(_ACCURACY, _BEST, _AUROC),
    settings={
      "preset": "preset {}",
      "network": "{}",
      "augmentation": "augmentation {}",
      "dataset": "{}",
      "noise": "{}",
      "variant": "variant {}",
      "annotation": "annotation {}",
      "fraction": "fraction {:g}",
      "num_meta": "{:,} clean images",
      "num_steps": "{:,} steps",
    },
    keys=("dataset", "noise", "annotation", "fraction", "num_steps"),
    published=_published_cifar.SOURCE,
  ),
  "mnist_long_tail": _long_tail(
    "MNIST in a long tail",
    "Published: nothing; the papers cut their long tails from CIFAR.",
    "num_epochs",
  ),
  "cifar_long_tail": _long_tail(
    "CIFAR in a long tail", _published_cifar.LONG_TAIL_SOURCE
  ),
  "fairness": _tables.Experiment(
    title="Fairness between groups",
    metrics=tuple(
      _tables.Metric(column, heading)
      for column, (heading, _) in _fairness_report.MEASURES.items()
    ),
    settings={
      "dataset": "{}",
      "groups": "groups by {}",
      "imbalance": "largest class over smallest {:g}",
      "noise_fraction": "{:.0%} of the labels wrong",
      "num_steps": "{:,} steps",
    },
    method=_fairness_report.label,
    published="Published: no number that could be read; the protocol is ours.",
  ),
  "memorization": _tables.Experiment(
    title="Who memorizes wrong labels, told without a clean one",
    metrics=(
      _tables.Metric("accuracy_percent", "clean test accuracy %"),
      _tables.Metric("susceptibility", "susceptibility", decimals=3),
      _tables.Metric("train_percent", "training accuracy, labels as given %"),
      _tables.Metric("wrong_subset_percent", "accuracy on wrong labels %"),
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
  ),
  "few_shot": _tables.Experiment(
    title="Few-shot learning with tasks of another kind",
    metrics=(
      _tables.Metric("accuracy_percent", "meta-test accuracy %"),
      _tables.Metric("interval_percent", "interval over tasks, ± %"),
      _tables.Metric("own_weight", "weight of own tasks"),
      _tables.Metric("foreign_weight", "weight of other tasks"),
      _tables.Metric("right_weight", "weight of right queries"),
      _tables.Metric("wrong_weight", "weight of wrong queries"),
      _tables.Metric("weight_auroc", "AUROC of weights", decimals=3),
    ),
    settings={
      "dataset": "{}",
      "num_ways": "{}-way",
      "num_shots": "{}-shot",
      "evaluate_on": "{} classes",
      "ood": "other tasks from {}",
      "ood_share": "{:.0%} of them",
      "noise_share": "{:.0%} of the images mislabeled",
      "num_clusters": "{} clusters",
      "share": "a weight for each {}",
      "num_steps": "{:,} steps",
    },
    keys=("ood", "ood_share", "noise_share"),
    published=(
      "Published: mini-ImageNet with SVHN or FashionMNIST tasks only (Killamsetty et"
      " al. 2022); nothing on these data."
    ),
  ),
  "coreset": _tables.Experiment(
    title="Training on a weighted few: accuracy against seconds",
    metrics=(
      _tables.Metric("accuracy_percent", "test accuracy %"),
      _tables.Metric("percent_at_quarter", "at a quarter of equal seconds %"),
      _tables.Metric("percent_at_equal", "at equal seconds %"),
      _tables.Metric("seconds", "seconds", decimals=1),
      _tables.Metric("selection_seconds", "of these selecting", decimals=1),
      _tables.Metric("seconds_to_90", "seconds to 90 %", decimals=1),
    ),
    settings={
      "dataset": "{}",
      "imbalance": "largest class over smallest {:g}",
      "model": "{}",
      "fraction": "{:.0%} of the data",
      "num_steps": "{:,} steps",
    },
    keys=("model", "fraction"),
    published="Published: speed-ups over 2.9x (all data) and 4.5x (random subsets) on"
    " other data; the protocol is ours.",
  ),
  "coreset_selection": _tables.Experiment(
    title="Choosing a tenth of MNIST, in epochs of training on it",
    metrics=(
      _tables.Metric("seconds", "seconds, median", decimals=3),
      _tables.Metric("epochs", "epochs"),
      _tables.Metric("cpu_epochs", "epochs, of CPU time"),
      _tables.Metric("extra_mib", "extra memory MiB", decimals=0),
      _tables.Metric("cost", "sum of distances", decimals=1),
    ),
    settings={
      "dataset": "{}",
      "num_examples": "{:,} examples",
      "fraction": "{:.0%} to choose",
      "repeats": "{} turns of each",
      "cpus": "{} CPU cores",
    },
    keys=("num_examples", "cpus"),
    method_heading="what",
    repeat="benchmark",
    published="Published: nothing that compares.",
  ),
  "label_issues": _tables.Experiment(
    title="Ranking wrong labels: one training run next to cross-validation",
    metrics=(
      _tables.Metric("auroc", "AUROC", decimals=4),
      _tables.Metric("precision_at_k", "precision at k %", scale=100, decimals=1),
      _tables.Metric("missed_share", "missed at the noise rate %", 100, decimals=1),
      _tables.Metric("estimate_ratio", "estimated / true number"),
      _tables.Metric("flagged_precision", "precision of flagged %", 100, decimals=1),
      _tables.Metric("flagged_recall", "recall of flagged %", 100, decimals=1),
      _tables.Metric("seconds", "CPU seconds", decimals=1),
    ),
    settings={
      "dataset": "{}",
      "noise": "{}",
      "num_examples": "{:,} examples",
    },
    keys=("dataset", "noise"),
    published="Published: nothing on these data under this protocol.",
  ),
  "step_time": _tables.Experiment(
    title="What a training step costs",
    metrics=(
      _tables.Metric("ratio", "time / plain"),
      _tables.Metric("milliseconds", "ms"),
      _tables.Metric("examples_per_second", "examples / s", decimals=0),
      _tables.Metric("flops_ratio", "FLOPs / plain"),
      _tables.Metric("temporary_bytes_ratio", "memory / plain"),
      _tables.Metric("faster_than_torch", "times eager PyTorch's speed"),
      _tables.Metric("fraction_of_peak", "of matrix peak"),
      _tables.Metric("compile_seconds", "s to compile", decimals=1),
      _tables.Metric("repeats", "turns", decimals=0),
    ),
    settings={
      "network": "{}",
      "dtype": "{}",
      "batch_size": "batch {}",
      "meta_share": "M/B = {:g}",
      "platform": "{}",
      "cpus": "{} CPU cores",
    },
    keys=("network", "meta_share"),
    method=_step_label,
    repeat="benchmark",
    published="Published: L2RW at about 3 times plain training (Ren et al. 2018).",
  ),
  "mentornet_pretrain": _tables.Experiment(
    title="MentorNet fitted to a curriculum",
    metrics=(
      _tables.Metric("accuracy", "accuracy %", scale=100),
      _tables.Metric("mse", "mean squared error", decimals=5),
      _tables.Metric("num_rows", "number", decimals=0),
    ),
    settings={"compat": "network of {}", "rows": "{} rows"},
    keys=("rows",),
    method=lambda row: row["curriculum"],
    method_heading="curriculum",
    repeat="fit",
    published="Published: nothing; how well a mentor imitates what it was fitted to.",
  ),
}


def summary(name: str, rows: Sequence[_tables.Row], flags: _tables.Row) -> str:
  """What a script prints: the Markdown table of its rows.

  Args:
    name: of the experiment.
    rows: of `results.json`.
    flags: of the script, with their values.

  Raises:
    InputError: rows that cannot be told apart.
  """
  section = _tables.Section(name, EXPERIMENTS[name], rows, flags)
  return _table_formats.summary(_tables.make(section))
