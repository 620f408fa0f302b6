"""The ranking of label issues: compared with its equations in loops, and on digits."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics

from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.audit import label_issues
from l2rw_jax.audit import page
from l2rw_jax.data import label_noise
from l2rw_jax.data import sources
from l2rw_jax.models import mlp


def _problem(size=60, num_classes=4, seed=0, unseen=(3, 17)):
  """Distributions that favor the true class (NaN in the rows `unseen`), and labels.

  A third of the labels are wrong.
  """
  rng = np.random.default_rng(seed)
  true = rng.integers(num_classes, size=size)
  p = rng.dirichlet(np.ones(num_classes), size=size)
  p[np.arange(size), true] += rng.random(size)
  p /= p.sum(axis=1, keepdims=True)
  given = np.where(rng.random(size) < 1 / 3, (true + 1) % num_classes, true)
  p[list(unseen)] = np.nan
  return p, given


def _problem_with_wrong_class(seed):
  """All examples with the label 3 have little probability of class 3."""
  p, given = _problem(seed=seed)
  others = np.random.default_rng(seed).integers(3, size=len(given))
  given = np.where(given == 3, others, given)
  given[np.argsort(p[:, 3])[:5]] = 3  # NaN is sorted last.
  return p, given


def _problem_with_unlearned_class(seed):
  """Class 3 is hardly ever the most probable one."""
  p, given = _problem(seed=seed)
  p = p * [1, 1, 1, 0.2]
  return p / p.sum(axis=1, keepdims=True), given


def _reference(p, given):
  """Equations (1) to (4) of `label_issues` in loops: scores [N], number of issues."""
  size, num_classes = p.shape
  rows = [i for i in range(size) if np.isfinite(p[i]).all()]
  classes = range(num_classes)
  t = [np.mean([p[i, c] for i in rows if given[i] == c]) for c in classes]
  likely = {i: max(classes, key=lambda c, i=i: p[i, c] - t[c]) for i in rows}
  pairs = [(j, g) for j in classes for g in classes if j != g]
  q = np.zeros((num_classes, num_classes))
  for i, j in likely.items():
    if j == given[i] or p[i, j] >= 0.8 * t[j]:
      q[j, given[i]] += 1
  s = {(j, g): min(q[j, g], q[g, j]) for j, g in pairs}
  mean = sum(s.values()) / len(pairs)
  z = {x: q[x] - max(s[x] - mean, 0) for x in pairs}
  row = [q[j, j] + sum(z[j, g] for g in classes if g != j) for j in classes]
  share = sum(z.values()) / sum(row)
  m = {(j, g): row[j] * share / (num_classes - 1) for j, g in pairs}
  v = sum((q[j, g] - q[g, j]) ** 2 - q[j, g] - q[g, j] - s[j, g] ** 2 for j, g in pairs)
  v = max(v / sum(2 * m[x] ** 2 for x in pairs), 0)
  r = {x: (1 + v * z[x]) / (1 + v * m[x]) for x in pairs}
  score = np.full(size, np.nan)
  for i in rows:
    g = given[i]
    others = sum((r[j, g] * p[i, j]) ** 2 for j in classes if j != g) ** 0.5
    score[i] = np.log(others + 1 / num_classes) - np.log(p[i, g] + 1 / num_classes)
  return score, _reference_count(p, given, likely)


def _reference_count(p, given, likely):
  """Equation (4): the number of issues."""
  classes = range(p.shape[1])
  pairs = [(j, g) for j in classes for g in classes if j != g]

  def margin(i):
    rivals = [given[i]] if likely[i] != given[i] else set(classes) - {given[i]}
    return p[i, likely[i]] - max(p[i, c] for c in rivals)

  def without_resemblance(counts):
    common = {(j, g): min(counts[j, g], counts[g, j]) for j, g in pairs}
    number = sum(counts.values())
    for j, g in pairs:
      if max(counts[j, g], counts[g, j]) <= 2.5 * common[j, g]:
        number -= max(common[j, g] - np.median(list(common.values())), 0)
    return number

  all_counts = {
    (j, g): sum(likely[i] == j and given[i] == g for i in likely) for j, g in pairs
  }
  sure_counts = {}
  for j, g in pairs:
    agreeing = [i for i in likely if likely[i] == given[i]]
    right = [margin(i) for i in agreeing if given[i] == j]
    right = right or [margin(i) for i in agreeing]
    threshold = 0.4 * max(np.median(right), 0)
    share = max(np.mean([m >= threshold for m in right]), 0.5)
    wrong = [i for i in likely if (likely[i], given[i]) == (j, g)]
    sure_counts[j, g] = sum(margin(i) >= threshold for i in wrong) / share
  total = sum(all_counts.values())
  least, most = without_resemblance(sure_counts), without_resemblance(all_counts)
  x = least / total
  if x >= 1:
    return total
  odds = (1.5 * x / (1 - x)) ** 3
  return round(least + max(most - least, 0) * odds / (1 + odds))


# In each case, a changed constant of the equations would change the results, or one of
# the two exceptions applies: a negative median margin, or a share below 1/2.
@pytest.mark.parametrize(
  ("make_problem", "seed"),
  [
    *((_problem, seed) for seed in (3, 6, 9)),
    *((_problem_with_wrong_class, seed) for seed in (1, 8)),
    *((_problem_with_unlearned_class, seed) for seed in (8, 9)),
  ],
)
def test_equations(make_problem, seed):
  p, given = make_problem(seed=seed)
  issues = audit.find_label_issues({"mean_probabilities": p}, given)
  score, number = _reference(p, given)
  np.testing.assert_allclose(issues.score, score[issues.index], rtol=1e-12)
  assert issues.num_issues == number == issues.is_issue.sum()
  assert issues.confusion.sum() == 58  # Of 60 examples, two were never seen.
  assert number <= issues.confusion.sum() - np.trace(issues.confusion)


def test_the_worst_come_first_and_the_unseen_last():
  p, given = _problem()
  statistics = {"mean_probabilities": p, "mean_loss": np.arange(60.0)}
  statistics["mean_weight"] = np.full(60, np.nan)  # No weight was ever given.
  issues = audit.find_label_issues(statistics, given)
  assert sorted(issues.index) == list(range(60))
  assert (np.diff(issues.score[:58]) <= 0).all() and np.isnan(issues.score[58:]).all()
  assert set(issues.index[58:]) == {3, 17} and not issues.is_issue[58:].any()
  np.testing.assert_array_equal(issues.given, given[issues.index])
  np.testing.assert_array_equal(issues.suggested[58:], issues.given[58:])
  assert (issues.suggested[:58] != issues.given[:58]).all()
  assert set(issues.statistics) == {"mean_probabilities", "mean_loss"}
  np.testing.assert_array_equal(issues.statistics["mean_loss"], issues.index)
  np.testing.assert_array_equal(
    issues.statistics["mean_probabilities"], p[issues.index]
  )


def test_names_of_classes_and_order_of_examples_do_not_matter():
  p, given = _problem(unseen=())
  issues = audit.find_label_issues({"mean_probabilities": p}, given)
  rng = np.random.default_rng(0)
  rows, classes = rng.permutation(60), rng.permutation(4)
  renamed = np.argsort(classes)
  moved = audit.find_label_issues(
    {"mean_probabilities": p[rows][:, classes]}, renamed[given[rows]]
  )
  np.testing.assert_array_equal(rows[moved.index], issues.index)
  np.testing.assert_allclose(moved.score, issues.score, rtol=1e-12)
  np.testing.assert_array_equal(classes[moved.suggested], issues.suggested)


def test_the_direction_of_mistakes_decides_between_equal_probabilities():
  # Of 40 examples of each class, 10 of class 0 are labeled 1, and none of class 2 is,
  # except for two examples, whose probabilities are set below.
  true = np.repeat(np.arange(3), 40)
  given = true.copy()
  given[:10] = 1
  p = np.full((120, 3), 0.05)
  p[np.arange(120), true] = 0.9
  p[-1], given[-1] = [0.1, 0.45, 0.45], 1  # Equally likely 1 and 2.
  p[-2], given[-2] = [0.45, 0.45, 0.1], 1  # Equally likely 1 and 0.
  issues = audit.find_label_issues({"mean_probabilities": p}, given)
  score = issues.score[np.argsort(issues.index)]
  assert score[-2] > score[-1] + 0.3
  assert set(issues.index[:10]) == set(range(10))
  assert (issues.suggested[:10] == 0).all()


def test_relative_rates_of_even_directed_and_no_mistakes():
  rng = np.random.default_rng(0)
  even = rng.poisson(8, size=(6, 6))
  np.fill_diagonal(even, 200)
  assert abs(label_issues.relative_rates(even) - 1).max() < 0.4
  directed = np.diag(np.full(4, 60)) + np.roll(np.diag(np.full(4, 30)), 1, axis=1)
  rates = label_issues.relative_rates(directed)
  off = ~np.eye(4, dtype=bool)
  # Equation (3) with Z = 30, M = 10 and v = 2.9 is (1 + 2.9 * 30) / (1 + 2.9 * 10).
  np.testing.assert_allclose(rates[off][directed[off] > 0], 88 / 30, rtol=1e-12)
  assert (rates[off][directed[off] == 0] < 0.1).all()
  np.testing.assert_array_equal(label_issues.relative_rates(np.diag([5, 0, 7])), 1)
  # With two classes, the rates show which one is mistaken for the other.
  uneven = label_issues.relative_rates([[50, 40], [1, 90]])
  assert uneven[0, 1] > 1 > uneven[1, 0] and uneven[0, 0] == uneven[1, 1] == 1


def test_examples_that_are_merely_hard_do_not_count():
  # Of 3 classes with 100 examples each, 0 and 1 look alike: the network is undecided
  # about 40 of their examples, and takes half of these for the other class.
  true = np.repeat(np.arange(3), 100)
  p = np.full((300, 3), 0.05)
  p[np.arange(300), true] = 0.9
  hard = np.r_[0:20, 100:120]
  p[hard] = [0.5, 0.45, 0.05]
  p[hard[::2]] = [0.45, 0.5, 0.05]
  count = audit.find_label_issues({"mean_probabilities": p}, true).num_issues
  assert count <= 1
  given = true.copy()
  given[200:230] = np.arange(30) % 2  # The network is sure that these are wrong.
  count = audit.find_label_issues({"mean_probabilities": p}, given).num_issues
  assert 28 <= count <= 40


def test_classes_without_examples_and_a_single_class():
  p, given = _problem(num_classes=3, unseen=())
  p = np.concatenate([0.99 * p, np.full((60, 1), 0.01)], axis=1)
  issues = audit.find_label_issues({"mean_probabilities": p}, given)
  assert np.isfinite(issues.score).all() and issues.confusion[3].sum() == 0
  one = audit.find_label_issues({"mean_probabilities": p}, np.zeros(60, int))
  assert one.num_issues == 0 and np.isfinite(one.score).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_classes", [3, 10])
def test_equal_predictions_give_no_issues(dtype, num_classes):
  # The mean of 1000 numbers 1/C is not exactly 1/C.
  labels = np.random.default_rng(0).integers(0, num_classes, 1000)
  p = np.full((1000, num_classes), 1 / num_classes, dtype)
  issues = audit.find_label_issues({"mean_probabilities": p}, labels)
  assert issues.num_issues == 0
  counts = np.bincount(labels, minlength=num_classes)
  np.testing.assert_array_equal(issues.confusion, np.diag(counts))


def test_half_precision_gives_the_same_issues_as_float32():
  # The mean of many probabilities in bfloat16 would be wrong.
  rng = np.random.default_rng(0)
  true = np.repeat(np.arange(3), [4000, 400, 60])
  p = 0.3 * rng.dirichlet([1] * 3, size=len(true)) + 0.7 * np.eye(3)[true]
  given = np.where(rng.random(len(true)) < 0.05, (true + 1) % 3, true)
  half = p.astype(jnp.bfloat16)
  statistics = {
    "mean_probabilities": half,
    "unknown": np.full(len(true), np.nan, half.dtype),
  }
  actual = audit.find_label_issues(statistics, given)
  expected = audit.find_label_issues(
    {"mean_probabilities": half.astype(np.float64)}, given
  )
  assert actual.num_issues == expected.num_issues > 0
  np.testing.assert_array_equal(actual.confusion, expected.confusion)
  assert "unknown" not in actual.statistics  # No example has it.


@pytest.mark.parametrize("row", [[0.0, 0.0], [1.2, -0.2], [0.5, 0.6]])
def test_rows_that_are_not_distributions_are_refused(row):
  p = np.array([[0.5, 0.5], row])
  with pytest.raises(base.InputError, match=r"not distributions.*at index 1"):
    audit.find_label_issues({"mean_probabilities": p}, np.array([0, 1]))


def test_arrays_for_cleanlab():
  p, given = _problem()
  issues = audit.find_label_issues({"mean_probabilities": p}, given)
  result = issues.to_cleanlab()
  np.testing.assert_array_equal(result["labels"], given)
  is_seen = np.isfinite(p).all(axis=1)
  np.testing.assert_allclose(result["pred_probs"][is_seen], p[is_seen], rtol=1e-12)
  np.testing.assert_array_equal(result["pred_probs"][[3, 17]], 0.25)
  np.testing.assert_allclose(result["pred_probs"].sum(axis=1), 1, rtol=1e-15)
  quality = result["label_quality"]
  assert ((quality > 0) & (quality < 1)).all() and (quality[[3, 17]] == 0.5).all()
  np.testing.assert_array_equal(
    np.argsort(quality[is_seen], kind="stable"),
    np.argsort(-_reference(p, given)[0][is_seen], kind="stable"),
  )


def test_cleanlab_accepts_the_arrays():
  cleanlab_filter = pytest.importorskip("cleanlab.filter")
  p, given = _problem(size=400)
  result = audit.find_label_issues({"mean_probabilities": p}, given).to_cleanlab()
  is_issue = cleanlab_filter.find_label_issues(
    result["labels"], result["pred_probs"], n_jobs=1
  )
  assert result["label_quality"][is_issue].mean() < result["label_quality"].mean()


def test_invalid_arguments_are_refused():
  p, given = _problem(unseen=())
  find = audit.find_label_issues
  with pytest.raises(base.InputError, match="no 'mean_probabilities'"):
    find({}, given)
  with pytest.raises(base.InputError, match=r"labels must have shape \[N\]"):
    find({"mean_probabilities": p}, given[:-1])
  for labels in (given + 0.5, np.where(given == 0, np.nan, given), given.astype(str)):
    with pytest.raises(base.InputError, match=r"labels must be integers; .* from 0 "):
      find({"mean_probabilities": p}, labels)
  with pytest.raises(base.InputError, match=r"1 labels .* first is 4 at index 5"):
    find({"mean_probabilities": p}, np.where(np.arange(60) == 5, 4, given))
  with pytest.raises(base.InputError, match="statistic mean_loss has shape"):
    find({"mean_probabilities": p, "mean_loss": np.zeros(59)}, given)
  with pytest.raises(base.InputError, match="no example was ever seen"):
    find(audit.init(60, 4), given)
  broken = {"mean_probabilities": np.where(p > 0, np.nan, p), "seen": np.ones(60)}
  with pytest.raises(FloatingPointError, match="lower the learning rate"):
    find(broken, given)


def test_labels_may_be_whole_floats_lists_and_booleans():
  p, given = _problem(unseen=())
  find = audit.find_label_issues
  for labels in (given.astype(float), given.tolist(), given.astype(">i2")):
    issues = find({"mean_probabilities": p}, labels)
    np.testing.assert_array_equal(issues.given, given[issues.index])
  two_classes = {"mean_probabilities": p[:, :2] / p[:, :2].sum(1)[:, None]}
  np.testing.assert_array_equal(
    find(two_classes, given > 1).score, find(two_classes, (given > 1).astype(int)).score
  )


@functools.cache
def _digits():
  source = sources.load("digits", "train")
  images = source.images.reshape(len(source.labels), -1).astype(np.float32) / 255
  model, optimizer = mlp.MLP(10, hidden=(256,)), optax.sgd(0.1, momentum=0.9)

  def step(carry, batch):
    params, opt_state, state = carry

    def loss(params):
      logits = model.apply({"params": params}, batch["image"])
      return losses.softmax_cross_entropy(logits, batch["label"]).mean(), logits

    grads, logits = jax.grad(loss, has_aux=True)(params)
    state = audit.update(state, batch["index"], logits, batch["label"])
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, state), None

  def run(labels, rows):
    params = model.init(jax.random.key(0), images[:1])["params"]
    carry = (params, optimizer.init(params), audit.init(len(images), 10))
    batches = {"image": jnp.asarray(images)[rows], "label": labels[rows], "index": rows}
    return jax.lax.scan(step, carry, batches)[0][2]

  return source.labels, jax.jit(run)


@pytest.mark.parametrize(
  ("noise", "auroc", "precision", "tolerance", "gain"),
  [("symmetric", 0.995, 0.93, 0.15, -0.001), ("pair", 0.93, 0.83, 0.3, 0.1)],
)
def test_one_run_on_digits_finds_the_wrong_labels(
  noise, auroc, precision, tolerance, gain
):
  true, run = _digits()
  rng = np.random.default_rng(7)
  if noise == "symmetric":
    given = label_noise.uniform_flip(true, fraction=0.2, num_classes=10, rng=rng)
  else:
    pairs = {c: (c + 1) % 10 for c in range(10)}
    given = label_noise.resample(true, label_noise.pair_matrix(10, 0.4, pairs), rng=rng)
  epochs = [rng.permutation(len(true))[:1200].reshape(12, 100) for _ in range(16)]
  rows = np.concatenate(epochs).astype(np.int32)
  state = run(given, rows)
  issues = audit.find_label_issues(state, given)
  is_wrong = (given != true)[issues.index]
  number = is_wrong.sum()
  assert metrics.roc_auc_score(is_wrong, issues.score) > auroc
  assert is_wrong[:number].mean() > precision
  assert abs(issues.num_issues / number - 1) < tolerance
  is_right = issues.suggested == true[issues.index]
  assert is_right[is_wrong].mean() > 0.9
  # The score is as good as a single statistic if all mistakes are equally likely, and
  # much better if each class is mistaken for one particular other class.
  single = metrics.roc_auc_score(is_wrong, -issues.statistics["mean_margin"])
  assert metrics.roc_auc_score(is_wrong, issues.score) > single + gain


def test_memory_for_many_examples_is_that_of_the_result():
  # The result contains one copy of p, in the order of suspicion; the page needs none.
  size, num_classes = 20_000, 100
  rng = np.random.default_rng(0)
  labels = rng.integers(num_classes, size=size)
  p = rng.random((size, num_classes))
  p /= p.sum(axis=1, keepdims=True)
  tracemalloc.start()
  issues = audit.find_label_issues({"mean_probabilities": p}, labels)
  _, peak = tracemalloc.get_traced_memory()
  assert peak < 1.8 * p.nbytes
  assert sorted(issues.index.tolist()) == list(range(size))
  tracemalloc.reset_peak()
  before, _ = tracemalloc.get_traced_memory()
  names = [str(c) for c in range(num_classes)]
  page.build(issues, names, [""] * size)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak - before < 1.5 * p.nbytes


def test_one_hot_integers_are_distributions():
  p = np.eye(3, dtype=np.int32)[[0, 0, 1, 1, 2, 2, 2]]
  labels = np.array([0, 0, 1, 1, 2, 2, 0])
  issues = audit.find_label_issues({"mean_probabilities": p}, labels)
  expected = audit.find_label_issues({"mean_probabilities": p.astype(float)}, labels)
  assert issues.index[0] == 6 and issues.suggested[0] == 2
  np.testing.assert_array_equal(issues.score, expected.score)
  np.testing.assert_array_equal(
    issues.to_cleanlab()["pred_probs"], expected.to_cleanlab()["pred_probs"]
  )
