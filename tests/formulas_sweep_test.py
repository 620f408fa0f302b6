"""Every public formula on every kind of mesh, and under JAX's debug switches.

One table of formulas is evaluated eagerly on one device with `jax_debug_nans` (the
reference), under an explicit and an automatic mesh, in `shard_map`, and in `pmap`
(only formulas that take an axis name), always with rank promotion "raise" and strict
dtype promotion (see `conftest.py`). One compiled function evaluates the whole table,
so that the sweep costs one compilation for each kind of mesh. Gradients are compared
under the explicit mesh, where JAX keeps the sharding of every cotangent. All this is
marked as slow. `make test LEVEL=gate` only traces the table, which is when JAX reports
promotions and wrong shardings.

Methods for the training loop are tested in `methods/sweep_test.py`.
"""

from collections.abc import Callable
import functools
import importlib
import inspect
import operator
import pkgutil
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2rw_jax
from l2rw_jax import base
from l2rw_jax import class_balance
from l2rw_jax import group_objectives
from l2rw_jax import hypergradient
from l2rw_jax import label_transition
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax import meta_network
from l2rw_jax import normalization
from l2rw_jax import susceptibility
from l2rw_jax.coresets import distances
from l2rw_jax.coresets import facility_location
from l2rw_jax.linearization import microbatching
from l2rw_jax.linearization import per_example
from l2rw_jax.linearization import restriction
from l2rw_jax.methods import absgd
from l2rw_jax.methods import adacore
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.methods import group_dro
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import ldam_drw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import nested_maml
from l2rw_jax.methods import s_model
from l2rw_jax.methods import warpi
from l2rw_jax.methods.mentornet import fitting as mentornet_fitting
from l2rw_jax.methods.mentornet import network as mentornet_network
from l2rw_jax.models import activations
from l2rw_jax.models import augmentation
from l2rw_jax.models import few_shot
from l2rw_jax.models import pooling

_AXIS = "data"
_B, _CLASSES, _DEVICES = 16, 3, 8
_SGD = optax.sgd(0.5)


class _Data(NamedTuple):
  """The inputs of a formula.

  Attributes:
    batch: training examples: those of this device in `pmap` and `shard_map`, else all.
    meta: clean examples, likewise.
    all: all training examples, also in `pmap` and `shard_map`.
    whole: arrays without an example axis, the same on every device.
  """

  batch: dict[str, Any]
  meta: dict[str, Any]
  all: dict[str, Any]
  whole: dict[str, Any]


class _Result(NamedTuple):
  """The results of a formula.

  Attributes:
    rows: arrays with a row for each example.
    same: the other results, which are equal on every device.
  """

  rows: Any = ()
  same: Any = ()


class _Formula(NamedTuple):
  """One use of a public formula.

  Attributes:
    run: `(data, axis_name) -> _Result`.
    refused: the kinds of mesh under which the library raises an InputError by design.
    has_gradient: whether its gradient with respect to its inputs is compared as well.
    communicates: whether it takes an axis name; only such formulas run in `pmap`.
    tolerance: relative tolerance of the comparisons.
  """

  run: Callable[[_Data, Any], _Result]
  refused: tuple[str, ...] = ()
  tolerance: float = 1e-5
  has_gradient: bool = False
  communicates: bool = False


def _each(fn):
  """A formula that treats each example separately: `(batch, whole) -> rows`."""
  return _Formula(
    lambda data, _: _Result(rows=fn(data.batch, data.whole)), has_gradient=True
  )


def _all(fn, **options):
  """A formula without an axis name that needs all examples: `(all, whole) -> any`."""
  return _Formula(lambda data, _: _Result(same=fn(data.all, data.whole)), **options)


def _spread(fn, **options):
  """A formula that takes an axis name: `(data, axis_name) -> _Result`."""
  return _Formula(fn, communicates=True, **options)


def _local(fn, **options):
  """A formula that takes no axis name; `fn` itself sums its results over devices."""
  return _Formula(fn, **options)


def _logits(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["hidden"])
  return hidden @ params["output"] + params["bias"][None, :]


def _losses(params, batch):
  return losses.softmax_cross_entropy(_logits(params, batch), batch["labels"])


def _features(params, batch):
  return jnp.tanh(batch["x"] @ params["hidden"])


def _head(params, features):
  return features @ params["output"] + params["bias"][None, :]


_WEIGHT_NET = meta_weight_net.WeightNet((4,))
_RECTIFIER = warpi.RectifierNet(_CLASSES, 4)
_ADVISOR = advisor.AdvisorNet(4, 4)
_MENTORS = {
  compat: mentornet_network.MentorNetwork(_CLASSES, compat)
  for compat in mentornet_network.COMPAT
}


@functools.cache
def _data():
  rng = np.random.default_rng(5)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def examples(size):
    logits = 2 * normal(size, _CLASSES)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return {
      "x": normal(size, 2),
      "logits": logits,
      "one_logit": normal(size, 1),
      "cosines": np.tanh(normal(size, _CLASSES)),
      "probabilities": probabilities,
      "labels": (np.arange(size) % _CLASSES).astype(np.int32),
      "binary": (np.arange(size) % 2).astype(np.int32),
      "predicted": rng.integers(_CLASSES, size=size).astype(np.int32),
      "groups": rng.permutation(np.arange(size) % 2).astype(np.int32),
      "losses": np.abs(normal(size)) + np.float32(0.1),
      "scores": normal(size),
      "features": normal(size, 4),
      "images": rng.random((size, 4, 4, 1)).astype(np.float32),
      "noise": normal(size, 2, _CLASSES),
    }

  transition = np.float32(0.7) * np.eye(_CLASSES, dtype=np.float32) + np.float32(0.1)
  losses_of_one, features = np.zeros(1, np.float32), np.zeros((1, 4), np.float32)
  label, epoch = np.zeros(1, np.int32), np.zeros((), np.int32)
  mentor = (losses_of_one, losses_of_one, label, epoch)

  def parameters(net, *inputs):
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: normal(*x.shape), shapes)

  whole = {
    "params": {
      "hidden": normal(2, 4),
      "output": normal(4, _CLASSES),
      "bias": normal(_CLASSES),
    },
    "vector": {
      "hidden": normal(2, 4),
      "output": normal(4, _CLASSES),
      "bias": normal(_CLASSES),
    },
    "counts": np.array([9, 4, 0], np.int32),
    "margins": np.array([0.1, 0.2, 0.3], np.float32),
    "transition": transition,
    "scale": np.exp(normal(_CLASSES, 4)),
    "log_q": np.log(np.array([0.3, 0.7], np.float32)),
    "point": normal(3),
    "scalar": np.float32(0.4),
    "epoch": np.int32(20),
    "step": np.int32(30),
    "key": jax.random.key(0),
    "weight_net": parameters(_WEIGHT_NET, losses_of_one),
    "rectifier": parameters(_RECTIFIER, normal(1, _CLASSES), label),
    "advisor": parameters(_ADVISOR, features, losses_of_one),
    "mentor": {name: parameters(net, *mentor) for name, net in _MENTORS.items()},
  }
  # Both batches have the same size, so that each operation is compiled only once.
  batch, meta = examples(_B), examples(_B)
  return jax.tree.map(jnp.asarray, _Data(batch, meta, batch, whole))


def _of_loss(loss):
  return _each(lambda b, w: loss(b["logits"], b["labels"]))


def _of_one_logit(loss):
  return _each(lambda b, w: loss(b["one_logit"], b["binary"]))


def _curriculum(curriculum):
  return _each(
    lambda b, w: curriculum(
      b["losses"], b["losses"] - w["scalar"], b["labels"], w["epoch"]
    )
  )


def _mentor(compat, num_classes):
  def run(b, w):
    mentor = mentornet_network.Mentor(
      "pd", _MENTORS[compat], w["mentor"][compat], num_classes
    )
    return mentor(b["losses"], b["losses"] - w["scalar"], b["labels"], w["epoch"])

  return _each(run)


def _linearized(engine, **options):
  def run(data, axis_name):
    params = base.local(data.whole["params"], axis_name)
    result = linearization.linearize(_losses, params, data.batch, engine=engine)
    slopes = result.directional(base.local(data.whole["vector"], axis_name))
    gradient = result.weighted_gradient(data.batch["scores"])
    return _Result((result.losses, slopes), base.psum(gradient, axis_name))

  return _local(run, **options)


def _linearized_outputs(data, axis_name):
  params = base.local(data.whole["params"], axis_name)
  result = linearization.linearize_outputs(_logits, params, data.batch)
  slopes = result.jvp(base.local(data.whole["vector"], axis_name))
  gradient = result.vjp(data.batch["cosines"])
  return _Result((result.outputs, slopes), base.psum(gradient, axis_name))


def _norms(data, axis_name):
  params = base.local(data.whole["params"], axis_name)
  return _Result(per_example.norms(_losses, params, data.batch)[0])


def _clipped_gradient(data, axis_name):
  gradient, info = per_example.clipped_gradient(
    _losses, data.whole["params"], data.batch, 0.3, axis_name=axis_name
  )
  return _Result(info.norms, gradient)


def _restricted(data, axis_name):
  linearize = restriction.restricted(linearization.linearize, ["output", "bias"])
  params = base.local(data.whole["params"], axis_name)
  result = linearize(_losses, params, data.batch)
  return _Result(result.directional(base.local(data.whole["vector"], axis_name)))


def _microbatched(data, axis_name):
  linearize = microbatching.microbatched(linearization.linearize, 2)
  params = base.local(data.whole["params"], axis_name)
  result = linearize(_losses, params, data.batch)
  slopes = result.directional(base.local(data.whole["vector"], axis_name))
  gradient = result.weighted_gradient(data.batch["scores"])
  return _Result((result.losses, slopes), base.psum(gradient, axis_name))


def _weighted_gradient(data, axis_name):
  result = microbatching.weighted_gradient(
    _losses,
    base.local(data.whole["params"], axis_name),
    data.batch,
    data.batch["scores"],
    2,
  )
  return _Result(result.losses, base.psum(result.gradient, axis_name))


def _direction(data, axis_name):
  params = data.whole["params"]
  result = hypergradient.direction(
    _losses,
    params,
    data.meta,
    data.whole["vector"],
    optimizer=_SGD,
    opt_state=_SGD.init(params),
    axis_name=axis_name,
  )
  return _Result(same=(result.vector, result.meta_loss))


def _weight_gradient(data, axis_name):
  params = data.whole["params"]
  linearized = linearization.linearize(
    _losses, base.local(params, axis_name), data.batch
  )
  direction = l2rw.meta_direction(_losses, params, data.meta, axis_name=axis_name)
  later_batch = hypergradient.batch_after(direction, data.batch)
  scores = hypergradient.weight_gradient(linearized, direction, axis_name)
  weights = l2rw.weigh(linearized, direction, axis_name).weights
  return _Result((scores, weights, later_batch))


def _weight_network_gradient(data, axis_name):
  def weights(phi):
    return _WEIGHT_NET.apply(phi, data.batch["losses"])

  return _Result(
    same=hypergradient.network_gradient(
      weights, data.whole["weight_net"], data.batch["scores"], axis_name=axis_name
    )
  )


def _unrolled(rows, whole):
  params = whole["params"]
  return hypergradient.unrolled_weight_gradient(
    _losses,
    _losses,
    params,
    rows,
    rows,
    jnp.full_like(rows["losses"], 1 / _B),
    optimizer=_SGD,
    opt_state=_SGD.init(params),
  )


def _l2rw(data, axis_name, **options):
  result = l2rw.example_weights(
    _losses, data.whole["params"], data.batch, data.meta, axis_name=axis_name, **options
  )
  return _Result(
    (result.weights, result.scores, result.losses), (result.meta_loss, result.finite)
  )


def _l2rw_step(data, axis_name, **options):
  step = l2rw.weighted_value_and_grad(_losses, axis_name=axis_name, **options)
  (loss, info), grads = step(data.whole["params"], data.batch, data.meta)
  return _Result(info.weights, (loss, grads, info.meta_loss))


def _network_gradient(data, axis_name, **options):
  result = meta_weight_net.network_gradient(
    _WEIGHT_NET.apply,
    data.whole["weight_net"],
    _losses,
    data.whole["params"],
    data.batch,
    data.meta,
    optimizer=_SGD,
    axis_name=axis_name,
    **options,
  )
  return _Result(same=(result.gradient, result.meta_loss))


def _weigh_by_network(normalization_name):
  def run(data, axis_name):
    return _Result(
      meta_weight_net.example_weights(
        _WEIGHT_NET.apply,
        data.whole["weight_net"],
        data.batch["losses"],
        normalization=normalization_name,
        axis_name=axis_name,
      )
    )

  return _spread(run)


def _inner_weights(normalization_name):
  return _all(
    lambda a, w: meta_weight_net.inner_weights(
      _WEIGHT_NET.apply,
      w["weight_net"],
      a["losses"],
      normalization=normalization_name,
      detached=False,
    )
  )


def _warpi_meta_gradient(data, axis_name):
  outputs = linearization.linearize_outputs(
    _logits, base.local(data.whole["params"], axis_name), data.batch
  )
  noise = data.batch["noise"].swapaxes(0, 1)

  def loss_fn(logits, phi):
    labels = data.batch["labels"]
    return warpi.inner_loss(_RECTIFIER, phi, logits, labels, noise)[0].sum() / _B

  result = meta_network.meta_gradient(
    outputs,
    loss_fn,
    data.whole["rectifier"],
    _losses,
    data.whole["params"],
    data.meta,
    optimizer=_SGD,
    axis_name=axis_name,
  )
  return _Result(same=(result.gradient, result.meta_loss))


def _advisor_meta_gradient(data, axis_name):
  outputs = linearization.linearize_outputs(
    lambda p, b: (_features(p, b), p),
    base.local(data.whole["params"], axis_name),
    data.batch,
  )
  features, values = outputs.outputs[0], data.batch["losses"]

  def loss_fn(both, psi):
    network_features, params = both
    gated = network_features * advisor.gate(_ADVISOR, psi, features, values)
    logits = _head(params, gated)
    return losses.softmax_cross_entropy(logits, data.batch["labels"]).sum() / _B

  result = meta_network.meta_gradient(
    outputs,
    loss_fn,
    data.whole["advisor"],
    _losses,
    data.whole["params"],
    data.meta,
    optimizer=_SGD,
    axis_name=axis_name,
  )
  return _Result(same=(result.gradient, result.meta_loss))


def _forml(data, axis_name, *, objective="worst", **settings):
  chosen = forml.make_objective(objective, **settings)
  groups = base.gather(data.meta["groups"], axis_name)
  result = forml.example_weights(
    _losses,
    data.whole["params"],
    data.batch,
    data.meta,
    jnp.ones_like(data.batch["losses"]),
    lambda values: chosen(values, groups, 2),
    weight_learning_rate=0.1,
    inner_learning_rate=0.1,
    axis_name=axis_name,
  )
  return _Result((result.weights, result.gradient), result.objective)


def _nested_maml_weight_gradient(data, axis_name):
  result = nested_maml.weight_gradient(
    _losses,
    data.whole["params"],
    data.batch,
    data.meta,
    jnp.ones_like(data.batch["losses"]),
    lookahead_learning_rate=0.1,
    axis_name=axis_name,
  )
  weights = nested_maml.update_weights(
    jnp.ones_like(result.gradient), result.gradient, 0.1, clip=0.5
  )
  return _Result((result.gradient, weights), result.meta_loss)


def _loss_drop(data, axis_name):
  params = data.whole["params"]
  return _Result(
    same=susceptibility.loss_drop(
      _losses,
      params,
      data.batch,
      optimizer=_SGD,
      opt_state=_SGD.init(params),
      axis_name=axis_name,
    )
  )


def _few_shot(rows, whole):
  adapted = few_shot.adapt(_losses, whole["params"], rows, learning_rate=0.1)
  return few_shot.adapt(_losses, adapted, rows, learning_rate=0.1, num_steps=2)


def _keys(rows):
  return jax.vmap(lambda label: jax.random.fold_in(jax.random.key(1), label))(
    rows["labels"]
  )


def _averages(rows, whole):
  start = adacore.Averages(
    jnp.zeros_like(rows["logits"]), jnp.zeros_like(whole["margins"]), whole["epoch"]
  )
  return adacore.update_averages(start, rows["logits"], whole["margins"])


def _vectors(rows, whole):
  return distances.vectors(rows["logits"]).distances(jnp.arange(4))


def _outer_products(scaled):
  def run(rows, whole):
    scale = whole["scale"] if scaled else None
    points = distances.outer_products(rows["logits"], rows["features"], scale)
    return points.distances(jnp.arange(4))

  return _all(run)


def _objective(name, **settings):
  objective = forml.make_objective(name, **settings)
  return _all(lambda a, w: objective(a["losses"], a["groups"], 3), has_gradient=True)


# Add a formula here. A suffix after "/" names one of several uses.
_FORMULAS: dict[str, _Formula] = {
  "losses.softmax_cross_entropy": _of_loss(losses.softmax_cross_entropy),
  "losses.sigmoid_cross_entropy": _of_one_logit(losses.sigmoid_cross_entropy),
  "losses.predictions": _each(lambda b, w: losses.predictions(b["logits"])),
  "losses.predictions/one": _each(lambda b, w: losses.predictions(b["one_logit"])),
  "losses.log_probabilities": _each(lambda b, w: losses.log_probabilities(b["logits"])),
  "losses.log_probabilities/one": _each(
    lambda b, w: losses.log_probabilities(b["one_logit"])
  ),
  "losses.focal": _of_loss(losses.focal),
  "losses.focal/one": _of_one_logit(losses.focal),
  "losses.symmetric_cross_entropy": _of_loss(losses.symmetric_cross_entropy),
  "losses.symmetric_cross_entropy/one": _of_one_logit(losses.symmetric_cross_entropy),
  "losses.generalized_cross_entropy": _of_loss(losses.generalized_cross_entropy),
  "losses.generalized_cross_entropy/truncated": _of_loss(
    lambda z, y: losses.generalized_cross_entropy(z, y, threshold=0.3)
  ),
  "losses.bootstrapping_soft": _of_loss(losses.bootstrapping_soft),
  "losses.bootstrapping_soft/one": _of_one_logit(losses.bootstrapping_soft),
  "losses.bootstrapping_hard": _of_loss(losses.bootstrapping_hard),
  "losses.bootstrapping_hard/one": _of_one_logit(losses.bootstrapping_hard),
  "losses.forward_corrected": _each(
    lambda b, w: losses.forward_corrected(b["logits"], b["labels"], w["transition"])
  ),
  "losses.balanced_softmax": _each(
    lambda b, w: losses.balanced_softmax(b["logits"], b["binary"], w["counts"])
  ),
  "losses.logit_adjusted": _each(
    lambda b, w: losses.logit_adjusted(b["logits"], b["labels"], w["counts"] + 1, 0.5)
  ),
  "normalization.sum_to_one": _spread(
    lambda d, axis: _Result(normalization.sum_to_one(d.batch["losses"], axis)),
    has_gradient=True,
  ),
  "normalization.rectify": _spread(
    lambda d, axis: _Result(normalization.rectify(d.batch["scores"], axis)),
    has_gradient=True,
  ),
  "normalization.equal_weights": _spread(
    lambda d, axis: _Result(normalization.equal_weights(d.batch["scores"], axis))
  ),
  "class_balance.inverse_frequency": _all(
    lambda a, w: class_balance.inverse_frequency(w["counts"])
  ),
  "class_balance.effective_number": _all(
    lambda a, w: class_balance.effective_number(w["counts"])
  ),
  "class_balance.effective_number/zero": _all(
    lambda a, w: class_balance.effective_number(w["counts"], 0.0)
  ),
  "class_balance.deferred_example_weights": _spread(
    lambda d, axis: _Result(
      class_balance.deferred_example_weights(
        d.whole["counts"], d.batch["labels"], 0.9, jnp.int32(2), 2, axis
      )
    )
  ),
  "class_balance.example_weights": _spread(
    lambda d, axis: _Result(
      class_balance.example_weights(d.whole["margins"], d.batch["labels"], axis)
    )
  ),
  "group_objectives.group_means": _all(
    lambda a, w: group_objectives.group_means(a["losses"], a["groups"], 3)
  ),
  "group_objectives.mean": _all(lambda a, w: group_objectives.mean(a["losses"])),
  "group_objectives.gap": _objective("gap", mean_coefficient=0.5),
  "group_objectives.gap/max": _objective("gap", reduction="max"),
  "group_objectives.worst": _objective("worst"),
  "group_objectives.worst/smooth": _objective("worst", temperature=0.5),
  "group_objectives.soft_tpr": _all(
    lambda a, w: group_objectives.soft_tpr(a["probabilities"][:, 0], a["groups"], 3)
  ),
  "group_objectives.soft_tpr/worst": _all(
    lambda a, w: group_objectives.soft_tpr(
      a["probabilities"][:, 0], a["groups"], 3, reduction="worst", temperature=0.5
    )
  ),
  "forml.make_objective": _objective("soft_tpr"),
  "distances.vectors": _all(_vectors),
  "distances.outer_products": _outer_products(False),
  "distances.outer_products/scaled": _outer_products(True),
  "facility_location.lazy_greedy": _all(
    lambda a, w: facility_location.lazy_greedy(distances.vectors(a["logits"]), 3)
  ),
  "facility_location.stochastic_greedy": _all(
    lambda a, w: facility_location.stochastic_greedy(
      w["key"], distances.vectors(a["logits"]), 3, num_candidates=4
    )
  ),
  "linearization.linearize": _linearized("auto"),
  "linearization.linearize/forward": _linearized("forward"),
  "linearization.linearize/reverse": _linearized("reverse"),
  # Difference quotients of float32 losses have larger rounding errors.
  "linearization.linearize/difference": _linearized("difference", tolerance=2e-3),
  "linearization.linearize_outputs": _local(_linearized_outputs),
  "per_example.norms": _local(_norms, refused=("explicit",)),
  "per_example.inner_products": _all(
    lambda a, w: per_example.inner_products(_losses, w["params"], a)[0],
    refused=("explicit",),
  ),
  "per_example.clipped_gradient": _spread(_clipped_gradient, refused=("explicit",)),
  "restriction.restricted": _local(_restricted),
  "microbatching.microbatched": _local(_microbatched, refused=("explicit",)),
  "microbatching.weighted_gradient": _local(_weighted_gradient, refused=("explicit",)),
  "hypergradient.lookahead_params": _all(
    lambda a, w: hypergradient.lookahead_params(
      w["params"], w["vector"], _SGD, _SGD.init(w["params"])
    )
  ),
  "hypergradient.direction": _spread(_direction),
  "hypergradient.weight_gradient": _spread(_weight_gradient),
  "hypergradient.network_gradient": _spread(_weight_network_gradient),
  "hypergradient.unrolled_weight_gradient": _all(_unrolled),
  "susceptibility.loss_drop": _spread(_loss_drop),
  "few_shot.adapt": _all(_few_shot),
  "activations.relu": _each(lambda b, w: activations.relu(b["logits"])),
  "augmentation.normalize": _each(
    lambda b, w: augmentation.normalize(b["images"], (0.4,), (0.2,))
  ),
  "augmentation.to_float": _each(lambda b, w: augmentation.to_float(b["images"])),
  "augmentation.standardize": _each(lambda b, w: augmentation.standardize(b["images"])),
  "augmentation.random_crop": _each(
    lambda b, w: augmentation.random_crop(b["images"], _keys(b), 1)
  ),
  "augmentation.random_flip": _each(
    lambda b, w: augmentation.random_flip(b["images"], _keys(b))
  ),
  "pooling.max_pool": _each(lambda b, w: pooling.max_pool(b["images"], 2, 2)),
  "l2rw.example_weights": _spread(_l2rw),
  "l2rw.example_weights/momentum": _spread(
    functools.partial(_l2rw, optimizer=optax.sgd(0.1, momentum=0.9))
  ),
  "l2rw.example_weights/microbatched": _spread(
    functools.partial(_l2rw, microbatch_size=2), refused=("explicit",)
  ),
  "l2rw.weighted_value_and_grad": _spread(_l2rw_step),
  "meta_weight_net.example_weights": _weigh_by_network("mean"),
  "meta_weight_net.example_weights/sum": _weigh_by_network("sum"),
  "meta_weight_net.inner_weights": _inner_weights("mean"),
  "meta_weight_net.inner_weights/sum": _inner_weights("sum"),
  "meta_weight_net.network_gradient": _spread(_network_gradient),
  "meta_weight_net.network_gradient/recompute": _spread(
    functools.partial(_network_gradient, recompute=True)
  ),
  "meta_weight_net.network_gradient/sum": _spread(
    functools.partial(_network_gradient, normalization="sum", detached=False)
  ),
  "warpi.rectifiers": _each(
    lambda b, w: warpi.rectifiers(
      b["logits"], b["cosines"], b["noise"].swapaxes(0, 1)
    ).swapaxes(0, 1)
  ),
  "warpi.rectified_cross_entropy": _each(
    lambda b, w: warpi.rectified_cross_entropy(
      b["logits"], b["noise"].swapaxes(0, 1), b["labels"]
    )
  ),
  "warpi.inner_loss": _each(
    lambda b, w: warpi.inner_loss(
      _RECTIFIER, w["rectifier"], b["logits"], b["labels"], None
    )[0]
  ),
  "meta_network.meta_gradient": _spread(_warpi_meta_gradient),
  "advisor.gate": _each(
    lambda b, w: advisor.gate(_ADVISOR, w["advisor"], b["features"], b["losses"])
  ),
  "meta_network.meta_gradient/advisor": _spread(_advisor_meta_gradient),
  "forml.update_weights": _spread(
    lambda d, axis: _Result(
      forml.update_weights(d.batch["losses"], d.batch["scores"], 0.1, axis)
    )
  ),
  "forml.example_weights": _spread(_forml),
  "forml.example_weights/gap": _spread(
    functools.partial(_forml, objective="gap", mean_coefficient=1.0)
  ),
  "nested_maml.update_weights": _each(
    lambda b, w: nested_maml.update_weights(b["losses"], b["scores"], 0.1)
  ),
  "nested_maml.weight_gradient": _spread(_nested_maml_weight_gradient),
  "absgd.example_weights": _spread(
    lambda d, axis: _Result(
      *absgd.example_weights(
        d.batch["losses"], d.whole["scalar"], 2.0, gamma=0.5, axis_name=axis
      )
    )
  ),
  "absgd.example_weights/first": _spread(
    lambda d, axis: _Result(
      *absgd.example_weights(
        d.batch["losses"],
        -jnp.inf,
        -2.0,
        gamma=0.5,
        clip=1.0,
        uniform_share=1.0,
        axis_name=axis,
      )
    )
  ),
  "absgd.example_weights/softmax": _spread(
    lambda d, axis: _Result(
      *absgd.example_weights(
        d.batch["losses"], -jnp.inf, 1.0, gamma=1.0, axis_name=axis
      )
    )
  ),
  "absgd.example_weights/infinite": _spread(
    lambda d, axis: _Result(
      *absgd.example_weights(
        d.batch["losses"], d.whole["scalar"], jnp.inf, gamma=0.5, axis_name=axis
      )
    )
  ),
  "group_dro.example_weights": _spread(
    lambda d, axis: _Result(
      *group_dro.example_weights(
        d.batch["losses"],
        d.batch["groups"],
        d.whole["log_q"],
        0.1,
        adjustments=0.5,
        axis_name=axis,
      )
    )
  ),
  "ldam_drw.margins": _all(lambda a, w: ldam_drw.margins(w["counts"])),
  "ldam_drw.ldam": _each(
    lambda b, w: ldam_drw.ldam(b["cosines"], b["labels"], w["margins"], 3.0)
  ),
  "ldam_drw.ldam_hinge": _each(
    lambda b, w: ldam_drw.ldam_hinge(b["cosines"], b["labels"], w["margins"])
  ),
  "ldam_drw.loss": _each(
    lambda b, w: ldam_drw.loss()(b["cosines"], {"label": b["labels"]}, w["counts"])
  ),
  "bare.select": _spread(
    lambda d, axis: _Result(
      bare.select(d.batch["logits"], d.batch["labels"], kappa=0.5, axis_name=axis)
    )
  ),
  "bare.example_weights": _spread(
    lambda d, axis: _Result(
      bare.example_weights(d.batch["logits"], d.batch["labels"], axis_name=axis)
    )
  ),
  "bare.example_weights/own_label": _spread(
    lambda d, axis: _Result(
      bare.example_weights(
        d.batch["logits"], d.batch["labels"], statistics="own_label", axis_name=axis
      )
    )
  ),
  "label_transition.estimate_transition": _all(
    lambda a, w: label_transition.estimate_transition(a["probabilities"])
  ),
  "label_transition.confusion": _all(
    lambda a, w: label_transition.confusion(a["predicted"], a["labels"], _CLASSES)
  ),
  "s_model.smoothed_identity": _all(lambda a, w: s_model.smoothed_identity(_CLASSES)),
  "s_model.s_model_loss": _each(
    lambda b, w: s_model.s_model_loss(b["logits"], b["labels"], w["transition"])
  ),
  "baselines.hardest": _all(
    lambda a, w: baselines.hardest(a["losses"], a["labels"] == 0)
  ),
  "adacore.gradient_proxies": _each(
    lambda b, w: adacore.gradient_proxies(b["logits"], b["labels"])
  ),
  "adacore.update_averages": _all(_averages),
  "adacore.bias_corrected": _all(lambda a, w: adacore.bias_corrected(_averages(a, w))),
  "adacore.hessian_diagonal": _all(
    lambda a, w: adacore.hessian_diagonal(
      w["key"], lambda p: jnp.sum(p**3), w["point"], 2
    )
  ),
  "mentornet.uniform": _curriculum(mentornet.uniform),
  "mentornet.self_paced": _curriculum(mentornet.self_paced),
  "mentornet.hard": _curriculum(mentornet.hard),
  "mentornet.hard/labels": _curriculum(
    functools.partial(mentornet.hard, positive_labels=True)
  ),
  "mentornet.focal": _curriculum(mentornet.focal),
  "mentornet.spcl_linear": _curriculum(mentornet.spcl_linear),
  "mentornet.pd_mixture": _curriculum(mentornet.pd_mixture),
  "mentornet.moving_percentile": _spread(
    lambda d, axis: _Result(
      same=mentornet.moving_percentile(
        d.whole["scalar"], d.batch["losses"], 75.0, axis_name=axis
      )
    )
  ),
  "mentornet.epoch_percent": _all(lambda a, w: mentornet.epoch_percent(w["step"], 40)),
  "mentornet.example_dropout": _spread(
    lambda d, axis: _Result(
      mentornet.example_dropout(d.whole["key"], d.batch["losses"], 0.5, axis_name=axis)
    )
  ),
  "mentornet_network.Mentor": _mentor("official_code", None),
  "mentornet_network.Mentor/labels": _mentor("official_code", _CLASSES),
  "mentornet_network.Mentor/paper": _mentor("paper", _CLASSES),
  "mentornet_fitting.imitation_losses": _each(
    lambda b, w: mentornet_fitting.imitation_losses(
      b["losses"], b["probabilities"][:, 0], False
    )
  ),
  "mentornet_fitting.imitation_losses/binary": _each(
    lambda b, w: mentornet_fitting.imitation_losses(
      b["losses"], b["binary"].astype(jnp.float32), True
    )
  ),
}


_HAVE_GRADIENT = [name for name, f in _FORMULAS.items() if f.has_gradient]
_COMMUNICATE = {name: f for name, f in _FORMULAS.items() if f.communicates}


def _total(formula, leaves, treedef):
  """The sum of all floating-point numbers that a formula returns."""
  result = jax.tree.leaves(formula.run(treedef.unflatten(leaves), None))
  return sum(
    [jnp.sum(x) for x in result if jnp.issubdtype(x.dtype, jnp.inexact)],
    jnp.zeros(()),
  )


@functools.cache
def _inputs(name):
  """Indices of the leaves of the data that are floats and that the formula reads."""
  leaves, treedef = jax.tree.flatten(_data())
  total = jax.make_jaxpr(lambda leaves: _total(_FORMULAS[name], leaves, treedef))
  program = total(leaves).jaxpr
  read = {id(variable) for equation in program.eqns for variable in equation.invars}
  return [
    i
    for i, variable in enumerate(program.invars)
    if id(variable) in read and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
  ]


def _gradient(name, data):
  """The gradient of `_total` with respect to the arrays at `_inputs`."""
  leaves, treedef = jax.tree.flatten(data)

  def total(chosen):
    filled = list(leaves)
    for i, x in zip(_inputs(name), chosen, strict=True):
      filled[i] = x
    return _total(_FORMULAS[name], filled, treedef)

  return jax.grad(total)([leaves[i] for i in _inputs(name)])


def _table(formulas):
  """`(data, axis_name) -> results by formula`, and the errors by formula."""
  errors = {}

  def evaluate(data, axis_name=None):
    results = {}
    for name, formula in formulas.items():
      try:
        results[name] = formula.run(data, axis_name)
      except Exception as error:
        errors[name], results[name] = error, _Result()
    return results

  return evaluate, errors


def _gradients(data):
  """Gradients by formula."""
  return {name: _gradient(name, data) for name in _HAVE_GRADIENT}


def _mesh(axis_type):
  return jax.make_mesh((_DEVICES,), (_AXIS,), axis_types=(axis_type,))


def _spec(of_rows, of_all):
  sharded, replicated = jax.P(_AXIS), jax.P()
  return _Data(
    sharded if of_rows else replicated,
    sharded if of_rows else replicated,
    sharded if of_all else replicated,
    replicated,
  )


def _placed(data, mesh):
  def place(tree, spec):
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))

  return _Data(*map(place, data, _spec(True, True)))


def _on_one_device():
  evaluate, errors = _table(_FORMULAS)
  with jax.debug_nans(True):
    return evaluate(_data()), errors


def _on_auto_mesh():
  mesh = _mesh(jax.sharding.AxisType.Auto)
  evaluate, errors = _table(_FORMULAS)
  with jax.set_mesh(mesh):
    return jax.jit(evaluate)(_placed(_data(), mesh)), errors


def _on_explicit_mesh():
  results, errors, _ = _results_and_gradients_on_explicit_mesh()
  return results, errors


@functools.cache
def _results_and_gradients_on_explicit_mesh():
  """Results, errors and gradients, from one program that shares their common parts."""
  # The reference comes first, because JAX caches traces, and a trace under this mesh
  # fails without it.
  _results("one")
  _gradients_on_one_device()
  mesh = _mesh(jax.sharding.AxisType.Explicit)
  evaluate, errors = _table(_FORMULAS)
  with jax.set_mesh(mesh):
    both = jax.jit(lambda data: (evaluate(data), _gradients(data)))
    results, gradients = jax.device_get(both(_placed(_data(), mesh)))
  return results, errors, gradients


@functools.cache
def _gradients_on_one_device():
  return jax.device_get(jax.jit(_gradients)(_data()))


def _mapped(evaluate):
  """`evaluate` in `shard_map`, with the examples spread over the devices."""
  return jax.shard_map(
    lambda data: evaluate(data, _AXIS),
    mesh=_mesh(jax.sharding.AxisType.Auto),
    in_specs=(_spec(True, False),),
    out_specs=dict.fromkeys(_FORMULAS, _Result(jax.P(_AXIS), jax.P())),
    check_vma=True,
  )


def _in_shard_map():
  evaluate, errors = _table(_FORMULAS)
  return jax.jit(_mapped(evaluate))(_data()), errors


def _in_pmap():
  evaluate, errors = _table(_COMMUNICATE)

  def run(data):
    return evaluate(data, _AXIS)

  def split(tree):
    return jax.tree.map(lambda x: x.reshape(_DEVICES, -1, *x.shape[1:]), tree)

  data = _data()
  data = data._replace(batch=split(data.batch), meta=split(data.meta))
  result = jax.pmap(run, _AXIS, in_axes=(_Data(0, 0, None, None),))(data)

  def joined(result):
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result.rows)
    return result._replace(rows=rows)

  return {name: joined(value) for name, value in result.items()}, errors


_KINDS = {
  "one": _on_one_device,
  "explicit": _on_explicit_mesh,
  "auto": _on_auto_mesh,
  "shard_map": _in_shard_map,
  "pmap": _in_pmap,
}


@functools.cache
def _results(kind):
  results, errors = _KINDS[kind]()
  return jax.device_get(results), errors


def _result(kind, name):
  results, errors = _results(kind)
  if name in errors:
    raise errors[name]
  return results[name]


def _assert_close(name, actual, expected):
  rtol = _FORMULAS[name].tolerance
  chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol / 10)


@functools.cache
def _errors_of_tracing(kind):
  """Errors by formula of a trace of the table."""
  evaluate, errors = _table(_FORMULAS)
  if kind == "one":
    jax.make_jaxpr(evaluate)(_data())
  elif kind == "shard_map":
    jax.make_jaxpr(_mapped(evaluate))(_data())
  else:
    _errors_of_tracing("one")  # First, as in `_results_and_gradients_on_explicit_mesh`.
    mesh = _mesh(jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
      jax.make_jaxpr(evaluate)(_placed(_data(), mesh))
  return errors


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["one", "explicit", "shard_map"])
@pytest.mark.parametrize("name", _FORMULAS)
def test_can_be_traced(name, kind):
  errors = _errors_of_tracing(kind)
  if kind in _FORMULAS[name].refused:
    with pytest.raises(base.InputError, match="spread over devices"):
      raise errors[name]
  elif name in errors:
    raise errors[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", _FORMULAS)
def test_is_finite_under_the_debug_switches(name):
  assert jax.config.jax_numpy_rank_promotion == "raise"
  assert jax.config.jax_numpy_dtype_promotion == "strict"
  chex.assert_tree_all_finite(_result("one", name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.parametrize("name", _FORMULAS)
def test_gives_the_same_numbers_under_a_mesh(name, kind):
  if kind in _FORMULAS[name].refused:
    with pytest.raises(base.InputError, match="spread over devices"):
      _result(kind, name)
    return
  _assert_close(name, _result(kind, name), _result("one", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", _HAVE_GRADIENT)
def test_has_the_same_finite_gradient_under_a_mesh(name):
  expected = _gradients_on_one_device()[name]
  chex.assert_tree_all_finite(expected)
  _, _, actual = _results_and_gradients_on_explicit_mesh()
  _assert_close(name, actual[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", _FORMULAS)
def test_gives_the_same_numbers_in_shard_map(name):
  _assert_close(name, _result("shard_map", name), _result("one", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", _COMMUNICATE)
def test_gives_the_same_numbers_in_pmap(name):
  result, expected = _result("pmap", name), _result("one", name)
  _assert_close(name, result.rows, expected.rows)
  for device in range(_DEVICES):
    on_device = jax.tree.map(operator.itemgetter(device), result.same)
    _assert_close(name, on_device, expected.same)


_HOST = "runs on the host, on NumPy arrays and files"
_CHECK = "checks settings or shapes"
_INSIDE = "is a part of other formulas of the table"
_START = "draws parameters before training"
_LOOP = "takes a problem of the training loop: methods/sweep_test.py"
# Why the table leaves out the functions of modules, given by the start of their names.
_OTHER_MODULES = {
  "audit": "tests/audit runs it on every kind of mesh",
  "base": _INSIDE,
  "data": _HOST,
  "io": _HOST,
  "linearization.backward_rules": _INSIDE,
  "linearization.batch_axes": _INSIDE,
  "linearization.control_flow": _INSIDE,
  "linearization.ghost_products": _INSIDE,
  "linearization.layerwise": _INSIDE,
  "linearization.ordering": _INSIDE,
  "linearization.parameter_uses": _INSIDE,
  "linearization.surrogates": _INSIDE,
  "linearization.trainable": _INSIDE,
  "methods.mentornet.loss_dump": _HOST,
  "methods.mentornet.mentor_file": _HOST,
  "processes": "tests/processes_test.py and tests/training/processes_test.py run it",
  "training": _LOOP,
}
# The table calls these modules by a name that is not the last part of their path.
_SHORT_NAMES = {
  "linearization.engines": "linearization",
  "coresets.selection": "coresets",
  "methods.mentornet.method": "mentornet",
  "methods.mentornet.network": "mentornet_network",
  "methods.mentornet.fitting": "mentornet_fitting",
}
_OTHER_FUNCTIONS = {
  "class_balance.as_counts": _CHECK,
  "absgd.two_stage": _HOST,
  "adacore.check_epochs": _CHECK,
  "adacore.check_fraction": _CHECK,
  "adacore.subset_size": _HOST,
  "adacore.loss_derivatives": _LOOP,
  "adacore.num_features": _CHECK,
  "weighted_update.weighted_gradients": _LOOP,
  "weighted_update.uniform_gradients": _LOOP,
  "changed_loss.where_used": "tests/changed_loss_test.py and s_model_test.py run it",
  "class_balance.balanced_order": _HOST,
  "class_balance.check_beta": _CHECK,
  "class_balance.check_counts": _CHECK,
  "convolution.conv_general_dilated": "tests/models/convolution_test.py runs it",
  "coresets.check_greedy": _CHECK,
  "coresets.class_budgets": _HOST,
  "coresets.select": _HOST,
  "facility_location.sample_size": _HOST,
  "forml.reweigh": _INSIDE,
  "forml.objective_settings": _HOST,
  "group_norm.batch_or_group": "makes a layer",
  "group_objectives.check_groups": _CHECK,
  "hypergradient.check_network_gradient": _CHECK,
  "hypergradient.after_direction": _INSIDE,
  "hypergradient.apply_updates": _INSIDE,
  "hypergradient.batch_after": _INSIDE,
  "hypergradient.init_optimizer": _INSIDE,
  "hypergradient.known_vector": _INSIDE,
  "hypergradient.local": _INSIDE,
  "hypergradient.through_value": _INSIDE,
  "hypergradient.update": _INSIDE,
  "hypergradient.order_of": _CHECK,
  "inference.map_batches": _HOST,
  "initialization.pytorch": _START,
  "l2rw.meta_direction": _INSIDE,
  "l2rw.weigh": _INSIDE,
  "label_transition.check_estimator": _CHECK,
  "label_transition.check_percentile": _CHECK,
  "label_transition.estimate_from_network": _LOOP,
  "loop_buffers.allocated_after": _INSIDE,
  "losses.check_logits": _CHECK,
  "losses.label_mask": _INSIDE,
  "losses.label_rows": _INSIDE,
  "losses.label_scale": _INSIDE,
  "losses.logits_of": _INSIDE,
  "losses.transition_loss": _INSIDE,
  "linearization.largest_epsilon": _INSIDE,
  "memory_plans.choose": _HOST,
  "memory_plans.l2rw_plans": _HOST,
  "memory_plans.meta_weight_net_plans": _HOST,
  "mentornet.check_percentile": _CHECK,
  "mentornet.class_mismatch": _HOST,
  "mentornet.dropout_rates": _HOST,
  "mentornet.preset": _HOST,
  "mentornet_fitting.dd_rows": _HOST,
  "mentornet_fitting.fit": _HOST,
  "mentornet_fitting.imitation_errors": _HOST,
  "mentornet_fitting.is_binary": _HOST,
  "mentornet_fitting.pd_rows": _HOST,
  "mentornet_fitting.split": _HOST,
  "meta_network.dense": _INSIDE,
  "meta_network.init": _LOOP,
  "meta_network.iterate": _LOOP,
  "meta_network.update": _LOOP,
  "meta_network.sgd_lookahead": _LOOP,
  "meta_network.checked_meta_gradient": _INSIDE,
  "meta_network.metrics": _LOOP,
  "meta_weight_net.meta_gradient": _INSIDE,
  "microbatching.check": _CHECK,
  "microbatching.check_aux": _CHECK,
  "microbatching.check_unsharded": _CHECK,
  "microbatching.scan": _INSIDE,
  "microbatching.num_rows": _CHECK,
  "microbatching.noting_size": _CHECK,
  "nested_maml.linearized_weight_gradient": _INSIDE,
  "random_patches.fit": _HOST,
  "restriction.check": _CHECK,
  "split.output_layer": "makes a layer",
  "susceptibility.boundaries": _HOST,
  "susceptibility.random_labels": _HOST,
  "susceptibility.rank_correlation": _HOST,
  "susceptibility.regions": _HOST,
  "susceptibility.running_average": _HOST,
  "susceptibility.selected": _HOST,
  "transformer.norm": "tests/models/transformer_test.py runs it",
  "whitened.whitening_filters": _HOST,
}


def _public_functions():
  """`module.function` of every public function that does not return a Method."""
  names = set()
  for info in pkgutil.walk_packages(l2rw_jax.__path__, "l2rw_jax."):
    path = info.name.removeprefix("l2rw_jax.")
    if any(f"{path}.".startswith(f"{other}.") for other in _OTHER_MODULES):
      continue
    module = _SHORT_NAMES.get(path, path.rpartition(".")[2])
    for name, value in vars(importlib.import_module(info.name)).items():
      if name.startswith("_") or not inspect.isfunction(value):
        continue
      makes_method = value.__annotations__.get("return") is base.Method
      if value.__module__ == info.name and not makes_method:
        names.add(f"{module}.{name}")
  return names


def test_every_public_function_is_in_the_table_or_has_a_reason():
  uses = {name.partition("/")[0] for name in _FORMULAS}
  functions = _public_functions()
  assert functions - uses - set(_OTHER_FUNCTIONS) == set()
  assert set(_OTHER_FUNCTIONS) - functions == set()


_LOGITS = np.float32([[1, 0, 2], [0.5, -1, 0], [0, 3, 1], [2, 0.5, -0.5]])
_LABELS, _GROUPS = np.array([0, 1, 2, 0]), np.array([0, 1, 1, 0])
_VALUES = np.abs(_LOGITS[:, 0]) + np.float32(0.5)


def _with_setting(module, name, setting, *arguments, **others):
  """`module.name` as a function of one setting; its arguments are NumPy arrays."""

  def function(value):
    arrays = jax.tree.map(jnp.asarray, arguments)
    return getattr(module, name)(*arrays, **others, **{setting: value})

  return function


# For each name, a function of one setting, and two values of the setting.
_SETTINGS = {
  "focal": (_with_setting(losses, "focal", "gamma", _LOGITS, _LABELS), 0.0, 1.5),
  "symmetric_alpha": (
    _with_setting(losses, "symmetric_cross_entropy", "alpha", _LOGITS, _LABELS),
    *(0.5, 0.1),
  ),
  "symmetric_beta": (
    _with_setting(losses, "symmetric_cross_entropy", "beta", _LOGITS, _LABELS),
    *(0.5, 0.1),
  ),
  "generalized_q": (
    _with_setting(losses, "generalized_cross_entropy", "q", _LOGITS, _LABELS),
    *(0.7, 0.1),
  ),
  "generalized_threshold": (
    _with_setting(losses, "generalized_cross_entropy", "threshold", _LOGITS, _LABELS),
    *(0.5, 0.1),
  ),
  "bootstrapping_soft": (
    _with_setting(losses, "bootstrapping_soft", "beta", _LOGITS, _LABELS),
    *(0.5, 0.9),
  ),
  "bootstrapping_hard": (
    _with_setting(losses, "bootstrapping_hard", "beta", _LOGITS, _LABELS),
    *(0.5, 0.9),
  ),
  "logit_adjusted": (
    _with_setting(
      losses, "logit_adjusted", "tau", _LOGITS, _LABELS, np.int32([3, 0, 2])
    ),
    *(0.0, 0.7),
  ),
  "margins": (
    _with_setting(ldam_drw, "margins", "max_margin", np.float32([16, 1, 0])),
    *(0.5, 0.3),
  ),
  "ldam": (
    _with_setting(
      ldam_drw, "ldam", "scale", np.tanh(_LOGITS), _LABELS, np.float32([0.1, 0, 0.2])
    ),
    *(30.0, 3.0),
  ),
  "bare": (
    _with_setting(bare, "example_weights", "kappa", _LOGITS, _LABELS),
    *(0.0, 0.7),
  ),
  **{
    f"absgd_{name}": (
      _with_setting(
        absgd,
        "example_weights",
        name,
        *(_VALUES, np.float32(0)),
        **{k: v for k, v in {"lam": 2.0, "gamma": 0.7}.items() if k != name},
      ),
      *(0.5, 0.1),
    )
    for name in ("lam", "gamma", "alpha", "clip", "uniform_share")
  },
  "group_dro": (
    _with_setting(
      group_dro, "example_weights", "step_size", _VALUES, _GROUPS, np.zeros(2, "f")
    ),
    *(0.0, 0.7),
  ),
  "worst": (
    _with_setting(
      group_objectives, "worst", "temperature", _VALUES, _GROUPS, num_groups=2
    ),
    *(0.0, 0.7),
  ),
  "gap": (
    _with_setting(
      group_objectives, "gap", "mean_coefficient", _VALUES, _GROUPS, num_groups=2
    ),
    *(0.0, 0.7),
  ),
  "forml": (
    _with_setting(
      forml, "update_weights", "weight_learning_rate", _VALUES, _LOGITS[:, 2]
    ),
    *(0.0, 0.7),
  ),
  "nested_maml": (
    lambda value: nested_maml.update_weights(
      jnp.asarray(_VALUES), jnp.asarray(_LOGITS[:, 2]), value, clip=value, floor=value
    ),
    *(0.5, 0.7),
  ),
  "mentornet_focal": (_with_setting(mentornet, "focal", "gamma", _VALUES), 2.0, 0.5),
  "mentornet_spcl": (
    _with_setting(mentornet, "spcl_linear", "gamma", _VALUES, _LOGITS[:, 1]),
    *(2.0, 0.5),
  ),
  "moving_percentile": (
    _with_setting(
      mentornet, "moving_percentile", "decay", np.float32(0), _VALUES, percentile=75
    ),
    *(0.5, 0.9),
  ),
  "clipped_gradient": (
    lambda value: per_example.clipped_gradient(
      lambda p, x: (x @ p) ** 2, jnp.ones(3, jnp.float32), jnp.asarray(_LOGITS), value
    )[0],
    *(0.5, 1e6),
  ),
}


@pytest.mark.ci(unless=("focal", "group_dro", "absgd_gamma"))
@pytest.mark.parametrize("name", _SETTINGS)
def test_settings_may_be_traced_or_have_any_type(name):
  function, *values = _SETTINGS[name]
  constants = [jnp.float32(value) for value in values]

  @jax.jit
  def results(traced):
    # In `jit`, comparisons give tracers even if JAX arrays are constants.
    by_type = [[function(x) for x in settings] for settings in (values, constants)]
    return by_type, jax.vmap(function)(traced)

  (expected, of_constants), rows = results(jnp.float32(values))
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *expected)
  chex.assert_trees_all_close(of_constants, expected, rtol=3e-6)
  chex.assert_trees_all_close(rows, stacked, rtol=3e-6)
  with jax.enable_x64(True):
    wide = jax.eval_shape(lambda: function(np.float64(values[0])))
  chex.assert_trees_all_equal_dtypes(expected[0], of_constants[0], rows, wide)


def test_settings_that_need_double_precision_may_not_be_traced():
  counts = jnp.int32([3, 1])
  with pytest.raises(base.InputError, match=r"beta of .* is traced, but must be known"):
    jax.jit(lambda beta: class_balance.effective_number(counts, beta))(0.9)
  with pytest.raises(base.InputError, match="percentile is traced"):
    jax.jit(lambda p: mentornet.moving_percentile(0.0, _VALUES, p))(50.0)
