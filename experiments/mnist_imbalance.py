r"""L2RW's MNIST imbalance figure: 4 against 9, the 9s in a large majority.

Paper: Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
  (ICML 2018), figure 3: test error against the majority's share, 5,000 training
  images, 10 clean ones, 10 splits.
Command: python -m experiments.mnist_imbalance --data_dir=DIR
  whole figure; --majority=0.995 --num_splits=3 for its right end.
Device, time: one CPU core, 8 to 14 minutes a run.
Published (error %, majority 0.995): baseline 18.26, proportion 8.30, hard
  mining 7.74, L2RW 3.62. Ours: results/mnist_imbalance.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np
import optax

from experiments import _bounds
from experiments import _catalogue
from experiments import _launch
from experiments import _probes
from experiments import _published
from experiments import _report
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import four_vs_nine
from l2rw_jax.data import sources
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import loop

FIGURE_METHODS = list(_published.MNIST_IMBALANCE)
MORE_METHODS = ["fine_tuning", "clean_only"]


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Where the paper and its released code differ.

  Attributes:
    num_steps: updates of the baselines.
    l2rw_steps: updates of L2RW.
    hard_mining_batch: batch size of hard mining.
    variant: of `class_proportion` and `hard_mining`, see there.
    clean_in_train: whether baselines also train on the clean images.
    num_test: balanced test images; 0 for as many as there are.
  """

  num_steps: int
  l2rw_steps: int
  hard_mining_batch: int
  variant: str
  clean_in_train: bool
  num_test: int


# Neither the paper nor its figure mentions momentum; both presets take the
# code's 0.9. Neither decays the learning rate: the code's decay is dead.
PROTOCOLS = {
  "paper": Protocol(8000, 8000, 100, "paper", False, 0),
  "official_code": Protocol(8000, 4000, 500, "official_code", True, 500),
}

_DATASET = flags.DEFINE_enum(
  "dataset", "mnist", ["mnist", "digits"], "Where the 4s and 9s come from."
)
_PROTOCOL = flags.DEFINE_enum(
  "protocol", "paper", list(PROTOCOLS), "Whose settings; other flags override."
)
_L2RW_STEPS = flags.DEFINE_integer(
  "l2rw_steps", None, "Updates of L2RW. [the protocol's]", lower_bound=1
)
_HARD_MINING_BATCH = flags.DEFINE_integer(
  "hard_mining_batch",
  None,
  "Batch size of hard mining. [the protocol's]",
  lower_bound=1,
)
_VARIANT = flags.DEFINE_enum(
  "variant",
  None,
  ["paper", "official_code"],
  "Of proportion and hard mining. [the protocol's]",
)
_CLEAN_IN_TRAIN = flags.DEFINE_bool(
  "clean_in_train",
  None,
  "Whether baselines train on the clean images too. [the protocol's]",
)
_NUM_TEST = flags.DEFINE_integer(
  "num_test",
  None,
  "Balanced test images; 0 for as many as there are. [the protocol's]",
  lower_bound=0,
)
_MAJORITY = flags.DEFINE_multi_float(
  "majority", None, "Shares of the 9s; repeat the flag. [the paper's five]"
)
_METHODS = flags.DEFINE_list(
  "methods",
  FIGURE_METHODS,
  f"Comma-separated, of {', '.join(FIGURE_METHODS + MORE_METHODS)}.",
)
_NUM_SPLITS = flags.DEFINE_integer("num_splits", 10, "Random splits.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer(
  "splits_at_once",
  None,
  "Splits trained side by side by one compiled step. [1 on CPU, else all]",
  lower_bound=1,
)
_NUM_STEPS = flags.DEFINE_integer(
  "num_steps", None, "Updates of the baselines. [the protocol's]", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 100, "Batch size, but for hard mining.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Of SGD.", lower_bound=0.0)
_MOMENTUM = flags.DEFINE_float("momentum", 0.9, "Of SGD.", lower_bound=0.0)
_NUM_TRAIN = flags.DEFINE_integer(
  "num_train",
  None,
  "Images before the clean ones are set aside. [5000; digits: 136]",
  lower_bound=1,
)
_NUM_META = flags.DEFINE_integer(
  "num_meta", None, "Clean images, half of each digit. [10; digits: 4]"
)
_EVAL_EVERY = flags.DEFINE_integer(
  "eval_every", 500, "Steps between two evaluations.", lower_bound=1
)
flags.adopt_module_key_flags(_launch)
flags.adopt_module_key_flags(_probes)
_USED_BY = {
  "l2rw_steps": ("l2rw",),
  "hard_mining_batch": ("hard_mining",),
}
_EXTENDABLE = ("majority", "methods", "num_splits", "splits_at_once")


@functools.cache  # What is compiled for a method serves all majorities.
def make_method(name: str, variant: str, num_steps: int) -> base.Method:
  """The `Method` behind a name of `--methods`."""
  methods = {
    "uniform": baselines.uniform,
    "random": baselines.random,
    "proportion": lambda: baselines.class_proportion(variant),
    "resampling": baselines.resampling,
    "hard_mining": lambda: baselines.hard_mining(variant),
    "l2rw": l2rw.l2rw,
    "fine_tuning": lambda: baselines.fine_tuning(max(1, num_steps // 10)),
    "clean_only": baselines.clean_only,
  }
  return methods[name]()


@functools.cache
def make_optimizer(
  learning_rate: float, momentum: float
) -> optax.GradientTransformation:
  """SGD; one object for all cells, as the methods are."""
  return optax.sgd(learning_rate, momentum=momentum)


class Cell(NamedTuple):
  """One method at one majority."""

  name: str
  majority: float
  protocol: Protocol
  config: config_lib.Config
  method: base.Method


def make_protocol() -> Protocol:
  """The protocol with the flags that override it."""
  given: dict[str, Any] = {
    "num_steps": _NUM_STEPS.value,
    "l2rw_steps": _L2RW_STEPS.value,
    "hard_mining_batch": _HARD_MINING_BATCH.value,
    "variant": _VARIANT.value,
    "clean_in_train": _CLEAN_IN_TRAIN.value,
    "num_test": _NUM_TEST.value,
  }
  preset = PROTOCOLS[_PROTOCOL.value]
  given = {k: v for k, v in given.items() if v is not None}
  return dataclasses.replace(preset, **given)


def make_cell(name: str, majority: float) -> Cell:
  """How a method is run: the protocol's settings under the flags given."""
  protocol = make_protocol()
  steps = protocol.l2rw_steps if name == "l2rw" else protocol.num_steps
  batch_size = _BATCH_SIZE.value
  if name == "hard_mining":
    batch_size = protocol.hard_mining_batch
  config = _launch.run_config(
    num_steps=steps, batch_size=batch_size, eval_every=_EVAL_EVERY.value
  )
  method = make_method(name, protocol.variant, steps)
  return Cell(name, majority, protocol, config, method)


@functools.cache
def load(split: str) -> sources.Source:
  """A split of `--dataset`, read once."""
  return sources.load(_DATASET.value, split, **_launch.data_folders())


def make_splits(cell: Cell, seeds: Sequence[int]) -> list[examples_lib.Splits]:
  """The data of some of the random splits."""
  small, num_meta = _DATASET.value == "digits", _NUM_META.value
  return [
    four_vs_nine.four_vs_nine(
      load("train"),
      load("test"),
      majority=cell.majority,
      seed=seed,
      num_train=_NUM_TRAIN.value or (136 if small else 5000),
      num_meta=num_meta if num_meta is not None else (4 if small else 10),
      include_meta=cell.protocol.clean_in_train and not cell.method.needs_meta,
      num_test=(not small and cell.protocol.num_test) or None,
    )
    for seed in seeds
  ]


def train(cell: Cell, folder: pathlib.Path) -> list[dict[str, Any]]:
  """Trains a cell on every split; a result row for each."""
  model = classifier.Classifier(lenet.LeNet(1), num_classes=2)
  optimizer = make_optimizer(_LEARNING_RATE.value, _MOMENTUM.value)
  num_splits = _NUM_SPLITS.value
  at_once = _AT_ONCE.value or (1 if jax.default_backend() == "cpu" else num_splits)
  rows = []
  for first in range(0, num_splits, at_once):
    seeds = tuple(range(first, min(first + at_once, num_splits)))
    results = loop.train(
      dataclasses.replace(cell.config, seeds=seeds),
      model,
      cell.method,
      optimizer,
      make_splits(cell, seeds),
      folder
      / f"majority-{cell.majority}-{cell.name}"
      / f"splits-{seeds[0]}-{seeds[-1]}",
      evaluators=(evaluation.accuracy, evaluation.per_class_accuracy),
      name=f"{cell.name} at {cell.majority:g}",
      probes=_probes.chosen(),
    )
    rows += [row(cell, result.metrics) for result in results]
  return rows


def row(cell: Cell, metrics: dict[str, Any]) -> dict[str, Any]:
  """One run's line of `results.csv`."""
  published: tuple[float | None, float | None] = (None, None)
  if _DATASET.value == "mnist":
    published = _published.MNIST_IMBALANCE.get(cell.name, {}).get(
      cell.majority, published
    )
  return {
    "dataset": _DATASET.value,
    "protocol": _PROTOCOL.value,
    "method": cell.name,
    "majority": cell.majority,
    "error_percent": 100 * (1 - metrics["last"]["accuracy"]),
    "published_error_percent": published[0],
    "published_error_bar": published[1],
    "batch_size": cell.config.batch_size,
    **_probes.columns(metrics),
    **_report.run_fields(metrics),
  }


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """The figure: a bar with its interval and a dot a split; diamonds as published."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  majorities = sorted({r["majority"] for r in rows})
  methods = list(dict.fromkeys(r["method"] for r in rows))
  figure, axes = plt.subplots(figsize=(4 + 1.1 * len(majorities), 3.6))
  width, top = 0.8 / len(methods), 0.0
  for i, method in enumerate(methods):
    axes.bar(0, 0, color=f"C{i}", label=method)
    for j, majority in enumerate(majorities):
      own = [r for r in rows if (r["method"], r["majority"]) == (method, majority)]
      if not own:
        continue
      place = j + (i - (len(methods) - 1) / 2) * width
      errors = [r["error_percent"] for r in own]
      ours = _report.interval(errors)
      bar = np.nan_to_num(ours.half_width)
      axes.bar(place, ours.mean, width * 0.9, yerr=bar, capsize=2, color=f"C{i}")
      axes.plot([place + 0.3 * width] * len(errors), errors, "k.", markersize=3)
      published = own[0]["published_error_percent"]
      if published is not None:
        axes.plot(place - 0.3 * width, published, "kD", markersize=4)
      top = max(top, ours.mean + bar, *errors, published or 0)
  axes.plot([], [], "k.", markersize=3, label="one split")
  if any(r["published_error_percent"] is not None for r in rows):
    axes.plot([], [], "kD", markersize=4, label="published mean")
  axes.set_xticks(range(len(majorities)), [f"{m:g}" for m in majorities])
  axes.set_xlabel("share of the majority class")
  axes.set_ylabel("test error (%), mean and 95% interval")
  axes.set_title(f"{rows[0]['dataset']}, 4 against 9, {rows[0]['protocol']} protocol")
  axes.set_ylim(0, min(1.05 * top, 100))
  axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
  figure.savefig(path, dpi=150, bbox_inches="tight")
  plt.close(figure)


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  known = FIGURE_METHODS + MORE_METHODS
  names = list(dict.fromkeys(_METHODS.value))
  for name in names or [""]:
    if name not in known:
      raise base.InputError(f"--methods={name}: choose among {', '.join(known)}.")
  majorities = _MAJORITY.value
  if majorities is None:
    majorities = [0.9, 0.95, 0.98, 0.99, 0.995]
    if _DATASET.value == "digits":
      majorities = [0.9, 0.95]
  cells = [make_cell(name, m) for m in dict.fromkeys(majorities) for name in names]
  for cell in cells:  # mistakes show before anything is written
    (split,) = make_splits(cell, [0])
    config_lib.check(cell.config, cell.method, [split])
    _probes.check(split)
  folder = _launch.prepare("mnist_imbalance", __name__, _EXTENDABLE, **_probes.given())
  rows = [row for cell in cells for row in train(cell, folder)]
  flags_given = _launch.flags_of(__name__) | _probes.given()
  _report.save(folder, rows, flags_given)
  draw(rows, folder / "figure.png")
  print(_bounds.unused(_USED_BY, names), end="")
  print(_catalogue.summary("mnist_imbalance", rows, flags_given))
  print(f"\nwritten: {folder}/results.json, results.csv, figure.png")


if __name__ == "__main__":
  _launch.run(main)
