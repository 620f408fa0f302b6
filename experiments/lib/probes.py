"""The flags of probes, which measure something while a script trains."""

import dataclasses
from typing import Any

from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import memorization

NAMES = ("susceptibility", "training_accuracy")


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flags of the probes."""

  probes: tuple[str, ...] = flag(
    (),
    "Quantities to measure at the start and at every evaluation: any of"
    f" {', '.join(NAMES)}. They are saved in each run's metrics and results.json, and"
    " do not change training.",
    group="output",
    recorded_with="probes",
  )
  probe_images: str = flag(
    "train",
    "Images that --probes=susceptibility labels at random: the training images, or"
    " held-out images.",
    choices=["train", "validation"],
    group="output",
    recorded_with="probes",
  )
  probe_batch_size: int = flag(
    128,
    "Number of images that --probes=susceptibility labels at random.",
    bounds=settings_lib.BATCH,
    group="output",
    recorded_with="probes",
  )

  def make_probes(self) -> tuple[evaluation.Probe, ...]:
    """The probes that `--probes` names, for `loop.train`."""
    all_probes = {
      "susceptibility": memorization.susceptibility(
        self.probe_batch_size, self.probe_images
      ),
      "training_accuracy": memorization.accuracy,
    }
    return tuple(all_probes[name] for name in self._names())

  def check_probes(self, split: examples_lib.Splits) -> None:
    """Raises InputError unless the probes can be measured on these data."""
    is_used = "susceptibility" in self._names()
    for name in ("probe_images", "probe_batch_size"):
      self.check_used(name, is_used, "without --probes=susceptibility")
    if not is_used:
      return
    images = getattr(split, self.probe_images).image
    try:
      memorization.check(split, images, self.probe_batch_size)
    except base.InputError as error:
      raise base.InputError(
        f"--probe_images={self.probe_images},"
        f" --probe_batch_size={self.probe_batch_size}: {error}"
      ) from error

  def probe_columns(self, metrics: dict[str, Any]) -> dict[str, float | None]:
    """The columns of a run's row: its susceptibility, if it was measured.

    Args:
      metrics: metrics of the finished run.
    """
    if "susceptibility" not in self._names():
      return {}
    return {"susceptibility": memorization.zeta(metrics)}

  def _names(self) -> list[str]:
    if not self.probes:
      return []
    return settings_lib.choose("probes", self.probes, NAMES)
