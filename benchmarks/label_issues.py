r"""Detection of wrong labels from one training run, compared with cross-validation.

Some labels of small data sets are replaced by wrong ones, a network is trained on them
once, and the ranking of `audit.find_label_issues` is compared with these alternatives:

- cleanlab, with out-of-fold probabilities of the same network trained five times;
- the area under the margin (AUM) and the mean loss of the same run;
- the share of the 10 nearest neighbors that have another label, weighted by closeness;
- the statistics of an L2RW run with five trusted examples per class.

No method uses the true labels of the training set, which does not contain the trusted
examples. Digits, wine and breast_cancer are bundled with scikit-learn. For mnist,
fashion_mnist and cifar10_n, only the first training images are used. The labels of
cifar10_n are those of human annotators: a seed changes the network and the trusted
examples, not the labels. The images of cifar10_n are converted to features that are
computed without labels (random_patches). The recipe (network, learning rate, epochs)
and the ranking were chosen on other data or seeds: digits with seeds 100 and 101, later
training images of MNIST, Fashion-MNIST and CIFAR-10N, iris, and synthetic sets.
cleanlab uses its default settings. Seconds are CPU time of all processor cores, so that
other load on the machine does not count.
Command: python -m benchmarks.label_issues --data_dir=DIR; for the human labels, add
  --datasets=cifar10_n --num_examples=10000. It needs pip install '.[benchmarks]'.
Results: results/label_issues.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.lib import launch
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from experiments.tables import catalog
from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.data import label_noise
from l2rw_jax.data import noisy_labels
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import l2rw
from l2rw_jax.models import mlp
from l2rw_jax.models import random_patches

# The number of epochs for each data set. Networks memorize small tables quickly.
EPOCHS = {
  "digits": 20,
  "mnist": 12,
  "fashion_mnist": 12,
  "cifar10_n": 12,
  "wine": 10,
  "breast_cancer": 10,
}
DEFAULT = ("digits", "mnist", "fashion_mnist", "wine", "breast_cancer")
NOISES = (
  *("symmetric:0.1", "symmetric:0.2", "symmetric:0.4", "pair:0.2", "pair:0.4"),
  *("human:aggre", "human:worst"),
)
METHODS = ("audit", "audit_trusted", "cleanlab", "neighbors")

TABLE = catalog.LABEL_ISSUES
_HIDDEN = (256, 256)
_LEARNING_RATE = 1e-3
_FOLDS, _NEIGHBORS, _TRUSTED = 5, 10, 5


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.DataFlags, settings_lib.OutputFlags):
  """The flags of this benchmark."""

  datasets: tuple[str, ...] = flag(
    DEFAULT,
    f"Data sets: any of {', '.join(EPOCHS)}.",
    aliases=["dataset"],
    group="data",
  )
  noises: tuple[str, ...] = flag(
    NOISES,
    f"Kinds of wrong labels with their fraction: any of {', '.join(NOISES)}. The"
    " labels of human annotators are for cifar10_n only, and the other kinds are for"
    " the other sets (pair not for breast_cancer).",
    group="data",
  )
  methods: tuple[str, ...] = flag(
    METHODS, f"Rankings to compare: any of {', '.join(METHODS)}."
  )
  num_seeds: int = flag(3)
  num_examples: int = flag(
    4_000,
    "Largest number of examples of a data set; wine and breast_cancer are always used"
    " in full.",
    bounds=settings_lib.Bounds(100, 10**8),
    group="data",
  )


class NoisyData(NamedTuple):
  """A data set with wrong labels.

  Attributes:
    x: the inputs, float32 [N, d].
    given: the given labels, some of them wrong, int32 [N].
    true: the true labels, int32 [N].
    trusted: the inputs and true labels of five additional examples per class.
    num_classes: the number of classes, C.
    num_epochs: the number of epochs of training.
    seed: the seed of all random choices.
  """

  x: np.ndarray
  given: np.ndarray
  true: np.ndarray
  trusted: tuple[np.ndarray, np.ndarray]
  num_classes: int
  num_epochs: int
  seed: int


class Ranking(NamedTuple):
  """A ranking of N labels by how suspicious they are.

  Attributes:
    score: a score for each label, [N]. Higher scores are more suspicious.
    num_issues: the estimated number of wrong labels; None if the method gives none.
    seconds: the CPU time, without the compilation of the training steps.
  """

  score: np.ndarray
  num_issues: int | None
  seconds: float


@functools.cache
def load(settings: Settings, name: str) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns the inputs [N, d], labels [N] and number of classes of a data set.

  Raises:
    InputError: if the data set is not one of `EPOCHS` or cannot be read.
  """
  if name not in EPOCHS:
    raise base.InputError(f"--datasets={name}: choose among {', '.join(EPOCHS)}.")
  if name in ("wine", "breast_cancer"):
    from sklearn import datasets
    from sklearn import preprocessing

    bunch = {"wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer}[
      name
    ]()
    x = preprocessing.scale(bunch.data).astype(np.float32)
    return x, bunch.target.astype(np.int32), len(bunch.target_names)
  source, size = settings.load("train", name), settings.num_examples
  labels = source.labels[:size]
  if name == "cifar10_n":
    return random_patches.fit(source.images[:size])[1], labels, source.num_classes
  x = source.images[:size].reshape(-1, math.prod(source.images.shape[1:]))
  return x.astype(np.float32) / 255, labels, source.num_classes


def is_used(name: str, noise: str) -> bool:
  """Whether a kind of wrong labels is used with a data set."""
  kind = noise.partition(":")[0]
  if name == "cifar10_n" or kind == "human":
    return name == "cifar10_n" and kind == "human"
  # With two classes, pair noise would hardly differ from symmetric noise.
  return not (name == "breast_cancer" and kind == "pair")


def make_noisy_data(settings: Settings, name: str, noise: str, seed: int) -> NoisyData:
  """Loads a data set and replaces some of its labels with wrong ones.

  Args:
    settings: the flags of the benchmark.
    name: the name of the data set.
    noise: "symmetric:SHARE" for exactly that share of wrong labels, each drawn
      uniformly from the other classes; "pair:SHARE" to replace each label with the
      next class, with that probability; or "human:NAME" for the labels of annotators.
    seed: the seed of the trusted examples, the noise and the training.

  Returns:
    The data set with wrong labels.

  Raises:
    InputError: if a name is unknown, the data set cannot be read, or a class has too
      few examples.
  """
  x, labels, num_classes = load(settings, name)
  kind, _, share = noise.partition(":")
  if noise not in NOISES:
    raise base.InputError(f"--noises={noise}: choose among {', '.join(NOISES)}.")
  counts = np.bincount(labels, minlength=num_classes).tolist()
  fewest = min(counts)
  if fewest <= _TRUSTED:
    raise base.InputError(
      f"--num_examples={settings.num_examples}: class {counts.index(fewest)} of {name}"
      f" has only {fewest} examples, and {_TRUSTED} of each class are trusted; give a"
      " larger number."
    )
  rng = np.random.default_rng(seed)
  trusted = np.concatenate(
    [
      rng.choice(np.flatnonzero(labels == c), _TRUSTED, replace=False)
      for c in range(num_classes)
    ]
  )
  rows = np.setdiff1d(np.arange(len(labels)), trusted)
  true = labels[rows]
  if kind == "human":
    field = noisy_labels.ANNOTATIONS[share]
    given = settings.load("train", name).extra[field][rows]
  elif kind == "symmetric":
    given = label_noise.uniform_flip(
      true, fraction=float(share), num_classes=num_classes, rng=rng
    )
  else:
    pairs = {c: (c + 1) % num_classes for c in range(num_classes)}
    matrix = label_noise.pair_matrix(num_classes, float(share), pairs)
    given = label_noise.resample(true, matrix, rng=rng)
  return NoisyData(
    x[rows], given, true, (x[trusted], labels[trusted]), num_classes, EPOCHS[name], seed
  )


class Trainer:
  """A short training loop, with the same network and optimizer for every method."""

  def __init__(self, num_classes: int, with_trusted: bool = False):
    """Creates the model and the optimizer.

    Args:
      num_classes: the number of classes.
      with_trusted: whether to use the weights that L2RW computes from trusted examples.
    """
    self.model = mlp.MLP(num_classes, _HIDDEN)
    self.optimizer = optax.adam(_LEARNING_RATE)
    self.num_classes = num_classes
    self._with_trusted = with_trusted
    self._compiled: dict[Any, Callable[..., Any]] = {}

  def _losses(self, params, batch):
    logits: Any = self.model.apply({"params": params}, batch[0])
    return losses.softmax_cross_entropy(logits, batch[1]), logits

  def _epoch(self, carry, data, trusted, rows):
    def step(carry, row):
      params, opt_state, state = carry
      batch = jax.tree.map(lambda x: x[row], data)
      if self._with_trusted:
        value_and_grad = l2rw.weighted_value_and_grad(self._losses, has_aux=True)
        (_, info), grads = value_and_grad(params, batch, trusted)
        logits = info.aux
        evidence: tuple[base.Array, ...] = (info.weights, info.scores)
      else:

        def loss(params):
          values, logits = self._losses(params, batch)
          return values.mean(), logits

        grads, logits = jax.grad(loss, has_aux=True)(params)
        evidence = ()
      state = audit.update(state, row, logits, batch[1], *evidence)
      updates, opt_state = self.optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state, state), None

    return jax.lax.scan(step, carry, rows)[0]

  def train(
    self, data: NoisyData, train_rows: np.ndarray | None = None
  ) -> tuple[Any, audit.State, float]:
    """Trains a network.

    Args:
      data: the data set.
      train_rows: the rows to train on; the default is all rows.

    Returns:
      The parameters, the statistics, and the CPU seconds without compilation.
    """
    if train_rows is None:
      train_rows = np.arange(len(data.given))
    size = len(train_rows)
    batch_size = min(100, max(8, size // 13))
    params = self.model.init(jax.random.key(data.seed), data.x[:1])["params"]
    state = audit.init(len(data.given), self.num_classes)
    carry = (params, self.optimizer.init(params), state)
    arrays, trusted = jax.device_put(((data.x, data.given), data.trusted))
    rng = np.random.default_rng([data.seed, size])
    shape = (size // batch_size, batch_size)
    key = (data.x.shape, shape)
    if key not in self._compiled:
      like = jax.ShapeDtypeStruct(shape, np.int32)
      lowered = jax.jit(self._epoch).lower(carry, arrays, trusted, like)
      self._compiled[key] = lowered.compile()
    jax.block_until_ready(carry)
    started = time.process_time()
    for _ in range(data.num_epochs):
      rows = train_rows[rng.permutation(size)][: shape[0] * shape[1]].reshape(shape)
      carry = self._compiled[key](carry, arrays, trusted, rows.astype(np.int32))
    jax.block_until_ready(carry)
    return carry[0], carry[2], time.process_time() - started

  def predict(self, params: Any, x: np.ndarray) -> np.ndarray:
    """Returns the probabilities of a trained network, [N, C]."""
    logits: Any = self.model.apply({"params": params}, x)
    return np.asarray(jax.nn.softmax(logits))


@functools.cache
def trainer(num_classes: int, with_trusted: bool) -> Trainer:
  """Returns a trainer that is shared, so that each shape is compiled once."""
  return Trainer(num_classes, with_trusted)


def audit_rankings(
  data: NoisyData, with_trusted: bool
) -> Iterator[tuple[str, Ranking]]:
  """Yields the rankings by the audit and by single statistics, all from one run."""
  _, state, seconds = trainer(data.num_classes, with_trusted).train(data)
  started = time.process_time()
  statistics = audit.summarize(state)
  issues = audit.find_label_issues(statistics, data.given)
  total = seconds + time.process_time() - started
  score = np.empty(len(data.given))
  score[issues.index] = issues.score
  name = "audit, 5 trusted a class" if with_trusted else "audit"
  yield name, Ranking(score, issues.num_issues, total)
  if with_trusted:
    weight = -statistics["mean_weight"]
    yield "L2RW mean weight", Ranking(weight, None, seconds)
    yield "L2RW mean score", Ranking(-statistics["mean_score"], None, seconds)
    yield "L2RW zero weights", Ranking(statistics["zero_weight_share"], None, seconds)
  else:
    yield "AUM", Ranking(-statistics["mean_margin"], None, seconds)
    yield "mean loss", Ranking(statistics["mean_loss"], None, seconds)


def cleanlab_ranking(data: NoisyData) -> Ranking:
  """Returns cleanlab's ranking, from out-of-fold probabilities of the same network."""
  from cleanlab import filter as cleanlab_filter
  from cleanlab import rank
  from sklearn import model_selection

  folds = model_selection.StratifiedKFold(
    _FOLDS, shuffle=True, random_state=data.seed
  ).split(data.x, data.given)
  probabilities = np.zeros((len(data.given), data.num_classes))
  network = trainer(data.num_classes, False)
  total = 0.0
  for train, held_out in folds:
    params, _, seconds = network.train(data, train)
    started = time.process_time()
    probabilities[held_out] = network.predict(params, data.x[held_out])
    total += seconds + time.process_time() - started
  started = time.process_time()
  quality = rank.get_label_quality_scores(data.given, probabilities)
  is_issue = cleanlab_filter.find_label_issues(data.given, probabilities, n_jobs=1)
  return Ranking(-quality, int(is_issue.sum()), total + time.process_time() - started)


def neighbors_ranking(data: NoisyData) -> Ranking:
  """Ranks by the share of neighbors with another label, weighted by closeness."""
  from sklearn import neighbors

  started = time.process_time()
  index = neighbors.NearestNeighbors(n_neighbors=_NEIGHBORS).fit(data.x)
  distances, rows = index.kneighbors()  # Excludes the example itself.
  closeness = 1 / np.maximum(distances, 1e-12)
  is_other = data.given[rows] != data.given[:, None]
  score = (closeness * is_other).sum(axis=1) / closeness.sum(axis=1)
  return Ranking(score, None, time.process_time() - started)


def rankings(data: NoisyData, methods: Sequence[str]) -> Iterator[tuple[str, Ranking]]:
  """Yields the rankings of each of the methods, which are entries of `METHODS`."""
  for method in methods:
    if method in ("audit", "audit_trusted"):
      yield from audit_rankings(data, method == "audit_trusted")
    elif method == "cleanlab":
      yield "cleanlab, 5-fold", cleanlab_ranking(data)
    else:
      yield "10 nearest neighbors", neighbors_ranking(data)


def measure(ranking: Ranking, is_wrong: np.ndarray) -> dict[str, Any]:
  """Measures the quality of a ranking.

  Args:
    ranking: the ranking of N labels.
    is_wrong: whether each label is wrong, bool [N].

  Returns:
    The area under the ROC curve; the precision at k, where k is the number of wrong
    labels (1 minus this is the share of wrong labels that are missed if k are flagged);
    the estimated divided by the true number of wrong labels; and the precision and
    recall if the estimated number of labels is flagged.
  """
  from sklearn import metrics

  order = np.argsort(-ranking.score, kind="stable")
  number = int(is_wrong.sum())
  row = {
    "auroc": float(metrics.roc_auc_score(is_wrong, ranking.score)),
    "precision_at_k": float(is_wrong[order[:number]].mean()),
    "missed_share": float(1 - is_wrong[order[:number]].mean()),
    "num_wrong": number,
    "num_issues": ranking.num_issues,
    "estimate_ratio": None,
    "flagged_precision": None,
    "flagged_recall": None,
  }
  if ranking.num_issues is not None:
    hits = int(is_wrong[order[: ranking.num_issues]].sum())
    row["estimate_ratio"] = ranking.num_issues / number
    row["flagged_precision"] = hits / max(ranking.num_issues, 1)
    row["flagged_recall"] = hits / number
  return row | {"seconds": ranking.seconds}


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: a flag is invalid, a data set cannot be read, or cleanlab is missing.
  """
  datasets = settings_lib.choose("datasets", settings.datasets, EPOCHS)
  noises = settings_lib.choose("noises", settings.noises, NOISES)
  methods = settings_lib.choose("methods", settings.methods, METHODS)
  if "cleanlab" in methods:
    try:
      import cleanlab  # noqa: F401
    except ImportError:
      raise base.InputError(
        "--methods=cleanlab needs cleanlab: pip install '.[benchmarks]', or leave it"
        " out of --methods."
      ) from None
  configurations = [
    (name, noise, seed)
    for name in datasets
    for noise in noises
    if is_used(name, noise)
    for seed in range(settings.num_seeds)
  ]
  if not configurations:
    raise base.InputError(
      "no data set in --datasets fits any kind of wrong labels in --noises; human"
      " labels are for cifar10_n only, and the other kinds for the other sets (pair not"
      " for breast_cancer)."
    )
  for first in configurations[:: settings.num_seeds]:
    make_noisy_data(settings, *first)  # Raises before anything is written.
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows = []
  for name, noise, seed in configurations:
    data = make_noisy_data(settings, name, noise, seed)
    for method, ranking in rankings(data, methods):
      rows.append(
        {
          "method": method,
          "dataset": name,
          "noise": noise,
          "seed": seed,
          "num_examples": len(data.given),
          **measure(ranking, data.given != data.true),
          **workdir_lib.run_info(),
        }
      )
    done = ", ".join(
      f"{row['method']} {row['auroc']:.4f}"
      for row in rows
      if (row["dataset"], row["noise"], row["seed"]) == (name, noise, seed)
    )
    print(f"{name} {noise} seed {seed}: {done}", flush=True)
  return runner.report(settings, TABLE, folder, rows, ())


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
