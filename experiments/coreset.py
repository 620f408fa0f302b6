r"""Training on a few weighted examples: accuracy against seconds of training.

Paper: AdaCore (Pooladzandi et al., ICML 2022) and CRAIG (Mirzasoleiman et al., ICML
  2020) choose a weighted subset by its gradients and train on it until they choose
  again. Beside them random subsets, drawn anew as often (`random`) or once
  (`random_fixed`), and all data (`full`). Every run takes the same number of steps at
  the same learning rate; selections count among its seconds, compiling does not. Each
  seed is trained alone, so that no run waits for another's selection.
Command: python -m experiments.coreset --data_dir=DIR
  and a long tail: --model=mlp --fraction=0.1 --imbalance=100 --workdir=runs/tail
  without a download: --dataset=digits
Device, time: one CPU core, 40 minutes.
Published: speed-ups over 2.9x (full) and 4.5x (random) on other data; no table of it
  could be read. Ours: results/coreset.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from absl import flags
import optax

from experiments import _bounds
from experiments import _catalogue
from experiments import _coreset_report
from experiments import _launch
from experiments import _probes
from experiments import _report
from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import long_tail
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.io import workdir
from l2rw_jax.methods import adacore
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import loop
from l2rw_jax.training import results as results_lib

METHODS = ["full", "random", "random_fixed", "craig", "adacore"]
_CHOOSING = ("craig", "adacore")
# Flags, and the methods that they are for.
_USED_BY = {
  "refresh_every": ("random", *_CHOOSING),
  "greedy": _CHOOSING,
  "greedy_epsilon": _CHOOSING,
  "budget": _CHOOSING,
  "hessian_scope": ("adacore",),
}
HIDDEN: dict[str, tuple[int, ...]] = {"logistic": (), "mlp": (256,)}

_DATASET = flags.DEFINE_enum("dataset", "mnist", ["mnist", "digits"], "Which digits.")
_MODELS = flags.DEFINE_list(
  "model", list(HIDDEN), "Of logistic (regression) and mlp (784-256-10)."
)
_METHODS = flags.DEFINE_list("methods", METHODS, f"Of {', '.join(METHODS)}.")
_FRACTIONS = flags.DEFINE_multi_float(
  "fraction",
  None,
  "Of the training set to choose, in (0, 1]; repeat the flag. [0.01 0.1 0.3; digits:"
  " 0.1 0.3]",
)
_IMBALANCE = flags.DEFINE_float(
  "imbalance", 1.0, "Largest over smallest class; 1 leaves the data as they are."
)
_REFRESH_EVERY = flags.DEFINE_integer(
  "refresh_every",
  None,
  "Passes over a subset from one selection to the next. [as many as have the steps of"
  " two passes over all]",
  lower_bound=1,
)
_GREEDY = flags.DEFINE_enum(
  "greedy", "stochastic", coresets.GREEDY, "Exact, or from random candidates."
)
_GREEDY_EPSILON = flags.DEFINE_float(
  "greedy_epsilon", 0.1, "Of the stochastic greedy's guarantee, in (0, 1)."
)
_HESSIAN_SCOPE = flags.DEFINE_enum(
  "hessian_scope", "shared", ["shared", "example"], "Whose curvature AdaCore takes."
)
_BUDGET = flags.DEFINE_enum(
  "budget", "proportional", coresets.BUDGETS, "Of the classes in a selection."
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Repetitions.", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer(
  "num_steps", None, "Updates. [3600; digits: 1000]", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Batch size. [100; digits: 20]", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.1, "Of SGD.", lower_bound=0.0)
_MOMENTUM = flags.DEFINE_float("momentum", 0.0, "Of SGD.", lower_bound=0.0)
_EVAL_EVERY = flags.DEFINE_integer(
  "eval_every", None, "Steps between two evaluations. [150; digits: 50]", lower_bound=1
)
flags.adopt_module_key_flags(_launch)
flags.adopt_module_key_flags(_probes)
_EXTENDABLE = ("model", "methods", "fraction")


class Setting(NamedTuple):
  """What one curve is trained with; `fraction` is 1 for all data."""

  model: str
  method: str
  fraction: float

  def folder(self) -> str:
    """Where its runs are kept."""
    return f"{self.model}-{self.method}-{self.fraction}"


@functools.cache
def load(split: str) -> sources.Source:
  """A split of `--dataset`, read once."""
  return sources.load(_DATASET.value, split, **_launch.data_folders())


def make_split(seed: int) -> examples_lib.Splits:
  """The data of a seed: all of them, or a long tail."""
  return _cut(_DATASET.value, _IMBALANCE.value, seed)


# All settings of a seed follow each other.
@functools.lru_cache(maxsize=1)
def _cut(dataset: str, imbalance: float, seed: int) -> examples_lib.Splits:
  del dataset  # that of `load`; without it another's would be found here
  train, test = load("train"), load("test")
  if imbalance == 1:
    return noisy_labels.noisy_labels(
      train, test, builder="uniform_flip", fraction=0.0, num_meta_per_class=0, seed=seed
    )
  return long_tail.long_tail_splits(
    train,
    test,
    builder="ldam",
    shape="exponential",
    imbalance=imbalance,
    num_meta_per_class=0,
    seed=seed,
  )


def _default(given: Any, mnist: Any, digits: Any) -> Any:
  if given is not None:
    return given
  return mnist if _DATASET.value == "mnist" else digits


def make_config(seeds: Sequence[int]) -> config_lib.Config:
  """How every run is trained."""
  return _launch.run_config(
    num_steps=_default(_NUM_STEPS.value, 3600, 1000),
    batch_size=_default(_BATCH_SIZE.value, 100, 20),
    eval_every=_default(_EVAL_EVERY.value, 150, 50),
    seeds=tuple(seeds),
  )


def make_method(setting: Setting) -> base.Method:
  """The `Method` of a setting."""
  fraction = setting.fraction
  every = _REFRESH_EVERY.value or max(1, round(2 / fraction))
  makers: dict[str, Callable[[], base.Method]] = {
    "full": baselines.uniform,
    "random": lambda: adacore.random_subset(fraction, every),
    "random_fixed": lambda: adacore.random_subset(fraction, None),
    "craig": lambda: _adacore(fraction, every, curvature=False),
    "adacore": lambda: _adacore(fraction, every, curvature=True),
  }
  return makers[setting.method]()


def _adacore(fraction: float, every: int, curvature: bool) -> base.Method:
  return adacore.adacore(
    fraction,
    every,
    curvature=curvature,
    hessian_scope=_HESSIAN_SCOPE.value,
    budget=_BUDGET.value,
    greedy=_GREEDY.value,
    greedy_epsilon=_GREEDY_EPSILON.value,
  )


def make_settings(split: examples_lib.Splits) -> list[Setting]:
  """Every curve, once it is seen to be possible."""
  _bounds.check_used(
    "greedy_epsilon", _GREEDY.value == "stochastic", f"with --greedy={_GREEDY.value}"
  )
  for flag, given, known in (
    ("model", _MODELS.value, list(HIDDEN)),
    ("methods", _METHODS.value, METHODS),
  ):
    for name in given or [""]:
      if name not in known:
        raise base.InputError(f"--{flag}={name}: choose among {', '.join(known)}.")
  fractions = _default(_FRACTIONS.value, [0.01, 0.1, 0.3], [0.1, 0.3])
  if not fractions:
    raise base.InputError("--fraction= is empty: give a number above 0 and at most 1.")
  for fraction in fractions:
    _check_fraction(fraction, split)
  return list(
    dict.fromkeys(
      Setting(model, method, 1.0 if method == "full" else fraction)
      for model in _MODELS.value
      for fraction in fractions
      for method in _METHODS.value
    )
  )


def _check_fraction(fraction: float, split: examples_lib.Splits) -> None:
  adacore.check_fraction("--fraction", fraction)
  try:
    size = adacore.subset_size(fraction, len(split.train.label))
    counts = examples_lib.class_counts(split.train, split.num_classes)
    coresets.class_budgets(counts.tolist(), size)
  except base.InputError as error:
    raise base.InputError(
      f"--fraction={fraction}: {error} Raise --fraction."
    ) from error
  batch_size = make_config([0]).batch_size
  if size < batch_size:
    raise base.InputError(
      f"--fraction={fraction} keeps {size} of {len(split.train.label)} images, less"
      f" than --batch_size={batch_size}; raise it or lower the batch size."
    )


# One object for all runs: JAX compiles anew for the methods of an equal one.
@functools.cache
def make_model(name: str, num_classes: int) -> classifier.Classifier:
  """The network behind a name of `--model`."""
  return classifier.Classifier(mlp.MLP(num_classes, HIDDEN[name]), num_classes)


@functools.cache
def make_optimizer(rate: float, momentum: float) -> optax.GradientTransformation:
  """One object for all runs, so that a step is compiled once."""
  return optax.sgd(rate, momentum or None)


def train(
  setting: Setting, method: base.Method, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
  """Trains one seed of a curve; its row, with the curve itself."""
  own = folder / setting.folder() / f"seeds-{seed}"
  config = make_config([seed])
  if not (own / f"seed-{seed}" / results_lib.RESULTS).exists():
    # What is compiled for the first time here, a selection too, is no part of its
    # seconds.
    with workdir.scratch(folder) as scratch:
      short = dataclasses.replace(config, num_steps=1)
      _train(setting, short, method, scratch)
  result = _train(setting, config, _coreset_report.timed(method, own), own)
  facts = {"dataset": _DATASET.value, "imbalance": _IMBALANCE.value}
  facts |= {**setting._asdict(), "num_train": len(make_split(seed).train.label)}
  return _coreset_report.row(facts, own, result) | _probes.columns(result.metrics)


def _train(
  setting: Setting,
  config: config_lib.Config,
  method: base.Method,
  folder: pathlib.Path,
) -> results_lib.Result:
  split = make_split(config.seeds[0])
  (result,) = loop.train(
    config,
    make_model(setting.model, split.num_classes),
    method,
    make_optimizer(_LEARNING_RATE.value, _MOMENTUM.value),
    [split],
    folder,
    (evaluation.accuracy, evaluation.per_class_accuracy),
    name=f"{setting.folder()} {config.seeds[0]}",
    probes=_probes.chosen(),
  )
  return result


def _setting_of(row: dict[str, Any]) -> Setting:
  return Setting(row["model"], row["method"], row["fraction"])


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  split = make_split(0)
  methods = {setting: make_method(setting) for setting in make_settings(split)}
  for method in methods.values():  # mistakes show before anything is written
    config_lib.check(make_config([0]), method, [split])
  _probes.check(split)
  folder = _launch.prepare("coreset", __name__, _EXTENDABLE, **_probes.given())
  # A seed of all settings before the next seed: a machine is not always equally fast.
  rows = [
    train(setting, method, seed, folder)
    for seed in range(_NUM_SEEDS.value)
    for setting, method in methods.items()
  ]
  rows.sort(key=lambda row: list(methods).index(_setting_of(row)))
  rows = _coreset_report.with_equal_seconds(rows)
  flags_given = _launch.flags_of(__name__) | _probes.given()
  curves = [row.pop("curve") for row in rows]
  _report.save(folder, rows, flags_given)
  _coreset_report.save_curves(rows, curves, folder / "curves.csv")
  _coreset_report.draw(rows, curves, folder / "figure.png")
  print(_bounds.unused(_USED_BY, _METHODS.value), end="")
  print(_catalogue.summary("coreset", rows, flags_given))
  print(f"\nwritten: {folder}/results.json, results.csv, curves.csv, figure.png")


if __name__ == "__main__":
  _launch.run(main)
