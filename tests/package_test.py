"""What a newcomer meets: the package, its README, its imports."""

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2rw_jax

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Nobody who weighs examples should wait for these, let alone install them.
HEAVY = (
  "tensorflow",
  "tensorflow_datasets",
  "sklearn",
  "orbax",
  "matplotlib",
  "tensorboardX",
  "absl.flags",
)


def test_importing_the_functions_imports_nothing_heavy():
  code = (
    "import sys, jax, flax.linen, optax, chex; before = set(sys.modules)\n"
    "import l2rw_jax\n"
    f"print([m for m in {HEAVY} if m in set(sys.modules) - before])"
  )
  found = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
  )
  assert found.stdout.strip() == "[]"


def readme_blocks() -> list[str]:
  text = (REPOSITORY / "README.md").read_text()
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def readers_project():
  """What the reader of the README has: a loss of one example, and data."""
  keys = jax.random.split(jax.random.key(0), 4)
  batch = {
    "x": jax.random.normal(keys[0], (8, 3)),
    "y": jax.random.normal(keys[1], (8,)),
  }
  clean = {
    "x": jax.random.normal(keys[2], (4, 3)),
    "y": jax.random.normal(keys[3], (4,)),
  }
  return {
    "l2rw_jax": l2rw_jax,
    "loss_fn": lambda p, example: (example["x"] @ p - example["y"]) ** 2,
    "params": jnp.ones(3),
    "batch": batch,
    "meta_batch": clean,
  }


def test_readme_examples_run_in_order_and_agree(readers_project):
  first, drop_in, precision = readme_blocks()[:3]
  exec(first, readers_project)
  by_hand, weights = readers_project["grads"], readers_project["w"].weights
  assert np.isclose(weights.sum(), 1)
  exec(drop_in, readers_project)
  np.testing.assert_allclose(readers_project["grads"], by_hand, rtol=1e-5)
  exec(precision, readers_project)
  np.testing.assert_allclose(readers_project["w"].weights, weights, rtol=1e-5)


@pytest.fixture
def classifiers_project():
  """The same reader with a classifier: features, a head, labels and groups."""
  rng = np.random.default_rng(0)

  def examples(size):
    x = rng.normal(size=(size, 3)).astype(np.float32)
    return {"x": x, "label": rng.integers(3, size=size)}

  def features_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["w"])

  def head(params, features):
    return features @ params["v"]

  def logits_fn(params, batch):
    return head(params, features_fn(params, batch))

  def losses_fn(params, batch):
    return cross_entropy(logits_fn(params, batch), batch["label"])

  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  batch = examples(8)
  return {
    "jax": jax,
    "optax": optax,
    "features_fn": features_fn,
    "head": head,
    "logits_fn": logits_fn,
    "losses_fn": losses_fn,
    "cross_entropy": cross_entropy,
    "params": {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 3))},
    "batch": batch,
    "meta_batch": examples(6),
    "labels": batch["label"],
    "groups": jnp.array([0, 1, 0, 1, 0, 1]),
    "num_groups": 2,
    "kept": jnp.ones(20),
    "index": jnp.arange(8) + 5,
    "percentile": 0.0,
    "log_u": -jnp.inf,
    "class_counts": jnp.array([50, 20, 5]),
    "cosines_fn": lambda p, b: jnp.cos(logits_fn(p, b)),
    "epoch": 30,
    "noise": rng.normal(size=(2, 8, 3)),
  }


def _start_weight_net(key):
  return {"phi": l2rw_jax.meta_weight_net.WeightNet().init(key, jnp.zeros(1))}


def _start_rectifier(key):
  net = l2rw_jax.warpi.RectifierNet(3)
  return {"net": net, "phi": net.init(key, jnp.zeros((1, 3)), jnp.zeros(1, int))}


def _start_tasks(key):
  def tasks(key, number):
    x = jax.random.normal(key, (number, 6, 3))
    whole = {"x": x, "label": jnp.tile(jnp.arange(3), (number, 2))}
    support, query = (
      jax.tree.map(lambda v, part=part: v[:, part], whole)
      for part in (slice(0, 3), slice(3, 6))
    )
    return {"support": support, "query": query}

  one, other = jax.random.split(key)
  return {"tasks": tasks(one, 8), "meta_tasks": tasks(other, 4)}


def _start_optimizer(key):
  del key
  return {"optimizer": optax.sgd(0.1), "opt_state": (optax.EmptyState(),) * 2}


def _start_advisor(key):
  net = l2rw_jax.advisor.AdvisorNet(4)
  return {"net": net, "psi": net.init(key, jnp.zeros((1, 4)), jnp.zeros(1))}


# First words of each block: what its reader has made before, what it makes.
_BLOCKS = {
  "Meta-Weight-Net": (_start_weight_net, ["lesson", "weights"]),
  "MentorNet": (lambda key: {}, ["v", "percentile"]),
  "WarPI": (_start_rectifier, ["lesson"]),
  "The advisor": (_start_advisor, ["lesson"]),
  "FORML": (lambda key: {}, ["kept"]),
  "ABSGD": (lambda key: {}, ["weights", "log_u"]),
  "LDAM-DRW": (lambda key: {}, ["weights", "losses"]),
  "BARE": (lambda key: {}, ["weights"]),
  "NestedMAML": (_start_tasks, ["kept"]),
  "Susceptibility": (_start_optimizer, ["drop"]),
  "AdaCore": (lambda key: {}, ["rows", "weights"]),
}
_ON_THE_HOST = ("AdaCore",)


def test_readme_has_each_method_in_a_few_lines(classifiers_project):
  imports, *blocks = readme_blocks()[3:]
  reader = classifiers_project
  exec(imports, reader)
  assert len(blocks) == len(_BLOCKS)
  for block, (name, (start, made)) in zip(blocks, _BLOCKS.items(), strict=True):
    assert block.startswith(f"# {name}"), block

    def run(key, block=block, start=start, made=made):
      names = reader | start(key)
      exec(block, names)
      return {name: names[name] for name in made}

    # One program a block: eagerly, each operation of it would be compiled.
    run = run if name in _ON_THE_HOST else jax.jit(run)
    found = run(jax.random.key(0))
    if "lesson" in found:
      assert optax.tree.norm(found["lesson"].gradient) > 0
    if name == "Meta-Weight-Net":
      assert found["weights"].shape == (8,) and (found["weights"] > 0).all()
    if name == "MentorNet":
      assert set(np.unique(found["v"])) <= {0, 1} and found["percentile"] > 0
    if name == "FORML":
      assert np.isclose(found["kept"].sum(), 20, atol=1e-4)
      assert not np.allclose(found["kept"], 1)
    if name == "ABSGD":  # the first sum is 1 / gamma
      assert np.isclose(found["weights"].sum(), 1 / 0.9) and found["log_u"] > 0
    if name == "LDAM-DRW":
      assert np.isclose(found["weights"].sum(), 1) and (found["losses"] > 0).all()
    if name == "BARE":
      assert np.isclose(found["weights"].sum(), 1) and (found["weights"] == 0).any()
    if name == "NestedMAML":
      assert not np.allclose(found["kept"][5:13], 1) and (found["kept"][:5] == 1).all()
    if name == "Susceptibility":
      assert found["drop"] > 0
    if name == "AdaCore":
      assert len(found["rows"]) == 4 and found["weights"].sum() == 8


def test_makefile_and_readme_name_the_same_commands():
  readme, makefile = (
    (REPOSITORY / name).read_text() for name in ("README.md", "Makefile")
  )
  for target in re.findall(r"^    make (\w+)", readme, re.MULTILINE):
    assert f"\n{target}:" in makefile


def test_the_wheel_installs_the_library_alone(tmp_path):
  # A top-level package `experiments` would hide that of a user's project.
  code = (
    "import sys; from setuptools import build_meta;"
    "print(build_meta.build_wheel(sys.argv[1]))"
  )
  source = tmp_path / "source"
  source.mkdir()
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(REPOSITORY / name, source)
  for name in ("l2rw_jax", "experiments"):
    shutil.copytree(REPOSITORY / name, source / name)
  subprocess.run(
    [sys.executable, "-c", code, tmp_path], check=True, capture_output=True, cwd=source
  )
  (wheel,) = tmp_path.glob("*.whl")
  names = zipfile.ZipFile(wheel).namelist()
  top_level = {name.split("/")[0] for name in names}
  assert {name for name in top_level if ".dist-info" not in name} == {"l2rw_jax"}
  assert "l2rw_jax/py.typed" in names
