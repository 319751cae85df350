"""The page in a real browser, and what a visitor could send past it.

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
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvlm.app.gallery import Found, data_of_run, open_gallery
from mvlm.app.uploads import MAX_BYTES
from mvlm.errors import ConfigError
from mvlm.inference.trained_model import TrainedModel
from mvlm.runs.load import load_model
from support.commands import assert_refused
from support.packages import needs
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
TABS = {"Search": "Search", "Fill": "Fill", "Rebuild": "Rebuild", "Where it looks": "Look", "Classify": "Classify"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def url(model, gallery) -> Iterator[str]:
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
    tab.get_by_role("button", name="Search", exact=True).wait_for()
    return tab, requests, errors


def answer_of(tab: Any, name: str) -> Any:
    """An element that is there when the tab of this name has answered."""
    panel = tab.get_by_role("tabpanel").filter(visible=True)
    return {
        "Search": panel.locator("button.thumbnail-item img").first,
        "Fill": panel.get_by_text(" %").filter(visible=True).first,
        "Rebuild": panel.locator("img").nth(3),
        "Where it looks": panel.locator("button.thumbnail-item img").first,
        "Classify": panel.get_by_text("%").filter(visible=True).first,
    }[name]


def test_every_tab_answers_and_nothing_comes_from_elsewhere(browser, url) -> None:
    tab, requests, errors = open_page(browser, url, 1000)
    for name, button in TABS.items():
        tab.get_by_role("tab", name=name, exact=True).click()
        tab.get_by_role("button", name=button, exact=True).click()
        answer_of(tab, name).wait_for()
        tab.wait_for_timeout(500)  # until images are painted
        if RUN:
            tab.screenshot(path=IMAGES / f"app-{button.lower()}.png", full_page=True)
    assert errors == []
    assert [request for request in requests if not request.startswith((url, "data:", "blob:"))] == []


def test_a_click_hides_a_patch(browser, url) -> None:
    tab, _, _ = open_page(browser, url, 1000)
    tab.get_by_role("tab", name="Rebuild", exact=True).click()
    tab.get_by_label("nothing").check()
    seen = tab.get_by_role("tabpanel").filter(visible=True).locator("img").nth(1)
    tab.wait_for_timeout(1500)
    before = seen.get_attribute("src")
    seen.click()  # in its middle
    for _ in range(50):
        tab.wait_for_timeout(200)
        if seen.get_attribute("src") != before:
            break
    assert seen.get_attribute("src") != before


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


@pytest.fixture
def visitor(url) -> Visitor:
    return Visitor(url)


def test_what_is_no_image_gets_a_message_and_the_server_lives(visitor) -> None:
    svg = b'<!DOCTYPE svg [<!ENTITY a "aaaa">]><svg xmlns="http://www.w3.org/2000/svg"><text>&a;</text></svg>'
    for name, content in {"x.svg": svg, "x.png": b"\x89PNG\r\n\x1a\n\0\0", "y.png": b"GIF89a"}.items():
        answered, said = visitor.ask("Classify", [visitor.uploaded(name, content), "a\nb", ""])
        assert not answered
        assert "image: wanted an image, could not read it" in said
        assert "use a PNG, JPEG or WebP" in said
    answered, said = visitor.ask("Search", ["a" * 100_000, None])
    assert not answered
    assert "wanted at most 1000 characters, got 100,000" in said
    assert visitor.ask("Search", ["a circle", None])[0]


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}, {"meta": {"_type": "x"}}])
def test_a_path_in_the_place_of_an_upload_is_refused(visitor, tmp_path, meta) -> None:
    """Gradio itself checks the first of these alone."""
    (tmp_path / "secret.png").write_bytes(png(np.zeros((40, 40, 3), np.uint8)))
    os.mkfifo(tmp_path / "pipe")
    for path in ("/etc/passwd", "/dev/zero", tmp_path / "secret.png", tmp_path / "pipe", tmp_path, tmp_path / "none",
                 "http://elsewhere.example/x.png"):  # fmt: skip
        answered, said = visitor.ask("Classify", [{"path": str(path), **meta}, "a\nb", ""])
        assert not answered, path
        assert said == "image: wanted an image that you uploaded here, found another; upload it"
        assert visitor.show(str(path)).status == 404


def test_an_upload_is_its_visitors_alone(url, visitor) -> None:
    other = Visitor(url)
    content = png(np.zeros((40, 40, 3), np.uint8))
    mine = visitor.uploaded("x.png", content)
    assert other.uploaded("x.png", content)["path"] != mine["path"]
    assert visitor.ask("Classify", [mine, "a\nb", ""])[0]
    assert visitor.show(mine["path"]).body == content
    assert not other.ask("Classify", [mine, "a\nb", ""])[0]
    assert other.show(mine["path"]).status == 404


def test_answers_of_a_session_are_its_visitors_alone(url, visitor) -> None:
    number = visitor.event("Search")["id"]
    joined = visitor.join({"data": ["a circle", None], "fn_index": number, "session_hash": "mine"})
    assert joined.status == 200
    other = Visitor(url)
    assert other.stream("mine", 5) == []
    assert other.join({"data": ["a", None], "fn_index": number, "session_hash": "mine"}).status == 400
    assert any(event["msg"] == "process_completed" for event in visitor.stream("mine"))


def test_another_sites_page_may_not_send(url, visitor) -> None:
    """A browser sends a form of another site without asking. Behind a proxy the page has the proxy's name."""
    for headers, code in (
        ({"Origin": url}, 400),  # as far as the check of what was asked
        ({"Origin": "https://proxy.example", "X-Forwarded-Host": "proxy.example"}, 400),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
    ):
        assert visitor.request("POST", "/gradio_api/queue/join", b"{}", headers).status == code, headers


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
        for text in texts:
            tokens = len(model.tokenizer.encode([text.replace("[MASK]", "a")], 500)[0])
            assert 3 < tokens <= model.network.config.text_length, text
    finally:
        server.close()


def test_another_sites_page_may_not_read_answers(url, visitor) -> None:
    """A browser gives an answer to a page of another site only if the answer allows its origin."""
    for origin, status in ((url, 200), ("http://elsewhere.example", 403), ("null", 403)):
        answer = visitor.request("GET", "/config", headers={"Origin": origin})
        assert answer.status == status
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_name_that_another_site_gave_this_machine_is_refused(visitor) -> None:
    """DNS rebinding: the browser takes the page for a part of the other site, and lets that site read it."""
    port = visitor.port
    for host, code in (
        (f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), (f"LOCALHOST:{port}", 200), (f"[::1]:{port}", 200),
        (f"elsewhere.example:{port}", 400), ("", 400), (f"127.0.0.1.elsewhere.example:{port}", 400), ("a b", 400),
        (f"{socket.gethostname()}-:{port}", 400), ("127.0.0.1:x", 400), ("10.0.0.1", 400),
    ):  # fmt: skip
        assert visitor.request("GET", "/config", headers={"Host": host}).status == code, host


def test_a_page_on_all_addresses_answers_to_its_own_names_alone(model) -> None:
    from mvlm.app.page import build_page
    from mvlm.app.server import start

    port = free_port()
    server = start(build_page(model, None, "micro"), "0.0.0.0", port, ["proxy.example"])
    try:
        visitor = Visitor(f"http://127.0.0.1:{port}")
        for host, code in (("127.0.0.1", 200), (socket.gethostname(), 200), ("proxy.example", 200),
                           ("elsewhere.example", 400), ("10.11.12.13", 400)):  # fmt: skip
            assert visitor.request("GET", "/config", headers={"Host": f"{host}:{port}"}).status == code, host
        for origin, code in ((f"http://127.0.0.1:{port}", 400), ("http://elsewhere.example", 403)):
            assert visitor.request("POST", "/gradio_api/queue/join", b"{}", {"Origin": origin}).status == code
    finally:
        server.close()


def test_a_file_over_the_limit_is_refused(visitor) -> None:
    refused = visitor.upload("x.png", bytes(MAX_BYTES + 1_000_000))
    assert (refused.status, refused.text) == (413, "image: wanted at most 20 MB, got more; choose a smaller file")


def test_a_port_in_use_is_an_error_of_one_line(model) -> None:
    from mvlm.app.page import build_page
    from mvlm.app.server import start

    page = build_page(model, None, "micro")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: wanted 127.0.0.1:{port} free, got: .*; choose another --port"):
            start(page, "127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no-such-name.invalid"])
def test_a_host_of_another_machine_is_an_error_of_one_line(host) -> None:
    from mvlm.app.server import check_address

    with pytest.raises(
        ConfigError, match=f"^host: wanted an address of this machine, got {host}; choose another --host"
    ):
        check_address(host, free_port())


def test_without_gradio_the_command_names_the_extra(run_mvlm, trained, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "mvlm.app.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_refused(
        run_mvlm("app", trained), "app: wanted the package gradio, which is not installed; pip install 'mvlm[app]'"
    )


def test_a_missing_run_is_an_error_of_one_line(run_mvlm, tmp_path) -> None:
    assert_refused(run_mvlm("app", tmp_path / "none"), "none: wanted a run, a checkpoint or an exported folder")


def test_a_wrong_port_is_said_before_the_model_is_loaded(run_mvlm, tmp_path) -> None:
    assert_refused(run_mvlm("app", tmp_path / "none", "--port", 99999), "port: wanted a number from 1 to 65535")


@pytest.mark.parametrize("given", ["", "deep/mine"])
def test_what_visitors_send_is_kept_below_the_folder_that_the_user_names(
    run_mvlm, tmp_path, monkeypatch, given
) -> None:
    used = []

    def load(*_: Any) -> None:
        used.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        (used[0] / "upload").write_text("an image")
        raise ConfigError("enough")

    parent = tmp_path / (given or "default")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "default"))
    (tmp_path / "default").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / given) if given else "")
    monkeypatch.setattr("mvlm.runs.load.load_model", load)
    assert_refused(run_mvlm("app", tmp_path, "--port", free_port()), "enough")
    assert [path.parent for path in used] == [parent]
    assert list(parent.iterdir()) == []
    assert os.environ["GRADIO_TEMP_DIR"] == (str(tmp_path / given) if given else "")


def test_data_and_an_index_are_not_both_searched(run_mvlm, trained, scenes) -> None:
    outcome = run_mvlm("app", trained, "--data", scenes, "--index", "index")
    assert_refused(outcome, "index: wanted --data or --index, got both; leave one out")


def test_an_address_of_ipv6_and_a_port_of_none(model) -> None:
    from mvlm.app.page import build_page
    from mvlm.app.server import start

    page = build_page(model, None, "micro")
    for port in (0, 70000):
        with pytest.raises(ConfigError, match=f"port: wanted a number from 1 to 65535, got {port}"):
            start(page, "127.0.0.1", port)
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = probe.getsockname()[1]
    server = start(page, "::1", port)
    try:
        assert server.url == f"http://[::1]:{port}"
        assert urllib.request.urlopen(server.url, timeout=20).status == 200
    finally:
        server.close()
