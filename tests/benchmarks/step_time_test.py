"""The benchmark of training steps: its rows, its literal baselines, its turns."""

import collections
import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from benchmarks import _literal
from benchmarks import _networks
from benchmarks import _step_time_figure
from benchmarks import _steps
from benchmarks import _turns
from benchmarks import step_time
from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.io import workdir
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_FLAGS = ("--networks=mlp", "--methods=l2rw,absgd", "--batch_size=10", "--repeats=2")


def _benchmark(*flags, cwd):
  done = scripts.start("-m", "benchmarks.step_time", *_FLAGS, *flags, cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The folder of a benchmark that ran with one meta batch size, and then with two."""
  cwd = tmp_path_factory.mktemp("benchmark")
  _benchmark("--meta_sizes=1", cwd=cwd)
  folder = cwd / "runs" / "step_time"
  before = (folder / "mlp-1.0.json").read_bytes()
  printed = _benchmark("--meta_sizes=1,0.5", cwd=cwd)
  assert (folder / "mlp-1.0.json").read_bytes() == before
  assert "mlp-0.5: 4 implementations" in printed and "mlp-1.0: " not in printed
  assert len(scripts.table(printed)) == 1 + 8
  return folder


@pytest.mark.slow
def test_there_is_a_row_for_every_method_engine_and_meta_size(folder):
  rows, as_csv, flags = scripts.saved_rows(folder)
  engines = [*_steps.ENGINES]
  assert [(r["method"], r["engine"], r["meta_size"]) for r in rows] == [
    *(("plain", None, None), ("absgd", None, None)),
    *(("l2rw", engine, size) for size in (10, 5) for engine in engines),
  ]
  assert len(as_csv) == len(rows) and flags["meta_sizes"] == ["1", "0.5"]
  for row in rows:
    seconds = row["milliseconds"] / 1e3
    assert 0 < row["milliseconds_quartile_1"] <= row["milliseconds"]
    assert row["milliseconds"] <= row["milliseconds_quartile_3"]
    assert row["examples_per_second"] == pytest.approx(10 / seconds)
    assert row["flops_per_second"] == pytest.approx(row["flops"] / seconds)
    assert row["compile_seconds"] > 0 and row["temporary_bytes"] > 0
    assert row["num_parameters"] == 203_530 and row["cpus"] >= 1
    assert {"seed", "data", "commit", "jax", "device_kind"} <= set(row)
    assert row["framework"] == "jax" and row["faster_than_torch"] is None
  plain, _, *l2rw_rows = rows
  assert plain["ratio"] == plain["flops_ratio"] == plain["temporary_bytes_ratio"] == 1
  literal, forward, layerwise, *half_meta = (r["flops_ratio"] for r in l2rw_rows)
  assert 1.5 < layerwise <= 1.02 * forward < literal < 4
  full_meta = (literal, forward, layerwise)
  assert all(x < y for x, y in zip(half_meta, full_meta, strict=True))


@pytest.mark.slow
def test_only_figures_whose_rows_exist_are_drawn(folder, tmp_path):
  rows, _, _ = scripts.saved_rows(folder)
  for name in ("figure.png", "l2rw.png"):
    assert (folder / name).stat().st_size > 10_000
  for row in [r for r in rows if r["method"] in ("plain", "l2rw")]:
    other = {"framework": "torch", "torch": "2", "meta_share": row["meta_share"]}
    rows.append({**row, **other, "engine": row["engine"] and "double backward"})
    row["faster_than_torch"] = 2.0
  assert _step_time_figure.draw(rows, tmp_path) == ["figure.png", "l2rw.png"]
  assert _step_time_figure.draw(rows[:2], tmp_path) == ["figure.png"]
  compiled = [{**row, "framework": "torch.compile"} for row in rows]
  assert _step_time_figure.draw(compiled, tmp_path) == ["figure.png"]


_MISTAKES = {
  "network": (["--networks=vgg"], "--networks=vgg: choose among mlp, lenet"),
  "method": (["--methods=sgd"], "--methods=sgd: choose among plain, l2rw"),
  "no_method": (["--methods="], "--methods= is empty: choose among"),
  "engine": (["--engines=reverse"], "--engines=reverse: choose among literal"),
  "no_share": (["--meta_sizes=0"], "--meta_sizes=0: give shares above 0"),
  "share": (["--meta_sizes=all"], "--meta_sizes=all: give shares"),
  "seconds": (["--seconds=0"], "--seconds=0.0 must be above 0"),
  "half": (["--dtype=bfloat16"], "mlp computes in float32"),
  "peer": (["--peer_only"], "need --peer=torch"),
  "batch_norm": (
    ["--networks=resnet32_bn", "--methods=l2rw", "--engines=layerwise"],
    "BatchNorm mixes examples; add forward or literal",
  ),
  "other_settings": (
    ["--workdir={done}", "--repeats=3"],
    "holds a run with other settings: repeats was 2, now 3",
  ),
  "other_machine": (
    ["--workdir={elsewhere}"],
    'holds a run with other settings: device_kind was "abacus", now ',
  ),
}


@pytest.mark.parametrize(
  ("meta_sizes", "message"),
  [
    (("1", "0.009"), "--meta_sizes=0.009: this is less than one example of the batch"),
    (("1", "0.004", "0.001"), "mlp, which has 100 examples; give at least"),
    (("0.1", "0.099"), "--meta_sizes=0.1,0.099: both give a meta batch of 10 for mlp"),
  ],
)
def test_shares_that_give_no_separate_meta_batch_are_refused(meta_sizes, message):
  flags = {"networks": ("mlp",), "methods": ("l2rw",), "meta_sizes": meta_sizes}
  with pytest.raises(base.InputError, match=message):
    step_time.plan(step_time.Settings(**flags))


def test_shares_of_a_batch_are_rounded():
  flags = {"networks": ("mlp",), "methods": ("l2rw",), "batch_size": 3}
  groups = step_time.plan(step_time.Settings(**flags, meta_sizes=("0.3333", "0.6")))
  assert [(group.share, group.setting.meta_size) for group in groups] == [
    (0.3333, 1),
    (0.6, 2),
  ]


@pytest.fixture(scope="module")
def outcomes(folder, tmp_path_factory):
  elsewhere = tmp_path_factory.mktemp("elsewhere")
  settings = workdir.read_record(folder / "settings.json")
  settings["device_kind"] = "abacus"
  workdir.write_record(elsewhere / "settings.json", settings)
  return scripts.run_mistakes(
    *("benchmarks.step_time", _MISTAKES, tmp_path_factory.mktemp("mistakes"), *_FLAGS),
    kept=folder,
    done=folder,
    elsewhere=elsewhere,
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", _MISTAKES)
def test_a_mistake_is_a_one_line_error(name, outcomes):
  scripts.assert_one_line(outcomes[name], _MISTAKES[name][1])


def _without_pytorch(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  for name in ("_torch_steps", "_torch_networks"):  # Other tests import them.
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    monkeypatch.delattr(f"benchmarks.{name}", raising=False)


def _on_a_tpu(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@pytest.mark.parametrize(
  ("where", "message"),
  [
    (_without_pytorch, "pip install '.[benchmarks]'"),
    (_on_a_tpu, "JAX computes on a TPU, but PyTorch needs"),
  ],
)
def test_a_peer_that_cannot_run_is_an_error(where, message, monkeypatch, tmp_path):
  where(monkeypatch)
  # The benchmark sets this variable; it is removed after the test.
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  done = scripts.run("benchmarks.step_time", "--peer=torch", cwd=tmp_path)
  scripts.assert_one_line(done, message)
  assert not list(tmp_path.iterdir())


def test_networks_that_mix_examples_are_not_timed_layer_by_layer():
  every = list(_steps.METHODS)
  for name, network in _networks.NETWORKS.items():
    pairs = _steps.pairs(name, every, _steps.ENGINES)
    # Seven methods without a choice of engine, and two methods with three engines.
    assert len(pairs) == len(set(pairs)) == 7 + 6 - 2 * network.mixes_examples
    assert (("l2rw", "layerwise") in pairs) != network.mixes_examples


class _Clock:
  """A clock that only advances while an implementation takes steps."""

  def __init__(self):
    self.now, self.log = 0.0, []

  def perf_counter(self):
    return self.now

  def implementation(self, name, seconds, loss=1.0):
    def run(steps):
      self.now += steps * seconds
      self.log.append((name, steps))
      return loss

    return _turns.Implementation(name, None, "jax", run, {})


@pytest.fixture
def clock(monkeypatch):
  clock = _Clock()
  monkeypatch.setattr(_turns, "time", clock)
  return clock


def test_every_implementation_takes_a_turn_in_every_round(clock):
  names = ["a", "b", "c"]
  measurements = _turns.take([clock.implementation(n, 0.25) for n in names], 20, 1e9)
  order = [name for name, _ in clock.log[3:]]
  rounds = list(zip(order[::3], order[1::3], order[2::3], strict=True))
  assert len(rounds) == 20 and all(sorted(r) == names for r in rounds)
  assert len(set(rounds)) > 3  # The order changes.
  for turns in measurements:
    np.testing.assert_allclose(turns.seconds, [0.25] * 20)
    assert turns.steps == 1


def test_short_steps_are_timed_together_after_an_untimed_step(clock):
  [turns] = _turns.take([clock.implementation("a", 0.004)], 3, 1e9)
  assert turns.steps == math.ceil(0.03 / 0.004) == 8
  assert clock.log[1:] == [("a", 1), ("a", 8)] * 3
  np.testing.assert_allclose(turns.seconds, [0.004] * 3)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 5), (6.5, 7), (100, 12)])
def test_no_round_begins_after_the_time_is_up(clock, seconds, rounds):
  [turns] = _turns.take([clock.implementation("a", 1.0)], 12, seconds)
  assert len(turns.seconds) == rounds


def test_a_loss_that_is_not_finite_is_reported(clock):
  with pytest.raises(FloatingPointError, match=r"a \(jax\): the loss is nan"):
    _turns.take([clock.implementation("a", 1.0, math.nan)], 3, 1.0)


def test_medians_and_ratios_of_the_same_turn_by_hand():
  turns = _turns.Turns(np.array([0.002, 0.008, 0.009]), 4)
  plain = _turns.Turns(np.array([0.001, 0.002, 0.009]), 1)
  summary = _turns.summary(turns, plain, turns._replace(seconds=3 * turns.seconds))
  expected = {"milliseconds": 8, "ratio": 2, "plain_milliseconds": 2}
  expected |= {"milliseconds_quartile_1": 5, "milliseconds_quartile_3": 8.5}
  expected |= {"ratio_quartile_1": 1.5, "ratio_quartile_3": 3}
  expected |= {"faster_than_torch": 3, "repeats": 3, "steps_per_turn": 4}
  assert summary == pytest.approx(expected)
  assert _turns.summary(turns, plain, None)["faster_than_torch"] is None


@functools.cache
def _problem():
  model = classifier.Classifier(mlp.MLP(3, (5,)), 3)
  rng = np.random.default_rng(0)

  def batch(size):
    images = rng.normal(size=(size, 4)).astype(np.float32)
    return {"image": images, "label": np.arange(size) % 3, "index": np.arange(size)}

  train, meta_batch = batch(7), batch(4)
  params, model_state = model.init(jax.random.key(0), train)
  problem = model.problem(class_counts=jnp.full(3, 5), num_examples=15, num_steps=1)
  inputs = base.Inputs(
    *(params, model_state, (), train, meta_batch, jnp.int32(0), jax.random.key(1))
  )
  return problem, inputs


@pytest.mark.ci
@pytest.mark.slow(unless=("l2rw-forward",))
@pytest.mark.parametrize("engine", ["forward", "layerwise"])
@pytest.mark.parametrize(
  ("literal", "fast"),
  [
    (_literal.l2rw(), l2rw.l2rw()),
    (_literal.mwn(0.1), meta_weight_net.meta_weight_net(0.1)),
  ],
  ids=["l2rw", "meta_weight_net"],
)
def test_the_literal_forms_compute_the_same_as_the_library(literal, fast, engine):
  problem, inputs = _problem()
  linearize = functools.partial(linearization.linearize, engine=engine)
  outcomes = collections.defaultdict(list)
  for method in (literal, fast):
    with_engine = dataclasses.replace(problem, linearize=linearize)
    state = method.init(jax.random.key(2), with_engine, inputs.params)
    run = jax.jit(lambda s, i, m=method, p=with_engine: m.gradients(s, p, i))
    result, state = run(state, inputs)
    phi = getattr(state, "params", ())
    for name, tree in (("grads", result.grads), ("phi", phi), ("w", result.weights)):
      outcomes[name].append(jax.tree.leaves(tree))
  for name, (first, second) in outcomes.items():
    for x, y in zip(first, second, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6, err_msg=name)


def test_no_operations_of_literal_programs_are_reported_on_other_devices(monkeypatch):
  lowered = jax.jit(jnp.dot).lower(jnp.ones((3, 4)), jnp.ones((4, 5)))
  compiled = lowered.compile()
  assert _steps.costs(lowered, compiled, literal=True)["flops"] > 0
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert _steps.costs(lowered, compiled)["flops"] == 2 * 3 * 4 * 5
  assert _steps.costs(lowered, compiled, literal=True)["flops"] is None


def test_operations_of_a_loop_are_not_reported():
  def loop(x):
    return jax.lax.scan(lambda y, _: (jnp.sin(y @ x), None), x, length=3)[0]

  lowered = jax.jit(loop).lower(jnp.ones((4, 4)))
  compiled = lowered.compile()
  # The reason: XLA counts the three products of the loop as one.
  assert _steps.costs(lowered, compiled)["flops"] < 3 * 2 * 4**3
  costs = _steps.costs(lowered, compiled, in_loop=True)
  assert costs["flops"] is None and costs["bytes_accessed"] is None
  assert costs["temporary_bytes"] >= 0


def test_the_matrix_peak_is_in_a_plausible_range():
  assert 1e6 < _steps.matrix_peak("float32", size=64, repeats=2) < 1e16
