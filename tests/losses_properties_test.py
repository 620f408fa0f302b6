"""Every loss on every kind of input, against its formula in NumPy and float64."""

import functools
from typing import Any, NamedTuple

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import losses

_TRANSITION = {
  2: np.array([[0.9, 0.1], [0.3, 0.7]]),
  3: np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.0, 0.5, 0.5]]),
}

_COUNTS = np.array([40, 5, 1])


def _symmetric(log_p, is_label):
  p = np.maximum(np.exp(log_p), 1e-7)
  reverse = -np.log(1e-4) * np.sum(p * ~is_label, 1)
  return -0.1 * log_p[is_label] + reverse


def _truncated(log_p, is_label):
  return (1 - np.maximum(np.exp(log_p[is_label]), 0.5) ** 0.7) / 0.7


def _soft(log_p, is_label):
  target = 0.95 * is_label + 0.05 * np.exp(log_p)
  return -np.sum(target * log_p, 1)


def _forward(log_p, is_label):
  transition = _TRANSITION[log_p.shape[1]]
  return -np.log((np.exp(log_p) @ transition)[is_label])


def _plain(logits, labels, **options):
  is_single = logits.shape[1] == 1
  function = losses.sigmoid_cross_entropy if is_single else losses.softmax_cross_entropy
  return function(logits, labels, **options)


def _corrected(logits, labels, **options):
  # A copy, because JAX caches constants by identity, even across precisions.
  transition = _TRANSITION[max(logits.shape[-1], 2)].copy()
  return losses.forward_corrected(logits, labels, transition, **options)


def _adjusted(log_p, is_label):
  z = log_p + 0.7 * np.log(_COUNTS[: log_p.shape[1]])
  return np.log(np.exp(z).sum(1)) - z[is_label]


def _with_counts(logits, labels, **options):
  counts = _COUNTS[: max(logits.shape[-1], 2)]
  return losses.logit_adjusted(logits, labels, counts, 0.7, **options)


# Each loss, and its formula for log p [B, C] and a mask of the labels [B, C].
_LOSSES: dict[str, tuple[Any, Any]] = {
  "cross_entropy": (_plain, lambda log_p, y: -log_p[y]),
  "focal": (losses.focal, lambda log_p, y: -((1 - np.exp(log_p[y])) ** 2) * log_p[y]),
  "symmetric": (losses.symmetric_cross_entropy, _symmetric),
  "generalized": (
    losses.generalized_cross_entropy,
    lambda log_p, y: (1 - np.exp(0.7 * log_p[y])) / 0.7,
  ),
  "truncated": (
    functools.partial(losses.generalized_cross_entropy, threshold=0.5),
    _truncated,
  ),
  "bootstrapping_soft": (losses.bootstrapping_soft, _soft),
  "bootstrapping_hard": (
    losses.bootstrapping_hard,
    lambda log_p, y: -0.8 * log_p[y] - 0.2 * log_p.max(1),
  ),
  "forward_corrected": (_corrected, _forward),
  "logit_adjusted": (_with_counts, _adjusted),
}


class _Kind(NamedTuple):
  """The properties of the inputs that determine the compiled program."""

  shape: tuple[int, int]
  dtype: str
  label_dtype: str
  has_where: bool


_KINDS = [
  _Kind((5, 3), "float32", "int32", True),
  _Kind((5, 3), "float32", "uint8", False),
  _Kind((5, 3), "float16", "int8", True),
  _Kind((5, 3), "bfloat16", "uint32", False),
  _Kind((5, 3), "float64", "int64", True),
  _Kind((5, 1), "float32", "int16", True),
  _Kind((5, 1), "float16", "uint16", False),
  _Kind((5, 1), "float64", "uint32", False),
  _Kind((0, 3), "float32", "int32", True),
  _Kind((0, 1), "bfloat16", "int8", False),
]


@jax.jit
def _all_losses(logits, labels, where):
  """The L kinds of losses, [L, B], and the gradient of the sum of each, [L, B, C]."""

  def stacked(logits):
    actual = [f(logits, labels, where=where) for f, _ in _LOSSES.values()]
    assert all(x.dtype == logits.dtype for x in actual)
    return jnp.stack(actual)

  values, vjp_fn = jax.vjp(stacked, logits)
  ones = jnp.ones_like(values)
  each = jnp.eye(len(_LOSSES), dtype=values.dtype)[:, :, None]
  return values, jax.vmap(vjp_fn)(each * ones[None])[0]


def _expected(logits, labels):
  """Values of the formulas, [L, B]; all labels must be classes that exist."""
  z = np.asarray(logits, np.float64)
  z = np.concatenate([0 * z, z], 1) if z.shape[1] == 1 else z
  z = z - z.max(1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
  is_label = labels[:, None] == np.arange(log_p.shape[1])[None]
  return np.stack([formula(log_p, is_label) for _, formula in _LOSSES.values()])


@pytest.mark.slow
@hypothesis.given(
  st.sampled_from(_KINDS),
  st.lists(st.integers(-2, 4), min_size=5, max_size=5),
  st.lists(st.booleans(), min_size=5, max_size=5),
  st.sampled_from([0.1, 2.0, 8.0]),
  st.integers(0, 99),
)
@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
def test_every_loss_is_its_formula(kind, labels, where, scale, seed):
  size, columns = kind.shape
  labels = np.array(labels[:size]).astype(kind.label_dtype)
  is_counted = np.array(where[:size], bool) if kind.has_where else np.ones(size, bool)
  logits = scale * np.random.default_rng(seed).normal(size=kind.shape)
  logits = logits.astype(jnp.dtype(kind.dtype))
  exists = (labels >= 0) & (labels < max(columns, 2))
  with_nan = np.where(is_counted[:, None], logits, np.nan).astype(logits.dtype)
  with jax.enable_x64(kind.dtype == "float64"):
    values, slopes = _all_losses(
      with_nan, labels, is_counted if kind.has_where else None
    )
  assert values.dtype == slopes.dtype == logits.dtype
  values, slopes = (np.asarray(x, np.float64) for x in (values, slopes))

  is_nan = np.tile(is_counted & ~exists, (len(_LOSSES), 1))
  np.testing.assert_array_equal(np.isnan(values), is_nan)
  assert not values[:, ~is_counted].any() and not slopes[:, ~is_counted].any()
  good = is_counted & exists
  assert np.isfinite(slopes[:, good]).all()
  # Half precision is rounded once, at the end.
  epsilon = float(jnp.finfo(kind.dtype).eps)
  rtol = epsilon if epsilon > 1e-4 else 100 * epsilon
  np.testing.assert_allclose(
    values[:, good], _expected(logits[good], labels[good]), rtol=rtol, atol=rtol / 4
  )


@pytest.mark.parametrize("name", _LOSSES)
def test_a_label_for_each_of_several_outputs_is_refused(name):
  function, _ = _LOSSES[name]
  with pytest.raises(base.InputError, match=r"logits must be \[B, C\]"):
    function(jnp.zeros((2, 4, 3)), jnp.zeros((2, 4), jnp.int32))


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_a_label_that_does_not_fit_32_bits_names_no_class(dtype):
  labels = np.array([0, 2**32, 2**32 + 1, 1], dtype)
  for x64, convert in ((False, np.asarray), (True, np.asarray), (True, jnp.asarray)):
    with jax.enable_x64(x64):
      for function, _ in _LOSSES.values():
        actual = function(jnp.zeros((4, 3)), convert(labels))
        np.testing.assert_array_equal(np.isnan(actual), [False, True, True, False])
