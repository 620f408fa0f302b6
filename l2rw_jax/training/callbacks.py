"""Metrics, evaluation and checkpoints between the steps of a `run.Run`.

`loop.train` uses all classes of this module; each can also be used in another loop.
With several processes, all of them make the same calls, except that only process 0
calls `Metrics.write`, `Metrics.close` and `Checkpoints.write_timing`. Process 0
evaluates and writes files.
"""

from collections.abc import Mapping, Sequence
import contextlib
import pathlib
from typing import Any

from absl import logging
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import processes
from l2rw_jax.io import checkpointing
from l2rw_jax.io import metric_writer
from l2rw_jax.training import evaluation
from l2rw_jax.training import identity
from l2rw_jax.training import run as run_lib
from l2rw_jax.training import sampling
from l2rw_jax.training import step as step_lib
from l2rw_jax.training import timer as timer_lib
from l2rw_jax.training import weight_log

TIMING = "timing.json"


class Metrics:
  """Writes the metrics of R runs; a context manager, because it keeps files open."""

  def __init__(
    self,
    folders: Sequence[pathlib.Path],
    resume_step: int | None = None,
    saved: Mapping[str, Any] | None = None,
  ):
    """Creates the folders and opens their files.

    Args:
      folders: the folder of each run.
      resume_step: the step from which the runs continue, or None for new runs.
      saved: the result of `to_json` at that step.
    """
    histories = saved["metrics"] if saved else [None] * len(folders)
    # Metrics of the steps since the last row, by name: a list of arrays [R, K], which
    # are joined when they are needed and not in every step.
    self._window: dict[str, list[np.ndarray]] = {}
    if saved:
      self._window = {
        name: [np.asarray(column["values"]).astype(jnp.dtype(column["dtype"]))]
        for name, column in saved["window"].items()
      }
    self._writers = []
    with contextlib.ExitStack() as files:
      for folder, history in zip(folders, histories, strict=True):
        if not processes.is_first():
          continue
        folder.mkdir(parents=True, exist_ok=True)
        writer = metric_writer.MetricWriter(
          folder, resume_step=resume_step, history=history
        )
        self._writers.append(files.enter_context(writer))
      self._files = files.pop_all()

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *exception: Any) -> None:
    self._files.__exit__(*exception)

  def close(self, run: int) -> None:
    """Closes the files of one run and writes its `metrics.csv`."""
    self._writers[run].close()

  def add(self, metrics: Mapping[str, np.ndarray]) -> None:
    """Adds the metrics [R, K] of some steps to the next row."""
    for name, values in metrics.items():
      self._window.setdefault(name, []).append(values)

  def write_means(self, step: int) -> None:
    """Writes a row for each run: the means over the steps since the last row."""
    columns = self._columns()
    for run, writer in enumerate(self._writers):
      means = {f"train/{name}": _mean(x[run]) for name, x in columns.items()}
      writer.write(step, means)
    self._window = {}

  def write(self, run: int, step: int, values: Mapping[str, float]) -> None:
    """Writes a row for one run."""
    self._writers[run].write(step, values)

  def last(self, name: str) -> float:
    """The mean of a metric over the runs, in the last step that was added."""
    return _mean(self._window[name][-1][:, -1])

  def _columns(self) -> dict[str, np.ndarray]:
    """The metrics [R, K] of the steps since the last row, by name."""
    return {name: np.concatenate(x, axis=1) for name, x in self._window.items()}

  def to_json(self) -> dict[str, Any]:
    """The rows written so far and the steps since the last row."""
    return {
      "metrics": [writer.history for writer in self._writers],
      "window": {
        name: {"dtype": str(x.dtype), "values": x.astype(np.float64).tolist()}
        for name, x in self._columns().items()
      },
    }


class Evaluation:
  """Evaluates the runs and writes the results as metrics."""

  def __init__(
    self,
    metrics: Metrics,
    evaluators: Sequence[evaluation.Evaluator],
    probes: Sequence[evaluation.Probe] = (),
    name: str = "train",
  ):
    """Stores the arguments and measures nothing.

    Args:
      metrics: the writer of the results.
      evaluators: functions that compute metrics of the predictions on the test set; one
        of them must compute `accuracy`.
      probes: functions that compute other metrics of the runs, such as the accuracy on
        the training set.
      name: name of the runs in log messages.
    """
    self._metrics, self._name = metrics, name
    self._evaluators, self._probes = evaluators, probes

  def at_start(self, run: run_lib.Run) -> None:
    """Writes the metrics of the probes for new runs."""
    if run.step == 0 and self._probes:
      self._measure(run, ())

  def __call__(self, run: run_lib.Run) -> None:
    """Writes the metrics of the evaluators and the probes if an evaluation is due.

    Raises:
      InputError: no evaluator computes `accuracy`.
    """
    if run.config.is_due(run.step, run.config.eval_every):
      run.timer.note(run.step)
      self._measure(run, self._evaluators, needed="test/accuracy")

  def _measure(self, run, evaluators, needed=None):
    processes.on_first("evaluation", lambda: self._write(run, evaluators, needed))

  def _write(self, run, evaluators, needed):
    for index, seed in enumerate(run.config.seeds):
      values = evaluation.measure(run.snapshot(index), evaluators, self._probes)
      # Without this check, `results.write` would fail, but only after the last step.
      if needed not in (None, *values):
        raise base.InputError(
          f"{self._name}: no evaluator computes accuracy; add evaluation.accuracy to"
          " the evaluators."
        )
      if values:
        self._metrics.write(index, run.step, values)
      if "test/accuracy" in values:
        logging.info(
          "%s, seed %d, step %d: test accuracy %.4f",
          self._name,
          seed,
          run.step,
          values["test/accuracy"],
        )


class Checkpoints:
  """Saves and restores a run with its metrics and its weight log."""

  def __init__(self, folder: pathlib.Path, identities: Sequence[dict[str, Any]]):
    """Opens the checkpoints in `folder`.

    Args:
      folder: the folder of the runs.
      identities: the identity of each run. A checkpoint of other runs is refused.
    """
    self._folder, self._identities = folder, list(identities)
    self._place = folder / "checkpoints"
    # The first process removes incomplete checkpoints before the others read.
    if processes.is_first():
      self._checkpointer = checkpointing.Checkpointer(self._place)
    processes.on_first("checkpoints", lambda: None)
    if not processes.is_first():
      self._checkpointer = checkpointing.Checkpointer(self._place, read_only=True)
    self._saved_step = -1

  def close(self) -> None:
    """Frees the resources of the checkpointer."""
    self._checkpointer.close()

  def restore(
    self, run: run_lib.Run
  ) -> tuple[weight_log.WeightLog, dict[str, Any] | None]:
    """Continues `run` from its latest checkpoint, if there is one.

    Args:
      run: a new run; its step, state, positions and timer are restored.

    Returns:
      The weight log, and the argument `saved` of `Metrics`, which is None without a
      checkpoint.

    Raises:
      InputError: the checkpoint is from another run, or it is from an unfinished run
        that used another kind of device, other code or other versions.
    """
    shape = (len(run.splits), len(run.splits[0].train.label))
    weights = weight_log.WeightLog.empty(*shape)
    restored = self._read((run.host_state(), weights))
    if restored is None:
      return weights, None
    self._check_identity(restored, run)
    state, weights = restored.state
    positions = [sampling.Position(*p) for p in restored.host["positions"]]
    run.restore(restored.step, state, positions)
    run.timer = timer_lib.Timer.restore(self._folder / TIMING, restored.step)
    self._saved_step = restored.step
    # These are copies, because the restored arrays are read-only.
    return weight_log.WeightLog(*(np.array(x) for x in weights)), restored.host

  def _read(self, like):
    """The latest intact checkpoint, which process 0 selects."""
    checkpoints = []

    def latest():
      checkpoints.append(self._checkpointer.restore_latest(like))
      return None if checkpoints[0] is None else checkpoints[0].step

    step = processes.on_first("restore", latest)
    if processes.is_first():
      return checkpoints[0]
    return None if step is None else self._checkpointer.restore(step, like)

  def _check_identity(self, restored, run):
    saved = restored.host.get("identity", [None] * len(self._identities))
    for old, new in zip(saved, self._identities, strict=True):
      identity.check_run(old, new, self._place)
    if restored.step < run.config.num_steps:
      made_by = identity.made_by(len(run.devices))
      identity.check_made_by(restored.host.get("made_by"), made_by, self._place)

  def __call__(
    self, run: run_lib.Run, metrics: Metrics, weights: weight_log.WeightLog
  ) -> None:
    """Saves a checkpoint if one is due."""
    if run.config.is_due(run.step, run.config.checkpoint_every):
      self.save(run, metrics, weights)

  def save(
    self, run: run_lib.Run, metrics: Metrics, weights: weight_log.WeightLog
  ) -> None:
    """Saves a checkpoint, unless one of this step or of a later one exists."""
    if run.step > self._saved_step:
      processes.on_first("save", lambda: self._save(run, metrics, weights))
      self._saved_step = run.step

  def _save(self, run, metrics, weights):
    # The timer is written first, so that it exists for every checkpoint.
    self.write_timing(run)
    host = {
      "positions": [list(position) for position in run.sampler.positions()],
      **metrics.to_json(),
      "identity": self._identities,
      "made_by": identity.made_by(len(run.devices)),
    }
    self._checkpointer.save(run.step, (run.host_state(), weights), host)

  def write_timing(self, run: run_lib.Run) -> None:
    """Writes the seconds of training to `timing.json`."""
    facts: dict[str, Any] = {
      "steps_per_call": run.steps_per_call,
      "device_map": run.config.device_map,
      "num_processes": processes.count(),
    }
    run.timer.write(self._folder / TIMING, run.step, facts)

  def raise_on_failure(
    self,
    run: run_lib.Run,
    metrics: Metrics,
    weights: weight_log.WeightLog,
    name: str,
  ) -> None:
    """Saves the last good state and raises InputError if a step was not finite.

    Args:
      run: the runs; this function waits for their steps.
      metrics: the metrics, which are saved with the checkpoint.
      weights: the weight log, which is saved with the checkpoint.
      name: name of the runs in the message.
    """
    failure = run.failure()
    failed = step_lib.first_failed_run(failure)
    if failed is None:
      return
    run.step = int(failure.step[failed])
    what, advice = step_lib.explain_failure(failure, failed, run.config.batch_size)
    self.save(run, metrics, weights)
    raise base.InputError(
      f"{name}, seed {run.config.seeds[failed]}, step {run.step}: {what}; the last"
      f" good parameters are in {self._place}. {advice} Start again in another"
      " --workdir."
    )


def _mean(values):
  # Sum in float32 or wider, because a sum of many bfloat16 numbers stops growing.
  return np.mean(values.astype(np.promote_types(values.dtype, np.float32)))
