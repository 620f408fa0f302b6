"""The shared types, checks and collectives."""

import chex
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax import coresets
from l2rw_jax import group_objectives
from l2rw_jax import inference
from l2rw_jax import label_transition
from l2rw_jax import losses
from l2rw_jax.data import label_noise
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import evaluation


def test_an_entry_that_a_batch_lacks_is_named():
  assert base.entry({"index": 3}, "index", "forml") == 3
  with pytest.raises(base.InputError, match=r"forml: .* no 'index' \(the row of each"):
    base.entry({"image": 3}, "index", "forml")


def test_static_values_are_restored_from_bytes():
  saved = {"order": base.StaticStr("layers"), "kept": base.StaticFloat(0.5)}
  saved["vector"] = jnp.arange(2.0)
  target = jax.tree.map(jnp.zeros_like, saved)
  restored = serialization.from_bytes(target, serialization.to_bytes(saved))
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  np.testing.assert_array_equal(restored["vector"], saved["vector"])


def test_traced_settings_are_not_converted_to_integers():
  for dtype, expected in ((jnp.int32, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
    value = jax.jit(lambda x, dtype=dtype: base.setting(x, dtype))(0.5)
    assert value == 0.5 and value.dtype == expected


def test_static_str_passes_through_transformations():
  name = base.StaticStr("layerwise")
  assert name == "layerwise" and jax.tree.leaves(name) == []
  _, returned = jax.jit(jax.vmap(lambda x: (2 * x, name)))(jnp.arange(3))
  assert returned == "layerwise"


def test_integers_of_every_type_are_accepted_and_returned_as_int():
  for value in (3, np.int8(3), np.uint64(3), np.array(3), jnp.int32(3)):
    number = base.check_integer("size", value)
    assert type(number) is int and number == 3
  assert base.check_integer("step", 0, at_least=0) == 0


@pytest.mark.parametrize(
  "value", [1, -1, 2.0, 2.5, float("nan"), np.float32(2), True, "2", None, np.ones(2)]
)
def test_values_that_are_not_integers_of_at_least_two_are_refused(value):
  with pytest.raises(
    base.InputError, match=r"classes=.* must be an integer of at least"
  ):
    base.check_integer("classes", value, at_least=2)


def test_error_says_that_an_integer_is_traced():
  with pytest.raises(base.InputError, match="size is traced, but must be known"):
    jax.jit(lambda size: base.check_integer("size", size))(3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("largest", [6e-5, 0.5, 3e4])
def test_division_by_the_largest_number_in_every_type(dtype, largest):
  values = jnp.array([largest, -largest / 2, 0], dtype)
  result = base.divide_by_largest(values, jnp.max(values))
  assert result.dtype == dtype
  rtol = 2 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(result.astype(float), [1, -0.5, 0], rtol=rtol)
  zeros = jnp.zeros_like(values)
  np.testing.assert_array_equal(base.divide_by_largest(zeros, zeros[:1]), zeros)


@pytest.mark.parametrize("largest", [1e-9, 0.3, 0.7, 1.0, 1e9])
def test_derivatives_of_a_division_by_the_largest_number(largest):
  value = 0.4 * largest
  divided = jax.grad(base.divide_by_largest, argnums=(0, 1))
  twice = jax.grad(lambda a, b: divided(a, b)[1], argnums=1)
  first, second = jax.jit(lambda a, b: (divided(a, b), twice(a, b)))(value, largest)
  expected = (1 / largest, -value / largest**2)
  np.testing.assert_allclose(first, expected, rtol=1e-6)
  np.testing.assert_allclose(second, 2 * value / largest**3, rtol=1e-6)


def test_meta_losses_and_training_losses_use_different_random_numbers():
  def preprocess(images, keys, train):
    if not train:
      return images
    return images + jax.vmap(lambda k: jax.random.normal(k, images.shape[1:]))(keys)

  model = classifier.Classifier(mlp.MLP(3, (4,)), 3, preprocess=preprocess)
  batch = {
    "image": np.ones((2, 4), np.float32),
    "label": np.zeros(2, np.int32),
    "index": np.arange(2),
  }
  problem = model.problem(class_counts=jnp.ones(3), num_examples=2, num_steps=1)

  @jax.jit
  def all_losses(key):
    params, state = model.init(jax.random.key(0), batch)
    losses, _ = problem.losses_fn(state, key)(params, batch)
    meta_losses, _ = problem.meta_losses_fn(state, key)(params, batch)
    return losses, meta_losses

  losses, meta_losses = all_losses(jax.random.key(1))
  repeated, _ = all_losses(jax.random.key(1))
  np.testing.assert_array_equal(losses, repeated)
  assert not np.isclose(losses, meta_losses).any()


def test_collectives_are_the_identity_without_an_axis():
  x = jnp.arange(3.0)
  for function in (base.psum, base.pmean, base.pmax, base.local, base.gather):
    np.testing.assert_array_equal(function(x, None), x)
  np.testing.assert_array_equal(base.local_slice(x, None), x)
  assert base.global_size(3, None) == 3


def test_gather_and_local_slice_are_inverse():
  x = jnp.arange(16.0).reshape(8, 2)

  def run(values):
    everything = base.gather(values, "d")
    return everything, base.local_slice(everything, "d"), base.global_size(2, "d")

  everything, values, size = jax.vmap(run, axis_name="d")(x)
  np.testing.assert_array_equal(everything, np.tile(np.arange(16.0), (8, 1)))
  np.testing.assert_array_equal(values, x)
  np.testing.assert_array_equal(size, 16)


@pytest.mark.parametrize("check_vma", [True, False])
def test_local_keeps_gradients_local(check_vma):
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec

  def gradient(w, x):
    return jax.grad(lambda w: jnp.sum(w * x))(base.local(w, "d"))[None]

  mapped = jax.shard_map(
    gradient,
    mesh=mesh,
    in_specs=(spec(), spec("d")),
    out_specs=spec("d"),
    check_vma=check_vma,
  )
  np.testing.assert_array_equal(
    jax.jit(mapped)(jnp.float32(1), jnp.array([2.0, 5.0])), [2, 5]
  )


def test_take_gives_nan_for_rows_that_do_not_exist():
  table, index = jnp.array([1.0, 2.0, 3.0]), jnp.array([[2, -1], [3, 0]])
  expected = [[3, np.nan], [np.nan, 1]]
  np.testing.assert_array_equal(base.take(table, index), expected)
  np.testing.assert_array_equal(
    base.take(jnp.arange(6).reshape(3, 2), jnp.array([1])), [[2, 3]]
  )


def test_take_accepts_booleans():
  table = jnp.array([5.0, 7.0])
  np.testing.assert_array_equal(base.take(table, np.array([True, False])), [7, 5])


def test_explicit_sharding_is_followed_and_removed():
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
  with jax.set_mesh(mesh):
    split = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    index = jax.device_put(jnp.array([1, 0, 0, 1]), split)
    taken = base.take(jnp.array([5.0, 7.0]), index)
    np.testing.assert_array_equal(taken, [7, 5, 5, 7])
    assert jax.typeof(taken).sharding.spec == split.spec
    whole = base.unsharded(taken)
    assert not any(jax.typeof(whole).sharding.spec)
    assert jax.typeof(base.sharded_like(whole, index)).sharding.spec == split.spec


@pytest.mark.parametrize(
  ("values", "largest", "finite"),
  [
    ([1.0, -3.0], 3, True),
    ([0.0, 0.0], 0, True),
    ([1.0, -np.inf], np.inf, False),
    ([1.0, np.nan], np.nan, False),
  ],
)
def test_max_abs_and_all_finite_use_all_floating_point_leaves(values, largest, finite):
  tree = {"x": jnp.array(values[:1]), "y": jnp.array(values[1:]), "n": jnp.array([9])}
  np.testing.assert_array_equal(base.max_abs(tree), largest)
  assert base.all_finite(tree) == finite


def test_trees_without_floating_point_leaves_are_finite_and_zero():
  for tree in ({}, {"n": jnp.arange(3)}):
    assert base.all_finite(tree) and base.max_abs(tree) == 0


def test_check_finite_counts_the_bad_rows():
  values = jnp.array([1.0, np.nan, 2.0, np.inf])
  message = r"2 of 4 losses are NaN or infinite, the first in row 1: check the data\."
  with pytest.raises(FloatingPointError, match=message):
    base.check_finite("losses", values, advice=": check the data")
  assert not jax.jit(lambda x: base.check_finite("losses", x))(values)
  assert base.check_finite("losses", values[:1])


def test_first_fault_is_the_first_in_order():
  none, bad, good = jnp.zeros((), jnp.int32), jnp.array(False), jnp.array(True)
  fault = base.first_fault(none, meta_losses=good, meta_gradient=bad, slopes=bad)
  assert fault == base.Fault.META_GRADIENT and fault.dtype == jnp.int32
  assert base.first_fault(fault, training_losses=bad) == base.Fault.META_GRADIENT
  assert base.first_fault(none, slopes=good) == base.Fault.NONE


@pytest.mark.parametrize(
  ("dtype", "expected"),
  [
    (jnp.float16, jnp.float32),
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.float32),
    (jnp.int32, jnp.float32),
  ],
)
def test_accumulator_dtype_is_at_least_single_precision(dtype, expected):
  assert base.accumulator_dtype(dtype) == expected


@pytest.mark.parametrize(
  ("result", "has_aux", "message"),
  [
    (jnp.ones(3), True, "f must return two values.* it returns one array"),
    ((jnp.ones(3),) * 3, True, "it returns 3 values"),
    (None, True, "one value of type NoneType"),
    ((jnp.ones(3), "aux"), False, "an array of shape .* pass has_aux=True"),
    (jnp.ones(()), False, r"one number per example, shape \[B\]; got shape \(\)"),
    (jnp.ones(3, int), False, "must be floating-point numbers; got int32"),
  ],
)
def test_results_of_a_losses_function_are_checked(result, has_aux, message):
  with pytest.raises(base.InputError, match=message):
    base.losses_and_aux("f", result, has_aux)


def test_losses_and_aux_are_split():
  losses, aux = base.losses_and_aux("f", (jnp.ones(3), {"n": 1}), True)
  chex.assert_trees_all_equal((losses, aux), (jnp.ones(3), {"n": 1}))
  assert base.losses_and_aux("f", losses, False) == (losses, None)


def test_permutation_visits_every_example_once():
  train = {"index": np.arange(5)}
  rows = base.permutation((), None, train, np.random.default_rng(0))
  assert sorted(rows.tolist()) == list(range(5))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "uint32"])
def test_take_reads_the_row_of_every_integer_type(dtype):
  index = np.array([0, 1, 120, 127], dtype)
  table = jnp.arange(300.0)
  for given in (index, jnp.asarray(index)):
    np.testing.assert_array_equal(base.take(table, given), index)
    np.testing.assert_array_equal(jax.jit(base.take)(table, given), index)


def test_wide_integers_replaces_out_of_range_integers_by_minus_one():
  np.testing.assert_array_equal(
    base.wide_integers(np.array([0, 255, 2**32, -1, 2**63 - 1]), 256),
    [0, 255, -1, -1, -1],
  )
  wide = base.wide_integers(jnp.array([0, 200], jnp.uint8), 300)
  assert wide.dtype == jnp.int32
  np.testing.assert_array_equal(wide, [0, 200])


@pytest.mark.parametrize("index", [[0, 1], (0, 1), [False, True], np.array([0, 1])])
def test_take_reads_lists(index):
  np.testing.assert_array_equal(base.take(jnp.arange(2.0), index), [0, 1])


_MASKED = np.ma.array([0, 1, 1], mask=[False, False, True])
_LABELS, _LOGITS = np.array([0, 1, 1]), np.eye(3, 2, dtype=np.float32)


@pytest.mark.parametrize(
  "call",
  [
    lambda x: losses.softmax_cross_entropy(jnp.array(_LOGITS), x),
    lambda x: losses.focal(jnp.array(_LOGITS), _LABELS, where=x == 0),
    lambda x: class_balance.inverse_frequency(x),
    lambda x: group_objectives.group_means(jnp.ones(3), x, 2),
    lambda x: group_objectives.check_groups(x, 2),
    lambda x: label_transition.confusion(_LABELS, x, 2),
    lambda x: label_noise.resample(x, np.eye(2), rng=np.random.default_rng(0)),
    lambda x: coresets.select(_LOGITS, x, 2),
    lambda x: coresets.select(np.ma.array(_LOGITS), _LABELS, 2),
    lambda x: audit.find_label_issues({"mean_probabilities": np.ones((3, 2)) / 2}, x),
    lambda x: audit.find_label_issues(
      {"mean_probabilities": np.ma.array(np.ones((3, 2)) / 2)}, _LABELS
    ),
    lambda x: audit.update(audit.init(3, 2), np.arange(3), _LOGITS, x),
    lambda x: evaluation.accuracy(evaluation.Predictions(x, _LABELS, np.ones(3), 2)),
    lambda x: inference.map_batches(lambda b: b["y"], {"y": x}, 2),
  ],
)
def test_masked_arrays_are_refused_because_their_mask_would_be_ignored(call):
  with pytest.raises(base.InputError, match="must not be a masked array"):
    call(_MASKED)
