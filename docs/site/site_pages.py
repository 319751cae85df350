"""Sphinx extension: pages that are made from the code are current, and links to folders."""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from generated import with_generated
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)


def compare_generated(app: Sphinx, page: str, source: list[str]) -> None:
    """Warn of a page whose part that is made from the code is not that of the code. A warning fails `make docs`."""
    if with_generated(source[0]) != source[0]:
        log.warning("%s is not what the code says now: run `python docs/tables.py`", page)


def drop_links_to_folders(app: Sphinx, tree: nodes.document) -> None:
    """A folder of the repository has no page: on GitHub its name is a link, in the site it is text."""
    page = Path(app.env.doc2path(app.env.docname))
    for link in [*tree.findall(addnodes.pending_xref)]:
        if (page.parent / link["reftarget"]).is_dir():
            link.replace_self(nodes.inline("", "", *link.children))


COLON = "\ue000"


def before_napoleon(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with indented code. Napoleon takes the rest of them: arguments, results, errors."""
    if what in ("attribute", "data", "property"):  # napoleon takes what precedes a colon there for a type
        plain = [] if lines and lines[0].startswith("Alias for field number") else lines
        lines[:] = [line.replace(":", COLON) for line in plain]
    last, blank = 0, False
    for line in [*lines]:
        indent = len(line) - len(line.lstrip())
        if line and blank and indent >= last + 4:
            at = lines.index(line)
            lines[at:at] = [" " * last + "::", ""]
        last, blank = (indent, False) if line else (last, True)


def after_napoleon(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def break_long_names(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object) -> None:
    """Names of files, tests and functions may break after a `/`, `::` or `_`, so that they fit a table or a phone."""
    for long in (r'(?<=<span class="pre">)[^<]{25,}(?=</span>)', r"(?<=<h1>)\w{14,}(?=<)"):
        body = context.get("body", "")
        context["body"] = re.sub(long, lambda name: re.sub(r"(::|[/_])(?=\w)", r"\1<wbr>", name[0]), body)


def help_readers(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object) -> None:
    """For keyboards: code and tables that scroll take the focus. For screen readers: the sidebar has heading levels."""
    body = context.get("body", "").replace("<pre>", '<pre tabindex="0">')
    body = body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')
    # Sphinx makes a list of definitions of a signature's parameters, with nothing defined.
    parameters = r'<dl>\n(<dd><em class="sig-param">.*?)</dl>'
    body = re.sub(parameters, r'<div class="sig-params">\n\1</div>', body, flags=re.DOTALL)
    context["body"] = re.sub(r'<dd>(<em class="sig-param">.*?)</dd>', r"<div>\1</div>", body)
    sidebar = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = sidebar.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("source-read", compare_generated)
    app.connect("doctree-read", drop_links_to_folders)
    app.connect("html-page-context", break_long_names)
    app.connect("html-page-context", help_readers, priority=900)  # after the theme has made its sidebar
    return {"parallel_read_safe": True, "parallel_write_safe": True}
