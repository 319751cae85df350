"""Check of the built site: `python docs/site/check_site.py build/docs`.

Every page has one h1, headings that skip no level, a title and a language. Every image has a text. Every link within
the site leads to a file and to an anchor in it. Every page can be reached from the first one.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

ROOT = "docs/index.html"
NO_CONTENT = {"index.html", "search.html"}
"""The way to the first page, and the search that Sphinx makes."""


class Page(HTMLParser):
    """Structure of a page: its `headings`, `links` and `anchors`, and the `faults` of its markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.faults: list[str] = []
        self.language = ""
        self.in_title, self.title = False, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(
            values[name] for name in ("id", "name") if values.get(name) and (name == "id" or tag == "a")
        )
        if tag == "html":
            self.language = values.get("lang", "")
        elif tag == "title":
            self.in_title = True
        elif tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
            self.headings.append(int(tag[1]))
        elif tag == "img":
            if not values.get("alt", "").strip():
                self.faults.append(f"image {values.get('src')} has no text")
            elif values["alt"] == values.get("src"):
                self.faults.append(f"image {values['src']} has its file's name for a text")
            self.links.append(values.get("src", ""))
        elif tag == "a" and "href" in values:
            self.links.append(values["href"])

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self.in_title = False

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data


def check(site: Path) -> list[str]:
    """Faults of all pages below `site`, one line each."""
    files = {path.relative_to(site).as_posix(): path for path in site.rglob("*.html") if "_static" not in path.parts}
    pages = {name: Page(path.read_text()) for name, path in files.items()}
    faults: list[str] = []
    leads: dict[str, set[str]] = {name: set() for name in pages}
    for name, page in pages.items():
        if name not in NO_CONTENT:
            faults += [f"{name}: {fault}" for fault in [*page.faults, *structure_faults(page)]]
        for link in page.links:
            target, anchor = urldefrag(link)
            if "://" in target or target.startswith(("mailto:", "data:")):
                continue
            path = (files[name].parent / unquote(target)).resolve() if target else files[name].resolve()
            if not path.exists():
                faults.append(f"{name}: {link} leads to nothing")
                continue
            found = path.relative_to(site.resolve()).as_posix()
            if found in pages:
                leads[name].add(found)
                if anchor and unquote(anchor) not in pages[found].anchors:
                    faults.append(f"{name}: {link} has no such anchor")
    reached, waiting = {ROOT}, [ROOT]
    while waiting:
        new = leads[waiting.pop()] - reached
        reached |= new
        waiting += new
    return faults + [f"{name}: no page leads here" for name in sorted(set(pages) - reached - NO_CONTENT)]


def structure_faults(page: Page) -> list[str]:
    faults = []
    if page.headings.count(1) != 1:
        faults.append(f"wanted one h1, found {page.headings.count(1)}")
    for before, after in zip([0, *page.headings], page.headings, strict=False):
        if after > before + 1:
            faults.append(f"a heading of level {after} follows one of level {before}")
    if not page.title.strip():
        faults.append("no title")
    if not page.language:
        faults.append("no language")
    return faults


def main() -> None:
    faults = check(Path(sys.argv[1]))
    for fault in faults:
        print(fault)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
