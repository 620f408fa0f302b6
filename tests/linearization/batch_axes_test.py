"""Every operation of JAX is followed, and rightly, or refused with a reason."""

import jax
from jax import ad_checkpoint
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.linearization import batch_axes

pytestmark = pytest.mark.usefixtures("quick_compilation")

_B = 3
_NAMES = sorted(
  {
    value.name
    for value in vars(jax_core.primitives).values()
    if isinstance(value, jax_core.Primitive)
  }
)


@pytest.mark.parametrize("name", _NAMES)
def test_every_operation_is_followed_or_refused(name):
  assert batch_axes.is_supported(name) != (name in batch_axes.REFUSED)


def _matrices(h):
  return jnp.einsum("bi,bj->bij", h, h) + 3 * jnp.eye(4)


def _set_by_row(h):
  return jax.vmap(lambda row, i: row.at[i].set(row[0] ** 2))(h, jnp.arange(_B))


_I = jnp.array([0, 2])
_FOLLOWED = {
  "stack": lambda h: jnp.stack([h, h**2], 0).sum(0),
  "tile": lambda h: jnp.tile(h, (1, 2)),
  "repeat": lambda h: jnp.repeat(h, 2, 1),
  "set": lambda h: h.at[:, 0].set(h[:, 1]),
  "add": lambda h: h.at[:, _I].add(h[:, :2] ** 2),
  "multiply": lambda h: h.at[:, _I].multiply(h[:, :2], unique_indices=True),
  "max": lambda h: h.at[:, _I].max(h[:, 2:]),
  "set by row": _set_by_row,
  "into zeros": lambda h: jnp.zeros((_B, 6)).at[:, 1:5].set(h),
  "update slice": lambda h: jax.lax.dynamic_update_slice(h, h[:, :1] ** 2, (0, 2)),
  "take": lambda h: jnp.take(h, _I, 1),
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", _FOLLOWED)
def test_what_is_followed_gives_the_numbers_of_forward_mode(name):
  rng = np.random.default_rng(0)
  params, x, vector = (rng.normal(size=s) for s in ((4, 4), (_B, 4), (4, 4)))
  weights = np.array([0.5, -1.0, 2.0])

  @jax.jit
  def both(params):
    def losses_fn(p, x):
      return (_FOLLOWED[name](x @ p) * jnp.cos(x @ p[:, :1])).sum(1)

    found = [
      linearization.linearize(losses_fn, params, x, engine=engine)
      for engine in ("layerwise", "forward")
    ]
    return [
      (f.losses, f.directional(vector), f.weighted_gradient(weights)) for f in found
    ]

  for ours, theirs in zip(*both(params), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


_MIXING = {
  "stack": lambda h: jnp.stack([h[0], h[1], h[2]]),
  "tile": lambda h: jnp.tile(h, (2, 1))[1 : _B + 1],
  "set": lambda h: h.at[0].set(h[1]),
  "add": lambda h: h.at[jnp.array([0, 1, 0])].add(h),
  "update slice": lambda h: jax.lax.dynamic_update_slice(h, h[:1], (2, 0)),
  "fft": lambda h: jnp.real(jnp.fft.fft(h, axis=0)),
  "cholesky": lambda h: jnp.linalg.cholesky(h @ h.T + 3 * jnp.eye(_B)),
  "used mean of a call": lambda h: h + _squared_and_mean(h)[1],
}


@pytest.mark.parametrize("name", _MIXING)
def test_what_mixes_is_refused(name):
  with pytest.raises(base.InputError, match="engine='layerwise' does not fit"):
    linearization.linearize(
      lambda p, x: _MIXING[name](x @ p).sum(1),
      jnp.ones((4, 4)),
      jnp.ones((_B, 4)),
      engine="layerwise",
    )
