"""How each paper trains on CIFAR with wrong labels: networks, schedules, presets."""

from collections.abc import Callable
import dataclasses
import functools

from flax import linen as nn

from experiments import _optimizer_config
from l2rw_jax.data import sources
from l2rw_jax.models import augmentation
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.models import preactivation_resnet
from l2rw_jax.models import resnet
from l2rw_jax.models import wide_resnet
from l2rw_jax.training import devices

# Networks with BatchNorm share its statistics over all devices. The number of
# parameters is that of 10 classes.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "resnet_32": resnet.ResNet,  # post-activation, 464,154
  "wrn_28_10": wide_resnet.WideResNet,  # 36,479,194
  "l2rw_resnet_32": preactivation_resnet.resnet_32,  # 462,954
  "l2rw_wrn_28_10": preactivation_resnet.wrn_28_10,  # 36,211,178
  "mentornet_wrn_56_10": preactivation_resnet.LeakyWideResNet,  # 84,627,034
  # For trying things out:
  "resnet_8": functools.partial(resnet.ResNet, blocks=1),
  "mlp": lambda num_classes, axis_name, **options: mlp.MLP(num_classes, **options),
}

# Channel statistics as each released code has them.
_MWN = augmentation.Preprocess(
  pad=4,
  padding="reflect",
  flip=True,
  mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
  std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
)
_WARPI = dataclasses.replace(
  _MWN, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)
AUGMENTATIONS = {
  "none": augmentation.Preprocess(mean=(0.5,), std=(0.5,)),
  "l2rw": augmentation.Preprocess(pad=2, flip=True, mean=(0.5,), std=(0.5,)),
  "mwn": _MWN,
  "mentornet": augmentation.Preprocess(pad=2, flip=True, standardize=True),
  "warpi": _WARPI,
  "ldam": dataclasses.replace(_WARPI, padding="zero"),
}
_WARPI_100 = dataclasses.replace(
  _MWN, mean=(0.507, 0.487, 0.441), std=(0.267, 0.265, 0.276)
)


@dataclasses.dataclass(frozen=True)
class Preset:
  """One paper's way of training; flags of `cifar_noise` override each field.

  Attributes:
    network: a key of `NETWORKS`.
    augmentation: a key of `AUGMENTATIONS`.
    noise: builder of wrong labels.
    noise_fraction: its parameter.
    num_steps: updates.
    decay_steps: updates after which the learning rate falls to a tenth.
    learning_rate: of SGD, at first.
    momentum: of SGD.
    nesterov: whether momentum looks ahead.
    weight_decay: added to the gradient, times the parameters.
    decay_all: see `_optimizer_config`.
    batch_size: training examples a step.
    meta_batch_size: clean examples a step.
    num_meta: clean images a class, by number of classes.
    num_validation: images with wrong labels held out of training.
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
  # The first release: 20,000 iterations. BaseModel's published numbers are of a
  # longer schedule, see `cifar_noise`.
  "mwn_uniform": dataclasses.replace(
    _MWN_STABLE,
    network="wrn_28_10",
    num_steps=20_000,
    decay_steps=(18_000, 19_000),
    nesterov=True,
  ),
  # Its ResNet-32 alternative has the decays; the length of 60 epochs is the
  # paper's as remembered, not verified.
  "mwn_flip": dataclasses.replace(
    _MWN_STABLE,
    noise="mwn_flip2",
    num_steps=30_000,
    decay_steps=(20_000, 25_000),
    nesterov=True,
  ),
  # The later release; 120 epochs of 490 steps.
  "mwn_stable": _MWN_STABLE,
  # That wrong labels are drawn from all classes, the true one too, is not verified.
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
}


def smoke(preset: Preset) -> Preset:
  """A few steps of a small network on few images, to see that all of it runs."""
  return dataclasses.replace(
    preset,
    network="resnet_8",
    num_steps=3,
    decay_steps=(2,),
    batch_size=20,
    meta_batch_size=10,
    num_meta={10: 2, 100: 1},
    num_validation=min(preset.num_validation, 20),
  )


def first_images(source: sources.Source, size: int) -> sources.Source:
  """The beginning of a split, to try things out."""
  return source._replace(
    split=f"{source.split}[:{size}]",
    images=source.images[:size],
    labels=source.labels[:size],
    extra={name: labels[:size] for name, labels in source.extra.items()},
  )


def make_classifier(preset: Preset, num_classes: int) -> classifier.Classifier:
  """The network and its preprocessing, for the training loop."""
  preprocess = AUGMENTATIONS[preset.augmentation]
  if preset.augmentation == "warpi" and num_classes == 100:
    preprocess = _WARPI_100
  network = NETWORKS[preset.network](num_classes, axis_name=devices.AXIS_NAME)
  return classifier.Classifier(network, num_classes, preprocess)


def make_optimization(preset: Preset) -> _optimizer_config.OptimizerConfig:
  """The preset's optimizer and schedule; drops are kept as shares of the run."""
  return _optimizer_config.OptimizerConfig(
    learning_rate=preset.learning_rate,
    momentum=preset.momentum,
    nesterov=preset.nesterov,
    weight_decay=preset.weight_decay,
    drops=tuple((step / preset.num_steps, 0.1) for step in preset.decay_steps),
    decay_all=preset.decay_all,
  )
