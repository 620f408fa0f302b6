r"""L2RW's approximate scores: agreement with the exact scores, and accuracy.

Networks are trained with exact weights, with uniform weights, and with weights from
approximate scores. Scores are approximated by computing them from some of the layers
only (`layers=`), by using one gradient of the meta loss for several steps
(`refresh_every=`), and by doing both. There are two problems: an MLP on MNIST with
40% flipped labels, and a small GPT on the sources of Python's standard library,
with 30% corrupted documents (experiments.lm_reweight). The meta batch is the whole meta
set, so that two gradients of the meta loss differ only because the parameters do. With
the same seed, every method starts from the same parameters and uses the same batches.
Nothing was chosen on the test set. Columns:

  spearman_median, _10th, _least  Spearman's correlation of the scores of a batch with
                                  the exact scores at the same parameters: median, 10th
                                  percentile and minimum over every seventh step
  accuracy_percent                accuracy on the test images, or on the bytes of the
                                  test documents
  difference                      accuracy minus that of exact weights with the same
                                  seed, in percentage points
  test_loss                       mean loss of the test images or documents, in nats
                                  (per byte, for documents)

Command: python -m benchmarks.approximate_scores --data_dir=DIR
Results: results/approximate_scores.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import report
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import text_documents
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import gpt
from l2rw_jax.models import language_model
from l2rw_jax.models import mlp
from l2rw_jax.training import evaluation

# The scores of every seventh step are compared. `run` refuses multiples of seven for
# --refresh_every: with them, the gradient of the meta loss would never be at its oldest
# in a step that is compared.
_PROBE_EVERY = 7


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.DataFlags, settings_lib.OutputFlags):
  """The flags of this benchmark."""

  dataset: str = flag("mnist")
  problems: tuple[str, ...] = flag(
    ("images", "text"), "Problems to train.", choices=["images", "text"], group="data"
  )
  num_seeds: int = flag(5)
  num_steps: int = flag(400)
  learning_rate: float = flag(0.1, "Learning rate of SGD for the images.")
  shares: tuple[float, ...] = flag(
    (0.2, 0.5, 0.8),
    "For images: the layers that scores are computed from, given as shares of the cost"
    " of all layers. For text, scores are computed from the last block.",
    bounds=settings_lib.INNER_SHARE,
    group="method",
  )
  refresh_every: int = flag(
    10,
    "Number of steps for which one gradient of the meta loss is used.",
    bounds=settings_lib.Bounds(2, 10**6),
  )


class Experiment(NamedTuple):
  """A network with its optimizer, splits by seed, batch size and choices of layers."""

  model: classifier.Classifier
  optimizer: optax.GradientTransformation
  splits: Callable[[int], examples_lib.Splits]
  batch_size: int
  layers: tuple[Any, ...]


def make_experiment(settings: Settings, name: str) -> Experiment:
  """The experiment for a name in `--problems`."""
  if name == "images":
    train, test = settings.load("train"), settings.load("test")
    splits = functools.partial(
      noisy_labels.noisy_labels,
      *(train, test),
      builder="uniform_flip",
      fraction=0.4,
      num_meta_per_class=10,
    )
    network = mlp.MLP(train.num_classes)
    model = classifier.Classifier(network, train.num_classes)
    optimizer = optax.sgd(settings.learning_rate)
    return Experiment(
      model, optimizer, lambda seed: splits(seed=seed), 100, settings.shares
    )
  documents = functools.partial(
    text_documents.corrupted_documents,
    text_documents.standard_library(),
    **{"length": 32, "num_train": 4000, "num_meta": 64, "num_test": 500},
    fraction=0.3,
  )
  vocabulary = text_documents.VOCABULARY
  decoder = gpt.GPT(vocabulary, width=32, depth=2, num_heads=2)
  schedule = optax.cosine_decay_schedule(0.003, settings.num_steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
  sequences = language_model.LanguageModel(decoder, vocabulary)
  # A block is named here. A share of the cost would select the last layer first, which
  # is also the embedding and alone costs more than a fifth of the network.
  return Experiment(
    sequences, optimizer, lambda seed: documents(seed=seed), 32, ("block_1",)
  )


def make_methods(settings: Settings, layers: tuple[Any, ...]) -> dict[str, base.Method]:
  """Exact weights, uniform weights and the approximations, by name."""
  every = settings.refresh_every
  methods = {"exact": l2rw.l2rw(), "uniform": baselines.uniform()}
  for chosen in layers:
    methods[f"layers={chosen}"] = l2rw.l2rw(layers=chosen)
  methods[f"refresh_every={every}"] = l2rw.l2rw(refresh_every=every)
  for chosen in layers[:1]:
    name = f"layers={chosen},refresh_every={every}"
    methods[name] = l2rw.l2rw(layers=chosen, refresh_every=every)
  return methods


def make_trainer(
  problem: base.Problem,
  method: base.Method,
  optimizer: optax.GradientTransformation,
) -> Callable[..., Any]:
  """Returns `(params, model_state, train, meta, rows [S, B]) -> (params, scores)`.

  S is the number of steps, and `scores` is the pair of the method's and the exact
  scores, [S, B] each. The exact scores are 0 except at every seventh step. Both are 0
  if the method has no scores.
  """

  def train_fn(params, model_state, train, meta, rows):
    def step_fn(carry, inputs):
      params, opt_state, method_state = carry
      step, row = inputs
      batch, key = jax.tree.map(lambda x: x[row], train), jax.random.key(0)
      result, method_state = method.gradients(
        method_state,
        problem,
        base.Inputs(params, model_state, opt_state, batch, meta, step, key),
      )
      nothing = jnp.zeros(row.shape)
      scores, exact = result.scores, nothing
      if scores is None:
        scores = nothing
      else:
        exact = jax.lax.cond(
          step % _PROBE_EVERY == 0,
          lambda: (
            l2rw.example_weights(
              problem.losses_fn(model_state, key), params, batch, meta, has_aux=True
            ).scores
          ),
          lambda: nothing,
        )
      updates, opt_state = optimizer.update(result.grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return (params, opt_state, method_state), (scores, exact)

    method_state = method.init(jax.random.key(0), problem, params)
    carry: Any = params, optimizer.init(params), method_state
    steps = jnp.arange(len(rows)), rows
    (params, *_), scores = jax.lax.scan(step_fn, carry, steps)
    return params, scores

  return jax.jit(train_fn)


def correlations(scores: np.ndarray, exact: np.ndarray) -> dict[str, float]:
  """The distribution of Spearman's correlation between rows of two arrays [S, B]."""
  values = [
    stats.spearmanr(*pair).statistic for pair in zip(scores, exact, strict=True)
  ]
  return {
    "spearman_median": round(float(np.median(values)), 3),
    "spearman_10th": round(float(np.quantile(values, 0.1)), 3),
    "spearman_least": round(float(np.min(values)), 3),
  }


def make_rows(settings: Settings, problem_name: str) -> list[dict[str, Any]]:
  """A row for each method and seed of a problem."""
  experiment = make_experiment(settings, problem_name)
  splits = [experiment.splits(seed) for seed in range(settings.num_seeds)]
  num_train = len(splits[0].train.label)
  problem = experiment.model.problem(
    class_counts=jnp.ones(experiment.model.num_classes),
    num_examples=num_train,
    num_steps=settings.num_steps,
  )
  rows: list[dict[str, Any]] = []
  exact_percent: dict[int, float] = {}
  for weights, method in make_methods(settings, experiment.layers).items():
    trainer = make_trainer(problem, method, experiment.optimizer)
    for seed, split in enumerate(splits):
      parts = split.train, split.meta, split.test
      train, meta, test = map(examples_lib.as_batch, parts)
      params, model_state = experiment.model.init(jax.random.key(seed), meta)
      order = np.random.default_rng(seed).integers(
        num_train, size=(settings.num_steps, experiment.batch_size), dtype=np.int32
      )
      train, meta = jax.device_put((train, meta))
      params, scores = trainer(params, model_state, train, meta, order)
      predictions = evaluation.predict(problem, params, model_state, test)
      measured = evaluation.accuracy(predictions)
      percent = 100 * measured["accuracy"]
      exact_percent.setdefault(seed, percent)  # Exact weights come first.
      row = {"problem": problem_name, "weights": weights, "seed": seed}
      if problem_name == "images":
        row["learning_rate"] = settings.learning_rate
      row["data"] = split.fingerprint
      if weights not in ("exact", "uniform"):
        row |= correlations(*(np.asarray(s)[::_PROBE_EVERY] for s in scores))
      row["accuracy_percent"] = round(percent, 2)
      row["difference"] = round(percent - exact_percent[seed], 2)
      row["test_loss"] = round(measured["loss"], 4)
      rows.append(row)
    print(summary(rows[-settings.num_seeds :]), flush=True)
  return rows


def summary(rows: list[dict[str, Any]]) -> str:
  """A line with the results of one method: means and intervals over its seeds."""
  text = f"{rows[0]['problem']} {rows[0]['weights']}:"
  for name in ("spearman_median", "accuracy_percent", "difference"):
    if name in rows[0]:
      text += f" {name} {report.interval([row[name] for row in rows]):.3f},"
  return text[:-1]


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Trains all networks, prints the results and writes them to a folder.

  Raises:
    InputError: --refresh_every is a multiple of seven, or a flag of the data is wrong.
  """
  if settings.refresh_every % _PROBE_EVERY == 0:
    raise base.InputError(
      f"--refresh_every={settings.refresh_every}: give a number that is not a multiple"
      f" of {_PROBE_EVERY}; scores are compared at every seventh step."
    )
  path, info = pathlib.Path(workdir) / "results.csv", workdir_lib.run_info()
  info |= {"num_steps": settings.num_steps, "dataset": settings.dataset}
  rows: list[dict[str, Any]] = []
  for name in dict.fromkeys(settings.problems):
    rows += make_rows(settings, name)
    _rows.write(path, [{**row, **info} for row in rows])
  print(f"\nwritten: {path}")
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "approximate_scores")
