"""Communication between the processes of one program, outside of `jit`.

`jax.distributed.initialize` connects the processes. All of them run the same code and
call the functions of this module in the same order. If there is only one process, the
functions need no connection and exchange nothing; only `client` and `wait_for` always
need a connection.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import itertools
import json
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

# A waiting process returns to Python this often, so that it can handle signals.
_POLL_MS = 1000
# How the client's message begins if a value is not set in time.
_TIMED_OUT = ("DEADLINE_EXCEEDED", "NOT_FOUND")
# Errors of the collectives (gloo, NCCL) and of the coordination service.
_LOST = re.compile(
  r"gloo|nccl|connection (closed|reset|refused)|socket closed|broken pipe"
  r"|UNAVAILABLE|coordination.?service|heartbeat|barrier",
  re.IGNORECASE,
)
# The key of the reason why a process ended.
_FAILURE = "l2rw_jax/failure"
# This counter numbers the exchanges, so that their names are unique.
_numbers = itertools.count()


class EndedError(base.InputError):
  """Another process has ended or cannot be reached, so this one cannot continue."""


def count() -> int:
  """Number of processes."""
  return jax.process_count()


def index() -> int:
  """The number of this process, counted from 0."""
  return jax.process_index()


def is_first() -> bool:
  """Whether this is process 0, which writes all files."""
  return index() == 0


def client() -> Any:
  """The client of the coordination service, which has a key-value store.

  Raises:
    InputError: `jax.distributed.initialize` was not called.
  """
  # JAX has no public name for the client; Orbax uses the same private one.
  from jax._src import distributed

  result = distributed.global_state.client
  if result is None:
    raise base.InputError(
      "JAX is not connected to other processes: call jax.distributed.initialize()"
      " before any other use of JAX."
    )
  return result


def wait_for(key: str) -> str:
  """The value of a key in the store of the coordination service, once it is set.

  If the process that should set it ends without publishing a reason, JAX ends this
  process too.

  Raises:
    InputError: a process published why it ended, see `publish_failure`.
  """
  while True:
    value = _value(key, _POLL_MS)
    if value is not None:
      return value
    failure = _value(_FAILURE, 1)
    if failure is not None:
      raise base.InputError(failure)


def _value(key: str, timeout_ms: int) -> str | None:
  """The value of a key; None if it is not set in time."""
  try:
    return client().blocking_key_value_get(key, timeout_ms)
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith(_TIMED_OUT):
      raise
    return None


def publish_failure(message: str) -> None:
  """Publishes why this process ends, for the processes that wait for it.

  They raise the reason as an InputError, see `wait_for`.

  Args:
    message: the reason. If several processes publish one, the first is kept. If there
      is only one process, nothing is published.
  """
  if count() == 1:
    return
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # There is one already.
    client().key_value_set(_FAILURE, f"process {index()}: {message}")


def exchange(name: str, value: str) -> list[str]:
  """The values that all processes pass, in the order of the processes' numbers.

  Every process waits for all others.

  Args:
    name: name of the exchange, the same in every process.
    value: value of this process.

  Raises:
    InputError: a process published why it ended, see `publish_failure`.
  """
  if count() == 1:
    return [value]
  prefix = _prefix(name)
  client().key_value_set(f"{prefix}/{index()}", value)
  return [wait_for(f"{prefix}/{process}") for process in range(count())]


def smallest(name: str, value: int) -> int:
  """The smallest of the integers that the processes pass.

  Raises:
    InputError: see `exchange`.
  """
  return min(map(int, exchange(name, str(value))))


def on_first(name: str, function: Callable[[], Any]) -> Any:
  """Calls `function` in process 0; all other processes wait for its result.

  Args:
    name: name of the call, the same in every process.
    function: a function that returns a JSON value.

  Returns:
    The result of `function`, in every process.

  Raises:
    InputError: in every process, if `function` raised it; or a process published why it
      ended, see `publish_failure`.
    EndedError: in the other processes, if `function` raised anything else.
  """
  if count() == 1:
    return function()
  key = _prefix(name)
  if not is_first():
    outcome = json.loads(wait_for(key))
    if "ended" in outcome:
      raise EndedError(outcome["ended"])
    if "error" in outcome:
      raise base.InputError(outcome["error"])
    return outcome["value"]
  try:
    result = function()
    outcome = json.dumps({"value": result})
    return result
  except base.InputError as error:
    outcome = json.dumps({"error": str(error)})
    raise
  except BaseException as error:
    outcome = json.dumps({"ended": f"process 0 ended ({type(error).__name__})"})
    raise
  finally:
    client().key_value_set(key, outcome)


def check_same(what: str, values: Mapping[str, Any]) -> None:
  """Raises InputError, in every process, unless all of them pass the same values.

  Args:
    what: description of the values, for the message.
    values: JSON values by name.
  """
  texts = exchange("check_same", json.dumps(values, sort_keys=True))
  first = json.loads(texts[0])
  for process, text in enumerate(texts):
    if text != texts[0]:
      other = json.loads(text)
      raise base.InputError(
        f"the processes disagree on {what}: {_difference(first, other, process)}."
        " Start all processes with the same flags, data and code."
      )


def _difference(
  first: dict[str, Any], other: dict[str, Any], process: int, place: str = ""
) -> str:
  """The first value that differs, with the names that lead to it."""

  def text(values, name):
    # In Python, 1, 1.0 and True are equal, but their JSON differs.
    return json.dumps(values[name], sort_keys=True) if name in values else "absent"

  names = sorted(first.keys() | other.keys())
  name = next(x for x in names if text(first, x) != text(other, x))
  one, two = first.get(name), other.get(name)
  if isinstance(one, dict) and isinstance(two, dict):
    return _difference(one, two, process, f"{place}{name}, ")
  here, there = text(first, name), text(other, name)
  return f"{place}{name} is {here} in process 0 and {there} in process {process}"


def concatenate(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Concatenates the arrays of all processes along their leading axis, bit for bit.

  Args:
    arrays: arrays of this process; those of the others have the same shapes and types.
  """
  if count() == 1 or not arrays:
    return list(arrays)
  parts = multihost_utils.process_allgather(_as_bytes(arrays))
  by_process = [_from_bytes(part, arrays) for part in parts]
  return [np.concatenate(blocks) for blocks in zip(*by_process, strict=True)]


def join(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Like `concatenate`, for arrays whose numbers of rows differ between processes.

  Raises:
    InputError: see `exchange`.
  """
  if count() == 1 or not arrays:
    return list(arrays)
  sizes = np.array(
    [json.loads(x) for x in exchange("join", json.dumps([len(x) for x in arrays]))]
  )  # [processes, arrays]
  padded = [
    np.concatenate([x, np.zeros((most - len(x), *x.shape[1:]), x.dtype)])
    for x, most in zip(arrays, sizes.max(axis=0), strict=True)
  ]
  return [
    np.concatenate(
      [part[:size] for part, size in zip(np.split(x, count()), rows, strict=True)]
    )
    for x, rows in zip(concatenate(padded), sizes.T, strict=True)
  ]


def from_first(tree: base.PyTree) -> base.PyTree:
  """The tree of process 0, bit for bit, in every process.

  Args:
    tree: arrays and typed PRNG keys of this process; those of the others have the same
      structure, shapes and types.

  Returns:
    The tree of process 0. With several processes, its arrays are NumPy arrays.
  """
  if count() == 1:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  is_key = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
  raw = [
    np.asarray(jax.random.key_data(x) if key else x)
    for x, key in zip(leaves, is_key, strict=True)
  ]
  sent = _from_bytes(multihost_utils.broadcast_one_to_all(_as_bytes(raw)), raw)
  result = [
    jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old))
    if key
    else new
    for new, old, key in zip(sent, leaves, is_key, strict=True)
  ]
  return jax.tree.unflatten(structure, result)


def _as_bytes(arrays: Sequence[np.ndarray]) -> np.ndarray:
  # JAX broadcasts by a sum over processes, which would turn a float -0.0 into 0.0.
  flat = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays]
  return np.concatenate([*flat, np.zeros(1, np.uint8)])


def _from_bytes(content: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
  ends = np.cumsum([x.nbytes for x in like])
  parts = np.split(np.asarray(content), ends)
  return [p.view(x.dtype).reshape(x.shape) for p, x in zip(parts, like, strict=False)]


def is_lost(error: BaseException) -> bool:
  """Whether an error says that another process has ended or cannot be reached."""
  if isinstance(error, EndedError):
    return True
  # A process that runs out of memory must report that, and not the loss of another one.
  text = str(error)
  is_jax = isinstance(error, jax.errors.JaxRuntimeError)
  return (
    is_jax
    and count() > 1
    and "RESOURCE_EXHAUSTED" not in text
    and bool(_LOST.search(text))
  )


def _prefix(name: str) -> str:
  return f"l2rw_jax/{next(_numbers)}/{name}"
