"""Settings of the documentation site: `make docs` writes it to build/docs.

Sphinx reads the pages where they lie: the root of the sources is that of the repository, so that the links which work
when a page is read there work in the site too, also those to results, to the change log and to files of code (which
become downloads). Nothing is fetched while it is built, and no notebook runs: its outputs are in its file.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparse_bwd.version import __version__  # noqa: E402 -- after the path

project = "sparse_bwd"
author = "The sparse_bwd authors"
release = version = __version__
root_doc = "docs/index"
html_title = f"sparse_bwd {release}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
include_patterns = ["docs/**", "benchmarks/results/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "dist", "*.egg-info", "docs/_templates", "docs/_static"]
templates_path = ["_templates"]

myst_heading_anchors = 3  # links to sections, as code hosts make them
nb_execution_mode = "off"
nitpicky = True  # every name in a signature is documented here, or belongs to somebody else
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|collections|pathlib|os)\..*|Tensor|(nn\.)?Module|Trainer"),
    (r"py:.*", r"Index|SchemeLike|sparse_bwd\.sharing\.parts\.Part"),  # our own short names of types
]


default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints = (
    "signature"  # in descriptions, attributes of the name of a parameter would lend it their type
)
python_maximum_signature_line_length = 100
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what PyTorch says of forward() is no news

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_the_index.html"}  # the pages stand below docs/
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
