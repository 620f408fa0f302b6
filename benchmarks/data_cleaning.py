r"""Data cleaning as a bilevel problem: this library compared with SOBA and SABA.

The problem is that of the public benchmark benchopt/benchmark_bilevel: 20,000
standardized images of MNIST, a share p of which gets a label drawn from all ten
classes; 5,000 clean images; a linear classifier without bias that starts at 0;
regularization 0.2 |z|^2; batches of 64; and the error on the 10,000 test images. The
split of the images differs from that of the public benchmark, so individual numbers
differ by chance.

`clean_only` is the baseline to beat: it trains on the 5,000 clean images alone.
`fine_tuning` trains uniformly on the noisy images in the first half of the steps, and
on the clean images in the second half. `early_stopped` is uniform training up to the
evaluation with the lowest error on the clean images. These three choose their
regularization: the first two by the error on a held-out fifth of the clean images,
`early_stopped` by the error on all of them. `oracle` knows which labels are wrong.

SOBA and SABA have the step sizes that the public benchmark chose for each p; for SOBA,
it did so for p = 0.5, 0.7 and 0.9 only. The learning rates of this library's methods
were chosen with seed 100 by the error on 5,000 other training images (`dev_percent` in
the rows): --learning_rate at p = 0.7, and --kept_learning_rate by the mean over p =
0.5, 0.7 and 0.9. For averaged_weights, about 20 variants (with and without the norm; a
constant, a falling or a rising rate; several rates and decays) were tried at p = 0.9
with seeds 100, 101 and, for some, 102. Of those that give the weights an AUROC of at
least 0.986 with each seed, the two with the lowest mean error have 14.5 and 14.6%; the
second was chosen, because its error falls below 17% sooner. This choice therefore used
the knowledge of which labels of these seeds are wrong; no other choice did. The
division of each meta batch's gradient by its norm was added after one of three test
runs was 2.7 points worse than the others, because of one pixel of one clean image. On
seeds 100 to 104, the division changes the mean error by 0.01 points (p = 0.9) and 0.04
points (p = 0.5). No other choice used test images.
Seconds are CPU time of all processor cores, without compilation and evaluation; they do
not include the search for a regularization.
Command: python -m benchmarks.data_cleaning --data_dir=DIR
Results: results/data_cleaning.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _cleaning_solvers as solvers_lib
from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from experiments.tables import catalog
from l2rw_jax import base
from l2rw_jax.io import workdir as workdir_lib

# The methods that learn weights, without knowing which labels are wrong.
LEARNED = (
  *("l2rw", "meta_weight_net", "kept_weights"),
  *("averaged_weights", "soba", "saba"),
)
METHODS = (
  *(*LEARNED, "uniform", "oracle"),
  *("clean_only", "fine_tuning", "early_stopped"),
)
TABLE = catalog.DATA_CLEANING
_REGULARIZATION = 0.2
# The candidates for the regularization of the methods that train on the clean images,
# and of `early_stopped`. For `clean_only`, 0.2 was never the best.
_CLEAN_REGULARIZATIONS = (0.003, 0.01, 0.03, 0.1)
_NOISY_REGULARIZATIONS = (*_CLEAN_REGULARIZATIONS, _REGULARIZATION)
# The methods that choose their regularization on a held-out fifth of the clean images.
_TRAINED_ON_CLEAN = ("clean_only", "fine_tuning")
# The seconds until the test error is first below this number, in %, are reported.
_TARGET = 17.0
# Maps a share of redrawn labels to the outer step size of SOBA divided by its inner
# step size, from the best_params files of the public benchmark. The ratio of SABA does
# not depend on the share.
_SOBA_RATIO = {0.5: 1e4, 0.7: 1e4, 0.9: 1e3}
_DEV_SIZE = 5_000
# Methods whose error is a horizontal line in the figure: its linestyle and label.
_LINES = {
  "clean_only": (":", "clean images alone"),
  "fine_tuning": ("-.", "fine-tuning on them"),
  "early_stopped": ("--", "early stopping on them"),
}


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.DataFlags, settings_lib.OutputFlags):
  """The flags of this benchmark."""

  EXTENDABLE = ("methods", "num_seeds", "shares")

  dataset: str = flag("mnist")
  shares: tuple[float, ...] = flag(
    (0.5, 0.9),
    "Shares p of the labels that are redrawn from all classes.",
    bounds=settings_lib.SHARE,
    group="data",
  )
  methods: tuple[str, ...] = settings_lib.methods_flag(METHODS, METHODS)
  num_seeds: int = flag(5)
  first_seed: int = flag(
    0, "The first seed; the others follow it.", bounds=settings_lib.Bounds(0, 10**6)
  )
  num_steps: int = flag(20_480)
  eval_every: int = flag(512)
  batch_size: int = flag(64, "Number of training and of clean examples in a step.")
  num_train: int = flag(20_000)
  num_meta: int = flag(5_000, "Total number of clean images, over all classes.")
  learning_rate: float = flag(
    0.02, "Initial learning rate of all methods except SOBA and SABA."
  )
  kept_learning_rate: float = flag(
    3000.0,
    "Initial learning rate of the weights that kept_weights stores for the examples.",
    bounds=settings_lib.Bounds(0, 1e9),
    methods=["kept_weights"],
  )
  averaged_learning_rate: float = flag(
    200.0,
    "Learning rate of the weights that averaged_weights stores.",
    bounds=settings_lib.Bounds(0, 1e9),
    methods=["averaged_weights"],
  )


class Data(NamedTuple):
  """The problem.

  Attributes:
    x: inputs of the training examples, [N, D].
    given: given labels of the training examples, some of them wrong, [N].
    is_clean: whether the given labels are right, [N].
    meta: inputs and labels of the clean examples.
    dev: inputs and labels of training images for choosing settings.
    test: inputs and labels of the test images.
    num_classes: C.
  """

  x: np.ndarray
  given: np.ndarray
  is_clean: np.ndarray
  meta: tuple[np.ndarray, np.ndarray]
  dev: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]
  num_classes: int

  @property
  def fingerprint(self) -> str:
    """A hash of the training and the clean examples with their labels."""
    digest = hashlib.sha256()
    for array in (self.x, self.given, *self.meta):
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Run(NamedTuple):
  """Measurements of a run, at every evaluation.

  Attributes:
    steps: number of steps before the evaluation.
    seconds: CPU seconds of training before the evaluation.
    test_percent: error on the test images.
    meta_percent: error on the clean images.
    dev_percent: error on the images for choosing settings; NaN if there are none.
    auroc: area under the ROC curve of each entry of `Solver.trust` at the end: how well
      the entry ranks right labels above wrong ones.
  """

  steps: list[int]
  seconds: list[float]
  test_percent: list[float]
  meta_percent: list[float]
  dev_percent: list[float]
  auroc: dict[str, float]


def load(settings: Settings, share: float, seed: int) -> Data:
  """Loads the problem of a share and a seed, with the images in random order.

  Raises:
    InputError: the data set has too few images for the flags, or --num_train or
      --num_meta is too small for --batch_size.
  """
  train, test = settings.load("train"), settings.load("test")
  used = settings.num_train + settings.num_meta
  if settings.num_train < settings.batch_size:
    raise base.InputError(
      f"--num_train={settings.num_train} is less than --batch_size; raise"
      " --num_train or lower --batch_size."
    )
  # `clean_regularization` holds a fifth of the clean images out.
  if settings.num_meta - num_held_out(settings.num_meta) < settings.batch_size:
    raise base.InputError(
      f"--num_meta={settings.num_meta}: four fifths of these images are fewer than"
      " --batch_size; raise --num_meta or lower --batch_size."
    )
  if used > len(train.labels):
    raise base.InputError(
      f"--num_train and --num_meta need {used} images, but {train.name} has"
      f" {len(train.labels)}; lower one of them."
    )
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(train.labels))
  rows, meta, dev = np.split(order[: used + _DEV_SIZE], [settings.num_train, used])
  given = train.labels[rows].astype(np.int32)
  drawn = np.flatnonzero(rng.random(len(rows)) < share)
  given[drawn] = rng.integers(0, train.num_classes, len(drawn))
  flat = [
    images.reshape(len(images), math.prod(images.shape[1:])).astype(np.float32)
    for images in (train.images[rows], train.images[meta], train.images[dev])
  ]
  flat.append(test.images.reshape(len(test.images), -1).astype(np.float32))
  mean, std = flat[0].mean(axis=0), flat[0].std(axis=0)
  std[std == 0] = 1  # Pixels that are the same in all images.
  x, *others = ((images - mean) / std for images in flat)
  labels = (train.labels[meta], train.labels[dev], test.labels)
  pairs = [(a, b.astype(np.int32)) for a, b in zip(others, labels, strict=True)]
  return Data(
    x, given, given == train.labels[rows], pairs[0], pairs[1], pairs[2],
    train.num_classes,
  )  # fmt: skip


def make_sizes(
  settings: Settings, data: Data, regularization: float = _REGULARIZATION
) -> solvers_lib.Sizes:
  """The shape of the problem."""
  return solvers_lib.Sizes(
    num_examples=len(data.given),
    num_meta=len(data.meta[1]),
    num_features=data.x.shape[1],
    num_classes=data.num_classes,
    batch_size=settings.batch_size,
    num_steps=settings.num_steps,
    regularization=regularization,
  )


@functools.cache
def make_solver(settings: Settings, name: str, share: float) -> solvers_lib.Solver:
  """The solver for a name in `--methods`."""
  rate = settings.learning_rate
  methods = {
    "uniform": lambda: solvers_lib.fixed_weights(rate),
    "oracle": lambda: solvers_lib.fixed_weights(
      rate, lambda batch: batch.is_clean.astype(jnp.float32)
    ),
    "clean_only": lambda: solvers_lib.clean_only(rate),
    "fine_tuning": lambda: solvers_lib.fine_tuning(rate),
    "early_stopped": lambda: solvers_lib.fixed_weights(rate),
    "l2rw": lambda: solvers_lib.l2rw_solver(rate),
    "meta_weight_net": lambda: solvers_lib.meta_weight_net_solver(rate),
    "kept_weights": lambda: solvers_lib.kept_weights(rate, settings.kept_learning_rate),
    "averaged_weights": lambda: solvers_lib.averaged_weights(
      rate, settings.averaged_learning_rate
    ),
    "soba": lambda: solvers_lib.soba(1.0, _SOBA_RATIO[share]),
    "saba": lambda: solvers_lib.saba(0.1, 100.0),
  }
  return methods[name]()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(solver, sizes, state, first, arrays, numbers, meta_numbers):
  """Takes some steps.

  `numbers` and `meta_numbers` are the numbers of the batches of these steps and of the
  step that follows them.
  """

  def batch(examples, number, following, num_examples):
    start = sizes.start(number, num_examples)
    take = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=sizes.batch_size
    )
    x, y, is_clean = map(take, examples)
    return solvers_lib.Batch(x, y, start, number, following, is_clean)

  def step(state, inputs):
    index, of_train, of_meta = inputs
    state = solver.step(
      sizes,
      state,
      index,
      batch(arrays[0], of_train[0], of_train[1], sizes.num_examples),
      batch(arrays[1], of_meta[0], of_meta[1], sizes.num_meta),
    )
    return state, None

  pairs = [(values[:-1], values[1:]) for values in (numbers, meta_numbers)]
  inputs = (first + jnp.arange(len(numbers) - 1), *pairs)
  return jax.lax.scan(step, state, inputs)[0]


def _error_percent(z: base.Array, pair: tuple[np.ndarray, np.ndarray]) -> float:
  logits = pair[0] @ np.asarray(z)
  # The argmax of NaN is class 0.
  if not (logits.size and np.isfinite(logits).all()):
    return float("nan")
  predicted = np.argmax(logits, axis=1)
  return 100 * float(np.mean(predicted != pair[1]))


def _batch_numbers(num_batches: int, count: int, rng: np.random.Generator):
  """Numbers of `count` batches; each pass over all batches has a new order."""
  passes = -(-count // num_batches)
  orders = [rng.permutation(num_batches) for _ in range(passes)]
  return np.concatenate(orders)[:count].astype(np.int32)


def train(
  solver: solvers_lib.Solver, sizes: solvers_lib.Sizes, data: Data, seed: int,
  eval_every: int,
) -> Run:  # fmt: skip
  """Trains and measures one solver.

  Args:
    solver: solver of the problem.
    sizes: shape of the problem and number of steps.
    data: the problem.
    seed: seed of the order of the batches and of the initial weighting network.
    eval_every: number of steps between two evaluations.
  """
  rng = np.random.default_rng([seed, 1])
  numbers, meta_numbers = (
    _batch_numbers(sizes.num_batches(size), sizes.num_steps + 1, rng)
    for size in (sizes.num_examples, sizes.num_meta)
  )
  ones = np.ones(sizes.num_meta, bool)
  arrays = jax.device_put(((data.x, data.given, data.is_clean), (*data.meta, ones)))
  state = solver.init(sizes, jax.random.key(seed))
  result, seconds = Run([], [], [], [], [], {}), 0.0

  def evaluate(step):
    result.steps.append(step)
    result.seconds.append(seconds)
    result.test_percent.append(_error_percent(state["z"], data.test))
    result.meta_percent.append(_error_percent(state["z"], data.meta))
    result.dev_percent.append(_error_percent(state["z"], data.dev))

  evaluate(0)
  for start in range(0, sizes.num_steps, eval_every):
    end = min(start + eval_every, sizes.num_steps)
    chunk = (numbers[start : end + 1], meta_numbers[start : end + 1])
    arguments = (solver, sizes, state, jnp.int32(start), arrays, *chunk)
    if start == 0 or end - start < eval_every:
      jax.block_until_ready(_steps(*arguments))  # Compiles.
    started = time.process_time()
    state = jax.block_until_ready(_steps(*arguments))
    seconds += time.process_time() - started
    evaluate(end)
  result.auroc.update(_aurocs(solver.trust(state), data.is_clean))
  return result


def _aurocs(trust: dict[str, base.Array], is_clean: np.ndarray) -> dict[str, float]:
  from sklearn import metrics

  if is_clean.all() or not is_clean.any():
    return {}
  return {
    name: float(metrics.roc_auc_score(is_clean, np.asarray(values)))
    for name, values in trust.items()
  }


def num_held_out(num_meta: int) -> int:
  """The number of clean examples that `clean_regularization` holds out."""
  return max(1, num_meta // 5)


def clean_regularization(settings: Settings, name: str, data: Data, seed: int) -> float:
  """The regularization that is best on a held-out fifth of the clean examples.

  Args:
    settings: the flags of the benchmark.
    name: a method that trains on the clean examples.
    data: the problem.
    seed: seed of the runs.
  """
  x, y = data.meta
  held_out = num_held_out(len(y))
  rest, fifth = (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])
  smaller = data._replace(meta=rest, test=fifth, dev=fifth)
  solver = make_solver(settings, name, 0.0)

  def error(regularization):
    sizes = make_sizes(settings, smaller, regularization)
    return train(solver, sizes, smaller, seed, sizes.num_steps).test_percent[-1]

  return min(_CLEAN_REGULARIZATIONS, key=error)


class Chosen(NamedTuple):
  """A run, with its regularization and the evaluation that is reported."""

  run: Run
  regularization: float
  evaluation: int = -1


def train_early_stopped(settings: Settings, data: Data, seed: int) -> Chosen:
  """The run and the evaluation with the lowest error on all clean examples."""
  solver = make_solver(settings, "early_stopped", 0.0)
  candidates = []
  for regularization in _NOISY_REGULARIZATIONS:
    sizes = make_sizes(settings, data, regularization)
    result = train(solver, sizes, data, seed, settings.eval_every)
    candidates += [Chosen(result, regularization, i) for i in range(len(result.steps))]
  # `argmin` would select a NaN.
  errors = [x.run.meta_percent[x.evaluation] for x in candidates]
  return candidates[int(np.argmin(np.nan_to_num(errors, nan=np.inf)))]


def train_method(
  settings: Settings, name: str, share: float, seed: int, data: Data
) -> Chosen:
  """Trains a method, which may choose its regularization first."""
  if name == "early_stopped":
    return train_early_stopped(settings, data, seed)
  regularization = _REGULARIZATION
  if name in _TRAINED_ON_CLEAN:
    regularization = clean_regularization(settings, name, data, seed)
  sizes = make_sizes(settings, data, regularization)
  solver = make_solver(settings, name, share)
  result = train(solver, sizes, data, seed, settings.eval_every)
  return Chosen(result, regularization)


def make_row(
  settings: Settings, name: str, share: float, seed: int, data: Data
) -> dict[str, Any]:
  """The row of a run in `results.csv`, with its curve as "curve"."""
  result, regularization, reported = train_method(settings, name, share, seed, data)
  below = [
    s
    for s, error in zip(result.seconds, result.test_percent, strict=True)
    if error < _TARGET
  ]
  dev = result.dev_percent[reported]
  return {
    "method": name,
    "dataset": settings.dataset,
    "share": share,
    "seed": seed,
    "data": data.fingerprint,
    "wrong_percent": 100 * float(np.mean(~data.is_clean)),
    "error_percent": result.test_percent[reported],
    "reported_step": result.steps[reported],
    "best_percent": min(result.test_percent),
    "dev_percent": None if math.isnan(dev) else dev,
    "weight_auroc": result.auroc.get("weight"),
    "score_auroc": result.auroc.get("score"),
    "seconds_to_target": below[0] if below else None,
    "seconds": result.seconds[reported],
    "num_steps": settings.num_steps,
    "batch_size": settings.batch_size,
    "regularization": regularization,
    "num_train": len(data.given),
    "num_meta": len(data.meta[1]),
    **workdir_lib.run_info(),
    "curve": " ".join(
      f"{step}:{second:.3f}:{error:.2f}"
      for step, second, error in zip(
        result.steps, result.seconds, result.test_percent, strict=True
      )
    ),
  }


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws test error against seconds: a panel per share, a thin line per seed."""
  shares = sorted({row["share"] for row in rows})
  methods = [name for name in METHODS if any(r["method"] == name for r in rows)]
  size = (1.8 + 4.4 * len(shares), 3.8)
  with figures.figure(
    path, 1, len(shares), figsize=size, squeeze=False, tight=True
  ) as (
    _,
    axes,
  ):
    for share, ax in zip(shares, axes[0], strict=True):
      for i, name in enumerate(methods):
        runs = [r for r in rows if (r["method"], r["share"]) == (name, share)]
        if name in _LINES:
          error = np.mean([r["error_percent"] for r in runs])
          linestyle, text = _LINES[name]
          ax.axhline(error, color="black", linestyle=linestyle, label=text)
          continue
        for row in runs:
          curve = np.array([p.split(":") for p in row["curve"].split()], float)
          first_label = name if row is runs[0] else None
          style = {"uniform": "--", "oracle": "-."}.get(name, "-")
          color = "0.5" if name in ("uniform", "oracle") else f"C{i}"
          ax.plot(
            np.maximum(curve[1:, 1], 1e-2), curve[1:, 2], style, color=color,
            linewidth=1.2, label=first_label,
          )  # fmt: skip
      ax.set_xscale("log")
      errors = [r["error_percent"] for r in rows if r["share"] == share]
      ax.set_ylim(max(0, min(errors) - 1), min(100, 2 * np.median(errors)))
      ax.set_title(f"{rows[0]['dataset']}, p = {share:g}", fontsize=10)
      ax.set_xlabel("CPU seconds of training")
      ax.grid(linewidth=0.4)
    axes[0, 0].set_ylabel("test error (%), a line for each seed")
    figures.legend_at_right(axes[0, -1])


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: a flag is invalid, or the data set cannot be read.
  """
  names = settings_lib.choose("methods", settings.methods, METHODS)
  if not settings.shares:
    raise base.InputError("--shares= is empty: give a number between 0 and 1.")
  unknown = [share for share in settings.shares if share not in _SOBA_RATIO]
  if unknown and "soba" in names:
    raise base.InputError(
      f"--shares={unknown[0]}: soba has step sizes for"
      f" {', '.join(map(str, _SOBA_RATIO))} only; leave it out of --methods."
    )
  seeds = range(settings.first_seed, settings.first_seed + settings.num_seeds)
  load(settings, settings.shares[0], seeds[0])  # Raises before anything is written.
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows = []
  for share in dict.fromkeys(settings.shares):
    for seed in seeds:
      data = load(settings, share, seed)
      for name in names:
        path = folder / "runs" / f"{name}-{share}-{seed}.json"
        row = workdir_lib.read_record(path) if path.exists() else None
        if row is None:
          row = make_row(settings, name, share, seed, data)
          path.parent.mkdir(exist_ok=True)
          workdir_lib.write_record(path, row)
        rows.append(row)
  rows.sort(key=lambda row: (row["share"], names.index(row["method"]), row["seed"]))
  draw(rows, folder / "figure.png")
  return runner.report(settings, TABLE, folder, rows, methods=(METHODS, names))


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
