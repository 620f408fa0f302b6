"""The training loop: any method, most optax optimizers, exact resumption.

    folder/checkpoints/         the latest two states (orbax)
    folder/timing.json          seconds of training, and steps per call
    folder/seed-S/metrics.*     JSON lines and CSV, one folder per run
    folder/seed-S/tensorboard/  the same metrics as TensorBoard events
    folder/seed-S/weights.csv   per-example weights
    folder/seed-S/statistics.npz
                                what the method reports for each example, if anything
    folder/seed-S/variables.msgpack
                                trained parameters, see `variables`
    folder/seed-S/results.json  written last; it marks the run as finished

The same call continues an interrupted run. If the number of steps per call is the same,
all files of `seed-S` except TensorBoard's are then byte for byte those of an
uninterrupted run. Checkpoints and results record what the numbers of the run depend on:
settings, data and, for an unfinished run, versions, source code and kind of device. A
folder whose run has another seed, other data or other settings is refused; the model,
the method and the optimizer are not compared. On SIGINT, SIGTERM and SIGHUP, a
checkpoint is saved before the run stops.

Several processes (`jax.distributed`) train one run together: all of them call `train`
with the same arguments, every process sends its rows of every batch to its devices, and
process 0 writes the files, in a folder that all of them can read. The run can be
continued with a different number of processes and devices; the results then differ only
by rounding.
"""

from collections.abc import Sequence
import contextlib
import os
import pathlib
import sys
from typing import Any

from absl import logging
import jax
import optax

from l2rw_jax import base
from l2rw_jax import processes
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.io import workdir
from l2rw_jax.training import callbacks
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import identity
from l2rw_jax.training import interruption
from l2rw_jax.training import results
from l2rw_jax.training import run as run_lib
from l2rw_jax.training import weight_log


def train(
  config: config_lib.Config,
  model: config_lib.Model,
  method: base.Method,
  optimizer: optax.GradientTransformation,
  splits: Sequence[examples_lib.Splits],
  folder: str | os.PathLike,
  evaluators: Sequence[evaluation.Evaluator] = (evaluation.accuracy,),
  name: str = "train",
  probes: Sequence[evaluation.Probe] = (),
  epoch_probes: Sequence[evaluation.EpochProbe] = (),
) -> list[results.Result]:
  """Trains one run for every seed, side by side, or finishes interrupted ones.

  Args:
    config: settings of the runs.
    model: the network and its loss.
    method: the method that computes gradients from batches.
    optimizer: the optimizer of the network, any whose update needs no arguments but
      `params` and `value` (a line search needs more).
    splits: the data of each seed, all of the same size.
    folder: the folder of all files. The model, the method and the optimizer must be
      those with which the folder was created: the results of finished runs are read
      without training, whatever these arguments are. A log message says so.
    evaluators: functions that compute metrics of the predictions on the test set; one
      of them must compute `accuracy`.
    name: name of the runs in the progress bar and in messages.
    probes: functions that compute other metrics of the runs, at the start and at every
      evaluation.
    epoch_probes: functions that are called for each run before each of its epochs. If
      an interrupted run continues at the start of an epoch, they are called again for
      that epoch.

  Returns:
    A `Result` for each seed, read from disk: metrics, weights, trained parameters.

  Raises:
    InputError: the settings do not match the data; no evaluator computes `accuracy`;
      the optimizer needs arguments other than `params` and `value`; losses or gradients
      became NaN or infinite (the last good state is in the checkpoint); a file cannot
      be written; `folder` contains a run with other settings or data, or an unfinished
      one with other versions, source code or kind of device, or another program uses
      it; several processes disagree on settings, data or versions, or do not share the
      folder.
    KeyboardInterrupt: a signal stopped the run; its checkpoint has been saved.
  """
  folder = pathlib.Path(folder)
  folders = [folder / f"seed-{seed}" for seed in config.seeds]
  splits = config_lib.as_integers(splits, config.seeds)
  identities = identity.of_runs(config, splits, folder)
  processes.check_same(
    "a run",
    {
      "folder": str(folder.resolve()),
      **{f"seed {x['seed']}": x for x in identities},
      "made_by": workdir.made_by(),
      **{
        name: getattr(config, name)
        for name in identity.EXCLUDED
        if name not in identity.LOCAL
      },
    },
  )
  # Take one row, because a row source becomes an array only when it is indexed.
  first = {k: x[:1] for k, x in examples_lib.as_batch(splits[0].train).items()}
  if processes.on_first("finished", lambda: _is_finished(folder, folders, identities)):
    _log_finished(folder, name)
  else:
    config_lib.check(config, method, splits)
    config_lib.warn_of_missing_groups(splits[0], needs_meta=method.needs_meta)
    test = examples_lib.as_batch(splits[0].test)
    model.check({k: x[:1] for k, x in test.items()}, splits[0].num_classes)
    processes.on_first("folder", lambda: _make(folder))
    with workdir.locked(folder), contextlib.ExitStack() as files:
      run = run_lib.Run(config, model, method, optimizer, splits, epoch_probes)
      files.callback(run.close)
      checkpoints = callbacks.Checkpoints(folder, identities)
      files.callback(checkpoints.close)
      weights, saved = checkpoints.restore(run)
      if saved:
        logging.info("%s: continuing from step %d", name, run.step)
      resume_step = run.step if saved else None
      metrics = files.enter_context(callbacks.Metrics(folders, resume_step, saved))
      evaluate = callbacks.Evaluation(metrics, evaluators, probes, name)
      if not saved:  # A checkpoint of step 0 contains these metrics.
        evaluate.at_start(run)
      _train(run, metrics, weights, evaluate, checkpoints, name)
      processes.on_first(
        "results",
        lambda: _write_results(run, metrics, weights, folders, identities, checkpoints),
      )
  like = jax.eval_shape(model.init, jax.random.key(0), first)
  return [results.read(f, like) for f in folders]


def _train(
  run: run_lib.Run,
  metrics: callbacks.Metrics,
  weights: weight_log.WeightLog,
  evaluate: callbacks.Evaluation,
  checkpoints: callbacks.Checkpoints,
  name: str,
) -> None:
  """Takes all steps that are left, or raises KeyboardInterrupt."""
  config = run.config

  def fetch():
    checkpoints.raise_on_failure(run, metrics, weights, name)
    for output in run.fetch():
      metrics.add(output.metrics)
      for k, rows in enumerate(output.rows):
        weights.add(rows.train, output.weights[:, k])

  checkpoints.raise_on_failure(run, metrics, weights, name)
  with progress_bar(config.num_steps, run.step, name) as bar:
    run.timer.start()
    with interruption.deferred() as signals, interruption.agreed(signals) as stops:
      while run.step < config.num_steps and not stops():
        bar.update(run.take_steps())
        if config.is_due(run.step, *config.intervals):
          fetch()
          bar.set_postfix(loss=f"{metrics.last('loss'):.3f}")
          metrics.write_means(run.step)
        with run.timer.stopped():
          evaluate(run)
          checkpoints(run, metrics, weights)
      if signals:
        # This step may lie within an interval, so no row of metrics is written.
        with run.timer.stopped():
          fetch()
          checkpoints.save(run, metrics, weights)
  if run.step < config.num_steps:  # The signal's handler did not raise.
    raise KeyboardInterrupt


def progress_bar(total: int, initial: int, description: str) -> Any:
  """A tqdm progress bar; if stderr is not a terminal, it only logs the steps."""
  import tqdm  # Installed with the experiments; not needed to import the package.

  if not sys.stderr.isatty():
    logging.info("%s: steps %d to %d", description, initial, total)
  return tqdm.tqdm(
    total=total,
    initial=initial,
    desc=description,
    unit="step",
    disable=not (sys.stderr.isatty() and processes.is_first()),
    leave=False,
  )


def _is_finished(folder, folders, identities):
  """Whether all results exist and are intact; raises if they are from other runs."""
  problems = []
  for run_folder, expected in zip(folders, identities, strict=True):
    path = run_folder / results.RESULTS
    if not path.exists():
      return False
    damage = results.damage(run_folder)
    if damage:
      problems.append(damage)
    else:
      identity.check_run(workdir.read_record(path).get("identity"), expected, path)
  try:
    workdir.read_record(folder / callbacks.TIMING)
  except base.InputError as error:
    problems.append(str(error))
  for problem in problems:
    logging.warning(
      "%s The results will be written again from the last checkpoint.", problem
    )
  return not problems


def _log_finished(folder, name):
  # The settings of a prepared folder, which were compared, include the method.
  is_known = bool(workdir.settings_of(folder))
  logging.log(
    logging.INFO if is_known else logging.WARNING,
    "%s: the results of the finished runs in %s are read; nothing is trained.%s",
    name,
    folder,
    "" if is_known else " The model, the method and the optimizer are not compared.",
  )


def _make(folder):
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise base.InputError(f"cannot write {folder}: {error.strerror}") from error


def _write_results(run, metrics, weights, folders, identities, checkpoints):
  for index, (folder, seed) in enumerate(zip(folders, run.config.seeds, strict=True)):
    metrics.close(index)
    facts = {
      "seed": seed,
      "num_steps": run.step,
      "num_devices": len(run.devices),
      "identity": identities[index],
      **workdir.run_info(),
    }
    state = jax.device_get(run.snapshot(index).state)
    statistics = run.method.report(state.method_state)
    split = run.splits[index]
    results.write(folder, state, weights, index, split, facts, statistics)
  checkpoints.write_timing(run)
