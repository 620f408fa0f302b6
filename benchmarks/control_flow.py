r"""Convolutions in loops and conditionals on a CPU, with and without `channels_last`.

Each row is a way to compute the gradient of the mean loss of a batch: without control
flow (`plain`), in a branch of `jax.lax.cond`, or as the mean over four microbatches in
`jax.lax.scan`. `channels_last` marks the rows in which the body is wrapped in
`control_flow.channels_last`. The ways take turns, round by round, and a ratio is the
time divided by that of `plain` in the same round.
Command: python -m benchmarks.control_flow
Results: results/control_flow.
"""

from collections.abc import Callable
import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _networks
from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax.linearization import control_flow

NETWORKS = ("lenet", "resnet32_gn", "transformer")
_NUM_MICROBATCHES = 4
# The names of the ways, and whether they use `channels_last`.
WAYS = (
  ("plain", False),
  *((name, wrapped) for name in ("cond", "scan") for wrapped in (False, True)),
)


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""

  batch_size: int = flag(
    100, "Number of examples, a multiple of four.", bounds=settings_lib.Bounds(4, 10**5)
  )
  repeats: int = flag(3, "Number of rounds.", bounds=settings_lib.REPEATS)
  networks: tuple[str, ...] = flag(
    NETWORKS, "Networks to time, separated by commas.", choices=NETWORKS
  )


def make_gradient(
  losses_fn: base.LossesFn, name: str, is_wrapped: bool
) -> Callable[..., base.PyTree]:
  """A function that computes the gradient of the mean loss in one of `WAYS`.

  Args:
    losses_fn: `(params, batch) -> losses [B]`.
    name: the name of the way.
    is_wrapped: whether the body is wrapped in `control_flow.channels_last`.

  Returns:
    `(params, batch, pred) -> gradient`. Only "cond" uses `pred`: the gradient is
    computed if it is true, and `params` is returned if it is false.
  """
  wrap = control_flow.channels_last if is_wrapped else lambda function: function

  def gradient(params, batch):
    return jax.grad(lambda p: jnp.mean(losses_fn(p, batch)))(params)

  def in_branch(params, batch, pred):
    return jax.lax.cond(pred, wrap(gradient), lambda p, _: p, params, batch)

  def in_loop(params, batch, pred):
    del pred

    def step(total, microbatch):
      part = gradient(params, microbatch)
      return jax.tree.map(lambda t, g: t + g / _NUM_MICROBATCHES, total, part), None

    microbatches = jax.tree.map(
      lambda x: x.reshape(_NUM_MICROBATCHES, -1, *x.shape[1:]), batch
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(wrap(step), zeros, microbatches)[0]

  return {
    "plain": lambda params, batch, pred: gradient(params, batch),
    "cond": in_branch,
    "scan": in_loop,
  }[name]


def make_rows(settings: Settings) -> list[dict[str, Any]]:
  """A row for each network and way.

  Raises:
    InputError: --networks is empty.
  """
  rows = []
  for network in settings_lib.choose("networks", settings.networks, NETWORKS):
    module = _networks.module(network, "float32")
    batch = jax.tree.map(jnp.asarray, _networks.batch(network, settings.batch_size, 0))

    def losses_fn(params, batch, module=module):
      logits = module.apply(params, batch["image"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    params = jax.jit(module.init)(jax.random.key(0), batch["image"][:1])
    arguments = (params, batch, jnp.ones((), bool))
    steps, compile_seconds = [], []
    for name, is_wrapped in WAYS:
      start = time.perf_counter()
      gradient = jax.jit(make_gradient(losses_fn, name, is_wrapped))
      steps.append(gradient.lower(*arguments).compile())
      compile_seconds.append(time.perf_counter() - start)
      jax.block_until_ready(steps[-1](*arguments))
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(settings.repeats):
      for step, times in zip(steps, seconds, strict=True):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - start)
    for (name, is_wrapped), times, to_compile in zip(
      WAYS, seconds, compile_seconds, strict=True
    ):
      ratios = [a / b for a, b in zip(times, seconds[0], strict=True)]
      rows.append(
        {
          "network": network,
          "way": name,
          "channels_last": is_wrapped,
          "milliseconds": round(1000 * float(np.median(times)), 1),
          "ratio": round(float(np.median(ratios)), 2),
          "ratio_least": round(min(ratios), 2),
          "ratio_greatest": round(max(ratios), 2),
          "compile_seconds": round(to_compile, 1),
        }
      )
  return rows


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: --batch_size is not a multiple of four, or --networks is empty.
  """
  if settings.batch_size % _NUM_MICROBATCHES:
    raise base.InputError(
      f"--batch_size={settings.batch_size}: give a multiple of {_NUM_MICROBATCHES}."
    )
  rows = make_rows(settings)
  facts = {"batch_size": settings.batch_size, "repeats": settings.repeats}
  _rows.report(rows, facts, workdir)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "control_flow")
