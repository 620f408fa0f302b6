"""R runs that are trained side by side: their data, their state and their steps.

A `Run` writes no files and evaluates nothing, so it can also be the core of another
loop:

    run = run_lib.Run(config, model, method, optimizer, splits)
    while run.step < config.num_steps:
      run.take_steps()
    for output in run.fetch():
      print(output.metrics["loss"])
"""

from collections.abc import Sequence
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import processes
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import compilation
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import device_data
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import sampling
from l2rw_jax.training import step as step_lib
from l2rw_jax.training import steps_per_call
from l2rw_jax.training import timer as timer_lib

# Number of calls with streamed examples that may be queued on the devices. It is small,
# because each call stores its examples.
MOST_QUEUED = 2


class Output(NamedTuple):
  """The weights and metrics of K steps of R runs, on the host.

  Attributes:
    rows: the rows of the examples of each of the K steps.
    weights: weights of these examples in units of the uniform weight, [R, K, B].
    metrics: metrics by name, [R, K].
  """

  rows: list[sampling.Rows]
  weights: np.ndarray
  metrics: dict[str, np.ndarray]


class Run:
  """R runs of one method, side by side.

  Attributes:
    config: settings of the runs.
    method: the method that computes gradients from batches.
    splits: the data of each run.
    devices: the devices that train, in all processes.
    step: number of updates sent to the devices; they are done once `fetch` has
      returned.
    state: the training state on the devices, [D, R, ...] for D devices.
    sampler: the sampler that draws the rows of each step.
    steps_per_call: K, the number of steps in a full call.
    timer: the timer of training. It is stopped while programs are compiled.
    input_seconds: number of seconds that `take_steps` has waited for examples.
  """

  def __init__(
    self,
    config: config_lib.Config,
    model: config_lib.Model,
    method: base.Method,
    optimizer: optax.GradientTransformation,
    splits: Sequence[examples_lib.Splits],
    epoch_probes: Sequence[evaluation.EpochProbe] = (),
  ):
    """Initializes the runs and copies their data to the devices.

    Args:
      config: settings, which `training.config.check` must accept.
      model: the network and its loss.
      method: the method that computes gradients from batches.
      optimizer: the optimizer of the network.
      splits: the data of each seed, all of the same size.
      epoch_probes: functions that are called for each run before each of its epochs.

    Raises:
      InputError: the devices or the data do not fit the settings.
    """
    self.config, self.method, self.splits = config, method, splits
    self._epoch_probes = epoch_probes
    self.devices = devices_lib.choose(config.num_devices, config.batch_size)
    self.step = 0
    self.timer = timer_lib.Timer()
    self.input_seconds = 0.0
    self._model, self._optimizer = model, optimizer
    self._num_examples = len(splits[0].train.label)
    counts = [examples_lib.class_counts(s.train, s.num_classes) for s in splits]
    self._class_counts = jnp.asarray(np.stack(counts), jnp.int32)
    init, self._steps = compilation.functions(
      model,
      # The only parts that are traced.
      base.Method(method.gradients, method.init, record=method.record),
      optimizer,
      self._num_examples,
      config.num_steps,
      len(splits),
      tuple(self.devices),
      config.device_map,
    )
    state = init(self._keys(0), self._class_counts, self._first_examples())
    self.state = devices_lib.replicate(state, self.devices)
    self.sampler = sampling.Sampler(
      config.seeds,
      self._epoch_order,
      num_train=self._num_examples,
      batch_size=config.batch_size,
      num_meta=len(splits[0].meta.label) if method.needs_meta else 0,
      meta_batch_size=config.meta_batch_size,
    )
    self._data = device_data.DeviceData(
      splits, self.devices, method.needs_meta, config.data, config.data_workers
    )
    self.steps_per_call = steps_per_call.most(
      config, self.devices, self._data.is_streamed
    )
    self._constants = devices_lib.replicate(
      (self._keys(1), self._class_counts), self.devices
    )
    self._pending: list[tuple[list[sampling.Rows], step_lib.StepOutput]] = []
    self._compiled_lengths: set[int] = set()

  def close(self) -> None:
    """Frees the device arrays of examples, and stops reading ahead."""
    self._data.close()
    # The sampler refers to this object. Break the reference cycle so that device
    # arrays are freed immediately.
    del self.sampler, self._data

  # -- state ---------------------------------------------------------------

  def restore(
    self,
    step: int,
    state: step_lib.TrainState,
    positions: Sequence[sampling.Position],
  ) -> None:
    """Continues at a saved step.

    Args:
      step: number of updates so far.
      state: state of all runs, [R, ...].
      positions: positions of the sampler.
    """
    self.step = step
    self.state = devices_lib.replicate(state, self.devices)
    self.sampler.seek(positions)

  def host_state(self) -> step_lib.TrainState:
    """State of all runs, [R, ...], on one device."""
    return devices_lib.unreplicate(self.state)

  def failure(self) -> step_lib.Failure:
    """The first failure of each run, NumPy arrays [R]; waits for the steps."""
    return jax.device_get(devices_lib.unreplicate(self.state.failure))

  def snapshot(self, run: int) -> evaluation.Snapshot:
    """The state of one run, for evaluators and probes; waits for the steps."""
    state, problem = self._state_and_problem(run)
    return evaluation.Snapshot(
      seed=self.config.seeds[run],
      step=self.step,
      state=state,
      problem=problem,
      optimizer=self._optimizer,
      splits=self.splits[run],
    )

  def _state_and_problem(self, run: int) -> tuple[step_lib.TrainState, base.Problem]:
    """State of one run, on one device, and its problem without a device axis."""
    problem = self._model.problem(
      class_counts=self._class_counts[run],
      num_examples=self._num_examples,
      num_steps=self.config.num_steps,
    )
    return devices_lib.unreplicate(self.state, run), problem

  def _keys(self, purpose: int) -> base.Array:
    keys = [jax.random.key(seed) for seed in self.config.seeds]
    return jnp.stack([jax.random.fold_in(key, purpose) for key in keys])

  def _first_examples(self) -> base.Batch:
    batches = [examples_lib.as_batch(split.train) for split in self.splits]
    return {name: np.stack([b[name][:1] for b in batches]) for name in batches[0]}

  # -- steps ---------------------------------------------------------------

  def take_steps(self) -> int:
    """Sends the next steps to the devices, without waiting for them.

    It waits for earlier steps only if a program must be compiled, if several calls with
    streamed examples are queued, and at the start of an epoch if there are epoch probes
    or the method has `refresh` or `sample`.

    Returns:
      The number of steps: `steps_per_call`, or 1 if fewer steps remain before the host
      has to log, evaluate or save. If the host has to act between epochs, no call
      crosses the end of an epoch, and an epoch that is shorter than `steps_per_call` is
      one call.

    Raises:
      InputError: the method's `sample` returns rows that do not exist or do not fill a
        batch.
    """
    self._probe_epochs()
    self._refresh()
    count = steps_per_call.length(
      self.config, self.step, self.steps_per_call, self._epoch()
    )
    self._data.read_ahead(self._num_known_steps(), self.sampler.ahead)
    rows = [self.sampler.next(self.step + k) for k in range(count)]
    start = time.perf_counter()
    batches = self._data.load(rows)
    self.input_seconds += time.perf_counter() - start
    arguments = (self.state, *batches, *self._constants)
    if count not in self._compiled_lengths:
      self._compiled_lengths.add(count)
      jax.block_until_ready(self.state)  # The timer must include the earlier steps.
      with self.timer.stopped():
        self._steps.lower(*arguments).compile()  # Cached for the call below.
        # Processes compile at different speeds, and collectives wait only for a short
        # time (gloo: 30 seconds).
        processes.exchange("compiled", "")
    self.state, output = self._steps(*arguments)
    self._pending.append((rows, output))
    if self._data.is_streamed and len(self._pending) >= MOST_QUEUED:
      jax.block_until_ready(self._pending[-MOST_QUEUED])
    self.step += count
    return count

  def fetch(self) -> list[Output]:
    """Waits for all steps, and returns the outputs since the last call.

    With several processes, all of them must call this method; they receive the same
    outputs.
    """
    rows = [rows for rows, _ in self._pending]
    outputs = jax.device_get([output for _, output in self._pending])
    self._pending = []
    weights = processes.concatenate([output.weights for output in outputs])
    return [
      Output(steps, devices_lib.unshard(w), devices_lib.first_copy(output.metrics))
      for steps, w, output in zip(rows, weights, outputs, strict=True)
    ]

  def _epoch_order(self, run, epoch, rng):
    if self.method.sample is base.permutation:  # This needs no state from the devices.
      return rng.permutation(self._num_examples)
    state, problem = self._state_and_problem(run)
    train = examples_lib.as_batch(self.splits[run].train)
    return self.method.sample(state.method_state, problem, train, rng)

  def _num_known_steps(self):
    """Number of upcoming steps whose rows do not depend on the state of the method."""
    if self.method.sample is base.permutation:
      return self.config.num_steps - self.step
    steps_left, _ = self.sampler.epoch()
    return min(steps_left, self.config.num_steps - self.step)

  def _epoch(self):
    """`sampler.epoch()` if the host has to act between epochs, otherwise None."""
    method = self.method
    acts_between_epochs = (
      self._epoch_probes
      or method.refresh is not base.keep_state
      or method.sample is not base.permutation
    )
    return self.sampler.epoch() if acts_between_epochs else None

  def _probe_epochs(self):
    """Calls the epoch probes for the runs that are about to start an epoch.

    The first process calls them, because they may write files.
    """
    starting = [k for k, run in enumerate(self.sampler.runs) if run.starts_epoch()]
    if not self._epoch_probes or not starting:
      return

    def call():
      for index in starting:
        snapshot = self.snapshot(index)
        for probe in self._epoch_probes:
          probe(snapshot, self.sampler.runs[index].position.epoch)

    processes.on_first("epoch_probes", call)

  def _refresh(self):
    """Calls the method's `refresh` for the runs that are about to start an epoch."""
    starts_epoch = [run.starts_epoch() for run in self.sampler.runs]
    if self.method.refresh is base.keep_state or not any(starts_epoch):
      return
    states = []
    for run, seed in enumerate(self.config.seeds):
      state, problem = self._state_and_problem(run)
      states.append(state.method_state)
      if starts_epoch[run]:
        epoch = self.sampler.runs[run].position.epoch
        view = base.EpochView(
          seed=seed,
          epoch=epoch,
          params=state.params,
          model_state=state.model_state,
          train=examples_lib.as_batch(self.splits[run].train),
          rng=sampling.generator(seed, "refresh", epoch),
        )
        start = time.perf_counter()
        states[run] = self.method.refresh(state.method_state, problem, view)
        if states[run] is not state.method_state:
          self.timer.note_refresh(self.step, time.perf_counter() - start)
    # Every process computes the same state; some methods divide a pass over the
    # training set among the processes (`inference.map_batches`). All processes continue
    # with the state of the first one, because hosts may round differently.
    stacked = processes.from_first(jax.tree.map(lambda *x: jnp.stack(x), *states))
    self.state = self.state._replace(
      method_state=devices_lib.replicate(stacked, self.devices)
    )
