r"""CIFAR-10 and CIFAR-100 with wrong labels, in the settings of several papers.

Papers: L2RW (Ren et al., ICML 2018): --preset=l2rw_uniform, l2rw_background;
  Meta-Weight-Net (Shu et al., NeurIPS 2019): mwn_uniform, mwn_flip, mwn_stable;
  MentorNet (Jiang et al., ICML 2018): mentornet; WarPI (Sun et al., 2022): warpi;
  CIFAR-10N (Wei et al., ICLR 2022): any preset, --noise=human --annotation=worst.
  --preset=whitened has the settings of this project for a fast network.
Command: python -m experiments.cifar_noise --data_dir=DIR --preset=l2rw_background
  --methods=uniform,l2rw; --smoke for a few steps on a CPU. --num_steps=8000
  shortens the schedule in proportion.
Device, time: --preset=whitened: two CPU cores, 25 minutes for a run of uniform
  training. The other presets need a GPU and were not run in full: a run of L2RW's
  presets has 80,000 steps (ResNet-32) or 60,000 (WRN-28-10).
Published (CIFAR-10, 40% noise, test accuracy %): l2rw_uniform: baseline 67.97,
  L2RW 86.92. l2rw_background: baseline 59.54, L2RW 86.73. mwn_uniform: baseline
  68.07, Meta-Weight-Net 89.27. mwn_flip: baseline 70.77, Meta-Weight-Net 87.54.
  mentornet: baseline 69, MentorNet-PD 77, MentorNet-DD 89. L2RW reports the last
  step, Meta-Weight-Net and WarPI the best epoch on the test set. For mwn_uniform, the
  published baseline and Meta-Weight-Net were trained with different schedules (60,000
  and 20,000 steps, according to the first author); here all methods share one schedule.
Measured: results/cifar_noise has short runs on a CPU. The main metric is measured at
  the last step.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

from experiments.lib import figures
from experiments.lib import held_out
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib import trusted
from experiments.lib.settings import data_flag, flag, methods_flag, preset_flag
from experiments.tables import published_cifar
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.models import classifier
from l2rw_jax.training import devices

METHODS = tuple(registries.NOISE)


@dataclasses.dataclass(frozen=True)
class Preset:
  """The training settings of one paper, or of this project for its fast network.

  Each attribute is the value of the flag with the same name, except for:
    cosine: whether the learning rate falls to 0 as a cosine, instead of by decays.
    warmup: share of the run in which the learning rate rises.
    decay_all: whether the weight decay includes biases and BatchNorm parameters; see
      `optimizers`.
    num_meta: maps the number of classes to the number of clean images of each class.
  """

  network: str
  augmentation: str
  noise: str
  noise_fraction: float | None
  num_steps: int
  decay_steps: tuple[int, ...]
  learning_rate: float = 0.1
  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 5e-4
  decay_all: bool = True
  batch_size: int = 100
  meta_batch_size: int = 100
  num_meta: dict[int, int] = dataclasses.field(
    default_factory=lambda: {10: 100, 100: 10}
  )
  num_validation: int = 0
  cosine: bool = False
  warmup: float = 0.0


_L2RW_UNIFORM = Preset(
  network="l2rw_wrn_28_10",
  augmentation="l2rw",
  noise="uniform_flip",
  noise_fraction=0.4,
  num_steps=60_000,
  decay_steps=(40_000, 50_000),
  weight_decay=2e-4,
  decay_all=False,
  num_validation=5000,
)
_MWN_STABLE = Preset(
  network="resnet_32",
  augmentation="mwn",
  noise="mwn_uniform",
  noise_fraction=0.4,
  num_steps=120 * 490,
  decay_steps=(80 * 490, 100 * 490),
)
PRESETS = {
  "l2rw_uniform": _L2RW_UNIFORM,
  "l2rw_background": dataclasses.replace(
    _L2RW_UNIFORM,
    network="l2rw_resnet_32",
    noise="background_flip",
    num_steps=80_000,
    decay_steps=(40_000, 60_000),
    num_meta={10: 10, 100: 10},
  ),
  # The first release has 20,000 iterations. The published baseline (BaseModel) is from
  # a longer schedule; see the top of this file.
  "mwn_uniform": dataclasses.replace(
    _MWN_STABLE,
    network="wrn_28_10",
    num_steps=20_000,
    decay_steps=(18_000, 19_000),
    nesterov=True,
  ),
  # The decays are those of the first release for ResNet-32, the alternative to its
  # default network. The length of 60 epochs is believed to be that of the paper, but
  # was not verified.
  "mwn_flip": dataclasses.replace(
    _MWN_STABLE,
    noise="mwn_flip2",
    num_steps=30_000,
    decay_steps=(20_000, 25_000),
    nesterov=True,
  ),
  # The later release has 120 epochs of 490 steps.
  "mwn_stable": _MWN_STABLE,
  # The new labels are drawn from all classes, including the true one. It was not
  # verified that the paper does this, too.
  "mentornet": Preset(
    network="mentornet_wrn_56_10",
    augmentation="mentornet",
    noise="mwn_uniform",
    noise_fraction=0.4,
    num_steps=39_000,
    decay_steps=(19_531, 25_000, 30_000),
    weight_decay=2e-4,
    decay_all=False,
    batch_size=128,
    num_meta={10: 0, 100: 0},
  ),
  "warpi": dataclasses.replace(_MWN_STABLE, augmentation="warpi"),
  # The settings of this project for the fast network: 13 epochs of 50,000 images. They
  # were chosen with a quarter of the width and four epochs, on 5,000 images that were
  # held out of the training set (results/README.md).
  "whitened": Preset(
    network="whitened_half",
    augmentation="whitened",
    noise="mwn_uniform",
    noise_fraction=0.4,
    num_steps=5200,
    decay_steps=(),
    learning_rate=0.4,
    nesterov=True,
    batch_size=125,
    meta_batch_size=125,
    cosine=True,
    warmup=0.2,
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings(
  registries.Settings,
  trusted.Settings,
  held_out.Settings,
  optimizers.Settings,
  runner.Settings,
):
  """The flags of this script."""

  EXTENDABLE = ("methods", "num_seeds", "seeds_at_once", "mentor")

  preset: str = flag("l2rw_background", choices=PRESETS)
  methods: tuple[str, ...] = methods_flag(("uniform", "l2rw"), METHODS)
  dataset: str | None = flag(
    None,
    "Data set: the name of any image set that TFDS has prepared in --data_dir,"
    f" {settings_lib.OWN_DATA}.",
    unset="cifar10, and cifar10_n for --noise=human",
  )
  noise: str | None = preset_flag(choices=noisy_labels.BUILDERS)
  noise_fraction: float | None = preset_flag(
    "Share of wrong labels or, for some values of --noise, a parameter that sets it"
    " (l2rw_jax/data/noisy_labels.py)."
  )
  noise_variant: str = flag("paper", choices=["paper", "official_code"])
  annotation: str | None = data_flag(
    None,
    "Annotators whose labels are used, for --noise=human. The default is worst.",
    choices=noisy_labels.ANNOTATIONS,
  )
  network: str | None = preset_flag(choices=registries.NETWORKS)
  augmentation: str | None = preset_flag(
    "Augmentation and scaling of the images, named after a paper.",
    choices=registries.AUGMENTATIONS,
    group="data",
  )
  num_steps: int | None = preset_flag(
    "Number of parameter updates; the preset's decays move in proportion."
  )
  decay_steps: tuple[str, ...] | None = preset_flag(
    "Numbers of updates after each of which the learning rate falls to a tenth,"
    " separated by commas."
  )
  learning_rate: float | None = preset_flag("Learning rate of SGD.")
  momentum: float | None = preset_flag()
  nesterov: bool | None = preset_flag("Use Nesterov's momentum.")
  weight_decay: float | None = preset_flag()
  batch_size: int | None = preset_flag()
  meta_batch_size: int | None = flag(
    None, unset="the preset's, or all if there are fewer"
  )
  num_meta: int | None = preset_flag()
  num_validation: int | None = preset_flag()
  seeds_at_once: int = flag(1)
  eval_every: int = flag(500)
  dump_losses: bool = flag(False)
  smoke: bool = flag(
    False, "Run three steps of a small network on 2,000 images, to try the script out."
  )

  @property
  def dataset_name(self) -> str:
    """Like the base class, with a default that depends on the noise."""
    noise = self.noise or PRESETS[self.preset].noise
    return self.dataset or ("cifar10_n" if noise == "human" else "cifar10")

  def load(self, split: str, dataset: str | None = None) -> sources.Source:
    """Like the base class, but only the first images with --smoke."""
    source = super().load(split, dataset)
    size = 2000 if split == "train" else 500
    return runner.first_images(source, size) if self.smoke else source


TABLE = table.Layout(
  name="cifar_noise",
  title="CIFAR with wrong labels",
  metrics=table.NOISE_METRICS,
  settings={
    "preset": "preset {}",
    "network": "{}",
    "augmentation": "augmentation {}",
    "dataset": "{}",
    "noise": "{}",
    "noise_variant": "variant {}",
    "annotation": "annotation {}",
    "fraction": "fraction {:g}",
    "num_meta": "{:,} clean images",
    "num_steps": "{:,} steps",
  },
  keys=("dataset", "noise", "annotation", "fraction", "num_steps"),
  published=published_cifar.SOURCE,
)


def make_preset(settings: Settings) -> Preset:
  """The preset, which --smoke makes small, with the flags that override it."""
  preset = PRESETS[settings.preset]
  if settings.smoke:
    preset = dataclasses.replace(
      preset,
      network="resnet_8",
      num_steps=3,
      decay_steps=(2,),
      batch_size=20,
      meta_batch_size=10,
      num_meta={10: 2, 100: 1},
      num_validation=min(preset.num_validation, 20),
    )
  if settings.noise == "human" or settings.noise_fraction is not None:
    preset = dataclasses.replace(preset, noise_fraction=settings.noise_fraction)
  names = (
    *("network", "augmentation", "noise", "num_steps", "learning_rate", "momentum"),
    *("nesterov", "weight_decay", "batch_size", "meta_batch_size", "num_validation"),
  )
  given = settings_lib.given_values(**{name: getattr(settings, name) for name in names})
  given["decay_steps"] = _decay_steps(settings, preset)
  return dataclasses.replace(preset, **given)


def _decay_steps(settings: Settings, preset: Preset) -> tuple[int, ...]:
  """The decay steps: those of --decay_steps, or the preset's, scaled to the run."""
  if settings.decay_steps is None:
    share = (settings.num_steps or preset.num_steps) / preset.num_steps
    return tuple(round(step * share) for step in preset.decay_steps)
  num_steps = settings.num_steps or preset.num_steps
  for text in settings.decay_steps:
    # A decay after the last update would have no effect.
    if not (text.isdecimal() and len(text) < 10 and 1 <= int(text) < num_steps):
      raise base.InputError(
        f"--decay_steps={text}: give numbers of updates, such as 40000,60000, above 0"
        f" and below --num_steps={num_steps}."
      )
  return tuple(map(int, settings.decay_steps))


def make_optimizer(preset: Preset) -> optimizers.OptimizerConfig:
  """The preset's optimizer and schedule, with drops as shares of the run."""
  return optimizers.OptimizerConfig(
    learning_rate=preset.learning_rate,
    momentum=preset.momentum,
    nesterov=preset.nesterov,
    weight_decay=preset.weight_decay,
    drops=tuple((step / preset.num_steps, 0.1) for step in preset.decay_steps),
    decay_all=preset.decay_all,
    warmup=preset.warmup,
    cosine=preset.cosine,
  )


def make_classifier(
  preset: Preset, num_classes: int, images: np.ndarray
) -> classifier.Classifier:
  """The network and its preprocessing, for the training loop.

  Args:
    preset: the preset that names the network and the preprocessing.
    num_classes: C.
    images: images of the training split, for networks with a whitening layer.
  """
  preprocess = registries.AUGMENTATIONS[preset.augmentation]
  if preset.augmentation == "warpi" and num_classes == 100:
    preprocess = registries.WARPI_100
  network = registries.make_network(
    preset.network, num_classes, images, preprocess, axis_name=devices.AXIS_NAME
  )
  return classifier.Classifier(network, num_classes, preprocess)


def make_facts(settings: Settings, preset: Preset) -> dict[str, Any]:
  """The settings that distinguish the data of a cell."""
  is_human = preset.noise == "human"
  return {
    "dataset": settings.dataset_name,
    "noise": preset.noise,
    "noise_variant": settings.noise_variant,
    "fraction": preset.noise_fraction,
    "annotation": settings.annotation or ("worst" if is_human else None),
  }


def make_splits(
  settings: Settings, preset: Preset, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The splits of the given seeds."""
  facts = make_facts(settings, preset)
  train, test = (settings.load(part, facts["dataset"]) for part in ("train", "test"))
  num_meta = settings.num_meta
  if num_meta is None:
    # CIFAR-100 has a tenth of CIFAR-10's images in a class.
    num_meta = preset.num_meta[10 if train.num_classes <= 10 else 100]
  return [
    noisy_labels.noisy_labels(
      train,
      test,
      builder=preset.noise,
      fraction=preset.noise_fraction,
      num_validation=preset.num_validation,
      seed=seed,
      variant=settings.noise_variant,
      annotation=facts["annotation"],
      **settings.meta_set(num_meta),
    )
    for seed in seeds
  ]


def make_cells(settings: Settings, names: Sequence[str]) -> list[runner.Cell]:
  """A cell for every method."""
  preset = make_preset(settings)
  splits = functools.partial(make_splits, settings, preset)
  (split,) = splits((0,))
  meta_batch_size: int | None = preset.meta_batch_size
  if settings.meta_batch_size is None:
    meta_batch_size = min(preset.meta_batch_size, len(split.meta.label)) or None
  config = settings.config(
    num_steps=preset.num_steps,
    batch_size=preset.batch_size,
    meta_batch_size=meta_batch_size,
  )
  if settings.schedule is not None:
    settings.check_used("decay_steps", False, "with --schedule")
  elif preset.cosine:
    where = f"with --preset={settings.preset}, whose learning rate falls as a cosine"
    settings.check_used("decay_steps", False, where)
  optimizer = settings.scheduled(make_optimizer(preset))
  facts = make_facts(settings, preset)
  images = settings.load_images("train", dataset=facts["dataset"]).images
  fraction = preset.noise_fraction
  return [
    runner.method_cell(
      settings,
      name,
      facts,
      config,
      make_classifier(preset, split.num_classes, images),
      optimizer,
      splits,
      settings.seeds_at_once,
      num_epochs=config.num_steps / max(1, len(split.train.label) // config.batch_size),
      num_classes=split.num_classes,
      noise_fraction=wrong_share(split) if fraction is None else fraction,
    )
    for name in names
  ]


def wrong_share(split: examples_lib.Splits) -> float:
  """Share of the training labels that is wrong."""
  return float(np.mean(split.train.label != split.train.true_label))


def make_row(
  settings: Settings, cell: runner.Cell, split: examples_lib.Splits, result: Any
) -> dict[str, Any]:
  """The row of a run in `results.csv`."""
  preset = make_preset(settings)
  numbers: tuple[float | None, float | None] = (None, None)
  published = dataclasses.replace(
    PRESETS[settings.preset], noise=preset.noise, noise_fraction=preset.noise_fraction
  )
  # These flags may differ from their defaults: the preset is compared as a whole,
  # `lookup` compares the data set and the noise, and both variants of the noise are
  # accepted.
  # `make_preset` does not read --num_meta, whose default depends on the classes.
  in_preset = {field.name for field in dataclasses.fields(preset)} - {"num_meta"}
  exempt = ("preset", "dataset", "noise_variant", *in_preset)
  if preset == published and settings.follows({}, cell.method_name, exempt):
    numbers = published_cifar.lookup(
      settings.preset,
      cell.facts["dataset"],
      preset.noise,
      preset.noise_fraction,
      cell.method_name,
    )
  return runner.row(
    settings,
    cell,
    result,
    preset=settings.preset,
    network=preset.network,
    augmentation=preset.augmentation,
    published_percent=numbers[0],
    published_spread=numbers[1],
    num_meta=len(split.meta.label),
    num_train=len(split.train.label),
    wrong_percent=100 * wrong_share(split),
  )


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison."""
  names = settings.choose_methods(settings.methods, METHODS)
  noise = make_preset(settings).noise
  has_variants = noise in registries.TWO_VARIANTS
  settings.check_used("noise_variant", has_variants, f"with --noise={noise}")
  cells = make_cells(settings, names)
  runner.check(settings, cells)
  folder = runner.open_folder(settings, TABLE.name, workdir)
  results = [runner.train(settings, cell, folder) for cell in cells]
  rows_of_cells: list[runner.Rows] = [[] for _ in cells]
  for i, seed in enumerate(settings.seeds):  # One split at a time: they are large.
    (split,) = cells[0].splits((seed,))
    for cell, runs, rows in zip(cells, results, rows_of_cells, strict=True):
      rows.append(make_row(settings, cell, split, runs[i]))
  rows = [row for rows in rows_of_cells for row in rows]
  varying = "annotation" if cells[0].facts["annotation"] else "fraction"
  columns = ("dataset", "noise", varying, "num_steps")
  figures.accuracies(rows, columns, folder / "figure.png")
  files = ["figure.png", *figures.meta_weight_net_curves(cells, folder, "curve.png")]
  return runner.report(settings, TABLE, folder, rows, files, methods=(METHODS, names))


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
