import collections
import logging
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
  with jax.numpy_dtype_promotion("standard"):  # optax asks for a type of all leaves.
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


def test_everything_comes_back_bit_for_bit(tmp_path):
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


def test_eval_shape_is_enough_of_a_like(tmp_path):
  def make():
    return {"key": jax.random.key(0), "w": jnp.ones((2, 3)), "none": None}

  checkpointer = _open(tmp_path)
  checkpointer.save(0, make(), {})
  restored = checkpointer.restore_latest(jax.eval_shape(make))
  assert_same(restored.state, make())


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


def test_leaves_are_matched_by_name(tmp_path):
  checkpointer = _open(tmp_path)
  saved = collections.OrderedDict([("b", jnp.ones(2)), ("a", jnp.zeros(2))])
  checkpointer.save(0, saved, {})
  restored = checkpointer.restore_latest({"a": jnp.ones(2), "b": jnp.ones(2)})
  assert_same(restored.state, {"a": jnp.zeros(2), "b": jnp.ones(2)})


def test_only_the_newest_are_kept(tmp_path):
  checkpointer = _open(tmp_path, max_to_keep=2)
  assert checkpointer.restore_latest(0) is None
  for step in (1, 5, 9):
    checkpointer.save(step, step, {})
  assert _names(tmp_path) == ["5", "9"]
  assert checkpointer.restore_latest(0).state == 9
  for step in (9, 3):
    with pytest.raises(ValueError, match="does not come after the saved step 9"):
      checkpointer.save(step, 0, {})


def test_what_cannot_be_kept_is_told_before_writing(tmp_path):
  checkpointer = _open(tmp_path)
  for leaf in ("text", object(), np.array(["a"]), np.array([None]), np.ones(2, ">f4")):
    with pytest.raises(TypeError, match=r"cannot keep \['a'\]"):
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
def test_checkpoint_of_another_model_is_told_and_kept(tmp_path, like, message):
  state = {"w": np.ones(2), "n": 1}
  checkpointer = _open(tmp_path)
  checkpointer.save(0, state, {})
  with pytest.raises(base.InputError, match=message) as caught:
    checkpointer.restore_latest(like)
  assert "another model or method" in str(caught.value)
  assert_same(checkpointer.restore_latest(state).state, state)


def test_unexpected_write_error_is_told_too(tmp_path, monkeypatch):
  checkpointer = _open(tmp_path)

  def fail(*args, **kwargs):
    raise RuntimeError("first line\nsecond line")

  monkeypatch.setattr(checkpointer._manager, "save", fail)
  with pytest.raises(base.InputError, match=r"RuntimeError: first line\. Free"):
    checkpointer.save(1, {}, {})


def test_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(base.InputError, match="file: File exists"):
    _open(tmp_path / "file")


def test_orbax_is_quiet(tmp_path, caplog):
  caplog.set_level(logging.DEBUG)
  checkpointer = _open(tmp_path)
  checkpointer.save(1, make_state(), {})
  assert checkpointer.restore_latest(make_state()).step == 1
  assert [r.pathname for r in caplog.records if "orbax" in r.pathname] == []
