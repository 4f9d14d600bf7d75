"""The site: plain Markdown pages, a reference made from the tables, notebooks with the outputs that they hold."""

import sys
from pathlib import Path

import collapse_probe

sys.path.insert(0, str(Path(__file__).parent))

project = "collapse-probe"
author = "collapse-probe maintainers"
copyright = "collapse-probe maintainers"
release = version = collapse_probe.__version__
extensions = ["myst_nb", "registry_pages", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "collapse-probe"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
nb_execution_mode = "off"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # what docstrings put in single backquotes
maximum_signature_line_length = 100
