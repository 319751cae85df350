"""The page in a real browser, and its command.

`APP_RUN=runs/demo python -m pytest tests/mvlm/app/test_page.py` shows a trained run, not a micro model, and writes
its screenshots to docs/images.
"""

import copy
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvlm.app.gallery import Found, data_of_run, open_gallery
from mvlm.commands.embed import embed
from mvlm.errors import ConfigError
from mvlm.inference.trained_model import TrainedModel
from mvlm.tasks.load import load_model
from support.commands import assert_refused
from support.packages import needs
from support.page_attacks import judge_sentence
from support.ports import free_port
from support.scenes import png
from support.visitor import Visitor

pytestmark = [
    needs("gradio"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Gradio and its server
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

IMAGES = Path(__file__).parents[3] / "docs" / "images"
RUN = os.environ.get("APP_RUN")
TABS = {
    "Ask": "Ask",
    "Search": "Search",
    "Fill": "Fill",
    "Rebuild": "Rebuild",
    "Where it looks": "Look",
    "Classify": "Classify",
}


@pytest.fixture(scope="module")
def url(answering, gallery) -> Iterator[str]:
    model = answering("vqa")
    if RUN:
        model = load_model(RUN)
        data = data_of_run(Path(RUN))
        assert data is not None
        gallery = open_gallery(model, data)
    from mvlm.app.page import build_page
    from mvlm.app.server import start

    server = start(build_page(model, gallery, Path(RUN or "micro").name), "127.0.0.1", free_port())
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("wanted Debian's chromium, found none")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser: Any, url: str, width: int, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    """The page in a window, and lists of the requests that it makes and of the errors that it logs."""
    tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    tab.set_default_timeout(60_000)
    requests: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.goto(url)
    tab.get_by_role("tab", name="Search", exact=True).click()
    tab.get_by_role("button", name="Search", exact=True).wait_for()
    return tab, requests, errors


def answer_of(tab: Any, name: str) -> Any:
    """An element that is there when the tab of this name has answered."""
    panel = tab.get_by_role("tabpanel").filter(visible=True)
    return {
        "Ask": panel.locator("textarea[disabled]:not(:placeholder-shown)").first,
        "Search": panel.locator("button.thumbnail-item img").first,
        "Fill": panel.get_by_text(" %").filter(visible=True).first,
        "Rebuild": panel.locator("img").nth(3),
        "Where it looks": panel.locator("button.thumbnail-item img").first,
        "Classify": panel.get_by_text("%").filter(visible=True).first,
    }[name]


def test_every_tab_answers_and_nothing_comes_from_elsewhere(browser, url) -> None:
    tab, requests, errors = open_page(browser, url, 1000)
    for name, button in TABS.items():
        if name == "Ask" and tab.get_by_role("tab", name=name, exact=True).count() == 0:
            continue  # of a pretraining run
        tab.get_by_role("tab", name=name, exact=True).click()
        tab.get_by_role("button", name=button, exact=True).click()
        answer_of(tab, name).wait_for()
        tab.wait_for_timeout(500)  # until images are painted
        if RUN:
            tab.screenshot(path=IMAGES / f"app-{button.lower()}.png", full_page=True)
    assert errors == []
    assert [request for request in requests if not request.startswith((url, "data:", "blob:"))] == []


def test_a_task_is_asked_about_uploads_alone(url, answering, gallery) -> None:
    visitor, model, image = Visitor(url), answering("vqa"), gallery.example().image
    answered, said = visitor.ask("Ask", [visitor.uploaded("x.png", image), "a circle?"])
    assert (answered, json.loads(said)) == (True, [model.answer(image, "a circle?")])
    other = Visitor(url).uploaded("x.png", image)
    for values in ([other, "a"], [{"path": "/etc/passwd"}, "a"], [None, "a"], [visitor.uploaded("x.png", image), " "],
                   [visitor.uploaded("x.png", image), 5]):  # fmt: skip
        answered, said = visitor.ask("Ask", values)
        assert not answered
        assert "wanted " in said
        assert judge_sentence(said) is None


def test_a_click_hides_a_patch(browser, url) -> None:
    tab, _, _ = open_page(browser, url, 1000)
    tab.get_by_role("tab", name="Rebuild", exact=True).click()
    tab.get_by_label("nothing").check()
    seen = tab.get_by_role("tabpanel").filter(visible=True).locator("img").nth(1)
    tab.wait_for_timeout(1500)
    before = seen.get_attribute("src")
    seen.click()  # in its middle
    tab.wait_for_function("([seen, before]) => seen.src !== before", arg=[seen.element_handle(), before])


def test_a_mistake_is_said_on_the_page_and_the_page_lives_on(browser, url) -> None:
    tab, _, _ = open_page(browser, url, 1000)
    tab.get_by_role("tab", name="Fill", exact=True).click()
    text = tab.get_by_role("tabpanel").filter(visible=True).get_by_label("Text", exact=True)
    text.fill("<b>no</b> mask")
    tab.get_by_role("button", name="Fill", exact=True).click()
    tab.get_by_text("wanted at least one [MASK], got '<b>no</b> mask'").wait_for()
    text.fill("a [MASK]")
    text.press("Enter")  # the keyboard does what the button does
    answer_of(tab, "Fill").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark(browser, url, scheme: str) -> None:
    tab, _, _ = open_page(browser, url, 390, scheme)
    tab.get_by_role("button", name="Search", exact=True).focus()
    tab.keyboard.press("Enter")
    answer_of(tab, "Search").wait_for()
    tab.wait_for_timeout(500)
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3
    assert (brightness < 80) == (scheme == "dark")
    if RUN:
        tab.screenshot(path=IMAGES / f"app-phone-{scheme}.png", full_page=True)


class TallGallery:
    """One image that is too tall for WebP, with a caption that is too long for the model."""

    description = "an image"
    found = Found(png(np.zeros((17_000, 300, 3), np.uint8)), "a red square " * 100)

    def search(self, text: str | None, image: Any) -> list[Found]:
        return [self.found]

    def example(self) -> Found:
        return self.found


def test_a_page_of_other_peoples_images_and_of_a_model_without_itm(model) -> None:
    """A tall image is an answer, a long caption is shortened to begin with, and no map shows what ITM looks at."""
    from mvlm.app.page import build_page
    from mvlm.app.server import start

    untrained = TrainedModel(copy.deepcopy(model.network), model.tokenizer, "fp32")
    torch.nn.init.zeros_(untrained.network.matching_head.bias)
    server = start(build_page(untrained, TallGallery(), "micro"), "127.0.0.1", free_port())
    try:
        visitor = Visitor(server.url)
        answered, found = visitor.ask("Search", ["a circle", None])
        assert answered, found
        config = json.loads(visitor.request("GET", "/config").body)
        assert "Where it looks" not in {c["props"].get("label") for c in config["components"]}
        texts = [c["props"]["value"] for c in config["components"] if c["props"].get("label") == "Text"]
        assert len(texts) == 3  # of Search, Fill and Rebuild
        assert "Ask" not in visitor.labels.values()
        assert "trains a head" in str(config["components"])
        for text in texts:
            tokens = len(model.tokenizer.encode([text.replace("[MASK]", "a")], 500)[0])
            assert 3 < tokens <= model.network.config.text_length, text
    finally:
        server.close()


def test_an_address_that_cannot_be_listened_on_is_refused(model) -> None:
    from mvlm.app.page import build_page
    from mvlm.app.server import start

    page = build_page(model, None, "micro")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port, name in (
            ("127.0.0.1", taken.getsockname()[1], "port"), ("127.0.0.1", 0, "port"), ("127.0.0.1", 70000, "port"),
            ("192.0.2.1", free_port(), "host"), ("2001:db8::1", free_port(), "host"),
            ("no-such-name.invalid", free_port(), "host"),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=f"^{name}: wanted "):
                start(page, host, port)


def test_mistakes_are_refused_before_the_model_is_loaded(run_mvlm, trained, scenes, tmp_path, monkeypatch) -> None:
    none = tmp_path / "none"
    assert_refused(run_mvlm("app", none), "none: wanted a run, a checkpoint or an exported folder")
    assert_refused(run_mvlm("app", none, "--port", 99999), "port: wanted a number from 1 to 65535")
    outcome = run_mvlm("app", none, "--data", scenes, "--index", "index")
    assert_refused(outcome, "index: wanted --data or --index, got both; leave one out")
    monkeypatch.delitem(sys.modules, "mvlm.app.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    outcome = run_mvlm("app", none)
    assert_refused(outcome, "app: wanted the package gradio, which is not installed; pip install 'mvlm[app]'")


@needs("lancedb")
def test_a_url_that_an_index_names_is_read_if_the_user_names_it(
    run_mvlm, trained, web, data_cache, tmp_path, monkeypatch
) -> None:
    embed(web, tmp_path / "embedded", checkpoint=trained, device="cpu", splits=("train",))
    assert run_mvlm("search", "index", tmp_path / "embedded", tmp_path / "index").code == 0
    words = ("app", trained, "--index", tmp_path / "index", "--device", "cpu", "--port", free_port())
    assert_refused(run_mvlm(*words), f"--source {web}")
    monkeypatch.setattr("mvlm.app.server.Server.wait", lambda server: None)
    outcome = run_mvlm(*words, "--source", web)
    assert (outcome.code, "Ctrl-C" in outcome.out[0]) == (0, True)


@pytest.mark.parametrize("given", ["", "deep/mine"])
def test_what_visitors_send_is_kept_below_the_folder_that_the_user_names(
    run_mvlm, tmp_path, monkeypatch, given
) -> None:
    used = []

    def load(*_: Any, **__: Any) -> None:
        used.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        (used[0] / "upload").write_text("an image")
        raise ConfigError("enough")

    parent = tmp_path / (given or "default")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "default"))
    (tmp_path / "default").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / given) if given else "")
    monkeypatch.setattr("mvlm.tasks.load.load_model", load)
    assert_refused(run_mvlm("app", tmp_path, "--port", free_port()), "enough")
    assert [path.parent for path in used] == [parent]
    assert list(parent.iterdir()) == []
    assert os.environ["GRADIO_TEMP_DIR"] == (str(tmp_path / given) if given else "")
