"""Runs a script as a program, with flags from its settings and one-line errors."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import dataclasses
import logging as std_logging
import os
import re
import signal
import sys
import textwrap
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax

from experiments.lib import distributed
from experiments.lib import settings as settings_lib
from l2rw_jax import base
from l2rw_jax import processes

Run = Callable[..., Any]
_HELP = ("help", "helpshort", "helpfull", "helpxml")
_WANTED = {int: "a whole number", float: "a number", bool: "true or false"}


def main(settings: type[settings_lib.Flags], run: Run, name: str = "") -> None:
  """Runs a script with the flags of the command line.

  After a mistake in the flags or the data, or if a file cannot be used or memory is not
  sufficient, the program prints one line and exits with status 2. After SIGINT, SIGTERM
  or SIGHUP it prints one line and exits with status 130, 143 or 129, respectively; a
  run that is training saves a checkpoint first. If one of several processes exits with
  status 2 or is stopped while it trains, the others end in the same way. If a process
  is lost, the others print one line and exit with status 75, or 134 if JAX notices the
  loss first.

  Args:
    settings: class of the script's settings, whose fields are the flags.
    run: `(settings, workdir) -> rows`.
    name: name of the experiment, for the default folder.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  logging.set_verbosity(logging.WARNING)
  # Only Orbax uses asyncio here. asyncio would log each failed task of a write.
  std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
  keep_freed_memory()
  sys.unraisablehook = _report_unraisable
  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores SIGHUP.
      signal.signal(number, _stop)

  def parse_all(argv):
    flags.FLAGS.mark_as_parsed()  # `parse` reads all flags.
    with _one_line_errors(settings):
      return parse(settings, argv[1:])

  def run_parsed(parsed):
    with _one_line_errors(settings):
      distributed.connect(parsed)
      _run(run, parsed, name)

  app.run(run_parsed, flags_parser=parse_all)


def execute(
  settings: type[settings_lib.Flags], run: Run, name: str, arguments: Sequence[str]
) -> None:
  """Like `main`, but with given arguments and without changes to the process.

  Raises:
    SystemExit: the arguments ask for help, or `main` would print one line and exit.
  """
  with _one_line_errors(settings):
    _run(run, parse(settings, arguments), name)


def _run(run: Run, settings: Any, name: str) -> None:
  run(settings, getattr(settings, "workdir", None) or f"runs/{name}")


def parse(settings: type[settings_lib.Flags], arguments: Sequence[str]) -> Any:
  """Parses the arguments of a command line into settings.

  Args:
    settings: class of the settings.
    arguments: arguments of the command line, without the program's name.

  Raises:
    InputError, flags.Error: an argument is invalid.
    SystemExit: the arguments asked for help, which has been printed.
  """
  values, kinds = _define(settings), settings_lib.kinds_of(settings)
  not_text = [
    spelling
    for name, details in settings_lib.flags_of(settings).items()
    if not (kinds[name].type is bool or _is_text(details, kinds[name]))
    for spelling in (name, *details.aliases)
  ]
  settings_lib.check_ascii(arguments, not_text)
  try:
    rest = values(["", *arguments])[1:]
  except flags.IllegalFlagValueError as error:
    raise base.InputError(_plain(str(error), settings)) from None
  except flags.CantOpenFlagFileError as error:
    reason = error.__context__
    path, why = getattr(reason, "filename", None), getattr(reason, "strerror", None)
    raise base.InputError(f"--flagfile={path}: {why or error}") from None
  if any(values[name].value for name in _HELP):
    try:
      _print_help(settings, values)
      sys.stdout.flush()
    except BrokenPipeError:  # For example, `--help | head` stops reading early.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)  # Every absl program exits with this status after --help.
  if rest:
    raise base.InputError(f"unexpected argument {rest[0]!r}: flags begin with --.")
  parsed = {name: values[name].value for name in kinds}
  given = frozenset(name for name in kinds if values[name].present)
  return settings(**parsed, given=given)


def _plain(message: str, settings: type[settings_lib.Flags]) -> str:
  """absl's message about a value of the wrong type, without names of Python types."""
  kinds = settings_lib.kinds_of(settings)
  wanted: dict[str, str | None] = {}
  for name, details in settings_lib.flags_of(settings).items():
    wanted |= dict.fromkeys((name, *details.aliases), _WANTED.get(kinds[name].type))
  match = re.fullmatch(r"flag --(\w+)=(.*?): .*", message, re.DOTALL)
  if match is None or wanted.get(match[1]) is None:
    return message
  return f"--{match[1]}={match[2]} is not {wanted[match[1]]}."


def _is_text(details: settings_lib.Flag, kind: settings_lib.Kind) -> bool:
  """Whether a flag accepts any text, such as a path."""
  single = not kind.several or details.repeated
  return kind.type is str and single and not details.choices


def _define(settings: type[settings_lib.Flags]) -> flags.FlagValues:
  """Defines absl flags for the fields of a class of settings."""
  values, kinds = flags.FlagValues(), settings_lib.kinds_of(settings)
  defaults = {f.name: f.default for f in dataclasses.fields(settings)}
  for name, details in settings_lib.flags_of(settings).items():
    kind = kinds[name]
    default: Any = defaults[name]
    define: Any
    if kind.several:
      default = None if default is None else list(default)
      lists = {int: flags.DEFINE_multi_integer, float: flags.DEFINE_multi_float}
      lists[str] = flags.DEFINE_multi_string if details.repeated else flags.DEFINE_list
      define = lists[kind.type]
    else:
      define = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
      }[kind.type]
    define(name, default, details.help, flag_values=values)
    for alias in details.aliases:
      flags.DEFINE_alias(alias, name, flag_values=values)
  for name in _HELP:
    flags.DEFINE_bool(name, False, "Print this help.", flag_values=values)
  for module, own_flags in flags.FLAGS.flags_by_module_dict().items():
    for absl_flag in own_flags if module.startswith("absl.") else ():
      if absl_flag.name not in values:
        values[absl_flag.name] = absl_flag
  return values


def _print_help(settings: type[settings_lib.Flags], values: flags.FlagValues) -> None:
  """Prints the description of the script, and its flags by group."""
  if values["helpxml"].value:
    values.write_help_in_xml_format(sys.stdout)
    return
  print((sys.modules[settings.__module__].__doc__ or "").rstrip())
  for group, title in settings_lib.GROUPS.items():
    lines = [
      _flag_help(name, details, settings)
      for name, details in settings_lib.flags_of(settings).items()
      if details.group == group
    ]
    if lines:
      print(f"\n{title}:", *lines, sep="\n")
  print("\nFlags of every absl program:")
  print("  --flagfile: Read flags from a file, one per line.")
  if not values["helpfull"].value:
    print("  --helpfull: Print the other flags of absl, too.")
    return
  for name in sorted(set(values) - set(settings_lib.flags_of(settings))):
    if "Alias for" not in values[name].help:
      print(f"  --{name}: {' '.join(values[name].help.split())}")


def _flag_help(
  name: str, details: settings_lib.Flag, settings: type[settings_lib.Flags]
) -> str:
  kind = settings_lib.kinds_of(settings)[name]
  default = next(f.default for f in dataclasses.fields(settings) if f.name == name)
  spelling = f"[no]{name}" if kind.type is bool else name
  choices = f"<{'|'.join(details.choices)}>: " if details.choices else ""
  notes = [details.help]
  if details.methods:
    notes.append(f"For --methods={','.join(details.methods)}.")
  if kind.several and (kind.type is not str or details.repeated):
    notes.append("Repeat the flag for several values.")
  if default is not None and default != ():
    text = ",".join(map(str, default)) if isinstance(default, tuple) else default
    notes.append(f"[default: {text}]")
  lines = textwrap.wrap(
    f"--{spelling}: {choices}{' '.join(notes)}",
    width=80,
    initial_indent="  ",
    subsequent_indent="    ",
    break_long_words=False,
    break_on_hyphens=False,
  )
  return "\n".join(lines)


@contextlib.contextmanager
def _one_line_errors(settings: type[settings_lib.Flags]) -> Iterator[None]:
  """Converts mistakes and interruptions into one line and an exit status."""
  names = settings_lib.flags_of(settings)
  try:
    yield
  except processes.EndedError as error:
    _lose(error)
  except (base.InputError, flags.Error) as error:
    _give_up(settings_lib.in_terms_of_flags(str(error), names))
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if processes.is_lost(error):
      _lose(error)
    if not settings_lib.is_out_of_memory(error):
      raise
    _give_up(settings_lib.out_of_memory(names))
  except OSError as error:
    _give_up(f"{error.filename or 'input/output'}: {error.strerror or error}")
  except KeyboardInterrupt:
    _end_by(signal.SIGINT)
  except _Stopped as stopped:
    _end_by(stopped.number)


class _Stopped(BaseException):
  """A signal asked the process to end."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = signal.Signals(number)


def _stop(number: int, frame: Any) -> None:
  del frame
  raise _Stopped(number)


def _end_by(number: signal.Signals) -> None:
  event = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
  distributed.leave(128 + number, f"\n{event}; rerun the same command to continue.")


def _lose(error: Exception) -> None:
  """Ends with one line because another process has ended."""
  # JAX repeats the same words for every call that could not be started.
  text = re.sub(r"([^:]+: )\1+", r"\1", " ".join(str(error).split()))
  reason = text[:200]
  distributed.leave(
    distributed.LOST_STATUS,
    f"error: another process ended or cannot be reached ({reason}); rerun the same"
    " command to continue.",
  )


def _report_unraisable(unraisable: Any) -> None:
  # After a failed read or write, TensorStore still answers Orbax, whose event loop is
  # already closed. Each answer would print a traceback next to the line of the error.
  # File objects that are garbage-collected later report the same failure again.
  if not _gave_up and str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


# True after a script has reported the mistake or failure that ends it.
_gave_up = False


def _give_up(error: object) -> None:
  global _gave_up
  _gave_up = True
  line = " ".join(str(error).split())
  distributed.leave(2, f"error: {line}", is_mistake=True)


# Constants of glibc's malloc.h, and the largest number that mallopt accepts.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
  """Lets glibc keep large freed blocks, instead of returning them to the system.

  A step of XLA:CPU takes its temporary memory from malloc and frees it afterwards.
  glibc returns blocks above 32 MiB to the system at once, so that every step causes a
  page fault for each page of this memory. When an L2RW step of LeNet still needed
  47 MiB, the page faults took up to a fifth of its time: it took 2.6 instead of 2.3
  times as long as a plain step with M = B, and 1.8 instead of 1.4 times with
  M = B / 10. In another program, setting `MALLOC_MMAP_THRESHOLD_=4294967296` and
  `MALLOC_TRIM_THRESHOLD_=17179869184` in the environment has the same effect.

  Returns:
    Whether the setting was changed; without glibc, it cannot be changed.
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
  return bool(mallopt(_MMAP_THRESHOLD, _MOST) and mallopt(_TRIM_THRESHOLD, _MOST))
