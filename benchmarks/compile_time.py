r"""Seconds until a training step can run: tracing, lowering and compilation.

The network has dense layers that are not in a loop, each with a kernel and a bias, so
that programs are as large as possible for the number of parameter arrays. Each step is
plain training or an entry of `STEPS`. All of them except meta_weight_net, norms and
inner_products include an SGD update. Columns, each also relative to plain training of
the same network:

  trace_seconds    tracing and lowering, in seconds of CPU time of all threads
  compile_seconds  compilation, likewise
  operations       operations before optimization (StableHLO); a function that is called
                   several times counts once
  instructions     instructions of the compiled program
  kernels          fusions, products, reductions and library calls of the compiled main
                   function, without those in the bodies of loops

Command: python -m benchmarks.compile_time
Results: results/compile_time.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.linearization import per_example
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net

_WIDTH, _BATCH_SIZE, _META_SIZE = 128, 8, 4
_OPTIMIZER = optax.sgd(0.1)


def _losses(params: base.PyTree, batch: base.Batch) -> base.Array:
  x = batch["x"]
  for kernel, bias in params:
    x = jnp.tanh(x @ kernel + bias[None])
  return optax.softmax_cross_entropy_with_integer_labels(x, batch["y"])


def _updated(params, grads):
  updates, _ = _OPTIMIZER.update(grads, _OPTIMIZER.init(params), params)
  return optax.apply_updates(params, updates)


def plain(params: base.PyTree, batch: base.Batch, meta_batch: base.Batch) -> Any:
  """A step of SGD on the mean loss."""
  del meta_batch

  def mean(params):
    return _losses(params, batch).mean()

  value, grads = jax.value_and_grad(mean)(params)
  return value, _updated(params, grads)


def _example_weights(params, batch, meta_batch):
  info = l2rw.example_weights(_losses, params, batch, meta_batch)

  def weighted(params):
    return info.weights @ _losses(params, batch)

  value, grads = jax.value_and_grad(weighted)(params)
  return value, info.finite, _updated(params, grads)


def _weighted_value_and_grad(engine, params, batch, meta_batch):
  step = l2rw.weighted_value_and_grad(_losses, engine=engine)
  (value, info), grads = step(params, batch, meta_batch)
  return value, info.finite, _updated(params, grads)


def _meta_weight_net(params, batch, meta_batch):
  return meta_weight_net.network_gradient(
    lambda phi, losses: jax.nn.sigmoid(phi * losses),
    jnp.ones(()),
    _losses,
    params,
    batch,
    meta_batch,
    optimizer=_OPTIMIZER,
  )


def _norms(params, batch, meta_batch):
  del meta_batch
  return per_example.norms(_losses, params, batch)


def _inner_products(params, batch, meta_batch):
  del meta_batch
  return per_example.inner_products(_losses, params, batch)


def _clipped_gradient(params, batch, meta_batch):
  del meta_batch
  grads, info = per_example.clipped_gradient(_losses, params, batch, 1.0)
  return info.norms, _updated(params, grads)


# `(params, batch, meta_batch) -> results`.
STEPS: dict[str, Callable[..., Any]] = {
  "example_weights": _example_weights,
  "layerwise": functools.partial(_weighted_value_and_grad, "layerwise"),
  "forward": functools.partial(_weighted_value_and_grad, "forward"),
  "meta_weight_net": _meta_weight_net,
  "norms": _norms,
  "inner_products": _inner_products,
  "clipped_gradient": _clipped_gradient,
}


def lower(step: Callable[..., Any], num_arrays: int) -> Any:
  """Traces and lowers a step of a network with `num_arrays` parameter arrays."""
  kernel, bias = (
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((_WIDTH, _WIDTH), (_WIDTH,))
  )
  batch, meta_batch = (
    {
      "x": jax.ShapeDtypeStruct((size, _WIDTH), jnp.float32),
      "y": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    for size in (_BATCH_SIZE, _META_SIZE)
  )
  # Each call makes a new lambda, because JAX would reuse the trace of an old lambda.
  traced = jax.jit(lambda *args: step(*args))
  return traced.lower([(kernel, bias)] * (num_arrays // 2), batch, meta_batch)


def num_operations(lowered: Any) -> int:
  """The number of operations before optimization."""

  def count(operation):
    inner = [op for region in operation.regions for block in region for op in block]
    return len(inner) + sum(count(op.operation) for op in inner)

  return count(lowered.compiler_ir().operation)


def _measure(step, num_arrays):
  started = time.process_time()
  lowered = lower(step, num_arrays)
  ready = time.process_time()
  compiled = lowered.compile()
  done = time.process_time()
  text = compiled.as_text()
  main_text = text[text.index("ENTRY") :]
  calls = re.findall(r"(?:fusion|dot|reduce|custom-call)\(", main_text)
  return {
    "trace_seconds": ready - started,
    "compile_seconds": done - ready,
    "operations": num_operations(lowered),
    "instructions": text.count(" = "),
    "kernels": len(calls),
  }


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""

  num_arrays: tuple[int, ...] = flag(
    (50, 200),
    "Numbers of parameter arrays; a layer has two, so odd numbers are rounded down.",
    bounds=settings_lib.Bounds(2, 10**5),
  )


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Measures all steps, prints the results and writes them to a folder."""
  # A program from the cache would not be compiled.
  jax.config.update("jax_enable_compilation_cache", False)
  path, info = pathlib.Path(workdir) / "results.csv", workdir_lib.run_info()
  rows: list[dict[str, Any]] = []
  for num_arrays in settings.num_arrays:
    of_plain: dict[str, float] = {}
    for name, step in {"plain": plain, **STEPS}.items():
      lower(step, 4)  # Fills caches of traces that do not depend on the network.
      measured = _measure(step, num_arrays)
      of_plain = of_plain or measured
      row: dict[str, Any] = {"arrays": 2 * (num_arrays // 2), "step": name}
      for column, value in measured.items():
        row[column] = round(value, 2)
        row[f"{column}_ratio"] = round(value / of_plain[column], 2)
      rows.append(row)
      _rows.write(path, [{**row, **info} for row in rows])
  _rows.show(rows, path)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "compile_time")
