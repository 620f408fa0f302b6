"""The page of label issues: safe with hostile text, small, and usable in a browser."""

import csv
import io
import json
import re
import time

import browser
import numpy as np
from PIL import Image
import pytest

from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax.audit import page
from l2rw_jax.data import own_data

_HOSTILE = '</script><script>window.hacked=1</script><!--<img src=x onerror="hacked=2">'
_CLASSES = ("cat", _HOSTILE, '=HYPERLINK("http://a.example")')


def make_issues(size, num_classes=3, seed=0):
  """A ranking by predictions that favor a random class for a fifth of the labels."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(num_classes, size=size)
  truth = np.where(rng.random(size) < 0.2, rng.integers(num_classes, size=size), labels)
  p = rng.dirichlet(np.full(num_classes, 0.5), size) + 3 * np.eye(num_classes)[truth]
  p /= p.sum(axis=1, keepdims=True)
  statistics = {
    "seen": np.full(size, 10.0),
    "mean_loss": -np.log(p[np.arange(size), labels]),
    "mean_margin": rng.normal(size=size),
    "mean_probabilities": p,
  }
  return audit.find_label_issues(statistics, labels)


def _png(shade):
  file = io.BytesIO()
  Image.new("L", (4, 4), shade).save(file, "PNG")
  return file.getvalue()


def _names(size):
  names = [f"folder/image {i}.png" for i in range(size)]
  return [_HOSTILE, "=1+1.png", 'a "quoted", name.png', *names][:size]


def _build(size=120, **options):
  issues = make_issues(size)
  options = {
    "key": "path",
    "pictures": [_png(10 * i) for i in range(5)],
    "columns": {_HOSTILE: [_HOSTILE] * 60, "=A1": ["'"] * 60},
    "notes": [_HOSTILE],
    "title": _HOSTILE,
  } | options
  return issues, page.build(issues, _CLASSES, _names(size), **options)


def _content(html):
  (text,) = re.findall(r'id="data">(.*?)</script>', html)
  return json.loads(text)


def test_text_cannot_become_markup():
  _, html = _build()
  assert html.count("<script") == 2 and html.count("</script>") == 2
  assert "onerror" in html and "<img" not in html and "<!--" not in html
  content = _content(html)
  assert content["title"] == content["notes"][0] == content["classes"][1] == _HOSTILE
  assert "default-src 'none'" in html and "'unsafe-inline'; script-src 'sha256-" in html
  assert not re.search(r"(src|href)=[\"']?(http|//)|@import|url\(", html)


def test_the_page_says_what_the_ranking_says():
  issues, html = _build()
  content = _content(html)
  assert content["index"] == issues.index.tolist()
  assert content["given"] == issues.given.tolist()
  assert content["num_issues"] == issues.num_issues
  assert set(content["statistics"]) == {"mean_loss", "mean_margin"}
  np.testing.assert_allclose(content["score"], issues.score, atol=5e-5)
  top = np.reshape(content["top_classes"], (120, 3))
  shares = np.reshape(content["top_shares"], (120, 3)) / 1000
  p = issues.statistics["mean_probabilities"]
  np.testing.assert_allclose(shares, np.take_along_axis(p, top, 1), atol=5e-4)
  assert (np.diff(shares, axis=1) <= 0).all()
  assert (top == issues.given[:, None]).any(axis=1).all()


def test_of_many_classes_the_given_and_the_suggested_are_drawn():
  issues = make_issues(50, num_classes=30)
  names = [str(c) for c in range(30)]
  top = np.reshape(
    _content(page.build(issues, names, _names(50)))["top_classes"], (50, 4)
  )
  for label in (issues.given, issues.suggested):
    assert (top == label[:, None]).any(axis=1).all()


def test_examples_that_were_never_seen_come_last_and_have_no_score():
  issues = make_issues(6)
  p = issues.statistics["mean_probabilities"][np.argsort(issues.index)].copy()
  p[2] = np.nan
  issues = audit.find_label_issues({"mean_probabilities": p}, np.array([0, 1, 2] * 2))
  content = _content(page.build(issues, _CLASSES, _names(6)))
  assert content["index"][-1] == 2 and content["score"][-1] is None


def test_mistakes_are_one_line_errors():
  issues = make_issues(5)
  with pytest.raises(
    base.InputError, match="names must have 5 entries and class_names"
  ):
    page.build(issues, _CLASSES, ["a"])
  with pytest.raises(base.InputError, match="key must be 'path' or 'index'"):
    page.build(issues, _CLASSES, _names(5), key="row")
  for options, message in (
    ({"rows": np.arange(9)}, r"rows must have shape \[5\].*got \(9,\)"),
    ({"rows": np.zeros((5, 1))}, r"rows must have shape \[5\]"),
    ({"duplicate_of": [-1]}, r"duplicate_of must have shape \[5\]"),
    ({"pictures": [b""] * 6}, "pictures has 6 entries, but there are only 5 examples"),
    ({"columns": {"a": "123456"}}, r"columns\['a'\] has 6 entries"),
  ):
    with pytest.raises(base.InputError, match=message):
      page.build(issues, _CLASSES, _names(5), **options)


def _large():
  size, names = 100_000, [f"class_{c:02d}/IMG_2024_{c:08d}.jpg" for c in range(100_000)]
  issues = make_issues(size, num_classes=10)
  return page.build(issues, [f"class {c}" for c in range(10)], names, key="path")


def test_the_page_of_a_hundred_thousand_examples_has_a_few_megabytes():
  started = time.process_time()
  html = _large()
  assert time.process_time() - started < 30
  assert len(html.encode()) < 15e6


# -- in a browser ------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
  browser.find()
  with browser.started(tmp_path_factory.mktemp("profile")) as opened:
    yield opened


_CAPTURE = """
URL.createObjectURL = (blob) => { window.exported = blob.text(); return "blob:none"; };
document.getElementById("export").click();
window.exported
"""


# The number of decisions, as soon as there are four, or after a minute.
_WAIT_FOR_FOUR = """
new Promise((done) => {
  const answer = () => done(decisions.size);
  if (decisions.size === 4) answer();
  window.addEventListener("storage", () => decisions.size === 4 && answer());
  setTimeout(answer, 60000);
})
"""


def _open(tab, folder, html, **size):
  path = folder / "issues.html"
  path.write_text(html)
  tab.open(path, **size)
  tab.run("localStorage.clear(); decisions.clear(); update()")


@pytest.mark.browser
def test_hostile_text_is_shown_and_not_run(tab, tmp_path):
  _open(tab, tmp_path, _build()[1])
  assert tab.run("typeof window.hacked") == "undefined"
  assert tab.run("document.scripts.length") == 2
  assert tab.run("document.querySelector('h1').textContent") == _HOSTILE
  assert tab.run("[...document.images].every((x) => x.naturalWidth === 4)")
  assert tab.requests() == [] and tab.errors() == []


@pytest.mark.browser
def test_filters_sorts_and_pages(tab, tmp_path):
  issues, html = _build()
  _open(tab, tmp_path, html)

  def cards():
    return tab.run("document.querySelectorAll('.card').length")

  def choose(name, value):
    tab.run(
      f"at({name!r}).value = {value!r};"
      f"at({name!r}).dispatchEvent(new Event('change')); undefined"
    )

  assert cards() == min(48, issues.num_issues)
  choose("scope", "all")
  assert cards() == 48 and "of 120 examples" in tab.run("at('shown').textContent")
  tab.run("at('next').click(); at('next').click()")
  assert cards() == 120 - 96 and tab.run("at('next').disabled")
  choose("given", "2")
  choose("suggested", "0")
  expected = int(((issues.given == 2) & (issues.suggested == 0)).sum())
  assert cards() == expected
  tab.run("at('clear').click()")
  choose("sort", "+mean_loss")  # The largest first.
  order = tab.run("shown.map((row) => data.index[row])")
  losses = issues.statistics["mean_loss"][: issues.num_issues]
  assert order[0] == issues.index[np.argmax(losses)]
  for threshold in (0.5, 0):
    choose("scope", str(threshold))
    shown = tab.run("shown.length")
    assert shown == (np.round(issues.score, 4) >= threshold).sum()
  tab.run("document.querySelector('.matrix button:not(:disabled)').click()")
  given, suggested = tab.run("[filter.given, filter.suggested]")
  flagged = slice(0, issues.num_issues)
  assert tab.run("shown.length") == int(
    (
      (issues.given[flagged] == int(given))
      & (issues.suggested[flagged] == int(suggested))
    ).sum()
  )


@pytest.mark.browser
def test_decisions_by_keyboard_are_exported_and_can_be_read_again(tab, tmp_path):
  issues, html = _build()
  _open(tab, tmp_path, html)
  tab.run("document.querySelector('.card').focus()")
  for key in ("r", "ArrowRight", "x", "ArrowRight", "k", "ArrowRight", "r"):
    tab.key(key)
  states = [
    tab.run(f"document.querySelectorAll('.card')[{i}].dataset.decision")
    for i in range(5)
  ]
  assert states == ["relabel", "remove", "keep", "relabel", ""]
  tab.run(  # Chooses the third class, not the suggested one, with the mouse.
    "const s = document.querySelectorAll('.card select')[4];"
    "s.dispatchEvent(new Event('pointerdown')); s.value = '2';"
    "s.dispatchEvent(new Event('change')); undefined"
  )
  text = tab.run(_CAPTURE)
  rows = {row["path"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
  names = _names(120)
  assert len(rows) == 119 and names[issues.index[1]] not in rows
  # A leading quote keeps spreadsheets from evaluating a formula.
  assert "'=1+1.png" in rows and "'" + _CLASSES[2] in {
    r["label"] for r in rows.values()
  }
  labels = np.empty(120, int)
  labels[issues.index] = issues.given
  for rank in (0, 3):
    labels[issues.index[rank]] = issues.suggested[rank]
  labels[issues.index[4]] = 2

  # The reader of image folders accepts the exported file.
  folder = tmp_path / "images"
  folder.mkdir()
  (folder / "=1+1.png").write_bytes(_png(1))
  (folder / "folder").mkdir()
  for number in range(117):
    (folder / "folder" / f"image {number}.png").write_bytes(_png(number))
  (folder / "labels.csv").write_text(text, newline="")
  data = own_data.read(f"images:{folder}")
  assert "=1+1.png" in data.names and len(data.names) >= 116
  for name, label in zip(data.names, data.labels, strict=True):
    assert data.form.class_names[label] == _CLASSES[labels[names.index(name)]]

  tab.run("at('undo').click()")
  num_stored = "JSON.parse(localStorage.getItem(STORE) || '[]').length"
  assert tab.run(f"[decisions.size, {num_stored}]") == [4, 4]
  # Decisions survive a reload. A busy browser may store them only after the reload; it
  # then sends a storage event.
  tab.reload()
  assert tab.run(_WAIT_FOR_FOUR) == 4
  # Another window also announces its decisions by a storage event.
  tab.run(
    "localStorage.setItem(STORE, JSON.stringify([[0, ['keep']]]));"
    "window.dispatchEvent(new StorageEvent('storage', { key: STORE }))"
  )
  assert tab.run("decisions.size") == 1
  assert tab.run("document.querySelector('.card').dataset.decision") == "keep"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_window(tab, tmp_path, width):
  long = "a_very_long_name_without_a_single_space_" * 5
  issues = make_issues(30)
  html = page.build(
    issues,
    (long, "b", long + "2"),
    [long + str(i) for i in range(30)],
    columns={long: [long] * 30},
    notes=[long],
    title=long,
  )
  _open(tab, tmp_path, html, width=width, height=800)
  assert tab.run("document.documentElement.scrollWidth") <= width
  card_width = tab.run("document.querySelector('.card').getBoundingClientRect().width")
  assert 250 < card_width <= width


@pytest.mark.slow
@pytest.mark.browser
def test_a_hundred_thousand_examples_are_usable(tab, tmp_path):
  _open(tab, tmp_path, _large())
  seconds = tab.run(
    "const t = performance.now(); filter.scope = 'all'; filter.query = '_0009';"
    "filter.sort = '+mean_loss'; update(); (performance.now() - t) / 1000"
  )
  assert tab.run("document.querySelectorAll('.card').length") == 48
  assert seconds < 5
  assert len(tab.run(_CAPTURE).splitlines()) == 100_001
