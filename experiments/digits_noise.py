r"""L2RW against its baselines on handwritten digits with wrong labels.

The demonstration that needs no download: scikit-learn's bundled 8x8 digits,
1,247 to train on with 40% of the labels flipped to another class, 5 more clean
images a class, 500 clean test images.
Command: python -m experiments.digits_noise
Device, time: 2 CPU cores, under 3 minutes.
Published: nothing; the task is ours, the noise is that of Ren et al. (2018).
Ours: results/digits_noise.
"""

import pathlib
from typing import Any

from absl import flags
import numpy as np
import optax

from experiments import _catalogue
from experiments import _launch
from experiments import _probes
from experiments import _report
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop
from l2rw_jax.training import results as results_lib

METHODS = [
  "uniform",
  "random",
  "proportion",
  "resampling",
  "clean_only",
  "fine_tuning",
  "l2rw",
]
Runs = dict[str, list[results_lib.Result]]

_METHODS = flags.DEFINE_list("methods", METHODS, f"Of {', '.join(METHODS)}.")
_BUILDER = flags.DEFINE_enum(
  "noise", "uniform_flip", ["uniform_flip", "background_flip"], "How labels go wrong."
)
_FRACTION = flags.DEFINE_float(
  "noise_fraction", 0.4, "Share of training labels that is flipped.", 0.0, 1.0
)
_NUM_META = flags.DEFINE_integer("num_meta", 5, "Clean images a class.")
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Repetitions.", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 3000, "Updates.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Batch size.", lower_bound=1)
_META_BATCH_SIZE = flags.DEFINE_integer(
  "meta_batch_size", None, "Clean examples a step. [all]"
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.1, "Of SGD.", lower_bound=0.0)
_MOMENTUM = flags.DEFINE_float("momentum", 0.0, "Of SGD.", lower_bound=0.0)
flags.adopt_module_key_flags(_launch)
flags.adopt_module_key_flags(_probes)
_EXTENDABLE = ("methods",)


def make_method(name: str, num_steps: int) -> base.Method:
  """The `Method` behind a name of `--methods`."""
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


def make_splits() -> list[examples_lib.Splits]:
  """The data of every seed."""
  train, test = (sources.load("digits", part) for part in ("train", "test"))
  return [
    noisy_labels.noisy_labels(
      train,
      test,
      builder=_BUILDER.value,
      fraction=_FRACTION.value,
      num_meta_per_class=_NUM_META.value,
      seed=seed,
    )
    for seed in range(_NUM_SEEDS.value)
  ]


def make_config() -> config_lib.Config:
  """How every method is run, its seeds side by side."""
  return _launch.run_config(
    num_steps=_NUM_STEPS.value,
    batch_size=_BATCH_SIZE.value,
    meta_batch_size=_META_BATCH_SIZE.value,
    seeds=tuple(range(_NUM_SEEDS.value)),
  )


def train_all(
  methods: dict[str, base.Method],
  splits: list[examples_lib.Splits],
  folder: pathlib.Path,
) -> Runs:
  """Trains every method."""
  model = classifier.Classifier(mlp.MLP(splits[0].num_classes), splits[0].num_classes)
  optimizer = optax.sgd(_LEARNING_RATE.value, momentum=_MOMENTUM.value)
  return {
    name: loop.train(
      make_config(),
      model,
      method,
      optimizer,
      splits,
      folder / name,
      name=name,
      probes=_probes.chosen(),
    )
    for name, method in methods.items()
  }


def result_rows(runs: Runs) -> list[dict[str, Any]]:
  """One line of `results.csv` for every run."""
  return [
    {
      "method": name,
      "accuracy_percent": 100 * result.metrics["last"]["accuracy"],
      "weight_auroc": _report.auroc(result.weights),
      **_probes.columns(result.metrics),
      **_report.run_fields(result.metrics),
    }
    for name, results in runs.items()
    for result in results
  ]


def draw(runs: Runs, rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Accuracy of every method; L2RW's weights, clean against flipped labels."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
  for i, method in enumerate(runs):
    ours = _report.interval(
      [r["accuracy_percent"] for r in rows if r["method"] == method]
    )
    error = np.nan_to_num(ours.half_width)
    left.barh(
      i, ours.mean, xerr=error, capsize=3, color="C1" if method == "l2rw" else "C0"
    )
    left.text(2, i, f"{ours.mean:.1f}", va="center", color="white")
  left.set_yticks(range(len(runs)), list(runs))
  left.invert_yaxis()
  left.set_xlim(0, 100)
  left.set_xlabel("test accuracy (%)")
  left.set_title(f"digits, {_FRACTION.value:.0%} wrong labels")
  if "l2rw" in runs:
    draw_weights(right, [result.weights for result in runs["l2rw"]])
  else:
    right.set_axis_off()
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def draw_weights(axes: Any, weights: list[dict[str, np.ndarray]]) -> None:
  """Histogram of mean weights, all seeds together."""
  mean = np.concatenate([w["mean_weight"] for w in weights])
  is_clean = np.concatenate([w["label"] == w["true_label"] for w in weights])
  known = np.isfinite(mean)
  bins = np.linspace(0, np.quantile(mean[known], 0.995), 41)
  for chosen, label, color in (
    (is_clean, "clean label", "C0"),
    (~is_clean, "flipped label", "C3"),
  ):
    axes.hist(
      np.minimum(mean[chosen & known], bins[-1]),
      bins,
      alpha=0.6,
      label=label,
      color=color,
    )
  axes.axvline(1, color="black", linewidth=0.8, linestyle=":", label="uniform weight")
  scores = [s for s in (_report.auroc(w) for w in weights) if s is not None]
  title = "L2RW's weights" + (f", AUROC {np.mean(scores):.3f}" if scores else "")
  axes.set_title(title)
  axes.set_xlabel("mean weight over training (uniform = 1)")
  axes.set_ylabel("training examples")
  axes.legend()


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  methods = {name: make_method(name, _NUM_STEPS.value) for name in _METHODS.value}
  if not methods:
    raise base.InputError(f"--methods= is empty: choose among {', '.join(METHODS)}.")
  splits = make_splits()
  for method in methods.values():  # mistakes show before anything is written
    config_lib.check(make_config(), method, splits)
  _probes.check(splits[0])
  folder = _launch.prepare("digits_noise", __name__, _EXTENDABLE, **_probes.given())
  runs = train_all(methods, splits, folder)
  rows = result_rows(runs)
  flags_given = _launch.flags_of(__name__) | _probes.given()
  _report.save(folder, rows, flags_given)
  draw(runs, rows, folder / "figure.png")
  print(_catalogue.summary("digits_noise", rows, flags_given))
  print(f"\nwritten: {folder}/results.json, results.csv, figure.png")


if __name__ == "__main__":
  _launch.run(main)
