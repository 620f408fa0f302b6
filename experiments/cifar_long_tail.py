r"""CIFAR-10 and CIFAR-100 in a long tail, as in the LDAM and Meta-Weight-Net papers.

Papers: LDAM-DRW (Cao et al., NeurIPS 2019): --preset=ldam; Meta-Weight-Net (Shu et
  al., NeurIPS 2019), its code for class imbalance: --preset=mwn.
Command: python -m experiments.cifar_long_tail --data_dir=DIR
  --methods=uniform,ldam_drw
  for other tails: --shape=step, --imbalance=10, --dataset=cifar100
  for a short trial on a CPU: --smoke (with cifar100, also --imbalance=10)
  With --preset=ldam, also pass --num_meta=10 if a method needs meta images. They are
  drawn from images outside the tail. A class whose images are all in the tail (class 0;
  with --shape=step, the first half of the classes) gives up 10 training images instead.
Device, time: one GPU; ResNet-32, 19,200 steps per run at imbalance 100 (preset ldam).
Published (CIFAR-10, exponential 100, test accuracy %): ldam: cross-entropy 70.36,
  LDAM 73.35, LDAM-DRW 77.03. mwn: cross-entropy 70.36, L2RW 74.16, Meta-Weight-Net
  75.21, at the best epoch on the test set.
Measured: nothing yet. The main metric is the test accuracy after the last step.
"""

from collections.abc import Mapping
import dataclasses
from typing import ClassVar

from experiments.lib import launch
from experiments.lib import long_tail
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import runner
from experiments.lib.settings import flag
from experiments.tables import published_cifar
from l2rw_jax.data import sources
from l2rw_jax.models import classifier
from l2rw_jax.training import devices

METHODS = ("uniform", "ldam_drw")
PRESETS = {
  "ldam": long_tail.Preset(
    num_epochs=200,
    batch_size=128,
    optimizer=optimizers.OptimizerConfig(
      weight_decay=2e-4, drops=((0.8, 0.01), (0.9, 0.01)), warmup=5 / 200
    ),
    builder="ldam",
    num_meta=0,
  ),
  # The learning rate falls before epochs 80 and 90, counted from 1.
  "mwn": long_tail.Preset(
    num_epochs=100,
    batch_size=100,
    optimizer=optimizers.OptimizerConfig(
      nesterov=True, weight_decay=5e-4, drops=((0.79, 0.1), (0.89, 0.1))
    ),
    builder="mwn",
    num_meta=10,
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings(long_tail.Settings):
  """The flags of this script."""

  UNSET: ClassVar[Mapping[str, str]] = {
    "methods": ",".join(METHODS),
    "seeds_at_once": "1",
    "deferred": "the preset's",
  }

  dataset: str = flag("cifar10")
  preset: str = flag("ldam", choices=PRESETS)
  network: str | None = flag(
    None,
    unset="resnet_32, and resnet_8 with --smoke",
    choices=[
      *("resnet_32", "wrn_28_10", "resnet_8", "mlp", "whitened", "whitened_gn"),
      *("whitened_half", "whitened_half_gn", "whitened_quarter", "whitened_quarter_gn"),
    ],
  )
  smoke: bool = flag(
    False,
    "Run two epochs of a small network on a tail of the first 2,000 images, to try the"
    " script out.",
  )

  def load(self, split: str, dataset: str | None = None) -> sources.Source:
    """Like the base class, but only the first images with --smoke."""
    source = super().load(split, dataset)
    size = 2000 if split == "train" else 500
    return runner.first_images(source, size) if self.smoke else source


TABLE = long_tail.make_table(
  "cifar_long_tail", "CIFAR in a long tail", published_cifar.LONG_TAIL_SOURCE
)


def make_preset(settings: Settings) -> long_tail.Preset:
  """The preset, which --smoke makes small."""
  preset = PRESETS[settings.preset]
  if not settings.smoke:
    return preset
  return preset._replace(
    num_epochs=2, batch_size=100, num_meta=min(preset.num_meta, 2), deferred=0.5
  )


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison."""
  train, test = settings.load_images("train"), settings.load("test")
  network = settings.network or ("resnet_8" if settings.smoke else "resnet_32")

  def make_model(cosine: bool) -> classifier.Classifier:
    preprocess = registries.AUGMENTATIONS[settings.preset]
    module = registries.make_network(
      network,
      train.num_classes,
      train.images,
      preprocess,
      axis_name=devices.AXIS_NAME,
      cosine=cosine,
    )
    return classifier.Classifier(module, train.num_classes, preprocess)

  experiment = long_tail.Experiment(
    table=TABLE,
    train=train,
    test=test,
    make_model=make_model,
    preset=make_preset(settings),
    facts={"dataset": settings.dataset, "preset": settings.preset, "network": network},
    methods=METHODS,
    side_by_side=1,
    comparable=network == "resnet_32",
  )
  return long_tail.run(settings, experiment, workdir)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
