"""The training loop: any method, any optax optimizer, exact resumption.

    folder/checkpoints/         the last two states (orbax)
    folder/timing.json          seconds of training, and steps of a full dispatch
    folder/seed-S/metrics.*     JSON lines, CSV and TensorBoard, a folder a run
    folder/seed-S/weights.csv   per-example weights
    folder/seed-S/results.json  written last: a finished run is not repeated

The same call continues an interrupted run and ends with the same bytes in these
files (but for the seconds) as an uninterrupted one, with as many steps a dispatch.
Checkpoints and results say what the run's numbers depend on: settings, data and, for
a run that is not finished, versions and devices. A run of anything else is refused.
SIGINT, SIGTERM and SIGHUP save a checkpoint first.
"""

from collections.abc import Sequence
import contextlib
import pathlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.io import checkpointing
from l2rw_jax.io import metric_writer
from l2rw_jax.io import workdir
from l2rw_jax.training import batches as batches_lib
from l2rw_jax.training import compilation
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import failures
from l2rw_jax.training import identity
from l2rw_jax.training import interruption
from l2rw_jax.training import progress
from l2rw_jax.training import results
from l2rw_jax.training import sampling
from l2rw_jax.training import step as step_lib
from l2rw_jax.training import steps_per_call
from l2rw_jax.training import timer as timer_lib
from l2rw_jax.training import weight_log

_TIMING = "timing.json"


def train(
  config: config_lib.Config,
  model: config_lib.Model,
  method: base.Method,
  optimizer: optax.GradientTransformation,
  splits: Sequence[examples_lib.Splits],
  folder: pathlib.Path,
  evaluators: Sequence[evaluation.Evaluator] = (evaluation.accuracy,),
  name: str = "train",
  probes: Sequence[evaluation.Probe] = (),
) -> list[results.Result]:
  """Trains one run for every seed, side by side, or finishes an interrupted one.

  Args:
    config: how to run.
    model: the network and its loss.
    method: turns batches into gradients.
    optimizer: takes them.
    splits: the data of each seed; all of one size.
    folder: where everything is kept. The model, the method and the optimizer must be
      those that it was made with.
    evaluators: what to measure on the test set; one of them must tell `accuracy`.
    name: for the progress bar and messages.
    probes: what to measure of the run itself, at the start and at every evaluation.

  Returns:
    A `Result` per seed, read back from disk.

  Raises:
    InputError: settings and data do not fit each other; losses or gradients
      became NaN or infinite (the last good state is in the checkpoint); a file
      could not be written; `folder` holds a run of other settings, data, versions or
      devices; another process works in it; JAX runs in several processes.
    KeyboardInterrupt: a signal asked the run to stop; its checkpoint is saved.
  """
  if jax.process_count() > 1:
    raise base.InputError(
      f"JAX runs in {jax.process_count()} processes, and training in more than one is"
      " not supported: start a single process, without jax.distributed.initialize."
    )
  folders = [folder / f"seed-{seed}" for seed in config.seeds]
  splits = batches_lib.check_splits(splits, config.seeds)
  identities = identity.of_runs(config, splits, folder)
  if not _is_finished(folder, folders, identities):
    config_lib.check(config, method, splits)
    test = batches_lib.examples_dict(splits[0].test)
    # One row, for a source of rows is an array only where it is read.
    model.check({k: x[:1] for k, x in test.items()}, splits[0].num_classes)
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise base.InputError(f"cannot write {folder}: {error.strerror}") from error
    with workdir.locked(folder), contextlib.ExitStack() as files:
      run = _Run(
        config, model, method, optimizer, splits, folder, name, files, identities
      )
      run.finish(evaluators, probes)
  return [results.read(f) for f in folders]


def _is_finished(folder, folders, identities):
  """Whether all results are there and whole; raises if they are of other runs."""
  wrong = []
  for own, expected in zip(folders, identities, strict=True):
    path = own / results.RESULTS
    if not path.exists():
      return False
    damage = results.damage(own)
    if damage:
      wrong.append(damage)
    else:
      identity.check_run(workdir.read_record(path).get("identity"), expected, path)
  try:
    workdir.read_record(folder / _TIMING)
  except base.InputError as error:
    wrong.append(str(error))
  for damage in wrong:
    logging.warning("%s It is made again from the last checkpoint.", damage)
  return not wrong


class _Run:
  """R runs in progress: device state, host state and open files."""

  def __init__(
    self, config, model, method, optimizer, splits, folder, name, files, identities
  ):
    self.identities = identities
    self.config, self.model, self.method = config, model, method
    self.optimizer, self.splits = optimizer, splits
    self.folder, self.name = folder, name
    self.folders = [folder / f"seed-{seed}" for seed in config.seeds]
    self.num_runs = len(config.seeds)
    self.devices = devices_lib.choose(config.num_devices, config.batch_size)
    counts = [examples_lib.class_counts(s.train, s.num_classes) for s in splits]
    self.class_counts = jnp.asarray(np.stack(counts), jnp.int32)
    self.pending: list[tuple[list[batches_lib.Rows], step_lib.StepOutput]] = []
    # Metrics [R, K] by name, of steps flushed before their row was due.
    self.window: dict[str, np.ndarray] = {}
    self.dispatched: set[int] = set()  # Lengths that are compiled.
    self.writers: list[metric_writer.MetricWriter] = []
    self.init_fn, self.steps_fn = compilation.functions(
      model,
      base.Method(method.gradients, method.init),  # The rest of it is not traced.
      optimizer,
      self._num_examples(),
      config.num_steps,
      self.num_runs,
      tuple(self.devices),
    )
    self.files = files
    self.checkpointer = checkpointing.Checkpointer(folder / "checkpoints")
    self.files.callback(self.checkpointer.close)
    self._restore_or_init()
    self.most = steps_per_call.most(config, self.devices, self.source.streamed)
    self.constants = devices_lib.replicate(
      (self._keys(1), self.class_counts), self.devices
    )

  # -- state ---------------------------------------------------------------

  def _restore_or_init(self):
    state = self.init_fn(self._keys(0), self.class_counts, self._first_examples())
    log = weight_log.WeightLog.empty(self.num_runs, self._num_examples())
    step, positions, histories = None, None, [None] * self.num_runs
    restored = self.checkpointer.restore_latest((state, log))
    if restored is not None:
      (state, log), step = restored.state, restored.step
      self._check_identity(restored)
      positions = [sampling.Position(*p) for p in restored.host["positions"]]
      histories = restored.host["metrics"]
      self.window = {
        name: np.asarray(column["values"]).astype(jnp.dtype(column["dtype"]))
        for name, column in restored.host["window"].items()
      }
      logging.info("%s: continuing from step %d", self.name, step)
    self.step, self.saved_step = step or 0, -1 if step is None else step
    self.clock = timer_lib.Timer.restore(self.folder / _TIMING, self.step)
    self.log = weight_log.WeightLog(*(np.array(x) for x in log))
    self.state = devices_lib.replicate(state, self.devices)
    self.source = batches_lib.BatchSource(
      self.config,
      self.splits,
      self._epoch_order,
      self.method.needs_meta,
      self.devices,
      positions,
    )
    # It knows this run, and this run it: the examples on the devices would stay
    # there until someone looks for cycles.
    self.files.callback(setattr, self, "source", None)
    for folder, history in zip(self.folders, histories, strict=True):
      folder.mkdir(parents=True, exist_ok=True)
      writer = metric_writer.MetricWriter(folder, resume_step=step, history=history)
      self.writers.append(self.files.enter_context(writer))

  def _check_identity(self, restored: checkpointing.Restored) -> None:
    place, host = self.folder / "checkpoints", restored.host
    kept = host.get("identity", [None] * self.num_runs)
    for old, new in zip(kept, self.identities, strict=True):
      identity.check_run(old, new, place)
    if restored.step < self.config.num_steps:
      made_by = identity.made_by(len(self.devices))
      identity.check_made_by(host.get("made_by"), made_by, place)

  def _keys(self, purpose: int) -> base.Array:
    keys = [jax.random.key(seed) for seed in self.config.seeds]
    return jnp.stack([jax.random.fold_in(key, purpose) for key in keys])

  def _first_examples(self) -> base.Batch:
    firsts = [batches_lib.examples_dict(s.train) for s in self.splits]
    return {k: np.stack([f[k][:1] for f in firsts]) for k in firsts[0]}

  def _num_examples(self) -> int:
    return len(self.splits[0].train.label)

  def _of_run(self, run: int) -> tuple[step_lib.TrainState, base.Problem]:
    """One run's state, unreplicated, and its task outside the devices' axis."""
    state = devices_lib.unreplicate(self.state)
    own = devices_lib.take(state, run)
    problem = self.model.problem(
      class_counts=self.class_counts[run],
      num_examples=self._num_examples(),
      num_steps=self.config.num_steps,
    )
    return own, problem

  # -- epochs --------------------------------------------------------------

  def _epoch_order(self, run, epoch, rng):
    if self.method.sample is base.permutation:  # spare a look at the devices
      return rng.permutation(self._num_examples())
    state, problem = self._of_run(run)
    train = batches_lib.examples_dict(self.splits[run].train)
    return self.method.sample(state.method_state, problem, train, rng)

  def _epoch(self):
    """Steps left and in all until the method looks at the training set, or None."""
    method = self.method
    if method.refresh is base.keep_state and method.sample is base.permutation:
      return None
    return self.source.epoch()

  def _refresh(self):
    """Lets the method look at the training set of runs about to start an epoch."""
    starting = [s.starts_epoch() for s in self.source.streams]
    if self.method.refresh is base.keep_state or not any(starting):
      return
    states = []
    for run, seed in enumerate(self.config.seeds):
      state, problem = self._of_run(run)
      states.append(state.method_state)
      if starting[run]:
        epoch = self.source.streams[run].position.epoch
        view = base.EpochView(
          seed=seed,
          epoch=epoch,
          params=state.params,
          model_state=state.model_state,
          train=batches_lib.examples_dict(self.splits[run].train),
          rng=sampling.generator(seed, "refresh", epoch),
        )
        states[run] = self.method.refresh(state.method_state, problem, view)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    self.state = self.state._replace(
      method_state=devices_lib.replicate(stacked, self.devices)
    )

  # -- the loop ------------------------------------------------------------

  def finish(self, evaluators, probes) -> None:
    """Runs to the last step, measuring on the way, and writes the results."""
    self._raise_on_failure()
    if self.step == 0:
      self._measure((), probes)
    with progress.bar(self.config.num_steps, self.step, self.name) as bar:
      self.clock.start()
      with interruption.deferred() as signals:
        while self.step < self.config.num_steps and not signals:
          self._refresh()
          count = steps_per_call.length(
            self.config, self.step, self.most, self._epoch()
          )
          rows = [self.source.next(self.step + k) for k in range(count)]
          self._take_steps(rows, self.source.load(rows))
          bar.update(count)
          self._after_steps(bar, evaluators, probes)
        if signals:
          self._save_between_looks()
    if self.step < self.config.num_steps:  # The signal's handler has returned.
      raise KeyboardInterrupt
    self._write_results()
    self._write_seconds()

  def _take_steps(self, rows, batches):
    args = (self.state, *batches, *self.constants)
    if len(rows) not in self.dispatched:
      self.dispatched.add(len(rows))
      jax.block_until_ready(self.state)  # Steps before these count.
      with self.clock.stopped():
        self.steps_fn.lower(*args).compile()  # Kept where the call looks for it.
    self.state, output = self.steps_fn(*args)
    self.pending.append((rows, output))
    self.step += len(rows)

  def _after_steps(self, bar, evaluators, probes):
    config = self.config

    def due(every):
      return self.step % every == 0 or self.step == config.num_steps

    if due(config.log_every) or due(config.eval_every) or due(config.checkpoint_every):
      self._flush(bar)
    with self.clock.stopped():
      if due(config.eval_every):
        self.clock.note(self.step)
        self._measure(evaluators, probes)
      if due(config.checkpoint_every):
        self._save()

  def _save_between_looks(self):
    """Saves a checkpoint at a step where none is due; later rows do not change."""
    with self.clock.stopped():
      self._fetch()
      if self.step > self.saved_step:
        self._save()

  def _fetch(self):
    """Brings the steps since the last fetch to the host: the only waiting."""
    self._raise_on_failure()
    if not self.pending:
      return
    dispatches, outputs = zip(*self.pending, strict=True)
    self.pending = []
    outputs = jax.device_get(outputs)
    for steps, output in zip(dispatches, outputs, strict=True):
      weights = devices_lib.unshard(output.weights)  # [R, K, B]
      for k, rows in enumerate(steps):
        self.log.add(rows.train, weights[:, k])
    for name in outputs[0].metrics:
      before = [self.window[name]] if name in self.window else []
      columns = [output.metrics[name][0] for output in outputs]
      self.window[name] = np.concatenate([*before, *columns], axis=1)

  def _flush(self, bar):
    """Writes a row of the means over the steps since the last row."""
    self._fetch()
    for run, writer in enumerate(self.writers):
      means = {f"train/{name}": _mean(x[run]) for name, x in self.window.items()}
      writer.write(self.step, means)
    bar.set_postfix(loss=f"{_mean(self.window['loss'][:, -1]):.3f}")
    self.window = {}

  def _raise_on_failure(self):
    failure = jax.device_get(devices_lib.unreplicate(self.state.failure))
    run = failures.first(failure)
    if run is None:
      return
    self.step = int(failure.step[run])
    what, advice = failures.explain(failure, run, self.config.batch_size)
    if self.step > self.saved_step:
      self._save()
    raise base.InputError(
      f"{self.name}, seed {self.config.seeds[run]}, step {self.step}: {what}; the"
      f" last good parameters are in {self.folder}/checkpoints. {advice} Start again"
      " in another --workdir."
    )

  def _measure(self, evaluators, probes):
    if not evaluators and not probes:
      return
    for run, writer in enumerate(self.writers):
      snapshot = self._snapshot(run)
      found = evaluation.measure(snapshot, evaluators, probes)
      writer.write(self.step, found)
      if evaluators:
        logging.info(
          "%s, seed %d, step %d: test accuracy %.4f",
          self.name,
          snapshot.seed,
          self.step,
          found["test/accuracy"],
        )

  def _snapshot(self, run):
    state, problem = self._of_run(run)
    return evaluation.Snapshot(
      seed=self.config.seeds[run],
      step=self.step,
      state=state,
      problem=problem,
      optimizer=self.optimizer,
      splits=self.splits[run],
    )

  def _save(self):
    state = devices_lib.unreplicate(self.state)
    positions = [list(p) for p in self.source.positions()]
    # First, so that no checkpoint is there whose seconds are not.
    self._write_seconds()
    host = {
      "positions": positions,
      "metrics": [writer.history for writer in self.writers],
      "window": {
        name: {"dtype": str(x.dtype), "values": x.astype(np.float64).tolist()}
        for name, x in self.window.items()
      },
      "identity": self.identities,
      "made_by": identity.made_by(len(self.devices)),
    }
    self.checkpointer.save(self.step, (state, self.log), host)
    self.saved_step = self.step

  def _write_seconds(self):
    facts = {"steps_per_call": self.most}
    self.clock.write(self.folder / _TIMING, self.step, facts)

  def _write_results(self):
    for run, (folder, seed) in enumerate(
      zip(self.folders, self.config.seeds, strict=True)
    ):
      self.writers[run].close()
      params = jax.device_get(self._of_run(run)[0].params)
      facts = {
        "seed": seed,
        "num_steps": self.step,
        "num_devices": len(self.devices),
        "identity": self.identities[run],
        **workdir.run_info(),
      }
      results.write(folder, params, self.log, run, self.splits[run], facts)


def _mean(values):
  """In float32 at least: the sum of many bfloat16 numbers stops growing."""
  return np.mean(values.astype(np.promote_types(values.dtype, np.float32)))
