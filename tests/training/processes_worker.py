"""One of several processes that train toy problems together, for `processes_test`.

The only argument is a JSON object; its "task" is the name of a function below.
"""

import functools
import json
import os
import pathlib
import signal
import sys

import jax

_TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / "training"), str(_TESTS / "methods"), str(_TESTS.parent)]


def _connect(count, process, num_devices, address, as_script):
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", num_devices)
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_enable_preemption_service", False)
  if as_script:
    from experiments import digits_noise
    from experiments.lib import distributed

    connection = {"coordinator_address": address, "num_processes": count}
    distributed.connect(digits_noise.Settings(**connection, process_id=process))
  elif count > 1:
    jax.distributed.initialize(address, count, process, initialization_timeout=60)


# A program with more methods takes longer to compile than several smaller programs.
_METHODS_IN_A_PROGRAM = 8


def sweep(path, kind, names):
  """Takes four steps with the methods `names` and writes the results to `path`."""
  import numpy as np
  import sweep_test

  from l2rw_jax import processes
  from l2rw_jax.training import devices

  # Keep only these, because one program initializes all methods of `sweep_test`.
  sweep_test._METHODS = {name: sweep_test._METHODS[name] for name in names}
  chosen = devices.choose(None, sweep_test._B)
  local = devices.local(chosen)
  first = chosen.index(local[0])

  def split(batch):
    parts = jax.tree.map(lambda x: x.reshape(len(chosen), 1, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x[first : first + len(local)], parts)

  numbers = {}
  for start in range(0, len(names), _METHODS_IN_A_PROGRAM):
    group = names[start : start + _METHODS_IN_A_PROGRAM]
    initial = {name: sweep_test._initial(name) for name in group}
    state = devices.replicate(
      jax.tree.map(lambda x: np.asarray(x)[None], initial), chosen
    )
    step = devices.map_step(_steps_of(group), 1, chosen, kind)
    step.lower(state, *map(split, sweep_test._data()[0])).compile()
    processes.exchange("compiled", "")  # As in the training loop.
    for i, batches in enumerate(sweep_test._data()):
      state, output = step(state, *map(split, batches))
      for name, (weights, losses, metrics) in jax.device_get(output).items():
        joined = processes.concatenate([weights, losses])
        numbers[f"{name}/{i}/weights"], numbers[f"{name}/{i}/losses"] = (
          x.ravel() for x in joined
        )
        for metric, value in metrics.items():
          numbers[f"{name}/{i}/{metric}"] = value[0, 0]
    for path_, leaf in jax.tree_util.tree_leaves_with_path(
      jax.device_get(devices.unreplicate(state))
    ):
      numbers[f"end{jax.tree_util.keystr(path_)}"] = np.asarray(leaf)
  if processes.is_first():
    np.savez(path, **numbers)


def _steps_of(names):
  """A function that takes one step of each of several methods, as one program."""
  import sweep_test

  from l2rw_jax.training import devices

  def steps(states, batch, meta_batch):
    results = {
      name: sweep_test._step_fn(name, devices.AXIS_NAME)(
        states[name], batch, meta_batch
      )
      for name in names
    }
    states = {name: state for name, (state, _) in results.items()}
    output = {
      name: (gradients.weights, gradients.losses, gradients.metrics)
      for name, (_, gradients) in results.items()
    }
    return states, output

  return steps


def train(folder, names, signal_at=None, **settings):
  """Calls `loop.train` for each method; `signal_at` is [process, step, name]."""
  # Runs are in float64, so that rounding does not explain any difference.
  jax.config.update("jax_enable_x64", True)
  # Flax keeps running statistics in float32, and mixes them with float64.
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  from flax import linen as nn
  import toy_runs

  from l2rw_jax import processes
  from l2rw_jax.methods import adacore
  from l2rw_jax.methods import l2rw
  from l2rw_jax.models import classifier
  from l2rw_jax.training import devices
  from l2rw_jax.training import sampling

  methods = {
    "l2rw": l2rw.l2rw(),
    "adacore": adacore.adacore(0.5),
  }
  if signal_at is not None:
    process, signal_step, signal_name = signal_at
    original = sampling.Sampler.next

    def draw(self, step):
      if step == signal_step and processes.index() == process:
        os.kill(os.getpid(), signal.Signals[signal_name])
      return original(self, step)

    sampling.Sampler.next = draw

  class NormNet(nn.Module):
    """The smallest network with batch statistics shared over the devices."""

    @nn.compact
    def __call__(self, x, train=False):
      x = nn.Dense(6, param_dtype=float)(x)
      norm = nn.BatchNorm(
        use_running_average=not train,
        axis_name=devices.AXIS_NAME,
        param_dtype=float,
      )
      return nn.Dense(toy_runs.CLASSES, param_dtype=float)(nn.tanh(norm(x)))

  split = toy_runs.make_splits(num_train=60)
  parts = {
    part: getattr(split, part)._replace(image=getattr(split, part).image.astype(float))
    for part in ("train", "meta", "validation", "test")
  }
  for name in names:
    toy_runs.train(
      pathlib.Path(folder) / name,
      methods[name],
      [split._replace(**parts)],
      classifier.Classifier(NormNet(), toy_runs.CLASSES),
      batch_size=16,
      **settings,
    )


def mistakes(folder):
  """Makes calls that must fail in both processes, the last one as a script does.

  Writes the error messages of the other calls to `folder`/PROCESS.json.
  """
  import toy_runs

  from experiments import digits_noise
  from experiments.lib import launch
  from l2rw_jax import base
  from l2rw_jax import processes
  from l2rw_jax.io import workdir
  from l2rw_jax.methods import baselines

  folder, process = pathlib.Path(folder), processes.index()
  # Network file systems show new files late.
  workdir._VISIBLE_AFTER = 0.5
  train = functools.partial(
    toy_runs.train, folder / "run", baselines.uniform(), num_devices=None
  )
  exists = pathlib.Path.exists

  def exists_on_another_host(path, **options):
    # As if this host did not see the file that the first process writes.
    return exists(path, **options) and not path.name.startswith(workdir._SHARED)

  def unshared_folder():
    if process == 1:
      pathlib.Path.exists = exists_on_another_host
    try:
      train()
    finally:
      pathlib.Path.exists = exists

  def flags():
    settings = digits_noise.Settings(num_seeds=1, num_steps=5 + 2 * process)
    digits_noise.run(settings, folder / "script")

  def read_data(settings, workdir):
    del settings, workdir
    if process == 1:  # As on a host that lacks a file of the data set.
      raise base.InputError("x.array_record-00001-of-00002: No such file")
    processes.exchange("data", "complete")

  calls = {
    "batch": lambda: train(batch_size=6),
    "settings": lambda: train(num_steps=5 + 2 * process),
    "data": lambda: train([toy_runs.make_splits(process)]),
    "flags": flags,
    "folder": unshared_folder,
  }
  messages = {}
  for name, call in calls.items():
    try:
      call()
    except base.InputError as error:
      messages[name] = str(error)
  (folder / f"{process}.json").write_text(json.dumps(messages))
  launch.execute(digits_noise.Settings, read_data, "data", [])


if __name__ == "__main__":
  arguments = json.loads(sys.argv[1])
  connection = ("count", "process", "num_local", "address", "as_script")
  _connect(*(arguments.pop(k) for k in connection))
  tasks = {"sweep": sweep, "train": train, "mistakes": mistakes}
  task = tasks[arguments.pop("task")]
  task(**arguments)
