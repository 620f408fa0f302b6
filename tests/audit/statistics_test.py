"""Training statistics: compared with a plain loop in float64, and on many devices."""

import functools
import tracemalloc

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import scipy.special

from l2rw_jax import audit
from l2rw_jax import base

_N, _C, _B = 10, 3, 16
_update = jax.jit(audit.update, static_argnames="axis_name")


def _batches(number=5, num_logits=_C, seed=0):
  """Batches with duplicates, with indices out of range and with padding."""
  rng = np.random.default_rng(seed)
  for _ in range(number):
    index = rng.integers(-2, _N + 1, size=_B).astype(np.int32)
    index[index == 7] = 0  # Example 7 is never seen.
    yield {
      "index": index,
      "logits": rng.normal(size=(_B, num_logits)).astype(np.float32) * 3,
      "labels": (index % max(num_logits, 2)).astype(np.int32),
      "weights": np.maximum(rng.normal(size=_B), 0).astype(np.float32),
      "scores": rng.normal(size=_B).astype(np.float32),
      "mask": rng.random(_B) < 0.8,
    }


def _reference(batches):
  """The statistics by their definitions, one row at a time, in float64."""
  sums = {k: np.zeros(_N) for k in ("loss", "margin", "weight", "score", "step")}
  counts = {k: np.zeros(_N) for k in ("seen", "wrong", "forgotten", "rejected")}
  correct_before = np.zeros(_N, bool)
  classes = None
  for batch in batches:
    rows = [r for r in range(_B) if batch["mask"][r] and 0 <= batch["index"][r] < _N]
    logits = batch["logits"].astype(np.float64)
    if logits.shape[1] == 1:
      logits = np.concatenate([0 * logits, logits], axis=1)
    if classes is None:
      classes = np.zeros((_N, logits.shape[1]))
    log_p = scipy.special.log_softmax(logits, axis=1)
    labels = batch["labels"]
    step_loss = np.mean([-log_p[r, labels[r]] for r in rows])
    size = np.mean([abs(batch["scores"][r]) for r in rows])
    is_correct = {}
    for r in rows:
      i, y = batch["index"][r], labels[r]
      others = np.delete(logits[r], y)
      correct = logits[r].argmax() == y
      sums["loss"][i] -= log_p[r, y]
      sums["margin"][i] += logits[r, y] - others.max()
      sums["weight"][i] += batch["weights"][r] * len(rows)
      sums["score"][i] += batch["scores"][r] / size
      sums["step"][i] += step_loss
      classes[i] += step_loss * np.exp(log_p[r])
      counts["seen"][i] += 1
      counts["wrong"][i] += not correct
      counts["rejected"][i] += batch["weights"][r] == 0
      is_correct[i] = is_correct.get(i, True) and correct
    for i, correct in is_correct.items():
      counts["forgotten"][i] += correct_before[i] and not correct
      correct_before[i] = correct
  seen = np.where(counts["seen"] > 0, counts["seen"], np.nan)
  return {
    "seen": counts["seen"],
    "mean_loss": sums["loss"] / seen,
    "mean_margin": sums["margin"] / seen,
    "wrong_predictions": np.where(np.isnan(seen), np.nan, counts["wrong"]),
    "forgetting_events": np.where(np.isnan(seen), np.nan, counts["forgotten"]),
    "mean_weight": sums["weight"] / seen,
    "zero_weight_share": counts["rejected"] / seen,
    "mean_score": sums["score"] / seen,
    "mean_probabilities": classes
    / np.where(sums["step"] > 0, sums["step"], np.nan)[:, None],
  }


def _assert_same(actual, expected, rtol=1e-5):
  assert set(actual) == set(expected)
  for name, values in expected.items():
    assert actual[name].dtype == np.float64
    np.testing.assert_allclose(actual[name], values, rtol, atol=1e-6, err_msg=name)


@functools.cache
def _one_device():
  state = audit.init(_N, _C)
  for batch in _batches():
    state = _update(state, **batch)
  return jax.device_get(state)


def test_definitions():
  actual = audit.summarize(_one_device())
  _assert_same(actual, _reference(_batches()))
  assert actual["forgetting_events"][:7].sum() > 0
  assert np.isnan(actual["mean_loss"][7]) and actual["seen"][7] == 0


def test_a_single_logit_is_that_of_class_one():
  state = audit.init(_N, 2)
  for batch in _batches(2, num_logits=1):
    state = _update(state, **batch)
  _assert_same(audit.summarize(state), _reference(_batches(2, num_logits=1)))


def test_half_precision_logits_are_summed_in_float32():
  state, rounded = audit.init(_N, _C), []
  for batch in _batches(2):
    batch["logits"] = batch["logits"].astype(jnp.bfloat16)
    state = _update(state, **batch)
    rounded.append({**batch, "logits": batch["logits"].astype(np.float64)})
  assert state.loss.total.dtype == jnp.float32
  _assert_same(audit.summarize(state), _reference(rounded))


def test_weights_and_scores_are_averaged_over_the_steps_that_have_them():
  state = audit.init(2, 2)
  logits, labels = jnp.zeros((2, 2)), jnp.zeros(2, jnp.int32)
  index = jnp.arange(2)
  state = _update(state, index, logits, labels)
  assert np.isnan(audit.summarize(state)["mean_weight"]).all()
  state = _update(state, index, logits, labels, weights=jnp.array([0.0, 1.0]))
  actual = audit.summarize(state)
  np.testing.assert_array_equal(actual["mean_weight"], [0, 2])
  np.testing.assert_array_equal(actual["zero_weight_share"], [1, 0])
  assert np.isnan(actual["mean_score"]).all()
  for scale in (1e-30, 1e30):  # In float32 their squares are zero and infinite.
    scores = scale * jnp.array([3.0, -1.0])
    state = _update(state, index, logits, labels, scores=scores)
  actual = audit.summarize(state)
  np.testing.assert_allclose(actual["mean_score"], [1.5, -0.5], rtol=1e-6)


def test_forgetting_with_several_rows_of_one_example():
  right, wrong = [2.0, 0.0], [0.0, 2.0]
  state, zeros = audit.init(2, 2), jnp.zeros(2, jnp.int32)
  # Both rows are correct; one is wrong (forgotten); both are wrong (still forgotten);
  # both are correct; both are wrong (forgotten again).
  for first, second in (
    *((right, right), (right, wrong), (wrong, wrong)),
    *((right, right), (wrong, wrong)),
  ):
    state = _update(state, zeros, jnp.array([first, second]), zeros)
  actual = audit.summarize(state)
  assert actual["forgetting_events"][0] == 2 and actual["wrong_predictions"][0] == 5
  assert actual["seen"].tolist() == [10, 0]


@pytest.fixture
def all_optimizations():
  """Enables all of XLA's optimizations, as for users.

  None of them may simplify the compensation of the sums to zero.
  """
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def test_the_millionth_step_counts_as_much_as_the_first(all_optimizations):
  state = audit.init(1, 2)
  logits, zero = jnp.array([[0.3, 0.0]]), jnp.zeros(1, jnp.int32)
  steps = 1_000_000
  # Start with the sums of a million such steps, at which float32 has lost digits.
  once = _update(state, zero, logits, zero, jnp.array([0.1]), jnp.array([0.7]))
  exact = {
    name: np.float64(getattr(once, name).total)
    for name in ("loss", "margin", "step_weight", "probabilities", "weight", "score")
  }
  large = {
    name: once.loss._replace(
      total=jnp.float32(steps * x), error=jnp.zeros(x.shape, jnp.float32)
    )
    for name, x in exact.items()
  }
  before = once._replace(**large)
  after = jax.jit(
    lambda s: jax.lax.fori_loop(
      0,
      1000,
      lambda _, s: audit.update(
        s, zero, logits, zero, jnp.array([0.1]), jnp.array([0.7])
      ),
      s,
    )
  )(before)
  for name, x in exact.items():
    start, end = getattr(before, name), getattr(after, name)
    gained = (np.float64(end.total) - np.float64(start.total)) + end.error
    np.testing.assert_allclose(gained, 1000 * x, rtol=1e-5, err_msg=name)


def _mapped(how, axis, batches, devices):
  """The state after these batches, whose rows are spread over 8 devices."""
  state = audit.init(_N, _C)
  if how == "pmap":
    update = jax.pmap(functools.partial(_call, axis_name=axis), axis, devices=devices)
    state = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 8), state)
    for batch in batches:
      shards = {k: x.reshape(8, -1, *x.shape[1:]) for k, x in batch.items()}
      state = update(state, shards)
    state = jax.device_get(state)
    for leaf in jax.tree.leaves(state):  # The same on every device.
      np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: x[0], state)
  is_explicit = how == "explicit"
  kind = jax.sharding.AxisType.Explicit if is_explicit else jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((8,), (axis,), axis_types=(kind,), devices=devices)
  rows = NamedSharding(mesh, PartitionSpec(axis))
  state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
  if how == "shard_map":
    update = jax.jit(
      jax.shard_map(
        functools.partial(_call, axis_name=axis),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axis)),
        out_specs=PartitionSpec(),
      )
    )
  else:
    update = jax.jit(functools.partial(_call, axis_name=None))
  with jax.set_mesh(mesh):
    for batch in batches:
      state = update(state, jax.device_put(batch, rows))
  return jax.device_get(state)


def _call(state, batch, axis_name):
  return audit.update(state, **batch, axis_name=axis_name)


@pytest.mark.slow(unless=("explicit",))
@pytest.mark.parametrize("how", ["pmap", "shard_map", "explicit", "automatic"])
def test_eight_devices_give_the_state_of_one(how):
  actual = _mapped(how, "devices", _batches(), jax.devices()[:8])
  expected = _one_device()
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    name = jax.tree_util.keystr(path)
    if np.issubdtype(a.dtype, np.floating):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
    else:
      np.testing.assert_array_equal(a, b, err_msg=name)


def test_padding_may_hold_anything():
  state = audit.init(3, 2)
  logits = jnp.array([[1.0, 0.0], [jnp.nan, 0.0], [0.0, jnp.inf], [0.0, 1.0]])
  arrays = {
    "index": jnp.array([1, 1, 5, -1], jnp.int32),
    "labels": jnp.array([0, 9, -3, 0], jnp.int32),
    "weights": jnp.array([1.0, jnp.nan, jnp.nan, 0.0]),
    "scores": jnp.array([2.0, jnp.inf, jnp.nan, 0.0]),
  }
  mask = jnp.array([True, False, True, True])
  with jax.debug_nans(True):
    actual = audit.summarize(audit.update(state, logits=logits, mask=mask, **arrays))
  np.testing.assert_array_equal(actual["seen"], [0, 1, 0])
  np.testing.assert_allclose(actual["mean_score"][1], 1)
  np.testing.assert_allclose(actual["mean_margin"][1], 1)
  np.testing.assert_allclose(actual["mean_weight"][1], 1)


def test_an_impossible_label_is_refused_or_gives_nan():
  state, index = audit.init(2, 2), jnp.arange(2)
  logits, labels = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 2])
  with pytest.raises(base.InputError, match=r"1 labels .* first is 2 in row 1"):
    audit.update(state, index, logits, labels)
  actual = audit.summarize(_update(state, index, logits, labels))
  np.testing.assert_array_equal(np.isnan(actual["mean_loss"]), [False, True])
  np.testing.assert_array_equal(np.isnan(actual["mean_margin"]), [False, True])
  assert np.isfinite(actual["mean_probabilities"]).all()


def test_a_network_that_has_memorized_everything_still_has_probabilities():
  state = audit.init(2, 2)
  logits, index = jnp.array([[200.0, 0.0], [0.0, 200.0]]), jnp.arange(2)
  state = _update(state, index, logits, index)
  actual = audit.summarize(state)
  np.testing.assert_allclose(actual["mean_probabilities"], np.eye(2), atol=1e-6)


def test_later_steps_with_losses_near_0_do_not_hide_early_ones():
  state, index = audit.init(2, 2), jnp.arange(2)
  early_logits = jnp.array([[0.0, 1.0], [0.0, 1.0]])  # The first label looks wrong.
  state = _update(state, index, early_logits, index)
  early = audit.summarize(state)["mean_probabilities"]
  for _ in range(50):
    state = _update(state, index, jnp.array([[30.0, 0.0], [0.0, 30.0]]), index)
  late = audit.summarize(state)["mean_probabilities"]
  np.testing.assert_allclose(late, early, atol=1e-5)


def test_numbers_that_are_not_finite_are_an_error_outside_jit():
  state, index = audit.init(2, 2), jnp.arange(2)
  logits = jnp.array([[1.0, 0.0], [jnp.nan, 1.0]])
  with pytest.raises(FloatingPointError, match="1 of 2 losses"):
    audit.update(state, index, logits, index)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"index": np.zeros(2)}, "index must be integers"),
    ({"index": np.zeros(3, int)}, "index must be integers"),
    (
      {"logits": np.zeros((2, 4), np.float32)},
      "number of classes of the network to audit.init",
    ),
    ({"logits": np.zeros((2, 2), int)}, "logits must be floating-point"),
    ({"labels": np.zeros((2, 1), int)}, r"labels must be integers of shape \[B\]"),
    ({"weights": np.zeros(1)}, "weights must have shape"),
    ({"scores": np.zeros((2, 1))}, "scores must have shape"),
    ({"mask": np.zeros(2)}, "mask must be bool"),
  ],
)
def test_invalid_arguments_are_refused(change, message):
  arguments = {
    "index": np.zeros(2, int),
    "logits": np.zeros((2, 2), np.float32),
    "labels": np.zeros(2, int),
  }
  with pytest.raises(base.InputError, match=message):
    audit.update(audit.init(2, 2), **(arguments | change))


@pytest.mark.parametrize("sizes", [(0, 2), (2, 1)])
def test_invalid_sizes_are_refused(sizes):
  with pytest.raises(base.InputError, match="must be an integer of at least"):
    audit.init(*sizes)


def test_classes_with_logits_of_minus_infinity_give_an_infinite_mean_margin():
  logits = jnp.array([[1.0, -jnp.inf, -jnp.inf]])
  state = audit.init(1, 3)
  for _ in range(2):
    state = _update(state, jnp.array([0]), logits, jnp.array([0]))
  summary = audit.summarize(state)
  assert summary["mean_margin"] == [np.inf] and summary["mean_loss"] == [0]
  np.testing.assert_array_equal(summary["mean_probabilities"], [[1, 0, 0]])


def test_wide_numbers_are_not_truncated():
  state = audit.init(num_examples=3, num_classes=2)
  logits = jnp.log(jnp.array([[0.9, 0.1], [0.2, 0.8]]))
  with pytest.raises(base.InputError, match="the first is 4294967296 in row 0"):
    audit.update(state, np.array([0, 1]), logits, np.array([2**32, 1]))
  state = audit.update(state, np.array([2**32 + 2, 1]), logits, np.array([0, 1]))
  np.testing.assert_array_equal(audit.summarize(state)["seen"], [0, 1, 0])


def test_a_score_that_is_not_finite_affects_only_its_example():
  state = audit.init(num_examples=3, num_classes=2)
  logits, index = jnp.zeros((3, 2)), jnp.arange(3)
  for bad in (jnp.inf, jnp.nan):
    scores = jnp.array([1.0, bad, 3.0])
    result = audit.summarize(
      audit.update(state, index, logits, jnp.zeros(3, int), scores=scores)
    )
    np.testing.assert_allclose(result["mean_score"][[0, 2]], [0.5, 1.5])
    assert not np.isfinite(result["mean_score"][1])


@pytest.mark.parametrize("num_runs", [1, 2])
def test_summary_of_several_runs_is_that_of_each(num_runs):
  (batch,) = _batches(1)
  shifts = np.arange(num_runs, dtype=np.float32)
  runs = [
    _update(audit.init(_N, _C), **{**batch, "logits": batch["logits"] * (1 + shift)})
    for shift in shifts
  ]
  of_all_runs = audit.summarize(jax.tree.map(lambda *x: np.stack(x), *runs))
  for run, state in enumerate(runs):
    for name, expected in audit.summarize(state).items():
      np.testing.assert_array_equal(of_all_runs[name][run], expected, err_msg=name)


def test_a_number_much_larger_than_the_sum_does_not_hide_it():
  state, index = audit.init(2, 2), jnp.arange(2)
  for margin in (1.0, 1e8, -1e8):  # Without compensation, the sum would be 0.
    logits = jnp.array([[margin, 0.0], [0.0, 0.0]])
    state = _update(state, index, logits, jnp.zeros(2, jnp.int32))
  np.testing.assert_allclose(audit.summarize(state)["mean_margin"], [1 / 3, 0])


def test_an_empty_batch_changes_nothing():
  state = audit.init(num_examples=3, num_classes=2)
  empty = jnp.zeros(0, jnp.int32)
  new = audit.update(state, empty, jnp.zeros((0, 2)), empty)
  chex.assert_trees_all_equal(new, state)


def test_a_summary_takes_the_memory_of_its_result():
  state = jax.tree.map(np.asarray, audit.init(10_000, 100))
  tracemalloc.start()
  summary = audit.summarize(state)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # There is room for only one array of distributions in float64.
  assert peak < 1.3 * summary["mean_probabilities"].nbytes
