"""Settings as flags: bounds, choices, aliases, help, and flags without effect."""

import dataclasses
import importlib
import pkgutil

import jax
import pytest
import scripts

import benchmarks.coreset_selection
import benchmarks.data_cleaning
import benchmarks.label_issues
import benchmarks.step_time
import experiments
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base

# Any two scripts can be imported in one process.
_MODULES = [
  benchmarks.coreset_selection,
  benchmarks.data_cleaning,
  benchmarks.label_issues,
  benchmarks.step_time,
  importlib.import_module("experiments.tables.__main__"),
  *(
    importlib.import_module(f"experiments.{info.name}")
    for info in pkgutil.iter_modules(experiments.__path__)
    if not info.ispkg
  ),
]
_FLAGS = [
  (module, name, details)
  for module in _MODULES
  for name, details in settings_lib.flags_of(module.Settings).items()
]
_NUMERIC_FLAGS = [
  (name, details)
  for module, name, details in _FLAGS
  if settings_lib.kinds_of(module.Settings)[name].type in (int, float)
]
# If several scripts have a flag of the same name, the last one counts.
_NUMERIC = dict(_NUMERIC_FLAGS)


def test_every_numeric_flag_has_bounds_and_a_default_within_them():
  assert len(_MODULES) > 12 and len(_NUMERIC) > 70
  for name, details in _NUMERIC_FLAGS:
    assert details.bounds, name
  for module in _MODULES:
    module.Settings()


def test_every_flag_is_explained_in_full_sentences():
  for module, name, details in _FLAGS:
    where = f"{module.__name__} --{name}: {details.help}"
    assert details.help[:1].isupper() and details.help.endswith("."), where
    assert details.group in settings_lib.GROUPS, where
    assert details.help.count("The default is") <= 1, where
    assert "in the source code in" not in details.help, where


def test_a_script_may_say_what_the_default_of_a_shared_flag_means():
  helps = {
    (module.__name__.rpartition(".")[2], name): details.help
    for module, name, details in _FLAGS
  }
  assert helps["mnist_long_tail", "batch_size"].endswith("The default is 100.")
  assert helps["mnist_long_tail", "deferred"].endswith("The default is 0.8.")
  assert helps["cifar_long_tail", "deferred"].endswith("The default is the preset's.")
  assert helps["mnist_noise", "deferred"].endswith("The default is 2/3.")


@pytest.mark.parametrize("name", sorted(_NUMERIC))
def test_numbers_beyond_either_bound_are_refused(name):
  details = _NUMERIC[name]
  bounds = details.bounds
  settings_lib.check(name, [bounds.low, bounds.high], details)
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
      settings_lib.check(name, [bounds.high, value], details)
  for value in (float("nan"), float("inf"), -float("inf")):
    with pytest.raises(base.InputError, match=f"--{name}=.* is not a finite number"):
      settings_lib.check(name, value, details)


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
def test_invalid_numbers_are_refused(name, value):
  with pytest.raises(base.InputError, match=f"^--{name}="):
    settings_lib.check(name, value, _NUMERIC[name])


@dataclasses.dataclass(frozen=True)
class _Settings(settings_lib.Settings):
  """Flags of every type."""

  EXTENDABLE = ("methods",)

  methods: tuple[str, ...] = flag(("uniform",))
  preset: str | None = flag(None, choices=["paper", "code"])
  num_steps: int = flag(1)
  noise_fraction: tuple[float, ...] = flag((0.5,))
  network: str = flag("mlp", aliases=["model"])
  meta_every: int = flag(1, "Steps.", bounds=settings_lib.STEPS, methods=["l2rw", "ab"])
  files: tuple[str, ...] = flag((), "Files.", repeated=True)
  plateau: bool | None = flag(None, "Plateau.")


def _parse(*arguments):
  return launch.parse(_Settings, arguments)


def test_a_command_line_becomes_settings():
  parsed = _parse(
    *("--methods=a,b", "--preset", "code", "--noise_fraction=0.1", "--noplateau"),
    *("--noise_fraction=0.2", "--files=x,y", "--files=z"),
  )
  assert parsed == _Settings(
    methods=("a", "b"),
    preset="code",
    noise_fraction=[0.1, 0.2],
    files=("x,y", "z"),
    plateau=False,
  )
  assert hash(parsed) == hash(parsed.replace(num_steps=1))
  assert parsed.given == {"methods", "preset", "noise_fraction", "files", "plateau"}
  assert _parse() == _Settings() != parsed


def test_old_spellings_work_and_are_not_in_the_help(tmp_path, capsys):
  (tmp_path / "flags").write_text("--model=lenet")
  for argument in ("--model=lenet", f"--flagfile={tmp_path}/flags"):
    parsed = _parse(argument)
    assert parsed.network == "lenet" and parsed.is_given("network")
  assert parsed.record()["network"] == "lenet"
  with pytest.raises(SystemExit) as stopped:
    _parse("--helpfull")
  printed = capsys.readouterr().out
  assert stopped.value.code == 1 and "--model" not in printed
  assert "--network: Network to train. [default: mlp]" in printed


def test_flags_that_determine_the_results_are_recorded_as_json():
  record = _Settings(noise_fraction=(0.1,), workdir="there").record()
  assert record["noise_fraction"] == [0.1] and record["checkpoint_every"] == 1000
  unrecorded = {"workdir", "data", "data_dir", "cache_dir", "steps_per_call", "given"}
  assert not unrecorded & set(record)


@pytest.mark.parametrize("name", ["workdir", "data_dir", "network"])
def test_empty_strings_are_refused(name):
  with pytest.raises(base.InputError, match=f"--{name}= is empty"):
    _Settings(**{name: ""})
  assert _Settings(methods=()).methods == ()


def test_values_that_are_not_offered_are_refused():
  with pytest.raises(base.InputError, match=r"--preset=x: value should be one of <pap"):
    _Settings(preset="x")


@pytest.mark.parametrize(
  "arguments",
  [
    *(
      ["--num_steps=\uff13\uff10"],
      ["-num_steps", "\u0663"],
      ["--noise_fraction=\u0967"],
    ),
    *(["--noise_fraction=0.5", "--methods=1,\u0662"], ["--preset=\uff13"]),
  ],
)
def test_digits_beyond_ascii_are_refused(arguments):
  with pytest.raises(base.InputError, match="write it in ASCII"):
    _parse(*arguments)


def test_folders_may_have_any_name():
  assert _parse("--workdir=/\u0663", "--files=\u0663").workdir == "/\u0663"


def test_out_of_memory_names_the_flags_to_lower():
  xla = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1")
  assert settings_lib.is_out_of_memory(xla)
  assert settings_lib.is_out_of_memory(MemoryError())
  assert not settings_lib.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))
  assert not settings_lib.is_out_of_memory(ValueError("out of memory"))
  message = settings_lib.out_of_memory(["momentum", "batch_size", "width"])
  assert message == "out of memory: lower one of --width, --batch_size."
  message = settings_lib.out_of_memory(["batch_size", "microbatch_size"])
  assert message.startswith("out of memory: lower one of --batch_size, or give --micro")
  assert settings_lib.out_of_memory(["only"]) == "out of memory."


@pytest.mark.parametrize(
  ("message", "names", "expected"),
  [
    ("lower num_meta_per_class", ["num_meta"], "lower --num_meta"),
    ("use imbalance=121 or less", ["imbalance"], "use --imbalance=121 or less"),
    ("the imbalance of a set", ["imbalance"], "the imbalance of a set"),
    ("fraction=0.9 is", ["noise_fraction"], "--noise_fraction=0.9 is"),
    ("fraction=0.9 is", ["fraction"], "--fraction=0.9 is"),
    ("--num_meta=2: raise --num_meta", ["num_meta"], "--num_meta=2: raise --num_meta"),
    ("/a/num_meta/b num_meta.txt 'seed=1'", ["num_meta", "seed"], None),
    ("num_steps of a Config", ["width"], None),
    ("Lower num_ways.", ["num_ways"], "Lower --num_ways."),
    ("layers=2.0: must", ["l2rw_layers"], "--l2rw_layers=2.0: must"),
    ('run "f(seed=1)" or seed=2', ["seed"], 'run "f(seed=1)" or --seed=2'),
  ],
)
def test_messages_name_flags_not_parameters(message, names, expected):
  # `expected` is None if the message does not change.
  assert settings_lib.in_terms_of_flags(message, names) == (expected or message)


def test_flags_without_effect_are_refused_or_reported():
  unused = _parse("--meta_every=1")  # The default value, but given.
  _Settings().check_used("meta_every", False, "here")  # Not given.
  unused.check_used("meta_every", True, "here")
  for settings in (unused, _Settings(meta_every=2)):
    with pytest.raises(base.InputError, match="--meta_every has no effect here: leave"):
      settings.check_used("meta_every", False, "here")
  offered = ["uniform", "l2rw"]
  assert _Settings().notes(offered, ["uniform"]) == ""
  assert unused.notes(offered, ["uniform", "l2rw"]) == ""
  note = "note: --meta_every has no effect here; it is for --methods=l2rw.\n"
  assert unused.notes(offered, ["uniform"]) == note


def test_help_is_grouped(capsys):
  with pytest.raises(SystemExit):
    _parse("--help")
  printed = capsys.readouterr().out
  assert printed.startswith("Settings as flags")
  titles = [settings_lib.GROUPS[group] for group in ("common", "data", "method")]
  places = [printed.index(f"\n{title}:\n") for title in titles]
  assert places == sorted(places)
  assert "--preset: <paper|code>: Settings to start from" in printed
  assert str(scripts.REPOSITORY) not in printed


def test_renamed_flags_keep_their_old_spellings():
  aliases = {name: set(details.aliases) for _, name, details in _FLAGS}
  assert aliases["steps_per_call"] == {"steps_per_dispatch"}
  assert aliases["num_unlabeled"] == {"num_unlabelled"}
