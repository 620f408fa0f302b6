"""The flags of probes, which measure something while a script trains."""

import dataclasses
import functools
from typing import Any

from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import memorization

NAMES = ("susceptibility", "training_accuracy")
_probe_flag = functools.partial(flag, group="output", recorded_with="probes")


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flags of the probes."""

  probes: tuple[str, ...] = _probe_flag(
    (),
    "Quantities to measure at the start and at every evaluation: any of"
    f" {', '.join(NAMES)}. They are saved in each run's metrics and results.json, and"
    " do not change training.",
  )
  probe_images: str = _probe_flag(
    "train",
    "Images that --probes=susceptibility labels at random: the training images, or"
    " held-out images.",
    choices=["train", "validation"],
  )
  probe_batch_size: int = _probe_flag(
    128,
    "Number of images that --probes=susceptibility labels at random.",
    bounds=settings_lib.BATCH,
  )

  def make_probes(self) -> tuple[evaluation.Probe, ...]:
    """The probes that `--probes` names, for `loop.train`."""
    size, images = self.probe_batch_size, self.probe_images
    all_probes = {
      "susceptibility": memorization.susceptibility(size, images),
      "training_accuracy": memorization.accuracy,
    }
    return tuple(all_probes[name] for name in self._names())

  def check_probes(self, split: examples_lib.Splits) -> None:
    """Raises InputError if the data do not suffice, or a flag has no effect."""
    is_used = "susceptibility" in self._names()
    for name in ("probe_images", "probe_batch_size"):
      self.check_used(name, is_used, "without --probes=susceptibility")
    if not is_used:
      return
    images = getattr(split, self.probe_images).image
    values = f"{self.probe_images}, --probe_batch_size={self.probe_batch_size}"
    with settings_lib.naming("probe_images", values):
      memorization.check(split, images, self.probe_batch_size)

  def probe_columns(self, metrics: dict[str, Any]) -> dict[str, float | None]:
    """The columns of a run's row: its susceptibility, if it was measured.

    Args:
      metrics: metrics of the finished run.
    """
    if "susceptibility" not in self._names():
      return {}
    return {"susceptibility": memorization.zeta(metrics)}

  def _names(self) -> list[str]:
    return settings_lib.choose("probes", self.probes, NAMES) if self.probes else []
