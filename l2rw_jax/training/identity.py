"""The identity of a run: its settings and its data."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from absl import logging

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import fingerprint
from l2rw_jax.io import workdir
from l2rw_jax.training import config as config_lib

# Settings that may differ between processes: their hosts may have different CPUs.
LOCAL = ("data_workers",)
# These settings are not compared. Seeds are stored separately. The place of the data
# and the processes that read them do not affect the results. The others affect only
# rounding.
EXCLUDED = ("seeds", "num_devices", "steps_per_call", "device_map", "data", *LOCAL)
_ADVICE = "choose another --workdir, or delete this one."


def of_runs(
  config: config_lib.Config,
  splits: Sequence[examples_lib.Splits],
  folder: pathlib.Path,
) -> list[dict[str, Any]]:
  """The identity of the run of each seed, as JSON.

  Args:
    config: settings of the runs.
    splits: the data of each seed.
    folder: the folder of the runs.

  Returns:
    For each seed: "config" and "seed"; "data", a checksum of all data that the run
    uses; "settings", the settings with which the folder was prepared, see
    `workdir.prepare`.
  """
  settings = dataclasses.asdict(config)
  for name in EXCLUDED:
    del settings[name]
  folder_settings = workdir.settings_of(folder)
  return [
    {
      "config": settings,
      "seed": seed,
      "data": fingerprint.fingerprint(split)[:16],
      "settings": folder_settings,
    }
    for seed, split in zip(config.seeds, splits, strict=True)
  ]


def made_by(num_devices: int) -> dict[str, Any]:
  """The versions, the checksum of the code and the devices with which a run is made."""
  return {**workdir.made_by(), "num_devices": num_devices}


def check_run(old: Any, new: dict[str, Any], place: pathlib.Path) -> None:
  """Raises InputError unless a saved run is the requested one.

  Args:
    old: the identity that was saved with the run.
    new: the identity of the requested run.
    place: where `old` was saved, for the message.
  """
  if not isinstance(old, dict) or old.keys() != new.keys():
    raise base.InputError(
      f"{place} does not contain the settings and data of its run, because an earlier"
      f" version wrote it; {_ADVICE}"
    )
  rest = ("seed", "data")
  differences = [
    *workdir.changes(*({name: x[name] for name in rest} for x in (old, new))),
    *workdir.changes(old["config"], new["config"]),
  ]
  if new["settings"]:
    differences += workdir.saved_changes(place, old["settings"])
  _refuse(differences, place, f"seed {new['seed']} of another run")


def check_made_by(old: Any, new: dict[str, Any], place: pathlib.Path) -> None:
  """Raises InputError unless an unfinished run would continue with the same numbers.

  Only the number of devices may change. The change affects rounding and is logged.

  Args:
    old: the result of `made_by` that was saved with the checkpoint.
    new: the result of `made_by` in this process.
    place: the folder of the checkpoints, for the message.
  """
  old = dict(old) if isinstance(old, dict) else {}
  before = old.get("num_devices")
  if before not in (None, new["num_devices"]):
    logging.warning(
      "%s was saved on %d device(s), and the run continues on %d: its numbers differ by"
      " rounding from those of a run on the same number of devices throughout.",
      place,
      before,
      new["num_devices"],
    )
  old["num_devices"] = new["num_devices"]
  _refuse(workdir.changes(old, new), place, "a run of other versions, code or hardware")


def _refuse(differences: list[str], place: pathlib.Path, what: str) -> None:
  if differences:
    differences = list(dict.fromkeys(differences))
    raise base.InputError(
      f"{place} contains {what}: {'; '.join(differences)}. Undo these changes,"
      f" {_ADVICE}"
    )
