"""Rendering of SVG drawings."""

import io

from mvlm_dataloading.errors import need


def render_svg(svg: str, size: int) -> bytes:
    """Render an SVG as a square PNG of `size` pixels: the drawing as large as fits, centred on white.

    Raises:
        ValueError: resvg cannot read it.
        ImportError: a package of the extra `demo` is missing.
    """
    resvg, pil = need("resvg_py", "demo"), need("PIL.Image")
    rendered = resvg.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    image = pil.open(io.BytesIO(rendered)).convert("RGB")
    if image.size != (size, size):
        canvas = pil.new("RGB", (size, size), "white")
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()
