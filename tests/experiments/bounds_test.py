"""Tests of the bounds of all flags, without importing the scripts that define them."""

import ast

from absl import flags
import jax
import pytest
import scripts

from experiments import _bounds
from l2rw_jax import base

_KINDS = [f"DEFINE_{k}" for k in ("integer", "float", "multi_float", "multi_integer")]


def _numeric_flags():
  """(name, default) of every numeric flag in the source of every script."""
  found = []
  for folder in ("experiments", "benchmarks"):
    for path in sorted((scripts.REPOSITORY / folder).glob("*.py")):
      for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
          continue
        if node.func.attr in _KINDS:
          name = ast.literal_eval(node.args[0])
          found.append((name, ast.literal_eval(node.args[1])))
  return found


def test_every_numeric_flag_has_bounds_and_a_default_within_them():
  found = _numeric_flags()
  assert len(found) > 100
  assert {name for name, _ in found} == set(_bounds.BOUNDS)
  for name, default in found:
    if default is not None:
      _bounds.check({name: default})


@pytest.mark.parametrize("name", sorted(_bounds.BOUNDS))
def test_numbers_beyond_either_bound_are_refused(name):
  bounds = _bounds.BOUNDS[name]
  _bounds.check({name: [bounds.low, bounds.high]})
  beyond = [
    bounds.low - 1,
    bounds.high + max(1, bounds.high // 1000),
    10**31,
    -(10**31),
    10**4000,
    1e300,
  ]
  for value in [*beyond, *([0.0, 1e-320] if bounds.magnitude else [])]:
    with pytest.raises(base.InputError, match=f"--{name}=.* must lie between"):
      _bounds.check({name: [bounds.high, value]})
  for value in (float("nan"), float("inf"), -float("inf")):
    with pytest.raises(base.InputError, match=f"--{name}=.* is not a finite number"):
      _bounds.check({name: value})


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("num_tasks", 20_000_000_000), ("width", 2_147_483_648), ("num_epochs", 10**30)),
    *(("seed", 9_223_372_036_854_775_808), ("batch_size", 100_000_000)),
    *(("greedy_epsilon", 1e-320), ("greedy_epsilon", 1.0), ("ood_share", 1.0)),
    *(("warpi_samples", 100_000_000), ("momentum", 2.0), ("momentum", 1.0)),
    *(("momentum", 0.99999999999), ("weight_decay", 2.0), ("focal_gamma", 1e30)),
    *(("learning_rate", 0.0), ("learning_rate", 1e-320), ("learning_rate", 1e30)),
    *(("beta", 1.0), ("absgd_lambda", 0.0), ("absgd_gamma", 0.0), ("absgd_alpha", 0.0)),
    *(("ldam_scale", 0.0), ("gce_threshold", 1.0), ("mentor_percentile", 101.0)),
    *(("percentile", -1.0), ("fraction", 0.0), ("fraction", 2.0), ("num_meta", -1)),
    *(("imbalance", 0.5), ("majority", 1.0), ("minority_share", 0.0), ("clip", 0.0)),
  ],
)
def test_what_cannot_be_meant_is_refused(name, value):
  with pytest.raises(base.InputError, match=f"^--{name}="):
    _bounds.check({name: value})


@pytest.mark.parametrize("name", ["workdir", "data_dir", "dump", "condense_by"])
def test_empty_strings_are_refused(name):
  with pytest.raises(base.InputError, match=f"--{name}= is empty"):
    _bounds.check({name: ""})
  _bounds.check({name: "a folder", "methods": []})


def _defined():
  values = flags.FlagValues()
  flags.DEFINE_integer("num_steps", 1, "", flag_values=values)
  flags.DEFINE_multi_float("noise_fraction", [0.5], "", flag_values=values)
  flags.DEFINE_list("decay_steps", None, "", flag_values=values)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  return values


@pytest.mark.parametrize(
  "arguments",
  [
    *(
      ["--num_steps=\uff13\uff10"],
      ["-num_steps", "\u0663"],
      ["--noise_fraction=\u0967"],
    ),
    *(["--noise_fraction=0.5", "--decay_steps=1,\u0662"],),
  ],
)
def test_digits_beyond_ascii_are_refused(arguments):
  with pytest.raises(base.InputError, match="write it in ASCII"):
    _bounds.check_ascii(arguments, _defined())


def test_folders_may_have_any_name():
  _bounds.check_ascii(["--workdir=/\u0663", "--num_steps", "3", "x"], _defined())


def test_out_of_memory_names_the_flags_that_decide_it():
  xla = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1")
  assert _bounds.is_out_of_memory(xla) and _bounds.is_out_of_memory(MemoryError())
  assert not _bounds.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))
  assert not _bounds.is_out_of_memory(ValueError("out of memory"))
  told = _bounds.out_of_memory(["momentum", "batch_size", "width"])
  assert told == "out of memory: lower one of --width, --batch_size."
  assert _bounds.out_of_memory(["only"]) == "out of memory."


@pytest.mark.parametrize(
  ("message", "names", "told"),
  [
    ("lower num_meta_per_class", ["num_meta"], "lower --num_meta"),
    ("use imbalance=121 or less", ["imbalance"], "use --imbalance=121 or less"),
    ("the imbalance of a set", ["imbalance"], "the imbalance of a set"),
    ("fraction=0.9 is", ["noise_fraction"], "--noise_fraction=0.9 is"),
    ("fraction=0.9 is", ["fraction"], "--fraction=0.9 is"),
    ("--num_meta=2: raise --num_meta", ["num_meta"], "--num_meta=2: raise --num_meta"),
    ("/a/num_meta/b num_meta.txt 'seed=1'", ["num_meta", "seed"], None),
    ("num_steps of a Config", ["width"], None),
  ],
)
def test_messages_name_flags_not_parameters(message, names, told):
  assert _bounds.in_terms_of_flags(message, names) == (told or message)


def test_flags_without_effect_are_refused_or_reported():
  name = "num_steps_of_this_test"
  flags.DEFINE_integer(name, 1, "")
  used_by = {name: ("l2rw", "warpi")}
  try:
    flags.FLAGS(["test"])
    _bounds.check_used(name, False, "here")  # It was not given.
    assert _bounds.unused(used_by, ["uniform"]) == ""
    flags.FLAGS(["test", f"--{name}=1"])
    _bounds.check_used(name, True, "here")
    with pytest.raises(base.InputError, match=f"--{name} has no effect here: leave"):
      _bounds.check_used(name, False, "here")
    assert _bounds.unused(used_by, ["uniform", "warpi"]) == ""
    told = f"note: --{name} has no effect here; it is for --methods=l2rw,warpi.\n"
    assert _bounds.unused(used_by, ["uniform"]) == told
  finally:
    flags.FLAGS.unparse_flags()
    delattr(flags.FLAGS, name)
