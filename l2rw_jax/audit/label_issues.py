"""Detection of wrong labels from the statistics of one training run.

The score of an example is the log odds of the other labels against the given label g,
smoothed by 1/C. It is computed from the mean predicted distribution p over C classes:

    score = log(sqrt(sum over j != g of (R[j, g] p[j])^2) + 1/C) - log(p[g] + 1/C)  (1)

R[j, g] is the rate at which examples of class j are labeled g, divided by the average
rate over pairs of classes. Mistakes have a direction if, for instance, 3 is often
labeled 8 but hardly ever labeled 1. If the network then assigns probability to a class
whose examples never get the given label by mistake, this is not evidence of a wrong
label, whereas probability assigned to a class whose examples often get it by mistake is
strong evidence. This is Bayes' rule, with R as the prior of the mistake. The Euclidean
norm is a compromise between the maximum over the other labels, which ranks best if
mistakes have a direction, and the sum over the other labels, which ranks best if
mistakes have no direction and classes resemble each other. Adding 1/C mixes in a
uniform distribution: tiny probabilities (such as 1e-3 and 1e-6) then have about the
same effect, and only large ones are distinguished.

R is estimated from the same distributions. Let t[c] be the mean of p[c] over the
examples labeled c (the per-class thresholds of confident learning), and let the most
likely class of an example be c* = argmax over c of p[c] - t[c]; in a tie (up to 1e-6),
c* is the given label if possible. Q[j, g] counts the examples with c* = j and the label
g. If c* is not the given label, the example is counted only if it is clear,
p[c*] >= 0.8 t[c*]. Q also counts examples that are only hard for the network. But
classes that resemble each other (pullovers and coats) are confused in both directions
about equally often. The part that is common to both directions is
S[j, g] = min(Q[j, g], Q[g, j]); what exceeds the mean of S over all pairs is therefore
subtracted. On the diagonal, Z is Q. Off the diagonal,

    Z[j, g] = Q[j, g] - max(S[j, g] - mean of S, 0)
    M[j, g] = sum of Z[j, :]  *  share of Z off the diagonal / (C - 1)              (2)
    v = max(sum of (Q - Q^T)^2 - (Q + Q^T) - S^2, 0) / (2 * sum of M^2)
    R[j, g] = (1 + v Z[j, g]) / (1 + v M[j, g])                                     (3)

where both sums are over the entries off the diagonal, and R is 1 on the diagonal. M is
the expected value of Z if mistakes have no direction. v is the variance of the rates
Z / M: the squared difference of Q and its transpose, minus the variance of counts and
minus S^2, which allows for the asymmetry of classes that resemble each other. R is the
posterior mean of a rate under a gamma prior of mean 1 and variance v. If the counts
show no direction, v is 0 and R is 1. Mistakes that are equally frequent in both
directions cannot be distinguished from resemblance.

The number of issues is at most the number of examples whose label is not c*, and
usually less: some of these examples are only hard, and if all labels are correct, all
of them are. If a label is wrong, the network is nearly as sure of c* as it is on
examples that are labeled c*; on a hard example, the network is undecided. This is
measured by a margin m: for an example labeled c*, m is p[c*] minus the largest other
probability; for an example with another label g, m is p[c*] - p[g]. An example is sure
if m is at least 0.4 times the median m of the examples with the same c* that are
labeled c*. A negative median counts as 0. If no example with this c* is labeled c*, the
median is over all examples that are labeled with their c*.

W[j, g] counts the sure examples off the diagonal. Each row j is divided by the share of
sure examples among those with c* = j that are labeled j (among all those that are
labeled with their c*, if there are none), to make up for the wrong labels of examples
that are not sure. A share below 1/2, which occurs only if the network has not learned
the class, counts as 1/2. Even sure examples are confused in both directions if classes
resemble each other. E(W) is therefore the sum of W minus the part of min(W, W^T) that
exceeds its median over the pairs; nothing is subtracted for a pair in which one entry
is more than 2.5 times the other. Then

    x = E(W) / number of examples whose label is not c*
    o = (1.5 x / (1 - x))^3                                                         (4)
    number of issues = E(W) + max(E(Q) - E(W), 0) o / (1 + o)

where Q now counts all examples, even those that are neither clear nor sure. The idea is
that if most examples whose label is not c* are sure, most of the other labels are
wrong, too; and if few are sure, the others are mostly hard examples. If x >= 1, all
examples whose label is not c* are counted.

Confident learning counts the examples with p[c] >= t[c] for some c other than the given
label. Probabilities on training examples, unlike those on held-out examples, are biased
towards the given label, so that few wrong labels pass that test. The bias is about the
same for all examples and does not change the order of p[c] - t[c], until the network
has memorized the wrong labels. Memorized wrong labels are not counted, so the number of
issues is too low for small tabular data sets.

A meta set has an effect only through training: in a run of L2RW the network learns less
from wrong labels, so that its predictions may rank labels better. The scores of L2RW
are reported, but they are not part of equation (1), because a weighted sum of the two
scores ranked labels worse.

References:
  Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset
  Labels", Journal of Artificial Intelligence Research 70, 2021 (thresholds, counts).
  Pleiss et al., NeurIPS 2020 (the margin during training as evidence).
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.audit import statistics as statistics_lib

_PROBABILITIES = "mean_probabilities"
# These constants and the form of the equations were chosen on examples and with seeds
# that results/label_issues does not use.
_CLEAR = 0.8
_SURE, _EVEN, _ODDS, _POWER = 0.4, 2.5, 1.5, 3
# Probabilities that differ by less are equal: means of float32 are not exact.
_TIE = 1e-6
# Copies of distributions have at most this many numbers, because the distributions of
# all examples may take half of the memory.
_BLOCK = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class LabelIssues:
  """All N examples, the most suspicious first.

  Attributes:
    index: row of each example in the training set, int64 [N].
    given: the given label of each example, int64 [N].
    suggested: the other class j with the largest R[j, g] p[j], int64 [N]; the given
      label g if the example was never seen. It can differ from c*.
    score: equation (1), float64 [N]; a higher score is more suspicious. It is NaN for
      examples that were never seen, which come last.
    is_issue: whether the label is estimated to be wrong, bool [N]: true for the first
      `num_issues` examples.
    num_issues: estimated number of wrong labels, equation (4), at most the number of
      examples off the diagonal of `confusion`.
    confusion: number of examples of each most likely class (row) with each given label
      (column), int64 [C, C].
    statistics: the result of `summarize`, with every array in this order. A statistic
      that no example has is left out.
  """

  index: np.ndarray
  given: np.ndarray
  suggested: np.ndarray
  score: np.ndarray
  is_issue: np.ndarray
  num_issues: int
  confusion: np.ndarray
  statistics: dict[str, np.ndarray]

  def to_cleanlab(self) -> dict[str, np.ndarray]:
    """The arguments of cleanlab's functions, in the order of the training set.

    Returns:
      "labels" [N]; "pred_probs" [N, C], the mean predicted distributions, for
      `cleanlab.Datalab.find_issues` and `cleanlab.filter.find_label_issues`; and
      "label_quality" [N] from 0 to 1 as in cleanlab, where lower is more suspicious:
      the probability of the label if the score is the log odds against it. An example
      that was never seen has the uniform distribution and the quality 0.5.
    """
    order = np.argsort(self.index)
    probabilities = self.statistics[_PROBABILITIES][order]
    is_seen = np.isfinite(self.score[order])
    probabilities[~is_seen] = 1 / probabilities.shape[1]
    # Rounding leaves sums of 1 + 1e-7, about which cleanlab would warn.
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    quality = 1 / (1 + np.exp(np.where(is_seen, self.score[order], 0)))
    return {
      "labels": self.given[order],
      "pred_probs": probabilities,
      "label_quality": quality,
    }


def find_label_issues(statistics: Any, labels: Any) -> LabelIssues:
  """Ranks the examples of a training set by how likely their labels are to be wrong.

  Args:
    statistics: the `State` of a run, or the result of `summarize`: a dictionary with
      "mean_probabilities" [N, C] and any other arrays [N]. Examples whose "seen" is 0
      were never seen; without "seen", these are the rows of NaN. All other arrays are
      only sorted. Half precision becomes float32.
    labels: the given labels, integers [N] from 0 to C - 1, also as booleans or floats.

  Returns:
    A `LabelIssues`.

  Raises:
    InputError: "mean_probabilities" is missing, the shapes do not match, there are
      fewer than two classes, a label is not an integer or not one of the C classes, no
      example was ever seen, an array is masked, or a distribution has a negative entry
      or does not sum to 1.
    FloatingPointError: a distribution is not finite although its example was seen.

  >>> state = statistics_lib.init(num_examples=4, num_classes=2)
  >>> p = np.array([[.9, .1], [.8, .2], [.9, .1], [.2, .8]])
  >>> labels = np.array([0, 0, 1, 1])
  >>> state = statistics_lib.update(state, np.arange(4), np.log(p), labels)
  >>> issues = find_label_issues(state, labels)
  >>> print(issues.index, issues.suggested, issues.num_issues)
  [2 1 3 0] [0 1 0 1] 1
  """
  if isinstance(statistics, statistics_lib.State):
    statistics = statistics_lib.summarize(statistics)
  statistics, labels = _check(statistics, labels)
  probabilities = statistics[_PROBABILITIES]
  size, num_classes = probabilities.shape
  is_seen = _is_seen(statistics)
  # A mask would copy the distributions even if it selects all of them.
  chosen = slice(None) if is_seen.all() else is_seen
  p, given = probabilities[chosen], labels[chosen]

  likely, is_clear = _likely_classes(p, given)
  confusion = _count(likely, given, num_classes)
  is_counted = is_clear | (likely == given)
  rates = relative_rates(_count(likely[is_counted], given[is_counted], num_classes))
  odds = np.empty(len(given))
  best = np.empty(len(given), np.int64)
  rates_of_label = np.ascontiguousarray(rates.T)
  for block in blocks(p):
    rows, label = np.arange(len(p[block])), given[block]
    others = p[block] * rates_of_label[label]
    others[rows, label] = 0
    odds[block] = (np.linalg.norm(others, axis=1) + 1 / num_classes) / (
      p[block][rows, label] + 1 / num_classes
    )
    others[rows, label] = -1
    best[block] = others.argmax(axis=1)
  score, suggested = np.full(size, np.nan), labels.copy()
  score[is_seen], suggested[is_seen] = np.log(odds), best

  order = np.argsort(-score, kind="stable")  # NaN is sorted last.
  num_issues = _number_of_issues(p, given, likely)
  return LabelIssues(
    index=order,
    given=labels[order],
    suggested=suggested[order],
    score=score[order],
    is_issue=np.arange(size) < num_issues,
    num_issues=num_issues,
    confusion=confusion,
    statistics={
      name: x[order]
      for name, x in statistics.items()
      if not (np.issubdtype(x.dtype, np.floating) and np.isnan(x).all())
    },
  )


def relative_rates(confusion: Any) -> np.ndarray:
  """The rate of each mistake relative to an average mistake, equation (3).

  Args:
    confusion: number of examples of each class (row) with each label (column),
      [C, C].

  Returns:
    R, float64 [C, C]. It is 1 on the diagonal. It is 1 everywhere if chance and classes
    that resemble each other explain the asymmetry of the matrix.

  >>> print(relative_rates([[90, 5, 5], [6, 90, 4], [5, 5, 90]]))
  [[1. 1. 1.]
   [1. 1. 1.]
   [1. 1. 1.]]
  >>> print(relative_rates([[90, 10, 0], [0, 90, 10], [10, 0, 90]]).round(1))
  [[1.  1.9 0.1]
   [0.1 1.  1.9]
   [1.9 0.1 1. ]]
  """
  counts = np.asarray(confusion, np.float64)
  is_mistake = ~np.eye(len(counts), dtype=bool)
  common = np.minimum(counts, counts.T)
  excess = np.maximum(common - common[is_mistake].mean(), 0)
  directed = counts - np.where(is_mistake, excess, 0)
  share = directed[is_mistake].sum() / max(float(directed.sum()), 1.0)
  expected = directed.sum(axis=1, keepdims=True) * share / (len(counts) - 1)
  expected = np.where(is_mistake, expected, 0)
  direction = (counts - counts.T) ** 2 - (counts + counts.T) - common**2
  scale = max(float(2 * (expected**2).sum()), float(np.finfo(np.float64).tiny))
  variance = max(float(direction[is_mistake].sum()), 0.0) / scale
  rates = (1 + variance * directed) / (1 + variance * expected)
  return np.where(is_mistake, rates, 1)


def _number_of_issues(p, given, likely):
  """The estimated number of wrong labels, equation (4)."""
  num_classes = p.shape[1]
  agrees = likely == given
  rows = np.arange(len(given))
  other = p[rows, given]
  for block in blocks(p):
    others = p[block].copy()
    others[np.arange(len(others)), likely[block]] = -np.inf
    other[block] = np.where(agrees[block], others.max(axis=1), other[block])
  margin = p[rows, likely] - other
  # These are used if no example shows how sure the network is of a class.
  least_of_all, share_of_all = _sure_margin(margin[agrees])
  sure = np.zeros((num_classes, num_classes))
  classes = np.unique(likely)
  members = base.rows_by_class(likely, classes)
  for c, rows in zip(classes.tolist(), members, strict=True):
    margins, agree = margin[rows], agrees[rows]
    least, share = least_of_all, share_of_all
    if agree.any():
      least, share = _sure_margin(margins[agree])
    labels = given[rows[(margins >= least) & ~agree]]
    sure[c] = np.bincount(labels, minlength=num_classes) / share
  everything = _count(likely[~agrees], given[~agrees], num_classes)
  number = everything.sum()
  least, most = _without_resemblance(sure), _without_resemblance(everything)
  if least >= number:  # This is also the case if no label disagrees.
    return int(number)
  odds = (_ODDS * least / (number - least)) ** _POWER
  return round(least + max(most - least, 0) * odds / (1 + odds))


def _sure_margin(margins):
  """The least margin of a sure example, and the share of sure ones, at least 1/2."""
  if not len(margins):
    return 0, 1
  least = _SURE * max(np.median(margins), 0)
  # If the median is above 0, the share is a half or more. If not, the network has not
  # learned the class of these examples.
  return least, max((margins >= least).mean(), 0.5)


def blocks(p: np.ndarray) -> Iterator[slice]:
  """Slices of consecutive rows of `p`; a copy of one slice takes little memory."""
  size = max(1, _BLOCK // p.shape[1])
  return (slice(start, start + size) for start in range(0, len(p), size))


def _without_resemblance(counts):
  """The sum off the diagonal, without the part that both directions have in common."""
  is_mistake = ~np.eye(len(counts), dtype=bool)
  common = np.minimum(counts, counts.T)
  excess = np.maximum(common - np.median(common[is_mistake]), 0)
  is_even = is_mistake & (np.maximum(counts, counts.T) <= _EVEN * common)
  return float(counts[is_mistake].sum() - excess[is_even].sum())


def _likely_classes(p, given):
  """Each example's most likely class c*, and whether it is clear."""
  # Nothing is known about a class without examples, so no example is assigned to it.
  thresholds = np.full(p.shape[1], np.inf)
  classes = np.unique(given)
  members = base.rows_by_class(given, classes)
  for c, rows in zip(classes.tolist(), members, strict=True):
    thresholds[c] = p[rows, c].mean(dtype=np.float64)
  likely = np.empty(len(given), np.int64)
  for block in blocks(p):
    excess, labels = p[block] - thresholds, given[block]
    # A class that is only as likely as the given label does not contradict it.
    is_tie = excess[np.arange(len(labels)), labels] >= excess.max(axis=1) - _TIE
    likely[block] = np.where(is_tie, labels, np.argmax(excess, axis=1))
  probability = np.take_along_axis(p, likely[:, None], axis=1)[:, 0]
  return likely, probability >= _CLEAR * thresholds[likely]


def _count(likely, given, num_classes):
  """Examples by most likely class (row) and given label (column), int64 [C, C]."""
  counts = np.zeros((num_classes, num_classes), np.int64)
  np.add.at(counts, (likely, given), 1)
  return counts


def _is_seen(statistics):
  """Which examples were seen, bool [N].

  Without "seen", these are the examples whose probabilities are not all NaN. A broken
  run can have NaN in examples that were seen, too.
  """
  if "seen" in statistics:
    return statistics["seen"] > 0
  return ~np.isnan(statistics[_PROBABILITIES]).all(axis=1)


def _check(statistics, labels):
  """The statistics as arrays and the labels as int64, checked against each other."""
  if _PROBABILITIES not in statistics:
    raise base.InputError(
      f"statistics has no {_PROBABILITIES!r}; pass the state, or what audit.summarize"
      " returns."
    )
  for name, x in (("labels", labels), *statistics.items()):
    base.refuse_mask(f"find_label_issues: {name}", x)
  statistics = {name: _widened(np.asarray(x)) for name, x in statistics.items()}
  labels = np.asarray(labels)
  shape = statistics[_PROBABILITIES].shape
  if len(shape) != 2 or shape[1] < 2 or labels.shape != shape[:1]:
    raise base.InputError(
      f"labels must have shape [N], and {_PROBABILITIES} [N, C] with C at least 2; got"
      f" {labels.shape} and {shape}."
    )
  # `data.examples.from_arrays` takes such labels, too.
  is_whole = labels.dtype.kind in "biu" or (
    labels.dtype.kind == "f" and bool((labels == np.rint(labels)).all())
  )
  if not is_whole:
    raise base.InputError(
      f"labels must be integers; got {labels.dtype}: number the classes from 0 to"
      f" {shape[1] - 1}."
    )
  for name, x in statistics.items():
    if x.shape[:1] != labels.shape:
      raise base.InputError(
        f"the statistic {name} has shape {x.shape}, but there are {len(labels)} labels."
      )
  wrong = np.flatnonzero((labels < 0) | (labels >= shape[1]))
  if len(wrong):
    raise base.InputError(
      f"{len(wrong)} labels are not one of the {shape[1]} classes; the first is"
      f" {labels[wrong[0]]} at index {wrong[0]}."
    )
  labels = labels.astype(np.int64)
  p = statistics[_PROBABILITIES]
  if not np.issubdtype(p.dtype, np.floating):  # One-hot predictions.
    p = statistics[_PROBABILITIES] = p.astype(np.float64)
  is_seen = _is_seen(statistics)
  if not is_seen.any():
    raise base.InputError(
      "no example was ever seen: update the state during training before you rank."
    )
  bad = np.flatnonzero(is_seen & ~np.isfinite(p).all(axis=1))
  if len(bad):
    raise FloatingPointError(
      f"{_PROBABILITIES} of {len(bad)} examples are not finite; the first is at index"
      f" {bad[0]}. If they are from a run, its logits or losses were NaN or infinite:"
      " lower the learning rate."
    )
  is_distribution = (p >= 0).all(axis=1) & (abs(p.sum(axis=1) - 1) < 0.05)
  bad = np.flatnonzero(is_seen & ~is_distribution)
  if len(bad):
    raise base.InputError(
      f"{len(bad)} rows of {_PROBABILITIES} are not distributions (numbers of at least"
      f" 0 whose sum is 1); the first is at index {bad[0]}: {p[bad[0]].tolist()}."
      " If they are logits, apply softmax."
    )
  return statistics, labels


def _widened(x):
  """`x`, in float32 if it is in half precision, in which a mean is not accurate."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  return x.astype(base.accumulator_dtype(x.dtype), copy=False)
