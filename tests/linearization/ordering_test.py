"""`after` keeps values and adds a dependency; programs grow only linearly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.linearization import ordering
from l2rw_jax.methods import l2rw

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 3e38])
def test_after_does_not_change_values(value):
  first = {"x": jnp.array([value, 1.0]), "empty": jnp.zeros(0), "int": jnp.arange(2)}
  assert ordering.after(first, {"temperature": 2.5}) == {"temperature": 2.5}
  then = {
    "x": jnp.array([-0.0, jnp.nan, -jnp.inf]),
    "half": jnp.ones(2, jnp.bfloat16),
    "int": jnp.arange(3, dtype=jnp.uint8),
    "bool": jnp.array([True, False]),
    "key": jax.random.split(jax.random.key(0)),
  }
  result = jax.jit(ordering.after)(first, then)
  for name, expected in then.items():
    actual = result[name]
    assert actual.dtype == expected.dtype
    if name == "key":
      actual, expected = jax.random.key_data(actual), jax.random.key_data(expected)
    np.testing.assert_array_equal(actual, expected)
  assert np.signbit(result["x"][0])  # The sign of -0.0 is kept.


def _in_a_loop(params, x):
  """Layers in a loop, whose parameters are first cast to half precision."""
  layers = params["layers"].astype(jnp.bfloat16).astype(jnp.float32)
  return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, layers)[0]


def _twice(params, x):
  return _in_a_loop(params, _in_a_loop(params, x)) @ params["head"]


def _in_a_narrow_loop(params, x):
  layers = params["layers"].astype(jnp.bfloat16)

  def layer(x, kernel):
    return jnp.tanh(x @ kernel.astype(jnp.float32)), None

  return jax.lax.scan(layer, x, layers)[0] @ params["head"]


@pytest.mark.parametrize("num_examples", [4, 64])
@pytest.mark.parametrize(
  # Each of the two casts of `_twice` is stored, but depends on no example.
  ("network", "bytes_of_casts"),
  [(_twice, 2 * 3 * 16 * 16 * 4), (_in_a_narrow_loop, 0)],
)
def test_parameters_in_loops_are_counted_once_and_in_their_own_type(
  network, bytes_of_casts, num_examples
):
  shapes = {"layers": (3, 16, 16), "head": (16, 16)}
  leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]
  x = jax.ShapeDtypeStruct((num_examples, 16), jnp.float32)
  results = []

  def trace(leaves, x):
    def losses_fn(leaves):
      return network(dict(zip(shapes, leaves, strict=True)), x).sum(1)

    losses, vjp_fn = jax.vjp(losses_fn, leaves)
    ratio = ordering.activation_ratio(losses_fn, vjp_fn, leaves, x, num_examples)
    results.append((ratio, ordering.residual_bytes(vjp_fn, (leaves, x))))
    return losses

  jax.eval_shape(trace, leaves, x)
  ((ratio, activations),) = results
  # Only the head, 16 x 16 numbers of four bytes, is outside of loops.
  assert ratio == (activations - bytes_of_casts) / (16 * 16 * 4)


def test_values_of_parameters_alone_are_not_activations_but_random_masks_are():
  leaves = [jnp.ones((16, 16)), jnp.ones(16)]
  x, key = jnp.ones((4, 16)), jax.random.key(0)

  def trace(leaves, x, key):
    def losses_fn(leaves):
      kernel, bias = leaves
      y = jax.checkpoint(lambda kernel: jnp.sin(x @ kernel) @ kernel.T)(kernel)
      return jax.random.normal(key, y.shape) * y @ jnp.exp(bias)

    vjp_fn = jax.vjp(losses_fn, leaves)[1]
    ratios.append(ordering.activation_ratio(losses_fn, vjp_fn, leaves, x, 4))

  ratios = []
  jax.eval_shape(trace, leaves, x, key)
  # The inputs of the second product and of exp(bias), cos(x @ kernel), and the mask:
  # each has the size of x, and none is the transposed kernel or exp(bias).
  assert ratios == [4 * x.size / (16 * 16 + 16)]


def test_zero_after_is_float32_in_double_precision():
  with jax.enable_x64(True):
    for first in (jnp.arange(2), jnp.ones(2)):
      assert ordering.zero_after(first).dtype == jnp.float32


def test_after_under_vmap_and_grad():
  first, then = jnp.array([[1.0], [jnp.nan]]), jnp.array([[2.0, 3.0], [4.0, 5.0]])
  gradient = jax.jit(
    jax.vmap(jax.grad(lambda x, y: (ordering.after(x, y) ** 2).sum(), (0, 1)))
  )
  of_first, of_then = gradient(first, then)
  np.testing.assert_array_equal(of_first, 0 * then[:, :1])
  np.testing.assert_array_equal(of_then, 2 * then)


def test_the_compiler_keeps_the_dependency():
  run = jax.jit(lambda x, y: ordering.after(jnp.sin(x), y)).lower(1.0, 2.0).compile()
  assert "sine(" in run.as_text()


def _network(params, x):
  for kernel in params:
    x = jnp.tanh(x @ kernel)
  return (x**2).sum(1)


def _lines(step, num_arrays, *data):
  kernels = [jax.ShapeDtypeStruct((4, 4), jnp.float32)] * num_arrays
  compiled = jax.jit(step).lower(kernels, *data).compile()
  return len(compiled.as_text().splitlines())


@pytest.mark.ci
@pytest.mark.slow(unless=("options3",))
@pytest.mark.parametrize(
  "options",
  [{}, {"engine": "forward"}, {"engine": "difference"}, {"microbatch_size": 4}],
)
def test_programs_grow_linearly_with_the_number_of_parameter_arrays(options):
  x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  step = l2rw.weighted_value_and_grad(_network, **options)
  few, some, many = (_lines(step, n, x, x) for n in (3, 9, 15))
  assert many - some <= 1.1 * (some - few)


def test_a_program_is_less_than_five_times_that_of_plain_training():
  x = jax.ShapeDtypeStruct((8, 4), jnp.float32)

  def plain(params, x):
    return jax.value_and_grad(lambda params: _network(params, x).mean())(params)

  actual = _lines(l2rw.weighted_value_and_grad(_network, engine="forward"), 20, x, x)
  assert actual <= 4.6 * _lines(plain, 20, x)


def test_after_explicitly_sharded_arrays():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
  with jax.set_mesh(mesh):
    spec = jax.sharding.PartitionSpec("data")
    first = jax.device_put(jnp.arange(4.0), jax.NamedSharding(mesh, spec))
    for run in (ordering.after, jax.jit(ordering.after)):
      np.testing.assert_array_equal(
        run({"x": first, "y": jnp.complex64(1)}, first), first
      )


def test_values_that_jax_does_not_support_are_unchanged():
  then = {"file": np.array(["a", "b"]), "any": np.array([None, 1]), "name": "training"}
  assert ordering.after(jnp.ones(2), then) == then


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_after_works_without_promotion_and_with_nan_checks(dtype):
  first = [jnp.ones(2, dtype), jnp.ones((1, 1), jnp.float32)]
  with (
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
    jax.debug_nans(True),
  ):
    result = ordering.after(first, jnp.ones((2, 2), dtype))
  np.testing.assert_array_equal(result, np.ones((2, 2)))
