"""Line charts as inline SVG, so that a report needs neither a network nor a plotting package."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 30


def line_chart(
    title: str, series: dict[str, tuple[Sequence[float], Sequence[float]]], guides: dict[str, float] | None = None
) -> str:
    """An SVG with one polyline a series (name -> x values, y values) and dashed lines at the `guides` (name -> y).

    Points that are not finite break nothing: they are left out.
    """
    guides = guides or {}
    points = {
        name: [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
        for name, (xs, ys) in series.items()
    }
    xs = [x for line in points.values() for x, _ in line]
    ys = [y for line in points.values() for _, y in line] + list(guides.values())
    if not xs:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p>no points</p></figure>'
    x_low, x_high, (y_low, y_high, y_step) = min(xs), max(xs), nice_range(min(ys), max(ys))

    def px(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for n in range(round((y_high - y_low) / y_step) + 1):
        y = y_low + n * y_step
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        )
    for x in (x_low, (x_low + x_high) / 2, x_high):
        anchor = "end" if x == x_high else "middle"
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{x:.0f}</text>')
    for name, y in guides.items():
        parts.append(
            f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
            f'<text class="guide" x="{WIDTH - RIGHT}" y="{py(y) - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    for number, line in enumerate(points.values()):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="line{number}" points="{path}"/>')
    keys = [f'<span class="key{number}">{escape(name)}</span>' for number, name in enumerate(points)]
    legend = " ".join(keys) if len(keys) > 1 else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)} {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def nice_range(low: float, high: float) -> tuple[float, float, float]:
    """The smallest range of round numbers around [low, high], and the step between its three to seven grid lines."""
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing means over up to `window` values."""
    found, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        found.append(total / min(i + 1, window))
    return found
