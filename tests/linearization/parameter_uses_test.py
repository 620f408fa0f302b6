"""Plans: what each value of a losses function depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.linearization import parameter_uses

_B = 3
_PARAMS = [jnp.arange(8.0).reshape(4, 2), jnp.array([0.5, -1.0])]
_NAMES = ["kernel", "bias"]


def _trace(losses_fn):
  batch = {"x": jnp.ones((_B, 4)), "temperature": jnp.array(2.0)}
  return parameter_uses.trace(losses_fn, _PARAMS, batch, _NAMES)


def _losses_fn(params, batch):
  kernel, bias = params
  h = jax.jit(jnp.matmul)(batch["x"], 2 * kernel)
  return jnp.sum(jnp.tanh(h / batch["temperature"]) + bias[None, :], 1), h.mean(0)


def _run(plan, env, perturbations):
  values = env | dict(enumerate(_PARAMS))
  for kind in (parameter_uses.Kind.PARAMS, parameter_uses.Kind.DATA):
    plan.run(kind, values, perturbations)
  return values


def test_uses_are_the_operations_on_parameters_and_examples():
  plan, _, outputs, tree = _trace(_losses_fn)
  uses = plan.parameter_uses()
  assert [use.eqn.primitive.name for use in uses] == ["dot_general", "add"]
  assert [use.differentiable_outputs for use in uses] == [[(0, 0)], [(0, 0)]]
  kinds = {kind: sum(step.kind == kind for step in plan.steps) for kind in range(3)}
  assert kinds[parameter_uses.Kind.PARAMS] >= 2  # 2 * kernel and the row of the bias.
  assert outputs[0].kind == parameter_uses.Kind.DATA and outputs[0].axis == 0
  assert outputs[0].leaf == 1  # The bias is used last.
  assert tree == jax.tree.structure(0)


def test_a_plan_computes_the_losses_and_adds_perturbations():
  plan, env, outputs, _ = _trace(_losses_fn)
  losses, aux = _losses_fn(_PARAMS, {"x": jnp.ones((_B, 4)), "temperature": 2.0})
  zeros = [[jnp.zeros((_B, 2))]] * 2
  values = _run(plan, env, zeros)
  for output, expected in zip(outputs, (losses, aux), strict=True):
    actual = parameter_uses.value_of(output, values)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
  perturbations = [zeros[0], [jnp.array([[0.0, 1], [2, 3], [4, 5]])]]
  perturbed = parameter_uses.value_of(outputs[0], _run(plan, env, perturbations))
  np.testing.assert_allclose(perturbed - losses, [1, 5, 9], rtol=1e-5)


def test_an_error_of_aux_alone_is_stored_and_not_raised():
  _, _, (losses, aux), _ = _trace(_losses_fn)
  assert losses.error is None
  assert aux.axis is None and "reduce_sum, which mixes examples" in str(aux.error)


@pytest.mark.parametrize(
  ("losses_fn", "message"),
  [
    (
      lambda p, b: (jnp.cumsum(b["x"] @ p[0], axis=0).sum(1), 0),
      r"cumsum, which mixes examples \(after parameter kernel\)",
    ),
    (lambda p, b: (jnp.ones((_B, 4)) @ p[0].sum(1), 0), "not computed row by row"),
    (lambda p, b: ((b["x"] @ p[0]).T.ravel()[:_B], 0), "which mixes|merges"),
  ],
)
def test_losses_that_mix_examples_are_refused(losses_fn, message):
  with pytest.raises(parameter_uses.NotLayerwiseError, match=message):
    _trace(losses_fn)


def test_an_error_names_params_if_they_are_a_single_array():
  with pytest.raises(parameter_uses.NotLayerwiseError, match=r"\(after params\)"):
    parameter_uses.trace(
      lambda p, x: (jnp.cumsum(x * p[0]), 0), [jnp.ones(())], jnp.ones(3), [""]
    )


def test_the_cost_of_unknown_indices_does_not_grow_with_the_number_of_paths(
  monkeypatch,
):
  calls = []
  number = parameter_uses.Plan._number

  def counted(*args):
    calls.append(args)
    return number(*args)

  def losses_fn(params, batch):
    t = batch["temperature"].astype(jnp.int32)  # Not known: an entry of the batch.
    for _ in range(6):  # A hash, in which each line reads `t` twice.
      t = t ^ (t << 13)
      t = t ^ (t >> 17)
    rows = batch["x"][jnp.stack([t, t]) % _B]
    return (batch["x"] @ params[0])[:, 0] + rows.sum(), None

  monkeypatch.setattr(parameter_uses.Plan, "_number", counted)
  with pytest.raises(parameter_uses.NotLayerwiseError, match="gather"):
    _trace(losses_fn)
  assert 10 < len(calls) < 200
