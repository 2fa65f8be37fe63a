"""The documentation site: the pages of docs/ as they stand, and docs/api.md from docstrings.

sphinx-build -W -c docs/site . out/site
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import dalle_jax  # noqa: E402

project, author, release = "dalle-jax", "the dalle-jax authors", dalle_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/**/*.png", "docs/emoji/figures.json", "benchmarks/results/*.md"]
html_theme = "furo"  # ships all that it shows
html_title = f"dalle-jax {release}"
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
suppress_warnings = ["toc.not_included"]  # results are linked from the pages

# Where a page stands in the side bar: those of docs/README.md, in its order.
CONTENTS = """

```{{toctree}}
:hidden:
:maxdepth: 1

docs/README
{pages}
CONTRIBUTING
CHANGELOG
```
"""


def add_contents(app, docname, source):
    """Append the side bar's contents to the first page, which GitHub would show as a code block."""
    if docname == root_doc:
        pages = re.findall(r"^- \[(\w+)\.md\]", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
        source[0] += CONTENTS.format(pages="\n".join(f"docs/{page}" for page in pages))


def from_docstring(app, what, name, obj, options, lines):
    """Turn docstrings, which are plain text with code in single backticks, into reStructuredText."""
    made, hanging = [], False
    for line in lines:
        before = made[-1] if made else ""
        if not line.startswith(" "):
            hanging = bool(line) and not line.startswith("- ") and not line.rstrip().endswith(":")
            if before and re.match(r"[\w, ]+: ", line):
                made.append("")  # each argument is a paragraph
        elif hanging and before:
            line = line.lstrip()  # what hangs below the first line of a paragraph belongs to it
        made.append(line)
    lines[:] = [_escaped(line) for line in made]


def _escaped(line):
    """Code in two backticks, and characters that mean something in reStructuredText escaped outside of it."""
    parts = re.split(r"(?<!`)`([^`]+)`(?!`)", line)
    parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    return "".join(parts)


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", from_docstring, priority=400)  # before napoleon
