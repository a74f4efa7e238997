"""Sphinx's settings: `make docs` reads docs/ and nbs/ in place and writes _docs/html/; no notebook is run."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import reinpp  # noqa: E402

project, author, copyright = "reinpp", "The reinpp authors", "2026 onwards, the reinpp authors"
release = version = reinpp.__version__
root_doc = "docs/index"
# The source folder is the repository, so that links between notebooks, pages and files are the same as on a code host.
include_patterns = ["docs/**.md", "nbs/*.ipynb", "data/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["**/.ipynb_checkpoints", "docs/static", "nbs/index.ipynb"]
exclude_patterns += [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "nbs", "data")]
exclude_patterns += [f"data/{path.name}" for path in (ROOT / "data").iterdir() if path.is_dir()]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "made"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # widgets need a kernel: the site shows what is saved
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
myst_heading_slug_func = "made.anchor"
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]  # a lesson may open a section one level down

html_theme = "furo"
html_title = "reinpp"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
mathjax_path = "mathjax/tex-chtml.js"  # copied by `made` from the package sphinx-mathjax-offline
mathjax4_config = {"options": {"enableMenu": False}}  # the menu's speech engine would come from a network
