"""Every operation of JAX is either supported, with the right axes, or refused."""

import functools

import jax
from jax import ad_checkpoint
from jax.experimental import pallas as pl
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.linearization import batch_axes

_B = 3
_NAMES = sorted(
  {
    value.name
    for value in vars(jax_core.primitives).values()
    if isinstance(value, jax_core.Primitive)
  }
)


@pytest.mark.parametrize("name", _NAMES)
def test_every_operation_is_supported_or_refused(name):
  assert batch_axes.is_supported(name) != (name in batch_axes.REFUSED)


def _matrices(h):
  return jnp.einsum("bi,bj->bij", h, h) + 3 * jnp.eye(4)[None]


def _set_by_row(h):
  return jax.vmap(lambda row, i: row.at[i].set(row[0] ** 2))(h, jnp.arange(_B))


_COLUMNS = jnp.array([0, 2])
_SUPPORTED = {
  "stack": lambda h: jnp.stack([h, h**2], 0).sum(0),
  "tile": lambda h: jnp.tile(h, (1, 2)),
  "repeat": lambda h: jnp.repeat(h, 2, 1),
  "set": lambda h: h.at[:, 0].set(h[:, 1]),
  "add": lambda h: h.at[:, _COLUMNS].add(h[:, :2] ** 2),
  "multiply": lambda h: h.at[:, _COLUMNS].multiply(h[:, :2], unique_indices=True),
  "max": lambda h: h.at[:, _COLUMNS].max(h[:, 2:]),
  "set by row": _set_by_row,
  "index by row": lambda h: h[jnp.arange(_B), jnp.argmax(h, 1)][:, None],
  "several by row": lambda h: h[np.arange(_B)[:, None], jnp.argsort(h, 1)[:, :2]],
  "last by row": lambda h: jnp.stack([h, h**2], 1)[jnp.arange(_B), -1],
  "set one by row": lambda h: h.at[jnp.arange(_B), jnp.argmax(h, 1)].set(h[:, 0] ** 2),
  "scatter by row": lambda h: (
    jnp.zeros((_B, 4)).at[jnp.arange(_B), jnp.argmax(h, 1)].add(h[:, 1] ** 2)
  ),
  "into zeros": lambda h: jnp.zeros((_B, 6)).at[:, 1:5].set(h),
  "update slice": lambda h: jax.lax.dynamic_update_slice(h, h[:, :1] ** 2, (0, 2)),
  "take": lambda h: jnp.take(h, _COLUMNS, 1),
  "take along axis": lambda h: jnp.take_along_axis(h, jnp.argsort(h, 1)[:, :2], 1),
  "fft": lambda h: jnp.abs(jnp.fft.fft(h)) ** 2 + jnp.imag(jnp.fft.fft(h)),
  "cholesky": lambda h: jnp.linalg.cholesky(_matrices(h)).sum(2),
  "eigh": lambda h: jnp.linalg.eigvalsh(_matrices(h)),
  "qr": lambda h: jnp.linalg.qr(_matrices(h))[1].sum(2),
  "svd": lambda h: jnp.linalg.svd(_matrices(h), compute_uv=False),
  "triangular_solve": lambda h: jax.scipy.linalg.solve_triangular(
    _matrices(h), h[..., None], lower=True
  )[..., 0],
  "norm": lambda h: jnp.linalg.norm(h, axis=1, keepdims=True),
  "median": lambda h: jnp.median(h, 1, keepdims=True),
  "log2": lambda h: jnp.log2(1 + h**2),
  "barrier": lambda h: jax.lax.optimization_barrier((h, h**2))[1],
  "bessel": lambda h: jax.scipy.special.i0e(h) + jax.scipy.special.i1e(h),
  "polynomial": lambda h: jnp.polyval(jnp.array([1.0, -2.0, 3.0]), h),
  "interp": lambda h: jnp.interp(h, jnp.linspace(-2, 2, 4), jnp.arange(4.0) ** 2),
  "named": lambda h: ad_checkpoint.checkpoint_name(h, "h") ** 2,
  "unused mean": lambda h: _with_unused_mean(h),
  "unused mean of a call": lambda h: _squared_and_mean(h)[0],
}


@jax.custom_jvp
def _with_unused_mean(h):
  mean = h.mean(0)
  del mean
  return h**2


@_with_unused_mean.defjvp
def _rule(primals, tangents):
  return _with_unused_mean(*primals), 2 * primals[0] * tangents[0]


@jax.custom_jvp
def _squared_and_mean(h):
  return h**2, h.mean(0)


@_squared_and_mean.defjvp
def _rule_of_both(primals, tangents):
  (h,), (t,) = primals, tangents
  return _squared_and_mean(h), (2 * h * t, t.mean(0))


def _scale_kernel(x, y, result):
  result[...] = x[...] * y[...]


def _multiplied(x, y, rows):
  """x * y by a Pallas kernel, each program of which processes `rows` examples."""
  spec = pl.BlockSpec((rows, 4), lambda i: (i, 0))
  return pl.pallas_call(
    _scale_kernel,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    grid=(_B // rows,),
    in_specs=[spec, spec],
    out_specs=spec,
    interpret=True,
  )(x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_kernel(h, rows):
  return _multiplied(h, jnp.sin(h), rows)


def _by_kernel_backward(rows, h, gradient):
  return (_multiplied(gradient, jnp.sin(h) + h * jnp.cos(h), rows),)


_by_kernel.defvjp(lambda h, rows: (_by_kernel(h, rows), h), _by_kernel_backward)


def test_kernels_of_one_example_at_a_time_are_supported():
  rng = np.random.default_rng(0)
  params, x = (rng.normal(size=s).astype(np.float32) for s in ((4, 4), (_B, 4)))

  @jax.jit
  def results(params, x):
    def derivatives(function, engine):
      lin = linearization.linearize(
        lambda p, x: function(x @ p).sum(1), params, x, engine=engine
      )
      return lin.directional(jnp.cos(params)), lin.weighted_gradient(x[:, 0])

    return [
      derivatives(lambda h: _by_kernel(h, 1), "layerwise"),
      derivatives(jax.vmap(lambda h: _by_kernel(h[None], 1)[0]), "layerwise"),
      derivatives(lambda h: h * jnp.sin(h), "forward"),
    ]

  *actual, expected = results(params, x)
  for pair in actual:
    for a, e in zip(pair, expected, strict=True):
      np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_kernels_of_several_examples_are_refused():
  with pytest.raises(base.InputError, match="pallas_call, which mixes examples"):
    linearization.linearize(
      lambda p, x: _by_kernel(x @ p, _B).sum(1),
      jnp.ones((4, 4)),
      jnp.ones((_B, 4)),
      engine="layerwise",
    )


@functools.cache
def _results_of_both_engines():
  """Results for every operation, from one program, which computes `x @ p` once."""
  rng = np.random.default_rng(0)
  params, x, vector = (rng.normal(size=s) for s in ((4, 4), (_B, 4), (4, 4)))
  weights = np.array([0.5, -1.0, 2.0])

  def both(params, operation):
    def losses_fn(p, x):
      return (operation(x @ p) * jnp.cos(x @ p[:, :1])).sum(1)

    linearized = [
      linearization.linearize(losses_fn, params, x, engine=engine)
      for engine in ("layerwise", "forward")
    ]
    return [
      (lin.losses, lin.directional(vector), lin.weighted_gradient(weights))
      for lin in linearized
    ]

  @jax.jit
  def every(params):
    return {name: both(params, operation) for name, operation in _SUPPORTED.items()}

  return jax.device_get(every(params))


@pytest.mark.ci
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", _SUPPORTED)
def test_layerwise_equals_forward_mode_for_each_operation(name):
  for actual, expected in zip(*_results_of_both_engines()[name], strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_indices_by_row_are_known_under_shard_map():
  def losses_fn(params, x):
    return (x @ params)[jnp.arange(len(x)), jnp.argmax(x, 1)]

  def losses(params, x):
    params = base.local(params, "data")
    return linearization.linearize(losses_fn, params, x, engine="layerwise").losses

  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  sharded = jax.shard_map(
    losses, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data")
  )
  assert jax.eval_shape(sharded, jnp.ones((4, 4)), jnp.ones((6, 4))).shape == (6,)


# Functions of the examples, and the operation that mixes them.
_MIXING = {
  "stack": ("slice", lambda h: jnp.stack([h[1], h[0], h[2]])),
  "unstack": ("unstack", lambda h: jnp.stack(jnp.unstack(h)[::-1])),
  "tile": ("tile", lambda h: jnp.tile(h, (2, 1))[1 : _B + 1]),
  "set": ("scatter", lambda h: jnp.zeros((_B, 4)).at[jnp.array([1, 0, 2])].set(h)),
  "add": ("scatter-add", lambda h: h.at[jnp.array([0, 1, 0])].add(h)),
  "update slice": (
    "dynamic_update_slice",
    lambda h: jax.lax.dynamic_update_slice(jnp.zeros((_B + 1, 4)), h, (1, 0))[:_B],
  ),
  "fft": ("fft", lambda h: jnp.real(jnp.fft.fft(h, axis=0))),
  "cholesky": (
    "cholesky",
    lambda h: jax.lax.linalg.cholesky(h[:, :_B], symmetrize_input=False),
  ),
  "sum": ("reduce_sum", lambda h: h + h.sum(0, keepdims=True)),
  "cumsum": ("cumsum", lambda h: jnp.cumsum(h, 0)),
  "sort": ("sort", lambda h: jnp.sort(h, 0)),
  "top_k": ("top_k", lambda h: jax.lax.top_k(h.T, 2)[0].sum(1)[None] + h),
  "reverse": ("rev", lambda h: h[::-1]),
  "slice": ("slice", lambda h: jnp.concatenate([h[1:], h[:1]])),
  "concatenate": ("concatenate", lambda h: jnp.concatenate([h, h])[1 : _B + 1]),
  "pad": ("pad", lambda h: jax.lax.pad(h, 0.0, ((1, -1, 0), (0, 0, 0)))),
  "gather": ("gather", lambda h: h[jnp.array([1, 0, 2])]),
  "gather from all rows": (
    "gather",
    lambda h: h[jnp.arange(_B)[None], jnp.argmax(h, 1)[:, None]],
  ),
  "gather in reverse": (
    "gather",
    lambda h: h[jnp.arange(_B)[::-1], jnp.argmax(h, 1)][:, None],
  ),
  "scatter in reverse": (
    "scatter-add",
    lambda h: h.at[jnp.arange(_B)[::-1], jnp.argmax(h, 1)].add(h[:, 0]),
  ),
  "gather by example": ("gather", lambda h: h[jnp.argmax(h, 1) % _B]),
  "window": (
    "reduce_window_sum",
    lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (2, 1), (1, 1), "SAME"),
  ),
  "transpose": ("dot_general", lambda h: h + h[:, :_B].T @ jnp.ones((_B, 4))),
  "products of examples": ("dot_general", lambda h: (h @ h.T) @ h),
  "outer sum": ("add", lambda h: (h[:, None] + h[None]).sum(1)),
  "square": (
    "select_n",
    lambda h: jnp.where(jnp.eye(_B, dtype=bool), h[:, :_B], h[:, :_B].T),
  ),
  "reshape": ("reshape", lambda h: h.reshape(2, 6)[:1, :_B].T),
  "reshape and transpose": ("reshape", lambda h: jax.lax.reshape(h, (_B, 4), (1, 0))),
  "convolution": (
    "conv_general_dilated",
    lambda h: jax.lax.conv_general_dilated(
      *(h[None], jnp.ones((3, 4, 4)), (1,), "SAME"),
      dimension_numbers=("NWC", "WIO", "NWC"),
    )[0],
  ),
  "mean in a loop": (
    "reduce_sum",
    lambda h: jax.lax.map(lambda w: h * h.mean(0, keepdims=True) * w, jnp.ones(2)).sum(
      0
    ),
  ),
  "used mean of a call": (
    "custom_jvp_call",
    lambda h: h + _squared_and_mean(h)[1][None],
  ),
}


@pytest.mark.parametrize("name", _MIXING)
def test_operations_that_mix_examples_are_refused(name):
  operation, function = _MIXING[name]
  message = (
    rf"engine='layerwise' does not fit this model: {operation}, which (mix|merg)es"
  )
  with pytest.raises(base.InputError, match=message):
    linearization.linearize(
      lambda p, x: function(x @ p).sum(1),
      jnp.ones((4, 4)),
      jnp.ones((_B, 4)),
      engine="layerwise",
    )
