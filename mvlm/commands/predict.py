"""`mvlm predict`, `reconstruct`, `fill` and `app`: questions to a trained model, in the terminal or on a web page."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from mvlm.terminal import say

# Commands import what they need when they run, so that --help and errors are immediate.


def predict(
    run: Path,
    images: tuple[Path, ...],
    /,
    *,
    text: tuple[str, ...] = (),
    out: Path | None = None,
    task: Path | None = None,
    image_column: str = "image",
    text_column: str = "text",
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Ask a fine-tuned model about new images.

    It gives answers, entailment, captions, or what a task of your own predicts.
    Without --out each prediction is a line. An image that cannot be used is named, and has an error in place of a
    prediction in the file.

    Args:
        run: Fine-tuned run, or one of its checkpoints.
        images: Image files, folders of images, or tables (.csv, .tsv, .jsonl) whose rows name an image, relative to the
            table, and a text.
        text: Questions, hypotheses or statements, asked of each image.
        out: File to write the predictions to: .json, .jsonl or .parquet.
        task: Python file of the task, if it is your own.
        image_column: Column of a table with the image; a list of images for a task with several a sample.
        text_column: Column of a table with the text.
        device: auto, cpu or cuda.
        precision: auto, bf16 or fp32.
    """
    from mvlm.commands.arguments import check_no_input
    from mvlm.errors import ConfigError, RunError
    from mvlm.tasks.load import load_model
    from mvlm.tasks.predict import FORMATS, predicted, questions_of, write_rows

    if out is not None and (out.suffix not in FORMATS or out.is_dir()):
        raise ConfigError(f"out: wanted a file that ends in {', '.join(FORMATS)}, got {out}")
    check_no_input(out, *images)
    if not images:
        raise ConfigError("images: wanted image files, folders or tables, got none")
    model = load_model(run, device, precision, task=task)
    together = model.task_for("predict").loader_options().get("strip", 1)
    rows = []
    for row in predicted(model, questions_of(images, text, together, image_column, text_column)):
        rows.append(row)
        if out is None and "error" not in row:  # which has been logged
            values = [" ".join(value) if isinstance(value, list) else str(value) for value in row.values()]
            say("\t".join(values), flush=True)
    wrong = sum("error" in row for row in rows)
    if wrong == len(rows):
        raise RunError(f"images: wanted one that can be used, found none of {wrong}; check the files")
    if out is not None:
        write_rows(rows, out)
        say(f"{out}: {len(rows) - wrong:,} predictions" + (f", {wrong:,} images left out" if wrong else ""))


def reconstruct(
    *,
    checkpoint: Path,
    image: Path,
    caption: str,
    out: Path,
    wrong_caption: str | None = None,
    seed: int = 0,
    steps: int = 1,
    image_size: int | None = None,
) -> None:
    """Mask an image and rebuild it from its visible patches and a caption.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        image: Image file of any size.
        caption: Caption of the image.
        out: PNG to write: the image, masked, rebuilt with the caption and, if given, with the wrong one.
        wrong_caption: Caption of another image, to see the caption's contribution.
        seed: Seed of the mask.
        steps: Steps in which patches are rebuilt, those first that continue the patches beside them best.
        image_size: Side in pixels at which the model sees the image; position embeddings are resized. Default: as
            trained.
    """
    import numpy as np
    from PIL import Image

    from mvlm.errors import ConfigError
    from mvlm.runs.load import load_without_head
    from mvlm_dataloading.files import replaced

    if out.suffix.lower() != ".png" or out.is_dir():
        raise ConfigError(f"out: wanted a .png file to write, got {out}")
    if out.exists() and out.samefile(image):
        raise ConfigError(f"out: wanted another file than the image itself, got {out} for both")
    if not out.parent.is_dir():
        raise ConfigError(f"out: wanted a file in a folder that is there, found no folder {out.parent}; make it first")
    model = load_without_head(checkpoint, image_size=image_size)
    found = model.reconstruct(image, caption, seed=seed, steps=steps)
    panels = [found.image, found.masked, found.rebuilt]
    if wrong_caption is not None:
        panels.append(model.reconstruct(image, wrong_caption, seed=seed, steps=steps).rebuilt)
    with replaced(out) as aside:
        Image.fromarray(np.concatenate(panels, axis=1)).save(aside, "PNG")
    say(f"{out}: image, masked, rebuilt{' and rebuilt with the wrong caption' if wrong_caption else ''}")


def fill(
    *, checkpoint: Path, image: Path, caption: str, top: int = 5, steps: int = 1, image_size: int | None = None
) -> None:
    """Guess the [MASK] tokens of a caption, given its image.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        image: Image file of any size.
        caption: Caption with [MASK] for every token to guess, for example "flag of [MASK]".
        top: Guesses to print for each [MASK].
        steps: Steps in which [MASK]s are replaced, the most probable first; later guesses see earlier ones.
        image_size: Side in pixels at which the model sees the image; position embeddings are resized. Default: as
            trained.
    """
    from mvlm.runs.load import load_without_head

    model = load_without_head(checkpoint, image_size=image_size)
    for number, guesses in enumerate(model.fill(caption, image, top, steps).guesses, 1):
        shown = "  ".join(f"{guess.token} {100 * guess.probability:.0f}%" for guess in guesses)
        say(f"[MASK] {number}: {shown}")


@contextlib.contextmanager
def _temporary_uploads() -> Iterator[None]:
    """Inside the block, Gradio keeps what visitors send in a temporary folder, of which nothing stays.

    It is in the folder that GRADIO_TEMP_DIR names, if that is set.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR", "")
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="mvlm-app-", dir=parent or None) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported
        try:
            yield
        finally:
            os.environ["GRADIO_TEMP_DIR"] = parent


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the block, SIGTERM does what Ctrl-C does, so that whatever is to be deleted is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def app(
    checkpoint: str,
    /,
    *,
    data: Path | None = None,
    index: str | None = None,
    source: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    allow_host: tuple[str, ...] = (),
    behind_proxy: bool = False,
    task: Path | None = None,
    device: str = "auto",
) -> None:
    """Open a local web page that asks a trained model.

    It asks the model's task, searches, fills, rebuilds, shows where the model looks, and classifies.

    Args:
        checkpoint: Run folder, one of its checkpoints, exported folder, or id on the Hugging Face hub.
        data: Data folder to search. Default: that of the run.
        index: Index of `mvlm search` to search instead of a data folder, folder or URL.
        source: URLs of embedded collections that the index names, whose images are shown.
        host: Address to listen on. Others can reach the page only if you give 0.0.0.0.
        port: Port to listen on.
        allow_host: Further names under which browsers reach this machine, such as that of a proxy. Others are refused.
        behind_proxy: Every request comes through a proxy, whose X-Forwarded-For, -Host and -Proto are believed. Without
            this, nobody's are.
        task: Python file of the run's task, if it is your own.
        device: auto, cpu or cuda.
    """
    from mvlm.errors import ConfigError

    if data is not None and index is not None:
        raise ConfigError("index: wanted --data or --index, got both; leave one out")
    with _ended_by_sigterm(), _temporary_uploads():
        from mvlm.app.answers import MAX_TEXTS, about_task, most_shared_texts
        from mvlm.app.gallery import IndexGallery, data_of_run, open_gallery
        from mvlm.app.gate import is_local
        from mvlm.app.page import build_page  # fails without gradio, before anything is loaded
        from mvlm.app.server import bind, start
        from mvlm.search.index import open_index
        from mvlm.tasks.load import load_model

        bind(host, port).close()  # fails before the model is loaded
        model = load_model(checkpoint, device, task=task)
        data = data or data_of_run(Path(checkpoint))
        if index is not None:
            gallery = IndexGallery(model, open_index(index), index, source)
        else:
            gallery = open_gallery(model, data) if data is not None else None
            if gallery is None:
                say(f"{checkpoint}: its data are not here, so there is no search; give --data or --index")
        # A question runs to its end: a long one would keep all other visitors waiting.
        alone = is_local(host) and not (behind_proxy or allow_host)
        page = build_page(model, gallery, Path(checkpoint).name, MAX_TEXTS if alone else most_shared_texts(model))
        server = start(page, host, port, allow_host, behind_proxy)
        try:
            say(f"{server.url}  (Ctrl-C ends it)\n{about_task(model)}", flush=True)
            server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.close()
