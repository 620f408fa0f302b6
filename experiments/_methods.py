"""The methods of the label-noise experiments, by name, and their own flags."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from l2rw_jax import base
from l2rw_jax import mentor_file
from l2rw_jax import meta_network
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import warpi

_META_EVERY = flags.DEFINE_integer(
  "meta_every", 1, "Steps from one meta step to the next.", lower_bound=1
)
_MWN_PRESET = flags.DEFINE_enum(
  "mwn_preset",
  "noise_stable",
  list(meta_weight_net.PRESETS),
  "Meta-Weight-Net's release to follow.",
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


class Setting(NamedTuple):
  """What a method needs to know of the run.

  Attributes:
    look_ahead_rate: learning rate of the meta-learned methods' virtual SGD step,
      a number or `step -> number`; the papers' is the classifier's own.
    num_steps: updates.
    noise_fraction: share of wrong labels, as the builder was asked for; for
      human labels, what they turned out to be.
    num_classes: C.
  """

  look_ahead_rate: meta_network.Schedule
  num_steps: int
  noise_fraction: float
  num_classes: int


def _fine_tuning(setting: Setting) -> base.Method:
  return baselines.fine_tuning(max(1, setting.num_steps // 10))


def _meta_weight_net(setting: Setting) -> base.Method:
  return meta_weight_net.meta_weight_net(
    setting.look_ahead_rate, _MWN_PRESET.value, every=_META_EVERY.value
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


_METHODS: dict[str, Callable[[Setting], base.Method]] = {
  "uniform": lambda _: baselines.uniform(),
  "random": lambda _: baselines.random(),
  "clean_only": lambda _: baselines.clean_only(),
  "fine_tuning": _fine_tuning,
  "self_paced": _curriculum("self_paced"),
  "focal": _curriculum("focal"),
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
}
NAMES = list(_METHODS)


def check(names: Sequence[str]) -> list[str]:
  """The names without repetitions.

  Raises:
    InputError: none is given, or one is unknown.
  """
  for name in names or [""]:
    if name not in _METHODS:
      raise base.InputError(f"--methods={name}: choose among {', '.join(NAMES)}.")
  return list(dict.fromkeys(names))


def make(name: str, setting: Setting) -> base.Method:
  """The `Method` behind a name."""
  return _METHODS[name](setting)
