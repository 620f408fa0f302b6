"""Sphinx configuration; `make docs` builds the pages into docs/_build/html."""

import pathlib
import re

from docutils import nodes
from docutils.utils.math import latex2mathml

_INIT = pathlib.Path(__file__).parent.parent / "l2rw_jax" / "__init__.py"

project = "l2rw_jax"
author = "The l2rw_jax authors"
copyright = "The l2rw_jax authors, Apache License 2.0"
release = re.search(r'__version__ = "(.+)"', _INIT.read_text()).group(1)

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "l2rw_jax"
html_show_sourcelink = False
html_copy_source = False
default_role = "code"  # Docstrings write `name`, as Markdown does.
highlight_language = "none"  # Equations in docstrings are not Python.
add_module_names = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # A notebook runs again only after it has changed.
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Docstrings describe types and shapes in words.
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
python_maximum_signature_line_length = 88


def _preformat(app, what, name, obj, options, lines):
  """Turns indented equations and Markdown tables in a docstring into literal blocks."""
  del app, what, name, obj, options
  result: list[str] = []
  in_block = False
  for i, line in enumerate(lines):
    indent = len(line) - len(line.lstrip())
    is_table = line.startswith("|")
    if not in_block and line and (i == 0 or not lines[i - 1].strip()):
      before = next((x for x in reversed(lines[:i]) if x.strip()), "")
      top_level = before and not before.startswith((" ", ">>>"))
      if is_table or (indent >= 2 and top_level and not before.endswith("::")):
        in_block = True
        result += ["::", ""]
    elif in_block and line and not indent and not is_table:
      in_block = False
    if is_table:
      line = f"  {line}"
    elif not in_block and not line.lstrip().startswith(">>>"):
      # A bar outside of code would begin a substitution.
      line = re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", line)
    result.append(line)
  lines[:] = result


def _skip(app, what, name, obj, skip, options):
  """Leaves out the fields of a NamedTuple, because its docstring describes them."""
  del app, what, name, options
  return skip or (obj.__doc__ or "").startswith("Alias for field number")


def _shorten(app, what, name, obj, options, signature, returned):
  """Removes the arguments `parent` and `name`, which flax adds to every module."""
  del app, what, name, obj, options
  if signature:
    signature = re.sub(r", parent=<.*?>, name=None", "", signature)
  return signature, returned


def _visit_math(self, node):
  is_block = isinstance(node, nodes.math_block)
  code = latex2mathml.tex2mathml(node.astext(), as_block=is_block)
  if is_block:
    # The padding leaves room for symbols that extend above and below a line.
    code = f'<div style="overflow: auto hidden; padding: 0.6em 0">{code}</div>'
  self.body.append(code)
  raise nodes.SkipNode


def setup(app):
  """Registers the hooks; equations become MathML, which needs no script to load."""
  app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math, None))
  app.connect("autodoc-process-docstring", _preformat, priority=100)
  app.connect("autodoc-process-signature", _shorten)
  app.connect("autodoc-skip-member", _skip)


html_math_renderer = "mathml"
