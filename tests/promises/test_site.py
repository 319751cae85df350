"""Pages of docs/ and of the repository's root: links, anchors, the table of contents, and what the site makes of code.

`make docs` builds the site and checks what it has become; these tests need no build.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples" / "README.md"]
FIRST = ROOT / "docs" / "index.md"
SITE = ROOT / "docs" / "site"


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


@pytest.fixture
def site_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the site can be imported."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(SITE))
    for name in ("site_pages", "check_site"):
        monkeypatch.delitem(sys.modules, name, raising=False)


PAGE = "<html lang=en><title>t</title><body><h1 id=top>T</h1>{}</body></html>"


@pytest.mark.parametrize(
    "body, fault",
    [
        ("<h3>x</h3>", "a heading of level 3 follows one of level 1"),
        ("<h1>x</h1>", "wanted one h1, found 2"),
        ("<img src=x.html>", "image x.html has no text"),
        ("<a href=gone.html></a>", "gone.html leads to nothing"),
        ("<a href=x.html#gone></a>", "x.html#gone has no such anchor"),
        ("<a href=#gone></a>", "#gone has no such anchor"),
    ],
)
@pytest.mark.usefixtures("site_folder")
def test_the_check_of_the_site_finds_faults(body: str, fault: str, tmp_path: Path) -> None:
    import check_site

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.html").write_text(PAGE.format("<a href=x.html#top>x</a>"))
    (tmp_path / "docs/x.html").write_text(PAGE.format(""))
    assert check_site.check(tmp_path) == []
    (tmp_path / "docs/index.html").write_text(PAGE.format("<a href=x.html#top>x</a>" + body))
    assert check_site.check(tmp_path) == [f"docs/index.html: {fault}"]
    (tmp_path / "docs/index.html").write_text(PAGE.format(""))
    assert check_site.check(tmp_path) == ["docs/x.html: no page leads here"]
