"""The page, in Gradio: a tab for each question, and the server behind it."""

import html
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from PIL import Image

from mvlm.app import answers
from mvlm.app.gallery import Gallery
from mvlm.app.uploads import MAX_BYTES, MAX_CHARACTERS, MAX_LABELS, check_image, stored_file
from mvlm.errors import ConfigError
from mvlm.inference.images import decode_image
from mvlm.inference.texts import shortened
from mvlm.inference.trained_model import TrainedModel

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio as gr
    from gradio.themes import Default
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError:
    raise ConfigError("app: wanted the package gradio, which is not installed; pip install 'mvlm[app]'") from None

STYLE = """
.gradio-container {max-width: 960px !important; width: 100%; margin: auto}
footer {display: none !important}
"""
TALL = 320  # pixels
KEPT = 24 * 3600
"""Seconds that a visitor's image is kept on disk, at most an hour longer."""
LOCAL = ("127.0.0.1", "localhost")
BUTTONS: list[Any] = ["download", "fullscreen"]


def image_upload(value: Image.Image | None = None) -> gr.Image:
    """An image that a visitor uploads. It is checked before it is decoded."""
    component = gr.Image(value, label="Image", type="pil", sources=["upload", "clipboard"], height=TALL)
    folder = Path(component.GRADIO_CACHE)  # Gradio checks a path only if it comes with `meta`

    def preprocess(payload: Any) -> Image.Image | None:
        return None if payload is None else _say(lambda path: check_image(stored_file(path, folder)))(payload.path)

    component.preprocess = preprocess  # a subclass would not be known to Gradio's own JavaScript
    return component


def build_page(model: TrainedModel, gallery: Gallery | None, name: str) -> gr.Blocks:
    """The page of a model.

    Args:
        gallery: images to search; None leaves that tab out.
        name: name of the model, for the heading.
    """
    example = gallery.example() if gallery else None
    image = _shown(example.image) if example else None
    caption = shortened(example.caption, model.tokenizer, model.network.config.text_length) if example else ""
    first_word = f"[MASK] {caption.partition(' ')[2]}".strip()
    with gr.Blocks(title=f"mvlm: {name}", analytics_enabled=False, delete_cache=(3600, KEPT)) as page:
        gr.Markdown(f"# {html.escape(name)}")
        with gr.Tabs():
            if gallery:
                _search_tab(gallery, caption)
            _fill_tab(model, image, first_word)
            _rebuild_tab(model, image, caption)
            if model.network.matching_is_trained:
                _look_tab(model, image, caption)
            _classify_tab(model, image, caption)
    for block in page.blocks.values():
        _fetch_nothing(block)
    return page


def _fetch_nothing(block: Any) -> None:
    """Refuse a URL in the place of an upload: Gradio would load it, of any size, before it is checked."""
    keep = block.async_move_resource_to_block_cache

    async def keep_file(path: str | Path | None) -> str | None:
        if path is not None and "://" in str(path):
            raise gr.Error("image: wanted an uploaded image, got a URL", print_exception=False)
        return await keep(path)

    block.async_move_resource_to_block_cache = keep_file


def _shown(image: bytes) -> Image.Image:
    """An encoded image, turned as its EXIF data say, what is transparent on white, and no larger than it is shown."""
    shown = Image.fromarray(decode_image(image))
    shown.thumbnail((2 * TALL, 2 * TALL))
    return shown


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if the port is in use or the host is not of this machine."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port: wanted a number from 1 to 65535, got {port}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port: wanted {host}:{port} free, got: {error}; choose another --port") from None


def start(page: gr.Blocks, host: str, port: int) -> str:
    """Start to serve the page from a thread. Returns its URL; `page.close()` ends it.

    ConfigError if the port is in use or the host is not of this machine.
    """
    check_address(host, port)
    name = f"[{host}]" if ":" in host else host  # IPv6, as in a URL
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks itself whether it has started
    fonts = ["system-ui", "sans-serif"]  # from the visitor's machine: nothing is fetched
    page.launch(
        server_name=name,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        footer_links=[],
        css=STYLE,
        theme=Default(font=fonts, font_mono=["monospace"]),
        prevent_thread_lock=True,
        app_kwargs={"middleware": _only_as(LOCAL)} if host in LOCAL else None,
    )
    return f"http://{name}:{port}"


def _only_as(names: Sequence[str]) -> list[Middleware]:
    """Answer requests for these hosts alone: another site may give its own name the address of this machine."""
    return [Middleware(TrustedHostMiddleware, allowed_hosts=list(names)), Middleware(_FromThisPage)]


class _FromThisPage:
    """Refuses what a page of another site sends here. A browser sends it without asking, and hides only the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        # Behind a proxy, as in an editor in the browser, the page has the proxy's name. No page can forge that header.
        own = [headers.get(name) for name in (b"host", b"x-forwarded-host")]
        if scope.get("method") == "POST" and origin is not None and origin.partition(b"://")[2] not in own:
            await PlainTextResponse("a page of another site may not send here", 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _search_tab(gallery: Gallery, text: str) -> None:
    with gr.Tab("Search"):
        gr.Markdown(f"Search {html.escape(gallery.description)} by a text, an image, or both.")
        with gr.Row():
            query = gr.Textbox(text, label="Text", max_length=MAX_CHARACTERS)
            image = image_upload()
        button = gr.Button("Search", variant="primary")
        found = gr.Gallery(label="Answers, best first", columns=4, object_fit="contain", height="auto")

        def search(text: str, image: Image.Image | None) -> list[tuple[Image.Image, str]]:
            hits = answers.search(gallery, text, image)
            return [(_shown(hit.image), hit.caption) for hit in hits]

        _on([button.click, query.submit], search, [query, image], found)


def _fill_tab(model: TrainedModel, image: Image.Image | None, text: str) -> None:
    with gr.Tab("Fill"):
        gr.Markdown("Guess missing words: write [MASK] for every word piece to guess.")
        with gr.Row():
            picture = image_upload(image)
            with gr.Column():
                query = gr.Textbox(text, label="Text", max_length=MAX_CHARACTERS)
                button = gr.Button("Fill", variant="primary")
                filled = gr.Textbox(label="Filled in", interactive=False)
                table = gr.Dataframe(headers=["[MASK]", "guess", "probability"], label="Guesses", interactive=False)
        _on([button.click, query.submit], lambda i, t: answers.fill(model, i, t), [picture, query], [filled, table])


def _rebuild_tab(model: TrainedModel, image: Image.Image | None, text: str) -> None:
    with gr.Tab("Rebuild"):
        gr.Markdown(
            "Rub out parts of an image: choose one, or click on patches. The model draws them anew, under a text."
        )
        start = answers.hide_part(model, answers.PARTS[-1])
        hidden = gr.State(start)
        with gr.Row():
            picture = image_upload(image)
            seen = gr.Image(
                answers.draw_hidden(image, start), label="What the model sees (click on patches)", interactive=False,
                height=TALL, buttons=[],
            )  # fmt: skip
        part = gr.Radio(list(answers.PARTS), value=answers.PARTS[-1], label="Rub out")
        with gr.Row():
            query = gr.Textbox(text, label="Text", max_length=MAX_CHARACTERS)
            wrong = gr.Textbox("a red heart", label="Another text, to compare", max_length=MAX_CHARACTERS)
        button = gr.Button("Rebuild", variant="primary")
        with gr.Row():
            right_image = gr.Image(label="Rebuilt under the text", interactive=False, height=TALL, buttons=BUTTONS)
            wrong_image = gr.Image(
                label="Rebuilt under the other text", interactive=False, height=TALL, buttons=BUTTONS
            )

        def choose(part: str, image: Image.Image | None) -> Any:
            mask = answers.hide_part(model, part)
            return mask, answers.draw_hidden(image, mask)

        def click(mask: Any, image: Image.Image | None, event: gr.SelectData) -> Any:
            changed = answers.toggle_patch(mask, event.index)
            return changed, answers.draw_hidden(image, changed)

        _on([part.change], choose, [part, picture], [hidden, seen])
        _on([picture.change], lambda m, i: answers.draw_hidden(i, m), [hidden, picture], seen)
        _on([seen.select], click, [hidden, picture], [hidden, seen])
        _on(
            [button.click, query.submit, wrong.submit],
            lambda i, m, t, w: answers.rebuild(model, i, m, t, w),
            [picture, hidden, query, wrong],
            [right_image, wrong_image],
        )


def _look_tab(model: TrainedModel, image: Image.Image | None, text: str) -> None:
    with gr.Tab("Where it looks"):
        gr.Markdown(
            "Where each word looks when the model judges whether text and image match (GradCAM). "
            "A map of high contrast is drawn for any model: compare words."
        )
        with gr.Row():
            picture = image_upload(image)
            with gr.Column():
                query = gr.Textbox(text, label="Text", max_length=MAX_CHARACTERS)
                button = gr.Button("Look", variant="primary")
        maps = gr.Gallery(label="Words", columns=4, object_fit="contain", height="auto")
        _on([button.click, query.submit], lambda i, t: answers.look(model, i, t), [picture, query], maps)


def _classify_tab(model: TrainedModel, image: Image.Image | None, caption: str) -> None:
    labels = "\n".join(dict.fromkeys([caption, "red heart", "dog", "flag", "face"])).strip()
    with gr.Tab("Classify"):
        with gr.Row():
            picture = image_upload(image)
            with gr.Column():
                names = gr.Textbox(labels, label=f"Labels, one a line, at most {MAX_LABELS}", lines=5)
                templates = gr.Textbox("", label="Templates, one a line, with {} for the label (optional)", lines=2)
                button = gr.Button("Classify", variant="primary")
                chances = gr.Label(label="Probabilities")
        _on(
            [button.click],
            lambda i, n, t: answers.classify(model, i, n, t),
            [picture, names, templates],
            chances,
        )


def _on(events: list[Any], answer: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
    """Call `answer` at each event. It is not offered as an API."""
    gr.on(events, _say(answer), inputs, outputs, api_visibility="private")


def _say(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The same function. A visitor's mistake becomes a message on the page."""

    @wraps(answer)
    def call(*values: Any) -> Any:
        try:
            return answer(*values)
        except ValueError as error:  # ours are ValueErrors of one line
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return call
