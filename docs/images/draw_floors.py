"""Draw docs/images/floors.svg, the rooms of mvlm on their floors: `python docs/images/draw_floors.py`.

A room of the table is drawn once its folder exists.
"""

from pathlib import Path

HERE = Path(__file__).parent
MVLM = HERE.parents[1] / "mvlm"

# Top to bottom: the floor's name, and (name, what it holds) of its rooms and files.
FLOORS = [
    ("command line", [("cli", "find the command; errors to exit codes"), ("commands/", "parse, call, print")]),
    (
        "uses",
        [
            ("studies/", "arms and seeds compared"),
            ("verify/", "a run verified"),
            ("app/", "the local web page"),
            ("report/", "HTML pages"),
        ],
    ),
    ("downstream", [("tasks/", "fine-tuning, one file a task")]),
    ("the work", [("training/", "the loop and its guards"), ("search/", "an index of embeddings")]),
    (
        "trained models",
        [
            ("runs/", "folder, checkpoints"),
            ("inference/", "questions, answers"),
            ("evaluation/", "retrieval, gain"),
            ("portable/", "programs, the hub"),
            ("costs/", "FLOPs, memory"),
            ("weights/", "where a run starts"),
        ],
    ),
    (
        "the model",
        [
            ("distributed/", "ranks, the global batch"),
            ("objectives/", "MLM, MIM, ITC, ITM"),
            ("model/", "two implementations"),
        ],
    ),
    ("its terms", [("config/", "every setting, its recipes, its JSON")]),
    (
        "ground",
        [("files", ""), ("device", ""), ("machine", ""), ("progress", ""), ("statistics", ""), ("errors", "")],
    ),
]
PACKAGES = [
    ("mvlm_kernels", "fused ops; need torch, Triton and NumPy"),
    ("mvlm_dataloading", "shards, tokens, the DALI pipeline"),
]
LEFT, WIDTH, TOP, HEIGHT, STEP, GAP = 150, 730, 16, 54, 66, 12
STYLE = """<style>
text { font-family: system-ui, sans-serif; fill: #1f2430; }
.bg { fill: #ffffff; }
.room { fill: #e8effb; stroke: #7c97c9; }
.file { fill: #f3f3f0; stroke: #b3b3ab; }
.package { fill: #e9f5ec; stroke: #7fb08b; }
.name { font-size: 15px; font-weight: 600; }
.what, .floor { font-size: 12px; fill: #5a6170; }
.rule { stroke: #c9ccd3; stroke-dasharray: 4 4; }
.down { stroke: #7c97c9; stroke-width: 2; fill: none; }
</style>"""


def draw_floor(y: int, floor: str, rooms: list[tuple[str, str]], kind: str = "") -> list[str]:
    """The lines of a floor whose boxes begin at height `y`."""
    lines = [f'<text class="floor" x="{LEFT - 14}" y="{y + HEIGHT / 2 + 5}" text-anchor="end">{floor}</text>']
    width = (WIDTH - GAP * (len(rooms) - 1)) / len(rooms)
    for place, (name, holds) in enumerate(rooms):
        x = LEFT + place * (width + GAP)
        middle = f'x="{x + width / 2:.0f}" text-anchor="middle"'
        what = kind or ("room" if name.endswith("/") else "file")
        lines += [
            f'<rect class="{what}" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="6"/>',
            f'<text class="name" {middle} y="{y + (23 if holds else 32)}">{name}</text>',
            f'<text class="what" {middle} y="{y + 42}">{holds}</text>' if holds else "",
        ]
    return [line for line in lines if line]


def draw() -> str:
    """The picture as SVG."""
    floors = []
    for name, rooms in FLOORS:
        built = [room for room in rooms if not room[0].endswith("/") or (MVLM / room[0] / "__init__.py").is_file()]
        if built:
            floors.append((name, built))
    lines, y = [], TOP
    for name, rooms in floors:
        lines += draw_floor(y, name, rooms)
        y += STEP
    bottom = y - GAP
    lines.append(f'<line class="rule" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{bottom + 14}" y2="{bottom + 14}"/>')
    lines += draw_floor(bottom + 28, "other packages", PACKAGES, "package")
    lines.append(f'<path class="down" d="M {LEFT + WIDTH + 12} 20 V {bottom - 4} m -5 -8 l 5 8 l 5 -8"/>')
    height, width = bottom + 28 + HEIGHT + TOP, LEFT + WIDTH + 30
    label = "Floors and rooms of mvlm; imports go down"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    back = f'<rect class="bg" width="{width}" height="{height}"/>'
    return "\n".join([head, STYLE, back, *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "floors.svg").write_text(draw())
