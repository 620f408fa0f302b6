"""The methods of the long-tail experiments: all of `_methods`, and what balances."""

from absl import flags

from experiments import _methods
from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import class_balance
from l2rw_jax.methods import baselines
from l2rw_jax.methods import ldam_drw

_BETA = flags.DEFINE_float(
  "beta", 0.9999, "Of the effective number of examples of a class, in [0, 1)."
)
_MAX_MARGIN = flags.DEFINE_float(
  "ldam_margin", 0.5, "LDAM's margin of the rarest class.", lower_bound=0.0
)
_SCALE = flags.DEFINE_float("ldam_scale", 30.0, "Of LDAM's cosines.", lower_bound=0.0)
# Of ABSGD's published command for CIFAR-10; LDAM's losses, scaled by 30, need a larger
# lambda than the plain cross-entropy's 2.
_ABSGD_ON_LDAM = _methods.AbsgdSetting(5.0, 0.7, 0.5)
flags.adopt_module_key_flags(_methods)


def _ldam(balance: str, hinge: bool = False) -> _methods.Factory:
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


def _absgd_ldam_drw(setting: _methods.Setting) -> base.Method:
  """ABSGD on LDAM's losses, weighted by class before the exponential, as released."""
  class_balance.check_beta(_BETA.value)
  ldam = ldam_drw.loss(_MAX_MARGIN.value, _SCALE.value)

  def weighted(outputs, batch, class_counts):
    per_class = class_balance.effective_number(class_counts, _BETA.value)
    return per_class[batch["label"]] * ldam(outputs, batch, class_counts)

  late = changed_loss.changed_loss(
    _methods.make_absgd(setting._replace(absgd=_ABSGD_ON_LDAM)),
    weighted,
    from_epoch=setting.deferred_epoch,
  )
  return changed_loss.changed_loss(late, ldam)


# These need class counts that differ, or a classifier of cosines (ldam).
METHODS: dict[str, _methods.Factory] = {
  **_methods.METHODS,
  "class_proportion": lambda _: baselines.class_proportion(),
  "hard_mining": lambda _: baselines.hard_mining(),
  "resampling": lambda _: baselines.resampling(),
  "class_balanced": lambda _: baselines.class_balanced(_BETA.value),
  "class_balanced_focal": lambda _: baselines.class_balanced_focal(
    _methods.focal_gamma(), _BETA.value
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
NAMES = list(METHODS)
DEFERRED = (
  *_methods.DEFERRED,
  *("absgd_ldam_drw", "uniform_drw", "uniform_drs"),
  *("ldam_drw", "ldam_drs", "ldam_hinge_drs"),
)
_LDAM = tuple(name for name in NAMES if "ldam" in name)
_ABSGD = ("absgd", "absgd_ldam_drw")
# Flags, and the methods that they are for.
USED_BY: dict[str, tuple[str, ...]] = {
  **_methods.USED_BY,
  "focal_gamma": ("focal", "class_balanced_focal"),
  **dict.fromkeys(("absgd_lambda", "absgd_gamma", "absgd_alpha"), _ABSGD),
  **dict.fromkeys(("ldam_margin", "ldam_scale"), _LDAM),
  "deferred": DEFERRED,
  "beta": (
    *("class_balanced", "class_balanced_focal", "uniform_drw", "ldam_drw"),
    "absgd_ldam_drw",
  ),
}


def needs_cosines(name: str) -> bool:
  """Whether a method's network must have a classifier of cosines."""
  return "ldam" in name
