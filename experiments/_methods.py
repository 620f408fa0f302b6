"""The methods of the experiments, by name, and their own flags."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from l2rw_jax import base
from l2rw_jax import meta_network
from l2rw_jax.methods import absgd
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.methods import forward_correction
from l2rw_jax.methods import group_dro
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import s_model
from l2rw_jax.methods import warpi
from l2rw_jax.methods.mentornet import mentor_file

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
_ABSGD_LAMBDA = flags.DEFINE_float(
  "absgd_lambda",
  None,
  "ABSGD's; above 0 for rare classes, below for wrong labels. [in a long tail 2, else"
  " -5]",
)
_ABSGD_GAMMA = flags.DEFINE_float(
  "absgd_gamma",
  None,
  "Weight of the new batch in ABSGD's normalizer, in (0, 1]. [in a long tail 0.9,"
  " else 0.5]",
)
_ABSGD_ALPHA = flags.DEFINE_float(
  "absgd_alpha",
  None,
  "Of ABSGD's normalizer; divides the step. [in a long tail 1, else 0.5]",
)
_DEFERRED = flags.DEFINE_float(
  "deferred",
  None,
  "Share of the run after which deferred methods and ABSGD begin. [in a long tail the"
  " preset's, else 2/3]",
  0.0,
  1.0,
)
_GCE_THRESHOLD = flags.DEFINE_float(
  "gce_threshold",
  0.0,
  "Truncates the generalized cross-entropy below this probability, in [0, 1); an"
  " untrained network is below it everywhere. [not truncated]",
)
_TRANSITION_EPOCH = flags.DEFINE_integer(
  "transition_epoch",
  2,
  "Epoch at which forward_correction estimates who is taken for whom, and s_model_conf"
  " starts: before the wrong labels are known by heart.",
  lower_bound=1,
)


class AbsgdSetting(NamedTuple):
  """Settings of ABSGD; the defaults are those of its release for Clothing1M."""

  lam: float = -5.0
  gamma: float = 0.5
  alpha: float = 0.5


class Setting(NamedTuple):
  """What a method needs to know of the run.

  Attributes:
    lookahead_learning_rate: learning rate of the look-ahead step of meta-learned
      methods, a number or `step -> number`; in the papers it is the classifier's.
    num_steps: updates.
    noise_fraction: share of wrong labels, as the builder was asked for; for
      human labels, what they turned out to be.
    num_classes: C.
    deferred_epoch: the first, counted from 0, of what waits: balanced classes,
      ABSGD's finite lambda.
    absgd: where no flag says another.
    mwn_preset: Meta-Weight-Net's release, where no flag says another.
  """

  lookahead_learning_rate: meta_network.Schedule
  num_steps: int
  noise_fraction: float
  num_classes: int
  deferred_epoch: int = 0
  absgd: AbsgdSetting = AbsgdSetting()
  mwn_preset: str = "noise_stable"


Factory = Callable[[Setting], base.Method]


def _fine_tuning(setting: Setting) -> base.Method:
  return baselines.fine_tuning(max(1, setting.num_steps // 10))


def _meta_weight_net(setting: Setting) -> base.Method:
  preset = _MWN_PRESET.value or setting.mwn_preset
  return meta_weight_net.meta_weight_net(
    setting.lookahead_learning_rate, preset, every=_META_EVERY.value
  )


def _warpi(setting: Setting, deterministic: bool = False) -> base.Method:
  return warpi.warpi(
    setting.lookahead_learning_rate,
    num_samples=_WARPI_SAMPLES.value,
    deterministic=deterministic,
    every=_META_EVERY.value,
  )


def _advisor(setting: Setting) -> base.Method:
  return advisor.advisor(setting.lookahead_learning_rate, every=_META_EVERY.value)


def _curriculum(name: str) -> Factory:
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


def _mentor(curriculum: str, preset: str) -> Factory:
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


def _bare_settings() -> dict[str, Any]:
  return {"kappa": _BARE_KAPPA.value, "statistics": _BARE_STATISTICS.value}


def bare_weights(logits: base.Array, labels: base.Array) -> base.Array:
  """BARE's weights under its flags."""
  return bare.example_weights(logits, labels, **_bare_settings())


def _forml(setting: Setting) -> base.Method:
  return forml.forml(objective="mean", groups_fn=lambda batch: batch["label"])


def make_absgd(setting: Setting) -> base.Method:
  given = (_ABSGD_LAMBDA.value, _ABSGD_GAMMA.value, _ABSGD_ALPHA.value)
  lam, gamma, alpha = (
    preset if flag is None else flag
    for flag, preset in zip(given, setting.absgd, strict=True)
  )
  schedule = absgd.two_stage(lam, setting.deferred_epoch)
  return absgd.absgd(schedule, gamma=gamma, alpha=alpha)


METHODS: dict[str, Factory] = {
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
  "bare": lambda _: bare.bare(**_bare_settings()),
  "absgd": make_absgd,
  "focal": lambda _: baselines.focal(_FOCAL_GAMMA.value),
  "bootstrapping_soft": lambda _: baselines.bootstrapping("soft"),
  "bootstrapping_hard": lambda _: baselines.bootstrapping("hard"),
  "symmetric_cross_entropy": lambda _: baselines.symmetric_cross_entropy(),
  "generalized_cross_entropy": lambda _: baselines.generalized_cross_entropy(
    threshold=_GCE_THRESHOLD.value or None
  ),
  "forward_correction": lambda _: forward_correction.forward_correction(
    _TRANSITION_EPOCH.value
  ),
  "s_model": lambda _: s_model.s_model(),
  "s_model_conf": lambda _: s_model.s_model(
    from_epoch=_TRANSITION_EPOCH.value, initial="confusion"
  ),
  "group_dro": lambda _: group_dro.group_dro(),
}
_TRANSITION = ("forward_correction", "s_model_conf")
DEFERRED = ("absgd",)
_META_LEARNED = ("meta_weight_net", "warpi", "warpi_deterministic", "advisor")
_CURRICULA = ("self_paced", "focal_weight", "pd_mixture")
_MENTORS = ("mentornet_pd", "mentornet_dd")
# Flags, and the methods that they are for.
USED_BY: dict[str, tuple[str, ...]] = {
  "meta_every": _META_LEARNED,
  "mwn_preset": ("meta_weight_net",),
  "mentor": _MENTORS,
  "mentor_preset": _MENTORS,
  "mentor_percentile": (*_CURRICULA, *_MENTORS),
  "warpi_samples": ("warpi",),
  "bare_kappa": ("bare",),
  "bare_statistics": ("bare",),
  "focal_gamma": ("focal",),
  "absgd_lambda": ("absgd",),
  "absgd_gamma": ("absgd",),
  "absgd_alpha": ("absgd",),
  "gce_threshold": ("generalized_cross_entropy",),
  "transition_epoch": _TRANSITION,
  "deferred": DEFERRED,
}
NAMES = list(METHODS)


def check(names: Sequence[str], offered: Sequence[str] = NAMES) -> list[str]:
  """The names without repetitions.

  Raises:
    InputError: none is given, one is not offered, or a file of `--mentor` is no
      mentor.
  """
  for name in names or [""]:
    if name not in offered:
      raise base.InputError(f"--methods={name}: choose among {', '.join(offered)}.")
  for path in _MENTOR.value:
    mentor_file.read(path)
  return list(dict.fromkeys(names))


def focal_gamma() -> float:
  """Of the focal loss."""
  return _FOCAL_GAMMA.value


def deferred_share() -> float | None:
  """The share of the run that --deferred gives."""
  return _DEFERRED.value


def deferred_epoch(share: float, num_epochs: float) -> int:
  """The first epoch after --deferred, or else after a share of the run."""
  given = deferred_share()
  return int((share if given is None else given) * num_epochs + 1e-6)


def check_begins(
  name: str,
  setting: Setting,
  num_epochs: float,
  deferred: Sequence[str] = DEFERRED,
) -> None:
  """Raises InputError if what a method waits for lies beyond the end of the run.

  Args:
    name: of the method.
    setting: of the run.
    num_epochs: its length.
    deferred: names of the methods that wait for `setting.deferred_epoch`.
  """
  if name in _TRANSITION:
    epoch, flag = _TRANSITION_EPOCH.value, "transition_epoch"
  elif name in deferred:
    epoch, flag = setting.deferred_epoch, "deferred"
  else:
    return
  if epoch >= num_epochs:
    raise base.InputError(
      f"--methods={name} would begin at epoch {epoch} of {num_epochs:g}, so never:"
      f" lower --{flag} or train longer."
    )


def make(
  name: str, setting: Setting, offered: Mapping[str, Factory] = METHODS
) -> base.Method:
  """The `Method` behind a name."""
  return offered[name](setting)
