"""The few-shot experiment on digits: its files and its errors."""

import json

from flax import linen as nn
import numpy as np
from PIL import Image
import pytest
import scripts

from experiments import few_shot as script
from l2rw_jax import base
from l2rw_jax.data import sources
from l2rw_jax.models import conv4

_NAME = "few_shot"
_SMALL = (
  "--dataset=digits",
  "--ood=shuffled",
  "--width=4",
  "--num_adaptation_steps=1",
  "--num_steps=4",
  "--num_tasks=24",
  "--num_meta_tasks=8",
  "--num_test_tasks=5",
  "--num_clusters=6",
  "--batch_size=4",
  "--meta_batch_size=4",
  "--num_seeds=2",
  "--num_devices=1",
)
_METHODS = ["maml", "maml_removed", "nested_maml"]


class _Linear(nn.Module):
  """Logits that are linear in the pixels."""

  num_outputs: int

  @nn.compact
  def __call__(self, images, train=False):
    return nn.Dense(self.num_outputs)(images.reshape(images.shape[0], -1))


@pytest.fixture(scope="module", autouse=True)
def make_learner():
  """The original `make_learner`; runs use one whose network compiles faster."""
  original = script.make_learner

  def linear(settings):
    return original(settings)._replace(network=_Linear(settings.ways))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(script, "make_learner", linear)
    yield original


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A short run's folder and what it printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  methods = f"--methods={','.join(_METHODS)}"
  done = scripts.run(_NAME, *_SMALL, methods, "--ood_share=0.5", cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


@pytest.mark.ci
def test_the_table(run):
  _, printed = run
  header, *lines = scripts.table(printed)
  assert header == [
    "ood",
    "ood_share",
    "noise_share",
    "method",
    "meta-test accuracy %",
    "interval over tasks, ± %",
    "weight of in-distribution tasks",
    "weight of other tasks",
    "AUROC of weights",
    "seeds",
  ]
  assert [line[3] for line in lines] == _METHODS
  assert {tuple(line[:3]) for line in lines} == {("shuffled", "0.5", "0")}
  weights = {line[3]: line[6] for line in lines}
  assert weights["maml"] == "-" and weights["nested_maml"] != "-"
  assert "2-way, 1-shot, test classes" in printed
  last = printed.splitlines()[-1]
  assert last == "written: runs/few_shot/results.json, results.csv, figure.png"


@pytest.mark.ci
def test_rows_describe_their_runs(run):
  folder, _ = run
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert flags["ood_share"] == [0.5] and flags["dataset"] == "digits"
  assert len(rows) == len(csv_rows) == 2 * len(_METHODS)
  for row in rows:
    assert 0 <= row["accuracy_percent"] <= 100 and row["interval_percent"] >= 0
    assert row["num_tasks"] == (12 if row["method"] == "maml_removed" else 24)
    assert (row["weight_auroc"] is None) == (row["method"] != "nested_maml")
  # maml and nested_maml have the same problem; every seed has a different one.
  by_method = {(r["method"], r["seed"]): r["data"] for r in rows}
  assert by_method["maml", 0] == by_method["nested_maml", 0]
  assert by_method["maml", 0] != by_method["maml", 1]
  assert by_method["maml", 0] != by_method["maml_removed", 0]
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ci
def test_weights_are_probed_from_the_start(run):
  folder, _ = run
  path = folder / "ood-0.5" / "nested_maml" / "seed-0" / "seed-0" / "results.json"
  probes = json.loads(path.read_text())["probes"]
  assert probes["step"] == [0, 4] and probes["in_distribution_weight"][0] == 1.0
  weights = np.genfromtxt(path.parent / "weights.csv", delimiter=",", names=True)
  assert len(weights) == 24 and "label" not in weights.dtype.names
  assert np.nansum(weights["seen"]) == 4 * 4


@pytest.mark.slow
def test_a_run_adds_another_ood_share_and_share_item_weights_single_images(run):
  folder, _ = run
  before = scripts.contents(folder / "ood-0.5")
  more, items = scripts.run_many(
    _NAME,
    [
      [
        *_SMALL,
        "--methods=maml,maml_zeroed",
        "--ood_share=0.5",
        "--ood_share=0.25",
        f"--workdir={folder}",
      ],
      [
        *(text for text in _SMALL if "num_clusters" not in text),
        "--ood=none",
        "--noise_share=0.5",
        "--share=item",
        "--methods=nested_maml_fo,l2rw,meta_only",
        "--rotations",
        "--num_seeds=1",
        f"--workdir={folder.parent}/items",
      ],
    ],
  )
  for done in (more, items):
    assert done.status == 0 and done.stderr == "", done
  after = scripts.contents(folder / "ood-0.5")
  assert {path: after[path] for path in before} == before
  rows, _, _ = scripts.saved_rows(folder)
  assert {row["ood_share"] for row in rows} == {0.5, 0.25} and len(rows) == 2 * 4
  # maml_zeroed knows which tasks are out of distribution, so its weights separate them.
  aurocs = [r["weight_auroc"] for r in rows if r["method"] == "maml_zeroed"]
  assert aurocs == [1.0] * 4
  rows, _, _ = scripts.saved_rows(folder.parent / "items")
  by_method = {r["method"]: r for r in rows}
  assert by_method["nested_maml_fo"]["wrong_weight"] is not None
  assert by_method["nested_maml_fo"]["ood_weight"] is None
  assert by_method["l2rw"]["right_weight"] is None


def test_the_network_is_conv4_and_fits_the_tasks(make_learner):
  settings = script.Settings(dataset="digits", ood="shuffled", num_clusters=1)
  settings = settings.replace(num_tasks=6, num_meta_tasks=2, num_test_tasks=2)
  learner = make_learner(settings)
  assert learner.network == conv4.Conv4(2, 32, pool=False)
  train = script.make_problem(settings, 0.5, seed=0).splits.train
  learner.check({"image": train.image, "label": train.label}, 2)
  learner = make_learner(settings.replace(dataset="mini_imagenet", width=8))
  assert learner.network == conv4.Conv4(5, 8, pool=True)


def test_every_kind_of_out_of_distribution_source_can_be_read(tmp_path):
  images = np.random.default_rng(0).integers(256, size=(20, 5, 5, 3), dtype=np.uint8)
  labels = np.arange(20) % 2
  parts = {"X": images, "y": labels, "X_test": images, "y_test": labels}
  np.savez(tmp_path / "images.npz", **parts)
  rows = images.reshape(20, -1) + np.float32(0.5)
  np.savez(tmp_path / "rows.npz", **{**parts, "X": rows, "X_test": rows})
  train = sources.load("digits", "train")
  for name, size in (("digits", 1297), (f"npz:{tmp_path}/images.npz", 20)):
    source = script.ood_source(script.Settings(ood=name), train, 0)
    assert source.images.shape == (size, 8, 8, 1)
  with pytest.raises(base.InputError, match="has no uint8 images"):
    script.ood_source(script.Settings(ood=f"npz:{tmp_path}/rows.npz"), train, 0)


def test_a_users_data_are_read_for_each_settings_object(tmp_path, capsys):
  def settings():
    return script.Settings(
      **{"dataset": f"images:{tmp_path / 'own'}", "ood": "none", "num_ways": 2},
      **{"num_tasks": 2, "num_meta_tasks": 1, "num_test_tasks": 2, "num_clusters": 1},
      num_queries=1,
    )

  for label in "abcdefghijklmnop":
    folder = tmp_path / "own" / label
    folder.mkdir(parents=True)
    for i in range(5):
      image = np.full((4, 4), 10 * i, np.uint8)
      Image.fromarray(image).save(folder / f"{i}.png")
  (tmp_path / "own" / "a" / "bad\x1b.png").write_text("")
  problem = script.make_problem(settings(), 0.0, seed=0)
  # What was skipped is printed, without characters that a terminal would execute.
  assert "1 skipped (a/bad\\x1b.png: it is not an image)" in capsys.readouterr().out
  for path in (tmp_path / "own").glob("*/?.png"):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(path)
  changed = script.make_problem(settings(), 0.0, seed=0)
  assert changed.splits.train.image[:1].min() == 200
  assert problem.splits.train.image[:2].max() <= 40
  table = tmp_path / "t.csv"
  table.write_text("a,label\n" + "".join(f"{i * i},{i % 8}\n" for i in range(80)))
  with pytest.raises(base.InputError, match=r"--dataset=csv.* has no uint8 images"):
    script.make_problem(settings().replace(dataset=f"csv:{table}"), 0.0, seed=0)


@pytest.mark.filterwarnings("error")
def test_fewer_different_tasks_than_clusters_cause_no_warning():
  settings = script.Settings(dataset="digits", ood="none", num_meta_tasks=2)
  settings = settings.replace(num_tasks=60, num_test_tasks=2)
  problem = script.make_problem(settings, 0.0, seed=0)
  # The four training classes form six pairs, and a task has two classes.
  assert len(np.unique(problem.splits.train.group)) == 6 < settings.num_clusters


@pytest.mark.parametrize(("share", "num_clusters"), [("item", None), ("cluster", 3)])
def test_clusters_that_are_not_used_limit_and_name_nothing(share, num_clusters):
  settings = script.Settings(dataset="digits", ood="none", num_meta_tasks=2)
  settings = settings.replace(num_tasks=3, num_test_tasks=2, share=share)
  settings = settings.replace(num_clusters=num_clusters or settings.num_clusters)
  problem = script.make_problem(settings, 0.0, seed=0)
  assert len(problem.pool.is_ood) == 3
  method = script.make_method(settings, "nested_maml_fo")
  cell = script.make_cell(settings, "nested_maml_fo", method, 0.0, 0, problem)
  assert cell.facts["num_clusters"] == num_clusters


_MISTAKES = {
  "unknown_method": (["--methods=reptile"], "--methods=reptile: choose among maml"),
  "no_method": (["--methods="], "--methods= is empty: choose among maml"),
  "ways": (["--num_ways=3"], "a task needs --num_ways = 3 classes, but digits"),
  "shots": (["--num_shots=200"], "--num_shots + --num_queries = 205 images of a class"),
  "zero_shots": (["--num_shots=0"], "--num_shots=0 must lie between 1 and"),
  "share_one": (["--ood_share=1"], "--ood_share=1 must lie between 0 and 0.999999"),
  "tasks": (["--num_tasks=20000000000"], "--num_tasks=20000000000 must lie between"),
  "share_unused": (["--ood=none", "--ood_share=0.3"], "--ood_share has no effect"),
  "no_workdir": (["--workdir="], "--workdir= is empty"),
  "digits": (["--num_steps=\uff13"], "write it in ASCII"),
  "share_nan": (["--ood_share=nan"], "--ood_share=nan is not a finite number"),
  "noise": (["--noise_share=2"], "=2 must lie between 0 and 1"),
  "ood": (["--ood=svhn"], "--ood=svhn: unknown data set 'svhn'; choose digits"),
  "no_data": (["--ood=mnist", "--data_dir={tmp}/none"], "'mnist' does not exist"),
  "clusters_unused": (
    ["--share=item"],
    "--num_clusters has no effect with --share=item",
  ),
  "shots_advice": (["--num_shots=200"], "Lower --num_shots or --num_queries."),
  "no_folder": (["--dataset=mini_imagenet"], "mini_imagenet needs --data_dir="),
  "empty_folder": (
    ["--dataset=mini_imagenet", "--data_dir={tmp}"],
    "train has no class folders",
  ),
  "clusters": (["--num_clusters=25"], "must lie between 1 and 24, the number of tasks"),
  "clip": (["--clip=-1"], "=-1 must lie between"),
  "batch": (["--batch_size=25"], "--batch_size=25 is larger than the 24 training"),
  "batch_of_few": (
    ["--ood_share=0.9", "--methods=maml_removed"],
    "--batch_size=4 is larger than the 2 training examples",
  ),
  "meta_batch": (["--meta_batch_size=9"], "larger than the meta set of 8 clean"),
  "other_settings": (
    ["--workdir={run}", "--ood_share=0.5", "--width=8"],
    "width was 4, now 8",
  ),
}


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *_SMALL, kept=run[0], tmp=folder, run=run[0]
  )


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])
