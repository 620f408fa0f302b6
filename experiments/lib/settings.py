"""Settings of a script: a frozen dataclass whose fields are its flags.

A field is declared with `flag`, which takes the text for `--help`, the allowed values,
and the methods that use the flag. This module does not read a command line: `launch`
does, and tests and notebooks construct settings directly.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import types
import typing
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import own_data
from l2rw_jax.data import sources
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices
from l2rw_jax.training import streaming


class Bounds(NamedTuple):
  """The values that a numeric flag may have.

  Attributes:
    low: the smallest value.
    high: the largest value.
    magnitude: the smallest absolute value.
  """

  low: float
  high: float
  magnitude: float = 0.0

  def holds(self, value: float) -> bool:
    """Whether a flag may have the value; NaN is never allowed."""
    return self.low <= value <= self.high and abs(value) >= self.magnitude

  def __str__(self) -> str:
    """Describes the bounds in an error message."""
    text = f"between {_plain(self.low)} and {_plain(self.high)}"
    if self.magnitude:
      text += f", at least {self.magnitude:g} away from 0"
    return text


# Lower bound of flags that must be above 0, and upper bound of flags that must be below
# 1. The bounds still differ from 0 and from 1 in float32.
TINY, BELOW_ONE = 1e-12, 0.999999
# The upper bound does not exclude runs that diverge; the training loop reports these,
# with the step at which they diverge.
RATE = Bounds(TINY, 1e20)
SHARE = Bounds(0, 1)
INNER_SHARE = Bounds(1e-6, BELOW_ONE)
COEFFICIENT = Bounds(0, 1e6)
STEPS = Bounds(1, 10**9)
EPOCHS = Bounds(1, 10**6)
REPEATS = Bounds(1, 10**4)
BATCH = Bounds(1, 10**6)
IMAGES = Bounds(0, 10**8)

# Maps the value of --data to whether images are read into memory.
_IN_MEMORY = {"auto": None, "resident": True, "stream": False}

# The headings of --help, in this order.
GROUPS = {
  "common": "Training and evaluation",
  "data": "Data",
  "method": "Methods",
  "processes": "Several processes",
  "output": "Output",
}

# These flags select runs, or do not change how a method is trained.
_SELECTING = (
  *("methods", "mentor", "num_seeds", "seeds_at_once", "num_devices", "eval_every"),
)


@contextlib.contextmanager
def naming(flag_name: str, value: Any) -> Iterator[None]:
  """Names a flag in the errors of a `with` block.

  If an error is about the name of a data set, the message also lists the kinds of names
  that exist.
  """
  try:
    yield
  except base.InputError as error:
    text = f"--{flag_name}={value}: {error}"
    if ": unknown data set" in text or ": each part of the data set name" in text:
      text += "; --data_dir names the folder of prepared data sets, and your own data"
      text += " are images:DIR, npz:FILE or csv:FILE"
    raise base.InputError(text) from error


class Flag(NamedTuple):
  """The properties of a flag in addition to its type and default.

  Attributes:
    help: full sentences for --help.
    group: key of `GROUPS`.
    choices: the strings allowed; None allows all.
    bounds: bounds of a number; None allows all finite numbers.
    methods: names of --methods that use the flag; empty if all do.
    aliases: older names of the flag, which still work.
    recorded: whether the value determines the results and is recorded in them.
    recorded_with: name of a flag. The value is recorded only if that flag does not have
      its default, because folders of older versions lack the entry.
    repeated: whether several strings are given by repeating the flag instead of
      separating them by commas.
  """

  help: str = ""
  group: str = "common"
  choices: tuple[str, ...] | None = None
  bounds: Bounds | None = None
  methods: tuple[str, ...] = ()
  aliases: Sequence[str] = ()
  recorded: bool = True
  recorded_with: str | None = None
  repeated: bool = False


# The end of the help of flags that take users' data.
OWN_DATA = "or your own data: images:DIR, npz:FILE or csv:FILE (docs/your_own_data.md)"

# The flags that several scripts have in common. A script sets the default and may
# replace the help text.
SHARED: Mapping[str, Flag] = {
  "num_seeds": Flag("Number of repetitions with different seeds.", bounds=REPEATS),
  "num_steps": Flag("Number of parameter updates.", bounds=STEPS),
  "num_epochs": Flag("Number of passes over the training set.", bounds=EPOCHS),
  "batch_size": Flag("Number of training examples in a step.", bounds=BATCH),
  "meta_batch_size": Flag("Number of clean examples in a step.", bounds=BATCH),
  "eval_every": Flag("Number of steps between two evaluations.", bounds=STEPS),
  "learning_rate": Flag("Learning rate of the optimizer.", bounds=RATE),
  "schedule": Flag(
    "Whether the learning rate stays constant or falls to 0 as a cosine."
  ),
  "momentum": Flag("Momentum of SGD.", bounds=Bounds(0, BELOW_ONE)),
  "weight_decay": Flag("Weight decay of the classifier.", bounds=Bounds(0, BELOW_ONE)),
  "network": Flag("Network to train."),
  "seeds_at_once": Flag("Number of seeds trained side by side.", bounds=REPEATS),
  "smoke": Flag(
    "Run a few steps of a small network on the first images, to try the script out."
  ),
  "preset": Flag("Settings to start from; other flags override them one by one."),
  "dataset": Flag(
    "Data set: digits (needs no download), the name of any image set that TFDS has"
    f" prepared in --data_dir, {OWN_DATA}.",
    "data",
  ),
  "noise": Flag("Kind of label noise.", "data"),
  "noise_fraction": Flag(
    "Parameter of --noise: the share of wrong labels.", "data", bounds=SHARE
  ),
  "noise_variant": Flag(
    "Variant of the label noise: that of the paper or of its released code.", "data"
  ),
  "imbalance": Flag(
    "Size of the largest class divided by that of the smallest.",
    "data",
    bounds=Bounds(1, 1e6),
  ),
  "num_meta": Flag("Number of clean images of each class.", "data", bounds=IMAGES),
  "num_validation": Flag(
    "Number of images, with the same label noise, that are held out of training.",
    "data",
    bounds=IMAGES,
  ),
  "num_train": Flag("Number of training images.", "data", bounds=Bounds(1, 10**8)),
  "methods": Flag("Methods to compare, separated by commas.", "method"),
  "inner_learning_rate": Flag(
    "Learning rate of the inner loop.", "method", bounds=RATE
  ),
  "lookahead_learning_rate": Flag(
    "Learning rate of the look-ahead step of the meta-learning methods.",
    "method",
    bounds=RATE,
  ),
  # The upper bound is high, because NestedMAML's gradients with respect to the weights
  # are small.
  "weight_learning_rate": Flag(
    "Learning rate of the weights; 0 keeps them constant.",
    "method",
    bounds=Bounds(0, 1e9),
  ),
  "dump_losses": Flag(
    "Save training losses in losses-seed-S.npz, to which a MentorNet-DD can be fitted.",
    "output",
  ),
}


def flag(
  default: Any,
  help: str | None = None,
  *,
  unset: str | None = None,
  choices: Iterable[str] | None = None,
  bounds: tuple[float, ...] | None = None,
  methods: Sequence[str] = (),
  **others: Any,
) -> Any:
  """Declares a field of a class of settings; the arguments are those of `Flag`.

  `bounds` may also be the arguments of `Bounds`, such as (0, 1).

  `unset` says what the default None means, and is added to the help text.

  Arguments that are missing are taken from `SHARED` by the name of the field. A flag
  that is not in `SHARED` belongs to the group "method" if only some methods use it.
  """
  details = {"help": help, "unset": unset, "methods": tuple(methods), **others}
  details["choices"] = None if choices is None else tuple(choices)
  details["bounds"] = None if bounds is None else Bounds(*bounds)
  return dataclasses.field(default=default, metadata=details)


# These declare flags whose default None means the value of --preset, and flags of the
# groups "data" and "processes".
preset_flag = functools.partial(flag, None, unset="the preset's")
data_flag = functools.partial(flag, group="data")
_process_flag = functools.partial(flag, group="processes", recorded=False)


def describe(values: Mapping[str, float]) -> str:
  """The values of methods as text for --help, such as "0.1 for l2rw; 1 for warpi"."""
  methods: dict[float, list[str]] = {}
  for name, value in values.items():
    methods.setdefault(value, []).append(name)
  return "; ".join(f"{value:g} for {', '.join(ns)}" for value, ns in methods.items())


def methods_flag(default: Any, offered: Iterable[str]) -> Any:
  """Declares the flag --methods of a script that compares some of `offered`."""
  return flag(default, f"Methods to compare: any of {', '.join(offered)}.")


def flags_of(settings: "type[Flags]") -> dict[str, Flag]:
  """The flags of a class of settings, by name, base classes first."""
  flags = {}
  for field in dataclasses.fields(settings):
    if "help" not in field.metadata:
      continue
    given = {k: value for k, value in field.metadata.items() if value is not None}
    unset = settings.UNSET.get(field.name, given.pop("unset", None))
    others = Flag(group="method" if given["methods"] else "common")
    details = SHARED.get(field.name, others)._replace(**given)
    if unset:
      details = details._replace(help=f"{details.help} The default is {unset}.")
    flags[field.name] = details
  return flags


class Kind(NamedTuple):
  """The type of one value of a flag, and whether the flag takes several values."""

  type: type
  several: bool


def kinds_of(settings: "type[Flags]") -> dict[str, Kind]:
  """The types of the flags of a class of settings."""
  hints, kinds = typing.get_type_hints(settings), {}
  for name in flags_of(settings):
    hint = hints[name]
    if isinstance(hint, types.UnionType):  # X | None
      (hint,) = (t for t in typing.get_args(hint) if t is not type(None))
    several = typing.get_origin(hint) is tuple
    kinds[name] = Kind(typing.get_args(hint)[0] if several else hint, several)
  return kinds


def show_report(name: str, data: own_data.OwnData) -> None:
  """Prints what was skipped or changed when a user's data were read."""
  for line in own_data.report(data):
    print(printable(f"{name}: {line}"))


def printable(text: str) -> str:
  """Escapes characters that a terminal cannot show or would execute."""
  return "".join(
    c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode()
    for c in text
  )


@functools.cache
def _load(name: str, split: str, **options: Any) -> sources.Source:
  return sources.load(name, split, **options)


@dataclasses.dataclass(frozen=True)
class Flags:
  """Base class of settings, which a script extends with its flags.

  Raises:
    InputError: a value is not allowed.
  """

  # These flags select runs but do not change them, so a later call may give other
  # values. Finished runs are not repeated, and the table has the runs of the last call.
  EXTENDABLE: ClassVar[tuple[str, ...]] = ()
  # Whether the script can train in several processes.
  SEVERAL_PROCESSES: ClassVar[bool] = False
  # What the default None of some flags means in this script, by the name of the flag;
  # it replaces the `unset` of the declaration.
  UNSET: ClassVar[Mapping[str, str]] = {}

  # Names of the flags that were given on the command line, even with their defaults.
  given: frozenset[str] = dataclasses.field(
    default=frozenset(), compare=False, repr=False, kw_only=True
  )

  def __post_init__(self):
    """Checks every value, and converts lists to tuples, which are hashable."""
    for name, details in flags_of(type(self)).items():
      value = getattr(self, name)
      if isinstance(value, list):
        object.__setattr__(self, name, tuple(value))
      check(name, value, details)

  def record(self) -> dict[str, Any]:
    """Every flag that determines the results, with its value as JSON."""
    defaults, entries = self._defaults(), {}
    for name, details in flags_of(type(self)).items():
      value, condition = getattr(self, name), details.recorded_with or name
      is_omitted = getattr(self, condition) == defaults[condition]
      if details.recorded and not (details.recorded_with and is_omitted):
        is_list = isinstance(value, tuple)
        entries[name] = list(value) if is_list else value
    return entries

  def input_files(self) -> dict[str, str]:
    """Maps names for error messages to the paths of the files that the run reads.

    The results depend on the contents of the files, not on their paths. The flags that
    name them must be in `EXTENDABLE`.
    """
    return {}

  def is_given(self, name: str) -> bool:
    """Whether a flag was given on the command line or differs from its default."""
    return name in self.given or getattr(self, name) != self._defaults()[name]

  def check_used(self, name: str, is_used: bool, where: str) -> None:
    """Raises InputError if a flag is given but has no effect.

    Args:
      name: name of the flag.
      is_used: whether the flag has an effect.
      where: the case in which it has no effect, such as "with --ood=none".
    """
    if self.is_given(name) and not is_used:
      raise base.InputError(f"--{name} has no effect {where}: leave it out.")

  def follows(
    self, protocol: Mapping[str, Any], method: str, but: Collection[str] = ()
  ) -> bool:
    """Whether a method is trained under a published protocol.

    The flags in `protocol` must have these values, and all others their defaults,
    except for those in `but`, those of other methods, and those that select runs or do
    not change how a method is trained.
    """
    wanted = {**self._defaults(), **protocol}
    return all(
      getattr(self, name) == wanted[name]
      for name, details in flags_of(type(self)).items()
      if details.recorded and details.group != "output"
      if name not in _SELECTING and name not in but
      if not details.methods or method in details.methods
    )

  def notes(self, offered: Sequence[str], chosen: Iterable[str]) -> str:
    """A line for each flag that was given for methods that are not run.

    Such flags are allowed, because a later call may add such a method to the folder.

    Args:
      offered: the methods of the script.
      chosen: the methods that are run.
    """
    chosen, lines = set(chosen), []
    for name, details in flags_of(type(self)).items():
      users = [method for method in details.methods if method in offered]
      if users and self.is_given(name) and not chosen.intersection(users):
        methods = ",".join(users)
        lines.append(
          f"note: --{name} has no effect here; it is for --methods={methods}."
        )
    return "".join(f"{line}\n" for line in lines)

  @classmethod
  def _defaults(cls) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}

  def replace(self, **values: Any) -> Self:
    """The settings with other values."""
    return dataclasses.replace(self, **values)


@dataclasses.dataclass(frozen=True)
class OutputFlags(Flags):
  """The flag of every script that writes a folder."""

  workdir: str | None = flag(
    None,
    "Folder of the results. The default is runs/NAME, where NAME is that of the"
    " script.",
    group="output",
    recorded=False,
  )


@dataclasses.dataclass(frozen=True)
class DataFlags(Flags):
  """The flags of every script that reads a data set of TFDS or of the user."""

  data_dir: str | None = data_flag(
    None,
    "Folder of prepared TFDS data sets. The default is the environment variable"
    " TFDS_DATA_DIR if it is set, and ~/tensorflow_datasets otherwise.",
    recorded=False,
  )
  cache_dir: str | None = data_flag(
    None,
    "Folder in which decoded data sets are kept. The default is l2rw_jax in the folder"
    " of the environment variable XDG_CACHE_HOME if it is set, and ~/.cache/l2rw_jax"
    " otherwise.",
    recorded=False,
  )

  def load(self, split: str, dataset: str | None = None) -> sources.Source:
    """A split of `--dataset`, or of another data set.

    A user's data are read once per settings object, and other sets once per process.
    """
    name = dataset or typing.cast(Any, self).dataset
    named = "ood" if getattr(self, "ood", None) == name else "dataset"
    with naming("datasets" if hasattr(self, "datasets") else named, name):
      if own_data.is_own(name):
        return sources.from_own(name, split, self.read_own(name, split))
      folders = {"data_dir": self.data_dir, "cache_dir": self.cache_dir}
      return _load(name, split, in_memory=self._in_memory(), **folders)

  def load_images(
    self, split: str, where: str = "this script", dataset: str | None = None
  ) -> sources.Source:
    """Like `load`, for networks and augmentations that take only images.

    Args:
      split: the split.
      where: what needs images, for the message.
      dataset: the data set; None is `--dataset`.

    Raises:
      InputError: the examples are not images.
    """
    source = self.load(split, dataset)
    if source.images.ndim != 4:
      raise base.InputError(
        f"{where} needs images [N, H, W, C], but --dataset={source.name} has examples"
        f" of shape {list(source.images.shape[1:])}."
      )
    return source

  def read_own(self, name: str, part: str) -> own_data.OwnData:
    """Reads a part of a user's data, such as images:DIR, on the first call only.

    What was skipped or changed in the training part is printed.
    """
    if (name, part) not in self._own:
      # Without `like`, `own_data.read` would read the training part again.
      like = self.read_own(name, "train").form if part == "test" else None
      data = own_data.read(name, part, in_memory=self._in_memory(), like=like)
      if part == "train":  # The notes on the test part are mostly the same.
        show_report(name, data)
      else:
        self._show_copies(name, data)
      self._own[name, part] = data
    return self._own[name, part]

  def _show_copies(self, name: str, test: own_data.OwnData) -> None:
    """Prints how many test examples equal training examples, if all are in memory."""
    parts = test.features, self.read_own(name, "train").features
    number = 0
    if all(isinstance(features, np.ndarray) for features in parts):
      number = own_data.num_copies(*parts)
    if number:
      print(
        printable(
          f"{name}: {number} of {len(test.labels)} test examples equal training"
          " examples. If they are copies, and not different examples with the same"
          " values, the test accuracy is too high: remove the duplicates."
        )
      )

  @functools.cached_property
  def _own(self) -> dict[tuple[str, str], own_data.OwnData]:
    """The data that `read_own` has read.

    They are kept with these settings, not for the whole process, because the files may
    change before a later run of the same process.
    """
    return {}

  def _in_memory(self) -> bool | None:
    """Whether images are read into memory; None decides by their size."""
    return None


@dataclasses.dataclass(frozen=True)
class ProcessFlags(Flags):
  """The flags of every script that trains, for a run in several processes."""

  SEVERAL_PROCESSES = True

  distributed: bool = _process_flag(
    False,
    "Connect to the other processes of this run, which JAX detects on a TPU pod and"
    " under Slurm, Open MPI or Kubernetes.",
  )
  coordinator_address: str | None = _process_flag(
    None, "Host and port of process 0, such as localhost:12345."
  )
  num_processes: int | None = _process_flag(
    None, "Number of processes of this run.", bounds=(1, 10**5)
  )
  process_id: int | None = _process_flag(
    None,
    "Number of this process, from 0. Process 0 writes all files.",
    bounds=(0, 10**5),
  )
  initialization_timeout: int = _process_flag(
    300, "Seconds to wait for the other processes at the start.", bounds=(1, 10**5)
  )


@dataclasses.dataclass(frozen=True)
class TrainingFlags(OutputFlags, ProcessFlags):
  """The flags of every script that trains with the training loop."""

  num_devices: int | None = flag(
    None,
    "Number of devices, over all processes. The default is the largest number that"
    " divides the batch or, with several processes, all devices.",
    bounds=(1, 10**5),
  )
  # These two flags affect only speed and rounding, so a run may be continued with other
  # values.
  device_map: str = flag(
    "pmap",
    "JAX function that runs a step on the devices; both run the same program.",
    choices=devices.MAPS,
    recorded=False,
  )
  steps_per_call: int | None = flag(
    None,
    "Number of steps sent to the devices at once. More are faster if a step takes a few"
    " milliseconds or less, but a second program is compiled. The default is 1 on CPU"
    " and 20 elsewhere.",
    bounds=(1, 10**6),
    aliases=["steps_per_dispatch"],
    recorded=False,
  )
  # These two flags affect only speed and memory.
  data: str = data_flag(
    "auto",
    "Where the training examples are: resident keeps them on the devices, stream reads"
    " them ahead of the steps that use them, and auto streams them if they do not fit"
    " (docs/your_own_data.md).",
    choices=config_lib.DATA,
    recorded=False,
  )
  data_workers: int | None = data_flag(
    None,
    "Number of worker processes that decode streamed images; 0 decodes them in threads."
    " The default is 0 on CPU, where training needs the cores, and the number of cores,"
    " at most 8, elsewhere.",
    bounds=(0, streaming.MOST_THREADS),
    recorded=False,
  )
  checkpoint_every: int = flag(
    1000, "Number of steps between two checkpoints.", bounds=STEPS, group="output"
  )
  workdir: str | None = flag(
    None,
    "Folder of the experiment; the same command continues an interrupted run. The"
    " default is runs/NAME, where NAME is that of the script.",
    group="output",
    recorded=False,
  )

  def config(self, **values: Any) -> config_lib.Config:
    """The configuration of a run: the values of the flags, and other values.

    Args:
      **values: fields of the configuration that have no flag of the same name, or whose
        value is not that of the flag.
    """
    names = (
      *("num_steps", "batch_size", "meta_batch_size", "eval_every"),
      *("num_devices", "device_map", "steps_per_call", "checkpoint_every", "data"),
    )
    flags = {name: getattr(self, name) for name in names if hasattr(self, name)}
    flags |= {"seeds": self.seeds} if hasattr(self, "num_seeds") else {}
    flags["data_workers"] = self._data_workers()
    return config_lib.Config(**flags | values)

  @property
  def seeds(self) -> tuple[int, ...]:
    """The seeds of the repetitions, for scripts with --num_seeds."""
    return tuple(range(typing.cast(Any, self).num_seeds))

  def make_probes(self) -> Sequence[Any]:
    """Additional probes for `loop.train`, which run at every evaluation."""
    return ()

  def _data_workers(self) -> int:
    if self.data_workers is not None:
      return self.data_workers
    if jax.default_backend() == "cpu":
      return 0
    return min(streaming.MOST_THREADS, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Settings(TrainingFlags, DataFlags):
  """The flags of every script that trains on a data set."""

  def _in_memory(self) -> bool | None:
    return _IN_MEMORY[self.data]


def check(name: str, value: Any, details: Flag) -> None:
  """Raises InputError if the value of a flag is not allowed.

  Args:
    name: name of the flag.
    value: value of the flag, or several values in a list or tuple.
    details: choices and bounds of the flag.
  """
  several = isinstance(value, list | tuple)
  for one in value if several else [value]:
    if isinstance(one, float) and not math.isfinite(one):
      raise base.InputError(f"--{name}={one} is not a finite number.")
    if isinstance(one, str) and details.choices and one not in details.choices:
      choices = "|".join(details.choices)
      raise base.InputError(f"--{name}={one}: value should be one of <{choices}>.")
    if isinstance(one, bool) or not isinstance(one, int | float):
      continue
    if details.bounds and not details.bounds.holds(one):
      raise base.InputError(
        f"--{name}={_plain(one)} must lie {details.bounds}: choose another number."
      )
  if value == "" or (several and details.repeated and "" in value):
    raise base.InputError(f"--{name}= is empty: give a value or leave the flag out.")


def choose(flag_name: str, names: Iterable[str], offered: Collection[str]) -> list[str]:
  """The names without repetitions.

  Raises:
    InputError: there are no names, or a name is not offered.
  """
  names = list(dict.fromkeys(names))
  if not names:
    raise base.InputError(
      f"--{flag_name}= is empty: choose among {', '.join(offered)}."
    )
  for name in names:
    if name not in offered:
      raise base.InputError(f"--{flag_name}={name}: choose among {', '.join(offered)}.")
  return names


def given_values(**values: Any) -> dict[str, Any]:
  """The values that are not None, which override those of a preset."""
  return {name: value for name, value in values.items() if value is not None}


# Flags that affect the memory of a run, the most likely cause first.
_MEMORY = (
  *("networks", "width", "warpi_samples", "restarts", "num_tasks", "num_meta_tasks"),
  *("num_test_tasks", "num_ways", "num_shots", "num_queries", "num_inner_steps"),
  *("seeds_at_once", "num_seeds", "num_rows", "batch_size"),
  *("meta_batch_size", "hard_mining_batch", "probe_batch_size", "num_train"),
)

# Maps parameters of the library to flags with other names.
_FLAG_OF = {
  "num_meta_per_class": "num_meta",
  "fraction": "noise_fraction",
  "layers": "l2rw_layers",
  "percentile": "mentor_percentile",
  "recompute": "mwn_recompute",
}


def is_out_of_memory(error: Exception) -> bool:
  """Whether NumPy, Python or XLA failed to allocate memory."""
  if isinstance(error, jax.errors.JaxRuntimeError):
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
  return isinstance(error, MemoryError)


def out_of_memory(names: Iterable[str]) -> str:
  """The error message when memory runs out; it names the flags that affect memory."""
  names = set(names)
  deciding = ", ".join(f"--{name}" for name in _MEMORY if name in names)
  if not deciding:
    return "out of memory."
  text = f"out of memory: lower one of {deciding}"
  if "microbatch_size" in names:
    text += ", or give --microbatch_size (l2rw and meta_weight_net without BatchNorm)"
  return f"{text}."


def in_terms_of_flags(message: str, names: Iterable[str]) -> str:
  """Replaces the parameters in an error message with the flags that set them.

  A word is a parameter if it has an underscore or is followed by "=". Text in double
  quotes is not changed, because it is a command.

  Args:
    message: error message of the library.
    names: names of the flags that are defined.
  """
  names = set(names)
  flag_of = {k: v for k, v in _FLAG_OF.items() if k not in names and v in names}
  flag_of |= {name: name for name in names}

  def replaced(match: re.Match) -> str:
    word = match[0]
    is_parameter = "_" in word or match.string[match.end() : match.end() + 1] == "="
    return f"--{flag_of[word]}" if is_parameter and word in flag_of else word

  parts = message.split('"')
  parts[::2] = [
    re.sub(r"(?<![\w./'-])[a-z]\w*(?![\w/'-]|\.\w)", replaced, part)
    for part in parts[::2]
  ]
  return '"'.join(parts)


def check_ascii(arguments: Iterable[str], names: Iterable[str]) -> None:
  """Raises InputError if an argument has a number or a choice that is not ASCII.

  Python's int() and float() accept the digits of every alphabet, so a later check would
  not detect them.

  Args:
    arguments: arguments of the command line.
    names: flags whose values must be ASCII.
  """
  arguments, names = list(arguments), set(names)
  for argument, following in itertools.zip_longest(
    arguments, arguments[1:], fillvalue=""
  ):
    name, is_joined, value = argument.lstrip("-").partition("=")
    value = value if is_joined else following
    if argument.startswith("-") and name in names and not value.isascii():
      raise base.InputError(f"--{name}={value}: write it in ASCII, digits as 0 to 9.")


def _plain(value: float) -> str:
  if isinstance(value, int):
    return str(value) if abs(value) < 10**30 else f"{str(value)[:20]}..."
  return f"{value:g}" if value == int(value) else str(value)
