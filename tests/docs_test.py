"""README and documentation: code runs, links exist, pages are listed."""

import pathlib
import re

import chex
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import run as run_lib

pytestmark = pytest.mark.promotes(
  "the documentation promises code for JAX's default promotion, which optax.adam needs"
)

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
METHODS = DOCS / "methods"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
TEXTS = [REPOSITORY / "README.md", REPOSITORY / "BUILD.md", *PAGES]


def name(path: pathlib.Path) -> str:
  return str(path.relative_to(REPOSITORY))


def code_blocks(path: pathlib.Path) -> list[str]:
  """The Python code blocks of a Markdown page; `make docs` runs the notebooks."""
  return re.findall(
    r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE
  )


def run(path: pathlib.Path, namespace: dict) -> dict:
  for number, block in enumerate(code_blocks(path)):
    exec(compile(block, f"{name(path)}, block {number}", "exec"), namespace)
  return namespace


def test_readme_is_short():
  assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_readme_code_runs():
  keys = jax.random.split(jax.random.key(0), 4)
  names = {
    "loss_fn": lambda p, example: (example["x"] @ p - example["y"]) ** 2,
    "params": jnp.ones(3),
    "batch": {
      "x": jax.random.normal(keys[0], (8, 3)),
      "y": jax.random.normal(keys[1], (8,)),
    },
    "meta_batch": {
      "x": jax.random.normal(keys[2], (4, 3)),
      "y": jax.random.normal(keys[3], (4,)),
    },
  }
  drop_in, by_hand = code_blocks(REPOSITORY / "README.md")
  exec(drop_in, names)
  grads, weights = names["grads"], names["info"].weights
  assert np.isclose(weights.sum(), 1)

  @jax.jit  # Without jit, each operation would be compiled separately.
  def results(block_inputs):
    all_names = names | block_inputs
    exec(by_hand, all_names)
    return all_names["grads"], all_names["w"].weights

  arrays = {key: names[key] for key in ("params", "batch", "meta_batch")}
  chex.assert_trees_all_close(results(arrays), (grads, weights), rtol=1e-5)


def test_readme_commands_are_make_targets():
  makefile = (REPOSITORY / "Makefile").read_text()
  commands = re.findall(
    r"(?:^    |`)make (\w+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE
  )
  assert {"demo", "test", "docs"} <= set(commands)
  for command in commands:
    assert f"\n{command}:" in makefile


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_exist(path):
  for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
    if not link.startswith(("http://", "https://", "#")):
      target = path.parent / link.partition("#")[0]
      assert target.exists(), f"{name(path)} links to {link}"


def test_every_page_is_in_a_table_of_contents():
  listed = {DOCS / "index.md"}
  for path in PAGES:
    for entries in re.findall(
      r"^```{toctree}\n(.*?)^```", path.read_text(), re.S | re.M
    ):
      lines = [x for x in entries.splitlines() if x and not x.startswith(":")]
      listed |= {path.parent / f"{entry}.md" for entry in lines}
  assert set(PAGES) == listed


def test_every_method_has_a_page_with_its_reference():
  text = "\n".join(path.read_text() for path in METHODS.glob("*.md"))
  documented = set(re.findall(r"automodule:: l2rw_jax\.methods\.([\w.]+)", text))
  root = REPOSITORY / "l2rw_jax" / "methods"
  files = [p.relative_to(root).with_suffix("") for p in root.rglob("*.py")]
  modules = {".".join(p.parts) for p in files if p.name != "__init__"}
  assert documented == modules


def test_code_of_the_first_page():
  names = run(DOCS / "index.md", {})
  np.testing.assert_allclose(names["info"].weights, [1, 0])


@pytest.mark.slow
def test_code_of_your_own_training_loop(tmp_path, monkeypatch):
  names = run(DOCS / "training_loop.md", {})
  # Padding has weight 0, and the weights of the real tokens sum to 1.
  token_weights = np.asarray(names["token_weights"])
  assert (token_weights[~names["text"]["mask"]] == 0).all()
  assert np.isclose(token_weights.sum(), 1, atol=1e-5)
  assert len(names["result"].weights["mean_weight"]) == 32
  assert np.isfinite(names["logits"]).all() and names["logits"].shape == (64, 3)
  # The page's loop continues a run that was interrupted after its checkpoint of step 3.
  take_steps, steps = run_lib.Run.take_steps, []

  def interrupted(self):
    if self.step == 4:
      raise KeyboardInterrupt
    return take_steps(self)

  def counted(self):
    steps.append(self.step)
    return take_steps(self)

  (tmp_path / "run").mkdir()
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(run_lib.Run, "take_steps", interrupted)
    names["train"](tmp_path / "run")
  monkeypatch.setattr(run_lib.Run, "take_steps", counted)
  chex.assert_trees_all_equal(names["train"](tmp_path / "run"), names["trained"])
  assert steps == [3, 4, 5]


def test_an_empty_sequence_of_the_page_has_loss_0():
  (source,) = (b for b in code_blocks(DOCS / "training_loop.md") if "def tokens" in b)
  definitions = source.partition("\nvalue_and_grad = ")[0]
  rng = np.random.default_rng(0)
  names = {"jax": jax, "jnp": jnp, "np": np, "losses": losses, "rng": rng}
  exec(compile(definitions, "training_loop.md", "exec"), names)
  text, losses_fn = names["text"], jax.jit(names["sequence_losses"])
  linearized = linearization.linearize(losses_fn, names["params"], text)
  assert linearized.engine == "layerwise"  # As the page says.
  before = losses_fn(names["params"], text)
  is_empty = np.arange(8) == 3
  masked = {**text, "mask": text["mask"] & ~is_empty[:, None]}
  values = losses_fn(names["params"], masked)
  np.testing.assert_allclose(values, np.where(is_empty, 0, before), rtol=1e-6)


def test_code_of_when_weights_do_not_help():
  names = run(DOCS / "when_weights_do_not_help.md", {})
  assert not names["info"].finite
  fault = names["l2rw_jax"].base.Fault(int(names["info"].fault))
  assert fault.name == "TRAINING_LOSSES"


@pytest.mark.slow
def test_code_of_speed(capsys):
  names = run(DOCS / "speed.md", {})
  *speeds, plan = capsys.readouterr().out.splitlines()
  # The first speed is that of a small batch, the second that of a large one.
  assert len(speeds) == 2 and all(re.fullmatch(r"\d+ GFLOP/s", x) for x in speeds)
  # The page prints the options of the chosen step and its bytes, which fit its budget.
  assert plan.startswith("{") and 0 < names["choice"].num_bytes <= 2**20
  assert names["weights"].shape == (256,)


def test_pages_with_code_are_those_of_the_tests_here():
  """If this fails for a new page, add a test that runs its code, like those above."""
  pages = {name(path) for path in TEXTS if code_blocks(path)}
  tested = {"index", "speed", "training_loop", "when_weights_do_not_help"}
  expected = {f"docs/{page}.md" for page in tested | {"your_own_data"}}
  methods = {name(path) for path in METHODS.glob("*.md")}
  assert pages - methods == expected | {"README.md"}


@pytest.fixture(scope="module")
def setup():
  return run(METHODS / "index.md", {})


# Conditions on the names that the code of each page defines.
_OUTCOMES = {
  "absgd": lambda r: np.isclose(r["weights"].sum(), 1 / 0.9) and r["log_u"] > 0,
  "adacore": lambda r: len(r["rows"]) == 4 and r["weights"].sum() == 8,
  "advisor": lambda r: moved(r, "psi") and moved(r, "params"),
  "bare": lambda r: np.isclose(r["weights"].sum(), 1) and (r["weights"] == 0).any(),
  "baselines": lambda r: np.isclose(r["weights"].sum(), 1) and r["loss"] > 0,
  "forml": lambda r: (
    not np.allclose(r["all_weights"], 1) and np.isclose(r["all_weights"].sum(), 20)
  ),
  "group_dro": lambda r: np.isclose(r["weights"].sum(), 1, atol=1e-5),
  "l2rw": lambda r: moved(r, "params") and np.isclose(r["weights"].sum(), 1),
  "label_transition": lambda r: np.isfinite(r["loss"]),
  "ldam_drw": lambda r: np.isclose(r["weights"].sum(), 1) and (r["losses"] > 0).all(),
  "logit_adjustment": lambda r: r["loss"] > 0 and len(r["predicted"]) == 8,
  "mentornet": lambda r: ((r["v"] >= 0) & (r["v"] <= 1)).all() and r["percentile"] > 0,
  "meta_weight_net": lambda r: moved(r, "phi") and moved(r, "params"),
  "nested_maml": lambda r: (
    (r["all_weights"][:5] == 1).all() and (r["all_weights"] != 1).any()
  ),
  "robust_losses": lambda r: r["loss"] > 0 and r["method"].needs_meta,
  "susceptibility": lambda r: r["drop"] > 0 and len(r["zeta"]) == 1,
  "warpi": lambda r: moved(r, "phi") and moved(r, "params"),
}


def moved(names: dict, name: str) -> bool:
  """Whether a step of the page has changed parameters."""
  leaves = jax.tree.leaves(names[name])
  before = jax.tree.leaves(names["start"][name])
  return any((np.asarray(a) != b).any() for a, b in zip(leaves, before, strict=True))


@pytest.mark.ci(unless=("index",))
@pytest.mark.slow(
  "mentornet",
  "warpi",
  "advisor",
  "nested_maml",
  "forml",
  "label_transition",
  "absgd",
  "bare",
  "group_dro",
)
@pytest.mark.parametrize("page", sorted(p.stem for p in METHODS.glob("*.md")))
def test_code_of_a_method(page, setup):
  if page == "index":
    assert setup["losses_fn"](setup["params"], setup["batch"]).shape == (8,)
    return
  names = dict(setup)
  names["start"] = {"params": setup["params"]}
  blocks = code_blocks(METHODS / f"{page}.md")
  assert blocks
  for number, block in enumerate(blocks):
    # Keep the parameters of the page's network before a step changes them.
    head, step, tail = block.partition("\n\n@jax.jit\n")
    source = f"{page}.md, block {number}"
    exec(compile(head, source, "exec"), names)
    for key in ("phi", "psi"):
      if key in names:
        names["start"].setdefault(key, jax.tree.map(np.asarray, names[key]))
    exec(compile(step + tail, source, "exec"), names)
  assert _OUTCOMES[page](names)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_loaded_network_preprocesses_its_inputs_as_in_training(
  dtype, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  x = rng.integers(256, size=(5, 4)).astype(dtype)
  kernel = rng.normal(size=(4, 3)).astype(np.float32)
  params = {"Dense_0": {"kernel": kernel, "bias": np.ones(3, np.float32)}}
  folder = tmp_path / "runs" / "arrays" / "seed-0"
  folder.mkdir(parents=True)
  stored = {"params": params, "model_state": {}}
  (folder / "variables.msgpack").write_bytes(serialization.msgpack_serialize(stored))
  names = {"x_test": x, "model": classifier.Classifier(mlp.MLP(3, ()), 3)}
  exec(code_blocks(DOCS / "your_own_data.md")[-1], names)
  expected = x @ kernel / (255 if dtype == np.uint8 else 1) + 1
  np.testing.assert_allclose(names["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_your_own_data(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)

  def points(size, wrong=0):
    y = rng.integers(3, size=size)
    x = 4 * np.eye(3)[y] + rng.normal(size=(size, 3))
    y[:wrong] = (y[:wrong] + 1) % 3
    return x.astype(np.float32), y

  names = {}
  for suffix, wrong, size in (("", 15, 150), ("_trusted", 0, 9), ("_test", 0, 60)):
    names["x" + suffix], names["y" + suffix] = points(size, wrong)
  blocks = code_blocks(DOCS / "your_own_data.md")
  training, groups, page, corrected, rows, loading = blocks
  lines = training.split("\n\n")[1].strip().splitlines()
  assert len(lines) < 10  # The page promises a few lines for arrays.
  exec(training, names)
  run, issues = names["run"], names["issues"]
  assert run.metrics["last"]["accuracy"] > 0.9
  assert len(set(issues.index[:15]) & set(range(15))) >= 13
  exec(groups, names)
  by_group = names["grouped_run"].metrics["last"]
  assert by_group["worst_group_accuracy"] == min(
    by_group["accuracy_group_0"], by_group["accuracy_group_1"]
  )
  exec(page, names)
  assert "Label issues" in (tmp_path / "issues.html").read_text()
  (tmp_path / "corrected_labels.csv").write_text("index,label\n0,b\n7,c\n")
  exec(corrected, names)
  np.testing.assert_array_equal(names["x_corrected"], names["x"][[0, 7]])
  assert names["y_corrected"].tolist() == [1, 2]
  exec(rows, names)
  train, streamed = names["data"].train, names["streamed"].train
  assert not isinstance(streamed.image, np.ndarray)
  np.testing.assert_array_equal(streamed.image[np.array([7, 2])], train.image[[7, 2]])
  exec(loading, names)
  right = np.argmax(names["logits"], axis=1) == names["y_test"]
  assert np.isclose(right.mean(), run.metrics["last"]["accuracy"])
