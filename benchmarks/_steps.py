"""Training steps of this library, compiled and counted."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _literal
from benchmarks import _networks
from benchmarks import _turns
from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.methods import absgd
from l2rw_jax.methods import advisor
from l2rw_jax.methods import bare
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import ldam_drw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import warpi
from l2rw_jax.methods.mentornet import network as mentornet_network
from l2rw_jax.models import classifier
from l2rw_jax.training import step as step_lib

# So low that noise stays noise, and every step computes on numbers of one kind.
LEARNING_RATE = 1e-3
ENGINES = ("literal", "forward", "layerwise")
_NUM_EXAMPLES, _NUM_STEPS = 50_000, 100_000
_CHAIN = 5


def _mentornet() -> base.Method:
  """A student of a mentor that was never fitted, which takes as long."""
  network, one = mentornet_network.MentorNetwork(), jnp.zeros(1)
  labels = jnp.zeros(1, jnp.int32)
  variables = network.init(jax.random.key(0), one, one, labels, jnp.int32(0))
  return mentornet.mentornet(mentornet_network.Mentor("pd", network, variables))


# By engine; None where there is no choice.
METHODS: dict[str, dict[str | None, Callable[[], base.Method]]] = {
  "plain": {None: _literal.plain},
  "l2rw": {
    "literal": _literal.l2rw,
    "forward": l2rw.l2rw,
    "layerwise": l2rw.l2rw,
  },
  "meta_weight_net": {
    "literal": lambda: _literal.mwn(LEARNING_RATE),
    "forward": lambda: meta_weight_net.meta_weight_net(LEARNING_RATE),
    "layerwise": lambda: meta_weight_net.meta_weight_net(LEARNING_RATE),
  },
  "warpi": {None: lambda: warpi.warpi(LEARNING_RATE)},
  "advisor": {None: lambda: advisor.advisor(LEARNING_RATE)},
  "mentornet": {None: _mentornet},
  "absgd": {None: lambda: absgd.absgd(-5.0)},
  "ldam": {None: lambda: ldam_drw.ldam_drw(from_epoch=0)},
  "bare": {None: bare.bare},
}
# Those whose cost is the question.
LOOKING_AHEAD = ("l2rw", "meta_weight_net")
NEED_META = (*LOOKING_AHEAD, "warpi", "advisor")


def pairs(
  network: str, names: Sequence[str], engines: Sequence[str]
) -> list[tuple[str, str | None]]:
  """Which methods by which engines can train a network, without repetitions."""
  fitting = [e for e in engines if e != "layerwise" or not mixes(network)]
  return [
    (name, engine)
    for name in names
    for engine in METHODS[name]
    if engine is None or engine in fitting
  ]


def mixes(network: str) -> bool:
  """Whether its examples see each other, which the layerwise engine cannot follow."""
  return _networks.NETWORKS[network].mixes


def contestant(
  setting: _networks.Setting, method: str, engine: str | None = None
) -> _turns.Contestant:
  """A step compiled for a setting: gradients by the method, then SGD.

  What a user's own training loop does, with the state donated; the checks of
  `training.step.train_step` are left out here as in the other framework.

  Raises:
    jax.errors.JaxRuntimeError: not enough memory.
  """
  model = _classifier(setting.network, setting.dtype, method == "ldam")
  optimizer, made = optax.sgd(LEARNING_RATE), METHODS[method][engine]()
  counts = jnp.full(_networks.NUM_CLASSES, _NUM_EXAMPLES // _networks.NUM_CLASSES)
  batch, meta_batch = jax.device_put(setting.batches())
  params, model_state = _variables(model, setting)
  problem = _task(model, engine, counts)
  method_state = made.init(jax.random.key(1), problem, params)
  state = step_lib.init_state(params, model_state, method_state, optimizer)

  def step(state, batch, meta_batch, counts, key):
    return _step(
      state, batch, meta_batch, key, _task(model, engine, counts), made, optimizer
    )

  arguments = (batch, meta_batch, counts, jax.random.key(2))
  started = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=0).lower(state, *arguments)
  compiled = lowered.compile()
  facts = {"compile_seconds": time.perf_counter() - started}

  def run(steps):
    nonlocal state
    for _ in range(steps):
      state, (loss, _, _) = compiled(state, *arguments)
    jax.block_until_ready(state)
    return float(loss)

  facts |= {"num_parameters": num_parameters(params)} | costs(
    lowered, compiled, literal=engine == "literal"
  )
  return _turns.Contestant(method, engine, "jax", run, facts)


def _step(state, batch, meta_batch, key, problem, method, optimizer):
  inputs = base.Inputs(
    params=state.params,
    model_state=state.model_state,
    opt_state=state.opt_state,
    batch=batch,
    meta_batch=meta_batch,
    step=state.step,
    key=jax.random.fold_in(key, state.step),
  )
  found, method_state = method.gradients(state.method_state, problem, inputs)
  with base.implicit_promotion():
    updates, opt_state = optimizer.update(found.grads, state.opt_state, state.params)
  state = state._replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    model_state=found.model_state,
    opt_state=opt_state,
    method_state=method_state,
  )
  return state, (jnp.mean(found.losses), found.weights, found.metrics)


def _classifier(network, dtype, cosine):
  return classifier.Classifier(
    _networks.module(network, dtype, cosine), _networks.NUM_CLASSES
  )


def _task(model, engine, counts):
  problem = model.problem(
    class_counts=counts, num_examples=_NUM_EXAMPLES, num_steps=_NUM_STEPS
  )
  if engine not in ENGINES[1:]:
    return problem
  linearize = functools.partial(linearization.linearize, engine=engine)
  return dataclasses.replace(problem, linearize=linearize)


def _variables(model, setting):
  """Fresh ones for every contestant, which gives them away at its first step."""
  example = _networks.batch(setting.network, 1, 0)
  return _initial(model)(jax.random.key(0), example)


@functools.lru_cache(maxsize=4)
def _initial(model):
  return jax.jit(model.init)


def num_parameters(params: base.PyTree) -> int:
  """How many numbers are trained."""
  return sum(x.size for x in jax.tree.leaves(params))


def costs(lowered: Any, compiled: Any, literal: bool = False) -> dict[str, Any]:
  """What the compiler counts: operations, memory traffic, temporary memory.

  Any of them is None where a backend does not tell. On accelerators the compiled
  program calls libraries that hide their operations, so there they are counted in
  the program before optimization, a little too many; not of `literal` programs, which
  repeat what the compiler then takes once.
  """
  found = _tell(compiled.cost_analysis) or {}
  on_cpu = jax.default_backend() == "cpu"
  before = {} if literal else _tell(lowered.cost_analysis) or {}
  counted = found if on_cpu else before
  memory = _tell(compiled.memory_analysis)
  return {
    "flops": counted.get("flops"),
    "flops_counted": "compiled" if on_cpu else "before optimization",
    "bytes_accessed": found.get("bytes accessed"),
    "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
  }


def _tell(analysis):
  try:
    return analysis()
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    return None


@functools.lru_cache
def matrix_peak(dtype: str, size: int | None = None, repeats: int = 5) -> float:
  """Operations a second of large products of matrices: the best of some turns.

  Args:
    dtype: of the matrices.
    size: of their sides; None is 1024 on a CPU and 8192 elsewhere.
    repeats: turns.
  """
  size = size or (1024 if jax.default_backend() == "cpu" else 8192)
  product = jax.jit(jnp.matmul)
  # Times itself it is itself, so that a chain of products stays in range.
  matrix = jnp.full((size, size), 1 / size, jnp.dtype(dtype))
  taken = []
  for _ in range(1 + repeats):  # The first one compiles.
    found, started = matrix, time.perf_counter()
    for _ in range(_CHAIN):
      found = product(found, matrix)
    jax.block_until_ready(found)
    taken.append(time.perf_counter() - started)
  return _CHAIN * 2 * size**3 / min(taken[1:])
