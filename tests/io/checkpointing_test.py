"""Checkpoints: exact values, damaged files, kills and full disks."""

import collections
import errno
import gc
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax.io import checkpointing


class _Pair(NamedTuple):
  first: Any
  second: Any


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "dense": {"kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)},
    "scale": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
  )
  # optax promotes the dtypes of all leaves to a common one.
  with jax.numpy_dtype_promotion("standard"):
    opt_state = optimizer.init(params)
  return {
    "params": params,
    "opt": opt_state,
    "keys": (jax.random.key(seed), jax.random.split(jax.random.key(1, impl="rbg"), 2)),
    "numpy": [
      rng.normal(size=(2, 3)).T,
      np.array([np.nan, -0.0, np.inf], np.float32),
      np.array(seed, np.int64),
      np.array([True, False]),
      np.array(1.5, ml_dtypes.bfloat16),
      np.zeros((0, 3), np.int8),
    ],
    "empty": [{}, (), [], None, _Pair(None, {}), jnp.zeros((2, 0), jnp.float16)],
    "scalars": (seed, 2**70, 0.1, float("inf"), True),
    "pair": _Pair(jnp.uint32(7), jnp.array([], jnp.int32)),
    "weak": jnp.asarray(0.1),
  }


def _bytes(x):
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x).tobytes()


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if type(x) in (bool, int, float):
      assert type(x) is type(y) and x == y
      continue
    assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
    assert x.dtype == y.dtype and x.shape == y.shape
    assert _bytes(x) == _bytes(y)
    assert getattr(x, "weak_type", None) == getattr(y, "weak_type", None)


def _open(directory, **kwargs):
  return checkpointing.Checkpointer(directory, **kwargs)


def _names(directory):
  return sorted(path.name for path in directory.iterdir())


def test_state_is_restored_bit_for_bit(tmp_path):
  state = make_state()
  host = {"rng": np.random.default_rng(0).bit_generator.state, "pair": (1, 2.5)}
  first = _open(tmp_path / "new" / "folder")
  first.save(7, state, host)
  first.close()
  for like in (state, make_state(3)):
    restored = _open(tmp_path / "new" / "folder").restore_latest(like)
    assert restored.step == 7
    assert restored.host == host | {"pair": [1, 2.5]}
    assert_same(restored.state, state)


def test_like_may_come_from_eval_shape(tmp_path):
  def make():
    return {"key": jax.random.key(0), "w": jnp.ones((2, 3)), "none": None}

  checkpointer = _open(tmp_path)
  checkpointer.save(0, make(), {})
  restored = checkpointer.restore_latest(jax.eval_shape(make))
  assert_same(restored.state, make())


def test_a_given_step_is_restored_or_one_line_says_why_not(tmp_path):
  checkpointer = _open(tmp_path)
  states = {step: {"w": jnp.full(3, step, jnp.float32)} for step in (4, 8)}
  for step, state in states.items():
    checkpointer.save(step, state, {})
  reader = checkpointing.Checkpointer(tmp_path, read_only=True)
  for step, state in states.items():
    restored = reader.restore(step, state)
    assert restored.step == step
    assert_same(restored.state, state)
  with pytest.raises(base.InputError, match="cannot read the checkpoint of step 6 in"):
    reader.restore(6, states[4])
  with pytest.raises(base.InputError, match="holds checkpoints of another model"):
    reader.restore(8, {"w": jnp.ones(4)})


def test_state_without_arrays(tmp_path):
  checkpointer = _open(tmp_path)
  for step, state in enumerate([(), {}, {"a": 1}, (np.zeros((0, 2)),)]):
    checkpointer.save(step, state, {})
    assert_same(checkpointer.restore_latest(state).state, state)


def test_replicated_arrays_can_be_saved(tmp_path):
  mesh = jax.make_mesh((jax.device_count(),), ("d",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = {"w": jax.device_put(jnp.arange(5.0), sharding)}
  checkpointer = _open(tmp_path)
  checkpointer.save(0, state, {})
  assert_same(checkpointer.restore_latest(state).state, {"w": jnp.arange(5.0)})


def test_leaves_are_matched_by_path(tmp_path):
  checkpointer = _open(tmp_path)
  saved = collections.OrderedDict([("b", jnp.ones(2)), ("a", jnp.zeros(2))])
  checkpointer.save(0, saved, {})
  restored = checkpointer.restore_latest({"a": jnp.ones(2), "b": jnp.ones(2)})
  assert_same(restored.state, {"a": jnp.zeros(2), "b": jnp.ones(2)})


def test_only_the_latest_are_kept(tmp_path):
  checkpointer = _open(tmp_path, max_to_keep=2)
  assert checkpointer.restore_latest(0) is None
  for step in (1, 5, 9):
    checkpointer.save(step, step, {})
  assert _names(tmp_path) == ["5", "9"]
  assert checkpointer.restore_latest(0).state == 9
  for step in (9, 3):
    with pytest.raises(ValueError, match="does not come after the saved step 9"):
      checkpointer.save(step, 0, {})


def test_unsupported_leaves_raise_before_writing(tmp_path):
  checkpointer = _open(tmp_path)
  for leaf in ("text", object(), np.array(["a"]), np.array([None]), np.ones(2, ">f4")):
    with pytest.raises(TypeError, match=r"cannot save \['a'\]"):
      checkpointer.save(0, {"a": leaf}, {})
  with pytest.raises(TypeError):
    checkpointer.save(0, {}, {"a": object()})
  assert _names(tmp_path) == []


@pytest.mark.parametrize(
  ("like", "message"),
  [
    ({"w": np.ones(2), "n": 1, "new": 2}, r"\['new'\] was absent, now int"),
    ({"w": np.ones(2)}, r"\['n'\] was int\[\], now absent"),
    ({"w": np.ones(3), "n": 1}, r"\['w'\] was float64\[2\], now float64\[3\]"),
    ({"w": np.ones(2, np.float32), "n": 1}, "now float32"),
    ({"w": np.ones(2), "n": np.int32(1)}, "now int32"),
  ],
)
def test_checkpoint_of_another_model_raises_and_is_kept(tmp_path, like, message):
  state = {"w": np.ones(2), "n": 1}
  checkpointer = _open(tmp_path)
  checkpointer.save(0, state, {})
  with pytest.raises(base.InputError, match=message) as caught:
    checkpointer.restore_latest(like)
  assert "another model, method or optimizer" in str(caught.value)
  assert_same(checkpointer.restore_latest(state).state, state)


def test_unexpected_write_error_is_a_one_line_error(tmp_path, monkeypatch):
  checkpointer = _open(tmp_path)

  def fail(*args, **kwargs):
    raise RuntimeError("first line\nsecond line")

  monkeypatch.setattr(checkpointer._manager, "save", fail)
  with pytest.raises(base.InputError, match=r"RuntimeError: first line\. Correct this"):
    checkpointer.save(1, {}, {})


def test_directory_that_cannot_be_created(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(base.InputError, match="file: File exists"):
    _open(tmp_path / "file")


def test_orbax_logs_nothing(tmp_path, caplog):
  caplog.set_level(logging.DEBUG)
  checkpointer = _open(tmp_path)
  checkpointer.save(1, make_state(), {})
  assert checkpointer.restore_latest(make_state()).step == 1
  assert [r.pathname for r in caplog.records if "orbax" in r.pathname] == []


_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def _save_two(directory):
  """Saves `make_state(1)` and `make_state(2)` as the checkpoints of steps 1 and 2."""
  checkpointer = _open(directory)
  for step in (1, 2):
    checkpointer.save(step, make_state(step), {"epoch": step})
  checkpointer.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  directory = tmp_path_factory.mktemp("template")
  _save_two(directory)
  return directory


@pytest.fixture
def two_steps(template, tmp_path):
  """A folder with the checkpoints of steps 1 and 2; a test may damage it."""
  return pathlib.Path(shutil.copytree(template, tmp_path / "two"))


def _warnings(caplog):
  return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _files(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())


def _assert_restores_an_intact_one(directory, caplog) -> int:
  """Returns the restored step, after checking its state."""
  caplog.clear()
  checkpointer = _open(directory)
  restored = checkpointer.restore_latest(make_state())
  assert_same(restored.state, make_state(restored.step))
  assert restored.host == {"epoch": restored.step}
  if restored.step == 1:
    (warning,) = _warnings(caplog)
    assert "checkpoint of step 2" in warning and "\n" not in warning
    assert _names(directory) == ["1"]
    checkpointer.save(2, make_state(2), {"epoch": 2})
    assert_same(checkpointer.restore_latest(make_state()).state, make_state(2))
  else:
    assert _warnings(caplog) == []
  checkpointer.close()
  return restored.step


# Orbax closes its event loop before all requests to TensorStore are finished.
_ignore_late_results = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.ci
@pytest.mark.slow(unless=("_flip",))
@_ignore_late_results
@pytest.mark.parametrize("damage", [_truncate, _flip, pathlib.Path.unlink])
def test_damage_to_any_file_is_detected(template, tmp_path, caplog, damage):
  sizes = {path: path.stat().st_size for path in _files(template / "2")}
  restored = {}
  for path, size in sizes.items():
    if damage is _flip and size == 0:
      continue
    name = path.relative_to(template)
    directory = pathlib.Path(shutil.copytree(template, tmp_path / "copy"))
    damage(directory / name)
    restored[path] = _assert_restores_an_intact_one(directory, caplog)
    shutil.rmtree(directory)
  caplog.clear()
  gc.collect()  # asyncio logs unretrieved exceptions when futures are collected.
  assert _warnings(caplog) == []
  # A checkpoint with damage to one of these files must be rejected.
  largest = max(sizes, key=lambda path: sizes[path])
  assert restored[largest] == 1
  assert restored[template / "2" / "record" / "metadata"] == 1


def _other_host(two_steps):
  path = two_steps / "2" / "record" / "metadata"
  text = path.read_text()
  path.write_text(text.replace('"epoch": 2', '"epoch": 3'))
  assert path.read_text() != text


def _other_arrays(two_steps):
  shutil.rmtree(two_steps / "2" / "arrays")
  shutil.copytree(two_steps / "1" / "arrays", two_steps / "2" / "arrays")


@pytest.mark.parametrize("tamper", [_other_host, _other_arrays])
def test_checksum_detects_readable_damage(two_steps, caplog, tamper):
  tamper(two_steps)
  assert _open(two_steps).restore_latest(make_state()).step == 1
  (warning,) = _warnings(caplog)
  assert "step 2" in warning and "checksum does not match" in warning


def test_checkpoint_under_another_step_is_rejected(two_steps, caplog):
  shutil.copytree(two_steps / "1", two_steps / "3")
  assert _open(two_steps).restore_latest(make_state()).step == 2
  assert len(_warnings(caplog)) == 1
  assert _names(two_steps) == ["1", "2"]


@_ignore_late_results
def test_without_intact_checkpoint_training_starts_over(two_steps, caplog):
  for path in _files(two_steps):
    _truncate(path)
  checkpointer = _open(two_steps)
  assert checkpointer.restore_latest(make_state()) is None
  latest, previous = _warnings(caplog)
  assert "step 2" in latest and "step 1" in previous
  assert _names(two_steps) == []
  checkpointer.save(1, make_state(1), {})
  assert_same(checkpointer.restore_latest(make_state()).state, make_state(1))


@pytest.mark.parametrize(
  ("error", "raised"),
  [
    (PermissionError(errno.EACCES, "Permission denied"), base.InputError),
    (OSError(errno.EMFILE, "Too many open files"), base.InputError),
    (MemoryError(), MemoryError),
  ],
)
def test_other_read_errors_delete_nothing(two_steps, monkeypatch, error, raised):
  checkpointer = _open(two_steps)

  def fail(*args):
    raise error

  monkeypatch.setattr(checkpointing, "_digest", fail)
  with pytest.raises(raised):
    checkpointer.restore_latest(make_state())
  assert _names(two_steps) == ["1", "2"]


_KILLED = """
import os, pathlib, shutil, signal, sys
from l2rw_jax.io import checkpointing
from tests.io import checkpointing_test
directory, function, name, keep = sys.argv[1:]

def killing(original):
  def call(*args, **kwargs):
    # The last argument is the path that is created (rename) or removed (rmtree).
    if pathlib.Path(args[-1]).name == name:
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
  return call

checkpointer = checkpointing.Checkpointer(directory, max_to_keep=int(keep))
checkpointer.save(1, checkpointing_test.make_state(1), {"epoch": 1})
module = {"rename": os, "rmtree": shutil}[function]
setattr(module, function, killing(getattr(module, function)))
checkpointer.save(2, checkpointing_test.make_state(2), {"epoch": 2})
"""


def _run(script, *arguments):
  return subprocess.run(
    [sys.executable, "-c", script, *map(str, arguments)],
    check=False,
    capture_output=True,
    text=True,
    timeout=120,
    cwd=_REPOSITORY,  # For the imports of the script.
  )


@pytest.mark.ci
@pytest.mark.slow("arrays")
@pytest.mark.parametrize("name", ["arrays", "2"])
def test_kill_while_saving_keeps_the_previous_one(tmp_path, caplog, name):
  run = _run(_KILLED, tmp_path, "rename", name, 1)
  assert run.returncode == -signal.SIGKILL, run.stderr
  one, partial = _names(tmp_path)  # The old one is not deleted yet.
  assert one == "1" and partial.startswith("2.")
  checkpointer = _open(tmp_path)
  assert _names(tmp_path) == ["1"]
  restored = checkpointer.restore_latest(make_state())
  assert restored.step == 1
  assert_same(restored.state, make_state(1))
  assert _warnings(caplog) == []
  checkpointer.save(2, make_state(2), {})
  assert_same(checkpointer.restore_latest(make_state()).state, make_state(2))


@pytest.mark.ci
def test_kill_while_deleting_keeps_the_new_one(tmp_path):
  run = _run(_KILLED, tmp_path, "rmtree", "1", 1)
  assert run.returncode == -signal.SIGKILL, run.stderr
  restored = _open(tmp_path).restore_latest(make_state())
  assert restored.step == 2
  assert_same(restored.state, make_state(2))


_FULL_DISK = """
import os, resource, signal, sys
import numpy as np
from l2rw_jax import base
from l2rw_jax.io import checkpointing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {"w": np.random.default_rng(0).normal(size=100_000)}

def save(step, limit):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  try:
    checkpointer.save(step, state, {"step": step})
  except base.InputError as error:
    print(error)
  print(os.listdir(directory))

for limit in map(int, sys.argv[2:]):
  directory = f"{sys.argv[1]}/{limit}"
  checkpointer = checkpointing.Checkpointer(directory, max_to_keep=1)
  save(1, limit)
  save(1, resource.RLIM_INFINITY)
  save(2, limit)
  print(checkpointer.restore_latest(state).host)
  save(2, resource.RLIM_INFINITY)
  print(checkpointer.restore_latest(state).host)
"""


@pytest.mark.ci
def test_full_disk_is_a_one_line_error_and_keeps_the_previous_one(tmp_path):
  # Writing fails at the record with the first limit, at the arrays with the second.
  limits = (0, 100_000)
  run = _run(_FULL_DISK, tmp_path, *limits)
  expected = []
  for limit in limits:
    message = (
      f"cannot write the checkpoint of step %d in {tmp_path}/{limit}: File too large."
      " Correct this (if the disk is full, free some space) and run the same command"
      " again: it continues from %s"
    )
    expected += [
      message % (1, "the start"),
      "[]",
      "['1']",
      message % (2, "step 1"),
      "['1']",
      "{'step': 1}",
      "['2']",
      "{'step': 2}",
    ]
  assert run.stdout.splitlines() == expected
  assert run.stderr == ""
