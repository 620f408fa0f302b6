"""Eight virtual CPU devices and no implicit promotion for every test.

It also defines the fixtures that tests of several folders share.
"""

import math
import os
import pathlib
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
# Users may run with these switches, so neither the library nor its tests rely on
# promotion of ranks or types. The marker `promotes` lifts them for a test whose
# third-party code cannot run under them.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Programs compile in a third of the time.
jax.config.update("jax_disable_most_optimizations", True)
# Each test process compiles a program only once, however often it is traced.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

_MEMORY_MAPS = pathlib.Path("/proc/self/maps")
_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# The slowest files, the slowest first. They start first, so that at the end no test
# process is still busy with one of them while the others are idle.
_LONGEST = (
  "training/processes_test.py",
  "formulas_sweep_test.py",
  "training/kill_test.py",
  "methods/sweep_test.py",
  "methods/meta_weight_net_test.py",
  "hypergradient_test.py",
  "training/loop_test.py",
  "linearization/engines_test.py",
  "losses_test.py",
  "models/few_shot_test.py",
  "io/checkpointing_test.py",
  "experiments/reproduce_test.py",
  "experiments/mentornet_pretrain_test.py",
  "docs_test.py",
)


def pytest_configure(config):
  """Gives each process a separate compilation cache: JAX does not lock its files."""
  folder = tempfile.TemporaryDirectory(prefix="l2rw_jax_programs_")
  config.add_cleanup(folder.cleanup)
  jax.config.update("jax_compilation_cache_dir", folder.name)


def pytest_addoption(parser):
  """Adds the flag of `make test LEVEL=...` and `make test_all`."""
  parser.addoption(
    "--level",
    choices=("quick", "gate", "all"),
    default="quick",
    help="quick: the tests that are marked neither as ci nor as slow. gate: also those"
    " marked as ci. all: all tests.",
  )


def _parameters(item):
  return item.callspec.id if hasattr(item, "callspec") else None


def _is_marked(item, name):
  """Whether the marker `ci` or `slow` applies to the parameters of a test."""
  marker = item.get_closest_marker(name)
  if marker is None:
    return False
  parameters = _parameters(item)
  if marker.args:
    return parameters in marker.args
  return parameters not in marker.kwargs.get("unless", ())


def _check_markers(items, name):
  """Raises an error if a marker names parameters that a test does not have."""
  named, existing = {}, {}
  for item in items:
    marker = item.get_closest_marker(name)
    if marker is not None:
      test = item.nodeid.partition("[")[0]
      named[test] = {*marker.args, *marker.kwargs.get("unless", ())}
      existing.setdefault(test, set()).add(_parameters(item))
  for test, parameters in named.items():
    if parameters - existing[test]:
      unknown = ", ".join(sorted(parameters - existing[test]))
      raise pytest.UsageError(f"{test}: {name}() names unknown parameters: {unknown}")


def _is_selected(item, level, is_file_named):
  """Whether a test runs at a level; a file that is named runs at least at "gate"."""
  if level == "all":
    return True
  is_left_out = level == "quick" and not is_file_named and _is_marked(item, "ci")
  return not (is_left_out or _is_marked(item, "slow"))


def _named_tests(config):
  """`(path, test)` of each argument of the command; `test` is "" for a whole file."""
  folder = config.invocation_params.dir
  parts = [argument.partition("::") for argument in config.args]
  return {((folder / path).resolve(), test) for path, _, test in parts}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Leaves out tests of other levels, and puts the longest files first.

  A test that the command names runs at every level. See `--no-loadscope-reorder` in the
  Makefile for the order.
  """
  named = _named_tests(config)
  if not any(test for _, test in named):
    for marker in ("ci", "slow"):
      _check_markers(items, marker)

  def is_named(item):
    name = item.nodeid.partition("::")[2]
    return any((item.path, x) in named for x in (name, name.partition("[")[0]))

  level = config.getoption("--level")
  left_out = [
    item
    for item in items
    if not (_is_selected(item, level, (item.path, "") in named) or is_named(item))
  ]
  if left_out:
    config.hook.pytest_deselected(items=left_out)
    removed = set(left_out)
    items[:] = [item for item in items if item not in removed]
  paths = [_REPOSITORY / "tests" / name for name in _LONGEST]
  order = {path: i for i, path in enumerate(paths)}
  items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_terminal_summary(terminalreporter, exitstatus):
  """Explains the error if no test is selected, for instance in a file of slow ones."""
  if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
    terminalreporter.write_line(
      "error: all tests were left out; `make test_all TESTS=...` also runs slow ones."
    )


def _num_memory_maps():
  """The number of memory maps of this process; infinite where it is not known."""
  try:
    return _MEMORY_MAPS.read_bytes().count(b"\n")
  except OSError:
    return math.inf


@pytest.fixture(scope="module", autouse=True)
def _released_programs():
  """Frees programs after a file if the process has many memory maps.

  Linux allows 65,530 of them by default, and each program has several. Programs that
  are kept need not be traced again in the next file.
  """
  yield
  if _num_memory_maps() > 30_000:
    jax.clear_caches()


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
  """Folder of prepared TFDS sets: L2RW_TEST_DATA_DIR, or by default in ../shared."""
  default = _REPOSITORY.parent / "shared" / "tensorflow_datasets"
  folder = pathlib.Path(os.environ.get("L2RW_TEST_DATA_DIR", default))
  if not (folder / "mnist").is_dir():
    pytest.skip(f"no prepared MNIST in {folder}; set L2RW_TEST_DATA_DIR")
  return folder


@pytest.fixture(scope="session")
def decoded(tmp_path_factory) -> pathlib.Path:
  """Cache of decoded sets for all workers: decoding MNIST takes ten seconds."""
  folder = tmp_path_factory.getbasetemp()
  is_worker = "PYTEST_XDIST_WORKER" in os.environ
  return (folder.parent if is_worker else folder) / "decoded"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Allows implicit promotion for a test that is marked as needing it."""
  marker = item.get_closest_marker("promotes")
  if marker is None:
    return (yield)
  if not (marker.args and isinstance(marker.args[0], str)):
    raise pytest.UsageError(f"{item.nodeid}: promotes() needs a reason.")
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    return (yield)


@pytest.fixture
def x64():
  """Double precision, for finite differences."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def optimized():
  """Enables all of XLA's optimizations, for tests of compiled programs."""
  # JAX does not have all statistics of a program that is read from the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_enable_compilation_cache", True)
