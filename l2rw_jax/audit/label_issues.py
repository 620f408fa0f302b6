"""Which labels are wrong, from the statistics of one training run.

The score of an example with the given label g and the mean predicted distribution p in
C classes is a log odds ratio of the other labels against the given one:

    score = log(sqrt(sum over j != g of (R[j, g] p[j])^2) + 1/C) - log(p[g] + 1/C)  (1)

R[j, g] is how much more often examples of class j are labeled g than an average pair of
classes is confused. Where mistakes have a direction (3 labeled 8, but not 3 labeled 1),
the network's doubt between the given label and a class that is never mistaken for it is
no evidence of a wrong label, and doubt about the usual mistake is strong evidence: that
is Bayes' rule, with R as the prior of the mistake. The Euclidean norm stands between
the likeliest other label, which ranks best where mistakes have a direction, and the sum
of all others, which ranks best where they have none and classes resemble each other.
The term 1/C, a uniform distribution mixed in, keeps probabilities apart that matter and
those together that do not (1e-3 and 1e-6).

R is estimated from the same distributions. Let t[c] be the mean of p[c] over the
examples labeled c, the per-class thresholds of confident learning, and let c* = argmax
over c of p[c] - t[c] be an example's most likely class. Then Q[j, g] counts the
examples with c* = j and the label g, of those with another label than c* only the clear
ones, p[c*] >= 0.8 t[c*]. Examples that are merely hard for the network are counted too,
but classes that resemble each other (pullovers and coats) are confused both ways, about
equally often. What a pair has in common, S[j, g] = min(Q[j, g], Q[g, j]), is therefore
no sign of a direction beyond the mean of S over all pairs. Off the diagonal,

    Z[j, g] = Q[j, g] - max(S[j, g] - mean of S, 0)
    M[j, g] = Z[j, :] summed  *  share of Z off the diagonal / (C - 1)              (2)
    v = max(sum of (Q - Q^T)^2 - (Q + Q^T) - S^2, 0) / (2 * sum of M^2)
    R[j, g] = (1 + v Z[j, g]) / (1 + v M[j, g])                                     (3)

M is what Z would be without any direction, and v the variance of the rates Z / M: what
Q differs from its transpose by, less the variance of counts and less the asymmetry S^2
of classes that resemble each other. R is the posterior mean of a rate under a gamma
prior of mean 1 and variance v. Where nothing is seen of a direction, v is 0, R is 1,
and nothing is lost. Mistakes that go both ways equally often cannot be distinguished
from resemblance.

The number of issues is less than the number of examples with another label than c*:
some of these examples are merely hard, and on correct labels all of them are. A wrong
label leaves the network nearly as sure of another class as it is of that class where it
is given; a hard example leaves it undecided. So let m = p[c*] less the largest other
probability for an example labeled c*, and p[c*] - p[g] for one with another label g.
An example is sure if m is at least 0.4 times the median m of the examples that are
labeled c*. Let W[j, g] count the sure examples off the diagonal, each row divided by
the share of sure examples among those labeled j, which stands for the wrong labels of
which the network is not sure. Classes that resemble each other are mistaken both ways
even surely: in E(W), the sum of W, what min(W, W^T) exceeds its median over the pairs
by does not count, unless one of the two entries is more than 2.5 times the other. Then

    x = E(W) / number of examples with another label than c*
    o = (1.5 x / (1 - x))^3                                                         (4)
    number of issues = E(W) + max(E(Q) - E(W), 0) o / (1 + o)

where Q counts all examples, sure or not: the others are mostly wrong if most of those
with another label are surely so, and mostly hard if few are. For x >= 1 all of them
count.

Confident learning counts the examples with p[c] >= t[c] for some c. Probabilities from
training itself, unlike held-out ones, are pulled towards the given label, so that few
wrong labels pass that test; the pull is about the same for all examples and leaves the
order of p[c] - t[c] alone, until the network has memorized the wrong labels. Wrong
labels that it has memorized are not counted, so that the number is too low on small
tables.

A trusted set enters through training: in a run of L2RW the network learns less from
wrong labels, and its distributions rank better. The scores of L2RW themselves are
reported, and are not part of equation (1): a weighted sum of both ranked worse.

References:
  Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset
  Labels", Journal of Artificial Intelligence Research 70, 2021 (thresholds, counts).
  Pleiss et al., NeurIPS 2020 (the margin during training as evidence).
"""

import dataclasses
from typing import Any

import numpy as np

from l2rw_jax import base
from l2rw_jax.audit import statistics as statistics_lib

_PROBABILITIES = "mean_probabilities"
# Like the form of the equations, chosen on other examples and seeds than those of
# results/label_issues.
_CLEAR = 0.8
_SURE, _EVEN, _ODDS, _POWER = 0.4, 2.5, 1.5, 3


@dataclasses.dataclass(frozen=True, eq=False)
class LabelIssues:
  """All N examples, the most suspicious first.

  Attributes:
    index: row of each example in the training set, int64 [N].
    given: its label, int64 [N].
    suggested: the most likely other class, int64 [N]; the given label where the
      example was never seen.
    score: how suspicious the label is, equation (1), float64 [N]; higher is more
      suspicious. NaN where the example was never seen: such examples come last.
    is_issue: whether the label is estimated to be wrong, bool [N]: true for the first
      `num_issues` examples.
    num_issues: estimated number of wrong labels, equation (4), at most the examples
      off the diagonal of `confusion`.
    confusion: number of examples of each most likely class (row) with each given label
      (column), int64 [C, C].
    statistics: what `summarize` returned, every array in this order. A statistic that
      no example has is left out.
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
    """What cleanlab takes, in the order of the training set.

    Returns:
      "labels" [N]; "pred_probs" [N, C], the mean predicted distributions, for
      `cleanlab.Datalab.find_issues` and `cleanlab.filter.find_label_issues`; and
      "label_quality" [N] from 0 to 1 as in cleanlab, where lower is more suspicious:
      the probability whose log odds against the label are the score. An example that
      was never seen has the uniform distribution and the quality 0.5.
    """
    order = np.argsort(self.index)
    probabilities = self.statistics[_PROBABILITIES][order]
    is_seen = np.isfinite(self.score[order])
    uniform = 1 / probabilities.shape[1]
    probabilities = np.where(is_seen[:, None], probabilities, uniform)
    quality = 1 / (1 + np.exp(np.where(is_seen, self.score[order], 0)))
    return {
      "labels": self.given[order],
      # Rounding leaves sums of 1 + 1e-7, which cleanlab would warn of.
      "pred_probs": probabilities / probabilities.sum(axis=1, keepdims=True),
      "label_quality": quality,
    }


def find_label_issues(statistics: Any, labels: Any) -> LabelIssues:
  """Ranks the examples of a training set by how likely their labels are wrong.

  Args:
    statistics: the `State` of a run, or what `summarize` makes of it: a dictionary
      with "mean_probabilities" [N, C], and any other arrays [N], which are sorted
      and otherwise left alone. Rows of NaN are examples that were never seen.
    labels: the given labels, integers [N] from 0 to C - 1.

  Returns:
    A `LabelIssues`.

  Raises:
    InputError: the shapes do not match, a label is none of the C classes, or no example
      was ever seen.
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
  p, given = probabilities[is_seen], labels[is_seen]

  likely, is_clear = _likely_classes(p, given)
  confusion = _count(likely, given, num_classes)
  is_counted = is_clear | (likely == given)
  rates = relative_rates(_count(likely[is_counted], given[is_counted], num_classes))
  rows = np.arange(len(given))
  is_given = np.arange(num_classes) == given[:, None]
  others = np.where(is_given, 0, p * rates[:, given].T)
  score, suggested = np.full(size, np.nan), labels.copy()
  score[is_seen] = np.log(
    (np.linalg.norm(others, axis=1) + 1 / num_classes)
    / (p[rows, given] + 1 / num_classes)
  )
  suggested[is_seen] = np.where(is_given, -1, others).argmax(axis=1)

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
  """How much likelier each mistake is than an average one, equation (3).

  Args:
    confusion: number of examples of each class (row) with each label (column),
      [C, C].

  Returns:
    R, float64 [C, C]; 1 on the diagonal, and everywhere if the matrix is no less
    symmetric than chance and classes that resemble each other make it.

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
  is_likely = np.arange(num_classes) == likely[:, None]
  agrees = likely == given
  rows = np.arange(len(given))
  other = np.where(agrees, np.where(is_likely, -np.inf, p).max(axis=1), p[rows, given])
  margin = p[rows, likely] - other
  sure = np.zeros((num_classes, num_classes))
  for c in np.unique(likely):
    margins = margin[agrees & (likely == c)]
    if not len(margins):  # No example says how sure the network is of this class.
      margins = margin[agrees]
    least = _SURE * max(np.median(margins), 0) if len(margins) else 0
    is_sure = (margin >= least) & (likely == c)
    # A median above 0 makes it a half or more; otherwise the network knows nothing.
    share = max((margins >= least).mean(), 0.5) if len(margins) else 1
    counts = np.bincount(given[is_sure & ~agrees], minlength=num_classes)
    sure[c] = counts / share
  everything = _count(likely[~agrees], given[~agrees], num_classes)
  number = everything.sum()
  least, most = _without_resemblance(sure), _without_resemblance(everything)
  if least >= number:  # This also covers that no label disagrees.
    return int(number)
  odds = (_ODDS * least / (number - least)) ** _POWER
  return round(least + max(most - least, 0) * odds / (1 + odds))


def _without_resemblance(counts):
  """The sum off the diagonal, less what pairs of classes have in common."""
  is_mistake = ~np.eye(len(counts), dtype=bool)
  common = np.minimum(counts, counts.T)
  excess = np.maximum(common - np.median(common[is_mistake]), 0)
  is_even = is_mistake & (np.maximum(counts, counts.T) <= _EVEN * common)
  return float(counts[is_mistake].sum() - excess[is_even].sum())


def _likely_classes(p, given):
  """Each example's most likely class c*, and whether it is clear."""
  # Of a class without examples nothing is known: no example is assigned to it.
  thresholds = np.full(p.shape[1], np.inf)
  for c in np.unique(given):
    thresholds[c] = p[given == c, c].mean()
  likely = np.argmax(p - thresholds, axis=1)
  probability = np.take_along_axis(p, likely[:, None], axis=1)[:, 0]
  return likely, probability >= _CLEAR * thresholds[likely]


def _count(likely, given, num_classes):
  """Examples by most likely class (row) and given label (column), int64 [C, C]."""
  counts = np.zeros((num_classes, num_classes), np.int64)
  np.add.at(counts, (likely, given), 1)
  return counts


def _is_seen(statistics):
  """Which examples have evidence; a broken run has NaN in examples that were seen."""
  if "seen" in statistics:
    return statistics["seen"] > 0
  return ~np.isnan(statistics[_PROBABILITIES]).all(axis=1)


def _check(statistics, labels):
  """The statistics as arrays and the labels as int64, once they fit each other."""
  if _PROBABILITIES not in statistics:
    raise base.InputError(
      f"statistics has no {_PROBABILITIES!r}; pass the state, or what audit.summarize"
      " returns."
    )
  statistics = {name: np.asarray(x) for name, x in statistics.items()}
  labels = np.asarray(labels)
  shape = statistics[_PROBABILITIES].shape
  if len(shape) != 2 or shape[1] < 2 or labels.shape != shape[:1]:
    raise base.InputError(
      f"labels must have shape [N] and {_PROBABILITIES} [N, C]; got {labels.shape} and"
      f" {shape}."
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise base.InputError(f"labels must be integers; got {labels.dtype}.")
  for name, x in statistics.items():
    if x.shape[:1] != labels.shape:
      raise base.InputError(
        f"the statistic {name} has shape {x.shape} and there are {len(labels)} labels."
      )
  labels = labels.astype(np.int64)
  wrong = np.flatnonzero((labels < 0) | (labels >= shape[1]))
  if len(wrong):
    raise base.InputError(
      f"{len(wrong)} labels are none of the {shape[1]} classes, the first is"
      f" {labels[wrong[0]]} at index {wrong[0]}."
    )
  p = statistics[_PROBABILITIES]
  is_seen = _is_seen(statistics)
  if not is_seen.any():
    raise base.InputError(
      "no example was ever seen: update the state during training before you rank."
    )
  bad = np.flatnonzero(is_seen & ~np.isfinite(p).all(axis=1))
  if len(bad):
    raise FloatingPointError(
      f"{_PROBABILITIES} of {len(bad)} examples are not finite, the first at index"
      f" {bad[0]}: the logits or losses of the run were NaN or infinite; lower the"
      " learning rate."
    )
  return statistics, labels
