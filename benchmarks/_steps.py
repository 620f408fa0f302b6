"""Compiled training steps of this library, and their costs."""

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

# The learning rate is so low that the parameters hardly change, and all steps compute
# similar values.
LEARNING_RATE = 1e-3
ENGINES = ("literal", "forward", "layerwise")
_NUM_EXAMPLES, _NUM_STEPS = 50_000, 100_000
# Number of products in one measurement of `matrix_peak`.
_CHAIN = 5


def _mentornet() -> base.Method:
  """MentorNet with an untrained mentor, which takes as long as a trained one."""
  network, losses = mentornet_network.MentorNetwork(), jnp.zeros(1)
  labels = jnp.zeros(1, jnp.int32)
  variables = network.init(jax.random.key(0), losses, losses, labels, jnp.int32(0))
  return mentornet.mentornet(mentornet_network.Mentor("pd", network, variables))


# The factories of each method by engine, which is None if there is no choice of engine.
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
# The methods with a choice of engine. On a CPU, only these and plain training are timed
# by default on networks that are slow there.
ENGINE_METHODS = ("l2rw", "meta_weight_net")
META_METHODS = (*ENGINE_METHODS, "warpi", "advisor")


def pairs(
  network: str, names: Sequence[str], engines: Sequence[str]
) -> list[tuple[str, str | None]]:
  """Lists the methods and engines that can train a network.

  Args:
    network: the name of the network.
    names: the methods to consider.
    engines: the engines to consider.

  Returns:
    Pairs of a method and an engine. The engine is None for methods without a choice of
    engine.
  """
  supported = [e for e in engines if e != "layerwise" or not mixes_examples(network)]
  return [
    (name, engine)
    for name in names
    for engine in METHODS[name]
    if engine is None or engine in supported
  ]


def mixes_examples(network: str) -> bool:
  """Whether the network mixes examples, which the layerwise engine does not support."""
  return _networks.NETWORKS[network].mixes_examples


def implementation(
  setting: _networks.Setting, method: str, engine: str | None = None
) -> _turns.Implementation:
  """Compiles a training step: the gradients of a method, then an SGD update.

  The step does what a user's training loop does, with the state donated. As in
  the PyTorch implementation, the checks of `training.step.train_step` are left out.

  Args:
    setting: the network, the type of the computation, and the batch sizes.
    method: a key of `METHODS`.
    engine: a key of `METHODS[method]`.

  Returns:
    The compiled step.

  Raises:
    jax.errors.JaxRuntimeError: if there is not enough memory.
  """
  model = _classifier(setting.network, setting.dtype, method == "ldam")
  optimizer, base_method = optax.sgd(LEARNING_RATE), METHODS[method][engine]()
  num_classes = _networks.NETWORKS[setting.network].num_classes
  counts = jnp.full(num_classes, _NUM_EXAMPLES // num_classes)
  batch, meta_batch = jax.device_put(setting.batches())
  params, model_state = _variables(model, setting)
  problem = _problem(model, engine, counts)
  method_state = base_method.init(jax.random.key(1), problem, params)
  state = step_lib.init_state(params, model_state, method_state, optimizer)

  def step(state, batch, meta_batch, counts, key):
    problem = _problem(model, engine, counts)
    return _step(state, batch, meta_batch, key, problem, base_method, optimizer)

  arguments = (batch, meta_batch, counts, jax.random.key(2))
  started = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=0).lower(state, *arguments)
  compiled = lowered.compile()
  info = {"compile_seconds": time.perf_counter() - started}

  def run(steps):
    nonlocal state
    for _ in range(steps):
      state, (loss, _, _) = compiled(state, *arguments)
    jax.block_until_ready(state)
    return float(loss)

  in_loop = _networks.NETWORKS[setting.network].in_loop
  info |= {"num_parameters": num_parameters(params)} | costs(
    lowered, compiled, literal=engine == "literal", in_loop=in_loop
  )
  return _turns.Implementation(method, engine, "jax", run, info)


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
  result, method_state = method.gradients(state.method_state, problem, inputs)
  with base.implicit_promotion():
    updates, opt_state = optimizer.update(result.grads, state.opt_state, state.params)
  state = state._replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    model_state=result.model_state,
    opt_state=opt_state,
    method_state=method_state,
  )
  return state, (jnp.mean(result.losses), result.weights, result.metrics)


def _classifier(network, dtype, cosine):
  return classifier.Classifier(
    _networks.module(network, dtype, cosine), _networks.NETWORKS[network].num_classes
  )


def _problem(model, engine, counts):
  problem = model.problem(
    class_counts=counts, num_examples=_NUM_EXAMPLES, num_steps=_NUM_STEPS
  )
  if engine not in ENGINES[1:]:
    return problem
  linearize = functools.partial(linearization.linearize, engine=engine)
  return dataclasses.replace(problem, linearize=linearize)


def _variables(model, setting):
  """New parameters for each implementation, because its first step donates them."""
  example = _networks.batch(setting.network, 1, 0)
  return _init_fn(model)(jax.random.key(0), example)


@functools.lru_cache(maxsize=4)
def _init_fn(model):
  return jax.jit(model.init)


def num_parameters(params: base.PyTree) -> int:
  """The number of trained parameters."""
  return sum(x.size for x in jax.tree.leaves(params))


def costs(
  lowered: Any, compiled: Any, literal: bool = False, in_loop: bool = False
) -> dict[str, Any]:
  """Returns the FLOPs, memory traffic and temporary memory that the compiler reports.

  On accelerators, the compiled program calls libraries whose operations are not
  counted. The FLOPs there are those of the program before optimization, a slight
  overestimate. They are not reported there for literal implementations, which repeat
  computations that the compiler merges. Neither FLOPs nor memory traffic are reported
  for networks whose blocks are in a loop, because the compiler counts the body of the
  loop once.

  Args:
    lowered: the lowered program.
    compiled: the compiled program.
    literal: whether the program is a literal implementation (see `_literal`).
    in_loop: whether the blocks of the network are in a loop.

  Returns:
    The columns of a row; None for values that are not reported.
  """
  after = {} if in_loop else _analyze(compiled.cost_analysis) or {}
  on_cpu = jax.default_backend() == "cpu"
  before = {} if literal or in_loop else _analyze(lowered.cost_analysis) or {}
  counted = after if on_cpu else before
  memory = _analyze(compiled.memory_analysis)
  return {
    "flops": counted.get("flops"),
    "flops_counted": "compiled" if on_cpu else "before optimization",
    "bytes_accessed": after.get("bytes accessed"),
    "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
  }


def _analyze(analysis):
  """The result of an analysis, or None if the backend does not support it."""
  try:
    return analysis()
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    return None


@functools.lru_cache
def matrix_peak(dtype: str, size: int | None = None, repeats: int = 5) -> float:
  """Measures the FLOPs per second of products of large matrices.

  Args:
    dtype: the type of the matrices.
    size: the number of rows and columns. The default is 1024 on a CPU and 8192 on
      other devices.
    repeats: the number of measurements, of which the fastest counts.
  """
  size = size or (1024 if jax.default_backend() == "cpu" else 8192)
  product = jax.jit(jnp.matmul)
  # The matrix is idempotent, so that repeated products stay in range.
  matrix = jnp.full((size, size), 1 / size, jnp.dtype(dtype))
  taken = []
  for _ in range(1 + repeats):  # The first one compiles.
    result, started = matrix, time.perf_counter()
    for _ in range(_CHAIN):
      result = product(result, matrix)
    jax.block_until_ready(result)
    taken.append(time.perf_counter() - started)
  return _CHAIN * 2 * size**3 / min(taken[1:])
