"""Properties of every method: number of devices, runs side by side, state."""

import functools
import itertools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax.methods import absgd
from l2rw_jax.methods import adacore
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.methods import forml
from l2rw_jax.methods import forward_correction
from l2rw_jax.methods import group_dro
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import ldam_drw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import nested_maml
from l2rw_jax.methods import s_model
from l2rw_jax.methods import warpi
from l2rw_jax.models import classifier
from l2rw_jax.training import step as step_lib

_AXIS = "devices"
_B, _M, _CLASSES, _N, _NUM_STEPS, _DEVICES = 16, 8, 3, 40, 4, 8
_TOLERANCE = 1e-5
_OUTER = optax.sgd(0.3, momentum=0.9)


def _selected(method):
  """A state as after a selection; an update uses only its weights."""

  def init(key, problem, params):
    weights = jnp.linspace(0, 2, problem.num_examples)
    return method.init(key, problem, params)._replace(weights=weights)

  return method._replace(init=init)


# Plain SGD, so that a meta gradient with a wrong scale is noticed.
_META = optax.sgd(3.0)
# Add a method here, with settings that have an effect within four steps.
_METHODS = {
  "uniform": baselines.uniform(),
  "random": baselines.random(),
  "class_proportion": baselines.class_proportion(),
  "hard_mining": baselines.hard_mining(),
  "class_balanced_focal": baselines.class_balanced_focal(1.0, 0.9),
  "balanced_softmax": baselines.balanced_softmax(),
  "logit_adjusted": baselines.logit_adjusted(0.5),
  "classifier_retraining": baselines.classifier_retraining(0),
  "clean_only": baselines.clean_only(),
  "fine_tuning_l2rw": baselines.fine_tuning(2, l2rw.l2rw()),
  "l2rw": l2rw.l2rw(),
  "ldam_drw": ldam_drw.ldam_drw(scale=3.0, beta=0.9, from_epoch=0),
  "l2rw_momentum": l2rw.l2rw(_OUTER),
  "mentornet": mentornet.mentornet(
    mentornet.spcl_linear,
    percentile=60.0,
    dropout=((0.5, 17), (0.25, 83)),
    weight_decay=0.1,
  ),
  "meta_weight_net": meta_weight_net.meta_weight_net(0.3, optimizer=_META),
  "meta_weight_net_imbalance": meta_weight_net.meta_weight_net(
    0.3, "imbalance", optimizer=_META, every=2
  ),
  "forml_gap": forml.forml(0.3, "gap", 2, inner_learning_rate=0.3),
  "forml_worst": forml.forml(0.3, "worst", inner_learning_rate=0.3),
  "nested_maml": nested_maml.nested_maml(30.0, 0.3),
  "nested_maml_clusters": nested_maml.nested_maml(
    30.0, 0.3, "cluster", num_clusters=2, clip=0.01, every=2
  ),
  "warpi": warpi.warpi(0.3, optimizer=_META),
  "advisor": advisor.advisor(0.3, optimizer=_META),
  "bare": bare.bare(kappa=0.5),
  "bare_own_label": bare.bare(0.5, "own_label"),
  "absgd": absgd.absgd(1.0, gamma=0.7, alpha=0.5),
  "absgd_noise": absgd.absgd(-1.0, gamma=0.5, clip=0.1, add_uniform=True),
  "forward_correction": forward_correction.forward_correction(
    transition=0.7 * np.eye(_CLASSES) + 0.1
  ),
  "s_model": s_model.s_model(optimizer=_META),
  "group_dro": group_dro.group_dro(2, 0.5, "group"),
  "adacore": _selected(adacore.adacore(0.5)),
  "random_subset": adacore.random_subset(0.5),
}


class _Net(nn.Module):
  """The smallest network with features and batch statistics shared by devices."""

  axis_name: str | None

  num_features = 6

  def setup(self):
    self.output = nn.Dense(_CLASSES, use_bias=False)

  @nn.compact
  def features(self, x, train=False):
    x = nn.Dense(6, use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
    return nn.tanh(x)

  def head(self, features):
    return self.output(features)

  def __call__(self, x, train=False):
    return self.head(self.features(x, train))


def _examples(rng, size):
  return {
    "image": rng.normal(size=(size, 5)).astype(np.float32),
    "label": rng.choice(_CLASSES, size, p=[0.6, 0.2, 0.2]).astype(np.int32),
    "group": rng.permutation(np.arange(size) % 2).astype(np.int32),
    "index": rng.permutation(_N)[:size].astype(np.int32),
  }


@functools.cache
def _data():
  rng = np.random.default_rng(3)
  return [(_examples(rng, _B), _examples(rng, _M)) for _ in range(_NUM_STEPS)]


def _model(axis_name):
  return classifier.Classifier(_Net(axis_name), _CLASSES)


def _task(axis_name):
  return _model(axis_name).problem(
    class_counts=jnp.array([24, 8, 8]),
    num_examples=_N,
    num_steps=_NUM_STEPS,
    axis_name=axis_name,
  )


@jax.jit
def _init(key):
  """States of every method, by one program."""
  params, model_state = _model(None).init(key, _data()[0][0])
  key = jax.random.fold_in(key, 1)
  return {
    name: step_lib.init_state(
      params, model_state, method.init(key, _task(None), params), _OUTER
    )
    for name, method in _METHODS.items()
  }


@functools.cache
def _initial_states(seed):
  return jax.device_get(_init(jax.random.key(seed)))


def _initial(name, seed=0):
  return _initial_states(seed)[name]


def _step_fn(name, axis_name):
  def step(state, batch, meta_batch):
    # The loop's step and the gradients that the method returned.
    returned = []

    def gradients(*given):
      result, method_state = _METHODS[name].gradients(*given)
      returned.append(result)
      return result, method_state

    new_state, _ = step_lib.train_step(
      state,
      batch,
      meta_batch,
      jax.random.key(7),
      problem=_task(axis_name),
      method=_METHODS[name]._replace(gradients=gradients),
      optimizer=_OUTER,
    )
    return new_state, returned[0]

  return step


@functools.cache
def _compiled_step(name):
  return jax.jit(_step_fn(name, None))


@functools.cache
def _history(name, seed=0):
  """`Gradients` of every update and the last state of one run on one device."""
  state, history = _initial(name, seed), []
  for batches in _data():
    state, result = _compiled_step(name)(state, *batches)
    history.append(jax.device_get(result))
  return history, jax.device_get(state)


def _select(tree, *index):
  return jax.tree.map(lambda x: x[index], tree)


def _assert_close(actual, expected):
  chex.assert_trees_all_close(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


@pytest.mark.parametrize("name", _METHODS)
def test_two_runs_on_eight_devices_equal_single_runs_on_one(name):
  step = jax.vmap(_step_fn(name, _AXIS), in_axes=(0, None, None))
  step_fn = jax.pmap(step, _AXIS)
  state = jax.tree.map(
    lambda *x: np.stack([np.stack(x)] * _DEVICES), _initial(name, 0), _initial(name, 1)
  )
  expected = [_history(name, seed) for seed in (0, 1)]
  for i, batches in enumerate(_data()):
    split = jax.tree.map(lambda x: x.reshape(_DEVICES, -1, *x.shape[1:]), batches)
    state, result = step_fn(state, *split)
    result = jax.device_get(result)
    for run, device in itertools.product((0, 1), (0, _DEVICES - 1)):
      seen = _select(result, device, run)
      rows = {
        field: getattr(result, field)[:, run].ravel()
        for field in ("weights", "losses", "scores")
        if getattr(result, field) is not None
      }
      _assert_close(seen._replace(**rows), expected[run][0][i])
  for run, device in itertools.product((0, 1), (0, _DEVICES - 1)):
    _assert_close(_select(jax.device_get(state), device, run), expected[run][1])


@pytest.mark.parametrize("name", _METHODS)
def test_method_satisfies_the_contract(name):
  history, state = _history(name)
  assert state.failure.step == -1  # Every number was finite.
  for result in history:
    assert result.weights.shape == result.losses.shape == (_B,)
    assert (result.weights >= 0).all()
    assert all(np.shape(value) == () for value in result.metrics.values())
    chex.assert_trees_all_equal_shapes_and_dtypes(result.grads, state.params)
  before = _initial(name)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
  moved = jax.tree.map(lambda a, b: np.any(a != b), state.params, before.params)
  assert any(jax.tree.leaves(moved))


def test_steps_cover_both_phases_of_fine_tuning_and_hard_mining():
  weighs = [bool(f.weights.any()) for f in _history("fine_tuning_l2rw")[0]]
  assert weighs == [True, True, False, False]
  kept = [(f.weights == 0).sum() for f in _history("hard_mining")[0]]
  assert all(0 < count < _B for count in kept)


@pytest.mark.parametrize("name", _METHODS)
def test_methods_can_be_traced_under_an_explicit_mesh(name):
  # JAX reports errors of sharding while tracing; `formulas_sweep_test` compares
  # the numbers of the formulas.
  mesh = jax.make_mesh(
    (_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,)
  )
  spread = jax.sharding.NamedSharding(mesh, jax.P("data"))
  batches = jax.device_put(_data()[0], spread)
  state = _initial(name)
  same = jax.sharding.NamedSharding(mesh, jax.P())
  given = jax.device_put((state.params, state.model_state), same)

  def first_step(given, key, batch, meta_batch):
    state = _METHODS[name].init(key, _task(None), given[0])
    state = step_lib.init_state(*given, state, _OUTER)
    return _step_fn(name, None)(state, batch, meta_batch)[1]

  with jax.set_mesh(mesh):
    result = jax.eval_shape(first_step, given, jax.random.key(0), *batches)
  assert result.weights.shape == result.losses.shape == (_B,)
