"""One of several processes of `processes_test`: trains toy problems, as it is told.

The only argument is a JSON object; its "task" is the name of a function below.
"""

import functools
import json
import os
import pathlib
import pickle
import signal
import sys

import jax

_TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / "training"), str(_TESTS / "methods"), str(_TESTS.parent)]


_CONNECTION = ("count", "process", "num_local", "address", "programs", "as_script")


def _connect(count, process, num_devices, address, programs, as_script):
  # A program that process 0 has compiled is not compiled again.
  jax.config.update("jax_compilation_cache_dir", programs)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
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


def sweep(folder, layout, names_of_kinds):
  """Four steps of methods of `sweep_test`, as one program for each kind of map.

  Writes every number to `folder`/`layout`-KIND.npz. The first layout also writes the
  initial states, for the others.

  Args:
    folder: receives the files.
    layout: a name.
    names_of_kinds: the methods by the kind of map; None for all of them.
  """
  import numpy as np
  import sweep_test

  from l2rw_jax import processes
  from l2rw_jax.training import devices

  states_file = pathlib.Path(folder) / "states.pickle"
  if not states_file.exists():
    states_file.write_bytes(pickle.dumps(sweep_test._initial_states(0)))
  all_initial = pickle.loads(states_file.read_bytes())

  def steps(states, batch, meta_batch):
    results = {
      name: sweep_test._step_fn(name, devices.AXIS_NAME)(state, batch, meta_batch)
      for name, state in states.items()
    }
    states = {name: state for name, (state, _) in results.items()}
    output = {
      name: (gradients.weights, gradients.losses, gradients.metrics)
      for name, (_, gradients) in results.items()
    }
    return states, output

  chosen = devices.choose(None, sweep_test._B)
  own = devices.local(chosen)
  first = chosen.index(own[0])

  def split(batch):
    parts = jax.tree.map(lambda x: x.reshape(len(chosen), 1, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x[first : first + len(own)], parts)

  def of_all(tree):
    """Arrays by name, with those of all devices of all processes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shards = [
      np.concatenate([shard.data for shard in leaf.addressable_shards])
      for _, leaf in leaves
    ]
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return dict(zip(names, processes.concatenate(shards), strict=True))

  for kind, names in names_of_kinds.items():
    initial = {name: all_initial[name] for name in names or all_initial}
    step = devices.map_step(steps, 1, chosen, kind)
    state = devices.replicate(
      jax.tree.map(lambda x: np.asarray(x)[None], initial), chosen
    )
    arguments = (state, *map(split, sweep_test._data()[0]))

    def compiles(step=step, arguments=arguments):
      step.lower(*arguments).compile()

    # The others read the program that process 0 compiles. Gloo does not wait longer
    # than 30 seconds for a process that still compiles.
    processes.on_first("compile", compiles)
    if not processes.is_first():
      compiles()
    processes.exchange("compiled", "")
    numbers = {}
    for i, batches in enumerate(sweep_test._data()):
      state, output = step(state, *map(split, batches))
      numbers |= {f"step {i}{name}": x for name, x in of_all(output).items()}
    numbers |= {f"end{name}": x for name, x in of_all(state).items()}
    if processes.is_first():
      np.savez(pathlib.Path(folder) / f"{layout}-{kind}.npz", **numbers)


def train(runs, signal_at=None, **settings):
  """`loop.train` of some methods.

  Args:
    runs: [folder, method] of each of them.
    signal_at: [process, step, signal]: a process sends itself a signal in the last one.
    **settings: of all runs.
  """
  # In float64, so that what differs is not rounding.
  jax.config.update("jax_enable_x64", True)
  # Flax keeps running statistics in float32.
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  from flax import linen as nn
  import toy_runs

  from l2rw_jax import processes
  from l2rw_jax.methods import adacore
  from l2rw_jax.methods import l2rw
  from l2rw_jax.models import classifier
  from l2rw_jax.training import devices
  from l2rw_jax.training import sampling

  # Of the 60 examples, two processes select from 40 and 20.
  adacore._BATCH_SIZE = 20
  # Rounding decides which of two examples that are nearest to each other is chosen. A
  # large subset has many such pairs.
  methods = {"l2rw": l2rw.l2rw(), "adacore": adacore.adacore(0.2, refresh_every=4)}

  def send_signal(process, at, number):
    original = sampling.Sampler.next

    def draw(self, step):
      if step == at and processes.index() == process:
        os.kill(os.getpid(), signal.Signals[number])
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
  for number, (folder, name) in enumerate(runs, 1):
    if signal_at and number == len(runs):
      send_signal(*signal_at)
    toy_runs.train(
      folder,
      methods[name],
      [split._replace(**parts)],
      classifier.Classifier(NormNet(), toy_runs.CLASSES),
      batch_size=16,
      **settings,
    )


def mistakes(folder):
  """Calls that must fail in both processes; the last one as a script does.

  Writes the message of each of the others to `folder`/PROCESS.json.
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

  def exists_elsewhere(path, **options):
    return exists(path, **options) and not path.name.startswith(workdir._SHARED)

  def unshared():
    if process == 1:
      pathlib.Path.exists = exists_elsewhere
    try:
      train()
    finally:
      pathlib.Path.exists = exists

  def flags():
    settings = digits_noise.Settings(num_seeds=1, num_steps=5 + 2 * process)
    digits_noise.run(settings, folder / "script")

  def read_data(settings, workdir):
    del settings, workdir
    if process == 1:  # As of a host that lacks a file of the data set.
      raise base.InputError("x.array_record-00001-of-00002: No such file")
    processes.exchange("data", "complete")

  calls = {
    "batch": lambda: train(batch_size=6),
    "settings": lambda: train(num_steps=5 + 2 * process),
    "data": lambda: train([toy_runs.make_splits(process)]),
    "flags": flags,
    "folder": unshared,
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
  _connect(*(arguments.pop(k) for k in _CONNECTION))
  tasks = {"sweep": sweep, "train": train, "mistakes": mistakes}
  tasks[arguments.pop("task")](**arguments)
