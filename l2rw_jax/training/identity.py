"""What decides the numbers of a run, so that no run is taken for another."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import fingerprint
from l2rw_jax.io import workdir
from l2rw_jax.training import config as config_lib

# Seeds and devices are kept elsewhere in the identity; dispatches only round.
_NOT_ASKED = ("seeds", "num_devices", "steps_per_call")
_ADVICE = "choose another --workdir or delete it."


def of_runs(
  config: config_lib.Config,
  splits: Sequence[examples_lib.Splits],
  folder: pathlib.Path,
) -> list[dict[str, Any]]:
  """The identity of the run of each seed, as JSON.

  Args:
    config: how to run.
    splits: the data of each seed.
    folder: where the runs are kept.

  Returns:
    For each seed: "config" and "seed"; "data", a checksum of everything that the run
    can see; "settings", those with which the folder was prepared.
  """
  asked = dataclasses.asdict(config)
  for name in _NOT_ASKED:
    del asked[name]
  settings = workdir.settings_of(folder)
  return [
    {
      "config": asked,
      "seed": seed,
      "data": fingerprint.fingerprint(split)[:16],
      "settings": settings,
    }
    for seed, split in zip(config.seeds, splits, strict=True)
  ]


def made_by(num_devices: int) -> dict[str, Any]:
  """The versions, code and devices that an unfinished run must go on with."""
  return {**workdir.made_by(), "num_devices": num_devices}


def check_run(old: Any, new: dict[str, Any], place: pathlib.Path) -> None:
  """Raises InputError unless a finished or unfinished run is the one asked for.

  Args:
    old: the identity that was kept with the run.
    new: the identity of the run that is asked for now.
    place: where the old one was kept, for the message.
  """
  if not isinstance(old, dict) or old.keys() != new.keys():
    raise base.InputError(
      f"{place} does not say which settings and data it was made with: an earlier"
      f" version wrote it; {_ADVICE}"
    )
  rest = ("seed", "data")
  differences = [
    *workdir.changes(*({name: x[name] for name in rest} for x in (old, new))),
    *workdir.changes(old["config"], new["config"]),
  ]
  if old["settings"] and new["settings"]:
    differences += workdir.setting_changes(old["settings"], new["settings"])
  _refuse(differences, place, f"seed {new['seed']} of another run")


def check_made_by(old: Any, new: dict[str, Any], place: pathlib.Path) -> None:
  """Raises InputError unless an unfinished run can go on to the same numbers.

  Args:
    old: `made_by` as it was kept with the checkpoint.
    new: `made_by` of this process.
    place: of the checkpoints, for the message.
  """
  differences = workdir.changes(old if isinstance(old, dict) else {}, new)
  _refuse(differences, place, "a run that was begun elsewhere")


def _refuse(differences: list[str], place: pathlib.Path, what: str) -> None:
  if differences:
    differences = list(dict.fromkeys(differences))
    raise base.InputError(
      f"{place} holds {what}: {'; '.join(differences)}. Run it as before, or {_ADVICE}"
    )
