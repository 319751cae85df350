"""The page, in Gradio: a tab for each question."""

import asyncio
import html
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mvlm.app import answers
from mvlm.app.answers import MAX_CHARACTERS, MAX_LABELS
from mvlm.app.gallery import Gallery
from mvlm.app.uploads import Uploads
from mvlm.errors import ConfigError
from mvlm.inference.images import rgb_image
from mvlm.inference.texts import shortened
from mvlm.inference.trained_model import TrainedModel

# Read when gradio is imported, or when a page is made.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
    from gradio import processing_utils
except ImportError:
    raise ConfigError("app: wanted the package gradio, which is not installed; pip install 'mvlm[app]'") from None

TALL = 320  # pixels
BUTTONS: list[Any] = ["download", "fullscreen"]
INNARDS = re.compile(r"0x[0-9a-f]{5,}|<[\w.]+ object|(?<![\w/])/[\w.+-]+/|[A-Za-z]*(Error|Exception)\b")
"""Pattern of texts that no visitor gets to see: addresses in memory, paths, names of exceptions."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """A page that can be served."""

    blocks: gr.Blocks
    uploads: Uploads
    worker: ThreadPoolExecutor
    """Answers questions, one at a time, always in the same thread: each further thread would keep memory of its own."""


def image_upload(uploads: Uploads, value: Image.Image | None = None) -> gr.Image:
    """An image that a visitor uploads. Questions get its file, and check it before it is decoded."""
    component = gr.Image(value, label="Image", type="pil", sources=["upload", "clipboard"], height=TALL)

    def preprocess(payload: Any) -> Any:
        if payload is None:
            return None
        if not uploads.holds(payload.path):  # the gate has looked before
            raise gr.Error("image: wanted an image that you uploaded here, found another", print_exception=False)
        return Path(payload.path)

    component.preprocess = preprocess  # a subclass would not be known to Gradio's own JavaScript
    return component


def build_page(model: TrainedModel, gallery: Gallery | None, name: str, most_texts: int = answers.MAX_TEXTS) -> Page:
    """The page of a model.

    Args:
        gallery: images to search; None leaves that tab out.
        name: name of the model, for the heading.
        most_texts: texts of one question of the tab Classify.
    """
    # Names of answers' files are hashes with this. Gradio's own is the same in every process, and in every container.
    processing_utils.hash_seed = os.urandom(32)
    example = gallery.example() if gallery else None
    image = _shown(example.image) if example else None
    caption = shortened(example.caption, model.tokenizer, model.network.config.text_length) if example else ""
    first_word = f"[MASK] {caption.partition(' ')[2]}".strip()
    with gr.Blocks(title=f"mvlm: {name}", analytics_enabled=False) as blocks:
        page = Page(blocks, Uploads(Path(blocks.GRADIO_CACHE)), ThreadPoolExecutor(1, "mvlm-answer"))
        gr.Markdown(f"# {html.escape(name)}\n\n{html.escape(answers.about_task(model), quote=False)}")
        with gr.Tabs():
            if answers.images_of_task(model):
                _ask_tab(page, model, image, caption)
            if gallery:
                _search_tab(page, gallery, caption)
            _fill_tab(page, model, image, first_word)
            _rebuild_tab(page, model, image, caption)
            if model.network.matching_is_trained:
                _look_tab(page, model, image, caption)
            _classify_tab(page, partial(answers.classify, model, most_texts=most_texts), image, caption)
    shown = (component["props"].get("value") for component in blocks.get_config_file()["components"])
    page.uploads.add_examples(value["path"] for value in shown if isinstance(value, dict) and value.get("path"))
    return page


def _shown(image: bytes) -> Image.Image:
    """Decode an image for display: turned as its EXIF data say, transparent areas white, scaled down if too large."""
    shown = rgb_image(image)
    shown.thumbnail((2 * TALL, 2 * TALL))
    return shown


QUESTIONS = {
    "vqa": ("Ask a question about an image.", "Question"),
    "entailment": ("Does an image entail a statement, contradict it, or neither (neutral)?", "Statement"),
    "caption": ("Describe an image.", ""),
    "pairs": ("Is a statement true of these images?", "Statement"),
}
"""Text of each task's tab, and the label of its text field."""


def _ask_tab(page: Page, model: TrainedModel, image: Image.Image | None, text: str) -> None:
    task = model.task
    assert task is not None
    about, label = QUESTIONS.get(task.name, (f"Ask the task {html.escape(task.name)}.", "Text"))
    count = answers.images_of_task(model)
    length = task.loader_options().get("text_length", task.config.text_length)
    with gr.Tab("Ask"):
        gr.Markdown(about)
        with gr.Row():
            pictures = [image_upload(page.uploads, image if count == 1 else None) for _ in range(count)]
            with gr.Column():
                begin = shortened(text, model.tokenizer, length)
                query = gr.Textbox(begin, label=label, max_length=MAX_CHARACTERS, visible=task.reads_texts)
                button = gr.Button("Ask", variant="primary")
                answer = gr.Textbox(label="Answer", interactive=False)
        inputs = [*pictures, query] if task.reads_texts else pictures
        _on(page, [button.click, query.submit], partial(answers.ask, model), inputs, answer)


def _search_tab(page: Page, gallery: Gallery, text: str) -> None:
    with gr.Tab("Search"):
        gr.Markdown(f"Search {html.escape(gallery.description)} by a text, an image, or both.")
        with gr.Row():
            query = gr.Textbox(text, label="Text", max_length=MAX_CHARACTERS)
            image = image_upload(page.uploads)
        button = gr.Button("Search", variant="primary")
        found = gr.Gallery(label="Answers, best first", columns=4, object_fit="contain", height="auto")

        def search(text: str, image: Image.Image | None) -> list[tuple[Image.Image, str]]:
            hits = answers.search(gallery, text, image)
            return [(_shown(hit.image), hit.caption) for hit in hits]

        _on(page, [button.click, query.submit], search, [query, image], found)


def _fill_tab(page: Page, model: TrainedModel, image: Image.Image | None, text: str) -> None:
    with gr.Tab("Fill"):
        gr.Markdown("Guess missing words: write [MASK] for every word piece to guess.")
        with gr.Row():
            picture = image_upload(page.uploads, image)
            with gr.Column():
                query = gr.Textbox(text, label="Text", max_length=MAX_CHARACTERS)
                button = gr.Button("Fill", variant="primary")
                filled = gr.Textbox(label="Filled in", interactive=False)
                table = gr.Dataframe(headers=["[MASK]", "guess", "probability"], label="Guesses", interactive=False)
        events = [button.click, query.submit]
        _on(page, events, partial(answers.fill, model), [picture, query], [filled, table])


def _rebuild_tab(page: Page, model: TrainedModel, image: Image.Image | None, text: str) -> None:
    with gr.Tab("Rebuild"):
        gr.Markdown(
            "Rub out parts of an image: choose one, or click on patches. The model draws them anew, under a text."
        )
        start = answers.hide_part(model, answers.PARTS[-1])
        hidden = gr.Textbox(answers.write_patches(start), visible=False)  # kept in the browser: no state is kept here
        with gr.Row():
            picture = image_upload(page.uploads, image)
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
            return answers.write_patches(mask), answers.draw_hidden(image, mask)

        def click(mask: str, image: Image.Image | None, point: Any) -> Any:
            changed = answers.toggle_patch(answers.read_patches(model, mask), point)
            return answers.write_patches(changed), answers.draw_hidden(image, changed)

        def draw(mask: str, image: Image.Image | None) -> Any:
            return answers.draw_hidden(image, answers.read_patches(model, mask))

        def rebuild(image: Image.Image | None, mask: str, text: str, wrong: str) -> Any:
            return answers.rebuild(model, image, answers.read_patches(model, mask), text, wrong)

        _on(page, [part.change], choose, [part, picture], [hidden, seen])
        _on(page, [picture.change], draw, [hidden, picture], seen)
        _on(page, [seen.select], click, [hidden, picture], [hidden, seen])
        events = [button.click, query.submit, wrong.submit]
        _on(page, events, rebuild, [picture, hidden, query, wrong], [right_image, wrong_image])


def _look_tab(page: Page, model: TrainedModel, image: Image.Image | None, text: str) -> None:
    with gr.Tab("Where it looks"):
        gr.Markdown(
            "Where each word looks when the model judges whether text and image match (GradCAM). "
            "A map of high contrast is drawn for any model: compare words."
        )
        with gr.Row():
            picture = image_upload(page.uploads, image)
            with gr.Column():
                query = gr.Textbox(text, label="Text", max_length=MAX_CHARACTERS)
                button = gr.Button("Look", variant="primary")
        maps = gr.Gallery(label="Words", columns=4, object_fit="contain", height="auto")
        _on(page, [button.click, query.submit], partial(answers.look, model), [picture, query], maps)


def _classify_tab(page: Page, classify: Callable[..., Any], image: Image.Image | None, caption: str) -> None:
    labels = "\n".join(dict.fromkeys([caption, "red heart", "dog", "flag", "face"])).strip()
    with gr.Tab("Classify"):
        with gr.Row():
            picture = image_upload(page.uploads, image)
            with gr.Column():
                names = gr.Textbox(labels, label=f"Labels, one a line, at most {MAX_LABELS}", lines=5)
                templates = gr.Textbox("", label="Templates, one a line, with {} for the label (optional)", lines=2)
                button = gr.Button("Classify", variant="primary")
                chances = gr.Label(label="Probabilities")
        _on(page, [button.click], classify, [picture, names, templates], chances)


def _on(page: Page, events: list[Any], answer: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
    """Call `answer` at each event. Of a click, the place (x, y) is its last argument.

    Questions wait for their turn before they come to Gradio, which has no queue of its own.
    """

    async def ask(*values: Any) -> Any:
        return await asyncio.wrap_future(page.worker.submit(_answer, answer, values))

    async def click(event: gr.SelectData, *values: Any) -> Any:
        return await ask(*values, event.index)

    asked = click if any(event.event_name == "select" for event in events) else ask
    gr.on(events, asked, inputs, outputs, api_visibility="private", queue=False)


def _answer(answer: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    """Call `answer` with the visitor's values and return the result. Any error becomes one sentence on the page."""
    try:
        return answer(*(answers.check_image(value) if isinstance(value, Path) else value for value in values))
    except ValueError as error:  # ours are ValueErrors of one line
        sentence = str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        log.warning("%s: %s", type(error).__name__, " ".join(str(error).split())[:300])
        sentence = ""
    if not sentence or INNARDS.search(sentence):
        sentence = "the page could not answer that; try another image or text"
    raise gr.Error(html.escape(sentence), print_exception=False)
