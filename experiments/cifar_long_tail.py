r"""CIFAR-10 and CIFAR-100 in a long tail, as LDAM and Meta-Weight-Net train on them.

Papers: LDAM-DRW (Cao et al., NeurIPS 2019): --preset=ldam; Meta-Weight-Net (Shu et
  al., NeurIPS 2019), release for class imbalance: --preset=mwn.
Command: python -m experiments.cifar_long_tail --data_dir=DIR
  --methods=uniform,ldam_drw; --shape=step, --imbalance=10, --dataset=cifar100;
  --smoke for a few steps on a CPU. With --preset=ldam, methods that need meta images
  need --num_meta=10, which takes them out of class 0 and of what the tail leaves over.
Device, time: one GPU; ResNet-32, 19,200 steps a run at factor 100 (preset ldam).
Published (CIFAR-10, exponential 100, test accuracy %): ldam: cross-entropy 70.36,
  LDAM 73.35, LDAM-DRW 77.03. mwn: cross-entropy 70.36, L2RW 74.16, Meta-Weight-Net
  75.21, the best epoch on the test set.
Ours: results/cifar_long_tail, once it has been run. Headline: the last step.
"""

from absl import flags

from experiments import _cifar
from experiments import _launch
from experiments import _long_tail
from experiments import _optimizer_config
from l2rw_jax.data import sources
from l2rw_jax.models import classifier
from l2rw_jax.training import devices

METHODS = ["uniform", "ldam_drw"]
PRESETS = {
  "ldam": _long_tail.Preset(
    num_epochs=200,
    batch_size=128,
    optimizer_config=_optimizer_config.OptimizerConfig(
      weight_decay=2e-4, drops=((0.8, 0.01), (0.9, 0.01)), warmup=5 / 200
    ),
    builder="ldam",
    num_meta=0,
  ),
  # Its learning rate falls before epochs 80 and 90, counted from 1.
  "mwn": _long_tail.Preset(
    num_epochs=100,
    batch_size=100,
    optimizer_config=_optimizer_config.OptimizerConfig(
      nesterov=True, weight_decay=5e-4, drops=((0.79, 0.1), (0.89, 0.1))
    ),
    builder="mwn",
    num_meta=10,
  ),
}
_PRESET = flags.DEFINE_enum(
  "preset", "ldam", list(PRESETS), "Whose settings; other flags override them."
)
_DATASET = flags.DEFINE_enum(
  "dataset", "cifar10", ["cifar10", "cifar100"], "Which images."
)
_NETWORK = flags.DEFINE_enum(
  "network",
  None,
  ["resnet_32", "wrn_28_10", "resnet_8", "mlp"],
  "Network. [resnet_32; with --smoke resnet_8]",
)
_SMOKE = flags.DEFINE_bool(
  "smoke", False, "Two epochs of a small network on 2,000 images, to try it out."
)
flags.adopt_module_key_flags(_long_tail)
_SMOKE_TRAIN, _SMOKE_TEST = 2000, 500


def load(split: str) -> sources.Source:
  """A split of `--dataset`; its first images only with --smoke."""
  source = _long_tail.load(_DATASET.value, split, **_launch.data_folders())
  if not _SMOKE.value:
    return source
  return _cifar.first_images(source, _SMOKE_TRAIN if split == "train" else _SMOKE_TEST)


def network() -> str:
  """Name of the network."""
  return _NETWORK.value or ("resnet_8" if _SMOKE.value else "resnet_32")


def make_preset() -> _long_tail.Preset:
  """The preset, made small by --smoke."""
  preset = PRESETS[_PRESET.value]
  if not _SMOKE.value:
    return preset
  return preset._replace(
    num_epochs=2, batch_size=100, num_meta=min(preset.num_meta, 2), deferred=0.5
  )


def main() -> None:
  """Trains what is missing, then prints and writes the comparison."""
  train, test = load("train"), load("test")

  def make_model(cosine: bool) -> classifier.Classifier:
    made = _cifar.NETWORKS[network()](
      train.num_classes, axis_name=devices.AXIS_NAME, cosine=cosine
    )
    preprocess = _cifar.AUGMENTATIONS[_PRESET.value]
    return classifier.Classifier(made, train.num_classes, preprocess)

  facts = {
    "dataset": _DATASET.value,
    "preset": _PRESET.value,
    "network": network(),
  }
  _long_tail.main(
    _long_tail.Experiment(
      name="cifar_long_tail",
      module=__name__,
      train=train,
      test=test,
      make_model=make_model,
      preset=make_preset(),
      facts=facts,
      methods=METHODS,
      alone=True,
      comparable=network() == "resnet_32" and not _SMOKE.value,
    )
  )


if __name__ == "__main__":
  _launch.run(main)
