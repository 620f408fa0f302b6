r"""How far runs on 1, 2 and 8 devices drift apart, and whether rounding is the cause.

A small network is trained on digits, 40% of whose labels are redrawn at random. The
batches are the same on every number of devices, in float32 and in float64. The control
is a run on one device with initial parameters that are moved by one unit in the last
place. If the control drifts as far as the other runs, rounding alone can explain their
drift. L2RW computes its sums in three orders: layer by layer, in forward mode, and in
microbatches of as many rows as each of eight devices has.
Command: python -m benchmarks.device_drift
Results: results/device_drift (8 virtual CPU devices).
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import l2rw
from l2rw_jax.training import devices as devices_lib

_STEPS = (10, 50, 100, 200, 300)
# The number of rows of a batch, and of the part of it that each of eight devices has.
_BATCH_SIZE, _SHARE = 40, 5
_AXIS = devices_lib.AXIS_NAME


def _losses_fn(params: base.PyTree, batch: base.Batch) -> base.Array:
  hidden = jax.nn.relu(batch["image"] @ params["kernel"] + params["bias"][None, :])
  return losses.softmax_cross_entropy(hidden @ params["head"], batch["label"])


def _l2rw(**options: Any) -> Callable[..., Any]:
  value_and_grad = l2rw.weighted_value_and_grad(_losses_fn, axis_name=_AXIS, **options)

  def gradient(params, batch, meta_batch):
    (_, info), grads = value_and_grad(params, batch, meta_batch)
    return grads, info.losses, info.weights * _BATCH_SIZE

  return gradient


def _uniform(params, batch, meta_batch):
  del meta_batch
  values, vjp_fn = jax.vjp(lambda p: _losses_fn(p, batch), params)
  (grads,) = vjp_fn(jnp.full_like(values, 1 / _BATCH_SIZE))
  return base.psum(grads, _AXIS), values, jnp.ones_like(values)


METHODS = {
  "l2rw": _l2rw(),
  "l2rw_forward": _l2rw(engine="forward"),
  "l2rw_microbatches": _l2rw(microbatch_size=_SHARE),
  "uniform": _uniform,
}


@functools.cache
def _compiled(method: str, num_devices: int, dtype: Any) -> Callable[..., Any]:
  """Returns the training step on a number of devices, cached for each `dtype`."""
  del dtype

  def step(params, batch, meta_batch):
    grads, values, weights = METHODS[method](params, batch, meta_batch)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params, base.pmean(values.mean(), _AXIS), weights

  return devices_lib.map_step(step, 1, jax.devices()[:num_devices])


def steps_of(
  method: str, num_devices: int, seed: int, num_steps: int, *, moved: bool = False
) -> Iterator[tuple[float, np.ndarray]]:
  """Trains and yields the mean loss and the weights [B] of every step.

  Args:
    method: a key of `METHODS`.
    num_devices: the number of devices, a divisor of 8.
    seed: the seed of the data and the parameters.
    num_steps: the number of steps.
    moved: whether the initial parameters are increased by one unit in the last place.

  Yields:
    The mean loss of a step, and its weights [B] in units of the uniform weight.
  """
  dtype = jnp.result_type(float)
  digits = sources.load("digits", "train")
  images = (np.asarray(digits.images).reshape(len(digits.labels), -1) / 255).astype(
    dtype
  )
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(images))
  meta, train = order[:_BATCH_SIZE], order[_BATCH_SIZE:]
  wrong = rng.random(len(images)) < 0.4
  wrong[meta] = False
  labels = np.where(wrong, rng.integers(10, size=len(images)), digits.labels)
  keys = jax.random.split(jax.random.key(seed))
  params = {
    "kernel": jax.random.normal(keys[0], (64, 64), dtype) / 8,
    "bias": jnp.zeros(64, dtype),
    "head": jax.random.normal(keys[1], (64, 10), dtype) / 8,
  }
  if moved:
    params = jax.tree.map(lambda x: jnp.nextafter(x, jnp.full_like(x, jnp.inf)), params)

  chosen = jax.devices()[:num_devices]
  step_fn = _compiled(method, num_devices, dtype)

  def sharded(rows):
    """A batch with its rows divided among the devices, [D, 1, b, ...]."""
    batch = {"image": images[rows], "label": labels[rows].astype(np.int32)}
    return jax.tree.map(lambda x: x.reshape(num_devices, 1, -1, *x.shape[1:]), batch)

  params = devices_lib.replicate(jax.tree.map(lambda x: x[None], params), chosen)
  meta_batch = sharded(meta)
  for _ in range(num_steps):
    rows = rng.choice(train, _BATCH_SIZE, replace=False)
    params, loss, weights = step_fn(params, sharded(rows), meta_batch)
    yield float(loss[0, 0]), np.asarray(weights).ravel()


def drift(
  one: list[tuple[float, np.ndarray]], other: list[tuple[float, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
  """Compares two runs.

  Args:
    one: the loss and the weights [B] of every step of a run.
    other: those of another run.

  Returns:
    The absolute difference of the losses, and the largest absolute difference of the
    weights, at every step.
  """
  pairs = list(zip(one, other, strict=True))
  loss_differences = np.array([abs(a[0] - b[0]) for a, b in pairs])
  weight_differences = np.array([abs(a[1] - b[1]).max() for a, b in pairs])
  return loss_differences, weight_differences


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Measures the drift of all methods, prints it and writes it to a folder."""
  del settings
  path = pathlib.Path(workdir) / "drift.csv"
  jax.config.update("jax_num_cpu_devices", 8)
  rows: list[dict[str, Any]] = []
  info = workdir_lib.run_info()
  for bits in (32, 64):
    with jax.enable_x64(bits == 64):
      for method in METHODS:
        for seed in range(3):
          one = list(steps_of(method, 1, seed, _STEPS[-1]))
          others = {
            "2 devices": steps_of(method, 2, seed, _STEPS[-1]),
            "8 devices": steps_of(method, 8, seed, _STEPS[-1]),
            "1 device, moved": steps_of(method, 1, seed, _STEPS[-1], moved=True),
          }
          for name, other in others.items():
            differences = drift(one, list(other))
            for step in _STEPS:
              # The largest difference of the ten steps up to this one.
              loss, weight = (x[step - 10 : step].max() for x in differences)
              rows.append(
                {
                  "float": bits,
                  "method": method,
                  "seed": seed,
                  "against": name,
                  "step": step,
                  "loss": f"{loss:.1e}",
                  "weight": f"{weight:.1e}",
                }
              )
          _rows.write(path, [{**row, **info} for row in rows])
  _rows.show(rows, path)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "device_drift")
