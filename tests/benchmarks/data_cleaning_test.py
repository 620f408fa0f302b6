"""Data cleaning as a bilevel problem: the published formulas, and a run on digits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from benchmarks import _cleaning_solvers as solvers_lib
from benchmarks import data_cleaning

_SIZES = solvers_lib.Sizes(6, 6, 4, 3, batch_size=6, num_steps=5, regularization=0.2)


def _state_and_batches():
  """A state without zeros, and two batches of six examples."""
  rng = np.random.default_rng(0)
  batches = [
    solvers_lib.Batch(
      jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
      jnp.asarray(rng.integers(0, 3, 6), jnp.int32),
      *[jnp.int32(0)] * 3,
      jnp.ones(6, bool),
    )
    for _ in range(2)
  ]
  state = {
    "z": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    "v": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    "logits": jnp.asarray(rng.normal(size=6), jnp.float32),
  }
  return state, batches


def test_soba_steps_along_the_published_directions():
  state, (batch, meta_batch) = _state_and_batches()
  z, v, logits = (state[name] for name in ("z", "v", "logits"))

  def log_likelihood(z, batch):
    scores = batch.x @ z
    return scores - jax.nn.logsumexp(scores, axis=1, keepdims=True)

  def cross_entropy(z, batch):
    return -jnp.take_along_axis(log_likelihood(z, batch), batch.y[:, None], 1)[:, 0]

  def g(z, logits):
    weighted = jax.nn.sigmoid(logits) * cross_entropy(z, batch)
    return weighted.mean() + 0.2 * jnp.sum(z**2)

  def f(z):
    return cross_entropy(z, meta_batch).mean()

  @jax.jit
  def directions(z, v, logits):
    # Explicit matrices; the solver computes only products with them.
    hessian = jax.hessian(g)(z, logits)
    mixed = jax.jacobian(jax.grad(g), argnums=1)(z, logits)
    d_v = jnp.einsum("abcd,cd->ab", hessian, v) + jax.grad(f)(z)
    return jax.grad(g)(z, logits), d_v, jnp.einsum("abn,ab->n", mixed, v)

  @jax.jit
  def soba(state, step):
    return solvers_lib.soba(0.1, 2.0).step(_SIZES, state, step, batch, meta_batch)

  after = soba(state, jnp.int32(3))  # At step 3, the step sizes are halved.
  d_z, d_v, d_x = directions(z, v, logits)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  close(after["z"], z - 0.05 * d_z)
  close(after["v"], v - 0.05 * d_v)
  close(after["logits"], logits - 1.0 * d_x)


def test_saba_keeps_the_last_value_of_every_batch():
  # Two batches of three examples; the expected directions are those of SAGA.
  state, (batch, meta_batch) = _state_and_batches()
  sizes = _SIZES._replace(batch_size=3)
  solver = solvers_lib.saba(0.1, 1.0)
  first = solver.init(sizes, jax.random.key(0)) | state

  def half(whole, number, following):
    rows = slice(3 * number, 3 * number + 3)
    return solvers_lib.Batch(
      *(whole.x[rows], whole.y[rows], jnp.int32(3 * number), jnp.int32(number)),
      *(jnp.int32(following), whole.is_clean[rows]),
    )

  @jax.jit
  def run(state):
    states = [state]
    for number, following in ((0, 1), (1, 0), (0, 1)):
      batches = [half(x, number, following) for x in (batch, meta_batch)]
      states.append(solver.step(sizes, dict(states[-1]), jnp.int32(0), *batches))
    return states

  states = run(first)
  moves = [
    (before["z"] - after["z"]) / 0.1 for before, after in itertools.pairwise(states)
  ]

  @jax.jit
  def gradients(states):
    return [
      solvers_lib._inner_terms(sizes, states[t], half(batch, n, 0))[0]
      for t, n in enumerate((0, 1, 0))
    ]

  values = gradients(states)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(moves[0], values[0])
  close(moves[1], values[1] + values[0] / 2)
  close(moves[2], values[2] - values[0] + (values[0] + values[1]) / 2)
  kept = states[-1]["inner"]
  close(kept.last, jnp.stack([values[2], values[1]]))
  close(kept.mean, (values[2] + values[1]) / 2)


def test_averaged_weights_step_along_the_average_of_the_meta_gradients():
  state, (batch, meta_batch) = _state_and_batches()
  solver = solvers_lib.averaged_weights(0.1, 20.0)
  states = [solver.init(_SIZES, jax.random.key(0)) | {"z": state["z"]}]
  # One weight is negative after the first step, and remains so.
  states[0]["weights"] = states[0]["weights"].at[0].set(-5.0)
  for step, of_step in enumerate((meta_batch, batch)):
    states.append(solver.step(_SIZES, states[-1], jnp.int32(step), batch, of_step))

  def mean_loss(z, of_batch):
    return solvers_lib.example_losses(z, of_batch.examples).mean()

  first = jax.grad(mean_loss)(states[0]["z"], meta_batch)
  second = jax.grad(mean_loss)(states[1]["z"], batch)
  first, second = (gradient / np.linalg.norm(gradient) for gradient in (first, second))
  # The average with a decay of 0.99, whose length does not matter.
  averages = [first, 0.99 * first + second]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  for step, (before, after) in enumerate(itertools.pairwise(states)):
    share = 0.5 * (1 + np.cos(np.pi * step / _SIZES.num_steps))
    gradients = jax.jacobian(solvers_lib.example_losses)(before["z"], batch.examples)
    direction = averages[step] / np.linalg.norm(averages[step])
    scores = 0.1 * jnp.einsum("bdc,dc->b", gradients, direction) / 6
    close(after["weights"], before["weights"] + 20 * scores)
    positive = np.maximum(after["weights"], 0)
    assert positive[0] == 0
    move = jnp.einsum("b,bdc->dc", positive, gradients) / 6 + 0.4 * before["z"]
    close(after["z"], before["z"] - 0.1 * share * move)


def test_fine_tuning_trains_on_all_examples_and_then_on_clean_ones():
  state, (batch, meta_batch) = _state_and_batches()
  sizes = _SIZES._replace(num_steps=5)
  tuned = solvers_lib.fine_tuning(0.1)
  # The phases have three and two steps, each with a whole cosine schedule.
  phases = {
    2: (solvers_lib.fixed_weights(0.1), 2, 3),
    3: (solvers_lib.clean_only(0.1), 0, 2),
    4: (solvers_lib.clean_only(0.1), 1, 2),
  }
  for step, (solver, step_of_phase, num_steps) in phases.items():
    after = tuned.step(sizes, state, jnp.int32(step), batch, meta_batch)
    of_phase = sizes._replace(num_steps=num_steps)
    expected = solver.step(of_phase, state, jnp.int32(step_of_phase), batch, meta_batch)
    np.testing.assert_allclose(after["z"], expected["z"], rtol=1e-5, atol=1e-7)


def test_early_stopping_reports_the_evaluation_with_the_lowest_clean_error(
  monkeypatch,
):
  errors = {0.003: [90, 20, 30], 0.01: [90, float("nan"), 12]}

  def train(solver, sizes, data, seed, eval_every):
    values = errors.get(sizes.regularization, [90, 40, 50])
    return data_cleaning.Run([0, 5, 10], [0, 1, 2], [1, 2, 3], values, [4, 5, 6], {})

  monkeypatch.setattr(data_cleaning, "train", train)
  settings = data_cleaning.Settings(dataset="digits", num_train=320, num_meta=80)
  data = data_cleaning.load(settings, 0.5, 0)
  chosen = data_cleaning.train_early_stopped(settings, data, 0)
  assert (chosen.regularization, chosen.evaluation) == (0.01, 2)
  errors[0.01][2] = 25
  chosen = data_cleaning.train_early_stopped(settings, data, 0)
  assert (chosen.regularization, chosen.evaluation) == (0.003, 1)


# The other methods run other solvers in the same loop; soba and saba are tested above.
_COMPARED = (
  "l2rw",
  "kept_weights",
  "averaged_weights",
  "meta_weight_net",
  "clean_only",
  "fine_tuning",
  "early_stopped",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Rows of a short benchmark, its folder, and what it printed."""
  cwd = tmp_path_factory.mktemp("benchmark")
  arguments = ["--dataset=digits", "--num_train=320", "--num_meta=80", "--shares=0.6"]
  arguments += ["--num_seeds=1", "--num_steps=30", "--eval_every=15"]
  arguments += ["--batch_size=64", "--learning_rate=0.1", "--kept_learning_rate=30"]
  arguments.append(f"--methods={','.join(_COMPARED)}")
  done = scripts.run("benchmarks.data_cleaning", *arguments, cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd, arguments, done.stdout


@pytest.mark.ci
def test_every_method_learns_and_ranks(run):
  cwd, arguments, printed = run
  rows = scripts.saved_rows(cwd / "runs" / "data_cleaning")[0]
  assert [row["method"] for row in rows] == list(_COMPARED)
  assert len(scripts.table(printed)) == 1 + len(rows)
  for row in rows:
    assert 45 < row["wrong_percent"] < 62  # Nine tenths of 60%.
    curve = [point.split(":") for point in row["curve"].split()]
    assert [int(step) for step, _, _ in curve] == [0, 15, 30]
    reported = [
      float(error) for step, _, error in curve if int(step) == row["reported_step"]
    ]
    assert reported == [pytest.approx(row["error_percent"], abs=0.01)]
    assert row["reported_step"] == 30 or row["method"] == "early_stopped"
    assert row["error_percent"] < 80  # Without training it is about 90.
    learned = row["method"] in data_cleaning.LEARNED
    assert (row["weight_auroc"] is not None) == learned
    if learned and row["method"] != "meta_weight_net":
      assert row["weight_auroc"] > 0.6, row["method"]
  by_name = {row["method"]: row for row in rows}
  assert by_name["clean_only"]["regularization"] != 0.2
  assert by_name["l2rw"]["score_auroc"] is not None
  assert (cwd / "runs" / "data_cleaning" / "figure.png").stat().st_size > 10_000
  again = scripts.run("benchmarks.data_cleaning", *arguments, cwd=cwd)
  assert again.status == 0 and again.stdout == printed  # Nothing was repeated.


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--methods=sobo"], "--methods=sobo: choose among l2rw"),
    (["--num_train=10"], "=10 is less than --batch_size; raise --num_train or lower"),
    (
      ["--num_meta=10"],
      "--num_meta=10: four fifths of these images are fewer than --batch_size; raise",
    ),
    (["--num_meta=4", "--batch_size=4"], "=4: four fifths of these images are"),
    (
      ["--num_train=5000"],
      "need 5080 images, but digits has 1297; lower one of them.",
    ),
    (["--shares=2"], "--shares=2 must lie between 0 and 1"),
    (
      ["--shares=0.5", "--shares=0.3"],
      "--shares=0.3: soba has step sizes for 0.5, 0.7, 0.9 only",
    ),
  ],
)
def test_a_mistake_is_a_one_line_error(arguments, message, tmp_path):
  small = ["--dataset=digits", "--num_train=320", "--num_meta=80"]
  names = {argument.split("=")[0] for argument in arguments}
  small = [argument for argument in small if argument.split("=")[0] not in names]
  done = scripts.run("benchmarks.data_cleaning", *small, *arguments, cwd=tmp_path)
  (line,) = done.stderr.splitlines()
  assert done.status == 2 and message in line
  assert not (tmp_path / "runs").exists()
