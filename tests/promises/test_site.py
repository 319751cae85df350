"""Pages of docs/ and of the repository's root: links, anchors, the table of contents, and what the site makes of code.

`make docs` builds the site and checks what it has become; these tests need no build.
"""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples" / "README.md"]
FIRST = ROOT / "docs" / "index.md"


def prose(page: Path) -> str:
    """The page without its code blocks, fenced or indented, whose brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(?: {4,}(?![-*\d]).*\n)+", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.append(slug if found.count(slug) == 0 else f"{slug}-{found.count(slug)}")
    return set(found)


def links(page: Path) -> list[tuple[str, str]]:
    """Relative links of the page, as (path, anchor); either may be empty."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page))
    return [(path, anchor) for path, anchor in found if "://" not in path and not path.startswith("mailto:")]


def toctree(page: Path) -> list[Path]:
    """Pages that the page's tables of contents name."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    return [(page.parent / f"{name}.md").resolve() for name in names]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor} is no heading"


def test_every_page_is_in_the_table_of_contents() -> None:
    reached, waiting = {FIRST}, [FIRST]
    while waiting:
        new = [page for page in toctree(waiting.pop()) if page not in reached]
        reached.update(new)
        waiting += new
    assert reached == set(PAGES)


def test_every_page_is_linked_from_the_text_of_another() -> None:
    linked = {(page.parent / path).resolve() for page in PAGES for path, _ in links(page) if path}
    assert set(PAGES) - linked - {FIRST} == set()


def test_pages_that_code_and_tests_name_exist() -> None:
    named = []
    for folder in ("mvlm", "kernels", "dataloading", "benchmarks", "tests", "notebooks", "studies", "docs/site"):
        files = [path for kind in ("py", "html", "md", "ipynb", "toml") for path in (ROOT / folder).rglob(f"*.{kind}")]
        for file in files:
            named += [(file, name) for name in re.findall(r"(?<![\w/.])docs/[\w/]+\.md", file.read_text())]
    assert len(named) > 30
    assert [(file, name) for file, name in named if not (ROOT / name).exists()] == []


def test_no_line_begins_with_a_per_cent_sign():
    """MyST takes such a line for a comment, and leaves it out of the site."""
    assert [page for page in PAGES if re.search(r"^%", prose(page), re.MULTILINE)] == []


def test_badges_are_what_their_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "images" / "draw_badges.py"))["badges"]()
    assert len(drawn) == 3
    for name, text in drawn.items():
        assert (ROOT / "docs" / "images" / name).read_text() == text
