"""Draw the badges of the README, docs/images/badge-*.svg: `python docs/images/draw_badges.py`.

Licence and versions are those of pyproject.toml.
"""

import tomllib
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
HEIGHT, PADDING, LETTER = 20, 7, 6.6
"""Height of a badge, room beside a text, and width of a letter, in pixels."""


def badge(name: str, value: str, colour: str) -> str:
    """SVG of a name on grey beside a value on `colour`. White on it has a contrast of 4.5 or more."""
    texts = []
    left = 0.0
    for text, back in ((name, "#4a4a4a"), (value, colour)):
        width = len(text) * LETTER
        texts += [
            f'<rect x="{left:g}" width="{width + 2 * PADDING:g}" height="{HEIGHT}" fill="{back}"/>',
            f'<text x="{left + PADDING:g}" y="14" textLength="{width:g}">{escape(text)}</text>',
        ]
        left += width + 2 * PADDING
    body = "\n".join(texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left:g}" height="{HEIGHT}" role="img">\n'
        f"<title>{escape(name)}: {escape(value)}</title>\n"
        f'<g fill="white" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="11">\n'
        f"{body}\n</g>\n</svg>\n"
    )


def badges() -> dict[str, str]:
    """File name -> SVG of every badge."""
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
    start = "Programming Language :: Python :: 3."
    versions = [text.rpartition(" ")[2] for text in project["classifiers"] if text.startswith(start)]
    return {
        "badge-licence.svg": badge("licence", project["license"], "#1d6fb5"),
        "badge-python.svg": badge("python", f"{versions[0]} to {versions[-1]}", "#1d6fb5"),
        "badge-tests.svg": badge("tests", "need no GPU", "#2d7a3d"),
    }


def main() -> None:
    """Write the badges."""
    for name, text in badges().items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
