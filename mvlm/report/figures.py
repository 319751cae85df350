"""Tables and curves of a report: recall, cross-modal gain and masked losses, each with its baseline."""

from typing import Any

from markupsafe import Markup

from mvlm.evaluation.evaluate import describe_trivial_losses
from mvlm.report.charts import line_chart, series
from mvlm.report.html import table


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
