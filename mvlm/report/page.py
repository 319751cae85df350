"""A run's report: one HTML file with its pictures inside, readable offline."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from mvlm.config.json_files import read_config
from mvlm.errors import RunError
from mvlm.files import check_folder
from mvlm.inference.encode import encode_split
from mvlm.report import examples
from mvlm.report.charts import line_chart, smooth
from mvlm.runs.folder import RunFolder, read_metrics
from mvlm.runs.load import load_model
from mvlm_dataloading import open_dataset

STYLE = (Path(__file__).parent / "style.css").read_text()


def write_report(run: Path, data: Path | None = None, out: Path | None = None) -> Path:
    """Write the report of a run that has a checkpoint and an evaluation; returns the file, or RunError."""
    check_folder(run, "a run folder")
    folder = RunFolder(run)
    config = read_config(folder.config)
    figures_file = folder.evaluation
    if not figures_file.is_file():
        raise RunError(
            f"{figures_file}: wanted the run's evaluation, found none; first run "
            f"`mvlm eval retrieval --checkpoint {run} --data {data or config['data']} --out {figures_file}`"
        )
    model, tokenizer = load_model(run)
    with figures_of(figures_file) as figures:
        head = headline(run, figures)
    shards = data or Path(str(figures.get("data", config["data"])))
    split, train = open_dataset(shards, figures["split"]), open_dataset(shards, "train")
    features = encode_split(model, split, tokenizer)
    parts = [
        head,
        curves(read_metrics(folder.metrics)),
        examples.reconstructions(model, tokenizer, split),
        examples.filled_words(model, tokenizer, split),
        examples.retrievals(model, split, train, features),
        configuration(config),
        attribution(split.description),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)} · mvlm</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    out = out or folder.report
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    return out


@contextmanager
def figures_of(file: Path) -> Iterator[dict[str, Any]]:
    """What `mvlm eval retrieval` wrote; RunError where it is not that, also where it lacks what is read within."""
    try:
        yield json.loads(file.read_text())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{file}: wanted the figures that `mvlm eval retrieval` writes, got {error!r}; evaluate the run again"
        ) from None


def table(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells are plain text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def headline(run: Path, figures: dict[str, Any]) -> str:
    """What the run reached, with chance and the trivial predictors beside it."""
    rows = []
    for name, part in (("all", figures), ("unseen concepts", figures["unseen"])):
        if part is None:
            continue
        for how, found in (("re-ranked by ITM", part), ("ITC alone", part["itc"])):
            cells = [f"{found[direction][r]:.1f}" for direction in ("tr", "ir") for r in ("r1", "r5", "r10")]
            rows.append([f"{name}: {part['n_images']} images, {part['n_texts']} captions", how, *cells])
    chance = [f"{100 * k / figures[n]:.2f}" for n in ("n_texts", "n_images") for k in (1, 5, 10)]
    rows.append(["chance", "", *chance])
    text, pixels = figures["gain_text_nats_95"], figures["gain_pixels_pct_95"]
    objectives = table(
        ["objective", "figure", "held against"],
        [
            [
                "text: cross-modal gain",
                f"{figures['gain_text_nats']:.2f} nats a token ({text[0]:.2f} to {text[1]:.2f})",
                "0 when the picture does not help",
            ],
            [
                "pixels: cross-modal gain",
                f"{figures['gain_pixels_pct']:.2f} % ({pixels[0]:.2f} to {pixels[1]:.2f})",
                "0 when the caption does not help",
            ],
            [
                "pixels: masked L1",
                f"{figures['masked_l1']:.4f}",
                f"constant white {figures['masked_l1_white']:.4f}, "
                f"training median {figures['masked_l1_train_median']:.4f}",
            ],
            ["text: masked tokens", f"{figures['masked_nats']:.3f} nats a token", ""],
        ],
    )
    names = [f"{direction} R@{k}" for direction in ("image to text", "text to image") for k in (1, 5, 10)]
    when = datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        f"<h1>{escape(run.name)}</h1><p class='note'>Zero-shot on the {escape(figures['split'])} split, checkpoint "
        f"{escape(figures['checkpoint'])}, written {when}. Per cent of queries with a right answer among the first K. "
        f"Intervals: 95 %, bootstrapped over samples.</p>"
        f"<section><h2>Retrieval</h2>{table(['queries', 'ranked by', *names], rows)}"
        f"{unseen_note(figures)}</section>"
        f"<section><h2>Does each modality help the other?</h2>{objectives}</section>"
    )


def unseen_note(figures: dict[str, Any]) -> str:
    """What the rows of unseen concepts mean, where they are some of the pictures: elsewhere they mean nothing."""
    unseen = figures["unseen"]
    if unseen is None or unseen["n_images"] == figures["n_images"]:
        return ""
    known = figures["n_images"] - unseen["n_images"]
    return (
        f"<p class='note'>{known} of {figures['n_images']} pictures show a concept that training pictures show too, "
        f"many of them differing from one only in skin tone; the rows of unseen concepts count the others.</p>"
    )


def curves(rows: list[dict[str, Any]]) -> str:
    """Losses, learning rate and gradient norm by step; validation figures where there are any."""

    def line(name: str, window: int = 1) -> tuple[list[float], list[float]]:
        kept = [row for row in rows if row.get(name) is not None]
        return [row["step"] for row in kept], smooth([row[name] for row in kept], window)

    window = max(1, len(rows) // 60)
    titles = {
        "mlm": "MLM, nats a masked token",
        "mim": "MIM, L1 of masked pixels",
        "itc": "ITC, nats",
        "itm": "ITM, nats",
    }
    charts = [line_chart(title, {name: line(name, window)}) for name, title in titles.items()]
    charts.append(line_chart("learning rate", {"lr": line("lr")}))
    charts.append(line_chart("gradient norm before clipping", {"grad_norm": line("grad_norm", window)}))
    if any("tr_r1" in row for row in rows):
        charts.append(
            line_chart("validation R@1 by ITC, %", {"image to text": line("tr_r1"), "text to image": line("ir_r1")})
        )
        charts.append(line_chart("validation masked L1", {"masked L1": line("masked_l1")}))
        charts.append(line_chart("validation gain, text, nats a token", {"gain": line("gain_text_nats")}, {"none": 0}))
        charts.append(line_chart("validation gain, pixels, %", {"gain": line("gain_pixels_pct")}, {"none": 0}))
    return (
        f"<section><h2>Training</h2><div class='charts'>{''.join(charts)}</div><p class='note'>By step; losses are "
        f"means over {window} steps. Training pictures are random crops, which are harder to rebuild than the whole "
        f"pictures of the evaluation.</p></section>"
    )


def configuration(config: dict[str, Any]) -> str:
    """Every setting of the run."""
    flat = {name: value for name, value in config.items() if name != "model"}
    flat |= {f"model.{name}": value for name, value in config["model"].items()}
    rows = [[name, json.dumps(value)] for name, value in flat.items()]
    return (
        f"<section><h2>Configuration</h2><details><summary>{len(rows)} settings</summary>"
        f"{table(['setting', 'value'], rows)}</details></section>"
    )


def attribution(description: dict[str, Any]) -> str:
    """Where the data comes from and what its licence asks for."""
    lines = [f"{name}: {description[name]}" for name in ("source", "licence", "attribution") if description.get(name)]
    return "<section><h2>Data</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</section>"
