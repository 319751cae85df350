"""Reader of HTML pages, for tests of reports."""

from html.parser import HTMLParser

HOSTILE = '<script>alert("&{}")</script><img src=x>'
"""A text that breaks a page where it is not escaped."""
VOID_TAGS = {"meta", "img", "br", "line", "polyline"}


class Page(HTMLParser):
    """Tags, attributes, text and table rows of a page. Fails where a tag is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of every tag of that name."""
        return [attributes for tag, attributes in self.tags if tag == name]
