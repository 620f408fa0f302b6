"""MentorNet: curricula, moving percentile, dropout, and a student's step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.methods import mentornet

_LOSSES = np.array([0.0, 0.5, 1.0, 2.0, 29.0], np.float32)
_DIFFERENCES = _LOSSES - 1
_LABELS = np.array([0, 1, 0, 1, 0], np.int32)


@pytest.mark.parametrize(
  ("curriculum", "epoch", "expected"),
  [
    (mentornet.uniform, 50, [1, 1, 1, 1, 1]),
    (mentornet.self_paced, 50, [1, 1, 1, 0, 0]),
    (mentornet.hard, 50, [0, 0, 1, 1, 1]),
    (functools.partial(mentornet.hard, positive_labels=True), 50, [0, 1, 1, 1, 1]),
    # (1 - exp(-0.5))^2, (1 - 1/e)^2, (1 - exp(-2))^2.
    (mentornet.focal, 50, [0, 0.15481812, 0.39957640, 0.74764507, 1]),
    (functools.partial(mentornet.focal, gamma=0.0), 50, [1, 1, 1, 1, 1]),
    (mentornet.spcl_linear, 50, [1, 1, 1, 0, 0]),
    (functools.partial(mentornet.spcl_linear, gamma=4.0), 50, [1, 1, 1, 0.75, 0]),
    (mentornet.pd_mixture, 0, [1, 1, 1, 1, 1]),
    (mentornet.pd_mixture, 18, [1, 1, 1, 1, 1]),
    (mentornet.pd_mixture, 19, [1, 1, 1, 0, 0]),
    (mentornet.pd_mixture, 89, [1, 1, 1, 0, 0]),
  ],
)
def test_predefined_curricula_match_hand_computed_values(curriculum, epoch, expected):
  result = curriculum(_LOSSES, _DIFFERENCES, _LABELS, epoch)
  np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)
  assert result.dtype == np.float32
  compiled = jax.jit(curriculum)(_LOSSES, _DIFFERENCES, _LABELS, epoch)
  np.testing.assert_allclose(compiled, expected, rtol=1e-6, atol=1e-7)


def test_mixture_decreases_linearly_in_the_last_tenth():
  differences = np.array([-0.5, 0.0, 0.25, 0.999, 1.0, 3.0], np.float32)
  result = mentornet.pd_mixture(differences + 1, differences, None, 90)
  np.testing.assert_allclose(result, [1, 1, 0.75, 0.001, 0, 0], atol=1e-6)


@pytest.mark.parametrize("name", mentornet.CURRICULA)
@pytest.mark.parametrize("loss", [0.0, 1e-30, 88.0, 1e4, 3e38])
def test_curricula_of_extreme_losses_lie_between_0_and_1(name, loss):
  losses = np.full(2, loss, np.float32)
  for epoch in (0, 50, 99):
    result = mentornet.CURRICULA[name](losses, losses - 1e30, np.zeros(2, int), epoch)
    assert ((result >= 0) & (result <= 1)).all()


@pytest.mark.parametrize(
  ("percentile", "expected"),
  [(0, 1), (12.4, 1), (12.5, 1), (12.6, 2), (50, 3), (70, 4), (75, 4), (100, 5)],
)
def test_percentile_is_the_nearest_loss_and_the_lower_one_at_a_tie(
  percentile, expected
):
  losses = jnp.array([3.0, 5.0, 1.0, 4.0, 2.0])
  result = mentornet.moving_percentile(0.0, losses, percentile, decay=0.0)
  assert result == expected


def test_integer_percentiles_have_exact_ties():
  for size in (51, 101, 201):
    for percentile in range(101):
      result = mentornet.moving_percentile(
        0.0, jnp.arange(float(size)), percentile, decay=0
      )
      # The nearest position, and the lower one at a tie, computed in integers.
      assert result == -((50 - percentile * (size - 1)) // 100)
  losses = jnp.arange(1001.0)
  for percentile in (np.uint8(75), np.int8(75), np.float16(75)):
    assert mentornet.moving_percentile(0.0, losses, percentile, decay=0) == 750


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_percentile_is_a_moving_average(decay):
  moving = 0.0
  for losses in ([1.0, 2.0, 9.0], [4.0, 6.0, 8.0]):
    moving = mentornet.moving_percentile(moving, jnp.array(losses), 50, decay=decay)
  expected = decay * (1 - decay) * 2 + (1 - decay) * 6
  np.testing.assert_allclose(moving, expected, rtol=1e-6)
  assert moving.dtype == jnp.float32


def test_percentile_of_one_example_and_of_half_precision():
  assert mentornet.moving_percentile(0.0, jnp.array([3.0]), 75, decay=0) == 3
  half = jnp.array([1.0, 2.0], jnp.bfloat16)
  assert mentornet.moving_percentile(0.0, half, 100).dtype == jnp.float32


@pytest.mark.ci
@pytest.mark.parametrize("size", [1, 10, 97, 100, 128])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9, 0.95, 1.0])
def test_dropout_keeps_an_exact_number(size, rate):
  weights = jnp.linspace(0.5, 1, size)
  drop = jax.jit(mentornet.example_dropout)
  result = np.asarray(drop(jax.random.key(0), weights, rate))
  # The expected number is computed in hundredths, to avoid rounding errors.
  assert np.count_nonzero(result) == size * (100 - round(100 * rate)) // 100
  np.testing.assert_array_equal(result[result > 0], weights[result > 0])


def test_dropout_is_uniform_over_positions():
  keys = jax.random.split(jax.random.key(1), 2000)
  drop = jax.vmap(lambda key: mentornet.example_dropout(key, jnp.ones(10), 0.7))
  counts = np.asarray(drop(keys)).sum(axis=0)
  # Binomial: 600 with a standard deviation of 20.5.
  assert (abs(counts - 600) < 4.5 * 20.5).all()


def test_dropout_rates_of_a_schedule():
  rates = mentornet.dropout_rates(((0.5, 17), (0.05, 78), (1.0, 5)))
  assert rates.shape == (100,)
  np.testing.assert_allclose(
    rates[[0, 16, 17, 94, 95, 99]], [0.5, 0.5, 0.05, 0.05, 1, 1]
  )


@pytest.mark.parametrize(
  ("step", "num_steps", "expected"),
  [(0, 7, 0), (1, 7, 14), (6, 7, 85), (7, 7, 99), (99, 7, 99), (389, 39_000, 0),
   (390, 39_000, 1), (38_999, 39_000, 99), (19_999_999, 20_000_000, 99)],
)  # fmt: skip
def test_epoch_percent(step, num_steps, expected):
  assert mentornet.epoch_percent(step, num_steps) == expected
  assert mentornet.epoch_percent(jnp.int32(step), num_steps) == expected


def test_epoch_percent_of_a_step_that_exceeds_32_bits():
  for step in (3_000_000_000, np.int64(3_000_000_000)):
    assert mentornet.epoch_percent(step, 4_000_000_000) == 75
  assert mentornet.epoch_percent(jnp.int32(1_000_000_000), 4_000_000_000) == 25


@pytest.mark.parametrize("step", [jnp.int8(127), jnp.uint8(255), jnp.uint8(0)])
def test_epoch_percent_of_a_step_of_a_narrow_type(step):
  assert mentornet.epoch_percent(step, 1000) == int(step) // 10


def test_epoch_percent_of_several_steps_is_refused():
  with pytest.raises(base.InputError, match=r"one integer; got .* shape \(99,\)"):
    mentornet.epoch_percent(jnp.arange(99), 1000)


@pytest.mark.parametrize(
  ("name", "percentiles", "burn_in", "fixed", "late_rate"),
  [
    ("self_paced", (70, 70, 70), 0, False, 0.0),
    ("focal", (70, 70, 70), 0, False, 0.0),
    ("pd", (75, 75, 50), 0, False, 0.05),
    ("dd_resnet", (80, 60, 50), 18, True, 0.9),
    ("dd_inception", (80, 60, 50), 18, True, 0.05),
  ],
)
def test_presets_match_the_released_commands(
  name, percentiles, burn_in, fixed, late_rate
):
  for noise, percentile in zip((0.2, 0.4, 0.8), percentiles, strict=True):
    result = mentornet.preset(name, noise)
    assert result["percentile"] == percentile
    assert (result["burn_in"], result["fixed_epoch_after_burn_in"]) == (burn_in, fixed)
    assert result["decay"] == 0.5
    rates = mentornet.dropout_rates(result["dropout"])
    np.testing.assert_allclose(rates[99], late_rate)
    np.testing.assert_allclose(rates[:17], 0.0 if late_rate == 0 else 0.5)
    mentornet.mentornet(mentornet.self_paced, **result)


def test_preset_uses_the_nearest_noise_level():
  levels = {0.0: 80, 0.3: 80, 0.31: 60, 0.5: 60, 0.6: 60, 0.61: 50, 1.0: 50}
  for noise, percentile in levels.items():
    assert mentornet.preset("dd_resnet", noise)["percentile"] == percentile, noise


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"percentile": 0.75},
      "must be a number from 0 to 100, not a fraction: use 75",
    ),
    ({"percentile": 101.0}, "percentile=101.0 must lie between 0 and 100"),
    ({"percentile": float("nan")}, "percentile=nan must lie"),
    ({"decay": 1.5}, "decay=1.5 must lie between 0 and 1"),
    ({"burn_in": -1}, "burn_in=-1 must lie between 0 and 100"),
    ({"dropout": ((0.5, 17),)}, r"epoch percents \[17\] must add up to 100"),
    ({"dropout": ((0.5, 117), (0.1, -17))}, "none may be negative"),
    ({"dropout": ((1.5, 100),)}, "dropout: rate=1.5 must lie"),
    ({"dropout": ()}, "must add up to 100"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(base.InputError, match=message):
    mentornet.mentornet(mentornet.self_paced, **settings)


@pytest.mark.parametrize("gamma", [-1.0, float("nan")])
def test_parameters_of_curricula_out_of_range_are_refused(gamma):
  with pytest.raises(base.InputError, match=f"focal: gamma={gamma} must be at least 0"):
    mentornet.focal(jnp.ones(2), gamma=gamma)
  for value in (gamma, 0.0):
    with pytest.raises(base.InputError, match=f"gamma={value} must be more than 0"):
      mentornet.spcl_linear(jnp.ones(2), jnp.ones(2), gamma=value)


@pytest.mark.parametrize("step", [3.0, jnp.float32(3)])
def test_a_step_that_is_not_an_integer_is_refused(step):
  with pytest.raises(base.InputError, match="step must be an integer; got float"):
    mentornet.epoch_percent(step, 10)


def test_bad_names_and_shapes_are_refused():
  with pytest.raises(base.InputError, match="'ddd': choose among self_paced, focal"):
    mentornet.preset("ddd", 0.4)
  with pytest.raises(base.InputError, match=r"losses must be one number per example"):
    mentornet.moving_percentile(0.0, jnp.ones((2, 2)), 75)


# A student with linear losses: l_i = p . x_i + b.
_X = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]], np.float32)
_PARAMS = {"p": np.ones((2, 1), np.float32), "b": np.zeros(1, np.float32)}


def _problem(num_steps=100):
  def forward(params, model_state, batch, key, train):
    del key, train
    return batch["x"] @ params["p"] + params["b"][None], model_state

  return base.Problem(
    forward=forward,
    loss=lambda outputs, batch: outputs[:, 0],
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=2,
    class_counts=jnp.array([2, 2]),
    num_examples=4,
    num_steps=num_steps,
  )


def _step(method, step=50, state=None, num_steps=100, seed=0):
  batch = {"x": _X, "label": np.array([0, 1, 0, 1]), "index": np.arange(4)}
  key = jax.random.key(seed)
  inputs = base.Inputs(_PARAMS, {}, (), batch, None, jnp.int32(step), key)
  if state is None:
    state = method.init(key, _problem(), _PARAMS)
  return method.gradients(state, _problem(num_steps), inputs)


def test_student_step_matches_hand_computed_values():
  # Losses 1 to 4 have the 50th percentile 2 (a tie). With decay 0.5, the moving
  # percentile is 1, and the differences from it are 0, 1, 2, 3.
  method = mentornet.mentornet(
    functools.partial(mentornet.spcl_linear, gamma=4.0), percentile=50
  )
  result, state = _step(method)
  assert state == 1
  np.testing.assert_allclose(result.losses, [1, 2, 3, 4])
  # Weights are divided by the number of examples, not by their sum.
  np.testing.assert_allclose(result.weights, np.array([1, 0.75, 0.5, 0.25]) / 4)
  np.testing.assert_allclose(result.grads["p"][:, 0], [2.5 / 4, 2.5 / 4])
  np.testing.assert_allclose(result.grads["b"], [2.5 / 4])
  assert result.metrics == {"percentile": 1, "mean_weight": 0.625}
  _, state = _step(method, state=state)
  assert state == 1.5


def test_weight_decay_of_kernels_is_scaled_by_the_mean_weight():
  plain, _ = _step(mentornet.mentornet(mentornet.self_paced, percentile=50))
  decayed, _ = _step(
    mentornet.mentornet(mentornet.self_paced, percentile=50, weight_decay=0.1)
  )
  assert plain.metrics["mean_weight"] == 0.25
  difference = decayed.grads["p"] - plain.grads["p"]
  np.testing.assert_allclose(difference, 0.1 * 0.25 * _PARAMS["p"], rtol=1e-5)
  np.testing.assert_array_equal(decayed.grads["b"], plain.grads["b"])


def _reports_epoch(losses, differences, labels, epoch):
  return jnp.full_like(losses, epoch)


@pytest.mark.parametrize(
  ("burn_in", "fixed", "expected"),
  [
    # With burn_in=18, the weight is 1 before epoch percent 17.
    (18, False, {0: 1, 16: 1, 17: 17, 18: 18, 19: 19, 99: 99}),
    (18, True, {0: 1, 16: 1, 17: 17, 18: 18, 19: 18, 99: 18}),
    (0, True, {0: 0, 50: 0, 99: 0}),
    (0, False, {0: 0, 50: 50, 99: 99}),
    (1, False, {0: 0, 1: 1, 2: 2}),
  ],
)
def test_burn_in_and_fixed_epoch(burn_in, fixed, expected):
  method = mentornet.mentornet(
    _reports_epoch, burn_in=burn_in, fixed_epoch_after_burn_in=fixed
  )
  for step, weight in expected.items():
    assert _step(method, step)[0].metrics["mean_weight"] == weight, step


def test_dropout_follows_the_schedule_and_the_fixed_epoch():
  schedule = ((0.5, 17), (0.25, 78), (1.0, 5))
  running = mentornet.mentornet(mentornet.uniform, dropout=schedule)
  stopped = mentornet.mentornet(
    mentornet.uniform, burn_in=18, fixed_epoch_after_burn_in=True, dropout=schedule
  )
  expected = {0: (2, 2), 16: (2, 2), 17: (3, 3), 94: (3, 3), 95: (0, 3), 99: (0, 3)}
  for step, counts in expected.items():
    for method, kept in zip((running, stopped), counts, strict=True):
      result, _ = _step(method, step)
      assert np.count_nonzero(result.weights) == kept
      np.testing.assert_allclose(result.weights[result.weights > 0], 0.25)
      assert all(np.isfinite(g).all() for g in jax.tree.leaves(result.grads))
  chosen = {
    np.asarray(_step(running, 0, seed=s)[0].weights).tobytes() for s in range(8)
  }
  assert len(chosen) > 2


def test_curriculum_gets_the_labels_of_the_batch():
  result, _ = _step(
    mentornet.mentornet(
      functools.partial(mentornet.hard, positive_labels=True), percentile=100, decay=0
    )
  )  # Moving percentile 4: differences -3, -2, -1, 0; the second and last labels are 1.
  np.testing.assert_allclose(result.weights, np.array([0, 1, 0, 1]) / 4)


def test_weights_are_not_differentiated():
  method = mentornet.mentornet(mentornet.focal)
  result, _ = _step(method)
  v = (1 - np.exp(-result.losses)) ** 2
  np.testing.assert_allclose(result.weights, v / 4, rtol=1e-6)
  np.testing.assert_allclose(result.grads["p"][:, 0], v @ _X / 4, rtol=1e-6)


def test_mentor_for_other_classes_is_refused():
  class Mentor:
    num_classes = 10

    def __call__(self, losses, differences, labels, epoch):
      raise AssertionError("the mentor was called")

  with pytest.raises(
    base.InputError, match="the mentor was fitted for the labels of 10"
  ):
    _step(mentornet.mentornet(Mentor()))


@pytest.mark.parametrize("num_steps", [1, 7, 100, 30_000_000, 2**31 - 1])
def test_epoch_percent_is_exact_for_runs_of_any_length(num_steps):
  steps = {0, num_steps // 3, num_steps - 1}
  for percent in (1, 50, 99):
    first = -(-percent * num_steps // 100)
    steps |= {max(first - 1, 0), min(first, num_steps - 1)}
  for step in steps:
    expected = min(100 * step // num_steps, 99)
    # A step on a device is compared in int32, in which 100 * step may not fit.
    for given in (step, jnp.int32(step)):
      assert mentornet.epoch_percent(given, num_steps) == expected, step


def test_curricula_need_only_the_arguments_they_use():
  losses = jnp.array([0.0, 1.0])
  np.testing.assert_array_equal(mentornet.uniform(losses), 1)
  np.testing.assert_array_equal(mentornet.self_paced(losses, losses - 0.5), [1, 0])
  with pytest.raises(base.InputError, match="positive_labels=True needs labels"):
    mentornet.hard(losses, losses, positive_labels=True)


def test_nan_loss_gives_a_nan_weight():
  losses = jnp.array([jnp.nan, 1.0, 2.0])
  assert np.isnan(mentornet.moving_percentile(0.0, losses, 50.0))
  losses_with_infinity = jnp.array([jnp.inf, 1.0, 2.0])
  assert np.isnan(mentornet.moving_percentile(0.0, losses_with_infinity, 100.0))
  assert mentornet.moving_percentile(0.0, losses_with_infinity, 50.0) == 1
  for curriculum in (mentornet.self_paced, mentornet.hard):
    result = curriculum(losses, losses - 1.5)
    np.testing.assert_array_equal(np.isnan(result), [True, False, False])


def test_dropout_under_strict_promotion_in_double_precision():
  with jax.enable_x64(), jax.numpy_dtype_promotion("strict"):
    weights = mentornet.example_dropout(
      jax.random.key(0), jnp.ones(4, jnp.float32), 0.5
    )
  assert weights.dtype == jnp.float32 and weights.sum() == 2
