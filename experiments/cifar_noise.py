r"""CIFAR-10 and CIFAR-100 with wrong labels, as five papers train on them.

Papers: L2RW (Ren et al., ICML 2018): --preset=l2rw_uniform, l2rw_background;
  Meta-Weight-Net (Shu et al., NeurIPS 2019): mwn_uniform, mwn_flip, mwn_stable;
  MentorNet (Jiang et al., ICML 2018): mentornet; WarPI (Sun et al., 2022): warpi;
  CIFAR-10N (Wei et al., ICLR 2022): any preset, --noise=human --annotation=worst.
Command: python -m experiments.cifar_noise --data_dir=DIR --preset=l2rw_background
  --methods=uniform,l2rw; --smoke for a few steps on a CPU. --num_steps=8000
  shortens the schedule in proportion.
Device, time: one GPU; not run in full. ResNet-32 80,000 steps a run, WRN-28-10
  60,000.
Published (CIFAR-10, 40% noise, test accuracy %): l2rw_uniform: baseline 67.97,
  L2RW 86.92. l2rw_background: baseline 59.54, L2RW 86.73. mwn_uniform: baseline
  68.07, Meta-Weight-Net 89.27. mwn_flip: baseline 70.77, Meta-Weight-Net 87.54.
  mentornet: baseline 69, MentorNet-PD 77, MentorNet-DD 89. L2RW reports the last
  step, Meta-Weight-Net and WarPI the best epoch on the test set. Baseline and
  Meta-Weight-Net of mwn_uniform were published on different schedules (60,000
  steps and 20,000, by the first author's word); here all methods share one.
Ours: results/cifar_noise, once it has been run. Headline: the last step.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from absl import flags
import numpy as np

from experiments import _bounds
from experiments import _catalogue
from experiments import _cifar
from experiments import _launch
from experiments import _methods
from experiments import _noise
from experiments import _noise_report
from experiments import _probes
from experiments import _published_cifar
from experiments import _report
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.training import config as config_lib

_PRESET = flags.DEFINE_enum(
  "preset",
  "l2rw_background",
  list(_cifar.PRESETS),
  "Whose settings; the flags below override them one by one.",
)
_METHODS = flags.DEFINE_list(
  "methods", ["uniform", "l2rw"], f"Comma-separated, of {', '.join(_methods.NAMES)}."
)
_DATASET = flags.DEFINE_enum(
  "dataset",
  None,
  ["cifar10", "cifar100", "cifar10_n"],
  "Which images. [cifar10; cifar10_n for --noise=human]",
)
_NOISE = flags.DEFINE_enum(
  "noise", None, noisy_labels.BUILDERS, "How labels go wrong. [the preset's]"
)
_FRACTION = flags.DEFINE_float(
  "noise_fraction",
  None,
  "The builder's parameter, see l2rw_jax/data/noise.py. [the preset's]",
  0.0,
  1.0,
)
_VARIANT = flags.DEFINE_enum(
  "noise_variant", "paper", ["paper", "official_code"], "Of the builder of noise."
)
_ANNOTATION = flags.DEFINE_enum(
  "annotation",
  None,
  tuple(noisy_labels.ANNOTATIONS),
  "Whose labels, for --noise=human. [worst]",
)
_NETWORK = flags.DEFINE_enum(
  "network", None, list(_cifar.NETWORKS), "Network. [the preset's]"
)
_AUGMENTATION = flags.DEFINE_enum(
  "augmentation", None, list(_cifar.AUGMENTATIONS), "Whose. [the preset's]"
)
_NUM_STEPS = flags.DEFINE_integer(
  "num_steps", None, "Updates; decays keep their place. [the preset's]", lower_bound=1
)
_DECAY_STEPS = flags.DEFINE_list(
  "decay_steps", None, "Updates before each tenth of learning rate. [the preset's]"
)
_LEARNING_RATE = flags.DEFINE_float(
  "learning_rate", None, "Of SGD. [the preset's]", lower_bound=0.0
)
_MOMENTUM = flags.DEFINE_float(
  "momentum", None, "Of SGD. [the preset's]", lower_bound=0.0
)
_NESTEROV = flags.DEFINE_bool("nesterov", None, "Of momentum. [the preset's]")
_WEIGHT_DECAY = flags.DEFINE_float(
  "weight_decay", None, "Of the classifier. [the preset's]", lower_bound=0.0
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Training examples a step. [the preset's]", lower_bound=1
)
_META_BATCH_SIZE = flags.DEFINE_integer(
  "meta_batch_size",
  None,
  "Clean examples a step. [the preset's, or as many as there are]",
)
_NUM_META = flags.DEFINE_integer(
  "num_meta", None, "Clean images a class. [the preset's]"
)
_NUM_VALIDATION = flags.DEFINE_integer(
  "num_validation", None, "Held out, with wrong labels. [the preset's]"
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Repetitions.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer(
  "seeds_at_once", 1, "Seeds trained side by side.", lower_bound=1
)
_EVAL_EVERY = flags.DEFINE_integer(
  "eval_every", 500, "Steps between two evaluations.", lower_bound=1
)
_DUMP_LOSSES = flags.DEFINE_bool(
  "dump_losses",
  False,
  "Keep training losses in losses-seed-S.npz, to fit a MentorNet-DD to.",
)
_SMOKE = flags.DEFINE_bool(
  "smoke", False, "Three steps of a small network on 2,000 images, to try it out."
)
flags.adopt_module_key_flags(_launch)
flags.adopt_module_key_flags(_probes)
flags.adopt_module_key_flags(_methods)
_EXTENDABLE = ("methods", "num_seeds", "seeds_at_once", "mentor")
_SMOKE_TRAIN, _SMOKE_TEST = 2000, 500


def make_preset() -> _cifar.Preset:
  """The preset, made small by --smoke, under the flags that override it."""
  preset = _cifar.PRESETS[_PRESET.value]
  if _SMOKE.value:
    preset = _cifar.smoke(preset)
  if _NOISE.value == "human" or _FRACTION.value is not None:
    preset = dataclasses.replace(preset, noise_fraction=_FRACTION.value)
  given: dict[str, Any] = {
    "network": _NETWORK.value,
    "augmentation": _AUGMENTATION.value,
    "noise": _NOISE.value,
    "num_steps": _NUM_STEPS.value,
    "decay_steps": _decay_steps(preset),
    "learning_rate": _LEARNING_RATE.value,
    "momentum": _MOMENTUM.value,
    "nesterov": _NESTEROV.value,
    "weight_decay": _WEIGHT_DECAY.value,
    "batch_size": _BATCH_SIZE.value,
    "meta_batch_size": _META_BATCH_SIZE.value,
    "num_validation": _NUM_VALIDATION.value,
  }
  return dataclasses.replace(
    preset, **{k: v for k, v in given.items() if v is not None}
  )


def _decay_steps(preset: _cifar.Preset) -> tuple[int, ...]:
  """Where the learning rate falls; at the same share of a run of another length."""
  if _DECAY_STEPS.value is None:
    share = (_NUM_STEPS.value or preset.num_steps) / preset.num_steps
    return tuple(round(step * share) for step in preset.decay_steps)
  for text in _DECAY_STEPS.value:
    # Ten digits are more updates than --num_steps may have.
    if not (text.isdecimal() and len(text) < 10 and int(text) >= 1):
      raise base.InputError(
        f"--decay_steps={text}: give numbers of updates, such as 40000,60000."
      )
  return tuple(map(int, _DECAY_STEPS.value))


def dataset(preset: _cifar.Preset) -> str:
  """The set of images."""
  default = "cifar10_n" if preset.noise == "human" else "cifar10"
  return _DATASET.value or default


@functools.cache
def load(name: str, split: str) -> sources.Source:
  """A split of a data set, read once; its first images only with --smoke."""
  source = sources.load(name, split, **_launch.data_folders())
  if not _SMOKE.value:
    return source
  return _cifar.first_images(source, _SMOKE_TRAIN if split == "train" else _SMOKE_TEST)


def num_meta(preset: _cifar.Preset, num_classes: int) -> int:
  """Clean images a class."""
  if _NUM_META.value is not None:
    return _NUM_META.value
  return preset.num_meta[num_classes]


def annotation(preset: _cifar.Preset) -> str | None:
  """Whose labels."""
  if preset.noise == "human":
    return _ANNOTATION.value or "worst"
  return _ANNOTATION.value


def make_splits(
  preset: _cifar.Preset, seeds: Sequence[int]
) -> list[examples_lib.Splits]:
  """The data of some of the seeds."""
  name = dataset(preset)
  train, test = load(name, "train"), load(name, "test")
  return [
    noisy_labels.noisy_labels(
      train,
      test,
      builder=preset.noise,
      fraction=preset.noise_fraction,
      num_meta_per_class=num_meta(preset, train.num_classes),
      num_validation=preset.num_validation,
      seed=seed,
      variant=_VARIANT.value,
      annotation=annotation(preset),
    )
    for seed in seeds
  ]


def make_cell(
  name: str, preset: _cifar.Preset, split: examples_lib.Splits
) -> _noise.Cell:
  """How a method is run."""
  meta_batch_size: int | None = preset.meta_batch_size
  if _META_BATCH_SIZE.value is None:
    meta_batch_size = min(preset.meta_batch_size, len(split.meta.label)) or None
  config = _launch.run_config(
    num_steps=preset.num_steps,
    batch_size=preset.batch_size,
    meta_batch_size=meta_batch_size,
    eval_every=_EVAL_EVERY.value,
  )
  fraction = preset.noise_fraction
  noise = {
    "dataset": dataset(preset),
    "noise": preset.noise,
    "variant": _VARIANT.value,
    "fraction": fraction,
    "annotation": annotation(preset),
  }
  return _noise.make_cell(
    name,
    noise,
    config,
    _cifar.make_optimization(preset),
    _cifar.make_classifier(preset, split.num_classes),
    wrong_share(split) if fraction is None else fraction,
    len(split.train.label),
  )


def wrong_share(split: examples_lib.Splits) -> float:
  """Share of the training labels that is truly wrong."""
  return float(np.mean(split.train.label != split.train.true_label))


def train(
  cell: _noise.Cell, preset: _cifar.Preset, folder: pathlib.Path
) -> list[dict[str, Any]]:
  """Trains a cell for every seed; a result row for each."""
  rows = []
  for first in range(0, _NUM_SEEDS.value, _AT_ONCE.value):
    seeds = tuple(range(first, min(first + _AT_ONCE.value, _NUM_SEEDS.value)))
    splits = make_splits(preset, seeds)
    results = _noise.train(
      cell._replace(config=dataclasses.replace(cell.config, seeds=seeds)),
      splits,
      folder / f"seeds-{seeds[0]}-{seeds[-1]}",
      dump_losses=_DUMP_LOSSES.value,
    )
    rows += [
      row(cell, preset, split, result)
      for split, result in zip(splits, results, strict=True)
    ]
  return rows


def row(
  cell: _noise.Cell, preset: _cifar.Preset, split: examples_lib.Splits, result: Any
) -> dict[str, Any]:
  """One run's line of `results.csv`."""
  published: tuple[float | None, float | None] = (None, None)
  if preset.network == _cifar.PRESETS[_PRESET.value].network and not _SMOKE.value:
    published = _published_cifar.lookup(
      _PRESET.value, dataset(preset), preset.noise, preset.noise_fraction, cell.name
    )
  facts = {
    "preset": _PRESET.value,
    "network": preset.network,
    "augmentation": preset.augmentation,
    "published_percent": published[0],
    "published_spread": published[1],
    "num_meta": len(split.meta.label),
    "num_train": len(split.train.label),
    "wrong_percent": 100 * wrong_share(split),
  }
  return _noise.row(cell, result, **facts)


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  names = _methods.check(_METHODS.value)
  preset = make_preset()
  (split,) = make_splits(preset, [0])
  cells = [make_cell(name, preset, split) for name in names]
  for cell in cells:  # mistakes show before anything is written
    config_lib.check(cell.config, cell.method, [split])
  _probes.check(split)
  del split  # hundreds of megabytes
  modules = (__name__, _methods.__name__)
  folder = _launch.prepare(
    "cifar_noise", modules[0], _EXTENDABLE, modules[1], **_probes.given()
  )
  rows = [row for cell in cells for row in train(cell, preset, folder)]
  flags_given = _launch.flags_of(*modules) | _probes.given()
  _report.save(folder, rows, flags_given)
  told = "annotation" if annotation(preset) else "fraction"
  columns = ("dataset", "noise", told, "num_steps")
  _noise_report.draw(rows, columns, folder / "figure.png")
  written = ["results.json", "results.csv", "figure.png"]
  for cell in cells:
    first = folder / f"seeds-0-{min(_AT_ONCE.value, _NUM_SEEDS.value) - 1}"
    if cell.name == "meta_weight_net" and _noise.draw_curves(
      cell, first, folder / "curve.png"
    ):
      written.append("curve.png")
  print(_bounds.unused(_methods.USED_BY, names), end="")
  print(_catalogue.summary("cifar_noise", rows, flags_given))
  print(f"\nwritten: {folder}/{', '.join(written)}")


if __name__ == "__main__":
  _launch.run(main)
