"""Rendering of drawings that name files."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from mvlm_dataloading.sources.svg import render_cutout, render_svg

PAGE = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:x="http://www.w3.org/1999/xlink" viewBox="0 0 8 8">{}</svg>'


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


@pytest.mark.parametrize("render", [render_svg, render_cutout])
@pytest.mark.parametrize(
    "element",
    [
        '<image href="{}" width="8" height="8"/>',
        '<image x:href=" {}" width="8" height="8"/>',
        "<image id='>' width='8' height='8' href='{}'/>",
        '<s:image xmlns:s="http://www.w3.org/2000/svg" href="&#x2f;{}" width="8" height="8"/>',
        '<filter id="f"><feImage href="{}"/></filter>',
    ],
)
def test_a_drawing_never_shows_a_file(secret: Path, element: str, render) -> None:
    with pytest.raises(ValueError, match="shows an image from a file"):
        render(PAGE.format(element.format(secret)), 16)


def test_images_inside_a_drawing_are_shown(secret: Path) -> None:
    data = "data:image/png;base64," + base64.b64encode(secret.read_bytes()).decode()
    png = render_svg(PAGE.format(f'<image href="{data}" width="8" height="8"/>'), 16)
    assert Image.open(io.BytesIO(png)).convert("RGB").getpixel((8, 8)) == (255, 0, 0)


def test_a_nested_drawing_never_shows_a_file(secret: Path) -> None:
    """resvg itself reads no file for a drawing inside a drawing."""
    inner = PAGE.format(f'<image href="{secret}" width="8" height="8"/>')
    data = "data:image/svg+xml;base64," + base64.b64encode(inner.encode()).decode()
    mark = '<path d="M0 0h1v1h-1z"/>'
    png = render_svg(PAGE.format(f'<image href="{data}" width="8" height="8"/>{mark}'), 16)
    assert Image.open(io.BytesIO(png)).convert("RGB").getpixel((8, 8)) == (255, 255, 255)


@pytest.mark.parametrize(
    "svg, message",
    [
        ("<svg", "wanted an SVG"),
        (PAGE.format('<path d=""/>'), "blank"),
        (PAGE.format('<path d="M0 0h4v4h-4z" fill="#fff"/>'), "blank"),
    ],
)
def test_what_shows_nothing_is_refused(svg: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_svg(svg, 16)
