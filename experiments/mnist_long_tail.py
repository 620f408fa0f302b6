r"""Images in a long tail: methods that use weights, margins or resampling.

Paper: no paper trains on these data. LDAM (Cao et al., NeurIPS 2019) and
  Meta-Weight-Net (Shu et al., NeurIPS 2019) cut such tails from CIFAR; for these
  images, a laptop's CPU is enough. The schedule is a choice of this project: a warm-up,
  drops to a tenth at 80 and 90% of the run (where LDAM's code has its drops), and
  deferred methods that begin at 80%.
  The settings of a method are those of its paper or released code. Its learning rate
  was chosen on images held out of the training set, see LEARNING_RATES.
Command: python -m experiments.mnist_long_tail --data_dir=DIR --imbalance=100
  --imbalance=200; without a download: --dataset=digits --imbalance=10
Device, time: one CPU core, 2 to 8 minutes per method and tail (MLP, 3 seeds).
Published: no comparable number.
Measured: results/mnist_long_tail.
"""

from collections.abc import Mapping
import dataclasses
from typing import ClassVar

from experiments.lib import launch
from experiments.lib import long_tail
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax.models import classifier

METHODS = (
  *("uniform", "clean_only", "fine_tuning", "fine_tuning_restarted", "early_stopped"),
  *("focal", "class_balanced", "ldam_drw", "absgd", "l2rw", "meta_weight_net"),
)
# The learning rates of the methods whose rate is not 0.1. Each is the best of 0.003,
# 0.01, 0.03, 0.1, 0.3 and 1 (not all of them were run, but always the neighbors of the
# best one) for the MLP after 20 epochs. The criterion is the mean accuracy over the
# imbalances 100 and 200 of MNIST and two seeds, on images held out of the training set:
# --evaluate_on=validation --num_epochs=20 --num_seeds=2 --learning_rate=RATE.
# For ldam_drw, 0.1 was the best. logit_adjusted was run up to 0.1, with the accuracies
# of balanced_softmax, and has the rate of balanced_softmax. On Fashion-MNIST, the best
# rates of most methods are lower (results/README.md).
LEARNING_RATES = {
  "l2rw": 0.01,
  **dict.fromkeys(("clean_only", "fine_tuning_restarted"), 0.03),
  **dict.fromkeys(("class_balanced", "class_balanced_focal"), 0.03),
  **dict.fromkeys(("uniform", "fine_tuning", "early_stopped", "focal"), 0.3),
  **dict.fromkeys(("balanced_softmax", "logit_adjusted", "absgd"), 0.3),
  **dict.fromkeys(("classifier_retraining", "meta_weight_net"), 0.3),
}
# All methods have one schedule (fine_tuning_restarted starts it again for its last
# steps). The drops are where LDAM's are, but their size, the number of epochs and the
# batch size are those of Meta-Weight-Net.
PRESET = long_tail.Preset(
  num_epochs=100,
  batch_size=100,
  optimizer=optimizers.OptimizerConfig(
    "sgd", 0.1, 0.9, False, 2e-4, ((0.8, 0.1), (0.9, 0.1)), warmup=0.05
  ),
  builder="mwn",
  num_meta=10,
  learning_rates=LEARNING_RATES,
)


@dataclasses.dataclass(frozen=True)
class Settings(long_tail.Settings):
  """The flags of this script."""

  UNSET: ClassVar[Mapping[str, str]] = {
    **{
      name: str(getattr(PRESET, name))
      for name in ("num_epochs", "batch_size", "builder", "num_meta", "deferred")
    },
    **{
      name: str(getattr(PRESET.optimizer, name))
      for name in ("momentum", "weight_decay")
    },
    "learning_rate": f"{settings_lib.describe(LEARNING_RATES)};"
    f" {PRESET.optimizer.learning_rate:g} for all others",
    "schedule": "constant, with drops",
    "methods": ",".join(METHODS),
    "seeds_at_once": "1 for LeNet on CPU, and all otherwise",
  }

  network: str = flag(
    "mlp",
    "Network to train: an MLP with one hidden layer of 256 units, or L2RW's LeNet.",
    choices=registries.SMALL_NETWORKS,
  )


TABLE = long_tail.make_table(
  "mnist_long_tail",
  "MNIST in a long tail",
  "Published: nothing; the papers cut their long tails from CIFAR.",
  "num_epochs",
)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison."""
  train, test = settings.load("train"), settings.load("test")
  if settings.network == "lenet":
    settings.load_images("train", "--network=lenet")

  def make_model(cosine: bool) -> classifier.Classifier:
    network = registries.SMALL_NETWORKS[settings.network]
    return classifier.Classifier(
      network(train.num_classes, cosine=cosine), train.num_classes
    )

  experiment = long_tail.Experiment(
    table=TABLE,
    train=train,
    test=test,
    make_model=make_model,
    preset=PRESET,
    facts={"dataset": settings.dataset, "network": settings.network},
    methods=METHODS,
    side_by_side=runner.seeds_at_once(None, settings.network == "lenet"),
  )
  return long_tail.run(settings, experiment, workdir)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
