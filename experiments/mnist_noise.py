r"""MNIST with wrong labels: every method that learns to weigh, side by side.

Paper: the setting of BARE's MNIST table (Patel and Sastry, WACV 2023): an MLP
  784-256-10, symmetric noise 0.5 and 0.7; it lists plain cross-entropy, L2RW and
  Meta-Weight-Net. Noise builders of L2RW, Meta-Weight-Net and BARE, by name.
Command: python -m experiments.mnist_noise --data_dir=DIR
  with a MentorNet: python -m experiments.mentornet_pretrain --workdir=runs/pd, then
  --methods=mentornet_pd --mentor=runs/pd/mentor.json --mentor_percentile=50
  as the table was made: --preset=bare --methods=uniform,bare, and --pixels=raw
Device, time: one CPU core, 2 to 8 minutes a method and noise (MLP, 3 seeds).
Published (accuracy %, sym 0.5 / 0.7): cross-entropy 74.30 / 61.19, L2RW 90.39 /
  85.10, Meta-Weight-Net 74.94 / 65.52, BARE 94.38 / 91.61, under --preset=bare. Ours:
  results/mnist_noise, results/mnist_noise_bare.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from absl import flags
import jax

from experiments import _bounds
from experiments import _catalogue
from experiments import _launch
from experiments import _methods
from experiments import _noise
from experiments import _noise_report
from experiments import _optimizer_config
from experiments import _probes
from experiments import _published
from experiments import _report
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.models import augmentation
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib

COMPARED = [
  "uniform",
  "l2rw",
  "meta_weight_net",
  "warpi",
  "advisor",
  "bare",
  "absgd",
  "symmetric_cross_entropy",
  "generalized_cross_entropy",
  "bootstrapping_hard",
  "forward_correction",
]


@dataclasses.dataclass(frozen=True)
class Preset:
  """One way to train.

  Attributes:
    num_epochs: passes over the training set.
    batch_size: B.
    meta_batch_size: M.
    optimization: of every method but those of `own`.
    num_validation: images with wrong labels held out of training.
    plateau: whether the learning rate falls when their loss stops falling.
    lookahead_learning_rate: of the virtual SGD step; None is the optimization's own. A
      rate of Adam is none of SGD's: at 1e-3 the lessons of Meta-Weight-Net's
      network are a hundredth of its papers', and its weight decay drowns them.
    own: by method.
  """

  num_epochs: int
  batch_size: int
  meta_batch_size: int
  optimizer_config: _optimizer_config.OptimizerConfig
  lookahead_learning_rate: float | None = None
  num_validation: int = 0
  plateau: bool = False
  own: dict[str, _optimizer_config.OptimizerConfig] = dataclasses.field(
    default_factory=dict
  )


# "shared" is ours: one schedule for all. "bare" is the table's: 48,000 images to train
# on, whose pixels its released code never scales (--pixels=raw). That code watches
# 1,000 validation images, of which we have 11,000 to watch, and its program for BARE
# (not those for the baselines) has a small LeNet where the paper has this MLP. "own"
# gives each method the optimizer of its paper's image experiments, for as many epochs.
_DROPS = ((2 / 3, 0.1), (5 / 6, 0.1))
PRESETS = {
  "shared": Preset(30, 100, 100, _optimizer_config.OptimizerConfig("adam", 1e-3), 0.1),
  "bare": Preset(
    200,
    128,
    128,
    _optimizer_config.OptimizerConfig("adam", 2e-4),
    num_validation=11_000,
    plateau=True,
  ),
  "own": Preset(
    30,
    100,
    100,
    _optimizer_config.OptimizerConfig("adam", 1e-3),
    own={
      "l2rw": _optimizer_config.OptimizerConfig("sgd", 1e-3, 0.9),
      "meta_weight_net": _optimizer_config.OptimizerConfig(
        "sgd", 0.1, 0.9, False, 5e-4, _DROPS
      ),
      "mentornet_pd": _optimizer_config.OptimizerConfig(
        "sgd", 0.1, 0.9, False, 2e-4, _DROPS
      ),
      "mentornet_dd": _optimizer_config.OptimizerConfig(
        "sgd", 0.1, 0.9, False, 2e-4, _DROPS
      ),
      "warpi": _optimizer_config.OptimizerConfig("sgd", 0.1, 0.9, False, 5e-4, _DROPS),
      "advisor": _optimizer_config.OptimizerConfig(
        "sgd", 0.01, 0.9, False, 1e-4, ((0.5, 0.1), (0.85, 0.1))
      ),
    },
  ),
}

PIXELS = {"unit": None, "raw": augmentation.Preprocess(std=(1 / 255,))}

_DATASET = flags.DEFINE_enum("dataset", "mnist", ["mnist", "digits"], "Which digits.")
_PRESET = flags.DEFINE_enum(
  "preset", "shared", list(PRESETS), "How to train; other flags override."
)
_NETWORK = flags.DEFINE_enum(
  "network", "mlp", ["mlp", "lenet"], "MLP 784-256-10, or L2RW's LeNet."
)
_NOISE = flags.DEFINE_enum(
  "noise",
  "bare_symmetric",
  [name for name in noisy_labels.BUILDERS if name != "human"],
  "Builder of the wrong labels.",
)
_VARIANT = flags.DEFINE_enum(
  "variant", "paper", ["paper", "official_code"], "Of the builder."
)
_FRACTIONS = flags.DEFINE_multi_float(
  "noise_fraction", None, "The builder's parameter; repeat the flag. [0.5 and 0.7]"
)
_METHODS = flags.DEFINE_list(
  "methods", COMPARED, f"Comma-separated, of {', '.join(_methods.NAMES)}."
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Repetitions.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer(
  "seeds_at_once",
  None,
  "Seeds trained side by side. [all; LeNet on CPU: 1]",
  lower_bound=1,
)
_NUM_EPOCHS = flags.DEFINE_integer(
  "num_epochs", None, "Passes over the training set. [the preset's]", lower_bound=1
)
_NUM_META = flags.DEFINE_integer(
  "num_meta", 100, "Clean images a class; digits: at most 20 are sensible."
)
_NUM_VALIDATION = flags.DEFINE_integer(
  "num_validation",
  None,
  "Images with wrong labels held out of training. [the preset's]",
  lower_bound=0,
)
_PLATEAU = flags.DEFINE_bool(
  "plateau",
  None,
  "Whether the learning rate falls to a tenth when their loss stops falling."
  " [the preset's]",
)
_PIXELS = flags.DEFINE_enum(
  "pixels", "unit", list(PIXELS), "Scale of the pixels: 0 to 1, or 0 to 255."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Batch size. [the preset's]", lower_bound=1
)
_META_BATCH_SIZE = flags.DEFINE_integer(
  "meta_batch_size", None, "Clean examples a step. [the preset's]", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
  "learning_rate", None, "At the start. [the preset's]", lower_bound=0.0
)
_MOMENTUM = flags.DEFINE_float(
  "momentum", None, "Of SGD. [the preset's]", lower_bound=0.0
)
_LOOK_AHEAD_RATE = flags.DEFINE_float(
  "lookahead_learning_rate",
  None,
  "Learning rate of the meta-learned methods' virtual step. [the preset's]",
  lower_bound=0.0,
)
_DUMP_LOSSES = flags.DEFINE_bool(
  "dump_losses",
  False,
  "Keep training losses in losses-seed-S.npz, to fit a MentorNet-DD to.",
)
flags.adopt_module_key_flags(_methods)
flags.adopt_module_key_flags(_launch)
flags.adopt_module_key_flags(_probes)
_EXTENDABLE = ("noise_fraction", "methods", "mentor")


@functools.cache
def load(split: str) -> sources.Source:
  """A split of `--dataset`, read once."""
  return sources.load(_DATASET.value, split, **_launch.data_folders())


def make_splits(fraction: float, seeds: Sequence[int]) -> list[examples_lib.Splits]:
  """The data of some seeds."""
  num_validation = _NUM_VALIDATION.value
  if num_validation is None:
    num_validation = PRESETS[_PRESET.value].num_validation
  return [
    noisy_labels.noisy_labels(
      load("train"),
      load("test"),
      builder=_NOISE.value,
      fraction=fraction,
      num_meta_per_class=_NUM_META.value,
      num_validation=num_validation,
      seed=seed,
      variant=_VARIANT.value,
    )
    for seed in seeds
  ]


def make_cell(name: str, fraction: float, split: examples_lib.Splits) -> _noise.Cell:
  """How a method is run: the preset's settings under the flags given."""
  preset = PRESETS[_PRESET.value]
  optimizer_config = preset.own.get(name, preset.optimizer_config)
  batch_size = _BATCH_SIZE.value or preset.batch_size
  meta_batch_size = _META_BATCH_SIZE.value or min(
    preset.meta_batch_size, max(1, len(split.meta.label))
  )
  steps = max(1, len(split.train.label) // batch_size)  # an epoch
  plateau = preset.plateau if _PLATEAU.value is None else _PLATEAU.value
  if plateau and not len(split.validation.label):
    raise base.InputError("--plateau needs a validation set: give --num_validation.")
  given: dict[str, Any] = {
    "learning_rate": _LEARNING_RATE.value,
    "momentum": _MOMENTUM.value,
    "plateau_steps": steps if plateau else None,
  }
  given = {k: v for k, v in given.items() if v is not None}
  if _MOMENTUM.value is not None and optimizer_config.name != "sgd":
    raise base.InputError(
      f"--momentum={_MOMENTUM.value:g} is of SGD; --preset={_PRESET.value} trains"
      f" {name} by {optimizer_config.name}: leave it out."
    )
  config = _launch.run_config(
    num_steps=(_NUM_EPOCHS.value or preset.num_epochs) * steps,
    batch_size=batch_size,
    meta_batch_size=meta_batch_size if len(split.meta.label) else None,
    eval_every=steps,
  )
  network = mlp.MLP(10, (256,)) if _NETWORK.value == "mlp" else lenet.LeNet(10)
  return _noise.make_cell(
    name,
    {"noise": _NOISE.value, "variant": _VARIANT.value, "fraction": fraction},
    config,
    dataclasses.replace(optimizer_config, **given),
    classifier.Classifier(network, 10, PIXELS[_PIXELS.value]),
    fraction,
    len(split.train.label),
    preset.lookahead_learning_rate
    if _LOOK_AHEAD_RATE.value is None
    else _LOOK_AHEAD_RATE.value,
  )


def seed_groups() -> dict[str, tuple[int, ...]]:
  """The seeds that are trained side by side, by name of their folder."""
  alone = _NETWORK.value == "lenet" and jax.default_backend() == "cpu"
  at_once = _AT_ONCE.value or (1 if alone else _NUM_SEEDS.value)
  seeds = range(_NUM_SEEDS.value)
  groups = [tuple(seeds[first : first + at_once]) for first in seeds[::at_once]]
  return {f"seeds-{group[0]}-{group[-1]}": group for group in groups}


def train(cell: _noise.Cell, folder: Any) -> list[dict[str, Any]]:
  """Trains a cell for every seed; a result row for each."""
  rows = []
  for name, seeds in seed_groups().items():
    config = dataclasses.replace(cell.config, seeds=seeds)
    results = _noise.train(
      cell._replace(config=config),
      make_splits(cell.noise["fraction"], seeds),
      folder / name,
      dump_losses=_DUMP_LOSSES.value,
    )
    rows += [row(cell, result) for result in results]
  return rows


def row(cell: _noise.Cell, result: Any) -> dict[str, Any]:
  """One run's line of `results.csv`."""
  published: tuple[float | None, float | None] = (None, None)
  is_theirs = _DATASET.value == "mnist" and _NETWORK.value == "mlp"
  if is_theirs:
    key = (cell.noise["noise"], cell.noise["fraction"])
    published = _published.MNIST_NOISE.get(key, {}).get(cell.name, published)
  facts = {
    "dataset": _DATASET.value,
    "network": _NETWORK.value,
    "preset": _PRESET.value,
    "pixels": _PIXELS.value,
    "published_percent": published[0],
    "published_spread": published[1],
    "num_meta": 10 * _NUM_META.value,
  }
  return _noise.row(cell, result, **facts)


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  names = _methods.check(_METHODS.value)
  fractions = list(dict.fromkeys(_FRACTIONS.value or [0.5, 0.7]))
  cells = []
  for fraction in fractions:  # mistakes show before anything is written
    (split,) = make_splits(fraction, [0])
    _probes.check(split)
    for name in names:
      cell = make_cell(name, fraction, split)
      config_lib.check(cell.config, cell.method, [split])
      cells.append(cell)
  modules = (__name__, _methods.__name__)
  folder = _launch.prepare(
    "mnist_noise", modules[0], _EXTENDABLE, modules[1], **_probes.given()
  )
  rows = [row for cell in cells for row in train(cell, folder)]
  flags_given = _launch.flags_of(*modules) | _probes.given()
  _report.save(folder, rows, flags_given)
  columns = ("noise", "fraction")
  _noise_report.draw(rows, columns, folder / "figure.png")
  written = ["results.json", "results.csv", "figure.png"]
  for cell in cells:
    name = f"curve-{cell.noise['fraction']}.png"
    if cell.name == "meta_weight_net" and _noise.draw_curves(
      cell, folder / next(iter(seed_groups())), folder / name
    ):
      written.append(name)
  print(_bounds.unused(_methods.USED_BY, names), end="")
  print(_catalogue.summary("mnist_noise", rows, flags_given))
  print(f"\nwritten: {folder}/{', '.join(written)}")


if __name__ == "__main__":
  _launch.run(main)
