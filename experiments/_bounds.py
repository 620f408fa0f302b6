"""What the flags of the scripts may be: one table of bounds, and plain errors."""

from collections.abc import Iterable, Mapping
import math
import re
from typing import Any, NamedTuple

from absl import flags
import jax

from l2rw_jax import base


class Bounds(NamedTuple):
  """The values that a numeric flag may have.

  Attributes:
    low: the least.
    high: the greatest.
    magnitude: the least distance from 0.
  """

  low: float
  high: float
  magnitude: float = 0.0

  def holds(self, value: float) -> bool:
    """Whether a flag may have the value; NaN never may."""
    return self.low <= value <= self.high and abs(value) >= self.magnitude

  def __str__(self) -> str:
    """For an error."""
    said = f"between {_plain(self.low)} and {_plain(self.high)}"
    if self.magnitude:
      said += f", at least {self.magnitude:g} away from 0"
    return said


# Positive numbers that float32 tells from 0, and numbers below 1 that it tells from 1.
_TINY, _BELOW_ONE = 1e-12, 0.999999
# High enough that a run which diverges is reported by the loop, at the step where it
# happens.
_RATE = Bounds(_TINY, 1e20)
_SHARE = Bounds(0, 1)
_INNER_SHARE = Bounds(1e-6, _BELOW_ONE)
_COEFFICIENT = Bounds(0, 1e6)
_STEPS = Bounds(1, 10**9)
_EPOCHS = Bounds(1, 10**6)
_REPEATS = Bounds(1, 10**4)
_BATCH = Bounds(1, 10**6)
_IMAGES = Bounds(0, 10**8)

# By name: a name means the same in every script.
BOUNDS: Mapping[str, Bounds] = {
  "absgd_alpha": Bounds(1e-6, 1e6),
  "absgd_gamma": Bounds(1e-6, 1),
  "absgd_lambda": Bounds(-1e6, 1e6, 1e-6),
  "bare_kappa": Bounds(0, 1e3),
  "batch_size": _BATCH,
  "beta": Bounds(0, 0.9999999),
  "checkpoint_every": _STEPS,
  "clip": Bounds(_TINY, 1e6),
  "deferred": _SHARE,
  "epochs": _EPOCHS,
  "epsilon": _INNER_SHARE,
  "eval_every": _STEPS,
  "every": _STEPS,
  "focal_gamma": Bounds(0, 100),
  "fraction": Bounds(1e-6, 1),
  "gce_threshold": Bounds(0, _BELOW_ONE),
  "greedy_epsilon": _INNER_SHARE,
  "hard_mining_batch": _BATCH,
  "imbalance": Bounds(1, 1e6),
  "image_size": Bounds(4, 1024),
  "inner_learning_rate": _RATE,
  "l2rw_steps": _STEPS,
  "ldam_margin": Bounds(0, 1e3),
  "ldam_scale": Bounds(1e-6, 1e4),
  "learning_rate": _RATE,
  "lookahead_learning_rate": _RATE,
  "majority": Bounds(1e-6, _BELOW_ONE),
  "mean_coefficient": _COEFFICIENT,
  "mentor_percentile": Bounds(0, 100),
  "meta_batch_size": _BATCH,
  "meta_every": _STEPS,
  "minority_share": _INNER_SHARE,
  "momentum": Bounds(0, _BELOW_ONE),
  "noise_fraction": _SHARE,
  "noise_share": _SHARE,
  "num_adaptation_steps": Bounds(0, 10**4),
  "num_clusters": Bounds(1, 10**6),
  "num_devices": Bounds(1, 10**5),
  "num_epochs": _EPOCHS,
  "num_exemplars": _IMAGES,
  "num_inner_steps": Bounds(0, 10**4),
  "num_meta": _IMAGES,
  "num_meta_tasks": Bounds(1, 10**6),
  "num_pictures": Bounds(0, 10**5),
  "num_queries": Bounds(1, 10**5),
  "num_rows": Bounds(2, 1_200_000),
  "num_seeds": _REPEATS,
  "num_shots": Bounds(1, 10**5),
  "num_splits": _REPEATS,
  "num_steps": _STEPS,
  "num_tasks": Bounds(1, 10**6),
  "num_test": _IMAGES,
  "num_test_tasks": Bounds(2, 10**6),
  "num_train": Bounds(1, 10**8),
  "num_unlabeled": _IMAGES,
  "num_validation": _IMAGES,
  "num_ways": Bounds(2, 10**4),
  "ood_share": Bounds(0, _BELOW_ONE),
  "part": Bounds(1, 10**6),
  "percentile": Bounds(0, 100),
  "probe_batch_size": _BATCH,
  "refresh_every": _EPOCHS,
  "repeats": _REPEATS,
  "restarts": Bounds(1, 1000),
  "seconds": Bounds(0, 1e7),
  "seed": Bounds(0, 2**31 - 1),
  "seeds_at_once": _REPEATS,
  "splits_at_once": _REPEATS,
  "steps_per_call": Bounds(1, 10**6),
  "temperature": _COEFFICIENT,
  "transition_epoch": _EPOCHS,
  "warpi_samples": Bounds(1, 1000),
  "weight_decay": Bounds(0, _BELOW_ONE),
  # FORML's and NestedMAML's are in units of their weights; 0 leaves them as they are.
  "weight_learning_rate": Bounds(0, 1e9),
  "width": Bounds(1, 4096),
}

# Flags that decide how much memory a run takes, the likeliest cause first.
_MEMORY = (
  *("networks", "width", "warpi_samples", "restarts", "num_tasks", "num_meta_tasks"),
  *("num_test_tasks", "num_ways", "num_shots", "num_queries", "num_inner_steps"),
  *("seeds_at_once", "splits_at_once", "num_seeds", "num_rows", "batch_size"),
  *("meta_batch_size", "hard_mining_batch", "probe_batch_size", "num_train"),
)

# Parameters of the library whose flag has another name.
_FLAG_OF = {
  "num_meta_per_class": "num_meta",
  "foreign_share": "ood_share",
  "fraction": "noise_fraction",
  "percentile": "mentor_percentile",
}


def check(values: Mapping[str, Any]) -> None:
  """Raises InputError if a flag is beyond its bounds or an empty string.

  Args:
    values: by the name of the flag; a list holds those of a repeated flag.
  """
  for name, given in values.items():
    for value in given if isinstance(given, list) else [given]:
      if isinstance(value, float) and not math.isfinite(value):
        raise base.InputError(f"--{name}={value} is not a finite number.")
      if isinstance(value, bool) or not isinstance(value, int | float):
        continue
      if name in BOUNDS and not BOUNDS[name].holds(value):
        raise base.InputError(
          f"--{name}={_plain(value)} must lie {BOUNDS[name]}: choose another number."
        )
    if given == "" or (isinstance(given, list) and name == "mentor" and "" in given):
      raise base.InputError(f"--{name}= is empty: give a value or leave the flag out.")


def check_used(name: str, is_used: bool, where: str) -> None:
  """Raises InputError if a flag is given where it has no effect.

  Args:
    name: of the flag.
    is_used: whether it has one.
    where: it has none, such as "with --ood=none".
  """
  if flags.FLAGS[name].present and not is_used:
    raise base.InputError(f"--{name} has no effect {where}: leave it out.")


def unused(used_by: Mapping[str, Iterable[str]], methods: Iterable[str]) -> str:
  """Which flags were given for methods that are not run, a line each.

  They are allowed, since a later call may add such a method to the same folder.

  Args:
    used_by: flag -> the methods that it is for.
    methods: those run.
  """
  chosen = set(methods)
  lines = [
    f"note: --{name} has no effect here; it is for --methods={','.join(users)}.\n"
    for name, users in used_by.items()
    if flags.FLAGS[name].present and not chosen.intersection(users)
  ]
  return "".join(lines)


def check_ascii(arguments: Iterable[str], values: flags.FlagValues) -> None:
  """Raises InputError if a flag that is no path is given in characters beyond ASCII.

  Python reads the digits of every script as numbers, so that no later check sees
  them.

  Args:
    arguments: of the command line.
    values: the flags that are defined.
  """
  arguments = list(arguments)
  for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
    name, is_joined, value = argument.lstrip("-").partition("=")
    if not argument.startswith("-") or name not in values:
      continue
    kind, value = values[name].flag_type(), value if is_joined else following
    if kind in ("string", "multi string", "bool") or value.isascii():
      continue
    raise base.InputError(f"--{name}={value}: write it in ASCII, digits as 0 to 9.")


def is_out_of_memory(error: Exception) -> bool:
  """Whether NumPy, Python or XLA could not get the memory that it asked for."""
  if isinstance(error, jax.errors.JaxRuntimeError):
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
  return isinstance(error, MemoryError)


def out_of_memory(names: Iterable[str]) -> str:
  """The error of a run that does not fit, with the flags that decide its memory."""
  there = set(names)
  deciding = ", ".join(f"--{name}" for name in _MEMORY if name in there)
  return f"out of memory: lower one of {deciding}." if deciding else "out of memory."


def in_terms_of_flags(message: str, names: Iterable[str]) -> str:
  """An error of the library, with flags in place of the parameters they set.

  A word is taken for a parameter if it has an underscore or "=" follows it.

  Args:
    message: of the error.
    names: of the flags that are defined.
  """
  there = set(names)
  flag_of = {k: v for k, v in _FLAG_OF.items() if k not in there and v in there}
  flag_of |= {name: name for name in there}

  def replaced(found: re.Match) -> str:
    word = found[0]
    is_parameter = "_" in word or message[found.end() : found.end() + 1] == "="
    return f"--{flag_of[word]}" if is_parameter and word in flag_of else word

  return re.sub(r"(?<![\w./'\"-])[a-z]\w*(?![\w./'\"-])", replaced, message)


def _plain(value: float) -> str:
  if isinstance(value, int):
    return str(value) if abs(value) < 10**30 else f"{str(value)[:20]}..."
  return f"{value:g}" if value == int(value) else str(value)
