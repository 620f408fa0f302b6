"""The methods of the experiments, by name, and their own flags."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax import mentor_file
from l2rw_jax import meta_network
from l2rw_jax.methods import absgd
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.methods import changed_loss
from l2rw_jax.methods import forml
from l2rw_jax.methods import group_dro
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import label_transition
from l2rw_jax.methods import ldam_drw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import s_model
from l2rw_jax.methods import warpi

_META_EVERY = flags.DEFINE_integer(
  "meta_every", 1, "Steps from one meta step to the next.", lower_bound=1
)
_MWN_PRESET = flags.DEFINE_enum(
  "mwn_preset",
  None,
  list(meta_weight_net.PRESETS),
  "Meta-Weight-Net's release to follow. [noise_stable; in a long tail imbalance]",
)
_MENTOR = flags.DEFINE_multi_string(
  "mentor",
  [],
  "Fitted mentor (mentor.json of mentornet_pretrain), one for each mentornet_NAME.",
)
_MENTOR_PRESET = flags.DEFINE_enum(
  "mentor_preset",
  None,
  list(mentornet.PRESETS),
  "Percentile, burn-in and dropout of the student. [by the curriculum]",
)
_MENTOR_PERCENTILE = flags.DEFINE_float(
  "mentor_percentile",
  None,
  "Of the losses, 0 to 100, that a curriculum compares with. [by the noise level]",
)
_WARPI_SAMPLES = flags.DEFINE_integer(
  "warpi_samples", 3, "Draws of WarPI's rectifying vector.", lower_bound=1
)
_BARE_KAPPA = flags.DEFINE_float(
  "bare_kappa", 1.0, "Deviations above the mean that BARE asks for.", lower_bound=0.0
)
_BARE_STATISTICS = flags.DEFINE_enum(
  "bare_statistics",
  "batch_column",
  bare.STATISTICS,
  "BARE's released code, or its paper's formula.",
)
_FOCAL_GAMMA = flags.DEFINE_float(
  "focal_gamma", 1.0, "Of the focal loss; LDAM's code has 1.", lower_bound=0.0
)
_BETA = flags.DEFINE_float(
  "beta", 0.9999, "Of the effective number of examples of a class, in [0, 1)."
)
_MAX_MARGIN = flags.DEFINE_float(
  "ldam_margin", 0.5, "LDAM's margin of the rarest class.", lower_bound=0.0
)
_SCALE = flags.DEFINE_float("ldam_scale", 30.0, "Of LDAM's cosines.", lower_bound=0.0)
_ABSGD_LAMBDA = flags.DEFINE_float(
  "absgd_lambda",
  None,
  "ABSGD's; above 0 for long tails, below for wrong labels. [2 and -5]",
)
_ABSGD_GAMMA = flags.DEFINE_float(
  "absgd_gamma", 0.9, "Weight of the new batch in ABSGD's normaliser, in (0, 1]."
)
_ABSGD_ALPHA = flags.DEFINE_float(
  "absgd_alpha", 1.0, "Of ABSGD's normaliser; it scales the step by its inverse."
)
_GCE_THRESHOLD = flags.DEFINE_float(
  "gce_threshold",
  0.0,
  "Truncates the generalised cross-entropy below this probability, in [0, 1); an"
  " untrained network is below it everywhere. [not truncated]",
)
_TRANSITION_EPOCH = flags.DEFINE_integer(
  "transition_epoch",
  2,
  "Epoch at which forward_correction estimates who is taken for whom, and s_model_conf"
  " starts: before the wrong labels are known by heart.",
  lower_bound=1,
)


class Setting(NamedTuple):
  """What a method needs to know of the run.

  Attributes:
    look_ahead_rate: learning rate of the meta-learned methods' virtual SGD step,
      a number or `step -> number`; the papers' is the classifier's own.
    num_steps: updates.
    noise_fraction: share of wrong labels, as the builder was asked for; for
      human labels, what they turned out to be.
    num_classes: C.
    deferred_epoch: the first, counted from 0, of what waits: balanced classes,
      ABSGD's finite lambda.
    absgd_lambda: where no flag says another.
    mwn_preset: Meta-Weight-Net's release, where no flag says another.
  """

  look_ahead_rate: meta_network.Schedule
  num_steps: int
  noise_fraction: float
  num_classes: int
  deferred_epoch: int = 0
  absgd_lambda: float = -5.0  # Clothing1M's
  mwn_preset: str = "noise_stable"


def _fine_tuning(setting: Setting) -> base.Method:
  return baselines.fine_tuning(max(1, setting.num_steps // 10))


def _meta_weight_net(setting: Setting) -> base.Method:
  preset = _MWN_PRESET.value or setting.mwn_preset
  return meta_weight_net.meta_weight_net(
    setting.look_ahead_rate, preset, every=_META_EVERY.value
  )


def _warpi(setting: Setting, deterministic: bool = False) -> base.Method:
  return warpi.warpi(
    setting.look_ahead_rate,
    num_samples=_WARPI_SAMPLES.value,
    deterministic=deterministic,
    every=_META_EVERY.value,
  )


def _advisor(setting: Setting) -> base.Method:
  return advisor.advisor(setting.look_ahead_rate, every=_META_EVERY.value)


def _curriculum(name: str) -> Callable[[Setting], base.Method]:
  """A predefined curriculum, without a network."""
  preset = {"pd_mixture": "pd"}.get(name, name)

  def make(setting):
    options = _student(preset, setting)
    return mentornet.mentornet(getattr(mentornet, name), **options)

  return make


def _student(preset: str, setting: Setting) -> dict[str, Any]:
  options = mentornet.preset(preset, setting.noise_fraction)
  if _MENTOR_PERCENTILE.value is not None:
    mentornet.check_percentile(_MENTOR_PERCENTILE.value)
    options["percentile"] = _MENTOR_PERCENTILE.value
  return options


def _mentor(curriculum: str, preset: str) -> Callable[[Setting], base.Method]:
  """A student of the mentor that was fitted to `curriculum`."""

  def make(setting):
    for path in _MENTOR.value:
      mentor = mentor_file.load(path, setting.num_classes)
      if mentor.curriculum == curriculum:
        options = _student(_MENTOR_PRESET.value or preset, setting)
        return mentornet.mentornet(mentor, **options)
    raise base.InputError(
      f"--methods=mentornet_{curriculum} needs a mentor of that curriculum: run"
      f" experiments.mentornet_pretrain --curriculum={curriculum} and name its"
      " mentor.json with --mentor."
    )

  return make


def _forml(setting: Setting) -> base.Method:
  return forml.forml(objective="mean", groups_fn=lambda batch: batch["label"])


def _ldam(balance: str, hinge: bool = False) -> Callable[[Setting], base.Method]:
  """LDAM with classes balanced late or never."""

  def make(setting):
    return ldam_drw.ldam_drw(
      _MAX_MARGIN.value,
      _SCALE.value,
      _BETA.value,
      None if balance == "none" else setting.deferred_epoch,
      hinge=hinge,
      balance=balance,
    )

  return make


def _absgd(setting: Setting) -> base.Method:
  lam = _ABSGD_LAMBDA.value
  lam = setting.absgd_lambda if lam is None else lam
  return absgd.absgd(
    absgd.two_stage(lam, setting.deferred_epoch),
    gamma=_ABSGD_GAMMA.value,
    alpha=_ABSGD_ALPHA.value,
  )


def _absgd_ldam_drw(setting: Setting) -> base.Method:
  """ABSGD on LDAM's losses, weighted by class before the exponential, as released."""
  class_balance.check_beta(_BETA.value)
  ldam = ldam_drw.loss(_MAX_MARGIN.value, _SCALE.value)

  def weighted(outputs, batch, class_counts):
    per_class = class_balance.effective_number(class_counts, _BETA.value)
    return per_class[batch["label"]] * ldam(outputs, batch, class_counts)

  late = changed_loss.changed_loss(
    _absgd(setting), weighted, from_epoch=setting.deferred_epoch
  )
  return changed_loss.changed_loss(late, ldam)


_METHODS: dict[str, Callable[[Setting], base.Method]] = {
  "uniform": lambda _: baselines.uniform(),
  "random": lambda _: baselines.random(),
  "clean_only": lambda _: baselines.clean_only(),
  "fine_tuning": _fine_tuning,
  "self_paced": _curriculum("self_paced"),
  "focal_weight": _curriculum("focal"),
  "pd_mixture": _curriculum("pd_mixture"),
  "mentornet_pd": _mentor("pd", "pd"),
  "mentornet_dd": _mentor("dd", "dd_resnet"),
  "l2rw": lambda _: l2rw.l2rw(),
  "meta_weight_net": _meta_weight_net,
  "warpi": _warpi,
  "warpi_deterministic": lambda setting: _warpi(setting, deterministic=True),
  "advisor": _advisor,
  "forml": _forml,
  "bare": lambda _: bare.bare(_BARE_KAPPA.value, _BARE_STATISTICS.value),
  "absgd": _absgd,
  "focal": lambda _: baselines.focal(_FOCAL_GAMMA.value),
  "bootstrapping_soft": lambda _: baselines.bootstrapping("soft"),
  "bootstrapping_hard": lambda _: baselines.bootstrapping("hard"),
  "symmetric_cross_entropy": lambda _: baselines.symmetric_cross_entropy(),
  "generalized_cross_entropy": lambda _: baselines.generalized_cross_entropy(
    threshold=_GCE_THRESHOLD.value or None
  ),
  "forward_correction": lambda _: label_transition.forward_correction(
    _TRANSITION_EPOCH.value
  ),
  "s_model": lambda _: s_model.s_model(),
  "s_model_conf": lambda _: s_model.s_model(
    from_epoch=_TRANSITION_EPOCH.value, initial="confusion"
  ),
  "group_dro": lambda _: group_dro.group_dro(),
}
# What needs class counts that differ or a classifier of cosines (ldam): offered in
# long tails only.
_IN_A_LONG_TAIL: dict[str, Callable[[Setting], base.Method]] = {
  "class_proportion": lambda _: baselines.class_proportion(),
  "resampling": lambda _: baselines.resampling(),
  "class_balanced": lambda _: baselines.class_balanced(_BETA.value),
  "class_balanced_focal": lambda _: baselines.class_balanced_focal(
    _FOCAL_GAMMA.value, _BETA.value
  ),
  "uniform_drw": lambda setting: baselines.class_balanced(
    _BETA.value, setting.deferred_epoch
  ),
  "uniform_drs": lambda setting: baselines.resampling(setting.deferred_epoch),
  "ldam": _ldam("none"),
  "ldam_hinge": _ldam("none", hinge=True),
  "ldam_drw": _ldam("reweight"),
  "ldam_drs": _ldam("resample"),
  "ldam_hinge_drs": _ldam("resample", hinge=True),
  "absgd_ldam_drw": _absgd_ldam_drw,
}
NAMES = list(_METHODS)
LONG_TAIL_NAMES = [*_METHODS, *_IN_A_LONG_TAIL]


def check(names: Sequence[str], offered: Sequence[str] = NAMES) -> list[str]:
  """The names without repetitions.

  Raises:
    InputError: none is given, or one is not offered.
  """
  for name in names or [""]:
    if name not in offered:
      raise base.InputError(f"--methods={name}: choose among {', '.join(offered)}.")
  return list(dict.fromkeys(names))


def needs_cosines(name: str) -> bool:
  """Whether a method's network must have a classifier of cosines."""
  return "ldam" in name


def make(name: str, setting: Setting) -> base.Method:
  """The `Method` behind a name."""
  return (_METHODS | _IN_A_LONG_TAIL)[name](setting)
