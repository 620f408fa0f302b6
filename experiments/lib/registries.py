"""Methods and networks by name, and the flags of the methods."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import numpy as np

from experiments.lib import optimizers
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import class_balance
from l2rw_jax import meta_network
from l2rw_jax import normalization
from l2rw_jax.methods import absgd
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.methods import forward_correction
from l2rw_jax.methods import group_dro
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import ldam_drw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import s_model
from l2rw_jax.methods import warpi
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.models import augmentation
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import preactivation_resnet
from l2rw_jax.models import resnet
from l2rw_jax.models import whitened
from l2rw_jax.models import wide_resnet

# The kinds of label noise of which there are two variants.
TWO_VARIANTS = ("uniform_flip", "background_flip", "mwn_flip", "mwn_flip2")
# Groups of methods that use the same flags.
L2RW = ("l2rw", "l2rw_equal")
META_LEARNED = ("meta_weight_net", "warpi", "warpi_deterministic", "advisor")
_MENTORS = ("mentornet_pd", "mentornet_dd")
_ABSGD = ("absgd", "absgd_ldam_drw")
_TRANSITION = ("forward_correction", "s_model_conf")
_LDAM = (
  *("ldam", "ldam_hinge", "ldam_drw", "ldam_drs", "ldam_hinge_drs"),
  "absgd_ldam_drw",
)
_DEFERRED = (
  *("absgd", "absgd_ldam_drw", "uniform_drw", "uniform_drs"),
  *("ldam_drw", "ldam_drs", "ldam_hinge_drs", "classifier_retraining"),
)


@dataclasses.dataclass(frozen=True)
class MemoryFlags(settings_lib.Flags):
  """The flags that save memory and do not change results."""

  microbatch_size: int | None = flag(
    None,
    "Number of examples of each batch that are in memory at a time, for each run on a"
    " device. The results are the same except for rounding, but a step takes longer."
    " The default is all. Networks with BatchNorm are refused.",
    bounds=settings_lib.BATCH,
    methods=[*L2RW, "meta_weight_net"],
    recorded=False,
  )
  mwn_recompute: bool = flag(
    False,
    "Process the training batch of Meta-Weight-Net a second time, instead of keeping"
    " its activations in memory. For a small ResNet, a step then takes 0.5 to 0.8 times"
    " the memory and 1.2 to 1.4 times the FLOPs.",
    methods=["meta_weight_net"],
    recorded=False,
  )


@dataclasses.dataclass(frozen=True)
class Settings(MemoryFlags, settings_lib.Settings):
  """The flags of the methods for wrong labels."""

  meta_every: int = flag(
    1,
    "Number of steps from one meta step to the next.",
    bounds=settings_lib.STEPS,
    methods=META_LEARNED,
  )
  l2rw_layers: tuple[str, ...] = flag(
    (),
    "Layers from which L2RW computes scores (an approximation): their names, or a"
    " number in (0, 1] for the last layers that together cost at most this share of all"
    " layers. The default is all layers.",
    methods=L2RW,
  )
  l2rw_refresh_every: int = flag(
    1,
    "Number of steps for which L2RW uses one gradient of the meta loss. A number above"
    " 1 is an approximation that lost much accuracy on MNIST"
    " (docs/methods/l2rw.md).",
    bounds=settings_lib.STEPS,
    methods=L2RW,
  )
  mwn_preset: str | None = flag(
    None,
    "Released program of Meta-Weight-Net to follow. The default is noise_stable (in the"
    " long-tail scripts: imbalance; in mnist_noise with --preset=bare: bare).",
    choices=meta_weight_net.PRESETS,
    methods=["meta_weight_net"],
  )
  mentor: tuple[str, ...] = flag(
    (),
    "File of a fitted mentor (mentor.json, which mentornet_pretrain writes), one for"
    " each method.",
    methods=_MENTORS,
    repeated=True,
  )
  mentor_preset: str | None = flag(
    None,
    "Preset of the percentile, burn-in and dropout of MentorNet's student. The default"
    " is the preset of the curriculum.",
    choices=mentornet.PRESETS,
    methods=_MENTORS,
  )
  mentor_percentile: float | None = flag(
    None,
    "Percentile of the losses, from 0 to 100, to which a curriculum compares each loss."
    " The default is 70 for self_paced and focal_weight; for the others it depends on"
    " the noise level.",
    bounds=(0, 100),
    methods=["self_paced", "focal_weight", "pd_mixture", *_MENTORS],
  )
  warpi_samples: int = flag(
    3,
    "Number of draws of WarPI's rectifying vector.",
    bounds=(1, 1000),
    methods=["warpi"],
  )
  bare_kappa: float = flag(
    1.0,
    "BARE keeps an example if the probability of its label is at least this number of"
    " standard deviations above the mean.",
    bounds=(0, 1e3),
    methods=["bare"],
  )
  bare_statistics: str = flag(
    "batch_column",
    "Examples over which BARE takes the mean and the deviation of a class: the whole"
    " batch (batch_column, as in its released code), or those labeled with the class"
    " (own_label, as in its paper's formula).",
    choices=bare.STATISTICS,
    methods=["bare"],
  )
  focal_gamma: float = flag(
    1.0,
    "Exponent of the focal loss, 1 in LDAM's code.",
    bounds=(0, 100),
    methods=["focal", "class_balanced_focal"],
  )
  absgd_lambda: float | None = flag(
    None,
    "Temperature of ABSGD: above 0 for rare classes, below 0 for wrong labels. The"
    " default is -5, and in a long tail 2 (absgd_ldam_drw: 5).",
    bounds=(-1e6, 1e6, 1e-6),
    methods=_ABSGD,
  )
  absgd_gamma: float | None = flag(
    None,
    "Weight of the new batch in ABSGD's normalizer, in (0, 1]. The default is 0.5, and"
    " in a long tail 0.9 (absgd_ldam_drw: 0.7).",
    bounds=(1e-6, 1),
    methods=_ABSGD,
  )
  absgd_alpha: float | None = flag(
    None,
    "Factor of the new batch in ABSGD's normalizer; it divides the learning rate. The"
    " default is 0.5, and in a long tail 1 (absgd_ldam_drw: 0.5).",
    bounds=(1e-6, 1e6),
    methods=_ABSGD,
  )
  deferred: float | None = flag(
    None,
    "Share of the run after which a method begins to weight or resample the examples,"
    " rounded down to a whole epoch.",
    unset="2/3",
    bounds=settings_lib.SHARE,
    methods=_DEFERRED,
  )
  gce_threshold: float = flag(
    0.0,
    "Probability in [0, 1) below which the generalized cross-entropy is truncated, so"
    " that its gradient is 0; 0 for no truncation. With a high threshold, an untrained"
    " network may learn from no example.",
    bounds=(0, settings_lib.BELOW_ONE),
    methods=["generalized_cross_entropy"],
  )
  transition_epoch: int = flag(
    2,
    "Epoch, counted from 0, at which forward_correction and s_model_conf estimate the"
    " label transitions, and begin to use them. It should come before the wrong labels"
    " are memorized.",
    bounds=settings_lib.EPOCHS,
    methods=_TRANSITION,
  )

  def input_files(self) -> dict[str, str]:
    """Maps a description of each mentor, by its curriculum, to the path of its file."""
    return {
      f"mentor of curriculum {mentor_file.load(path).curriculum}": path
      for path in self.mentor
    }

  def choose_methods(self, names: Sequence[str], offered: Sequence[str]) -> list[str]:
    """The names without repetitions.

    Raises:
      InputError: there are no names, a name is not offered, a file of `--mentor` is not
        a mentor, or two of these files have the same curriculum.
    """
    names = settings_lib.choose("methods", names, offered)
    paths: dict[str, str] = {}
    for path in self.mentor:
      curriculum = mentor_file.read(path)["curriculum"]
      if paths.setdefault(curriculum, path) != path:
        raise base.InputError(
          f"--mentor={path} and --mentor={paths[curriculum]} are both mentors of the"
          f" curriculum {curriculum}: give one of them."
        )
    return names

  def deferred_epoch(self, share: float, num_epochs: float) -> int:
    """The epoch in which the share --deferred, by default `share`, is reached."""
    share = share if self.deferred is None else self.deferred
    return int(share * num_epochs + 1e-6)

  def bare_weights(self, logits: base.Array, labels: base.Array) -> base.Array:
    """BARE's weights with the values of its flags."""
    return bare.example_weights(logits, labels, **self._bare())

  def _bare(self) -> dict[str, Any]:
    return {"kappa": self.bare_kappa, "statistics": self.bare_statistics}

  def _student(self, preset: str, noise_fraction: float) -> dict[str, Any]:
    options = mentornet.preset(preset, noise_fraction)
    if self.mentor_percentile is not None:
      mentornet.check_percentile(self.mentor_percentile)
      options["percentile"] = self.mentor_percentile
    return options


@dataclasses.dataclass(frozen=True)
class LongTailSettings(Settings):
  """The flags of the methods for a long tail."""

  beta: float = flag(
    0.9999,
    "Beta of the effective number of examples of a class, in [0, 1).",
    bounds=(0, 0.9999999),
    methods=[
      *("class_balanced", "class_balanced_focal", "uniform_drw", "ldam_drw"),
      "absgd_ldam_drw",
    ],
  )
  logit_tau: float = flag(
    1.0,
    "Factor of the logarithms of the class shares in logit adjustment.",
    bounds=(0, 100),
    methods=["logit_adjusted"],
  )
  ldam_margin: float = flag(
    0.5, "LDAM's margin of the rarest class.", bounds=(0, 1e3), methods=_LDAM
  )
  ldam_scale: float = flag(
    30.0, "Scale of LDAM's cosines.", bounds=(1e-6, 1e4), methods=_LDAM
  )


class Absgd(NamedTuple):
  """Settings of ABSGD; the defaults are those of its release for Clothing1M."""

  lam: float = -5.0
  gamma: float = 0.5
  alpha: float = 0.5


# These settings are from ABSGD's published command for CIFAR-10. LDAM's losses, which
# are scaled by 30, need a larger lambda than the plain cross-entropy (2).
_ABSGD_ON_LDAM = Absgd(5.0, 0.7, 0.5)


class Problem(NamedTuple):
  """The properties of a run that a method needs to know.

  Attributes:
    lookahead_learning_rate: learning rate of the look-ahead step of meta-learned
      methods, a number or `step -> number`; the papers use the classifier's rate.
    num_steps: number of updates.
    num_classes: C.
    noise_fraction: the parameter of the noise builder; for human labels, the actual
      share of wrong labels.
    deferred_epoch: the epoch, counted from 0, in which the deferred part of a method
      begins: it balances the classes or, for ABSGD, has a finite lambda.
    absgd: ABSGD's settings, unless flags give others.
    mwn_preset: Meta-Weight-Net's release, unless a flag gives another.
  """

  lookahead_learning_rate: meta_network.Schedule
  num_steps: int
  num_classes: int
  noise_fraction: float = 0.0
  deferred_epoch: int = 0
  absgd: Absgd = Absgd()
  mwn_preset: str = "noise_stable"


# `(settings, problem) -> method`. The settings are `LongTailSettings` for the methods
# that only `LONG_TAIL` has, and `Settings` for all others.
Factory = Callable[[Any, Problem], base.Method]


def simple_method(
  name: str,
  num_steps: int = 0,
  variants: Mapping[str, Callable[[], base.Method]] | None = None,
) -> base.Method:
  """The `Method` for a name, for scripts whose methods have few settings.

  Args:
    name: name of the method.
    num_steps: number of steps of the run, of which fine-tuning takes the last ones.
    variants: functions by name that make other methods, or methods with settings.
  """

  def fine_tuning():
    return baselines.fine_tuning(optimizers.fine_tuning_steps(num_steps))

  makers = {
    "uniform": baselines.uniform,
    "random": baselines.random,
    "class_proportion": baselines.class_proportion,
    "resampling": baselines.resampling,
    "hard_mining": baselines.hard_mining,
    "clean_only": baselines.clean_only,
    "fine_tuning": fine_tuning,
    # `optimizers.OptimizerConfig.for_method` starts the schedule again.
    "fine_tuning_restarted": fine_tuning,
    # `runner.train` reports the metrics at the lowest loss on the clean set.
    "early_stopped": lambda: baselines.uniform()._replace(needs_meta=True),
    "l2rw": l2rw.l2rw,
    "l2rw_equal": lambda: l2rw.l2rw(normalize=normalization.equal_weights),
    **(variants or {}),
  }
  return makers[name]()


def _simple(name: str) -> Factory:
  return lambda settings, problem: simple_method(name, problem.num_steps)


def _l2rw(normalize: l2rw.Normalize) -> Factory:
  def make(settings: Settings, problem: Problem) -> base.Method:
    layers: Any = settings.l2rw_layers or None
    if layers is not None and len(layers) == 1:
      try:
        layers = float(layers[0])
      except ValueError:
        layers = layers[0]
    return l2rw.l2rw(
      layers=layers,
      refresh_every=settings.l2rw_refresh_every,
      microbatch_size=settings.microbatch_size,
      normalize=normalize,
    )

  return make


def _meta_weight_net(settings: Settings, problem: Problem) -> base.Method:
  preset = settings.mwn_preset or problem.mwn_preset
  rate = problem.lookahead_learning_rate
  return meta_weight_net.meta_weight_net(
    rate,
    preset,
    every=settings.meta_every,
    microbatch_size=settings.microbatch_size,
    recompute=settings.mwn_recompute,
  )


def _warpi(deterministic: bool) -> Factory:
  return lambda settings, problem: warpi.warpi(
    problem.lookahead_learning_rate,
    num_samples=settings.warpi_samples,
    deterministic=deterministic,
    every=settings.meta_every,
  )


def _advisor(settings: Settings, problem: Problem) -> base.Method:
  return advisor.advisor(problem.lookahead_learning_rate, every=settings.meta_every)


def _curriculum(name: str, preset: str) -> Factory:
  """A predefined curriculum, without a mentor network."""
  return lambda settings, problem: mentornet.mentornet(
    getattr(mentornet, name), **settings._student(preset, problem.noise_fraction)
  )


def _mentor(curriculum: str, preset: str) -> Factory:
  """A student of the mentor that was fitted to `curriculum`."""

  def make(settings: Settings, problem: Problem) -> base.Method:
    for path in settings.mentor:
      mentor = mentor_file.load(path, problem.num_classes)
      if mentor.curriculum == curriculum:
        name = settings.mentor_preset or preset
        return mentornet.mentornet(
          mentor, **settings._student(name, problem.noise_fraction)
        )
    raise base.InputError(
      f"--methods=mentornet_{curriculum} needs a mentor of that curriculum: run"
      f" experiments.mentornet_pretrain --curriculum={curriculum} and name its"
      " mentor.json with --mentor."
    )

  return make


def _absgd(settings: Settings, problem: Problem) -> base.Method:
  given = (settings.absgd_lambda, settings.absgd_gamma, settings.absgd_alpha)
  lam, gamma, alpha = (
    preset if value is None else value
    for value, preset in zip(given, problem.absgd, strict=True)
  )
  schedule = absgd.two_stage(lam, problem.deferred_epoch)
  return absgd.absgd(schedule, gamma=gamma, alpha=alpha)


def _class_balanced_focal(settings: LongTailSettings, problem: Problem) -> base.Method:
  return baselines.class_balanced_focal(settings.focal_gamma, settings.beta)


def _uniform_drw(settings: LongTailSettings, problem: Problem) -> base.Method:
  return baselines.class_balanced(settings.beta, problem.deferred_epoch)


def _ldam(balance: str, hinge: bool = False) -> Factory:
  """LDAM with classes balanced late or never."""
  return lambda settings, problem: ldam_drw.ldam_drw(
    settings.ldam_margin,
    settings.ldam_scale,
    settings.beta,
    None if balance == "none" else problem.deferred_epoch,
    hinge=hinge,
    balance=balance,
  )


def _absgd_ldam_drw(settings: LongTailSettings, problem: Problem) -> base.Method:
  """ABSGD on LDAM's losses, which are weighted by class before the exponential.

  The released code of ABSGD does the same.
  """
  beta = settings.beta
  class_balance.check_beta(beta)
  ldam = ldam_drw.loss(settings.ldam_margin, settings.ldam_scale)

  def weighted(outputs, batch, class_counts):
    per_class = class_balance.effective_number(class_counts, beta)
    return per_class[batch["label"]] * ldam(outputs, batch, class_counts)

  late = changed_loss.changed_loss(
    _absgd(settings, problem._replace(absgd=_ABSGD_ON_LDAM)),
    weighted,
    from_epoch=problem.deferred_epoch,
  )
  return changed_loss.changed_loss(late, ldam)


# Methods for wrong labels.
NOISE: dict[str, Factory] = {
  "uniform": _simple("uniform"),
  "random": _simple("random"),
  "clean_only": _simple("clean_only"),
  "fine_tuning": _simple("fine_tuning"),
  "fine_tuning_restarted": _simple("fine_tuning_restarted"),
  "early_stopped": _simple("early_stopped"),
  "self_paced": _curriculum("self_paced", "self_paced"),
  "focal_weight": _curriculum("focal", "focal"),
  "pd_mixture": _curriculum("pd_mixture", "pd"),
  "mentornet_pd": _mentor("pd", "pd"),
  "mentornet_dd": _mentor("dd", "dd_resnet"),
  "l2rw": _l2rw(normalization.rectify),
  "l2rw_equal": _l2rw(normalization.equal_weights),
  "meta_weight_net": _meta_weight_net,
  "warpi": _warpi(deterministic=False),
  "warpi_deterministic": _warpi(deterministic=True),
  "advisor": _advisor,
  "forml": lambda settings, problem: forml.forml(
    objective="mean", groups_fn=lambda batch: batch["label"]
  ),
  "bare": lambda settings, problem: bare.bare(**settings._bare()),
  "absgd": _absgd,
  "focal": lambda settings, problem: baselines.focal(settings.focal_gamma),
  "bootstrapping_soft": lambda settings, problem: baselines.bootstrapping("soft"),
  "bootstrapping_hard": lambda settings, problem: baselines.bootstrapping("hard"),
  "symmetric_cross_entropy": lambda settings, problem: (
    baselines.symmetric_cross_entropy()
  ),
  "generalized_cross_entropy": lambda settings, problem: (
    baselines.generalized_cross_entropy(threshold=settings.gce_threshold or None)
  ),
  "forward_correction": lambda settings, problem: forward_correction.forward_correction(
    settings.transition_epoch
  ),
  "s_model": lambda settings, problem: s_model.s_model(),
  "s_model_conf": lambda settings, problem: s_model.s_model(
    from_epoch=settings.transition_epoch, initial="confusion"
  ),
  "group_dro": lambda settings, problem: group_dro.group_dro(),
}
# The methods above, and methods for long tails. The latter need class counts that
# differ, or logits that are cosines.
LONG_TAIL: dict[str, Factory] = {
  **NOISE,
  "class_proportion": _simple("class_proportion"),
  "hard_mining": _simple("hard_mining"),
  "resampling": _simple("resampling"),
  "class_balanced": lambda settings, problem: baselines.class_balanced(settings.beta),
  "class_balanced_focal": _class_balanced_focal,
  "balanced_softmax": lambda settings, problem: baselines.balanced_softmax(),
  "logit_adjusted": lambda settings, problem: baselines.logit_adjusted(
    settings.logit_tau
  ),
  "classifier_retraining": lambda settings, problem: baselines.classifier_retraining(
    problem.deferred_epoch
  ),
  "uniform_drw": _uniform_drw,
  "uniform_drs": lambda settings, problem: baselines.resampling(problem.deferred_epoch),
  "ldam": _ldam("none"),
  "ldam_hinge": _ldam("none", hinge=True),
  "ldam_drw": _ldam("reweight"),
  "ldam_drs": _ldam("resample"),
  "ldam_hinge_drs": _ldam("resample", hinge=True),
  "absgd_ldam_drw": _absgd_ldam_drw,
}


def needs_cosines(name: str) -> bool:
  """Whether the logits of a method's network must be cosines."""
  return name in _LDAM


def make_method(
  name: str, settings: Settings, problem: Problem, num_epochs: float
) -> base.Method:
  """The `Method` for a name in `LONG_TAIL`.

  Raises:
    InputError: the method would begin after the end of the run, its settings are
      invalid, or its mentor is missing.
  """
  if name in _TRANSITION:
    epoch, flag_name = settings.transition_epoch, "transition_epoch"
  else:
    epoch, flag_name = problem.deferred_epoch, "deferred"
  if name in (*_TRANSITION, *_DEFERRED) and epoch >= num_epochs:
    raise base.InputError(
      f"--methods={name} would begin after {epoch} epochs, and the run ends after"
      f" {num_epochs:g}: lower --{flag_name} or train longer."
    )
  return LONG_TAIL[name](settings, problem)


def _without_batch_statistics(network: Callable[..., nn.Module]) -> Callable:
  return lambda num_classes, axis_name=None, **options: network(num_classes, **options)


# `(number of classes, axis_name=..., ...) -> network`. Networks with BatchNorm share
# its statistics across devices. Comments give the number of parameters for 10 classes.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "resnet_32": resnet.ResNet,  # post-activation, 464,154
  "wrn_28_10": wide_resnet.WideResNet,  # 36,479,194
  "l2rw_resnet_32": preactivation_resnet.resnet_32,  # 462,954
  "l2rw_wrn_28_10": preactivation_resnet.wrn_28_10,  # 36,211,178
  "mentornet_wrn_56_10": preactivation_resnet.LeakyWideResNet,  # 84,627,034
  "resnet_8": functools.partial(resnet.ResNet, blocks=1),
  # The first layer of these six is computed from training images, see `make_network`.
  "whitened": whitened.WhitenedNet,  # 1,972,514
  "whitened_gn": functools.partial(whitened.WhitenedNet, norm="group"),
  "whitened_half": functools.partial(whitened.WhitenedNet, width=32),  # 497,826
  "whitened_half_gn": functools.partial(whitened.WhitenedNet, width=32, norm="group"),
  "whitened_quarter": functools.partial(whitened.WhitenedNet, width=16),  # 126,818
  "whitened_quarter_gn": functools.partial(
    whitened.WhitenedNet, width=16, norm="group"
  ),
  "lenet": _without_batch_statistics(lenet.LeNet),
  "mlp": _without_batch_statistics(mlp.MLP),
}
# Networks for digits; the MLP has a single hidden layer of 256 units.
SMALL_NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "mlp": _without_batch_statistics(functools.partial(mlp.MLP, hidden=(256,))),
  "lenet": NETWORKS["lenet"],
}
# Number of images from which a whitening layer is computed.
_WHITENING_IMAGES = 1000


def make_network(
  name: str,
  num_classes: int,
  images: np.ndarray,
  preprocess: Callable[..., Any] | None,
  **options: Any,
) -> nn.Module:
  """The network for a name in `NETWORKS`, with its whitening layer if it has one.

  Args:
    name: name of the network.
    num_classes: number of classes.
    images: training images, uint8 or float [N, H, W, C]. The first thousand determine
      the whitening layer, without their labels.
    preprocess: see `classifier.Classifier`.
    **options: options of the network.
  """
  if name.startswith("whitened"):
    first = augmentation.to_float(images[:_WHITENING_IMAGES])
    if preprocess is not None:
      first = preprocess(first, None, False)
    options["whitening"] = whitened.whitening_filters(np.asarray(first))
  return NETWORKS[name](num_classes, **options)


# The preprocessing of each released program, with its channel statistics.
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
  "whitened": dataclasses.replace(_MWN, pad=2),
}
# "warpi" for CIFAR-100.
WARPI_100 = dataclasses.replace(
  _MWN, mean=(0.507, 0.487, 0.441), std=(0.267, 0.265, 0.276)
)
