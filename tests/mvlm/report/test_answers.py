"""The page of answers."""

import base64
import io
import re

import numpy as np
from PIL import Image

from mvlm.report.answers import Answer, thumbnail, write_answers
from mvlm.search.index import Hit
from support.scenes import png


def test_the_page_shows_answers_and_escapes_what_others_wrote(tmp_path):
    hits = [
        Hit("a<b>.png", "test", 0, 3, "<script>alert(1)</script>", 0.51234, {"note": "<i>"}, 2.3456),
        Hit("c.png", "", 1, 4, "", -0.2, {}),
    ]
    image = thumbnail(png(np.full((400, 200, 3), 77, np.uint8)))
    write_answers(tmp_path / "deep" / "page.html", "red & <blue>", image, [Answer(hit, image) for hit in hits])
    page = (tmp_path / "deep" / "page.html").read_text()
    assert "<script" not in page
    assert "<i>" not in page
    for text in (
        "red &amp; &lt;blue&gt;",
        "a&lt;b&gt;.png (test)",
        "similarity 0.512, re-ranked 2.35",
        "similarity -0.200",
    ):
        assert text in page
    assert "http" not in page  # it loads nothing
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(uris) == 3
    with Image.open(io.BytesIO(base64.b64decode(uris[0]))) as small:
        assert small.size == (80, 160)
        assert small.getpixel((5, 5)) == (77, 77, 77)


def test_a_page_without_answers_says_so(tmp_path):
    write_answers(tmp_path / "page.html", "red", None, [])
    assert "No answer." in (tmp_path / "page.html").read_text()
