"""What every script shares: flags, one-line errors, the folder of the run."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import signal
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax

from experiments import _allocator
from experiments import _bounds
from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.training import config as config_lib

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of this experiment; run again to continue. [runs/NAME]"
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of prepared TFDS data sets. [TFDS_DATA_DIR, or TFDS's own]"
)
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", None, "Where decoded data sets are kept. [~/.cache/l2rw_jax]"
)
_NUM_DEVICES = flags.DEFINE_integer(
  "num_devices",
  None,
  "Local devices to train on. [the most that divide the batch]",
  lower_bound=1,
)
# But for rounding, only how fast a run is: a folder may be continued with another.
_STEPS_PER_DISPATCH = flags.DEFINE_integer(
  "steps_per_call",
  None,
  "Steps sent to the devices at once; more are faster, but for convolutions on CPU."
  " [1 on CPU, else 20]",
  lower_bound=1,
)
_CHECKPOINT_EVERY = flags.DEFINE_integer(
  "checkpoint_every", 1000, "Steps between two checkpoints.", lower_bound=1
)
# Flags whose value is the path of a file, or several: their content decides the
# outcome, wherever they lie.
_INPUTS = ("mentor", "dump")


def data_folders() -> dict[str, str | None]:
  """`data_dir` and `cache_dir`, as `sources.load` takes them."""
  return {"data_dir": _DATA_DIR.value, "cache_dir": _CACHE_DIR.value}


def run_config(**settings: Any) -> config_lib.Config:
  """How to run, with the flags that every script shares filled in."""
  return config_lib.Config(
    num_devices=_NUM_DEVICES.value,
    steps_per_call=_STEPS_PER_DISPATCH.value,
    checkpoint_every=_CHECKPOINT_EVERY.value,
    **settings,
  )


def prepare(
  name: str,
  module: str,
  extendable: tuple[str, ...],
  *more_modules: str,
  **more_settings: Any,
) -> pathlib.Path:
  """Opens the folder of the experiment; refuses one of other settings or files.

  Args:
    name: of the experiment, for the default folder.
    module: whose flags decide the outcome.
    extendable: flags that choose which runs to do, not how. A later call may
      give others: runs already there are not repeated, and the table holds
      what the last call asked for.
    *more_modules: whose flags decide it too.
    **more_settings: further ones, of flags that are told only when they are given.
  """
  found = flags_of(module, *more_modules) | more_settings
  inputs = dict(_mentors(found.pop("mentor", None) or []))
  if found.get("dump"):
    inputs["dump"] = str(found.pop("dump"))
  settings = {k: v for k, v in found.items() if k not in (*extendable, *_INPUTS)}
  settings["experiment"] = name
  return workdir.prepare(_WORKDIR.value or f"runs/{name}", settings, inputs)


def _mentors(paths: Any) -> Iterator[tuple[str, str]]:
  """Names and paths of mentors; there is one of each curriculum."""
  for path in paths:
    yield f"mentor of curriculum {mentor_file.load(path).curriculum}", path


def flags_of(*modules: str) -> dict[str, object]:
  """Every flag that decides a script's outcome, with its value."""
  found = {
    f.name: f.value
    for module in modules
    for f in flags.FLAGS.get_flags_for_module(module)
  }
  shared = (_NUM_DEVICES, _CHECKPOINT_EVERY)
  return found | {holder.name: holder.value for holder in shared}


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; mistakes end with one line and status 2.

  SIGINT, SIGTERM and SIGHUP end with one line and status 130, 143 and 129; a run that
  is training saves a checkpoint first.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  logging.set_verbosity(logging.WARNING)
  _allocator.keep_freed_memory()
  sys.unraisablehook = _report_unraisable

  def guarded(argv):
    try:
      if len(argv) > 1:
        raise base.InputError(f"unexpected argument {argv[1]!r}: flags begin with --.")
      given = {name: flags.FLAGS[name] for name in flags.FLAGS}
      _bounds.check({name: flag.value for name, flag in given.items() if flag.present})
      main()
    except (base.InputError, flags.Error) as error:
      _give_up(_bounds.in_terms_of_flags(str(error), flags.FLAGS))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if not _bounds.is_out_of_memory(error):
        raise
      _give_up(_bounds.out_of_memory(flags.FLAGS))
    except OSError as error:
      _give_up(f"{error.filename or 'input/output'}: {error.strerror}")
    except KeyboardInterrupt:
      _end_by(signal.SIGINT)
    except _Stopped as stopped:
      _end_by(stopped.number)

  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` has SIGHUP ignored.
      signal.signal(number, _stop)
  app.run(guarded, flags_parser=_parse)


class _Stopped(BaseException):
  """A signal asked the process to end."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = signal.Signals(number)


def _stop(number: int, frame: Any) -> None:
  del frame
  raise _Stopped(number)


def _end_by(number: signal.Signals) -> None:
  what = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
  with contextlib.suppress(OSError):  # The terminal may be closed.
    print(f"\n{what}; the same command continues.", file=sys.stderr, flush=True)
  sys.exit(128 + number)


def _report_unraisable(unraisable: Any) -> None:
  # After a failed read or write TensorStore still answers Orbax, whose event loop
  # is closed by then: a traceback for each answer, around our one line.
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _parse(argv: list[str]) -> list[str]:
  try:
    _bounds.check_ascii(argv[1:], flags.FLAGS)
    return flags.FLAGS(argv)
  except (base.InputError, flags.Error) as error:
    _give_up(error)
    raise  # not reached


def _give_up(error: object) -> None:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)
