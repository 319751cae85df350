"""`mvlm search`: an index of embeddings, queries to it, and its upkeep."""

from pathlib import Path
from typing import Literal

from mvlm.terminal import say

# Commands import what they need when they run, so that --help and errors are immediate.


def index(embeddings: Path, index: str, /, method: str = "auto") -> None:
    """Make a search index of the embeddings that `mvlm embed` wrote.

    Args:
        embeddings: Folder that `mvlm embed` wrote.
        index: New folder, or URL of an object store (s3://bucket/name), for the index.
        method: flat (exact), ivf (approximate, for many vectors), or auto: ivf from 100,000 rows on.
    """
    from mvlm.search.index import create_index

    made = create_index(embeddings, index, method)
    say(f"{index}: {made.count('images'):,} images and {made.count('texts'):,} texts")


def query(
    index: str,
    text: str | None = None,
    /,
    *,
    image: Path | None = None,
    of: Literal["images", "texts"] = "images",
    top: int = 10,
    rerank: int = 0,
    where: str | None = None,
    checkpoint: Path | None = None,
    source: tuple[str, ...] = (),
    json: Path | None = None,
    html: Path | None = None,
    device: str = "auto",
) -> None:
    """Search an index by a text, an image, or both together.

    Args:
        index: Folder or URL of the index.
        text: Text of the query.
        image: Image file of the query.
        of: images or texts: the answers wanted.
        top: Answers.
        rerank: Candidates that ITM re-ranks; images need a text in the query, texts an image.
        where: SQL condition on the columns of the index, for example "split = 'test'".
        checkpoint: Model of the index. Default: where it was when its embeddings were made.
        source: URLs of embedded collections that the index names, to read their images for --rerank and --html.
        json: File for the answers, as a JSON list.
        html: File for a page of thumbnails.
        device: auto, cpu or cuda.
    """
    from mvlm.commands.arguments import check_no_input, check_page, check_replaced, read_json
    from mvlm.errors import ConfigError
    from mvlm.report.html import thumbnail, write_page
    from mvlm.runs.load import load_without_head
    from mvlm.search.index import open_index
    from mvlm.search.query import ImageReader, search
    from mvlm_dataloading.files import write_json
    from mvlm_dataloading.untrusted import printable

    check_no_input(html, image, json, flag="html")
    check_no_input(json, image, flag="json")
    check_page(html, "html")
    check_replaced(json, "earlier answers", lambda old: isinstance(read_json(old), list), "json")
    opened = open_index(index)
    if checkpoint is None:
        checkpoint = Path(opened.about["checkpoint"] or "an unknown place")
        if not checkpoint.exists():
            raise ConfigError(f"checkpoint: the index's model was at {checkpoint}, found none there; give --checkpoint")
    model = load_without_head(checkpoint, device)
    hits = search(model, opened, text, image, kind=of, top=top, rerank=rerank, where=where, sources=source)
    if html is not None:
        images = ImageReader(opened, source)
        answers = [(hit, thumbnail(images.read(hit))) for hit in hits]
        query_image = None if image is None else thumbnail(image)
        write_page(html, "answers.html", title=text or str(image), query_image=query_image, answers=answers)
    if json is not None:
        write_json(json, [hit._asdict() for hit in hits])
    captions = [hit.text for hit in hits] if of == "texts" else opened.first_captions(hits)
    for number, (hit, caption) in enumerate(zip(hits, captions, strict=True), 1):
        score = "" if hit.score is None else f"  re-ranked {hit.score:.2f}"
        shown = f"{printable(hit.name)}{'  ' + printable(caption) if caption else ''}"
        say(f"{number:3}  {hit.similarity:.3f}{score}  {shown}")
    if not hits:
        say("no answer")


def add(embeddings: Path, index: str, /) -> None:
    """Add embeddings to an index, or replace those that it has, without building it again.

    Args:
        embeddings: Folder that `mvlm embed` wrote with the model of the index.
        index: Folder or URL of the index.
    """
    from mvlm.search.index import open_index

    added = open_index(index).add(embeddings)
    say(f"{index}: added or replaced {added['images']:,} images and {added['texts']:,} texts")


def remove(index: str, /, *, where: str) -> None:
    """Remove the images and texts that a condition chooses from an index.

    Args:
        index: Folder or URL of the index.
        where: SQL condition on the columns of the index, for example "split = 'test'" or
            "id = 'cat.png' or id like 'cat.png#%'", an image and its captions.
    """
    from mvlm.search.index import open_index

    removed = open_index(index).remove(where)
    say(f"{index}: removed {removed['images']:,} images and {removed['texts']:,} texts")
