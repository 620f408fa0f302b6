"""Eight virtual CPU devices for every test; where real data lies."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
  """Folder of prepared TFDS sets: L2RW_TEST_DATA_DIR, or a shared checkout's."""
  default = _REPOSITORY.parent / "shared" / "tensorflow_datasets"
  folder = pathlib.Path(os.environ.get("L2RW_TEST_DATA_DIR", default))
  if not (folder / "mnist").is_dir():
    pytest.skip(f"no prepared MNIST in {folder}; set L2RW_TEST_DATA_DIR")
  return folder


@pytest.fixture(scope="session")
def decoded(tmp_path_factory) -> pathlib.Path:
  """Cache of decoded sets for all workers of a test run: MNIST takes ten seconds."""
  folder = tmp_path_factory.getbasetemp()
  is_worker = "PYTEST_XDIST_WORKER" in os.environ
  return (folder.parent if is_worker else folder) / "decoded"


# Tests that run without implicit promotion of ranks and types: neither the library nor
# the tests themselves need it. The others mix types in code of their own.
_WITHOUT_PROMOTION = {
  *("data", "training"),
  *("formulas_sweep_test.py", "inference_test.py", "sharding_test.py"),
}


@pytest.fixture(autouse=True)
def without_promotion(request):
  """JAX's switches against implicit promotion, with which users may run."""
  path = request.path
  if not _WITHOUT_PROMOTION & {path.name, path.parent.name}:
    yield
    return
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture
def x64():
  """Double precision, for finite differences."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def quick_compilation():
  """A third of the compile time, for tests of what does not depend on XLA's care."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
