"""The HTML of all pages: the template environment, and the parts that they share."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mvlm.errors import RunError

FOLDER = Path(__file__).parent
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,  # run names, captions and attributions are other people's text
    undefined=StrictUndefined,  # a misspelt name in a template is an error, not an empty string
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["style"] = Markup((FOLDER / "style.css").read_text())  # pages load nothing, so they carry it


def render(template: str, **values: Any) -> Markup:
    """The HTML of a template of `templates/`. Every value is escaped, except Markup."""
    return Markup(ENVIRONMENT.get_template(template).render(values))


def write_page(out: Path, template: str, **values: Any) -> Path:
    """Render a template into a file, making its folder if there is none. Returns the file."""
    page = render(template, **values)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """An HTML table; cells are plain text."""
    return render("table.html", header=header, rows=rows)


ENVIRONMENT.globals["table"] = table


def data_uri(image: Image.Image | Tensor) -> str:
    """An image, or pixels uint8 (3, H, W), as a data URI that holds its PNG."""
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextmanager
def figures_of(file: Path, command: str = "mvlm eval retrieval") -> Iterator[dict[str, Any]]:
    """The figures that a command wrote to a file.

    Raises:
        RunError: the file is something else, or lacks a figure that is read inside the `with` block.
    """
    try:
        yield json.loads(file.read_text())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{file}: wanted the figures that `{command}` writes, got {error!r}; evaluate the run again"
        ) from None
