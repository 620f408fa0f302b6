"""Trained parameters: returned by the loop, on disk, and read back by flax alone."""

from typing import NamedTuple

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.training import results
from l2rw_jax.training import variables


def test_the_loop_returns_what_is_in_the_last_checkpoint(tmp_path):
  (result,) = toy_runs.train(tmp_path, baselines.uniform())
  saved = toy_runs.saved_params(tmp_path)
  leaves = jax.tree_util.tree_leaves_with_path(result.params)
  assert len(leaves) == len(saved) == 4 and result.model_state == {}
  for path, leaf in leaves:
    (name,) = [n for n in saved if n.endswith(jax.tree_util.keystr(path))]
    np.testing.assert_array_equal(leaf, saved[name][0])
  (again,) = toy_runs.train(tmp_path, baselines.uniform())  # Reads the finished run.
  jax.tree.map(np.testing.assert_array_equal, again.params, result.params)

  content = (tmp_path / "seed-0" / "variables.msgpack").read_bytes()
  stored = serialization.msgpack_restore(content)
  images = toy_runs.make_splits().test.image
  given = {"params": stored["params"], **stored["model_state"]}
  logits = toy_runs.MODEL.model.apply(given, images)
  expected = result.metrics["last"]["accuracy"]
  right = np.argmax(logits, axis=1) == toy_runs.make_splits().test.label
  assert right.mean() == pytest.approx(expected)


def test_a_run_of_an_earlier_version_gets_its_parameters(tmp_path):
  (result,) = toy_runs.train(tmp_path, baselines.uniform())
  path = tmp_path / "seed-0" / "results.json"
  old = workdir.read_record(path)
  del old["files"]["variables.msgpack"]
  workdir.write_record(path, old)
  (tmp_path / "seed-0" / "variables.msgpack").unlink()
  with pytest.raises(base.InputError, match="no trained parameters: an earlier"):
    results.read(tmp_path / "seed-0")
  (again,) = toy_runs.train(tmp_path, baselines.uniform())
  jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


_KEY = jax.random.key(0)


class _Pair(NamedTuple):
  first: jax.Array
  second: list[jax.Array]


def test_any_pytree_is_restored(tmp_path):
  params = {"a": {"0": np.ones(2)}, "b": _Pair(np.zeros((2, 3)), [np.int32(4)])}
  state = _Pair(jnp.ones(2, jnp.bfloat16), [jax.random.key(3)])
  variables.write(tmp_path, params, state)
  stored, stored_state = variables.read(tmp_path)
  assert set(stored) == {"a", "b"}
  back = variables.restore(stored, params)
  assert isinstance(back["b"], _Pair)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert stored_state["first"].dtype == jnp.bfloat16
  shapes = jax.eval_shape(lambda: state)
  restored = variables.restore(stored_state, shapes)
  assert jax.random.key_data(restored.second[0]).tolist() == [0, 3]
  more_keys = shapes._replace(second=[jax.eval_shape(lambda: jax.random.split(_KEY))])
  with pytest.raises(base.InputError, match=r"no \.second\[0\] of shape \[2\]"):
    variables.restore(stored_state, more_keys)
  wrong = {**params, "a": {"0": np.ones(3)}}
  with pytest.raises(base.InputError, match=r"no \['a'\]\['0'\] of shape \[3\]"):
    variables.restore(stored, wrong)
  (tmp_path / variables.FILE).write_bytes(b"\x93\x01")
  with pytest.raises(base.InputError, match="is damaged"):
    variables.read(tmp_path)
