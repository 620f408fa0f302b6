"""What a script may measure beside its training, and the flags of it."""

from typing import Any

from absl import flags

from experiments import _bounds
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import memorization

NAMES = ("susceptibility", "training_accuracy")

_PROBES = flags.DEFINE_list(
  "probes",
  [],
  f"Of {', '.join(NAMES)}: measured at the start and at every evaluation, kept in each"
  " run's metrics and results.json. Training is the same without.",
)
_IMAGES = flags.DEFINE_enum(
  "probe_images",
  "train",
  ["train", "validation"],
  "What susceptibility labels at random: the training images, or those held out.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "probe_batch_size", 128, "Randomly labeled images of susceptibility.", lower_bound=1
)


def chosen() -> tuple[evaluation.Probe, ...]:
  """The probes of `--probes`, for `loop.train`."""
  made = {
    "susceptibility": memorization.susceptibility(_BATCH_SIZE.value, _IMAGES.value),
    "training_accuracy": memorization.accuracy,
  }
  return tuple(made[name] for name in _names())


def given() -> dict[str, Any]:
  """Flags and values, for the settings of a folder; none if nothing is probed.

  So a folder from before there were probes still fits.
  """
  if not _names():
    return {}
  return {holder.name: holder.value for holder in (_PROBES, _IMAGES, _BATCH_SIZE)}


def check(split: examples_lib.Splits) -> None:
  """Raises InputError unless what is asked for can be measured on these data."""
  is_used = "susceptibility" in _names()
  for flag in ("probe_images", "probe_batch_size"):
    _bounds.check_used(flag, is_used, "without --probes=susceptibility")
  if not is_used:
    return
  images = getattr(split, _IMAGES.value).image
  try:
    memorization.check(split, images, _BATCH_SIZE.value)
  except base.InputError as error:
    raise base.InputError(
      f"--probe_images={_IMAGES.value}, --probe_batch_size={_BATCH_SIZE.value}: {error}"
    ) from error


def columns(metrics: dict[str, Any]) -> dict[str, float | None]:
  """Of a run's row: its susceptibility, if that was probed.

  Args:
    metrics: of the finished run.
  """
  if "susceptibility" not in _names():
    return {}
  return {"susceptibility": memorization.zeta(metrics)}


def _names() -> list[str]:
  for name in _PROBES.value:
    if name not in NAMES:
      raise base.InputError(f"--probes={name}: choose among {', '.join(NAMES)}.")
  return list(dict.fromkeys(_PROBES.value))
