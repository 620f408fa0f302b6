r"""Images with wrong labels: methods that learn weights, and their alternatives.

Paper: the setting is that of BARE's MNIST table (Patel and Sastry, WACV 2023): an MLP
  784-256-10 and symmetric noise of 0.5 and 0.7. The table compares BARE with plain
  cross-entropy, L2RW and Meta-Weight-Net. The noise builders are those of L2RW,
  Meta-Weight-Net and BARE.
Command: python -m experiments.mnist_noise --data_dir=DIR
  with a MentorNet: python -m experiments.mentornet_pretrain --workdir=runs/pd, then
  --methods=mentornet_pd --mentor=runs/pd/mentor.json --mentor_percentile=50
  with the settings of the table: --preset=bare --pixels=raw --methods=uniform,bare
Device, time: one CPU core, 2 to 8 minutes per method and noise fraction (MLP, 3 seeds).
Published (accuracy %, sym 0.5 / 0.7): cross-entropy 74.30 / 61.19, L2RW 90.39 /
  85.10, Meta-Weight-Net 74.94 / 65.52, BARE 94.38 / 91.61; shown only next to runs with
  --preset=bare --pixels=raw.
Measured: results/mnist_noise, results/mnist_noise_bare.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

from experiments.lib import figures
from experiments.lib import held_out
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib import trusted
from experiments.lib.settings import data_flag, flag, methods_flag, preset_flag
from experiments.tables import published
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.models import augmentation
from l2rw_jax.models import classifier
from l2rw_jax.models import initialization

METHODS = tuple(registries.NOISE)
COMPARED = (
  *("uniform", "clean_only", "fine_tuning", "early_stopped"),
  *("l2rw", "meta_weight_net", "warpi", "advisor", "bare", "absgd"),
  *("symmetric_cross_entropy", "generalized_cross_entropy", "bootstrapping_hard"),
  "forward_correction",
)


@dataclasses.dataclass(frozen=True)
class Preset:
  """Settings of training: values of flags, and optimizers.

  Attributes that have no flag of their name, or differ from it:
    optimizer: optimizer of every method except those of `by_method`.
    watches_meta: whether --plateau watches the clean images for l2rw and the methods
      that learn a weighting network.
    lookahead_learning_rate: learning rate of the look-ahead SGD step; None means that
      of the optimizer.
    lookahead_by_method: maps methods to their look-ahead learning rates, if they differ
      from `lookahead_learning_rate`.
    by_method: maps methods to their optimizers, if they differ from `optimizer`.
  """

  num_epochs: int
  batch_size: int
  meta_batch_size: int
  optimizer: optimizers.OptimizerConfig
  lookahead_learning_rate: float | None = None
  num_validation: int = 0
  plateau: bool = False
  watches_meta: bool = False
  initialization: str = "flax"
  mwn_preset: str = "noise_stable"
  lookahead_by_method: Mapping[str, float] = dataclasses.field(default_factory=dict)
  by_method: Mapping[str, optimizers.OptimizerConfig] = dataclasses.field(
    default_factory=dict
  )


def _sgd(
  rate: float, decay: float = 0.0, drops: tuple[tuple[float, float], ...] = ()
) -> optimizers.OptimizerConfig:
  return optimizers.OptimizerConfig("sgd", rate, 0.9, False, decay, drops)


# The look-ahead learning rates of the preset "shared". A rate that suits Adam, such as
# 1e-3, is too small for the SGD step of the look-ahead. Each rate is the best of 0.003,
# 0.01, 0.03, 0.1, 0.3, 1, 3 and 10 (not all of them were run, but always the neighbors
# of the best one) for the MLP on MNIST. The criterion is the mean accuracy over 50% and
# 70% wrong labels and two seeds, on images held out of the training set:
# --evaluate_on=validation --schedule=cosine --num_seeds=2 --steps_per_call=10
# --lookahead_learning_rate=RATE. `warpi_deterministic` has the rate of `warpi`.
LOOKAHEAD_LEARNING_RATES = {
  "meta_weight_net": 1.0,
  **dict.fromkeys(("warpi", "warpi_deterministic"), 0.01),
  "advisor": 0.1,
}
# "shared" is one schedule for all methods. "bare" is the setting of BARE's table:
# 48,000 training images, whose pixels the released code never scales (--pixels=raw),
# and PyTorch's initial parameters. The released code has 1,000 validation images
# instead of 11,000, and its program for BARE (not those for the baselines) has a small
# LeNet instead of the MLP of the paper. For L2RW and Meta-Weight-Net, its validation
# images are the 1,000 clean ones, all of which are used in every step.
# "own" gives each method of `by_method` the optimizer of the image experiments in its
# paper, and all other methods that of "shared", for the same number of epochs.
_DROPS = ((2 / 3, 0.1), (5 / 6, 0.1))
_ADAM = optimizers.OptimizerConfig("adam", 1e-3)
PRESETS = {
  "shared": Preset(
    *(30, 100, 100, _ADAM), lookahead_by_method=LOOKAHEAD_LEARNING_RATES
  ),
  "bare": Preset(
    *(200, 128, 1000, optimizers.OptimizerConfig("adam", 2e-4)),
    lookahead_learning_rate=1e-4,
    num_validation=11_000,
    plateau=True,
    watches_meta=True,
    initialization="pytorch",
    mwn_preset="bare",
  ),
  "own": Preset(
    *(30, 100, 100, _ADAM),
    by_method={
      **dict.fromkeys(registries.L2RW, _sgd(1e-3)),
      "meta_weight_net": _sgd(0.1, 5e-4, _DROPS),
      "mentornet_pd": _sgd(0.1, 2e-4, _DROPS),
      "mentornet_dd": _sgd(0.1, 2e-4, _DROPS),
      "warpi": _sgd(0.1, 5e-4, _DROPS),
      "advisor": _sgd(0.01, 1e-4, ((0.5, 0.1), (0.85, 0.1))),
    },
  ),
}
INITIALIZATIONS = {"flax": None, "pytorch": initialization.pytorch}
PIXELS = {"unit": None, "raw": augmentation.Preprocess(std=(1 / 255,))}


@dataclasses.dataclass(frozen=True)
class Settings(
  registries.Settings,
  trusted.Settings,
  held_out.Settings,
  optimizers.Settings,
  runner.Settings,
):
  """The flags of this script."""

  EXTENDABLE = ("noise_fraction", "methods", "num_seeds", "seeds_at_once", "mentor")

  dataset: str = flag("mnist")
  preset: str = flag(
    "shared",
    "Settings to start from; other flags override them one by one. shared: the same"
    " Adam schedule for all methods. bare: the settings of BARE's table. own: for the"
    " methods that learn weights, the optimizer of the image experiments in their"
    " papers.",
    choices=PRESETS,
  )
  network: str = flag(
    "mlp",
    "Network to train: an MLP 784-256-10, or L2RW's LeNet.",
    choices=registries.SMALL_NETWORKS,
  )
  noise: str = flag(
    "bare_symmetric",
    choices=[name for name in noisy_labels.BUILDERS if name != "human"],
  )
  noise_variant: str = flag(
    "paper", choices=["paper", "official_code"], aliases=["variant"]
  )
  noise_fraction: tuple[float, ...] | None = flag(
    None,
    "Share of wrong labels or, for some values of --noise, a parameter that sets it"
    " (l2rw_jax/data/noisy_labels.py). The default is 0.5 and 0.7.",
  )
  methods: tuple[str, ...] = methods_flag(COMPARED, METHODS)
  seeds_at_once: int | None = flag(None, unset="1 for LeNet on CPU, and all otherwise")
  num_epochs: int | None = preset_flag()
  num_meta: int = flag(
    100, "Number of clean images of each class; for digits, use at most 20."
  )
  num_validation: int | None = preset_flag()
  plateau: bool | None = preset_flag(
    "Let the learning rate fall to a tenth when a loss (--plateau_data) stops falling."
  )
  plateau_data: str | None = flag(
    None,
    "Images whose loss --plateau watches: validation is the held-out images with label"
    " noise (--num_validation), and meta the clean images. The default is validation,"
    " except that with --preset=bare it is meta for l2rw and the methods that learn a"
    " weighting network.",
    choices=["validation", "meta"],
    recorded_with="plateau_data",
  )
  pixels: str = data_flag(
    "unit", "Scale of the pixels: 0 to 1, or 0 to 255.", choices=PIXELS
  )
  initialization: str | None = preset_flag(
    "Distribution of the initial parameters: the default of flax or of PyTorch.",
    choices=INITIALIZATIONS,
  )
  batch_size: int | None = preset_flag()
  meta_batch_size: int | None = preset_flag()
  learning_rate: float | None = preset_flag("Learning rate at the start.")
  momentum: float | None = preset_flag()
  lookahead_learning_rate: float | None = flag(
    None,
    unset=f"the preset's (shared: {settings_lib.describe(LOOKAHEAD_LEARNING_RATES)})",
    methods=registries.META_LEARNED,
    aliases=["look_ahead_rate"],
  )
  dump_losses: bool = flag(False)

  @property
  def initial_distribution(self) -> str:
    """The value of --initialization, or that of the preset."""
    return self.initialization or PRESETS[self.preset].initialization

  def record(self) -> dict[str, Any]:
    """Like the base class, but omits the initialization if it is flax's.

    Folders of versions that did not have --initialization therefore still match.
    """
    entries = super().record()
    del entries["initialization"]
    if self.initial_distribution == "flax":
      return entries
    return {**entries, "initialization": self.initial_distribution}


# The setting of BARE's table.
_PROTOCOL = {"dataset": "mnist", "network": "mlp", "preset": "bare", "pixels": "raw"}
_PUBLISHED_INITIALIZATION = "pytorch"
TABLE = table.Layout(
  name="mnist_noise",
  title="MNIST with wrong labels",
  metrics=table.NOISE_METRICS,
  settings={
    "dataset": "{}",
    "network": "{}",
    "preset": "preset {}",
    "pixels": "{} pixels",
    "initialization": "{} initialization",
    "noise": "{}",
    "noise_variant": "variant {}",
    "fraction": "fraction {:g}",
    "num_meta": "{:,} clean images",
    "schedule": "{} learning rate",
    "num_steps": "{:,} steps",
    "plateau_steps": "plateau",
    "plateau_data": "of the loss on the {} set",
  },
  keys=("noise", "fraction"),
  published=published.MNIST_NOISE_SOURCE,
  protocol=_PROTOCOL | {"initialization": _PUBLISHED_INITIALIZATION},
)
BARE_TABLE = dataclasses.replace(
  TABLE,
  name="mnist_noise_bare",
  title="MNIST with wrong labels, in the setting of BARE's table",
  keys=("noise", "fraction", "pixels", "initialization", "plateau_steps"),
)


def make_splits(
  settings: Settings, fraction: float, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The data of some seeds."""
  num_validation = settings.num_validation
  if num_validation is None:
    num_validation = PRESETS[settings.preset].num_validation
  return [
    noisy_labels.noisy_labels(
      settings.load("train"),
      settings.load("test"),
      builder=settings.noise,
      fraction=fraction,
      num_validation=num_validation,
      seed=seed,
      variant=settings.noise_variant,
      **settings.meta_set(),
    )
    for seed in seeds
  ]


def make_optimizer(
  settings: Settings, name: str, split: examples_lib.Splits, steps_per_epoch: int
) -> optimizers.OptimizerConfig:
  """The preset's optimizer, with the flags that override it.

  Raises:
    InputError: a flag has no effect, or --plateau has no images to watch.
  """
  preset = PRESETS[settings.preset]
  optimizer = preset.by_method.get(name, preset.optimizer)
  plateau = settings.plateau
  if plateau is None:  # --schedule replaces the plateau of a preset.
    plateau = preset.plateau and settings.schedule is None
  learns = name in (*registries.L2RW, *registries.META_LEARNED)
  watched = "meta" if preset.watches_meta and learns else "validation"
  watched = settings.plateau_data or watched
  settings.check_used("plateau_data", plateau, "without --plateau")
  if plateau and not len(getattr(split, watched).label):
    flag_name = "num_meta" if watched == "meta" else "num_validation"
    raise base.InputError(f"--plateau needs a {watched} set: give --{flag_name}.")
  if settings.momentum is not None and optimizer.name != "sgd":
    raise base.InputError(
      f"--momentum={settings.momentum:g} is for SGD, but --preset={settings.preset}"
      f" trains {name} with {optimizer.name}: leave --momentum out."
    )
  given = settings_lib.given_values(
    learning_rate=settings.learning_rate,
    momentum=settings.momentum,
    plateau_steps=steps_per_epoch if plateau else None,
    plateau_data=watched if plateau else None,
  )
  if settings.plateau:
    settings.check_used("schedule", False, "with --plateau")
  return settings.scheduled(dataclasses.replace(optimizer, **given))


def make_cell(
  settings: Settings,
  name: str,
  fraction: float,
  splits: runner.MakeSplits,
  split: examples_lib.Splits,
) -> runner.Cell:
  """The cell of a method: the preset's settings, with the flags that override them.

  Args:
    settings: settings of the script.
    name: name of the method.
    fraction: parameter of the label noise.
    splits: `seeds -> splits` of each seed.
    split: split of seed 0.
  """
  preset = PRESETS[settings.preset]
  batch_size = settings.batch_size or preset.batch_size
  num_meta = len(split.meta.label)
  meta_batch_size = settings.meta_batch_size or min(
    preset.meta_batch_size, max(1, num_meta)
  )
  steps_per_epoch = max(1, len(split.train.label) // batch_size)
  num_epochs = settings.num_epochs or preset.num_epochs
  config = settings.config(
    num_steps=num_epochs * steps_per_epoch,
    batch_size=batch_size,
    meta_batch_size=meta_batch_size if num_meta else None,
    eval_every=steps_per_epoch,
  )
  rate = settings.lookahead_learning_rate
  if rate is None:
    rate = preset.lookahead_by_method.get(name, preset.lookahead_learning_rate)
  model = classifier.Classifier(
    registries.SMALL_NETWORKS[settings.network](split.num_classes),
    split.num_classes,
    PIXELS[settings.pixels],
    INITIALIZATIONS[settings.initial_distribution],
  )
  return runner.method_cell(
    settings,
    name,
    {
      "noise": settings.noise,
      "noise_variant": settings.noise_variant,
      "fraction": fraction,
    },
    config,
    model,
    make_optimizer(settings, name, split, steps_per_epoch),
    splits,
    runner.seeds_at_once(settings.seeds_at_once, settings.network == "lenet"),
    num_epochs=num_epochs,
    num_classes=split.num_classes,
    noise_fraction=fraction,
    mwn_preset=preset.mwn_preset,
    **settings_lib.given_values(lookahead_learning_rate=rate),
  )


def make_row(settings: Settings, cell: runner.Cell, result: Any) -> dict[str, Any]:
  """The row of a run in `results.csv`."""
  numbers: tuple[float | None, float | None] = (None, None)
  # The published value depends on the noise. --initialization may be given or left out,
  # as long as the initial parameters are those of the released code.
  exempt = ("noise", "noise_fraction", "initialization")
  is_published = settings.initial_distribution == _PUBLISHED_INITIALIZATION
  if is_published and settings.follows(_PROTOCOL, cell.method_name, exempt):
    key = (cell.facts["noise"], cell.facts["fraction"])
    numbers = published.MNIST_NOISE.get(key, {}).get(cell.method_name, numbers)
  if settings.trusted_source is None:
    num_meta = settings.load("train").num_classes * settings.num_meta
  else:
    num_meta = len(settings.trusted_source.labels)
  return runner.row(
    settings,
    cell,
    result,
    **({} if settings.schedule is None else {"schedule": settings.schedule}),
    dataset=settings.dataset,
    network=settings.network,
    preset=settings.preset,
    pixels=settings.pixels,
    initialization=settings.initial_distribution,
    published_percent=numbers[0],
    published_spread=numbers[1],
    num_meta=num_meta,
  )


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison."""
  names = settings.choose_methods(settings.methods, METHODS)
  if settings.network == "lenet":
    settings.load_images("train", "--network=lenet")
  if settings.pixels == "raw":
    settings.load_images("train", "--pixels=raw")
  fractions = settings.noise_fraction
  has_variants = settings.noise in registries.TWO_VARIANTS
  settings.check_used("noise_variant", has_variants, f"with --noise={settings.noise}")
  cells = []
  for fraction in dict.fromkeys((0.5, 0.7) if fractions is None else fractions):
    splits = functools.partial(make_splits, settings, fraction)
    (split,) = splits((0,))
    cells += [make_cell(settings, name, fraction, splits, split) for name in names]
  runner.check(settings, cells)
  # The default rates have changed between versions, so they are recorded: a folder can
  # only be continued with the same rates.
  rates = dict(PRESETS[settings.preset].lookahead_by_method)
  is_default = settings.lookahead_learning_rate is None
  facts = {"lookahead_learning_rates": rates} if rates and is_default else {}
  folder = runner.open_folder(settings, TABLE.name, workdir, **facts)
  rows = [
    make_row(settings, cell, result)
    for cell in cells
    for result in runner.train(settings, cell, folder)
  ]
  figures.accuracies(rows, ("noise", "fraction"), folder / "figure.png")
  curves = figures.meta_weight_net_curves(cells, folder, "curve-{fraction}.png")
  files = ["figure.png", *curves]
  return runner.report(settings, TABLE, folder, rows, files, methods=(METHODS, names))


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
