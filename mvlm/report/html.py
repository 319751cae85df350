"""The HTML of all pages: the template environment, tables, images, and charts of lines and intervals as inline SVG."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mvlm.inference.images import decode_image
from mvlm.untrusted import run_errors
from mvlm_dataloading.files import write_file

WIDTH, HEIGHT = 460, 210  # of a chart, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 30
INTERVALS_WIDTH, ROW = 640, 34  # of a chart of intervals, and the height of a row, in pixels
POINTS = 1000  # of a line with twice as many values or more; a chart is 392 px wide between its margins
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


def write_page(out: Path, template: str, *, within: Path | None = None, **values: Any) -> Path:
    """Render a template into a file, making its folder if there is none. Returns the file.

    Args:
        within: folder that the file has to lie in, once links are resolved. Default: the user has named the file.
    """
    page = render(template, **values)
    out.parent.mkdir(parents=True, exist_ok=True)
    with run_errors():
        write_file(out, page, within=within)
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


def thumbnail(image: Path | bytes, longest: int = 160) -> str:
    """An image as a data URI of a small PNG, at most `longest` pixels wide and high."""
    small = Image.fromarray(decode_image(image))
    small.thumbnail((longest, longest))
    return data_uri(small)


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    guides: Mapping[str, float] | None = None,
    places: Sequence[float] = (),
) -> Markup:
    """An SVG with one polyline per series (name -> x values, y values) and dashed lines at the `guides` (name -> y).

    Vertical dashed lines stand at the x values `places`, as far as the chart shows them.

    Points that are not finite are left out.
    """
    guides = guides or {}
    points = {
        name: [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
        for name, (xs, ys) in series.items()
    }
    xs = [x for line in points.values() for x, _ in line]
    ys = [y for line in points.values() for _, y in line] + list(guides.values())
    if not xs:
        return render("chart.html", title=title, names=[], lines=[])
    x_low, x_high, (y_low, y_high, y_step) = min(xs), max(xs), nice_range(min(ys), max(ys))

    def px(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def line_at(y: float, text: str, below: float) -> dict[str, str]:
        """A horizontal line and its label, which stands `below` the line."""
        return {"y": f"{py(y):.1f}", "text": text, "text_y": f"{py(y) + below:.1f}"}

    grid_values = [y_low + n * y_step for n in range(round((y_high - y_low) / y_step) + 1)]
    return render(
        "chart.html",
        title=title,
        names=list(points),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        grid=[line_at(y, f"{y:.4g}", 4) for y in grid_values],
        ticks=[
            {
                "x": f"{px(x):.1f}",
                "anchor": "end" if x == x_high else "middle",
                "text": f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}",
            }
            for x in (x_low, (x_low + x_high) / 2, x_high)
        ],
        guides=[line_at(y, name, -4) for name, y in guides.items()],
        places=[f"{px(x):.1f}" for x in places if x_low <= x <= x_high],
        top=TOP,
        bottom=HEIGHT - BOTTOM,
        lines=[" ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line) for line in points.values()],
    )


def interval_chart(title: str, rows: Mapping[str, tuple[float, float, float]]) -> Markup:
    """An SVG with a dot and a line for each row (name -> value, low and high end of its interval), and a line at 0.

    A row whose interval leaves out 0 is bold and coloured.
    """
    low, high, step = nice_range(min(0, *(low for _, low, _ in rows.values())), max(0, *(h for *_, h in rows.values())))

    def px(x: float) -> str:
        return f"{RIGHT + (x - low) / (high - low) * (INTERVALS_WIDTH - 2 * RIGHT):.1f}"

    ticks = [low + n * step for n in range(round((high - low) / step) + 1)]
    return render(
        "intervals.html",
        title=title,
        width=INTERVALS_WIDTH,
        bottom=ROW * len(rows) + TOP,
        ticks=[{"x": px(x), "text": f"{x:.4g}"} for x in ticks],
        zero=px(0),
        rows=[
            {
                "name": name,
                "y": ROW * number,
                "value": px(value),
                "low": px(left),
                "high": px(right),
                "kind": "apart" if left > 0 or right < 0 else "around",
                "text": f"{value:+.3g} [{left:+.3g}, {right:+.3g}]",
            }
            for number, (name, (value, left, right)) in enumerate(rows.items(), 1)
        ],
    )


def nice_range(low: float, high: float) -> tuple[float, float, float]:
    """The smallest range of round numbers around [low, high], and the step between its three to seven grid lines."""
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def series(rows: Sequence[Mapping[str, Any]], name: str, window: int = 1) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it was computed; values are trailing means over `window` of them.

    Of many rows, evenly spaced ones and the last become points. Their means are over all rows of their windows.
    """
    kept = [row for row in rows if row.get(name) is not None]
    values = [row[name] for row in kept]
    drawn = list(range(0, len(kept), max(1, len(kept) // POINTS)))
    if drawn and drawn[-1] < len(kept) - 1:
        drawn.append(len(kept) - 1)
    # Not by a running sum: after one huge value it would have lost all smaller ones.
    return [kept[i]["step"] for i in drawn], [fmean(values[max(0, i + 1 - window) : i + 1]) for i in drawn]
