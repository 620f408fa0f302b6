r"""MNIST in a long tail: every method that weighs, margins or resamples.

Paper: none trains on it; the tails are those of LDAM (Cao et al., NeurIPS 2019) and
  Meta-Weight-Net (Shu et al., NeurIPS 2019) on CIFAR, cut to a laptop's CPU. The
  schedule is ours: a warm-up, drops to a tenth where LDAM's are, at 80 and 90% of the
  run, deferred methods from 80%. Settings of a method are those of its paper or
  release: nothing was tuned, but for the learning rate, see PRESET.
Command: python -m experiments.mnist_long_tail --data_dir=DIR --imbalance=100
  --imbalance=200; without a download: --dataset=digits --imbalance=10
Device, time: one CPU core.
Published: nothing to put beside ours.
Ours: results/mnist_long_tail.
"""

from collections.abc import Callable
import functools

from absl import flags
from flax import linen as nn
import jax

from experiments import _launch
from experiments import _long_tail
from experiments import _optimizer_config
from experiments import _own_data
from l2rw_jax.data import sources
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp

_DATASET = flags.DEFINE_string("dataset", "mnist", f"mnist, digits, {_own_data.HELP}")
_NETWORK = flags.DEFINE_enum(
  "network", "mlp", ["mlp", "lenet"], "MLP 784-256-10, or L2RW's LeNet."
)
flags.adopt_module_key_flags(_long_tail)
METHODS = [
  "uniform",
  "focal",
  "class_balanced",
  "ldam_drw",
  "absgd",
  "l2rw",
  "meta_weight_net",
]
NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "mlp": functools.partial(mlp.MLP, hidden=(256,)),
  "lenet": lenet.LeNet,
}
# One schedule for all methods: drops where LDAM's are but of the size, the length and
# the batches of Meta-Weight-Net's. The learning rate is a tenth of theirs because of
# L2RW, which fails on this network at 0.1 (21% after 10 epochs, one seed; 86% at 0.03,
# 92% at 0.01). Plain cross-entropy would gain two points from 0.1.
PRESET = _long_tail.Preset(
  num_epochs=100,
  batch_size=100,
  optimizer_config=_optimizer_config.OptimizerConfig(
    "sgd", 0.01, 0.9, False, 2e-4, ((0.8, 0.1), (0.9, 0.1)), warmup=0.05
  ),
  builder="mwn",
  num_meta=10,
)


@functools.cache
def load(split: str) -> sources.Source:
  """A split of `--dataset`, read once."""
  return _own_data.load(_DATASET.value, split, ["mnist", "digits"])


def make_model(cosine: bool) -> classifier.Classifier:
  """The network of `--network`."""
  num_classes = load("train").num_classes
  network = NETWORKS[_NETWORK.value](num_classes, cosine=cosine)
  return classifier.Classifier(network, num_classes)


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  train, test = (load(split) for split in ("train", "test"))
  _long_tail.main(
    _long_tail.Experiment(
      name="mnist_long_tail",
      module=__name__,
      train=train,
      test=test,
      make_model=make_model,
      preset=PRESET,
      facts={"dataset": _DATASET.value, "network": _NETWORK.value},
      methods=METHODS,
      alone=_NETWORK.value == "lenet" and jax.default_backend() == "cpu",
    )
  )


if __name__ == "__main__":
  _launch.run(main)
