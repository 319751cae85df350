"""Settings of the documentation site: `make docs`.

The source folder is the repository, so that README, CHANGELOG and the pages of docs/ link to each other in the site as
they do in a checkout. Only the patterns below are read.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / folder) for folder in ("kernels", "dataloading", "benchmarks", "docs", "docs/site")),
]

project = "mvlm"
author = "the mvlm authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.githubpages", "site_pages"]

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "AGENTS.md",
    "SECURITY.md",
    "examples/README.md",
    "docs/*.md",
    "docs/**/*.md",
]
exclude_patterns = [".*", "build", "data", "dist", "runs", "*.egg-info"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # the anchors that GitHub makes
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # CHANGELOG and README may begin a level lower

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "mvlm"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["front"]  # index.html, which leads from the site's root to its first page
html_use_index = False
html_domain_indices = False
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
