r"""Which networks memorize wrong labels, told without one clean label.

Paper: Forouzesh, Sedghi, Thiran (ICLR 2023): networks that fit a randomly labeled
  batch in one step memorize. Many networks and learning rates, each trained on labels
  of which a share was replaced at random (the true class may be drawn again), by SGD
  with momentum 0.9, weight decay 5e-4 and a cosine schedule; a probe before every
  epoch. Networks and data are ours: MLPs (LeNet if asked) on few images, so that wrong
  labels are memorized within minutes.
Command: python -m experiments.memorization --data_dir=DIR
  without a download, in minutes: --dataset=digits
Device, time: one CPU core, 30 minutes; digits 5.
Published: nothing that compares; its tables are of CIFAR and Clothing1M. Ours:
  results/memorization.
"""

from collections.abc import Sequence
import functools
import pathlib
import re
from typing import Any, NamedTuple

from absl import flags
import optax

from experiments import _catalogue
from experiments import _launch
from experiments import _memorization_report
from experiments import _report
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop
from l2rw_jax.training import memorization
from l2rw_jax.training import results as results_lib
from l2rw_jax.training import sampling

NETWORKS = {
  "mnist": [
    *("mlp-32", "mlp-128", "mlp-512", "mlp-1024"),
    *("mlp-128x3", "mlp-512x3"),
  ],
  "digits": ["mlp-16", "mlp-64", "mlp-256", "mlp-256x2"],
}

_DATASET = flags.DEFINE_enum("dataset", "mnist", list(NETWORKS), "Which digits.")
_NETWORKS = flags.DEFINE_list(
  "networks",
  None,
  "Of mlp-WIDTH, mlp-WIDTHxDEPTH and lenet (slow on a CPU). [six MLPs; digits: four]",
)
_LEARNING_RATES = flags.DEFINE_multi_float(
  "learning_rate",
  [0.1, 0.01, 0.001, 0.0001],
  "At the start; repeat the flag.",
  lower_bound=0.0,
)
_WEIGHT_DECAYS = flags.DEFINE_multi_float(
  "weight_decay", [5e-4], "L2, before momentum; repeat the flag.", lower_bound=0.0
)
_MOMENTUM = flags.DEFINE_float("momentum", 0.9, "Of SGD.", lower_bound=0.0)
_FRACTIONS = flags.DEFINE_multi_float(
  "noise_fraction",
  [0.0, 0.25, 0.5],
  "Share of labels replaced by any class, the true one too; repeat the flag.",
)
_NUM_TRAIN = flags.DEFINE_integer(
  "num_train", None, "Training images. [5000; digits: all]", lower_bound=1
)
_NUM_UNLABELLED = flags.DEFINE_integer(
  "num_unlabeled",
  0,
  "Images held out to be labeled at random; 0: those of training, as released.",
  lower_bound=0,
)
_NUM_EPOCHS = flags.DEFINE_integer(
  "num_epochs", None, "Passes over the training set. [60; digits: 200]", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 128, "Of training and of the probe.", lower_bound=1
)
_NUM_SEEDS = flags.DEFINE_integer(
  "num_seeds", 1, "Of every network and learning rate, side by side.", lower_bound=1
)
flags.adopt_module_key_flags(_launch)
_MOST_WIDE, _MOST_DEEP, _MOST_WEIGHTS = 65_536, 100, 2**30
_EXTENDABLE = ("networks", "learning_rate", "weight_decay", "noise_fraction")


class Setting(NamedTuple):
  """One network and how it is optimized."""

  network: str
  learning_rate: float
  weight_decay: float

  def folder(self) -> str:
    """Where its runs are kept."""
    return f"{self.network}-rate-{self.learning_rate}-decay-{self.weight_decay}"


def make_network(name: str) -> mlp.MLP | lenet.LeNet:
  """The network behind a name of `--networks`; ten classes."""
  if name == "lenet":
    return lenet.LeNet(10)
  found = re.fullmatch(r"mlp-([1-9]\d*)(?:x([1-9]\d*))?", name, re.ASCII)
  if found and not _is_small(*found.groups()):
    raise base.InputError(
      f"--networks={name[:60]}: give a width of at most {_MOST_WIDE}, a depth of at"
      f" most {_MOST_DEEP} and at most {_MOST_WEIGHTS} weights in all."
    )
  if not found:
    raise base.InputError(
      f"--networks={name}: give lenet, mlp-WIDTH or mlp-WIDTHxDEPTH, such as mlp-512x2."
    )
  return mlp.MLP(10, (int(found[1]),) * int(found[2] or 1))


def _is_small(width: str, depth: str | None) -> bool:
  # Python refuses to read numbers of thousands of digits.
  if max(len(width), len(depth or "")) > 9:
    return False
  wide, deep = int(width), int(depth or 1)
  num_weights = 784 * wide + (deep - 1) * wide**2
  return wide <= _MOST_WIDE and deep <= _MOST_DEEP and num_weights <= _MOST_WEIGHTS


@functools.cache
def load(split: str) -> sources.Source:
  """A split of `--dataset`, read once."""
  return sources.load(_DATASET.value, split, **_launch.data_folders())


def make_split(fraction: float, seed: int) -> examples_lib.Splits:
  """The data of a seed; its images are the same at every noise."""
  split = noisy_labels.noisy_labels(
    load("train"),
    load("test"),
    builder="mwn_uniform",
    fraction=fraction,
    num_meta_per_class=0,
    num_validation=_NUM_UNLABELLED.value,
    seed=seed,
  )
  size, there = _NUM_TRAIN.value, len(split.train.label)
  if size is None:
    size = 5000 if _DATASET.value == "mnist" else there
  if size > there:
    raise base.InputError(
      f"--num_train={size} of {there} images; lower it or --num_unlabeled."
    )
  order = sampling.generator(seed, "training subset", 0).permutation(there)
  return examples_lib.keep_train(split, order[:size])


def num_epochs() -> int:
  """Passes over the training set."""
  return _NUM_EPOCHS.value or (60 if _DATASET.value == "mnist" else 200)


def make_config(split: examples_lib.Splits) -> config_lib.Config:
  """How every network is trained."""
  steps = max(1, len(split.train.label) // _BATCH_SIZE.value)  # an epoch
  return _launch.run_config(
    num_steps=num_epochs() * steps,
    batch_size=_BATCH_SIZE.value,
    seeds=tuple(range(_NUM_SEEDS.value)),
    eval_every=steps,
  )


@functools.cache
def make_optimizer(
  rate: float, decay: float, momentum: float, num_steps: int
) -> optax.GradientTransformation:
  """The paper's SGD. One object for all noises, so that a step is compiled once."""
  schedule = optax.cosine_decay_schedule(rate, num_steps)
  return optax.chain(
    optax.add_decayed_weights(decay), optax.sgd(schedule, momentum or None)
  )


def train(
  setting: Setting,
  splits: Sequence[examples_lib.Splits],
  method: base.Method,
  folder: pathlib.Path,
) -> list[results_lib.Result]:
  """Trains every seed of a network at one noise."""
  config = make_config(splits[0])
  optimizer = make_optimizer(
    setting.learning_rate, setting.weight_decay, _MOMENTUM.value, config.num_steps
  )
  return loop.train(
    config,
    classifier.Classifier(make_network(setting.network), 10),
    method,
    optimizer,
    splits,
    folder / setting.folder(),
    name=f"{folder.name} {setting.folder()}",
    probes=make_probes(),
  )


def make_probes() -> list[Any]:
  """Susceptibility on the images of the run, and what is known by heart."""
  unlabeled = "validation" if _NUM_UNLABELLED.value else "train"
  return [
    memorization.susceptibility(_BATCH_SIZE.value, unlabeled),
    memorization.accuracy,
  ]


def row(
  setting: Setting, fraction: float, split: examples_lib.Splits, result: Any
) -> dict[str, Any]:
  """One run's line of `results.csv`, before its region is known."""
  metrics, train_set = result.metrics, split.train
  last = {name: values[-1] for name, values in metrics["probes"].items()}
  wrong = last.get("train_accuracy_wrong")
  return {
    "dataset": _DATASET.value,
    "noise_fraction": fraction,
    **setting._asdict(),
    "susceptibility": memorization.zeta(metrics),
    "train_percent": 100 * last["train_accuracy"],
    "clean_subset_percent": 100 * last["train_accuracy_clean"],
    "wrong_subset_percent": None if wrong is None else 100 * wrong,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "wrong_labels_percent": 100
    * float((train_set.label != train_set.true_label).mean()),
    "num_train": len(train_set.label),
    "num_epochs": num_epochs(),
    "batch_size": _BATCH_SIZE.value,
    **_report.run_fields(metrics),
  }


def make_settings() -> list[Setting]:
  """Every network at every learning rate and weight decay."""
  given = _NETWORKS.value
  networks = NETWORKS[_DATASET.value] if given is None else given
  settings = [
    Setting(network, rate, decay)
    for network in networks
    for rate in _LEARNING_RATES.value
    for decay in _WEIGHT_DECAYS.value
  ]
  for setting in settings:
    make_network(setting.network)
  settings = list(dict.fromkeys(settings))
  if len(settings) * _NUM_SEEDS.value < 2:
    raise base.InputError(
      "one model cannot be compared: give more --networks, --learning_rate,"
      " --weight_decay or --num_seeds."
    )
  return settings


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  settings, method = make_settings(), baselines.uniform()
  fractions = list(dict.fromkeys(_FRACTIONS.value))
  splits = {
    fraction: [make_split(fraction, seed) for seed in range(_NUM_SEEDS.value)]
    for fraction in fractions
  }
  for own in splits.values():  # mistakes show before anything is written
    config_lib.check(make_config(own[0]), method, own)
    images = own[0].validation.image if _NUM_UNLABELLED.value else own[0].train.image
    memorization.check(own[0], images, _BATCH_SIZE.value)
  folder = _launch.prepare("memorization", __name__, _EXTENDABLE)
  rows, probed = [], []
  for setting in settings:
    for fraction, own in splits.items():
      found = train(setting, own, method, folder / f"noise-{fraction}")
      rows += [row(setting, fraction, *run) for run in zip(own, found, strict=True)]
      probed += [result.metrics["probes"] for result in found]
  runs = list(zip(_memorization_report.with_regions(rows), probed, strict=True))
  runs.sort(key=lambda run: (run[0]["noise_fraction"], run[0]["region"] or 5))
  report(folder, runs)


def report(folder: pathlib.Path, runs: list[tuple[dict[str, Any], Any]]) -> None:
  """Writes and prints what was found."""
  rows, flags_given = [row for row, _ in runs], _launch.flags_of(__name__)
  _report.save(folder, rows, flags_given)
  _memorization_report.draw(rows, folder / "figure.png")
  written = ["results.json", "results.csv", "figure.png"]
  if _memorization_report.draw_curves(runs, folder / "curves.png"):
    written.append("curves.png")
  print(_catalogue.summary("memorization", rows, flags_given))
  print(f"\n{_memorization_report.selection(rows)}")
  print(f"\n{_memorization_report.correlations(rows)}")
  print(f"\nwritten: {folder}/{', '.join(written)}")


if __name__ == "__main__":
  _launch.run(main)
