"""A run's report: one HTML file with its images inside, readable offline."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mvlm.config.json_files import read_config
from mvlm.errors import RunError
from mvlm.evaluation.evaluate import default_rerank
from mvlm.evaluation.features import encode_split
from mvlm.evaluation.table import describe_trivial_losses
from mvlm.evaluation.workspace import open_workspace
from mvlm.files import check_folder
from mvlm.report import embedding_space, examples
from mvlm.report.attention import pointing_game, word_maps
from mvlm.report.charts import line_chart, series
from mvlm.report.comparison import metrics_of
from mvlm.report.html import figures_of, table, write_page
from mvlm.runs.folder import RunFolder
from mvlm.runs.load import load_model
from mvlm_dataloading import open_dataset


def write_report(run: Path, data: Path | None = None, out: Path | None = None) -> Path:
    """Write the report of a run that has a checkpoint and an evaluation. Returns the file.

    Args:
        run: The run folder.
        data: Folder of shards for the examples. Default: the one that the run was evaluated on.
        out: File to write. Default: `report.html` in the run folder.

    Raises:
        RunError: the folder is not a run, or has no checkpoint, evaluation or metrics.
    """
    check_folder(run, "a run folder")
    folder = RunFolder(run)
    config = read_config(folder.config)
    if not folder.evaluation.is_file():
        raise RunError(
            f"{folder.evaluation}: wanted the run's evaluation, found none; first run "
            f"`mvlm eval retrieval --checkpoint {run} --data {data or config['data']} --out {folder.evaluation}`"
        )
    rows = metrics_of(folder)
    trained = load_model(run)
    model, tokenizer = trained
    with figures_of(folder.evaluation) as figures:
        tables = {"recalls": recalls(figures), "objectives": objectives(figures), "unseen_note": unseen_note(figures)}
        source = {"split": figures["split"], "checkpoint": figures["checkpoint"]}
        stale = figures.get("model", trained.sha256) != trained.sha256  # those of an earlier version name no model
    shards = data or Path(str(figures.get("data", config["data"])))
    split = open_dataset(shards, source["split"])
    train = open_dataset(shards, "train") if "train" in split.splits else None
    window = max(1, len(rows) // 60)
    with open_workspace(None, {}) as workspace:  # features of a large split have no room in memory
        features = encode_split(model, split, tokenizer, workspace=workspace)
        of_features = {
            "retrievals": examples.retrievals(model, split, train, features, default_rerank(model), workspace),
            "neighbours": embedding_space.neighbours(split, features),
            "embedding_map": embedding_space.embedding_map(split, features),
            "confusions": embedding_space.confusions(split, features),
        }
    return write_page(
        out or folder.report,
        "report.html",
        title=run.resolve().name,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        **source,
        **tables,
        zero_shot="task" not in config,
        stale=stale,
        window=window,
        curves=curves(rows, window),
        reconstructions=examples.reconstructions(model, tokenizer, split),
        filled_captions=examples.filled_captions(model, tokenizer, split),
        word_maps=word_maps(trained, split) if model.matching_is_trained else None,
        pointing_game=pointing_game(folder.grounding, trained.sha256),
        grounding=folder.grounding,
        **of_features,
        settings=settings(config),
        attribution=attribution(split.description),
    )


def recalls(figures: dict[str, Any]) -> Markup:
    """A table of R@1, R@5 and R@10 in both directions, with chance."""
    rows = []
    for name, part in (("all", figures), ("unseen concepts", figures["unseen"])):
        if part is None:
            continue
        ranked = (("re-ranked by ITC + ITM", part), ("by ITM alone", part.get("itm")), ("ITC alone", part["itc"]))
        for how, found in ranked if figures.get("reranked") != 0 else ranked[2:]:  # without ITM all ranks are ITC's
            if found is None:  # of an earlier version
                continue
            cells = [f"{found[direction][r]:.1f}" for direction in ("tr", "ir") for r in ("r1", "r5", "r10")]
            rows.append([f"{name}: {part['n_images']} images, {part['n_texts']} captions", how, *cells])
    chance = [
        f"{min(100, 100 * k / figures['n_images']):.2f}" for k in (1, 5, 10)
    ]  # with all captions of an image right
    rows.append(["chance", "", *chance, *chance])
    names = [f"{direction} R@{k}" for direction in ("image to text", "text to image") for k in (1, 5, 10)]
    return table(["queries", "ranked by", *names], rows)


def objectives(figures: dict[str, Any]) -> Markup:
    """A table of cross-modal gain and masked losses, each with its baseline."""
    text, pixels = figures["gain_text_nats_95"], figures["gain_pixels_pct_95"]
    return table(
        ["objective", "figure", "baseline"],
        [
            [
                "text: cross-modal gain",
                f"{figures['gain_text_nats']:.2f} nats per token ({text[0]:.2f} to {text[1]:.2f})",
                "0 if the image does not help",
            ],
            [
                "pixels: cross-modal gain",
                f"{figures['gain_pixels_pct']:.2f} % ({pixels[0]:.2f} to {pixels[1]:.2f})",
                "0 if the caption does not help",
            ],
            [
                "pixels: masked L1",
                f"{figures['masked_l1']:.4f}",
                describe_trivial_losses(figures),
            ],
            ["text: masked tokens", f"{figures['masked_nats']:.3f} nats per token", ""],
        ],
    )


def unseen_note(figures: dict[str, Any]) -> str:
    """An explanation of the rows of unseen concepts; empty if all images or none are of unseen concepts."""
    unseen = figures["unseen"]
    if unseen is None or unseen["n_images"] == figures["n_images"]:
        return ""
    known = figures["n_images"] - unseen["n_images"]
    return (
        f"{known} of {figures['n_images']} images show a concept that training images show too; many of them differ "
        f"from one only in skin tone. The rows of unseen concepts count the others."
    )


def curves(rows: list[dict[str, Any]], window: int) -> list[Markup]:
    """Charts of losses, learning rate and gradient norm by step, and of the evaluations if there are any.

    Losses and gradient norm are trailing means over `window` rows.
    """

    titles = {
        "mlm": "MLM, nats per masked token",
        "mim": "MIM, L1 of masked pixels",
        "itc": "ITC, nats",
        "itm": "ITM, nats",
    }
    charts = [line_chart(title, {name: series(rows, name, window)}) for name, title in titles.items()]
    rates = {name: series(rows, name) for name in ("lr", "lr_muon") if any(name in row for row in rows)}
    charts.append(line_chart("learning rate", rates))
    charts.append(line_chart("gradient norm before clipping", {"grad_norm": series(rows, "grad_norm", window)}))
    if any("tr_r1" in row for row in rows):
        charts.append(
            line_chart(
                "validation R@1 by ITC, %",
                {"image to text": series(rows, "tr_r1"), "text to image": series(rows, "ir_r1")},
            )
        )
        charts.append(line_chart("validation masked L1", {"masked L1": series(rows, "masked_l1")}))
        charts.append(
            line_chart(
                "validation gain, text, nats per token", {"gain": series(rows, "gain_text_nats")}, {"no gain": 0}
            )
        )
        charts.append(
            line_chart("validation gain, pixels, %", {"gain": series(rows, "gain_pixels_pct")}, {"no gain": 0})
        )
    return charts


def settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and JSON value of every setting of the run and its model."""
    flat = {name: value for name, value in config.items() if name != "model"}
    flat |= {f"model.{name}": value for name, value in config["model"].items()}
    return [(name, json.dumps(value)) for name, value in flat.items()]


def attribution(description: dict[str, Any]) -> list[str]:
    """Source, licence and attribution of the data, as far as dataset.json states them."""
    return [f"{name}: {description[name]}" for name in ("source", "licence", "attribution") if description.get(name)]
