"""Norms, products and clipped means of per-example gradients equal `vmap(grad)`'s."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.linearization import ghost_products
from l2rw_jax.linearization import per_example
from l2rw_jax.models import group_norm
from l2rw_jax.models import lenet
from l2rw_jax.models import transformer

_B = 4
_FLAX_IN_FLOAT64 = pytest.mark.promotes("flax's layers mix float64 with float32")


def _normal(*shape):
  return np.random.default_rng(0).normal(size=shape)


def _ids(*shape):
  return np.random.default_rng(0).integers(5, size=shape)


def _dense(p, x):
  return jnp.tanh(x @ p["first"] + p["bias"][None]) @ p["second"]


def _positions(p, x):
  """A dense layer at many positions of an example."""
  return jnp.tanh(x @ p["first"] + p["bias"][None, None]).sum(1)


def _convolutions(p, x):
  x = jax.lax.conv_general_dilated(
    x, p["grouped"], (2, 1), ((1, 0), (2, 2)), rhs_dilation=(1, 2),
    feature_group_count=2, dimension_numbers=("NHWC", "OIHW", "NCHW"),
  )  # fmt: skip
  x = jnp.tanh(x)
  x = jax.lax.conv_general_dilated(
    x, p["transposed"], (1, 1), ((1, 1), (0, 2)), lhs_dilation=(2, 1),
    dimension_numbers=("NCHW", "HWIO", "NHWC"),
  )  # fmt: skip
  return jnp.sin(x).sum((1, 2))


def _tied(p, ids):
  """A table of embeddings that is also the output layer."""
  h = jnp.tanh(p["table"][ids] + p["positions"])
  return (h @ p["table"].T).sum(1)


def _lookups(p, ids):
  """Lookups along both axes of a table, some of them out of bounds."""
  rows = jnp.take(p["table"], ids - 2, axis=0, mode="clip")
  columns = jnp.take(p["table"], ids, axis=1, fill_value=0, mode="fill")
  return jnp.tanh(rows).sum(1) + jnp.tanh(columns).sum((0, 2))[:, None]


def _fields(p, ids):
  """Lookups with several indices, some of them out of bounds, and under `vmap`."""
  numbers = jnp.arange(ids.shape[1])
  rows = p["tables"].at[numbers, ids].get(mode="fill", fill_value=0)
  rows += jax.vmap(lambda row: jax.vmap(lambda t, i: t[i])(p["tables"], row))(ids)
  return jnp.tanh(rows).sum(1) + jax.vmap(lambda row: p["other"][row[0], :, 1])(ids)


def _recurrent(p, x):
  h = jnp.zeros((x.shape[0], 3), x.dtype)
  for t in range(x.shape[1]):
    h = jnp.tanh(h @ p["kernel"] + x[:, t])
  return h @ p["kernel"].T


def _shared(p, ids):
  """Two lookups in a table that three dense layers use as well."""
  h = jnp.tanh(p["table"][ids] + p["table"][4 - ids])
  return jnp.tanh(jnp.tanh(h @ p["table"]) @ p["table"]) @ p["table"].T


def _sliced(p, ids):
  """Each example reads a different slice of a matrix."""
  rows = jax.vmap(lambda i: jax.lax.dynamic_slice(p["table"], (i % 3, 0), (2, 4)))(ids)
  return jnp.tanh(rows).sum(1) * p["scale"][None]


def _transformed(p, x):
  """Weight normalization, slices, scalars, and a penalty added to the outputs."""
  kernel = p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True) * p["g"][None]
  token = jnp.broadcast_to(p["g"][:1], (x.shape[0], 1))
  h = jnp.concatenate([jnp.where(x @ kernel > 0, x @ kernel, p["g"][None]), token], 1)
  h = jnp.concatenate([h * p["g"][0], h - p["scalar"]], 1) / p["scalar"]
  # The same number in every output would not change the cross-entropy.
  return h + jnp.sum(p["v"] ** 2) * jnp.linspace(0, 0.1, h.shape[1])[None]


def _experts(p, x):
  """A different matrix for each head, and a product of parameters and rows."""
  h = jnp.einsum("bhk,hkn->bhn", x, p["heads"])
  h = jnp.einsum("nm,bhn->bmh", p["right"], jnp.tanh(h))
  return jnp.cumsum(h, 1).sum(2) * jnp.cumprod(p["right"], 0)[:1]


class _GroupNorms(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), (2, 2))(x)))
    return group_norm.GroupNorm(2)(nn.Conv(4, (3, 3))(x)).mean((1, 2))


class _Attention(nn.Module):
  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(5, 4)
    h = table(ids)
    h += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
    h += nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.RMSNorm()(h))))
    return table.attend(h)[:, -1]


def _scanned(p, x):
  def step(h, x):
    return jnp.tanh(h @ p["kernel"] + x), None

  return jax.lax.scan(step, jnp.zeros((x.shape[0], 3)), x.swapaxes(0, 1))[0]


def _arrays(**shapes):
  rng = np.random.default_rng(1)
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


_DENSE = {"first": (6, 3), "bias": (3,), "second": (3, 5)}
_NETWORKS = {
  "dense": (_dense, _arrays(**_DENSE), _normal(_B, 6)),
  "positions": (_positions, _arrays(**_DENSE), _normal(_B, 7, 6)),
  "convolutions": (
    _convolutions,
    _arrays(grouped=(4, 2, 2, 3), transposed=(3, 3, 4, 3)),
    _normal(_B, 6, 5, 4),
  ),
  "tied": (_tied, _arrays(table=(5, 3), positions=(1, 4, 3)), _ids(_B, 4)),
  "tied_short": (_tied, _arrays(table=(5, 8), positions=(1, 2, 8)), _ids(_B, 2)),
  "shared": (_shared, _arrays(table=(5, 5)), _ids(_B)),
  "sliced": (_sliced, _arrays(table=(4, 4), scale=(4,)), _ids(_B)),
  "lookups": (_lookups, _arrays(table=(4, 4)), _ids(_B, 4)),
  "fields": (_fields, _arrays(tables=(3, 4, 6), other=(5, 6, 2)), _ids(_B, 3)),
  "recurrent": (_recurrent, _arrays(kernel=(3, 3)), _normal(_B, 5, 3)),
  "transformed": (
    _transformed,
    _arrays(v=(3, 4), g=(4,), scalar=()),
    _normal(_B, 3),
  ),
  "experts": (_experts, _arrays(heads=(2, 3, 4), right=(4, 5)), _normal(_B, 2, 3)),
  "scanned": (_scanned, _arrays(kernel=(3, 3)), _normal(_B, 5, 3)),
  "group_norm": (_GroupNorms(), None, _normal(_B, 6, 6, 3)),
  "attention": (_Attention(), None, _ids(_B, 3)),
}


def _problem(name, dtype="float64"):
  network, params, x = _NETWORKS[name]
  x = jnp.asarray(x, dtype if x.dtype == "float64" else None)
  if params is None:
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda s: 0.1 + rng.normal(size=s.shape), shapes)
    network = network.apply
  params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)

  def losses_fn(params, batch):
    return losses.softmax_cross_entropy(network(params, batch["x"]), batch["y"])

  return losses_fn, params, {"x": x, "y": jnp.arange(_B) % 3}


def _gradients(losses_fn, params, batch):
  """Gradients by `vmap(grad)`, as a matrix with a row for each example."""

  def loss(params, row):
    return losses_fn(params, jax.tree.map(lambda x: x[None], row))[0]

  gradients = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
  return jnp.concatenate([g.reshape(_B, -1) for g in jax.tree.leaves(gradients)], 1)


def _flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def _constant(value, *_):
  return value


@pytest.mark.ci(unless=("dense", "tied", "scanned"))
@pytest.mark.slow(
  "attention",
  "experts",
  "transformed",
  "recurrent",
  "group_norm",
  "tied_short",
  "lookups",
  "sliced",
)
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=_FLAX_IN_FLOAT64 if net[1] is None else ())
    for name, net in _NETWORKS.items()
  ],
)
@pytest.mark.usefixtures("x64")
def test_results_equal_vmap_of_grad(name, monkeypatch):
  losses_fn, params, batch = _problem(name)

  def results(params, batch):
    gradients = _gradients(losses_fn, params, batch)
    clipped, info = per_example.clipped_gradient(losses_fn, params, batch, 1.0)
    both = []
    for is_ghost in (True, False):
      choice = functools.partial(_constant, is_ghost)
      monkeypatch.setattr(ghost_products, "_is_ghost_cheaper", choice)
      norms, _ = per_example.norms(losses_fn, params, batch)
      both.append((norms, per_example.inner_products(losses_fn, params, batch)[0]))
    return gradients, clipped, info, both

  gradients, clipped, info, both = jax.device_get(jax.jit(results)(params, batch))
  assert info.engine == ("vmap" if name == "scanned" else "layerwise")
  norms, expected = np.linalg.norm(gradients, axis=1), gradients @ gradients.T
  np.testing.assert_allclose(info.norms, norms, rtol=1e-11)
  for actual_norms, actual in both:
    np.testing.assert_allclose(actual_norms, norms, rtol=1e-11)
    np.testing.assert_allclose(actual, expected, atol=1e-11 * expected.max())
  factors = np.minimum(1, 1 / norms)
  assert (factors < 1).any()
  np.testing.assert_allclose(_flat(clipped), factors @ gradients / _B, atol=1e-12)


@pytest.mark.slow
def test_microbatches_do_not_change_the_results():
  losses_fn, params, batch = _problem("positions", "float32")

  def with_aux(params, batch):
    return losses_fn(params, batch), {"sum": batch["x"].sum((1, 2))}

  def results(params, batch, **options):
    options["has_aux"] = True
    return (
      per_example.norms(with_aux, params, batch, **options),
      per_example.clipped_gradient(with_aux, params, batch, 1.0, **options),
    )

  def by_options(params, batch):
    return [
      results(params, batch, **options)
      for options in (
        {"engine": "layerwise"},
        {"engine": "layerwise", "microbatch_size": 3},
        {"engine": "vmap"},
        {"engine": "vmap", "microbatch_size": 3},
      )
    ]

  first, *others = jax.jit(by_options)(params, batch)
  for other in others:
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(first), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  engines = [result[0][1].engine for result in (first, *others)]
  assert engines == ["layerwise", "layerwise", "vmap", "vmap"]


def _normalized(params, x):
  return jnp.sum((x @ params - (x @ params).mean(0, keepdims=True)) ** 2, 1)


@pytest.mark.parametrize("size", [1, 7])
def test_half_precision_is_not_taken_for_dependence_on_other_examples(size):
  # The network computes in bfloat16 and returns losses in float32. Its rounding errors
  # differ between one example and a batch, which must not make the results NaN.
  rng = np.random.default_rng(0)
  shapes = {"w": (4, 6), "b": (1, 6), "v": (6, 3)}
  params = {k: jnp.array(rng.normal(size=s), jnp.bfloat16) for k, s in shapes.items()}
  batch = jnp.array(rng.normal(size=(size, 4)), jnp.float32)

  def losses_fn(params, x):
    hidden = jnp.tanh(x.astype(jnp.bfloat16) @ params["w"] + params["b"])
    logits = (hidden @ params["v"]).astype(jnp.float32)
    return -jax.nn.log_softmax(logits)[:, 0]

  def mixing(params, x):
    return losses_fn(params, x - x.mean(axis=0, keepdims=True))

  norms = jax.jit(lambda x: per_example.norms(losses_fn, params, x, engine="vmap")[0])
  of_one = jax.grad(lambda p, x: losses_fn(p, x[None])[0])
  gradients = jax.jit(jax.vmap(of_one, (None, 0)))(params, batch)
  squares = [np.square(np.asarray(g, np.float64)) for g in gradients.values()]
  lengths = np.sqrt(sum(x.sum(axis=(1, 2)) for x in squares))
  np.testing.assert_allclose(norms(batch), lengths, rtol=2e-2)
  if size > 1:
    with pytest.raises(base.InputError, match="changes with the other examples"):
      per_example.norms(mixing, params, batch, engine="vmap")


def test_losses_that_depend_on_other_examples_are_refused():
  params, x = jnp.ones((4, 2)), jnp.asarray(_normal(_B, 4), jnp.float32)
  with pytest.raises(base.InputError, match="changes with the other examples"):
    per_example.norms(_normalized, params, x)
  with pytest.raises(base.InputError, match=r"does not fit .* engine='vmap'"):
    per_example.norms(_normalized, params, x, engine="layerwise")
  # Losses that are all small.
  with pytest.raises(base.InputError, match="changes with the other examples"):
    per_example.norms(lambda p, x: 1e-4 * jnp.tanh(_normalized(p, x)), params, x)
  gradient, info = jax.jit(
    lambda params, x: per_example.clipped_gradient(_normalized, params, x, 1.0)
  )(params, x)
  assert np.isnan(info.norms).all() and np.isnan(gradient).all()


def test_wrong_arguments_are_reported():
  def losses_fn(params, x):
    return (x @ params) ** 2

  params, x = jnp.ones(2), jnp.ones((3, 2))
  for max_norm in (0.0, jnp.ones(3)):
    with pytest.raises(base.InputError, match="max_norm"):
      per_example.clipped_gradient(losses_fn, params, x, max_norm)
  with pytest.raises(base.InputError, match="engine='forward': choose one of"):
    per_example.norms(losses_fn, params, x, engine="forward")


def test_leaves_that_are_held_fixed_and_shared_arrays_are_supported():
  params = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "count": jnp.array(3)}
  batch = {"x": jnp.eye(4, 2, dtype=jnp.bfloat16), "scale": jnp.ones(3, jnp.bfloat16)}

  def losses_fn(params, batch):
    return ((batch["x"] @ params["kernel"]) * batch["scale"][None]).sum(1) * 2

  for engine in ("layerwise", "vmap"):
    gradient, info = per_example.clipped_gradient(
      losses_fn, params, batch, 1.0, engine=engine
    )
    assert gradient["count"] == 0 and gradient["kernel"].dtype == jnp.bfloat16
    expected = 2 * 3**0.5 * np.array([1, 1, 0, 0])
    np.testing.assert_allclose(info.norms, expected, rtol=1e-6)
    assert info.norms.dtype == jnp.float32
    np.testing.assert_allclose(
      np.asarray(gradient["kernel"], float), 0.25 / 3**0.5, rtol=0.01
    )


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_batches_of_integers_and_of_values_that_are_not_arrays(engine):
  def losses_fn(kernel, batch):
    assert batch.get("name", "training") == "training"
    return (batch["x"].astype(kernel.dtype) @ kernel) ** 2

  batch = {"x": np.array([[1, 0], [0, 2], [3, 4]], np.uint8)}
  expected = [2.0, 8.0, 70.0]  # 2 (x . 1) |x|
  with jax.enable_x64(True):
    kernel = jnp.ones(2)
    size = 2 if engine == "auto" else None
    norms = per_example.norms(
      losses_fn, kernel, batch, engine=engine, microbatch_size=size
    )[0]
    np.testing.assert_allclose(norms, expected, rtol=1e-12)
  batch |= {"name": "training", "file": np.array(["a", "b", "c"])}
  norms = per_example.norms(losses_fn, jnp.ones(2), batch, engine=engine)[0]
  np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_losses_without_parameters_have_no_gradient():
  def losses_fn(params, x):
    return (x**2).sum(1) + params.sum()

  def concatenated(params, x):
    rows = jnp.broadcast_to(params[None], (len(x), 0))
    return (jnp.concatenate([x, rows], 1) ** 2).sum(1)

  params, x = jnp.ones(0), jnp.asarray(_normal(_B, 3), jnp.float32)
  for function in (losses_fn, concatenated):
    norms, info = per_example.norms(function, params, x)
    np.testing.assert_array_equal(norms, 0)
    assert info.engine == "layerwise"
    np.testing.assert_array_equal(
      per_example.inner_products(function, params, x)[0], np.zeros((_B, _B))
    )


@pytest.mark.ci
@pytest.mark.parametrize("name", ["lenet", "transformer"])
def test_flops_are_at_most_one_and_a_half_times_those_of_plain_training(name):
  if name == "lenet":
    network = lenet.LeNet(10)
  else:
    network = transformer.VisionTransformer(10, width=64, depth=2)
  x = jax.ShapeDtypeStruct((16, 28, 28, 1), jnp.float32)
  params = jax.eval_shape(network.init, jax.random.key(0), x)

  def losses_fn(params, x):
    return jax.nn.logsumexp(network.apply(params, x), axis=1)

  def flops(function):
    return jax.jit(function).lower(params, x).cost_analysis()["flops"]

  plain = flops(jax.grad(lambda params, x: losses_fn(params, x).mean()))
  options = {"engine": "layerwise"}
  norms = flops(lambda params, x: per_example.norms(losses_fn, params, x, **options))
  clipped = flops(
    lambda params, x: per_example.clipped_gradient(losses_fn, params, x, 1.0, **options)
  )
  products = flops(
    lambda params, x: per_example.inner_products(losses_fn, params, x, **options)
  )
  assert 0.9 * plain < norms <= 1.1 * plain
  assert clipped <= 1.42 * plain
  assert products <= 1.3 * plain


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_lookup_with_several_indices_forms_no_gradient_of_the_tables(is_mapped):
  tables = jax.ShapeDtypeStruct((4, 100, 8), jnp.float32)
  ids = jax.ShapeDtypeStruct((16, 4), jnp.int32)

  def losses_fn(tables, ids):
    if is_mapped:
      rows = jax.vmap(jax.vmap(lambda t, i: t[i]), (None, 0))(tables, ids)
    else:
      rows = tables[jnp.arange(4), ids]
    return (jnp.tanh(rows) ** 2).sum((1, 2))

  def norms(tables, ids):
    return per_example.norms(losses_fn, tables, ids, engine="layerwise")[0]

  compiled = jax.jit(norms).lower(tables, ids).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * tables.size


@pytest.mark.slow
def test_clipping_over_devices_equals_one_device():
  losses_fn, params, batch = _problem("dense", "float32")
  expected, _ = per_example.clipped_gradient(losses_fn, params, batch, 1.0)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec

  def step(params, batch):
    return per_example.clipped_gradient(
      losses_fn, params, batch, 1.0, axis_name="data", microbatch_size=1
    )[0]

  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec()
  )
  actual = jax.jit(sharded)(params, batch)
  np.testing.assert_allclose(_flat(actual), _flat(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [np.inf, 1e-50, 1e30])
def test_extreme_norms_clip_all_or_nothing(max_norm):
  grads, _ = per_example.clipped_gradient(
    lambda p, x: (x @ p) ** 2, jnp.array([1.0, 2.0]), jnp.eye(2), max_norm
  )
  np.testing.assert_allclose(grads, [0, 0] if max_norm < 1 else [1, 2])


def test_a_norm_that_is_not_a_number_is_refused():
  with pytest.raises(base.InputError, match="max_norm=None"):
    per_example.clipped_gradient(lambda p, x: x @ p, jnp.ones(2), jnp.eye(2), None)


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_an_empty_batch_is_refused(engine):
  with pytest.raises(base.InputError, match="losses is empty"):
    per_example.norms(lambda p, x: x @ p, jnp.ones(2), jnp.zeros((0, 2)), engine=engine)


def test_losses_without_rows_of_the_batch_are_refused():
  def losses_of_tokens(params, x):
    return jnp.tanh(x @ params).reshape(-1)

  with pytest.raises(base.InputError, match="12 losses, but no array of batch has 12"):
    per_example.norms(losses_of_tokens, jnp.ones(2), jnp.ones((4, 3, 2)))


def test_losses_that_ignore_their_batch_are_refused():
  targets = jnp.arange(4.0)

  def losses_fn(params, x):
    return (x @ params) ** 2 if len(x) == 4 else targets * jnp.sum(params)

  with pytest.raises(base.InputError, match="returned 4 losses for one example"):
    per_example.norms(losses_fn, jnp.ones(4), jnp.ones((4, 4)), engine="vmap")


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("size, part", [(None, "one example"), (2, "a microbatch of")])
def test_errors_name_the_number_of_examples(engine, size, part):
  def losses_fn(params, x):
    pairs = (x @ params).reshape(2, 2)  # A batch of four examples, in two pairs.
    return (pairs - pairs.mean(1, keepdims=True)).reshape(-1) ** 2

  params, batch = jnp.ones(3), jnp.asarray(_normal(4, 3), jnp.float32)
  with pytest.raises(TypeError, match="reshape") as caught:
    per_example.norms(losses_fn, params, batch, engine=engine, microbatch_size=size)
  assert f"losses_fn was called with {part}" in caught.value.__notes__[0]
